"""What stands beside the verdicts, each figure against one computed otherwise."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tljax.study import asides, statistics
from tljax.study.milestones import milestones
from tljax.study.results import Result
from tljax.study.verdicts import Cell, compared, conditions_of

NAMES, BUDGETS, ITEMS, SEEDS = ("full", "head_only", "lp_ft"), (10, 100), 300, 6


@pytest.fixture(scope="module")
def right():
    """{cell: {seed: rights and wrongs}} of three strategies and scratch at two budgets."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.5, ITEMS)
    table = {}
    for i, name in enumerate(("scratch", *NAMES)):
        for budget in BUDGETS:
            source = None if name == "scratch" else "a"
            chance = 0.2 * i + rng.normal(0, 0.1, (SEEDS, 1)) + hard + rng.normal(0, 1, (SEEDS, ITEMS)) > 0
            table[Cell(source, "b", name, budget)] = dict(enumerate(chance))
    return table


@pytest.fixture(scope="module")
def family(right):
    return compared(right, 0.02, 0.95)[0]


def by_hand(right, first, second, budget):
    """Differences of two strategies at one budget, [seeds, items]."""
    cells = [Cell(None if name == "scratch" else "a", "b", name, budget) for name in (first, second)]
    return np.array([right[cells[0]][seed].astype(float) - right[cells[1]][seed] for seed in range(SEEDS)])


def over_labels(right, first, second):
    """Of two budgets each has half of the area."""
    return (by_hand(right, first, second, 10) + by_hand(right, first, second, 100)) / 2


def test_the_spread_is_that_of_the_means_of_pairs(right, family):
    for spread in asides.spreads(family, right):
        means = over_labels(right, spread.comparison.strategy, "scratch").mean(1)
        assert spread.sd == pytest.approx(math.sqrt(np.sum((means - means.mean()) ** 2) / (SEEDS - 1)))
        assert spread.effect == pytest.approx(means.mean() / spread.sd)
        assert spread.outperforms[0] == np.mean([1.0 if mean > 0 else 0.5 if mean == 0 else 0.0 for mean in means])


def test_the_ends_of_outperforming_are_where_the_binomial_tail_is_a_fortieth():
    wins, ties, pairs = 6, 1, 9
    share, low, high = asides.outperforming(np.array([1.0] * wins + [0.0] * ties + [-1.0] * (pairs - wins - ties)))
    tail = lambda p, counts: sum(math.comb(pairs, k) * p**k * (1 - p) ** (pairs - k) for k in counts)  # noqa: E731
    assert share == 6.5 / 9
    assert tail(low, range(wins, pairs + 1)) == pytest.approx(0.025, abs=1e-6)
    assert tail(high, range(wins + ties + 1)) == pytest.approx(0.025, abs=1e-6)
    assert asides.outperforming(np.ones(5))[1] < 0.5 < asides.outperforming(np.ones(6))[1]


def test_bands_are_simultaneous_over_budgets_and_strategies_and_have_no_word(right):
    bands = asides.at_each_budget(right, 0.02, 0.95, "scratch")
    places = [(name, budget) for budget in BUDGETS for name in NAMES]
    assert sorted((each.strategy, each.budgets[0]) for each in bands) == sorted(places)
    values = {place: by_hand(right, place[0], "scratch", place[1]) for place in places}
    expected = dict(zip(values, statistics.simultaneous(list(values.values())), strict=True))
    for each in bands:
        interval = expected[each.strategy, each.budgets[0]]
        assert (each.low, each.high) == pytest.approx((interval.low, interval.high), abs=1e-12) and each.word == ""
    alone = statistics.crossed(values["full", 10])
    assert expected["full", 10].high - expected["full", 10].low > 1.1 * (alone.high - alone.low)
    assert not asides.at_each_budget({cell: x for cell, x in right.items() if cell.budget == 10}, 0.02, 0.95, "scratch")


@pytest.mark.parametrize("sequence", [False, True])
def test_all_pairs_are_the_differences_of_every_two(right, family, sequence):
    terms = conditions_of(right, ["b"], 0.02, sequence=sequence)
    pairs = {(each.strategy, each.against): each for each in asides.all_pairs(right, family, terms, 0.95)}
    assert set(pairs) == set(itertools.combinations((*NAMES, "scratch"), 2))
    for (first, second), each in pairs.items():
        values = over_labels(right, first, second)
        assert each.mean == pytest.approx(values.mean()) and each.fits == SEEDS and each.word == ""
        alone = statistics.crossed(values)
        assert each.low < alone.low < alone.high < each.high  # six at once are wider than one
    assert pairs["full", "lp_ft"].mean == pytest.approx(pairs["full", "scratch"].mean - pairs["lp_ft", "scratch"].mean)


