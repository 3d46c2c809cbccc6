"""What a newcomer meets: names for strategies, short dry runs, signs of life, errors that say whose and where."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_programs import arguments, command

from experiments import compare, predict, pretrain, report, search, transfer
from experiments.pages import figures, tables
from experiments.pages import report as pages
from experiments.runs import console, directory, plan, process, sources
from experiments.runs.settings import FLAGS, Settings, parse_flags
from tljax import initialization, masks, models, paths, plugins
from tljax.initialization import Initialization
from tljax.study import search as studies
from tljax.study import space as spaces
from tljax.train import vectorize
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

MINE = '''"""Train the first stage's biases, or all."""

from tljax import masks


def strategy(params, context, *, k: int = 1):
    mask = masks.by_path(params, lambda path: path == "hidden_0/bias" or k > 1)
    return masks.union(mask, context.fresh)


def broken(params, context):
    return len(5)


def narrow(params):
    return params
'''


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def quick(tasks, folder, **flags):
    return arguments(tasks, folder / "w", **{"hidden": (8,), "steps": 4, "points": 1, "seeds": (0,), **flags})


def test_a_name_stands_for_a_strategy_in_lines_tables_and_files(tasks, tmp_path, mine, capsys):
    strategies = (f"LN_QV={mine}:strategy:k=2", f"biases={mine}:strategy")
    lines = transfer.run(**quick(tasks, tmp_path, strategies=strategies))
    by_name = {line.strategy: (line.spec, line.options) for line in lines}
    assert by_name == {
        "scratch": (None, {}),
        "LN_QV": (f"{mine}:strategy:k=2", {"k": 2}),
        "biases": (f"{mine}:strategy", {}),
    }
    out = capsys.readouterr().out
    assert re.search(r"(?m)^ LN_QV +120 ", out) and re.search(r"(?m)^ biases +120 ", out)
    names = {file.name.split("-")[0] for file in (tmp_path / "w" / "masks").iterdir()}
    assert {"LN_QV", "biases"} < names
    assert "LN_QV" in (tmp_path / "w" / "report.html").read_text()
    with pytest.raises(InputError, match="are both named LN_QV"):
        transfer.run(**quick(tasks, tmp_path, strategies=(f"LN_QV={mine}:strategy",)))


def test_fits_of_one_name_and_other_options_are_not_mixed(tasks, tmp_path, mine):
    """Of two runs: the name hides the options, so the recipe of a fit tells of them."""
    runs = []
    for seed, k in ((0, 1), (1, 2)):
        runs.append(tmp_path / f"run{k}")
        flags = quick(tasks, tmp_path, seeds=(seed,), strategies=("scratch", f"A={mine}:strategy:k={k}"), source_seed=0)
        transfer.run(**{**flags, "workdir": str(runs[-1])})
    with pytest.raises(InputError, match="are both A with 120 labels, but of different hyper-parameters"):
        report.main(["report", f"--runs={runs[0]},{runs[1]}", f"--output={tmp_path / 'pages'}"])


def test_named_and_unnamed_fits_have_the_same_bits(tasks, tmp_path, mine):
    both = (f"named={mine}:strategy", f"{mine}:strategy")
    _, named, plain = transfer.run(**quick(tasks, tmp_path, strategies=both))
    assert named.strategy == "named" and plain.strategy == f"{mine}:strategy"
    kept = [np.load(tmp_path / "w" / line.predictions)["probabilities"] for line in (named, plain)]
    np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        (("A=full", "A=head_only"), "'A=full' and 'A=head_only' are both named A"),
        (("full=head_only",), "'full' is a strategy's own name"),
        (("scratch=full",), "'scratch' is a strategy's own name"),
        (("pretrain=full",), "'pretrain' is a strategy's own name"),
        (("A=",), "names no strategy: write A=mine.py:strategy"),
        (("my mask=full",), "'my mask' is no name"),
        (("A=fulll",), "nearest: 'full'"),
        (("A=last_k:kk=2",), "has no option 'kk'"),
    ],
)
def test_a_name_that_cannot_be_is_refused(strategies, message, tasks, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        transfer.run(**quick(tasks, tmp_path, strategies=strategies))
    assert not (tmp_path / "w").exists()


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch, mine):
    folder = tmp_path / "seed=3"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.py").write_text(MINE)
    assert plugins.named("seed=3/mine.py:strategy") == ("", "seed=3/mine.py:strategy")
    assert plan.read_strategy("a=b.py:strategy").label == "a=b.py:strategy"
    assert plan.read_strategy("x=seed=3/mine.py:strategy:k=2").spec == "seed=3/mine.py:strategy:k=2"


def test_a_space_reaches_into_a_strategy_by_its_name():
    flags = {"strategies": ("A=last_k:k=1", "last_k:k=1")}
    assert spaces.applied(flags, {"strategy.A.k": 3})["strategies"] == ("A=last_k:k=3", "last_k:k=1")
    assert spaces.applied(flags, {"strategy.last_k.k": 3})["strategies"] == ("A=last_k:k=1", "last_k:k=3")
    assert spaces.applied({"strategies": ("mine.py:s",)}, {"strategy.mine.py.k": 3})["strategies"] == ("mine.py:s:k=3",)


@pytest.mark.slow
def test_search_compare_and_report_know_the_name(tasks, tmp_path, mine, capsys):
    """A tuned comparison against a named strategy; and the winners of the search are judged as they are."""
    named = f"LN_QV={mine}:strategy"
    common = command(tasks, tmp_path, hidden=(8,), steps=4, points=1, seeds=(0, 1), strategies=(named,))
    common = [part for part in common if not part.startswith("--workdir")]
    words = ["--per_strategy", "--space=learning_rate:in:0.1,0.2", "--space=strategy.LN_QV.k:in:1,2", "--trials=1"]
    search.main(["search", *common, *words, f"--workdir={tmp_path / 'search'}"])
    assert (tmp_path / "search" / "best" / "LN_QV-all.flags").is_file()
    assert "\nLN_QV,all,0," in (tmp_path / "search" / "trials.csv").read_text()
    tuned = [f"--tuned={tmp_path / 'search'}", "--against=LN_QV", f"--workdir={tmp_path / 'compared'}"]
    common = [part for part in common if not part.startswith("--learning_rate")]  # was searched
    compare.main(["compare", *common, *tuned, "--nolonger_scratch"])
    lines = directory.results(tmp_path / "compared")
    assert {line.strategy for line in lines if line.strategy != "pretrain"} == {"scratch", "LN_QV"}
    capsys.readouterr()
    report.main(["report", f"--runs={tmp_path / 'search'}", f"--output={tmp_path / 'pages'}"])
    out = capsys.readouterr().out
    assert re.search(r"(?m)^ LN_QV +\S+ +\S+ +120 +2 ", out) and "what search found best for it" in out
    places = ",".join(map(str, sorted((tmp_path / "search" / "final").iterdir())))
    report.main(["report", f"--runs={places}", f"--output={tmp_path / 'more'}"])
    assert re.search(r"(?m)^ LN_QV +\S+ +\S+ +120 +2 ", capsys.readouterr().out)


def test_winners_that_lack_a_fit_are_not_judged(tasks, tmp_path):
    transfer.run(**quick(tasks, tmp_path, strategies=("scratch", "full")))
    (tmp_path / "w" / "report.html").unlink()
    report.main(["report", f"--runs={tmp_path / 'w'}", f"--output={tmp_path / 'pages'}"])
    file = tmp_path / "w" / "results.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match="holds no run that has ended"):
        report.main(["report", f"--runs={tmp_path / 'w'}", f"--output={tmp_path / 'pages2'}"])


BLOCKS = '''"""Stages with repeated blocks."""

