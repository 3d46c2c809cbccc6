"""`audit.step` and `audit.optimizer`: what a training step does to each leaf, proved from its traced program."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, paths, plugins
from tljax.audit import cotangents, numbers, program, tracing
from tljax.audit.program import CONSTANT, Piece, Value
from tljax.audit.report import GRADES, Claim, Finding, Report
from tljax.types import InputError, Mask, Params


def step(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    mask: Mask,
    *,
    params: Callable[[Any], Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> Report:
    """What a training step does to each leaf under a mask, read from its program; the state's shapes suffice.

    `step(state, batch)` gives the new state, or a tuple that begins with it. `params` picks the parameters out of the
    state: by default its `params`, its first element, or the state itself. Modules of NNX may be the state: of
    (model, optimizer), a step is called as step(model, optimizer, batch) and changes them in place. Where the state has
    arrays, zeros of the optimizer that the step keeps 0 are taken to be 0. `loss(params, batch)` helps to tell whose
    gradient a value is. Raises InputError if the step cannot be traced, is not pure, or changes the structure of its
    state, and if the mask does not fit the parameters.

    >>> def descend(params, batch):
    ...     gradients = jax.grad(lambda params: ((batch @ params["w"] + params["b"]) ** 2).sum())(params)
    ...     return {"w": params["w"] - 0.1 * gradients["w"], "b": params["b"] * 0.99}
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    >>> report = step(descend, params, jnp.ones((4, 3)), {"w": True, "b": False})
    >>> [(finding.path, finding.claim, finding.verdict) for finding in report.findings]
    [('b', 'frozen', 'refuted'), ('w', 'trains', 'proved'), ('b', 'state', 'proved')]
    """
    traced = tracing.trace(step, state, batch, params)
    audit = _Audit(traced, mask, _name(step))
    audit.labels = audit.of_gradients()
    return audit.report()


def optimizer(tx: optax.GradientTransformation, params: Params, mask: Mask) -> Report:
    """What an optimizer does to each leaf under a mask, for any gradients, after any number of steps from `tx.init`.

    `params` are arrays or their shapes. Nothing is computed but what refutes a claim. Raises InputError if `tx` cannot
    be traced on these parameters, and if the mask does not fit them.

    >>> params = {"w": jax.ShapeDtypeStruct((2,), "float32"), "b": jax.ShapeDtypeStruct((2,), "float32")}
    >>> report = optimizer(optax.adamw(0.1), params, {"w": True, "b": False})
    >>> [(finding.path, finding.claim) for finding in report.refuted]
    [('b', 'frozen'), ('b', 'state')]
    """
    shapes = jax.tree.map(_shape, params)
    try:
        begun: Any = jax.make_jaxpr(tx.init)(shapes)
        state = jax.eval_shape(tx.init, shapes)
    except Exception as error:  # of any transformation
        raise InputError(f"the optimizer's init fails on these parameters: {plugins.describe(error)[:300]}") from error

    def step(state: Any, gradients: Any) -> Any:
        params, state = state
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    traced = tracing.trace(step, (params, state), shapes, lambda state: state[0])
    traced = traced._replace(paths=tuple(path.removeprefix("0/") for path in traced.paths))
    audit = _Audit(traced, mask, _name(tx), init=(tx.init, begun))
    return audit.report()


def _name(function: Callable[..., Any]) -> str:
    update = getattr(function, "update", None)  # of an optimizer: the function that made it
    if callable(update):
        return str(getattr(update, "__qualname__", type(function).__name__)).partition(".")[0]
    return str(getattr(function, "__name__", type(function).__name__))


@dataclass
class _Leaf:
    """A leaf of the parameters, and what the mask says of it."""

    path: str
    place: int
    """Among the leaves of the state."""
    trains: bool | np.ndarray
    """Whether it trains, or which of its elements do."""
    number: int

    @property
    def partly(self) -> bool:
        return isinstance(self.trains, np.ndarray)

    @property
    def frozen(self) -> Any:
        """The elements that are frozen: all, none, or an array."""
        return ~self.trains if isinstance(self.trains, np.ndarray) else not self.trains


class _Audit:
    """One audit of one traced step."""

    def __init__(
        self,
        traced: tracing.Traced,
        mask: Mask,
        subject: str,
        labels: Mapping[Any, Any] | None = None,
        init: tuple[Any, Any] | None = None,
    ) -> None:
        """`init` of an optimizer, whose gradients are the batch: the function from parameters, and its program."""
        self.traced, self.subject = traced, subject
        self.avals = [var.aval for var in traced.closed.jaxpr.invars]
        self.size = len(traced.paths)
        leaves = masks.canonical(traced.params, mask)
        self.leaves = [
            _Leaf(path, place, _trains(m, self.avals[place].shape), number)
            for number, (place, (path, m)) in enumerate(zip(traced.positions, paths.items(leaves), strict=True))
        ]
        self.by_place = {leaf.place: leaf for leaf in self.leaves}
        self.owner = {place: self._owner(place) for place in range(self.size) if place not in self.by_place}
        self.batch = 1 << (2 * self.size)
        first = 2 * self.size + 1
        self.gradient = {
            leaf.number: (1 << (first + 3 * i), 1 << (first + 3 * i + 1)) for i, leaf in enumerate(self.leaves)
        }
        """The labels of a leaf's gradient: that of elements that train, and that of frozen ones."""
        self.perhaps = {leaf.number: 1 << (first + 3 * i + 2) for i, leaf in enumerate(self.leaves)}
        """The label of what may be a leaf's gradient, or another's."""
        self.labels = dict(labels or {})
        self.init = init
        self.notes = list(traced.notes)

    def _owner(self, place: int) -> _Leaf | None:
        """The parameter whose path ends the path of a leaf of the state, if there is one: the longest."""
        path = self.traced.paths[place]
        owners = [leaf for leaf in self.leaves if path.endswith("/" + leaf.path)]
        return max(owners, key=lambda leaf: len(leaf.path), default=None)

    # Reading.

    def of_gradients(self) -> dict[tuple[int, ...], program.Label]:
        """The labels of the places where the program reads a gradient of parameters."""
        by_path = {leaf.path: leaf for leaf in self.leaves}
        roles = cotangents.cotangents(self.traced.closed, {leaf.place: leaf.path for leaf in self.leaves})
        return {
            place: self._label([by_path[path] for path in role.leaves], role.assigned) for place, role in roles.items()
        }

    def _label(self, leaves: Sequence[_Leaf], assigned: bool) -> program.Label:
        if not assigned:
            return program.Label(sum(self.perhaps[leaf.number] for leaf in leaves))
        if len(leaves) == 1 and leaves[0].partly:
            return program.Label(
                self.gradient[leaves[0].number][0], leaves[0].frozen, self.gradient[leaves[0].number][1]
            )
        bits = 0
        for leaf in leaves:
            trained, frozen = self.gradient[leaf.number]
            bits |= trained | frozen if leaf.partly else trained if leaf.trains is True else frozen
        return program.Label(bits)

    def inputs(self, zeros: Mapping[int, tuple[Any, int]]) -> list[Value]:
        """The values of the inputs; `zeros` says where leaves of the state are taken to be 0, and how surely."""
        values = []
        for place, aval in enumerate(self.avals):
            if place >= self.size and self.init is None:
                values.append(program.whole(place, self.batch))
                continue
            if place >= self.size:  # the gradients are in the order of the parameters
                leaf = self.leaves[place - self.size]
                mine = self.gradient[leaf.number]
                whole = program.whole(place, mine[0] if leaf.trains is True else mine[1])
                values.append(program.parts(place, leaf.frozen, mine) if leaf.partly else whole)
                continue
            owner = self.by_place.get(place) or self.owner.get(place)
            if owner is not None and owner.partly and owner.frozen.shape == tuple(aval.shape):
                value = program.parts(place, owner.frozen, (1 << (2 * place), 1 << (2 * place + 1)))
            else:
                value = program.whole(place, 1 << (2 * place))
            if place in zeros:
                value = program.zeros(value, zeros[place][0], aval.dtype, zeros[place][1])
            values.append(value)
        return values

    def read(self, zeros: Mapping[int, tuple[Any, int]]) -> program.Reading:
        names = [*self.traced.paths, *("" for _ in self.avals[self.size :])]
        watched = sum(self.perhaps.values())
        for pair in self.gradient.values():
            watched |= pair[0] | pair[1]
        return program.read(self.traced.closed, self.inputs(zeros), names=names, labels=self.labels, watched=watched)

    def invariant(self, zeros: dict[int, tuple[Any, int]]) -> tuple[program.Reading, dict[int, tuple[Any, int]]]:
        """The reading under all zeros that the step keeps, of those with which the state begins.

        Assume all, drop what the step does not map to 0 again, and repeat (Flanagan and Leino 2001, "Houdini").
        """
        while True:
            reading = self.read(zeros)
            kept: dict[int, tuple[Any, int]] = {}
            for place, (where, grade) in zeros.items():
                value, shape = reading.outputs[place], self.avals[place].shape
                still = [
                    number
                    for number, piece in enumerate(value.pieces)
                    if program.is_zero(piece) and not piece.condition
                ]
                grade = max([grade, *(value.pieces[number].grade for number in still)])
                if value.selector is None:
                    holds: Any = where if still else False
                else:
                    holds = np.isin(value.selector, still) & np.broadcast_to(where, shape)
                if isinstance(holds, np.ndarray):
                    holds = True if holds.all() else holds if holds.any() else False
                if holds is not False:
                    kept[place] = (holds, grade)
            if all(
                place in kept and kept[place][1] == grade and np.array_equal(kept[place][0], where)
                for place, (where, grade) in zeros.items()
            ):
                return reading, zeros
            zeros = kept

    def given_zeros(self) -> dict[int, tuple[Any, int]]:
        """Where the arrays of the state that are no parameters are 0."""
        zeros: dict[int, tuple[Any, int]] = {}
        if self.init is not None:
            closed = self.init[1]
            params = [program.whole(number, 0) for number in range(len(self.leaves))]
            state = [place for place in range(self.size) if place not in self.by_place]
            for place, value in zip(state, program.read(closed, params).outputs, strict=True):
                if all(map(program.is_zero, value.pieces)) and self.avals[place].dtype != np.bool_:
                    zeros[place] = (True, program.EQUAL)
            return zeros
        for place in range(self.size):
            leaf = self.traced.leaves[place]
            if place in self.by_place or isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, "dtype"):
                continue
            if (
                jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
                or leaf.dtype == np.bool_
                or not math.prod(leaf.shape)
            ):
                continue
            where = _where_zero(leaf)
            if where is not False:
                zeros[place] = (where, program.EQUAL)
        return zeros

    # Deciding.

    def report(self) -> Report:
        try:
            reading, zeros = self.invariant(self.given_zeros())
        except program.Stop as stop:
            claims: list[tuple[_Leaf, Claim]] = [(leaf, "trains") for leaf in self.leaves if leaf.trains is not False]
            claims += [(leaf, "frozen") for leaf in self.leaves if _any(leaf.frozen)]
            undecided = [Finding(leaf.path, claim, "not decided", str(stop)) for leaf, claim in claims]
            return Report(self.subject, tuple(undecided), (*self.notes, str(stop)))
        self.reading, self.zeros = reading, zeros
        self.notes += reading.notes
        self.reach = self._reach()
        findings = []
        moved: dict[int, Any] = {}
        for leaf in self.leaves:
            if _any(leaf.frozen) and self._worst(leaf) is not None:
                moved[leaf.place] = leaf.frozen
        shown = self._shown(moved)
        for leaf in self.leaves:
            if leaf.trains is not False:
                findings.append(self.trains(leaf))
            if _any(leaf.frozen):
                findings.append(self.frozen(leaf, shown.get(leaf.place)))
        findings += [self.unseen(leaf) for leaf in self.leaves if _any(leaf.frozen)]
        findings += [self.state(leaf) for leaf in self.leaves if leaf.trains is False]
        return Report(self.subject, tuple(findings), tuple(dict.fromkeys(self.notes)))

    def _shown(self, moved: Mapping[int, Any]) -> dict[int, numbers.Shown]:
        if not moved:
            return {}
        if not numbers.fits(self.avals):
            self.notes.append("the step is not run: its state and batch are too large")
            return {}
        try:
            return numbers.changes(
                self.traced.closed,
                self.traced.leaves,
                moved,
                self.traced.positions,
                self.size,
                None if self.init is None else self._begun,
            )
        except Exception as error:  # a step that can be traced need not run: on these devices, on drawn numbers
            self.notes.append(f"the step does not run on these numbers: {plugins.describe(error)[:200]}")
            return {}

    def _begun(self, params: Sequence[Any]) -> list[Any]:
        """The leaves of an optimizer's state on numbers for its parameters."""
        assert self.init is not None
        state = self.init[0](jax.tree.unflatten(jax.tree.structure(self.traced.params), params))
        return jax.tree.leaves(state)

    def pieces(self, place: int, where: Any) -> list[tuple[int, Piece]]:
        """The pieces, with their numbers, of a new leaf's elements that `where` chooses."""
        value = self.reading.outputs[place]
        if value.selector is None:
            return [(0, value.pieces[0])]
        occurring = np.unique(value.selector if where is True else value.selector[where])
        return [(int(number), value.pieces[number]) for number in occurring]

    def keeps(self, leaf: _Leaf, number: int, piece: Piece) -> bool:
        """Whether the elements of a piece are those of the same leaf, in their places."""
        if piece.content != leaf.place:
            return False
        if piece.places is None:
            return True
        selector = self.reading.outputs[leaf.place].selector
        where = np.broadcast_to(leaf.frozen, piece.places.shape)
        return program.in_order(piece, where if selector is None else where & (selector == number))

    def _worst(self, leaf: _Leaf) -> Piece | None:
        """A piece of a frozen leaf that is not what it was, if there is one."""
        for number, piece in self.pieces(leaf.place, leaf.frozen):
            if not self.keeps(leaf, number, piece):
                return piece
        return None

    def frozen(self, leaf: _Leaf, shown: numbers.Shown | None) -> Finding:
        """The finding on whether the frozen elements of a leaf keep their values."""
        worst = self._worst(leaf)
        if worst is None:
            pieces = [piece for _, piece in self.pieces(leaf.place, leaf.frozen)]
            grade = max(piece.grade for piece in pieces)
            condition = frozenset().union(*(piece.condition for piece in pieces))
            return Finding(
                leaf.path,
                "frozen",
                "proved",
                _KEPT[grade] + _of_elements(leaf.frozen),
                grade=GRADES[grade],
                condition=f"if {' and '.join(sorted(condition))}" if condition else None,
            )
        source = program.line_of(worst.equation)
        cause = self.cause(leaf, worst)
        if shown is not None:
            detail = f"{cause}: {shown}"
            return Finding(leaf.path, "frozen", "refuted", detail, source=source, grade="changed")
        return Finding(leaf.path, "frozen", "not decided", cause + self.doubt(leaf, worst), source=source)

    def doubt(self, leaf: _Leaf, piece: Piece) -> str:
        """What would decide a leaf whose program does not."""
        unknown = [
            self.traced.paths[place]
            for place, owner in self.owner.items()
            if piece.depends >> (2 * place) & 3 and isinstance(self.traced.leaves[place], jax.ShapeDtypeStruct)
        ]
        if unknown:
            return f"; {paths.some(unknown, 2)} may hold anything: give the state of tx.init, whose zeros decide"
        return "; no numbers show that it moves"

    def cause(self, leaf: _Leaf, piece: Piece) -> str:
        """What a new value that is not the old one is."""
        if piece.content == CONSTANT:
            return f"it is set to {piece.constant}"
        if piece.content >= 0:
            if piece.content == leaf.place:
                return "its elements change places"
            name = self.traced.paths[piece.content] if piece.content < self.size else "the batch"
            return f"it is given the value of '{name}'"
        operation = f"'{piece.equation.primitive.name}'" if piece.equation is not None else "an operation"
        return f"{operation} gives a value that {self.depends(leaf, piece.depends)}"

    def depends(self, leaf: _Leaf, bits: int) -> str:
        """What a new value depends on, in words."""
        mine = self.gradient[leaf.number]
        names = []
        if bits >> (2 * leaf.place) & 3:
            names.append("itself")
        if bits & (mine[0] | mine[1]):
            names.append("its gradient")
        states = [place for place, owner in self.owner.items() if bits >> (2 * place) & 3]
        of_leaf = [place for place in states if self.owner[place] is leaf]
        others = [self.traced.paths[place] for place in states if place not in of_leaf]
        if of_leaf:
            names.append(f"its optimizer state ({paths.some([self.traced.paths[place] for place in of_leaf], 2)})")
        if others and len(names) < 2:
            names.append(paths.some(others, 2))
        if bits & self.batch and not bits & (mine[0] | mine[1]):
            names.append("the batch")
        if not names:
            return "depends on nothing of the state"
        alone = " alone, as decay does" if names == ["itself"] else ""
        return f"depends on {', '.join(names)}{alone}"

    def _reach(self) -> list[int]:
        """For each leaf of the state that is no parameter: the gradients and batches on which it depends in time."""
        wanted = self.batch | sum(self.perhaps.values())
        for pair in self.gradient.values():
            wanted |= pair[0] | pair[1]
        reach = [
            0 if place in self.by_place else self.reading.outputs[place].depends & wanted for place in range(self.size)
        ]
        changed = True
        while changed:
            changed = False
            for place in range(self.size):
                if place in self.by_place:
                    continue
                bits = reach[place] | self._through(self.reading.outputs[place].depends, reach)
                changed = changed or bits != reach[place]
                reach[place] = bits
        return reach

    def _through(self, bits: int, reach: Sequence[int]) -> int:
        """The gradients and batches on which what depends on `bits` depends through the state."""
        result = 0
        for place in self.owner:
            if bits >> (2 * place) & 3:
                result |= reach[place]
        return result

    def trains(self, leaf: _Leaf) -> Finding:
        """The finding on whether the elements of a leaf that train follow the batch."""
        mine = self.gradient[leaf.number]
        what = "the batch" if self.init is None else "its gradient"
        wanted = self.batch | mine[0] | mine[1] | self.perhaps[leaf.number]
        rows = self.pieces(leaf.place, leaf.trains)
        dead = [
            (number, piece)
            for number, piece in rows
            if not (piece.depends | self._through(piece.depends, self.reach)) & wanted
        ]
        if not dead:
            return Finding(leaf.path, "trains", "proved", f"depends on {what}{_of_elements(leaf.trains)}")
        number, piece = dead[0]
        selector = self.reading.outputs[leaf.place].selector
        part = ""
        if len(dead) < len(rows) and selector is not None:
            count = sum(int((np.broadcast_to(leaf.trains, selector.shape) & (selector == n)).sum()) for n, _ in dead)
            part = f"{count} of its elements: "
        if self.keeps(leaf, number, piece):
            detail = f"{part}its new value is its old one, whatever {what} is"
        else:
            detail = f"{part}no dependence on {what}: {self.cause(leaf, piece)}"
        return Finding(leaf.path, "trains", "refuted", detail, source=program.line_of(piece.equation))

    def unseen(self, leaf: _Leaf) -> Finding:
        """The finding on whether trained leaves depend on the gradient of a frozen one."""
        bit, perhaps = self.gradient[leaf.number][1], self.perhaps[leaf.number]
        doubtful = []
        for other in self.leaves:
            if other.trains is False:
                continue
            for _, piece in self.pieces(other.place, other.trains):
                bits = piece.depends | self._through(piece.depends, self.reach)
                if bits & bit:
                    meeting = next((equation for bits, equation in self.reading.meetings if bits & bit), None)
                    operation = f", first in '{meeting.primitive.name}'" if meeting is not None else ""
                    detail = f"'{other.path}' depends on its gradient{operation}"
                    return Finding(leaf.path, "unseen", "refuted", detail, source=program.line_of(meeting))
                if bits & perhaps:
                    doubtful.append(other.path)
        if doubtful:
            detail = f"{paths.some(list(dict.fromkeys(doubtful)), 2)}: what a gradient there is of is not known"
            return Finding(leaf.path, "unseen", "not decided", detail)
        return Finding(leaf.path, "unseen", "proved", "no update of a trained leaf depends on its gradient")

    def state(self, leaf: _Leaf) -> Finding:
        """The finding on what a frozen leaf owns of the state."""
        places = [place for place, owner in self.owner.items() if owner is leaf and self.avals[place].size > 1]
        if not places:
            return Finding(leaf.path, "state", "proved", "0 bytes")
        size = sum(math.prod(self.avals[place].shape) * self.avals[place].dtype.itemsize for place in places)
        detail = f"{size:,} bytes: {paths.some([self.traced.paths[place] for place in places], 2)}"
        return Finding(leaf.path, "state", "refuted", detail)


_KEPT = (
    "its new value is its old one",
    "its new value is its old one after an operation with a neutral number",
    "its new value is its old one, if what is multiplied by 0 is finite",
)


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _any(where: Any) -> bool:
    return bool(np.any(where))


def _of_elements(where: Any) -> str:
    return f", {int(where.sum()):,} of {where.size:,} elements" if isinstance(where, np.ndarray) else ""


def _trains(m: Any, shape: tuple[int, ...]) -> bool | np.ndarray:
    """Whether a leaf of a canonical mask trains its leaf, or which elements."""
    if isinstance(m, bool | float):
        return bool(m)
    where = np.broadcast_to(np.asarray(masks.chosen(m)) if hasattr(m, "indices") else np.asarray(m) != 0, shape)
    return True if where.all() else where if where.any() else False


def _where_zero(leaf: Any) -> Any:
    """Where an array is 0: True for everywhere, False for nowhere, or a bool array."""
    array = np.asarray(leaf)
    if array.size > 1 and not any(array.strides):
        return bool(array.reshape(-1)[0] == 0)
    where = array == 0
    return True if where.all() else np.asarray(where) if where.any() else False
