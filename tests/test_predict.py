"""Out of the laboratory: what a fit says of new images, and its parameters in a file that anybody reads."""

import csv
import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from test_programs import arguments, command, parameters, results, snapshot
from test_weights import FILE, FOLDER

from experiments import export, predict, pretrain, transfer
from experiments.runs import console, directory, process, sources
from tljax import checkpoint, data
from tljax.data import images
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")
CLASSES = ["shirt", "coat", "bag"]


def line(program, **values):
    return [program, *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def predicted(folder, place, pictures, fit=None):
    """{column: list of strings} of what the program writes."""
    file = folder / "p.csv"
    predict.main(line("predict", checkpoint=place, images=pictures, fit=fit, output=file))
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.DictReader(stream))
    file.unlink()
    return {name: [row[name] for row in rows] for name in rows[0]}


def numbers(table, classes=CLASSES):
    columns = [f"p({name})" for name in classes]
    assert list(table) == ["image", "predicted", *columns]
    return np.array([table[name] for name in columns], float).T


def exported(folder, place, fit=None):
    export.main(line("export", checkpoint=place, fit=fit, output=folder / "out.safetensors"))
    return folder / "out.safetensors"


@pytest.fixture(scope="module")
def lora(tasks, finished, tmp_path_factory):
    """(run directory, line) of a fit whose factors count as much as its kernels."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    flags = {"strategies": ("lora:rank=2:scale=8",), "seeds": (0,), "validation": 0.1}
    flags |= {"source": None, "source_checkpoint": str(finished[0])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        return folder, transfer.run(**arguments(tasks, folder, **flags))[1]


def test_probabilities_are_the_softmax_of_the_network(finished, tasks, tmp_path):
    fit = finished[1][0]
    flat = {path: leaf.astype(float) for path, leaf in parameters(finished[0], fit).items()}
    pixels = data.load(str(tasks / "clothes.npz")).test.arrays.reshape(40, -1) / 255
    hidden = np.maximum(pixels @ flat["hidden_0/kernel"] + flat["hidden_0/bias"], 0)
    expected = softmax(hidden @ flat["head/kernel"] + flat["head/bias"], axis=1)
    table = predicted(tmp_path, finished[0], tasks / "clothes.npz", fit.name)
    np.testing.assert_allclose(numbers(table), expected, atol=1e-6)
    np.testing.assert_allclose(numbers(table).sum(1), 1, atol=1e-8)
    assert table["image"] == [str(row) for row in range(40)]
    assert table["predicted"] == [CLASSES[best] for best in expected.argmax(1)]


def test_the_accuracy_is_that_of_the_results(finished, tasks, tmp_path):
    labels = data.load(str(tasks / "clothes.npz")).test.targets
    for fit in finished[1][::3]:
        table = predicted(tmp_path, finished[0] / fit.checkpoint, tasks / "clothes.npz", fit.name)
        assert np.mean([name == CLASSES[label] for name, label in zip(table["predicted"], labels, strict=True)]) == (
            fit.test_accuracy
        )


def test_a_fit_may_be_named_without_the_digest_at_its_end(finished, tasks, tmp_path):
    whole = finished[1][0].name
    begun = predicted(tmp_path, finished[0], tasks / "clothes.npz", whole.rpartition("-")[0])
    assert begun == predicted(tmp_path, finished[0], tasks / "clothes.npz", whole)


def test_floats_beyond_0_to_1_are_said(finished, tasks, tmp_path, capsys):
    pixels = data.load(str(tasks / "clothes.npz")).test.arrays[:2].astype(np.float32)
    np.savez(tmp_path / "f.npz", images=pixels)
    predicted(tmp_path, finished[0], tmp_path / "f.npz", finished[1][0].name)
    assert f"pixels as 0 to 1: the largest here is {pixels.max():.6g}" in capsys.readouterr().out


def test_pictures_are_brought_to_the_shape_of_the_model_and_sorted(finished, tasks, tmp_path):
    name, arrays = finished[1][0].name, data.load(str(tasks / "clothes.npz")).test.arrays
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    large = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    for place, pixels in (("b/0.png", arrays[0, ..., 0]), ("c.PNG", arrays[1, ..., 0]), ("a.png", large)):
        Image.fromarray(pixels).save(folder / place)
    shutil.copy(folder / "a.png", folder / ".hidden" / "a.png")
    (folder / "notes.txt").write_text("no picture")
    os.rename(folder / "c.PNG", os.fsencode(folder) + b"/c\xff.PNG")
    table = predicted(tmp_path, finished[0], folder, name)
    assert table["image"] == ["a.png", "b/0.png", os.fsdecode(b"c\xff.PNG")]
    np.savez(tmp_path / "same.npz", images=np.concatenate([images.to_shape(large[None], (6, 6, 1)), arrays[:2]]))
    np.testing.assert_array_equal(
        numbers(table), numbers(predicted(tmp_path, finished[0], tmp_path / "same.npz", name))
    )
    alone = predicted(tmp_path, finished[0], folder / "a.png", name)
    assert {column: values[:1] for column, values in table.items()} == alone


def test_files_that_are_left_out_are_said(finished, tasks, tmp_path, capsys):
    name, pixels = finished[1][0].name, data.load(str(tasks / "clothes.npz")).test.arrays[0, ..., 0]
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for place in ("a.png", "sub/b.PNG", "c.webp", "d.bmp", "sub/e.tif", "f.gif"):
        Image.fromarray(pixels).save(folder / place)
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "more").symlink_to(tasks)
    (folder / ".DS_Store").write_text("")
    assert predicted(tmp_path, finished[0], folder, name)["image"] == ["a.png", "sub/b.PNG"]
    note = "6 files are no .png, .jpg or .jpeg and were left out: 'broken.png', 'c.webp', 'd.bmp', 'f.gif', 'more', 'su"
    assert note in capsys.readouterr().out
    for place in ("c.webp", "d.bmp", "broken.png", "more", "sub/e.tif"):
        (folder / place).unlink()
    predicted(tmp_path, finished[0], folder, name)
    assert "1 file is no .png, .jpg or .jpeg and was left out: 'f.gif'" in capsys.readouterr().out
    (folder / "f.gif").unlink()
    predicted(tmp_path, finished[0], folder, name)
    assert "left out" not in capsys.readouterr().out


def test_a_name_that_is_no_text_is_printed_all_the_same(monkeypatch, tmp_path):
    for encoding, shown in (("utf-8", "\u00e9 \\udcff"), ("ascii", "\\xe9 \\udcff")):
        with open(tmp_path / encoding, "w", encoding=encoding) as out:
            monkeypatch.setattr("sys.stdout", out)
            with process.lasting_streams():
                console.say("\u00e9 \udcff")
        assert (tmp_path / encoding).read_text(encoding) == shown + "\n"


def test_no_class_takes_the_place_of_a_column_and_no_cell_is_a_formula():
    classes = ["=1+1", "image", "predicted", 'é,"q"', "", "p(image)", "-cat"]
    names = ["=cmd|' /C calc'!A0.png", "@x.png", "-1", "b\n.png"]
    probabilities = np.eye(7)[[0, 6, 1, 3]] * 0.5 + 1e-5
    table = list(csv.DictReader(predict.table(names, classes, probabilities).splitlines(keepends=True)))
    columns = ["p(=1+1)", "p(image)", "p(predicted)", 'p(é,"q")', "p()", "p(p(image))", "p(-cat)"]
    assert list(table[0]) == ["image", "predicted", *columns]
    assert [row["image"] for row in table] == ["'=cmd|' /C calc'!A0.png", "'@x.png", "-1", "b\n.png"]
    assert [row["predicted"] for row in table] == ["'=1+1", "'-cat", "image", 'é,"q"']
    np.testing.assert_allclose([[float(row[column]) for column in columns] for row in table], probabilities)
    with pytest.raises(InputError, match="a class name occurs twice in 'a', 'b', 'a': give each class its own name"):
        predict.table(["x"], ["a", "b", "a"], np.full((1, 3), 1 / 3))


def test_weights_from_elsewhere_predict_what_pytorch_said(tmp_path):
    with np.load(FOLDER / "logits.npz") as known:
        np.savez(tmp_path / "images.npz", images=known["images"])
        expected = softmax(known["logits"].astype(float), axis=1)
    for suffix in ("", ".json"):
        shutil.copy(f"{FILE}{suffix}", f"{tmp_path / FILE.name}{suffix}")
    argv = line("predict", checkpoint=tmp_path / FILE.name, images=tmp_path / "images.npz", output=tmp_path / "p.csv")
    predict.main([*argv, "--hidden=16"])
    np.testing.assert_allclose(np.loadtxt(tmp_path / "p.csv", delimiter=",", skiprows=1)[:, 2:], expected, atol=1e-6)


def test_weights_that_overflow_are_said_to_be_at_fault(tmp_path):
    flat = {**load_file(FILE)} if FILE.suffix == ".safetensors" else dict(np.load(FILE))
    bias = next(name for name, array in flat.items() if array.ndim == 1)
    save_file({**flat, bias: np.full_like(flat[bias], 3e38)}, tmp_path / FILE.name)
    shutil.copy(f"{FILE}.json", f"{tmp_path / FILE.name}.json")
    with np.load(FOLDER / "logits.npz") as known:
        np.savez(tmp_path / "images.npz", images=known["images"])
    argv = line("predict", checkpoint=tmp_path / FILE.name, images=tmp_path / "images.npz", output=tmp_path / "p.csv")
    with pytest.raises(InputError, match=r"image 0 gives logits .*: the weights are too large, '.*bias' up to 3e\+38"):
        predict.main([*argv, "--hidden=16"])


@pytest.mark.slow
def test_what_a_strategy_added_is_merged(lora, tasks, tmp_path):
    folder, fit = lora
    with np.load(folder / fit.predictions) as known:
        expected = known["probabilities"]
    by_run = predicted(tmp_path, folder, tasks / "clothes.npz", fit.name)
    np.testing.assert_allclose(numbers(by_run), expected, atol=1e-6)
    assert by_run == predicted(tmp_path, folder / fit.checkpoint, tasks / "clothes.npz")
    adapted, flat = parameters(folder, fit), load_file(exported(tmp_path, folder, fit.name))
    change = 4 * adapted["hidden_0/lora_a"] @ adapted["hidden_0/lora_b"]
    assert np.abs(change).max() > 0.01 and flat.keys() == {
        f"{s}/{leaf}" for s in ("hidden_0", "head") for leaf in KINDS
    }
    np.testing.assert_allclose(flat["hidden_0/kernel"], adapted["hidden_0/kernel"] + change, atol=1e-6)


KINDS = ("kernel", "bias")


def test_an_export_is_the_fit_to_the_byte(finished, tasks, tmp_path):
    folder, fit = finished[0], finished[1][3]
    file, expected = exported(tmp_path, folder, fit.name), parameters(folder, fit)
    there = load_file(file)
    assert {path: leaf.tobytes() for path, leaf in there.items()} == {p: leaf.tobytes() for p, leaf in expected.items()}
    card = json.loads((tmp_path / "out.safetensors.json").read_text())
    assert card["accuracy"] == fit.test_accuracy and card["classes"] == CLASSES and card["steps"] == fit.steps
    assert predicted(tmp_path, file, tasks / "clothes.npz") == (
        predicted(tmp_path, folder, tasks / "clothes.npz", fit.name)
    )


@pytest.mark.slow
def test_an_export_is_the_same_source_as_its_checkpoint(lora, tasks, tmp_path):
    """Of a fit with merged factors."""
    folder, fit = lora
    file = exported(tmp_path, folder, fit.name)
    flags = {"source": None, "target": str(tasks / "same.npz"), "seeds": (0,), "strategies": ("head_only",)}
    transfer.run(**arguments(tasks, tmp_path / "w", **flags, source_checkpoint=str(file)))
    [probe] = [line for line in results(tmp_path / "w") if line.strategy == "head_only"]
    assert probe.source_accuracy == fit.test_accuracy
    [by_checkpoint, by_file] = (
        checkpoint.flatten(sources.load(sources.settings_of({}, str(place))).params)
        for place in (folder / fit.checkpoint, file)
    )
    assert by_checkpoint.keys() == by_file.keys()
    for path, leaf in by_checkpoint.items():
        assert leaf.tobytes() == by_file[path].tobytes()
        if path.startswith("hidden_0"):
            assert leaf.tobytes() == parameters(tmp_path / "w", probe)[path].tobytes()


def spoilt(tmp_path, finished, what):
    """(checkpoint, fit, images) of a case."""
    folder, result = finished[0], finished[1][0]
    place = tmp_path / "i.npz"
    pixels = np.zeros((2, 6, 6), np.uint8)
    arrays = {
        "other floats": {"images": np.zeros((2, 5))},
        "other axes": {"images": pixels[0]},
        "integers": {"images": pixels.astype(int)},
        "no images": {"train_images": pixels},
        "not finite": {"images": np.full((2, 6, 6, 1), np.nan)},
        "too large": {"images": np.full((2, 6, 6, 1), 3e38)},
        "objects": {"images": np.array([{}], dtype=object)},
        "twice": {"images": pixels, "x_test": pixels},
        "none at all": {"images": pixels[:0]},
    }
    np.savez(place, **arrays.get(what, {"images": pixels}))
    if what in ("corrupt", "an empty folder", "another kind", "animated", "16 bits"):
        place = tmp_path / "pictures"
        place.mkdir()
        if what == "corrupt":
            Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)).save(place / "a.png")
            (place / "b.png").write_bytes((place / "a.png").read_bytes()[:50])
        if what == "animated":
            frames = [Image.new("L", (6, 6), level) for level in (0, 90)]
            frames[0].save(place / "b.png", save_all=True, append_images=frames[1:])
        if what == "16 bits":
            Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(place / "b.png")
        if what == "another kind":
            place = place / "a.txt"
            place.write_text("a")
    if what == "cut":
        place.write_bytes(place.read_bytes()[:-40])
    fit = {"several": None, "no such fit": result.name.replace("scratch", "scrtch")}.get(what, result.name)
    if what == "no images at all":
        place = tmp_path / "nothing"
    return folder / {"several": result.checkpoint, "no checkpoint": "masks"}.get(what, ""), fit, place


BAD = {
    "several": r"scratch-\S+' holds 2 fits, 'scratch-120-seed0-\w+', 'scratch-120-seed1-\w+': choose one with --fit",
    "no such fit": r"--fit=scrtch-\S+ .* holds no such fit; nearest: 'scratch-120-seed",
    "no checkpoint": "is not a tljax checkpoint",
    "no images at all": "does not exist: give a folder",
    "corrupt": "b.png' is no readable picture",
    "animated": "b.png' is an animation of 2 frames: save the frame that is meant",
    "16 bits": r"b.png' has more than 8 bits a channel \(mode I;16\): save it with 8",
    "an empty folder": r"pictures' holds no picture \(.png, .jpg, .jpeg\)",
    "another kind": r"a.txt' holds no picture",
    "other floats": r"images are float32\[5\], the model takes \[6, 6, 1\]",
    "other axes": r"uint8 images are \[n, height, width, channels\], not \[6, 6\]",
    "integers": "images are int64: give uint8 pixels",
    "no images": "i.npz' has no images: name an array images or test_images",
    "not finite": "row 0 holds nan, no finite float32",
    "too large": "image 0 gives logits that are not finite: its numbers are too large, so scale them",
    "objects": r"holds Python objects \(pickle\)",
    "twice": "has both images and x_test",
    "none at all": "is empty",
    "cut": "cannot be read as .npz",
}


def test_a_picture_is_predicted_the_same_rotated_and_as_a_transparent_palette(finished, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6), np.uint8)
    folder, exif = tmp_path / "pictures", Image.Exif()
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "a.png")
    exif[0x0112] = 6  # its first row is the right side of what is seen
    Image.fromarray(np.rot90(pixels)).save(folder / "b.png", exif=exif)
    palette = Image.fromarray(pixels).convert("P")
    palette.save(folder / "c.png", transparency=bytes(range(256)))
    table = predicted(tmp_path, finished[0], folder, finished[1][0].name)
    for column in (name for name in table if name.startswith("p(")):
        assert len(set(table[column])) == 1
    assert table["image"] == ["a.png", "b.png", "c.png"]


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(what, finished, tmp_path):
    place, fit, pictures = spoilt(tmp_path, finished, what)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=BAD[what]) as refused:
        predict.main(line("predict", checkpoint=place, fit=fit, images=pictures, output=tmp_path / "p.csv"))
    assert "\n" not in str(refused.value) and "--source_checkpoint" not in str(refused.value)
    assert snapshot(tmp_path) == before


def test_a_fit_that_diverged_or_says_too_little_is_refused(tasks, finished, tmp_path):
    flags = {"source": None, "strategies": ("scratch",), "seeds": (0,), "learning_rate": 1e30}
    [result] = transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    for place in (tmp_path / "w", tmp_path / "w" / result.checkpoint):
        with pytest.raises(InputError, match=rf"fit '{result.name}' of .* diverged"):
            exported(tmp_path, place)
    shutil.copy(FILE, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors.json").write_text('{"task": "mnist", "shape": [28, 28, 1]}')
    with pytest.raises(InputError, match="must say task, classes, shape"):
        exported(tmp_path, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"--fit=x: .* holds one fit"):
        exported(tmp_path, tmp_path / "w.safetensors", "x")
    with pytest.raises(
        InputError, match=r"is of another model \(--hidden=\[8\] there, \[9\] here\): give --hidden=8$"
    ) as refused:
        options = export.ExportFlags(
            checkpoint=str(finished[0]), fit=finished[1][0].name, output=str(tmp_path / "o.safetensors")
        )
        export.run({"hidden": (9,)}, options)
    assert str(refused.value).startswith("--checkpoint=")
    with pytest.raises(InputError, match="--checkpoint is not given"):
        exported(tmp_path, None)


def test_no_file_is_written_over_and_none_by_halves(finished, tmp_path, monkeypatch):
    name = finished[1][0].name
    for taken in ("out.safetensors", "out.safetensors.json"):
        (tmp_path / taken).write_text("mine")
        with pytest.raises(InputError, match=f"{taken} exists already"):
            exported(tmp_path, finished[0], name)
        assert (tmp_path / taken).read_text() == "mine"
        (tmp_path / taken).unlink()
    for wrong in (None, "", "x.txt", "a\0.csv"):
        with pytest.raises(InputError, match=r"name a new \.csv file"):
            predict.run({}, predict.PredictFlags(checkpoint=str(finished[0]), fit=name, images="i.npz", output=wrong))
    with pytest.raises(InputError, match="there is no folder"):
        exported(tmp_path / "nowhere", finished[0], name)
    replace = directory.replace

    def full(file, text):
        if file.suffix == ".json":
            raise OSError(errno.ENOSPC, "no space")
        replace(file, text)

    monkeypatch.setattr("experiments.runs.directory.replace", full)
    with pytest.raises(OSError, match="no space"):
        exported(tmp_path, finished[0], name)
    assert not list(tmp_path.iterdir())


MODEL = '''"""A small model of one's own."""

