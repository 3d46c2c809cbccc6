"""The objective: losses equal their formulas."""

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


def test_label_smoothing_spreads_a_share_of_the_label():
    log_p = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    wanted = 0.9 * np.eye(3)[LABELS] + 0.1 / 3
    got = objective.loss("softmax_cross_entropy")(jnp.asarray(LOGITS), jnp.asarray(LABELS), 0.1)
    np.testing.assert_allclose(got, -(wanted * log_p).sum(1), rtol=1e-5)
    with pytest.raises(InputError, match="takes whole labels"):
        objective.check_smoothing("softmax_cross_entropy_with_integer_labels", 0.1)
    with pytest.raises(InputError, match=r"label_smoothing=1\.5: it must be"):
        objective.check_smoothing("softmax_cross_entropy", 1.5)


def test_unknown_losses_are_refused():
    with pytest.raises(InputError, match="unknown loss 'softmax_cross_entrpy'; nearest: 'softmax_cross_entropy'"):
        objective.loss("softmax_cross_entrpy")
