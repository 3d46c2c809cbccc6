"""Train everything from a fresh draw: the baseline that transfer must beat.

Source: He et al. 2019, "Rethinking ImageNet pre-training", arXiv:1811.08883.
"""

from collections.abc import Sequence

from tljax import masks
from tljax.types import Context, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """Everything trains."""
    return masks.by_path(params, lambda path: True)


def reinit(context: Context) -> Sequence[str]:
    """Nothing of a source is kept."""
    return context.stages
