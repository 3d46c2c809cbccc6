"""Kernels, which of their axes are inputs, and the leaves that adapters put beside them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tljax import low_rank, masks, paths
from tljax.types import Context, InputError, Mask, Params

ALL = "**/kernel"
FACTORS = ("lora_a", "lora_b")
TO_HEADS = ("query", "key", "value")


def to_adapt(
    params: Params, context: Context, on: str, added: tuple[str, ...]
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """({path: how many of its first axes are inputs} of the kernels below the head that `on` matches, {path: shape} of
    the leaves of two axes and more that are left out).

    `added` are the names of the leaves that an adapter adds. Raises InputError for a glob that matches nothing.
    """
    shapes = _shapes(params)
    below = {
        path: shape
        for path, shape in chosen(params, context, on, ALL).items()
        if len(shape) > 1 and path.split("/")[-1] not in (*added, "bias")
    }
    counts = {path: inputs(path, shape, shapes, context.contracted) for path, shape in below.items()}
    return (
        {path: count for path, count in counts.items() if count},
        {path: shape for path, shape in below.items() if not counts[path]},
    )


def chosen(params: Params, context: Context, on: str, every: str) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the leaves below the head that can train and that `on` matches; all of them if it is `every`.

    Raises InputError for a glob that matches nothing.
    """
    patterns = on.split("+")
    if on != every:
        paths.require_globs(params, patterns)
    tests = [paths.glob(form) for pattern in patterns for form in paths.forms(pattern)]
    staged = paths.inside(context.stages[-1:])

    def in_head(path: str) -> bool:
        return staged(path) if context.stages else "head" in path.split("/")

    def wanted(path: str) -> bool:
        return on == every or any(test(path) for test in tests)

    return {path: shape for path, shape in _shapes(params).items() if not in_head(path) and wanted(path)}


def input_axes(params: Params, contracted: Mapping[str, int]) -> dict[str, int]:
    """{path: how many of its first axes are inputs} of every kernel of which that is known.

    >>> input_axes({"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}, {})
    {'dense/kernel': 1}
    """
    shapes = _shapes(params)
    names = zip(paths.names(params), paths.unboxed_names(params), paths.trainable(params), strict=True)
    bare = {path: short.removesuffix("/value") for path, short, able in names if able}
    counts = {path: inputs(name, shapes[name], shapes, contracted) for path, name in bare.items()}
    return {path: count for path, count in counts.items() if count}


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """{path without the box: shape} of the leaves that can train."""
    rows = zip(paths.items(params), paths.unboxed_names(params), paths.trainable(params), strict=True)
    return {short.removesuffix("/value"): jnp.shape(leaf) for (_, leaf), short, able in rows if able}


def inputs(path: str, shape: tuple[int, ...], shapes: Mapping[str, Any], contracted: Mapping[str, int]) -> int:
    """How many of a leaf's first axes are inputs; 0 where that is not known, and of what is no kernel.

    >>> shapes = dict.fromkeys((f"attention/{name}/kernel" for name in (*TO_HEADS, "out")), (8, 2, 4))
    >>> [inputs(path, shape, shapes, {}) for path, shape in shapes.items()]
    [1, 1, 1, 2]
    """
    *places, name = path.split("/")
    if name != "kernel" or path in contracted:
        return contracted.get(path, 0) if name == "kernel" else 0
    around = "/".join(places[:-1])
    siblings = ["/".join(filter(None, (around, each, name))) for each in TO_HEADS]
    if places and places[-1] in (*TO_HEADS, "out") and all(sibling in shapes for sibling in siblings):
        # Of another number of axes they stack layers, or have the axes of heads in one: [width, width].
        return {2: 1, 3: 2 if places[-1] == "out" else 1}.get(len(shape), 0)
    return {2: 1, 4: 3}.get(len(shape), 0)


def shown(shapes: Mapping[str, tuple[int, ...]], most: int = 6) -> str:
    """Paths and shapes in words."""
    text = ", ".join(f"'{path}' {shape}" for path, shape in list(shapes.items())[:most])
    return text + (f" and {len(shapes) - most} more" if len(shapes) > most else "")


def each_dict(function: Callable[[str, dict[str, Any]], dict[str, Any]], tree: Any, path: str = "") -> Any:
    """The tree with function('a/b/', node) for each dict in dicts, the innermost first."""
    if not isinstance(tree, dict):
        return tree
    return function(path, {name: each_dict(function, node, f"{path}{name}/") for name, node in tree.items()})


