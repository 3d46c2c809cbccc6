"""Scores of a source: each the paper's formula written out plainly, with its invariances and its limits."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from tljax.data import load
from tljax.study import transferability as t
from tljax.types import InputError

Case = tuple[np.ndarray, np.ndarray]


def case(seed: int) -> Case:
    """Features [30..80, 3..20] that say more or less, or nothing, of 2..5 classes."""
    rng = np.random.default_rng(seed)
    n, d, classes = rng.integers(30, 81), rng.integers(3, 21), rng.integers(2, 6)
    labels = rng.permutation(np.concatenate([np.arange(classes).repeat(2), rng.integers(0, classes, n - 2 * classes)]))
    spread = rng.uniform(0.2, 3, d)
    says = (0, 0.3, 1, 3)[seed % 4]
    means = says * rng.normal(size=(classes, d)) + rng.normal(size=d)
    return 10.0 ** rng.integers(-2, 3) * (means[labels] + spread * rng.normal(size=(n, d))), labels


def softmaxes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    _, labels = case(seed)
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(rng.integers(2, 8), 0.3), len(labels)), labels


def digits(n: int, d: int) -> Case:
    """Random ReLU features of handwritten digits."""
    train = load("mnist_10k").train
    weights = np.random.default_rng(0).normal(size=(784, d)) / 28
    return np.maximum(train.arrays[:n].reshape(n, 784) / 255 @ weights, 0), np.asarray(train.targets[:n])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small problems on two busy cores take ten times as long with two threads."""
    with threadpool_limits(1):
        yield


CASES = [*map(case, range(50)), digits(500, 100)]


# The formulas, as the papers have them.


def plain_knn(features: np.ndarray, labels: np.ndarray, k: int) -> float:
    right = 0
    for i in range(len(labels)):
        far = np.linalg.norm(features - features[i], axis=1).tolist()
        near = [labels[j] for j in sorted(range(len(labels)), key=far.__getitem__) if j != i][:k]
        votes = Counter(near)
        right += next(c for c in near if votes[c] == max(votes.values())) == labels[i]
    return right / len(labels)


def plain_logme(features: np.ndarray, labels: np.ndarray) -> float:
    """Equation 2 of LogME where the updates of its equation 3 stop.

    They can stop at a lesser of two maxima: so from its start, alpha = beta = 1, and from where no feature counts.
    """
    (n, d), total = features.shape, features.T @ features
    maxima = []
    for c in range(labels.max() + 1):
        y = (labels == c).astype(float)
        ends = []
        for alpha, beta in ((1.0, 1.0), (1e3 * np.trace(total), 1.0)):
            for _ in range(5000):
                inverse = np.linalg.inv(alpha * np.eye(d) + beta * total)
                m = beta * inverse @ (features.T @ y)
                off = ((features @ m - y) ** 2).sum()
                gamma = d - alpha * np.trace(inverse)
                before, alpha, beta = alpha / beta, gamma / (m @ m), (n - gamma) / off
                if abs(alpha / beta / before - 1) < 1e-6:
                    break
            a = alpha * np.eye(d) + beta * total
            m = beta * np.linalg.solve(a, features.T @ y)
            value = n / 2 * np.log(beta) + d / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
            value -= beta / 2 * ((features @ m - y) ** 2).sum() + alpha / 2 * m @ m + np.linalg.slogdet(a)[1] / 2
            ends.append(value)
        maxima.append(max(ends))
    return float(np.mean(maxima)) / n


def plain_leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    n, sources = probabilities.shape
    total = 0.0
    for x in range(n):
        expected = 0.0
        for z in range(sources):
            joint = sum(probabilities[i, z] for i in range(n) if labels[i] == labels[x]) / n
            expected += joint / (sum(probabilities[:, z]) / n) * probabilities[x, z]
        total += np.log(expected)
    return total / n


