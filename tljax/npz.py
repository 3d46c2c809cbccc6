"""Arrays in NumPy's files, .npz and .npy, from anybody: what is pickled is never read."""

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tljax import plugins
from tljax.types import InputError


def read(file: Path, wanted: Collection[str] | None = None, known: Collection[str] = ()) -> dict[str, np.ndarray]:
    """{name: array} of an .npz file, all of it or what it has of `wanted`.

    What it has beside that is not read; a name that is nearly one of `wanted` or `known`, those that others read,
    is refused, as what it was to say would be lost. Raises InputError for a file that cannot be read, is damaged or
    a single array, and for Python objects in it.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        # Opened here: np.load leaves a damaged file open.
        with file.open("rb") as stream:
            return unpack(stream, f"'{file}'", wanted, known)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the second of a name with a zero byte
        raise InputError(f"'{file}' cannot be read as .npz ({error}): save it again with numpy.savez") from error


def unpack(
    stream: BinaryIO,
    what: str,
    wanted: Collection[str] | None = None,
    known: Collection[str] = (),
    remedy: str = "save it again with numpy.savez",
) -> dict[str, np.ndarray]:
    """The same of the bytes of an .npz; `what` they are and the `remedy` are words of the InputError that it raises.

    >>> import io
    >>> unpack(io.BytesIO(b"PK"), "'x.npz'")
    Traceback (most recent call last):
    tljax.types.InputError: 'x.npz' cannot be read as .npz (it is damaged, or of another kind): save it again with \
numpy.savez
    """
    name = ""
    arrays = {}
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parser, about a damaged head
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"{what} is a single array (.npy): save named arrays with numpy.savez")
            with archive:
                if wanted is not None:
                    refuse_slips(archive.files, {*wanted, *known}, what)
                _refuse_larger(archive, wanted, what, remedy)
                for name in archive.files:
                    if wanted is None or name in wanted:
                        arrays[name] = archive[name]
                        if not isinstance(arrays[name], np.ndarray):  # a member that is no .npy: its bytes
                            raise InputError(f"{what}: '{name}' is no array: {remedy}")
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{what}: '{name}' says that it is larger than the memory: {remedy}") from error
    except Exception as error:  # of NumPy, zipfile and what unpacks: they have no type in common
        if "Object arrays" in str(error):
            raise InputError(
                f"{what}: '{name}' holds Python objects (pickle): save it as numbers or strings"
            ) from error
        reason = str(error) if "pickle" not in str(error) else "it is damaged, or of another kind"
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise InputError(f"{what} cannot be read as .npz ({reason}): {remedy}") from error
    return arrays


def _refuse_larger(archive: Any, wanted: Collection[str] | None, what: str, remedy: str) -> None:
    """Raises InputError for members that unpacked are larger than the memory that is free: small files may hold much.

    What the directory of an archive says is enough: no more of a member is unpacked.
    """
    members = [
        item for item in archive.zip.infolist() if wanted is None or item.filename.removesuffix(".npy") in wanted
    ]
    size, free = sum(item.file_size for item in members), _free_memory()
    if free is not None and size > free:
        raise InputError(
            f"{what} unpacks to {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: take fewer "
            f"examples, or {remedy} if that is not what it holds"
        )


def _free_memory() -> int | None:
    """Bytes of memory that the system can give without swapping; None where it does not say."""
    try:
        line = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(line[1]) * 1024 if line else None


def refuse_slips(names: Collection[str], known: Collection[str], what: str, kind: str = "array") -> None:
    """Raise InputError for a name that is nearly a known one: it would be left out without a word.

    >>> refuse_slips(["notes", "train_group"], ["train_images", "train_groups"], "'x.npz'")
    Traceback (most recent call last):
    tljax.types.InputError: 'x.npz' has the array 'train_group', which nothing reads; did you mean 'train_groups'? \
Rename it, or leave it out
    """
    for name in names:
        if (near := plugins.meant(name, sorted(known))) is not None:
            raise InputError(
                f"{what} has the {kind} '{name}', which nothing reads; did you mean '{near}'? Rename it, or leave it "
                "out"
            )


def mapped(file: Path) -> np.ndarray:
    """The array of an .npy file, memory-mapped, read only; raises InputError for a file that is damaged or none."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of NumPy: a damaged head, or one that does not fit the file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"'{file}' cannot be read as .npy ({reason})") from error
