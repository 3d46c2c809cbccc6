"""Stop when it is decided: seeds are added in rounds until every verdict of the family is.

A round trains the next seeds of the strategies that are open still, each beside what it is compared with, and judges
all fits there are by `tljax.study.sequences`, whose intervals hold at any number of seeds and wherever each comparison
stops. A strategy whose verdicts are all decided, or that the test items forbid to decide, stops training; what others
are compared with goes on for them. So every comparison keeps all its pairs, under seeds that no result has chosen, and
fits of it under further seeds are never looked at.

Which fits a round has follows from the results of the rounds before: a run that was killed goes the same way again.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from experiments.runs import plan
from experiments.runs.judging import Judging, judged
from experiments.runs.plan import Experiment
from experiments.runs.predictions import Predictions
from experiments.runs.settings import Settings
from tljax.study import sequences
from tljax.study.summary import listed
from tljax.study.verdicts import Comparison
from tljax.types import InputError

AnyJudging = TypeVar("AnyJudging", bound=Judging)


def rounds(judging: Judging, settings: Settings, most: int) -> list[tuple[int, ...]]:
    """The seeds that each round adds; without --until one round of all seeds.

    With `most` below `sequences.FEWEST` there is one round too. Raises InputError for flags that do not go together.
    """
    if not judging.until:
        return [settings.seeds]
    if settings.distributed:
        raise InputError("--until=decided is of one process: leave --distributed out, or name --seeds without --until")
    if of_one := [budget for budget in settings.train_examples if ":seeds" in budget]:
        raise InputError(f"--train_examples={of_one[0]} has seeds of its own: with --until all budgets have the same")
    if most < 2:
        raise InputError(f"--most={most}: give 2 seeds or more")
    if most < sequences.FEWEST:
        first, *others = sequences.rounds(settings.seeds, most)
        return [(*first, *(seed for added in others for seed in added))]
    return sequences.rounds(settings.seeds, most)


def of_a_plan(judging: AnyJudging, most: int) -> AnyJudging:
    """Judging without `until` where so few seeds are planned that they are judged by the method of a fixed number."""
    return replace(judging, until=None) if most < sequences.FEWEST else judging


def family(parts: Sequence[Predictions], judging: Judging) -> list[Comparison]:
    """The verdicts on all fits there are so far, by the method that `judging` says."""
    return judged(parts, judging)[0]


def open_of(family: Sequence[Comparison], against: str) -> set[tuple[str | None, str, str]]:
    """(source, target, strategy) of which fits are wanted still; of `against`, and of scratch, for the others' sake.

    Exploratory strategies get fits as long as one of the primary family is open.
    """
    wanted: set[tuple[str | None, str, str]] = set()
    if all(comparison.settled or comparison.exploratory for comparison in family):
        return wanted
    for comparison in family:
        if not comparison.settled:
            source, target = comparison.source, comparison.target
            wanted |= {(source, target, comparison.strategy), (source, target, against), (None, target, "scratch")}
    return wanted


def open_strategies(experiment: Experiment, wanted: Collection[tuple[str | None, str, str]]) -> Experiment:
    """An experiment with those of its strategies of which fits are wanted still."""
    source, target = experiment.source.name if experiment.source else None, experiment.target.name
    chosen = [
        strategy
        for strategy in experiment.strategies
        if (None if strategy.name == "scratch" else source, target, plan.label_in_results(strategy)) in wanted
    ]
    return experiment._replace(strategies=tuple(chosen))


def line(family: Sequence[Comparison], seeds: int, more: int) -> str:
    """What is said after a round: how many seeds there are, what is decided, and how many seeds come next."""
    primary = [comparison for comparison in family if not comparison.exploratory]
    undecided = list(dict.fromkeys(comparison.strategy for comparison in primary if not comparison.settled))
    if not undecided:
        return f"{seeds} seeds: no verdict is open"
    following = f"{more} more seeds" if more else "--most is reached"
    return f"{seeds} seeds: open are {listed(undecided)}; {following}"
