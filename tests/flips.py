"""Single bits of the files of a run directory are flipped, and what is read of it is held against what it was.

What a reader gives must be the same to the bit, or it must refuse in one line, or say that something is set aside,
left out or cut off. `python tests/flips.py FOLDER [BITS]` makes one directory of each kind in a new folder, flips at
least BITS bits (default 300) of each of their files, and prints the table.
"""

import contextlib
import functools
import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import compare, export, pretrain, rank, search, transfer, zoo
from experiments.runs import (
    command_line,
    directory,
    evaluations,
    judging,
    metrics,
    predictions,
    process,
    scores,
    sources,
    tuned,
)
from experiments.runs import features as on_disk
from experiments.runs.settings import Settings, parse_flags
from tljax import checkpoint, data
from tljax.study import search as studies
from tljax.study import units
from tljax.types import InputError

ALOUD = ("set aside", "left out", "cut off", "restore", "believed as", "taken over")
"""Words of what is said where something is not as it was written."""


class Attack(NamedTuple):
    """A file, and one of those who read it."""

    file: Path
    reader: str
    read: Callable[[], Any]
    """Reads the file, and perhaps others; what it gives must follow from the file alone."""


def plain(value: Any) -> str:
    """A value in words that differ wherever it differs: arrays by their dtype, shape and bytes."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes().hex()}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{plain(key)}:{plain(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(plain, value)) + "]"
    return repr(value)


def bits(size: int, count: int, begin: int) -> Iterator[tuple[int, int]]:
    """(byte, bit) of about `count` bits of a file, evenly spread, and of its first `begin`; all if it has no more."""
    spread = range(0, size * 8, max(1, size * 8 // count))
    places = range(size * 8) if size * 8 <= count else {*range(begin), *spread}
    return ((place // 8, (place + place // 997) % 8) for place in sorted(places) if place // 8 < size)


def flipped(attack: Attack, count: int, restore: Callable[[], None], begin: int = 64) -> Counter[str]:
    """{identical, refused, aloud, escaped: how often} over flips of `bits`; `restore` puts all back after each."""
    with contextlib.redirect_stdout(io.StringIO()):
        expected = plain(attack.read())
        restore()
    raw, outcomes = attack.file.read_bytes(), Counter[str]()
    for at, bit in bits(len(raw), count, begin):
        attack.file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard):
                now = plain(attack.read())
            same, aloud = now == expected, any(word in heard.getvalue() for word in ALOUD)
            kind = "aloud" if aloud else "identical" if same else "escaped"
        except InputError as error:
            kind = "refused" if "\n" not in str(error) else "escaped"
            heard.write(str(error))
        except Exception as error:
            kind, _ = "escaped", heard.write(repr(error))
        if kind == "escaped":
            print(f"ESCAPED {attack.file.name} byte {at} bit {bit} by {attack.reader}: {heard.getvalue()[-300:]}")
        outcomes[kind] += 1
        restore()
        assert attack.file.read_bytes() == raw
    return outcomes


def restorer(folder: Path) -> Callable[[], None]:
    """A function that puts a folder back as it is now, by its files' bytes."""
    kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and not file.is_symlink()}

    def restore() -> None:
        for file in [file for file in folder.rglob("*") if file.is_file() and file not in kept]:
            file.unlink()
        for place in sorted((place for place in folder.rglob("*.damaged*") if place.is_dir()), reverse=True):
            shutil.rmtree(place)
        for file, raw in kept.items():
            if not file.is_file() or file.read_bytes() != raw:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(raw)

    return restore


