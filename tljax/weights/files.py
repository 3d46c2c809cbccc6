"""Files of named arrays: .safetensors and .npz. What is pickled is never read."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tljax import files, npz
from tljax.types import InputError

SUFFIXES = (".safetensors", ".npz")


def read(file: Path) -> dict[str, np.ndarray]:
    """{name: array} of a .safetensors or .npz file, as they are stored.

    Raises InputError for a file that is missing, of another kind, damaged, or holds pickled objects.
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise InputError(f"'{file}' is no {' or '.join(SUFFIXES)} file: convert it")
    if not file.is_file():
        raise InputError(f"'{file}' does not exist: give the path of a {file.suffix} file")
    return _safetensors(file) if file.suffix == ".safetensors" else npz.read(file)


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    """{name: array} of a .safetensors file. Raises InputError if it is damaged or has a dtype that NumPy lacks."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(file))
    except AttributeError as error:  # safetensors asks NumPy for a dtype that NumPy lacks
        kind = str(error).rpartition("attribute ")[2].strip("'")
        raise InputError(f"'{file}' holds arrays of {kind}, a type that NumPy has not: save them as float32") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{file}' cannot be read as safetensors ({reason}): save it again, as float32") from error


_WRITTEN = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
}
"""The types that safetensors have."""


def write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a .safetensors file, whole or not at all; each goes from where it is to the disk, without a copy
    if it is contiguous.

    Raises InputError for an array of a type that safetensors lack, and OSError where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    for name, array in arrays.items():
        if array.dtype.name not in _WRITTEN:
            raise InputError(f"array '{name}' is of {array.dtype}, which safetensors lack: leave it out, or cast it")
    new = files.partial(Path(file))
    try:
        try:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, new)
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())[:200]) from error
        with new.open("rb") as written:
            os.fchmod(written.fileno(), 0o644)  # safetensors make it readable by its owner alone
            os.fsync(written.fileno())
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
