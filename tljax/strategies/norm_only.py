"""Train the scales and biases of the normalisation layers.

Source: Frankle et al. 2021, "Training BatchNorm and only BatchNorm", arXiv:2003.00152.
"""

from tljax import masks
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """Leaves named 'scale' or 'bias' under a name with 'norm' in it train, and whatever was drawn anew.

    Raises InputError for a model without any.
    """
    try:
        norms = masks.by_path(params, _is_norm)
    except InputError as error:
        raise InputError(f"norm_only: the model has no normalisation layer, such as 'norm/scale': {error}") from error
    return masks.union(norms, context.fresh)


def _is_norm(path: str) -> bool:
    above = path.split("/")[:-1]
    return masks.leaf_name(path) in ("scale", "bias") and any("norm" in name.lower() for name in above)
