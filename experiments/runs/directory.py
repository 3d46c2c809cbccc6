"""The run directory: its files are opened, read, recorded and replaced here, and nothing in it is written elsewhere.

First who may write to it and with which flags, then signed files, results, and the environments of its fits.
"""

import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments.runs import command_line, console, fields, process
from experiments.runs.settings import (
    FLAGS,
    GROWING,
    Recipe,
    Settings,
    as_compared,
    parse_flags,
    refuse_shared_names,
    written,
)
from tljax import __version__, checkpoint, files, paths, plugins, switches
from tljax.study.results import Result, from_json, replicate, to_json
from tljax.types import InputError


@contextmanager
def opened(
    settings: Settings,
    program: str,
    more: Sequence[str] = (),
    older: Settings | None = None,
    leave: Collection[str] = (),
) -> Iterator[Path]:
    """The run directory of these settings, opened by the first process as `_opened` says, for all processes of the run.

    Raises InputError as it does, and where another process does not see the directory.
    """
    first = process.first()
    with (
        _opened(settings, program, more, older, leave) if first else nullcontext(Path(settings.workdir or "")) as folder
    ):
        process.wait("opened")
        if not (folder / "flags.flags").is_file():
            raise InputError(f"process {jax.process_index()} sees no --workdir={folder}: name a folder that all share")
        yield folder
        process.wait("done")


