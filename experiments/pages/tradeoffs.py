"""The report's pictures of accuracy against what it costs: a point a strategy, bars the range over seeds.

`members` are fits by strategy; `where` names their source, target and budget; None for nothing to draw.
"""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator

from experiments.pages import drawing
from experiments.pages.drawing import GREY, Picture, Strokes
from experiments.pages.study_pictures import percent
from tljax.study.results import Result
from tljax.study.summary import Members, Spread, counts, finite, spread

Of = Callable[[Result], float | None]
"""What a fit costs, or another of its numbers; None where it is unknown."""


def cost(members: Members, what: str, of: Of, where: str, strokes: Strokes) -> Picture | None:
    """Accuracy against a cost, log x; `what` names the cost."""
    points = {name: point for name, point in _points(members, of).items() if point[0][1] > 0}
    return _scatter(points, (what, "test accuracy (%)"), where, strokes, log=True)[1] if points else None


def flops(row: Result) -> float | None:
    """FLOPs of training on the target: steps times those of a step.

    >>> flops(Result(name="a", target="b", strategy="full", seed=0, steps=100, step_flops=2e6))
    200000000.0
    """
    if row.steps is None or row.step_flops is None or not finite(row.step_flops):
        return None
    return float(row.steps * row.step_flops)


def shifted(members: Members, name: str, where: str, strokes: Strokes) -> Picture | None:
    """Accuracy on `name` of the rows' evals against that on the target's own test set, with the diagonal."""
    found = _points(members, lambda row: _hundred((row.evals or {}).get(name)))
    if not found:
        return None
    points = {label: (test, other) for label, (other, test) in found.items()}
    axes, picture = _scatter(points, ("test accuracy (%)", f"accuracy on {name} (%)"), where, strokes)
    ends = [pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max)]
    axes.plot(ends, ends, color=GREY, linewidth=1, zorder=0)
    axes.set(xlim=ends, ylim=ends)
    return picture


def retention(members: Members, where: str, strokes: Strokes) -> Picture | None:
    """Target accuracy against what is left of the source's; the strategies that none beats in both are joined."""
    points = _points(members, lambda row: _hundred(row.retention))
    if not points:
        return None
    best = front({name: (x[0], y[0]) for name, (x, y) in points.items()})
    names = ("source accuracy after transfer (%)", "test accuracy (%)")
    axes, (figure, alt) = _scatter(points, names, where, strokes)
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


def _hundred(fraction: float | None) -> float | None:
    return 100 * fraction if fraction is not None and finite(fraction) else None


def _points(members: Members, of: Of) -> dict[str, tuple[Spread, Spread]]:
    """(what `of` gives, test accuracy in %) of each strategy, over the fits that count and have both."""
    found = {}
    for name, rows in members.items():
        known = [row for row in rows if counts(row) and finite(of(row))]
        x, y = spread(of(row) for row in known), percent(known)
        if x and y:
            found[name] = (x, y)
    return found


def _scatter(
    points: Mapping[str, tuple[Spread, Spread]],
    names: tuple[str, str],
    where: str,
    strokes: Strokes,
    log: bool = False,
) -> tuple[Axes, Picture]:
    figure, axes = drawing.charted(points, where)
    for name, ((x, left, right), (y, low, high)) in points.items():
        colour, dash = strokes[name]
        look: dict[str, Any] = {"color": colour, "fmt": drawing.DASHES[dash], "label": drawing.plain(name)}
        bars = _bar(y, low, high), _bar(x, left, right)
        axes.errorbar([x], [y], *bars, markersize=5, linewidth=0.8, **look)
    axes.set(xlabel=drawing.plain(names[0], width=60), ylabel=drawing.plain(names[1], width=40))
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.minorticks_off()
    drawing.legend(figure)
    said = ", ".join(f"{name} {y[0]:.1f} at {_number(x[0])}" for name, (x, y) in points.items())
    return axes, (figure, f"Scatter plot of {names[1]} against {names[0]}, {where}: {said}.")


def _bar(mean: float, low: float, high: float) -> list[list[float]]:
    """How far it reaches below and above; the mean of equal numbers may be beside them by rounding."""
    return [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]


def _number(value: float) -> str:
    return f"{value:.2e}" if value >= 1e7 else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
