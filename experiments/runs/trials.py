"""Trials of a search: many settings trained together, and judged on validation examples alone."""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import fit, plan
from experiments.runs.fit import DeviceData, PreparedFit
from experiments.runs.plan import Experiment
from experiments.runs.settings import Recipe
from experiments.runs.sources import Trained
from tljax import evaluate, metrics
from tljax.data import derive
from tljax.study.results import Result
from tljax.types import Task


class SearchTask(NamedTuple):
    """What the trials of a search learn: a task without its test examples."""

    on_device: DeviceData
    """Its test inputs are the validation examples of all seeds."""
    rows: np.ndarray
    """Which examples of the training set they are, ascending: int32."""
    budget: str
    shared: dict[Hashable, Any]
    """Starts and orders that trials share."""
    worst: float
    """The score that a fit that diverged has: of accuracy 0, else what answering always the same gives."""


class Judgement(NamedTuple):
    """What training one setting gave."""

    score: float | None
    """The primary metric on validation examples, a mean over seeds; None if a fit diverged."""
    pruned: bool
    loss: float | None = None
    """Mean loss on them, as `evaluate.measure` has it, a mean over seeds; None if a fit diverged."""


Report = Callable[[int, int, float], bool]
"""(which setting, step, validation score so far) -> whether to give it up."""


def without_test(task: Task) -> Task:
    """A task without its test examples: a search that looked for them would find none."""
    return replace(task, test=derive.select(task.test, slice(0)))


def search_task(experiment: Experiment, budget: str) -> SearchTask:
    """The task of a search over settings that are those of an experiment but for what decides no example."""
    task, settings = without_test(experiment.target), experiment.settings
    on_device = fit.load(task, settings.recipe, experiment.execution)
    validation = [fit.split(on_device, plan.streams(settings, seed), budget)[1] for seed in settings.seeds]
    rows = np.unique(np.concatenate(validation))
    inputs = evaluate.held(task.train, experiment.execution, rows, f"the validation examples of {task.name}")
    goal, targets = on_device.objective, np.asarray(task.train.targets)[rows]
    constant = metrics.value(goal.metrics[0], metrics.constant(goal.kind, targets, goal.num_outputs), targets)
    worst = 0.0 if goal.metrics[0].name == "accuracy" else constant or 0.0
    return SearchTask(on_device._replace(test=inputs, tests=len(rows)), rows, budget, {}, worst)


def judge(
    task: SearchTask,
    experiments: Sequence[Experiment],
    trained: Sequence[Mapping[int, Trained]],
    report: Report,
) -> list[Judgement]:
    """Train the one strategy of each experiment under all its seeds, together where shapes agree, and judge it.

    `trained` has {seed: source} for each of them. Where fits stand side by side they round as their company does: a
    score depends on the other trials of its group then, on a CPU no more than by those that share its order.
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
"""{setting: {seed: (validation score, validation loss)}}, None of a fit that diverged."""


def _judgement(scores: Collection[tuple[float, float] | None], pruned: bool) -> Judgement:
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return Judgement(None, pruned)
    score, loss = np.mean(known, axis=0).tolist()
    return Judgement(score, pruned, loss)


def prepare(task: SearchTask, experiment: Experiment, seed: int, trained: Mapping[int, Trained]) -> PreparedFit:
    """The fit of the one strategy of an experiment, from the start and in the order that other trials share."""
    settings, model, source, target = experiment.settings, experiment.model, experiment.source, experiment.target
    streams = plan.streams(settings, seed)
    [strategy] = experiment.strategies
    on_device = fit.with_recipe(task.on_device, settings.recipe)
    # A strategy that looks at data sees what the recipe makes of it.
    recipe = settings.recipe if strategy.method.data_driven else None
    identity = source.identity[seed] if source and seed in trained else None
    of_start = (strategy.label, model, settings.head, settings.batch_stats, seed, identity, recipe)
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


def ends(
    task: SearchTask,
    experiment: Experiment,
    fits: Sequence[PreparedFit],
    should_stop: Callable[[], bool],
    last_alone: bool = True,
) -> Iterator[tuple[int, np.ndarray | None]]:
    """(Which fit, its logits on the task's test inputs at its last step; None of one that diverged), as they are known.

    With `last_alone` fits are evaluated at their last step only. Where it is to stop, those that are left do not come.
    """
    last, recipe = len(fits[0].trial.rates), experiment.settings.recipe
    recipe = replace(recipe, steps=last, points=1) if last_alone else recipe
    for point in fit.drive(_under(task, experiment, recipe), fits, should_stop=should_stop):
        if point.logits is None or point.state.step < last:
            continue
        logits = point.logits()
        for row, i in enumerate(point.state.fits):
            diverged = fit.diverged_at(point.state, row, logits) is not None
            yield i, None if diverged else logits[row]


def _under(task: SearchTask, experiment: Experiment, recipe: Recipe) -> DeviceData:
    """The task under a recipe, as the fits of a table: a trial is trained in the way in which its setting will be."""
    on_device = fit.with_recipe(task.on_device, recipe)
    return on_device._replace(execution=replace(on_device.execution, many=plan.many_of(experiment)))


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
    on_device = _under(task, experiment, experiment.settings.recipe)
    last = len(group[0].fit.trial.rates)
    targets = np.asarray(on_device.task.train.targets)
    every_score: dict[int, dict[int, list[float]]] = {}
    fits = [member.fit for member in group]
    for point in fit.drive(on_device, fits, should_stop=lambda: settings <= pruned):
        if point.logits is None:
            continue
        state, logits = point.state, point.logits()
        for row, i in enumerate(state.fits):
            setting, seed, prepared = group[i]
            at = np.searchsorted(task.rows, prepared.validation)
            diverged = fit.diverged_at(state, row, logits) is not None
            measured = evaluate.measure(on_device.objective, logits[row][at], targets[prepared.validation])
            if state.step == last:
                scores[setting][seed] = None if diverged else (measured["score"], measured["loss"])
            so_far = every_score.setdefault(setting, {}).setdefault(state.step, [])
            so_far.append(task.worst if diverged or measured["score"] is None else measured["score"])
            whole = len(so_far) == len(experiment.settings.seeds) and state.step < last
            if whole and setting not in pruned and report(setting, state.step, float(np.mean(so_far))):
                pruned.add(setting)
