"""`fit`: a group of fits, segment by segment and phase by phase."""

import contextlib
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tljax import masks, optimizer, optimizers, switches
from tljax.train import features, vectorize
from tljax.train.data import MEMORY, Data, Stream, is_streamed, load
from tljax.train.features import FeatureCache
from tljax.train.step import Fit, Log, Spec, batch_size, group_key, specialize, trained_leaves
from tljax.train.vectorize import Mode, agreed, begin, capacity, host, place, stack, stack_hyper
from tljax.types import Examples, InputError, Mask, OptState, Params


@dataclass(frozen=True)
class Execution:
    """How fits are trained; none of it changes a result by more than rounding."""

    devices: tuple[Any, ...] = ()
    """The devices over which fits are divided; by default the first alone."""
    devices_per_batch: int = 1
    """So many of the devices, each with the next, share the batches of a fit: another order of the same sums."""
    mode: str = "jit"
    """'jit', where the compiler divides a batch, or 'pmap', for one fit at a time: all devices share its batches.
    Under pmap dropout draws otherwise than on one device."""
    many: str = "auto"
    """How fits share a device: 'map' (one after another), 'vmap' (side by side), or 'auto': those with one order as
    is quicker, others one after another, so that a fit has the same bits whatever it is trained with."""
    cache: FeatureCache | None = None
    """Where the features of frozen prefixes are kept; None computes them anew in every step."""
    on_message: Callable[[str], None] = lambda line: None
    """Called with a line for each decision."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked every few seconds whether to end before the last step."""
    data: str = "auto"
    """Where examples are: 'resident' on the devices, 'streamed' to them, or 'auto' as there is room (`held`)."""
    stream_memory: int = MEMORY
    """Bytes of host memory for examples that are read ahead."""
    on_wait: Callable[[float], None] = lambda seconds: None
    """Called at the end of a phase with the seconds for which examples of a stream were waited for."""


def held(examples: Examples, execution: Execution, what: str = "the examples") -> Data | Stream:
    """Examples to train on, on the device or streamed to it; `what` is how messages call them.

    Raises InputError if they are to be resident and can only be read by row.
    """
    if is_streamed(examples, execution.data, execution.devices):
        return Stream(examples, execution.stream_memory, what)
    return load(examples.arrays, examples.targets)


class State(NamedTuple):
    """A group, or a part of it, between two steps; arrays have a leading axis of fits."""

    step: int
    params: Params
    optimizer: OptState
    fits: tuple[int, ...]
    """Which of the group's fits these are: a phase whose masks differ in what is compiled parts a group."""
    masks: tuple[tuple[Mask, ...], ...]
    """For each of them the masks of the phases that have begun."""
    diverged: tuple[int | None, ...]
    """For each of them the first step whose objective or gradient was not finite; its parameters mean nothing since."""


def fit(
    spec: Spec,
    fits: Sequence[Fit],
    data: Data | Stream,
    ends: Sequence[int],
    states: Sequence[State] = (),
    execution: Execution | None = None,
) -> Iterator[tuple[State, Log]]:
    """Trains a group; yields at each step of `ends` (increasing, to the last) its state and the log since.

    `spec` holds everything static but the masks, which are the fits'; `ends` increase to the last step.

    - Resuming: fits go on from `states`, the latest that an earlier call yielded of each (one at the end yields nothing
      more); the others begin with their parameters.
    - Phases begin at steps of `ends`, and the state yielded there is the new phase's already. Where the masks of a
      phase differ in what is compiled, or the devices do not divide the fits, the group parts: the states of all parts
      are yielded, then each part is trained to its end in turn.
    - Stopping: when `execution.should_stop()` is true, the state is yielded where it is, and the fit ends.
    - Ownership: the caller's arrays are copied first. A state that was yielded is given up to the next segment, so take
      what is wanted of it before the next one.

    Raises InputError if the fits differ in steps, batch size or the first steps of phases, or if a phase begins at no
    step of `ends`.
    """
    execution = execution or Execution()
    _check_group(fits, ends)
    boundaries, last = {start for start, _ in fits[0].phases}, ends[-1]
    restored = [_restored(state) for state in states]
    begun = {i for state in restored for i in state.fits}
    new = [(i, (_evaluated(fit.phases[0][1], fit.params),)) for i, fit in enumerate(fits) if i not in begun]
    parts = _parts(spec, fits, data, ends, execution, 0, new)
    waiting = itertools.chain(restored, (_first_state(spec, fits, part) for part in parts))
    while (state := next(waiting, None)) is not None:
        if state.step == last:
            continue
        if execution.should_stop():
            return
        most = FIRST_CALL
        with _phase(spec, fits, data, ends, execution, state) as train:
            for end in (end for end in ends if end > state.step):
                state, log, most = train(end, state, most)
                if state.step in boundaries and state.step != last:
                    begins = list(_next_phase(spec, fits, data, ends, execution, state))
                    for next_state, rows in begins:
                        yield next_state, jax.tree.map(lambda curve, rows=rows: curve[rows], log)
                    waiting = itertools.chain([next_state for next_state, _ in begins], waiting)
                    break
                yield state, log
                if execution.should_stop():
                    return


