"""Many processes, one run: they find each other, the first of them writes, and none outlives another."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax

from experiments.runs import faults, directory
from experiments.runs.options import Settings
from tljax.types import InputError

_BY_HAND = ("coordinator", "num_processes", "process_id")


def check(made: Settings) -> None:
    """Raise InputError for flags of processes that cannot be."""
    given = {name: getattr(made, name) for name in _BY_HAND if getattr(made, name) is not None}
    if made.distributed and made.parallel == "pmap":
        raise InputError("--parallel=pmap is for one process: leave it out with --distributed")
    if made.heartbeat < 1:
        raise InputError(f"--heartbeat={made.heartbeat}: give 1 second or more")
    if not given:
        return
    if not made.distributed:
        raise InputError(f"--{next(iter(given))} is given without --distributed: add it")
    if len(given) < len(_BY_HAND):
        missing = next(name for name in _BY_HAND if name not in given)
        raise InputError(f"--{next(iter(given))} is given and --{missing} is not: give all three, or none on a cluster")
    count, own, (host, _, port) = given["num_processes"], given["process_id"], given["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={given['coordinator']}: write HOST:PORT, of the machine of process 0")
    if count < 1:
        raise InputError(f"--num_processes={count}: give 1 or more")
    if not 0 <= own < count:
        raise InputError(f"--process_id={own}: of {count} processes the ids are 0 to {count - 1}")


def start(made: Settings) -> None:
    """Find the other processes of `--distributed`: before JAX looks at its devices, once in a process.

    Raises InputError where there is no cluster to be found, or the others do not come.
    """
    if not made.distributed or jax.distributed.is_initialized():
        return
    _end_plainly()
    by_hand: dict[str, Any] = {"cluster_detection_method": "deactivate"} if made.coordinator else {}
    try:
        jax.distributed.initialize(
            made.coordinator,
            made.num_processes,
            made.process_id,
            heartbeat_timeout_seconds=made.heartbeat,
            **by_hand,
        )
    except (ValueError, RuntimeError) as error:
        if "should be defined" in str(error) or "must be defined" in str(error):
            remedy = "no SLURM, Open MPI or Kubernetes is found: give --coordinator, --num_processes and --process_id"
        else:
            remedy = f"the processes do not find each other ({str(error)[:200]})"
        raise InputError(f"--distributed: {remedy}") from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the terminal is the first's


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _last_word(_: int) -> None:
    os.write(2, f"error: {faults.LOST}\n".encode())
    os._exit(1)


def _end_plainly() -> None:
    """When a process is lost and no exchange with it fails, JAX aborts the others after the heartbeat, from a thread
    of its own: no exception and no handler of Python's sees it, but one of C."""
    ctypes.CDLL(None).signal(signal.SIGABRT, _last_word)


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """For all processes to come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def in_turn(read: Callable[[], Any]) -> Any:
    """What `read` gives: the first process reads, and may set things aside, before the others do."""
    if not first():
        wait("read")
    found = read()
    if first():
        wait("read")
    return found


@contextmanager
def opened(
    made: Settings,
    program: str,
    more: Sequence[str] = (),
    older: Settings | None = None,
    leave: Collection[str] = (),
) -> Iterator[Path]:
    """`directory.opened` by the first process, for all of them. Raises InputError where another does not see it."""
    mine = directory.opened(made, program, more, older, leave) if first() else nullcontext(Path(made.workdir or ""))
    with mine as folder:
        wait("opened")
        if not (folder / "flags.flags").is_file():
            raise InputError(f"process {jax.process_index()} sees no --workdir={folder}: name a folder that all share")
        yield folder
        wait("done")
