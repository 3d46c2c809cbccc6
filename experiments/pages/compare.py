"""Judge fits, print the tables of a study, and write its report and files.

The page begins with the verdict; tables and figures of every source and target follow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pages import export, figures, report, tables, transfer
from experiments.pages.report import Block, Provenance, Section, figure
from experiments.runs import console, directory, looks, predictions
from experiments.runs.console import Table
from experiments.runs.judging import Judging, to_record
from experiments.runs.predictions import Predictions
from tljax import files
from tljax.study import milestones, summary
from tljax.study.results import Result
from tljax.study.summary import label, listed
from tljax.study.verdicts import NO_WORD, TOTAL, Comparison, Groups, Right, Study, base_of, compared, sentence

Classes = Mapping[str, Sequence[str]]
"""Target -> names of its classes."""
Pair = tuple[Any, str]
"""(source or None, target)."""


def show(folder: Path, parts: Sequence[Predictions], judging: Judging, notes: Sequence[str]) -> Study:
    """Judge the fits of a run directory, print the tables, and write the report."""
    fits, places = looks.judged_fits(parts, judging.against), (looks.place(),)
    table = predictions.right(parts)
    able = looks.judgeable(((cell, seed) for cell, each in table.items() for seed in each), judging.against)
    look = max(predictions.count_look(folder, table, able), looks.count(fits, judging, places))
    study = judged(parts, judging, [*notes, *looks.write(fits, judging, look, places)], look, table)
    predictions.write_study(folder, parts, notes, to_record(judging), look)
    classes = {part.rows[0].target: part.classes for part in parts if part.rows}
    write(folder, study, classes, report.provenance_of(folder))
    print_tables(study)
    console.say(f"  report: {folder / 'report.html'}")
    return study


def judged(
    parts: Sequence[Predictions], judging: Judging, notes: Sequence[str], look: int = 1, table: Right | None = None
) -> Study:
    """The study of these fits, with verdicts; `look` counts the looks at them, this one included.

    A `look` of 0 stands for fits of which no verdict can be given: to report them is no look. `table` has the scores of
    the fits, if they are known already.
    """
    table = predictions.right(parts) if table is None else table
    groups = predictions.all_groups(parts)
    rows = [row for part in parts if not part.longer for row in part.rows]
    against, margin, level = judging.against, judging.margin / 100, 1 - (1 - judging.level) / judging.looks
    more: Any = {"looks": judging.looks, "groups": groups}
    family, others = compared(_without_longer(table), margin, judging.level, judging.family, against, **more)
    if look > judging.looks:
        reason = f"looked at {look} times with {judging.looks} planned"
        family = [comparison._replace(**NO_WORD, reason=reason) for comparison in family]
    curves = {name: curve for part in parts for name, curve in part.curves.items()}
    longer = predictions.at_equal_total(table, rows, margin, level, groups)
    return Study(
        rows,
        curves,
        family,
        [*others, *longer],
        milestones.milestones(rows, curves),
        sentence(family, judging.level),
        [
            *notes,
            *_source_notes(rows),
            *_look_notes(look, judging),
            *_group_notes(table, groups),
            *_divergence_notes(rows),
            *_family_notes(family),
            *_uncompared_notes(_without_longer(table), family, judging.against),
        ],
        predictions.most_wrong([part for part in parts if not part.longer]),
    )


def _without_longer(table: Right) -> Right:
    """The scores, except those of scratch with the source's steps added."""
    return {cell: fits for cell, fits in table.items() if not cell.longer}


def _uncompared_notes(table: Right, family: Sequence[Comparison], against: str) -> list[str]:
    """The note on strategies that are compared with nothing, since no seed has a fit at each budget of both."""
    judged = {(comparison.source, comparison.target, comparison.strategy) for comparison in family}
    every = dict.fromkeys((cell.source, cell.target, cell.strategy) for cell in table)
    lacking = [
        name for source, target, name in every if (source, target, name) not in judged | {(source, target, against)}
    ]
    names = listed(name for name in lacking if name != "scratch")
    return [f"{names}: no seed has a fit at every budget, and one of {against} beside it"] if names else []


