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

from experiments.runs import plan
from experiments.runs.settings import Settings
from tljax.data import cache, checks, idx, load
from tljax.types import InputError, Task


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
    for array in (again.train.arrays, again.train.targets, again.test.arrays, again.test.targets):
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
    np.testing.assert_array_equal(again.train.arrays[..., 0], small()[0])
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
    with pytest.raises(InputError, match=r"No space left.*data_dir"):
        load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
    assert not list((tmp_path / "data" / "tljax").iterdir())


def test_many_at_once_agree(manual: Path, tmp_path: Path) -> None:
    def digest(_: int) -> str:
        task = load("mnist", data_dir=tmp_path / "data", manual_dir=manual)
        return checks.fingerprint(task.train, task.test, task.classes)

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(digest, range(16)))) == 1
        kept(tmp_path / "data")  # one folder, nothing beside it
        # The next round begins with one that is out of date, for all to replace.
        os.utime(manual / "mnist" / "train-images-idx3-ubyte.gz")


@pytest.mark.slow
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
    with pytest.raises(InputError, match=r"cannot be written.*data_dir"):
        load("mnist", data_dir=tmp_path / "file" / "data", manual_dir=manual)


def test_the_default_data_dir_is_that_of_tfds(manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    load("mnist", manual_dir=manual)
    assert kept(tmp_path / "there").is_dir()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load("mnist", manual_dir=manual)
    assert kept(tmp_path / "home" / "tensorflow_datasets").is_dir()


# Whatever byte is altered: it is said, and the data are decoded again.


def tiny(tmp_path: Path) -> str:
    """A data set of eight examples with all that may be kept of one: groups, class names, a note with findings."""
    x = np.random.default_rng(0).integers(0, 256, (12, 3, 3), np.uint8)
    x[8] = x[0]
    groups = np.array(["a", "b", "c", "d"])
    arrays = {"x_train": x[:8], "y_train": np.arange(8) % 2, "x_test": x[8:], "y_test": np.arange(4) % 2}
    names = np.array(["cat", "dog"])
    np.savez(tmp_path / "tiny.npz", **arrays, class_names=names, train_groups=np.tile(groups, 2), test_groups=groups)
    return str(tmp_path / "tiny.npz")


def same(task: Task, other: Task) -> bool:
    pairs = [(getattr(a, what), getattr(b, what)) for a, b in ((task.train, other.train), (task.test, other.test))
             for what in ("arrays", "targets", "groups")]  # fmt: skip
    words = [(t.name, t.classes, t.fingerprint, t.note, t.findings) for t in (task, other)]
    return words[0] == words[1] and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["task.json", "train_images.npy", "train_labels.npy", "train_groups.npy", "test_images.npy",
             "test_labels.npy", "test_groups.npy"],
)  # fmt: skip
def test_any_flipped_bit_of_the_cache_is_said_and_decoded_again(file: str, tmp_path: Path) -> None:
    name, messages = tiny(tmp_path), []
    first = load(name, data_dir=tmp_path / "reference")
    load(name, data_dir=tmp_path, say=messages.append)
    assert not messages and same(load(name, data_dir=tmp_path, say=messages.append), first) and not messages
    place = kept(tmp_path) / file
    whole = place.read_bytes()
    for at in range(0, len(whole), 5 if file == "task.json" else 3):
        altered = bytearray(whole)
        altered[at] ^= 1 << at % 8
        place.write_bytes(altered)
        assert same(load(name, data_dir=tmp_path, say=messages.append), first), at
        assert messages == [f"'{place}' is not as it was written: {name} is decoded again"], at
        messages.clear()
    assert place.read_bytes() == whole


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"[]", b'{"sha256": 1}', b"\xff", b"{", b"null"])
def test_a_note_or_array_of_anything_else_is_said_and_decoded_again(data: bytes, tmp_path: Path) -> None:
    name, messages = tiny(tmp_path), []
    first, _ = (load(name, data_dir=tmp_path / place) for place in ("reference", ""))
    for file in ("task.json", "test_labels.npy"):
        (kept(tmp_path) / file).write_bytes(data)
        assert same(load(name, data_dir=tmp_path, say=messages.append), first)
    assert len(messages) == 2


def test_a_fingerprint_or_class_name_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    name, messages = tiny(tmp_path), []
    first, _ = (load(name, data_dir=tmp_path / place) for place in ("reference", ""))
    place = kept(tmp_path) / "task.json"
    for before, after in ((first.fingerprint, "0" * 64), ('"cat"', '"cow"'), ('"dog"\n', '"dog" \n')):
        place.write_text(place.read_text().replace(before, after))
        assert same(load(name, data_dir=tmp_path, say=messages.append), first)
    assert len(messages) == 3


def test_what_was_kept_before_there_were_digests_is_decoded_again_without_a_word(tmp_path: Path) -> None:
    name, messages = tiny(tmp_path), []
    first, _ = (load(name, data_dir=tmp_path / place) for place in ("reference", ""))
    place = kept(tmp_path) / "task.json"
    note = json.loads(place.read_text())
    images = kept(tmp_path) / "train_images.npy"
    images.write_bytes(images.read_bytes()[:-1] + b"x")
    del note["sha256"], note["findings"]
    arrays = [first.train.arrays, first.train.targets, first.test.arrays, first.test.targets]
    note["arrays"] = [[array.dtype.str, list(array.shape)] for array in arrays]
    place.write_text(json.dumps(note, indent=1))
    assert same(load(name, data_dir=tmp_path, say=messages.append), first) and not messages


def test_data_that_were_changed_and_kept_are_checked_too(tmp_path: Path) -> None:
    name, messages = tiny(tmp_path) + ":rotate=90", []
    first, _ = (load(name, data_dir=tmp_path / place) for place in ("reference", ""))
    notes = {
        json.loads((folder / "task.json").read_text())["name"]: folder for folder in (tmp_path / "tljax").iterdir()
    }
    for changes, folder in (("", notes[name]), (":rotate=90", notes[name.removesuffix(":rotate=90")])):
        place = folder / "test_labels.npy"
        altered = bytearray(place.read_bytes())
        altered[-1] ^= 128  # a label becomes negative
        place.write_bytes(altered)
        assert same(load(name, data_dir=tmp_path, say=messages.append), first)
        assert messages == [f"'{place}' is not as it was written: {name.removesuffix(changes)} is decoded again"]
        messages.clear()


def test_what_a_disk_alters_as_it_is_written_is_not_kept_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cache._Summed.write
    name, messages = tiny(tmp_path), []

    def write_zeros(summed: cache._Summed, data: bytes) -> int:
        summed.sha256.update(data)
        return summed.out.write(bytes(len(data)))

    monkeypatch.setattr(cache._Summed, "write", write_zeros)
    first = load(name, data_dir=tmp_path)
    assert first.train.arrays.any() and checks.fingerprint(first.train, first.test, first.classes) == first.fingerprint
    monkeypatch.setattr(cache._Summed, "write", write)
    assert same(load(name, data_dir=tmp_path, say=messages.append), first) and len(messages) == 1


def test_programs_say_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = tiny(tmp_path)
    settings = Settings.from_flags(source=name, data_dir=str(tmp_path))
    fingerprint = plan.load_task(settings, name, None).fingerprint
    assert capsys.readouterr().out == ""
    place = kept(tmp_path) / "test_images.npy"
    altered = bytearray(place.read_bytes())
    altered[-50] ^= 128
    place.write_bytes(altered)
    assert plan.load_task(settings, name, None).fingerprint == fingerprint
    assert capsys.readouterr().out == f"'{place}' is not as it was written: {name} is decoded again\n"
