"""The benchmark: sides take turns in processes of their own, train the same, and leave nothing behind."""

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import processes, rows, sides
from experiments.benchmark.processes import Failure, Patience, Program, Served, take_turns
from experiments.benchmark.rows import Options, Side
from experiments.benchmark.sides import Work
from experiments.runs import process

PATIENT = Patience(60, 60)


class Recorded:
    """A side that writes down what it is asked."""

    def __init__(self, name, asked, fails_in=None):
        self.name, self.asked, self.fails_in, self.turns = name, asked, fails_in, 0

    def first(self, patience):
        self.asked.append(f"{self.name} starts")
        return {}

    def turn(self, patience):
        self.turns += 1
        if self.turns == self.fails_in:
            raise Failure("it is tired")
        self.asked.append(self.name)
        return {"seconds": float(self.turns)}

    def peak(self, patience):
        return 1.0

    def end(self):
        self.asked.append(f"{self.name} ends")


def test_sides_start_and_take_turns_one_after_the_other_and_the_warm_up_is_not_counted():
    requests: list[str] = []
    several = {name: lambda name=name: Recorded(name, requests) for name in "ab"}
    taken = take_turns(several, 2, PATIENT)
    assert requests == ["a starts", "b starts", *"ab" * 3, "a ends", "b ends"]
    assert [[turn["seconds"] for turn in result.turns] for result in taken.values()] == [[2.0, 3.0]] * 2


def test_a_side_that_fails_is_ended_and_left_out_and_the_others_go_on():
    requests: list[str] = []
    notes: list[str] = []
    several = {"a": lambda: Recorded("a", requests, 2), "b": lambda: Recorded("b", requests)}
    assert list(take_turns(several, 2, PATIENT, note=notes.append)) == ["b"]
    assert notes == ["a is left out: it is tired"]
    assert requests == ["a starts", "b starts", "a", "b", "a ends", "b", "b", "b ends"]


def test_when_the_time_is_over_nothing_more_begins():
    requests: list[str] = []
    notes: list[str] = []
    over = Patience(60, 60, time.monotonic() - 1)
    assert take_turns({"a": lambda: Recorded("a", requests)}, 2, over, note=notes.append) == {}
    assert requests == [] and notes == ["a: left out, as the time is over"]


def test_ratios_are_of_rounds_and_over_the_side_that_is_named():
    several = {"tljax": Side(None), "tljax, before": Side(None, over="tljax"), "a": Side(None), "a, b": Side(None, "a")}
    values = {
        "tljax": [1.0, 2.0, 4.0],
        "tljax, before": [3.0, 4.0, 20.0],
        "a": [2.0, 2.0, 2.0],
        "a, b": [1.0, 1.0, 4.0],
    }
    measured = {m.side: (m.value, m.ratio, m.ratios, m.over) for m in rows.compared("s", values, several, {})}
    assert measured["tljax"][1] == 1.0
    assert measured["tljax, before"] == (4.0, 3.0, [3.0, 2.0, 5.0], "tljax")
    assert measured["a, b"] == (1.0, 0.5, [0.5, 0.5, 2.0], "a")


def test_the_ceiling_is_the_best_rate_and_shares_are_of_the_work_that_counts():
    """6.0e10 FLOPs of 784-512-10 in 600 steps of 100: in 0.5 s at a best rate of 200 GFLOP/s."""
    work = Work("tljax")
    several = {"tljax": Side(work), "large product": Side(work._replace(side="product"))}
    first = {"device": "cpu", "start": 1.0}
    taken = {
        "tljax": processes.Taken(first, [{"seconds": 0.5}, {"seconds": 0.5}], 1e6),
        "large product": processes.Taken({**first, "rate": 1e11}, [{"rate": 1e11}, {"rate": 2e11}], None),
    }
    values = {(m.row, m.side): m.value for m in rows._turn_measurements("x", several, taken)}
    assert values["x: large product, best GFLOP/s", "JAX"] == 200
    products = 600 * 2 * 100 * (2 * 784 * 512 + 3 * 512 * 10)
    assert values["x: share of the large product's best rate", "tljax"] == pytest.approx(products / 0.5 / 2e11)
    assert values["x: s/epoch", "tljax"] == 0.5 and ("x: s/epoch", "large product") not in values