def _source_notes(rows: Sequence[Result]) -> list[str]:
    """Notes on how well the sources do their own tasks, so that nobody takes a poor source for a poor strategy."""
    each: dict[str, list[float]] = {}
    for row in rows:
        if row.strategy != "scratch" and row.source and row.source_accuracy is not None:
            each.setdefault(row.source, []).append(100 * row.source_accuracy)
    return [f"{name}: the source's own test accuracy is {tables.span(a)} %" for name, a in each.items()]


def _look_notes(look: int, judging: Judging) -> list[str]:
    """Notes on how often the fits were looked at: each planned look spends its share of the allowed errors."""
    if look > judging.looks:
        return [
            f"looked at {look} times with {judging.looks} planned: fits were added after a look, so nothing is judged "
            "and the intervals only describe; for a verdict train fits of fresh seeds, in a new run directory, and "
            "plan more --looks"
        ]
    if not look:
        return ["no look at these fits is counted, since no verdict can be given of them"]
    return [f"look {look} of {judging.looks} planned"] if judging.looks > 1 else []


def _group_notes(table: Right, groups: Groups) -> list[str]:
    """Notes on the test examples: how many groups they form, or that they are taken as independent."""
    items = {cell.target: len(scores) for cell, fits in table.items() for scores in fits.values()}
    counts = {target: len(np.unique(which)) for target, which in groups.items() if which is not None}
    unknown = [target for target in items if target not in counts]
    where = f"of {listed(unknown)} " if counts and unknown else ""
    known = [f"{name}: {items[name]:,} test items in {counts[name]:,} groups" for name in items if name in counts]
    return known + ([f"groups of test items {where}are not known: items are taken as independent"] if unknown else [])


def _divergence_notes(rows: Sequence[Result]) -> list[str]:
    """Notes on how many fits of each strategy and budget diverged, and the accuracy that they count with."""
    texts = []
    several = len({(row.source, row.target) for row in rows if row.strategy != "scratch"}) > 1
    for group in summary.groups(rows):
        lost = [row for row in group if row.diverged]
        if lost:
            what = tables.diverged(len(lost), len(group), summary.accuracy(lost[0]))
            where = f", {tables.place(lost[0].source, lost[0].target)}" if several else ""
            texts.append(f"{label(lost[0])} at {lost[0].train_examples:,} labels{where}: {what}")
    return [*texts, *([summary.COUNTS_AS] if texts else [])]


def _family_notes(family: Sequence[Comparison]) -> list[str]:
    """Notes on the comparisons: shares of the budgets, fits that enter no area, equal methods, warnings."""
    base, areas = (
        base_of(family),
        dict.fromkeys(comparison.budgets for comparison in family if len(comparison.budgets) > 1),
    )
    texts = [f"shares of the budgets in the area: {tables.shares(budgets)}" for budgets in areas]
    texts += [
        f"the area of {comparison.strategy} is over the {comparison.fits} seeds that all its budgets share: "
        f"{comparison.unused} fits of it and of {base} under other seeds enter only the comparison of their own budget"
        for comparison in family
        if comparison.unused
    ]
    texts += [
        f"{comparison.strategy} equals {comparison.equals} on every test example: judged once"
        for comparison in family
        if comparison.equals
    ]
    warnings: dict[str, list[str]] = {}
    for comparison in family:
        if comparison.warning:
            warnings.setdefault(comparison.warning, []).append(comparison.strategy)
    return [*texts, *(f"{listed(names)}: {warning}" for warning, names in warnings.items())]


def print_tables(study: Study) -> None:
    """Print the verdicts, the comparisons at each budget by itself, and the notes."""
    against = study.family[0].against if study.family else "scratch"
    level = f", intervals at {100 * study.family[0].level:.4g} % together" if study.family else ""
    console.show(tables.verdicts_in_short(f"against {against}{level}", study.family))
    beside = {
        "each label budget by itself (not judged)": [each for each in study.others if each.against != TOTAL],
        "against scratch at equal source and target steps (not judged)": [
            each for each in study.others if each.against == TOTAL
        ],
    }
    for title, comparisons in beside.items():
        if comparisons:
            each = f"{title}, each interval at {100 * comparisons[0].level:.4g} %"
            console.show(tables.singly(each, comparisons))
    for line in (study.verdict, *study.notes):
        console.say(f"  {line}")


