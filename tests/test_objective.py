"""The objective: losses equal their formulas, penalties their closed forms and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import objective
from tljax.types import InputError

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
LABELS = np.array([2, 1])


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"])
def test_cross_entropy_is_minus_the_log_probability_of_the_class(name):
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    expected = -np.log(p[np.arange(2), LABELS])
    np.testing.assert_allclose(objective.loss(name)(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-5)


def test_elementwise_losses_are_summed_over_the_classes():
    got = objective.loss("squared_error")(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(got, ((LOGITS - np.eye(3)[LABELS]) ** 2).sum(1), rtol=1e-6)


@pytest.mark.parametrize("name", objective.INTEGER + objective.ONE_HOT + objective.ELEMENTWISE)
def test_every_loss_gives_a_finite_number_an_example_and_one_object(name):
    loss = objective.loss(name)
    values = loss(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS))
    assert values.shape == (2,) and np.isfinite(values).all()
    assert objective.loss(name) is loss


TRAINED = {"a": np.array([1.0, -2.0]), "b": None, "head": {"bias": np.array([[3.0]])}}
START = {"a": np.array([0.5, -2.5]), "b": np.ones(3), "head": {"bias": np.array([[9.0]])}}
FISHER = {"a": np.array([2.0, 4.0])}
FRESH = {"head/bias": True}

CLOSED = {
    "l2:weight=0.5": (0.25 * (1 + 4 + 9), {"a": [0.5, -1.0], "head/bias": [[1.5]]}),
    "l1:weight=0.5": (0.5 * 6, {"a": [0.5, -0.5], "head/bias": [[0.5]]}),
    "l2_sp:weight=2:beta=0.1": (0.25 + 0.25 + 0.05 * 9, {"a": [1.0, 1.0], "head/bias": [[0.3]]}),
    "ewc:weight=3": (1.5 * (2 * 0.25 + 4 * 0.25), {"a": [3.0, 6.0], "head/bias": [[0.0]]}),
    "l2:weight=1:on=head/**": (0.5 * 9, {"a": [0.0, 0.0], "head/bias": [[3.0]]}),
}


def value_of(text):
    [term], [weights] = objective.penalties(text)
    return lambda trained: objective.of_leaves(term, weights, trained, START, FISHER, FRESH)


@pytest.mark.parametrize("text", CLOSED)
def test_a_penalty_and_its_gradient_equal_the_closed_form_and_finite_differences(text):
    """In float64; R covers trained leaves only, so the frozen 'b' has no part in it."""
    with jax.enable_x64(True):
        value, (expected, slopes) = value_of(text), CLOSED[text]
        np.testing.assert_allclose(value(TRAINED), expected, rtol=1e-12)
        gradient = jax.grad(value)(TRAINED)
        np.testing.assert_allclose(gradient["a"], slopes["a"], rtol=1e-12)
        np.testing.assert_allclose(gradient["head"]["bias"], slopes["head/bias"], rtol=1e-12)
        step = np.array([1e-6, 0.0])
        up, down = ({**TRAINED, "a": TRAINED["a"] + sign * step} for sign in (1, -1))
        np.testing.assert_allclose((value(up) - value(down)) / 2e-6, slopes["a"][0], atol=1e-8)


def test_l2_sp_is_zero_at_the_start_but_for_the_fresh_leaves():
    start = {"a": START["a"], "b": None, "head": {"bias": np.zeros((1, 1))}}
    assert value_of("l2_sp:weight=2")(start) == 0


def test_behaviour_is_half_the_squared_distance_of_features_and_padding_has_no_part():
    now, then = np.array([[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]), np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    mask = jnp.array([1.0, 1.0, 0.0])
    value = lambda now: objective.behaviour([(now, then)], mask, weight=0.5)  # noqa: E731
    np.testing.assert_allclose(value(jnp.asarray(now)), 0.25 * (5 + 9) / 2)
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(now)), 0.5 * (now - then) * [[1], [1], [0]] / 2)


def test_label_smoothing_spreads_a_share_of_the_label():
    log_p = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    wanted = 0.9 * np.eye(3)[LABELS] + 0.1 / 3
    got = objective.loss("softmax_cross_entropy")(jnp.asarray(LOGITS), jnp.asarray(LABELS), 0.1)
    np.testing.assert_allclose(got, -(wanted * log_p).sum(1), rtol=1e-5)
    with pytest.raises(InputError, match="takes whole labels"):
        objective.check_smoothing("softmax_cross_entropy_with_integer_labels", 0.1)
    with pytest.raises(InputError, match=r"--label_smoothing=1\.5"):
        objective.check_smoothing("softmax_cross_entropy", 1.5)


def test_a_weight_of_zero_builds_no_term():
    assert objective.penalties("l2:weight=0") == ((), ())
    assert objective.penalties("") == ((), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l3:weight=1", "unknown penalty 'l3:weight=1'; nearest: 'l2'"),
        ("l2", "needs option 'weight'"),
        ("l2:weight=-1", "must be finite and at least 0"),
        ("l2:weight=nan", "is float, not 'nan'|must be finite"),
        ("l2:wieght=1", "has no option 'wieght'; nearest: 'weight'"),
    ],
)
def test_penalties_that_cannot_be_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        objective.penalties(text)


def test_unknown_losses_are_refused():
    with pytest.raises(InputError, match="unknown loss 'softmax_cross_entrpy'; nearest: 'softmax_cross_entropy'"):
        objective.loss("softmax_cross_entrpy")
