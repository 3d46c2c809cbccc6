"""Looks: how often fits have been judged, which belongs to the test set and the fits, and not to a folder.

Every judgement leaves a record, in the folder of its report and in ~/.cache/tljax/looks (or XDG_CACHE_HOME): which fits
were judged on which test set, how, and which look that was. So a copy of a run directory, a new one with the same
seeds, or a report of it, is known again on the same machine by the same user. Where there are neither records nor a
cache, as on another machine, nothing is known of what was looked at before. Fits of which no verdict can be given, for
want of a second seed, are no look.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import directory
from experiments.runs.judging import Judging, to_record
from experiments.runs.predictions import JUDGING, Predictions, cell
from tljax import files
from tljax.study.results import Replicate, Result, replicate
from tljax.study.summary import label
from tljax.study.verdicts import Cell
from tljax.types import InputError


class JudgedFits(NamedTuple):
    """Fits that are judged together on one test set."""

    test_set: str
    """Digest of the test labels."""
    fits: frozenset[str]
    """Keys of the fits, but for those that all others are compared with."""
    bases: frozenset[str]
    """Keys of the fits that all others are compared with: beside others it is another look."""
    predictions: frozenset[str] = frozenset()
    """Digests of what `fits` predict, where they are trained: a fit is known by them under any name."""
    base_predictions: frozenset[str] = frozenset()
    """Digests of what `bases` predict."""


def judged_fits(parts: Sequence[Predictions], against: str, on: str = "target") -> list[JudgedFits]:
    """The fits that are judged where `parts` are judged against a strategy: a set for each test set.

    `on` is what verdicts are on, as `Judging.verdict_on`. A target without two seeds of any strategy, each beside one
    of what it is compared with, has no set: it gets no verdict.
    """
    able = judgeable(((cell(row, part.longer), replicate(row)) for part in parts for row in part.rows), against)
    by_test_set: dict[str, tuple[set[str], set[str], set[str], set[str]]] = {}
    for part in parts:
        for row in part.rows:
            test_set = _test_set(part, row, on)
            if test_set is None or part.longer or (label(row) == "scratch" != against):
                continue
            if row.target not in able:
                continue
            sets = by_test_set.setdefault(test_set, (set(), set(), set(), set()))
            base = label(row) == against
            sets[base].add(row.key)
            if row.name in part.predicted:
                sets[2 + base].add(name_of_test_set(part.predicted[row.name]))
            elif row.name in part.scores:
                sets[2 + base].add(name_of_test_set(part.scores[row.name]))
    return [JudgedFits(name, *map(frozenset, sets)) for name, sets in by_test_set.items() if sets[0]]


def _test_set(part: Predictions, row: Result, on: str) -> str | None:
    """The digest of the test set that a fit is judged on; None where it has no scores there."""
    if on == "retention":
        return part.kept_sets.get(row.source or "") if row.name in part.kept else None
    return name_of_test_set(part.labels[row.target]) if row.target in part.labels else None


def judgeable(fits: Iterable[tuple[Cell, Replicate]], against: str) -> set[str]:
    """The targets of which a verdict can be given, of (cell, seed, or seed and draw) of each fit.

    A verdict takes two seeds of a strategy at a budget, each beside a fit of `against`.

    >>> fits = [(Cell("a", "b", "full", 10), seed) for seed in (0, 1)] + [(Cell(None, "b", "scratch", 10), 0)]
    >>> judgeable(fits, "scratch"), judgeable([*fits, (Cell(None, "b", "scratch", 10), 1)], "scratch")
    (set(), {'b'})
    """
    seeds: dict[Cell, set[Replicate]] = {}
    for of_fit, seed in fits:
        seeds.setdefault(of_fit, set()).add(seed)
    able = set()
    for of_strategy, its_seeds in seeds.items():
        source = None if against == "scratch" else of_strategy.source
        shared = its_seeds & seeds.get(of_strategy._replace(source=source, strategy=against), set())
        if of_strategy.strategy not in ("scratch", against) and not of_strategy.longer and len(shared) > 1:
            able.add(of_strategy.target)
    return able


def name_of_test_set(labels: np.ndarray) -> str:
    """The digest that a test set is known by, of its labels, int [items], or other targets: sixteen hexadecimal digits.

    Classes are the same whatever the type of their numbers.
    """
    array = np.asarray(labels)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return hashlib.sha256(np.ascontiguousarray(array, np.int64).tobytes()).hexdigest()[:16]
    about = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(about + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def place() -> Path | None:
    """The folder of looks in the cache of the user; None where there is no home."""
    try:
        return files.place(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tljax" / "looks"
    except InputError:
        return None


def judged_fits_of_runs(runs: Sequence[Sequence[Predictions]], against: str, on: str = "target") -> list[JudgedFits]:
    """The fits that are judged of several runs: each run by itself, but together where runs share a cell.

    Runs share a cell where one has other seeds of it: to pool the seeds of one cell is to look at it again. Runs that
    share no cell are tabled together: no comparison has other fits than when its run was judged.
    """
    cells = [{(cell(row, part.longer), row.key) for part in run for row in part.rows} for run in runs]
    pooled: list[list[int]] = []
    for i in range(len(runs)):
        judged = {where for where, _ in cells[i] if where.strategy not in ("scratch", against) and not where.longer}
        near = [group for group in pooled if any(judged & {where for where, _ in cells[j]} for j in group)]
        pooled = [group for group in pooled if group not in near] + [[i, *(j for group in near for j in group)]]
    together = ([part for i in sorted(group) for part in runs[i]] for group in pooled)
    return [fits for parts in together for fits in judged_fits(parts, against, on)]


def count(judged: Sequence[JudgedFits], judging: Judging, places: Collection[Path | None]) -> int:
    """Which look this is, the first being 1, by the records in `places`; 0 where nothing is judged. It writes nothing.

    Fits that were judged before are the same look again; where other fits were judged among them, each such judgement
    was a look. Against another strategy it is another question, and no look at this one. Raises InputError where they
    were judged by another margin, level, family or number of looks.
    """
    look = 0
    for fits in judged:
        records = _records(fits, judging.against, places)
        for record in records:
            refuse_other(judging, record["judging"], "these fits were judged before")
        same = [record["look"] for record in records if _same(fits, record)]
        others = {(*record["fits"], *record["bases"]) for record in records}
        look = max(look, min(same) if same else 1 + len(others))
    return look


def write(judged: Sequence[JudgedFits], judging: Judging, look: int, places: Collection[Path | None]) -> list[str]:
    """Leave a record of a judgement in each place; returns notes for where that cannot be."""
    notes = []
    for folder in places:
        for fits in judged:
            sets = {name: sorted(keys) for name, keys in fits._asdict().items() if name != "test_set"}
            record = {"look": look, "judging": to_record(judging), **sets}
            try:
                if folder is None:
                    raise OSError("there is no home")
                file = folder / fits.test_set / f"{_digest([judging.against, *fits.fits, *fits.bases])}.json"
                if not file.is_file():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    directory.write_record(file, record)
            except OSError as error:
                notes.append(f"looks are counted in this run's folder alone ({error.strerror or error})")
    return list(dict.fromkeys(notes))


def refuse_other(judging: Judging, before: Mapping[str, Any], what: str) -> None:
    """Raise InputError unless fits are judged as they were before; `what` begins the message."""
    record = to_record(judging) | {"verdict_of": judging.end}
    before = {"verdict_of": "last", **before}
    primary = record.pop("primary_family", [])
    differ = [
        f"--{name}={before[name]}, not {value}" for name, value in record.items() if before.get(name, value) != value
    ]
    if (of_before := before.get("primary_family", [])) != primary:
        differ.append(f"--primary_family={','.join(of_before)}, not {','.join(primary)}")
    if before.get("verdict_on", "target") != judging.verdict_on:
        differ.append(f"--verdict_on={before.get('verdict_on', 'target')}, not {judging.verdict_on}")
    if before.get("until") != judging.until:
        then, now = (f"--until={until}" if until else "no --until" for until in (before.get("until"), judging.until))
        differ.append(f"{then}, not {now}")
    if differ:
        raise InputError(
            f"{what} with {', '.join(differ)}: what counts as a difference is chosen before the first look; leave it "
            "as it was, or judge fits of seeds that were not looked at"
        )


_RECORD: dict[str, Any] = {"look": int, "judging": {**JUDGING, "against": str}}
_RECORD |= {name: [str] for name in JudgedFits._fields if name != "test_set"}
"""The form of a record, which `write` writes."""


def _records(judged: JudgedFits, against: str, places: Collection[Path | None]) -> list[dict[str, Any]]:
    """The judgements of such a comparison that share a fit; raises InputError for a record that is damaged."""
    records = []
    for folder in places:
        files_of = sorted((folder / judged.test_set).glob("*.json")) if folder else []
        records += [record for file in files_of if (record := directory.read_record(file, _RECORD)) is not None]
    known_by = {*judged.fits, *judged.predictions}
    return [
        record
        for record in records
        if known_by & {*record["fits"], *record["predictions"]}
        and (record["judging"]["against"] == against or judged.base_predictions & set(record["base_predictions"]))
    ]


def _same(judged: JudgedFits, record: Mapping[str, Any]) -> bool:
    """Whether a record is of the same fits, and of the same beside them: by their keys, or by what they predict."""
    before = {name: frozenset(record[name]) for name in JudgedFits._fields if name != "test_set"}
    same_keys = judged.fits == before["fits"] and judged.bases == before["bases"]
    predictions = (judged.predictions, judged.base_predictions)
    return same_keys or (all(predictions) and predictions == (before["predictions"], before["base_predictions"]))


def _digest(texts: Collection[str]) -> str:
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]
