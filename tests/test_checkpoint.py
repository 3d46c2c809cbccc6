"""Checkpoints: what comes back is what was saved, or an error says what is wrong."""

import json
import os
import shutil

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


def test_what_fits_share_is_stored_once_and_loaded_once_and_nobody_writes_into_it(tmp_path):
    """A body of 4 MB and sixteen heads; the same bytes under another path, dtype or shape are another leaf."""
    body = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
    fits = {f"seed-{i}": {"body": body.copy(), "head": np.full(100, i, np.float32)} for i in range(16)}
    fits["other"] = {"body": body.view(np.int32), "head": np.full((10, 10), 0, np.float32)}
    checkpoint.save(tmp_path / "group", fits, {})
    size = sum(file.stat().st_size for file in (tmp_path / "group").rglob("*") if file.is_file())
    assert 8e6 < size < 8.5e6
    loaded, _ = checkpoint.load(tmp_path / "group")
    for name, params in fits.items():
        for path, leaf in params.items():
            assert loaded[name][path].dtype == leaf.dtype and loaded[name][path].shape == leaf.shape
            assert loaded[name][path].tobytes() == leaf.tobytes()
    assert loaded["seed-3"]["body"] is loaded["seed-0"]["body"]
    with pytest.raises(ValueError, match="read-only"):
        loaded["seed-0"]["body"][0] = 1


def test_a_checkpoint_in_which_each_fit_has_its_own_copy_is_read(tmp_path, monkeypatch):
    """As earlier versions stored them."""
    twice = {"a": {"w": np.ones(3)}, "b": {"w": np.ones(3)}}
    with monkeypatch.context() as patched:
        every = {f"{name}/w": (name, "w") for name in twice}
        patched.setattr(checkpoint, "_first_places", lambda records: every)
        patched.setattr(checkpoint, "_FORMAT", "tljax-parameters-2")
        checkpoint.save(tmp_path / "old", twice, {})
    fits, _ = checkpoint.load(tmp_path / "old")
    np.testing.assert_equal(fits, twice)
    assert fits["a"]["w"] is not fits["b"]["w"]


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


def rewrite(folder, change):
    """Let a checkpoint say something else of itself, with the right digest: what somebody with intent would do."""
    file = folder / "meta" / "metadata"
    meta = json.loads(file.read_text())
    change(meta)
    meta["digest"] = checkpoint._meta_digest(meta)
    file.write_text(json.dumps(meta))


def test_a_checksum_that_differs_names_the_leaf(saved):
    rewrite(saved, lambda meta: meta["leaves"]["seed-1"]["head/kernel"].__setitem__(2, "0" * 64))
    with pytest.raises(InputError, match="fit 'seed-1': leaf 'head/kernel' is damaged"):
        checkpoint.load(saved)


KERNEL, COUNT = np.zeros((2, 3), np.float32), np.int32(1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"kernel": np.zeros((2000, 3000), np.float32), "count": COUNT},
            r"\[2000, 3000\], and said to be float32\[2, 3\]",
        ),
        ({"kernel": KERNEL.astype(np.float64), "count": COUNT}, r"is float64\[2, 3\], and said to be float32\[2, 3\]"),
        ({"kernel": KERNEL}, "leaf 'head/count' is missing"),
        ({"kernel": KERNEL, "count": COUNT, "more": COUNT}, "leaf 'head/more' is none of its own"),
        ({"colonel": KERNEL, "count": COUNT}, "leaf 'head/colonel' is none of its own"),
    ],
    ids=["resized", "retyped", "missing", "extra", "renamed"],
)
def test_arrays_that_are_not_those_declared_are_refused_before_they_are_read(
    saved, tmp_path, monkeypatch, other, message
):
    others = {name: {path: leaf + leaf.dtype.type(i) for path, leaf in other.items()} for i, name in enumerate(FITS)}
    checkpoint.save(tmp_path / "other", {name: {"head": head} for name, head in others.items()}, {})
    shutil.rmtree(saved / "state")
    (tmp_path / "other" / "state").rename(saved / "state")
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", lambda *_, **__: pytest.fail("it reads"))
    with pytest.raises(InputError, match=message):
        checkpoint.load(saved)


