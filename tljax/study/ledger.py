"""A ledger of looks and confirmations: how often a test set was judged, and false discoveries over all confirmations.

The ledger is a file of the user's, in JSON lines that are only ever added to. Each line carries the SHA-256 of itself
and of the line before it, so that no line is altered, left out or put between others unnoticed; what was cut from its
end cannot be seen. A line that a killed process or a full disk left unfinished is cut off before the next is added.

A confirmation is a claim that was registered, tested once on items and seeds that chose nothing. Its evidence is an
e-value, a number of at least 0 whose mean is at most 1 where the claim is false. e-LOND (Xu and Ramdas 2024, "Online
multiple testing with e-values", arXiv:2311.06412) confirms the t-th claim if its e-value is at least
1 / (level * share_t * (discoveries + 1)), where the shares sum to 1 and discoveries are the claims confirmed before.
The expected share of false ones among all that are ever confirmed is then at most the level, whatever the dependence
between the e-values, as between confirmations that share their test items. A claim that was made because others were
confirmed on the same items is not as free as the rest: register what is to be confirmed before the first of them.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tljax.types import InputError

LEVEL = 0.05
"""The level of a new ledger: the expected share of false ones among its confirmed claims is at most so large."""
FORMAT = 1
SMALLEST_P, LARGEST_P = 1e-8, 1e-2
"""Between these p-values `e_value` is in proportion to 1 / p; a smaller p counts as the one, a larger as nothing."""
WAIT = 30.0
"""Seconds that a process waits for another that has the ledger."""

Entry = dict[str, Any]


def e_value(p: float) -> float:
    """An e-value of a p-value: c / p between `SMALLEST_P` and `LARGEST_P`, so that it is at most c / SMALLEST_P.

    A decreasing function of p whose integral over 0 .. 1 is at most 1 turns any p-value into an e-value (Vovk and Wang
    2021, "E-values: calibration, combination and applications", arXiv:1912.06116, section 2). This one has the integral
    1, and puts its weight where e-LOND decides; below its least p no more is believed of the tail of t.
    The e-process of `sequences` is of seeds alone, given the test items; p is of `statistics.crossed`, of both.

    >>> round(e_value(1e-4)), round(e_value(1e-5)), e_value(0.05)
    (675, 6750, 0.0)
    """
    if not 0 <= p <= 1:
        raise InputError(f"p {p}: give a probability, 0 to 1")
    return 0.0 if p > LARGEST_P else 1 / (1 + math.log(LARGEST_P / SMALLEST_P)) / max(p, SMALLEST_P)


def share(number: int) -> float:
    """The share of the level that the confirmation of this number (1 is the first) has; all shares sum to 1.

    1 / lg(number + 9) - 1 / lg(number + 10): differences of a sequence that falls from 1 to 0. They fall a little
    faster than 1 / number, so that no number of confirmations has to be planned.

    >>> round(share(1), 4), round(sum(map(share, range(1, 10**5))), 2)
    (0.0397, 0.8)
    """
    if number < 1:
        raise InputError(f"confirmation {number}: the first is 1")
    return 1 / math.log10(number + 9) - 1 / math.log10(number + 10)


def threshold(number: int, discoveries: int, level: float = LEVEL) -> float:
    """The least e-value that confirms the claim of this number after so many were confirmed (e-LOND).

    >>> round(threshold(1, 0)), round(threshold(11, 0)), round(threshold(11, 3))
    (503, 1624, 406)
    """
    return 1 / (level * share(number) * (discoveries + 1))


class Ledger:
    """The lines of a ledger, while this process alone has it."""

    def __init__(self, file: Path, descriptor: int, entries: list[Entry], last: bytes, end: int) -> None:
        self.file = file
        self.entries = entries
        """What was written before, the oldest first."""
        self._descriptor, self._last, self._end = descriptor, last, end

    @property
    def level(self) -> float:
        """The share of false discoveries that is allowed on average."""
        return float(self.entries[0]["level"])

    def of_kind(self, kind: str, test_set: str | None = None) -> list[Entry]:
        """The entries of a kind: look, registration or confirmation; those of one test set, or all."""
        return [
            entry
            for entry in self.entries
            if entry["kind"] == kind and test_set in (None, entry.get("test_set", test_set))
        ]

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry behind the others, whole or not at all.

        Raises OSError for what the disk refuses; the file is then as it was.
        """
        record = json.loads(json.dumps(dict(entry)))
        line = json.dumps({**record, "sha256": chained_digest(record, self._last)}).encode() + b"\n"
        rest, position = line, self._end
        try:
            while rest:
                count = os.pwrite(self._descriptor, rest, position)
                rest, position = rest[count:], position + count
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            error.filename = error.filename or str(self.file)
            raise
        self.entries.append(record)
        self._last, self._end = line, position


