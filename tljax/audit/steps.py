"""`audit.step` and `audit.optimizer`: what a training step does to each leaf, proved from its traced program."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, paths, plugins
from tljax.audit import (
    cotangents,
    elements,
    idle,
    layers,
    leaks,
    moves,
    multipliers,
    numbers,
    origins,
    program,
    purity,
    tracing,
)
from tljax.audit.program import CONSTANT, Piece, Value
from tljax.audit.report import GRADES, Claim, Finding, Report
from tljax.types import InputError, Mask, MaskSchedule, Params


def step(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    mask: Mask | MaskSchedule | str | Sequence[str],
    *,
    params: Callable[[Any], Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> Report:
    """What a training step does to each leaf under a mask, read from its program; the state's shapes suffice.

    `step(state, batch)` gives the new state, or a tuple that begins with it. `params` picks the parameters out of the
    state: by default its `params`, its first element, or the state itself. Modules of NNX may be the state: of
    (model, optimizer), a step is called as step(model, optimizer, batch) and changes them in place. Where the state has
    arrays, zeros of the optimizer that the step keeps 0 are taken to be 0. The mask is a tree of the parameters, or
    globs of what trains, "head/**+**/bias" or a list. A `MaskSchedule` may stand in the mask's place, where the state
    has that of `optimizer.scheduled`: what is outside its scope is frozen, and of what is inside it is decided whether
    it stays in the steps in which it is off. `loss(params, batch)` helps to tell whose
    gradient a value is. Raises InputError if the step cannot be traced, is not pure, or changes the structure of its
    state, and if the mask does not fit the parameters.

    >>> def descend(params, batch):
    ...     gradients = jax.grad(lambda params: ((batch @ params["w"] + params["b"][None]) ** 2).sum())(params)
    ...     return {"w": params["w"] - 0.1 * gradients["w"], "b": params["b"] * 0.99}
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    >>> report = step(descend, params, jnp.ones((4, 3)), {"w": True, "b": False})
    >>> [(finding.path, finding.claim, finding.verdict) for finding in report.findings]
    [('b', 'frozen', 'refuted'), ('w', 'trains', 'proved'), ('b', 'unseen', 'proved'), ('b', 'state', 'proved')]
    """
    traced = tracing.trace(step, state, batch, params)
    schedule = mask if isinstance(mask, MaskSchedule) else None
    audit = _Audit(
        traced, mask.scope if isinstance(mask, MaskSchedule) else _by_globs(traced.params, mask), _name(step)
    )
    moving: Sequence[moves.Leaf] = ()
    if schedule is not None:
        scope = {leaf.place: leaf.path for leaf in audit.leaves if leaf.trains is not False}
        moving = moves.leaves(traced, state, schedule, scope)
    audit.labels = audit.gradient_labels(loss, batch)
    report = audit.report()
    report = replace(report, findings=(*report.findings, *moves.findings(traced, moving)))
    return report if purity.is_jitted(step) else replace(report, notes=(*report.notes, _ONE_TRACE))


def optimizer(tx: optax.GradientTransformation, params: Params, mask: Mask | str | Sequence[str]) -> Report:
    """What an optimizer does to each leaf under a mask, for any gradients, after any number of steps from `tx.init`.

    `params` are arrays or their shapes; `mask` is as in `step`. Nothing is computed but what refutes a claim. Raises
    InputError if `tx` cannot be traced on these parameters, and if the mask does not fit them.

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
    audit = _Audit(traced, _by_globs(traced.params, mask), _name(tx), init=(tx.init, begun))
    return audit.report()


_ONE_TRACE = (
    "the step is not jitted as a whole, so that its Python runs in each call: what is proved is of this one trace; put "
    "jax.jit around the step, and it holds of every call"
)


def _by_globs(params: Params, mask: Any) -> Mask:
    """The mask, if it is one; else that of globs."""
    if isinstance(mask, str):
        return masks.by_glob(params, *mask.split("+"))
    is_globs = isinstance(mask, list | tuple) and mask and all(isinstance(pattern, str) for pattern in mask)
    return masks.by_glob(params, *mask) if is_globs else mask


def _name(function: Callable[..., Any]) -> str:
    update = getattr(function, "update", None)  # of an optimizer: the function that made it
    if callable(update):
        return str(getattr(update, "__qualname__", type(function).__name__)).partition(".")[0]
    return str(getattr(function, "__name__", type(function).__name__))


_TRIED = 3
"""The leaves of a kind that are tried, if the first of them shows nothing."""
_STEP = 1 << 10
"""What a counter may grow by in a step."""


