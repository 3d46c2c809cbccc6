"""Verdicts on real fits whose truth is known: the same strategy twice, under seeds and orders of its own each time."""

import jax
import numpy as np
import pytest
from scipy import stats

from tljax import data, evaluate, masks, models, objective, optimizers, train
from tljax.data import draw
from tljax.study import statistics

GROUPS, FITS, LABELS, STEPS = 160, 5, 50, 60


@pytest.fixture(scope="module")
def right():
    """Which test images fits on 50 labels get right: bool [2 x GROUPS x FITS, 1000], no two of one seed."""
    task = data.load("fashion_mnist_10k")
    model = models.build("mlp", 10, hidden=(8,), activation="relu")
    optimizer_spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    labels = np.asarray(task.train.targets)

    def fit(seed):
        subset = draw.label_budget(seed, labels, LABELS)
        order = lambda first, last: draw.order(seed, LABELS, 10, first, last, epochs=False, subset=subset)  # noqa: E731
        params = models.init(model, jax.random.key(seed), (28, 28, 1))
        everything = masks.by_path(params, lambda path: True)
        rates = {**numbers, "label_smoothing": 0.0}
        return train.Fit(
            params, ((0, everything),), order, np.full(STEPS, 0.1, np.float32), (), rates, jax.random.key(0)
        )

    fits = [fit(seed) for seed in range(2 * GROUPS * FITS)]
    test, count = evaluate.padded(task.test.arrays[:1000]), 1000
    for state, _ in train.fit(spec, fits, train.load(task.train.arrays, labels), [STEPS]):
        logits = evaluate.logits_of(spec, fits, state, test, count)()
    return logits.argmax(-1) == task.test.targets[:count]


@pytest.mark.slow
def test_at_most_6_percent_of_comparisons_of_a_strategy_with_itself_are_decided(right):
    """160 of 5 pairs each, nominal 5 %; and what is planted is found as often as the power's range says."""
    differences = right[::2].astype(float) - right[1::2]
    grouped = differences.reshape(GROUPS, FITS, -1)
    verdicts_alone = [statistics.verdicts([scores], 0.05)[0] for scores in grouped]
    false = sum(each.word in ("positive", "negative") for each in verdicts_alone)
    assert false <= stats.binom.ppf(0.99, GROUPS, 0.05), f"{false} of {GROUPS}"
    covered = np.mean([each.interval.low <= differences.mean() <= each.interval.high for each in verdicts_alone])
    assert covered >= stats.binom.ppf(0.01, GROUPS, 0.95) / GROUPS
    print(f"false verdicts {false} of {GROUPS}, covered {covered:.3f}")

    # A planted effect of the margin: each fit is as much better.
    for effect in (0.1, 0.2):
        planted = [statistics.verdicts([scores + effect], effect)[0] for scores in grouped]
        share = np.mean([verdict.word in ("positive", "negative") for verdict in planted])
        ranges = np.array([verdict.power for verdict in planted])
        held = np.mean((ranges[:, 0] <= share) & (share <= ranges[:, 1]))
        print(f"{effect} is found in {share:.3f}, median range {np.median(ranges, 0).round(3)}, held in {held:.3f}")
        assert held >= stats.binom.ppf(0.01, GROUPS, 0.9) / GROUPS
