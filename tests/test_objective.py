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


def test_l2_is_half_the_squares_of_the_trained_leaves_and_its_gradient_the_weights():
    trained = {"a": jnp.array([1.0, -2.0]), "b": None, "c": jnp.array([[3.0]])}
    terms, weights = objective.penalties("l2:weight=0.5")
    value = lambda trained: objective.regularizer(terms, weights, trained)  # noqa: E731
    np.testing.assert_allclose(value(trained), 0.5 * 0.5 * 14.0)
    gradient = jax.grad(value)(trained)
    np.testing.assert_allclose(gradient["a"], 0.5 * trained["a"])
    step = 1e-3
    slope = (value({**trained, "c": trained["c"] + step}) - value({**trained, "c": trained["c"] - step})) / (2 * step)
    np.testing.assert_allclose(gradient["c"][0, 0], slope, rtol=1e-3)


def test_a_term_covers_its_own_leaves_and_terms_add():
    terms, weights = objective.penalties("l2:weight=1:on=head/**,l2:weight=10:on=**/bias")
    trained = {"head": {"bias": jnp.array([2.0]), "kernel": jnp.array([4.0])}, "hidden": {"bias": jnp.array([1.0])}}
    np.testing.assert_allclose(objective.regularizer(terms, weights, trained), 0.5 * (4 + 16) + 10 * 0.5 * (4 + 1))


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
