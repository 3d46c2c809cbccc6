"""A strategy on one problem, and what it answers."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import batch_stats, initialization, masks, models
from tljax.audit.lines import copy
from tljax.audit.problems import Problem
from tljax.types import Context, Mask, Method, Params, Phase


class Case(NamedTuple):
    """A strategy on one problem: after init, graft and adapt."""

    problem: Problem
    method: Method
    options: Mapping[str, Any]
    ordinary: Params
    """Before adapt."""
    params: Params
    context: Context
    must: Mask
    """The fresh leaves that have to train: all of them, or the head's if the module's `reinit` drew others."""
    merge: Callable[[Params], Params] | None
    model_state: Mapping[str, Any] = {}
    """The model's state; all else here is of parameters alone."""
    phases: tuple[Phase, ...] = ()
    """What the strategy answered first."""
    evaluated: tuple[Phase, ...] = ()
    """The same with masks in place of strategies, as at `params`."""
    applied: Callable[[Params], Params] | None = None
    """Parameters -> those that the model is applied with."""


def case(method: Method, options: Mapping[str, Any], problem: Problem) -> Case:
    """As in an experiment whose head is new."""
    contracted = functools.partial(models.contracted, problem.model, problem.shape) if problem.model else None
    initial = initialization.Initialization(
        problem.stages, problem.source, problem.drawn, jax.random.key(2), contracted=contracted
    )
    initialized = initialization.initialize(method, options, initial)
    applied = initialized.factored or initialized.merge
    context = Context(
        problem.stages,
        None if problem.source is None else batch_stats.split(problem.source)[0],
        initialized.fresh,
        jax.random.key(3),
        *problem.look(applied, initialized.model_state),
    )
    ordinary, params, must, merge = initialized.ordinary, initialized.params, initialized.must, initialized.merge
    state = initialized.model_state
    return Case(problem, method, options, ordinary, params, context, must, merge, state, applied=applied)


def ask(
    case: Case, params: Params | None = None, context: Context | None = None, *, state: int = 0
) -> tuple[Phase, ...]:
    """What the strategy gives, as phases, for copies of the case's parameters and context, or for others as they are.

    Python's and NumPy's global randomness is as a seed of `state` leaves it.
    """
    with global_randomness(state):
        leaves = copy(case.params) if params is None else params
        answer = case.method.strategy(leaves, context or initialization.shown(case.context), **case.options)
    return initialization.phases(answer)


def evaluate(case: Case, phases: tuple[Phase, ...], *, state: int = 0) -> tuple[Phase, ...]:
    """The phases with masks in place of strategies."""
    with global_randomness(state):
        return tuple(dataclasses.replace(phase, mask=at_boundary(case, phase)(case.params)) for phase in phases)


def at_boundary(case: Case, phase: Phase) -> Callable[[Params], Mask]:
    """The mask of a phase as a function of the parameters at its start."""
    if masks.is_strategy(phase.mask):
        return lambda params: phase.mask(copy(params), initialization.shown(case.context))
    return lambda params: phase.mask


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """Python's and NumPy's, seeded, and put back after."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
