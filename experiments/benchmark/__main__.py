"""Measure tljax beside its peers.

    python -m experiments.benchmark --manual_dir=DIR --output=benchmark.json

Sides take turns, an epoch each, in one process on the complete MNIST; medians, and the median ratio of the pairs.
Whole programs, peak memory and growth are measured in processes of their own. Peers that are not installed
(`pip install 'tljax[benchmark]'`) are left out, and a note names them.

    python -m experiments.benchmark --rows=accelerator --manual_dir=DIR --output=accelerator.json

These rows are for a GPU: each side in a process of its own, in turn, at float32 and at tf32. `--turn_steps=20
--fits=2,3,4` tries them out on a CPU. Without `--manual_dir` the images are those of `mnist_10k`, six times, and the
row `study` is left out. The file is written after each row.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
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
from typing import Any

import numpy as np

from experiments.benchmark import accelerator, peers
from experiments.benchmark.accelerator import Measurement
from experiments.runs import command_line, console, directory, process
from experiments.runs.command_line import flag
from experiments.runs.settings import Settings
from tljax.types import InputError

ROWS = ("full", "probe", "probes", "trials", "stream", "whole", "growth")


@dataclass(frozen=True)
class BenchmarkFlags:
    """Which rows are measured, on which data, and where they are written."""

    manual_dir: str | None = flag(
        None, "DIR/mnist and DIR/fashion_mnist hold the four .gz files of each; needed on a CPU", place="path"
    )
    rows: tuple[str, ...] = flag(ROWS, f"what is measured; accelerator stands for {','.join(accelerator.ROWS)}")
    rounds: int = flag(5, "turns (epochs) of each side")
    fits: tuple[int, ...] = flag((8, 64, 512), "how many fits at once, in the accelerator's rows; the last alone")
    turn_steps: int = flag(600, "steps of a turn in the accelerator's rows")
    precisions: tuple[str, ...] = flag(
        (), "of products in these rows: float32,tf32 where there is CUDA; bfloat16 of tljax"
    )
    patience: float = flag(60.0, "seconds for the first turn of a side in these rows, and for each later one")
    torch_python: str | None = flag(None, "in these rows the Python that has PyTorch; default this one", place="path")
    output: str | None = flag(None, "a JSON file for all that was measured", place="new")


Side = Iterator[Any]
"""A side of the comparison: an iterator that works for one turn (an epoch) each time it is advanced."""


def ceiling() -> Side:
    """A side that multiplies 4096 x 4096 float32 matrices: the most that the machine can do."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((4096, 4096))
    product = jax.jit(jnp.matmul)
    while True:
        yield jax.block_until_ready(product(a, a))


PRODUCT = 2 * 4096**3
"""FLOPs of the product in `ceiling`."""
EPOCH = 600 * 2 * 100 * (2 * 784 * 512 + 3 * 512 * 10)
"""FLOPs of the products in an epoch of the reference, 600 steps of 100: the input needs no gradient."""


def turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's turns, after a first turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            next(side)
            took = time.perf_counter() - start
            if round:
                seconds[name].append(took)
    return seconds


def medians(row: str, seconds: Mapping[str, Sequence[float]], base: str) -> list[Measurement]:
    """Each side's median, and the median over rounds of its ratio to the base."""
    return [
        Measurement(row, name, float(np.median(took)), float(np.median(np.divide(took, seconds[base]))), took)
        for name, took in seconds.items()
    ]


def full(data: peers.Arrays, rounds: int) -> list[Measurement]:
    """Measure full fine-tuning, and its share of the most that the machine can do."""
    costs: list[Any] = []
    sides: dict[str, Side] = {
        "large product": ceiling(),
        "tljax": peers.epochs(1, data=data, costs=costs),
        "tljax, 4 at once": peers.epochs(4, data=data),
    }
    if _installed("torch"):
        sides |= {"PyTorch": peers.pytorch(data), "PyTorch, compiled": peers.pytorch(data, compiled=True)}
    if _installed("keras"):
        sides |= {"Keras on JAX": peers.keras(data)}
    sides |= {"a plain jitted step": peers.plain(data)}
    seconds = turns(sides, rounds)
    products = np.array(seconds.pop("large product"))
    seconds["tljax, 4 at once"] = [took / 4 for took in seconds["tljax, 4 at once"]]
    measurements = [Measurement("large product, GFLOP/s", "JAX", float(np.median(PRODUCT / products / 1e9)))]
    measurements += medians("full fine-tune, s/epoch", seconds, "tljax")
    for name in ("tljax", "tljax, 4 at once"):
        share = EPOCH / np.array(seconds[name]) / (PRODUCT / products)
        measurements += [Measurement("full fine-tune, share of the large product", name, float(np.median(share)))]
    units = (("million FLOPs a step", costs[0].flops), ("peak memory of the program, MB", costs[0].peak_bytes))
    measurements += [Measurement(f"full fine-tune, {unit}", "tljax", value / 1e6) for unit, value in units if value]
    return measurements


