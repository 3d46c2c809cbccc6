"""Combine masks, take trees apart by them, and follow them through phases."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tljax import paths
from tljax.masks.leaf import plain, selects, trains, value
from tljax.types import InputError, Mask, Params


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


def require_bools(what: str, mask: Mask) -> None:
    """Raise InputError, naming the leaf, for a mask with leaves that are no bools."""
    for path, leaf in paths.items(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise InputError(f"{what}: the leaf at '{path}' is {leaf!r}, not a bool: combine bools, then scale")


def _combine(name: str, function: Callable[..., bool], parts: tuple[Mask | None, ...]) -> Mask:
    given = [part for part in parts if part is not None]
    if not given:
        raise InputError(f"{name}: no mask given")
    for part in given:
        paths.same_structure(given[0], part, "the first mask", "another")
        require_bools(name, part)
    return jax.tree.map(function, *given)


def also(mask: Mask, fresh: Mask | None) -> Mask:
    """The mask, of leaves of any kind, with True wherever the bools `fresh` are; None stands for nothing.

    >>> also({"a": 0.1, "b": 0.5}, {"a": False, "b": True})
    {'a': 0.1, 'b': True}
    """
    if fresh is None:
        return mask
    paths.same_structure(mask, fresh, "the mask", "the fresh mask")
    require_bools("also", fresh)
    return jax.tree.map(lambda m, drawn: True if drawn else m, mask, fresh)


def scale(mask: Mask, factor: Any) -> Mask:
    """The mask with every number times `factor`: True becomes `factor`, False stays.

    Raises InputError for an array, and for a factor that is negative or not finite; a traced one is taken as it is.

    >>> scale({"a": True, "b": False, "c": 0.5}, 0.1)
    {'a': 0.1, 'b': False, 'c': 0.05}
    """
    factor = plain(factor)
    if isinstance(factor, int | float | np.number) and not (math.isfinite(factor) and factor >= 0):
        raise InputError(f"scale: the factor is {factor}: it must be finite and at least 0")

    def scaled(path: str, leaf: Any) -> Any:
        if selects(leaf):
            raise InputError(f"scale: the mask's leaf at '{path}' is an array, which selects: scale numbers and bools")
        leaf = plain(leaf)
        if isinstance(leaf, bool | np.bool_):
            return factor if leaf else False
        return leaf * factor

    paths.names(mask)
    return paths.each(scaled, mask)


def split(params: Params, mask: Mask) -> tuple[Params, Params]:
    """(trained, frozen): two trees like `params`, each with None where the other has the leaf.

    `params` may have None in some places already, as gradients of the trained part have. Raises InputError for trees
    of different structure.

    >>> split({"a": 1.0, "b": 2.0}, {"a": True, "b": False})
    ({'a': 1.0, 'b': None}, {'a': None, 'b': 2.0})
    """

    _same_but_for_holes(params, mask)

    def kept(path: str, m: Any, leaf: Any) -> bool:
        return trains(m) and paths.can_train(path, leaf)

    trained = paths.each(lambda *it: it[2] if kept(*it) else None, mask, params)
    frozen = paths.each(lambda *it: None if kept(*it) else it[2], mask, params)
    return trained, frozen


def _same_but_for_holes(params: Params, mask: Mask) -> None:
    treedef: Any = jax.tree.structure(mask)
    try:
        parts = treedef.flatten_up_to(params)
        same = all(part is None or jax.tree_util.all_leaves([part]) for part in parts)
    except (ValueError, TypeError):
        same = False
    if not same:
        paths.same_structure(params, mask, "the parameters", "the mask")


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree again from the two parts of `split`.

    >>> join({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
    {'a': 1.0, 'b': 2.0}
    """
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda leaf: leaf is None)


def static(params: Params, mask: Mask) -> Mask:
    """The bool tree of a mask: does the leaf have anything to train. This is what compilation depends on.

    Raises InputError for trees of different structure.

    >>> static({"a": 1.0, "b": 2.0, "c": 3}, {"a": 0.5, "b": 0.0, "c": True})
    {'a': True, 'b': False, 'c': False}
    """
    paths.same_structure(params, mask, "the parameters", "the mask")
    return paths.each(lambda path, leaf, m: trains(m) and paths.can_train(path, leaf), params, mask)


def since(*history: Mask) -> Any:
    """The ages at the last mask of a history, a mask a phase: an int a leaf, the phase since which it trains.

    Without a gap, that is; -1 where the last mask freezes the leaf. A leaf whose array gains elements over the
    phase before counts as freed anew (True after an array gains, an array after True does not). A mask's number of
    0 freezes. Raises InputError for no mask, or masks of different trees.

    >>> since({"head": True, "body": False}, {"head": True, "body": 0.1})
    {'body': 1, 'head': 0}
    """
    if not history:
        raise InputError("since: no mask given: give the mask of every phase so far")
    for mask in history:
        paths.same_structure(history[0], mask, "the first mask", "another")
    return jax.tree.map(_age, *history)


def _age(*leaves: Any) -> int:
    age = -1
    for phase, leaf in enumerate(leaves):
        if not trains(leaf):
            age = -1
        elif age < 0 or _gains(leaves[phase - 1], leaf):
            age = phase
    return age


def _gains(before: Any, now: Any) -> bool:
    """Whether `now` trains elements that `before`, which trains, does not."""
    if not selects(before):
        return False
    return bool((~value(before) & (value(now) if selects(now) else True)).any())
