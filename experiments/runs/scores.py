"""Scores of one source for one target, from its features on disk, kept beside them.

`tljax.study.transferability` defines the scores; here they get their names, the examples that they look at, and a file
scores.json beside the features, so that a score is computed once.
"""

import functools
import hashlib
import json
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from experiments.runs import budgets, directory, features, plan, sources
from experiments.runs.settings import Settings
from experiments.runs.sources import LoadedSource
from tljax import plugins
from tljax.data import draw
from tljax.study import ranking, transferability
from tljax.types import InputError, Task


class ScoredExamples(NamedTuple):
    """The labelled examples of one draw: all that a score may look at."""

    features: np.ndarray
    """float [n, d], of the last stage before the head."""
    probabilities: np.ndarray
    """float64 [n, source classes], of the source's own head; [n, 0] of a source of other targets than classes."""
    labels: np.ndarray
    """int [n], of the target."""
    groups: np.ndarray
    """int [n]: examples of one image have one number."""


class Score(NamedTuple):
    """The value of one score."""

    value: float | None
    """None where it is not defined; it may be infinite."""
    seconds: float
    reason: str = ""
    """Why the value is not defined, or what its computation warned of."""


def _of_source(examples: ScoredExamples) -> np.ndarray:
    """The probabilities of the source's classes; raises InputError where it has none."""
    if not examples.probabilities.shape[1]:
        raise InputError("it is of the classes of the source, whose targets are no classes")
    return examples.probabilities


SCORES: Mapping[str, Callable[[ScoredExamples], float]] = {
    "knn": lambda x: transferability.knn(x.features, x.labels, groups=x.groups),
    "logme": lambda x: transferability.logme(x.features, x.labels),
    "leep": lambda x: transferability.leep(_of_source(x), x.labels),
    "n_leep_left_out": lambda x: transferability.n_leep_left_out(x.features, x.labels, groups=x.groups),
    "nce": lambda x: transferability.nce(_of_source(x).argmax(axis=1), x.labels),
    "h_score_adjusted": lambda x: transferability.h_score_adjusted(x.features, x.labels),
    "h_score_shrunk": lambda x: transferability.h_score_shrunk(x.features, x.labels),
    "transrate_adjusted": lambda x: transferability.transrate_adjusted(x.features, x.labels),
    "gbc_adjusted": lambda x: transferability.gbc_adjusted(x.features, x.labels),
    "probe": lambda x: transferability.probe(x.features, x.labels, x.groups),
    "n_leep": lambda x: transferability.n_leep(x.features, x.labels),
    "h_score": lambda x: transferability.h_score(x.features, x.labels),
    "transrate": lambda x: transferability.transrate(x.features, x.labels),
    "gbc": lambda x: transferability.gbc(x.features, x.labels),
}
"""The scores by name, the default first."""

AS_IN_PAPERS = ("n_leep", "h_score", "transrate", "gbc")
"""Scores as the papers define them, in which noise scores the higher the wider it is: computed only where named."""

DEFAULT = tuple(name for name in SCORES if name not in AS_IN_PAPERS)


def check_scores(names: Sequence[str]) -> None:
    """Raise InputError if no score is named, or an unknown one, or one twice."""
    if not names:
        raise InputError(f"--scores names none: give some of {','.join(SCORES)}")
    for name in names:
        if name not in SCORES:
            raise InputError(f"--scores={','.join(names)}: '{name}' is none{plugins.nearest(name, SCORES)}")
        if names.count(name) > 1:
            raise InputError(f"--scores names {name} twice: give each once")


def drawn(settings: Settings, budget: str, task: Task, most: int) -> dict[int, np.ndarray]:
    """{seed: which training examples are scored}: those that transfer has, or of more than `most` a balanced part.

    Such a part is drawn under the first seed alone.
    """
    labels, total = np.asarray(task.train.targets), budgets.total(budget, task)
    seeds = budgets.seeds(budget, settings.seeds)
    streams = {seed: plan.streams(settings, seed).draw for seed in seeds}
    if total > most:
        return {seeds[0]: draw.label_budget(streams[seeds[0]], labels, most)}
    return {seed: plan.draw_examples(settings.recipe, budget, task, streams[seed])[0] for seed in seeds}


class Scored(NamedTuple):
    """The scores of one source on one target."""

    scores: Mapping[str, Mapping[str, Score]]
    """{budget: {name: score}}: values and seconds are means over seeds."""
    seconds: float
    """How long the features took when they were computed."""


