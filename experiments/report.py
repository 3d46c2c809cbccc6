"""Judge fits of many runs, or fits made elsewhere, and write one page of their verdicts.

    python -m experiments.report --runs=runs/compared --output=runs/pages
    python -m experiments.report --results=theirs.csv --predictions='runs/*.npz' --output=runs/theirs

--runs=DIR,DIR makes one report of run directories of experiments.transfer, experiments.compare and of the winners of
experiments.search (its run directory, or those in its final/; --per_strategy has scratch among them). For fits made
elsewhere, --results is a CSV with a row a fit: name, source (may be empty), target, strategy (scratch among them),
seed, train_examples; and, as far as known, draw (of the labels, where every seed has every draw), steps, seconds,
source_accuracy, selected_on (none, validation, test: what the epoch was chosen on), tuning_seeds (with spaces).
--predictions names a .npz a fit, NAME.npz, with labels [items] and predicted [items] or probabilities [items, classes],
for the same test examples in the same order; and with groups [items], if it is known which examples are alike (of one
writer, patient or scene). A column diverged says which fits did (true or false): of those predictions needs labels
alone.

A run is judged as it was when it was compared: another --margin, --level, --family, --looks or --against than its own
is refused, and it counts how often its results were looked at. Of what was never judged the first report decides.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)

import csv
import glob
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import (
    command_line,
    confirmation,
    console,
    directory,
    looks,
    tuned,
)
from experiments.runs import predictions as fits_of
from experiments.runs.command_line import flag
from experiments.runs.judging import (
    Judging,
    from_record,
    require_valid,
    spoken_of,
    to_record,
    variation_by_flags,
    with_margin,
)
from experiments.runs.predictions import Predictions
from experiments.runs.settings import FLAGS, Settings
from tljax import files, npz, plugins
from tljax.study.results import Result, extended, from_json, replicate
from tljax.study.summary import with_share
from tljax.study.verdicts import require_family
from tljax.types import InputError

_NEEDED = ("name", "target", "strategy", "seed", "train_examples")
_WHOLE = ("seed", "train_examples", "steps", "draw")


@dataclass(frozen=True)
class ReportFlags:
    """The flags of a report: which fits are judged, and how."""

    runs: tuple[str, ...] = flag(
        (), "run directories; one that is broken or half finished is left out, with a note", place="path"
    )
    results: str | None = flag(None, "a CSV of fits made elsewhere, a row a fit", place="path")
    predictions: str | None = flag(None, "the predictions of the fits in --results, such as 'runs/*.npz'", place="path")
    output: str | None = flag(None, "a folder for report.html, report.md, tables and figures; needed", place="new")
    margin: float | None = flag(
        None, "the margin, as in experiments.compare; default the run's, else 0.5 points, 0.01 of another unit"
    )
    level: float | None = flag(None, "the level of all intervals and verdicts together; default the run's, else 0.95")
    family: str | None = flag(None, "what is judged, area, budgets or a number of labels; default the run's, else area")
    looks: int | None = flag(None, "the number of planned looks at the results; default the run's, else 1")
    against: str | None = flag(None, "the strategy that the others are compared with; default the run's, else scratch")
    primary_family: tuple[str, ...] | None = flag(
        None, "the strategies whose verdicts hold together; default the run's, else all"
    )
    until: str | None = flag(None, "decided: intervals hold at any number of seeds; default as the run was judged")
    verdict_on: str | None = flag(None, "what verdicts are on, target or retention; default the run's, else target")
    ledger: str | None = flag(
        None, "a file that counts all looks, as in experiments.compare", place="path", role="free"
    )


class Runs(NamedTuple):
    """The fits of run directories, and how they were judged."""

    parts: list[list[Predictions]]
    """The fits of each run directory."""
    notes: list[str]
    """The notes on the fits, and on each directory that is left out."""
    judging: dict[str, dict[str, Any]]
    """{run directory: how it was judged}."""
    looks: int
    """The number of looks of the run that was looked at most often."""


def run(options: ReportFlags) -> None:
    """Judge the fits, print the verdicts, write the report."""
    if not options.output:
        raise InputError("--output is not given: name a folder for the report")
    runs = _read_runs(options.runs)
    run_parts, notes = runs.parts, runs.notes
    if options.results:
        run_parts.append([read_fits(Path(options.results), options.predictions or "")])
        notes.append(f"fits of {Path(options.results).name} were made elsewhere, and their table was believed")
        notes.append("what differs between their seeds is not known here")
    parts = [part for each in run_parts for part in each]
    if not any(part.rows for part in parts):
        reasons = "; ".join(notes) or "give --runs=DIR, or --results=CSV with --predictions='DIR/*.npz'"
        raise InputError(f"there is no fit to judge: {reasons}")
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output={options.output} is a file: name a folder")
    judging = _judging(options, runs.judging, parts)
    on = judging.verdict_on
    table = fits_of.right(parts, on)  # raises InputError for what is no study, before it counts as looked at
    fits, places = looks.judged_fits_of_runs(run_parts, judging.against, on), (folder / "looks", looks.place())
    look = max(runs.looks, looks.count(fits, judging, places))
    notes += (
        confirmation.enter_report(options.ledger, parts, judging.against) if options.ledger and on == "target" else []
    )
    folder.mkdir(parents=True, exist_ok=True)
    notes += looks.write(fits, judging, look, places)
    from experiments.pages import compare as page  # draws: matplotlib takes a second to import

    notes = list(dict.fromkeys([*notes, "the verdicts speak of these tasks alone"]))
    study = page.judged(parts, judging, notes, look, table)
    page.write(folder, study, {})
    page.print_tables(study)
    console.say(f"  report: {folder / 'report.html'}")


def _judging(options: ReportFlags, runs: Mapping[str, Mapping[str, Any]], parts: Sequence[Predictions]) -> Judging:
    """How the fits are judged: as their runs were, else as the flags say.

    Raises InputError if the flags differ from a run, if runs were judged differently, and if verdicts are to be on
    retention that was not measured.
    """
    values = {f.name: getattr(options, f.name) for f in command_line.fields(Judging)}
    flag_values = {name: value for name, value in values.items() if value is not None}
    of_fits = {} if (end := fits_of.end_of(parts)) == "last" else {"verdict_of": end}
    judging = from_record({**next(iter(runs.values()), {}), **of_fits, **flag_values})
    require_valid(judging)
    require_family(judging.family)
    judging = with_margin(judging, fits_of.metrics_of(parts, judging.verdict_on).values())
    if judging.verdict_on == "retention" and not any(part.kept for part in parts):
        raise InputError(
            "--verdict_on=retention: no scores of a source's test set are kept with these fits: run their "
            "experiments.compare with --retention"
        )
    for name, before in runs.items():
        looks.refuse_other(judging, before, f"'{name}' was judged")
    return judging


def _read_runs(runs: Sequence[str]) -> Runs:
    """Read run directories; a directory that cannot be read, or holds no fit, becomes a note."""
    contents = Runs([], [], {}, 0)
    most_looks, seen = 0, dict[Any, Result]()
    for name in (place for run in runs for place in _run_or_winners(run, contents.notes)):
        try:
            study = fits_of.read_study(Path(name))
            judging = study.judging
            if judging is None and study.looks:  # by an older tljax, which wrote it to the flags alone
                judging = to_record(Judging(**_flags(Path(name), command_line.kinds(Judging))))
            flag_values = {} if judging else _flags(Path(name), FLAGS)
            rows = [row for part in study.parts for row in part.rows]
            varied = [] if judging else [variation_by_flags(Settings.from_flags(**flag_values), rows)]
            variation_notes = spoken_of(varied)
        except (InputError, OSError) as error:
            contents.notes.append(f"{name} is left out: {error}")
            continue
        if not any(part.rows for part in study.parts):
            why = "; ".join(study.notes) or f"'{name}' holds no fit: run its command again"
            contents.notes.append(f"{name} is left out: {why}")
            continue
        parts = []
        for part in study.parts:
            places = [(fits_of.cell(row, part.longer), replicate(row)) for row in part.rows]
            new = [row for row, place in zip(part.rows, places, strict=True) if not _is_repeated(row, seen.get(place))]
            seen |= dict(zip(places, part.rows, strict=True))
            parts.append(part._replace(rows=new))
        contents.parts.append(parts)
        contents.judging.update({name: judging} if judging else {})
        most_looks = max(most_looks, study.looks)
        contents.notes.extend(note for note in [*study.notes, *variation_notes] if note not in contents.notes)
    return contents._replace(looks=most_looks)


def _run_or_winners(run: str, notes: list[str]) -> list[str]:
    """[the run directory], or for a search the run directories of its winners, and then a note is added."""
    winners = tuned.winners(Path(run)) if (Path(run) / "final").is_dir() else {}
    if not winners:
        return [run]
    folders = [
        str(folder)
        for folder in sorted((Path(run) / "final").iterdir())
        for name, values in winners.items()
        if (len(winners) == 1 or folder.name == name or folder.name.startswith(f"{name}-"))
        and (folder / "flags.flags").is_file()
        and not directory.of_another_experiment(folder, Settings.from_flags(**values))
    ]
    notes.append(f"tuned: every strategy has what {Path(run).name} found best for it")
    return list(dict.fromkeys(folders)) or [run]


def _is_repeated(row: Result, other: Result | None) -> bool:
    """Whether two run directories hold the same fit, so that it enters once."""
    if other is None:
        return False
    digests = [(each.recipe, each.predictions_sha256) for each in (row, other)]
    return row.key == other.key or (None not in digests[0] and digests[0] == digests[1])


def _flags(run: Path, kinds: Mapping[str, command_line.Kind]) -> dict[str, Any]:
    """The values in flags.flags of a run directory of the flags in `kinds`, {flag: its kind}."""
    return command_line.parse(["report", *directory.recorded_lines(run, kinds)], kinds)


def read_fits(csv_file: Path, predictions: str) -> Predictions:
    """Read fits made elsewhere: a CSV, and the files of predictions that a pattern names.

    Raises InputError if the table or the predictions are not of the form that the help of this program describes.
    """
    try:
        table = csv.DictReader(io.StringIO(files.text(csv_file), newline=""))
        names = [str(name) for name in table.fieldnames or ()]
        npz.refuse_slips(names, (*_NEEDED, *_KNOWN, "diverged"), f"'{csv_file}'", "column")
        _require_columns(f"'{csv_file}'", names)
        results = [_result(f"'{csv_file}', line {table.line_num}", cells) for cells in table]
    except (OSError, csv.Error) as error:
        raise InputError(f"--results={csv_file} cannot be read: {plugins.describe(error)}") from error
    others = [name for name in names if name not in (*_NEEDED, *_KNOWN, "diverged")]
    if others:
        console.say(f"'{csv_file}' has columns that are not read: {', '.join(others)[:200]}")
    _refuse_repeated(results)
    files_by_name = {Path(file).stem: Path(file) for file in _matching(predictions)}
    missing = [result.name for result in results if result.name not in files_by_name]
    if missing or not results:
        what = (
            f"--predictions={predictions} names no '{missing[0]}.npz'"
            if missing
            else f"--results={csv_file} has no row"
        )
        raise InputError(f"{what}: a fit is a row and a file of its name")
    predictions_by_name = {result.name: fits_of.read(files_by_name[result.name]) for result in results}
    labels: dict[str, np.ndarray] = {}
    measured, parts = [], []
    for result in results:
        file, (predicted, its_labels) = files_by_name[result.name], predictions_by_name[result.name]
        labels_of_first = labels.setdefault(result.target, its_labels)
        if labels_of_first.shape != its_labels.shape or (labels_of_first != its_labels).any():
            raise InputError(f"'{file}' has other labels than the other fits of '{result.target}'")
        accuracy = None if result.diverged else float((predicted == its_labels).mean())
        measured.append(extended(result, {"test_accuracy": accuracy, "key": _key(result, predicted, its_labels)}))
        groups = fits_of.groups_in(file)
        parts.append(Predictions([], {}, {}, {} if groups is None else {result.target: groups}))
    settled = [result for each in measured for result in with_share([each], labels[each.target])]
    predicted_classes = {result.name: predictions_by_name[result.name][0] for result in results if not result.diverged}
    return Predictions(settled, predicted_classes, labels, fits_of.all_groups(parts))


def _matching(pattern: str) -> list[str]:
    """The files that a pattern matches; brackets in the name of an existing folder are taken literally."""
    folder, name = os.path.split(pattern)
    literal = glob.escape(folder) if os.path.isdir(folder) else folder
    return [pattern] if os.path.isfile(pattern) else glob.glob(os.path.join(literal, name))


def _require_columns(what: str, headings: Sequence[str]) -> None:
    """Raise InputError if a table lacks a column that is needed; the error names the columns that it has."""
    missing = [name for name in _NEEDED if name not in headings]
    if headings and missing:
        listed = ", ".join(map(repr, headings))[:200]
        raise InputError(
            f"{what} has no column {missing[0]}: the columns {', '.join(_NEEDED)} are needed, with commas between "
            f"them; the table has: {listed}"
        )


def _key(result: Result, predicted: np.ndarray, labels: np.ndarray) -> str:
    """The key of a fit made elsewhere: a digest of its row of the table and its predictions."""
    about = [*_cell(result), result.diverged]
    digest = hashlib.sha256(repr(about).encode())
    for part in (predicted, labels):
        digest.update(np.ascontiguousarray(part, np.int64).tobytes())
    return digest.hexdigest()


def _cell(result: Result) -> tuple[Any, ...]:
    """The fields that no two fits of a table have in common."""
    draw = () if result.draw is None else (result.draw,)
    return result.source, result.target, result.strategy, result.seed, result.train_examples, *draw


def _result(where: str, cells: dict[str, Any]) -> Result:
    """The fit of a row of the table; its key is `where` the row stands, until its predictions are read."""
    missing = [name for name in _NEEDED if not (cells.get(name) or "").strip()]
    if missing:
        raise InputError(f"{where} has no {missing[0]}: the columns {', '.join(_NEEDED)} are needed")
    row: dict[str, Any] = {
        "source": None,
        "options": {},
        "steps": None,
        "seconds": None,
        "diverged": False,
        "key": where,
    }
    if None in cells:
        raise InputError(f"{where} has more cells than the table has columns: give each a heading")
    for name in (name for name in (*_NEEDED, *_KNOWN) if (cells.get(name) or "").strip()):
        row[name] = _value(where, name, cells[name].strip())
    row["diverged"] = _yes_or_no(where, "diverged", cells.get("diverged"))
    if row.get("selected_on") == "test":
        raise InputError(
            f"{where}: its epoch was chosen on the test set, so that set says nothing more: choose on another"
        )
    if str(row["seed"]) in str(row.get("tuning_seeds") or "").split():
        raise InputError(f"{where}: seed {row['seed']} was tuned on: judge fits of other seeds")
    return from_json(row)


def _yes_or_no(where: str, name: str, text: str | None) -> bool:
    """Whether a cell says yes; an empty one says no. Raises InputError if it says anything else."""
    word = (text or "").strip().lower() or "no"
    if word not in _YES | _NO:
        raise InputError(f"{where}: {name} '{text}' is neither true nor false: write one of them")
    return word in _YES


_YES, _NO = {"true", "yes", "1"}, {"false", "no", "0"}
_FRACTIONS = ("source_accuracy",)
_NUMBERS = ("seconds", "trained_parameters", "total_parameters", "source_steps", "step_flops", *_FRACTIONS)
_KNOWN = ("source", "steps", "draw", "selected_on", "tuning_seeds", *_NUMBERS)
"""Optional columns."""


def _value(where: str, name: str, text: str) -> Any:
    """The value of a cell; raises InputError if it cannot be in its column.

    >>> _value("line 2", "seed", "3"), _value("line 2", "seconds", "0.5")
    (3, 0.5)
    """
    if name not in (*_WHOLE, *_NUMBERS):
        return text
    try:
        number = int(text) if name in _WHOLE else float(text)
    except ValueError as error:
        raise InputError(f"{where}: {name} '{text}' is no number") from error
    least, most = 0 if name in ("seed", "draw", *_NUMBERS) else 1, 1 if name in _FRACTIONS else 10**18
    if not least <= number <= most:
        ends = f"between {least} and {most}" if name in _FRACTIONS else f"{least} or more"
        raise InputError(f"{where}: {name} is {text[:40]}: it must be {ends}, and finite")
    return number


def _refuse_repeated(results: Sequence[Result]) -> None:
    """Raise InputError if two rows have the same name, or are of the same fit."""
    seen: dict[Any, Result] = {}
    for result in results:
        for what in (("name", result.name), _cell(result)):
            if (other := seen.setdefault(what, result)) is not result:
                raise InputError(f"{result.key} tells of the fit of {other.key} again: leave one of both out")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), lambda _, options: run(options), ReportFlags)
