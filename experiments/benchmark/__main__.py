"""Measure tljax beside its peers.

    python -m experiments.benchmark --manual_dir=DIR --output=benchmark.json

Sides take turns, an epoch each, in one process on the complete MNIST; medians, and the median ratio of the pairs.
Whole programs, peak memory and growth are measured in processes of their own. Peers that are not installed
(`pip install 'tljax[benchmark]'`) are left out, and said to be.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark import peers as sides
from experiments.runs import console, directory, flags, process
from experiments.runs.flags import flag
from experiments.runs.settings import Settings
from tljax.types import InputError

ROWS = ("full", "probe", "probes", "trials", "whole", "growth")


@dataclass(frozen=True)
class BenchmarkFlags:
    """What is measured."""

    manual_dir: str | None = flag(
        None, "DIR/mnist and DIR/fashion_mnist hold the four .gz files of each; needed", place="path"
    )
    rows: tuple[str, ...] = flag(ROWS, "what is measured")
    rounds: int = flag(5, "turns (epochs) of each side")
    output: str | None = flag(None, "a JSON file for all that was measured", place="new")


class Measured(NamedTuple):
    """One line of the table."""

    row: str
    side: str
    value: float
    """Seconds, GFLOP/s, a share or MB, as `row` says."""
    ratio: float | None = None
    """The side's median over that of tljax: how many times as long, or as much, it takes."""
    values: Sequence[float] = ()


Side = Iterator[Any]


