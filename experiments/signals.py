"""Signals: the first asks a run to save and stop, the second ends it at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A run that a signal ended, in good order."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


@contextmanager
def heeded() -> Iterator[Callable[[], int]]:
    """Gives the function that tells which of SIGINT and SIGTERM has come since, or 0; a second one ends the process.

    Only the main thread hears signals; elsewhere it is always 0.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        os.write(2, b"stopping: what is under way is finished and saved; a second signal leaves at once\n")

    with _handlers(note):
        yield lambda: came[0] if came else 0


@contextmanager
def termination_raised() -> Iterator[None]:
    """SIGTERM raises Stopped, wherever it is not heeded in another way."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, "stopped; the same command goes on with what is not finished")

    with _handlers(leave, (signal.SIGTERM,)):
        yield


@contextmanager
def _handlers(
    handler: Callable[[int, FrameType | None], None],
    numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
