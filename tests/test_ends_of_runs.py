"""Averages, ends by validation and what `finish` gives, from flags to results, and after a run was killed."""

import csv
import json
import re

import jax
import numpy as np
import pytest
from test_programs import arguments, command, parameters, results
from test_resume import Killed, killed_after, same_run

from experiments import compare, report, transfer
from experiments.runs import metrics, predictions, resume
from tljax import checkpoint
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

STOPS = """
import jax

from tljax import masks
from tljax.plateau import plateau
from tljax.types import Phase


def strategy(params, context):
    head = masks.union(masks.under(params, context.stages[-1:]), context.fresh)
    everything = masks.by_path(params, lambda path: True)
    return [
        Phase(0.0, head, until=plateau(patience=1), restore="best"),
        Phase(0.6, lambda params, context: everything, until=plateau(patience=1), restore="best", rate=0.5),
    ]


def finish(params, start, context, *, alpha=0.25):
    return {"between": jax.tree.map(lambda a, b: (1 - alpha) * a + alpha * b, start, params)}
"""


TIRES = """
from tljax import masks
from tljax.types import Phase


def after_some(scores):
    return len(scores) >= (4 if scores[0] < 0.5 else 5)


def strategy(params, context):
    return [Phase(0.0, masks.by_path(params, lambda path: True), until=after_some)]
"""


@pytest.fixture(scope="module")
def with_ends(tasks, tmp_path_factory):
    """(flags, run directory) of strategies with every kind of end."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "stops.py").write_text(STOPS, encoding="utf-8")
    flags = {
        "strategies": (f"stops={folder / 'stops.py'}:strategy", "scratch"),
        **{"epochs": None, "steps": 60, "points": 12, "checkpoint_every": 1, "validation": 0.3, "seeds": (0, 1)},
        **{"optimizer": "adam", "learning_rate": 0.02, "ema": 0.75, "source_ema": 0.0, "verdict_of": "best"},
    }
    transfer.run(**arguments(tasks, folder / "w", **flags))
    return flags, folder / "w"


def accuracy_of(flat, file):
    """The test accuracy of a hidden layer and a head, in NumPy."""
    with np.load(file) as arrays:
        images, labels = arrays["test_images"].reshape(40, -1) / 255, arrays["test_labels"]
    hidden = np.maximum(images @ flat["hidden_0/kernel"] + flat["hidden_0/bias"], 0)
    return ((hidden @ flat["head/kernel"] + flat["head/bias"]).argmax(1) == labels).mean()


@pytest.mark.slow
def test_a_run_keeps_every_end_and_its_results_are_of_the_one_that_was_named(with_ends, tasks):
    flags, folder = with_ends
    judged = {result.name: result for result in transfer.run(**arguments(tasks, folder, **flags))}
    of_target = [line for line in results(folder) if line.strategy != "pretrain"]
    assert all(line.ends is None for line in results(folder) if line.strategy == "pretrain")
    for line in of_target:
        names = {"best", "average"} | ({"between"} if line.strategy == "stops" else set())
        assert line.ends.keys() == names
        state = checkpoint.load(folder / line.checkpoint)[0]
        assert {f"{line.name}.{name}" for name in names} <= state.keys()
        for end in line.ends.values():
            predicted, labels = predictions.read(folder / end["predictions"], end["predictions_sha256"])
            assert (predicted == labels).mean() == end["test_accuracy"]
        best, curve = line.ends["best"], metrics.curves(folder, line.name)
        assert best["step"] == line.best_step and best["validation_accuracy"] == line.best_validation_accuracy
        assert judged[line.name].end == "best" and judged[line.name].test_accuracy == best["test_accuracy"]
        averaged = state[f"{line.name}.average"]
        assert any(not np.array_equal(averaged[path], leaf) for path, leaf in state[line.name].items())
        assert accuracy_of(averaged, tasks / "clothes.npz") == line.ends["average"]["test_accuracy"]
        assert len(curve["step"]) == 12 and curve["average"][-1] == line.ends["average"]["validation_accuracy"]


def test_phases_end_by_validation_restore_their_best_and_leave_the_rest_to_the_next(with_ends):
    _, folder = with_ends
    stops = [line for line in results(folder) if line.strategy == "stops"]
    source = next(line for line in results(folder) if line.strategy == "pretrain")
    assert all(line.phase_steps == [0, 36] and line.began[0] == 0 for line in stops)
    assert any(line.began[1] < 36 for line in stops) and any(line.stopped_step for line in stops)
    for line in stops:
        curve = metrics.curves(folder, line.name)
        in_last = (curve["step"] > line.began[1]) & (curve["step"] <= (line.stopped_step or 60))
        assert line.validation_accuracy == curve["accuracy"][in_last].max()
        if line.stopped_step:
            assert (curve["accuracy"][curve["step"] > line.stopped_step] == line.validation_accuracy).all()
            assert list(np.diff(curve["accuracy"][in_last])[-1:] <= 0) == [True]
        state, before = checkpoint.load(folder / line.checkpoint)[0], parameters(folder, source)
        if line.seed == source.seed:
            for path in (path for path in before if not path.startswith("head")):
                expected = 0.75 * before[path] + 0.25 * state[line.name][path]
                np.testing.assert_allclose(state[f"{line.name}.between"][path], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [24, 5, 9])
def test_a_run_with_ends_that_is_killed_goes_on_with_the_same_bits(with_ends, tasks, tmp_path, monkeypatch, count):
    flags, undisturbed = with_ends
    with monkeypatch.context() as patch:
        killed_after(count, patch)
        with pytest.raises(Killed):
            transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    same_run(tmp_path / "w", undisturbed)
    for line in results(undisturbed):
        for name, leaves in checkpoint.load(undisturbed / line.checkpoint)[0].items():
            again = checkpoint.load(tmp_path / "w" / line.checkpoint)[0][name]
            assert {path: leaf.tobytes() for path, leaf in leaves.items()} == {p: x.tobytes() for p, x in again.items()}
        for file in (end["predictions"] for end in (line.ends or {}).values()):
            assert (tmp_path / "w" / file).read_bytes() == (undisturbed / file).read_bytes()


@pytest.mark.slow
def test_what_is_saved_as_one_fit_ends_before_the_others_is_whole(tasks, tmp_path, monkeypatch, capsys):
    """A last phase that each fit ends at a point of its own, saved at every third point alone."""
    (tmp_path / "tires.py").write_text(TIRES, encoding="utf-8")
    flags = {
        "strategies": (f"tires={tmp_path / 'tires.py'}:strategy",),
        **{"epochs": None, "steps": 60, "points": 12, "checkpoint_every": 3, "validation": 0.3, "seeds": (0, 1, 2)},
        **{"optimizer": "adam", "learning_rate": 0.02},
    }
    transfer.run(**arguments(tasks, tmp_path / "whole", **flags))
    saves, save = [], resume._save

    def kept(place, keys, progress):
        save(place, keys, progress)
        saves.append([(part.step, part.over, part.optimizer is not None) for part in progress.parts])
        if any(part.over for part in progress.parts) and not all(part.over for part in progress.parts):
            raise Killed

    monkeypatch.setattr(resume, "_save", kept)
    for _ in range(4):
        try:
            transfer.run(**arguments(tasks, tmp_path / "w", **flags))
        except Killed:
            continue
        break
    assert any({over for _, over, _ in parts} == {True, False} for parts in saves), "no fit ended before the others"
    assert all(whole for parts in saves for _, _, whole in parts)
    assert "set aside" not in capsys.readouterr().out
    same_run(tmp_path / "w", tmp_path / "whole")


@pytest.mark.slow
def test_a_fit_with_ends_has_the_same_bits_alone(with_ends, tasks, tmp_path):
    flags, folder = with_ends
    transfer.run(**arguments(tasks, tmp_path / "w", **{**flags, "seeds": (1,), "devices": 1}))
    alone = {line.name: line for line in results(tmp_path / "w")}
    assert len(alone) == 3
    for line in (line for line in results(folder) if line.name in alone):
        assert line.ends == alone[line.name].ends and line.began == alone[line.name].began
        for path, leaf in parameters(folder, line).items():
            assert leaf.tobytes() == parameters(tmp_path / "w", alone[line.name])[path].tobytes()


FULL = "from tljax.strategies.full import strategy\n"
PHASES = """
from tljax import masks
from tljax.types import Phase


