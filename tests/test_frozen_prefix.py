"""The frozen prefix: computed once, and nothing else about a fit changes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, models, objective, optimizers, penalties, plugins, train
from tljax.data import draw
from tljax.models.linen import stage
from tljax.train import features
from tljax.train.step import frozen_prefix
from tljax.types import InputError, Stage

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (60, 6, 6, 1)).astype(np.uint8))
LABELS = jnp.asarray(RNG.integers(0, 3, 60).astype(np.int32))
DATA = train.load(IMAGES, LABELS)
MLP = models.build("mlp", 3, hidden=(7, 5), activation="relu")
CNN = models.build("cnn", 3, hidden=(6,), activation="relu")
STEPS = 24


def params_of(model, seed=0):
    return models.init(model, jax.random.key(seed), (6, 6, 1))


def head(params):
    return masks.under(params, "head")


def everything(params):
    return masks.by_path(params, lambda path: True)


def fit(params, phases, seed=0, rate=0.1, numbers=None):
    order = partial(draw.order, seed, 60, 10, epochs=True)
    return train.Fit(
        params,
        phases,
        order,
        np.full(STEPS, rate, np.float32),
        ({"weight": 1e-2},),
        {**(numbers or {}), "label_smoothing": 0.0},
        jax.random.key(seed),
    )


def fitted(model, fits, cache, optimizer="sgd", merge=None, messages=None):
    """Parameters [trials, ...] and losses of a group, with and without a cache of features."""
    optimizer_spec, numbers = optimizers.spec(optimizer, clip=0.5)
    spec = train.Spec(
        model, objective.loss("softmax_cross_entropy"), optimizer_spec, penalties.read("l2:weight=1")[0], merge=merge
    )
    fits = [fit._replace(numbers={**fit.numbers, **numbers}) for fit in fits]
    execution = train.Execution(cache=cache, on_message=(messages if messages is not None else []).append)
    losses, params = [], {}
    for state, log in train.fit(spec, fits, DATA, [12, STEPS], execution=execution):
        losses.append(log.loss)
        params |= {i: jax.tree.map(np.array, state.params_and_state(row)[0]) for row, i in enumerate(state.fits)}
    return [params[i] for i in range(len(fits))], np.concatenate([loss.ravel() for loss in losses])


def assert_close(got, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), got, expected)


def test_the_lead_ends_with_the_last_frozen_stage_that_has_parameters():
    """Dropout before the head stays dropout; between frozen stages it is off, as in evaluation."""
    nothing = lambda name: Stage(name, lambda key, x: {}, lambda params, x, key=None: x)  # noqa: E731
    model = (nothing("in"), *MLP[:1], nothing("between"), *MLP[1:2], nothing("last"), MLP[2])
    params = params_of(model)
    assert frozen_prefix(model, head(params)) == ("in", "hidden_0", "between", "hidden_1")
    assert frozen_prefix(model, masks.under(params, ["hidden_1", "head"])) == ("in", "hidden_0")
    assert frozen_prefix(model, everything(params)) == ()


def test_a_fixed_stage_is_computed_once_whatever_trains():
    """A network that is closed over gives what a frozen stage of the same numbers does."""
    params = params_of(MLP)

    def below(none, x, key=None):
        return MLP[0].apply(params["hidden_0"], {}, x, key=None, train=False, weight=None)[0]

    model = (Stage("below", lambda key, x: {}, below, fixed=True), *MLP[1:])
    start = {"below": {}, "hidden_1": params["hidden_1"], "head": params["head"]}
    assert frozen_prefix(model, everything(start)) == ("below",)
    assert frozen_prefix(model, head(start)) == ("below", "hidden_1")
    cache, messages = train.FeatureCache(10**8), []
    fits = [fit(start, ((0, everything(start)),), seed) for seed in range(2)]
    cached, losses = fitted(model, fits, cache, messages=messages)
    plain, expected = fitted(model, fits, None)
    upper = masks.under(params, ["hidden_1", "head"])
    by_mask, of_mask = fitted(MLP, [fit(params, ((0, upper),), seed) for seed in range(2)], None)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    np.testing.assert_allclose(losses, of_mask, rtol=2e-5)
    assert_close(cached, plain)
    assert_close(cached, [{"below": {}, **{name: each[name] for name in ("hidden_1", "head")}} for each in by_mask])
    assert len(cache.arrays) == 1 and "below is frozen: features of 60 examples are computed once" in messages[1]


def test_a_fixed_stage_draws_nothing(tmp_path):
    (tmp_path / "net.py").write_text(
        "import flax.linen as nn\nfrom tljax.models.linen import stage\n"
        "def model(classes, *, rate: float = 0.5):\n"
        "    bottom = stage('bottom', nn.Dropout(rate))._replace(fixed=True)\n"
        "    return bottom, stage('head', nn.Dense(classes))\n"
    )
    for rate, refused in ((0.5, True), (0.0, False)):
        model = models.build(f"{tmp_path}/net.py:model:rate={rate}", 3, hidden=(), activation="relu")
        if refused:
            with pytest.raises(InputError, match="stage 'bottom' is `fixed` and uses its key: a draw would never be"):
                models.init(model, jax.random.key(0), (4,))
        else:
            assert models.init(model, jax.random.key(0), (4,))["bottom"] == {}


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ("body", "stage 'body' is `fixed` and has parameters or a state: leave that out"),
        ("head", "its head, stage 'head', is `fixed`: only stages below it may be"),
    ],
)
def test_a_fixed_stage_has_no_parameters_and_is_no_head(fixed, words, tmp_path):
    (tmp_path / "net.py").write_text(
        "import jax.numpy as jnp\nfrom tljax.types import Stage\n"
        "def model(classes):\n"
        "    draw = lambda key, x: {'w': jnp.ones((x.shape[1], classes))}\n"
        "    apply = lambda params, x, *, key=None: x @ params['w']\n"
        f"    return tuple(Stage(name, draw, apply, fixed=name == '{fixed}') for name in ('body', 'head'))\n"
    )
    with pytest.raises(InputError, match=words):
        models.init(models.build(f"{tmp_path}/net.py:model", 3, hidden=(), activation="relu"), jax.random.key(0), (4,))


# A large eps keeps rounding small where a gradient is next to nothing.
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam:eps=1e-2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [MLP, pytest.param(CNN, marks=pytest.mark.slow)], ids=["mlp", "cnn"])
@pytest.mark.parametrize("plan", ["head", "head, then all", "upper, then head"])
def test_a_cached_fit_equals_the_uncached_phase_by_phase(plan, model, optimizer):
    params = params_of(model)
    upper = masks.under(params, models.names(model)[1:])
    phases = {
        "head": ((0, head(params)),),
        "head, then all": ((0, head(params)), (12, everything(params))),
        "upper, then head": ((0, upper), (12, head(params))),
    }[plan]
    cache = train.FeatureCache(10**8)
    cached, losses = fitted(model, [fit(params, phases)], cache, optimizer)
    plain, expected = fitted(model, [fit(params, phases)], None, optimizer)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert_close(cached, plain)
    # LP-FT caches its first phase and not its second; a head after the upper stages, one lead each.
    assert len(cache.arrays) == {"head": 1, "head, then all": 1, "upper, then head": 2}[plan]


def test_frozen_leaves_of_a_cached_fit_keep_their_bytes():
    params = params_of(MLP)
    [after], _ = fitted(MLP, [fit(params, ((0, head(params)),))], train.FeatureCache(10**8))
    for name in ("hidden_0", "hidden_1"):
        before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params[name])]
        assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(after[name])] == before


@pytest.mark.slow
def test_added_factors_are_merged_before_the_features_are_computed():
    """LoRA's frozen factors below a trained stage count as frozen, and their product is in the features."""
    method, _ = plugins.method("lora")
    params = method.adapt(params_of(MLP), jax.random.key(1))
    params["hidden_0"]["lora_b"] = params["hidden_0"]["lora_b"] + 0.3
    phases = ((0, masks.under(params, ["hidden_1", "head"])),)
    cache = train.FeatureCache(10**8)
    cached, _ = fitted(MLP, [fit(params, phases)], cache, merge=method.merge)
    plain, _ = fitted(MLP, [fit(params, phases)], None, merge=method.merge)
    assert len(cache.arrays) == 1
    assert_close(cached, plain)


