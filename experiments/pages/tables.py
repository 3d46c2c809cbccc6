"""The tables of the reports as data, which the page, the console, Markdown and LaTeX write alike.

The console has fewer columns than the page, of the same cells: `results` and `results_in_short`, `verdicts` and
`verdicts_in_short`. Accuracies and their differences are in % and points with two decimals; headings name the metric
and its unit.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.console import Cell, Table
from tljax.study import results as of_results
from tljax.study import statistics, units
from tljax.study.ranking import Board, Estimate
from tljax.study.results import Result
from tljax.study.sample_size import SeedsNeeded
from tljax.study.summary import Spread, Summary, counted_score, counts, ended, finite, label, spread
from tljax.study.units import ACCURACY
from tljax.study.verdicts import Comparison, base_of, weights
from tljax.types import Metric

# Numbers

NOTHING = "\N{EN DASH}"


def percent(fraction: float) -> str:
    """A fraction in %, two decimals."""
    return f"{100 * fraction:.2f}"


def signed(points: float, digits: int = 2) -> str:
    """A difference in points, two decimals, with its sign even at 0.00, so that it agrees with its verdict.

    >>> signed(0.001), signed(float("nan")) == NOTHING
    ('+0.00', True)
    """
    return NOTHING if not math.isfinite(points) else f"{points:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def chance(p: float | None) -> str:
    """A p value, three decimals.

    >>> chance(0.0004)
    '< 0.001'
    """
    return NOTHING if p is None or not finite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None) -> str:
    """A whole number with commas."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def ranged(values: Spread | None, form: Callable[[float], str], several: bool = True) -> Cell:
    """The cell of a mean, with a range or interval if it is of `several` values; a dash for None.

    >>> ranged((0.5, 0.25, 0.75), percent).below
    '25.00 to 75.00'
    """
    if values is None:
        return Cell(NOTHING)
    mean, low, high = map(form, values)
    return Cell(mean, ends=(low, high) if several and math.isfinite(values[1]) else None)


def span(values: Sequence[float]) -> str:
    """The range of numbers, "least to most"; one number if both are written alike, "" if there are none.

    >>> span([88.5, 89.153]), span([82.15, 82.15]), span([])
    ('88.50 to 89.15', '82.15', '')
    """
    return " to ".join(dict.fromkeys(f"{end(values):.2f}" for end in (min, max))) if values else ""


def spanned(values: Sequence[float], metric: Metric) -> str:
    """The range of values of a metric, with its unit.

    >>> spanned([0.885, 0.89153], ACCURACY)
    '88.50 to 89.15 %'
    """
    texts = dict.fromkeys(units.shown(metric, end(values)) for end in (min, max)) if values else {}
    return " ".join(filter(None, (" to ".join(texts), metric.unit)))


def difference(comparison: Comparison) -> Cell:
    """The difference of a comparison in points, or the metric's unit, with its interval."""
    interval = (comparison.mean, comparison.low, comparison.high)
    metric = comparison.metric
    return ranged(interval, lambda value: signed(units.factor(metric) * value, units.digits(metric)))


# Fits


def of_test(metric: Metric, what: str = "Test") -> str:
    """The heading of a column of a metric on the test set.

    >>> of_test(ACCURACY), of_test(Metric("cross_entropy", "nats", False), "Validation")
    ('Test accuracy (%)', 'Validation cross entropy (nats)')
    """
    return units.headed(f"{what} {units.spoken(metric)}", metric.unit)


def from_base(base: str, metric: Metric) -> str:
    """The heading of a column of differences from what is compared with.

    >>> from_base("scratch", ACCURACY)
    'Difference from scratch (points)'
    """
    return units.headed(f"Difference from {base}", units.of_differences(metric))


def of_loss(metric: Metric, what: str = "Test") -> str:
    """The heading of a column of losses: in nats where classes are learnt."""
    return units.headed(f"{what} loss", "nats" if metric == ACCURACY else "")


def metric_of(groups: Sequence[Summary]) -> Metric:
    """The metric of fits in one table."""
    return groups[0].metric if groups else ACCURACY


def further(groups: Sequence[Summary]) -> list[str]:
    """The names of the further metrics that fits were measured by."""
    return list(dict.fromkeys(name for group in groups for fit in group.members for name in fit.metrics))


