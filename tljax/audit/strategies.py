"""`check_strategy`: the promises of every strategy, proven on small models and odd pytrees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import batch_stats, initialization, masks, models, paths, plugins, train
from tljax.audit import ends, fits, problems, schedules
from tljax.audit.cases import Case, ask, at_boundary, evaluate
from tljax.audit.cases import case as build_case
from tljax.audit.lines import Check, changed, copy, line, same_bytes
from tljax.models import randomness
from tljax.types import Context, InputError, Mask, MaskSchedule, Method, ModelState, Params

CNN = "cnn:norm=true"
"""The second model: norms, so that norm_only has something to train."""

VIT = "vit:width=8:depth=1:heads=2:patch=4"
"""The third, tried by what applies to neither of the others: it has attention."""

_ROUNDING = 1e-5
_BOOKKEEPING = 32
"""FLOPs a number that selecting and scaling updates may cost beside full training's.

XLA counts what its fusions compute twice: masks by rows, [n, 1], cost 19.4 here, where full training costs 82.
"""


def check_strategy(
    strategy: str | Method | Callable[..., Any], options: Mapping[str, Any] | None = None, *, model: str = "mlp"
) -> list[Check]:
    """The checks of a strategy (a spec, a Method, or the function itself), a line each.

    The strategy is tried on `model`, a small CNN with norms, and five odd pytrees; where it applies to neither model,
    on a small vision transformer too. If it raises InputError for one of them, it does not apply there (`passed` is
    None); it must apply to a model, the first of which carries the proofs that train. For a model that draws in
    training (dropout), a line says whether all of its randomness follows its key. Raises InputError if the text names
    no strategy, or `model` is unknown.

    >>> [check.name for check in check_strategy(lambda params, context: "head") if check.passed is False][:2]
    ['lint on mlp', 'lint on cnn:norm=true']
    """
    method, options = _method_and_options(strategy, options)
    model_problems = [problems.from_model(name) for name in dict.fromkeys((model, CNN))]
    linted = [_lint(method, options, problem) for problem in model_problems]
    if all(check.passed is None for check, _ in linted):
        model_problems.append(problems.from_model(VIT))
        linted.append(_lint(method, options, model_problems[-1]))
    linted += [_lint(method, options, problem) for problem in problems.trees()]
    checks = [check for check, _ in linted]
    checks.append(_applies_to_a_model(checks[: len(model_problems)]))
    cases = [case for _, case in linted if case]
    proofs = {
        "new leaves train in every phase": _fresh_trains,
        "leaves what it is given untouched": _inputs_untouched,
        "deterministic in its key": _deterministic,
        "the same mask from shapes alone": _same_from_shapes,
    }
    checks += [line(name, _on_all, proof, cases) for name, proof in proofs.items() if cases]
    if method.data_driven and cases:
        checks[-1] = Check(checks[-1].name, None, "does not apply: it looks at data (DATA_DRIVEN)")
    if method.finish and cases:
        checks += ends.untrained(cases, _on_all)
        if checks[-1].name == ends.FORM:  # no end can be tried after training
            method = method._replace(finish=None)
            cases = [case._replace(method=method) for case in cases]
    return [
        *checks,
        *_randomness_checks(model_problems[0]),
        *next((_with_schedule_checks(case) for case in cases if case.problem.model), []),
    ]


def _method_and_options(strategy: Any, options: Mapping[str, Any] | None) -> tuple[Method, Mapping[str, Any]]:
    if isinstance(strategy, str):
        method, written = plugins.method(strategy)
        return method, {**written, **(options or {})}
    return strategy if isinstance(strategy, Method) else Method(strategy), options or {}


def _lint(method: Method, options: Mapping[str, Any], problem: problems.Problem) -> tuple[Check, Case | None]:
    """Lint a strategy on one pytree; returns the line, and the case if it passed."""
    name = f"lint on {problem.name}"
    try:
        case = build_case(method, options, problem)
        phases = ask(case)
    except InputError as error:
        return Check(name, None, f"does not apply: {error}"), None
    except (Exception, SystemExit) as error:  # a fault of the strategy's own, whatever it is
        return Check(name, False, f"raises {type(error).__name__}: {' '.join(str(error).split())}"), None
    seen: list[Case] = []

    def promise() -> str:
        masks.lint_phases(case.params, phases)
        seen.append(case._replace(phases=phases, evaluated=evaluate(case, phases)))
        masks.lint_phases(case.params, seen[0].evaluated)
        return ", then ".join(_count(case.params, phase.mask) for phase in seen[0].evaluated)

    check = line(name, promise)
    return check, seen[0] if check.passed else None


def _count(params: Params, mask: Mask | MaskSchedule) -> str:
    moves = isinstance(mask, MaskSchedule)
    rows = masks.table(params, mask.scope if moves else mask)
    numbers = f"{sum(row.trained_size for row in rows)} of {sum(row.size for row in rows)} numbers"
    return f"{numbers} may train, by a schedule" if moves else f"{numbers} train"


def _applies_to_a_model(tried: Sequence[Check]) -> Check:
    """The line on which models a strategy applies to, of their lints: those that it passes."""
    name = "applies to a model"
    names: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for check in tried:
        names[check.passed].append(check.name.removeprefix("lint on "))
    if names[True]:
        return Check(name, True, ", ".join(names[True]))
    if names[False]:
        return Check(name, None, f"not known: the lint fails on {', '.join(names[False])}")
    return Check(name, False, tried[0].detail)


def _randomness_checks(problem: problems.Problem) -> list[Check]:
    """The line on what a model draws in training (dropout, noise); [] if the model draws nothing."""
    assert problem.model is not None
    faults = randomness.faults(problem.model, problem.shape)
    stages = randomness.stages(problem.model, problem.shape)
    return [line("dropout follows its key", _follows_key, problem, faults, stages)] if faults or stages else []


def _follows_key(problem: problems.Problem, faults: Sequence[str], stages: Sequence[str]) -> str:
    assert not faults, "; ".join(faults)
    assert problem.model is not None
    model, images = problem.model, problems.data(problem.shape).inputs[0]
    keys = (None, *map(jax.random.key, (0, 0, 1)))
    without, first, repeated, other = (np.asarray(models.apply(model, problem.drawn, images, key=key)) for key in keys)
    assert np.array_equal(first, repeated), "one key gives two outputs"
    assert not np.array_equal(first, without), "its output with a key is its output without one"
    assert not np.array_equal(first, other), "two keys give one output"
    return f"in {', '.join(stages)}: none without a key, the same with the same, others with another"


def _on_all(proof: Callable[[Case], None], cases: Sequence[Case]) -> str:
    for case in cases:
        try:
            proof(case)
        except (AssertionError, InputError) as error:
            raise AssertionError(f"on {case.problem.name}: {error}") from error
    return "on " + ", ".join(case.problem.name for case in cases)


def _fresh_trains(case: Case) -> None:
    masks.lint_phases(case.params, case.evaluated, case.must)


def _inputs_untouched(case: Case) -> None:
    params, context = copy(case.params), initialization.shown(case.context)
    for phase in ask(case, params, context):
        if masks.is_strategy(phase.mask):
            phase.mask(params, context)
    pairs = {
        "params": (case.params, params),
        "context.fresh": (case.context.fresh, context.fresh),
        "context.source_params": (case.context.source_params, context.source_params),
    }
    for name, (before, after) in pairs.items():
        paths.same_structure(before, after, name, f"what the strategy left of {name}")
        wrote = changed(before, after)
        assert not wrote, f"it wrote into {name}: {paths.some(wrote)}"


def _deterministic(case: Case) -> None:
    again = evaluate(case, ask(case, state=1), state=1)
    _same_phases(case.evaluated, again, "two calls with one key differ: draw from context.key alone")


def _same_from_shapes(case: Case) -> None:
    shapes, source = jax.eval_shape(lambda: (case.params, case.problem.source))
    remedy = "shapes alone do not give the same mask: if it depends on values, set DATA_DRIVEN = True"
    context: Context = initialization.shown(case.context)._replace(source_params=source, gradient=None, fisher=None)
    try:
        abstract = ask(case, shapes, context)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{remedy} ({type(error).__name__}: {error})") from error
    _same_phases(case.phases, abstract, remedy)


def _same_phases(first: Sequence[Any], second: Sequence[Any], message: str) -> None:
    assert [phase.start for phase in first] == [phase.start for phase in second], message
    for a, b in zip(first, second, strict=True):
        later = masks.is_strategy(a.mask), masks.is_strategy(b.mask)
        moves = isinstance(a.mask, MaskSchedule) or isinstance(b.mask, MaskSchedule)
        assert all(later) or (not any(later) and (a.mask == b.mask if moves else masks.equal(a.mask, b.mask))), message


class _Proof(NamedTuple):
    """A case, and its short fits."""

    case: Case
    model: Any
    fitted: fits.Fitted
    short: fits.Fitted
    """A fit of the same phases, one step each."""
    start: Params
    """The parameters that the fit began from, as they are after it."""
    data: train.Data


def _with_schedule_checks(case: Case) -> list[Check]:
    """The lines on training, after those on the schedules among a case's phases; these alone if one of them fails."""
    mask_schedules = [phase.mask for phase in case.phases if isinstance(phase.mask, MaskSchedule)]
    lines = [check for schedule in mask_schedules for check in schedules.traced(case, schedule)]
    if any(check.passed is False for check in lines):
        return lines
    if len(case.phases) == 1 and mask_schedules:
        lines += schedules.trained(case, mask_schedules[0])
    return [*lines, *_training_checks(case)]


