"""Data by name: what is shipped, and IDX files fetched by hand."""

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tljax.data import checks, idx, load
from tljax.data.shipped import cut
from tljax.types import ArrayExamples, InputError

COMPLETE = os.environ.get("TLJAX_COMPLETE_DATA", "")
needs_complete = pytest.mark.skipif(not COMPLETE, reason="TLJAX_COMPLETE_DATA names no folder with the complete data")


def small(seed: int = 0) -> list[np.ndarray]:
    """The arrays of a tiny MNIST: 40 training and 20 test images."""
    words = np.random.Philox(key=[seed, 0]).random_raw(60 * 49).astype("<u8").view(np.uint8)
    pictures = np.resize(words, (60, 28, 28))
    labels = np.arange(60, dtype=np.uint8) % 10
    return [pictures[:40], labels[:40], pictures[40:], labels[40:]]


def put(folder: Path, arrays: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, level: int = 9) -> Path:
    """Write the four files, and make their contents the right ones."""
    (folder / "mnist").mkdir(parents=True, exist_ok=True)
    contents = [idx.to_bytes(array) for array in arrays]
    for file, data in zip(idx.FILES, contents, strict=True):
        (folder / "mnist" / f"{file}.gz").write_bytes(gzip.compress(data, level, mtime=0))
    monkeypatch.setitem(idx.SHA256, "mnist", tuple(hashlib.sha256(data).hexdigest() for data in contents))
    return folder


@pytest.fixture
def manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put(tmp_path / "manual", small(), monkeypatch)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# What is shipped.


@pytest.mark.parametrize("name", idx.SHIPPED)
def test_shipped_data_is_balanced_and_says_that_it_is_a_part(name: str) -> None:
    task = load(name)
    assert task.train.arrays.shape == (10_000, 28, 28, 1) and task.test.arrays.shape == (2_000, 28, 28, 1)
    assert task.train.arrays.dtype == np.uint8 and task.train.targets.dtype == np.int32
    assert np.bincount(task.train.targets).tolist() == [1000] * 10
    assert np.bincount(task.test.targets).tolist() == [200] * 10
    assert "not the complete data set" in task.note
    assert task.classes == idx.CLASSES[name.removesuffix("_10k")]


def test_shipped_data_is_small_and_licensed() -> None:
    folder = Path(cut.__file__).parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 20e6
    text = (folder / "LICENSES.md").read_text()
    assert "CC BY-SA" in text or "Attribution-Share Alike 3.0" in text
    assert "Zalando" in text and "WITHOUT WARRANTY OF ANY KIND" in text