def retention_heading(groups: Sequence[Summary]) -> str | None:
    """The heading of the column of retention; None where it was not measured."""
    metrics = list(dict.fromkeys(group.retention_metric for group in groups if group.retention is not None))
    if not metrics:
        return None
    [metric] = metrics if len(metrics) == 1 else [None]
    return units.headed("Retention", "" if metric is None else _name_and_unit(metric))


def _name_and_unit(metric: Metric) -> str:
    return metric.unit if metric == ACCURACY else ", ".join(filter(None, (units.spoken(metric), metric.unit)))


PEAK = "Peak memory (MB)"


def results(groups: Sequence[Summary], where: str) -> Table:
    """The results for a page, a row for each strategy; `where` names their target and budget."""
    metric = metric_of(groups)
    columns = {"score": of_test(metric), "gain": from_base("scratch", metric)}
    columns |= {f"metric {name}": f"Test {name.replace('_', ' ')}" for name in further(groups)}
    columns |= {"retention": heading} if (heading := retention_heading(groups)) else {}
    columns |= {"loss": of_loss(metric)} | ({"calibration": "Calibration error"} if metric == ACCURACY else {})
    columns |= {"trained": "Trained parameters", "steps": "Steps", "seconds": "Time (s)", "peak": PEAK}
    return _of_groups(f"Results, {where}" if where else "Results", groups, columns)


def results_in_short(title: str, groups: Sequence[Summary], narrow: bool = False) -> Table:
    """The results for the console, a row for each strategy and label budget.

    A narrow table leaves out columns, which results.jsonl has.
    """
    metric = metric_of(groups)
    in_unit = " ".join(filter(None, (f"test {units.spoken(metric)}", metric.unit)))
    repeated = "seeds x draws" if any(map(_draws, groups)) else "seeds"
    columns = ["strategy", "labels", repeated, in_unit, "against scratch"]
    names = ["score", "gain"]
    if heading := retention_heading(groups):
        columns.append(heading.lower().replace(" (%)", " %"))
        names.append("retention")
    columns += [*(name.replace("_", " ") for name in further(groups)), "trained"]
    names += [*(f"metric {name}" for name in further(groups)), "trained"]
    if not narrow:
        columns += [of_loss(metric, "").strip(), "steps", "seconds"]
        names += ["loss", "steps", "seconds"]
    rows = []
    for group in groups:
        cells = _cells(group)
        draws = _draws(group)
        runs = f"{group.seeds // draws} x {draws}" if draws else f"{group.seeds}"
        runs += f" ({group.diverged} diverged)" if group.diverged else ""
        about = [Cell(group.name), Cell(count(group.train_examples)), Cell(runs)]
        rows.append([*about, *(cells[name]._replace(words="") for name in names)])
    return Table(title, columns, rows)


def _draws(group: Summary) -> int:
    """How many draws of labels are crossed with the seeds of a group; 0 where the seeds draw the labels."""
    return len({fit.draw for fit in group.members} - {None})


def sources(groups: Sequence[Summary]) -> Table:
    """The sources, a row each; `groups` are those of `summary.sources`."""
    named = [
        replace(group, name=f"{group.target}, {count(group.train_examples)} training examples") for group in groups
    ]
    metrics = list(dict.fromkeys(group.metric for group in named))
    shared = metrics[0] if len(metrics) == 1 else None
    columns = {"score": "Test score" if shared is None else of_test(shared)} if metrics else {}
    columns |= {"loss": "Test loss" if shared is None else of_loss(shared)}
    columns |= {"calibration": "Calibration error"} if ACCURACY in metrics else {}
    columns |= {"total": "Parameters", "steps": "Steps", "seconds": "Time (s)", "peak": PEAK}
    if shared is None:  # several: each score has its name and unit below it
        named = [replace(group, name=f"{group.name}, by {units.spoken(group.metric)}") for group in named]
    return _of_groups("Sources", named, columns, "Source")


