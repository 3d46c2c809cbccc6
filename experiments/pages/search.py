"""The pages of a search and of a learning-rate range test, and the notes below a search's table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.pages import figures, report, tables, transfer
from experiments.pages.report import Block, Provenance, Section
from experiments.pages.tables import NOTHING, count
from experiments.runs import directory, plan, search_flags
from experiments.runs.console import Cell, Table
from experiments.runs.plan import Experiment
from experiments.runs.search_flags import Search
from experiments.runs.settings import Settings
from experiments.runs.tuned import Arm, Winner
from tljax.study import search, space, units
from tljax.study.range_test import SHARE, Suggestion
from tljax.study.results import Result
from tljax.study.search import TrialRecord
from tljax.study.units import ACCURACY
from tljax.types import Metric

RATE = "learning_rate"


class Study(NamedTuple):
    """One study on the page: a strategy at a label budget."""

    name: str
    ranges: Sequence[space.Range]
    trials: Sequence[TrialRecord]
    best: int
    """The number of the trial that won."""


def write(
    folder: Path,
    settings: Settings,
    flags: Search,
    winners: Mapping[Arm, Winner],
    results: Sequence[Result],
    base: Experiment,
) -> list[str]:
    """Write report.html; returns the notes below the table. `results` are the last fits of the winners."""
    metric = plan.objective_of(base.target, base.settings.recipe).metrics[0]
    lines = [
        (f"{arm.label}, {arm.budget}", line)
        for arm, winner in winners.items()
        for line in _winner_notes(arm, winner, metric)
    ]
    several = len({arm.budget for arm in winners}) > 1
    studies = [
        Study(
            f"{arm.label}, {arm.budget}" if several else arm.label,
            arm.ranges,
            search.trials(winner.study),
            winner.trial.number,
        )
        for arm, winner in winners.items()
    ]
    title, notes = plan.title_and_notes(base.settings, base.source, base.target)
    last = list(winners.values())[-1].settings.workdir
    environment = directory.recorded_environment(Path(last or "")) or {}
    text = page(
        f"search: {title}",
        _lead(settings, flags, base),
        studies,
        results,
        lines,
        notes,
        provenance_of([*search_flags.to_flags(flags), *settings.flagfile_lines()], environment),
        metric,
    )
    directory.replace(folder / "report.html", text)
    return [*(f"{name}: {line}" for name, line in lines), *notes, f"report: {folder / 'report.html'}"]


def provenance_of(flags: Sequence[str], environment: Mapping[str, Any]) -> Provenance:
    """The provenance of the page of a search with these flagfile lines."""
    command = "python -m experiments.search --flagfile=FLAGS --workdir=NEW"
    return Provenance(environment, "\n".join(flags), command)


def _lead(settings: Settings, flags: Search, base: Experiment) -> str:
    held = 100 * base.settings.recipe.validation
    seeds = f"{len(flags.trial_seeds)} seed{'s' * (len(flags.trial_seeds) > 1)}"
    return (
        f"{flags.trials} trials of each study, by {flags.sampler}, judged on {held:g} % of the training examples under "
        f"{seeds} of the search's own. The winners were then trained on all training examples under the seeds "
        f"{', '.join(map(str, settings.seeds))}, and measured on the test set:"
    )


def _winner_notes(arm: Arm, winner: Winner, metric: Metric = ACCURACY) -> list[str]:
    """The notes on a winner: its values, how many trials tie with it, and which values are at an edge."""
    values = ", ".join(f"{name}={value}" for name, value in winner.trial.params.items())
    shown = units.shown(metric, winner.trial.value)
    notes = [f"{values}; validation {units.spoken(metric)} {units.with_unit(metric, winner.trial.value)}"]
    tied = [
        trial.number
        for trial in search.trials(winner.study)
        if trial.accuracy is not None
        and units.shown(metric, trial.accuracy) == shown
        and trial.number != winner.trial.number
    ]
    if tied:
        several = f"{len(tied)} other trials have" if len(tied) > 1 else "another trial has"
        notes.append(f"{several} this {units.spoken(metric)}: trials.csv has their values")
    for dimension in arm.ranges:
        if edge := space.at_edge(dimension, winner.trial.params[dimension.name]):
            notes.append(f"{dimension.name} is the {edge} of its range: widen it")
    return notes


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


@figures.style()
def page(
    title: str,
    lead: str,
    studies: Sequence[Study],
    results: Sequence[Result],
    lines: Sequence[tuple[str, str]],
    notes: Sequence[str],
    provenance: Provenance,
    metric: Metric = ACCURACY,
) -> str:
    """The HTML of a search: `results` are the winners' last fits, `lines` (study, note on its winner).

    `notes` are those on the data.
    """
    progress = figures.search_progress({study.name: study.trials for study in studies}, metric)
    rates = [picture for study in studies for picture in _curves(study, metric)]
    sections = [
        Section("Results", "results", _tuned(results, report.sentences(notes))),
        Section("Best values", "best", [Block(BEST, _best(studies, metric))]),
        Section("The search", "search", report.figure(PROGRESS, [progress])),
        Section("Learning rate", "rate", report.figure(CURVES, rates)),
    ]
    return report.render(
        report.brief(sections, notes), title=title, lead=lead, lists=[("", lines)], provenance=provenance
    )


@figures.style()
def range_page(
    name: str,
    lead: str,
    rates: np.ndarray,
    losses: np.ndarray,
    result: Suggestion,
    provenance: Provenance,
    unit: str = "nats",
) -> str:
    """The HTML of a range test: `rates` and `losses` (in `unit`) are those of its steps, float [steps] both."""
    picture = figures.range_test(name, rates, losses, result, unit)
    sections = [Section("Loss", "loss", report.figure(RANGE, [picture]))]
    return report.render(sections, title=f"learning-rate range test: {name}", lead=lead, provenance=provenance)


def _curves(study: Study, metric: Metric) -> list[figures.Picture | None]:
    """The charts of the metric and of loss against the learning rate; [] if the rate was not searched."""
    return [
        figures.searched_values(study.name, study.trials, RATE, field, dimension.kind == "log", metric)
        for dimension in study.ranges
        if dimension.name == RATE and dimension.kind != "in"
        for field in ("accuracy", "loss")
    ]


def _tuned(results: Sequence[Result], notes: str) -> list[Block]:
    """The tables of results, one for each label budget, with a row for each strategy."""
    panels = transfer.panels(results).items()
    return [
        Block(
            f"Tuned against tuned. {transfer.results_caption(panel)}{notes}",
            tables.results(panel, heading),
            heading=heading,
        )
        for heading, panel in panels
    ]


def _best(studies: Sequence[Study], metric: Metric) -> Table:
    """The table of the values that won, a row for each study."""
    names = list(dict.fromkeys(dimension.name for study in studies for dimension in study.ranges))
    rows = []
    for study in studies:
        [won] = [trial for trial in study.trials if trial.number == study.best]
        ends = {dimension.name: space.at_edge(dimension, won.values[dimension.name]) for dimension in study.ranges}
        edges = {name: f"the {end} of its range" for name, end in ends.items() if end}
        score = NOTHING if won.accuracy is None else units.shown(metric, won.accuracy)
        loss = NOTHING if won.loss is None else f"{won.loss:.3f}"
        values = [Cell(searched(won.values.get(name)), edges.get(name, "")) for name in names]
        measured = [Cell(score), Cell(loss), _trial_count(study.trials)]
        rows.append([Cell(study.name, f"trial {won.number}"), *values, *measured])
    columns = ["Study", *names, tables.of_test(metric, "Validation"), tables.of_loss(metric, "Validation"), "Trials"]
    return Table("Best values", columns, rows)


def _trial_count(trials: Sequence[TrialRecord]) -> Cell:
    """The cell with the number of trials that count, and below it how many diverged or were pruned."""
    pruned = sum(trial.state == "PRUNED" for trial in trials)
    diverged = sum(trial.diverged for trial in trials)
    complete = sum(trial.state == "COMPLETE" for trial in trials)
    words = [f"{number} {what}" for number, what in ((diverged, "diverged"), (pruned, "pruned")) if number]
    return Cell(count(complete + pruned), ", ".join(words))


def searched(value: Any) -> str:
    """The text of a searched value in a table.

    >>> searched(0.0123456), searched("relu")
    ('0.01235', 'relu')
    """
    return NOTHING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