def test_a_class_is_judged_on_its_own_examples(right):
    labels = {"b": np.arange(ITEMS) % 3}
    labels["b"][labels["b"] == 2] = 3  # no example is of class 2
    rows = asides.by_class(right, labels, conditions_of(right, ["b"], 0.02), "scratch", 0.95)
    assert [(row.strategy, row.budget) for row in rows] == [(name, 100) for name in NAMES]
    for row in rows:
        values = by_hand(right, row.strategy, "scratch", 100)
        assert [interval is None for interval in row.intervals] == [False, False, True, False]
        for k in (0, 1, 3):
            expected = statistics.crossed(values[:, labels["b"] == k], 1 - 0.05 / 9)
            assert row.intervals[k][:3] == pytest.approx(expected[:3])
        assert all(interval.low >= -1 and interval.high <= 1 for interval in row.intervals if interval)
    shares = [np.mean(labels["b"] == k) for k in (0, 1, 3)]
    means = [rows[0].intervals[k].mean for k in (0, 1, 3)]
    assert np.dot(shares, means) == pytest.approx(by_hand(right, "full", "scratch", 100).mean())


def fit(strategy, seed, end, **known):
    source = None if strategy == "scratch" else "a"
    about = {"name": f"{strategy}{seed}", "source": source, "target": "b", "strategy": strategy, "seed": seed}
    return Result(**about, train_examples=10, steps=100, test_accuracy=end, **known)


CURVES = {
    f"{strategy}{seed}": {"step": np.array([0, 50, 100]), "accuracy": np.array([0.1, 0.3, 0.5]) + 0.01 * seed}
    for strategy in ("scratch", "cheap", "dear")
    for seed in range(3)
}


def test_at_equal_cost_scratch_is_where_its_curve_was_then():
    """A step that costs a fourth ends where scratch has done 25 steps: 0.2; one that costs twice, after its end."""
    fits = [fit("scratch", seed, 0.5 + 0.01 * seed, step_flops=4.0, seconds=8.0) for seed in range(3)]
    fits += [fit("cheap", seed, 0.4 + 0.02 * seed, step_flops=1.0, seconds=4.0) for seed in range(3)]
    fits += [fit("dear", seed, 0.6, step_flops=8.0) for seed in range(3)]
    cheap, dear = asides.equal_costs(fits, CURVES)
    expected = np.array([0.4 + 0.02 * seed - (0.2 + 0.01 * seed) for seed in range(3)])
    half = stats.t.ppf(0.975, 2) * expected.std(ddof=1) / math.sqrt(3)
    assert cheap.flops == pytest.approx((0.21, 0.21 - half, 0.21 + half)) and cheap.longer == (False, False)
    assert cheap.seconds[0] == pytest.approx(0.42 - 0.31)  # 50 of its steps in the same seconds
    assert dear.flops[0] == pytest.approx(0.6 - 0.51) and dear.longer == (True, False) and dear.seconds is None
    assert asides.equal_costs(fits, {}) == []
    later = {name: {key: values[1:] for key, values in curve.items()} for name, curve in CURVES.items()}
    assert next((each.strategy, each.flops) for each in asides.equal_costs(fits, later)) == ("cheap", None)


def test_at_equal_cost_and_at_a_threshold_both_sides_are_of_the_examples_of_the_curve():
    """Curves are of the validation split: an end on a shifted test set, 0.4 lower, is not held against them."""
    ends = {"scratch": 0.5, "cheap": 0.5, "dear": 0.5}
    fits = [
        fit(name, seed, end - 0.4, step_flops=4.0, validation_accuracy=end + 0.01 * seed)
        for name, end in ends.items()
        for seed in range(3)
    ]
    cheap, dear = asides.equal_costs(fits, CURVES)
    assert cheap.flops[0] == dear.flops[0] == pytest.approx(0.0, abs=1e-12)
    with_other = [each if each.strategy != "cheap" else replace(each, validation_accuracy=None) for each in fits]
    assert [each.strategy for each in asides.equal_costs(with_other, CURVES)] == ["dear"]
    # Scratch ends with 0.51 in the mean, which two of three curves reach at their end; of the test set it would be 0.1.
    assert [each.time_to_threshold[0] for each in asides.milestones(fits, CURVES)] == [100.0, 100.0, 100.0]
    rows = milestones([replace(each, seconds=1.0) for each in fits], CURVES)
    assert [row["time_to_threshold"] for row in rows] == [100.0] * 3
    assert [row["asymptote"] for row in rows] == pytest.approx([0.1] * 3)


def test_the_median_lies_between_its_order_statistics_as_often_as_is_said():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(4000):
        _, low, high, coverage = asides.median_interval(list(rng.exponential(size=9)))
        held.append(low <= math.log(2) <= high)
    assert coverage >= 0.95 and np.mean(held) == pytest.approx(coverage, abs=0.012)
    assert asides.median_interval([1.0, math.inf, math.inf]) == (math.inf, 1.0, math.inf, 0.75)


def test_milestones_have_the_intervals_of_their_means():
    fits = [fit(name, seed, end + 0.01 * seed) for name, end in (("scratch", 0.3), ("dear", 0.5)) for seed in range(3)]
    scratch, dear = asides.milestones(fits, CURVES)
    values = [0.5, 0.51, 0.52]
    ends = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert dear.asymptote == pytest.approx((0.51, *ends)) and dear.area[0] == pytest.approx(0.31)
    assert dear.time_to_threshold == (50.0, 50.0, 100.0, 0.75)  # 0.31 is reached at 50 but by the first, which has 0.3
    assert scratch.asymptote[0] == pytest.approx(0.31)
