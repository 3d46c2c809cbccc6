"""Models: named stages whose outputs equal NumPy's, and Linen modules as stages."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, models, paths
from tljax.models import linen
from tljax.types import InputError


def mlp(hidden=(6, 4), classes=3):
    return models.build("mlp", classes, hidden=hidden, activation="relu")


def test_the_reference_model_has_two_stages_and_407050_parameters():
    params = models.init(mlp((512,), 10), jax.random.key(0), (28, 28, 1))
    assert models.names(mlp((512,), 10)) == ("hidden_0", "head")
    assert paths.names(params) == ["head/bias", "head/kernel", "hidden_0/bias", "hidden_0/kernel"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 407_050


def test_the_mlp_equals_numpy_with_pixels_scaled_to_one():
    params = jax.tree.map(np.asarray, models.init(mlp(), jax.random.key(0), (2, 3, 1)))
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 1)).astype(np.uint8)
    x = images.reshape(5, 6) / 255
    for name in ("hidden_0", "hidden_1"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(models.apply(mlp(), params, jnp.asarray(images)), expected, rtol=1e-5, atol=1e-6)


def test_kernels_are_lecun_normal_and_biases_zero():
    params = models.init(mlp((1000,)), jax.random.key(0), (500,))
    kernel = np.asarray(params["hidden_0"]["kernel"])
    np.testing.assert_allclose(kernel.std(), (1 / 500) ** 0.5, rtol=0.01)
    assert not np.any(params["hidden_0"]["bias"])


def test_models_of_other_classes_share_the_draws_of_all_other_stages():
    a = models.init(mlp(classes=3), jax.random.key(0), (6,))
    b = models.init(mlp(classes=9), jax.random.key(0), (6,))
    np.testing.assert_array_equal(a["hidden_1"]["kernel"], b["hidden_1"]["kernel"])


def test_no_hidden_widths_is_logistic_regression():
    assert models.names(models.build("mlp", 3, hidden=(), activation="relu")) == ("head",)


def test_equal_flags_give_one_object():
    assert mlp() is mlp()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "mpl"}, "unknown model 'mpl'; nearest: 'mlp'"),
        ({"activation": "rely"}, "unknown activation 'rely'; nearest: 'relu'"),
        ({"hidden": (512, 0)}, "hidden=512,0: a width is at least 1"),
        ({"name": "mlp:depth=3"}, "has no option 'depth'"),
        ({"name": "mlp:hidden=3"}, "has no option 'hidden'"),
    ],
)
def test_models_that_cannot_be_are_refused(change, message):
    arguments = {"name": "mlp", "hidden": (512,), "activation": "relu", **change}
    with pytest.raises(InputError, match=message):
        models.build(arguments.pop("name"), 10, **arguments)


class Block(nn.Module):
    """Dense, batch norm with running statistics, dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
        return nn.Dropout(0.5)(x, deterministic=not self.has_rng("dropout"))


def test_a_linen_module_is_a_stage_and_its_running_statistics_never_train():
    stage = linen.stage("block", Block(), after=jax.nn.relu)
    params = stage.init(jax.random.key(0), jnp.ones((1, 3)))
    mask = masks.by_path(params, lambda path: True)
    frozen = [path for path, m in paths.items(mask) if not m]
    assert frozen == ["batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"]
    still = stage.apply(params, jnp.ones((2, 3)))
    np.testing.assert_array_equal(still, stage.apply(params, jnp.ones((2, 3))))
    dropped = stage.apply(params, jnp.ones((2, 3)), key=jax.random.key(1))
    assert dropped.shape == (2, 4) and not np.array_equal(dropped, still)


def test_a_module_with_state_of_another_kind_is_refused():
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("cache", "calls", lambda: jnp.zeros(()))
            return x

    with pytest.raises(InputError, match=r"collections \['cache'\]"):
        linen.stage("counter", Counter()).init(jax.random.key(0), jnp.ones((1, 3)))


def test_frozen_leading_stages_run_without_a_key():
    noisy = linen.stage("noisy", Block())
    head = linen.stage("head", nn.Dense(2))
    model = (noisy, head)
    params = models.init(model, jax.random.key(0), (3,))
    x = jnp.ones((2, 3))
    calm = models.apply(model, params, x)
    np.testing.assert_array_equal(models.apply(model, params, x, key=jax.random.key(1), frozen=["noisy"]), calm)
    assert not np.array_equal(models.apply(model, params, x, key=jax.random.key(1)), calm)
