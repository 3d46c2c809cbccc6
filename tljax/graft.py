"""Graft: source parameters become target parameters, by a plan that accounts for every leaf."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax import paths
from tljax.types import InputError, Mask, Params


class Row(NamedTuple):
    """What becomes of one leaf."""

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
    """Decide every leaf: abstract or real parameters in, a row a leaf out.

    Leaves under the target's prefixes `fresh` keep the target's draw, those under `zero` become 0; all others come
    from the source, by the same path or by `rename` ({source prefix: target prefix}). Source leaves under `fresh`
    or `zero` are dropped. Raises InputError, naming paths and shapes, for a leaf without a counterpart, a shape or
    dtype that differs, a rule that matches nothing, and two leaves with one place. No source: all is drawn anew.

    >>> [row.action for row in plan({"a": jnp.ones(2)}, {"a": jnp.zeros(2)})]
    ['copied']
    """
    fresh, zero = tuple(fresh), tuple(zero)
    wanted = dict(paths.items(target))
    paths.require_prefixes(target, (*fresh, *zero))
    source_leaves = {} if source is None else dict(paths.items(source))
    origin = _renamed(source_leaves, rename or {})
    is_fresh, is_zero = paths.inside(fresh), paths.inside(zero)
    rows = []
    for path, leaf in wanted.items():
        if is_zero(path):
            rows.append(Row("zeroed", path, None, *_kind(leaf)))
        elif source is None or is_fresh(path):
            rows.append(Row("drawn anew", path, None, *_kind(leaf)))
        else:
            rows.append(_kept(path, origin.get(path), leaf, source_leaves))
    taken = {row.source for row in rows}
    for place, path in origin.items():
        shape, dtype = _kind(source_leaves[path])
        if path not in taken and not (is_fresh(place) or is_zero(place)):
            raise InputError(
                f"source leaf '{path}' {shape} has no place in the target, whose leaves are {_some(wanted)}: is the "
                "source of another model?"
            )
        if path not in taken:
            rows.append(Row("dropped", None, path, shape, dtype))
    return tuple(rows)


def _renamed(source_paths: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """{path in the target: path in the source}."""
    origin: dict[str, str] = {}
    unused = set(rename)
    for path in source_paths:
        place = path
        for old, new in rename.items():
            if paths.inside((old,))(path):
                place = new + path[len(old) :]
                unused.discard(old)
                break
        if place in origin:
            raise InputError(f"source leaves '{origin[place]}' and '{path}' would both become '{place}': mend rename")
        origin[place] = path
    if unused:
        raise InputError(f"rename rule '{min(unused)}' matches no source leaf; leaves: {_some(source_paths)}")
    return origin


def _kept(path: str, come: str | None, leaf: Params, source_leaves: Mapping[str, Params]) -> Row:
    shape, dtype = _kind(leaf)
    if come is None:
        raise InputError(
            f"target leaf '{path}' {shape} is not in the source, whose leaves are {_some(source_leaves)}: is the "
            "source of another model?"
        )
    source_kind = _kind(source_leaves[come])
    if source_kind != (shape, dtype):
        remedy = "the source is of another model or shape; draw the stage anew or build the same model"
        if source_kind[0] == shape:
            remedy = f"save it as {dtype}, as nothing is cast"
        elif source_kind[0] == shape[::-1]:
            remedy = "transpose it, or build the same model"
        target_leaf = f"target leaf '{path}' is {dtype}{list(shape)}"
        raise InputError(f"source leaf '{come}' is {source_kind[1]}{list(source_kind[0])}, {target_leaf}: {remedy}")
    return Row("copied" if come == path else "renamed", path, come, shape, dtype)


def _some(leaves: Iterable[str]) -> str:
    return paths.some(sorted(leaves), 4)


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a leaf as it is: JAX would name a float64 of NumPy's float32, and convert it in silence."""
    return tuple(jnp.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def apply(plan: Plan, source: Params | None, target: Params) -> tuple[Params, Mask]:
    """(parameters, fresh): the target's tree with the plan carried out; True where a leaf was drawn anew.

    A leaf that can never train is not fresh.

    >>> source, target = {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}
    >>> apply(plan(source, target), source, target)[1]
    {'a': False}
    """
    source_leaves = {} if source is None else dict(paths.items(source))
    rows = {row.target: row for row in plan if row.target is not None}
    leaves, fresh = [], []
    for (path, leaf), able in zip(paths.items(target), paths.trainable(target), strict=True):
        row = rows[path]
        anew = jnp.zeros_like(leaf) if row.action == "zeroed" else leaf
        leaves.append(anew if row.source is None else source_leaves[row.source])
        fresh.append(row.source is None and able)
    treedef = jax.tree.structure(target)
    return jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(treedef, fresh)
