"""Probes: held against brute force and scikit-learn."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from threadpoolctl import threadpool_limits

from tljax.data import load
from tljax.study import probes
from tljax.types import InputError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small problems on two busy cores take ten times as long with two threads."""
    with threadpool_limits(1):
        yield


PENALTIES = [1e-6, 1e-2, 1.0, 30.0, 1e4]


def case(seed: int, n: int = 40, d: int = 6, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    return rng.normal(size=(classes, d))[labels] + 2 * rng.normal(size=(n, d)) + 5, labels


def digits(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    task = load("mnist_10k")
    weights = np.random.default_rng(0).normal(size=(784, 100)) / 28
    x = np.maximum(task.train.images[: n + 500].reshape(-1, 784) / 255 @ weights, 0)
    y = np.asarray(task.train.labels[: n + 500])
    return x[:n], y[:n], x[n:], y[n:]


def solved(x: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """Weights and, last, bias of ridge regression: normal equations with a column of ones that is not penalised."""
    ones = np.column_stack([x, np.ones(len(x))])
    return np.linalg.solve(ones.T @ ones + penalty * np.diag([1.0] * x.shape[1] + [0.0]), ones.T @ targets)


CASES = {
    "more examples": case(0),
    "two classes": case(1, classes=2),
    "as many dimensions as examples": case(2, n=12, d=12),
    "one more example than dimensions": case(3, n=13, d=12),
    "more dimensions": case(4, n=12, d=30),
    "a feature twice, and one constant": (np.column_stack([case(5)[0], case(5)[0][:, 0], np.ones(40)]), case(5)[1]),
    "one example of a class": (case(6)[0], np.r_[2, case(6, classes=2)[1][1:]]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_leave_one_out_error_is_that_of_refits(name: str) -> None:
    x, y = CASES[name]
    targets = 2 * np.eye(y.max() + 1)[y] - 1
    expected = []
    for penalty in PENALTIES[1:]:
        errors = []
        for i in range(len(x)):
            kept = np.arange(len(x)) != i
            errors.append((np.r_[x[i], 1] @ solved(x[kept], targets[kept], penalty) - targets[i]) ** 2)
        expected.append(np.mean(errors))
    np.testing.assert_allclose(probes.leave_one_out(x, y, PENALTIES[1:]), expected, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_ridge_takes_the_penalty_of_least_leave_one_out_error_and_solves_for_it(name: str) -> None:
    x, y = CASES[name]
    probe = probes.ridge(x, y, PENALTIES)
    assert probe.penalty == PENALTIES[int(np.argmin(probes.leave_one_out(x, y, PENALTIES)))]
    targets = 2 * np.eye(y.max() + 1)[y] - 1
    for penalty in PENALTIES[1:]:
        probe = probes.ridge(x, y, [penalty])
        expected = Ridge(penalty, solver="cholesky").fit(x, targets).predict(x + 1)
        np.testing.assert_allclose(probe.logits(x + 1), expected, atol=1e-7)
        assert probe.weights.dtype == probe.bias.dtype == np.float64


def test_left_out_errors_of_almost_no_penalty_keep_their_digits() -> None:
    """More dimensions than examples: 1 - h is about the penalty, 1e-12, and its limit is the inverse Gram matrix."""
    x, y = CASES["more dimensions"]
    targets = 2 * np.eye(3)[y] - 1
    errors = []
    for i in range(len(x)):
        kept = np.arange(len(x)) != i
        middle, mean = x[kept].mean(axis=0), targets[kept].mean(axis=0)
        interpolated = np.linalg.pinv(x[kept] - middle) @ (targets[kept] - mean)
        errors.append(((x[i] - middle) @ interpolated + mean - targets[i]) ** 2)
    np.testing.assert_allclose(probes.leave_one_out(x, y, [1e-12]), [np.mean(errors)], rtol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_is_predicted_as_by_a_refit_without_it(name: str, grouped: bool) -> None:
    x, y = CASES[name]
    groups = np.arange(len(x)) // 3 if grouped else np.arange(len(x))
    targets = 2 * np.eye(y.max() + 1)[y] - 1
    for penalty in (1e-2, 30.0):
        expected = []
        for i in range(len(x)):
            kept = groups != groups[i]
            fitted = np.r_[x[i], 1] @ solved(x[kept], targets[kept], penalty)
            expected.append(fitted - targets[kept].mean(axis=0) + targets.mean(axis=0))
        np.testing.assert_allclose(probes.left_out(x, y, [penalty], groups), expected, atol=1e-7)


def test_what_is_left_out_is_predicted_under_the_penalty_of_least_error() -> None:
    for x, y in CASES.values():
        best = PENALTIES[int(np.argmin(probes.leave_one_out(x, y, PENALTIES)))]
        np.testing.assert_allclose(probes.left_out(x, y, PENALTIES), probes.left_out(x, y, [best]), rtol=1e-12)


def test_copies_are_left_out_together() -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 30)), np.arange(40) % 4
    twice = np.vstack([x, x]), np.r_[y, y]
    # Ridge on each example twice is ridge under half the penalty.
    np.testing.assert_allclose(probes.left_out(*twice, [2.0])[:40], probes.left_out(x, y, [1.0]), atol=1e-9)
    right = [(probes.left_out(*twice, groups=g).argmax(1) == twice[1]).mean() for g in (None, np.arange(80))]
    assert right[0] < 0.5 < right[1]


def test_features_that_say_nothing_are_right_as_often_as_by_chance_when_left_out() -> None:
    """Not never, as where an example left out makes its own class the rarer."""
    for n, classes in ((20, 2), (30, 3), (100, 10)):
        y = np.arange(n) % classes
        assert (probes.left_out(np.ones((n, 2)), y).argmax(axis=1) == y).mean() == pytest.approx(1 / classes)
    noise = np.random.default_rng(0).normal(size=(20, 200, 20))
    y = np.arange(200) % 10
    right = np.mean([(probes.left_out(x, y, [1e6]).argmax(axis=1) == y).mean() for x in noise])
    assert abs(right - 0.1) < 0.03


def test_the_penalty_does_not_depend_on_what_rounding_adds_to_collinear_features() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 5)) @ rng.normal(size=(5, 60)), np.arange(100) % 3
    exact, rounded = probes.ridge(x, y), probes.ridge(x.astype(np.float32), y)
    assert rounded.penalty == pytest.approx(exact.penalty, rel=1e-4)
    np.testing.assert_allclose(rounded.logits(x), exact.logits(x), atol=1e-3)


def test_default_penalties_do_not_depend_on_the_unit_of_the_features() -> None:
    x, y = case(0)
    for scale in (1e-6, 1e5):
        np.testing.assert_allclose(
            probes.ridge(scale * x, y).logits(scale * x), probes.ridge(x, y).logits(x), rtol=1e-6
        )


def test_of_features_that_say_nothing_ridge_takes_the_largest_penalty() -> None:
    x, y = np.zeros((6, 2)), np.array([0, 0, 0, 0, 1, 1])
    probe = probes.ridge(x, y, PENALTIES)
    assert probe.penalty == 1e4
    np.testing.assert_allclose(probe.logits(x[:1]), [[1 / 3, -1 / 3]])


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", ["more examples", "more dimensions", "a feature twice, and one constant"])
def test_logistic_is_scikit_learns(name: str, l2: float) -> None:
    x, y = CASES[name]
    reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=20_000).fit(x - x.mean(axis=0), y)
    probe = probes.logistic(x, y, l2)
    expected = reference.predict_proba(x - x.mean(axis=0) + 0.5)
    np.testing.assert_allclose(softmax(probe.logits(x + 0.5), axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(probe.weights.sum(axis=1), 0, atol=1e-6)


def test_logistic_of_two_classes_has_half_the_penalty_of_scikit_learns() -> None:
    x, y = CASES["two classes"]
    reference = LogisticRegression(C=2 / (len(x) * 0.1), tol=1e-10, max_iter=20_000).fit(x, y)
    got = softmax(probes.logistic(x, y, 0.1).logits(x), axis=1)
    np.testing.assert_allclose(got, reference.predict_proba(x), atol=1e-6)


def test_logistic_meets_separable_classes_and_features_of_any_unit() -> None:
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    probe = probes.logistic(x, [0, 0, 1, 1], 1e-9)
    assert probe.logits(x).argmax(axis=1).tolist() == [0, 0, 1, 1] and np.isfinite(probe.weights).all()
    x, y = case(0)
    expected = probes.logistic(x, y, 1e-2).logits(x)
    for unit in (1e-40, 1e-6, 1e3, 1e40):
        np.testing.assert_allclose(probes.logistic(unit * x, y, unit**2 * 1e-2).logits(unit * x), expected, atol=1e-5)
    # A penalty beyond all features leaves the bias alone: the classes' frequencies.
    constant = softmax(probes.logistic(1e-9 * x, y).logits(1e-9 * x), axis=1)
    np.testing.assert_allclose(constant, np.tile(np.bincount(y) / len(y), (len(y), 1)), atol=1e-5)


def test_ridge_of_digits_is_scikit_learns() -> None:
    x, y, others, truth = digits(1500)
    reference = RidgeClassifierCV(PENALTIES).fit(x, y)
    probe = probes.ridge(x, y, PENALTIES)
    assert probe.penalty == reference.alpha_
    np.testing.assert_allclose(probe.logits(others), reference.decision_function(others), atol=1e-8)
    assert (probes.ridge(x, y).logits(others).argmax(axis=1) == truth).mean() > 0.75


def test_logistic_of_random_features_reads_digits() -> None:
    x, y, others, truth = digits(1500)
    assert (probes.logistic(x, y, 1e-2).logits(others).argmax(axis=1) == truth).mean() > 0.75


def test_nearest_neighbours_and_nearest_mean_are_scikit_learns() -> None:
    x, y, others, _ = digits(1500)
    binary = y % 2  # an odd vote of two classes has no tie
    for k in (1, 5):
        expected = KNeighborsClassifier(k, algorithm="brute").fit(x, binary).predict(others)
        np.testing.assert_array_equal(probes.nearest_neighbours(x, binary, others, k), expected)
        expected = KNeighborsClassifier(k, algorithm="brute", metric="cosine").fit(x, binary).predict(others)
        np.testing.assert_array_equal(probes.nearest_neighbours(x, binary, others, k, cosine=True), expected)
    np.testing.assert_array_equal(probes.nearest_mean(x, y, others), NearestCentroid().fit(x, y).predict(others))


def test_a_tie_of_votes_goes_to_the_nearest_of_the_tied() -> None:
    x, y = [[0.0], [1.0], [2.0], [3.0], [4.0]], [2, 1, 1, 2, 0]
    assert probes.nearest_neighbours(x, y, [[-1.0]], 4).tolist() == [2]
    assert probes.nearest_neighbours(x, y, [[1.4]], 4).tolist() == [1]
    assert probes.nearest_neighbours(x, y, [[4.5]], 3).tolist() == [0]
    # Equally far: the earlier example is the nearer.
    assert probes.nearest_neighbours([[1.0], [-1.0]], [0, 1], [[0.0]], 1).tolist() == [0]
    around = np.tile([[1.0], [-1.0]], (300, 1))
    assert probes.neighbours(around, np.zeros((1, 1)), 600)[0].tolist() == list(range(600))


def test_bad_input_of_probes_is_refused() -> None:
    x, y = case(0)
    for fit in (probes.ridge, probes.logistic):
        with pytest.raises(InputError, match="labels are all 0"):
            fit(x, y * 0)
        with pytest.raises(InputError, match=r"features\[0, 0\] is nan"):
            fit(x * np.nan, y)
        with pytest.raises(InputError, match="queries have 5 columns, the probe was fitted on 6"):
            fit(x, y).logits(x[:, :5])
        with pytest.raises(InputError, match=r"queries\[0, 0\] is inf"):
            fit(x, y).logits(x + np.inf)
    for nearest in (probes.nearest_neighbours, probes.nearest_mean):
        with pytest.raises(InputError, match="labels hold no 1 but 4"):
            nearest(x, y * 2, x)
        with pytest.raises(InputError, match="queries have 5 columns"):
            nearest(x, y, x[:, :5])
    with pytest.raises(InputError, match="k=41 of 40 neighbours: give 1 to 40"):
        probes.nearest_neighbours(x, y, x, 41)
    for penalties in ([], [0.0], [1.0, -1.0], [np.nan], [np.inf]):
        with pytest.raises(InputError, match="penalties"):
            probes.ridge(x, y, penalties)
        with pytest.raises(InputError, match="penalties"):
            probes.left_out(x, y, penalties)
    with pytest.raises(InputError, match="groups have shape"):
        probes.left_out(x, y, groups=y[1:])
    for l2 in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="l2"):
            probes.logistic(x, y, l2)
