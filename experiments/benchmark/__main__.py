"""Measure tljax beside its peers.

    python -m experiments.benchmark --manual_dir=DIR --output=benchmark.json

Each side is a process of its own; one works at a time, and they take turns. Told are medians over rounds, and the
median of the ratios of rounds, with their ranges. Peers that are not installed (`pip install 'tljax[benchmark]'`) are
left out, and a note names them.

    python -m experiments.benchmark --rows=accelerator --manual_dir=DIR --minutes=9 --output=accelerator.json

These rows are for a GPU, the most important first. Without `--manual_dir` the images of all rows are those of
`mnist_10k`, six times, and the rows of whole programs are left out, which a note says. The file is written after each
case.

    python -m experiments.benchmark --baseline=OTHER --manual_dir=DIR --output=before_and_after.json

OTHER is another checkout of tljax, such as `git worktree add OTHER COMMIT` makes it: its sides take turns with those of
this one, and the ratios of before to after have a table of their own. `--turn_steps=20 --rounds=1 --fits=2,3` tries
rows out.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmark.processes import CHECKOUT, SIDES, Patience, environment
from experiments.benchmark.rows import (
    OF_PROGRAMS,
    ON_ACCELERATOR,
    ON_HOST,
    PRECISIONS,
    Measurement,
    Options,
    cases,
    measure,
    shared,
)
from experiments.runs import command_line, console, directory
from experiments.runs.command_line import flag
from tljax.types import InputError

ALL = tuple(dict.fromkeys((*ON_HOST, *ON_ACCELERATOR)))


@dataclass(frozen=True)
class BenchmarkFlags:
    """Which rows are measured, on which data, beside what, and where they are written."""

    manual_dir: str | None = flag(
        None, "DIR/mnist and DIR/fashion_mnist hold the four .gz files of each; rows of programs need it", place="path"
    )
    rows: tuple[str, ...] = flag(
        ON_HOST, f"what is measured: {','.join(ALL)}; accelerator stands for {','.join(ON_ACCELERATOR)}"
    )
    rounds: int = flag(7, "turns of each side that are counted")
    program_rounds: int = flag(3, "how often whole programs run, in the rows whole and study")
    fits: tuple[int, ...] = flag((8, 64, 512), "how many fits at once; the last alone is the row most_fits")
    turn_steps: int = flag(600, "steps of a turn, of batches of 100")
    precisions: tuple[str, ...] = flag(
        (), "of products, where rows have several: float32,tf32 where there is CUDA, else float32; bfloat16 of tljax"
    )
    patience: float = flag(120.0, "seconds for the start and first turn of a side, and for each later one")
    program_patience: float = flag(1800.0, "seconds for a turn of whole programs, cold and warm")
    at_once: int = flag(1, "how many sides start at the same time; of several, what a start takes is no figure")
    minutes: float | None = flag(None, "no case begins, and none goes on, after so many; default without end")
    baseline: str | None = flag(None, "another checkout of tljax, measured in turn with this one", place="path")
    torch_python: str | None = flag(None, "the Python that has PyTorch; default this one", place="path")
    output: str | None = flag(None, "a JSON file for all that was measured", place="new")


def run(
    manual_dir: str | None,
    rows: Sequence[str] = ON_HOST,
    rounds: int = 7,
    program_rounds: int = 3,
    fits: Sequence[int] = (8, 64, 512),
    turn_steps: int = 600,
    precisions: Sequence[str] = (),
    patience: float = 120.0,
    program_patience: float = 1800.0,
    at_once: int = 1,
    minutes: float | None = None,
    baseline: str | None = None,
    torch_python: str | None = None,
    output: str | None = None,
) -> None:
    """Measure the rows, print the table and write the JSON; raises InputError for a wrong flag."""
    until = time.monotonic() + (60 * minutes if minutes is not None else float("inf"))
    names = _names(rows)
    times = {"minutes": minutes, "patience": patience, "program_patience": program_patience}
    _check(manual_dir, names, rounds, program_rounds, fits, turn_steps, precisions, at_once, baseline, times)
    python = torch_python or (sys.executable if importlib.util.find_spec("torch") else "")
    cuda = _cuda_there()
    options = Options(
        rounds,
        turn_steps,
        tuple(fits),
        tuple(precisions) or (("float32", "tf32") if cuda else ("float32",)),
        python,
        Path(baseline).absolute() if baseline else None,
        cuda,
        importlib.util.find_spec("keras") is not None,
        program_rounds,
        Path(manual_dir).absolute() if manual_dir else None,
    )
    notes = list(_absent(options, names))
    if not manual_dir:
        names = [name for name in names if name not in OF_PROGRAMS]
    measurements: list[Measurement] = []
    versions: dict[str, str] = {}

    def write() -> None:
        if output:
            lines = [measurement._asdict() for measurement in measurements]
            whole = {"about": _about(versions, measurements, options), "rows": lines, "notes": notes}
            Path(output).write_text(json.dumps(whole, indent=1))

    with _prepared(names, options) as folder:
        for name, case, sides in [(row, *case) for row in names for case in cases(row, options).items()]:
            if time.monotonic() > until:
                notes.append(f"{case}: left out, as the time is over")
                continue
            seconds = program_patience if name in OF_PROGRAMS else patience
            case_measurements, used = measure(
                name, case, sides, folder, options, Patience(seconds, seconds, until), at_once, notes.append
            )
            measurements += case_measurements
            versions |= used
            console.say(f"{case}: measured")
            write()
    write()
    _print(measurements, [_about(versions, measurements, options), *notes])


def _names(rows: Sequence[str]) -> list[str]:
    """The rows that are asked for, each once; raises InputError for a name of none."""
    names = [name for row in rows for name in (ON_ACCELERATOR if row == "accelerator" else (row,))]
    for name in names:
        if name not in ALL:
            raise InputError(f"--rows={','.join(rows)}: '{name}' is none of {', '.join((*ALL, 'accelerator'))}")
    return list(dict.fromkeys(names))


def _check(
    manual_dir: str | None,
    names: Sequence[str],
    rounds: int,
    program_rounds: int,
    fits: Sequence[int],
    turn_steps: int,
    precisions: Sequence[str],
    at_once: int,
    baseline: str | None,
    times: Mapping[str, float | None],
) -> None:
    """Raise InputError for a flag that cannot be."""
    numbers = {"rounds": rounds, "program_rounds": program_rounds, "turn_steps": turn_steps, "at_once": at_once}
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"--{name}={number}: it must be at least 1")
    for name, seconds_or_minutes in times.items():
        if seconds_or_minutes is not None and not seconds_or_minutes > 0:
            raise InputError(f"--{name}={seconds_or_minutes:g}: it must be above 0")
    if len(fits) < 2 or min(fits) < 1 or list(fits) != sorted(fits):
        raise InputError(f"--fits={','.join(map(str, fits))}: name at least two numbers of fits, rising")
    if unknown := set(precisions) - set(PRECISIONS):
        raise InputError(f"--precisions={','.join(precisions)}: '{min(unknown)}' is none of {', '.join(PRECISIONS)}")
    if not manual_dir and all(name in OF_PROGRAMS for name in names):
        raise InputError(
            f"--rows={','.join(names)}: without --manual_dir no such row is measured: name the folder with the "
            "complete mnist/ and fashion_mnist/"
        )
    if manual_dir and not Path(manual_dir).is_dir():
        raise InputError(
            f"--manual_dir={manual_dir}: it is no folder: name that with the complete mnist/ and fashion_mnist/, or "
            "leave it out"
        )
    if baseline and not (Path(baseline) / "tljax" / "__init__.py").is_file():
        raise InputError(f"--baseline={baseline}: there is no tljax/ in it: name the folder of a checkout")


def _absent(options: Options, names: Sequence[str]) -> Iterator[str]:
    """A line for each thing that is not there, and what is left out for it."""
    if not options.torch_python:
        yield "torch is not installed, so its sides are left out"
    if not options.keras:
        yield "keras is not installed, so its sides are left out"
    if not options.cuda:
        yield "there is no CUDA device, so nothing is captured in a CUDA graph"
    if not options.manual_dir:
        yield "the images are those of mnist_10k, six times"
        yield from (f"the row {name} is left out: --manual_dir is not given" for name in names if name in OF_PROGRAMS)


def _cuda_there() -> bool:
    """Whether JAX finds a GPU, asked in another process, since whoever asks keeps memory of it."""
    code = "import jax; print(jax.default_backend())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(CHECKOUT))
    return output.stdout.strip().endswith("gpu")


@contextlib.contextmanager
def _prepared(names: Sequence[str], options: Options) -> Iterator[Path]:
    """A folder with what the sides of these rows share."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        call = [sys.executable, str(SIDES), "prepare", folder, json.dumps(shared(names, options))]
        surroundings = environment(CHECKOUT, {"JAX_PLATFORMS": "cpu"})
        output = subprocess.run(call, capture_output=True, text=True, env=surroundings)
        if output.returncode:
            lines = output.stderr.strip().splitlines() or ["it says nothing"]
            raise InputError(f"what the sides share cannot be made: {lines[-1][:300]}")
        yield Path(folder)


