"""The integrity of a run directory: nothing altered is used unsaid, and nothing is written outside it."""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import flips
import numpy as np
import pytest
from test_programs import arguments, command, refused, results, snapshot

from experiments import features, predict, transfer
from experiments.pages import export
from experiments.runs import directory, metrics, predictions, process, sources, tuned
from experiments.runs.settings import Settings, parse_flags
from tljax import files
from tljax.study import search
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")


def flags(tasks, folder, **more):
    return arguments(tasks, folder, weight_decay=0.01, clip=1.0, **more)


def settings(tasks, folder):
    return Settings.from_flags(**flags(tasks, folder))


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").write_text("precious")
    yield tmp_path / "victim"
    assert (tmp_path / "victim").read_text() == "precious"


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_a_record_is_read_as_it_was_written_and_refused_otherwise(tmp_path):
    file = tmp_path / "a.json"
    assert directory.read_record(file) is None
    directory.write_record(file, {"b": (1, 2.5), "a": {"c": None}, 3: "\N{SNOWMAN}"})
    assert directory.read_record(file) == {"b": [1, 2.5], "a": {"c": None}, "3": "\N{SNOWMAN}"}
    raw = file.read_bytes()
    for at in range(len(raw)):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        with pytest.raises(InputError, match=r"a.json' (is|has) n.*: restore it, or delete it"):
            directory.read_record(file)
    for text in ("[1]", '"x"', "{", "", "{}", "[" * 10**5, '{"sha256": 1}', "1" * 5000):
        file.write_text(text)
        with pytest.raises(InputError) as refusal:
            directory.read_record(file)
        assert "\n" not in str(refusal.value)


def test_no_file_is_written_through_a_link(copy, tasks, tmp_path, victim):
    """Neither one that lies in wait under the name that new files once had, nor one in a file's own place."""
    names = ("flags.flags", "results.jsonl", "environment.json", "report.html")
    before = {name: (copy / name).read_bytes() for name in names}
    for name in names:
        (copy / f"{name}.partial").symlink_to(victim)
        shutil.move(copy / name, tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
    transfer.run(**flags(tasks, copy, seeds=(0, 1, 2), strategies=("scratch",)))
    for name in names:
        assert (tmp_path / name).read_bytes() == before[name] != (copy / name).read_bytes()
        assert not (copy / name).is_symlink()


def test_what_predict_writes_goes_through_no_link_either(tmp_path, victim):
    (tmp_path / "out.csv.partial").symlink_to(victim)
    directory.replace(tmp_path / "out.csv", "text")
    assert (tmp_path / "out.csv").read_text() == "text" and snapshot(tmp_path).keys() >= {"out.csv", "victim"}


def test_features_are_not_written_through_links(finished, tasks, tmp_path, victim):
    (tmp_path / "out").mkdir()
    for split in ("train", "test"):
        (tmp_path / "out" / f"{split}.npy").symlink_to(victim)
    argv = [f"--source_checkpoint={finished[0]}", f"--dataset={tasks / 'clothes.npz'}", f"--output={tmp_path / 'out'}"]
    features.main(["features", *argv])
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_a_file_is_there_whole_with_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        files.replace(tmp_path / "a", b"text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_killed_processes_left_is_deleted_when_a_run_is_opened(copy, tasks):
    left = [files.partial(copy / name) for name in ("flags.flags", "masks/x.json", "predictions/y.npz")]
    for file in left:
        file.write_text("half")
    (copy / "mine.partial").write_text("of the user")
    with directory.opened(settings(tasks, copy), "transfer"):
        assert not any(file.exists() for file in left) and (copy / "mine.partial").is_file()


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe", "folder", "dangling"])
def test_a_lock_that_is_no_file_of_its_own_is_refused(copy, tasks, tmp_path, victim, capsys, kind):
    lock = copy / ".lock"
    lock.unlink()
    ways = {
        "symbolic": lambda: lock.symlink_to(victim),
        "hard": lambda: os.link(victim, lock),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
        "dangling": lambda: lock.symlink_to(tmp_path / "new"),
    }
    ways[kind]()
    assert ".lock' is a link or no file: delete it" in refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
    assert not (tmp_path / "new").exists()


def test_a_lock_that_is_no_text_is_taken_over(copy, tasks, capsys):
    (copy / ".lock").write_bytes(b"process \xff on host " + os.uname().nodename.encode() + b"\n")
    with directory.opened(settings(tasks, copy), "transfer"):
        assert "taken over" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*directory.FOLDERS])
