"""Features on disk: the outputs of a stage of a source for every image of a data set.

A folder holds train.npy and test.npy (memory maps [n, d]) and features.json, which names their source, stage and data.
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

from experiments.runs import directory, plan, sources
from experiments.runs.sources import LoadedSource
from tljax import files, models, npz
from tljax.types import InputError, Model, Params, Task

BATCH = 1000
"""Examples in a compiled batch; the last batch is filled up."""
DTYPES = ("float32", "float16")
_FORMAT = 2


class Features(NamedTuple):
    """The outputs of a stage, float [n, d] for each split, memory-mapped."""

    train: np.ndarray
    test: np.ndarray


def sidecar(loaded: LoadedSource, task: Task, stage: str, dtype: str = "float32") -> dict[str, Any]:
    """The record in features.json, but for the SHA-256 of the arrays; raises InputError if there is no such stage."""
    sources.require_stage(loaded.model, stage)
    abstract = models.abstract(loaded.model, loaded.source.shape)
    inputs = models.batch_of(plan.example_shape(task), 1)
    outputs = jax.eval_shape(functools.partial(models.features, loaded.model), abstract, inputs)
    size = math.prod(outputs[models.names(loaded.model).index(stage)].shape)
    return {
        "format": _FORMAT,
        "source": {"task": loaded.source.name, "identity": loaded.identity},
        "stage": stage,
        "data": {"name": task.name, "fingerprint": task.fingerprint},
        "dtype": dtype,
        "shape": {"train": [len(task.train.targets), size], "test": [len(task.test.targets), size]},
    }


def write(loaded: LoadedSource, task: Task, folders: Mapping[str, Path], dtype: str = "float32") -> None:
    """Write the features of {stage: folder} in one compiled pass, except where a folder holds them already.

    Raises InputError for an unknown stage or dtype, and for a folder that holds anything else.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: give one of {', '.join(DTYPES)}")
    records = {stage: sidecar(loaded, task, stage, dtype) for stage in folders}
    missing = {stage: folder for stage, folder in folders.items() if not _written(folder, records[stage])}
    names = models.names(loaded.model)
    at = tuple(names.index(stage) for stage in missing)
    for split, part in (("train", task.train), ("test", task.test)):
        arrays, places = [], []
        for stage, folder in missing.items():
            folder.mkdir(parents=True, exist_ok=True)
            files.sweep(folder, f"{split}.npy", seconds=3600)
            shape = tuple(records[stage]["shape"][split])
            # Beside its place, under a name that nobody can guess: a link there would be followed.
            places.append((files.partial(folder / f"{split}.npy"), folder / f"{split}.npy"))
            arrays.append(np.lib.format.open_memmap(places[-1][0], mode="w+", dtype=np.dtype(dtype), shape=shape))
        for start in range(0, len(part.targets) if missing else 0, BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(part.targets) - 1)
            batches = _batch(loaded.model[: max(at) + 1], at, loaded.params, part.inputs(rows))
            for array, batch in zip(arrays, batches, strict=True):
                array[start : start + BATCH] = np.asarray(batch)[: len(array) - start]
        for array, (partial, file) in zip(arrays, places, strict=True):
            array.flush()
            os.replace(partial, file)
    for stage, folder in missing.items():  # last, since a folder with features.json counts as complete
        record = {**records[stage], "sha256": _checksums(folder)}
        directory.replace(folder / "features.json", json.dumps(record, indent=1) + "\n")


def _checksums(folder: Path) -> dict[str, str]:
    """{split: SHA-256 of its file} of a folder of features."""
    sums = {}
    for split in ("train", "test"):
        with (folder / f"{split}.npy").open("rb") as stream:
            sums[split] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


@functools.partial(jax.jit, static_argnames=("model", "at"))
def _batch(model: Model, at: tuple[int, ...], params: Params, images: jax.Array) -> list[jax.Array]:
    """The features [batch, d] of the stages at these places in the model."""
    outputs = models.features(model, params, images)
    return [outputs[i].reshape(len(outputs[i]), -1) for i in at]


def _written(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the folder holds the features of a record; raises InputError if it holds anything else."""
    if folder.is_dir() and not (folder / "features.json").is_file():
        others = {file.name for file in folder.iterdir() if not file.name.endswith(".npy.partial")}
        others -= {"train.npy", "test.npy"}
        if others:
            raise InputError(f"'{folder}' holds '{min(others)}' and no features: name a new folder")
        return False
    if not folder.exists():
        return False
    difference = _difference(folder, record)
    if difference:
        raise InputError(f"{difference}: name a new folder")
    return True


def _difference(folder: Path, record: Mapping[str, Any]) -> str:
    """How features.json differs from a record; "" if it does not. Raises InputError if it cannot be read."""
    if not folder.is_dir():
        return f"'{folder}' holds no features"
    try:
        on_disk = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        for name, value in record.items():
            if on_disk[name] != value:
                return f"'{folder}' holds features of {name} {_short(on_disk[name])}, not {_short(value)}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"'{folder}/features.json' cannot be read ({error}): compute the features again") from error
    return ""


def _short(value: Any) -> str:
    """A value of a record in a few words."""
    return ", ".join(str(part)[-40:] for part in value.values()) if isinstance(value, dict) else str(value)[:60]


def read(folder: Path, loaded: LoadedSource, task: Task, stage: str, dtype: str = "float32") -> Features:
    """The features of this source, data and stage that `write` wrote: float [n, d], memory-mapped.

    Raises InputError if features.json names others, or if the arrays differ from it in a byte.
    """
    record = sidecar(loaded, task, stage, dtype)
    difference = _difference(folder, record)
    if difference:
        raise InputError(f"{difference}: compute them with experiments.features")
    arrays = []
    for split in ("train", "test"):
        file = folder / f"{split}.npy"
        try:
            array = npz.mapped(file)
        except InputError as error:
            raise InputError(f"{error}: delete '{folder}', and compute the features again") from error
        if list(array.shape) != record["shape"][split] or str(array.dtype) != dtype:
            raise InputError(
                f"'{file}' is {array.dtype}{list(array.shape)}, not as features.json says: compute it again"
            )
        arrays.append(array)
    if json.loads((folder / "features.json").read_text(encoding="utf-8")).get("sha256") != _checksums(folder):
        raise InputError(f"'{folder}' is not as it was written: delete it, and compute the features again")
    return Features(*arrays)


def same_shape(loaded: LoadedSource, task: Task) -> None:
    """Raise InputError unless the images of a task have the shape that a source takes."""
    shape = plan.example_shape(task)
    if shape != loaded.source.shape:
        shapes = f"{sources.shown_shape(shape)}, the source {sources.shown_shape(loaded.source.shape)}"
        raise InputError(f"data set '{task.name}' has shape {shapes}: they must agree")
