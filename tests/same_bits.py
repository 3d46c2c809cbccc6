"""Whether two trees give the same results to the bit: a change that only moves and renames must.

    python tests/same_bits.py record FOLDER      in the old tree, and in the new one with another FOLDER
    python tests/same_bits.py compare OLD NEW    what differs; exit code 1 if anything does
    python tests/same_bits.py digest FOLDER      takes the digests again of what is there

The commands cover each driver of a fit: the quick start, strategies with phases, penalties, fits side by side and over
devices, a search, a comparison with further test sets, a ranking, features, predictions and an export. Digests are of
results.jsonl less times and keys, of every array of checkpoints, predictions, curves and features, and of files of
numbers. Keys of fits may change between trees, so names are taken without them. What is printed is kept beside the
digests to be read, and not compared. About four minutes on two cores.
"""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tljax import checkpoint

MLP = "--source=mnist_10k --target=fashion_mnist_10k --hidden=64 --steps=60 --batch_size=32 --learning_rate=0.1"
COMMANDS = {
    "quickstart": "transfer --flagfile=ROOT/experiments/flags/quickstart.flags --workdir=W/quickstart",
    "phases": f"transfer {MLP} --strategies=lp_ft,gradual_unfreeze,auto_rgn,lora,random_mask --points=3 --seeds=0,1 "
    "--train_examples=5/class,all --momentum=0.9 --workdir=W/phases",
    "penalty": f"transfer {MLP} --strategies=full,layerwise_decay --penalty=l2:weight=1e-3,ewc:weight=1 "
    "--source_penalty= --save_fisher --optimizer=adamw --weight_decay=0.01 --clip=1 --schedule=cosine --warmup=0.1 "
    "--validation=0.2 --label_smoothing=0.1 --train_examples=100 --workdir=W/penalty",
    "beside": f"transfer {MLP} --strategies=full,head_only,gradual_unfreeze --seeds=0,1,2 --many=vmap --devices=2 "
    "--workdir=W/beside",
    "pmap": f"transfer {MLP} --strategies=full,bias_only --seeds=0 --parallel=pmap --devices=2 --workdir=W/pmap",
    "mesh": f"transfer {MLP} --strategies=full --seeds=0,1 --mesh=data:2 --model=cnn --hidden=4,8 --workdir=W/mesh",
    "pretrain": "pretrain --source=mnist_10k --hidden=64 --steps=100 --seeds=0,1 --workdir=W/pretrain",
    "zoo": "zoo --zoo=mnist_10k,mnist_10k:rotate=90,fashion_mnist_10k:labels=0-4,mnist_10k:shuffle_labels=1.0 "
    "--hidden=64 --steps=60 --workdir=W/zoo",
    "rank": "rank --sources=W/zoo --target=fashion_mnist_10k --train_examples=10/class --hidden=64 --steps=40 "
    "--batch_size=32 --seeds=0,1 --verify --workdir=W/rank",
    "search": f"search {MLP} --strategies=scratch,head_only --per_strategy --space=learning_rate:log:1e-3:1 "
    "--space=batch_size:in:16,32 --trials=6 --group=3 --pruner=Median --workdir=W/search",
    "range": f"search {MLP} --strategies=head_only --lr_range_test --workdir=W/range",
    "compare": f"compare {MLP} --strategies=scratch,full,head_only,lp_ft --train_examples=5/class,100/class "
    "--seeds=0-2 --eval=source,fashion_mnist_10k:noise=0.2 --workdir=W/compare",
    "tuned": f"compare {MLP.partition(' --hidden')[0]} --strategies=scratch,head_only "
    "--tuned=W/search --seeds=0-2 --workdir=W/tuned",
    "report": "report --runs=W/compare --output=W/report",
    "features": "features --source_checkpoint=W/pretrain --dataset=fashion_mnist_10k --seeds=0 --output=W/features",
    "from_checkpoint": "transfer --source_checkpoint=W/pretrain --target=fashion_mnist_10k --hidden=64 --steps=40 "
    "--strategies=full,head_only --seeds=0,1 --workdir=W/from_checkpoint",
    "export": "export --checkpoint=W/pretrain --fit=pretrain-mnist_10k-seed0 --output=W/mnist.safetensors",
    "predict": "predict --checkpoint=W/mnist.safetensors --images=W/images.npz --output=W/predicted.csv",
    "decay": f"transfer {MLP} --strategies=full,head_only --optimizer=adamw --weight_decay=0.05 --workdir=W/decay",
    "photographs": "transfer --source=folder:photographs --target=folder:photographs:rotate=90 "
    "--image_shape=24,16,3 "
    "--model=cnn --strategies=full,head_only --steps=20 --batch_size=8 --data_dir=W/data --workdir=W/photographs_run",
}
NEUTRAL = {"resize": "squash", "decay": "all"}
"""Flags whose default gives other bits than before there was the flag, at the value under which nothing changes."""
TIMES = (
    *("seconds", "source_seconds", "features_seconds", "owner", "begin", "end", "place"),
    *("sha256", "key", "recipe", "predictions_sha256", "masks_sha256", "peak_bytes"),
)
"""What differs between two runs of one tree, and digests of what has a key in it."""
KEY = re.compile(r"-[0-9a-f]{8}([0-9a-f]{8})?(?![0-9a-f])")
ROOT = Path(__file__).absolute().parent.parent