def write(folder: Path, study: Study, classes: Classes, provenance: Provenance | None = None) -> None:
    """Write the report of a study as a page, Markdown, LaTeX tables, figures and CSV files."""
    targets = dict.fromkeys(result.target for result in study.rows)
    sources = dict.fromkeys(result.source for result in study.rows if result.source)
    title = f"{', '.join(sources) or 'no source'} to {', '.join(targets)}"
    every = sections(study, classes)
    text = report.render(every, title=title, lead=study.verdict, provenance=provenance or Provenance())
    for name, data in {**export.files(study, every, title), "report.html": files.to_bytes(text)}.items():
        file = folder / name
        if file.parent != folder:
            directory.make_folder(file.parent)
        if not file.is_file() or file.read_bytes() != data:
            directory.replace(file, data)


# The page

VERDICTS = (
    "{against}, as differences of the {what} with simultaneous {level} % intervals over all rows of a target. "
    "Positive or negative is the direction: the interval lies on one side of 0. The size is a second question: by "
    "more than the margin where the interval lies outside it, by less where the narrower interval of equivalence lies "
    "inside it, else open. Equivalent: the size is within the margin and the direction open; undecided: both are "
    "open. The p is adjusted for all that is judged together. Powers are ranges, since they are estimated from these "
    "fits too: the chance of finding a difference as large as the margin, and of calling a difference of 0 "
    "equivalent."
)
FOREST = "The same: bars are the intervals, the grey band the margin of equivalence."
LABELS = (
    "Mean test accuracy over seeds, ranges below (of a single fit Wilson's 95 % interval over test examples, taken as "
    "independent). A fit that diverged counts as the share of the most frequent test class."
)
LABELS_PICTURE = "The same. Lines are means over seeds, bands their range."
GAINS = "Differences from {base} in points by source (rows) and target (columns), as in the table of verdicts."
EACH = (
    "Differences from {against} in points; the intervals are of {level} % each, unadjusted, and no verdict is drawn "
    "from them."
)
CUT = (
    "Test accuracy against how many stages, from the bottom, are kept from the source below the cut; bands are the "
    "range over seeds."
)
COST = "What a strategy costs, and its test accuracy: means over seeds, bars the range; FLOPs are of the target's fit."
SHIFTED = "Accuracy on other test sets against that on the target's own; on the diagonal they are equal."
RETENTION = (
    "What is left of the source's accuracy once its head is put back, against accuracy on the target; of a fit that "
    "diverged, the share of the most frequent class of each. No strategy beats those on the line in both."
)
CONFUSION = (
    "Predicted class against true class in % of the true class, summed over the fits that did not diverge: scratch, "
    "and the strategy with the highest mean accuracy, which was chosen by looking."
)
RELIABILITY = "Accuracy against confidence, over all seeds; on the diagonal a fit is as often right as it is sure."
WRONG = "Test images that most fits take for another class."
MILESTONES = (
    "Taylor and Stone's measures of transfer (2009). What has a > was not reached within the steps that were trained. "
    "A fit that diverged reaches no threshold, and counts as the share of the most frequent test class. "
    "Costs are those of the target's fit and, below, with the source's."
)


@figures.style()
def sections(study: Study, classes: Classes) -> list[Section]:
    """All sections between the verdict and the command that reproduces it, for page and files; also empty ones."""
    fits = [fit for fit in study.rows if fit.strategy != "pretrain"]
    notes = report.sentences(study.notes)
    strokes = figures.strokes(list(map(label, fits)))
    every = [
        Section("Verdicts", "verdicts", _verdicts(study.family, notes)),
        Section("Accuracy by label budget", "labels", _accuracy_by_labels(fits, strokes, notes)),
        Section(
            "Sources and targets",
            "gains",
            figure(GAINS.format(base=base_of(study.family)) + notes, [figures.gains(study.family)], "box wide"),
        ),
        Section("Each comparison by itself", "each", _single_comparisons(study.others, notes)),
        Section("Milestones", "milestones", _table_block(MILESTONES + notes, tables.milestones(study.milestones))),
        *_sections_at_largest_budget(study, fits, classes, strokes, notes),
        Section("Most often wrong", "wrong", _most_wrong(study, notes)),
        _trained_parameters(fits),
        transfer.origins(study.rows, notes),
    ]
    return report.brief(every, study.notes)


