"""The statistics of transfer: what they compute, and that what they claim comes true as often as they claim."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import simulate_verdicts
from scipy import stats
from simulate_verdicts import Study

from tljax.study import statistics
from tljax.study.statistics import (
    MIN_GROUPS,
    Interval,
    crossed,
    equivalent,
    mcnemar,
    over_items,
    power,
    power_equivalent,
    simultaneous,
    verdicts,
    wilson,
)
from tljax.types import InputError


def binary(
    rng: np.random.Generator,
    strategies: int,
    fits: int,
    items: int,
    *,
    by_item: float,
    by_fit: float,
    probit: float = 0.7,
    better: float = 0.0,
) -> np.ndarray:
    """Float [strategies, fits, items]: right or wrong less that from scratch, from a threshold on normal effects.

    Items and fits (the labels drawn) are easy or hard for all strategies, and beside that for each. The share right
    is Phi((probit + better) / sd of all effects), so the true difference is known.
    """
    shared = rng.standard_normal(items, np.float32) + np.float32(0.1) * rng.standard_normal((fits, 1), np.float32)
    strategy_effects = np.float32(by_item) * rng.standard_normal((strategies + 1, 1, items), np.float32)
    strategy_effects = strategy_effects + np.float32(by_fit) * rng.standard_normal(
        (strategies + 1, fits, 1), np.float32
    )
    noise = rng.standard_normal((strategies + 1, fits, items), np.float32)
    shift = np.full((strategies + 1, 1, 1), probit + better)
    shift[0] = probit
    right = shared + strategy_effects + noise + shift > 0
    return right[1:].astype(float) - right[0]


def truth(by_item: float, by_fit: float, better: float, probit: float = 0.7) -> float:
    sd = math.sqrt(1 + 0.1**2 + by_item**2 + by_fit**2 + 1)
    return float(stats.norm.cdf((probit + better) / sd) - stats.norm.cdf(probit / sd))


# Wilson and McNemar


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (90, 100), (8765, 10_000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_where_the_score_test_just_rejects(right: int, n: int, level: float) -> None:
    z = stats.norm.isf((1 - level) / 2)
    for end in wilson(right, n, level):
        assert abs(right / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-12)


def test_wilson_and_mcnemar_agree_with_statsmodels() -> None:
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for right, n in ((3, 10), (90, 100), (8765, 10_000)):
        assert wilson(right, n) == pytest.approx(proportion.proportion_confint(right, n, method="wilson"), abs=1e-12)
    rng = np.random.default_rng(0)
    for chance in (0.5, 0.7, 0.9):
        first, second = rng.random(60) < chance, rng.random(60) < 0.7
        table = [[np.sum(a & b) for b in (second, ~second)] for a in (first, ~first)]
        assert mcnemar(first, second) == pytest.approx(contingency.mcnemar(table, exact=True).pvalue)


def test_mcnemar_is_a_sign_test_on_the_items_that_differ() -> None:
    first = np.array([True] * 9 + [False] * 2 + [True] * 50)
    second = np.array([False] * 9 + [True] * 2 + [True] * 50)
    # P(2 or fewer, or 9 or more, of 11 fair coins)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert mcnemar(first, first) == 1.0


# One comparison


def test_mean_squares_are_those_of_the_textbook() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 6, 40)) + 5
    squares = statistics.mean_squares(scores)
    x, y = scores
    fits = items = residual = 0.0
    for first, other in ((x, x), (x, y)):
        grand = first.mean(), other.mean()
        fits = 40 * sum((first[i].mean() - grand[0]) * (other[i].mean() - grand[1]) for i in range(6)) / 5
        items = 6 * sum((first[:, j].mean() - grand[0]) * (other[:, j].mean() - grand[1]) for j in range(40)) / 39
        total = sum((first[i, j] - grand[0]) * (other[i, j] - grand[1]) for i in range(6) for j in range(40))
        residual = (total - 5 * fits - 39 * items) / (5 * 39)
        place = (0, 0 if other is x else 1)
        assert [part[place] for part in squares] == pytest.approx([fits, items, residual], abs=1e-10)
    assert all(np.array_equal(part, part.T) for part in squares)


def test_mean_squares_agree_with_statsmodels() -> None:
    pandas = pytest.importorskip("pandas")
    anova = pytest.importorskip("statsmodels.stats.anova")
    formula = pytest.importorskip("statsmodels.formula.api")
    scores = np.random.default_rng(1).integers(-1, 2, (5, 30)).astype(float)
    fit, item = np.indices(scores.shape).reshape(2, -1)
    table = pandas.DataFrame({"score": scores.ravel(), "fit": fit, "item": item})
    expected = anova.anova_lm(formula.ols("score ~ C(fit) + C(item)", table).fit())["mean_sq"]
    assert [part.item() for part in statistics.mean_squares(scores[None])] == pytest.approx(list(expected), abs=1e-10)


def effects(fit: float, item: float, both: float) -> np.ndarray:
    """Float [5, 40] with mean 0.1 and just these mean squares: orthogonal patterns, of sum 0."""
    a, b = np.array([2, 1, 0, -1, -2.0]), np.tile([1.0, -1], 20)
    c = np.outer([1, -2, 0, 2, -1.0], np.repeat([1.0, -1], 20))
    parts = [np.outer(a, np.ones(40)), np.outer(np.ones(5), b), c]
    degrees = (4, 39, 4 * 39)
    sizes = (math.sqrt(s * d / np.sum(p**2)) for s, d, p in zip((fit, item, both), degrees, parts, strict=True))
    return 0.1 + sum(size * part for size, part in zip(sizes, parts, strict=True))


def test_the_interval_is_that_of_the_formula() -> None:
    interval = crossed(effects(3.0, 2.0, 0.5))
    assert interval.mean == pytest.approx(0.1)
    assert interval.standard_error == pytest.approx(math.sqrt((3.0 + 2.0 - 0.5) / 200))
    few = 3.0 * 4 / stats.chi2.ppf(0.1, 4)
    degrees = (few + 1.5) ** 2 / (few**2 / 4 + 2.0**2 / 39 + 0.5**2 / (4 * 39))
    assert interval.degrees == pytest.approx(degrees)
    half = stats.t.ppf(0.975, degrees) * interval.standard_error
    assert (interval.low, interval.high, interval.level) == pytest.approx((0.1 - half, 0.1 + half, 0.95))


def test_without_a_component_of_items_it_is_the_t_test_on_the_fits() -> None:
    scores = effects(3.0, 0.2, 0.5)
    assert statistics.mean_squares(scores[None]).items < 0.5
    expected = stats.ttest_1samp(scores.mean(1), 0).confidence_interval(0.9)
    interval = crossed(scores, 0.9)
    assert interval.degrees == pytest.approx(4)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_where_fits_agree_it_is_the_t_test_on_the_items() -> None:
    items = np.random.default_rng(0).integers(-1, 2, 300).astype(float)
    expected = stats.ttest_1samp(items, 0).confidence_interval(0.95)
    for interval in (crossed(np.tile(items, (4, 1))), over_items(items)):
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
        assert interval.degrees == pytest.approx(299)


# Ties


def test_fits_that_tie_are_no_certainty() -> None:
    scores = np.array([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]])
    assert statistics.mean_squares(scores[None]).fits == pytest.approx(0, abs=1e-12)
    assert crossed(scores).low < 0 < crossed(scores).high


@pytest.mark.parametrize("items", [20, 100, 1000, 10_000])
@pytest.mark.parametrize("fits", [1, 2, 3, 10])
def test_where_no_item_differs_a_difference_up_to_the_rule_of_three_is_possible(fits: int, items: int) -> None:
    """The exact bound: the largest difference at which no item differs with a probability of 5 % or more."""
    scores = np.zeros((fits, items))
    bound = 1 - 0.05 ** (1 / items)
    interval = crossed(scores, 0.9) if fits > 1 else over_items(scores[0], 0.9)
    assert bound <= interval.high <= 1.5 * bound and interval.low == -interval.high
    if fits > 1:
        for margin, within in ((bound, False), (1.5 * bound, True)):
            (verdict,) = verdicts([scores], margin)
            assert (verdict.word, verdict.size) == (("equivalent", "within") if within else ("undecided", "open"))
            assert verdict.p == 1


def test_a_family_is_as_careful_with_ties() -> None:
    # Twenty comparisons at once, the smallest of whose chances counts: 1 - exp(-n) with n = ln 400 items.
    family = verdicts([np.zeros((3, 1000))] * 20, math.log(20 / 0.05) / 1000)
    assert {verdict.word for verdict in family} == {"undecided"}


@pytest.mark.parametrize("fits", [2, 3, 10])
@pytest.mark.parametrize("items", [2, 3, 4, 5, 10])
def test_all_won_is_no_more_certain_than_the_sign_test_on_the_items(fits: int, items: int) -> None:
    (verdict,) = verdicts([np.ones((fits, items))], 0.01)
    exact = stats.binomtest(items, items).pvalue
    assert (verdict.word == "positive") == (items == 10)
    assert verdict.p > (exact if items < 10 else exact / 2)
    assert crossed(np.ones((fits, items))).low == pytest.approx(-crossed(-np.ones((fits, items))).high)


@pytest.mark.parametrize(("fits", "wins"), [(2, 8), (2, 50), (3, 8), (4, 3), (5, 8), (10, 4)])
def test_fits_that_win_as_many_other_items_are_known_no_better_than_their_count(fits: int, wins: int) -> None:
    scores = np.zeros((fits, 1000))
    scores[np.repeat(np.arange(fits), wins), np.arange(fits * wins)] = 1
    interval, many = crossed(scores), fits * wins
    half = (interval.high - interval.low) / 2 * scores.size  # in wins
    assert 0.88 * 1.96 * math.sqrt(many) <= half <= 2 * 1.96 * math.sqrt(many)
    assert simultaneous([scores, scores])[0].high >= interval.high


@pytest.mark.parametrize("value", [0.3, -1 / 3, 1e-12])
def test_scores_that_differ_by_rounding_are_ties(value: float) -> None:
    """A fit that diverged may count as a constant share on all items: what the sum rounds is no evidence."""
    rng = np.random.default_rng(0)
    scores = np.full((5, 300), value) * (1 + rng.integers(-1, 2, (5, 300)) * 2.0**-52)
    assert crossed(scores).standard_error == pytest.approx(crossed(np.zeros((5, 300))).standard_error)
    assert over_items(scores[0]).standard_error == pytest.approx(over_items(np.zeros(300)).standard_error)


def test_hardly_any_difference_is_as_uncertain_of_scores_that_are_no_counts() -> None:
    """Of an area over label budgets a score may be a weight: two items that differ by 0.1 leave 98 others unknown."""
    scores = np.zeros((3, 100))
    scores[:, 0], scores[:, 1] = 0.1, -0.1
    none = crossed(np.zeros((3, 100)))
    assert 0.3 < crossed(scores).standard_error / none.standard_error < 1


@pytest.mark.parametrize("scores", ["integers", "normal", "shifted", "small", "weights"])
@pytest.mark.parametrize("items", [8, 40, 1000])
def test_where_items_differ_nothing_is_added(scores: str, items: int) -> None:
    rng = np.random.default_rng(items)
    values = {
        "integers": rng.integers(-1, 2, (3, 5, items)).astype(float),
        "normal": 0.1 * rng.standard_normal((3, 5, items)),
        "shifted": 0.3 + rng.integers(-1, 2, (3, 5, items)),
        "small": 1e-4 * rng.random((3, 5, items)),
        "weights": rng.integers(-1, 2, (3, 5, items, 4)) @ np.array([0.1, 0.2, 0.3, 0.4]),
    }[scores]
    added = statistics.unseen_items(values)
    rest = (values.mean(1) - values.mean((1, 2))[:, None]) ** 2
    if items == 8:  # Of so few, some samples have long tails; a kurtosis of at most 3 is none.
        short = items * np.sum(rest**2, 1) <= 3 * np.sum(rest, 1) ** 2
        assert short.any() and np.all(added[short] == 0)
        return
    assert np.all(added == 0)
    squares = statistics.mean_squares(values)
    old = simulate_verdicts.before(squares, 5, items)
    new = statistics.standard_errors(squares, 5, items, added)
    known = np.diag(squares.fits) > statistics.least_share(5) * np.diag(squares.residual)
    assert known.any()
    np.testing.assert_array_equal(np.array(new)[:, known], np.array(old)[:, known])


def test_few_fits_are_known_no_better_than_if_only_items_were_counted() -> None:
    """At the least mean square of fits the t interval is nine tenths of the normal one of the residual."""
    for fits in (2, 3, 5, 20):
        squares = statistics.Squares(np.zeros((1, 1)), np.zeros((1, 1)), np.eye(1) * 0.7)
        error, degrees = statistics.standard_errors(squares, fits, 1000)
        assert degrees.item() == pytest.approx(fits - 1)
        assert stats.t.isf(0.025, fits - 1) * error.item() == pytest.approx(
            0.9 * 1.959964 * math.sqrt(0.7 / fits / 1000)
        )


# Groups of items


def alike(rng: np.random.Generator, groups: int, most: int) -> np.ndarray:
    """Int [items]: groups of 1 to `most` items, shuffled, with names that are not 0, 1, 2."""
    return rng.permutation(np.repeat(rng.permutation(groups * 7)[:groups] - 5, rng.integers(1, most + 1, groups)))


def test_items_each_a_group_of_its_own_have_the_bits_of_items_without_groups() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.integers(-1, 2, (3, 4, 50)).astype(float), rng.permutation(50) * 3 - 7
    assert crossed(scores[0], groups=groups) == crossed(scores[0])
    assert over_items(scores[0, 0], groups=groups) == over_items(scores[0, 0])
    assert simultaneous(scores, groups=groups) == simultaneous(scores)
    assert verdicts(scores, 0.1, groups=groups) == verdicts(scores, 0.1)
    first, second = rng.random((2, 50)) < 0.6
    assert mcnemar(first, second, groups) == pytest.approx(mcnemar(first, second), abs=1e-12)


def test_a_group_of_copies_is_one_item() -> None:
    """Nothing is learnt from items that are there several times over."""
    rng = np.random.default_rng(1)
    scores = rng.integers(-1, 2, (2, 5, 60)).astype(float)
    copies, groups = np.repeat(scores, 7, axis=2), np.repeat(np.arange(60), 7)
    for grouped, alone in zip(verdicts(copies, 0.1, groups=groups), verdicts(scores, 0.1), strict=True):
        assert grouped.word == alone.word and grouped.size == alone.size
        assert grouped.interval == pytest.approx(alone.interval) and grouped.p == pytest.approx(alone.p)
    assert over_items(copies[0, 0], groups=groups) == pytest.approx(over_items(scores[0, 0]))
    first, second = rng.random((2, 60)) < 0.6
    p = mcnemar(np.repeat(first, 7), np.repeat(second, 7), groups)
    assert p == pytest.approx(mcnemar(first, second), abs=1e-12)
    # Without their groups they look like seven times as much.
    assert over_items(copies[0, 0]).standard_error < 0.4 * over_items(scores[0, 0]).standard_error


def test_groups_of_equal_size_are_judged_by_their_means() -> None:
    rng = np.random.default_rng(2)
    scores = rng.integers(-1, 2, (4, 60, 5)).astype(float)
    order = rng.permutation(300)
    interval = crossed(scores.reshape(4, 300)[:, order], groups=np.repeat(np.arange(60), 5)[order])
    assert interval == pytest.approx(crossed(scores.mean(2)))


def test_of_groups_of_unequal_size_the_mean_is_that_over_items_and_its_error_the_ratio_estimators() -> None:
    rng = np.random.default_rng(3)
    groups = alike(rng, 40, 12)
    scores = rng.integers(-1, 2, len(groups)) + 0.3 * (groups % 3)
    interval = over_items(scores, groups=groups)
    assert interval.mean == pytest.approx(scores.mean()) and interval.degrees == 39
    # Cochran, equation 9A.3: totals less the ratio times sizes.
    each = [np.sum(scores[groups == name] - scores.mean()) for name in np.unique(groups)]
    assert interval.standard_error == pytest.approx(math.sqrt(40 / 39 * np.sum(np.square(each))) / len(groups))
    tiled = crossed(np.tile(scores, (3, 1)), groups=groups)
    assert tiled[:3] == pytest.approx(interval[:3])


def test_the_error_of_groups_is_statsmodels_cluster_robust_one() -> None:
    linear = pytest.importorskip("statsmodels.regression.linear_model")
    rng = np.random.default_rng(4)
    groups = np.unique(alike(rng, 30, 9), return_inverse=True)[1]
    scores = rng.integers(-1, 2, len(groups)).astype(float)
    fit = linear.OLS(scores, np.ones(len(groups))).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "df_correction": True, "use_correction": True}, use_t=True
    )
    interval = over_items(scores, groups=groups)
    # statsmodels multiplies by (items - 1) / (items - parameters), which is 1 here.
    assert (interval.low, interval.high) == pytest.approx(tuple(fit.conf_int()[0]))


def test_where_only_fits_differ_sizes_of_groups_are_nothing() -> None:
    rng = np.random.default_rng(5)
    groups = alike(rng, 30, 50)
    fits = rng.standard_normal(5)
    interval = crossed(np.repeat(fits[:, None], len(groups), 1), groups=groups)
    expected = stats.ttest_1samp(fits, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=0.01)


def test_groups_that_tie_may_each_have_been_lost_whole() -> None:
    for size in (1, 10):
        scores, groups = np.zeros((3, 50 * size)), np.repeat(np.arange(50), size)
        assert crossed(scores, groups=groups) == pytest.approx(crossed(np.zeros((3, 50))))
    # Of groups of unequal size, a group as large as an item's is on average.
    groups = np.repeat(np.arange(50), [30] * 10 + [5] * 40)
    larger = (10 * 30**2 + 40 * 5**2) / 50 / 10**2
    unequal, equal = crossed(np.zeros((3, 500)), groups=groups), crossed(np.zeros((3, 50)))
    assert unequal.standard_error == pytest.approx(larger * equal.standard_error)


@pytest.mark.parametrize("groups", [2, MIN_GROUPS - 1, MIN_GROUPS])
def test_few_groups_get_no_word(groups: int) -> None:
    rng = np.random.default_rng(6)
    scores = 0.8 + 0.01 * rng.standard_normal((2, 5, 200))
    for verdict in verdicts(scores, 0.1, groups=np.arange(200) % groups):
        if groups < MIN_GROUPS:
            assert (verdict.word, verdict.size, verdict.power, verdict.power_equivalent) == (
                "",
                "",
                (0.0, 0.0),
                (0.0, 0.0),
            )
            assert verdict.warning == f"{groups} groups of test items are fewer than 8: no word is given."
            assert verdict.interval.low > 0
        else:
            assert (verdict.word, verdict.size, verdict.warning) == ("positive", "beyond", "")


def test_groups_that_differ_much_in_size_are_told_to_be_few() -> None:
    rng = np.random.default_rng(8)
    equal, one_large = np.arange(200) % 10, np.minimum(np.arange(200) // 5, 20)  # a half of the items are one group
    larger = np.repeat(np.arange(14), [30, 30, 25, 25, *[10] * 10])
    assert round(statistics.as_many(np.bincount(larger))) == 7
    what = "groups of test items"
    for groups, word, warning in (
        (equal, True, ""),
        (np.arange(199) % 8, True, ""),
        (larger, True, f"14 {what} that differ so in size say no more than 7 of one size."),
        (one_large, False, f"21 {what} so unequal say no more than 1 of one size: no word is given."),
    ):
        scores = rng.integers(-1, 2, (3, len(groups))).astype(float)
        (verdict,) = verdicts([scores], 0.1, groups=groups)
        assert bool(verdict.word) == word and verdict.warning == warning
    assert statistics.as_many(np.full(7, 3)) == pytest.approx(7)


def test_mcnemar_of_groups_counts_all_choices_of_sides() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        groups = alike(rng, 9, 6)
        first, second = rng.random((2, len(groups))) < 0.6
        sums = np.array([np.sum(first[groups == name]) - np.sum(second[groups == name]) for name in np.unique(groups)])
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        expected = np.mean(np.abs(signs @ sums) >= abs(sums.sum()))
        assert mcnemar(first, second, groups) == pytest.approx(expected)
    # Twelve items of two groups are two coins.
    assert mcnemar(np.ones(12, bool), np.zeros(12, bool), np.arange(12) % 2) == 0.5
    assert mcnemar(first, first, groups) == 1


# A family


def test_a_family_of_one_is_the_comparison_alone() -> None:
    scores = np.random.default_rng(2).integers(-1, 2, (5, 200)).astype(float)
    assert simultaneous([scores], 0.9)[0] == pytest.approx(crossed(scores, 0.9), rel=1e-9)
    assert simultaneous([], 0.9) == verdicts([], 0.01) == []


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_the_largest_of_several_normals_agrees_with_scipy(m: int, correlation: float) -> None:
    matrix = np.full((m, m), correlation) + (1 - correlation) * np.eye(m)
    for z in (1.5, 2.5):
        within = stats.multivariate_normal.cdf(np.full(m, z), cov=matrix, lower_limit=np.full(m, -z), rng=0)
        assert statistics.largest_beyond(matrix)(z) == pytest.approx(1 - within, rel=0.01)


def test_the_critical_value_is_dunnetts_where_degrees_are_many() -> None:
    # Correlation 0.5, two-sided 5 %, infinite degrees: Dunnett 1964, "New tables for multiple comparisons with a
    # control", table II: 2.21, 2.35, 2.51, 2.65 of 2, 3, 5 and 8 comparisons.
    for m, expected in ((2, 2.21), (3, 2.35), (5, 2.51), (8, 2.65)):
        tail = statistics.simultaneous_tail(statistics.largest_beyond((np.ones((m, m)) + np.eye(m)) / 2), m, 0.95)
        assert stats.norm.isf(tail / 2) == pytest.approx(expected, abs=0.006)


def test_a_comparison_made_twice_costs_nothing_where_it_is_known_well() -> None:
    scores = np.tile(np.random.default_rng(0).integers(-1, 2, 300).astype(float), (4, 1))
    alone, twice = crossed(scores), simultaneous([scores, scores])
    assert alone.degrees > 100 and twice[0] == twice[1]
    assert twice[0].high - twice[0].low == pytest.approx(alone.high - alone.low, rel=0.02)
    mirrored = simultaneous([scores, -scores])
    assert mirrored[0] == pytest.approx(twice[0], rel=1e-3) and mirrored[1].low == pytest.approx(
        -twice[0].high, rel=1e-3
    )


def test_correlations_are_those_that_were_planted() -> None:
    scores = binary(np.random.default_rng(1), 3, 30, 3000, by_item=0.5, by_fit=0.3)
    correlations = statistics.correlations(statistics.mean_squares(scores), 30, 3000)
    # All are compared with the same scratch, which makes half of the variance of each difference.
    assert correlations[np.triu_indices(3, 1)] == pytest.approx([0.5] * 3, abs=0.15)
    assert np.diag(correlations) == pytest.approx([1] * 3) and np.linalg.eigvalsh(correlations).min() > -1e-12


def test_the_correlation_is_that_of_the_formula() -> None:
    parts = [np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[2.0, 1.2], [1.2, 2.0]]), np.array([[1.0, 0.5], [0.5, 1.0]])]
    correlations = statistics.correlations(statistics.Squares(*parts), 1000, 1000)
    assert correlations[0, 1] == pytest.approx((1.0 + 1.2 - 0.5) / (2.0 + 2.0 - 1.0), rel=0.01)


def test_two_fits_alone_correlate_nothing() -> None:
    # With one degree of freedom every correlation of the fits is 1 or -1.
    scores = np.random.default_rng(0).standard_normal((4, 2, 1)) + np.zeros((1, 1, 50))
    squares = statistics.mean_squares(scores)
    np.testing.assert_array_equal(statistics.correlations(squares, 2, 50), np.eye(4))


def test_where_shapes_differ_the_bound_is_sidaks() -> None:
    rng = np.random.default_rng(3)
    scores = [rng.integers(-1, 2, (fits, items)).astype(float) for fits, items in ((5, 100), (4, 100), (5, 300))]
    for table, interval in zip(scores, simultaneous(scores, 0.95), strict=True):
        assert interval[:2] == pytest.approx(crossed(table, 0.95 ** (1 / 3))[:2], abs=1e-3)


# Verdicts


def test_the_words_are_read_off_the_intervals() -> None:
    rng, words = np.random.default_rng(4), set()
    for _ in range(40):
        items = rng.choice([400, 2000])
        scores = binary(rng, 2, 5, items, by_item=0.3, by_fit=0.05, better=rng.choice([0.0, 0.1, 0.4]))
        scores = np.concatenate([scores, -scores])
        family = verdicts(scores, 0.05)
        assert [verdict.interval for verdict in family] == simultaneous(scores, 0.95)
        assert [verdict.narrow for verdict in family] == simultaneous(scores, 0.9)
        for verdict in family:
            low, high = verdict.interval.low, verdict.interval.high
            inside = max(-verdict.narrow.low, verdict.narrow.high) < 0.05
            assert (verdict.word == "positive") == (low > 0) and (verdict.word == "negative") == (high < 0)
            assert (verdict.word == "equivalent") == (low <= 0 <= high and inside)
            assert (verdict.p < 0.05) == (verdict.word in ("positive", "negative"))
            assert (verdict.size == "beyond") == (low > 0.05 or high < -0.05) and (verdict.size == "within") == inside
            words.add((verdict.word, verdict.size))
    assert words == {
        *(("positive", size) for size in ("beyond", "within", "open")),
        *(("negative", size) for size in ("beyond", "within", "open")),
        *(("equivalent", "within"), ("undecided", "open")),
    }


def test_a_difference_may_be_sure_and_too_small_to_matter() -> None:
    items = np.tile([1.0, 0, 0, -1, 1, 0, 0, 0], 500)
    (verdict,) = verdicts([np.tile(items, (5, 1))], 0.2)
    assert 0 < verdict.interval.low < verdict.interval.high < 0.2
    assert (verdict.word, verdict.size) == ("positive", "within")


def test_two_fits_are_told_to_be_few() -> None:
    scores = np.random.default_rng(0).integers(-1, 2, (3, 100)).astype(float)
    few, enough = verdicts([scores[:2], scores], 0.1)
    assert "three seeds or more" in few.warning and enough.warning == ""


def test_the_adjusted_p_is_the_level_at_which_the_interval_touches_0() -> None:
    scores = binary(np.random.default_rng(5), 3, 5, 300, by_item=0.3, by_fit=0.05, better=0.1)
    for k, verdict in enumerate(verdicts(scores, 0.01)):
        interval = simultaneous(scores, 1 - verdict.p)[k]
        assert min(abs(interval.low), abs(interval.high)) < 1e-8
        alone = verdicts([scores[k]], 0.01)[0].p
        assert alone < verdict.p < 3 * alone or verdict.p == 1


def test_equivalence_is_two_one_sided_tests() -> None:
    items = np.random.default_rng(6).integers(-1, 2, 2000).astype(float)
    for margin in np.linspace(0.01, 0.08, 15):
        p = max(
            stats.ttest_1samp(items, -margin, alternative="greater").pvalue,
            stats.ttest_1samp(items, margin, alternative="less").pvalue,
        )
        assert equivalent(over_items(items, 0.9), margin) == (p < 0.05)
    assert not equivalent(Interval(0.0, -0.02, 0.02, 0.01, 9, 0.9), 0.02)


@pytest.mark.parametrize(("degrees", "difference"), [(4.5, 0.02), (30, 0.04), (2000, -0.02), (1, 0.5), (1e5, 3.0)])
def test_power_is_how_often_t_exceeds_the_critical_value(degrees: float, difference: float) -> None:
    rng = np.random.default_rng(7)
    critical = stats.t.isf(0.01, degrees)
    t = (rng.standard_normal(200_000) + difference / 0.01) / np.sqrt(rng.chisquare(degrees, 200_000) / degrees)
    assert power(0.01, degrees, critical, difference) == pytest.approx(np.mean(np.abs(t) > critical), abs=0.005)
    assert power(0.01, degrees, critical, 0.0) == pytest.approx(0.02, abs=1e-4)


def test_power_agrees_with_scipy_and_is_a_number_where_scipys_is_not() -> None:
    for degrees, critical, shift in ((4.5, 2.9, 2.0), (1.0, 12.7, 5.0), (30, 2.04, 3.0), (2000, 2.7, 0.1)):
        expected = stats.nct.sf(critical, degrees, shift) + stats.nct.cdf(-critical, degrees, shift)
        assert power(0.01, degrees, critical, shift / 100) == pytest.approx(expected, abs=1e-4)
    # One degree of freedom: |t| > 100 where chi < 1 if the truth is 100 standard errors.
    assert power(0.01, 1, 100, 1.0) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-3)


@pytest.mark.parametrize("fits", [3, 5, 10])
def test_the_range_of_the_power_holds_the_true_power_in_9_of_10_studies(fits: int) -> None:
    """Fits alone vary, so that the squared standard error is exactly chi-square; the true power is noncentral t's."""
    rng = np.random.default_rng(fits)
    margin, many, critical = 2.5 / math.sqrt(fits), 150, stats.t.isf(0.025, fits - 1)
    true = power(1 / math.sqrt(fits), fits - 1, critical, margin)
    t = rng.standard_normal(200_000), np.sqrt(rng.chisquare(fits - 1, 200_000) / (fits - 1))
    narrow = stats.t.isf(0.05, fits - 1)
    half = narrow * t[1] / math.sqrt(fits)
    equivalent = np.mean((np.abs(t[0]) < critical * t[1]) & (np.abs(t[0]) / math.sqrt(fits) + half < margin))
    stated = power_equivalent(1 / math.sqrt(fits), fits - 1, critical, narrow, margin)
    assert stated == pytest.approx(equivalent, abs=0.005)
    held = np.zeros(2)
    for _ in range(many):
        scores = np.repeat(rng.standard_normal((fits, 1)), 1000, 1)
        (verdict,) = verdicts([scores], margin)
        for k, (low, high, truth) in enumerate(((*verdict.power, true), (*verdict.power_equivalent, equivalent))):
            assert 0 <= low <= high <= 1
            held[k] += low <= truth <= high
    assert np.all(np.abs(held / many - 0.9) < 3 * math.sqrt(0.9 * 0.1 / many))