def plain_nce(source: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for z in set(source.tolist()):
        for y in set(labels.tolist()):
            joint = np.mean((source == z) & (labels == y))
            if joint:
                total += joint * np.log(joint / np.mean(source == z))
    return total


def between(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    means = np.array([features[labels == y].mean(axis=0) for y in labels])
    return np.cov(means.T, bias=True)


def plain_h_score(features: np.ndarray, labels: np.ndarray) -> float:
    return float(np.trace(np.linalg.pinv(np.cov(features.T, bias=True)) @ between(features, labels)))


def plain_h_score_shrunk(features: np.ndarray, labels: np.ndarray) -> float:
    """With the optimal shrinkage of Ledoit and Wolf 2004, section 3."""
    n, d = features.shape
    x = features - features.mean(axis=0)
    s = x.T @ x / n
    target = np.trace(s) / d * np.eye(d)
    spread = ((s - target) ** 2).sum()
    noise = min(sum(((np.outer(row, row) - s) ** 2).sum() for row in x) / n**2, spread)
    a = noise / spread
    return float((1 - a) * np.trace(np.linalg.inv((1 - a) * s + a * target) @ between(features, labels)))


def plain_transrate(features: np.ndarray, labels: np.ndarray, epsilon: float, weights: Any = None) -> float:
    z = features - features.mean(axis=0)

    def rate(rows: np.ndarray) -> float:
        return float(sum(np.log(1 + value) for value in np.linalg.svd(rows)[1] ** 2 / (len(rows) * epsilon))) / 2

    classes = range(labels.max() + 1)
    weights = [np.mean(labels == c) for c in classes] if weights is None else weights
    return rate(z) - sum(weights[c] * rate(z[labels == c]) for c in classes)


def plain_gbc(features: np.ndarray, labels: np.ndarray, diagonal: bool, dimensions: int = 64) -> float:
    values, vectors = np.linalg.eigh(np.cov(features.T, bias=True))
    z = features @ vectors[:, ::-1][:, :dimensions]
    least = 1e-4 * values[::-1][:dimensions].mean()
    gaussians = []
    for c in range(labels.max() + 1):
        variance = z[labels == c].var(axis=0)
        variance = variance if diagonal else np.full_like(variance, variance.mean())
        gaussians.append((z[labels == c].mean(axis=0), np.diag(np.maximum(variance, least))))
    total = 0.0
    for i, (mu, s) in enumerate(gaussians):
        for j, (nu, r) in enumerate(gaussians):
            if i != j:
                mid = (s + r) / 2
                logs = [np.linalg.slogdet(matrix)[1] for matrix in (mid, s, r)]
                distance = (mu - nu) @ np.linalg.inv(mid) @ (mu - nu) / 8 + (logs[0] - (logs[1] + logs[2]) / 2) / 2
                total -= np.exp(-distance)
    return total


def plain_n_leep(features: np.ndarray, labels: np.ndarray, seed: int, per_class: int) -> float:
    z = PCA(0.8, svd_solver="full").fit_transform(features)
    z = z / z[:, 0].std()
    mixture = GaussianMixture(per_class * (labels.max() + 1), random_state=seed, max_iter=500).fit(z)
    return plain_leep(mixture.predict_proba(z), labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "formula"),
    [
        pytest.param(t.knn, lambda x, y: plain_knn(x, y, 5), id="knn"),
        pytest.param(
            lambda x, y: t.knn(x, y, 3, cosine=True),
            lambda x, y: plain_knn(x / np.linalg.norm(x, axis=1, keepdims=True), y, 3),
            id="knn cosine",
        ),
        pytest.param(t.logme, plain_logme, id="logme"),
        pytest.param(t.h_score, plain_h_score, id="h_score"),
        pytest.param(t.h_score_shrunk, plain_h_score_shrunk, id="h_score_shrunk"),
        pytest.param(t.transrate, lambda x, y: plain_transrate(x, y, 1e-4), id="transrate"),
        pytest.param(lambda x, y: t.transrate(x, y, 2.0), lambda x, y: plain_transrate(x, y, 2.0), id="transrate 2"),
        pytest.param(t.gbc, lambda x, y: plain_gbc(x, y, False), id="gbc"),
        pytest.param(
            lambda x, y: t.gbc(x, y, diagonal=True, dimensions=5),
            lambda x, y: plain_gbc(x, y, True, 5),
            id="gbc diagonal",
        ),
    ],
)
def test_a_score_of_features_is_the_papers_formula(score: Any, formula: Any) -> None:
    got, expected = zip(*[(score(x, y), formula(x, y)) for x, y in CASES], strict=True)
    assert all(isinstance(value, float) for value in got)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)


def test_leep_and_nce_are_the_papers_formulas() -> None:
    for seed in range(50):
        p, labels = softmaxes(seed)
        source = p.argmax(axis=1)
        np.testing.assert_allclose(t.leep(p, labels), plain_leep(p, labels), rtol=1e-8)
        np.testing.assert_allclose(t.nce(source, labels), plain_nce(source, labels), atol=1e-8)


@pytest.mark.slow
def test_n_leep_is_leep_of_a_gaussian_mixture() -> None:
    for seed, (x, y) in enumerate(CASES):
        np.testing.assert_allclose(t.n_leep(x, y, seed=seed, components=2), plain_n_leep(x, y, seed, 2), atol=1e-8)


# Other ways to the same numbers.


