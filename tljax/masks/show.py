"""Show masks, tell them apart, write them down and read them back."""

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import files, paths, plugins
from tljax.masks.check import require_leaf
from tljax.masks.combine import static
from tljax.masks.leaf import plain, selects, value
from tljax.types import InputError, Mask, Params


class Row(NamedTuple):
    """A row of the mask table: one leaf."""

    path: str
    shape: tuple[int, ...]
    trained: str
    """'trained', 'frozen', 'x 0.1' (a scaled update), 'part' (a bool array) or 'x 0.1 to 0.5' (an array of rates)."""
    size: int
    """How many numbers the leaf holds."""
    trained_size: int
    """How many of these numbers train."""


def table(params: Params, mask: Mask) -> list[Row]:
    """The mask table: for each leaf its path, its shape, whether it trains, and how many numbers it holds.

    >>> table({"b": np.zeros(3)}, {"b": True})
    [Row(path='b', shape=(3,), trained='trained', size=3, trained_size=3)]
    """
    rows = []
    for path, leaf, m, trains in paths.items(params, mask, static(params, mask)):
        shape = tuple(jnp.shape(leaf))
        count = math.prod(shape)
        selected = count if trains else 0
        word = "trained" if trains else "frozen"
        if trains and selects(m):
            rates = value(m)
            selected = int(np.broadcast_to(rates != 0, shape).sum())
            word = "part" if rates.dtype == bool else f"x {rates[rates > 0].min():g} to {rates.max():g}"
        elif trains and not isinstance(plain(m), bool | np.bool_) and float(m) != 1:
            word = f"x {float(m):g}"
        rows.append(Row(path, shape, word, count, selected))
    return rows


def equal(a: Mask, b: Mask) -> bool:
    """Whether two masks have one tree and train alike: the same numbers (True is 1.0) and the same arrays.

    >>> equal({"a": True, "b": np.array([1, 0])}, {"a": 1.0, "b": np.array([True, False])})
    True
    """
    structure: Any = jax.tree.structure(a)
    if structure != jax.tree.structure(b):
        return False
    leaves = [(value(x), value(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return all(np.array_equal(x, y) for x, y in leaves)


def digest(mask: Mask) -> str:
    """SHA-256, in hexadecimal, of a mask's paths, kinds, shapes and values: the same for masks that train alike.

    >>> digest({"a": True}) == digest({"a": 1.0}) != digest({"a": np.array([True])})
    True
    """
    sha256 = hashlib.sha256()
    for path, leaf in paths.items(mask):
        m = value(leaf)
        shape = m.shape if selects(m) else None
        kind = None if not selects(m) or m.dtype == bool else "rates"
        sha256.update(json.dumps([path, shape, kind if selects(m) else m]).encode())
        sha256.update(m.tobytes() if selects(m) else b"")
    return sha256.hexdigest()


def to_json(mask: Mask) -> str:
    """A mask of bools and numbers as JSON, {path: value}. Raises InputError for a leaf that is an array.

    >>> to_json({"head": {"bias": True, "kernel": 0.5}})
    '{"head/bias": true, "head/kernel": 0.5}'
    """
    values, arrays = _parts(mask)
    if arrays:
        path = next(path for path, m in values.items() if isinstance(m, str))
        raise InputError(f"the mask's leaf at '{path}' is an array: save it as .npz")
    return json.dumps(values)


def _parts(mask: Mask) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """({path: bool, number or name of an array}, {name: array}), as `save` writes them.

    Arrays have names of their own, as a path may be empty, or the name of an argument of `numpy.savez`.
    """
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in paths.items(mask):
        m = value(leaf)
        if selects(m):
            values[path] = f"array_{len(arrays)}"
            arrays[values[path]] = m
        else:
            values[path] = bool(m) if isinstance(plain(leaf), bool | np.bool_) else m
    return values, arrays


def from_json(text: str, params: Params) -> Mask:
    """The mask that `to_json` wrote, for parameters of the same paths. Raises InputError for any other text.

    >>> from_json('{"a": true}', {"a": 1.0})
    {'a': True}
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the mask's text is no JSON of to_json: {plugins.describe(error)}") from error
    return _from_values(values, params)


def _from_values(values: Any, params: Params) -> Mask:
    """The mask of {path: value} in the tree of `params`. Raises InputError for other paths, and for no such mapping."""
    if not isinstance(values, dict):
        raise InputError("the mask in JSON is not of the form {path: value}: write it with to_json or save")
    if odd := sorted(set(values) ^ set(paths.names(params))):
        raise InputError(
            f"the mask in JSON and the parameters differ at {paths.some(odd)}: they are of different models"
        )
    for path, leaf in paths.items(params):
        require_leaf(path, leaf, values[path])
    return paths.each(lambda path, leaf: values[path], params)


def save(mask: Mask, file: str | Path) -> None:
    """Write a mask to `file`.json, and its arrays, if it has any, beside it to `file`.npz.

    `load` gives an `equal` mask, with arrays of NumPy bools or of float64 rates.
    """
    values, arrays = _parts(mask)
    if arrays:
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
        files.replace(Path(f"{file}.npz"), packed.getvalue())
    files.replace(Path(f"{file}.json"), (json.dumps(values, indent=1) + "\n").encode())


def load(file: str | Path, params: Params) -> Mask:
    """The mask that `save` wrote to `file`.json, for parameters of the same paths. Raises InputError for any other."""
    try:
        values = json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))
        if isinstance(values, dict) and any(isinstance(m, str) for m in values.values()):
            # From its bytes, since NumPy leaves a damaged file open.
            with np.load(io.BytesIO(Path(f"{file}.npz").read_bytes()), allow_pickle=False) as arrays:
                values = {path: arrays[m] if isinstance(m, str) else m for path, m in values.items()}
    except FileNotFoundError as error:
        raise InputError(f"the mask's file '{error.filename}' does not exist: give the name without .json") from error
    except Exception as error:  # the errors of NumPy, zlib and zipfile for a damaged file have no type in common
        raise InputError(
            f"the mask's files '{file}.*' are damaged: {plugins.describe(error)}: save the mask anew"
        ) from error
    return _from_values(values, params)
