"""The design before a study: what seeds and items contribute, the seeds that a verdict takes, the primary family."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from test_programs import command, write_task
from test_study import as_read, cell, fits

from experiments import compare
from experiments.pages import compare as compare_page
from experiments.pages import design as design_page
from experiments.pages import tables
from experiments.runs import judging as judgings
from experiments.runs import looks
from experiments.runs.judging import Judging
from tljax.study import design, sample_size, statistics, verdicts
from tljax.study.sample_size import Components
from tljax.study.verdicts import Conditions
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")
ITEMS = 400
TRUTH = Components(0.0, 5, ITEMS, ITEMS * 0.03**2 + 0.5**2, 0.2**2, 0.5**2)
"""Fits of a standard deviation of 0.03, items of 0.2, what is left of 0.5."""


def study(rng, seeds, difference, truth=TRUTH, items=None):
    """Differences of a study of such components, [seeds, items]; `items` are the effects of the items, if known."""
    of_fits, of_items, rest = truth.spread()
    root = np.sqrt(truth.items)
    items = of_items * root * rng.standard_normal(truth.items) if items is None else items
    noise = rest * root * rng.standard_normal((seeds, truth.items))
    return difference + of_fits * rng.standard_normal((seeds, 1)) + items + noise


def test_components_are_those_that_a_study_was_drawn_from():
    rng = np.random.default_rng(0)
    drawn = [sample_size.components(study(rng, 5, 0.1)) for _ in range(300)]
    for field in ("mean", "of_fits", "of_items", "residual"):
        values = np.array([getattr(each, field) for each in drawn])
        true = 0.1 if field == "mean" else getattr(TRUTH, field)
        assert abs(values.mean() - true) < 3 * values.std() / np.sqrt(300)
    in_pairs = sample_size.components(np.repeat(study(rng, 5, 0.1), 2, axis=1), np.arange(2 * ITEMS) // 2)
    assert in_pairs.items == ITEMS


def test_chances_are_those_of_t_where_fits_alone_vary():
    pilot = Components(0.0, 5, 1000, of_fits=1.0, of_items=0.0, residual=0.0)
    for seeds in (4, 9):
        error, critical, inner = 1 / np.sqrt(1000 * seeds), *(stats.t.isf(tail, seeds - 1) for tail in (0.025, 0.05))
        words = sample_size.chances(pilot, seeds, 0.03, 0.95, differences=np.array([0.0, 0.03]))
        different = [statistics.power(error, seeds - 1, critical, size) for size in (0.0, 0.03)]
        assert words.different == pytest.approx(different, abs=0.01)
        equal = statistics.power_equivalent(error, seeds - 1, critical, inner, 0.03)
        assert words.equivalent[0] == pytest.approx(equal, abs=0.01)
    seeds = sample_size.seeds_needed(pilot, 0.03, 0.95).find
    powers = [
        statistics.power(1 / np.sqrt(1000 * n), n - 1, stats.t.isf(0.025, n - 1), 0.03) for n in (seeds - 1, seeds)
    ]
    assert powers[0] < 0.81 and powers[1] > 0.79 and powers[0] < powers[1]


@pytest.mark.parametrize("family", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_studies_of_the_seeds_that_are_needed_decide_as_often_as_promised(family):
    rng, replications = np.random.default_rng(family), 120 * family
    needed = sample_size.seeds_needed(TRUTH, 0.05, 0.95, family)
    for seeds, difference in ((needed.find, 0.05), (needed.equivalent, 0.0)):
        words = np.array(
            [
                each.word
                for _ in range(replications // family)
                for each in statistics.verdicts([study(rng, seeds, difference) for _ in range(family)], 0.05)
            ]
        )
        promised = sample_size.chances(TRUTH, seeds, 0.05, 0.95, family, difference)
        wanted = "equivalent" if difference == 0 else "positive"
        chance = float(promised.equivalent if difference == 0 else promised.different)
        assert sample_size.POWER <= chance < sample_size.POWER + 0.08
        assert abs(np.mean(words == wanted) - chance) < 3 * np.sqrt(0.16 / len(words))


def test_the_items_forbid_what_no_number_of_seeds_decides():
    least = sample_size.least_margin(TRUTH, 0.95)
    assert least == pytest.approx(stats.t.isf(0.05, ITEMS - 1) * 0.2 / np.sqrt(ITEMS))
    below, above = (sample_size.seeds_needed(TRUTH, share * least, 0.95) for share in (0.9, 2.0))
    assert below.find is below.equivalent is None and below.equivalent_range == (None, None)
    assert above.find and above.equivalent
    assert sample_size.least_margin(TRUTH, 0.95, 8) > least
    words = {statistics.verdicts([study(np.random.default_rng(i), 200, 0.0)], 0.9 * least)[0].word for i in range(10)}
    assert "equivalent" not in words


@pytest.mark.slow
def test_the_range_of_the_seeds_holds_the_number_that_is_needed():
    rng = np.random.default_rng(0)
    true = sample_size.seeds_needed(TRUTH, 0.05, 0.95)
    ranges = [sample_size.seeds_needed(sample_size.components(study(rng, 5, 0.0)), 0.05, 0.95) for _ in range(100)]
    for field in ("find", "equivalent"):
        ends = [getattr(each, f"{field}_range") for each in ranges]
        holds = np.mean([low <= getattr(true, field) <= (high or np.inf) for low, high in ends])
        assert holds >= 0.9 - 3 * np.sqrt(0.09 / 100)


def right_of(rng, seeds, strategies, budgets=(10, 100)):
    """Scores of scratch, 0, and of strategies of (difference, factor of the spread of seeds) at two budgets."""
    table = {}
    for budget in budgets:
        table[cell("scratch", budget=budget)] = {seed: np.zeros(ITEMS) for seed in seeds}
        for name, (difference, factor) in strategies.items():
            truth = TRUTH._replace(of_fits=ITEMS * (factor * 0.03) ** 2 + 0.5**2)
            scores = study(rng, len(seeds), difference, truth, np.zeros(ITEMS))
            table[cell(name, budget=budget)] = dict(zip(seeds, scores, strict=True))
    return table


def test_a_design_takes_what_is_decided_within_its_compute_and_keeps_its_promise():
    rng = np.random.default_rng(1)
    table = right_of(rng, range(40), {"sure": (0.1, 1.0), "noisy": (0.01, 20.0)})
    members, conditions = [("a", "noisy"), ("a", "sure")], Conditions(0.05)
    ranked = design.designs(table, members, conditions, 0.95, 60, cost=design.Cost(source=2.0))
    best = ranked[0]
    assert all(each.fits <= 60 and each.seeds >= 3 for each in ranked) and len(ranked) == 4
    assert {each.members for each in ranked if len(each.members) == 1} == {(("a", "sure"),)}
    for each in ranked:
        assert each.fits == each.seeds * (len(each.budgets) * (1 + len(each.members)) + 2)
    assert [each.verdicts for each in ranked] == sorted((each.verdicts for each in ranked), reverse=True)
    more = design.designs(table, members, conditions, 0.95, 240)
    assert more[0].verdicts >= best.verdicts
    with pytest.raises(InputError, match="design_fits=5: 5 is not enough for 3 seeds"):
        design.designs(table, members, conditions, 0.95, 5)

    seeds = 6
    [pilot] = design.measured(table, members[1:], (10, 100), conditions)
    promised = design.chance_of_decision(pilot.components, seeds, 0.05, 0.95, 1)
    decided = []
    for i in range(100):
        again = right_of(np.random.default_rng(100 + i), range(seeds), {"sure": (0.1, 1.0)})
        decided.append(verdicts.compared(again, 0.05, 0.95)[0][0].word != "undecided")
    assert abs(np.mean(decided) - promised) < 0.03 + 3 * np.sqrt(promised * (1 - promised) / 100)


def test_exploratory_strategies_cost_the_primary_family_nothing_and_are_said_to_be():
    table = {cell("scratch"): fits([0.5, 0.52, 0.49, 0.5], 1000)}
    for i, name in enumerate(("full", "lp_ft", "bias_only")):
        table[cell(name)] = fits([0.56, 0.55, 0.6, 0.58], 1000, seed=i + 1)
    only = {where: scores for where, scores in table.items() if where.strategy in ("scratch", "full")}
    [alone], _ = verdicts.compared(only, 0.005, 0.95)
    family, _ = verdicts.compared(table, 0.005, 0.95, primary=("full",))
    first = next(each for each in family if each.strategy == "full")
    assert first == alone and [each.exploratory for each in family] == [False, True, True]
    together = {each.strategy: each for each in verdicts.compared(table, 0.005, 0.95)[0]}
    assert together["full"].high - together["full"].low > alone.high - alone.low
    study_of = compare_page.judged([as_read(table)], Judging(primary_family=("full",)), [])
    assert any(note.startswith("exploratory, judged apart: lp_ft and bias_only") for note in study_of.notes)
    page = compare_page.sections(study_of, {})[0].blocks[0].caption
    assert "exploratory rows, outside it, are judged among themselves" in page
    before, after = study_of.verdict.split(" Exploratory: ")
    assert "full" in before and "lp_ft" not in before and "lp_ft" in after and "primary family together" in before
    assert [row[0].below for row in tables.verdicts(family).rows if len(row) > 1] == ["", "exploratory", "exploratory"]
    record = judgings.to_record(Judging(primary_family=("full",)))
    assert judgings.from_record(record) == Judging(
        primary_family=("full",)
    ) and "primary_family" not in judgings.to_record(Judging())
    for now, then in ((Judging(), record), (Judging(primary_family=("full",)), judgings.to_record(Judging()))):
        with pytest.raises(InputError, match="primary_family"):
            looks.refuse_other(now, then, "these fits were judged before")
    looks.refuse_other(Judging(primary_family=("full",)), record, "these fits were judged before")
    with pytest.raises(InputError, match="--primary_family=ful is none of --strategies"):
        judgings.with_primary_family(Judging(primary_family=("ful",)), {"full": "full"})
    with pytest.raises(InputError, match="what the others are compared with"):
        judgings.with_primary_family(Judging(primary_family=("scratch",)), {"scratch": "scratch"})


def test_a_verdict_says_the_seeds_that_it_would_have_taken():
    table = {cell("scratch"): fits([0.5, 0.52, 0.49, 0.5], 1000), cell(): fits([0.5, 0.53, 0.49, 0.52], 1000, seed=1)}
    [comparison], _ = verdicts.compared(table, 0.1, 0.95)
    scores = verdicts.differences(table, cell(), cell("scratch"))
    assert comparison.seeds_needed == sample_size.seeds_needed(sample_size.components(scores), 0.1, 0.95)
    assert comparison.seeds_needed.find is not None
    row = tables.verdicts([comparison]).rows[-1]
    assert tables.number_of_seeds(comparison.seeds_needed.find) in [each.text for each in row]
    assert "seeds needed" in tables.verdicts_in_short("t", [comparison]).columns


def test_a_design_is_printed_with_the_flags_of_the_one_that_decides_most(capsys):
    table = {cell("scratch"): fits([0.5, 0.52, 0.49, 0.5], 1000)}
    table |= {cell("full"): fits([0.66, 0.65, 0.7, 0.68], 1000, seed=1), cell("lp_ft"): fits([0.5] * 4, 1000, seed=2)}
    design_page.show([as_read(table)], Judging(margin=2.0), 30)
    text = capsys.readouterr().out
    assert "seeds that a margin of 2 points takes with a chance of 80 %" in text and "se of items" in text
    assert "--primary_family=full" in text and "--seeds=4-" in text
    design_page.show([as_read(table, groups={"b": np.arange(1000) // 10})], Judging(margin=2.0), 30)
    assert "se of groups" in capsys.readouterr().out
    part = as_read(table)
    rows = [
        replace(row, steps=100, source_steps=150, source_accuracy=0.5 + row.seed if row.source else None)
        for row in part.rows
    ]
    design_page.show([part._replace(rows=rows)], Judging(margin=2.0), 30)
    assert "a source as 1.5" in (counted := capsys.readouterr().out)
    assert "sources not" in text and counted != text
    with pytest.raises(InputError, match=r"nothing of this run can be judged: .* one group"):
        design_page.show([as_read(table, groups={"b": np.zeros(1000, int)})], Judging(), 30)

    with pytest.raises(InputError, match=r"^--design: the run has no fit to learn from"):
        design_page.show([], Judging(), 30)
    with pytest.raises(InputError, match="verdicts on the target"):
        design_page.show([as_read(table)], Judging(verdict_on="retention", against="full"), 30)


@pytest.mark.slow
def test_a_pilot_is_trained_judges_nothing_and_is_read_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed, name in enumerate(("digits", "clothes")):
        write_task(tmp_path / f"{name}.npz", seed, 4)
    flags = {"strategies": ("scratch", "full", "head_only"), "train_examples": (20, 60), "seeds": tuple(range(9))}
    line = ["compare", *command(tmp_path, tmp_path, **flags), "--nolonger_scratch"]
    compare.main([*line, f"--design={tmp_path / 'pilot'}", "--design_fits=60"])
    first = capsys.readouterr().out
    assert "designs of at most 60 fits" in first and "--seeds=5-" in first  # the first five of nine seeds
    assert not (tmp_path / "pilot" / "report.html").exists() and not (tmp_path / "w").exists()
    assert not list(tmp_path.glob("cache/tljax/looks/*/*")), "a pilot is no look"
    compare.main(["compare", *line[1:], "--seeds=0-4", f"--workdir={tmp_path / 'pilot'}"])  # now it is judged
    capsys.readouterr()
    compare.main(["compare", f"--design={tmp_path / 'pilot'}", "--design_fits=60"])
    again = capsys.readouterr().out
    assert again.startswith("where the variance") and again in first  # which says besides how training went
    family = ["--primary_family=head_only"]
    compare.main(["compare", f"--design={tmp_path / 'pilot'}", *family, "--design_fits=60"])
    assert "in a family of 1" in (text := capsys.readouterr().out) and "--strategies=scratch,head_only" in text
