"""Put a delta of experiments.export and its base together.

    python -m experiments.apply head.safetensors --base=runs/mnist_10k --base_fit=pretrain --output=whole.safetensors

The whole parameters, to the bit, and their card: a source and a fit like any that experiments.export wrote. The base is
a run, a checkpoint in it, or weights from elsewhere (with --source_rules as they were); another one than the delta was
made of is refused, and so is a delta that is not as it was written.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments.runs import command_line, console, directory, fields, sources
from experiments.runs.command_line import flag
from experiments.runs.settings import ComputeFlags, ModelFlags, RenamingFlags
from tljax import weights
from tljax.types import InputError
from tljax.weights import delta as deltas

_RECORD: fields.Form = {"base": str, "base_sha256": str, "result_sha256": str, "dropped": [str]}
"""What the card of a delta says of it."""


@dataclass(frozen=True)
class ApplyFlags(RenamingFlags, ModelFlags, ComputeFlags):
    """Which delta, and what it is of."""

    ARGUMENT: ClassVar[str] = "delta"
    delta: str | None = flag(
        None, "the file that experiments.export wrote; may stand without --delta=; needed", place="path"
    )
    base: str | None = flag(None, "what it is of: a run, a checkpoint or weights; needed", place="path")
    base_fit: str | None = flag(None, "which of several fits of --base: its name in results.jsonl")
    output: str | None = flag(None, "a new .safetensors file; needed", place="new")


def run(flags: Mapping[str, Any], apply_flags: ApplyFlags) -> Path:
    """Write the whole parameters and their card; returns the path of the parameters."""
    output = directory.new_file(apply_flags.output, ".safetensors")
    directory.new_file(f"{output}.json", ".json")
    if not apply_flags.delta or not apply_flags.base:
        raise InputError("--delta and --base are needed: name the file of experiments.export, and what it is of")
    file = Path(apply_flags.delta)
    card = _card(file)
    base = sources.load_base(flags, apply_flags.base, apply_flags.base_fit)
    try:
        params = deltas.applied(base, weights.read(file), card["delta"])
    except InputError as error:
        raise InputError(f"'{file}' and --base={apply_flags.base}: {error}") from error
    record = {name: value for name, value in card.items() if name not in ("delta", "weights_sha256")}
    sources.write_weights(output, params, record)
    numbers = sum(leaf.size for leaf in params.values())
    console.say(f"{len(params)} arrays, {numbers:,} numbers of {record['task']}: {output}")
    return output


def _card(file: Path) -> dict[str, Any]:
    """The card of a delta, once it and the file are as they were written."""
    if not file.is_file() or file.suffix != ".safetensors":
        raise InputError(f"--delta={file}: name a .safetensors file that experiments.export --delta wrote")
    place = file.with_name(f"{file.name}.json")
    card = directory.read_record(place) if place.is_file() else None
    if card is None or "delta" not in card:
        raise InputError(
            f"--delta={file}: '{place}' says of no delta: name a file that experiments.export --delta wrote"
        )
    if fault := fields.fault(card["delta"], _RECORD, "delta"):
        raise InputError(f"'{place}': {fault}: export it again")
    if card.get("weights_sha256") != sources.file_digest(file) or not isinstance(card.get("task"), str):
        raise InputError(f"'{file}' is not as it was written, or has another's card: restore it, or export it again")
    return card


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, ApplyFlags)
