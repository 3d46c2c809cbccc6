"""Random-access sources of anybody, Grain's among them: read whole where they are small, else by row."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax import data
from tljax.data import by_row, checks, draw
from tljax.types import InputError, RowExamples, Task

MINE = '''
import grain
import numpy as np

X = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (600, 4, 6, 3), np.uint8)
READ = []


class Source(grain.sources.RandomAccessDataSource):
    """One of Grain's protocol."""

    def __init__(self, n, first, item):
        self.n, self.first, self.item = n, first, item

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        READ.append(int(i))
        return self.item(self.first + i)


def of(item, split, n=500, **attributes):
    source = Source(n, 0, item) if split == "train" else Source(100, n, item)
    for name, value in attributes.items():
        setattr(source, name, value[: len(source)] if name in ("targets", "groups") else value)
    return source


def classes(split, *, count=3): return of(lambda i: (X[i], i % count, i // 7), split)
def named(split): return of(lambda i: (X[i], i % 2), split, class_names=("even", "odd"))
def values(split): return of(lambda i: {"inputs": X[i].astype(np.float64), "targets": X[i].sum()}, split)
def several(split): return of(lambda i: ({"x": X[i], "p": PIXELS[i], "k": i % 5}, [i % 2 == 0, i % 3 == 0]), split)
def tokens(split): return of(lambda i: np.arange(i, i + 6) % 11, split)
def pairs(split): return of(lambda i: (np.arange(i, i + 6) % 11, (np.arange(i, i + 6) + 1) % 11), split)
def known(split): return of(lambda i: (X[i], -1), split, targets=np.arange(600) % 4, groups=np.arange(600))
def chain(split):
    numbers = grain.MapDataset.range(500 if split == "train" else 100)
    return numbers.map(lambda i: (X[i + 500 * (split == "test")], i % 2))

both = {"train": [(x, i % 2) for i, x in enumerate(X[:40])], "test": [(x, i % 2) for i, x in enumerate(X[40:60])]}

def missing(split): return of(lambda i: (X[i], i % 2 if i != 7 else None), split)
def uneven(split): return of(lambda i: (X[i][: 2 if i == 9 else 3], i % 2), split)
def late(split): return of(lambda i: (X[i][: 2 if i >= 300 else 3], i % 2), split)
def most(split): return of(lambda i: (X[i][: 2 if i else 3], i % 2), split)
def nan(split): return of(lambda i: (X[i] * (np.nan if i == 300 else 1), i % 2), split)
def keys(split): return of(lambda i: {"image": PIXELS[i], "label": 0}, split)
def text(split): return of(lambda i: "abc", split)
def alone(split): return of(lambda i: X[i], split)
def fails(split): return of(lambda i: (X[i], {}["no"]), split)
def raises(split): raise ValueError("no disk")
def nothing(split): return None
def empty(split): return of(lambda i: (X[i], 0), split, n=0)
def mixed(split): return of(lambda i: (X[i], i % 2 if i < 9 else 0.5), split)
def ragged(split): return of(lambda i: (X[i], [0.5] * (1 + (i == 4))), split)
def short(split): return of(lambda i: (X[i], 0), split, targets=np.arange(9))
def unsplit(): return of(lambda i: (X[i], 0), "train")
number = 3
half = {"train": both["train"]}
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of sources."""
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def task(file: Path, name: str, **options: Any) -> Task:
    """The task of an attribute."""
    return data.load(f"{file}:{name}", data_dir=file.parent / "kept", **options)


X = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (600, 4, 6, 3), np.uint8)


def test_a_small_source_is_read_whole(mine: Path) -> None:
    whole = task(mine, "classes:count=4")
    assert whole.kind == "classes" and whole.classes == ("0", "1", "2", "3") and len(whole.test) == 100
    np.testing.assert_array_equal(whole.train.arrays, X[:500])
    np.testing.assert_array_equal(whole.test.targets, np.arange(500, 600) % 4)
    np.testing.assert_array_equal(whole.train.groups, np.arange(500) // 7)
    assert whole.fingerprint == checks.fingerprint(whole.train, whole.test, whole.classes)
    assert task(mine, "named").classes == ("even", "odd")
    values = task(mine, "values")
    assert values.kind == "values"
    np.testing.assert_array_equal(values.train.targets[:, 0], [x.sum() for x in X[:500]])
    several = task(mine, "several")
    assert several.kind == "labels" and several.outputs == 2
    np.testing.assert_array_equal(several.test.arrays["p"], PIXELS[500:])
    assert several.train.arrays["k"].tolist() == (np.arange(500) % 5).tolist()
    assert task(mine, "several", image_shape=(8, 8, 1)).train.arrays["p"].shape == (500, 8, 8, 1)
    texts = task(mine, "tokens")
    assert texts.kind == "tokens" and texts.outputs == 11 and texts.train.targets[0].tolist() == [1, 2, 3, 4, 5, -1]
    np.testing.assert_array_equal(task(mine, "chain").train.arrays, X[:500])
    np.testing.assert_array_equal(task(mine, "both").test.arrays, X[40:60])
    assert len(task(mine, "classes:take=50").train) == 50


def test_a_large_source_is_read_by_row_and_no_item_for_what_is_known(mine: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(by_row, "WHOLE", 100)
    lines: list[str] = []
    rows = task(mine, "classes", say=lines.append)
    assert isinstance(rows.train, RowExamples) and rows.train.arrays is None and rows.kind == "classes"
    assert "fingerprint is sampled (1,000 rows" in rows.note and any("by row" in line for line in lines)
    np.testing.assert_array_equal(rows.train.inputs(np.array([7, 3])), X[[7, 3]])
    assert rows.train.inputs(np.array([], int)).shape == (0, 3)
    np.testing.assert_array_equal(rows.train.targets, np.arange(500) % 3)
    np.testing.assert_array_equal(rows.test.groups, np.arange(500, 600) // 7)
    assert rows.train.spec.shape == (3,) and rows.train.spec.dtype == np.float32
    known = task(mine, "known")
    np.testing.assert_array_equal(known.train.targets, np.arange(500) % 4)
    read = known.train.read.__self__.source.item.__globals__["READ"]  # type: ignore[attr-defined]
    sampled = np.unique(draw.words(0, 7, 0, 1, 1000)[0] % 500)
    looked_at = 2 * 100  # by findings
    assert len(read) <= 2 + 2 + len(sampled) + 100 + looked_at and known.train.groups is not None
    several = task(mine, "several")
    assert several.kind == "labels" and several.train.inputs(np.arange(2))["p"].shape == (2, 4, 6, 3)
    pairs = task(mine, "pairs")
    assert pairs.kind == "tokens" and pairs.outputs == 11
    with pytest.raises(InputError, match="its items are inputs alone: give"):
        task(mine, "tokens")
    some = task(mine, "classes:labels=0+2:take=50:shuffle_labels=1")
    plain = task(mine, "classes:labels=0+2:take=50")
    rows_of = np.flatnonzero(np.arange(500) % 3 != 1)
    chosen = rows_of[draw.label_budget(0, np.where(rows_of % 3, 1, 0), 50)]
    np.testing.assert_array_equal(some.train.inputs(np.arange(50)), X[chosen])
    np.testing.assert_array_equal(plain.train.targets, np.where(chosen % 3, 1, 0))
    assert sorted(some.train.targets) == sorted(plain.train.targets) and some.fingerprint != plain.fingerprint
    with pytest.raises(InputError, match="inputs that are read by row cannot be changed"):
        task(mine, "several:permute=1")
    nan = task(mine, "named")
    broken = task(mine, "uneven") if 9 not in sampled else None
    if broken:
        with pytest.raises(InputError, match=r"train: item 9 has inputs float32\[2\], item 0 float32\[3\]"):
            broken.train.inputs(np.array([9, 8]))
        with pytest.raises(InputError, match=r"train: item 9 has inputs float32\[2\], item 0 float32\[3\]"):
            broken.train.inputs(np.array([9]))
    assert nan.fingerprint != rows.fingerprint


def test_the_sampled_fingerprint_is_the_one_that_is_written_down(mine: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(by_row, "WHOLE", 0)
    rows = task(mine, "classes:count=2")
    whole = b""
    for first, n in ((0, 500), (500, 100)):
        chosen = sorted({int(word) % n for word in draw.words(0, 7, 0, 1, 1000)[0]})
        inputs, targets = X[first:][chosen], (np.arange(first, first + n) % 2).astype("<i4")
        whole += f"\nsampled {n}\n<f4 {json.dumps(inputs.shape)}\n".encode() + inputs.tobytes()
        whole += f"<i4 [{n}]\n".encode() + targets.tobytes()
    whole += b'["0", "1"]'
    groups = [(np.arange(500) // 7).astype("<i4"), (np.arange(500, 600) // 7).astype("<i4")]
    for word, part in zip(("train", "test"), groups, strict=True):
        whole += f"\n{word}_groups\n<i4 [{len(part)}]\n".encode() + part.tobytes()
    assert rows.fingerprint == hashlib.sha256(whole + b"\nmine.py:classes:count=2").hexdigest()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", r"train: item 7 has no targets, others have"),
        ("uneven", r"train: item 9 has inputs float32\[2\], item 0 float32\[3\]: give all one shape"),
        ("late", r"train: item 300 has inputs float32\[2\], item 0 float32\[3\]: give all one shape"),
        ("most", r"train: item 1 has inputs float32\[2\], item 0 float32\[3\]: give all one shape"),
        ("nan", r"train: item 300: row 0 holds nan, no finite float32"),
        ("keys", r"item 0 is a dict of 'image', 'label': give 'inputs', 'targets'"),
        ("text", r"item 0 is 'abc': give \(inputs, targets\)"),
        ("alone", r"items are inputs alone, and no tokens \[length\]: give \(inputs, targets\)"),
        ("fails", r"train: item 0 fails: KeyError: 'no' \(.*mine.py:\d+\)"),
        ("raises", r"data set '.*raises' fails: ValueError: no disk \(.*mine.py:\d+\)"),
        ("nothing", r"train is None: give a source with a length and items by number"),
        ("empty", r"train: is empty: give at least one item"),
        ("mixed", r"targets are of several kinds"),
        ("ragged", r"train: targets of item 4 is \[2\], of item 0 \[1\]"),
        ("unsplit", r"'unsplit' takes no split: write def unsplit\(split"),
        ("number", r"'number' is 3: give a function of the split, or a dict of 'train' and 'test'"),
        ("half", r"'half' is a dict: let it have 'train' and 'test'"),
        ("clases", r"has no attribute 'clases'; nearest: 'classes'"),
        ("classes:cuont=3", r"has no option 'cuont'"),
        ("classes:more", r"names no attribute of|has no option"),
    ],
)
def test_what_is_no_source_is_named_in_a_line(name: str, words: str, mine: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        task(mine, name)
    assert "\n" not in str(error.value)


def test_a_length_that_is_not_that_of_the_targets_is_refused(mine: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(by_row, "WHOLE", 0)
    with pytest.raises(InputError, match=re.escape("train: targets are 9, items 500: give one an item")):
        task(mine, "short")


def test_a_name_with_a_dot_is_an_attribute_only_with_one_after_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data set 'no.such' cannot be imported"):
        data.load("no.such:thing", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"mine.py' does not exist"):
        data.load(f"{tmp_path}/mine.py:thing", data_dir=tmp_path)
    with pytest.raises(InputError, match="names no attribute of"):
        (tmp_path / "mine.py").write_text(MINE)
        data.load(f"{tmp_path}/mine.py", data_dir=tmp_path)