@contextmanager
def _opened(
    settings: Settings, program: str, more: Sequence[str], older: Settings | None, leave: Collection[str]
) -> Iterator[Path]:
    """The run directory of these settings, this process's own until the end; what is damaged in it is set aside.

    Raises InputError where none is given, another process has it, or it holds another experiment; then nothing in
    it is changed. Lists (strategies, seeds, budgets) may grow. `more` are flagfile lines beside those of the settings.
    A flagfile without a line of `more` is an older tljax's, which wrote the settings `older`: it is written anew.
    Flags to `leave` decide nothing in this run: they are neither compared nor written.
    """
    if settings.workdir is None:
        raise InputError("--workdir is not given: name a new folder for the run, such as --workdir=runs/first")
    workdir = Path(settings.workdir)
    if "\0" in settings.workdir:
        raise InputError(f"--workdir={settings.workdir!r} holds a zero byte, which no path may: name another")
    if (odd := files.not_text(workdir)) is not None:
        raise InputError(f"--workdir={workdir}: '{odd}' is no UTF-8, and checkpoints need a path that is: name another")
    _refuse_strangers(workdir)
    _refuse_links(workdir)
    _flags(workdir, settings, program, more, older, leave)
    _refuse_other_switches(workdir)
    _refuse_other_format(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with process.locked(workdir):
        replace(workdir / "flags.flags", signed(_flags(workdir, settings, program, more, older, leave)))
        for name in ("", *FOLDERS):
            files.sweep(workdir / name)
        _set_damaged_aside(workdir)
        shutil.rmtree(workdir / process.STREAMS, ignore_errors=True)  # of a process that was killed
        try:
            yield workdir
        except OSError as error:
            error.filename = error.filename or str(workdir)  # a write into an open file does not say where
            raise
        finally:
            shutil.rmtree(workdir / process.STREAMS, ignore_errors=True)


FOLDERS = (
    *("checkpoints", "predictions", "masks", "metrics", "progress", "evals", "cards", "features", "best", "final"),
    *("figures", "tables", process.STREAMS),
)
"""The folders that programs write in a run directory."""


def _refuse_strangers(workdir: Path) -> None:
    """Raise InputError for a file, and for a folder that holds other files and no run."""
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file: name a new folder")
    first = {".lock", "flags.flags.partial"}  # all that is there if a run is killed in its first moment
    begun = not workdir.is_dir() or (workdir / "flags.flags").is_file()
    if not begun and {f.name for f in workdir.iterdir() if not f.name.endswith(".flags.flags.partial")} - first:
        raise InputError(f"--workdir={workdir} holds other files and no run: name a new folder")


def _refuse_links(workdir: Path) -> None:
    """Raise InputError for a link, a pipe or a device where programs write or read: a link may lead anywhere.

    Files at the top are another matter: they are replaced, not written into.
    """
    for top in (workdir / name for name in FOLDERS):
        if top.is_symlink() or (os.path.lexists(top) and not top.is_dir()):
            raise InputError(f"'{top}' is a link or a file where a folder is to be: remove it")
        for place, folders, names in os.walk(top):
            for entry in (os.path.join(place, name) for name in (*folders, *names)):
                kind = os.lstat(entry).st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    raise InputError(f"'{workdir}' holds a link or a device, '{entry}': remove it")


FORMAT = 3
"""Of the keys of fits: it goes up when code comes to give other bits under the same settings, or other things enter a
key. Format 1 was a digest of the text of dataclasses, their names among it; 3 came with other orders of sums in the
gradients of convolutions on a CPU, and of few elements of a leaf."""


def _refuse_other_format(workdir: Path) -> None:
    """Raise InputError where the run's fits have keys of another format, by which none could be found again.

    Whether it has the format of now is not known where environment.json is gone; then its fits have other keys than
    those that are planned, and are superseded aloud.
    """
    known, fits = _provenance(workdir), results(workdir)
    number = known.get("format", 1) if known else FORMAT
    if fits and number != FORMAT:
        age = "an older" if number < FORMAT else "a newer"
        raise InputError(
            f"'{workdir}' holds fits of {age} tljax (format {number} of their keys): report reads them; choose another "
            "--workdir to go on"
        )


def make_folder(place: Path) -> Path:
    """The folder at `place`, made unless it is there; raises InputError for a link, which may lead anywhere."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise InputError(f"'{place}' is a link or a file where a folder is to be: remove it")
    place.mkdir(exist_ok=True)
    return place


def _refuse_other_switches(workdir: Path) -> None:
    """Raise InputError where the run's fits were trained under other switches of JAX: their streams are not to mix."""
    about = recorded_environment(workdir)
    recorded = about.get("switches", {}) if isinstance(about, dict) else None
    if not isinstance(recorded, dict):
        return
    current = switches.changed()
    names = [name for name in sorted({*recorded, *current}) if recorded.get(name) != current.get(name)]
    if names:
        listed = "; ".join(
            f"{name}={recorded.get(name, 'unset')} there, {current.get(name, 'unset')} here" for name in names
        )
        raise InputError(
            f"'{workdir}' was trained under other switches ({listed}): set them alike, or choose another --workdir"
        )


def _flags(
    workdir: Path,
    settings: Settings,
    program: str,
    more: Sequence[str],
    older: Settings | None,
    leave: Collection[str],
) -> str:
    """The run's flagfile, with what is new in its lists; raises InputError if it is of another experiment."""
    file = workdir / "flags.flags"
    head = f"# python -m experiments.{program} --flagfile=WORKDIR/{file.name} --workdir=NEW\n"
    current_lines = [
        files.to_bytes(line).decode() for line in [*settings.flagfile_lines(), *more]
    ]  # as they are in the file
    current = {name: values for name, values in _values(current_lines).items() if name not in leave}
    written_from: list[str] = []
    if file.is_file():
        text = flags_text(file)
        head = text.splitlines()[0] + "\n" if text.startswith("#") else head
        written_from = command_line.written_from(file)[::-1]
        every_recorded = _values(_flag_lines(text))
        recorded = {name: values for name, values in every_recorded.items() if name not in leave}
        lists: Sequence[str] = GROWING
        compared, neutral = current, settings.of_older_runs()
        if older and not _values(more).keys() & recorded.keys():
            compared, neutral = _values(older.flagfile_lines()), older.of_older_runs()
            lists = tuple(name for name in GROWING if getattr(older, name) == getattr(settings, name))
        unsaid = {name: [written(value)] for name, value in neutral.items() if name in compared}
        _refuse_another_experiment(workdir, unsaid | recorded, compared)
        for name in lists:
            recorded_text = recorded.get(name, [""])[-1]
            try:
                parse_flags(["", f"--{name}={recorded_text}"])
            except InputError as error:
                raise InputError(f"'{file}': {error}: restore it, or choose another --workdir") from error
            old, new = recorded_text.split(","), current[name][-1].split(",")
            current[name] = [",".join([*old, *(value for value in new if value not in old)])]
        refuse_shared_names([text for text in plugins.split(current["strategies"][-1], ",") if text])
    folders = dict.fromkeys([*written_from, *working_directory()])
    head += "".join(f"{command_line.PATHS_FROM}{folder}\n" for folder in folders)
    return head + "".join(f"--{name}={value}\n" for name, values in current.items() for value in values)


def working_directory() -> list[str]:
    """The working directory, from which the paths in a flagfile are; none where it is gone, or no line can say it."""
    try:
        folder = files.to_bytes(os.getcwd()).decode()
    except OSError:
        return []
    return [] if "\n" in folder else [folder]


def of_another_experiment(workdir: Path, settings: Settings) -> bool:
    """Whether a run directory is there and holds another experiment than these settings'; raises InputError as `opened`
    does for a flagfile that is not as it was written."""
    if not (workdir / "flags.flags").is_file():
        return False
    recorded = recorded_flags(workdir)
    unsaid = {name: [written(value)] for name, value in settings.of_older_runs().items()}
    try:
        _refuse_another_experiment(workdir, unsaid | recorded, _values(settings.flagfile_lines()))
    except InputError:
        return True
    return False


def recorded_flags(workdir: Path) -> dict[str, list[str]]:
    """{flag: its values, in order} in the flagfile of a run directory; {} where there is none.

    Raises InputError for one that is not as it was written.
    """
    file = workdir / "flags.flags"
    return _values(_flag_lines(flags_text(file))) if file.is_file() else {}


def recorded_lines(workdir: Path, names: Container[str]) -> list[str]:
    """The lines of a run directory's flagfile that give flags of these names.

    Raises InputError for a flagfile that is not there, or not as it was written.
    """
    lines = _flag_lines(flags_text(workdir / "flags.flags"))
    return [line for line in lines if line[2:].partition("=")[0] in names]


def recorded_settings(workdir: Path) -> Settings:
    """The settings that a run directory's flagfile gives; raises InputError as `recorded_lines` does."""
    return Settings.from_flags(**parse_flags(["", *recorded_lines(workdir, FLAGS)]))


def _flag_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("--")]


