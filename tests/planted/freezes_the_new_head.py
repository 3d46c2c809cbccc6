"""Planted: the head that was drawn anew stays as it was drawn."""

from tljax import masks


def strategy(params, context):
    return masks.under(params, context.stages[0])
