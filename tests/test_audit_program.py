"""`experiments.audit`: a step or two checkpoints in, a table and a page out, one line for bad input."""

import json
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


def test_a_frozen_leaf_that_cannot_be_decided_ends_it_with_1_unless_it_is_accepted(folder, capsys):
    """The same numbers elsewhere than they were, or none: nobody has proved that they stayed."""
    np.savez("other.npz", **{("trunk" if name == "block_1/kernel" else name): array for name, array in AFTER.items()})
    np.savez("moved_away.npz", **{**np.load("other.npz"), "trunk": np.ones((4, 4), np.float32)})
    np.savez("rounded.npz", **AFTER | {"block_1/kernel": AFTER["block_1/kernel"].astype(np.float16)})
    assert ran(capsys, "--before=before.npz", "--after=other.npz", "--mask=head/**")[0] == 0  # a new name alone
    for after in ("moved_away", "rounded"):
        arguments = ("--before=before.npz", f"--after={after}.npz", "--mask=head/**")
        code, out, err = ran(capsys, *arguments)
        assert code == 1 and " 0 refuted" in out and err.count("\n") == 1
        assert "'block_1/kernel', frozen, is not decided: " in err and "accept it by --undecided='" in err
        accepted = "--undecided=block_1/*" + ("+trunk" if after == "moved_away" else "")
        assert ran(capsys, *arguments, accepted)[0] == 0
    code, _, err = ran(capsys, *arguments, "--undecided=blok_1/*")
    assert code == 1 and "--undecided=blok_1/* matches no leaf" in err


RULES = ["b*.{w,v}:transpose:to=hidden_*/{kernel,bias}", "out.w:transpose:to=head/kernel", "out.v:to=head/bias"]
CARD = {
    **{"task": "mnist", "classes": ["0", "1"], "shape": [2, 3, 1], "rename": [*RULES, "count:drop"]},
    "model": {"model": "mlp", "hidden": [4], "activation": "relu"},
}


