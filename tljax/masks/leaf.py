"""The kinds of a mask's leaf: a bool or a number for the whole leaf, an array for its elements."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.types import InputError


def plain(leaf: Any) -> Any:
    """A leaf of a mask, but for an array without axes the bool or number that it holds, unless it is traced.

    >>> plain(np.array(0.5)), plain(np.array(False)), plain(True)
    (0.5, False, True)
    """
    array = isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return np.asarray(leaf).item() if array and np.ndim(leaf) == 0 and numeric(leaf) else leaf


def numeric(array: Any) -> bool:
    """Whether an array is of bools or real numbers: not of objects, text or keys."""
    return any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))


def trains(leaf: Any) -> bool:
    """Whether a leaf of a mask leaves something to train; a traced number or an array does.

    >>> trains(True), trains(0.5), trains(0.0), trains(np.array([True, False]))
    (True, True, False, True)
    """
    leaf = plain(leaf)
    if isinstance(leaf, bool | int | float | np.bool_ | np.number):
        return bool(leaf != 0)
    return True


def selects(leaf: Any) -> bool:
    """Whether a leaf of a mask is an array of one axis or more: it selects elements, by what is not 0.

    >>> selects(np.array([True, False])), selects(np.array(0.5)), selects(0.5)
    (True, False, False)
    """
    return isinstance(leaf, np.ndarray | jax.Array) and np.ndim(leaf) > 0


def value(leaf: Any) -> Any:
    """What the leaf of a mask comes to: a bool array where it selects, else a float, True being 1.0.

    Raises InputError for what is neither bool, number nor array.

    >>> value(True), value(np.float32(0.5)), value([1.0, 0.0])
    Traceback (most recent call last):
    ...
    tljax.types.InputError: a mask's leaf is [1.0, 0.0]: give True, False, a number or an array
    """
    if not isinstance(leaf, bool | int | float | np.bool_ | np.number | np.ndarray | jax.Array):
        raise InputError(f"a mask's leaf is {leaf!r}: give True, False, a number or an array")
    if selects(leaf):
        return np.asarray(leaf).astype(bool)
    return float(leaf) + 0.0  # -0.0 becomes 0.0, which is what it means here
