"""The rows for an accelerator: every side in a process of its own, one of them at work at a time.

The sides of a row start together, compile and train their first turn; then they take turns, round by round. So no
side's threads disturb another's, and what drifts on the machine is the same for all. A side that fails, or is not ready
in time, is left out with its reason; the others are measured.
"""

import contextlib
import functools
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.accelerator_sides import Work

ROWS = ("fit", "fits", "head", "vit", "vits", "most_fits", "study")
"""One fit; 8 and 64 of them; the head of one alone; a vision transformer; 8 of them; 512 fits; a study."""
PRECISIONS = ("float32", "tf32", "bfloat16")
SIDES = "experiments.benchmark.accelerator_sides"


class Measurement(NamedTuple):
    """One line of the table."""

    row: str
    side: str
    value: float
    """In seconds, GFLOP/s or MB, or a share: `row` names the unit."""
    ratio: float | None = None
    """The side's median over that of tljax: how many times as long, or as much, it takes."""
    values: Sequence[float] = ()
    device: str = ""
    """The kind of the device, where a row is one for an accelerator."""


class Options(NamedTuple):
    """What is measured of each row."""

    rounds: int
    steps: int
    """Of a turn."""
    fits: tuple[int, ...]
    """How many fits side by side: the last number is the row most_fits, the others are the row fits."""
    precisions: tuple[str, ...]
    """'float32', 'tf32', and 'bfloat16' of tljax alone, with parameters, losses and sums in float32."""
    patience: float
    """Seconds within which a side's first turn ends, and each later one."""
    torch_python: str
    """The Python that has PyTorch; "" for none."""


class Failure(Exception):
    """Why a side is left out."""


