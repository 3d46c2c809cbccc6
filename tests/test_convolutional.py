"""EfficientNet-Lite and the residual network hold against their definitions, written again in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import batch_stats, masks, models, paths
from tljax.models import efficientnet_lite, linen
from tljax.train.flops import step_flops
from tljax.types import InputError

LITE = "efficientnet_lite:width=0.1:depth=0.25:dropout=0"


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


def same(length, size, stride):
    """TensorFlow's SAME: outputs are ceil(length / stride), and what is odd of the padding comes last."""
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2


def even(length, size, stride):
    """PyTorch's padding of half a kernel on each side."""
    return size // 2, size // 2


def windows(x, size, stride, padding, value=0.0):
    """[h, w, channels] to [h', w', channels, size, size]."""
    pads = [padding(length, size, stride) for length in x.shape[:2]]
    padded = np.pad(x, (*pads, (0, 0)), constant_values=value)
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), (0, 1))[::stride, ::stride]


def convolved(x, kernel, stride, padding=same):
    """[h, w, in] by [k, k, in, out] to [h', w', out]."""
    return np.einsum("hwikl,klio->hwo", windows(x, len(kernel), stride, padding), kernel, optimize=True)


def depthwise(x, kernel, stride):
    """[h, w, channels] by [k, k, 1, channels] to [h', w', channels]."""
    return np.einsum("hwikl,kli->hwi", windows(x, len(kernel), stride, same), kernel[:, :, 0], optimize=True)


def normed(x, params, state, epsilon=1e-3):
    scale = params["scale"] / np.sqrt(state["var"] + epsilon)
    return (x - state["mean"]) * scale + params["bias"]


def relu6(x):
    return np.clip(x, 0, 6)


def lite(variables, image, blocks):
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


def logits_of_an_image(model, variables, shape):
    """(A random image, the model's logits of it.)"""
    image = np.random.default_rng(1).random(shape, np.float32)
    with jax.default_matmul_precision("highest"):
        return image, jax.jit(functools.partial(models.apply, model))(variables, image[None])[0]


LITE_BLOCKS = [(3, 1), (3, 2), (5, 2), (3, 2), (5, 1), (5, 2), (3, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(21, 34, 3), pytest.param((8, 9, 1), marks=pytest.mark.slow)])
def test_lite(shape):
    """Odd and even sides, down to one pixel where strides end: padding is TensorFlow's."""
    model, variables = drawn(LITE, shape)
    image, logits = logits_of_an_image(model, variables, shape)
    expected = lite(variables, image, LITE_BLOCKS)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("scales", "millions"),
    [
        ((1, 1), 4.652),
        pytest.param((1.1, 1.2), 6.092, marks=pytest.mark.slow),
        pytest.param((1, 1.1), 5.417, marks=pytest.mark.slow),
        pytest.param((1.2, 1.4), 8.197, marks=pytest.mark.slow),
        pytest.param((1.4, 1.8), 13.007, marks=pytest.mark.slow),
    ],
)
def test_counts_of_lite(scales, millions):
    """The numbers of parameters of Lite0 to Lite4, as timm's table has them (tf_efficientnet_lite0 to 4)."""
    width, depth = scales
    model = efficientnet_lite.model(1000, width=width, depth=depth)
    params, state = batch_stats.split(models.abstract(model, (224, 224, 3)))
    assert round(count(params) / 1e6, 3) == millions
    if scales == (1, 1):
        assert (count(params), count(state)) == (4_652_008, 42_016)
        assert models.names(model) == ("stem", *(f"block_{i}" for i in range(16)), "top", "head")