def source_fits(name: str, folder: Path, fits: Mapping[int, Result]) -> Table:
    """The fits that trained one source, a row for each seed, for the console; `folder` is their run directory."""
    rows = []
    for seed, fit in fits.items():
        value, metric = of_results.score(fit), of_results.metric(fit)
        score = "diverged" if value is None else units.shown(metric, value)
        loss = NOTHING if fit.test_loss is None else f"{fit.test_loss:.3f}"
        rows.append(list(map(Cell, (str(seed), score, loss, count(fit.steps), str(folder / fit.checkpoint)))))
    metric = of_results.metric(next(iter(fits.values()))) if fits else ACCURACY
    heading = " ".join(filter(None, (f"test {units.spoken(metric)}", metric.unit)))
    return Table(name, ["seed", heading, of_loss(metric, "").strip(), "steps", "checkpoint"], rows)


def _of_groups(title: str, groups: Sequence[Summary], columns: Mapping[str, str], first: str = "Strategy") -> Table:
    """The groups, a row each: the name, with the note of `state` below it, and the cells of these {name: column}."""
    rows = []
    for group in groups:
        cells = _cells(group)
        rows.append([Cell(group.name, state(group)), *(cells.get(name, Cell(NOTHING)) for name in columns)])
    return Table(title, [first, *columns.values()], rows)


def _cells(group: Summary) -> dict[str, Cell]:
    """All cells of a strategy; a mean over two seeds or more has its range."""
    trained, total = group.trained_parameters, group.total_parameters
    share = f"{100 * trained / total:.1f} %" if trained is not None and total else ""
    diverged = group.diverged and group.diverged == group.seeds and group.score is None
    several, metric = group.counted > 1, group.metric
    further_cells = {
        f"metric {name}": ranged(spread(fit.metrics.get(name) for fit in group.members), "{:.4f}".format, several)
        for name in further([group])
    }
    return {
        **further_cells,
        "score": Cell("diverged") if diverged else ranged(group.score, lambda x: units.shown(metric, x), several),
        "gain": ranged(group.gain, lambda x: signed(x, units.digits(metric)), group.gain_seeds > 1),
        "retention": ranged(group.retention, lambda x: units.shown(group.retention_metric, x), several),
        "loss": ranged(group.test_loss, "{:.3f}".format, several),
        "calibration": ranged(group.calibration_error, "{:.3f}".format, several),
        "trained": Cell(count(trained), share),
        "total": Cell(count(total)),
        "steps": Cell(count(group.steps)),
        "seconds": Cell(NOTHING if group.seconds is None else f"{group.seconds:,.1f}"),
        "peak": Cell(NOTHING if group.peak_bytes is None else f"{group.peak_bytes / 1e6:,.1f}"),
    }


def state(group: Summary) -> str:
    """The note on what the means lack: diverged and unmeasured fits, seeds without a fit from scratch; or ''."""
    texts, fits = [], "fits" if _draws(group) else "seeds"
    unmeasured = group.seeds - group.counted - (group.diverged if group.counts_as is None else 0)
    if group.counted < group.seeds:
        texts.append(f"{group.counted} of {group.seeds} {fits}")
    if group.diverged:
        texts.append(diverged(group.diverged, group.seeds, group.counts_as, group.metric))
    if unmeasured:
        texts.append(f"{unmeasured} not measured")
    if 0 < group.gain_seeds < group.counted:
        texts.append(f"difference over {group.gain_seeds} of {group.counted} {fits}")
    return ", ".join(texts)


def diverged(number: int, fits: int, counts_as: float | None, metric: Metric = ACCURACY) -> str:
    """The note on the fits that diverged: how many of all, and the score that they count with.

    >>> diverged(2, 5, 0.1)
    '2 of 5 fits diverged and count as 10.0 %'
    """
    if counts_as is None:
        return f"{number} diverged"
    value = f"{100 * counts_as:.1f} %" if metric.unit == "%" else units.with_unit(metric, counts_as)
    return f"{number} of {fits} fits diverged and count as {value}"


def scores(fits: Sequence[Result], target: str) -> Table:
    """Means of the target's metric over the fits that count, a row a strategy under its source, a column a budget."""
    members: dict[tuple[str, str], dict[int, list[Result]]] = {}
    for fit in fits:
        source = None if fit.strategy == "scratch" else fit.source
        where = "" if source is None else f"from {source}"
        members.setdefault((where, label(fit)), {}).setdefault(fit.train_examples, []).append(fit)
    budgets = sorted({fit.train_examples for fit in fits}, key=lambda budget: budget or 0)
    cells = {key: {budget: _score(each) for budget, each in known.items()} for key, known in members.items()}
    return _across(scores_heading(fits, target), cells, {budget: count(budget) for budget in budgets})


