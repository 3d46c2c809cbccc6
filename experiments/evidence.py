"""What fits are judged by: their rows, curves, and what they predict for each test example."""

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import outcome, workdir
from tljax.study import study
from tljax.study.study import Cell, Right
from tljax.study.summary import Row, counts, label, require_one_recipe
from tljax.types import InputError, Task

MOST_WRONG = 16
"""Images shown of a target."""


class Found(NamedTuple):
    """Of fits on one test set."""

    rows: Sequence[Row]
    predicted: Mapping[str, np.ndarray]
    """{fit: the class it takes each test example for, int [items]}."""
    labels: Mapping[str, np.ndarray]
    """{target: the classes of its test examples, int [items]}."""
    curves: Mapping[str, Mapping[str, np.ndarray]] = {}
    images: np.ndarray | None = None
    classes: Sequence[str] = ()
    longer: bool = False
    """Whether they are scratch with the source's steps added to its own."""


def of_run(folder: Path, lines: Sequence[workdir.Line], task: Task) -> Found:
    """Of fits in a run directory."""
    return _kept(folder, lines)._replace(images=np.asarray(task.test.images), classes=task.classes)


def _kept(folder: Path, rows: Sequence[Row]) -> Found:
    """What a run directory keeps of these fits."""
    both = {row["name"]: read(folder / row["predictions"]) for row in rows if counts(row)}
    labels = {row["target"]: both[row["name"]][1] for row in rows if row["name"] in both}
    curves = {row["name"]: curve for row in rows if (curve := outcome.curves(folder, row)) is not None}
    bare = [{**row, "source": None} if row["strategy"] == "scratch" else row for row in rows]
    return Found(bare, {name: predicted for name, (predicted, _) in both.items()}, labels, curves)


def keep(folder: Path, found: Sequence[Found], notes: Sequence[str]) -> None:
    """Write what else is known of the fits of a study to `folder`/study.json, for reports of several."""
    parts = [{"longer": part.longer, "rows": part.rows} for part in found]
    workdir.replace(folder / "study.json", json.dumps({"notes": list(notes), "parts": parts}) + "\n")


def of_directory(folder: Path) -> tuple[list[Found], list[str]]:
    """(fits, what is to be said of them) of a run directory; raises InputError for one damaged or not at its end."""
    if not (folder / "report.html").is_file():
        raise InputError(f"'{folder}' holds no run that has ended: run its command again")
    file, done = folder / "study.json", workdir.done(folder).values()
    parts: Any = [{"longer": False, "rows": [line for line in done if line["strategy"] != "pretrain"]}]
    notes: list[str] = []
    if file.is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            notes, parts = known["notes"], known["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{file}' is not as it was written: run the study's command again") from error
    about = workdir.recorded(folder)
    around = about.get("switches") if isinstance(about, dict) else None
    if around:
        notes = [*notes, f"{folder.name} was trained under " + ", ".join(f"{name}={around[name]}" for name in around)]
    return [_kept(folder, part["rows"])._replace(longer=part["longer"]) for part in parts], notes


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


def _require_one_study(found: Sequence[Found]) -> None:
    cells: dict[Cell, list[Row]] = {}
    labels: dict[str, np.ndarray] = {}
    for part in found:
        for row in part.rows:
            cells.setdefault(cell(row, part.longer), []).append(row)
        for target, theirs in part.labels.items():
            known = labels.setdefault(target, theirs)
            if known.shape != theirs.shape or (known != theirs).any():
                raise InputError(
                    f"fits of '{target}' were judged on two sets of test examples: report those of one set alone"
                )
    for rows in cells.values():
        require_one_recipe(rows)


LONGER = "scratch for "
"""How the names of scratch with more steps begin."""


def right(found: Sequence[Found]) -> dict[Cell, dict[int, np.ndarray]]:
    """{cell: {seed: which test examples the fit gets right}} of the fits that count.

    Raises InputError for two fits of one cell and seed, fits of several recipes in one cell, and fits of one target
    that were judged on other test examples.
    """
    _require_one_study(found)
    table: dict[Cell, dict[int, np.ndarray]] = {}
    for part in found:
        for row in part.rows:
            if row["name"] in part.predicted:
                own = part.predicted[row["name"]] == part.labels[row["target"]]
                table.setdefault(cell(row, part.longer), {})[row["seed"]] = own
    return table


def cell(row: Row, longer: bool = False) -> Cell:
    """What a fit has in common with those of other seeds."""
    source = None if row["strategy"] == "scratch" else row.get("source")
    return Cell(source, row["target"], longer_name(row["steps"]) if longer else label(row), row["train_examples"])


def longer_name(steps: int) -> str:
    """The name of scratch with so many steps."""
    return f"{LONGER}{steps:,} steps"


def at_equal_total(table: Right, rows: Sequence[Row], margin: float, level: float) -> list[study.Comparison]:
    """Each strategy against scratch that was given the source's steps too, a budget at a time."""
    steps = {}
    for row in rows:
        if row.get("source_steps") is not None and row["strategy"] != "scratch":
            steps[cell(row)] = row["steps"] + row["source_steps"]
    found = []
    for where in study.sorted_cells(table):
        if where in steps:
            name = longer_name(steps[where])
            one = study.alone(table, [where], margin, level, base=name, against=study.TOTAL)
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
        labels = first.labels[target]
        wrong = taken != labels
        worst = np.argsort(-wrong.sum(0), kind="stable")[:MOST_WRONG]
        captions = []
        for i in worst:
            other, _ = Counter(taken[wrong[:, i], i].tolist()).most_common(1)[0] if wrong[:, i].any() else (0, 0)
            names = (first.classes[labels[i]], first.classes[other])
            captions.append(f"{names[0]} taken for {names[1]}; {100 * wrong[:, i].mean():.0f} % of fits are wrong")
        shown[target] = (first.images[worst], captions)
    return shown


def looked(folder: Path, table: Right) -> int:
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
