r"""Did it transfer? Sources x targets x strategies x budgets x seeds, to verdicts.

    python -m experiments.compare --flagfile=experiments/flags/quickstart.flags --train_examples=5/class,100/class,all \
        --seeds=0-4 --steps=600 --batch_size=32 --workdir=runs/compared

Sources x targets x strategies x label budgets x seeds in one run directory, each against training from scratch on the
same draw, with verdicts and their report. --source, --source_checkpoint and --target take several names, with
commas. Run again, it goes on; what is there is not trained again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments import (
    budgets,
    commandline,
    compare_flags,
    console,
    costs,
    evals,
    evidence,
    fits,
    helps,
    machine,
    options,
    processes,
    transfer,
    tuned,
    verdicts,
    workdir,
)
from experiments.compare_flags import Asked
from experiments.options import Settings
from experiments.transfer import Experiment
from tljax import plugins
from tljax.types import InputError


class Part(NamedTuple):
    """Fits of one source (or none) and one target that share their flags."""

    todo: Experiment
    longer: bool = False
    """Whether it is scratch with the source's steps added to its own."""


def run(given: Mapping[str, Any], asked: Asked) -> list[workdir.Line]:
    """Train what is missing, judge, and report; the lines of results."""
    made = options.settings(**given)
    compare_flags.check(asked)
    base = asked.against
    if base not in ("scratch", *made.strategies):
        raise InputError(f"--against={base} is none of --strategies{plugins.nearest(base, made.strategies)}")
    means = machine.prepare(made)
    parts = planned(given, asked, made, means)
    if made.dry_run:
        _show(parts)
        return []
    named = {name: mark for part in parts for name, mark in transfer.fingerprints(part.todo).items()}
    more = evals.read(made, asked.eval, [part.todo for part in parts])
    with processes.opened(made, "compare", commandline.to_flags(asked)) as folder:
        found = [(part, transfer.within(part.todo, folder, {**named, **evals.fingerprints(more)})) for part in parts]
        lines = [line for _, some in found for line in some]
        if processes.first():
            judged = [_judged(part, some, more, folder, means) for part, some in found]
            verdicts.show(folder, judged, asked, notes(parts, asked))
    return lines


def planned(given: Mapping[str, Any], asked: Asked, made: Settings, means: Any) -> list[Part]:
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
            for arm in tuned.arms(pair, made, asked.tuned):
                todo = transfer.prepare(options.settings(**arm), means)
                bare = todo._replace(methods=tuple(one for one in todo.methods if one.name == "scratch"))
                if bare.methods:
                    for part in (Part(bare), *(longer(bare) if asked.longer_scratch else ())):
                        # The same fits whatever the source: trained once a target.
                        scratch.setdefault(_key(part.todo), part)
                if rest := tuple(one for one in todo.methods if one.name != "scratch"):
                    parts.append(Part(todo._replace(methods=rest)))
    return [*scratch.values(), *parts]


def _key(todo: Experiment) -> Any:
    return todo.made.recipe, todo.target.fingerprint, todo.made.train_examples


def longer(todo: Experiment) -> list[Part]:
    """Scratch once more, a part a budget, with as many steps as the source and the target had together."""
    if todo.source is None or todo.source.steps is None:
        return []
    found = []
    for budget in todo.made.train_examples:
        steps = fits.steps(todo.made.recipe, budgets.total(budget, todo.target)) + todo.source.steps
        made = replace(todo.made, train_examples=(budget,), recipe=replace(todo.made.recipe, steps=steps))
        found.append(Part(todo._replace(made=made), longer=True))
    return found


def _several(text: str | None) -> list[str]:
    return [name for name in plugins.split(text or "", ",") if name]


def _judged(
    part: Part, lines: Sequence[workdir.Line], more: Sequence[evals.Eval], folder: Path, means: Any
) -> evidence.Found:
    """What there is of a part to judge by: rows, and which test examples each fit gets right."""
    found = evidence.of_run(folder, lines, part.todo.target)
    if part.longer:
        return found._replace(longer=True)
    extra, cost = evals.accuracies(part.todo, lines, more, folder), costs.of_run(part.todo, lines, folder)
    return found._replace(rows=[{**row, **extra.get(row["name"], {}), **cost[row["name"]]} for row in found.rows])


def notes(parts: Sequence[Part], asked: Asked) -> list[str]:
    """What every table must say: data in part, whether it was tuned, and what the verdicts speak of."""
    todos = [part.todo for part in parts]
    data = {f"{todo.target.name}: {todo.target.note}" for todo in todos if todo.target.note}
    data |= {
        f"{todo.target.name}: {line}"
        for todo in todos
        for line in budgets.notes(todo.made.train_examples, todo.target, todo.made.recipe.validation)
    }
    data |= {f"{todo.source.name}: {todo.source.note}" for todo in todos if todo.source and todo.source.note}
    tuning = tuned.said(asked.tuned)
    single = any(todo.source and len(set(todo.source.identity.values())) == 1 for todo in todos)
    estimand = (
        "the verdicts speak of this one trained source"
        if single
        else "sources are trained anew with each seed, so the verdicts speak of the way of pretraining"
    )
    return [tuning, estimand, "they speak of these tasks alone", *sorted(data)]


def _show(parts: Sequence[Part]) -> None:
    rows, total = [], 0
    for part in parts:
        todo, made = part.todo, part.todo.made
        count = len(transfer.planned(todo))
        total += count
        named = ", ".join(one.label for one in todo.methods) + (" (longer)" if part.longer else "")
        labels = ", ".join(made.train_examples)
        rows.append((todo.source.name if todo.source else "-", todo.target.name, named, labels, str(count)))
    console.table("study", ["source", "target", "strategies", "labels", "fits"], rows, [f"{total} fits in all"])


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    helps.main(argv, str(__doc__), run, Asked)


if __name__ == "__main__":
    console.run_main(main)