def scored(
    folder: Path, source: LoadedSource, task: Task, settings: Settings, names: Sequence[str], most: int
) -> Scored:
    """The scores of a source for a target at all budgets; features and scores that `folder` holds are taken from it."""
    stage, head = sources.before_head(source.model), source.model[-1].name
    place = folder / "features" / f"{source.identity[:12]}-{task.fingerprint[:12]}"
    file = place / "scores.json"
    known, seconds_before = _known(file)
    start = time.perf_counter()
    features.write(source, task, {stage: place / stage, head: place / head})
    seconds = round(time.perf_counter() - start, 3) if seconds_before is None else seconds_before
    hidden = features.read(place / stage, source, task, stage).train
    logits = features.read(place / head, source, task, head).train
    labels, values = np.asarray(task.train.targets), dict(known)
    wanted: dict[str, dict[str, list[str]]] = {}
    missing: list[tuple[str, str, ScoredExamples]] = []
    for budget in settings.train_examples:
        wanted[budget] = {name: [] for name in names}
        for seed, rows in drawn(settings, budget, task, most).items():
            of_classes = source.source.kind == "classes"
            probabilities = softmax(logits[rows].astype(float), axis=1) if of_classes else np.zeros((len(rows), 0))
            examples = ScoredExamples(hidden[rows], probabilities, labels[rows], _copies(task.train.inputs(rows)))
            for name in names:
                key = f"{name} {budget} {seed} {len(rows)} {_digest(rows)}"
                wanted[budget][name].append(key)
                missing += [(key, name, examples)] if key not in values else []
    computed = _side_by_side([(name, examples) for _, name, examples in missing])
    values |= zip((key for key, _, _ in missing), computed, strict=True)
    if values != known:
        directory.write_record(file, {"code": _code(), "seconds": seconds, "scores": values})
    scores = {
        budget: {name: _mean([Score(*values[key]) for key in keys]) for name, keys in by_name.items()}
        for budget, by_name in wanted.items()
    }
    return Scored(scores, seconds)


def _digest(rows: np.ndarray) -> str:
    """A digest of whole numbers, int [n]: other numbers, or another order of them, have another.

    >>> _digest(np.array([1, 23])) == _digest(np.array([12, 3])), _digest(np.int32([7])) == _digest(np.int64([7]))
    (False, True)
    """
    return hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()[:16]


def _copies(images: ArrayLike) -> np.ndarray:
    """A number for each of images [n, ...], the same for equal images: int64 [n]."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(np.asarray(image).tobytes(), len(numbers)) for image in np.asarray(images)])


@functools.cache
def _code() -> str:
    """SHA-256 of the code that scores are computed by: scores of other code are not mixed with its own."""
    files = [Path(__file__), Path(str(transferability.__file__))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _known(file: Path) -> tuple[dict[str, tuple[float | None, float, str]], float | None]:
    """(scores computed before, seconds that the features took); raises InputError where they cannot be read.

    Scores of other code are left out, to be computed again.
    """
    if not file.is_file():
        return {}, None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        rest = {name: value for name, value in record.items() if name != "sha256"}
        if not directory.intact(record) and record["sha256"] != directory.digest(
            rest
        ):  # of an older tljax, less the seconds
            raise ValueError("it is not as it was written")
        return dict(record["scores"]) if record.get("code") == _code() else {}, float(record["seconds"])
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"'{file}' cannot be read ({error}): delete it") from error


def _side_by_side(scores: Sequence[tuple[str, ScoredExamples]]) -> Iterator[tuple[float | None, float, str]]:
    """The value of each score, its seconds on one core, and why it has no value or what it warns of."""
    with _caught_warnings() as warned, threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda score: _timed(SCORES[score[0]], score[1], warned), scores)


@contextmanager
def _caught_warnings() -> Iterator[dict[int, list[str]]]:
    """{thread: what it warns of}: warnings are caught for all threads at once, or not at all."""
    warned: dict[int, list[str]] = defaultdict(list)

    def catch(message: Warning | str, *rest: Any) -> None:
        warned[threading.get_ident()].append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = catch  # type: ignore[assignment]
        yield warned


def _timed(
    score: Callable[[ScoredExamples], float], examples: ScoredExamples, warned: dict[int, list[str]]
) -> tuple[float | None, float, str]:
    messages = warned[threading.get_ident()]
    messages.clear()
    start = time.perf_counter()
    try:
        value, reason = score(examples), ""
    except InputError as error:
        value, reason = None, str(error)
    seconds = round(time.perf_counter() - start, 4)
    return value, seconds, reason or " ".join(" ".join(messages[:1]).split())[:200]


def _mean(scores: Sequence[Score]) -> Score:
    """The mean over draws; without a value where one of them has none."""
    seconds = float(np.mean([score.seconds for score in scores]))
    reason = next((score.reason for score in scores if score.reason), "")
    if any(score.value is None for score in scores):
        return Score(None, seconds, reason)
    return Score(float(ranking.mean(np.array([score.value for score in scores], float))), seconds, reason)
