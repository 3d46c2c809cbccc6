"""Running a step with numbers, to see where it refutes a claim."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tljax.train import flops

MOST_BYTES = 1 << 28
"""The size of a state and a batch, beyond which a step is not run."""
MOST_FLOPS = 5e9
"""The FLOPs of a step, beyond which it is not run: a second or so in four steps."""
STEPS = 4
"""The steps that are run, in turn: schedules begin at 0, and micro-batches are gathered."""
MOST_EAGER = 60
"""The equations of a program, beyond which it is not run without a compiler."""


class Shown(NamedTuple):
    """Where a leaf shows that it changed."""

    step: int
    element: tuple[int, ...]
    before: float | complex
    after: float | complex
    how: str
    """'compiled', 'eagerly' or 'eagerly and compiled'."""
    start: str
    """What the step was run on: 'from the state that was given' or 'from random parameters'."""
    like: str = ""
    """Of a leaf that is computed as another one is: the other one, whose numbers these are."""

    def __str__(self) -> str:
        place = f" at [{', '.join(map(str, self.element))}]" if self.element else ""
        digits = (f"{{:.{count}g}}" for count in range(6, 18))
        before, after = next(
            ((a, b) for a, b in (map(text.format, (self.before, self.after)) for text in digits) if a != b),
            (repr(self.before), repr(self.after)),
        )
        like = f"as '{self.like}' does, which is computed alike: " if self.like else ""
        return f"{like}{before} becomes {after}{place} in step {self.step}, {self.how}, {self.start}"


def fits(closed: Any) -> bool:
    """Whether a step is small enough to be run."""
    avals = [var.aval for var in closed.jaxpr.invars]
    size = sum(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8) for aval in avals)
    return size <= MOST_BYTES and sum(map(flops.equation_flops, closed.jaxpr.eqns)) <= MOST_FLOPS


def changes(
    closed: Any,
    leaves: Sequence[Any],
    where: Mapping[int, Any],
    params: Sequence[int],
    state: int,
    init: Callable[[Sequence[Any]], list[Any]] | None = None,
) -> dict[int, Shown]:
    """For each leaf of the state in `where`, the first element that it chooses which a step is seen to change.

    `closed` maps all leaves (`state` of them are of the state, the rest of the batch) to those of the new state.
    Leaves that are shapes are drawn: parameters (at the positions `params`) and the batch from a normal distribution;
    all else of the state is 0, or as `init` makes it of the parameters. A zero whose sign changes, and a NaN that stays
    one, have not changed.
    """
    remaining = dict(where)
    shown: dict[int, Shown] = {}
    function = core.jaxpr_as_fun(closed)
    compiled = jax.jit(lambda *inputs: function(*inputs))
    starts = [("from random parameters", sample(leaves, params, state, everything=True))]
    if init is not None:
        for _, inputs in starts:
            begun = iter(init([inputs[place] for place in params]))
            inputs[:state] = [inputs[place] if place in params else next(begun) for place in range(state)]
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        starts.insert(0, ("from the state that was given", sample(leaves, params, state, everything=False)))
    for start, inputs in starts:
        current = inputs
        for step in range(1, STEPS + 1):
            if not remaining:
                return shown
            after = [*compiled(*current)]
            for index in list(remaining):
                seen = first_difference(current[index], after[index], remaining[index])
                if seen is None:
                    continue
                how = "compiled"
                if step == 1:
                    value = eagerly(closed, current, index)
                    if value is not None and first_difference(current[index], value, remaining[index]):
                        how = "eagerly and compiled"
                shown[index] = Shown(step, *seen, how, start)
                del remaining[index]
            current = [*after, *inputs[state:]]
    for index in list(remaining):
        value = eagerly(closed, inputs, index)
        seen = None if value is None else first_difference(inputs[index], value, remaining[index])
        if seen is not None:
            shown[index] = Shown(1, *seen, "eagerly", start)
    return shown


def sample(leaves: Sequence[Any], params: Sequence[int], state: int, *, everything: bool) -> list[Any]:
    """Numbers for leaves: those that they have, or drawn ones, for all parameters if `everything`."""
    rng, numbers = np.random.default_rng(0), []
    for index, leaf in enumerate(leaves):
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        dtype: Any = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            key = jax.random.key(0, impl=dtype._impl.name)
            numbers.append(jnp.broadcast_to(key, leaf.shape) if is_shape else leaf)
        elif (is_shape or (everything and index in params)) and jax.dtypes.issubdtype(dtype, np.inexact):
            drawn = rng.standard_normal(np.shape(leaf)) if index in params or index >= state else None
            numbers.append(jnp.asarray(np.zeros(np.shape(leaf)) if drawn is None else drawn, dtype))
        else:
            numbers.append(jnp.zeros(leaf.shape, dtype) if is_shape else jnp.asarray(leaf))
    return numbers


def first_difference(before: Any, after: Any, where: Any) -> tuple[tuple[int, ...], Any, Any] | None:
    """The first element, of those that `where` chooses, that differs: (its index, before, after)."""
    if jax.dtypes.issubdtype(jnp.asarray(before).dtype, jax.dtypes.extended):
        before, after = jax.random.key_data(before), jax.random.key_data(after)
        where = True
    a, b = (np.asarray(array) for array in (before, after))
    differs = (a != b) & ~((a != a) & (b != b)) & np.broadcast_to(where, a.shape)
    if not differs.any():
        return None
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), a.shape))
    number = complex if np.iscomplexobj(a) or np.iscomplexobj(b) else float
    return index, number(a[index]), number(b[index])


def eagerly(closed: Any, inputs: Sequence[Any], output: int) -> Any:
    """An output of a program, one operation after the other; None if it is of too many operations."""
    from jax._src.interpreters import partial_eval

    used = [number == output for number in range(len(closed.jaxpr.outvars))]
    jaxpr, needed = partial_eval.dce_jaxpr(closed.jaxpr, used)
    if count(jaxpr) > MOST_EAGER:
        return None
    with jax.disable_jit():
        values = [value for value, kept in zip(inputs, needed, strict=True) if kept]
        return jax.core.eval_jaxpr(jaxpr, closed.consts, *values)[0]


def count(jaxpr: Any) -> int:
    """The number of equations of a program, with those of programs within."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count(inner)
    return total
