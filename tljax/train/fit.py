"""`fit`: a group of trials, segment by segment and phase by phase."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import evaluate, masks, named_optimizer, optimizer, parallel
from tljax.train import layout
from tljax.train.layout import Means
from tljax.train.modes import run
from tljax.train.segment import Layout, Log, Numbers, Program, begin, forward, static
from tljax.train.trial import Trial, alike, batch_size, numbers_of, stack, under
from tljax.types import InputError, Mask, Params, Views


class State(NamedTuple):
    """A group, or a part of it, between two steps; arrays have a leading axis of trials."""

    step: int
    params: Params
    optimizer: optax.OptState
    trials: tuple[int, ...]
    """Which of the group these are: a phase whose masks differ in what is compiled parts a group."""
    masks: tuple[tuple[Mask, ...], ...]
    """For each of them the masks of the phases that have begun."""


class Group(NamedTuple):
    """What stays the same for all of a fit."""

    program: Program
    trials: Sequence[Trial]
    images: jax.Array
    """uint8 or float32 [n, ...], on the device."""
    labels: jax.Array
    """int32 [n], on the device."""
    ends: Sequence[int]
    means: Means


class Setting(NamedTuple):
    """All that the segments of a phase take beside state, order and rates."""

    program: Program
    layout: Layout
    numbers: Numbers
    data: tuple[Views, jax.Array]
    """And labels."""


def fit(
    program: Program,
    trials: Sequence[Trial],
    images: jax.Array,
    labels: jax.Array,
    ends: Sequence[int],
    state: State | None = None,
    means: Means | None = None,
) -> Iterator[tuple[State, Log]]:
    """Train a group; yield its state and log at each step of `ends` (increasing, the last is the last step).

    `program` says everything but the masks. Images uint8 or float32 [n, ...] and labels int32 [n] are on the device,
    shared by the trials. It starts from the trials' parameters, or from a `state` that an earlier call gave. A phase
    begins at a step of `ends`, and the state yielded there is the new phase's already; where the masks of a phase
    differ in what is compiled, or the devices do not divide the trials, the group parts, and each part is trained to
    its end in turn. The caller's arrays are copied first; what is yielded is given up to the next segment, so take
    what is wanted of it before. Raises InputError where the trials differ in steps, batch size or phases.
    """
    _check_group(trials, ends)
    group = Group(program, trials, images, labels, ends, means or Means())
    if state is not None:
        params, opt_state = jax.tree.map(jnp.array, (state.params, state.optimizer))
        # A state that went through NumPy has arrays for bools and numbers; masks are to have what they had.
        plain = jax.tree.map(lambda m: m if np.ndim(m) else np.asarray(m).item(), (state.trials, state.masks))
        yield from _advance(group, State(int(state.step), params, opt_state, *plain))
        return
    everyone = [(i, (_evaluated(trial.phases[0][1], trial.params),)) for i, trial in enumerate(trials)]
    for part in _parted(group, 0, everyone):
        members = [trials[i] for i, _ in part]
        now = under(program, members[0], part[0][1])
        params = stack([trial.params for trial in members])
        histories = tuple(history for _, history in part)
        rates = jnp.asarray([trial.rates[0] for trial in members])
        opt_state = begin(now, params, numbers_of(now, members, histories), rates)
        yield from _advance(group, State(0, params, opt_state, tuple(i for i, _ in part), histories))


def _advance(group: Group, state: State) -> Iterator[tuple[State, Log]]:
    """From a state to the last of `ends`; parts of a group one after another."""
    starts, last = {start for start, _ in group.trials[0].phases}, group.ends[-1]
    setting = _setting(group, state)
    for end in (end for end in group.ends if end > state.step):
        state, log = _to(end, group, setting, state)
        if end not in starts or end == last:
            yield state, log
            continue
        for next_state, rows in _next_phase(group, state):
            yield next_state, jax.tree.map(lambda curve, rows=rows: curve[rows], log)
            yield from _advance(group, next_state)
        return


def _setting(group: Group, state: State) -> Setting:
    """Of the phase that a state is in."""
    means, images = group.means, group.images
    members = [group.trials[i] for i in state.trials]
    now = under(group.program, members[0], state.masks[0])
    stand = layout.laid_out(now, members, layout.lanes(now, members, state.masks), images, means)
    if len(members) > 1:
        means.say(_told(len(members), stand))
    params = parallel.place(stand.mesh, state.params)
    short, views = layout.shortened(now, members, params, stand.lanes, images, _passed(group, state.step), means)
    if views is None:
        views = (parallel.place(stand.mesh, images, split=False),)
    labels = parallel.place(stand.mesh, group.labels, split=False)
    numbers = parallel.place(stand.mesh, numbers_of(now, members, state.masks))
    return Setting(short, stand, numbers, (views, labels))


def logits(
    program: Program, trials: Sequence[Trial], state: State, images: jax.Array, count: int, means: Means | None = None
) -> np.ndarray:
    """Logits float32 [trials of the state, count, classes] of images as `evaluate.padded` gives them.

    What the stages give that its masks freeze is computed once, and kept for later states.
    """
    means = replace(means or Means(), say=lambda line: None)
    members = [trials[i] for i in state.trials]
    now = under(program, members[0], state.masks[0])
    side = layout.lanes(now, members, state.masks)
    mesh = layout.mesh(members, side, means)
    params = parallel.place(mesh, state.params)
    short, views = layout.shortened(now, members, params, side, images, len(images), means)
    if views is None:
        views = (parallel.place(mesh, images, split=False),)
    return evaluate.logits(forward(short), params, views, count)


def _told(trials: int, stand: Layout) -> str:
    sharing = parallel.sharing(stand.mesh)
    count = stand.mesh.size // sharing if stand.mesh else 1
    one, more = (
        ("device", "devices") if sharing == 1 else (f"group of {sharing} devices", f"groups of {sharing} devices")
    )
    where = f"on one {one}" if count == 1 else f"on each of {count} {more}"
    if stand.abreast:
        return f"{trials} fits, side by side {where}"
    return f"{trials} fits, {f'{stand.lanes} side by side' if stand.wide else 'one after another'} {where}"


def _passed(group: Group, step: int) -> int:
    """Examples that pass through a fit in the phase that a step is in."""
    starts = [start for start, _ in group.trials[0].phases]
    first = max(start for start in starts if start <= step)
    end = min((start for start in starts if start > step), default=group.ends[-1])
    return (end - first) * batch_size(group.trials[0])


def _to(end: int, group: Group, setting: Setting, state: State) -> tuple[State, Log]:
    """The state at step `end` of the same phase, and the log of the way."""
    members = [group.trials[i] for i in state.trials]
    program, stand, numbers, data = setting
    own = parallel.place(stand.mesh, (state.params, state.optimizer))
    (trained, frozen), opt_state = masks.split(own[0], static(program)), own[1]
    step, logs = state.step, []
    while step < end:
        stop = min(end, step + capacity(batch_size(members[0])))
        order, rates = _chunk(members, stand, step, stop)
        steps = (step, 0, stop - step)
        given = (trained, opt_state, frozen, numbers, data, order, rates, steps)
        trained, opt_state, log = run(stand)(program, stand, *given)
        logs.append(jax.tree.map(lambda curve, n=stop - step: curve[:, :n], parallel.host(log)))
        step = stop
    log = jax.tree.map(lambda *curves: np.hstack(curves), *logs)
    return state._replace(step=end, params=masks.join(trained, frozen), optimizer=opt_state), log


def _next_phase(group: Group, state: State) -> Iterator[tuple[State, list[int]]]:
    """The states at the beginning of the phase that begins here, and which rows of the group each is."""
    trials = group.trials
    number = [start for start, _ in trials[0].phases].index(state.step)
    whole, moments = jax.tree.map(jnp.asarray, parallel.host((state.params, state.optimizer)))
    each = [jax.tree.map(lambda leaf, row=row: leaf[row], whole) for row in range(len(state.trials))]
    histories = [
        (*history, _evaluated(trials[i].phases[number][1], params))
        for i, params, history in zip(state.trials, each, state.masks, strict=True)
    ]
    for part in _parted(group, state.step, list(zip(state.trials, histories, strict=True))):
        rows = [state.trials.index(i) for i, _ in part]
        carried = []
        for row in rows:
            before, after = histories[row][:-1], histories[row]
            trial = trials[state.trials[row]]
            tx = named_optimizer.build(group.program.optimizer, trial.rates[state.step], trial.numbers)
            own = jax.tree.map(lambda leaf, row=row: leaf[row], moments)
            was, now = ((history[-1], masks.since(*history)) for history in (before, after))
            carried.append(optimizer.carry(tx, was, now, own, each[row]))
        members = tuple(state.trials[row] for row in rows)
        params = stack([each[row] for row in rows])
        yield State(state.step, params, stack(carried), members, tuple(histories[row] for row in rows)), rows


def _evaluated(mask: Mask | Callable[[Params], Mask], params: Params) -> Mask:
    # A tree of its own, which the function may write into.
    return mask(jax.tree.map(jnp.asarray, params)) if masks.is_strategy(mask) else mask


def _parted(
    group: Group, step: int, members: Sequence[tuple[int, tuple[Mask, ...]]]
) -> Iterator[Sequence[tuple[int, tuple[Mask, ...]]]]:
    """Trials and their masks so far, those that share an executable and stand on the devices together."""
    parts: dict[tuple[Program, Hashable], list[tuple[int, tuple[Mask, ...]]]] = {}
    for i, history in members:
        parts.setdefault(alike(group.program, group.trials[i], history), []).append((i, history))
    for (now, _), part in parts.items():
        trials = [group.trials[i] for i, _ in part]
        side = layout.lanes(now, trials, [history for _, history in part])
        sizes = layout.sizes(now, trials, side, group.images, _passed(group, step), group.means)
        for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            yield part[stop - size : stop]


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


def _chunk(trials: Sequence[Trial], stand: Layout, start: int, stop: int) -> tuple[jax.Array, jax.Array]:
    """The orders and rates of some steps, padded to the capacity, and batches to what the devices divide."""
    orders = np.stack([trial.order(start, stop) for trial in trials[:: stand.lanes]])
    batch, sharing = orders.shape[-1], parallel.sharing(stand.mesh)
    rows = capacity(batch)
    padded = np.full((len(orders), rows, -(-batch // sharing) * sharing), -1, np.int32)
    padded[:, : stop - start, :batch] = orders
    rates = np.zeros((len(trials), rows), np.float32)
    rates[:, : stop - start] = [trial.rates[start:stop] for trial in trials]
    given = jax.device_put((padded, rates))
    return given if jax.process_count() == 1 else parallel.place(stand.mesh, given)
