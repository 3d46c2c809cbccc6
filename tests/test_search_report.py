"""What a search leaves: flags that run as they are, a table of its trials, a page; and the range test of rates."""

import contextlib
import csv
import html
import io
import re

import numpy as np
import pytest
from test_programs import arguments, command
from test_report import alts, visible
from test_search import line, study_of

from experiments import search, transfer
from experiments.pages import export, figures
from experiments.pages import search as search_page
from experiments.pages.report import Provenance
from experiments.runs import command_line, directory, search_flags, tuned
from experiments.runs.settings import Settings, parse_flags
from tljax import train
from tljax.study import range_test, space
from tljax.study import search as studies
from tljax.types import InputError

DRAWN = "data:image/svg+xml;base64,"


def trial_record(number, rate, accuracy, loss, **more):
    """A trial of a study of rates; without an accuracy it diverged."""
    odd = accuracy is None
    process = {"owner": "process 1 on x", "begin": "2026-11-23T08:00:00", "end": "2026-11-23T08:00:01", **more}
    value = 0.0 if odd else accuracy
    return studies.TrialRecord(
        number, "COMPLETE", value, accuracy, loss, odd, **process, values={"learning_rate": rate}
    )


@pytest.fixture(scope="module")
def searched(tasks, tmp_path_factory):
    """(run directory, what was printed) of a search over rates, one of which is sure to diverge."""
    folder = tmp_path_factory.mktemp("searched")
    argv = [part for part in line(tasks, folder, "--trials=4", "--sampler=Random") if "--space=learning" not in part]
    rates = "--space=learning_rate:in:0.2,1e30"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("experiments.pages.figures.svg", lambda figure: DRAWN)
        search.main([*argv, rates, "--source_learning_rate=0.1", "--loss=l2_loss", "--source_loss=l2_loss"])
    return folder / "w", out.getvalue()


@pytest.mark.slow
def test_best_flags_run_as_they_are_and_give_the_last_fits_again(searched, tmp_path, no_pictures):
    folder, _ = searched
    lines = transfer.run(
        **parse_flags(["transfer", f"--flagfile={folder / 'best.flags'}"]), workdir=str(tmp_path / "new")
    )
    mine = {fit.key: fit.test_accuracy for fit in lines if fit.strategy == "head_only"}
    places = list(folder.glob("final/*"))
    theirs = [fit for place in places for fit in directory.results(place) if fit.strategy == "head_only"]
    assert mine and mine == {fit.key: fit.test_accuracy for fit in theirs}


def test_several_studies_leave_the_flags_of_each(tmp_path):
    settings_by_name = {
        name: Settings.from_flags(strategies=(name,), train_examples=("5/class",), learning_rate=rate, source_steps=7)
        for name, rate in (("last_k:k=2", 0.1 + 0.2), ("full", 1e-5))
    }
    tuned.write_winners(
        tmp_path,
        {tuned.Arm(name, "5/class", ()): tuned.Winner(None, None, final) for name, final in settings_by_name.items()},
    )
    assert {file.name for file in tmp_path.glob("best/*")} == {"last_k_k_2-5_class.flags", "full-5_class.flags"}
    read = parse_flags(["x", f"--flagfile={tmp_path}/best/last_k_k_2-5_class.flags"])
    assert Settings.from_flags(**read) == settings_by_name["last_k:k=2"]


def test_the_table_of_trials_is_what_the_study_holds(searched):
    folder, _ = searched
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    trials = study_of(folder).trials
    assert [int(row["number"]) for row in rows] == list(range(4))
    for row, trial in zip(rows, trials, strict=True):
        assert (row["strategy"], row["budget"], row["state"]) == ("head_only", "all", "COMPLETE")
        assert float(row["value"]) == trial.value
        assert row["learning_rate"] == trial.params["learning_rate"]
        assert float(row["penalty.l2.weight"]) == trial.params["penalty.l2.weight"]
        odd = trial.params["learning_rate"] == "1e30"
        assert row["diverged"] == str(odd)
        assert (row["validation_accuracy"], row["validation_loss"] == "") == ("" if odd else row["value"], odd)
        assert row["owner"] == trial.user_attrs["lease"][0]
        assert row["begin"] == trial.datetime_start.isoformat(timespec="seconds") <= row["end"]
    assert {row["diverged"] for row in rows} == {"True", "False"}