@pytest.mark.parametrize("seed", [5])
def test_logme_is_the_maximum_of_the_evidence_over_both_precisions(seed: int) -> None:
    x, y = case(seed)
    minima = []
    for c in range(y.max() + 1):
        target = (y == c).astype(float)

        def cost(logs: np.ndarray, target: np.ndarray = target) -> float:
            covariance = np.exp(-logs[0]) * x @ x.T + np.exp(-logs[1]) * np.eye(len(x))
            return -stats.multivariate_normal.logpdf(target, np.zeros(len(x)), covariance)

        scale = np.log((x**2).mean())
        options = {"xatol": 1e-5, "fatol": 1e-8}
        starts = [(scale + more, 1.5) for more in (4.0, 8.0)]
        minima.append(min(optimize.minimize(cost, s, method="Nelder-Mead", options=options).fun for s in starts))
    np.testing.assert_allclose(t.logme(x, y), -np.mean(minima) / len(x), atol=1e-7)


def test_logme_of_features_that_say_nothing_is_the_limit() -> None:
    y = np.array([0, 0, 0, 1])
    # Each label a Gaussian around 0 with the variance of the labels.
    limit = np.mean([stats.norm.logpdf((y == c).astype(float), 0, np.sqrt(np.mean(y == c))).mean() for c in (0, 1)])
    np.testing.assert_allclose(t.logme(np.zeros((4, 2)), y), limit, rtol=1e-12)
    orthogonal = np.array([[1.0], [-2.0], [1.0], [0.0]])
    np.testing.assert_allclose(t.logme(orthogonal, y), limit, rtol=1e-12)
    assert t.logme(np.array([[0.0], [0.0], [0.1], [3.0]]), y) > limit


def test_logme_is_finite_and_high_where_features_give_the_classes_exactly() -> None:
    for seed in range(8):
        x, y = case(seed)
        exact = np.column_stack([x, np.eye(y.max() + 1)[y]])
        noise = np.random.default_rng(seed).normal(size=exact.shape)
        nearly = [t.logme(exact + size * noise, y) for size in (0.1, 0.01, 1e-3, 1e-4)]
        assert np.isfinite(t.logme(exact, y)) and all(np.diff([*nearly, t.logme(exact, y)]) > 0)
        assert t.logme(exact, y) > t.logme(x, y)
    # Features that hold each class in one point, the more examples the surer.
    collapsed = [t.logme(np.eye(10)[np.arange(n) % 10], np.arange(n) % 10) for n in (30, 100, 1000)]
    assert 4 < collapsed[0] < collapsed[1] < collapsed[2] < 10


# Ways in which fewer dimensions than examples give some class exactly, though features say little.
EXACT = {
    "a copy": lambda x, y: (np.vstack([x, x[:1]]), np.r_[y, y[:1]]),
    "a copy in float32": lambda x, y: (np.vstack([x, x[:1]]).astype(np.float32), np.r_[y, y[:1]]),
    "copies": lambda x, y: (np.vstack([x, x[:5]]), np.r_[y, y[:5]]),
    "all twice": lambda x, y: (np.vstack([x, x]), np.r_[y, y]),
    "all thrice": lambda x, y: (np.vstack([x, x, x]), np.r_[y, y, y]),
    "a copy of another label": lambda x, y: (np.vstack([x, x[:1]]), np.r_[y, y[1:2]]),
    "an example whose units are dead": lambda x, y: (np.where(np.arange(len(x))[:, None] == 5, 0, x), y),
    "two examples of one direction": lambda x, y: (np.where(np.arange(len(x))[:, None] == 5, 2 * x[6], x), y),
    "a copy but for rounding": lambda x, y: (np.vstack([x, x[:1] * (1 + 1e-7)]).astype(np.float32), np.r_[y, y[:1]]),
}


@pytest.mark.parametrize("way", EXACT)
def test_logme_changes_little_by_one_example_that_is_no_new_one(way: str) -> None:
    rng = np.random.default_rng(0)
    for separation in (0.0, 0.2, 0.5):
        y = np.arange(100) % 10
        x = separation * rng.normal(size=(10, 300))[y] + rng.normal(size=(100, 300))
        assert abs(t.logme(*EXACT[way](x, y)) - t.logme(x, y)) < (0.001 if "all" in way else 0.06)


def test_logme_of_more_dimensions_than_examples_is_the_greatest_evidence_found() -> None:
    rng = np.random.default_rng(0)
    for seed in range(6):
        y = rng.permutation(np.arange(12) % 2)
        # Half of them so made that the best fit is exact: beta has no bound, alpha has.
        x = rng.normal(size=(12, 20)) + (seed % 2) * 40 * np.eye(2)[y].repeat(10, axis=1)
        maxima = []
        for c in (0, 1):
            target = (y == c).astype(float)
            grid = np.linspace(-12, 30, 1500)
            u, s, _ = np.linalg.svd(x)
            alone = (u.T @ target) ** 2
            variance = np.exp(-grid)[:, None] * s**2 + 1
            # Of y = x @ w + noise the scale is free: the best one in closed form.
            logs = 6 * (np.log(12 / (alone / variance).sum(1)) - 1 - np.log(2 * np.pi)) - np.log(variance).sum(1) / 2
            maxima.append(logs.max())
        got = t.logme(x, y) * 12
        assert np.mean(maxima) - 1e-9 <= got <= np.mean(maxima) + 1e-3


