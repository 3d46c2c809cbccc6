"""Train the scales and biases of the normalisation layers.

Source: Frankle et al. 2021, "Training BatchNorm and only BatchNorm", arXiv:2003.00152.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from tljax import masks, paths
from tljax.types import Context, InputError, Mask, Params

_NAMES = ("scale", "weight", "gamma", "bias", "beta", "offset")


def strategy(params: Params, context: Context) -> Mask:
    """The scale and the bias of every normalisation layer train, and whatever was drawn anew.

    A layer is one whose own name says so (norm, bn, ln, gn, with digits), or that keeps running statistics, and whose
    leaves have one shape: what has a kernel beside a bias is no norm. Scales are called scale, weight or gamma, biases
    bias, beta or offset. Raises InputError for a model without any, and for a norm with leaves of other names or
    shapes.
    """
    norms = set(_norms(params))
    try:
        mask = masks.by_path(params, lambda path: path in norms)
    except InputError as error:
        raise InputError(f"norm_only: the model has no normalisation layer, such as 'norm/scale': {error}") from error
    return masks.union(mask, context.fresh)


def _norms(params: Params) -> list[str]:
    """The paths of the scales and biases."""
    layers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    statistics = set()
    rows = zip(paths.items(params), paths.unboxed_names(params), paths.trainable(params), strict=True)
    for (path, leaf), short, able in rows:
        place, _, name = short.removesuffix("/value").replace(".", "/").rpartition("/")  # a flat state_dict has dots
        if able:
            layers.setdefault(place, {})[name] = path, jnp.shape(leaf)
        elif name in ("mean", "running_mean", "moving_mean"):
            statistics.add(place)
    outer = {place.rpartition("/")[0] for place in layers}
    return [
        path
        for place, leaves in layers.items()
        if paths.is_norm(place.rpartition("/")[2]) or place in statistics
        # A block called PreNormBlock may own a scale, but not a bias too: that is a norm with layers of its own.
        if place not in outer or (len(leaves) == 2 and set(leaves) & set(_NAMES[:3]) and set(leaves) & set(_NAMES[3:]))
        for path in _norm(place, leaves)
    ]


def _norm(place: str, leaves: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The paths of one container's scale and bias; none if its shapes say that it is no norm."""
    shapes = {name: shape for name, (_, shape) in leaves.items()}
    alike = len(set(shapes.values())) == 1
    flat = all(len(shape) == 1 for shape in shapes.values())
    stacked = alike and set(shapes) <= set(_NAMES) and (len(shapes) == 2 or set(shapes) & {"scale", "gamma"})
    if not flat and not stacked:
        return []  # a dense layer called norm, or one whose weights are normalised
    rest = [name for name in shapes if name not in _NAMES]
    if rest or not alike:
        shown = ", ".join(f"'{name}' {shape}" for name, shape in shapes.items())
        raise InputError(
            f"norm_only: '{place}' looks like a norm, and has the leaves {shown}: a norm has a scale (scale, weight or "
            "gamma) and a bias (bias, beta or offset) of one length; name what trains with pattern:train=.."
        )
    return [path for path, _ in leaves.values()]