def of_run(folder: Path, settings: Any, program: str, more: Sequence[str] = ()) -> list[Attack]:
    """What a run directory is opened by: whoever runs its command again."""

    def opened() -> Any:
        with directory.opened(settings, program, more):
            lines = list(directory.finished(folder).values())
            curves = {line.name: metrics.curves(folder, line.name) for line in lines}
            phases = {line.name: len(line.phase_steps) for line in lines}
            masks = {name: directory.masks_digest(folder, name, count) for name, count in phases.items()}
            flags = directory.flags_text(folder / "flags.flags")
            return lines, directory.recorded_environment(folder), curves, masks, flags

    def judged() -> Any:
        kept = predictions.read_study(folder)
        parts = [[part.rows, dict(part.predicted), dict(part.curves)] for part in kept.parts]
        return parts, kept.notes, kept.judging, kept.looks

    attacks, seen = [], Counter[str]()
    for file in sorted(folder.rglob("*")):
        inside, again = file.relative_to(folder), Attack(file, "the same command again", opened)
        kind = inside.parts[0] + file.suffix
        seen[kind] += file.is_file()
        if not file.is_file() or file.name.startswith("events") or seen[kind] > 2:
            continue
        if inside.parts[0] in ("predictions", "masks", "metrics"):
            attacks.append(again)
        if inside.name in ("flags.flags", "results.jsonl", "environment.json"):
            attacks.append(again)
        ends = inside.name in ("results.jsonl", "environment.json", "study.json")
        if (ends or inside.parts[0] == "predictions") and (folder / "report.html").is_file():
            attacks.append(Attack(file, "experiments.report --runs", judged))
    place = next((folder / "checkpoints").iterdir())
    files = [file for file in sorted(place.rglob("*")) if file.is_file()]
    return [*attacks, *(Attack(file, "checkpoint.load", lambda: _load(place)) for file in files)]


_load = checkpoint.load


@contextlib.contextmanager
def once_loaded() -> Iterator[None]:
    """Checkpoints, which take longest, are loaded once, whatever is flipped beside them."""
    quick = functools.cache(checkpoint.load)
    directory.checkpoint.load = quick
    try:
        yield
    finally:
        directory.checkpoint.load = _load


