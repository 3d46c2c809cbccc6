"""Data of one's own: a folder of pictures, an .npz file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tljax.data import load, unlabelled
from tljax.data.images import to_shape
from tljax.types import InputError, Task

PIXELS = np.random.Philox(key=[2, 0]).random_raw(12 * 6 * 4 * 3 // 8).view(np.uint8).reshape(12, 6, 4, 3)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes, three training and two test pictures each, 6 x 4, in colour."""
    row = 0
    for split, each in (("train", 3), ("test", 2)):
        for name in ("dog", "cat"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                Image.fromarray(PIXELS[row]).save(folder / f"{i}.png")
                row += 1
    return tmp_path / "pictures"


def test_a_folder_is_read_sorted(pictures: Path, tmp_path: Path) -> None:
    (pictures / "train" / "dog" / ".DS_Store").write_text("hidden")
    task = load(f"folder:{pictures}", data_dir=tmp_path)
    assert task.classes == ("cat", "dog") and task.name == f"folder:{pictures}"
    assert task.train.targets.tolist() == [0, 0, 0, 1, 1, 1] and task.test.targets.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(task.train.arrays, PIXELS[[3, 4, 5, 0, 1, 2]])
    np.testing.assert_array_equal(task.test.arrays, PIXELS[[8, 9, 6, 7]])


def test_a_picture_added_removed_or_changed_is_noticed(pictures: Path, tmp_path: Path) -> None:
    prints = [load(f"folder:{pictures}", data_dir=tmp_path).fingerprint]
    Image.fromarray(PIXELS[10]).save(pictures / "train" / "cat" / "new.png")
    prints.append(load(f"folder:{pictures}", data_dir=tmp_path).fingerprint)
    Image.fromarray(PIXELS[11]).save(pictures / "train" / "cat" / "new.png", compress_level=0)
    prints.append(load(f"folder:{pictures}", data_dir=tmp_path).fingerprint)
    (pictures / "train" / "cat" / "new.png").unlink()
    prints.append(load(f"folder:{pictures}", data_dir=tmp_path).fingerprint)
    assert prints[0] == prints[3] and len(set(prints)) == 3


def test_sizes_that_differ_need_image_shape(pictures: Path, tmp_path: Path) -> None:
    odd = pictures / "test" / "dog" / "odd.png"
    Image.fromarray(PIXELS[10]).resize((9, 9)).save(odd)
    with pytest.raises(InputError, match=r"odd.png' is 9x9x3, the first 6x4x3.*image_shape"):
        load(f"folder:{pictures}", data_dir=tmp_path)
    grey = load(f"folder:{pictures}", data_dir=tmp_path, image_shape=(5, 5, 1))
    assert grey.train.arrays.shape == (6, 5, 5, 1)
    colour = load(f"folder:{pictures}", data_dir=tmp_path, image_shape=(5, 5, 3))
    assert colour.fingerprint != grey.fingerprint
    words = "10 of 11 images are resized by their short side and cropped at the centre to 5x5"
    assert grey.note == colour.note == words
    squashed = load(f"folder:{pictures}", data_dir=tmp_path, image_shape=(5, 5, 3), resize="squash")
    assert squashed.note == "" and squashed.fingerprint != colour.fingerprint
    np.testing.assert_array_equal(squashed.train.arrays[0], to_shape(PIXELS[3:4], (5, 5, 3), "squash")[0])
    same = [load(f"folder:{pictures}", data_dir=tmp_path, image_shape=(5, 5, 3), resize=r) for r in ("crop", "squash")]
    assert [task.fingerprint for task in same] == [colour.fingerprint, squashed.fingerprint]
    with pytest.raises(InputError, match="resize=pad: it is none of crop, squash"):
        load(f"folder:{pictures}", data_dir=tmp_path, image_shape=(5, 5, 3), resize="pad")


def spoil_class(folder: Path) -> None:
    (folder / "test" / "cat").rename(folder / "test" / "cow")


def spoil_layout(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).rename(folder / f"{split}s")


def spoil_place(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "0.png")


def spoil_file(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "0.bmp")


def spoil_bytes(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").write_bytes(b"no picture")


def spoil_empty(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "ant").mkdir()


def spoil_all_but_one(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "dog").rename(folder / f"{split}-dog")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_class, r"test' lacks class 'cat' of train|train' lacks class 'cow' of test"),
        (spoil_layout, r"has no folder 'train': expected is DIR/train/CLASS/\*.png"),
        (spoil_place, r"train/0.png' is no class folder: expected is"),
        (spoil_file, r"0.bmp' is no .png, .jpg, .jpeg file: convert or remove it"),
        (spoil_bytes, r"0.png' is no readable picture"),
        (spoil_empty, r"ant' holds no picture"),
        (spoil_all_but_one, r"one class only"),
    ],
)
def test_a_spoilt_folder_is_named(spoil: Any, words: str, pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    with pytest.raises(InputError, match=words):
        load(f"folder:{pictures}", data_dir=tmp_path)


def test_a_folder_must_be_given_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write folder:DIR"):
        load("folder", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"is no folder: expected is DIR/train/CLASS"):
        load(f"folder:{tmp_path}/none", data_dir=tmp_path)
    with pytest.raises(InputError, match="data set 'folder' has no option 'k'"):
        load(f"folder:{tmp_path}:k=1", data_dir=tmp_path)


# .npz files.


def good() -> dict[str, Any]:
    return {
        "train_images": PIXELS[:6],
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": PIXELS[6:9],
        "test_labels": np.array([2, 1, 0], np.uint8),
    }


def saved(tmp_path: Path, **changes: Any) -> Task:
    arrays = {key: value for key, value in {**good(), **changes}.items() if value is not None}
    np.savez(tmp_path / "d.npz", **arrays)
    return load(str(tmp_path / "d.npz"), data_dir=tmp_path / "data")


def test_an_npz_file_is_read(tmp_path: Path) -> None:
    task = saved(tmp_path)
    np.testing.assert_array_equal(task.train.arrays, PIXELS[:6])
    assert task.test.targets.tolist() == [2, 1, 0] and task.test.targets.dtype == np.int32
    assert task.classes == ("0", "1", "2")
    assert saved(tmp_path, class_names=np.array(["a", "b", "c", "d"])).classes == ("a", "b", "c", "d")


def test_common_spellings_and_grey_pictures(tmp_path: Path) -> None:
    x, y = PIXELS[..., 0], np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "d.npz", x_train=x[:6], y_train=y, x_test=x[6:9], y_test=y[:3])
    assert load(f"{tmp_path}/d.npz", data_dir=tmp_path).train.arrays.shape == (6, 6, 4, 1)
    task = load(f"{tmp_path}/d.npz", data_dir=tmp_path, image_shape=(3, 3, 3))
    assert task.train.arrays.shape == (6, 3, 3, 3)


