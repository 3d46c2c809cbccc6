"""Strategies at work: from source parameters and a drawn target to parameters and a mask.

The order is fixed: init, graft, adapt, strategy, lint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import console, sources
from experiments.fits import Start
from experiments.options import Settings
from experiments.sources import Source
from tljax import checkpoint, graft, masks, models, paths, plugins, seeds
from tljax.types import Context, InputError, Mask, Method, Model, Params, Phase, Task


class Named(NamedTuple):
    """A strategy as the flags name it."""

    label: str
    """With its options: 'last_k:k=2'."""
    name: str
    options: Mapping[str, Any]
    method: Method
    code: str
    """Digest of its files: what an edit changes."""


def read(texts: Sequence[str]) -> tuple[Named, ...]:
    """The strategies of `--strategies`, with scratch among them: a number without it says nothing about transfer."""
    if "scratch" not in texts:
        console.say("scratch is added: what it reaches with the same budget is what transfer must beat")
        texts = ("scratch", *texts)
    return tuple(map(one, texts))


def one(text: str) -> Named:
    """One strategy."""
    method, options = plugins.method(text)
    spec = plugins.parse(text)
    name = ":".join([spec.name, *spec.words])
    label = ":".join([name, *(f"{key}={value}" for key, value in spec.options.items())])
    return Named(label, name, options, method, method.code)


def refuse_without_source(named: Sequence[Named], model: Model) -> None:
    """Raise InputError for a strategy that keeps something of a source, where there is none."""
    for one in named:
        if set(_redrawn(one, models.names(model))) != set(models.names(model)):
            raise InputError(f"strategy '{one.label}' needs a source: give --source=NAME or --source_checkpoint=DIR")


def _redrawn(one: Named, stages: tuple[str, ...]) -> Sequence[str]:
    if one.method.reinit is None:
        return ()
    given = _call(one.method.reinit, one.options, Context(stages=stages))
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise InputError(f"strategy '{one.label}': reinit gives {given!r}: return a list of path prefixes, or []")
    return given


def _call(function: Any, options: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a function of a strategy's module with those of the options that it takes."""
    return _theirs(function, *arguments, **plugins.taken(function, options))


def _theirs(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call somebody else's function; what it raises becomes one line."""
    try:
        return function(*arguments, **options)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{getattr(function, '__name__', function)} of a strategy fails: {plugins.said(error)}"
        ) from error


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
    like = models.init(sources.model(made, len(source.classes)), key, shape) if source else None
    head = made.head
    if head == "auto":
        head = "copy" if source and source.classes == target.classes else "fresh"
    return Ground(model, models.init(model, key, shape), like, head, jax.random.fold_in(key, len(model)))


def with_source(ground: Ground, trained: sources.Trained) -> Ground:
    """The ground with the source's trained parameters; raises InputError where they are of another model."""
    return ground._replace(source=checkpoint.unflatten(trained.flat, ground.source), fisher=trained.fisher)


Look = Callable[[Callable[[Params], Params] | None], tuple[Callable[[Params], Params], Callable[[Params], Params]]]
"""merge -> (gradient, fisher): what a data-driven strategy may look at."""


def start(one: Named, ground: Ground, look: Look | None = None) -> Start:
    """Graft, adapt, ask the strategy, and lint; raises InputError for a mask that cannot be meant."""
    names = models.names(ground.model)
    head = names[-1:]
    redrawn = tuple(_redrawn(one, names))
    fresh = (*redrawn, *head) if ground.head == "fresh" else redrawn
    plan = graft.plan(ground.source, ground.drawn, fresh=fresh, zero=head if ground.head == "zero" else ())
    params, anew = graft.apply(plan, ground.source, ground.drawn)
    merge = None
    if one.method.adapt:
        ordinary = params
        params, anew = _adapted(one, params, anew, ground.key)
        merge = Merge(one.method.merge, repr(one.options), one.options) if one.method.merge else None
        _refuse_another_model(one, ordinary, params, merge)
    if one.method.data_driven and look is None:
        return Start(params, (), anew, plan, merge)
    gradient, fisher = look(merge) if look else (None, None)
    context = Context(names, ground.source, anew, ground.key, gradient, fisher)
    # What the module's `reinit` drew anew may stay frozen on purpose; the new head may not.
    must = masks.intersect(anew, masks.under(params, head)) if redrawn else anew
    return Start(params, _phases(one, params, context, must), anew, plan, merge, ground.fisher)


