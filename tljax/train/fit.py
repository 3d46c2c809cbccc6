"""`fit`: a group of trials, segment by segment and phase by phase."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import masks, named_optimizer, optimizer, paths
from tljax.train.segment import Log, Numbers, Program, begin, segment
from tljax.types import InputError, Mask, Params


class Trial(NamedTuple):
    """One fit of a group: what is passed to the compiled function, not compiled into it."""

    params: Params
    phases: tuple[tuple[int, Mask | Callable[[Params], Mask]], ...]
    """(first step, mask); the first step of the first is 0. A function is called with the parameters of its step."""
    order: Callable[[int, int], np.ndarray]
    """(start, stop) -> int32 [stop - start, batch]: the examples of those steps, -1 for padding."""
    rates: np.ndarray
    """float32 [steps]: the learning rate of each step."""
    weights: tuple[Mapping[str, float], ...]
    """The weights of each penalty."""
    numbers: Mapping[str, float]
    """The optimizer's numbers by name, and 'label_smoothing'."""
    key: jax.Array
    """The key of dropout."""
    fresh: Mask | None = None
    """Which leaves were drawn anew, for penalties."""
    fisher: Params | None = None
    """The source's Fisher information, for penalties: {path: array} or a tree."""


class State(NamedTuple):
    """A group, or a part of it, between two steps; arrays have a leading axis of trials."""

    step: int
    params: Params
    optimizer: optax.OptState
    trials: tuple[int, ...]
    """Which of the group these are: a phase whose masks differ in what is compiled parts a group."""
    masks: tuple[tuple[Mask, ...], ...]
    """For each of them the masks of the phases that have begun."""


Data = tuple[jax.Array, jax.Array]
"""Images uint8 or float32 [n, ...] and labels int32 [n], on the device."""


def fit(
    program: Program,
    trials: Sequence[Trial],
    images: jax.Array,
    labels: jax.Array,
    ends: Sequence[int],
    state: State | None = None,
) -> Iterator[tuple[State, Log]]:
    """Train a group; yield its state and log at each step of `ends` (increasing, the last is the last step).

    `program` says everything but the masks. Images uint8 or float32 [n, ...] and labels int32 [n] are on the device,
    shared by the trials. It starts from the trials' parameters, or from a `state` that an earlier call gave. A phase
    begins at a step of `ends`, and the state yielded there is the new phase's already; where the masks of a phase
    differ in what is compiled, the group parts, and each part is trained to its end in turn. The caller's arrays are
    copied first; what is yielded is given up to the next segment, so take what is wanted of it before. Raises
    InputError where the trials differ in steps, batch size or phases.
    """
    _check_group(trials, ends)
    data = (images, labels)
    if state is not None:
        params, opt_state = jax.tree.map(jnp.array, (state.params, state.optimizer))
        # A state that went through NumPy has arrays for bools and numbers; masks are to have what they had.
        plain = jax.tree.map(lambda m: m if np.ndim(m) else np.asarray(m).item(), (state.trials, state.masks))
        yield from _advance(program, trials, data, ends, State(int(state.step), params, opt_state, *plain))
        return
    everyone = [(i, (_evaluated(trial.phases[0][1], trial.params),)) for i, trial in enumerate(trials)]
    for part in _parted(program, trials, everyone):
        members = [trials[i] for i, _ in part]
        now = under(program, members[0], part[0][1])
        params = stack([trial.params for trial in members])
        histories = tuple(history for _, history in part)
        rates = jnp.asarray([trial.rates[0] for trial in members])
        opt_state = begin(now, params, _numbers(now, members, histories), rates)
        first = State(0, params, opt_state, tuple(i for i, _ in part), histories)
        yield from _advance(program, trials, data, ends, first)


