"""Signals: the first asks a run to save and stop, the second SIGINT or SIGTERM ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_FROM_A_PERSON = (signal.SIGINT, signal.SIGTERM)
_ONCE = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGXCPU") if hasattr(signal, name))
"""Of a terminal that is closed, which comes once from the system and once from the shell; of a limit of the
processor's time, which comes every second: a second one says nothing new."""


class Stopped(BaseException):
    """A run that a signal ended, in good order."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


@contextmanager
def heeded() -> Iterator[Callable[[], int]]:
    """Gives the function that tells which signal has come since, or 0; a second SIGINT or SIGTERM ends the process.

    The signals are SIGINT, SIGTERM, SIGHUP and SIGXCPU. Only the main thread hears them; elsewhere it is always 0.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came and number in _FROM_A_PERSON:
            os._exit(128 + number)
        if not came:
            came.append(number)
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, b"stopping: what is under way is finished and saved; a second signal leaves at once\n")

    with _handlers(note, (*_FROM_A_PERSON, *_ONCE)):
        yield lambda: came[0] if came else 0


@contextmanager
def termination_raised() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGXCPU raise Stopped, wherever they are not heeded in another way."""
    came: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        if came and number in _ONCE:
            return
        came.append(number)
        raise Stopped(number, "stopped; the same command goes on with what is not finished")

    with _handlers(leave, (signal.SIGTERM, *_ONCE)):
        yield


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """`handler` hears these signals; one of `_ONCE` that is ignored, as nohup asks, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [n for n in numbers if n not in _ONCE or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
