"""Seeds added until it is decided: which fits a run then has, that a killed run goes the same way, what pages say."""

import shutil
from dataclasses import replace

import pytest
from test_programs import command, results

from experiments import compare
from experiments.runs import directory, fit, until
from experiments.runs.judging import Judging, from_record, require_valid, to_record
from experiments.runs.settings import Settings, parse_flags
from tljax.study import sequences
from tljax.study.verdicts import Comparison
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(*flags):
    return Settings.from_flags(**parse_flags(["compare", "--source=a", "--target=b", *flags]))


DECIDED = Judging(until="decided")


def test_rounds_are_of_one_size_without_until_and_for_so_few_seeds():
    four = settings("--seeds=0-3")
    assert until.rounds(Judging(), four, 40) == [(0, 1, 2, 3)]
    assert until.rounds(DECIDED, four, 5) == [(0, 1, 2, 3, 4)]
    assert until.of_a_plan(DECIDED, 5).until is None and until.of_a_plan(DECIDED, 6).until == "decided"
    assert until.rounds(DECIDED, four, 9) == sequences.rounds((0, 1, 2, 3), 9) == [(0, 1, 2, 3, 4, 5), (6, 7), (8,)]


@pytest.mark.parametrize(
    ("judging", "flags", "most", "says"),
    [
        (DECIDED, ["--seeds=0-3", "--train_examples=1/class:seeds=2"], 40, "seeds of its own"),
        (DECIDED, ["--seeds=0-9"], 8, "most 8 seeds are fewer than the 10"),
        (DECIDED, [], 1, "--most=1"),
        (DECIDED, ["--distributed"], 40, "one process"),
        (replace(DECIDED, looks=3), [], 40, "--looks=3"),
        (Judging(until="never"), [], 40, "--until=never"),
    ],
)
def test_what_does_not_go_with_until_is_refused(judging, flags, most, says):
    with pytest.raises(InputError, match=says):
        require_valid(judging)
        until.rounds(judging, settings(*flags), most)


def test_the_record_of_a_judgement_says_until_where_it_was_and_nothing_where_not():
    assert "until" not in to_record(Judging()) and to_record(DECIDED)["until"] == "decided"
    assert from_record(to_record(DECIDED)) == DECIDED


def comparison(strategy, settled, source="a", target="b"):
    known = {"budgets": (10,), "against": "scratch at equal target steps", "fits": 6, "items": 9, "mean": 0.1}
    rest = {"low": 0.0, "high": 0.2, "word": "", "margin": 0.1, "power": None, "p": None}
    return Comparison(source=source, target=target, strategy=strategy, settled=settled, **known, **rest)


def test_what_is_open_goes_on_with_what_it_is_compared_with():
    family = [comparison("full", True), comparison("head_only", False), comparison("full", True, target="c")]
    assert until.open_of(family, "scratch") == {("a", "b", "head_only"), ("a", "b", "scratch"), (None, "b", "scratch")}
    explored = comparison("head_only", False)._replace(exploratory=True)
    assert until.open_of([comparison("full", True), explored], "scratch") == set()
    assert "open are head_only; 2 more seeds" in until.line(family, 6, 2)
    assert "no verdict is open" in until.line(family[:1], 6, 2)


def line(tasks, folder, *more):
    flags = {"strategies": ("full", "head_only"), "train_examples": ("4/class",), "steps": 12, "seeds": (0, 1)}
    flagged = command(tasks, folder, **flags, learning_rate=0.3)
    margins = ["--margin=55", "--level=0.999", "--until=decided", "--most=12", "--nolonger_scratch"]
    return ["compare", *flagged, *margins, *more]


def fits_of(folder):
    return {(row.strategy, row.seed): row.predictions_sha256 for row in results(folder)}


@pytest.mark.slow
def test_a_run_until_decided_killed_between_and_in_rounds_has_the_bits_of_one_that_was_not(
    tasks, tmp_path, monkeypatch
):
    """Killed in the first round and after it; then it goes on, and once more, which trains nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compare.main(line(tasks, tmp_path / "whole"))
    whole = tmp_path / "whole" / "w"
    seeds = {
        name: {seed for strategy, seed in fits_of(whole) if strategy == name}
        for name in ("scratch", "full", "head_only")
    }
    assert {*range(6)} < seeds["scratch"] == seeds["full"] | seeds["head_only"] and max(seeds["scratch"]) < 12
    assert seeds["full"] != seeds["head_only"]  # what is decided stopped
    record = directory.read_record(whole / "study.json")
    assert record["judging"]["until"] == "decided"
    assert "seeds were added until no verdict was open" in (whole / "report.md").read_text()
    shutil.rmtree(tmp_path / "cache")
    calls, train = [0], fit.within

    def killed(experiment, *arguments):
        calls[0] += 1
        if calls[0] in stops:
            raise KeyboardInterrupt
        return train(experiment, *arguments)

    monkeypatch.setattr(fit, "within", killed)
    for stops in ({3}, {4}, set(), set()):
        calls[0] = 0
        try:
            compare.main(line(tasks, tmp_path / "killed"))
        except KeyboardInterrupt:
            assert stops
    assert fits_of(tmp_path / "killed" / "w") == fits_of(whole)
    name = "comparisons.csv"
    assert (tmp_path / "killed" / "w" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_seeds_judged_as_planned_are_refused_until_and_the_other_way_round(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flagged = command(tasks, tmp_path, strategies=("full",), train_examples=("4/class",), steps=4, seeds=(0, 1))
    compare.main(["compare", *flagged, "--nolonger_scratch"])
    with pytest.raises(InputError, match="judged before with no --until, not --until=decided"):
        compare.main(["compare", *flagged, "--nolonger_scratch", "--until=decided", "--most=6"])
    monkeypatch.setattr(fit, "within", None)  # before anything is trained
    others = [flag for flag in flagged if not flag.startswith("--workdir=")]
    elsewhere = [*others, f"--workdir={tmp_path / 'elsewhere'}", "--nolonger_scratch"]
    with pytest.raises(InputError, match="judged before with no --until, not --until=decided"):
        compare.main(["compare", *elsewhere, "--until=decided", "--most=6"])
