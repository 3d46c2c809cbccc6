"""What speed rests on, counted: executables, features and what is left of them for the next process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_programs import arguments, command, results, write_task

from experiments import pretrain, transfer
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import accelerator
from experiments.benchmark import peers as sides
from experiments.benchmark.accelerator_sides import Work
from experiments.runs import process
from experiments.runs.settings import Settings
from tljax.train import vectorize
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parent.parent
NOT_OF_PRETRAIN = {"target": None, "strategies": None}
"""Flags that `command` gives to transfer and pretrain does not have."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "digits.npz", 0, 4)
    write_task(folder / "clothes.npz", 1, 4, ["shirt", "coat", "bag", "shoe"])
    return folder


def compiled():
    return vectorize.segment._cache_size()


def test_nothing_is_compiled_twice_in_a_run_nor_for_other_numbers(tasks, tmp_path):
    """One executable for whatever trains in full, one for the head on features, one for it where examples are few."""
    flags = {"strategies": ("scratch", "full", "head_only", "last_k"), "hidden": (9,), "train_examples": ("40", "all")}
    flags |= {"penalty": "l2:weight=0.01", "label_smoothing": 0.1, "epochs": 3}
    before = compiled()
    transfer.run(**arguments(tasks, tmp_path / "one", **flags))
    assert compiled() - before <= 3
    before = compiled()
    flags |= {"seeds": (5, 6), "learning_rate": 0.03, "train_examples": ("60", "all"), "label_smoothing": 0.2}
    transfer.run(**arguments(tasks, tmp_path / "two", **flags | {"penalty": "l2:weight=0.3"}))
    assert compiled() == before


@pytest.mark.slow
def test_rates_of_a_strategy_share_an_executable(tasks, tmp_path):
    flags = {"strategies": ("layerwise_decay:decay=0.5",), "hidden": (7,)}
    transfer.run(**arguments(tasks, tmp_path / "one", **flags))
    before = compiled()
    flags["strategies"] = ("layerwise_decay:decay=0.3",)
    transfer.run(**arguments(tasks, tmp_path / "two", **flags))
    assert compiled() == before


def test_the_run_says_what_it_decided(tasks, tmp_path, capsys):
    transfer.run(**arguments(tasks, tmp_path / "w", strategies=("head_only",), seeds=(0, 1, 2), devices=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("2 of 3 fits at once, one on each of 2 devices") == 1
    assert "hidden_0 is frozen: features of 120 examples are computed once, 0 MB" in lines


@pytest.mark.slow
def test_over_the_budget_the_run_says_so_and_gives_the_same(tasks, tmp_path, capsys):
    lean = transfer.run(**arguments(tasks, tmp_path / "lean", features_budget=100))
    assert "the budget 0 MB, so computed in every step" in capsys.readouterr().out
    none = transfer.run(**arguments(tasks, tmp_path / "none", features_budget=0))
    full = transfer.run(**arguments(tasks, tmp_path / "full"))
    for one, two, three in zip(lean, none, full, strict=True):
        assert one.test_loss == two.test_loss == pytest.approx(three.test_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"many": "vmap"}, {"features_dtype": "bfloat16"}])
def test_flags_of_speed_leave_accuracy_as_it_is(flags, tasks, tmp_path):
    plain = transfer.run(**arguments(tasks, tmp_path / "plain"))
    other = transfer.run(**arguments(tasks, tmp_path / "other", **flags))
    for one, two in zip(plain, other, strict=True):
        assert two.test_loss == pytest.approx(one.test_loss, rel=0.02)
        assert one.key != two.key


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_bits_and_the_same_run(tasks, tmp_path):
    transfer.run(**arguments(tasks, tmp_path / "one", devices=1))
    transfer.run(**arguments(tasks, tmp_path / "eight", devices=8))
    assert results(tmp_path / "one") == results(tmp_path / "eight")
    again = transfer.run(**arguments(tasks, tmp_path / "one", devices=2))
    assert len(again) == len(results(tmp_path / "one")) - 2


@pytest.mark.slow
def test_side_by_side_a_group_is_trained_whole(tasks, tmp_path):
    """Its bits depend on its company: a fit that is lost takes the group with it, and comes back the same."""
    flags = {"strategies": ("full",), "many": "vmap"}
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    before = results(tmp_path / "w")
    lost = next(line for line in before if line.strategy == "full")
    (tmp_path / "w" / lost.predictions).unlink()
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    assert sorted(results(tmp_path / "w"), key=str) == sorted(before, key=str)


@pytest.mark.slow
def test_a_second_process_compiles_nothing_anew(tasks, tmp_path):
    def run(name):
        flags = command(tasks, tmp_path, workdir=tmp_path / name, compilation_cache=tmp_path / "compiled")
        call = [sys.executable, "-m", "experiments.transfer", *flags]
        subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
        return {file.name for file in (tmp_path / "compiled").iterdir() if file.name.endswith("-cache")}

    first = run("one")
    assert any(name.startswith("jit_segment") for name in first)
    assert run("two") == first


@pytest.mark.slow
def test_compiled_programs_go_to_the_users_cache_folder_unless_switched_off(tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for flag, expected in (("--compilation_cache=off", 0), ("--seeds=0", 1)):
        call = [
            sys.executable,
            "-m",
            "experiments.pretrain",
            *command(tasks, tmp_path / flag[:8], **NOT_OF_PRETRAIN),
            flag,
        ]
        subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
        assert len(list((tmp_path / "home").glob("tljax/compiled-*"))) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"devices": 0}, "--devices=0: it must be at least 1 and at most 1,024"),
        ({"devices": 99}, "--devices=99: there are 8"),
        ({"features_budget": -1}, "--features_budget=-1: give 0 or more"),
        ({"features_dtype": "float16"}, "--features_dtype=float16"),
        ({"many": "pmap"}, "--many=pmap"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tasks, tmp_path, capsys):
    for program, others in ((transfer, {}), (pretrain, NOT_OF_PRETRAIN)):
        with pytest.raises(SystemExit) as end:
            process.run_main(program.main, ["x", *command(tasks, tmp_path, **others, **flags)])
        assert end.value.code == 1
        text = capsys.readouterr().err
        assert message in text and text.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_cache_folder_that_cannot_be_made_is_refused(tasks, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"compilation_cache=.*cannot be made"):
        process.prepare(Settings.from_flags(compilation_cache=str(tmp_path / "file" / "in")))


