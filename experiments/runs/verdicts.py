"""From fits to verdicts: judge them, print the tables, write the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pages import page
from experiments.pages import tables as tables_of
from experiments.runs import console, directory, looks, predictions
from experiments.runs.judging import Judging, to_record
from experiments.runs.predictions import Found
from tljax import files
from tljax.study import milestones, summary
from tljax.study import verdicts as comparisons
from tljax.study.results import Result
from tljax.study.summary import listed
from tljax.study.verdicts import Comparison, Study


def judged(found: Sequence[Found], judging: Judging, notes: Sequence[str], looks: int = 1) -> Study:
    """What a report tells of these fits; `looks` is how often they have been looked at, this time counted.

    0 stands for fits of which no verdict can be given: to report them is no look.
    """
    table, groups = predictions.right(found), predictions.all_groups(found)
    rows = [row for part in found if not part.longer for row in part.rows]
    against, margin, level = judging.against, judging.margin / 100, 1 - (1 - judging.level) / judging.looks
    more: Any = {"looks": judging.looks, "groups": groups}
    family, others = comparisons.compared(_of_transfer(table), margin, judging.level, judging.family, against, **more)
    if looks > judging.looks:
        reason = f"looked at {looks} times with {judging.looks} planned"
        family = [one._replace(**comparisons.NO_WORD, reason=reason) for one in family]
    curves = {name: curve for part in found for name, curve in part.curves.items()}
    longer = predictions.at_equal_total(table, rows, margin, level, groups)
    return Study(
        rows,
        curves,
        family,
        [*others, *longer],
        milestones.milestones(rows, curves),
        comparisons.sentence(family, judging.level),
        [
            *notes,
            *_sources(rows),
            *_looks(looks, judging),
            *_of_items(table, groups),
            *_diverged(rows),
            *_of_family(family),
            *_alone(_of_transfer(table), family, judging.against),
        ],
        predictions.most_wrong([part for part in found if not part.longer]),
    )


def _of_transfer(table: comparisons.Right) -> comparisons.Right:
    return {cell: fits for cell, fits in table.items() if not cell.longer}


def _alone(table: comparisons.Right, family: Sequence[Comparison], against: str) -> list[str]:
    """Strategies that are compared with nothing, since no seed has a fit at each budget of both."""
    judged = {(one.source, one.target, one.strategy) for one in family}
    every = dict.fromkeys((cell.source, cell.target, cell.strategy) for cell in table)
    lacking = [
        name for source, target, name in every if (source, target, name) not in judged | {(source, target, against)}
    ]
    names = listed(name for name in lacking if name != "scratch")
    return [f"{names}: no seed has a fit at every budget, and one of {against} beside it"] if names else []


def _sources(rows: Sequence[Result]) -> list[str]:
    """How well the sources do their own tasks, so that nobody takes a poor source for a poor strategy."""
    each: dict[str, list[float]] = {}
    for row in rows:
        if row.strategy != "scratch" and row.source and row.source_accuracy is not None:
            each.setdefault(row.source, []).append(100 * row.source_accuracy)
    return [f"{name}: the source's own test accuracy is {min(a):.2f} to {max(a):.2f} %" for name, a in each.items()]


def _looks(looks: int, judging: Judging) -> list[str]:
    """What is said of looking again: each planned look spends its share of the errors allowed."""
    if looks > judging.looks:
        return [
            f"looked at {looks} times with {judging.looks} planned: fits were added after a look, so nothing is judged "
            "and the intervals only describe; for a verdict train fits of fresh seeds, in a new run directory, and "
            "plan more --looks"
        ]
    if not looks:
        return ["no look at these fits is counted, since no verdict can be given of them"]
    return [f"look {looks} of {judging.looks} planned"] if judging.looks > 1 else []


def _of_items(table: comparisons.Right, groups: comparisons.Groups) -> list[str]:
    """What is said of the test examples: in how many groups, or that they are taken as independent."""
    items = {cell.target: len(scores) for cell, fits in table.items() for scores in fits.values()}
    counts = {target: len(np.unique(own)) for target, own in groups.items() if own is not None}
    unknown = [target for target in items if target not in counts]
    where = f"of {listed(unknown)} " if counts and unknown else ""
    known = [f"{name}: {items[name]:,} test items in {counts[name]:,} groups" for name in items if name in counts]
    return known + ([f"groups of test items {where}are not known: items are taken as independent"] if unknown else [])


def _diverged(rows: Sequence[Result]) -> list[str]:
    """How many fits of each strategy and budget diverged, and what they count as."""
    said = []
    several = len({(row.source, row.target) for row in rows if row.strategy != "scratch"}) > 1
    for group in summary.groups(rows):
        odd = [row for row in group if row.diverged]
        if odd:
            what = tables_of.diverged(len(odd), len(group), summary.accuracy(odd[0]))
            where = f", {tables_of.place(odd[0].source, odd[0].target)}" if several else ""
            said.append(f"{summary.label(odd[0])} at {odd[0].train_examples:,} labels{where}: {what}")
    return [*said, *([summary.COUNTS_AS] if said else [])]


def _of_family(family: Sequence[Comparison]) -> list[str]:
    """What is said of the comparisons: shares of the budgets, fits that enter no area, equal methods, reserves."""
    base, areas = comparisons.base_of(family), dict.fromkeys(one.budgets for one in family if len(one.budgets) > 1)
    said = [f"shares of the budgets in the area: {tables_of.shares(budgets)}" for budgets in areas]
    said += [
        f"the area of {one.strategy} is over the {one.fits} seeds that all its budgets share: {one.unused} fits of it "
        f"and of {base} under other seeds enter only the comparison of their own budget"
        for one in family
        if one.unused
    ]
    said += [f"{one.strategy} equals {one.equals} on every test example: judged once" for one in family if one.equals]
    warnings: dict[str, list[str]] = {}
    for one in family:
        if one.warning:
            warnings.setdefault(one.warning, []).append(one.strategy)
    return [*said, *(f"{listed(names)}: {warning}" for warning, names in warnings.items())]


def show(folder: Path, found: Sequence[Found], judging: Judging, notes: Sequence[str]) -> Study:
    """Judge the fits of a run directory, print what came of it, and write the report."""
    fits, places = looks.seen(found, judging.against), (looks.place(),)
    table = predictions.right(found)
    able = looks.judgeable(((cell, seed) for cell, each in table.items() for seed in each), judging.against)
    look = max(predictions.looked(folder, table, able), looks.count(fits, judging, places))
    told = judged(found, judging, [*notes, *looks.keep(fits, judging, look, places)], look)
    predictions.keep(folder, found, notes, to_record(judging), look)
    classes = {part.rows[0].target: part.classes for part in found if part.rows}
    write(folder, told, classes, page.reproduced(folder))
    tables(told)
    console.say(f"  report: {folder / 'report.html'}")
    return told


def write(folder: Path, told: Study, classes: Mapping[str, Sequence[str]], made: Any = None) -> None:
    """Write the report of a study, and the same as Markdown, tables, figures and numbers; `made` says how it came."""
    from experiments.pages import export, report, study_report

    targets = dict.fromkeys(row.target for row in told.rows)
    sources = dict.fromkeys(row.source for row in told.rows if row.source)
    title = f"{', '.join(sources) or 'no source'} to {', '.join(targets)}"
    sections = study_report.sections(told, classes)
    text = report.render(sections, title=title, lead=told.verdict, made=made or report.Reproduced())
    for name, data in {**export.files(told, sections, title), "report.html": files.to_bytes(text)}.items():
        file = folder / name
        if file.parent != folder:
            directory.make_folder(file.parent)
        if not file.is_file() or file.read_bytes() != data:
            directory.replace(file, data)


def tables(told: Study) -> None:
    """Print the verdicts, and each budget by itself."""
    about = ["strategy", "source", "target", "labels", "pairs", "points", "interval"]
    against = told.family[0].against if told.family else "scratch"
    columns = [*about, "verdict", "size", "power", "p, adjusted"]
    level = f", intervals at {100 * told.family[0].level:.4g} % together" if told.family else ""
    console.table(f"against {against}{level}", columns, [(*_about(one), *_judgement(one)) for one in told.family])
    own = [one for one in told.others if one.against != comparisons.TOTAL]
    total = [one for one in told.others if one.against == comparisons.TOTAL]
    beside = {
        "each label budget by itself (not judged)": own,
        "against scratch at equal source and target steps (not judged)": total,
    }
    for title, those in beside.items():
        if those:
            each = f"{title}, each interval at {100 * those[0].level:.4g} %"
            console.table(each, [*about, "p of the one pair"], [(*_about(one), _number(one.p)) for one in those])
    for line in (told.verdict, *told.notes):
        console.say(f"  {line}")


def _about(one: Comparison) -> tuple[str, ...]:
    first, last = one.budgets[0], one.budgets[-1]
    return (
        one.strategy,
        one.source or "-",
        one.target,
        f"{first:,}" if first == last else f"{first:,} to {last:,}",
        str(one.fits),
        f"{100 * one.mean:+.2f}",
        f"[{100 * one.low:+.2f}, {100 * one.high:+.2f}]" if np.isfinite(one.low) else "-",
    )


def _judgement(one: Comparison) -> tuple[str, ...]:
    low, high = one.power or (None, None)
    power = "-" if low is None or high is None else f"{low:.2f} to {high:.2f}"
    adjusted = _number(one.p) if one.word else "-"
    return one.word or "-", one.size or "-", power, adjusted


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
