"""What verdicts say and rest on: diverged fits, groups of items, looks, what differs between seeds, equal methods."""

import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from studies import comparison as comparison_of
from test_programs import command, write_task
from test_report import bare, curve, visible
from test_study import as_read, cell, fits

from experiments import compare, report
from experiments.compare import CompareFlags
from experiments.pages import compare as compare_page
from experiments.pages import figures, tables
from experiments.pages import report as pages
from experiments.pages import transfer as transfer_page
from experiments.runs import console, directory, judging, looks, predictions, process
from experiments.runs.judging import Judging
from experiments.runs.settings import Settings
from tljax.study import milestones, statistics, summary
from tljax.study import verdicts as comparisons
from tljax.study.results import Result
from tljax.study.verdicts import Cell
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

BOOM = '''"""Goes out of all bounds in a few steps."""

import jax


def strategy(params, context):
    return jax.tree.map(lambda leaf: 1e25, params)
'''


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A user of one's own, whose looks are not those of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lost(items=400, share=0.5):
    """The scores of a fit that diverged."""
    return comparisons.of_diverged(share, items)


def at(rate, items=400):
    """Scores of a fit that is right on the easiest items, the same for all: what follows is arithmetic."""
    return np.arange(items) < round(rate * items)


# Fits that diverge


def test_a_diverged_fit_counts_as_the_share_of_the_most_frequent_test_class():
    labels = np.array([0, 1, 1, 2, 1])
    assert summary.majority_share(labels) == 3 / 5
    rows = [bare("scratch", 0, 0.5), bare("scratch", 1, 0.7), bare("full", 0, 0.9)]
    rows += [bare("full", 1, None, diverged=True, test_loss=None)]
    base, row = summary.summary(summary.with_share(rows, labels))
    assert row.score == pytest.approx((0.75, 0.6, 0.9)) and row.test_loss == (0.5, 0.5, 0.5)
    assert row.gain == pytest.approx((15, -10, 40)) and row.gain_seeds == 2  # (40 - 10) / 2
    assert tables.state(row) == "1 of 2 fits diverged and count as 60.0 %" and tables.state(base) == ""
    [cells] = [cells for cells in tables.scores(rows[:3] + summary.with_share(rows[3:], labels), "b").rows[1:2]]
    assert cells[0][0] == "from a"


def test_a_diverged_fit_scores_the_share_on_every_item_and_mcnemar_is_silent():
    table = {cell(): {0: lost(share=0.3)}, cell("scratch"): {0: at(0.8)}}
    comparison = comparisons.alone(table, [cell()], comparisons.Conditions(0.01), 0.95)
    assert comparison.mean == pytest.approx(0.3 - 0.8) and comparison.p is None and comparison.diverged == (1, 0)
    items = 0.3 - at(0.8)
    low, high = stats.t.interval(0.95, 399, items.mean(), items.std(ddof=1) / 20)
    assert (comparison.low, comparison.high) == pytest.approx((low, high))


def test_no_study_with_a_failure_is_called_positive_where_dropping_it_called_most_so():
    """A strategy that gains 5 points where it does not fail, and fails in a fifth of seeds, loses 2 points in truth."""
    rng = np.random.default_rng(0)
    dropped, counted, failed = 0, 0, 0
    for _ in range(40):
        fails = rng.random(6) < 0.2
        hard = rng.random(400)
        rates = 0.8 + 0.005 * rng.normal(size=(2, 6)) + np.array([[0.0], [0.05]])
        scratch, full = ({i: hard + 0.05 * rng.normal(size=400) < rate for i, rate in enumerate(r)} for r in rates)
        ended = {i: scores for i, scores in full.items() if not fails[i]}
        table = {cell("scratch"): scratch, cell(): ended | {i: lost() for i in range(6) if fails[i]}}
        words = [
            comparisons.compared({**table, cell(): fits}, 0.005, 0.95)[0][0].word for fits in (ended, table[cell()])
        ]
        dropped += words[0] == "positive"
        counted += words[1] == "positive" and bool(fails.any())
        failed += bool(fails.any())
    assert failed > 20 and dropped > 30 and counted == 0


def test_positive_that_rests_on_failures_of_scratch_is_withheld():
    scratch = {0: at(0.8), **{seed: lost() for seed in range(1, 5)}}
    weak, strong = ({seed: at(rate + 0.001 * seed) for seed in range(5)} for rate in (0.79, 0.95))
    family, _ = comparisons.compared({cell("scratch"): scratch, cell("weak"): weak, cell("strong"): strong}, 0.01, 0.95)
    comparison, other = family
    assert comparison.low > 0  # 0.29 on average above fits that mostly failed
    assert comparison.word == "" and comparison.p is None and comparison.power is None
    assert "positive only because 4 fits of scratch diverged" in comparison.reason and comparison.diverged == (0, 4)
    assert (other.word, other.size) == ("positive", "beyond")
    assert "not judged: weak (positive only because" in comparisons.sentence(family, 0.95)


def test_without_a_surviving_fit_of_the_base_nothing_good_is_said():
    table = {cell("scratch"): {i: lost() for i in range(5)}, cell(): {i: at(0.9 + 0.001 * i) for i in range(5)}}
    table |= {cell("bad"): {i: at(0.1 + 0.001 * i) for i in range(5)}}
    good, bad = comparisons.compared(table, 0.01, 0.95)[0]
    assert good.word == "" and "no other fit is left" in good.reason
    assert bad.word == "" and "no other fit is left" in bad.reason  # what scratch does where it works is not known


