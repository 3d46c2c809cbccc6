"""Masks: which leaves of a pytree train. Plain pytrees, and functions on them.

A mask is the tree of the parameters with, for each leaf, a bool, a number (scales the leaf's update) or an
array (selects elements). True means trained, everywhere. None, integer leaves and running statistics
(`batch_stats`, as Linen names them) never train.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths
from tljax.types import InputError, Mask, Params


def by_path(params: Params, predicate: Callable[[str], bool]) -> Mask:
    """Train the leaves whose path makes `predicate` true; raise InputError if it is true for none.

    >>> by_path({"head": {"kernel": 1.0, "bias": 0.0}}, lambda path: path.endswith("bias"))
    {'head': {'bias': True, 'kernel': False}}
    """
    known = paths.names(params)
    mask = paths.each(lambda path, leaf: bool(predicate(path)) and paths.can_train(path, leaf), params)
    if not any(jax.tree.leaves(mask)):
        name = getattr(predicate, "__name__", "predicate")
        raise InputError(f"by_path: {name} is true for no leaf that can train; leaves: {paths.some(known)}")
    return mask


def by_glob(params: Params, *patterns: str) -> Mask:
    """Train the leaves that match any pattern: `*` within one name, `**` across names.

    Raises InputError for a pattern that matches nothing.

    >>> by_glob({"a": {"kernel": 1.0}, "b": {"bias": 0.0}}, "**/bias")
    {'a': {'kernel': False}, 'b': {'bias': True}}
    """
    paths.require_globs(params, patterns)
    tests = [paths.glob(pattern) for pattern in patterns]
    return by_path(params, lambda path: any(test(path) for test in tests))


def under(params: Params, prefixes: str | Iterable[str]) -> Mask:
    """Train the leaves under any of the path prefixes; raise InputError for a prefix that holds none.

    >>> under({"hidden_0": {"bias": 0.0}, "head": {"bias": 0.0}}, ["head"])
    {'head': {'bias': True}, 'hidden_0': {'bias': False}}
    """
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    paths.require_prefixes(params, prefixes)
    if not prefixes:
        raise InputError(f"under: no prefix given, so nothing would train; leaves: {paths.some(paths.names(params))}")
    return by_path(params, paths.inside(prefixes))


def union(*parts: Mask | None) -> Mask:
    """Train what any of the masks trains. Bool leaves; None stands for a mask of nothing.

    >>> union({"a": True, "b": False}, {"a": False, "b": False}, None)
    {'a': True, 'b': False}
    """
    return _combine("union", lambda *leaves: any(leaves), parts)


def intersect(*parts: Mask) -> Mask:
    """Train what all of the masks train. Bool leaves.

    >>> intersect({"a": True, "b": False}, {"a": True, "b": True})
    {'a': True, 'b': False}
    """
    return _combine("intersect", lambda *leaves: all(leaves), parts)


def invert(mask: Mask) -> Mask:
    """Train what the mask freezes. Bool leaves; apply `intersect` where integer leaves are to stay frozen.

    >>> invert({"a": True, "b": False})
    {'a': False, 'b': True}
    """
    return _combine("invert", lambda leaf: not leaf, (mask,))


def _combine(name: str, function: Callable[..., bool], parts: tuple[Mask | None, ...]) -> Mask:
    given = [part for part in parts if part is not None]
    if not given:
        raise InputError(f"{name}: no mask given")
    for part in given:
        paths.same_structure(given[0], part, "the first mask", "another")
        for path, leaf in zip(paths.names(part), jax.tree.leaves(part), strict=True):
            if not isinstance(leaf, bool | np.bool_):
                raise InputError(f"{name}: the leaf at '{path}' is {leaf!r}, not a bool: combine bools, then scale")
    return jax.tree.map(function, *given)


def split(params: Params, mask: Mask) -> tuple[Params, Params]:
    """(trained, frozen): two trees like `params`, each with None where the other has the leaf.

    `params` may have None in some places already, as gradients of the trained part have.

    >>> split({"a": 1.0, "b": 2.0}, {"a": True, "b": False})
    ({'a': 1.0, 'b': None}, {'a': None, 'b': 2.0})
    """

    def trains(path: str, m: Any, leaf: Any) -> bool:
        return _trains(m) and paths.can_train(path, leaf)

    trained = paths.each(lambda *it: it[2] if trains(*it) else None, mask, params)
    frozen = paths.each(lambda *it: None if trains(*it) else it[2], mask, params)
    return trained, frozen


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree again from the two parts of `split`.

    >>> join({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
    {'a': 1.0, 'b': 2.0}
    """
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda leaf: leaf is None)


def static(params: Params, mask: Mask) -> Mask:
    """The bool tree of a mask: does the leaf have anything to train. This is what compilation depends on.

    >>> static({"a": 1.0, "b": 2.0, "c": 3}, {"a": 0.5, "b": 0.0, "c": True})
    {'a': True, 'b': False, 'c': False}
    """
    return paths.each(lambda path, leaf, m: _trains(m) and paths.can_train(path, leaf), params, mask)