def test_a_checkpoint_cannot_ask_for_more_memory_than_it_takes_on_disk(tmp_path, monkeypatch):
    """A gigabyte of zeros that compression has made small."""
    import orbax.checkpoint as ocp

    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    small = {"a": {"x": np.zeros(10**6, np.float32)}}
    checkpoint.save(tmp_path / "bomb", small, {})
    shutil.rmtree(tmp_path / "bomb" / "state")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
        writer.save(tmp_path / "squeezed", ocp.args.Composite(state=ocp.args.PyTreeSave(small)))
    (tmp_path / "squeezed" / "state").rename(tmp_path / "bomb" / "state")
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", lambda *_, **__: pytest.fail("it reads"))
    with pytest.raises(InputError, match="says it holds 4,000,000 bytes, more than are there"):
        checkpoint.load(tmp_path / "bomb")


def test_an_array_in_pieces_larger_than_itself_is_refused(saved, monkeypatch):
    """TensorStore makes room for a whole piece."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{saved}/state/"}).result()
    note = json.loads(store.read("seed-0.head/kernel/.zarray").result().value)
    store["seed-0.head/kernel/.zarray"] = json.dumps({**note, "chunks": [10**5, 10**5]}).encode()
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", lambda *_, **__: pytest.fail("it reads"))
    with pytest.raises(InputError, match="leaf 'head/kernel' is not stored in one piece"):
        checkpoint.load(saved)


@pytest.mark.parametrize("what", ["metadata", "array", "folder", "pipe"])
def test_no_link_out_of_a_checkpoint_is_followed(saved, tmp_path, what):
    """Nor is a pipe waited for."""
    places = {"metadata": saved / "meta" / "metadata", "folder": saved / "state", "pipe": saved / "state" / "pipe"}
    place = places.get(what) or next((saved / "state" / "ocdbt.process_0" / "d").iterdir())
    if what == "pipe":
        os.mkfifo(place)
    else:
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    for read in (checkpoint.about, checkpoint.load):
        with pytest.raises(InputError, match=f"holds a link or a device, '.*{place.name}': remove it"):
            read(saved)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "", "a//b", "a/./b", "a\nb"])
def test_names_that_are_no_plain_paths_are_refused(saved, tmp_path, name):
    for fits in ({name: {"w": KERNEL}}, {"a": {name: {"w": KERNEL}}}):
        with pytest.raises(InputError, match="is no plain path: rename it"):
            checkpoint.save(tmp_path / "new", fits, {})
        assert not (tmp_path / "new").exists()
    rewrite(saved, lambda meta: meta["leaves"]["seed-0"].update({name: ["float32", [2, 3], ""]}))
    with pytest.raises(InputError, match="is no plain path: rename it"):
        checkpoint.about(saved)


def test_names_are_not_taken_for_paths_outside_the_database(saved):
    file = saved / "state" / "_METADATA"
    file.write_text(file.read_text().replace('"use_ocdbt": true', '"use_ocdbt": false'))
    with pytest.raises(InputError, match="is not stored as tljax stores"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.update(leaves=[1]),
        lambda meta: meta["leaves"]["seed-0"].update(x=3),
        lambda meta: meta["leaves"]["seed-0"].update(x=["float32", [-1], ""]),
        lambda meta: meta["leaves"]["seed-0"].update(x=[4, [1], ""]),
        lambda meta: meta.update(about=7),
        lambda meta: meta.pop("leaves"),
    ],
)
def test_what_is_said_in_another_form_is_no_checkpoint(saved, change):
    rewrite(saved, change)
    with pytest.raises(InputError, match="is not a tljax checkpoint"):
        checkpoint.load(saved)


def test_leaves_without_elements_come_back(tmp_path):
    """Orbax refuses them."""
    params = {"none": np.zeros((0, 3), np.float16), "some": KERNEL}
    checkpoint.save(tmp_path / "group", {"a": params}, {})
    back = checkpoint.unflatten(checkpoint.load(tmp_path / "group")[0]["a"], params)
    assert back["none"].shape == (0, 3) and back["none"].dtype == np.float16


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
