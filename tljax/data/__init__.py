"""Data sets by name, as arrays: `load("mnist_10k")` gives a Task.

mnist_10k, fashion_mnist_10k      10,000 + 2,000 images that come with tljax; no network, nothing written
glyphs_capitals, glyphs_digits    letters and digits of 535 fonts, groups are font families; hand-written characters,
omniglot_five, omniglot_latin     groups are drawers: shipped too. Each also as NAME_few, another split of the same
                                  items: few groups for training, many for testing (see `shipped`)
sklearn_digits                    the 1,797 digits of scikit-learn, 8x8, shipped
mnist, fashion_mnist, kmnist      complete, from `manual_dir` (IDX files) or TFDS
cifar10, NAME/CONFIG              of TFDS; NAME:train=train[:80%]:test=train[80%:]; NAME:inputs=A+B:target=C names its
                                  features: pictures or numbers, a class, several labels or values (see `tfds`)
folder:DIR                        DIR/train/CLASS/*.png and DIR/test/CLASS/*.png
folder:DIR:splits=FILE.csv        of the pictures in DIR those that FILE.csv lists: file,split,target,group, of which
                                  target may be classes, several labels or values (see `files.prepare_listed`)
FILE.npz                          train_images, train_labels, test_images, test_labels, class_names, train_groups, ...;
                                  or train_inputs and train_targets of any kind (see `files.prepare_npz`, `targets`)
package.module:attribute          random-access sources, such as Grain's; FILE.py:attribute:option=value (see `by_row`)

A path with a ":" or "=" of its own stands in double quotes: folder:"/data/a:b", "a=b.npz".

Any of them with changes after it, in the order to make them: mnist_10k:labels=0-4:rotate=30 (see `derive`).
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from tljax.data import by_row, derive, filenames, files, idx, images, shipped, tfds
from tljax.data.cache import Prepare, cached
from tljax.data.images import Shape
from tljax.files import place
from tljax.plugins import Spec, in_quotes, nearest, parse, unquoted
from tljax.types import InputError, Task

__all__ = ["load"]

_FORMAT = {"idx": 1, "npz": 2, "folder": 2, "tfds": 2}
"""Each number goes up when its sources are decoded to other arrays, so that arrays cached before are not read."""


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    image_shape: Shape | None = None,
    resize: str = "crop",
    streamed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Task:
    """The data set that `name` stands for, changed as it says, checked, with its fingerprint.

    Images are uint8 [n, height, width, channels], or float32 [n, ...] for the features of an .npz file; labels are
    int32 [n]. `data_dir` ($TFDS_DATA_DIR, else ~/tensorflow_datasets) is where TFDS keeps its files, and where the
    decoded arrays are kept, to be memory-mapped next time; rotated or blurred ones too. `manual_dir` holds files
    fetched by hand: manual_dir/mnist/train-images-idx3-ubyte.gz and so on. `image_shape` (height, width, channels) is
    the shape that images are brought to before any change; `resize` says how one of another aspect is ('crop' or
    'squash', see `images.to_shape`). `streamed` pictures of a folder are decoded when they are read, and nothing is
    written. `say` gets a line where cached arrays are not as they were written, and are decoded again. Raises
    InputError if an argument or the data are wrong.

    >>> task = load("mnist_10k")
    >>> task.train.arrays.shape, task.test.targets.shape
    ((10000, 28, 28, 1), (2000,))
    """
    base, changes = derive.divide(name)
    spec = parse(base)
    shape = _checked_shape(image_shape)
    if resize not in images.RESIZES:
        raise InputError(f"it is none of {', '.join(images.RESIZES)}", field="resize", value=resize)
    manual = place(manual_dir, "manual_dir") if manual_dir else None
    if manual and not manual.is_dir():
        reason = "it is no folder: give the one that holds mnist/ and the like"
        raise InputError(reason, field="manual_dir", value=f"'{manual}'")
    if spec.name in idx.SHIPPED:
        _require_options(spec, ())
        return derive.derived(idx.shipped(spec.name, shape, resize), name, changes)
    if spec.name in shipped.NAMES:
        _require_options(spec, ())
        return derive.derived(shipped.load(spec.name, shape, resize), name, changes)
    if by_row.is_name(spec):
        return derive.derived(by_row.load(base, spec, shape, resize, say), name, changes)
    home = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = place(home, "data_dir")
    identity, prepare = _source(base, spec, root, manual, shape, resize, streamed)
    identity = [*identity, str(shape)]
    # What nothing is cropped of stays where it was kept before there was a choice, as far as that is known beforehand.
    if shape and resize == "crop" and not (identity[0] == "idx" and not images.crops((28, 28), shape, resize)):
        identity = [*identity, "crop"]
    if streamed and spec.name == "folder":
        _, decode = prepare()
        return derive.derived(decode(), name, changes)
    folder = root / "tljax" / _key(spec, identity)
    task = cached(base, folder, prepare, say)
    if not derive.slow(changes):
        return derive.derived(task, name, changes)
    changed = root / "tljax" / _key(spec, [*identity, *changes])
    return cached(name, changed, lambda: ([folder], lambda: derive.derived(task, name, changes)), say)


def _source(
    name: str,
    spec: Spec,
    root: Path,
    manual: Path | None,
    shape: Shape | None,
    resize: str,
    streamed: bool,
) -> tuple[list[str], Prepare]:
    """(identity, prepare): the texts that tell the source from every other, and how to prepare it."""
    if spec.name == "folder":
        if not spec.words:
            equals = "; a path with a '=' stands in double quotes: folder:\"DIR\"" if spec.options else ""
            raise InputError(f"'{name}' names no folder: write folder:DIR{equals}")
        _require_options(Spec(spec.name, spec.words[1:], spec.options), ("splits",), "FILE.csv", spec.words)
        folder = place(spec.words[0])
        if "splits" in spec.options:
            table = place(unquoted(spec.options["splits"]))
            identity = ["folder", filenames.text(folder), filenames.text(table)]
            return identity, lambda: files.prepare_listed(name, folder, table, shape, resize, streamed)
        return ["folder", filenames.text(folder)], lambda: files.prepare_folder(name, folder, shape, resize, streamed)
    if spec.name.endswith(".npz"):
        _require_options(spec, ())
        file = place(spec.name)
        return ["npz", str(file)], lambda: files.prepare_npz(name, file, shape, resize)
    _require_options(spec, ("train", "test", "inputs", "target"))
    splits = spec.options.get("train", ""), spec.options.get("test", "")
    features = spec.options.get("inputs", ""), spec.options.get("target", "")
    if spec.name in idx.COMPLETE and manual and not any((*splits, *features)) and _by_hand(spec.name, manual, root):
        folder = manual / spec.name
        return ["idx", spec.name, str(folder)], lambda: idx.prepare(spec.name, folder, shape, resize)
    identity = ["tfds", spec.name, *splits, *(features if any(features) else ())]
    return identity, lambda: tfds.prepare(spec.name, splits, root, manual, shape, resize, features)


def _by_hand(name: str, manual: Path, root: Path) -> bool:
    """Whether to read the IDX files in `manual`. Raises InputError if neither they nor a copy of TFDS' are there."""
    if (manual / name).is_dir():
        return True
    if any((root / name).glob("*/dataset_info.json")):
        return False
    expected = ", ".join(f"{file}.gz" for file in idx.FILES)
    raise InputError(f"it has no folder '{name}': make it, with {expected}", field="manual_dir", value=f"'{manual}'")


