"""Checkpoints: what comes back is what was saved, or an error says what is wrong."""

import json

import numpy as np
import pytest

from tljax import checkpoint
from tljax.types import InputError

FITS = {
    "seed-0": {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.int32(16777217)}},
    "seed-1": {"head": {"kernel": np.full((2, 3), -0.0, np.float32), "count": np.int32(1)}},
}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "group", FITS, {"task": "mnist"})
    return tmp_path / "group"


def test_every_leaf_comes_back_with_its_bytes_and_dtype(saved):
    fits, about = checkpoint.load(saved)
    assert about["task"] == "mnist"
    for name, params in FITS.items():
        back = checkpoint.unflatten(fits[name], params)
        for path in ("kernel", "count"):
            there, here = np.asarray(params["head"][path]), back["head"][path]
            assert here.dtype == there.dtype and here.tobytes() == there.tobytes()


def test_nothing_is_written_over(saved):
    with pytest.raises(InputError, match="exists already"):
        checkpoint.save(saved, FITS, {})


def test_a_flipped_byte_is_noticed_and_named(tmp_path):
    """Orbax alone restores it without a word."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 4096)).astype(np.uint8)
    checkpoint.save(tmp_path / "group", {"seed-0": {"kernel": noise}}, {})
    file = max((tmp_path / "group" / "state").rglob("*"), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match="fit 'seed-0': leaf 'kernel' is damaged"):
        checkpoint.load(tmp_path / "group")


def test_a_checksum_that_differs_names_the_leaf(saved):
    file = saved / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta["sha256"]["seed-1"]["head/kernel"] = "0" * 64
    meta["digest"] = checkpoint._of_json(meta)
    file.write_text(json.dumps(meta))
    with pytest.raises(InputError, match="fit 'seed-1': leaf 'head/kernel' is damaged"):
        checkpoint.load(saved)


def test_what_a_checkpoint_says_of_itself_is_checked_too(saved):
    file = saved / "meta" / "metadata"
    file.write_text(file.read_text().replace("mnist", "kmnist"))
    with pytest.raises(InputError, match="what it says of itself is damaged"):
        checkpoint.about(saved)


def test_a_checkpoint_that_cannot_be_written_says_where_and_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/group' cannot be written .*make room or give another folder"):
        checkpoint.save(tmp_path / "file" / "group", FITS, {})


def test_a_folder_that_is_missing_or_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not a tljax checkpoint"):
        checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"head": {"kernel": np.zeros((2, 4), np.float32), "count": np.int32(0)}}, r"'head/kernel' is float32\[2, 3\]"),
        ({"head": {"kernel": np.zeros((2, 3), np.float64), "count": np.int32(0)}}, r"float64\[2, 3\] in the model"),
        ({"head": {"count": np.int32(0)}}, "absent in the model"),
        (
            {"head": {"kernel": np.zeros((2, 3), np.float32), "count": np.int32(0), "x": np.ones(1)}},
            "absent in the checkpoint",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_leaf(saved, like, message):
    with pytest.raises(InputError, match=message):
        checkpoint.unflatten(checkpoint.load(saved)[0]["seed-0"], like)
