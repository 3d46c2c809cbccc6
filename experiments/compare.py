r"""Did it transfer? Sources x targets x strategies x budgets x seeds, to verdicts.

    python -m experiments.compare --flagfile=experiments/flags/quickstart.flags --train_examples=5/class,100/class,all \
        --seeds=0-4 --steps=600 --batch_size=32 --workdir=runs/compared

Sources x targets x strategies x label budgets x seeds in one run directory, each against training from scratch on the
same draw, with verdicts and their report. --source, --source_checkpoint and --target take several names, with
commas. Run again, it goes on; what is there is not trained again.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import (
    budgets,
    console,
    costs,
    directory,
    evaluations,
    fit,
    flags,
    looks,
    plan,
    predictions,
    process,
    tuned,
)
from experiments.runs.flags import flag
from experiments.runs.judging import Judging, require_valid, require_variation, spoken_of, variation
from experiments.runs.plan import Experiment
from experiments.runs.settings import ExperimentFlags, Settings
from tljax import plugins
from tljax.study import summary
from tljax.study.results import Result, extended
from tljax.study.verdicts import Cell
from tljax.types import InputError


@dataclass(frozen=True)
class CompareFlags(Judging, ExperimentFlags):
    """What is compared beside the flags of a transfer, and how it is judged."""

    eval: tuple[str, ...] = flag(
        (), "further test sets: data sets, or source (its own, its head put back)", role="free"
    )
    longer_scratch: bool = flag(True, "scratch with the source's steps added to its own, for the second comparison")
    tuned: str | None = flag(None, "run directory of a search: each strategy with what was best for it", place="path")


class Part(NamedTuple):
    """Fits of one source (or none) and one target that share their flags."""

    todo: Experiment
    longer: bool = False
    """Whether it is scratch with the source's steps added to its own."""


def run(given: Mapping[str, Any], asked: CompareFlags, typed: Collection[str] | None = None) -> list[Result]:
    """Train what is missing, judge, and report; the results.

    `typed` are the flags on the command line itself, whose values --tuned must not replace; None: all that are given.
    """
    made = Settings.from_flags(**given)
    require_valid(asked)
    base = asked.against
    names = {plugins.called(text): text for text in ("scratch", *made.strategies)}
    base = names.get(base, base)
    if base not in names.values():
        raise InputError(f"--against={base} is none of --strategies{plugins.nearest(base, names)}")
    execution = process.prepare(made)
    parts = planned(given, asked, made, execution, typed)
    for part in parts:
        require_variation(part.todo)
    method = plan.read_strategy(base)
    against = Result(name="", target="", strategy=method.name, options=method.options, spec=method.spec or None, seed=0)
    judging = replace(asked, against=summary.label(against))
    if whence := tuned.origin_note(given, asked.tuned, ("scratch", *made.strategies)):
        console.say(whence)
    if made.dry_run:
        _show(parts)
        return []
    named = {name: mark for part in parts for name, mark in plan.fingerprints(part.todo).items()}
    _say_looks(parts, judging)
    more = evaluations.read(made, asked.eval, [part.todo for part in parts])
    leave = tuned.searched_flags() if asked.tuned else ()
    with directory.opened(made, "compare", flags.flagfile_lines(asked), leave=leave) as folder:
        found = [(part, fit.within(part.todo, folder, {**named, **evaluations.fingerprints(more)})) for part in parts]
        lines = [line for _, some in found for line in some]
        if process.first():
            judged = [_judged(part, some, more, folder, execution) for part, some in found]
            several = directory.mixed_environments(folder, [line.name for line in lines])
            from experiments.pages import compare as page  # draws: matplotlib takes a second to import

            page.show(folder, judged, judging, [*notes(parts, asked), *several])
    return lines


def planned(
    given: Mapping[str, Any],
    asked: CompareFlags,
    made: Settings,
    execution: Any,
    typed: Collection[str] | None = None,
) -> list[Part]:
    """All parts, read and checked: scratch of each target first, then each source."""
    sources = _several(made.source) or _several(made.source_checkpoint)
    if not sources or not _several(made.target):
        raise InputError("--source (or --source_checkpoint) and --target are needed: name one data set or more of each")
    if made.source and made.source_checkpoint:
        raise InputError("--source and --source_checkpoint are both given: keep one")
    kind = "source" if made.source else "source_checkpoint"
    parts: list[Part] = []
    scratch: dict[Any, Part] = {}
    for target in _several(made.target):
        for source in sources:
            pair = {**given, kind: source, "target": target}
            arms = [
                plan.prepare(Settings.from_flags(**arm), execution, only=True)
                for arm in tuned.study_flags(pair, made, asked.tuned, typed)
            ]
            # From scratch there is one fit a target, budget and seed, whatever the source, each with its own recipe.
            bare = [_only(arm, lambda name: name == "scratch") for arm in arms]
            rest = [_only(arm, lambda name: name != "scratch") for arm in arms]
            extended = [part for arm in bare for other in filter(_named, rest) for part in longer(arm, other)]
            for part in [*map(Part, filter(_named, bare)), *(extended if asked.longer_scratch else ())]:
                scratch.setdefault(_key(part.todo), part)
            parts += map(Part, filter(_named, rest))
    parts = [*scratch.values(), *parts]
    _require_one_fit(parts)
    return parts


