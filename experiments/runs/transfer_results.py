"""The truth about sources: the accuracy that each leads to, by the machinery of experiments.transfer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import budgets, directory, fit, plan, sources
from experiments.runs.plan import Experiment
from experiments.runs.settings import Settings
from experiments.runs.sources import Card
from tljax.types import InputError, Task

SCRATCH = "scratch"


class Plan(NamedTuple):
    """All fits that the truth takes."""

    scratch: Mapping[str, Experiment]
    """{target: training from scratch}, of the model that the flags describe."""
    transfers: Mapping[tuple[str, str], Experiment]
    """{(source, target): the strategies}."""


class Truth(NamedTuple):
    """Of one strategy at one label budget."""

    strategy: str
    budget: str
    accuracies: Mapping[str, np.ndarray]
    """{target: test accuracy, a fraction, float [seeds, sources]}."""
    scratch: Mapping[str, float]
    """{target: the mean over the same seeds}."""


def planned(
    given: Mapping[str, Any], made: Settings, cards: Sequence[Card], targets: Mapping[str, Task], execution: Any
) -> Plan:
    """Read and check all fits; raises InputError for what cannot be, and for two names of one fit."""
    names = tuple(name for name in made.strategies if name != SCRATCH)
    if not names:
        raise InputError("--strategies names nothing but scratch: the truth is of full, head_only or others")
    scratch, transfers = {}, {}
    for target, task in targets.items():
        shape = {"image_shape": tuple(task.train.images.shape[1:])} if task.train.images.dtype == np.uint8 else {}
        bare = {**given, **shape, "target": target, "strategies": (SCRATCH,)}
        scratch[target] = plan.prepare(Settings.from_flags(**bare), execution, only=True)._replace(target=task)
        for card in cards:
            pair = {**given, "target": target, "strategies": names}
            todo = plan.prepare(sources.settings_of(pair, card.place, several=True), execution, only=True)
            transfers[card.name, target] = todo._replace(target=task)  # one copy of the images for all
    for todo in list(transfers.values())[:1]:  # the others have the same strategies and budgets
        _refuse_one_fit_twice(todo)
    return Plan(scratch, transfers)


def _refuse_one_fit_twice(todo: Experiment) -> None:
    """Raise InputError if two strategies, or two label budgets, of the flags come to the same fit."""
    names: dict[str, str] = {}
    for method in todo.strategies:
        for budget in todo.settings.train_examples:
            part = todo._replace(
                strategies=(method,), settings=dataclasses.replace(todo.settings, train_examples=(budget,))
            )
            for key in plan.planned(part):
                name = f"{method.label} at {budget}"
                if key in names:
                    raise InputError(f"'{names[key]}' and '{name}' are the same fits on {todo.target.name}: keep one")
                names[key] = name


def found(transfers: Plan, folder: Path, cards: Sequence[Card], made: Settings) -> list[Truth]:
    """Train what of the plan is missing, and what it gives.

    Raises InputError for a fit that diverged, and for two fits of one source, strategy, budget and seed.
    """
    _refuse_doubles(folder)
    every = [*transfers.scratch.values(), *transfers.transfers.values()]
    data = {name: mark for todo in every for name, mark in plan.fingerprints(todo).items()}
    of_scratch = {name: _accuracies(todo, folder, data) for name, todo in transfers.scratch.items()}
    of_sources = {key: _accuracies(todo, folder, data) for key, todo in transfers.transfers.items()}
    truths = []
    for strategy in [method.label for method in next(iter(transfers.transfers.values())).strategies]:
        for budget in made.train_examples:
            seeds = budgets.seeds(budget, made.seeds)
            accuracies = {
                target: np.array(
                    [[of_sources[card.name, target][strategy, budget, seed] for card in cards] for seed in seeds]
                )
                for target in transfers.scratch
            }
            without = {
                target: float(np.mean([of_scratch[target][SCRATCH, budget, seed] for seed in seeds]))
                for target in transfers.scratch
            }
            truths.append(Truth(strategy, budget, accuracies, without))
    return truths


def _refuse_doubles(folder: Path) -> None:
    """Raise InputError if results.jsonl holds two fits of one key: which of them counted would be chance."""
    names: dict[str, str] = {}
    for number, line in enumerate(directory.results(folder), 1):
        where = f"'{line.name}' (fit {number})"
        if line.key in names:
            raise InputError(
                f"'{folder / 'results.jsonl'}' holds two fits of one source, strategy, budget and seed, "
                f"{names[line.key]} and {where}: delete the line that does not belong there"
            )
        names[line.key] = where


def _accuracies(todo: Experiment, folder: Path, data: Mapping[str, str]) -> dict[tuple[str, str, int], float]:
    """{(strategy, budget, seed): test accuracy}."""
    lines = {line.key: line for line in fit.within(todo, folder, data)}
    known: dict[tuple[str, str, int], float] = {}
    for key, job in plan.planned(todo).items():
        line = lines[key]
        if line.test_accuracy is None:
            raise InputError(
                f"fit '{line.name}' of source {todo.settings.source_checkpoint} diverged, so there is no truth: leave "
                "the source out, or lower --learning_rate"
            )
        known[job.strategy.label, job.budget, job.seed] = line.test_accuracy
    return known