def test_shipped_data_writes_nothing(tmp_path: Path) -> None:
    load("mnist_10k", data_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.complete
@needs_complete
def test_shipped_data_is_what_cut_makes_of_the_complete_data(tmp_path: Path) -> None:
    for name in idx.SHIPPED:
        complete = name.removesuffix("_10k")
        cut.cut(complete, Path(COMPLETE) / complete, tmp_path)
        shipped = Path(cut.__file__).parent / name
        for file in idx.FILES:
            again, here = (gzip.decompress((f / f"{file}.gz").read_bytes()) for f in (tmp_path, shipped))
            assert again == here, file


@pytest.mark.complete
@needs_complete
@pytest.mark.parametrize("name", idx.SHIPPED)
def test_shipped_images_are_true_rows_of_the_originals(name: str, tmp_path: Path) -> None:
    part, whole = load(name), load(name.removesuffix("_10k"), data_dir=tmp_path, manual_dir=COMPLETE)
    for some, every in ((part.train, whole.train), (part.test, whole.test)):
        rows = {(image.tobytes(), int(label)) for image, label in zip(every.arrays, every.targets, strict=True)}
        kept = [(image.tobytes(), int(label)) for image, label in zip(some.arrays, some.targets, strict=True)]
        assert rows.issuperset(kept)
        assert len(set(kept)) > 0.999 * len(kept)


# IDX files fetched by hand.


@pytest.mark.complete
@needs_complete
def test_complete_data_loads_and_then_is_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("mnist", data_dir=tmp_path, manual_dir=COMPLETE)
    assert first.train.arrays.shape == (60_000, 28, 28, 1) and first.note == ""
    monkeypatch.setattr("tljax.data.idx.read", None)  # nothing is decoded again
    again = load("mnist", data_dir=tmp_path, manual_dir=COMPLETE)
    assert again.fingerprint == first.fingerprint


def test_files_are_read_gzipped_or_not_and_compressed_anyhow(
    manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load("mnist", data_dir=tmp_path / "a", manual_dir=manual)
    np.testing.assert_array_equal(first.train.arrays[..., 0], small()[0])
    put(manual, small(), monkeypatch, level=1)
    assert load("mnist", data_dir=tmp_path / "b", manual_dir=manual).fingerprint == first.fingerprint
    for file in idx.FILES:
        packed = manual / "mnist" / f"{file}.gz"
        (manual / "mnist" / file).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert load("mnist", data_dir=tmp_path / "c", manual_dir=manual).fingerprint == first.fingerprint


def test_every_damage_to_a_file_is_named(manual: Path, tmp_path: Path) -> None:
    file = manual / "mnist" / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    plain = gzip.decompress(whole)
    altered = bytearray(plain)
    altered[-1] ^= 1
    damages = {
        "cut short": whole[: len(whole) // 2],
        "gzip": b"<html>not found</html>",
        "altered contents": gzip.compress(bytes(altered)),
        "not IDX": gzip.compress(b"\x93NUMPY" + plain),
        "not IDX of uint8 (it begins with nothing)": gzip.compress(b""),
        "header says": gzip.compress(plain[:-5]),
        "header says 31376": gzip.compress(plain + b"\0"),
        "header says 4294967303": gzip.compress(b"\0\0\x08\x01" + b"\xff" * 4),
    }
    for words, data in damages.items():
        file.write_bytes(data)
        with pytest.raises(InputError) as error:
            load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
        message = one_line(error)
        assert str(file) in message and "download it again" in message and words in message
    file.write_bytes(whole)
    load("mnist", data_dir=tmp_path / "data", manual_dir=manual)


def test_missing_files_and_folders_are_named(manual: Path, tmp_path: Path) -> None:
    (manual / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte.gz.*train-images-idx3-ubyte.gz"):
        load("mnist", data_dir=tmp_path, manual_dir=manual)
    with pytest.raises(InputError, match=r"manual_dir.*no folder 'kmnist'.*train-images-idx3-ubyte.gz"):
        load("kmnist", data_dir=tmp_path, manual_dir=manual)
    with pytest.raises(InputError, match=r"manual_dir=.*is no folder"):
        load("mnist_10k", manual_dir=tmp_path / "nowhere")


def test_exchanged_files_are_noticed(manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, *rest = small()
    put(manual, [labels, images, *rest], monkeypatch)
    with pytest.raises(InputError, match="exchanged"):
        load("mnist", data_dir=tmp_path, manual_dir=manual)


def test_kmnist_must_be_the_published_archives(manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (manual / "mnist").rename(manual / "kmnist")
    with pytest.raises(InputError, match="not the original archive"):
        load("kmnist", data_dir=tmp_path, manual_dir=manual)
    files = [manual / "kmnist" / f"{file}.gz" for file in idx.FILES]
    sums = tuple(hashlib.sha256(f.read_bytes()).hexdigest() for f in files)
    monkeypatch.setitem(idx.ARCHIVE_SHA256, "kmnist", sums)
    assert load("kmnist", data_dir=tmp_path, manual_dir=manual).classes[0] == "o"


def test_labels_outside_the_classes_are_named(manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = small()
    arrays[3][7] = 10
    put(manual, arrays, monkeypatch)
    with pytest.raises(InputError, match=r"test: row 7 has label 10, outside 0..9"):
        load("mnist", data_dir=tmp_path, manual_dir=manual)


# Names, options and shapes.


def test_stray_options_and_words_are_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"'mnist_10k' has no option 'foo'; known: .*rotate=30"):
        load("mnist_10k:foo=1")
    with pytest.raises(InputError, match="'mnist_10k' has no option 'word'"):
        load("mnist_10k:word")
    with pytest.raises(InputError, match="'cifar10' has no option 'tain'; nearest: 'train=SPLIT'"):
        load("cifar10:tain=train")
    with pytest.raises(InputError, match="image_shape"):
        load("mnist_10k", image_shape=(28, 0, 1))


def test_shipped_data_is_brought_to_a_shape() -> None:
    task = load("mnist_10k", image_shape=(32, 30, 3))
    assert task.train.arrays.shape == (10_000, 32, 30, 3)
    assert task.fingerprint != load("mnist_10k").fingerprint
    assert load("mnist_10k", image_shape=(28, 28, 1)).fingerprint == load("mnist_10k").fingerprint


def test_the_fingerprint_is_the_one_that_is_written_down() -> None:
    train = ArrayExamples(np.array([[1.5]], np.float32), np.array([0], np.int32))
    test = ArrayExamples(np.array([[2.0]], np.float32), np.array([1], np.int32))
    whole = b"".join(
        b"<f4 [1, 1]\n" + f.tobytes() + b"<i4 [1]\n" + bytes([y, 0, 0, 0])
        for f, y in ((np.float32(1.5), 0), (np.float32(2), 1))
    )
    expected = hashlib.sha256(whole + b'["a", "b"]').hexdigest()
    assert checks.fingerprint(train, test, ("a", "b")) == expected
    assert checks.fingerprint(train, test, ("a", "c")) != expected
    assert checks.fingerprint(test, train, ("a", "b")) != expected


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = (
        "import sys, tljax.data; tljax.data.load('mnist_10k');"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'PIL', 'array_record') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