def _about(versions: Mapping[str, str], measurements: Sequence[Measurement], options: Options) -> str:
    """The line on the date, the versions, the checkouts, the machine and the kinds of its devices."""
    devices = sorted({measurement.device for measurement in measurements if measurement.device})
    parts = [
        time.strftime("%Y-%m-%d"),
        *devices,
        f"{os.cpu_count()} cores",
        f"Python {platform.python_version()}",
        *(f"{name} {version}" for name, version in versions.items()),
        f"tljax {directory.version('tljax')} {_commit(CHECKOUT)}".rstrip(),
    ]
    return ", ".join([*parts, *([f"before {_commit(options.baseline)}"] if options.baseline else [])])


def _commit(checkout: Path) -> str:
    """The commit of a checkout, with a + where files are not as committed; "" where git knows none."""
    try:
        call = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _print(measurements: Sequence[Measurement], notes: Sequence[str]) -> None:
    """A table for each case, with a line for each side, and with a baseline one of before over after."""
    by_case: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        by_case.setdefault(measurement.row.rpartition(": ")[0], []).append(measurement)
    for case, several in by_case.items():
        whats = list(dict.fromkeys(m.row.rpartition(": ")[2] for m in several))
        cells = {(m.side, m.row.rpartition(": ")[2]): _cell(m) for m in several}
        names = list(dict.fromkeys(m.side for m in several))
        table = [(name, *(cells.get((name, what), "-") for what in whats)) for name in names]
        console.table(case, ["side", *whats], table)
    if pairs := [m for m in measurements if m.side.endswith(", before") and m.ratio]:
        lines = [(m.row, m.over, f"{m.ratio:.2f}", _range(m.ratios)) for m in pairs]
        console.table("before over after", ["what", "side", "ratio", "range"], lines)
    for line in notes:
        console.say(line)


def _cell(measurement: Measurement) -> str:
    """The median, and its ratio to that of another side with the ratio's range."""
    number = _number(measurement.value, 6 if "loss" in measurement.row else 3)
    if measurement.ratio is None or measurement.side == measurement.over:
        spread = _range(measurement.values) if "loss" not in measurement.row else "-"
        return number if spread == "-" else f"{number} ({spread})"
    spread = _range(measurement.ratios)
    return f"{number} = {measurement.ratio:.2f} x{'' if spread == '-' else f' ({spread})'}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if value < 100 else f"{value:,.0f}"


def _range(values: Sequence[float]) -> str:
    """The least and the greatest of several values."""
    return f"{_number(min(values))} to {_number(max(values))}" if len(values) > 1 else "-"


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), lambda _, benchmark_flags: run(**vars(benchmark_flags)), BenchmarkFlags)
