"""How the report draws: style, strokes, what its pictures share, and a figure as SVG or PDF."""

import base64
import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tljax import files

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
    """Within it figures are made and written."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts draw the text, not matplotlib's
        yield


def svg(figure: Figure) -> str:
    """A data URI; fonts are the reader's, and measured with a wider one, so that nothing overlaps."""
    text = (
        _saved(figure, "svg", ("Date", "Creator"))
        .decode()
        .replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif")
    )
    return "data:image/svg+xml;base64," + base64.b64encode(files.to_bytes(text)).decode()


def pdf(figure: Figure) -> bytes:
    """A page of the figure's size."""
    return _saved(figure, "pdf", ("CreationDate", "Creator", "Producer"))


def _saved(figure: Figure, kind: str, without: Sequence[str]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=200, metadata=dict.fromkeys(without))
    figure.set_layout_engine("none")  # a second layout would start from the first, and end a little beside it
    return file.getvalue()


def strokes(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash for each strategy, the same in every picture; scratch is dark and dashed."""
    others = [label for label in dict.fromkeys(labels) if label != "scratch"]
    dashes = list(DASHES)
    chosen = {
        label: (COLOURS[i % len(COLOURS)], dashes[i // len(COLOURS) % len(dashes)]) for i, label in enumerate(others)
    }
    return {"scratch": (INK, "--"), **chosen}


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def charted(names: Iterable[str], title: str = "") -> tuple[Figure, Axes]:
    """A figure with room for the names in a legend below, and its axes."""
    names = list(names)
    half = -(-len(names) // 2)
    column = max(lines(names[:half]), lines(names[half:]))
    figure = canvas(4.6, 3.2 + max(0.09 * lines(names), 0.16 * column))
    axes = figure.add_subplot()
    axes.set_title(plain(title, width=48))
    return figure, axes


def legend(figure: Figure) -> None:
    """Below everything, in two columns."""
    figure.legend(loc="outside lower center", ncols=2)


def line(axes: Axes, curve: np.ndarray, name: str, stroke: tuple[str, str], marker: str = "") -> None:
    """A line and its band: `curve` float[4, n] is x, middle, lowest and highest."""
    x, mean, low, high = curve
    colour, dash = stroke
    axes.plot(x, mean, color=colour, linestyle=dash, marker=marker, markersize=2.5, label=plain(name))
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)


def plain(name: str, lines: int = 5, width: int = 30) -> str:
    """What SVG can hold, without control characters; broken after a colon where it can be, and cut after `lines`.

    >>> plain("stages:redraw=above:copy=1", width=20)
    'stages:\\nredraw=above:copy=1'
    """
    found = textwrap.wrap(printable(name).replace(":", ": "), width)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "\N{HORIZONTAL ELLIPSIS}"]
    return "\n".join(found).replace(": ", ":")


def printable(text: str) -> str:
    """A space in place of each control character."""
    return "".join(c if c.isprintable() else " " for c in text)


def lines(names: Iterable[str]) -> int:
    """How many lines the names take, one below the other."""
    return sum(plain(name).count("\n") + 1 for name in names)


def named(classes: Sequence[str], n: int) -> list[str]:
    """The classes' names, or their numbers where the names are of another data set."""
    return [str(c) for c in classes] if len(classes) == n else [str(i) for i in range(n)]


def every(names: Sequence[str]) -> range:
    """The classes that are named on an axis."""
    return range(0, len(names), -(-len(names) // MOST_CLASSES))


def short(names: Sequence[str]) -> list[str]:
    """Those classes' names, a line each."""
    return [plain(names[i], lines=1, width=20) for i in every(names)]


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Those names below the axes, aslant."""
    axes.set_xticks(every(names), short(names), rotation=45, ha="right", rotation_mode="anchor")


def heat(axes: Axes, table: np.ndarray, low: float, high: float, blank: float = -np.inf, gain: bool = False) -> None:
    """Cells with their numbers (above `blank`) where they can be read; of a `gain`, white at 0 and signed."""
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
