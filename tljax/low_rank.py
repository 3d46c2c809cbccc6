"""A kernel and a change of it of low rank, which are contracted one after the other: xW + (xA)B.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685, section 4.1. The kernel has any
number of axes: the first are contracted with the inputs, the last are the outputs; A and B share one axis more. Each
output may be scaled, as Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation", arXiv:2402.09353, do.

- A dense layer: kernel [in, out], A [in, rank], B [rank, out].
- Attention: query, key and value [width, heads, channels], A [width, rank], B [rank, heads, channels]; the projection
  out [heads, channels, width], A [heads, channels, rank], B [rank, width].
- A convolution [height, width, in / groups, out], A [height, width, in / groups, rank], B [rank, out]: a convolution
  to `rank` channels of each group, and one of size 1 from them.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tljax.types import Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "a", "b", "gain"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class LowRank:
    """What stands in a kernel's place where a model is applied: a pytree node of three arrays, or four.

    It means kernel + a b, times the gain of each output if there is one. A stage that knows it never forms that sum, so
    that many fits share one kernel, and no gradient has the kernel's size; others get `merged` kernels.
    """

    kernel: Any
    """[*inputs, *outputs]."""
    a: Any
    """[*inputs, rank]."""
    b: Any
    """[rank, *outputs], with the scale in it."""
    gain: Any = None
    """[*outputs], or None."""

    def merged(self) -> jax.Array:
        """The kernel that it means, in the kernel's dtype."""
        return scaled(self.kernel + product(self.a, self.b).astype(self.kernel.dtype), self.gain)


def scaled(y: jax.Array, gain: jax.Array | None) -> jax.Array:
    """What has the outputs for its last axes, times their gain, in its own dtype; as it is without one."""
    if gain is None:
        return y
    return y * gain.astype(y.dtype).reshape(*(1,) * (y.ndim - gain.ndim), *gain.shape)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum over the last axis of `a` and the first of `b`.

    >>> product(jnp.ones((3, 3, 8, 2)), jnp.ones((2, 16))).shape
    (3, 3, 8, 16)
    """
    return jnp.tensordot(a, b, 1)


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The length of what leads to each output of kernel + a b, [*outputs], without that sum.

    With w a column of the kernel it is the root of |w|^2 + 2 (w'A) b + b' (A'A) b: temporaries of rank x outputs, and
    a product with the kernel that fits side by side share.

    >>> w, a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 3), (5, 2), (2, 3)]))
    >>> bool(jnp.allclose(column_norms(w, a, b), jnp.linalg.norm(w + a @ b, axis=0), atol=1e-5))
    True
    """
    rank, outputs = b.shape[0], b.shape[1:]
    # As matrices, of which XLA makes no transposed copies.
    w, a, b = kernel.reshape(-1, math.prod(outputs)), a.reshape(-1, rank), b.reshape(rank, -1)
    squares = jnp.square(w).sum(0) + (b * (2 * (a.T @ w) + (a.T @ a) @ b)).sum(0)
    positive = squares > 0  # else it is rounding, or nothing leads there, and the root has no gradient
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0).reshape(outputs)


def fits(kernel: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether these are the shapes of a kernel and of factors of it.

    >>> fits((64, 4, 16), (64, 2), (2, 4, 16)), fits((64, 4, 16), (4, 16, 2), (2, 64))
    (True, False)
    """
    return len(a) > 1 and len(b) > 1 and a[-1] == b[0] and (*a[:-1], *b[1:]) == kernel


def present(tree: Any) -> bool:
    """Whether a tree has any `LowRank` in it."""
    return any(isinstance(leaf, LowRank) for leaf in jax.tree.leaves(tree, is_leaf=_is_low_rank))


def merged(params: Params) -> Params:
    """The tree with ordinary kernels.

    >>> merged({"kernel": LowRank(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)))})["kernel"].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if not present(params):
        return params
    return jax.tree.map(lambda leaf: leaf.merged() if _is_low_rank(leaf) else leaf, params, is_leaf=_is_low_rank)


def _is_low_rank(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)


def without(params: Params) -> tuple[Params, dict[str, LowRank]]:
    """(The nested dicts of a stage with plain kernels, {path: kernel and change}).

    >>> tree = {"dense": {"kernel": LowRank(1.0, 2.0, 3.0), "bias": 0.0}}
    >>> plain, changes = without(tree)
    >>> plain, list(changes)
    ({'dense': {'kernel': 1.0, 'bias': 0.0}}, ['dense/kernel'])
    """
    changes: dict[str, LowRank] = {}

    def plain(tree: Any, path: str) -> Any:
        if isinstance(tree, Mapping):
            return {name: plain(node, f"{path}/{name}" if path else name) for name, node in tree.items()}
        if isinstance(tree, LowRank):
            changes[path] = tree
            return tree.kernel
        return tree

    return (plain(params, ""), changes) if present(params) else (params, {})


