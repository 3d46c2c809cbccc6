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
        factors = masks.by_path(params, lambda path: masks.leaf_name(path) in ("lora_a", "lora_b"))
    except InputError as error:
        raise InputError("lora: the parameters have no factors: call adapt(params, key) first") from error
    return masks.union(factors, context.fresh)


def adapt(params: Params, key: jax.Array, context: Context | None = None, *, rank: int = 4) -> Params:
    """The parameters with `lora_a` [in, rank] and `lora_b` [rank, out] beside each 2-D `kernel` below the head.

    The head is the last of context.stages; without stages it is whatever is called 'head'. lora_a is normal of
    variance 1/in (LeCun), lora_b zero, so that the outputs are unchanged. Raises InputError for a rank below 1, where
    there is no such kernel, and for a kernel that is in no dict, where no leaf can be added.
    `left_out` names the kernels of other ranks, which stay frozen.
    """
    if rank < 1:
        raise InputError(f"lora:rank={rank}: it is at least 1")
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

    Raises InputError for factors of another rank.
    """

    def fold(path: str, node: dict[str, Any]) -> dict[str, Any]:
        if "lora_a" not in node:
            return node
        if (there := jnp.shape(node["lora_a"])[-1]) != rank:
            raise InputError(
                f"lora: the factors at '{path}lora_a' have rank {there}, not {rank}: merge with rank={there}"
            )
        kept = {name: leaf for name, leaf in node.items() if name not in ("lora_a", "lora_b")}
        return {**kept, "kernel": node["kernel"] + scale / rank * (node["lora_a"] @ node["lora_b"])}

    return _each_dict(fold, params)


def _kernels(params: Params, context: Context) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """(the paths of 2-D kernels below the head, {path: shape} of all other leaves of two axes and more there)."""
    rows = zip(paths.items(params), paths.unboxed_names(params), paths.trainable(params), strict=True)
    shapes = {short.removesuffix("/value"): jnp.shape(leaf) for (_, leaf), short, able in rows if able}
    staged = paths.inside(context.stages[-1:])
    factors = ("lora_a", "lora_b")

    def in_head(path: str) -> bool:
        return staged(path) if context.stages else "head" in path.split("/")

    below = {p: s for p, s in shapes.items() if len(s) > 1 and not in_head(p) and p.split("/")[-1] not in factors}
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
