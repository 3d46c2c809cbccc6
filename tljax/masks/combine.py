"""Combine masks, take trees apart by them, and follow them through phases."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths, plugins
from tljax.masks.leaf import Elements, canonical_leaf, chosen, plain, selects, traced, trains_at
from tljax.types import InputError, Mask, Params


def union(*parts: Mask | None) -> Mask:
    """Train what any of the masks trains. Leaves are bools or bool arrays; None stands for a mask that trains nothing.

    >>> union({"a": True, "b": False}, {"a": False, "b": np.array([True, False])}, None)
    {'a': True, 'b': array([ True, False])}
    """
    return _combine("union", True, parts)


def intersect(*parts: Mask) -> Mask:
    """Train what all of the masks train. Leaves are bools or bool arrays.

    >>> intersect({"a": True, "b": False}, {"a": True, "b": True})
    {'a': True, 'b': False}
    """
    return _combine("intersect", False, parts)


def invert(mask: Mask) -> Mask:
    """Train what the mask freezes. Leaves are bools or bool arrays.

    Integers and running statistics stay frozen all the same.

    >>> invert({"a": True, "b": np.array([True, False])})
    {'a': False, 'b': array([False,  True])}
    """
    paths.names(mask)
    return paths.each(lambda path, leaf: _inverted(_bools("invert", path, leaf)), mask)


def _inverted(m: Any) -> Any:
    """The opposite of a bool or a bool array."""
    return ~m if selects(m) else not m


def require_bools(what: str, mask: Mask) -> None:
    """Raise InputError, naming the leaf, if a leaf of the mask is not a bool; `what` names the caller."""
    for path, leaf in paths.items(mask):
        if isinstance(leaf, jax.core.Tracer):
            raise traced(path)
        if not isinstance(plain(leaf), bool | np.bool_):
            raise InputError(
                f"{what}: the leaf at '{path}' is {plugins.shown(leaf)}, not a bool: combine bools, then scale"
            )


def _combine(name: str, decisive: bool, parts: tuple[Mask | None, ...]) -> Mask:
    """The union or intersection of masks; `decisive` is the bool that decides alone: True in a union, else False."""
    masks = [part for part in parts if part is not None]
    if not masks:
        raise InputError(f"{name}: no mask given")
    for part in masks:
        paths.same_structure(masks[0], part, "the first mask", "another")
    paths.names(masks[0])

    def combined(path: str, *leaves: Any) -> Any:
        bools = [_bools(name, path, leaf) for leaf in leaves]
        if any(m is decisive for m in bools):
            return decisive
        arrays = [m for m in bools if not isinstance(m, bool)]
        if not arrays:
            return not decisive
        try:
            same_shape = np.broadcast_arrays(*arrays)
        except ValueError as error:
            shapes = " and ".join(str(m.shape) for m in arrays)
            raise InputError(f"{name}: the arrays at '{path}' have the shapes {shapes}: give them one shape") from error
        return np.any(same_shape, axis=0) if decisive else np.all(same_shape, axis=0)

    return paths.each(combined, *masks)


def _bools(what: str, path: str, leaf: Any) -> Any:
    """A leaf as a bool or a NumPy bool array. Raises InputError for a rate."""
    if isinstance(leaf, jax.core.Tracer):
        raise traced(path)
    leaf = plain(leaf)
    if isinstance(leaf, bool | np.bool_):
        return bool(leaf)
    if selects(leaf) and (m := canonical_leaf(path, leaf)).dtype == bool:
        return m
    raise InputError(f"{what}: the leaf at '{path}' is {plugins.shown(leaf)}, not a bool: combine bools, then scale")


def also(mask: Mask, fresh: Mask | None) -> Mask:
    """The mask, with leaves of any kind, but True wherever `fresh`, a mask of bools, is; None stands for no leaf.

    >>> also({"a": 0.1, "b": 0.5}, {"a": False, "b": True})
    {'a': 0.1, 'b': True}
    """
    if fresh is None:
        return mask
    paths.same_structure(mask, fresh, "the mask", "the fresh mask")
    require_bools("also", fresh)
    return jax.tree.map(lambda m, drawn: True if drawn else m, mask, fresh)


def scale(mask: Mask, factor: Any) -> Mask:
    """The mask with every number times `factor`: True becomes `factor`, False stays, and so in arrays.

    A traced factor is not checked. Raises InputError for a factor that is negative or not finite, and a traced bool.

    >>> scale({"a": True, "b": False, "c": 0.5, "d": np.array([True, False])}, 0.1)
    {'a': 0.1, 'b': False, 'c': 0.05, 'd': array([0.1, 0. ])}
    """
    factor = plain(factor)
    if isinstance(factor, np.integer):  # a small type of NumPy's would overflow
        factor = int(factor)
    if isinstance(factor, int | float | np.number) and not (math.isfinite(factor) and factor >= 0):
        raise InputError(f"scale: the factor is {factor}: it must be finite and at least 0")

    def scaled(path: str, leaf: Any) -> Any:
        if selects(leaf):
            return canonical_leaf(path, leaf) * factor
        leaf = plain(leaf)
        if isinstance(leaf, bool | np.bool_):
            return factor if leaf else False
        return (canonical_leaf(path, leaf) if isinstance(leaf, jax.core.Tracer) else leaf) * factor

    paths.names(mask)
    return paths.each(scaled, mask)


def canonical(params: Params, mask: Mask) -> Mask:
    """The mask in the structure of `params`, matched by path, with leaves of four kinds. All of tljax works with these.

    The kinds are a bool; a float (a rate, other than 0 and 1); a NumPy bool array, which selects elements; a NumPy
    float array, which scales by element, where 0 freezes exactly. Arrays broadcast to their leaf; one of zeros and ones
    alone is of bools. `params` may be boxed or wrapped otherwise than the mask (FrozenDict, `nn.Partitioned`, variables
    of NNX), and have None in places, as gradients of the trained part have. Raises InputError, naming the leaf, for
    different paths, an array that does not fit, a rate that is negative or not finite, and a traced bool.

    >>> canonical({"a": np.ones(2), "b": np.ones(2)}, {"a": 1.0, "b": np.array([0.5, 0.0])})
    {'a': True, 'b': array([0.5, 0. ])}
    """
    return jax.tree.unflatten(*_canonical(params, mask))


def _canonical(params: Params, mask: Mask) -> tuple[Any, list[Any]]:
    """(structure of the mask, canonical leaves). Where `params` has None, any leaf of the mask fits."""
    placed = _placed(params, mask)
    structure: Any = jax.tree.structure(placed)
    mask_paths = set(paths.names(placed))
    for path in paths.names(params):
        if path not in mask_paths:
            raise InputError(f"the mask's leaf at '{path}' is None: give True, False, a number or an array")
    leaves = [canonical_leaf(path, m) for path, m in paths.items(placed)]
    for path, leaf, m in zip(paths.names(placed), structure.flatten_up_to(params), leaves, strict=True):
        if leaf is not None:
            require_fit(path, leaf, m)
    return structure, leaves


def require_fit(path: str, leaf: Any, m: Any) -> None:
    """Raise InputError, naming the leaf, if a mask's array does not broadcast to its leaf, or if `Elements` are of a
    leaf of another shape."""
    shape = jnp.shape(leaf)
    if isinstance(m, Elements) and m.array is not None and m.array.shape != shape:
        raise InputError(
            f"the mask's Elements at '{path}' are of a leaf of shape {m.array.shape}, and this one has {shape}: call "
            "optimizer.gathered with these parameters"
        )
    if not selects(m):
        return
    try:
        fits = np.broadcast_shapes(m.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"the mask's array at '{path}' has shape {m.shape}, which does not broadcast to {shape}: give a bool, a "
            "number, or an array that does"
        )


def split(params: Params, mask: Mask) -> tuple[Params, Params]:
    """(trained, frozen): two trees like `params`, each with None where the other has the leaf.

    Trees are matched by path, as in `canonical`, and `params` may have None in some places already. A leaf of which an
    array trains elements is among the trained. Raises InputError for trees of different paths and for a traced bool.

    >>> split({"a": 1.0, "b": 2.0}, {"a": True, "b": False})
    ({'a': 1.0, 'b': None}, {'a': None, 'b': 2.0})
    """
    placed = _placed(params, mask)
    return parted(params, placed, [trains_at(path, m) for path, m in paths.items(placed)])


def parted(params: Params, mask: Mask, trains: Sequence[bool]) -> tuple[Params, Params]:
    """The two trees of `split`, for a mask in the structure of `params`; `trains` says which of its leaves train."""
    structure: Any = jax.tree.structure(mask)
    leaves = structure.flatten_up_to(params)
    able = iter(paths.trainable(params))
    flags = [leaf is not None and next(able) and train for leaf, train in zip(leaves, trains, strict=True)]
    trained = [leaf if train else None for leaf, train in zip(leaves, flags, strict=True)]
    frozen = [None if train else leaf for leaf, train in zip(leaves, flags, strict=True)]
    return jax.tree.unflatten(structure, trained), jax.tree.unflatten(structure, frozen)


def _placed(params: Params, mask: Mask) -> Mask:
    """The mask in the structure of `params`, in which None may stand for a leaf. Raises InputError for other paths."""
    treedef: Any = jax.tree.structure(mask)
    try:
        parts = treedef.flatten_up_to(params)
        same = all(part is None or jax.tree_util.all_leaves([part]) for part in parts)
    except (ValueError, TypeError):
        same = False
    if same:
        return mask
    if (placed := paths.placed(mask, params)) is None:
        paths.same_structure(params, mask, "the parameters", "the mask")
    return placed


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree, from the two parts of `split`.

    >>> join({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
    {'a': 1.0, 'b': 2.0}
    """
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda leaf: leaf is None)