def _training_checks(case: Case) -> list[Check]:
    """Train a case's model for a few steps; returns the lines on that."""
    model, data = case.problem.model, problems.data(case.problem.shape)
    assert model is not None
    names = ["frozen leaves keep their bytes", "trained leaves move", "one compilation a phase", "jit equals no jit"]
    try:
        phases = [
            phase.mask if isinstance(phase.mask, MaskSchedule) else at_boundary(case, phase) for phase in case.phases
        ]
        start = copy(case.params)
        program = fits.program(model, case.applied)
        fitted = fits.fit(program, start, phases, data, model_state=case.model_state)
        short = fits.fit(program, case.params, fitted.phases, data, 1, case.model_state)
    except (Exception, SystemExit) as error:
        return [Check(f"trains on {case.problem.name}", False, f"{type(error).__name__}: {error}")]
    proof = _Proof(case, model, fitted, short, start, data)
    promises = [_frozen_kept, _trained_moved, _compiled_once, _equals_without_jit]
    checks = [line(name, promise, proof) for name, promise in zip(names, promises, strict=True)]
    counted = line("FLOPs at most those of full training", _flops_bounded, proof)
    moves = any(isinstance(phase.mask, MaskSchedule) for phase in case.phases)
    if case.method.adapt or moves:
        counted = counted._replace(name="FLOPs of a step", passed=None if counted.passed is False else True)
    if case.method.adapt:
        checks.append(line("adapt and merge keep the outputs", _outputs_kept, proof))
    if case.method.finish:
        checks.append(ends.trained(case, model, fitted.params, data.inputs[0]))
    return [*checks, counted]


