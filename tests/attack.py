"""Every reader of the project is given files that nothing can be made of: it reads them, or refuses in one line.

Single bits are flipped and files cut; JSON becomes other JSON, nested deep, or a field becomes another type under a
right SHA-256; arrays become of other dtypes and ranks, encrypted, or packed by unknown methods; names are no UTF-8.
Nothing may escape as a traceback, and nothing may take longer than `SECONDS`. What flips *change* is the affair of
flips.py. `python tests/attack.py FOLDER [COUNT [PATIENCE]]` makes directories of each kind in a new folder, does at
most COUNT attacks (default 60) on each file by each of its readers, for at most PATIENCE seconds (default 3) each, then
some by whole programs, and prints the table.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flips
import numpy as np
from PIL import Image

from experiments import compare, convert, report, transfer
from experiments.runs import directory, looks, predictions, process, sources
from experiments.runs.settings import Settings, parse_flags
from tljax import checkpoint, data, masks, models, objective, optimizers, plugins, weights
from tljax.data import cache, idx, unlabelled
from tljax.types import InputError

SECONDS = 30
PATIENCE = 3.0
"""Seconds for the attacks on one file by one reader: those that make a whole page are fewer."""
DEEP = 100_000
NOT_TEXT = "caf\udce9"
"""What Python calls a file whose name is the bytes b"caf\\xe9"."""


class Form(NamedTuple):
    """How a file holds JSON, and how it is written again with the digests that belong to it."""

    parse: Callable[[bytes], Any]
    write: Callable[[Any], bytes]


class Attack(NamedTuple):
    """A file, and one of those who read it."""

    what: str
    """The file, as the table names it."""
    reader: str
    file: Path
    read: Callable[[], Any]
    form: Form | None = None


Change = tuple[str, bytes]
"""(what is done, the bytes that the file has then)."""


def _record(document: Any) -> bytes:
    rest = {name: value for name, value in document.items() if name != "sha256"}
    return json.dumps({**rest, "sha256": directory._sum(rest)}).encode()


def _lines(documents: Any) -> bytes:
    signed = []
    for line in documents:
        if isinstance(line, dict):
            rest = {name: value for name, value in line.items() if name != "sha256"}
            line = {**rest, "sha256": directory.digest(rest)}
        signed.append(json.dumps(line) + "\n")
    return "".join(signed).encode()


def _checkpoint(document: Any) -> bytes:
    return json.dumps({**document, "digest": checkpoint._meta_digest(document)}).encode()


def _journal(documents: Any) -> bytes:
    from tljax.study import journal

    last, whole = b"", b""
    for entry in documents:
        if isinstance(entry, dict):
            rest = {name: value for name, value in entry.items() if name != "sha256"}
            entry = {**rest, "sha256": journal.chained_digest(rest, last)}
        last = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        whole += last
    return whole


def _of_lines(raw: bytes) -> list[Any]:
    return [json.loads(line) for line in raw.splitlines()]


def _csv(rows: Any) -> bytes:
    lines = [",".join(str(cell) for cell in row) if isinstance(row, list) else str(row) for row in rows]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


PLAIN = Form(json.loads, lambda document: json.dumps(document).encode())
RECORD = Form(json.loads, _record)
LINES = Form(_of_lines, _lines)
JOURNAL = Form(_of_lines, _journal)
CHECKPOINT = Form(json.loads, _checkpoint)
NOTE = Form(json.loads, lambda note: cache._note_bytes({name: part for name, part in note.items() if name != "sha256"}))
SAFETENSORS = Form(
    lambda raw: json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]),
    lambda head: struct.pack("<Q", len(text := json.dumps(head).encode())) + text + bytes(4000),
)
CELLS = Form(lambda raw: [line.split(",") for line in raw.decode(errors="surrogateescape").splitlines()], _csv)
FORMS = {"results.jsonl": LINES, "study.journal": JOURNAL, "metadata": CHECKPOINT, "task.json": NOTE}
FORMS |= {"features.json": PLAIN, "_METADATA": PLAIN, "net.safetensors": SAFETENSORS}

OTHERS: tuple[Any, ...] = (
    *(None, True, 0, -1, 7, 10**30, 1.5, -0.5, 1e308, float("nan"), "", "x", "../x", "\udcff", "a\0b"),
    *([], [1], ["x"], [[1, 2], [3]], {}, {"x": 1}, [None], [[[]]], "9" * 300),
)
"""What a field may become."""
DOCUMENTS = (
    *(b"", b" ", b"null", b"[1]", b'"x"', b"5", b"true", b"NaN", b"1e999", b"{}", b"[]", b"[{}]", b'{"sha256": 1}'),
    *(b"[" * DEEP, b'{"a":' * DEEP, b"(" * DEEP, b"[" * DEEP + b"]" * DEEP, b"9" * 5000, b"\xff\xfe[1]", b"\0" * 100),
    *(b'{"sha256": ' + b"[" * 900 + b"]" * 900 + b"}", b'"\\ud800"', "{}".encode("utf-16"), b"\xef\xbb\xbf{}"),
)
"""What a file may become as a whole."""


def places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each part of a JSON document: of a long list the first and the last parts."""
    if here:
        yield here
    if isinstance(document, dict):
        names: Sequence[Any] = list(document)
    else:
        names = sorted({0, len(document) - 1}) if isinstance(document, list) and document else ()
    for name in names:
        yield from places(document[name], (*here, name))


