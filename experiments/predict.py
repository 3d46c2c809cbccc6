"""Predict classes and probabilities of images with a fit, or whatever its targets are.

    python -m experiments.predict --checkpoint=runs/mnist_10k --images=FOLDER --output=predicted.csv

The predictions of a trained fit for every image: a CSV with a row for each image, with its name (or row from 0), the
predicted class, and the probability of each class in a column p(CLASS). A cell that a spreadsheet would take for a
formula begins with an apostrophe. The model is the fit's, unless its flags are given.

A fit of several labels writes all labels that are more likely than not, with semicolons, and p(LABEL) of each; one of
values writes each value; one of tokens the likeliest token after each token, as numbers with spaces.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.pages.csv_cells import cell
from experiments.runs import command_line, console, directory
from experiments.runs.command_line import flag
from experiments.runs.settings import ComputeFlags, ModelFlags, RenamingFlags
from experiments.runs.sources import FitFlags, LoadedSource, load_fit
from tljax import evaluate, paths, train
from tljax.data import unlabelled
from tljax.types import InputError


@dataclass(frozen=True)
class PredictFlags(FitFlags, RenamingFlags, ModelFlags, ComputeFlags):
    """Which fit predicts which images."""

    images: str | None = flag(
        None, "a folder of .png and .jpg, one of them, or an .npz with test_images (or test_inputs); needed"
    )
    output: str | None = flag(None, "a new .csv file; needed", place="new")


def probabilities(loaded: LoadedSource, images: np.ndarray) -> np.ndarray:
    """Probabilities float64 [n, classes] of images [n, ...] as the fit takes them: the softmax of its logits.

    Raises InputError for an image whose logits are not finite.
    """
    from scipy.special import softmax

    return np.asarray(softmax(outputs(loaded, images).astype(np.float64), axis=-1))


def outputs(loaded: LoadedSource, inputs: Any) -> np.ndarray:
    """The outputs float32 [n, ...] of a fit for inputs, leaves [n, ...]; raises InputError unless they are finite."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], loaded.params)
    count = len(jax.tree.leaves(inputs)[0])
    logits = evaluate.logits(train.forward(loaded.model), params, evaluate.padded(inputs), count)()[0]
    odd = np.flatnonzero(~np.isfinite(logits).reshape(count, -1).all(-1))
    if len(odd):
        raise InputError(f"image {odd[0]} gives logits that are not finite: {_why_not_finite(loaded, inputs, odd[0])}")
    return logits


def _why_not_finite(loaded: LoadedSource, inputs: Any, row: int) -> str:
    """Whether the numbers of an input are too large, or the weights: outputs for the input scaled to 1 tell."""

    def scaled(leaf: Any) -> np.ndarray:
        part = np.asarray(leaf)[row : row + 1]
        return part / np.maximum(np.abs(part).max(initial=0), 1) if np.issubdtype(part.dtype, np.floating) else part

    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], loaded.params)
    small = evaluate.padded(jax.tree.map(scaled, inputs))
    if np.isfinite(evaluate.logits(train.forward(loaded.model), params, small, 1)()).all():
        return "its numbers are too large, so scale them"
    sizes = {path: float(np.abs(leaf).max(initial=0)) for path, leaf in paths.items(loaded.params)}
    largest = max(sizes, key=lambda path: sizes[path])
    return f"the weights are too large, '{largest}' up to {sizes[largest]:.3g}, so give others"


def table(names: Sequence[str], classes: Sequence[str], predicted: np.ndarray) -> str:
    """The CSV of predicted probabilities [n, classes], with nine digits.

    Raises InputError if two classes have one name.

    >>> table(["a.png"], ["cat", "dog"], np.array([[0.25, 0.75]])).splitlines()
    ['image,predicted,p(cat),p(dog)', 'a.png,dog,0.25,0.75']
    """
    if len(set(classes)) < len(classes):
        raise InputError(f"a class name occurs twice in {paths.some(list(classes))}: give each class its own name")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["image", "predicted", *(f"p({name})" for name in classes)])
    for name, row in zip(names, predicted, strict=True):
        writer.writerow([cell(name), cell(classes[row.argmax()]), *(f"{value:.9g}" for value in row)])
    return out.getvalue()


