"""The run directory: what is in it, who may write to it, and what is already done."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments import options
from experiments.options import LISTS, PLACES, Settings
from tljax.types import InputError

Line = dict[str, Any]
"""A line of results.jsonl: one fit."""


@contextmanager
def opened(made: Settings, program: str) -> Iterator[Path]:
    """The run directory of these settings, locked for this process.

    Raises InputError where none is given, another process has it, or it holds another experiment; then nothing in
    it is changed. Lists (strategies, seeds, budgets) may grow.
    """
    if made.workdir is None:
        raise InputError("--workdir is not given: name a new folder for the run, such as --workdir=runs/first")
    workdir = Path(made.workdir)
    _refuse_strangers(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise InputError(f"'{workdir}' is in use by {owner}: wait for it, or choose another --workdir") from error
        lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
        _write_flags(workdir, made, program)
        yield workdir


def _refuse_strangers(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file: name a new folder")
    if workdir.is_dir() and not (workdir / "flags.flags").is_file() and {f.name for f in workdir.iterdir()} - {".lock"}:
        raise InputError(f"--workdir={workdir} holds other files and no run: name a new folder")


def _write_flags(workdir: Path, made: Settings, program: str) -> None:
    file = workdir / "flags.flags"
    head = f"# python -m experiments.{program} --flagfile=WORKDIR/{file.name} --workdir=NEW\n"
    now = dict(line[2:].split("=", 1) for line in options.to_flags(made))
    if file.is_file():
        text = _text(file)
        head = text.splitlines()[0] + "\n" if text.startswith("#") else head
        there = dict(line[2:].partition("=")[::2] for line in text.splitlines() if line.startswith("--"))
        names = sorted((there.keys() | now.keys()) - {*LISTS, *PLACES})
        differ = [f"--{n}={there.get(n, '')} there, {now.get(n, '')} here" for n in names if there.get(n) != now.get(n)]
        if differ:
            raise InputError(f"'{workdir}' holds another experiment ({'; '.join(differ)}): choose another --workdir")
        for name in LISTS:
            old = there.get(name, "").split(",")
            now[name] = ",".join([*old, *(value for value in now[name].split(",") if value not in old)])
    replace(file, head + "".join(f"--{name}={value}\n" for name, value in now.items()))


def replace(file: Path, text: str) -> None:
    """Write a file whole: a crash leaves the old one or the new one."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)


def lines(workdir: Path) -> list[Line]:
    """The fits that were trained; raises InputError for a line that is none."""
    file = workdir / "results.jsonl"
    found = []
    for number, text in enumerate(_text(file).splitlines() if file.is_file() else (), 1):
        if text.strip():
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"'{file}', line {number} is no JSON ({error.msg}): restore or delete it") from error
            if not isinstance(line, dict) or not line.keys() >= _NEEDED:
                raise InputError(f"'{file}', line {number} is no line of results: restore or delete it")
            found.append(line)
    return found


_NEEDED = {"key", "name", "strategy", "seed", "checkpoint", "predictions", "test_accuracy"}


def done(workdir: Path) -> dict[str, Line]:
    """{key: line} of the fits whose checkpoint and predictions are there; others are to be trained again."""
    kept = (line for line in lines(workdir) if (workdir / line["checkpoint"]).is_dir())
    return {line["key"]: line for line in kept if (workdir / line["predictions"]).is_file()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"'{file}' is no text: restore or delete it") from error


def add(workdir: Path, new: Sequence[Line]) -> None:
    """Add the lines of finished fits, all or none."""
    keys = {line["key"] for line in new}
    kept = [line for line in lines(workdir) if line["key"] not in keys]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*kept, *new])
    replace(workdir / "results.jsonl", text)


def environment(fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Versions, devices, data fingerprints and the commit."""
    import jax

    names = ("tljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "versions": {name: metadata.version(name) for name in names},
        "data": dict(fingerprints),
        "commit": _commit(),
    }


def record(workdir: Path, fingerprints: Mapping[str, str]) -> None:
    """Write environment.json, if what it says has changed."""
    now = environment(fingerprints)
    if recorded(workdir) != now:
        replace(workdir / "environment.json", json.dumps(now, indent=1) + "\n")


def recorded(workdir: Path) -> dict[str, Any] | None:
    """What environment.json says; None where it is missing or damaged."""
    try:
        return json.loads((workdir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
