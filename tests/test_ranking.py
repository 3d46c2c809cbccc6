"""Ranking: correlations are SciPy's, regret is what a simulation of ties loses, and intervals cover."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tljax.study import ranking
from tljax.types import InputError

RNG = np.random.default_rng(0)
CASES = [
    (RNG.normal(size=n) if seed % 2 else RNG.integers(0, 4, n).astype(float), RNG.integers(0, 9, n) / 10)
    for seed, n in enumerate([3, 5, 8, 16, 16, 40] * 4)
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_correlations_are_those_of_scipy(case):
    score, truth = CASES[case]
    if len(set(score)) < 2 or len(set(truth)) < 2:
        pytest.skip("does not vary")
    ranks = np.argsort(np.argsort(-truth, kind="stable"), kind="stable")
    assert ranking.kendall(score, truth) == pytest.approx(stats.kendalltau(score, truth).statistic, abs=1e-12)
    weighted = stats.weightedtau(score, truth, rank=ranks).statistic
    assert ranking.weighted_tau(score, truth) == pytest.approx(weighted, abs=1e-12)
    assert ranking.pearson(score, truth) == pytest.approx(stats.pearsonr(score, truth).statistic, abs=1e-12)


def test_many_at_once_are_each_by_itself():
    scores, truths = RNG.normal(size=(4, 3, 7)), RNG.normal(size=(4, 3, 7))
    for function in (ranking.kendall, ranking.weighted_tau, ranking.pearson):
        together = function(scores, truths)
        for i, j in itertools.product(range(4), range(3)):
            assert together[i, j] == pytest.approx(function(scores[i, j], truths[i, j]), abs=1e-12)


def test_rank_correlations_do_not_change_with_a_rising_function_and_take_infinity():
    score, truth = RNG.normal(size=9), RNG.normal(size=9)
    raised = np.exp(3 * score)
    assert ranking.kendall(raised, truth) == ranking.kendall(score, truth)
    raised[score.argmax()] = np.inf
    assert ranking.weighted_tau(raised, truth) == ranking.weighted_tau(score, truth)
    assert math.isnan(ranking.pearson(raised, truth))


def test_what_does_not_vary_ranks_nothing():
    for function in (ranking.kendall, ranking.weighted_tau, ranking.pearson):
        assert math.isnan(function([0.1, 0.1, 0.1], [0.1, 0.2, 0.3]))
        assert math.isnan(function([1.0, 2.0, 3.0], [0.3, 0.3, 0.3]))


@pytest.mark.parametrize("first", [1, 2, 3])
def test_regret_is_the_mean_over_all_ways_to_break_ties(first):
    score, truth = np.array([2, 1, 1, 2, 0, 1.0]), np.array([0.3, 0.9, 0.5, 0.4, 1.0, 0.2])
    lost = []
    for order in itertools.permutations(range(6)):
        chosen = sorted(order, key=lambda i: -score[i])[:first]  # stable: ties as in `order`
        lost.append(1.0 - truth[chosen].max())
    assert ranking.regret(score, truth, first) == pytest.approx(np.mean(lost), abs=1e-12)


def test_halves_of_a_truth_without_noise_agree_and_of_noise_do_not():
    truth = np.linspace(0, 1, 12)
    assert ranking.split_half(np.tile(truth, (4, 1))) == pytest.approx(1)
    assert abs(np.mean([ranking.split_half(RNG.normal(size=(4, 12))) for _ in range(40)])) < 0.1
    by_hand = np.mean([stats.kendalltau(a, b).statistic for a, b in [(CASES[3][0], CASES[4][0])]])
    assert ranking.split_half([CASES[3][0], CASES[4][0]]) == pytest.approx(by_hand)
    assert math.isnan(ranking.split_half([truth]))


def board(n=16, targets=3):
    truth = RNG.uniform(size=(targets, n))
    scores = {"right": truth * 2, "noisy": truth + RNG.normal(size=truth.shape), "same": np.ones_like(truth)}
    return scores, truth


def test_a_perfect_score_has_tau_one_and_no_regret():
    scores, truth = board()
    judged = ranking.judged(scores, truth, [0.1, 0.2, 0.3], count=200)
    right = judged["right"]
    assert right.tau == pytest.approx((1, 1, 1)) and right.weighted == pytest.approx((1, 1, 1))
    assert right.regret == right.regret_3 == (0, 0, 0)
    assert right.over_scratch.value == pytest.approx(truth.max(1).mean() - 0.2)
    assert right.behind == pytest.approx((0, 0, 0)) and judged["noisy"].behind.value > 0
    assert math.isnan(judged["same"].tau.value) and judged["same"].regret.value > 0


def test_values_are_means_over_targets_and_intervals_hold_them():
    scores, truth = board()
    noisy = ranking.judged(scores, truth, [0.0] * 3, count=300)["noisy"]
    each = [stats.kendalltau(a, b).statistic for a, b in zip(scores["noisy"], truth, strict=True)]
    assert noisy.tau.value == pytest.approx(np.mean(each)) and noisy.tau.low < noisy.tau.value < noisy.tau.high
    lost = [ranking.regret(a, b, 3) for a, b in zip(scores["noisy"], truth, strict=True)]
    assert noisy.regret_3.value == pytest.approx(np.mean(lost))


def test_draws_are_the_same_for_all_scores():
    """A score and its copy differ by nothing in any sample."""
    scores, truth = board()
    judged = ranking.judged({"one": scores["noisy"], "copy": scores["noisy"] + 5}, truth, [0.0] * 3, count=100)
    assert judged["copy"].behind == (0, 0, 0) and judged["one"].tau == judged["copy"].tau


def equals(seed, n=16, k=10, targets=3, worse=None):
    """Scores that correlate with the truth alike, but for the first of them if it is worse."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(targets, n))
    strength = [0.6 if worse is None or i else worse for i in range(k)]
    return {
        str(i): r * truth + math.sqrt(1 - r * r) * rng.normal(size=truth.shape) for i, r in enumerate(strength)
    }, truth


