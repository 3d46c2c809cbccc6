"""The statistics of transfer: what they compute, and that what they claim comes true as often as they claim."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from tljax.study import components
from tljax.study.statistics import (
    Interval,
    crossed,
    equivalent,
    mcnemar,
    over_items,
    power,
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
    own = np.float32(by_item) * rng.standard_normal((strategies + 1, 1, items), np.float32)
    own = own + np.float32(by_fit) * rng.standard_normal((strategies + 1, fits, 1), np.float32)
    noise = rng.standard_normal((strategies + 1, fits, items), np.float32)
    shift = np.full((strategies + 1, 1, 1), probit + better)
    shift[0] = probit
    right = shared + own + noise + shift > 0
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
    found = components.mean_squares(scores)
    x, y = scores
    fits = items = residual = 0.0
    for one, other in ((x, x), (x, y)):
        grand = one.mean(), other.mean()
        fits = 40 * sum((one[i].mean() - grand[0]) * (other[i].mean() - grand[1]) for i in range(6)) / 5
        items = 6 * sum((one[:, j].mean() - grand[0]) * (other[:, j].mean() - grand[1]) for j in range(40)) / 39
        total = sum((one[i, j] - grand[0]) * (other[i, j] - grand[1]) for i in range(6) for j in range(40))
        residual = (total - 5 * fits - 39 * items) / (5 * 39)
        place = (0, 0 if other is x else 1)
        assert [part[place] for part in found] == pytest.approx([fits, items, residual], abs=1e-10)
    assert all(np.array_equal(part, part.T) for part in found)


def test_mean_squares_agree_with_statsmodels() -> None:
    pandas = pytest.importorskip("pandas")
    anova = pytest.importorskip("statsmodels.stats.anova")
    formula = pytest.importorskip("statsmodels.formula.api")
    scores = np.random.default_rng(1).integers(-1, 2, (5, 30)).astype(float)
    fit, item = np.indices(scores.shape).reshape(2, -1)
    table = pandas.DataFrame({"score": scores.ravel(), "fit": fit, "item": item})
    expected = anova.anova_lm(formula.ols("score ~ C(fit) + C(item)", table).fit())["mean_sq"]
    assert [part.item() for part in components.mean_squares(scores[None])] == pytest.approx(list(expected), abs=1e-10)


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
    assert components.mean_squares(scores[None]).items < 0.5
    expected = stats.ttest_1samp(scores.mean(1), 0).confidence_interval(0.9)
    found = crossed(scores, 0.9)
    assert found.degrees == pytest.approx(4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_where_fits_agree_it_is_the_t_test_on_the_items() -> None:
    items = np.random.default_rng(0).integers(-1, 2, 300).astype(float)
    expected = stats.ttest_1samp(items, 0).confidence_interval(0.95)
    for found in (crossed(np.tile(items, (4, 1))), over_items(items)):
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert found.degrees == pytest.approx(299)


def test_fits_that_tie_are_no_certainty() -> None:
    scores = np.array([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]])
    assert components.mean_squares(scores[None]).fits == pytest.approx(0, abs=1e-12)
    assert crossed(scores).low < 0 < crossed(scores).high


def test_scores_that_never_vary_are_no_certainty() -> None:
    for value in (0.0, 1.0, -1.0):
        (verdict,) = verdicts([np.full((3, 5), value)], 0.01)
        assert (verdict.word, verdict.size) == ("undecided", "open") and verdict.p > 0.05
        assert verdict.interval.low < 0 < verdict.interval.high


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
        assert components.beyond(matrix)(z) == pytest.approx(1 - within, rel=0.01)


def test_the_critical_value_is_dunnetts_where_degrees_are_many() -> None:
    # Correlation 0.5, two-sided 5 %, infinite degrees: Dunnett 1964, "New tables for multiple comparisons with a
    # control", table II: 2.21, 2.35, 2.51, 2.65 of 2, 3, 5 and 8 comparisons.
    for m, expected in ((2, 2.21), (3, 2.35), (5, 2.51), (8, 2.65)):
        tail = components.tail(components.beyond((np.ones((m, m)) + np.eye(m)) / 2), m, 0.95)
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
    found = components.correlations(components.mean_squares(scores), 30, 3000)
    # All are compared with the same scratch, which makes half of the variance of each difference.
    assert found[np.triu_indices(3, 1)] == pytest.approx([0.5] * 3, abs=0.15)
    assert np.diag(found) == pytest.approx([1] * 3) and np.linalg.eigvalsh(found).min() > -1e-12


def test_the_correlation_is_that_of_the_formula() -> None:
    parts = [np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[2.0, 1.2], [1.2, 2.0]]), np.array([[1.0, 0.5], [0.5, 1.0]])]
    found = components.correlations(components.Squares(*parts), 1000, 1000)
    assert found[0, 1] == pytest.approx((1.0 + 1.2 - 0.5) / (2.0 + 2.0 - 1.0), rel=0.01)


def test_two_fits_alone_correlate_nothing() -> None:
    # With one degree of freedom every correlation of the fits is 1 or -1.
    scores = np.random.default_rng(0).standard_normal((4, 2, 1)) + np.zeros((1, 1, 50))
    squares = components.mean_squares(scores)
    np.testing.assert_array_equal(components.correlations(squares, 2, 50), np.eye(4))


def test_where_shapes_differ_the_bound_is_sidaks() -> None:
    rng = np.random.default_rng(3)
    scores = [rng.integers(-1, 2, (fits, items)).astype(float) for fits, items in ((5, 100), (4, 100), (5, 300))]
    for one, interval in zip(scores, simultaneous(scores, 0.95), strict=True):
        assert interval[:2] == pytest.approx(crossed(one, 0.95 ** (1 / 3))[:2], abs=1e-3)


# Verdicts


def test_the_words_are_read_off_the_intervals() -> None:
    rng, words = np.random.default_rng(4), set()
    for _ in range(20):
        scores = binary(rng, 4, 5, 400, by_item=0.3, by_fit=0.05, better=rng.choice([-0.4, 0.0, 0.4]))
        found = verdicts(scores, 0.05)
        assert [one.interval for one in found] == simultaneous(scores, 0.95)
        assert [one.narrow for one in found] == simultaneous(scores, 0.9)
        for one in found:
            low, high = one.interval.low, one.interval.high
            inside = max(-one.narrow.low, one.narrow.high) < 0.05
            assert (one.word == "positive") == (low > 0) and (one.word == "negative") == (high < 0)
            assert (one.word == "equivalent") == (low <= 0 <= high and inside)
            assert (one.p < 0.05) == (one.word in ("positive", "negative"))
            words.add(one.word)
    assert words == {"positive", "negative", "equivalent", "undecided"}


def test_the_adjusted_p_is_the_level_at_which_the_interval_touches_0() -> None:
    scores = binary(np.random.default_rng(5), 3, 5, 300, by_item=0.3, by_fit=0.05, better=0.1)
    for k, one in enumerate(verdicts(scores, 0.01)):
        interval = simultaneous(scores, 1 - one.p)[k]
        assert min(abs(interval.low), abs(interval.high)) < 1e-8
        alone = verdicts([scores[k]], 0.01)[0].p
        assert alone < one.p < 3 * alone or one.p == 1


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


# What the claims come to


def outcomes(rng: np.random.Generator, repetitions: int, m: int, fits: int, items: int, **effects: float) -> np.ndarray:
    """[repetitions, 2]: the share of m intervals that hold alone, and whether all simultaneous ones do."""
    expected = truth(effects["by_item"], effects["by_fit"], effects.get("better", 0.0))
    found = []
    for _ in range(repetitions):
        scores = binary(rng, m, fits, items, **effects)
        squares = components.mean_squares(scores)
        error, degrees = components.errors(squares, fits, items)
        means = scores.mean((1, 2))
        alone = stats.t.sf(np.abs(means - expected) / error, degrees)
        together = alone.min() > 0.025  # then the family's p is above 0.05 too
        if not together:
            correlation = components.correlations(squares, fits, items)
            together = components.beyond(correlation)(-stats.norm.ppf(alone.min())) > 0.05
        found.append((np.mean(alone > 0.025), together))
    return np.array(found)


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
    found = [verdicts(binary(rng, 1, 10, 300, **effects), margin)[0] for _ in range(300)]
    positive = np.mean([one.word == "positive" for one in found])
    assert 0.3 < positive < 0.95
    # The power is of an estimated error, so itself estimated: a little off on average.
    assert positive == pytest.approx(np.mean([one.power for one in found]), abs=3 * 0.5 / math.sqrt(300))


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
    ],
)
def test_what_cannot_be_judged_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
