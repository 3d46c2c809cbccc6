"""Convolutions: gradients are those of JAX's own, and a loop of training steps on a CPU holds the quick form alone."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from tljax import convolution, models
from tljax.models import linen
from tljax.models import nnx as of_nnx

AXES = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
RNG = np.random.default_rng(0)
# (positions, window, strides, padding, dilation of the kernel)
CASES = {
    "same": ((6, 7), (3, 3), (1, 1), "SAME", (1, 1)),
    "strided": ((7, 6), (3, 3), (2, 2), "SAME", (1, 1)),
    "stem": ((9, 9), (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1)),
    "dilated": ((9, 8), (3, 3), (2, 1), "SAME", (2, 3)),
    "uneven": ((5, 6), (3, 2), (1, 2), ((5, 4), (0, 6)), (1, 1)),
    "cropped": ((7, 7), (3, 3), (1, 1), ((-1, -1), (0, -2)), (1, 1)),
    "kernel larger than the image": ((3, 3), (5, 5), (2, 2), "SAME", (1, 1)),
    "image of two positions": ((2, 1), (3, 3), (1, 1), "SAME", (1, 1)),
    "one position": ((5, 6), (1, 1), (1, 1), "SAME", (1, 1)),
    "one position, strided": ((5, 6), (1, 1), (2, 3), "VALID", (1, 1)),
    "one position, padded": ((4, 4), (1, 1), (1, 1), ((1, 0), (0, 2)), (1, 1)),
    "patches": ((8, 6), (4, 3), (4, 3), "VALID", (1, 1)),
    "patches with a rest": ((7, 5), (2, 2), (2, 2), "VALID", (1, 1)),
    "of text": ((9,), (3,), (2,), "SAME", (1,)),
    "patches of text": ((9,), (4,), (4,), "VALID", (1,)),
    "of volumes": ((4, 3, 5), (2, 3, 2), (1, 2, 1), "SAME", (1, 1, 1)),
    "patches of volumes": ((4, 4, 6), (2, 2, 3), (2, 2, 3), "VALID", (1, 1, 1)),
    "no window fits": ((4, 4), (5, 5), (5, 5), "VALID", (1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_jax_in_float64(case: str) -> None:
    positions, window, strides, padding, dilation = CASES[case]
    x, kernel = RNG.standard_normal((2, *positions, 3)), RNG.standard_normal((*window, 3, 4))
    how = {"rhs_dilation": dilation, "dimension_numbers": AXES[len(positions)]}
    with jax.enable_x64(True):

        def gradients(function):
            y, pull = jax.vjp(lambda x, kernel: function(x, kernel, strides, padding, **how), x, kernel)
            weight = np.cos(np.arange(y.size, dtype=float)).reshape(y.shape)
            return y, *pull(jnp.asarray(weight))

        ours, theirs = gradients(convolution.conv_general_dilated), gradients(lax.conv_general_dilated)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    x, kernel = RNG.standard_normal((2, 5, 5, 2)), RNG.standard_normal((3, 3, 2, 3))
    along = RNG.standard_normal(kernel.shape)
    with jax.enable_x64(True):

        def loss(kernel):
            return jnp.sin(convolution.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=AXES[2])).sum()

        slope = (loss(kernel + 1e-6 * along) - loss(kernel - 1e-6 * along)) / 2e-6
        assert np.vdot(jax.grad(loss)(kernel), along) == pytest.approx(float(slope), rel=1e-8)
        curved = jax.jvp(jax.grad(loss), (jnp.asarray(kernel),), (jnp.asarray(along),))[1]
        steps = (jax.grad(loss)(kernel + 1e-6 * along) - jax.grad(loss)(kernel - 1e-6 * along)) / 2e-6
        np.testing.assert_allclose(curved, steps, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["groups", "other axes", "a dilated image", "integers"])
def test_what_is_not_of_the_quick_form_is_left_to_jax(how: str) -> None:
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    axes, more = AXES[2], {}
    if how == "groups":
        kernel, more = jnp.ones((3, 3, 1, 2)), {"feature_group_count": 2}
    elif how == "other axes":
        x, axes = jnp.ones((1, 2, 4, 4)), ("NCHW", "HWIO", "NCHW")
    elif how == "a dilated image":
        more = {"lhs_dilation": (2, 2)}
    else:
        x, kernel = x.astype(jnp.int32), kernel.astype(jnp.int32)
    arguments = (x, kernel, (1, 1), "SAME" if how != "a dilated image" else ((1, 1), (1, 1)))
    ours, theirs = (
        function(*arguments, dimension_numbers=axes, **more)
        for function in (convolution.conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours, theirs)


def _nnx_convolution(name: str):
    return of_nnx.stage(name, lambda rngs: nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs))


MODELS = {
    "cnn": lambda: models.build("cnn:width=2:dense=4", 3, hidden=(), activation="relu"),
    "resnet": lambda: models.build("resnet:depth=14:width=4", 3, hidden=(), activation="relu"),
    "vit": lambda: models.build("vit:width=8:depth=1:heads=2:patch=4", 3, hidden=(), activation="relu"),
    "efficientnet_lite": lambda: models.build("efficientnet_lite:width=0.1:depth=0.1", 3, hidden=(), activation="relu"),
    "linen": lambda: (linen.stage("conv", nn.Conv(3, (3, 3))), linen.stage("conv_1", nn.Conv(3, (2, 2), 2))),
    "nnx": lambda: (_nnx_convolution("conv"), linen.stage("conv_1", nn.Conv(3, (1, 1)))),
}

SLOW = ("resnet", "vit", "efficientnet_lite")


@pytest.mark.cpu
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS])
def test_the_loop_over_steps_holds_convolutions_of_the_quick_form_alone(name: str) -> None:
    model = tuple(map(models.full_form, MODELS[name]()))
    channels = 2 if name == "nnx" else 3
    shape = (16, 16, channels)
    variables = jax.eval_shape(lambda: models.init(model, jax.random.key(0), shape))
    params, state = models.batch_stats.split(variables)

    def loss(params, state, x):
        outputs, _ = models.run(model, params, state, x, tracked=tuple(state), key=jax.random.key(0))
        return (outputs[-1].astype(jnp.float32) ** 2).mean()

    @jax.jit
    def train(params, state, x, steps):
        def body(_, params):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, state, x))

        return lax.fori_loop(0, steps, body, params)

    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    text = train.lower(params, state, x, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    labels = re.findall(r"dim_labels=(\S+?),?\s", text)
    products = text.count(" dot(") + text.count("ynn")
    assert labels or products
    assert set(labels) <= {"b01f_01io->b01f"}, labels
