"""Test sets that training sees nothing of: printed digits to learn from, digits written by hand to be judged on."""

from typing import Any

import numpy as np

from tljax import data
from tljax.types import Examples

SHAPE = (28, 28, 1)


def handwritten(split: str) -> list[Any]:
    """(image uint8 [28, 28, 1], class) of glyphs_digits' training split, or of the test splits of mnist_10k and of
    sklearn_digits."""
    if split == "train":
        return _items(data.load("glyphs_digits").train)
    return _items(data.load("mnist_10k").test) + _items(data.load("sklearn_digits", image_shape=SHAPE).test)


def scans(split: str) -> list[Any]:
    """The same training split, or both splits of sklearn_digits, since nothing learns from either."""
    if split == "train":
        return _items(data.load("glyphs_digits").train)
    task = data.load("sklearn_digits", image_shape=SHAPE)
    return _items(task.train) + _items(task.test)


def _items(examples: Examples) -> list[Any]:
    images, classes = examples.inputs(np.arange(len(examples))), np.asarray(examples.targets)
    return list(zip(images, classes, strict=True))