def _values(lines: Iterable[str]) -> dict[str, list[str]]:
    """{flag: its values, in order} of flagfile lines: a flag may be given several times."""
    values: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line[2:].partition("=")
        values.setdefault(name, []).append(value)
    return values


def _refuse_another_experiment(
    workdir: Path, recorded: Mapping[str, list[str]], current: Mapping[str, list[str]]
) -> None:
    """Raise InputError where the flags of the run directory, {flag: values}, differ from the current ones."""
    recorded, current = (
        {name: [as_compared(name, value) for value in values] for name, values in flags.items()}
        for flags in (recorded, current)
    )
    names = sorted((recorded.keys() | current.keys()) - command_line.may_differ())
    changes = {
        name: (recorded.get(name, []), current.get(name, []))
        for name in names
        if recorded.get(name) != current.get(name)
    }
    # A twin that was not given follows its flag: it is the same change. The source in a checkpoint is trained already.
    trained = "source_checkpoint" in recorded and recorded["source_checkpoint"] == current.get("source_checkpoint")
    differ = [
        f"--{name}={','.join(there) or 'none'} there, {','.join(here) or 'none'} here"
        for name, (there, here) in changes.items()
        if changes.get(name.removeprefix("source_"), ()) != (there, here) or not name.startswith("source_")
        if not (trained and name.startswith("source_") and name.removeprefix("source_") in vars(Recipe()))
    ]
    if differ:
        listed = "; ".join(differ[:8]) + (f" and {len(differ) - 8} more" if differ[8:] else "")
        raise InputError(f"'{workdir}' holds another experiment ({listed}): choose another --workdir")


_SUM = "# sha256 of the lines above: "


def signed(text: str) -> str:
    """A flagfile's text with its SHA-256 as a last line, a comment to whoever gives it as --flagfile."""
    return f"{text}{_SUM}{hashlib.sha256(files.to_bytes(text)).hexdigest()}\n"


def flags_text(file: Path) -> str:
    """The text of a flagfile that `signed` made, without its last line; of an older tljax's, which has none, all.

    Raises InputError for one that is not as it was written.
    """
    text = _text(file)
    lines, mark, _ = text.rpartition("\n" + _SUM)
    if mark and signed(f"{lines}\n") == text:
        return f"{lines}\n"
    comments = [line for line in text.split("\n")[1:] if line and not line.startswith(("--", command_line.PATHS_FROM))]
    if mark or comments or "sha256" in text:
        raise InputError(
            f"'{file}' is not as it was written: restore it; if the change is meant, give the file as --flagfile with "
            "a new --workdir"
        )
    return text