def adapted(
    params: Params,
    key: jax.Array,
    context: Context,
    on: str,
    adapter: str,
    added: tuple[str, ...],
    beside: Callable[[jax.Array, Any, int], dict[str, Any]],
) -> Params:
    """The parameters with beside(a key of its own, kernel, how many of its axes are inputs) in the dict of each kernel
    to adapt.

    Raises InputError, which begins with the adapter's name, for a glob that matches nothing, where there is no kernel
    to adapt, where no leaf can be added, and for parameters that have `added` leaves already.
    """
    if there := present(params, added):
        raise InputError(f"{adapter}: the parameters have factors already, {paths.some(there)}: merge them first")
    counts, rest = to_adapt(params, context, on, added)
    if not counts:
        passed = f"; left out: {shown(rest)}" if rest else ""
        raise InputError(
            f"{adapter}: no dict below the head has a leaf named 'kernel' [in, out] or of attention or of a convolution"
            f"{'' if on == ALL else f', that on={on} matches'}: there is nothing to adapt{passed}"
        )
    waiting = dict(counts)
    keys = dict(zip(counts, jax.random.split(key, len(counts)), strict=True))

    def add(path: str, node: dict[str, Any]) -> dict[str, Any]:
        count = waiting.pop(path + "kernel", 0)
        return {**node, **beside(keys[path + "kernel"], node["kernel"], count)} if count else node

    tree = each_dict(add, params)
    if waiting:
        raise InputError(
            f"{adapter}: no factors can stand beside {paths.some(sorted(waiting))}: a list, a FrozenDict or an "
            "nnx.State takes no new leaf; give nested dicts, as flax.core.unfreeze and nnx.to_pure_dict make them"
        )
    return tree


def trained(adapter: str, params: Params, added: tuple[str, ...], fresh: Mask | None, what: str = "factors") -> Mask:
    """The mask of the `added` leaves, and of what was drawn anew.

    Raises InputError, which begins with the adapter's name, for parameters without such leaves, and for a `fresh` of
    another tree, such as that of the parameters before `adapt`.
    """
    try:
        mask = masks.by_path(params, lambda path: masks.leaf_name(path) in added)
    except InputError as error:
        raise InputError(f"{adapter}: the parameters have no {what}: call adapt(params, key) first") from error
    if fresh is None:
        return mask
    try:
        paths.same_structure(mask, fresh, "the adapted parameters", "context.fresh")
    except InputError as error:
        raise InputError(
            f"{adapter}: {error}: fresh is of the tree that adapt gave, as masks.under(adapted, 'head') is"
        ) from error
    return masks.union(mask, fresh)


def folded(params: Params, rank: int, adapter: str, added: tuple[str, ...], fold: Callable[..., Any]) -> Params:
    """The parameters with fold(kernel, *added leaves) in place of the kernel and the leaves that `adapted` put there.

    Raises InputError, which begins with the adapter's name, for parameters without such leaves, factors of another rank
    or shape, one without the others or without their kernel, and leaves in no dict, such as those in a FrozenDict.
    """
    if not present(params, added):
        raise InputError(
            f"{adapter}: the parameters have no factors {' and '.join(added)}: merge those that adapt gave"
        )
    names = ("kernel", *added)

    def folded_node(path: str, node: dict[str, Any]) -> dict[str, Any]:
        if not set(added) & node.keys():
            return node
        if missing := [name for name in names if name not in node]:
            there = " and ".join(f"'{path}{name}'" for name in names if name in node)
            raise InputError(
                f"{adapter}: {there} without {' and '.join(missing)}: merge the whole tree that adapt gave"
            )
        shapes = {
            path + name: jnp.shape(node[name]) if jax.tree_util.all_leaves([node[name]]) else () for name in names
        }
        kernel, a, b, *others = shapes.values()
        if not low_rank.fits(kernel, a, b) or any(other != b[1:] for other in others):
            raise InputError(
                f"{adapter}: factors [*inputs, rank] and [rank, *outputs] do not fit their kernel: {shown(shapes)}"
            )
        if a[-1] != rank:
            raise InputError(
                f"{adapter}: the factors at '{path}{added[0]}' have rank {a[-1]}, not {rank}: merge with rank={a[-1]}"
            )
        kept = {name: leaf for name, leaf in node.items() if name not in added}
        return {**kept, "kernel": fold(*(node[name] for name in names))}

    ordinary = each_dict(folded_node, params)
    if left := present(ordinary, added):
        raise InputError(
            f"{adapter}: {paths.some(left)} are in no dict of dicts: give nested dicts, as flax.core.unfreeze and "
            "nnx.to_pure_dict make them"
        )
    return ordinary


def present(params: Params, added: tuple[str, ...]) -> list[str]:
    """The paths of the leaves of these names."""
    return [path for path in paths.names(params) if masks.leaf_name(path) in added]


def normal_and_zero(key: jax.Array, kernel: Any, count: int, rank: int) -> dict[str, Any]:
    """LoRA's factors of a kernel of which `count` axes are inputs: A normal of variance 1 / inputs, B zero."""
    shape, dtype = jnp.shape(kernel), jnp.result_type(kernel)
    ins, outs = shape[:count], shape[count:]
    fan_in = math.prod(ins)
    a = jax.random.normal(key, (fan_in, rank), dtype) * fan_in**-0.5
    return {"lora_a": a.reshape(*ins, rank), "lora_b": jnp.zeros((rank, *outs), dtype)}


def gain(adapter: str, rank: int, scale: float, rank_stabilised: bool) -> float:
    """What A B is multiplied by. Raises InputError for a rank below 1, and a scale that is not above 0."""
    if rank < 1:
        raise InputError(f"{adapter}:rank={rank}: it is at least 1")
    if not 0 < scale < float("inf"):
        raise InputError(f"{adapter}:scale={scale}: it must be above 0 and finite")
    return scale / (rank**0.5 if rank_stabilised else rank)
