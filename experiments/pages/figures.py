"""Every picture of every report: learning curves, accuracy against labels and costs, verdicts, confusion, searches.

Each function gives a figure and the text that stands for it, or None where there is nothing to draw. `members` are fits
by strategy; `where` names their source, target and budget; lines and points are means over seeds, bands and bars their
range. Style and what figures share come first, then figures of training, of strategies compared, of their costs, of
searches and of rankings.
"""

import base64
import contextlib
import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.pages.tables import SIZES, place
from tljax import files, paths
from tljax.study import results as of_results
from tljax.study import units
from tljax.study.range_test import Suggestion
from tljax.study.ranking import Board
from tljax.study.results import Result
from tljax.study.search import TrialRecord
from tljax.study.summary import Curves, Members, Spread, along, counted_score, counts, ended, finite, spread
from tljax.study.units import ACCURACY
from tljax.study.verdicts import Comparison, base_of
from tljax.types import Metric

Picture = tuple[Figure, str]
"""(figure, alternative text)."""

Strokes = Mapping[str, tuple[str, str]]
"""Strategy -> (colour, dash)."""

INK, GREY, BLUE = "#222222", "#d9d9d9", "#0072B2"
COLOURS = (BLUE, "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, less yellow (too pale) and black (which is scratch)."""
DASHES = {"-": "o", "--": "s", "-.": "^", ":": "D"}
"""Each with the marker that stands for it where there is no line."""

STYLE = {
    "svg.hashsalt": "tljax",  # equal input gives equal bytes
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # letters that can be selected
    "text.parse_math": False,  # a '$' in a name is a '$'
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
MOST_CLASSES = 20
"""Above this, cells carry no numbers and only some classes are named."""


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The context in which figures are made and written."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts draw the text, not matplotlib's
        yield


def svg(figure: Figure) -> str:
    """The figure as a data URI; fonts are the reader's, and measured with a wider one, so that nothing overlaps."""
    text = (
        _saved(figure, "svg", ("Date", "Creator"))
        .decode()
        .replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif")
    )
    return "data:image/svg+xml;base64," + base64.b64encode(files.to_bytes(text)).decode()


def pdf(figure: Figure) -> bytes:
    """The figure as PDF, a page of its size."""
    return _saved(figure, "pdf", ("CreationDate", "Creator", "Producer"))


def _saved(figure: Figure, kind: str, without: Sequence[str]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=200, metadata=dict.fromkeys(without))
    figure.set_layout_engine("none")  # a second layout would start from the first, and end a little beside it
    return file.getvalue()


def strokes(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash for each strategy, the same in every picture; scratch is dark and dashed."""
    others = [name for name in dict.fromkeys(names) if name != "scratch"]
    dashes = list(DASHES)
    strokes_of_others = {
        name: (COLOURS[i % len(COLOURS)], dashes[i // len(COLOURS) % len(dashes)]) for i, name in enumerate(others)
    }
    return {"scratch": (INK, "--"), **strokes_of_others}


def _canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _chart(names: Iterable[str], title: str = "") -> tuple[Figure, Axes]:
    """A figure with room for the names in a legend below, and its axes."""
    names = list(names)
    half = -(-len(names) // 2)
    column = max(_line_count(names[:half]), _line_count(names[half:]))
    figure = _canvas(4.6, 3.2 + max(0.09 * _line_count(names), 0.16 * column))
    axes = figure.add_subplot()
    axes.set_title(_wrapped(title, width=48))
    return figure, axes


def _legend(figure: Figure) -> None:
    """Put the legend below everything, in two columns."""
    figure.legend(loc="outside lower center", ncols=2)


def _draw_line(axes: Axes, curve: np.ndarray, name: str, stroke: tuple[str, str], marker: str = "") -> None:
    """Draw a line and its band: `curve`, float [4, n], is x, middle, lowest and highest."""
    x, mean, low, high = curve
    colour, dash = stroke
    axes.plot(x, mean, color=colour, linestyle=dash, marker=marker, markersize=2.5, label=_wrapped(name))
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)


def _wrapped(name: str, lines: int = 5, width: int = 30) -> str:
    """A name as SVG can hold it: without control characters, broken at `width` (after a colon if it can be), cut.

    >>> _wrapped("stages:redraw=above:copy=1", width=20)
    'stages:\\nredraw=above:copy=1'
    """
    parts = textwrap.wrap(printable(name).replace(":", ": "), width)
    if len(parts) > lines:
        parts = [*parts[: lines - 1], parts[lines - 1][: width - 1] + "\N{HORIZONTAL ELLIPSIS}"]
    return "\n".join(parts).replace(": ", ":")


def printable(text: str) -> str:
    """The text with a space in place of each control character."""
    return "".join(c if c.isprintable() else " " for c in text)


def _line_count(names: Iterable[str]) -> int:
    """How many lines the names take, one below the other."""
    return sum(_wrapped(name).count("\n") + 1 for name in names)


def _class_names(classes: Sequence[str], n: int) -> list[str]:
    """The classes' names, or their numbers where the names are of another data set."""
    return [str(c) for c in classes] if len(classes) == n else [str(i) for i in range(n)]


def _named_classes(names: Sequence[str]) -> range:
    """The numbers of the classes that are named on an axis."""
    return range(0, len(names), -(-len(names) // MOST_CLASSES))


def _short_names(names: Sequence[str]) -> list[str]:
    """The names of the classes that are named on an axis, a line each."""
    return [_wrapped(names[i], lines=1, width=20) for i in _named_classes(names)]


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of classes below the axes, aslant."""
    axes.set_xticks(_named_classes(names), _short_names(names), rotation=45, ha="right", rotation_mode="anchor")


def _heat_map(
    axes: Axes, table: np.ndarray, low: float, high: float, blank: float = -np.inf, gain: bool = False
) -> None:
    """Draw cells with their numbers (above `blank`) where they can be read; of a `gain`, white at 0 and signed."""
    axes.imshow(table, cmap="RdBu" if gain else "Blues", vmin=low, vmax=high, aspect="auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if table.shape[1] > MOST_CLASSES:
        return
    form = "+.1f" if gain else ".0f"
    for (row, column), value in np.ndenumerate(table):
        if value <= blank:  # NaN too has a text
            continue
        text = f"{value:{form}}".replace("-", "\N{MINUS SIGN}") if np.isfinite(value) else "\N{EN DASH}"
        shade = (value - low) / (high - low)
        colour = "white" if shade > (0.8 if gain else 0.6) or (gain and shade < 0.2) else INK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5, in_layout=False)


# Metrics


def metric_of(members: Members) -> Metric:
    """The metric of fits of one target."""
    fits = [fit for each in members.values() for fit in each]
    return of_results.metric(fits[0]) if fits else ACCURACY


def retention_metric_of(members: Members) -> Metric:
    """The metric of the retention of fits of one source."""
    fits = [fit for each in members.values() for fit in each if fit.retention is not None]
    return units.from_record(fits[0].retention_metric) if fits else ACCURACY


def _digits(metric: Metric) -> int:
    """How many decimals a text beside a picture has."""
    return 1 if metric.unit == "%" else 3


def _with_unit(metric: Metric, value: float) -> str:
    """A value, as it is shown, with its unit, in the text beside a picture."""
    return " ".join(filter(None, (f"{value:.{_digits(metric)}f}", metric.unit)))


def _test(metric: Metric) -> str:
    """The name of an axis of a metric on the test set."""
    return units.headed(f"test {units.spoken(metric)}", metric.unit)


# Training


def _mean_curve(members: Iterable[Result], curves: Curves, field: str) -> np.ndarray | None:
    """Float [4, segments]: step, mean, lowest and highest over the fits that ended, at the steps that they share."""
    each = [curves[result.name] for result in members if ended(result) and result.name in curves]
    columns = [along(c) if field == "score" else np.asarray(c[field], float) for c in each]
    tables = [
        dict(zip(np.asarray(c["step"]).tolist(), values, strict=True)) for c, values in zip(each, columns, strict=True)
    ]
    steps = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
    if not steps:
        return None
    values = np.array([[table[step] for step in steps] for table in tables])
    values[~np.isfinite(values)] = np.nan  # a gap in the line
    return np.stack([np.array(steps, float), values.mean(0), values.min(0), values.max(0)])


def learning_curves(members: Members, curves: Curves, field: str, where: str, strokes: Strokes) -> Picture | None:
    """Learning curves, a line a strategy: `field` ('score', the metric, or 'train_loss') against the step."""
    lines = {name: curve for name, fits in members.items() if (curve := _mean_curve(fits, curves, field)) is not None}
    if not lines:
        return None
    metric, of_metric = metric_of(members), field == "score"
    what = units.spoken(metric) if of_metric else "training loss"
    unit = metric.unit if of_metric else "nats" if metric == ACCURACY else ""
    factor, digits = (units.factor(metric), _digits(metric)) if of_metric else (1.0, 3)
    figure, axes = _chart(lines)
    ends = []
    for name, curve in lines.items():
        scaled = curve * np.array([[1], [factor], [factor], [factor]])
        _draw_line(axes, scaled, name, strokes[name], "o" if len(curve[0]) < 12 else "")
        if np.isfinite(scaled[1, -1]):
            ends.append(" ".join(filter(None, (name, f"{scaled[1, -1]:.{digits}f}", unit))))
    axes.set(xlabel="step", ylabel=units.headed(what, unit))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(figure)
    return figure, f"Line chart of {what} against step{where}. Mean at the last step: {', '.join(ends)}."


def trained_over_time(name: str, fits: Sequence[Result], curves: Curves, where: str) -> Picture | None:
    """In what share of the steps before each point of the curves each leaf trained, mean over fits; None where no mask
    moves."""
    each = [curves[fit.name] for fit in fits if fit.name in curves]
    fields = [field for field in (each[0] if each else ()) if field.startswith("trained/")]
    each = [curve for curve in each if len(curve["step"]) == len(each[0]["step"]) and {*fields} <= {*curve}]
    if not fields or not each:
        return None
    steps = np.diff(each[0]["step"], prepend=0)
    shares = np.array(
        [[100 * np.diff(curve[field], prepend=0) / np.maximum(steps, 1) for field in fields] for curve in each]
    ).mean(0)
    names = [field.removeprefix("trained/") for field in fields]
    figure = _canvas(5.6, 0.9 + 0.2 * len(names))
    axes = figure.add_subplot()
    _heat_map(axes, shares, 0, 100)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(steps)), [f"{step:.0f}" for step in each[0]["step"]])
    axes.set(xlabel="step", title=_wrapped(name))
    means = [f"{path} {share:.0f}" for path, share in zip(names, shares @ steps / max(steps.sum(), 1), strict=True)]
    return figure, f"Share of the steps in which each leaf trained, in %, {name}{where}; in all: {', '.join(means)}."


def accuracy_by_class(members: Members, classes: Sequence[str], where: str) -> Picture | None:
    """A heat map of test accuracy, strategy x class, over the fits that ended."""
    measured = {name: _measured(fits, "per_class_accuracy") for name, fits in members.items()}
    by_strategy = {name: np.array(values, float).mean(0) for name, values in measured.items() if values}
    if not by_strategy:
        return None
    table = 100 * np.array(list(by_strategy.values()))
    names = _class_names(classes, table.shape[1])
    longest = max(map(len, _short_names(names)))
    figure = _canvas(7.6, 0.5 + 0.075 * longest + 0.15 * (len(table) + _line_count(by_strategy)))
    axes = figure.add_subplot()
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 100.0)
    _heat_map(axes, table, low, max(high, low + 1))
    _name_ticks(axes, names)
    axes.set_yticks(range(len(by_strategy)), [_wrapped(name) for name in by_strategy])
    texts = []
    for name, values in zip(by_strategy, table, strict=True):
        if np.isfinite(values).any():
            worst, best = int(np.nanargmin(values)), int(np.nanargmax(values))
            texts.append(f"{name} from {values[worst]:.0f} % ({names[worst]}) to {values[best]:.0f} % ({names[best]})")
    return figure, f"Heat map of test accuracy in % by strategy and class{where}: {'; '.join(texts)}."


def confusion(name: str, members: Sequence[Result], classes: Sequence[str], where: str) -> Picture | None:
    """The confusion matrix of a strategy in % of each true class, summed over the fits that ended."""
    matrices = _measured(members, "confusion")
    if not matrices:
        return None
    total = np.array(matrices).sum(0)
    names = _class_names(classes, len(total))
    figure = _canvas(3.7, 3.9)
    axes = figure.add_subplot()
    _heat_map(axes, 100 * total / np.maximum(total.sum(1, keepdims=True), 1), 0, 100, blank=0.5)
    _name_ticks(axes, names)
    axes.set_yticks(_named_classes(names), _short_names(names))
    axes.set(xlabel="predicted", ylabel="true", aspect="equal", title=_wrapped(name))
    wrong = total - np.diag(np.diag(total))
    true, predicted = np.unravel_index(int(wrong.argmax()), wrong.shape)
    worst = ""
    if wrong.any():
        worst = f"; most often {names[true]} was taken for {names[predicted]} ({wrong.max():,} times)"
    seeds = f"{len(matrices)} seed{'s' * (len(matrices) > 1)}"
    right = f"{np.trace(total):,} of {total.sum():,} predictions over {seeds} were right"
    return figure, f"Confusion matrix of {name}{where}: {right}{worst}."


MOST_LEAVES = 12
"""How many leaves, repeated blocks counted as one, the text beside a picture names."""


def _in_short(leaves: Sequence[tuple[str, tuple[int, int]]]) -> str:
    """The paths of leaves (path, numbers), those of repeated blocks as one, as --dry_run has them.

    >>> _in_short([("block_0/kernel", (8, 8)), ("block_1/kernel", (8, 8)), ("head/kernel", (2, 2))])
    'block_{0,1}/kernel, head/kernel'
    """
    names = [path for path, _ in paths.folded(leaves)]
    more = len(names) - MOST_LEAVES
    return ", ".join(names[:MOST_LEAVES]) + (f" and {more} more" if more > 0 else "")


def trained_shares(parameters: Mapping[str, Sequence[tuple[str, int, int]]]) -> Picture | None:
    """A bar for each strategy, of its leaves (path, numbers, trained numbers) as shares of the parameters."""
    if not parameters:
        return None
    figure = _canvas(7.6, 0.9 + 0.15 * (len(parameters) + _line_count(parameters)))
    axes = figure.add_subplot()
    texts = []
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
        which = _in_short([(leaf, (size, part)) for leaf, size, part in leaves if part and leaf])
        texts.append(f"{name} {100 * trained / total:.1f} % ({trained:,} of {total:,}{': ' if which else ''}{which})")
    axes.set_yticks(range(len(parameters)), [_wrapped(name) for name in parameters])
    axes.set(xlim=(0, 100), xlabel="share of the parameters (%)")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.bar(0, 0, color=BLUE, label="trained")
    axes.bar(0, 0, color=GREY, label="frozen")
    figure.legend(loc="outside upper left", ncols=2)
    return figure, f"Bar chart of the share of the parameters that each strategy trains: {'; '.join(texts)}."


def _measured(members: Sequence[Result], field: str) -> list[Any]:
    """The values of a measured field, over the fits that ended."""
    values = (getattr(result, field) for result in members if ended(result))
    return [value for value in values if value is not None]


# Strategies compared

WORDS = {"positive": (BLUE, "o"), "negative": (COLOURS[1], "s"), "equivalent": (COLOURS[2], "D"), "": (INK, "|")}
"""Verdict -> colour and marker; undecided is grey."""


def scores_by_labels(members: Members, where: str, strokes: Strokes) -> Picture | None:
    """The mean metric against the number of labelled examples; `members` are of all budgets, two or more."""
    lines = {name: _curve([(fit.train_examples, fit) for fit in fits]) for name, fits in members.items()}
    lines = {name: curve for name, curve in lines.items() if curve.shape[1]}
    budgets = sorted({int(x) for curve in lines.values() for x in curve[0]})
    if len(budgets) < 2:
        return None
    figure, axes = _chart(lines, where)
    for name, curve in lines.items():
        _draw_line(axes, curve, name, strokes[name], "o")
    metric = metric_of(members)
    axes.set(xscale="log", xlabel="labelled examples", ylabel=_test(metric))
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    _legend(figure)
    ends = ", ".join(
        f"{name} {_with_unit(metric, c[1, 0])} at {c[0, 0]:,.0f} to {_with_unit(metric, c[1, -1])} at {c[0, -1]:,.0f}"
        for name, c in lines.items()
    )
    return figure, f"Line chart of test {units.spoken(metric)} against labelled examples, {where}: {ends}."


def _cut(fit: Result) -> tuple[str, int] | None:
    """(how a fit cut the model, after how many stages); None if it did not cut the model.

    >>> options = {"redraw": "above", "copy": 2, "freeze": False}
    >>> _cut(Result(name="a", target="b", strategy="stages", options=options, seed=0))
    ('copied, trained; the rest anew', 2)
    """
    options = fit.options
    strategy = (fit.spec or fit.strategy).split(":")[0]
    if strategy == "stages" and options.get("redraw") == "above":
        frozen = str(options.get("freeze", True)).lower() not in ("false", "no", "0")
        return f"copied, {'frozen' if frozen else 'trained'}; the rest anew", int(options["copy"])
    if strategy == "last_k" and fit.leaves:
        stages = {path.split("/")[0] for path, _, _ in fit.leaves}
        return "copied, frozen; the rest copied", len(stages) - int(options.get("k", 1))
    return None


def layer_cut(members: Members, where: str) -> Picture | None:
    """The metric against how many stages are kept from the source, below the cut; scratch is a level.

    Yosinski et al. 2014, "How transferable are features in deep neural networks?", arXiv:1411.1792, figure 2.
    """
    kinds: dict[str, list[tuple[int, Result]]] = {}
    for fit in (fit for fits in members.values() for fit in fits):
        if cut := _cut(fit):
            kinds.setdefault(cut[0], []).append((cut[1], fit))
    lines = {kind: _curve(points) for kind, points in kinds.items()}
    lines = {kind: curve for kind, curve in lines.items() if curve.shape[1]}
    ticks = sorted({int(x) for curve in lines.values() for x in curve[0]})
    if len(ticks) < 2:
        return None
    figure, axes = _chart([*lines, "scratch"], where)
    texts = []
    metric = metric_of(members)
    scratch = _scores(members.get("scratch", ()))
    if scratch:
        level = np.array([[ticks[0], ticks[-1]], *([value] * 2 for value in scratch)], float)
        _draw_line(axes, level, "scratch", (INK, "--"))
        texts.append(f"scratch {_with_unit(metric, scratch[0])}")
    for kind, curve in lines.items():
        _draw_line(axes, curve, kind, strokes(list(lines))[kind], "o")
        texts += [f"{kind}: {', '.join(f'{_with_unit(metric, y)} after {x:.0f}' for x, y in curve[:2].T)}"]
    axes.set(xlabel="stages below the cut", ylabel=_test(metric), xticks=ticks)
    _legend(figure)
    name = units.spoken(metric)
    return figure, f"Line chart of test {name} against the stages kept from the source, {where}: {'; '.join(texts)}."


def gains(family: Sequence[Comparison]) -> Picture | None:
    """Heat maps of the differences, source x target, one a strategy, where there are two or more of either.

    The family is of one metric.
    """
    metric = family[0].metric if family else ACCURACY
    factor = units.factor(metric)
    sources = list(dict.fromkeys(str(comparison.source) for comparison in family))
    targets = list(dict.fromkeys(comparison.target for comparison in family))
    names = list(dict.fromkeys(_row(comparison, family) for comparison in family))
    if max(len(sources), len(targets)) < 2:
        return None
    tables = {name: np.full((len(sources), len(targets)), np.nan) for name in names}
    for comparison in family:
        tables[_row(comparison, family)][sources.index(str(comparison.source)), targets.index(comparison.target)] = (
            factor * comparison.mean
        )
    most = max((abs(factor * comparison.mean) for comparison in family if finite(comparison.mean)), default=1) or 1
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    longest = max(map(len, _short_names(targets)))
    figure = _canvas(7.6, 0.055 * longest + rows * (0.55 + 0.26 * len(sources)))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
        _heat_map(axes, table, -most, most, gain=True)
        axes.set_title(_wrapped(name, lines=2, width=34), fontsize=8.5)
        axes.set_yticks(range(len(sources)), _short_names(sources))
        _name_ticks(axes, targets)
        lowest = axes in grid.flat[len(names) - columns : len(names)]
        axes.tick_params(labelbottom=lowest)
        for tick in axes.get_xticklabels() if axes not in grid[:, 0] else []:
            tick.set_in_layout(False)
    base = base_of(family)
    text = "; ".join(
        f"{comparison.strategy} from {comparison.source} to {comparison.target} {_signed(comparison, comparison.mean)}"
        for comparison in family
    )
    return (
        figure,
        f"Heat maps of the difference from {base}{_in_unit(metric)}, sources in rows and targets in columns: {text}.",
    )


def forest(family: Sequence[Comparison]) -> Picture | None:
    """A forest plot: a row a difference, with its interval and verdict; the band is the margin of equivalence.

    The family is of one metric.
    """
    if not family:
        return None
    places: dict[str, list[Comparison]] = {}
    for comparison in family:
        places.setdefault(place(comparison.source, comparison.target), []).append(comparison)
    ticks: list[float] = []
    labels: list[str] = []
    heads: list[int] = []
    rows = [_row(comparison, members) for members in places.values() for comparison in members]
    figure = _canvas(7.6, 0.7 + 0.21 * (_line_count([*places, *rows])))
    axes = figure.add_subplot()
    y = 0.0
    for where, members in places.items():
        heads.append(len(ticks))
        ticks.append(y)
        labels.append(_wrapped(where, width=40))
        for comparison in members:
            tall = _line_count([_row(comparison, members)])
            y += 0.5 + tall / 2
            _interval(axes, y, tall, comparison)
            ticks.append(y)
            labels.append(_wrapped(_row(comparison, members)))
            y += tall / 2 - 0.5
        y += 1.3
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    axes.set_yticks(ticks, labels)
    for head in heads:
        axes.get_yticklabels()[head].set_fontweight("bold")
    base, metric = base_of(family), family[0].metric
    of_metric = " of ".join(filter(None, (units.of_differences(metric), units.spoken(metric))))
    turned = "" if metric.larger_is_better else ", positive is better"
    axes.set(xlabel=_wrapped(f"difference from {base} ({of_metric}{turned})", width=80), ylim=(y - 0.6, -0.8))
    axes.tick_params(axis="y", length=0)
    text = "; ".join(f"{where}: " + ", ".join(map(_in_words, members)) for where, members in places.items())
    return figure, f"Forest plot of the differences from {base}{_in_unit(metric)}, with intervals: {text}."


def _row(comparison: Comparison, members: Sequence[Comparison]) -> str:
    """The name of a row of the forest plot: the strategy, and its labels where others of its place have other ones."""
    several = len({other.budgets for other in members if other.strategy == comparison.strategy}) > 1
    return f"{comparison.strategy}, {comparison.budgets[0]:,} labels" if several else comparison.strategy


def bands(members: Sequence[Comparison], strokes: Strokes) -> Picture | None:
    """The differences against the number of labelled examples, with their intervals; the grey band is the margin.

    `members` are of one source and target and a budget each: all their intervals hold together, so those of a strategy
    are a simultaneous band over its budgets.
    """
    by_strategy: dict[str, list[Comparison]] = {}
    for comparison in members:
        if finite(comparison.mean) and finite(comparison.low) and finite(comparison.high):
            by_strategy.setdefault(comparison.strategy, []).append(comparison)
    budgets = sorted({comparison.budgets[0] for each in by_strategy.values() for comparison in each})
    if len(budgets) < 2:
        return None
    metric, where = members[0].metric, place(members[0].source, members[0].target)
    factor, margin = units.factor(metric), units.factor(metric) * members[0].margin
    figure, axes = _chart(by_strategy, where)
    axes.axhspan(-margin, margin, color=GREY, alpha=0.6, linewidth=0, zorder=0)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    for name, each in by_strategy.items():
        curve = np.array([(c.budgets[0], factor * c.mean, factor * c.low, factor * c.high) for c in each]).T
        _draw_line(axes, curve, name, strokes[name], "o")
    axes.set(xscale="log", xlabel="labelled examples", ylabel=f"difference from {base_of(members)}{_in_unit(metric)}")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    _legend(figure)
    text = "; ".join(f"{_row(comparison, members)} {_signed(comparison, comparison.mean)}" for comparison in members)
    return figure, f"Line chart of the differences from {base_of(members)} against labelled examples, {where}: {text}."


def _in_unit(metric: Metric) -> str:
    unit = units.of_differences(metric)
    return f" in {unit}" if unit else ""


def _signed(comparison: Comparison, value: float) -> str:
    """A difference of a comparison, as it is shown, with its sign."""
    return f"{units.factor(comparison.metric) * value:+.{units.digits(comparison.metric)}f}"


def _interval(axes: Axes, y: float, tall: int, comparison: Comparison) -> None:
    """Draw one row of the forest plot, at the height y and `tall` lines high."""
    colour, marker = WORDS.get(comparison.word, ("#707070", "o"))
    factor = units.factor(comparison.metric)
    margin = factor * comparison.margin
    axes.barh(y, 2 * margin, left=-margin, height=tall, color=GREY, alpha=0.6, zorder=0)
    axes.plot([factor * comparison.low, factor * comparison.high], [y, y], color=colour, linewidth=1.5)
    axes.plot(factor * comparison.mean, y, color=colour, marker=marker, markersize=4.5)
    axes.annotate(comparison.word, (1.01, y), xycoords=("axes fraction", "data"), va="center", color=colour)


def _in_words(comparison: Comparison) -> str:
    """The words on a comparison that the forest plot shows."""
    size = f", {SIZES[comparison.size]}," if comparison.word in ("positive", "negative") and comparison.size else ""
    word = f" {comparison.word}{size}" if comparison.word else ""
    low, mean, high = (_signed(comparison, end) for end in (comparison.low, comparison.mean, comparison.high))
    ends = f" ({low} to {high})" if np.isfinite(comparison.low) else ""
    return f"{comparison.strategy}{word} {mean}{ends}"


def reliability(members: Members, where: str, strokes: Strokes) -> Picture | None:
    """A reliability diagram: accuracy against confidence, a line a strategy over all its fits; best is diagonal."""
    lines = {name: curve for name, fits in members.items() if (curve := _calibration(fits)).shape[1]}
    if not lines:
        return None
    figure, axes = _chart(lines, where)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    for name, curve in lines.items():
        _draw_line(axes, curve, name, strokes[name], "o")
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    _legend(figure)
    ends = ", ".join(f"{name} {c[1, -1]:.0f} % right at {c[0, -1]:.0f} % confidence" for name, c in lines.items())
    return figure, f"Reliability diagram, {where}; the most confident: {ends}."


def _calibration(fits: Sequence[Result]) -> np.ndarray:
    """Float [4, bins]: confidence and accuracy in %, pooled over fits by their counts; empty bins are left out."""
    bins = [fit.calibration for fit in fits if ended(fit) and fit.calibration]
    if not bins:
        return np.empty((4, 0))
    size = np.array([each["count"] for each in bins], float)
    values = (np.array([each[name] for each in bins], float) for name in ("confidence", "accuracy"))
    sums = [np.sum(size * np.nan_to_num(value), 0) for value in values]
    filled = size.sum(0) > 0
    confidence, accuracy = (100 * each[filled] / size.sum(0)[filled] for each in sums)
    return np.stack([confidence, accuracy, accuracy, accuracy])


def most_wrong(images: np.ndarray, captions: Sequence[str], where: str) -> Picture | None:
    """The images most often wrong, uint8 [k, h, w, c], a caption below each."""
    if not len(images):
        return None
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = _canvas(7.6, 1.85 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xlabel(_wrapped(caption, lines=4, width=18), fontsize=7.5)
    return figure, f"Images of {where} that were most often wrong: {'; '.join(captions)}."


def _scores(fits: Sequence[Result]) -> Spread | None:
    """The metric on the test set, as it is shown, over the fits that count."""
    values = [(counted_score(fit), units.factor(of_results.metric(fit))) for fit in fits]
    return spread(factor * value for value, factor in values if value is not None)


def _curve(points: Iterable[tuple[float, Result]]) -> np.ndarray:
    """Of (x, fit), float [4, n]: x, and mean, lowest and highest score, as shown, of the fits that count there."""
    fits: dict[float, list[Result]] = {}
    for x, fit in points:
        fits.setdefault(x, []).append(fit)
    values = [(x, *scores) for x in sorted(fits) if (scores := _scores(fits[x]))]
    return np.array(values, float).reshape(-1, 4).T


# Costs

Quantity = Callable[[Result], float | None]
"""What a fit costs, or another of its numbers; None where it is unknown."""


def cost(members: Members, what: str, quantity: Quantity, where: str, strokes: Strokes) -> Picture | None:
    """The metric against a cost on a logarithmic axis; `what` names the cost."""
    points = {name: point for name, point in _points(members, quantity).items() if point[0][1] > 0}
    names = (what, _test(metric_of(members)))
    return (
        _scatter(points, names, where, strokes, log=True, digits=(1, _digits(metric_of(members))))[1]
        if points
        else None
    )


def training_flops(fit: Result) -> float | None:
    """FLOPs of training on the target: steps times those of a step.

    >>> training_flops(Result(name="a", target="b", strategy="full", seed=0, steps=100, step_flops=2e6))
    200000000.0
    """
    if fit.steps is None or fit.step_flops is None or not finite(fit.step_flops):
        return None
    return float(fit.steps * fit.step_flops)


def shifted(members: Members, name: str, where: str, strokes: Strokes) -> Picture | None:
    """The metric on the further test set `name` against that on the target's own, with the diagonal."""
    metric = metric_of(members)
    swapped = _points(members, lambda fit: _shown(metric, (fit.evals or {}).get(name)))
    if not swapped:
        return None
    points = {strategy: (test, other) for strategy, (other, test) in swapped.items()}
    other = units.headed(f"{units.spoken(metric)} on {name}", metric.unit)
    axes, picture = _scatter(points, (_test(metric), other), where, strokes, digits=(_digits(metric), _digits(metric)))
    ends = [pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max)]
    axes.plot(ends, ends, color=GREY, linewidth=1, zorder=0)
    axes.set(xlim=ends, ylim=ends)
    return picture


def retention(members: Members, where: str, strokes: Strokes) -> Picture | None:
    """The target's metric against what is left of the source's; a line joins those that none beats in both."""
    metric, of_source = metric_of(members), retention_metric_of(members)
    points = _points(members, lambda fit: _shown(of_source, fit.retention))
    if not points:
        return None
    turned = units.sign(of_source), units.sign(metric)
    best = front({name: (turned[0] * x[0], turned[1] * y[0]) for name, (x, y) in points.items()})
    kept = units.headed(f"source {units.spoken(of_source)} after transfer", of_source.unit)
    axes, (figure, alt) = _scatter(
        points, (kept, _test(metric)), where, strokes, digits=(_digits(of_source), _digits(metric))
    )
    line = sorted((points[name][0][0], points[name][1][0]) for name in best)
    axes.plot(*zip(*line, strict=True), color="#909090", linewidth=1, zorder=0)
    return figure, f"{alt[:-1]}; on the Pareto front: {', '.join(best)}."


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is above in one coordinate and not below in the other.

    >>> front({"a": (1, 3), "b": (2, 2), "c": (1, 2)})
    ['a', 'b']
    """
    return [
        name
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u > x or v > y) for u, v in points.values())
    ]


def _shown(metric: Metric, value: float | None) -> float | None:
    """A value of a metric as it is shown; None where there is none."""
    return units.factor(metric) * value if value is not None and finite(value) else None


def _points(members: Members, quantity: Quantity) -> dict[str, tuple[Spread, Spread]]:
    """{strategy: (a quantity, the metric on the test set, as shown)}, over the fits that count and have both."""
    points = {}
    for name, fits in members.items():
        measured = [fit for fit in fits if counts(fit) and finite(quantity(fit))]
        x, y = spread(map(quantity, measured)), _scores(measured)
        if x and y:
            points[name] = (x, y)
    return points


def _scatter(
    points: Mapping[str, tuple[Spread, Spread]],
    names: tuple[str, str],
    where: str,
    strokes: Strokes,
    log: bool = False,
    digits: tuple[int, int] = (1, 1),
) -> tuple[Axes, Picture]:
    """A point a strategy with bars over seeds; `names` are those of the axes, `digits` are for the text of x and y."""
    figure, axes = _chart(points, where)
    for name, ((x, left, right), (y, low, high)) in points.items():
        colour, dash = strokes[name]
        look: dict[str, Any] = {"color": colour, "fmt": DASHES[dash], "label": _wrapped(name)}
        bars = _bar(y, low, high), _bar(x, left, right)
        axes.errorbar([x], [y], *bars, markersize=5, linewidth=0.8, **look)
    axes.set(xlabel=_wrapped(names[0], width=60), ylabel=_wrapped(names[1], width=40))
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.minorticks_off()
    _legend(figure)
    text = ", ".join(f"{name} {y[0]:.{digits[1]}f} at {_number(x[0], digits[0])}" for name, (x, y) in points.items())
    return axes, (figure, f"Scatter plot of {names[1]} against {names[0]}, {where}: {text}.")


def _bar(mean: float, low: float, high: float) -> list[list[float]]:
    """How far a bar reaches below and above; the mean of equal numbers may be beside them by rounding."""
    return [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]


def _number(value: float, digits: int = 1) -> str:
    return f"{value:.2e}" if value >= 1e7 else f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}f}"


# Searches


def search_progress(studies: Mapping[str, Sequence[TrialRecord]], metric: Metric = ACCURACY) -> Picture | None:
    """The metric on validation examples against a trial's number, and the best so far, a line a study."""
    known = {name: ended for name, trials in studies.items() if (ended := _with_score(trials))}
    if not known:
        return None
    figure, axes = _chart(known)
    stroke = strokes(list(studies))
    texts = []
    for name, trials in known.items():
        colour, dash = stroke[name]
        factor = units.factor(metric)
        numbers, values = np.array([(trial.number, factor * (trial.accuracy or 0.0)) for trial in trials]).T
        best = (np.maximum if metric.larger_is_better else np.minimum).accumulate(values)
        axes.plot(numbers, values, "o", color=colour, alpha=0.4, markersize=2.5)
        axes.plot(numbers, best, color=colour, linestyle=dash, drawstyle="steps-post", label=_wrapped(name))
        first = int(numbers[(units.sign(metric) * best).argmax()])
        texts.append(f"{name} {_with_unit(metric, best[-1])}, first at trial {first}")
    for name, every in studies.items():
        _cross(axes, [trial.number for trial in every if trial.diverged], stroke[name][0], 0.03)
    what = f"validation {units.spoken(metric)}"
    axes.set(xlabel="trial", ylabel=units.headed(what, metric.unit))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(figure)
    return figure, f"Line chart of the best {what} so far against trials: {'; '.join(texts)}."


def searched_values(
    name: str, trials: Sequence[TrialRecord], dimension: str, field: str, log: bool, metric: Metric = ACCURACY
) -> Picture | None:
    """The metric or the loss (`field`, accuracy or loss) of a study's trials against a dimension that was searched.

    Points are joined where nothing else was searched. Trials that diverged are crosses at the edge.
    """
    known = [trial for trial in _with_score(trials) if getattr(trial, field) is not None]
    known = [trial for trial in known if dimension in trial.values]
    if not known:
        return None
    of_metric = field == "accuracy"
    what = f"validation {units.spoken(metric) if of_metric else 'loss'}"
    unit = metric.unit if of_metric else "nats" if metric == ACCURACY else ""
    factor, digits = (units.factor(metric), _digits(metric)) if of_metric else (1.0, 3)
    higher_is_better = of_metric and metric.larger_is_better
    points = sorted((trial.values[dimension], factor * getattr(trial, field)) for trial in known)
    x, y = np.array(points, float).T
    alone = all(len(trial.values) == 1 for trial in known)
    figure, axes = _chart([], name)
    axes.plot(x, y, "o-" if alone else "o", color=BLUE, markersize=3, linewidth=1)
    diverged = [trial.values[dimension] for trial in trials if trial.diverged and dimension in trial.values]
    _cross(axes, diverged, INK, 0.03 if higher_is_better else 0.97)
    best = int(y.argmax() if higher_is_better else y.argmin())
    axes.plot(x[best], y[best], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
    if log:
        _decades(axes, "x")
    if not of_metric and 0 < 10 * y.min() < y.max():  # a rate that is too high must not flatten the others
        _decades(axes, "y", (1, 2, 5))
    axes.set(xlabel=dimension, ylabel=units.headed(what, unit))
    highest = " ".join(filter(None, (f"{y[best]:.{digits}f}", unit)))
    lost = f"; {len(diverged)} diverged, from {min(diverged):.3g} on" if diverged else ""
    return (
        figure,
        f"Chart of {what} against {dimension} of {name}: {len(x)} trials between {x[0]:.3g} and {x[-1]:.3g}, "
        f"the best {highest} at {x[best]:.3g}{lost}.",
    )


def range_test(name: str, rates: np.ndarray, losses: np.ndarray, result: Suggestion, unit: str = "nats") -> Picture:
    """Loss against the rate of its step, both [steps], smoothed, with the suggestion."""
    figure, axes = _chart([], name)
    most = losses[0] + abs(losses[0])
    axes.plot(rates, np.minimum(losses, most), color="#aaaaaa", linewidth=1, label="training loss of a step")
    axes.plot(rates, result.smooth, color=BLUE, label="smoothed")
    axes.axvline(result.lowest, color=INK, linestyle=":", linewidth=1, label=f"lowest: {result.lowest:.3g}")
    axes.axvline(result.rate, color=INK, linestyle="--", linewidth=1, label=f"suggested: {result.rate:.3g}")
    if result.diverged is not None:
        _cross(axes, [result.diverged], INK, 0.97)
    _decades(axes, "x")
    axes.set(xlabel="learning_rate", ylabel=units.headed("training loss", unit))
    _legend(figure)
    lost = "" if result.diverged is None else f"; not finite from {result.diverged:.3g} on"
    return (
        figure,
        f"Line chart of the training loss of {name} while the rate rises from {rates[0]:.3g} to {rates[-1]:.3g}: "
        f"smoothed, it is lowest, {result.smooth.min():.3f}, at {result.lowest:.3g}; {result.rate:.3g} is "
        f"suggested{lost}.",
    )


def _with_score(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that ended and did not diverge."""
    return [trial for trial in trials if trial.accuracy is not None]


def _decades(axes: Axes, which: str, first: Sequence[float] = (1,)) -> None:
    """Give the axis 'x' or 'y' a logarithmic scale with numbers at these multiples of powers of ten, as in flags.

    Where fewer than two of them are in sight, as of rates within one decade, more are, so that an axis has numbers.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for multiples in (first, (1, 2, 5)):
        ticks = np.outer(powers, multiples)
        if np.count_nonzero((low <= ticks) & (ticks <= high)) > 1:
            axis.set_major_locator(LogLocator(subs=multiples))
            break
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _cross(axes: Axes, places: Sequence[float], colour: str, height: float) -> None:
    """Draw crosses along the axis, at a fraction of its height."""
    heights = [height] * len(places)
    axes.plot(places, heights, "x", color=colour, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)


# Rankings


def ranking_intervals(board: Board) -> Picture:
    """Tau and regret of every score of a ranking, with their intervals."""
    names = board.ordered()[::-1]
    figure = _canvas(7.2, 0.9 + 0.26 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, scale in ((left, "tau", 1.0), (right, "regret", units.factor(board.metric))):
        for row, name in enumerate(names):
            estimate = getattr(board.judged[name], key)
            if not np.isnan(estimate.value):
                axes.plot([scale * estimate.low, scale * estimate.high], [row, row], color=BLUE, linewidth=1.2)
                axes.plot([scale * estimate.value], [row], "o", color=BLUE, markersize=4)
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    if not np.isnan(board.half):
        left.axvline(board.half, color=INK, linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("tau")
    right.set_xlabel(units.headed("regret of the first choice", units.of_differences(board.metric)))
    return figure, f"Tau and regret of {len(names)} scores, {board.title}."


def ranking_scatter(board: Board) -> Picture:
    """Every score of a ranking against the truth, a panel each, a colour a target."""
    names = board.ordered()
    columns = 4
    rows = -(-len(names) // columns)
    figure = _canvas(8.4, 0.5 + 1.8 * rows)
    stroke = strokes(board.targets)
    for panel, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, panel + 1)
        for target, score, truth in zip(board.targets, board.scores[name], board.truths, strict=True):
            known = np.isfinite(score)
            for chosen, marker in ((known & ~board.trivial, "o"), (known & board.trivial, "x")):
                label = _wrapped(target) if marker == "o" and not panel else None
                colour = stroke[target][0]
                shown = units.factor(board.metric) * units.sign(board.metric) * truth[chosen]
                axes.plot(score[chosen], shown, marker, color=colour, markersize=3.5, label=label)
        axes.set_title(name)
        axes.tick_params(labelsize=7)
    figure.supylabel(_test(board.metric), fontsize=9)
    _legend(figure)
    return figure, f"Scores against test {units.spoken(board.metric)}, a point a source, {board.title}."


# Atlases


def atlas_cells(stages: Sequence[str], kinds: Sequence[str], grid: np.ndarray, metric: Metric) -> Picture:
    """What each cell adds: a map of stages and kinds, and beside it the intervals, a row a stage, a colour a kind.

    `grid` is float [stages, kinds, 3]: value, low and high as they are shown, NaN where there is no cell.
    """
    figure = _canvas(8.4, 1.3 + 0.18 * len(stages) * max(2, len(kinds)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[max(1, len(kinds)), 5])
    size = float(np.nanmax(np.abs(grid[..., 0]))) or 1.0
    _heat_map(left, grid[..., 0], -size, size, gain=True)
    left.set_xticks(range(len(kinds)), [_wrapped(kind) for kind in kinds])
    left.set_yticks(range(len(stages)), [_wrapped(stage) for stage in stages])
    for column, kind in enumerate(kinds):
        colour = COLOURS[column % len(COLOURS)]
        rows = np.arange(len(stages)) + (column - (len(kinds) - 1) / 2) * 0.7 / max(1, len(kinds))
        value, low, high = grid[:, column].T
        right.hlines(rows, low, high, color=colour, linewidth=1.2)
        right.plot(value, rows, "o", color=colour, markersize=3.5, label=_wrapped(kind))
    right.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    right.set_xlabel(units.headed(f"adds to validation {units.spoken(metric)}", units.of_differences(metric)))
    right.legend(loc="best")
    text = "; ".join(
        f"{stage} {kind} {grid[row, column, 0]:+.1f}"
        for row, stage in enumerate(stages)
        for column, kind in enumerate(kinds)
        if np.isfinite(grid[row, column, 0])
    )
    return figure, f"What each cell adds{_in_unit(metric)}, stages in rows and kinds in columns: {text}."


def atlas_masks(
    sizes: np.ndarray, scores: np.ndarray, strategies: Mapping[str, tuple[float, float]], metric: Metric
) -> Picture:
    """The score of every mask against the numbers that it trains, and strategies by {name: (numbers, score)}."""
    figure = _canvas(7.2, 3.6)
    axes = figure.add_subplot()
    factor = units.factor(metric) * units.sign(metric)
    axes.plot(sizes, factor * scores, "o", color=BLUE, markersize=2.5, alpha=0.5, markeredgewidth=0)
    for name, (numbers, score) in strategies.items():
        axes.plot([numbers], [factor * score], "s", color=INK, markersize=4)
        axes.annotate(
            _wrapped(name, lines=1), (numbers, factor * score), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    axes.set_xscale("symlog", linthresh=max(1.0, float(sizes[sizes > 0].min(initial=1.0))))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("numbers that train beside what always trains")
    axes.set_ylabel(units.headed(f"validation {units.spoken(metric)}", metric.unit))
    return figure, f"Validation {units.spoken(metric)} of {len(scores)} masks against the numbers that they train."