def fields(raw: bytes, form: Form) -> Iterator[Callable[[], Change]]:
    """Each field as each of OTHERS, and lacking, with the digests that belong to it."""
    original = form.parse(raw)

    def changed(place: tuple[Any, ...], other: Any, gone: bool) -> Change:
        document = copy.deepcopy(original)
        within = document
        for name in place[:-1]:
            within = within[name]
        if gone:
            del within[place[-1]]
        else:
            within[place[-1]] = other
        named = ".".join(map(str, place))
        return f"{named} is {'gone' if gone else repr(other)[:40]}", form.write(document)

    for place in places(original):
        for other in OTHERS:
            yield lambda place=place, other=other: changed(place, other, False)
        yield lambda place=place: changed(place, None, True)


def _packed(arrays: Mapping[str, Any], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An .npz, whose members are arrays or bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            if isinstance(array, bytes):
                member.write(array)
            else:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=True)
            with warnings.catch_warnings(action="ignore"):
                archive.writestr(f"{name}.npy", member.getvalue())
    return out.getvalue()


def arrays(raw: bytes) -> Iterator[Callable[[], Change]]:
    """An .npz with one array of another dtype, rank or length, with objects, lacking; encrypted, of unknown methods."""
    with np.load(io.BytesIO(raw)) as file:
        good = dict(file)
    for name, array in good.items():
        others: dict[str, Any] = {
            **{"flat": array.reshape(-1), "scalar": np.zeros(()), "deep": array[None], "empty": array.reshape(-1)[:0]},
            **{"dates": np.zeros(3, "M8[s]"), "fields": np.zeros(3, [("a", int)]), "words": np.array(["a", "\0"])},
            **{"objects": np.full(array.shape, None, object), "no array": b"not an array"},
            **{"brackets": b"\x93NUMPY\x01\x00\x10\x0b" + b"(" * 2832},
            **{
                f"shape {shape}": _head(shape) for shape in ("(10**15,)", f"({10**15},)", "(-1,)", "(True,)", "3", "{}")
            },
        }
        if array.dtype.kind in "biuf" and array.ndim:
            kinds = ("?", "i1", "f2", "f8", "c8", "U3", "S3")
            others |= {kind: array.astype(kind) for kind in kinds} | {"nan": array * np.nan, "short": array[:-1]}
        for what, other in others.items():
            yield lambda name=name, what=what, other=other: (f"{name}: {what}", _packed({**good, name: other}))
        yield lambda name=name: (f"no {name}", _packed({key: good[key] for key in good if key != name}))
    for name in ("caf\xe9", "../x", "", "file", "a\0b", "allow_pickle"):
        yield lambda name=name: (f"member {name!r}", _packed({**good, name: np.zeros(3)}))
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        packed = _packed(good, method)
        yield lambda packed=packed: ("damaged packing", packed[:60] + b"\xff" * 20 + packed[80:])
    plain = _packed(good)
    for what, at, value in (("encrypted", 8, 1), ("unknown method", 10, 98), ("unknown version", 6, 99)):
        yield lambda what=what, at=at, value=value: (what, _everywhere(plain, at, value))


