"""A delta: what of some parameters differs from a base, leaf by leaf or number by number, to the bit.

Leaves are compared as bytes, so that -0.0 and 0.0 differ, and so do two NaN. A leaf of which few numbers changed is
kept as their places and values, another as a whole. With the digests of the base and of the result, neither another
base nor a damaged delta gives parameters that nobody trained.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax import paths
from tljax.checkpoint import Flat, digest
from tljax.types import InputError

WHOLE, PLACES, VALUES = "whole/", "places/", "values/"
"""With what the names of a delta's arrays begin, before the path of their leaf."""


def identity(flat: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of parameters: of the paths and digests of their leaves, in whatever order they stand.

    >>> identity({"b": np.ones(2), "a": np.zeros(1)}) == identity({"a": np.zeros(1), "b": np.ones(2)})
    True
    """
    sums = {path: digest(path, leaf) for path, leaf in flat.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def between(base: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]) -> tuple[Flat, dict[str, Any]]:
    """(arrays, record) of what turns a base into parameters, both {path: leaf}.

    The arrays are `whole/PATH` of a leaf, or `places/PATH` (uint32 or uint64 [changed], of the leaf as it lies in
    memory) and `values/PATH` [changed], whichever takes fewer bytes. The record has the digests of both and the paths
    that only the base has.

    >>> arrays, record = between({"a": np.zeros(100), "b": np.ones(1)}, {"a": np.eye(1, 100)[0], "b": np.ones(1)})
    >>> {name: array.tolist() for name, array in arrays.items()}
    {'places/a': [0], 'values/a': [1.0]}
    """
    arrays: Flat = {}
    for path, leaf in params.items():
        other = base.get(path)
        if other is None or other.shape != leaf.shape or other.dtype != leaf.dtype:
            arrays[WHOLE + path] = leaf
            continue
        places = np.flatnonzero(_changed(leaf, other)).astype(np.uint32 if leaf.size < 2**32 else np.uint64)
        if not places.size:
            continue
        values = leaf.reshape(-1)[places]
        if places.nbytes + values.nbytes < leaf.nbytes:
            arrays |= {PLACES + path: places, VALUES + path: values}
        else:
            arrays[WHOLE + path] = leaf
    dropped = [path for path in base if path not in params]
    return arrays, {"base_sha256": identity(base), "result_sha256": identity(params), "dropped": dropped}


def _changed(leaf: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which numbers of two arrays of one shape and dtype differ in a bit, bools [size]."""
    as_bytes = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (leaf, other)]
    return (as_bytes[0] != as_bytes[1]).reshape(leaf.size, leaf.dtype.itemsize).any(axis=1)


def applied(base: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> Flat:
    """The parameters that a delta was made of, {path: leaf}, to the bit.

    Raises InputError for another base, with both digests, and for a delta that is damaged.

    >>> base, params = {"a": np.array([0.0, 1.0])}, {"a": np.array([-0.0, 1.0])}
    >>> applied(base, *between(base, params))
    {'a': array([-0.,  1.])}
    """
    if (digest := identity(base)) != record["base_sha256"]:
        raise InputError(f"the delta is of the base {record['base_sha256']}, and this is {digest}: give the same base")
    params = {path: leaf for path, leaf in base.items() if path not in record["dropped"]}
    for name, array in arrays.items():
        kind, _, path = name.partition("/")
        if f"{kind}/" == WHOLE:
            params[path] = array
        elif f"{kind}/" == PLACES:
            params[path] = _with_values(path, base, array, arrays.get(VALUES + path))
        elif f"{kind}/" != VALUES or PLACES + path not in arrays:
            raise InputError(f"the delta has the array '{name}', which no delta has: export it again")
    if (result := identity(params)) != record["result_sha256"]:
        raise InputError(
            f"the delta gives parameters of the digest {result}, not {record['result_sha256']}: export it again"
        )
    return params


def _with_values(
    path: str, base: Mapping[str, np.ndarray], places: np.ndarray, values: np.ndarray | None
) -> np.ndarray:
    """The leaf of the base with other values at some places. Raises InputError where they cannot be of it."""
    leaf = base.get(path)
    if (
        leaf is None
        or values is None
        or values.dtype != leaf.dtype
        or not values.shape == places.shape == (places.size,)
    ):
        raise InputError(f"the delta's values of '{path}' are not of {paths.some(list(base), 4)}: export it again")
    if places.dtype.kind != "u" or (places.size and int(places.max()) >= leaf.size):
        raise InputError(f"the delta's places of '{path}' are not within its {leaf.size:,} numbers: export it again")
    changed = leaf.reshape(-1).copy()
    changed[places] = values
    return changed.reshape(leaf.shape)
