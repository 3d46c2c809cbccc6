"""The study: which differences are judged, how verdicts and looks are told, what learning curves say of transfer."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from experiments.pages import compare as compare_page
from experiments.runs import predictions
from experiments.runs.judging import Judging
from tljax.study import milestones
from tljax.study import verdicts as comparisons
from tljax.study.results import Result
from tljax.study.verdicts import Cell
from tljax.types import InputError

RNG = np.random.default_rng(0)


def cell(strategy="full", budget=10, target="b", source="a"):
    return Cell(None if strategy == "scratch" else source, target, strategy, budget)


def fits(rates, items=400, seed=0):
    """{seed: bool [items]} of fits that are right as often as `rates` say, on items of one difficulty each."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=items)
    return {i: hard + 0.1 * rng.normal(size=items) < rate for i, rate in enumerate(rates)}


def rows_of(table):
    return [
        Result(
            name=f"{key.strategy}-{key.budget}-{seed}",
            source=key.source,
            target=key.target,
            strategy=key.strategy,
            seed=seed,
            train_examples=key.budget,
            test_accuracy=float(right.mean()),
            steps=100,
            seconds=1.0,
        )
        for key, all_of in table.items()
        for seed, right in all_of.items()
    ]


def as_read(table, **more):
    """As if the fits had been read from somewhere: class 1 is the right one of every example."""
    predicted = {
        f"{key.strategy}-{key.budget}-{s}": right.astype(int)
        for key, fits_of_cell in table.items()
        for s, right in fits_of_cell.items()
    }
    items = len(next(iter(predicted.values())))
    return predictions.Predictions(rows_of(table), predicted, {"b": np.ones(items, int)}, **more)


def test_differences_are_paired_by_seed():
    table = {
        cell(): fits([0.7, 0.8, 0.9]),
        cell("scratch"): {k: v for k, v in fits([0.6, 0.6, 0.6], seed=1).items() if k},
    }
    scores = comparisons.differences(table, cell(), cell("scratch"))
    for row, seed in zip(scores, (1, 2), strict=True):
        gain = table[cell()][seed].mean() - table[cell("scratch")][seed].mean()
        assert row.mean() == pytest.approx(gain)


def test_fits_that_share_no_seed_are_not_compared():
    table = {cell(): fits([0.7, 0.8]), cell("scratch"): {seed + 5: right for seed, right in fits([0.6, 0.6]).items()}}
    assert comparisons.compared(table, 0.02, 0.95) == ([], [])


def test_the_area_is_the_integral_over_the_logarithm_of_the_budget():
    budgets = (10, 50, 1000)
    table = {cell(name, n): fits([rate], seed=n) for n in budgets for name, rate in (("full", 0.8), ("scratch", 0.6))}
    gains = [comparisons.differences(table, cell(budget=n), cell("scratch", n)).mean() for n in budgets]
    scores = comparisons.area(table, [cell(budget=n) for n in budgets], [cell("scratch", n) for n in budgets])
    integral = np.trapezoid(gains, np.log(budgets)) / np.log(100)
    assert scores.mean() == pytest.approx(integral)


def test_words_agree_with_intervals_and_each_target_has_its_share_of_the_level():
    table = {}
    for target in ("b", "c"):
        for name, rate in (("scratch", 0.5), ("full", 0.7), ("worse", 0.3), ("same", 0.5)):
            table[cell(name, target=target)] = fits(rate + 0.01 * RNG.normal(size=8), 2000)
    family, others = comparisons.compared(table, 0.02, 0.95)
    assert not others and len(family) == 6
    for comparison in family:
        assert (comparison.word == "positive") == (comparison.low > 0) and (comparison.word == "negative") == (
            comparison.high < 0
        )
        alone = comparisons.alone(
            table, [cell(comparison.strategy, target=comparison.target)], comparisons.Conditions(0.02), 0.975
        )
        assert (
            comparison.high - comparison.low > alone.high - alone.low
        )  # the family's, wider than one by itself at the target's level
    assert {comparison.strategy: comparison.word for comparison in family}["full"] == "positive"
    assert {comparison.strategy: comparison.word for comparison in family}["worse"] == "negative"


def test_one_comparison_of_one_budget_is_the_t_interval_over_seeds_where_items_say_nothing_more():
    """With fits that differ far more than items do, the crossed interval is Student's on the seeds' differences."""
    gains = np.array([0.1, 0.3, 0.2, 0.5, 0.15])
    table = {cell("scratch"): {i: np.zeros(100, bool) for i in range(5)}}
    table[cell()] = {i: np.arange(100) < 100 * gain for i, gain in enumerate(gains)}
    verdict = comparisons.alone(table, [cell()], comparisons.Conditions(0.01), 0.95)
    low, high = stats.t.interval(0.95, 4, gains.mean(), gains.std(ddof=1) / np.sqrt(5))
    assert verdict.low < low and high < verdict.high  # items are drawn anew too, so never narrower
    assert verdict.high - verdict.low < 1.3 * (high - low)


def test_a_single_pair_has_the_exact_p_of_mcnemar():
    table = {cell(): fits([0.55], 60), cell("scratch"): fits([0.45], 60, seed=0)}
    a, b = table[cell()][0], table[cell("scratch")][0]
    only, other = int((a & ~b).sum()), int((b & ~a).sum())
    assert comparisons.alone(table, [cell()], comparisons.Conditions(0.01), 0.95).p == pytest.approx(
        stats.binomtest(only, only + other).pvalue
    )