from flax import linen as nn

from tljax.models.linen import stage


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)[:, :8]
        return x + nn.Dense(8)(nn.relu(nn.Dense(8)(x)))


def model(classes):
    return (*(stage(f"block_{i}", Block()) for i in range(4)), stage("head", nn.Dense(classes)))
'''


@pytest.mark.slow
def test_a_dry_run_has_one_row_for_repeated_blocks(tasks, tmp_path, capsys):
    file = tmp_path / "blocks.py"
    file.write_text(BLOCKS)
    strategies = ("full", "head_only", "last_k:k=2")
    flags = quick(tasks, tmp_path, model=f"{file}:model", strategies=strategies, dry_run=True)
    transfer.run(**{name: value for name, value in flags.items() if name != "hidden"})
    out = capsys.readouterr().out
    assert "block_{0..3}/Dense_{0,1}/kernel" in out and "8 x 64" in out  # one row of 8 kernels
    assert "block_{0..2}/Dense_{0,1}/kernel" in out  # those that last_k freezes
    assert "full: graft as of scratch" in out or "head_only: graft as of full" in out
    assert len(out.splitlines()) < 80
    assert "frozen" in out and re.search(r"block_3/Dense_\{0,1\}/kernel +8x8 +trained +2 x 64", out)


def test_a_dry_run_shows_the_names_of_a_file_of_weights(tasks, tmp_path, capsys):
    file = tmp_path / "blocks.py"
    file.write_text(BLOCKS)
    rng = np.random.default_rng(0)
    arrays = {
        f"net.{i}.{part}.{leaf}": rng.normal(size=shape).astype(np.float32)
        for i in range(4)
        for part in ("a", "b")
        for leaf, shape in (("w", (8, 8)), ("bias", (8,)))
    }
    arrays |= {"top.kernel": np.zeros((8, 4), np.float32), "top.bias": np.zeros(4, np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    (tmp_path / "w.npz.json").write_text(json.dumps({"task": "digits", "classes": list("0123"), "shape": [6, 6, 1]}))
    # The first two blocks change places: what is not in order is not folded.
    place = {0: 1, 1: 0, 2: 2, 3: 3}
    rules = [f"net.{i}.{p}.w:to=block_{place[i]}/Dense_{j}/kernel" for i in place for j, p in enumerate("ab")]
    rules += [f"net.{i}.{p}:to=block_{i}/Dense_{j}" for i in place for j, p in enumerate("ab")]
    more = {"source": None, "source_checkpoint": str(tmp_path / "w.npz"), "source_rename": (*rules, "top:to=head")}
    flags = quick(tasks, tmp_path, model=f"{file}:model", strategies=("head_only",), dry_run=True, **more)
    transfer.run(**{name: value for name, value in flags.items() if name != "hidden"})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["block_{0..3}/Dense_0/bias", "net.{0..3}.a.bias", "renamed", "8", "float32", "4"] in rows
    assert ["block_0/Dense_1/kernel", "net.1.b.w", "renamed", "8x8", "float32", "1"] in rows
    assert ["-", "top.kernel", "dropped", "8x4", "float32", "1"] in rows
    assert [row for row in rows if row[:3] == ["head/kernel", "-", "drawn"]]


def test_folded_rows_are_all_rows():
    rng = np.random.default_rng(0)
    rows = [(f"b_{i}/l{j}/k", int(rng.integers(2))) for i in range(5) for j in range(4)] + [("head/k", 0)]
    folded = paths.folded(rows)
    assert sorted(i for _, members in folded for i in members) == list(range(len(rows)))
    assert all(len({rows[i][1] for i in members}) == 1 for _, members in folded)
    assert paths.folded([("a3x3/k", 1), ("a5x5/k", 1)]) == [("a3x3/k", [0]), ("a5x5/k", [1])]
    assert paths.folded([("l_01/k", 1), ("l_02/k", 1), ("l_10/k", 1)]) == [("l_{01,02,10}/k", [0, 1, 2])]


def test_a_log_file_has_a_sign_of_life_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(console, "SIGN_OF_LIFE", 0.05)
    with console.progress("full", 6000) as advance:
        advance(1200)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 5 and lines[0].startswith("full: 1,200 of 6,000 steps done, 4,800 left")
    with console.progress("full", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        *(("lr", "learning_rate"), ("wd", "weight_decay"), ("bs", "batch_size"), ("source_lr", "source_learning_rate")),
        *(("batch", "batch_size"), ("rate", "learning_rate"), ("smoothing", "label_smoothing"), ("dry", "dry_run")),
    ],
)
def test_an_unknown_flag_is_told_the_nearest(wrong, meant):
    with pytest.raises(InputError, match=rf"unknown flag --{wrong}: did you mean --{meant}\?"):
        parse_flags(["transfer", f"--{wrong}=1"])


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("broken", r"TypeError: object of type 'int' has no len\(\)", 12),
        ("narrow", r"TypeError: narrow\(\) takes 1 positional argument but 2 were given", 15),
    ],
)
def test_a_strategy_that_fails_says_which_where_and_what(name, text, line, tasks, tmp_path, mine):
    for label, spec in ((f"{mine}:{name}", f"{mine}:{name}"), ("mask", f"mask={mine}:{name}")):
        expected = rf"strategy '{re.escape(label)}' fails: {text} \({re.escape(str(mine))}:{line}\)"
        with pytest.raises(InputError, match=expected):
            transfer.run(**quick(tasks, tmp_path, strategies=(spec,)))


WRONG_PARAMETERS = '''"""Functions without their parameters."""

