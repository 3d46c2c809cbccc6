"""From fits to verdicts: judge them, print the tables, write the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import console, evidence, page, workdir
from experiments.compare_flags import Judging
from experiments.evidence import Found
from tljax.study import milestones, study
from tljax.study.study import Comparison, Study


def judged(found: Sequence[Found], judging: Judging, notes: Sequence[str], looks: int = 1) -> Study:
    """What a report tells of these fits; `looks` is how often they have been looked at, this time counted."""
    table = evidence.right(found)
    level = 1 - (1 - judging.level) / judging.looks
    family, others = study.compared(_of_transfer(table), judging.margin / 100, level, judging.family, judging.against)
    if looks > judging.looks:
        family = [one._replace(word="", power=None, p=None) for one in family]
    rows = [row for part in found if not part.longer for row in part.rows]
    curves = {name: curve for part in found for name, curve in part.curves.items()}
    longer = evidence.at_equal_total(table, rows, judging.margin / 100, level)
    return Study(
        rows,
        curves,
        family,
        [*others, *longer],
        milestones.milestones(rows, curves),
        study.sentence(family, judging.level),
        [*notes, *_looks(looks, judging), *_lacking(rows)],
        evidence.most_wrong([part for part in found if not part.longer]),
    )


def _of_transfer(table: study.Right) -> study.Right:
    return {cell: fits for cell, fits in table.items() if not cell.strategy.startswith(evidence.LONGER)}


def _looks(looks: int, judging: Judging) -> list[str]:
    """What is said of looking again: each planned look spends its share of the errors allowed."""
    if looks > judging.looks:
        return [
            f"looked at {looks} times with {judging.looks} planned: fits were added after a look, so nothing is judged "
            "and the intervals only describe; take fresh --seeds and a new --workdir, or plan more --looks"
        ]
    return [f"look {looks} of {judging.looks} planned"] if judging.looks > 1 else []


def _lacking(rows: Sequence[study.Row]) -> list[str]:
    odd = sum(bool(row.get("diverged")) for row in rows)
    return [f"{odd} fits diverged, and enter nothing"] if odd else []


def show(folder: Path, found: Sequence[Found], judging: Judging, notes: Sequence[str]) -> Study:
    """Judge the fits of a run directory, print what came of it, and write the report."""
    looks = evidence.looked(folder, evidence.right(found))
    told = judged(found, judging, notes, looks)
    evidence.keep(folder, found, notes)
    classes = {part.rows[0]["target"]: part.classes for part in found if part.rows}
    write(folder, told, classes, page.reproduced(folder))
    tables(told)
    console.say(f"  report: {folder / 'report.html'}")
    return told


def write(folder: Path, told: Study, classes: Mapping[str, Sequence[str]], made: Any = None) -> None:
    """Write the report of a study, and the same as Markdown, tables, figures and numbers; `made` says how it came."""
    from tljax.study import export, report, study_report

    targets = dict.fromkeys(row["target"] for row in told.rows)
    sources = dict.fromkeys(row["source"] for row in told.rows if row.get("source"))
    title = f"{', '.join(sources) or 'no source'} to {', '.join(targets)}"
    sections = study_report.sections(told, classes)
    text = report.render(sections, title=title, lead=told.verdict, made=made or report.Reproduced())
    for name, data in {**export.files(told, sections, title), "report.html": text.encode()}.items():
        file = folder / name
        if file.parent != folder:
            workdir.folder(file.parent)
        if not file.is_file() or file.read_bytes() != data:
            workdir.replace(file, data)


def tables(told: Study) -> None:
    """Print the verdicts, and each budget by itself."""
    columns = ["strategy", "source", "target", "labels", "pairs", "points", "interval", "verdict", "power", "p"]
    against = told.family[0].against if told.family else "scratch"
    console.table(f"against {against}", columns, [_cells(one) for one in told.family])
    own = [one for one in told.others if one.against != study.TOTAL]
    total = [one for one in told.others if one.against == study.TOTAL]
    beside = {
        "each label budget by itself (not judged)": own,
        "against scratch at equal source and target steps (not judged)": total,
    }
    for title, those in beside.items():
        if those:  # a p is McNemar's of a single pair, at the end
            shown = [(*_cells(one)[:7], *([_cells(one)[-1]] if one.p is not None else ["-"])) for one in those]
            console.table(title, [*columns[:7], "p"], shown)
    for line in (told.verdict, *told.notes):
        console.say(f"  {line}")


def _cells(one: Comparison) -> tuple[str, ...]:
    first, last = one.budgets[0], one.budgets[-1]
    return (
        one.strategy,
        one.source or "-",
        one.target,
        f"{first:,}" if first == last else f"{first:,} to {last:,}",
        str(one.fits),
        f"{100 * one.mean:+.2f}",
        f"[{100 * one.low:+.2f}, {100 * one.high:+.2f}]",
        one.word or "-",
        "-" if one.power is None else f"{one.power:.2f}",
        "-" if one.p is None else f"{one.p:.3f}",
    )
