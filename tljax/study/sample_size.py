"""How many seeds a comparison takes: what seeds and test items add to its error, and what more seeds would give.

The fits and the test items are crossed random factors, as in `statistics`, of which this file asks the question the
other way round: not what a study says, but what a study of so many fits on the same number of items would say, and how
often. The items are fixed in number, so more fits take the error of the mean down to that of the items and no further.
Scores, margins and errors are in one unit, a score at most about 1 in size; a level is a coverage, such as 0.95.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from scipy import special

from tljax.study import statistics
from tljax.study.statistics import Apart, Scores, Squares
from tljax.types import InputError

POWER = 0.8
"""The chance of the word that a number of seeds is to give."""
MOST = 10_000
"""Seeds beyond which nobody goes: what takes more is said to be out of reach."""
DRAWS = 128
"""Studies of which a chance is the mean; their mean squares are evenly spread, the same every time."""


class OfDraws(NamedTuple):
    """Standard deviations of a fit's mean difference over the items, where draws of labels were crossed with seeds."""

    seeds: float
    draws: float
    both: float
    """Of what one seed does with one draw, beside what it does with all."""
    numbers: tuple[int, int] = (0, 0)
    """Seeds and draws of the pilot."""

    def error(self, seeds: int, draws: int) -> float:
        """Standard error of the mean over so many seeds, each with every one of so many draws.

        >>> round(OfDraws(3.0, 4.0, 0.0).error(9, 4), 3)
        2.236
        """
        return math.sqrt(self.seeds**2 / seeds + self.draws**2 / draws + self.both**2 / (seeds * draws))


class Components(NamedTuple):
    """What the differences of a pilot say of the variance of a mean over other fits and as many items."""

    mean: float
    """The pilot's mean difference."""
    fits: int
    """The number of the pilot's fits."""
    items: int
    """The number of test items, or of groups of them."""
    of_fits: float
    """Expected mean square of fits: items times the variance of fits, and the residual's."""
    of_items: float
    """Variance of one item, or group, over items drawn anew; 0 where the pilot sees none."""
    residual: float
    """Variance of what is left of one fit on one item."""
    unseen: float = 0.0
    """What `statistics.unseen_items` adds to the mean square of items, a fit."""
    of_draws: OfDraws | None = None
    """What is known apart of seeds and of draws of labels, where the pilot crossed them."""

    def spread(self) -> tuple[float, float, float]:
        """Standard deviations: of fits, of the mean over all items, and of one fit's mean by what is left."""
        fits = max(self.of_fits - self.residual, 0.0) / self.items
        return math.sqrt(fits), math.sqrt(self.of_items / self.items), math.sqrt(self.residual / self.items)


class Chances(NamedTuple):
    """How often a study would say each word, float, of the shape of the differences that are asked for."""

    different: np.ndarray
    """Positive or negative."""
    equivalent: np.ndarray

    @property
    def decided(self) -> np.ndarray:
        """How often it is not undecided."""
        return self.different + self.equivalent


class SeedsNeeded(NamedTuple):
    """Seeds that give a word with the chance `POWER`; None where no number up to `MOST` does."""

    find: int | None
    """To call a true difference of the margin positive or negative."""
    find_range: tuple[int | None, int | None]
    """From and to, a 90 % range: the variances are themselves estimated."""
    equivalent: int | None
    """To call a difference of 0 equivalent."""
    equivalent_range: tuple[int | None, int | None]


def components(scores: Scores, groups: np.ndarray | None = None) -> Components:
    """The components of a pilot's differences, float [fits, items], whose items may be in `groups`, int [items].

    They are the estimates of the analysis of variance (Searle, Casella and McCulloch 1992, "Variance components",
    chapter 4), with the least mean square of fits that `statistics.crossed` takes. Of differences [seeds, draws, items]
    they are those of a study whose every seed has a draw of labels of its own, and `fits` is the number of fits that
    would tell as much of it; of fits apart, of a study with as many at each part. Raises InputError for fewer than two
    fits or items.

    >>> pilot = components(np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]))
    >>> pilot.fits, pilot.items, round(pilot.of_fits, 3), round(pilot.of_items, 3), round(pilot.residual, 3)
    (3, 4, 0.25, 0.139, 0.139)
    """
    if isinstance(scores, Apart):
        return _of_apart(scores, groups)
    scores = np.asarray(scores, float)
    if scores.ndim not in (2, 3) or min(scores.shape) < 2:
        raise InputError(f"scores of shape {scores.shape}: give two fits or more on two items or more, [fits, items]")
    numbers = None if groups is None else np.unique(groups, return_inverse=True)[1]
    values, sizes = statistics.by_group(scores[None], numbers)
    if scores.ndim == 3:
        return _of_crossed(values, float(scores.mean()), sizes)
    _, fits, items = values.shape
    a, b, e = (part.item() for part in statistics.mean_squares(values))
    unseen = float(statistics.unseen_items(values, sizes).item()) / fits
    pilot = Components(float(scores.mean()), fits, items, a, max(b - e, 0.0) / fits, e, unseen)
    return pilot._replace(of_fits=max(a, least_square(pilot)))


