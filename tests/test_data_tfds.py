"""Data sets of TFDS by name, without TensorFlow: made here, tiny, and read back."""

import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_data import COMPLETE, needs_complete, put, small

from tljax import plugins
from tljax.data import checks, idx, load
from tljax.data import tfds as ours
from tljax.types import InputError

PIXELS = np.random.Philox(key=[3, 0]).random_raw(30 * 8 * 6 * 3 // 8).view(np.uint8).reshape(30, 8, 6, 3)


def record(row: int, height: int = 8) -> dict[str, Any]:
    return {"image": Image.fromarray(PIXELS[row, :height]), "label": row % 3, "id": f"number {row}"}


FEATURES = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
}
with tfds.core.registered.skip_registration():

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """What a TFDS builder forces on us; each test says which splits and features."""

        name = "tljax_tiny"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None
        pkg_dir_path = Path(__file__).parent
        splits: dict[str, list[dict[str, Any]]]
        features: Any
        supervised: Any = None

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(self.features)
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                description="",
                disable_shuffling=True,
                supervised_keys=self.supervised,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(records) for split, records in self.splits.items()}

        def _generate_examples(self, records: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from enumerate(records)

    class TinyConfigs(Tiny):
        name = "tljax_tiny_configs"
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n, version="1.0.0", description="") for n in ("one", "two")]  # noqa: RUF012


def make(data_dir: Path, splits: dict[str, list[dict[str, Any]]], features: Any = FEATURES, **options: Any) -> None:
    kind = TinyConfigs if options else Tiny
    kind.splits, kind.features = splits, features
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    kind(data_dir=data_dir, **options).download_and_prepare(file_format="array_record", download_config=config)


def test_a_prepared_data_set_is_read_by_name_and_then_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"train": [record(r) for r in range(20)], "test": [record(r) for r in range(20, 30)]})
    task = load("tljax_tiny", data_dir=tmp_path)
    np.testing.assert_array_equal(task.train.arrays, PIXELS[:20])
    np.testing.assert_array_equal(task.test.arrays, PIXELS[20:])
    assert task.train.targets.tolist() == [r % 3 for r in range(20)]
    assert task.classes == ("ant", "bee", "cat") and task.note == ""
    monkeypatch.setattr(ours, "prepare", None)
    again = load("tljax_tiny", data_dir=tmp_path)
    assert isinstance(again.train.arrays, np.memmap) and again.fingerprint == task.fingerprint
    assert "tensorflow" not in sys.modules


def test_slices_and_the_validation_split(tmp_path: Path) -> None:
    make(tmp_path, {"train": [record(r) for r in range(20)], "validation": [record(r) for r in range(20, 30)]})
    task = load("tljax_tiny", data_dir=tmp_path)
    np.testing.assert_array_equal(task.test.arrays, PIXELS[20:])
    assert task.note == "trained on 'train', tested on 'validation'"
    task = load("tljax_tiny:train=train[:80%]:test=train[80%:]", data_dir=tmp_path)
    np.testing.assert_array_equal(task.train.arrays, PIXELS[:16])
    np.testing.assert_array_equal(task.test.arrays, PIXELS[16:20])
    assert "train[:80%]" in task.note
    with pytest.raises(InputError, match="share examples"):
        load("tljax_tiny:train=train[:80%]:test=train[70%:]", data_dir=tmp_path)


def test_a_missing_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    make(tmp_path, {"train": [record(r) for r in range(20)]})
    with pytest.raises(
        InputError, match=r"no split 'validation' to test on, but 'train': choose with tljax_tiny:test="
    ):
        load("tljax_tiny", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"no split 'tain' to train on, but 'train'"):
        load("tljax_tiny:train=tain:test=train[5:]", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"no split 'train\[x:\]' to train on"):
        load("tljax_tiny:train=train[x:]:test=train", data_dir=tmp_path)


def test_name_and_config(tmp_path: Path) -> None:
    for config, first in (("one", 0), ("two", 10)):
        splits = {"train": [record(r) for r in range(first, first + 6)], "test": [record(r) for r in range(25, 30)]}
        make(tmp_path, splits, config=config)
    np.testing.assert_array_equal(load("tljax_tiny_configs/two", data_dir=tmp_path).train.arrays, PIXELS[10:16])
    np.testing.assert_array_equal(load("tljax_tiny_configs/one", data_dir=tmp_path).train.arrays, PIXELS[:6])


