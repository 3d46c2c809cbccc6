"""The tables that stand beside the verdicts of a study: what a reviewer asks, none of it with a word of its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.pages import tables
from experiments.pages.report import Block, Section
from experiments.runs.console import Cell, Table
from experiments.runs.judging import Judging
from experiments.runs.predictions import Predictions
from tljax.study import asides, units
from tljax.study import results as of_results
from tljax.study.results import Result
from tljax.study.summary import Curves
from tljax.study.verdicts import Comparison, Conditions, Right, Study, base_of
from tljax.types import Metric

EXPLORATORY = " None of these measures was named before the run, and no verdict is drawn from them."
SPREAD = (
    "How pairs of fits spread on these test examples, over the budgets of the verdicts: the standard deviation over "
    "pairs, the mean difference in units of it, and the share of pairs in which the strategy is better, ties counting "
    "half, with its exact 95 % interval. Bouthillier et al. (arXiv:2103.03098) call a difference significant where "
    "such an interval, theirs by bootstrap, lies above 0.5, and meaningful too where its upper end exceeds 0.75; a "
    "share alone says neither."
)
BUDGETS = (
    "Differences from {base} in {unit} at every number of labels; all intervals of a target hold together at {level} %."
)
PAIRS = (
    "The first strategy less the second in {unit}, over the budgets of the verdicts, for all pairs; all intervals of a "
    "target hold together at {level} %."
)
CLASSES = (
    "Differences from {base} in {unit} on the test examples of each class, at {labels} labels; all intervals of a "
    "target hold together at {level} %."
)
COSTS = (
    "The strategy at its last step less scratch when that had cost as much, in {unit}: FLOPs, and seconds, of fits on "
    "the target, along scratch's learning curve, of which nothing is known before it was first evaluated. Both are of "
    "{curve}, before what a strategy makes of itself at its end. Intervals are of {level} % each, over seeds. A * "
    "says that scratch ended before it had cost as much: its end stands there. FLOPs are those of steps; features of "
    "frozen stages, which are computed once for all fits that share them, are left out. Seconds were measured once "
    "for all fits of a group, under whatever ran beside them; the intervals take them as known."
)
MILESTONES = (
    "Intervals of the milestones, of {level} % each, over seeds: Student's t of the means; of the median number of "
    "steps to the threshold the order statistics that hold it with the probability below. The end is of the test set, "
    "area and steps are of {curve}; the threshold is what scratch ends with there in the mean, which the intervals "
    "take as known."
)


def of_study(
    parts: Sequence[Predictions],
    table: Right,
    rows: Sequence[Result],
    curves: Curves,
    family: Sequence[Comparison],
    terms: Mapping[str, Conditions],
    level: float,
    judging: Judging,
    by_set: Mapping[str, Any],
) -> asides.Asides | None:
    """What stands beside the verdicts on targets; None of verdicts on retention, and where nothing is compared."""
    if judging.verdict_on != "target" or not family:
        return None
    labels = {target: of_part for part in parts for target, of_part in part.labels.items() if target in terms}
    return asides.asides(table, rows, curves, family, labels, terms, level, judging.against, **by_set)


def sections(study: Study, classes: Mapping[str, Sequence[str]], notes: str) -> list[Section]:
    """The sections of a page; their blocks are [] where nothing is known."""
    known: asides.Asides = study.asides or asides.Asides()
    words = {"base": base_of(study.family), "level": f"{100 * known.level:.4g}", "curve": curve_of(study.rows)}
    metric_of = {fit.target: of_results.metric(fit) for fit in study.rows}
    tabled = [
        *_blocks(SPREAD, _spreads(known.spreads), words, notes),
        *_by_metric(BUDGETS, known.budgets, words, notes, _budgets),
        *_by_metric(PAIRS, known.pairs, words, notes, _pairs),
        *_classes(known.classes, classes, metric_of, words, notes),
        *_costs(known.costs, metric_of, words, notes),
        *_blocks(MILESTONES, _milestones(known.milestones, metric_of), {**words, "level": "95"}, notes),
    ]
    return [Section("Beside the verdicts", "beside", tabled)]


def _blocks(caption: str, shown: Table, words: Mapping[str, str], notes: str) -> list[Block]:
    return [Block(caption.format(**words) + EXPLORATORY + notes, shown, heading=shown.label)] if shown.rows else []


def _by_metric(
    caption: str, comparisons: Sequence[Comparison], words: Mapping[str, str], notes: str, make: Any
) -> list[Block]:
    """A table of the comparisons of each metric."""
    blocks = []
    for metric in dict.fromkeys(comparison.metric for comparison in comparisons):
        members = [comparison for comparison in comparisons if comparison.metric == metric]
        level = f"{100 * members[0].level:.4g}"
        blocks += _blocks(caption, make(members), {**words, "unit": _unit(metric), "level": level}, notes)
    return blocks


def curve_of(rows: Sequence[Result]) -> str:
    """What examples the learning curves of these fits are of."""
    held_out = {of_results.validation_score(fit) is not None for fit in rows if not fit.diverged}
    if held_out == {True}:
        return "validation examples, a draw of their own a seed, as learning curves are"
    return "these test examples" if held_out != {True, False} else "validation examples where a fit has some"


def _unit(metric: Metric) -> str:
    return units.of_differences(metric) or "the metric's own unit"


def _difference(metric: Metric, values: tuple[float, float, float] | None, mark: str = "") -> Cell:
    """A difference with its interval."""
    if values is None:
        return Cell(tables.NOTHING)
    form = lambda value: tables.signed(units.factor(metric) * value, units.digits(metric))  # noqa: E731
    cell = tables.ranged(values, form)
    return cell._replace(text=f"{mark}{cell.text}")


def _spreads(spreads: Sequence[asides.Spread]) -> Table:
    rows = []
    for spread in spreads:
        comparison, metric = spread.comparison, spread.comparison.metric
        share, low, high = (f"{part:.2f}" for part in spread.outperforms)
        cells = [
            Cell(comparison.strategy),
            Cell(tables.labels_of(comparison.budgets)),
            Cell(tables.count(comparison.fits)),
            Cell(units.with_unit(metric, spread.sd) if metric.unit != "%" else f"{100 * spread.sd:.2f} points"),
            Cell(tables.signed(spread.effect) if math.isfinite(spread.effect) else tables.NOTHING),
            Cell(share, ends=(low, high)),
        ]
        rows.append((tables.place(comparison.source, comparison.target), cells))
    columns = [
        "Strategy",
        "Labels",
        "Pairs of fits",
        "Deviation over pairs",
        "Difference in deviations",
        "Share better",
    ]
    return Table("Spread of pairs", columns, tables.grouped(rows))


def _budgets(comparisons: Sequence[Comparison]) -> Table:
    return tables.by_budget(comparisons, comparisons[0].against)._replace(label="All budgets together")


def _pairs(pairs: Sequence[Comparison]) -> Table:
    rows = [
        (
            tables.place(each.source, each.target),
            [Cell(each.strategy), Cell(each.against), Cell(tables.labels_of(each.budgets)), tables.difference(each)],
        )
        for each in pairs
    ]
    return Table("All pairs", ["Strategy", "Against", "Labels", "Difference"], tables.grouped(rows), 2)


def _classes(
    differences: Sequence[asides.ClassDifferences],
    classes: Mapping[str, Sequence[str]],
    metric_of: Mapping[str, Metric],
    words: Mapping[str, str],
    notes: str,
) -> list[Block]:
    blocks = []
    for target in dict.fromkeys(each.target for each in differences):
        members = [each for each in differences if each.target == target]
        metric, most = metric_of[target], max(len(each.intervals) for each in members)
        names = list(classes.get(target, ())) or list(map(str, range(most)))
        rows = [
            (
                tables.place(each.source, target),
                [Cell(each.strategy), *(_difference(metric, interval and interval[:3]) for interval in each.intervals)],
            )
            for each in members
        ]
        shown = Table(f"By class, {target}", ["Strategy", *names[:most]], tables.grouped(rows))
        about = {**words, "unit": _unit(metric), "labels": tables.count(members[0].budget)}
        blocks += _blocks(CLASSES, shown, about, notes)
    return blocks


def _costs(
    costs: Sequence[asides.EqualCost], metric_of: Mapping[str, Metric], words: Mapping[str, str], notes: str
) -> list[Block]:
    """A table of the costs of each metric."""
    blocks = []
    for metric in dict.fromkeys(metric_of[cost.target] for cost in costs):
        members = [cost for cost in costs if metric_of[cost.target] == metric]
        blocks += _blocks(COSTS, _costs_of(metric, members), {**words, "unit": _unit(metric)}, notes)
    return blocks


def _costs_of(metric: Metric, costs: Sequence[asides.EqualCost]) -> Table:
    rows = []
    for cost in costs:
        marks = ["*" if longer else "" for longer in cost.longer]
        cells = [
            Cell(cost.strategy),
            Cell(tables.count(cost.budget)),
            _difference(metric, cost.flops, marks[0]),
            _difference(metric, cost.seconds, marks[1]),
        ]
        rows.append((tables.place(cost.source, cost.target), cells))
    return Table("At equal cost", ["Strategy", "Labels", "At equal FLOPs", "At equal seconds"], tables.grouped(rows))


def _milestones(known: Sequence[asides.Milestones], metric_of: Mapping[str, Metric]) -> Table:
    rows = []
    for each in known:
        metric = metric_of[each.target]
        shown = lambda value, metric=metric: units.shown(metric, value)  # noqa: E731
        cells = [
            Cell(each.strategy),
            Cell(tables.count(each.budget)),
            tables.ranged(each.asymptote, shown),
            tables.ranged(each.area, shown),
            _time(each.time_to_threshold),
        ]
        if len({cell.text for cell in cells[2:]}) > 1 or cells[2].text != tables.NOTHING:
            rows.append((tables.place(each.source, each.target), cells))
    columns = ["Strategy", "Labels", "End", "Area", "Median steps to threshold"]
    return Table("Milestones with intervals", columns, tables.grouped(rows))


def _time(median: tuple[float, float, float, float] | None) -> Cell:
    if median is None:
        return Cell(tables.NOTHING)
    middle, low, high = ("never" if math.isinf(value) else tables.count(value) for value in median[:3])
    return Cell(middle, f"{low} to {high}: {100 * median[3]:.0f} %")
