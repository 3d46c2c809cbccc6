"""Train the last `k` stages, freeze the rest.

Source: Yosinski et al. 2014, "How transferable are features in deep neural networks?", arXiv:1411.1792.
"""

from tljax import masks
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, k: int = 1) -> Mask:
    """`k=1` is a linear probe, `k=len(context.stages)` full fine-tuning."""
    if not 1 <= k <= len(context.stages):
        raise InputError(f"last_k:k={k}: the model has {len(context.stages)} stages, so k is 1 to that many")
    return masks.union(masks.under(params, context.stages[-k:]), context.fresh)
