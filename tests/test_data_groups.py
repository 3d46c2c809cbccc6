"""Which items are alike: read, numbered, kept, and taken along by whatever selects items."""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tljax.data import checks, derive, load
from tljax.types import ArrayExamples, InputError

X = np.random.Philox(key=[5, 0]).random_raw(18 * 2).view(np.uint8).reshape(18, 4, 4)
Y = np.arange(18) % 3
WRITERS = np.array(["ann", "bob", "cy", "ann", "bob", "cy", "ann", "bob", "cy", "ann", "bob", "cy"])
OTHERS = np.array(["di", "di", "di", "bo", "bo", "bo"])


def save(file: Path, **changes: Any) -> str:
    arrays = {"x_train": X[:12], "y_train": Y[:12], "x_test": X[12:], "y_test": Y[12:]} | changes
    np.savez(file, **arrays)
    return str(file)


def test_groups_of_an_npz_are_numbered_over_both_splits_in_sorted_order(tmp_path: Path) -> None:
    name = save(tmp_path / "d.npz", train_groups=WRITERS, test_groups=OTHERS)
    task = load(name, data_dir=tmp_path)
    assert task.train.groups is not None and task.test.groups is not None
    assert task.train.groups.dtype == task.test.groups.dtype == np.int32
    assert task.train.groups.tolist() == [0, 2, 3] * 4 and task.test.groups.tolist() == [4, 4, 4, 1, 1, 1]
    numbers = load(
        save(tmp_path / "n.npz", train_groups=np.uint64(2**63) + np.arange(12, dtype=np.uint64) % 2,
             test_groups=np.array([-7, -7, -7, 8, 8, 8])), data_dir=tmp_path,
    )  # fmt: skip
    assert numbers.train.groups is not None and numbers.test.groups is not None
    assert numbers.train.groups.tolist() == [2, 3] * 6 and numbers.test.groups.tolist() == [0, 0, 0, 1, 1, 1]


def test_without_groups_they_are_unknown_and_the_fingerprint_stays(tmp_path: Path) -> None:
    bare = load(save(tmp_path / "bare.npz"), data_dir=tmp_path)
    assert bare.train.groups is None and bare.test.groups is None
    tested = load(save(tmp_path / "tested.npz", test_groups=OTHERS), data_dir=tmp_path)
    assert tested.train.groups is None and tested.test.groups is not None
    assert bare.fingerprint != tested.fingerprint
    renamed = load(save(tmp_path / "renamed.npz", test_groups=np.array([9, 9, 9, 1, 1, 1])), data_dir=tmp_path)
    assert renamed.fingerprint == tested.fingerprint  # which items are alike, not what the groups are called


def test_the_fingerprint_with_groups_is_the_one_that_is_written_down() -> None:
    train = ArrayExamples(np.array([[1.5]], np.float32), np.array([0], np.int32), np.array([1], np.int32))
    test = ArrayExamples(np.array([[2.0]], np.float32), np.array([1], np.int32), np.array([0], np.int32))
    whole = b"".join(
        b"<f4 [1, 1]\n" + f.tobytes() + b"<i4 [1]\n" + bytes([y, 0, 0, 0])
        for f, y in ((np.float32(1.5), 0), (np.float32(2), 1))
    )
    whole += b'["a", "b"]' + b"\ntrain_groups\n<i4 [1]\n\1\0\0\0" + b"\ntest_groups\n<i4 [1]\n\0\0\0\0"
    assert checks.fingerprint(train, test, ("a", "b")) == hashlib.sha256(whole).hexdigest()
    swapped = checks.fingerprint(replace(train, groups=test.groups), replace(test, groups=train.groups), ("a", "b"))
    assert swapped != checks.fingerprint(train, test, ("a", "b"))
    of_train = checks.fingerprint(replace(train, groups=test.groups), replace(test, groups=None), ("a", "b"))
    assert of_train != checks.fingerprint(replace(train, groups=None), test, ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_groups": OTHERS[:5]}, r"d.npz: test: groups have shape \[5\], labels \[6\]: give one group an item"),
        ({"train_groups": WRITERS[:, None]}, r"train: groups have shape \[12, 1\], labels \[12\]"),
        ({"test_groups": np.arange(6.0)}, r"test: groups are float64: give integers or strings"),
        ({"test_groups": np.arange(6) > 2}, r"test: groups are bool: give integers or strings"),
        ({"train_groups": WRITERS, "test_groups": np.arange(6)}, r"integers in one split and strings in the other"),
    ],
)
def test_bad_groups_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        load(save(tmp_path / "d.npz", **changes), data_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", ["labels=2+0", "group=0+1/2", "take=7", "shuffle_labels=1", "rotate=30", "blur=1", "invert", "noise=0.2",
               "permute=3", "labels=0+2:take=5:rotate=10"],
)  # fmt: skip
def test_whatever_selects_items_takes_their_groups_along(change: str, tmp_path: Path) -> None:
    # A group an item, so that the group says which item it is: it must have the item's own label after any change.
    name = save(tmp_path / "d.npz", train_groups=np.arange(12), test_groups=100 + np.arange(6))
    before, task = load(name, data_dir=tmp_path), load(f"{name}:{change}", data_dir=tmp_path)
    again = load(f"{name}:{change}", data_dir=tmp_path)
    for split, other in ((task.train, again.train), (task.test, again.test)):
        assert split.groups is not None and other.groups is not None and len(split.groups) == len(split.targets)
        np.testing.assert_array_equal(split.groups, other.groups)
        assert len(np.unique(split.groups)) == len(split.groups)
    if change == "labels=2+0":
        chosen = np.flatnonzero(Y[:12] != 1)
        assert task.train.groups is not None
        assert [int(chosen[group]) for group in task.train.groups] == chosen.tolist()
        np.testing.assert_array_equal(task.train.arrays[..., 0], X[chosen])
    if change in ("rotate=30", "shuffle_labels=1", "permute=3"):
        np.testing.assert_array_equal(task.train.groups, before.train.groups)