def test_a_share_that_is_above_the_fits_is_no_reward_for_failing():
    """Where one class is most of the test set, the share may be more than any fit reaches."""
    scratch = {i: at(0.4 + 0.001 * i) for i in range(5)}
    gone = {cell("scratch"): scratch, cell(): {i: lost(share=0.7) for i in range(5)}}
    [comparison], _ = comparisons.compared(gone, 0.01, 0.95)
    assert (
        comparison.low > 0
        and comparison.word == ""
        and "positive only because 5 fits of full diverged" in comparison.reason
    )
    some = {i: lost(share=0.7) if i < 3 else at(0.41 + 0.001 * i) for i in range(5)}
    [comparison], _ = comparisons.compared({cell("scratch"): scratch, cell(): some}, 0.01, 0.95)
    assert comparison.mean > 0.1 and comparison.word != "positive"
    [comparison], _ = comparisons.compared(
        {cell("scratch"): scratch, cell(): {i: lost(share=0.1) for i in range(5)}}, 0.01, 0.95
    )
    assert comparison.word == "negative"  # a share below what scratch reaches is none


def test_a_base_that_failed_upwards_makes_nothing_negative():
    base = {0: at(0.5), 1: at(0.501), **{i: lost(share=0.8) for i in (2, 3, 4)}}
    table = {cell("scratch"): base, cell(): {i: at(0.52 + 0.001 * i) for i in range(5)}}
    [comparison], _ = comparisons.compared(table, 0.01, 0.95)
    assert comparison.mean < 0 and comparison.word != "negative"


def test_one_pair_of_fits_under_several_seeds_is_one_pair():
    pair = {cell("scratch"): at(0.5), cell(): at(0.6)}
    table = {where: dict.fromkeys(range(3), scores) for where, scores in pair.items()}
    [comparison], _ = comparisons.compared(table, 0.01, 0.95)
    assert comparison.word == "" and comparison.reason == comparisons.COPIES
    varies = {**table, cell("scratch"): {i: at(0.5 + 0.01 * i) for i in range(3)}}  # a learner that draws nothing
    assert comparisons.compared(varies, 0.01, 0.95)[0][0].reason == ""


def test_other_fits_from_scratch_beside_the_same_fits_are_another_look():
    table = {cell(): fits([0.5, 0.51, 0.52]), cell("scratch"): fits([0.4, 0.41, 0.42], seed=1)}
    part = as_read(table)
    keyed = [part._replace(rows=[replace(row, key=row.name) for row in part.rows])]
    places, judging = [looks.place()], Judging()
    looks.write(looks.judged_fits(keyed, "scratch"), judging, 1, places)
    assert looks.count(looks.judged_fits(keyed, "scratch"), judging, places) == 1
    worse = as_read({**table, cell("scratch"): fits([0.2, 0.21, 0.22], seed=2)})
    swapped = [worse._replace(rows=[replace(row, key=f"other {row.name}") for row in worse.rows])]
    assert looks.count(looks.judged_fits(swapped, "scratch"), judging, places) == 2


def test_fits_are_known_by_what_they_predict_whatever_they_are_called():
    table = {cell(): fits([0.5, 0.51, 0.52]), cell("scratch"): fits([0.4, 0.41, 0.42], seed=1)}
    part, places = as_read(table), [looks.place()]
    part = part._replace(rows=[replace(row, key=row.name) for row in part.rows])
    looks.write(looks.judged_fits([part], "scratch"), Judging(margin=0.5), 1, places)
    named = {cell("mine_v2"): table[cell()], cell("scratch"): table[cell("scratch")]}
    again = as_read(named)
    again = again._replace(rows=[replace(row, key=f"of a table, {row.name}") for row in again.rows])
    assert looks.count(looks.judged_fits([again], "scratch"), Judging(margin=0.5), places) == 1
    with pytest.raises(InputError, match=r"judged before with --margin=0\.5, not 3\.0"):
        looks.count(looks.judged_fits([again], "scratch"), Judging(margin=3.0), places)


def test_a_strategy_that_equals_failures_is_not_called_equivalent():
    """Of a base that half failed: equivalent to it is not equivalent to what it is where it works."""
    scratch = {0: at(0.9), 1: lost(), 2: lost(), 3: lost(), 4: lost()}
    same = {0: at(0.9), 1: at(0.5), 2: at(0.5), 3: at(0.5), 4: at(0.5)}
    comparison = comparisons.compared({cell("scratch"): scratch, cell("same"): same}, 0.2, 0.95)[0][0]
    assert (
        comparison.low > -0.2
        and comparison.high < 0.2
        and comparison.word == ""
        and "equivalent only because" in comparison.reason
    )


def test_milestones_of_a_fit_that_diverged():
    rows = [bare("scratch", 0, 0.6, train_examples=10), bare("full", 0, 0.8, train_examples=10)]
    rows += [bare("full", 1, None, train_examples=10, diverged=True, majority_share=0.4)]
    curves = {"full-0-10": curve(0.5, 0.7, 0.8), "full-1-10": curve(0.7, np.nan, np.nan)}
    full = milestones.milestones(rows, curves)[1]
    assert full["asymptote"] == pytest.approx((0.8 + 0.4) / 2)
    assert full["time_to_threshold"] == ">1000"  # the median of 100 and never
    assert full["area"] == pytest.approx(((0.6 + 0.75) / 2 + (0.55 + 0.4) / 2) / 2)


