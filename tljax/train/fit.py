"""`fit`: a group of trials, segment by segment and phase by phase."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import evaluate, masks, named_optimizer, optimizer, parallel, surroundings
from tljax.train import layout, phase
from tljax.train.layout import Means
from tljax.train.phase import Setting, State
from tljax.train.segment import Layout, Log, Program, begin, forward
from tljax.train.trial import Trial, alike, batch_size, numbers_of, stack, under
from tljax.types import InputError, Mask, OptState, Params


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


Part = Sequence[tuple[int, tuple[Mask, ...]]]
"""Which trials of a group, and the masks of the phases that have begun for each."""


def fit(
    program: Program,
    trials: Sequence[Trial],
    images: jax.Array,
    labels: jax.Array,
    ends: Sequence[int],
    states: Sequence[State] = (),
    means: Means | None = None,
) -> Iterator[tuple[State, Log]]:
    """Train a group; yield at each step of `ends` (increasing, to the last) its state and the log since.

    `program` says everything but the masks. Images uint8 or float32 [n, ...] and labels int32 [n] are on the device,
    shared by the trials. Trials go on from `states`, the latest that an earlier call gave of each (one at the end gives
    nothing more), the others from their parameters. A phase begins at a step of `ends`, and the state yielded there is
    the new phase's already; where the masks of a phase differ in what is compiled, or the devices do not divide the
    trials, the group parts: all parts are yielded, then each is trained to its end in turn. When `means.stop` says so,
    the state is yielded where it is and the fit ends. The caller's arrays are copied first; what is yielded is given up
    to the next segment, so take what is wanted of it before. Raises InputError where the trials differ in steps, batch
    size or phases.
    """
    _check_group(trials, ends)
    group = Group(program, trials, images, labels, ends, means or Means())
    going = [_taken_up(state) for state in states]
    for state in going:
        yield from _advance(group, state)
    begun = {i for state in going for i in state.trials}
    others = [(i, trial) for i, trial in enumerate(trials) if i not in begun]
    fresh = [(i, (_evaluated(trial.phases[0][1], trial.params),)) for i, trial in others]
    for part in _parted(group, 0, fresh):
        yield from _advance(group, _first(group, part))


def _taken_up(state: State) -> State:
    """Arrays of its own on the device; a state that went through NumPy has arrays for bools and numbers too."""
    params, opt_state = jax.tree.map(jnp.array, (state.params, state.optimizer))
    rest = (state.trials, state.masks, state.diverged)
    return State(
        int(state.step), params, opt_state, *jax.tree.map(lambda m: m if np.ndim(m) else np.asarray(m).item(), rest)
    )


@surroundings.kept()
def _first(group: Group, part: Part) -> State:
    """Before the first step."""
    members = [group.trials[i] for i, _ in part]
    now = under(group.program, members[0], part[0][1])
    params = stack([trial.params for trial in members])
    histories = tuple(history for _, history in part)
    rates = jnp.asarray([trial.rates[0] for trial in members])
    opt_state = begin(now, params, numbers_of(now, members, histories), rates)
    return State(0, params, opt_state, tuple(i for i, _ in part), histories, (None,) * len(part))


def abstract(program: Program, trials: Sequence[Trial], histories: Sequence[Sequence[Mask]]) -> tuple[Params, OptState]:
    """Shapes and dtypes of a state's parameters and optimizer, for trials whose masks so far are `histories`."""
    now = under(program, trials[0], histories[0])
    numbers = numbers_of(now, trials, histories)

    def state(params: Params) -> Any:
        return params, begin(now, params, numbers, jnp.zeros(len(trials)))

    return jax.eval_shape(state, stack([trial.params for trial in trials]))


