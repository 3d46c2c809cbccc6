"""Run directories: what is damaged is found and made again, and one process at a time writes."""

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_integrity import flags, settings
from test_programs import command, parameters, refused, results, snapshot

from experiments import transfer
from experiments.runs import directory, fit, process
from tljax import checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


def flip(place):
    """A bit of a file, or of a checkpoint's arrays, in the middle of the largest."""
    files = [place] if place.is_file() else place.glob("state/ocdbt.process_0/d/*")
    file = max(files, key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "piece", "trained"),
    [("pretrain", "checkpoint", 2), ("head_only", "checkpoint", 2), ("head_only", "predictions", 1)],
)
def test_what_is_damaged_in_a_finished_run_is_set_aside_aloud_and_made_again(
    finished, copy, tasks, capsys, monkeypatch, strategy, piece, trained
):
    """Byte for byte, and nothing else is trained."""
    names = []
    run = fit.train_groups
    monkeypatch.setattr(
        "experiments.runs.fit.train_groups", lambda field, fits, *rest: (names.extend(fits), run(field, fits, *rest))
    )
    line = next(line for line in results(copy) if line.strategy == strategy)
    place = getattr(line, piece)
    flip(copy / place)
    transfer.run(**flags(tasks, copy))
    message = next(text for text in capsys.readouterr().out.splitlines() if "set aside" in text)
    assert place in message and f"set aside as '{(copy / place).name}.damaged'" in message
    assert (copy / (place + ".damaged")).exists()
    assert [fit.result.strategy for fit in names] == [strategy] * trained
    ignored = ("seconds", "peak_bytes", "sha256", "checkpoint")
    by_key = [sorted(results(folder, ignored), key=lambda line: line.key) for folder in (finished[0], copy)]
    assert by_key[0] == by_key[1]
    for before, after in zip(results(finished[0]), results(copy), strict=True):
        if before.key == after.key:
            assert parameters(finished[0], before).keys() == parameters(copy, after).keys()
            for path, leaf in parameters(finished[0], before).items():
                assert leaf.tobytes() == parameters(copy, after)[path].tobytes()


def test_what_was_set_aside_before_stays(copy, tasks):
    place = copy / results(copy)[0].predictions
    for suffix in ("", "2", "3"):
        place.write_text(f"damaged{suffix}")
        with directory.opened(settings(tasks, copy), "transfer"):
            assert not place.exists()
    for suffix in ("", "2", "3"):
        assert place.with_name(f"{place.name}.damaged{suffix}").read_text() == f"damaged{suffix}"


def rewrite(folder, change):
    """Change a line of results, and let it be as somebody would write it who means it."""
    line = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    line = {name: value for name, value in (line | change).items() if name != "sha256"}
    (folder / "results.jsonl").write_text(json.dumps({**line, "sha256": directory.digest(line)}) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "../other/checkpoints"},
        {"checkpoint": "/etc"},
        {"predictions": "predictions/../../x"},
        {"predictions": "link/x"},
        {"name": "../../x"},
    ],
    ids=str,
)
def test_results_that_name_a_place_outside_the_run_are_refused(copy, tasks, tmp_path, capsys, change):
    (copy / "link").symlink_to(tmp_path)
    rewrite(copy, change)
    before = snapshot(copy)
    text = refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
    assert "line 1" in text and "is no place in the run directory: restore or delete it" in text
    source = {"source": None, "source_checkpoint": str(copy), "workdir": str(tmp_path / "new")}
    assert "is no place in the run directory" in refused(command(tasks, tmp_path, **source), capsys)
    assert snapshot(copy) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["test_accuracy", "key", "steps"])
def test_a_line_of_results_with_another_number_in_it_is_refused(copy, tasks, tmp_path, capsys, name):
    line, *rest = (copy / "results.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(line)
    record[name] = record[name] + 1 if name != "key" else record[name][::-1]
    (copy / "results.jsonl").write_text(json.dumps(record) + "\n" + "".join(rest))
    assert "line 1 is not as it was written" in refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)


def test_a_clean_end_leaves_an_empty_lock_and_says_nothing_next_time(copy, tasks, capsys):
    for _ in range(2):
        with directory.opened(settings(tasks, copy), "transfer"):
            assert (copy / ".lock").read_text() == f"process {os.getpid()} on host {platform.node()}\n"
        assert (copy / ".lock").read_text() == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("host", "silent"), [(platform.node(), 0), ("elsewhere", process.SILENCE + 1)])
