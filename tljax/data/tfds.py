"""Data sets from TensorFlow Datasets (TFDS), without TensorFlow: pictures or numbers, to classes, labels or values.

Reading is `tfds.data_source` on array_record files. Preparing is TFDS' own where it does without TensorFlow, and for
MNIST and its kin the builder below: TFDS unpacks gzip with TensorFlow, Python does not need it.
"""

import socket
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tljax.data import idx, images, shipped
from tljax.data.checks import checked
from tljax.data.images import Shape
from tljax.plugins import nearest
from tljax.types import ArrayExamples, InputError, Task


def prepare(
    name: str,
    splits: tuple[str, str],
    data_dir: Path,
    manual_dir: Path | None,
    shape: Shape | None,
    resize: str = "crop",
    features: tuple[str, str] = ("", ""),
) -> tuple[list[Path], Callable[[], Task]]:
    """The files of a data set under `data_dir`, downloaded and prepared if need be, and how to decode them.

    `name` is `name` or `name/config`. `splits`, to train and to test on, are written as TFDS writes splits and
    slices; "" stands for "train", and for "test" or, without such a split, "validation". `features` are the names of
    those that are inputs, with "+" between, and of the target: an Image, numbers or vectors; a ClassLabel, a Sequence
    of them (several labels), or a number or vector (values). "" stands for the only Image and the only ClassLabel, or
    for what the builder supervises. Raises InputError for an unknown name, config, split or feature, text and other
    features that are no inputs or targets, splits that share examples, a data set that needs the network or TensorFlow
    to be prepared and cannot have it, and damaged files.
    """
    with _damage_as_input_error(name, data_dir):
        builder = _builder(name, data_dir)
        chosen = _features(name, builder, features)
        prepared = builder.is_prepared()
    if not prepared:
        _download(name, builder, data_dir, manual_dir)
    with _damage_as_input_error(name, data_dir):
        train, test = _splits(name, builder.info.splits, splits)
    note = f"trained on '{train}', tested on '{test}'" if (train, test) != ("train", "test") else ""

    def decode() -> Task:
        with _damage_as_input_error(name, data_dir):
            read = [_read(name, builder, split, chosen, shape, resize) for split in (train, test)]
            (training, testing), cropped = (part for part, _ in read), sum(count for _, count in read)
            crop_note = images.crop_note(cropped, len(training) + len(testing), shape)
            full_note = "; ".join(filter(None, (note, crop_note)))
            return checked(name, training, testing, chosen.classes, full_note, kind=chosen.kind)

    return sorted(Path(str(builder.data_path)).iterdir()), decode


