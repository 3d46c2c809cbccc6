"""Scores of one source for one target, from its features on disk, kept beside them."""

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

from experiments import features, transfer
from experiments.runs import budgets, directory, fits, origin
from experiments.runs.origin import Origin
from experiments.runs.settings import Settings
from tljax import plugins
from tljax.data import draw
from tljax.study import ranking, transferability
from tljax.types import InputError, Task


class Seen(NamedTuple):
    """What a score may look at: the labelled examples of one draw."""

    features: np.ndarray
    """float [n, d], of the last stage before the head."""
    probabilities: np.ndarray
    """float64 [n, source classes], of the source's own head."""
    labels: np.ndarray
    """int [n], of the target."""
    groups: np.ndarray
    """int [n]: examples of one image have one number."""


class Score(NamedTuple):
    """What one score gives."""

    value: float | None
    """None where it is not defined; it may be infinite."""
    seconds: float
    reason: str = ""
    """Why it is not defined."""


SCORES: Mapping[str, Callable[[Seen], float]] = {
    "knn": lambda seen: transferability.knn(seen.features, seen.labels, groups=seen.groups),
    "logme": lambda seen: transferability.logme(seen.features, seen.labels),
    "leep": lambda seen: transferability.leep(seen.probabilities, seen.labels),
    "n_leep_left_out": lambda seen: transferability.n_leep_left_out(seen.features, seen.labels, groups=seen.groups),
    "nce": lambda seen: transferability.nce(seen.probabilities.argmax(axis=1), seen.labels),
    "h_score_adjusted": lambda seen: transferability.h_score_adjusted(seen.features, seen.labels),
    "h_score_shrunk": lambda seen: transferability.h_score_shrunk(seen.features, seen.labels),
    "transrate_adjusted": lambda seen: transferability.transrate_adjusted(seen.features, seen.labels),
    "gbc_adjusted": lambda seen: transferability.gbc_adjusted(seen.features, seen.labels),
    "probe": lambda seen: transferability.probe(seen.features, seen.labels, seen.groups),
    "n_leep": lambda seen: transferability.n_leep(seen.features, seen.labels),
    "h_score": lambda seen: transferability.h_score(seen.features, seen.labels),
    "transrate": lambda seen: transferability.transrate(seen.features, seen.labels),
    "gbc": lambda seen: transferability.gbc(seen.features, seen.labels),
}
"""The scores by name, the default first."""

AS_IN_PAPERS = ("n_leep", "h_score", "transrate", "gbc")
"""What the papers define and features that are noise score the higher in, the wider they are; computed if asked for."""

DEFAULT = tuple(name for name in SCORES if name not in AS_IN_PAPERS)


def check(names: Sequence[str]) -> None:
    """Raise InputError for a score that there is not, for one named twice, and for none."""
    if not names:
        raise InputError(f"--scores names none: give some of {','.join(SCORES)}")
    for name in names:
        if name not in SCORES:
            raise InputError(f"--scores={','.join(names)}: '{name}' is none{plugins.nearest(name, SCORES)}")
        if names.count(name) > 1:
            raise InputError(f"--scores names {name} twice: give each once")


def drawn(made: Settings, budget: str, task: Task, most: int) -> dict[int, np.ndarray]:
    """{seed: which training examples are scored}: those that transfer has, or of more than `most` a balanced part.

    Such a part is drawn under the first seed alone.
    """
    labels, total = np.asarray(task.train.labels), budgets.total(budget, task)
    chosen = budgets.seeds(budget, made.seeds)
    if total > most:
        return {chosen[0]: draw.label_budget(transfer.streams_of(made, chosen[0]).draw, labels, most)}
    return {seed: fits.chosen(made.recipe, budget, task, transfer.streams_of(made, seed).draw)[0] for seed in chosen}


class Scored(NamedTuple):
    """Of one source on one target."""

    scores: Mapping[str, Mapping[str, Score]]
    """{budget: {score: it}}: values and seconds are means over seeds."""
    seconds: float
    """That the features took when they were computed."""


