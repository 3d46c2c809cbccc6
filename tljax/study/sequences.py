"""Verdicts that may be looked at after every seed: confidence sequences over seeds, beside an interval over test items.

A confidence interval holds at a number of seeds that was chosen before. A confidence sequence holds at all numbers of
seeds at once: whoever adds seeds until something shows, and stops then, is still wrong in no more than 1 - level of
studies. It is wider for that: between 6 and 40 seeds 1.4 to 1.9 times as wide as Student's t with the same errors.

Every seed is scored on the same test items, so a sequence in seeds speaks of these items alone. What other items would
say is a second question, with an interval of its own that does not grow narrow as seeds come: the level is split
between the two (`ITEMS`), and their half-widths add. Where the items' part alone is wider than the margin, no number of
seeds can call a difference equivalent.

Of several comparisons each has the level's share of errors (Bonferroni): it holds however they hang together and
whenever each of them stops.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from tljax.study import statistics
from tljax.study.statistics import Interval, Scores, Verdict
from tljax.types import InputError

FEWEST = 6
"""Seeds from which a sequence is judged; below it is so wide that it decides nothing that five seeds would not."""

PRECISION = 0.2
"""The precision of the mixture over true differences, in units of one over the variance between seeds.

It was fixed before any study: between 6 and 40 seeds and from 0.2 to 4 % of errors the sequence is at most 11 % wider
than with the best of nine others from 0.01 to 1. The level holds for every value of it.
"""

ITEMS = 0.2
"""The share of the errors that the interval over test items has; seeds have the rest.

