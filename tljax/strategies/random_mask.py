"""Train elements drawn at random: the control that every data-driven mask must beat.

Source: Xu and Zhang 2024, "Random masking finds winning tickets for parameter efficient fine-tuning", arXiv:2405.02596.
"""

from tljax import masks
from tljax.strategies import top
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, fraction: float = 0.05) -> Mask:
    """`fraction` of the elements of what was kept, drawn by context.key, and whatever was drawn anew as a whole.

    Raises InputError for a fraction outside (0, 1], and without context.key.
    """
    if context.key is None:
        raise InputError("random_mask needs context.key: a key, such as jax.random.key(0)")
    chosen = masks.top(top.drawn(params, context.key), fraction, among=masks.kept(params, context.fresh))
    return masks.also(chosen, context.fresh)