def _check_group(fits: Sequence[Fit], ends: Sequence[int]) -> None:
    batch = batch_size(fits[0])
    if any(len(fit.rates) != ends[-1] or batch_size(fit) != batch for fit in fits):
        raise InputError(f"the fits of a group need {ends[-1]} steps and batches of {batch} all: make another group")
    starts = [start for start, _ in fits[0].phases]
    if any([start for start, _ in fit.phases] != starts for fit in fits):
        raise InputError("the fits of a group need phases that start at the same steps: make another group")
    if starts[0] != 0 or not set(starts[1:]) <= set(ends[:-1]):
        raise InputError(
            f"phases start at the steps {starts}: the first at 0, the others at segments' ends {list(ends)}"
        )


def _restored(state: State) -> State:
    """A state with arrays of its own on the device; one that went through NumPy has arrays for bools and numbers."""
    params, opt_state = jax.tree.map(jnp.array, (state.params, state.optimizer))
    rest = (state.fits, state.masks, state.diverged)
    return State(
        int(state.step), params, opt_state, *jax.tree.map(lambda m: m if np.ndim(m) else np.asarray(m).item(), rest)
    )


Part = Sequence[tuple[int, tuple[Mask, ...]]]
"""Some fits of a group: (its number in the group, the masks of its phases that have begun) of each."""


def _parts(
    spec: Spec,
    fits: Sequence[Fit],
    data: Data | Stream,
    ends: Sequence[int],
    execution: Execution,
    step: int,
    members: Part,
) -> Iterator[Part]:
    """The members in parts that share an executable and stand on the devices together.

    A part is no larger than the cache has room for the features of its fits.
    """
    parts: dict[tuple[Spec, Hashable], list[Any]] = {}
    for i, history in members:
        parts.setdefault(group_key(spec, fits[i], history), []).append((i, history))
    passes = _passes(fits, ends, step)
    for (specialized, _), part in parts.items():
        of_part = [fits[i] for i, _ in part]
        width = vectorize.shared_width(specialized, of_part, [history for _, history in part])
        bytes_of_one = features.features_bytes(specialized, of_part[0], data, passes, execution.cache)
        most = max(1, execution.cache.budget // bytes_of_one) if execution.cache and bytes_of_one else len(part)
        devices = vectorize.fits_at_once(execution.devices, execution.devices_per_batch)
        for company in [part] if isinstance(data, Data) else _by_order(part, fits, width, devices, execution.many):
            start = 0
            for size in vectorize.group_sizes(len(company) // width, devices, most):
                yield company[start : start + width * size]
                start += width * size


def _by_order(part: Part, fits: Sequence[Fit], width: int, devices: int, many: str) -> list[Part]:
    """The members of a part in companies that are trained on a stream together.

    They are the fits of one order, so that each chunk is read once for all; where those are fewer than the devices,
    one fit a device. All stay together where company decides bits: side by side, or where some of them share.
    """
    if many == "vmap" or (width == 1 and any(fits[i].shares is not None for i, _ in part)):
        return [part]
    companies: dict[Hashable, list[Any]] = {}
    for start in range(0, len(part), width):
        name = fits[part[start][0]].order_name
        companies.setdefault(object() if name is None else name, []).extend(part[start : start + width])
    if max(len(company) for company in companies.values()) // width >= devices:
        return list(companies.values())
    return [part[start : start + width * devices] for start in range(0, len(part), width * devices)]


def _passes(fits: Sequence[Fit], ends: Sequence[int], step: int) -> int:
    """Examples that pass through a fit in the phase that a step is in."""
    first = max(start for start, _ in fits[0].phases if start <= step)
    return (_phase_end(fits, ends, step) - first) * batch_size(fits[0])


def _phase_end(fits: Sequence[Fit], ends: Sequence[int], step: int) -> int:
    """The step at which the phase ends that a step is in."""
    return min((start for start, _ in fits[0].phases if start > step), default=ends[-1])


@switches.guarded()
def _first_state(spec: Spec, fits: Sequence[Fit], part: Part) -> State:
    """The state of a part before its first step."""
    members, histories = [fits[i] for i, _ in part], tuple(history for _, history in part)
    specialized = specialize(spec, members[0], histories[0])
    params = stack([fit.params for fit in members])
    rates = jnp.asarray([fit.rates[0] for fit in members])
    opt_state = begin(specialized, params, stack_hyper(specialized, members, histories), rates)
    return State(0, params, opt_state, tuple(i for i, _ in part), histories, (None,) * len(part))


def abstract(spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]]) -> tuple[Params, OptState]:
    """Shapes and dtypes of a state's parameters and optimizer, for fits whose masks so far are `histories`."""
    specialized = specialize(spec, fits[0], histories[0])
    hyper = stack_hyper(specialized, fits, histories)

    def state(params: Params) -> Any:
        return params, begin(specialized, params, hyper, jnp.zeros(len(fits)))

    return jax.eval_shape(state, stack([fit.params for fit in fits]))