def scores_heading(fits: Sequence[Result], target: str) -> str:
    """The heading of the scores of fits of one target."""
    metric = of_results.metric(fits[0]) if fits else ACCURACY
    return units.headed(f"Test {units.spoken(metric)} on {target}", metric.unit)


def _score(fits: Sequence[Result]) -> Cell:
    """The mean score; its range over seeds, or of a single fit Wilson's 95 % interval over test examples (accuracy)."""
    counted = [fit for fit in fits if counts(fit)]
    values = spread(counted_score(fit) for fit in counted)
    if values is None:
        return Cell("diverged" if all(fit.diverged for fit in fits) else NOTHING)
    items = sum(map(sum, counted[0].confusion or ()))
    of_accuracy = of_results.metric(counted[0]) == ACCURACY
    if len(counted) == 1 and items and of_accuracy and ended(counted[0]):
        values = (values[0], *statistics.wilson(round(values[0] * items), items))
    metric = of_results.metric(counted[0])
    return ranged(values, lambda value: units.shown(metric, value), len(counted) > 1 or (of_accuracy and items > 0))


def further_metrics(fits: Sequence[Result]) -> list[Table]:
    """The further metrics of fits on the test set: a table each, a row a strategy under its source and target."""
    tables = []
    for name in dict.fromkeys(name for fit in fits for name in fit.metrics):
        cells: dict[tuple[str, str], dict[int, list[Result]]] = {}
        for fit in fits:
            if name in fit.metrics:
                row = cells.setdefault((place(fit.source, fit.target), label(fit)), {})
                row.setdefault(fit.train_examples, []).append(fit)
        budgets = {budget: count(budget) for budget in sorted({b for row in cells.values() for b in row})}
        by_cell = {key: {b: _further(name, members) for b, members in row.items()} for key, row in cells.items()}
        tables.append(_across(f"Test {name.replace('_', ' ')}", by_cell, budgets))
    return tables


def metrics_without_number(fits: Sequence[Result]) -> list[str]:
    """A line for each further metric that is not finite in some fits that did not diverge: their cells leave it out."""
    lines = []
    for name in dict.fromkeys(name for fit in fits for name in fit.metrics):
        measured = [fit for fit in fits if name in fit.metrics and not fit.diverged]
        lacking = [fit for fit in measured if fit.metrics[name] is None]
        if lacking:
            strategies = ", ".join(dict.fromkeys(map(label, lacking)))
            lines.append(
                f"metric {name} is nan or infinite in {len(lacking)} of {len(measured)} fits ({strategies}): "
                "tables leave them out"
            )
    return lines


def _further(name: str, fits: Sequence[Result]) -> Cell:
    return ranged(spread(fit.metrics.get(name) for fit in fits), "{:.4f}".format, len(fits) > 1)


def kept(fits: Sequence[Result]) -> list[Table]:
    """The retention of fits: a table for each metric of sources, a row a strategy under its source and target."""
    measured = [fit for fit in fits if fit.retention is not None]
    tables = []
    for metric in dict.fromkeys(units.from_record(fit.retention_metric) for fit in measured):
        cells: dict[tuple[str, str], dict[int, list[Result]]] = {}
        of_metric = [fit for fit in measured if units.from_record(fit.retention_metric) == metric]
        for fit in of_metric:
            row = cells.setdefault((place(fit.source, fit.target), label(fit)), {})
            row.setdefault(fit.train_examples, []).append(fit)
        budgets = {budget: count(budget) for budget in sorted({fit.train_examples for fit in of_metric})}
        title = units.headed("Retention", _name_and_unit(metric))
        tables.append(
            _across(
                title,
                {
                    key: {budget: _kept(members, metric) for budget, members in row.items()}
                    for key, row in cells.items()
                },
                budgets,
            )
        )
    return tables


def _kept(fits: Sequence[Result], metric: Metric) -> Cell:
    return ranged(spread(fit.retention for fit in fits), lambda value: units.shown(metric, value), len(fits) > 1)


def _across(title: str, cells: Mapping[tuple[str, str], Mapping[Any, Cell]], budgets: Mapping[Any, str]) -> Table:
    """The table of {(heading, strategy): {budget: cell}}: a row a strategy, under its heading, a column a budget."""
    rows = [
        (heading, [Cell(name), *(row.get(budget, Cell(NOTHING)) for budget in budgets)])
        for (heading, name), row in cells.items()
    ]
    return Table(title, ["Strategy", *(f"{text} labels" for text in budgets.values())], grouped(rows))