def test_a_single_pair_is_described_and_not_judged():
    family, _ = comparisons.compared({cell(): fits([0.9]), cell("scratch"): fits([0.2])}, 0.01, 0.95)
    assert [comparison.word for comparison in family] == [""] and "two seeds or more" in comparisons.sentence(
        family, 0.95
    )


def test_a_claim_beyond_the_tasks_is_refused():
    with pytest.raises(InputError, match="speak of themselves alone"):
        comparisons.compared({}, 0.01, 0.95, "targets")


def test_looks_beyond_those_planned_judge_nothing(tmp_path):
    judging = Judging(2.0, 0.95, "area", 1)
    few = {cell(): fits([0.9] * 3), cell("scratch"): fits([0.5] * 3)}
    more = {cell(): fits([0.9] * 4), cell("scratch"): fits([0.5] * 4)}

    def look(table):
        return compare_page.judged([as_read(table)], judging, [], predictions.count_look(tmp_path, table))

    for _ in range(2):  # to look at the same again is no further look
        assert [comparison.word for comparison in look(few).family] == ["positive"]
    judged = look(more)
    assert [comparison.word for comparison in judged.family] == [""] and any(
        "looked at 2 times" in note for note in judged.notes
    )


def test_planned_looks_share_the_errors_that_are_allowed():
    table = {cell(): fits([0.6, 0.65, 0.7]), cell("scratch"): fits([0.5, 0.52, 0.49])}
    single, three = (
        compare_page.judged([as_read(table)], Judging(2.0, 0.95, "area", looks), []).family[0] for looks in (1, 3)
    )
    assert three.high - three.low > single.high - single.low
    assert single.mean == three.mean


def test_images_most_often_wrong_are_those():
    table = {cell(): {0: np.array([True, False, True]), 1: np.array([True, False, False])}}
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    shown = predictions.most_wrong([as_read(table, images=images, classes=("hat", "bag"))])
    first, captions = shown["b"]
    np.testing.assert_array_equal(first[:2], images[[1, 2]])
    assert captions == ["bag taken for hat; 100 % of fits are wrong", "bag taken for hat; 50 % of fits are wrong"]
    right = {cell(): {0: np.array([True, True, True])}}
    assert predictions.most_wrong([as_read(right, images=images, classes=("hat", "bag"))]) == {}


def curve(*accuracy):
    return {"step": 10 * np.arange(1, len(accuracy) + 1), "accuracy": np.array(accuracy)}


def test_milestones_of_taylor_and_stone():
    table = {
        cell("scratch"): fits([0.5, 0.5]),
        cell("scratch", 100): fits([0.7, 0.7]),
        cell(): fits([0.6, 0.6]),
    }
    rows = []
    for row in rows_of(table):
        accuracy = {"full": 0.6, "scratch": 0.5 if row.train_examples == 10 else 0.7}[row.strategy]
        row = replace(row, test_accuracy=accuracy, per_class_accuracy=[1.0, 1.0])
        row = replace(row, step_flops=100.0, source_flops=7000.0, source_seconds=3.0)
        rows.append(replace(row, start_accuracy=0.55) if row.strategy == "full" else row)
    curves = {"full-10-0": curve(0.4, 0.5, 0.6), "full-10-1": curve(0.3, 0.4, 0.55)}
    curves |= {"scratch-10-0": curve(0.2, 0.3, 0.5), "scratch-10-1": curve(0.2, 0.3, 0.4)}
    by_strategy = {
        (milestone["strategy"], milestone["train_examples"]): milestone
        for milestone in milestones.milestones(rows, curves)
    }
    full = by_strategy["full", 10]
    assert full["jump_start"] == pytest.approx(0.05) and by_strategy["scratch", 10]["jump_start"] == "not defined"
    assert full["time_to_threshold"] == 25 and by_strategy["scratch", 10]["time_to_threshold"] == ">100"
    assert full["flops"] == 2500 and full["flops_with_source"] == 9500
    assert full["seconds"] == pytest.approx(0.25) and full["seconds_with_source"] == pytest.approx(3.25)
    assert full["area"] == pytest.approx((0.5 + 0.4125) / 2)
    # Scratch goes from 0.5 at 10 labels to 0.7 at 100, so 0.6 is at 10^1.5.
    assert full["examples_saved"] == pytest.approx(10**1.5 - 10)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.9, ">90"), (0.1, "<0"), (0.2, 0.0), (None, None)])
def test_examples_saved_are_censored_where_scratch_was_not_trained(accuracy, expected):
    assert milestones.saved([(10, 0.2), (100, 0.4)], 10, accuracy) == expected


def test_strategies_are_compared_with_any_one_of_them():
    table = {cell("first"): fits([0.7, 0.72, 0.71]), cell("last"): fits([0.5, 0.52, 0.49], seed=1), cell("scratch"): {}}
    [comparison], _ = comparisons.compared(table, 0.01, 0.95, base="last")
    assert comparison.strategy == "first" and comparison.against == "last at equal target steps"
    assert comparison.mean == pytest.approx(comparisons.differences(table, cell("first"), cell("last")).mean())


def test_an_interval_ends_where_a_difference_of_accuracies_does():
    """Two fits that tie on two items say nothing at all: -100 to +100 points."""
    ties = {0: np.array([True, False]), 1: np.array([False, True])}
    right = {comparisons.Cell(None, "t", "scratch", 4): ties, comparisons.Cell("s", "t", "full", 4): ties}
    [comparison], _ = comparisons.compared(right, 0.01, 0.95)
    assert (comparison.low, comparison.high, comparison.word) == (-1, 1, "undecided")
