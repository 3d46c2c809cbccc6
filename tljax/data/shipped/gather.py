"""Make the shipped glyphs, Omniglot characters and digits of scikit-learn, the same whenever it is run.

    python -m tljax.data.shipped.gather --real=DIR --out=DIR

`--real` holds what LICENSES.md says the items come from, as .npz files of train_images, train_labels, train_groups and
the same for test: glyphs/glyphs_latin_capitals.npz, glyphs/glyphs_digits.npz, both also as NAME_few.npz, which are
other splits of the same items, omniglot/omniglot_five_alphabets.npz and omniglot/omniglot_latin.npz. The digits come
from scikit-learn. It prints the SHA-256 of each file's contents.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np

from tljax.data import idx, shipped

SOURCES = {
    "glyphs_capitals": "glyphs/glyphs_latin_capitals",
    "glyphs_digits": "glyphs/glyphs_digits",
    "omniglot_five": "omniglot/omniglot_five_alphabets",
    "omniglot_latin": "omniglot/omniglot_latin",
}
FEW_DRAWERS = 5
"""The drawers 1 to 5 are for training where few are; nothing of Omniglot was published about such a split."""


def items(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(images uint8 [n, height, width], labels, groups, whether each is tested) of both splits, sorted by group."""
    with np.load(file, allow_pickle=False) as data:
        images, labels, groups = (
            np.concatenate([data[f"{split}_{what}"] for split in ("train", "test")])
            for what in ("images", "labels", "groups")
        )
        tested = np.arange(len(labels)) >= len(data["train_labels"])
    order = np.argsort(groups, kind="stable")
    return images[order, ..., 0], labels[order], groups[order], tested[order]


def with_few(real: Path, name: str) -> list[np.ndarray]:
    """The arrays of `shipped.FILES` of one data set with groups."""
    images, labels, groups, tested = items(real / f"{SOURCES[name]}.npz")
    if name.startswith("omniglot"):
        return [images, labels, np.stack([tested, groups > FEW_DRAWERS]), groups]
    few = items(real / f"{SOURCES[name]}_few.npz")
    for ours, theirs in zip((images, labels, groups), few, strict=False):
        np.testing.assert_array_equal(ours, theirs)
    return [images, labels, np.stack([tested, few[3]]), groups]


def digits() -> list[np.ndarray]:
    """Those of scikit-learn, 0..16 as 0..255. The first half is for training and the second for testing.

    Consecutive items are likely to be of one writer, so a split in order keeps most writers apart.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    count = len(data.target)
    tested = np.arange(count) >= count // 2
    return [np.round(data.images * (255 / 16)), data.target, tested[None]]


def main() -> None:
    """Read the flags and write all five."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    for name in shipped.CLASSES:
        arrays = with_few(flags.real, name) if name in SOURCES else digits()
        (flags.out / name).mkdir(parents=True, exist_ok=True)
        for file, array in zip(shipped.FILES, arrays, strict=False):
            contents = idx.to_bytes(array.astype(np.uint8))
            (flags.out / name / f"{file}.gz").write_bytes(gzip.compress(contents, compresslevel=9, mtime=0))
            print(name, file, hashlib.sha256(contents).hexdigest())


if __name__ == "__main__":
    main()
