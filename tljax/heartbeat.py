"""Signs of life from a process, while it does something else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def every(seconds: float, beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` every so many seconds from a thread of its own; it must not raise."""
    ended = threading.Event()

    def beating() -> None:
        while not ended.wait(seconds):
            beat()

    thread = threading.Thread(target=beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
