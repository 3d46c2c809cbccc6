"""Train the biases, and the head if it was drawn anew.

Source: Ben Zaken et al. 2022, "BitFit: simple parameter-efficient fine-tuning", arXiv:2106.10199.
"""

from tljax import masks
from tljax.types import Context, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """Every leaf named 'bias' trains, and whatever was drawn anew."""
    return masks.union(masks.by_glob(params, "**/bias"), context.fresh)
