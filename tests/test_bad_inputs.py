"""300 bad inputs: each ends with one line that says what is wrong, and nothing is touched."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import cases
from test_programs import snapshot

from experiments import transfer
from experiments.runs import process

SEED, COUNT, SECONDS = 0, 300, 20


def fault(argv, folder, capsys) -> str:
    """What is wrong with how a program refuses a command line; "" if nothing is."""
    before, there = snapshot(folder), (folder / "w").exists()
    signal.alarm(SECONDS)
    code = None
    try:
        process.run_main(transfer.main, ["transfer", *argv])
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        return f"raises {error!r}"
    finally:
        signal.alarm(0)
        out, errors = capsys.readouterr()
    if code != 1 or not errors.startswith("error: ") or errors.count("\n") != 1:
        return f"ends with {code}: {errors}{out}"
    if "Traceback" in out + errors or len(errors) > 1500:
        return f"says too much: {errors}{out}"
    return "" if snapshot(folder) == before and (folder / "w").exists() == there else "changes files"


@pytest.fixture
def refusing(monkeypatch):
    """Nothing is trained, and nothing hangs."""

    def hangs(*_):
        raise TimeoutError(f"still runs after {SECONDS} s")

    monkeypatch.setattr("experiments.runs.fit.train_groups", lambda *_, **__: pytest.fail("it trains"))
    before = signal.signal(signal.SIGALRM, hangs)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_inputs_end_with_one_line_and_change_nothing(stride, tasks, finished, tmp_path, capsys, refusing):
    wrongs = []
    for number, (what, argv, folder) in enumerate(cases(tasks, finished[0], tmp_path, SEED, COUNT)):
        if number % stride == number // 10 % stride:
            wrong = fault(argv, folder, capsys)
            wrongs += [f"{number} {what} {argv}: {wrong}"] if wrong else []
    assert not wrongs, "\n".join([f"{len(wrongs)} of {COUNT}:", *wrongs])


@pytest.mark.slow
def test_twenty_of_them_through_a_shell(tasks, finished, tmp_path):
    shown = 0
    for number, (what, argv, folder) in enumerate(cases(tasks, finished[0], tmp_path, SEED, COUNT)):
        if shown == 20 or number % 13 or any("\0" in argument for argument in argv):  # which no shell hands on
            continue
        before = snapshot(folder)
        line = [sys.executable, "-m", "experiments.transfer", *argv]
        done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=60)
        assert done.returncode == 1 and done.stdout == "", (what, done.stdout)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (what, done.stderr)
        assert snapshot(folder) == before, what
        shown += 1
    assert shown == 20
