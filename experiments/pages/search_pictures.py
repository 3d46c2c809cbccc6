"""The pictures of a search, each a figure and the text that stands for it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.pages import drawing
from experiments.pages.drawing import BLUE, INK, Picture
from experiments.pages.history import Told
from tljax.study.range_test import Found


def progress(studies: Mapping[str, Sequence[Told]]) -> Picture | None:
    """Validation accuracy against a trial's number, and the best so far, a line a study; None without a trial."""
    known = {name: measured for name, trials in studies.items() if (measured := _measured(trials))}
    if not known:
        return None
    figure, axes = drawing.charted(known)
    strokes = drawing.strokes(list(studies))
    said = []
    for name, measured in known.items():
        colour, dash = strokes[name]
        numbers, values = np.array([(one.number, 100 * (one.accuracy or 0.0)) for one in measured]).T
        best = np.maximum.accumulate(values)
        axes.plot(numbers, values, "o", color=colour, alpha=0.4, markersize=2.5)
        axes.plot(numbers, best, color=colour, linestyle=dash, drawstyle="steps-post", label=drawing.plain(name))
        first = int(numbers[best.argmax()])
        said.append(f"{name} {best[-1]:.1f} %, first at trial {first}")
    for name, trials in studies.items():
        _cross(axes, [one.number for one in trials if one.diverged], strokes[name][0], 0.03)
    axes.set(xlabel="trial", ylabel="validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawing.legend(figure)
    return (figure, f"Line chart of the best validation accuracy so far against trials: {'; '.join(said)}.")


def against(name: str, trials: Sequence[Told], dimension: str, field: str, log: bool) -> Picture | None:
    """Accuracy or loss (`field`) of a study's trials against one that was searched; None where none has both.

    Points are joined where nothing else was searched. Trials that diverged are crosses at the edge.
    """
    known = [one for one in _measured(trials) if getattr(one, field) is not None and dimension in one.chosen]
    if not known:
        return None
    percent = field == "accuracy"
    what, unit = ("validation accuracy", "%") if percent else ("validation loss", "nats")
    points = sorted((one.chosen[dimension], (100 if percent else 1) * getattr(one, field)) for one in known)
    x, y = np.array(points, float).T
    alone = all(len(one.chosen) == 1 for one in known)
    figure, axes = drawing.charted([], name)
    axes.plot(x, y, "o-" if alone else "o", color=BLUE, markersize=3, linewidth=1)
    odd = [one.chosen[dimension] for one in trials if one.diverged and dimension in one.chosen]
    _cross(axes, odd, INK, 0.03 if percent else 0.97)
    best = int(y.argmax() if percent else y.argmin())
    axes.plot(x[best], y[best], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
    if log:
        _decades(axes, "x")
    if not percent and 0 < 10 * y.min() < y.max():  # a rate that is too high must not flatten the others
        _decades(axes, "y", (1, 2, 5))
    axes.set(xlabel=dimension, ylabel=f"{what} ({unit})")
    places = f"{y[best]:.1f} %" if percent else f"{y[best]:.3f} nats"
    lost = f"; {len(odd)} diverged, from {min(odd):.3g} on" if odd else ""
    return (
        figure,
        f"Chart of {what} against {dimension} of {name}: {len(x)} trials between {x[0]:.3g} and {x[-1]:.3g}, "
        f"the best {places} at {x[best]:.3g}{lost}.",
    )


def range_test(name: str, rates: np.ndarray, losses: np.ndarray, found: Found) -> Picture:
    """Loss against the rate of its step, both [steps], smoothed, with the suggestion."""
    figure, axes = drawing.charted([], name)
    most = losses[0] + abs(losses[0])
    axes.plot(rates, np.minimum(losses, most), color="#aaaaaa", linewidth=1, label="training loss of a step")
    axes.plot(rates, found.smooth, color=BLUE, label="smoothed")
    axes.axvline(found.lowest, color=INK, linestyle=":", linewidth=1, label=f"lowest: {found.lowest:.3g}")
    axes.axvline(found.rate, color=INK, linestyle="--", linewidth=1, label=f"suggested: {found.rate:.3g}")
    if found.diverged is not None:
        _cross(axes, [found.diverged], INK, 0.97)
    _decades(axes, "x")
    axes.set(xlabel="learning_rate", ylabel="training loss (nats)")
    drawing.legend(figure)
    lost = "" if found.diverged is None else f"; not finite from {found.diverged:.3g} on"
    return (
        figure,
        f"Line chart of the training loss of {name} while the rate rises from {rates[0]:.3g} to {rates[-1]:.3g}: "
        f"smoothed, it is lowest, {found.smooth.min():.3f}, at {found.lowest:.3g}; {found.rate:.3g} is "
        f"suggested{lost}.",
    )


def _measured(trials: Sequence[Told]) -> list[Told]:
    return [one for one in trials if one.accuracy is not None]


def _decades(axes: Axes, which: str, named: Sequence[float] = (1,)) -> None:
    """A logarithmic scale on which these multiples of powers of ten are named, as they are written in flags.

    Where fewer than two of them are in sight, as of rates within one decade, more are, so that an axis has numbers.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for multiples in (named, (1, 2, 5)):
        ticks = np.outer(powers, multiples)
        if np.count_nonzero((low <= ticks) & (ticks <= high)) > 1:
            axis.set_major_locator(LogLocator(subs=multiples))
            break
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _cross(axes: Axes, places: Sequence[float], colour: str, height: float) -> None:
    """Crosses along the axis, at a fraction of its height."""
    heights = [height] * len(places)
    axes.plot(places, heights, "x", color=colour, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
