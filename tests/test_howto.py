"""experiments/HOWTO.md is true: every recipe runs, and does what its heading says."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from experiments import apply, compare, export, pretrain, transfer
from tljax import checkpoint, masks

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "experiments" / "HOWTO.md").read_text(encoding="utf-8")
LIBRARY, PROGRAMS = TEXT.partition("## With the programs")[::2]
MAINS = {
    f"experiments.{name}": program.main
    for name, program in (
        ("apply", apply),
        ("compare", compare),
        ("export", export),
        ("pretrain", pretrain),
        ("transfer", transfer),
    )
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def recipes(text):
    """{heading: its text}."""
    return dict(part.split("\n", 1) for part in re.split(r"^### ", text, flags=re.M)[1:])


SETUP = blocks(LIBRARY, "python")[0]
OWN_LOOP = blocks(recipes(LIBRARY)["Masks in my own optax loop"], "python")[0]


def leaves(tree):
    """{path: array} of a nested dict."""
    named = {}
    for name, value in tree.items():
        inner = leaves(value) if isinstance(value, dict) else {"": np.asarray(value)}
        named.update({f"{name}/{path}".rstrip("/"): leaf for path, leaf in inner.items()})
    return named


def moved(scope, name="tuned"):
    before, after = leaves(scope["params"]), leaves(scope[name])
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


def by_hand(scope, started, transformations, steps):
    """Each leaf by an optimizer of its own, from the step at which it is started: no masks in it."""
    values, states = dict(leaves(scope["params"])), {}
    gradient = jax.jit(jax.grad(lambda named: scope["loss"](nested(named), scope["batch"])))
    for number in range(steps):
        gradients = gradient(values)
        for path, first in started.items():
            if number >= first:
                state = states.get(path, transformations[path].init(values[path]))
                update, states[path] = transformations[path].update(gradients[path], state, values[path])
                values[path] = values[path] + update
    return values


def nested(named):
    tree: dict = {}
    for path, leaf in named.items():
        stage, name = path.split("/")
        tree.setdefault(stage, {})[name] = leaf
    return tree


def assert_close(scope, name, expected):
    for path, leaf in leaves(scope[name]).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)


HEAD = {"head/kernel", "head/bias"}
LAYERS = {"layers/kernel", "layers/bias"}


def check_own_loop(scope, out):
    assert moved(scope) == HEAD
    assert_close(scope, "tuned", by_hand(scope, dict.fromkeys(HEAD, 0), dict.fromkeys(HEAD, optax.adamw(1e-2)), 3))


def check_first_layers(scope, out):
    assert moved(scope) == HEAD | LAYERS
    for path in LAYERS:
        rows = zip(leaves(scope["params"])[path], leaves(scope["tuned"])[path], strict=True)
        assert [a.tobytes() != b.tobytes() for a, b in rows] == [False] * 4 + [True] * 2, path


def check_paths(scope, out):
    assert moved(scope) == HEAD | {"layers/bias"}


def check_rates(scope, out):
    """Adam's first step is its rate in length, whatever the gradient."""
    before, after = leaves(scope["params"]), leaves(scope["tuned"])
    for path in before:
        expected = 1e-2 if path.startswith("head/") else 1e-3
        assert np.abs(after[path] - before[path]).max() == pytest.approx(expected, rel=1e-3), path


def check_decay(scope, out):
    assert moved(scope) == HEAD | LAYERS
    each = {path: optax.adamw(1e-2, weight_decay=0.1 * path.endswith("kernel")) for path in HEAD | LAYERS}
    assert_close(scope, "tuned", by_hand(scope, dict.fromkeys(each, 0), each, 3))


def check_rows(scope, out):
    assert moved(scope) == HEAD | {"words/table"}
    rows = zip(scope["params"]["words"]["table"], scope["tuned"]["words"]["table"], strict=True)
    assert [i for i, (a, b) in enumerate(rows) if np.asarray(a).tobytes() != np.asarray(b).tobytes()] == [3, 7]


def check_resumed(scope, out):
    started = {path: 0 if path in HEAD else 1 for path in leaves(scope["params"])}
    assert_close(scope, "values", by_hand(scope, started, dict.fromkeys(started, optax.adam(1e-2)), 3))


def check_table(scope, out):
    rows = {row.split()[0]: row.split()[1:] for row in out.splitlines()}
    assert rows["layers/kernel"] == ["part", "64", "of", "384"] and rows["words/table"] == ["frozen", "0", "of", "160"]
    assert Path("mask.npz").is_file()


def check_costs(scope, out):
    everything, head, kept = (float(row.split()[-1]) for row in out.splitlines())
    below, above = 6 * 2 * 16 * 8 * 8, 2 * 16 * 8 * 3  # the products of a forward pass
    assert 3 * (below + above) < everything < 5 * (below + above)
    assert below + 2 * above < head < 2 * below and 2 * above < kept < 3 * above
    whole = scope["gradient"](scope["params"], scope["head"])["head"]
    alone = jax.grad(scope["loss_of_head"])(scope["params"]["head"], scope["outputs"])
    for name, leaf in alone.items():
        np.testing.assert_allclose(leaf, whole[name], rtol=1e-4, atol=1e-6)


