"""tljax/audit/README.md is true, and so are the ten lines of README.md: every piece of code and every command runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import audit as program
from experiments.runs import process
from tljax import audit

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tljax/audit/README.md").read_text(encoding="utf-8")
LOOP, *EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
[SUITE] = re.findall(
    r"```python\n(import jax\n.*?audit\.frozen.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
)
RIGHT = "optax.partition({True: optax.adam(1e-2), False: optax.set_to_zero()}, mask)"
WRONG = "optax.masked(optax.adam(1e-2), mask)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.py").write_text(LOOP)
    return tmp_path


def ran(capsys, *arguments):
    code = 0
    with jax.numpy_rank_promotion("allow"):  # the page's loops are written as most are
        try:
            process.run_main(program.main, ["audit", *arguments])
        except SystemExit as end:
            code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def without_numbers(row):
    """A row of a table without its numbers, which another machine may round otherwise."""
    return re.sub(r"[\d.]+ becomes [\d.]+ at", "A becomes B at", " ".join(row.split()))


@pytest.mark.slow
def test_the_loop_of_the_page_is_refuted_as_the_page_says_and_mended_by_its_line(folder, capsys):
    assert COMMANDS[0] == "python -m experiments.audit loop.py:make"
    assert LOOP.count(WRONG) == 1 and RIGHT in TEXT
    code, out, err = ran(capsys, "loop.py:make")
    assert code == 1 and err.count("\n") == 1 and "'body/bias', frozen, is refuted" in err
    [shown] = re.findall(r"```text\n(.*)\n```", TEXT)
    rows = [without_numbers(row) for row in out.splitlines()]
    assert without_numbers(shown) in rows
    (folder / "loop.py").write_text(LOOP.replace(WRONG, RIGHT))
    code, out, err = ran(capsys, "loop.py:make")
    assert (code, err) == (0, "") and re.match(r"train_step: \d+ proved, 0 refuted, 0 not decided\n", out)


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split("\n")[0])
def test_the_example_runs_and_fails_when_its_mask_is_another(code):
    """With the mask the other way round what trains is said to be frozen: the proof is of the mask, not of the loop."""
    if "equinox" in code:
        pytest.importorskip("equinox")
    with jax.numpy_rank_promotion("allow"):
        exec(code, {"__name__": "example"})
        wrong = re.sub(r"(audit\.frozen\(.*), mask\b", r"\1, masks.invert(mask)", code)
        wrong = wrong.replace('{**fresh, "body": weights["body"]}', "fresh")
        assert wrong != code
        with pytest.raises(AssertionError, match="refuted"):
            exec(wrong, {"__name__": "example"})


STATISTICS = [code for code in EXAMPLES if "# with False it is refuted" in code]


@pytest.mark.slow
@pytest.mark.parametrize("code", STATISTICS, ids=("linen", "nnx"))
def test_statistics_that_move_are_refuted_by_the_claim_of_the_page_and_else_told_of(code):
    drifting = code.replace("use_running_average=True", "use_running_average=False")
    assert drifting != code
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(AssertionError, match=r"refuted +frozen +(batch_stats/)?norm/mean"):
            exec(drifting, {"__name__": "example"})
        last = 'audit.frozen(train_step, state, batch, ["head*/**"])'
        by_default = drifting.replace("audit.frozen(train_step, state, batch, mask, params=variables)", last)
        with pytest.warns(UserWarning, match="norm/mean.* may move"):
            exec(by_default, {"__name__": "example"})


def test_the_command_on_checkpoints_runs(folder, capsys):
    before = {"body/kernel": np.ones((2, 2)), "head/kernel": np.ones((2, 3))}
    np.savez("base.npz", **before)
    np.savez("tuned.npz", **before | {"head/kernel": np.arange(6.0).reshape(2, 3)})
    python, dash, name, *arguments = shlex.split(COMMANDS[1])
    assert (python, dash, name, len(COMMANDS)) == ("python", "-m", "experiments.audit", 2)
    code, out, _ = ran(capsys, *arguments)
    assert code == 0 and "2 proved, 0 refuted" in out and (folder / "runs/checkpoints/audit.html").is_file()


def test_the_page_names_what_there_is():
    for name in re.findall(r"`audit\.(\w+)\(", TEXT):
        assert callable(getattr(audit, name)), name
    from tljax.audit.report import CLAIMS, GRADES

    assert set(re.findall(r"^\| (\w+) \|.*\|.*\|$", TEXT, re.M)) == set(CLAIMS) | {"claim"}
    assert re.findall(r"^\| ((?:identical|equal|equal if finite|changed)) \|", TEXT, re.M) == list(GRADES)


STRANGERS_LOOP = """
import jax, jax.numpy as jnp, optax


def init(key):
    one, two = jax.random.split(key)
    body = {"w": jax.random.normal(one, (4, 8)), "b": jnp.zeros(8)}
    return {"body": body, "head": {"w": jax.random.normal(two, (8, 3))}}


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["body"]["w"] + params["body"]["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["head"]["w"], batch["y"]).mean()


labels = {"body": "freeze", "head": "train"}
tx = optax.chain(
    optax.multi_transform({"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels),
)


def make_state():
    params = init(jax.random.key(0))
    return {"params": params, "opt_state": tx.init(params), "step": jnp.zeros((), jnp.int32)}


@jax.jit
def train_step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, {"loss": loss}


def main():
    state = make_state()
    for seed in range(100):
        batch = {"x": jax.random.normal(jax.random.key(seed), (8, 4)), "y": jnp.arange(8) % 3}
        state, metrics = train_step(state, batch)
    print(metrics)
"""
"""A loop as its author has it, without a line of tljax."""


@pytest.mark.slow
def test_ten_lines_audit_a_strangers_loop(tmp_path):
    """The suite of README.md beside a plain loop of JAX and optax: green; with decay after the freezing: red."""
    code = [line for line in SUITE.splitlines() if line.strip()]
    assert len(code) <= 10 and "tljax" not in STRANGERS_LOOP
    (tmp_path / "test_frozen.py").write_text(SUITE)

    def suite(loop):
        (tmp_path / "train.py").write_text(loop)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_frozen.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    clean = suite(STRANGERS_LOOP)
    assert clean.returncode == 0 and "1 passed" in clean.stdout, clean.stdout
    decayed = STRANGERS_LOOP.replace("labels),\n", "labels),\n    optax.add_decayed_weights(-1e-4),\n")
    assert decayed != STRANGERS_LOOP
    red = suite(decayed)
    assert red.returncode == 1 and "1 failed" in red.stdout
    assert "AssertionError: train_step does not leave alone what the mask freezes" in red.stdout
    assert re.search(r"refuted +frozen +body/w .*\[train\.py:\d+ \(train_step\)\]", red.stdout), red.stdout
