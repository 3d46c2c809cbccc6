"""Slots: leaves of equal shapes in groups that are alike share the optimizer's state of a few of them.

A schedule that trains g of L blocks at a time so keeps moments of g. The optimizer works on a tree of its own,
`Gathered`: what is no block as it is, and g blocks, each in the place of the first of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax import paths
from tljax.types import Params


class Layout(NamedTuple):
    """Which groups share slots."""

    groups: tuple[int, ...]
    """Their ranks."""
    members: tuple[tuple[int, ...], ...]
    """Of each group its leaves: their places among all."""
    slots: int


class Gathered(NamedTuple):
    """A tree in two parts."""

    own: Params
    """What shares no slot; None for other leaves."""
    slots: tuple[Params, ...]
    """What is in each slot, in the place of the first group that shares them; None for other leaves."""


def layout(tree: Params, ranks: Sequence[int], able: Sequence[bool], slots: int) -> Layout | None:
    """The groups that share slots: the most that have as many leaves, of the same shapes and dtypes in their order.

    `ranks` and `able` say of each leaf of which group it is, and whether it may share. None if there are no more such
    groups than slots.

    >>> tree = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(2), "d": jnp.ones(2)}
    >>> layout(tree, [0, 1, 2, 3], [True] * 4, 2)
    Layout(groups=(1, 2, 3), members=((1,), (2,), (3,)), slots=2)
    """
    leaves = jax.tree.leaves(tree)
    places_by_rank: dict[int, list[int]] = {}
    for place, rank in enumerate(ranks):
        places_by_rank.setdefault(rank, []).append(place)
    alike: dict[Any, list[int]] = {}
    for rank, places in sorted(places_by_rank.items()):
        if all(able[place] for place in places):
            form = tuple((jnp.shape(leaves[place]), jnp.result_type(leaves[place])) for place in places)
            alike.setdefault(form, []).append(rank)
    groups = max(alike.values(), key=len, default=[])
    if not slots or len(groups) <= slots:
        return None
    return Layout(tuple(groups), tuple(tuple(places_by_rank[rank]) for rank in groups), slots)


def assign(before: jax.Array, on: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Which group is in each slot, -1 for an empty one: int32 [slots]; how many found none).

    A group that stays on stays in its slot; new ones take the free slots, in their order. `on` is bool [groups].

    >>> [leaf.tolist() for leaf in assign(jnp.array([2, 0]), jnp.array([False, True, True]))]
    [[2, 1], 0]
    """
    stays = (before >= 0) & on[before]
    is_new = on & ~jnp.any((jnp.arange(on.size)[None] == before[:, None]) & stays[:, None], axis=0)
    new = jnp.argsort(~is_new, stable=True)
    turn = jnp.cumsum(~stays) - 1
    count = jnp.sum(is_new, dtype=jnp.int32)
    fills = jnp.where(turn < count, new[jnp.minimum(turn, on.size - 1)], -1)
    after = jnp.where(stays, before, fills).astype(jnp.int32)
    return after, jnp.maximum(0, count - jnp.sum(~stays, dtype=jnp.int32))


def gather(tree: Params, layout: Layout, which: jax.Array) -> Gathered:
    """The two parts of a tree; what is in an empty slot has no meaning.

    >>> tree = {"a": jnp.ones(1), "b": jnp.array([2.0]), "c": jnp.array([3.0])}
    >>> parts = gather(tree, Layout((1, 2), ((1,), (2,)), 1), jnp.array([1]))
    >>> parts.own["b"], parts.slots[0]["b"].tolist(), parts.slots[0]["c"]
    (None, [3.0], None)
    """
    leaves, structure = jax.tree.flatten(tree)
    shared = {place for places in layout.members for place in places}
    unslotted = [None if place in shared else leaf for place, leaf in enumerate(leaves)]
    slots = []
    for slot in range(layout.slots):
        groups = [lambda places=places: [jnp.asarray(leaves[place]) for place in places] for places in layout.members]
        # A selection among all of them would be computed again, from all of them, in each operation that reads it.
        chosen = jax.lax.switch(which[slot], groups)
        held: list[Any] = [None] * len(leaves)
        for place, leaf in zip(layout.members[0], chosen, strict=True):
            held[place] = leaf
        slots.append(jax.tree.unflatten(structure, held))
    return Gathered(jax.tree.unflatten(structure, unslotted), tuple(slots))


def spread(parts: Gathered, layout: Layout, which: jax.Array, otherwise: Params) -> Params:
    """The tree of two parts; where a group is in no slot what `otherwise`, a tree of all leaves, has of it."""
    leaves, structure = jax.tree.flatten(otherwise)
    unslotted = _aligned(parts.own, otherwise)
    leaves = [leaf if mine is None else mine for leaf, mine in zip(leaves, unslotted, strict=True)]
    held = [_aligned(slot, otherwise) for slot in parts.slots]
    for group, places in enumerate(layout.members):
        for i, place in enumerate(places):
            for slot in range(layout.slots):
                leaves[place] = jnp.where(which[slot] == group, held[slot][layout.members[0][i]], leaves[place])
    return jax.tree.unflatten(structure, leaves)


def _aligned(part: Params, whole: Params) -> list[Any]:
    """The leaves of a part in the order of those of the whole, None for those that it lacks."""
    leaf_by_path = dict(paths.items(part))
    return [leaf_by_path.get(name) for name in paths.names(whole)]