def _sections_at_largest_budget(
    study: Study, fits: Sequence[Result], classes: Classes, strokes: figures.Strokes, notes: str
) -> list[Section]:
    """The sections of pictures at the largest label budget of each target."""
    pictures: dict[str, list[figures.Picture | None]] = {key: [] for key in ("cut", "cost", "shifted", "kept", "sure")}
    learning: list[Block] = []
    by_class: list[Block] = []
    for pair in _pairs(fits):
        members = _members(fits, pair, _largest_budget(fits, pair[1]))
        where = f"{tables.place(*pair)}, {tables.count(_largest_budget(fits, pair[1]))} labels"
        curves = [
            figures.learning_curves(members, study.curves, f, f", {where}", strokes) for f in ("accuracy", "train_loss")
        ]
        learning += figure(transfer.LEARNING, curves, "grid", where)
        cells = figures.accuracy_by_class(members, classes.get(pair[1], ()), f", {where}")
        by_class += figure(transfer.BY_CLASS + notes, [cells], "box wide", where)
        pictures["cut"].append(figures.layer_cut(members, where))
        pictures["cost"] += [
            figures.cost(members, "trained parameters", lambda fit: fit.trained_parameters, where, strokes),
            figures.cost(members, "FLOPs of training", figures.training_flops, where, strokes),
        ]
        names = dict.fromkeys(name for each in members.values() for fit in each for name in fit.evals or {})
        pictures["shifted"] += [figures.shifted(members, name, where, strokes) for name in names]
        pictures["kept"].append(figures.retention(members, where, strokes))
        pictures["sure"].append(figures.reliability(members, where, strokes))
    return [
        Section("Learning curves", "learning", learning),
        Section("Where to cut", "cut", figure(CUT + notes, pictures["cut"])),
        Section("What it costs", "cost", figure(COST + notes, pictures["cost"])),
        Section("Other test sets", "shifted", figure(SHIFTED + notes, pictures["shifted"])),
        Section("What is kept of the source", "kept", figure(RETENTION + notes, pictures["kept"])),
        Section("Accuracy by class", "class", by_class),
        Section("Confusion", "confusion", _confusion(fits, classes, notes)),
        Section("Calibration", "calibration", figure(RELIABILITY + notes, pictures["sure"])),
    ]


def _verdicts(family: Sequence[Comparison], notes: str) -> list[Block]:
    """The table of verdicts, and its forest plot."""
    if not family:
        return []
    area = any(len(comparison.budgets) > 1 for comparison in family)
    what = "area under accuracy against labels" if area else "test accuracy"
    level = listed(f"{100 * comparison.level:.4g}" for comparison in family)
    against = f"Against {listed(comparison.against for comparison in family)}"
    caption = VERDICTS.format(against=against, what=what, level=level)
    table, shared = tables.same(tables.verdicts(family), 6)
    return [
        Block(caption + shared + notes, table),
        *figure(FOREST + notes, [figures.forest(family)], "box wide"),
    ]


def _accuracy_by_labels(fits: Sequence[Result], strokes: figures.Strokes, notes: str) -> list[Block]:
    """Accuracy against labels: a table for each target, and figures."""
    blocks = []
    for target in dict.fromkeys(fit.target for fit in fits):
        table = tables.accuracies([fit for fit in fits if fit.target == target], target)
        blocks.append(Block(LABELS + notes, table, heading=f"Test accuracy on {target} (%)"))
    drawn = [figures.accuracy_by_labels(_members(fits, pair), tables.place(*pair), strokes) for pair in _pairs(fits)]
    return [*blocks, *figure(LABELS_PICTURE + notes, drawn)]