def table(outcomes: Sequence[tuple[Attack, Counter[str]]]) -> str:
    """The table in Markdown, a row a kind of file and reader."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for attack, counts in outcomes:
        kinds = {"checkpoints": "checkpoints/**", "predictions": "predictions/*.npz", "evals": "evals/*.json"}
        kinds |= {"masks": "masks/*" + attack.file.suffix, "metrics": "metrics/*/" + attack.file.name}
        kinds |= {"cards": "cards/*.json"}
        inside = [kind for name, kind in kinds.items() if name in attack.file.parts[-7:-1]]
        rows.setdefault(((inside or [attack.file.name])[0], attack.reader), Counter()).update(counts)
    lines = ["| file | reader | flips | identical | refused | aloud | escaped |", "|---|---|---|---|---|---|---|"]
    for (file, reader), counts in rows.items():
        each = [counts[kind] for kind in ("identical", "refused", "aloud", "escaped")]
        lines.append(f"| `{file}` | {reader} | {sum(each):,} | {' | '.join(f'{count:,}' for count in each)} |")
    return "\n".join(lines)


def every(tasks: Path, folder: Path) -> Iterator[tuple[Path, list[Attack]]]:
    """(directory, attacks on it) of each kind of directory that the programs leave, made in `folder`."""
    common = {"hidden": 8, "batch_size": 20, "learning_rate": 0.1, "steps": 10, "seeds": "0,1"}
    pair = {"source": tasks / "digits.npz", "target": tasks / "clothes.npz"}

    def line(program: str, **flags: Any) -> list[str]:
        return [program, *(f"--{name}={value}" for name, value in (common | flags).items() if value is not None)]

    def settings(**flags: Any) -> Any:
        rank_argv = parse_flags(line("x", **flags))
        return Settings.from_flags(**rank_argv)

    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        transfer.main(line("transfer", **pair, strategies="scratch,last_k:k=1,random_mask", workdir=run))
    yield run, of_run(run, settings(**pair, strategies="scratch,last_k:k=1,random_mask", workdir=run), "transfer")
    (run / ".lock").write_text(f"process 12 on host {os.uname().nodename}\n")
    opened = of_run(run, settings(**pair, strategies="scratch", workdir=run), "transfer")[0].read
    yield run, [Attack(run / ".lock", "the same command again", opened)]

    study, more = folder / "study", [f"--eval=source,{tasks / 'clothes.npz'}:noise=0.2"]
    with contextlib.redirect_stdout(io.StringIO()):
        argv = [*line("compare", **pair, strategies="full", workdir=study), *more]
        compare.main(argv)
    judging_flags = command_line.read(argv, compare.CompareFlags)[1]
    judging_lines = command_line.flagfile_lines(judging.with_margin(judging_flags, [units.ACCURACY]))
    attacks = of_run(study, settings(**pair, strategies="scratch,full", workdir=study), "compare", judging_lines)
    right = predictions.right(predictions.read_study(study).parts)
    attacks.append(Attack(study / "looks.json", "experiments.compare", lambda: predictions.count_look(study, right)))
    attacks.append(Attack(study / "study.json", "experiments.compare", lambda: predictions.count_look(study, right)))
    for file in (study / "evals").glob("*.json"):
        record = directory.read_record(file) or {}
        about = {name: value for name, value in record.items() if name not in ("accuracy", "scores")}
        attacks.append(
            Attack(file, "experiments.compare", lambda file=file, about=about: evaluations._known(file, about))
        )
    yield study, attacks

    hunt = folder / "search"
    with contextlib.redirect_stdout(io.StringIO()):
        search.main(
            [*line("search", **pair, strategies="full", workdir=hunt), "--space=learning_rate:log:1e-3:1", "--trials=3"]
        )

    def trials() -> Any:
        searched = studies.opened("search/full/all", str(hunt / "study.journal"), "TPE", "Nop", 0, 60, about, print)
        return [(trial.params, trial.values, trial.user_attrs, trial.state) for trial in searched.study.trials]

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(hunt / "study.journal")))
    about = optuna.load_study(study_name="search/full/all", storage=storage).user_attrs["about"]
    yield (
        hunt,
        [
            Attack(hunt / "study.journal", "experiments.search", trials),
            Attack(hunt / "best.flags", "experiments.compare --tuned", lambda: tuned.winners(hunt)),
        ],
    )

    many = folder / "zoo"
    names = ",".join(f"{tasks / 'digits.npz'}{name}" for name in ("", ":untrained", ":shuffle_labels=1"))
    with contextlib.redirect_stdout(io.StringIO()):
        zoo.main([*line("zoo", seeds=None, workdir=many), f"--zoo={names}"])
    yield (
        many,
        [
            Attack(file, "experiments.rank", lambda: sources.read_cards(str(many)))
            for file in (many / "cards").iterdir()
        ],
    )

    ranked = folder / "ranked"
    with contextlib.redirect_stdout(io.StringIO()):
        rank_argv = line("rank", target=tasks / "clothes.npz", strategies="head_only", workdir=ranked)
        rank.main([*rank_argv, f"--sources={many}", "--scores=knn,leep"])
    source_fit = sources.load(
        sources.settings_of({"seeds": (0,)}, sources.read_cards(str(many))[0].place, several=True)
    )
    task = data.load(str(tasks / "clothes.npz"))
    place = ranked / "features" / f"{source_fit.identity[:12]}-{task.fingerprint[:12]}"
    stage = place / sources.before_head(source_fit.model)
    reads = lambda: tuple(np.asarray(part) for part in on_disk.read(stage, source_fit, task, stage.name))  # noqa: E731
    attacks = [Attack(stage / name, "experiments.rank", reads) for name in ("features.json", "train.npy", "test.npy")]
    yield (
        ranked,
        [*attacks, Attack(place / "scores.json", "experiments.rank", lambda: scores._known(place / "scores.json"))],
    )

    lone = folder / "export"
    lone.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain.main(line("pretrain", source=tasks / "digits.npz", seeds=0, workdir=folder / "lone"))
        export.main(["export", f"--checkpoint={folder / 'lone'}", f"--output={lone / 'net.safetensors'}"])
    weights = lone / "net.safetensors"

    def source() -> Any:
        settings = Settings.from_flags(**(parse_flags(line("x", seeds=0, source_checkpoint=weights))))
        kept = sources.from_checkpoint(settings)
        [trained] = kept.trained.values()
        return kept.name, kept.classes, kept.shape, kept.identity, kept.fingerprint, kept.note, kept.steps, trained

    yield lone, [Attack(file, "experiments.transfer --source_checkpoint", source) for file in lone.iterdir()]


def main(argv: Sequence[str]) -> None:
    """Print the table of all attacks."""
    from test_programs import write_task

    folder, count = Path(argv[1]), int((*argv[2:], "300")[0])
    folder.mkdir(parents=True)
    write_task(folder / "digits.npz", 0, 4)
    write_task(folder / "clothes.npz", 1, 3, ["shirt", "coat", "bag"])
    outcomes = []
    process._quieten_orbax()
    for place, attacks in every(folder, folder):
        restore = restorer(place)
        with once_loaded():
            for attack in attacks:
                outcomes.append((attack, flipped(attack, count, restore)))
    print(table(outcomes))


if __name__ == "__main__":
    main(sys.argv)
