"""Checkpoints by Orbax: a folder holds the parameters of one group of fits, flat by path, and what they are.

Orbax restores flipped bytes, wrong dtypes and holed trees without a word, so each leaf's dtype, shape and SHA-256
(path, dtype, shape, bytes) are stored beside it. At each load dtypes and shapes are held against Orbax's own before
an array is read, and the sums after; nothing is converted. A leaf of which several fits have the same bytes is stored
once, with the first of them, and loaded once: what they share of a frozen model takes the room of one. A checkpoint may
come from anybody: no link in it is followed, no name in it leads out of its folder, and since arrays are stored as they
are, without compression, it cannot ask for more memory than it takes on disk.
"""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import paths
from tljax.files import not_text
from tljax.types import InputError, Params

Flat = dict[str, np.ndarray]
"""{path of the leaf: array}."""

_FORMAT = "tljax-parameters-3"
_READ = ("tljax-parameters-2", _FORMAT)
"""In the second format each fit's leaves were stored, whether or not another fit's had the same bytes."""


class _Record(NamedTuple):
    """A checkpoint's record of a leaf, stored beside the leaf's array."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


_Records = Mapping[str, Mapping[str, _Record]]
"""{name of the fit: {path of the leaf: record}}."""


def _kind(leaf: Any) -> str:
    """The dtype and shape of an array or a record as text, such as 'float32[3, 2]'."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def flatten(params: Params) -> Flat:
    """{path: array} of the leaves of a tree; random keys become the numbers that they are.

    >>> flatten({"head": {"bias": np.zeros(2)}})
    {'head/bias': array([0., 0.])}
    """
    return {path: np.asarray(_plain(leaf)) for path, leaf in paths.items(params)}


def _plain(leaf: Any) -> Any:
    """The leaf itself, or the numbers of a leaf that holds random keys."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds random keys, which NumPy does not take as numbers."""
    return jax.dtypes.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key)


def unflatten(flat: Mapping[str, Any], like: Params) -> Params:
    """The tree of `like` with the arrays of `flat`. Raises InputError where paths, shapes or dtypes differ.

    >>> unflatten({"a": np.ones(1)}, {"a": np.zeros(1)})
    {'a': array([1.])}
    """
    keys = {path for path, leaf in paths.items(like) if is_key(leaf)}
    expected = {path: jax.eval_shape(_plain, leaf) if path in keys else leaf for path, leaf in paths.items(like)}
    for path in sorted(expected.keys() | flat.keys()):
        stored_kind, model_kind = (_kind(tree[path]) if path in tree else "absent" for tree in (flat, expected))
        if stored_kind != model_kind:
            raise InputError(
                f"leaf '{path}' is {stored_kind} in the checkpoint, {model_kind} in the model: they do not match"
            )
    leaves = [jax.random.wrap_key_data(flat[path]) if path in keys else flat[path] for path in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def digest(path: str, leaf: np.ndarray) -> str:
    """SHA-256 of a leaf's path, dtype, shape and bytes."""
    head = json.dumps([path, str(leaf.dtype), list(leaf.shape)]).encode()
    total = hashlib.sha256(head)
    total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)  # without a copy of it
    return total.hexdigest()