def test_leep_of_certain_predictions_is_nce() -> None:
    for seed in range(10):
        p, labels = softmaxes(seed)
        source = p.argmax(axis=1)
        np.testing.assert_allclose(t.leep(np.eye(p.shape[1])[source], labels), t.nce(source, labels), rtol=1e-12)


def test_leep_is_at_least_nce_and_the_log_of_the_confidence() -> None:
    """Nguyen et al. 2020, property 1 of their appendix; and neither is above 0."""
    for seed in range(50):
        p, labels = softmaxes(seed)
        leep, nce = t.leep(p, labels), t.nce(p.argmax(axis=1), labels)
        assert nce + np.log(p.max(axis=1)).mean() <= leep <= 0 and nce <= 0


def test_nce_is_mutual_information_less_the_entropy_of_the_labels() -> None:
    for seed in range(10):
        p, labels = softmaxes(seed)
        source = p.argmax(axis=1) * 7 - 3
        expected = mutual_info_score(source, labels) - stats.entropy(np.bincount(labels))
        np.testing.assert_allclose(t.nce(source, labels), expected, rtol=1e-10)


def random_features(n: int, d: int, classes: int = 10, seed: int = 0) -> Case:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32), np.arange(n) % classes


def test_h_score_of_permuted_labels_is_in_the_mean_what_is_taken_off() -> None:
    """Over all permutations of the labels, one by one."""
    x = np.random.default_rng(0).normal(size=(7, 3))
    orders = [np.array(order) for order in set(itertools.permutations([0, 0, 0, 1, 1, 2, 2]))]
    np.testing.assert_allclose(np.mean([t.h_score(x, y) for y in orders]), 3 * 2 / 6, rtol=1e-12)
    np.testing.assert_allclose(np.mean([t.h_score_adjusted(x, y) for y in orders]), 0, atol=1e-12)


def test_h_score_adjusted_of_two_classes_is_the_adjusted_r_squared_of_a_regression() -> None:
    for seed in range(10):
        x, y = case(seed)
        y = y % 2
        n, d = x.shape
        fitted = np.column_stack([x, np.ones(n)])
        residual = y - fitted @ np.linalg.lstsq(fitted, y, rcond=None)[0]
        expected = 1 - residual.var() / y.var() * (n - 1) / (n - d - 1)
        np.testing.assert_allclose(t.h_score_adjusted(x, y), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "papers", "most"),
    [("h_score_adjusted", "h_score", 0.05), ("transrate_adjusted", "transrate", 0.5), ("gbc_adjusted", "gbc", 0.15)],
)
def test_an_adjusted_score_of_noise_is_0_whatever_its_width_where_the_papers_grows(
    name: str, papers: str, most: float
) -> None:
    n = 100 if name == "gbc_adjusted" else 600
    wide = [random_features(n, d) for d in (8, 64, 256)]
    assert all(np.diff([getattr(t, papers)(x, y) for x, y in wide]) > 0)
    assert all(abs(getattr(t, name)(x, y)) < most for x, y in wide)


@pytest.mark.parametrize("name", ["h_score_adjusted", "transrate_adjusted", "gbc_adjusted", "n_leep_left_out"])
def test_narrow_features_that_say_something_score_above_wide_ones_that_are_noise(name: str) -> None:
    """Likewise the papers' scores, which have it the other way round."""
    x, y = random_features(300, 8, 5)
    says = 0.5 * np.random.default_rng(1).normal(size=(5, 8))[y] + x
    noise = random_features(300, 128, 5, seed=2)[0]
    assert getattr(t, name)(says, y) > getattr(t, name)(noise, y)
    assert t.h_score(says, y) < t.h_score(noise, y) and t.transrate(says, y) < t.transrate(noise, y)


