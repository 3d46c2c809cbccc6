"""Whether one strategy beats another: intervals, tests and verdicts over fits and test items.

A score is a paired difference: 1 where one strategy is right on a test item and the other wrong, -1 the other way
round, else 0, or a mean of such over label budgets. The fits (seeds, or draws of the labels) and the items are both
samples of what might have been, and every fit is scored on every item: two crossed random factors. Pooling them as
if all fits times items were independent makes noise look certain; so does a bootstrap over a few fits. Scores,
means and margins are fractions; a level is a coverage, such as 0.95.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from tljax.study import components
from tljax.types import InputError


class Interval(NamedTuple):
    """A mean and how well it is known."""

    mean: float
    low: float
    high: float
    standard_error: float
    degrees: float
    """Of freedom of t, not whole."""
    level: float
    """Coverage; of all intervals of a family at once where they are simultaneous."""


class Verdict(NamedTuple):
    """What can be said of one comparison among those that were made."""

    word: str
    """positive, negative, equivalent or undecided."""
    interval: Interval
    """Simultaneous, at the level: above 0 is positive, below 0 negative."""
    margin: float
    """The largest difference, either way, that does not matter."""
    power: float
    """Of calling a true difference of the margin nonzero, with these fits and items."""
    p: float
    """Two-sided, adjusted for the family: below 1 - level where the word is positive or negative."""
    narrow: Interval
    """Simultaneous, at 2 level - 1: within the margin is equivalent, if the other interval holds 0."""


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
    found = stats.binomtest(int(right), int(n)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p that two fits are right equally often: bool [n], [n], right or wrong on the same items.

    Of the items on which they differ, each is as likely either way (McNemar 1947, "Note on the sampling error of the
    difference between correlated proportions"). It speaks of these two fits, not of how they came about: a p of
    pooled items, or a mean of p over pairs of fits, is no test of a strategy; `crossed` is. Raises InputError for
    lengths that differ.

    >>> mcnemar(np.array([True] * 6 + [False]), np.array([False] * 6 + [False]))
    0.03125
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"fits of shapes {first.shape} and {second.shape}: give both on the same n items, [n]")
    wins, losses = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def over_items(scores: np.ndarray, level: float = 0.95) -> Interval:
    """Of one fit, over test items drawn anew: float [items].

    It says how well this fit would do on more items, nothing of another fit by the same strategy; `crossed` does.
    Student's t with items - 1 degrees. Raises InputError for fewer than two items.

    >>> over_items(np.array([1.0, 0.0, 0.0, 1.0])).standard_error
    0.28867513459481287
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or len(scores) < 2 or not np.isfinite(scores).all():
        raise InputError(f"scores of one fit, of shape {scores.shape}: give finite numbers, [items], two or more")
    error = float(scores.std(ddof=1)) / math.sqrt(len(scores))
    return _interval(float(scores.mean()), error, len(scores) - 1, 1 - _coverage(level), level)


def crossed(scores: np.ndarray, level: float = 0.95) -> Interval:
    """Of a strategy, over fits and test items drawn anew: float [fits, items].

    With the mean squares A of fits, B of items and E of the residual, the variance of the mean is estimated by
    (A + B - E) / (fits items), or, where B < E, by A / (fits items), which is the t test on the means of the fits.
    Degrees of freedom are those of Satterthwaite 1946, "An approximate distribution of estimates of variance
    components", but with the upper 90 % limit of what A estimates in place of A: a few fits may agree by chance, and
    then A is small just where it is little known. A is at least E / items: counts are whole, and two fits may tie.

    Simulated with normal effects of all sizes, 100 and 1000 items: 95 % cover 94.8 to 96.6 % with five fits or more,
    94.9 to 97.9 % with three or four, 95.2 to 99.4 % with two; with Satterthwaite's own degrees 94.1, 92.0 and
    87.3 % at worst. Raises InputError for fewer than two fits or items.

    >>> interval = crossed(np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]))
    >>> round(interval.mean, 3), round(interval.low, 3), round(interval.high, 3)
    (0.5, -0.307, 1.307)
    """
    scores = _checked(scores)
    error, degrees = components.errors(components.mean_squares(scores[None]), *scores.shape)
    return _interval(float(scores.mean()), error.item(), degrees.item(), 1 - _coverage(level), level)


