"""EfficientNet-Lite: `stem`, `block_0` to `block_15` (of Lite0), `top` and `head`.

The network is EfficientNet (Tan & Le 2019, arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, as the
authors published it for small devices. Each block is MobileNetV2's (Sandler et al. 2018, arXiv:1801.04381, figure 3).
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.models.linen import images, linear_head, stage
from tljax.types import InputError, Model


class _Group(NamedTuple):
    """Blocks of one resolution."""

    repeats: int
    kernel: int
    stride: int
    """Of the first block; the others have 1."""
    expansion: int
    width: int


_GROUPS = (
    _Group(1, 3, 1, 1, 16),
    _Group(2, 3, 2, 6, 24),
    _Group(2, 5, 2, 6, 40),
    _Group(3, 3, 2, 6, 80),
    _Group(3, 5, 1, 6, 112),
    _Group(4, 5, 2, 6, 192),
    _Group(1, 3, 1, 6, 320),
)
"""EfficientNet-B0's (arXiv:1905.11946, table 1)."""
_STEM, _TOP = 32, 1280
"""Widths that the Lite networks do not scale."""
_EPSILON = 1e-3


def model(
    classes: int,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    dropout: float = 0.2,
    momentum: float = 0.99,
    dtype: Any = None,
) -> Model:
    """EfficientNet-Lite0, or another member of its family, for images [batch, height, width, channels] of any size.

    `width` and `depth` scale the channels and the blocks (arXiv:1905.11946, section 3.3): Lite0 to Lite4 are 1 and 1,
    1 and 1.1, 1.1 and 1.2, 1.2 and 1.4, 1.4 and 1.8; smaller ones are for trials. Stem, top, the first block and the
    last keep theirs. Lite0 has 4,652,008 parameters with 1000 classes, and 42,016 running statistics.

    Pixels of 0 to 1 become (255 x - 127) / 128. Padding is TensorFlow's SAME. The output of `top` is its mean over
    positions [batch, 1280]; `dropout` is the head's rate (0.3 for Lite2 to Lite4). Batch norms have epsilon 1e-3, and
    running averages that keep `momentum` of themselves at each batch, of the batch's biased variance (TensorFlow's
    and PyTorch's are of the unbiased one, which is n / (n - 1) times as large). Blocks are not dropped in training.
    Kernels are normal of variance 2 / fan_out, the head's LeCun normal. Products are computed in `dtype`, statistics of
    norms and logits in float32. Raises InputError for a width, a depth, a dropout or a momentum out of range.

    >>> [stage.name for stage in model(10, width=0.1, depth=0.25)][-3:]
    ['block_6', 'top', 'head']
    """
    if not (width > 0 and depth > 0):
        raise InputError(f"efficientnet_lite:width={width}:depth={depth}: a scale is above 0")
    if not (0 <= dropout < 1 and 0 <= momentum < 1):
        raise InputError(f"efficientnet_lite:dropout={dropout}:momentum={momentum}: each is at least 0 and below 1")
    norm = functools.partial(nn.BatchNorm, momentum=momentum, epsilon=_EPSILON, dtype=dtype)
    stages = [stage("stem", _Layer(_STEM, 3, 2, norm, dtype), before=_pixels)]
    for group in _GROUPS:
        fixed = group in (_GROUPS[0], _GROUPS[-1])
        for i in range(group.repeats if fixed else math.ceil(depth * group.repeats)):
            block = group._replace(stride=1 if i else group.stride, width=_scaled(group.width, width))
            stages.append(stage(f"block_{len(stages) - 1}", _Block(block, norm, dtype)))
    top = stage("top", _Layer(_TOP, 1, 1, norm, dtype), after=lambda x: jnp.mean(x, (1, 2)))
    return (*stages, top, stage("head", _Head(classes, dropout, dtype)))


def _scaled(channels: int, width: float) -> int:
    """Channels scaled by `width` to the nearest multiple of 8, at least 8 and at least 90 % of what was asked for."""
    nearest = max(8, int(channels * width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels * width else nearest


def _pixels(x: jax.Array) -> jax.Array:
    """Images of 0 to 1 as the network learnt them. Raises InputError for inputs that are no images."""
    return (images("efficientnet_lite", x) * 255 - 127) / 128


_KERNEL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DEPTHWISE_KERNEL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""Of [height, width, 1, channels]: each channel has one output, so that what Flax calls fan_in is its fan_out."""


class _Layer(nn.Module):
    """A convolution, a norm, ReLU6."""

    width: int
    kernel: int
    stride: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu6(self.norm(name="norm")(_conv(self.width, self.kernel, self.stride, self.dtype, "conv")(x)))


class _Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; beside the identity where the shape stays."""

    form: _Group
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, form = x, self.form
        if form.expansion > 1:
            y = _conv(form.expansion * x.shape[-1], 1, 1, self.dtype, "expand_conv")(y)
            y = nn.relu6(self.norm(name="expand_norm")(y))
        y = _Depthwise(form.kernel, form.stride, self.dtype, name="depthwise")(y)
        y = nn.relu6(self.norm(name="depthwise_norm")(y))
        y = _conv(form.width, 1, 1, self.dtype, "project_conv")(y)
        y = self.norm(name="project_norm")(y)
        return x + y if x.shape == y.shape else y


class _Depthwise(nn.Module):
    """A convolution of each channel by itself, under SAME padding; its kernel is [size, size, 1, channels].

    It is written as a sum over the kernel's positions of shifted images times a number per channel. As XLA's
    convolution of so many groups the whole of Lite0 takes six to nine times as long on a CPU, with its gradient too.
    """

    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, stride = self.size, self.stride
        kernel = self.param("kernel", _DEPTHWISE_KERNEL, (size, size, 1, x.shape[-1]))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        batch, *positions, channels = x.shape
        pads = jax.lax.padtype_to_pads(positions, (size, size), (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        spans = [(math.ceil(length / stride) - 1) * stride + 1 for length in positions]
        total = jnp.zeros((), x.dtype)
        # Where an image is smaller than the kernel, most of its numbers meet padding alone.
        rows, columns = (
            [i for i in range(size) if any(before <= at < before + length for at in range(i, i + span, stride))]
            for length, span, (before, _) in zip(positions, spans, pads, strict=True)
        )
        for i, j in itertools.product(rows, columns):
            ends = (batch, i + spans[0], j + spans[1], channels)
            total = total + jax.lax.slice(x, (0, i, j, 0), ends, (1, stride, stride, 1)) * kernel[i, j][None, None]
        return total


class _Head(nn.Module):
    """Dropout and a linear layer, whose leaves are the head's own."""

    classes: int
    dropout: float
    dtype: Any

    def setup(self) -> None:
        self.drop = nn.Dropout(self.dropout)
        self.linear = linear_head(self.classes, self.dtype)
        nn.share_scope(self, self.linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.drop(x))


def _conv(width: int, kernel: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """A convolution of a square kernel without bias, under SAME padding."""
    size, strides = (kernel, kernel), (stride, stride)
    return nn.Conv(width, size, strides, use_bias=False, kernel_init=_KERNEL, dtype=dtype, name=name)
