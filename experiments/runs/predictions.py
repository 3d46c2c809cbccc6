"""Predictions: what fits are judged by, and what a run directory keeps of it.

Of each fit its result, its curves, and the class it takes each test example for, or its score on each where the metric
is not accuracy (`Predictions`); from these the scores that verdicts are of (`right`). A study writes study.json and
looks.json beside them (`write_study`, `count_look`), and a report reads all again (`read_study`).
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import budgets, console, directory, fields, metrics
from tljax import npz
from tljax.study import results, units
from tljax.study.results import Replicate, Result, replicate
from tljax.study.summary import counted_score, counts, label, require_one_recipe, with_share
from tljax.study.verdicts import (
    TOTAL,
    Cell,
    Comparison,
    Conditions,
    Right,
    alone,
    of_diverged,
    sorted_cells,
)
from tljax.types import END_NAMES, InputError, Metric, Task

MOST_WRONG = 16
"""How many images of a target are shown."""


class Predictions(NamedTuple):
    """Fits with what they predict for the test examples of their target."""

    rows: Sequence[Result]
    """The results of the fits."""
    predicted: Mapping[str, np.ndarray]
    """{fit: the class it takes each test example for, int [items]}, where its targets are classes."""
    labels: Mapping[str, np.ndarray]
    """{target: the classes of its test examples, int [items]; of other kinds what they mean, [items, ...]}."""
    groups: Mapping[str, np.ndarray] = {}
    """{target: which of its test examples are alike, [items]}, where that is known."""
    curves: Mapping[str, Mapping[str, np.ndarray]] = {}
    """{fit: its learning curves}."""
    images: np.ndarray | None = None
    classes: Sequence[str] = ()
    longer: bool = False
    """Whether the fits are scratch with the source's steps added to its own."""
    scores: Mapping[str, np.ndarray] = {}
    """{fit: its metric on each test example, float32 [items]}, of those whose metric is another than accuracy."""
    kept: Mapping[str, np.ndarray] = {}
    """{fit: its score on each of the source's test examples, [items]: bool, or float32 as above}, where retention was
    measured."""
    kept_groups: Mapping[str, np.ndarray] = {}
    """{source: which of its test examples are alike, [items]}, where that is known."""
    kept_sets: Mapping[str, str] = {}
    """{source: the digest that its test set is known by}."""


def of_run(folder: Path, results: Sequence[Result], task: Task) -> Predictions:
    """The predictions of fits in a run directory, with the images and classes of their target."""
    images = np.asarray(task.test.arrays) if task.kind == "classes" and _are_images(task.test.arrays) else None
    fits = _read_fits(folder, results)._replace(images=images, classes=task.classes)
    return fits if task.test.groups is None else fits._replace(groups={task.name: np.asarray(task.test.groups)})


def _are_images(arrays: Any) -> bool:
    """Whether inputs are images, [n, height, width, channels], in one array."""
    return getattr(arrays, "ndim", 0) == 4


def _read_fits(folder: Path, rows: Sequence[Result]) -> Predictions:
    """What a run directory keeps of these fits."""
    settled_rows = [row for row in rows if counts(row) or row.diverged]
    arrays = {row.name: _read(folder, row) for row in settled_rows}
    files = {row.target: folder / row.predictions for row in settled_rows}
    labels = {row.target: arrays[row.name][1] for row in rows if row.name in arrays}
    groups = {target: known for target, file in files.items() if (known := groups_in(file)) is not None}
    curves = {row.name: curve for row in rows if (curve := metrics.curves(folder, row.name)) is not None}
    sourced = [replace(row, source=None) if row.strategy == "scratch" else row for row in rows]
    settled = [full for row in sourced for full in with_share([row], labels.get(row.target, np.zeros(0, int)))]
    ended = [row for row in settled if row.name in arrays and not row.diverged]
    predicted = {row.name: arrays[row.name][0] for row in ended if row.metric is None}
    scores = {row.name: arrays[row.name][0] for row in ended if row.metric is not None}
    of_classes = [row for row in ended if row.metric is not None and row.confusion is not None]
    predicted |= {row.name: read(folder / row.predictions)[0] for row in of_classes}
    return with_kept(folder, Predictions(settled, predicted, labels, groups, curves, scores=scores))


