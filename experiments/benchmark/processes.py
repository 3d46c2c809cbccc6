"""Sides in processes of their own, one of them at work at a time.

The sides of a case start one after another, each alone (or so many at once as asked), compile and train their first
turn; then they take turns, round by round. So no side's threads disturb another's, and what drifts on the machine is
the same for all. A side that fails, or takes too long, is left out with its reason, and its processes are ended with
it; the others are measured.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

SIDES = Path(__file__).with_name("sides.py")
CHECKOUT = Path(__file__).parent.parent.parent
"""The folder that holds this tljax."""


class Failure(Exception):
    """Why a side is left out."""


class Running(Protocol):
    """A side that has been started."""

    def first(self, patience: float) -> dict[str, Any]:
        """What it says of its start and its first turn; raises Failure if it ends, or takes so many seconds."""
        ...

    def turn(self, patience: float) -> dict[str, Any]:
        """What it says of one more turn: its `seconds` and what else there is."""
        ...

    def peak(self, patience: float) -> float:
        """The most bytes that it took, at its end."""
        ...

    def end(self) -> None:
        """End it, with every process that it started."""
        ...


class Taken(NamedTuple):
    """What a side did."""

    first: dict[str, Any]
    turns: list[dict[str, Any]]
    peak_bytes: float | None


def environment(checkout: Path, further: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a side: tljax is that of the checkout, and of many accelerators it sees the first."""
    beside = [text for text in (os.environ.get("PYTHONPATH"),) if text]
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout), *beside]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **(further or {}),
    }


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a group (`start_new_session`), and all that are in it: what it started as well.

    They have ended when it returns, so that nobody writes into a folder that goes.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < until:
        time.sleep(0.01)


def _alive(group: int) -> bool:
    """Whether a process of a group still runs; one that has ended and is not yet waited for does not."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = status.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


class Served:
    """A side of `sides.py` in its own process, which trains a turn whenever it is asked."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], python: str = sys.executable) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            [python, str(SIDES), "serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=dict(environment),
            start_new_session=True,
        )

    def first(self, patience: float) -> dict[str, Any]:
        """See `Running`."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, patience))[0]:
            raise Failure(f"it takes longer than {max(0.0, patience):.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise Failure(_last_line(self.errors.read()) or f"it ends with code {self.process.returncode}")
        return dict(json.loads(line))

    def turn(self, patience: float) -> dict[str, Any]:
        """See `Running`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        return self.first(patience)

    def peak(self, patience: float) -> float:
        """See `Running`."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return float(self.first(patience)["peak_bytes"])

    def end(self) -> None:
        """See `Running`."""
        end_group(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


class Program:
    """Whole programs, which run anew in each turn, one after another, in a folder of the turn.

    Each of `commands` gets the folder of the turn and gives the arguments for Python: {what it is called: arguments}. A
    turn says of each its seconds, and what it wrote into `record.json` of the folder.
    """

    def __init__(
        self,
        commands: Mapping[str, Callable[[Path], Sequence[str]]],
        environment: Mapping[str, str],
        python: str = sys.executable,
    ) -> None:
        self.commands, self.environment, self.python = commands, dict(environment), python
        self.most = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def first(self, patience: float) -> dict[str, Any]:
        """See `Running`."""
        return self.turn(patience)

    def turn(self, patience: float) -> dict[str, Any]:
        """See `Running`; the patience is for all of its programs."""
        until = time.monotonic() + patience
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return {
                name: self._run(command(Path(folder)), Path(folder), until) for name, command in self.commands.items()
            }

    def _run(self, arguments: Sequence[str], folder: Path, until: float) -> dict[str, Any]:
        record = folder / "record.json"
        record.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+") as log:
            start = time.monotonic()
            self.process = subprocess.Popen(
                [self.python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
            try:
                while self.process.poll() is None:
                    self.most = max(self.most, _peak_of(self.process.pid))
                    if time.monotonic() > until:
                        raise Failure(f"it takes longer than {time.monotonic() - start:.0f} s")
                    time.sleep(0.02)
                seconds = time.monotonic() - start
            finally:
                end_group(self.process)  # before the folder goes into which it writes
            log.seek(0)
            if self.process.returncode:
                raise Failure(_last_line(log.read()) or f"it ends with code {self.process.returncode}")
        return {"seconds": seconds} | (json.loads(record.read_text()) if record.is_file() else {})

    def peak(self, patience: float) -> float:
        """See `Running`; of its programs' own processes, on the host."""
        return self.most

    def end(self) -> None:
        """See `Running`."""
        if self.process is not None:
            end_group(self.process)


def _last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _peak_of(process: int) -> float:
    """The most memory of a process so far, in bytes: `getrusage` of a child begins with the memory of its parent."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
        return 1024 * float(text.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 0.0


class Patience(NamedTuple):
    """How long sides are waited for, in seconds."""

    start: float
    """For a start with the first turn."""
    turn: float
    until: float = float("inf")
    """The moment (of `time.monotonic`) after which no turn begins, and at which what is under way is cut off."""

    @property
    def for_start(self) -> float:
        """What is left for a start."""
        return min(self.start, self.until - time.monotonic())

    @property
    def for_turn(self) -> float:
        """What is left for a turn."""
        return min(self.turn, self.until - time.monotonic())


def take_turns(
    sides: Mapping[str, Callable[[], Running]],
    rounds: int,
    patience: Patience,
    at_once: int = 1,
    warm_up: int = 1,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Taken]:
    """{side: what it did} of those that came through; why one is left out goes to `note`.

    `at_once` sides start at the same time. After its first turn each side takes `warm_up` turns that are not counted,
    in which small programs are loaded, and then `rounds` that are, in turn with the others.
    """
    running: dict[str, Running] = {}
    first: dict[str, dict[str, Any]] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}

    def attempt(name: str, step: Callable[[float], Any], seconds: float) -> Any:
        try:
            return step(seconds)
        except Failure as failure:
            note(f"{name} is left out: {failure}")
            running.pop(name).end()
            return None

    try:
        for names in _parts(list(sides), at_once):
            if patience.until < time.monotonic():
                note(f"{', '.join(names)}: left out, as the time is over")
                continue
            until = time.monotonic() + patience.for_start
            for name in names:
                running[name] = sides[name]()
            for name in names:
                started = attempt(name, running[name].first, until - time.monotonic())
                first |= {name: started} if started is not None else {}
        for round in range(warm_up + rounds):
            if patience.until < time.monotonic():
                break
            for name in list(running):
                turn = attempt(name, running[name].turn, patience.for_turn)
                turns[name] += [turn] if turn is not None and round >= warm_up else []
        for name in list(running):
            peak = attempt(name, running[name].peak, max(5.0, patience.for_turn))
            peaks |= {name: peak} if peak is not None else {}
    finally:
        for side in running.values():
            side.end()
    return {name: Taken(first[name], turns[name], peaks.get(name)) for name in sides if name in running}


def _parts(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The names in parts of so many, the last one shorter."""
    for start in range(0, len(names), size):
        yield names[start : start + size]
