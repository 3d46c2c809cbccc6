"""The report of a whole study: verdict first, then tables and pictures of every source and target."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.pages import drawing, pictures, report, study_pictures, tables, tradeoffs
from experiments.pages.report import Block, Section, figure
from tljax.study.results import Result
from tljax.study.summary import label, listed, summary
from tljax.study.verdicts import Comparison, Study, base_of

Classes = Mapping[str, Sequence[str]]
"""Target -> names of its classes."""
Pair = tuple[Any, str]
"""(source or None, target)."""

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


@drawing.style()
def sections(study: Study, classes: Classes) -> list[Section]:
    """All between the verdict and the way to reproduce it, for page and files alike; empty ones too."""
    fits = [row for row in study.rows if row.strategy != "pretrain"]
    notes = report.said(study.notes)
    strokes = drawing.strokes([label(row) for row in fits])
    every = [
        Section("Verdicts", "verdicts", _verdicts(study.family, notes)),
        Section("Accuracy by label budget", "labels", _labels(fits, strokes, notes)),
        Section(
            "Sources and targets",
            "gains",
            figure(GAINS.format(base=base_of(study.family)) + notes, [study_pictures.gains(study.family)], "box wide"),
        ),
        Section("Each comparison by itself", "each", _each(study.others, notes)),
        Section("Milestones", "milestones", _table(MILESTONES + notes, tables.milestones(study.milestones))),
        *_at_most_labels(study, fits, classes, strokes, notes),
        Section("Most often wrong", "wrong", _wrong(study, notes)),
        _trained(fits),
        report.origins(study.rows, notes),
    ]
    return report.brief(every, study.notes)


def _at_most_labels(
    study: Study, fits: Sequence[Result], classes: Classes, strokes: drawing.Strokes, notes: str
) -> list[Section]:
    """Sections of pictures at the largest label budget of each target."""
    found: dict[str, list[drawing.Picture | None]] = {key: [] for key in ("cut", "cost", "shifted", "kept", "sure")}
    learning: list[Block] = []
    by_class: list[Block] = []
    for pair in _pairs(fits):
        members = _members(fits, pair, _most(fits, pair[1]))
        where = f"{tables.place(*pair)}, {tables.count(_most(fits, pair[1]))} labels"
        curves = [
            pictures.learning(members, study.curves, f, f", {where}", strokes) for f in ("accuracy", "train_loss")
        ]
        learning += figure(report.LEARNING, curves, "grid", where)
        cells = pictures.by_class(members, classes.get(pair[1], ()), f", {where}")
        by_class += figure(report.BY_CLASS + notes, [cells], "box wide", where)
        found["cut"].append(study_pictures.layer_cut(members, where))
        found["cost"] += [
            tradeoffs.cost(members, "trained parameters", lambda row: row.trained_parameters, where, strokes),
            tradeoffs.cost(members, "FLOPs of training", tradeoffs.flops, where, strokes),
        ]
        names = dict.fromkeys(name for rows in members.values() for row in rows for name in row.evals or {})
        found["shifted"] += [tradeoffs.shifted(members, name, where, strokes) for name in names]
        found["kept"].append(tradeoffs.retention(members, where, strokes))
        found["sure"].append(study_pictures.reliability(members, where, strokes))
    return [
        Section("Learning curves", "learning", learning),
        Section("Where to cut", "cut", figure(CUT + notes, found["cut"])),
        Section("What it costs", "cost", figure(COST + notes, found["cost"])),
        Section("Other test sets", "shifted", figure(SHIFTED + notes, found["shifted"])),
        Section("What is kept of the source", "kept", figure(RETENTION + notes, found["kept"])),
        Section("Accuracy by class", "class", by_class),
        Section("Confusion", "confusion", _confusion(fits, classes, notes)),
        Section("Calibration", "calibration", figure(RELIABILITY + notes, found["sure"])),
    ]


def _verdicts(family: Sequence[Comparison], notes: str) -> list[Block]:
    if not family:
        return []
    area = any(len(one.budgets) > 1 for one in family)
    what = "area under accuracy against labels" if area else "test accuracy"
    level = listed(f"{100 * one.level:.4g}" for one in family)
    caption = VERDICTS.format(against=f"Against {listed(one.against for one in family)}", what=what, level=level)
    table, shared = tables.same(tables.verdicts(family), 6)
    return [
        Block(caption + shared + notes, table),
        *figure(FOREST + notes, [study_pictures.forest(family)], "box wide"),
    ]


def _labels(fits: Sequence[Result], strokes: drawing.Strokes, notes: str) -> list[Block]:
    blocks = []
    for target in dict.fromkeys(row.target for row in fits):
        table = tables.accuracies([row for row in fits if row.target == target], target)
        blocks.append(Block(LABELS + notes, table, heading=f"Test accuracy on {target} (%)"))
    drawn = [study_pictures.against_labels(_members(fits, pair), tables.place(*pair), strokes) for pair in _pairs(fits)]
    return [*blocks, *figure(LABELS_PICTURE + notes, drawn)]


def _each(others: Sequence[Comparison], notes: str) -> list[Block]:
    levels = {one.against: f"{100 * one.level:.4g}" for one in others}
    return [
        Block(
            EACH.format(against=against, level=level) + notes,
            tables.by_budget(others, against),
            heading=f"Against {against}",
        )
        for against, level in levels.items()
    ]


def _table(caption: str, table: tables.Table) -> list[Block]:
    return [Block(caption, table)] if table.rows else []


def _confusion(fits: Sequence[Result], classes: Classes, notes: str) -> list[Block]:
    """Of scratch and the best at the largest budget, for each target."""
    blocks = []
    for target in dict.fromkeys(row.target for row in fits):
        there = [row for row in fits if row.target == target and row.train_examples == _most(fits, target)]
        known = sorted((one for one in summary(there) if one.accuracy), key=lambda one: one.accuracy or ())
        scratch = [one.members for one in known if one.strategy == "scratch"][-1:]
        best = [one.members for one in known if one.strategy != "scratch"][-1:]
        named = {_called(members[0]): members for members in (*scratch, *best)}
        drawn = [pictures.confusion(n, rows, classes.get(target, ()), f", {target}") for n, rows in named.items()]
        blocks += figure(
            CONFUSION + notes, drawn, "grid small", f"{target}, {tables.count(_most(fits, target))} labels"
        )
    return blocks


def _called(row: Result) -> str:
    source = row.source if row.strategy != "scratch" else None
    return label(row) + (f" from {source}" if source is not None else "")


def _wrong(study: Study, notes: str) -> list[Block]:
    drawn = [study_pictures.wrong(images, captions, target) for target, (images, captions) in study.images.items()]
    return [
        block
        for target, picture in zip(study.images, drawn, strict=True)
        for block in figure(WRONG + notes, [picture], "box wide photo", target)
    ]


def _trained(fits: Sequence[Result]) -> Section:
    """Of the first target, because the heads of others have other sizes."""
    groups = summary(fits)
    first = groups[0].target if groups else ""
    several = len({group.target for group in groups}) > 1
    return report.trained([group for group in groups if group.target == first], first if several else "")


def _pairs(fits: Sequence[Result]) -> list[Pair]:
    """Every source and target between which something was transferred; of a target without a source, (None, target)."""
    found = dict.fromkeys((row.source, row.target) for row in fits if row.strategy != "scratch")
    found |= dict.fromkeys((row.source, row.target) for row in fits)
    with_source = {target for source, target in found if source is not None}
    return [(source, target) for source, target in found if source is not None or target not in with_source]


def _members(fits: Sequence[Result], pair: Pair, budget: Any = None) -> dict[str, list[Result]]:
    """Fits of a pair by strategy, at one budget or at all; with those from scratch, whatever source they stand by."""
    source, target = pair
    found: dict[tuple[Any, ...], Result] = {}
    for row in sorted(fits, key=lambda row: row.source == source):  # the pair's own come last, and replace
        own = row.strategy == "scratch" or row.source in (None, source)
        if row.target == target and own and budget in (None, row.train_examples):
            found[label(row), row.train_examples, row.seed] = row
    members: dict[str, list[Result]] = {name: [] for name in dict.fromkeys(map(label, fits))}
    for row in found.values():
        members[label(row)].append(row)
    return {name: rows for name, rows in members.items() if rows}


def _most(fits: Sequence[Result], target: str) -> Any:
    """The largest budget of a target."""
    return max((row.train_examples for row in fits if row.target == target), key=lambda budget: budget or 0)
