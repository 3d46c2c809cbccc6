"""The report's pictures of a whole study: each a figure, and the text that stands for it; None for nothing to draw.

`members` are fits by strategy; `where` names their source, target and budget. Bands and bars are ranges over seeds.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.pages import drawing
from experiments.pages.drawing import BLUE, COLOURS, GREY, INK, Picture, Strokes
from experiments.pages.tables import SIZES, place
from tljax.study.results import Result
from tljax.study.summary import Members, Spread, accuracy, ended, finite, spread
from tljax.study.verdicts import Comparison, base_of

WORDS = {"positive": (BLUE, "o"), "negative": (COLOURS[1], "s"), "equivalent": (COLOURS[2], "D"), "": (INK, "|")}
"""Verdict -> colour and marker; undecided is grey."""


def against_labels(members: Members, where: str, strokes: Strokes) -> Picture | None:
    """Mean test accuracy against the number of labelled examples; `members` are of all budgets, two or more."""
    lines = {name: _curve([(row.train_examples, row) for row in rows]) for name, rows in members.items()}
    lines = {name: curve for name, curve in lines.items() if curve.shape[1]}
    budgets = sorted({int(x) for curve in lines.values() for x in curve[0]})
    if len(budgets) < 2:
        return None
    figure, axes = drawing.charted(lines, where)
    for name, curve in lines.items():
        drawing.line(axes, curve, name, strokes[name], "o")
    axes.set(xscale="log", xlabel="labelled examples", ylabel="test accuracy (%)")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    drawing.legend(figure)
    ends = ", ".join(
        f"{name} {c[1, 0]:.1f} % at {c[0, 0]:,.0f} to {c[1, -1]:.1f} % at {c[0, -1]:,.0f}" for name, c in lines.items()
    )
    return figure, f"Line chart of test accuracy against labelled examples, {where}: {ends}."


def cut(row: Result) -> tuple[str, int] | None:
    """How a fit cut the model, and after how many stages; None where it did not.

    >>> options = {"redraw": "above", "copy": 2, "freeze": False}
    >>> cut(Result(name="a", target="b", strategy="stages", options=options, seed=0))
    ('copied, trained; the rest anew', 2)
    """
    options = row.options
    strategy = (row.spec or row.strategy).split(":")[0]
    if strategy == "stages" and options.get("redraw") == "above":
        frozen = str(options.get("freeze", True)).lower() not in ("false", "no", "0")
        return f"copied, {'frozen' if frozen else 'trained'}; the rest anew", int(options["copy"])
    if strategy == "last_k" and row.leaves:
        stages = {str(leaf[0]).split("/")[0] for leaf in row.leaves}
        return "copied, frozen; the rest copied", len(stages) - int(options.get("k", 1))
    return None


def layer_cut(members: Members, where: str) -> Picture | None:
    """Accuracy against how many stages are kept from the source, below the cut; scratch is a level.

    Yosinski et al. 2014, "How transferable are features in deep neural networks?", arXiv:1411.1792, figure 2.
    """
    kinds: dict[str, list[tuple[int, Result]]] = {}
    for row in (row for rows in members.values() for row in rows):
        if found := cut(row):
            kinds.setdefault(found[0], []).append((found[1], row))
    lines = {kind: _curve(found) for kind, found in kinds.items()}
    lines = {kind: curve for kind, curve in lines.items() if curve.shape[1]}
    ticks = sorted({int(x) for curve in lines.values() for x in curve[0]})
    if len(ticks) < 2:
        return None
    figure, axes = drawing.charted([*lines, "scratch"], where)
    said = []
    scratch = percent(members.get("scratch", ()))
    if scratch:
        level = np.array([[ticks[0], ticks[-1]], *([value] * 2 for value in scratch)], float)
        drawing.line(axes, level, "scratch", (INK, "--"))
        said.append(f"scratch {scratch[0]:.1f} %")
    for kind, curve in lines.items():
        drawing.line(axes, curve, kind, drawing.strokes(list(lines))[kind], "o")
        said += [f"{kind}: {', '.join(f'{y:.1f} % after {x:.0f}' for x, y in curve[:2].T)}"]
    axes.set(xlabel="stages below the cut", ylabel="test accuracy (%)", xticks=ticks)
    drawing.legend(figure)
    return figure, f"Line chart of test accuracy against the stages kept from the source, {where}: {'; '.join(said)}."


def gains(family: Sequence[Comparison]) -> Picture | None:
    """A heat map of the differences, source x target, for each strategy; for two or more of either."""
    sources = list(dict.fromkeys(str(one.source) for one in family))
    targets = list(dict.fromkeys(one.target for one in family))
    names = list(dict.fromkeys(one.strategy for one in family))
    if max(len(sources), len(targets)) < 2:
        return None
    tables = {name: np.full((len(sources), len(targets)), np.nan) for name in names}
    for one in family:
        tables[one.strategy][sources.index(str(one.source)), targets.index(one.target)] = 100 * one.mean
    most = max((abs(100 * one.mean) for one in family if finite(one.mean)), default=1) or 1
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    longest = max(map(len, drawing.short(targets)))
    figure = drawing.canvas(7.6, 0.055 * longest + rows * (0.55 + 0.26 * len(sources)))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
        drawing.heat(axes, table, -most, most, gain=True)
        axes.set_title(drawing.plain(name, lines=2, width=34), fontsize=8.5)
        axes.set_yticks(range(len(sources)), drawing.short(sources))
        drawing.name_ticks(axes, targets)
        lowest = axes in grid.flat[len(names) - columns : len(names)]
        axes.tick_params(labelbottom=lowest)
        for text in axes.get_xticklabels() if axes not in grid[:, 0] else []:
            text.set_in_layout(False)
    base = base_of(family)
    said = "; ".join(f"{one.strategy} from {one.source} to {one.target} {100 * one.mean:+.2f}" for one in family)
    return (
        figure,
        f"Heat maps of the difference from {base} in points, sources in rows and targets in columns: {said}.",
    )


def forest(family: Sequence[Comparison]) -> Picture | None:
    """Each difference with its interval and its verdict, a row each; the band is the margin of equivalence."""
    if not family:
        return None
    places: dict[str, list[Comparison]] = {}
    for one in family:
        places.setdefault(place(one.source, one.target), []).append(one)
    ticks: list[float] = []
    labels: list[str] = []
    heads: list[int] = []
    figure = drawing.canvas(7.6, 0.7 + 0.21 * (drawing.lines([*places, *(one.strategy for one in family)])))
    axes = figure.add_subplot()
    y = 0.0
    for where, members in places.items():
        heads.append(len(ticks))
        ticks.append(y)
        labels.append(drawing.plain(where, width=40))
        for one in members:
            tall = drawing.lines([one.strategy])
            y += 0.5 + tall / 2
            _interval(axes, y, tall, one)
            ticks.append(y)
            labels.append(drawing.plain(one.strategy))
            y += tall / 2 - 0.5
        y += 1.3
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    axes.set_yticks(ticks, labels)
    for head in heads:
        axes.get_yticklabels()[head].set_fontweight("bold")
    base = base_of(family)
    axes.set(xlabel=drawing.plain(f"difference from {base} (points of accuracy)", width=80), ylim=(y - 0.6, -0.8))
    axes.tick_params(axis="y", length=0)
    said = "; ".join(f"{where}: " + ", ".join(map(_said, members)) for where, members in places.items())
    return figure, f"Forest plot of the differences from {base} in points, with intervals: {said}."


def _interval(axes: Axes, y: float, tall: int, one: Comparison) -> None:
    colour, marker = WORDS.get(one.word, ("#707070", "o"))
    axes.barh(y, 200 * one.margin, left=-100 * one.margin, height=tall, color=GREY, alpha=0.6, zorder=0)
    axes.plot([100 * one.low, 100 * one.high], [y, y], color=colour, linewidth=1.5)
    axes.plot(100 * one.mean, y, color=colour, marker=marker, markersize=4.5)
    axes.annotate(one.word, (1.01, y), xycoords=("axes fraction", "data"), va="center", color=colour)


def _said(one: Comparison) -> str:
    size = f", {SIZES[one.size]}," if one.word in ("positive", "negative") and one.size else ""
    word = f" {one.word}{size}" if one.word else ""
    ends = f" ({100 * one.low:+.2f} to {100 * one.high:+.2f})" if np.isfinite(one.low) else ""
    return f"{one.strategy}{word} {100 * one.mean:+.2f}{ends}"


def reliability(members: Members, where: str, strokes: Strokes) -> Picture | None:
    """Accuracy against confidence, a line a strategy over all its fits; the diagonal is calibrated."""
    lines = {name: curve for name, rows in members.items() if (curve := _calibration(rows)).shape[1]}
    if not lines:
        return None
    figure, axes = drawing.charted(lines, where)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    for name, curve in lines.items():
        drawing.line(axes, curve, name, strokes[name], "o")
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    drawing.legend(figure)
    ends = ", ".join(f"{name} {c[1, -1]:.0f} % right at {c[0, -1]:.0f} % confidence" for name, c in lines.items())
    return figure, f"Reliability diagram, {where}; the most confident: {ends}."


def _calibration(rows: Sequence[Result]) -> np.ndarray:
    """[4, bins]: confidence and accuracy in %, pooled over fits by their counts; empty bins are left out."""
    known = [row.calibration for row in rows if ended(row) and row.calibration]
    if not known:
        return np.empty((4, 0))
    size = np.array([one["count"] for one in known], float)
    sums = [np.sum(size * np.nan_to_num(np.array([o[k] for o in known], float)), 0) for k in ("confidence", "accuracy")]
    filled = size.sum(0) > 0
    confidence, accuracy = (100 * each[filled] / size.sum(0)[filled] for each in sums)
    return np.stack([confidence, accuracy, accuracy, accuracy])


def wrong(images: np.ndarray, captions: Sequence[str], where: str) -> Picture | None:
    """The images most often wrong, uint8 [k, h, w, c], a caption below each."""
    if not len(images):
        return None
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = drawing.canvas(7.6, 1.85 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xlabel(drawing.plain(caption, lines=4, width=18), fontsize=7.5)
    return figure, f"Images of {where} that were most often wrong: {'; '.join(captions)}."


def percent(rows: Sequence[Result]) -> Spread | None:
    """Test accuracy in % over the fits that count."""
    return spread(100 * value for row in rows if (value := accuracy(row)) is not None)


def _curve(points: Iterable[tuple[float, Result]]) -> np.ndarray:
    """(x, fit) to [4, n]: x, and the mean, lowest and highest test accuracy in % of the fits that count there."""
    found: dict[float, list[Result]] = {}
    for x, result in points:
        found.setdefault(x, []).append(result)
    values = [(x, *known) for x in sorted(found) if (known := percent(found[x]))]
    return np.array(values, float).reshape(-1, 4).T
