"""Write a fit's parameters as safetensors.

    python -m experiments.export --checkpoint=runs/mnist_10k --output=mnist.safetensors

The parameters of a trained fit in one file of named arrays ("hidden_0/kernel"), and beside it FILE.safetensors.json,
the card that describes them (experiments/runs/sources.py): a source for experiments.transfer, and a fit for
experiments.predict. What a strategy added to the model is merged into its ordinary parameters.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs import command_line, console, directory, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import ComputeFlags, ModelFlags, RenamingFlags
from experiments.runs.sources import FitFlags, load_weights


@dataclass(frozen=True)
class ExportFlags(FitFlags, RenamingFlags, ModelFlags, ComputeFlags):
    """Which fit is exported, and where to."""

    output: str | None = flag(None, "a new .safetensors file; needed", place="new")


def run(flags: Mapping[str, Any], export_flags: ExportFlags) -> Path:
    """Write the parameters and their card; returns the path of the parameters."""
    from safetensors.numpy import save

    file = directory.new_file("output", export_flags.output, ".safetensors")
    card = directory.new_file("output", f"{file}.json", ".json")
    flat, source, model, measured = load_weights(flags, export_flags.checkpoint, export_flags.fit)
    weights = save(flat)
    record = {
        "task": source.name,
        "classes": source.classes,
        "shape": sources.shape_to_json(source.shape),
        "resize": source.resize if source.resize != "squash" else None,
        "kind": source.kind if source.kind != "classes" else None,
        "outputs": source.outputs if source.kind != "classes" else None,
        "model": model,
        **measured,
        "steps": source.steps,
        "fingerprint": source.fingerprint or None,
        "note": source.note or None,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    directory.replace(file, weights)
    try:
        directory.write_record(card, {name: value for name, value in record.items() if value is not None})
    except OSError:
        file.unlink()  # it is useless without its card
        raise
    console.say(f"{len(flat)} arrays, {sum(leaf.size for leaf in flat.values()):,} numbers of {source.name}: {file}")
    return file


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, ExportFlags)