def test_sizes_that_differ_need_image_shape_and_colour_becomes_grey(tmp_path: Path) -> None:
    make(tmp_path, {"train": [record(r, 8 - r % 2) for r in range(20)], "test": [record(r) for r in range(20, 30)]})
    with pytest.raises(InputError, match=r"picture 1 of train is 7x6x3, the first 8x6x3.*image_shape"):
        load("tljax_tiny", data_dir=tmp_path)
    task = load("tljax_tiny", data_dir=tmp_path, image_shape=(8, 6, 1))
    assert task.train.arrays.shape == (20, 8, 6, 1)
    luma = PIXELS[20:] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(task.test.arrays[..., 0] - luma).max() <= 0.51


def test_a_label_of_no_class_is_named(tmp_path: Path) -> None:
    hidden = [{**record(r), "label": -1} for r in range(20, 30)]
    make(tmp_path, {"train": [record(r) for r in range(20)], "test": hidden})
    with pytest.raises(InputError, match=r"test: row 0 has label -1, outside 0..2"):
        load("tljax_tiny", data_dir=tmp_path)


def test_what_is_no_image_classification_is_refused(tmp_path: Path) -> None:
    features = {key: FEATURES[key] for key in ("id", "label")}
    rows = [{key: record(r)[key] for key in features} for r in range(20)]
    make(tmp_path, {"train": rows, "test": rows[:5]}, features)
    with pytest.raises(InputError, match=r"no image classification: it has 0 features of kind Image \(id, label\)"):
        load("tljax_tiny", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"'imdb_reviews' has text as input 'text': tokenise it, and give the tokens"):
        load("imdb_reviews", data_dir=tmp_path)


X = np.random.default_rng(5).normal(size=(30, 4)).astype(np.float32)
MANY = {
    "vector": tfds.features.Tensor(shape=(4,), dtype=np.float32),
    "number": tfds.features.Scalar(np.float64),
    "count": tfds.features.Scalar(np.int64),
    "ids": tfds.features.Tensor(shape=(5,), dtype=np.int32),
    "image": tfds.features.Image(shape=(8, 6, 3)),
    "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
    "several": tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b", "c"])),
    "text": tfds.features.Text(),
    "ragged": tfds.features.Tensor(shape=(None,), dtype=np.float32),
    "both": tfds.features.FeaturesDict({"b": tfds.features.Scalar(np.float32), "a": tfds.features.Scalar(np.int32)}),
}


