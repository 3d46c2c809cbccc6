"""Whether one strategy beats another: intervals, tests and verdicts over fits and test items.

A score is a paired difference: 1 where one strategy is right on a test item and the other wrong, -1 the other way
round, else 0, or a mean of such over label budgets. The fits (seeds, or draws of the labels) and the items are both
samples of what might have been, and every fit is scored on every item: two crossed random factors. Pooling them as
if all fits times items were independent makes noise look certain; so does a bootstrap over a few fits. Scores,
means and margins are fractions, a score at most 1 in size; a level is a coverage, such as 0.95.

Items may be alike: of one writer, patient or scene. `groups`, int [items], says which, and then groups are what is
drawn anew. The mean stays that over items, whatever the sizes of the groups.

Where draws of labels are crossed with seeds, every seed having every draw, both are samples too, and scores are float
[seeds, draws, items]: three crossed random factors. An area over label budgets with other seeds at each is `Apart`.
Wherever scores are [fits, items] here they may be either.

First come intervals and tests of one comparison, then of several at once with their words; last the analysis of
variance under both, in arrays of m comparisons: [m, fits, items] or [m, seeds, draws, items].
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from scipy import special

from tljax.types import InputError

MIN_GROUPS = 8
"""Fewer groups of test items get no word: what a few writers or scenes share is not known from them.

The robust variance of few groups is too small where they differ in size or kind (Cameron, Gelbach and Miller 2008,
"Bootstrap-based improvements for inference with clustered errors", on 5 to 30 groups). Simulated with 5 fits, 95 %
cover 94.8 % with 8 groups of one size, and 91.5 % with 8 of 1 to 15 items, of which there is a warning.
"""

LEAST_ALIKE = 4.0
"""Groups that differ in size get no word if their totals are known no better than those of so many of one size.

Simulated with 5 fits and no difference, 95 %: 900 items in one group beside 100 alone (1.0 by `as_many`) are
called different in 69 % of studies, two of 400 and ten of 20 (2.1) in 19 %, one of 300 and ten of 70 (2.3) in 7 %, one
of 200 and sixteen of 50 (3.8) in 5 %.
"""


@dataclass(frozen=True)
class Apart:
    """Scores whose mean is the sum of the means of parts, each of fits of its own, on the same items.

    >>> scores = Apart((np.ones((2, 5)), np.zeros((3, 5)))) / 2
    >>> scores.mean(), scores.shape, len(scores)
    (0.5, (5, 5), 2)
    """

    parts: tuple[np.ndarray, ...]
    """Float [fits of the part, items] each."""

    def __len__(self) -> int:
        """The fewest fits of a part."""
        return min(map(len, self.parts))

    def __truediv__(self, scale: float) -> "Apart":
        """In other units."""
        return Apart(tuple(part / scale for part in self.parts))

    @property
    def shape(self) -> tuple[int, int]:
        """(Fits of all parts, items)."""
        return sum(map(len, self.parts)), self.parts[0].shape[-1]

    def mean(self) -> float:
        """What the intervals are of."""
        return sum(float(part.mean()) for part in self.parts)


Scores = np.ndarray | Apart
"""Of one comparison: float [fits, items], [seeds, draws, items], or fits apart."""


class Interval(NamedTuple):
    """A mean and how well it is known."""

    mean: float
    low: float
    high: float
    standard_error: float
    degrees: float
    """Degrees of freedom of t; they need not be whole."""
    level: float
    """Coverage; that of all intervals of a family at once where they are simultaneous."""


class Verdict(NamedTuple):
    """What can be said of one comparison among those that were made."""

    word: str
    """The direction: positive, negative, equivalent (open, but within) or undecided (open); '' where withheld."""
    interval: Interval
    """Simultaneous, at the level: above 0 is positive, below 0 negative."""
    margin: float
    """The largest difference, either way, that does not matter."""
    power: tuple[float, float] | None
    """Probability of calling a true difference of the margin positive or negative with these fits and items.

    A 90 % range; None of a sequence, whose fits are no fixed number.
    """
    p: float
    """Two-sided, adjusted for the family: below 1 - level where the word is positive or negative."""
    narrow: Interval
    """Simultaneous, at 2 level - 1: within the margin is equivalent, if the other interval holds 0."""
    size: str
    """beyond: the interval lies outside -margin .. margin; within: the narrow one lies inside it; else open.

    '' where the word is withheld.
    """
    power_equivalent: tuple[float, float] | None
    """Probability of being called equivalent where there is no difference: a 90 % range; None as for `power`."""
    warning: str
    """Why the word is not to be trusted or is withheld, a sentence; else ''."""
    items_part: float | None = None
    """Of a sequence, the half-width that the test items alone leave: above the margin nothing becomes equivalent."""
    settled: bool = False
    """Of a sequence, whether more seeds are not worth while: it is decided, or the items forbid that it ever is."""


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Low and high of the accuracy of one fit, right on `right` of `n` test items.

    The score interval of Wilson 1927, "Probable inference, the law of succession, and statistical inference". It
    speaks of one fit: intervals of several fits are never averaged. Raises InputError for no items, or more right
    than there are.

    >>> [round(end, 4) for end in wilson(90, 100)]
    [0.8256, 0.9448]
    """
    _coverage(level)
    if not 0 <= right <= n or n < 1:
        raise InputError(f"{right} right of {n} test items: give at least one item, and 0 to all of them right")
    ends = scipy.stats.binomtest(int(right), int(n)).proportion_ci(level, method="wilson")
    return float(ends.low), float(ends.high)


