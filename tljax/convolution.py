"""Convolutions whose gradients are quick on a CPU, also within a loop.

XLA's CPU compiler has a quick form of a convolution: images [batch, *positions, channels], kernels [*window, in, out].
The gradients that JAX derives have other orders of axes. XLA brings those into the quick form where they stand outside
of all loops, and training steps stand in one: there it computes them number by number, 5 to 30 times as slowly (the
gradients of ten channels, 3 x 3, at 24 x 24, batch 32: 34 ms, in the quick form 3.2; of 16 channels to 96, 1 x 1: 210
and 1.8; CPU time of one busy core, 2026-11-27, jax 0.10.2). So here they are written in the quick form, which gives the
bits that XLA gives outside of loops. On other devices everything is JAX's.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class _Window(NamedTuple):
    """How a kernel goes over an image; hashable."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    """Of the kernel."""
    dimensions: Any
    precision: Any
    element_type: Any


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with quick gradients on a CPU: for Flax's `Conv(conv_general_dilated=)`.

    Images are [batch, *positions, channels] of floats, kernels [*window, in, out] of the same dtype; what has other
    axes, groups of channels, a dilated image or `out_sharding` is given to JAX's function. Where windows do not overlap
    (one position, the patches of a transformer) it is a product of matrices. It has gradients of any order in reverse
    mode, and forward mode over reverse; forward mode alone raises JAX's TypeError of a `custom_vjp`.

    >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
    >>> axes = ("NHWC", "HWIO", "NHWC")
    >>> y = conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
    >>> y.shape, float(y[0, 1, 1, 0]), float(y[0, 0, 0, 0])
    ((1, 4, 4, 5), 18.0, 8.0)
    """
    spatial = lhs.ndim - 2
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    last = (0, lhs.ndim - 1, *range(1, lhs.ndim - 1))
    window, strides = rhs.shape[:spatial], tuple(window_strides)
    dilation = tuple(rhs_dilation or (1,) * spatial)
    is_plain = (
        numbers == lax.ConvDimensionNumbers(last, (lhs.ndim - 1, lhs.ndim - 2, *range(spatial)), last)
        and feature_group_count == batch_group_count == 1
        and set(lhs_dilation or (1,)) == {1}
        and out_sharding is None
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
    )
    if is_plain:
        reach = [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:-1], reach, strides, padding)
        pads = tuple((int(before), int(behind)) for before, behind in padding)
        room = [length + sum(pad) for length, pad in zip(lhs.shape[1:-1], pads, strict=True)]
        is_plain = all(map(operator.ge, room, reach)) and 0 not in (*lhs.shape, *rhs.shape)
    if not is_plain:
        return lax.conv_general_dilated(
            *(lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers),
            *(feature_group_count, batch_group_count, precision, preferred_element_type),
            out_sharding=out_sharding,
        )
    how = _Window(strides, pads, dilation, numbers, precision, preferred_element_type)
    are_apart = set(window) == {1} or (window == strides and set(dilation) == {1})
    if are_apart and set(pads) == {(0, 0)}:
        return lax.platform_dependent(
            lhs, rhs, cpu=functools.partial(_product, how), default=functools.partial(_convolved, how)
        )
    return _convolution(how, lhs, rhs)


def _convolved(how: _Window, x: jax.Array, kernel: jax.Array, spread: Sequence[int] | None = None) -> jax.Array:
    """JAX's convolution of an image with `spread - 1` zeros between its positions."""
    return lax.conv_general_dilated(
        x,
        kernel,
        how.strides,
        how.pads,
        lhs_dilation=spread,
        rhs_dilation=how.dilation,
        dimension_numbers=how.dimensions,
        precision=how.precision,
        preferred_element_type=how.element_type,
    )


