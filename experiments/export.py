"""Write a fit's parameters as safetensors.

    python -m experiments.export --checkpoint=runs/mnist_10k --output=mnist.safetensors

The parameters of a trained fit in one file of named arrays ("hidden_0/kernel"), and beside it FILE.safetensors.json,
the card that describes them (tljax/weights/README.md): a source for experiments.transfer, and a fit for
experiments.predict. What a strategy added to the model is merged into its ordinary parameters. With `--rules=vit_hf`
the arrays have the names and layout that those rules read (`tljax.weights.rules`), so that the library reads them.

    python -m experiments.export --checkpoint=runs/quickstart --fit=head_only --delta --output=head.safetensors

writes what differs from the base alone, leaves, or places and values where few numbers of a leaf changed, with the
digest of the base: the source that the fit started from, or --base. experiments.apply puts them together again.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
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
from tljax.types import InputError
from tljax.weights import delta


@dataclass(frozen=True)
class ExportFlags(FitFlags, RenamingFlags, ModelFlags, ComputeFlags):
    """Which fit is exported, and where to."""

    output: str | None = flag(None, "a new .safetensors file; needed", place="new")
    rules: str = flag("", "names and layout of the file: those that these rules read, vit_hf or FILE.rules")
    delta: bool = flag(False, "write what differs from the base alone")
    base: str | None = flag(
        None, "of --delta: a run, a checkpoint or weights; default: the source that the fit started from", place="path"
    )
    base_fit: str | None = flag(None, "which of several fits of --base")


def run(flags: Mapping[str, Any], export_flags: ExportFlags) -> Path:
    """Write the parameters and their card; returns the path of the parameters."""
    file = directory.new_file(export_flags.output, ".safetensors")
    directory.new_file(f"{file}.json", ".json")
    if export_flags.delta and export_flags.rules:
        raise InputError("--delta and --rules are both given: a delta has the names of the model; leave --rules out")
    if not export_flags.delta and (export_flags.base or export_flags.base_fit):
        raise InputError("--base is of --delta: give both, or leave it out")
    flat, source, model, measured = load_weights(flags, export_flags.checkpoint, export_flags.fit)
    if source.headless:  # the zeros in the place of its head are not its own
        flat = {path: leaf for path, leaf in flat.items() if path in source.names}
    arrays, format_of_library = (_layout(flat, export_flags), {"format": "pt"}) if export_flags.rules else (flat, None)
    difference = None
    if export_flags.delta:
        arrays, difference = _delta(flat, flags, export_flags)
    record = {
        "task": source.name,
        "classes": source.classes,
        "shape": sources.shape_to_json(source.shape),
        "resize": source.resize if source.resize != "squash" else None,
        "head": False if source.headless else None,
        "kind": source.kind if source.kind != "classes" and not source.headless else None,
        "outputs": source.outputs if source.kind != "classes" and not source.headless else None,
        "model": model,
        **_rules_of_card(export_flags.rules),
        **measured,
        "steps": source.steps,
        "fingerprint": source.fingerprint or None,
        "note": source.note or None,
        "delta": difference,
    }
    # transformers reads no file that does not say its format
    sources.write_weights(file, arrays, record, format_of_library)
    written = sum(array.size for array in arrays.values())
    total = sum(leaf.size for leaf in flat.values())
    numbers = f"{written:,} of {total:,}" if export_flags.delta else f"{total:,}"
    console.say(f"{len(arrays)} arrays, {numbers} numbers of {source.name}: {file}")
    return file


def _delta(
    flat: checkpoint.Flat, flags: Mapping[str, Any], export_flags: ExportFlags
) -> tuple[checkpoint.Flat, dict[str, Any]]:
    """(arrays, record) of what differs from the base."""
    place, fit = export_flags.base, export_flags.base_fit
    if place is None:
        if fit or sources.is_weights_file(export_flags.checkpoint):
            raise InputError("--base is not given: name what the delta is of, a run, a checkpoint or a file of weights")
        place, fit = sources.started_from(export_flags.checkpoint or "", export_flags.fit)
    base = sources.load_base(flags, place, fit)
    arrays, record = delta.between(base, flat)
    whole = sum(name.startswith(delta.WHOLE) for name in arrays)
    console.say(
        f"of {len(flat):,} leaves {whole:,} are written whole and {(len(arrays) - whole) // 2:,} as places and values, "
        f"as they differ from '{place}'"
    )
    return arrays, {"base": str(place), **record}


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
    """What a card says of rules: a name that is shipped, or each rule of a file of one's own.

    Arrays that rules drop were not written, so that such a rule would match nothing when the file is read.
    """
    if not name or name in weights.names():
        return {"rules": name or None}
    return {"rename": [rule.text for rule in weights.read_rules(name) if not rule.drop]}


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, ExportFlags)
