"""Bad inputs, drawn by a seed: flags, flagfiles, data, checkpoints and run directories that nothing can be made of."""

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from test_checkpoint import rewrite as rewrite_checkpoint
from test_programs import command

from experiments.runs import directory
from tljax import checkpoint
from tljax.data import idx


class Ground(NamedTuple):
    """What there is to spoil."""

    tasks: Path
    finished: Path
    folder: Path
    """A new one for each case."""
    random: random.Random

    def command(self, **change) -> list[str]:
        return command(self.tasks, self.folder, **change)


Case = tuple[str, list[str]]
"""(what is wrong, command line); its files are written."""

INTS = ("batch_size", "epochs", "steps", "source_steps", "source_epochs", "source_seed", "order_seed", "devices")
FLOATS = ("learning_rate", "momentum", "weight_decay", "clip", "warmup", "validation", "source_learning_rate")
WORDS = (
    *("head", "many", "features_dtype", "optimizer", "schedule", "loss", "model", "activation", "penalty", "target"),
    *("metric", "primary", "class_weights"),
)
LISTS = ("seeds", "hidden", "train_examples", "image_shape", "strategies")
GARBAGE = "abcxyz:=,.[](){}*?!%$#@/\\'\"~ \t\u00e4\u4e2d\U0001f600-_"
"""Of which no word that any of them accepts can be made."""


def garbage(ground: Ground) -> str:
    return "x" + "".join(ground.random.choices(GARBAGE, k=ground.random.randint(1, 30))) + "q"


def flags(ground: Ground) -> Case:
    draw = ground.random
    name = draw.choice((*INTS, *FLOATS, *WORDS, *LISTS))
    typo = name.replace(draw.choice(name.strip("_")), draw.choice("qj"), 1) + "z"
    value = draw.choice(["x", "1.5", "-1", "1e3", "9" * 30, "nan", "0x", "--"])
    if name in FLOATS:
        value = draw.choice(["x", "nan", "inf", "-inf", "1e999", "-1", "1,5", "\u066b"])
    if name in WORDS:
        value = garbage(ground)
    if name in LISTS:
        value = draw.choice([garbage(ground), "-1", ",", "1,x", "0,0,0,0", "9" * 30])
    path = draw.choice((*WORDS, "source", "strategies", "workdir"))
    ways = {
        f"{name}={value}": ground.command(**{name: value}),
        f"{name} is {value}": ground.command(**{name: value}),
        f"{name}=": ground.command(**{name: ""}),
        "unknown flag": ground.command(**{typo: "1"}),
        "no flag": [*ground.command(), draw.choice(["x", "epochs=1", "-", "\u2013epochs=1", "seeds", " "])],
        "zero byte": ground.command(**{path: "a\0b"}),
    }
    if name in ("penalty", "hidden", "image_shape"):
        del ways[f"{name}="]  # means none
    return draw.choice(sorted(ways.items()))


def flagfiles(ground: Ground) -> Case:
    draw = ground.random
    file = ground.folder / "bad.flags"
    texts = {
        "bytes": draw.randbytes(draw.randint(1, 200)) + b"\xff",
        "garbage": f"--{garbage(ground)}=1\n".encode(),
        "no value": b"--epochs=1\n--learning_rate\n",
        "nowhere": b"--flagfile=nowhere.flags\n",
        "bad value": f"--epochs={garbage(ground)}\n".encode(),
        "cut": b"--epo",
        "zero bytes": b"\0\0\0",
    }
    what = draw.choice([*texts, "none"])
    if what == "none":
        return "no flagfile", [*ground.command(), f"--flagfile={draw.choice([ground.folder, 'nowhere', 'a' * 300])}"]
    file.parent.mkdir()
    file.write_bytes(texts[what])
    return f"flagfile: {what}", [*ground.command(), f"--flagfile={file}"]


