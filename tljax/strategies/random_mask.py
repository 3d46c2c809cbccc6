"""Train elements drawn at random: the control that every data-driven mask must beat.

Source: Xu and Zhang 2024, "Random masking finds winning tickets for parameter efficient fine-tuning", arXiv:2405.02596.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, fraction: float = 0.05) -> Mask:
    """`fraction` of the elements of what was kept, drawn by context.key, and whatever was drawn anew as a whole.

    Raises InputError for a fraction outside (0, 1], and without context.key.
    """
    if context.key is None:
        raise InputError("random_mask needs context.key: a key, such as jax.random.key(0)")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    flat = np.asarray(jax.random.uniform(context.key, (int(ends[-1]),)))  # one draw compiles once, whatever the tree
    scores = [piece.reshape(shape) for piece, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
    tree = jax.tree.unflatten(jax.tree.structure(params), scores)
    chosen = masks.top(tree, fraction, among=masks.kept(params, context.fresh))
    return masks.also(chosen, context.fresh)