def of_many(row: int) -> dict[str, Any]:
    return {
        **{
            "vector": X[row],
            "number": float(X[row, 0]),
            "count": row,
            "ids": np.arange(row, row + 5, dtype=np.int32) % 7,
        },
        **{"image": Image.fromarray(PIXELS[row]), "label": row % 3, "text": "x", "ragged": X[row, : row % 4]},
        **{"several": [k for k in range(3) if row >> k & 1], "both": {"a": row, "b": X[row, 1]}},
    }


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with features of many kinds."""
    folder = tmp_path_factory.mktemp("many")
    make(folder, {"train": [of_many(r) for r in range(20)], "test": [of_many(r) for r in range(20, 30)]}, MANY)
    return folder


def test_features_of_other_kinds_are_chosen_by_name(many: Path) -> None:
    rows = np.arange(20)
    default = load("tljax_tiny", data_dir=many)
    assert default.kind == "classes" and default.classes == ("ant", "bee", "cat")
    np.testing.assert_array_equal(default.train.arrays, PIXELS[:20])
    several = load("tljax_tiny:target=several", data_dir=many)
    assert several.kind == "labels" and several.classes == ("a", "b", "c")
    np.testing.assert_array_equal(several.train.targets, rows[:, None] >> np.arange(3) & 1 == 1)
    for name, values in (("number", X[:20, :1]), ("count", rows[:, None]), ("vector", X[:20])):
        task = load(f"tljax_tiny:target={name}", data_dir=many)
        assert task.kind == "values" and task.outputs == values.shape[1]
        np.testing.assert_array_equal(task.train.targets, values.astype(np.float32))
    vector = load("tljax_tiny:inputs=vector", data_dir=many)
    np.testing.assert_array_equal(vector.test.arrays, X[20:])
    joined = load("tljax_tiny:inputs=both+number+count:target=vector", data_dir=many)
    np.testing.assert_array_equal(
        joined.train.arrays, np.stack([rows, X[:20, 1], X[:20, 0], rows], 1).astype(np.float32)
    )
    tokens = load("tljax_tiny:inputs=ids", data_dir=many)
    assert tokens.kind == "classes" and tokens.train.arrays.dtype == np.int32
    beside = load("tljax_tiny:inputs=image+number+vector", data_dir=many)
    assert list(beside.train.arrays) == ["image", "numbers"] and beside.train.arrays["numbers"].shape == (20, 5)
    np.testing.assert_array_equal(beside.train.arrays["image"], PIXELS[:20])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (":inputs=text", r"has text as input 'text': tokenise it, and give the tokens as train_inputs of an .npz file"),
        (":inputs=ragged", r"has input 'ragged' of many lengths"),
        (":inputs=several", r"has a Sequence as input 'several': choose pictures or numbers"),
        (":inputs=vektor", r"has no feature 'vektor'; nearest: 'vector'"),
        (":target=text", r"has a Text as target 'text': choose a ClassLabel"),
        (":target=ragged", r"has a Tensor as target 'ragged'"),
        (":target=both", r"target 'both' is several features: choose one with target=A/B"),
        (":inputs=both:target=both/a", r"feature 'both/a' is target and input"),
    ],
)
def test_features_that_cannot_be_learnt_are_named(options: str, words: str, many: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        load(f"tljax_tiny{options}", data_dir=many)
    assert "\n" not in str(error.value)


def test_hidden_labels_are_named(tmp_path: Path) -> None:
    features = {key: MANY[key] for key in ("vector", "several")}
    rows = [{"vector": X[row], "several": [0] if row != 23 else [-1]} for row in range(30)]
    make(tmp_path, {"train": rows[:20], "test": rows[20:]}, features)
    with pytest.raises(InputError, match=r"test: row 3 has the labels \[-1\], outside 0..2"):
        load("tljax_tiny:inputs=vector:target=several", data_dir=tmp_path)


def test_what_the_builder_supervises_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiny, "supervised", ("vector", "number"))
    features = {key: MANY[key] for key in ("vector", "number", "count", "text")}
    rows = [{key: of_many(r)[key] for key in features} for r in range(30)]
    make(tmp_path, {"train": rows[:20], "test": rows[20:]}, features)
    task = load("tljax_tiny", data_dir=tmp_path)
    assert task.kind == "values"
    np.testing.assert_array_equal(task.train.arrays, X[:20])


def test_unknown_names_and_configs_come_with_the_nearest(tmp_path: Path) -> None:
    for name, words in {
        "mnist_10": r"unknown data set 'mnist_10'.*nearest: 'mnist_10k'",
        "cifar_10": r"unknown data set 'cifar_10'.*nearest: 'cifar10'",
        "zzzzzzzz": r"unknown data set 'zzzzzzzz'.*known: ",
        "eurosat/rbg": r"'eurosat' has no config 'rbg'; nearest: 'rgb'",
        "mnist/x": r"'mnist' has no config 'x'; it has none",
        "../x y": r"unknown data set|is no data set's name|has no config",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            load(name, data_dir=tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_data_set_prepared_in_another_format_is_named(tmp_path: Path) -> None:
    make(tmp_path, {"train": [record(r) for r in range(20)], "test": [record(r) for r in range(20, 30)]})
    folder = tmp_path / "tljax_tiny" / "1.0.0"
    for file in folder.iterdir():
        if "array_record" in file.name:
            file.rename(folder / file.name.replace("array_record", "tfrecord"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"prepared as tfrecord, which needs TensorFlow.*data_dir"):
        load("tljax_tiny", data_dir=tmp_path)


# MNIST and its kin through TFDS; there is no network here.


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let TFDS' downloads come from `folder`, by file name."""
    monkeypatch.setattr(ours, "_unreachable", lambda urls: "")
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download",
        lambda self, urls: {key: folder / url.rsplit("/", 1)[1] for key, url in urls.items()},
    )


def test_tfds_and_idx_give_one_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manual = put(tmp_path / "manual", small(), monkeypatch)
    by_hand = load("mnist", data_dir=tmp_path / "a", manual_dir=manual)
    serve(monkeypatch, manual / "mnist")
    task = load("mnist", data_dir=tmp_path / "b")
    assert task.fingerprint == by_hand.fingerprint and task.classes == by_hand.classes
    # Prepared once, it needs no files by hand; nor has the builder taken the place of TFDS' own.
    assert load("mnist", data_dir=tmp_path / "b", manual_dir=tmp_path / "a").fingerprint == task.fingerprint
    assert tfds.builder_cls("mnist").__module__.startswith("tensorflow_datasets")
    sliced = load("mnist:train=train[:30]:test=train[30:]", data_dir=tmp_path / "b")
    np.testing.assert_array_equal(sliced.test.arrays[..., 0], small()[0][30:])