from tljax import masks
from tljax.types import Metric


def strategy(params, context):
    return masks.under(params, "head")


def noargs():
    return 0.0


def penalty(*, weight):
    return 0.0


held = Metric("held", item=noargs)


class Called:
    def __call__(self):
        return 0.0


called = Called()


def finish():
    return {}


def adapt():
    return {}
'''


@pytest.mark.parametrize(
    ("flags", "words", "line"),
    [
        ({"metric": ("FILE:noargs",)}, "metric", 11),
        ({"metric": ("FILE:held",)}, "metric", 11),
        ({"metric": ("FILE:called",)}, "metric", 23),
        ({"loss": "FILE:noargs"}, "--loss", 11),
        ({"penalty": "FILE:penalty:weight=1"}, "--penalty", 15),
        ({"augment": "FILE:noargs"}, "augmentation", 11),
        ({"optimizer": "FILE:noargs"}, "--optimizer", 11),
        ({"strategies": ("FILE",)}, "adapt of strategy", 34),
        ({"strategies": ("FINISHES",)}, "finish of strategy", 30),
    ],
)
def test_a_function_of_the_wrong_parameters_is_found_at_its_own_line(flags, words, line, tasks, tmp_path):
    file, finishes = tmp_path / "wrong.py", tmp_path / "finishes.py"
    file.write_text(WRONG_PARAMETERS)
    finishes.write_text(WRONG_PARAMETERS.partition("def adapt")[0])

    def at(value):
        return value.replace("FILE", str(file)).replace("FINISHES", str(finishes))

    flags = {name: at(value) if isinstance(value, str) else tuple(map(at, value)) for name, value in flags.items()}
    with pytest.raises(InputError, match=rf"{words}.*: TypeError: .*\({tmp_path}/\w+\.py:{line}\)"):
        transfer.run(**quick(tasks, tmp_path, **{"strategies": ("head_only",), **flags}, dry_run=True))


NO_NUMBER = '''"""Metrics that are not finite."""

import numpy as np


def whole(outputs, targets):
    return float("nan")


def item(outputs, targets):
    return np.where(targets == 0, np.nan, 1.0)


def learnt(outputs, targets):  # of what was learnt, not of a constant answer
    return np.where((outputs != outputs[:1]).any() & (np.arange(len(targets)) < 2), np.nan, 0.5)
'''


def test_a_metric_that_is_no_number_is_said_once(tasks, tmp_path, capsys):
    file = tmp_path / "no.py"
    file.write_text(NO_NUMBER)
    metrics = (f"{file}:whole", f"{file}:item", "macro_f1")
    transfer.run(**quick(tasks, tmp_path, strategies=("head_only",), seeds=(0, 1), metric=metrics, source_metric=()))
    text = " ".join(capsys.readouterr().out.split())
    for name in ("whole", "item"):
        line = f"metric {name} is nan or infinite in 4 of 4 fits (scratch, head_only): tables leave them out"
        assert text.count(line) == 1
    assert "metric macro_f1 is" not in text


def test_a_primary_metric_that_is_no_number_is_refused_or_its_fit_counts_as_diverged(tasks, tmp_path, capsys):
    file = tmp_path / "no.py"
    file.write_text(NO_NUMBER)
    changes = {"strategies": ("head_only",), "source_primary": ""}
    with pytest.raises(InputError, match=r"--primary=.*:item: .*it is nan or infinite for 40 of 120 items, .*item 0"):
        transfer.run(**quick(tasks, tmp_path, primary=f"{file}:item", **changes))
    _, fit = transfer.run(**quick(tasks, tmp_path, primary=f"{file}:learnt", **changes))
    assert fit.diverged and fit.test_score is None and fit.majority_share == 0.5 and fit.diverged_step == fit.steps
    text = " ".join(capsys.readouterr().out.split())
    start = "head_only, seed 0: learnt on the test set is nan or infinite for 2 of "
    assert text.count(start) == 1 and "item 0 is the first: the fit counts as diverged" in text


LACKING = '''"""Each function lacks something."""

