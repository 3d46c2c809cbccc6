"""Fits and test items as crossed random factors: variance components, and the largest of several means."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

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
    """How large groups of items are; of items without groups 1, and as many as there are items."""

    typical: float
    """Of the group that an item is in, on average over items, over the mean size of a group."""
    many: float
    """Of how many groups of one size the variance would be known as well; see `as_many`."""


def by_group(scores: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, Sizes]:
    """Scores of groups of items, float [m, fits, items] to [m, fits, groups]; groups int [items], or each item alone.

    A fit with the mean r over its items has of a group the score r + (total - r size) groups / items, whose mean over
    groups is r: the linearised ratio estimator of cluster sampling (Cochran 1977, "Sampling techniques", 3rd edition,
    section 9A.1), whose variance is the robust one of Liang and Zeger 1986, "Longitudinal data analysis using
    generalized linear models". In groups of equal size it is the group's mean; of one item it is the score, to the bit.

    >>> scores, sizes = by_group(np.array([[[1.0, 0.0, 0.0, -1.0]]]), np.array([7, 7, 3, 3]))
    >>> scores.tolist(), tuple(sizes)
    ([[[-0.5, 0.5]]], (1.0, 2.0))
    """
    items = scores.shape[2]
    if groups is None:
        return scores, Sizes(1.0, float(items))
    sizes = np.unique(groups, return_counts=True)[1]
    if len(sizes) == items:
        return scores, Sizes(1.0, float(items))
    totals = np.add.reduceat(scores[:, :, np.argsort(groups, kind="stable")], np.cumsum(sizes) - sizes, axis=2)
    means = totals.sum(2, keepdims=True) / items
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


def unseen(scores: np.ndarray, sizes: Sizes | None = None) -> np.ndarray:
    """What to add to the mean squares of items where hardly any item differs from the rest: [m, fits, items] to [m].

    So many items are added as `UNSEEN` says, with the mean square of those that differ and of a quarter of one more, on
    which all fits have the score 1 (as Agresti and Min 2005, "Simple improved confidence intervals for comparing
    matched proportions", add half of one of four kinds). They become fewer with the items that differ; none from
    `ENOUGH` on, or where the means of items over fits have tails no longer than normal ones: t is right there. Of
    groups, one more is typical in size, and normal ones are so of groups of these sizes.

    >>> round(unseen(np.zeros((1, 5, 100))).item() / 500 * 100 * 99, 6)  # the variance of the mean, in items
    4.7
    >>> unseen(np.tile([1.0, -1.0], (1, 5, 50))).item()
    0.0
    """
    _, fits, items = scores.shape
    typical, many = sizes or Sizes(1.0, float(items))
    rest = scores.mean(1)
    rest = (rest - rest.mean(1, keepdims=True)) ** 2
    squares, fourth = rest.sum(1), (rest**2).sum(1)
    some = squares > 0
    # What differs by 1e-10 was rounded.
    differ = np.where(some, squares / (fourth / np.where(some, squares, 1) + 1e-20), 0)
    sparse = np.maximum(1 - 3 * differ / many, 0)
    few = np.where(sparse > 0, np.maximum(1 - differ / np.where(sparse > 0, sparse, 1) / ENOUGH, 0), 0)
    return np.asarray(UNSEEN * few * (squares + 0.25 * typical**2) / (differ + 0.25) * fits / (items - 1))


def errors(squares: Squares, fits: int, items: int, unseen: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the m means and their degrees of freedom, float [m] each; `crossed` says which.

    >>> error, degrees = errors(Squares(np.eye(1) * 4.0, np.eye(1) * 4.0, np.eye(1)), 5, 100)
    >>> round(error.item(), 4), round(degrees.item(), 1)
    (0.1183, 5.7)
    """
    a, b, e = (np.diag(part) for part in squares)
    a = np.maximum(a, e * at_least(fits))
    b = b + unseen
    more = np.maximum(b - e, 0)
    few = a * (fits - 1) / special.chdtri(fits - 1, 0.9)
    spread = few**2 / (fits - 1)
    spread = spread + np.where(b > e, b**2 + e**2 / (fits - 1), 0) / (items - 1)
    known = spread > 0
    degrees = np.where(known, (few + more) ** 2 / np.where(known, spread, 1), fits - 1)
    return np.sqrt((a + more) / (fits * items)), degrees


def at_least(fits: int) -> float:
    """The share of the residual mean square that the mean square of so few fits is at least taken for.

    Its expectation is the residual's and more. With it the t interval of the fits is as wide as the normal one would be
    if fits differed only by the counts of their items: fits that tie by chance cannot be known better than that.

    >>> [round(at_least(fits), 3) for fits in (2, 3, 5, 10)]
    [0.024, 0.208, 0.498, 0.751]
    """
    return float(special.ndtri(0.975) / special.stdtrit(fits - 1, 0.975)) ** 2


def correlations(squares: Squares, fits: int, items: int, unseen: np.ndarray | float = 0.0) -> np.ndarray:
    """Of the m means: float [m, m], at least as near to none as the few degrees of freedom allow.

    Of `degrees` many, chance alone gives squared correlations of 1 / degrees on average: that share of their mean
    square is how far all shrink towards 0 (Schaefer and Strimmer 2005, "A shrinkage approach to large-scale
    covariance matrix estimation", with the variance at no correlation). To 0 is to the safe side (Sidak 1967).
    """
    error, degrees = errors(squares, fits, items, unseen)
    scale = np.where(error > 0, error, 1) * np.sqrt(fits * items)
    found = (squares.fits + squares.items - squares.residual) / np.outer(scale, scale)
    found = np.clip(found, -1, 1)
    np.fill_diagonal(found, 0)
    m = len(found)
    mean = float(np.sum(found**2)) / max(m * (m - 1), 1)
    keep = max(0.0, 1 - 1 / (degrees.min() * mean)) if mean > 0 else 0.0
    values, vectors = np.linalg.eigh(np.eye(m) + keep * found)
    nearest = (vectors * np.maximum(values, 0)) @ vectors.T  # estimated products need not be those of any variables
    size = np.sqrt(np.diag(nearest))
    return np.asarray(nearest / np.outer(size, size))


def beyond(correlation: np.ndarray) -> Callable[[float], float]:
    """z -> probability that the largest of |m correlated standard normals| exceeds z; [m, m].

    The normals are a direction times a chi (Genz and Bretz 2009, "Computation of multivariate normal and t
    probabilities", on spherical-radial transformations): the chi is integrated exactly, the directions are from
    Sobol's sequence, the same every time. Never less than for one variable, nor more than m times that (Bonferroni).

    >>> round(beyond(np.eye(1))(1.96), 4)
    0.05
    """
    m = len(correlation)
    values, vectors = np.linalg.eigh(correlation)
    real = values > 1e-9 * values[-1]
    root = vectors[:, real] * np.sqrt(values[real])
    directions = _directions(root.shape[1])
    largest = np.max((directions @ root.T) ** 2, axis=1)

    def probability(z: float) -> float:
        one = 2 * float(special.ndtr(-z))
        tail = float(special.gammaincc(root.shape[1] / 2, z**2 / (2 * largest)).mean())
        return min(max(tail, one), m * one, 1.0)

    return probability


@functools.lru_cache(maxsize=4)
def _directions(rank: int) -> np.ndarray:
    """Float [DIRECTIONS, rank], of length 1; [1, 1] where there is but one direction."""
    if rank == 1:
        return np.ones((1, 1))
    points = stats.qmc.Sobol(rank, scramble=False).random(DIRECTIONS) + 0.5 / DIRECTIONS
    normals = special.ndtri(points)
    return np.asarray(normals / np.linalg.norm(normals, axis=1, keepdims=True))


def tail(beyond: Callable[[float], float], m: int, level: float) -> float:
    """The two-sided probability of one normal variable at which the largest of m has the level.

    >>> round(tail(beyond(np.eye(1)), 1, 0.95), 6)
    0.05
    """
    one, bonferroni = special.ndtri([(1 - level) / 2, (1 - level) / (2 * m)])
    z = optimize.brentq(lambda z: beyond(z) - (1 - level), -one - 1e-3, -bonferroni + 1e-3, xtol=1e-10)
    return 2 * float(special.ndtr(-z))
