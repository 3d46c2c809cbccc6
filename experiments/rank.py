"""Rank sources for a target by scores, and with --verify judge the scores.

    python -m experiments.rank --sources=runs/zoo_10k --target=fashion_mnist_10k --workdir=runs/ranked

It computes the scores of every source for every target, from its features at the last stage before the head, and their
seconds. With --verify it also trains for the truth: each source is transferred by --strategies (full and head_only) at
the same label budgets under all --seeds, and each score is judged by the accuracies, beside three plain rivals: the
source's own accuracy, the number of its parameters, and the truth of the other targets, which ignores this one.
--target takes several names, with commas.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.runs import (
    budgets,
    command_line,
    console,
    directory,
    features,
    plan,
    process,
    sources,
    transfer_results,
)
from experiments.runs.command_line import flag
from experiments.runs.scores import AS_IN_PAPERS, DEFAULT, check_scores, drawn, scored
from experiments.runs.settings import ExperimentFlags, Settings
from experiments.runs.sources import Card, LoadedSource
from experiments.runs.transfer_results import TransferPlan
from tljax import plugins
from tljax.study import units
from tljax.types import InputError, Task


@dataclass(frozen=True)
class RankFlags(ExperimentFlags):
    """The flags of a ranking, and of the fits that verify it."""

    sources: tuple[str, ...] = flag(
        (), "runs of experiments.zoo or pretrain, checkpoints, files of weights; needed", role="free", place="path"
    )
    scores: tuple[str, ...] = flag(
        DEFAULT,
        f"the scores that rank the sources; also {', '.join(AS_IN_PAPERS)}, which grow with the width",
        role="free",
    )
    score_examples: int = flag(1000, "the most labelled examples that a score looks at", role="free")
    verify: bool = flag(False, "train on the targets from every source, and judge the scores", role="free")
    resamples: int = flag(1000, "the number of bootstrap samples of the sources", role="free")


class Ranking(NamedTuple):
    """All that a ranking needs, read and checked."""

    settings: Settings
    cards: tuple[Card, ...]
    sources: Mapping[str, LoadedSource]
    """{name of a card: its source}."""
    targets: Mapping[str, Task]
    transfers: TransferPlan | None
    """The fits that verify the scores; None without --verify."""


def run(values: Mapping[str, Any], options: RankFlags) -> dict[str, Any]:
    """Score, verify and report; returns the numbers of ranking.json.

    `values` has {flag: value} of the flags that programs share.
    """
    ranking = prepare(values, options)
    settings, cards, loaded, targets, transfers = ranking
    if settings.dry_run:
        fits = sum(len(plan.planned(each)) for each in transfers.experiments()) if transfers else 0
        rows = [(card.name, _source_score(card), f"{card.parameters:,}") for card in cards]
        notes = [f"{len(rows)} sources, {len(targets)} targets, {fits} fits to verify"]
        heading = "own test accuracy %" if {card.metric for card in cards} == {units.ACCURACY} else "own test score"
        console.table("sources", ["source", heading, "parameters"], rows, notes)
        return {}
    fingerprints = {name: task.fingerprint for name, task in targets.items()}
    with directory.opened(settings, "rank", command_line.flagfile_lines(options)) as folder:
        if process.first():
            directory.record_environment(folder, fingerprints)
        table = {
            (card.name, name): scored(folder, loaded[card.name], task, settings, options.scores, options.score_examples)
            for name, task in targets.items()
            for card in cards
        }
        truths = transfer_results.obtain(transfers, folder, cards, settings) if transfers else []
        if not process.first():
            return {}
        from experiments.pages import ranking as page  # draws: matplotlib takes a second to import

        verdict = page.judged(cards, targets, table, truths, options.scores, options.resamples)
        directory.replace(folder / "ranking.json", json.dumps(page.plain(verdict.numbers), indent=1) + "\n")
        page.show(verdict, folder, cards, table, [note for task in targets.values() for note in _notes(ranking, task)])
    return verdict.numbers


def _notes(ranking: Ranking, task: Task) -> list[str]:
    """The notes on a target: data that is taken in part, and label budgets that are not full."""
    validation = ranking.settings.recipe.validation if ranking.transfers else 0.0
    return [task.note, *budgets.notes(ranking.settings.train_examples, task, validation)]


def prepare(values: Mapping[str, Any], options: RankFlags) -> Ranking:
    """Read the sources and targets; raises InputError if they cannot be ranked."""
    settings = Settings.from_flags(**values)
    check_scores(options.scores)
    names = [name for name in plugins.split(settings.target or "", ",") if name]
    if not options.sources or not names:
        raise InputError("--sources and --target are needed: name run directories, and one data set or more")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--target names {twice[0]} twice: give each once")
    if settings.source or settings.source_checkpoint:
        raise InputError("--sources names what is ranked: leave out --source and --source_checkpoint")
    if options.score_examples < 2 or options.resamples < 10:
        raise InputError("--score_examples must be at least 2, --resamples at least 10")
    for name in sources.rule_flags(settings):
        if not any(sources.is_weights_file(place) for place in options.sources):
            raise InputError(f"--{name} is for weights from elsewhere: leave it out, or name a file in --sources")
    execution = process.prepare(settings)
    cards = _distinct_names([card for place in options.sources for card in _read_cards(place, values)])
    if options.verify and len(cards) < 3:
        raise InputError(f"--sources names {len(cards)}: to judge scores give three or more")
    one_seed = {**values, "seeds": (0,)}  # each place holds one source, whatever the seeds of the targets
    loaded = {card.name: _load(one_seed, card.place) for card in cards}
    _refuse_copies(loaded)
    shape = settings.image_shape or next(iter(loaded.values())).source.shape
    targets = {name: plan.load_task(settings, name, shape) for name in names}
    for task in targets.values():
        if task.kind != "classes":
            raise InputError(
                f"--target={task.name}: its targets are {task.kind}, and scores of sources are of classes: rank such "
                "sources by what experiments.compare says of them"
            )
        for name, source in loaded.items():
            try:
                features.same_shape(source, task)
            except InputError as error:
                raise InputError(f"source '{name}': {error}") from error
        for budget in settings.train_examples:
            drawn(settings, budget, task, options.score_examples)
    transfers = transfer_results.planned(values, settings, cards, targets, execution) if options.verify else None
    return Ranking(settings, tuple(cards), loaded, targets, transfers)


def _read_cards(place: str, values: Mapping[str, Any]) -> list[Card]:
    """Read cards by `sources.read_cards`; its errors name the flag of this program."""
    try:
        return sources.read_cards(place, values)
    except InputError as error:
        raise command_line.flag_renamed(error, "source_checkpoint", "sources") from error


def _load(values: Mapping[str, Any], place: str) -> LoadedSource:
    """Load a source by `sources.load`; its errors name the flag of this program."""
    try:
        return sources.load(sources.settings_of(values, place, several=True))
    except InputError as error:
        raise command_line.flag_renamed(error, "source_checkpoint", "sources") from error


def _distinct_names(cards: Sequence[Card]) -> list[Card]:
    """The cards under distinct names: cards that share a name get their places added to it.

    Raises InputError if one card is given twice.
    """
    names = [card.name for card in cards]
    renamed = [
        card._replace(name=f"{card.name} in {card.place}") if names.count(card.name) > 1 else card for card in cards
    ]
    distinct = [card.name for card in renamed]
    repeated = [name for name in distinct if distinct.count(name) > 1]
    if repeated:
        raise InputError(f"--sources names '{repeated[0]}' twice: give each once")
    return renamed


def _refuse_copies(loaded: Mapping[str, LoadedSource]) -> None:
    """Raise InputError if two sources are the same: they would tie, and count twice."""
    names: dict[str, str] = {}
    for name, source in loaded.items():
        if source.identity in names:
            raise InputError(f"--sources names one source twice, as '{names[source.identity]}' and '{name}': keep one")
        names[source.identity] = name


def _source_score(card: Card) -> str:
    """How good a source is at its own task: its accuracy in %, or another metric with its name."""
    return "-" if card.accuracy is None else units.of_source(card.metric, card.accuracy)


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, RankFlags, refused=["source", "source_checkpoint"])
