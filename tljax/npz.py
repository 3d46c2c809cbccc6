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
    """{name: array} of an .npz file: all its arrays, or those of `wanted` that it has.

    Other arrays are not read. A name of `wanted` that ends in "/" stands for all that begin with it. `known` are the
    names that other readers take. Raises InputError for a name that is
    nearly one of `wanted` or `known`, as its array would be lost without a word; for a file that cannot be read, is
    damaged or a single array; and for Python objects.
    """
    try:
        if file.exists() and not file.is_file():  # opening a pipe would wait for its writer
            raise ValueError("it is no file")
        # Opened here: np.load leaves a damaged file open.
        with file.open("rb") as stream:
            return unpack(stream, f"'{file}'", wanted, known)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name with a zero byte raises ValueError
        raise InputError(f"'{file}' cannot be read as .npz ({error}): save it again with numpy.savez") from error


def unpack(
    stream: BinaryIO,
    what: str,
    wanted: Collection[str] | None = None,
    known: Collection[str] = (),
    remedy: str = "save it again with numpy.savez",
) -> dict[str, np.ndarray]:
    """{name: array} of the bytes of an .npz file: all its arrays, or those of `wanted` that it has.

    Raises InputError as `read` does; in its message `what` names the bytes and `remedy` says what to do.

    >>> import io
    >>> unpack(io.BytesIO(b"PK"), "'x.npz'")
    Traceback (most recent call last):
    tljax.types.InputError: 'x.npz' cannot be read as .npz (it is damaged, or of another kind): save it again with \
numpy.savez
    """
    name = ""
    arrays = {}
    try:
        with warnings.catch_warnings(action="ignore"):  # the parser warns about a damaged header
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"{what} is a single array (.npy): save named arrays with numpy.savez")
            with archive:
                if wanted is not None:
                    refuse_slips(
                        [name for name in archive.files if not _is_wanted(name, wanted)], {*wanted, *known}, what
                    )
                _refuse_larger(archive, wanted, what, remedy)
                for name in archive.files:
                    if _is_wanted(name, wanted):
                        arrays[name] = archive[name]
                        if not isinstance(
                            arrays[name], np.ndarray
                        ):  # np.load gives the bytes of a member that is no .npy
                            raise InputError(f"{what}: '{name}' is no array: {remedy}")
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{what}: '{name}' says that it is larger than the memory: {remedy}") from error
    except Exception as error:  # the errors of NumPy, zipfile and zlib have no type in common
        if "Object arrays" in str(error):
            raise InputError(
                f"{what}: '{name}' holds Python objects (pickle): save it as numbers or strings"
            ) from error
        reason = str(error) if "pickle" not in str(error) else "it is damaged, or of another kind"
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise InputError(f"{what} cannot be read as .npz ({reason}): {remedy}") from error
    return arrays


def _is_wanted(name: str, wanted: Collection[str] | None) -> bool:
    """Whether an array is to be read: by its name, or by a beginning of it that ends in "/"."""
    return wanted is None or name in wanted or any(name.startswith(part) for part in wanted if part.endswith("/"))


def _refuse_larger(archive: Any, wanted: Collection[str] | None, what: str, remedy: str) -> None:
    """Raises InputError if the wanted members, unpacked, are larger than the free memory: a small file may hold much.

    The sizes are those in the archive's directory, beyond which `zipfile` unpacks nothing of a member.
    """
    members = [item for item in archive.zip.infolist() if _is_wanted(item.filename.removesuffix(".npy"), wanted)]
    size, free = sum(item.file_size for item in members), _free_memory()
    if free is not None and size > free:
        raise InputError(
            f"{what} unpacks to {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: take fewer "
            f"examples, or {remedy} if that is not what it holds"
        )


def _free_memory() -> int | None:
    """Bytes of memory that the system can give without swapping; None where it does not say."""
    try:
        match = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def refuse_slips(names: Collection[str], known: Collection[str], what: str, kind: str = "array") -> None:
    """Raise InputError if a name is nearly a known one: its `kind` would be left out without a word.

    >>> refuse_slips(["notes", "train_group"], ["train_images", "train_groups"], "'x.npz'")
    Traceback (most recent call last):
    tljax.types.InputError: 'x.npz' has the array 'train_group', which nothing reads; did you mean 'train_groups'? \
Rename it, or leave it out
    """
    for name in names:
        if (likely := plugins.meant(name, sorted(known))) is not None:
            raise InputError(
                f"{what} has the {kind} '{name}', which nothing reads; did you mean '{likely}'? Rename it, or leave it "
                "out"
            )


def mapped(file: Path) -> np.ndarray:
    """The array of an .npy file, memory-mapped, read only. Raises InputError if the file is missing or damaged."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many types for a damaged header, or one that does not fit the file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"'{file}' cannot be read as .npy ({reason})") from error
