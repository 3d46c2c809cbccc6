"""Dropout: on in training, off in evaluation and in frozen stages, by the key of the step alone."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, models, objective, optimizers, train
from tljax.data import draw
from tljax.models import randomness
from tljax.models.linen import flat, stage
from tljax.train.step import frozen_prefix, frozen_stages
from tljax.types import InputError

X = jnp.ones((50, 400))
KEY = jax.random.key(3)
RATE = 0.3


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(RATE)(x, deterministic=not train)


class Averaged(nn.Module):
    """With running statistics, which stages leave as they are."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(RATE)(x, deterministic=not train)


class AveragedByCall(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm()(x, not train)
        return nn.Dropout(RATE)(x, not train)


class KeywordOnly(nn.Module):
    @nn.compact
    def __call__(self, x, *, is_training):
        return nn.Dropout(RATE, deterministic=not is_training)(x)


class Merged(nn.Module):
    """The idiom of Flax's own modules."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        return nn.Dropout(RATE)(x, nn.merge_param("deterministic", self.deterministic, deterministic))


class Field(nn.Module):
    training: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(RATE)(x, deterministic=not self.training)


class Handing(nn.Module):
    inner: Any

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Inner()(x)


class Inner(nn.Module):
    def setup(self):
        self.drop = nn.Dropout(RATE, deterministic=False)

    def __call__(self, x):
        return self.drop(x)


class ByPosition(nn.Module):
    @nn.compact
    def __call__(self, x, train, /):
        return nn.Dropout(RATE)(x, deterministic=not train)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, train=False):
        return nn.Dropout(RATE)(x, deterministic=not train)


class Depth(nn.Module):
    """A block that is left out whole, by example, under another name than 'dropout'."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        if deterministic:
            return x
        return jnp.where(jax.random.bernoulli(self.make_rng("drop_path"), 1 - RATE, (len(x), 1)), x / (1 - RATE), 0)


class Asking(nn.Module):
    @nn.compact
    def __call__(self, x):
        if not self.has_rng("noise"):
            return x
        return x * jax.random.bernoulli(self.make_rng("noise"), 1 - RATE, x.shape) / (1 - RATE)


IDIOMS = {
    "train": Train(),
    "train, needed, with norm": Averaged(),
    "statistics by call": AveragedByCall(),
    "keyword only": KeywordOnly(),
    "merged": Merged(),
    "merged, set by hand": Merged(deterministic=False),
    "a field": Field(),
    "a field, set by hand": Field(training=True),
    "dropout": nn.Dropout(RATE),
    "dropout that is never off": nn.Dropout(RATE, deterministic=False),
    "any keyword": Handing(Train()),
    "any keyword, handed on twice": Handing(Handing(KeywordOnly())),
    "sequence": nn.Sequential([nn.Dense(400, kernel_init=lambda *_: jnp.eye(400)), nn.Dropout(RATE)]),
    "submodules": Nested(),
    "by position": ByPosition(),
    "recomputed": nn.remat(Train, static_argnums=(2,))(),
    "recomputed, after another argument": nn.remat(Masked, static_argnums=(3,))(),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_key_drops_the_fraction_that_is_asked_for_and_keeps_the_mean(idiom):
    module = stage("drop", IDIOMS[idiom])
    variables = module.init(jax.random.key(0), X)
    calm = np.asarray(module.apply(*variables, X)[0])
    np.testing.assert_allclose(calm, X, rtol=1e-4)
    noisy = np.asarray(module.apply(*variables, X, key=KEY)[0])
    kept = noisy != 0
    # Of 20,000 draws; a standard deviation of the mean is 0.0032.
    assert abs(kept.mean() - (1 - RATE)) < 0.013
    np.testing.assert_allclose(noisy[kept], calm[kept] / (1 - RATE), rtol=1e-5)
    assert abs(noisy.mean() - 1) < 0.02
    np.testing.assert_array_equal(module.apply(*variables, X, key=KEY)[0], noisy)
    assert not np.array_equal(module.apply(*variables, X, key=jax.random.key(4))[0], noisy)


def test_draws_under_another_name_follow_from_the_key():
    """Stochastic depth under 'drop_path', found without being named; noise under a name that the module looks for."""
    for module, rngs, each in ((Depth(), (), 1), (Asking(), ("noise",), 400)):
        drawing = stage("drop", module, rngs=rngs)
        x = jnp.ones((2000, 400 if each > 1 else 3))
        noisy = np.asarray(drawing.apply({}, {}, x, key=KEY)[0])
        np.testing.assert_array_equal(drawing.apply({}, {}, x)[0], x)
        assert abs((noisy != 0).mean() - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / (len(x) * each))
        np.testing.assert_array_equal(drawing.apply({}, {}, x, key=KEY)[0], noisy)
        assert not np.array_equal(drawing.apply({}, {}, x, key=jax.random.key(4))[0], noisy)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5)(x)


def test_attention_drops_its_weights_in_training_and_none_in_evaluation():
    attention = stage("attention", Attention())
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    params, _ = variables = attention.init(jax.random.key(1), x)
    plain = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True)
    [parameters] = params.values()
    np.testing.assert_array_equal(attention.apply(*variables, x)[0], plain.apply({"params": parameters}, x))
    assert not np.allclose(attention.apply(*variables, x, key=KEY)[0], attention.apply(*variables, x)[0])