def test_adjusted_scores_are_the_papers_less_those_of_labels_in_another_order() -> None:
    x, y = case(5)
    rng = np.random.default_rng(3)
    orders = [rng.permutation(y) for _ in range(7)]
    chance = np.mean([t.transrate(x, order) for order in orders])
    got = t.transrate_adjusted(x, y, permutations=7, seed=3)
    np.testing.assert_allclose(got, t.transrate(x, y) - chance, rtol=1e-9)
    chance = np.mean([t.gbc(x, order, dimensions=5) for order in orders])
    got = t.gbc_adjusted(x, y, dimensions=5, permutations=7, seed=3)
    np.testing.assert_allclose(got, 1 - t.gbc(x, y, dimensions=5) / chance, rtol=1e-9)
    for score in (t.transrate_adjusted, t.gbc_adjusted):
        with pytest.raises(InputError, match="permutations=0"):
            score(x, y, permutations=0)
    points, y = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([0, 0, 1, 1])
    seed = next(seed for seed in range(99) if (np.random.default_rng(seed).permutation(y) == y).all())
    with pytest.raises(InputError, match="do not overlap either"):
        t.gbc_adjusted(points, y, permutations=1, seed=seed)


def test_n_leep_left_out_predicts_each_example_from_the_labels_of_the_others() -> None:
    x, y = case(6)
    z = PCA(0.8, svd_solver="full").fit_transform(x)
    z = z / z[:, 0].std()
    p = GaussianMixture(2 * (y.max() + 1), random_state=1, max_iter=500).fit(z).predict_proba(z)
    frequency = np.bincount(y) / len(y)
    groups = np.arange(len(y)) // 2
    for given_groups in (None, groups):
        logs = []
        for i in range(len(y)):
            others = np.arange(len(y)) != i if given_groups is None else groups != groups[i]
            same = (y[others] == y[i])[:, None]
            likely = ((p[others] * same).sum(0) + frequency[y[i]]) / (p[others].sum(0) + 1)
            logs.append(np.log(likely @ p[i]))
        got = t.n_leep_left_out(x, y, seed=1, components=2, groups=given_groups)
        np.testing.assert_allclose(got, np.mean(logs), atol=1e-8)


def test_n_leep_left_out_of_labels_at_random_is_about_minus_their_entropy_at_few_examples() -> None:
    x, y = random_features(100, 32)
    assert t.n_leep(x, y) > -1.2 and -3.2 < t.n_leep_left_out(x, y) < -np.log(10)


# What features are but for rounding does not count, in whatever type they come.

STORED: dict[str, Any] = {
    "float32": lambda x: x.astype(np.float32),
    "float32, products summed in it": None,
    "float16": lambda x: x.astype(np.float16),
    "float32 far from 0": lambda x: (x + 3e3).astype(np.float32),
    "float32 in a large unit": lambda x: (1e20 * x).astype(np.float32),
    "bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
}


@pytest.mark.parametrize("stored", STORED)
def test_rank_ten_in_many_columns_scores_as_rank_ten_in_the_type_that_is_stored(stored: str) -> None:
    rng = np.random.default_rng(1)
    y = np.arange(600) % 10
    low, mixed = 0.3 * rng.normal(size=(10, 10))[y] + rng.normal(size=(600, 10)), rng.normal(size=(10, 200))
    if "summed" in stored:
        low = np.maximum(rng.normal(size=(600, 784)).astype(np.float32), 0)
        low, mixed = low @ rng.normal(size=(784, 10)).astype(np.float32), mixed.astype(np.float32)
    x = low.astype(float) @ mixed
    kept = low @ mixed if "summed" in stored else STORED[stored](x)
    rough = 1e-2 if "float16" in stored else 1e-3
    np.testing.assert_allclose(t.h_score(kept, y), t.h_score(low, y), rtol=10 * rough)
    np.testing.assert_allclose(t.h_score_adjusted(kept, y), t.h_score_adjusted(low, y), atol=rough)
    np.testing.assert_allclose(t.gbc(kept, y), t.gbc(x, y), rtol=rough)
    np.testing.assert_allclose(t.logme(kept, y), t.logme(np.asarray(kept, float), y), atol=rough)
    if "unit" not in stored and "float16" not in stored:
        np.testing.assert_allclose(t.transrate(kept, y), t.transrate(x, y), atol=rough)
    assert np.linalg.matrix_rank(np.asarray(kept, float)) == 200  # which float64's epsilon cuts at


def test_transrate_of_float32_in_a_large_unit_counts_no_rounding() -> None:
    rng = np.random.default_rng(1)
    x, y = 1e6 * rng.normal(size=(300, 5)) @ rng.normal(size=(5, 200)), np.arange(300) % 3
    np.testing.assert_allclose(t.transrate(x.astype(np.float32), y), t.transrate(x, y), rtol=1e-3)


# Copies.


