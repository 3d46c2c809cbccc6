"""Where a leak comes from: the operation that first mixes a frozen leaf's gradient into what trains; what shows it."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax.audit import cotangents, numbers

DISTURBANCES = (1e6, math.inf)
"""What is added to a gradient in turn: more than any clip lets through, and what is not finite."""


class Disturbed(NamedTuple):
    """What shows that a trained leaf depends on a gradient."""

    place: int
    """Of the trained leaf, among the leaves of the state."""
    step: int
    element: tuple[int, ...]
    before: float | complex
    after: float | complex
    """What that element is after the step, without the disturbance and with it."""
    disturbance: float

    def __str__(self) -> str:
        at = f" at [{', '.join(map(str, self.element))}]" if self.element else ""
        return f"{self.disturbance:g} added to it makes {self.after:.9g} of {self.before:.9g}{at} in step {self.step}"


def mixing(computed_from: Collection[int], meetings: Sequence[tuple[int, Any]], bit: int, others: int) -> Any:
    """The first equation where the label `bit` meets one of `others`, of those from which some outputs are computed.

    `computed_from` are the identities of these equations, as `idle.live` has them, and `meetings` are (labels,
    equation), as `program.Reading` has them. None if labels do not meet in one equation.
    """
    met = [(bits, equation) for bits, equation in meetings if bits & bit and id(equation) in computed_from]
    return next((equation for bits, equation in met if bits & others), met[0][1] if met else None)


def operation(equation: Any) -> str:
    """What an equation is a part of, in words: a transformation of optax by name, else its own primitive."""
    name = _transformation(equation)
    return name if name else f"'{equation.primitive.name}'"


def is_movement(equation: Any) -> bool:
    """Whether an equation only puts elements elsewhere, or takes one of two: what meets there need not mix."""
    return equation.primitive.name in _MOVEMENTS


_MOVEMENTS = frozenset((
    *("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "rev", "tile", "copy", "select_n"),
    *("slice", "dynamic_slice", "dynamic_update_slice", "gather", "scatter", "concatenate", "split", "pad", "sort"),
))  # fmt: skip


Where = Mapping[Any, tuple[Sequence[int], Any]]
"""For each place or number of an input: the numbers of leaves, and which elements are frozen (True: all)."""


def disturbed_step(closed: Any, places: Where, frozen_inputs: Where) -> Callable[[Sequence[Any], Any], list[Any]]:
    """A compiled step (inputs, numbers [leaves]) -> outputs, in which the number of a leaf is added to the gradient of
    its frozen elements, where the program reads one (`places`) or is given one (`frozen_inputs`)."""

    def step(inputs: Sequence[Any], added: Any) -> list[Any]:
        def more(value: Any, leaves: Sequence[int], where: Any) -> Any:
            if where is not True and jnp.shape(value) != where.shape:
                return value  # under `vmap` it is not known which elements these are
            total = sum(added[leaf] for leaf in leaves).astype(jnp.result_type(value))
            return jnp.where(where, value + total, value)

        def at(leaves: Sequence[int], where: Any) -> Callable[[Any], Any]:
            return lambda value: more(value, leaves, where)

        disturbed = [more(value, *frozen_inputs[n]) if n in frozen_inputs else value for n, value in enumerate(inputs)]
        return cotangents.run(closed, disturbed, {place: at(*row) for place, row in places.items()})

    return jax.jit(step)


def shown(
    run: Callable[[Sequence[Any], Any], list[Any]],
    inputs: Sequence[Any],
    suspects: Mapping[int, Any],
    state: int,
    trains: Mapping[int, Any],
    frozen: Mapping[int, Any],
) -> dict[int, Disturbed]:
    """For the number of each suspect, the first element that trains and becomes another when its gradient does.

    `run` is a `disturbed_step`, and `suspects` has [leaves] for each leaf, 1 at the leaf and 0 at others; the first
    `state` inputs are of the state. `trains` and `frozen` say which elements of the parameters do and are, by place;
    those that are frozen are the same in both runs, so that a gradient shows and not a leaf that it has moved. Suspects
    that all together show nothing are not run by themselves.
    """
    if not suspects:
        return {}
    nothing = jnp.zeros_like(next(iter(suspects.values())))
    plain = [list(inputs)]
    for _ in range(numbers.STEPS):
        plain.append([*run(plain[-1], nothing)[:state], *inputs[state:]])

    def difference(suspect: Any, disturbance: float) -> Disturbed | None:
        other, added = plain[0], jnp.where(suspect > 0, disturbance, 0.0)
        for turn, after in enumerate(plain[1:], 1):
            other = [*run(other, added)[:state], *inputs[state:]]
            for place, where in trains.items():
                seen = numbers.first_difference(after[place], other[place], where)
                if seen is not None:
                    return Disturbed(place, turn, *seen, disturbance)
            for place, where in frozen.items():
                other[place] = after[place] if where is True else jnp.where(where, after[place], other[place])
        return None

    rows: dict[int, Disturbed] = {}
    for disturbance in DISTURBANCES:
        left = {number: suspect for number, suspect in suspects.items() if number not in rows}
        if left and difference(sum(left.values()), disturbance) is not None:
            seen = {number: difference(suspect, disturbance) for number, suspect in left.items()}
            rows |= {number: row for number, row in seen.items() if row is not None}
    return rows


def _transformation(equation: Any) -> str | None:
    """The function of optax that made the innermost transformation which an equation is a part of."""
    traceback = equation.source_info.traceback
    codes = [] if traceback is None else traceback.raw_frames()[0]
    for code in codes:  # from the innermost frame on
        if "/optax/" in code.co_filename.replace("\\", "/") and ".<locals>." in code.co_qualname:
            return f"optax's {code.co_qualname.partition('.')[0].lstrip('_')}"
    return None