def test_seconds_are_of_an_epoch_only_where_a_turn_is_one():
    first = {"device": "cpu", "start": 1.0}
    taken = {"tljax": processes.Taken(first, [{"seconds": 0.5}], None)}
    units = {(6_000, 60): "s/epoch", (60_000, 600): "s/epoch", (6_000, 600): "s/600 steps", (600_000, 20): "s/20 steps"}
    for (examples, steps), unit in units.items():
        sides_of_case = {"tljax": Side(Work("tljax", examples=examples, steps=steps))}
        assert f"x: {unit}" in [m.row for m in rows._turn_measurements("x", sides_of_case, taken)]


def test_without_data_the_default_rows_are_measured_but_for_programs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "_cuda_there", lambda: False)
    monkeypatch.setattr(benchmark, "_prepared", lambda names, options: contextlib.nullcontext(tmp_path))
    benchmark.run(None, minutes=1e-9)
    lines = capsys.readouterr().out.splitlines()
    assert "the row whole is left out: --manual_dir is not given" in lines
    assert sum(line.endswith("left out, as the time is over") for line in lines) >= len(rows.ON_HOST) - 1


def test_rows_measure_tljax_first_and_every_precision_alike():
    options = Options(precisions=("float32", "tf32", "bfloat16"), torch_python="python", cuda=True)
    for row in {*rows.ON_HOST, *rows.ON_ACCELERATOR} - {"deterministic"}:
        cases = rows.cases(row, options)
        assert all(next(iter(several)).startswith("tljax") for several in cases.values())
        rows_by_precision = {
            precision: [[*several] for name, several in cases.items() if precision in name]
            for precision in ("float32", "tf32")
        }
        assert rows_by_precision["float32"] == rows_by_precision["tf32"]
    of_fits = [side.work for several in rows.cases("fits", options).values() for side in several.values()]
    assert {work.fits for work in of_fits} == {8, 64}
    assert {work.side for work in of_fits if work.precision == "bfloat16"} == {"tljax"}


def test_a_baseline_stands_beside_each_side_of_tljax_and_no_other():
    other = Path("/other")
    for row in (*rows.ON_HOST, *rows.ON_ACCELERATOR):
        for several in rows.cases(row, Options(torch_python="python", cuda=True, baseline=other)).values():
            before = {name: side for name, side in several.items() if name.endswith(", before")}
            assert {name for name in several if name.startswith("tljax")} - {*before} == {
                s.over for s in before.values()
            }
            assert all(side.checkout == other for side in before.values())
            assert all(side.checkout == processes.CHECKOUT for name, side in several.items() if name not in before)


def test_without_its_libraries_a_side_is_left_out():
    names = [*rows.cases("full", Options()).popitem()[1]]
    assert names == ["tljax", "plain JAX", "a jitted step", "tljax, 4 at once, each", "large product"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows=fast", "--manual_dir=x"], "'fast' is none of full, cnn"),
        (["--rounds=0", "--manual_dir=x"], "--rounds=0"),
        (["--rows=whole"], "without --manual_dir no such row is measured"),
        (["--rows=full", "--minutes=0"], "--minutes=0: it must be above 0"),
        (["--rows=full", "--patience=-1"], "--patience=-1: it must be above 0"),
        (["--rows=full", "--program_patience=nan"], "--program_patience=nan: it must be above 0"),
        (["--rows=accelerator", "--fits=8"], "name at least two numbers of fits"),
        (["--rows=accelerator", "--precisions=float64"], "'float64' is none of float32, tf32"),
        (["--manual_dir=/no/such"], "is no folder: name that with"),
        (["--rows=full", "--baseline=/no/such"], "there is no tljax/ in it"),
    ],
)
def test_it_refuses_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        process.run_main(benchmark.main, ["benchmark", *flags])
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_a_side_says_why_it_fails(tmp_path):
    """In a folder without what sides share."""
    served = Served([str(tmp_path), json.dumps(Work("eager")._asdict())], processes.environment(processes.CHECKOUT))
    with pytest.raises(Failure, match=r"images\.npy"):
        served.first(60)
    served.end()


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