def replace(file: Path, text: str | bytes) -> None:
    """Write a file whole: a crash leaves the old one or the new one, and no link is followed."""
    files.replace(file, text if isinstance(text, bytes) else files.to_bytes(text))


def add_times(workdir: Path, record: Mapping[str, Any]) -> None:
    """Add a line to times.jsonl: what a call took, which no result depends on and nothing reads again."""
    file = workdir / "times.jsonl"
    before = file.read_bytes() if file.is_file() else b""
    replace(file, before + files.to_bytes(json.dumps(record) + "\n"))


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object whole, with the SHA-256 of what it says under "sha256", a name that it may not have itself.

    What it says is its canonical JSON, as it reads again: keys are sorted, and tuples are lists.
    """
    replace(file, json.dumps(with_sum(record), indent=1) + "\n")


def read_record(file: Path, form: fields.Form = dict) -> dict[str, Any] | None:
    """What `write_record` wrote, without its SHA-256; None if there is no such file.

    Raises InputError for what is no JSON, no object, nested too deep, or not as it was written; and, with the first
    field that is of another type, where it is not of this form.
    """
    if not os.path.lexists(file):
        return None
    remedy = "restore it, or delete it and run its command again"
    try:
        record = json.loads(_text(file))
        has_sum = isinstance(record, dict) and "sha256" in record
        good = has_sum and intact(record)
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is no JSON ({error}): {remedy}") from error
    if not has_sum:
        raise InputError(f"'{file}' has no SHA-256: an older tljax wrote it, or it is damaged: {remedy}")
    if not good:
        raise InputError(f"'{file}' is not as it was written: {remedy}")
    record = {name: value for name, value in record.items() if name != "sha256"}
    if odd := fields.fault(record, form):
        raise InputError(f"'{file}': {odd}: {remedy}")
    return record


def with_sum(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its SHA-256 under "sha256", as `intact` wants it."""
    return {**record, "sha256": _sum(record)}


