"""Train one block at a time for a few steps each, with moments that begin at 0 (block coordinate descent).

Source: Luo et al. 2024, "BAdam: A memory efficient full parameter optimization method for large language models",
arXiv:2404.02827, algorithm 1, with --optimizer=adam. What was drawn anew, such as a new head, is always on; a block
that ends one round and begins the next goes on with its moments, as it is never off.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tljax.strategies import _layers as layers
from tljax.strategies import _moving as moving
from tljax.types import Context, InputError, MaskSchedule, Params, Seen

ORDERS = ("random", "ascending", "descending")


def strategy(params: Params, context: Context, *, every: int = 50, order: str = "random") -> MaskSchedule:
    """Each stage is a block; a block is on for `every` steps. A norm goes with the stage below it, or with the head.

    The blocks come in an `order`: 'random', drawn anew in each round of all blocks, 'ascending' from the input up, or
    'descending'. Raises InputError for another word, for a number below 1, without context.stages, and for a leaf that
    can train but is in no stage.
    """
    moving.require_steps("badam", every=every)
    if order not in ORDERS:
        raise InputError(f"badam:order={order}: give one of {', '.join(ORDERS)}")
    layers.require_all("badam", params, context.stages)
    blocks = moving.blocks(params, context)
    blocks = blocks[::-1] if order == "descending" else blocks
    groups = moving.in_blocks(params, blocks, context.fresh)
    init = functools.partial(first_order, blocks=len(blocks))
    choose = functools.partial(next_block, every=every, shuffled=order == "random")
    return MaskSchedule(init, choose, moving.everything(params), every=every, off="dropped", groups=groups, slots=1)


def first_order(params: Params, key: Any, *, blocks: int) -> jax.Array:
    """The blocks in the order in which they are on: int32 [blocks]."""
    return jnp.arange(blocks)


def next_block(order: jax.Array, seen: Seen, *, every: int, shuffled: bool) -> tuple[Params, jax.Array]:
    """The block whose turn it is; a round begins with an order of its own."""
    count = len(order)
    turn = seen.step // every % count
    if shuffled:
        order = jnp.where(turn == 0, jax.random.permutation(seen.key, count), order)
    on = (jnp.arange(count + 1) == order[turn] + 1).at[moving.ALWAYS].set(True)
    return moving.groups_mask(seen.groups, on), order
