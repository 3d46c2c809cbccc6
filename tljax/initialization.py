"""A target made ready for a strategy, by graft and then adapt; and what the strategy answers, as phases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import graft, masks, paths, plugins, switches
from tljax.types import Context, InputError, Mask, Method, Params, Phase


class Ready(NamedTuple):
    """A target after init, graft and adapt."""

    plan: graft.Plan
    ordinary: Params
    """Before adapt."""
    params: Params
    fresh: Mask
    """Which leaves were drawn anew, or added by adapt."""
    must: Mask
    """Those that have to train: all of them, or the head's if `reinit` drew others, which may be frozen on purpose."""
    merge: Callable[[Params], Params] | None


def target(
    method: Method,
    options: Mapping[str, Any],
    stages: tuple[str, ...],
    source: Params | None,
    drawn: Params,
    key: jax.Array,
    head: str = "fresh",
) -> Ready:
    """Graft the source onto what was drawn, then adapt with `key`; `head` is 'fresh', 'copy' or 'zero'.

    Raises InputError for what `graft.plan` refuses, and where `reinit` or `adapt` gives what it cannot mean.
    """
    again, last = redrawn(method, options, stages), stages[-1:]
    fresh_stages, zero = (*again, *last) if head == "fresh" else again, last if head == "zero" else ()
    plan = graft.plan(source, drawn, fresh=fresh_stages, zero=zero)
    ordinary, fresh = graft.apply(plan, source, drawn)
    params, merge = ordinary, None
    if method.adapt:
        known = dict(paths.items(fresh))
        context = (Context(stages=stages, fresh=own(fresh)),) if plugins.takes(method.adapt, "context") else ()
        params = _call(method.adapt, options, own(ordinary), key, *context)
        if params is None:
            raise InputError("adapt returned None: return the parameters with the new leaves")
        for path, leaf in paths.items(params):
            if not isinstance(leaf, int | float | np.generic | np.ndarray | jax.Array):
                raise InputError(f"adapt gives {plugins.shown(leaf)} at '{path}': a leaf is an array")
        fresh = paths.each(lambda path, leaf: known.get(path, True), params)
        merge = Merge(method.merge, repr(options), options) if method.merge else None
    must = masks.intersect(fresh, masks.under(params, last)) if again else fresh
    return Ready(plan, ordinary, params, fresh, must, merge)


def redrawn(method: Method, options: Mapping[str, Any], stages: tuple[str, ...]) -> tuple[str, ...]:
    """The path prefixes that a method draws anew beside the head; raises InputError for what is no list of them."""
    given: Any = _call(method.reinit, options, Context(stages=stages)) if method.reinit else ()
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise InputError(f"reinit gives {plugins.shown(given)}: return a list of path prefixes, or []")
    return tuple(given)


@dataclass(frozen=True)
class Merge:
    """A merge with its options; equal ones share an executable."""

    function: Callable[..., Params]
    text: str
    """The options as text: a list among them has no hash."""
    options: Mapping[str, Any] = field(compare=False)

    def __call__(self, params: Params) -> Params:
        """Ordinary parameters."""
        return _call(self.function, self.options, own(params))


def _call(function: Callable[..., Any], options: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a function of a strategy's module with those of the options that it takes."""
    with switches.guarded():
        return function(*arguments, **plugins.taken(function, options))


def phases(given: Any) -> tuple[Phase, ...]:
    """What a strategy gave, as phases: a mask is one.

    >>> phases({"head": True})
    (Phase(start=0.0, mask={'head': True}),)
    """
    phased = isinstance(given, list | tuple) and any(isinstance(phase, Phase) for phase in given)
    return tuple(given) if phased else (Phase(0.0, given),)


def own(tree: Any) -> Any:
    """A tree that somebody else's function may write into: containers and NumPy arrays of its own."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tree)


def shown(context: Context) -> Context:
    """The context with trees of its own."""
    return context._replace(source_params=own(context.source_params), fresh=own(context.fresh))
