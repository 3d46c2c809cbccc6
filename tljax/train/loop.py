"""`fit`: a group of fits, segment by segment and phase by phase."""

import contextlib
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tljax import batch_stats, masks, models, optimizer, optimizers, paths, switches
from tljax.train import cost, features, flops, settled, vectorize
from tljax.train.cost import Cost
from tljax.train.data import MEMORY, Data, Reader, Stream, is_streamed, load
from tljax.train.features import FeatureCache
from tljax.train.profile import Profile
from tljax.train.step import (
    Average,
    Fit,
    Hyper,
    Log,
    Spec,
    averaged_places,
    batch_size,
    check_microbatch,
    entered,
    gathered,
    group_key,
    joined_average,
    part_of_average,
    rule,
    specialize,
    trained_leaves,
    with_average,
)
from tljax.train.vectorize import (
    Mode,
    Shared,
    agreed,
    begin,
    capacity,
    host,
    joined,
    on_first_device,
    place,
    share,
    share_hyper,
    stack,
    stack_hyper,
    stack_numbers,
)
from tljax.types import Examples, InputError, Mask, ModelState, OptState, Params, PhaseRule


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
    """How fits share a device: 'map' (one after another), 'vmap' (side by side), or 'auto'. On a CPU that is as is
    quicker for those with one order, and one after another for others, so that a fit has the same bits whatever it is
    trained with; on other devices side by side up to `vectorize.QUICKER_ON_ACCELERATORS`, where a fit's bits are its
    company's."""
    cache: FeatureCache | None = None
    """Where the features of frozen prefixes are kept; None computes them anew in every step."""
    on_message: Callable[[str], None] = lambda line: None
    """Called with a line for each decision."""
    on_compiled: Callable[[tuple[int, ...], Cost], None] = lambda fits, cost: None
    """Called with what the executable of a phase costs on each device, and which of the group's fits it trains."""
    before_phase: Callable[[tuple[int, ...], int], None] = lambda fits, phase: None
    """Called with which of the group's fits are trained in a phase, and its number, before anything of it is compiled
    (`ahead.compiled_ahead` may be about to)."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked every few seconds whether to end before the last step."""
    on_steps: Callable[[int], None] = lambda steps: None
    """Called every few seconds with how many steps were trained since, added up over fits."""
    meanwhile: Callable[[], bool] = lambda: False
    """Called while the devices train and the log of their steps is waited for: does a piece of other work, and says
    whether it did. Of many processes it is not called."""
    profile: Profile | None = None
    """Which steps are traced, if any are."""
    data: str = "auto"
    """Where examples are: 'resident' on the devices, 'streamed' to them, or 'auto' as there is room (`held`)."""
    stream_memory: int = MEMORY
    """Bytes of host memory for examples that are read ahead."""
    on_wait: Callable[[float], None] = lambda seconds: None
    """Called at the end of a phase with the seconds for which examples of a stream were waited for."""
    evaluation_batch: int = 0
    """Examples that go through a model at once in `evaluate`, another number of which may round otherwise; 0 for as
    many as memory holds. `FeatureCache.batch` is that of features."""


def held(examples: Examples, execution: Execution, what: str = "the examples") -> Data | Stream:
    """Examples to train on, on the device or streamed to it; `what` is how messages call them.

    Raises InputError if they are to be resident and can only be read by row.
    """
    if is_streamed(examples, execution.data, execution.devices, what):
        return Stream(examples, execution.stream_memory, what)
    return load(examples.arrays, examples.targets)


class State(NamedTuple):
    """A group, or a part of it, between two steps; arrays but those that are shared have a leading axis of fits."""

    step: int
    params: Params
    """None for the leaves that are in `shared`: `params_and_state` gives all of a fit."""
    optimizer: OptState
    fits: tuple[int, ...]
    """Which of the group's fits these are: a phase whose masks differ in what is compiled parts a group."""
    masks: tuple[tuple[Mask, ...], ...]
    """For each of them the masks of the phases that have begun."""
    diverged: tuple[int | None, ...]
    """For each of them the first step whose objective or gradient was not finite; its parameters mean nothing since."""
    average: Average | None = None
    """With `Spec.averages` the average of what trains, and of the model's state."""
    began: int = 0
    """The step at which its phase began."""
    scores: tuple[tuple[float, ...], ...] = ()
    """In a phase that ends by validation, or restores: for each fit its scores at the points so far."""
    best: Any = None
    """In a phase that restores: (what trains, its average, the model's state) at the point with each fit's best
    score."""
    over: bool = False
    """Whether the last phase has ended, and restored what it was to restore."""
    model_state: Mapping[str, Any] = {}
    """The model's state, apart from its parameters."""
    shared: Params | None = None
    """The leaves that have never trained and are the same for all fits, without an axis of fits; None without any."""

    def params_and_state(self, row: int) -> tuple[Params, ModelState]:
        """(Parameters, model state) of the fit in a row."""
        params, model_state = jax.tree.map(lambda leaf: leaf[row], (self.params, self.model_state))
        return joined(params, self.shared), model_state

    def variables_of(self, row: int) -> Params:
        """Parameters and the model's state of the fit in a row in one tree, as files keep them."""
        return batch_stats.join(*self.params_and_state(row))

    @property
    def variables(self) -> Params:
        """Parameters and the model's state in one tree, with a leading axis of fits; None for what is shared."""
        return batch_stats.join(self.params, self.model_state)

    @property
    def shared_variables(self) -> Params | None:
        """What is shared, in a tree like `variables`."""
        if self.shared is None:
            return None
        return batch_stats.join(self.shared, jax.tree.map(lambda leaf: None, self.model_state))


Validate = Callable[[State], Sequence[float | None] | None]
"""(a state) -> for each of its fits the score on its validation split, larger is better, None where there is none; None
where no point of the curves is."""


