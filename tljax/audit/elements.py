"""A few elements of one leaf, followed through a step that is too large to be run.

Only the operations between a gradient and the new value of the leaf are computed, on a handful of its elements: the
gradient and the parameters are drawn, moments are 0, and a sum over leaves (a norm) is some positive number. What needs
more than that (a matrix product, a loop) is not computed, and decides nothing.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tljax.audit import program
from tljax.audit.numbers import Shown
from tljax.train.memory import inner_programs

MOST = 8
"""The elements that are followed."""
COUNTS = (0, 1, 3, 100)
"""What the counters of a state are, one after the other: schedules begin at 0, and micro-batches are gathered."""


class _Cannot(Exception):
    """A value that does not follow from a few elements."""


class _Scope(NamedTuple):
    """A program that is being read: its operands, as functions that compute them, and what is known already."""

    path: tuple[int, ...]
    inputs: dict[Any, Callable[[], Any]]
    producers: dict[Any, tuple[int, Any]]
    known: dict[Any, Any]
    inner: dict[tuple[int, int], "_Scope"]


class Step(NamedTuple):
    """A traced step, the elements of whose leaves are followed."""

    closed: Any
    leaves: Sequence[Any]
    """Its inputs: arrays, or their shapes and dtypes. The first `state` of them are of the state."""
    state: int
    params: Collection[int]
    """The inputs that are parameters, by their numbers."""
    gradients: Collection[tuple[int, ...]]
    """The places where the program reads gradients, as `cotangents.Read` has them."""
    scalars: dict[Any, Any]
    """What is no element of any leaf, kept for the next one; {} at first."""


def change(step: Step, place: int, where: Any) -> Shown | None:
    """An element of the leaf at a place, among those that `where` chooses, that a step is seen to change; else None."""
    for count in COUNTS:
        follower = _Follower(step, place, where, count)
        try:
            before, after = follower.before(), follower.after()
        except _Cannot:
            return None
        differs = (before != after) & ~(np.isnan(before) & np.isnan(after))
        if differs.any():
            index = int(np.argmax(differs))
            element = tuple(int(i) for i in np.unravel_index(follower.indices[index], follower.shape))
            how = "by the operations on this leaf alone"
            return Shown(count + 1, element, float(before[index]), float(after[index]), how, "from drawn numbers")
    return None


class _Follower:
    """The elements of the leaf at a place in one step, before which the state's counters are at `count`."""

    def __init__(self, step: Step, place: int, where: Any, count: int) -> None:
        self.step, self.place, self.count = step, place, count
        closed = step.closed
        self.shape = tuple(closed.jaxpr.invars[place].aval.shape)
        size = int(np.prod(self.shape))
        chosen = np.flatnonzero(where)[:MOST] if isinstance(where, np.ndarray) else np.arange(min(MOST, size))
        self.indices, self.size = chosen, size
        self.rng = np.random.default_rng(0)
        self.drawn: dict[Any, Any] = {}
        inputs = [self._input(number) for number in range(len(step.leaves))]
        self.top = self._scope(closed.jaxpr, (), inputs, closed.consts)

    def before(self) -> np.ndarray:
        """The elements before the step."""
        return np.asarray(self._input(self.place)())

    def after(self) -> np.ndarray:
        """The elements after the step."""
        value = self.output(self.top, self.step.closed.jaxpr, self.place)
        return np.broadcast_to(np.asarray(value), self.indices.shape)

    def _scope(self, jaxpr: Any, path: tuple[int, ...], inputs: Sequence[Any], consts: Sequence[Any]) -> _Scope:
        operands = dict(zip(jaxpr.invars, inputs, strict=True))
        operands |= {
            var: (lambda const=const: self._constant(const)) for var, const in zip(jaxpr.constvars, consts, strict=True)
        }
        producers = self.step.scalars.get(id(jaxpr))
        if producers is None:
            producers = {var: (number, eqn) for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
            self.step.scalars[id(jaxpr)] = producers
        return _Scope(path, operands, producers, {}, {})

    def _constant(self, number: Any) -> Any:
        if np.ndim(number) == 0:
            return jnp.asarray(number)
        if tuple(np.shape(number)) != self.shape:
            raise _Cannot
        return jnp.asarray(np.asarray(number).reshape(-1)[self.indices])

    def _input(self, number: int) -> Callable[[], Any]:
        aval, leaf = self.step.closed.jaxpr.invars[number].aval, self.step.leaves[number]

        def value() -> Any:
            if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
                raise _Cannot
            if number in self.step.params:
                return self._draw(number, aval)
            if number >= self.step.state or tuple(aval.shape) not in ((), self.shape):
                raise _Cannot
            if not aval.shape and jax.dtypes.issubdtype(aval.dtype, np.integer):
                return jnp.asarray(self.count, aval.dtype)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jnp.zeros(self.indices.shape if aval.shape else (), aval.dtype)
            return jnp.asarray(np.asarray(leaf).reshape(-1)[self.indices] if aval.shape else leaf)

        return value

    def _draw(self, key: Any, aval: Any) -> Any:
        """Drawn elements of a parameter or of a gradient, the same at each call."""
        if tuple(aval.shape) != self.shape or not jax.dtypes.issubdtype(aval.dtype, np.floating):
            raise _Cannot
        if key not in self.drawn:
            self.drawn[key] = jnp.asarray(self.rng.standard_normal(self.indices.shape), aval.dtype)
        return self.drawn[key]

    def output(self, scope: _Scope, jaxpr: Any, number: int) -> Any:
        """A result of a program."""
        return self.read(scope, jaxpr.outvars[number], -1, number)

    def read(self, scope: _Scope, atom: Any, number: int, operand: int) -> Any:
        """What an equation reads as its operand: gradients are drawn."""
        if (*scope.path, number, operand) in self.step.gradients:
            return self._draw((*scope.path, number, operand), atom.aval)
        if isinstance(atom, core.Literal):
            return self._constant(atom.val)
        if atom in scope.inputs:
            return scope.inputs[atom]()
        if self.shape and not atom.aval.shape:
            key = (self.count, scope.path, atom)
            if key not in self.step.scalars:
                self.step.scalars[key] = self.computed(scope, atom)
            return self.step.scalars[key]
        if atom not in scope.known:
            scope.known[atom] = self.computed(scope, atom)
        return scope.known[atom]

    def computed(self, scope: _Scope, var: Any) -> Any:
        """The elements of a variable."""
        number, equation = scope.producers[var]
        name, index = equation.primitive.name, list(equation.outvars).index(var)
        inner = inner_programs(equation)
        if name == "cond":
            which = int(self.read(scope, equation.invars[0], number, 0))
            branches = equation.params["branches"]
            return self.within(scope, equation, (number, min(max(which, 0), len(branches) - 1)), 1, index)
        if name in program.CALLS and inner and len(inner[0].invars) == len(equation.invars):
            return self.within(scope, equation, (number, 0), 0, index)
        if name in program.THROUGH:
            return self.read(scope, equation.invars[index], number, index)
        if name == "iota" and tuple(var.aval.shape) == self.shape:
            along = np.unravel_index(self.indices, self.shape)[equation.params["dimension"]]
            return jnp.asarray(along, var.aval.dtype)
        if name in ("broadcast_in_dim", "reshape") and equation.invars[0].aval.size in (1, self.size):
            return self.read(scope, equation.invars[0], number, 0)
        if name in program.ELEMENTWISE:
            operands = [self.read(scope, atom, number, i) for i, atom in enumerate(equation.invars)]
            return self.applied(equation, operands)
        if not var.aval.shape:
            return self.summed(scope, equation, var)
        raise _Cannot

    def within(self, scope: _Scope, equation: Any, which: tuple[int, int], skipped: int, index: int) -> Any:
        """A result of a program within an equation."""
        jaxpr = inner_programs(equation)[which[1]]
        if which not in scope.inner:
            operands = [
                (lambda i=i, atom=atom: self.read(scope, atom, which[0], i))
                for i, atom in list(enumerate(equation.invars))[skipped:]
            ]
            closed = [
                part
                for value in equation.params.values()
                for part in (value if isinstance(value, tuple | list) else (value,))
                if getattr(part, "jaxpr", None) is jaxpr
            ]
            consts = closed[0].consts if closed else ()
            scope.inner[which] = self._scope(jaxpr, (*scope.path, *which), operands, consts)
        return self.output(scope.inner[which], jaxpr, index)

    def applied(self, equation: Any, operands: Sequence[Any]) -> Any:
        """An elementwise operation on elements, and numbers that are the same for all."""
        if equation.primitive.name == "convert_element_type":
            return jnp.asarray(operands[0]).astype(equation.params["new_dtype"])
        if any(np.ndim(operand) for operand in operands):
            operands = [jnp.broadcast_to(operand, self.indices.shape) for operand in operands]
        return equation.primitive.bind(*operands, **equation.params)

    def summed(self, scope: _Scope, equation: Any, var: Any) -> Any:
        """A number that belongs to no element: of gradients some positive one, and all of them are finite."""
        name, dtype = equation.primitive.name, var.aval.dtype
        if name == "reduce_and":
            return jnp.asarray(True)
        if name in ("reduce_sum", "reduce_max", "dot_general") and jax.dtypes.issubdtype(dtype, np.floating):
            if var not in self.drawn:
                self.drawn[var] = jnp.asarray(1 + abs(self.rng.standard_normal()), dtype)
            return self.drawn[var]
        raise _Cannot
