"""Train everything, and freeze blocks from the input up as their gradients settle.

Source: Liu et al. 2021, "AutoFreeze: Automatically freezing model blocks to accelerate fine-tuning", arXiv:2102.01386:
the norm of the gradients summed over an interval, its relative change since the last one, and the percentile of these
changes below which a block is frozen, if all blocks under it are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax.strategies import _layers
from tljax.strategies import _moving as moving
from tljax.types import NEVER, Context, InputError, MaskSchedule, Params, Seen


class Memory(NamedTuple):
    """How the gradients of each block went so far."""

    sums: Params
    """Of the gradients of this interval."""
    norms: jax.Array
    """float32 [blocks]: of their sums in the last interval."""
    frozen: jax.Array
    """int32: how many blocks are frozen, from the input up."""
    since: jax.Array
    """int32 [blocks]: the first step in which each was off, `NEVER` of those still on."""


def strategy(params: Params, context: Context, *, every: int = 50, percentile: float = 50) -> MaskSchedule:
    """Every `every` steps blocks whose change is below the `percentile` of those still on are frozen, for good.

    A block is a stage below the head, a norm with the stage below it; the head, and whatever was drawn anew, is always
    on. Raises InputError for a number of steps below 1, a percentile outside (0, 100), a model without a block, and a
    leaf that can train but is in no stage.
    """
    moving.require_steps("autofreeze", every=every)
    if not 0 < percentile < 100:
        raise InputError(f"autofreeze:percentile={percentile}: it is above 0 and below 100")
    _layers.require_all("autofreeze", params, context.stages)
    blocks = _layers.with_block(params, context.stages)[:-1]
    if not blocks:
        raise InputError("autofreeze needs a stage below the head, and context.stages to name it")
    groups = moving.in_blocks(params, blocks, context.fresh)
    return MaskSchedule(
        functools.partial(nothing_seen, blocks=len(blocks)),
        functools.partial(settled, every=every, percentile=percentile),
        moving.everything(params),
        when="after",
        sees=frozenset({"gradients"}),
        off="dropped",
        groups=groups,
        off_since=off_since,
    )


def nothing_seen(params: Params, key: Any, *, blocks: int) -> Memory:
    """The memory before the first step."""
    return Memory(
        jax.tree.map(jnp.zeros_like, params), jnp.zeros(blocks), jnp.zeros((), jnp.int32), jnp.full(blocks, NEVER)
    )


def settled(memory: Memory, seen: Seen, *, every: int, percentile: float) -> tuple[Params, Memory]:
    """What is still on in this step: at the beginning of an interval blocks may be frozen."""
    count, begins = len(memory.norms), (seen.step % every == 0) & (seen.step > 0)
    squares = jnp.zeros(count + 1, memory.norms.dtype)
    for group, total in zip(jax.tree.leaves(seen.groups), jax.tree.leaves(memory.sums), strict=True):
        squares = squares.at[group].add(jnp.sum(jnp.square(total)).astype(squares.dtype))
    norms = jnp.sqrt(squares[1:])
    changes = jnp.abs(memory.norms - norms) / jnp.where(memory.norms > 0, memory.norms, 1)
    active = jnp.arange(count) >= memory.frozen
    least = jnp.nanpercentile(jnp.where(active, changes, jnp.nan), percentile)
    is_settled = ~active | (changes < least)
    frozen = jnp.sum(jnp.cumprod(is_settled), dtype=jnp.int32)
    frozen = jnp.where(begins & (seen.step > every), frozen, memory.frozen)
    on = jnp.concatenate([jnp.ones(1, bool), jnp.arange(count) >= frozen])
    mask = moving.groups_mask(seen.groups, on)
    # Of what is frozen no gradient counts, whether or not it is formed.
    gradients = jax.tree.map(lambda m, g: jnp.where(m, g, 0), mask, seen.gradients)
    sums = jax.tree.map(lambda total, g: jnp.where(begins, g, total + g), memory.sums, gradients)
    since = jnp.where(on[1:], NEVER, jnp.minimum(memory.since, seen.step))
    return mask, Memory(sums, jnp.where(begins, norms, memory.norms), frozen, since)


def off_since(memory: Memory) -> jax.Array:
    """Since when each group is frozen for good: int32 [groups], where the first is never so."""
    return jnp.concatenate([jnp.full(1, NEVER), memory.since])
