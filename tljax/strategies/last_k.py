"""Train the last `k` stages, freeze the rest.

Source: Yosinski et al. 2014, "How transferable are features in deep neural networks?", arXiv:1411.1792; of a vision
transformer He et al. 2022, "Masked autoencoders are scalable vision learners", arXiv:2111.06377, section 4.3.
"""

from tljax import masks
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, k: int = 1) -> Mask:
    """`k=1` is a linear probe, `k` as many as there are stages full fine-tuning.

    A stage that is nothing but a norm does not count: it trains with the stage below it. So `k=2` trains a vision
    transformer's last block, the norm after it and the head. Raises InputError for another k, without context.stages,
    and for a leaf that can train but is in no stage.
    """
    layers.require_all("last_k", params, context.stages)
    stages = layers.with_block(params, context.stages)
    if not 1 <= k <= len(stages):
        aside = ", as a norm counts with the stage below it" if len(stages) < len(context.stages) else ""
        raise InputError(f"last_k:k={k}: the model has {len(stages)} stages{aside}, so k is 1 to that many")
    return masks.union(masks.under(params, sum(stages[-k:], ())), context.fresh)
