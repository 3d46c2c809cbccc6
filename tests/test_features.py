"""Features on disk: what a stage gives for every image, and of which source, stage and data they are."""

import json
import shutil

import numpy as np
import pytest
from test_programs import parameters, results

from experiments import features
from experiments.runs import features as on_disk
from experiments.runs import sources
from tljax import data
from tljax.types import InputError


def source_of(finished):
    return next(line for line in results(finished[0]) if line.strategy == "pretrain")


def line(finished, tasks, folder, **change):
    values = {
        "source_checkpoint": finished[0],
        "dataset": tasks / "clothes.npz",
        "stage": "hidden_0",
        "output": folder,
    } | change
    return ["features", *(f"--{name}={value}" for name, value in values.items() if value is not None)]


@pytest.fixture(scope="module")
def written(finished, tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "out"
    features.main(line(finished, tasks, folder))
    return folder


def first_source(finished):
    return sources.load(sources.settings_of({}, str(finished[0])))


def test_features_are_what_the_stage_gives_for_every_image(written, finished, tasks):
    flat = parameters(finished[0], source_of(finished))
    task = data.load(str(tasks / "clothes.npz"))
    for split, part in (("train", task.train), ("test", task.test)):
        images = part.arrays.reshape(len(part.targets), -1) / 255
        expected = np.maximum(images @ flat["hidden_0/kernel"].astype(float) + flat["hidden_0/bias"], 0)
        np.testing.assert_allclose(np.load(written / f"{split}.npy"), expected, atol=1e-5)
    record = json.loads((written / "features.json").read_text())
    assert record["data"]["fingerprint"] == task.fingerprint and record["shape"] == {"train": [120, 8], "test": [40, 8]}


def test_several_stages_take_one_pass_and_the_last_batch_is_whole(written, finished, tasks, tmp_path, monkeypatch):
    task, source = data.load(str(tasks / "clothes.npz")), first_source(finished)
    monkeypatch.setattr(on_disk, "BATCH", 50)  # 120 = 50 + 50 + 20
    on_disk.write(source, task, {"hidden_0": tmp_path / "a", "head": tmp_path / "b"}, "float16")
    hidden = on_disk.read(tmp_path / "a", source, task, "hidden_0", "float16")
    logits = on_disk.read(tmp_path / "b", source, task, "head", "float16")
    head = source.params["head"]
    np.testing.assert_allclose(logits.train, hidden.train @ head["kernel"] + head["bias"], atol=0.02)
    np.testing.assert_allclose(hidden.train, np.load(written / "train.npy"), atol=0.01)
    assert hidden.train[-1].any() and isinstance(hidden.train, np.memmap)


def test_what_is_there_is_not_computed_again(written, finished, tasks, monkeypatch):
    before = {file.name: file.stat().st_mtime_ns for file in written.iterdir()}
    monkeypatch.setattr(on_disk, "_batch", lambda *arguments: pytest.fail("it was computed again"))
    features.main(line(finished, tasks, written, stage=None))
    assert {file.name: file.stat().st_mtime_ns for file in written.iterdir()} == before


def test_features_of_another_source_stage_or_data_are_refused(written, finished, tasks):
    source, task = first_source(finished), data.load(str(tasks / "clothes.npz"))
    other = source._replace(identity="f" * 64)
    assert on_disk.read(written, source, task, "hidden_0").train.shape == (120, 8)
    for wrong, message in (
        (lambda: on_disk.read(written, other, task, "hidden_0"), "features of source .*f{40}"),
        (lambda: on_disk.read(written, source, task, "head"), "features of stage hidden_0, not head"),
        (lambda: on_disk.read(written, source, data.load(str(tasks / "same.npz")), "hidden_0"), "features of data"),
        (lambda: on_disk.read(written, source, task, "hidden_0", "float16"), "features of dtype float32"),
        (lambda: on_disk.read(written / "no", source, task, "hidden_0"), "holds no features"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


BAD = {
    "an unknown stage": ({"stage": "hidden_1"}, "--stage=hidden_1 is none of the model's; nearest: 'hidden_0'"),
    "no data": ({"dataset": None}, "--dataset is not given"),
    "no source": ({"source_checkpoint": None}, "--source_checkpoint is not given"),
    "another dtype": ({"dtype": "int8"}, "--dtype=int8"),
    "another model": ({"hidden": 9}, "of another model (--hidden=[8] there, [9] here)"),
    "several sources": ({"seeds": "0,1"}, "give one seed"),
    "data of another shape": ({"image_shape": "5,6,1"}, "has shape (5, 6, 1), the source (6, 6, 1)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, finished, tasks, tmp_path):
    change, message = BAD[case]
    with pytest.raises(InputError) as refused:
        features.main(line(finished, tasks, tmp_path / "out", **change))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_features_that_were_changed_are_refused_though_their_shape_is_right(written, finished, tasks, tmp_path):
    shutil.copytree(written, tmp_path / "f")
    array = np.load(tmp_path / "f" / "train.npy")
    array[-1, -1] += 1
    np.save(tmp_path / "f" / "train.npy", array)
    with pytest.raises(InputError, match="not as it was written: delete it"):
        on_disk.read(tmp_path / "f", first_source(finished), data.load(str(tasks / "clothes.npz")), "hidden_0")


def test_damaged_and_strange_folders_are_refused(written, finished, tasks, tmp_path):
    source, task = first_source(finished), data.load(str(tasks / "clothes.npz"))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes.txt' and no features"):
        features.main(line(finished, tasks, tmp_path / "f"))
    (tmp_path / "f" / "features.json").write_text((written / "features.json").read_text())
    np.save(tmp_path / "f" / "train.npy", np.zeros((120, 7), np.float32))
    with pytest.raises(InputError, match="not as features"):
        on_disk.read(tmp_path / "f", source, task, "hidden_0")
    (tmp_path / "f" / "features.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        on_disk.read(tmp_path / "f", source, task, "hidden_0")