def intact(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read has under "sha256" the SHA-256 of the rest."""
    return bool(record["sha256"] == _sum({name: value for name, value in record.items() if name != "sha256"}))


def _sum(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode()).hexdigest()


def new_file(value: str | None, suffix: str) -> Path:
    """The file that --output names for what is written; raises InputError unless it can be written, and is new."""
    file = Path(value or "")
    if file.suffix != suffix or "\0" in str(file):
        raise InputError(f"--output={value or ''}: name a new {suffix} file")
    if os.path.lexists(file):
        raise InputError(f"--output={value} exists already: nothing is written over; choose another name")
    if not file.parent.is_dir():
        raise InputError(f"--output={value}: there is no folder '{file.parent}': make it")
    files.sweep(file.parent, file.name, seconds=3600)
    return file


def results(workdir: Path) -> list[Result]:
    """The fits that were trained; raises InputError for a line that is no fit, or not as it was written."""
    return [fit for fit, _ in _lines(workdir)]


def _lines(workdir: Path) -> list[tuple[Result, str]]:
    """The fits of `results`, each with its line."""
    file = workdir / "results.jsonl"
    texts = enumerate(_text(file).splitlines() if file.exists() else (), 1)
    lines = [(number, text) for number, text in texts if text.strip()]
    inside = workdir.resolve()
    fits = [_checked(workdir, inside, text, f"'{file}', line {number}") for number, text in lines]
    # What a fit took is outside the line's SHA-256, and so is kept in a second place.
    known = _provenance(workdir) or {}
    seconds, peaks = known.get("seconds", {}), known.get("peak_bytes", {})
    for number, fit in enumerate(fits, 1):
        if fit.seconds not in seconds.get(fit.name, [fit.seconds]):
            raise InputError(f"'{file}', line {number} is not as it was written (seconds): restore or delete it")
        if fit.peak_bytes not in peaks.get(fit.name, [fit.peak_bytes]):
            raise InputError(f"'{file}', line {number} is not as it was written (peak_bytes): restore or delete it")
    return [(fit, text) for fit, (_, text) in zip(fits, lines, strict=True)]


FIT: fields.Form = {
    **dict.fromkeys(("key", "name", "target", "strategy", "checkpoint", "predictions", "predictions_sha256"), str),
    **{"options": dict, "seed": int, "train_examples": int, "steps": int, "diverged": bool},
    **{
        "test_accuracy": (float, None),
        "source?": (str, None),
        "spec?": (str, None),
        "phase_steps?": [int],
        "draw?": int,
    },
    **dict.fromkeys(("recipe?", "masks_sha256?", "selected_on?", "tuning_seeds?"), (str, None)),
    **dict.fromkeys(("trained_parameters?", "total_parameters?", "source_steps?", "best_step?"), (int, None)),
    "peak_bytes?": (int, None),
    **dict.fromkeys(("diverged_step?", "step_flops?", "source_flops?", "source_seconds?"), (float, None)),
    **dict.fromkeys(("test_loss?", "calibration_error?", "train_loss?", "train_penalty?"), (float, None)),
    **dict.fromkeys(("train_total?", "source_accuracy?", "start_accuracy?", "retention?"), (float, None)),
    **dict.fromkeys(("validation_accuracy?", "validation_loss?", "best_validation_accuracy?"), (float, None)),
    **{"leaves?": [[(str, int)]], "per_class_accuracy?": ([(float, None)], None), "confusion?": ([[int]], None)},
    **{"calibration?": ({"confidence": [(float, None)], "accuracy": [(float, None)], "count": [int]}, None)},
    **{"evals?": {str: (float, None)}, "metrics?": {str: (float, None)}, "end?": (str, None)},
    **{"began?": ([int], None), "stopped_step?": (int, None)},
    **{"ends?": ({str: {"step": (int, None), "predictions": str, "predictions_sha256": str}}, None)},
    **{"metric?": ({"name": str, "unit": str, "larger_is_better": bool}, None), "test_score?": (float, None)},
    **dict.fromkeys(
        ("source_metric?", "retention_metric?"), ({"name": str, "unit": str, "larger_is_better": bool}, None)
    ),
    **dict.fromkeys(("retention_scores?", "retention_sha256?"), (str, None)),
    **dict.fromkeys(("validation_score?", "best_validation_score?", "majority_share?"), (float, None)),
}
"""A line of results.jsonl, and a fit of a study; what may be lacking, an older tljax did not write."""


def fault_of_fit(fit: Any) -> str:
    """What of a line of results, or of a fit of a study, is not as such are, in a few words; "" where all is."""
    if odd := fields.fault(fit, FIT):
        return odd
    confusion, bins = fit.get("confusion") or [], fit.get("calibration") or {}
    if any(len(row) != len(confusion) for row in confusion):
        return "confusion has not as many columns as rows"
    if len({len(bins[name]) for name in ("confidence", "accuracy", "count") if name in bins}) > 1:
        return "calibration has lists of several lengths"
    kinds = [[type(part) for part in leaf] for leaf in fit.get("leaves", [])]
    return "leaves are not a path and two numbers each" if any(leaf != [str, int, int] for leaf in kinds) else ""


def _checked(workdir: Path, inside: Path, text: str, where: str) -> Result:
    """The fit of a line, once it is sure that it is one, and that its paths stay in the run directory, which lies
    `inside`."""
    if fault := _fault_of_line(text):
        raise InputError(f"{where} {fault}: restore or delete it")
    line = json.loads(text)
    for name in ("checkpoint", "predictions", "name"):
        path = Path("metrics") / line[name] if name == "name" else Path(line[name])
        within = len(path.parts) == 2 and ".." not in path.parts and not path.is_absolute() and "\0" not in line[name]
        if not within or not (workdir / path).resolve().is_relative_to(inside):
            raise InputError(f"{where}: {name} '{line[name]}' is no place in the run directory: restore or delete it")
    del line["sha256"]
    return from_json(line)


@functools.lru_cache(maxsize=4096)
def _fault_of_line(text: str) -> str:
    """What is wrong with a line of results.jsonl by itself, "" of one that is as it was written.

    The file is read again whenever fits are added to it, and most of its lines are as they were.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error})"
    if odd := fault_of_fit(line):
        return f"is no line of results ({odd})"
    seconds = line.get("seconds")
    known = isinstance(seconds, int | float) and 0 <= seconds < 1e15
    return "" if line.pop("sha256", None) == digest(line) and known else "is not as it was written"


TAKEN = ("seconds", "peak_bytes")
"""What a fit took, which goes with the machine."""


