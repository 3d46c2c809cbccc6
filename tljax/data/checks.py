"""The checks that every data set passes once, on the host, before anything learns from it."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np

from tljax.data import draw, findings, targets
from tljax.paths import some
from tljax.types import ArrayExamples, Examples, InputError, RowExamples, Task

Split = TypeVar("Split", bound=ArrayExamples | RowExamples)


def checked(
    name: str,
    train: Split,
    test: Split,
    classes: tuple[str, ...],
    note: str = "",
    *,
    kind: str = "classes",
    outputs: int = 0,
) -> Task:
    """The Task of two splits, with its fingerprint, after all checks.

    `kind` is what its targets are (see `targets`), `classes` the names of the classes, labels, values or tokens; all
    but classes need none. `outputs` is the size of a vocabulary, 0 that of its names or of the largest token. Images
    become uint8 [n, height, width, channels] (a grey [n, height, width] gets a channel axis) or
    float32 [n, ...]; labels become int32 [n]. Raises InputError with the row and the value where a label is not
    a class or a feature is not finite: the softmax loss would turn either into NaN or a wrong number without a word.
    The note ends with what can hardly be meant (see `findings`). Groups, integers or strings [n], become int32 [n]: the
    names of both splits together are numbered in sorted order.
    """
    train, test = _with_inputs(f"{name}: train", train), _with_inputs(f"{name}: test", test)
    for word, split in (("train", train), ("test", test)):
        if kind == "classes":
            _require_a_label_each(f"{name}: {word}", split)
        else:
            targets.require_one_each(f"{name}: {word}", split.targets, len(split))
    _require_alike(name, train, test)
    if len(set(classes)) < len(classes):
        raise InputError(f"{name}: a class name occurs twice in {some(list(classes))}: give each class its own name")
    classes, outputs, train, test = _with_targets(name, train, test, classes, kind, outputs)
    train, test = _numbered(name, train, test)
    warnings = findings.lines(train, test, classes, kind)
    full_note = "; ".join(line for line in (note, *warnings) if line)
    digest = fingerprint(train, test, classes, kind, outputs, name.rpartition("/")[2])
    return Task(name, train, test, classes, digest, full_note, warnings, kind, outputs)


def _with_inputs(where: str, split: Split) -> Split:
    """A split with its inputs as `inputs` has them; those that are read by row are so already."""
    changed = {} if split.arrays is None else {"arrays": inputs(where, split.arrays)}
    return replace(split, targets=np.asarray(split.targets), **changed)


def _require_alike(name: str, train: Examples, test: Examples) -> None:
    """Raise InputError unless the inputs of both splits have the same names, dtypes and shapes."""
    names = [list(part.spec) if isinstance(part.spec, dict) else None for part in (train, test)]
    if names[0] != names[1]:
        named = ["one array" if part is None else some(part) for part in names]
        raise InputError(f"{name}: the inputs of train are {named[0]}, of test {named[1]}: give both the same")
    for leaf, other in zip(jax.tree.leaves(train.spec), jax.tree.leaves(test.spec), strict=True):
        if leaf != other:
            raise InputError(
                f"{name}: train has {leaf.dtype} {leaf.shape}, test {other.dtype} {other.shape}: bring both to one "
                "shape"
            )


def _with_targets(
    name: str, train: Split, test: Split, classes: tuple[str, ...], kind: str, outputs: int
) -> tuple[tuple[str, ...], int, Split, Split]:
    """(names, outputs, train, test) with the targets of both splits as `Task.kind` says. Raises InputError."""
    both: Sequence[np.ndarray]
    if kind == "classes":
        both = [_labels(f"{name}: {word}", part, classes) for word, part in (("train", train), ("test", test))]
        if len(np.unique(both[0])) < 2:
            raise InputError(f"{name}: train holds one class only: there is nothing to tell apart, give two or more")
        outputs = len(classes)
    elif kind == "tokens":
        parts = [array for part in (train, test) for array in (part.arrays, part.targets) if array is not None]
        outputs = outputs or targets.vocabulary(name, parts, classes)
        for word, part in (("train", train), ("test", test)):
            targets.require_tokens(f"{name}: {word}", part.arrays, outputs)
            if part.targets.shape != (len(part), *part.spec.shape):
                shapes = f"targets are {targets.shown(part.targets)}, tokens {[len(part), *part.spec.shape]}"
                raise InputError(f"{name}: {word}: {shapes}: give a target a token")
        both = targets.following(name, train.targets, test.targets, outputs)
    else:
        convert = targets.labels if kind == "labels" else targets.values
        both = convert(name, train.targets, test.targets, classes)
        outputs = both[0].shape[1]
        if kind == "labels" and not classes:
            classes = tuple(map(str, range(outputs)))
    return classes, outputs, replace(train, targets=both[0]), replace(test, targets=both[1])


SAMPLED = 1000
"""How many rows of examples that are read by row are in a fingerprint."""


def fingerprint(
    train: Examples,
    test: Examples,
    classes: tuple[str, ...],
    kind: str = "classes",
    outputs: int = 0,
    name: str = "",
) -> str:
    """SHA-256 of the contents of a task: 64 hexadecimal digits.

    Over, in this order: train images, train labels, test images, test labels, each as the ASCII line
    "<dtype as '|u1', '<f4' or '<i4'> <shape as JSON>\\n" and then its little-endian bytes in C order; then the
    class names as a JSON list (ASCII). Where groups are known the ASCII line "\\ntrain_groups" and those of the
    training split follow, likewise as an array, and "\\ntest_groups" and those of the test split. Of several inputs
    each stands in the order of their names, after the ASCII line "\\n<name as JSON>". Of targets that are no classes
    the ASCII line "\\n<kind> <outputs>" is the last.

    Of splits that are read by row the inputs of SAMPLED rows stand for all, those that are the first words of Philox
    with key (0, 7) modulo the number of examples, in ascending order, each once; before them comes the ASCII line
    "\\nsampled <examples>", and at the end the line "\\n" and the `name`: whoever shows the fingerprint says that it is
    sampled.
    """
    digest = hashlib.sha256()

    def update(array: np.ndarray, rows: int | None = None) -> None:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        if rows is not None:
            digest.update(f"{little.dtype.str} {json.dumps((rows, *little.shape[1:]))}\n".encode())
        digest.update(little.reshape(-1).view(np.uint8).data)

    for split in (train, test):
        rows = np.arange(len(split)) if split.arrays is not None else sampled(split)
        if split.arrays is None:
            digest.update(f"\nsampled {len(split)}\n".encode())
        for input_name in sorted(split.spec) if isinstance(split.spec, dict) else [None]:
            if input_name is not None:
                digest.update(f"\n{json.dumps(input_name)}\n".encode())
            for number, part in enumerate(_parts(split, rows)):
                update(part if input_name is None else part[input_name], None if number else len(rows))
        update(split.targets, len(split.targets))
    digest.update(json.dumps(list(classes)).encode())
    for word, split in (("train", train), ("test", test)):
        if split.groups is not None:
            digest.update(f"\n{word}_groups\n".encode())
            update(split.groups, len(split.groups))
    if kind != "classes":
        digest.update(f"\n{kind} {outputs}\n".encode())
    if train.arrays is None:
        digest.update(f"\n{name}".encode())
    return digest.hexdigest()


def sampled(split: Examples) -> np.ndarray:
    """The rows of a split that stand for all, ascending: see `fingerprint`."""
    return np.unique(draw.words(0, draw.SAMPLE, 0, 1, SAMPLED)[0] % np.uint64(len(split))).astype(np.int64)


def _parts(split: Examples, rows: np.ndarray) -> Iterator[Any]:
    """The inputs of some rows, so many at once that large ones need not fit into memory; of arrays all at once."""
    if split.arrays is not None:
        yield split.arrays
        return
    size = sum(np.dtype(leaf.dtype).itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(split.spec))
    step = max(1, _AT_ONCE // max(1, size))
    for start in range(0, len(rows), step):
        yield split.inputs(rows[start : start + step])


_AT_ONCE = 2**25
"""Bytes of inputs that are read at once where they are read by row."""


def inputs(where: str, arrays: Any) -> Any:
    """Inputs as `images` has them, or as int32 [n, length] if they are tokens, or a dict of such arrays.

    Raises InputError, in which `where` names the split, as `images` does, for tokens below 0 or beyond int32, and for a
    dict of arrays of different lengths or of none.
    """
    if not isinstance(arrays, dict):
        return _tokens(where, arrays) if targets.tokens(np.asarray(arrays)) else images(where, arrays)
    parts = {}
    for name, array in sorted(arrays.items()):
        is_whole = array.dtype.kind in "iu" and array.dtype != np.uint8 and array.ndim in (1, 2)
        parts[name] = (_tokens if is_whole else images)(f"{where} input '{name}'", array)
    lengths = {name: len(part) for name, part in parts.items()}
    if len(set(lengths.values())) != 1:
        words = ", ".join(f"'{name}' has {length}" for name, length in lengths.items())
        raise InputError(f"{where}: inputs differ in length: {words or 'there are none'}: give each an item a row")
    return parts


def _tokens(where: str, array: np.ndarray) -> np.ndarray:
    """Whole numbers as int32. Raises InputError, with the row and the number, for one outside 0..2**31-1."""
    if not array.size:
        raise InputError(f"{where}: is empty {list(array.shape)}: give at least one example")
    bad = np.argwhere((array < 0) | (array > np.iinfo(np.int32).max))
    if len(bad):
        value = array[tuple(bad[0])]
        raise InputError(f"{where}: row {bad[0, 0]} holds {value}, no token: give whole numbers from 0")
    return np.ascontiguousarray(array, dtype=np.int32)


def images(where: str, images: np.ndarray) -> np.ndarray:
    """Images as uint8 [n, height, width, channels] or float32 [n, ...].

    Raises InputError, in which `where` names the split, for any other images, none, and features that are not finite.
    """
    if images.dtype == np.uint8:
        if images.ndim not in (3, 4):
            raise InputError(f"{where}: uint8 images are [n, height, width, channels], not {list(images.shape)}")
        images = images[..., None] if images.ndim == 3 else images
        require_channels_last(where, images)
    elif images.dtype.kind == "f":
        images = _features(where, images)
        require_channels_last(where, images)
    else:
        raise InputError(f"{where}: images are {images.dtype}: give uint8 pixels (0..255) or float features")
    if not images.size:
        raise InputError(f"{where}: is empty {list(images.shape)}: give at least one example")
    return images


def require_channels_last(where: str, images: np.ndarray) -> None:
    """Raise InputError if images are [n, channels, height, width], as PyTorch's: they would be taken as many channels.

    Feature maps [n, height, width, channels] of at most 4 pixels a side are let through.

    >>> require_channels_last("mine.npz: train", np.zeros((5, 28, 28, 3), np.uint8))
    """
    if images.ndim != 4:
        return
    _, first, second, last = images.shape
    pixels = images.dtype == np.uint8 and first in (1, 3)
    if last > 4 and (pixels or (first <= 4 and second > 4)):
        raise InputError(
            f"{where}: images are {list(images.shape)}, channels first: transpose to [n, height, width, channels], "
            "as by numpy.transpose(images, (0, 2, 3, 1))"
        )


def _features(where: str, features: np.ndarray) -> np.ndarray:
    """Features as float32. Raises InputError, with the row and the value, where one is not finite."""
    if features.ndim < 2:
        raise InputError(f"{where}: float features are [n, ...], not {list(features.shape)}")
    with np.errstate(over="ignore"):
        converted = np.asarray(features, dtype=np.float32)
    bad = np.argwhere(~np.isfinite(converted))
    if len(bad):
        value = features[tuple(bad[0])]
        raise InputError(f"{where}: row {bad[0, 0]} holds {value}, no finite float32: replace the {len(bad)} such")
    return converted


def _require_a_label_each(where: str, split: Examples) -> None:
    """Raises InputError, with the likely remedy, unless a split has one label for each image."""
    labels, n = split.targets, len(split)
    if labels.shape != (n,):
        remedy = "give one label an image"
        if labels.ndim == 2 and len(labels) == n:
            remedy = "give labels[:, 0]" if labels.shape[1] == 1 else "of one-hot labels give labels.argmax(1)"
        elif labels.ndim == 1 and [len(labels)] == list(jax.tree.leaves(split.spec)[0].shape[-1:]):
            remedy = "the images are along the last axis, so give numpy.moveaxis(images, -1, 0)"
        raise InputError(f"{where}: labels have shape {list(labels.shape)}, images say [{n}]: {remedy}")


def _labels(where: str, split: Examples, classes: tuple[str, ...]) -> np.ndarray:
    """Labels as int32. Raises InputError, with the row and the value, where one is not a class."""
    labels = split.targets
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where}: labels are {labels.dtype}, row 0 is {labels[0]!s}: give integers 0..classes-1")
    bad = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(bad):
        raise InputError(
            f"{where}: row {bad[0]} has label {labels[bad[0]]}, outside 0..{len(classes) - 1}: "
            f"correct the {len(bad)} such, or name more classes"
        )
    return np.ascontiguousarray(labels, dtype=np.int32)


def _numbered(name: str, train: Split, test: Split) -> tuple[Split, Split]:
    """Both splits with their groups as numbers, one numbering for both."""
    coded: list[tuple[list[str] | list[int], np.ndarray] | None] = []  # (group names, code of each item)
    for where, split in ((f"{name}: train", train), (f"{name}: test", test)):
        if split.groups is None:
            coded.append(None)
            continue
        groups, n = np.asarray(split.groups), len(split.targets)
        if groups.shape != (n,):
            raise InputError(f"{where}: groups have shape {list(groups.shape)}, labels [{n}]: give one group an item")
        if groups.dtype.kind not in "iuU":
            raise InputError(f"{where}: groups are {groups.dtype}: give integers or strings, one an item")
        unique, codes = np.unique(groups, return_inverse=True)
        coded.append((unique.tolist(), codes.reshape(-1)))
    names = {group for split_groups in coded if split_groups for group in split_groups[0]}
    if len({type(group) for group in names}) > 1:
        raise InputError(f"{name}: groups are integers in one split and strings in the other: give both alike")
    numbers = {group: number for number, group in enumerate(sorted(names))}
    splits = []
    for split, split_groups in zip((train, test), coded, strict=True):
        if split_groups is not None:
            unique_groups, codes = split_groups
            table = np.array([numbers[group] for group in unique_groups], np.int32)
            split = replace(split, groups=table[codes])
        splits.append(split)
    return splits[0], splits[1]