# What the claims come to


def outcomes(rng: np.random.Generator, repetitions: int, m: int, fits: int, items: int, **effects: float) -> np.ndarray:
    """[repetitions, 2]: the share of m intervals that hold alone, and whether all simultaneous ones do."""
    expected = truth(effects["by_item"], effects["by_fit"], effects.get("better", 0.0))
    result = []
    for _ in range(repetitions):
        scores = binary(rng, m, fits, items, **effects)
        squares = statistics.mean_squares(scores)
        error, degrees = statistics.standard_errors(squares, fits, items)
        means = scores.mean((1, 2))
        alone = stats.t.sf(np.abs(means - expected) / error, degrees)
        together = alone.min() > 0.025  # then the family's p is above 0.05 too
        if not together:
            correlation = statistics.correlations(squares, fits, items)
            together = statistics.largest_beyond(correlation)(-stats.norm.ppf(alone.min())) > 0.05
        result.append((np.mean(alone > 0.025), together))
    return np.array(result)


EFFECTS = {
    "the same strategy again": {"by_item": 0.0, "by_fit": 0.1},
    "fits vary": {"by_item": 0.0, "by_fit": 0.3},
    "items vary": {"by_item": 0.5, "by_fit": 0.05},
    "both vary": {"by_item": 0.7, "by_fit": 0.2},
    "all are better": {"by_item": 0.5, "by_fit": 0.2, "better": 0.4},
}


