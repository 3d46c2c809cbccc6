"""Standard output and error that a run survives: whoever reads them may go, the disk behind them may fill."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Descriptor(io.FileIO):
    """A file descriptor that takes all that is written, and loses it once it cannot be written any more."""

    fault: OSError | None = None
    quiet = False
    """Whether it says nothing of a reader that has gone."""

    def write(self, data: Any) -> int:
        """Write, or lose, `data`; the number of its bytes."""
        while self.fault is None:
            try:
                count = super().write(data)
                if count is not None:
                    return count
                select.select((), (self,), ())  # its other end does not let it wait, and is full
            except OSError as error:
                self.fault = error
                if not (self.quiet and error.errno in _GONE):
                    _warn(error)
        return memoryview(data).nbytes


class _Text(io.TextIOWrapper):
    """Text that somebody else's code cannot close."""

    def close(self) -> None:
        """Flush alone."""
        if not self.closed:
            self.flush()


_GONE = (errno.EPIPE, errno.EIO)
"""A reader, or a terminal, that is there no more: nobody misses what it would have read."""


def _warn(error: OSError) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"standard output cannot be written ({error.strerror}): what follows is not shown", file=sys.stderr)


@contextmanager
def lasting(quiet: bool = False) -> Iterator[None]:
    """Standard output and error lose what cannot be written, show as \\udcff what their encoding cannot, and stay open.

    That standard output is lost is said once on standard error; with `quiet` not if its reader has gone. A stream that
    is no file descriptor, such as a test's, stays as it is. Both are put back afterwards.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(before[0], quiet), _lasting(before[1], quiet=True)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Text):
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: Any, quiet: bool) -> Any:
    """Such a stream in place of one that is a file descriptor; any other as it is."""
    binary = getattr(stream, "buffer", None)  # without a `raw` where Python does not buffer (-u)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(binary, "raw", binary), io.FileIO):
        return stream
    stream.flush()
    # A copy: where somebody's code closes descriptor 1, the next file that is opened would get the table. It stays
    # open, since what logs may hold the stream.
    descriptor = _Descriptor(os.dup(stream.fileno()), "wb", closefd=False)
    descriptor.quiet = quiet
    return _Text(
        io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


_SHOWN = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\t\n"
}
"""{character that steers a terminal: how it is shown}: the controls of ISO 6429, Unicode's of lines and direction."""


def visible(text: str) -> str:
    """A text whose control characters are shown and steer no terminal: names of files and errors are anybody's.

    >>> visible("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    return text.translate(_SHOWN)


def lost() -> bool:
    """Whether something of standard output was lost that somebody wanted: not where its reader has gone."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    fault = raw.fault if isinstance(raw, _Descriptor) else None
    return fault is not None and fault.errno not in _GONE
