"""What targets are: classes, several labels, values or tokens, decided by their dtype and shape.

whole numbers [n]                              'classes'
bools [n, labels], or 0 and 1 in [n, labels]   'labels': several labels an item, at least two if they are numbers
floats [n] or [n, values]                      'values'
whole numbers [n, length] beside tokens
[n, length]                                    'tokens': one a position; -1 has no weight

What might be two of these is refused, with how to write either.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tljax.types import Examples, InputError

KINDS = ("classes", "labels", "values", "tokens")


def kind(name: str, train: Examples, test: Examples) -> str:
    """The kind of the targets of a task, one of KINDS.

    Raises InputError for targets of no kind, of two kinds, and for those that might be of two.

    >>> from tljax.types import ArrayExamples
    >>> kind("d", ArrayExamples(np.zeros((2, 3)), np.array([0.5, 1.5])), ArrayExamples(np.zeros(1), np.array([2.5])))
    'values'
    """
    splits = (("train", train), ("test", test))
    kinds = [_kind(f"{name}: {word}", split.spec, split.targets) for word, split in splits]
    if kinds[0] != kinds[1]:
        words = [f"{splits[i][0]} targets are {shown(splits[i][1].targets)} ({kinds[i]})" for i in (0, 1)]
        raise InputError(f"{name}: {' and '.join(words)}: give both splits targets of one kind")
    both = [np.asarray(split.targets) for _, split in splits]
    if kinds[0] == "labels" and both[0].dtype != bool and all((part.sum(axis=1) == 1).all() for part in both):
        raise InputError(
            f"{name}: every row of the targets has one 1: of one-hot classes give targets.argmax(1), of several labels "
            "give targets.astype(bool)"
        )
    return kinds[0]


def _kind(where: str, spec: Any, targets: np.ndarray) -> str:
    letter, dimensions = targets.dtype.kind, targets.ndim
    if letter == "f" and dimensions in (1, 2):
        return "values"
    if letter == "b" and dimensions == 2:
        return "labels"
    if letter == "b" and dimensions == 1:
        remedy = "give targets.astype(int) for two classes, or targets[:, None] for one label"
        raise InputError(f"{where}: targets are {shown(targets)}, which may be two classes or one label: {remedy}")
    if letter in "iu" and dimensions == 1:
        return "classes"
    if letter in "iu" and dimensions == 2:
        are_tokens = isinstance(spec, jax.ShapeDtypeStruct) and tokens(np.empty((0, *spec.shape), spec.dtype))
        if are_tokens and spec.shape == targets.shape[1:]:
            return "tokens"
        if targets.shape[1] == 1:
            remedy = "give targets[:, 0] for classes, or targets.astype(float) for values"
            raise InputError(f"{where}: targets are {shown(targets)}, which may be classes or values: {remedy}")
        if targets.size and not ((targets == 0) | (targets == 1)).all():
            row = int(np.argwhere((targets != 0) & (targets != 1))[0, 0])
            remedy = "give floats for values, bools for labels, or tokens of the inputs' length beside inputs of tokens"
            raise InputError(
                f"{where}: targets are {shown(targets)}, and row {row} holds other numbers than 0 and 1: {remedy}"
            )
        return "labels"
    raise InputError(
        f"{where}: targets are {shown(targets)}: give whole numbers [n] (classes), bools [n, labels], floats [n] or "
        "[n, values], or whole numbers [n, length] beside tokens [n, length]"
    )


def tokens(inputs: Any) -> bool:
    """Whether inputs are tokens: one array of whole numbers [n, length], which is no pixels."""
    return (
        isinstance(inputs, np.ndarray) and inputs.ndim == 2 and inputs.dtype.kind in "iu" and inputs.dtype != np.uint8
    )


def shown(array: np.ndarray) -> str:
    """The dtype and shape of an array in words."""
    return f"{array.dtype} {list(array.shape)}"


def next_tokens(inputs: np.ndarray) -> np.ndarray:
    """int32 [n, length]: the token that follows each position; -1 at the last, which nothing follows.

    >>> next_tokens(np.array([[5, 6, 7]])).tolist()
    [[6, 7, -1]]
    """
    following = np.full(inputs.shape, -1, np.int32)
    following[:, :-1] = inputs[:, 1:]
    return following


def require_one_each(where: str, targets: np.ndarray, inputs: int) -> None:
    """Raise InputError unless there are as many targets as inputs, and any."""
    if targets.ndim < 1 or len(targets) != inputs:
        raise InputError(f"{where}: targets are {shown(targets)}, inputs are {inputs}: give one target an item")
    if not targets.size:
        raise InputError(f"{where}: targets are empty {list(targets.shape)}: give at least one example")


def labels(name: str, train: np.ndarray, test: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Several labels as bool [n, labels], of both splits.

    Raises InputError for splits of different widths, other numbers than 0 and 1, as many names as there are not, and a
    label that all items of both splits have, or none.
    """
    _require_width(name, train, test, names, "label")
    both = []
    for word, part in (("train", train), ("test", test)):
        if part.dtype != bool and not ((part == 0) | (part == 1)).all():
            row, column = np.argwhere((part != 0) & (part != 1))[0]
            raise InputError(f"{name}: {word}: row {row} holds {part[row, column]} as a label: give 0 and 1, or bools")
        both.append(np.ascontiguousarray(part, dtype=bool))
    share = np.concatenate(both).mean(axis=0)
    constant = np.flatnonzero((share == 0) | (share == 1))
    if len(constant):
        column, word = constant[0], "all items have" if share[constant[0]] else "no item has"
        raise InputError(
            f"{name}: {word} label {_named(int(column), names)}: there is nothing to tell apart, leave out the "
            f"{len(constant)} such"
        )
    return both[0], both[1]