def arrays(ground: Ground) -> Case:
    """An .npz file with one thing wrong."""
    draw = ground.random
    with np.load(ground.tasks / "clothes.npz") as file:
        good = dict(file)

    def spoil(**change) -> Callable[[Path], None]:
        return lambda file: np.savez(file, **{k: v for k, v in {**good, **change}.items() if v is not None})

    def cut(file: Path) -> None:
        raw = (ground.tasks / "clothes.npz").read_bytes()
        file.write_bytes(raw[: draw.randrange(len(raw) - 30)])

    def alter(file: Path) -> None:
        raw = bytearray((ground.tasks / "clothes.npz").read_bytes())
        place = draw.randrange(1000, 4000)  # within the pictures, which the archive's sums cover
        raw[place] ^= 1 << draw.randrange(8)
        file.write_bytes(raw)

    split = draw.choice(["train", "test"])
    images, labels = good[f"{split}_images"], good[f"{split}_labels"]
    ways = {
        "cut": cut,
        "altered": alter,
        "empty": lambda file: file.write_bytes(b""),
        "noise": lambda file: file.write_bytes(draw.randbytes(500)),
        "folder": lambda file: file.mkdir(),
        "missing": spoil(**{draw.choice(list(good)[:4]): None}),
        "label": spoil(**{f"{split}_labels": np.where(np.arange(len(labels)) == 7, draw.choice([-1, 3, 99]), labels)}),
        "float labels": spoil(**{f"{split}_labels": labels + 0.5}),
        "text labels": spoil(**{f"{split}_labels": labels.astype(str)}),
        "few labels": spoil(**{f"{split}_labels": labels[:-1]}),
        "deep labels": spoil(**{f"{split}_labels": labels[:, None]}),
        "flat": spoil(**{f"{split}_images": images.reshape(-1)}),
        "objects": spoil(**{f"{split}_images": np.array([None] * len(images), object)}),
        "wide integers": spoil(**{f"{split}_images": images.astype(np.int64)}),
        "complex": spoil(**{f"{split}_images": images.astype(np.complex64)}),
        "no examples": spoil(**{f"{split}_images": images[:0], f"{split}_labels": labels[:0]}),
        "not finite": spoil(**{f"{split}_images": np.where(images == images[3, 2, 1], np.nan, images.astype(float))}),
        "one class": spoil(train_labels=good["train_labels"] * 0, test_labels=good["test_labels"] * 0),
        "names": spoil(class_names=np.array(["a", "a", "b"])),
        "numbers for names": spoil(class_names=np.arange(3)),
        "few names": spoil(class_names=np.array(["a", "b"])),
    }
    way = draw.choice(sorted(ways))
    ground.folder.mkdir()
    ways[way](ground.folder / "bad.npz")
    return f"npz: {way}", ground.command(**{draw.choice(["source", "target"]): str(ground.folder / "bad.npz")})


def folders(ground: Ground) -> Case:
    """Pictures in folders with one thing wrong."""
    draw = ground.random
    place = ground.folder / "pictures"
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (place / split / kind).mkdir(parents=True)
            Image.fromarray(np.full((6, 6), draw.randrange(256), np.uint8)).save(place / split / kind / "0.png")
    split, kind = draw.choice(["train", "test"]), draw.choice(["cat", "dog"])
    picture = place / split / kind / "0.png"
    ways = {
        "no split": lambda: shutil.rmtree(place / split),
        "no class": lambda: shutil.rmtree(place / split / kind),
        "no picture": picture.unlink,
        "cut": lambda: picture.write_bytes(picture.read_bytes()[: draw.randrange(40)]),
        "noise": lambda: picture.write_bytes(draw.randbytes(90)),
        "text": lambda: (place / split / kind / "notes.txt").write_text("x"),
        "file for a class": lambda: (place / split / "bird").write_text("x"),
        "another size": lambda: Image.new("L", (7, 6)).save(picture),
    }
    way = draw.choice(sorted(ways))
    ways[way]()
    return f"folder: {way}", ground.command(target=f"folder:{place}")