def test_copies_do_not_vote_for_each_other() -> None:
    for seed in range(6):
        x, y = case(seed)
        twice = np.vstack([x, x]), np.r_[y, y]
        far = np.linalg.norm(x[:, None] - x[None], axis=-1) + 1e9 * np.eye(len(y))
        # Each other example counts twice: of the five nearest, two pairs and one more.
        near = np.argsort(far, axis=1, kind="stable")[:, :3].repeat(2, axis=1)[:, :5]
        expected = np.mean(
            [Counter(y[row].tolist()).most_common(1)[0][0] == label for row, label in zip(near, y, strict=True)]
        )
        assert t.knn(*twice) == pytest.approx(expected, abs=1e-12)
        groups = np.tile(np.arange(len(y)), 2)
        assert t.knn(*twice, groups=groups) == t.knn(*twice) and t.knn(*twice, groups=np.arange(2 * len(y))) >= t.knn(
            *twice
        )
    rng = np.random.default_rng(0)
    noise, y = rng.normal(size=(100, 8)), np.arange(100) % 10
    twice = np.vstack([noise, noise]), np.r_[y, y]
    assert t.knn(*twice, k=1) == t.knn(noise, y, k=1) < 0.25 and t.knn(*twice, k=1, groups=np.arange(200)) == 1
    assert t.knn(*twice, k=1, cosine=True) == t.knn(noise, y, k=1, cosine=True)


def test_features_that_hold_each_class_in_one_point_are_no_copies() -> None:
    y = np.arange(40) % 4
    assert t.knn(np.eye(4)[y], y) == 1
    assert t.knn(np.eye(4)[y], y, groups=np.arange(40)) == 1


def test_groups_that_say_nothing_or_are_none_are_refused() -> None:
    x, y = case(0)
    for score in (t.knn, t.n_leep_left_out):
        with pytest.raises(InputError, match="groups are all 7"):
            score(x, y, groups=np.full(len(y), 7))
        with pytest.raises(InputError, match="groups have shape"):
            score(x, y, groups=y[:-1])
        with pytest.raises(InputError, match="groups are float64"):
            score(x, y, groups=y.astype(float))


def test_a_class_of_one_example_has_the_variance_of_the_others_in_gbc() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(21, 1)), np.r_[np.arange(20) % 2, 2]
    pooled = np.mean(np.r_[[(x[y == c, 0] - x[y == c, 0].mean()) ** 2 for c in (0, 1)]])
    gaussians = [(x[y == c, 0].mean(), x[y == c, 0].var() if c < 2 else pooled) for c in range(3)]
    expected = 0.0
    for (m, v), (k, w) in itertools.permutations(gaussians, 2):
        expected -= np.sqrt(2 * np.sqrt(v * w) / (v + w)) * np.exp(-((m - k) ** 2) / (v + w) / 4)
    assert t.gbc(x, y) == pytest.approx(expected, rel=1e-9)
    assert np.isfinite(t.gbc_adjusted(x, y))


def test_h_score_of_one_feature_is_the_share_of_variance_in_an_analysis_of_variance() -> None:
    for seed in range(10):
        x, y = case(seed)
        classes = y.max() + 1
        ratio = stats.f_oneway(*[x[y == c, 0] for c in range(classes)]).statistic * (classes - 1)
        np.testing.assert_allclose(t.h_score(x[:, :1], y), ratio / (ratio + len(y) - classes), rtol=1e-9)


def test_transrate_of_balanced_classes_is_that_of_the_papers_listing() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 7)), np.arange(60) % 4
    np.testing.assert_allclose(t.transrate(x, y), plain_transrate(x, y, 1e-4, np.full(4, 0.25)), rtol=1e-10)


def test_gbc_of_one_dimension_is_the_integral_of_the_overlap() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 1)), np.arange(40) % 2
    x[y == 1] = 2 * x[y == 1] + 1.5
    p, q = (stats.norm(x[y == c].mean(), x[y == c].std()) for c in (0, 1))
    overlap = integrate.quad(lambda v: np.sqrt(p.pdf(v) * q.pdf(v)), -40, 40, points=[0])[0]
    np.testing.assert_allclose(t.gbc(x, y), -2 * overlap, rtol=1e-9)


def test_knn_agrees_with_scikit_learn_across_blocks() -> None:
    x, y = digits(2100, 20)
    y = y % 2
    for k in (1, 7):  # of two classes an odd vote has no tie
        far = KNeighborsClassifier(k + 1, algorithm="brute").fit(x, y).kneighbors(x, return_distance=False)[:, 1:]
        expected = ((y[far].mean(axis=1) > 0.5) == y).mean()
        assert t.knn(x, y, k) == expected


# What leaves a score as it is.