@pytest.fixture(scope="module")
def failing(tasks, tmp_path_factory):
    """(run directory, task folder, flags) of a study in which one strategy diverges, three seeds."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "boom.py").write_text(BOOM)
    named = ("full", f"{folder / 'boom.py'}:strategy")
    flags = {"strategies": named, "train_examples": ("all",), "steps": 20, "seeds": (0, 1, 2), "workdir": folder / "w"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        patch.setattr("experiments.pages.figures.pdf", lambda figure: b"")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        compare.main(["compare", *command(tasks, folder, **flags), "--eval=source", "--longer_scratch=false"])
    return folder, flags


@pytest.mark.slow
def test_a_strategy_that_diverged_stands_in_the_study_with_its_share(failing, tasks):
    folder, _ = failing
    kept = predictions.read_study(folder / "w")
    odd = [row for part in kept.parts for row in part.rows if row.diverged]
    with np.load(tasks / "clothes.npz") as target, np.load(tasks / "digits.npz") as source:
        share, of_source = (np.bincount(data["test_labels"]).max() / 40 for data in (target, source))
    assert len(odd) == 3 and {row.majority_share for row in odd} == {share}
    assert {row.retention for row in odd} == {of_source}
    text = visible((folder / "w" / "report.html").read_text())
    assert f"3 of 3 fits diverged and count as {100 * share:.1f} %" in text
    scratch = np.mean([row.test_accuracy for part in kept.parts for row in part.rows if row.strategy == "scratch"])
    [shown] = [row for row in csv_rows(folder / "w" / "comparisons.csv") if "boom" in row["strategy"]]
    assert float(shown["mean"]) == pytest.approx(share - scratch) and json.loads(shown["diverged"]) == [3, 0]


def csv_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


def test_the_table_of_a_transfer_says_what_diverged_fits_count_as(failing, tasks, capsys):
    folder, _ = failing
    lines = [line for line in directory.results(folder / "w") if line.strategy != "pretrain"]
    with np.load(tasks / "clothes.npz") as target:
        settled = summary.with_share(lines, target["test_labels"])
    transfer_page.print_results("title", settled, [])
    output = capsys.readouterr().out
    assert "3 of 3 fits diverged and count as 35.0 %" in output and summary.COUNTS_AS in output
    text = visible(transfer_page.page(settled, {}, title="t", source_note="", notes=[], provenance=pages.Provenance()))
    assert "3 of 3 fits diverged and count as 35.0 %" in text and "enter no mean" not in text


# Direction and size


def judgements(table, margin=0.02, **more):
    return comparisons.compared(table, margin, 0.95, **more)


def spread_of(rate):
    return {seed: at(rate + 0.0025 * (seed - 2), 2000) for seed in range(5)}


def test_a_loss_below_the_margin_is_not_told_as_harm():
    table = {cell("scratch"): {i: at(0.7, 2000) for i in range(5)}}
    table |= {cell(name): spread_of(rate) for name, rate in (("less", 0.685), ("gain", 0.8), ("same", 0.7))}
    family, _ = judgements(table, 0.03)
    assert {comparison.strategy: (comparison.word, comparison.size) for comparison in family} == {
        "less": ("negative", "within"),
        "gain": ("positive", "beyond"),
        "same": ("equivalent", "within"),
    }
    text = comparisons.sentence(family, 0.95)
    assert text.startswith("Better than scratch by more than the margin: gain (+10.00 points, +")
    assert "; worse than scratch, by less than the margin: less (-1.50 points, -" in text
    assert "hurt" not in text and "no difference from scratch that matters: same (" in text
    assert all(
        0 <= low <= high <= 1 for comparison in family for low, high in (comparison.power, comparison.power_equivalent)
    )


CLAUSES = {
    "better than scratch by more than the margin": lambda low, high, margin: low > margin,
    "better than scratch, perhaps by less than the margin": lambda low, high, margin: 0 < low <= margin,
    "better than scratch, by less than the margin": lambda low, high, margin: 0 < low < margin,
    "worse than scratch by more than the margin": lambda low, high, margin: high < -margin,
    "worse than scratch, perhaps by less than the margin": lambda low, high, margin: -margin <= high < 0,
    "worse than scratch, by less than the margin": lambda low, high, margin: -margin < high < 0,
    "no difference from scratch that matters": lambda low, high, margin: low <= 0 <= high,
    "neither better nor worse than scratch is shown": lambda low, high, margin: low <= 0 <= high,
}
"""{what a sentence says: whether an interval and a margin, in points, say so too}."""


def test_a_sentence_says_no_more_than_its_numbers():
    """Read from the sentence alone: every clause is true of the interval that stands in it, and all of them occur."""
    rng, seen = np.random.default_rng(5), Counter()
    for margin in (0.002, 0.03, 0.06):
        table = {cell("scratch"): {i: at(0.6, 1000) for i in range(4)}}
        for number, rate in enumerate((0.45, 0.55, 0.585, 0.6, 0.615, 0.66, 0.75)):
            for spread in (0.004, 0.02):
                rates = rate + spread * rng.standard_normal(4)
                table[cell(f"s{number}_{spread}")] = {i: at(each, 1000) for i, each in enumerate(rates)}
        family = judgements(table, margin)[0]
        text, _, end = comparisons.sentence(family, 0.95).rpartition(" (a margin of ")
        sizes = {each.strategy: each.size for each in family}
        assert end.startswith(f"{100 * margin:g} points, 95 % for all")
        beyond = [each for each in family if each.size == "within" and max(-each.low, each.high) >= margin]
        assert [each.strategy for each in beyond] == re.findall(r"(\S+) by its simultaneous 90 % interval", end)
        for each, ends in zip(beyond, re.findall(r"90 % interval, (\S+) to (\S+?)(?=\)|,| and )", end), strict=True):
            low, high = map(float, ends)
            assert 100 * each.low < low and high < 100 * each.high and max(-low, high) < 100 * margin
        named = []
        for clause in text.split("; "):
            words, _, rest = clause.partition(": ")
            seen[words[:1].lower() + words[1:]] += 1
            for name, mean, low, high in re.findall(r"(\S+) \((\S+) points, (\S+) to (\S+)\)", rest):
                assert float(low) <= float(mean) <= float(high)
                holds = CLAUSES[words[:1].lower() + words[1:]]
                assert holds(float(low), float(high), 100 * margin), (clause, margin)
                small = ", by less" in words or "that matters" in words
                assert small == (abs(float(mean)) < 100 * margin and sizes[name] == "within"), (clause, margin)
                named.append(name)
        assert sorted(named) == sorted(each.strategy for each in family)
    assert seen.keys() == CLAUSES.keys()


def test_against_another_strategy_nothing_is_said_of_transfer():
    table = {cell("full"): {i: at(0.7, 2000) for i in range(5)}, cell("mine"): spread_of(0.8)}
    text = comparisons.sentence(judgements(table, base="full")[0], 0.95)
    assert text.startswith("Better than full by more than the margin: mine (+10.00 points, ") and "ransfer" not in text


def test_two_seeds_are_never_judged_without_a_warning():
    table = {
        name: {i: at(rate + 0.001 * i, 2000) for i in range(2)}
        for name, rate in ((cell("scratch"), 0.5), (cell(), 0.9))
    }
    study = compare_page.judged([as_read(table)], Judging(), [])
    assert study.family[0].word and "Two fits say little" in study.family[0].warning
    assert any(note.startswith("full: Two fits say little") for note in study.notes)


def test_levels_and_p_are_those_of_all_that_is_judged_together():
    """Over two targets and three looks each family has a sixth of the errors, and its p counts six times."""
    table = {}
    for target in ("b", "c"):
        table |= {cell("scratch", target=target): fits([0.5, 0.52, 0.49, 0.5], 1000)}
        table |= {cell("full", target=target): fits([0.56, 0.55, 0.6, 0.58], 1000, seed=1)}
    only = {where: scores for where, scores in table.items() if where.target == "b"}
    [alone], _ = comparisons.compared(only, 0.02, 0.95)
    comparison, _ = comparisons.compared(table, 0.02, 0.95, looks=3)[0]
    assert comparison.level == pytest.approx(1 - 0.05 / 6) and comparison.high - comparison.low > alone.high - alone.low
    assert comparison.p == pytest.approx(min(1, 6 * alone.p)) and 0 < alone.p < 1
    study = compare_page.judged([as_read(only)], Judging(2.0, 0.9, looks=2), [])
    text = visible(pages.render(compare_page.sections(study, {}), title="t", lead="", provenance=pages.Provenance()))
    assert "with simultaneous 95 % intervals over all rows of a target." in text and "p, adjusted" in text


def test_what_stands_beside_the_verdicts_has_the_level_that_is_printed():
    """Over two targets the verdicts share the errors; what stands beside them is of 95 % each target, and says so."""
    parts, table = [], {}
    for target in ("b", "c"):
        of_target = {cell("scratch", target=target): fits([0.5, 0.52, 0.49, 0.5], 1000)}
        of_target |= {cell("full", target=target): fits([0.56, 0.55, 0.6, 0.58], 1000, seed=1)}
        of_target |= {cell("lp_ft", target=target): fits([0.52, 0.5, 0.55, 0.5], 1000, seed=2)}
        parts.append(as_read(of_target)._replace(labels={target: np.ones(1000, int)}))
        table |= of_target
    judged = compare_page.judged(parts, Judging(2.0), [])
    assert judged.family[0].level == pytest.approx(0.975) and judged.asides.level == 0.95
    pairs = [each for each in judged.asides.pairs if each.target == "b"]
    pair = min(pairs, key=lambda each: each.high - each.low)
    first, second = (
        np.array([table[cell(name, target="b")][i] for i in range(4)], float) for name in (pair.strategy, pair.against)
    )
    alone, bonferroni = (statistics.crossed(first - second, 1 - 0.05 / m) for m in (1, len(pairs)))
    assert alone.high - alone.low < pair.high - pair.low < 1.01 * (bonferroni.high - bonferroni.low)
    text = visible(pages.render(compare_page.sections(judged, {}), title="t", lead="", provenance=pages.Provenance()))
    assert "with simultaneous 97.5 % intervals over all rows of a target (95 % over the 2 targets)" in text
    assert "all intervals of a target hold together at 95 %" in text and "together at 97.5 %" not in text


def test_the_reason_of_a_refusal_is_the_reason():
    table = {cell("scratch"): fits([0.5] * 3), cell(): fits([0.9] * 3)}
    study = compare_page.judged([as_read(table)], Judging(), [], 2)
    assert study.verdict == "Nothing was judged: looked at 2 times with 1 planned."
    assert study.family[0].word == "" and study.family[0].size == ""
    groups = {"b": np.arange(400) % 5}
    study = compare_page.judged([as_read(table, groups=groups)], Judging(), [])
    assert study.verdict.startswith("Nothing was judged: 5 groups of test items are fewer than 8")
    study = compare_page.judged([as_read(table, groups={"b": np.zeros(400, int)})], Judging(), [])
    assert "all test examples are of one group" in study.verdict
    study = compare_page.judged([as_read({cell("scratch"): fits([0.5]), cell(): fits([0.9])})], Judging(), [])
    assert "of one pair of fits; a verdict takes two seeds or more" in study.verdict


# What a family is of


BASES = (("full", "a", 0.5), ("full", "b", 0.55))


def test_equal_methods_enter_the_family_once():
    table = {cell("scratch"): fits([0.5, 0.52, 0.49]), cell("lp_ft"): fits([0.56, 0.6, 0.55], seed=1)}
    family, _ = judgements(table)
    twice = table | {cell("gradual_unfreeze"): {i: scores.copy() for i, scores in table[cell("lp_ft")].items()}}
    comparison, other = judgements(twice)[0]
    assert comparison == family[0] and other == comparison._replace(strategy="gradual_unfreeze", equals="lp_ft")
    study = compare_page.judged([as_read(twice)], Judging(2.0), [])
    assert "gradual_unfreeze equals lp_ft on every test example: judged once" in study.notes
    assert console.Cell("gradual_unfreeze", "equals lp_ft") in [row[0] for row in tables.verdicts(study.family).rows]
    sources = {cell(name, source=s): fits([rate] * 3, seed=i) for i, (name, s, rate) in enumerate(BASES)}
    comparison, other = judgements(
        sources | {cell("none", source=s): fits([0.6] * 3, seed=9) for s in "ab"}, base="full"
    )[0]
    assert (
        not comparison.equals and not other.equals and comparison.mean != other.mean
    )  # the same fits, beside other ones
    nearly = table | {cell("other"): {i: scores ^ (np.arange(400) == i) for i, scores in table[cell("lp_ft")].items()}}
    assert not any(comparison.equals for comparison in judgements(nearly)[0])


def test_seeds_that_not_all_budgets_share_are_told():
    table = {cell(name, 10): fits([0.5] * 6, seed=i) for i, name in enumerate(("scratch", "full"))}
    table |= {cell(name, 100): fits([0.6] * 2, seed=i) for i, name in enumerate(("scratch", "full"))}
    study = compare_page.judged([as_read(table)], Judging(2.0), [])
    assert study.family[0].fits == 2 and study.family[0].unused == 4 + 4
    assert any(
        "over the 2 seeds that all its budgets share: 8 fits of it and of scratch" in note for note in study.notes
    )
    assert "shares of the budgets in the area: 10 50 %, 100 50 %" in study.notes
    apart = {cell("scratch"): fits([0.5] * 2), cell(): {7: at(0.9), 8: at(0.9)}}
    study = compare_page.judged([as_read(apart)], Judging(), [])
    assert "full: no seed has a fit at every budget, and one of scratch beside it" in study.notes


def test_a_name_that_begins_with_scratch_keeps_its_source():
    """Scratch is known by its name, and scratch with more steps by a field."""
    base, other = "scratch_norm.py:strategy", cell("full")
    table = {cell(base): fits([0.5, 0.52, 0.49]), other: fits([0.7, 0.72, 0.71], seed=1)}
    [comparison], _ = comparisons.compared(table, 0.01, 0.95, base=base)
    assert comparison.mean == pytest.approx(comparisons.differences(table, other, cell(base)).mean())
    row = Result(name="", strategy="scratch for me", source="a", target="b", train_examples=10, steps=5, seed=0)
    assert predictions.cell(row) == Cell("a", "b", "scratch for me", 10)
    assert predictions.cell(replace(row, strategy="scratch"), True).longer


# Groups of test items


@pytest.mark.slow
def test_items_in_groups_are_judged_as_groups_and_told(tasks, tmp_path):
    write_task(tmp_path / "plain.npz", 1, 3)
    with np.load(tmp_path / "plain.npz") as arrays:
        groups = {"train_groups": np.arange(120) // 4 + 100, "test_groups": np.arange(40) // 4}
        np.savez(tmp_path / "grouped.npz", **arrays, **groups)
    flags = {"target": str(tmp_path / "grouped.npz"), "strategies": ("full",), "steps": 10, "seeds": (0, 1, 2)}
    compare.main(["compare", *command(tasks, tmp_path, **flags), "--longer_scratch=false"])
    text = visible((tmp_path / "w" / "report.html").read_text())
    assert "40 test items in 10 groups" in text and "items are taken as independent" not in text
    kept = predictions.read_study(tmp_path / "w").parts
    [part] = [part for part in kept if part.rows[0].strategy == "full"]
    assert part.groups[part.rows[0].target].tolist() == (np.arange(40) // 4).tolist()  # from its predictions
    [row] = csv_rows(tmp_path / "w" / "comparisons.csv")
    # In groups of one size the mean over groups is the mean over items, and the interval that of the groups' means.
    right = predictions.right(kept)
    [where] = [where for where in right if where.source]
    items = comparisons.differences(right, where, where._replace(source=None, strategy="scratch"))
    interval = statistics.crossed(items, 0.95, groups=np.arange(40) // 4)
    assert float(row["mean"]) == pytest.approx(items.reshape(3, 10, 4).mean(2).mean()) and row["groups"] == "10"
    assert float(row["low"]) == pytest.approx(interval.low)


def test_items_that_come_together_are_counted_as_groups():
    """Twenty items each of twenty writers: what is known is what the writers' means say."""
    writers = np.random.default_rng(0).random((2, 20))
    table = {
        cell(name): {seed: np.repeat(rate - 0.3 * (name == "scratch") + 0.01 * seed > 0.5, 20) for seed in range(4)}
        for name, rate in zip(("scratch", "full"), writers, strict=True)
    }
    groups = np.repeat(np.arange(20), 20)
    [plain], [comparison] = (comparisons.compared(table, 0.02, 0.95, groups=known)[0] for known in ({}, {"b": groups}))
    assert comparison.groups == 20 and plain.groups is None
    assert comparison.mean == pytest.approx(plain.mean) and comparison.high - comparison.low > 2 * (
        plain.high - plain.low
    )
    alone = comparisons.alone(table, [cell()], comparisons.Conditions(0.02, groups=groups), 0.95)
    means = comparisons.differences(table, cell(), cell("scratch")).reshape(4, 20, 20).mean(2)
    assert alone.low == pytest.approx(statistics.crossed(means, 0.95).low, rel=0.2)  # but for unseen disagreements