# Comparisons

SIZES = {
    "beyond": "by more than the margin",
    "within": "by less than the margin",
    "open": "whether by more than the margin is open",
}
"""{size of a difference: its words}: how a difference compares with the margin."""


def verdicts(family: Sequence[Comparison]) -> Table:
    """The verdicts for a page: a row for each comparison of the family, under its source and target.

    Of verdicts of several metrics the headings have no unit, and each row says its own.
    """
    metrics = list(dict.fromkeys(comparison.metric for comparison in family))
    shared = metrics[0] if len(metrics) == 1 else None
    difference_heading = from_base(base_of(family), shared) if shared else f"Difference from {base_of(family)}"
    margin = units.headed("Margin", units.of_differences(shared)) if shared else "Margin"
    power = ["Power (%)", "Power to call equivalent (%)", "Seeds to find the margin", "Seeds to call equivalent"]
    numbers = [difference_heading, "p, adjusted", *power, margin, "Labels", "Pairs of fits", "Test examples"]
    numbers = numbers if shared else ["Metric", *numbers]
    rows = []
    for comparison in family:
        word, groups, metric = comparison.word, comparison.groups, comparison.metric
        in_groups = "" if groups is None else f"in {count(groups)} {'group' if groups == 1 else 'groups'}"
        cells = [
            Cell(comparison.strategy, _about(comparison)),
            Cell(word or NOTHING, SIZES.get(comparison.size, "") if word in ("positive", "negative") else ""),
            *([] if shared else [Cell(units.headed(units.spoken(metric), units.of_differences(metric)))]),
            difference(comparison),
            Cell(chance(comparison.p) if word else NOTHING),
            Cell(between(comparison.power)),
            Cell(between(comparison.power_equivalent)),
            *seeds_needed(comparison.seeds_needed),
            Cell(units.shown(metric, comparison.margin)),
            Cell(labels_of(comparison.budgets)),
            Cell(count(comparison.fits)),
            Cell(count(comparison.items), in_groups),
        ]
        rows.append((place(comparison.source, comparison.target), cells))
    return Table("Verdicts", ["Strategy", "Verdict", *numbers], grouped(rows), 2 if shared or not family else 3)


def _about(comparison: Comparison) -> str:
    """What stands below the name of a strategy: what it equals, and that it is exploratory."""
    equal = f"equals {comparison.equals}" if comparison.equals else ""
    return "; ".join(filter(None, (equal, "exploratory" if comparison.exploratory else "")))


def verdicts_in_short(title: str, family: Sequence[Comparison]) -> Table:
    """The verdicts for the console: a row for each comparison of the family."""
    rows = []
    for comparison in family:
        word, size, power = comparison.word or NOTHING, comparison.size or NOTHING, comparison.power
        word += ", exploratory" if comparison.exploratory else ""
        chances = NOTHING if power is None else f"{power[0]:.2f} to {power[1]:.2f}"
        p = chance(comparison.p) if comparison.word else NOTHING
        seeds = seeds_needed(comparison.seeds_needed)[0]
        rows.append([*_compared(comparison), *map(Cell, (word, size, chances)), seeds, Cell(p)])
    columns = [*_compared_columns(family), "verdict", "size", "power", "seeds needed", "p, adjusted"]
    return Table(title, columns, rows)


def singly(title: str, comparisons: Sequence[Comparison]) -> Table:
    """The comparisons that are not judged, for the console; with McNemar's p if there is one pair of fits."""
    rows = [[*_compared(comparison), Cell(chance(comparison.p))] for comparison in comparisons]
    return Table(title, [*_compared_columns(comparisons), "p of the one pair"], rows)