def static(params: Params, mask: Mask) -> Mask:
    """For each leaf, True if the mask trains any of it. Compilation depends on this tree of bools.

    Raises InputError for trees of different paths, and for a traced bool.

    >>> static({"a": 1.0, "b": 2.0, "c": 3}, {"a": 0.5, "b": 0.0, "c": True})
    {'a': True, 'b': False, 'c': False}
    """
    if (placed := paths.placed(mask, params)) is None:
        paths.same_structure(params, mask, "the parameters", "the mask")
    paths.same_structure(params, placed, "the parameters", "the mask")
    rows = zip(paths.items(placed), paths.trainable(params), strict=True)
    flags = [trains_at(path, m) and able for (path, m), able in rows]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def since(*history: Mask) -> Any:
    """The ages after a history of masks, one a phase: for each leaf the phase since which it trains without a gap.

    An age is an int, and -1 if the last mask freezes the leaf. Where arrays freed elements of a leaf in several phases
    it is an int array, which broadcasts to the leaf, and -1 where an element is frozen. A mask's number of 0 freezes.
    Raises InputError for no mask, or masks of different trees.

    >>> since({"head": True, "body": False}, {"head": True, "body": 0.1})
    {'body': 1, 'head': 0}
    >>> since({"w": np.array([False, True])}, {"w": True})
    {'w': array([1, 0])}
    """
    if not history:
        raise InputError("since: no mask given: give the mask of every phase so far")
    for mask in history:
        paths.same_structure(history[0], mask, "the first mask", "another")
    paths.names(history[0])
    return paths.each(_age, *history)


def _age(path: str, *leaves: Any) -> Any:
    """The age of one leaf, from its leaves in the masks of all phases."""
    age: Any = -1
    for phase, leaf in enumerate(leaves):
        trains_at(path, leaf)  # raises InputError for a traced bool
        on = chosen(leaf)
        age = np.where(on, np.where(age < 0, phase, age), -1)
    ages = np.unique(age[age >= 0])
    return age if len(ages) > 1 else int(ages[0]) if len(ages) else -1
