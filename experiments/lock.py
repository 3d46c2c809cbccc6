"""Who may write to a run directory: one process at a time, whatever machine it is on."""

import contextlib
import fcntl
import functools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from experiments import console
from tljax import heartbeat
from tljax.types import InputError

BEAT = 10.0
"""Seconds after which an owner touches its lock again."""
LOST = 60.0
"""Seconds after which an owner on another host that has not touched its lock counts as gone."""


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Own a run directory; its file .lock names the owner until a clean end.

    Raises InputError where another process has it. What an owner left that ended without leaving is taken over, aloud.
    """
    with open(workdir / ".lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(lock) or "another process"
            raise InputError(f"'{workdir}' is in use by {owner}: wait for it, or choose another --workdir") from error
        _take_over(workdir, lock)
        lock.truncate(0)
        print(f"process {os.getpid()} on host {platform.node()}", file=lock, flush=True)
        try:
            with heartbeat.every(BEAT, functools.partial(_touch, lock)):
                yield
        finally:
            lock.truncate(0)


def _owner(lock: TextIO) -> str:
    """What the file names: `process 12 on host x`, or nothing."""
    lock.seek(0)
    return " ".join(lock.read(300).split())


def _take_over(workdir: Path, lock: TextIO) -> None:
    owner = _owner(lock)
    if not owner:
        return
    # A file system of several hosts may hand a lock to each of them; the owner's heartbeat is seen by all.
    elsewhere = not owner.endswith(f" on host {platform.node()}")
    silent = time.time() - os.fstat(lock.fileno()).st_mtime
    if elsewhere and silent < LOST:
        raise InputError(
            f"'{workdir}' is in use by {owner}, heard of {max(silent, 0):.0f} s ago: wait for it, or choose another "
            f"--workdir; if it is gone, run the same command again in {LOST:.0f} s"
        )
    console.say(f"'{workdir}' is taken over from {owner}, which ended without leaving")


def _touch(lock: TextIO) -> None:
    with contextlib.suppress(OSError):
        os.utime(lock.fileno())