LONGEST = 3.0
"""Seconds that a call of the compiled function is meant to take at most: between two of them a fit can be stopped."""
FIRST_CALL = 16
"""Steps of the first call of a phase, whose duration says how many the others may have."""


@contextlib.contextmanager
def _phase(
    spec: Spec, fits: Sequence[Fit], data: Data | Stream, ends: Sequence[int], execution: Execution, state: State
) -> Iterator[Callable[[int, State, int], tuple[State, Log, int]]]:
    """The function that trains a state further within its phase: (end, state, most) -> (later state, log, most).

    `most` is how many steps its first call of the compiled function may have. Of a stream it reads ahead until the end
    of the `with`.
    """
    members = [fits[i] for i in state.fits]
    specialized = specialize(spec, members[0], state.masks[0])
    width = vectorize.shared_width(specialized, members, state.masks)
    mesh, mode = layout(specialized, members, width, data, execution)
    if len(members) > 1:
        execution.on_message(vectorize.describe(len(members), len(fits), width, mesh, mode))
    params = place(mesh, state.params)
    passes = _passes(fits, ends, state.step)
    short, inputs = features.skip_frozen_prefix(
        specialized, members[0], params, width, data, passes, execution.cache, execution.on_message
    )
    hyper = place(mesh, stack_hyper(specialized, members, state.masks))
    with contextlib.ExitStack() as until_the_end:
        if isinstance(inputs, Stream):
            end_of_phase = _phase_end(fits, ends, state.step)
            reader = vectorize.read_chunks(inputs, members, width, mesh, state.step, end_of_phase)
            until_the_end.callback(lambda: execution.on_wait(reader.waited))
            chunks: Iterator[vectorize.Chunk] = until_the_end.enter_context(reader)
        else:
            targets = place(mesh, inputs.targets, by_fit=False)
        chunk: vectorize.Chunk | None = None

        def call(trained: Params, opt_state: OptState, frozen: Params, start: int, stop: int) -> tuple[slice, Any]:
            """(The rows that the steps from `start` on have in the log, as many as there are data for; the rest)."""
            nonlocal chunk
            if isinstance(inputs, Data):
                order, rates = vectorize.order_and_rates(members, width, mesh, start, stop)
                arrays = (trained, opt_state, frozen, hyper, inputs.inputs, targets, order, rates)
                rows = slice(0, stop - start)
                return rows, vectorize.run(short, mesh, width, mode, *arrays, (start, 0, stop - start))
            if chunk is None or start == chunk.stop:
                chunk = next(chunks)
            first = chunk.start
            rows = slice(start - first, min(stop, chunk.stop) - first)
            arrays = (trained, opt_state, frozen, hyper, chunk.inputs, chunk.targets, chunk.order, chunk.rates)
            steps = (first, rows.start, rows.stop)
            return rows, vectorize.run(short, mesh, width, mode, *arrays, steps, fetch=vectorize.slice_chunk)

        def train(end: int, state: State, most: int) -> tuple[State, Log, int]:
            return _advance(short, mesh, batch_size(members[0]), call, end, state, most, execution.should_stop)

        yield train


