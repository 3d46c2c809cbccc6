"""Files of named arrays, .npz, from anybody: what is pickled is never read."""

import zipfile
import zlib
from collections.abc import Container
from pathlib import Path

import numpy as np

from tljax.types import InputError


def read(file: Path, wanted: Container[str] | None = None) -> dict[str, np.ndarray]:
    """{name: array} of an .npz file, all of it or what it has of `wanted`.

    Raises InputError for a file that cannot be read, is damaged or a single array, and for Python objects in it.
    """
    name = ""
    arrays = {}
    try:
        # Opened here: np.load leaves a damaged file open.
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"'{file}' is a single array (.npy): save named arrays with numpy.savez")
            for name in archive.files:
                if wanted is None or name in wanted:
                    arrays[name] = archive[name]
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):
            raise InputError(
                f"'{file}': '{name}' holds Python objects (pickle): save it as numbers or strings"
            ) from error
        raise InputError(f"'{file}' cannot be read as .npz ({error}): save it again with numpy.savez") from error
    return arrays
