"""The report's tables and numbers as text, the same on its page and in its exports."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tljax.study import statistics
from tljax.study.results import Result
from tljax.study.summary import Spread, Summary, accuracy, counts, ended, finite, label, spread
from tljax.study.verdicts import Comparison, base_of, weights

Cell = tuple[str, str]
"""What it says, and what is said below it in small, or ''."""

NOTHING = "\N{EN DASH}"
FROM_SCRATCH = "Difference from scratch (points)"


class Table(NamedTuple):
    """Rows under columns; the first `words` columns are words, the others numbers; a row of one cell heads others."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


def results(groups: Sequence[Summary], where: str) -> Table:
    """A row a strategy."""
    columns = ["Strategy", "Test accuracy (%)", FROM_SCRATCH, "Test loss (nats)", "Calibration error"]
    names = ("accuracy", "gain", "loss", "calibration", "trained", "steps", "seconds")
    return _cells(groups, f"Results, {where}" if where else "Results", [*columns, "Trained parameters"], names)


def sources(groups: Sequence[Summary]) -> Table:
    """A row a source; `groups` are those of `summary.sources`."""
    named = [
        replace(group, name=f"{group.target}, {count(group.train_examples)} training examples") for group in groups
    ]
    columns = ["Source", "Test accuracy (%)", "Test loss (nats)", "Calibration error", "Parameters"]
    return _cells(named, "Sources", columns, ("accuracy", "loss", "calibration", "total", "steps", "seconds"))


def _cells(groups: Sequence[Summary], where: str, columns: list[str], names: Sequence[str]) -> Table:
    rows = []
    for group in groups:
        cells = _group(group)
        rows.append([(group.name, state(group)), *(cells[name] for name in names)])
    return Table(where, [*columns, "Steps", "Time (s)"], rows)


def _group(group: Summary) -> dict[str, Cell]:
    """Every cell of a strategy; below a mean, over two seeds or more, the range."""
    trained, total = group.trained_parameters, group.total_parameters
    share = f"{100 * trained / total:.1f} %" if trained is not None and total else ""
    diverged = group.diverged and group.diverged == group.seeds and group.accuracy is None
    several = group.counted > 1
    return {
        "accuracy": ("diverged", "") if diverged else ranged(group.accuracy, points, several),
        "gain": ranged(group.gain, signed, group.gain_seeds > 1),
        "loss": ranged(group.test_loss, "{:.3f}".format, several),
        "calibration": ranged(group.calibration_error, "{:.3f}".format, several),
        "trained": (count(trained), share),
        "total": (count(total), ""),
        "steps": (count(group.steps), ""),
        "seconds": (NOTHING if group.seconds is None else f"{group.seconds:,.1f}", ""),
    }


def state(group: Summary) -> str:
    """What of the means was not measured: diverged and unmeasured fits, seeds without a fit from scratch; or ''."""
    said = []
    unmeasured = group.seeds - group.counted - (group.diverged if group.counts_as is None else 0)
    if group.counted < group.seeds:
        said.append(f"{group.counted} of {group.seeds} seeds")
    if group.diverged:
        said.append(diverged(group.diverged, group.seeds, group.counts_as))
    if unmeasured:
        said.append(f"{unmeasured} not measured")
    if 0 < group.gain_seeds < group.counted:
        said.append(f"difference over {group.gain_seeds} of {group.counted} seeds")
    return ", ".join(said)


def diverged(fits: int, of: int, counts_as: float | None) -> str:
    """What is said of fits that diverged: how many, and the accuracy that they count with.

    >>> diverged(2, 5, 0.1)
    '2 of 5 fits diverged and count as 10.0 %'
    """
    return (
        f"{fits} diverged" if counts_as is None else f"{fits} of {of} fits diverged and count as {points(counts_as)} %"
    )


SIZES = {
    "beyond": "by more than the margin",
    "within": "by less than the margin",
    "open": "by what of the margin is open",
}
"""Of a difference that is there: how it stands to the margin."""