import flax.linen as nn

from tljax.models import linen


def model(classes, *, width: int = 8):
    return (
        linen.stage("body", nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(width), nn.relu])),
        linen.stage("head", nn.Dense(classes)),
    )
'''


@pytest.fixture(scope="module")
def of_a_file(tasks, tmp_path_factory):
    """(file of the model, run directory of a source that was trained with it)."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "mine.py").write_text(MODEL)
    flags = command(tasks, folder, steps=5, seeds=(0,), strategies=None, target=None)
    keep = ("--source=", "--steps=", "--batch_size=", "--seeds=", "--data_dir=", "--workdir=")
    pretrain.main(
        ["pretrain", *(flag for flag in flags if flag.startswith(keep)), f"--model={folder / 'mine.py'}:model"]
    )
    return folder / "mine.py", folder / "w"


def transferred(tasks, folder, source, model):
    flags = arguments(tasks, folder / "t", source=None, source_checkpoint=str(source), strategies=("full",), steps=5)
    return transfer.run(**{**flags, "model": f"{model}:model", "seeds": (0,)})


@pytest.mark.slow
def test_a_comment_in_the_file_of_a_model_is_said_and_not_refused(of_a_file, tasks, tmp_path, capsys):
    _, source = of_a_file
    edited = tmp_path / "elsewhere" / "edited.py"
    edited.parent.mkdir()
    edited.write_text("# A comment.\n" + MODEL)
    assert transferred(tasks, tmp_path, source, edited)
    output = capsys.readouterr().out
    assert f"--hidden is 8 here and was 512, --model is {edited}:model here and was " in output
    assert "the paths and shapes of its parameters are the same, so it is used" in output
    place = tmp_path / "p.csv"
    pictures = tasks / "digits.npz"
    predict.main(line("predict", checkpoint=source, images=pictures, output=place, model=f"{edited}:model"))
    assert place.is_file() and "so it is used" in capsys.readouterr().out


def test_another_width_in_the_file_of_a_model_is_refused_with_the_leaf(of_a_file, tasks, tmp_path):
    file, source = of_a_file
    wider = tmp_path / "mine.py"
    wider.write_text(MODEL.replace("int = 8", "int = 9"))
    with pytest.raises(InputError, match=r"another model \(--model=.*mine.py:model there") as refused:
        transferred(tasks, tmp_path, source, wider)
    assert "--code" not in str(refused.value) and "\n" not in str(refused.value)
    before = file.read_text()
    try:
        file.write_text(MODEL.replace("int = 8", "int = 9"))
        with pytest.raises(InputError, match=r"body/.*; the file of --model=.* has changed since: give it as it was"):
            transferred(tasks, tmp_path, source, file)
    finally:
        file.write_text(before)


def test_weights_can_be_got_out_when_the_file_of_the_model_is_gone(of_a_file, tmp_path):
    file, source = of_a_file
    file.rename(tmp_path / "kept.py")
    try:
        flat = load_file(exported(tmp_path, source))
    finally:
        (tmp_path / "kept.py").rename(file)
    [source_fit] = results(source)
    expected = parameters(source, source_fit)
    assert flat.keys() == expected.keys() and all((flat[name] == expected[name]).all() for name in flat)
