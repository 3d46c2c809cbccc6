"""What is kept of data once decoded: mapped, checked against its sources, whole or not there."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_data import put, small

from tljax.data import cache, checks, idx, load
from tljax.types import InputError


@pytest.fixture
def manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put(tmp_path / "manual", small(), monkeypatch)


def kept(data_dir: Path) -> Path:
    (folder,) = (data_dir / "tljax").iterdir()
    return folder


def test_the_second_load_is_memory_mapped_and_decodes_nothing(
    manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    monkeypatch.setattr(idx, "read", None)
    again = load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    for array in (*again.train[:2], *again.test[:2]):
        assert isinstance(array, np.memmap) and not array.flags.writeable
    assert again.fingerprint == first.fingerprint == checks.fingerprint(again.train, again.test, again.classes)
    assert (again.name, again.note, again.classes) == (first.name, first.note, first.classes)


def test_a_changed_source_is_checked_again(manual: Path, tmp_path: Path) -> None:
    load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    file = manual / "mnist" / "t10k-images-idx3-ubyte.gz"
    altered = bytearray(gzip.decompress(file.read_bytes()))
    altered[100] ^= 255
    file.write_bytes(gzip.compress(bytes(altered)))
    with pytest.raises(InputError, match="altered contents"):
        load("mnist", data_dir=tmp_path / "data", manual_dir=manual)


@pytest.mark.parametrize(
    "damage", ["cut short", "wrong shape", "no array", "bad note", "note of another kind", "pickle"]
)
def test_a_damaged_cache_is_decoded_again(damage: str, manual: Path, tmp_path: Path) -> None:
    first = load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    folder = kept(tmp_path / "data")
    images, note = folder / "train_images.npy", folder / "task.json"
    if damage == "cut short":
        data = images.read_bytes()
        images.unlink()
        images.write_bytes(data[: len(data) // 2])
    elif damage == "wrong shape":
        np.save(folder / "train_labels.npy", np.zeros(3, np.int32))
    elif damage == "no array":
        images.unlink()
    elif damage == "bad note":
        note.write_text(note.read_text()[:40])
    elif damage == "note of another kind":
        note.write_text("[]")
    else:
        np.save(images, np.array([{}], dtype=object), allow_pickle=True)
    again = load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    np.testing.assert_array_equal(again.train.images[..., 0], small()[0])
    assert checks.fingerprint(again.train, again.test, again.classes) == again.fingerprint == first.fingerprint
    assert kept(tmp_path / "data") == folder
    assert json.loads(note.read_text())["fingerprint"] == first.fingerprint


def test_what_a_crash_left_is_ignored_and_swept_up_when_old(manual: Path, tmp_path: Path) -> None:
    load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    folder = kept(tmp_path / "data")
    leftovers = [folder.parent / f".{folder.name}.{age}" for age in ("old", "new")]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "train_images.npy").write_bytes(b"half")
    os.utime(leftovers[0], (0, 0))
    shutil.rmtree(folder)
    load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    assert [leftover.exists() for leftover in leftovers] == [False, True]


def test_a_crash_while_writing_leaves_nothing(manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(InputError, match=r"No space left.*--data_dir"):
        load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    assert not list((tmp_path / "data" / "tljax").iterdir())


def test_many_at_once_agree(manual: Path, tmp_path: Path) -> None:
    def one(_: int) -> str:
        task = load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
        return checks.fingerprint(task.train, task.test, task.classes)

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(one, range(16)))) == 1
        kept(tmp_path / "data")  # one folder, nothing beside it
        # The next round begins with one that is out of date, for all to replace.
        os.utime(manual / "mnist" / "train-images-idx3-ubyte.gz")


def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=small()[0], y_train=small()[1], x_test=small()[2], y_test=small()[3])
    code = "import sys; from tljax.data import load; print(load(sys.argv[1], data_dir=sys.argv[2]).fingerprint)"
    command = [sys.executable, "-c", code, str(tmp_path / "d.npz"), str(tmp_path / "data")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = [process.communicate(timeout=60)[0] for process in both]
    assert prints[0] == prints[1] and len(prints[0].strip()) == 64
    kept(tmp_path / "data")


def test_a_data_dir_that_cannot_be_written_is_named(manual: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*--data_dir"):
        load("mnist", data_dir=tmp_path / "file" / "data", manual_dir=manual)


def test_the_default_data_dir_is_that_of_tfds(manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    load("mnist", manual_dir=manual)
    assert kept(tmp_path / "there").is_dir()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load("mnist", manual_dir=manual)
    assert kept(tmp_path / "home" / "tensorflow_datasets").is_dir()
