"""Disturb a run until it is done, and want the bits of one left alone.

    python tests/chaos.py --kills=5 --flips=5

Every third signal waits for a save to be under way. Final parameters, predictions, masks, curves and results.jsonl
(less what it took) must be those of the undisturbed run, byte for byte; exit code 1 if anything differs.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TextIO

from experiments.runs import command_line, console, directory, process
from experiments.runs.command_line import flag, flagfile
from tljax import checkpoint
from tljax.study.results import to_json
from tljax.types import InputError

_KINDS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "flip": signal.SIGKILL}
_PATIENCE = 60.0
"""Seconds in which a process is to end after a signal."""


@dataclass(frozen=True)
class ChaosFlags:
    """What is disturbed, and how often."""

    flagfile: str | None = flag(None, "the experiment, flags of experiments.transfer; default the quick start")
    kills: int = flag(20, "how often it is killed with -9")
    terms: int | None = flag(None, "how often it gets SIGTERM; default as --kills")
    flips: int | None = flag(None, "how often it is killed and a byte of a checkpoint flipped; default half of --kills")
    only: tuple[str, ...] = flag(tuple(_KINDS), "which of them")
    seed: int = flag(0, "of the moments")
    workdir: str | None = flag(None, "a new folder; default a temporary one, kept if anything differs")


class Plan(NamedTuple):
    """What is disturbed, and how."""

    flagfile: Path
    folder: Path
    """Where runs, logs and compiled programs are."""
    random: random.Random
    seconds: float = 0.0
    """Of the undisturbed run, programs compiled before."""


class Row(NamedTuple):
    """What came of one kind of disturbance."""

    kind: str
    fell: Counter[str]
    """How many signals by what the run was doing."""
    starts: int
    finished: int
    """Runs that were disturbed and came to their end."""
    noticed: int
    """Damaged checkpoints that were found and set aside."""
    slowest: float
    """Seconds from a signal to the end of the process."""
    seconds: float
    faults: tuple[str, ...]


def run(chaos_flags: ChaosFlags) -> None:
    """Disturb as often as is asked; raises InputError if anything differs."""
    counts, place = _counts(chaos_flags), chaos_flags.workdir
    file = Path(flagfile(chaos_flags.flagfile or "quickstart.flags"))
    if not file.is_file():
        raise InputError(f"--flagfile={file} does not exist: give one with the flags of experiments.transfer")
    if place and Path(place).exists():
        raise InputError(f"--workdir={place} exists: name a new folder")
    folder = Path(place or tempfile.mkdtemp(prefix="chaos-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(file.absolute(), folder, random.Random(chaos_flags.seed))
    for name in ("undisturbed", "again"):  # the second finds its programs compiled, as those to come
        start = time.monotonic()
        with open(folder / f"{name}.log", "w+", encoding="utf-8") as log:
            _finish(_start(plan, name, log), log)
        plan = plan._replace(seconds=time.monotonic() - start)
    expected = contents(folder / "undisturbed")
    odd = _differences(expected, contents(folder / "again"), "undisturbed")
    if odd:
        raise InputError(f"two undisturbed runs differ already ({odd[0]}): see '{folder}'")
    console.say(f"undisturbed: {plan.seconds:.0f} s")
    rows = []
    for kind, count in counts.items():
        rows.append(_disturb(plan, kind, count, expected))
        console.say(f"{kind}: {rows[-1].seconds:.0f} s, {'; '.join(rows[-1].faults) or 'identical'}")
    _show(plan, rows)
    if any(row.faults for row in rows):
        raise InputError(f"disturbed runs differ from the undisturbed one: see '{folder}'")
    if not place:
        shutil.rmtree(folder)


def _counts(chaos_flags: ChaosFlags) -> dict[str, int]:
    """{kind: signals}; raises InputError for a kind that there is not, and for fewer signals than none."""
    if set(chaos_flags.only) - _KINDS.keys():
        raise InputError(
            f"--only={','.join(chaos_flags.only)}: write some of {', '.join(_KINDS)} with commas between them"
        )
    terms = chaos_flags.kills if chaos_flags.terms is None else chaos_flags.terms
    flips = chaos_flags.kills // 2 if chaos_flags.flips is None else chaos_flags.flips
    if min(chaos_flags.kills, terms, flips) < 0:
        raise InputError("--kills, --terms and --flips must be 0 or more")
    counts = {"kill": chaos_flags.kills, "term": terms, "flip": flips}
    return {kind: counts[kind] for kind in _KINDS if kind in chaos_flags.only}


def _start(plan: Plan, name: str, log: TextIO) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "experiments.transfer", f"--flagfile={plan.flagfile}"]
    line += [f"--workdir={plan.folder / name}", f"--compilation_cache={plan.folder / 'compiled'}"]
    return subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)


def _finish(process: subprocess.Popen[bytes], log: TextIO) -> None:
    """Wait for a run's end; raises InputError if it fails."""
    try:
        if process.wait():
            log.seek(0)
            lines = log.read().strip().splitlines() or ["nothing"]
            raise InputError(f"experiments.transfer ends with code {process.returncode} and says: {lines[-1]}")
    finally:
        process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    """{what: bytes} of all that must not depend on interruptions: results less seconds, predictions, parameters ..."""
    lines = directory.results(folder)
    bytes_by_name = {
        "results.jsonl": json.dumps([{**to_json(line), "seconds": 0, "peak_bytes": 0} for line in lines]).encode()
    }
    for name in sorted({line.checkpoint for line in lines}):
        fits, about = checkpoint.load(folder / name)
        bytes_by_name |= {
            f"{name}/{fit}/{path}": leaf.tobytes() for fit, leaves in fits.items() for path, leaf in leaves.items()
        }
        bytes_by_name[name] = json.dumps(about, sort_keys=True).encode()
    for file in sorted(folder.rglob("*.*")):
        inside = file.relative_to(folder)
        if inside.parts[0] in ("predictions", "masks") or inside.name == "curves.npz":
            bytes_by_name[str(inside)] = file.read_bytes() if ".damaged" not in file.name else b""
    return {name: raw for name, raw in bytes_by_name.items() if ".damaged" not in name}


