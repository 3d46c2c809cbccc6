"""Train many sources in one go, each with a card.

    python -m experiments.zoo --flagfile=experiments/flags/zoo_10k.flags

Each name of --zoo is a source, trained in one run directory: a data set with its changes (labels=0-4,
shuffle_labels=0.5, rotate=30, permute=1), and with flags of the source's fit and of the model that are its own
(mnist:steps=50, mnist:hidden=64+64, mnist:seed=1; mnist:untrained is the draw it would start from). Each leaves a
checkpoint for --source_checkpoint and a card, cards/NAME.json: what it was trained on, how, and its accuracy.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.runs import command_line, console, directory, fit, plan, process, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import (
    CheckpointFlags,
    DataFlags,
    ModelFlags,
    Recipe,
    Settings,
    SourceFlags,
    TargetFlags,
    TrainFlags,
    parse_flags,
)
from tljax import plugins
from tljax.study import units
from tljax.types import InputError, Task

UNTRAINED = {"source_steps": "1", "source_learning_rate": "0", "source_warmup": "0"}
"""Flags of an untrained source: a step at learning rate 0 leaves the parameters as they were drawn."""
_RECIPE = {f.name for f in dataclasses.fields(Recipe)}


@dataclasses.dataclass(frozen=True)
class ZooFlags(SourceFlags, CheckpointFlags, TargetFlags, DataFlags, ModelFlags, TrainFlags):
    """Which sources are trained, without a target and without strategies."""

    zoo: tuple[str, ...] = flag(
        (), "the sources, needed: mnist,mnist:labels=0-4,mnist:steps=50,mnist:hidden=128", place="data"
    )


class Entry(NamedTuple):
    """A source of the list."""

    name: str
    settings: Settings
    trivial: bool
    """Whether it learnt nothing of its task: it is untrained, or all its labels are shuffled."""


def read_entry(text: str, flags: Mapping[str, Any]) -> Entry:
    """The source that a name of --zoo means, with the flags that all sources share; raises InputError for bad text.

    >>> source = read_entry("mnist:labels=0-4:steps=50:hidden=64+64", {})
    >>> source.settings.source, source.settings.source_recipe.steps, source.settings.hidden
    ('mnist:labels=0-4', 50, (64, 64))
    """
    plugins.parse(text)
    data: list[str] = []
    changed: dict[str, str] = {}
    for part in (part.strip() for part in plugins.split(text, ":")):
        name, equals, value = part.partition("=")
        if data and part == "untrained":
            changed |= UNTRAINED
        elif data and equals and name in _RECIPE:
            changed[f"source_{name}"] = value
        elif data and equals and name in ("hidden", "activation", "seed"):
            changed["seeds" if name == "seed" else name] = value.replace("+", ",")
        else:
            data.append(part)
    try:
        parsed = parse_flags(["zoo", *(f"--{name}={value}" for name, value in changed.items())])
        settings = Settings.from_flags(**{**flags, **parsed, "source": ":".join(data)})
    except InputError as error:
        raise InputError(f"--zoo={text}: {command_line.in_flags(error)}") from error
    if len(settings.seeds) > 1:
        raise InputError(
            f"--zoo={text} has {len(settings.seeds)} seeds: give one, and other sources as {data[0]}:seed=1"
        )
    options = dict(part.partition("=")[::2] for part in data[1:])
    shuffled = _number(options.get("shuffle_labels", "0")) >= 1
    return Entry(text, settings, shuffled or settings.source_recipe.learning_rate == 0)


def _number(text: str) -> float:
    """The number in a text, or 0 if it holds none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def run(flags: Mapping[str, Any], zoo_flags: ZooFlags) -> list[dict[str, Any]]:
    """Train the sources that the run directory lacks; returns the cards of all."""
    base, zoo = Settings.from_flags(**flags), zoo_flags.zoo
    twice = [text for text in zoo if zoo.count(text) > 1]
    if twice or not zoo:
        raise InputError(f"--zoo names {f'{twice[0]} twice: give each once' if twice else 'nothing: name sources'}")
    if base.source or base.source_checkpoint or base.target:
        raise InputError("--zoo names what is trained: leave out --source, --source_checkpoint and --target")
    execution = process.prepare(base)
    entries = [read_entry(text, flags) for text in zoo]
    tasks = [_load(source) for source in entries]
    if base.dry_run:
        _print_plan(entries, tasks)
        return []
    fingerprints = {task.name: task.fingerprint for task in tasks}
    with directory.opened(base, "zoo", command_line.flagfile_lines(zoo_flags)) as folder:
        if process.first():
            directory.record_environment(folder, fingerprints)
        cards = []
        for number, (source, task) in enumerate(zip(entries, tasks, strict=True)):
            [result] = fit.train_sources(source.settings, task, folder, execution).values()
            about = fit.about(source.settings, task)
            card = {"number": number, "name": source.name, "trivial": source.trivial, **about}
            if process.first():
                card = sources.write_card(folder, card, result, source.settings.source_recipe)
            cards.append(card)
        if process.first():
            _print_cards(cards, [str(folder / "cards"), *sorted({task.note for task in tasks if task.note})])
    return cards


def _load(source: Entry) -> Task:
    """The task of a source; an InputError names the source in --zoo."""
    try:
        return plan.source_task(source.settings)
    except InputError as error:
        raise InputError(f"--zoo={source.name}: {command_line.in_flags(error)}") from error


def _print_plan(entries: Sequence[Entry], tasks: Sequence[Task]) -> None:
    """Print the table of a dry run: each source with its examples and its steps."""
    rows = []
    for source, task in zip(entries, tasks, strict=True):
        recipe, hidden = source.settings.source_recipe, source.settings.hidden
        steps = plan.count_steps(recipe, len(plan.draw_examples(recipe, "all", task, 0)[0]))
        rows.append((source.name, ",".join(map(str, hidden)), f"{len(task.train.targets):,}", f"{steps:,}"))
    console.table("zoo", ["source", "hidden", "examples", "steps"], rows, [f"{len(rows)} sources"])


def _print_cards(cards: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Print the table of the trained sources."""
    rows = [
        (
            card["name"],
            _source_score(card),
            f"{card['parameters']:,}",
            f"{card['steps']:,}",
            f"{card['seconds']:.1f}",
            "yes" if card["trivial"] else "-",
            card["checkpoint"],
        )
        for card in cards
    ]
    metrics = {units.from_record(card.get("metric")) for card in cards}
    heading = "own test accuracy %" if metrics == {units.ACCURACY} else "own test score"
    columns = ["source", heading, "parameters", "steps", "seconds", "trivial", "checkpoint"]
    console.table("zoo", columns, rows, notes)


def _source_score(card: Mapping[str, Any]) -> str:
    """How good a source is at its own task: its accuracy in %, or another metric with its name."""
    metric = units.from_record(card.get("metric"))
    value = card["accuracy"] if metric == units.ACCURACY else card["score"]
    return "diverged" if value is None else units.of_source(metric, value)


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, ZooFlags, refused=["source", "source_checkpoint", "target"])