def _head(shape: str) -> bytes:
    """The head of an array in an .npy file, without the array."""
    text = f"{{'descr':'<f8','fortran_order':False,'shape':{shape}}}".ljust(118).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _everywhere(raw: bytes, at: int, value: int) -> bytes:
    """A zip file with a 16-bit number of every member's entries in the directory, and of its own head, set."""
    changed = bytearray(raw)
    for mark, start in ((b"PK\x01\x02", at), (b"PK\x03\x04", at - 2)):
        place = raw.find(mark)
        while place >= 0:
            changed[place + start : place + start + 2] = struct.pack("<H", value)
            place = raw.find(mark, place + 4)
    return bytes(changed)


def changes(attack: Attack, draw: random.Random, count: int) -> list[Callable[[], Change]]:
    """At most `count` changes of a file, of all kinds that it has: a third of them of the types of what is in it."""
    raw = attack.file.read_bytes()
    lengths = sorted({0, 1, len(raw) - 1, len(raw) // 2, *draw.choices(range(len(raw)), k=count)})
    bits = list(flips.bits(len(raw), count, 64))
    simple: list[Callable[[], Change]] = [lambda n=n: (f"cut at {n}", raw[:n]) for n in lengths if 0 <= n < len(raw)]
    simple = draw.sample(simple, min(len(simple), max(4, count // 6)))
    flipped = draw.sample(bits, min(len(bits), max(2, count // 6)))
    simple += [
        lambda at=at, bit=bit: (f"bit {bit} of {at}", raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        for at, bit in flipped
    ]
    whole: list[Callable[[], Change]] = [lambda text=text: (f"all is {text[:9]!r}", text) for text in DOCUMENTS]
    whole += [lambda: ("mark before", b"\xef\xbb\xbf" + raw), lambda: ("twice", raw + raw)]
    typed: list[Callable[[], Change]] = list(fields(raw, attack.form)) if attack.form else []
    typed += list(arrays(raw)) if attack.file.suffix == ".npz" else []
    if attack.file.suffix == ".py":
        typed += [lambda text=text: (f"{text[:20]!r}", text) for text in PYTHON]
    rest = max(1, count - len(simple))
    kinds = [draw.sample(whole, min(len(whole), rest // 3 if typed else rest)), typed]
    every = [*simple, *kinds[0], *draw.sample(typed, min(len(typed), max(rest - len(kinds[0]), 0)))]
    return draw.sample(every, len(every))


class Hangs(BaseException):
    """The time is up."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Hangs after so many seconds."""

    def ring(*_: Any) -> None:
        raise Hangs(f"still runs after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], Any]) -> tuple[str, str]:
    """(read, refused or escaped; what is said): refused is what a program says in one line."""
    heard = io.StringIO()
    try:
        with limited(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            read()
        return "read", heard.getvalue()
    except InputError as error:
        line = process.message(error) or ""
        if "\n" in str(error):
            return "escaped", f"several lines: {error}"
    except Hangs as error:
        return "escaped", str(error)
    except BaseException as error:
        line = process.message(error) or ""
        if not line:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            at = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else ""
            return "escaped", f"{error!r} {at}"
    good = line.strip() and "\n" not in line and "Traceback" not in line and len(line) < 3100
    return ("refused" if good else "escaped"), line


class Row(NamedTuple):
    """Of one attack what came of it."""

    attack: Attack
    outcomes: Counter[str]
    slowest: float
    """Seconds."""


def attacked(attack: Attack, count: int, restore: Callable[[], None], patience: float = PATIENCE) -> Row:
    """What comes of at most `count` changes; what escapes is printed."""
    draw, outcomes, slowest = random.Random(f"{attack.what} {attack.reader}"), Counter[str](), 0.0
    kind, words = outcome(attack.read)
    restore()
    assert kind == "read", f"{attack.what} by {attack.reader} is not read as it is: {words}"
    begun = time.perf_counter()
    for change in changes(attack, draw, count):
        if time.perf_counter() - begun > patience:
            break
        what, raw = change()
        attack.file.write_bytes(raw)
        begin = time.perf_counter()
        kind, words = outcome(attack.read)
        slowest = max(slowest, time.perf_counter() - begin)
        if kind == "escaped":
            print(f"ESCAPED {attack.what} ({what}) by {attack.reader}: {words[-400:]}", flush=True)
        outcomes[kind] += 1
        restore()
    return Row(attack, outcomes, slowest)


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown, a row a reader and a kind of file."""
    each: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        each.setdefault((row.attack.reader, row.attack.what), []).append(row)
    lines = ["| reader | of | attacks | read | refused | escaped | slowest s |", "|---|---|---|---|---|---|---|"]
    for (reader, what), members in each.items():
        counts = sum((row.outcomes for row in members), Counter[str]())
        numbers = [sum(counts.values()), *(counts[kind] for kind in ("read", "refused", "escaped"))]
        slowest = max(row.slowest for row in members)
        lines.append(f"| {reader} | `{what}` | {' | '.join(f'{n:,}' for n in numbers)} | {slowest:.2f} |")
    total = sum((row.outcomes for row in rows), Counter[str]())
    numbers = [sum(total.values()), *(total[kind] for kind in ("read", "refused", "escaped"))]
    return "\n".join([*lines, f"| all | | {' | '.join(f'{n:,}' for n in numbers)} | |"])


def form_of(file: Path) -> Form | None:
    """How the programs' own files are signed."""
    if file.name in FORMS:
        return FORMS[file.name]
    return RECORD if file.suffix == ".json" and "masks" not in file.parts else None


def named(file: Path, folder: Path) -> str:
    """A file as the table names it: its first folder and its kind."""
    inside = file.relative_to(folder)
    if len(inside.parts) == 1:
        return file.name
    if inside.parts[0] == "checkpoints":
        return f"checkpoints/**/{file.name}" if file.name in ("metadata", "_METADATA") else "checkpoints/**"
    return f"{inside.parts[0]}/**/{file.name if inside.parts[0] == 'features' else '*' + file.suffix}"


Ground = tuple[Path, list[Attack]]
"""(a folder that is put back after each attack, attacks on files in it)."""


def of_programs(tasks: Path, folder: Path) -> Iterator[Ground]:
    """What flips.py attacks, and further readers of the same directories."""
    for place, those in flips.every(tasks, folder):
        attacks = [Attack(named(a.file, place), a.reader, a.file, a.read, form_of(a.file)) for a in those]
        if place.name == "run":
            attacks += _of_run(tasks, place, folder)
        if place.name == "study":
            attacks += _of_study(tasks, place, folder)
        yield place, attacks


def _silent_pages() -> None:
    """Pictures take longer than all the rest, and read no file."""
    from experiments.pages import figures

    figures.svg = lambda figure: "data:image/svg+xml;base64,"
    figures.pdf = lambda figure: b""


def _page(run: Path, folder: Path) -> Callable[[], Any]:
    """What experiments.report makes of a run directory, to the end."""
    out = folder / "pages"

    def read() -> Any:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(looks.place() or out, ignore_errors=True)
        report.run(report.ReportFlags(runs=(str(run),), output=str(out)))

    return read


def _of_run(tasks: Path, run: Path, folder: Path) -> list[Attack]:
    """To the end of the same command, of the report, and of what takes its sources."""
    argv = ["transfer", *(line for line in directory.flags_text(run / "flags.flags").splitlines() if line[:2] == "--")]
    argv = [line for line in argv if not line.startswith("--workdir")] + [f"--workdir={run}"]
    flags = parse_flags([line for line in argv if not line.startswith("--source=")])
    settings = Settings.from_flags(**flags | {"source_checkpoint": str(run)})
    line = next(iter(directory.finished(run).values()))
    mask = run / "masks" / f"{line.name}-phase0"
    params = _nested(checkpoint.load(run / line.checkpoint)[0][line.name])
    directory.write_record(run / "superseded.json", {"keys": ["x"]})
    again: Callable[[], Any] = lambda: transfer.main(argv)  # noqa: E731
    return [
        Attack("results.jsonl", "experiments.transfer again", run / "results.jsonl", again, LINES),
        Attack("results.jsonl", "experiments.report --runs", run / "results.jsonl", _page(run, folder), LINES),
        Attack("environment.json", "experiments.report --runs", run / "environment.json", _page(run, folder), RECORD),
        Attack("superseded.json", "experiments.transfer again", run / "superseded.json", again, RECORD),
        Attack("flags.flags", "experiments.transfer again", run / "flags.flags", again),
        Attack("flags.flags", "experiments.report --runs", run / "flags.flags", _page(run, folder)),
        Attack("predictions/*.npz", "experiments.report --runs", run / line.predictions, _page(run, folder)),
        Attack("metrics/*/curves.npz", "experiments.report --runs", _curves(run), _page(run, folder)),
        Attack(
            "checkpoints/**/metadata", "--source_checkpoint", _meta(run), lambda: _source(settings, run), CHECKPOINT
        ),
        Attack("masks/*.json", "masks.load", Path(f"{mask}.json"), lambda: masks.load(mask, params), PLAIN),
    ]


def _source(settings: Any, run: Path) -> Any:
    """A source of a run, by its flags and by what it says of its model itself."""
    place = str(_meta(run).parent.parent)
    return sources.from_checkpoint(settings), sources.load(sources.settings_of({"seeds": (0,)}, place, several=True))


def _nested(flat: checkpoint.Flat) -> Any:
    """The tree of {stage/leaf: array}."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        stage, leaf = path.split("/")
        tree.setdefault(stage, {})[leaf] = array
    return tree


def _curves(run: Path) -> Path:
    return sorted((run / "metrics").glob("*/curves.npz"))[-1]


def _meta(run: Path) -> Path:
    line = next(line for line in directory.results(run) if line.strategy == "pretrain")
    return run / line.checkpoint / "meta" / "metadata"


def _of_study(tasks: Path, study: Path, folder: Path) -> list[Attack]:
    """The report of a study, the study again to its end, and looks of the user."""
    argv = ["compare", *(line for line in directory.flags_text(study / "flags.flags").splitlines() if line[:2] == "--")]
    argv = [line for line in argv if not line.startswith("--workdir")] + [f"--workdir={study}"]
    kept = looks.place()
    assert kept is not None
    look = next(iter(kept.glob("*/*.json")))
    spare = study / "looks.kept"
    shutil.copy(look, spare)

    def looked() -> Any:
        look.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(spare, look)
        contents = predictions.read_study(study)
        judging = report._judging(report.ReportFlags(), {"x": contents.judging or {}}, contents.parts)
        return looks.count(looks.judged_fits(contents.parts, "scratch"), judging, (kept,))

    again: Callable[[], Any] = lambda: compare.main(argv)  # noqa: E731
    eval_file = next(iter((study / "evals").glob("*.json")))
    return [
        Attack("study.json", "experiments.report --runs", study / "study.json", _page(study, folder), RECORD),
        Attack("study.json", "experiments.compare again", study / "study.json", again, RECORD),
        Attack("looks.json", "experiments.report --runs", study / "looks.json", _page(study, folder), RECORD),
        Attack("looks.json", "experiments.compare again", study / "looks.json", again, RECORD),
        Attack("evals/*.json", "experiments.compare again", eval_file, again, RECORD),
        Attack("cache/looks/*.json", "experiments.report, compare", spare, looked, RECORD),
    ]


def of_data(tasks: Path, folder: Path) -> Iterator[Ground]:
    """Data sets in all forms, what is kept of them, and pictures to predict."""
    place = folder / "data"
    place.mkdir()
    shutil.copy(tasks / "clothes.npz", place / "clothes.npz")
    kept = folder / "kept"

    def anew(name: str, **more: Any) -> Callable[[], Any]:
        def read() -> Any:
            shutil.rmtree(kept, ignore_errors=True)
            return data.load(name, data_dir=kept, **more)

        return read

    attacks = [Attack("data.npz", "--source, --target", place / "clothes.npz", anew(str(place / "clothes.npz")))]
    for name, array in _idx().items():
        raw = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
        file = place / f"{name}-ubyte"
        file.write_bytes(raw + array.tobytes())
        attacks.append(Attack("IDX", "data.idx", file, functools.partial(idx.read, file)))
    for split, kind in itertools.product(("train", "test"), ("cat", NOT_TEXT)):
        (place / "pictures" / split / kind).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (6, 6), 40 * number).save(place / "pictures" / split / kind / f"{number}.png")
    picture = place / "pictures" / "train" / "cat" / "0.png"
    attacks.append(Attack("CLASS/*.png", "folder:", picture, anew(f"folder:{place / 'pictures'}")))
    lines = [f"{split}/{kind}/{n}.png" for split in ("train", "test") for kind in ("cat", NOT_TEXT) for n in range(2)]
    listed = place / "splits.csv"
    text = "file,group\n" + "".join(f"{line},{i}\n" for i, line in enumerate(lines))
    listed.write_bytes(text.encode("utf-8", "surrogateescape"))
    by_list = anew(f"folder:{place / 'pictures'}:splits={listed}")
    attacks.append(Attack("splits.csv", "folder:DIR:splits=", listed, by_list, CELLS))
    shown = (6, 6, 1)
    attacks.append(Attack("*.png", "predict --images", picture, lambda: unlabelled.load(picture, shown)))
    np.savez(place / "images.npz", test_images=np.zeros((4, 6, 6), np.uint8))
    packed = place / "images.npz"
    attacks.append(Attack("images.npz", "predict --images", packed, lambda: unlabelled.load(packed, shown)))
    yield place, attacks

    data.load(str(place / "clothes.npz"), data_dir=folder / "mapped")
    [there] = (folder / "mapped" / "tljax").iterdir()
    mapped: Callable[[], Any] = lambda: data.load(str(place / "clothes.npz"), data_dir=folder / "mapped")  # noqa: E731
    files = ("task.json", "train_images.npy", "test_labels.npy")
    yield there, [Attack(f"kept/{name}", "data.load", there / name, mapped, form_of(there / name)) for name in files]

    yield from _of_tfds(folder)


def _idx() -> dict[str, np.ndarray]:
    return {"images": np.zeros((5, 4, 4), np.uint8), "labels": np.arange(5, dtype=np.uint8)}


def _of_tfds(folder: Path) -> Iterator[Ground]:
    """A data set that TFDS prepared."""
    import test_data_tfds as tiny

    place = folder / "tfds"
    with contextlib.redirect_stderr(io.StringIO()):
        tiny.make(place, {"train": [tiny.record(r) for r in range(6)], "test": [tiny.record(r) for r in range(6, 9)]})

    def read() -> Any:
        shutil.rmtree(place / "tljax", ignore_errors=True)
        return data.load("tljax_tiny", data_dir=place)

    files = sorted(file for file in place.rglob("*") if file.is_file())
    plain = {".json": PLAIN}
    yield place, [Attack(f"tfds/{_kind(file)}", "data.tfds", file, read, plain.get(file.suffix)) for file in files]


def _kind(file: Path) -> str:
    return "*.array_record" if "array_record" in file.name else file.name


def of_weights(tasks: Path, folder: Path) -> Iterator[Ground]:
    """Weights of others in both forms with their cards; rows and predictions of others; flagfiles."""
    place = folder / "weights"
    place.mkdir()
    flat = _flat()
    np.savez(place / "net.npz", **flat)
    card = {"task": "digits", "classes": list("abcd"), "shape": [6, 6, 1], "accuracy": 0.5, "steps": 3, "note": "n"}
    card |= {"model": {"model": "mlp", "hidden": [8], "activation": "relu"}, "fingerprint": "f"}
    (place / "net.npz.json").write_text(json.dumps(card))

    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in flat.items()}, place / "net.safetensors")
    shutil.copy(place / "net.npz.json", place / "net.safetensors.json")
    attacks = []
    for name in ("net.npz", "net.safetensors"):
        settings = _settings(tasks, place / name)
        for reader, read, weights_file in (
            ("--source_checkpoint", functools.partial(sources.from_checkpoint, settings), place / name),
            ("weights.read", functools.partial(weights.read, place / name), place / name),
            ("--source_checkpoint", functools.partial(_origin, place / name), place / f"{name}.json"),
        ):
            what = "card.json" if weights_file.suffix == ".json" else name
            attacks.append(
                Attack(what, reader, weights_file, read, PLAIN if weights_file.suffix == ".json" else FORMS.get(name))
            )
    for name in ("pytorch_archive.pth", "pytorch_sequence.pth", "pytorch_checkpoint.pt"):
        shutil.copy(Path(__file__).parent / "weights" / name, place)
        attacks.append(Attack(name, "experiments.convert", place / name, functools.partial(_convert, place / name)))
    yield place, attacks

    place = folder / "theirs"
    place.mkdir()
    labels = np.arange(12) % 3
    rows = ["name,source,target,strategy,seed,train_examples,steps,seconds,source_accuracy,selected_on,diverged"]
    for strategy, seed in itertools.product(("scratch", "full"), range(3)):
        rows.append(f"{strategy}{seed},s,t,{strategy},{seed},10,5,1.5,0.5,none,false")
        np.savez(place / f"{strategy}{seed}.npz", labels=labels, predicted=np.roll(labels, seed), groups=labels)
    (place / "rows.csv").write_text("\n".join(rows) + "\n")

    def judged() -> Any:
        shutil.rmtree(folder / "pages", ignore_errors=True)
        shutil.rmtree(looks.place() or folder / "pages", ignore_errors=True)
        out = str(folder / "pages")
        report.run(report.ReportFlags(results=str(place / "rows.csv"), predictions=f"{place}/*.npz", output=out))

    yield (
        place,
        [
            Attack("rows.csv", "report --results", place / "rows.csv", judged, CELLS),
            Attack("NAME.npz", "report --predictions", place / "full1.npz", judged),
        ],
    )

    place = folder / "flagfiles"
    place.mkdir()
    file = place / "a.flags"
    file.write_text(f"# x\n--source={tasks / 'digits.npz'}\n--hidden=8,9\n--seeds=0-3\n--strategies=full,last_k:k=1\n")
    yield place, [Attack("*.flags", "--flagfile", file, lambda: parse_flags(["x", f"--flagfile={file}"]))]


def _convert(file: Path) -> Any:
    """What experiments.convert makes of all that a file of PyTorch holds, to the end."""
    out = file.with_suffix(".safetensors")
    for old in (out, Path(f"{out}.json")):
        old.unlink(missing_ok=True)
    convert.run({}, convert.ConvertFlags(file=str(file), output=str(out), key="."))


def _flat() -> dict[str, np.ndarray]:
    shapes = {"hidden_0/kernel": (36, 8), "hidden_0/bias": (8,), "head/kernel": (8, 4), "head/bias": (4,)}
    return {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}


def _settings(tasks: Path, file: Path) -> Any:
    flags = ["x", f"--target={tasks / 'clothes.npz'}", "--hidden=8", "--seeds=0", f"--source_checkpoint={file}"]
    return Settings.from_flags(**parse_flags(flags))


def _origin(file: Path) -> Any:
    """A source by what its card says of its model."""
    return sources.load(sources.settings_of({"seeds": (0,)}, str(file), several=True))


PLUGINS = {
    "strategy": "def strategy(params, context, *, k: int = 1):\n    return context.fresh\n",
    "model": "from tljax.models.mlp import model\n",
    "loss": "import jax.numpy as jnp\n\n\ndef loss(logits, labels):\n    return jnp.zeros(len(labels))\n",
    "optimizer": "import optax\n\n\ndef optimizer(learning_rate):\n    return optax.sgd(learning_rate)\n",
}
PYTHON = (
    *(b"(" * DEEP, b"x = " + b"-" * DEEP + b"1", b"".join(b" " * i + b"if 1:\n" for i in range(200))),
    *(b"\0", b"# coding: none\n", b"x = " + b"9" * 5000, b"raise SystemExit(0)", b"import no_such_package", b"1 / 0"),
    *(
        b"x" + b".x" * DEEP,
        b"x = " + b"[" * 5000 + b"]" * 5000,
        b"class strategy: pass",
        b"strategy = model = loss = 3",
    ),
)
"""Python that no parser takes, or that fails."""


def of_plugins(tasks: Path, folder: Path) -> Iterator[Ground]:
    """Somebody's own files, read to the check that there is such a function."""
    place = folder / NOT_TEXT
    place.mkdir()
    reads: dict[str, Callable[[str], Any]] = {
        "strategy": plugins.method,
        "loss": objective.loss,
        "optimizer": optimizers.spec,
        "model": lambda text: models.build(text, 3, hidden=(8,), activation="relu"),
    }
    attacks = []
    for kind, text in PLUGINS.items():
        file = place / f"{kind}.py"
        file.write_text(text)
        read = functools.partial(reads[kind], f"{file}:{kind}")
        attacks.append(Attack("FILE.py", f"--{'strategies' if kind == 'strategy' else kind}", file, read))
    yield place, attacks


def grounds(tasks: Path, folder: Path) -> Iterator[Ground]:
    """All that is attacked, made in `folder`."""
    for attacks_of in (of_data, of_weights, of_plugins, of_programs):
        yield from attacks_of(tasks, folder)


def all_rows(tasks: Path, folder: Path, count: int, patience: float) -> list[Row]:
    """Every reader attacked in this process, at most `count` times a file and reader."""
    rows = []
    process._quieten_orbax()
    _silent_pages()
    for place, attacks in grounds(tasks, folder):
        restore = flips.restorer(place)
        with flips.once_loaded():
            for attack in attacks:
                begin = time.perf_counter()
                rows.append(attacked(attack, count, restore, patience))
                took = time.perf_counter() - begin
                print(f"{attack.what} by {attack.reader}: {took:.1f} s", file=sys.stderr, flush=True)
    return rows


def by_programs(tasks: Path, folder: Path) -> list[Row]:
    """Whole programs, in processes of their own, on files that nothing can be made of, and names that are no UTF-8."""
    deep, cut, odd = folder / "deep.json", folder / "cut.npz", folder / f"{NOT_TEXT}.npz"
    deep.write_bytes(b"[" * DEEP)
    cut.write_bytes((tasks / "clothes.npz").read_bytes()[:-40])
    odd.write_bytes(cut.read_bytes())
    (folder / "deep.py").write_bytes(b"(" * DEEP)
    run, broken = folder / "run", folder / "broken"
    shutil.copytree(run, broken)
    (broken / "results.jsonl").write_bytes(b"[" * DEEP)
    pair = [f"--source={tasks / 'digits.npz'}", f"--target={tasks / 'clothes.npz'}", "--hidden=8", "--steps=2"]
    lines = {
        "transfer": [
            [*pair[:1], f"--target={cut}"],
            [*pair[:1], f"--target={odd}"],
            [*pair, f"--strategies={folder / 'deep.py'}:strategy"],
            [f"--flagfile={deep}"],
            [*pair, f"--flagfile={odd}"],
            [*pair[1:], f"--source_checkpoint={broken}"],
        ],
        "compare": [[*pair, f"--tuned={folder / NOT_TEXT}"], [*pair, f"--tuned={broken}"]],
        "report": [
            [f"--runs={broken}", f"--output={folder / 'out'}"],
            [f"--results={deep}", f"--output={folder / 'out'}"],
            [f"--results={odd}", f"--predictions={odd}", f"--output={folder / 'out'}"],
        ],
        "predict": [[f"--checkpoint={broken}", f"--images={cut}", f"--output={folder / 'out.csv'}"]],
        "export": [[f"--checkpoint={broken}", f"--output={folder / 'net.npz'}"]],
        "rank": [[f"--sources={broken}", *pair[1:2], f"--workdir={folder / 'ranked2'}"]],
    }
    rows = []
    for program, arguments in lines.items():
        outcomes, slowest = Counter[str](), 0.0
        for words in arguments:
            workdir = [] if program in ("report", "predict", "export", "rank") else [f"--workdir={folder / 'new'}"]
            begin = time.perf_counter()
            argv = [sys.executable, "-m", f"experiments.{program}", *words, *workdir]
            try:
                done = subprocess.run(argv, capture_output=True, timeout=2 * SECONDS, cwd=Path(__file__).parent.parent)
                line = done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
                kind = "read" if done.returncode == 0 else "refused" if done.returncode == 1 and line else "escaped"
                message = done.stderr[-300:]
            except subprocess.TimeoutExpired as error:
                kind, message = "escaped", repr(error).encode()
            if kind == "escaped":
                print(f"ESCAPED {argv}: {message!r}", flush=True)
            slowest = max(slowest, time.perf_counter() - begin)
            outcomes[kind] += 1
        rows.append(
            Row(Attack("files and names", f"python -m experiments.{program}", deep, lambda: None), outcomes, slowest)
        )
    return rows


def main(argv: Sequence[str]) -> None:
    """Print the table of all attacks."""
    from test_programs import write_task

    folder, count = Path(argv[1]), int((*argv[2:], "60")[0])
    patience = float((*argv[3:], PATIENCE)[0])
    folder.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["TFDS_DATA_DIR"] = str(folder / "data_dir")
    write_task(folder / "digits.npz", 0, 4)
    write_task(folder / "clothes.npz", 1, 3, ["shirt", "coat", "bag"])
    rows = [*all_rows(folder, folder, count, patience), *by_programs(folder, folder)]
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv)
