"""Features and labels as scores and probes take them: checked, in float64, and decomposed."""

from typing import NamedTuple

import jax.numpy as jnp
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
    rounding: float
    """Size of the rounding error of a feature, in its unit: of the dtype in which the features came."""


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
    return Examples(x, *classified(labels, len(x)), rounding(features))


def rounding(features: ArrayLike) -> float:
    """Size of the rounding error of a feature: the epsilon of the dtype times the root of their mean square.

    Integers and lists count as float64.

    >>> rounding(np.ones((3, 2), np.float32)) == 2**-23, rounding([[1.0], [1.0]]) == 2**-52
    (True, True)
    """
    array = np.asarray(features)
    # Not np.finfo: bfloat16 and its like are no floats of NumPy's.
    epsilon = float(jnp.finfo(array.dtype).eps) if jnp.issubdtype(array.dtype, np.floating) else np.finfo(float).eps
    return epsilon * float(np.sqrt((array.astype(np.float64) ** 2).mean()))


def grouped(features: np.ndarray, labels: np.ndarray, groups: ArrayLike | None = None) -> np.ndarray:
    """Which examples must not vouch for each other, as int64 [n] in 0..groups-1: features float64 [n, d], labels [n].

    `groups` int [n] are any integers. Without them examples of equal features are taken for copies of one example,
    unless their class has no other features: then it is the features that bring the class to one point. Raises
    InputError for groups of another shape or type, and for a single one.

    >>> grouped(np.array([[1.0], [2.0], [1.0], [5.0], [5.0]]), np.array([0, 0, 0, 1, 1])).tolist()
    [0, 1, 0, 2, 3]
    """
    if groups is None:
        numbered: dict[bytes, int] = {}
        # + 0.0 as -0.0 is 0.0 in other bytes.
        same = np.array([numbered.setdefault(row.tobytes(), len(numbered)) for row in features + 0.0])
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if len(np.unique(same[members])) == 1:
                same[members] = len(features) + members
    else:
        same = whole(groups, "groups", len(labels))
        if (same == same[0]).all():
            raise InputError(f"groups are all {same[0]}: an example of no other group is left to learn from")
    _, first, group = np.unique(same, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


def classified(labels: ArrayLike, n: int) -> tuple[np.ndarray, int]:
    """Labels as int64 [n], and how many classes there are.

    Raises InputError as `checked` does.
    """
    y = whole(labels, "labels", n)
    if y.min() < 0:
        raise InputError(f"labels[{y.argmin()}] is {y.min()}: number the classes from 0")
    # Not np.bincount: one label of 10**12 would fill the memory.
    present = np.unique(y)
    if len(present) < 2:
        raise InputError(f"labels are all {present[0]}: give two classes or more")
    skipped = np.flatnonzero(present != np.arange(len(present)))
    if len(skipped):
        raise InputError(f"labels hold no {skipped[0]} but {present[-1]}: give examples of every class, from 0")
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


def decomposed(features: np.ndarray, rounding: float = 0.0) -> Decomposed:
    """The thin singular value decomposition of float64 [n, d], cut where singular values are but rounding errors.

    Left out is what NumPy's `matrix_rank` leaves out, and what errors of the size `rounding` in each feature can
    make: these move a singular value by at most their Frobenius norm (Weyl's inequality); errors that sums have
    grown by ten, but are independent, by ten times their norm, sqrt(n) + sqrt(d) times their size (Davidson and
    Szarek 2001, "Local operator theory, random matrices and Banach spaces", theorem 2.13).
    """
    u, s, v = np.linalg.svd(features, full_matrices=False)
    n, d = features.shape
    errors = rounding * max(np.sqrt(n * d), 10 * (np.sqrt(n) + np.sqrt(d)))
    rank = int((s > max(s[0] * max(n, d) * np.finfo(float).eps, errors)).sum())
    return Decomposed(u[:, :rank], s[:rank], v[:rank])


def centred(features: np.ndarray) -> np.ndarray:
    """`features` float64 [n, d] less their mean; a column that does not vary is exactly 0."""
    return np.where(np.ptp(features, axis=0) > 0, features - features.mean(axis=0), 0.0)
