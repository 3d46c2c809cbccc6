"""Where a value of a traced program comes from, through calls, and which numbers of a state select it."""

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from jax.extend import core

from tljax.train.memory import inner_programs

_CALLS = frozenset(("jit", "pjit", "closed_call", "core_call"))
_MOST = 300
"""The operations that are looked at, from a value back."""


class Frame:
    """A program, and what its inputs are in the one around it."""

    def __init__(self, jaxpr: Any, outer: Mapping[Any, tuple["Frame", Any]]) -> None:
        self.inputs, self.outer = jaxpr.invars, outer
        self.producers = {
            var: (equation, number) for equation in jaxpr.eqns for number, var in enumerate(equation.outvars)
        }
        self.inner: dict[int, Frame] = {}

    def within(self, equation: Any) -> tuple["Frame", Any]:
        """The frame of the program that an equation calls, and the program."""
        (jaxpr,) = inner_programs(equation)
        bound = {var: (self, atom) for var, atom in zip(jaxpr.invars, equation.invars, strict=True)}
        return self.inner.setdefault(id(equation), Frame(jaxpr, bound)), jaxpr


def origin(frame: Frame, atom: Any) -> tuple[Frame, Any]:
    """Where a value comes from, through calls: an input of the whole program, or an output of an operation."""
    while not isinstance(atom, core.Literal):
        if atom in frame.outer:
            frame, atom = frame.outer[atom]
        elif atom in frame.producers and frame.producers[atom][0].primitive.name in _CALLS:
            equation, number = frame.producers[atom]
            frame, jaxpr = frame.within(equation)
            atom = jaxpr.outvars[number]
        else:
            break
    return frame, atom


def chooser(frame: Frame, atom: Any) -> tuple[Frame, Any]:
    """Where bools come from, through broadcasts along axes that are their own."""
    while True:
        frame, atom = origin(frame, atom)
        if isinstance(atom, core.Literal) or atom not in frame.producers:
            return frame, atom
        equation = frame.producers[atom][0]
        if equation.primitive.name != "broadcast_in_dim":
            return frame, atom
        (operand, *_), axes = equation.invars, equation.params["broadcast_dimensions"]
        count, first = len(operand.aval.shape), len(atom.aval.shape) - len(operand.aval.shape)
        if axes != tuple(range(first, first + count)):
            return frame, atom
        atom = operand


def chosen_by(closed: Any, place: int, state: Collection[int]) -> list[int]:
    """The places of the inputs, all of them in `state`, from which a scalar is computed that selects a new value.

    `closed` is the program of a step, and `place` that of the output. The first such selection is taken: by
    `jnp.where`, of values of the leaf's shape, or by `lax.cond`. [] if there is none.
    """
    top = Frame(closed.jaxpr, {})
    shape = closed.jaxpr.outvars[place].aval.shape
    waiting, seen = deque([(top, closed.jaxpr.outvars[place])]), set()
    for _ in range(_MOST):
        if not waiting:
            break
        frame, atom = origin(*waiting.popleft())
        if isinstance(atom, core.Literal) or atom not in frame.producers or (frame, atom) in seen:
            continue
        seen.add((frame, atom))
        equation, _ = frame.producers[atom]
        name = equation.primitive.name
        if (name == "select_n" and atom.aval.shape == shape) or name == "cond":
            chosen = _read(top, *chooser(frame, equation.invars[0]))
            if chosen and chosen <= set(state):
                return sorted(chosen)
        waiting.extend((frame, operand) for operand in equation.invars)
    return []


def _read(top: Frame, frame: Frame, atom: Any) -> set[int]:
    """The inputs of the whole program from which a scalar is computed; empty for an array, or if there are too many
    operations."""
    if isinstance(atom, core.Literal) or atom.aval.shape:
        return set()
    places = {variable: place for place, variable in enumerate(top.inputs)}
    waiting, read = deque([(frame, atom)]), set[int]()
    for _ in range(_MOST):
        if not waiting:
            return read
        frame, atom = origin(*waiting.popleft())
        if isinstance(atom, core.Literal):
            continue
        if atom in frame.producers:
            waiting.extend((frame, operand) for operand in frame.producers[atom][0].invars)
        elif frame is top and atom in places:
            read.add(places[atom])
    return set()
