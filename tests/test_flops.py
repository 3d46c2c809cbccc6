"""Frozen execution free: FLOPs of the executable that a fit runs, at batch 100, with the gradient's norm logged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, models, objective, optimizers, plugins, train
from tljax.train import features, vectorize
from tljax.train.step import trained_leaves
from tljax.types import Context

pytestmark = pytest.mark.counts

BATCH, EXAMPLES = 100, 200
IMAGES = jnp.zeros((EXAMPLES, 28, 28, 1), jnp.uint8)
LABELS = jnp.zeros(EXAMPLES, jnp.int32)
DATA = train.load(IMAGES, LABELS)


def lowered(strategy, hidden=(512,), cached=False, optimizer="sgd"):
    """The segment as `fit` calls it (XLA counts the body of its loop once: one step), and the optimizer's state."""
    model = models.build("mlp", 10, hidden=hidden, activation="relu")
    params = models.init(model, jax.random.key(0), (28, 28, 1))
    method, options = plugins.method(strategy)
    mask = method.strategy(params, Context(models.names(model)), **options)
    optimizer_spec, numbers = optimizers.spec(optimizer)
    plain = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    order = lambda start, stop: np.zeros((stop - start, BATCH), np.int32)  # noqa: E731
    fit = train.Fit(
        params, ((0, mask),), order, np.ones(9, np.float32), (), {**numbers, "label_smoothing": 0.0}, jax.random.key(0)
    )
    spec = train.specialize(plain, fit, (mask,))
    whole, hyper = vectorize.stack([params]), vectorize.stack_hyper(spec, [fit], [(mask,)])
    state = vectorize.begin(spec, whole, hyper, jnp.ones(1))
    cache = train.FeatureCache(10**9) if cached else None
    short, data = features.skip_frozen_prefix(spec, fit, whole, 1, DATA, 10**9, cache, print)
    assert (data.inputs is not DATA.inputs) == cached
    trained, frozen = masks.split(whole, trained_leaves(spec))
    rows = train.capacity(BATCH)
    order_, rates = jnp.zeros((1, rows, BATCH), jnp.int32), jnp.zeros((1, rows))
    arrays = (trained, state, frozen, hyper, data.inputs, data.targets, order_, rates, (0, 0, 1))
    return vectorize.segment.lower(short, None, 1, "map", *arrays), state


def mflop(*arguments, **options):
    return lowered(*arguments, **options)[0].compile().cost_analysis()["flops"] / 1e6


@pytest.mark.parametrize(
    ("strategy", "cached", "least", "most"),
    [
        ("full", False, 160, 168),
        ("head_only", False, 80, 84),
        ("head_only", True, 1, 2.5),
        ("bias_only", False, 80, 85),
    ],
)
def test_a_step_costs_what_trains(strategy, cached, least, most):
    assert least < mflop(strategy, cached=cached) <= most


FIRST = 2 * BATCH * 784 * 512 / 1e6
"""A product with the first layer's kernel, or its gradient: 80.3 MFLOP."""


@pytest.mark.slow
def test_the_last_two_of_three_stages_leave_the_first_without_a_gradient():
    full, two = (mflop(name, (512, 512)) for name in ("full", "last_k:k=2"))
    cached = mflop("last_k:k=2", (512, 512), cached=True)
    # Without the first kernel's gradient goes the product that carries the error to its outputs.
    second = 2 * BATCH * 512 * 512 / 1e6
    assert full - two == pytest.approx(FIRST + second, rel=0.02)
    assert two - cached == pytest.approx(FIRST, rel=0.02)


def test_adam_under_head_only_holds_two_numbers_for_each_of_the_head_and_counters():
    _, state = lowered("head_only", optimizer="adam")
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert sum(size for size in sizes if size > 1) == 2 * 5130
    assert set(size for size in sizes if size < 10) <= {1}


def test_a_norm_over_frozen_leaves_would_be_seen():
    """What the contract is for: the same step with the gradient of everything, its norm taken, costs twice."""
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    params = models.init(model, jax.random.key(0), (28, 28, 1))

    def step(params, x, y):
        loss = lambda p: objective.loss("softmax_cross_entropy")(models.apply(model, p, x), y).mean()  # noqa: E731
        gradient = jax.grad(loss)(params)
        return params["head"]["kernel"] - gradient["head"]["kernel"], partial(jnp.linalg.norm)(
            gradient["hidden_0"]["kernel"]
        )

    cost = jax.jit(step).lower(params, IMAGES[:BATCH], LABELS[:BATCH]).compile().cost_analysis()
    assert cost["flops"] / 1e6 > 150
