"""Train a low-rank change of each dense kernel below the head, and the head.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685, section 4.1.
Convolutions, attention and other kernels of more axes than two stay frozen; `--dry_run` lists them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tljax import masks, paths
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, rank: int = 4, scale: float = 4.0) -> Mask:
    """The factors that `adapt` added train, and whatever was drawn anew; the options are those of adapt and merge.

    Raises InputError for a rank below 1, a scale that is not above 0, and parameters without factors.
    """
    if rank < 1:
        raise InputError(f"lora:rank={rank}: it is at least 1")
    if not 0 < scale < float("inf"):
        raise InputError(f"lora:scale={scale}: it must be above 0 and finite")
    try:
        factors = masks.by_path(params, lambda path: masks.leaf_name(path) in _FACTORS)
    except InputError as error:
        raise InputError("lora: the parameters have no factors: call adapt(params, key) first") from error
    return masks.union(factors, context.fresh)


def adapt(params: Params, key: jax.Array, context: Context | None = None, *, rank: int = 4) -> Params:
    """The parameters with `lora_a` [in, rank] and `lora_b` [rank, out] beside each 2-D `kernel` below the head.

    The head is the last of context.stages; without stages it is whatever is called 'head'. lora_a is normal of
    variance 1/in (LeCun), lora_b zero, so that the outputs are unchanged. Raises InputError for a rank below 1, where
    there is no such kernel, for a kernel that is in no dict, where no leaf can be added, and for parameters that have
    factors already, which would be lost.
    `left_out` names the kernels of other ranks, which stay frozen.
    """
    if rank < 1:
        raise InputError(f"lora:rank={rank}: it is at least 1")
    if there := _factors(params):
        raise InputError(f"lora: the parameters have factors already, {paths.some(there)}: merge them first")
    below, rest = _kernels(params, context or Context())
    if not below:
        passed = f"; left out: {_shown(rest)}" if rest else ""
        raise InputError(
            f"lora: no dict below the head has a 2-D leaf named 'kernel' [in, out]: there is nothing to adapt{passed}"
        )
    keys = dict(zip(below, jax.random.split(key, len(below)), strict=True))

    def add(path: str, node: dict[str, Any]) -> dict[str, Any]:
        own = keys.pop(path + "kernel", None)
        if own is None:
            return node
        (fan_in, fan_out), dtype = jnp.shape(node["kernel"]), jnp.result_type(node["kernel"])
        a = jax.random.normal(own, (fan_in, rank), dtype) * fan_in**-0.5
        return {**node, "lora_a": a, "lora_b": jnp.zeros((rank, fan_out), dtype)}

    adapted = _each_dict(add, params)
    if keys:
        raise InputError(
            f"lora: no factors can stand beside {paths.some(sorted(keys))}: a list, a FrozenDict or an nnx.State takes "
            "no new leaf; give nested dicts, as flax.core.unfreeze and nnx.to_pure_dict make them"
        )
    return adapted


def left_out(params: Params, context: Context) -> list[str]:
    """The paths of the leaves of two axes and more below the head that get no factors: convolutions, attention."""
    return list(_kernels(params, context)[1])


def merge(params: Params, *, rank: int = 4, scale: float = 4.0) -> Params:
    """Ordinary parameters with the same outputs: kernel + scale/rank lora_a lora_b, without the factors.

    Raises InputError for parameters without factors, factors of another rank or shape, one without the other or without
    their kernel, and factors in no dict, such as those in a FrozenDict.
    """
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
        if {len(kernel), len(a), len(b)} != {2} or (a[0], a[1], b[1]) != (kernel[0], b[0], kernel[1]):
            raise InputError(f"lora: factors [in, rank] and [rank, out] do not fit their kernel: {_shown(shapes)}")
        if a[1] != rank:
            raise InputError(
                f"lora: the factors at '{path}lora_a' have rank {a[1]}, not {rank}: merge with rank={a[1]}"
            )
        kept = {name: leaf for name, leaf in node.items() if name not in _FACTORS}
        return {**kept, "kernel": node["kernel"] + scale / rank * (node["lora_a"] @ node["lora_b"])}

    merged = _each_dict(fold, params)
    if left := _factors(merged):
        raise InputError(
            f"lora: {paths.some(left)} are in no dict of dicts: give nested dicts, as flax.core.unfreeze and "
            "nnx.to_pure_dict make them"
        )
    return merged


_FACTORS = ("lora_a", "lora_b")


def _factors(params: Params) -> list[str]:
    """The paths of the factors that `adapt` adds."""
    return [path for path in paths.names(params) if masks.leaf_name(path) in _FACTORS]


def _kernels(params: Params, context: Context) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """(the paths of 2-D kernels below the head, {path: shape} of all other leaves of two axes and more there)."""
    rows = zip(paths.items(params), paths.unboxed_names(params), paths.trainable(params), strict=True)
    shapes = {short.removesuffix("/value"): jnp.shape(leaf) for (_, leaf), short, able in rows if able}
    staged = paths.inside(context.stages[-1:])

    def in_head(path: str) -> bool:
        return staged(path) if context.stages else "head" in path.split("/")

    below = {p: s for p, s in shapes.items() if len(s) > 1 and not in_head(p) and p.split("/")[-1] not in _FACTORS}
    fit = [path for path, shape in below.items() if path.split("/")[-1] == "kernel" and len(shape) == 2]
    return fit, {path: shape for path, shape in below.items() if path not in fit}


def _shown(shapes: dict[str, tuple[int, ...]], most: int = 6) -> str:
    text = ", ".join(f"'{path}' {shape}" for path, shape in list(shapes.items())[:most])
    return text + (f" and {len(shapes) - most} more" if len(shapes) > most else "")


def _each_dict(function: Callable[[str, dict[str, Any]], dict[str, Any]], tree: Any, path: str = "") -> Any:
    """The tree with function('a/b/', node) for each dict in dicts, the innermost first."""
    if not isinstance(tree, dict):
        return tree
    return function(path, {name: _each_dict(function, node, f"{path}{name}/") for name, node in tree.items()})
