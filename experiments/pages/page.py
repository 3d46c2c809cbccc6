"""What a run ends with: its table, and its report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import budgets, console, directory, metrics
from experiments.runs.flags import PATHS_FROM
from experiments.runs.settings import Settings
from experiments.runs.sources import Source
from tljax import files
from tljax.study import summary
from tljax.study.results import Result
from tljax.types import Task


def show(made: Settings, target: Task, source: Source | None, lines: Sequence[Result], folder: Path) -> None:
    """Write report.html and print the table."""
    title, notes = about(made, source, target)
    identities = set(source.identity.values()) if source else set()
    trained = [line for line in directory.results(folder) if line.key in identities]
    settled = summary.with_share(lines, np.asarray(target.test.labels))
    known = [line.source_accuracy for line in lines if line.source_accuracy is not None]
    notes += directory.mixed_environments(folder, [line.name for line in (*trained, *lines)])
    odd = [str(line.seed) for line in trained if line.diverged]
    if odd:
        notes.insert(0, f"the source of seed {', '.join(odd)} diverged: what was transferred is what it had before")
    own = f"source's own test accuracy {100 * min(known):.2f} to {100 * max(known):.2f} %" if known else ""
    report = folder / "report.html"
    text = _page(target, [*trained, *settled], folder, title, own, notes)
    if not report.is_file() or report.read_bytes() != files.to_bytes(text):
        directory.replace(report, text)
    said = [
        *([own] if own else []),
        *notes,
        "means and [ranges] over seeds; no test of significance was made",
        f"report: {report}",
    ]
    console.results(title, settled, said)


def _page(target: Task, lines: Sequence[Result], folder: Path, title: str, own: str, notes: list[str]) -> str:
    from experiments.pages import report

    return report.page(
        lines,
        {line.name: curve for line in lines if (curve := metrics.curves(folder, line.name)) is not None},
        title=title,
        source_note=own,
        notes=notes,
        made=reproduced(folder),
        classes=target.classes,
    )


def about(made: Settings, source: Source | None, target: Task) -> tuple[str, list[str]]:
    """(title, what every table must say of the data) of fits of one source, or none, and one target."""
    short = budgets.notes(made.train_examples, target, made.recipe.validation)
    notes = [f"{what}: {of.note}" for what, of in (("source", source), ("target", target)) if of and of.note]
    return f"{source.name if source else 'no source'} -> {target.name}", [*notes, *short]


def reproduced(folder: Path) -> Any:
    """How the page of a run directory came about."""
    from experiments.pages.report import Reproduced

    lines = directory.flags_text(folder / "flags.flags").splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(PATHS_FROM))
    return Reproduced(directory.recorded_environment(folder) or {}, text, lines[0].rstrip("\n").removeprefix("# "))