def rotation(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


CHANGES = {
    "rotation": lambda x, rng: x @ rotation(rng, x.shape[1]),
    "shift": lambda x, rng: x + 3 * np.abs(x).max() * rng.normal(size=x.shape[1]),
    "scale": lambda x, rng: 77.7 * x,
    "a large scale": lambda x, rng: 1e90 * x,
    "a small scale": lambda x, rng: 1e-90 * x,
    "affine": lambda x, rng: x @ rng.normal(size=(x.shape[1], x.shape[1])) - 1,
    "scale an example": lambda x, rng: rng.uniform(0.1, 10, (len(x), 1)) * x,
    "a constant feature": lambda x, rng: np.column_stack([x, np.full(len(x), 0.1)]),
    "a feature twice": lambda x, rng: np.column_stack([x, x[:, 0]]),
}
SCALED = ("knn", "cosine", "logme", "h_score", "h_score_shrunk", "gbc", "diagonal", "n_leep", "gbc_adjusted")
LEFT_OUT = ("cosine", "n_leep", "n_leep_left_out", "transrate_adjusted")
LEAVES = {
    "rotation": ("knn", "logme", "h_score", "h_score_shrunk", "transrate", "gbc", "diagonal", *LEFT_OUT),
    "shift": ("knn", "h_score", "h_score_shrunk", "transrate", "gbc", "diagonal", "n_leep"),
    "scale": SCALED,
    "a large scale": SCALED,
    "a small scale": SCALED,
    "affine": ("h_score", "h_score_adjusted"),
    "scale an example": ("cosine",),
    "a constant feature": ("knn", "h_score", "transrate", "gbc", "diagonal", "n_leep"),
    "a feature twice": ("h_score", "h_score_adjusted"),
}
SCORES = {
    "knn": t.knn,
    "cosine": lambda x, y: t.knn(x, y, cosine=True),
    "logme": t.logme,
    "h_score": t.h_score,
    "h_score_shrunk": t.h_score_shrunk,
    "transrate": t.transrate,
    "gbc": t.gbc,
    "diagonal": lambda x, y: t.gbc(x, y, diagonal=True),
    "n_leep": lambda x, y: t.n_leep(x, y, components=2),
    "h_score_adjusted": t.h_score_adjusted,
    "transrate_adjusted": t.transrate_adjusted,
    "gbc_adjusted": t.gbc_adjusted,
    "n_leep_left_out": lambda x, y: t.n_leep_left_out(x, y, components=2),
}


@pytest.mark.parametrize(("change", "name"), [(change, name) for change in LEAVES for name in LEAVES[change]])
def test_a_score_does_not_change_with(change: str, name: str) -> None:
    for seed in range(3 if "n_leep" in name else 12):
        x, y = case(seed)
        changed = CHANGES[change](x, np.random.default_rng(seed))
        np.testing.assert_allclose(SCORES[name](changed, y), SCORES[name](x, y), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in SCORES if "n_leep" not in name and name[-8:] != "adjusted"])
def test_a_score_knows_neither_the_order_of_examples_nor_the_names_of_classes(name: str) -> None:
    for seed in range(8):
        x, y = case(seed)
        rng = np.random.default_rng(seed)
        order, names = rng.permutation(len(y)), rng.permutation(y.max() + 1)
        np.testing.assert_allclose(SCORES[name](x[order], names[y][order]), SCORES[name](x, y), rtol=1e-9)