def values(name: str, train: np.ndarray, test: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Values as float32 [n, values], of both splits.

    Raises InputError for splits of different widths, a value that is no finite float32 (with its row), as many names as
    there are not, and a column that is constant in a split: what is explained of its variance has no value.
    """
    train, test = (part[:, None] if part.ndim == 1 else part for part in (train, test))
    _require_width(name, train, test, names, "value")
    both = []
    for word, part in (("train", train), ("test", test)):
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(part, dtype=np.float32)
        bad = np.argwhere(~np.isfinite(converted))
        if len(bad):
            row, column = bad[0]
            raise InputError(
                f"{name}: {word}: target of row {row} is {part[row, column]}, no finite float32: replace or leave out "
                f"the {len(bad)} such"
            )
        constant = np.flatnonzero((converted == converted[:1]).all(axis=0))
        if len(constant):
            column = int(constant[0])
            what = f"value {_named(column, names)}" if part.shape[1] > 1 else "the target"
            raise InputError(
                f"{name}: {word}: {what} is {converted[0, column]:g} in all {len(part)} rows: there is no variance to "
                "explain, give other examples, or leave it out"
            )
        both.append(converted)
    return both[0], both[1]


def following(name: str, train: np.ndarray, test: np.ndarray, outputs: int) -> list[np.ndarray]:
    """Targets that are tokens as int32 [n, length], of both splits.

    `outputs` is the size of the vocabulary. Raises InputError for one outside -1 .. outputs - 1, and for an item, or a
    split, without any token to predict.
    """
    both = []
    for word, part in (("train", train), ("test", test)):
        bad = np.argwhere((part < -1) | (part >= outputs))
        if len(bad):
            row, column = bad[0]
            raise InputError(
                f"{name}: {word}: target {column} of row {row} is {part[row, column]}, outside 0..{outputs - 1} (-1 "
                f"has no weight): correct the {len(bad)} such, or name more tokens"
            )
        empty = np.flatnonzero((part < 0).all(axis=1))
        if len(empty):
            raise InputError(
                f"{name}: {word}: row {empty[0]} has no target but -1: leave out the {len(empty)} such rows"
            )
        both.append(np.ascontiguousarray(part, dtype=np.int32))
    return both


def vocabulary(name: str, parts: Sequence[np.ndarray], names: tuple[str, ...]) -> int:
    """The number of tokens: that of `names`, or the largest of all arrays and one. Raises InputError for one only."""
    size = len(names) or 1 + max(int(part.max(initial=0)) for part in parts)
    if size < 2:
        raise InputError(f"{name}: all tokens are 0: there is nothing to tell apart, give two or more")
    return size


def require_tokens(where: str, inputs: Any, outputs: int) -> None:
    """Raise InputError for an input token that the vocabulary of `outputs` tokens does not have."""
    for leaf in jax.tree.leaves(inputs):
        bad = np.argwhere(leaf >= outputs)
        if len(bad):
            row, column = bad[0]
            raise InputError(
                f"{where}: token {column} of row {row} is {leaf[row, column]}, outside 0..{outputs - 1}: correct the "
                f"{len(bad)} such, or name more tokens"
            )


def _require_width(name: str, train: np.ndarray, test: np.ndarray, names: tuple[str, ...], what: str) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise InputError(
            f"{name}: train targets are {shown(train)}, test targets {shown(test)}: give both one {what} a column, and "
            "as many columns"
        )
    if names and len(names) != train.shape[1]:
        raise InputError(f"{name}: there are {len(names)} names of {train.shape[1]} {what}s: name each, or none")


def _named(column: int, names: tuple[str, ...]) -> str:
    return f"'{names[column]}'" if names else str(column)
