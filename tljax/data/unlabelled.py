"""Images without labels, and other inputs without targets: a folder of pictures, one picture, or an .npz file."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax.data import checks, filenames, files, images
from tljax.types import InputError

_SPELLINGS = {"images": ("images", *(name for name in files.SPELLINGS["test images"] if not name.endswith("/")))}


class Unlabelled(NamedTuple):
    """Images without labels, and the files beside them that are not pictures."""

    names: list[str]
    """The name of each image: its path in the folder, or its row in the .npz file."""
    images: Any
    """uint8 or float32 [n, *shape], or as `load` is asked: tokens int32 [n, length], or a dict of arrays [n, ...]."""
    left_out: list[str]
    """Files that are not .png, .jpg or .jpeg, and links to folders."""


def load(place: Path, shape: Any, resize: str = "crop") -> Unlabelled:
    """Images [n, *shape] of a folder or file: uint8 pixels brought to the shape, or float32 features that have it.

    A folder gives its pictures and those of its sub-folders, sorted, named by their paths in it; hidden ones are left
    out, and other files are named in `left_out`. An .npz file gives its images, test_images, test_features or x_test,
    named by their rows from 0. Raises InputError for a folder without images, a file that cannot be read, and
    images that cannot be brought to the shape.

    Where `shape` is no shape, it is the spec of one example, a tree of `jax.ShapeDtypeStruct` (tokens, or a dict): then
    an .npz gives test_inputs, or test_inputs/NAME for each of several.
    """
    if not place.exists():
        raise InputError(f"'{place}' does not exist: give a folder of pictures, one of them, or an .npz file")
    if place.suffix == ".npz" and place.is_file():
        return _npz(place, shape, resize)
    entries = (
        {place.name: place}
        if not place.is_dir()
        else {filenames.text(file.relative_to(place)): file for file in place.rglob("*")}
    )
    if not isinstance(shape, tuple):
        raise InputError(
            f"'{place}' is no .npz file: the model takes {_shown(shape)}, so give it as test_inputs of one"
        )
    names = sorted(name for name, file in entries.items() if files.is_picture(Path(name)) and file.is_file())
    others = entries.keys() - set(names)
    others = {name for name in others if entries[name].is_symlink() or not entries[name].is_dir()}
    left_out = sorted(name for name in others if not any(part.startswith(".") for part in Path(name).parts))
    kinds = ", ".join(files.PICTURES)
    if not names:
        raise InputError(f"'{place}' holds no picture ({kinds}): give a folder that does, one of them, or an .npz file")
    if len(shape) != 3:
        raise InputError(f"'{place}' holds pictures, the model takes features {list(shape)}: give them as .npz")
    pictures = ((f"'{entries[name]}'", images.read(entries[name])) for name in names)
    pixels, _ = images.gather(pictures, len(names), (shape[0], shape[1], shape[2]), resize)
    return Unlabelled(names, pixels, left_out)


def _shown(spec: Any) -> str:
    """The inputs of one example in words."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(spec)
    return ", ".join(f"{jax.tree_util.keystr(path)}{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves)


def _from_npz(file: Path, spec: Any) -> Unlabelled:
    """The inputs of an .npz file that are as a spec has them."""
    inputs = checks.inputs(f"'{file}'", files.arrays(file, _SPELLINGS)["images"].array)
    file_spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    if file_spec != spec:
        raise InputError(f"'{file}': inputs are {_shown(file_spec)}, the model takes {_shown(spec)}: give the same")
    count = len(jax.tree.leaves(inputs)[0])
    return Unlabelled([str(row) for row in range(count)], inputs, [])


def _npz(file: Path, shape: Any, resize: str) -> Unlabelled:
    if not isinstance(shape, tuple):
        return _from_npz(file, shape)
    array = checks.images(f"'{file}'", files.arrays(file, _SPELLINGS)["images"].array)
    if array.dtype == np.uint8 and len(shape) == 3:
        array = images.to_shape(array, (shape[0], shape[1], shape[2]), resize)
    if array.shape[1:] != shape:
        raise InputError(
            f"'{file}': images are {array.dtype}{list(array.shape[1:])}, the model takes {list(shape)}: "
            "give uint8 pixels for a model of pictures, or features of its shape"
        )
    return Unlabelled([str(row) for row in range(len(array))], array, [])