def _compared_columns(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The columns of `_compared`: points, or what the difference is of where that is not accuracy."""
    metrics = list(dict.fromkeys(comparison.metric for comparison in comparisons)) or [ACCURACY]
    what = "points"
    if metrics != [ACCURACY]:
        what = units.headed(units.spoken(metrics[0]), units.of_differences(metrics[0]))
    if len(metrics) > 1:
        what = "difference"
    return ("strategy", "source", "target", "labels", "pairs", what, "interval")


def _compared(comparison: Comparison) -> list[Cell]:
    """The cells under `_compared_columns`."""
    points, _, ends = difference(comparison)
    interval = f"[{ends[0]}, {ends[1]}]" if ends else NOTHING
    about = (comparison.strategy, comparison.source or NOTHING, comparison.target)
    return list(map(Cell, (*about, labels_of(comparison.budgets), count(comparison.fits), points, interval)))


def between(chances: tuple[float, float] | None) -> str:
    """A range of probabilities, in %.

    >>> between((0.052, 0.54))
    '5 to 54'
    """
    return NOTHING if chances is None else f"{100 * chances[0]:.0f} to {100 * chances[1]:.0f}"


def seeds_needed(seeds: SeedsNeeded | None) -> tuple[Cell, Cell]:
    """The seeds that would find the margin, and that would call a difference of 0 equivalent, each with its range.

    >>> [cell.text for cell in seeds_needed(SeedsNeeded(10, (8, 14), None, (90, None)))]
    ['10', 'out of reach']
    """
    if seeds is None:
        return Cell(NOTHING), Cell(NOTHING)
    find, equivalent = map(number_of_seeds, seeds.find_range), map(number_of_seeds, seeds.equivalent_range)
    return (
        ranged_seeds(number_of_seeds(seeds.find), *find),
        ranged_seeds(number_of_seeds(seeds.equivalent), *equivalent),
    )


def ranged_seeds(text: str, low: str, high: str) -> Cell:
    """A number of seeds with its range, unless all are one."""
    return Cell(text, ends=None if low == text == high else (low, high))


def number_of_seeds(seeds: int | None) -> str:
    """A number of seeds; None is one that no study has."""
    return OUT_OF_REACH if seeds is None else count(seeds)


OUT_OF_REACH = "out of reach"
"""What stands where no number of seeds is enough."""


def shares(budgets: Sequence[int]) -> str:
    """The label budgets of an area with their shares in it.

    >>> shares([10, 100, 1000])
    '10 25 %, 100 50 %, 1,000 25 %'
    """
    each = zip(budgets, weights(budgets), strict=True)
    return ", ".join(f"{count(budget)} {100 * share:.0f} %" for budget, share in each)


def same(table: Table, first: int) -> tuple[Table, str]:
    """(the table without the columns, from the `first`, that are the same in every row, the words on these columns).

    >>> table = Table("", ["Strategy", "p", "Pairs"], [[Cell("a"), Cell("0.1"), Cell("5")]])
    >>> same(table, 2)[1]
    ' Pairs: 5.'
    """
    full = [row for row in table.rows if len(row) == len(table.columns)]
    drop = [i for i in range(first, len(table.columns)) if len({row[i] for row in full}) == 1]
    text = "; ".join(f"{table.columns[i]}: {' '.join(filter(None, (full[0][i].text, full[0][i].below)))}" for i in drop)
    keep = [i for i in range(len(table.columns)) if i not in drop]
    rows = [[row[i] for i in keep] if row in full else row for row in table.rows]
    return table._replace(columns=[table.columns[i] for i in keep], rows=rows), f" {text}." if text else ""


def by_budget(comparisons: Sequence[Comparison], against: str) -> Table:
    """Differences from `against`: a row for each strategy, under its source and target, a column for each budget."""
    chosen = [comparison for comparison in comparisons if comparison.against == against]
    cells: dict[tuple[str, str], dict[Any, Cell]] = {}
    for comparison in chosen:
        row = cells.setdefault((place(comparison.source, comparison.target), comparison.strategy), {})
        row[comparison.budgets] = difference(comparison)
    budgets = sorted({comparison.budgets for comparison in chosen}, key=lambda each: (len(each), each))
    return _across(f"Differences from {against}", cells, {each: labels_of(each) for each in budgets})


def labels_of(budgets: Sequence[int]) -> str:
    """The numbers of labels of a comparison: one, or the least and the greatest."""
    low, high = min(budgets), max(budgets)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def _milestone_columns(metric: Metric) -> dict[str, tuple[str, Callable[[float], str]]]:
    """{key: (column, how its numbers are written)}."""
    points, unit = units.of_differences(metric), metric.unit
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "jump_start": (
            units.headed("Jump-start", points),
            lambda value: signed(units.factor(metric) * value, units.digits(metric)),
        ),
        "asymptote": (units.headed("End", unit), lambda value: units.shown(metric, value)),
        "time_to_threshold": ("Steps to threshold", count),
        "area": (units.headed("Area", unit), lambda value: units.shown(metric, value)),
        "examples_saved": ("Examples saved", count),
        "flops": ("FLOPs", lambda value: f"{value:.3g}"),
        "seconds": ("Time (s)", lambda value: f"{value:,.1f}"),
    }
    return columns


def milestones(rows: Sequence[Mapping[str, Any]], metric: Metric = ACCURACY) -> Table:
    """The milestones of targets of one metric, a row for each strategy and budget, under its source and target.

    None is written as a dash, and words as they are.
    """
    known = _milestone_columns(metric)
    keys = [key for key in known if any(key in row for row in rows)]
    grouped_rows = []
    for row in rows:
        numbers = [_milestone(row, key, known[key][1]) for key in keys]
        cells = [Cell(str(row["strategy"])), Cell(count(row["train_examples"])), *numbers]
        grouped_rows.append((place(row["source"], row["target"]), cells))
    columns = ["Strategy", "Labels", *(known[key][0] for key in keys)]
    return Table("Milestones", columns, grouped(grouped_rows))


def _milestone(row: Mapping[str, Any], key: str, form: Callable[[float], str]) -> Cell:
    """The cell of a milestone; below it stands the milestone with the source's cost."""
    whole = row.get(f"{key}_with_source")
    return Cell(_written(row.get(key), form), "" if whole is None else _written(whole, form))


def _written(value: Any, form: Callable[[float], str]) -> str:
    if value is None or isinstance(value, str):
        return value or NOTHING
    return form(value) if math.isfinite(value) else NOTHING


# Rankings

WORTH = ("tau", "weighted tau", "Pearson", "regret", "regret of 3", "over scratch", "behind")
"""The columns of what scores are judged by, in the order of `Judged`."""
IN_POINTS = ("regret", "regret of 3", "over scratch")
"""Those that are differences of the targets' metric."""


def worth(board: Board) -> Table:
    """The worth of scores for a page, a row each, the highest tau first; last, tau of the truth's halves."""
    table = worth_in_short(board)
    half = NOTHING if np.isnan(board.half) else f"{board.half:.2f}"
    halves = [Cell("the truth's own halves"), Cell(half), *([Cell(NOTHING)] * (len(WORTH) - 1))]
    columns = [column.capitalize() for column in table.columns]
    return Table(board.title, columns, [*table.rows, halves])


def worth_in_short(board: Board) -> Table:
    """The worth of scores for the console, a row each, the highest tau first."""
    factor, digits = units.factor(board.metric), units.digits(board.metric)
    forms = [(factor, digits) if column in IN_POINTS else (1.0, 2) for column in WORTH]
    rows = [
        [Cell(name), *(estimate(value, *form) for value, form in zip(board.judged[name], forms, strict=True))]
        for name in board.ordered()
    ]
    title = f"{board.strategy}, {board.budget}: {board.truths.shape[1]} sources, {board.which}"
    return Table(title, ["score", *WORTH], rows)


def estimate(value: Estimate, scale: float = 1.0, digits: int = 2) -> Cell:
    """A value with its interval, two decimals.

    >>> estimate(Estimate(0.5, 0.25, 0.75))
    Cell(text='0.50', words='', ends=('0.25', '0.75'))
    """
    if np.isnan(value.value):
        return Cell(NOTHING)
    number, low, high = (f"{scale * each:.{digits}f}".replace("-", "\N{MINUS SIGN}") for each in value)
    return Cell(number, ends=None if np.isnan(value.low) else (low, high))


# Parts


def grouped(rows: Iterable[tuple[str, Sequence[Cell]]]) -> list[Sequence[Cell]]:
    """The rows of (heading, row): rows of a heading stand together below it; an empty heading has no row."""
    members: dict[str, list[Sequence[Cell]]] = {}
    for heading, row in rows:
        members.setdefault(heading, [[Cell(heading)]] if heading else []).append(row)
    return [row for each in members.values() for row in each]


def place(source: Any, target: str) -> str:
    """The words for a source and a target."""
    return target if source is None else f"{source} to {target}"