def layout(
    spec: Spec, fits: Sequence[Fit], width: int, data: Data | Stream, execution: Execution
) -> tuple[Mesh | None, Mode]:
    """The devices of a group, and how its fits share each of them."""
    mesh = vectorize.mesh_of_group(len(fits) // width, execution.devices, execution.devices_per_batch)
    if execution.mode == "pmap" and mesh is not None:
        return mesh, "pmap"
    return mesh, vectorize.choose_mode(spec, fits, width, data, execution.many)


@switches.guarded()
def _advance(
    spec: Spec,
    mesh: Mesh | None,
    batch: int,
    call: Callable[..., Any],
    end: int,
    state: State,
    most: int,
    should_stop: Callable[[], bool],
) -> tuple[State, Log, int]:
    """(The state at step `end`, or earlier if it is to stop; the log of the way; steps that a call may have).

    It goes by calls of the compiled segment, each short enough that a fit can be stopped between two.
    """
    params, opt_state = place(mesh, (state.params, state.optimizer))
    trained, frozen = masks.split(params, trained_leaves(spec))
    step, diverged = state.step, state.diverged
    logs: list[Log] = []
    most = min(most, capacity(batch))
    while step < end and not (logs and should_stop()):
        if None not in diverged:
            logs.append(_empty_log(len(diverged), end - step, len(spec.penalties)))
            step = end
            break
        start = time.perf_counter()
        rows, (trained, opt_state, log) = call(trained, opt_state, frozen, step, min(end, step + most))
        stop = step + rows.stop - rows.start
        log = jax.tree.map(lambda curve, rows=rows: curve[:, rows], host(log))
        diverged = _first_not_finite(diverged, step, log)
        logs.append(_without_diverged(diverged, step, log))
        most = agreed(min(capacity(batch), _steps_for_longest(stop - step, time.perf_counter() - start)))
        step = stop
    log = jax.tree.map(lambda *curves: np.hstack(curves), *logs)
    params = masks.join(trained, frozen)
    return state._replace(step=step, params=params, optimizer=opt_state, diverged=diverged), log, most


def _steps_for_longest(steps: int, seconds: float) -> int:
    """How many steps take LONGEST, where so many took `seconds`."""
    return max(1, int(steps * LONGEST / max(seconds, 1e-9)))


def _first_not_finite(diverged: Sequence[int | None], first: int, log: Log) -> tuple[int | None, ...]:
    """The first step of each fit that is not finite, after a log that begins at step `first`."""
    bad = ~np.isfinite(log.loss + log.penalty + log.gradient_norm)
    return tuple(
        first + int(row.argmax()) if since is None and row.any() else since
        for since, row in zip(diverged, bad, strict=True)
    )


def _without_diverged(diverged: Sequence[int | None], first: int, log: Log) -> Log:
    """The log with nan from where a fit diverged: how long it was computed on must not be seen in it."""
    steps = first + np.arange(log.loss.shape[1])
    after = np.array([np.full(len(steps), False) if since is None else steps >= since for since in diverged])
    return jax.tree.map(lambda curve: np.where(after, np.float32(np.nan), curve), log)


def _empty_log(fits: int, steps: int, terms: int) -> Log:
    """The log of fits that have all diverged, and are not trained on."""
    nothing = np.full((fits, steps), np.nan, np.float32)
    return Log(nothing, nothing, (nothing,) * terms, nothing)


def _next_phase(
    spec: Spec, fits: Sequence[Fit], data: Data | Stream, ends: Sequence[int], execution: Execution, state: State
) -> Iterator[tuple[State, list[int]]]:
    """The states at the beginning of the phase that begins at the state's step, and for each its rows of the state."""
    number = [start for start, _ in fits[0].phases].index(state.step)
    params, opt_state = jax.tree.map(jnp.asarray, host((state.params, state.optimizer)))
    params_of = [jax.tree.map(lambda leaf, row=row: leaf[row], params) for row in range(len(state.fits))]
    histories = [
        (*history, _evaluated(fits[i].phases[number][1], params))
        for i, params, history in zip(state.fits, params_of, state.masks, strict=True)
    ]
    members = list(zip(state.fits, histories, strict=True))
    for part in _parts(spec, fits, data, ends, execution, state.step, members):
        rows = [state.fits.index(i) for i, _ in part]
        carried = []
        for row in rows:
            fit, before, after = fits[state.fits[row]], histories[row][:-1], histories[row]
            tx = optimizers.build(spec.optimizer, fit.rates[state.step], fit.numbers)
            opt_state_of = jax.tree.map(lambda leaf, row=row: leaf[row], opt_state)
            old, new = ((history[-1], masks.since(*history)) for history in (before, after))
            carried.append(optimizer.carry(tx, old, new, opt_state_of, params_of[row]))
        next_state = State(
            state.step,
            stack([params_of[row] for row in rows]),
            stack(carried),
            tuple(state.fits[row] for row in rows),
            tuple(histories[row] for row in rows),
            tuple(state.diverged[row] for row in rows),
        )
        yield next_state, rows


def _evaluated(mask: Mask | Callable[[Params], Mask], params: Params) -> Mask:
    """The mask of a phase; a function is called with a tree of its own, which it may write into."""
    return mask(jax.tree.map(jnp.asarray, params)) if masks.is_strategy(mask) else mask
