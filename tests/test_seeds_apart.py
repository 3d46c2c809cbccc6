"""Seeds of their own at each label budget: what an area over them is known to, who gets how many, what is trained."""

import itertools
import math

import numpy as np
import pytest
from test_draws import line, planned, planted
from test_programs import results
from test_study import as_read, cell, fits

from experiments import compare, report
from experiments.pages import compare as compare_page
from experiments.pages import design as design_page
from experiments.runs import plan, replicates
from experiments.runs.judging import Judging
from experiments.runs.settings import Settings
from tljax.study import asides, design, sample_size, sequences, statistics, verdicts
from tljax.study.statistics import Apart
from tljax.study.verdicts import Conditions
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

# ---- Errors


def test_one_part_is_an_ordinary_comparison_and_parts_are_added_as_they_are():
    rng = np.random.default_rng(0)
    scores = rng.integers(-1, 2, (3, 5, 80)).astype(float)
    groups = np.arange(80) // 2
    for of_items in (None, groups):
        alone = statistics.crossed(scores[0], groups=of_items)
        assert statistics.crossed(Apart((scores[0],)), groups=of_items) == pytest.approx(alone)
    apart = [Apart((values,)) for values in scores]
    for one, other in zip(statistics.simultaneous(apart), statistics.simultaneous(list(scores)), strict=True):
        assert one == pytest.approx(other)
    several = Apart((scores[0], 2 * scores[1][:4], scores[2][:3]))
    interval = statistics.crossed(several)
    squares = [statistics.mean_squares(part[None]) for part in several.parts]
    a, e = ([float(each[0, 0]) / len(part) for each, part in zip(kind, several.parts, strict=True)] for kind in
            ([s.fits for s in squares], [s.residual for s in squares]))  # fmt: skip
    items = sum(part.mean(0) for part in several.parts)
    rest = max(items.var(ddof=1) - sum(e), 0)
    assert interval.standard_error == pytest.approx(math.sqrt((sum(a) + rest) / 80))
    assert interval.mean == pytest.approx(items.mean()) and interval.degrees > 2
    [verdict] = statistics.verdicts([Apart((scores[0], scores[1][:2]))], 0.5)
    assert verdict.warning.startswith("Two fits say little")


def test_what_is_no_sum_of_parts_is_refused():
    part = np.zeros((3, 9))
    for parts, words in (((part, np.zeros((1, 9))), "1 fit"), ((part, np.zeros((3, 8))), "the same items")):
        with pytest.raises(InputError, match=words):
            statistics.crossed(Apart(parts))
    with pytest.raises(InputError, match="seeds of its own"):
        sequences.interval(Apart((np.zeros((6, 9)), np.zeros((6, 9)))))


def test_components_are_those_of_as_many_fits_at_each_part():
    rng = np.random.default_rng(1)
    sds = (0.05, 0.0, 0.4, 0.0, 0.6, 0.0, 0.0)  # seeds, items, and what is left
    first, second = (planted(rng, (numbers, 1, 40), sds, 0.1, 400)[:, :, 0] for numbers in (5, 3))
    items = 0.3 * rng.standard_normal((400, 1, 40))  # that both have
    pilots = [sample_size.components(Apart((a, 2 * b))) for a, b in zip(first + items, second, strict=True)]
    for field, true in (("of_fits", 5 * (40 * 0.05**2 + 0.6**2)), ("residual", 5 * 0.6**2), ("mean", 0.3)):
        values = np.array([getattr(each, field) for each in pilots])
        assert abs(values.mean() - true) < 4 * values.std() / 20
    assert {each.items for each in pilots} == {40} and all(2 <= each.fits <= 7 for each in pilots)