Items' part is mostly the smaller one, and a normal quantile grows little where its share is small.
"""


def e_value(values: np.ndarray, difference: float = 0.0, precision: float = PRECISION) -> float:
    """Evidence against `difference` as the mean of independent normal `values` [n]: an e-process, of mean 1 under it.

    The likelihood ratio of what does not depend on the scale, mixed over true differences that are normal of variance
    1 / precision in units of the standard deviation: with S the sum and V the sum of squares of values less the
    difference, sqrt(c / (n + c)) (V / (V - S^2 / (n + c)))^(n / 2), c the precision. It is a martingale when looked at
    in what is free of scale, so that it exceeds 1 / alpha at any time with probability alpha at most (Wang and Ramdas
    2023, arXiv:2310.03722, theorem 4.9; the improper mixture of Lai 1976 has no mean, and is no e-process). Of values
    that all are the difference it is 1.

    >>> round(e_value(np.array([1.0, 2.0, 3.0])), 3)
    2.872
    """
    shifted = np.asarray(values, float) - difference
    n, squares = len(shifted), float(np.sum(shifted**2))
    if squares == 0:
        return 1.0
    share = float(np.sum(shifted)) ** 2 / (squares * (n + precision))
    return math.exp((math.log(precision / (n + precision)) - n * math.log1p(-share)) / 2)


def half_width(n: int, alpha: float, precision: float = PRECISION) -> float:
    """Half of the confidence sequence at `n` values, in standard deviations of the values (n - 1 degrees).

    The differences whose `e_value` is below 1 / alpha are the mean plus and minus this times the standard deviation, at
    all n at once with probability 1 - alpha. Infinite where no difference can be told at so few values.

    >>> round(half_width(10, 0.05), 3), half_width(2, 0.001)
    (1.27, inf)
    """
    if n < 2:
        return math.inf
    log_ratio = (math.log1p(n / precision) - 2 * math.log(alpha)) / n
    rest = 1 - math.exp(log_ratio) * precision / (n + precision)
    return math.sqrt((n - 1) / n * math.expm1(log_ratio) / rest) if rest > 0 else math.inf


def two_sided(alpha: float) -> float:
    """The errors of a two-sided sequence either side of which is wrong with probability `alpha` at most.

    The mixture is the mean of one over positive and one over negative differences, each an e-process. Above the mean
    the second is below 1, so that a two-sided value of (1 + alpha) / (2 alpha) is a one-sided one of 1 / alpha.

    >>> round(two_sided(0.05), 4)
    0.0952
    """
    return 2 * alpha / (1 + alpha)


class Parts(NamedTuple):
    """What is known of one comparison: its mean, and what the two half-widths are made of."""

    mean: float
    fits: int
    between: float
    """Standard deviation between fits, of their means over the items."""
    items: float
    """Standard error of the mean that comes from the items, however many the fits are."""
    limit: float
    """The standard error that the items would leave if there were no end of fits, as it is estimated by now."""
    degrees: float
    """Degrees of freedom of both."""

    def seeds_half(self, alpha: float) -> float:
        """Half of the sequence over seeds, two-sided at `alpha`."""
        return half_width(self.fits, alpha) * self.between if self.between else 0.0

    def items_half(self, alpha: float) -> float:
        """Half of the interval over items, two-sided at `alpha`."""
        return -float(special.stdtrit(self.degrees, alpha / 2)) * self.items


def parts(scores: Scores, groups: np.ndarray | None = None) -> Parts:
    """The parts of one comparison: paired differences float [fits, items], and which items are alike, int [items].

    With the mean squares A of fits, B of items (or groups) and E of the residual: between fits A over the items, A
    being at least what `statistics.crossed` takes it for; from the items (B - E + one standard deviation of that) over
    fits times items, and what a small study may not have seen (`statistics.unseen_items`). The standard deviation is
    that of normal scores: the least of the estimates at many numbers of seeds must not be too small. Raises InputError
    for fewer than two fits, items or groups, and where draws of labels are crossed with seeds, or seeds are apart.
    """
    checked = statistics.checked(scores)
    if isinstance(checked, statistics.Apart):
        raise InputError("each label budget has seeds of its own: intervals at any number of seeds are of the same")
    if checked.ndim == 3:
        raise InputError("draws of labels are crossed with seeds: intervals at any number of seeds have none")
    numbers = None if groups is None else statistics.numbered(groups, checked.shape[1])
    values, sizes = statistics.by_group(checked[None], numbers)
    _, fits, many = values.shape
    a, b, e = (float(part[0, 0]) for part in statistics.mean_squares(values))
    a = max(a, e * statistics.least_share(fits), e / many)
    unsure = math.sqrt(2 * (b**2 + e**2 / (fits - 1)) / (many - 1))
    beyond = max(b - e, 0.0) + float(statistics.unseen_items(values, sizes)[0])
    items, limit = (math.sqrt(part / (fits * many)) for part in (beyond + unsure, beyond))
    return Parts(float(checked.mean()), fits, math.sqrt(a / many), items, limit, many - 1)


def interval(scores: Scores, level: float = 0.95, groups: np.ndarray | None = None) -> Interval:
    """As `statistics.crossed`, at any number of fits: [fits, items]; the sequence's half-width and the items' part.

    Raises InputError as `parts` does.

    >>> scores = np.random.default_rng(0).choice([-1.0, 0, 1], (10, 500))
    >>> [round(one(scores).high - one(scores).low, 3) for one in (statistics.crossed, interval)]
    [0.064, 0.136]
    """
    known, alpha = parts(scores, groups), 1 - level
    return _interval(known, known.seeds_half((1 - ITEMS) * alpha) + known.items_half(ITEMS * alpha), level)


def verdicts(
    scores: Sequence[Scores], margin: float, level: float = 0.95, groups: np.ndarray | None = None
) -> list[Verdict]:
    """What can be said of each comparison at any time: m of [fits, items], as `statistics.verdicts` has them.

    The numbers of fits may differ: a comparison that was decided may stop while others go on. The probability that
    positive, negative or beyond is ever wrong of any of the family is at most 1 - level, and so is that of within or
    equivalent; that any word is, at most twice as much. It is so for fits whose means over the items are normal, and as
    far as the interval over items, of one number of seeds, holds at all of them (`parts`). There is no power, as it
    would need a number of fits that is not chosen. p is the least share of errors at which the interval does not hold
    0. Fewer than `FEWEST` fits, and fewer than `statistics.MIN_GROUPS` groups, get no word. Raises InputError as
    `statistics.verdicts` does.
    """
    statistics.require_judgeable(margin, level)
    if not len(scores):
        return []
    alpha, m = 1 - level, len(scores)
    sizes = None if groups is None else np.unique(groups, return_counts=True)[1]
    return [_verdict(parts(array, groups), margin, alpha / m, m, level, sizes) for array in scores]


def _verdict(known: Parts, margin: float, alpha: float, m: int, level: float, sizes: np.ndarray | None) -> Verdict:
    """The verdict with the share `alpha` of the errors of m comparisons."""
    one_side = known.items_half(2 * ITEMS * alpha)
    wide = _interval(known, known.seeds_half((1 - ITEMS) * alpha) + known.items_half(ITEMS * alpha), level)
    narrow = _interval(known, known.seeds_half(two_sided((1 - ITEMS) * alpha)) + one_side, round(2 * level - 1, 12))
    no_word = statistics.too_few_groups(sizes)
    if known.fits < FEWEST:
        no_word = f"{known.fits} seeds: a verdict at any time takes {FEWEST} or more."
    word, size = ("", "") if no_word else statistics.word_and_size(wide, narrow, margin)
    limit = known._replace(items=known.limit)  # more fits make it no narrower
    items_part = limit.items_half(2 * ITEMS * alpha)
    forbidden = items_part >= margin and abs(known.mean) <= limit.items_half(ITEMS * alpha)
    warning = no_word or statistics.warning_of_groups(sizes)
    return Verdict(
        *(word, wide, margin, None, min(1.0, m * _p(known)), narrow, size, None, warning),
        items_part=items_part,
        settled=word not in ("", "undecided") or forbidden or bool(statistics.too_few_groups(sizes)),
    )


def _interval(known: Parts, half: float, level: float) -> Interval:
    error = math.hypot(known.between / math.sqrt(known.fits), known.items)
    return Interval(known.mean, known.mean - half, known.mean + half, error, known.fits - 1, level)


def _p(known: Parts) -> float:
    """The least share of errors at which one comparison's interval does not hold 0, within 1e-6; at most 1."""

    from scipy import optimize  # takes a while to import

    def beyond(log_alpha: float) -> float:
        alpha = math.exp(log_alpha)
        return known.seeds_half((1 - ITEMS) * alpha) + known.items_half(ITEMS * alpha) - abs(known.mean)

    if beyond(0.0) >= 0:
        return 1.0
    least = math.log(1e-12)
    return math.exp(least if beyond(least) < 0 else optimize.brentq(beyond, least, 0.0, xtol=1e-6))


def rounds(seeds: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The seeds that each round adds: at least `FEWEST` in the first, then two or a fifth of what is there.

    `seeds` are the first ones, the others follow the greatest of them. Raises InputError where there are more than
    `most` of them.

    >>> [len(added) for added in rounds([0, 1, 2, 3, 4], 40)]
    [6, 2, 2, 2, 2, 2, 3, 3, 4, 5, 6, 3]
    >>> rounds([3, 7], 9)
    [(3, 7, 8, 9, 10, 11), (12, 13), (14,)]
    """
    every = list(dict.fromkeys(seeds))
    if len(every) > most:
        raise InputError(
            f"at most {most} seeds are fewer than the {len(every)} to begin with", field="most", value=most
        )
    every += range(max(every) + 1, max(every) + 1 + most - len(every))
    ends = [min(max(FEWEST, len(set(seeds))), most)]
    while ends[-1] < most:
        ends.append(min(ends[-1] + max(2, ends[-1] // 5), most))
    return [tuple(every[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
