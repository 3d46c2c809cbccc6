"""Within a phase: calls of the compiled segment, each short enough that a fit can be stopped between two."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from tljax import masks, parallel, surroundings
from tljax.train import modes
from tljax.train.step import Layout, Log, Numbers, Program, static
from tljax.train.trial import Trial, batch_size
from tljax.types import Mask, OptState, Params, Views


class State(NamedTuple):
    """A group, or a part of it, between two steps; arrays have a leading axis of trials."""

    step: int
    params: Params
    optimizer: OptState
    trials: tuple[int, ...]
    """Which of the group these are: a phase whose masks differ in what is compiled parts a group."""
    masks: tuple[tuple[Mask, ...], ...]
    """For each of them the masks of the phases that have begun."""
    diverged: tuple[int | None, ...]
    """For each of them the first step whose objective or gradient was not finite; its parameters mean nothing since."""


class Setting(NamedTuple):
    """All that the segments of a phase take beside state, order and rates."""

    program: Program
    layout: Layout
    numbers: Numbers
    data: tuple[Views, jax.Array]
    """And labels."""


LONGEST = 3.0
"""Seconds that a call of the compiled function is meant to take at most: between two of them a fit can be stopped."""
FIRST_CALL = 16
"""Steps of the first, whose duration says how many the others may have."""


@surroundings.kept()
def along(
    end: int, trials: Sequence[Trial], setting: Setting, state: State, most: int, stop: Callable[[], bool]
) -> tuple[State, Log, int]:
    """(state at step `end`, or earlier where `stop` says so; the log of the way; steps a call may have).

    `trials` are those of the state, and `most` the steps its first call may have, such as FIRST_CALL.
    """
    program, stand, numbers, data = setting
    own = parallel.place(stand.mesh, (state.params, state.optimizer))
    (trained, frozen), opt_state = masks.split(own[0], static(program)), own[1]
    step, diverged = state.step, state.diverged
    logs: list[Log] = []
    most = min(most, capacity(batch_size(trials[0])))
    while step < end and not (logs and stop()):
        if None not in diverged:
            logs.append(_nothing(len(trials), end - step, len(program.penalties)))
            step = end
            break
        start, after = time.perf_counter(), min(end, step + most)
        order, rates = _chunk(trials, stand, step, after)
        given = (trained, opt_state, frozen, numbers, data, order, rates, (step, 0, after - step))
        trained, opt_state, log = modes.run(stand)(program, stand, *given)
        now = jax.tree.map(lambda curve, n=after - step: curve[:, :n], parallel.host(log))
        diverged = _diverged(diverged, step, now)
        logs.append(_silenced(diverged, step, now))
        steps = _as_long(after - step, time.perf_counter() - start)
        most = parallel.agreed(min(capacity(batch_size(trials[0])), steps))
        step = after
    log = jax.tree.map(lambda *curves: np.hstack(curves), *logs)
    params = masks.join(trained, frozen)
    return state._replace(step=step, params=params, optimizer=opt_state, diverged=diverged), log, most


def _nothing(trials: int, steps: int, terms: int) -> Log:
    """The log of trials that have all diverged, and are not trained on."""
    nothing = np.full((trials, steps), np.nan, np.float32)
    return Log(nothing, nothing, (nothing,) * terms, nothing)


def _as_long(steps: int, seconds: float) -> int:
    """How many steps take LONGEST, where so many took `seconds`."""
    return max(1, int(steps * LONGEST / max(seconds, 1e-9)))


def _diverged(before: Sequence[int | None], first: int, log: Log) -> tuple[int | None, ...]:
    """The first step of each trial that is not finite, after a log that begins at step `first`."""
    bad = ~np.isfinite(log.loss + log.penalty + log.gradient_norm)
    return tuple(
        first + int(row.argmax()) if since is None and row.any() else since
        for since, row in zip(before, bad, strict=True)
    )


def _silenced(diverged: Sequence[int | None], first: int, log: Log) -> Log:
    """The log with nan from where a trial diverged: how long it was computed on must not be seen in it."""
    steps = first + np.arange(log.loss.shape[1])
    after = np.array([np.full(len(steps), False) if since is None else steps >= since for since in diverged])
    return jax.tree.map(lambda curve: np.where(after, np.float32(np.nan), curve), log)


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
