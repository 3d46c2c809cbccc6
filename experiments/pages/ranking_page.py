"""The page of a ranking of sources: scores against the truth, and what each is worth."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.pages import drawing, report
from experiments.pages.drawing import Picture
from experiments.pages.report import Block, Reproduced, Section
from experiments.pages.tables import NOTHING, Cell, Table
from tljax.study.ranking import Estimate, Judged


class Board(NamedTuple):
    """Scores and the truth of one strategy at one label budget."""

    strategy: str
    budget: str
    which: str
    """Of the sources: all, or without the trivial ones."""
    judged: Mapping[str, Judged]
    half: float
    """Tau between halves of the truth's seeds, a mean over targets."""
    scores: Mapping[str, np.ndarray]
    """{score: float [targets, sources]}."""
    truths: np.ndarray
    """float [targets, sources]: accuracies, means over seeds."""
    targets: tuple[str, ...]
    trivial: np.ndarray
    """bool [sources]."""

    @property
    def title(self) -> str:
        """What it is of."""
        return f"{self.strategy}, {self.budget}, {self.truths.shape[1]} sources ({self.which})"


COLUMNS = {
    **{"tau": 1, "weighted tau": 1, "Pearson": 1},
    **{"regret": 100, "regret of 3": 100, "over scratch": 100},
    "behind": 1,
}
"""What a score is judged by, in the order of `Judged`, and what its numbers are shown times: accuracies in points."""

WORTH = (
    "Means over targets, below them 95 % percentile intervals of a bootstrap over sources. Regret is the accuracy lost "
    "by trusting the score's first choice, or the best of its first three; its intervals lean low. Over scratch is the "
    "accuracy of its first choice less that of training from scratch (points). Behind is the highest tau less this "
    "one, on the same draws. Its intervals hold together, for all pairs of scores and rivals, as the best is found by "
    "looking: one that holds 0 cannot tell the two apart. Names in brackets are plain rivals."
)
AGAINST = "A point is a source; crosses are sources that learnt nothing. Test accuracy is a mean over seeds."
INTERVALS = "The same tau and regret with their intervals; the dotted line is tau between halves of the truth's seeds."


@drawing.style()
def page(boards: Sequence[Board], notes: Sequence[str], made: Reproduced) -> str:
    """HTML of a ranking; `notes` go with every table."""
    targets = boards[0].targets
    lead = (
        f"{boards[0].truths.shape[1]} sources were ranked for {', '.join(targets)} by {len(boards[0].judged)} scores "
        "and rivals, and each ranking was held against the accuracy that the sources lead to:"
    )
    lines = [(board.title, apart(board)) for board in boards]
    whole = [board for board in boards if board.which == "all"]  # the others are parts of them
    tables = [Block(WORTH + report.said(notes), worth(board), heading=board.title) for board in boards]
    sections = [
        Section("What the scores are worth", "worth", tables),
        Section("Intervals", "intervals", [_drawn(INTERVALS, board, intervals(board)) for board in boards]),
        Section("Scores against the truth", "scatter", [_drawn(AGAINST, board, scatter(board)) for board in whole]),
    ]
    title = f"which source for {', '.join(targets)}"
    return report.render(sections, title=title, lead=lead, lists=[("", lines)], made=made)


def _drawn(caption: str, board: Board, picture: Picture) -> Block:
    return Block(caption, pictures=[picture], kind="box wide", heading=board.title)


def worth(board: Board) -> Table:
    """A row a score, the highest tau first; above them tau between halves of the seeds."""
    rows = [[(name, ""), *map(cell, board.judged[name], COLUMNS.values())] for name in ordered(board)]
    half = NOTHING if np.isnan(board.half) else f"{board.half:.2f}"
    blank = [(NOTHING, "")] * (len(COLUMNS) - 1)
    columns = ["Score", *map(str.capitalize, COLUMNS)]
    return Table(board.title, columns, [*rows, [("the truth's own halves", ""), (half, ""), *blank]])


def ordered(board: Board) -> list[str]:
    """The scores, the highest tau first, those without one last."""
    return sorted(board.judged, key=lambda name: -np.nan_to_num(board.judged[name].tau.value, nan=-2.0))


def apart(board: Board) -> str:
    """Which scores cannot be told from the one with the highest tau."""
    first, *others = [name for name in ordered(board) if not np.isnan(board.judged[name].tau.value)] or [""]
    near = [name for name in others if not board.judged[name].behind.low > 0]
    return f"not told apart from {first}: {', '.join(near) or 'none'}" if first else "no score ranks anything"


def cell(of: Estimate, scale: float = 1.0) -> Cell:
    """A value over its interval.

    >>> cell(Estimate(0.5, 0.25, 0.75))
    ('0.50', '0.25 to 0.75')
    """
    if np.isnan(of.value):
        return NOTHING, ""
    value, low, high = (f"{scale * number:.2f}".replace("-", "\N{MINUS SIGN}") for number in of)
    return value, "" if np.isnan(of.low) else f"{low} to {high}"


def intervals(board: Board) -> Picture:
    """Tau and regret of every score with their intervals."""
    names = ordered(board)[::-1]
    figure = drawing.canvas(7.2, 0.9 + 0.26 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, scale in ((left, "tau", 1), (right, "regret", 100)):
        for row, name in enumerate(names):
            of = getattr(board.judged[name], key)
            if not np.isnan(of.value):
                axes.plot([scale * of.low, scale * of.high], [row, row], color=drawing.BLUE, linewidth=1.2)
                axes.plot([scale * of.value], [row], "o", color=drawing.BLUE, markersize=4)
        axes.axvline(0, color=drawing.GREY, linewidth=0.8, zorder=0)
    if not np.isnan(board.half):
        left.axvline(board.half, color=drawing.INK, linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("tau")
    right.set_xlabel("regret of the first choice (points)")
    return figure, f"Tau and regret of {len(names)} scores, {board.title}."


def scatter(board: Board) -> Picture:
    """Every score against the truth, a panel each, a colour a target."""
    names = ordered(board)
    columns = 4
    rows = -(-len(names) // columns)
    figure = drawing.canvas(8.4, 0.5 + 1.8 * rows)
    strokes = drawing.strokes(board.targets)
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        for target, score, truth in zip(board.targets, board.scores[name], board.truths, strict=True):
            known = np.isfinite(score)
            for chosen, marker in ((known & ~board.trivial, "o"), (known & board.trivial, "x")):
                label = drawing.plain(target) if marker == "o" and not place else None
                colour = strokes[target][0]
                axes.plot(score[chosen], 100 * truth[chosen], marker, color=colour, markersize=3.5, label=label)
        axes.set_title(name)
        axes.tick_params(labelsize=7)
    figure.supylabel("test accuracy (%)", fontsize=9)
    drawing.legend(figure)
    return figure, f"Scores against test accuracy, a point a source, {board.title}."
