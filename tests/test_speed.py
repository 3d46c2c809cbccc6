"""What speed rests on, counted: executables, features and what is left of them for the next process."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from test_programs import arguments, command, results

from experiments import pretrain, transfer
from experiments.runs import process, times
from experiments.runs.settings import Settings
from tljax import train
from tljax.train import vectorize
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parent.parent
NOT_OF_PRETRAIN = {"target": None, "strategies": None}
"""Flags that `command` gives to transfer and pretrain does not have."""


def compiled():
    return vectorize.segment._cache_size()


def test_nothing_is_compiled_twice_in_a_run_nor_for_other_numbers(even_tasks, tmp_path):
    """One executable for whatever trains in full, one for the head on features, one for it where examples are few."""
    flags = {"strategies": ("scratch", "full", "head_only", "last_k"), "hidden": (9,), "train_examples": ("40", "all")}
    flags |= {"penalty": "l2:weight=0.01", "label_smoothing": 0.1, "epochs": 3}
    before = compiled()
    transfer.run(**arguments(even_tasks, tmp_path / "one", **flags))
    assert compiled() - before <= 3
    before = compiled()
    flags |= {"seeds": (5, 6), "learning_rate": 0.03, "train_examples": ("60", "all"), "label_smoothing": 0.2}
    transfer.run(**arguments(even_tasks, tmp_path / "two", **flags | {"penalty": "l2:weight=0.3"}))
    assert compiled() == before


@pytest.mark.slow
def test_rates_of_a_strategy_share_an_executable(even_tasks, tmp_path):
    flags = {"strategies": ("layerwise_decay:decay=0.5",), "hidden": (7,)}
    transfer.run(**arguments(even_tasks, tmp_path / "one", **flags))
    before = compiled()
    flags["strategies"] = ("layerwise_decay:decay=0.3",)
    transfer.run(**arguments(even_tasks, tmp_path / "two", **flags))
    assert compiled() == before


def test_what_compiles_and_when_the_first_step_begins_is_noted_until_the_end(tmp_path):
    compiled, begun = [], time.perf_counter()
    execution = train.Execution(on_compiled=lambda fits, cost: compiled.append(fits))
    with times.noted("search") as noted:
        watched = noted.watched(execution)
        noted.leave(tmp_path)  # nothing of a run that trained nothing
        jax.jit(lambda x: x * 2.5 + 1)(1.0)
        for _ in range(2):
            watched.on_compiled((0,), train.Cost(None, None))
            took = time.perf_counter() - begun
        noted.leave(tmp_path)
        noted.leave(tmp_path)
    durations = list(noted.durations)
    jax.jit(lambda x: x * 3.5 + 1)(1.0)
    lines = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert compiled == [(0,), (0,)] and noted.durations == durations and len(lines) == 2
    assert 0 < noted.first_step < took and noted.programs == lines[0]["programs"] >= 1
    assert lines[0]["compiling"] == pytest.approx(sum(durations), abs=1e-3) and 0 < sum(durations) < took


@pytest.mark.devices(2)
def test_the_run_says_what_it_decided(even_tasks, tmp_path, capsys):
    transfer.run(**arguments(even_tasks, tmp_path / "w", strategies=("head_only",), seeds=(0, 1, 2), devices=2))
    lines = capsys.readouterr().out.splitlines()
    [line] = map(json.loads, (tmp_path / "w" / "times.jsonl").read_text().splitlines())
    assert line["program"] == "transfer" and 0 < line["first_step"] < line["seconds"] and line["programs"] > 0
    assert lines[-1].startswith(f"first step after {line['first_step']:.1f} s; {line['programs']:,} programs compiled")
    assert lines.count("2 of 3 fits at once, one on each of 2 devices") == 1
    assert "hidden_0 is frozen: features of 120 examples are computed once, 0 MB" in lines


@pytest.mark.slow
def test_over_the_budget_the_run_says_so_and_gives_the_same(even_tasks, tmp_path, capsys):
    lean = transfer.run(**arguments(even_tasks, tmp_path / "lean", features_budget=100))
    assert "the budget 0 MB, so computed in every step" in capsys.readouterr().out
    none = transfer.run(**arguments(even_tasks, tmp_path / "none", features_budget=0))
    full = transfer.run(**arguments(even_tasks, tmp_path / "full"))
    for first, two, three in zip(lean, none, full, strict=True):
        assert first.test_loss == two.test_loss == pytest.approx(three.test_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"many": "vmap"}, {"features_dtype": "bfloat16"}])
def test_flags_of_speed_leave_accuracy_as_it_is(flags, even_tasks, tmp_path):
    plain = transfer.run(**arguments(even_tasks, tmp_path / "plain"))
    other = transfer.run(**arguments(even_tasks, tmp_path / "other", **flags))
    for first, two in zip(plain, other, strict=True):
        assert two.test_loss == pytest.approx(first.test_loss, rel=0.02)
        assert first.key != two.key


@pytest.mark.slow
@pytest.mark.devices(8)
def test_any_number_of_devices_gives_the_same_bits_and_the_same_run(even_tasks, tmp_path):
    transfer.run(**arguments(even_tasks, tmp_path / "one", devices=1))
    transfer.run(**arguments(even_tasks, tmp_path / "eight", devices=8))
    assert results(tmp_path / "one") == results(tmp_path / "eight")
    again = transfer.run(**arguments(even_tasks, tmp_path / "one", devices=2))
    assert len(again) == len(results(tmp_path / "one")) - 2


@pytest.mark.slow
def test_side_by_side_a_group_is_trained_whole(even_tasks, tmp_path):
    """Its bits depend on its company: a fit that is lost takes the group with it, and comes back the same."""
    flags = {"strategies": ("full",), "many": "vmap"}
    transfer.run(**arguments(even_tasks, tmp_path / "w", **flags))
    before = results(tmp_path / "w")
    lost = next(line for line in before if line.strategy == "full")
    (tmp_path / "w" / lost.predictions).unlink()
    transfer.run(**arguments(even_tasks, tmp_path / "w", **flags))
    assert sorted(results(tmp_path / "w"), key=str) == sorted(before, key=str)


@pytest.mark.slow
def test_a_second_process_compiles_nothing_anew(even_tasks, tmp_path):
    def run(name):
        flags = command(even_tasks, tmp_path, workdir=tmp_path / name, compilation_cache=tmp_path / "compiled")
        call = [sys.executable, "-m", "experiments.transfer", *flags]
        subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
        return {file.name for file in (tmp_path / "compiled").iterdir() if file.name.endswith("-cache")}

    first = run("one")
    assert any(name.startswith("jit_segment") for name in first)
    assert run("two") == first


@pytest.mark.slow
def test_compiled_programs_go_to_the_users_cache_folder_unless_switched_off(even_tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for flag, expected in (("--compilation_cache=off", 0), ("--seeds=0", 1)):
        call = [
            sys.executable,
            "-m",
            "experiments.pretrain",
            *command(even_tasks, tmp_path / flag[:8], **NOT_OF_PRETRAIN),
            flag,
        ]
        subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
        assert len(list((tmp_path / "home").glob("tljax/compiled-*"))) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"devices": 0}, "--devices=0: it must be at least 1 and at most 1,024"),
        ({"devices": 99}, f"--devices=99: there are {len(jax.devices())}"),
        ({"features_budget": -1}, "--features_budget=-1: give 0 or more"),
        ({"features_dtype": "float16"}, "--features_dtype=float16"),
        ({"many": "pmap"}, "--many=pmap"),
    ],
)
def test_bad_flags_are_one_line(flags, message, even_tasks, tmp_path, capsys):
    for program, others in ((transfer, {}), (pretrain, NOT_OF_PRETRAIN)):
        with pytest.raises(SystemExit) as end:
            process.run_main(program.main, ["x", *command(even_tasks, tmp_path, **others, **flags)])
        assert end.value.code == 1
        text = capsys.readouterr().err
        assert message in text and text.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_cache_folder_that_cannot_be_made_is_refused(even_tasks, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"compilation_cache=.*cannot be made"):
        process.prepare(Settings.from_flags(compilation_cache=str(tmp_path / "file" / "in")))


@pytest.mark.cpu
@pytest.mark.devices(8)
def test_jax_has_eight_devices_in_these_tests():
    assert len(jax.devices()) == 8


@pytest.mark.slow
@pytest.mark.devices(2)
def test_all_label_budgets_of_a_strategy_are_one_group_with_one_executable(even_tasks, tmp_path, capsys):
    """Three seeds of a budget were two on two devices and one: an executable more of `head_only`, and four groups."""
    flags = {"strategies": ("full", "head_only"), "seeds": (0, 1, 2), "devices": 2, "hidden": (11,), "epochs": None}
    flags |= {"train_examples": ("30", "60"), "steps": 8}
    before = compiled()
    results = transfer.run(**arguments(even_tasks, tmp_path / "w", **flags))
    groups = [line for line in capsys.readouterr().out.splitlines() if "trained by themselves" in line]
    assert compiled() - before == 2 + 2  # the sources are three fits: two on two devices and one
    counts = {"scratch, full": 12, "head_only": 6}
    assert groups == [f"{names}: {count} of the 18 fits, trained by themselves" for names, count in counts.items()]
    alone = transfer.run(
        **arguments(even_tasks, tmp_path / "one", **flags | {"train_examples": ("60",), "seeds": (1,)})
    )
    predictions = {(fit.strategy, fit.seed, fit.train_examples): fit.predictions_sha256 for fit in results}
    assert {(fit.strategy, fit.seed, fit.train_examples): fit.predictions_sha256 for fit in alone}.items() <= (
        predictions.items()
    )
    assert len({fit.checkpoint for fit in results}) == 3 * 2
