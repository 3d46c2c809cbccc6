"""Training: one compiled segment, and `fit`, which runs a group of trials through it.

A group is trials that share everything that decides compilation. State and numbers carry a leading axis of trials;
`lax.map` runs one after another, so that a trial has the same bits in any group.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, models, objective, optimizer, paths
from tljax.types import InputError, Mask, Model, Params


@dataclass(frozen=True)
class Program:
    """All that decides what is compiled: equal records share one executable. Hashable."""

    model: Model
    loss: objective.Loss
    penalties: tuple[objective.Penalty, ...]
    optimizer: optimizer.Spec
    mask: tuple[Any, ...]
    """The structure of the parameters, then for each leaf True, False, or None for a number or array to come."""
    merge: Callable[[Params], Params] | None = None
    """Adapted parameters -> ordinary ones, before the model is applied."""


class Trial(NamedTuple):
    """One fit of a group: what is passed to the compiled function, not compiled into it."""

    params: Params
    mask: Mask
    order: Callable[[int, int], np.ndarray]
    """(start, stop) -> int32 [stop - start, batch]: the examples of those steps, -1 for padding."""
    rates: np.ndarray
    """float32 [steps]: the learning rate of each step."""
    weights: tuple[float, ...]
    """lambda of each penalty."""
    numbers: Mapping[str, float]
    """The optimizer's numbers by name."""
    key: jax.Array
    """The key of dropout."""


class State(NamedTuple):
    """A group between two steps; leading axis of trials."""

    step: int
    params: Params
    optimizer: optax.OptState


class Log(NamedTuple):
    """What happened in a segment: float32 [trials, steps] each."""

    loss: Any
    """Mean L of the step's batch, in nats for a cross-entropy."""
    penalty: Any
    """lambda R at the step's start."""
    gradient_norm: Any
    """Global norm of the objective's gradient over the trained leaves."""


def program(
    model: Model,
    params: Params,
    mask: Mask,
    *,
    loss: objective.Loss,
    penalties: tuple[objective.Penalty, ...] = (),
    optimizer: optimizer.Spec,
    merge: Callable[[Params], Params] | None = None,
) -> Program:
    """The Program of fits of `params` under `mask`; raises InputError for a penalty that covers no leaf."""
    for term in penalties:
        paths.require_globs(params, (term.on,))
    trained = jax.tree.leaves(masks.static(params, mask))
    kinds = (_kind(m) if t else False for m, t in zip(jax.tree.leaves(mask), trained, strict=True))
    return Program(model, loss, penalties, optimizer, (jax.tree.structure(mask), *kinds), merge)


def _kind(m: Any) -> bool | None:
    """True for a leaf that trains in full: 1.0 compiles to the same as True, bit for bit. None for a traced one."""
    return True if isinstance(m, bool | int | float | np.bool_ | np.number) and m == 1 else None


def _scales(program: Program, mask: Mask) -> tuple[Any, ...]:
    kinds = program.mask[1:]
    return tuple(jnp.asarray(m) for m, kind in zip(jax.tree.leaves(mask), kinds, strict=True) if kind is None)


def _mask(program: Program, scales: tuple[Any, ...]) -> Mask:
    treedef, *kinds = program.mask
    traced = iter(scales)
    return treedef.unflatten([next(traced) if kind is None else kind for kind in kinds])


class _Numbers(NamedTuple):
    """The traced numbers of a group, leading axis of trials."""

    weights: tuple[Any, ...]
    optimizer: Mapping[str, Any]
    scales: tuple[Any, ...]
    key: Any


@functools.partial(jax.jit, static_argnames=("program",))
def _begin(program: Program, params: Params, numbers: _Numbers) -> optax.OptState:
    def one(trial: tuple[Params, _Numbers]) -> optax.OptState:
        params, numbers = trial
        tx = optimizer.build(program.optimizer, 0.0, numbers.optimizer)
        return optimizer.masked(tx, _mask(program, numbers.scales)).init(params)

    return jax.lax.map(one, (params, numbers))


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("trained", "opt_state"))
def _segment(
    program: Program,
    trained: Params,
    opt_state: optax.OptState,
    frozen: Params,
    numbers: _Numbers,
    data: tuple[jax.Array, jax.Array],
    order: jax.Array,
    rates: jax.Array,
    steps: tuple[int, int, int],
) -> tuple[Params, optax.OptState, Log]:
    """Rows `begin` to `end` of `order` [trials, rows, batch], the first of which is step `first`."""
    first, begin, end = steps

    def one(trial: Any) -> Any:
        trained, opt_state, frozen, numbers, order, rates = trial
        step = _step(program, frozen, numbers, data)
        rows = order.shape[0]
        log = Log(*(jnp.zeros(rows, jnp.float32) for _ in Log._fields))

        def body(row: jax.Array, carry: Any) -> Any:
            trained, opt_state, log = carry
            trained, opt_state, now = step(trained, opt_state, order[row], rates[row], first + row)
            return trained, opt_state, jax.tree.map(lambda curve, value: curve.at[row].set(value), log, now)

        return jax.lax.fori_loop(begin, end, body, (trained, opt_state, log))

    return jax.lax.map(one, (trained, opt_state, frozen, numbers, order, rates))