def scored(folder: Path, one: Origin, task: Task, made: Settings, names: Sequence[str], most: int) -> Scored:
    """The scores of a source for a target at all budgets; features and scores that `folder` holds are taken from it."""
    stage, head = origin.before_head(one.model), one.model[-1].name
    place = folder / "features" / f"{one.identity[:12]}-{task.fingerprint[:12]}"
    file = place / "scores.json"
    known, before = _known(file)
    start = time.perf_counter()
    features.write(one, task, {stage: place / stage, head: place / head})
    took = round(time.perf_counter() - start, 3) if before is None else before
    hidden = features.read(place / stage, one, task, stage).train
    logits = features.read(place / head, one, task, head).train
    labels, kept = np.asarray(task.train.labels), dict(known)
    wanted: dict[str, dict[str, list[str]]] = {}
    missing: list[tuple[str, str, Seen]] = []
    for budget in made.train_examples:
        wanted[budget] = {name: [] for name in names}
        for seed, rows in drawn(made, budget, task, most).items():
            groups = _copies(task.train.images[rows])
            seen = Seen(hidden[rows], softmax(logits[rows].astype(float), axis=1), labels[rows], groups)
            for name in names:
                key = f"{name} {budget} {seed} {len(rows)} {_digest(rows)}"
                wanted[budget][name].append(key)
                missing += [(key, name, seen)] if key not in kept else []
    kept |= zip((key for key, _, _ in missing), _side_by_side([(name, seen) for _, name, seen in missing]), strict=True)
    if kept != known:
        directory.write_record(file, {"code": _code(), "seconds": took, "scores": kept})
    found = {
        budget: {name: _mean([Score(*kept[key]) for key in keys]) for name, keys in of.items()}
        for budget, of in wanted.items()
    }
    return Scored(found, took)


def _digest(rows: np.ndarray) -> str:
    """Of whole numbers, int [n]: other numbers, or another order of them, have another.

    >>> _digest(np.array([1, 23])) == _digest(np.array([12, 3])), _digest(np.int32([7])) == _digest(np.int64([7]))
    (False, True)
    """
    return hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()[:16]


def _copies(images: ArrayLike) -> np.ndarray:
    """Examples of one image have one number: int64 [n] of images [n, ...]."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(np.asarray(image).tobytes(), len(numbers)) for image in np.asarray(images)])


@functools.cache
def _code() -> str:
    """SHA-256 of the code that scores are computed by: those of another are not mixed with its own."""
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


def _side_by_side(asked: Sequence[tuple[str, Seen]]) -> Iterator[tuple[float | None, float, str]]:
    """Of each its value, its seconds on one core, and why it has no value or what it warns of."""
    with _heard() as said, threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda one: _timed(SCORES[one[0]], one[1], said), asked)


@contextmanager
def _heard() -> Iterator[dict[int, list[str]]]:
    """{thread: what it warns of}: warnings are caught for all threads at once, or not at all."""
    said: dict[int, list[str]] = defaultdict(list)

    def hear(message: Warning | str, *rest: Any) -> None:
        said[threading.get_ident()].append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear  # type: ignore[assignment]
        yield said


def _timed(score: Callable[[Seen], float], seen: Seen, said: dict[int, list[str]]) -> tuple[float | None, float, str]:
    own = said[threading.get_ident()]
    own.clear()
    start = time.perf_counter()
    try:
        value, reason = score(seen), ""
    except InputError as error:
        value, reason = None, str(error)
    seconds = round(time.perf_counter() - start, 4)
    return value, seconds, reason or " ".join(" ".join(own[:1]).split())[:200]


def _mean(values: Sequence[Score]) -> Score:
    """Over draws; none where any has none."""
    seconds = float(np.mean([one.seconds for one in values]))
    reason = next((one.reason for one in values if one.reason), "")
    if any(one.value is None for one in values):
        return Score(None, seconds, reason)
    return Score(float(ranking.mean(np.array([one.value for one in values], float))), seconds, reason)
