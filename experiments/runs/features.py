"""Features: what a stage of a source gives for every image of a data set, on disk.

A folder has train.npy and test.npy (memory maps [n, d]) beside features.json, which says of which source, stage and
data they are.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import directory, sources
from experiments.runs.sources import LoadedSource
from tljax import files, models, npz
from tljax.types import InputError, Model, Params, Task

BATCH = 1000
"""Examples a compiled batch; the last is filled up."""
DTYPES = ("float32", "float16")
_FORMAT = 2


class Features(NamedTuple):
    """What a stage gives, float [n, d] each, memory-mapped."""

    train: np.ndarray
    test: np.ndarray


def sidecar(loaded: LoadedSource, task: Task, stage: str, dtype: str = "float32") -> dict[str, Any]:
    """What features.json says."""
    abstract = models.abstract(loaded.model, loaded.source.shape)
    image = jax.ShapeDtypeStruct((1, *task.train.images.shape[1:]), task.train.images.dtype)
    out = jax.eval_shape(functools.partial(models.features, loaded.model), abstract, image)
    size = math.prod(out[models.names(loaded.model).index(stage)].shape)
    return {
        "format": _FORMAT,
        "source": {"task": loaded.source.name, "identity": loaded.identity},
        "stage": stage,
        "data": {"name": task.name, "fingerprint": task.fingerprint},
        "dtype": dtype,
        "shape": {"train": [len(task.train.labels), size], "test": [len(task.test.labels), size]},
    }


def write(loaded: LoadedSource, task: Task, folders: Mapping[str, Path], dtype: str = "float32") -> None:
    """Write the features of {stage: folder} in one compiled pass; a folder that holds them already is left as it is.

    Raises InputError for an unknown stage or dtype, and a folder with something else in it.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: give one of {', '.join(DTYPES)}")
    wanted = {stage: _wanted(loaded, task, stage, dtype) for stage in folders}
    missing = {stage: folder for stage, folder in folders.items() if not _is_there(folder, wanted[stage])}
    names = models.names(loaded.model)
    at = tuple(names.index(stage) for stage in missing)
    for split, part in (("train", task.train), ("test", task.test)):
        outs, places = [], []
        for stage, folder in missing.items():
            folder.mkdir(parents=True, exist_ok=True)
            files.sweep(folder, f"{split}.npy", seconds=3600)
            shape = tuple(wanted[stage]["shape"][split])
            # Beside its place, under a name that nobody can guess: a link there would be followed.
            places.append((files.partial(folder / f"{split}.npy"), folder / f"{split}.npy"))
            outs.append(np.lib.format.open_memmap(places[-1][0], mode="w+", dtype=np.dtype(dtype), shape=shape))
        for start in range(0, len(part.labels) if missing else 0, BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(part.labels) - 1)
            outputs = _batch(loaded.model[: max(at) + 1], at, loaded.params, np.asarray(part.images[rows]))
            for out, values in zip(outs, outputs, strict=True):
                out[start : start + BATCH] = np.asarray(values)[: len(out) - start]
        for out, (partial, file) in zip(outs, places, strict=True):
            out.flush()
            os.replace(partial, file)
    for stage, folder in missing.items():  # last: only then they are there
        whole = {**wanted[stage], "sha256": _sums(folder)}
        directory.replace(folder / "features.json", json.dumps(whole, indent=1) + "\n")


def _sums(folder: Path) -> dict[str, str]:
    digests = {}
    for split in ("train", "test"):
        with (folder / f"{split}.npy").open("rb") as stream:
            digests[split] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _wanted(loaded: LoadedSource, task: Task, stage: str, dtype: str) -> dict[str, Any]:
    sources.require_stage(loaded.model, stage)
    return sidecar(loaded, task, stage, dtype)


@functools.partial(jax.jit, static_argnames=("model", "at"))
def _batch(model: Model, at: tuple[int, ...], params: Params, images: jax.Array) -> list[jax.Array]:
    outputs = models.features(model, params, images)
    return [outputs[i].reshape(len(images), -1) for i in at]


def _is_there(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the folder holds these features; raises InputError where it holds anything else."""
    if folder.is_dir() and not (folder / "features.json").is_file():
        others = {file.name for file in folder.iterdir() if not file.name.endswith(".npy.partial")}
        others -= {"train.npy", "test.npy"}
        if others:
            raise InputError(f"'{folder}' holds '{min(others)}' and no features: name a new folder")
        return False
    if not folder.exists():
        return False
    differs = _difference(folder, wanted)
    if differs:
        raise InputError(f"{differs}: name a new folder")
    return True


def _difference(folder: Path, wanted: Mapping[str, Any]) -> str:
    """What of features.json is not as told; '' for nothing. Raises InputError where it cannot be read."""
    if not folder.is_dir():
        return f"'{folder}' holds no features"
    try:
        record = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if record[name] != value:
                return f"'{folder}' holds features of {name} {_short(record[name])}, not {_short(value)}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"'{folder}/features.json' cannot be read ({error}): compute the features again") from error
    return ""


def _short(value: Any) -> str:
    return ", ".join(str(part)[-40:] for part in value.values()) if isinstance(value, dict) else str(value)[:60]


def read(folder: Path, loaded: LoadedSource, task: Task, stage: str, dtype: str = "float32") -> Features:
    """Features that were written before, of this source, data and stage: float [n, d], memory-mapped.

    Raises InputError where features.json says of another one, or the arrays are not as it says, to the byte.
    """
    wanted = _wanted(loaded, task, stage, dtype)
    differs = _difference(folder, wanted)
    if differs:
        raise InputError(f"{differs}: compute them with experiments.features")
    arrays = []
    for split in ("train", "test"):
        file = folder / f"{split}.npy"
        try:
            array = npz.mapped(file)
        except InputError as error:
            raise InputError(f"{error}: delete '{folder}', and compute the features again") from error
        if list(array.shape) != wanted["shape"][split] or str(array.dtype) != dtype:
            raise InputError(
                f"'{file}' is {array.dtype}{list(array.shape)}, not as features.json says: compute it again"
            )
        arrays.append(array)
    if json.loads((folder / "features.json").read_text(encoding="utf-8")).get("sha256") != _sums(folder):
        raise InputError(f"'{folder}' is not as it was written: delete it, and compute the features again")
    return Features(*arrays)


def same_shape(loaded: LoadedSource, task: Task) -> None:
    """Raise InputError unless the images of a task have the shape that a source takes."""
    shape = tuple(task.train.images.shape[1:])
    if shape != loaded.source.shape:
        raise InputError(f"data set '{task.name}' has shape {shape}, the source {loaded.source.shape}: they must agree")
