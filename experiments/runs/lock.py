"""Who may write to a run directory: one process at a time, whatever machine it is on."""

import contextlib
import errno
import fcntl
import functools
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from experiments.runs import console
from tljax import heartbeat
from tljax.types import InputError

BEAT = 10.0
"""Seconds after which an owner touches its lock again."""
LOST = 60.0
"""Seconds after which an owner on another host that has not touched its lock counts as gone."""


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Own a run directory; its file .lock names the owner until a clean end.

    Raises InputError where another process has it, and where .lock is no file of its own: a link's target would be
    emptied. What an owner left that ended without leaving is taken over, aloud.
    """
    with _opened(workdir / ".lock") as lock:
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


def _opened(file: Path) -> TextIO:
    """The file .lock, open to read and to append, made if need be."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)

    try:
        told = os.lstat(file)
        if not stat.S_ISREG(told.st_mode) or told.st_nlink > 1:
            raise InputError(f"'{file}' is a link or no file: delete it")
    except FileNotFoundError:
        pass
    try:
        return open(file, "a+", encoding="utf-8", errors="backslashreplace", opener=opener)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"'{file}' is a link or no file: delete it") from error
        raise


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