def test_leep_and_nce_do_not_know_the_order_of_source_classes() -> None:
    for seed in range(12):
        p, labels = softmaxes(seed)
        order = np.random.default_rng(seed).permutation(p.shape[1])
        np.testing.assert_allclose(t.leep(p[:, order], labels), t.leep(p, labels), rtol=1e-12)
        np.testing.assert_allclose(t.nce(order[p.argmax(1)], labels), t.nce(p.argmax(1), labels), rtol=1e-12)
        unused = np.column_stack([p, np.zeros(len(p))])
        np.testing.assert_allclose(t.leep(unused, labels), t.leep(p, labels), rtol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_features_of_the_digits_score_above_the_same_of_shuffled_digits(name: str) -> None:
    x, y = digits(300, 30)
    assert SCORES[name](x, y) > SCORES[name](x, np.random.default_rng(0).permutation(y))


def test_a_score_takes_float32_and_any_integers_of_jax_or_lists() -> None:
    x, y = case(2)
    x = x.astype(np.float32)
    for score in SCORES.values():
        expected = score(x.astype(np.float64), y)
        assert score(jnp.asarray(x), jnp.asarray(y)) == score(x.tolist(), y.astype(np.uint8).tolist()) == expected


# Bad input.

GOOD = case(1)


def spoilt(row: int, value: float) -> np.ndarray:
    x = GOOD[0].copy()
    x[row, 1] = value
    return x


BAD = {
    "features.3, 1. is nan": (spoilt(3, np.nan), GOOD[1]),
    "features.4, 1. is -inf": (spoilt(4, -np.inf), GOOD[1]),
    "magnitude 1e.150: scale": (spoilt(4, 1e150), GOOD[1]),
    r"features are float64 \[0, 3\]": (np.zeros((0, 3)), np.zeros(0, int)),
    r"features are float64 \[\d+, 0\]": (GOOD[0][:, :0], GOOD[1]),
    r"features are float64 \[\d+\]: give": (GOOD[0][:, 0], GOOD[1]),
    "features are complex128": (GOOD[0] * 1j, GOOD[1]),
    "features are <U32": (GOOD[0].astype(str), GOOD[1]),
    r"labels have shape \[\d+\], examples": (GOOD[0], GOOD[1][:-1]),
    r"labels have shape \[\d+, 1\]": (GOOD[0], GOOD[1][:, None]),
    "labels are float64: give integers": (GOOD[0], GOOD[1].astype(float)),
    "labels are bool: give integers": (GOOD[0], GOOD[1] > 0),
    r"labels\[\d+\] is -1": (GOOD[0], GOOD[1] - 1),
    r"labels hold no 1 but \d+: give": (GOOD[0], GOOD[1] * 2),
    "labels hold no 2 but 1000000000000": (GOOD[0], np.where(GOOD[1] > 1, 10**12, GOOD[1])),
    "labels are all 0: give two classes": (GOOD[0], GOOD[1] * 0),
    "labels hold each of 3 classes once": (GOOD[0][:3], np.arange(3)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", SCORES)
def test_bad_examples_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        SCORES[name](*BAD[message])
    assert "\n" not in str(refused.value)


def test_bad_probabilities_and_source_labels_are_refused() -> None:
    p, y = softmaxes(0)
    high = p.copy()
    high[2] *= 1.01
    negative = p.copy()
    negative[3, :2] = (-0.25, 1.25 - p[3, 2:].sum())
    for bad, message in (
        (high, r"probabilities\[2\] sum to 1.01"),
        (negative, r"probabilities\[3\] sum to 1, least -0.25: give a softmax"),
        (np.where(p > 0.9, np.nan, p), r"probabilities\[\d+, \d+\] is nan"),
        (p[:0], r"probabilities are float64 \[0"),
        (p[:, 0], "give real numbers"),
        (p[:-1], "labels have shape"),
        (np.log(p + 1e-9), "least -"),
    ):
        with pytest.raises(InputError, match=message):
            t.leep(bad, y)
    with pytest.raises(InputError, match="source labels are float64"):
        t.nce(y.astype(float), y)
    with pytest.raises(InputError, match="source labels have shape"):
        t.nce(y[:-1], y)
    with pytest.raises(InputError, match="labels are all 1"):
        t.nce(y, y * 0 + 1)
    assert t.leep(p.astype(np.float32), y) == pytest.approx(t.leep(p, y), rel=1e-5)


def test_too_few_examples_for_a_score_are_refused() -> None:
    x, y = case(0)
    with pytest.raises(InputError, match=rf"k={len(y)} of {len(y) - 1} neighbours"):
        t.knn(x, y, len(y))
    with pytest.raises(InputError, match="k=0"):
        t.knn(x, y, 0)
    with pytest.raises(InputError, match="whatever the labels: give more examples, or take h_score_shrunk"):
        t.h_score(np.random.default_rng(0).normal(size=(12, 11)), np.arange(12) % 3)
    with pytest.raises(InputError, match=r"each of 5 classes once.*two examples of some class"):
        t.gbc(x[:5], np.arange(5))
    with pytest.raises(InputError, match="of 12 examples and 15 Gaussians"):
        t.n_leep(x[:12], np.arange(12) % 3)
    for options in ({"variance": 0.0}, {"variance": 1.1}, {"components": 0}):
        with pytest.raises(InputError, match="n_leep of variance"):
            t.n_leep(x, y, **options)
    with pytest.raises(InputError, match="gbc of 0 dimensions"):
        t.gbc(x, y, dimensions=0)
    for epsilon in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="epsilon"):
            t.transrate(x, y, epsilon)


def test_features_that_do_not_vary_score_nothing_or_are_refused() -> None:
    y = case(0)[1]
    x = np.full((len(y), 4), 0.1)  # whose mean is not 0.1 but for rounding
    assert t.h_score(x, y) == t.h_score_shrunk(x, y) == t.transrate(x, y) == 0
    for score in (t.gbc, t.n_leep):
        with pytest.raises(InputError, match="the same for every example"):
            score(x, y)


@pytest.mark.slow
def test_all_scores_but_n_leep_take_30_seconds_on_10_000_examples_of_512_features() -> None:
    x, y = digits(10_000, 512)
    start = time.process_time()
    for name in SCORES.keys() - {"n_leep", "n_leep_left_out", "cosine", "diagonal"}:
        assert np.isfinite(SCORES[name](x, y))
    assert time.process_time() - start < 30