def apart(scores, truth, seed):
    """Names that are told from the best."""
    which = np.concatenate([np.arange(truth.shape[1])[None], ranking.draws(truth.shape[1], 150, seed)])
    truths = np.moveaxis(truth[:, which], 0, 1)
    taus = [ranking.kendall(np.moveaxis(score[:, which], 0, 1), truths).mean(-1) for score in scores.values()]
    values, samples = np.array(taus)[:, 0], np.array(taus)[:, 1:]
    behind = values.max() - values - ranking.spread(samples)[values.argmax()]
    return {name for name, low in zip(scores, behind, strict=True) if low > 0}


def test_of_ten_equal_scores_none_is_told_from_the_best_in_most_studies():
    """One by one, without regard to how the best was found, one or more are in half of the studies."""
    wrong = [bool(apart(*equals(seed, n=10, targets=1), seed)) for seed in range(60)]
    assert np.mean(wrong) < 0.1


def test_a_score_that_is_worse_for_sure_is_told_from_the_best():
    for seed in range(4):
        scores, truth = equals(seed, worse=-0.6)
        assert "0" in apart(scores, truth, seed)
    judged = ranking.judged(scores, truth, [0.0] * 3, count=150, seed=seed)
    assert {name for name, score in judged.items() if score.behind.low > 0} == apart(scores, truth, seed)


def test_half_widths_are_a_studentised_range():
    """Of normal samples that do not depend on each other it is Tukey's, of which SciPy knows the quantiles."""
    samples = np.random.default_rng(0).normal(size=(5, 20_000)) * 3 + np.arange(5)[:, None]
    wide = ranking.spread(samples)
    expected = 3 * stats.studentized_range.ppf(0.95, 5, np.inf)
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(wide[off], expected, rtol=0.03)
    assert (np.diag(wide) == 0).all() and np.array_equal(wide, wide.T)
    samples[0, ::2] = np.nan  # a score that does not vary in some samples
    np.testing.assert_allclose(ranking.spread(samples)[off], expected, rtol=0.05)
    assert np.isnan(ranking.spread(samples[:, :0])).all()


def test_intervals_of_the_difference_from_the_best_are_around_it():
    scores, truth = equals(0)
    judged = ranking.judged(scores, truth, [0.0] * 3, count=100)
    taus = {name: score.tau.value for name, score in judged.items()}
    for name, score in judged.items():
        assert score.behind.value == pytest.approx(max(taus.values()) - taus[name])
        assert score.behind.value - score.behind.low == pytest.approx(score.behind.high - score.behind.value)


@pytest.mark.slow
def test_intervals_of_tau_cover_most_of_the_time():
    """Of 16 sources from a normal of correlation r, whose tau is 2/pi asin r."""
    rng, r, hits = np.random.default_rng(1), 0.6, []
    for seed in range(150):
        truth = rng.normal(size=(1, 16))
        score = r * truth + math.sqrt(1 - r * r) * rng.normal(size=truth.shape)
        tau = ranking.judged({"s": score}, truth, [0.0], count=200, seed=seed)["s"].tau
        hits.append(tau.low <= 2 / math.pi * math.asin(r) <= tau.high)
    assert 0.85 <= np.mean(hits) <= 1.0


def test_of_four_sources_there_are_no_intervals_and_of_five_there_are():
    """Of four a perfect ranking has a chance of 2 / 4!, on both sides, of five 2 / 5!."""
    for n in (4, 5):
        score = ranking.judged({"s": np.arange(n)[None]}, np.arange(n)[None] / 10, [0.0], count=50)["s"]
        assert score.tau.value == 1 and math.isnan(score.tau.low) == math.isnan(score.behind.high) == (n == 4)
        assert (2 / math.factorial(n) > 0.05) == (n < ranking.LEAST)


BAD = [
    (lambda: ranking.kendall([1.0], [1.0]), "two sources or more"),
    (lambda: ranking.kendall([1.0, 2.0], [1.0, 2.0, 3.0]), "two sources or more"),
    (lambda: ranking.kendall([np.nan, 2.0], [1.0, 2.0]), "not a number"),
    (lambda: ranking.pearson([1.0, 2.0], [np.inf, 2.0]), "not a number"),
    (lambda: ranking.judged({}, np.ones((1, 2)), [0.0]), "three or more"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_one_line(wrong, message):
    with pytest.raises(InputError) as refused:
        wrong()
    assert message in str(refused.value) and "\n" not in str(refused.value)
