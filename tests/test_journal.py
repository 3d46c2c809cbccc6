"""The journal of a search: no cut and no full disk loses a trial, and what was altered is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tljax.study import search, space
from tljax.study.journal import Journal
from tljax.types import InputError

SPACE = space.read(("learning_rate:log:1e-3:1",))


def opened(file, messages):
    return search.opened("study", str(file), "Random", "Nop", 0, 60, {"space": "rates"}, messages.append)


def grown(searched, trials):
    """Trials asked for and told until the study has so many, each with a value that follows from its rate."""
    while asked_trials := search.ask(searched, SPACE, 1, trials):
        search.tell(searched.study, asked_trials[0], asked_trials[0].chosen["learning_rate"] / 2)


def finished(searched):
    return [(trial.params, trial.value) for trial in searched.study.trials if trial.state.name == "COMPLETE"]


@pytest.fixture
def journal(tmp_path):
    searched = opened(tmp_path / "study.journal", [])
    grown(searched, 3)
    return tmp_path / "study.journal", finished(searched)


@pytest.mark.slow
def test_a_journal_cut_anywhere_in_its_last_two_lines_goes_on_and_loses_what_was_cut_alone(journal):
    """As a full disk or a killed process cuts it: aloud, unless the cut is between two lines."""
    file, before = journal
    raw = file.read_bytes()
    lines = raw.splitlines(keepends=True)
    first = len(raw) - len(lines[-1]) - len(lines[-2])
    for end in range(first, len(raw) + 1):
        file.write_bytes(raw[:end])
        messages = []
        assert len(finished(opened(file, messages))) >= 2
        kept = [line for line in lines if raw.index(line) + len(line) <= end]
        assert file.read_bytes().startswith(b"".join(kept))
        assert all(json.loads(line)["op_code"] == 0 for line in file.read_bytes().splitlines()[len(kept) :])
        assert len(messages) == (sum(map(len, kept)) < end)
    for end in (first + 1, first + len(lines[-2]) - 1, len(raw) - 20, len(raw) - 1):
        file.write_bytes(raw[:end])
        searched = opened(file, [])
        for trial in searched.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":  # its process is gone
                search.give_back(searched.study, search.Running(trial, {}))
        grown(searched, 3)
        assert sorted(map(str, finished(searched))) == sorted(map(str, before))
        assert finished(opened(file, [])) == finished(searched)


def test_a_line_that_another_process_is_writing_is_not_read_yet(journal):
    file, before = journal
    here = opened(file, [])
    with file.open("ab") as stream:
        stream.write(b'{"op_code":4,"wor')
    assert finished(here) == before


def test_what_is_altered_or_missing_in_the_middle_is_refused_in_one_line(journal):
    file, _ = journal
    lines = file.read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"values":[' in line)
    digit = lines[number].index(b'"values":[') + 12
    changed = lines[number][:digit] + bytes([lines[number][digit] ^ 1]) + lines[number][digit + 1 :]
    for bad in (
        [*lines[:number], changed, *lines[number + 1 :]],
        [*lines[:number], *lines[number + 1 :]],
        [*lines[:number], lines[number][:30], *lines[number + 1 :]],  # what an older tljax made of a full disk
        [*lines[:number], b"[" * 10**5 + b"\n", *lines[number + 1 :]],
        [*lines[:2], b'{"op_code":[]}\n', *lines[2:]],
    ):
        file.write_bytes(b"".join(bad))
        with pytest.raises(InputError, match=r"study.journal', line \d+ is n") as refusal:
            opened(file, [])
        assert "\n" not in str(refusal.value)


def test_a_single_flipped_bit_is_refused_cut_off_aloud_or_changes_nothing(journal):
    file, _ = journal
    raw, messages = file.read_bytes(), []
    whole = [(trial.params, trial.values, trial.user_attrs) for trial in opened(file, messages).study.trials]
    for at in [*range(0, len(raw), 61), *range(len(raw) - 80, len(raw))]:
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        messages.clear()
        try:
            now = [(trial.params, trial.values, trial.user_attrs) for trial in opened(file, messages).study.trials]
        except InputError:
            continue
        assert messages or now == whole


@pytest.mark.parametrize("call", ["os.fsync", "os.pwrite"])
def test_an_append_that_fails_leaves_the_journal_as_it_was(journal, monkeypatch, call):
    file, before = journal
    raw = file.read_bytes()
    backend = Journal(str(file))

    write, begin = os.pwrite, len(raw)

    def full(handle, *rest):
        """The disk takes 40 bytes more."""
        if rest and rest[1] == begin:
            return write(handle, rest[0][:40], begin)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match="No space left"):
        backend.append_logs([{"op_code": 2, "worker_id": "x"}])
    monkeypatch.undo()
    assert file.read_bytes() == raw and finished(opened(file, [])) == before


def test_a_journal_of_an_older_tljax_is_read_aloud_and_goes_on(journal):
    file, before = journal
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    plain = [{name: value for name, value in entry.items() if name != "sha256"} for entry in entries]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in plain))
    messages = []
    searched = opened(file, messages)
    assert finished(searched) == before and "older tljax" in messages[0]
    grown(searched, 4)
    assert len(finished(opened(file, messages))) == 4


@pytest.mark.slow
def test_two_processes_may_write_one_journal(journal):
    file, before = journal
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\nimport test_journal as t\nt.grown(t.opened(sys.argv[1], []), 23)"
    )
    line = [sys.executable, "-c", code, str(file), os.path.dirname(__file__)]
    running = [subprocess.Popen(line) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(finished(opened(file, []))) == 23 and finished(opened(file, []))[:3] == before


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_journal_that_is_no_file_is_refused(tmp_path, kind):
    file, victim = tmp_path / "study.journal", tmp_path / "victim"
    victim.write_text("precious")
    {"link": lambda: file.symlink_to(victim), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[kind]()
    with pytest.raises(InputError, match="is a link or no file"):
        opened(file, [])
    assert victim.read_text() == "precious"


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("form", ["{}/study.journal", pytest.param("sqlite:///{}/study.db", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_during_a_study_loses_no_trial(disk, form):
    """Once there is room the study goes on, with every trial that was told before."""
    storage, filler = form.format(disk), disk / "filler"

    def taken_up():
        return search.opened("study", storage, "Random", "Nop", 0, 0.0, {}, lambda line: None)

    trials = []
    for room in (4096, 12288):
        grown(searched := taken_up(), len(trials) + 2)
        trials = finished(searched)
        free = os.statvfs(disk)
        filler.write_bytes(b"x" * max(free.f_bavail * free.f_frsize - room, 0))
        with pytest.raises((InputError, OSError), match=r"full|No space left"):
            grown(taken_up(), 99)
        filler.unlink()
        assert finished(taken_up())[: len(trials)] == trials
        trials = finished(taken_up())