def _disturb(plan: Plan, kind: str, count: int, expected: Mapping[str, bytes]) -> Row:
    """Send `count` signals; a run that ends before its signal is compared, and a new one begun."""
    fell: Counter[str] = Counter()
    faults: list[str] = []
    starts, number, slowest, begun = 0, 0, 0.0, time.monotonic()
    with open(plan.folder / f"{kind}.log", "w+", encoding="utf-8") as log:
        while True:
            name, last = f"{kind}-{number}", sum(fell.values()) >= count
            process = _start(plan, name, log)
            starts += 1
            if last:
                _finish(process, log)
            elif phase := _interrupt(plan, process, plan.folder / name, aimed=starts % 3 == 0):
                sent = time.monotonic()
                faults += _end(process, _KINDS[kind])
                slowest = max(slowest, time.monotonic() - sent)
                if kind != "flip" or _flip(plan.folder / name, plan.random):
                    fell[phase] += 1
                continue
            else:
                _finish(process, log)
            faults += _differences(expected, contents(plan.folder / name), name)
            number += 1
            if last:
                break
        log.seek(0)
        noticed = log.read().lower().count("it is set aside")
    return Row(kind, fell, starts, number, noticed, slowest, time.monotonic() - begun, tuple(faults))


def _interrupt(plan: Plan, process: subprocess.Popen[bytes], folder: Path, aimed: bool) -> str:
    """Wait for a random moment, `aimed` for the next save after it; what the run was doing, "" if it has ended."""
    before = _saves(folder)
    moment = time.monotonic() + plan.random.uniform(0, plan.seconds)
    delay = plan.random.uniform(0, 0.1)
    while process.poll() is None:
        if time.monotonic() > moment and not aimed:
            return _phase(folder, before)
        if time.monotonic() > moment and _saves(folder) - before:
            time.sleep(delay)
            return "saving" if process.poll() is None else ""
        time.sleep(0.002 if time.monotonic() > moment else 0.02)
    return ""


def _saves(folder: Path) -> set[Path]:
    """Files and folders that are being written."""
    return {*folder.rglob("*.orbax-checkpoint-tmp*"), *folder.rglob("*.partial")}


def _phase(folder: Path, before: set[Path]) -> str:
    if _saves(folder) - before:
        return "saving"
    if not (folder / ".lock").is_file() or not (folder / ".lock").read_text():
        return "starting"
    lines = directory.results(folder)
    return "transfer" if any(line.strategy != "pretrain" for line in lines) else "target" if lines else "source"


def _end(process: subprocess.Popen[bytes], sent: signal.Signals) -> list[str]:
    """Send the signal and wait for the end; what is wrong with it."""
    process.send_signal(sent)
    try:
        code = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return [f"{sent.name} did not end it within {_PATIENCE:.0f} s"]
    return [] if code in (0, -sent, 128 + sent) else [f"{sent.name} ended it with code {code}"]


def _flip(folder: Path, moments: random.Random) -> bool:
    """Flip a bit of the newest checkpoint, mostly in its arrays; whether there is one."""
    files = [file for file in folder.rglob("state/**/*") if file.is_file() and ".damaged" not in str(file)]
    files = [file for file in files if file.stat().st_size]
    if not files:
        return False
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    root = next(parent for parent in newest.parents if parent.name == "state")
    within = [file for file in files if root in file.parents]
    [file] = moments.choices(within, weights=[file.stat().st_size for file in within])
    raw = bytearray(file.read_bytes())
    raw[moments.randrange(len(raw))] ^= 1 << moments.randrange(8)
    file.write_bytes(raw)
    return True


def _differences(expected: Mapping[str, bytes], actual: Mapping[str, bytes], name: str) -> list[str]:
    odd = [what for what in sorted(expected.keys() | actual.keys()) if expected.get(what) != actual.get(what)]
    return [f"{name}: {', '.join(odd[:3])}{f' and {len(odd) - 3} more' if odd[3:] else ''} differ"] if odd else []


def _show(plan: Plan, rows: Sequence[Row]) -> None:
    cells = [
        (
            row.kind,
            str(sum(row.fell.values())),
            ", ".join(f"{phase} {count}" for phase, count in sorted(row.fell.items())) or "-",
            str(row.starts),
            str(row.finished),
            str(row.noticed) if row.kind == "flip" else "-",
            f"{row.slowest:.1f}",
            f"{row.seconds:.0f}",
            "; ".join(row.faults) or "identical",
        )
        for row in rows
    ]
    columns = ["kind", "signals", "fell in", "starts", "finished", "damage found", "slowest end s", "seconds", "result"]
    console.table("chaos", columns, cells, [f"{plan.flagfile}, undisturbed {plan.seconds:.0f} s"])


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    # A flagfile is handed on, not read.
    files = [argument.partition("=")[2] for argument in argv if argument.startswith("--flagfile=")]
    rest = [argument for argument in argv if not argument.startswith("--flagfile=")]
    flagfile = files[-1] if files else None
    command_line.main(
        rest, str(__doc__), lambda _, chaos_flags: run(replace(chaos_flags, flagfile=flagfile)), ChaosFlags
    )


if __name__ == "__main__":
    process.run_main(main)
