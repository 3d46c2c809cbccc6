"""Trials of a search: many settings trained together, and judged on validation examples alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import fits, methods, sources, transfer
from experiments.options import Settings
from experiments.transfer import Experiment
from tljax import evaluate, seeds, train
from tljax.types import Split, Task


class Judged(NamedTuple):
    """What training one setting gave."""

    accuracy: float | None
    """On validation examples, a mean over seeds; None if a fit diverged."""
    pruned: bool


Report = Callable[[int, int, float], bool]
"""(which setting, step, validation accuracy) -> whether to give it up."""


def blind(task: Task) -> Task:
    """A task without its test examples: a search that looked at them would find none."""
    test = task.test
    return task._replace(test=Split(np.asarray(test.images)[:0], np.asarray(test.labels)[:0]))


def judge(todo: Sequence[Experiment], budget: str, trained: Any, report: Report, beat: Callable[[], None]) -> list[Judged]:
    """Train the one strategy of each experiment under all its seeds, and judge it; together where shapes agree.

    `trained` is {seed: source} for each of them; `beat` is called after every segment.
    """
    shared = functools.lru_cache(maxsize=None)(lambda key, make: make)
    groups: dict[Any, list[tuple[int, int, fits.Fit]]] = {}
    for which, one in enumerate(todo):
        for seed in one.made.seeds:
            fit = _fit(one, budget, seed, trained[which], shared)
            groups.setdefault((fit.program, len(fit.trial.rates), train.batch_size(fit.trial)), []).append(
                (which, seed, fit)
            )
    scores: dict[int, dict[int, float | None]] = {which: {} for which in range(len(todo))}
    pruned: set[int] = set()
    for group in groups.values():
        # Trials that share an order and a start stand side by side.
        group.sort(key=lambda member: (member[1], id(member[2].trial.order), member[0]))
        field = fits.arena(blind(todo[group[0][0]].target), todo[group[0][0]].made.recipe, todo[group[0][0]].means)
        _train(field, group, scores, pruned, report, beat)
    return [
        Judged(None if None in (values := scores[which].values()) else float(np.mean(list(values))), which in pruned)
        for which in scores
    ]
