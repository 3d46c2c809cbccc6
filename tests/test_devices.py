"""One fit over many devices: each batch is divided, and what comes out is what one device gives, but for rounding."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import evaluate, masks, models, objective, optimizers, penalties, train
from tljax.data import draw
from tljax.models import linen
from tljax.train import loop, vectorize

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (300, 4, 4, 1)).astype(np.uint8))
LABELS = jnp.asarray(RNG.integers(0, 3, 300).astype(np.int32))
DATA = train.load(IMAGES, LABELS)
MODEL = models.build("mlp", 3, hidden=(16,), activation="relu")
OPTIMIZER, NUMBERS = optimizers.spec("adam", clip=0.5)
SPEC = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), OPTIMIZER)
DEVICES = tuple(jax.devices())
pytestmark = pytest.mark.devices(8)
STEPS = 50

DIVIDED = {
    "jit data:8": train.Execution(DEVICES, 8),
    "jit data:4, trial:2": train.Execution(DEVICES, 4),
    "pmap": train.Execution(DEVICES, 8, "pmap"),
}


def phases(strategy, params):
    everything, head = masks.by_path(params, lambda path: True), masks.under(params, "head")
    return {"full": ((0, everything),), "head_only": ((0, head),), "lp_ft": ((0, head), (20, everything))}[strategy]


def fits(strategy, batch, count=2, model=MODEL, weights=(), smoothing=0.0):
    result = []
    for seed in range(count):
        params = models.init(model, jax.random.key(seed), (4, 4, 1))
        order = partial(draw.order, seed, 300, batch, epochs=True)
        rates, numbers = np.full(STEPS, 0.01, np.float32), {**NUMBERS, "label_smoothing": smoothing}
        key = jax.random.key(seed)
        result.append(train.Fit(params, phases(strategy, params), order, rates, weights, numbers, key))
    return result


def outcome(group, execution, spec=SPEC):
    """All that a fit gives: of every segment the state and the log, and logits at the end."""
    result = []
    for state, log in train.fit(spec, group, DATA, [20, STEPS], execution=execution):
        result.append(jax.device_get((state.params, state.optimizer, log)))
    return result, evaluate.logits_of(spec, group, state, evaluate.padded(np.asarray(IMAGES)), 300, execution)()


def assert_near(got, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.fixture(scope="module")
def on_one_device():
    """What `trials` of a strategy and a batch size give, each computed once."""
    kept = {}

    def alone(strategy, batch):
        if (strategy, batch) not in kept:
            kept[strategy, batch] = outcome(fits(strategy, batch), train.Execution())
        return kept[strategy, batch]

    return alone


@pytest.mark.slow
@pytest.mark.parametrize("how", DIVIDED)
@pytest.mark.parametrize(
    ("strategy", "batch"),
    [
        ("full", 101),
        *(
            pytest.param(strategy, batch, marks=pytest.mark.slow)
            for strategy in ("full", "head_only", "lp_ft")
            for batch in (100, 101)
            if (strategy, batch) != ("full", 101)
        ),
    ],
)
def test_devices_that_share_batches_give_what_one_gives(how, strategy, batch, on_one_device):
    """50 steps of clipped Adam; 8 devices divide neither 100 nor 101, 4 only the former."""
    assert_near(outcome(fits(strategy, batch), DIVIDED[how]), on_one_device(strategy, batch))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jit data:8", pytest.param("pmap", marks=pytest.mark.slow)])
def test_on_the_features_of_a_frozen_prefix_as_well(how, on_one_device):
    execution = DIVIDED[how]
    cache = train.FeatureCache(10**8)
    kept = train.Execution(execution.devices, execution.devices_per_batch, execution.mode, cache=cache)
    assert_near(outcome(fits("head_only", 101), kept), on_one_device("head_only", 101))
    assert len(cache.arrays) == 2  # of the training and of the test examples


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pmap", pytest.param("jit data:8", marks=pytest.mark.slow)])
def test_batches_smaller_than_the_devices_with_penalties_and_smoothing(how):
    """Five examples on eight devices; R of the parameters counts once, R of the features is a mean over the batch."""
    terms, _ = penalties.read("l2:weight=1,l1:weight=1,behaviour:weight=1")
    spec = train.Spec(MODEL, SPEC.loss, OPTIMIZER, terms, smooth_labels=True)
    group = fits("full", 5, weights=({"weight": 0.1}, {"weight": 0.01}, {"weight": 0.1}), smoothing=0.2)
    assert_near(outcome(group, DIVIDED[how], spec), outcome(group, train.Execution(), spec))


class Drop(nn.Module):
    """Dropout in training."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5)(x, deterministic=not self.has_rng("dropout"))


@pytest.mark.slow
def test_under_jit_dropout_draws_what_it_draws_on_one_device():
    model = (MODEL[0], linen.stage("drop", Drop()), MODEL[1])
    spec = train.Spec(model, SPEC.loss, OPTIMIZER)
    group = fits("full", 101, 1, model)
    assert_near(outcome(group, DIVIDED["jit data:8"], spec), outcome(group, train.Execution(), spec))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jit data:8", "pmap"])
@pytest.mark.counts
def test_each_device_does_its_share_of_the_work(how):
    """FLOPs of one device's program, at a batch that is most of the work."""
    flops = {}
    for name, execution in (("one", train.Execution()), ("many", DIVIDED[how])):
        fit = fits("full", 1000, 1)
        spec = train.specialize(SPEC, fit[0], (fit[0].phases[0][1],))
        mesh, mode = loop.layout(spec, fit, 1, DATA, execution)
        flops[name] = costs(spec, mesh, mode, fit[0])
    assert flops["many"] < flops["one"] / 6


def costs(spec, mesh, mode, fit):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fit.params)
    hyper = vectorize.stack_hyper(spec, [fit], [(fit.phases[0][1],)])
    state = vectorize.begin(spec, params, hyper, jnp.ones(1))
    order, rates = jnp.zeros((1, 9, 1000), jnp.int32), jnp.zeros((1, 9))
    frozen = jax.tree.map(lambda leaf: None, params)
    arrays = (params, state, frozen, hyper, DATA.inputs, DATA.targets, order, rates, (0, 0, 1))
    run = jax.jit(vectorize.run, static_argnums=(0, 1, 2, 3))
    return run.lower(spec, mesh, 1, mode, *arrays).compile().cost_analysis()["flops"]