def save(directory: Path, fits: Mapping[str, Params], about: Mapping[str, Any]) -> None:
    """Write {name of the fit: parameters} and `about` (JSON) to a new folder, whole or not at all.

    Raises InputError if the folder exists (nothing is written over), if a name is not a plain path, and if the folder
    cannot be written.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if directory.exists():
        raise InputError(f"checkpoint '{directory}' exists already: nothing is written over; choose another folder")
    state = {name: flatten(params) for name, params in fits.items()}
    for name, flat in state.items():
        _require_plain(directory, name, flat)
    digests: dict[tuple[str, int], str] = {}  # of an array that several fits hold: taken once

    def record(path: str, leaf: np.ndarray) -> _Record:
        key = (path, id(leaf))
        digests[key] = digests[key] if key in digests else digest(path, leaf)
        return _Record(str(leaf.dtype), leaf.shape, digests[key])

    records = {name: {path: record(path, leaf) for path, leaf in flat.items()} for name, flat in state.items()}
    arrays: dict[str, Flat] = {}
    for name, path in _first_places(records).values():
        arrays.setdefault(name, {})[path] = state[name][path]
    meta = {"format": _FORMAT, "leaves": records, "about": dict(about)}
    meta["digest"] = _meta_digest(meta)
    try:
        with _checkpointer() as writer:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta))
            writer.save(directory, args=args)
    except Exception as error:  # the errors of Orbax and its dependencies have no type in common
        for partial in directory.parent.glob(f"{glob.escape(directory.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)  # the partial folder may be what fills the disk
        no_threads = "start new thread" in str(error)
        remedy = (
            "raise this process's limits (ulimit -v, ulimit -u)" if no_threads else "make room or give another folder"
        )
        raise InputError(
            f"checkpoint '{directory}' cannot be written ({_summary(error)}): {remedy}, and run again"
        ) from error


def _summary(error: Exception) -> str:
    """An error's message in one line; the system's own message where TensorStore's long one holds its code."""
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else text[:200]


def _checkpointer() -> Any:
    """An Orbax checkpointer that saves and loads whole in this process alone, and waits for no other process."""
    import orbax.checkpoint as ocp

    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process-{process}"
    )
    state = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(state=state, meta=meta, composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _meta_digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint's metadata without its entry "digest"."""
    text = json.dumps({name: part for name, part in meta.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_plain(directory: Path, name: str, flat: Mapping[str, Any]) -> None:
    """Raises InputError if a name could lead out of the folder, as names become paths in it."""
    for text, parts in ((name, [name]), *((path, path.split("/")) for path in flat)):
        if any(part in ("", ".", "..") or "/" in part or not part.isprintable() for part in parts):
            raise InputError(f"checkpoint '{directory}': {text!r} is no plain path: rename it")


def about(directory: Path) -> dict[str, Any]:
    """The `about` that `save` stored, and under "sha256" {name of the fit: {path: SHA-256 of the leaf}}.

    Raises InputError if the folder is not a tljax checkpoint.
    """
    description, records = _read(Path(directory))
    sums = {name: {path: record.sha256 for path, record in flat.items()} for name, flat in records.items()}
    return {**description, "sha256": sums}


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, _Record]]]:
    """(about, {name of the fit: {path: record}}), read from a checkpoint's metadata.

    Raises InputError if the folder is missing, is not a tljax checkpoint, or its metadata is damaged.
    """
    if (odd := not_text(directory)) is not None:
        raise InputError(f"checkpoint '{directory}': '{odd}' is no UTF-8, and Orbax reads no such path: rename it")
    if not directory.exists():
        raise InputError(f"checkpoint '{directory}' does not exist: give the folder that experiments.pretrain printed")
    _size(directory)
    try:
        meta = json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8"))
        if meta["format"] not in _READ:
            known = " and ".join(map(repr, _READ))
            raise InputError(f"checkpoint '{directory}' has format {meta['format']!r}; this tljax reads {known}")
        if meta["digest"] != _meta_digest(meta):
            raise InputError(f"checkpoint '{directory}': what it says of itself is damaged: train it again")
        records = {
            name: {path: _record(*fields) for path, fields in flat.items()} for name, flat in meta["leaves"].items()
        }
        description = dict(meta["about"])
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"'{directory}' is not a tljax checkpoint: give a folder under checkpoints/ of a run directory"
        ) from error
    for name, flat in records.items():
        _require_plain(directory, name, flat)
    return description, records


def _record(dtype: Any, shape: Any, sha256: Any) -> _Record:
    """The record that metadata holds. Raises ValueError or TypeError if it has no dtype or no shape."""
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("no dtype and shape")
    return _Record(dtype, tuple(shape), sha256)


