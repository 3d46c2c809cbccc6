"""A cache of decoded data sets: arrays to memory-map, and beside them a note of the sources that they come from."""

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
from tljax.data.targets import KINDS
from tljax.types import ArrayExamples, InputError, Task

Prepare = Callable[[], tuple[list[Path], Callable[[], Task]]]
"""() -> the files and folders that the data comes from, and how to decode it."""

_NOTE = "task.json"
_OLD = {"name", "note", "classes", "fingerprint", "arrays", "sources"}
"""The keys of a note that was written before notes had digests."""
_STALE_SECONDS = 24 * 3600


def cached(name: str, folder: Path, prepare: Prepare, say: Callable[[str], None] = lambda line: None) -> Task:
    """The task that `folder` holds, or else decoded and written there; its arrays are memory-mapped, read only.

    A cached task is valid as long as every source has the size and the modification time that it had before it was
    decoded, and every file in the folder the SHA-256 that it was written with: all bytes are read once, whenever it is
    loaded (47 MB in about 0.04 s). A task whose files are not as they were written is decoded again, and `say` gets a
    line about it. The folder is written under another name and renamed, so a crash or a second process never leaves
    half of it; of two processes at once, both decode and the folder of one stays. Raises InputError where `folder`
    cannot be written.
    """
    try:
        task = _read(name, folder)
    except _Damaged as damaged:
        say(f"'{damaged}' is not as it was written: {name} is decoded again")
        task = None
    if task is not None:
        return task
    sources, decode = prepare()
    stamps = _stamps(sources)  # before decoding: a source that changes meanwhile is decoded again next time
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
    """{source: [size in bytes, modification time in ns]}."""
    stats = ((source, source.stat()) for source in sources)
    return {filenames.text(source): [stat.st_size, stat.st_mtime_ns] for source, stat in stats}


def _read(name: str, folder: Path) -> Task | None:
    """The task that `folder` holds; None if it holds none, or one of an old format or of sources that have changed.

    Raises _Damaged for a file that is not as it was written.
    """
    file = folder / _NOTE
    try:
        text = file.read_bytes()
    except OSError:
        return None
    note = _checked_note(text, file)
    try:
        if note is None or _stamps(Path(filenames.place(source)) for source in note["sources"]) != note["sources"]:
            return None
        arrays = {array: _mapped(folder / f"{array}.npy", sha256) for array, sha256 in note["arrays"].items()}
        # If another folder was renamed to this one meanwhile, the arrays are of both, and the note is another.
        if file.read_bytes() != text:
            return None
    except _Damaged:
        # Another process may have put a newer folder there, or be about to: then what we read is not damaged, only out
        # of date.
        try:
            replaced = file.read_bytes() != text
        except FileNotFoundError:
            replaced = True
        if replaced:
            return None
        raise
    except (OSError, UnicodeError):  # a source is gone, or its name is in another locale's encoding
        return None
    names = note.get("inputs")

    def inputs(split: str) -> Any:
        if names is None:
            return arrays[f"{split}_images"]
        return {names[i]: arrays[f"{split}_images_{i}"] for i in range(len(names))}

    train, test = (
        ArrayExamples(inputs(split), arrays[f"{split}_labels"], arrays.get(f"{split}_groups"))
        for split in ("train", "test")
    )
    classes, findings = tuple(note["classes"]), tuple(note["findings"])
    kind, outputs = note.get("kind", "classes"), note.get("outputs", 0)
    return Task(name, train, test, classes, note["fingerprint"], note["note"], findings, kind, outputs)


def _checked_note(text: bytes, file: Path) -> dict[str, Any] | None:
    """The note in `text`; None if it is of a version that wrote no digests.

    Raises _Damaged, with the `file`, unless the note is as it was written.
    """
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damaged(file) from error
    if isinstance(note, dict) and "sha256" not in note and note.keys() == _OLD:
        return None
    if not isinstance(note, dict) or text != _note_bytes({key: note[key] for key in note if key != "sha256"}):
        raise _Damaged(file)
    if not _is_note(note):
        raise _Damaged(file)
    return note


def _is_note(note: dict[str, Any]) -> bool:
    """Whether the entries of a note, which anybody may have written, have the types that `_write` gives them."""
    texts = [note.get(name) for name in ("name", "note", "fingerprint")]
    findings, classes, arrays = note.get("findings"), note.get("classes"), note.get("arrays")
    if not (isinstance(findings, list) and isinstance(classes, list) and isinstance(arrays, dict)):
        return False
    if not isinstance(note.get("sources"), dict):
        return False
    names = note.get("inputs", [])
    if (
        not isinstance(names, list)
        or type(note.get("outputs", 0)) is not int
        or note.get("kind", "classes") not in KINDS
    ):
        return False
    texts += [*findings, *classes, *arrays.values(), *names]
    images = [f"images_{i}" for i in range(len(names))] if "inputs" in note else ["images"]
    needed = {f"{split}_{what}" for split in ("train", "test") for what in (*images, "labels")}
    return all(isinstance(text, str) for text in texts) and needed <= arrays.keys() <= needed | _OPTIONAL


_OPTIONAL = {"train_groups", "test_groups"}


def _note_bytes(note: dict[str, Any]) -> bytes:
    """The bytes of a note's file: the note, with its SHA-256."""
    sha256 = hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()
    return json.dumps({**note, "sha256": sha256}, indent=1).encode()


def _mapped(file: Path, sha256: str) -> np.ndarray:
    """The array in a file, memory-mapped. Raises _Damaged unless the file's SHA-256 is `sha256`."""
    try:
        data = np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # the file is missing or empty
        raise _Damaged(file) from error
    if hashlib.sha256(data.data).hexdigest() != sha256:
        raise _Damaged(file)
    try:
        return npz.mapped(file)
    except InputError as error:
        raise _Damaged(file) from error


class _Summed:
    """A file with the SHA-256 of the bytes that it was handed, whatever the disk makes of them."""

    def __init__(self, out: IO[bytes]) -> None:
        self.out, self.sha256 = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write bytes and add them to the sum."""
        self.sha256.update(data)
        return self.out.write(data)


def _write(task: Task, stamps: dict[str, list[int]], folder: Path) -> None:
    """Write the arrays of a task and its note to a folder."""
    sums = {}
    names = list(task.train.arrays) if isinstance(task.train.arrays, dict) else None
    for word, split in (("train", task.train), ("test", task.test)):
        inputs = {"images": split.arrays}
        if names is not None:
            inputs = {f"images_{i}": split.arrays[names[i]] for i in range(len(names))}
        for what, array in (*inputs.items(), ("labels", split.targets), ("groups", split.groups)):
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
        **({"inputs": names} if names is not None else {}),
        **({"kind": task.kind, "outputs": task.outputs} if task.kind != "classes" else {}),
    }
    (folder / _NOTE).write_bytes(_note_bytes(note))


def _publish(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, in the place of an older one; of two processes either may win."""
    for attempt in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if attempt == 9:
            return  # what another process put there stays: taken aside now, nothing would follow it
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process took it aside first
            os.rename(folder, aside / "old")
        shutil.rmtree(aside, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    """A new folder beside `folder`, after leftovers are deleted. Raises InputError if it cannot be made."""
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
