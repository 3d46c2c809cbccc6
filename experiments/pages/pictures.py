"""The report's pictures of fits of one target and budget: each a figure, and the text that stands for it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.pages import drawing
from experiments.pages.drawing import BLUE, GREY, Picture, Strokes
from tljax.study.results import Result
from tljax.study.summary import Curves, Members, ended


def mean_curve(members: Iterable[Result], curves: Curves, field: str) -> np.ndarray | None:
    """[4, segments]: step, mean, lowest and highest over the fits that ended, at the steps they share; or None."""
    found = [curves[row.name] for row in members if ended(row) and row.name in curves]
    tables = [dict(zip(np.asarray(c["step"]).tolist(), np.asarray(c[field], float), strict=True)) for c in found]
    steps = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
    if not steps:
        return None
    values = np.array([[table[step] for step in steps] for table in tables])
    values[~np.isfinite(values)] = np.nan  # a gap in the line
    return np.stack([np.array(steps, float), values.mean(0), values.min(0), values.max(0)])


def learning(members: Members, curves: Curves, field: str, where: str, strokes: Strokes) -> Picture | None:
    """One line a strategy, `field` ('accuracy' or 'train_loss') against step; None where nothing was recorded."""
    lines = {name: curve for name, rows in members.items() if (curve := mean_curve(rows, curves, field)) is not None}
    if not lines:
        return None
    percent = field == "accuracy"
    what = "accuracy" if percent else "training loss"
    unit = " %" if percent else " nats"
    figure, axes = drawing.charted(lines)
    ends = []
    for name, curve in lines.items():
        scaled = curve * np.array([[1], [100], [100], [100]]) if percent else curve
        drawing.line(axes, scaled, name, strokes[name], "o" if len(curve[0]) < 12 else "")
        if np.isfinite(scaled[1, -1]):
            ends.append(f"{name} {scaled[1, -1]:.{1 if percent else 3}f}{unit}")
    axes.set(xlabel="step", ylabel=f"{what} ({unit.strip()})")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawing.legend(figure)
    return figure, f"Line chart of {what} against step{where}. Mean at the last step: {', '.join(ends)}."


def by_class(members: Members, classes: Sequence[str], where: str) -> Picture | None:
    """Heat map of accuracy, strategy x class, mean over the seeds that count; None where nothing was measured."""
    found = {name: _known(rows, "per_class_accuracy") for name, rows in members.items()}
    means = {name: np.array(values, float).mean(0) for name, values in found.items() if values}
    if not means:
        return None
    table = 100 * np.array(list(means.values()))
    names = drawing.named(classes, table.shape[1])
    longest = max(map(len, drawing.short(names)))
    figure = drawing.canvas(7.6, 0.5 + 0.075 * longest + 0.15 * (len(table) + drawing.lines(means)))
    axes = figure.add_subplot()
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 100.0)
    drawing.heat(axes, table, low, max(high, low + 1))
    drawing.name_ticks(axes, names)
    axes.set_yticks(range(len(means)), [drawing.plain(name) for name in means])
    said = []
    for name, values in zip(means, table, strict=True):
        if np.isfinite(values).any():
            worst, best = int(np.nanargmin(values)), int(np.nanargmax(values))
            said.append(f"{name} from {values[worst]:.0f} % ({names[worst]}) to {values[best]:.0f} % ({names[best]})")
    return figure, f"Heat map of test accuracy in % by strategy and class{where}: {'; '.join(said)}."


def confusion(name: str, members: Sequence[Result], classes: Sequence[str], where: str) -> Picture | None:
    """Confusion matrix of a strategy in % of each true class, summed over the seeds that count; or None."""
    found = _known(members, "confusion")
    if not found:
        return None
    total = np.array(found).sum(0)
    names = drawing.named(classes, len(total))
    figure = drawing.canvas(3.7, 3.9)
    axes = figure.add_subplot()
    drawing.heat(axes, 100 * total / np.maximum(total.sum(1, keepdims=True), 1), 0, 100, blank=0.5)
    drawing.name_ticks(axes, names)
    axes.set_yticks(drawing.every(names), drawing.short(names))
    axes.set(xlabel="predicted", ylabel="true", aspect="equal", title=drawing.plain(name))
    wrong = total - np.diag(np.diag(total))
    true, predicted = np.unravel_index(int(wrong.argmax()), wrong.shape)
    worst = ""
    if wrong.any():
        worst = f"; most often {names[true]} was taken for {names[predicted]} ({wrong.max():,} times)"
    seeds = f"{len(found)} seed{'s' * (len(found) > 1)}"
    right = f"{np.trace(total):,} of {total.sum():,} predictions over {seeds} were right"
    return figure, f"Confusion matrix of {name}{where}: {right}{worst}."


def shares(parameters: Mapping[str, Sequence[tuple[str, int, int]]]) -> Picture | None:
    """A bar a strategy of its leaves (path, numbers, trained numbers): shares of the parameters; None for none."""
    if not parameters:
        return None
    figure = drawing.canvas(7.6, 0.9 + 0.15 * (len(parameters) + drawing.lines(parameters)))
    axes = figure.add_subplot()
    said = []
    for row, (name, leaves) in enumerate(parameters.items()):
        total = max(sum(size for _, size, _ in leaves), 1)
        trained, left = sum(part for _, _, part in leaves), 0.0
        for _, size, part in leaves:
            pieces = ((100 * part / total, BLUE), (100 * (size - part) / total, GREY))
            for width, colour in (piece for piece in pieces if piece[0]):
                axes.barh(row, width, left=left, color=colour, height=0.6)
                left += width
            # A leaf ends where the bar is cut; thinner than the smallest leaf that can be seen.
            axes.vlines(left, row - 0.3, row + 0.3, color="white", linewidth=0.6)
        axes.text(102, row, f"{trained:,} of {total:,}", va="center")
        which = ", ".join(leaf for leaf, _, part in leaves if part and leaf)
        said.append(f"{name} {100 * trained / total:.1f} % ({trained:,} of {total:,}{': ' if which else ''}{which})")
    axes.set_yticks(range(len(parameters)), [drawing.plain(name) for name in parameters])
    axes.set(xlim=(0, 100), xlabel="share of the parameters (%)")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.bar(0, 0, color=BLUE, label="trained")
    axes.bar(0, 0, color=GREY, label="frozen")
    figure.legend(loc="outside upper left", ncols=2)
    return figure, f"Bar chart of the share of the parameters that each strategy trains: {'; '.join(said)}."


def _known(members: Sequence[Result], field: str) -> list[Any]:
    """Of the fits that count, what was recorded."""
    return [value for row in members if ended(row) and (value := getattr(row, field)) is not None]