def _size(directory: Path) -> int:
    """The bytes of all files in a folder. Raises InputError if an entry is neither file nor folder, such as a link."""
    total = 0
    for parent, folders, files in os.walk(directory):
        for entry in (os.path.join(parent, name) for name in (*folders, *files)):
            status = os.lstat(entry)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise InputError(f"checkpoint '{directory}' holds a link or a device, '{entry}': remove it")
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def load(directory: Path) -> tuple[dict[str, Flat], dict[str, Any]]:
    """({name of the fit: {path: array}}, about): every leaf checked against its dtype, shape and SHA-256.

    Raises InputError, with the leaf's path, if the folder is missing, is not a tljax checkpoint, or is damaged.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    _, records = _read(directory)
    try:
        stored = _require_stored(directory, records)
        with _checkpointer() as reader:
            as_numpy: dict[str, dict[str, Any]] = {}
            for name, path in stored:
                as_numpy.setdefault(name, {})[path] = ocp.RestoreArgs(np.ndarray)
            args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_numpy))
            state = reader.restore(directory, args=args)["state"]
        fits: dict[str, Flat] = {name: {} for name in records}
        places = _first_places(records)
        for name, path, record in _each(records):
            if 0 in record.shape:
                array = np.zeros(record.shape, record.dtype)
            elif (name, path) in stored:
                array = state[name][path]
            else:
                first, _ = places[record.sha256]
                array = fits[first][path]
                array.flags.writeable = False  # else who writes into one fit's would write into another's
            if (name, path) in stored and digest(path, array) != record.sha256:
                raise _damaged(directory, name, path, "is damaged")
            fits[name][path] = array
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"checkpoint '{directory}' is damaged or incomplete ({_summary(error)}): train it again"
        ) from error
    return fits, about(directory)


def _each(records: _Records) -> Iterator[tuple[str, str, _Record]]:
    """(name of the fit, path, record) of every leaf."""
    return ((name, path, record) for name, flat in records.items() for path, record in flat.items())


def _first_places(records: _Records) -> dict[str, tuple[str, str]]:
    """{digest: (name of the fit, path)} of the first leaf with that digest, of leaves that hold numbers.

    Orbax stores no empty arrays, whose record says all that they are.
    """
    places: dict[str, tuple[str, str]] = {}
    for name, path, record in _each(records):
        if 0 not in record.shape:
            places.setdefault(record.sha256, (name, path))
    return places


def _require_stored(directory: Path, records: _Records) -> set[tuple[str, str]]:
    """(name of the fit, path) of all that is stored. Raises InputError unless Orbax's metadata agree with the records:
    paths, kinds, sizes. Reads no array."""
    import orbax.checkpoint as ocp

    notes = json.loads((directory / "state" / "_METADATA").read_text(encoding="utf-8"))
    if notes["use_ocdbt"] is not True:  # without this database Orbax takes names for paths
        raise InputError(f"checkpoint '{directory}' is not stored as tljax stores: train it again")
    entries = {tuple(key["key"] for key in entry["key_metadata"]) for entry in notes["tree_metadata"].values()}
    every = {(name, path): record for name, path, record in _each(records) if 0 not in record.shape}
    needed = set(_first_places(records).values())
    for name, path in sorted((entries - every.keys()) | (needed - entries)):
        raise _damaged(directory, name, path, "is missing" if (name, path) not in entries else "is none of its own")
    stored = ocp.PyTreeCheckpointHandler().metadata(directory / "state").tree
    total = 0
    for (name, path), record in ((place, every[place]) for place in sorted(entries)):
        array = stored[name][path]
        if _kind(array) != _kind(record):
            raise _damaged(directory, name, path, f"is {_kind(array)}, and said to be {_kind(record)}")
        if array.storage.chunk_shape != record.shape:
            raise _damaged(directory, name, path, "is not stored in one piece")
        total += math.prod(record.shape) * np.dtype(array.dtype).itemsize
    if total > _size(directory):
        raise InputError(f"checkpoint '{directory}' says it holds {total:,} bytes, more than are there: train it again")
    return entries


def _damaged(directory: Path, name: str, path: str, what: str) -> InputError:
    return InputError(f"checkpoint '{directory}', fit '{name}': leaf '{path}' {what}: train it again")
