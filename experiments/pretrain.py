"""Train a source, with a checkpoint for each seed.

    python -m experiments.pretrain --source=mnist_10k --workdir=runs/mnist_10k

A checkpoint for `--source_checkpoint` is left in the run directory, with the results. Flags of the fit are the
source's here, by either of their names.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.runs import budgets, command_line, console, costs, directory, fit, plan, process, times
from experiments.runs.settings import CheckpointFlags, DataFlags, ModelFlags, Settings, SourceFlags, TrainFlags
from tljax import batch_stats, masks, models
from tljax.study import units
from tljax.study.results import Result, score
from tljax.study.results import metric as metric_of
from tljax.types import InputError


@dataclass(frozen=True)
class PretrainFlags(SourceFlags, CheckpointFlags, DataFlags, ModelFlags, TrainFlags):
    """A source is trained without a target and without strategies."""


def run(**flags: Any) -> list[Result]:
    """Train a source for each seed; returns their results. Keyword arguments are named like the flags."""
    with times.noted("pretrain") as noted:
        return _run(flags, noted)


def _run(flags: Mapping[str, Any], noted: times.Times) -> list[Result]:
    settings = Settings.from_flags(**flags)
    if settings.source is None or settings.source_checkpoint:
        raise InputError("--source is what this program trains: name a data set, and leave out --source_checkpoint")
    execution = noted.watched(process.prepare(settings))
    task = plan.source_task(settings)
    plan.require_shared_microbatches(settings, execution)
    shape = plan.example_shape(task)
    for fault in plan.model_faults(settings, settings.build_model(task.outputs), shape):
        execution.on_message(fault)
    if settings.dry_run:
        model = settings.build_model(task.outputs, settings.source_recipe)
        params, _ = batch_stats.split(models.abstract(model, shape))
        everything, decays = masks.by_path(params, lambda path: True), plan.decays(settings.source_recipe, params)
        outlined = fit.outlined(task, settings.source_recipe, execution)
        blank = Result(name="", target="", strategy="", seed=0)
        prepared = fit.prepare_source(settings, outlined, settings.seeds[0], blank)
        console.mask_table(task.name, params, everything, decays, costs.in_words(outlined, prepared))
        console.notes([*plan.augment_notes(settings.source_recipe, task), *task.findings])
        return []
    with directory.opened(settings, "pretrain") as folder:
        if process.first():
            directory.record_environment(folder, {task.name: task.fingerprint})
        results = fit.train_sources(settings, task, folder, execution)
        if process.first():
            directory.supersede(folder, list(results.values()))
        metric = metric_of(next(iter(results.values())))
        values = [units.factor(metric) * value for each in results.values() if (value := score(each)) is not None]
        short = budgets.notes(["all"], task, settings.source_recipe.validation)
        notes = [*([task.note] if task.note else []), *short]
        numbers = (np.mean(values), min(values), max(values)) if values else ()
        mean = (
            ["mean {} [{}, {}]".format(*(f"{number:.{units.digits(metric)}f}" for number in numbers))] if values else []
        )
        from experiments.pages import tables  # scipy takes a second to import

        console.show(tables.source_fits(task.name, folder, results), [*mean, *notes])
        noted.leave(folder)
    return list(results.values())


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), lambda flags, _: run(**flags), PretrainFlags, refused=["source_checkpoint"])
