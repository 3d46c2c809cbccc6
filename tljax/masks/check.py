"""Refuse masks and phases that cannot be meant, before anything compiles."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths
from tljax.masks.combine import static
from tljax.masks.leaf import numeric, plain, selects
from tljax.types import InputError, Mask, Params, Phase


def lint(params: Params, mask: Mask, fresh: Mask | None = None) -> None:
    """Raise InputError, naming the leaf, for a mask that cannot be meant.

    Another tree than `params`; a leaf that is neither bool, number nor array; a number that is negative or not
    finite; an array that does not fit its leaf, selects by other values than 0 and 1, or selects nothing; nothing
    trained; a leaf that `fresh` says was drawn anew, frozen.
    """
    paths.same_structure(params, mask, "the parameters", "the mask")
    for path, leaf, m in paths.items(params, mask):
        _lint_leaf(path, leaf, m)
    trained = static(params, mask)
    if not any(jax.tree.leaves(trained)):
        raise InputError("the mask freezes every leaf: train at least one")
    if fresh is not None:
        paths.same_structure(params, fresh, "the parameters", "the fresh mask")
        rows = paths.items(params, fresh, trained)
        lost = [path for path, leaf, drawn, trains in rows if drawn and not trains and paths.can_train(path, leaf)]
        if lost:
            raise InputError(
                f"the mask freezes {paths.some(lost)}, which was drawn anew: return masks.union(mask, context.fresh)"
            )


def require_leaf(path: str, leaf: Any, m: Any) -> None:
    """Raise InputError unless `m` is a bool, a finite number of at least 0, or an array that fits a mask's leaf."""
    m = plain(m)
    if isinstance(m, bool | np.bool_):
        return
    if isinstance(m, jax.core.Tracer):
        raise InputError(f"the mask's leaf at '{path}' is traced, so its value is unknown: build masks outside jax.jit")
    if isinstance(m, int | float | np.integer | np.floating):
        if not 0 <= m <= sys.float_info.max:
            shown = math.inf if m > 0 else m  # a whole number may have too many digits to print
            raise InputError(f"the mask's number at '{path}' is {shown}: it must be finite and at least 0")
        return
    if not isinstance(m, np.ndarray | jax.Array) or not numeric(m):
        raise InputError(f"the mask's leaf at '{path}' is {str(m)[:40]!r}: give True, False, a number or an array")
    shape = jnp.shape(leaf)
    try:
        fits = np.broadcast_shapes(m.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"the mask's array at '{path}' has shape {m.shape}, which does not broadcast to {shape}")


def _lint_leaf(path: str, leaf: Any, m: Any) -> None:
    require_leaf(path, leaf, m)
    if not selects(m):
        return
    values = np.asarray(m)
    if not np.isin(values, (0, 1)).all():
        raise InputError(f"the mask's array at '{path}' has values beside 0 and 1: it selects; scale with a number")
    if not values.any():
        raise InputError(f"the mask's array at '{path}' is all zero: write False")


def lint_phases(params: Params, phases: Sequence[Phase], fresh: Mask | None = None) -> None:
    """Raise InputError, naming the phase where there are several, for phases that cannot be meant.

    Anything but a sequence of one Phase or more; starts that are not finite, do not begin at 0, do not strictly
    increase or reach 1; a mask that `lint` refuses, a fresh leaf that is frozen in any phase among it. A mask that
    is a strategy is known at its boundary only: lint what it gives there.
    """
    if not isinstance(phases, Sequence) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise InputError("phases are a list of one Phase(start, mask) or more, from tljax.types")
    before = -1.0
    for i, phase in enumerate(phases):
        start: Any = phase.start
        if not isinstance(start, int | float | np.number) or not 0 <= start < 1:
            raise InputError(
                f"phase {i} starts at {start!r}: a start is a fraction of training, at least 0 and below 1"
            )
        if i == 0 and start != 0:
            raise InputError(
                f"phase 0 starts at {start}: the first phase starts at 0.0, so put Phase(0.0, mask) before it"
            )
        if start <= before:
            raise InputError(f"phase {i} starts at {start}, and phase {i - 1} at {before}: starts strictly increase")
        before = float(start)
        if not is_strategy(phase.mask):
            try:
                lint(params, phase.mask, fresh)
            except InputError as error:
                raise InputError(f"phase {i}: {error}" if len(phases) > 1 else str(error)) from error


def is_strategy(mask: Any) -> bool:
    """Whether a phase's mask is a strategy, evaluated at its boundary: a function, not a tree that can be called.

    (The mask of an Equinox module is a module, so it is callable.)

    >>> is_strategy(lambda params, context: params), is_strategy({"a": True})
    (True, False)
    """
    return callable(mask) and jax.tree_util.all_leaves([mask])
