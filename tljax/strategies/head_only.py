"""Feature extraction: train the head on the source's frozen features.

Source: Donahue et al. 2014, "DeCAF: a deep convolutional activation feature", arXiv:1310.1531.
"""

from tljax import masks
from tljax.strategies import _layers as layers
from tljax.types import Context, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """The last stage trains, and whatever else was drawn anew. Raises InputError without context.stages."""
    layers.require_stages("head_only", context.stages)
    return masks.union(masks.under(params, context.stages[-1:]), context.fresh)
