"""Files of named arrays: .safetensors and .npz. What is pickled is never read."""

from pathlib import Path

import numpy as np

from tljax import npz
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