def test_running_statistics_are_used_and_left_in_training_too():
    """Batch norm by hand, from statistics that are not of the batch."""
    module = stage("norm", Averaged())
    x = jax.random.normal(jax.random.key(0), (8, 5)) * 3 + 1
    variables = module.init(jax.random.key(1), x)
    mean, var = np.arange(5.0), np.arange(1.0, 6.0)
    variables[1]["BatchNorm_0"] = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    expected = (np.asarray(x) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(module.apply(*variables, x)[0], expected, rtol=1e-5)
    noisy = np.asarray(module.apply(*variables, x, key=KEY)[0])
    np.testing.assert_allclose(noisy[noisy != 0], (expected / (1 - RATE))[noisy != 0], rtol=1e-5)


def test_what_a_person_turns_off_by_hand_stays_off():
    off = stage("off", nn.Dropout(RATE, deterministic=True))
    np.testing.assert_array_equal(off.apply({}, {}, X, key=KEY)[0], X)


class Always(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(()))
        if train:
            mean.value = x.mean()
        return x - mean.value


def test_modules_that_cannot_be_stages_are_refused_with_a_remedy():
    with pytest.raises(InputError, match=r"stage 'noise' draws in evaluation .*needs PRNG"):
        stage("noise", Always()).apply({}, {}, X)[0]
    counting = stage("own", Counting())
    variables = counting.init(KEY, X)
    counting.apply(*variables, X)[0]
    with pytest.raises(InputError, match=r"stage 'own' changes its state .*`use_running_average`"):
        counting.apply(*variables, X, key=KEY)[0]


def test_a_module_without_dropout_has_the_bits_of_the_module_alone():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.LayerNorm()(nn.Dense(7)(x))

    x = jax.random.normal(KEY, (5, 3))
    plain, adapted = Plain(), stage("plain", Plain())
    params, _ = variables = adapted.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, plain.init(jax.random.key(1), x)["params"])
    for key in (None, KEY):
        np.testing.assert_array_equal(adapted.apply(*variables, x, key=key)[0], plain.apply({"params": params}, x))


def test_a_stage_draws_the_same_whatever_stands_before_it():
    model = (stage("one", nn.Dense(400)), stage("drop", nn.Dropout(RATE)), stage("head", nn.Dense(3)))
    params = models.init(model, jax.random.key(0), (400,))
    _, dropped, _ = models.features(model, params, X, key=KEY)
    [alone, _] = models.features(model[1:], params, X, key=KEY)
    np.testing.assert_array_equal(np.asarray(dropped) == 0, np.asarray(alone) == 0)


class Forgetting(nn.Module):
    """Hands `train` on to one of two."""

    @nn.compact
    def __call__(self, x, train):
        return Train()(Train()(x, train))


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return x + jax.random.normal(jax.random.key(0), x.shape) if train else x


class Projected(nn.Module):
    """A projection that is drawn once, in evaluation as in training: no fault."""

    @nn.compact
    def __call__(self, x):
        return x @ jax.random.normal(jax.random.key(0), (x.shape[-1], 3))


class Wasted(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        if train:
            jax.random.normal(self.make_rng("dropout"), x.shape)
        return x


class StillAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.25)(x, deterministic=True)


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = lambda dense, x: (dense(x), None)  # noqa: E731
        dropout = {"params": True, "dropout": True}
        return nn.scan(layer, variable_axes={"params": 0}, split_rngs=dropout, length=2)(nn.Dense(4), x)[0]


