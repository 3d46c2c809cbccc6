"""The vision transformer: a forward pass in NumPy written from the paper, the papers' numbers of parameters, and one
line for what it refuses."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special

from tljax import masks, models
from tljax.models import linen
from tljax.train.flops import step_flops
from tljax.types import InputError

X = np.random.default_rng(1).integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
"""Images that are not square, of 2 x 3 patches."""


def vit(classes=3, compute_dtype="float32", **options):
    options = {"width": 16, "depth": 2, "heads": 2, "patch": 4, **options}
    name = "vit:" + ":".join(f"{name}={value}" for name, value in options.items())
    return models.build(name, classes, hidden=(), activation="relu", compute_dtype=compute_dtype)


apply = jax.jit(models.apply, static_argnums=0)


def drawn(model, shape=X.shape[1:]):
    """Parameters of which none is zero or one, so that each of them shows."""
    rng = np.random.default_rng(0)
    params = models.abstract(model, shape)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


def forward(params, x, patch=4, pool="class_token", positions=None, eps=1e-6, tanh=False):
    """Logits in float64: equations 1 to 4 of Dosovitskiy et al. 2021, and of attention A.1 and A.2."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * layer["scale"] + layer["bias"]

    def gelu(x):
        if tanh:
            return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
        return x * scipy.special.ndtr(x)

    logits = []
    for image in np.asarray(x, np.float64):
        tokens = []
        for row in range(0, image.shape[0], patch):
            for column in range(0, image.shape[1], patch):
                pixels = image[row : row + patch, column : column + patch].reshape(-1)
                kernel = p["embedding"]["patch"]["kernel"]
                tokens.append(pixels @ kernel.reshape(-1, kernel.shape[-1]) + p["embedding"]["patch"]["bias"])
        if pool == "class_token":
            tokens.insert(0, p["embedding"]["class_token"][0])
        z = np.array(tokens) + (p["embedding"]["position"] if positions is None else positions)
        for i in range(sum(name.startswith("block_") for name in p)):
            block = p[f"block_{i}"]
            attention, y = block["attention"], norm(block["norm_1"], z)
            heads = []
            for h in range(attention["query"]["kernel"].shape[1]):
                query, key, value = (
                    y @ attention[name]["kernel"][:, h] + attention[name]["bias"][h]
                    for name in ("query", "key", "value")
                )
                scores = query @ key.T / np.sqrt(query.shape[1])
                weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
                heads.append(weights @ value @ attention["out"]["kernel"][h])
            z = z + sum(heads) + attention["out"]["bias"]
            y = norm(block["norm_2"], z) @ block["mlp"]["expand"]["kernel"] + block["mlp"]["expand"]["bias"]
            z = z + gelu(y) @ block["mlp"]["project"]["kernel"] + block["mlp"]["project"]["bias"]
        pooled = {
            "class_token": lambda z: norm(p["norm"], z[0]),
            "mean": lambda z: norm(p["norm"], z).mean(0),
            "mean_first": lambda z: norm(p["norm"], z.mean(0)),
        }[pool](z)
        logits.append(pooled @ p["head"]["kernel"] + p["head"]["bias"])
    return np.array(logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({}, {}),
        ({"pool": "mean", "eps": 0.1}, {"pool": "mean", "eps": 0.1}),
        ({"pool": "mean_first", "gelu": "tanh"}, {"pool": "mean_first", "tanh": True}),
    ],
)
def test_logits_equal_numpy_on_images_that_are_not_square(options, keywords):
    model = vit(**options)
    params = drawn(model)
    np.testing.assert_allclose(apply(model, params, X), forward(params, X / 255, **keywords), rtol=1e-4, atol=1e-5)


def test_sine_positions_are_of_columns_then_rows_and_none_of_the_class_token():
    model = vit(position="sine")
    params = drawn(model)
    assert set(params["embedding"]) == {"patch", "class_token"}
    positions = [np.zeros(16)]
    for row in range(2):
        for column in range(3):
            angles = [[place / 10_000 ** (i / 3) for i in range(4)] for place in (column, row)]
            positions.append(np.concatenate([f(place) for place in angles for f in (np.sin, np.cos)]))
    expected = forward(params, X / 255, positions=np.array(positions))
    np.testing.assert_allclose(apply(model, params, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "mean", "deviation"),
    [("signed", 0.5, 0.5), ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))],
)
def test_pixels_come_to_the_patches_as_the_network_learnt_on_them(pixels, mean, deviation):
    model = vit(pixels=pixels)
    params = drawn(model)
    expected = forward(params, (X / 255 - mean) / deviation)
    np.testing.assert_allclose(apply(model, params, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        ("Ti", 5_717_416),
        *(
            pytest.param(size, numbers, marks=pytest.mark.slow)
            for size, numbers in (("S", 22_050_664), ("B", 86_567_656), ("L", 304_326_632))
        ),
    ],
)
def test_the_papers_sizes_have_the_papers_numbers_of_parameters(size, numbers):
    """With 1000 classes: of timm's vit_tiny to vit_large_patch16_224, and of torchvision's vit_b_16 and vit_l_16."""
    model = models.build(f"vit:size={size}", 1000, hidden=(), activation="relu")
    assert sum(leaf.size for leaf in jax.tree.leaves(models.abstract(model, (224, 224, 3)))) == numbers


