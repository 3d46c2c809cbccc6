"""A short fit of a strategy through `train.fit`, and the FLOPs of its compiled steps."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, models, objective, optimizer, optimizers, paths, penalties, train
from tljax.audit import problems, steps
from tljax.audit.lines import copy
from tljax.audit.report import Report
from tljax.train import vectorize
from tljax.train.step import Hyper, traced_leaves, trained_leaves, transformation
from tljax.train.step import step as one_step
from tljax.types import Batch, Mask, MaskSchedule, Model, ModelState, Params, PhaseRule

STEPS = 3
"""Steps of a phase."""
RATE = 0.05
"""The learning rate of each step."""
DECAY = 0.5
"""The decay of AdamW: a step takes RATE x DECAY of a leaf away, whatever its gradient is."""

# A large eps keeps rounding small where a gradient is next to nothing.
_SPEC, NUMBERS = optimizers.spec("adamw:eps=1e-3", weight_decay=DECAY, clip=0.5)
_TERMS, _WEIGHTS = penalties.read("l2:weight=0.1")


class Fitted(NamedTuple):
    """The outcome of a fit."""

    params: tuple[Params, ...]
    """The parameters at the start, and at the end of each phase."""
    masks: tuple[Mask, ...]
    """The mask of each phase; of one whose mask moves its scope."""
    phases: tuple[Mask | MaskSchedule, ...]
    """The masks, and the schedules in their place."""
    still: frozenset[str]
    """The paths of the leaves that were off in all steps, where one schedule was all of it."""
    programs: tuple[train.Spec, ...]
    """The spec of each phase."""
    compiled: int
    """The number of executables that the fit added."""


def program(model: Model, merge: Callable[[Params], Params] | None) -> train.Spec:
    """The spec of a fit by AdamW with decay, clipping and L2, without a mask."""
    return train.Spec(model, objective.loss(problems.LOSS), _SPEC, _TERMS, False, merge)


def fit(
    wanted: train.Spec,
    params: Params,
    phases: Sequence[Any],
    data: train.Data,
    steps: int = STEPS,
    model_state: ModelState | None = None,
) -> Fitted:
    """Train each phase (a mask, a function of the parameters, or a schedule) for so many steps: the first, and then the
    rest."""
    trial = _trial(params, phases, steps, model_state)
    ends = [steps * i + more for i in range(len(phases)) for more in sorted({1, steps})]
    before = _executables()
    seen, still = [copy(params)], frozenset[str]()
    for state, _ in train.fit(wanted, [trial], data, ends):
        if state.step % steps == 0:
            seen.append(jax.tree.map(lambda leaf: np.array(leaf[0]), state.params))
    if len(phases) == 1 and isinstance(state.optimizer, optimizer.Scheduled):
        still = frozenset(path for path, count in paths.items(state.optimizer.trained) if not np.any(count))
    history = state.masks[0]
    programs = tuple(train.specialize(wanted, trial, history[: i + 1]) for i in range(len(history)))
    as_trained = zip(phases, history, strict=True)
    kept = tuple(phase if isinstance(phase, MaskSchedule) else mask for phase, mask in as_trained)
    return Fitted(tuple(seen), history, kept, still, programs, _executables() - before)


def states(
    wanted: train.Spec,
    params: Params,
    schedule: MaskSchedule,
    data: train.Data,
    steps: int,
    model_state: ModelState | None = None,
) -> Iterator[train.State]:
    """The state after each of so many steps under a schedule."""
    trial = _trial(params, [schedule], steps, model_state)
    return (state for state, _ in train.fit(wanted, [trial], data, list(range(1, steps + 1))))


def under(wanted: train.Spec, params: Params, mask: Mask, model_state: ModelState | None = None) -> train.Spec:
    """The spec of a fit whose only mask is `mask`."""
    return train.specialize(wanted, _trial(params, [mask], 1, model_state), (mask,))


def read(fitted: Fitted, phase: int, shape: tuple[int, ...], model_state: ModelState | None = None) -> Report:
    """The audit of the training step of a phase, for images of this shape: it holds for all parameters, batches, rates,
    keys and numbers of the optimizer."""
    spec, mask = fitted.programs[phase], fitted.masks[phase]
    params = fitted.params[0]
    trial = _trial(params, fitted.phases, STEPS, model_state)
    stacked = vectorize.stack_hyper(spec, [trial], [fitted.masks[: phase + 1]])
    hyper = jax.tree.map(lambda leaf: leaf[0], stacked)
    trains = trained_leaves(spec)

    def step(state: Any, inputs: Any) -> Any:
        params, opt_state, model_state = state
        batch, rate, number, traced_fields = inputs
        trained, frozen = masks.split(params, trains)
        fit_hyper = hyper._replace(weights=traced_fields[0], numbers=traced_fields[1], key=traced_fields[2])
        trained, opt_state, _, model_state, log = one_step(
            spec, fit_hyper, trained, frozen, opt_state, batch, rate, number, None, None, model_state
        )
        return (masks.join(trained, frozen), opt_state, model_state), log

    rate, number = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(lambda tree, rate: transformation(spec, hyper, rate).init(tree), shapes, rate)
    shapes_of_batch = (
        ((problems.BATCH, *shape), jnp.uint8),
        ((problems.BATCH,), jnp.int32),
        ((problems.BATCH,), jnp.float32),
    )
    specs: Any = [jax.ShapeDtypeStruct(*pair) for pair in shapes_of_batch]
    batch = Batch(*specs)
    state_shapes = jax.eval_shape(lambda: model_state or {})
    inputs = (batch, rate, number, (hyper.weights, hyper.numbers, hyper.key))
    return steps.step(step, (shapes, state, state_shapes), inputs, mask, params=lambda state: state[0])


def _trial(params: Params, phases: Sequence[Any], steps: int, model_state: ModelState | None) -> train.Fit:
    total = steps * len(phases)
    schedules = [phase if isinstance(phase, MaskSchedule) else None for phase in phases]
    scopes = [phase.scope if isinstance(phase, MaskSchedule) else phase for phase in phases]
    rules = tuple(PhaseRule(schedule=schedule) for schedule in schedules) if any(schedules) else ()
    order = np.arange(total * problems.BATCH, dtype=np.int32).reshape(total, problems.BATCH) % problems.EXAMPLES
    return train.Fit(
        params,
        tuple((steps * i, scope) for i, scope in enumerate(scopes)),
        lambda start, stop: order[start:stop],
        np.full(total, RATE, np.float32),
        _WEIGHTS,
        {**NUMBERS, "label_smoothing": 0.0},
        jax.random.key(0),
        model_state=model_state or {},
        rules=rules,
    )


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Compile without XLA's optimisations, which do not pay for operations that run once."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _executables() -> int:
    """The number of executables in the cache of the compiled training function."""
    size: Any = vectorize.segment
    return size._cache_size()


def flops(
    wanted: train.Spec, params: Params, mask: Mask, shape: tuple[int, ...], model_state: ModelState | None = None
) -> float:
    """The FLOPs of a compiled training step under a mask, as XLA counts them (the body of a loop once).

    If `fit` ran the phase, this is the executable that it ran; of a model with loops over stages, one without.
    """
    wanted = replace(wanted, model=models.unrolled(wanted.model))
    traced = traced_leaves(wanted, _trial(params, [mask], 1, model_state), (mask,))
    leaves, structure = jax.tree.flatten(model_state or {})
    state = structure, _stacked_shapes(leaves)
    return _flops(wanted, _stacked_shapes(jax.tree.leaves(params)), _stacked_shapes(traced), shape, state)


def _stacked_shapes(leaves: Sequence[Any]) -> Any:
    """The shapes of these leaves as `fit` passes them: with a leading axis of trials."""
    return jax.eval_shape(lambda: jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)]), tuple(leaves)))


@functools.lru_cache(maxsize=256)
def _flops(
    wanted: train.Spec,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    scales: tuple[Any, ...],
    shape: tuple[int, ...],
    model_state: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]],
) -> float:
    number = jax.ShapeDtypeStruct((1,), jnp.float32)
    hyper = Hyper(
        weights=tuple(dict.fromkeys(weights, number) for weights in _WEIGHTS),
        numbers=dict.fromkeys((*NUMBERS, "label_smoothing"), number),
        scales=scales,
        key=jax.eval_shape(lambda: jax.random.key(0)[None]),
        start=None,
        fisher=None,
    )
    params = jax.tree.unflatten(wanted.structure, leaves)
    trained, frozen = masks.split(params, trained_leaves(wanted))
    state = jax.eval_shape(functools.partial(vectorize.begin, wanted), params, hyper, number)
    rows = train.capacity(problems.BATCH)
    data = problems.data(shape)
    order = jax.ShapeDtypeStruct((1, rows, problems.BATCH), jnp.int32)
    rates = jax.ShapeDtypeStruct((1, rows), jnp.float32)
    lowered = vectorize.segment.lower(
        *(wanted, None, 1, "map"),
        *(trained, state, frozen, hyper, data.inputs, data.targets, order, rates, (0, 0, 1)),
        *((None, jax.tree.unflatten(*model_state)) if model_state[1] else ()),
    )
    costs: Any = lowered.compile().cost_analysis()
    return float(costs["flops"])
