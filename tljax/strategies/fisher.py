"""Train the elements with the largest Fisher information at the start.

Source: Sung et al. 2021, "Training neural networks with fixed sparse masks", arXiv:2111.09839 (the FISH mask).
"""

from tljax import masks
from tljax.types import Context, InputError, Mask, Params

DATA_DRIVEN = True


def strategy(params: Params, context: Context, *, fraction: float = 0.05) -> Mask:
    """`fraction` of the elements of what was kept, by mean squared gradient, and whatever was drawn anew as a whole.

    Raises InputError for a fraction outside (0, 1], and without context.fisher.
    """
    if context.fisher is None:
        raise InputError("fisher needs context.fisher: a function from parameters to mean squared gradients of L")
    chosen = masks.top(context.fisher(params), fraction, among=masks.kept(params, context.fresh))
    return masks.also(chosen, context.fresh)
