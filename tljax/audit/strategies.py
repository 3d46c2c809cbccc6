"""`check_strategy`: what every strategy must keep, tried on small models and odd pytrees."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import initialization, masks, models, paths, plugins, train
from tljax.audit import fits, grounds
from tljax.audit.cases import Case, ask, at_boundary, case, evaluate
from tljax.audit.lines import Check, changed, copy, line, same_bytes
from tljax.models import randomness
from tljax.types import Context, InputError, Mask, Method, Params

CNN = "cnn:norm=true"
"""The second model: norms, so that norm_only has something to train."""

_ROUNDING = 1e-5
_BOOKKEEPING = 16
"""FLOPs a number that selecting and scaling updates may cost beside full training's."""


def check_strategy(
    strategy: str | Method | Callable[..., Any], options: Mapping[str, Any] | None = None, *, model: str = "mlp"
) -> list[Check]:
    """A line a check of a strategy: a spec, a Method, or the function itself.

    It is tried on `model`, a small CNN with norms, and five odd pytrees. Where it says in an InputError what a ground
    lacks, it does not apply (`passed` is None); it must apply to a model, the first of which carries the proofs that
    train. Of a model that draws in training (dropout), a line says whether all of it does, by its key. Raises
    InputError for a text that names no strategy, and for an unknown model.

    >>> [check.name for check in check_strategy(lambda params, context: "head") if check.passed is False][:2]
    ['lint on mlp', 'lint on cnn:norm=true']
    """
    method, options = _read(strategy, options)
    tried = [grounds.of_model(name) for name in dict.fromkeys((model, CNN))]
    linted = [_lint(method, options, ground) for ground in [*tried, *grounds.trees()]]
    checks = [check for check, _ in linted]
    checks.append(line("applies to a model", _applies, checks[: len(tried)]))
    cases = [found for _, found in linted if found]
    proofs = {
        "new leaves train in every phase": _fresh,
        "leaves what it is given untouched": _untouched,
        "deterministic in its key": _deterministic,
        "the same mask from shapes alone": _abstract,
    }
    checks += [line(name, _on_all, proof, cases) for name, proof in proofs.items() if cases]
    if method.data_driven and cases:
        checks[-1] = Check(checks[-1].name, None, "does not apply: it looks at data (DATA_DRIVEN)")
    return [*checks, *_drawing(tried[0]), *next((_trained(found) for found in cases if found.ground.model), [])]


def _read(strategy: Any, options: Mapping[str, Any] | None) -> tuple[Method, Mapping[str, Any]]:
    if isinstance(strategy, str):
        method, given = plugins.method(strategy)
        return method, {**given, **(options or {})}
    return strategy if isinstance(strategy, Method) else Method(strategy), options or {}


def _lint(method: Method, options: Mapping[str, Any], ground: grounds.Ground) -> tuple[Check, Case | None]:
    """The line of one ground, and the case if it passed."""
    name = f"lint on {ground.name}"
    try:
        found = case(method, options, ground)
        phases = ask(found)
    except InputError as error:
        return Check(name, None, f"does not apply: {error}"), None
    except (Exception, SystemExit) as error:  # a fault of the strategy's own, whatever it is
        return Check(name, False, f"raises {type(error).__name__}: {' '.join(str(error).split())}"), None
    seen: list[Case] = []

    def promise() -> str:
        masks.lint_phases(found.params, phases)
        seen.append(found._replace(phases=phases, evaluated=evaluate(found, phases)))
        masks.lint_phases(found.params, seen[0].evaluated)
        return ", then ".join(_count(found.params, phase.mask) for phase in seen[0].evaluated)

    check = line(name, promise)
    return check, seen[0] if check.passed else None


def _count(params: Params, mask: Mask) -> str:
    rows = masks.table(params, mask)
    return f"{sum(row.trained_size for row in rows)} of {sum(row.size for row in rows)} numbers train"


def _applies(tried: Sequence[Check]) -> str:
    assert any(check.passed is not None for check in tried), tried[0].detail
    return ", ".join(check.name.removeprefix("lint on ") for check in tried if check.passed is not None)


def _drawing(ground: grounds.Ground) -> list[Check]:
    """The line of what a model draws in training (dropout, noise); none for a model that draws nothing."""
    assert ground.model is not None
    faults = randomness.faults(ground.model, ground.shape)
    stages = randomness.stages(ground.model, ground.shape)
    return [line("dropout follows its key", _follows, ground, faults, stages)] if faults or stages else []