def archives(ground: Ground) -> Case:
    """IDX files that are not those of the data set."""
    draw = ground.random
    name = draw.choice(idx.COMPLETE)
    (ground.folder / name).mkdir(parents=True)
    for file in idx.FILES[: draw.choice([3, 4, 4, 4])]:
        raw = gzip.compress(bytes([0, 0, 8, draw.choice([1, 3])]) + draw.randbytes(draw.randrange(90)))
        (ground.folder / name / f"{file}.gz").write_bytes(raw[: draw.choice([None, len(raw) // 2])])
    return f"idx: {name}", ground.command(target=name, manual_dir=str(ground.folder))


def checkpoints(ground: Ground) -> Case:
    """A checkpoint of the source with one thing wrong, by chance or on purpose."""
    draw = ground.random
    line = next(line for line in directory.results(ground.finished) if line.strategy == "pretrain")
    original = ground.finished / line.checkpoint
    fits, about_fits = checkpoint.load(original)
    about = {name: value for name, value in about_fits.items() if name != "sha256"}
    fit, place = line.name, ground.folder / "bad"

    def other(change: Callable[[dict], dict]) -> Callable[[], None]:
        """Another checkpoint, consistent in itself."""
        return lambda: checkpoint.save(place, {name: change(dict(flat)) for name, flat in fits.items()}, about)

    def mixed(change: Callable[[dict], dict]) -> Callable[[], None]:
        """The arrays of the one, the words of the other."""

        def write() -> None:
            other(change)()
            shutil.copy(original / "meta" / "metadata", place / "meta" / "metadata")

        return write

    def copied(change: Callable[[], object]) -> Callable[[], None]:
        def write() -> None:
            shutil.copytree(original, place)
            change()

        return write

    def changed_about(change: Callable[[dict], object]) -> Callable[[], None]:
        return copied(lambda: rewrite_checkpoint(place, change))

    def cut(name: str) -> Callable[[], None]:
        def change() -> None:
            file = max(place.glob(name), key=lambda file: file.stat().st_size)
            half = file.stat().st_size // 2  # the last bytes may be of an index that no array needs
            file.write_bytes(file.read_bytes()[: draw.randrange(half)])

        return copied(change)

    leaf = draw.choice(sorted(fits[fit]))
    leaves = {
        "missing": lambda flat, leaf=leaf: {path: flat[path] for path in flat if path != leaf},
        "extra": lambda flat: {**flat, "hidden_0/more": np.zeros(3, np.float32)},
        "resized": lambda flat, leaf=leaf: {**flat, leaf: np.concatenate([flat[leaf], flat[leaf]])},
        "retyped": lambda flat, leaf=leaf: {**flat, leaf: flat[leaf].astype(np.float16)},
        "renamed": lambda flat, leaf=leaf: {leaf + "s" if path == leaf else path: flat[path] for path in flat},
    }
    field = draw.choice(["classes", "shape", "model", "fits", "task", "fingerprint", "fisher"])
    ways = {
        **{f"{way}, consistent": other(change) for way, change in leaves.items() if way != "resized" or "0" in leaf},
        **{f"{way}, mixed": mixed(change) for way, change in leaves.items()},
        "cut words": cut("meta/metadata"),
        "cut arrays": cut("state/ocdbt.process_0/d/*"),
        "cut index": cut("state/manifest.ocdbt"),
        "cut names": cut("state/_METADATA"),
        "no arrays": copied(lambda: shutil.rmtree(place / "state")),
        "no words": copied(lambda: shutil.rmtree(place / "meta")),
        "lost": changed_about(lambda meta, field=field: meta["about"].pop(field)),
        "of another kind": changed_about(
            lambda meta, field=field: meta["about"].update({field: draw.choice([7, [7], "x", None])})
        ),
        "another format": changed_about(lambda meta: meta.update(format=draw.choice(["x", 3, None]))),
        "link": copied(lambda: (place / "link").symlink_to("/etc")),
        "outside": changed_about(lambda meta: meta["leaves"][fit].update({"../../x": ["float32", [2], ""]})),
        "huge": changed_about(lambda meta, leaf=leaf: meta["leaves"][fit][leaf].__setitem__(1, [10**6, 10**6])),
        "deep": copied(lambda: (place / "meta" / "metadata").write_text("[" * 10**5)),
        "no fits": lambda: checkpoint.save(place, {"x": {"y": np.zeros(1)}}, about),
    }
    way = draw.choice(sorted(ways))
    ground.folder.mkdir()
    ways[way]()
    return f"checkpoint: {way} ({leaf}, {field})", ground.command(source=None, source_checkpoint=str(place))


def runs(ground: Ground) -> Case:
    """A run directory that cannot be taken up as it is."""
    draw, place = ground.random, ground.folder / "w"
    rest = {"weight_decay": 0.01, "clip": 1.0}

    def line(change: Callable[[dict], object], honest: bool = False) -> Callable[[], None]:
        def write() -> None:
            lines = (place / "results.jsonl").read_text().splitlines()
            number = draw.randrange(len(lines))
            record = json.loads(lines[number])
            change(record)
            if honest:
                del record["sha256"]
                record["sha256"] = directory.digest(record)
            lines[number] = json.dumps(record)
            (place / "results.jsonl").write_text("\n".join(lines) + "\n")

        return write

    def cut() -> None:
        raw = (place / "results.jsonl").read_bytes()
        ends = {i for i, byte in enumerate(raw) if byte == 10}
        where = draw.choice([i for i in range(1, len(raw) - 1) if i not in ends and i - 1 not in ends])
        (place / "results.jsonl").write_bytes(raw[:where])

    def swapped(name: str) -> Callable[[], None]:
        def write() -> None:
            (place / name).unlink()
            (place / name).mkdir()

        return write

    def other(name: str) -> None:
        shutil.rmtree(place) if name == "file" else (place / "flags.flags").unlink()
        (place if name == "file" else place / "thesis.tex").write_text("x")

    field = draw.choice(["key", "name", "strategy", "steps", "test_accuracy", "checkpoint", "seed", "options"])
    outside = draw.choice(["../x", "/etc/passwd", "checkpoints/../../x", "", "a/b/c", "..", "predictions/\0"])
    ways = {
        "cut results": cut,
        "lost field": line(lambda record, field=field: record.pop(field)),
        "altered field": line(lambda record, field=field: record.update({field: draw.choice([7.5, "x", None, [1]])})),
        "outside": line(
            lambda record, to=outside: record.update({draw.choice(["checkpoint", "predictions"]): to}), True
        ),
        "results of bytes": lambda: (place / "results.jsonl").write_bytes(b"\xff" + draw.randbytes(50)),
        "flags of bytes": lambda: (place / "flags.flags").write_bytes(b"\xff" + draw.randbytes(50)),
        "other flags": lambda: (place / "flags.flags").write_text("--hidden=7\n"),
        "no flags": (place / "flags.flags").unlink,
        "folder for results": swapped("results.jsonl"),
        "folder for flags": swapped("flags.flags"),
        "another host": lambda: (place / ".lock").write_text(f"process {draw.randrange(99)} on host elsewhere\n"),
        "folder for a lock": swapped(".lock"),
        "file for a run": lambda: other("file"),
        "strangers": lambda: other("strangers"),
    }
    way = draw.choice([*sorted(ways), "another experiment"])
    shutil.copytree(ground.finished, place)
    if way == "another experiment":
        return "run: another experiment", ground.command(**rest, learning_rate=draw.random())
    ways[way]()
    return f"run: {way} ({field}, {outside!r})", ground.command(**rest)


def cases(tasks: Path, finished: Path, folder: Path, seed: int, count: int) -> Iterator[tuple[str, list[str], Path]]:
    """`count` times (what is wrong, command line, folder of the case), each made when it is asked for."""
    kinds = (flags, flags, checkpoints, arrays, runs, flags, folders, flagfiles, checkpoints, arrays, runs, archives)
    for number in range(count):
        ground = Ground(tasks, finished, folder / f"{number}", random.Random(f"{seed}-{number}"))
        what, argv = kinds[number % len(kinds)](ground)
        yield what, argv, ground.folder
