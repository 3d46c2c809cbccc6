"""Transfer results: the accuracy (or primary metric) that each source leads to, as experiments.transfer trains it.

They are the truth that experiments.rank --verify holds the scores of sources to.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import budgets, directory, fit, plan, sources
from experiments.runs.plan import Experiment
from experiments.runs.settings import Settings
from experiments.runs.sources import Card
from tljax.study import units
from tljax.study.results import metric, score
from tljax.study.units import ACCURACY
from tljax.types import InputError, Metric, Task

SCRATCH = "scratch"


class TransferPlan(NamedTuple):
    """All fits that transfer results take."""

    scratch: Mapping[str, Experiment]
    """{target: training from scratch}, of the model that the flags describe."""
    transfers: Mapping[tuple[str, str], Experiment]
    """{(source, target): the strategies}."""

    def experiments(self) -> list[Experiment]:
        """All experiments, those from scratch first."""
        return [*self.scratch.values(), *self.transfers.values()]


class TransferResults(NamedTuple):
    """What each source leads to under one strategy at one label budget."""

    strategy: str
    budget: str
    accuracies: Mapping[str, np.ndarray]
    """{target: test accuracy, a fraction, or another metric turned so that more is better, float [seeds, sources]}."""
    scratch: Mapping[str, float]
    """{target: the same from scratch, the mean over the same seeds}."""
    metric: Metric = ACCURACY
    """What they are of."""


def planned(
    flags: Mapping[str, Any], settings: Settings, cards: Sequence[Card], targets: Mapping[str, Task], execution: Any
) -> TransferPlan:
    """Read and check all fits; raises InputError for what cannot be trained, and for two names of one fit."""
    names = tuple(name for name in settings.strategies if name != SCRATCH)
    if not names:
        raise InputError("--strategies names nothing but scratch: the truth is of full, head_only or others")
    scratch, transfers = {}, {}
    for target, task in targets.items():
        spec = task.train.spec
        is_image = getattr(spec, "dtype", None) == np.uint8
        shape = {"image_shape": tuple(spec.shape)} if is_image else {}
        from_scratch = {**flags, **shape, "target": target, "strategies": (SCRATCH,)}
        scratch[target] = plan.prepare(Settings.from_flags(**from_scratch), execution, only=True)._replace(target=task)
        for card in cards:
            pair = {**flags, "target": target, "strategies": names}
            experiment = plan.prepare(sources.settings_of(pair, card.place, several=True), execution, only=True)
            transfers[card.name, target] = experiment._replace(target=task)  # one copy of the images for all
    for experiment in list(transfers.values())[:1]:  # the others have the same strategies and budgets
        _refuse_one_fit_twice(experiment)
    return TransferPlan(scratch, transfers)


def _refuse_one_fit_twice(experiment: Experiment) -> None:
    """Raise InputError if two strategies, or two label budgets, of the flags come to the same fit."""
    names: dict[str, str] = {}
    for strategy in experiment.strategies:
        for budget in experiment.settings.train_examples:
            settings = dataclasses.replace(experiment.settings, train_examples=(budget,))
            for key in plan.planned(experiment._replace(strategies=(strategy,), settings=settings)):
                name = f"{strategy.label} at {budget}"
                if key in names:
                    target = experiment.target.name
                    raise InputError(f"'{names[key]}' and '{name}' are the same fits on {target}: keep one")
                names[key] = name


def obtain(
    transfer_plan: TransferPlan, folder: Path, cards: Sequence[Card], settings: Settings
) -> list[TransferResults]:
    """Train what of the plan is missing, and return the results of each strategy and budget.

    Raises InputError for a fit that diverged, and for two fits of one source, strategy, budget and seed.
    """
    _refuse_doubles(folder)
    data = {
        name: mark for experiment in transfer_plan.experiments() for name, mark in plan.fingerprints(experiment).items()
    }
    of_scratch = {target: _accuracies(each, folder, data) for target, each in transfer_plan.scratch.items()}
    of_sources = {key: _accuracies(each, folder, data) for key, each in transfer_plan.transfers.items()}
    some = next(iter(transfer_plan.transfers.values()))
    measured_by = plan.objective_of(some.target, some.settings.recipe).metrics[0]
    results = []
    for strategy in [strategy.label for strategy in next(iter(transfer_plan.transfers.values())).strategies]:
        for budget in settings.train_examples:
            seeds = budgets.seeds(budget, settings.seeds)
            accuracies = {
                target: np.array(
                    [[of_sources[card.name, target][strategy, budget, seed] for card in cards] for seed in seeds]
                )
                for target in transfer_plan.scratch
            }
            scratch = {
                target: float(np.mean([of_scratch[target][SCRATCH, budget, seed] for seed in seeds]))
                for target in transfer_plan.scratch
            }
            results.append(TransferResults(strategy, budget, accuracies, scratch, measured_by))
    return results


def _refuse_doubles(folder: Path) -> None:
    """Raise InputError if results.jsonl holds two fits of one key: which of them counted would be chance."""
    names: dict[str, str] = {}
    for number, result in enumerate(directory.results(folder), 1):
        name = f"'{result.name}' (fit {number})"
        if result.key in names:
            raise InputError(
                f"'{folder / 'results.jsonl'}' holds two fits of one source, strategy, budget and seed, "
                f"{names[result.key]} and {name}: delete the line that does not belong there"
            )
        names[result.key] = name


def _accuracies(
    experiment: Experiment, folder: Path, fingerprints: Mapping[str, str]
) -> dict[tuple[str, str, int], float]:
    """{(strategy, budget, seed): test accuracy, or another metric, turned}, after what is missing was trained."""
    results = {result.key: result for result in fit.within(experiment, folder, fingerprints)}
    accuracies: dict[tuple[str, str, int], float] = {}
    for key, job in plan.planned(experiment).items():
        result = results[key]
        value = score(result)
        if value is None:
            source = experiment.settings.source_checkpoint
            raise InputError(
                f"fit '{result.name}' of source {source} diverged, so there is no truth: leave the source out, or "
                "lower --learning_rate"
            )
        accuracies[job.strategy.label, job.budget, job.seed] = units.sign(metric(result)) * value
    return accuracies
