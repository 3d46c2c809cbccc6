"""Runs that are killed, stopped and damaged end with the bits of one that was left alone."""

import shutil
import signal
import subprocess
import sys

import chaos
import pytest
from test_programs import command

from tljax.types import InputError


@pytest.mark.slow
def test_killed_stopped_and_damaged_runs_end_with_the_same_bits(tasks, tmp_path, capsys):
    """The short form of experiments.chaos: 5 kills, 3 SIGTERMs, 3 flipped bytes."""
    flags = command(tasks, tmp_path, strategies=("scratch", "head_only"), epochs=20, devices=1)
    (tmp_path / "small.flags").write_text("\n".join(flags) + "\n")
    argv = [f"--flagfile={tmp_path / 'small.flags'}", "--kills=5", "--terms=3", "--flips=3"]
    chaos.main(["chaos", *argv, f"--workdir={tmp_path / 'chaos'}"])
    output = capsys.readouterr().out
    assert output.count(": 0 s") == 0 and all(f"{kind}:" in output for kind in ("kill", "term", "flip"))
    assert output.count("identical") == 6 and "differ" not in output


def test_what_differs_is_named(finished, tmp_path):
    """Parameters, predictions, masks, curves and lines of results; not what they took."""
    folder, lines = finished
    expected = chaos.contents(folder)
    assert len([name for name in expected if name.startswith("checkpoints/")]) > len(lines)
    assert chaos._differences(expected, chaos.contents(folder), "kill-0") == []
    shutil.copytree(folder, tmp_path / "w")
    (tmp_path / "w" / "environment.json").unlink()  # it holds the seconds too
    text = (tmp_path / "w" / "results.jsonl").read_text()
    (tmp_path / "w" / "results.jsonl").write_text(text.replace('"seconds": ', '"seconds": 1'))
    assert chaos._differences(expected, chaos.contents(tmp_path / "w"), "kill-0") == []
    for kind in ("predictions/*.npz", "masks/*.json", "metrics/*/curves.npz"):
        file = sorted((tmp_path / "w").glob(kind))[0]
        kept = file.read_bytes()
        file.write_bytes(kept[:-1])
        [fault] = chaos._differences(expected, chaos.contents(tmp_path / "w"), "kill-0")
        assert fault == f"kill-0: {file.relative_to(tmp_path / 'w')} differ"
        file.write_bytes(kept)


def test_a_run_that_does_not_end_as_it_should_is_a_fault():
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    assert chaos._end(process, signal.SIGKILL) == []
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print(flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert chaos._end(process, signal.SIGTERM) == ["SIGTERM ended it with code 3"]
    process.stdout.close()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=kill,hit", "--only=kill,hit: write some of kill, term, flip"),
        ("--flagfile=nowhere", "--flagfile=nowhere does not exist"),
        ("--kills=-1", "kills"),
        ("--workdir=.", "--workdir=. exists: name a new folder"),
    ],
)
def test_bad_flags_of_chaos_are_one_line(flag, message):
    with pytest.raises(InputError, match=message):
        chaos.main(["chaos", flag])