def test_selected_rows_keep_their_groups() -> None:
    split = ArrayExamples(X, Y, np.arange(18))
    rows = np.array([4, 1, 17])
    for chosen, expected in ((rows, rows), (Y == 2, np.flatnonzero(Y == 2)), (slice(0), rows[:0])):
        part = derive.select(split, chosen)
        assert part.groups is not None
        np.testing.assert_array_equal(part.groups, expected)
        np.testing.assert_array_equal(part.arrays, X[expected])
        np.testing.assert_array_equal(part.targets, Y[expected])
    assert derive.select(replace(split, groups=None), rows).groups is None


# A folder and a file that says which pictures are in which split.


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """DIR/CLASS/0.png .. 4.png of two classes, each picture another."""
    for row, (label, number) in enumerate((label, number) for label in ("dog", "cat") for number in range(5)):
        (tmp_path / "pets" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(X[row]).save(tmp_path / "pets" / label / f"{number}.png")
    return tmp_path / "pets"


ROWS = [
    ("dog/3.png", "train", "rex"), ("cat/1.png", "test", "tom"), ("cat/0.png", "train", "tom"),
    ("dog/0.png", "test", "fido"), ("dog/1.png", "train", "rex"),
    ("cat/2.png", "test", "kit"), ("cat/4.png", "train", "kit"),
]  # fmt: skip


def write(file: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("file", "split", "group")) -> Path:
    with file.open("w", newline="", encoding="utf-8-sig") as stream:  # as Excel saves it
        csv.writer(stream).writerows([columns, *rows])
    return file


def test_a_file_says_which_pictures_are_in_which_split_and_group(pictures: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "splits.csv", ROWS)
    task = load(f"folder:{pictures}:splits={table}", data_dir=tmp_path)
    assert task.classes == ("cat", "dog")
    np.testing.assert_array_equal(task.train.arrays[..., 0], X[[5, 9, 1, 3]])  # by class, then by file
    np.testing.assert_array_equal(task.test.arrays[..., 0], X[[6, 7, 0]])
    assert task.train.targets.tolist() == [0, 0, 1, 1] and task.test.targets.tolist() == [0, 0, 1]
    assert task.train.groups is not None and task.test.groups is not None
    assert task.train.groups.tolist() == [3, 1, 2, 2] and task.test.groups.tolist() == [3, 1, 0]
    shared = "2 of 3 groups of the test examples are in the training set too"
    assert task.note == f"4 training and 3 test pictures as splits.csv says, 3 of 10 in neither; {shared}"


@pytest.mark.parametrize("column", ["target", "group"])
def test_targets_and_groups_that_are_no_utf8_are_refused(pictures: Path, tmp_path: Path, column: str) -> None:
    table = write(tmp_path / "splits.csv", ROWS, ("file", "split", column))
    table.write_bytes(table.read_bytes().replace(b"kit", b"k\xe9t"))
    words = rf"splits.csv', line 7: {column} 'k\\udce9t' is no UTF-8, perhaps Latin-1: save it as UTF-8$"
    with pytest.raises(InputError, match=words):
        load(f"folder:{pictures}:splits={table}", data_dir=tmp_path)


def test_the_file_is_read_again_when_it_changes_and_may_be_bare(pictures: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "splits.csv", ROWS)
    first = load(f"folder:{pictures}:splits={table}:labels=dog+cat", data_dir=tmp_path)
    assert first.classes == ("dog", "cat") and first.train.groups is not None
    write(table, [row[:2] for row in ROWS], ("file", "split"))
    bare = load(f"folder:{pictures}:splits={table}", data_dir=tmp_path)
    assert bare.train.groups is None and bare.test.groups is None


def test_the_splits_of_the_folders_are_kept_where_the_file_has_groups_alone(tmp_path: Path) -> None:
    rows = []
    for row in range(8):
        path = f"{('train', 'test')[row % 2]}/{('cat', 'dog')[row // 4]}/{row}.png"
        (tmp_path / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(X[row]).save(tmp_path / "pets" / path)
        rows.append((path, str(row)))
    table = write(tmp_path / "groups.csv", rows, ("file", "group"))
    plain = load(f"folder:{tmp_path}/pets", data_dir=tmp_path)
    task = load(f"folder:{tmp_path}/pets:splits={table}", data_dir=tmp_path)
    for split, other in ((plain.train, task.train), (plain.test, task.test)):
        np.testing.assert_array_equal(split.arrays, other.arrays)
        np.testing.assert_array_equal(split.targets, other.targets)
    assert task.train.groups is not None and task.train.groups.tolist() == [0, 2, 4, 6]
    assert task.note == plain.note == ""


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([*ROWS, ("dog/3.png", "test", "rex")], None, r"splits.csv', line 9: '.*dog/3.png' is in line 2 too: keep one"),
        ([*ROWS, ("dog/9.png", "test", "rex")], None, r"line 9: '.*dog/9.png' is no .png, .jpg, .jpeg file that is"),
        ([*ROWS, ("dog/4.png", "val", "rex")], None, r"line 9: split is 'val': write train or test, or leave out"),
        ([*ROWS, ("dog/4.png", "", "rex")], None, r"line 9: split is ''"),
        ([*ROWS, ("dog/4.png", "test", "")], None, r"line 9: group is empty"),
        ([*ROWS, ("dog/4.png", "test")], None, r"line 9 has 2 cells, the first line 3"),
        ([*ROWS, ("../pets/dog/4.png", "test", "a")], None, r"line 9: file '../pets/dog/4.png' is no CLASS/x.png"),
        ([*ROWS, ("/pets/4.png", "test", "a")], None, r"line 9: file '/pets/4.png' is no CLASS/x.png"),
        ([*ROWS, ("4.png", "test", "a")], None, r"line 9: file '4.png' is no CLASS/x.png"),
        ([*ROWS, ("train/4.png", "test", "a")], None, r"line 9: file 'train/4.png' is no CLASS/x.png"),
        ([row[::2] for row in ROWS], ("file", "group"), r"line 2: split is 'dog': add the column split"),
        ([(*row, "dog") for row in ROWS], ("file", "split", "group", "target"),
         r"line 3: target is 'dog', the folder says 'cat'"),
        (ROWS, ("picture", "split", "group"), r"has the columns picture, split, group: it needs file, split"),
        (ROWS, ("file", "split", "split"), r"it needs file, split and, if wanted, group and target, each once"),
        (ROWS[:1] + ROWS[2:3] + ROWS[4:5], None, r"puts no picture of class 'cat' into test, but into train"),
        ([], None, r"lists no picture"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(rows: list, columns: Any, words: str, pictures: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "splits.csv", rows, columns or ("file", "split", "group"))
    with pytest.raises(InputError, match=words) as error:
        load(f"folder:{pictures}:splits={table}", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_csv_is_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.csv' does not exist: give its path from the working directory"):
        load(f"folder:{pictures}:splits={tmp_path}/none.csv", data_dir=tmp_path)
    write(pictures / "in.csv", ROWS)
    with pytest.raises(InputError, match=rf"in.csv' does not exist: write splits={pictures}/in.csv"):
        load(f"folder:{pictures}:splits=in.csv", data_dir=tmp_path)
    for text in ("file;split\ndog/1.png;train\n", "", "\0\0"):
        (tmp_path / "odd.csv").write_text(text)
        with pytest.raises(InputError, match=r"odd.csv' (has the columns|cannot be read|has zero bytes)"):
            load(f"folder:{pictures}:splits={tmp_path}/odd.csv", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"has no option 'split'; nearest: 'splits=FILE.csv'"):
        load(f"folder:{pictures}:split={tmp_path}/odd.csv", data_dir=tmp_path)


# A column of targets.


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """DIR/0.png .. 7.png and DIR/deep/er/8.png."""
    for row in range(9):
        file = tmp_path / "plain" / ("deep/er" if row == 8 else ".") / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(X[row]).save(file)
    return tmp_path / "plain"


def with_targets(folder: Path, cells: list[str]) -> Any:
    """The task of DIR's pictures with these targets: 0 to 4 train, the others test; pictures 7 and 8 stand first."""
    files = [*(f"{row}.png" for row in range(8)), "deep/er/8.png"]
    rows = [(files[row], "train" if row < 5 else "test", cells[row]) for row in (8, 7, *range(7))]
    table = write(folder.parent / "targets.csv", rows, ("file", "split", "target"))
    return load(f"folder:{folder}:splits={table}", data_dir=folder.parent / "kept")


def test_texts_are_classes_of_pictures_anywhere(plain: Path) -> None:
    task = with_targets(plain, ["b", "a", "b", "2", "a", "2", "a", "b", "a"])
    assert task.kind == "classes" and task.classes == ("2", "a", "b")
    np.testing.assert_array_equal(task.train.arrays[..., 0], X[[3, 1, 4, 0, 2]])  # by class, then by file
    assert task.train.targets.tolist() == [0, 1, 1, 2, 2] and task.test.targets.tolist() == [0, 1, 1, 2]


def test_texts_with_bars_are_labels(plain: Path) -> None:
    task = with_targets(plain, ["cat|dog", "cat", "", "dog | ape", "ape|", "cat", "ape", "dog", "cat|ape|dog"])
    assert task.kind == "labels" and task.classes == ("ape", "cat", "dog")
    np.testing.assert_array_equal(task.train.arrays[..., 0], X[:5])  # by file
    assert task.train.targets.astype(int).tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert task.test.targets[3].tolist() == [True, True, True]
    assert with_targets(plain, ["1|2", "1", "2", "2|3", "3", "1", "2", "3", "1|3"]).classes == ("1", "2", "3")


def test_numbers_are_values(plain: Path) -> None:
    cells = ["1.5", "-2", "3e2", "+4", ".5", "6", "7", "8", "9.25"]
    task = with_targets(plain, cells)
    assert task.kind == "values" and task.classes == () and task.outputs == 1
    np.testing.assert_array_equal(task.train.targets, np.array([[1.5], [-2], [300], [4], [0.5]], np.float32))
    np.testing.assert_array_equal(task.test.targets[:, 0], np.float32([6, 7, 8, 9.25]))
    pairs = with_targets(plain, [f"{cell} | {row}" for row, cell in enumerate(cells)])
    assert pairs.kind == "values" and pairs.outputs == 2
    np.testing.assert_array_equal(pairs.train.targets[:, 1], np.arange(5))


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (
            list("123123123"),
            r"targets are whole numbers, which may be classes or values: write a decimal point.*\(3.0\)",
        ),
        (["1.5", "2", "x", *"456789"], r"line 6: target is 'x', most are numbers: write a number"),
        (["1.5", "2", "", *"456789"], r"line 6: target is empty: write it, or leave out the line"),
        (["a", "b", "", *"abbaab"], r"line 6: target is empty"),
        (["1.5", "nan", *"3456789"], r"line 5: target is 'nan', no finite float32: leave out the line"),
        (["1.5", "1e39", *"3456789"], r"line 5: target is '1e39', no finite float32"),
        (["a|a", "b", *"abbaabb"], r"line 4: target names a label twice"),
        (["1.5|2", "2|1", "1|1", "4", "5|5", "6|6", "7|7", "8|8", "9|9"], r"line 7: target has 1 values, others 2"),
        ([*"abab", "c", *"abba"], r"puts no picture of class 'c' into test"),
        (["a|", *"abbabbab"], None),
    ],
)
def test_targets_that_cannot_be_meant_are_named(cells: list[str], words: str | None, plain: Path) -> None:
    if words is None:
        assert with_targets(plain, cells).kind == "labels"
        return
    with pytest.raises(InputError, match=words) as error:
        with_targets(plain, cells)
    assert "\n" not in str(error.value)


def test_a_target_may_repeat_the_folder_or_have_nothing_to_do_with_it(pictures: Path, tmp_path: Path) -> None:
    for names, classes in (
        ({"dog": "dog", "cat": "cat"}, ("cat", "dog")),
        ({"dog": "ill", "cat": "well"}, ("ill", "well")),
    ):
        rows = [(*row, names[row[0][:3]]) for row in ROWS]
        table = write(tmp_path / "t.csv", rows, ("file", "split", "group", "target"))
        task = load(f"folder:{pictures}:splits={table}", data_dir=tmp_path)
        assert task.classes == classes and task.train.groups is not None
    rows = [(row[0], str(i % 2 + 0.5)) for i, row in enumerate(ROWS)]
    with pytest.raises(InputError, match="line 2: split is 'dog': add the column split"):
        load(f"folder:{pictures}:splits={write(tmp_path / 't.csv', rows, ('file', 'target'))}", data_dir=tmp_path)