def _of_crossed(values: np.ndarray, mean: float, sizes: statistics.Sizes) -> Components:
    """`components` of a pilot that crossed draws with seeds, values [1, seeds, draws, items].

    The expected mean squares (Searle, Casella and McCulloch 1992, chapter 4) give the components; mean squares of a
    study without crossing are sums of those of this one with weights that are not negative, so that Satterthwaite's
    degrees say how many fits would tell as much.
    """
    _, seeds, draws, items = values.shape
    a, b, c, ab, ac, bc, e = (part.item() for part in statistics.mean_squares_of_draws(values))
    weights = np.array([1 / draws, 1 / seeds, 1 - 1 / draws - 1 / seeds])
    of_fits, residual = (float(weights @ squares) for squares in ((a, b, ab), (ac, bc, e)))
    degrees = np.array([seeds - 1, draws - 1, (seeds - 1) * (draws - 1)])
    spread = float(np.sum((weights * (a, b, ab)) ** 2 / degrees))
    fits = 1 + max(1, round(of_fits**2 / spread)) if spread > 0 else seeds * draws
    unseen = float(statistics.unseen_items(values, sizes).item()) / (seeds * draws)
    of_seeds, of_draws, of_both = (
        math.sqrt(max(square, 0.0) / items) for square in ((a - ab - ac + e) / draws, (b - ab - bc + e) / seeds, ab - e)
    )
    of_items = max(c - ac - bc + e, 0.0) / (seeds * draws)
    apart = OfDraws(of_seeds, of_draws, of_both, (seeds, draws))
    pilot = Components(mean, fits, items, of_fits, of_items, residual, unseen, apart)
    return pilot._replace(of_fits=max(of_fits, least_square(pilot)))


def _of_apart(scores: Apart, groups: np.ndarray | None) -> Components:
    """`components` of fits apart: sums over the parts, whose fits Satterthwaite's degrees count."""
    each = [components(part, groups) for part in scores.parts]
    of_fits, residual = sum(part.of_fits for part in each), sum(part.residual for part in each)
    spread = sum(part.of_fits**2 / (part.fits - 1) for part in each)
    fits = 1 + max(1, round(of_fits**2 / spread)) if spread > 0 else min(part.fits for part in each)
    numbers = None if groups is None else np.unique(groups, return_inverse=True)[1]
    values, sizes = zip(*(statistics.by_group(part[None], numbers) for part in scores.parts), strict=True)
    sums = sum(part.mean(1) for part in values)
    unseen = float(statistics.unseen_items(sums[:, None], sizes[0]).item())
    beyond = float(sums.var(ddof=1)) - sum(part.residual / part.fits for part in each)
    return Components(scores.mean(), fits, each[0].items, of_fits, max(beyond, 0.0), residual, unseen)


def least_square(pilot: Components) -> float:
    """The least that the mean square of fits is taken for, as `statistics.crossed` does."""
    return pilot.residual * max(statistics.least_share(pilot.fits), 1 / pilot.items)


def likely(pilot: Components, share: float) -> Components:
    """The components below which the true ones lie with confidence `share`: 0.05 and 0.95 give a 90 % range.

    Mean squares are chi-square over their degrees. Where the pilot sees no variance of items, there is none.

    >>> pilot = Components(0.0, 5, 100, of_fits=1.0, of_items=0.0, residual=0.1)
    >>> round(likely(pilot, 0.05).of_fits, 2), round(likely(pilot, 0.95).of_fits, 2)
    (0.42, 5.63)
    """
    a = pilot.of_fits * (pilot.fits - 1) / float(special.chdtri(pilot.fits - 1, share))
    square = pilot.fits * pilot.of_items + pilot.residual if pilot.of_items else 0.0
    b = square * (pilot.items - 1) / float(special.chdtri(pilot.items - 1, share))
    return pilot._replace(
        of_fits=max(a, least_square(pilot)),
        of_items=max(b - pilot.residual, 0.0) / pilot.fits,
    )


