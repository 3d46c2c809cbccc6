"""Image classification from TensorFlow Datasets (TFDS), without TensorFlow.

Reading is `tfds.data_source` on array_record files. Preparing is TFDS' own where it does without TensorFlow, and for
MNIST and its kin the builder below: TFDS unpacks gzip with TensorFlow, Python does not need it.
"""

import socket
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data import idx, images
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
) -> tuple[list[Path], Callable[[], Task]]:
    """The files of a data set under `data_dir`, downloaded and prepared if need be, and how to decode them.

    `name` is `name` or `name/config`. `splits`, to train and to test on, are written as TFDS writes splits and
    slices; "" stands for "train", and for "test" or, without such a split, "validation". Raises InputError for an
    unknown name, config or split, a data set without an image and a class label, splits that share examples, a data set
    that needs the network or TensorFlow to be prepared and cannot have it, and damaged files.
    """
    with _damage_as_input_error(name, data_dir):
        builder = _builder(name, data_dir)
        image, label = _features(name, builder)
        prepared = builder.is_prepared()
    if not prepared:
        _download(name, builder, data_dir, manual_dir)
    with _damage_as_input_error(name, data_dir):
        train, test = _splits(name, builder.info.splits, splits)
    note = f"trained on '{train}', tested on '{test}'" if (train, test) != ("train", "test") else ""

    def decode() -> Task:
        with _damage_as_input_error(name, data_dir):
            read = [_read(name, builder, split, image, label, shape, resize) for split in (train, test)]
            (training, testing), cropped = (part for part, _ in read), sum(count for _, count in read)
            crop_note = images.crop_note(cropped, len(training) + len(testing), shape)
            full_note = "; ".join(filter(None, (note, crop_note)))
            return checked(name, training, testing, tuple(builder.info.features[label].names), full_note)

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
        known = [*idx.SHIPPED, *tfds.list_builders(with_community_datasets=False)]
        hint = nearest(name, known)
        hint = hint if hint.startswith("; nearest") else nearest(name, [*idx.SHIPPED, *idx.COMPLETE])
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


def _features(name: str, builder: Any) -> tuple[str, str]:
    """The names of the image and of the class label among the features. Raises InputError if either is not unique."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    kinds = {key: type(features[key]) for key in (features or {})}
    supervised = [k for k in builder.info.supervised_keys or () if isinstance(k, str)]
    chosen = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        keys = [key for key in kinds if kinds[key] is kind]
        keys = [key for key in keys if key in supervised] or keys
        if len(keys) != 1:
            raise InputError(
                f"data set '{name}' is no image classification: it has {len(keys)} features of kind {kind.__name__} "
                f"({', '.join(sorted(kinds))}), not one: choose another"
            )
        chosen.append(keys[0])
    image, label = chosen
    if features[image].np_dtype != np.uint8:
        raise InputError(f"data set '{name}' has images of {features[image].np_dtype}, not uint8: choose another")
    return image, label


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
    name: str, builder: Any, split: str, image: str, label: str, shape: Shape | None, resize: str
) -> tuple[ArrayExamples, int]:
    """The decoded images and labels of a split, images brought to the shape, and how many of them were cropped."""
    import tensorflow_datasets as tfds

    # We decode the bytes ourselves: TFDS takes OpenCV's decoder where it is installed, and JPEGs then differ.
    decoders = {image: tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise InputError(
            f"'{builder.data_path}' is prepared as {builder.info.file_format.value}, which needs TensorFlow: "
            "prepare it as array_record, or give another `data_dir=`"
        ) from error
    channels = builder.info.features[image].shape[-1]
    labels = np.empty(len(source), np.int64)

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        for row in range(len(source)):
            example = source[row]
            labels[row] = example[label]
            what = f"{name}: picture {row} of {split}"
            yield what, images.decode(example[image], channels, what)

    pixels, cropped = images.gather(pictures(), len(source), shape, resize)
    return ArrayExamples(pixels, labels), cropped


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