def _single_comparisons(others: Sequence[Comparison], notes: str) -> list[Block]:
    """A table for each strategy that others are compared with."""
    levels = {comparison.against: f"{100 * comparison.level:.4g}" for comparison in others}
    return [
        Block(
            EACH.format(against=against, level=level) + notes,
            tables.by_budget(others, against),
            heading=f"Against {against}",
        )
        for against, level in levels.items()
    ]


def _table_block(caption: str, table: Table) -> list[Block]:
    """The table as a block; no block if it has no rows."""
    return [Block(caption, table)] if table.rows else []


def _confusion(fits: Sequence[Result], classes: Classes, notes: str) -> list[Block]:
    """Confusion matrices of scratch and of the best strategy at the largest budget, for each target."""
    blocks = []
    for target in dict.fromkeys(fit.target for fit in fits):
        at_most = [fit for fit in fits if fit.target == target and fit.train_examples == _largest_budget(fits, target)]
        groups = [group for group in summary.summary(at_most) if group.accuracy]
        groups.sort(key=lambda group: group.accuracy[0] if group.accuracy else 0.0)
        scratch = [group.members for group in groups if group.strategy == "scratch"][-1:]
        best = [group.members for group in groups if group.strategy != "scratch"][-1:]
        named = {_name(members[0]): members for members in (*scratch, *best)}
        drawn = [figures.confusion(name, each, classes.get(target, ()), f", {target}") for name, each in named.items()]
        blocks += figure(
            CONFUSION + notes, drawn, "grid small", f"{target}, {tables.count(_largest_budget(fits, target))} labels"
        )
    return blocks


def _name(fit: Result) -> str:
    """The strategy of a fit and its source."""
    source = fit.source if fit.strategy != "scratch" else None
    return label(fit) + (f" from {source}" if source is not None else "")


def _most_wrong(study: Study, notes: str) -> list[Block]:
    """The test images that are most often wrong, a figure for each target."""
    drawn = [figures.most_wrong(images, captions, target) for target, (images, captions) in study.images.items()]
    return [
        block
        for target, picture in zip(study.images, drawn, strict=True)
        for block in figure(WRONG + notes, [picture], "box wide photo", target)
    ]


def _trained_parameters(fits: Sequence[Result]) -> Section:
    """The section on the trained parameters for the first target, since the heads of others have other sizes."""
    groups = summary.summary(fits)
    first = groups[0].target if groups else ""
    several = len({group.target for group in groups}) > 1
    return transfer.trained([group for group in groups if group.target == first], first if several else "")


def _pairs(fits: Sequence[Result]) -> list[Pair]:
    """Every (source, target) of the fits; (None, target) for a target that has no source."""
    pairs = dict.fromkeys((fit.source, fit.target) for fit in fits if fit.strategy != "scratch")
    pairs |= dict.fromkeys((fit.source, fit.target) for fit in fits)
    with_source = {target for source, target in pairs if source is not None}
    return [(source, target) for source, target in pairs if source is not None or target not in with_source]


def _members(fits: Sequence[Result], pair: Pair, budget: Any = None) -> dict[str, list[Result]]:
    """The fits of a pair by strategy, at one budget or at all; fits from scratch belong to every source."""
    source, target = pair
    chosen: dict[tuple[str, int, int], Result] = {}
    for fit in sorted(fits, key=lambda fit: fit.source == source):  # the pair's own come last, and replace
        of_pair = fit.strategy == "scratch" or fit.source in (None, source)
        if fit.target == target and of_pair and budget in (None, fit.train_examples):
            chosen[label(fit), fit.train_examples, fit.seed] = fit
    members: dict[str, list[Result]] = {name: [] for name in dict.fromkeys(map(label, fits))}
    for fit in chosen.values():
        members[label(fit)].append(fit)
    return {name: each for name, each in members.items() if each}


def _largest_budget(fits: Sequence[Result], target: str) -> Any:
    """The largest budget of a target."""
    return max((fit.train_examples for fit in fits if fit.target == target), key=lambda budget: budget or 0)
