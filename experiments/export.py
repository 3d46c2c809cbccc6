"""Write a fit's parameters as safetensors.

    python -m experiments.export --checkpoint=runs/mnist_10k --output=mnist.safetensors

The parameters of a trained fit in one file of named arrays ("hidden_0/kernel"), and beside it FILE.safetensors.json,
the card that describes them (experiments/runs/sources.py): a source for experiments.transfer, and a fit for
experiments.predict. What a strategy added to the model is merged into its ordinary parameters. With `--rules=vit_hf`
the arrays have the names and layout that those rules read (`tljax.weights.rules`), so that the library reads them.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import command_line, console, directory, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import ComputeFlags, ModelFlags, RenamingFlags
from experiments.runs.sources import FitFlags, load_weights
from tljax import checkpoint, weights


@dataclass(frozen=True)
class ExportFlags(FitFlags, RenamingFlags, ModelFlags, ComputeFlags):
    """Which fit is exported, and where to."""

    output: str | None = flag(None, "a new .safetensors file; needed", place="new")
    rules: str = flag("", "names and layout of the file: those that these rules read, vit_hf or FILE.rules")


def run(flags: Mapping[str, Any], export_flags: ExportFlags) -> Path:
    """Write the parameters and their card; returns the path of the parameters."""
    from safetensors.numpy import save

    file = directory.new_file("output", export_flags.output, ".safetensors")
    card = directory.new_file("output", f"{file}.json", ".json")
    flat, source, model, measured = load_weights(flags, export_flags.checkpoint, export_flags.fit)
    arrays, format_of_library = (_layout(flat, export_flags), {"format": "pt"}) if export_flags.rules else (flat, None)
    bytes_of_weights = save(arrays, format_of_library)  # transformers reads no file that does not say its format
    record = {
        "task": source.name,
        "classes": source.classes,
        "shape": sources.shape_to_json(source.shape),
        "resize": source.resize if source.resize != "squash" else None,
        "kind": source.kind if source.kind != "classes" else None,
        "outputs": source.outputs if source.kind != "classes" else None,
        "model": model,
        **_rules_of_card(export_flags.rules),
        **measured,
        "steps": source.steps,
        "fingerprint": source.fingerprint or None,
        "note": source.note or None,
        "weights_sha256": hashlib.sha256(bytes_of_weights).hexdigest(),
    }
    directory.replace(file, bytes_of_weights)
    try:
        directory.write_record(card, {name: value for name, value in record.items() if value is not None})
    except OSError:
        file.unlink()  # it is useless without its card
        raise
    console.say(f"{len(arrays)} arrays, {sum(leaf.size for leaf in flat.values()):,} numbers of {source.name}: {file}")
    return file


def _layout(flat: checkpoint.Flat, export_flags: ExportFlags) -> dict[str, np.ndarray]:
    """The parameters in the layout of the rules; arrays of a file that is exported anew keep their dtype.

    Raises InputError for what is no rule, or has no way back.
    """
    rules, place = weights.read_rules(export_flags.rules), export_flags.checkpoint or ""
    dtypes = {}
    if sources.is_weights_file(place):
        dtypes = {name: array.dtype for name, array in weights.read(Path(place)).items()}
    arrays = weights.exported(flat, rules, dtypes)
    if dropped := [rule.source for rule in rules if rule.drop]:
        console.say(f"not written, as {export_flags.rules} leaves them out when it reads: {', '.join(dropped)}")
    return arrays


def _rules_of_card(name: str) -> dict[str, Any]:
    """What a card says of rules: a name that is shipped, or each rule of a file of one's own."""
    if not name or name in weights.names():
        return {"rules": name or None}
    return {"rename": [rule.text for rule in weights.read_rules(name)]}


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, ExportFlags)
