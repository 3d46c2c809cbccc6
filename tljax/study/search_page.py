"""The pages of a search and of a learning-rate range test: one HTML file each, in the style of the report."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tljax.study import pictures, search_pictures, space
from tljax.study.history import Told
from tljax.study.pictures import Picture
from tljax.study.range_test import SHARE, Found
from tljax.study.summary import Row, Spread, summary

NOTHING = "\N{EN DASH}"
RATE = "learning_rate"

Cell = tuple[str, str]
"""What it says, and what is said below it in small, or ''."""


class Table(NamedTuple):
    """Rows under columns; the first column is words."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Block(NamedTuple):
    """A table, or pictures in one figure."""

    caption: str
    table: Table | None = None
    pictures: Sequence[Picture] = ()


class Section(NamedTuple):
    """Blocks under a title; without one it is left out."""

    title: str
    blocks: Sequence[Block]


class Study(NamedTuple):
    """One study on the page: a strategy at a label budget."""

    name: str
    ranges: Sequence[space.Range]
    trials: Sequence[Told]
    best: int
    """Number of the trial that won."""


class Reproduced(NamedTuple):
    """How the page came about."""

    environment: Mapping[str, str | Sequence[str]]
    flags_text: str
    command: str


def page(
    title: str,
    lead: str,
    studies: Sequence[Study],
    rows: Sequence[Row],
    lines: Sequence[str],
    notes: Sequence[str],
    reproduced: Reproduced,
) -> str:
    """HTML of a search: `rows` are the winners' last fits, `lines` what is said of them, `notes` of the data."""
    with matplotlib.style.context(["default", pictures.STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts draw the text, not matplotlib's
        progress = search_pictures.progress({one.name: one.trials for one in studies})
        curves = [picture for one in studies for picture in _curves(one)]
    tuned = Block(
        " ".join(["Tuned against tuned: means over seeds, ranges below them.", *map(_sentence, notes)]), _tuned(rows)
    )
    best = Block(
        "The values that won, what they gave on validation examples, and how many trials there were. "
        "At an edge of its range a value may be better beyond: widen the range.",
        _best(studies),
    )
    told = "Points are trials, lines the best so far; crosses below are trials that diverged."
    drawn = (
        f"Trials against {RATE}, the best ringed; crosses at the edge diverged. Points are joined where nothing else "
        "was searched; else the other values vary too."
    )
    sections = [
        Section("Results", [tuned] if rows else []),
        Section("Best values", [best]),
        Section("The search", [Block(told, pictures=[progress])] if progress else []),
        Section("Learning rate", [Block(drawn, pictures=curves)] if curves else []),
    ]
    return _rendered(title, lead, lines, sections, reproduced)


def range_page(name: str, lead: str, rates: np.ndarray, losses: np.ndarray, found: Found, made: Reproduced) -> str:
    """HTML of a range test: `rates` and `losses` are those of its steps, [steps] both."""
    with matplotlib.style.context(["default", pictures.STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        picture = search_pictures.range_test(name, rates, losses, found)
    caption = (
        f"Loss on the batch of each step while the rate rises exponentially. The suggestion is {SHARE:g} of the rate "
        "at which the smoothed loss is lowest. Source: Smith 2017, section 3.3, where the rate rises linearly."
    )
    return _rendered(
        f"learning-rate range test: {name}", lead, [], [Section("Loss", [Block(caption, pictures=[picture])])], made
    )


def _rendered(title: str, lead: str, lines: Sequence[str], sections: Sequence[Section], made: Reproduced) -> str:
    html = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment = {key: ", ".join(value) if isinstance(value, list) else value for key, value in made[0].items()}
    return html.get_template("search.html.j2").render(
        title=title,
        lead=lead,
        lines=lines,
        sections=sections,
        environment=environment,
        flags_text=made.flags_text,
        command=made.command,
    )


def _curves(one: Study) -> list[Picture]:
    """Accuracy and loss against the rate, if that was searched."""
    found = [
        search_pictures.against(one.name, one.trials, RATE, field, dimension.kind == "log")
        for dimension in one.ranges
        if dimension.name == RATE and dimension.kind != "in"
        for field in ("accuracy", "loss")
    ]
    return [picture for picture in found if picture]


def _tuned(rows: Sequence[Row]) -> Table:
    """A row a strategy and label budget."""
    columns = ["Strategy", "Labels", "Seeds", "Test accuracy (%)", "Difference from scratch (points)"]
    cells = [
        [
            (group["strategy"], f"{group['diverged']} diverged" if group["diverged"] else ""),
            (f"{group['train_examples']:,}", ""),
            (str(group["seeds"]), ""),
            _spread(group["accuracy"], 100, ".1f"),
            _spread(group["gain"], 1, "+.1f"),
            _spread(group["test_loss"], 1, ".3f"),
            (f"{group['steps']:,.0f}" if group["steps"] is not None else NOTHING, ""),
        ]
        for group in summary(rows)
    ]
    return Table("Tuned against tuned", [*columns, "Test loss (nats)", "Steps"], cells)


def _best(studies: Sequence[Study]) -> Table:
    """A row a study."""
    names = list(dict.fromkeys(one.name for study in studies for one in study.ranges))
    rows = []
    for study in studies:
        [won] = [one for one in study.trials if one.number == study.best]
        edges = {one.name: space.at_edge(one, won.chosen[one.name]) for one in study.ranges}
        values = [(value(won.chosen.get(name)), _edge(edges.get(name, ""))) for name in names]
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


def _edge(edge: str) -> str:
    return f"the {edge} of its range" if edge else ""


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


def _spread(spread: Spread | None, scale: float, form: str) -> Cell:
    """A mean, and below it the range where there is one."""
    if spread is None:
        return NOTHING, ""
    mean, low, high = (f"{scale * one:{form}}".replace("-", "\N{MINUS SIGN}") for one in spread)
    return mean, "" if low == high else f"{low} to {high}"


def _sentence(note: str) -> str:
    return note if note[-1:] in ".!?" else f"{note}."
