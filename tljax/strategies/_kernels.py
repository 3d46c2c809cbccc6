"""Kernels, and which of their axes are inputs: what adapters adapt, and whose output units have inputs of their own."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from tljax import paths
from tljax.types import Context, Params

ALL = "**/kernel"
TO_HEADS = ("query", "key", "value")


def to_adapt(
    params: Params, context: Context, on: str, added: tuple[str, ...]
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """({path: how many of its first axes are inputs} of the kernels below the head that `on` matches, {path: shape} of
    the leaves of two axes and more that are left out).

    `added` are the names of the leaves that an adapter adds. Raises InputError for a glob that matches nothing.
    """
    patterns = on.split("+")
    if on != ALL:
        paths.require_globs(params, patterns)
    tests = [paths.glob(form) for pattern in patterns for form in paths.forms(pattern)]
    shapes = _shapes(params)
    staged = paths.inside(context.stages[-1:])

    def in_head(path: str) -> bool:
        return staged(path) if context.stages else "head" in path.split("/")

    def wanted(path: str) -> bool:
        return on == ALL or any(test(path) for test in tests)

    below = {
        path: shape
        for path, shape in shapes.items()
        if len(shape) > 1 and not in_head(path) and path.split("/")[-1] not in (*added, "bias") and wanted(path)
    }
    counts = {path: inputs(path, shape, shapes, context.contracted) for path, shape in below.items()}
    return (
        {path: count for path, count in counts.items() if count},
        {path: shape for path, shape in below.items() if not counts[path]},
    )


def of_tree(params: Params, contracted: Mapping[str, int]) -> dict[str, int]:
    """{path: how many of its first axes are inputs} of every kernel of which that is known.

    >>> of_tree({"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}, {})
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


def as_matrix(kernel: jnp.ndarray, count: int) -> jnp.ndarray:
    """A kernel [*inputs, *outputs] as [inputs, outputs], of which the first `count` axes are inputs."""
    return jnp.reshape(kernel, (math.prod(kernel.shape[:count]), -1))


def shown(shapes: Mapping[str, tuple[int, ...]], most: int = 6) -> str:
    """Paths and shapes in words."""
    text = ", ".join(f"'{path}' {shape}" for path, shape in list(shapes.items())[:most])
    return text + (f" and {len(shapes) - most} more" if len(shapes) > most else "")


def each_dict(function: Callable[[str, dict[str, Any]], dict[str, Any]], tree: Any, path: str = "") -> Any:
    """The tree with function('a/b/', node) for each dict in dicts, the innermost first."""
    if not isinstance(tree, dict):
        return tree
    return function(path, {name: each_dict(function, node, f"{path}{name}/") for name, node in tree.items()})