def test_files_of_other_names_are_read_by_the_rules_of_their_cards(folder, capsys):
    shapes = {"b0.w": (4, 6), "b0.v": (4,), "out.w": (2, 4), "out.v": (2,), "count": (3,)}
    mine = {name: DRAW.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    trained = mine | {"out.w": DRAW.normal(size=(2, 4)).astype(np.float32), "out.v": np.ones(2, np.float32)}
    names = {"b0.w": "hidden_0/kernel", "b0.v": "hidden_0/bias", "out.w": "head/kernel", "out.v": "head/bias"}

    def write(name, arrays, card):
        np.savez(name, **arrays)
        (folder / f"{name}.json").write_text(json.dumps(card))

    write("mine.npz", mine, CARD)
    for name, changes, expected in (("kept", {}, 0), ("moved", {"b0.w": mine["b0.w"] + 1}, 1)):
        leaves = {path: (trained | changes)[name].T for name, path in names.items()}
        write(f"{name}.npz", leaves, {key: value for key, value in CARD.items() if key != "rename"})
        code, out, err = ran(capsys, "--before=mine.npz", f"--after={name}.npz", "--mask=head/**")
        assert code == expected and f"{4 - expected} proved, {expected} refuted, 0 not decided" in out
        assert "note: 'mine.npz' is read by the rules of its card" in out
        assert ("'hidden_0/kernel', frozen, is refuted" in err) == bool(expected)
        again = {key: array for key, array in (trained | changes).items() if key != "count"}
        write("again.npz", again, CARD | {"rename": RULES})
        code, out, _ = ran(capsys, "--before=mine.npz", "--after=again.npz", "--mask=out.*")
        assert (
            code == expected and f"{4 - expected} proved, {expected} refuted, 0 not decided" in out
        )  # by its own names
        assert "the card of 'mine.npz' drops 'count': nothing is claimed of that" in out


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


# ---- A step


STEP = """
import jax
import jax.numpy as jnp

params = {"body": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
batch = jnp.ones((5, 3))
mask = {"body": False, "head": True}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["body"]) @ params["head"]) ** 2)


def step(params, batch):
    gradients = jax.grad(loss)(params, batch)
    return {"body": params["body"], "head": params["head"] - 0.1 * gradients["head"]}


def make(decay: float = 0.0):
    return step, params, batch, mask
"""
NEW = '{"body": params["body"], "head": params["head"] - 0.1 * gradients["head"]}'
GIVEN = "step, params, batch, mask"
PARTS = "step=step, state=params, batch=batch, mask=mask"
CALLBACK = "    params = jax.pure_callback(lambda p: p, params, params)\n    return {"
BAD = {
    "no file": (None, "step file 'nowhere.py' does not exist"),
    "no function": (("def make(", "def build("), "step 'loop.py' has no function 'make'"),
    "does not parse": (("def make(", "def make(:"), "step file 'loop.py' fails when read: SyntaxError"),
    "fails when read": (
        ("batch = ", "import nowhere\nbatch = "),
        "ModuleNotFoundError: No module named 'nowhere' (loop.py:6)",
    ),
    "make fails": (("    return step", "    {}['x']\n    return step"), "make() fails: KeyError: 'x' (loop.py:20)"),
    "make ends": (("    return step", "    raise SystemExit\n    return step"), "make() fails: SystemExit"),
    "nothing": ((GIVEN, "None"), "make() returns something of the type NoneType: return (step, state, batch, mask)"),
    "three": ((GIVEN, "step, params, batch"), "make() returns a tuple of 3"),
    "no batch": ((GIVEN, "dict(step=step, state=params, mask=mask)"), "make() returns no 'batch'"),
    "another word": ((GIVEN, f"dict({PARTS}, los=loss)"), "'los', which audit.step does not take; nearest: 'loss'"),
    "no step": ((GIVEN, "3, params, batch, mask"), "is of the type int, and no function"),
    "a mask of another tree": (('"head": True', '"hed": True'), "the mask and the parameters are different trees"),
    "a mask of words": (('"body": False', '"body": "no"'), "the mask's leaf at 'body' is 'no'"),
    "a mask of another shape": (('"body": False', '"body": jnp.ones(3) > 0'), "does not broadcast to (3, 4)"),
    "params that are none": (
        (GIVEN, f"dict({PARTS}, params=lambda state: [2 * state['body']])"),
        "what make() returns as 'params' gives '0', which is no leaf of the state",
    ),
    "branches on numbers": (
        ("    gradients", "    assert batch.sum() > 0\n    gradients"),
        "cannot be traced at loop.py:15 (step)",
    ),
    "other shapes": (("jnp.ones((5, 3))", "jnp.ones((5, 4))"), "cannot be traced at loop.py:11 (loss) (TypeError"),
    "one argument": (("step(params, batch)", "step(params)"), "cannot be traced (TypeError: step() takes 1"),
    "returns the loss": (
        (f"return {NEW}", "return loss(params, batch)"),
        "gives no state like the one that it is given",
    ),
    "a leaf more": ((NEW, f"{NEW} | {{'new': batch}}"), "'new' only in what the step gives"),
    "another dtype": (
        (NEW, f"jax.tree.map(jnp.bfloat16, {NEW})"),
        "the state's 'body' from float32[3, 4] to bfloat16[3, 4]",
    ),
    "a counter": (
        (
            "    gradients",
            "    step.calls = vars(step).get('calls', 0) + 1\n    batch = batch * step.calls\n    gradients",
        ),
        "not pure",
    ),
    "random numbers": (
        ("- 0.1 *", "- __import__('numpy').random.normal() *"),
        "the step is not pure at loop.py:16 (step)",
    ),
    "what it kept": (
        ("    gradients", "    batch, step.kept = batch + vars(step).get('kept', 0), batch\n    gradients"),
        "the step is not pure",
    ),
    "the host": (("    return {", CALLBACK), "what is frozen goes through the host at loop.py:16 (step)"),
}


def test_a_step_that_is_proved(folder, capsys):
    (folder / "loop.py").write_text(STEP)
    code, out, err = ran(capsys, "loop.py:make")
    assert (code, err) == (0, "") and re.match(r"step: \d+ proved, 0 refuted, 0 not decided\n", out)
    code, out, err = ran(capsys, "--step=loop.py:make:decay=0.1", "--at_least=identical")
    assert (code, err) == (0, "")


def test_a_step_of_lower_grade_than_asked_is_no_proof(folder, capsys):
    (folder / "loop.py").write_text(
        STEP.replace('"body": params["body"], "head": params', '"body": params["body"] + 0.0, "head": params')
    )
    assert ran(capsys, "loop.py:make")[0] == 0
    code, _, err = ran(capsys, "loop.py:make", "--at_least=identical")
    assert code == 1 and "'body', frozen, is equal: " in err


def test_what_is_computed_for_nobody_has_a_table_of_its_own(folder, capsys):
    (folder / "loop.py").write_text(
        STEP.replace("batch @ params", "(batch + jax.random.normal(jax.random.key(0), (5, 3))) @ params")
    )
    code, out, err = ran(capsys, "loop.py:make")
    page = (folder / "runs" / "audit" / "audit.html").read_text()
    assert (code, err) == (0, "") and "proved  idle" in out
    assert (
        page.index("<h2>Computed for nobody</h2>") < page.index('<td class="word">idle</td>') < page.index("<h2>Proved")
    )


def test_of_a_huge_model_the_shapes_do(folder, capsys):
    """Sixteen gigabytes a leaf: nothing of it is made."""
    huge = STEP.replace("jnp.ones((3, 4))", 'jax.ShapeDtypeStruct((3, 4 * 10**9), "float32")')
    huge = huge.replace("jnp.ones((4, 2))", 'jax.ShapeDtypeStruct((4 * 10**9, 2), "float32")')
    (folder / "loop.py").write_text(huge)
    code, out, err = ran(capsys, "loop.py:make")
    assert (code, err) == (0, "") and " 0 refuted, 0 not decided" in out


@pytest.mark.parametrize("what", BAD)
def test_a_step_of_which_nothing_can_be_made_is_one_line(folder, capsys, what):
    change, words = BAD[what]
    if change is not None:
        assert STEP.count(change[0]) == 1, change[0]
        (folder / "loop.py").write_text(STEP.replace(*change))
    code, out, err = ran(capsys, f"{'loop' if change else 'nowhere'}.py:make")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert words in err
    assert "/tljax/" not in err or "SyntaxError" in err, "the line is the user's"
