"""The programs, end to end on small data: what they print, leave behind, reuse and refuse."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pretrain, transfer
from experiments.pages import figures
from experiments.runs import directory, fit, metrics, process
from experiments.runs.settings import Settings, parse_flags
from tljax import checkpoint
from tljax.study.results import Result, from_json, to_json
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

MINE = '''"""Train the first stage's biases, and what is new."""

from tljax import masks


def strategy(params, context):
    mask = masks.by_path(params, lambda path: path == "hidden_0/bias")
    return masks.union(mask, context.fresh)
'''


def write_task(file: Path, seed: int, classes: int, names: list[str] | None = None) -> None:
    """A task that can be learnt: a class is a bright column."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in (("train", 120), ("test", 40)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 100, (count, 6, 6)).astype(np.uint8)
        images[np.arange(count), :, labels] += 120
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(file, **arrays, **({"class_names": np.array(names)} if names else {}))


def arguments(tasks, workdir, **flags):
    values = {
        "source": str(tasks / "digits.npz"),
        "target": str(tasks / "clothes.npz"),
        "hidden": (8,),
        "batch_size": 20,
        "epochs": 2,
        "learning_rate": 0.1,
        "seeds": (0, 1),
        "strategies": ("scratch", "full", "head_only", "bias_only"),
        "workdir": workdir and str(workdir),
    }
    return {name: value for name, value in (values | flags).items() if value is not None}


def command(tasks, folder, **flags):
    """The same as a command line."""
    values = arguments(tasks, **{"workdir": folder / "w", **flags})
    return [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in values.items()]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def results(workdir: Path, without=("seconds", "peak_bytes")) -> list[Result]:
    """The lines of a run directory, unchecked and less what two runs may differ in."""
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    return [from_json({name: value for name, value in line.items() if name not in without}) for line in lines]


def parameters(workdir: Path, line: Result) -> checkpoint.Flat:
    return checkpoint.load(workdir / line.checkpoint)[0][line.name]


def test_a_fit_says_how_sure_and_how_right_it_is(finished):
    """The bins of its line are those of its predictions, and the picture of calibration is drawn from them."""
    folder, lines = finished
    for line in lines:
        with np.load(folder / line.predictions) as kept:
            confidence = kept["probabilities"].max(1)
            right = kept["probabilities"].argmax(1) == kept["labels"]
        bins = line.calibration
        assert sum(bins["count"]) == len(right)
        for name, whole in (("accuracy", right), ("confidence", confidence)):
            pooled = sum(n * mean for n, mean in zip(bins["count"], bins[name], strict=True) if n)
            np.testing.assert_allclose(pooled, whole.sum(), rtol=1e-5)
    fits = [line for line in lines if line.train_examples == max(line.train_examples for line in lines)]
    members = {name: [fit for fit in fits if fit.strategy == name] for name in {fit.strategy for fit in fits}}
    picture = figures.reliability(members, "", figures.strokes(list(members)))
    assert picture and len(picture[0].axes[0].lines) == 1 + len(members)


def test_a_run_leaves_the_directory_that_the_design_names(finished):
    workdir, lines = finished
    names = {file.name for file in workdir.iterdir()} - {".lock"}
    assert names == {
        "flags.flags",
        "environment.json",
        "times.jsonl",
        "results.jsonl",
        "metrics",
        "checkpoints",
        "predictions",
        "masks",
        "report.html",
    }
    assert len(lines) == 8 and len(results(workdir)) == 8 + 2
    fields = {"source", "target", "strategy", "options", "seed", "train_examples", "test_accuracy", "test_loss"}
    fields |= {"train_loss", "steps", "trained_parameters", "total_parameters", "seconds", "predictions"}
    assert all(fields <= to_json(line).keys() for line in lines)


def test_predictions_give_the_accuracy_and_loss_of_the_line(finished):
    workdir, lines = finished
    for line in lines:
        with np.load(workdir / line.predictions, allow_pickle=False) as file:
            p, labels = file["probabilities"], file["labels"]
        assert (p.argmax(1) == labels).mean() == pytest.approx(line.test_accuracy, abs=1e-12)
        assert -np.log(p[np.arange(len(labels)), labels]).mean() == pytest.approx(line.test_loss, rel=1e-5)


def test_frozen_leaves_are_byte_identical_to_the_source_after_the_fit(finished):
    """With weight decay and clipping on."""
    workdir, lines = finished
    sources = {line.seed: parameters(workdir, line) for line in results(workdir) if line.strategy == "pretrain"}
    for line in lines:
        after, source = parameters(workdir, line), sources[line.seed]
        same = {path for path in source if after[path].tobytes() == source[path].tobytes()}
        expected = {"head_only": {"hidden_0/kernel", "hidden_0/bias"}, "bias_only": {"hidden_0/kernel"}}
        assert same == expected.get(line.strategy, set())


def test_strategies_under_one_seed_share_the_new_head_and_the_order(tasks, tmp_path):
    """With a rate of zero, what is left is the draw."""
    lines = transfer.run(**arguments(tasks, tmp_path / "w", learning_rate=0.0, source_learning_rate=0.1))
    heads = {line.strategy: parameters(tmp_path / "w", line)["head/kernel"] for line in lines if line.seed == 0}
    for strategy in ("full", "head_only", "bias_only"):
        np.testing.assert_array_equal(heads[strategy], heads["scratch"])


def test_a_finished_run_trains_nothing_and_prints_the_same_table(finished, tasks, capsys, monkeypatch):
    workdir, _ = finished
    transfer.run(**arguments(tasks, workdir, weight_decay=0.01, clip=1.0))
    first, before = capsys.readouterr().out, snapshot(workdir)
    monkeypatch.setattr("tljax.train.fit", lambda *_, **__: pytest.fail("it trains"))
    transfer.run(**arguments(tasks, workdir, weight_decay=0.01, clip=1.0))
    assert capsys.readouterr().out == first
    after = snapshot(workdir)
    assert {name for name in before if before[name] != after[name]} <= {".lock"}


@pytest.mark.slow
def test_the_flagfile_in_a_new_workdir_gives_the_same_results_to_the_bit(finished, tmp_path):
    workdir, _ = finished
    transfer.main(["transfer", f"--flagfile={workdir / 'flags.flags'}", f"--workdir={tmp_path / 'again'}"])
    assert results(tmp_path / "again") == results(workdir)
    for line in results(workdir):
        assert (tmp_path / "again" / line.predictions).read_bytes() == (workdir / line.predictions).read_bytes()


def test_lists_may_grow_and_only_what_is_new_is_trained(tasks, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    before = transfer.run(**arguments(tasks, workdir, strategies=("scratch", "full")))
    trained = []
    run = fit.train_groups
    monkeypatch.setattr(
        "experiments.runs.fit.train_groups", lambda field, fits, *rest: (trained.extend(fits), run(field, fits, *rest))
    )
    after = transfer.run(**arguments(tasks, workdir, strategies=("scratch", "full", "last_k:k=1"), seeds=(0, 1, 2)))
    names = sorted((f.result.strategy, f.result.seed) for f in trained)
    assert names == [("full", 2), ("last_k", 0), ("last_k", 1), ("last_k", 2), ("pretrain", 2), ("scratch", 2)]
    assert [line for line in after if line.key in {b.key for b in before}] == before
    text = (workdir / "flags.flags").read_text()
    assert "--seeds=0,1,2\n" in text and "--strategies=scratch,full,last_k:k=1\n" in text


@pytest.mark.slow
def test_what_a_fit_is_does_not_depend_on_what_else_runs(tasks, finished, tmp_path):
    _, lines = finished
    alone = transfer.run(
        **arguments(tasks, tmp_path / "w", weight_decay=0.01, clip=1.0, seeds=(1,), strategies=("full",))
    )
    expected = next(line for line in lines if line.strategy == "full" and line.seed == 1)
    got = next(line for line in alone if line.strategy == "full")
    assert replace(got, seconds=0.0, checkpoint="") == replace(expected, seconds=0.0, checkpoint="")


def test_scratch_is_added_aloud(tasks, tmp_path, capsys):
    lines = transfer.run(**arguments(tasks, tmp_path / "w", strategies=("head_only",), seeds=(0,)))
    assert [line.strategy for line in lines] == ["scratch", "head_only"]
    assert "scratch is added" in capsys.readouterr().out


@pytest.mark.slow
def test_a_strategy_outside_the_project_runs_and_its_edit_trains_again(tasks, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    flags = arguments(tasks, tmp_path / "w", strategies=("scratch", f"{file}:strategy"), seeds=(0,))
    line = transfer.run(**flags)[1]
    assert line.strategy == f"{file}:strategy" and line.trained_parameters == 8 + 8 * 3 + 3
    file.write_text(MINE.replace("hidden_0/bias", "hidden_0/kernel"))
    assert transfer.run(**flags)[1].trained_parameters == 36 * 8 + 8 * 3 + 3
    assert len(results(tmp_path / "w")) == 4


def test_a_strategy_that_freezes_the_new_head_is_refused(tasks, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("masks.union(mask, context.fresh)", "mask"))
    with pytest.raises(InputError, match="freezes 'head/bias', 'head/kernel', which was drawn anew"):
        transfer.run(**arguments(tasks, tmp_path / "w", strategies=(str(file),)))


ADAPTER = '''"""Add a scale to the first stage's outputs and train it with the head."""