def digest(line: Mapping[str, Any]) -> str:
    """SHA-256 of a line (or another record) less what it took, so that a run and its repetition agree."""
    return hashlib.sha256(
        json.dumps({name: value for name, value in line.items() if name not in TAKEN}, sort_keys=True).encode()
    ).hexdigest()


def finished(workdir: Path) -> dict[str, Result]:
    """{key: fit} of the fits whose checkpoint and predictions are there; others are to be trained again."""
    whole = (fit for fit in results(workdir) if (workdir / fit.checkpoint).is_dir())
    return {fit.key: fit for fit in whole if all((workdir / name).is_file() for name in _files(fit))}


def supersede(workdir: Path, current: Sequence[Result]) -> None:
    """Note, aloud, which earlier fits these replace: of the same cell, with the same seed or of another recipe.

    So it is after an edit of a strategy's or a model's file: what was trained before stays in results.jsonl, and is
    taken up again if the edit is undone, but enters no report and is no source meanwhile.
    """
    cells: dict[str, list[Result]] = {}
    for fit in current:
        cells.setdefault(_cell(fit), []).append(fit)
    keys = {fit.key for fit in current}
    before = superseded(workdir)
    now = before - keys
    for fit in results(workdir):
        for other in cells.get(_cell(fit), ()) if fit.key not in keys else ():
            if replicate(fit) == replicate(other) or (fit.recipe and other.recipe and fit.recipe != other.recipe):
                now.add(fit.key)
    if now != before:
        write_record(workdir / "superseded.json", {"keys": sorted(now)})
    if new := [fit.name for fit in results(workdir) if fit.key in now - before]:
        fits = "1 earlier fit is" if len(new) == 1 else f"{len(new)} earlier fits are"
        console.say(
            f"{fits} of other code than now, of a strategy or model: kept in '{workdir}', but in no table or report "
            f"from here on ({paths.some(new)})"
        )


def superseded(workdir: Path) -> set[str]:
    """The keys of fits that later ones replaced; raises InputError for a record that is damaged."""
    return set((read_record(workdir / "superseded.json", {"keys": [str]}) or {"keys": []})["keys"])


def _cell(fit: Result) -> str:
    """What fits have in common that differ in their seed, or in code that the flags only name."""
    return json.dumps([fit.source, fit.target, fit.strategy, fit.options, fit.train_examples])


def _files(fit: Result) -> list[str]:
    """The files of a fit beside its checkpoint, without which it is not done; an older tljax did not want its masks."""
    phases = len(fit.phase_steps) if fit.masks_sha256 is not None else 0
    of_ends = (end["predictions"] for end in (fit.ends or {}).values())
    return [fit.predictions, *of_ends, *(f"masks/{fit.name}-phase{number}.json" for number in range(phases))]


def masks_digest(workdir: Path, name: str, phases: int) -> str:
    """SHA-256 of the files that hold the masks of a fit's phases; of those that are gone, the names alone."""
    whole = hashlib.sha256()
    for file in _mask_files(workdir, name, phases):
        raw = file.read_bytes() if file.is_file() else b""
        whole.update(files.to_bytes(f"{file.name} {len(raw)}\n") + raw)
    return whole.hexdigest()


def _mask_files(workdir: Path, name: str, phases: int) -> list[Path]:
    return [workdir / "masks" / f"{name}-phase{i}.{kind}" for i in range(phases) for kind in ("json", "npz")]


def _set_damaged_aside(workdir: Path) -> None:
    """Rename, aloud, what of finished fits is not as it was written: then they are not done any more."""
    every = results(workdir)
    for name in dict.fromkeys(fit.checkpoint for fit in every):
        if (workdir / name).is_dir():
            names = {fit.name for fit in every if fit.checkpoint == name}
            try:
                lacking = sorted(names - checkpoint.load(workdir / name)[0].keys())
                fault = f"checkpoint '{name}' holds no fit '{lacking[0]}'" if lacking else None
            except InputError as error:
                fault = str(error)
            _set_aside_if(workdir / name, fault)
    for fit in every:
        ends = [(end["predictions"], end["predictions_sha256"]) for end in (fit.ends or {}).values()]
        for file, sha256 in [(fit.predictions, fit.predictions_sha256), *ends]:
            raw = (workdir / file).read_bytes() if (workdir / file).is_file() else None
            if raw is not None and hashlib.sha256(raw).hexdigest() != sha256:
                _set_aside_if(workdir / file, f"'{workdir / file}' is not as it was written")
        mask_files = _mask_files(workdir, fit.name, len(fit.phase_steps))
        if fit.masks_sha256 not in (None, masks_digest(workdir, fit.name, len(fit.phase_steps))):
            for file in filter(Path.is_file, mask_files):
                _set_aside_if(file, f"'{file}' is not as it was written, or not with the other masks of its fit")
    try:
        read_record(workdir / "environment.json", _PROVENANCE)
    except InputError as error:
        if _unsigned_environment(workdir) is None:
            place = set_aside(workdir / "environment.json")
            console.say(f"{error}. It is set aside as '{place.name}', and what fits were trained with is not known")


