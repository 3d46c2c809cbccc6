"""`experiments.audit`: a step or two checkpoints in, a table and a page out, one line for bad input."""

import re

import numpy as np
import pytest

from experiments import audit
from experiments.runs import directory, process
from tljax import masks

DRAW = np.random.default_rng(0)
BEFORE = {f"block_{i}/kernel": DRAW.normal(size=(4, 4)).astype(np.float32) for i in range(3)} | {
    "head/kernel": DRAW.normal(size=(4, 2)).astype(np.float32)
}
AFTER = BEFORE | {"head/kernel": DRAW.normal(size=(4, 2)).astype(np.float32)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("before.npz", **BEFORE)
    np.savez("after.npz", **AFTER)
    np.savez("moved.npz", **AFTER | {"block_1/kernel": BEFORE["block_1/kernel"] + 0.5})
    return tmp_path


def ran(capsys, *arguments):
    """(exit code, what it printed, the error) of the program."""
    code = 0
    try:
        process.run_main(audit.main, ["audit", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def test_checkpoints_that_keep_what_is_frozen(folder, capsys):
    code, out, err = ran(capsys, "--before=before.npz", "--after=after.npz", "--mask=head/**")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "before.npz to after.npz: 4 proved, 0 refuted, 0 not decided"
    assert "block_{0..2}/kernel" in out and "report: runs/audit/audit.html" in out
    record = directory.read_record(folder / "runs" / "audit" / "audit.json")
    assert [finding["path"] for finding in record["findings"]] == list(BEFORE) and record["failures"] == []
    page = (folder / "runs" / "audit" / "audit.html").read_text()
    assert "<h1>Audit of before.npz to after.npz</h1>" in page and "nothing that was to hold is broken" in page
    assert (
        "--before=before.npz --after=after.npz &#39;--mask=head/**&#39;" in page
        and "http" not in page.split("<body>")[1]
    )


def test_a_frozen_leaf_that_moved_ends_it_with_1(folder, capsys):
    code, out, err = ran(capsys, "--before=before.npz", "--after=moved.npz", "--mask=head/**", "--output=out")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(
        "error: before.npz to moved.npz: 'block_1/kernel', frozen, is refuted: 16 of 16 numbers moved"
    )
    assert out.splitlines()[1].startswith("refuted  frozen  block_1/kernel")
    assert directory.read_record(folder / "out" / "audit.json")["failures"] == [["block_1/kernel", "frozen"]]
    page = (folder / "out" / "audit.html").read_text()
    assert page.index("<h2>Refuted</h2>") < page.index("<h2>Proved</h2>") and "<h2>Not decided</h2>" not in page


def test_a_mask_of_a_run_and_what_is_not_decided(folder, capsys):
    masks.save({name: name.startswith("head") for name in AFTER if name != "block_0/kernel"} | {"new": True}, "mask")
    np.savez("grown.npz", **{**{n: a for n, a in AFTER.items() if n != "block_0/kernel"}, "new": np.ones(3)})
    code, out, _ = ran(capsys, "--before=before.npz", "--after=grown.npz", "--mask=mask.json")
    assert (
        code == 0 and re.search(r"not decided +trains +new +is new", out) and "missing after: 'block_0/kernel'" in out
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing is given to audit"),
        (["--before=before.npz", "--mask=head/**"], "nothing is given to audit"),
        (["loop.py:make", "--before=before.npz"], "--step and --before: audit a step, or two checkpoints"),
        (["--before=x.npz", "--after=after.npz", "--mask=**"], "--before=x.npz: 'x.npz' does not exist"),
        (["--before=before.npz", "--after=after.npz", "--mask=hed/*"], "pattern 'hed/*' matches no leaf"),
        (["--before=before.npz", "--after=after.npz", "--mask=x.json"], "the mask's file 'x.json' does not exist"),
        (["--before=before.npz", "--before_fit=a", "--after=after.npz", "--mask=**"], "no fit 'a'"),
        (["--before=before.npz", "--after=after.npz", "--mask=**", "--at_least=changed"], "--at_least=changed: it is"),
        (["--before=before.npz", "--after=after.npz", "--mask=**", "--output=after.npz"], "is a file: name a folder"),
        (["--before=before.npz", "--after=after.npz", "--mask=**", "--learning_rate=1"], "unknown flag"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, words):
    code, _, err = ran(capsys, *arguments)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
