"""The kinds of a mask's leaf: a bool or a number for the whole leaf, an array for its elements."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import plugins
from tljax.types import InputError


@dataclass(frozen=True, eq=False)
class Elements:
    """An array of a mask by the places of the elements that it trains: for an optimizer that keeps these alone.

    It stands in a mask as a leaf; `optimizer.gathered` makes it.
    """

    places: Any
    """int32 [room], ascending: the places of the elements in the flat leaf. Those that are beyond its size stand for
    nothing: their number is not that of the elements, so that other masks share what is compiled."""
    rates: Any
    """float [room], the rates of the elements; None where the array is of bools."""
    array: Any = None
    """The array; None where places and rates are traced."""


def plain(leaf: Any) -> Any:
    """A leaf of a mask as it is; of an array without axes, unless it is traced, the bool or number that it holds.

    >>> plain(np.array(0.5)), plain(np.array(False)), plain(True)
    (0.5, False, True)
    """
    array = isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return np.asarray(leaf).item() if array and np.ndim(leaf) == 0 and numeric(leaf) else leaf


def numeric(array: Any) -> bool:
    """Whether an array holds bools or real numbers: not objects, text or keys."""
    return any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))


LARGEST = float(np.finfo(np.float32).max)
"""The largest rate: beyond it an update in float32 is infinite."""


def canonical_leaf(path: str, leaf: Any) -> Any:
    """A leaf of a mask as a bool, a float of another value than 0 and 1, a NumPy bool array or a NumPy float array.

    Numbers of 0 and 1 become bools, and so do the numbers of an array that has no others. A traced leaf stays, if it is
    a float or an array of bools. Raises InputError, naming `path`, for a rate that is negative or not finite, a traced
    bool or whole number, and a leaf that is neither bool, number nor array.

    >>> canonical_leaf("w", 1.0), canonical_leaf("w", np.array([1.0, 0.0])), canonical_leaf("w", [0.5])
    Traceback (most recent call last):
    ...
    tljax.types.InputError: the mask's leaf at 'w' is '[0.5]': give True, False, a number or an array
    """
    if isinstance(leaf, Elements):
        return leaf
    m = plain(leaf)
    if isinstance(m, bool | np.bool_):
        return bool(m)
    if isinstance(m, jax.core.Tracer):
        is_bools = np.ndim(m) > 0 and m.dtype == jnp.bool_
        if not is_bools and not jnp.issubdtype(m.dtype, jnp.floating):
            raise traced(path)
        return m
    if isinstance(m, int | float | np.integer | np.floating):
        m = int(m) if isinstance(m, int | np.integer) else float(m)
        if not 0 <= m <= LARGEST:
            rate = math.inf if isinstance(m, int) and m > 0 else m  # a whole number may have too many digits to print
            raise InputError(f"the mask's number at '{path}' is {rate}: it must be finite and at least 0, in float32")
        return bool(m) if m in (0, 1) else float(m)
    if not isinstance(m, np.ndarray | jax.Array) or not numeric(m):
        raise InputError(
            f"the mask's leaf at '{path}' is {plugins.words(m)[:40]!r}: give True, False, a number or an array"
        )
    if m.dtype == jnp.bool_:
        return np.asarray(m)
    rates = np.asarray(m).astype(np.float64)
    if odd := rates[~((rates <= LARGEST) & (rates >= 0))].tolist():
        raise InputError(
            f"the mask's array at '{path}' has the number {odd[0]}: it must be finite and at least 0, in float32"
        )
    return rates != 0 if np.isin(rates, (0, 1)).all() else rates


def traced(path: str) -> InputError:
    """The error for a traced leaf of a mask, whose value is not known."""
    where = f" at '{path}'" if path else ""
    return InputError(f"the mask's leaf{where} is traced, so its value is unknown: build masks outside jax.jit")


def trains(leaf: Any) -> bool:
    """Whether a leaf of a mask trains anything; a traced float or an array does.

    Raises InputError for a traced bool, and for a leaf that is neither bool, number nor array.

    >>> trains(True), trains(0.5), trains(0.0), trains(np.array([True, False]))
    (True, True, False, True)
    """
    return trains_at("", leaf)


def trains_at(path: str, leaf: Any) -> bool:
    """Whether a leaf of a mask trains anything, as by `trains`; errors name the path."""
    if isinstance(leaf, jax.core.Tracer) and leaf.dtype == jnp.bool_:
        raise traced(path)
    return bool(m) if isinstance(m := canonical_leaf(path, leaf), bool) else True


def selects(leaf: Any) -> bool:
    """Whether a leaf of a mask is an array of one axis or more: its elements train where it is not 0.

    >>> selects(np.array([True, False])), selects(np.array(0.5)), selects(0.5)
    (True, False, False)
    """
    return isinstance(leaf, np.ndarray | jax.Array) and np.ndim(leaf) > 0


def chosen(leaf: Any) -> Any:
    """Where a leaf of a mask trains: a bool, or a bool array.

    >>> chosen(0.5), chosen(np.array([0.5, 0.0]))
    (True, array([ True, False]))
    """
    m = canonical_leaf("", leaf.array if isinstance(leaf, Elements) else leaf)
    return m != 0 if selects(m) else bool(m)


def value(leaf: Any) -> Any:
    """The value of a leaf of a mask: an array as NumPy array of bools or of rates; a bool or number as float.

    Raises InputError for a leaf that is neither bool, number nor array.

    >>> value(True), value(np.float32(0.5)), value(np.array([1.0, 0.0]))
    (1.0, 0.5, array([ True, False]))
    """
    if isinstance(leaf, jax.core.Tracer):
        raise traced("")
    if not isinstance(leaf, bool | int | float | np.bool_ | np.number | np.ndarray | jax.Array):
        raise InputError(f"a mask's leaf is {plugins.shown(leaf)}: give True, False, a number or an array")
    if selects(leaf):
        return canonical_leaf("", leaf)
    return float(leaf) + 0.0  # -0.0 becomes 0.0
