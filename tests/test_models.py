"""Models: named stages whose outputs equal NumPy's, and Linen modules as stages."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import batch_stats, masks, models, paths
from tljax.models import linen
from tljax.types import InputError, Stage


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
    params, state = stage.init(jax.random.key(0), jnp.ones((1, 3)))
    assert paths.names(state) == ["BatchNorm_0/mean", "BatchNorm_0/var"]
    mixed = batch_stats.join({"block": params}, {"block": state})
    mask = masks.by_path(mixed, lambda path: True)
    frozen = [path for path, m in paths.items(mask) if not m]
    assert frozen == ["block/batch_stats/BatchNorm_0/mean", "block/batch_stats/BatchNorm_0/var"]
    still, _ = stage.apply(params, state, jnp.ones((2, 3)))
    np.testing.assert_array_equal(still, stage.apply(params, state, jnp.ones((2, 3)))[0])
    dropped, same = stage.apply(params, state, jnp.ones((2, 3)), key=jax.random.key(1))
    assert same is state
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


def test_a_stage_of_the_short_form_goes_on_working():
    """`init: (key, x) -> params` and `apply: (params, x, *, key=None) -> y`, beside others of the full form."""

    def init(key, x):
        return {"scale": jnp.full(x.shape[-1], 2.0)}

    def apply(params, x, *, key=None):
        y = params["scale"][None] * x
        return y if key is None else y + jax.random.normal(key, y.shape)

    model = (Stage("short", init, apply), linen.stage("head", nn.Dense(2)))
    params = models.init(model, jax.random.key(0), (3,))
    np.testing.assert_array_equal(params["short"]["scale"], [2, 2, 2])
    x = jnp.ones((4, 3))
    np.testing.assert_array_equal(models.features(model, params, x)[0], 2 * x)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), 2), (4, 3))
    np.testing.assert_array_equal(models.features(model, params, x, key=jax.random.key(5))[0], 2 * x + noise)
    assert models.full_form(model[1]) is model[1]
    short = models.full_form(model[0])
    assert short.apply(params["short"], {}, x, key=None, train=True, weight=jnp.ones(4))[1] == {}
    with pytest.raises(InputError, match=r"stage 'odd': its `apply` takes 1 positional"):
        models.full_form(Stage("odd", init, lambda x: x))


def test_statistics_among_the_parameters_of_a_short_stage_are_a_state_that_stays():
    def init(key, x):
        return {"scale": jnp.ones(3), "batch_stats": {"mean": jnp.full(3, 0.5)}}

    def apply(params, x, *, key=None):
        return params["scale"][None] * (x - params["batch_stats"]["mean"][None])

    model = (Stage("norm", init, apply),)
    params, state = batch_stats.split(models.init(model, jax.random.key(0), (3,)))
    assert set(params["norm"]) == {"scale"} and set(state["norm"]) == {"mean"}
    [y], after = models.run(model, params, state, jnp.ones((2, 3)), tracked=["norm"], weight=jnp.ones(2))
    np.testing.assert_array_equal(y, np.full((2, 3), 0.5))
    np.testing.assert_array_equal(after["norm"]["mean"], state["norm"]["mean"])


def test_inputs_and_outputs_of_stages_are_trees():
    def init(key, x):
        return {"table": jnp.arange(12.0).reshape(4, 3)}, {}

    def embed(params, state, x, *, key, train, weight):
        return {"rows": params["table"][x["tokens"]], "pixels": x["pixels"]}, state

    def join(params, state, x, *, key, train, weight):
        return x["rows"].sum(1) + x["pixels"], state

    model = (Stage("embed", init, embed), Stage("head", lambda key, x: ({}, {}), join))
    spec = {"tokens": jax.ShapeDtypeStruct((2,), jnp.int32), "pixels": jax.ShapeDtypeStruct((3,), jnp.uint8)}
    params = models.init(model, jax.random.key(0), spec)
    x = {"tokens": jnp.array([[1, 2]]), "pixels": jnp.array([[255, 0, 51]], jnp.uint8)}
    np.testing.assert_allclose(models.apply(model, params, x), [[3 + 6 + 1, 4 + 7, 5 + 8 + 0.2]], rtol=1e-6)
