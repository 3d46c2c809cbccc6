"""Train the leaves whose paths match globs.

Source: rules by path as in Beyer et al. 2022, "Big Vision", github.com/google-research/big_vision.
"""

from tljax import masks
from tljax.types import Context, Mask, Params


def strategy(params: Params, context: Context, *, train: str = "**/kernel") -> Mask:
    """`train=**/kernel+head/**` trains what any of the globs matches, and whatever was drawn anew."""
    return masks.union(masks.by_glob(params, *train.split("+")), context.fresh)
