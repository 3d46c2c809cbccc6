"""Train a low-rank change of each dense kernel below the head, and the head.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685, section 4.1.
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
        factors = masks.by_path(params, lambda path: masks.leaf_name(path) in ("lora_a", "lora_b"))
    except InputError as error:
        raise InputError("lora: the parameters have no factors: call adapt(params, key) first") from error
    return masks.union(factors, context.fresh)


def adapt(params: Params, key: jax.Array, *, rank: int = 4) -> Params:
    """The parameters with `lora_a` [in, rank] and `lora_b` [rank, out] beside each 2-D `kernel` not under 'head'.

    lora_a is normal of variance 1/in (LeCun), lora_b zero, so that the outputs are unchanged. Kernels are looked for
    in dicts. Raises InputError for a rank below 1, and where there is no such kernel.
    """
    if rank < 1:
        raise InputError(f"lora:rank={rank}: it is at least 1")
    found = [path for path, leaf in paths.items(params) if _fits(path, leaf)]
    keys = dict(zip(found, jax.random.split(key, max(len(found), 1)), strict=False))

    def add(path: str, node: dict[str, Any]) -> dict[str, Any]:
        own = keys.get(path + "kernel")
        if own is None:
            return node
        (fan_in, fan_out), dtype = jnp.shape(node["kernel"]), jnp.result_type(node["kernel"])
        a = jax.random.normal(own, (fan_in, rank), dtype) * fan_in**-0.5
        return {**node, "lora_a": a, "lora_b": jnp.zeros((rank, fan_out), dtype)}

    adapted = _each_dict(add, params)
    if len(jax.tree.leaves(adapted)) == len(jax.tree.leaves(params)):
        raise InputError("lora: no dict outside 'head' has a 2-D leaf named 'kernel': there is nothing to adapt")
    return adapted


def merge(params: Params, *, rank: int = 4, scale: float = 4.0) -> Params:
    """Ordinary parameters with the same outputs: kernel + scale/rank lora_a lora_b, without the factors."""

    def fold(path: str, node: dict[str, Any]) -> dict[str, Any]:
        if "lora_a" not in node:
            return node
        kept = {name: leaf for name, leaf in node.items() if name not in ("lora_a", "lora_b")}
        return {**kept, "kernel": node["kernel"] + scale / rank * (node["lora_a"] @ node["lora_b"])}

    return _each_dict(fold, params)


def _fits(path: str, leaf: Any) -> bool:
    names = path.split("/")
    return names[-1] == "kernel" and "head" not in names and jnp.ndim(leaf) == 2 and paths.can_train(path, leaf)


def _each_dict(function: Callable[[str, dict[str, Any]], dict[str, Any]], tree: Any, path: str = "") -> Any:
    """The tree with function('a/b/', node) for each dict in dicts, the innermost first."""
    if not isinstance(tree, dict):
        return tree
    return function(path, {name: _each_dict(function, node, f"{path}{name}/") for name, node in tree.items()})
