"""A run that is stopped, killed or damaged in training ends with the bits of one that was never disturbed."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from test_programs import arguments, command, parameters, results

from experiments import transfer
from experiments.runs import directory, fit, process, resume
from tljax import masks, models, objective, optimizers, train
from tljax.train import loop

pytestmark = pytest.mark.usefixtures("no_pictures")

FLAGS = {
    "strategies": ("scratch", "lp_ft", "head_only"),
    "epochs": 6,
    "checkpoint_every": 1,
    "optimizer": "adam",
    "learning_rate": 0.01,
    "clip": 1.0,
    "validation": 0.2,
    "penalty": "l2:weight=1e-3",
}
"""Two phases, an optimizer with moments, a validation split, a penalty."""


def same_run(run: Path, other: Path) -> None:
    assert sorted(results(run), key=lambda line: line.name) == sorted(results(other), key=lambda line: line.name)
    for line in results(run):
        assert (run / line.predictions).read_bytes() == (other / line.predictions).read_bytes()
        for path, leaf in parameters(run, line).items():
            assert leaf.tobytes() == parameters(other, line)[path].tobytes()


@pytest.fixture(scope="module")
def undisturbed(tasks, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    transfer.run(**arguments(tasks, workdir, **FLAGS))
    assert not (workdir / "progress").exists()
    return workdir


class Killed(BaseException):
    """In place of kill -9: nothing catches it."""


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends when so many segments have been trained."""
    further, left = fit.advanced, iter(range(count))

    def once(*positional):
        if next(left, None) is None:
            raise Killed
        return further(*positional)

    monkeypatch.setattr(fit, "advanced", once)


@pytest.mark.parametrize("count", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 15))])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(tasks, undisturbed, tmp_path, monkeypatch, capsys, count):
    flags = arguments(tasks, tmp_path / "w", **FLAGS)
    with monkeypatch.context() as patch:
        killed_after(count, patch)
        with pytest.raises(Killed):
            transfer.run(**flags)
    capsys.readouterr()
    transfer.run(**flags)
    assert "goes on from step" in capsys.readouterr().out
    same_run(tmp_path / "w", undisturbed)
    peaks = [{fit.name: fit.peak_bytes for fit in directory.results(w)} for w in (tmp_path / "w", undisturbed)]
    assert peaks[0] == peaks[1] and all(peaks[0].values())
    assert not (tmp_path / "w" / "progress").exists()


def test_a_long_segment_is_saved_on_its_way_and_its_steps_are_counted(tasks, tmp_path, monkeypatch, capsys):
    """A run whose curves have one point is a single segment, which may take hours."""
    flags = {**FLAGS, "steps": 12, "points": 1, "strategies": ("scratch", "head_only")}
    del flags["epochs"], flags["checkpoint_every"]
    transfer.run(**arguments(tasks, tmp_path / "undisturbed", **flags))
    counted = []

    @contextmanager
    def progress(what, total, unit="steps"):
        counted.append([total])
        yield counted[-1].append

    with monkeypatch.context() as patch:
        patch.setattr(fit, "SAVE_SECONDS", 0.0)
        patch.setattr(loop, "FIRST_CALL", 2)
        patch.setattr(loop, "LONGEST", 0.0)  # a step a call from the second on
        patch.setattr("experiments.runs.console.progress", progress)
        with patch.context() as killed:
            killed_after(5, killed)
            with pytest.raises(Killed):
                transfer.run(**arguments(tasks, tmp_path / "w", **flags))
        assert counted[-1][:3] == [12 * 2, 0, 2 * 2]  # of all fits; nothing was there; two steps of two fits
        capsys.readouterr()
        transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    at = int(re.search(r"goes on from step (\d+) of 12", capsys.readouterr().out)[1])
    assert 0 < at < 12
    assert all(sum(steps) == total for total, *steps in counted[-2:])
    same_run(tmp_path / "w", tmp_path / "undisturbed")


