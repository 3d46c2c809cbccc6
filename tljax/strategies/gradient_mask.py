"""Train the elements whose mean gradient is largest at the start.

Source: Liu et al. 2024, "Refining salience-aware sparse fine-tuning strategies for language models",
arXiv:2412.13488 (static gradient saliency).
"""

import jax

from tljax import masks
from tljax.types import Context, InputError, Mask, Params

DATA_DRIVEN = True


def strategy(params: Params, context: Context, *, fraction: float = 0.05) -> Mask:
    """`fraction` of the elements of what was kept, by |mean gradient|, and whatever was drawn anew as a whole.

    Raises InputError for a fraction outside (0, 1], and without context.gradient.
    """
    if context.gradient is None:
        raise InputError("gradient_mask needs context.gradient: a function from parameters to the mean gradient of L")
    scores = jax.tree.map(abs, context.gradient(params))
    chosen = masks.top(scores, fraction, among=masks.kept(params, context.fresh))
    return masks.also(chosen, context.fresh)