class _Assumed(NamedTuple):
    """What is assumed of leaves of the state, by their places."""

    zeros: dict[int, tuple[Any, int]]
    """Where they are 0 (True or a bool array), and how surely."""
    bounds: dict[int, tuple[float, float]]
    """Between which numbers they are."""


@dataclass
class _Leaf:
    """A leaf of the parameters, and what the mask says of it."""

    path: str
    place: int
    """Among the leaves of the state."""
    trains: bool | np.ndarray
    """Whether it trains, or which of its elements do."""
    number: int
    in_model: str
    """Its path within the model, with which an optimizer's state ends its own paths."""
    is_statistic: bool
    """Whether it is a running statistic, which no optimizer trains."""
    rate: float = 1.0
    """The number by which the mask scales its update; 1.0 for True, and for numbers of elements."""

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
        able, model = paths.trainable(traced.params), layers.root(traced.paths)
        self.leaves = [
            _Leaf(
                path,
                place,
                _trains(m, self.avals[place].shape),
                number,
                layers.in_model(traced.paths[place], path, model),
                not able[number] and jax.dtypes.issubdtype(self.avals[place].dtype, np.inexact),
                m if isinstance(m, float) else 1.0,
            )
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
        self.roles: dict[tuple[int, ...], cotangents.Cotangent] = {}
        self.without_finite: program.Reading | None = None
        self.shown_leaks: dict[int, leaks.Disturbed] | None = None
        self.no_leak = ""
        """Why no run shows a leak."""
        self.computed_from: dict[tuple[int, ...], frozenset[int]] = {}
        self.begun: dict[int, Any] = {}
        """The leaves of the state that are no parameters, as far as it is known how they begin."""

    def _owner(self, place: int) -> _Leaf | None:
        """The parameter whose path ends the path of a leaf of the state, if there is one: the longest."""
        path = self.traced.paths[place]
        owners = [leaf for leaf in self.leaves if path.endswith("/" + leaf.in_model)]
        return max(owners, key=lambda leaf: layers.shared_end(path, leaf.path), default=None)

    # Reading.

    def gradient_labels(
        self, loss: Callable[..., Any] | None = None, batch: Any = None
    ) -> dict[tuple[int, ...], program.Label]:
        """The labels of the places where the program reads a gradient of parameters; by a loss where it is given."""
        by_path = {leaf.path: leaf for leaf in self.leaves}
        places = {leaf.place: leaf.path for leaf in self.leaves}
        self.roles = cotangents.cotangents(self.traced.closed, places)
        if loss is not None and not all(role.assigned for role in self.roles.values()):
            self.roles = self._by_loss(loss, batch)
        return {
            place: self._label([by_path[path] for path in role.leaves], role.assigned)
            for place, role in self.roles.items()
        }

    def _by_loss(self, loss: Callable[..., Any], batch: Any) -> dict[tuple[int, ...], cotangents.Cotangent]:
        """Whose gradient a value is, by the gradients of a loss on numbers, where nothing else decides it."""
        if not numbers.fits(self.traced.closed):
            self.notes.append("the loss is not run: the state and the batch are too large")
            return self.roles
        inputs = numbers.sample(self.traced.leaves, self.traced.positions, self.size, everything=True)
        batch_inputs = iter(inputs[self.size :])
        is_number = (bool, int, float, complex)
        batch_leaves = [
            next(batch_inputs) if hasattr(leaf, "dtype") or isinstance(leaf, is_number) else leaf
            for leaf in jax.tree.leaves(batch)
        ]
        params = jax.tree.unflatten(
            jax.tree.structure(self.traced.params), [inputs[place] for place in self.traced.positions]
        )
        try:
            gradients = jax.jit(jax.grad(loss))(params, jax.tree.unflatten(jax.tree.structure(batch), batch_leaves))
            by_path = {
                leaf.path: gradient for leaf, gradient in zip(self.leaves, jax.tree.leaves(gradients), strict=True)
            }
            return cotangents.by_value(self.traced.closed, self.roles, inputs, by_path)
        except Exception as error:  # of a stranger's loss
            self.notes.append(f"`loss` does not tell gradients apart: {plugins.describe(error)[:200]}")
            return self.roles

    def _label(self, leaves: Sequence[_Leaf], assigned: bool) -> program.Label:
        if not assigned:
            return program.Label(sum(self.perhaps[leaf.number] for leaf in leaves))
        if any(leaf.trains is True for leaf in leaves):  # what a trained leaf shares is its own gradient
            leaves = [leaf for leaf in leaves if leaf.trains is True]
        if len(leaves) == 1 and leaves[0].partly:
            return program.Label(
                self.gradient[leaves[0].number][0], leaves[0].frozen, self.gradient[leaves[0].number][1]
            )
        bits = 0
        for leaf in leaves:
            trained, frozen = self.gradient[leaf.number]
            bits |= trained | frozen if leaf.partly else trained if leaf.trains is True else frozen
        return program.Label(bits)

    def inputs(self, assumed: "_Assumed") -> list[Value]:
        """The values of the inputs, where this is assumed of leaves of the state."""
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
            if place in assumed.bounds:
                value = program.bounded(value, *assumed.bounds[place])
            if place in assumed.zeros:
                where, grade = assumed.zeros[place]
                value = program.zeros(value, where, aval.dtype, grade)
            values.append(value)
        return values

    def read(self, assumed: "_Assumed", cut: tuple[str, ...] = ()) -> program.Reading:
        """Read the program; the labels of gradients do not pass the primitives in `cut`."""
        names = [*self.traced.paths, *("" for _ in self.avals[self.size :])]
        watched = self._gradients() | sum(self.perhaps.values())
        for place, owner in [*self.owner.items(), *self.by_place.items()]:
            if owner is not None and owner.partly:  # moments of elements that train stay apart from those that do not
                watched |= 3 << (2 * place)
        return program.read(
            self.traced.closed, self.inputs(assumed), names=names, labels=self.labels, watched=watched, cut=cut
        )

    def invariant(self, assumed: "_Assumed", wanted: Sequence[int] = ()) -> tuple[program.Reading, "_Assumed"]:
        """The reading under all that the step keeps, of what holds of the state with which it begins.

        Assume all, drop what the step does not give again, and repeat (Flanagan and Leino 2001, "Houdini"). If zeros
        are `wanted` of some leaves, nothing more is asked once none of them is kept.
        """
        while True:
            reading = self.read(assumed)
            kept = _Assumed({}, {})
            for place, (where, grade) in assumed.zeros.items():
                holds = self._still_zero(reading.outputs[place], where, self.avals[place].shape)
                if holds[0] is not False:
                    kept.zeros[place] = (holds[0], max(grade, holds[1]))
            for place, bounds in assumed.bounds.items():
                if self._still_within(reading.outputs[place], place, bounds):
                    kept.bounds[place] = bounds
            if kept.bounds == assumed.bounds and all(
                place in kept.zeros and kept.zeros[place][1] == grade and np.array_equal(kept.zeros[place][0], where)
                for place, (where, grade) in assumed.zeros.items()
            ):
                return reading, assumed
            assumed = kept
            if wanted and not any(place in kept.zeros for place in wanted):
                return reading, assumed

    def _still_zero(self, value: Value, where: Any, shape: Sequence[int]) -> tuple[Any, int]:
        """Where the elements that `where` chooses are 0 in the next state, and how surely."""
        still = [n for n, piece in enumerate(value.pieces) if program.is_zero(piece) and not piece.condition]
        grade = max([value.pieces[number].grade for number in still], default=0)
        if value.selector is None:
            return (where if still else False), grade
        holds = np.isin(value.selector, still) & np.broadcast_to(where, tuple(shape))
        return (True if holds.all() else holds if holds.any() else False), grade

    def _still_within(self, value: Value, place: int, bounds: tuple[float, float]) -> bool:
        """Whether a number of the next state is between the bounds, or above them by no more than a counter's step."""
        if all(piece.content == place and not piece.condition for piece in value.pieces):
            return True
        extent = program.extent(value)
        step = _STEP if jax.dtypes.issubdtype(self.avals[place].dtype, np.integer) else 0
        return extent is not None and bounds[0] <= extent[0] and extent[1] <= bounds[1] + step

    def assumptions(self) -> "_Assumed":
        """What holds of the state that is given, of what is no parameter: zeros, and counters that are not negative.

        A counter is taken to stay below 2^30, which it does for a million steps.
        """
        assumed = _Assumed({}, {})
        if self.init is not None:
            closed = self.init[1]
            params = [program.whole(number, 0) for number in range(len(self.leaves))]
            state = [place for place in range(self.size) if place not in self.by_place]
            begun: list[Any] = [
                value.pieces[0].constant
                if all(piece.content == CONSTANT and not piece.grade for piece in value.pieces)
                else None
                for value in program.read(closed, params).outputs
            ]
            numbers = dict(zip(state, begun, strict=True))
        else:
            numbers = {
                place: leaf
                for place, leaf in enumerate(self.traced.leaves[: self.size])
                if place not in self.by_place and not isinstance(leaf, jax.ShapeDtypeStruct)
            }
        self.begun = numbers
        for place, leaf in numbers.items():
            dtype = self.avals[place].dtype
            if leaf is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or dtype == np.bool_:
                continue
            if self.avals[place].size and (where := _where_zero(leaf)) is not False:
                assumed.zeros[place] = (where, program.EQUAL)
            if self.avals[place].size == 1 and not jax.dtypes.issubdtype(dtype, np.complexfloating):
                number = float(np.asarray(leaf).reshape(()))
                if jax.dtypes.issubdtype(dtype, np.integer) and 0 <= number < 1 << 20 and jnp.iinfo(dtype).bits >= 32:
                    assumed.bounds[place] = (0.0, float(1 << 30))
                elif jax.dtypes.issubdtype(dtype, np.floating) and math.isfinite(number):
                    assumed.bounds[place] = (min(number, 0.0) - 1, max(number, 0.0) + 1)
        return assumed

    def zero_for_good(self) -> list[_Leaf]:
        """The leaves that train, are 0 in the state that is given, and are kept 0 by every step."""
        arrays = {leaf.place: self.traced.leaves[leaf.place] for leaf in self.leaves if leaf.trains is True}
        zeros = [
            place
            for place, array in arrays.items()
            if self.init is None
            and not isinstance(array, jax.ShapeDtypeStruct)
            and jax.dtypes.issubdtype(self.avals[place].dtype, np.inexact)
            and self.avals[place].size
            and _where_zero(array) is True
        ]
        if not zeros:
            return []
        assumed = self.assumptions()
        assumed.zeros.update({place: (True, program.EQUAL) for place in zeros})
        _, kept = self.invariant(assumed, zeros)
        return [self.by_place[place] for place in zeros if place in kept.zeros and kept.zeros[place][0] is True]

    # Deciding.

    def report(self) -> Report:
        try:
            reading, assumed = self.invariant(self.assumptions())
        except program.Stop as stop:
            claims: list[tuple[_Leaf, Claim]] = [(leaf, "trains") for leaf in self.leaves if leaf.trains is not False]
            claims += [(leaf, "frozen") for leaf in self.leaves if _any(leaf.frozen)]
            undecided = [Finding(leaf.path, claim, "not decided", str(stop)) for leaf, claim in claims]
            return Report(self.subject, tuple(undecided), (*self.notes, str(stop)))
        self.reading, self.assumed = reading, assumed
        self.notes += reading.notes
        self.reach = self._reach()
        self.followed = self._followed()
        self.unexplained = self._unexplained()
        self.stuck = self.zero_for_good()
        findings = []
        tracked, drifting = self._tracked(), self._drifting()
        claimed = [leaf for leaf in self.leaves if leaf.place not in {other.place for other in tracked}]
        moved: dict[int, Any] = {}
        for leaf in claimed:
            if _any(leaf.frozen) and self._worst(leaf) is not None:
                moved[leaf.place] = leaf.frozen
        shown = self._shown(moved, drifting)
        for leaf in claimed:
            if leaf.trains is not False:
                findings.append(self.trains(leaf))
            if _any(leaf.frozen):
                findings.append(self.frozen(leaf, shown.get(leaf.place)))
        findings += [self.unseen(leaf) for leaf in claimed if _any(leaf.frozen)]
        findings += [self.state(leaf) for leaf in claimed if leaf.trains is False]
        findings += self.rates()
        if self.init is None:
            findings += self.idle()
        if tracked:
            names = paths.some([leaf.path for leaf in tracked])
            self.notes.append(f"nothing is claimed of running statistics that follow a layer which trains: {names}")
        if drifting:
            self.notes.append(self._drift(drifting, shown))
        return Report(
            self.subject,
            tuple(findings),
            tuple(dict.fromkeys(self.notes)),
            tuple(self.traced.paths[place] for place in drifting),
        )

    def _tracked(self) -> list[_Leaf]:
        """The running statistics that a mask freezes, as every mask does, and that move beside something that trains:
        they follow it, as is right."""
        trains = self._parameters()
        return [
            leaf
            for leaf in self.leaves
            if leaf.is_statistic
            and leaf.trains is False
            and any(trains[other] for other in layers.beside(leaf.in_model, trains))
            and self._worst(leaf) is not None
        ]

    def _parameters(self) -> dict[str, bool]:
        """For the path in the model of each parameter that is no statistic, whether any of it trains."""
        return {leaf.in_model: leaf.trains is not False for leaf in self.leaves if not leaf.is_statistic}

    def _drifting(self) -> dict[int, str]:
        """{place in the state: layer} of arrays, beside the parameters, that may move though their layer is frozen.

        These are of the model: no optimizer state of a leaf, and no scalars, which are rates and counters.
        """
        trains, rows = self._parameters(), dict[int, str]()
        for place, owner in self.owner.items() if self.init is None else ():
            aval = self.avals[place]
            if owner is not None or not aval.shape or not jax.dtypes.issubdtype(aval.dtype, np.inexact):
                continue
            path = layers.from_the_model(self.traced.paths[place], trains)
            held = layers.beside(path, trains) if path is not None else []
            if path is None or not held or any(trains[other] for other in held) or self._stays(place):
                continue
            rows[place] = layers.shared_start([path, *held])
        return rows

    def _stays(self, place: int) -> bool:
        """Whether all elements of a leaf of the state are what they were."""
        value, zeros = self.reading.outputs[place], self.assumed.zeros.get(place, (False, 0))[0]
        for number, piece in self.pieces(place, True):
            where = None if value.selector is None else value.selector == number
            is_kept_zero = program.is_zero(piece) and bool(np.all(zeros if where is None else zeros | ~where))
            if piece.condition or not (is_kept_zero or (piece.content == place and program.in_order(piece, where))):
                return False
        return True

    def _drift(self, drifting: Mapping[int, str], shown: Mapping[int, numbers.Shown]) -> str:
        """The note on what moves beside frozen parameters."""
        move = [place for place in drifting if place in shown]
        rows = move or list(drifting)
        names = paths.some([self.traced.paths[place] for place in rows])
        layer = paths.some(list(dict.fromkeys(drifting[place] for place in rows)))
        by = f" ({shown[rows[0]]})" if move else ""
        return (
            f"{names} {'move' if move else 'may move'}{by}, though all parameters of {layer} are frozen: they are no "
            "parameters, so that the mask claims nothing of them; `params=` makes it a claim, as tljax/audit/README.md "
            "shows"
        )

    def _shown(self, moved: Mapping[int, Any], drifting: Iterable[int] = ()) -> dict[int, numbers.Shown]:
        """Where leaves of the parameters (`moved`), and others, show that they change."""
        if moved and not numbers.fits(self.traced.closed):
            self.notes.append("the step is not run, since it is too large: what moves a leaf is, leaf by leaf")
            return self._shown_of_elements(moved)
        moved = {**moved, **dict.fromkeys(drifting, True)}
        if not moved or not numbers.fits(self.traced.closed):
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

    def _shown_of_elements(self, moved: Mapping[int, Any]) -> dict[int, numbers.Shown]:
        """Where a few elements show that they change: of one leaf of each kind, which the others of its kind cite."""
        step = elements.Step(self.traced.closed, self.traced.leaves, self.size, self.by_place, self.labels, {})
        kinds: dict[Any, list[int]] = {}
        for place in moved:
            kinds.setdefault(self._kind(place), []).append(place)
        rows: dict[int, numbers.Shown] = {}
        for places in kinds.values():
            for place in places[:_TRIED]:
                shown = elements.change(step, place, moved[place])
                if shown is not None:
                    cited = shown._replace(like=self.by_place[place].path)
                    rows |= {**dict.fromkeys(places, cited), place: shown}
                    break
        return rows

    def _kind(self, place: int) -> tuple[Any, ...]:
        """What the new values of leaves share that are computed alike: the shape, the operation and its line, and on
        what they depend of their own and besides."""
        leaf, aval = self.by_place[place], self.avals[place]
        piece = self._worst(leaf)
        assert piece is not None
        own_bits = [1 << (2 * place), 2 << (2 * place), *self.gradient[leaf.number], self.perhaps[leaf.number]]
        rest = piece.depends & ~(self._gradients() | sum(self.perhaps.values()))
        for other, owner in [*self.owner.items(), *self.by_place.items()]:
            if owner is not None:  # what leaves own is told by whose it is
                rest &= ~(3 << (2 * other))
                if owner is leaf and other != place:
                    own_bits.append(3 << (2 * other))
        name = piece.equation.primitive.name if piece.equation is not None else place
        mine = tuple(bool(piece.depends & bits) for bits in own_bits)
        alone = place if leaf.partly else None  # its elements are its own
        return aval.shape, aval.dtype, name, program.line_of(piece.equation), mine, rest, alone

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
        if not self.avals[leaf.place].size:
            return None
        for number, piece in self.pieces(leaf.place, leaf.frozen):
            if not self.keeps(leaf, number, piece):
                return piece
        return None

    def frozen(self, leaf: _Leaf, shown: numbers.Shown | None) -> Finding:
        """The finding on whether the frozen elements of a leaf keep their values."""
        worst = self._worst(leaf)
        if worst is None:
            pieces = [piece for _, piece in self.pieces(leaf.place, leaf.frozen)]
            grade = max(piece.grade for piece in pieces) if self.avals[leaf.place].size else program.IDENTICAL
            condition = frozenset().union(*(piece.condition for piece in pieces))
            return Finding(
                leaf.path,
                "frozen",
                "proved",
                (_KEPT[grade] if self.avals[leaf.place].size else "it has no elements")
                + _share_of_elements(leaf.frozen),
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
        if chosen := origins.chosen_by(self.traced.closed, leaf.place, set(self.owner)):
            names = paths.some([self.traced.paths[place] for place in chosen])
            return (
                f"; {names} selects its new value, and no numbers show that it moves: audit each phase by a step and a "
                "mask of its own, or freeze by a MaskSchedule"
            )
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
        return f"{operation} gives a value that {self.depends(leaf, piece)}"

    def depends(self, leaf: _Leaf, piece: Piece) -> str:
        """What a new value depends on, in words."""
        bits = piece.depends
        mine = self.gradient[leaf.number]
        names = []
        if bits >> (2 * leaf.place) & 3:
            names.append("itself")
        if bits & (mine[0] | mine[1]):
            names.append("its gradient")
        states = [place for place, owner in self.owner.items() if bits >> (2 * place) & 3]
        leaf_states = [place for place in states if self.owner[place] is leaf]
        others = [self.traced.paths[place] for place in states if place not in leaf_states]
        if leaf_states:
            names.append(f"its optimizer state ({paths.some([self.traced.paths[place] for place in leaf_states], 2)})")
        if others and len(names) < 2:
            names.append(paths.some(others, 2))
        if bits & self.batch and not bits & (mine[0] | mine[1]):
            names.append("the batch")
        if not names:
            return "depends on nothing of the state"
        alone = "" if names != ["itself"] else " alone, as decay does" if piece.scaled == leaf.place else " alone"
        return f"depends on {', '.join(names)}{alone}"

    def _reach(self) -> dict[int, int]:
        """For each label of a leaf of the state that is no parameter: the gradients and batches that it follows."""
        wanted = self.batch | self._gradients() | sum(self.perhaps.values())
        depends: dict[int, int] = {}
        for place, owner in self.owner.items():
            value = self.reading.outputs[place]
            for part, label in enumerate((2 * place, 2 * place + 1)):
                depends[label] = value.depends
                if owner is None or not owner.partly or value.selector is None:
                    continue
                if owner.frozen.shape == value.selector.shape:
                    depends[label] = 0
                    for _, piece in self.pieces(place, owner.frozen if part else ~owner.frozen):
                        depends[label] |= piece.depends
        reach = {label: bits & wanted for label, bits in depends.items()}
        changed = True
        while changed:
            changed = False
            for label, before in list(reach.items()):
                reach[label] = before | self._through(depends[label], reach)
                changed = changed or reach[label] != before
        return reach

    def _through(self, bits: int, reach: Mapping[int, int]) -> int:
        """The gradients and batches on which what depends on `bits` depends through the state."""
        result = 0
        for label, reached in reach.items():
            if bits >> label & 1:
                result |= reached
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
        if not dead and leaf in self.stuck:
            others = [other.path for other in self.stuck if other is not leaf]
            beside = f", as {paths.some(others, 2)} {'does' if len(others) == 1 else 'do'}" if others else ""
            detail = f"it is 0 in the state that was given, and stays 0 in every step{beside}"
            return Finding(leaf.path, "trains", "refuted", detail, source=program.line_of(rows[0][1].equation))
        if not dead:
            return Finding(leaf.path, "trains", "proved", f"depends on {what}{_share_of_elements(leaf.trains)}")
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
        doubtful: dict[str, None] = {}
        for number, bits in self.followed.items():
            if bits & bit:
                return self.leak(leaf, self.leaves[number])
            if bits & perhaps:
                doubtful[self.leaves[number].path] = None
        if doubtful:
            detail = f"{paths.some(list(doubtful), 2)}: a gradient on which it depends may be that of '{leaf.path}'"
            return Finding(leaf.path, "unseen", "not decided", detail)
        if self.unexplained:
            detail = f"{paths.some(self.unexplained, 2)} follows the batch by no backward pass of JAX: its gradient is"
            return Finding(leaf.path, "unseen", "not decided", f"{detail} not told from other numbers")
        return Finding(leaf.path, "unseen", "proved", "no update of a trained leaf depends on its gradient")

    def leak(self, leaf: _Leaf, other: _Leaf) -> Finding:
        """The finding that a trained leaf depends on the gradient of a frozen one, with the operation that mixes it."""
        bit, others = self.gradient[leaf.number][1], self._gradients() & ~self.gradient[leaf.number][1]
        through = [place for place in range(self.size) if self.reading.outputs[place].depends & bit]
        outputs = (other.place, *through)
        if outputs not in self.computed_from:
            wanted = [number in outputs for number in range(self.size)]
            self.computed_from[outputs] = idle.live(self.traced.closed, wanted).equations
        mixed = leaks.mixing(self.computed_from[outputs], self.reading.meetings, bit, others)
        if self.without_finite is None:
            self.without_finite = self.read(self.assumed, cut=("is_finite",))
        what = "its gradient"
        if not any(output.depends & bit for output in self.without_finite.outputs):
            what = "whether its gradient is finite"
        by = f", by {leaks.operation(mixed)}" if mixed is not None else ", through the state"
        run = ""
        if leaf.partly or mixed is None or leaks.is_movement(mixed):  # elements may have been told apart no longer
            shown = self._shown_leaks().get(leaf.number)
            if shown is None:
                detail = f"'{other.path}' may depend on {what}{by}: {self.no_leak}"
                return Finding(leaf.path, "unseen", "not decided", detail, source=program.line_of(mixed))
            other, run = self.by_place[shown.place], f": {shown}"
            what = "its gradient" if math.isfinite(shown.disturbance) else "whether its gradient is finite"
        detail = f"'{other.path}' depends on {what}{by}{run}"
        return Finding(leaf.path, "unseen", "refuted", detail, source=program.line_of(mixed))

    def _shown_leaks(self) -> dict[int, leaks.Disturbed]:
        """For the numbers of frozen leaves, what shows that a trained leaf depends on their gradient."""
        if self.shown_leaks is not None:
            return self.shown_leaks
        self.shown_leaks, self.no_leak = {}, "no run shows that it does"
        if not numbers.fits(self.traced.closed):
            self.no_leak = "the step is not run, since it is too large"
            return {}
        followed = 0
        for bits in self.followed.values():
            followed |= bits
        suspects = [leaf.number for leaf in self.leaves if self.gradient[leaf.number][1] & followed]
        trains = {leaf.place: leaf.trains for leaf in self.leaves if leaf.trains is not False}
        frozen = {leaf.place: leaf.frozen for leaf in self.leaves if _any(leaf.frozen)}
        try:
            run, inputs = self._disturbed_step()
            rows = dict(zip(suspects, np.eye(len(self.leaves), dtype=np.float32)[suspects], strict=True))
            self.shown_leaks = leaks.shown(run, inputs, rows, self.size, trains, frozen)
        except Exception as error:  # a step that can be traced need not run: on these devices, on drawn numbers
            self.no_leak = f"the step does not run on these numbers: {plugins.describe(error)[:200]}"
        return self.shown_leaks

    def _disturbed_step(self) -> tuple[Callable[..., list[Any]], list[Any]]:
        """The step in which a number can be added to each frozen gradient, and numbers to begin with."""
        whole = {self.gradient[leaf.number][1]: leaf.number for leaf in self.leaves if leaf.trains is False}
        part = {self.gradient[leaf.number][1]: leaf.number for leaf in self.leaves if leaf.partly}
        places: dict[Any, tuple[list[int], Any]] = {}
        for place, label in self.labels.items():
            shared = [bit for bit in whole if label.depends & bit]
            if label.there in part:
                places[place] = [part[label.there]], label.where
            elif shared and label.depends == sum(shared):
                places[place] = [whole[bit] for bit in shared], True
        frozen_inputs: dict[Any, tuple[list[int], Any]] = {}
        if self.init is not None:
            frozen_inputs = {
                self.size + leaf.number: ([leaf.number], leaf.frozen) for leaf in self.leaves if _any(leaf.frozen)
            }
        inputs = numbers.sample(self.traced.leaves, self.traced.positions, self.size, everything=True)
        self._begin(inputs)
        return leaks.disturbed_step(self.traced.closed, places, frozen_inputs), inputs

    def _gradients(self) -> int:
        """The labels of all gradients."""
        bits = 0
        for trained, frozen in self.gradient.values():
            bits |= trained | frozen
        return bits

    def _unexplained(self) -> list[str]:
        """The leaves that train by the batch and by no gradient that is known as one.

        Running statistics are none of them: the forward pass gives their values.
        """
        if self.init is not None:
            return []
        known = self._gradients() | sum(self.perhaps.values())
        return [
            self.leaves[number].path
            for number, bits in self.followed.items()
            if bits & self.batch and not bits & known and not self.leaves[number].is_statistic
        ]

    def _followed(self) -> dict[int, int]:
        """For the number of each leaf that trains, the labels that its new value depends on, also through the state."""
        followed = {}
        for leaf in self.leaves:
            if leaf.trains is not False:
                bits = 0
                for _, piece in self.pieces(leaf.place, leaf.trains):
                    bits |= piece.depends
                followed[leaf.number] = bits | self._through(bits, self.reach)
        return followed

    def rates(self) -> list[Finding]:
        """The findings on whether leaves move by the numbers of the mask, where it has numbers."""
        moving = [
            multipliers.Leaf(leaf.path, leaf.place, leaf.rate)
            for leaf in self.leaves
            if leaf.trains is True and leaf.rate and not leaf.is_statistic
        ]
        if all(leaf.rate == 1 for leaf in moving):
            return []
        gradients = {place for place, role in self.roles.items() if role.assigned}
        names: list[tuple[Any, bool]] = []
        for place in range(len(self.avals)):
            if place in self.by_place:
                names.append(("value", False))
            elif place >= self.size:
                names.append((("batch", place), False) if self.init is None else ("gradient", True))
            else:
                names.append(self._name_of_state(place))
        return multipliers.findings(self.traced.closed, gradients, names, moving, self._filled)

    def _name_of_state(self, place: int) -> tuple[Any, bool]:
        """What a leaf of the state is, in words that it shares with those of other leaves and groups of leaves.

        A number of the state is the same as another if both begin as the same number.
        """
        path, owner = self.traced.paths[place], self.owner[place]
        kind = (path.removesuffix(f"/{owner.in_model}") if owner else path).rpartition("/inner_state/")[2]
        if owner is not None:
            return ("state", kind), True
        leaf = self.begun.get(place)
        if leaf is None or jax.dtypes.issubdtype(self.avals[place].dtype, jax.dtypes.extended):
            return ("state", path), False
        if place in self.kept() and np.ndim(leaf) == 0:
            return np.asarray(leaf)[()], False
        return ("state", kind, np.asarray(leaf).tobytes()), False

    def _filled(self, value: float) -> list[Any]:
        """Numbers for the inputs, with this value for all parameters, and 0 for what is not known of the rest."""
        inputs = numbers.sample(self.traced.leaves, self.traced.positions, self.size, everything=False)
        for place in self.by_place:
            inputs[place] = jnp.full(self.avals[place].shape, value, self.avals[place].dtype)
        self._begin(inputs)
        return inputs

    def _begin(self, inputs: list[Any]) -> None:
        """Put the state of an optimizer that is audited by itself into inputs, as it begins with their parameters."""
        if self.init is None:
            return
        begun = iter(self._begun([inputs[place] for place in self.traced.positions]))
        inputs[: self.size] = [inputs[place] if place in self.by_place else next(begun) for place in range(self.size)]

    def kept(self) -> list[int]:
        """The places of the leaves of the state that every step gives back as they are."""
        return [
            place
            for place, output in enumerate(self.reading.outputs)
            if output.selector is None
            and output.pieces[0].content == place
            and output.pieces[0].grade == program.IDENTICAL
            and not output.pieces[0].condition
            and program.in_order(output.pieces[0])
        ]

    def idle(self) -> list[Finding]:
        """The findings on what a step computes for nobody."""
        reaching = 0
        for output in self.reading.outputs:
            reaching |= output.depends
        unused = {
            leaf.path
            for leaf in self.leaves
            if leaf.trains is False and not reaching & (self.gradient[leaf.number][1] | self.perhaps[leaf.number])
        }
        unread = [place for place, role in self.roles.items() if set(role.leaves) <= unused]
        costly = sorted({path for place in unread for path in self.roles[place].leaves})
        return idle.findings(
            self.traced.whole, self.size, self.traced.paths, self.kept(), set(self.traced.positions), unread, costly
        )

    def state(self, leaf: _Leaf) -> Finding:
        """The finding on what a frozen leaf owns of the state."""
        places = [place for place, owner in self.owner.items() if owner is leaf and self.avals[place].size > 1]
        if not places:
            return Finding(leaf.path, "state", "proved", "0 bytes")
        size = sum(math.prod(self.avals[place].shape) * self.avals[place].dtype.itemsize for place in places)
        detail = (
            f"costs {size:,} bytes, and moves nothing: {paths.some([self.traced.paths[place] for place in places], 2)}"
        )
        return Finding(leaf.path, "state", "refuted", detail)


_KEPT = (
    "its new value is its old one",
    "its new value is its old one after an operation with a neutral number (a compiler may flush subnormals to 0)",
    "its new value is its old one, if what is multiplied by 0 is finite",
)


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _any(where: Any) -> bool:
    return bool(np.any(where))


def _share_of_elements(where: Any) -> str:
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
