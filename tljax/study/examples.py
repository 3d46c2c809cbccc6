"""Features and labels as scores and probes take them: checked, in float64, and decomposed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tljax.types import InputError


class Examples(NamedTuple):
    """Features and labels that hold no surprise."""

    features: np.ndarray
    """float64 [n, d], finite."""
    labels: np.ndarray
    """int64 [n], every one of 0..classes-1 among them."""
    classes: int
    """Two or more."""


class Decomposed(NamedTuple):
    """Thin singular value decomposition u @ diag(s) @ v, without what is zero but for rounding."""

    u: np.ndarray
    """float64 [n, rank], orthonormal columns."""
    s: np.ndarray
    """float64 [rank], positive, descending."""
    v: np.ndarray
    """float64 [rank, d], orthonormal rows."""


def checked(features: ArrayLike, labels: ArrayLike) -> Examples:
    """Features float [n, d] and labels int [n] in 0..classes-1.

    Raises InputError for what is empty or not finite, and for labels that are not integers, are not as many as the
    features, skip a number or are all alike.

    >>> checked([[0.0], [1.0]], [1, 0]).classes
    2
    """
    x = numbers(features, "features")
    return Examples(x, *classified(labels, len(x)))


def classified(labels: ArrayLike, n: int, *, each: int = 1) -> tuple[np.ndarray, int]:
    """Labels as int64 [n], and how many classes there are.

    Raises InputError as `checked` does, and for a class of fewer than `each`.
    """
    y = whole(labels, "labels", n)
    if y.min() < 0:
        raise InputError(f"labels[{y.argmin()}] is {y.min()}: number the classes from 0")
    # Not np.bincount: one label of 10**12 would fill the memory.
    present, counts = np.unique(y, return_counts=True)
    if len(present) < 2:
        raise InputError(f"labels are all {present[0]}: give two classes or more")
    skipped = np.flatnonzero(present != np.arange(len(present)))
    if len(skipped):
        raise InputError(f"labels hold no {skipped[0]} but {present[-1]}: give examples of every class, from 0")
    if counts.min() < each:
        few = counts.argmin()
        raise InputError(f"class {few} has {counts[few]} of the examples: give {each} or more of each class")
    return y, len(present)


def numbers(values: ArrayLike, name: str) -> np.ndarray:
    """`values` as float64 [n, d]; raises InputError where that holds no number, or one that is not finite.

    Magnitudes outside 1e-100..1e100 are refused too: their squares would be lost.
    """
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind in "cOSUmM":
        raise InputError(f"{name} are {array.dtype} {list(array.shape)}: give real numbers [examples, columns]")
    array = array.astype(np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0]
        raise InputError(f"{name}[{row}, {column}] is {array[row, column]}: give finite numbers (a fit that diverged?)")
    largest = np.abs(array).max()
    if largest > 1e100 or 0 < largest < 1e-100:
        raise InputError(f"{name} are of magnitude {largest:.0e}: scale them to within 1e-100..1e100")
    return array


def whole(values: ArrayLike, name: str, n: int) -> np.ndarray:
    """`values` as int64 [n]; raises InputError for another shape or type."""
    array = np.asarray(values)
    if array.shape != (n,):
        raise InputError(f"{name} have shape {list(array.shape)}, examples say [{n}]: give one an example")
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} are {array.dtype}: give integers")
    return array.astype(np.int64)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """float64 [n, classes], 1 at the label.

    >>> one_hot(np.array([1, 0]), 2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    return np.eye(classes)[labels]


def decomposed(features: np.ndarray) -> Decomposed:
    """The thin singular value decomposition of float64 [n, d], cut at the rank as NumPy's `matrix_rank` has it."""
    u, s, v = np.linalg.svd(features, full_matrices=False)
    rank = int((s > s[0] * max(features.shape) * np.finfo(float).eps).sum())
    return Decomposed(u[:, :rank], s[:rank], v[:rank])


def centred(features: np.ndarray) -> np.ndarray:
    """`features` float64 [n, d] less their mean; a column that does not vary is exactly 0."""
    return np.where(np.ptp(features, axis=0) > 0, features - features.mean(axis=0), 0.0)
