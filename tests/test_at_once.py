"""Several compares at once, in one run directory and with one ledger, and a ledger on a disk that is full."""

import errno
import json
import os
import subprocess
import sys

import pytest
from test_confirmation import SAYS, line
from test_programs import results

from experiments import compare
from experiments.runs import directory, process
from tljax.study import ledger

pytestmark = pytest.mark.usefixtures("no_pictures")


def kinds_in(file):
    with ledger.opened(file) as book:
        return [entry["kind"] for entry in book.entries]


@pytest.mark.slow
def test_compares_at_once_lose_no_fit_and_no_look_and_end_in_a_line(tasks, tmp_path, monkeypatch):
    """Two in one run directory, with a third beside them that has the ledger in common."""
    lines = {name: line(tasks, tmp_path, name, steps=40) for name in ("both", "apart", "alone")}
    started = [
        subprocess.Popen([sys.executable, "-m", "experiments.compare", *lines[name][1:]], **PIPES, env=os.environ)
        for name in ("both", "both", "apart")
    ]
    ended = [(*each.communicate()[:0:-1], each.returncode) for each in started]
    assert ended[2] == ("", 0)
    codes = [code for _, code in ended[:2]]
    assert 0 in codes and set(codes) <= {0, 1}
    for said, code in ended[:2]:
        assert code == 0 or (said.startswith("error: ") and "is in use by process" in said and said.count("\n") == 1)
    assert kinds_in(tmp_path / "ledger.jsonl") == ["ledger", "look"]  # all three are of the same fits
    whole = (tmp_path / "both" / "results.jsonl").read_bytes()
    compare.main(lines["both"])
    assert (tmp_path / "both" / "results.jsonl").read_bytes() == whole
    compare.main(lines["alone"])
    assert results(tmp_path / "alone") == results(tmp_path / "both") == results(tmp_path / "apart")
    assert kinds_in(tmp_path / "ledger.jsonl") == ["ledger", "look"]
    assert directory.read_record(tmp_path / "both" / "study.json")["looks"] == 1


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.mark.slow
def test_a_full_disk_loses_no_entry_of_the_ledger_and_the_claim_is_tested_once(tasks, tmp_path, monkeypatch, capsys):
    """At the first line, at the registration, and when the claim was tested and is to be written down."""
    file, claim, write = tmp_path / "ledger.jsonl", tmp_path / "claim.json", os.pwrite
    target = {"target": str(tasks / "clothes.npz")}
    says = {**SAYS, "claim": {**SAYS["claim"], **target}, "design": {"seeds": "4-6", "train_examples": "all"}}
    claim.write_text(json.dumps(says))
    argv = line(tasks, tmp_path, "w", "--confirm", f"--registration={claim}", seeds=(4, 5, 6))
    for attempt, room in enumerate((0, 1, 1)):
        written = []

        def full(descriptor, data, position, written=written, room=room):
            if len(written) == room:
                write(descriptor, data[:20], position)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(position)
            return write(descriptor, data, position)

        before = file.read_bytes() if file.exists() else b""
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(SystemExit) as end:
            process.run_main(compare.main, argv)
        monkeypatch.setattr(os, "pwrite", write)
        said = capsys.readouterr().err
        assert end.value.code == 1 and said.count("\n") == 1
        assert said == f"error: No space left on device: '{file}'; make room and run the same command again\n"
        now = file.read_bytes()
        assert now.startswith(before) and (not now or now.endswith(b"\n")) and now.count(b"\n") == attempt
        assert (tmp_path / "w").exists() == (attempt == 2)
    process.run_main(compare.main, argv)
    assert kinds_in(file) == ["ledger", "registration", "confirmation"]
    whole = file.read_bytes()
    compare.main(argv)
    assert file.read_bytes() == whole