def check_audit(scope, out):
    with pytest.raises(AssertionError, match="refuted"):
        scope["audit"].frozen(
            scope["train_step"],
            {"params": scope["params"], "optimizer": scope["tx"].init(scope["params"])},
            scope["batch"],
            masks.invert(scope["mask"]),
        )
    early = optax.chain(optax.masked(optax.set_to_zero(), masks.invert(scope["mask"])), scope["trains"])
    scope["tx"], [state] = early, [{"params": scope["params"], "optimizer": early.init(scope["params"])}]
    scope["train_step"].clear_cache()
    with pytest.raises(AssertionError, match="equal if finite"):
        scope["audit"].frozen(scope["train_step"], state, scope["batch"], scope["mask"])


CHECKS = {
    "Masks in my own optax loop": check_own_loop,
    "Freeze the first k of stacked layers": check_first_layers,
    "Train biases, norms or anything else by its path": check_paths,
    "Different rates for head and trunk": check_rates,
    "Decay on kernels only": check_decay,
    "Train some rows of a table": check_rows,
    "Unfreeze, and resume after it": check_resumed,
    "See what trains, and keep the mask with the run": check_table,
    "Count what my step costs, and compute a frozen prefix once": check_costs,
    "Audit my own step": check_audit,
}


@pytest.mark.parametrize(
    "heading", [pytest.param(name, marks=pytest.mark.slow if name.startswith("Unfreeze") else ()) for name in CHECKS]
)
def test_the_recipe_for_a_loop_of_ones_own(heading, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with jax.numpy_rank_promotion("allow"):  # recipes are written as most loops are
        exec(SETUP, scope)
        if heading != "Masks in my own optax loop":
            exec(OWN_LOOP.partition("\n\ntuned = ")[0], scope)
        [code] = blocks(recipes(LIBRARY)[heading], "python")
        exec(code, scope)
        CHECKS[heading](scope, capsys.readouterr().out)


def run(heading, *short):
    """Run the commands of a recipe, its files beside them, with what makes them short."""
    text = recipes(PROGRAMS)[heading]
    for code in blocks(text, "python"):
        saved = re.search(r"[Ss]ave this as `(\w+\.py)`", text)
        if saved:
            Path(saved[1]).write_text(code, encoding="utf-8")
        else:
            exec(code, {})
    for line in blocks(text, "sh")[0].splitlines():
        python, dash, program, *arguments = shlex.split(line)
        assert (python, dash) == ("python", "-m")
        takes = () if program in ("experiments.export", "experiments.apply") else short
        MAINS[program]([program, *arguments, *takes])


def results(workdir):
    return [json.loads(line) for line in Path(workdir, "results.jsonl").read_text(encoding="utf-8").splitlines()]


QUICK = ("--steps=3", "--seeds=0")


def arrays(capsys):
    run("My own arrays as a task", *QUICK)
    fits = [fit for fit in results("runs/mine_npz") if fit["source"]]
    with np.load(Path("runs/mine_npz", fits[0]["predictions"])) as predicted:
        assert len(predicted["labels"]) == 597
    assert {fit["train_examples"] for fit in fits} == {100}


def metric(capsys):
    run("My own metric", *QUICK)
    for fit in results("runs/top2"):
        if fit["strategy"] == "head_only":
            with np.load(Path("runs/top2", fit["predictions"])) as predicted:
                likeliest = np.argsort(-predicted["probabilities"], axis=1)[:, :2]
                right = [label in row for label, row in zip(predicted["targets"], likeliest, strict=True)]
            assert fit["test_score"] == pytest.approx(np.mean(right))


def mask_table(text, strategy):
    """{leaf: its columns in the dry run's table of the strategy's mask}."""
    rows = text.partition(f"{strategy}: mask")[2].partition("numbers train")[0].splitlines()
    return {row.split()[0]: row.split()[1:] for row in rows if "/" in row}


def query_kernels(capsys):
    run("LoRA on the query kernels of my ViT", "--model=vit:width=8:depth=1:heads=2:patch=14")
    table = mask_table(capsys.readouterr().out, "lora:rank=4:on=block_*/attention/query/kernel")
    trained = {leaf for leaf, columns in table.items() if "trained" in columns and not leaf.startswith("head/")}
    assert trained == {f"block_0/attention/query/lora_{factor}" for factor in "ab"}


def first_stages(capsys):
    run("Freeze the first stages of a model")
    table = mask_table(capsys.readouterr().out, "stages:freeze=hidden_0+hidden_1")
    trained = {leaf.split("/")[0] for leaf, columns in table.items() if "trained" in columns}
    frozen = {leaf.split("/")[0] for leaf, columns in table.items() if "frozen" in columns}
    assert frozen == {"hidden_0", "hidden_1"} and trained == {"hidden_2", "head"}


def fixed(capsys):
    run("A bottom that never trains and is no parameter", "--seeds=0")
    said = capsys.readouterr().out
    assert "cosines is frozen: features of 10,000 examples are computed once" in said
    trees = kept("runs/above")
    assert {name.split("-")[0] for name in trees} == {"pretrain", "scratch", "full"}
    assert all({path.split("/")[0] for path in tree} == {"hidden", "head"} for tree in trees.values())


def decay(capsys):
    run("Decay on kernels only, by a flag")
    table = mask_table(capsys.readouterr().out, "full")
    assert len(table) == 4
    assert all(columns[2] == ("yes" if leaf.endswith("kernel") else "no") for leaf, columns in table.items())


def kept(workdir):
    """{name: {path: array}} of the checkpoints of a run, those of averages and other ends too."""
    folders = {fit["checkpoint"] for fit in results(workdir) if fit.get("checkpoint")}
    return {name: tree for folder in folders for name, tree in checkpoint.load(Path(workdir, folder))[0].items()}


def statistics(capsys):
    small = f"--model={Path(__file__).parent / 'residual.py'}:model"  # of which a program compiles in a second
    run("Batch-norm statistics of frozen layers", *QUICK, small)
    [source], [full] = (
        [t for n, t in kept("runs/statistics").items() if n.startswith(k)] for k in ("pretrain", "full")
    )
    averages = [path for path in source if path.endswith("/var") and path in full]
    assert averages and any((source[path] != 1).any() for path in averages)
    assert all((source[path] == full[path]).all() for path in averages)
    assert any((source[path] != full[path]).any() for path in source if path.endswith("/kernel"))


def early(capsys):
    run("Stop early on a validation split", "--seeds=0")
    [fit] = [fit for fit in results("runs/stopped") if "stop.py" in str(fit["strategy"])]
    assert 0 < fit["stopped_step"] < 200


def targets_and_delta(capsys):
    run("Several targets from one source", "--steps=3")
    assert {fit["target"] for fit in results("runs/targets")} == {"fashion_mnist_10k", "sklearn_digits"}
    run("Export what changed", "--steps=3")
    [fit] = [tree for name, tree in kept("runs/head").items() if name.startswith("head_only")]
    whole = load_file("head_whole.safetensors")
    assert {path: leaf.tobytes() for path, leaf in whole.items()} == {p: leaf.tobytes() for p, leaf in fit.items()}
    assert Path("head_delta.safetensors").stat().st_size < Path("head_whole.safetensors").stat().st_size / 2


def average(capsys):
    run("Keep the average of the parameters", *QUICK)
    trees = kept("runs/average")
    [last] = [name for name in trees if name.startswith("full") and not name.endswith(".average")]
    [source] = [name for name in trees if name.startswith("pretrain") and not name.endswith(".average")]
    path = "hidden_0/kernel"
    moves = [np.linalg.norm(trees[name][path] - trees[source][path]) for name in (f"{last}.average", last)]
    assert 0 < moves[0] < 0.1 * moves[1]  # of three steps it has gone (1 - 0.99) (3 + 2 + 1) / 3 of the way


def near(capsys):
    run("Stay near the source", *QUICK)
    [fit] = [fit for fit in results("runs/near") if fit["strategy"] == "full"]
    assert fit["train_penalty"] > 0


def again(capsys):
    run("Go on after a run was killed, or an unfreezing in it", *QUICK)
    before = Path("runs/phases/results.jsonl").read_bytes()
    run("Go on after a run was killed, or an unfreezing in it", *QUICK)
    assert Path("runs/phases/results.jsonl").read_bytes() == before and len(before.splitlines()) == 4


def reference(capsys):
    """tests/test_docs.py runs it."""
    [line] = blocks(recipes(PROGRAMS)["Look a function up"], "sh")[0].splitlines()
    assert shlex.split(line)[:4] == ["python", "-m", "pdoc", "tljax"]


PROGRAM_CHECKS = {
    "My own arrays as a task": arrays,
    "My own metric": metric,
    "LoRA on the query kernels of my ViT": query_kernels,
    "Freeze the first stages of a model": first_stages,
    "A bottom that never trains and is no parameter": fixed,
    "Decay on kernels only, by a flag": decay,
    "Batch-norm statistics of frozen layers": statistics,
    "Stop early on a validation split": early,
    "Several targets from one source": targets_and_delta,
    "Export what changed": targets_and_delta,
    "Keep the average of the parameters": average,
    "Stay near the source": near,
    "Go on after a run was killed, or an unfreezing in it": again,
    "Look a function up": reference,
}


@pytest.mark.slow
@pytest.mark.parametrize("check", dict.fromkeys(PROGRAM_CHECKS.values()), ids=lambda check: check.__name__)
def test_the_recipe_with_the_programs(check, tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    check(capsys)


def test_every_recipe_has_a_check():
    assert list(recipes(LIBRARY)) == list(CHECKS) and list(recipes(PROGRAMS)) == list(PROGRAM_CHECKS)