def _phases(one: Named, params: Params, context: Context, must: Mask) -> tuple[tuple[float, Any], ...]:
    """What the strategy gives, linted; masks that it leaves to their boundary are linted there."""
    given = _theirs(one.method.strategy, jax.tree.map(jnp.asarray, params), _shown(context), **one.options)
    phased = isinstance(given, list | tuple) and any(isinstance(phase, Phase) for phase in given)

    def linted(params: Params, mask: Mask) -> Mask:
        try:
            masks.lint(params, mask, must)
        except InputError as error:
            raise InputError(f"strategy '{one.label}': {error}") from error
        return _own(mask)

    def later(phase: Phase) -> Callable[[Params], Mask]:
        return lambda params: linted(params, _theirs(phase.mask, _own(params), _shown(context)))

    if not phased:
        return ((0.0, linted(params, given)),)
    try:
        masks.lint_phases(params, given, must)
    except InputError as error:
        raise InputError(f"strategy '{one.label}': {error}") from error
    return tuple((phase.start, later(phase) if masks.is_strategy(phase.mask) else _own(phase.mask)) for phase in given)


def _own(tree: Any) -> Any:
    """A tree that somebody else's function may write into: containers and NumPy arrays of its own."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tree)


def _shown(context: Context) -> Context:
    return context._replace(source_params=_own(context.source_params), fresh=_own(context.fresh))


def _adapted(one: Named, params: Params, anew: Mask, key: jax.Array) -> tuple[Params, Mask]:
    """The parameters with the leaves that `adapt` adds; those are fresh."""
    known = dict(zip(paths.names(params), jax.tree.leaves(anew), strict=True))
    more = _call(one.method.adapt, one.options, _own(params), key)
    for path, leaf in paths.items(more):
        if not isinstance(leaf, int | float | np.generic | np.ndarray | jax.Array):
            raise InputError(f"strategy '{one.label}': adapt gives {leaf!r} at '{path}': a leaf is an array")
    added = [known.get(path, True) for path in paths.names(more)]
    return more, jax.tree.unflatten(jax.tree.structure(more), added)


@dataclass(frozen=True)
class Merge:
    """A merge with its options; equal ones share an executable."""

    function: Callable[..., Params]
    text: str
    """The options as text: a list among them has no hash."""
    options: Mapping[str, Any] = field(compare=False)

    def __call__(self, params: Params) -> Params:
        """Ordinary parameters."""
        return _call(self.function, self.options, _own(params))


def _refuse_another_model(one: Named, ordinary: Params, adapted: Params, merged: Merge | None) -> None:
    """Raise InputError unless the model finds its leaves again, in their shapes."""

    def merge(params: Params) -> Params:
        return jax.eval_shape(merged or (lambda same: same), params)

    after = _theirs(merge, adapted)
    if merged:
        paths.same_structure(ordinary, after, "the model", f"what merge of strategy '{one.label}' gives")
    shapes = {path: leaf.shape for path, leaf in paths.items(after)}
    for path, leaf in paths.items(ordinary):
        if shapes.get(path) != leaf.shape:
            there = f"of shape {shapes[path]}" if path in shapes else "missing"
            last = "merge" if merged else "adapt"
            raise InputError(f"strategy '{one.label}': '{path}' {leaf.shape} is {there} after {last}: keep it")