from tljax import masks
from tljax.types import Phase


def forgets(params, context):
    masks.union(masks.by_glob(params, "**/bias"), context.fresh)


def later(params, context):
    return [Phase(0.0, context.fresh), Phase(0.5, forgets)]


def mistypes(params, context):
    return masks.union(masks.by_glob(params, "**/biass"), context.fresh)


def strays(params, context):
    return masks.union(masks.under(params, "hiden_0"), context.fresh)
'''
FORGETS = "def strategy(params, context):\n    return context.fresh\n\n\ndef {}:\n    pass\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("forgets", "strategy '{}' returned None: return a mask"),
        ("later", "a phase of strategy '{}' returned None: return a mask"),
        ("mistypes", "strategy '{}': pattern '**/biass' matches no leaf; nearest:"),
        ("strays", "strategy '{}': prefix 'hiden_0' holds no leaf; nearest: 'hidden_0'"),
    ],
)
def test_what_a_strategy_lacks_is_said_with_its_name(name, text, tasks, tmp_path):
    file = tmp_path / "lacking.py"
    file.write_text(LACKING)
    for label, spec in ((f"{file}:{name}", f"{file}:{name}"), ("mine", f"mine={file}:{name}")):
        with pytest.raises(InputError, match=re.escape(text.format(label))):
            transfer.run(**quick(tasks, tmp_path, strategies=(spec,)))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("adapt(params, key)", "strategy 'mine': adapt returned None: return the parameters"),
        ("merge(params)", "merge of strategy 'mine' returned None: return ordinary parameters"),
        ("reinit(context)", "strategy 'mine': reinit gives None: return a list of path prefixes"),
        ("left_out(params, context)", "left_out of strategy 'mine' returned None: return a list of paths"),
    ],
)
def test_every_function_of_a_strategy_that_forgets_to_return_is_told_so(function, text, tasks, tmp_path):
    more = "\n\ndef adapt(params, key):\n    return params\n" if function.startswith("merge") else ""
    (tmp_path / "mine.py").write_text(FORGETS.format(function) + more)
    strategies = (f"mine={tmp_path / 'mine.py'}:strategy",)
    with pytest.raises(InputError, match=re.escape(text)):
        transfer.run(**quick(tasks, tmp_path, strategies=strategies, dry_run=True))


def test_a_mask_of_none_is_told_apart_from_one_of_another_tree():
    with pytest.raises(InputError, match="the mask is None"):
        masks.lint({"a": np.ones(2)}, None)
    with pytest.raises(InputError, match="different trees"):
        masks.lint({"a": np.ones(2)}, {})


def test_an_error_that_names_its_strategy_names_it_once(tasks, tmp_path):
    with pytest.raises(InputError) as refused:
        transfer.run(**quick(tasks, tmp_path, strategies=("norm_only",)))
    assert str(refused.value).count("norm_only") == 1


FAULTY = '''"""Models that fail, each in its own way."""

import flax.linen as nn
import jax.numpy as jnp

from tljax.models.linen import flat, stage
from tljax.types import Stage


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads + 1)


def head(classes):
    return stage("head", nn.Dense(classes), before=flat)


def reshapes(classes, *, heads: int = 4):
    return stage("body", nn.Dense(10), before=flat), stage("block_0", Block(heads)), head(classes)


def builds(classes):
    return stage("body", nn.Dense(classes["width"])), head(classes)


def forgets(classes):
    head(classes)


def gives_a_module(classes):
    return nn.Dense(5, name="body"), head(classes)


def repeats(classes):
    return stage("a", nn.Dense(5)), stage("a", nn.Dense(5)), head(classes)


def fails_at_init(classes):
    return Stage("body", lambda key, x: {}["kernel"], lambda params, x, *, key=None: x), head(classes)


def gives_two(classes):
    return Stage("body", lambda key, x: {}, lambda params, x, *, key=None: (x, x)), head(classes)


def gives_maps(classes):
    return stage("body", nn.Dense(5)), stage("head", nn.Dense(classes))


def fails_in_training(classes):
    def apply(params, x, *, key=None):
        return x if key is None else x @ jnp.ones((2, 2))

    return Stage("body", lambda key, x: {}, apply), head(classes)