def _leaves_by_phase(proof: _Proof) -> list[tuple[int, str, Any, Any, Any]]:
    """The leaves of every phase: (phase, path, before, after, where it trains: bool or bool array)."""
    rows = []
    for i, mask in enumerate(proof.fitted.masks):
        before, after = proof.fitted.params[i : i + 2]
        leaves = paths.items(before, after, mask, masks.static(proof.case.params, mask))
        for path, b, a, m, t in leaves:
            trains = t and path not in proof.fitted.still
            rows.append((i, path, b, a, masks.chosen(m) if trains and masks.selects(m) else trains))
    return rows


def _frozen_kept(proof: _Proof) -> str:
    count = 0
    for i, path, before, after, trains in _leaves_by_phase(proof):
        frozen = ~np.broadcast_to(trains, np.shape(before))
        assert same_bytes(before[frozen], after[frozen]), f"'{path}' is frozen in phase {i}, but changed"
        count += int(frozen.sum())
    wrote = changed(proof.case.params, proof.start)
    assert not wrote, f"the fit wrote into the parameters it began from: {paths.some(wrote)}"
    text = f"{count} frozen numbers on {proof.case.problem.name}, under AdamW with decay, clipping and L2"
    text += _proved_frozen(proof) if count else ""
    rest = _rewritten(proof)
    return f"{text}; so do the residuals that adapt left: {paths.some(rest)}" if rest else text


