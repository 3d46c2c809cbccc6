"""Planted: a mask in a list, where the parameters are not."""

from tljax import masks


def strategy(params, context):
    return [masks.by_path(params, lambda path: True)]
