"""Findings in data that can hardly be meant, and still might be: every table says them, and nothing is refused."""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from tljax.paths import some
from tljax.types import ArrayExamples, Examples

_CHUNK = 2**24
"""How many bytes are read at once."""
_LARGE, _SMALL = 10.0, 0.02
"""A root mean square above _LARGE, or a largest number of at most _SMALL, is far from the unit scale of models."""
_DARK = 25
"""Of 255. A data set whose brightest pixel is at most this is nearly black."""
_RATIO = 10.0
"""The largest ratio of the root mean squares of two splits of one scale."""


def lines(train: Examples, test: Examples, classes: tuple[str, ...], kind: str = "classes") -> tuple[str, ...]:
    """The findings, a line each; none for data as they ought to be. Splits are as `checks.checked` makes them.

    Findings are: classes without an example, and labels that all examples of a split have, or none; images that are all
    the same or of one value each; numbers or pixels far from the scale that models take, or of two scales; test
    examples or groups that are in the training set too (equal to the byte); and training examples that occur with two
    labels. Of several inputs each is looked at by itself; of examples that are read by row some are, and the line says
    so.
    """
    splits = {"train": train, "test": test}
    lacking = {"classes": _lacking, "labels": _one_sided}.get(kind)
    return (
        *(line for word, split in splits.items() if lacking for line in lacking(word, split, classes)),
        *_in_inputs(train, test, kind),
        *_groups(train, test),
    )


def _in_inputs(train: Examples, test: Examples, kind: str) -> Iterator[str]:
    if isinstance(train, ArrayExamples) and isinstance(test, ArrayExamples):
        for pair in _by_input(train, test):
            yield from _in_arrays(*pair)
        yield from _twice(train, test, kind)
    else:
        some_of_each = _sample(train), _sample(test)
        among = f"among {' and '.join(f'{len(part):,}' for part in some_of_each)} examples that were looked at: "
        for before, *splits in _by_input(*some_of_each):
            yield from _in_arrays(f"{among}{before}", *splits)


_SAMPLED, _SAMPLE_BYTES = 100, 2**26
"""Of examples that are read by row so many are looked at, or as many as are so many bytes."""