def fit(
    spec: Spec,
    fits: Sequence[Fit],
    data: Data | Stream,
    ends: Sequence[int],
    states: Sequence[State] = (),
    execution: Execution | None = None,
    validate: Validate | None = None,
) -> Iterator[tuple[State, Log]]:
    """Trains a group; yields at each step of `ends` (increasing, to the last) its state and the log since.

    `spec` holds everything static but the masks, which are the fits'; `ends` increase to the last step.

    - Resuming: fits go on from `states`, the latest that an earlier call yielded of each (one at the end yields nothing
      more); the others begin with their parameters.
    - Phases begin at steps of `ends`, and the state yielded there is the new phase's already. Where the masks of a
      phase differ in what is compiled, or the devices do not divide the fits, the group parts: the states of all parts
      are yielded, then each part is trained to its end in turn.
    - Phases that end by validation, or restore (`Fit.rules`), ask `validate` at each step of `ends`. The state yielded
      at their end is that phase's still; then the states of the fits that end it there are yielded once more, with a
      log of no steps: restored, and in the next phase, or, as there is none, at the last step. The others go on.
    - Schedules that say what is off for good (`MaskSchedule.off_since`) are asked at each step of `ends`: of a prefix
      of stages that are, the features are computed once, where fits run one after another (`settled`). Those of one
      prefix go on together.
    - Stopping: when `execution.should_stop()` is true, the state is yielded where it is, and the fit ends.
    - Ownership: the caller's arrays are copied first. A state that was yielded is given up to the next segment, so take
      what is wanted of it before the next one.

    Raises InputError if the fits differ in steps, batch size or the first steps of phases, if a phase begins at no
    step of `ends`, or if one asks for validation and there is no `validate`.
    """
    execution, last = execution or Execution(), ends[-1]
    _check_group(fits, ends, validate)
    devices = len(execution.devices) if execution.mode == "pmap" else execution.devices_per_batch
    check_microbatch(spec.microbatch, batch_size(fits[0]), max(1, devices))
    restored = [_restored(state) for state in states]
    begun = {i for state in restored for i in state.fits}
    new = [(i, (_evaluated(fit.phases[0][1], fit.params),)) for i, fit in enumerate(fits) if i not in begun]
    parts = _parts(spec, fits, data, ends, execution, 0, new)
    first = (_reestimated(spec, fits, data, execution, _first_state(spec, fits, part)) for part in parts)
    waiting = itertools.chain(restored, first)
    while (state := next(waiting, None)) is not None:
        if ended := _ended(fits, state, last):
            following = list(_after_end(spec, fits, data, ends, execution, state, ended))
            rest = [row for row in range(len(state.fits)) if row not in ended]
            for next_state in following:
                yield next_state, _empty_log(len(next_state.fits), 0, len(spec.penalties))
            waiting = itertools.chain([_taken(state, rest)] if rest else [], following, waiting)
            continue
        if state.step == last:
            continue
        if execution.should_stop():
            return
        by_prefix = _by_prefix(spec, fits, data, ends, execution, state)
        if len(by_prefix) > 1:
            waiting = itertools.chain([_taken(state, rows) for _, rows in by_prefix], waiting)
            continue
        most, (prefix, _) = FIRST_CALL, by_prefix[0]
        with _phase(spec, fits, data, ends, execution, state, prefix) as train:
            for end in (end for end in ends if end > state.step):
                state, log, most = train(end, state, most)
                _require_slots(state)
                if _is_watched(fits, state) and state.step == end and validate is not None:
                    state = _observed(spec, fits, state, validate(state))
                elif state.step == _latest_end(fits, state, last) != last:
                    begins = list(_next_phase(spec, fits, data, ends, execution, state))
                    for next_state, rows in begins:
                        yield next_state, jax.tree.map(lambda curve, rows=rows: curve[rows], log)
                    waiting = itertools.chain([next_state for next_state, _ in begins], waiting)
                    break
                yield state, log
                if any(longer != prefix for longer, _ in _by_prefix(spec, fits, data, ends, execution, state)):
                    waiting = itertools.chain([state], waiting)
                    break
                if execution.should_stop():
                    return
                if _ended(fits, state, last):
                    waiting = itertools.chain([state], waiting)
                    break