def _follows(ground: grounds.Ground, faults: Sequence[str], stages: Sequence[str]) -> str:
    assert not faults, "; ".join(faults)
    assert ground.model is not None
    model, images = ground.model, grounds.data(ground.shape).inputs[0]
    keys = (None, *map(jax.random.key, (0, 0, 1)))
    calm, one, again, other = (np.asarray(models.apply(model, ground.drawn, images, key=key)) for key in keys)
    assert np.array_equal(one, again), "one key gives two outputs"
    assert not np.array_equal(one, calm), "its output with a key is its output without one"
    assert not np.array_equal(one, other), "two keys give one output"
    return f"in {', '.join(stages)}: none without a key, the same with the same, others with another"


def _on_all(proof: Callable[[Case], None], cases: Sequence[Case]) -> str:
    for found in cases:
        try:
            proof(found)
        except (AssertionError, InputError) as error:
            raise AssertionError(f"on {found.ground.name}: {error}") from error
    return "on " + ", ".join(found.ground.name for found in cases)


def _fresh(found: Case) -> None:
    masks.lint_phases(found.params, found.evaluated, found.must)


def _untouched(found: Case) -> None:
    params, context = copy(found.params), initialization.shown(found.context)
    for phase in ask(found, params, context):
        if masks.is_strategy(phase.mask):
            phase.mask(params, context)
    pairs = {
        "params": (found.params, params),
        "context.fresh": (found.context.fresh, context.fresh),
        "context.source_params": (found.context.source_params, context.source_params),
    }
    for name, (before, after) in pairs.items():
        paths.same_structure(before, after, name, f"what the strategy left of {name}")
        wrote = changed(before, after)
        assert not wrote, f"it wrote into {name}: {paths.some(wrote)}"


def _deterministic(found: Case) -> None:
    again = evaluate(found, ask(found, state=1), state=1)
    _same_phases(found.evaluated, again, "two calls with one key differ: draw from context.key alone")


def _abstract(found: Case) -> None:
    shapes, source = jax.eval_shape(lambda: (found.params, found.ground.source))
    remedy = "shapes alone do not give the same mask: if it depends on values, set DATA_DRIVEN = True"
    context: Context = initialization.shown(found.context)._replace(source_params=source, gradient=None, fisher=None)
    try:
        abstract = ask(found, shapes, context)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{remedy} ({type(error).__name__}: {error})") from error
    _same_phases(found.phases, abstract, remedy)


def _same_phases(one: Sequence[Any], other: Sequence[Any], what: str) -> None:
    assert [phase.start for phase in one] == [phase.start for phase in other], what
    for a, b in zip(one, other, strict=True):
        later = masks.is_strategy(a.mask), masks.is_strategy(b.mask)
        assert all(later) or (not any(later) and masks.equal(a.mask, b.mask)), what


class _Proof(NamedTuple):
    """A case that was trained."""

    case: Case
    model: Any
    fitted: fits.Fitted
    short: fits.Fitted
    """The same phases of one step each."""
    given: Params
    """What the fit was given, after it."""
    data: train.Data


def _trained(found: Case) -> list[Check]:
    """The lines of a short fit on the case's model."""
    model, data = found.ground.model, grounds.data(found.ground.shape)
    assert model is not None
    names = ["frozen leaves keep their bytes", "trained leaves move", "one compilation a phase", "jit equals no jit"]
    try:
        phases = [at_boundary(found, phase) for phase in found.phases]
        given = copy(found.params)
        program = fits.program(model, found.merge)
        fitted = fits.fit(program, given, phases, data)
        short = fits.fit(program, found.params, fitted.masks, data, 1)
    except (Exception, SystemExit) as error:
        return [Check(f"trains on {found.ground.name}", False, f"{type(error).__name__}: {error}")]
    proof = _Proof(found, model, fitted, short, given, data)
    promises = [_still, _moved, _compiled, _without_jit]
    checks = [line(name, promise, proof) for name, promise in zip(names, promises, strict=True)]
    counted = line("FLOPs at most those of full training", _flops, proof)
    if found.method.adapt:
        counted = counted._replace(name="FLOPs of a step", passed=None if counted.passed is False else True)
        checks.append(line("adapt and merge keep the outputs", _outputs, proof))
    return [*checks, counted]