import jax.numpy as jnp

from tljax import masks


def adapt(params, key):
    return {**params, "hidden_0": {**params["hidden_0"], "scale": jnp.ones(8)}}


def merge(params):
    stage = dict(params["hidden_0"])
    scale = stage.pop("scale")
    return {**params, "hidden_0": {"kernel": stage["kernel"] * scale[None], "bias": stage["bias"] * scale}}


def strategy(params, context):
    return masks.union(masks.under(params, "head"), context.fresh)
'''


def test_a_strategy_may_add_leaves_and_merge_them(tasks, tmp_path):
    file = tmp_path / "adapter.py"
    file.write_text(ADAPTER)
    line = transfer.run(**arguments(tasks, tmp_path / "w", strategies=(str(file),), seeds=(0,)))[1]
    assert line.trained_parameters == 8 + 8 * 3 + 3
    assert not np.array_equal(parameters(tmp_path / "w", line)["hidden_0/scale"], np.ones(8))


@pytest.mark.parametrize("head", ["auto", "copy", "fresh", "zero"])
def test_the_head_is_copied_only_when_asked_or_when_the_classes_are_the_same(tasks, tmp_path, head):
    """With a rate of zero, what is left is the graft."""
    flags = {"target": str(tasks / "same.npz"), "head": head, "learning_rate": 0.0, "source_learning_rate": 0.1}
    line = transfer.run(**arguments(tasks, tmp_path / "w", seeds=(0,), strategies=("full",), **flags))[1]
    source = next(line for line in results(tmp_path / "w") if line.strategy == "pretrain")
    kernel, original = (
        parameters(tmp_path / "w", line)["head/kernel"],
        parameters(tmp_path / "w", source)["head/kernel"],
    )
    assert np.array_equal(kernel, original) == (head in ("auto", "copy"))
    assert (not kernel.any()) == (head == "zero")


def test_a_pretrained_checkpoint_serves_as_the_source(tasks, tmp_path):
    source = arguments(tasks, tmp_path / "s", target=None, strategies=None)
    lines = pretrain.run(**source)
    by_run = transfer.run(**arguments(tasks, tmp_path / "a", source=None, source_checkpoint=str(tmp_path / "s")))
    folder = str(tmp_path / "s" / lines[0].checkpoint)
    by_folder = transfer.run(**arguments(tasks, tmp_path / "b", source=None, source_checkpoint=folder))
    direct = transfer.run(**arguments(tasks, tmp_path / "c"))
    accuracies = [[line.test_loss for line in run] for run in (by_run, by_folder, direct)]
    assert accuracies[0] == accuracies[1] == accuracies[2]


def test_label_budgets_are_balanced_rows_of_the_table(tasks, tmp_path, capsys):
    flags = arguments(tasks, tmp_path / "w", train_examples=("30", "all"), steps=5, seeds=(0,), strategies=("full",))
    lines = transfer.run(**flags)
    assert [(line.strategy, line.train_examples) for line in lines] == [
        ("scratch", 30),
        ("scratch", 120),
        ("full", 30),
        ("full", 120),
    ]


def test_validation_examples_are_held_out_and_reported(tasks, tmp_path):
    flags = arguments(tasks, tmp_path / "w", validation=0.25, seeds=(0,), strategies=("full",))
    lines = transfer.run(**flags)
    assert all(0 <= line.validation_accuracy <= 1 for line in lines)
    assert lines[0].steps == 2 * -(-90 // 20)


def test_a_fit_that_diverges_is_marked_and_the_run_goes_on(tasks, tmp_path, capsys):
    flags = arguments(tasks, tmp_path / "w", learning_rate=1e30, source_learning_rate=0.1, seeds=(0,))
    lines = transfer.run(**flags)
    assert any(line.diverged and line.test_accuracy is None for line in lines)
    assert "diverged" in capsys.readouterr().out


def test_a_dry_run_prints_the_graft_and_the_mask_and_writes_nothing(tasks, tmp_path, capsys):
    assert transfer.run(**arguments(tasks, tmp_path / "w", dry_run=True)) == []
    text = capsys.readouterr().out
    for word in ("head_only: graft", "copied", "drawn anew", "dropped", "frozen", "36x8", "27 of 323 numbers train"):
        assert word in text
    assert not (tmp_path / "w").exists()


def test_tensorboard_events_hold_the_curves(finished):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    workdir, lines = finished
    [file] = (workdir / "metrics" / lines[0].name).glob("events*")
    raw, tags = file.read_bytes(), set()
    while raw:
        length = int.from_bytes(raw[:8], "little")
        assert masked_crc32c(raw[12 : 12 + length]) == int.from_bytes(raw[12 + length : 16 + length], "little")
        event = Event.FromString(raw[12 : 12 + length])
        tags |= {(value.tag, event.step) for value in event.summary.value}
        raw = raw[16 + length :]
    assert {("accuracy", 6), ("accuracy", 12), ("train_loss", 12)} <= tags


def test_a_run_that_was_killed_before_its_results_goes_on(tasks, finished, tmp_path):
    workdir, lines = finished
    shutil.copytree(workdir, tmp_path / "w")
    text = (tmp_path / "w" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "w" / "results.jsonl").write_text("".join(text[:4]))
    flags = parse_flags(["transfer", f"--flagfile={workdir / 'flags.flags'}", f"--workdir={tmp_path / 'w'}"])
    again = transfer.run(**flags)
    assert [line.test_loss for line in again] == [line.test_loss for line in lines]


def test_a_second_process_in_one_workdir_is_refused(tasks, tmp_path):
    settings = Settings.from_flags(**arguments(tasks, tmp_path / "w"))
    with directory.opened(settings, "transfer"), pytest.raises(InputError, match="is in use by process"):
        transfer.run(**arguments(tasks, tmp_path / "w"))


@pytest.mark.slow
def test_a_shell_sees_one_line_and_exit_code_1(tasks, tmp_path):
    line = [sys.executable, "-m", "experiments.transfer", "--sedes=1"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: unknown flag --sedes: did you mean --seeds?\n"


@pytest.mark.slow
def test_phases_begin_where_it_is_printed_and_both_masks_are_kept(tasks, tmp_path, capsys):
    flags = arguments(tasks, tmp_path / "w", strategies=("lp_ft:start=0.4",), seeds=(0,), epochs=3, optimizer="adam")
    line = transfer.run(**flags)[1]
    assert "lp_ft:start=0.4: phases begin at the steps 0, 7" in capsys.readouterr().out
    assert line.phase_steps == [0, 7] and line.trained_parameters == line.total_parameters
    first, second = sorted((tmp_path / "w" / "masks").glob(f"{line.name}-phase*.json"))
    assert '"hidden_0/bias": false' in first.read_text() and "false" not in second.read_text()


@pytest.mark.slow
def test_phases_begin_at_their_fraction_whatever_points_the_curves_have(tasks, tmp_path):
    """0.25 of 40 steps is step 10, a point of four but not of ten; the curves have their own points."""
    flags = {"strategies": ("lp_ft:start=0.25",), "seeds": (0,), "steps": 40, "optimizer": "adam"}
    params_by_points = {}
    for points in (4, 10):
        run = tmp_path / str(points)
        line = transfer.run(**arguments(tasks, run, **flags, points=points))[1]
        assert line.phase_steps == [0, 10]
        params_by_points[points] = parameters(run, line), metrics.curves(run, line.name)
    assert all((params_by_points[4][0][path] == leaf).all() for path, leaf in params_by_points[10][0].items())
    assert params_by_points[10][1]["step"].tolist() == [4 * (i + 1) for i in range(10)]
    assert params_by_points[4][1]["step"].tolist() == [10, 20, 30, 40]
    shared = [
        params_by_points[points][1]["accuracy"][params_by_points[points][1]["step"].tolist().index(20)]
        for points in (4, 10)
    ]
    assert shared[0] == shared[1]


def test_phases_too_close_for_the_steps_are_refused(tasks, tmp_path, capsys):
    flags = {"strategies": ("bottom_up",), "epochs": None, "steps": 1}
    assert "both begin at step 0 of 1: give more steps" in refused(command(tasks, tmp_path, **flags), capsys)
    flags = {"strategies": ("lp_ft:start=0.99",), "epochs": None, "steps": 10}
    assert "the phase at 0.99 of training begins at step 10 of 10" in refused(command(tasks, tmp_path, **flags), capsys)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_dry_run_lists_what_lora_leaves_out(tasks, tmp_path, capsys):
    vit = "vit:width=8:depth=2:patch=3:heads=2"
    flags = arguments(tasks, tmp_path / "w", dry_run=True) | {"model": vit, "strategies": ["lora"]}
    transfer.run(**flags)
    shown = capsys.readouterr().out
    assert "lora: left out, and so frozen: embedding/class_token, embedding/position\n" in shown
    assert "block_{0,1}/attention/out/lora_a" in shown and "merged with their kernel" not in shown


@pytest.mark.slow
def test_data_driven_strategies_run_and_a_dry_run_says_what_they_wait_for(tasks, tmp_path, capsys):
    strategies = ("auto_rgn:phases=2", "gradient_mask:fraction=0.1", "fisher:fraction=0.1")
    flags = arguments(tasks, tmp_path / "w", strategies=strategies)
    transfer.run(**flags, dry_run=True)
    assert capsys.readouterr().out.count("depends on values") == 3
    lines = transfer.run(**flags)
    assert {line.trained_parameters for line in lines if line.strategy == "fisher"} == {30 + 27}
    assert len({line.key for line in lines}) == 8


@pytest.mark.slow
def test_ewc_uses_the_fisher_information_that_pretrain_saved(tasks, tmp_path, capsys):
    pretrain.run(**arguments(tasks, tmp_path / "s", target=None, strategies=None, save_fisher=True))
    flags = {"source": None, "source_checkpoint": str(tmp_path / "s"), "strategies": ("full",), "seeds": (0,)}
    flags |= {"penalty": "ewc:weight=1e6,l2:weight=1e-3:on=head/**", "learning_rate": 1e-4}
    line = transfer.run(**arguments(tasks, tmp_path / "w", **flags))[1]
    assert line.penalties["0_ewc"] > 0 and line.penalties["1_l2"] > 0
    total = line.penalties["0_ewc"] + line.penalties["1_l2"]
    assert line.train_penalty == pytest.approx(total, rel=1e-5)
    assert line.train_total == pytest.approx(line.train_loss + total, rel=1e-5)


def test_ewc_without_the_fisher_information_is_refused(tasks, tmp_path, capsys):
    assert "--save_fisher" in refused(command(tasks, tmp_path, penalty="ewc:weight=1"), capsys)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_norm_only_on_a_cnn_trains_its_norms_and_head(tasks, tmp_path):
    flags = arguments(tasks, tmp_path / "w", model="cnn:norm=true", strategies=("norm_only",), seeds=(0,), steps=4)
    del flags["hidden"]
    line = transfer.run(**flags)[1]
    trained = {path for path, _, part in line.leaves if part}
    assert any("norm" in path.lower() for path in trained) and {"head/bias", "head/kernel"} <= trained
    assert not any(path.startswith("conv_0/") and path.endswith("kernel") for path in trained)


@pytest.mark.slow
def test_an_edit_of_a_model_outside_the_project_trains_again(tasks, tmp_path):
    file = tmp_path / "mine.py"
    text = "from tljax.models import mlp\n\n\ndef model(classes):\n    return mlp.model(classes, hidden=(WIDTH,))\n"
    flags = arguments(tasks, tmp_path / "w", model=str(file), strategies=("full",), seeds=(0,))
    del flags["hidden"]
    for width in (4, 5):
        file.write_text(text.replace("WIDTH", str(width)))
        line = transfer.run(**flags)[1]
        assert line.total_parameters == 36 * width + width + width * 3 + 3


def test_a_strategy_cannot_change_the_parameters_it_is_shown(tasks, tmp_path):
    file = tmp_path / "mine.py"
    change = 'params["hidden_0"]["bias"] = params["hidden_0"]["bias"] + 7\n    mask'
    file.write_text(MINE.replace("mask", change, 2).replace(change, "mask", 1))
    assert "+ 7" in file.read_text()
    workdir = tmp_path / "w"
    line = transfer.run(**arguments(tasks, workdir, strategies=(str(file),), seeds=(0,), learning_rate=0.0))[1]
    assert np.abs(parameters(workdir, line)["hidden_0/bias"]).max() < 1


WRITES = """
import jax
import numpy as np

from tljax.types import Phase


def mend(params, context):
    params["hidden_0"]["bias"] = params["hidden_0"]["bias"] * 0 + 7
    context.source_params["hidden_0"]["bias"] = params["hidden_0"]["bias"]
    context.fresh["head"]["bias"] = False
    context.fresh["hidden_0"]["bias"] = True
    return {"hidden_0": {"bias": False, "kernel": False}, "head": {"bias": True, "kernel": True}}


def adapt(params, key):
    params["hidden_0"]["bias"] = params["hidden_0"]["bias"] * 0 + 7
    return {**params, "hidden_0": dict(params["hidden_0"], bias=params["hidden_0"]["bias"] * 0)}


def strategy(params, context):
    return [Phase(0.0, mend(params, context)), Phase(0.5, mend)]
"""


@pytest.mark.slow
def test_neither_a_strategy_nor_its_phases_change_what_others_start_from(tasks, tmp_path):
    file = tmp_path / "writes.py"
    file.write_text(WRITES)
    flags = arguments(tasks, tmp_path / "w", strategies=(str(file), "full"), seeds=(0,), learning_rate=0.0)
    _, wrote, full = transfer.run(**flags)
    assert not parameters(tmp_path / "w", wrote)["hidden_0/bias"].any()
    alone = transfer.run(**{**flags, "strategies": ("full",), "workdir": str(tmp_path / "v")})[1]
    for name, leaf in parameters(tmp_path / "v", alone).items():
        np.testing.assert_array_equal(parameters(tmp_path / "w", full)[name], leaf)


def test_a_frozen_new_head_is_refused_whatever_was_written_into_context(tasks, tmp_path):
    file = tmp_path / "writes.py"
    head = '"head": {"bias": True'
    file.write_text(WRITES.replace(head, head.replace("True", "False")))
    with pytest.raises(InputError, match="freezes 'head/bias'"):
        transfer.run(**arguments(tasks, tmp_path / "w", strategies=(str(file),), seeds=(0,)))


def lacks(change):
    """The adapter with one line changed."""
    before, after = change
    assert before in ADAPTER
    return ADAPTER.replace(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE + "\n\ndef reinit(context):\n    pass\n", "reinit gives None: return a list of path prefixes"),
        (MINE + "\n\ndef reinit(context):\n    return 'head'\n", "reinit gives 'head': return a list"),
        (lacks(('"scale": jnp.ones(8)', '"scale": "text"')), "adapt gives 'text' at 'hidden_0/scale'"),
        (
            lacks(('return {**params, "hidden_0": {"kernel', 'return {"hidden_0": {"kernel')),
            "only in the model",
        ),
        (lacks(('stage["kernel"] * scale[None]', "scale")), r"'hidden_0/kernel' (36, 8) is of shape (8,) after merge"),
        (lacks(('stage["bias"] * scale}', 'stage["none"]}')), "mine.py' fails: KeyError: 'none' ("),
        (lacks(('stage["bias"] * scale}', '"text"}')), "mine.py' fails: TypeError: "),
        (
            lacks(('return {**params, "hidden_0": {**', 'return {"hidden_0": {**')).replace("def merge", "def other"),
            "'head/bias' (3,) is missing after adapt: keep it",
        ),
    ],
)
def test_a_strategy_of_several_parts_that_cannot_be_is_one_line(text, message, tasks, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert message in refused(command(tasks, tmp_path, strategies=(str(file),)), capsys)


def test_an_option_of_a_strategy_that_merges_may_be_a_list(tasks, tmp_path):
    file = tmp_path / "adapter.py"
    options = "**options):\n    assert options == {'sizes': [1, 2]}"
    text = ADAPTER.replace("key):", "key, " + options).replace("merge(params):", "merge(params, " + options)
    file.write_text(text.replace("context):", "context, *, sizes=()):"))
    strategies = (f"{file}:strategy:sizes=[1,2]",)
    [_, line] = transfer.run(**arguments(tasks, tmp_path / "w", strategies=strategies, seeds=(0,), epochs=1))
    assert line.options == {"sizes": [1, 2]}


def test_a_pretrain_dry_run_prints_the_mask_and_writes_nothing(tasks, tmp_path, capsys):
    pretrain.run(**arguments(tasks, tmp_path / "w", dry_run=True))
    assert "332 of 332 numbers train" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


def test_rprop_that_keeps_its_rate_in_its_state_trains(tasks, tmp_path):
    flags = {"optimizer": "rprop", "learning_rate": 0.001, "source": None, "strategies": ("scratch",), "seeds": (0,)}
    line = transfer.run(**arguments(tasks, tmp_path / "w", **flags))[0]
    still = transfer.run(**arguments(tasks, tmp_path / "v", **{**flags, "optimizer": "sgd", "learning_rate": 0.0}))[0]
    assert line.train_loss < still.train_loss - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_is_whole_on_narrow_and_wide_terminals(finished, tasks, capsys, monkeypatch, columns):
    workdir, lines = finished
    monkeypatch.setenv("COLUMNS", str(columns))
    transfer.run(**arguments(tasks, workdir, weight_decay=0.01, clip=1.0))
    text = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for line in lines:
        assert line.strategy in text and f"{line.trained_parameters:,}" in text
    if columns == 80:
        rule = next(line for line in text.splitlines() if "\N{BOX DRAWINGS LIGHT HORIZONTAL}" in line)
        assert len(rule.strip()) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["environment.json", "curves.npz", "report.html", "predictions", "checkpoints"])
def test_a_finished_run_with_a_piece_missing_or_damaged_is_mended(finished, tasks, tmp_path, broken):
    source, lines = finished
    shutil.copytree(source, tmp_path / "w")
    for place in list((tmp_path / "w").rglob(broken)):
        shutil.rmtree(place) if place.is_dir() else place.write_bytes(b"{")
    again = transfer.run(**arguments(tasks, tmp_path / "w", weight_decay=0.01, clip=1.0))
    assert [line.test_loss for line in again] == [line.test_loss for line in lines]
    assert all((tmp_path / "w" / piece).exists() for line in again for piece in (line.checkpoint, line.predictions))
    json.loads((tmp_path / "w" / "environment.json").read_text())


def test_a_flags_file_or_results_that_are_not_ours_are_refused(finished, tasks, tmp_path, capsys):
    source, _ = finished
    for name, text in (("results.jsonl", b"[1]\n"), ("results.jsonl", b"{}\n"), ("flags.flags", b"\xff\xfe")):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        shutil.copytree(source, tmp_path / "w")
        (tmp_path / "w" / name).write_bytes(text)
        assert name in refused(command(tasks, tmp_path, weight_decay=0.01, clip=1.0), capsys)
        assert (tmp_path / "w" / name).read_bytes() == text


BAD = {
    "target": ({"target": "fashion_minst_10k"}, "fashion_mnist_10k"),
    "no target": ({"target": None}, "--target is not given"),
    "no file": ({"target": "nowhere.npz"}, "nowhere.npz"),
    "strategy": ({"strategies": ("heed_only",)}, "nearest: 'head_only'"),
    "strategy option": ({"strategies": ("last_k:kk=1",)}, "no option 'kk'"),
    "strategy value": ({"strategies": ("last_k:k=9",)}, "has 2 stages"),
    "strategy twice": ({"strategies": ("full", "full")}, "full twice"),
    "activation": ({"activation": "rely"}, "nearest: 'relu'"),
    "optimizer": ({"optimizer": "adm"}, "nearest: 'adam'"),
    "loss": ({"loss": "crossentropy"}, "unknown loss"),
    "optimizer's number": ({"optimizer": "adam:b1=x"}, "option 'b1' of optimizer 'adam' is float, not 'x'"),
    "optimizer's dtype": ({"optimizer": "adam:mu_dtype=foo"}, "--optimizer"),
    "no optimizer": ({"optimizer": "os.path:join"}, "--optimizer"),
    "no loss": ({"loss": "os.path:join"}, "--loss"),
    "whole labels wanted": ({"loss": "optax.losses:softmax_cross_entropy"}, "--loss"),
    "option of a loss": ({"loss": "optax.losses:multiclass_hinge_loss:foo=1"}, "--loss"),
    "too wide": ({"hidden": (10**10,)}, "--hidden=10000000000"),
    "too many steps": ({"steps": 10**12}, "--steps=1000000000000"),
    "too many epochs": ({"epochs": 10**6, "batch_size": 1}, "--epochs=1000000"),
    "rate beyond float32": ({"learning_rate": 1e300}, "--learning_rate=1e+300"),
    "nothing to train on": ({"validation": 0.9999999}, "--validation=0.9999999"),
    "strange strategy": ({"strategies": ("..a",)}, "cannot be imported"),
    "strategy that is none": ({"strategies": ("os.path:join",)}, "strategy"),
    "empty source": ({"source": ""}, "--source= is empty"),
    "smoothing": ({"label_smoothing": 1.0}, "--label_smoothing=1.0"),
    "norms of an mlp": ({"strategies": ("norm_only",)}, "no normalisation layer"),
    "penalty": ({"penalty": "l2:weight=x"}, "is float, not 'x'"),
    "penalty on": ({"penalty": "l2:weight=1:on=heed/**"}, "matches no leaf"),
    "source's penalty": ({"source_penalty": "l2:weight=1:on=heed/**"}, "matches no leaf"),
    "model": ({"model": "mpl"}, "nearest: 'mlp'"),
    "schedule": ({"schedule": "cosin"}, "nearest: 'cosine'"),
    "head": ({"head": "neck"}, "--head=neck"),
    "head of other classes": ({"head": "copy"}, "head/bias"),
    "batch": ({"batch_size": 121}, "--batch_size=121: it is larger than the 120 training examples"),
    "source's batch": ({"source_batch_size": 121}, "--source_batch_size=121: it is larger than the 120"),
    "zero epochs": ({"epochs": 0}, "--epochs=0: it must be at least 1"),
    "zero steps": ({"steps": 0}, "--steps=0: it must be at least 1"),
    "zero batch": ({"batch_size": 0}, "--batch_size=0"),
    "negative rate": ({"learning_rate": -0.1}, "--learning_rate=-0.1"),
    "nan rate": ({"learning_rate": float("nan")}, "--learning_rate=nan"),
    "infinite source rate": ({"source_learning_rate": float("inf")}, "--source_learning_rate=inf"),
    "clip": ({"clip": -1.0}, "--clip=-1.0"),
    "seed": ({"seeds": (-1,)}, "it must be at least 0"),
    "budget": ({"train_examples": ("1000",)}, "1000"),
    "budget word": ({"train_examples": ("some",)}, "--train_examples=some"),
    "validation": ({"validation": 1.5}, "1.5"),
    "both sources": ({"source_checkpoint": "x"}, "--source and --source_checkpoint"),
    "no source": ({"source": None, "strategies": ("full",)}, "strategy 'full' needs a source"),
    "missing checkpoint": ({"source": None, "source_checkpoint": "nowhere"}, "'nowhere' does not exist"),
    "no workdir": ({"workdir": None}, "--workdir is not given"),
    "unknown flag": ({"sedes": 1}, "seeds"),
    "no flagfile": ({"flagfile": "nowhere.flags"}, "nowhere.flags"),
    "no number": ({"epochs": "many"}, "many"),
}


def refused(argv, capsys):
    """The one line of an error, of a program that ends with exit code 1."""
    with pytest.raises(SystemExit) as end:
        process.run_main(transfer.main, ["transfer", *argv])
    assert end.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_end_with_one_line_and_nothing_written(case, tasks, tmp_path, capsys):
    change, message = BAD[case]
    assert message in refused(command(tasks, tmp_path, **change), capsys)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.2}, "--learning_rate=0.1 there, 0.2 here"),
        ({"strategies": ("heed_only",)}, "unknown strategy"),
        ({"hidden": (9,)}, "--hidden=8 there, 9 here"),
    ],
)
def test_a_workdir_of_another_experiment_is_left_as_it_is(finished, tasks, tmp_path, capsys, change, message):
    workdir, _ = finished
    before = snapshot(workdir)
    flags = {"weight_decay": 0.01, "clip": 1.0, **change}
    assert message in refused(command(tasks, tmp_path, workdir=str(workdir), **flags), capsys)
    after = snapshot(workdir)
    assert {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)} <= {".lock"}


def test_a_folder_that_is_no_run_is_left_as_it_is(tasks, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds other files and no run" in refused(command(tasks, tmp_path, workdir=str(tmp_path)), capsys)
    assert snapshot(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_flagfile_with_an_unknown_flag_is_refused(tmp_path, capsys):
    (tmp_path / "bad.flags").write_text("--sedes=1\n")
    assert "sedes" in refused([f"--flagfile={tmp_path / 'bad.flags'}"], capsys)


def test_a_label_outside_the_classes_is_refused(tasks, tmp_path, capsys):
    with np.load(tasks / "clothes.npz") as file:
        arrays = {name: file[name].copy() for name in file}
    arrays["train_labels"][7] = 3
    np.savez(tmp_path / "bad.npz", **arrays)
    text = refused(command(tasks, tmp_path, target=str(tmp_path / "bad.npz")), capsys)
    assert "7" in text and "3" in text
    assert not (tmp_path / "w").exists()


def test_a_checkpoint_of_another_model_is_refused(finished, tasks, tmp_path, capsys):
    workdir, _ = finished
    flags = {"source": None, "source_checkpoint": str(workdir), "hidden": (9,)}
    assert "another model (--hidden=[8] there, [9] here)" in refused(command(tasks, tmp_path, **flags), capsys)


def test_a_folder_that_is_no_checkpoint_is_refused(tasks, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = {"source": None, "source_checkpoint": str(tmp_path / "empty")}
    assert "is not a tljax checkpoint" in refused(command(tasks, tmp_path, **flags), capsys)


def test_a_source_of_another_shape_is_refused_or_brought_to_it(tasks, tmp_path, capsys):
    """Features cannot be brought to another shape; images are."""
    rng = np.random.default_rng(0)
    arrays = {"train_features": rng.normal(size=(30, 5)), "test_features": rng.normal(size=(9, 5))}
    np.savez(tmp_path / "f.npz", **arrays, train_labels=np.arange(30) % 3, test_labels=np.arange(9) % 3)
    assert "error" in refused(command(tasks, tmp_path, target=str(tmp_path / "f.npz")), capsys)
    write_task(tmp_path / "wide.npz", 5, 3)
    with np.load(tmp_path / "wide.npz") as file:
        big = {k: v if v.ndim == 1 else np.repeat(np.repeat(v, 2, 1), 2, 2) for k, v in file.items()}
    np.savez(tmp_path / "wide.npz", **big)
    lines = transfer.run(**arguments(tasks, tmp_path / "w", target=str(tmp_path / "wide.npz"), seeds=(0,)))
    assert lines[0].total_parameters == 36 * 8 + 8 + 8 * 3 + 3


@pytest.mark.devices(8)
def test_every_device_setting_of_jax_is_left_alone():
    assert len(jax.devices()) == 8