def _by_prefix(
    spec: Spec, fits: Sequence[Fit], data: Data | Stream, ends: Sequence[int], execution: Execution, state: State
) -> list[tuple[tuple[str, ...], list[int]]]:
    """(What is `Spec.settled` of these rows of a state, the rows) of each prefix that is; of one fit alone, and so one
    for all, where no schedule says what is off for good, or fits do not run one after another on one device."""
    nothing: list[tuple[tuple[str, ...], list[int]]] = [((), [*range(len(state.fits))])]
    past, latest = [end for end in ends if state.began < end <= state.step], _latest_end(fits, state, ends[-1])
    schedule, cache = rule(fits[state.fits[0]], _phase_of(state)).schedule, execution.cache
    if schedule is None or schedule.off_since is None or cache is None or not past or state.step >= latest:
        return nothing
    members = [fits[i] for i in state.fits]
    specialized = specialize(spec, members[0], state.masks[0])
    shares = [fit.shares for fit in members if fit.shares is not None]
    several = len(execution.devices) > 1 or jax.process_count() > 1 or len({*shares}) < len(shares)
    if several or settled.obstacle(specialized, cache) or layout(specialized, members, 1, data, execution)[1] != "map":
        return nothing
    rows: dict[tuple[str, ...], list[int]] = {}
    span = past, state.began, latest
    for row, since in enumerate(settled.off_since(specialized, state.optimizer)):
        prefix = settled.prefix(specialized, members[row], data, *span, since, cache)
        rows.setdefault(prefix, []).append(row)
    parts: list[tuple[tuple[str, ...], list[int]]] = []
    for prefix, prefix_rows in rows.items():
        longer = replace(specialized, settled=prefix)
        bytes_of_one = features.features_bytes(longer, members[0], data, len(data), cache) if prefix else 0
        most = max(1, cache.budget // bytes_of_one) if bytes_of_one else len(prefix_rows)
        parts += [(prefix, prefix_rows[start : start + most]) for start in range(0, len(prefix_rows), most)]
    return parts


def _require_slots(state: State) -> None:
    """Raise InputError if a schedule had more on than there are slots: what found none was off."""
    schedule_state = state.optimizer
    if isinstance(schedule_state, optimizer.Scheduled) and schedule_state.over is not None:
        times, slots = int(np.max(host(schedule_state.over))), schedule_state.slots.shape[-1]
        if times:
            raise InputError(
                f"the schedule of the mask has more groups on than its {slots} slots ({times} times before step "
                f"{state.step}): give it more slots, or switch fewer on"
            )


def _check_group(fits: Sequence[Fit], ends: Sequence[int], validate: Validate | None) -> None:
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
    watched = [[_asks(rule(fit, phase)) for phase in range(len(starts))] for fit in fits]
    if any(asks != watched[0] for asks in watched):
        raise InputError("the fits of a group need `until` and `restore` in the same phases: make another group")
    if any(watched[0]) and validate is None:
        raise InputError("a phase has `until` or `restore`, and there is no validation: give fit `validate=`")


def _asks(rule: PhaseRule) -> bool:
    """Whether a phase of this rule looks at the validation split."""
    return rule.until is not None or rule.restore


def _phase_of(state: State) -> int:
    """The number of the phase that a state is in."""
    return len(state.masks[0]) - 1


def _is_watched(fits: Sequence[Fit], state: State) -> bool:
    """Whether the phase of a state looks at the validation split."""
    return _asks(rule(fits[state.fits[0]], _phase_of(state)))


def _latest_end(fits: Sequence[Fit], state: State, last: int) -> int:
    """The step at which the phase of a state ends at the latest."""
    starts = [start for start, _ in fits[0].phases]
    return [*starts, last][_phase_of(state) + 1]


def _ended(fits: Sequence[Fit], state: State, last: int) -> list[int]:
    """The rows of a state whose phase ends at its step by validation, or is to be restored there.

    A fit that diverged ends no phase before the latest step, and none of it is restored.
    """
    if state.over or not state.step or not _is_watched(fits, state) or state.step == state.began:
        return []
    latest, rows = _latest_end(fits, state, last), []
    for row, i in enumerate(state.fits):
        phase_rule, goes_well = rule(fits[i], _phase_of(state)), state.diverged[row] is None
        scores = state.scores[row] if state.scores else ()
        if state.step == latest:
            ends = latest != last or (phase_rule.restore and goes_well and bool(scores))
        else:
            ends = goes_well and bool(scores) and phase_rule.until is not None and bool(phase_rule.until(scores))
        rows += [row] if ends else []
    return rows


def _observed(spec: Spec, fits: Sequence[Fit], state: State, scores: Sequence[float | None] | None) -> State:
    """The state with the scores of one more point, and what trains where a score is the best of the phase so far."""
    if scores is None:
        return state
    before = state.scores or ((),) * len(state.fits)
    counted = [
        score is not None and np.isfinite(score) and since is None
        for score, since in zip(scores, state.diverged, strict=True)
    ]
    rows = zip(before, scores, counted, strict=True)
    after = tuple((*earlier, float(score)) if counts else earlier for earlier, score, counts in rows)  # type: ignore
    if not any(rule(fits[i], _phase_of(state)).restore for i in state.fits):
        return state._replace(scores=after)
    better = [
        counts and all(new[-1] > score for score in earlier)
        for counts, new, earlier in zip(counted, after, before, strict=True)
    ]
    now = _trained_part(spec, fits, state)
    best = now if state.best is None else jax.tree.map(functools.partial(_chosen_rows, better), now, state.best)
    return state._replace(scores=after, best=best)


def _trained_part(spec: Spec, fits: Sequence[Fit], state: State) -> Any:
    """(What of a state's parameters trains in its phase, its average, the model's state), as `vectorize.copied` has
    it."""
    trains = trained_leaves(specialize(spec, fits[state.fits[0]], state.masks[0]))
    average = None if state.average is None else part_of_average(state.average, trains)[0]
    parts = masks.split(state.params, trains)[0], average, state.model_state
    return vectorize.copied(parts)


def _chosen_rows(chosen: Sequence[bool], new: Any, old: Any) -> Any:
    """The rows of `new` where `chosen`, else those of `old`."""
    where: Any = jnp.where if isinstance(new, jax.Array) or isinstance(old, jax.Array) else np.where
    return where(np.asarray(chosen).reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _after_end(
    spec: Spec,
    fits: Sequence[Fit],
    data: Data | Stream,
    ends: Sequence[int],
    execution: Execution,
    state: State,
    rows: Sequence[int],
) -> Iterator[State]:
    """The states after the phase of these rows of a state: restored, and in the next phase or at the last step."""
    ended = _taken(state, rows)
    if ended.best is not None:
        restores = [
            rule(fits[i], _phase_of(state)).restore and since is None and bool(scores)
            for i, since, scores in zip(ended.fits, ended.diverged, ended.scores, strict=True)
        ]
        params, average, model_state = ended.params, ended.average, ended.model_state
        trains = trained_leaves(specialize(spec, fits[ended.fits[0]], ended.masks[0]))
        moved, frozen = masks.split(params, trains)
        moving, resting = (None, None) if average is None else part_of_average(average, trains)
        now = moved, moving, model_state
        moved, moving, model_state = jax.tree.map(functools.partial(_chosen_rows, restores), ended.best, now)
        params = masks.join(moved, frozen)
        average = None if moving is None or resting is None else joined_average(moving, resting)
        ended = ended._replace(params=params, average=average, model_state=model_state)
    ended = ended._replace(scores=(), best=None)
    if _phase_of(state) + 1 == len(fits[0].phases):
        yield ended._replace(step=ends[-1], over=True)
    else:
        yield from (next_state for next_state, _ in _next_phase(spec, fits, data, ends, execution, ended))


def _taken(state: State, rows: Sequence[int]) -> State:
    """The state of some of its fits, on the first device, whatever devices it stood on."""
    names = ("params", "optimizer", "average", "model_state")
    if jax.process_count() > 1:
        state = state._replace(**{name: host(getattr(state, name)) for name in names})
    part = select(state, rows)
    part = part._replace(**{name: on_first_device(getattr(part, name)) for name in (*names, "shared")})
    alone = lambda leaf: on_first_device(leaf) if isinstance(leaf, jax.Array) else leaf  # noqa: E731
    return part._replace(best=jax.tree.map(alone, part.best))


def select(state: State, rows: Sequence[int]) -> State:
    """The state of some of its fits: those in these rows."""
    chosen = np.array(rows)
    arrays = (state.params, state.optimizer, state.average, state.best, state.model_state)
    params, opt_state, average, best, model_state = jax.tree.map(lambda leaf: leaf[chosen], arrays)
    return state._replace(
        params=params,
        optimizer=opt_state,
        fits=tuple(state.fits[row] for row in rows),
        masks=tuple(state.masks[row] for row in rows),
        diverged=tuple(state.diverged[row] for row in rows),
        average=average,
        scores=tuple(state.scores[row] for row in rows) if state.scores else (),
        best=best,
        model_state=model_state,
    )


def _restored(state: State) -> State:
    """A state with arrays of its own on the device; one that went through NumPy has arrays for bools and numbers."""
    arrays = (state.params, state.optimizer, state.average, state.model_state, state.shared)
    params, opt_state, average, model_state, shared = jax.tree.map(jnp.array, arrays)
    rest = (state.fits, state.masks, state.diverged)
    fits, histories, diverged = jax.tree.map(lambda m: m if np.ndim(m) else np.asarray(m).item(), rest)
    return state._replace(
        step=int(state.step),
        params=params,
        optimizer=opt_state,
        fits=fits,
        masks=histories,
        diverged=diverged,
        average=average,
        model_state=model_state,
        shared=shared,
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
    keys: dict[Hashable, tuple[Spec, Hashable]] = {}
    for i, history in members:
        alike = vectorize.likeness(fits[i], history)
        if alike not in keys:
            keys[alike] = group_key(spec, fits[i], history)
        parts.setdefault(keys[alike], []).append((i, history))
    phase = len(members[0][1]) - 1 if members else 0
    passes = _passes(fits, ends, phase, step)
    for (specialized, _), part in parts.items():
        part_fits = [fits[i] for i, _ in part]
        width = vectorize.shared_width(specialized, part_fits, [history for _, history in part])
        bytes_of_one = features.features_bytes(specialized, part_fits[0], data, passes, execution.cache)
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


def _passes(fits: Sequence[Fit], ends: Sequence[int], phase: int, began: int) -> int:
    """Examples that pass at most through a fit in the phase of this number, which began at a step."""
    starts = [start for start, _ in fits[0].phases]
    return ([*starts, ends[-1]][phase + 1] - began) * batch_size(fits[0])


@switches.guarded()
def _first_state(spec: Spec, fits: Sequence[Fit], part: Part) -> State:
    """The state of a part before its first step."""
    members, histories = [fits[i] for i, _ in part], tuple(history for _, history in part)
    specialized = specialize(spec, members[0], histories[0])
    params, shared = share([fit.params for fit in members], _never_trained(members[0], histories[0]))
    rates = jnp.asarray(np.array([_rates(fit, 0)[0] for fit in members]))
    opt_state = begin(specialized, params, stack_numbers(specialized, members, histories), rates)
    model_state = stack([fit.model_state for fit in members])
    average = None
    if spec.averages:
        average = entered(None, params, model_state, *_places_of_average(spec, members, histories))
    numbers, undiverged = tuple(i for i, _ in part), (None,) * len(part)
    return State(0, params, opt_state, numbers, histories, undiverged, average, model_state=model_state, shared=shared)


def _places_of_average(spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]]) -> tuple[Mask, Any]:
    """(Which leaves train in the phase of the last masks of `histories`, `places` of `entered`)."""
    specialized = specialize(spec, fits[0], histories[0])
    places = averaged_places(specialized, stack_numbers(specialized, fits, histories), fits[0], histories[0])
    return trained_leaves(specialized), jax.tree.map(jnp.array, places)


def _never_trained(fit: Fit, history: Sequence[Mask]) -> Mask:
    """A tree like the parameters: which leaves none of the masks trains."""
    each = [masks.static(fit.params, mask) for mask in history]
    return jax.tree.map(lambda *trains: not any(trains), *each)


def _rates(fit: Fit, phase: int) -> np.ndarray:
    """The learning rate of each step, were it of this phase: float32 [steps]."""
    factor = rule(fit, phase).rate
    return fit.rates if factor == 1 else fit.rates * np.float32(factor)


def abstract(
    spec: Spec, fits: Sequence[Fit], histories: Sequence[Sequence[Mask]], shared: Collection[str] = ()
) -> State:
    """Shapes and dtypes of the arrays of a state, for fits whose masks so far are `histories`.

    They share the leaves of the paths `shared`. The best of a phase is there, whether or not the phase keeps it.
    """
    specialized = specialize(spec, fits[0], histories[0])
    hyper = stack_numbers(specialized, fits, histories)
    trains, until_then = trained_leaves(specialized), range(1, len(histories[0]) + 1)
    phase_entries = [
        _places_of_average(spec, fits, [history[:count] for history in histories])
        for count in (until_then if spec.averages else ())
    ]

    def arrays(params: Params, model_state: ModelState) -> Any:
        opt_state, average = begin(specialized, params, hyper, jnp.zeros(len(fits))), None
        for entry in phase_entries:
            average = entered(average, params, model_state, *entry)
        average_part = None if average is None else part_of_average(average, trains)[0]
        best = masks.split(params, trains)[0], average_part, model_state
        return params, opt_state, average, best, model_state

    def with_fits_axis(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(fits), *leaf.shape), leaf.dtype)

    first = jax.eval_shape(functools.partial(jax.tree.map, jnp.asarray), (fits[0].params, fits[0].model_state))
    per_fit = paths.each(lambda path, leaf: None if path in shared else with_fits_axis(leaf), first[0])
    params, opt_state, average, best, model_state = jax.eval_shape(
        arrays, per_fit, jax.tree.map(with_fits_axis, first[1])
    )
    state = State(0, params, opt_state, tuple(range(len(fits))), tuple(map(tuple, histories)), (None,) * len(fits))
    common = paths.each(lambda path, leaf: leaf if path in shared else None, first[0]) if shared else None
    return state._replace(average=average, best=best, model_state=model_state, shared=common)


