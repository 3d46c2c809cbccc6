"""Decoded once, then memory-mapped: arrays that were read, kept beside a note of what they were read from."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tljax.types import InputError, Split, Task

Prepare = Callable[[], tuple[list[Path], Callable[[], Task]]]
"""() -> the files and folders that the data comes from, and how to decode it."""

_NOTE = "task.json"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_GROUPS = ("train_groups", "test_groups")
"""Kept where they are known."""
_STALE_SECONDS = 24 * 3600


def cached(name: str, folder: Path, prepare: Prepare) -> Task:
    """The task kept in `folder`, or else decoded and kept there; its arrays are memory-mapped, read only.

    What is kept holds as long as every source has the size and the modification time that it had before it was
    decoded; an array that is cut short or an unreadable note is decoded again. Bytes altered in place in the
    folder are not looked for. It is written beside and renamed, so a crash or a second process never leaves half
    of it; of two at once, both decode and one is kept. Raises InputError where `folder` cannot be written.
    """
    kept = _read(name, folder)
    if kept is not None:
        return kept
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
    return _read(name, folder) or task


def _stamps(sources: Iterable[Path]) -> dict[str, list[int]]:
    stats = ((source, source.stat()) for source in sources)
    return {str(source): [stat.st_size, stat.st_mtime_ns] for source, stat in stats}


def _read(name: str, folder: Path) -> Task | None:
    """What `folder` holds; None if there is nothing, or it is damaged, or its sources have changed."""
    try:
        text = (folder / _NOTE).read_text()
        note = json.loads(text)
        if _stamps(map(Path, note["sources"])) != note["sources"]:
            return None
        arrays = {
            file: np.load(folder / f"{file}.npy", mmap_mode="r", allow_pickle=False)
            for file in (*_ARRAYS, *_GROUPS)
            if file in note["arrays"]
        }
        if {file: [a.dtype.str, list(a.shape)] for file, a in arrays.items()} != note["arrays"]:
            return None
        # A folder renamed into place while we read it would mix two: the note tells.
        if (folder / _NOTE).read_text() != text:
            return None
        train, test = (
            Split(arrays[f"{split}_images"], arrays[f"{split}_labels"], arrays.get(f"{split}_groups"))
            for split in ("train", "test")
        )
        return Task(name, train, test, tuple(note["classes"]), note["fingerprint"], note["note"])
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, SyntaxError, zipfile.BadZipFile):
        return None


def _write(task: Task, stamps: dict[str, list[int]], folder: Path) -> None:
    arrays = {
        f"{word}_{what}": array
        for word, split in (("train", task.train), ("test", task.test))
        for what, array in split._asdict().items()
        if array is not None
    }
    for file, array in arrays.items():
        np.save(folder / f"{file}.npy", np.ascontiguousarray(array), allow_pickle=False)
    note = {
        "name": task.name,
        "note": task.note,
        "classes": list(task.classes),
        "fingerprint": task.fingerprint,
        "arrays": {file: [a.dtype.str, list(a.shape)] for file, a in arrays.items()},
        "sources": stamps,
    }
    (folder / _NOTE).write_text(json.dumps(note, indent=1))


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
    return InputError(f"'{parent}' cannot be written ({reason}): give a folder that can be with --data_dir")