def test_trials_that_did_not_end_or_were_given_up_are_told_too():
    ranges = (space.parse("momentum:between:0:1"),)
    opened = studies.opened("states", None, "Random", "Nop", 0, 60.0, {})
    pruned, failed, running = studies.ask(opened, ranges, 3, 3)
    pruned.handle.report(0.25, 1)
    studies.tell(opened.study, pruned, 0.25, pruned=True)
    studies.give_back(opened.study, failed)
    records = studies.trials(opened.study)
    assert [record.state for record in records] == ["PRUNED", "FAIL", "RUNNING", "WAITING"]
    assert [record.value for record in records] == [0.25, None, None, None]
    assert {(record.accuracy, record.loss, record.diverged) for record in records} == {(None, None, False)}
    assert [record.end != "" for record in records] == [True, True, False, False]
    assert records[2].values == running.chosen


def test_values_with_commas_quotes_and_lines_survive_the_table():
    odd = 'adam:b1=0.9,"b2"\n=1'
    trials = {('mine.py:a,"b"', "all"): [trial_record(0, odd, 0.5, 1.0)], ("full", "all"): []}
    [row] = csv.DictReader(io.StringIO(export.trials(trials), newline=""))
    assert (row["strategy"], row["learning_rate"]) == ('mine.py:a,"b"', odd)


def test_a_trial_is_judged_as_a_run_with_a_validation_split_says(searched, tasks, tmp_path, no_pictures):
    """Accuracy and loss are those that experiments.transfer records of the same fit."""
    folder, _ = searched
    record = next(record for record in studies.trials(study_of(folder)) if not record.diverged)
    chosen = {"learning_rate": float(record.values["learning_rate"])}
    penalty = f"l2:weight={record.values['penalty.l2.weight']}"
    flags = {"strategies": ("scratch", "head_only"), "seeds": (search_flags.FIRST_SEED,), "validation": 0.2}
    recipe = {"loss": "l2_loss", "source_learning_rate": 0.1, "source_penalty": "l2:weight=1e-4", "penalty": penalty}
    lines = transfer.run(**arguments(tasks, tmp_path / "run", source_validation=0.0, **flags, **recipe, **chosen))
    [line] = [line for line in lines if line.strategy == "head_only"]
    assert record.accuracy == line.validation_accuracy
    assert record.loss == pytest.approx(line.validation_loss, rel=1e-5)


def test_the_page_says_what_won_what_diverged_and_how_to_get_it_again(searched):
    folder, out = searched
    text = (folder / "report.html").read_text()
    shown = visible(text)
    won = max(
        (record for record in studies.trials(study_of(folder)) if not record.diverged),
        key=lambda record: record.accuracy,
    )
    assert "digits.npz -> " in shown and f"{won.values['penalty.l2.weight']:.4g}" in shown
    odd = sum(record.diverged for record in studies.trials(study_of(folder)))
    assert f"{odd} diverged" in shown and "Tuned against tuned" in shown
    assert "://" not in text.replace(DRAWN, "") and "<script" not in text
    assert "scratch is added" not in out and f"report: {folder / 'report.html'}" in out


def test_the_flags_on_the_page_are_those_of_the_search(searched, tmp_path):
    """Given again, they find its study done: one of other flags would be refused."""
    folder, _ = searched
    lines = re.findall(r"<pre>(.*?)</pre>", (folder / "report.html").read_text(), re.S)[1]
    (tmp_path / "again.flags").write_text(html.unescape(lines))
    before = len(study_of(folder).trials)
    _, options = command_line.read(["search", f"--flagfile={tmp_path / 'again.flags'}"], search.SearchFlags)
    assert [str(dimension) for dimension in options.ranges] == study_of(folder).user_attrs["about"]["space"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: DRAWN)
        search.main(["search", f"--flagfile={tmp_path / 'again.flags'}", f"--workdir={folder}"])
    assert len(study_of(folder).trials) == before