@pytest.mark.parametrize("name", ["the same strategy again", "both vary"])
def test_with_five_fits_the_intervals_hold_as_often_as_they_say(name: str) -> None:
    """One standard error of the simulation is 0.3 % alone and 0.8 % of the families."""
    alone, family = outcomes(np.random.default_rng(8), 800, 8, 5, 500, **EFFECTS[name]).mean(0)
    assert 0.93 <= alone <= 0.97
    assert family >= 0.94


def test_pooling_fits_and_items_would_be_wrong_most_of_the_time() -> None:
    """That the simulation can tell: the same scores, as if all were independent."""
    rng, wrong = np.random.default_rng(9), 0
    for _ in range(200):
        scores = binary(rng, 1, 5, 500, **EFFECTS["both vary"])[0]
        wrong += abs(scores.mean()) > 1.96 * scores.std(ddof=1) / math.sqrt(scores.size)
    assert wrong > 0.3 * 200


def test_no_effect_is_found_in_at_most_6_of_100_families_of_two_strategies() -> None:
    """Where the truth is 0, an interval without it is a false verdict; one standard error is 0.7 %."""
    _, family = outcomes(np.random.default_rng(10), 1000, 2, 5, 300, **EFFECTS["fits vary"]).mean(0)
    assert 1 - family <= 0.06


