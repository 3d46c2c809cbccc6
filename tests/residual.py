"""A small residual network with batch norm, twice: of Flax Linen modules, and of NNX modules with equal parameters.

python -m experiments.transfer --model=tests/residual.py:model ...
"""

import flax.linen as nn
import jax
from flax import nnx

from tljax.models import linen
from tljax.models import nnx as nnx_stages

WIDTH = 4


class Stem(nn.Module):
    """A convolution and a batch norm."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool = False, mask=None):
        x = nn.Conv(WIDTH, (3, 3), strides=(2, 2), use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="norm")(x, mask=mask))


class Block(nn.Module):
    """Two convolutions, each with a batch norm, beside the identity: He et al. 2016, arXiv:1512.03385, figure 2."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool = False, mask=None):
        y = nn.Conv(WIDTH, (3, 3), use_bias=False, name="conv_0")(x)
        y = nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="norm_0")(y, mask=mask))
        y = nn.Conv(WIDTH, (3, 3), use_bias=False, name="conv_1")(y)
        return nn.relu(x + nn.BatchNorm(not train, momentum=self.momentum, name="norm_1")(y, mask=mask))


def pooled(x: jax.Array) -> jax.Array:
    """The mean over places: [batch, height, width, channels] -> [batch, channels]."""
    return x.mean((1, 2))


def model(classes: int):
    """Of Linen modules."""
    stages = [linen.stage(name, module) for name, module in (("stem", Stem()), ("block_0", Block()))]
    return (*stages, linen.stage("head", nn.Dense(classes), before=pooled))


class NnxStem(nnx.Module):
    """`Stem` in NNX."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(channels, WIDTH, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class NnxBlock(nnx.Module):
    """`Block` in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv_0 = nnx.Conv(WIDTH, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.norm_0 = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.conv_1 = nnx.Conv(WIDTH, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        return nnx.relu(x + self.norm_1(self.conv_1(y)))


def nnx_model(classes: int, channels: int = 1):
    """Of NNX modules: the paths of its variables are those of `model`."""
    return (
        nnx_stages.stage("stem", lambda rngs: NnxStem(channels, rngs)),
        nnx_stages.stage("block_0", NnxBlock),
        nnx_stages.stage("head", lambda rngs: nnx.Linear(WIDTH, classes, rngs=rngs), before=pooled),
    )