def _trains(leaf: Any) -> bool:
    """A leaf of a mask that leaves something to train; a traced number or an array does."""
    if isinstance(leaf, bool | int | float | np.bool_ | np.number):
        return bool(leaf != 0)
    return True


def lint(params: Params, mask: Mask, fresh: Mask | None = None) -> None:
    """Raise InputError, naming the leaf, for a mask that cannot be meant.

    Another tree than `params`; a leaf that is neither bool, number nor array; a number that is negative or not
    finite; an array that does not fit its leaf, selects by other values than 0 and 1, or selects nothing; nothing
    trained; a leaf that `fresh` says was drawn anew, frozen.
    """
    paths.same_structure(params, mask, "the parameters", "the mask")
    leaves = zip(paths.names(params), jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    for path, leaf, m in leaves:
        _lint_leaf(path, leaf, m)
    trained = static(params, mask)
    if not any(jax.tree.leaves(trained)):
        raise InputError("the mask freezes every leaf: train at least one")
    if fresh is not None:
        paths.same_structure(params, fresh, "the parameters", "the fresh mask")
        trainable = paths.each(paths.can_train, params)
        rows = zip(paths.names(params), *map(jax.tree.leaves, (fresh, trained, trainable)), strict=True)
        lost = [path for path, drawn, trains, can in rows if drawn and can and not trains]
        if lost:
            raise InputError(
                f"the mask freezes {paths.some(lost)}, which was drawn anew: return masks.union(mask, context.fresh)"
            )


def _lint_leaf(path: str, leaf: Any, m: Any) -> None:
    if isinstance(m, bool | np.bool_):
        return
    if isinstance(m, int | float | np.number):
        if not math.isfinite(m) or m < 0:
            raise InputError(f"the mask's number at '{path}' is {m}: it must be finite and at least 0")
        return
    if not isinstance(m, np.ndarray | jax.Array):
        raise InputError(f"the mask's leaf at '{path}' is {m!r}: give True, False, a number or an array")
    shape = jnp.shape(leaf)
    try:
        fits = np.broadcast_shapes(m.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"the mask's array at '{path}' has shape {m.shape}, which does not broadcast to {shape}")
    values = np.asarray(m)
    if not np.isin(values, (0, 1)).all():
        raise InputError(f"the mask's array at '{path}' has values beside 0 and 1: it selects; scale with a number")
    if not values.any():
        raise InputError(f"the mask's array at '{path}' is all zero: write False")


class Row(NamedTuple):
    """A line of the mask table."""

    path: str
    shape: tuple[int, ...]
    trained: str
    """'trained', 'frozen', 'x 0.1' (a scaled update) or 'part' (an array)."""
    size: int
    """How many numbers the leaf holds."""
    trained_size: int
    """Numbers of it that train."""


def table(params: Params, mask: Mask) -> list[Row]:
    """A row for each leaf: path, shape, trained or frozen, how many numbers.

    >>> table({"b": np.zeros(3)}, {"b": True})
    [Row(path='b', shape=(3,), trained='trained', size=3, trained_size=3)]
    """
    rows = []
    trained = jax.tree.leaves(static(params, mask))
    leaves = zip(paths.names(params), jax.tree.leaves(params), jax.tree.leaves(mask), trained, strict=True)
    for path, leaf, m, trains in leaves:
        shape = tuple(jnp.shape(leaf))
        count = math.prod(shape)
        selected = count if trains else 0
        word = "trained" if trains else "frozen"
        if trains and isinstance(m, np.ndarray | jax.Array) and np.ndim(m):
            selected, word = int(np.broadcast_to(np.asarray(m), shape).astype(bool).sum()), "part"
        elif trains and not isinstance(m, bool | np.bool_) and float(m) != 1:
            word = f"x {float(m):g}"
        rows.append(Row(path, shape, word, count, selected))
    return rows


def to_json(mask: Mask) -> str:
    """A mask of bools and numbers as JSON, {path: value}; raises InputError for an array leaf.

    >>> to_json({"head": {"bias": True, "kernel": 0.5}})
    '{"head/bias": true, "head/kernel": 0.5}'
    """
    values = dict(zip(paths.names(mask), jax.tree.leaves(mask), strict=True))
    for path, m in values.items():
        if not isinstance(m, bool | int | float | np.bool_ | np.number):
            raise InputError(f"the mask's leaf at '{path}' is an array: save it as .npz")
    return json.dumps({path: m.item() if isinstance(m, np.generic) else m for path, m in values.items()})


def from_json(text: str, params: Params) -> Mask:
    """The mask that `to_json` wrote, for parameters of the same paths; raises InputError for others.

    >>> from_json('{"a": true}', {"a": 1.0})
    {'a': True}
    """
    values = json.loads(text)
    known = paths.names(params)
    if set(values) != set(known):
        odd = sorted(set(values) ^ set(known))
        raise InputError(
            f"the mask in JSON and the parameters differ at {paths.some(odd)}: they are of different models"
        )
    return jax.tree.unflatten(jax.tree.structure(params), [values[path] for path in known])
