"""A small convolutional network: `conv_0`, `conv_1`, `dense` and `head`."""

import functools
from typing import Any

import flax.linen as nn
import jax

from tljax.models import activation as by_name
from tljax.models.linen import flat, images, linear_head, max_pool, stage
from tljax.types import InputError, Model


class _Convolution(nn.Module):
    """A 3 x 3 convolution and, if `norm`, a LayerNorm over channels (leaves 'norm/scale', 'norm/bias')."""

    width: int
    norm: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(x)
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x) if self.norm else x


def model(
    classes: int,
    *,
    activation: str = "relu",
    width: int = 8,
    dense: int = 32,
    norm: bool = False,
    dtype: Any = None,
) -> Model:
    """Two convolutions of `width` and `2 * width` channels, each pooled by 2 x 2; a dense layer; a linear head.

    The inputs are images [batch, height, width, channels] of any size. Kernels are LeCun normal, biases zero. Raises
    InputError for a width below 1, and for inputs that are not images. Products are computed in `dtype`, statistics of
    the norm and logits in float32. After LeCun et al. 1998, "Gradient-based
    learning applied to document recognition", section 2; the norm is Ba et al. 2016, arXiv:1607.06450.
    """
    if width < 1 or dense < 1:
        raise InputError(f"cnn:width={width}:dense={dense}: a width is at least 1")
    act = by_name(activation)

    def pooled(x: jax.Array) -> jax.Array:
        return max_pool(act(x), (2, 2), (2, 2))

    convolutions = [
        stage(
            f"conv_{i}",
            _Convolution(width * (i + 1), norm, dtype),
            before=functools.partial(images, "cnn"),
            after=pooled,
        )
        for i in (0, 1)
    ]
    hidden = stage("dense", nn.Dense(dense, dtype=dtype), before=flat, after=act)
    return (*convolutions, hidden, stage("head", linear_head(classes, dtype)))
