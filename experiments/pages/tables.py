"""The tables of the reports as data, which the page, the console, Markdown and LaTeX write alike.

The console has fewer columns than the page, of the same cells: `results` and `results_in_short`, `verdicts` and
`verdicts_in_short`. Accuracies and their differences are in % and points with two decimals.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.console import Cell, Table
from tljax.study import statistics
from tljax.study.ranking import Board, Estimate
from tljax.study.results import Result
from tljax.study.summary import Spread, Summary, accuracy, counts, ended, finite, label, spread
from tljax.study.verdicts import Comparison, base_of, weights

# Numbers

NOTHING = "\N{EN DASH}"


def percent(fraction: float) -> str:
    """A fraction in %, two decimals."""
    return f"{100 * fraction:.2f}"


def signed(points: float) -> str:
    """A difference in points, two decimals, with its sign even at 0.00, so that it agrees with its verdict.

    >>> signed(0.001), signed(float("nan")) == NOTHING
    ('+0.00', True)
    """
    return NOTHING if not math.isfinite(points) else f"{points:+.2f}".replace("-", "\N{MINUS SIGN}")


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


def difference(comparison: Comparison) -> Cell:
    """The difference of a comparison in points, with its interval."""
    interval = (comparison.mean, comparison.low, comparison.high)
    return ranged(interval, lambda fraction: signed(100 * fraction))


# Fits

FROM_SCRATCH = "Difference from scratch (points)"


def results(groups: Sequence[Summary], where: str) -> Table:
    """The results for a page, a row for each strategy; `where` names their target and budget."""
    columns = ["Strategy", "Test accuracy (%)", FROM_SCRATCH, "Test loss (nats)", "Calibration error"]
    columns += ["Trained parameters", "Steps", "Time (s)", "Peak memory (MB)"]
    names = ("accuracy", "gain", "loss", "calibration", "trained", "steps", "seconds", "peak")
    return _of_groups(f"Results, {where}" if where else "Results", groups, columns, names)


def results_in_short(title: str, groups: Sequence[Summary], narrow: bool = False) -> Table:
    """The results for the console, a row for each strategy and label budget.

    A narrow table leaves out columns, which results.jsonl has.
    """
    columns = ["strategy", "labels", "seeds", "test accuracy %", "against scratch", "trained"]
    names = ["accuracy", "gain", "trained"]
    if not narrow:
        columns += ["loss (nats)", "steps", "seconds"]
        names += ["loss", "steps", "seconds"]
    rows = []
    for group in groups:
        cells = _cells(group)
        runs = f"{group.seeds}" + (f" ({group.diverged} diverged)" if group.diverged else "")
        about = [Cell(group.name), Cell(count(group.train_examples)), Cell(runs)]
        rows.append([*about, *(cells[name]._replace(words="") for name in names)])
    return Table(title, columns, rows)


def sources(groups: Sequence[Summary]) -> Table:
    """The sources, a row each; `groups` are those of `summary.sources`."""
    named = [
        replace(group, name=f"{group.target}, {count(group.train_examples)} training examples") for group in groups
    ]
    columns = [
        "Source",
        "Test accuracy (%)",
        "Test loss (nats)",
        "Calibration error",
        "Parameters",
        "Steps",
        "Time (s)",
        "Peak memory (MB)",
    ]
    names = ("accuracy", "loss", "calibration", "total", "steps", "seconds", "peak")
    return _of_groups("Sources", named, columns, names)


def source_fits(name: str, folder: Path, fits: Mapping[int, Result]) -> Table:
    """The fits that trained one source, a row for each seed, for the console; `folder` is their run directory."""
    rows = []
    for seed, fit in fits.items():
        accuracy = "diverged" if fit.test_accuracy is None else percent(fit.test_accuracy)
        loss = NOTHING if fit.test_loss is None else f"{fit.test_loss:.3f}"
        rows.append(list(map(Cell, (str(seed), accuracy, loss, count(fit.steps), str(folder / fit.checkpoint)))))
    return Table(name, ["seed", "test accuracy %", "loss (nats)", "steps", "checkpoint"], rows)


def _of_groups(title: str, groups: Sequence[Summary], columns: Sequence[str], names: Sequence[str]) -> Table:
    """The groups, a row each: the name, with the note of `state` below it, and the cells of these names."""
    rows = []
    for group in groups:
        cells = _cells(group)
        rows.append([Cell(group.name, state(group)), *(cells[name] for name in names)])
    return Table(title, columns, rows)


def _cells(group: Summary) -> dict[str, Cell]:
    """All cells of a strategy; a mean over two seeds or more has its range."""
    trained, total = group.trained_parameters, group.total_parameters
    share = f"{100 * trained / total:.1f} %" if trained is not None and total else ""
    diverged = group.diverged and group.diverged == group.seeds and group.accuracy is None
    several = group.counted > 1
    return {
        "accuracy": Cell("diverged") if diverged else ranged(group.accuracy, percent, several),
        "gain": ranged(group.gain, signed, group.gain_seeds > 1),
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
    texts = []
    unmeasured = group.seeds - group.counted - (group.diverged if group.counts_as is None else 0)
    if group.counted < group.seeds:
        texts.append(f"{group.counted} of {group.seeds} seeds")
    if group.diverged:
        texts.append(diverged(group.diverged, group.seeds, group.counts_as))
    if unmeasured:
        texts.append(f"{unmeasured} not measured")
    if 0 < group.gain_seeds < group.counted:
        texts.append(f"difference over {group.gain_seeds} of {group.counted} seeds")
    return ", ".join(texts)


def diverged(number: int, fits: int, counts_as: float | None) -> str:
    """The note on the fits that diverged: how many of all, and the accuracy that they count with.

    >>> diverged(2, 5, 0.1)
    '2 of 5 fits diverged and count as 10.0 %'
    """
    if counts_as is None:
        return f"{number} diverged"
    return f"{number} of {fits} fits diverged and count as {100 * counts_as:.1f} %"


def accuracies(fits: Sequence[Result], target: str) -> Table:
    """Mean test accuracies over the fits that count, a row for each strategy under its source, a column a budget."""
    members: dict[tuple[str, str], dict[int, list[Result]]] = {}
    for fit in fits:
        source = None if fit.strategy == "scratch" else fit.source
        where = "" if source is None else f"from {source}"
        members.setdefault((where, label(fit)), {}).setdefault(fit.train_examples, []).append(fit)
    budgets = sorted({fit.train_examples for fit in fits}, key=lambda budget: budget or 0)
    cells = {key: {budget: _accuracy(each) for budget, each in known.items()} for key, known in members.items()}
    return _across(f"Test accuracy on {target} (%)", cells, {budget: count(budget) for budget in budgets})


def _accuracy(fits: Sequence[Result]) -> Cell:
    """The mean test accuracy; its range over seeds, or of a single fit Wilson's 95 % interval over test examples."""
    counted = [fit for fit in fits if counts(fit)]
    values = spread(accuracy(fit) for fit in counted)
    if values is None:
        return Cell("diverged" if all(fit.diverged for fit in fits) else NOTHING)
    items = sum(map(sum, counted[0].confusion or ()))
    if len(counted) == 1 and items and ended(counted[0]):
        values = (values[0], *statistics.wilson(round(values[0] * items), items))
    return ranged(values, percent, len(counted) > 1 or items > 0)


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
    "open": "by what of the margin is open",
}
"""{size of a difference: its words}: how a difference compares with the margin."""