def _read(folder: Path, row: Result) -> tuple[np.ndarray, np.ndarray]:
    """(what a fit of a run directory predicts, or its scores; the labels or other targets)."""
    file = folder / row.predictions
    if row.metric is None:
        return read(file, row.predictions_sha256)
    return read_scores(file, row.predictions_sha256, finite=not row.diverged)


def with_kept(folder: Path, part: Predictions) -> Predictions:
    """The same with the scores of its fits on their source's test set, where their results say where these lie."""
    kept: dict[str, np.ndarray] = {}
    groups: dict[str, np.ndarray] = {}
    sets: dict[str, str] = {}
    for row in part.rows:
        if row.retention_scores and row.source:
            scores = read_kept(folder / row.retention_scores, row.retention_sha256)
            kept[row.name], sets[row.source] = scores.scores, scores.test_set
            groups |= {} if scores.groups is None else {row.source: scores.groups}
    return part._replace(kept=kept, kept_groups=groups, kept_sets=sets)


class KeptScores(NamedTuple):
    """The scores of one fit on its source's test set."""

    scores: np.ndarray
    """[items]: bool, which examples it gets right; float32 of a metric other than accuracy."""
    test_set: str
    """The digest that the test set is known by."""
    groups: np.ndarray | None = None
    """Which test examples are alike, int [items], if that is known."""


def write_kept(file: Path, kept: KeptScores) -> str:
    """Write such scores as .npz; returns its SHA-256."""
    known: dict[str, Any] = {} if kept.groups is None else {"groups": kept.groups}
    packed = io.BytesIO()
    np.savez_compressed(packed, scores=kept.scores, test_set=np.array(kept.test_set), **known)
    directory.make_folder(file.parent)
    directory.replace(file, packed.getvalue())
    return hashlib.sha256(packed.getvalue()).hexdigest()


def read_kept(file: Path, sha256: str | None) -> KeptScores:
    """Read such scores; raises InputError for a file that is not as it was written."""
    arrays = _arrays(file, ("scores", "test_set", "groups"), sha256)
    scores, test_set, groups = (arrays.get(name) for name in ("scores", "test_set", "groups"))
    if scores is None or test_set is None or scores.ndim != 1 or not np.isfinite(scores).all():
        raise InputError(f"predictions '{file}' hold no scores of a source's test set: run the command again")
    return KeptScores(scores, str(test_set), groups)


class StudyRecord(NamedTuple):
    """What a run directory holds of a study."""

    parts: list[Predictions]
    notes: list[str]
    """What a report of the fits must say."""
    judging: dict[str, Any] | None
    """How the fits were judged; None where they were not."""
    looks: int
    """How often the fits had been looked at then."""


JUDGING: fields.Form = {
    **{"margin?": (float, None), "level?": float, "family?": str, "looks?": int, "against?": str, "verdict_on?": str},
    **{"verdict_of?": str, "primary_family?": [str]},
    **{"until?": str},
}
"""How fits are judged: the fields of `judging.Judging`."""
STUDY: fields.Form = {
    **{"notes": [str], "parts": [{"longer": bool, "rows": [{"seconds?": float}]}]},
    **{"judging?": (None, JUDGING), "look?": int, "looks?": int},
}
"""The form of study.json, which `write_study` writes."""


def write_study(
    folder: Path, parts: Sequence[Predictions], notes: Sequence[str], judging: Mapping[str, Any], looks: int
) -> None:
    """Write what else is known of the fits of a study, and how they were judged, to `folder`/study.json.

    `looks` is how often they have been looked at, this time counted, wherever that is known from.
    """
    records = [{"longer": part.longer, "rows": [results.to_json(row) for row in part.rows]} for part in parts]
    looked_at = {"looks": len(_looks(folder)), "look": looks, "judging": dict(judging)}
    directory.write_record(folder / "study.json", {"notes": list(notes), "parts": records, **looked_at})