def _step(program: Program, frozen: Params, numbers: _Numbers, data: tuple[jax.Array, jax.Array]) -> Callable[..., Any]:
    """The training step of one trial: differentiates with respect to the trained leaves alone."""
    images, labels = data
    mask = _mask(program, numbers.scales)
    still = _frozen_lead(program)

    def value(trained: Params, chosen: jax.Array, step: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weight = (chosen >= 0).astype(jnp.float32)
        rows = jnp.maximum(chosen, 0)
        params = masks.join(trained, frozen)
        params = program.merge(params) if program.merge else params
        key = jax.random.fold_in(numbers.key, step)
        logits = models.apply(program.model, params, images[rows], key=key, frozen=still)
        loss = jnp.vdot(program.loss(logits, labels[rows]), weight) / weight.sum()
        penalty = objective.regularizer(program.penalties, numbers.weights, trained)
        return loss + penalty, (loss, penalty)

    def step(trained: Params, opt_state: Any, chosen: jax.Array, rate: jax.Array, number: jax.Array) -> Any:
        (_, (loss, penalty)), gradients = jax.value_and_grad(value, has_aux=True)(trained, chosen, number)
        tx = optimizer.masked(optimizer.build(program.optimizer, rate, numbers.optimizer), mask)
        updates, opt_state = tx.update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        return trained, opt_state, Log(loss, penalty, optax.tree.norm(gradients))

    return step


def _frozen_lead(program: Program) -> tuple[str, ...]:
    """The stages before the first that trains: they run as in evaluation."""
    treedef, *kinds = program.mask
    whole = treedef.unflatten([kind is not False for kind in kinds])
    names = models.names(program.model)
    trains = [any(jax.tree.leaves(whole[name])) for name in names]
    return names[: trains.index(True)]


def forward(program: Program) -> Callable[[Params, jax.Array], jax.Array]:
    """(params, images [batch, ...]) -> logits [batch, classes], as in evaluation; one object for equal models."""
    return _forward(program.model, program.merge)


@functools.lru_cache
def _forward(model: Model, merge: Callable[[Params], Params] | None) -> Callable[[Params, jax.Array], jax.Array]:
    return lambda params, images: models.apply(model, merge(params) if merge else params, images)


def capacity(batch: int) -> int:
    """Steps a compiled call can hold: a constant of the batch size, so that no length compiles anew."""
    return max(1, min(1024, 2**20 // batch))


def fit(
    program: Program,
    trials: Sequence[Trial],
    images: jax.Array,
    labels: jax.Array,
    ends: Sequence[int],
    state: State | None = None,
) -> Iterator[tuple[State, Log]]:
    """Train a group; yield its state and log at each step of `ends` (increasing, the last is the last step).

    Images uint8 or float32 [n, ...] and labels int32 [n] on the device, shared by the trials. It starts from the
    trials' parameters, or from a `state` that an earlier call gave. The caller's arrays are copied first; what is
    yielded is given up to the next segment, so take what is wanted of it before. Raises InputError where the trials
    differ in steps or batch size.
    """
    batch = trials[0].order(0, 1).shape[1]
    if any(len(t.rates) != ends[-1] or t.order(0, 1).shape[1] != batch for t in trials):
        raise InputError(f"the trials of a group need {ends[-1]} steps and batches of {batch} all: make another group")
    numbers = _Numbers(
        weights=tuple(jnp.asarray(w, jnp.float32) for w in zip(*(t.weights for t in trials), strict=True)),
        optimizer={name: jnp.asarray([t.numbers[name] for t in trials], jnp.float32) for name in trials[0].numbers},
        scales=_stack([_scales(program, trial.mask) for trial in trials]),
        key=jnp.stack([trial.key for trial in trials]),
    )
    if state is None:
        params = _stack([trial.params for trial in trials])
        state = State(0, params, _begin(program, params, numbers))
    else:
        state = jax.tree.map(jnp.copy, state._replace(step=0))._replace(step=state.step)
    static = _mask(program, tuple(True for kind in program.mask[1:] if kind is None))
    step, (trained, frozen), opt_state = int(state.step), masks.split(state.params, static), state.optimizer
    for end in ends:
        logs = []
        while step < end:
            stop = min(end, step + capacity(batch))
            order, rates = _chunk(trials, step, stop)
            trained, opt_state, log = _segment(
                program, trained, opt_state, frozen, numbers, (images, labels), order, rates, (step, 0, stop - step)
            )
            logs.append(jax.tree.map(lambda curve, n=stop - step: np.asarray(curve)[:, :n], log))
            step = stop
        if logs:
            yield State(step, masks.join(trained, frozen), opt_state), Log(*map(np.hstack, zip(*logs, strict=True)))


def _chunk(trials: Sequence[Trial], start: int, stop: int) -> tuple[jax.Array, jax.Array]:
    """The orders and rates of some steps, padded to the capacity."""
    orders = np.stack([trial.order(start, stop) for trial in trials])
    rows = capacity(orders.shape[-1])
    padded = np.full((len(trials), rows, orders.shape[-1]), -1, np.int32)
    padded[:, : stop - start] = orders
    rates = np.zeros((len(trials), rows), np.float32)
    rates[:, : stop - start] = [trial.rates[start:stop] for trial in trials]
    return jnp.asarray(padded), jnp.asarray(rates)


def _stack(trees: Sequence[Params]) -> Params:
    """A leading axis of trials; always copies, since the compiled function takes its arguments over."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