def test_turns_are_taken_one_after_the_other_and_the_first_is_not_counted():
    taken = []

    def side(name):
        while True:
            taken.append(name)
            yield

    seconds = benchmark.turns({"a": side("a"), "b": side("b")}, 2)
    assert taken == ["a", "b"] * 3
    assert {name: len(took) for name, took in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_medians_over_rounds():
    rows = benchmark.medians("s", {"tljax": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 20.0]}, "tljax")
    assert [(row.side, row.value, row.ratio) for row in rows] == [("tljax", 2.0, 1.0), ("other", 4.0, 3.0)]


def test_the_benchmark_trains_what_it_says_it_does():
    """Its sides of tljax, and a jitted step of one's own: the loss falls, and an epoch is an epoch."""
    rng = np.random.default_rng(0)
    labels = np.arange(1000, dtype=np.int32) % 10
    images = (rng.integers(0, 80, (1000, 28, 28, 1)) + 15 * labels[:, None, None, None]).astype(np.uint8)
    side = sides.epochs(2, data=(images, labels), widths=(16,))
    losses = [next(side)[1].loss for _ in range(3)]
    assert losses[0].shape == (2, 10) and losses[2].mean() < losses[0].mean()
    next(sides.plain((images, labels), 16))


@pytest.mark.slow
def test_the_benchmark_counts_compilation_in_its_probes():
    images, labels = np.zeros((1000, 28, 28, 1), np.uint8), np.zeros(1000, np.int32)
    assert sides.probes((images, labels), 2, 2, 1) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows=fast", "--manual_dir=x"], "'fast' is none of full, probe"),
        (["--rounds=0", "--manual_dir=x"], "--rounds=0"),
        ([], "--manual_dir is not given"),
        (["--rows=accelerator", "--fits=8"], "name at least two numbers of fits"),
        (["--rows=accelerator", "--precisions=float64"], "'float64' is none of float32, tf32"),
        (["--manual_dir=/no/such"], "is no folder"),
    ],
)
def test_the_benchmark_refuses_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        process.run_main(benchmark.main, ["benchmark", *flags])
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_a_side_says_why_it_fails_and_is_ended_where_it_takes_too_long(tmp_path):
    """Of a folder without what sides share, and of a program that never answers."""
    process = accelerator.Process(tmp_path, Work("eager"), sys.executable)
    with pytest.raises(accelerator.Failure, match=r"images\.npy"):
        process.answer(60)
    process.end()
    (tmp_path / "python").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "python").chmod(0o755)
    process = accelerator.Process(tmp_path, Work("eager"), str(tmp_path / "python"))
    with pytest.raises(accelerator.Failure, match="longer than --patience"):
        process.answer(0.05)
    process.end()
    assert process.process.returncode is not None


def test_rows_of_an_accelerator_measure_tljax_first_and_every_precision_alike():
    options = accelerator.Options(5, 600, (8, 64, 512), ("float32", "tf32", "bfloat16"), 60, "python")
    for row in accelerator.ROWS[:-1]:
        cases = accelerator.works(row, options, cuda=True)
        sides = {name: [*several] for name, several in cases.items()}
        assert all(next(iter(several.values())).side == "tljax" for several in cases.values())
        assert [several for name, several in sides.items() if "float32" in name] == [
            several for name, several in sides.items() if "tf32" in name
        ]
        assert {work.precision for several in cases.values() for work in several.values()} == {*options.precisions}
    fits = [work.fits for several in accelerator.works("fits", options, True).values() for work in several.values()]
    assert set(fits) == {8, 64}


@pytest.mark.slow
def test_sides_of_an_accelerator_train_the_same(tmp_path, capsys):
    """tljax and plain JAX from the same parameters on the same orders: equal losses, of the first and the last fit."""
    output = tmp_path / "b.json"
    flags = {"rounds": 1, "turn_steps": 6, "fits": (2, 3), "output": str(output), "torch_python": None}
    benchmark.run(None, ("fits",), **flags)
    rows = [row for row in json.loads(output.read_text())["rows"] if "loss after" in row["row"]]
    assert {row["side"] for row in rows} >= {"tljax, side by side", "plain JAX, vmap", "tljax, as auto decides"}
    losses = np.array([row["values"] for row in rows])
    assert np.ptp(losses, axis=0).max() < 1e-5 and losses[0, 0] != losses[0, 1]
    assert "six times" in capsys.readouterr().out


@pytest.mark.complete
@pytest.mark.slow
def test_the_benchmark_writes_its_table_and_names_what_is_left_out(complete_data, tmp_path, capsys):
    benchmark.run(str(complete_data), ("probe",), 1, str(tmp_path / "b.json"))
    text = capsys.readouterr().out
    assert "linear probe, s/epoch" in text and (tmp_path / "b.json").is_file()
    left = re.findall(r"(\w+) is not installed, so its columns are left out", text)
    assert set(left) == {name for name in ("torch", "keras") if not benchmark._installed(name)}


def test_jax_has_eight_devices_in_these_tests():
    assert len(jax.devices()) == 8
