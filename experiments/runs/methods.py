"""Strategies at work: from source parameters and a drawn target to parameters and a mask.

The order is fixed: init, graft, adapt, strategy, lint.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.runs import process
from experiments.runs.settings import Settings
from experiments.runs.sources import Source, Trained
from tljax import checkpoint, graft, masks, models, paths, plugins, ready, seeds, switches
from tljax.types import Context, InputError, Mask, Method, Model, Params, Phase, Task


class Named(NamedTuple):
    """A strategy as the flags name it."""

    label: str
    """Its name, if the flags give it one; else with its options: 'last_k:k=2'."""
    name: str
    options: Mapping[str, Any]
    method: Method
    code: str
    """Digest of its files: what an edit changes."""
    spec: str = ""
    """What stands after NAME= if the flags give it a name, else "": a line of results keeps both."""


def read(texts: Sequence[str]) -> tuple[Named, ...]:
    """The strategies of `--strategies`, with scratch among them: a number without it says nothing about transfer."""
    return tuple(map(one, texts if "scratch" in texts else ("scratch", *texts)))


def one(text: str) -> Named:
    """One strategy."""
    method, options = plugins.method(text)
    given_name, text = plugins.named(text)
    if given_name:
        return Named(given_name, given_name, options, method, method.code, text)
    spec = plugins.parse(text)
    name = ":".join(map(plugins.quoted, (spec.name, *spec.words)))
    label = ":".join([name, *(f"{key}={value}" for key, value in spec.options.items())])
    return Named(label, name, options, method, method.code)


def refuse_without_source(named: Sequence[Named], model: Model) -> None:
    """Raise InputError for a strategy that keeps something of a source, where there is none."""
    for one in named:
        stages = models.names(model)
        if set(_theirs(one, "reinit", ready.redrawn, one.method, one.options, stages)) != set(stages):
            raise InputError(f"strategy '{one.label}' needs a source: give --source=NAME or --source_checkpoint=DIR")


def _theirs(one: Named, part: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of a strategy's file; what it raises becomes one line that says whose it is, and where."""
    what = f"{part} of strategy '{one.label}'" if part else f"strategy '{one.label}'"
    try:
        with switches.guarded(what):
            result = function(*arguments, **options)
    except (KeyboardInterrupt, process.Stopped):
        raise
    except InputError as error:
        grafted_alone = part == "reinit or adapt" and not (one.method.reinit or one.method.adapt)
        raise error if grafted_alone else _with_name(one, error) from error
    except BaseException as error:  # of whatever class: somebody may have made one
        raise InputError(f"{what} fails: {plugins.said(error, one.method.strategy)}") from error
    if result is None:
        raise InputError(f"{what} returned None: return {_RETURNS.get(part, 'a mask')}")
    return result


_RETURNS = {"left_out": "a list of paths, or []", "merge": "ordinary parameters"}
"""What a function of a strategy's file gives, if not a mask."""


def _with_name(one: Named, error: InputError) -> InputError:
    """An error of a function of a strategy's file, naming the strategy unless it does."""
    text, name = str(error), one.name.partition(":")[0]
    if f"'{one.label}'" in text or f"'{name}'" in text or text.startswith(f"{name}:"):
        return error
    return InputError(f"strategy '{one.label}': {text}")


class Start(NamedTuple):
    """Where a fit begins."""

    params: Params
    phases: tuple[tuple[float, Mask | Callable[[Params], Mask]], ...]
    """(fraction of training, mask); a function is called with the parameters at that point. Empty where the strategy
    looks at data and there were none."""
    fresh: Mask
    """Which leaves were drawn anew."""
    plan: graft.Plan = ()
    merge: Callable[[Params], Params] | None = None
    fisher: Params | None = None
    """The source's Fisher information, for a penalty: a tree like the parameters."""


class Ground(NamedTuple):
    """What every strategy starts from under one seed."""

    model: Model
    drawn: Params
    """The target's parameters, drawn anew."""
    source: Params | None
    head: str
    """'copy', 'fresh' or 'zero'."""
    key: jax.Array
    fisher: checkpoint.Flat | None = None
    """The source's Fisher information, if it was saved."""


