"""The run directory: what is in it, who may write to it, and what is already done."""

import hashlib
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments import console, lock, options
from experiments.options import LISTS, PLACES, Settings
from tljax import checkpoint, surroundings
from tljax.types import InputError

Line = dict[str, Any]
"""A line of results.jsonl: one fit."""

_NO_FIT = ("eval", "verify", "sources", "scores", "score_examples", "resamples")
"""What may change too: flags of compare and rank that decide which fits there are, and nothing of one."""


@contextmanager
def opened(made: Settings, program: str, more: Sequence[str] = ()) -> Iterator[Path]:
    """The run directory of these settings, this process's own until the end; what is damaged in it is set aside.

    Raises InputError where none is given, another process has it, or it holds another experiment; then nothing in
    it is changed. Lists (strategies, seeds, budgets) may grow. `more` are flagfile lines beside those of the settings.
    """
    if made.workdir is None:
        raise InputError("--workdir is not given: name a new folder for the run, such as --workdir=runs/first")
    workdir = Path(made.workdir)
    _refuse_strangers(workdir)
    _flags(workdir, made, program, more)
    _refuse_other_switches(workdir)
    lines(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with lock.held(workdir):
        replace(workdir / "flags.flags", _flags(workdir, made, program, more))
        _set_damaged_aside(workdir)
        try:
            yield workdir
        except OSError as error:
            error.filename = error.filename or str(workdir)  # a write into an open file does not say where
            raise


def _refuse_strangers(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file: name a new folder")
    first = {".lock", "flags.flags.partial"}  # all that is there if a run is killed in its first moment
    if workdir.is_dir() and not (workdir / "flags.flags").is_file() and {f.name for f in workdir.iterdir()} - first:
        raise InputError(f"--workdir={workdir} holds other files and no run: name a new folder")


def _refuse_other_switches(workdir: Path) -> None:
    """Raise InputError where the run's fits were trained under other switches of JAX: their streams are not to mix."""
    about = recorded(workdir)
    if not isinstance(about, dict):
        return
    there, here = about.get("switches") or {}, surroundings.switches()
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if names:
        told = "; ".join(f"{name}={there.get(name, 'unset')} there, {here.get(name, 'unset')} here" for name in names)
        raise InputError(
            f"'{workdir}' was trained under other switches ({told}): set them alike, or choose another --workdir"
        )


def _flags(workdir: Path, made: Settings, program: str, more: Sequence[str]) -> str:
    """The run's flagfile, with what is new in its lists; raises InputError if it is of another experiment."""
    file = workdir / "flags.flags"
    head = f"# python -m experiments.{program} --flagfile=WORKDIR/{file.name} --workdir=NEW\n"
    now = dict(line[2:].split("=", 1) for line in [*options.to_flags(made), *more])
    if file.is_file():
        text = _text(file)
        head = text.splitlines()[0] + "\n" if text.startswith("#") else head
        there = dict(line[2:].partition("=")[::2] for line in text.splitlines() if line.startswith("--"))
        there = {name: value for name, value in options.NEUTRAL.items() if name in now} | there
        names = sorted((there.keys() | now.keys()) - {*LISTS, *PLACES, *_NO_FIT})
        differ = [f"--{n}={there.get(n, '')} there, {now.get(n, '')} here" for n in names if there.get(n) != now.get(n)]
        if differ:
            told = "; ".join(differ[:8]) + (f" and {len(differ) - 8} more" if differ[8:] else "")
            raise InputError(f"'{workdir}' holds another experiment ({told}): choose another --workdir")
        for name in LISTS:
            old = there.get(name, "").split(",")
            now[name] = ",".join([*old, *(value for value in now[name].split(",") if value not in old)])
    return head + "".join(f"--{name}={value}\n" for name, value in now.items())


def replace(file: Path, text: str | bytes) -> None:
    """Write a file whole: a crash leaves the old one or the new one."""
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as out:
            out.write(text if isinstance(text, bytes) else text.encode())
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it is in the way
        raise
    os.replace(partial, file)


def new(flag: str, given: str | None, suffix: str) -> Path:
    """The file that a flag names for what is to be written; raises InputError unless it can be, and is new."""
    file = Path(given or "")
    if file.suffix != suffix or "\0" in str(file):
        raise InputError(f"--{flag}={given or ''}: name a new {suffix} file")
    if os.path.lexists(file):
        raise InputError(f"--{flag}={given} exists already: nothing is written over; choose another name")
    if not file.parent.is_dir():
        raise InputError(f"--{flag}={given}: there is no folder '{file.parent}': make it")
    return file


def lines(workdir: Path) -> list[Line]:
    """The fits that were trained; raises InputError for a line that is none, or not as it was written."""
    file = workdir / "results.jsonl"
    found = []
    for number, text in enumerate(_text(file).splitlines() if file.exists() else (), 1):
        if text.strip():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"'{file}', line {number} is no JSON ({error}): restore or delete it") from error
            found.append(_checked(workdir, line, f"'{file}', line {number}"))
    return found


_STRINGS = ("key", "name", "strategy", "checkpoint", "predictions", "predictions_sha256")


def _checked(workdir: Path, line: Any, where: str) -> Line:
    """A line without its own SHA-256, once it is sure that it is one, and that its paths stay in the run directory."""
    words = isinstance(line, dict) and all(isinstance(line.get(name), str) for name in _STRINGS)
    if not words or not isinstance(line.get("seed"), int):
        raise InputError(f"{where} is no line of results: restore or delete it")
    for name in ("checkpoint", "predictions", "name"):
        path = Path("metrics") / line[name] if name == "name" else Path(line[name])
        inside = len(path.parts) == 2 and ".." not in path.parts and not path.is_absolute() and "\0" not in line[name]
        if not inside or not (workdir / path).resolve().is_relative_to(workdir.resolve()):
            raise InputError(f"{where}: {name} '{line[name]}' is no place in the run directory: restore or delete it")
    if line.pop("sha256", None) != digest(line) or not isinstance(line.get("seconds"), int | float):
        raise InputError(f"{where} is not as it was written: restore or delete it")
    return line


def digest(line: Line) -> str:
    """SHA-256 of a line (or another record) less what it took, so that a run and its repetition agree."""
    return hashlib.sha256(
        json.dumps({name: value for name, value in line.items() if name != "seconds"}, sort_keys=True).encode()
    ).hexdigest()


def done(workdir: Path) -> dict[str, Line]:
    """{key: line} of the fits whose checkpoint and predictions are there; others are to be trained again."""
    kept = (line for line in lines(workdir) if (workdir / line["checkpoint"]).is_dir())
    return {line["key"]: line for line in kept if (workdir / line["predictions"]).is_file()}


def _set_damaged_aside(workdir: Path) -> None:
    """Rename, aloud, what of finished fits is not as it was written: then they are not done any more."""
    found = lines(workdir)
    for name in dict.fromkeys(line["checkpoint"] for line in found):
        if (workdir / name).is_dir():
            fits = {line["name"] for line in found if line["checkpoint"] == name}
            try:
                lacking = sorted(fits - checkpoint.load(workdir / name)[0].keys())
                fault = f"checkpoint '{name}' holds no fit '{lacking[0]}'" if lacking else None
            except InputError as error:
                fault = str(error)
            _set_aside(workdir / name, fault)
    for line in found:
        file = workdir / line["predictions"]
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != line["predictions_sha256"]:
            _set_aside(file, f"'{file}' is not as it was written")


def _set_aside(place: Path, fault: str | None) -> None:
    if fault is not None:
        console.say(f"{fault}. It is set aside as '{aside(place).name}', and what it held counts as not trained")


def aside(place: Path) -> Path:
    """Rename what is damaged to NAME.damaged, or .damaged2 where that is taken; its new place."""
    names = (f"{place.name}.damaged{number}" for number in itertools.chain([""], itertools.count(2)))
    free = next(place.with_name(name) for name in names if not os.path.lexists(place.with_name(name)))
    os.rename(place, free)
    return free


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"'{file}' is no text: restore or delete it") from error


def add(workdir: Path, new: Sequence[Line]) -> None:
    """Add the lines of finished fits, all or none; one that was there is replaced where it stands."""
    whole = {line["key"]: line for line in lines(workdir)} | {line["key"]: line for line in new}
    text = "".join(json.dumps({**line, "sha256": digest(line)}, allow_nan=False) + "\n" for line in whole.values())
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
        **({"variables": variables} if (variables := surroundings.variables()) else {}),
        **({"switches": around} if (around := surroundings.switches()) else {}),
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