def _reestimated(spec: Spec, fits: Sequence[Fit], data: Data | Stream, execution: Execution, state: State) -> State:
    """The state where a phase begins: what of the model's state is reestimated is so under the parameters of now."""
    members = [fits[i] for i in state.fits]
    specialized = specialize(spec, members[0], state.masks[0])
    if not specialized.reestimated:
        return state
    width = vectorize.shared_width(specialized, members, state.masks)
    mesh, _ = layout(specialized, members, width, data, execution)
    stages, on_mesh = specialized.reestimated, features.on_mesh(mesh, data)
    estimate = functools.partial(vectorize.reestimate, specialized, stages, members, width, mesh, on_mesh)
    estimate = functools.partial(estimate, shared=place(mesh, state.shared, by_fit=False))
    return _with_estimates(state, mesh, estimate)


def _with_estimates(state: State, mesh: Mesh | None, estimate: Callable[[Params, ModelState], ModelState]) -> State:
    """The state with what `estimate` gives for its parameters, and for their average."""
    params, model_state, average = place(mesh, (state.params, state.model_state, state.average))
    if average is not None:
        average = average._replace(model_state=estimate(*with_average(params, model_state, average)))
    return state._replace(model_state=estimate(params, model_state), average=average)


def cost_of(
    spec: Spec, fit: Fit, data: Data | Stream, history: Sequence[Mask], cache: FeatureCache | None = None
) -> Cost:
    """What the phase of the last mask of `history` costs one fit by itself, on one device. Nothing is trained.

    The leaves of `data` may be shapes and dtypes.
    """
    phase, specialized = len(history) - 1, specialize(spec, fit, history)
    passes = _passes([fit], [len(fit.rates)], phase, fit.phases[phase][0])
    parts = batch_size(fit) // spec.microbatch if spec.microbatch else 1
    short, inputs = features.shapes(specialized, fit, data, passes, cache)
    state, trains = abstract(spec, [fit], [history]), trained_leaves(specialized)
    trained, frozen = masks.split(state.params, trains)
    average = None if state.average is None else part_of_average(state.average, trains)[0]
    further = () if average is None and not state.model_state else (average, state.model_state)
    rows, batch = capacity(batch_size(fit)), batch_size(fit)
    if isinstance(inputs, Stream):
        rows, (examples, targets), fetch = *vectorize.chunk_shapes(inputs, batch), vectorize.slice_chunk
        rows = max(2, rows)
    else:
        examples, targets, fetch = inputs.inputs, inputs.targets, vectorize.gather
    order = jax.ShapeDtypeStruct((1, rows, batch), jnp.int32)
    rates = jax.ShapeDtypeStruct((1, rows), jnp.float32)
    hyper = stack_hyper(specialized, [fit], [history])
    arrays = (trained, state.optimizer, frozen, hyper, examples, targets, order, rates, (0, 0, 1))
    executable = vectorize.executable(short, None, 1, "map", *arrays, *further, fetch=fetch)
    step_cost = cost.analyze(executable, short.model == models.unrolled(short.model))
    if step_cost.flops is None:
        segment = functools.partial(vectorize.segment, short, None, 1, "map", fetch=fetch)
        return step_cost._replace(flops=flops.count(segment, *arrays, *further))
    return step_cost._replace(flops=parts * step_cost.flops)