@contextlib.contextmanager
def opened(file: Path, level: float | None = None, say: Callable[[str], None] = lambda line: None) -> Iterator[Ledger]:
    """Have a ledger for this process alone; a new one is begun with the level (default `LEVEL`).

    `say` gets a line on what a killed process left unfinished. Raises InputError for a file that is a link or no file,
    that cannot be written, that another process has for long, that is no ledger or was altered, and for another level
    than its own.
    """
    if level is not None and not 0 < level < 1:
        raise InputError(f"level {level:g} of a ledger: give a share of false discoveries, above 0 and below 1")
    descriptor = _descriptor(file)
    try:
        _lock(file, descriptor)
        entries, last, end = _read(file, descriptor)
        size = os.fstat(descriptor).st_size
        if size > end:
            os.ftruncate(descriptor, end)
            say(f"'{file}': its last {size - end} bytes are cut off, a line that was never finished")
        ledger = Ledger(file, descriptor, entries, last, end)
        if not entries:
            ledger.add({"kind": "ledger", "format": FORMAT, "level": LEVEL if level is None else level})
        elif level not in (None, ledger.level):
            raise InputError(
                f"'{file}' allows {ledger.level:g} of false discoveries, not {level:g}: the level is chosen before the "
                "first look; leave it out"
            )
        yield ledger
    finally:
        os.close(descriptor)  # which gives the lock back


def _descriptor(file: Path) -> int:
    """The file, opened to read and to write; it is made if it is not there."""
    no_file = InputError(f"'{file}' is a link or no file: name another ledger")
    try:
        if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
            raise no_file
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise no_file from error
        reason = error.strerror or str(error)
        raise InputError(
            f"ledger '{file}' cannot be written ({reason}), and a look that is not counted is none: name a file that "
            "you may write, in a folder that is there"
        ) from error


def _lock(file: Path, descriptor: int) -> None:
    until = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise InputError(f"ledger '{file}' is in use by another process: wait for it") from error
            time.sleep(0.05)
        except OSError as error:
            raise InputError(
                f"ledger '{file}' cannot be locked ({error.strerror}): name one on a local disk"
            ) from error


_FORMS: dict[str, dict[str, Any]] = {
    "ledger": {"format": int, "level": float},
    "look": {"test_set": str, "half": str, "methods": list, "seeds": list, "fits": str, "keys": list},
    "registration": {
        **{"test_set": str, "half": str, "digest": str, "claim": str, "methods": list, "keys": list, "number": int}
    },
    "confirmation": {"test_set": str, "digest": str, "number": int, "e": float, "decision": str},
}
"""{kind of entry: the fields that are read again, and their types}."""


def _read(file: Path, descriptor: int) -> tuple[list[Entry], bytes, int]:
    """(the entries, the last line, where it ends in bytes); a last line without its end is left out."""
    data = b""
    while part := os.pread(descriptor, 1 << 20, len(data)):
        data += part
    entries: list[Entry] = []
    last, end = b"", 0
    *lines, rest = data.split(b"\n")  # what follows the last end of a line was never finished
    for line in lines:
        line += b"\n"
        entries.append(_checked(file, line, last, len(entries) + 1))
        last, end = line, end + len(line)
    begun = rest.rstrip(b"\0")  # of a machine that went down
    if not (begun.startswith(_BEGIN) or _BEGIN.startswith(begun)):
        raise InputError(f"'{file}', line {len(lines) + 1} is no line of a ledger: {_REMEDY}")
    return entries, last, end


_BEGIN = b'{"kind": "'
"""What every line begins with: a last line without its end that begins otherwise is of another file, and stays."""


def _checked(file: Path, line: bytes, before: bytes, number: int) -> Entry:
    """The entry of a line, without its SHA-256; raises InputError if it was altered, or is no entry."""
    try:
        entry = json.loads(line)
        digest = entry.pop("sha256", None)
        intact = digest == chained_digest(entry, before)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"'{file}', line {number} is no line of a ledger: {_REMEDY}") from error
    form = _FORMS.get(entry.get("kind")) if isinstance(entry.get("kind"), str) else None
    first_is_head = (entry.get("kind") == "ledger") == (number == 1)
    if not intact or form is None or not first_is_head or entry.get("format", FORMAT) != FORMAT:
        raise InputError(f"'{file}', line {number} is not as it was written: {_REMEDY}")
    for name, kind in form.items():
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"'{file}', line {number} has no {name} of a {entry['kind']}: {_REMEDY}")
    return dict(entry)


_REMEDY = "restore the ledger, or begin another with other test examples"


def chained_digest(entry: Mapping[str, Any], before: bytes) -> str:
    """SHA-256 of an entry and of the line before it."""
    return hashlib.sha256(before + json.dumps(entry, sort_keys=True).encode()).hexdigest()
