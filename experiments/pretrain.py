"""Train a source: a checkpoint a seed.

    python -m experiments.pretrain --source=mnist_10k --workdir=runs/mnist_10k

A checkpoint for `--source_checkpoint` is left in the run directory, with the results. Flags of the fit are the
source's here, by either of their names.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.runs import budgets, console, directory, fit, flags, plan, process
from experiments.runs.settings import CheckpointFlags, DataFlags, ModelFlags, Settings, SourceFlags, TrainFlags
from tljax import masks, models
from tljax.study.results import Result
from tljax.types import InputError


@dataclass(frozen=True)
class PretrainFlags(SourceFlags, CheckpointFlags, DataFlags, ModelFlags, TrainFlags):
    """A source is trained without a target and without strategies."""


def run(**flags: Any) -> list[Result]:
    """Train a source for each seed; their results. Keyword arguments are named like the flags."""
    made = Settings.from_flags(**flags)
    if made.source is None or made.source_checkpoint:
        raise InputError("--source is what this program trains: name a data set, and leave out --source_checkpoint")
    execution = process.prepare(made)
    task = plan.source_task(made)
    shape = tuple(task.train.images.shape[1:])
    for fault in plan.model_faults(made, made.build_model(len(task.classes)), shape):
        execution.on_message(fault)
    if made.dry_run:
        model = made.build_model(len(task.classes))
        params = models.abstract(model, shape)
        console.mask_table(task.name, params, masks.by_path(params, lambda path: True))
        console.notes(task.findings)
        return []
    with directory.opened(made, "pretrain") as folder:
        if process.first():
            directory.record_environment(folder, {task.name: task.fingerprint})
        lines = fit.train_sources(made, task, folder, execution)
        if process.first():
            directory.supersede(folder, list(lines.values()))
        accuracy = [100 * line.test_accuracy for line in lines.values() if line.test_accuracy is not None]
        held = budgets.notes(["all"], task, made.source_recipe.validation)
        noted = [*([task.note] if task.note else []), *held]
        mean = [f"mean {np.mean(accuracy):.2f} [{min(accuracy):.2f}, {max(accuracy):.2f}]"] if accuracy else []
        from experiments.pages import tables  # scipy takes a second to import

        console.show(tables.source_fits(task.name, folder, lines), [*mean, *noted])
    return list(lines.values())


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), lambda given, _: run(**given), PretrainFlags, refused=["source_checkpoint"])
