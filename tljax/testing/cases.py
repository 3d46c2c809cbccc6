"""A strategy on one ground, and what it answers."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import graft, masks, paths, plugins
from tljax.testing.grounds import Ground
from tljax.testing.lines import copy
from tljax.types import Context, Mask, Method, Params, Phase


class Case(NamedTuple):
    """A strategy on one ground: after init, graft and adapt."""

    ground: Ground
    method: Method
    options: Mapping[str, Any]
    ordinary: Params
    """Before adapt."""
    params: Params
    context: Context
    must: Mask
    """The fresh leaves that have to train: all of them, or the head's if the module's `reinit` drew others."""
    merge: Callable[[Params], Params] | None
    phases: tuple[Phase, ...] = ()
    """What the strategy answered first."""
    evaluated: tuple[Phase, ...] = ()
    """The same with masks in place of strategies, as at `params`."""


def case(method: Method, options: Mapping[str, Any], ground: Ground) -> Case:
    """Graft, then adapt, as in an experiment whose head is new."""
    names = ground.stages
    redrawn = tuple(_call(method.reinit, options, Context(stages=names))) if method.reinit else ()
    plan = graft.plan(ground.source, ground.drawn, fresh=(*redrawn, names[-1]))
    ordinary, fresh = graft.apply(plan, ground.source, ground.drawn)
    params, merge = ordinary, None
    if method.adapt:
        known = dict(zip(paths.names(ordinary), jax.tree.leaves(fresh), strict=True))
        params = _call(method.adapt, options, copy(ordinary), jax.random.key(2))
        added = [known.get(path, True) for path in paths.names(params)]
        fresh = jax.tree.unflatten(jax.tree.structure(params), added)
        merge = partial(_merged, method.merge, options) if method.merge else None
    must = masks.intersect(fresh, masks.under(params, names[-1])) if redrawn else fresh
    context = Context(names, ground.source, fresh, jax.random.key(3), *ground.look(merge))
    return Case(ground, method, options, ordinary, params, context, must, merge)


def _call(function: Any, options: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a function of a strategy's module with those of the options that it takes."""
    return function(*arguments, **plugins.taken(function, options))


def _merged(merge: Callable[..., Params], options: Mapping[str, Any], params: Params) -> Params:
    return _call(merge, options, copy(params))


def shown(context: Context) -> Context:
    """The context with trees of its own, which a strategy may write into."""
    return context._replace(source_params=copy(context.source_params), fresh=copy(context.fresh))


def ask(
    case: Case, params: Params | None = None, context: Context | None = None, *, state: int = 0
) -> tuple[Phase, ...]:
    """What the strategy gives, as phases, for copies of the case's parameters and context, or for others as they are.

    Python's and NumPy's global randomness is as a seed of `state` leaves it.
    """
    with _global_randomness(state):
        own = copy(case.params) if params is None else params
        given = case.method.strategy(own, context or shown(case.context), **case.options)
    phased = isinstance(given, list | tuple) and any(isinstance(phase, Phase) for phase in given)
    return tuple(given) if phased else (Phase(0.0, given),)


def evaluate(case: Case, phases: tuple[Phase, ...], *, state: int = 0) -> tuple[Phase, ...]:
    """The phases with masks in place of strategies."""
    with _global_randomness(state):
        return tuple(dataclasses.replace(phase, mask=at_boundary(case, phase)(case.params)) for phase in phases)


def at_boundary(case: Case, phase: Phase) -> Callable[[Params], Mask]:
    """The mask of a phase as a function of the parameters at its start."""
    if masks.is_strategy(phase.mask):
        return lambda params: phase.mask(copy(params), shown(case.context))
    return lambda params: phase.mask


@contextmanager
def _global_randomness(seed: int) -> Iterator[None]:
    """Python's and NumPy's, seeded, and put back after."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