FAULTS = {
    "off by hand": (nn.Dropout(RATE, deterministic=True), (4,), ["'it' is a dropout of rate 0.3 that never drops"]),
    "of two, one": (Forgetting(), (4,), ["'it/Train_0/Dropout_0' is a dropout of rate 0.3 that never drops"]),
    "attention": (
        StillAttention(),
        (6, 4),
        ["'it/MultiHeadDotProductAttention_0' is a dropout of rate 0.25 that never drops"],
    ),
    "no use of it": (Wasted(), (4,), ["stage 'it' draws by its key, and its output does not depend on it"]),
    "a key of its own": (
        Fixed(),
        (4,),
        ["stage 'it' draws what does not follow from its key, so the same at every step"],
    ),
    "a fixed projection": (Projected(), (4,), []),
    "rate 0": (nn.Dropout(0.0, deterministic=True), (4,), []),
    "no dropout": (nn.Dense(3), (4,), []),
    "no dropout, recomputed": (nn.remat(nn.Dense)(3), (4,), []),
    "no dropout, in a loop": (Loop(), (4,), []),
    "recomputed, without static_argnums": (
        nn.remat(Train)(),
        (4,),
        ["'it/Dropout_0' is a dropout of rate 0.3 that never drops"],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_dropout_that_never_drops_is_told(case):
    module, shape, expected = FAULTS[case]
    model = (stage("it", module), stage("head", nn.Dense(2)))
    assert randomness.faults(model, shape) == expected


@pytest.mark.parametrize("idiom", IDIOMS)
def test_no_idiom_is_a_fault_and_each_draws(idiom):
    model = (stage("it", IDIOMS[idiom]), stage("head", nn.Dense(2)))
    assert randomness.faults(model, (400,)) == [] and randomness.stages(model, (400,)) == ("it",)


# Frozen stages.

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8))
LABELS = jnp.asarray(RNG.integers(0, 3, 60).astype(np.int32))
DATA = train.load(IMAGES, LABELS)
OPTIMIZER, NUMBERS = optimizers.spec("sgd")
LOSS = objective.loss("softmax_cross_entropy")