WRITER = """
import pathlib, sys, time
for i in range(10**6):
    (pathlib.Path(sys.argv[1]) / str(i % 50)).write_text("")
    time.sleep(1e-4)
"""
PARENT = f"""
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WRITER!r}, sys.argv[1]])
pathlib.Path(sys.argv[2]).write_text(str(child.pid))
child.wait()
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_program_that_is_cut_off_is_ended_with_what_it_started_before_its_folder_goes(
    interrupted, tmp_path, monkeypatch
):
    """By its patience, or by an exception such as a signal raises, while a child of it writes into the folder."""
    folders = []

    def command(folder):
        folders.append(folder)
        return ["-c", PARENT, str(folder), str(tmp_path / "pid")]

    def peak(_):
        if interrupted and (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(processes, "_peak_of", peak)
    program = Program({"cold": command}, os.environ)
    with pytest.raises(KeyboardInterrupt if interrupted else Failure):
        program.turn(60 if interrupted else 1.0)
    assert not alive(int((tmp_path / "pid").read_text()))
    assert not folders[0].exists()
    program.end()


def test_a_side_that_answers_too_late_is_ended_with_what_it_started(tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid\nwait\n")
    script.chmod(0o755)
    served = Served([], os.environ, str(script))
    with pytest.raises(Failure, match="takes longer than"):
        served.first(0.5)
    served.end()
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_program_says_when_its_first_step_began_and_what_it_compiled(tmp_path, monkeypatch):
    """Of a program of two compilations, the first of another name than a training program's."""
    import jax

    (tmp_path / "mine.py").write_text(
        "import jax\nother = jax.jit(lambda x: x + 1)\nother(1.0)\n"
        "def segment(x):\n    return x * 2\njax.jit(segment)(1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])
    before = jax.config.values["jax_numpy_rank_promotion"]
    begun = time.time()
    try:
        sides.program(tmp_path / "record.json", "mine", [], begun)
    finally:
        jax.monitoring.clear_event_listeners()
    took = time.time() - begun
    noted = json.loads((tmp_path / "record.json").read_text())
    assert 0 < noted["compiling"] < took and 0 < noted["first_step"] < took
    assert noted["programs"] >= 2 and noted["device"] == jax.devices()[0].device_kind
    assert before == jax.config.values["jax_numpy_rank_promotion"]


@pytest.mark.slow
def test_sides_train_the_same(tmp_path, capsys):
    """tljax and plain JAX from the same parameters on the same orders: equal losses, of the first and the last fit."""
    output = tmp_path / "b.json"
    benchmark.run(None, ("fits",), rounds=1, turn_steps=6, fits=(2, 3), output=str(output))
    losses_of_sides = [row for row in json.loads(output.read_text())["rows"] if "loss after" in row["row"]]
    assert {row["side"] for row in losses_of_sides} >= {
        "tljax, side by side",
        "plain JAX, vmap",
        "tljax, as auto decides",
    }
    losses = np.array([row["values"] for row in losses_of_sides])
    assert np.ptp(losses, axis=0).max() < 1e-5 and losses[0, 0] != losses[0, 1]
    assert "six times" in capsys.readouterr().out


@pytest.mark.complete
@pytest.mark.slow
def test_it_writes_its_table_and_names_what_is_left_out(complete_data, tmp_path, capsys):
    benchmark.run(str(complete_data), ("probe",), rounds=1, turn_steps=60, output=str(tmp_path / "b.json"))
    text = capsys.readouterr().out
    assert "head alone, 1 fit, float32" in text and "s/60 steps" in text and (tmp_path / "b.json").is_file()
    about = json.loads((tmp_path / "b.json").read_text())["about"]
    assert re.match(r"\d{4}-\d\d-\d\d, .*Python .*jax ", about)
