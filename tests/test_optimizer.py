"""Optimizers: frozen leaves keep their bytes and own no state, whatever the optimizer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import masks, named_optimizer, optimizer, paths
from tljax.types import InputError

PARAMS = {
    "a": np.array([[1.0, -2.0]], np.float32),
    "b": np.array([-0.0, 3.0, np.nan], np.float32),
    "steps": np.int32(7),
}
MASK = {"a": True, "b": False, "steps": True}
GRADIENTS = {"a": np.array([[0.5, 0.25]], np.float32), "b": np.full(3, 1e6, np.float32), "steps": np.int32(0)}
NAMES = ("sgd", "adam", "adamw", "lion", "rmsprop", "adagrad", "adafactor")


def steps(tx, params, gradients, count=3):
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(("name", "clip"), [*itertools.product(NAMES, (0.0, 1.0))])
def test_frozen_leaves_keep_their_bytes_under_decay_and_clipping(name, clip):
    spec, numbers = named_optimizer.spec(name, weight_decay=1.0, clip=clip)
    tx = optimizer.masked(named_optimizer.build(spec, 0.1, numbers), MASK)
    after, state = steps(tx, PARAMS, GRADIENTS)
    for leaf in ("b", "steps"):
        assert np.asarray(after[leaf]).tobytes() == PARAMS[leaf].tobytes()
    assert not np.array_equal(after["a"], PARAMS["a"])
    assert all("b" not in path.split("/") and "steps" not in path.split("/") for path in paths.names(state))


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_part_moves_as_if_the_frozen_one_did_not_exist(name):
    spec, numbers = named_optimizer.spec(name, weight_decay=0.1, clip=0.01)
    tx = named_optimizer.build(spec, 0.1, numbers)
    alone, _ = steps(tx, {"a": PARAMS["a"]}, {"a": GRADIENTS["a"]})
    beside, _ = steps(optimizer.masked(tx, MASK), PARAMS, GRADIENTS)
    np.testing.assert_array_equal(alone["a"], beside["a"])


def test_a_number_scales_the_update():
    tx = optimizer.masked(optax.sgd(1.0), {"a": 0.25, "b": True, "steps": False})
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["a"], -0.25 * GRADIENTS["a"])


def test_an_array_selects_elements_even_past_nan_gradients():
    params, gradient = {"w": np.array([-0.0, 2.0], np.float32)}, {"w": np.array([np.nan, 1.0], np.float32)}
    tx = optimizer.masked(optax.adamw(0.1, weight_decay=1.0), {"w": np.array([False, True])})
    after, state = steps(tx, params, gradient)
    assert np.asarray(after["w"])[:1].tobytes() == params["w"][:1].tobytes()
    assert np.isfinite(after["w"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones(2, bool), "does not broadcast"),
        (np.ones((2, 1, 3), bool), "does not broadcast"),
        (-0.5, "number at 'w' is -0.5"),
        (float("inf"), "number at 'w' is inf"),
        ("yes", "leaf at 'w' is 'yes'"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(leaf, message):
    with pytest.raises(InputError, match=message):
        optimizer.masked(optax.sgd(1.0), {"w": leaf, "b": True}).init({"w": jnp.ones((1, 3)), "b": jnp.ones(2)})


def test_gradients_with_holes_give_the_same_updates_with_holes():
    tx = optimizer.masked(optax.adam(0.1), MASK)
    state = tx.init(PARAMS)
    whole, _ = tx.update(GRADIENTS, state, PARAMS)
    holed, _ = tx.update(masks.split(GRADIENTS, MASK)[0], state, masks.split(PARAMS, MASK)[0])
    np.testing.assert_array_equal(whole["a"], holed["a"])
    assert holed["b"] is None


def test_adam_under_head_only_holds_two_moments_of_the_head_and_a_counter():
    params = {"hidden_0": {"kernel": np.ones((784, 512))}, "head": {"kernel": np.ones((512, 10)), "bias": np.ones(10)}}
    state = optimizer.masked(optax.adam(0.1), masks.under(params, "head")).init(params)
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(state)]
    assert sum(size for size in sizes if size > 1) == 2 * 5130
    assert sizes.count(1) <= 1


def test_decay_of_sgd_is_the_gradient_of_the_l2_penalty():
    spec, numbers = named_optimizer.spec("sgd", weight_decay=0.5)
    tx = named_optimizer.build(spec, 0.1, numbers)
    params = {"w": jnp.array([2.0])}
    updates, _ = tx.update({"w": jnp.array([1.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * (1.0 + 0.5 * 2.0)], rtol=1e-6)


def test_decay_of_adamw_is_off_unless_asked_for():
    params, gradient = {"w": np.array([5.0], np.float32)}, {"w": np.array([0.0], np.float32)}
    spec, numbers = named_optimizer.spec("adamw")
    after, _ = steps(named_optimizer.build(spec, 0.1, numbers), params, gradient)
    np.testing.assert_array_equal(after["w"], params["w"])


def test_momentum_equals_the_recursion():
    spec, numbers = named_optimizer.spec("sgd", momentum=0.9)
    after, _ = steps(named_optimizer.build(spec, 0.1, numbers), {"w": np.array([0.0])}, {"w": np.array([1.0])}, count=3)
    velocity, w = 0.0, 0.0
    for _ in range(3):
        velocity = 0.9 * velocity + 1.0
        w -= 0.1 * velocity
    np.testing.assert_allclose(after["w"], [w], rtol=1e-6)


def test_every_offered_optimizer_takes_a_step():
    for name in named_optimizer.names():
        spec, numbers = named_optimizer.spec(name)
        tx = optimizer.masked(named_optimizer.build(spec, 0.1, numbers), {"a": True, "b": False})
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
        updates, _ = tx.update(
            {"a": jnp.ones((2, 2)), "b": None}, tx.init(params), masks.split(params, {"a": True, "b": False})[0]
        )
        assert np.isfinite(updates["a"]).all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adm"}, "unknown optimizer 'adm'; nearest: 'adam'"),
        ({"name": "adam:b3=1"}, "has no option 'b3'"),
        ({"name": "adam", "momentum": 0.9}, "takes none"),
        ({"name": "sgd:momentum=0.9", "momentum": 0.9}, "both set the momentum"),
        ({"name": "sgd", "clip": -1.0}, "--clip=-1.0"),
        ({"name": "sgd", "weight_decay": float("inf")}, "--weight_decay=inf"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        named_optimizer.spec(**arguments)


def test_schedules_equal_their_formulas():
    t = np.arange(90)
    cosine = named_optimizer.rates("cosine", 0.5, 0.1, 100)
    np.testing.assert_allclose(cosine[:10], 0.5 * np.arange(10) / 10, atol=1e-6)
    np.testing.assert_allclose(cosine[10:], 0.25 * (1 + np.cos(np.pi * t / 90)), atol=1e-6)
    np.testing.assert_allclose(named_optimizer.rates("linear", 2.0, 0.0, 90), 2 * (1 - t / 90), atol=1e-6)
    assert (named_optimizer.rates("constant", 0.25, 0.0, 5) == 0.25).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosin", 0.1, 0.0, 9), "unknown schedule 'cosin'; nearest: 'cosine'"),
        (("constant", -0.1, 0.0, 9), "--learning_rate=-0.1"),
        (("constant", float("nan"), 0.0, 9), "--learning_rate=nan"),
        (("constant", 0.1, 1.0, 9), "--warmup=1.0"),
    ],
)
def test_schedules_refuse_what_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        named_optimizer.rates(*arguments)
