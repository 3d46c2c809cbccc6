"""Train a scale and a shift of what each layer below the head gives, and the head if it was drawn anew.

Source: Lian et al. 2022, "Scaling & shifting your features: a new baseline for efficient model tuning",
arXiv:2210.08823, section 3, where the authors' code (github.com/dongzelian/SSF) has them: after every dense layer,
convolution and norm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax import low_rank, paths
from tljax.strategies import _kernels as kernels
from tljax.types import Context, InputError, Mask, Params

ALL = f"{kernels.ALL}+**/scale"
_SCALE, _SHIFT = _ADDED = ("ssf_scale", "ssf_shift")


def strategy(params: Params, context: Context, *, on: str = ALL, sigma: float = 0.0) -> Mask:
    """The scales and shifts that `adapt` added train, and whatever was drawn anew.

    A layer that gave y gives scale y + shift, with a number an output of each: of a dense layer or a convolution xW + b
    that is x (scale W) + (scale b + shift), of a norm the same with its own scale in W's place. A layer without a bias
    has no shift, for there is nothing to merge it into; the norm after such a convolution has one. Attention's query,
    key, value and out are layers; a norm that has a bias alone is left as it is. Scales begin as 1 and shifts as 0,
    so that the outputs are the source's; the authors draw them from normals around these, of deviation 0.02, as
    `sigma=0.02` does. `on` are globs of kernels and of scales of norms, parted by '+'; the head is never among them.

    Raises InputError for a sigma that is below 0 or not finite, for parameters without scales, and for a
    context.fresh of another tree than the adapted one.
    """
    _require_deviation(sigma)
    return kernels.trained("ssf", params, _ADDED, context.fresh, "scales")


def adapt(
    params: Params, key: jax.Array, context: Context | None = None, *, on: str = ALL, sigma: float = 0.0
) -> Params:
    """The parameters with `ssf_scale` [*outputs], and beside a bias `ssf_shift` [*outputs], in the dict of each kernel
    [*inputs, *outputs] and norm's scale [outputs] below the head that `on` matches.

    Which axes of a kernel are its inputs is known as in LoRA's `adapt`; the key is not used unless there is a sigma.

    Raises InputError for a sigma as above, a glob that matches nothing, where there is nothing to adapt, where no leaf
    can be added, and for parameters that have scales already, which would be lost.
    """
    _require_deviation(sigma)
    if there := kernels.present(params, _ADDED):
        raise InputError(f"ssf: the parameters have scales already, {paths.some(there)}: merge them first")
    layers, rest = _layers(params, context or Context(), on)
    if not layers:
        passed = f"; left out: {kernels.shown(rest)}" if rest else ""
        raise InputError(
            "ssf: no dict below the head has a leaf named 'kernel' [in, out] or of attention or of a convolution, or a "
            f"norm's 'scale'{'' if on == ALL else f', that on={on} matches'}: there is nothing to adapt{passed}"
        )
    waiting = {layer.path: place for place, layer in layers.items()}
    keys = dict(zip(layers, jax.random.split(key, len(layers)), strict=True))

    def add(place: str, node: dict[str, Any]) -> dict[str, Any]:
        layer = layers.get(place)
        if layer is None or not jax.tree_util.all_leaves([node[layer.name]]):
            return node
        del waiting[layer.path]
        dtype, names = jnp.result_type(node[layer.name]), _ADDED if layer.shifts else (_SCALE,)
        noise = sigma * jax.random.normal(keys[place], (2, *layer.outputs), dtype)
        begin = {_SCALE: jnp.ones(layer.outputs, dtype), _SHIFT: jnp.zeros(layer.outputs, dtype)}
        return node | {name: begin[name] + noise[i] if sigma else begin[name] for i, name in enumerate(names)}

    tree = kernels.each_dict(add, params)
    if waiting:
        raise InputError(
            f"ssf: no scale can stand beside {paths.some(sorted(waiting))}: a list, a FrozenDict or an nnx.State takes "
            "no new leaf; give nested dicts, as flax.core.unfreeze and nnx.to_pure_dict make them"
        )
    return tree


def left_out(params: Params, context: Context, *, on: str = ALL) -> list[str]:
    """The paths of the leaves of two axes and more below the head that get no scale, of those that `on` matches if it
    is given: stacked layers, embeddings, kernels whose inputs are not known; and scales of what may be no norm."""
    return list(_layers(params, context, on)[1])


def merge(params: Params) -> Params:
    """Ordinary parameters with the same outputs: scale W and scale b + shift, without what `adapt` added.

    Raises InputError for parameters without scales, a shift without a scale or a scale without its layer, ones of
    another shape than the layer's outputs, and ones in no dict, such as those in a FrozenDict.
    """
    return _folded(params, low_rank.scaled)


def factored(params: Params) -> Params:
    """What `merge` gives, with a `LowRank` of rank 0 in the place of each kernel, so that xW is scaled, and neither
    scale W nor its gradient is formed. Raises InputError as `merge` does."""

    def apart(kernel: Any, scale: Any) -> low_rank.LowRank:
        inputs = jnp.shape(kernel)[: jnp.ndim(kernel) - jnp.ndim(scale)]
        a, b = jnp.zeros((*inputs, 0), scale.dtype), jnp.zeros((0, *jnp.shape(scale)), scale.dtype)
        return low_rank.LowRank(kernel, a, b, scale)

    return _folded(params, apart)


class _Layer(NamedTuple):
    """What is scaled and shifted."""

    path: str
    """Of its kernel, or of its scale."""
    name: str
    """'kernel' or 'scale'."""
    outputs: tuple[int, ...]
    shifts: bool
    """Whether it has a bias, to which a shift can be added."""


def _layers(params: Params, context: Context, on: str) -> tuple[dict[str, _Layer], dict[str, tuple[int, ...]]]:
    """({place of its dict, such as 'block_0/mlp/': layer} below the head, {path: shape} of what is left out)."""
    shapes = kernels.chosen(params, Context(), "**", "**") | kernels.chosen(params, context, ALL, ALL)
    counts, rest = kernels.to_adapt(params, context, kernels.ALL if on == ALL else on, _ADDED)
    layers = {}
    for path, count in counts.items():
        place, outputs = path.removesuffix("kernel"), shapes[path][count:]
        bias = shapes.get(f"{place}bias", outputs)
        if bias == outputs:
            layers[place] = _Layer(path, "kernel", outputs, f"{place}bias" in shapes)
        else:
            rest[path] = shapes[path]
    siblings: dict[str, set[str]] = {}
    for path in shapes:
        place, _, name = path.rpartition("/")
        siblings.setdefault(place, set()).update({name}.difference(_ADDED))
    for path, shape in kernels.chosen(params, context, on, ALL).items():
        place, _, name = path.rpartition("/")
        if name != "scale" or len(shape) != 1:
            continue
        alone = siblings[place] <= {"scale", "bias"} and not place.endswith("kernel")
        prefix = path.removesuffix("scale")
        if alone and shapes.get(f"{prefix}bias", shape) == shape:
            layers[prefix] = _Layer(path, "scale", shape, f"{prefix}bias" in shapes)
        else:
            rest[path] = shape
    return layers, rest


def _folded(params: Params, fold: Callable[[Any, Any], Any]) -> Params:
    """The parameters with fold(kernel, scale) in each kernel's place, and norms and biases as `merge` gives them."""
    if not kernels.present(params, _ADDED):
        raise InputError(f"ssf: the parameters have no scales {_SCALE}: merge those that adapt gave")

    def folded_node(place: str, node: dict[str, Any]) -> dict[str, Any]:
        if not set(_ADDED) & node.keys():
            return node
        name = "kernel" if "kernel" in node else "scale"
        names = (name, _SCALE, *(("bias", _SHIFT) if {"bias", _SHIFT} & node.keys() else ()))
        if missing := [each for each in names if each not in node]:
            there = " and ".join(f"'{place}{each}'" for each in names if each in node)
            raise InputError(f"ssf: {there} without {' and '.join(missing)}: merge the whole tree that adapt gave")
        shapes = {
            place + each: jnp.shape(node[each]) if jax.tree_util.all_leaves([node[each]]) else () for each in names
        }
        layer, outputs, *others = shapes.values()
        inputs = len(layer) - len(outputs)
        fits = layer[inputs:] == outputs and (inputs > 0 if name == "kernel" else inputs == 0)
        if not outputs or not fits or any(other != outputs for other in others):
            raise InputError(f"ssf: scales and shifts [*outputs] do not fit their layer: {kernels.shown(shapes)}")
        kept = {each: leaf for each, leaf in node.items() if each not in _ADDED}
        layer_leaf, scale = jnp.asarray(node[name]), jnp.asarray(node[_SCALE])
        kept[name] = fold(layer_leaf, scale) if name == "kernel" else low_rank.scaled(layer_leaf, scale)
        if _SHIFT in names:
            kept["bias"] = low_rank.scaled(jnp.asarray(node["bias"]), scale) + jnp.asarray(node[_SHIFT])
        return kept

    ordinary = kernels.each_dict(folded_node, params)
    if left := kernels.present(ordinary, _ADDED):
        raise InputError(
            f"ssf: {paths.some(left)} are in no dict of dicts: give nested dicts, as flax.core.unfreeze and "
            "nnx.to_pure_dict make them"
        )
    return ordinary


def _require_deviation(sigma: float) -> None:
    if not 0 <= sigma < float("inf"):
        raise InputError(f"ssf:sigma={sigma}: it is at least 0 and finite")