def verdicts(family: Sequence[Comparison]) -> Table:
    """The verdicts for a page: a row for each comparison of the family, under its source and target."""
    from_base = f"Difference from {base_of(family)} (points)"
    power = ["Power (%)", "Power to call equivalent (%)"]
    numbers = [from_base, "p, adjusted", *power, "Margin (points)", "Labels", "Pairs of fits", "Test examples"]
    rows = []
    for comparison in family:
        word, groups = comparison.word, comparison.groups
        cells = [
            Cell(comparison.strategy, f"equals {comparison.equals}" if comparison.equals else ""),
            Cell(word or NOTHING, SIZES.get(comparison.size, "") if word in ("positive", "negative") else ""),
            difference(comparison),
            Cell(chance(comparison.p) if word else NOTHING),
            Cell(between(comparison.power)),
            Cell(between(comparison.power_equivalent)),
            Cell(f"{100 * comparison.margin:.2f}"),
            Cell(_labels(comparison.budgets)),
            Cell(count(comparison.fits)),
            Cell(count(comparison.items), "" if groups is None else f"in {count(groups)} groups"),
        ]
        rows.append((place(comparison.source, comparison.target), cells))
    return Table("Verdicts", ["Strategy", "Verdict", *numbers], grouped(rows), 2)


def verdicts_in_short(title: str, family: Sequence[Comparison]) -> Table:
    """The verdicts for the console: a row for each comparison of the family."""
    rows = []
    for comparison in family:
        word, size, power = comparison.word or NOTHING, comparison.size or NOTHING, comparison.power
        chances = NOTHING if power is None else f"{power[0]:.2f} to {power[1]:.2f}"
        p = chance(comparison.p) if comparison.word else NOTHING
        rows.append([*_compared(comparison), *map(Cell, (word, size, chances, p))])
    return Table(title, [*_COMPARED, "verdict", "size", "power", "p, adjusted"], rows)


