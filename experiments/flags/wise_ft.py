"""Font digits to train on, and digits written by hand to test on: a shift that training sees nothing of."""

from typing import Any

import numpy as np

from tljax import data


def shifted(split: str) -> list[Any]:
    """(image uint8 [28, 28, 1], class) of glyphs_digits' training split, or of sklearn_digits' test split."""
    task = data.load("glyphs_digits") if split == "train" else data.load("sklearn_digits", image_shape=(28, 28, 1))
    examples = task.train if split == "train" else task.test
    images, classes = examples.inputs(np.arange(len(examples))), np.asarray(examples.targets)
    return list(zip(images, classes, strict=True))
