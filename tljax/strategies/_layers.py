"""Stages as papers count layers: a stage that is nothing but a norm goes with its neighbour; and all are named."""

from collections.abc import Sequence

import jax.numpy as jnp

from tljax import masks, paths
from tljax.types import InputError, Params

_SCALES = ("scale", "weight", "gamma")
_BIASES = ("bias", "beta", "offset")


def require_stages(strategy: str, stages: Sequence[str]) -> None:
    """Raise InputError, for a strategy, where no stage is named.

    >>> require_stages("last_k", ())
    Traceback (most recent call last):
    ...
    tljax.types.InputError: last_k needs stages: give path prefixes in the order of the model, as \
Context(stages=("conv", "head"))
    """
    if not stages:
        raise InputError(
            f"{strategy} needs stages: give path prefixes in the order of the model, as "
            'Context(stages=("conv", "head"))'
        )


def require_all(strategy: str, params: Params, stages: Sequence[str]) -> None:
    """Raise InputError, for a strategy, where no stage is named, or where a leaf that can train is in none of them.

    >>> require_all("last_k", {"conv": 1.0, "norm": 1.0, "head": 1.0}, ("conv", "head"))
    Traceback (most recent call last):
    ...
    tljax.types.InputError: last_k: no stage holds 'norm': give Context(stages=..) its prefix too, in the order of the \
model
    """
    require_stages(strategy, stages)
    staged = paths.inside(tuple(stages))
    rows = zip(paths.names(params), paths.trainable(params), strict=True)
    if outside := [path for path, able in rows if able and not staged(path)]:
        raise InputError(
            f"{strategy}: no stage holds {paths.some(outside)}: give Context(stages=..) its prefix too, in the order "
            "of the model"
        )


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