def placed(params: Params, leaves: Mapping[str, Any], path: str = "") -> Params:
    """Nested dicts with these {path: leaf} in place of their own.

    >>> placed({"dense": {"kernel": 1.0, "bias": 0.0}}, {"dense/kernel": 2.0})
    {'dense': {'kernel': 2.0, 'bias': 0.0}}
    """
    if not isinstance(params, Mapping):
        return leaves.get(path, params)
    return {name: placed(node, leaves, f"{path}/{name}" if path else name) for name, node in params.items()}


Contraction = Callable[..., jax.Array]
"""As `jax.lax.dot_general` or `jax.lax.conv_general_dilated`."""


def dot_general(call: Contraction, a: jax.Array, b: jax.Array, gain: jax.Array | None = None) -> Contraction:
    """`call` for a kernel with a change of it: for its first axes are contracted, in their order, with those of `lhs`.

    >>> x, w, a, b = (jnp.ones(shape) for shape in ((5, 4), (4, 3), (4, 2), (2, 3)))
    >>> dot_general(jax.lax.dot_general, a, b)(x, w, (((1,), (0,)), ((), ())))[0].tolist()
    [12.0, 12.0, 12.0]
    """

    def contracted(lhs: jax.Array, kernel: jax.Array, dimensions: Any, *args: Any, **keywords: Any) -> jax.Array:
        y = _as_matrices(call, lhs, kernel, dimensions, *args, **keywords)
        hidden = call(lhs, a.astype(kernel.dtype), dimensions, *args, **keywords).astype(lhs.dtype)
        change = call(hidden, b.astype(kernel.dtype), (((hidden.ndim - 1,), (0,)), ((), ())), *args, **keywords)
        return scaled(y + change, gain)

    return contracted


def _as_matrices(
    call: Contraction, lhs: jax.Array, kernel: jax.Array, dimensions: Any, *args: Any, **keywords: Any
) -> jax.Array:
    """`call`, by a product of two matrices where the last axes of `lhs` meet the first of the kernel.

    The gradient by a kernel of more axes would be computed by a transposed copy of it, which XLA takes out of the loop
    over steps: a copy of every such kernel, held all the time.
    """
    (lhs_axes, kernel_axes), batch = dimensions
    count = len(kernel_axes)
    last = tuple(range(lhs.ndim - count, lhs.ndim))
    if any(map(len, batch)) or tuple(lhs_axes) != last or tuple(kernel_axes) != tuple(range(count)) or kernel.ndim < 3:
        return call(lhs, kernel, dimensions, *args, **keywords)
    rest, outputs = lhs.shape[: lhs.ndim - count], kernel.shape[count:]
    inner = math.prod(kernel.shape[:count])
    matrices = lhs.reshape(*rest, inner), kernel.reshape(inner, math.prod(outputs))
    y = call(*matrices, (((len(rest),), (0,)), ((), ())), *args, **keywords)
    return y.reshape(*rest, *outputs)


def conv_general_dilated(call: Contraction, a: jax.Array, b: jax.Array, gain: jax.Array | None = None) -> Contraction:
    """`call` for a kernel [*window, in / groups, out] with a change of it.

    Of grouped convolutions each group has A, and its own columns of B. Where that takes more work than a gradient of
    the whole kernel does, as in a depthwise convolution, the sum is formed after all.
    """

    def convolved(
        lhs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, feature_group_count: int = 1, **keywords: Any
    ) -> jax.Array:
        grouped = functools.partial(call, feature_group_count=feature_group_count)
        if feature_group_count > 1 and not saves_work(kernel.shape, a.shape[-1], feature_group_count):
            summed = kernel + product(a, b).astype(kernel.dtype)
            return scaled(grouped(lhs, summed, strides, padding, **keywords), gain)
        y = grouped(lhs, kernel, strides, padding, **keywords)
        grouped_a = jnp.tile(a.astype(kernel.dtype), (*(1,) * (a.ndim - 1), feature_group_count))
        hidden = grouped(lhs, grouped_a, strides, padding, **keywords).astype(lhs.dtype)
        window = (1,) * (kernel.ndim - 2)
        undilated = {name: value for name, value in keywords.items() if not name.endswith("hs_dilation")}
        pointwise = b.astype(kernel.dtype).reshape(*window, *b.shape)
        return scaled(y + grouped(hidden, pointwise, window, [(0, 0)] * len(window), **undilated), gain)

    return convolved


def saves_work(kernel: tuple[int, ...], rank: int, groups: int = 1) -> bool:
    """Whether a convolution and its gradients by A and B take less work than by a kernel [*window, in / groups, out].

    Multiplications a position of the output: the kernel's gradient takes as many as the kernel has numbers; A and B
    are passed three times each, forwards, and backwards to the inputs and to themselves.

    >>> saves_work((3, 3, 64, 64), 4), saves_work((3, 3, 1, 64), 4, 64)
    (True, False)
    """
    return 3 * rank * (groups * math.prod(kernel[:-1]) + kernel[-1]) < math.prod(kernel)
