"""The checks of a schedule of masks: what its functions trace to, and what it does in the steps of a short fit."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, optimizer, optimizers, paths
from tljax.audit import fits, problems
from tljax.audit.cases import Case
from tljax.audit.lines import Check, line, same_bytes
from tljax.types import InputError, MaskSchedule, Params, Seen

MOST_STEPS = 48
"""Steps of the short fit, at most; else three choices and one step more."""
LARGEST_CONSTANT = 64
"""Numbers of an array that a schedule may hold by itself."""


def traced(case: Case, schedule: MaskSchedule) -> list[Check]:
    """The lines on a schedule that need no step: by tracing, under the optimizer of the checks."""
    trained, _ = masks.split(case.params, schedule.scope)
    trained = jax.tree.map(jnp.asarray, trained)
    checks = [line("the optimizer has what it sees", _moments_there, trained, schedule)]
    if checks[0].passed:
        promises = {
            "mask and memory keep their form": _form_kept,
            "each step traces the same": _traces_the_same,
            "the schedule holds no data": _holds_no_data,
        }
        checks += [line(name, promise, trained, schedule) for name, promise in promises.items()]
    return checks


def _optimizer() -> Any:
    return optimizers.build(fits.program((), None).optimizer, fits.RATE, dict.fromkeys(fits.NUMBERS, 0.5))


def _moments_there(trained: Params, schedule: MaskSchedule) -> str:
    fields = optimizer.moments(trained, _optimizer().init(trained))
    wanted = sorted({*schedule.sees} - {"gradients", "loss"})
    missing = [name for name in wanted if name not in fields]
    assert not missing, f"AdamW's state has no '{missing[0]}', it has {', '.join(fields)}"
    return f"{', '.join(wanted) or 'no moments'}, of {', '.join(fields)}"


def _form_kept(trained: Params, schedule: MaskSchedule) -> str:
    tx = optimizer.scheduled(_optimizer(), schedule)

    def twice(params: Params) -> Any:
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params, loss=jnp.zeros(()))
        return updates, state.memory

    _, memory = jax.eval_shape(twice, trained)
    leaves = jax.tree.leaves(memory)
    return f"in two steps; the memory has {sum(leaf.size for leaf in leaves)} numbers in {len(leaves)} arrays"


def _program(trained: Params, schedule: MaskSchedule) -> Any:
    """What `choose` traces to."""
    state, key = _optimizer().init(trained), jax.random.key(0)
    fields = optimizer.moments(trained, state)
    groups = None
    if schedule.groups is not None:
        number = dict(paths.items(schedule.groups))
        groups = paths.each(lambda path, leaf: int(number[path]), trained)

    def choose(memory: Any, step: Any, key: Any, params: Any, gradients: Any, loss: Any, moments: Any) -> Any:
        start = params if schedule.returns else None
        sees = gradients if "gradients" in schedule.sees else None, loss if "loss" in schedule.sees else None
        return schedule.choose(memory, Seen(step, key, params, *sees, moments, groups, start))

    moments = {name: tree for name, tree in fields.items() if name in schedule.sees}
    memory = jax.tree.map(jnp.asarray, schedule.init(trained, key))
    arguments = (memory, jnp.zeros((), jnp.int32), key, trained, trained, jnp.zeros(()), moments)
    return jax.make_jaxpr(choose)(*arguments)


def _traces_the_same(trained: Params, schedule: MaskSchedule) -> str:
    first, second = (_program(trained, schedule) for _ in range(2))
    remedy = "what changes from step to step is in the memory, and what is drawn follows from Seen.key"
    assert str(first) == str(second), f"two traces of choose are two programs: {remedy}"
    pairs = zip(first.consts, second.consts, strict=True)
    assert all(same_bytes(a, b) for a, b in pairs), f"two traces of choose hold other numbers: {remedy}"
    return f"{len(first.jaxpr.eqns)} operations"


def _holds_no_data(trained: Params, schedule: MaskSchedule) -> str:
    large = [np.shape(array) for array in _program(trained, schedule).consts if np.size(array) > LARGEST_CONSTANT]
    assert not large, (
        f"choose holds an array of shape {list(large[0])} that is not in its memory: data, of a test set for instance, "
        "must not decide a mask"
    )
    return f"no array of more than {LARGEST_CONSTANT} numbers outside its memory"


class _Step(NamedTuple):
    before: Params
    after: Params
    on: Params


def trained(case: Case, schedule: MaskSchedule) -> list[Check]:
    """The lines on a schedule that is all of a case's phases, by the steps of a fit."""
    model, data = case.problem.model, problems.data(case.problem.shape)
    assert model is not None
    count = min(MOST_STEPS, 3 * schedule.every + 1)
    steps: list[_Step] = []
    before = jax.tree.map(np.asarray, case.params)
    enough = "no more is on than there are slots"
    try:
        program = fits.program(model, case.applied)
        for state in fits.states(program, case.params, schedule, data, count, case.model_state):
            trees = state.params, state.optimizer.on
            after, on = (jax.tree.map(lambda leaf: np.array(leaf[0]), tree) for tree in trees)
            steps.append(_Step(before, after, on))
            before = after
    except InputError as error:
        return [Check(enough, False, str(error))]
    promises = {
        "what is off keeps its bytes": _off_kept,
        "something trains in each step": _something_on,
        "new leaves are on in time": _fresh_on,
    }
    checks = [line(name, promise, case, schedule, steps) for name, promise in promises.items()]
    return [*checks, Check(enough, True, f"{schedule.slots} slots")] if schedule.slots else checks


def _rows(step: _Step) -> list[tuple[str, Any, Any, Any]]:
    """(path, before, after, where it was on) of each leaf of the scope."""
    on, before, after = (dict(paths.items(tree)) for tree in (step.on, step.before, step.after))
    return [(path, before[path], after[path], np.broadcast_to(on[path], np.shape(before[path]))) for path in on]


def _off_kept(case: Case, schedule: MaskSchedule, steps: Sequence[_Step]) -> str:
    start, count = dict(paths.items(case.params)), 0
    for number, step in enumerate(steps):
        for path, before, after, on in _rows(step):
            kept = np.asarray(start[path])[~on] if schedule.returns else before[~on]
            assert same_bytes(kept, after[~on]), f"'{path}' changed in step {number}, in which it is off"
            count += int((~on).sum())
    what = "have the bytes with which they began" if schedule.returns else "kept their bytes"
    return f"{count:,} numbers that were off in one of {len(steps)} steps {what}"


def _something_on(case: Case, schedule: MaskSchedule, steps: Sequence[_Step]) -> str:
    shares = []
    for number, step in enumerate(steps):
        rows = _rows(step)
        on = sum(int(o.sum()) for *_, o in rows)
        assert on, f"nothing trains in step {number}: let something train"
        shares.append(on / sum(o.size for *_, o in rows))
    return f"{100 * min(shares):.3g} to {100 * max(shares):.3g} % of the numbers of its scope, in {len(steps)} steps"


def _fresh_on(case: Case, schedule: MaskSchedule, steps: Sequence[_Step]) -> str:
    drawn = [path for path, m in paths.items(case.must) if m]
    able = {path for step in steps for path, *_, on in _rows(step) if on.any()}
    never = [path for path in drawn if path not in able]
    assert not never, f"{paths.some(never)}, drawn anew, is off in all of {len(steps)} steps: train it too"
    return f"{len(drawn)} new leaves, in {len(steps)} steps"