class Process:
    """A side in its own process."""

    def __init__(self, folder: Path, work: Work, python: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [python, "-m", SIDES, "serve", str(folder), json.dumps(work._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )

    def answer(self, patience: float) -> dict[str, Any]:
        """Its next line; raises Failure if it ends, or says nothing for so many seconds."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, patience))[0]:
            raise Failure("it takes longer than --patience")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = [line for line in self.errors.read().strip().splitlines() if line.strip()]
            raise Failure(lines[-1][:300] if lines else f"it ends with code {self.process.returncode}")
        return dict(json.loads(line))

    def turn(self, patience: float) -> float:
        """Seconds of one more turn."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        return float(self.answer(patience)["seconds"])

    def peak(self, patience: float) -> float:
        """The most bytes that it took on the device, at its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return float(self.answer(patience)["peak_bytes"])

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


def works(row: str, options: Options, cuda: bool) -> dict[str, dict[str, Work]]:
    """{what is measured: {side: what it trains}} of a row, tljax first; a CPU captures no graphs."""
    few, most = options.fits[:-1], options.fits[-1:]
    model = "vit" if row in ("vit", "vits") else "mlp"
    what = "vit, 6 blocks, width 64" if model == "vit" else "784-512-10"
    steps, turns = turns_of(row, options)
    cases: dict[str, dict[str, Work]] = {}
    for precision in options.precisions:
        work = functools.partial(Work, model=model, precision=precision, steps=steps, turns=turns)
        if row in ("fit", "vit"):
            cases[f"{what}, 1 fit, {precision}"] = {
                "tljax": work("tljax"),
                "plain JAX": work("plain"),
                "PyTorch, eager": work("eager"),
                "PyTorch, compiled": work("compiled"),
                **({"PyTorch, captured in a CUDA graph": work("captured")} if cuda else {}),
            }
        elif row == "head":
            captured = {
                "PyTorch, captured, on features": work("captured", trains="head"),
                "PyTorch, captured, layer frozen": work("captured", trains="head_in_step"),
            }
            cases[f"{what}, head alone, 1 fit, {precision}"] = {
                "tljax": work("tljax", trains="head"),
                "plain JAX, on features": work("plain", trains="head"),
                "PyTorch, eager, on features": work("eager", trains="head"),
                **(captured if cuda else {}),
            }
        else:
            for count in {"fits": few, "most_fits": most, "vits": few[:1]}[row]:
                several = {"tljax, side by side": work("tljax", fits=count, many="vmap")}
                several |= {"plain JAX, vmap": work("plain", fits=count)}
                several |= {"tljax, as auto decides": work("tljax", fits=count)} if count == few[0] else {}
                ensemble = "PyTorch, torch.func ensemble" + (" in a CUDA graph" if cuda else "")
                cases[f"{what}, {count} fits, {precision}"] = several | {ensemble: work("ensemble", fits=count)}
    return {
        case: {name: work for name, work in sides.items() if work.precision != "bfloat16" or work.side == "tljax"}
        for case, sides in cases.items()
    }


def turns_of(row: str, options: Options) -> tuple[int, int]:
    """(steps of a turn, turns) of a row: those of vision transformers are a sixth, and 512 fits take three turns."""
    steps = max(1, options.steps // 6) if row in ("vit", "vits") else options.steps
    return steps, 3 if row == "most_fits" else options.rounds + 2


def measure(row: str, folder: Path, options: Options, cuda: bool, note: Callable[[str], None]) -> list[Measurement]:
    """Measure one row; why a side is left out goes to `note`."""
    cases = works(row, options, cuda)
    steps, turns = turns_of(row, options)
    sides = {(case, name): work for case, several in cases.items() for name, work in several.items()}
    started: dict[tuple[str, str], Process] = {}
    first: dict[tuple[str, str], dict[str, Any]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], float] = {}

    def leave_out(side: tuple[str, str], failure: Failure) -> None:
        note(f"{side[0]}: {side[1]} is left out: {failure}")
        started.pop(side).end()

    try:
        for side, work in sides.items():
            python = sys.executable if work.side in ("tljax", "plain") else options.torch_python
            if python:
                started[side] = Process(folder, work, python)
        until = time.monotonic() + options.patience
        for side in list(started):
            try:
                first[side] = started[side].answer(until - time.monotonic())
                seconds[side] = []
            except Failure as failure:
                leave_out(side, failure)
        for turn in range(1, turns):
            for side in list(started):
                try:
                    took = started[side].turn(options.patience)
                    seconds[side] += [took] if turn > 1 or turns == 3 else []  # this one still loads small programs
                except Failure as failure:
                    leave_out(side, failure)
        for side in list(started):
            try:
                peaks[side] = started[side].peak(options.patience)
            except Failure as failure:
                leave_out(side, failure)
    finally:
        for process in started.values():
            process.end()
    unit = "epoch" if steps == 600 else f"{steps} steps"
    measurements: list[Measurement] = []
    for case, several in cases.items():
        there = [(case, name) for name in several if seconds.get((case, name))]
        device = {side: str(first[side]["device"]) for side in there}
        measured: dict[str, Mapping[tuple[str, str], Sequence[float]]] = {
            f"s/{unit}": {side: seconds[side] for side in there},
            "start and first turn, s": {
                side: [float(first[side]["reading"] + first[side]["first_turn"])] for side in there
            },
            "peak on the device, MB": {side: [peaks[side] / 1e6] for side in there if side in peaks},
        }
        for what, values in measured.items():
            base = values.get((case, next(iter(several))))  # tljax; without it there are no ratios
            for side, numbers in values.items():
                ratio = float(np.median(np.divide(numbers, base[: len(numbers)]))) if base else None
                median = float(np.median(numbers))
                measurements.append(Measurement(f"{case}: {what}", side[1], median, ratio, numbers, device[side]))
        for side in there:
            loss = first[side]["loss"]
            measurements.append(
                Measurement(f"{case}: loss after the first turn", side[1], loss[0], None, loss, device[side])
            )
    return measurements


def cuda_there(python: str) -> bool:
    """Whether a Python's PyTorch finds CUDA."""
    if not python:
        return False
    code = "import torch; print(torch.cuda.is_available())"
    output = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return output.stdout.strip() == "True"


@contextlib.contextmanager
def prepared(manual_dir: str | None, rows: Sequence[str], options: Options) -> Iterator[Path]:
    """A folder with what the sides of these rows share."""
    models = ["mlp", *(["vit"] if {"vit", "vits"} & set(rows) else [])]
    fits = max(options.fits) if {"most_fits"} & set(rows) else max(options.fits[:-1])
    words = {"manual_dir": manual_dir, "fits": fits, "steps": options.steps, "models": models}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", SIDES, "prepare", folder, json.dumps(words)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=True,
        )
        yield Path(folder)


def python_with_torch(given: str | None) -> str:
    """The Python that has PyTorch: the one that is given, else this one if it has it, else ""."""
    return given or (sys.executable if importlib.util.find_spec("torch") else "")
