"""Train the scales and biases of the normalisation layers.

Source: Frankle et al. 2021, "Training BatchNorm and only BatchNorm", arXiv:2003.00152.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from tljax import masks, paths
from tljax.types import Context, InputError, Mask, Params

_SCALES = ("scale", "weight", "gamma")
_BIASES = ("bias", "beta", "offset")
_NAMES = (*_SCALES, *_BIASES)


def strategy(params: Params, context: Context) -> Mask:
    """The scale and the bias of every normalisation layer train, and whatever was drawn anew.

    A layer is one whose own name says so (norm, bn, ln, gn, with digits), or that keeps running statistics, and whose
    leaves have one shape: what has a kernel beside a bias is no norm. So is, whatever its name, one that has a scale
    and a bias of one axis and one length and nothing else, such as a stage that is a LayerNorm. Scales are called
    scale, weight or gamma, biases bias, beta or offset. Raises InputError for a model without any, and for a norm with
    leaves of other names or shapes. What may be a norm and is not known as one, such as a scale alone, `left_out`
    names.
    """
    norms = set(_norms(params))
    try:
        mask = masks.by_path(params, lambda path: path in norms)
    except InputError as error:
        raise InputError(f"norm_only: the model has no normalisation layer, such as 'norm/scale': {error}") from error
    return masks.union(mask, context.fresh)


def left_out(params: Params, context: Context) -> list[str]:
    """The paths of what may be a norm's, and stays frozen, since neither its name nor its leaves say so.

    That is a scale of one axis, with its bias, in a layer without leaves of more axes: a root mean square norm that is
    a stage of its own has nothing but a scale, as a layer's own scaling has.

    >>> dense = {"kernel": jnp.ones((3, 3)), "scale": jnp.ones(3)}
    >>> left_out({"final": {"scale": jnp.ones(3)}, "dense": dense}, Context())
    ['final/scale']
    """
    known = set(_norms(params))
    fresh = {path for path, drawn in paths.items(context.fresh) if drawn} if context.fresh is not None else set()
    result = []
    for leaves in _layers(params)[0].values():
        flat = all(len(shape) == 1 for _, shape in leaves.values())
        lengths = {shape for name, (_, shape) in leaves.items() if name in _SCALES}
        if flat and len(lengths) == 1:
            result += [path for name, (path, shape) in leaves.items() if name in _NAMES and shape in lengths]
    return [path for path in result if path not in known | fresh]


Layers = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
"""{container: {name: (path, shape)}} of leaves that can train."""


def _layers(params: Params) -> tuple[Layers, set[str]]:
    """(the containers with leaves that can train, the containers that keep running statistics)."""
    layers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    statistics = set()
    rows = zip(paths.items(params), paths.unboxed_names(params), paths.trainable(params), strict=True)
    for (path, leaf), short, able in rows:
        place, _, name = short.removesuffix("/value").replace(".", "/").rpartition("/")  # a flat state_dict has dots
        if able:
            layers.setdefault(place, {})[name] = path, jnp.shape(leaf)
        elif name in ("mean", "running_mean", "moving_mean"):
            statistics.add(place)
    return layers, statistics


def _norms(params: Params) -> list[str]:
    """The paths of the scales and biases."""
    layers, statistics = _layers(params)
    # All that is above a container with leaves; a scale and a bias there may be anything.
    above = {"/".join(parts[:i]) for place in layers for parts in [place.split("/")] for i in range(len(parts))}
    outer = {place.rpartition("/")[0] for place in layers}
    return [
        path
        for place, leaves in layers.items()
        if paths.is_norm(place.rpartition("/")[2]) or place in statistics or (place not in above and _is_pair(leaves))
        # A block called PreNormBlock may own a scale, but not a bias too: that is a norm with layers of its own.
        if place not in outer or (len(leaves) == 2 and set(leaves) & set(_SCALES) and set(leaves) & set(_BIASES))
        for path in _norm(place, leaves)
    ]


def _is_pair(leaves: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether a layer has a scale and a bias of one axis and one length, and nothing else."""
    shapes = [shape for _, shape in leaves.values()]
    names = len(leaves) == 2 and set(leaves) & set(_SCALES) and set(leaves) & set(_BIASES)
    return bool(names) and len(shapes[0]) == 1 and shapes[0] == shapes[1]


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