def probe(data: peers.Arrays, rounds: int) -> list[Measurement]:
    """Measure a linear probe."""
    sides = {"tljax": peers.epochs(1, "head_only", data=data)}
    if _installed("torch"):
        sides |= {"PyTorch, layer frozen": peers.pytorch(data, frozen=True)}
        sides |= {"PyTorch, on features": peers.pytorch(data, features=True)}
    return medians("linear probe, s/epoch", turns(sides, rounds), "tljax")


def probes(data: peers.Arrays) -> list[Measurement]:
    """Measure 32 linear probes of 10 epochs; PyTorch trains two of them, and its time counts 16 times."""
    seconds = {"tljax": [peers.probes(data)]}
    if _installed("torch"):
        start = time.perf_counter()
        for _ in range(2):
            side = peers.pytorch(data, frozen=True)
            for _ in range(10):
                next(side)
        seconds["PyTorch, one after another (2 x 16)"] = [16 * (time.perf_counter() - start)]
    return medians("32 linear probes of 10 epochs, s", seconds, "tljax")


def trials(rounds: int) -> list[Measurement]:
    """Measure 64 trials of a search, together and one by one, and how far their accuracies differ."""
    side = peers.search_trials()
    results = [next(side) for _ in range(rounds)]
    seconds = {
        "tljax, together": [result[0] for result in results],
        "tljax, one by one": [result[1] for result in results],
    }
    together, alone = results[-1][2]
    row = "64 trials of a linear probe"
    return [
        *medians(f"{row}, s", seconds, "tljax, together"),
        Measurement(
            f"{row}: accuracies differ by at most, points", "tljax", float(100 * np.abs(together - alone).max())
        ),
        Measurement(f"{row}: on average by, points", "tljax", float(100 * abs((together - alone).mean()))),
    ]