def plain(value: Any) -> Any:
    """`value` without times, digests and keys."""
    if isinstance(value, dict):
        return {KEY.sub("", name): plain(part) for name, part in value.items() if name not in TIMES}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return KEY.sub("", value) if isinstance(value, str) else value


def of_json(value: Any) -> str:
    """A short digest of JSON."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def of_arrays(arrays: Any) -> str:
    """A short digest of {name: array}."""
    parts = [(KEY.sub("", name), array.dtype.str, list(array.shape), array.tobytes()) for name, array in arrays.items()]
    digest = hashlib.sha256()
    for name, dtype, shape, data in sorted(parts):
        digest.update(json.dumps([name, dtype, shape]).encode() + data)
    return digest.hexdigest()[:16]


def digests(folder: Path) -> dict[str, str]:
    """{file or fit: digest} of all results below a folder; those of one name (less the keys) are sorted and joined."""
    every: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        for name, digest in _of_file(file):
            every.setdefault(KEY.sub("", f"{file.relative_to(folder)}{name}"), []).append(digest)
    return {name: " ".join(sorted(parts)) for name, parts in every.items()}


def _of_file(file: Path) -> Iterator[tuple[str, str]]:
    """(what of a file, its digest) for all that is compared."""
    if file.name == "results.jsonl":
        for text in file.read_text().splitlines():
            line = json.loads(text)
            yield f" {line['name']}", of_json(line)
            for fit, flat in checkpoint.load(file.parent / line["checkpoint"])[0].items():
                if fit.startswith(line["name"]):
                    yield f" {fit} parameters", of_arrays(flat)
    elif file.suffix == ".npz" and "images" not in file.name:
        with np.load(file) as arrays:
            yield "", of_arrays({key: arrays[key] for key in arrays.files if key not in TIMES})
    elif file.suffix == ".npy":
        yield "", of_arrays({"": np.load(file)})
    elif file.suffix == ".json" and (file.parent.name in ("evals", "masks") or file.stem in ("ranking", "study")):
        yield "", of_json(json.loads(file.read_text()))
    elif file.suffix == ".csv":
        yield "", hashlib.sha256(_without_times(file.read_bytes())).hexdigest()[:16]
    elif file.suffix == ".safetensors":
        yield "", hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _without_times(table: bytes) -> bytes:
    rows = list(csv.reader(io.StringIO(KEY.sub("", table.decode()))))
    times = {i for i, heading in enumerate(rows[0]) if "second" in heading or heading in TIMES}
    return json.dumps([[cell for i, cell in enumerate(row) if i not in times] for row in rows]).encode()


def record(folder: Path, only: list[str]) -> None:
    """Run the commands in the tree at hand, and leave digests.json and what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", test_images=rng.integers(0, 256, (50, 28, 28, 1)).astype(np.uint8))
    draw_photographs(folder / "photographs")
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    for name, text in COMMANDS.items():
        if only and name not in only:
            continue
        start = time.monotonic()
        command = [
            sys.executable,
            "-m",
            *f"experiments.{text}".replace("W/", f"{folder}/").replace("ROOT", str(ROOT)).split(),
            *neutral(text),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        (folder / f"{name}.txt").write_text(done.stdout + done.stderr)
        print(f"{name}: exit code {done.returncode}, {time.monotonic() - start:.1f} s", flush=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    keep_digests(folder)


def neutral(text: str) -> list[str]:
    """The flags at their neutral values that the program of a command has in the tree at hand."""
    program, *_ = text.split()
    command = [sys.executable, "-m", f"experiments.{program}", "--helpfull"]
    known = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return [f"--{name}={value}" for name, value in NEUTRAL.items() if re.search(rf"--(\[no\])?{name}\b", known)]


def draw_photographs(folder: Path) -> None:
    """Pictures of two classes and of many sizes, which no shape leaves as they are."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 16), ("test", 8)):
        for label in ("dark", "light"):
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                height, width = rng.integers(20, 60, 2)
                low = 128 * (label == "light")
                pixels = rng.integers(low, low + 128, (height, width, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")


def keep_digests(folder: Path) -> None:
    """Leave digests.json of what the commands left in a folder."""
    result = digests(folder)
    (folder / "digests.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(f"{len(result)} digests")


def compare(old: Path, new: Path) -> None:
    """Print what differs; exit code 1 if anything does."""
    there, here = (json.loads((folder / "digests.json").read_text()) for folder in (old, new))
    differ = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    for name in differ:
        print(f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here")
    print(f"{len(there)} digests there, {len(here)} here, {len(differ)} differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"] and sys.argv[2:]:
        record(Path(sys.argv[2]).absolute(), sys.argv[3:])
    elif sys.argv[1:2] == ["digest"] and len(sys.argv) == 3:
        keep_digests(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
