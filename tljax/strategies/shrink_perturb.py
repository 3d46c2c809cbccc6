"""Train everything, from the source's parameters made smaller and moved at random.

Source: Ash and Adams 2020, "On warm-starting neural network training", arXiv:1910.08475, section 4 (shrink, perturb,
repeat): lambda theta + p, where p is normal.
"""

import jax
import jax.numpy as jnp

from tljax import masks, paths
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, shrink: float = 0.5, sigma: float = 0.01) -> Mask:
    """Everything trains, from `shrink` times what was copied, and normal noise of standard deviation `sigma`.

    `shrink=1:sigma=0` is full fine-tuning, `shrink=0` a start from noise alone; scales of norms are shrunk too. Raises
    InputError for a shrink outside [0, 1], and a sigma that is negative or not finite.
    """
    if not 0 <= shrink <= 1:
        raise InputError(f"shrink_perturb:shrink={shrink}: it is the share of the source that is left, from 0 to 1")
    if not 0 <= sigma < float("inf"):
        raise InputError(f"shrink_perturb:sigma={sigma}: it is a standard deviation, at least 0 and finite")
    return masks.by_path(params, lambda path: True)


def reinit(params: Params, key: jax.Array, context: Context, *, shrink: float = 0.5, sigma: float = 0.01) -> Params:
    """What training starts from: the leaves that were copied and can train, shrunk and perturbed, one draw for each.

    What was drawn anew, such as a new head, is as it was drawn.
    """
    names = paths.names(params)
    fresh = dict(paths.items(context.fresh)) if context.fresh is not None else {}
    able = dict(zip(names, paths.trainable(params), strict=True))
    keys = dict(zip(names, jax.random.split(key, max(1, len(names))), strict=False))

    def moved(path: str, leaf: jax.Array) -> jax.Array:
        if fresh.get(path) or not able[path]:
            return leaf
        noise = sigma * jax.random.normal(keys[path], jnp.shape(leaf), jnp.result_type(leaf)) if sigma else 0
        return shrink * leaf + noise

    return paths.each(moved, params)
