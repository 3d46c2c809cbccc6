"""The probe of features, and its neighbours: held against refits, and so exact where copies are left out together."""

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from tljax.data import load
from tljax.study.transferability import left_out, neighbours, probe, vote
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


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    train = load("mnist_10k").train
    weights = np.random.default_rng(0).normal(size=(784, 100)) / 28
    return np.maximum(train.arrays[:n].reshape(-1, 784) / 255 @ weights, 0), np.asarray(train.targets[:n])


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
        np.testing.assert_allclose(left_out(x, y, [penalty], groups), expected, atol=1e-7)


def test_what_is_left_out_under_almost_no_penalty_keeps_its_digits() -> None:
    """More dimensions than examples: 1 - h is about the penalty, 1e-12, and its limit is the inverse Gram matrix."""
    x, y = CASES["more dimensions"]
    targets = 2 * np.eye(3)[y] - 1
    expected = []
    for i in range(len(x)):
        kept = np.arange(len(x)) != i
        interpolated = np.linalg.pinv(x[kept] - x[kept].mean(axis=0)) @ (targets[kept] - targets[kept].mean(axis=0))
        expected.append((x[i] - x[kept].mean(axis=0)) @ interpolated + targets.mean(axis=0))
    np.testing.assert_allclose(left_out(x, y, [1e-12]), expected, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_is_predicted_under_the_penalty_of_least_error(name: str) -> None:
    x, y = CASES[name]
    targets = 2 * np.eye(y.max() + 1)[y] - 1
    errors = []
    for penalty in PENALTIES[1:]:
        refits = []
        for i in range(len(x)):
            kept = np.arange(len(x)) != i
            refits.append((np.r_[x[i], 1] @ solved(x[kept], targets[kept], penalty) - targets[i]) ** 2)
        errors.append(np.mean(refits))
    best = PENALTIES[1:][int(np.argmin(errors))]
    np.testing.assert_allclose(left_out(x, y, PENALTIES[1:]), left_out(x, y, [best]), rtol=1e-12)


def test_the_penalty_for_digits_is_scikit_learns() -> None:
    x, y = digits(700)
    best = RidgeClassifierCV(PENALTIES).fit(x, y).alpha_
    np.testing.assert_array_equal(left_out(x, y, PENALTIES), left_out(x, y, [best]))
    assert probe(x, y) > 0.75


def test_copies_are_left_out_together() -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 30)), np.arange(40) % 4
    twice = np.vstack([x, x]), np.r_[y, y]
    # Ridge on each example twice is ridge under half the penalty.
    np.testing.assert_allclose(left_out(*twice, [2.0])[:40], left_out(x, y, [1.0]), atol=1e-9)
    right = [(left_out(*twice, groups=g).argmax(1) == twice[1]).mean() for g in (None, np.arange(80))]
    assert right[0] < 0.5 < right[1]


def test_features_that_say_nothing_are_right_as_often_as_by_chance_when_left_out() -> None:
    """Not never, as where an example left out makes its own class the rarer."""
    for n, classes in ((20, 2), (30, 3), (100, 10)):
        y = np.arange(n) % classes
        assert (left_out(np.ones((n, 2)), y).argmax(axis=1) == y).mean() == pytest.approx(1 / classes)
    noise = np.random.default_rng(0).normal(size=(20, 200, 20))
    y = np.arange(200) % 10
    right = np.mean([(left_out(x, y, [1e6]).argmax(axis=1) == y).mean() for x in noise])
    assert abs(right - 0.1) < 0.03


def test_what_rounding_adds_to_collinear_features_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 5)) @ rng.normal(size=(5, 60)), np.arange(100) % 3
    np.testing.assert_allclose(left_out(x.astype(np.float32), y), left_out(x, y), atol=1e-3)


def test_default_penalties_do_not_depend_on_the_unit_of_the_features() -> None:
    x, y = case(0)
    for scale in (1e-6, 1e5):
        np.testing.assert_allclose(left_out(scale * x, y), left_out(x, y), rtol=1e-6)


def test_neighbours_are_scikit_learns() -> None:
    x, _ = digits(300)
    alone = np.arange(len(x))
    for metric in ("euclidean", "cosine"):
        reference = NearestNeighbors(n_neighbors=6, algorithm="brute", metric=metric).fit(x)
        expected = reference.kneighbors(x, return_distance=False)[:, 1:]
        np.testing.assert_array_equal(neighbours(x, 5, alone, cosine=metric == "cosine"), expected)


def test_a_tie_of_votes_goes_to_the_nearest_of_the_tied() -> None:
    x, y = np.array([[-1.0], [0.0], [1.1], [2.3], [3.6], [5.0]]), np.array([0, 2, 1, 1, 2, 0])
    voted = vote(y[neighbours(x, 4, np.arange(6))])
    assert voted[0] == voted[5] == 2 and vote(y[neighbours(x, 2, np.arange(6))])[3] == 1
    # Equally far: the earlier example is the nearer.
    around = np.concatenate([[[0.0]], np.tile([[1.0], [-1.0]], (300, 1))])
    assert neighbours(around, 600, np.arange(601))[0].tolist() == list(range(1, 601))


def test_bad_input_is_refused() -> None:
    x, y = case(0)
    with pytest.raises(InputError, match="labels are all 0"):
        left_out(x, y * 0)
    with pytest.raises(InputError, match=r"features\[0, 0\] is nan"):
        left_out(x * np.nan, y)
    with pytest.raises(InputError, match="labels hold no 1 but 4"):
        left_out(x, y * 2)
    for k in (0, 40):
        with pytest.raises(InputError, match=f"k={k} of 39 neighbours: give 1 to 39"):
            neighbours(x, k, np.arange(40))
    for penalties in ([], [0.0], [1.0, -1.0], [np.nan], [np.inf]):
        with pytest.raises(InputError, match="penalties"):
            left_out(x, y, penalties)
    with pytest.raises(InputError, match="groups have shape"):
        left_out(x, y, groups=y[1:])