@pytest.mark.slow
def test_what_was_saved_last_and_is_damaged_is_set_aside_for_what_was_saved_before(
    tasks,
    undisturbed,
    tmp_path,
    monkeypatch,
    capsys,
):
    flags = arguments(tasks, tmp_path / "w", **FLAGS)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(Killed):
            transfer.run(**flags)
    *_, newest = sorted((tmp_path / "w" / "progress").glob("*/*"))
    biggest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    raw = bytearray(biggest.read_bytes())
    raw[len(raw) // 2] ^= 1
    biggest.write_bytes(raw)
    transfer.run(**flags)
    out = capsys.readouterr().out
    assert "set aside" in out and "goes on from step" in out
    same_run(tmp_path / "w", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(number, tasks, undisturbed, tmp_path, monkeypatch, capsys):
    flags = arguments(tasks, tmp_path / "w", **FLAGS)
    further, sent = fit.advanced, []

    def interrupted(*points):
        if not sent:  # two would end the process at once
            sent.append(number)
            os.kill(os.getpid(), number)
        return further(*points)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "advanced", interrupted)
        with pytest.raises(process.Stopped, match=r"stopped at step .* the same command goes on") as stopped:
            transfer.run(**flags)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    transfer.run(**flags)
    same_run(tmp_path / "w", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_process_ends_it_within_ten_seconds_and_says_where(tasks, tmp_path, number, code):
    flags = command(tasks, tmp_path, strategies=("scratch",), seeds=(0,), epochs=None, steps=10**7, source=None)
    run = subprocess.Popen([sys.executable, "-m", "experiments.transfer", *flags], stderr=subprocess.PIPE, text=True)
    time.sleep(15)
    sent = time.monotonic()
    run.send_signal(number)
    _, errors = run.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert run.returncode == code and "stopped at step" in errors and "Traceback" not in errors
    assert list((tmp_path / "w" / "progress").glob("*/00000001"))


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(tasks, tmp_path):
    flags = command(tasks, tmp_path, strategies=("scratch",), seeds=(0,), epochs=None, steps=10**7, source=None)
    run = subprocess.Popen([sys.executable, "-m", "experiments.transfer", *flags], stderr=subprocess.PIPE, text=True)
    time.sleep(15)
    run.send_signal(signal.SIGINT)
    time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=2)
    assert run.returncode == 130


@pytest.mark.slow
def test_a_fit_that_diverges_keeps_its_last_finite_parameters_and_the_others_go_on(tasks, tmp_path):
    """L2 loss at a rate that is far too large."""
    lines = transfer.run(
        **arguments(
            tasks, tmp_path / "w", loss="l2_loss", learning_rate=1e9, source_learning_rate=0.1, source_loss="l2_loss"
        )
    )
    odd = [line for line in lines if line.diverged]
    assert odd and all(line.test_accuracy is None and line.diverged_step < line.steps for line in odd)
    for line in odd:
        assert all(np.isfinite(leaf).all() for leaf in parameters(tmp_path / "w", line).values())


@pytest.mark.slow
def test_what_is_kept_of_a_fit_that_diverges_does_not_depend_on_where_it_was_stopped(tasks, tmp_path, monkeypatch):
    """Stopped in the middle of the segment in which it diverges."""
    flags = {"strategies": ("scratch",), "source": None, "loss": "l2_loss", "learning_rate": 30.0, "epochs": 3}
    whole = transfer.run(**arguments(tasks, tmp_path / "whole", **flags))
    assert all(line.diverged for line in whole)
    monkeypatch.setattr("tljax.train.loop.FIRST_CALL", 1)
    monkeypatch.setattr("tljax.train.loop._steps_for_longest", lambda steps, seconds: 1)
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(process, "signals_handled", asked_after_one_call)
            with pytest.raises(process.Stopped):
                transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    same_run(tmp_path / "w", tmp_path / "whole")


@contextmanager
def asked_after_one_call():
    """As if a signal came during the first call of the compiled function."""
    calls = iter(range(10**6))
    yield lambda: 15 * (next(calls) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.devices(3)
def test_a_run_that_is_killed_goes_on_over_another_number_of_devices(tasks, tmp_path, monkeypatch, devices):
    """Three fits over two devices part into two and one; the one had not begun."""
    flags = {"strategies": ("scratch",), "source": None, "seeds": (0, 1, 2), "checkpoint_every": 1, "epochs": 3}
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            transfer.run(**arguments(tasks, tmp_path / "w", **flags, devices=2))
    lines = transfer.run(**arguments(tasks, tmp_path / "w", **flags, devices=devices))
    assert [line.seed for line in lines] == [0, 1, 2]
    transfer.run(**arguments(tasks, tmp_path / "whole", **flags, devices=2))
    same_run(tmp_path / "w", tmp_path / "whole")


def test_lists_may_grow_after_a_kill_and_what_was_saved_is_used(tasks, tmp_path, monkeypatch, capsys):
    flags = {"strategies": ("scratch",), "source": None, "checkpoint_every": 1, "epochs": 3, "devices": 1}
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            transfer.run(**arguments(tasks, tmp_path / "w", **{**flags, "seeds": (0,)}))
    transfer.run(**arguments(tasks, tmp_path / "w", **{**flags, "seeds": (0, 1)}))
    assert "goes on from step" in capsys.readouterr().out and not (tmp_path / "w" / "progress").exists()
    transfer.run(**arguments(tasks, tmp_path / "whole", **{**flags, "seeds": (0, 1)}))
    same_run(tmp_path / "w", tmp_path / "whole")


@pytest.mark.slow
def test_masks_of_every_kind_and_moments_of_every_phase_are_saved_and_restored(tmp_path):
    """Numbers, arrays, and two phases of Adam, through the disk."""
    model = models.build("mlp", 3, hidden=(4,), activation="relu")
    params = models.init(model, jax.random.key(0), (2, 2, 1))
    everything = masks.by_path(params, lambda path: True)
    part = {**everything, "head": {"kernel": np.eye(4, 3), "bias": 0.5}}
    spec, numbers = optimizers.spec("adam", clip=1.0)
    program = train.Spec(model, objective.loss("softmax_cross_entropy"), spec)

    def order(start, stop):
        return np.tile(np.arange(5, dtype=np.int32), (stop - start, 1))

    phases = ((0, masks.under(params, "head")), (3, part))
    trials = [
        train.Fit(params, phases, order, np.full(9, rate, np.float32), (), numbers, jax.random.key(0))
        for rate in (0.1, 0.2)
    ]
    data = train.load(np.ones((5, 2, 2, 1), np.float32), np.arange(5, dtype=np.int32) % 3)
    state = next(state for state, _ in train.fit(program, trials, data, [3, 6, 9]) if state.step == 6)
    now = resume.nothing(2)
    now = now._replace(parts=resume.joined(now.parts, resume.held(state)))
    with resume.saving(tmp_path / "group", ["a", "b"]) as save:
        save(now)
    saved = resume.find(tmp_path, ["a", "b"], program, trials, pytest.fail)
    assert saved is not None
    jax.tree.map(np.testing.assert_array_equal, saved.parts, now.parts)
    assert jax.tree.structure(saved.parts) == jax.tree.structure(now.parts)
    assert resume.find(tmp_path, ["a", "c"], program, trials, pytest.fail) is None
    grown = resume.find(tmp_path, ["c", "b", "a"], program, [trials[0], trials[1], trials[0]], pytest.fail)
    assert grown is not None and [part.fits for part in grown.parts] == [(2, 1)]
