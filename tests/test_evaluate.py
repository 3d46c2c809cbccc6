"""Metrics of one fit, held against numbers worked out by hand and scipy."""

from functools import partial

import jax
import numpy as np
from scipy.special import log_softmax

from tljax import evaluate, models

LOGITS = np.array([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 0.5]])
LABELS = np.array([0, 1, 2, 1])


def test_accuracy_loss_and_confusion():
    got = evaluate.metrics(LOGITS, LABELS)
    assert got["accuracy"] == 0.75
    np.testing.assert_allclose(got["loss"], -log_softmax(LOGITS, axis=1)[np.arange(4), LABELS].mean(), rtol=1e-12)
    assert got["confusion"] == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]
    assert got["per_class_accuracy"] == [1.0, 1.0, 0.0]


def test_a_class_without_examples_has_no_accuracy():
    assert evaluate.metrics(LOGITS, np.array([0, 1, 1, 1]))["per_class_accuracy"][2] is None


def test_calibration_error_equals_the_sum_over_bins():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1.0, 1.0, 1.0], 500)
    labels = rng.integers(0, 3, 500)
    confidence, right = p.max(1), p.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        here = (confidence >= low) & (confidence < low + 1 / 15)
        if here.any():
            expected += here.mean() * abs(right[here].mean() - confidence[here].mean())
    np.testing.assert_allclose(evaluate.calibration_error(p, labels), expected, rtol=1e-9)


def test_the_bins_of_calibration_are_means_over_the_examples_in_them():
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1.0, 1.0, 1.0], 400)
    labels = rng.integers(0, 3, 400)
    confidence, right = p.max(1), p.argmax(1) == labels
    bins = evaluate.calibration(p, labels)
    assert sum(bins["count"]) == 400 and bins["confidence"][0] is None and bins["accuracy"][0] is None
    for k, low in enumerate(np.arange(15) / 15):
        here = (confidence >= low) & (confidence < low + 1 / 15)
        assert bins["count"][k] == here.sum()
        if here.any():
            np.testing.assert_allclose(bins["confidence"][k], confidence[here].mean(), rtol=1e-12)
            np.testing.assert_allclose(bins["accuracy"][k], right[here].mean(), rtol=1e-12)
    gaps = [n * abs(a - c) for n, a, c in zip(bins["count"], bins["accuracy"], bins["confidence"], strict=True) if n]
    np.testing.assert_allclose(sum(gaps) / 400, evaluate.calibration_error(p, labels), rtol=1e-12)


def test_logits_that_are_not_finite_have_no_metrics():
    assert set(evaluate.metrics(np.array([[np.nan, 0.0]]), np.array([0])).values()) == {None}


def test_padded_batches_give_the_logits_of_one_batch(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 7)
    model = models.build("mlp", 3, hidden=(5,), activation="tanh")
    images = np.random.default_rng(0).integers(0, 255, (20, 2, 2, 1)).astype(np.uint8)
    trials = [models.init(model, jax.random.key(i), (2, 2, 1)) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trials)
    got = evaluate.logits(partial(models.apply, model), stacked, evaluate.padded(images), 20)()
    for i, params in enumerate(trials):
        np.testing.assert_allclose(got[i], models.apply(model, params, jax.numpy.asarray(images)), rtol=1e-5, atol=1e-6)
