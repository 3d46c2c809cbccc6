"""`--lr_range_test` of a search: one fit whose learning rate rises, its picture, and the rate that it suggests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import command_line, console, directory, fit, plan, process, search_flags, trials
from experiments.runs.search_flags import Search
from experiments.runs.settings import GROWING, Settings
from tljax import plugins, train
from tljax.study import range_test
from tljax.types import InputError

LEAST = 10
"""Steps, below which a curve shows nothing."""


def run(
    flag_values: Mapping[str, Any],
    trial_flags: Mapping[str, Any],
    search: Search,
    execution: train.Execution,
    stand_ins: Mapping[int, int] | None = None,
) -> range_test.Suggestion:
    """Train the first strategy once, as the trials are but at a rising rate; print and draw what its loss says.

    `flag_values` are the flags, `trial_flags` those of the trials, and `stand_ins` as `plan.prepare` takes them. The
    run directory gets lr_range_test.html, and the source if it is not there yet. Raises InputError for a fit of too few
    steps, and for a loss that is not finite at the lowest rate.
    """
    from experiments.pages import search as page  # draws: matplotlib takes a second to import

    several = Settings.from_flags(**trial_flags)
    first = {name: getattr(several, name)[:1] for name in GROWING}
    trial_settings = Settings.from_flags(**{**trial_flags, **first})
    experiment = plan.prepare(trial_settings, execution, only=True, stand_ins=stand_ins)
    settings = Settings.from_flags(**flag_values)
    rate_lines = [f"--lr_low={search.lr_low!r}", f"--lr_high={search.lr_high!r}"]
    own_lines = [*search_flags.to_flags(search), "--lr_range_test=true", *rate_lines]
    with directory.opened(settings, "search", _kept_flags(settings, own_lines), older=trial_settings) as folder:
        rates, losses = swept(experiment, search, folder)
        result = range_test.suggested(rates, losses)
        name = f"{plugins.called(trial_settings.strategies[0])} at {trial_settings.train_examples[0]}"
        _, notes = plan.title_and_notes(trial_settings, experiment.source, experiment.target)
        lines = [*_sentences(name, rates, result), *notes]
        for line in lines:
            console.say(line)
        provenance = page.provenance_of(
            [*own_lines, *settings.flagfile_lines()], directory.environment(plan.fingerprints(experiment))
        )
        unit = "" if experiment.target.kind == "values" else "nats"
        text = page.range_page(name, ". ".join(lines) + ".", rates, losses, result, provenance, unit)
        if process.first():
            directory.replace(folder / "lr_range_test.html", text)
        console.say(f"report: {folder / 'lr_range_test.html'}")
    return result


def _kept_flags(settings: Settings, own_lines: Sequence[str]) -> Sequence[str]:
    """The search's own lines of the run directory's flagfile: those of a search that it holds stay as they are."""
    folder = Path(settings.workdir or "")
    is_recorded = (folder / "flags.flags").is_file()
    lines_of_search = directory.recorded_lines(folder, command_line.kinds(Search)) if is_recorded else []
    searched = lines_of_search and not any(line.startswith("--lr_range_test") for line in lines_of_search)
    return lines_of_search if searched else own_lines


def swept(experiment: plan.Experiment, search: Search, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(rate, training loss) of each step, float32 [steps] both."""
    [seed], [budget] = experiment.settings.seeds, experiment.settings.train_examples
    task = trials.search_task(experiment, budget)
    trained = fit.obtain_source(experiment.settings, experiment.source, folder, experiment.execution)
    prepared = trials.prepare(task, experiment, seed, trained)
    steps = len(prepared.trial.rates)
    if steps < LEAST:
        raise InputError(f"--lr_range_test has {steps} steps: give more --epochs or --steps, {LEAST} at least")
    rates = range_test.rates(search.lr_low, search.lr_high, steps)
    rising = prepared._replace(trial=prepared.trial._replace(rates=rates, rules=()))
    logs = [point.log for point in fit.drive(task.on_device, [rising], evaluated=False)]
    losses = np.hstack([log.loss[0] for log in logs])
    if not np.isfinite(losses[0]):
        raise InputError(f"--lr_low={search.lr_low:g}: the loss is not finite from the first step on: lower it")
    return rates, losses


def _sentences(name: str, rates: np.ndarray, result: range_test.Suggestion) -> list[str]:
    """The suggestion, by which rule, and what was in its way."""
    lines = [
        f"learning-rate range test of {name}: {len(rates)} steps, the rate rising exponentially from {rates[0]:.3g} "
        f"to {rates[-1]:.3g}",
        f"the smoothed loss is lowest, {result.smooth.min():.3f}, at {result.lowest:.3g}; suggested: "
        f"--learning_rate={result.rate:.2g}, {range_test.SHARE:g} of it",
    ]
    if result.diverged is not None:
        lines.append(f"the loss is not finite from {result.diverged:.3g} on")
    if result.edge == "highest":
        lines.append("the loss falls up to the highest rate: raise --lr_high")
    if result.edge == "lowest":
        lines.append("the suggestion is below the lowest rate: lower --lr_low")
    return lines