def table_of(kind: str, names: Sequence[str], labels: Sequence[str], predicted: np.ndarray) -> str:
    """The CSV of the outputs float [n, ...] of a fit whose targets are labels, values or tokens, with nine digits.

    >>> table_of("values", ["0"], ["height"], np.array([[1.5]])).splitlines()
    ['item,height', '0,1.5']
    >>> table_of("labels", ["0"], ["red", "round"], np.array([[2.0, -2.0]])).splitlines()
    ['item,predicted,p(red),p(round)', '0,red,0.880797078,0.119202922']
    >>> table_of("tokens", ["0"], [], np.array([[[0.0, 1.0], [3.0, 1.0]]])).splitlines()
    ['item,predicted', '0,1 0']
    """
    from scipy.special import expit

    several = [str(number) for number in range(predicted.shape[-1])]
    called = list(labels) or several
    if len(set(called)) < len(called):
        raise InputError(f"a name occurs twice in {paths.some(called)}: give each its own name")
    rows: list[list[str]] = []
    if kind == "labels":
        header = ["item", "predicted", *(f"p({name})" for name in called)]
        for name, chances in zip(names, expit(predicted.astype(np.float64)), strict=True):
            likely = ";".join(label for label, chance in zip(called, chances, strict=True) if chance > 0.5)
            rows.append([cell(name), cell(likely), *(f"{chance:.9g}" for chance in chances)])
    elif kind == "values":
        header = ["item", *(map(cell, called) if labels else (f"value {number}" for number in several))]
        rows = [[cell(name), *(f"{value:.9g}" for value in row)] for name, row in zip(names, predicted, strict=True)]
    else:
        header = ["item", "predicted"]
        likeliest = predicted.argmax(-1)
        rows = [[cell(name), " ".join(map(str, row))] for name, row in zip(names, likeliest, strict=True)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def run(flags: Mapping[str, Any], predict_flags: PredictFlags) -> Path:
    """Predict the images and write the file; returns its path."""
    if not predict_flags.images:
        raise InputError("--images is not given: name a folder of pictures, one of them, or an .npz file")
    file = directory.new_file(predict_flags.output, ".csv")
    _, loaded = load_fit(flags, predict_flags.checkpoint, predict_flags.fit)
    if loaded.source.headless:
        raise InputError(
            f"'{predict_flags.checkpoint}' has no head, by its card, and so predicts nothing: train one with "
            "experiments.transfer, or take its features with experiments.features"
        )
    names, pixels, left_out = unlabelled.load(Path(predict_flags.images), loaded.source.shape, loaded.source.resize)
    if left_out:
        several = len(left_out) > 1
        verbs = "files are no .png, .jpg or .jpeg and were" if several else "file is no .png, .jpg or .jpeg and was"
        console.say(f"  {len(left_out):,} {verbs} left out: {paths.some(left_out)}")
    is_array = isinstance(pixels, np.ndarray)
    if is_array and np.issubdtype(pixels.dtype, np.floating) and pixels.ndim == 4 and pixels.max(initial=0) > 1:
        console.say(f"  floats are taken as they are, and pixels as 0 to 1: the largest here is {pixels.max():.6g}")
    source, kind = loaded.source, loaded.source.kind
    if kind == "classes":
        text = table(names, source.classes, probabilities(loaded, pixels))
    else:
        text = table_of(kind, names, source.classes, outputs(loaded, pixels))
    directory.replace(file, text.encode("utf-8", "surrogateescape"))  # a file's name need not be text
    things = "images" if is_array and pixels.ndim == 4 else "items"
    what = f"{len(source.classes)} classes" if kind == "classes" else f"{kind}"
    console.say(f"{len(names):,} {things if kind != 'classes' else 'images'}, {what} of {source.name}: {file}")
    return file


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, PredictFlags)
