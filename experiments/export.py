"""Take a fit out: `python -m experiments.export --checkpoint=DIR --output=FILE.safetensors`

The parameters of a trained fit in one file of named arrays ("hidden_0/kernel"), and beside it FILE.safetensors.json,
the card that says what they are of (experiments/elsewhere.py): a source for experiments.transfer, and a fit for
experiments.predict. What a strategy added to the model is merged into its ordinary parameters.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import commandline, console, options, sources, trained, workdir
from tljax import checkpoint

HELP = f"""
Export (flags of experiments.transfer beside it; those of the model are the fit's unless given):{trained.HELP}
  --output      a new .safetensors file"""


def run(given: Mapping[str, Any], place: str | None, fit: str | None, output: str | None) -> Path:
    """Write what the flags say; the file."""
    from safetensors.numpy import save

    file = workdir.new("output", output, ".safetensors")
    card = workdir.new("output", f"{file}.json", ".json")
    made, one = trained.load(given, place, fit)
    flat = checkpoint.flatten(one.params)
    source = one.source
    told = {
        "task": source.name,
        "classes": source.classes,
        "shape": source.shape,
        "model": sources.architecture(made),
        "accuracy": one.accuracy,
        "steps": source.steps,
        "fingerprint": source.fingerprint or None,
        "note": source.note or None,
    }
    text = json.dumps({name: value for name, value in told.items() if value is not None}, indent=1) + "\n"
    workdir.replace(file, save(flat))
    try:
        workdir.replace(card, text)
    except OSError:
        file.unlink()  # without its card it is of no use
        raise
    console.say(f"{len(flat)} arrays, {sum(leaf.size for leaf in flat.values()):,} numbers of {source.name}: {file}")
    return file


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    if commandline.asks_help(argv):
        options.parse(argv, str(__doc__) + HELP)
        return
    values = flags.FlagValues()
    for name in ("checkpoint", "fit", "output"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    given = options.parse(commandline.read_known(values, argv), str(__doc__)) or {}
    run(given, values.checkpoint, values.fit, values.output)


if __name__ == "__main__":
    console.run_main(main)
