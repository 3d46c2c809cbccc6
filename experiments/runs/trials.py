"""Trials of a search: many settings trained together, and judged on validation examples alone."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import fit, plan
from experiments.runs.fit import DeviceData, PreparedFit
from experiments.runs.plan import Experiment
from experiments.runs.sources import Trained
from tljax import evaluate
from tljax.data import derive
from tljax.study.results import Result
from tljax.types import Task


class SearchTask(NamedTuple):
    """What the trials of a search learn: a task without its test examples."""

    on_device: DeviceData
    """Its test images are the validation examples of all seeds."""
    rows: np.ndarray
    """Which examples of the training set they are, ascending: int32."""
    budget: str
    shared: dict[Hashable, Any]
    """Starts and orders that trials share."""


class Judgement(NamedTuple):
    """What training one setting gave."""

    accuracy: float | None
    """On validation examples, a mean over seeds; None if a fit diverged."""
    pruned: bool
    loss: float | None = None
    """Mean cross-entropy on them, in nats, a mean over seeds; None if a fit diverged."""


Report = Callable[[int, int, float], bool]
"""(which setting, step, validation accuracy so far) -> whether to give it up."""


def without_test(task: Task) -> Task:
    """A task without its test examples: a search that looked for them would find none."""
    return replace(task, test=derive.select(task.test, slice(0)))


def search_task(experiment: Experiment, budget: str) -> SearchTask:
    """The task of a search over settings that are those of an experiment but for what decides no example."""
    task, settings = without_test(experiment.target), experiment.settings
    on_device = fit.load(task, settings.recipe, experiment.execution)
    validation = [fit.split(on_device, plan.streams(settings, seed), budget)[1] for seed in settings.seeds]
    rows = np.unique(np.concatenate(validation))
    images = evaluate.held(task.train, experiment.execution, rows, f"the validation examples of {task.name}")
    return SearchTask(on_device._replace(test=images, tests=len(rows)), rows, budget, {})


def judge(
    task: SearchTask,
    experiments: Sequence[Experiment],
    trained: Sequence[Mapping[int, Trained]],
    report: Report,
) -> list[Judgement]:
    """Train the one strategy of each experiment under all its seeds, together where shapes agree, and judge it.

    `trained` has {seed: source} for each of them.
    """
    groups: dict[Hashable, list[Member]] = {}
    for i, experiment in enumerate(experiments):
        for seed in experiment.settings.seeds:
            prepared = prepare(task, experiment, seed, trained[i])
            alike = (prepared.spec, len(prepared.trial.rates), prepared.trial.order(0, 1).shape[1])
            groups.setdefault(alike, []).append(Member(i, seed, prepared))
    scores: Scores = {i: {} for i in range(len(experiments))}
    pruned: set[int] = set()
    for group in groups.values():
        # Those that share an order and a start are neighbours, and may stand side by side.
        group.sort(key=lambda member: (member.seed, member.setting))
        _train(task, group, experiments[group[0].setting], scores, pruned, report)
    return [_judgement(by_seed.values(), i in pruned) for i, by_seed in scores.items()]


class Member(NamedTuple):
    """A fit of a group, and whose it is."""

    setting: int
    seed: int
    fit: PreparedFit


Scores = dict[int, dict[int, tuple[float, float] | None]]
"""{setting: {seed: (validation accuracy, validation loss)}}, None of a fit that diverged."""


def _judgement(scores: Collection[tuple[float, float] | None], pruned: bool) -> Judgement:
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return Judgement(None, pruned)
    accuracy, loss = np.mean(known, axis=0).tolist()
    return Judgement(accuracy, pruned, loss)


def prepare(task: SearchTask, experiment: Experiment, seed: int, trained: Mapping[int, Trained]) -> PreparedFit:
    """The fit of the one strategy of an experiment, from the start and in the order that other trials share."""
    settings, model, source, target = experiment.settings, experiment.model, experiment.source, experiment.target
    streams = plan.streams(settings, seed)
    [strategy] = experiment.strategies
    on_device = task.on_device._replace(recipe=settings.recipe)
    # A strategy that looks at data sees what the recipe makes of it.
    recipe = settings.recipe if strategy.method.data_driven else None
    identity = source.identity[seed] if source and seed in trained else None
    of_start = (strategy.label, model, settings.head, seed, identity, recipe)
    if of_start not in task.shared:
        initial = plan.initialization_of(experiment, seed, trained.get(seed))
        look = fit.look_at(on_device, model, streams, task.budget)
        task.shared[of_start] = plan.start_of(strategy, initial, look)
    keeps_dropout = plan.stages_with_dropout(settings, model, plan.example_shape(target))
    result = Result(name=strategy.label, target=target.name, strategy=strategy.name, seed=seed)
    prepared = fit.build(on_device, model, task.shared[of_start], streams, task.budget, result, keeps_dropout)
    of_order = ("order", streams, settings.recipe.batch_size, settings.recipe.steps is None)
    order = task.shared.setdefault(of_order, prepared.trial.order)
    return prepared._replace(trial=prepared.trial._replace(order=order, shares=(of_start, of_order)))


def _train(
    task: SearchTask,
    group: Sequence[Member],
    experiment: Experiment,
    scores: Scores,
    pruned: set[int],
    report: Report,
) -> None:
    """Train a group of fits, whose recipes have as many steps and points as that of `experiment`, and score them."""
    settings = {member.setting for member in group}
    on_device = task.on_device._replace(recipe=experiment.settings.recipe)
    last = len(group[0].fit.trial.rates)
    labels = np.asarray(on_device.task.train.targets)
    accuracies: dict[int, dict[int, list[float]]] = {}
    fits = [member.fit for member in group]
    for state, _, logits in fit.drive(on_device, fits, should_stop=lambda: settings <= pruned):
        if logits is None:
            continue
        for row, i in enumerate(state.fits):
            setting, seed, prepared = group[i]
            at = np.searchsorted(task.rows, prepared.validation)
            accuracy = float((logits[row][at].argmax(-1) == labels[prepared.validation]).mean())
            diverged = fit.diverged_at(state, row, logits) is not None
            if state.step == last:
                measured = evaluate.metrics(logits[row][at], labels[prepared.validation])
                scores[setting][seed] = None if diverged else (measured["accuracy"], measured["loss"])
            so_far = accuracies.setdefault(setting, {}).setdefault(state.step, [])
            so_far.append(0.0 if diverged else accuracy)
            whole = len(so_far) == len(experiment.settings.seeds) and state.step < last
            if whole and setting not in pruned and report(setting, state.step, float(np.mean(so_far))):
                pruned.add(setting)
