"""The objective: losses equal their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from tljax import masks, models, objective, optimizers, train
from tljax.train import gradients, vectorize
from tljax.types import InputError, Stage

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


RNG = np.random.default_rng(1)


def test_the_loss_of_several_labels_is_minus_the_log_likelihood_of_all():
    outputs, labels = RNG.normal(size=(4, 3)), RNG.random((4, 3)) < 0.5
    log_p = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    expected = -np.where(labels, log_p(outputs), log_p(-outputs)).sum(1)
    got = objective.loss("sigmoid_binary_cross_entropy", "labels")(jnp.asarray(outputs), jnp.asarray(labels))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    smooth = 0.8 * labels + 0.1
    expected = -(smooth * log_p(outputs) + (1 - smooth) * log_p(-outputs)).sum(1)
    got = objective.loss("sigmoid_binary_cross_entropy", "labels")(jnp.asarray(outputs), jnp.asarray(labels), 0.2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_loss_of_values_is_a_sum_of_squares():
    outputs, values = RNG.normal(size=(2, 4, 3))
    got = objective.loss("squared_error", "values")(jnp.asarray(outputs), jnp.asarray(values))
    np.testing.assert_allclose(got, ((outputs - values) ** 2).sum(1), rtol=1e-5)
    with pytest.raises(InputError, match="it is for classes, labels and tokens"):
        objective.check_smoothing("squared_error", 0.1, "values")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"])
def test_a_sequence_weighs_the_same_however_many_tokens_it_has(name):
    outputs, tokens = RNG.normal(size=(3, 5, 4)), RNG.integers(0, 4, (3, 5))
    tokens[1, 1:], tokens[2] = -1, -1
    got = objective.loss(name, "tokens")(jnp.asarray(outputs), jnp.asarray(tokens))
    p = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    expected = [log_loss(tokens[i][tokens[i] >= 0], p[i][tokens[i] >= 0], labels=range(4)) for i in (0, 1)]
    np.testing.assert_allclose(got, [*expected, 0], rtol=1e-5)
    assert objective.loss(name, "tokens") is objective.loss(name, "tokens")


def test_every_loss_of_a_kind_gives_a_number_an_example():
    for kind in ("labels", "values", "tokens"):
        outputs, targets = objective.example(kind, 3, 2, 4)
        for name in objective._LOSSES[kind]:
            assert jax.eval_shape(objective.loss(name, kind), outputs, targets).shape == (2,), (kind, name)


def test_a_loss_of_other_targets_is_refused():
    with pytest.raises(InputError, match="loss 'softmax_cross_entropy' is none of labels"):
        objective.loss("softmax_cross_entropy", "labels")


def test_balanced_classes_are_a_weighted_objective_and_weights_compile_nothing_new():
    """One step of SGD against the gradient of 1/n sum w L in NumPy; two fits of other weights, one program."""
    x, classes = RNG.normal(size=(8, 3)).astype(np.float32), np.array([0, 0, 0, 0, 0, 1, 1, 2])
    model = models.build("mlp", 3, hidden=(), activation="relu")
    params = models.init(model, jax.random.key(0), (3,))
    spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), spec, weighs_classes=True)
    kernel = np.asarray(params["head"]["kernel"], float)
    ends = []
    for chosen in (np.arange(8), np.array([0, 1, 5, 7])):
        weights = objective.class_weights(classes[chosen], 3)
        order = lambda start, stop, chosen=chosen: np.resize(chosen, (1, 8)).astype(np.int32)  # noqa: E731
        phases = ((0, masks.by_path(params, lambda path: True)),)
        fit = train.Fit(
            params, phases, order, np.ones(1, np.float32), (), {**numbers, "label_smoothing": 0.0}, jax.random.key(0),
            class_weights=weights,
        )  # fmt: skip
        before = vectorize.segment._cache_size()
        [(state, _)] = train.fit(spec, [fit], train.load(x, classes), [1])
        ends.append(vectorize.segment._cache_size() - before)
        rows = np.resize(chosen, 8)
        logits = x[rows] @ kernel
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        w = (len(chosen) / (3 * np.bincount(classes[chosen])))[classes[rows]]
        gradient = x[rows].T @ ((p - np.eye(3)[classes[rows]]) * w[:, None]) / 8
        np.testing.assert_allclose(state.params["head"]["kernel"][0], kernel - gradient, rtol=1e-4, atol=1e-6)
    assert ends == [1, 0]


def test_gradients_and_fisher_information_are_of_the_loss_of_tokens():
    """A model that is a table of logits by token: gradients are (p - y) / tokens of the sequence, in closed form."""
    table = RNG.normal(size=(4, 4)).astype(np.float32)

    def apply(params, x, *, key=None):
        return params["table"][x]

    model = (models.full_form(Stage("head", lambda key, x: {"table": jnp.asarray(table)}, apply)),)
    inputs, tokens = RNG.integers(0, 4, (2, 6, 5)).astype(np.int32)
    tokens[:, 4], tokens[0, 2:] = -1, -1
    p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    each = np.zeros((6, 4, 4))
    for i, at in np.argwhere(tokens >= 0):
        each[i, inputs[i, at]] += (p[inputs[i, at]] - np.eye(4)[tokens[i, at]]) / (tokens[i] >= 0).sum()
    data, chosen = train.load(inputs, tokens), np.array([0, 1, 3, 5])
    examples = (model, objective.loss("softmax_cross_entropy", "tokens"), data, chosen)
    params = {"head": {"table": jnp.asarray(table)}}
    got = [
        gradient(*examples)(params)["head"]["table"]
        for gradient in (gradients.mean_gradient, gradients.mean_squared_gradient)
    ]
    np.testing.assert_allclose(got[0], each[chosen].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], (each[chosen] ** 2).mean(0), rtol=1e-4, atol=1e-6)
