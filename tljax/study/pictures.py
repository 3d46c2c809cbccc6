"""The report's pictures: each a pair of an SVG, as a data URI, and the text that stands for it."""

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tljax.study.summary import Row, counts

Picture = tuple[str, str]
"""(data URI of an SVG, alternative text)."""

Curves = Mapping[str, Mapping[str, Any]]
"""Name of a fit -> step, train_loss, accuracy, each [segments]."""

INK, GREY, BLUE = "#222222", "#d9d9d9", "#0072B2"
COLOURS = (BLUE, "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, less yellow (too pale) and black (which is scratch)."""
DASHES = ("-", "--", "-.", ":")

STYLE = {
    "svg.hashsalt": "tljax",  # equal input gives equal bytes
    "svg.fonttype": "none",
    "text.parse_math": False,  # a '$' in a name is a '$'
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}
MOST_CLASSES = 20
"""Above this, cells carry no numbers and only some classes are named."""


def strokes(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash for each strategy, the same in every picture; scratch is dark and dashed."""
    others = [label for label in dict.fromkeys(labels) if label != "scratch"]
    chosen = {
        label: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, label in enumerate(others)
    }
    return {"scratch": (INK, "--"), **chosen}


def mean_curve(members: Iterable[Row], curves: Curves, field: str) -> np.ndarray | None:
    """[4, segments]: step, mean, lowest and highest over the fits that count, at the steps they share; or None."""
    found = [curves[row["name"]] for row in members if counts(row) and row.get("name") in curves]
    tables = [dict(zip(np.asarray(c["step"]).tolist(), np.asarray(c[field], float), strict=True)) for c in found]
    steps = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
    if not steps:
        return None
    values = np.array([[table[step] for step in steps] for table in tables])
    values[~np.isfinite(values)] = np.nan  # a gap in the line
    return np.stack([np.array(steps, float), values.mean(0), values.min(0), values.max(0)])


def learning(
    members: Mapping[str, Sequence[Row]], curves: Curves, field: str, where: str, strokes: Mapping[str, Any]
) -> Picture | None:
    """One line a strategy, `field` ('accuracy' or 'train_loss') against step; None where nothing was recorded."""
    lines = {name: curve for name, rows in members.items() if (curve := mean_curve(rows, curves, field)) is not None}
    if not lines:
        return None
    percent = field == "accuracy"
    what = "accuracy" if percent else "training loss"
    unit = " %" if percent else " nats"
    figure = _figure(4.6, 3.2 + 0.09 * _lines(lines))
    axes = figure.add_subplot()
    ends = []
    for name, curve in lines.items():
        step, mean, low, high = curve * np.array([[1], [100], [100], [100]]) if percent else curve
        colour, dash = strokes[name]
        marker = "o" if len(step) < 12 else ""
        axes.plot(step, mean, color=colour, linestyle=dash, marker=marker, markersize=2.5, label=_plain(name))
        axes.fill_between(step, low, high, color=colour, alpha=0.16, linewidth=0)
        if np.isfinite(mean[-1]):
            ends.append(f"{name} {mean[-1]:.{1 if percent else 3}f}{unit}")
    axes.set(xlabel="step", ylabel=f"{what} ({unit.strip()})")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    return _svg(figure), f"Line chart of {what} against step{where}. Mean at the last step: {', '.join(ends)}."


def by_class(members: Mapping[str, Sequence[Row]], classes: Sequence[str], where: str) -> Picture | None:
    """Heat map of accuracy, strategy x class, mean over the seeds that count; None where nothing was measured."""
    found = {name: _known(rows, "per_class_accuracy") for name, rows in members.items()}
    means = {name: np.array(values, float).mean(0) for name, values in found.items() if values}
    if not means:
        return None
    table = 100 * np.array(list(means.values()))
    names = _names(classes, table.shape[1])
    figure = _figure(7.6, 0.5 + 0.075 * max(map(len, _short(names))) + 0.15 * (len(table) + _lines(means)))
    axes = figure.add_subplot()
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 100.0)
    _heat(axes, table, low, max(high, low + 1))
    _name_ticks(axes, names)
    axes.set_yticks(range(len(means)), [_plain(name) for name in means])
    said = []
    for name, values in zip(means, table, strict=True):
        if np.isfinite(values).any():
            worst, best = int(np.nanargmin(values)), int(np.nanargmax(values))
            said.append(f"{name} from {values[worst]:.0f} % ({names[worst]}) to {values[best]:.0f} % ({names[best]})")
    return _svg(figure), f"Heat map of test accuracy in % by strategy and class{where}: {'; '.join(said)}."


def confusion(name: str, members: Sequence[Row], classes: Sequence[str], where: str) -> Picture | None:
    """Confusion matrix of a strategy in % of each true class, summed over the seeds that count; or None."""
    found = _known(members, "confusion")
    if not found:
        return None
    total = np.array(found).sum(0)
    names = _names(classes, len(total))
    figure = _figure(3.7, 3.9)
    axes = figure.add_subplot()
    _heat(axes, 100 * total / np.maximum(total.sum(1, keepdims=True), 1), 0, 100, blank=0.5)
    _name_ticks(axes, names)
    axes.set_yticks(_every(names), _short(names))
    axes.set(xlabel="predicted", ylabel="true", aspect="equal")
    axes.set_title(_plain(name), fontsize=9.5, loc="left")
    wrong = total - np.diag(np.diag(total))
    true, predicted = np.unravel_index(int(wrong.argmax()), wrong.shape)
    worst = ""
    if wrong.any():
        worst = f"; most often {names[true]} was taken for {names[predicted]} ({wrong.max():,} times)"
    seeds = f"{len(found)} seed{'s' * (len(found) > 1)}"
    right = f"{np.trace(total):,} of {total.sum():,} predictions over {seeds} were right"
    return _svg(figure), f"Confusion matrix of {name}{where}: {right}{worst}."


def shares(parameters: Mapping[str, Sequence[tuple[str, int, int]]]) -> Picture | None:
    """A bar a strategy of its leaves (path, numbers, trained numbers): shares of the parameters; None for none."""
    if not parameters:
        return None
    figure = _figure(7.6, 0.9 + 0.15 * (len(parameters) + _lines(parameters)))
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
    axes.set_yticks(range(len(parameters)), [_plain(name) for name in parameters])
    axes.set(xlim=(0, 100), xlabel="share of the parameters (%)")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.bar(0, 0, color=BLUE, label="trained")
    axes.bar(0, 0, color=GREY, label="frozen")
    figure.legend(loc="outside upper left", ncols=2, fontsize=8.5)
    return _svg(figure), f"Bar chart of the share of the parameters that each strategy trains: {'; '.join(said)}."


def _known(members: Sequence[Row], field: str) -> list[Any]:
    """Of the fits that count, what was recorded."""
    return [row[field] for row in members if counts(row) and row.get(field) is not None]


def _figure(width: float, height: float) -> Figure:
    """Inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _svg(figure: Figure) -> str:
    """A data URI; fonts are the reader's, and measured with a wider one, so that nothing overlaps."""
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    text = file.getvalue().replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif")
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def _plain(name: str, lines: int = 3, width: int = 30) -> str:
    """What SVG can hold, without control characters; broken after a colon where it can be, and cut after `lines`."""
    printable = "".join(c if c.isprintable() else " " for c in name)
    found = textwrap.wrap(printable.replace(":", ": "), width)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "\N{HORIZONTAL ELLIPSIS}"]
    return "\n".join(found).replace(": ", ":")


def _lines(names: Iterable[str]) -> int:
    """How many lines the names take, one below the other."""
    return sum(_plain(name).count("\n") + 1 for name in names)


def _names(classes: Sequence[str], n: int) -> list[str]:
    """The classes' names, or their numbers where the names are of another data set."""
    return [str(c) for c in classes] if len(classes) == n else [str(i) for i in range(n)]


def _every(names: Sequence[str]) -> range:
    """The classes that are named on an axis."""
    return range(0, len(names), -(-len(names) // MOST_CLASSES))


def _short(names: Sequence[str]) -> list[str]:
    """Those classes' names, a line each."""
    return [_plain(names[i], lines=1, width=20) for i in _every(names)]


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(_every(names), _short(names), rotation=45, ha="right", rotation_mode="anchor")


def _heat(axes: Axes, table: np.ndarray, low: float, high: float, blank: float = -1.0) -> None:
    """Cells in %, with their numbers (above `blank`) where they can be read."""
    axes.imshow(table, cmap=matplotlib.colormaps["Blues"], vmin=low, vmax=high, aspect="auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if table.shape[1] > MOST_CLASSES:
        return
    for (row, column), value in np.ndenumerate(table):
        if not value <= blank:  # NaN too has a text
            text = f"{value:.0f}" if np.isfinite(value) else "\N{EN DASH}"
            colour = "white" if value > low + 0.6 * (high - low) else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5, in_layout=False)