def test_features_become_float32(tmp_path: Path) -> None:
    x = np.linspace(0, 1, 6 * 5).reshape(6, 5)
    task = saved(tmp_path, train_images=None, test_images=None, train_features=x, test_features=x[:3])
    assert task.train.arrays.dtype == np.float32
    np.testing.assert_array_equal(task.train.arrays, x.astype(np.float32))
    with pytest.raises(InputError, match=r"features \[5\] cannot become \[5, 1, 1\], as only uint8 pixels"):
        load(str(tmp_path / "d.npz"), data_dir=tmp_path, image_shape=(5, 1, 1))


def with_value(value: float) -> np.ndarray:
    features = np.zeros((6, 2, 2))
    features[4, 1, 0] = value
    return features


FLOATS = np.zeros((3, 2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": np.array([0, 1, 2, -1, 1, 2])}, r"train: row 3 has label -1, outside 0..2"),
        ({"test_labels": np.array([0, 3, 2])}, r"test: row 1 has label 3, outside 0..2"),
        ({"train_labels": np.array([0, 1, 900, 0, 1, 2])}, r"row 2 of the 6 train labels is 900"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 2.5])}, r"train: labels are float64, row 0 is 0.0"),
        ({"train_labels": np.array([0, 1, 2])}, r"train: labels have shape \[3\], images say \[6\]"),
        ({"train_labels": np.array([[0, 1, 2, 0, 1, 2]])}, r"labels have shape \[1, 6\]"),
        ({"train_labels": np.zeros(6, int), "test_labels": np.zeros(3, int)}, r"one class only"),
        ({"test_labels": None}, r"has no test labels: name an array test_labels or y_test"),
        ({"x_train": PIXELS[:6]}, r"has both train_images and x_train: keep one"),
        ({"train_images": PIXELS[:6].astype(int)}, r"train: images are int64: give uint8 pixels"),
        ({"train_images": PIXELS[:6, 0, 0]}, r"uint8 images are \[n, height, width, channels\], not \[6, 3\]"),
        ({"train_images": PIXELS[:6, :3]}, r"train has uint8 \(3, 4, 3\), test uint8 \(6, 4, 3\)"),
        ({"test_images": PIXELS[:0], "test_labels": np.zeros(0, int)}, r"test: is empty"),
        ({"train_images": PIXELS[:0], "train_labels": np.zeros(0, int)}, r"train: is empty"),
        ({"train_images": np.array([{}] * 6, dtype=object)}, r"'train_images' holds Python objects \(pickle\)"),
        ({"train_images": with_value(np.nan), "test_images": FLOATS}, r"train: row 4 holds nan, no finite float32"),
        ({"train_images": with_value(1e300), "test_images": FLOATS}, r"train: row 4 holds 1e\+300, no finite"),
        ({"train_images": np.zeros(6), "test_images": np.zeros(3)}, r"float features are \[n, ...\], not \[6\]"),
        ({"class_names": np.array(["a", "b"])}, r"row 2 has label 2, outside 0..1.*name more classes"),
        ({"class_names": np.array(["a", "b", "a"])}, r"a class name occurs twice"),
        ({"class_names": np.arange(3)}, r"class_names is int64 \[3\]: give strings"),
    ],
)
def test_a_bad_array_is_named_with_row_and_value(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        saved(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "d.npz"
    with pytest.raises(InputError, match=r"d.npz' does not exist"):
        load(str(file), data_dir=tmp_path)
    np.savez(file, **good())
    whole = file.read_bytes()
    npy = tmp_path / "a.npy"
    np.save(npy, PIXELS)
    for data in (b"", b"junk", whole[: len(whole) // 2], whole[:200] + b"\1" + whole[201:], npy.read_bytes()):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"d.npz'.*numpy.savez") as error:
            load(str(file), data_dir=tmp_path)
        assert "\n" not in str(error.value)


# Names in any locale.

_LOADED = """
import sys
from pathlib import Path
from tljax.data import load, unlabelled
from tljax.data.images import to_shape
print(sys.getfilesystemencoding())
for data_dir in sys.argv[1:]:
    task = load("folder:pets", data_dir=data_dir)
    print(task.fingerprint, [name.encode("utf-8", "surrogateescape") for name in task.classes])
print([name.encode("utf-8", "surrogateescape") for name in unlabelled.load(Path("pets"), (6, 4, 3)).names])
"""


def test_classes_files_and_their_order_are_the_same_in_every_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of these two last ones the bytes sort otherwise than the code points: U+FF21 lies behind U+DCFF.
    names = ("a.png", "caf\u00e9.png", "\uff21.png", os.fsdecode(b"\xff.png"))
    classes = ("caf\u00e9", "dog", "\uff21", os.fsdecode(b"\xff"))
    for row, (label, name) in enumerate((c, n) for c in classes for n in names[: 3 + (c == "dog")]):
        for split in ("train", "test"):
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[row % 12]).save(folder / name)
    monkeypatch.chdir(tmp_path)
    task = load("folder:pets", data_dir=tmp_path / "a")
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", _LOADED, str(tmp_path / "a"), str(tmp_path / "b")]
    run = subprocess.run(command, env={**os.environ, **posix}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    encoding, kept_by_another, decoded, pictures = run.stdout.splitlines()
    assert encoding == "ascii"
    expected = [b"caf\xc3\xa9", b"dog", b"\xff", b"\xef\xbc\xa1"]
    assert kept_by_another == decoded == f"{task.fingerprint} {expected}"
    assert pictures == str(
        [name.encode("utf-8", "surrogateescape") for name in unlabelled.load(Path("pets"), (6, 4, 3)).names]
    )
    assert len(list((tmp_path / "a" / "tljax").iterdir())) == 1  # the same folder, and none beside it