def ceiling() -> Side:
    """A product of 4096 x 4096 float32 matrices each time it is asked: what the machine can do."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((4096, 4096))
    product = jax.jit(jnp.matmul)
    while True:
        yield jax.block_until_ready(product(a, a))


PRODUCT = 2 * 4096**3
"""FLOPs of it."""
EPOCH = 600 * 2 * 100 * (2 * 784 * 512 + 3 * 512 * 10)
"""FLOPs of the products in an epoch of the reference, 600 steps of 100: the input needs no gradient."""


def turns(taking: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's turns, after a first that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in taking}
    for round in range(rounds + 1):
        for name, side in taking.items():
            start = time.perf_counter()
            next(side)
            took = time.perf_counter() - start
            if round:
                seconds[name].append(took)
    return seconds


def compared(row: str, seconds: Mapping[str, Sequence[float]], base: str) -> list[Measured]:
    """Medians, and medians of the ratios in each round."""
    return [
        Measured(row, name, float(np.median(took)), float(np.median(np.divide(took, seconds[base]))), took)
        for name, took in seconds.items()
    ]


def full(data: sides.Arrays, rounds: int) -> list[Measured]:
    """Full fine-tuning, and its share of what the machine can do."""
    taking: dict[str, Side] = {
        "large product": ceiling(),
        "tljax": sides.epochs(1, data=data),
        "tljax, 4 at once": sides.epochs(4, data=data),
    }
    if _there("torch"):
        taking |= {"PyTorch": sides.pytorch(data), "PyTorch, compiled": sides.pytorch(data, compiled=True)}
    if _there("keras"):
        taking |= {"Keras on JAX": sides.keras(data)}
    taking |= {"a plain jitted step": sides.plain(data)}
    seconds = turns(taking, rounds)
    products = np.array(seconds.pop("large product"))
    seconds["tljax, 4 at once"] = [took / 4 for took in seconds["tljax, 4 at once"]]
    found = [Measured("large product, GFLOP/s", "JAX", float(np.median(PRODUCT / products / 1e9)))]
    found += compared("full fine-tune, s/epoch", seconds, "tljax")
    for name in ("tljax", "tljax, 4 at once"):
        share = EPOCH / np.array(seconds[name]) / (PRODUCT / products)
        found += [Measured("full fine-tune, share of the large product", name, float(np.median(share)))]
    return found


def probe(data: sides.Arrays, rounds: int) -> list[Measured]:
    """A linear probe."""
    taking = {"tljax": sides.epochs(1, "head_only", data=data)}
    if _there("torch"):
        taking |= {"PyTorch, layer frozen": sides.pytorch(data, frozen=True)}
        taking |= {"PyTorch, on features": sides.pytorch(data, features=True)}
    return compared("linear probe, s/epoch", turns(taking, rounds), "tljax")


def many(data: sides.Arrays) -> list[Measured]:
    """32 linear probes of 10 epochs; PyTorch trains two of them, and is counted 16 times."""
    seconds = {"tljax": [sides.probes(data)]}
    if _there("torch"):
        start = time.perf_counter()
        for _ in range(2):
            side = sides.pytorch(data, frozen=True)
            for _ in range(10):
                next(side)
        seconds["PyTorch, one after another (2 x 16)"] = [16 * (time.perf_counter() - start)]
    return compared("32 linear probes of 10 epochs, s", seconds, "tljax")


def trials(rounds: int) -> list[Measured]:
    """64 trials of a search, together and one by one, and how far their accuracies differ."""
    side = sides.searched()
    found = [next(side) for _ in range(rounds)]
    seconds = {"tljax, together": [one[0] for one in found], "tljax, one by one": [one[1] for one in found]}
    together, alone = found[-1][2]
    row = "64 trials of a linear probe"
    return [
        *compared(f"{row}, s", seconds, "tljax, together"),
        Measured(f"{row}: accuracies differ by at most, points", "tljax", float(100 * np.abs(together - alone).max())),
        Measured(f"{row}: on average by, points", "tljax", float(100 * abs((together - alone).mean()))),
    ]


def whole(folder: Path) -> list[Measured]:
    """The reference experiment, one seed, from shell to table, and the peak memory of its process."""
    here = str(Path(__file__).parent.parent / "flags" / "reference.flags")
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ("tljax, cold", "tljax, warm"):
            command = ["experiments.transfer", f"--flagfile={here}", "--seeds=0", f"--manual_dir={folder}"]
            command += [f"--data_dir={place}/data", f"--compilation_cache={place}/compiled"]
            found[name] = _process([*command, f"--workdir={place}/{name[-4:]}"])
    if _there("torch"):
        found["PyTorch"] = _process(["experiments.benchmark.peers", "reference", str(folder)])
    rows = []
    for name, (seconds, peak) in found.items():
        rows.append(
            Measured("reference.flags from shell to table, s", name, seconds, seconds / found["tljax, warm"][0])
        )
        rows.append(Measured("reference.flags, peak memory, MB", name, peak, peak / found["tljax, warm"][1]))
    return rows


def growth(folder: Path) -> list[Measured]:
    """Seconds an epoch and peak memory of full fine-tuning, by examples and by width, each in its own process."""
    rows = []
    cases = [(6_000, 512), (60_000, 512), (600_000, 512), *((60_000, width) for width in (128, 1024, 4096))]
    for examples, width in cases:
        found = {}
        for side in ("tljax", *(("PyTorch",) if _there("torch") else ())):
            call = ["experiments.benchmark.peers", "growth", side, str(examples), str(width), str(folder / "mnist")]
            output: dict[str, float] = {}
            _, peak = _process(call, output)
            found[side] = (output["seconds"], peak)
        for side, (seconds, peak) in found.items():
            what = f"{examples:,} examples, width {width}"
            rows.append(Measured(f"{what}: s/epoch", side, seconds, seconds / found["tljax"][0]))
            rows.append(Measured(f"{what}: peak memory, MB", side, peak, peak / found["tljax"][1]))
    return rows


def _process(arguments: Sequence[str], output: dict[str, float] | None = None) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a Python module run by itself; its last line as JSON into `output`."""
    start, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT, text=True)
        while running.poll() is None:
            peak = max(peak, _peak(running.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        log.seek(0)
        text = log.read()
    if running.returncode:
        raise InputError(f"python -m {' '.join(arguments)} fails: {text.strip().splitlines()[-1]}")
    if output is not None:
        output |= json.loads(text.strip().splitlines()[-1])
    return seconds, peak


def _peak(process: int) -> float:
    """Its most memory so far, in MB: what `getrusage` tells of a child begins with the memory of its parent."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
        return float(text.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def run(manual_dir: str | None, rows: Sequence[str] = ROWS, rounds: int = 5, output: str | None = None) -> None:
    """Measure, print the table, write the JSON."""
    if not manual_dir:
        raise InputError("--manual_dir is not given: name the folder with the complete mnist/ and fashion_mnist/")
    for name in rows:
        if name not in ROWS:
            raise InputError(f"--rows={','.join(rows)}: '{name}' is none of {', '.join(ROWS)}")
    if rounds < 1:
        raise InputError(f"--rounds={rounds}: it must be at least 1")
    from tljax import data

    process.prepare(Settings.from_flags())
    train = data.load("mnist", manual_dir=manual_dir).train
    arrays = (np.asarray(train.images), np.asarray(train.labels))
    folder = Path(manual_dir).absolute()
    left = [name for name in ("torch", "keras") if not _there(name)]
    work: dict[str, Callable[[], list[Measured]]] = {
        "full": lambda: full(arrays, rounds),
        "probe": lambda: probe(arrays, rounds),
        "probes": lambda: many(arrays),
        "trials": lambda: trials(rounds),
        "whole": lambda: whole(folder),
        "growth": lambda: growth(folder),
    }
    found: list[Measured] = []
    for name in rows:
        found += work[name]()
    notes = [_about(), *(f"{name} is not installed, so its columns are left out" for name in left)]
    cells = [
        (m.row, m.side, f"{m.value:.3g}" if m.value < 100 else f"{m.value:,.0f}", f"{m.ratio:.2f}" if m.ratio else "-")
        for m in found
    ]
    console.table("benchmark", ["what", "side", "median", "over tljax"], cells, notes)
    if output:
        Path(output).write_text(json.dumps({"about": _about(), "rows": [m._asdict() for m in found]}, indent=1))


def _about() -> str:
    names = [name for name in ("jax", "torch", "keras") if _there(name)]
    versions = ", ".join(f"{name} {directory.version(name)}" for name in names)
    return f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {versions}, {os.cpu_count()} cores"


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), lambda _, asked: run(**vars(asked)), BenchmarkFlags)