def test_the_class_names_and_checksums_are_those_of_tfds() -> None:
    for name in idx.COMPLETE:
        stock = tfds.builder_cls(name)
        info = ours._idx_builder(name, Path("none")).info
        assert tuple(info.features["label"].names) == idx.CLASSES[name]
        sums = {url.rsplit("/", 1)[1]: info_.checksum for url, info_ in stock.url_infos.items()}
        if name in idx.ARCHIVE_SHA256:
            assert tuple(sums[f"{file}.gz"] for file in idx.FILES) == idx.ARCHIVE_SHA256[name]


def test_without_a_network_the_way_by_hand_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, port: None) -> None:
        raise OSError(f"{host} does not resolve")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(InputError, match=r"fashion-mnist.* cannot be reached: connect, or .*manual_dir=DIR"):
        load("fashion_mnist", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"cannot be reached: connect, or prepare it elsewhere"):
        load("cifar10", data_dir=tmp_path)


def test_a_failed_download_and_a_wrong_checksum_name_the_way_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, urls: Any) -> None:
        raise ConnectionError("connection reset\nby peer")

    monkeypatch.setattr(ours, "_unreachable", lambda urls: "")
    monkeypatch.setattr(tfds.download.DownloadManager, "download", fail)
    with pytest.raises(
        InputError, match=r"'mnist' could not be prepared \(connection reset\).*manual_dir=DIR"
    ) as error:
        load("mnist", data_dir=tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    manual = put(tmp_path / "manual", small(), monkeypatch)
    with pytest.raises(InputError, match=r"wrong checksum"):  # slices go by TFDS, whose checksums hold
        load("mnist:train=train[:30]", data_dir=tmp_path, manual_dir=manual)


def test_a_builder_that_needs_tensorflow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_unreachable", lambda urls: "")
    packed = tmp_path / "images.gz"
    packed.write_bytes(gzip.compress(b"images"))

    def unpack(self: Any, urls: Any) -> Any:
        return self.extract(packed)

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", unpack)
    with pytest.raises(InputError, match=r"pip install 'tljax\[tensorflow\]'.*array_record.*data_dir") as error:
        load("emnist/digits", data_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.complete
@needs_complete
def test_complete_fashion_mnist_is_the_same_by_tfds_and_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, Path(COMPLETE) / "fashion_mnist")
    task = load("fashion_mnist", data_dir=tmp_path / "a")
    by_hand = load("fashion_mnist", data_dir=tmp_path / "b", manual_dir=COMPLETE)
    assert task.fingerprint == by_hand.fingerprint
    assert task.fingerprint == checks.fingerprint(by_hand.train, by_hand.test, by_hand.classes)


VTAB = {  # the numbers of classes in table 2 of arXiv:1910.04867
    "caltech101": 102, "cifar100": 100, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn_cropped": 10,
    "sun397/tfds": 397, "patch_camelyon": 2, "eurosat/rgb": 10, "resisc45": 45,
    "diabetic_retinopathy_detection/btgraham-300": 5, "dmlab": 6, "label_azimuth": 18, "label_elevation": 9,
}  # fmt: skip


def test_the_targets_of_vtab_are_of_tfds_with_a_thousand_labels_and_the_classes_of_the_paper(tmp_path: Path) -> None:
    file = Path(__file__).parent.parent / "experiments" / "flags" / "suites" / "vtab_1k.flags"
    [line] = [line for line in file.read_text().splitlines() if line.startswith("--target=")]
    counts = {}
    for name in plugins.split(line.removeprefix("--target="), ","):
        spec = plugins.parse(name)
        slices = re.findall(r"\w+\[(\d*):(\d*)\]", spec.options["train"])
        assert sum(int(end) - int(start or 0) for start, end in slices) == 1000
        features = spec.options["inputs"], spec.options["target"]
        chosen = ours._features(spec.name, tfds.builder(spec.name, data_dir=tmp_path), features)
        assert chosen.kind == "classes"
        counts[chosen.target if spec.name == "smallnorb" else spec.name] = len(chosen.classes)
    assert counts == VTAB
