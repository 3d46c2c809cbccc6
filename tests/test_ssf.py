"""SSF: a scale and a shift after each layer, at the start, after steps of a plain loop that has them there, merged."""

from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_adapters import started
from test_low_rank import LABELS, VIT, built, drawn_for, fitted, stacked_model

from experiments.runs import plan
from tljax import models, optimizers, paths
from tljax.data import draw
from tljax.models import linen
from tljax.strategies import ssf
from tljax.train import flops
from tljax.types import Context, InputError

slow = partial(pytest.param, marks=pytest.mark.slow)
RNG = np.random.default_rng(0)


class ConvNorm(nn.Module):
    """A convolution without a bias, a norm after it."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.LayerNorm(name="norm")(nn.Conv(4, (3, 2), strides=2, use_bias=False, name="conv")(x))).mean(
            (1, 2)
        )


def mlp(p, x):
    """The paper's rule: what x W + b gives, scaled and shifted."""
    hidden = x @ p["hidden_0/kernel"] + p["hidden_0/bias"]
    hidden = p["hidden_0/ssf_scale"] * hidden + p["hidden_0/ssf_shift"]
    return jnp.tanh(hidden) @ p["head/kernel"] + p["head/bias"]


def cnn(p, x):
    """The same after a convolution, and after the norm that follows it."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, p["hidden_0/conv/kernel"], (2, 2), "SAME", dimension_numbers=numbers)
    y = p["hidden_0/conv/ssf_scale"] * y
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = p["hidden_0/norm/scale"] * y + p["hidden_0/norm/bias"]
    y = p["hidden_0/norm/ssf_scale"] * y + p["hidden_0/norm/ssf_shift"]
    return jax.nn.relu(y).mean((1, 2)) @ p["head/kernel"] + p["head/bias"]


class Tanh(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x)


@pytest.mark.parametrize(
    ("name", "form"), [("mlp", "factored"), ("cnn", "factored"), slow("mlp", "merge"), slow("cnn", "merge")]
)
def test_steps_equal_a_plain_loop_with_a_scale_and_a_shift_after_each_layer(name, form):
    """Three steps in float64; the kernels keep their bytes, and merged parameters give what the loop's last ones do."""
    explicit, shape = {"mlp": (mlp, (6,)), "cnn": (cnn, (6, 5, 2))}[name]
    below = {"mlp": linen.stage("hidden_0", nn.Dense(8)), "cnn": linen.stage("hidden_0", ConvNorm())}[name]
    activation = (linen.stage("tanh", Tanh()),) if name == "mlp" else ()
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        model = (below, *activation, linen.stage("head", nn.Dense(3)))
        start, _ = started(model, shape, "ssf")
        start = start._replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float64), start.params))
        state = fitted(model, start, getattr(start, form), shape=shape)
        before = p = {path: jnp.asarray(leaf, jnp.float64) for path, leaf in paths.items(start.params)}
        images = np.random.default_rng(1).normal(size=(24, *shape)).astype(np.float32).astype(np.float64)

        @jax.jit
        @jax.grad
        def slopes(trained, frozen, x, y):
            logits = explicit(frozen | trained, x)
            return optax.softmax_cross_entropy(logits, y).mean()

        trains = [path for path in p if "ssf" in path or "head" in path]
        for rows in draw.order(0, 24, 8, 0, 3, epochs=True):
            moves = slopes({path: p[path] for path in trains}, p, images[rows], jnp.eye(3)[LABELS[rows]])
            p = p | {path: p[path] - float(np.float32(0.1)) * moves[path] for path in trains}
        trained = jax.tree.map(lambda leaf: leaf[0], state.params)
        outputs = models.apply(model, start.merge(trained), images)
        wanted = explicit(p, images)
    assert len(trains) == (4 if name == "mlp" else 5)
    for path, leaf in paths.items(trained):
        np.testing.assert_allclose(leaf, p[path], rtol=0, atol=1e-12, err_msg=path)
        if path in trains:
            assert np.abs(p[path] - before[path]).max() > 1e-4, path
        else:
            assert np.asarray(leaf).tobytes() == np.asarray(before[path]).tobytes()
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", slow("cnn"), slow(VIT)])
def test_at_the_start_the_outputs_are_the_sources_and_merged_is_unmerged(name):
    model = built(name)
    apply = jax.jit(partial(models.apply, model))
    x = np.random.default_rng(5).uniform(size=(4, 28, 28, 1)).astype(np.float32)
    (start, source), (moved, _) = started(model, strategy="ssf", moved=False), started(model, strategy="ssf")
    outputs = apply(source, x)
    for form in (start.factored, start.merge):
        np.testing.assert_array_equal(apply(form(start.params), x), outputs)
    with jax.enable_x64(True):
        x, params = x.astype(np.float64), jax.tree.map(lambda leaf: leaf.astype(np.float64), moved.params)
        applied = {form: np.asarray(apply(getattr(moved, form)(params), x)) for form in ("factored", "merge")}
    np.testing.assert_allclose(applied["factored"], applied["merge"], rtol=0, atol=1e-6)
    assert np.abs(applied["merge"] - outputs).max() > 0.01 and not plan.merged(moved)