STUDY = [
    trial_record(0, 0.01, 0.5, 1.2),
    trial_record(1, 0.1, 0.8, 0.4),
    trial_record(2, 1.0, 0.6, 9.0),
    trial_record(3, 5.0, None, None),
]


def test_pictures_say_the_best_and_where_it_diverges(no_pictures):
    """Also where an accuracy is best at one rate and the loss at another."""
    _, accuracy = figures.searched_values("full", STUDY, "learning_rate", "accuracy", log=True)
    assert "3 trials between 0.01 and 1" in accuracy and "best 80.0 % at 0.1" in accuracy
    assert "1 diverged, from 5 on" in accuracy
    _, loss = figures.searched_values("full", STUDY, "learning_rate", "loss", log=True)
    assert "0.400 nats at 0.1" in loss
    _, progress = figures.search_progress({"full": STUDY, "scratch": STUDY[2:]})
    assert "full 80.0 %, first at trial 1; scratch 60.0 %, first at trial 2" in progress
    assert figures.search_progress({"full": STUDY[3:]}) is None
    assert figures.searched_values("full", STUDY[3:], "learning_rate", "loss", log=True) is None


def test_the_page_says_which_value_is_at_an_edge(no_pictures):
    ranges = (space.parse("learning_rate:log:1e-3:0.1"),)
    provenance = Provenance({"jax": "1"}, "--x=1", "python")
    study = search_page.Study("last_k:k=<2>", ranges, STUDY, 1)
    text = search_page.page("a <b>", "Lead.", [study], [], [("full", "said")], ["a note"], provenance)
    assert "the highest of its range" in visible(text)
    assert "<b>" not in text.replace("<b></b>", "") and "last_k:<wbr>k=&lt;2&gt;" in text
    assert "Results" not in visible(text)  # nothing was trained anew


@pytest.mark.slow
def test_pages_are_drawn_without_network():
    """With numbers on a logarithmic axis as they are written, not as formulas."""
    import base64
    import xml.etree.ElementTree as ET

    provenance = Provenance({"jax": "1"}, "--x=1", "python")
    study = search_page.Study("full", (space.parse("learning_rate:log:1e-3:10"),), STUDY, 1)
    rates = range_test.rates(1e-3, 10, 40)
    losses = 0.5 + np.abs(np.log10(rates))
    pages = [
        search_page.page("search", "Lead.", [study], [], [], [], provenance),
        search_page.range_page("full", "Lead.", rates, losses, range_test.suggested(rates, losses), provenance),
    ]
    for text, count in zip(pages, (3, 1), strict=True):
        images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
        assert len(images) == len(alts(text)) == count
        for image in images:
            svg = base64.b64decode(image).decode()
            ET.fromstring(svg)
            assert "$" not in svg
        assert "0.01" in base64.b64decode(images[-1]).decode()


def test_dry_run_says_what_parts_the_trials(tasks, tmp_path, capsys):
    more = ["--space=batch_size:in:20,40", "--space=epochs:int:1:3", "--space=momentum:between:0:0.9", "--dry_run"]
    search.main(line(tasks, tmp_path, *more))
    assert "at most 6 shapes, by batch_size (2), epochs (3)" in capsys.readouterr().out
    search.main(line(tasks, tmp_path, "--dry_run"))
    assert "one shape, trained together" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


SHAPES = [
    ("learning_rate:in:0.1,1", 1),
    ("momentum:in:0,0.5,0.9", 2),
    ("optimizer:in:sgd,adam,adamw", 3),
    ("hidden:in:8,16", 2),
    ("penalty.l2.weight:in:0.1,0.2", 1),
    ("strategy.last_k.k:int:1:3", 3),
    ("label_smoothing:in:0,0.1,0.2", 2),
    ("head:in:fresh,zero", 1),
]


@pytest.mark.parametrize(("text", "count"), SHAPES)
def test_shapes_are_what_is_compiled(text, count):
    flags = {"penalty": "l2:weight=1", "strategies": ("last_k:k=1",)}
    assert search_flags.shapes(flags, space.parse(text)) == count


