"""Graft: source parameters become target parameters, by a plan that accounts for every leaf."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax import paths
from tljax.types import InputError, Mask, Params


class Row(NamedTuple):
    """What a plan does with one leaf."""

    action: str
    """'copied', 'renamed', 'drawn anew', 'zeroed' or 'dropped'."""
    target: str | None
    """Its path in the target; None if it is dropped."""
    source: str | None
    """Its path in the source; None if it is drawn anew."""
    shape: tuple[int, ...]
    dtype: str


Plan = tuple[Row, ...]


def plan(
    source: Params | None,
    target: Params,
    *,
    fresh: Iterable[str] = (),
    zero: Iterable[str] = (),
    rename: Mapping[str, str] | None = None,
) -> Plan:
    """Decide what becomes of every leaf: from abstract or real parameters, a row for each leaf.

    Leaves under the target's prefixes `fresh` keep the target's draw, those under `zero` become 0; all others come
    from the source, by the same path or by `rename` ({source prefix: target prefix}). Source leaves under `fresh`
    or `zero` are dropped. Without a source every leaf is drawn anew. Raises InputError, naming paths and shapes, for a
    leaf without a counterpart, a shape or dtype that differs, a rule that matches nothing, and two leaves with one
    target.

    >>> [row.action for row in plan({"a": jnp.ones(2)}, {"a": jnp.zeros(2)})]
    ['copied']
    """
    fresh, zero = tuple(fresh), tuple(zero)
    target_leaves = dict(paths.items(target))
    paths.require_prefixes(target, (*fresh, *zero))
    source_leaves = {} if source is None else dict(paths.items(source))
    source_paths = _renamed(source_leaves, rename or {})
    is_fresh, is_zero = paths.inside(fresh), paths.inside(zero)
    rows = []
    for path, leaf in target_leaves.items():
        if is_zero(path):
            rows.append(Row("zeroed", path, None, *_kind(leaf)))
        elif source is None or is_fresh(path):
            rows.append(Row("drawn anew", path, None, *_kind(leaf)))
        else:
            rows.append(_copy_row(path, source_paths.get(path), leaf, source_leaves))
    taken = {row.source for row in rows}
    for path, source_path in source_paths.items():
        shape, dtype = _kind(source_leaves[source_path])
        if source_path not in taken and not (is_fresh(path) or is_zero(path)):
            raise InputError(
                f"source leaf '{source_path}' {shape} has no place in the target, whose leaves are "
                f"{_some(target_leaves)}: is the source of another model?"
            )
        if source_path not in taken:
            rows.append(Row("dropped", None, source_path, shape, dtype))
    return tuple(rows)


def _renamed(source_leaves: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """{path in the target: path in the source}, by the rules {source prefix: target prefix}.

    Raises InputError for two source leaves with one target, and for a rule that matches no source leaf.
    """
    source_paths: dict[str, str] = {}
    unused = set(rename)
    for source_path in source_leaves:
        path = source_path
        for old, new in rename.items():
            if paths.inside((old,))(source_path):
                path = new + source_path[len(old) :]
                unused.discard(old)
                break
        if path in source_paths:
            raise InputError(
                f"source leaves '{source_paths[path]}' and '{source_path}' would both become '{path}': mend rename"
            )
        source_paths[path] = source_path
    if unused:
        raise InputError(f"rename rule '{min(unused)}' matches no source leaf; leaves: {_some(source_leaves)}")
    return source_paths


def _copy_row(path: str, source_path: str | None, leaf: Params, source_leaves: Mapping[str, Params]) -> Row:
    """The row of a target leaf that comes from the source. Raises InputError if it is not there, or of another kind."""
    shape, dtype = _kind(leaf)
    if source_path is None:
        raise InputError(
            f"target leaf '{path}' {shape} is not in the source, whose leaves are {_some(source_leaves)}: is the "
            "source of another model?"
        )
    source_shape, source_dtype = _kind(source_leaves[source_path])
    if (source_shape, source_dtype) != (shape, dtype):
        remedy = "the source is of another model or shape; draw the stage anew or build the same model"
        if source_shape == shape:
            remedy = f"save it as {dtype}, as nothing is cast"
        elif source_shape == shape[::-1]:
            remedy = "transpose it, or build the same model"
        raise InputError(
            f"source leaf '{source_path}' is {source_dtype}{list(source_shape)}, "
            f"target leaf '{path}' is {dtype}{list(shape)}: {remedy}"
        )
    return Row("copied" if source_path == path else "renamed", path, source_path, shape, dtype)


def _some(leaves: Iterable[str]) -> str:
    """The first 4 paths in sorted order, quoted, for a message."""
    return paths.some(sorted(leaves), 4)


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a leaf as it is: JAX would name a float64 of NumPy's float32, and convert it in silence."""
    return tuple(jnp.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def apply(plan: Plan, source: Params | None, target: Params) -> tuple[Params, Mask]:
    """(parameters, fresh): the target's tree after the plan, and a mask, True where a leaf was drawn anew or zeroed.

    The mask is False for a leaf that can never train.

    >>> source, target = {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}
    >>> apply(plan(source, target), source, target)[1]
    {'a': False}
    """
    source_leaves = {} if source is None else dict(paths.items(source))
    rows = {row.target: row for row in plan if row.target is not None}
    leaves, fresh = [], []
    for (path, leaf), able in zip(paths.items(target), paths.trainable(target), strict=True):
        row = rows[path]
        start = jnp.zeros_like(leaf) if row.action == "zeroed" else leaf
        leaves.append(start if row.source is None else source_leaves[row.source])
        fresh.append(row.source is None and able)
    treedef = jax.tree.structure(target)
    return jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(treedef, fresh)