'''
FAILS = {
    "reshapes": r"fails in stage 'block_0' on inputs float32\[1, 10\]: TypeError: cannot reshape .*:15\)",
    "builds": r"cannot be built: TypeError: 'int' object is not subscriptable \(.*:27\)",
    "forgets": r"gives None for its stages: return Stage\(name, init, apply\)",
    "gives_a_module": r"gives Dense\(.* for a stage: return Stage",
    "repeats": r"has two stages named 'a': give each a name of its own",
    "fails_at_init": r"fails in stage 'body' on inputs float32\[1, .*: KeyError: 'kernel' \(.*:43\)",
    "gives_two": r"stage 'body' gives a tuple: let it give one array",
    "gives_maps": r"its head, stage 'head', gives \[1, .*\] of inputs \[1, .*: let it give \[batch, classes\]",
    "fails_in_training": r"fails in stage 'body' on inputs float32\[.*: TypeError: dot_general requires .*:56\)",
}


@pytest.fixture
def faulty(tmp_path):
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    return file


@pytest.mark.parametrize("name", FAILS)
def test_a_model_that_fails_says_which_where_and_what(name, tasks, tmp_path, faulty):
    flags = quick(tasks, tmp_path, model=f"{faulty}:{name}", strategies=("full",))
    with pytest.raises(InputError) as refused:
        transfer.run(**{flag: value for flag, value in flags.items() if flag != "hidden"})
    text = str(refused.value)
    assert text.startswith(f"model '{faulty}:{name}'") and "\n" not in text
    assert re.search(FAILS[name], text), text


def test_the_options_of_a_model_that_fails_are_in_its_line(faulty):
    model = models.build(f"{faulty}:reshapes:heads=5", 3, hidden=(), activation="relu")
    with pytest.raises(InputError, match=re.escape(f"model '{faulty}:reshapes:heads=5' fails in stage 'block_0'")):
        models.abstract(model, (5,))


@pytest.mark.parametrize(
    "program", ["pretrain", "transfer", "check", "compare", "search", "zoo", "features", "predict", "export", "rank"]
)
def test_every_program_says_so_in_a_line(program, tasks, tmp_path, faulty, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "w.npz", **{"head.bias": rng.normal(size=4).astype(np.float32)})
    (tmp_path / "w.npz.json").write_text(json.dumps({"task": "digits", "classes": list("0123"), "shape": [6, 6, 1]}))
    model, workdir = f"--model={faulty}:reshapes", f"--workdir={tmp_path / 'w'}"
    source, target = f"--source={tasks / 'digits.npz'}", f"--target={tasks / 'clothes.npz'}"
    weights, output = f"{tmp_path / 'w.npz'}", f"--output={tmp_path / 'out'}"
    flags = {
        "pretrain": [source, workdir],
        "transfer": [f"--source_checkpoint={weights}", target, workdir],
        "check": ["--strategy=full"],
        "compare": [source, target, workdir],
        "search": [source, target, workdir, "--trials=1", "--per_strategy", "--space=learning_rate:in:0.1,0.2"],
        "zoo": [f"--zoo={tasks / 'digits.npz'}", workdir],
        "features": [f"--source_checkpoint={weights}", f"--dataset={tasks / 'clothes.npz'}", output],
        "predict": [f"--checkpoint={weights}", f"--images={tasks / 'clothes.npz'}", f"{output}.csv"],
        "export": [f"--checkpoint={weights}", f"{output}.safetensors"],
        "rank": [f"--sources={weights}", target, workdir],
    }
    module = importlib.import_module(f"experiments.{program}")
    with pytest.raises(SystemExit) as ended:
        process.run_main(module.main, [program, model, *flags[program]])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1
    assert f"model '{faulty}:reshapes' fails in stage 'block_0'" in error and "cannot reshape" in error, error


def test_paths_in_a_flagfile_are_found_from_its_folder(tasks, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for place in (folder / "data", folder / "run", elsewhere):
        place.mkdir(parents=True)
    for name in ("a.npz", "b.npz"):
        (folder / "data" / name).write_bytes((tasks / "digits.npz").read_bytes())
    (folder / "mine.py").write_text(MINE)
    flags = "--source=data/a.npz:labels=0-2\n--target=data/b.npz\n--strategies=full,A=mine.py:strategy,mine.py:broken\n"
    (folder / "x.flags").write_text(flags + "--source_checkpoint=run\n--workdir=run\n--head=copy\n")
    (folder / "copy").mkdir()  # a word is no path
    monkeypatch.chdir(elsewhere)
    values = parse_flags(["transfer", "--flagfile=../project/x.flags"])
    at = "../project/"
    assert values["source"] == f"{at}data/a.npz:labels=0-2" and values["target"] == f"{at}data/b.npz"
    assert values["strategies"] == ("full", f"A={at}mine.py:strategy", f"{at}mine.py:broken")
    assert values["source_checkpoint"] == f"{at}run" and values["workdir"] == "run" and values["head"] == "copy"
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / "b.npz").write_bytes(b"")
    assert parse_flags(["transfer", "--flagfile=../project/x.flags"])["target"] == "data/b.npz"
    assert parse_flags(["transfer", "--target=data/a.npz"])["target"] == "data/a.npz"  # no flagfile, no search


def test_a_caption_says_once_what_a_page_repeats():
    notes = ["untuned: every strategy has the same hyper-parameters", "one " * 30, "two " * 30]
    body = "Means over seeds, ranges below them; differences are paired by seed and so on and on."
    block = pages.Block(body + pages.sentences(notes))
    first, second = pages.brief([pages.Section("A", "a", [block, block]), pages.Section("B", "b", [block])], notes)
    assert first.blocks[0].caption == block.caption
    assert first.blocks[1].caption == f"As above. {notes[0]}. Further notes are at the first table."
    assert second.blocks[0].caption == f"{body} {notes[0]}. Further notes are at the first table."
    short = pages.Block("Short." + pages.sentences(notes[:1]))
    assert pages.brief([pages.Section("A", "a", [short, short])], notes[:1])[0].blocks == [short, short]


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.036), (0.02, 0.0212), (1e-4, 1.0), (0.9, 1.1)])
def test_the_axes_of_a_search_have_numbers(low, high):
    trials = [
        studies.TrialRecord(
            *(i, "COMPLETE", 0.5, 0.5 + 0.01 * i, 1.0 - 0.01 * i, False),
            owner="p",
            begin="2026-11-23T08:00:00",
            end="2026-11-23T08:00:01",
            values={"learning_rate": float(rate)},
        )
        for i, rate in enumerate(np.geomspace(low, high, 4))
    ]
    with figures.style():
        figure, _ = figures.searched_values("full", trials, "learning_rate", "accuracy", log=True) or pytest.fail()
        figure.canvas.draw()
        axes = figure.axes[0]
        left, right = axes.get_xlim()
        texts = [label.get_text() for label in axes.get_xticklabels()]
        seen = [text for text, at in zip(texts, axes.get_xticks(), strict=True) if left <= at <= right and text]
    assert len(seen) >= 2 and len(set(seen)) == len(seen)


def test_no_label_of_a_search_is_cut():
    name = "a_strategy_with_a_long_name:option_one=0.001:option_two=attention:option_three=12, 5/class"
    with figures.style():
        figure, axes = figures._chart([name], name)
        axes.plot([0, 1], [0, 1], label=figures._wrapped(name))
        figures._legend(figure)
        figure.canvas.draw()
        edge = figure.bbox
        box = axes.title.get_window_extent()
    assert edge.x0 <= box.x0 and box.x1 <= edge.x1
    assert "\N{HORIZONTAL ELLIPSIS}" not in axes.title.get_text() + figures._wrapped(name)


def test_a_group_says_how_many_of_the_fits_it_is(tasks, tmp_path, capsys):
    transfer.run(**quick(tasks, tmp_path, seeds=(0, 1), strategies=("scratch", "full", "head_only")))
    groups = re.findall(r"(?m)^(.*): (\d) of the 6 fits, trained by themselves$", capsys.readouterr().out)
    assert sum(int(count) for _, count in groups) == 6 and {
        name for names, _ in groups for name in names.split(", ")
    } == {*("scratch", "full", "head_only")}


@pytest.fixture
def searched(tasks, tmp_path):
    """A run directory with winners as a search leaves them: 4 steps each, at rates of their own."""
    place = tmp_path / "searched"
    (place / "best").mkdir(parents=True)
    for strategy, rate in (("scratch", 0.3), ("full", 0.05)):
        flags = quick(tasks, tmp_path, strategies=(strategy,), learning_rate=rate)
        lines = Settings.from_flags(**flags).flagfile_lines()
        (place / "best" / f"{strategy}-all.flags").write_text("\n".join(lines) + "\n")
    return place


def compared(tasks, searched, workdir, *more):
    data = [f"--source={tasks / 'digits.npz'}", f"--target={tasks / 'clothes.npz'}", "--strategies=full"]
    compare.main(["compare", *data, f"--tuned={searched}", f"--workdir={workdir}", "--nolonger_scratch", *more])


@pytest.mark.parametrize(
    ("flag", "there"),
    [
        ("--steps=50", "4"),
        ("--learning_rate=0.05", "0.3"),  # that of full's winner, not of scratch's
        ("--hidden=16", "8"),
        ("--source_epochs=7", "2"),
        ("--source_steps=7", "4"),
    ],
)
def test_a_flag_of_the_fit_that_a_search_overrides_is_refused(flag, there, tasks, searched, tmp_path):
    text = f"{flag} here, {there} in the search {searched}, for scratch at all: leave it out"
    with pytest.raises(InputError, match=re.escape(text)):
        compared(tasks, searched, tmp_path / "w", flag)
    assert not (tmp_path / "w").exists()


def test_steps_are_no_flag_of_a_search_that_counted_epochs(tasks, searched, tmp_path):
    for file in (searched / "best").iterdir():
        lines = [line for line in file.read_text().splitlines() if "steps" not in line]
        file.write_text("\n".join(lines))
    with pytest.raises(InputError, match="--steps=50 here, not given in the search"):
        compared(tasks, searched, tmp_path / "w", "--steps=50")


@pytest.mark.slow
def test_a_tuned_comparison_says_whose_its_flags_are_and_gives_itself_again(tasks, searched, tmp_path, capsys):
    """Flags that a flagfile gives are not used, which is said; its own flagfile holds none that say something else."""
    shared = tmp_path / "shared.flags"
    shared.write_text("--steps=50\n--batch_size=20\n")
    compared(tasks, searched, tmp_path / "dry", f"--flagfile={shared}", "--dry_run")
    whose = f"all flags of a fit, --hidden, --activation and --head come from the search {searched}"
    assert f"{whose}, for each strategy its own; of the flagfile not used: --steps=50\n" in capsys.readouterr().out
    compared(tasks, searched, tmp_path / "w", "--steps=4")  # that of the search
    assert f"{whose}, for each strategy its own\n" in capsys.readouterr().out
    file = tmp_path / "w" / "flags.flags"
    assert not {"steps", "learning_rate", "hidden", "source_epochs"} & parse_flags(["", *_shared_lines(file)]).keys()
    compare.main(["compare", f"--flagfile={file}", f"--workdir={tmp_path / 'again'}"])
    first, again = ([line.key for line in directory.results(tmp_path / name)] for name in ("w", "again"))
    assert first == again and len(first) == 4  # a source beside each of the two
    assert (tmp_path / "again" / "flags.flags").read_bytes() == file.read_bytes()
    # A flagfile of before has the flags that were not used.
    text = directory.flags_text(file) + "--steps=50\n"
    file.write_text(directory.signed(text))
    compared(tasks, searched, tmp_path / "w")
    assert "steps" not in parse_flags(["", *_shared_lines(file)])


def _shared_lines(file):
    """The lines of a comparison's flagfile that transfer has too."""
    lines = directory.flags_text(file).splitlines()
    return [line for line in lines if line.startswith("--") and line[2:].partition("=")[0] in FLAGS]


@pytest.mark.slow
def test_an_edit_of_a_model_is_said_where_its_sources_are_trained_and_where_they_are_taken(
    tasks, tmp_path, monkeypatch, capsys
):
    """Two sources of one seed, of the file before and after a comment: the later is taken, and both are named."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "blocks.py"
    file.write_text(BLOCKS)
    learnt = {"source": str(tasks / "digits.npz"), "model": "blocks.py:model", "steps": 4, "points": 1}
    [first] = pretrain.run(**learnt, workdir="pre")
    file.write_text(f"{BLOCKS}# a comment\n")
    [second] = pretrain.run(**learnt, workdir="pre")
    out = capsys.readouterr().out
    assert "1 earlier fit is of other code than now, of a strategy or model: kept in 'pre'" in out and first.name in out
    used = {"source_checkpoint": "pre", "target": str(tasks / "clothes.npz"), "steps": 4, "points": 1, "dry_run": True}
    transfer.run(**used, model="blocks.py:model")
    out = capsys.readouterr().out
    assert f"seed 0 in pre, '{second.name}' is taken; '{first.name}' is of code that was changed later" in out
    assert "so it is used" not in out
    (tmp_path / "other" / "copy.py").write_text(file.read_text())
    transfer.run(**used, model="other/copy.py:model")  # the same code under another path
    assert "so it is used" not in capsys.readouterr().out
    file.write_text(f"{BLOCKS}# another comment\n")
    transfer.run(**used, model="blocks.py:model")
    note = "blocks.py changed since pre was trained; the paths and shapes of its parameters are the same, so it is used"
    assert note in capsys.readouterr().out
    transfer.run(**used, model="blocks.py:model", hidden=(16,))
    note = "blocks.py changed since pre was trained; --hidden is 16 here and was 512 when pre was trained; the paths"
    assert note in capsys.readouterr().out


def test_a_program_runs_from_the_folder_that_holds_the_checkout(tmp_path):
    """Where ./tljax is a folder without __init__.py, and the checkout is found by an editable install's finder."""
    (tmp_path / "tljax" / "tljax").mkdir(parents=True)
    checkout = Path(__file__).parent.parent
    path = [p for p in sys.path if p and Path(p).resolve() != checkout and "__editable__" not in p]
    finder = (
        "import importlib.util, runpy, sys\n"
        f"sys.path[:] = [{str(tmp_path)!r}, *{path!r}]\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name in ('experiments', 'tljax'):\n"
        f"            place = {str(checkout)!r} + '/' + name\n"
        "            return importlib.util.spec_from_file_location(name, place + '/__init__.py', "
        "submodule_search_locations=[place])\n"
        "sys.meta_path.append(Finder)\n"
        "sys.argv = ['experiments.check', '--help']\n"
        "runpy.run_module('experiments.check', run_name='__main__', alter_sys=True)\n"
    )
    alone = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    command_line = [sys.executable, "-c", finder]
    done = subprocess.run(command_line, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0 and "strategy" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_is_had_again_from_another_folder(tasks, tmp_path, monkeypatch, capsys):
    """Its flagfile says from where its paths are, a strategy's file, a model's and a data set's; so do checkpoints."""
    for name in ("project", "code", "deep/er"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "code" / "mine.py").write_text(MINE)
    (tmp_path / "code" / "blocks.py").write_text(BLOCKS)
    (tmp_path / "project" / "data.npz").write_bytes((tasks / "digits.npz").read_bytes())
    monkeypatch.chdir(tmp_path / "project")
    common = ["--source=data.npz", "--model=../code/blocks.py:model", "--steps=4", "--points=1"]
    pretrain.main(["pretrain", *common, "--workdir=../runs/pre"])
    common += ["--target=data.npz:invert", "--strategies=../code/mine.py:strategy:k=2"]
    transfer.main(["transfer", *common, "--workdir=../runs/tr"])
    file = tmp_path / "runs" / "tr" / "flags.flags"
    assert f"\n# paths are from {tmp_path / 'project'}\n" in file.read_text()
    assert str(tmp_path / "project") not in (file.parent / "report.html").read_text()
    before = file.read_bytes()
    transfer.main(["transfer", f"--flagfile={file}", "--workdir=../runs/tr"])  # from where it began nothing changes
    assert file.read_bytes() == before and len(directory.results(file.parent)) == 3
    monkeypatch.chdir(tmp_path / "deep" / "er")
    transfer.main(["transfer", "--flagfile=../../runs/tr/flags.flags", "--workdir=again"])
    first, again = (directory.results(place) for place in (file.parent, Path("again")))
    assert [line.test_loss for line in first] == [line.test_loss for line in again]
    pictures = f"--images={tasks / 'digits.npz'}"
    predict.main(["predict", "--checkpoint=../../runs/pre", pictures, "--output=p.csv"])
    [place] = (tmp_path / "runs" / "pre" / "checkpoints").iterdir()
    predict.main(["predict", f"--checkpoint={place}", pictures, "--output=q.csv"])
    assert Path("p.csv").read_text() == Path("q.csv").read_text()
    (tmp_path / "code").rename(tmp_path / "gone")
    began = re.escape(f"'{tmp_path / 'project'}'")
    with pytest.raises(
        InputError, match=rf"mine.py' does not exist.*working directory, from '../../runs/tr', from {began}\)"
    ):
        transfer.main(["transfer", "--flagfile=../../runs/tr/flags.flags", "--workdir=more"])
    with pytest.raises(
        InputError, match=rf"'../code/blocks.py', which is not there from the working directory, nor from {began}"
    ):
        predict.main(["predict", "--checkpoint=../../runs/pre", pictures, "--output=r.csv"])


def test_the_flags_of_a_winner_run_from_another_folder(tasks, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path / "project")
    common = command(tasks, tmp_path, hidden=(8,), steps=4, points=1, seeds=(0,), strategies=("mine.py:strategy",))
    search.main(["search", *common, "--space=learning_rate:in:0.1,0.2", "--trials=1"])
    monkeypatch.chdir(tmp_path)
    assert parse_flags(["", "--flagfile=w/best.flags"])["strategies"] == (f"{tmp_path}/project/mine.py:strategy",)
    monkeypatch.chdir(tmp_path / "w")  # where the flagfile has no folder of its own
    assert parse_flags(["", "--flagfile=best.flags"])["strategies"] == (f"{tmp_path}/project/mine.py:strategy",)


def test_weights_find_the_file_of_their_model_beside_them(tmp_path, monkeypatch):
    (tmp_path / "blocks.py").write_text(BLOCKS)
    assert sources._model_file("blocks.py:model", tmp_path / "net.safetensors") == f"{tmp_path}/blocks.py:model"
    with pytest.raises(InputError, match=f"not there from the working directory, nor from '{tmp_path}': give its file"):
        sources._model_file("other.py:model", tmp_path / "net.safetensors")


def test_scratch_is_said_to_be_added_once_all_is_well(tasks, tmp_path, capsys):
    with pytest.raises(InputError, match="needs the source's Fisher information"):
        transfer.run(**quick(tasks, tmp_path, strategies=("full",), penalty="ewc:weight=1", source_penalty=""))
    assert "scratch is added" not in capsys.readouterr().out
    transfer.run(**quick(tasks, tmp_path, strategies=("full",), dry_run=True))
    assert "scratch is added" in capsys.readouterr().out


def test_another_experiment_is_told_by_the_flags_that_were_given(tmp_path):
    """A twin that follows its flag is no second difference, and means nothing where the source is trained."""
    flags = {"source": "mnist_10k", "learning_rate": 0.1, "steps": 4}
    for source in ({}, {"source": None, "source_checkpoint": "runs/pre"}):
        place = tmp_path / f"w{len(source)}"
        with directory.opened(Settings.from_flags(**flags | source, workdir=str(place)), "transfer"):
            pass
        changed = Settings.from_flags(**flags | source | {"learning_rate": 0.2, "steps": 5}, workdir=str(place))
        text = r"experiment \(--learning_rate=0.1 there, 0.2 here; --steps=4 there, 5 here\)"
        with pytest.raises(InputError, match=text), directory.opened(changed, "transfer"):
            pass
        twin = Settings.from_flags(**flags | source, source_steps=9, workdir=str(place))
        if source:
            with directory.opened(twin, "transfer"):
                pass
        else:
            with (
                pytest.raises(InputError, match=r"experiment \(--source_steps=4 there, 9 here\)"),
                directory.opened(twin, "transfer"),
            ):
                pass


def test_one_seed_has_no_range(tasks, tmp_path, capsys):
    transfer.run(**quick(tasks, tmp_path, strategies=("scratch", "full")))
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith(" full ")]
    assert "[" not in row and re.search(r"own test accuracy [0-9.]+ %\n", out)
    assert tables.span([82.15, 82.15]) == "82.15" and tables.span([0.0, 1.0]) == "0.00 to 1.00"


def test_fits_that_share_a_device_say_why():
    text = vectorize.describe(4, 4, 4, None, "map")
    assert text == "4 fits, one after another on one device: those of one order of examples share a device"
    assert vectorize.describe(4, 4, 1, None, "map") == "4 fits, one after another on one device"


def test_the_text_beside_a_picture_folds_repeated_blocks():
    leaves = [(f"block_{i}/Dense_{j}/{leaf}", 8, 8) for i in range(12) for j in (0, 1) for leaf in ("bias", "kernel")]
    _, alt = figures.trained_shares({"full": [*leaves, ("head/bias", 2, 2)]})
    assert "(386 of 386: block_{0..11}/Dense_{0,1}/bias, block_{0..11}/Dense_{0,1}/kernel, head/bias)" in alt
    _, alt = figures.trained_shares({"full": [(f"{letter}/kernel", 8, 8) for letter in "abcdefghijklmnopq"]})
    assert alt.endswith("l/kernel and 5 more).") and len(alt) < 300


def test_the_first_trials_of_every_study_are_the_same_draws():
    ranges = spaces.read(["learning_rate:log:1e-3:1"])
    drawn = [
        [trial.chosen for trial in studies.ask(studies.opened(name, None, "TPE", "Nop", 0, 60.0, {}), ranges, 4, 4)]
        for name in ("search/scratch/all", "search/full/all")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4


def test_a_stage_without_parameters_is_drawn_anew_and_named_beside_others(tmp_path: Path) -> None:
    """scratch draws every stage anew, and last_k names the last ones: those that can hold a leaf."""
    file = tmp_path / "joined.py"
    file.write_text(
        "import flax.linen as nn\n"
        "from tljax.models.linen import flat, stage\n"
        "from tljax.types import Stage\n\n"
        "def model(num_outputs):\n"
        "    join = Stage('join', lambda key, x: {}, lambda params, x, *, key=None: x)\n"
        "    hidden = stage('hidden', nn.Dense(4), before=flat, after=nn.relu)\n"
        "    return join, hidden, stage('drop', nn.Dropout(0.1)), stage('head', nn.Dense(num_outputs))\n"
    )
    stages = models.build(f"{file}:model", 3, hidden=(), activation="relu")
    params = models.init(stages, jax.random.key(0), (5,))
    names = models.names(stages)
    for text in ("scratch", "last_k:k=2", "gradual_unfreeze", "bottom_up"):
        method, options = plugins.method(text)
        start = initialization.start(method, options, Initialization(names, params, params, jax.random.key(1)))
        assert {path for path, trains in paths.items(start.phases[-1][1]) if trains} >= {"head/bias", "head/kernel"}
        if text == "last_k:k=2":
            assert all(trains for _, trains in paths.items(start.phases[0][1]))