_MOST_READ = 4
"""The phases of a strategy whose training step is read."""


def _proved_frozen(proof: _Proof) -> str:
    """What the audit of the training step of each phase says of what is frozen. Raises AssertionError if it moves."""
    case, open_paths = proof.case, []
    phases = range(len(proof.fitted.programs))[:_MOST_READ]
    for phase in phases:
        try:
            report = fits.read(proof.fitted, phase, case.problem.shape, case.model_state)
        except InputError as error:
            return f"; not read as a program: {error}"
        for finding in report.select("frozen", "refuted"):
            raise AssertionError(f"'{finding.path}' is frozen in phase {phase}, but {finding.detail}")
        open_paths += [finding.path for finding in report.select("frozen", "not decided")]
    if open_paths:
        return f"; not proved for all inputs: {paths.some(list(dict.fromkeys(open_paths)), 2)}"
    first = "" if len(phases) == len(proof.fitted.programs) else f" of the first {_MOST_READ} phases"
    return f"; proved for all inputs{first}"


def _rewritten(proof: _Proof) -> list[str]:
    """The paths of the frozen leaves to which adapt gave other values than the source's."""
    before, source = dict(paths.items(proof.case.params)), dict(paths.items(proof.case.ordinary))
    frozen = [path for _, path, *_, trains in _leaves_by_phase(proof) if trains is False]
    return [path for path in dict.fromkeys(frozen) if path in source and not same_bytes(before[path], source[path])]


def _trained_moved(proof: _Proof) -> str:
    # What the next softmax or batch norm takes away, as the bias of an attention's keys, has a gradient of rounding
    # alone: by gradients its rate may be so small that decay moves it by less than half a unit in its last place.
    half_a_unit = np.finfo(np.float32).eps / 2
    tiny = {
        (i, path)
        for i, mask in enumerate(proof.fitted.masks)
        for path, rate in paths.items(mask)
        if not isinstance(rate, bool) and np.ndim(rate) == 0 and abs(rate) * fits.RATE * fits.DECAY < half_a_unit
    }
    for i, path, before, after, trains in _leaves_by_phase(proof):
        trains = trains if (i, path) not in tiny else False
        assert not np.any(trains) or not same_bytes(before, after), f"'{path}' trains in phase {i}, but did not move"
        assert np.isfinite(after).all(), f"'{path}' is not finite after phase {i}"
    return f"each in {fits.STEPS} steps of each of its phases"


def _compiled_once(proof: _Proof) -> str:
    phases, compiled, again = len(proof.fitted.masks), proof.fitted.compiled, proof.short.compiled
    assert compiled <= phases, f"{compiled} compilations for {phases} phases, in two segments each"
    assert not again, f"{again} more compilations for the same phases of another length"
    shared = "" if compiled == phases else ", the others shared with an earlier phase or fit"
    return f"{compiled} for {phases} phases{shared}; none for a second fit of another length"


