"""Verdicts and one page of many runs, or of fits made elsewhere.

    python -m experiments.report --runs=runs/compared --output=runs/pages
    python -m experiments.report --results=theirs.csv --predictions='runs/*.npz' --output=runs/theirs

--runs=DIR,DIR makes one report of run directories of experiments.transfer and experiments.compare. For fits made
elsewhere, --results is a CSV with a row a fit: name, source (may be empty), target, strategy (scratch among them),
seed, train_examples; and, as far as known, steps, seconds, source_accuracy, selected_on (none, validation, test: what
the epoch was chosen on), tuning_seeds (with spaces). --predictions names a .npz a fit, NAME.npz, with labels [items]
and predicted [items] or probabilities [items, classes], for the same test examples in the same order.
"""

import csv
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import compare_flags, console, evidence, helps, verdicts
from experiments.commandline import flag
from experiments.compare_flags import Judging
from experiments.evidence import Found
from tljax import plugins
from tljax.study.summary import Row
from tljax.types import InputError

_NEEDED = ("name", "target", "strategy", "seed", "train_examples")
_WHOLE = ("seed", "train_examples", "steps")


@dataclass(frozen=True)
class Asked(Judging):
    """Which fits are judged, and how."""

    runs: tuple[str, ...] = flag((), "run directories; one that is broken or half finished is left out, aloud")
    results: str | None = flag(None, "a CSV of fits made elsewhere")
    predictions: str | None = flag(None, "their predictions, such as 'runs/*.npz'")
    output: str | None = flag(None, "a folder for report.html, report.md, tables and figures; needed")