def _advance(group: Group, state: State) -> Iterator[tuple[State, Log]]:
    """From a state to the last of `ends`; parts of a group one after another."""
    starts, last = {start for start, _ in group.trials[0].phases}, group.ends[-1]
    if state.step == last or group.means.stop():
        return
    members = [group.trials[i] for i in state.trials]
    setting, most = _setting(group, state), phase.FIRST_CALL
    for end in (end for end in group.ends if end > state.step):
        state, log, most = phase.along(end, members, setting, state, most, group.means.stop)
        if state.step not in starts or state.step == last:
            yield state, log
            if group.means.stop():
                return
            continue
        parts = list(_next_phase(group, state))
        for next_state, rows in parts:
            yield next_state, jax.tree.map(lambda curve, rows=rows: curve[rows], log)
        for next_state, _ in parts:
            yield from _advance(group, next_state)
        return


def _setting(group: Group, state: State) -> Setting:
    """Of the phase that a state is in."""
    means, images = group.means, group.images
    members = [group.trials[i] for i in state.trials]
    now = under(group.program, members[0], state.masks[0])
    stand = layout.laid_out(now, members, layout.lanes(now, members, state.masks), images, means)
    if len(members) > 1:
        means.say(_told(len(members), len(group.trials), stand))
    params = parallel.place(stand.mesh, state.params)
    short, views = layout.shortened(now, members, params, stand.lanes, images, _passed(group, state.step), means)
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
    params = parallel.place(layout.mesh(members, side, means), state.params)
    short, views = layout.shortened(now, members, params, side, images, len(images), means)
    return evaluate.logits(forward(short.model, short.merge), params, views, count)


def _told(trials: int, total: int, stand: Layout) -> str:
    fits = f"{trials} fits" if trials == total else f"{trials} of {total} fits"
    sharing = parallel.sharing(stand.mesh)
    count = stand.mesh.size // sharing if stand.mesh else 1
    one, more = (
        ("device", "devices") if sharing == 1 else (f"group of {sharing} devices", f"groups of {sharing} devices")
    )
    where = f"on one {one}" if count == 1 else f"on each of {count} {more}"
    if trials == count > 1:
        return f"{fits} at once, one on each of {count} {more}"
    if stand.abreast:
        return f"{fits}, side by side {where}"
    return f"{fits}, {f'{stand.lanes} side by side' if stand.wide else 'one after another'} {where}"


def _passed(group: Group, step: int) -> int:
    """Examples that pass through a fit in the phase that a step is in."""
    starts = [start for start, _ in group.trials[0].phases]
    first = max(start for start in starts if start <= step)
    end = min((start for start in starts if start > step), default=group.ends[-1])
    return (end - first) * batch_size(group.trials[0])


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
        masks_so_far, since = tuple(histories[row] for row in rows), tuple(state.diverged[row] for row in rows)
        yield State(state.step, params, stack(carried), members, masks_so_far, since), rows


def _evaluated(mask: Mask | Callable[[Params], Mask], params: Params) -> Mask:
    # A tree of its own, which the function may write into.
    return mask(jax.tree.map(jnp.asarray, params)) if masks.is_strategy(mask) else mask


def _parted(group: Group, step: int, members: Part) -> Iterator[Part]:
    """Trials and their masks so far, those that share an executable and stand on the devices together."""
    parts: dict[tuple[Program, Hashable], list[Any]] = {}
    for i, history in members:
        parts.setdefault(alike(group.program, group.trials[i], history), []).append((i, history))
    for (now, _), part in parts.items():
        trials = [group.trials[i] for i, _ in part]
        side = layout.lanes(now, trials, [history for _, history in part])
        sizes = layout.sizes(now, trials, side, group.images, _passed(group, step), group.means)
        for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            yield part[stop - size : stop]


def _check_group(trials: Sequence[Trial], ends: Sequence[int]) -> None:
    batch = batch_size(trials[0])
    if any(len(t.rates) != ends[-1] or batch_size(t) != batch for t in trials):
        raise InputError(f"the trials of a group need {ends[-1]} steps and batches of {batch} all: make another group")
    starts = [start for start, _ in trials[0].phases]
    if any([start for start, _ in trial.phases] != starts for trial in trials):
        raise InputError("the trials of a group need phases that start at the same steps: make another group")
    if starts[0] != 0 or not set(starts[1:]) <= set(ends[:-1]):
        raise InputError(
            f"phases start at the steps {starts}: the first at 0, the others at segments' ends {list(ends)}"
        )