def test_a_folder_of_the_run_that_is_a_link_is_refused(copy, tasks, tmp_path, capsys, name):
    shutil.rmtree(copy / name, ignore_errors=True)
    (tmp_path / "elsewhere").mkdir()
    (copy / name).symlink_to(tmp_path / "elsewhere")
    before = snapshot(copy)
    text = refused(command(tasks, tmp_path, **flags(tasks, copy, seeds=(0, 1, 2))), capsys)
    assert f"{name}' is a link or a file where a folder is to be: remove it" in text
    assert not list((tmp_path / "elsewhere").iterdir()) and snapshot(copy) == before


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_within_are_refused(copy, tasks, tmp_path, victim, capsys, kind):
    place = copy / "metrics" / "fit"
    place.symlink_to(tmp_path) if kind == "link" else os.mkfifo(place)
    text = refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
    assert "holds a link or a device" in text and "metrics/fit" in text


@pytest.mark.parametrize("name", ["flags.flags", "results.jsonl", "environment.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(copy, tasks, tmp_path, capsys, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    if name == "environment.json":
        with directory.opened(settings(tasks, copy), "transfer"):
            assert "set aside" in capsys.readouterr().out
    else:
        message = refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
        assert name in message or "holds other files and no run" in message


def test_flags_that_were_changed_are_refused_in_the_run_and_taken_elsewhere(copy, tasks, tmp_path, capsys):
    file = copy / "flags.flags"
    text = file.read_text()
    assert text.splitlines()[-1].startswith("# sha256 of the lines above: ")
    for change in (("--seeds=0,1", "--seeds=q,1"), ("--batch_size=20", "--batch_size=21"), ("\n# sha", "\x0b# sha")):
        file.write_text(text.replace(*change))
        message = refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
        assert "flags.flags' is not as it was written: restore it" in message and "--flagfile" in message
    file.write_text(text.replace("--seeds=0,1", "--seeds=1"))
    values = parse_flags(["transfer", f"--flagfile={file}", f"--workdir={tmp_path / 'new'}"])
    assert values["seeds"] == (1,)
    with directory.opened(Settings.from_flags(**values), "transfer") as folder:
        assert directory.flags_text(folder / "flags.flags").count("# sha256") == 0
    file.write_text("".join(text.splitlines(keepends=True)[:-1]))  # as an older tljax left it
    with directory.opened(settings(tasks, copy), "transfer"):
        assert file.read_text() == text
    file.write_text("".join(text.splitlines(keepends=True)[:-1]).replace("--seeds=0,1", "--seeds=q,1"))
    assert "--seeds=q,1" in refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)


def test_what_a_search_found_best_is_refused_if_it_was_changed(tmp_path):
    text = directory.signed("# head\n--source=a\n--target=b\n--strategies=full\n--learning_rate=0.1\n")
    (tmp_path / "best.flags").write_text(text)
    assert tuned.winners(tmp_path)["best"]["learning_rate"] == 0.1
    (tmp_path / "best.flags").write_text(text.replace("0.1", "0.9"))
    with pytest.raises(InputError, match=r"best.flags' is not as it was written"):
        tuned.winners(tmp_path)


def test_an_environment_is_kept_for_each_fit_and_a_mixture_is_said(copy, tasks, capsys, monkeypatch):
    before = json.loads((copy / "environment.json").read_text())
    version = directory.metadata.version
    monkeypatch.setattr(directory.metadata, "version", lambda name: "0.4.0" if name == "jax" else version(name))
    transfer.run(**flags(tasks, copy))
    assert json.loads((copy / "environment.json").read_text()) == before  # nothing was trained
    lines = transfer.run(**flags(tasks, copy, seeds=(0, 1, 2), strategies=("scratch",)))
    output = capsys.readouterr().out
    after = directory.read_record(copy / "environment.json")
    assert after["versions"]["jax"] == "0.4.0" and after["earlier"][0]["versions"]["jax"] == version("jax")
    new = {line.name for line in results(copy) if line.seed == 2}
    assert set(after["fits"]) == new and set(after["earlier"][0]["fits"]) == set(before["fits"])
    words = f"jax {version('jax')} and 0.4.0"
    assert f"goes on in another environment: {words}" in output and f"trained in 2 environments: {words}" in output
    assert words in (copy / "report.html").read_text()
    assert directory.mixed_environments(copy, [line.name for line in lines if line.seed < 2]) == []
    monkeypatch.undo()
    directory.record_environment(copy, {})
    again = directory.read_record(copy / "environment.json")
    assert again["versions"] == before["versions"] and set(again["fits"]) == set(before["fits"])
    assert [set(environment["fits"]) for environment in again["earlier"]] == [new]


OLD = ("python", "platform", "cores", "devices", "versions", "data", "commit")


def test_an_environment_of_an_older_tljax_is_taken_over_with_its_fits(copy, capsys):
    old = {name: value for name, value in directory.recorded_environment(copy).items() if name in OLD}
    old["versions"] = {**old["versions"], "jax": "0.4.0"}
    (copy / "environment.json").write_text(json.dumps(old))
    directory.record_environment(copy, {})
    kept = directory.read_record(copy / "environment.json")["earlier"][0]
    assert kept["versions"]["jax"] == "0.4.0" and len(kept["fits"]) == len(results(copy))
    assert "another environment: jax 0.4.0 and" in capsys.readouterr().out


def test_seconds_that_were_changed_are_refused(copy):
    lines = [json.loads(line) for line in (copy / "results.jsonl").read_text().splitlines()]
    for seconds in (lines[0]["seconds"] + 1, float("nan"), -1.0, 10**400, "1"):
        changed = [{**lines[0], "seconds": seconds}, *lines[1:]]
        (copy / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(InputError, match="line 1 is not as it was written"):
            directory.results(copy)


def test_predictions_that_were_changed_are_left_out_of_a_report_aloud(copy):
    line = results(copy)[-1]
    with np.load(copy / line.predictions) as arrays:
        kept = dict(arrays)
    kept["probabilities"][0] = kept["probabilities"][0][::-1]
    np.savez_compressed(copy / line.predictions, **kept)
    with pytest.raises(InputError, match="are not as they were written"):
        predictions.read_study(copy)


def test_curves_that_were_changed_are_left_out_aloud(copy, capsys):
    line = results(copy)[-1]
    file = copy / "metrics" / line.name / "curves.npz"
    curves = metrics.curves(copy, line.name)
    assert "sha256" not in curves and capsys.readouterr().out == ""
    with np.load(file) as arrays:
        kept = dict(arrays)
    for change in ({"train_loss": kept["train_loss"] + 1}, {"more": kept["step"]}, {"step": kept["step"][:-1]}):
        np.savez(file, **{**kept, **change})
        assert metrics.curves(copy, line.name) is None
        assert f"the curves of '{line.name}' are left out" in capsys.readouterr().out
    other = results(copy)[-2]
    shutil.copy(copy / "metrics" / other.name / "curves.npz", file)
    assert metrics.curves(copy, line.name) is None
    np.savez(file, **{name: column for name, column in kept.items() if name != "sha256"})  # of an older tljax
    assert {name: column.tolist() for name, column in metrics.curves(copy, line.name).items()} == {
        name: column.tolist() for name, column in curves.items()
    }


def test_masks_that_were_changed_are_set_aside_and_their_fit_is_trained_again(copy, finished, tasks, capsys):
    line = next(line for line in results(copy) if line.strategy == "head_only")
    file = copy / "masks" / f"{line.name}-phase0.json"
    text = file.read_text()
    file.write_text(text.replace("false", "true"))
    transfer.run(**flags(tasks, copy))
    assert f"set aside as '{file.name}.damaged'" in capsys.readouterr().out
    ignored = ("seconds", "peak_bytes", "sha256", "checkpoint")
    assert file.read_text() == text and results(copy, ignored) == results(finished[0], ignored)


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd", "@SUM(A1)"])
def test_no_cell_of_a_csv_file_is_a_formula(text):
    trial = search.TrialRecord(0, "COMPLETE", 0.5, 0.5, 0.1, False, text, "", "", {text: text, "rate": -0.5})
    tables = [
        export.trials({(text, text): [trial]}),
        export.table([{text: text, "gain": -0.5}]),
        predict.table([text], [text, "dog"], np.array([[0.25, 0.75]])),
    ]
    for table in tables:
        cells = [cell.strip('"\r') for line in table.splitlines() for cell in line.split(",")]
        assert f"'{text}" in cells and text not in cells
    assert "-0.5" in tables[0] and "-0.5" in tables[1]


def exported(folder: Path) -> Path:
    from safetensors.numpy import save

    raw = save({"head/kernel": np.ones((4, 2), np.float32), "head/bias": np.zeros(2, np.float32)})
    (folder / "net.safetensors").write_bytes(raw)
    card = {"task": "t", "classes": ["a", "b"], "shape": [2, 2, 1], "accuracy": 0.5}
    sums = {"weights_sha256": hashlib.sha256(raw).hexdigest()}
    directory.write_record(folder / "net.safetensors.json", {**card, **sums})
    return folder / "net.safetensors"


def test_exported_weights_and_their_card_are_held_against_their_sums(tmp_path):
    file = exported(tmp_path)
    card, raw = file.with_name(file.name + ".json"), file.read_bytes()
    text = card.read_text()
    assert sources.weights_card(file)["accuracy"] == 0.5
    card.write_text(text.replace("0.5", "0.9"))
    with pytest.raises(InputError, match="is not as it was written: restore it, or export it again"):
        sources.weights_card(file)
    card.write_text('{"task": "t", "classes": ["a", "b"], "shape": [2, 2, 1]}')  # by hand
    assert "weights_sha256" not in sources.weights_card(file)
    card.write_text(text)
    run_settings = Settings.from_flags(source_checkpoint=str(file), hidden=())
    assert sources.from_checkpoint(run_settings).name == "t"
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(InputError, match="is not as it was written, or has another's card"):
        sources.from_checkpoint(run_settings)


def test_looks_cannot_be_forgotten_by_deleting_one_file(tmp_path):
    cell = predictions.Cell("digits", "clothes", "full", 40)
    nothing = predictions.Predictions([], {}, {})
    tables = [{cell: dict.fromkeys(range(count), np.array([True]))} for count in (2, 3)]
    assert predictions.count_look(tmp_path, tables[0]) == 1
    predictions.write_study(tmp_path, [nothing], [], {}, 1)
    assert predictions.count_look(tmp_path, tables[1]) == 2
    predictions.write_study(tmp_path, [nothing], [], {}, 2)
    kept = (tmp_path / "looks.json").read_bytes()
    (tmp_path / "looks.json").unlink()
    with pytest.raises(InputError, match=r"0 looks at these results, 'study.json' of 2"):
        predictions.count_look(tmp_path, tables[1])
    (tmp_path / "looks.json").write_bytes(kept)
    (tmp_path / "study.json").unlink()
    assert predictions.count_look(tmp_path, tables[1]) == 2


def test_single_flipped_bits_of_a_run_are_refused_said_or_change_nothing(copy, tasks):
    """A sample; the rest is slow."""
    outcomes = Counter()
    restore = flips.restorer(copy)
    process._quieten_orbax()
    with flips.once_loaded():
        for attack in flips.of_run(copy, settings(tasks, copy), "transfer"):
            if "checkpoints" not in attack.file.parts:
                outcomes += flips.flipped(attack, 2, restore, begin=0)
    assert not outcomes["escaped"] and min(outcomes[kind] for kind in ("identical", "refused", "aloud")) > 0


@pytest.mark.slow
def test_single_flipped_bits_of_every_file_are_refused_said_or_change_nothing(tasks, tmp_path):
    outcomes = Counter()
    process._quieten_orbax()
    for place, attacks in flips.every(tasks, tmp_path):
        restore = flips.restorer(place)
        with flips.once_loaded():
            for attack in attacks:
                outcomes += flips.flipped(attack, 6, restore, begin=0)
    assert not outcomes["escaped"] and sum(outcomes.values()) > 200