def _advance(
    program: Program, trials: Sequence[Trial], data: Data, ends: Sequence[int], state: State
) -> Iterator[tuple[State, Log]]:
    """From a state to the last of `ends`; parts of a group one after another."""
    starts = {start for start, _ in trials[0].phases}
    for end in (end for end in ends if end > state.step):
        state, log = _to(end, program, trials, data, state)
        if end not in starts or end == ends[-1]:
            yield state, log
            continue
        for next_state, rows in _next_phase(program, trials, state):
            yield next_state, jax.tree.map(lambda curve, rows=rows: curve[rows], log)
            yield from _advance(program, trials, data, ends, next_state)
        return


def _to(end: int, program: Program, trials: Sequence[Trial], data: Data, state: State) -> tuple[State, Log]:
    """The state at step `end` of the same phase, and the log of the way."""
    members = [trials[i] for i in state.trials]
    now = under(program, members[0], state.masks[0])
    numbers = _numbers(now, members, state.masks)
    trained, frozen = masks.split(state.params, _static(now))
    opt_state, step, logs = state.optimizer, state.step, []
    batch = members[0].order(step, step + 1).shape[1]
    while step < end:
        stop = min(end, step + capacity(batch))
        order, rates = _chunk(members, step, stop)
        steps = (step, 0, stop - step)
        trained, opt_state, log = segment(now, trained, opt_state, frozen, numbers, data, order, rates, steps)
        logs.append(jax.tree.map(lambda curve, n=stop - step: np.asarray(curve)[:, :n], log))
        step = stop
    log = jax.tree.map(lambda *curves: np.hstack(curves), *logs)
    return state._replace(step=end, params=masks.join(trained, frozen), optimizer=opt_state), log


def _next_phase(program: Program, trials: Sequence[Trial], state: State) -> Iterator[tuple[State, list[int]]]:
    """The states at the beginning of the phase that begins here, and which rows of the group each is."""
    number = [start for start, _ in trials[0].phases].index(state.step)
    each = [jax.tree.map(lambda leaf, row=row: leaf[row], state.params) for row in range(len(state.trials))]
    histories = [
        (*history, _evaluated(trials[i].phases[number][1], params))
        for i, params, history in zip(state.trials, each, state.masks, strict=True)
    ]
    for part in _parted(program, trials, list(zip(state.trials, histories, strict=True))):
        rows = [state.trials.index(i) for i, _ in part]
        carried = []
        for row in rows:
            before, after = histories[row][:-1], histories[row]
            trial = trials[state.trials[row]]
            tx = named_optimizer.build(program.optimizer, trial.rates[state.step], trial.numbers)
            own = jax.tree.map(lambda leaf, row=row: leaf[row], state.optimizer)
            was, now = ((history[-1], masks.since(*history)) for history in (before, after))
            carried.append(optimizer.carry(tx, was, now, own, each[row]))
        members = tuple(state.trials[row] for row in rows)
        params = stack([each[row] for row in rows])
        yield State(state.step, params, stack(carried), members, tuple(histories[row] for row in rows)), rows


def _evaluated(mask: Mask | Callable[[Params], Mask], params: Params) -> Mask:
    return mask(params) if masks.is_strategy(mask) else mask


def _parted(
    program: Program, trials: Sequence[Trial], members: Sequence[tuple[int, tuple[Mask, ...]]]
) -> list[list[tuple[int, tuple[Mask, ...]]]]:
    """Trials and their masks so far, those that share an executable together."""
    parts: dict[Program, list[tuple[int, tuple[Mask, ...]]]] = {}
    for i, history in members:
        parts.setdefault(under(program, trials[i], history), []).append((i, history))
    return list(parts.values())