def test_a_planted_effect_is_found_as_often_as_the_power_says() -> None:
    effects = {**EFFECTS["both vary"], "better": 0.3}
    margin = truth(effects["by_item"], effects["by_fit"], 0.3)
    rng = np.random.default_rng(11)
    judged = [verdicts(binary(rng, 1, 10, 300, **effects), margin)[0] for _ in range(300)]
    positive = np.mean([verdict.word == "positive" for verdict in judged])
    assert 0.3 < positive < 0.95
    # The power is of an estimated error, so itself estimated: its range holds the true one in 9 of 10 studies.
    holds = np.mean([verdict.power[0] <= positive <= verdict.power[1] for verdict in judged])
    assert holds > 0.8 and np.mean([verdict.power[1] - verdict.power[0] for verdict in judged]) < 0.7


def share(
    name: str, fits: int, items: int, truth: float, replications: int, size: int = 1
) -> simulate_verdicts.Moments:
    """After: of studies of a named generator, judged with items in groups of `size`."""
    study, groups = GENERATORS[name], np.arange(items) // size
    rng = np.random.default_rng([fits, items, size])
    return simulate_verdicts.simulated(rng, study, study.better(truth), fits, groups, replications)[1]


GENERATORS = {
    "rare": Study(4.3, 0.05, 0.05, 1.5, 0.2, 0.7),
    "rare, fits agree": Study(4.3, 0.0, 0.0, 1.5, 0.2, 0.05),
    "half": Study(3.5, 0.0, 0.0, 1.5, 0.2, 0.05),
    "groups": simulate_verdicts.STRONG,
    "even groups": simulate_verdicts.EVEN,
}