def test_dropout_above_the_lead_draws_the_same():
    model = (*MLP[:2], stage("drop", nn.Dropout(0.5, deterministic=False)), MLP[2])
    params = {**params_of(MLP), "drop": {}}
    phases = ((0, masks.under(params, "head")),)
    cached, losses = fitted(model, [fit(params, phases)], train.FeatureCache(10**8))
    plain, expected = fitted(model, [fit(params, phases)], None)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert_close(cached, plain)
    without, _ = fitted(MLP, [fit(params_of(MLP), ((0, head(params_of(MLP))),))], None)
    assert not np.allclose(without[0]["head"]["kernel"], plain[0]["head"]["kernel"], atol=1e-3)


def test_fits_that_freeze_the_same_leaves_of_the_same_source_share_the_features():
    first, second = params_of(MLP), params_of(MLP, 1)
    cache = train.FeatureCache(10**8)
    for rate in (0.1, 0.2):
        fitted(MLP, [fit(first, ((0, head(first)),), rate=rate)], cache)
    again = {**first, "head": params_of(MLP, 5)["head"]}
    fitted(MLP, [fit(again, ((0, head(again)),), seed=3)], cache)
    assert len(cache.arrays) == 1
    fitted(MLP, [fit(second, ((0, head(second)),))], cache)
    assert len(cache.arrays) == 2


