"""What fits are judged by: their rows, curves, and what they predict for each test example."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import console, outcome, workdir
from tljax.study import study
from tljax.study.study import Cell, Right
from tljax.study.summary import Row, counts, label
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
    both = {row["name"]: read(folder / row["predictions"], row["predictions_sha256"]) for row in rows if counts(row)}
    labels = {row["target"]: both[row["name"]][1] for row in rows if row["name"] in both}
    curves = {row["name"]: curve for row in rows if (curve := outcome.curves(folder, row)) is not None}
    bare = [{**row, "source": None} if row["strategy"] == "scratch" else row for row in rows]
    return Found(bare, {name: predicted for name, (predicted, _) in both.items()}, labels, curves)


def keep(folder: Path, found: Sequence[Found], notes: Sequence[str]) -> None:
    """Write what else is known of the fits of a study to `folder`/study.json, for reports of several."""
    parts = [{"longer": part.longer, "rows": part.rows} for part in found]
    record = {"notes": list(notes), "parts": parts, "looks": len(_looks(folder))}
    workdir.write_record(folder / "study.json", record)


def of_directory(folder: Path) -> tuple[list[Found], list[str]]:
    """(fits, what is to be said of them) of a run directory; raises InputError for one damaged or not at its end."""
    if not (folder / "report.html").is_file():
        raise InputError(f"'{folder}' holds no run that has ended: run its command again")
    file, done = folder / "study.json", workdir.done(folder).values()
    parts: Any = [{"longer": False, "rows": [line for line in done if line["strategy"] != "pretrain"]}]
    notes: list[str] = []
    if (known := workdir.read_record(file)) is not None:
        notes, parts = known["notes"], known["parts"]
    elif _looks(folder):
        raise InputError(f"'{file}' is gone: run the study's command again")
    return [_kept(folder, part["rows"])._replace(longer=part["longer"]) for part in parts], notes


def read(file: Path, sha256: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(predicted classes, labels), int [items] each, of a .npz of `probabilities` or `predicted`, and `labels`.

    Raises InputError for a file that has them not, or not of one length, and for one that has not this SHA-256.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        raw = file.read_bytes()
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise InputError(f"predictions '{file}' are not as they were written: run the command of their run again")
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            kept = {name: arrays[name] for name in ("probabilities", "predicted", "labels") if name in arrays}
    except InputError:
        raise
    except Exception as error:  # what NumPy, zlib and the unpacking raise for a damaged file has no common type
        raise InputError(f"predictions '{file}' cannot be read ({error}): write it again") from error
    labels = kept.get("labels", np.zeros((0, 0)))
    found = kept["probabilities"].argmax(-1) if kept.get("probabilities", labels).ndim == 2 else kept.get("predicted")
    if found is None or labels.ndim != 1 or found.shape != labels.shape or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"predictions '{file}': give labels [items] and predicted [items] or probabilities [items, classes]"
        )
    return found, labels


LONGER = "scratch for "
"""How the names of scratch with more steps begin."""


def right(found: Sequence[Found]) -> dict[Cell, dict[int, np.ndarray]]:
    """{cell: {seed: which test examples the fit gets right}} of the fits that count."""
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

    `folder`/looks.json holds the fits of each look, and study.json how many there were: looks.json cannot be deleted
    unnoticed. Raises InputError where it lacks a look, or is not as it was written.
    """
    file, study_file = folder / "looks.json", folder / "study.json"
    looks = _looks(folder)
    try:
        study_record = workdir.read_record(study_file) or {}
    except InputError as error:
        if not looks:
            raise InputError(f"'{file}' is gone, and {error}: restore one of both, or take a new --workdir") from error
        console.say(f"{error}. It is set aside as '{workdir.aside(study_file).name}' and written anew")
        study_record = {}
    if len(looks) < study_record.get("looks", 0):
        raise InputError(
            f"'{file}' tells of {len(looks)} looks at these results, 'study.json' of {study_record['looks']}: restore "
            "it, or take fresh --seeds and a new --workdir"
        )
    now = json.loads(json.dumps(sorted([*map(str, cell), seed] for cell, fits in table.items() for seed in fits)))
    if not looks or looks[-1] != now:
        looks.append(now)
        workdir.write_record(file, {"looks": looks})
    return len(looks)


def _looks(folder: Path) -> list[Any]:
    """The fits of each look at the results of a run directory, the first first."""
    record = workdir.read_record(folder / "looks.json")
    if record is not None:
        return record["looks"]
    old = folder / "looks.jsonl"
    if not old.is_file():
        return []
    try:
        looks = [json.loads(line) for line in old.read_text(encoding="utf-8").splitlines()]
        if not all(look.keys() == {"fits"} and isinstance(look["fits"], list) for look in looks):
            raise ValueError("a line that tells of no fits")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"'{old}' is not as it was written ({error}): restore it") from error
    return [look["fits"] for look in looks]