class Dropping(nn.Module):
    """Dropout within a stage that has parameters."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5)(nn.relu(nn.Dense(16)(x)), deterministic=not train)


def noisy_model():
    return (
        stage("low", nn.Dense(16), before=flat),
        stage("between", nn.Dropout(0.5)),
        stage("middle", Dropping()),
        stage("last", nn.Dropout(0.5)),
        stage("head", nn.Dense(3)),
    )


NOISY = noisy_model()


def fitted(*trained, keeps_dropout=(), cache=None, steps=4, rate=0.1, seeds=(0,), devices=(), batch=1, order=None):
    """(losses [seeds, steps], parameters of each) of fits in which only the stages named train."""
    params = [models.init(NOISY, jax.random.key(seed), (4, 4, 1)) for seed in seeds]
    mask = masks.under(params[0], trained)
    members = [
        train.Fit(
            params_of_fit,
            ((0, mask),),
            order or partial(draw.order, seed, 60, 30, epochs=True),
            np.full(steps, rate, np.float32),
            (),
            {**NUMBERS, "label_smoothing": 0.0},
            jax.random.key(seed),
        )
        for seed, params_of_fit in zip(seeds, params, strict=True)
    ]
    spec = train.Spec(NOISY, LOSS, OPTIMIZER, keeps_dropout=keeps_dropout)
    execution = train.Execution(devices, batch, cache=cache)
    losses, ends = {}, {}
    for state, log in train.fit(spec, members, DATA, [steps], execution=execution):
        for row, i in enumerate(state.fits):
            losses[i] = log.loss[row]
            ends[i] = jax.tree.map(np.asarray, state.params_and_state(row)[0])
    return np.array([losses[i] for i in range(len(seeds))]), [ends[i] for i in range(len(seeds))]


def first_loss(still):
    """Of the first step, stage by stage by hand: the stages `still` get no key."""
    params = models.init(NOISY, jax.random.key(0), (4, 4, 1))
    key = jax.random.fold_in(jax.random.key(0), 0)
    rows = draw.order(0, 60, 30, 0, 1, epochs=True)[0]
    x = np.asarray(IMAGES)[rows].astype(np.float32) / 255
    for i, layer in enumerate(NOISY):
        stage_key = None if layer.name in still else jax.random.fold_in(key, len(NOISY) - i)
        x, _ = layer.apply(params[layer.name], {}, x, key=stage_key)
    x = np.asarray(x, np.float64)
    logits = x - np.log(np.exp(x).sum(1, keepdims=True))
    return -logits[np.arange(30), np.asarray(LABELS)[rows]].mean()


STILL = {
    ("low", "middle", "head"): (),
    ("head",): ("low", "between", "middle"),
    ("middle", "head"): ("low",),
    ("low", "head"): ("between", "middle"),
    ("low", "middle"): ("last", "head"),
}
"""{what trains: what runs as in evaluation}: frozen stages, and what has no parameters below them."""
QUICK = (("head",), ("low", "head"))
SOME = [pytest.param(names, marks=() if names in QUICK else pytest.mark.slow) for names in STILL]


@pytest.mark.slow
@pytest.mark.parametrize("trained", SOME)
def test_frozen_stages_drop_nothing_wherever_they_stand_and_whatever_is_kept(trained):
    cache = train.FeatureCache(10**8)
    kept, of_kept = fitted(*trained, cache=cache)
    anew, of_anew = fitted(*trained)
    assert bool(cache.arrays) == ("low" not in trained)
    np.testing.assert_allclose(kept, anew, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), of_kept, of_anew)
    np.testing.assert_allclose(kept[0, 0], first_loss(STILL[trained]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trained", SOME)
def test_on_request_frozen_stages_keep_their_dropout_and_only_what_draws_nothing_is_kept(trained):
    cache = train.FeatureCache(10**8)
    names = randomness.stages(NOISY, (4, 4, 1))
    assert names == ("between", "middle", "last")
    kept, _ = fitted(*trained, keeps_dropout=names, cache=cache)
    np.testing.assert_allclose(kept[0, 0], first_loss(()), rtol=1e-5)
    np.testing.assert_allclose(kept, fitted(*trained, keeps_dropout=names)[0], rtol=1e-5)
    assert [array.shape for array in cache.arrays.values()] == ([] if "low" in trained else [(1, 60, 16)])


def test_what_stands_in_a_frozen_prefix_is_what_computes_the_same_at_every_step():
    mask = masks.under(models.init(NOISY, jax.random.key(0), (4, 4, 1)), "head")
    assert frozen_prefix(NOISY, mask) == ("low", "between", "middle")
    assert frozen_prefix(NOISY, mask, ("middle",)) == ("low", "between")
    assert frozen_prefix(NOISY, mask, ("last",)) == ("low", "between", "middle")


def test_a_norm_that_has_statistics_alone_freezes_no_dropout_below_it():
    norm = stage("norm", nn.BatchNorm(use_bias=False, use_scale=False))
    model = (NOISY[0], stage("drop", nn.Dropout(0.5)), norm, NOISY[-1])
    everything = masks.by_path(models.init(model, jax.random.key(0), (4, 4, 1)), lambda path: True)
    assert frozen_stages(model, everything) == ("norm",) and frozen_prefix(model, everything) == ()


def test_each_step_draws_anew_and_a_repetition_the_same():
    """At rate 0 and on the same examples, the losses of steps differ by their masks alone."""
    same = lambda first, last: np.tile(np.arange(30, dtype=np.int32), (last - first, 1))  # noqa: E731
    losses, _ = fitted("low", "middle", "head", steps=6, rate=0.0, order=same)
    assert len(set(losses[0].tolist())) == 6
    np.testing.assert_array_equal(losses, fitted("low", "middle", "head", steps=6, rate=0.0, order=same)[0])
    calm, _ = fitted("head", steps=6, rate=0.0, order=same)
    assert len(set(calm[0].tolist())) == 6  # the dropout below the head, which trains


@pytest.mark.slow
@pytest.mark.parametrize("trained", [pytest.param(("low", "middle", "head"), marks=pytest.mark.slow), ("low", "head")])
@pytest.mark.devices(8)
def test_company_and_devices_draw_the_same(trained):
    alone = [fitted(*trained, seeds=(seed,)) for seed in (0, 1)]
    together, ends = fitted(*trained, seeds=(0, 1), devices=tuple(jax.devices()[:2]))
    for row, (losses, [end]) in enumerate(alone):
        np.testing.assert_array_equal(together[row], losses[0])
        jax.tree.map(np.testing.assert_array_equal, ends[row], end)
    divided, _ = fitted(*trained, devices=tuple(jax.devices()), batch=8)
    np.testing.assert_allclose(divided[0], alone[0][0][0], rtol=1e-5)
