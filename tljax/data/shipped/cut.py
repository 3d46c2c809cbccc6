"""Cut the shipped part of MNIST and Fashion-MNIST from the complete data, the same whenever it is run.

    python -m tljax.data.shipped.cut --manual_dir=DIR --out=DIR

DIR/mnist and DIR/fashion_mnist hold the four original files each.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from tljax.data import idx

PER_CLASS = (1000, 200)
"""Examples of each class, of the training and of the test split."""


def rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    """The rows that are shipped: int64 [classes * per_class], ascending.

    Of the m examples of a class they are those at floor(i * m / per_class): evenly spread, because the first half of
    MNIST's test set is easier than the second.

    >>> rows(np.array([0, 1, 0, 1, 0, 1, 0, 1]), 2).tolist()
    [0, 1, 4, 5]
    """
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.sort(np.concatenate([members[np.arange(per_class) * len(members) // per_class] for members in by_class]))


def cut(name: str, source: Path, target: Path) -> None:
    """Write the four files of `name`_10k to `target`, from those of `name` in `source`."""
    files, _ = idx.prepare(name, source, None)
    arrays = [idx.read(file, sha256) for file, sha256 in zip(files, idx.SHA256[name], strict=True)]
    target.mkdir(parents=True, exist_ok=True)
    for split, per_class in enumerate(PER_CLASS):
        chosen = rows(arrays[2 * split + 1], per_class)
        for i in (2 * split, 2 * split + 1):
            packed = gzip.compress(idx.to_bytes(arrays[i][chosen]), compresslevel=9, mtime=0)
            (target / f"{idx.FILES[i]}.gz").write_bytes(packed)


def main() -> None:
    """Read the flags and cut both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manual_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    for name in ("mnist", "fashion_mnist"):
        cut(name, flags.manual_dir / name, flags.out / f"{name}_10k")


if __name__ == "__main__":
    main()
