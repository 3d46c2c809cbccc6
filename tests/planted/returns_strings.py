"""Planted: words for bools; 'no' is true for Python."""

import jax

from tljax import masks


def strategy(params, context):
    trained = masks.union(masks.under(params, context.stages[-1]), context.fresh)
    return jax.tree.map(lambda trains: "yes" if trains else "no", trained)