def at_most(errors: float, replications: int, nominal: float) -> bool:
    """Whether a rate of `nominal` makes as many errors as these, or more, in one of 1,000 simulations or more."""
    return bool(errors <= stats.binom.isf(0.001, replications, nominal))


@pytest.mark.parametrize(
    ("name", "fits", "items", "margin"),
    [
        *(("rare", fits, 100, 0.005) for fits in (2, 3, 5)),
        ("rare", 3, 500, 0.005),
        *(("rare, fits agree", fits, 100, 0.008) for fits in (2, 3, 10)),
        *(("half", fits, 100, margin) for fits, margin in itertools.product((3, 10), (0.01, 0.03, 0.05))),
    ],
)
def test_a_difference_of_the_margin_is_called_within_it_in_at_most_5_percent(
    name: str, fits: int, items: int, margin: float
) -> None:
    """Where hardly any item differs, and either side of the margin is as near."""
    replications = 1000
    moments = share(name, fits, items, -margin, replications)
    low, high = moments.ends(0.9)
    assert at_most(np.sum((low > -margin) & (high < margin)), replications, 0.05)
    low, high = moments.ends()
    assert at_most(np.sum(low > 0), replications, 0.025) and at_most(np.sum(high < -margin), replications, 0.025)


@pytest.mark.parametrize("fits", [2, 3, 5])
@pytest.mark.parametrize("name", ["rare", "rare, fits agree"])
def test_no_difference_gets_a_direction_in_at_most_5_percent_where_hardly_any_item_differs(
    name: str, fits: int
) -> None:
    low, high = share(name, fits, 500, 0.0, 1000).ends()
    assert at_most(np.sum((low > 0) | (high < 0)), 1000, 0.05)