def read_study(folder: Path) -> StudyRecord:
    """What a run directory holds of a study; raises InputError for one damaged or not at its end."""
    if not (folder / "report.html").is_file() and not _whole(folder):
        raise InputError(f"'{folder}' holds no run that has ended: run its command again")
    file, superseded = folder / "study.json", directory.superseded(folder)
    finished = [result for key, result in directory.finished(folder).items() if key not in superseded]
    end = _end_of_run(folder)
    parts = [(False, [results.at_end(result, end) for result in finished if result.strategy != "pretrain"])]
    notes = _lost(folder, finished, superseded)
    judging, looks = None, 0
    if (record := _study(file)) is not None:
        notes, judging = record["notes"], record.get("judging")
        parts = [(part["longer"], list(map(results.from_json, part["rows"]))) for part in record["parts"]]
        looks = max(record.get("look", 0), record.get("looks", 0))
    elif _looks(folder):
        raise InputError(f"'{file}' is gone: run the study's command again")
    environment = directory.recorded_environment(folder)
    if switches := (environment or {}).get("switches"):
        listed = ", ".join(f"{name}={value}" for name, value in switches.items())
        notes = [*notes, f"{folder.name} was trained under {listed}"]
    mixed = directory.mixed_environments(folder, [row.name for _, rows in parts for row in rows])
    notes = [*notes, *(note for note in mixed if note not in notes)]
    return StudyRecord(
        [_read_fits(folder, rows)._replace(longer=longer) for longer, rows in parts], notes, judging, looks
    )


def without_longer(table: Right) -> Right:
    """The scores, except those of scratch with the source's steps added."""
    return {cell: fits for cell, fits in table.items() if not cell.longer}


def _end_of_run(folder: Path) -> str:
    """Which parameters of its fits a run directory's verdicts are of, as its flags say."""
    return directory.recorded_flags(folder).get("verdict_of", ["last"])[0]


def end_of(parts: Sequence[Predictions]) -> str:
    """Which parameters of these fits their measures are of; raises InputError for fits of several ends."""
    rows = [row for part in parts for row in part.rows if not row.diverged]
    ends = {row.end or "last" for row in rows}
    named = ends - {"last"}
    of_every_fit = named <= {*END_NAMES}
    if len(named) > 1 or (named and of_every_fit and "last" in ends):
        raise InputError(
            f"fits are of several ends, {' and '.join(sorted(ends))} (--verdict_of of their runs): report those of one"
        )
    return next(iter(named), "last")


def _lost(folder: Path, finished: Sequence[Result], superseded: Collection[str]) -> list[str]:
    """A note on the fits in results.jsonl whose checkpoint or predictions are gone; none if all are there."""
    known = {result.key for result in finished} | set(superseded)
    others = [result for result in directory.results(folder) if result.strategy != "pretrain"]
    lost = [result.name for result in others if result.key not in known]
    if not lost:
        return []
    named = f"'{lost[0]}'" + (f" and {len(lost) - 1} more" if lost[1:] else "")
    return [f"{folder.name}: {named} left out, as checkpoint or predictions are gone: run its command again"]


def _study(file: Path) -> dict[str, Any] | None:
    """study.json; None if there is no such file. Raises InputError if it is damaged or of other types."""
    record = directory.read_record(file, STUDY)
    for i, part in enumerate(record["parts"] if record else ()):
        for j, row in enumerate(part["rows"]):
            if odd := directory.fault_of_fit(row):
                raise InputError(f"'{file}': parts[{i}].rows[{j}].{odd}: restore it, or run its command again")
    return record


def _whole(folder: Path) -> bool:
    """Whether a run directory without a report, as the winners of a search are left in, has all fits of its flags."""
    if not (folder / "flags.flags").is_file() or not (folder / "results.jsonl").is_file():
        return False
    settings = directory.recorded_settings(folder)
    trained = Counter(row.seed for row in directory.finished(folder).values() if row.strategy != "pretrain")
    wanted = Counter(seed for budget in settings.train_examples for seed in budgets.seeds(budget, settings.seeds))
    return all(trained[seed] >= count * len(settings.strategies) for seed, count in wanted.items())