def verdicts(family: Sequence[Comparison]) -> Table:
    """A row a comparison of the family, with its verdict and its size, under its source and target."""
    from_base = f"Difference from {base_of(family)} (points)"
    power = ["Power (%)", "Power to call equivalent (%)"]
    numbers = [from_base, "p, adjusted", *power, "Margin (points)", "Labels", "Pairs of fits", "Test examples"]
    rows = [
        (
            place(one.source, one.target),
            [
                (one.strategy, f"equals {one.equals}" if one.equals else ""),
                (one.word or NOTHING, SIZES.get(one.size, "") if one.word in ("positive", "negative") else ""),
                difference(one),
                (chance(one.p) if one.word else NOTHING, ""),
                (between(one.power), ""),
                (between(one.power_equivalent), ""),
                (f"{100 * one.margin:.2f}", ""),
                (_labels(one.budgets), ""),
                (count(one.fits), ""),
                (count(one.items), "" if one.groups is None else f"in {count(one.groups)} groups"),
            ],
        )
        for one in family
    ]
    return Table("Verdicts", ["Strategy", "Verdict", *numbers], grouped(rows), 2)


def between(chances: tuple[float, float] | None) -> str:
    """Probabilities from and to, in %.

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
    """The table without those columns, from the `first`, that say the same in every row; and what they say.

    >>> table = Table("", ["Strategy", "p", "Pairs"], [[("a", ""), ("0.1", ""), ("5", "")]])
    >>> same(table, 2)[1]
    ' Pairs: 5.'
    """
    full = [row for row in table.rows if len(row) == len(table.columns)]
    drop = [i for i in range(first, len(table.columns)) if len({row[i] for row in full}) == 1]
    text = "; ".join(f"{table.columns[i]}: {' '.join(filter(None, full[0][i]))}" for i in drop)
    kept = [i for i in range(len(table.columns)) if i not in drop]
    rows = [[row[i] for i in kept] if row in full else row for row in table.rows]
    return table._replace(columns=[table.columns[i] for i in kept], rows=rows), f" {text}." if text else ""


def by_budget(comparisons: Sequence[Comparison], against: str) -> Table:
    """A row a strategy, under its source and target, a column a budget: differences from what they are against."""
    chosen = [one for one in comparisons if one.against == against]
    found: dict[tuple[str, str], dict[Any, Cell]] = {}
    for one in chosen:
        found.setdefault((place(one.source, one.target), one.strategy), {})[one.budgets] = difference(one)
    budgets = sorted({one.budgets for one in chosen}, key=lambda each: (len(each), each))
    return _across(f"Differences from {against}", found, {each: _labels(each) for each in budgets})


def accuracies(rows: Sequence[Result], target: str) -> Table:
    """A row a strategy, under its source, a column a budget: mean test accuracy over the fits that count."""
    found: dict[tuple[str, str], dict[Any, list[Result]]] = {}
    for row in rows:
        source = None if row.strategy == "scratch" else row.source
        where = "" if source is None else f"from {source}"
        found.setdefault((where, label(row)), {}).setdefault(row.train_examples, []).append(row)
    budgets = sorted({row.train_examples for row in rows}, key=lambda budget: budget or 0)
    cells = {key: {budget: _accuracy(fits) for budget, fits in of.items()} for key, of in found.items()}
    return _across(f"Test accuracy on {target} (%)", cells, {budget: count(budget) for budget in budgets})


MILESTONES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "jump_start": ("Jump-start (points)", lambda value: finer(value)),
    "asymptote": ("Asymptote (%)", lambda value: f"{100 * value:.2f}"),
    "time_to_threshold": ("Steps to threshold", lambda value: count(value)),
    "area": ("Area (%)", lambda value: f"{100 * value:.2f}"),
    "examples_saved": ("Examples saved", lambda value: count(value)),
    "flops": ("FLOPs", lambda value: f"{value:.3g}"),
    "seconds": ("Time (s)", lambda value: f"{value:,.1f}"),
}
"""Key -> its column, and how its numbers are written."""


def milestones(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row a strategy and budget, under its source and target; what is None is a dash, what is words stays so."""
    keys = [key for key in MILESTONES if any(key in one for one in found)]
    rows = []
    for one in found:
        numbers = [_milestone(one, key, MILESTONES[key][1]) for key in keys]
        cells = [(str(one["strategy"]), ""), (count(one["train_examples"]), ""), *numbers]
        rows.append((place(one["source"], one["target"]), cells))
    return Table("Milestones", ["Strategy", "Labels", *(MILESTONES[key][0] for key in keys)], grouped(rows))


