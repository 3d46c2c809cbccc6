"""What a network that has gone on to printed digits still knows of those written by hand, from which it came."""

from typing import Any

import numpy as np

from tljax import data
from tljax.types import Examples


def handwriting(split: str) -> list[Any]:
    """(image uint8 [28, 28, 1], class) of glyphs_digits_few's training split, or of mnist_10k's test split."""
    return _items(data.load("glyphs_digits_few").train if split == "train" else data.load("mnist_10k").test)


def _items(examples: Examples) -> list[Any]:
    images, classes = examples.inputs(np.arange(len(examples))), np.asarray(examples.targets)
    return list(zip(images, classes, strict=True))