def under(program: Program, trial: Trial, history: Sequence[Mask]) -> Program:
    """The program with the last mask of `history`, the masks of all phases that have begun.

    Raises InputError for a penalty that covers no leaf, or lacks the Fisher information that it needs.
    """
    mask, params = history[-1], trial.params
    for term in program.penalties:
        paths.require_globs(params, (term.on,))
        if term.name == "ewc" and trial.fisher is None:
            raise InputError("penalty 'ewc' needs the source's Fisher information: train the source with --save_fisher")
    trains = jax.tree.leaves(masks.static(params, mask))
    kinds = [_kind(m) if t else False for m, t in zip(jax.tree.leaves(mask), trains, strict=True)]
    ages = [age if t else -1 for age, t in zip(jax.tree.leaves(masks.since(*history)), trains, strict=True)]
    born = sorted({age for age, t in zip(ages, trains, strict=True) if t})
    ranks = tuple(born.index(age) if age in born else -1 for age in ages)
    anchored = trial.fresh is not None and any(term.needs_start for term in program.penalties)
    fresh = zip(paths.names(params), jax.tree.leaves(trial.fresh), strict=True) if anchored else ()
    return replace(
        program,
        mask=(jax.tree.structure(mask), *kinds),
        cohorts=ranks if len(born) > 1 else None,
        fresh=tuple(name for name, drawn in fresh if drawn),
    )


def _kind(m: Any) -> bool | None:
    """True for a leaf that trains in full: 1.0 compiles to the same as True, bit for bit. None for a traced one."""
    return True if isinstance(m, bool | int | float | np.bool_ | np.number) and m == 1 else None


def _static(program: Program) -> Mask:
    return jax.tree.unflatten(program.mask[0], [kind is not False for kind in program.mask[1:]])


def _numbers(program: Program, trials: Sequence[Trial], histories: Sequence[Sequence[Mask]]) -> Numbers:
    scales = []
    for history in histories:
        leaves = zip(jax.tree.leaves(history[-1]), program.mask[1:], strict=True)
        scales.append(tuple(jnp.asarray(m) for m, kind in leaves if kind is None))
    anchored = any(term.needs_start for term in program.penalties)
    fisher = any(term.name == "ewc" for term in program.penalties)
    return Numbers(
        weights=tuple(_columns([t.weights[i] for t in trials]) for i in range(len(program.penalties))),
        given=_columns([trial.numbers for trial in trials]),
        scales=stack(scales),
        key=jnp.stack([trial.key for trial in trials]),
        start=stack([trial.params for trial in trials]) if anchored else None,
        fisher=stack([trial.fisher for trial in trials]) if fisher else None,
    )


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, jax.Array]:
    return {name: jnp.asarray([row[name] for row in rows], jnp.float32) for name in rows[0]}


def _check_group(trials: Sequence[Trial], ends: Sequence[int]) -> None:
    batch = trials[0].order(0, 1).shape[1]
    if any(len(t.rates) != ends[-1] or t.order(0, 1).shape[1] != batch for t in trials):
        raise InputError(f"the trials of a group need {ends[-1]} steps and batches of {batch} all: make another group")
    starts = [start for start, _ in trials[0].phases]
    if any([start for start, _ in trial.phases] != starts for trial in trials):
        raise InputError("the trials of a group need phases that start at the same steps: make another group")
    if starts[0] != 0 or not set(starts[1:]) <= set(ends[:-1]):
        raise InputError(
            f"phases start at the steps {starts}: the first at 0, the others at segments' ends {list(ends)}"
        )


def capacity(batch: int) -> int:
    """Steps a compiled call can hold: a constant of the batch size, so that no length compiles anew."""
    return max(1, min(1024, 2**20 // batch))


def _chunk(trials: Sequence[Trial], start: int, stop: int) -> tuple[jax.Array, jax.Array]:
    """The orders and rates of some steps, padded to the capacity."""
    orders = np.stack([trial.order(start, stop) for trial in trials])
    rows = capacity(orders.shape[-1])
    padded = np.full((len(trials), rows, orders.shape[-1]), -1, np.int32)
    padded[:, : stop - start] = orders
    rates = np.zeros((len(trials), rows), np.float32)
    rates[:, : stop - start] = [trial.rates[start:stop] for trial in trials]
    return jnp.asarray(padded), jnp.asarray(rates)


def stack(trees: Sequence[Params]) -> Params:
    """A leading axis of trials; always copies, since the compiled function takes its arguments over."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
