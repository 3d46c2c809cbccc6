"""Rates: what the audit says of a leaf is how far it moves beside another one, in numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import audit, optimizer

RATES = {"body": 0.5, "head": True, "stem": 0.25}
NUMBERS = {name: float(rate) for name, rate in RATES.items()}
NAMES = {name: name for name in RATES}
COSINE = optax.cosine_decay_schedule(0.1, 50)


def scaled(rates=None):
    rates = rates or NUMBERS
    return optax.stateless(lambda updates, _: {name: leaf * rates[name] for name, leaf in updates.items()})


def groups(make, rates=None):
    return optax.multi_transform({name: make(rate) for name, rate in (rates or NUMBERS).items()}, NAMES)


OPTIMIZERS = {
    "after Adam": (optax.chain(optax.adam(0.1), scaled()), "proved"),
    "after AdamW and a clip": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1), scaled()), "proved"),
    "masked": (optimizer.masked(optax.lion(0.1), RATES), "proved"),
    "groups": (groups(lambda rate: optax.adam(0.1 * rate)), "proved"),
    "groups with a schedule": (groups(lambda rate: optax.adamw(lambda step: rate * COSINE(step))), "proved"),
    "groups with numbers in their state": (groups(lambda rate: optax.inject_hyperparams(optax.sgd)(rate)), "proved"),
    "micro-batches": (optax.MultiSteps(optax.chain(optax.adam(0.1), scaled()), 2).gradient_transformation(), "proved"),
    "none": (optax.adam(0.1), "refuted"),
    "before Adam": (optax.chain(scaled(), optax.adam(0.1)), "refuted"),
    "groups of other rates": (groups(optax.sgd, {"body": 0.25, "head": 1.0, "stem": 0.125}), "refuted"),
    "the same number in the state": (groups(lambda rate: optax.inject_hyperparams(optax.sgd)(0.1)), "refuted"),
    "before momentum": (optax.chain(scaled(), optax.sgd(0.1, momentum=0.9)), "not decided"),
}


def ratios(tx):
    """How far each leaf moves in four steps, relative to the head, from one value by one gradient."""
    rng = np.random.default_rng(0)
    value, *gradients = (jnp.asarray(row, jnp.float32) for row in rng.standard_normal((5, 3)))
    params = dict.fromkeys(RATES, value)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(dict.fromkeys(RATES, gradient), state, dict.fromkeys(RATES, value))
        params = optax.apply_updates(params, updates)
    return {name: np.asarray((leaf - value) / (params["head"] - value)) for name, leaf in params.items()}


QUICK = (
    "after Adam",
    "masked",
    "groups with numbers in their state",
    "none",
    "groups of other rates",
    "before momentum",
)
"""Optimizers that compile in no time."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_a_rate_is_proved_where_numbers_have_it_and_refuted_where_they_do_not(name):
    tx, verdict = OPTIMIZERS[name]
    shapes = {name: jax.ShapeDtypeStruct((3,), "float32") for name in RATES}
    by_path = {finding.path: finding for finding in audit.optimizer(tx, shapes, RATES).select("rate")}
    assert by_path["head"].verdict == "proved"
    assert {by_path[name].verdict for name in ("body", "stem")} == {verdict}
    for name, ratio in ratios(tx).items():
        assert np.allclose(ratio, NUMBERS[name], rtol=1e-3) == (by_path[name].verdict != "refuted")


def test_the_number_by_which_a_leaf_moves_is_said():
    shapes = {name: jax.ShapeDtypeStruct((3,), "float32") for name in RATES}
    tx, _ = OPTIMIZERS["groups of other rates"]
    (finding,) = [each for each in audit.optimizer(tx, shapes, RATES).select("rate") if each.path == "stem"]
    assert finding.detail == (
        "moves 0.125 times as far as 'head' under equal gradients, values and states; the mask gives it 0.25"
    )


def loss(params, x):
    return jnp.square(jnp.tanh(jnp.tanh(x @ params["stem"]) @ params["body"]) @ params["head"]).mean()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_of_a_step_the_gradients_that_it_computes_are_what_is_equal(factor):
    """A step whose three leaves have other shapes, and whose multiplier for the stem is right or not."""
    params = {name: jnp.ones(shape) for name, shape in {"stem": (4, 3), "body": (3, 2), "head": (2, 2)}.items()}
    tx = optax.chain(optax.adam(0.1), scaled(NUMBERS | {"stem": 0.25 * factor}))

    @jax.jit
    def step(state, x):
        params, state = state
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    report = audit.step(step, (params, tx.init(params)), jnp.ones((5, 4)), RATES)
    verdicts = {finding.path: finding.verdict for finding in report.select("rate")}
    assert verdicts == {"body": "proved", "head": "proved", "stem": "proved" if factor == 1 else "refuted"}


def test_a_mask_without_numbers_asks_for_no_rate():
    shapes = {name: jax.ShapeDtypeStruct((3,), "float32") for name in RATES}
    assert not audit.optimizer(optax.adam(0.1), shapes, dict.fromkeys(RATES, True)).select("rate")
