"""Planted: the rate is drawn from NumPy's global randomness, not from context.key."""

import numpy as np

from tljax import masks


def strategy(params, context):
    return masks.also(masks.scale(masks.by_path(params, lambda path: True), np.random.uniform(0.5, 1.0)), context.fresh)
