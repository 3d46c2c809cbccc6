"""Train a low-rank change of the kernels below the head, and the head if it was drawn anew.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685, section 4.1;
Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA", arXiv:2312.03732 (rank_stabilised);
Hayou et al. 2024, "LoRA+: efficient low rank adaptation of large models", arXiv:2402.12354 (ratio).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tljax import low_rank, masks, paths
from tljax.strategies import _kernels as kernels
from tljax.types import Context, InputError, Mask, Params

ALL = kernels.ALL


def strategy(
    params: Params,
    context: Context,
    *,
    rank: int = 4,
    scale: float = 4.0,
    rank_stabilised: bool = False,
    ratio: float = 1.0,
    on: str = ALL,
) -> Mask:
    """The factors A and B that `adapt` added train, and whatever was drawn anew.

    A kernel W with its factors means W + scale / rank A B; `rank_stabilised` divides by the root of the rank instead.
    `on=block_*/attention/{query,value}/kernel` adapts the kernels that any of the globs matches, parted by '+'; the
    head is never among them. B learns at `ratio` times the rate of A and of the head: LoRA+ has
    1 for LoRA, and 16 as a start. Raises InputError for a rank below 1, a scale or ratio that is not above 0, and
    parameters without factors.
    """
    _gain(rank, scale, rank_stabilised)
    if not 0 < ratio < float("inf"):
        raise InputError(f"lora:ratio={ratio}: it must be above 0 and finite")
    try:
        factors = masks.by_path(params, lambda path: masks.leaf_name(path) in _FACTORS)
    except InputError as error:
        raise InputError("lora: the parameters have no factors: call adapt(params, key) first") from error
    mask = masks.union(factors, context.fresh)
    if ratio == 1:
        return mask
    return paths.each(lambda path, trains: ratio if trains and masks.leaf_name(path) == "lora_b" else trains, mask)


def adapt(params: Params, key: jax.Array, context: Context | None = None, *, rank: int = 4, on: str = ALL) -> Params:
    """The parameters with factors `lora_a` [*inputs, rank] and `lora_b` [rank, *outputs] beside each `kernel`
    [*inputs, *outputs] below the head that `on` matches.

    The head is the last of context.stages; without stages it is whatever is called 'head'. Which axes of a kernel are
    its inputs, context.contracted says; where it does not, they are all but the last of a kernel of two axes or four
    (a convolution), and follow from the names of three (attention's query, key and value, which have one, and out,
    which has two). lora_a is normal of variance 1 / inputs (LeCun), lora_b zero, so that the outputs are unchanged.

    Raises InputError for a rank below 1, a glob that matches nothing, where there is no such kernel, for a kernel that
    is in no dict, where no leaf can be added, and for parameters that have factors already, which would be lost.
    `left_out` names the kernels whose inputs are not known, which stay frozen.
    """
    _gain(rank, 1.0, False)
    if there := _factors(params):
        raise InputError(f"lora: the parameters have factors already, {paths.some(there)}: merge them first")
    inputs, rest = kernels.to_adapt(params, context or Context(), on, _FACTORS)
    if not inputs:
        passed = f"; left out: {kernels.shown(rest)}" if rest else ""
        raise InputError(
            f"lora: no dict below the head has a leaf named 'kernel' [in, out] or of attention or of a convolution"
            f"{'' if on == ALL else f', that on={on} matches'}: there is nothing to adapt{passed}"
        )
    keys = dict(zip(inputs, jax.random.split(key, len(inputs)), strict=True))

    def add(path: str, node: dict[str, Any]) -> dict[str, Any]:
        own = keys.pop(path + "kernel", None)
        if own is None:
            return node
        shape, dtype = jnp.shape(node["kernel"]), jnp.result_type(node["kernel"])
        ins, outs = shape[: inputs[path + "kernel"]], shape[inputs[path + "kernel"] :]
        fan_in = math.prod(ins)
        a = jax.random.normal(own, (fan_in, rank), dtype) * fan_in**-0.5
        return {**node, "lora_a": a.reshape(*ins, rank), "lora_b": jnp.zeros((rank, *outs), dtype)}

    adapted = kernels.each_dict(add, params)
    if keys:
        raise InputError(
            f"lora: no factors can stand beside {paths.some(sorted(keys))}: a list, a FrozenDict or an nnx.State takes "
            "no new leaf; give nested dicts, as flax.core.unfreeze and nnx.to_pure_dict make them"
        )
    return adapted


def left_out(params: Params, context: Context, *, on: str = ALL) -> list[str]:
    """The paths of the leaves of two axes and more below the head that get no factors, of those that `on` matches if it
    is given: stacked layers, embeddings, kernels whose inputs are not known. Biases are none, whatever their axes."""
    return list(kernels.to_adapt(params, context, on, _FACTORS)[1])


def merge(params: Params, *, rank: int = 4, scale: float = 4.0, rank_stabilised: bool = False) -> Params:
    """Ordinary parameters with the same outputs: kernel + scale/rank lora_a lora_b, without the factors.

    Raises InputError for parameters without factors, factors of another rank or shape, one without the other or without
    their kernel, and factors in no dict, such as those in a FrozenDict.
    """
    gain = _gain(rank, scale, rank_stabilised)
    return _folded(params, rank, lambda kernel, a, b: kernel + gain * low_rank.product(a, b))


def factored(params: Params, *, rank: int = 4, scale: float = 4.0, rank_stabilised: bool = False) -> Params:
    """What `merge` gives, with a `LowRank` in the place of each sum. Raises InputError as it does."""
    gain = _gain(rank, scale, rank_stabilised)
    return _folded(params, rank, lambda kernel, a, b: low_rank.LowRank(kernel, a, gain * b))


def _gain(rank: int, scale: float, rank_stabilised: bool) -> float:
    """What A B is multiplied by. Raises InputError for a rank below 1, and a scale that is not above 0."""
    if rank < 1:
        raise InputError(f"lora:rank={rank}: it is at least 1")
    if not 0 < scale < float("inf"):
        raise InputError(f"lora:scale={scale}: it must be above 0 and finite")
    return scale / (rank**0.5 if rank_stabilised else rank)


def _folded(params: Params, rank: int, folded: Callable[[Any, Any, Any], Any]) -> Params:
    """The parameters with folded(kernel, lora_a, lora_b) in place of the three."""
    if not _factors(params):
        raise InputError("lora: the parameters have no factors lora_a and lora_b: merge those that adapt gave")

    def fold(path: str, node: dict[str, Any]) -> dict[str, Any]:
        names = ("kernel", *_FACTORS)
        if not set(_FACTORS) & node.keys():
            return node
        if missing := [name for name in names if name not in node]:
            there = " and ".join(f"'{path}{name}'" for name in names if name in node)
            raise InputError(f"lora: {there} without {' and '.join(missing)}: merge the whole tree that adapt gave")
        shapes = {
            path + name: jnp.shape(node[name]) if jax.tree_util.all_leaves([node[name]]) else () for name in names
        }
        kernel, a, b = shapes.values()
        if not low_rank.fits(kernel, a, b):
            raise InputError(
                f"lora: factors [*inputs, rank] and [rank, *outputs] do not fit their kernel: {kernels.shown(shapes)}"
            )
        if a[-1] != rank:
            raise InputError(
                f"lora: the factors at '{path}lora_a' have rank {a[-1]}, not {rank}: merge with rank={a[-1]}"
            )
        kept = {name: leaf for name, leaf in node.items() if name not in _FACTORS}
        return {**kept, "kernel": folded(*(node[name] for name in names))}

    ordinary = kernels.each_dict(fold, params)
    if left := _factors(ordinary):
        raise InputError(
            f"lora: {paths.some(left)} are in no dict of dicts: give nested dicts, as flax.core.unfreeze and "
            "nnx.to_pure_dict make them"
        )
    return ordinary


_FACTORS = ("lora_a", "lora_b")


def _factors(params: Params) -> list[str]:
    """The paths of the factors that `adapt` adds."""
    return [path for path in paths.names(params) if masks.leaf_name(path) in _FACTORS]
