"""Predict images: `python -m experiments.predict --checkpoint=DIR --images=FOLDER --output=FILE.csv`

What a trained fit says of every image: a CSV with a row an image, of its name (or row from 0), the class that is
predicted, and the probability of each class. It takes the flags of experiments.transfer for the machine.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import commandline, console, options, trained, workdir
from experiments.origin import Origin
from tljax import evaluate, train
from tljax.data import unlabelled
from tljax.types import InputError

HELP = f"""
Prediction (flags of experiments.transfer beside it; those of the model are the fit's unless given):{trained.HELP}
  --images      a folder of pictures (.png, .jpg), one of them, or an .npz file with images or test_images
  --output      a new .csv file"""


def probabilities(one: Origin, images: np.ndarray) -> np.ndarray:
    """float64 [n, classes] of images [n, ...] as the fit takes them: the softmax of its logits.

    Raises InputError for an image of which the logits are not finite.
    """
    from scipy.special import softmax

    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], one.params)
    logits = evaluate.logits(train.applied(one.model), params, (evaluate.padded(images),), len(images))[0]
    odd = np.flatnonzero(~np.isfinite(logits).all(-1))
    if len(odd):
        raise InputError(f"image {odd[0]} gives logits that are not finite: its numbers are too large, so scale them")
    return np.asarray(softmax(logits.astype(np.float64), axis=-1))


def table(names: Sequence[str], classes: Sequence[str], given: np.ndarray) -> str:
    """The CSV of probabilities [n, classes], with nine digits.

    >>> table(["a.png"], ["cat", "dog"], np.array([[0.25, 0.75]])).splitlines()
    ['image,predicted,cat,dog', 'a.png,dog,0.25,0.75']
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["image", "predicted", *classes])
    for name, row in zip(names, given, strict=True):
        writer.writerow([name, classes[row.argmax()], *(f"{value:.9g}" for value in row)])
    return out.getvalue()


def run(
    given: Mapping[str, Any], checkpoint: str | None, fit: str | None, images: str | None, output: str | None
) -> Path:
    """Predict what the flags say; the file."""
    if not images:
        raise InputError("--images is not given: name a folder of pictures, one of them, or an .npz file")
    file = workdir.new("output", output, ".csv")
    _, one = trained.load(given, checkpoint, fit)
    names, pixels = unlabelled.load(Path(images), one.source.shape)
    text = table(names, one.source.classes, probabilities(one, pixels))
    workdir.replace(file, text.encode("utf-8", "surrogateescape"))  # a file's name need not be text
    console.say(f"{len(names):,} images, {len(one.source.classes)} classes of {one.source.name}: {file}")
    return file


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    if commandline.asks_help(argv):
        options.parse(argv, str(__doc__) + HELP)
        return
    values = flags.FlagValues()
    for name in ("checkpoint", "fit", "images", "output"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    given = options.parse(commandline.read_known(values, argv), str(__doc__)) or {}
    run(given, values.checkpoint, values.fit, values.images, values.output)


if __name__ == "__main__":
    console.run_main(main)