def simultaneous(scores: Sequence[np.ndarray], level: float = 0.95) -> list[Interval]:
    """As `crossed`, of several comparisons at once, so that all hold with probability `level`: m of [fits, items].

    Single-step maximum t (Hothorn, Bretz and Westfall 2008, "Simultaneous inference in general parametric models").
    All have the same fits and items in the same order, as where each strategy is compared with the same fits from
    scratch: the means then correlate, which makes the intervals narrower. Where the shapes differ, as after a fit
    was lost, no correlation is assumed, which is safe (Sidak 1967, "Rectangular confidence regions for the means of
    multivariate normal distributions"). Degrees of freedom differ between comparisons, so each has the t quantile
    of the one tail probability that keeps the level for normal variables.

    Simulated with eight comparisons, at 95 % all hold in 94.4 to 97 % of families of three fits or more, and in 91 to
    99.9 % of two. Raises InputError as `crossed` does.

    >>> scores = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    >>> [round(one.low, 2) for one in simultaneous([scores, 1 - scores])]
    [-0.53, -0.53]
    """
    return _intervals(_family(scores), level) if len(scores) else []


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
    chi = np.sqrt(stats.chi2.ppf((np.arange(4096) + 0.5) / 4096, degrees) / degrees)
    return float(np.mean(special.ndtr(shift - critical * chi) + special.ndtr(-shift - critical * chi)))


def verdicts(scores: Sequence[np.ndarray], margin: float, level: float = 0.95) -> list[Verdict]:
    """What can be said of each comparison, all at once: m of [fits, items], as `simultaneous` has them.

    positive: the interval lies above 0, however small the difference; negative: below; else equivalent: the narrow
    interval lies within the margin; else undecided, which is not "no difference": the power says what would have
    been seen. The probability that any of the family is wrongly called positive or negative is 1 - level, and so is
    that any is wrongly called equivalent, as nearly as `simultaneous` says: with two fits, do not trust it. Raises
    InputError as `crossed` does, and for a margin of 0 or less.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise InputError(f"margin {margin}: give the largest difference that does not matter, above 0, such as 0.01")
    if _coverage(level) <= 0.5:
        raise InputError(f"level {level}: equivalence needs more than 0.5, such as 0.95")
    if not len(scores):
        return []
    family = _family(scores)
    wide, narrow = _intervals(family, level), _intervals(family, round(2 * level - 1, 12))
    return [
        Verdict(_word(one, inner, margin), one, margin, _power(one, margin), _adjusted(one, family.beyond), inner)
        for one, inner in zip(wide, narrow, strict=True)
    ]


class _Family(NamedTuple):
    means: list[float]
    errors: list[float]
    degrees: list[float]
    beyond: Callable[[float], float]


def _family(scores: Sequence[np.ndarray]) -> _Family:
    arrays = [_checked(one) for one in scores]
    together = len({one.shape for one in arrays}) == 1
    stacks = [np.stack(arrays)] if together else [one[None] for one in arrays]
    squares = [components.mean_squares(stack) for stack in stacks]
    found = [components.errors(part, *stack.shape[1:]) for part, stack in zip(squares, stacks, strict=True)]
    correlation = components.correlations(squares[0], *arrays[0].shape) if together else np.eye(len(arrays))
    return _Family(
        [float(one.mean()) for one in arrays],
        [float(error) for errors, _ in found for error in errors],
        [float(one) for _, degrees in found for one in degrees],
        components.beyond(correlation),
    )


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise InputError(f"scores of shape {scores.shape}: give finite numbers, [fits, items]")
    if len(scores) < 2:
        raise InputError(f"scores of {len(scores)} fit: give two seeds or more, or use `over_items` for this fit alone")
    if scores.shape[1] < 2:
        raise InputError(f"scores of {scores.shape[1]} test item: give two or more")
    return scores


def _coverage(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level {level} is outside 0 .. 1: give a coverage, such as 0.95")
    return level


def _intervals(family: _Family, level: float) -> list[Interval]:
    tail = components.tail(family.beyond, len(family.means), _coverage(level))
    moments = zip(family.means, family.errors, family.degrees, strict=True)
    return [_interval(mean, error, degrees, tail, level) for mean, error, degrees in moments]


def _interval(mean: float, error: float, degrees: float, tail: float, level: float) -> Interval:
    half = float(stats.t.isf(tail / 2, degrees)) * error
    return Interval(mean, mean - half, mean + half, error, degrees, level)


def _word(interval: Interval, narrow: Interval, margin: float) -> str:
    if interval.low > 0:
        return "positive"
    if interval.high < 0:
        return "negative"
    return "equivalent" if equivalent(narrow, margin) else "undecided"


def _adjusted(interval: Interval, beyond: Callable[[float], float]) -> float:
    """The single-step p: of the normal variable with the same tail, the probability that the largest is beyond."""
    if interval.standard_error == 0:
        return float(interval.mean == 0)
    one = stats.t.sf(abs(interval.mean) / interval.standard_error, interval.degrees)
    return beyond(float(-special.ndtri(one)))


def _power(interval: Interval, difference: float) -> float:
    if interval.standard_error == 0:
        return 1.0
    critical = (interval.high - interval.mean) / interval.standard_error
    return power(interval.standard_error, interval.degrees, critical, difference)