def grouped(rows: Iterable[tuple[str, Sequence[Cell]]]) -> list[Sequence[Cell]]:
    """(heading, row) to rows: those of one heading together, below it; none where it is ''."""
    found: dict[str, list[Sequence[Cell]]] = {}
    for heading, row in rows:
        found.setdefault(heading, [[(heading, "")]] if heading else []).append(row)
    return [row for members in found.values() for row in members]


def place(source: Any, target: str) -> str:
    """A source and a target as words."""
    return target if source is None else f"{source} to {target}"


def difference(one: Comparison) -> Cell:
    """In points, the interval below."""
    return ranged((one.mean, one.low, one.high), finer)


def ranged(of: Spread | None, form: Callable[[float], str], several: bool = True) -> Cell:
    """A mean, and where there are `several` values their range or interval below; a dash for none.

    >>> ranged((0.5, 0.25, 0.75), points)
    ('50.0', '25.0 to 75.0')
    """
    if of is None:
        return NOTHING, ""
    mean, low, high = map(form, of)
    return mean, f"{low} to {high}" if several else ""


def finer(fraction: float) -> str:
    """A difference in points, with its sign whatever it is rounded to, so that it agrees with its verdict.

    >>> finer(0.00001)
    '+0.00'
    """
    return NOTHING if not math.isfinite(fraction) else f"{100 * fraction:+.2f}".replace("-", "\N{MINUS SIGN}")


def chance(p: float | None) -> str:
    """A p value, three decimals.

    >>> chance(0.0004)
    '< 0.001'
    """
    return NOTHING if p is None or not finite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def points(fraction: float) -> str:
    """A fraction in %."""
    return f"{100 * fraction:.1f}"


def signed(value: float) -> str:
    """A typographer's minus; no sign on zero."""
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def count(value: float | None) -> str:
    """A whole number with commas."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _accuracy(fits: Sequence[Result]) -> Cell:
    counted = [row for row in fits if counts(row)]
    known = spread(accuracy(row) for row in counted)
    if known is None:
        return ("diverged" if all(row.diverged for row in fits) else NOTHING), ""
    items = sum(map(sum, counted[0].confusion or ()))
    if len(counted) == 1 and items and ended(counted[0]):
        known = (known[0], *statistics.wilson(round(known[0] * items), items))
    return ranged(known, points, len(counted) > 1 or items > 0)


def _across(title: str, found: Mapping[tuple[str, str], Mapping[Any, Cell]], budgets: Mapping[Any, str]) -> Table:
    """A row a strategy, under its heading, and a column a budget: {(heading, strategy): {budget: cell}}."""
    rows = [
        (heading, [(name, ""), *(cells.get(budget, (NOTHING, "")) for budget in budgets)])
        for (heading, name), cells in found.items()
    ]
    return Table(title, ["Strategy", *(f"{text} labels" for text in budgets.values())], grouped(rows))


def _labels(budgets: Sequence[int]) -> str:
    return f"{count(min(budgets))} to {count(max(budgets))}" if len(budgets) > 1 else count(budgets[0])


def _milestone(one: Mapping[str, Any], key: str, form: Callable[[float], str]) -> Cell:
    """A number, and what it is with the source's below."""
    whole = one.get(f"{key}_with_source")
    return _written(one.get(key), form), "" if whole is None else _written(whole, form)


def _written(value: Any, form: Callable[[float], str]) -> str:
    if value is None or isinstance(value, str):
        return value or NOTHING
    return form(value) if math.isfinite(value) else NOTHING
