"""Flags of XLA in the environment: XLA ends the process, without an exception, at one that it does not know."""

import functools
import os
import resource
import select
import signal
import time
import warnings
from typing import NoReturn

from jaxlib import xla_client

from tljax.types import InputError

_SECONDS = 20.0
"""For which XLA is waited for; whoever takes longer has read its flags."""


def refuse_unknown() -> None:
    """Raise InputError for what XLA does not take in XLA_FLAGS, with its own words."""
    text = os.environ.get("XLA_FLAGS", "")
    if text and (words := _fault(text)):
        raise InputError(f"XLA_FLAGS={text[:200]} in the environment: {words}: unset it, or mend it")


@functools.cache
def _fault(text: str) -> str:
    """What XLA says of its flags before it ends a process, in a copy of this one; "" where it takes them."""
    if not hasattr(os, "fork"):
        return ""
    reading, writing = os.pipe()
    try:
        with warnings.catch_warnings(action="ignore"):  # of threads, which are not in the copy: it needs none of them
            child = os.fork()
    except OSError:  # the system lets this user start no more processes
        os.close(reading)
        os.close(writing)
        return ""
    if child == 0:
        _read_flags(writing)
    os.close(writing)
    output = _read(reading, child)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended in (0, -signal.SIGKILL):
        return ""
    lines = [line.partition("] ")[2] or line for line in output.decode(errors="replace").splitlines()]
    return next((line for line in lines if "XLA_FLAGS" in line or "flag" in line.lower()), "XLA ends at it")[:200]


def _read_flags(writing: int) -> NoReturn:
    """Make XLA read its flags, with what it says in a pipe, and end."""
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    xla_client.CompileOptions()
    os._exit(0)


def _read(reading: int, child: int) -> bytes:
    """What comes out of a pipe until its end; the process at its other end is ended where that takes too long."""
    output, end = b"", time.monotonic() + _SECONDS
    with open(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            part = pipe.read(65536)
            if not part:
                return output
            output = output[:65536] + part
    os.kill(child, signal.SIGKILL)
    return output
