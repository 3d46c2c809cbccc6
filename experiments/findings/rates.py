"""Strategies at a rate of their own, since what few numbers train wants a larger one than what all do."""

from tljax import masks
from tljax.strategies import full, norm_only
from tljax.strategies import random_mask as elements
from tljax.types import Context, Mask, Params


def everything(params: Params, context: Context, *, rate: float = 1.0) -> Mask:
    """Everything trains, at `rate` times the learning rate."""
    return masks.scale(full.strategy(params, context), rate)


def norms(params: Params, context: Context, *, rate: float = 1.0) -> Mask:
    """The norms, and what was drawn anew, train at `rate` times the learning rate."""
    return masks.scale(norm_only.strategy(params, context), rate)


def random_mask(params: Params, context: Context, *, fraction: float = 0.01, rate: float = 1.0) -> Mask:
    """`fraction` of the elements, drawn at random, and what was drawn anew, train at `rate` times the learning rate."""
    return masks.scale(elements.strategy(params, context, fraction=fraction), rate)
