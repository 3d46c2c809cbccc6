"""The glyphs, Omniglot characters and digits that come with tljax: what they hold, their splits and their groups."""

import gzip
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tljax import data
from tljax.data import shipped
from tljax.types import InputError


def items(task):
    """Each item of both splits as (pixels, class, group), sorted."""
    both = [(*row,) for part in (task.train, task.test) for row in zip(part.arrays, part.targets, part.groups)]  # noqa: B905
    return sorted((image.tobytes(), int(label), int(group)) for image, label, group in both)


@pytest.mark.parametrize(
    "name, train, test, groups, classes",
    [
        ("glyphs_capitals", 10_348, 3_562, (87, 31), 26),
        ("glyphs_capitals_few", 4_004, 9_906, (30, 88), 26),
        ("glyphs_digits", 3_900, 1_340, (86, 31), 10),
        ("glyphs_digits_few", 1_400, 3_840, (29, 88), 10),
        ("omniglot_five", 2_250, 750, (15, 5), 150),
        ("omniglot_five_few", 750, 2_250, (5, 15), 150),
        ("omniglot_latin", 390, 130, (15, 5), 26),
        ("omniglot_latin_few", 130, 390, (5, 15), 26),
    ],
)
def test_a_data_set_with_groups_has_no_group_in_both_splits(name, train, test, groups, classes):
    task = data.load(name)
    assert task.name == name and len(task.classes) == classes
    assert (task.train.arrays.shape, task.test.arrays.shape) == ((train, 28, 28, 1), (test, 28, 28, 1))
    in_train, in_test = set(task.train.groups.tolist()), set(task.test.groups.tolist())
    assert (len(in_train), len(in_test)) == groups and not in_train & in_test
    for part in (task.train, task.test):
        assert set(part.targets.tolist()) == set(range(classes))


@pytest.mark.parametrize("name", ["glyphs_digits", "omniglot_latin"])
def test_few_splits_the_same_items_otherwise(name):
    few, usual = data.load(f"{name}_few"), data.load(name)
    assert items(few) == items(usual) and few.fingerprint != usual.fingerprint


def test_digits_are_of_families_whose_capitals_no_source_saw():
    """Groups are numbered anew in each task, so the numbers of the files are compared."""
    trained, tested = (
        set(groups[split == is_tested].tolist())
        for name, is_tested in (("glyphs_capitals", 0), ("glyphs_digits", 1))
        for split, groups in [(array(name, "splits-idx2-ubyte")[0], array(name, "groups-idx1-ubyte"))]
    )
    assert not trained & tested and len(tested) == 31


def array(name, file):
    """The array of an IDX file with fewer than 2**16 numbers a row, read by hand."""
    from importlib.resources import files

    raw = gzip.decompress((files("tljax.data") / "shipped" / name / f"{file}.gz").read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def test_the_digits_are_those_of_scikit_learn_in_its_order():
    task, theirs = data.load("sklearn_digits"), load_digits()
    pixels = np.concatenate([task.train.arrays, task.test.arrays])[..., 0]
    assert np.abs(pixels / 255 * 16 - theirs.images).max() < 0.04
    assert np.concatenate([task.train.targets, task.test.targets]).tolist() == theirs.target.tolist()
    assert (len(task.train), len(task.test), task.test.groups) == (898, 899, None)


def test_a_target_comes_in_the_shape_that_is_asked_for_and_is_changed_by_its_name():
    task = data.load("sklearn_digits:labels=0-4", image_shape=(28, 28, 1))
    assert task.train.arrays.shape[1:] == (28, 28, 1) and task.classes == tuple("01234")
    derived = data.load("glyphs_digits:labels=1+7")
    assert len(derived.test.groups) == len(derived.test) == 268


def test_a_name_that_is_nearly_one_is_told_and_options_are_refused():
    with pytest.raises(InputError, match="nearest: 'glyphs_digits'"):
        data.load("glyph_digits")
    with pytest.raises(InputError, match="has no option 'few'"):
        data.load("glyphs_digits:few")


def test_files_that_were_altered_are_refused(monkeypatch, tmp_path):
    root = shipped.importlib.resources.files("tljax.data")
    shutil.copytree(root / "shipped" / "omniglot_latin", tmp_path / "shipped" / "omniglot_latin")
    labels = tmp_path / "shipped" / "omniglot_latin" / "labels-idx1-ubyte.gz"
    contents = bytearray(gzip.decompress(labels.read_bytes()))
    contents[-1] = 0
    labels.write_bytes(gzip.compress(bytes(contents)))
    monkeypatch.setattr(shipped.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(InputError, match="altered contents"):
        shipped.load("omniglot_latin")


@pytest.mark.complete
def test_the_script_writes_what_is_shipped(complete_data, tmp_path, monkeypatch):
    from tljax.data.shipped import gather

    if not (complete_data / "real").is_dir():
        pytest.skip("the glyphs and Omniglot characters are not there")
    monkeypatch.setattr("sys.argv", ["gather", f"--real={complete_data / 'real'}", f"--out={tmp_path}"])
    gather.main()
    root = shipped.importlib.resources.files("tljax.data") / "shipped"
    for file in tmp_path.rglob("*.gz"):
        assert gzip.decompress(file.read_bytes()) == gzip.decompress((root / file.relative_to(tmp_path)).read_bytes())
    assert len(list(tmp_path.rglob("*.gz"))) == 19


@pytest.mark.slow
def test_groups_reach_the_verdicts_and_fewer_than_eight_get_no_word(tmp_path, capsys, no_pictures):
    """Of Latin 5 drawers are tested, under its other split 15; the report reads the groups from the run."""
    from experiments import compare, report

    flags = ["--target=omniglot_latin,omniglot_latin_few", "--source=omniglot_latin:take=60", "--image_shape=7,7,1"]
    flags += ["--strategies=scratch,full", "--train_examples=26", "--hidden=4", "--steps=3", "--seeds=0,1"]
    compare.main(["compare", *flags, "--longer_scratch=false", f"--workdir={tmp_path / 'run'}"])
    of_run = capsys.readouterr().out
    report.main(["report", f"--runs={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"])
    for printed in (of_run, capsys.readouterr().out):
        for note in ("omniglot_latin: 130 test items in 5 groups", "omniglot_latin_few: 390 test items in 15 groups"):
            assert f"\n  {note}\n" in printed
        assert "(5 groups of test items are fewer than 8: no word is given)" in printed
        words = {row.split()[2]: row for row in printed.splitlines() if row.split()[:1] == ["full"]}
        assert "undecided" in words["omniglot_latin_few"] or "equivalent" in words["omniglot_latin_few"]
        assert " - " in words["omniglot_latin"] and "undecided" not in words["omniglot_latin"]
