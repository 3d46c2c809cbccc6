"""Train the first stage and the head, and a few of the blocks between them, drawn anew every few steps.

Source: Pan et al. 2024, "LISA: Layerwise importance sampling for memory-efficient large language model fine-tuning",
arXiv:2403.17919, algorithm 1. It says nothing of the moments of a block that is switched off: here they are given up.
"""

import functools

import jax
import jax.numpy as jnp

from tljax.strategies import _moving as moving
from tljax.types import Context, InputError, MaskSchedule, Params, Seen


def strategy(params: Params, context: Context, *, layers: int = 2, every: int = 20) -> MaskSchedule:
    """`layers` blocks (all of them where there are fewer) are on for `every` steps; whatever was drawn anew always is.

    A stage that is nothing but a norm goes with the stage below it, or with the head that follows it. Raises InputError
    for a number below 1, for a model without a stage between the first and the head, and for a leaf that can train but
    is in no stage.
    """
    moving.require_steps("lisa", every=every)
    if layers < 1:
        raise InputError(f"lisa:layers={layers}: it is a number of blocks, at least 1")
    blocks = moving.middle(params, context, "lisa")
    groups = moving.in_blocks(params, blocks, context.fresh)
    choose = functools.partial(draw, blocks=len(blocks), layers=min(layers, len(blocks)))
    scope = moving.everything(params)
    return MaskSchedule(moving.no_memory, choose, scope, every=every, off="dropped", groups=groups, slots=layers)


def draw(memory: tuple[()], seen: Seen, *, blocks: int, layers: int) -> tuple[Params, tuple[()]]:
    """So many of the blocks, each as likely, without replacement."""
    chosen = 1 + jax.random.permutation(seen.key, blocks)[:layers]
    on = jnp.zeros(blocks + 1, bool).at[chosen].set(True).at[moving.ALWAYS].set(True)
    return moving.groups_mask(seen.groups, on), memory