def mcnemar(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Two-sided exact p that two fits are right equally often: bool [n], [n], right or wrong on the same items.

    Of the items on which they differ, each is as likely either way (McNemar 1947, "Note on the sampling error of the
    difference between correlated proportions"). It speaks of these two fits, not of how they came about: a p of
    pooled items, or a mean of p over pairs of fits, is no test of a strategy; `crossed` is. With groups the items of
    a group change sides together, so that each group's sum of differences is as likely either way (Fisher 1935, "The
    design of experiments", section 21); all sums of signs are counted. Raises InputError for lengths that differ.

    >>> mcnemar(np.array([True] * 6 + [False]), np.array([False] * 6 + [False]))
    0.03125
    >>> mcnemar(np.array([True] * 6 + [False]), np.array([False] * 6 + [False]), groups=np.array([0, 0, 0, 1, 1, 1, 2]))
    0.5
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"fits of shapes {first.shape} and {second.shape}: give both on the same n items, [n]")
    if groups is not None:
        return _signs(np.bincount(numbered(groups, len(first)), first.astype(int) - second).astype(int))
    wins, losses = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _signs(sums: np.ndarray) -> float:
    """Share of all choices of signs at which the sum of these whole numbers is as far from 0 as it is, or farther."""
    chances = np.ones(1)
    for size, times in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        several = np.zeros(size * times + 1)
        several[::size] = scipy.stats.binom.pmf(np.arange(times + 1), times, 0.5)
        chances = np.convolve(chances, several)
    total = len(chances) - 1
    return min(1.0, float(chances[np.abs(2 * np.arange(total + 1) - total) >= abs(sums.sum())].sum()))


def over_items(scores: np.ndarray, level: float = 0.95, groups: np.ndarray | None = None) -> Interval:
    """The interval of one fit over test items drawn anew, or groups of them: scores float [items], groups int [items].

    It says how well this fit would do on more items, nothing of another fit by the same strategy; `crossed` does.
    Student's t with items - 1 degrees, or groups - 1; where few items disagree, some unseen are added as in `crossed`.
    Raises InputError for fewer than two items, or groups.

    >>> over_items(np.array([1.0, -1.0] * 50)).standard_error
    0.10050378152592121
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or len(scores) < 2 or not np.isfinite(scores).all():
        raise InputError(f"scores of one fit, of shape {scores.shape}: give finite numbers, [items], two or more")
    values, sizes = by_group(scores[None, None], None if groups is None else numbered(groups, len(scores)))
    many = values.shape[2]
    error = math.sqrt(values.var(ddof=1) + unseen_items(values, sizes).item()) / math.sqrt(many)
    return _interval(float(scores.mean()), error, many - 1, 1 - _coverage(level), level)


def crossed(scores: Scores, level: float = 0.95, groups: np.ndarray | None = None) -> Interval:
    """The interval of a strategy over fits and test items drawn anew: float [fits, items].

    Items are drawn in `groups`, int [items], or each alone.

    With the mean squares A of fits, B of items and E of the residual, the variance of the mean is estimated by
    (A + B - E) / (fits items), or, where B < E, by A / (fits items), which is the t test on the means of the fits.
    Degrees of freedom are those of Satterthwaite 1946, "An approximate distribution of estimates of variance
    components", but with the upper 90 % limit of what A estimates in place of A: a few fits may agree by chance, and
    then A is small just where it is little known. For the same reason A is at least the share `least_share`
    of E, and E / items. Where hardly any score differs, B is known as little: `unseen_items` adds to it what a
    study so small may have missed, so that fits that tie on all items have an interval as wide as the rule of three
    says. With groups the scores are those of `by_group`, and groups stand in place of items everywhere.

    Simulated with 1,000 items of accuracies up to .8 (`tests/simulate_verdicts.py`, 4,000 studies of ten kinds), 95 %
    cover 94.9 to 98.9 % with five fits or more, 95.5 to 97.8 % with three, 96.0 to 99.1 % with two. Where one item in
    100 is wrong, 97.0 to 100 %. Items in groups of 2 to 20 that are named: 95.2 to 99.7 %, where they are not, down to
    39 %. Groups of 1 to 39 items, 55 of them: 94.7 to 99.5 %.

    Of scores [seeds, draws, items] the variance is that of `standard_errors_of_draws`, of parts that of
    `standard_errors_apart`.

    Raises InputError for fewer than two fits (seeds, draws), items or groups.

    >>> interval = crossed(np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]))
    >>> round(interval.mean, 3), round(interval.low, 3), round(interval.high, 3)
    (0.5, -0.307, 1.307)
    """
    scores = checked(scores)
    error, degrees, _ = _known([scores], groups)
    return _interval(float(scores.mean()), error.item(), degrees.item(), 1 - _coverage(level), level)


def simultaneous(scores: Sequence[Scores], level: float = 0.95, groups: np.ndarray | None = None) -> list[Interval]:
    """As `crossed`, of several comparisons at once, so that all hold with probability `level`: m of [fits, items].

    Single-step maximum t (Hothorn, Bretz and Westfall 2008, "Simultaneous inference in general parametric models").
    All have the same fits and items in the same order, as where each strategy is compared with the same fits from
    scratch: the means then correlate, which makes the intervals narrower. Where the shapes differ, as after a fit
    was lost, no correlation is assumed, which is safe (Sidak 1967, "Rectangular confidence regions for the means of
    multivariate normal distributions"). Degrees of freedom differ between comparisons, so each has the t quantile
    of the one tail probability that keeps the level for normal variables.

    Simulated with 8 and 20 comparisons of 500 items (`tests/simulate_verdicts.py`), at 95 % all hold in 95.9 to 100 %
    of families of three fits or more, and in 98.9 to 100 % of two. Raises InputError as `crossed` does.

    >>> scores = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    >>> [round(one.low, 2) for one in simultaneous([scores, 1 - scores])]
    [-0.53, -0.53]
    """
    return _intervals(_family(scores, groups), level) if len(scores) else []


def equivalent(interval: Interval, margin: float) -> bool:
    """Whether a difference is too small to matter: the interval lies within -margin .. margin.

    Of coverage 1 - 2 alpha, these are two one-sided tests at alpha (Schuirmann 1987, "A comparison of the two
    one-sided tests procedure and the power approach"); of simultaneous ones, for the family.

    >>> equivalent(over_items(np.array([0.0, 1.0, -1.0, 0.0] * 500), level=0.90), margin=0.03)
    True
    """
    return -margin < interval.low and interval.high < margin


def power(standard_error: float, degrees: float, critical: float, difference: float) -> float:
    """Probability that |t| exceeds `critical` if the truth is `difference`: two-sided, noncentral t, within 1e-4.

    The normal tails averaged over 4096 quantiles of chi, for `scipy.stats.nct` is NaN where the critical value is
    large, as of a family of few fits.

    >>> round(power(0.01, 20, 2.086, 0.03), 3)
    0.814
    """
    if standard_error == 0:
        return float(difference != 0)
    shift = abs(difference) / standard_error
    chi = _chi(degrees)
    return float(np.mean(special.ndtr(shift - critical * chi) + special.ndtr(-shift - critical * chi)))


def power_equivalent(standard_error: float, degrees: float, critical: float, inner: float, margin: float) -> float:
    """Probability of the word equivalent where there is no difference, within 1e-4.

    That is of |t| below `critical` while the interval of `inner` standard errors lies within the margin (Phillips 1990,
    "Power of the two one-sided tests procedure in bioequivalence").

    >>> round(power_equivalent(0.01, 20, 2.086, 1.725, 0.03), 3)
    0.784
    """
    chi = _chi(degrees)
    within = np.minimum(margin / standard_error - inner * chi, critical * chi)
    return float(np.mean(1 - 2 * special.ndtr(-np.maximum(within, 0))))


@functools.lru_cache(maxsize=1)
def _chi(degrees: float) -> np.ndarray:
    """4096 quantiles of the estimated standard error over the true one, float [4096]."""
    return np.sqrt(scipy.stats.chi2.ppf((np.arange(4096) + 0.5) / 4096, degrees) / degrees)


def _range(power: Callable[[float], float], interval: Interval) -> tuple[float, float]:
    """The range of a power that falls as the standard error grows, over the 90 % interval of what the error estimates.

    The squared error is chi-square over its degrees (Taylor and Muller 1995, "Computing confidence bounds for power and
    sample size of the general linear univariate model").
    """
    chances = scipy.stats.chi2.ppf([0.05, 0.95], interval.degrees)
    largest, least = interval.standard_error * np.sqrt(interval.degrees / chances)
    return power(float(largest)), power(float(least))


def verdicts(
    scores: Sequence[Scores], margin: float, level: float = 0.95, groups: np.ndarray | None = None
) -> list[Verdict]:
    """What can be said of each comparison, all at once: m of [fits, items], as `simultaneous` has them.

    Direction and size are two questions. positive: the interval lies above 0, however small the difference; negative:
    below. beyond: the interval lies outside the margin; within: the narrow interval lies inside it. A difference may be
    both positive and within: it is there and does not matter. equivalent is within where the direction is open; else
    undecided, which is not "no difference": the power says what would have been seen.

    The probability that any of the family is wrongly called positive, negative or beyond is 1 - level, and so is that
    any is wrongly called within or equivalent. With two fits there is a warning; fewer than `MIN_GROUPS` groups get no
    word. Raises InputError as `crossed` does, and for a margin of 0 or less.
    """
    require_judgeable(margin, level)
    if not len(scores):
        return []
    family = _family(scores, groups)
    outer, inner = _intervals(family, level), _intervals(family, round(2 * level - 1, 12))
    sizes = None if groups is None else np.unique(groups, return_counts=True)[1]
    return [
        _verdict(interval, narrow, margin, _adjusted(interval, family.beyond), _numbers(values)[0], sizes)
        for interval, narrow, values in zip(outer, inner, scores, strict=True)
    ]


def require_judgeable(margin: float, level: float) -> None:
    """Raise InputError for a margin of 0 or less, and a level at which nothing can be equivalent."""
    if not (math.isfinite(margin) and margin > 0):
        raise InputError(f"margin {margin}: give the largest difference that does not matter, above 0, such as 0.01")
    if _coverage(level) <= 0.5:
        raise InputError(f"level {level}: equivalence needs more than 0.5, such as 0.95")


def too_few_groups(sizes: np.ndarray | None) -> str:
    """Why groups of these sizes, int [groups], get no word, a sentence; '' where they do, or there are no groups.

    >>> too_few_groups(np.array([3, 3])), too_few_groups(None)
    ('2 groups of test items are fewer than 8: no word is given.', '')
    """
    if sizes is None or (len(sizes) >= MIN_GROUPS and as_many(sizes) >= LEAST_ALIKE):
        return ""
    if len(sizes) < MIN_GROUPS:
        return f"{len(sizes)} groups of test items are fewer than {MIN_GROUPS}: no word is given."
    many = round(as_many(sizes))
    return f"{len(sizes)} groups of test items so unequal say no more than {many} of one size: no word is given."


def _verdict(
    interval: Interval, narrow: Interval, margin: float, p: float, fits: tuple[int, ...], sizes: np.ndarray | None
) -> Verdict:
    if warning := too_few_groups(sizes):
        return Verdict("", interval, margin, (0.0, 0.0), p, narrow, "", (0.0, 0.0), warning)
    critical, inner = ((end.high - end.mean) / end.standard_error for end in (interval, narrow))
    powers = _range(lambda error: power(error, interval.degrees, critical, margin), interval)
    equal = _range(lambda error: power_equivalent(error, interval.degrees, critical, inner, margin), interval)
    word, size = word_and_size(interval, narrow, margin)
    return Verdict(word, interval, margin, powers, p, narrow, size, equal, _warning(fits, sizes))


def _numbers(scores: Scores) -> tuple[tuple[int, ...], int]:
    """(The number of fits, or of seeds and of draws, the fewest of a part; the number of items)."""
    return ((len(scores),) if isinstance(scores, Apart) else scores.shape[:-1]), scores.shape[-1]


def _warning(fits: tuple[int, ...], sizes: np.ndarray | None) -> str:
    if len(fits) == 2 and 2 in fits:
        what = "seeds" if fits[0] == 2 else "draws of labels"
        return f"Two {what} say little of how {what} vary: give three or more before you trust the word."
    if 2 in fits:
        return "Two fits say little of how fits vary: give three seeds or more before you trust the word."
    return warning_of_groups(sizes)


def warning_of_groups(sizes: np.ndarray | None) -> str:
    """With what reserve a word over groups of these sizes, int [groups], is to be read; '' without reserve."""
    if sizes is not None and (many := round(as_many(sizes))) < MIN_GROUPS:
        return f"{len(sizes)} groups of test items that differ so in size say no more than {many} of one size."
    return ""


class _Family(NamedTuple):
    """Comparisons that are judged together."""

    means: list[float]
    errors: list[float]
    degrees: list[float]
    beyond: Callable[[float], float]
    """What `largest_beyond` says of them."""


def _family(scores: Sequence[Scores], groups: np.ndarray | None) -> _Family:
    arrays = [checked(array) for array in scores]
    together = len({_shapes(array) for array in arrays}) == 1
    known = [_known(of_shape, groups) for of_shape in ([arrays] if together else [[array] for array in arrays])]
    correlation = known[0][2] if together else np.eye(len(arrays))
    return _Family(
        [float(array.mean()) for array in arrays],
        [float(error) for errors, _, _ in known for error in errors],
        [float(freedom) for _, degrees, _ in known for freedom in degrees],
        largest_beyond(correlation),
    )


def _shapes(scores: Scores) -> tuple[tuple[int, ...], ...]:
    """The shapes of the arrays of one comparison."""
    return tuple(part.shape for part in scores.parts) if isinstance(scores, Apart) else (scores.shape,)


def _known(scores: Sequence[Scores], groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(standard errors [m], degrees [m], correlations [m, m]) of m comparisons of the same shapes."""
    numbers = None if groups is None else numbered(groups, scores[0].shape[-1])
    apart = [each.parts for each in scores if isinstance(each, Apart)]
    if apart:
        parts, of_parts = zip(*(by_group(np.stack(part), numbers) for part in zip(*apart, strict=True)), strict=True)
        return standard_errors_apart(parts, unseen_items(sum(part.mean(1) for part in parts)[:, None], of_parts[0]))
    values, sizes = by_group(np.stack([each for each in scores if not isinstance(each, Apart)]), numbers)
    unseen = unseen_items(values, sizes)
    if values.ndim == 4:
        _, seeds, draws, many = values.shape
        of_draws = mean_squares_of_draws(values), seeds, draws, many, unseen
        return *standard_errors_of_draws(*of_draws), correlations_of_draws(*of_draws)
    _, fits, many = values.shape
    of_fits = mean_squares(values), fits, many, unseen
    return *standard_errors(*of_fits), correlations(*of_fits)


def checked(scores: Scores) -> Scores:
    """The scores of one comparison, in float; raises InputError for fewer than two fits (seeds, draws) of any part, or
    items, and NaN."""
    if isinstance(scores, Apart):
        parts = tuple(np.asarray(checked(part)) for part in scores.parts)
        if len({part.shape[-1] for part in parts}) > 1 or any(part.ndim != 2 for part in parts):
            raise InputError(f"parts of shapes {[part.shape for part in parts]}: give [fits, items], the same items")
        return Apart(parts)
    scores = np.asarray(scores, float)
    if scores.ndim not in (2, 3) or not np.isfinite(scores).all():
        raise InputError(f"scores of shape {scores.shape}: give finite numbers, [fits, items]")
    if len(scores) < 2:
        raise InputError(f"scores of {len(scores)} fit: give two seeds or more, or use `over_items` for this fit alone")
    if scores.ndim == 3 and scores.shape[1] < 2:
        raise InputError(f"scores of {scores.shape[1]} draw of labels: give two or more, or [fits, items]")
    if scores.shape[-1] < 2:
        raise InputError(f"scores of {scores.shape[-1]} test item: give two or more")
    return scores


def numbered(groups: np.ndarray, items: int) -> np.ndarray:
    """Groups numbered from 0 on, int [items]; raises InputError for what names no groups of these items."""
    groups = np.asarray(groups)
    if groups.shape != (items,) or groups.dtype.kind not in "iu":
        raise InputError(f"groups of shape {groups.shape} and {groups.dtype} of {items} test items: give ints, [items]")
    groups = np.unique(groups, return_inverse=True)[1]
    if items and groups.max() == 0:
        raise InputError(f"all {items} test items are of one group: give two groups or more")
    return groups


def _coverage(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level {level} is outside 0 .. 1: give a coverage, such as 0.95")
    return level


def _intervals(family: _Family, level: float) -> list[Interval]:
    tail = simultaneous_tail(family.beyond, len(family.means), _coverage(level))
    moments = zip(family.means, family.errors, family.degrees, strict=True)
    return [_interval(mean, error, degrees, tail, level) for mean, error, degrees in moments]


def _interval(mean: float, error: float, degrees: float, tail: float, level: float) -> Interval:
    half = float(scipy.stats.t.isf(tail / 2, degrees)) * error
    return Interval(mean, mean - half, mean + half, error, degrees, level)


def word_and_size(interval: Interval, narrow: Interval, margin: float) -> tuple[str, str]:
    """(the word, the size) of an interval, and of the narrow one of equivalence, as `Verdict` has them."""
    return _word(interval, narrow, margin), _size(interval, narrow, margin)


def _word(interval: Interval, narrow: Interval, margin: float) -> str:
    if interval.low > 0:
        return "positive"
    if interval.high < 0:
        return "negative"
    return "equivalent" if equivalent(narrow, margin) else "undecided"


def _size(interval: Interval, narrow: Interval, margin: float) -> str:
    if interval.low > margin or interval.high < -margin:
        return "beyond"
    return "within" if equivalent(narrow, margin) else "open"


def _adjusted(interval: Interval, beyond: Callable[[float], float]) -> float:
    """The single-step p: of the normal variable with the same tail, the probability that the largest is beyond."""
    alone = scipy.stats.t.sf(abs(interval.mean) / interval.standard_error, interval.degrees)
    return beyond(float(-special.ndtri(alone)))


# Fits and test items as crossed random factors: variance components, and the largest of several means.

UNSEEN = 4.7
"""Items that a study may have missed where none differs: the normal quantile times their root is the exact bound.

Where n are expected none is seen with probability exp(-n), so 3.0 are refuted at 95 % (the rule of three; Hanley and
Lippman-Hand 1983, "If nothing goes wrong, is everything all right?"): 3.0 = 1.64 sqrt(3.3). In the worst of 20
comparisons 6.0 are: 6.0 = 2.79 sqrt(4.6).
"""
ENOUGH = 20.0
"""From so many items that differ on, the normal law stands by itself and none is added."""
DIRECTIONS = 1 << 13
"""How many the integral over the sphere is a mean of; it errs by less than 1 % of the probability up to m = 20."""


class Squares(NamedTuple):
    """Mean squares, or with off-diagonals the mean products, of m comparisons."""

    fits: np.ndarray
    items: np.ndarray
    residual: np.ndarray


def mean_squares(scores: np.ndarray) -> Squares:
    """Two-way analysis of variance without replication: float [m, fits, items] to three [m, m].

    Searle, Casella and McCulloch 1992, "Variance components", chapter 4. Off the diagonal the products of two
    comparisons take the place of squares.

    >>> [part.item() for part in mean_squares(np.array([[[0.0, 1.0], [1.0, 4.0]]]))]
    [4.0, 4.0, 1.0]
    """
    _, fits, items = scores.shape
    rest = scores - scores.mean((1, 2), keepdims=True)
    rows, columns = rest.mean(2), rest.mean(1)
    rest -= rows[:, :, None]
    rest -= columns[:, None, :]
    flat = rest.reshape(len(rest), -1)
    return Squares(
        rows @ rows.T * (items / (fits - 1)),
        columns @ columns.T * (fits / (items - 1)),
        flat @ flat.T / ((fits - 1) * (items - 1)),
    )


class Sizes(NamedTuple):
    """How large groups of items are; where there are no groups, `typical` is 1, and `many` the number of items."""

    typical: float
    """The size of the group that an item is in, on average over items, over the mean size of a group."""
    many: float
    """The number of groups of one size whose variance would be known as well; see `as_many`."""


def by_group(scores: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, Sizes]:
    """Scores of groups of items, float [..., items] to [..., groups]; groups int [items], or each item alone.

    A fit with the mean r over its items has of a group the score r + (total - r size) groups / items, whose mean over
    groups is r: the linearised ratio estimator of cluster sampling (Cochran 1977, "Sampling techniques", 3rd edition,
    section 9A.1), whose variance is the robust one of Liang and Zeger 1986, "Longitudinal data analysis using
    generalized linear models". In groups of equal size it is the group's mean; of one item it is the score, to the bit.

    >>> scores, sizes = by_group(np.array([[[1.0, 0.0, 0.0, -1.0]]]), np.array([7, 7, 3, 3]))
    >>> scores.tolist(), tuple(sizes)
    ([[[-0.5, 0.5]]], (1.0, 2.0))
    """
    items = scores.shape[-1]
    if groups is None:
        return scores, Sizes(1.0, float(items))
    sizes = np.unique(groups, return_counts=True)[1]
    if len(sizes) == items:
        return scores, Sizes(1.0, float(items))
    totals = np.add.reduceat(scores[..., np.argsort(groups, kind="stable")], np.cumsum(sizes) - sizes, axis=-1)
    means = totals.sum(-1, keepdims=True) / items
    linear = means + (totals - means * sizes) * (len(sizes) / items)
    return linear, Sizes(float(np.mean((sizes / sizes.mean()) ** 2)), as_many(sizes))


def as_many(sizes: np.ndarray) -> float:
    """Groups of one size whose variance would be known as well as that of groups of these sizes, int [groups].

    Satterthwaite's degrees of a sum of squares as large as those of the sizes: of totals of items that are all alike.

    >>> as_many(np.array([5, 5, 5])), round(as_many(np.array([20] + [1] * 20)), 2)
    (3.0, 1.1)
    """
    squares = (sizes / sizes.mean()) ** 2
    return float(squares.sum() ** 2 / np.sum(squares**2))


def unseen_items(scores: np.ndarray, sizes: Sizes | None = None) -> np.ndarray:
    """What to add to the mean squares of items where hardly any item differs from the rest: [m, fits, items] to [m],
    or [m, seeds, draws, items], whose fits are of all seeds and draws.

    So many items are added as `UNSEEN` says, with the mean square of those that differ and of a quarter of one more, on
    which all fits have the score 1 (as Agresti and Min 2005, "Simple improved confidence intervals for comparing
    matched proportions", add half of one of four kinds). They become fewer with the items that differ; none from
    `ENOUGH` on, or where the means of items over fits have tails no longer than normal ones: t is right there. Of
    groups, one more is typical in size, and normal ones are so of groups of these sizes.

    >>> round(unseen_items(np.zeros((1, 5, 100))).item() / 500 * 100 * 99, 6)  # the variance of the mean, in items
    4.7
    >>> unseen_items(np.tile([1.0, -1.0], (1, 5, 50))).item()
    0.0
    """
    items, fits = scores.shape[-1], math.prod(scores.shape[1:-1])
    typical, many = sizes or Sizes(1.0, float(items))
    rest = scores.mean(tuple(range(1, scores.ndim - 1)))
    rest = (rest - rest.mean(1, keepdims=True)) ** 2
    squares, fourth = rest.sum(1), (rest**2).sum(1)
    some = squares > 0
    # What differs by 1e-10 was rounded.
    differ = np.where(some, squares / (fourth / np.where(some, squares, 1) + 1e-20), 0)
    sparse = np.maximum(1 - 3 * differ / many, 0)
    few = np.where(sparse > 0, np.maximum(1 - differ / np.where(sparse > 0, sparse, 1) / ENOUGH, 0), 0)
    return np.asarray(UNSEEN * few * (squares + 0.25 * typical**2) / (differ + 0.25) * fits / (items - 1))


def standard_errors(
    squares: Squares, fits: int, items: int, unseen: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the m means and their degrees of freedom, float [m] each; `crossed` says which.

    >>> error, degrees = standard_errors(Squares(np.eye(1) * 4.0, np.eye(1) * 4.0, np.eye(1)), 5, 100)
    >>> round(error.item(), 4), round(degrees.item(), 1)
    (0.1183, 5.7)
    """
    a, b, e = (np.diag(part) for part in squares)
    a = np.maximum(a, np.maximum(e * least_share(fits), e / items))
    b = b + unseen
    more = np.maximum(b - e, 0)
    few = a * (fits - 1) / special.chdtri(fits - 1, 0.9)
    spread = few**2 / (fits - 1)
    spread = spread + np.where(b > e, b**2 + e**2 / (fits - 1), 0) / (items - 1)
    known = spread > 0
    degrees = np.where(known, (few + more) ** 2 / np.where(known, spread, 1), fits - 1)
    return np.sqrt((a + more) / (fits * items)), degrees


def least_share(fits: int) -> float:
    """The share of the residual mean square that the mean square of so few fits is at least taken for.

    Its expectation is the residual's and more. With it the t interval of the fits is nine tenths as wide as the normal
    one would be if fits differed only by the counts of their items: fits that tie by chance are known no better. With
    all of that width 95 % would cover more than 97 % of five fits whose items vary.

    >>> [round(least_share(fits), 3) for fits in (2, 3, 5, 10)]
    [0.019, 0.168, 0.404, 0.608]
    """
    return float(0.9 * special.ndtri(0.975) / special.stdtrit(fits - 1, 0.975)) ** 2


def correlations(squares: Squares, fits: int, items: int, unseen: np.ndarray | float = 0.0) -> np.ndarray:
    """Correlations of the m means: float [m, m], shrunk towards none as far as the few degrees of freedom ask.

    Of `degrees` many, chance alone gives squared correlations of 1 / degrees on average: that share of their mean
    square is how far all shrink towards 0 (Schaefer and Strimmer 2005, "A shrinkage approach to large-scale
    covariance matrix estimation", with the variance at no correlation). To 0 is to the safe side (Sidak 1967).
    """
    error, degrees = standard_errors(squares, fits, items, unseen)
    scale = np.where(error > 0, error, 1) * np.sqrt(fits * items)
    return _shrunk((squares.fits + squares.items - squares.residual) / np.outer(scale, scale), degrees)


def _shrunk(estimates: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Estimated correlations [m, m] of means whose errors have these degrees [m], shrunk as `correlations` says."""
    estimates = np.clip(estimates, -1, 1)
    np.fill_diagonal(estimates, 0)
    m = len(estimates)
    mean = float(np.sum(estimates**2)) / max(m * (m - 1), 1)
    keep = max(0.0, 1 - 1 / (degrees.min() * mean)) if mean > 0 else 0.0
    values, vectors = np.linalg.eigh(np.eye(m) + keep * estimates)
    nearest = (vectors * np.maximum(values, 0)) @ vectors.T  # estimated products need not be those of any variables
    size = np.sqrt(np.diag(nearest))
    return np.asarray(nearest / np.outer(size, size))


class SquaresOfDraws(NamedTuple):
    """Mean squares, or with off-diagonals the mean products, over seeds, draws and items: [m, m] each."""

    seeds: np.ndarray
    draws: np.ndarray
    items: np.ndarray
    seeds_draws: np.ndarray
    seeds_items: np.ndarray
    draws_items: np.ndarray
    residual: np.ndarray


def mean_squares_of_draws(scores: np.ndarray) -> SquaresOfDraws:
    """Three-way analysis of variance without replication: float [m, seeds, draws, items] to seven [m, m].

    Searle, Casella and McCulloch 1992, "Variance components", chapter 4.

    >>> squares = mean_squares_of_draws(np.arange(8.0).reshape(1, 2, 2, 2))
    >>> [part.item() for part in squares]
    [32.0, 8.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    """
    _, seeds, draws, items = scores.shape
    rest = scores - scores.mean((1, 2, 3), keepdims=True)
    effects: list[np.ndarray] = []
    for axes in ((2, 3), (1, 3), (1, 2), (3,), (2,), (1,)):  # over which to take means: a main effect, then pairs
        effect = rest.mean(axes, keepdims=True)
        rest = rest - effect
        effects.append(effect)
    effects.append(rest)
    degrees = (seeds - 1, draws - 1, items - 1)
    of_effects = (*degrees, degrees[0] * degrees[1], degrees[0] * degrees[2], degrees[1] * degrees[2])
    parts = []
    for effect, freedom in zip(effects, (*of_effects, math.prod(degrees)), strict=True):
        flat, repeats = effect.reshape(len(effect), -1), scores[0].size / effect[0].size
        parts.append(flat @ flat.T * (repeats / freedom))
    return SquaresOfDraws(*parts)


def standard_errors_of_draws(
    squares: SquaresOfDraws, seeds: int, draws: int, items: int, unseen: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the m means over seeds, draws and items drawn anew, and their degrees, float [m] each.

    With the mean squares A of seeds, B of draws and AB of both, C of items, AC and BC of them with either, E of the
    residual, the variance of a mean times seeds draws items is estimated by A + B - AB, of the fits, and C - AC - BC +
    E, of the items: all that the expected mean squares leave of their components (Searle, Casella and McCulloch 1992,
    chapter 4). It is what Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering", adds and
    subtracts over three ways of clustering (Journal of Business and Economic Statistics 29). Such an estimate may be
    too small, or below 0, so the part of the fits is at least the greater of A and B, and that of the items at least 0
    with `unseen` added. A and B are at least the share `least_share` of AB and of AC or BC, for the reason that
    `crossed` gives.

    Degrees are those of Satterthwaite 1946, of A and B and the items, with the upper 90 % limit of A or B, whichever is
    greater, in its place: few seeds, or few draws, may agree by chance. Of studies from that model with 1,000 items, 95
    % cover 94.8 to 99.8 % for 2 to 20 seeds and draws; 94.9 to 97.9 % for five of each, whether seeds vary, draws,
    both, both together, items, or nothing does (`tests/test_draws.py`).

    >>> ones = SquaresOfDraws(*(np.eye(1) * part for part in (9.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0)))
    >>> error, degrees = standard_errors_of_draws(ones, 5, 5, 100)
    >>> round(error.item(), 4), round(degrees.item(), 1)
    (0.0775, 5.7)
    """
    a, b, c, ab, ac, bc, e = (np.diag(part) for part in squares)
    a = np.maximum(a, np.maximum(np.maximum(ab, ac) * least_share(seeds), e / items))
    b = np.maximum(b, np.maximum(np.maximum(ab, bc) * least_share(draws), e / items))
    of_fits = np.maximum(np.maximum(a, b), a + b - ab)
    c = c + unseen
    of_items = np.maximum(c - ac - bc + e, 0)
    limits = a * (seeds - 1) / special.chdtri(seeds - 1, 0.9), b * (draws - 1) / special.chdtri(draws - 1, 0.9)
    by_seeds = limits[0] >= limits[1]
    few, other = np.where(by_seeds, limits[0], limits[1]), np.where(by_seeds, b, a)
    spread = few**2 / np.where(by_seeds, seeds - 1, draws - 1) + other**2 / np.where(by_seeds, draws - 1, seeds - 1)
    both = (seeds - 1) * (draws - 1)
    more = c**2 + ac**2 / (seeds - 1) + bc**2 / (draws - 1) + e**2 / both
    spread = spread + np.where(of_items > 0, more, 0) / (items - 1)
    known = spread > 0
    degrees = np.where(known, (few + other + of_items) ** 2 / np.where(known, spread, 1), min(seeds, draws) - 1)
    return np.sqrt((of_fits + of_items) / (seeds * draws * items)), degrees


def correlations_of_draws(
    squares: SquaresOfDraws, seeds: int, draws: int, items: int, unseen: np.ndarray | float = 0.0
) -> np.ndarray:
    """Correlations of the m means over seeds, draws and items, float [m, m], shrunk as those of `correlations`."""
    error, degrees = standard_errors_of_draws(squares, seeds, draws, items, unseen)
    scale = np.where(error > 0, error, 1) * np.sqrt(seeds * draws * items)
    a, b, c, ab, ac, bc, e = squares
    return _shrunk((a + b + c - ab - ac - bc + e) / np.outer(scale, scale), degrees)


def standard_errors_apart(
    parts: Sequence[np.ndarray], unseen: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(standard errors [m], degrees [m], correlations [m, m]) of sums of means of parts, float [m, fits, items] each.

    Fits of two parts have nothing in common, and the items all. The variance of a sum times items is estimated by the
    sum of A / fits over the parts, A being their mean squares of fits, and by how much more the sums of the items vary
    than the sum of E / fits of the residuals. Of one part all is as `standard_errors` and `correlations` have it.
    Degrees are those of Satterthwaite 1946, with the upper 90 % limit of the part whose limit is the greatest in its
    place, for the reason that `crossed` gives.

    >>> part = np.array([[[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]])
    >>> [round(float(each.item()), 3) for each in standard_errors_apart([part, part])[:2]]
    [0.451, 4.637]
    """
    squares = [mean_squares(part) for part in parts]
    fits, items = np.array([part.shape[1] for part in parts])[:, None], parts[0].shape[2]
    least = [max(least_share(part.shape[1]), 1 / items) for part in parts]
    a, e = (
        np.array([np.diag(each) for each in of_kind]) / fits
        for of_kind in zip(*((s.fits, s.residual) for s in squares), strict=True)
    )
    a = np.maximum(a, e * np.array(least)[:, None])
    sums = np.sum([part.mean(1) for part in parts], axis=0)
    rest = sums - sums.mean(1, keepdims=True)
    products = rest @ rest.T / (items - 1)
    varied = np.diag(products) + unseen
    more = np.maximum(varied - e.sum(0), 0)
    limits = a * (fits - 1) / special.chdtri(fits - 1, 0.9)
    few = np.where(np.arange(len(parts))[:, None] == limits.argmax(0), limits, a)
    spread = (few**2 / (fits - 1)).sum(0)
    spread = spread + np.where(more > 0, varied**2 + (e**2 / (fits - 1)).sum(0), 0) / (items - 1)
    known = spread > 0
    degrees = np.where(known, (few.sum(0) + more) ** 2 / np.where(known, spread, 1), fits.min() - 1)
    error = np.sqrt((a.sum(0) + more) / items)
    scale = np.where(error > 0, error, 1) * np.sqrt(items)
    together = products + sum(
        (each.fits - each.residual) / len(part[0]) for each, part in zip(squares, parts, strict=True)
    )
    return error, degrees, _shrunk(together / np.outer(scale, scale), degrees)


def largest_beyond(correlation: np.ndarray) -> Callable[[float], float]:
    """z -> probability that the largest of |m correlated standard normals| exceeds z; [m, m].

    The normals are a direction times a chi (Genz and Bretz 2009, "Computation of multivariate normal and t
    probabilities", on spherical-radial transformations): the chi is integrated exactly, the directions are from
    Sobol's sequence, the same every time. Never less than for one variable, nor more than m times that (Bonferroni).

    >>> round(largest_beyond(np.eye(1))(1.96), 4)
    0.05
    """
    m = len(correlation)
    values, vectors = np.linalg.eigh(correlation)
    real = values > 1e-9 * values[-1]
    root = vectors[:, real] * np.sqrt(values[real])
    directions = _directions(root.shape[1])
    largest = np.max((directions @ root.T) ** 2, axis=1)

    def probability(z: float) -> float:
        alone = 2 * float(special.ndtr(-z))
        tail = float(special.gammaincc(root.shape[1] / 2, z**2 / (2 * largest)).mean())
        return min(max(tail, alone), m * alone, 1.0)

    return probability


@functools.lru_cache(maxsize=4)
def _directions(rank: int) -> np.ndarray:
    """Directions of length 1: float [DIRECTIONS, rank]; [1, 1] where there is but one direction."""
    if rank == 1:
        return np.ones((1, 1))
    points = scipy.stats.qmc.Sobol(rank, scramble=False).random(DIRECTIONS) + 0.5 / DIRECTIONS
    normals = special.ndtri(points)
    return np.asarray(normals / np.linalg.norm(normals, axis=1, keepdims=True))


def simultaneous_tail(beyond: Callable[[float], float], m: int, level: float) -> float:
    """The two-sided probability of one normal variable at which the largest of m has the level.

    >>> round(simultaneous_tail(largest_beyond(np.eye(1)), 1, 0.95), 6)
    0.05
    """
    alone, bonferroni = special.ndtri([(1 - level) / 2, (1 - level) / (2 * m)])
    z = scipy.optimize.brentq(lambda z: beyond(z) - (1 - level), -alone - 1e-3, -bonferroni + 1e-3, xtol=1e-10)
    return 2 * float(special.ndtr(-z))
