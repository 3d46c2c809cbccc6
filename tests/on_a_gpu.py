"""What to run on a GPU that is there for some minutes: `python tests/on_a_gpu.py OUT --manual_dir=DIR --minutes=12`

In order of importance, within so many minutes, each result written when it is there:

    OUT/about.txt         the device, versions, and packages of the tests that are missing
    OUT/accelerator.json  the benchmark's rows for an accelerator, with its log beside it
    OUT/bits.txt          whether a quick start gives the same bits twice, each from an empty cache of programs
    OUT/tests.txt         the tests, a line each; they are at `highest` precision and skip what is about a CPU

`--baseline=OTHER` measures another checkout in turn, and `--torch_python=PYTHON` names the one that has PyTorch. On a
CPU `--minutes=1` tries it out.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST = (
    *(
        "optimizer",
        "masks",
        "train",
        "many",
        "elements",
        "shared",
        "features",
        "evaluate",
        "delta",
        "precision",
        "vit",
        "rank",
    ),
    *("convolutional", "batch_stats", "dropout", "augment", "frozen_prefix", "low_rank", "stream", "ends", "phases"),
    *(
        "reference",
        "parity",
        "own_loop",
        "penalties",
        "objective",
        "graft",
        "checkpoint",
        "resume",
        "speed",
        "switches",
    ),
)
"""Tests of what computes, before those of pages, flags and files."""
OF_BENCHMARK, OF_BITS = 0.65, 0.15
"""Shares of the time; what the one leaves goes to the next, and the tests have the rest."""
IMPORTED = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "pytest-xdist": "xdist",
    "tensorflow-datasets": "tensorflow_datasets",
}
"""{package: the module by which it is found} where the names differ."""


def main(arguments: Iterable[str] | None = None) -> None:
    """Run everything; what fails or has no time is said, and the rest goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=12.0)
    for name in ("manual_dir", "baseline", "torch_python"):
        parser.add_argument(f"--{name}")
    flags = parser.parse_args(None if arguments is None else list(arguments))
    end = time.monotonic() + 60 * flags.minutes
    out = flags.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "about.txt").write_text("\n".join(about()) + "\n")
    benchmark(out, flags, 60 * flags.minutes * OF_BENCHMARK)
    bits(out, time.monotonic() + 60 * flags.minutes * OF_BITS)
    tests(out, end)


def about() -> Iterable[str]:
    """The device, the versions, and which packages of the tests are missing."""
    code = "import jax; print(jax.__version__, [d.device_kind for d in jax.devices()], jax.default_backend())"
    yield run([sys.executable, "-c", code], 120)[1].strip().splitlines()[-1]
    yield f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"
    yield f"missing: {', '.join(missing()) or 'nothing'}"


def missing() -> list[str]:
    """The packages that pyproject.toml asks for, for programs and tests, and that this Python has not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(text for name in ("experiments", "data", "test") for text in project["optional-dependencies"][name]),
    ]
    names = [re.split(r"[^\w-]", text)[0] for text in wanted if not text.startswith("tljax")]
    return [name for name in names if importlib.util.find_spec(IMPORTED.get(name, name.replace("-", "_"))) is None]


def benchmark(out: Path, flags: argparse.Namespace, seconds: float) -> None:
    """The rows for an accelerator; their file is written after each case."""
    call = [sys.executable, "-m", "experiments.benchmark", "--rows=accelerator", f"--output={out / 'accelerator.json'}"]
    call += [
        "--rounds=3",
        "--program_rounds=1",
        "--at_once=4",
        "--patience=90",
        f"--minutes={max(1.0, seconds) / 60:.2f}",
    ]
    call += [
        f"--{name}={getattr(flags, name)}"
        for name in ("manual_dir", "baseline", "torch_python")
        if getattr(flags, name)
    ]
    code, output = run(call, seconds + 30)
    (out / "accelerator.txt").write_text(output)
    print(f"benchmark: {'done' if code == 0 else f'ended with {code}'}", flush=True)


def bits(out: Path, end: float) -> None:
    """Two quick starts of one seed: lines of results but for seconds and memory."""
    lines = []
    for name in ("one", "two"):
        call = [sys.executable, "-m", "experiments.transfer", "--flagfile=experiments/flags/quickstart.flags"]
        call += ["--seeds=0", f"--workdir={out / name}", f"--compilation_cache={out / f'compiled_{name}'}"]
        code, output = run(call, end - time.monotonic())
        if code:
            (out / "bits.txt").write_text(f"run {name} ended with {code}\n{output[-2000:]}")
            return
        results = [json.loads(line) for line in (out / name / "results.jsonl").read_text().splitlines()]
        lines.append([{key: line.get(key) for key in ("strategy", "seed", "sha256", "test_loss")} for line in results])
    (out / "bits.txt").write_text(
        f"{'the same bits' if lines[0] == lines[1] else 'other bits'}\n{json.dumps(lines, indent=1)}\n"
    )


def tests(out: Path, end: float) -> None:
    """The fast tests until the end, the files of `FIRST` before the others."""
    files = {file.stem.removeprefix("test_"): file for file in sorted((ROOT / "tests").glob("test_*.py"))}
    ordered = [*(name for name in FIRST if name in files), *(name for name in files if name not in FIRST)]
    call = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "--dist=load"]
    with open(out / "tests.txt", "w") as log:
        code, _ = run([*call, *(str(files[name]) for name in ordered)], end - time.monotonic(), log)
    print(f"tests: {'done' if code == 0 else f'ended with {code}'}", flush=True)


def run(call: list[str], seconds: float, log: object = None) -> tuple[int, str]:
    """(Exit code, output) of a command that is ended, with what it started, after so many seconds (code 124)."""
    surroundings = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    }
    pipe = log or subprocess.PIPE
    process = subprocess.Popen(
        call, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=surroundings, start_new_session=True
    )
    output = ""
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, output or ""
    except subprocess.TimeoutExpired:
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):  # the first lets it end its own sides
            os.killpg(process.pid, number)
            try:
                output, _ = process.communicate(timeout=patience)
                break
            except subprocess.TimeoutExpired:
                continue
        return 124, output or ""


if __name__ == "__main__":
    main()