def run(asked: Asked) -> None:
    """Judge the fits, print the verdicts, write the report."""
    compare_flags.check(asked)
    if not asked.output:
        raise InputError("--output is not given: name a folder for the report")
    found, notes = _of_runs(asked.runs)
    if asked.results:
        found.append(theirs(Path(asked.results), asked.predictions or ""))
        notes.append(f"fits of {Path(asked.results).name} were made elsewhere, and their table was believed")
    if not any(part.rows for part in found):
        raise InputError("there is no fit to judge: give --runs=DIR, or --results=CSV with --predictions='DIR/*.npz'")
    folder = Path(asked.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output={asked.output} is a file: name a folder")
    told = verdicts.judged(found, asked, list(dict.fromkeys([*notes, "they speak of these tasks alone"])))
    folder.mkdir(parents=True, exist_ok=True)
    verdicts.write(folder, told, {})
    verdicts.tables(told)
    console.say(f"  report: {folder / 'report.html'}")


def _of_runs(runs: Sequence[str]) -> tuple[list[Found], list[str]]:
    """(what run directories hold, what is to be said of it, and of each that is left out)."""
    found: list[Found] = []
    notes, seen = [], dict[Any, str]()
    for name in runs:
        try:
            parts, said = evidence.of_directory(Path(name))
            for part in parts:
                for row in part.rows:
                    what = evidence.cell(row, part.longer), row["seed"]
                    if seen.setdefault(what, row["key"]) != row["key"]:
                        raise InputError(f"{row['name']} is there already, with other hyper-parameters")
        except (InputError, OSError) as error:
            notes.append(f"{name} is left out: {error}")
            continue
        found += parts
        notes += [note for note in said if note not in notes]
    return found, notes


def theirs(results: Path, predictions: str) -> Found:
    """Fits made elsewhere; raises InputError for a table or predictions that are not as this program's text says."""
    try:
        with open(results, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows = [_row(f"'{results}', line {table.line_num}", row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--results={results} cannot be read: {plugins.said(error)}") from error
    others = [str(name) for name in table.fieldnames or () if name not in (*_NEEDED, *_KNOWN, "diverged")]
    if others:
        console.say(f"'{results}' has columns that are not read: {', '.join(others)[:200]}")
    _refuse_twice(rows)
    files = {Path(file).stem: Path(file) for file in glob.glob(predictions)}
    lacking = [row["name"] for row in rows if row["name"] not in files]
    if lacking or not rows:
        what = (
            f"--predictions={predictions} names no '{lacking[0]}.npz'" if lacking else f"--results={results} has no row"
        )
        raise InputError(f"{what}: a fit is a row and a file of its name")
    known = {row["name"]: evidence.read(files[row["name"]]) for row in rows}
    labels: dict[str, Any] = {}
    for row in rows:
        predicted, own = known[row["name"]]
        first = labels.setdefault(row["target"], own)
        if first.shape != own.shape or (first != own).any():
            raise InputError(f"'{files[row['name']]}' has other labels than the other fits of '{row['target']}'")
        row["test_accuracy"] = float((predicted == own).mean())
    return Found(rows, {name: one[0] for name, one in known.items()}, labels)


def _row(where: str, given: dict[str, Any]) -> dict[str, Any]:
    lacking = [name for name in _NEEDED if not (given.get(name) or "").strip()]
    if lacking:
        raise InputError(f"{where} has no {lacking[0]}: the columns {', '.join(_NEEDED)} are needed")
    row: dict[str, Any] = {
        "source": None,
        "options": {},
        "steps": None,
        "seconds": None,
        "diverged": False,
        "key": where,
    }
    if None in given:
        raise InputError(f"{where} has more cells than the table has columns: give each a heading")
    for name in (name for name in (*_NEEDED, *_KNOWN) if (given.get(name) or "").strip()):
        row[name] = _value(where, name, given[name].strip())
    row["diverged"] = _whether(where, "diverged", given.get("diverged"))
    if row.get("selected_on") == "test":
        raise InputError(
            f"{where}: its epoch was chosen on the test set, so that set says nothing more: choose on another"
        )
    if str(row["seed"]) in str(row.get("tuning_seeds") or "").split():
        raise InputError(f"{where}: seed {row['seed']} was tuned on: judge fits of other seeds")
    return row


def _whether(where: str, name: str, text: str | None) -> bool:
    """A cell that says yes or no, or nothing for no; raises InputError for another."""
    word = (text or "no").strip().lower()
    if word not in _YES | _NO:
        raise InputError(f"{where}: {name} '{text}' is neither true nor false: write one of them")
    return word in _YES


_YES, _NO = {"true", "yes", "1"}, {"false", "no", "0"}
_FRACTIONS = ("source_accuracy",)
_NUMBERS = ("seconds", "trained_parameters", "total_parameters", "source_steps", "step_flops", *_FRACTIONS)
_KNOWN = ("source", "steps", "selected_on", "tuning_seeds", *_NUMBERS)
"""Columns that are read where they are there."""


def _value(where: str, name: str, text: str) -> Any:
    """What a cell says; raises InputError for what cannot be in its column.

    >>> _value("line 2", "seed", "3"), _value("line 2", "seconds", "0.5")
    (3, 0.5)
    """
    if name not in (*_WHOLE, *_NUMBERS):
        return text
    try:
        number = int(text) if name in _WHOLE else float(text)
    except ValueError as error:
        raise InputError(f"{where}: {name} '{text}' is no number") from error
    least, most = 0 if name in ("seed", *_NUMBERS) else 1, 1 if name in _FRACTIONS else 10**18
    if not least <= number <= most:
        ends = f"between {least} and {most}" if name in _FRACTIONS else f"{least} or more"
        raise InputError(f"{where}: {name} is {text[:40]}: it must be {ends}, and finite")
    return number


def _refuse_twice(rows: Sequence[Row]) -> None:
    """Raise InputError for a name that two rows have, and for two rows that tell of one fit."""
    seen: dict[Any, Row] = {}
    for row in rows:
        cell = tuple(row[name] for name in ("source", "target", "strategy", "seed", "train_examples"))
        for what in (("name", row["name"]), cell):
            if (other := seen.setdefault(what, row)) is not row:
                raise InputError(f"{row['key']} tells of the fit of {other['key']} again: leave one of both out")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    helps.main(argv, str(__doc__), run, Asked, alone=True)


if __name__ == "__main__":
    console.run_main(main)
