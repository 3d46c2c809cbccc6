"""Train the biases, and the head if it was drawn anew.

Source: Ben Zaken et al. 2022, "BitFit: simple parameter-efficient fine-tuning", arXiv:2106.10199.
"""

from tljax import masks
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """Every leaf named 'bias' trains, and whatever was drawn anew."""
    try:
        biases = masks.by_path(params, lambda path: masks.leaf_name(path) == "bias")
    except InputError as error:
        raise InputError(f"bias_only: the model has no leaf named 'bias': {error}") from error
    return masks.union(biases, context.fresh)
