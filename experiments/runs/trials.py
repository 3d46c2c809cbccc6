"""Trials of a search: many settings trained together, and judged on validation examples alone."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import fits, methods
from experiments.runs.sources import Trained
from experiments.transfer import Experiment, look, streams_of
from tljax import evaluate, train
from tljax.data import derive
from tljax.study.results import Result
from tljax.types import Task


class Yard(NamedTuple):
    """Where the trials of a search are trained: a task without its test examples."""

    field: fits.Arena
    """Its test images are the validation examples of all seeds."""
    rows: np.ndarray
    """Which examples of the training set they are, ascending: int32."""
    budget: str
    kept: dict[Hashable, Any]
    """Starts and orders that trials share."""


class Judged(NamedTuple):
    """What training one setting gave."""

    accuracy: float | None
    """On validation examples, a mean over seeds; None if a fit diverged."""
    pruned: bool
    loss: float | None = None
    """Likewise, mean cross-entropy in nats."""


Report = Callable[[int, int, float], bool]
"""(which setting, step, validation accuracy so far) -> whether to give it up."""


def blind(task: Task) -> Task:
    """A task without its test examples: a search that looked for them would find none."""
    return replace(task, test=derive.select(task.test, slice(0)))


def yard(todo: Experiment, budget: str) -> Yard:
    """The yard of a search over settings that are those of `todo` but for what decides no example."""
    task = blind(todo.target)
    field = fits.arena(task, todo.made.recipe, todo.execution)
    held = [fits.split(field, streams_of(todo.made, seed), budget)[1] for seed in todo.made.seeds]
    rows = np.unique(np.concatenate(held))
    return Yard(field._replace(test=evaluate.padded(np.asarray(task.train.images)[rows])), rows, budget, {})


def judge(
    place: Yard,
    todo: Sequence[Experiment],
    trained: Sequence[Mapping[int, Trained]],
    report: Report,
) -> list[Judged]:
    """Train the one strategy of each experiment under all its seeds, together where shapes agree, and judge it.

    `trained` has {seed: source} for each of them.
    """
    groups: dict[Hashable, list[tuple[int, int, fits.Fit]]] = {}
    for which, one in enumerate(todo):
        for seed in one.made.seeds:
            fit = ready(place, one, seed, trained[which])
            alike = (fit.program, len(fit.trial.rates), fit.trial.order(0, 1).shape[1])
            groups.setdefault(alike, []).append((which, seed, fit))
    found: Found = {which: {} for which in range(len(todo))}
    pruned: set[int] = set()
    for group in groups.values():
        # Those that share an order and a start are neighbours, and may stand side by side.
        group.sort(key=lambda member: (member[1], member[0]))
        _train(place, group, todo[group[0][0]], found, pruned, report)
    return [_judged(scores.values(), which in pruned) for which, scores in found.items()]


Found = dict[int, dict[int, tuple[float, float] | None]]
"""{setting: {seed: (validation accuracy, validation loss)}}, None of a fit that diverged."""


def _judged(scores: Collection[tuple[float, float] | None], pruned: bool) -> Judged:
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return Judged(None, pruned)
    accuracy, loss = np.mean(known, axis=0).tolist()
    return Judged(accuracy, pruned, loss)


def ready(place: Yard, one: Experiment, seed: int, trained: Mapping[int, Trained]) -> fits.Fit:
    """The fit of the one strategy of an experiment; what another has too (start, order) is the same object in both."""
    own = streams_of(one.made, seed)
    [method] = one.methods
    field = place.field._replace(recipe=one.made.recipe)
    # A strategy that looks at data sees what the recipe makes of it.
    seen = one.made.recipe if method.method.data_driven else None
    source = one.source.identity[seed] if one.source and seed in trained else None
    known = (method.label, one.model, one.made.head, seed, source, seen)
    if known not in place.kept:
        ground = methods.ground(one.made, one.model, one.source, one.target, own)
        if seed in trained:
            ground = methods.with_source(ground, trained[seed])
        place.kept[known] = methods.start(method, ground, look(one, field, own, place.budget))
    keeps_dropout = fits.keeps_dropout(one.made, one.model, tuple(one.target.train.images.shape[1:]))
    untrained = Result(name=method.label, target=one.target.name, strategy=method.name, seed=seed)
    fit = fits.build(field, one.model, place.kept[known], own, place.budget, untrained, keeps_dropout)
    ordered = ("order", own, one.made.recipe.batch_size, one.made.recipe.steps is None)
    order = place.kept.setdefault(ordered, fit.trial.order)
    return fit._replace(trial=fit.trial._replace(order=order, shares=(known, ordered)))


def _train(
    place: Yard,
    group: Sequence[tuple[int, int, fits.Fit]],
    one: Experiment,
    found: Found,
    pruned: set[int],
    report: Report,
) -> None:
    program, trials = group[0][2].program, [fit.trial for _, _, fit in group]
    everyone = {which for which, _, _ in group}
    last = len(trials[0].rates)
    ends = fits.ends(one.made.recipe, last)
    labels = np.asarray(place.field.task.train.labels)
    scores: dict[int, dict[int, list[float]]] = {}
    execution = replace(place.field.execution, should_stop=lambda: everyone <= pruned)
    stops = fits.stops(ends, trials[0])
    for state, _ in train.fit(program, trials, place.field.data, stops, (), execution):
        if state.step not in ends:
            continue
        logits = evaluate.logits_of(program, trials, state, place.field.test, len(place.rows), place.field.execution)
        for row, i in enumerate(state.fits):
            which, seed, fit = group[i]
            at = np.searchsorted(place.rows, fit.validation)
            right = float((logits[row][at].argmax(-1) == labels[fit.validation]).mean())
            odd = state.diverged[row] is not None or not np.isfinite(logits[row]).all()
            if state.step == last:
                measured = evaluate.metrics(logits[row][at], labels[fit.validation])
                found[which][seed] = None if odd else (measured["accuracy"], measured["loss"])
            heard = scores.setdefault(which, {}).setdefault(state.step, [])
            heard.append(0.0 if odd else right)
            whole = len(heard) == len(one.made.seeds) and state.step < last
            if whole and which not in pruned and report(which, state.step, float(np.mean(heard))):
                pruned.add(which)