def _equals_without_jit(proof: _Proof) -> str:
    largest = _largest_difference(proof.short.params[-1], _without_jit(proof, proof.case.params))
    counted = f"after a step of each phase: largest difference {largest:.1e}"
    if largest > _ROUNDING:
        # Deep networks with batch norms over few numbers make much of rounding. In float64 that is next to nothing.
        with jax.enable_x64(True):
            case, wider = proof.case, jax.tree.map(_in_float64, (proof.case.params, proof.case.model_state))
            program = fits.program(proof.model, case.applied)
            # Pixels become float32, and so would be rounded what a model makes of them before its first parameter.
            data = replace(proof.data, inputs=jax.numpy.asarray(proof.data.inputs, np.float64) / 255)
            compiled = fits.fit(program, wider[0], proof.short.phases, data, 1, wider[1]).params[-1]
            wide_difference = _largest_difference(compiled, _without_jit(proof._replace(data=data), *wider))
        assert wide_difference <= _ROUNDING, (
            f"they differ by {largest:.1e}, and by {wide_difference:.1e} in float64: more than rounding"
        )
        counted += f", and {wide_difference:.1e} in float64"
    return f"to rounding, {counted}"


def _without_jit(proof: _Proof, params: Params, model_state: ModelState | None = None) -> Params:
    """The parameters after a step of each phase without jit."""
    with jax.disable_jit(), fits.quick_compilation():
        case = proof.case
        program = fits.program(proof.model, case.applied)
        state = case.model_state if model_state is None else model_state
        return fits.fit(program, params, proof.short.phases, proof.data, 1, state).params[-1]


def _in_float64(leaf: Any) -> Any:
    leaf = np.asarray(leaf)
    return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf


def _largest_difference(a: Params, b: Params) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs)


def _flops_bounded(proof: _Proof) -> str:
    case, shape = proof.case, proof.case.problem.shape
    everything = masks.by_path(case.ordinary, lambda path: True)
    wanted = fits.under(fits.program(proof.model, None), case.ordinary, everything, case.model_state)
    whole = fits.flops(wanted, case.ordinary, everything, shape, case.model_state)
    each = zip(proof.fitted.programs, proof.fitted.masks, strict=True)
    counts = [fits.flops(program, case.params, mask, shape, case.model_state) for program, mask in each]
    most = _BOOKKEEPING * sum(row.size for row in masks.table(case.ordinary, everything))
    counted = f"{', then '.join(f'{count:,.0f}' for count in counts)}; full training {whole:,.0f}"
    counted += f" and {most:,.0f} for selecting are {whole + most:,.0f}" if max(counts) > whole else ""
    assert max(counts) <= whole + most, counted
    return f"{counted} (batch {problems.BATCH})"


def _outputs_kept(proof: _Proof) -> str:
    """Check the merged tree: its structure, and its outputs at the start (the source's) and after the fit."""
    case, images = proof.case, proof.data.inputs[0]
    merge = case.merge or (lambda params: params)
    start, end = merge(case.params), merge(proof.fitted.params[-1])
    if case.merge:
        paths.same_structure(case.ordinary, start, "the tree before adapt", "the merged tree")
    state = case.model_state
    trees = (start, end, case.ordinary)
    before, after, source = (np.asarray(models.apply(proof.model, tree, images, state=state)) for tree in trees)
    forward = jax.jit(train.forward(proof.model, case.applied))
    ran = np.asarray(forward(batch_stats.join(proof.fitted.params[-1], state), images))
    for what, wanted, outputs in (("adapt changes", source, before), ("merge changes", ran, after)):
        difference = float(np.abs(wanted - outputs).max())
        assert difference <= _ROUNDING, f"{what} the outputs by {difference:.1e}"
    return f"on {case.problem.name}, to rounding"