def _require_options(spec: Spec, options: tuple[str, ...], value: str = "SPLIT", path: tuple[str, ...] = ()) -> None:
    """Raises InputError if the name has an option that is none of `options`; `value` and `path` shape the message."""
    for option in (*spec.words, *spec.options):
        if option in spec.words or option not in options:
            hint = in_quotes(path or [spec.name, *spec.words])
            hint = hint or nearest(option, [*(f"{known}={value}" for known in options), *derive.FORMS])
            raise InputError(f"data set '{spec.name}' has no option '{option}'{hint}")


def _checked_shape(shape: Shape | None) -> Shape | None:
    """The shape as a tuple. Raises InputError unless it is three positive whole numbers."""
    if shape is None:
        return None
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        reason = "it is not HEIGHT,WIDTH,CHANNELS: give three positive whole numbers"
        raise InputError(reason, field="image_shape", value=shape)
    return (shape[0], shape[1], shape[2])


def _key(spec: Spec, identity: list[str]) -> str:
    """The name of a source's folder in the cache: legible, and different for every source, shape and format."""
    digest = hashlib.sha256(json.dumps([_FORMAT[identity[0]], *identity]).encode()).hexdigest()[:16]
    stem = Path(spec.words[0] if spec.name == "folder" else spec.name).stem
    return "".join(c if c.isalnum() else "_" for c in stem)[:40] + "-" + digest
