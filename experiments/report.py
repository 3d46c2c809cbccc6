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
        reasons = "; ".join(notes) or "give --runs=DIR, or --results=CSV with --predictions='DIR/*.npz'"
        raise InputError(f"there is no fit to judge: {reasons}")
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
    notes, seen = [], dict[Any, Row]()
    for name in runs:
        try:
            parts, said = evidence.of_directory(Path(name))
        except (InputError, OSError) as error:
            notes.append(f"{name} is left out: {error}")
            continue
        for part in parts:
            places = [(evidence.cell(row, part.longer), row["seed"]) for row in part.rows]
            new = [row for row, place in zip(part.rows, places, strict=True) if not _known(row, seen.get(place))]
            seen |= dict(zip(places, part.rows, strict=True))
            found.append(part._replace(rows=new))
        notes += [note for note in said if note not in notes]
    return found, notes


def _known(row: Row, other: Row | None) -> bool:
    """Whether a fit is one that another run directory holds too, and so enters once."""
    if other is None:
        return False
    prints = ("recipe", "predictions_sha256")
    return row["key"] == other["key"] or all(row.get(name) == other.get(name) is not None for name in prints)


def theirs(results: Path, predictions: str) -> Found:
    """Fits made elsewhere; raises InputError for a table or predictions that are not as this program's text says."""
    try:
        with open(results, newline="", encoding="utf-8") as file:
            rows = [_row(f"'{results}', line {number}", row) for number, row in enumerate(csv.DictReader(file), 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--results={results} cannot be read: {plugins.said(error)}") from error
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
    lacking = [name for name in _NEEDED if not given.get(name)]
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
    for name, value in given.items():
        try:
            row[name] = (
                (int(value) if name in _WHOLE else float(value) if name in _NUMBERS else value) if value else None
            )
        except ValueError as error:
            raise InputError(f"{where}: {name} '{value}' is no number") from error
    if row.get("selected_on") == "test":
        raise InputError(
            f"{where}: its epoch was chosen on the test set, so that set says nothing more: choose on another"
        )
    if str(row["seed"]) in str(row.get("tuning_seeds") or "").split():
        raise InputError(f"{where}: seed {row['seed']} was tuned on: judge fits of other seeds")
    return row


_NUMBERS = ("seconds", "source_accuracy", "trained_parameters", "total_parameters", "source_steps", "step_flops")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    helps.main(argv, str(__doc__), run, Asked, alone=True)


if __name__ == "__main__":
    console.run_main(main)
