"""Files written whole, so that a crash leaves the old one or the new one; paths; and the text of people's files."""

import codecs
import contextlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

from tljax.types import InputError

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\..*partial")
"""The form of names that `partial` gives."""


def place(text: str | os.PathLike[str], field: str = "") -> Path:
    """The absolute path of a text that may begin with `~` or `~user`.

    Raises InputError, with `field` if it is given, where there is no such user or home.

    >>> place("/data/../mnist.npz")
    PosixPath('/data/../mnist.npz')
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        reason = "there is no such user, or this one has no home: give an absolute path"
        raise _refused(text, reason, field) from error
    except OSError as error:  # the working directory was deleted
        raise _refused(text, "the working directory is gone: change into another", field) from error


def _refused(text: str | os.PathLike[str], reason: str, field: str) -> InputError:
    return InputError(reason, field=field, value=f"'{text}'") if field else InputError(f"'{text}': {reason}")


def to_bytes(text: str) -> bytes:
    """UTF-8 of a text; bytes of file names that are not UTF-8 are written as \\udcff.

    >>> to_bytes("caf\\udce9")
    b'caf\\\\udce9'
    """
    return text.encode("utf-8", "backslashreplace")


def text(file: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    `errors` is how `bytes.decode` treats bytes that are not UTF-8. Raises InputError for a file in
    another encoding, and OSError for one that cannot be read.
    """
    return decoded(Path(file).read_bytes(), f"'{file}'", errors)


def decoded(data: bytes, what: str, errors: str = "strict") -> str:
    """The text of bytes in UTF-8, with or without a byte order mark.

    `errors` is how `bytes.decode` treats bytes that are not UTF-8. Raises InputError, in which `what` names the bytes,
    for another encoding.

    >>> decoded("caf\\u00e9".encode("utf-8-sig"), "'a.csv'")
    'café'
    >>> decoded("name,seed".encode("utf-16"), "'a.csv'")
    Traceback (most recent call last):
    tljax.types.InputError: 'a.csv' is in UTF-16: save it as UTF-8
    """
    require_bytes_of_text(data, what)
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} is 0x{data[error.start]:02x}"
        raise InputError(f"{what} is no UTF-8 ({where}), perhaps Latin-1: save it as UTF-8") from error


_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is the beginning of this
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def require_bytes_of_text(data: bytes, what: str) -> None:
    """Raise InputError if bytes are in UTF-16 or UTF-32, with or without their mark; `what` names the bytes."""
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "")
    if not marked and b"\0" in data[:1000]:
        raise InputError(f"{what} has zero bytes, as UTF-16 has and no text in UTF-8: save it as UTF-8")
    if marked:
        raise InputError(f"{what} is in {marked}: save it as UTF-8")


def not_text(file: Path) -> str | None:
    """The first part of an absolute path whose bytes are not UTF-8, which Orbax and XLA cannot take, or None.

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
    """A path beside `file`, ending in NAME.partial, that nobody can guess, so that no planted file lies there.

    >>> partial(Path("runs/report.html")).name[18:]
    'report.html.partial'
    """
    return file.with_name(f".{secrets.token_hex(8)}.{file.name}.partial")


def replace(file: Path, data: bytes) -> None:
    """Write a file whole: the bytes go to a new file beside it, which is then renamed to it.

    A link of that name is replaced, and its target stays as it is. Raises OSError, and leaves no partial file behind.
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
        new.unlink(missing_ok=True)  # on a full disk it takes room
        raise


def sweep(folder: Path, name: str = "", seconds: float = 0.0) -> None:
    """Delete the partial files of `name`, or of any file, that killed processes left in a folder.

    Only files that are unchanged for `seconds` are deleted, as another process may be writing in the folder.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(entry.name) and entry.name.endswith(f"{name}.partial"):
            with contextlib.suppress(FileNotFoundError):
                status = entry.lstat()
                if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime >= seconds:
                    entry.unlink()