def group_normed(x, params, groups):
    """Each group of channels less its mean over positions and channels, by its standard deviation."""
    split = x.reshape(*x.shape[:2], groups, -1)
    mean, var = split.mean((0, 1, 3), keepdims=True), split.var((0, 1, 3), keepdims=True)
    return ((split - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * params["scale"] + params["bias"]


def resnet(variables, image, small, groups):
    """Logits of one image in float64; `groups` 0 are batch norms."""
    params, state = batch_stats.split(paths.each(lambda _, leaf: np.float64(leaf), variables))

    def layer(x, stage, conv, norm, stride):
        y = convolved(x, params[stage][conv]["kernel"], stride, even)
        if groups:
            return group_normed(y, params[stage][norm], groups)
        return normed(y, params[stage][norm], state[stage][norm], 1e-5)

    x = (np.float64(image) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    x = np.maximum(layer(x, "stem", "conv", "norm", 1 if small else 2), 0)
    if not small:
        x = windows(x, 3, 2, even, -np.inf).max((-1, -2))
    for name in (f"block_{group}_0" for group in (1, 2, 3, 4)):
        block, y = params[name], x
        convolutions = 3 if "conv_3" in block else 2
        for i in range(1, convolutions + 1):
            strided = name > "block_1_9" and i == (2 if convolutions == 3 else 1)
            y = layer(y, name, f"conv_{i}", f"norm_{i}", 2 if strided else 1)
            y = np.maximum(y, 0) if i < convolutions else y
        if "shortcut_conv" in block:
            x = layer(x, name, "shortcut_conv", "shortcut_norm", 2 if name > "block_1_9" else 1)
        x = np.maximum(x + y, 0)
    return x.mean((0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "shape", "groups"),
    [
        ("depth=10:width=8", (37, 50, 3), 0),
        ("depth=10:width=8:norm=group:groups=4:stem=small", (11, 12, 3), 4),
        ("depth=14:width=4", (21, 20, 3), 0),
    ],
)
def test_resnet(options, shape, groups):
    """Basic blocks and bottlenecks, both norms, both stems, on odd and even sides."""
    model, variables = drawn(f"resnet:{options}:pixels=imagenet", shape)
    image, logits = logits_of_an_image(model, variables, shape)
    expected = resnet(variables, image, "stem=small" in options, groups)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("depth", "parameters", "statistics"),
    [
        (18, 11_689_512, 9_600),
        (50, 25_557_032, 53_120),
        pytest.param(34, 21_797_672, 17_024, marks=pytest.mark.slow),
        pytest.param(101, 44_549_160, 105_344, marks=pytest.mark.slow),
        pytest.param(152, 60_192_808, 151_424, marks=pytest.mark.slow),
    ],
)
def test_counts_of_resnets(depth, parameters, statistics):
    """The numbers of parameters are torchvision's."""
    params, state = batch_stats.split(models.abstract(build(f"resnet:depth={depth}", 1000), (64, 64, 3)))
    assert (count(params), count(state)) == (parameters, statistics)


def test_tracked():
    """Running averages move by 1 - momentum towards the mean and the biased variance of the batch."""
    model, variables = drawn("resnet:depth=10:width=8:momentum=0.75", (16, 16, 3))
    params, state = batch_stats.split(variables)
    x = np.random.default_rng(1).random((3, 16, 16, 3), np.float32)
    _, moved = models.run(model[:1], params, state, x, key=jax.random.key(0), tracked=("stem",), weight=np.ones(3))
    y = np.stack([convolved(np.float64(image), np.float64(params["stem"]["conv"]["kernel"]), 2, even) for image in x])
    for name, statistic in (("mean", y.mean((0, 1, 2))), ("var", y.var((0, 1, 2)))):
        expected = 0.75 * np.float64(state["stem"]["norm"][name]) + 0.25 * statistic
        np.testing.assert_allclose(moved["stem"]["norm"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet:depth=20", r"resnet:depth=20: it is one of 10, 14, 18"),
        ("resnet:norm=layer", r"resnet:norm=layer: it is one of batch, group"),
        ("resnet:norm=group:width=16", r"resnet:width=16:groups=32: a group has as many channels"),
        ("resnet:momentum=1.0", r"resnet:momentum=1.0: it is at least 0 and below 1"),
        ("efficientnet_lite:width=0.0", r"efficientnet_lite:width=0.0:depth=1.0: a scale is above 0"),
        ("efficientnet_lite:dropout=1.0", r"efficientnet_lite:dropout=1.0:momentum=0.99: each is at least 0"),
    ],
)
def test_options(name, message):
    with pytest.raises(InputError, match=message):
        build(name)


@pytest.mark.parametrize("name", ["resnet:depth=10", "efficientnet_lite:width=0.1:depth=0.25"])
def test_inputs(name):
    with pytest.raises(InputError, match=r"an example has shape \(12,\): it takes images \[height, width, channels\]"):
        models.abstract(build(name), (12,))


def taps(length, size, stride, padding):
    """How many pairs of an output and a kernel's position, along one side, are of a pixel and not of padding."""
    before, _ = padding(length, size, stride)
    outputs = (length + sum(padding(length, size, stride)) - size) // stride + 1
    return sum(0 <= i * stride + j - before < length for i in range(outputs) for j in range(size))


@pytest.mark.counts
def test_flops_of_a_resnet():
    """A step takes three times the FLOPs of its convolutions, but for the gradient of the pixels: 2 a product.

    No image is smaller than a window: of those the padding is computed with.
    """
    model, side, batch = build("resnet:depth=10", 10), 96, 2
    params, state = batch_stats.split(models.abstract(model, (side, side, 3)))
    lengths = {"stem": 96, "block_1_0": 24, "block_2_0": 24, "block_3_0": 12, "block_4_0": 6}
    total = first = 0
    for path, kernel in paths.items(params):
        stage, *name = path.split("/")
        if name[-1] != "kernel" or stage == "head":
            continue
        strided = stage == "stem" or (stage in ("block_2_0", "block_3_0", "block_4_0") and name[0] != "conv_2")
        halved = stage.endswith("_0") and not stage.startswith("block_1") and name[0] == "conv_2"
        length = lengths[stage] // (2 if halved else 1)
        size, _, inputs, outputs = kernel.shape
        flops = 2 * batch * taps(length, size, 2 if strided else 1, even) ** 2 * inputs * outputs
        total, first = total + flops, flops if stage == "stem" else first
    counted = step_flops(model, params, masks.under(params, models.names(model)), (side, side, 3), batch, state=state)
    assert 1 <= counted / (3 * total - first) < 1.05


@pytest.mark.counts
def test_flops_of_grouped_convolutions():
    """A convolution of g groups takes a g-th of the FLOPs, and so does its gradient."""

    def flops(groups, gradient):
        def outputs(x, kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", feature_group_count=groups, dimension_numbers=numbers
            )

        function = jax.grad(lambda x, kernel: outputs(x, kernel).sum(), (0, 1)) if gradient else outputs
        shapes = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 10, 10, 8), (3, 3, 8 // groups, 16)))
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"]

    for groups in (1, 4, 8):
        assert flops(groups, False) == 2 * 2 * 8 * 8 * 9 * 8 * 16 / groups
        assert flops(groups, True) == 2 * flops(groups, False)


@pytest.mark.slow
@pytest.mark.counts
def test_flops_of_lite():
    """Forwards and backwards three times 2 a product: expansion, narrowing, top, stem, and each tap of each channel."""
    model, side, batch = build("efficientnet_lite:depth=0.25", 10), 64, 2
    params, state = batch_stats.split(models.abstract(model, (side, side, 3)))
    total, length, strides = 0, side, (1, 2, 2, 2, 1, 2, 1)
    for stage in models.names(model)[:-1]:
        stride = 2 if stage == "stem" else strides[int(stage[6:])] if stage.startswith("block") else 1
        kernels = {path: leaf.shape for path, leaf in paths.items(params[stage]) if path.endswith("kernel")}
        after = -(-length // stride)
        for path, (size, _, inputs, outputs) in kernels.items():
            positions = length**2 if path.startswith("expand") else after**2
            total += 2 * batch * positions * size * size * inputs * outputs
        length = after
    counted = step_flops(model, params, masks.under(params, models.names(model)), (side, side, 3), batch, state=state)
    assert 1 <= counted / (3 * total) < 1.15


POOLS = [((2, 2), (2, 2), "SAME"), ((3, 3), (2, 2), ((1, 1), (1, 1))), ((2, 3), (1, 2), "VALID")]


@pytest.mark.parametrize(("window", "strides", "padding"), POOLS)
def test_pooling_by_slices_is_that_of_flax_to_its_gradient_and_scatters_nothing(window, strides, padding):
    """Among many equal numbers too; where windows overlap the gradients add in another order."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 3, (2, 7, 9, 3)).astype(np.float32))
    of_flax = functools.partial(nn.max_pool, window_shape=window, strides=strides, padding=padding)
    of_slices = functools.partial(linen._largest_of_slices, window=window, strides=strides, padding=padding)
    np.testing.assert_array_equal(of_slices(x), of_flax(x))
    cotangent = jnp.asarray(rng.normal(size=of_flax(x).shape).astype(np.float32))
    gradients = [jax.vjp(pool, x)[1](cotangent)[0] for pool in (of_slices, of_flax)]
    np.testing.assert_allclose(*gradients, rtol=0, atol=0 if window == strides else 1e-6)
    of_nan = x.at[0, 3, 3, 0].set(jnp.nan)
    np.testing.assert_array_equal(of_slices(of_nan), of_flax(of_nan))
    lowered = [jax.jit(jax.grad(lambda x, pool=pool: pool(x).sum())).trace(x) for pool in (of_slices, of_flax)]
    scatters = ["scatter" in trace.lower(lowering_platforms=("cuda",)).as_text() for trace in lowered]
    assert scatters == [False, True]


def test_on_an_accelerator_models_pool_by_slices(monkeypatch):
    x = jnp.zeros((1, 8, 8, 1))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for pooled in (linen.max_pool(x, (2, 2), (2, 2)), linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))):
        assert pooled.shape == (1, 4, 4, 1)
    assert "reduce_window" not in str(jax.make_jaxpr(lambda x: linen.max_pool(x, (2, 2), (2, 2)))(x))
