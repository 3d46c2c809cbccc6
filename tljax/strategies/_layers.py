"""Stages as papers count layers: a stage that is nothing but a norm goes with its neighbour."""

from collections.abc import Sequence

import jax.numpy as jnp

from tljax import masks, paths
from tljax.types import Params

_SCALES = ("scale", "weight", "gamma")
_BIASES = ("bias", "beta", "offset")


def with_block(params: Params, stages: Sequence[str]) -> list[tuple[str, ...]]:
    """The stages, each in a tuple, and a norm with the stage below it, whose outputs it normalises.

    He et al. 2022, "Masked autoencoders are scalable vision learners", arXiv:2111.06377, section 4.3, count so: to
    train 0 blocks is to train the head alone, and with the last block goes the norm after it.

    >>> params = {"block": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    >>> with_block(params, ("block", "norm", "head"))
    [('block', 'norm'), ('head',)]
    """
    groups: list[tuple[str, ...]] = []
    for name in stages:
        if groups and _is_norm(params, name):
            groups[-1] += (name,)
        else:
            groups.append((name,))
    return groups


def with_head(params: Params, stages: Sequence[str]) -> list[tuple[str, ...]]:
    """The stages, each in a tuple, and a norm with the stage above it.

    >>> params = {"block": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    >>> with_head(params, ("block", "norm", "head"))
    [('block',), ('norm', 'head')]
    """
    return [tuple(reversed(group)) for group in reversed(with_block(params, tuple(reversed(stages))))]


def _is_norm(params: Params, stage: str) -> bool:
    """Whether a stage has a scale of one axis, maybe a bias of its length, and nothing else that can train."""
    holds = paths.inside((stage,))
    rows = zip(paths.items(params), paths.trainable(params), strict=True)
    shapes = {masks.leaf_name(path): jnp.shape(leaf) for (path, leaf), able in rows if able and holds(path)}
    scales, rest = [name for name in shapes if name in _SCALES], [name for name in shapes if name not in _SCALES]
    lengths = set(shapes.values())
    return len(scales) == 1 and set(rest) <= set(_BIASES) and len(lengths) == 1 and len(next(iter(lengths))) == 1
