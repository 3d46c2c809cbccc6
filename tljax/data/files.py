"""Data of one's own: a folder of pictures, or an .npz file of arrays."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tljax.data import images
from tljax.data.checks import checked
from tljax.data.images import Shape
from tljax.types import InputError, Split, Task

_LAYOUT = "expected is DIR/train/CLASS/*.png (.jpg, .jpeg) and DIR/test/CLASS/*.png"
PICTURES = (".png", ".jpg", ".jpeg")
SPELLINGS = {
    "train images": ("train_images", "train_features", "x_train"),
    "train labels": ("train_labels", "y_train"),
    "test images": ("test_images", "test_features", "x_test"),
    "test labels": ("test_labels", "y_test"),
    "class names": ("class_names",),
}


def prepare_folder(name: str, folder: Path, shape: Shape | None) -> tuple[list[Path], Callable[[], Task]]:
    """The pictures under `folder`, sorted by split, class and file name, and how to decode them.

    The classes are the sub-folders' names, sorted. Palette, RGBA and CMYK pictures become RGB. Raises InputError
    for another layout, a class in one split only or without a picture, and a file that is no picture.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder: {_LAYOUT}")
    found: dict[str, dict[str, list[Path]]] = {}
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise InputError(f"'{folder}' has no folder '{split}': {_LAYOUT}")
        found[split] = {c.name: _pictures(c) for c in _visible(folder / split)}
    for name_, other in (("train", "test"), ("test", "train")):
        for lacking in sorted(found[other].keys() - found[name_].keys()):
            raise InputError(f"'{folder / name_}' lacks class '{lacking}' of {other}: both need the same classes")
    if not found["train"]:
        raise InputError(f"'{folder / 'train'}' holds no class folders: {_LAYOUT}")
    every = [file for split in found.values() for files in split.values() for file in files]
    folders = [folder, *(folder / s for s in found), *(folder / s / c for s in found for c in found[s])]

    def decode() -> Task:
        pictures = images.gather(((f"'{f}'", images.read(f)) for f in every), len(every), shape)
        labels = [np.repeat(np.arange(len(s)), [len(files) for files in s.values()]) for s in found.values()]
        n = len(labels[0])
        classes = tuple(found["train"])
        return checked(name, Split(pictures[:n], labels[0]), Split(pictures[n:], labels[1]), classes)

    return folders + every, decode


def _visible(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not f.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no class folder: {_LAYOUT}")
    files = _visible(folder)
    for file in files:
        if file.suffix.lower() not in PICTURES or not file.is_file():
            raise InputError(f"'{file}' is no {', '.join(PICTURES)} file: convert or remove it")
    if not files:
        raise InputError(f"class folder '{folder}' holds no picture: add some, or remove the class from both splits")
    return files


def prepare_npz(name: str, file: Path, shape: Shape | None) -> tuple[list[Path], Callable[[], Task]]:
    """The .npz file, and how to read it.

    Its arrays are train_images (or train_features, x_train): uint8 [n, height, width] or [n, height, width,
    channels], or floats [n, ...], which become float32; train_labels (y_train): integers [n]; the same for test;
    and, if wanted, class_names: strings [classes]. Without names the classes are "0", "1", ... up to the largest
    training label. Raises InputError for anything else; pickled objects are never read.
    """
    if not file.is_file():
        raise InputError(f"'{file}' does not exist: give the path of an .npz file from the working directory")

    def decode() -> Task:
        found = arrays(file, SPELLINGS)
        train = Split(_shaped(name, found["train images"], shape), found["train labels"])
        test = Split(_shaped(name, found["test images"], shape), found["test labels"])
        return checked(name, train, test, _classes(name, train.labels, found.get("class names")))

    return [file], decode


def arrays(file: Path, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """{what: array} of an .npz file for {what: names it may have}; only class names may be missing.

    Raises InputError for a file that cannot be read, one that lacks an array or has it twice, and Python objects.
    """
    found = {}
    try:
        # Opened here: np.load leaves a damaged file open.
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"'{file}' is a single array (.npy): save named arrays with numpy.savez")
            for what, spellings in wanted.items():
                present = [s for s in spellings if s in archive.files]
                if len(present) > 1:
                    raise InputError(f"'{file}' has both {' and '.join(present)}: keep one as the {what}")
                if not present and what != "class names":
                    raise InputError(f"'{file}' has no {what}: name an array {' or '.join(spellings)}")
                if present:
                    found[what] = _array(file, archive, present[0])
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"'{file}' cannot be read as .npz ({error}): save it again with numpy.savez") from error
    return found


def _array(file: Path, archive: "np.lib.npyio.NpzFile", key: str) -> np.ndarray:
    try:
        array: np.ndarray = archive[key]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise InputError(f"'{file}': '{key}' holds Python objects (pickle): save it as numbers or strings") from error
    return array


def _shaped(name: str, array: np.ndarray, shape: Shape | None) -> np.ndarray:
    if not shape:
        return array
    if array.dtype != np.uint8:
        if array.shape[1:] == shape:
            return array
        raise InputError(f"{name}: features {list(array.shape[1:])} cannot become {list(shape)}: drop --image_shape")
    return images.to_shape(array[..., None], shape) if array.ndim == 3 else images.to_shape(array, shape)


def _classes(name: str, labels: np.ndarray, names: np.ndarray | None) -> tuple[str, ...]:
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise InputError(f"{name}: class_names is {names.dtype} {list(names.shape)}: give strings [classes]")
        return tuple(names.tolist())
    if labels.dtype.kind not in "iu" or not labels.size:
        return ()
    row = int(labels.argmax())
    largest = int(labels.flat[row])
    # A stray large label would make as many classes.
    if largest >= labels.size:
        raise InputError(
            f"{name}: row {row} of the {labels.size} train labels is {largest}: correct it, or give class_names"
        )
    return tuple(str(c) for c in range(largest + 1))
