"""Files written whole: a crash leaves the old one or the new one, and no link is followed."""

import contextlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

from tljax.types import InputError

_LEFT = re.compile(r"\.[0-9a-f]{16}\..*partial")
"""Names of `partial`."""


def place(text: str | os.PathLike[str]) -> Path:
    """The absolute path of a text that may begin with `~` or `~user`; raises InputError where that has no home.

    >>> place("/data/../mnist.npz")
    PosixPath('/data/../mnist.npz')
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"'{text}': there is no such user, or this one has no home: give an absolute path") from error
    except OSError as error:  # the working directory was deleted
        raise InputError(f"'{text}': the working directory is gone: change into another") from error


def to_bytes(text: str) -> bytes:
    """UTF-8 of a text that may hold names of files that are none: their bytes are written as \\udcff.

    >>> to_bytes("caf\\udce9")
    b'caf\\\\udce9'
    """
    return text.encode("utf-8", "backslashreplace")


def not_text(file: Path) -> str | None:
    """The first part of an absolute path whose bytes are no UTF-8, which Orbax and XLA cannot take; None if all are.

    >>> not_text(Path("/data/café")), not_text(Path("/data/caf\\udce9/a"))
    (None, 'caf\\udce9')
    """
    for part in file.absolute().parts:
        try:
            os.fsencode(part).decode()
        except UnicodeError:
            return part
    return None


def partial(file: Path) -> Path:
    """A name beside `file`, ending in NAME.partial, that nobody can guess: nothing lies in wait there.

    >>> partial(Path("runs/report.html")).name[18:]
    'report.html.partial'
    """
    return file.with_name(f".{secrets.token_hex(8)}.{file.name}.partial")


def replace(file: Path, data: bytes) -> None:
    """Write a file whole: its bytes go to a new file beside it, which then takes its place.

    A link at its place is replaced, and what it leads to stays as it is. Raises OSError, and leaves nothing behind.
    """
    new = partial(file)
    try:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(new, file)
    except IsADirectoryError as error:
        new.unlink(missing_ok=True)
        raise IsADirectoryError(error.errno, error.strerror, str(file)) from error
    except BaseException:
        new.unlink(missing_ok=True)  # on a full disk it is in the way
        raise


def sweep(folder: Path, name: str = "", seconds: float = 0.0) -> None:
    """Delete what killed processes left of files that were to become `name`, or any, and have not touched since.

    `seconds` is how long they must have been left alone, where another process may be writing in the folder.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        if _LEFT.fullmatch(entry.name) and entry.name.endswith(f"{name}.partial"):
            with contextlib.suppress(FileNotFoundError):
                told = entry.lstat()
                if stat.S_ISREG(told.st_mode) and time.time() - told.st_mtime >= seconds:
                    entry.unlink()