def test_the_range_test_suggests_a_tenth_of_the_rate_where_the_loss_is_lowest():
    """Of a loss whose lowest rate is known, whatever it does where it runs away."""
    rates = range_test.rates(1e-5, 10, 400)
    np.testing.assert_allclose(rates[1:] / rates[:-1], (10 / 1e-5) ** (1 / 399), rtol=1e-5)
    noise = 0.05 * np.random.default_rng(0).normal(size=400)
    losses = 0.5 + (np.log10(rates) + 1) ** 2 / 8 + noise
    gone = np.where(rates > 2, np.inf, np.where(rates > 1, 1e30, losses))
    for curve in (losses, gone):
        suggestion = range_test.suggested(rates, curve)
        assert 0.05 < suggestion.lowest < 0.2 and suggestion.rate == pytest.approx(suggestion.lowest / 10)
        assert suggestion.edge == ""
    assert range_test.suggested(rates, losses).diverged is None
    assert suggestion.diverged == pytest.approx(2, rel=0.04)


def test_the_range_test_says_which_end_was_in_the_way():
    rates = range_test.rates(1e-3, 1, 100)
    assert range_test.suggested(rates, -np.log(rates)).edge == "highest"
    assert range_test.suggested(rates, np.log(rates) + 10).edge == "lowest"


def test_the_range_test_is_one_fit_at_rising_rates(tasks, tmp_path, no_pictures, monkeypatch, capsys):
    """Its losses are those of softmax regression by NumPy, on the same batches; it leaves a page and no study."""
    seen = {}
    fit, suggested = train.fit, range_test.suggested

    def watched(program, trials, data, *rest):
        seen.update(trial=trials[0], images=np.asarray(data.inputs[0]), labels=np.asarray(data.targets))
        return fit(program, trials, data, *rest)

    monkeypatch.setattr(train, "fit", watched)
    monkeypatch.setattr(
        range_test, "suggested", lambda rates, losses: seen.update(losses=losses) or suggested(rates, losses)
    )
    argv = command(tasks, tmp_path, strategies=("scratch", "full"), hidden=(), steps=30, source=None)
    search.main(["search", *argv, "--lr_range_test", "--lr_low=1e-3", "--lr_high=1e3"])
    kernel, bias = (np.array(seen["trial"].params["head"][name], np.float64) for name in ("kernel", "bias"))
    expected = []
    for chosen, rate in zip(seen["trial"].order(0, 30), np.geomspace(1e-3, 1e3, 30), strict=True):
        x, hot = seen["images"][chosen].reshape(len(chosen), -1) / 255, np.eye(3)[seen["labels"][chosen]]
        logits = x @ kernel + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        expected.append(-np.log(np.maximum((p * hot).sum(1), 1e-300)).mean())
        kernel, bias = kernel - rate * x.T @ (p - hot) / len(x), bias - rate * (p - hot).mean(0)
    calm = np.geomspace(1e-3, 1e3, 30) < 1  # later, rounding grows
    np.testing.assert_allclose(seen["losses"][calm], np.array(expected)[calm], rtol=1e-4)
    out = capsys.readouterr().out
    assert "range test of scratch at all: 30 steps, the rate rising exponentially from 0.001 to 1e+03" in out
    assert f"--learning_rate={suggested(seen['trial'].rates, seen['losses']).rate:.2g}" in out
    assert {file.name for file in (tmp_path / "w").iterdir()} == {".lock", "flags.flags", "lr_range_test.html"}


RANGES = [
    (["--lr_low=0"], "give 0 < LOW < HIGH"),
    (["--lr_low=1", "--lr_high=0.1"], "give 0 < LOW < HIGH"),
    (["--steps=5"], "has 5 steps: give more"),
]


@pytest.mark.parametrize(("more", "message"), RANGES, ids=[" ".join(more) for more, _ in RANGES])
def test_a_range_test_that_shows_nothing_is_refused(more, message, tasks, tmp_path):
    argv = command(tasks, tmp_path, strategies=("scratch",), hidden=(), source=None)
    with pytest.raises(InputError, match=message):
        search.main(["search", *argv, "--lr_range_test", *more])