def singly(title: str, comparisons: Sequence[Comparison]) -> Table:
    """The comparisons that are not judged, for the console; with McNemar's p if there is one pair of fits."""
    rows = [[*_compared(comparison), Cell(chance(comparison.p))] for comparison in comparisons]
    return Table(title, [*_COMPARED, "p of the one pair"], rows)


_COMPARED = ("strategy", "source", "target", "labels", "pairs", "points", "interval")


def _compared(comparison: Comparison) -> list[Cell]:
    """The cells under `_COMPARED`."""
    points, _, ends = difference(comparison)
    interval = f"[{ends[0]}, {ends[1]}]" if ends else NOTHING
    about = (comparison.strategy, comparison.source or NOTHING, comparison.target)
    return list(map(Cell, (*about, _labels(comparison.budgets), count(comparison.fits), points, interval)))


def between(chances: tuple[float, float] | None) -> str:
    """A range of probabilities, in %.

    >>> between((0.052, 0.54))
    '5 to 54'
    """
    return NOTHING if chances is None else f"{100 * chances[0]:.0f} to {100 * chances[1]:.0f}"


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
    return _across(f"Differences from {against}", cells, {each: _labels(each) for each in budgets})


def _labels(budgets: Sequence[int]) -> str:
    low, high = min(budgets), max(budgets)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


MILESTONES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "jump_start": ("Jump-start (points)", lambda value: signed(100 * value)),
    "asymptote": ("Asymptote (%)", percent),
    "time_to_threshold": ("Steps to threshold", count),
    "area": ("Area (%)", percent),
    "examples_saved": ("Examples saved", count),
    "flops": ("FLOPs", lambda value: f"{value:.3g}"),
    "seconds": ("Time (s)", lambda value: f"{value:,.1f}"),
}
"""{key: (column, how its numbers are written)}."""


def milestones(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The milestones, a row for each strategy and budget, under its source and target.

    None is written as a dash, and words as they are.
    """
    keys = [key for key in MILESTONES if any(key in row for row in rows)]
    grouped_rows = []
    for row in rows:
        numbers = [_milestone(row, key, MILESTONES[key][1]) for key in keys]
        cells = [Cell(str(row["strategy"])), Cell(count(row["train_examples"])), *numbers]
        grouped_rows.append((place(row["source"], row["target"]), cells))
    columns = ["Strategy", "Labels", *(MILESTONES[key][0] for key in keys)]
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

WORTH = {
    **{"tau": 1, "weighted tau": 1, "Pearson": 1},
    **{"regret": 100, "regret of 3": 100, "over scratch": 100},
    "behind": 1,
}
"""{column: factor} of what scores are judged by, in the order of `Judged`; the factor turns accuracies into points."""


def worth(board: Board) -> Table:
    """The worth of scores for a page, a row each, the highest tau first; last, tau of the truth's halves."""
    table = worth_in_short(board)
    half = NOTHING if np.isnan(board.half) else f"{board.half:.2f}"
    halves = [Cell("the truth's own halves"), Cell(half), *([Cell(NOTHING)] * (len(WORTH) - 1))]
    columns = [column.capitalize() for column in table.columns]
    return Table(board.title, columns, [*table.rows, halves])


def worth_in_short(board: Board) -> Table:
    """The worth of scores for the console, a row each, the highest tau first."""
    rows = [[Cell(name), *map(estimate, board.judged[name], WORTH.values())] for name in board.ordered()]
    title = f"{board.strategy}, {board.budget}: {board.truths.shape[1]} sources, {board.which}"
    return Table(title, ["score", *WORTH], rows)


def estimate(value: Estimate, scale: float = 1.0) -> Cell:
    """A value with its interval, two decimals.

    >>> estimate(Estimate(0.5, 0.25, 0.75))
    Cell(text='0.50', words='', ends=('0.25', '0.75'))
    """
    if np.isnan(value.value):
        return Cell(NOTHING)
    number, low, high = (f"{scale * each:.2f}".replace("-", "\N{MINUS SIGN}") for each in value)
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