def _only(todo: Experiment, keep: Callable[[str], bool]) -> Experiment:
    return todo._replace(strategies=tuple(method for method in todo.strategies if keep(method.name)))


def _named(todo: Experiment) -> bool:
    return bool(todo.strategies)


def _key(todo: Experiment) -> Any:
    """What tells the fits from scratch of one target apart."""
    made = todo.settings
    return made.recipe, made.model, made.hidden, made.activation, todo.target.fingerprint, made.train_examples


def _require_one_fit(parts: Sequence[Part]) -> None:
    """Raise InputError, before anything is trained, if two planned fits would be of one cell and seed."""
    cells: dict[Cell, list[Result]] = {}
    for part in parts:
        for job in plan.planned(part.todo).values():
            result = replace(job.result, steps=part.todo.settings.recipe.steps)
            cells.setdefault(predictions.cell(result, part.longer), []).append(job.result)
    for lines in cells.values():
        summary.require_one_recipe(lines)


def longer(scratch: Experiment, other: Experiment) -> list[Part]:
    """Scratch once more, a part a budget, with as many steps as the source and the target of `other` had together."""
    if not scratch.strategies or other.source is None or other.source.steps is None:
        return []
    parts = []
    for budget in scratch.settings.train_examples:
        if budget in other.settings.train_examples:
            subset, _ = plan.draw_examples(other.settings.recipe, budget, other.target, 0)
            steps = plan.count_steps(other.settings.recipe, len(subset)) + other.source.steps
            recipe = replace(scratch.settings.recipe, steps=steps)
            made = replace(scratch.settings, train_examples=(budget,), recipe=recipe)
            parts.append(Part(scratch._replace(settings=made), longer=True))
    return parts


def _several(text: str | None) -> list[str]:
    return [name for name in plugins.split(text or "", ",") if name]


def _judged(
    part: Part, lines: Sequence[Result], more: Sequence[evaluations.Evaluation], folder: Path, execution: Any
) -> predictions.Predictions:
    """What there is of a part to judge by: rows, and which test examples each fit gets right."""
    found = predictions.of_run(folder, lines, part.todo.target)
    if part.longer:
        return found._replace(longer=True)
    extra, cost = evaluations.accuracies(part.todo, lines, more, folder), costs.of_fits(part.todo, lines, folder)
    return found._replace(rows=[extended(row, {**extra.get(row.name, {}), **cost[row.name]}) for row in found.rows])


def notes(parts: Sequence[Part], asked: CompareFlags) -> list[str]:
    """What every table must say: data in part, whether it was tuned, and what the verdicts speak of."""
    todos = [part.todo for part in parts]
    data = {f"{todo.target.name}: {todo.target.note}" for todo in todos if todo.target.note}
    data |= {
        f"{todo.target.name}: {line}"
        for todo in todos
        for line in budgets.notes(todo.settings.train_examples, todo.target, todo.settings.recipe.validation)
    }
    data |= {f"{todo.source.name}: {todo.source.note}" for todo in todos if todo.source and todo.source.note}
    tuning = tuned.tuning_note(
        asked.tuned, [budget for part in parts for budget in part.todo.settings.train_examples], asked.longer_scratch
    )
    spoken = spoken_of([variation(todo) for todo in todos])
    return [tuning, *spoken, "they speak of these tasks alone", *sorted(data)]


def _say_looks(parts: Sequence[Part], judging: Judging) -> None:
    """Say before anything is trained that there are no looks left; raises InputError as `looks.count` does."""
    keys: dict[str, tuple[set[str], set[str]]] = {}
    todos = [part.todo for part in parts if not part.longer and not part.todo.settings.distributed]
    jobs = [job for todo in todos for job in plan.planned(todo).values()]
    cells = ((predictions.cell(job.result), job.seed) for job in jobs)
    able = looks.judgeable(cells, judging.against)
    for todo in (todo for todo in todos if todo.target.name in able):
        fits_of, bases = keys.setdefault(looks.test_set(np.asarray(todo.target.test.labels)), (set(), set()))
        for job in plan.planned(todo).values():
            if (name := summary.label(job.result)) != "scratch" or judging.against == "scratch":
                (bases if name == judging.against else fits_of).add(job.result.key)
    seen = [looks.JudgedFits(name, *map(frozenset, sets)) for name, sets in keys.items() if sets[0]]
    look = looks.count(seen, judging, [looks.place()])
    if look > judging.looks:
        console.say(
            f"this is look {look} at such fits with {judging.looks} planned: they will be described and not judged; "
            "take fresh --seeds for a verdict"
        )


def _show(parts: Sequence[Part]) -> None:
    rows, total = [], 0
    for part in parts:
        todo, made = part.todo, part.todo.settings
        count = len(plan.planned(todo))
        total += count
        named = ", ".join(one.label for one in todo.strategies) + (" (longer)" if part.longer else "")
        labels = ", ".join(made.train_examples)
        rows.append((todo.source.name if todo.source else "-", todo.target.name, named, labels, str(count)))
    console.table("study", ["source", "target", "strategies", "labels", "fits"], rows, [f"{total} fits in all"])


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), functools.partial(run, typed=flags.typed(argv)), CompareFlags)