@contextmanager
def _damage_as_input_error(name: str, data_dir: Path) -> Iterator[None]:
    """Raises InputError for any error of TFDS about files not as it wrote them: they have no type in common."""
    try:
        yield
    except (InputError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise InputError(
            f"data set '{name}': its files under '{data_dir / name.partition('/')[0]}' cannot be read "
            f"({_line(error)[:200]}): delete that folder, and prepare it again"
        ) from error


def _builder(name: str, data_dir: Path) -> Any:
    """TFDS' builder of a data set, or ours for MNIST and its kin. Raises InputError for an unknown name or config."""
    import tensorflow_datasets as tfds

    base, _, config = name.partition("/")
    try:
        if base in idx.COMPLETE and not config:
            return _idx_builder(base, data_dir)
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = [*idx.SHIPPED, *shipped.NAMES, *tfds.list_builders(with_community_datasets=False)]
        hint = nearest(name, known)
        hint = hint if hint.startswith("; nearest") else nearest(name, [*idx.SHIPPED, *shipped.NAMES, *idx.COMPLETE])
        raise InputError(f"unknown data set '{name}', and none such under '{data_dir}'{hint}") from error
    except ValueError as error:
        try:
            configs = list(tfds.builder_cls(base).builder_configs)
        except ValueError:
            configs = []
        if configs or config:
            hint = nearest(config, configs) or "; it has none"
            raise InputError(f"data set '{base}' has no config '{config}'{hint}") from error
        raise InputError(f"'{name}' is no data set's name: {_line(error)}") from error


def _idx_builder(name: str, data_dir: Path) -> Any:
    """TFDS' builder of MNIST and its kin, with Python's gzip, and the order of the IDX files kept.

    A copy that the stock builder prepared is read too, but has TFDS' shuffled order, hence another fingerprint.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    stock: Any = tfds.builder_cls(name)

    # Every builder's class enters TFDS' registry, where ours would replace the stock one.
    with tfds.core.registered.skip_registration():

        class Builder(stock):
            name = stock.name
            pkg_dir_path = stock._get_pkg_dir_path()
            url_infos = stock.url_infos  # the registered checksums; TFDS would look for them beside this file

            def _info(self) -> Any:
                info = super()._info()
                info.as_proto.disable_shuffling = True
                return info

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                urls = {file: urllib.parse.urljoin(stock.URL, f"{file}.gz") for file in idx.FILES}
                files = dl_manager.download(urls)
                halves = {"train": idx.FILES[:2], "test": idx.FILES[2:]}
                return {split: self._generate_examples(*(files[f] for f in half)) for split, half in halves.items()}

            def _generate_examples(self, pictures: Any, labels: Any) -> Iterator[tuple[int, dict[str, Any]]]:
                # TFDS encodes PIL images by itself, arrays with TensorFlow.
                pairs = zip(*(idx.read(Path(str(file))) for file in (pictures, labels)), strict=True)
                for row, (picture, label) in enumerate(pairs):
                    yield row, {"image": Image.fromarray(picture), "label": int(label)}

    return Builder(data_dir=data_dir)


class _Chosen(NamedTuple):
    """What of a data set is learnt from what."""

    inputs: tuple[str, ...]
    """Names of features; a feature within another is OUTER/INNER."""
    target: str
    kind: str
    """As `Task.kind`."""
    classes: tuple[str, ...]


def _features(name: str, builder: Any, options: tuple[str, str]) -> _Chosen:
    """The features that are inputs and target, as the `options` name them.

    Without, they are the only image and the only class label, else those that the builder supervises. Raises InputError
    where that leaves none, several, or what cannot be learnt.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features or {}
    kinds = {key: type(features[key]) for key in features}
    supervised = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    inputs, target = ([key.strip() for key in options[0].split("+")] if options[0] else []), options[1].strip()
    if not inputs or not target:
        only = []
        for kind in (tfds.features.Image, tfds.features.ClassLabel):
            keys = [key for key in kinds if kinds[key] is kind]
            only.append([key for key in keys if key in supervised] or keys)
        if (inputs or len(only[0]) == 1) and (target or len(only[1]) == 1):
            inputs, target = inputs or only[0], target or only[1][0]
        elif len(supervised) == 2:
            inputs, target = inputs or supervised[:1], target or supervised[1]
        else:
            word, keys = next(
                (kind, keys) for kind, keys in zip(("Image", "ClassLabel"), only, strict=True) if len(keys) != 1
            )
            raise InputError(
                f"data set '{name}' is no image classification: it has {len(keys)} features of kind {word} "
                f"({', '.join(sorted(kinds))}), not one: choose its features with {name}:inputs=A+B:target=C"
            )
    known = _flat(features)
    for key in (*inputs, target):
        if not any(part == key or part.startswith(f"{key}/") for part in known):
            raise InputError(f"data set '{name}' has no feature '{key}'{nearest(key, known)}")
    # caltech101 has a feature "image/file_name" beside "image", which is not within it.
    within = [p for key in inputs for p in ([key] if key in known else known) if p == key or p.startswith(f"{key}/")]
    if target in within:
        raise InputError(f"data set '{name}': feature '{target}' is target and input: choose others with inputs=A+B")
    for key in within:
        _require_input(name, key, known[key])
    if target not in known:
        raise InputError(f"data set '{name}': target '{target}' is several features: choose one with target=A/B")
    return _Chosen(tuple(within), target, *_target(name, target, known[target]))


def _flat(features: Any) -> dict[str, Any]:
    """{name: feature} of all features, those within a dict of them as OUTER/INNER."""
    import tensorflow_datasets as tfds

    known: dict[str, Any] = {}
    for key in sorted(features):
        inner = features[key]
        is_dict = isinstance(inner, tfds.features.FeaturesDict)
        known |= {f"{key}/{part}": feature for part, feature in _flat(inner).items()} if is_dict else {key: inner}
    return known


def _require_input(name: str, key: str, feature: Any) -> None:
    """Raise InputError for a feature that is neither a picture of bytes nor numbers."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Text):
        raise InputError(
            f"data set '{name}' has text as input '{key}': tokenise it, and give the tokens as train_inputs of an .npz "
            "file, or choose other features with inputs=A+B"
        )
    if isinstance(feature, tfds.features.Image):
        if feature.np_dtype != np.uint8:
            raise InputError(f"data set '{name}' has images of {feature.np_dtype}, not uint8: choose another")
    elif type(feature) not in (tfds.features.Tensor, tfds.features.Scalar) or feature.np_dtype.kind not in "iuf":
        raise InputError(
            f"data set '{name}' has a {type(feature).__name__} as input '{key}': choose pictures or numbers with "
            "inputs=A+B"
        )
    elif None in feature.shape:
        raise InputError(f"data set '{name}' has input '{key}' of many lengths: choose others with inputs=A+B")


def _target(name: str, key: str, feature: Any) -> tuple[str, tuple[str, ...]]:
    """(kind, names of classes or labels) of a target. Raises InputError for a feature that is none."""
    import tensorflow_datasets as tfds

    inner = getattr(feature, "feature", None)
    if isinstance(feature, tfds.features.ClassLabel):
        return "classes", tuple(feature.names)
    if isinstance(feature, tfds.features.Sequence) and isinstance(inner, tfds.features.ClassLabel):
        return "labels", tuple(inner.names)
    is_tensor = type(feature) in (tfds.features.Tensor, tfds.features.Scalar)
    if is_tensor and len(feature.shape) < 2 and None not in feature.shape and feature.np_dtype.kind in "iuf":
        return "values", ()
    raise InputError(
        f"data set '{name}' has a {type(feature).__name__} as target '{key}': choose a ClassLabel, a Sequence of them, "
        "or a number or vector with target=NAME"
    )


def _splits(name: str, available: Any, splits: tuple[str, str]) -> tuple[str, str]:
    """The splits to train and to test on, with defaults for "". Raises InputError if one is unknown or both overlap."""
    train = splits[0] or "train"
    test = splits[1] or ("test" if "test" in available else "validation")
    spans = []
    for option, split in (("train", train), ("test", test)):
        try:
            spans.append(available[split].file_instructions)
        except (KeyError, ValueError, AssertionError) as error:
            raise InputError(
                f"data set '{name}' has no split '{split}' to {option} on, but {', '.join(map(repr, available))}: "
                f"choose with {name}:{option}=SPLIT, such as {option}={next(iter(available), 'train')}[80%:]"
            ) from error
    for a in spans[0]:
        for b in spans[1]:
            if a.filename == b.filename and max(a.skip, b.skip) < min(a.skip + a.take, b.skip + b.take):
                raise InputError(f"data set '{name}': '{train}' and '{test}' share examples: choose splits that do not")
    return train, test


def _read(
    name: str, builder: Any, split: str, chosen: _Chosen, shape: Shape | None, resize: str
) -> tuple[ArrayExamples, int]:
    """The decoded inputs and targets of a split, images brought to the shape, and how many of them were cropped.

    One picture is an array; numbers are one vector [n, d], in the order chosen, or tokens if they are one
    vector of whole numbers; pictures beside others are a dict by their names.
    """
    import tensorflow_datasets as tfds

    features = _flat(builder.info.features)
    pictures = [key for key in chosen.inputs if isinstance(features[key], tfds.features.Image)]
    # We decode the bytes ourselves: TFDS takes OpenCV's decoder where it is installed, and JPEGs then differ.
    skipped: dict[str, Any] = {}
    for key in pictures:
        place = skipped
        *outer, last = key.split("/")
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = tfds.decode.SkipDecoding()
    try:
        source = builder.as_data_source(split=split, decoders=skipped or None)
    except NotImplementedError as error:
        raise InputError(
            f"'{builder.data_path}' is prepared as {builder.info.file_format.value}, which needs TensorFlow: "
            "prepare it as array_record, or give another `data_dir=`"
        ) from error
    others = [key for key in (*chosen.inputs, chosen.target) if key not in pictures]
    columns: dict[str, list[Any]] = {key: [None] * len(source) for key in others}

    def read(row: int) -> Any:
        example = source[row]
        for key in others:
            columns[key][row] = np.asarray(_at(example, key))
        return example

    def decoded(key: str) -> Iterator[tuple[str, np.ndarray]]:
        channels = features[key].shape[-1]
        for row in range(len(source)):
            what = f"{name}: picture {row} of {split}"
            yield what, images.decode(_at(read(row), key), channels, what)

    inputs: dict[str, np.ndarray] = {}
    cropped = 0
    for key in pictures:
        inputs[key], count = images.gather(decoded(key), len(source), shape, resize)
        cropped = max(cropped, count)
    for row in range(len(source) if not pictures else 0):
        read(row)
    if numbers := [key for key in chosen.inputs if key not in pictures]:
        arrays = [np.stack(columns[key]) for key in numbers]
        whole = len(arrays) == 1 and arrays[0].ndim == 2 and arrays[0].dtype.kind in "iu"
        vector = arrays[0] if whole or (len(arrays) == 1 and arrays[0].ndim > 1) else _vector(arrays)
        inputs[numbers[0] if len(numbers) == 1 else "numbers"] = vector.astype(np.int64 if whole else np.float64)
    arrays_of_split = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    return ArrayExamples(arrays_of_split, _targets(f"{name}: {split}", columns[chosen.target], chosen)), cropped


def _at(example: Any, key: str) -> Any:
    """What an example has under a name such as OUTER/INNER."""
    for part in key.split("/"):
        example = example[part]
    return example


def _vector(arrays: list[np.ndarray]) -> np.ndarray:
    """Numbers and vectors beside each other: float64 [n, d]."""
    return np.concatenate([array.reshape(len(array), -1).astype(np.float64) for array in arrays], axis=1)


def _targets(where: str, column: list[np.ndarray], chosen: _Chosen) -> np.ndarray:
    """The targets of all examples, as their kind has them."""
    if chosen.kind == "labels":
        several = np.zeros((len(column), len(chosen.classes)), bool)
        for row, labels in enumerate(column):
            numbers = labels.astype(np.int64)  # none of them is an empty array of floats
            if numbers.size and (numbers.min() < 0 or numbers.max() >= len(chosen.classes)):
                raise InputError(
                    f"{where}: row {row} has the labels {numbers.tolist()}, outside 0..{len(chosen.classes) - 1}: "
                    "choose a split whose labels are known"
                )
            several[row, numbers] = True
        return several
    return np.stack(column).astype(np.int64 if chosen.kind == "classes" else np.float64)


def _download(name: str, builder: Any, data_dir: Path, manual_dir: Path | None) -> None:
    """Download and prepare a data set. Raises InputError, with what else to do, where that fails."""
    import tensorflow_datasets as tfds

    alternative = f"or put its files into DIR/{name} and give `manual_dir=DIR`" if name in idx.COMPLETE else (
        "or prepare it elsewhere as array_record and give its `data_dir=`"
    )  # fmt: skip
    host = _unreachable(builder.url_infos or {})
    downloads = data_dir / "downloads"
    if host and not manual_dir and not (downloads / "manual").exists() and not any(downloads.rglob("*.INFO")):
        # TFDS would try for over three minutes.
        raise InputError(
            f"data set '{name}' is not under '{data_dir}', and {host} cannot be reached: connect, {alternative}"
        )
    manual = manual_dir / name if manual_dir and name in idx.COMPLETE else manual_dir
    config = tfds.download.DownloadConfig(
        try_download_gcs=False, manual_dir=manual, force_checksums_validation=name in idx.COMPLETE
    )
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except InputError:
        raise
    except Exception as error:  # TFDS has hundreds of builders, by many authors
        if _lacks_tensorflow(error):
            raise InputError(
                f"data set '{name}' needs TensorFlow to be prepared: pip install 'tljax[tensorflow]', {alternative}"
            ) from error
        raise InputError(
            f"data set '{name}' could not be prepared ({_line(error)}): try again, {alternative}"
        ) from error


def _unreachable(urls: Any) -> str:
    """The host of the first URL if its name does not resolve and no proxy would resolve it, else ""."""
    from urllib.request import getproxies

    host = urllib.parse.urlparse(next(iter(urls), "")).hostname
    if host and not getproxies():
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            return host
    return ""


def _lacks_tensorflow(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that TensorFlow cannot be imported."""
    while error is not None:
        if isinstance(error, ImportError) and "tensorflow" in f"{error.name} {error}".lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