@pytest.mark.slow
def test_intervals_of_sums_hold_what_was_planted():
    rng, studies = np.random.default_rng(2), 300
    for numbers, scales in itertools.product([(3, 3), (12, 5, 3), (8, 8, 8)], [(1, 1, 1), (3, 1, 0.3)]):
        for sds in ((0.02, 0, 0.0, 0, 0.3, 0, 0), (0.02, 0, 0.3, 0, 0.5, 0, 0), (0.0, 0, 0.0, 0, 0.5, 0, 0)):
            held = 0
            for _ in range(studies):
                items = sds[2] * rng.standard_normal(200)
                parts = [planted(rng, (n, 1, 200), (*sds[:2], 0, *sds[3:]))[0][:, 0] for n in numbers]
                interval = statistics.crossed(
                    Apart(tuple(scale * (part + items) for part, scale in zip(parts, scales, strict=False)))
                )
                held += interval.low <= 0 <= interval.high
            assert held / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies), (numbers, scales, sds, held)


# ---- From fits to verdicts


def table(first=0, rates=(0.5, 0.52, 0.49, 0.5, 0.51)):
    """Scratch and full at two budgets; seeds from `first` on at the second."""
    cells = {}
    for i, (name, budget, better) in enumerate([("scratch", 10, 0), ("full", 10, 0.1), ("scratch", 100, 0.1)]):
        cells[cell(name, budget)] = fits([rate + better for rate in rates], seed=i)
    cells[cell("full", 100)] = fits([rate + 0.2 for rate in rates], seed=3)
    return {
        where: {seed + (first if where.budget == 100 else 0): right for seed, right in of_cell.items()}
        for where, of_cell in cells.items()
    }


def test_budgets_without_a_common_seed_are_judged_apart_and_those_with_one_as_before():
    cells, bases = ([cell(name, budget) for budget in (10, 100)] for name in ("full", "scratch"))
    apart, shared = table(5), table()
    values = verdicts.area(apart, cells, bases)
    assert isinstance(values, Apart) and [part.shape for part in values.parts] == [(5, 400), (5, 400)]
    assert values.mean() == pytest.approx(verdicts.area(shared, cells, bases).mean())
    [of_apart], others = verdicts.compared(apart, 0.01, 0.95)
    [of_shared], _ = verdicts.compared(shared, 0.01, 0.95)
    assert (of_apart.fits, of_shared.fits, of_apart.word, of_apart.unused) == (10, 5, "positive", 0)
    assert of_apart.seeds_needed is not None and len(others) == 2 and of_apart.diverged == (0, 0)
    partly = verdicts.area(table(3), cells, bases)
    assert isinstance(partly, np.ndarray) and partly.shape == (2, 400)
    lost = verdicts.of_diverged(0.1, 400)
    of_lost = {where: {**of_cell, **({6: lost} if where == cells[1] else {})} for where, of_cell in apart.items()}
    assert verdicts.compared(of_lost, 0.01, 0.95)[0][0].diverged == (1, 0)
    assert asides.spreads([of_apart], apart) == []
    page = compare_page.judged([as_read(apart)], Judging(margin=1.0), [])
    assert [each.word for each in page.family] == ["positive"] and compare_page.sections(page, {})


def test_shares_of_seeds_are_those_that_make_the_variance_least():
    variances = np.array([5.0, 2.0, 0.1])
    shares = design.shares_of_seeds(variances)
    least = np.sum(variances / shares)
    for other in np.random.default_rng(0).dirichlet(np.ones(3), 500):
        assert np.sum(variances / other) >= least - 1e-9
    assert [sum(design.seeds_of_budgets(shares, n)) for n in (6, 7, 20, 21)] == [6, 7, 20, 21]
    assert min(design.seeds_of_budgets(np.array([0.98, 0.01, 0.01]), 9)) == 2


def test_what_seeds_apart_gain_is_the_covariance_of_budgets():
    """Fits whose errors at both budgets are one have half the variance under seeds of their own."""
    rng = np.random.default_rng(3)
    of_seed = 0.05 * rng.standard_normal((40, 1))
    hard = rng.uniform(size=2000)
    right = {cell("scratch", budget): dict(enumerate(np.tile(hard < 0.5, (40, 1)))) for budget in (10, 100)}
    right |= {cell("full", budget): dict(enumerate(hard < 0.5 + of_seed)) for budget in (10, 100)}
    [each], shares = design.allotments(right, [("a", "full")], Conditions(0.01))
    assert each.equal == pytest.approx(0.5, abs=0.02) and shares == pytest.approx([0.5, 0.5], abs=0.01)
    right |= {cell("full", 100): dict(enumerate(hard < 0.5 + of_seed / 5))}
    [uneven], shares = design.allotments(right, [("a", "full")], Conditions(0.01))
    assert uneven.allotted < uneven.equal and shares == pytest.approx([5 / 6, 1 / 6], abs=0.05)


