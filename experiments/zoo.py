"""Train many sources in one go, each with a card.

    python -m experiments.zoo --flagfile=experiments/flags/zoo_10k.flags

Each name of --zoo is a source, trained in one run directory: a data set with its changes (labels=0-4,
shuffle_labels=0.5, rotate=30, permute=1), and with flags of the source's fit and of the model that are its own
(mnist:steps=50, mnist:hidden=64+64, mnist:seed=1; mnist:untrained is the draw it would start from). Each leaves a
checkpoint for --source_checkpoint and a card, cards/NAME.json: what it was trained on, how, and its accuracy.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.runs import console, directory, fit, flags, plan, process, sources
from experiments.runs.flags import flag
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
from tljax.types import InputError, Task

UNTRAINED = {"source_steps": "1", "source_learning_rate": "0", "source_warmup": "0"}
"""A step at rate 0 leaves what was drawn."""
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
    made: Settings
    trivial: bool


def entry(text: str, given: Mapping[str, Any]) -> Entry:
    """A source as it is written, with the flags that all have; raises InputError for what is none.

    >>> one = entry("mnist:labels=0-4:steps=50:hidden=64+64", {})
    >>> one.made.source, one.made.source_recipe.steps, one.made.hidden
    ('mnist:labels=0-4', 50, (64, 64))
    """
    plugins.parse(text)
    data: list[str] = []
    own: dict[str, str] = {}
    for part in (part.strip() for part in plugins.split(text, ":")):
        name, equals, value = part.partition("=")
        if data and part == "untrained":
            own |= UNTRAINED
        elif data and equals and name in _RECIPE:
            own[f"source_{name}"] = value
        elif data and equals and name in ("hidden", "activation", "seed"):
            own["seeds" if name == "seed" else name] = value.replace("+", ",")
        else:
            data.append(part)
    try:
        more = parse_flags(["zoo", *(f"--{name}={value}" for name, value in own.items())])
        made = Settings.from_flags(**{**given, **more, "source": ":".join(data)})
    except InputError as error:
        raise InputError(f"--zoo={text}: {flags.in_flags(error)}") from error
    if len(made.seeds) > 1:
        raise InputError(f"--zoo={text} has {len(made.seeds)} seeds: give one, and other sources as {data[0]}:seed=1")
    changes = dict(part.partition("=")[::2] for part in data[1:])
    shuffled = _number(changes.get("shuffle_labels", "0")) >= 1
    return Entry(text, made, shuffled or made.source_recipe.learning_rate == 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def run(given: Mapping[str, Any], asked: ZooFlags) -> list[dict[str, Any]]:
    """Train what of the list is missing in the run directory; the cards."""
    base, zoo = Settings.from_flags(**given), asked.zoo
    twice = [text for text in zoo if zoo.count(text) > 1]
    if twice or not zoo:
        raise InputError(f"--zoo names {f'{twice[0]} twice: give each once' if twice else 'nothing: name sources'}")
    if base.source or base.source_checkpoint or base.target:
        raise InputError("--zoo names what is trained: leave out --source, --source_checkpoint and --target")
    execution = process.prepare(base)
    entries = [entry(text, given) for text in zoo]
    tasks = [_checked(one) for one in entries]
    if base.dry_run:
        _show(entries, tasks)
        return []
    named = {task.name: task.fingerprint for task in tasks}
    with directory.opened(base, "zoo", flags.flagfile_lines(asked)) as folder:
        if process.first():
            directory.record_environment(folder, named)
        found = []
        for number, (one, task) in enumerate(zip(entries, tasks, strict=True)):
            [line] = fit.train_sources(one.made, task, folder, execution).values()
            about = fit.about(one.made, task)
            told = {"number": number, "name": one.name, "trivial": one.trivial, **about}
            found.append(sources.write_card(folder, told, line, one.made.source_recipe) if process.first() else told)
        if process.first():
            _tell(found, [str(folder / "cards"), *sorted({task.note for task in tasks if task.note})])
    return found


def _checked(one: Entry) -> Task:
    try:
        return plan.source_task(one.made)
    except InputError as error:
        raise InputError(f"--zoo={one.name}: {flags.in_flags(error)}") from error


def _show(entries: Sequence[Entry], tasks: Sequence[Task]) -> None:
    rows = []
    for one, task in zip(entries, tasks, strict=True):
        steps = plan.count_steps(
            one.made.source_recipe, len(plan.draw_examples(one.made.source_recipe, "all", task, 0)[0])
        )
        rows.append((one.name, ",".join(map(str, one.made.hidden)), f"{len(task.train.labels):,}", f"{steps:,}"))
    console.table("zoo", ["source", "hidden", "examples", "steps"], rows, [f"{len(rows)} sources"])


def _tell(found: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    rows = [
        (
            told["name"],
            "diverged" if told["accuracy"] is None else f"{100 * told['accuracy']:.2f}",
            f"{told['parameters']:,}",
            f"{told['steps']:,}",
            f"{told['seconds']:.1f}",
            "yes" if told["trivial"] else "-",
            told["checkpoint"],
        )
        for told in found
    ]
    columns = ["source", "own test accuracy %", "parameters", "steps", "seconds", "trivial", "checkpoint"]
    console.table("zoo", columns, rows, notes)


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), run, ZooFlags, refused=["source", "source_checkpoint", "target"])
