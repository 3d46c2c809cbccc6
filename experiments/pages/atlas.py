"""The numbers, the tables and the page of an atlas."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pages import figures, report, tables
from experiments.pages.ranking import plain
from experiments.pages.report import Block, Section
from experiments.pages.tables import NOTHING
from experiments.runs import console, directory
from experiments.runs.console import Cell as Text
from experiments.runs.console import Table
from tljax.study import units
from tljax.study.atlas import Atlas, Percentile


def numbers(atlas: Atlas) -> dict[str, Any]:
    """What atlas.json says; scores and effects are as they are measured, and turned so that larger is better."""
    surrogate = atlas.fitted.surrogate
    return plain(
        {
            "metric": units.to_record(atlas.metric),
            "seeds": list(atlas.seeds),
            "masks": len(atlas.masks),
            "constant": surrogate.constant,
            "cells": [
                {"stage": cell.stage, "kind": cell.kind, "numbers": cell.size, **effect._asdict()}
                for cell, effect in zip(atlas.cells, surrogate.effects, strict=True)
            ],
            "stages": [{"stage": name, **effect._asdict()} for name, effect in atlas.stages.items()],
            "pairs": [
                {"cells": [atlas.cells[i].name for i in pair], **effect._asdict()} for pair, effect in surrogate.pairs
            ],
            "held_out_errors": list(atlas.fitted.errors),
            "explained": atlas.fitted.explained,
            "ceiling": atlas.ceiling._asdict(),
            "strategies": [
                {**place._asdict(), "by_cells": place.by_cells._asdict(), "by_numbers": place.by_numbers._asdict()}
                for place in atlas.placed
            ],
            "greedy": [
                {"of": choice.units, "strategy": choice.spec, "steps": [step._asdict() for step in choice.steps]}
                for choice in atlas.choices
            ],
        }
    )


def effects(atlas: Atlas) -> Table:
    """What each cell adds, the most first, and what each stage adds in sum."""
    factor = units.factor(atlas.metric)
    surrogate = atlas.fitted.surrogate
    rows = [
        [Text(cell.name), Text(f"{cell.size:,}"), tables.estimate(effect, factor)]
        for cell, effect in zip(atlas.cells, surrogate.effects, strict=True)
    ]
    order = np.argsort([-effect.value for effect in surrogate.effects], kind="stable")
    of_stages = [
        [Text(f"{name}, all kinds"), Text(f"{_numbers(atlas, name):,}"), tables.estimate(effect, factor)]
        for name, effect in sorted(atlas.stages.items(), key=lambda item: -item[1].value)
    ]
    pairs = [
        [Text(" with ".join(atlas.cells[i].name for i in pair)), Text(NOTHING), tables.estimate(effect, factor)]
        for pair, effect in surrogate.pairs
    ]
    heading = units.headed("adds", units.of_differences(atlas.metric))
    return Table("what each cell adds", ["cell", "numbers", heading], [*(rows[i] for i in order), *of_stages, *pairs])


def _numbers(atlas: Atlas, stage: str) -> int:
    return sum(cell.size for cell in atlas.cells if cell.stage == stage)


def strategies(atlas: Atlas) -> Table:
    """Each strategy among the masks of its size."""
    rows = [
        [
            Text(place.label),
            Text(units.shown(atlas.metric, units.sign(atlas.metric) * place.score)),
            Text(NOTHING if place.cells is None else str(place.cells)),
            _percentile(place.by_cells),
            Text(f"{place.numbers:,}"),
            _percentile(place.by_numbers),
        ]
        for place in sorted(atlas.placed, key=lambda place: -place.score)
    ]
    columns = ["strategy", tables.of_test(atlas.metric, "Validation"), "cells", "percentile", "numbers", "percentile "]
    return Table("strategies among masks of their size", columns, rows)


def _percentile(place: Percentile) -> Text:
    if math.isnan(place.value):
        return Text(NOTHING, f"{place.peers} masks" if place.peers else "")
    return Text(f"{place.value:.0f}", f"of {place.peers} masks")


def choices(atlas: Atlas) -> Table:
    """The greedy choices, a step a row."""
    metric = atlas.metric
    rows: list[Sequence[Text]] = []
    for choice in atlas.choices:
        rows.append([Text(f"by {choice.units}: {choice.spec}")])
        for step in choice.steps:
            values = [units.shown(metric, units.sign(metric) * value) for value in (step.score, step.judged)]
            rows.append([Text(f"+ {step.added}" if step.added else "the head alone"), *map(Text, values)])
    columns = ["step", "chosen by", "on the other half"]
    return Table("greedy choice (SubTuning)", columns, rows)


def sentences(atlas: Atlas) -> list[str]:
    """How good the sum is, and how good it could be."""
    fitted, ceiling = atlas.fitted, atlas.ceiling
    pairs = len(fitted.surrogate.pairs)
    lines = [
        f"a sum over {len(atlas.cells)} cells{f' and {pairs} pairs' if pairs else ''} explains "
        f"{100 * fitted.explained:.0f} % of the variance of masks that were held out"
    ]
    if not math.isnan(ceiling.reliability):
        lines.append(
            f"noise ceiling: {100 * ceiling.reliability:.0f} % (halves of {len(atlas.seeds)} seeds correlate by "
            f"{ceiling.halves:.2f} over masks)"
        )
    return lines


def show(atlas: Atlas, folder: Path, title: str, notes: Sequence[str]) -> None:
    """Print the tables, and write the report."""
    lines = sentences(atlas)
    console.show(effects(atlas), lines)
    if atlas.placed:
        console.show(strategies(atlas))
    console.show(choices(atlas), [*notes])
    for choice in atlas.choices:
        console.say(f"  greedy by {choice.units}: --strategies={choice.spec}")
    directory.replace(folder / "report.html", page(atlas, folder, title, lines, notes))
    console.say(f"  report: {folder / 'report.html'}")


EFFECTS = (
    "What training a cell adds to {metric}{unit} on validation examples, in a sum fitted to all masks, with 95 % "
    "intervals over masks and seeds. A stage's row is the sum of its cells; two cells joined by with are what they add "
    "together beyond that, and a cell's own is then the mean of that with the other on and off."
)
STRATEGIES = (
    "Percent of the masks of a strategy's size that are below it, ties by half: of masks that train as many cells, and "
    "of those nearest in how many numbers they train. Masks and strategies have the same seeds, rates and examples, "
    "and each the rate that other seeds and examples choose."
)
GREEDY = (
    "Each step adds what raises {metric} on the first half of the validation examples most; the other half did not "
    "choose it. A mask that was not trained has what the sum says."
)
MASKS = "A point is a mask: {metric}, a mean over seeds, against the numbers that train. Squares are strategies."


@figures.style()
def page(atlas: Atlas, folder: Path, title: str, lines: Sequence[str], notes: Sequence[str]) -> str:
    """The HTML of an atlas; `notes` go with every table."""
    unit = units.of_differences(atlas.metric)
    words = {"metric": units.spoken(atlas.metric), "unit": f" ({unit})" if unit else ""}
    after = report.sentences(notes)
    blocks = [
        Block(EFFECTS.format(**words) + after, pictures=[figures.atlas_cells(*_grid(atlas))], kind="box wide"),
        Block(EFFECTS.format(**words) + after, effects(atlas)),
    ]
    sections = [Section("Where parameters matter", "cells", blocks)]
    if atlas.placed:
        sections.append(Section("Strategies", "strategies", [Block(STRATEGIES + after, strategies(atlas))]))
    sizes = atlas.masks @ np.array([cell.size for cell in atlas.cells])
    points = {place.label: (place.numbers, place.score) for place in atlas.placed}
    picture = figures.atlas_masks(sizes, atlas.scores.mean(1), points, atlas.metric)
    sections.append(
        Section("Masks", "masks", [Block(MASKS.format(**words) + after, pictures=[picture], kind="box wide")])
    )
    sections.append(Section("Greedy choice", "greedy", [Block(GREEDY.format(**words) + after, choices(atlas))]))
    lead = (
        f"{len(atlas.masks):,} masks of {len(atlas.cells)} cells were trained under {len(atlas.seeds)} "
        f"seed{'s' * (len(atlas.seeds) > 1)} and judged on validation examples:"
    )
    top = [("the sum", f"{line}.") for line in lines]
    top += [(f"greedy, by {choice.units}", f"--strategies={choice.spec}") for choice in atlas.choices]
    return report.render(
        report.brief(sections, notes),
        title=f"atlas: {title}",
        lead=lead,
        lists=[("", top)],
        provenance=report.provenance_of(folder),
    )


def _grid(atlas: Atlas) -> tuple[list[str], list[str], np.ndarray, Any]:
    """(Stages, kinds, effects [stages, kinds, 3] as they are shown, NaN where there is no cell; the metric)."""
    stages = list(dict.fromkeys(cell.stage for cell in atlas.cells))
    kinds = list(dict.fromkeys(cell.kind for cell in atlas.cells))
    grid = np.full((len(stages), len(kinds), 3), np.nan)
    for cell, effect in zip(atlas.cells, atlas.fitted.surrogate.effects, strict=True):
        grid[stages.index(cell.stage), kinds.index(cell.kind)] = effect
    return stages, kinds, units.factor(atlas.metric) * grid, atlas.metric