@pytest.mark.slow
def test_dropout_falls_in_training_alone_and_every_stage_below_the_norm_drops():
    model = vit(dropout=0.5)
    params = drawn(model)
    features = jax.jit(models.features, static_argnums=0, static_argnames="frozen")
    still = features(model, params, X)
    np.testing.assert_allclose(still[-1], apply(vit(), params, X), rtol=1e-5, atol=1e-6)
    for i, name in enumerate(("embedding", "block_0", "block_1")):
        others = tuple(stage.name for stage in model if stage.name != name)
        noisy = features(model, params, X, key=jax.random.key(0), frozen=others)
        assert [bool(np.allclose(a, b)) for a, b in zip(still, noisy, strict=True)] == [j < i for j in range(5)]


@pytest.mark.slow
def test_bfloat16_computes_to_its_precision_and_gives_float32():
    params = drawn(vit())
    exact, rounded = apply(vit(), params, X), apply(vit(compute_dtype="bfloat16"), params, X)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(exact - rounded).max() < 0.02 * np.abs(exact).max()


@pytest.mark.slow
def test_draws_are_those_of_the_reference():
    model = models.build("vit:width=256:depth=1:heads=4:patch=8", 1000, hidden=(), activation="relu")
    params = jax.tree.map(np.asarray, models.init(model, jax.random.key(0), (32, 32, 3)))
    block = params["block_0"]
    for kernel, inputs, outputs in (
        (block["attention"]["query"]["kernel"], 256, 256),
        (block["attention"]["out"]["kernel"], 256, 256),
        (block["mlp"]["expand"]["kernel"], 256, 1024),
        (block["mlp"]["project"]["kernel"], 1024, 256),
    ):
        np.testing.assert_allclose(np.abs(kernel).max(), (6 / (inputs + outputs)) ** 0.5, rtol=1e-3)
    np.testing.assert_allclose(params["embedding"]["patch"]["kernel"].std(), (1 / 192) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(params["embedding"]["position"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(block["mlp"]["expand"]["bias"].std(), 1e-6, rtol=0.1)
    np.testing.assert_allclose(params["head"]["kernel"].std(), (1 / 256) ** 0.5, rtol=0.02)
    assert not params["embedding"]["class_token"].any() and not block["attention"]["key"]["bias"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "XL"}, "vit:size=XL: it is one of Ti, S, B, L"),
        ({"pool": "map"}, "vit:pool=map: it is one of class_token, mean, mean_first"),
        ({"position": "rotary"}, "vit:position=rotary: it is one of learned, sine"),
        ({"pixels": "raw"}, "vit:pixels=raw: it is one of unit, signed, imagenet"),
        ({"gelu": "relu"}, "vit:gelu=relu: it is one of erf, tanh"),
        ({"heads": "5"}, "vit: 5 heads do not divide the width 16: give heads=4, say"),
        ({"depth": -1}, "vit:depth=-1: it is at least 1"),
        ({"patch": "0"}, "vit:patch=0: it is at least 1"),
        ({"dropout": "1"}, "vit:dropout=1.0: it is at least 0 and below 1"),
        (
            {"width": 6, "position": "sine"},
            "vit:position=sine: the width 6 is no multiple of 4 from 8 on: give another width=",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(InputError) as error:
        vit(**options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (28, 30, 1), "vit:patch=4: it does not divide images of 28 x 30 pixels: give patch=2, or other images"),
        ({}, (7, 5, 1), "vit:patch=4: it does not divide images of 7 x 5 pixels: give patch=1, or other images"),
        ({}, (16,), "vit: an example has shape (16,): it takes images [height, width, channels]"),
        (
            {"pixels": "imagenet"},
            (8, 8, 1),
            "vit:pixels=imagenet: it is of 3 channels, and images have 1: give pixels=",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(options, shape, message):
    with pytest.raises(InputError) as error:
        models.abstract(vit(**options), shape)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def looped(program):
    """How many loops a traced function has, and products of matrices outside of them."""
    text = str(program)
    return text.count("scan["), text.count("dot_general[")


PLAIN, SCANNED = ({"depth": 3, "dropout": 0.3, **scan} for scan in ({}, {"scan": "true"}))


@pytest.mark.slow
def test_scanned_blocks_are_one_loop_with_the_same_draws_and_outputs():
    plain, scanned = vit(**PLAIN), vit(**SCANNED)
    params = models.init(plain, jax.random.key(3), X.shape[1:])
    jax.tree.map(np.testing.assert_array_equal, params, models.init(scanned, jax.random.key(3), X.shape[1:]))
    outputs = [jax.jit(partial(models.features, model))(params, X, key=jax.random.key(4)) for model in (plain, scanned)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *outputs)
    # A block by itself has 8 products: q, k, v, scores, sum, out and two of its MLP. Patches are one, and the head is.
    assert looped(jax.make_jaxpr(lambda params: models.apply(plain, params, X))(params)) == (0, 26)
    assert looped(jax.make_jaxpr(lambda params: models.apply(scanned, params, X))(params)) == (1, 10)


@pytest.mark.slow
def test_scanned_blocks_have_the_same_gradients():
    params = drawn(vit(**PLAIN))

    def means(model, params):
        outputs = models.features(model, params, X, key=jax.random.key(4), frozen=("block_0",))
        return sum((y**2).mean() for y in outputs)

    gradients = jax.jit(jax.grad(means, argnums=1), static_argnums=0)
    both = (gradients(vit(**options), params) for options in (PLAIN, SCANNED))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *both)


@pytest.mark.parametrize(("frozen", "loops"), [((), 1), (("block_0", "block_1"), 2), (("block_1",), 1)])
def test_blocks_of_which_other_leaves_train_are_not_in_one_loop(frozen, loops):
    """Of blocks 0 to 3: two loops where the first two are frozen, and of what follows a lone block one."""
    model = vit(depth=4, scan="true")
    params = drawn(model)
    trained = {name: dict.fromkeys(leaves) if name in frozen else leaves for name, leaves in params.items()}
    program = jax.make_jaxpr(lambda params: models.run(model, params, {}, X, trained=trained)[0][-1])(params)
    assert looped(program)[0] == loops


@pytest.mark.slow
@pytest.mark.counts
def test_flops_of_scanned_blocks_are_counted_once_a_block():
    counts = [
        step_flops(model, params, masks.by_path(params, lambda path: True), X.shape[1:], 2)
        for model in (vit(), vit(scan="true"))
        for params in [models.abstract(model, X.shape[1:])]
    ]
    assert counts[0] == counts[1] > 0


def test_stages_that_are_alike_and_change_the_shape_are_one_line():
    halves = [linen.stage(f"half_{i}", nn.Dense(1))._replace(alike="half") for i in (0, 1)]
    params = {"half_0": {"kernel": np.ones((2, 1)), "bias": np.ones(1)}}
    params["half_1"] = params["half_0"]
    with pytest.raises(InputError, match=r"stages 'half_0' to 'half_1' are alike, and give float32\[2, 1\] of float32"):
        models.apply(tuple(halves), params, np.ones((2, 2), np.float32))


@pytest.mark.slow
@pytest.mark.counts
def test_flops_of_the_tiny_model_are_those_of_its_products():
    """A product [m, k] [k, n] has 2 m k n FLOPs; norms, softmax and GELU come to some five percent of them."""
    model = models.build("vit", 1000, hidden=(), activation="relu")
    params = models.abstract(model, (224, 224, 3))
    patches, width, hidden, depth = 14 * 14, 192, 768, 12
    tokens = patches + 1
    patch = 2 * patches * 16 * 16 * 3 * width
    attention = 4 * 2 * tokens * width * width + 2 * 2 * tokens * tokens * width
    products = patch + depth * (attention + 2 * 2 * tokens * width * hidden) + 2 * width * 1000
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    forward = jax.jit(partial(models.apply, model)).lower(params, images).cost_analysis()["flops"]
    assert products < forward < 1.07 * products
    # Backwards each product has two, but for the patches', whose pixels need no gradient.
    full, probe = (masks.under(params, names) for names in (models.names(model), "head"))
    assert step_flops(model, params, full, (224, 224, 3), 1) == pytest.approx(1.05 * (3 * products - patch), rel=0.03)
    assert step_flops(model, params, probe, (224, 224, 3), 1) < 1.1 * 2 * 2 * width * 1000