def test_what_a_process_left_that_is_gone_is_taken_over_aloud(copy, tasks, capsys, host, silent):
    (copy / ".lock").write_text(f"process 12 on host {host}\n")
    os.utime(copy / ".lock", (time.time() - silent,) * 2)
    with directory.opened(settings(tasks, copy), "transfer"):
        assert f"taken over from process 12 on host {host}, which ended without leaving" in capsys.readouterr().out


def test_a_lock_of_another_host_that_is_alive_is_refused(copy, tasks, tmp_path, capsys):
    """Locks of file systems that hosts share are not to be relied on."""
    (copy / ".lock").write_text("process 12 on host elsewhere\n")
    before = snapshot(copy)
    text = refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
    assert "is in use by process 12 on host elsewhere, heard of" in text
    assert snapshot(copy) == before


def test_an_owner_touches_its_lock_while_it_runs(copy, tasks, monkeypatch):
    monkeypatch.setattr(process, "BEAT", 0.01)
    with directory.opened(settings(tasks, copy), "transfer"):
        os.utime(copy / ".lock", (0, 0))
        until = time.monotonic() + 5
        while os.stat(copy / ".lock").st_mtime < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - os.stat(copy / ".lock").st_mtime < 5


def test_a_run_killed_before_its_flags_were_written_goes_on(tasks, tmp_path):
    (tmp_path / ".lock").write_text(f"process 12 on host {platform.node()}\n")
    (tmp_path / "flags.flags.partial").write_text("--sou")
    with directory.opened(settings(tasks, tmp_path), "transfer"):
        assert (tmp_path / "flags.flags").is_file()


def test_predictions_are_named_with_their_sha256(finished):
    for line in results(finished[0]):
        raw = (finished[0] / line.predictions).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == line.predictions_sha256


def test_ctrl_c_while_a_program_imports_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    for program in ("transfer", "pretrain", "compare"):
        # What a shell starts in the background ignores SIGINT, and so would its children: this one does not.
        heed = "from signal import *; import os, sys; signal(SIGINT, SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        line = [sys.executable, "-m", f"experiments.{program}", "--source=mnist_10k"]
        path = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        options = {"capture_output": True, "text": True, "env": path, "cwd": Path(__file__).parent.parent}
        done = subprocess.run([sys.executable, "-c", heed, *line], **options)
        assert done.returncode == 130 and done.stderr == "stopped before anything was begun\n"


@pytest.fixture
def disk(tmp_path):
    """(folder on a disk of its own, function that sets its size in kB)."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(place)], check=True)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writers that cannot write their end
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(disk, tasks, finished, tmp_path, capsys):
    """While checkpoints are saved, and while predictions, metrics and results are; the earlier state stays whole."""
    place, resize = disk
    argv, messages, kept = command(tasks, tmp_path, **flags(tasks, place / "w")), [], []
    for size in (*range(24, 300, 24), *range(300, 900, 100)):
        resize(size)
        try:
            process.run_main(transfer.main, ["transfer", *argv])
            break
        except SystemExit as end:
            assert end.code == 1
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and "make room" in text and str(place) in text
        messages.append(text)
        lines = directory.results(place / "w")
        assert lines[: len(kept)] == kept
        for line in (kept := lines):
            assert line.name in checkpoint.load(place / "w" / line.checkpoint)[0]
    assert any("cannot be written (No space left on device)" in text for text in messages)
    assert any(f"error: No space left on device: '{place}" in text for text in messages)
    assert results(place / "w") == results(finished[0])


@pytest.mark.slow
def test_results_that_cannot_be_written_stay_as_they_were(copy, tasks, tmp_path, capsys, monkeypatch):
    flip(copy / results(copy)[-1].predictions)
    before = (copy / "results.jsonl").read_bytes()
    sync = os.fsync

    def full(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("results.jsonl.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr("os.fsync", full)
    text = refused(command(tasks, tmp_path, **flags(tasks, copy)), capsys)
    assert text == f"error: No space left on device: '{copy}'; make room and run the same command again\n"
    assert (copy / "results.jsonl").read_bytes() == before and not list(copy.glob("*.partial"))
    monkeypatch.undo()
    transfer.run(**flags(tasks, copy))
    assert [line.key for line in results(copy)] == [json.loads(line)["key"] for line in before.splitlines()]