def test_groups_of_fits_made_elsewhere_are_in_their_predictions(tmp_path, capsys):
    report.main(["report", *theirs(tmp_path, groups=np.arange(200) // 5)])
    assert "small: 200 test items in 40 groups" in capsys.readouterr().out
    np.savez(
        tmp_path / "mine1.npz", labels=np.arange(200) % 4, predicted=np.zeros(200, int), groups=np.arange(200) // 4
    )
    with pytest.raises(InputError, match="in different groups"):
        report.main(["report", *theirs_again(tmp_path)])
    np.savez(tmp_path / "mine1.npz", labels=np.arange(200) % 4, predicted=np.zeros(200, int), groups=np.ones(3, int))
    with pytest.raises(InputError, match="give integers or words"):
        report.main(["report", *theirs_again(tmp_path)])


# Fits made elsewhere


def theirs(folder, seeds=(0, 1, 2), diverged=(), **arrays):
    """A table and predictions as somebody else's program would write them, another draw for each seed."""
    labels, rows = np.arange(200) % 4, []
    folder.mkdir(exist_ok=True)
    for number, (strategy, rate) in enumerate((("scratch", 0.5), ("mine", 0.9))):
        for seed in seeds:
            right = np.random.default_rng([number, seed]).uniform(size=200) < rate
            predicted = np.where(right, labels, (labels + 1) % 4)
            np.savez(folder / f"{strategy}{seed}.npz", labels=labels, predicted=predicted, **arrays)
            row = {"name": f"{strategy}{seed}", "source": "big", "target": "small", "strategy": strategy, "seed": seed}
            rows.append(row | {"train_examples": 40, "diverged": "yes" if (strategy, seed) in diverged else "no"})
    with open(folder / "theirs.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return theirs_again(folder)


def theirs_again(folder, out="out"):
    return [f"--predictions={folder}/*.npz", f"--results={folder / 'theirs.csv'}", f"--output={folder / out}"]


def test_diverged_fits_made_elsewhere_count_too(tmp_path, capsys):
    report.main(["report", *theirs(tmp_path, diverged=[("mine", 1)])])
    output = capsys.readouterr().out
    assert "mine at 40 labels: 1 of 3 fits diverged and count as 25.0 %" in output
    text = (tmp_path / "theirs.csv").read_text()
    (tmp_path / "theirs.csv").write_text(text.replace("yes", "perhaps"))
    with pytest.raises(InputError, match="line 6: diverged 'perhaps' is neither true nor false"):
        report.main(["report", *theirs_again(tmp_path)])


# Looks


def told_by(capsys):
    return capsys.readouterr().out


def test_the_first_judgement_decides_how_fits_are_judged(tmp_path, capsys):
    argv = theirs(tmp_path / "a")
    report.main(["report", *argv, "--margin=2"])
    assert "a margin of 2 points" in told_by(capsys)
    for more in ([], ["--margin=3"], ["--margin=2", "--level=0.9"], ["--margin=2", "--family=budgets"]):
        with pytest.raises(InputError, match="judged before with --"):
            report.main(["report", *theirs_again(tmp_path / "a", "elsewhere"), *more])
    report.main(["report", *theirs_again(tmp_path / "a", "elsewhere"), "--margin=2"])  # the same look again
    assert "positive" in told_by(capsys)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=r"judged before with --margin=2\.0, not 0\.5"):
        report.main(["report", *argv])  # the folder of the report remembers too


def test_growth_is_a_look_wherever_the_fits_are_put(tmp_path, capsys):
    report.main(["report", *theirs(tmp_path / "a")])
    report.main(["report", *theirs(tmp_path / "b", seeds=(0, 1, 2, 3, 4))])
    assert "Nothing was judged: looked at 2 times with 1 planned" in told_by(capsys)
    report.main(["report", *theirs_again(tmp_path / "a")])
    assert "Nothing was judged" not in told_by(capsys)  # what was judged first stays judged
    report.main(["report", *theirs(tmp_path / "c", seeds=(7, 8, 9))])
    assert "Nothing was judged" not in told_by(capsys)  # fresh seeds
    report.main(["report", *theirs(tmp_path / "d", seeds=(0, 1, 2, 7, 8, 9))])
    assert "looked at 4 times with 1 planned" in told_by(capsys)  # pooled: every judgement of some of them was a look


def test_fits_that_get_no_verdict_are_no_look(tmp_path, capsys):
    """A single seed, of all, of one strategy or of what it is compared with: the look is spent on the first verdict."""
    report.main(["report", *theirs(tmp_path / "one", seeds=(0,)), "--looks=2"])
    output = told_by(capsys)
    assert "Nothing was judged: of one pair of fits" in output
    assert "no look at these fits is counted" in output and "look 1 of 2" not in output
    assert not list((tmp_path / "cache").rglob("*.json")) and not (tmp_path / "one" / "out" / "looks").exists()
    more = theirs(tmp_path / "some", seeds=(0, 1, 2))
    rows = (tmp_path / "some" / "theirs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "some" / "theirs.csv").write_text("".join(rows[:2] + rows[4:]))  # scratch under one seed
    report.main(["report", *more, "--looks=2"])
    assert "no look at these fits is counted" in told_by(capsys)
    for number, seeds in enumerate(((0, 1, 2), (0, 1, 2, 3)), 1):
        report.main(["report", *theirs(tmp_path / str(number), seeds=seeds), "--looks=2"])
        output = told_by(capsys)
        assert f"look {number} of 2 planned" in output and "Nothing was judged" not in output


def test_a_target_of_one_seed_beside_others_is_no_look():
    judged = {cell(): fits([0.6] * 3), cell("scratch"): fits([0.5] * 3)}
    single = {(c._replace(target="other")): {0: fits_of_cell[0]} for c, fits_of_cell in judged.items()}
    for table, targets in ((judged, {"b"}), (single, set()), (judged | single, {"b"})):
        able = looks.judgeable(((c, seed) for c, fits_of_cell in table.items() for seed in fits_of_cell), "scratch")
        assert able == targets
    of_mine = ((c, seed) for c, fits_of_cell in judged.items() for seed in fits_of_cell)
    assert looks.judgeable(of_mine, "mine") == set()  # compared with what is not there
    assert looks.judged_fits([as_read(single)], "scratch") == [] and looks.count([], Judging(), []) == 0


@pytest.mark.slow
def test_a_comparison_of_one_seed_grows_without_a_look(tasks, tmp_path, capsys):
    """In a run directory too, which keeps its own list of looks."""
    flags = {"strategies": ("scratch", "full"), "epochs": None, "steps": 4, "points": 1}
    for number, seeds in enumerate(((0,), (0, 1), (0, 1, 2))):
        compare.main(["compare", *command(tasks, tmp_path, **flags, seeds=seeds), "--longer_scratch=false"])
        output = told_by(capsys)
        assert ("no look at these fits is counted" in output) == (number == 0)
        assert (tmp_path / "w" / "looks.json").exists() == (number > 0)
        assert ("looked at 2 times with 1 planned" in output) == (number == 2)
        assert directory.read_record(tmp_path / "w" / "study.json")["look"] == number


def test_planned_looks_are_looks(tmp_path, capsys):
    for number, seeds in enumerate(((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)), 1):
        report.main(["report", *theirs(tmp_path / str(number), seeds=seeds), "--looks=2"])
        output = told_by(capsys)
        assert (f"look {number} of 2 planned" in output) == (number < 3) == ("Nothing was judged" not in output)


@pytest.fixture
def copied(failing, tmp_path, monkeypatch):
    """(a copy of the run directory, its flags), of the user who made it."""
    folder, flags = failing
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shutil.copytree(folder / "w", tmp_path / "w")
    return tmp_path, flags


def test_a_report_is_judged_as_its_run_was(copied, tasks, capsys):
    folder, _ = copied
    output = f"--output={folder / 'pages'}"
    for more in ("--margin=3", "--level=0.6", "--family=budgets", "--looks=2", "--against=full"):
        with pytest.raises(InputError, match=f"'{folder / 'w'}' was judged with {more.split('=')[0]}="):
            report.main(["report", f"--runs={folder / 'w'}", output, more])
    assert not (folder / "pages").exists()
    report.main(["report", f"--runs={folder / 'w'}", output, "--margin=0.5"])
    assert "Nothing was judged" not in told_by(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copy", "new"])
def test_looks_survive_a_copy_that_forgets_them_and_a_new_run_directory(way, copied, tasks, capsys):
    folder, flags = copied
    if way == "copy":
        for name in ("looks.json", "study.json"):
            (folder / "w" / name).unlink()
    else:
        (folder / "w").rename(folder / "before")
    grown = command(tasks, folder, **{**flags, "seeds": (0, 1, 2, 3), "workdir": folder / "w"})
    compare.main(["compare", *grown, "--eval=source", "--longer_scratch=false"])
    output = told_by(capsys)
    assert "this is look 2 at such fits with 1 planned" in output  # before anything was trained
    assert "Nothing was judged: looked at 2 times with 1 planned" in output
    report.main(["report", f"--runs={folder / 'w'}", f"--output={folder / 'pages'}"])
    assert "Nothing was judged: looked at 2 times with 1 planned" in told_by(capsys)
    with pytest.raises(InputError, match=r"judged before with --margin=0\.5, not 2\.0"):
        again = command(tasks, folder, **{**flags, "workdir": folder / "another"})
        compare.main(["compare", *again, "--longer_scratch=false", "--margin=2"])
    assert not (folder / "another").exists()


def test_runs_side_by_side_are_no_look_but_pooled_seeds_are():
    judging = Judging()
    first, two = (
        {cell(name): fits([0.5] * 3, seed=i), cell("scratch"): fits([0.4] * 3)}
        for i, name in enumerate(("full", "mine"))
    )
    more = {cell("full"): {i + 3: at(0.5) for i in range(3)}, cell("scratch"): {i + 3: at(0.4) for i in range(3)}}
    runs = []
    for number, table in enumerate((first, two, more)):
        part = as_read(table)
        rows = [replace(row, key=f"{row.strategy}{row.seed}") for row in part.rows]
        runs.append([part._replace(rows=rows)])
        looks.write(looks.judged_fits(runs[number], "scratch"), judging, 1, [looks.place()])
    assert looks.count(looks.judged_fits_of_runs(runs[:2], "scratch"), judging, [looks.place()]) == 1
    assert looks.count(looks.judged_fits_of_runs([runs[0], runs[2]], "scratch"), judging, [looks.place()]) == 3
    assert (
        looks.count(looks.judged_fits([*runs[0], *runs[1]], "mine"), Judging(against="mine"), [looks.place()]) == 1
    )  # another


def test_where_looks_cannot_be_kept_it_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("a file where the cache is to be")
    report.main(["report", *theirs(tmp_path / "a")])
    assert "looks are counted in this run's folder alone" in told_by(capsys)


# What differs between seeds


def speaks(tasks, **flags):
    flag_values = {"source": str(tasks / "digits.npz"), "target": str(tasks / "clothes.npz"), "hidden": (8,)}
    flag_values |= {"strategies": ("scratch", "full"), "seeds": (0, 1, 2), "steps": 20, "workdir": "w", **flags}
    flag_values = {name: value for name, value in flag_values.items() if value is not None}
    settings = Settings.from_flags(**flag_values)
    parts = compare.planned(flag_values, CompareFlags(), settings, process.prepare(settings))
    for part in parts:
        judging.require_variation(part.experiment)
    return compare.notes(parts, CompareFlags())


ANEW = "sources are trained anew with each seed, so the verdicts speak of the way of pretraining"
ONE = "the verdicts speak of this one trained source"


def test_a_pinned_source_is_one_source(tasks):
    assert ANEW in speaks(tasks) and ONE not in speaks(tasks)
    pinned = speaks(tasks, source_seed=0)
    assert ONE in pinned and ANEW not in pinned
    assert ONE in speaks(tasks, seeds=(3,))


def test_a_checkpoint_of_one_fit_and_one_of_several(tasks, finished):
    run = finished[0]
    several = speaks(tasks, source=None, source_checkpoint=str(run), seeds=(0, 1))
    assert ANEW in several
    weights = speaks(tasks, source=None, source_checkpoint=str(run), seeds=(0,))
    assert ONE in weights


@pytest.mark.parametrize("stream", ["head", "order", "draw"])
def test_every_pinned_stream_is_told(stream, tasks):
    notes = speaks(tasks, **{f"{stream}_seed": 5}, train_examples=("4/class",))
    assert [note for note in notes if f"--{stream}_seed pins" in note]
    assert not [note for note in speaks(tasks, train_examples=("4/class",)) if "pins" in note]


def test_at_all_labels_it_is_about_one_training_set(tasks):
    sentence = (
        "which is every training example, no draw varies: what is said there, and in an area as far as that is of it, "
        "is of this one training set"
    )
    assert f"at all, {sentence}" in speaks(tasks)
    assert f"at 120, {sentence}" in speaks(tasks, train_examples=("4/class", "120"))  # all there are, by another name
    assert not any(sentence in note for note in speaks(tasks, train_examples=("4/class",)))


def test_sources_that_differ_in_kind_are_each_told_once():
    anew, single = judging.Variation("a", 3, 3, (), ()), judging.Variation("b", 1, 3, (), ())
    assert judging.spoken_of([anew, single, single]) == [f"a: {ANEW}", f"b: {ONE}"]
    assert judging.spoken_of([anew._replace(sources=2)]) == [
        "2 trained sources serve 3 seeds, so the verdicts speak of these sources"
    ]


def test_seeds_that_vary_nothing_are_refused(tasks):
    pins = {"source_seed": 0, "head_seed": 0, "order_seed": 0}
    with pytest.raises(InputError, match="leave nothing that --seeds could vary"):
        speaks(tasks, **pins, draw_seed=0, train_examples=("4/class",))
    with pytest.raises(InputError, match="leave nothing that --seeds could vary"):
        speaks(tasks, **pins)  # all labels: there is no draw either
    speaks(tasks, **pins, train_examples=("4/class",))


def test_a_report_of_a_transfer_says_what_its_seeds_vary(finished, tmp_path, capsys):
    report.main(["report", f"--runs={finished[0]}", f"--output={tmp_path / 'pages'}"])
    output = told_by(capsys)
    assert ANEW in output and "this one training set" in output


def test_the_base_is_found_however_its_options_are_written(tasks, tmp_path, monkeypatch):
    """A fit is known by the options as they were read: 0.50 is 0.5."""
    judgings: list[Judging] = []
    monkeypatch.setattr("experiments.runs.fit.within", lambda *positional: [])
    monkeypatch.setattr(compare, "_predictions", lambda *positional: None)
    monkeypatch.setattr(compare_page, "show", lambda folder, parts, judging, *more: judgings.append(judging))
    positional = command(tasks, tmp_path, strategies=("full", "lp_ft:start=0.50"))
    compare.main(["compare", *positional, "--against=lp_ft:start=0.50"])
    assert [judging.against for judging in judgings] == ["lp_ft:start=0.5"]


# One label budget, chosen before; and a band over all of them


def of_three_budgets():
    """Two strategies and scratch at 10, 50 and 200 labels, five seeds and 400 items each."""
    rates = {"scratch": (0.5, 0.6, 0.8), "early": (0.7, 0.62, 0.8), "late": (0.5, 0.66, 0.7)}
    return {
        cell(name, budget): fits([rate + 0.004 * i for i in range(5)], seed=len(name) + budget)
        for name, by_budget in rates.items()
        for budget, rate in zip((10, 50, 200), by_budget, strict=True)
    }


def test_one_budget_is_judged_as_if_the_others_were_not_there():
    table = of_three_budgets()
    family, others = judgements(table, kind="50")
    alone, none = judgements({where: scores for where, scores in table.items() if where.budget == 50})
    assert [comparison.budgets for comparison in family] == [(50,), (50,)] and none == []
    assert [(comparison.word, comparison.low, comparison.high, comparison.p) for comparison in family] == [
        (comparison.word, comparison.low, comparison.high, comparison.p) for comparison in alone
    ]
    assert {(comparison.strategy, comparison.budgets[0]) for comparison in others} == {
        (name, n) for name in ("early", "late") for n in (10, 200)
    }
    assert not any(comparison.word for comparison in others)
    for wrong, message in (("70", "no fit has 70 labels: there are 10, 50 and 200"), ("0", "a number of labels")):
        with pytest.raises(InputError, match=message):
            judgements(table, kind=wrong)


def test_a_strategy_of_one_budget_is_among_the_areas_and_among_the_budgets_by_themselves():
    table = {
        where: scores for where, scores in of_three_budgets().items() if where[2:4] not in (("late", 10), ("late", 50))
    }
    family, others = judgements(table)
    assert [comparison.budgets for comparison in family if comparison.strategy == "late"] == [(200,)]
    assert [comparison.budgets for comparison in others if comparison.strategy == "late"] == [(200,)] and len(
        others
    ) == 4


def test_the_band_over_budgets_covers_together_as_max_t_over_all_of_its_points():
    """Each interval is mean -+ c se with a c beyond that of one alone and within Bonferroni's of the six."""
    table = of_three_budgets()
    band, _ = judgements(table, kind="budgets")
    assert len(band) == 6
    for verdict in band:
        scores = comparisons.differences(
            table, cell(verdict.strategy, *verdict.budgets), cell("scratch", *verdict.budgets)
        )
        alone, bonferroni = (statistics.crossed(scores, level) for level in (0.95, 1 - 0.05 / 6))
        assert verdict.mean == pytest.approx(scores.mean())
        assert alone.high - alone.low < verdict.high - verdict.low <= (bonferroni.high - bonferroni.low) * 1.001


def test_the_page_draws_the_band_and_names_the_labels_of_each_row():
    family, _ = judgements(of_three_budgets(), kind="budgets")
    drawn, text = figures.bands(family, figures.strokes(["early", "late"]))
    [axes] = drawn.axes
    assert "early, 10 labels +" in text and len(axes.lines) == 3  # 0 and a line each
    for name, line in zip(("early", "late"), axes.lines[1:], strict=True):
        of_strategy = [verdict for verdict in family if verdict.strategy == name]
        np.testing.assert_allclose(line.get_ydata(), [100 * verdict.mean for verdict in of_strategy])
    rows, _ = figures.forest(family)
    assert "early, 50 labels" in [tick.get_text() for tick in rows.axes[0].get_yticklabels()]
    assert figures.bands(judgements(of_three_budgets(), kind="50")[0], figures.strokes(["early", "late"])) is None


def test_a_strategy_among_several_tasks_is_named_with_its_tasks_and_without_a_source_with_its_target():
    transfers = [comparison_of("full", 0.1, "positive", target=target) for target in ("a", "b")]
    alone = comparison_of("scratch", 0.1, "positive", source=None, target="a")
    assert comparisons.named_among(transfers[1], transfers).endswith(f" from {transfers[1].source} to b")
    assert comparisons.named_among(alone, [alone, *transfers]) == "scratch on a"
