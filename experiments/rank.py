"""Which source? Scores of many for a target, and with --verify what they were worth.

    python -m experiments.rank --sources=runs/zoo_10k --target=fashion_mnist_10k --workdir=runs/ranked

Scores of every source for every target, from its features at the last stage before the head, and their seconds. With
--verify also the truth: each source is transferred by --strategies (full and head_only) at the same label budgets
under all --seeds, and each score is judged by it, beside three plain rivals: the source's own accuracy, the number of
its parameters, and the truth of the other targets, which ignores this one. --target takes several
names, with commas.
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
    console,
    directory,
    features,
    flags,
    plan,
    process,
    sources,
    transfer_results,
)
from experiments.runs import scores as scores_of
from experiments.runs.flags import flag
from experiments.runs.settings import ExperimentFlags, Settings
from experiments.runs.sources import Card, LoadedSource
from tljax import plugins
from tljax.types import InputError, Task


@dataclass(frozen=True)
class RankFlags(ExperimentFlags):
    """What is ranked, and how."""

    sources: tuple[str, ...] = flag(
        (), "runs of experiments.zoo or pretrain, checkpoints, files of weights; needed", role="free", place="path"
    )
    scores: tuple[str, ...] = flag(
        scores_of.DEFAULT,
        f"what sources are ranked by; also {', '.join(scores_of.AS_IN_PAPERS)}, which grow with the width",
        role="free",
    )
    score_examples: int = flag(1000, "the most labelled examples that a score looks at", role="free")
    verify: bool = flag(False, "train on the targets from every source, and judge the scores", role="free")
    resamples: int = flag(1000, "how many bootstrap samples of the sources", role="free")


class Todo(NamedTuple):
    """All of a ranking, read and checked."""

    settings: Settings
    cards: tuple[Card, ...]
    origins: Mapping[str, LoadedSource]
    targets: Mapping[str, Task]
    plan: transfer_results.TransferPlan | None


def run(given: Mapping[str, Any], asked: RankFlags) -> dict[str, Any]:
    """Score, verify and report; what ranking.json says."""
    todo = prepared(given, asked)
    if todo.settings.dry_run:
        fits = [len(plan.planned(one)) for one in _experiments(todo.plan)]
        rows = [(card.name, _percent(card.accuracy), f"{card.parameters:,}") for card in todo.cards]
        notes = [f"{len(rows)} sources, {len(todo.targets)} targets, {sum(fits)} fits to verify"]
        console.table("sources", ["source", "own test accuracy %", "parameters"], rows, notes)
        return {}
    marks = {name: task.fingerprint for name, task in todo.targets.items()}
    with directory.opened(todo.settings, "rank", flags.flagfile_lines(asked)) as folder:
        if process.first():
            directory.record_environment(folder, marks)
        table = {
            (card.name, name): scores_of.scored(
                folder, todo.origins[card.name], task, todo.settings, asked.scores, asked.score_examples
            )
            for name, task in todo.targets.items()
            for card in todo.cards
        }
        truths = transfer_results.obtain(todo.plan, folder, todo.cards, todo.settings) if todo.plan else []
        if not process.first():
            return {}
        notes = [line for task in todo.targets.values() for line in _noted(todo, task)]
        from experiments.pages import ranking as page  # draws: matplotlib takes a second to import

        verdict = page.judged(todo.cards, todo.targets, table, truths, asked.scores, asked.resamples)
        directory.replace(folder / "ranking.json", json.dumps(page.plain(verdict.numbers), indent=1) + "\n")
        page.show(verdict, folder, todo.cards, table, notes)
    return verdict.numbers


def _noted(todo: Todo, task: Task) -> list[str]:
    held = todo.settings.recipe.validation if todo.plan else 0.0
    return [task.note, *budgets.notes(todo.settings.train_examples, task, held)]


def prepared(given: Mapping[str, Any], asked: RankFlags) -> Todo:
    """Read sources and targets; raises InputError for what cannot be ranked."""
    made = Settings.from_flags(**given)
    scores_of.check(asked.scores)
    names = [name for name in plugins.split(made.target or "", ",") if name]
    if not asked.sources or not names:
        raise InputError("--sources and --target are needed: name run directories, and one data set or more")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--target names {twice[0]} twice: give each once")
    if made.source or made.source_checkpoint:
        raise InputError("--sources names what is ranked: leave out --source and --source_checkpoint")
    if asked.score_examples < 2 or asked.resamples < 10:
        raise InputError("--score_examples must be at least 2, --resamples at least 10")
    if made.source_rename and not any(sources.is_weights_file(place) for place in asked.sources):
        raise InputError("--source_rename is for weights from elsewhere: leave it out, or name a file in --sources")
    execution = process.prepare(made)
    found = _named([card for place in asked.sources for card in _read(place, given)])
    if asked.verify and len(found) < 3:
        raise InputError(f"--sources names {len(found)}: to judge scores give three or more")
    alone = {**given, "seeds": (0,)}  # each place holds one source, whatever the seeds of the targets
    origins = {card.name: _loaded(alone, card.place) for card in found}
    _refuse_copies(origins)
    shape = made.image_shape or next(iter(origins.values())).source.shape
    targets = {name: plan.load_task(made, name, shape) for name in names}
    for task in targets.values():
        for name, one in origins.items():
            try:
                features.same_shape(one, task)
            except InputError as error:
                raise InputError(f"source '{name}': {error}") from error
        for budget in made.train_examples:
            scores_of.drawn(made, budget, task, asked.score_examples)
    transfers = transfer_results.planned(given, made, found, targets, execution) if asked.verify else None
    return Todo(made, tuple(found), origins, targets, transfers)


def _read(place: str, given: Mapping[str, Any]) -> list[Card]:
    """`sources.read_cards`, whose errors name the flag of this program."""
    try:
        return sources.read_cards(place, given)
    except InputError as error:
        raise InputError(str(error).replace("--source_checkpoint", "--sources")) from error


def _loaded(given: Mapping[str, Any], place: str) -> LoadedSource:
    """`sources.load`, whose errors name the flag of this program."""
    try:
        return sources.load(sources.settings_of(given, place, several=True))
    except InputError as error:
        raise InputError(str(error).replace("--source_checkpoint", "--sources")) from error


def _named(found: Sequence[Card]) -> list[Card]:
    """Cards by names of their own: where two are called the same, with their places."""
    names = [card.name for card in found]
    named = [
        card._replace(name=f"{card.name} in {card.place}") if names.count(card.name) > 1 else card for card in found
    ]
    twice = [card.name for card in named if [one.name for one in named].count(card.name) > 1]
    if twice:
        raise InputError(f"--sources names '{twice[0]}' twice: give each once")
    return named


def _refuse_copies(origins: Mapping[str, LoadedSource]) -> None:
    """Raise InputError if two sources are one: they would tie with themselves, and count twice."""
    names: dict[str, str] = {}
    for name, one in origins.items():
        if one.identity in names:
            raise InputError(f"--sources names one source twice, as '{names[one.identity]}' and '{name}': keep one")
        names[one.identity] = name


def _experiments(transfers: transfer_results.TransferPlan | None) -> list[plan.Experiment]:
    return [*transfers.scratch.values(), *transfers.transfers.values()] if transfers else []


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), run, RankFlags, refused=["source", "source_checkpoint"])
