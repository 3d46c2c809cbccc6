"""Optuna's journal of a search in a file: what a full disk or a killed process cut is mended, what was altered refused.

Optuna appends a line a change, and never writes in the middle. An append that is cut leaves a last line without its
end, behind which the next process would write: every later read would fail. So under the journal's lock such a line,
which nobody was told of, is cut off before anything is appended, and an append that fails is taken back. Each line
carries the SHA-256 of itself and of the line before it; lines of an older tljax, which carry none, are read until the
first that does.

This is no part of `search`, which loads Optuna only when a search begins, so that help is quick.
"""

import json
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

from tljax.study.ledger import chained_digest
from tljax.types import InputError


class Journal(BaseJournalBackend):
    """A backend of Optuna's JournalStorage; `say` gets a line on what is cut off, and on lines without a SHA-256.

    Raises InputError if the file is a link, a pipe or a device, and for a line, by its number, that was altered.
    """

    def __init__(self, file: str, say: Callable[[str], None] = warnings.warn) -> None:
        self._file, self._say = Path(file), say
        self._lock = JournalFileSymlinkLock(file)
        self._ends = [0]
        """Where each line that was read ends, in bytes, after the 0 at which the first begins."""
        self._last = b""
        """The last line that was read."""
        self._signed = False
        with self._opened(os.O_CREAT | os.O_RDONLY):
            pass
        with self._locked(), self._opened(os.O_RDWR) as stream:
            self._mended(stream)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _opened(self, flags: int) -> Any:
        """The file, opened anew; raises InputError if it is a link, which may lead anywhere, or no regular file."""
        not_a_file = InputError("it is a link or no file: name another", field="storage", value=self._file)
        if os.path.lexists(self._file) and not stat.S_ISREG(os.lstat(self._file).st_mode):
            raise not_a_file
        return open(os.open(self._file, flags | os.O_NOFOLLOW, 0o644), "r+b" if flags & os.O_RDWR else "rb")

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The entries from a number on, less a last line without its end: another process is writing it, or was cut."""
        if log_number_from != len(self._ends) - 1:
            self._ends, self._last, self._signed = [0], b"", False
        with self._opened(os.O_RDONLY) as stream:
            stream.seek(self._ends[-1])
            for line in stream:
                if not line.endswith(b"\n") or (not stream.peek(1) and not _is_entry(line)):
                    break
                entry = self._checked(line)
                self._ends.append(self._ends[-1] + len(line))
                self._last = line
                if len(self._ends) - 1 > log_number_from:
                    yield entry

    def _checked(self, line: bytes) -> dict[str, Any]:
        """The entry of a line, without its SHA-256; raises InputError if it was altered, or is no entry."""
        number = len(self._ends)
        remedy = "restore it, or begin another with `storage=` or a new `workdir=`"
        try:
            entry = json.loads(line)
            digest = entry.pop("sha256", None)
            intact = digest == chained_digest(entry, self._last) if self._signed or digest is not None else True
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"'{self._file}', line {number} is no entry of a search ({error}): {remedy}") from error
        if not intact or not isinstance(entry.get("op_code"), int):
            raise InputError(f"'{self._file}', line {number} is not as it was written: {remedy}")
        if digest is None and number == 1:
            self._say(f"'{self._file}' was begun by an older tljax: lines without a SHA-256 are believed as they stand")
        self._signed = self._signed or digest is not None
        return dict(entry)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries behind the others, all or none."""
        with self._locked(), self._opened(os.O_RDWR) as stream:
            end, last = self._mended(stream)
            lines = b""
            for entry in logs:
                entry = json.loads(json.dumps(entry))
                last = (
                    json.dumps({**entry, "sha256": chained_digest(entry, last)}, separators=(",", ":")).encode() + b"\n"
                )
                lines += last
            at = end
            try:
                while lines:  # not through the stream, which would try again what failed when it is closed
                    count = os.pwrite(stream.fileno(), lines, at)
                    lines, at = lines[count:], at + count
                os.fsync(stream.fileno())
            except OSError as error:
                os.ftruncate(stream.fileno(), end)
                error.filename = error.filename or str(self._file)
                raise

    def _mended(self, stream: Any) -> tuple[int, bytes]:
        """(where the last whole entry ends, its line); what follows it is cut off, and `say` told so."""
        size = os.fstat(stream.fileno()).st_size
        begin = max(0, size - _TAIL)
        stream.seek(begin)
        lines = stream.readlines()
        if begin and len(lines) < 4:  # long lines: from the beginning, then
            stream.seek(0)
            lines = stream.readlines()
        end = size
        if lines and not _is_entry(lines[-1]):
            end -= len(lines.pop())
            os.ftruncate(stream.fileno(), end)
            self._say(f"'{self._file}': its last {size - end} bytes are cut off, a line that was never finished")
        return end, lines[-1] if lines else b""


_TAIL = 2**20
"""Bytes at the end of a journal in which its last lines are looked for."""


def _is_entry(line: bytes) -> bool:
    """Whether a line is whole, an object in JSON with its end."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