def test_sources_of_one_group_have_a_view_each_and_one_source_has_one():
    fits = [fit(params_of(MLP, i), ((0, head(params_of(MLP, i))),), seed=i) for i in range(3)]
    cache = train.FeatureCache(10**8)
    together, _ = fitted(MLP, fits, cache)
    assert [array.shape for array in cache.arrays.values()] == [(3, 60, 5)]
    for i, alone in enumerate(fits):
        assert_close(together[i], fitted(MLP, [alone], None)[0][0])
    same = [fit(params_of(MLP), ((0, head(params_of(MLP))),), seed=i) for i in range(3)]
    cache = train.FeatureCache(10**8)
    fitted(MLP, same, cache)
    assert [array.shape for array in cache.arrays.values()] == [(1, 60, 5)]


def test_over_the_budget_it_says_so_and_computes_as_it_goes():
    params, messages = params_of(MLP), []
    cache = train.FeatureCache(60 * 5 * 4 - 1)
    got, _ = fitted(MLP, [fit(params, ((0, head(params)),))], cache, messages=messages)
    assert not cache.arrays and any("so computed in every step" in line for line in messages)
    jax.tree.map(np.testing.assert_array_equal, got[0], fitted(MLP, [fit(params, ((0, head(params)),))], None)[0][0])


def test_within_the_budget_the_least_recently_used_go_and_a_group_takes_turns():
    fits = [fit(params_of(MLP, i), ((0, head(params_of(MLP, i))),), seed=i) for i in range(3)]
    cache = train.FeatureCache(60 * 5 * 4)
    together, _ = fitted(MLP, fits, cache)
    assert sum(array.nbytes for array in cache.arrays.values()) <= cache.budget
    for i, alone in enumerate(fits):
        assert_close(together[i], fitted(MLP, [alone], None)[0][0])


def test_fewer_examples_than_there_are_are_not_worth_it():
    params, cache = params_of(MLP), train.FeatureCache(10**8)
    optimizer_spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(MLP, objective.loss("softmax_cross_entropy"), optimizer_spec)
    few = fit(params, ((0, head(params)),), numbers=numbers)._replace(rates=np.ones(5, np.float32), weights=())
    list(train.fit(spec, [few], DATA, [5], execution=train.Execution(cache=cache)))
    assert not cache.arrays


def test_bfloat16_features_are_half_as_large_and_computed_with_in_float32():
    params = params_of(MLP)
    half = train.FeatureCache(10**8, "bfloat16")
    got, losses = fitted(MLP, [fit(params, ((0, head(params)),))], half)
    _, expected = fitted(MLP, [fit(params, ((0, head(params)),))], None)
    [array] = half.arrays.values()
    assert array.dtype == jnp.bfloat16 and array.nbytes == 60 * 5 * 2
    assert got[0]["head"]["kernel"].dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=0.02)


def test_examples_that_no_batch_divides_have_their_own_features(monkeypatch):
    monkeypatch.setattr(features, "_BATCH", 16)
    params, data = params_of(MLP), train.load(IMAGES[:59], LABELS[:59])
    stacked = jax.tree.map(lambda leaf: leaf[None], params)
    outputs = features.compute(train.FeatureCache(10**8), MLP[:2], None, stacked, data)
    assert outputs.shape == (1, 60, 5)
    expected = models.features(MLP, params, IMAGES[:59])[1]
    np.testing.assert_allclose(outputs[0, :59], expected, rtol=1e-5, atol=1e-6)