def _set_aside_if(place: Path, fault: str | None) -> None:
    """Set a file or folder aside, aloud, if something is wrong with it."""
    if fault is not None:
        console.say(f"{fault}. It is set aside as '{set_aside(place).name}', and what it held counts as not trained")


def set_aside(place: Path) -> Path:
    """Rename what is damaged to NAME.damaged, or .damaged2 where that is taken; its new place."""
    names = (f"{place.name}.damaged{number}" for number in itertools.chain([""], itertools.count(2)))
    free = next(place.with_name(name) for name in names if not os.path.lexists(place.with_name(name)))
    os.rename(place, free)
    return free


def _text(file: Path) -> str:
    """The text of a file; raises InputError for what is no file or no UTF-8."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise IsADirectoryError
        return file.read_bytes().decode()  # as it is: Python's text would take \r\n for \n
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"'{file}' is no text: restore or delete it") from error


def add(workdir: Path, new: Sequence[Result]) -> None:
    """Add finished fits to results.jsonl, all or none; one that was there is replaced where it stands."""
    lines = _lines(workdir)
    _attribute(workdir, {fit.key: fit for fit, _ in lines}, new)
    texts = {fit.key: text for fit, text in lines}
    for fit in new:
        record = to_json(fit)
        texts[fit.key] = json.dumps({**record, "sha256": digest(record)}, allow_nan=False)
    replace(workdir / "results.jsonl", "".join(f"{text}\n" for text in texts.values()))


def environment(fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What environment.json says of a process: versions, devices, fingerprints of the data, the commit, switches."""
    names = ("tljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "versions": {name: version(name) for name in names},
        "data": dict(fingerprints),
        "commit": _commit(),
        "variables": switches.variables(),
        "switches": switches.changed(),
    }


def version(package: str) -> str:
    """The version of an installed package; of tljax also where it is not installed and lies on Python's path.

    >>> version("no-such-package")
    'not installed'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return __version__ if package == "tljax" else "not installed"


def record_environment(workdir: Path, fingerprints: Mapping[str, str], many: str = "auto") -> None:
    """Write the environment of this process to environment.json, before it trains anything; `add` names its fits.

    `many` is how `--many=auto` lets fits share the device at hand (`plan.many_of`); what it is on a CPU is not written.

    The environments of earlier processes, if they differ, are kept in it with the fits that they trained, and that is
    said aloud.
    """
    now = environment(fingerprints) | ({"many": many} if many != "auto" else {})
    before = _provenance(workdir)
    parts = [*before["earlier"], _part(before, now)] if before else []
    alike = [part for part in parts if _is_alike(part, now)]
    others = [part for part in parts if part not in alike and part["fits"]]
    fits = [name for part in alike for name in part["fits"]]
    data = {name: mark for part in alike for name, mark in part["data"].items()} | now["data"]
    taken = {"seconds": before["seconds"], "peak_bytes": before.get("peak_bytes", {})} if before else {"seconds": {}}
    after = {"format": FORMAT, **now, "data": data, "fits": fits, "earlier": others, "peak_bytes": {}, **taken}
    if before and before["fits"] and parts[-1] not in alike:
        for line in _differences([*others, now]):
            console.say(f"'{workdir}' goes on in another environment: {line}")
    if after != before or not (workdir / "environment.json").is_file():
        write_record(workdir / "environment.json", after)


def _part(known: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The last environment that environment.json holds, with what `now` says of one, and the fits trained in it."""
    many = {"many": known["many"]} if "many" in known else {}
    return {name: known.get(name, {}) for name in (*now, "fits") if name != "many"} | many


