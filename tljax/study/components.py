"""Fits and test items as crossed random factors: variance components, and the largest of several means."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

DIRECTIONS = 1 << 14
"""How many the integral over the sphere is a mean of; its error is about 0.5 % of a tail probability of 0.05."""


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


def errors(squares: Squares, fits: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the m means and their degrees of freedom, float [m] each; `crossed` says which.

    >>> error, degrees = errors(Squares(np.eye(1) * 4.0, np.eye(1) * 4.0, np.eye(1)), 5, 100)
    >>> round(error.item(), 4), round(degrees.item(), 1)
    (0.1183, 7.5)
    """
    a, b, e = (np.diag(part) for part in squares)
    a = np.maximum(a, e / items)
    more = np.maximum(b - e, 0)
    few = a * (1 + 4 / (fits - 1))
    spread = few**2 / (fits - 1)
    spread = spread + np.where(b > e, b**2 + e**2 / (fits - 1), 0) / (items - 1)
    known = spread > 0
    degrees = np.where(known, (few + more) ** 2 / np.where(known, spread, 1), fits - 1)
    return np.sqrt((a + more) / (fits * items)), degrees


def correlations(squares: Squares, fits: int, items: int) -> np.ndarray:
    """Of the m means: float [m, m], at least as near to none as the few degrees of freedom allow.

    Of `degrees` many, chance alone gives squared correlations of 1 / degrees on average: that share of their mean
    square is how far all shrink towards 0 (Schaefer and Strimmer 2005, "A shrinkage approach to large-scale
    covariance matrix estimation", with the variance at no correlation). To 0 is to the safe side (Sidak 1967).
    """
    error, degrees = errors(squares, fits, items)
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

    The normals are a direction times a chi: the chi is integrated exactly, the directions are those of words of
    Philox, the same every time (Genz and Bretz 2009, "Computation of multivariate normal and t probabilities",
    spherical-radial transformation). Never less than for one variable, nor more than m times that (Bonferroni).

    >>> round(beyond(np.eye(1))(1.96), 4)
    0.05
    """
    m = len(correlation)
    values, vectors = np.linalg.eigh(correlation)
    real = values > 1e-9 * values[-1]
    root = vectors[:, real] * np.sqrt(values[real])
    words = np.random.Philox(key=0).random_raw(DIRECTIONS * root.shape[1]) >> np.uint64(11)
    directions = special.ndtri((words + 0.5) / 2**53).reshape(DIRECTIONS, -1)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    largest = np.max((directions @ root.T) ** 2, axis=1)

    def probability(z: float) -> float:
        one = 2 * float(special.ndtr(-z))
        tail = float(special.gammaincc(root.shape[1] / 2, z**2 / (2 * largest)).mean())
        return min(max(tail, one), m * one, 1.0)

    return probability


def tail(beyond: Callable[[float], float], level: float) -> float:
    """The two-sided probability of one normal variable at which the largest of them has the level.

    >>> round(tail(beyond(np.eye(1)), 0.95), 6)
    0.05
    """
    z = optimize.brentq(lambda z: beyond(z) - (1 - level), 0, 38, xtol=1e-12)
    return 2 * float(special.ndtr(-z))