def read(file: Path, sha256: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(predicted classes, labels), int [items] each, of a .npz of `probabilities` or `predicted`, and `labels`.

    Raises InputError for a file without them, or with arrays of other lengths, and for one of another SHA-256.
    """
    arrays = _arrays(file, ("probabilities", "predicted", "labels"), sha256)
    labels = arrays.get("labels", np.zeros((0, 0)))
    probabilities = arrays.get("probabilities")
    predicted = arrays.get("predicted")
    if probabilities is not None and probabilities.ndim == 2 and probabilities.shape[1] and _ordered(probabilities):
        predicted = probabilities.argmax(-1)
    if (
        predicted is None
        or labels.ndim != 1
        or predicted.shape != labels.shape
        or not np.issubdtype(labels.dtype, np.integer)
    ):
        raise InputError(
            f"predictions '{file}': give labels [items] and predicted [items] or probabilities [items, classes]"
        )
    return predicted, labels


def read_scores(file: Path, sha256: str | None = None, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(`scores`, float [items], `targets` or `labels`, [items, ...]) of a .npz whose metric is not accuracy.

    Raises InputError for a file without them, with scores that are not `finite`, and for one of another SHA-256.
    """
    arrays = _arrays(file, ("scores", "targets", "labels"), sha256)
    scores, targets = arrays.get("scores"), arrays.get("targets", arrays.get("labels"))
    if scores is None or targets is None or scores.shape != targets.shape[:1] or scores.dtype.kind != "f":
        raise InputError(f"predictions '{file}': give scores, floats [items], and targets [items, ...]")
    if finite and not np.isfinite(scores).all():
        raise InputError(f"predictions '{file}' have scores that are not finite: run the command of their run again")
    return scores, targets


def _ordered(array: np.ndarray) -> bool:
    """Whether an array has numbers of which one can be the largest."""
    return array.dtype.kind in "biuf"


def groups_in(file: Path) -> np.ndarray | None:
    """`groups` of a .npz of predictions: which test examples are alike, int [items]; None where they are not there.

    Raises InputError for a file that cannot be read, and for groups that are no integers or words, one an example.
    """
    arrays = _arrays(file, ("groups", "labels", "targets"))
    groups = arrays.get("groups")
    if groups is None:
        return None
    labels = arrays.get("labels", arrays.get("targets"))
    if labels is None or groups.shape != labels.shape[:1] or groups.dtype.kind not in "iuU":
        raise InputError(
            f"predictions '{file}': groups are {groups.dtype} {list(groups.shape)}: give integers or words, [items]"
        )
    return np.unique(groups, return_inverse=True)[1]


_MEMBERS = ("probabilities", "predicted", "labels", "groups", "outputs", "targets", "scores", "test_set")
"""All that is read of a .npz of predictions."""


def _arrays(file: Path, names: Sequence[str], sha256: str | None = None) -> dict[str, np.ndarray]:
    """Those of the arrays that a .npz has; raises InputError if it cannot be read or has another SHA-256."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        raw = file.read_bytes()
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise InputError(f"predictions '{file}' are not as they were written: run the command of their run again")
        return npz.unpack(io.BytesIO(raw), f"predictions '{file}'", names, _MEMBERS, "write it again")
    except (OSError, ValueError) as error:
        raise InputError(f"predictions '{file}' cannot be read ({error}): write it again") from error


def all_groups(parts: Sequence[Predictions], on: str = "target") -> dict[str, np.ndarray]:
    """{target: which of its test examples are alike}; raises InputError where fits of one target say otherwise.

    Of verdicts `on` retention {source: the same}.
    """
    groups: dict[str, np.ndarray] = {}
    for part in parts:
        for target, of_part in (part.kept_groups if on == "retention" else part.groups).items():
            known = groups.setdefault(target, of_part)
            pairs = np.unique(np.stack([known, of_part]), axis=1).shape[1] if known.shape == of_part.shape else 0
            if not pairs == len(np.unique(known)) == len(np.unique(of_part)):
                raise InputError(f"fits of '{target}' have their test examples in different groups: give all the same")
    return groups


def _require_one_study(parts: Sequence[Predictions]) -> None:
    """Raise InputError, as `right` says, for fits that cannot be of one study."""
    cells: dict[Cell, list[Result]] = {}
    labels: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    metrics_of: dict[str, Metric] = {}
    for part in parts:
        for row in part.rows:
            cells.setdefault(cell(row, part.longer), []).append(row)
            classes = sizes.setdefault(row.target, len(row.confusion or ()))
            if units.to_record(metrics_of.setdefault(row.target, results.metric(row))) != row.metric:
                raise InputError(
                    f"fits of '{row.target}' were measured by {metrics_of[row.target].name} and "
                    f"{results.metric(row).name}: report those of one metric"
                )
            if row.confusion and classes and len(row.confusion) != classes:
                raise InputError(
                    f"fits of '{row.target}' have {classes} and {len(row.confusion)} classes: report those of one"
                )
        for target, of_part in part.labels.items():
            known = labels.setdefault(target, of_part)
            if known.shape != of_part.shape or (known != of_part).any():
                raise InputError(
                    f"fits of '{target}' were judged on two sets of test examples: report those of one set alone"
                )
    for rows in cells.values():
        require_one_recipe(rows)


def right(parts: Sequence[Predictions], on: str = "target") -> dict[Cell, dict[Replicate, np.ndarray]]:
    """{cell: {seed, or seed and draw: scores on the test examples}} of the fits that count, as `verdicts.Right` has it.

    Of verdicts `on` retention they are on the source's test set, and no fit from scratch is among them. Scores of a
    metric of which less is better are turned. Raises InputError for two fits of one cell and seed, fits of several
    recipes in one cell, and fits of one target that were judged on other test examples.
    """
    _require_one_study(parts)
    table: dict[Cell, dict[Replicate, np.ndarray]] = {}
    for part in parts:
        for row in part.rows:
            scores = _kept_scores(part, row) if on == "retention" else _scores(part, row)
            if scores is not None:
                table.setdefault(cell(row, part.longer), {})[replicate(row)] = scores
    return table


def _scores(part: Predictions, row: Result) -> np.ndarray | None:
    """The scores of a fit: which test examples it gets right, or its turned metric; None where they are not known."""
    labels, share, sign = part.labels.get(row.target), counted_score(row), units.sign(results.metric(row))
    if labels is None:
        return None
    if row.diverged:
        return None if share is None else of_diverged(sign * share, len(labels))
    if row.name in part.scores:
        return sign * part.scores[row.name]
    return part.predicted[row.name] == labels if row.name in part.predicted else None


def _kept_scores(part: Predictions, row: Result) -> np.ndarray | None:
    """The scores of a fit on its source's test set, turned; None where they are not known, as of scratch."""
    if part.longer or row.name not in part.kept:
        return None
    scores, sign = part.kept[row.name], units.sign(units.from_record(row.retention_metric))
    if row.diverged:
        return None if row.retention is None else of_diverged(sign * row.retention, len(scores))
    return scores if scores.dtype == bool else sign * scores


def metrics_of(parts: Sequence[Predictions], on: str = "target") -> dict[str, Metric]:
    """{test set: its metric}, by the name of the target, or of the source where verdicts are on retention."""
    rows = [row for part in parts for row in part.rows]
    if on == "retention":
        kept = [row for row in rows if row.source and row.retention is not None]
        return {str(row.source): units.from_record(row.retention_metric) for row in kept}
    return {row.target: results.metric(row) for row in rows}


def cell(row: Result, longer: bool = False) -> Cell:
    """What a fit has in common with those of other seeds."""
    source = None if row.strategy == "scratch" else row.source
    name = longer_name(row.steps) if longer else label(row)
    return Cell(source, row.target, name, row.train_examples, longer)


def longer_name(steps: int | None) -> str:
    """The name of scratch with so many steps."""
    return f"scratch for {steps:,} steps"


def at_equal_total(
    table: Right, rows: Sequence[Result], conditions: Mapping[str, Conditions], level: float
) -> list[Comparison]:
    """Each strategy against scratch that was given the source's steps too, a budget at a time.

    `conditions` are by target.
    """
    steps = {}
    for row in rows:
        if row.steps is not None and row.source_steps is not None and row.strategy != "scratch":
            steps[cell(row)] = row.steps + row.source_steps
    beside = []
    for cell_of_fit in sorted_cells(table):
        if cell_of_fit in steps:
            name = longer_name(steps[cell_of_fit])
            of_target = conditions[cell_of_fit.target]
            comparison = alone(table, [cell_of_fit], of_target, level, name, against=TOTAL, longer=True)
            beside += [comparison] if comparison else []
    return beside


def most_wrong(parts: Sequence[Predictions]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """{target: (the test images most often taken for another class, a caption each)}."""
    worst_of = {}
    with_images = [part for part in parts if part.rows and part.images is not None and part.predicted]
    for target in dict.fromkeys(part.rows[0].target for part in with_images):
        of_target = [part for part in with_images if part.rows[0].target == target]
        first, predicted = of_target[0], np.array([fit for part in of_target for fit in part.predicted.values()])
        if not len(predicted) or first.images is None or first.images.ndim != 4:
            continue
        labels = first.labels[target]
        wrong = predicted != labels
        worst = np.argsort(-wrong.sum(0), kind="stable")[: min(MOST_WRONG, int(wrong.any(0).sum()))]
        captions = []
        for i in worst:
            taken = Counter(predicted[wrong[:, i], i].tolist()).most_common(1)
            right_class, wrong_class = first.classes[labels[i]], first.classes[taken[0][0]]
            share = f"{100 * wrong[:, i].mean():.0f} % of fits are wrong"
            captions.append(f"{right_class} taken for {wrong_class}; {share}")
        if captions:
            worst_of[target] = (first.images[worst], captions)
    return worst_of


def count_look(folder: Path, table: Right, able: Collection[str] | None = None) -> int:
    """How often results in a run directory have been looked at, this time counted: another set of fits is another look.

    `able` are the targets of which a verdict can be given, None for all: fits of others are no look.
    `folder`/looks.json holds the fits of each look, and study.json how many there were: looks.json cannot be
    deleted unnoticed. Raises InputError where it lacks a look, or is not as it was written.
    """
    file, study_file = folder / "looks.json", folder / "study.json"
    looks = _looks(folder)
    try:
        study_record = _study(study_file) or {}
    except InputError as error:
        if not looks:
            raise InputError(f"'{file}' is gone, and {error}: restore one of both, or take a new --workdir") from error
        console.say(f"{error}. It is set aside as '{directory.set_aside(study_file).name}' and written anew")
        study_record = {}
    if len(looks) < study_record.get("looks", 0):
        raise InputError(
            f"'{file}' tells of {len(looks)} looks at these results, 'study.json' of {study_record['looks']}: restore "
            "it, or take fresh --seeds and a new --workdir"
        )
    judged = {cell: fits for cell, fits in table.items() if able is None or cell.target in able}
    fits_now = json.loads(json.dumps(sorted([*map(str, cell), seed] for cell, fits in judged.items() for seed in fits)))
    # An older tljax wrote down the fits of every target.
    last = [fit for fit in looks[-1] if able is None or fit[1] in able] if looks else None
    if fits_now and last != fits_now:
        looks.append(fits_now)
        directory.write_record(file, {"looks": looks})
    return len(looks)


def _looks(folder: Path) -> list[Any]:
    """The fits of each look at the results of a run directory, the first first."""
    record = directory.read_record(folder / "looks.json", {"looks": [list]})
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
