"""Data that cannot be meant are refused; what can hardly be meant is said, and data as they ought to be say nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax.data import checks, load
from tljax.types import ArrayExamples, InputError, Task

RNG = np.random.default_rng(0)
Y = np.arange(20) % 4


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (20, *shape), np.uint8)


def loaded(tmp_path: Path, **changes: Any) -> Task:
    arrays = {"x_train": pixels(8, 8), "y_train": Y, "x_test": pixels(8, 8), "y_test": Y} | changes
    np.savez(tmp_path / "d.npz", **{key: value for key, value in arrays.items() if value is not None})
    task = load(str(tmp_path / "d.npz"), data_dir=tmp_path)
    assert task.note == "; ".join(task.findings)
    return task


def both(images: np.ndarray) -> dict[str, np.ndarray]:
    """As images of both splits, the halves of it, each with labels."""
    half = len(images) // 2
    return {"x_train": images[:half], "y_train": Y[:half], "x_test": images[half:], "y_test": Y[:half]}


NAMES = np.array(["a", "b", "c", "d", "e"])


# Refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_train": Y + 1, "y_test": Y + 1}, r"train labels are 1..4, and the first class is 0: subtract 1 from all"),
        ({"y_train": Y + 5, "y_test": Y + 5}, r"train labels are 5..8, and the first class is 0: subtract 5"),
        ({"y_train": Y + 1}, r"train labels are 1..4"),
        ({"y_train": np.where(Y == 3, 9, Y), "y_test": Y % 3},
         r"train has no label '3', '4', '5', '6', '7', '8' of 0..9: number the classes without gaps, or give class_n"),
        ({"y_train": Y * 2, "y_test": Y * 2}, r"train has no label '1', '3', '5' of 0..6"),
        ({"y_train": np.where(Y == 0, 5, Y), "y_test": np.where(Y == 0, 5, Y)}, r"train has no label '0', '4' of 0..5"),
        ({"y_train": np.eye(4)[Y], "y_test": np.eye(4)[Y]},
         r"train: labels have shape \[20, 4\].*of one-hot labels give labels.argmax\(1\)"),
        ({"y_train": Y[:, None], "y_test": Y[:, None]}, r"train: labels have shape \[20, 1\].*give labels\[:, 0\]"),
        ({"y_train": Y - 1, "y_test": Y}, r"train: row 0 has label -1, outside 0..2"),
        ({"x_train": pixels(3, 12, 12), "x_test": pixels(3, 12, 12)},
         r"train: images are \[20, 3, 12, 12\], channels first: transpose to \[n, height, width, channels\]"),
        ({"x_test": pixels(1, 8, 8)}, r"test: images are \[20, 1, 8, 8\], channels first"),
        ({"x_train": pixels(3, 5, 5) / 255.0}, r"train: images are \[20, 3, 5, 5\], channels first"),
        ({"x_train": pixels(1, 28, 40).astype(np.float32) / 127.5 - 1}, r"channels first"),
        ({"x_train": pixels(4, 32, 32)}, r"channels first"),
        ({"x_train": pixels(3, 4, 9)}, r"channels first"),
        ({"x_train": np.moveaxis(pixels(8, 8, 3), 0, -1), "x_test": np.moveaxis(pixels(8, 8, 3), 0, -1)[..., :9]},
         r"labels have shape \[20\], images say \[8\]: the images are along the last axis"),
        ({"x_train": pixels(8, 8).astype(np.uint16)}, r"images are uint16: give uint8 pixels"),
        ({"x_train": pixels(8, 8).astype(np.int16)}, r"images are int16: give uint8 pixels"),
        ({"x_train": pixels(8, 8) > 9}, r"images are bool: give uint8 pixels"),
        ({"x_train": np.where(pixels(8, 8, 1) > 250, np.inf, 1.0)}, r"train: row \d+ holds inf, no finite float32"),
        ({"x_test": np.where(pixels(8, 8, 1) > 250, np.nan, 1.0)}, r"test: row \d+ holds nan, no finite float32"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_a_remedy(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        loaded(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 6)])
def test_channels_first_is_refused_whatever_shape_is_asked_for(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=pixels(*shape), y_train=Y, x_test=pixels(*shape), y_test=Y)
    with pytest.raises(InputError, match="channels first"):
        load(str(tmp_path / "d.npz"), data_dir=tmp_path, image_shape=(8, 8, 3))


@pytest.mark.parametrize(
    "shape", [(1, 1, 2048), (3, 3, 512), (7, 7, 4), (28, 28, 1), (3, 3, 1), (2, 2, 16), (8, 8, 13), (4, 4, 64)]
)
def test_pictures_and_feature_maps_are_not_taken_for_channels_first(shape: tuple[int, ...]) -> None:
    assert checks.require_channels_last("d", np.zeros((2, *shape), np.float32)) is None


# Said.


def far(low: float, high: float, *shape: int) -> dict[str, np.ndarray]:
    return both(RNG.uniform(low, high, (40, *(shape or (5, 5)))))


FORTY = RNG.integers(0, 256, (40, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"class_names": NAMES}, ["class 'e' of 5 has no training example", "class 'e' of 5 has no test example"]),
        ({"y_test": Y % 2}, ["classes '2', '3' of 4 have no test example"]),
        ({"y_train": Y % 3, "class_names": NAMES[:4]}, ["class 'd' of 4 has no training example"]),
        ({"y_train": 1 + Y % 2, "y_test": np.full(20, 1), "class_names": NAMES[:3]},
         ["class 'a' of 3 has no training example", "classes 'a', 'c' of 3 have no test example"]),
        ({"x_train": np.full((20, 8, 8), 77, np.uint8)}, ["all 20 training examples are the same",
         "20 of 20 training examples are there with another label too"]),
        ({"x_test": np.full((20, 8, 8), 77, np.uint8)}, ["all 20 test examples are the same"]),
        ({"x_train": np.repeat(np.arange(40, 60, dtype=np.uint8), 64).reshape(20, 8, 8)},
         ["every training example is of one value"]),
        ({"x_train": FORTY[:20], "x_test": FORTY[:20]}, ["20 of 20 test examples are in the training set too"]),
        ({"x_train": FORTY[:20], "x_test": FORTY[17:37]}, ["3 of 20 test examples are in the training set too"]),
        ({"x_train": FORTY[[*range(18), 0, 4]]}, ["4 of 20 training examples are there with another label too"]),
        (far(0, 255, 8, 8, 1), ["the numbers go from 0."]),
        (far(0, 255, 8, 8), ["the numbers go from"]),
        (far(-128, 127), ["the numbers go from"]),
        (far(1e6, 1e6 + 1), ["the numbers go from 1e+06 to 1e+06 and are taken as they are"]),
        (far(0, 1 / 255), ["the numbers go from"]),
        (both(RNG.choice([0.0, 255.0], (40, 90, 90, 1), p=[0.999, 0.001])), ["the numbers go from 0 to 255"]),
        ({"x_train": pixels(8, 8) / 255, "x_test": pixels(8, 8).astype(float)},
         ["the numbers of train go from 0 to 1, of test from 0 to 255: are they of one scale?"]),
        ({"x_train": pixels(8, 8) / 255, "x_test": pixels(8, 8) / 127.5 - 1},
         ["the numbers of train go from 0 to 1, of test from -1 to 1: are they of one scale?"]),
        ({"x_train": RNG.normal(size=(20, 8, 8)), "x_test": pixels(8, 8) / 255}, ["the numbers of train go from -"]),
        ({"x_train": pixels(8, 8) // 128, "x_test": pixels(8, 8) // 128},
         ["the brightest pixel is 1, and pixels are taken as 0 to 255: nearly black"]),
        ({"x_train": pixels(8, 8) // 15, "x_test": pixels(8, 8) // 15}, ["the brightest pixel is 17"]),
        ({"x_test": pixels(8, 8) // 128}, ["the brightest pixel of train is 255, of test 1: are they of one scale?"]),
        ({"train_groups": np.arange(20) % 5, "test_groups": np.arange(20) % 4 + 3},
         ["2 of 4 groups of the test examples are in the training set too"]),
    ],
)  # fmt: skip
def test_what_can_hardly_be_meant_is_said(changes: dict, expected: list[str], tmp_path: Path) -> None:
    findings = loaded(tmp_path, **changes).findings
    assert len(findings) == len(expected) and all(map(str.startswith, findings, expected)), findings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_names": NAMES[:4]},
        {"x_train": pixels(8, 8, 3), "x_test": pixels(8, 8, 3)},
        far(0, 1, 8, 8, 1),
        far(-1, 1, 8, 8, 1),
        both(RNG.normal(size=(40, 6))),
        both(np.maximum(RNG.normal(size=(40, 60)), 0)),
        both(RNG.standard_t(1.5, (40, 6))),  # heavy tails
        both(RNG.dirichlet(np.full(400, 0.05), 40)),  # sparse rows of length 1
        far(0, 4, 1),  # one number an example is no constant picture
        {"train_groups": np.arange(20) % 5, "test_groups": np.arange(20) % 4 + 5},
        {"y_train": Y % 2, "x_test": pixels(8, 8)[:2], "y_test": np.array([0, 1])},
    ],
)
def test_data_as_they_ought_to_be_say_nothing(changes: dict, tmp_path: Path) -> None:
    assert loaded(tmp_path, **changes).note == ""


@pytest.mark.parametrize("name", ["mnist_10k", "fashion_mnist_10k"])
def test_what_is_shipped_has_no_findings_and_its_old_fingerprint(name: str) -> None:
    task = load(name)
    assert not task.findings and task.train.groups is None
    known = {
        "mnist_10k": "08d318edcc026ced",
        "fashion_mnist_10k": "b8c5e3fa22079ffa",
        "mnist": "e5cc29a1ce7e7912",
        "fashion_mnist": "4c3a637308c22f1e",
    }
    assert task.fingerprint.startswith(known[name])


@pytest.mark.complete
@pytest.mark.parametrize(
    ("name", "fingerprint"), [("mnist", "e5cc29a1ce7e7912"), ("fashion_mnist", "4c3a637308c22f1e")]
)
def test_the_complete_data_have_no_findings_and_their_old_fingerprints(
    name: str, fingerprint: str, complete_data: Path, tmp_path: Path
) -> None:
    task = load(name, data_dir=tmp_path, manual_dir=complete_data)
    assert task.note == "" and not task.findings and task.fingerprint.startswith(fingerprint)


def test_changed_data_say_what_is_true_of_them_and_nothing_that_no_longer_is(tmp_path: Path) -> None:
    x = pixels(8, 8)
    leak = np.concatenate([x[Y == 3], pixels(8, 8)[:15]])  # five of class 3 are in both
    np.savez(tmp_path / "d.npz", x_train=x, y_train=Y, x_test=leak, y_test=Y)
    name = str(tmp_path / "d.npz")
    assert load(name, data_dir=tmp_path).note == "5 of 20 test examples are in the training set too"
    without = load(f"{name}:labels=0-2", data_dir=tmp_path)
    assert without.note == "15 training and 15 test examples after labels=0-2" and not without.findings
    turned = load(f"{name}:rotate=90", data_dir=tmp_path)
    assert turned.findings == ("5 of 20 test examples are in the training set too",)
    assert turned.note == f"20 training and 20 test examples after rotate=90; {turned.findings[0]}"
    part = load("mnist_10k:labels=0-1")
    assert part.note.startswith("2,000 training and 400 test examples after labels=0-1; before: 10,000 training")


def test_images_larger_than_what_is_looked_at_at_once_are_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.uniform(0, 1, (30, 5)).astype(np.float32)
    train, test = (
        ArrayExamples(x, (np.arange(30) % 2).astype(np.int32)),
        ArrayExamples(x[5:15], (np.arange(10) % 2).astype(np.int32)),
    )
    whole = checks.checked("d", train, test, ("a", "b")).findings
    for size in (1, 20, 60, 100):
        monkeypatch.setattr("tljax.data.findings._CHUNK", size)
        assert checks.checked("d", train, test, ("a", "b")).findings == whole
    assert whole == ("10 of 10 test examples are in the training set too",)