def test_every_layer_below_the_head_gets_them_and_a_layer_without_a_bias_no_shift():
    model = built(VIT)
    start, _ = started(model, strategy="ssf")
    layers = {path.rpartition("/")[0] for path in paths.names(start.params) if path.endswith("ssf_scale")}
    inside = {*(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp/expand", "mlp/project"}
    inside |= {"norm_1", "norm_2"}
    assert layers == {"embedding/patch", "norm"} | {f"block_{i}/{layer}" for i in (0, 1) for layer in inside}
    context = Context(models.names(model), contracted=start.contracted)
    assert ssf.left_out(start.params, context) == ["embedding/class_token", "embedding/position"]
    shapes = {path: leaf.shape for path, leaf in paths.items(start.params) if "block_0/attention" in path}
    for name, outputs in {"query": (2, 8), "out": (16,)}.items():
        assert {shapes[f"block_0/attention/{name}/{leaf}"] for leaf in ("bias", "ssf_scale", "ssf_shift")} == {outputs}
    rows = dict(paths.items(optimizers.decays("kernels", start.params)))
    assert not any(decays for path, decays in rows.items() if "ssf" in path) and rows["embedding/patch/kernel"]
    plain = ssf.adapt({"a": {"kernel": np.ones((3, 2))}, "n": {"scale": np.ones(2)}}, jax.random.key(0))
    assert set(paths.names(plain)) == {"a/kernel", "a/ssf_scale", "n/scale", "n/ssf_scale"}


def test_globs_choose_layers_and_what_is_left_out_is_said():
    params = drawn_for(built("cnn:norm=true"), (28, 28, 1))
    added = {}
    for on in ("conv_*/**/scale", "dense/kernel", "conv_0/*/*"):
        adapted = ssf.adapt(params, jax.random.key(0), on=on)
        added[on] = {path.rpartition("/")[0] for path in paths.names(adapted) if "ssf_scale" in path}
    both = {"conv_0/conv", "conv_0/norm"}
    assert list(added.values()) == [{"conv_0/norm", "conv_1/norm"}, {"dense"}, both]
    with pytest.raises(InputError, match=r"pattern 'dens/kernel' matches no leaf; nearest: 'dense/kernel'"):
        ssf.adapt(params, jax.random.key(0), on="dens/kernel")
    with pytest.raises(InputError, match=r"that on=head/kernel matches: there is nothing to adapt"):
        ssf.adapt(params, jax.random.key(0), on="head/kernel")
    model = stacked_model(3)
    stacked, context = (
        drawn_for(model, (5, 8)),
        Context(models.names(model), contracted=models.contracted(model, (5, 8))),
    )
    assert ssf.left_out(stacked, context) == ["body/layers/dense/kernel"]
    odd = {"a": {"kernel": np.ones((3, 2)), "bias": np.ones(3)}, "b": {"scale": np.ones(2), "temperature": np.ones(2)}}
    assert ssf.left_out(odd, Context()) == ["a/kernel", "b/scale"]


def test_a_sigma_draws_them_around_one_and_zero():
    params = {name: {"kernel": np.ones((1, 4000)), "bias": np.ones(4000)} for name in ("a", "b")}
    adapted = ssf.adapt(params, jax.random.key(0), sigma=0.02)
    draws = [adapted[name][leaf] - mean for name in ("a", "b") for leaf, mean in (("ssf_scale", 1), ("ssf_shift", 0))]
    for draw_of_leaf in draws:
        assert draw_of_leaf.std() == pytest.approx(0.02, rel=0.05) and abs(draw_of_leaf.mean()) < 0.002
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.06


LAYER = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
ADDED = {"ssf_scale": np.ones(2), "ssf_shift": np.ones(2)}
NOT_ADAPTED = {
    "no scales": ({"a": LAYER}, "the parameters have no scales ssf_scale"),
    "a shift alone": ({"a": {**LAYER, "ssf_shift": np.ones(2)}}, "'a/ssf_shift' without ssf_scale"),
    "no shift": ({"a": {**LAYER, "ssf_scale": np.ones(2)}}, "'a/bias' without ssf_shift"),
    "no bias": ({"a": {"kernel": np.ones((3, 2)), **ADDED}}, "'a/ssf_shift' without bias"),
    "no layer": ({"a": {"ssf_scale": np.ones(2)}}, "'a/ssf_scale' without scale"),
    "inputs": ({"a": {**LAYER, **ADDED, "ssf_scale": np.ones(3)}}, "do not fit their layer: 'a/kernel' (3, 2)"),
    "one number": ({"a": {"kernel": np.ones((3, 2)), "ssf_scale": np.ones(())}}, "do not fit their layer"),
    "all axes": ({"a": {"kernel": np.ones((3, 2)), "ssf_scale": np.ones((3, 2))}}, "do not fit their layer"),
    "another shift": ({"a": {**LAYER, **ADDED, "ssf_shift": np.ones(1)}}, "do not fit their layer"),
    "a norm's": ({"a": {"scale": np.ones((3, 2)), "ssf_scale": np.ones(2)}}, "do not fit their layer"),
    "frozen": (flax.core.freeze({"a": {**LAYER, **ADDED}}), "give nested dicts, as flax.core.unfr"),
}


@pytest.mark.parametrize("case", NOT_ADAPTED)
def test_it_says_what_a_tree_lacks_that_it_is_to_merge(case):
    params, message = NOT_ADAPTED[case]
    with pytest.raises(InputError) as error:
        ssf.merge(params)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_it_adapts_no_tree_twice():
    adapted = ssf.adapt({"a": LAYER}, jax.random.key(0))
    with pytest.raises(InputError, match="have scales already, 'a/ssf_scale', 'a/ssf_shift': merge"):
        ssf.adapt(adapted, jax.random.key(1))
    assert set(ssf.adapt(ssf.merge(adapted), jax.random.key(0))["a"]) == set(adapted["a"])


@pytest.mark.slow
@pytest.mark.counts
def test_a_scale_of_outputs_costs_half_of_what_a_scaled_kernel_costs():
    """784-512-10 at batch 100: 80 MFLOP forwards, and as many again where the kernel has a gradient."""
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    start, _ = started(model, strategy="ssf")
    [(_, mask)] = start.phases
    flops_by_form = {
        form: flops.step_flops(model, start.params, mask, (28, 28, 1), 100, getattr(start, form)) / 1e6
        for form in ("factored", "merge")
    }
    assert flops_by_form["factored"] < 90 and flops_by_form["merge"] > 160, flops_by_form
