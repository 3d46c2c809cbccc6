"""The pages of a search and of a learning-rate range test: one HTML file each, like the report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.pages import drawing, report, search_pictures, tables
from experiments.pages.history import Told
from experiments.pages.report import Block, Reproduced, Section
from experiments.pages.tables import NOTHING, Cell, Table
from tljax.study import space
from tljax.study.range_test import SHARE, Found
from tljax.study.results import Result

RATE = "learning_rate"


class Study(NamedTuple):
    """One study on the page: a strategy at a label budget."""

    name: str
    ranges: Sequence[space.Range]
    trials: Sequence[Told]
    best: int
    """Number of the trial that won."""


BEST = (
    "The values that won, what they gave on validation examples, and how many trials there were. At an edge of its "
    "range a value may be better beyond: widen the range."
)
PROGRESS = "Points are trials, lines the best so far; crosses below are trials that diverged."
CURVES = (
    f"Trials against {RATE}, the best ringed; crosses at the edge diverged. Points are joined where nothing else was "
    "searched; else the other values vary too."
)
RANGE = (
    f"Loss on the batch of each step while the rate rises exponentially. The suggestion is {SHARE:g} of the rate at "
    "which the smoothed loss is lowest. Source: Smith 2017, section 3.3, where the rate rises linearly."
)


@drawing.style()
def page(
    title: str,
    lead: str,
    studies: Sequence[Study],
    rows: Sequence[Result],
    lines: Sequence[tuple[str, str]],
    notes: Sequence[str],
    made: Reproduced,
) -> str:
    """HTML of a search: `rows` are the winners' last fits, `lines` (study, what won), `notes` of the data."""
    progress = search_pictures.progress({one.name: one.trials for one in studies})
    rates = [one for study in studies for one in _curves(study)]
    sections = [
        Section("Results", "results", _tuned(rows, report.said(notes))),
        Section("Best values", "best", [Block(BEST, _best(studies))]),
        Section("The search", "search", report.figure(PROGRESS, [progress])),
        Section("Learning rate", "rate", report.figure(CURVES, rates)),
    ]
    return report.render(report.brief(sections, notes), title=title, lead=lead, lists=[("", lines)], made=made)


@drawing.style()
def range_page(name: str, lead: str, rates: np.ndarray, losses: np.ndarray, found: Found, made: Reproduced) -> str:
    """HTML of a range test: `rates` and `losses` are those of its steps, [steps] both."""
    picture = search_pictures.range_test(name, rates, losses, found)
    sections = [Section("Loss", "loss", report.figure(RANGE, [picture]))]
    return report.render(sections, title=f"learning-rate range test: {name}", lead=lead, made=made)


def _curves(one: Study) -> list[drawing.Picture | None]:
    """Accuracy and loss against the rate, if that was searched."""
    return [
        search_pictures.against(one.name, one.trials, RATE, field, dimension.kind == "log")
        for dimension in one.ranges
        if dimension.name == RATE and dimension.kind != "in"
        for field in ("accuracy", "loss")
    ]


def _tuned(rows: Sequence[Result], notes: str) -> list[Block]:
    """A table a label budget, a row a strategy."""
    caption = f"Tuned against tuned. {report.RESULTS}{notes}"
    found = report.panels(rows).items()
    return [Block(caption, tables.results(panel, heading), heading=heading) for heading, panel in found]


def _best(studies: Sequence[Study]) -> Table:
    """A row a study."""
    names = list(dict.fromkeys(one.name for study in studies for one in study.ranges))
    rows = []
    for study in studies:
        [won] = [one for one in study.trials if one.number == study.best]
        ends = {one.name: space.at_edge(one, won.chosen[one.name]) for one in study.ranges}
        edges = {name: f"the {end} of its range" for name, end in ends.items() if end}
        values = [(value(won.chosen.get(name)), edges.get(name, "")) for name in names]
        rows.append(
            [
                (study.name, f"trial {won.number}"),
                *values,
                (_number(won.accuracy, 100, ".2f"), ""),
                (_number(won.loss, 1, ".3f"), ""),
                _counted(study.trials),
            ]
        )
    return Table("Best values", ["Study", *names, "Validation accuracy (%)", "Validation loss (nats)", "Trials"], rows)


def _counted(trials: Sequence[Told]) -> Cell:
    """How many there are that count, and what became of those that gave no accuracy."""
    pruned = sum(one.state == "PRUNED" for one in trials)
    diverged = sum(one.diverged for one in trials)
    complete = sum(one.state == "COMPLETE" for one in trials)
    said = [f"{count} {what}" for count, what in ((diverged, "diverged"), (pruned, "pruned")) if count]
    return str(complete + pruned), ", ".join(said)


def value(chosen: Any) -> str:
    """A searched value as it is shown.

    >>> value(0.0123456), value("relu")
    ('0.01235', 'relu')
    """
    return NOTHING if chosen is None else f"{chosen:.4g}" if isinstance(chosen, float) else str(chosen)


def _number(number: float | None, scale: float, form: str) -> str:
    return NOTHING if number is None else f"{scale * number:{form}}"
