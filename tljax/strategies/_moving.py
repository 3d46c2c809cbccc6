"""What strategies share whose mask moves from step to step: blocks as groups, and the largest elements of a leaf."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax import masks, paths
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Mask, Params

ALWAYS = 0
"""The group of what is always on."""


def no_memory(params: Params, key: Any) -> tuple[()]:
    """The memory of a schedule that has none."""
    return ()


def everything(params: Params) -> Mask:
    """The scope of a schedule by which any leaf may train."""
    return masks.by_path(params, lambda path: True)


def blocks(params: Params, context: Context) -> list[tuple[str, ...]]:
    """The stages, each in a tuple: a norm goes with the stage below it, and the one under the head with the head.

    >>> norm = {"scale": jnp.ones(2)}
    >>> params = dict.fromkeys("ac", {"kernel": jnp.ones((2, 2))}) | {"b": norm, "d": norm, "head": {}}
    >>> blocks(params, Context(stages=("a", "b", "c", "d", "head")))
    [('a', 'b'), ('c',), ('d', 'head')]
    """
    top = (layers.with_head(params, context.stages) or [()])[-1]
    below = context.stages[: len(context.stages) - len(top)]
    return [*layers.with_block(params, below), *([top] if top else [])]


def middle(params: Params, context: Context, name: str) -> list[tuple[str, ...]]:
    """The `blocks` between the first stage (an embedding) and the last (the head).

    Raises InputError, for the strategy `name`, where there are none, and for a leaf that can train but is in no stage.
    """
    layers.require_all(name, params, context.stages)
    between = blocks(params, context)[1:-1]
    if not between:
        raise InputError(f"{name} needs a stage between the first and the last: of {len(context.stages)} there is none")
    return between


def in_blocks(params: Params, blocks: Sequence[Sequence[str]], fresh: Mask | None) -> Params:
    """A tree of ints: i + 1 for the leaves under the prefixes of blocks[i], `ALWAYS` for others and for fresh ones.

    >>> in_blocks({"a": 1.0, "b": 1.0, "c": 1.0}, [("a",), ("b",)], {"a": False, "b": True, "c": False})
    {'a': 1, 'b': 0, 'c': 0}
    """
    inside = [paths.inside(tuple(block)) for block in blocks]
    drawn = {path for path, m in paths.items(fresh) if m} if fresh is not None else set()

    def group(path: str, leaf: Any) -> int:
        return ALWAYS if path in drawn else next((i for i, test in enumerate(inside, start=1) if test(path)), ALWAYS)

    return paths.each(group, params)


def kept_or_fresh(params: Params, fresh: Mask | None) -> Params:
    """A tree of ints: `ALWAYS` for what was drawn anew, 1 for what was kept, of which elements are chosen."""
    return in_blocks(params, [paths.names(params)], fresh)


def groups_mask(groups: Params, on: jax.Array) -> Mask:
    """The mask by which a leaf trains if its group is on: bool [groups].

    >>> {name: bool(m) for name, m in groups_mask({"a": 1, "b": 0}, jnp.array([True, False])).items()}
    {'a': False, 'b': True}
    """
    return jax.tree.map(lambda group: on[group], groups)


def largest(scores: Any, fraction: float) -> jax.Array:
    """Where the scores of a leaf are among its `fraction` that is largest, at least one; more where they are equal.

    >>> largest(jnp.array([3.0, 1.0, 2.0]), 0.5).tolist()
    [True, False, True]
    """
    flat = jnp.reshape(jnp.asarray(scores), -1)
    least = jax.lax.top_k(flat, math.ceil(fraction * flat.size))[0][-1]
    return jnp.asarray(scores) >= least


def require_fraction(name: str, fraction: float) -> None:
    """Raise InputError unless a fraction is above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise InputError(f"{name}:fraction={fraction}: it is above 0 and at most 1")


def require_steps(name: str, **steps: int) -> None:
    """Raise InputError unless numbers of steps are at least 1."""
    for option, number in steps.items():
        if number < 1:
            raise InputError(f"{name}:{option}={number}: it is a number of steps, at least 1")
