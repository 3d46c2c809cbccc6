"""Fine-tune everything from the source's parameters.

Source: Girshick et al. 2014, "Rich feature hierarchies for accurate object detection", arXiv:1311.2524.
"""

from tljax import masks
from tljax.types import Context, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """Everything trains."""
    return masks.by_path(params, lambda path: True)