def _product(how: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as a product of two matrices, where no two windows share a position."""
    *window, channels, outputs = kernel.shape
    counts = [
        (length - size) // stride + 1 for length, size, stride in zip(x.shape[1:-1], window, how.strides, strict=True)
    ]
    if set(window) == {1}:
        patches = lax.slice(x, (0,) * x.ndim, x.shape, (1, *how.strides, 1))
    else:  # windows side by side: [batch, count, size, count, size, ..., channels]
        pairs = list(zip(counts, window, strict=True))
        kept = lax.slice(x, (0,) * x.ndim, (len(x), *(count * size for count, size in pairs), channels))
        apart = kept.reshape(len(x), *(length for pair in pairs for length in pair), channels)
        patches = apart.transpose(
            0, *range(1, 2 * len(window), 2), *range(2, 2 * len(window) + 1, 2), 2 * len(window) + 1
        )
    matrices = patches.reshape(len(x) * math.prod(counts), -1), kernel.reshape(-1, outputs)
    y = lax.dot_general(*matrices, (((1,), (0,)), ((), ())), how.precision, how.element_type)
    return y.reshape(len(x), *counts, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(how: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _by_device(how, x, kernel)


def _by_device(how: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    quick, plain = (functools.partial(function, how) for function in (_quickly_convolved, _convolved))
    return lax.platform_dependent(x, kernel, cpu=quick, default=plain)


def _forward(how: _Window, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _by_device(how, x, kernel), (x, kernel)


def _backward(how: _Window, inputs: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two gradients apart, so that the one that nobody reads is not computed."""
    x, kernel = inputs
    by_image = lax.platform_dependent(
        kernel,
        cotangent,
        cpu=functools.partial(_quick_by_image, how, x.shape),
        default=functools.partial(_by_image, how, x),
    )
    by_kernel = lax.platform_dependent(
        x,
        cotangent,
        cpu=functools.partial(_quick_by_kernel, how, kernel.shape),
        default=functools.partial(_by_kernel, how, kernel),
    )
    return by_image.astype(x.dtype), by_kernel.astype(kernel.dtype)


_convolution.defvjp(_forward, _backward)


def _by_image(how: _Window, x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient by the image as JAX derives it; of `x` the shape alone counts."""
    return jax.linear_transpose(lambda x: _convolved(how, x, kernel), x)(cotangent)[0]


def _by_kernel(how: _Window, kernel: jax.Array, x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient by the kernel as JAX derives it; of `kernel` the shape alone counts."""
    return jax.linear_transpose(lambda kernel: _convolved(how, x, kernel), kernel)(cotangent)[0]


def _quickly_convolved(
    how: _Window, image: jax.Array, kernel: jax.Array, spread: Sequence[int] | None = None
) -> jax.Array:
    """The same, of axes in the quick form, which XLA is kept from changing.

    XLA exchanges image and kernel where the window has more positions than the image, and the orders of their axes
    with them. So such an image is padded before, behind a barrier.
    """
    if math.prod(image.shape[1:-1]) < math.prod(kernel.shape[:-2]):
        steps = spread or (1,) * len(how.pads)
        around = [(*pad, step - 1) for pad, step in zip(how.pads, steps, strict=True)]
        padded = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *around, (0, 0, 0)])
        image, spread, how = lax.optimization_barrier(padded), None, how._replace(pads=((0, 0),) * len(how.pads))
    return _convolved(how, image, kernel, spread)


# Each gradient is a convolution of images [batch, *positions, channels]. What is transposed for it stands behind a
# barrier, or XLA would take the transposition into the convolution.


def _quick_by_image(how: _Window, shape: tuple[int, ...], kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient by an image of this shape: the reversed kernel goes over the cotangent, spread by the strides."""
    spatial = range(kernel.ndim - 2)
    reach = [(kernel.shape[i] - 1) * how.dilation[i] for i in spatial]
    spread = [(cotangent.shape[i + 1] - 1) * how.strides[i] + 1 for i in spatial]
    pads = tuple((reach[i] - how.pads[i][0], shape[i + 1] + how.pads[i][0] - spread[i]) for i in spatial)
    turned = lax.optimization_barrier(jnp.swapaxes(lax.rev(kernel, tuple(spatial)), -1, -2))
    window = how._replace(strides=(1,) * len(spatial), pads=pads, element_type=None)
    return _quickly_convolved(window, cotangent, turned.astype(cotangent.dtype), how.strides).astype(kernel.dtype)


def _quick_by_kernel(how: _Window, shape: tuple[int, ...], x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient by a kernel of this shape: the cotangent goes over the image, whose examples are the channels."""
    spatial = range(len(shape) - 2)
    reach = [(shape[i] - 1) * how.dilation[i] for i in spatial]
    spread = [(cotangent.shape[i + 1] - 1) * how.strides[i] + 1 for i in spatial]
    before = [how.pads[i][0] for i in spatial]
    pads = tuple((before[i], spread[i] + reach[i] - x.shape[i + 1] - before[i]) for i in spatial)
    image = lax.optimization_barrier(jnp.swapaxes(x, 0, -1)).astype(cotangent.dtype)
    as_kernel = lax.optimization_barrier(jnp.moveaxis(cotangent, 0, -2))
    window = how._replace(strides=how.dilation, pads=pads, dilation=how.strides, element_type=None)
    return jnp.moveaxis(_quickly_convolved(window, image, as_kernel), 0, -2).astype(x.dtype)