def stream(data: peers.Arrays, rounds: int) -> list[Measurement]:
    """Measure a full fine-tune on data that are streamed, and which part of its time it waits for them.

    Reading a batch costs a thread nothing more than copying it, or a tenth, or a fifth of a step.
    """
    resident = peers.stream(data)
    next(resident)  # compiles
    step = next(resident)[0] / (len(data[1]) // peers.BATCH)
    shares = {"nothing": 0.0, "a tenth of a step": 0.1, "a fifth of a step": 0.2}
    sides = {
        "resident": resident,
        **{f"streamed, a batch costs {cost}": peers.stream(data, share, step) for cost, share in shares.items()},
    }
    turns_of: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for round in range(rounds + 1):
        for name, side in sides.items():
            turn = next(side)
            if round:
                turns_of[name].append(turn)
    seconds = {name: [took for took, _ in turns] for name, turns in turns_of.items()}
    waiting = {
        name: [waited / took for took, waited in turns] for name, turns in turns_of.items() if name != "resident"
    }
    return [
        *medians("full fine-tune of a stream, s/epoch", seconds, "resident"),
        *(
            Measurement("of it waiting for data, a share", name, float(np.median(parts)), values=parts)
            for name, parts in waiting.items()
        ),
    ]


def whole(folder: Path) -> list[Measurement]:
    """Measure the reference experiment, one seed, from shell to table, and the peak memory of its process."""
    flagfile = str(Path(__file__).parent.parent / "flags" / "reference.flags")
    costs: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("tljax, cold", "tljax, warm"):
            command = ["experiments.transfer", f"--flagfile={flagfile}", "--seeds=0", f"--manual_dir={folder}"]
            command += [f"--data_dir={temporary}/data", f"--compilation_cache={temporary}/compiled"]
            costs[name] = _process([*command, f"--workdir={temporary}/{name[-4:]}"])
    if _installed("torch"):
        costs["PyTorch"] = _process(["experiments.benchmark.peers", "reference", str(folder)])
    rows = []
    for name, (seconds, peak) in costs.items():
        rows.append(
            Measurement("reference.flags from shell to table, s", name, seconds, seconds / costs["tljax, warm"][0])
        )
        rows.append(Measurement("reference.flags, peak memory, MB", name, peak, peak / costs["tljax, warm"][1]))
    return rows


def growth(folder: Path) -> list[Measurement]:
    """Measure time and peak memory of full fine-tuning, by examples and by width, each in its own process."""
    rows = []
    cases = [(6_000, 512), (60_000, 512), (600_000, 512), *((60_000, width) for width in (128, 1024, 4096))]
    for examples, width in cases:
        costs = {}
        for side in ("tljax", *(("PyTorch",) if _installed("torch") else ())):
            call = ["experiments.benchmark.peers", "growth", side, str(examples), str(width), str(folder / "mnist")]
            output: dict[str, float] = {}
            _, peak = _process(call, output)
            costs[side] = (output["seconds"], peak)
        for side, (seconds, peak) in costs.items():
            case = f"{examples:,} examples, width {width}"
            rows.append(Measurement(f"{case}: s/epoch", side, seconds, seconds / costs["tljax"][0]))
            rows.append(Measurement(f"{case}: peak memory, MB", side, peak, peak / costs["tljax"][1]))
    return rows


def _process(arguments: Sequence[str], output: dict[str, float] | None = None) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a Python module in its own process; its last line, as JSON, goes to `output`."""
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
    """The most memory of a process so far, in MB: `getrusage` of a child begins with the memory of its parent."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
        return float(text.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def _installed(name: str) -> bool:
    """Whether a library is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def study(folder: Path, steps: int) -> Iterator[Measurement]:
    """Measure study.flags from shell to table, cold and with its programs compiled; shorter where turns are."""
    shorter = [] if steps == 600 else [f"--steps={steps}", f"--source_steps={steps}", "--seeds=0,1"]
    flagfile = str(Path(__file__).parent.parent / "flags" / "study.flags")
    row = " ".join(["study.flags", *shorter])
    colds = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("tljax, cold", "tljax, warm"):
            command = ["experiments.compare", f"--flagfile={flagfile}", f"--manual_dir={folder}", *shorter]
            command += [f"--data_dir={temporary}/data", f"--compilation_cache={temporary}/compiled"]
            seconds, peak = _process([*command, f"--workdir={temporary}/{name[-4:]}"])
            colds += [(seconds, peak)]
            yield Measurement(f"{row} from shell to table, s", name, seconds, seconds / colds[0][0])
            yield Measurement(f"{row}, peak memory of the host, MB", name, peak, peak / colds[0][1])


def run(
    manual_dir: str | None,
    rows: Sequence[str] = ROWS,
    rounds: int = 5,
    output: str | None = None,
    fits: Sequence[int] = (8, 64, 512),
    turn_steps: int = 600,
    precisions: Sequence[str] = (),
    patience: float = 60.0,
    torch_python: str | None = None,
) -> None:
    """Measure the rows, print the table and write the JSON; raises InputError for a wrong flag."""
    expanded = [name for row in rows for name in (accelerator.ROWS if row == "accelerator" else (row,))]
    known = (*ROWS, "accelerator", *accelerator.ROWS)
    if not manual_dir and set(expanded) & set(ROWS):
        raise InputError("--manual_dir is not given: name the folder with the complete mnist/ and fashion_mnist/")
    for name in expanded:
        if name not in known:
            raise InputError(f"--rows={','.join(rows)}: '{name}' is none of {', '.join(known)}")
    for name, number in {"rounds": rounds, "turn_steps": turn_steps}.items():
        if number < 1:
            raise InputError(f"--{name}={number}: it must be at least 1")
    if len(fits) < 2 or min(fits) < 1 or list(fits) != sorted(fits):
        raise InputError(f"--fits={','.join(map(str, fits))}: name at least two numbers of fits, rising")
    if unknown := set(precisions) - set(accelerator.PRECISIONS):
        raise InputError(
            f"--precisions={','.join(precisions)}: '{min(unknown)}' is none of {', '.join(accelerator.PRECISIONS)}"
        )
    folder = Path(manual_dir).absolute() if manual_dir else None
    missing = [name for name in ("torch", "keras") if not _installed(name)]
    notes = [f"{name} is not installed, so its columns are left out" for name in missing]
    measurements: list[Measurement] = []

    def write() -> None:
        if output:
            about = {"about": _about(), "rows": [m._asdict() for m in measurements], "notes": notes}
            Path(output).write_text(json.dumps(about, indent=1))

    if on_host := [name for name in expanded if name in ROWS]:
        for row in _of_the_host(on_host, Path(manual_dir or "").absolute(), rounds):
            measurements += row
            write()
    if on_accelerator := [name for name in expanded if name in accelerator.ROWS]:
        python = accelerator.python_with_torch(torch_python)
        cuda = accelerator.cuda_there(python)
        precisions = tuple(precisions) or (("float32", "tf32") if cuda else ("float32",))
        options = accelerator.Options(rounds, turn_steps, tuple(fits), precisions, patience, python)
        for rest in _of_the_accelerator(on_accelerator, folder, options, cuda, notes.append):
            measurements.append(rest)
            write()
    cells = [
        (
            m.row,
            m.side,
            _number(m.value, 6 if " loss " in m.row else 3),
            _range(m),
            f"{m.ratio:.2f}" if m.ratio else "-",
        )
        for m in measurements
    ]
    devices = sorted({m.device for m in measurements if m.device})
    about = f"{_about()}{''.join(f', {device}' for device in devices)}"
    console.table("benchmark", ["what", "side", "median", "range", "over tljax"], cells, [about, *notes])
    write()


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if value < 100 else f"{value:,.0f}"


def _range(measurement: Measurement) -> str:
    """The least and the greatest of the values of which the median is."""
    values = measurement.values
    return f"{_number(min(values))} to {_number(max(values))}" if len(values) > 1 else "-"


def _of_the_host(rows: Sequence[str], folder: Path, rounds: int) -> Iterator[list[Measurement]]:
    """The measurements of each of the rows for a CPU."""
    from tljax import data

    process.prepare(Settings.from_flags())
    train = data.load("mnist", manual_dir=str(folder)).train
    arrays = (np.asarray(train.arrays), np.asarray(train.targets))
    work: dict[str, Callable[[], list[Measurement]]] = {
        "full": lambda: full(arrays, rounds),
        "probe": lambda: probe(arrays, rounds),
        "probes": lambda: probes(arrays),
        "trials": lambda: trials(rounds),
        "stream": lambda: stream(arrays, rounds),
        "whole": lambda: whole(folder),
        "growth": lambda: growth(folder),
    }
    for name in rows:
        yield work[name]()


def _of_the_accelerator(
    rows: Sequence[str],
    manual_dir: Path | None,
    options: accelerator.Options,
    cuda: bool,
    note: Callable[[str], None],
) -> Iterator[Measurement]:
    """The measurements of the rows for an accelerator; this process leaves it to those of the sides."""
    if not options.torch_python:
        note("there is no Python with PyTorch, so the accelerator's rows are without it")
    if not cuda:
        note("there is no CUDA device, so nothing is captured in a CUDA graph")
    sided = [name for name in rows if name != "study"]
    if sided:
        if not manual_dir:
            note("the images are those of mnist_10k, six times")
        with accelerator.prepared(str(manual_dir) if manual_dir else None, sided, options) as folder:
            for name in sided:
                yield from accelerator.measure(name, folder, options, cuda, note)
    if "study" in rows:
        if not manual_dir:
            note("the row study is left out: --manual_dir is not given")
            return
        try:
            yield from study(manual_dir, options.steps)
        except InputError as error:
            note(f"the row study is left out: {error}")


def _about() -> str:
    """The line on the date, the versions and the machine."""
    names = [name for name in ("jax", "torch", "keras") if _installed(name)]
    versions = ", ".join(f"{name} {directory.version(name)}" for name in names)
    return f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {versions}, {os.cpu_count()} cores"


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), lambda _, benchmark_flags: run(**vars(benchmark_flags)), BenchmarkFlags)