def strategy(params, context):
    return [Phase(0.0, masks.by_path(params, lambda path: True), {})]
"""
REFUSED = {
    "until without validation": (PHASES.format("until=lambda scores: False"), {}, "--validation=0.1"),
    "restore without validation": (PHASES.format("restore='best'"), {}, "--validation=0.1"),
    "until is no function": (PHASES.format("until=3"), {}, "until is 3: give a function"),
    "until fails": (PHASES.format("until=lambda: 0"), {"validation": 0.2}, "until of strategy '.*' fails"),
    "restore of something else": (PHASES.format("restore='last'"), {}, "restore is 'last': give 'best'"),
    "no rate": (PHASES.format("rate=0"), {}, "rate is 0: give a number above 0"),
    "finish is no function": (FULL + "finish = 3", {}, "its `finish` is 3, not a function"),
    "finish gives no dict": (FULL + "def finish(params, start, context): return params['head']['bias']", {}, "a dict"),
    "finish gives nothing": (FULL + "def finish(params, start, context): pass", {}, "returned None"),
    "finish lacks a stage": (
        FULL + "def finish(params, start, context): return {'a': {'head': params['head']}}",
        {},
        "finish of .* gives as 'a'",
    ),
    "finish changes a dtype": (
        FULL + "import jax\ndef finish(params, start, context): return {'a': jax.tree.map(lambda x: x > 0, params)}",
        {},
        "of bool.*, not float32",
    ),
    "finish names nothing": (FULL + "def finish(params, start, context): return {'a/b': params}", {}, "take letters"),
    "finish names what is": (FULL + "def finish(params, start, context): return {'best': params}", {}, "a meaning"),
    "finish fails": (FULL + "def finish(params, start, context): return 1 / 0", {}, "finish of strategy .* fails"),
    "verdicts of no split": (FULL, {"verdict_of": "best"}, "--validation=0.1"),
    "verdicts of no average": (FULL, {"verdict_of": "average"}, "--ema=0.999"),
    "verdicts of no finish": (FULL, {"verdict_of": "soup"}, "none of the strategies has a `finish`"),
    "verdicts of another finish": (
        FULL + "def finish(params, start, context): return {'soup': params}",
        {"verdict_of": "soop"},
        "no such end; nearest: 'soup'",
    ),
    "an average of everything": (FULL, {"ema": 1.0}, "--ema=1.0: give a decay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ends_that_cannot_be_meant_are_refused_before_anything_is_trained(name, tasks, tmp_path):
    text, flags, message = REFUSED[name]
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    flags = {"strategies": ("scratch", f"{tmp_path / 'mine.py'}:strategy"), **flags}
    with pytest.raises(InputError, match=message) as refused:
        transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    assert "\n" not in str(refused.value) and not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_study_and_its_report_are_of_the_end_that_was_planned(tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where others have judged fits like these otherwise
    flags = {"strategies": ("full",), "seeds": (0, 1), "steps": 40, "epochs": None, "points": 8, "validation": 0.3}
    flags |= {"optimizer": "adam", "learning_rate": 0.05, "train_examples": ("20:seeds=2",), "batch_size": 5}
    line = [*command(tasks, tmp_path, **flags, verdict_of="best"), "--longer_scratch=false"]
    compare.main(["compare", *line])
    sentence = "test results and verdicts are of the best step by validation of each fit"
    assert sentence in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "w" / "study.json").read_text())
    assert record["judging"]["verdict_of"] == "best"
    lines = {line.name: line for line in results(tmp_path / "w")}
    judged = [row for part in record["parts"] for row in part["rows"]]
    assert len(judged) == 4
    for row in judged:
        best = lines[row["name"]].ends["best"]
        assert row["end"] == "best" and row["test_accuracy"] == best["test_accuracy"]
        assert row["predictions"] == best["predictions"] != lines[row["name"]].predictions
    report.main(["report", f"--runs={tmp_path / 'w'}", f"--output={tmp_path / 'r'}"])
    assert sentence in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "r" / "fits.csv").open(encoding="utf-8") as file:
        of_report = {row["name"]: float(row["test_accuracy"]) for row in csv.DictReader(file)}
    assert of_report == {row["name"]: row["test_accuracy"] for row in judged}
    other = [*command(tasks, tmp_path, **flags, verdict_of="last"), "--longer_scratch=false"]
    with pytest.raises(InputError, match="--verdict_of"):
        compare.main(["compare", *other])
    last = {**flags, "workdir": tmp_path / "last", "seeds": (2, 3), "strategies": ("full", "scratch")}
    transfer.run(**arguments(tasks, **last))
    runs = f"--runs={tmp_path / 'w'},{tmp_path / 'last'}"
    with pytest.raises(InputError, match="several ends, best and last"):
        report.main(["report", runs, f"--output={tmp_path / 'both'}"])


def test_steps_are_traced_into_the_run_directory_and_change_no_bits(tasks, tmp_path, capsys):
    flags = {"strategies": ("scratch",), "source": None, "seeds": (0,), "epochs": 3, "points": 3}
    traced = transfer.run(**arguments(tasks, tmp_path / "w", **flags, profile="4:9"))
    assert "steps 4 to 9 are traced in" in capsys.readouterr().out
    assert list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    plain = transfer.run(**arguments(tasks, tmp_path / "plain", **flags))
    assert traced[0].key == plain[0].key
    for path, leaf in parameters(tmp_path / "w", traced[0]).items():
        assert leaf.tobytes() == parameters(tmp_path / "plain", plain[0])[path].tobytes()
    for wrong in ("4", "9:4", "a:b", "4:4"):
        with pytest.raises(InputError, match=r"--profile=.*as 10:20"):
            transfer.run(**arguments(tasks, tmp_path / "wrong", **flags, profile=wrong))


@pytest.mark.parametrize(("rate", "words"), [(1e9, "all leaves still are"), (1e30, "is not finite after step")])
def test_a_leaf_that_is_not_finite_is_named_under_debug_nans(rate, words, tasks, tmp_path):
    flags = {"strategies": ("scratch",), "source": None, "seeds": (0,), "loss": "l2_loss", "learning_rate": rate}
    with jax.debug_nans(True), pytest.raises(InputError) as refused:
        transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    line = transfer.run(**arguments(tasks, tmp_path / "plain", **flags))[0]
    assert line.diverged and f"step {line.diverged_step}" in str(refused.value)
    assert words in str(refused.value) and re.search("'(hidden_0|head)/(kernel|bias)'", str(refused.value))