def _sample(split: Examples) -> ArrayExamples:
    """Some examples of a split, evenly spread."""
    size = sum(np.dtype(leaf.dtype).itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(split.spec))
    count = min(len(split), _SAMPLED, max(2, _SAMPLE_BYTES // max(1, size)))
    rows = np.linspace(0, len(split) - 1, count).astype(np.int64)
    return ArrayExamples(split.inputs(rows), split.targets[rows])


def _by_input(train: ArrayExamples, test: ArrayExamples) -> Iterator[tuple[str, ArrayExamples, ArrayExamples]]:
    """(what its lines begin with, train, test) of each input."""
    if not isinstance(train.arrays, dict):
        yield "", train, test
        return
    for name in train.arrays:
        parts = [ArrayExamples(split.arrays[name], split.targets) for split in (train, test)]
        yield f"input '{name}': ", parts[0], parts[1]


def _in_arrays(before: str, train: ArrayExamples, test: ArrayExamples) -> Iterator[str]:
    """The findings in one array of inputs of each split."""
    dtype_findings = {"u": _pixels, "f": _numbers}.get(train.arrays.dtype.kind)
    lines = [line for word, split in (("train", train), ("test", test)) for line in _constant(word, split)]
    yield from (f"{before}{line}" for line in (*lines, *(dtype_findings(train, test) if dtype_findings else ())))


def _word(split: str) -> str:
    return "training" if split == "train" else split


def _lacking(word: str, split: Examples, classes: tuple[str, ...]) -> Iterator[str]:
    counts = np.bincount(split.targets, minlength=len(classes))
    lacking = [name for name, count in zip(classes, counts, strict=True) if not count]
    if lacking:
        several = "es" * (len(lacking) > 1)
        verb = "have" if several else "has"
        yield f"class{several} {some(lacking, 6)} of {len(classes)} {verb} no {_word(word)} example"


def _one_sided(word: str, split: Examples, labels: tuple[str, ...]) -> Iterator[str]:
    share = split.targets.mean(axis=0)
    for verb, names in (
        ("no", [name for name, part in zip(labels, share, strict=True) if part == 0]),
        ("every", [name for name, part in zip(labels, share, strict=True) if part == 1]),
    ):
        if names:
            yield f"{verb} {_word(word)} example has label{'s' * (len(names) > 1)} {some(names, 6)}"


def _constant(word: str, split: ArrayExamples) -> Iterator[str]:
    n = len(split.arrays)
    if n > 1 and _all(split.arrays, lambda rows: (rows == np.asarray(split.arrays[:1])).all()):
        yield f"all {n:,} {_word(word)} examples are the same"
    elif (
        np.size(split.arrays[0]) > 1
        and split.arrays.dtype != np.int32
        and _all(split.arrays, lambda rows: (rows == rows[:, :1]).all(), flat=True)
    ):
        yield f"every {_word(word)} example is of one value"


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """The images in chunks [rows, ...], so small that memory-mapped data need not fit into memory."""
    rows = max(1, _CHUNK // max(1, images[0].nbytes))
    for first in range(0, len(images), rows):
        yield np.asarray(images[first : first + rows])


def _all(images: np.ndarray, holds: Callable[[np.ndarray], np.bool_], flat: bool = False) -> bool:
    return all(holds(rows.reshape(len(rows), -1) if flat else rows) for rows in _chunks(images))


def _pixels(train: ArrayExamples, test: ArrayExamples) -> Iterator[str]:
    brightest = [int(split.arrays.max()) for split in (train, test)]
    if (brightest[0] > _DARK) != (brightest[1] > _DARK) and min(brightest):
        yield f"the brightest pixel of train is {brightest[0]}, of test {brightest[1]}: are they of one scale?"
    elif 0 < max(brightest) <= _DARK:
        yield f"the brightest pixel is {max(brightest)}, and pixels are taken as 0 to 255: nearly black"


def _numbers(train: ArrayExamples, test: ArrayExamples) -> Iterator[str]:
    low, high, square, negative = np.array([_measured(split.arrays) for split in (train, test)]).T
    size = np.sqrt(square)
    spans = [f"{low[i]:.4g} to {high[i]:.4g}" for i in (0, 1)]
    many = min(train.arrays.size, test.arrays.size) >= 100
    one_sided = many and negative.min() == 0 and negative.max() > 0.01
    if size.min() and (size.max() > _RATIO * size.min() or one_sided):
        yield f"the numbers of train go from {spans[0]}, of test from {spans[1]}: are they of one scale?"
        return
    pictures = train.arrays.ndim > 2 and low.min() >= 0 and high.max() > 100
    largest = max(abs(low).max(), abs(high).max())
    if size.max() > _LARGE or pictures or 0 < largest <= _SMALL:
        span = f"{low.min():.4g} to {high.max():.4g}"
        yield f"the numbers go from {span} and are taken as they are: scale them to about 1 (pixels by 255)"


def _measured(images: np.ndarray) -> tuple[float, float, float, float]:
    """(least, largest, mean square, share of negative numbers) of all numbers."""
    parts = [
        (rows.min(), rows.max(), np.sum(np.square(rows, dtype=np.float64)), np.count_nonzero(rows < 0))
        for rows in _chunks(images)
    ]
    low, high, squares, negative = zip(*parts, strict=True)
    return float(min(low)), float(max(high)), float(sum(squares)) / images.size, sum(negative) / images.size


def _twice(train: ArrayExamples, test: ArrayExamples, kind: str) -> Iterator[str]:
    labels: dict[bytes, Any] = {}
    ambiguous: set[bytes] = set()
    digests = list(_digests(train.arrays))
    targets = train.targets.tolist()
    for digest, label in zip(digests, targets, strict=True):
        if labels.setdefault(digest, label) != label:
            ambiguous.add(digest)
    both = sum(digest in labels for digest in _digests(test.arrays))
    if both:
        yield f"{both:,} of {len(test.targets):,} test examples are in the training set too"
    if ambiguous:
        several = sum(digest in ambiguous for digest in digests)
        what = "target" if kind in ("values", "tokens") else "label"
        yield f"{several:,} of {len(digests):,} training examples are there with another {what} too"


def _digests(images: Any) -> Iterator[bytes]:
    if isinstance(images, dict):
        for parts in zip(*map(_digests, images.values()), strict=True):
            yield b"".join(parts)
        return
    for rows in _chunks(images):
        plain = np.ascontiguousarray(rows).reshape(len(rows), -1)
        yield from (hashlib.sha256(row.data).digest() for row in plain)


def _groups(train: Examples, test: Examples) -> Iterator[str]:
    if train.groups is not None and test.groups is not None:
        groups = np.unique(test.groups)
        both = len(np.intersect1d(groups, train.groups))
        if both:
            yield f"{both:,} of {len(groups):,} groups of the test examples are in the training set too"