def _each_phase(proof: _Proof) -> list[tuple[int, str, Any, Any, Any]]:
    """(phase, path, before, after, where it trains: bool or bool array) of every leaf."""
    rows = []
    for i, mask in enumerate(proof.fitted.masks):
        before, after = proof.fitted.params[i : i + 2]
        found = paths.items(before, after, mask, masks.static(proof.case.params, mask))
        rows += [(i, path, b, a, masks.chosen(m) if t and masks.selects(m) else t) for path, b, a, m, t in found]
    return rows


def _still(proof: _Proof) -> str:
    frozen = 0
    for i, path, before, after, trains in _each_phase(proof):
        still = ~np.broadcast_to(trains, np.shape(before))
        assert same_bytes(before[still], after[still]), f"'{path}' is frozen in phase {i}, but changed"
        frozen += int(still.sum())
    wrote = changed(proof.case.params, proof.given)
    assert not wrote, f"the fit wrote into what it was given: {paths.some(wrote)}"
    return f"{frozen} frozen numbers on {proof.case.ground.name}, under AdamW with decay, clipping and L2"


def _moved(proof: _Proof) -> str:
    for i, path, before, after, trains in _each_phase(proof):
        assert not np.any(trains) or not same_bytes(before, after), f"'{path}' trains in phase {i}, but did not move"
        assert np.isfinite(after).all(), f"'{path}' is not finite after phase {i}"
    return f"each in {fits.STEPS} steps of each of its phases"


def _compiled(proof: _Proof) -> str:
    phases, compiled, again = len(proof.fitted.masks), proof.fitted.compiled, proof.short.compiled
    assert compiled <= phases, f"{compiled} compilations for {phases} phases, in two segments each"
    assert not again, f"{again} more compilations for the same phases of another length"
    shared = "" if compiled == phases else ", the others shared with an earlier phase or fit"
    return f"{compiled} for {phases} phases{shared}; none for a second fit of another length"


def _without_jit(proof: _Proof) -> str:
    with jax.disable_jit(), fits.quick_compilation():
        plain = fits.fit(
            fits.program(proof.model, proof.case.merge), proof.case.params, proof.short.masks, proof.data, 1
        )
    pairs = zip(jax.tree.leaves(proof.short.params[-1]), jax.tree.leaves(plain.params[-1]), strict=True)
    largest = max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs)
    assert largest <= _ROUNDING, f"they differ by {largest:.1e}, more than rounding ({_ROUNDING:g})"
    return f"to rounding, after a step of each phase: largest difference {largest:.1e}"


def _flops(proof: _Proof) -> str:
    found, shape = proof.case, proof.case.ground.shape
    everything = masks.by_path(found.ordinary, lambda path: True)
    wanted = fits.under(fits.program(proof.model, None), found.ordinary, everything)
    whole = fits.flops(wanted, found.ordinary, everything, shape)
    each = zip(proof.fitted.programs, proof.fitted.masks, strict=True)
    counts = [fits.flops(program, found.params, mask, shape) for program, mask in each]
    told = f"{', then '.join(f'{count:,.0f}' for count in counts)}; full training {whole:,.0f}"
    numbers = sum(row.size for row in masks.table(found.ordinary, everything))
    assert max(counts) <= whole + _BOOKKEEPING * numbers, told
    return f"{told} (batch {grounds.BATCH})"


def _outputs(proof: _Proof) -> str:
    """The tree that merge gives, its outputs at the start (the source's), and after the fit (the trained ones)."""
    found, images = proof.case, proof.data.inputs[0]
    merge = found.merge or (lambda params: params)
    start, end = merge(found.params), merge(proof.fitted.params[-1])
    if found.merge:
        paths.same_structure(found.ordinary, start, "the tree before adapt", "the merged tree")
    before, after = (np.asarray(models.apply(proof.model, tree, images)) for tree in (start, end))
    source = np.asarray(models.apply(proof.model, found.ordinary, images))
    forward = jax.jit(train.forward(proof.model, found.merge))
    ran = np.asarray(forward(proof.fitted.params[-1], images))
    for what, one, other in (("adapt changes", source, before), ("merge changes", ran, after)):
        apart = float(np.abs(one - other).max())
        assert apart <= _ROUNDING, f"{what} the outputs by {apart:.1e}"
    return f"on {found.ground.name}, to rounding"
