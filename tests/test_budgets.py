"""What a label budget cannot hold is said: classes with too few examples, and those that validate nothing."""

import numpy as np
import pytest
from test_programs import arguments

from experiments import transfer
from experiments.runs import budgets
from tljax.data import draw, load
from tljax.types import ArrayExamples, Task


def task(*counts: int) -> Task:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    split = ArrayExamples(np.zeros((len(labels), 1), np.float32), labels)
    return Task("t", split, split, tuple("abcdefgh"[: len(counts)]), "")


def test_short_classes_are_named_with_what_they_give() -> None:
    short = "class 'c' gives 2, class 'd' gives 1, all that there are, so the other classes give more"
    assert budgets.notes(["5/class"], task(40, 17, 2, 1)) == [f"5/class training examples: {short}; 20 in all"]
    assert budgets.notes(["20:seeds=3"], task(40, 17, 2, 1)) == [f"20 training examples: {short}; 20 in all"]
    assert budgets.notes(["all", "1/class", "2/class:seeds=2", "11"], task(40, 17, 2, 2)) == []
    assert budgets.notes(["5/class", "1000"], task(5, 5, 5)) == []


@pytest.mark.parametrize("counts", [(40, 17, 2, 1), (3, 3, 3), (1, 1, 9), (7, 0, 2, 5), (4, 4, 1, 20, 2)])
@pytest.mark.parametrize("validation", [0.2, 0.25, 0.29, 0.5])
def test_classes_that_are_named_are_those_that_hold_nothing_out(counts: tuple[int, ...], validation: float) -> None:
    counted = task(*counts)
    labels = counted.train.targets
    for amount in range(sum(count > 0 for count in counts), len(labels) + 1):
        held = np.zeros(len(counts), bool)
        for seed in range(12):
            chosen = draw.label_budget(seed, labels, amount)
            share = np.bincount(labels[chosen], minlength=len(counts))
            held |= share * validation >= 1
        lines = budgets.notes([str(amount)], counted, validation)
        named = {
            name for name in counted.classes for line in lines if "validation" in line and f"class '{name}'" in line
        }
        never = {name for name, some, count in zip(counted.classes, held, counts, strict=True) if count and not some}
        # Each class that no draw holds out is named; one that some draws do may be, where the remainder is drawn.
        assert never <= named
        classes, least = sum(count > 0 for count in counts), min(count for count in counts if count)
        exact = amount % classes == 0 and amount // classes <= least
        assert named == never or not exact


def test_the_table_and_the_report_say_it(tasks, tmp_path, capsys, no_pictures) -> None:
    clothes = load(str(tasks / "clothes.npz"))
    keep = np.r_[np.flatnonzero(clothes.train.targets == 0), np.flatnonzero(clothes.train.targets > 0)[:9]]
    x, y = np.asarray(clothes.train.arrays)[keep], np.asarray(clothes.train.targets)[keep]
    file = tmp_path / "few.npz"
    np.savez(file, x_train=x, y_train=y, x_test=x[:12], y_test=y[:12], class_names=np.array(clothes.classes))
    flags = {"target": str(file), "train_examples": ("8/class",), "seeds": (0,), "strategies": ("full",)}
    workdir = tmp_path / "w"
    transfer.run(**arguments(tasks, workdir, **flags))
    shown, report = capsys.readouterr().out, (workdir / "report.html").read_text()
    counts = np.bincount(y)
    short = ", ".join(f"class '{clothes.classes[label]}' gives {counts[label]}" for label in (1, 2))
    for words in (f"8/class training examples: {short}", "12 of 12 test examples are in the training set too"):
        assert words in shown and words.replace("'", "&#39;") in report
