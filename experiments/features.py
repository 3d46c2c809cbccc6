"""Write the features that a stage of a source computes of a data set.

    python -m experiments.features --source_checkpoint=runs/mnist_10k --dataset=fashion_mnist_10k --output=runs/features

The outputs of a stage for every image of a data set, on disk: train.npy and test.npy (memory maps [n, d]) beside
features.json, which names their source, stage and data. The model is the source's, unless its flags are given.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs import command_line, console, features, plan, process, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import CheckpointFlags, ComputeFlags, DataFlags, ModelFlags, RenamingFlags, SeedFlags
from tljax.types import InputError


@dataclass(frozen=True)
class FeaturesFlags(CheckpointFlags, RenamingFlags, DataFlags, ModelFlags, SeedFlags, ComputeFlags):
    """Which features are written, and where."""

    dataset: str | None = flag(None, "whose images, brought to the source's shape; needed", place="data")
    stage: str | None = flag(None, "of the model, such as hidden_0; default the last before the head")
    output: str | None = flag(None, "a new folder, or one with the same features; needed", place="new")
    dtype: str = flag("float32", "of the arrays, float32 or float16")


def run(flags: Mapping[str, Any], features_flags: FeaturesFlags) -> Path:
    """Compute the features unless the folder holds them; returns the folder."""
    place = flags.get("source_checkpoint")
    for name, value in (
        ("source_checkpoint", place),
        ("dataset", features_flags.dataset),
        ("output", features_flags.output),
    ):
        if not value:
            raise InputError(f"--{name} is not given: see --helpfull")
    settings = sources.settings_of(flags, str(place))
    process.prepare(settings)
    loaded = sources.load(settings)
    task = plan.load_task(settings, str(features_flags.dataset), settings.image_shape or loaded.source.shape)
    features.same_shape(loaded, task)
    folder, stage = Path(str(features_flags.output)), features_flags.stage or sources.before_head(loaded.model)
    features.write(loaded, task, {stage: folder}, features_flags.dtype)
    arrays = features.read(folder, loaded, task, stage, features_flags.dtype)
    shapes = " and ".join(f"{split} {list(array.shape)}" for split, array in arrays._asdict().items())
    console.notes(task.findings)
    console.say(f"{stage} of {loaded.source.name} on {task.name}: {shapes}, {features_flags.dtype}, in {folder}")
    return folder


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, FeaturesFlags)
