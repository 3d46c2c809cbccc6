"""Decoded once, then memory-mapped: arrays that were read, kept beside a note of what they were read from."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from tljax import npz
from tljax.data import filenames
from tljax.types import InputError, Split, Task

Prepare = Callable[[], tuple[list[Path], Callable[[], Task]]]
"""() -> the files and folders that the data comes from, and how to decode it."""

_NOTE = "task.json"
_OLD = {"name", "note", "classes", "fingerprint", "arrays", "sources"}
"""What a note says that was written before there were digests."""
_STALE_SECONDS = 24 * 3600


def cached(name: str, folder: Path, prepare: Prepare, say: Callable[[str], None] = lambda line: None) -> Task:
    """The task kept in `folder`, or else decoded and kept there; its arrays are memory-mapped, read only.

    What is kept holds as long as every source has the size and the modification time that it had before it was
    decoded, and every file in the folder the SHA-256 that it was written with: all bytes are read once, whenever it is
    loaded (47 MB in about 0.04 s). What is not as it was written is decoded again, and `say` is told in one line. It
    is written beside and renamed, so a crash or a second process never leaves half of it; of two at once, both decode
    and one is kept. Raises InputError where `folder` cannot be written.
    """
    try:
        prepared = _read(name, folder)
    except _Damaged as damaged:
        say(f"'{damaged}' is not as it was written: {name} is decoded again")
        prepared = None
    if prepared is not None:
        return prepared
    sources, decode = prepare()
    stamps = _stamps(sources)  # before decoding: what changes meanwhile is decoded again next time
    task = decode()
    temporary = _temporary(folder)
    try:
        _write(task, stamps, temporary)
        _publish(temporary, folder)
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(_Damaged):
        return _read(name, folder) or task
    return task


class _Damaged(Exception):
    """A file that is not as it was written."""


def _stamps(sources: Iterable[Path]) -> dict[str, list[int]]:
    stats = ((source, source.stat()) for source in sources)
    return {filenames.text(source): [stat.st_size, stat.st_mtime_ns] for source, stat in stats}


def _read(name: str, folder: Path) -> Task | None:
    """What `folder` holds; None if there is nothing, or it is of old, or its sources have changed.

    Raises _Damaged for a file that is not as it was written.
    """
    place = folder / _NOTE
    try:
        text = place.read_bytes()
    except OSError:
        return None
    note = _checked_note(text, place)
    try:
        if note is None or _stamps(Path(filenames.place(source)) for source in note["sources"]) != note["sources"]:
            return None
        arrays = {file: _mapped(folder / f"{file}.npy", sha256) for file, sha256 in note["arrays"].items()}
        # A folder renamed into place while we read it would mix two: the note tells.
        if place.read_bytes() != text:
            return None
    except _Damaged:
        # Another process may have put a newer one there: then it is only out of date.
        if place.is_file() and place.read_bytes() != text:
            return None
        raise
    except (OSError, UnicodeError):  # a source that is gone, or of another locale's name
        return None
    train, test = (
        Split(arrays[f"{split}_images"], arrays[f"{split}_labels"], arrays.get(f"{split}_groups"))
        for split in ("train", "test")
    )
    lists = tuple(note["classes"]), tuple(note["findings"])
    return Task(name, train, test, lists[0], note["fingerprint"], note["note"], lists[1])


def _checked_note(text: bytes, place: Path) -> dict[str, Any] | None:
    """The note, if it is as it was written; None if it is of a version that kept no digests."""
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damaged(place) from error
    if isinstance(note, dict) and "sha256" not in note and note.keys() == _OLD:
        return None
    if not isinstance(note, dict) or text != _noted({key: note[key] for key in note if key != "sha256"}):
        raise _Damaged(place)
    if not _is_note(note):
        raise _Damaged(place)
    return note


def _is_note(note: dict[str, Any]) -> bool:
    """Whether what a note says, as it was written by whomever, is of the types that `_write` gives it."""
    texts = [note.get(name) for name in ("name", "note", "fingerprint")]
    findings, classes, arrays = note.get("findings"), note.get("classes"), note.get("arrays")
    if not (isinstance(findings, list) and isinstance(classes, list) and isinstance(arrays, dict)):
        return False
    if not isinstance(note.get("sources"), dict):
        return False
    texts += [*findings, *classes, *arrays.values()]
    needed = {f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")}
    return all(isinstance(text, str) for text in texts) and needed <= arrays.keys() <= needed | _OPTIONAL


_OPTIONAL = {"train_groups", "test_groups"}


def _noted(note: dict[str, Any]) -> bytes:
    """The note with its own digest, as it is written."""
    sha256 = hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()
    return json.dumps({**note, "sha256": sha256}, indent=1).encode()


def _mapped(file: Path, sha256: str) -> np.ndarray:
    """The array in a file, memory-mapped; raises _Damaged unless the file's SHA-256 is `sha256`."""
    try:
        data = np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # none there, or empty
        raise _Damaged(file) from error
    if hashlib.sha256(data.data).hexdigest() != sha256:
        raise _Damaged(file)
    try:
        return npz.mapped(file)
    except InputError as error:
        raise _Damaged(file) from error


class _Summed:
    """A file with the SHA-256 of what was given to be written, whatever the disk makes of it."""

    def __init__(self, out: IO[bytes]) -> None:
        self.out, self.sha256 = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and add to the sum."""
        self.sha256.update(data)
        return self.out.write(data)


def _write(task: Task, stamps: dict[str, list[int]], folder: Path) -> None:
    sums = {}
    for word, split in (("train", task.train), ("test", task.test)):
        for what, array in split._asdict().items():
            if array is not None:
                with open(folder / f"{word}_{what}.npy", "wb") as out:
                    summed = _Summed(out)
                    np.save(summed, np.ascontiguousarray(array), allow_pickle=False)
                sums[f"{word}_{what}"] = summed.sha256.hexdigest()
    note = {
        "name": task.name,
        "note": task.note,
        "findings": list(task.findings),
        "classes": list(task.classes),
        "fingerprint": task.fingerprint,
        "arrays": sums,
        "sources": stamps,
    }
    (folder / _NOTE).write_bytes(_noted(note))


def _publish(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; what is there goes, and of two processes either may win."""
    for _ in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process took it aside first
            os.rename(folder, aside / "old")
        shutil.rmtree(aside, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f".{folder.name}.*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    except OSError as error:
        raise _unwritable(parent, error) from error


def _unwritable(parent: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"'{parent}' cannot be written ({reason}): give a folder that can be with `data_dir=`")
