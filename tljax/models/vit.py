"""The vision transformer: `embedding`, `block_0`, `block_1`, ..., `norm` and `head`.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929; sizes as in Steiner et al. 2021, "How to
train your ViT?", arXiv:2106.10270; mean pooling and sine positions as in Beyer et al. 2022, "Better plain ViT baselines
for ImageNet-1k", arXiv:2205.01580.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.models.linen import PIXELS, images, linear_head, stage
from tljax.plugins import nearest
from tljax.types import InputError, Model

SIZES = {"Ti": (192, 12), "S": (384, 12), "B": (768, 12), "L": (1024, 24)}
"""{size: (width, depth)}; a head has 64 channels, and the hidden layer of a block four times the width."""
POSITIONS = ("learned", "sine")
GELUS = ("erf", "tanh")


def _class_token(x: jax.Array) -> jax.Array:
    """The first token."""
    return x[:, 0]


def _mean(x: jax.Array) -> jax.Array:
    """The mean over tokens."""
    return jnp.mean(x, axis=1)


_Function = Callable[[jax.Array], jax.Array] | None
POOLS: Mapping[str, tuple[_Function, _Function]] = {
    "class_token": (_class_token, None),
    "mean": (None, _mean),
    "mean_first": (_mean, None),
}
"""{pool: (what comes before the norm, what comes after it)}: tokens [batch, tokens, width] to [batch, width]."""


class _Embedding(nn.Module):
    """Images [batch, height, width, channels] to tokens [batch, patches, width], a class token before them."""

    width: int
    patch: int
    class_token: bool
    position: str
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", dtype=self.dtype, name="patch")(x)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        if self.class_token:
            token = self.param("class_token", nn.initializers.zeros, (1, width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x], axis=1)
        if self.position == "learned":
            position = self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        else:
            position = jnp.pad(sine_positions(rows, columns, width), ((int(self.class_token), 0), (0, 0)))
        return nn.Dropout(self.dropout)(x + position[None].astype(x.dtype))


class _Mlp(nn.Module):
    """Two dense layers, token by token."""

    hidden: int
    gelu: str
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        y = nn.gelu(dense(self.hidden, name="expand")(x), approximate=self.gelu == "tanh")
        return dense(x.shape[-1], name="project")(nn.Dropout(self.dropout)(y))


class _Block(nn.Module):
    """Attention and an MLP, each of what a norm gives, each added to its inputs: tokens [batch, tokens, width]."""

    heads: int
    hidden: int
    gelu: str
    epsilon: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            force_fp32_for_softmax=True,
            name="attention",
        )
        mlp = _Mlp(self.hidden, self.gelu, self.dropout, self.dtype, name="mlp")
        x = x + nn.Dropout(self.dropout)(attention(norm(name="norm_1")(x)))
        return x + nn.Dropout(self.dropout)(mlp(norm(name="norm_2")(x)))


def model(
    classes: int,
    *,
    size: str = "Ti",
    patch: int = 16,
    width: int = 0,
    depth: int = 0,
    heads: int = 0,
    mlp: int = 0,
    pool: str = "class_token",
    position: str = "learned",
    pixels: str = "unit",
    gelu: str = "erf",
    eps: float = 1e-6,
    dropout: float = 0.0,
    scan: bool = False,
    dtype: Any = None,
) -> Model:
    """A vision transformer of a size of the papers (Ti, S, B, L), or of any `width`, `depth`, `heads` and `mlp`.

    The inputs are images [batch, height, width, channels] that patches of `patch` x `patch` pixels divide; those of
    the papers are 224 pixels wide in patches of 16. A number that is 0 is that of the size, or follows from the width:
    width / 64 heads, and 4 x width hidden channels of a block's MLP.

    - `pool` is what the head sees, [batch, width]: the class token after the norm (`class_token`; Dosovitskiy's, timm's
      `token`), or the mean of the patches, without a class token: of what the norm gives (`mean`; big_vision's `gap`),
      or taken before the norm (`mean_first`; timm's `avg`, whose norm is called `fc_norm`). Attention pooling
      (SigLIP's) is not built.
    - `position` is `learned`, or `sine`: of rows and columns, without parameters (`sine_positions`). Positions that
      a checkpoint holds, as those of MAE, are taken as learned ones, whatever they were made of.
    - `pixels` is what the network learnt on: pixels x of 0 to 1 as they are (`unit`), (x - 0.5) / 0.5 (`signed`:
      Google's), or less the mean of ImageNet's channels and divided by their standard deviation (`imagenet`:
      torchvision's, MAE's).
    - `gelu` is exact (`erf`: timm, torchvision, Hugging Face) or its approximation (`tanh`: Google's code in JAX).
    - `eps` is that of the norms: 1e-6, in Hugging Face's ViT 1e-12.
    - `scan` runs neighbouring blocks of which the same leaves train as one loop, so that a program has a block once. It
      is traced in a third of the time, and each step then copies the blocks' parameters into one array. XLA compiles
      for CPUs no faster so: the step of L/16 took 20 s with it and 12 s without.
    - `dropout` falls on the sum of patches and positions and on what attention and the MLP's layers give.

    The draws are those of Dosovitskiy's code: attention and MLP Xavier uniform, patches LeCun normal, positions normal
    of standard deviation 0.02, the MLP's biases normal of 1e-6, class token and other biases zero; but for the head,
    which is LeCun normal here and zero there: under a head of zeros nothing below it has a gradient, and strategies
    that ask for the first gradient would see none. Products are computed in `dtype`; softmax, statistics and logits in
    float32. Raises InputError for options that do not fit each other, and for inputs that are no images or that the
    patch does not divide.

    >>> from tljax import models
    >>> vit = models.build("vit:width=64:depth=2:patch=7", 10, hidden=(), activation="relu")
    >>> models.names(vit)
    ('embedding', 'block_0', 'block_1', 'norm', 'head')
    >>> models.abstract(vit, (28, 28, 1))["block_0"]["attention"]["query"]["kernel"].shape
    (64, 1, 64)
    """
    for option, value, known in (
        ("size", size, SIZES),
        ("pool", pool, POOLS),
        ("position", position, POSITIONS),
        ("pixels", pixels, PIXELS),
        ("gelu", gelu, GELUS),
    ):
        if value not in known:
            raise InputError(f"vit:{option}={value}: it is one of {', '.join(known)}{nearest(value, known)}")
    for option, number in (("width", width), ("depth", depth), ("heads", heads), ("mlp", mlp), ("patch", patch - 1)):
        if number < 0:
            raise InputError(f"vit:{option}={patch if option == 'patch' else number}: it is at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"vit:dropout={dropout}: it is at least 0 and below 1")
    width, depth = width or SIZES[size][0], depth or SIZES[size][1]
    heads, mlp = heads or max(1, width // 64), mlp or 4 * width
    if width % heads:
        raise InputError(
            f"vit: {heads} heads do not divide the width {width}: give heads={_divisor(width, heads)}, say"
        )
    if position == "sine" and (width % 4 or width < 8):
        raise InputError(f"vit:position=sine: the width {width} is no multiple of 4 from 8 on: give another width=")

    embedding = _Embedding(width, patch, pool == "class_token", position, dropout, dtype)
    block = _Block(heads, mlp, gelu, eps, dropout, dtype)
    before, after = POOLS[pool]
    return (
        stage("embedding", embedding, before=functools.partial(_normalized, patch=patch, pixels=pixels)),
        *(stage(f"block_{i}", block)._replace(alike="block" if scan else None) for i in range(depth)),
        # Pooled here and not in the head, so that the features that a head is trained on are of one token.
        stage("norm", nn.LayerNorm(epsilon=eps, dtype=dtype), before=before, after=after),
        stage("head", linear_head(classes, dtype)),
    )


def size(shapes: Mapping[str, tuple[int | None, ...]]) -> str:
    """How a model with leaves of these shapes, {path: shape}, is built; '' where they do not say it.

    What no shape says, of which the number of heads changes the numbers most, is said to be missing.

    >>> leaves = {"embedding/patch/kernel": (16, 16, 3, 384), "block_0/mlp/expand/kernel": (384, 1536)}
    >>> size(leaves).partition(" ")[0]
    'vit:width=384:depth=1:patch=16:pool=mean:heads=?'
    >>> size(leaves | {"embedding/class_token": (1, 384), "embedding/position": (197, 384)})
    'vit:width=384:depth=1:patch=16:heads=?, images of 224 x 224 (how many heads is not in the file; often width / 64)'
    """
    patch = shapes.get("embedding/patch/kernel")
    blocks = {path.partition("/")[0] for path in shapes if path.startswith("block_")}
    if patch is None or len(patch) != 4 or None in patch or not blocks:
        return ""
    side, width, depth = patch[0] or 0, patch[3] or 0, len(blocks)
    known = next((name for name, numbers in SIZES.items() if numbers == (width, depth)), None)
    text = f"vit:size={known}" if known else f"vit:width={width}:depth={depth}"
    hidden = shapes.get("block_0/mlp/expand/kernel", (None,))[-1]
    text += f":mlp={hidden}" if hidden and hidden != 4 * width else ""
    text += f":patch={side}"
    tokens = shapes.get("embedding/position", (None,))[0]
    # Positions of a square and one more are of a class token, which rules may not lead to its leaf.
    has_token = "embedding/class_token" in shapes or (
        tokens is not None and math.isqrt(tokens) ** 2 != tokens and math.isqrt(tokens - 1) ** 2 == tokens - 1
    )
    text += "" if has_token else ":pool=mean"
    rows = math.isqrt(tokens - has_token) if tokens else 0
    square = tokens is not None and rows > 0 and rows**2 == tokens - has_token
    query = shapes.get("block_0/attention/query/kernel") or ()
    heads = query[1] if len(query) == 3 else None
    text += f":heads={heads or '?'}"  # '?' is refused, so that the rest is not copied without the number
    text += f", images of {rows * side} x {rows * side}" if square else ""
    return text if heads else f"{text} (how many heads is not in the file; often width / 64)"


def _normalized(x: jax.Array, patch: int, pixels: str) -> jax.Array:
    """The pixels as the network learnt on them. Raises InputError for what is no image, or not divided by the patch."""
    x = images("vit", x, pixels)
    _, rows, columns, _ = x.shape
    if rows % patch or columns % patch:
        both = [p for p in range(2, min(rows, columns) + 1) if rows % p == columns % p == 0]
        fits = min(both, key=lambda p: abs(p - patch)) if both else 1
        raise InputError(
            f"vit:patch={patch}: it does not divide images of {rows} x {columns} pixels: give patch={fits}, or other "
            "images"
        )
    return x


def _divisor(width: int, heads: int) -> int:
    """The divisor of the width that is nearest to the number of heads."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - heads))


def sine_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Positions [rows * columns, width], float32: sines and cosines of the column, then of the row.

    Of each there are width / 4 frequencies, 10000^(-i / (width / 4 - 1)): those of big_vision, after Chen et al. 2021,
    "An empirical study of training self-supervised vision transformers", arXiv:2104.02057, and Beyer et al. 2022,
    arXiv:2205.01580, section 2.

    >>> sine_positions(1, 2, 8).tolist()[0]
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    row, column = np.mgrid[:rows, :columns].reshape(2, -1, 1) * frequencies
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1).astype(np.float32)