@pytest.mark.parametrize("size", [2, 5, 20])
def test_with_their_groups_named_items_that_are_alike_have_intervals_that_hold(size: int) -> None:
    low, high = share("even groups", 5, 1000, 0.0, 500, size).ends()
    held = np.sum((low <= 0) & (high >= 0))
    assert stats.binom.ppf(0.001, 500, 0.95) <= held
    # And they are not wider than they need be.
    if size < 20:
        assert held <= stats.binom.isf(0.001, 500, 0.97)


def test_without_their_groups_they_would_hold_half_of_the_time() -> None:
    """That the simulation can tell."""
    rng = np.random.default_rng(0)
    before, after = simulate_verdicts.simulated(rng, simulate_verdicts.STRONG, 0.0, 5, np.arange(1000) // 20, 300)
    held = [np.mean((low <= 0) & (high >= 0)) for low, high in (before.ends(), after.ends())]
    assert held[0] < 0.6 and held[1] > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)


@pytest.mark.parametrize("kind", ["1 to 39", "half of one, half of 20", "a long tail"])
def test_groups_of_unequal_sizes_have_intervals_that_hold(kind: str) -> None:
    rng, groups = np.random.default_rng(1), simulate_verdicts.sizes(kind, 1000)
    low, high = simulate_verdicts.simulated(rng, simulate_verdicts.EVEN, 0.0, 5, groups, 500)[1].ends()
    # The degrees are those of groups of one size: a point less is what that costs.
    assert np.sum((low <= 0) & (high >= 0)) >= stats.binom.ppf(0.001, 500, 0.94)


