"""EfficientNet-Lite holds against its definition, written again in float64."""

import functools

import jax
import numpy as np
import pytest

from tljax import batch_stats, models, paths
from tljax.models import efficientnet_lite

SMALL = "efficientnet_lite:width=0.1:depth=0.25:dropout=0"


def build(name, classes=5):
    return models.build(name, classes, hidden=(8,), activation="relu")


def count(tree):
    return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(tree))


def drawn(name, shape, classes=5):
    """(model, variables): running statistics too are drawn, so that none is neutral."""
    model = build(name, classes)
    draw = np.random.default_rng(0)

    def fill(path, leaf):
        values = draw.normal(size=leaf.shape)
        if path.endswith(("kernel", "bias", "mean")):
            return np.float32(values * (2 / max(1, np.prod(leaf.shape[:-1]))) ** 0.5)
        return np.float32(1 + 0.3 * np.abs(values))

    variables = models.abstract(model, shape)
    return model, paths.each(fill, variables)


def same_padded(x, size, stride):
    """TensorFlow's SAME: outputs are ceil(length / stride), and what is odd of the padding comes last."""
    pads = []
    for length in x.shape[:2]:
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, (*pads, (0, 0)))


def windows(x, size, stride):
    """[h, w, channels] to [h', w', channels, size, size]."""
    padded = same_padded(x, size, stride)
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), (0, 1))[::stride, ::stride]


def convolved(x, kernel, stride):
    """[h, w, in] by [k, k, in, out] to [h', w', out]."""
    return np.einsum("hwikl,klio->hwo", windows(x, len(kernel), stride), kernel, optimize=True)


def depthwise(x, kernel, stride):
    """[h, w, channels] by [k, k, 1, channels] to [h', w', channels]."""
    return np.einsum("hwikl,kli->hwi", windows(x, len(kernel), stride), kernel[:, :, 0], optimize=True)


def normed(x, params, state):
    scale = params["scale"] / np.sqrt(state["var"] + 1e-3)
    return (x - state["mean"]) * scale + params["bias"]


def relu6(x):
    return np.clip(x, 0, 6)


def reference(variables, image, blocks):
    """Logits of one image in float64; `blocks` are [(kernel size, stride)] in order."""
    params, state = batch_stats.split(paths.each(lambda _, leaf: np.float64(leaf), variables))

    def layer(x, stage, conv, norm, stride, convolve=convolved):
        return normed(convolve(x, params[stage][conv]["kernel"], stride), params[stage][norm], state[stage][norm])

    x = relu6(layer((255 * np.float64(image) - 127) / 128, "stem", "conv", "norm", 2))
    for i, (_, stride) in enumerate(blocks):
        name, y = f"block_{i}", x
        if "expand_conv" in params[name]:
            y = relu6(layer(y, name, "expand_conv", "expand_norm", 1))
        y = relu6(layer(y, name, "depthwise", "depthwise_norm", stride, depthwise))
        y = layer(y, name, "project_conv", "project_norm", 1)
        x = x + y if x.shape == y.shape else y
    x = relu6(layer(x, "top", "conv", "norm", 1))
    return x.mean((0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]


SMALL_BLOCKS = [(3, 1), (3, 2), (5, 2), (3, 2), (5, 1), (5, 2), (3, 1)]


@pytest.mark.parametrize("shape", [(21, 34, 3), (8, 9, 1)])
def test_small(shape):
    """Odd and even sides, down to one pixel where strides end: padding is TensorFlow's."""
    model, variables = drawn(SMALL, shape)
    image = np.random.default_rng(1).random(shape, np.float32)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(functools.partial(models.apply, model))(variables, image[None])[0]
    expected = reference(variables, image, SMALL_BLOCKS)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("scales", "millions"),
    [
        ((1, 1), 4.652),
        ((1.1, 1.2), 6.092),
        pytest.param((1, 1.1), 5.417, marks=pytest.mark.slow),
        pytest.param((1.2, 1.4), 8.197, marks=pytest.mark.slow),
        pytest.param((1.4, 1.8), 13.007, marks=pytest.mark.slow),
    ],
)
def test_counts(scales, millions):
    """The numbers of parameters of Lite0 to Lite4, as timm's table has them (tf_efficientnet_lite0 to 4)."""
    width, depth = scales
    model = efficientnet_lite.model(1000, width=width, depth=depth)
    params, state = batch_stats.split(models.abstract(model, (224, 224, 3)))
    assert round(count(params) / 1e6, 3) == millions
    if scales == (1, 1):
        assert (count(params), count(state)) == (4_652_008, 42_016)
        assert models.names(model) == ("stem", *(f"block_{i}" for i in range(16)), "top", "head")
