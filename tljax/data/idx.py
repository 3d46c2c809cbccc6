"""The IDX files of MNIST and its kin: four a data set, gzipped or not.

The format is that of the MNIST page: two zero bytes, a type (8 is uint8), the number of dimensions, each of them as
a big-endian uint32, and the bytes in C order.
"""

import gzip
import hashlib
import importlib.resources
import math
import zlib
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from tljax.data.checks import checked
from tljax.data.images import Shape, crop_note, crops, to_shape
from tljax.types import ArrayExamples, InputError, Task

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

CLASSES: dict[str, tuple[str, ...]] = {
    "mnist": _DIGITS,
    "fashion_mnist": _CLOTHES,
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "mnist_10k": _DIGITS,
    "fashion_mnist_10k": _CLOTHES,
}
"""Class names as TFDS has them."""

COMPLETE = ("mnist", "fashion_mnist", "kmnist")
SHIPPED = {"mnist_10k": "MNIST", "fashion_mnist_10k": "Fashion-MNIST"}

SHA256: dict[str, tuple[str, ...]] = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "mnist_10k": (
        "96defee2ab685483b9a3e40d749565b36760c0072a8b8a3f6d989614bd22ff4d",
        "306eb44c58c72aea6431270542616c67dd483edc08e92917cd180d90aad4772c",
        "0a2a978ac97c9ffe5524643f23f15c688c7c4b82e1ce271f4060492e4a74cae4",
        "601a3cc86da79e5dcf5265d52b4dd14eb2e0ee0c69c9792c036ed8b98dcb05fa",
    ),
    "fashion_mnist_10k": (
        "cfdef7f70d35ae627dc0cf5f7e5d19e6be2fbbc63e6026e100bb15e213a9c0df",
        "af6647ed5471027d448f24ecd744b9baf87d49df15604efb34fc4085357c31a2",
        "1019dbad2e502d4ade0de041778f1f87d7e5a70f2711c66df31807ce54530b4f",
        "1494af875df37d5350bc5e571d89763c0bfe4a503e3276c67202b6ca21f3fbdd",
    ),
}
"""SHA-256 of the uncompressed contents, in the order of FILES: how they were compressed does not matter."""

ARCHIVE_SHA256: dict[str, tuple[str, ...]] = {
    "kmnist": (
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
}
"""SHA-256 of the .gz files, as TFDS registers them (url_checksums/kmnist.txt); none of the contents is published."""

_AGAIN = "copy or download it again"


def read(file: Traversable, sha256: str = "", archive_sha256: str = "") -> np.ndarray:
    """The array in an IDX file, gzipped if its name ends in .gz: uint8 [n, ...].

    `sha256` is that of the contents, `archive_sha256` that of the file as it is stored; "" asks for no check. Raises
    InputError for a file that is missing, cut short, altered, or not IDX.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror}): {_AGAIN}") from error
    if archive_sha256 and hashlib.sha256(data).hexdigest() != archive_sha256:
        raise InputError(f"'{file}' is not the original archive (SHA-256 is not {archive_sha256[:12]}..): {_AGAIN}")
    if file.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"'{file}' is a damaged or cut short gzip file ({error}): {_AGAIN}") from error
    array = _parse(data, str(file))
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"'{file}' has altered contents (SHA-256 is not {sha256[:12]}..): {_AGAIN}")
    return array


def _parse(data: bytes, file: str) -> np.ndarray:
    """The array in the bytes of an IDX file. Raises InputError, naming the file, if they are not IDX of uint8."""
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not data[3]:
        raise InputError(f"'{file}' is not IDX of uint8 (it begins with {data[:4].hex() or 'nothing'}): {_AGAIN}")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    size = start + math.prod(shape)
    if len(data) != size:
        raise InputError(f"'{file}' has {len(data)} bytes where its header says {size}: {_AGAIN}")
    try:
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    except ValueError as error:  # more dimensions than NumPy has, or a size of 0 beside sizes too large for it
        raise InputError(f"'{file}' has a header that no array has ({error}): {_AGAIN}") from error


def to_bytes(array: np.ndarray) -> bytes:
    """IDX of a uint8 array, uncompressed.

    >>> to_bytes(np.array([7, 9], np.uint8)).hex()
    '00000801000000020709'
    """
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + np.ascontiguousarray(array, np.uint8).tobytes()


def shipped(name: str, shape: Shape | None, resize: str = "crop") -> Task:
    """The part of a data set that comes with tljax: 10,000 training and 2,000 test images, class-balanced."""
    folder = importlib.resources.files("tljax.data") / "shipped" / name
    note = f"10,000 training and 2,000 test images of {SHIPPED[name]}, shipped with tljax; not the complete data set"
    files = [folder / f"{file}.gz" for file in FILES]
    return _task(
        name, [read(file, sha256) for file, sha256 in zip(files, SHA256[name], strict=True)], shape, resize, note
    )


def prepare(
    name: str, folder: Path, shape: Shape | None, resize: str = "crop"
) -> tuple[list[Path], Callable[[], Task]]:
    """The four files of a complete data set in `folder`, .gz first, and how to decode them.

    Raises InputError if a file is missing.
    """
    files = [_find(name, folder, file) for file in FILES]

    def decode() -> Task:
        contents = SHA256.get(name, ("",) * 4)
        archives = ARCHIVE_SHA256.get(name, ("",) * 4)
        arrays = [read(file, *sums) for file, *sums in zip(files, contents, archives, strict=True)]
        return _task(name, arrays, shape, resize)

    return files, decode


def _find(name: str, folder: Path, file: str) -> Path:
    """The path of an IDX file, .gz first. Raises InputError if it is missing."""
    endings = (".gz",) if name in ARCHIVE_SHA256 else (".gz", "")
    for ending in endings:
        if (folder / (file + ending)).is_file():
            return folder / (file + ending)
    raise InputError(
        f"'{folder}' lacks {file}.gz: {name} is the four files {', '.join(f'{f}.gz' for f in FILES)}"
        + ("" if len(endings) == 2 else " as they were published")
    )


def _task(name: str, arrays: list[np.ndarray], shape: Shape | None, resize: str, note: str = "") -> Task:
    """The task of the four arrays. Raises InputError if their dimensions say that two files are exchanged."""
    for file, array, dimensions in zip(FILES, arrays, (3, 1, 3, 1), strict=True):
        if array.ndim != dimensions:
            raise InputError(f"{name}: {file} has {array.ndim} dimensions, not {dimensions}: are two files exchanged?")
    train_images, test_images = (array[..., None] for array in arrays[::2])
    if shape:
        count = len(train_images) + len(test_images)
        cropped = count * crops(train_images.shape[1:], shape, resize)
        note = "; ".join(filter(None, (note, crop_note(cropped, count, shape))))
        train_images, test_images = (to_shape(images, shape, resize) for images in (train_images, test_images))
    return checked(
        name, ArrayExamples(train_images, arrays[1]), ArrayExamples(test_images, arrays[3]), CLASSES[name], note
    )
