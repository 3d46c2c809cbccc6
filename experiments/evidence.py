"""What fits are judged by: their rows, curves, and what they predict for each test example."""

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import outcome, workdir
from tljax.study import study
from tljax.study.study import Cell
from tljax.study.summary import Row, counts, label
from tljax.types import InputError, Task

MOST_WRONG = 16
"""Images shown of a target."""


class Found(NamedTuple):
    """Of fits on one test set."""

    rows: Sequence[Row]
    predicted: Mapping[str, np.ndarray]
    """{fit: the class it takes each test example for, int [items]}."""
    labels: np.ndarray
    curves: Mapping[str, Mapping[str, np.ndarray]] = {}
    images: np.ndarray | None = None
    classes: Sequence[str] = ()
    longer: bool = False
    """Whether they are scratch with the source's steps added to its own."""


def of_run(folder: Path, lines: Sequence[workdir.Line], task: Task) -> Found:
    """Of fits in a run directory."""
    predicted = {line["name"]: read(folder / line["predictions"])[0] for line in lines if counts(line)}
    curves = {line["name"]: curve for line in lines if (curve := outcome.curves(folder, line)) is not None}
    rows = [dict(line) | ({"source": None} if line["strategy"] == "scratch" else {}) for line in lines]
    return Found(rows, predicted, np.asarray(task.test.labels), curves, np.asarray(task.test.images), task.classes)


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(predicted classes, labels), int [items] each, of a .npz of `probabilities` or `predicted`, and `labels`.

    Raises InputError for a file that has them not, or not of one length.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            kept = {name: arrays[name] for name in ("probabilities", "predicted", "labels") if name in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"predictions '{file}' cannot be read ({error}): write it again") from error
    labels = kept.get("labels", np.zeros((0, 0)))
    found = kept["probabilities"].argmax(-1) if kept.get("probabilities", labels).ndim == 2 else kept.get("predicted")
    if found is None or labels.ndim != 1 or found.shape != labels.shape or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"predictions '{file}': give labels [items] and predicted [items] or probabilities [items, classes]"
        )
    return found, labels


Right = Mapping[Cell, Mapping[int, np.ndarray]]
"""{cell: {seed: which test examples the fit gets right}}."""

LONGER = "scratch for "
"""How the names of scratch with more steps begin."""


def right(found: Sequence[Found]) -> dict[Cell, dict[int, np.ndarray]]:
    """{cell: {seed: which test examples the fit gets right}} of the fits that count."""
    table: dict[Cell, dict[int, np.ndarray]] = {}
    for part in found:
        for row in part.rows:
            if row["name"] in part.predicted:
                name = longer_name(row["steps"]) if part.longer else label(row)
                cell = Cell(row.get("source"), row["target"], name, row["train_examples"])
                table.setdefault(cell, {})[row["seed"]] = part.predicted[row["name"]] == part.labels
    return table


def longer_name(steps: int) -> str:
    """The name of scratch with so many steps."""
    return f"{LONGER}{steps:,} steps"


def at_equal_total(table: Right, rows: Sequence[Row], margin: float, level: float) -> list[study.Comparison]:
    """Each strategy against scratch that was given the source's steps too, a budget at a time."""
    steps = {}
    for row in rows:
        if row.get("source_steps") is not None and row["strategy"] != "scratch":
            cell = Cell(row.get("source"), row["target"], label(row), row["train_examples"])
            steps[cell] = row["steps"] + row["source_steps"]
    found = []
    for cell in study.sorted_cells(table):
        if cell in steps:
            name = longer_name(steps[cell])
            own = {where: fits for where, fits in table.items() if where == cell or where.strategy == name}
            one = study.alone(own, [cell], margin, level, base=name, against=study.TOTAL)
            found += [one] if one else []
    return found


def most_wrong(found: Sequence[Found]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """{target: (the test images most often taken for another class, a caption each)}."""
    shown = {}
    for target in dict.fromkeys(part.rows[0]["target"] for part in found if part.rows and part.images is not None):
        parts = [part for part in found if part.rows and part.rows[0]["target"] == target and part.images is not None]
        first, taken = parts[0], np.array([one for part in parts for one in part.predicted.values()])
        if not len(taken) or first.images is None or first.images.ndim != 4:
            continue
        wrong = taken != first.labels
        worst = np.argsort(-wrong.sum(0), kind="stable")[:MOST_WRONG]
        captions = []
        for i in worst:
            other, _ = Counter(taken[wrong[:, i], i].tolist()).most_common(1)[0] if wrong[:, i].any() else (0, 0)
            names = (first.classes[first.labels[i]], first.classes[other])
            captions.append(f"{names[0]} taken for {names[1]}; {100 * wrong[:, i].mean():.0f} % of fits are wrong")
        shown[target] = (first.images[worst], captions)
    return shown


def looked(folder: Path, table: Right, planned: int) -> int:
    """How often results have been looked at, this time counted: another set of fits is another look.

    `folder`/looks.jsonl holds a line a look.
    """
    file = folder / "looks.jsonl"
    now = sorted([*map(str, cell), seed] for cell, fits in table.items() for seed in fits)
    before = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not before or before[-1]["fits"] != now:
        before.append({"fits": now})
        workdir.replace(file, "".join(json.dumps(look) + "\n" for look in before))
    return len(before)