LONGEST = 1.5
"""Seconds that a call of the compiled function is meant to take at most: between two of them a fit can be stopped, and
two are under way."""
FIRST_CALL = 16
"""Steps of the first call of a phase, whose duration says how many the others may have."""


@contextlib.contextmanager
def _phase(
    spec: Spec,
    fits: Sequence[Fit],
    data: Data | Stream,
    ends: Sequence[int],
    execution: Execution,
    state: State,
    prefix: tuple[str, ...] = (),
) -> Iterator[Callable[[int, State, int], tuple[State, Log, int]]]:
    """The function that trains a state further within its phase: (end, state, most) -> (later state, log, most).

    `prefix` is what is `Spec.settled`.

    `most` is how many steps its first call of the compiled function may have. Of a stream it reads ahead until the end
    of the `with`.
    """
    phase = _phase_of(state)
    execution.before_phase(state.fits, phase)
    members = [fits[i]._replace(rates=_rates(fits[i], phase)) for i in state.fits]
    specialized = specialize(spec, members[0], state.masks[0])
    width = vectorize.shared_width(specialized, members, state.masks)
    mesh, mode = layout(specialized, members, width, data, execution)
    if len(members) > 1:
        execution.on_message(vectorize.describe(len(members), len(fits), width, mesh, mode))
    shared_params = place(mesh, state.shared, by_fit=False)
    state = state._replace(shared=shared_params)
    variables = place(mesh, state.variables)
    passes = _passes(fits, ends, phase, state.began)
    specialized = replace(specialized, settled=prefix)
    short, inputs = features.skip_frozen_prefix(
        specialized,
        members[0],
        variables,
        width,
        data,
        passes,
        execution.cache,
        execution.on_message,
        vectorize.stack_keys([fit.key for fit in members]),
        state.shared_variables,
    )
    hyper, shared = _passed(specialized, members, state.masks, mesh, shared_params)
    renewed = [stage for stage in short.reestimated if stage in short.tracked]
    if renewed and isinstance(inputs, Stream):  # which is read for the estimate while it is read ahead
        inputs = replace(inputs, memory=inputs.memory // 2)
    with contextlib.ExitStack() as until_the_end:
        latest = _latest_end(fits, state, ends[-1])
        chunks: Iterator[vectorize.Chunk]
        if isinstance(inputs, Stream):
            reader = vectorize.read_chunks(inputs, members, width, mesh, state.step, latest)
            until_the_end.callback(_tell_waiting, execution, reader, time.perf_counter())
            chunks, fetch = until_the_end.enter_context(reader), vectorize.slice_chunk
        else:
            targets = place(mesh, inputs.targets, by_fit=False)
            segments = [state.step, *(end for end in ends if state.step < end <= latest)]
            chunks = vectorize.resident_chunks(inputs, targets, members, width, mesh, segments)
            fetch = vectorize.gather
        chunk: vectorize.Chunk | None = None

        costs: list[Cost] = []

        def call(
            trained: Params,
            opt_state: OptState,
            average: Average | None,
            model_state: ModelState,
            frozen: Params,
            start: int,
            stop: int,
        ) -> tuple[slice, float, Any]:
            """(The rows that the steps from `start` on have in the log, as many as there are data for; when the call
            began; what it gives, which the devices are still computing)."""
            nonlocal chunk
            chunk = next(chunks) if chunk is None or start == chunk.stop else chunk
            first, rows = chunk.start, slice(start - chunk.start, min(stop, chunk.stop) - chunk.start)
            examples = (chunk.inputs, chunk.targets, chunk.order, chunk.rates)
            arrays = (trained, opt_state, frozen, hyper, *examples, (first, rows.start, rows.stop))
            further = () if average is None and not model_state else (average, model_state)
            named: Any = {"fetch": fetch} if shared is None else {"fetch": fetch, "shared": shared}
            if not costs:
                executable = vectorize.executable(short, mesh, width, mode, *arrays, *further, **named)
                costs.append(cost.analyze(executable, short.model == models.unrolled(short.model)))
                execution.on_compiled(state.fits, costs[0])
            since = time.perf_counter()
            result = vectorize.run(short, mesh, width, mode, *arrays, *further, **named)
            if isinstance(inputs, Data) and first + rows.stop == chunk.stop:  # the host draws while the devices train
                chunk = next(chunks, chunk)
            return rows, since, result

        def train(end: int, state: State, most: int) -> tuple[State, Log, int]:
            before = settled.counts(specialized, state.optimizer)
            state, log, most = _advance(short, mesh, batch_size(members[0]), call, end, state, most, execution)
            settled.require_off(before, settled.counts(specialized, state.optimizer), state.step)
            state = state._replace(shared=shared_params)
            if renewed and state.step == end:
                estimate = functools.partial(vectorize.reestimate, short, renewed, members, width, mesh, inputs)
                estimate = functools.partial(estimate, shared=shared_params)
                state = _with_estimates(state, mesh, estimate)
            return state, log, most

        yield train


def _passed(
    spec: Spec,
    fits: Sequence[Fit],
    histories: Sequence[Sequence[Mask]],
    mesh: Mesh | None,
    shared_params: Params | None,
    split: Callable[..., tuple[Params, Params | None]] = share,
) -> tuple[Hyper, Shared | None]:
    """What `share_hyper` gives on the devices of a mesh, of what is shared only what is frozen."""
    hyper, shared = share_hyper(spec, fits, histories, shared_params, split)
    if shared is not None:
        frozen = masks.split(shared.params, trained_leaves(spec))[1] if shared.params is not None else None
        shared = place(mesh, shared._replace(params=frozen), by_fit=False)
    return place(mesh, hyper), shared


def programs(
    spec: Spec, fits: Sequence[Fit], data: Data, ends: Sequence[int], execution: Execution
) -> Iterator[tuple[tuple[int, ...], int, Callable[[], None]]]:
    """(Which of the fits, the number of a phase, what compiles their program of it) of a group, in the order in which
    `fit` takes them up.

    They are all programs but those of phases whose masks follow from parameters, and of what comes after a phase that
    ends by validation. Nothing is trained or made: a program is compiled for shapes and dtypes. Resident data under
    `jit` alone.
    """
    starts, first = [start for start, _ in fits[0].phases], fits[0]
    known = list(
        itertools.takewhile(
            lambda phase: not any(masks.is_strategy(fit.phases[phase][1]) for fit in fits), range(len(starts))
        )
    )

    def following(
        members: Part, phase: int, shared: Collection[str] | None
    ) -> Iterator[tuple[tuple[int, ...], int, Callable[[], None]]]:
        for part in _parts(spec, fits, data, ends, execution, starts[phase], members):
            never = _never_trained(fits[part[0][0]], part[0][1])
            if shared is None:
                same = vectorize.alike([fits[i].params for i, _ in part], never)
            else:
                same = [len(part) > 1 and path in shared and rests for path, rests in paths.items(never)]
            part_shared = [path for path, is_same in zip(paths.names(never), same, strict=True) if is_same]
            compile_part = functools.partial(_compile, spec, fits, data, ends, execution, part, part_shared)
            yield tuple(i for i, _ in part), phase, compile_part
            if phase + 1 in known and not _asks(rule(first, phase)):
                later = [(i, (*history, fits[i].phases[phase + 1][1])) for i, history in part]
                yield from following(later, phase + 1, part_shared)

    if known:
        yield from following([(i, (fit.phases[0][1],)) for i, fit in enumerate(fits)], 0, None)


def _compile(
    spec: Spec,
    fits: Sequence[Fit],
    data: Data,
    ends: Sequence[int],
    execution: Execution,
    part: Part,
    shared: Collection[str],
) -> None:
    """Compile what `_phase` runs for a part of a group that shares the leaves of the paths `shared`; nothing where a
    state is computed anew, or where what fits share of a prefix is not known."""
    phase, histories = len(part[0][1]) - 1, [history for _, history in part]
    members = [fits[i]._replace(rates=_rates(fits[i], phase)) for i, _ in part]
    specialized = specialize(spec, members[0], histories[0])
    if specialized.reestimated:
        return
    width = vectorize.shared_width(specialized, members, histories)
    mesh, mode = layout(specialized, members, width, data, execution)
    passes, batch = _passes(fits, ends, phase, members[0].phases[phase][0]), batch_size(members[0])
    different = 1
    if features.features_bytes(specialized, members[0], data, passes, execution.cache):
        if phase and members[0].model_state:
            return
        different = features.different_prefixes(specialized, members[::width], histories)
    short, inputs = features.shapes(specialized, members[0], data, passes, execution.cache, different)
    assert isinstance(inputs, Data)
    examples, targets = jax.tree.map(vectorize.shape_of, (inputs.inputs, inputs.targets))
    examples, targets = place(mesh, examples, by_fit=different > 1), place(mesh, targets, by_fit=False)
    state, trains = abstract(spec, members, histories, shared), trained_leaves(specialized)
    average = None if state.average is None else part_of_average(state.average, trains)[0]
    by_fit = (state.params, state.optimizer, average, state.model_state)
    params, opt_state, average, model_state = place(mesh, by_fit)
    trained, frozen = masks.split(params, trains)
    shared_leaves = place(mesh, state.shared, by_fit=False)
    hyper, common = _passed(specialized, members, histories, mesh, shared_leaves, vectorize.share_shapes)
    rows, devices = capacity(batch), vectorize.sharing(mesh)
    order = jax.ShapeDtypeStruct((len(members) // width, rows, -(-batch // devices) * devices), jnp.int32)
    rates = jax.ShapeDtypeStruct((len(members), rows), jnp.float32)
    arrays = (trained, opt_state, frozen, hyper, examples, targets, order, rates, (0, 0, 1))
    further = () if average is None and not model_state else (average, model_state)
    named: Any = {"fetch": vectorize.gather} if common is None else {"fetch": vectorize.gather, "shared": common}
    vectorize.executable(short, mesh, width, mode, *arrays, *further, **named)


def _tell_waiting(execution: Execution, reader: Reader, since: float) -> None:
    """Say for how long examples were waited for, where that is worth a line."""
    seconds, waited = time.perf_counter() - since, reader.waited
    execution.on_wait(waited)
    if waited > max(_WORTH_A_LINE, seconds / 10):
        what = f"{reader.stream.what}: their source is slower than the steps"
        execution.on_message(f"{waited:,.0f} of {seconds:,.0f} s were spent waiting for {what}")


_WORTH_A_LINE = 10.0
"""Seconds of waiting below which nothing is said of it."""


def layout(
    spec: Spec, fits: Sequence[Fit], width: int, data: Data | Stream, execution: Execution
) -> tuple[Mesh | None, Mode]:
    """The devices of a group, and how its fits share each of them."""
    mesh = vectorize.mesh_of_group(len(fits) // width, execution.devices, execution.devices_per_batch)
    if execution.mode == "pmap" and mesh is not None:
        return mesh, "pmap"
    platform = vectorize.platform_of(execution.devices)
    return mesh, vectorize.choose_mode(spec, fits, width, data, execution.many, platform)


class _Running(NamedTuple):
    """A call of the compiled function that was dispatched, and whose log is still to be read."""

    start: int
    stop: int
    rows: slice
    since: float
    """When it was dispatched."""
    log: Log


AHEAD = 2
"""Calls that are under way at once: the host reads the log of one while the devices train on in the next."""


@switches.guarded()
def _advance(
    spec: Spec,
    mesh: Mesh | None,
    batch: int,
    call: Callable[..., Any],
    end: int,
    state: State,
    most: int,
    execution: Execution,
) -> tuple[State, Log, int]:
    """(The state at step `end`, or earlier if it is to stop; the log of the way; steps that a call may have).

    It goes by calls of the compiled segment, each short enough that a fit can be stopped between two; the next is
    dispatched before the log of one is read. Under `jax.debug_nans` each is one step; raises InputError for the first
    leaf that is not finite then.
    """
    should_stop, profile, debugs = execution.should_stop, execution.profile, bool(jax.config.values["jax_debug_nans"])
    arrays = (state.params, state.optimizer, state.average, state.model_state)
    params, opt_state, average, model_state = place(mesh, arrays)
    trained, frozen = masks.split(params, trained_leaves(spec))
    moving, resting = (None, None) if average is None else part_of_average(average, trained_leaves(spec))
    step, diverged = state.step, state.diverged
    logs: list[Log] = []
    running: deque[_Running] = deque()
    many = jax.process_count() > 1  # whose logs are gathered by all of them, after what was dispatched before
    ended, saw_end, before = 0.0, True, None

    def read() -> None:
        """Read the log of the earliest call that is under way."""
        nonlocal diverged, most, ended, saw_end
        earliest, worked = running.popleft(), False
        is_there = not many and earliest.log.loss.is_ready()
        waited = not is_there
        while not many and not is_there and execution.meanwhile():
            worked, is_there = True, earliest.log.loss.is_ready()
        log = jax.tree.map(lambda curve: curve[:, earliest.rows], host(earliest.log))
        # A call begins when it is dispatched, or when the one before it ends, which is seen if the host waits for it.
        is_timed = not worked and (saw_end or earliest.since >= ended)
        seconds, ended = time.perf_counter() - max(earliest.since, ended), time.perf_counter()
        saw_end = waited and not worked
        diverged = _first_not_finite(diverged, earliest.start, log)
        if debugs and any(since == earliest.start for since in diverged):
            row = diverged.index(earliest.start)
            raise InputError(_not_finite(state.fits[row], earliest.start, row, before, trained))
        logs.append(_without_diverged(diverged, earliest.start, log))
        execution.on_steps((earliest.stop - earliest.start) * len(state.fits))
        if is_timed:
            most = agreed(min(capacity(batch), _steps_for_longest(earliest.stop - earliest.start, seconds)))

    most = min(most, capacity(batch))
    while step < end and not ((logs or running) and should_stop()):
        if None not in diverged:
            while running:
                read()
            logs.append(_empty_log(len(diverged), end - step, len(spec.penalties)))
            step = end
            break
        stop = min(end, step + (1 if debugs else most))
        stop = profile.before(step, stop) if profile else stop
        before = jax.tree.map(np.array, host(trained)) if debugs else None
        with jax.debug_nans(False):
            rows, since, result = call(trained, opt_state, moving, model_state, frozen, step, stop)
        trained, opt_state, moving, new_state, log = result
        stop, model_state = step + rows.stop - rows.start, new_state or model_state
        running.append(_Running(step, stop, rows, since, log))
        # The first call of a phase says how many steps the next may have; a trace and a search are of one call.
        alone = many or debugs or (profile and not profile.is_done) or most <= FIRST_CALL
        while len(running) > (0 if alone else AHEAD - 1):
            read()
        step = stop
        if profile:
            profile.after(step)
    while running:
        read()
    log = jax.tree.map(lambda *curves: np.hstack(curves), *logs)
    params = masks.join(trained, frozen)
    average = None if moving is None or resting is None else joined_average(moving, resting)
    state = state._replace(step=step, params=params, optimizer=opt_state, diverged=diverged, average=average)
    return state._replace(model_state=model_state), log, most


def _not_finite(fit: int, step: int, row: int, before: Params, after: Params) -> str:
    """What of a fit's parameters, in a row of these trees, is not finite before a step, or else after it."""
    leaves: dict[str, Any] = {}
    for when, tree in (("before", before), ("after", host(after))):
        leaves = dict(paths.items(tree))
        bad = [path for path, leaf in leaves.items() if not np.isfinite(np.asarray(leaf[row], np.float64)).all()]
        if bad:
            count = f"the first of {len(bad)} such leaves, of {len(leaves)} that train"
            return f"jax.debug_nans: fit {fit} of its group: '{bad[0]}' is not finite {when} step {step}, {count}"
    sizes = {path: float(np.abs(np.asarray(leaf[row], np.float64)).max(initial=0)) for path, leaf in leaves.items()}
    path = max(sizes, key=lambda path: sizes[path])
    return (
        f"jax.debug_nans: fit {fit} of its group: the loss or the gradient is not finite in step {step}, and all "
        f"leaves still are; the largest number is in '{path}', {sizes[path]:.3g}"
    )


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
    """The states at the beginning of the phase that begins at the state's step, and for each its rows of the state.

    The arrays stay on the devices.
    """
    number = _phase_of(state) + 1
    entered_masks = []
    for row, i in enumerate(state.fits):
        mask = fits[i].phases[number][1]
        looks = masks.is_strategy(mask)
        entered_masks.append(_evaluated(mask, on_first_device(state.params_and_state(row)[0])) if looks else mask)
    histories = [(*history, mask) for history, mask in zip(state.masks, entered_masks, strict=True)]
    members = list(zip(state.fits, histories, strict=True))
    for part in _parts(spec, fits, data, ends, execution, state.step, members):
        rows = [state.fits.index(i) for i, _ in part]
        next_state = _taken(state, rows) if jax.process_count() > 1 or len(rows) < len(state.fits) else state
        next_fits, part_histories = [fits[i] for i in next_state.fits], tuple(histories[row] for row in rows)
        next_state = _unshared(next_state, _never_trained(next_fits[0], part_histories[0]))
        average = next_state.average
        if spec.averages:
            average = entered(average, next_state.params, {}, *_places_of_average(spec, next_fits, part_histories))
        opt_state = _carried(spec, fits, number, next_state, part_histories)
        next_state = next_state._replace(
            optimizer=opt_state, masks=part_histories, average=average, began=state.step, scores=(), best=None
        )
        yield _reestimated(spec, fits, data, execution, _settled(spec, fits, execution, next_state)), rows


def _unshared(state: State, never: Mask) -> State:
    """The state with an axis of fits for what is shared, but may train now: `never` says what has not. One fit alone
    shares nothing."""
    if state.shared is None:
        return state
    count = len(state.fits)

    def none(leaf: Any) -> bool:
        return leaf is None

    per_fit, structure = jax.tree.flatten(state.params, is_leaf=none)
    shared = jax.tree.leaves(state.shared, is_leaf=none)
    stays = [rests and count > 1 for rests in jax.tree.leaves(never)]
    rows = list(zip(per_fit, shared, stays, strict=True))
    per_fit = [
        jnp.broadcast_to(s, (count, *s.shape)) if leaf is None and not rests else leaf for leaf, s, rests in rows
    ]
    shared = [s if leaf is None and rests else None for leaf, s, rests in rows]
    whole = jax.tree.unflatten(structure, shared) if any(leaf is not None for leaf in shared) else None
    return state._replace(params=jax.tree.unflatten(structure, per_fit), shared=whole)


def _carried(
    spec: Spec, fits: Sequence[Fit], number: int, state: State, histories: Sequence[tuple[Mask, ...]]
) -> OptState:
    """The optimizer's state of each fit, made fit for the phase of this number, which begins with these masks; for all
    fits at once where their masks are the same. From and to a phase whose mask moves it begins anew."""
    members = [fits[i] for i in state.fits]
    rates = jnp.asarray(np.array([_rates(fit, number)[state.step] for fit in members], np.float32))
    if any(rule(members[0], phase).schedule is not None for phase in (number - 1, number)):
        specialized = specialize(spec, members[0], histories[0])
        return begin(specialized, state.params, stack_numbers(specialized, members, histories), rates)
    numbers = vectorize.columns([fit.numbers for fit in members])

    def carry(
        history: tuple[Mask, ...], opt_state: OptState, per_fit: Params, rate: jax.Array, numbers: Any
    ) -> OptState:
        tx = optimizers.build(spec.optimizer, rate, numbers)
        until_then = (history[:-1], history)
        old, new = ((gathered(spec, members[0].params, each[-1]), masks.since(*each)) for each in until_then)
        return optimizer.carry(tx, old, new, opt_state, joined(per_fit, state.shared))

    stacked = (state.optimizer, state.params, rates, numbers)
    alike = {vectorize.likeness(fit, history) for fit, history in zip(members, histories, strict=True)}
    if len(alike) == 1:
        carried = jax.vmap(functools.partial(carry, histories[0]))(*stacked)
    else:
        each = [
            carry(history, *jax.tree.map(lambda leaf, row=row: leaf[row], stacked))
            for row, history in enumerate(histories)
        ]
        carried = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    seen = {id(leaf) for leaf in jax.tree.leaves(state.params)}

    def apart(leaf: jax.Array) -> jax.Array:
        """The leaf, or a copy of one that another place has: it could not be given up to the segment twice."""
        copied = jnp.array(leaf) if id(leaf) in seen else leaf
        seen.add(id(copied))
        return copied

    return jax.tree.map(apart, carried)


def _settled(spec: Spec, fits: Sequence[Fit], execution: Execution, state: State) -> State:
    """The state on the devices on which it will be trained."""
    members = [fits[i] for i in state.fits]
    width = vectorize.shared_width(specialize(spec, members[0], state.masks[0]), members, state.masks)
    mesh = vectorize.mesh_of_group(len(members) // width, execution.devices, execution.devices_per_batch)
    by_fit = (state.params, state.optimizer, state.average, state.model_state)
    by_fit = on_first_device(by_fit) if mesh is None else place(mesh, by_fit)
    shared = on_first_device(state.shared) if mesh is None else place(mesh, state.shared, by_fit=False)
    params, opt_state, average, model_state = by_fit
    state = state._replace(params=params, optimizer=opt_state, average=average, model_state=model_state)
    return state._replace(shared=shared)


def _evaluated(mask: Mask | Callable[[Params], Mask], params: Params) -> Mask:
    """The mask of a phase; a function is called with a tree of its own, which it may write into."""
    return mask(jax.tree.map(jnp.asarray, params)) if masks.is_strategy(mask) else mask