def test_both_axes_hold_for_a_family() -> None:
    """Eight comparisons with one scratch, half without a difference and half with that of the margin."""
    study, families = Study(), 80
    margin, rng = 0.06, np.random.default_rng(2)
    truths = np.array([0.0, -margin] * 4)
    better = np.array([study.better(truth) for truth in truths])
    wrong = np.zeros(3)
    for _ in range(families):
        scores = simulate_verdicts.scores(rng, study, better, 5, np.arange(300), together=True)
        family = verdicts(scores, margin)
        null, edge = family[::2], family[1::2]
        wrong += (
            any(verdict.word in ("positive", "negative") for verdict in null)
            or any(verdict.word == "positive" for verdict in edge),
            any(verdict.size == "beyond" for verdict in family),
            any(verdict.size == "within" for verdict in edge),
        )
    assert all(at_most(count, families, 0.05) for count in wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("fits", "items", "repetitions"), [(5, 500, 2000), (10, 500, 1000), (5, 2000, 500)])
@pytest.mark.parametrize("effects", EFFECTS.values(), ids=EFFECTS)
def test_many_more_intervals_hold(fits: int, items: int, repetitions: int, effects: dict[str, float]) -> None:
    alone, family = outcomes(np.random.default_rng(12), repetitions, 8, fits, items, **effects).mean(0)
    assert 0.93 <= alone <= 0.97
    assert stats.binom.cdf(round(repetitions * family), repetitions, 0.94) > 0.05


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossed(np.zeros((1, 9))), "scores of 1 fit: give two seeds or more, or use `over_items`"),
        (lambda: crossed(np.zeros((3, 1))), "scores of 1 test item"),
        (lambda: crossed(np.zeros(9)), r"shape \(9,\): give finite numbers, \[fits, items\]"),
        (lambda: crossed(np.full((3, 4), np.nan)), "give finite numbers"),
        (lambda: simultaneous([np.zeros((3, 4)), np.zeros((1, 4))]), "scores of 1 fit"),
        (lambda: over_items(np.zeros((2, 3))), r"\[items\], two or more"),
        (lambda: over_items(np.zeros(1)), r"\[items\], two or more"),
        (lambda: wilson(3, 2), "3 right of 2 test items"),
        (lambda: wilson(0, 0), "at least one item"),
        (lambda: wilson(1, 2, 95), "level 95 is outside"),
        (lambda: crossed(np.zeros((3, 4)), 1.0), "level 1.0 is outside"),
        (lambda: mcnemar(np.ones(3, bool), np.ones(4, bool)), "on the same n items"),
        (lambda: verdicts([np.zeros((3, 4))], 0.0), "margin 0.0"),
        (lambda: verdicts([np.zeros((3, 4))], math.inf), "margin inf"),
        (lambda: verdicts([np.zeros((3, 4))], 0.1, 0.5), "level 0.5: equivalence needs more"),
        (lambda: crossed(np.zeros((3, 4)), groups=np.arange(3)), r"groups of shape \(3,\) and int64 of 4 test items"),
        (lambda: crossed(np.zeros((3, 4)), groups=np.arange(4) / 2), "float64 of 4 test items: give ints"),
        (lambda: verdicts([np.zeros((3, 4))], 0.1, groups=np.ones(4, int)), "all 4 test items are of one group"),
        (lambda: over_items(np.zeros(4), groups=np.zeros(4, int)), "of one group: give two groups or more"),
        (lambda: mcnemar(np.ones(3, bool), np.ones(3, bool), np.array(["a", "b", "c"])), "give ints"),
    ],
)
def test_what_cannot_be_judged_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
