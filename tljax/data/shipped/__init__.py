"""The data that comes with tljax; LICENSES.md says whose it is, and cut.py and gather.py how it was made.

mnist_10k, fashion_mnist_10k      read by `tljax.data.idx`, as the complete data sets are
glyphs_capitals, glyphs_digits    rendered letters and digits of 535 fonts; groups are font families
omniglot_five, omniglot_latin     hand-written characters; groups are drawers
sklearn_digits                    the 8x8 digits of scikit-learn; who wrote which is not known

The last five are a folder each, of gzipped IDX files (see `FILES`): all items once, and which of them are tested under
each split. NAME_few is another split of the same items, with few groups for training and many for testing.
"""

import importlib.resources
from collections.abc import Sequence

import numpy as np

from tljax.data import idx
from tljax.data.checks import checked
from tljax.data.images import Shape, crop_note, crops, to_shape
from tljax.types import ArrayExamples, Task

FILES = ("images-idx3-ubyte", "labels-idx1-ubyte", "splits-idx2-ubyte", "groups-idx1-ubyte")
"""Images uint8 [n, height, width], classes [n], 1 where an item is tested [splits, n], and groups [n] if known."""

ALPHABETS = {"Korean": 40, "Balinese": 24, "Early_Aramaic": 22, "Japanese_(katakana)": 47, "Tagalog": 17}
"""{alphabet of omniglot_five: how many characters it has}, in the order of their classes."""


def _characters(alphabets: dict[str, int]) -> tuple[str, ...]:
    """Class names, as Omniglot calls the folders of its characters."""
    return tuple(f"{name}/character{i:02}" for name, count in alphabets.items() for i in range(1, count + 1))


CLASSES: dict[str, Sequence[str]] = {
    "glyphs_capitals": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "glyphs_digits": "0123456789",
    "omniglot_five": _characters(ALPHABETS),
    "omniglot_latin": _characters({"Latin": 26}),
    "sklearn_digits": "0123456789",
}

_GLYPHS = "rendered {} of {} fonts, shipped with tljax; no font family is in both"
_DRAWN = "hand-written characters{}, shipped with tljax; nobody drew for both"
NOTES = {
    "glyphs_capitals": _GLYPHS.format("capitals", 535),
    "glyphs_digits": _GLYPHS.format("digits", 524),
    "omniglot_five": _DRAWN.format(" of five alphabets"),
    "omniglot_latin": _DRAWN.format(", Latin"),
    "sklearn_digits": "digits of 8x8 pixels, shipped with tljax; 13 people wrote them, who wrote which is not known",
}

SHA256: dict[str, tuple[str, ...]] = {
    "glyphs_capitals": (
        "a843b868d859a51eb2c7deb1b935f647991bb0dc25d82d9ff18a134b79499da9",
        "af44c615554d781c43830947c89f7d0966f19d5060a4caec8b3a0a556bbd039f",
        "e044fb92ea0c5189b8147817c75feca6220f8e62c045e05375182fc09b64f62c",
        "a67da7e5be56deda77c6b884593500d6c592f499845a13540ea078d38e0d1c27",
    ),
    "glyphs_digits": (
        "ff00cf7783fc5f9a763df3efa0514bfc8059cc26548675511cade9e447c08abb",
        "ef26a2a8642c0822b48f950f6fc793e9f58ac8eb8c376847a1c1e38c03490816",
        "770852b1938c485fdf015f6340426949a5438c3b4297b20439781e2d2831a4e8",
        "45f83b3772c0e0170ba34a26449d010fdd1e9c420a8c6f00adc66ac2f1f968d4",
    ),
    "omniglot_five": (
        "2c1c542a87d0795d7d08ed3abc83f1ff4d5888107190fa87daad65f807e90079",
        "548af6f83f68e97a6d6368d8b6e54c1d22a20f1e76675c94c3da2b04418a18d1",
        "5b4845bcf3d0dc70d67c1783ec9b75d6dae47f29e5efb8943cfd8abed1bb093a",
        "2c55624a7eb25707b63e4c2f3bae3debe4e6220d826c0e9794c44d131d6a2373",
    ),
    "omniglot_latin": (
        "e189579deed06d21b71eb630052629d08820ef2e36082441af8d6d07def9fbf1",
        "3467ee375b8cc443daf80e801f4055e0da2fd3f1074926f46f43e7a5beca2dde",
        "21c21223cd5c286a26d21298e2b1d08bbce9570129d657cb3268746457a91228",
        "cca2a98c71261e38a23954fec81c01fa6d9c4d5aa837edefdb772a18bd055409",
    ),
    "sklearn_digits": (
        "d224a90b51e21e5d1332d34effc46c3a7d6244906f07c292c24213770d11ca7b",
        "ce71631c1f31ce56fa54f31d1d498fafacff59b001e6c30c4a5e29508aa277ad",
        "2ed1abb8c602f1cbaf92b82cefbe884cee1c3cb1dbcff8a0b952a5508f6ad3c1",
    ),
}
"""SHA-256 of the uncompressed contents, in the order of FILES."""

FEW = tuple(f"{name}_few" for name in CLASSES if name != "sklearn_digits")
NAMES = (*CLASSES, *FEW)


def load(name: str, shape: Shape | None = None, resize: str = "crop") -> Task:
    """The task of one of `NAMES`: images uint8 [n, height, width, 1], classes int32 [n], groups int32 [n] if known.

    `shape` and `resize` bring the images to another shape, as `tljax.data.load` says. Raises InputError for files
    that are not as they were shipped.

    >>> task = load("glyphs_digits")
    >>> len(task.train), len(task.test), np.intersect1d(task.train.groups, task.test.groups)
    (3900, 1340, array([], dtype=int32))
    >>> few = load("glyphs_digits_few")
    >>> len(few.train), len(few.test), len(np.unique(few.test.groups))
    (1400, 3840, 88)
    """
    folder_name = name.removesuffix("_few")
    folder = importlib.resources.files("tljax.data") / "shipped" / folder_name
    files = [folder / f"{file}.gz" for file in FILES]
    images, labels, splits, *groups = (
        idx.read(file, sha256) for file, sha256 in zip(files, SHA256[folder_name], strict=False)
    )
    tested = splits[int(name != folder_name)].astype(bool)
    pixels = images[..., None]
    cropped = len(pixels) * crops(pixels.shape[1:], shape, resize)
    if shape:
        pixels = to_shape(pixels, shape, resize)
    train, test = (
        ArrayExamples(pixels[rows], labels[rows].astype(np.int32), groups[0][rows].astype(np.int32) if groups else None)
        for rows in (~tested, tested)
    )
    note = f"{len(train):,} training and {len(test):,} test images of {NOTES[folder_name]}"
    note = "; ".join(filter(None, (note, crop_note(cropped, len(pixels), shape))))
    return checked(name, train, test, tuple(CLASSES[folder_name]), note)