def test_a_design_says_who_gets_how_many_seeds(capsys):
    design_page.show([as_read(table())], Judging(margin=2.0), 60)
    text = capsys.readouterr().out
    assert "variance of an area over that with shared seeds" in text and "--seeds_apart" in text
    flags = dict(part.split("=", 1) for part in text.split() if part.startswith("--") and "=" in part)
    numbers = [int(each.partition(":seeds=")[2]) for each in flags["--train_examples"].split(",")]
    first, last = map(int, flags["--seeds"].split("-"))
    assert last - first + 1 == sum(numbers) and first == 5
    with pytest.raises(InputError, match="--seeds_apart"):
        design_page.show([as_read(table(5))], Judging(margin=2.0), 60)


# ---- What is trained


def settings(*budgets, seeds=10):
    return Settings(source="a", target="b", seeds=tuple(range(seeds)), train_examples=budgets)


@pytest.mark.parametrize(
    ("draws", "given", "until", "says"),
    [
        ((0, 1), settings("5", "9"), None, "--draws and --seeds_apart are both given"),
        (None, settings("5", "9"), "decided", "--until=decided adds seeds"),
        (None, settings("5"), None, "two --train_examples or more"),
        (None, settings("5", "9", seeds=3), None, "leaves 9 fewer than two of 3 --seeds"),
        (None, settings("5:seeds=9", "9:seeds=2"), None, "have 11 seeds in all, and --seeds has 10"),
    ],
)
def test_seeds_apart_that_do_not_go_are_refused_in_a_line(draws, given, until, says):
    with pytest.raises(InputError, match=says) as caught:
        replicates.require_flags(draws, True, given, until)
    assert "\n" not in str(caught.value)
    replicates.require_flags(None, False, given, until)


def test_seeds_are_dealt_out_and_no_two_budgets_share_one(tasks, tmp_path):
    parts = planned(tasks, tmp_path, "--seeds_apart", train_examples=("20:seeds=3", "40"), seeds=tuple(range(5)))
    jobs = [job for part in parts for job in plan.planned(part.experiment).values()]
    assert len({job.result.key for job in jobs}) == len(jobs) == 3 * 5  # scratch, scratch for longer, full
    seeds = {
        budget: {job.seed for job in jobs if job.budget == budget and job.strategy.label == name}
        for budget, name in itertools.product(("20:seeds=3", "40"), ("full", "scratch"))
    }
    assert seeds == {"20:seeds=3": {0, 1, 2}, "40": {3, 4}}
    whole = planned(tasks, tmp_path, train_examples=(20, 40), seeds=tuple(range(5)))
    every = {job.result.recipe for part in whole for job in plan.planned(part.experiment).values()}
    assert {job.result.recipe for job in jobs} == every


@pytest.mark.slow
def test_a_study_with_seeds_apart_is_judged_goes_on_and_is_reported_again(tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = line(tasks, tmp_path, "--seeds_apart", "--nolonger_scratch", seeds=tuple(range(5)))
    compare.main(flags)
    assert "each label budget has seeds of its own (3 at 20, 2 at 40)" in " ".join(capsys.readouterr().out.split())
    rows = results(tmp_path / "w")
    assert len(rows) == 5 + 5 + 5 and sum(row.strategy == "pretrain" for row in rows) == 5
    whole = (tmp_path / "w" / "comparisons.csv").read_bytes()
    compare.main(flags)
    assert (tmp_path / "w" / "comparisons.csv").read_bytes() == whole and results(tmp_path / "w") == rows
    report.main(["report", f"--runs={tmp_path / 'w'}", f"--output={tmp_path / 'page'}"])
    assert (tmp_path / "page" / "comparisons.csv").read_bytes() == whole
