"""The residual network: `stem`, `block_1_0`, `block_1_1`, ..., `block_4_0`, ... and `head`.

He et al. 2016, "Deep residual learning for image recognition", arXiv:1512.03385, table 1. A block that halves the
resolution does so in its 3 x 3 convolution, as torchvision's do and not the paper's ("ResNet v1.5").
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax.models.linen import PIXELS, images, linear_head, max_pool, stage
from tljax.plugins import nearest
from tljax.types import InputError, Model

DEPTHS = {
    10: (False, (1, 1, 1, 1)),
    14: (True, (1, 1, 1, 1)),
    18: (False, (2, 2, 2, 2)),
    26: (True, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
"""{depth: (whether blocks are bottlenecks, blocks in each of the four groups)}; 10, 14 and 26 are not the paper's."""
NORMS = ("batch", "group")
STEMS = ("imagenet", "small")
_EPSILON = 1e-5


def model(
    classes: int,
    *,
    depth: int = 18,
    width: int = 64,
    norm: str = "batch",
    groups: int = 32,
    stem: str = "imagenet",
    pixels: str = "unit",
    momentum: float = 0.9,
    dtype: Any = None,
) -> Model:
    """A residual network of `depth` layers for images [batch, height, width, channels] of any size.

    With 1000 classes and colour the depths 18, 34 and 50 have 11,689,512, 21,797,672 and 25,557,032 parameters, as
    torchvision's. `width` is the channels of the stem; the groups have it, and two, four and eight times as many, which
    bottlenecks widen fourfold. The output of the last block is its mean over positions.

    - `norm` is `batch`, or `group`: of `groups` groups of channels (Wu & He 2018, arXiv:1803.08494). BiT (Kolesnikov et
      al. 2020, arXiv:1912.11370) has it too, but with weight standardisation and norms before convolutions, so that its
      weights do not fit. Group norms have no running averages.
    - `stem` is the paper's 7 x 7 convolution of stride 2 and its pool, or `small`: 3 x 3 of stride 1 and no pool, for
      images of 28 to 32 pixels (Chen et al. 2020, arXiv:2002.05709, appendix B.9).
    - `pixels` is what the network learnt on: pixels x of 0 to 1 as they are (`unit`), (x - 0.5) / 0.5 (`signed`), or
      less the mean of ImageNet's channels and divided by their standard deviation (`imagenet`: torchvision's).

    Padding is PyTorch's, as much before as behind, and every epsilon 1e-5. Running averages keep `momentum` of
    themselves at each batch: PyTorch writes 1 - momentum, 0.1. They are of the batch's biased variance, PyTorch's of
    the unbiased one, which is n / (n - 1) times as large for n positions in a batch.
    Kernels are normal of variance 2 / fan_out (He et al. 2015, arXiv:1502.01852, equation 14), the head's LeCun normal.
    Products are computed in `dtype`, statistics of norms and logits in float32. Raises InputError for an option out of
    range, and for inputs that are no images.

    >>> [stage.name for stage in model(10, depth=10)]
    ['stem', 'block_1_0', 'block_2_0', 'block_3_0', 'block_4_0', 'head']
    """
    if depth not in DEPTHS:
        raise InputError(f"resnet:depth={depth}: it is one of {', '.join(map(str, DEPTHS))}")
    for option, value, known in (("norm", norm, NORMS), ("stem", stem, STEMS), ("pixels", pixels, tuple(PIXELS))):
        if value not in known:
            raise InputError(f"resnet:{option}={value}: it is one of {', '.join(known)}{nearest(value, known)}")
    if width < 1 or groups < 1:
        raise InputError(f"resnet:width={width}:groups={groups}: each is at least 1")
    if norm == "group" and width % groups:
        raise InputError(
            f"resnet:width={width}:groups={groups}: a group has as many channels as each other: change one"
        )
    if not 0 <= momentum < 1:
        raise InputError(f"resnet:momentum={momentum}: it is at least 0 and below 1")
    layer: Any = (
        functools.partial(nn.BatchNorm, momentum=momentum, epsilon=_EPSILON, dtype=dtype)
        if norm == "batch"
        else functools.partial(nn.GroupNorm, num_groups=groups, epsilon=_EPSILON, dtype=dtype)
    )
    bottleneck, repeats = DEPTHS[depth]
    last = (len(repeats) - 1, repeats[-1] - 1)
    blocks = [
        stage(
            f"block_{group + 1}_{i}",
            _Block(width << group, 2 if group and not i else 1, bottleneck, layer, dtype),
            after=_mean if (group, i) == last else None,
        )
        for group, count in enumerate(repeats)
        for i in range(count)
    ]
    first = stage("stem", _Stem(width, stem, layer, dtype), before=functools.partial(images, "resnet", pixels=pixels))
    return (first, *blocks, stage("head", linear_head(classes, dtype)))


def size(shapes: Mapping[str, tuple[int | None, ...]]) -> str:
    """How a model with leaves of these shapes, {path: shape}, is built; '' where they do not say it.

    >>> size({"stem/conv/kernel": (7, 7, 3, 64)} | {f"block_{g}_0/conv_2/kernel": (3, 3, 64, 64) for g in range(1, 5)})
    'resnet:depth=10:width=64:norm=group'
    """
    stem = shapes.get("stem/conv/kernel")
    names = {path.partition("/")[0] for path in shapes}
    repeats = tuple(sum(name.startswith(f"block_{group}_") for name in names) for group in (1, 2, 3, 4))
    bottleneck = any(path.endswith("/conv_3/kernel") for path in shapes)
    depth = next((depth for depth, numbers in DEPTHS.items() if numbers == (bottleneck, repeats)), None)
    if stem is None or len(stem) != 4 or depth is None:
        return ""
    text = f"resnet:depth={depth}:width={stem[3]}" + (":stem=small" if stem[0] == 3 else "")
    return text if "stem/batch_stats/norm/mean" in shapes else f"{text}:norm=group"


def _mean(x: jax.Array) -> jax.Array:
    """The mean over positions. The last block gives it, so that the features that a head trains on are small."""
    return jnp.mean(x, (1, 2))


class _Stem(nn.Module):
    """A convolution, a norm, ReLU and, but for the small one, a pool."""

    width: int
    kind: str
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, stride = (3, 1) if self.kind == "small" else (7, 2)
        x = nn.relu(self.norm(name="norm")(_conv(self.width, size, stride, self.dtype, "conv")(x)))
        return x if self.kind == "small" else max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class _Block(nn.Module):
    """Two 3 x 3 convolutions, or a 1 x 1, a 3 x 3 and a 1 x 1, beside a shortcut (arXiv:1512.03385, figure 5)."""

    width: int
    stride: int
    bottleneck: bool
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, stride = self.width, self.stride
        layers: tuple[tuple[int, int, int], ...] = ((width, 3, stride), (width, 3, 1))
        if self.bottleneck:
            layers = ((width, 1, 1), (width, 3, stride), (4 * width, 1, 1))
        y = x
        for i, (channels, size, step) in enumerate(layers, 1):
            y = self.norm(name=f"norm_{i}")(_conv(channels, size, step, self.dtype, f"conv_{i}")(y))
            y = nn.relu(y) if i < len(layers) else y
        if x.shape != y.shape:
            x = _conv(y.shape[-1], 1, stride, self.dtype, "shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def _conv(width: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """A convolution of a square kernel of odd size without bias, under as much padding before as behind."""
    pad = (size // 2, size // 2)
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=(pad, pad),
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        name=name,
    )
