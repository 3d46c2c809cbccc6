"""Planted: the path of the head is mistyped."""

from tljax import masks


def strategy(params, context):
    return masks.by_glob(params, "heed/**")