def _is_alike(part: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two environments differ in nothing but their data."""
    return all(part.get(name) == now.get(name) for name in (*now, "many") if name != "data")


def _attribute(workdir: Path, before: Mapping[str, Result], new: Sequence[Result]) -> None:
    """Note in environment.json that new fits were trained in the environment recorded last, and what they took.

    What the fit that a new one replaces took is noted too: which of both will be there, nobody knows yet.
    """
    known = _provenance(workdir)
    if known is None:
        return
    names = {fit.name for fit in new}
    for part in known["earlier"]:
        part["fits"] = [name for name in part["fits"] if name not in names]
    known["fits"] = [*(name for name in known["fits"] if name not in names), *(fit.name for fit in new)]
    for fit in new:
        replaced = [before[fit.key]] if fit.key in before else []
        known["seconds"][fit.name] = [each.seconds for each in (*replaced, fit)]
        known.setdefault("peak_bytes", {})[fit.name] = [each.peak_bytes for each in (*replaced, fit)]
    write_record(workdir / "environment.json", known)


def recorded_environment(workdir: Path) -> dict[str, Any] | None:
    """What environment.json says of the last environment, and of those before it; None where it is gone or damaged."""
    known = _provenance(workdir)
    if known is None:
        return None
    of_fits = ("format", "fits", "earlier", "seconds", "peak_bytes")
    last = {name: value for name, value in known.items() if name not in of_fits}
    earlier = [{name: value for name, value in part.items() if name != "fits"} for part in known["earlier"]]
    return {**last, **({"earlier": earlier} if earlier else {})}


def mixed_environments(workdir: Path, names: Collection[str]) -> list[str]:
    """What the notes of a table must say if its fits, by name, were trained in several environments."""
    known = _provenance(workdir)
    if known is None:
        return []
    parts = [part for part in (*known["earlier"], known) if set(part["fits"]) & set(names)]
    return [f"trained in {len(parts)} environments: {line}" for line in _differences(parts)]


def _differences(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between environments, in one line; none if nothing does."""
    columns: dict[str, list[str]] = {}
    for part in parts:
        values = {**part["versions"], **{name: part[name] for name in ("python", "platform", "devices", "commit")}}
        # An older tljax did not say its variables and switches.
        values |= {name: part.get(name, {}) for name in ("variables", "switches")}
        values |= {"many": part.get("many", "auto")}
        for name, value in values.items():
            text = ",".join(value) if isinstance(value, list) else str(value)
            columns.setdefault(name, []).append(text[:60])
    differ = [f"{name} {' and '.join(dict.fromkeys(texts))}" for name, texts in columns.items() if len(set(texts)) > 1]
    return ["; ".join(differ)] if differ else []


_ENVIRONMENT: fields.Form = {
    **{"python": str, "platform": str, "cores": (int, None), "devices": [str], "versions": {str: str}},
    **{"data": {str: str}, "commit": (str, None), "variables?": {str: str}, "switches?": dict, "fits": [str]},
    "many?": str,
}
_PROVENANCE: fields.Form = {
    **{**_ENVIRONMENT, "earlier": [_ENVIRONMENT], "seconds": {str: [float]}, "format?": int},
    "peak_bytes?": {str: [(int, None)]},
}


def _provenance(workdir: Path) -> dict[str, Any] | None:
    """All of environment.json; None where it is gone or damaged. An older tljax's is taken to be of all fits there."""
    try:
        return read_record(workdir / "environment.json", _PROVENANCE)
    except (OSError, InputError):
        old = _unsigned_environment(workdir)
        return old and {**old, "variables": {}, "switches": {}, "fits": _names(workdir), "earlier": [], "seconds": {}}


def _unsigned_environment(workdir: Path) -> dict[str, Any] | None:
    """An environment.json of an older tljax, which has no SHA-256; None for anything else."""
    try:
        old = json.loads(_text(workdir / "environment.json"))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"python": str, "platform": str, "cores": int, "devices": list, "versions": dict, "data": dict}
    whole = isinstance(old, dict) and old.keys() == {*kinds, "commit"}
    return old if whole and all(isinstance(old[name], kind) for name, kind in kinds.items()) else None


def _names(workdir: Path) -> list[str]:
    """The names of the fits in results.jsonl, unchecked."""
    file = workdir / "results.jsonl"
    return re.findall(r'"name": "([^"]+)"', _text(file)) if file.is_file() else []


def _commit() -> str | None:
    """The commit that this file is of, with -dirty where something was changed; None outside a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