def chances(
    pilot: Components,
    fits: int,
    margin: float,
    level: float,
    family: int = 1,
    differences: np.ndarray | float = 0.0,
    *,
    same_items: bool = False,
) -> Chances:
    """How often a study of `fits` fits says each word, were the pilot's components true, at these true `differences`.

    In a family each has the tail probability of as many independent comparisons (Sidak 1967, "Rectangular confidence
    regions for the means of multivariate normal distributions"): correlated ones are decided no less often. The mean is
    normal, and the mean squares are independent chi-squares over their degrees, of which each gives a study the
    interval of `statistics.standard_errors`. `same_items` says that the differences are those on the very items that
    the study has, as after a pilot on the same test set: then only fits and the residual make the mean vary, while the
    interval is as wide as before.

    >>> pilot = Components(0.0, 5, 10_000, of_fits=1.0, of_items=0.01, residual=0.1)
    >>> [round(float(part), 2) for part in chances(pilot, 10, 0.01, 0.95, differences=0.01)]
    [0.77, 0.04]
    """
    delta = np.asarray(differences, float)[..., None]
    a, b, e = pilot.of_fits, fits * pilot.of_items + pilot.residual, pilot.residual
    drawn = _mean_squares(fits, pilot.items)
    squares = Squares(*(np.diag(part) for part in (a * drawn[0], b * drawn[1], e * drawn[2])))
    errors, degrees = statistics.standard_errors(squares, fits, pilot.items, fits * pilot.unseen)
    wide, narrow = (-special.stdtrit(degrees, _tail(rate, family) / 2) * errors for rate in (1 - level, 2 - 2 * level))
    true = max(math.sqrt((a + (0.0 if same_items else fits * pilot.of_items)) / (fits * pilot.items)), 1e-12)
    different = special.ndtr((delta - wide) / true) + special.ndtr((-delta - wide) / true)
    within = np.maximum(np.minimum(margin - narrow, wide), 0.0)
    equivalent = special.ndtr((within - delta) / true) - special.ndtr((-within - delta) / true)
    return Chances(different.mean(-1), equivalent.mean(-1))


def _tail(rate: float, family: int) -> float:
    """The two-sided probability of one of `family` independent comparisons that together err at `rate`."""
    return float(-np.expm1(np.log1p(-rate) / family))


@functools.lru_cache(maxsize=512)
def _mean_squares(fits: int, items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chi-squares over their degrees, of fits, items and the residual: float [DRAWS] each."""
    points = _points()
    degrees = (fits - 1, items - 1, (fits - 1) * (items - 1))
    a, b, e = (special.chdtri(n, 1 - points[:, i]) / n for i, n in enumerate(degrees))
    return a, b, e


@functools.lru_cache(maxsize=1)
def _points() -> np.ndarray:
    """Points spread evenly in the unit cube, float [DRAWS, 3]."""
    return np.asarray(scipy.stats.qmc.Sobol(3, scramble=False).random(DRAWS) + 0.5 / DRAWS)


def least_margin(pilot: Components, level: float, family: int = 1) -> float:
    """The margin that the test items alone need, whatever the seeds: their half interval of equivalence.

    Below it nothing is called equivalent, and a true difference of the margin is found in less than half of studies.

    >>> round(least_margin(Components(0.0, 5, 10_000, of_fits=1.0, of_items=0.01, residual=0.1), 0.95), 5)
    0.00165
    """
    error = math.sqrt((pilot.of_items + pilot.unseen) / pilot.items)
    return float(-special.stdtrit(pilot.items - 1, _tail(2 - 2 * level, family) / 2)) * error


def seeds_needed(pilot: Components, margin: float, level: float, family: int = 1, power: float = POWER) -> SeedsNeeded:
    """The seeds that find the margin, and that call a difference of 0 equivalent, with their ranges.

    The range is over the 90 % limits of the components (`likely`). Raises InputError for a power that is no chance.

    >>> needed = seeds_needed(Components(0.0, 40, 10_000, of_fits=1.0, of_items=0.0, residual=0.1), 0.01, 0.95)
    >>> needed.find, needed.find_range, needed.equivalent, needed.equivalent_range
    (10, (8, 14), 11, (9, 15))
    """
    if not 0 < power < 1:
        raise InputError(f"power {power} is outside 0 .. 1: give a chance, such as {POWER}")

    def finds(each: Components, fits: int) -> bool:
        return float(chances(each, fits, margin, level, family, margin).different) >= power

    def equates(each: Components, fits: int) -> bool:
        return float(chances(each, fits, margin, level, family).equivalent) >= power

    ends = likely(pilot, 0.05), likely(pilot, 0.95)
    find, least, most = (_first(functools.partial(finds, each)) for each in (pilot, *ends))
    equivalent, fewest, largest = (_first(functools.partial(equates, each)) for each in (pilot, *ends))
    return SeedsNeeded(find, (least, most), equivalent, (fewest, largest))


def _first(enough: Callable[[int], bool]) -> int | None:
    """The least number of two or more that is enough, where all above it are; None if `MOST` is not."""
    below, high = 1, 2
    while not enough(high):
        if high == MOST:
            return None
        below, high = high, min(2 * high, MOST)
    while high - below > 1:
        middle = (below + high) // 2
        below, high = (below, middle) if enough(middle) else (middle, high)
    return high