def ground(made: Settings, model: Model, source: Source | None, target: Task, streams: seeds.Seeds) -> Ground:
    """The ground of one seed, with a draw for a source that is still to come (`with_source`)."""
    shape = tuple(target.train.images.shape[1:])
    key = jax.random.key(streams.head)
    like = models.init(made.build_model(len(source.classes)), key, shape) if source else None
    head = head_of(made, source, target)
    return Ground(model, models.init(model, key, shape), like, head, jax.random.fold_in(key, len(model)))


def head_of(made: Settings, source: Source | None, target: Task) -> str:
    """What becomes of the head: 'copy', 'fresh' or 'zero', as --head says; under 'auto' by the names of the classes."""
    if made.head != "auto":
        return made.head
    return "copy" if source and source.classes == target.classes else "fresh"


def with_source(ground: Ground, trained: Trained) -> Ground:
    """The ground with the source's trained parameters; raises InputError where they are of another model."""
    return ground._replace(source=checkpoint.unflatten(trained.flat, ground.source), fisher=trained.fisher)


Look = Callable[[Callable[[Params], Params] | None], tuple[Callable[[Params], Params], Callable[[Params], Params]]]
"""merge -> (gradient, fisher): what a data-driven strategy may look at."""


def start(one: Named, ground: Ground, look: Look | None = None) -> Start:
    """Graft, adapt, ask the strategy, and lint; raises InputError for a mask that cannot be meant."""
    names = models.names(ground.model)
    of_ground = (names, ground.source, ground.drawn, ground.key, ground.head)
    made = _theirs(one, "reinit or adapt", ready.target, one.method, one.options, *of_ground)
    if one.method.adapt:
        _refuse_another_model(one, made)
    rest = (made.fresh, made.plan, made.merge)
    if one.method.data_driven and look is None:
        return Start(made.params, (), *rest)
    gradient, fisher = look(made.merge) if look else (None, None)
    context = Context(names, ground.source, made.fresh, ground.key, gradient, fisher)
    return Start(made.params, _phases(one, made.params, context, made.must), *rest, ground.fisher)


def left_out(one: Named, start: Start, model: Model) -> list[str]:
    """The paths of leaves that a strategy was to treat and cannot, as its module's `left_out` says."""
    if one.method.left_out is None:
        return []
    context = Context(models.names(model), fresh=start.fresh)
    options = plugins.taken(one.method.left_out, one.options)
    return list(_theirs(one, "left_out", one.method.left_out, ready.own(start.params), ready.shown(context), **options))


def _phases(one: Named, params: Params, context: Context, must: Mask) -> tuple[tuple[float, Any], ...]:
    """What the strategy gives, linted; masks that it leaves to their boundary are linted there."""
    given = jax.tree.map(jnp.asarray, params), ready.shown(context)
    phases = ready.phases(_theirs(one, "", one.method.strategy, *given, **one.options))

    def linted(params: Params, mask: Mask) -> Mask:
        try:
            masks.lint(params, mask, must)
        except InputError as error:
            raise InputError(f"strategy '{one.label}': {error}") from error
        return ready.own(mask)

    def later(phase: Phase) -> Callable[[Params], Mask]:
        return lambda params: linted(
            params, _theirs(one, "a phase", phase.mask, ready.own(params), ready.shown(context))
        )

    try:
        masks.lint_phases(params, phases, must)
    except InputError as error:
        raise InputError(f"strategy '{one.label}': {error}") from error
    return tuple((float(p.start), later(p) if masks.is_strategy(p.mask) else ready.own(p.mask)) for p in phases)


def _refuse_another_model(one: Named, made: ready.Ready) -> None:
    """Raise InputError unless the model finds its leaves again, in their shapes."""
    merge: Any = made.merge or (lambda same: same)
    after = _theirs(one, "merge", lambda: jax.eval_shape(merge, made.params))
    if made.merge:
        paths.same_structure(made.ordinary, after, "the model", f"what merge of strategy '{one.label}' gives")
    shapes = {path: leaf.shape for path, leaf in paths.items(after)}
    for path, leaf in paths.items(made.ordinary):
        if shapes.get(path) != leaf.shape:
            there = f"of shape {shapes[path]}" if path in shapes else "missing"
            last = "merge" if made.merge else "adapt"
            raise InputError(f"strategy '{one.label}': '{path}' {leaf.shape} is {there} after {last}: keep it")
