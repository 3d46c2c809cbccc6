"""Checkpoints by Orbax: a folder holds the parameters of one group of fits, flat by path, and what they are.

Orbax restores flipped bytes, wrong dtypes and holed trees without a word, so each leaf's dtype, shape and SHA-256
(path, dtype, shape, bytes) are stored beside it. At each load dtypes and shapes are held against Orbax's own before
an array is read, and the sums after; nothing is converted. A checkpoint may come from anybody: no link in it is
followed, no name in it leads out of its folder, and since arrays are stored as they are, without compression, it
cannot ask for more memory than it takes on disk.
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

_FORMAT = "tljax-parameters-2"


class _Leaf(NamedTuple):
    """What a checkpoint says of a leaf."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


_Leaves = Mapping[str, Mapping[str, _Leaf]]


def _kind(leaf: Any) -> str:
    """Such as 'float32[3, 2]', of an array or of what is said of one."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def flatten(params: Params) -> Flat:
    """{path: array} of a tree.

    >>> flatten({"head": {"bias": np.zeros(2)}})
    {'head/bias': array([0., 0.])}
    """
    return {path: np.asarray(_plain(leaf)) for path, leaf in paths.items(params)}


def _plain(leaf: Any) -> Any:
    """A random key as the numbers that it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds random keys, which are no numbers to NumPy."""
    return jax.dtypes.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key)


def unflatten(flat: Mapping[str, Any], like: Params) -> Params:
    """The tree of `like` with the arrays of `flat`; raises InputError where paths, shapes or dtypes differ.

    >>> unflatten({"a": np.ones(1)}, {"a": np.zeros(1)})
    {'a': array([1.])}
    """
    keys = {path for path, leaf in paths.items(like) if is_key(leaf)}
    known = {path: jax.eval_shape(_plain, leaf) if path in keys else leaf for path, leaf in paths.items(like)}
    for path in sorted(known.keys() | flat.keys()):
        stored, expected = (_kind(tree[path]) if path in tree else "absent" for tree in (flat, known))
        if stored != expected:
            raise InputError(f"leaf '{path}' is {stored} in the checkpoint, {expected} in the model: they do not match")
    leaves = [jax.random.wrap_key_data(flat[path]) if path in keys else flat[path] for path in known]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def digest(path: str, leaf: np.ndarray) -> str:
    """SHA-256 of a leaf's path, dtype, shape and bytes."""
    head = json.dumps([path, str(leaf.dtype), list(leaf.shape)]).encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def save(directory: Path, fits: Mapping[str, Params], about: Mapping[str, Any]) -> None:
    """Write {name of the fit: parameters} and `about` (JSON) to a new folder, whole or not at all.

    Raises InputError if the folder exists, since nothing is written over, for a name that is no plain path, and where
    it cannot be written.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if directory.exists():
        raise InputError(f"checkpoint '{directory}' exists already: nothing is written over; choose another folder")
    state = {name: flatten(params) for name, params in fits.items()}
    for name, flat in state.items():
        _require_plain(directory, name, flat)
    leaves = {
        name: {path: _Leaf(str(leaf.dtype), leaf.shape, digest(path, leaf)) for path, leaf in flat.items()}
        for name, flat in state.items()
    }
    full = {name: {path: state[name][path] for path in flat} for name, flat in _full(leaves).items()}
    meta = {"format": _FORMAT, "leaves": leaves, "about": dict(about)}
    meta["digest"] = _of_json(meta)
    try:
        with _checkpointer() as writer:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(full), meta=ocp.args.JsonSave(meta))
            writer.save(directory, args=args)
    except Exception as error:  # of Orbax and what it stands on, which have no type in common
        for partial in directory.parent.glob(f"{glob.escape(directory.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        no_threads = "start new thread" in str(error)
        remedy = (
            "raise this process's limits (ulimit -v, ulimit -u)" if no_threads else "make room or give another folder"
        )
        raise InputError(
            f"checkpoint '{directory}' cannot be written ({_said(error)}): {remedy}, and run again"
        ) from error


def _said(error: Exception) -> str:
    """In one line; of TensorStore's long ones what the system said."""
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else text[:200]


def _checkpointer() -> Any:
    """Of this process alone, however many there are: what it saves and loads it has whole, and waits for nobody."""
    import orbax.checkpoint as ocp

    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    state = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(state=state, meta=meta, composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _of_json(value: Mapping[str, Any]) -> str:
    """SHA-256 of what a checkpoint says of itself, less the digest."""
    text = json.dumps({name: part for name, part in value.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_plain(directory: Path, name: str, flat: Mapping[str, Any]) -> None:
    """Names become places in the folder: none may lead out of it."""
    for text, parts in ((name, [name]), *((path, path.split("/")) for path in flat)):
        if any(part in ("", ".", "..") or "/" in part or not part.isprintable() for part in parts):
            raise InputError(f"checkpoint '{directory}': {text!r} is no plain path: rename it")


def about(directory: Path) -> dict[str, Any]:
    """What `save` was told of a checkpoint, with its "sha256"; raises InputError for no checkpoint of ours."""
    record, leaves = _read(Path(directory))
    return {
        **record,
        "sha256": {name: {path: leaf.sha256 for path, leaf in flat.items()} for name, flat in leaves.items()},
    }


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, _Leaf]]]:
    """(about, {name of the fit: {path: leaf}}), as the checkpoint has them."""
    if (odd := not_text(directory)) is not None:
        raise InputError(f"checkpoint '{directory}': '{odd}' is no UTF-8, and Orbax reads no such path: rename it")
    if not directory.exists():
        raise InputError(f"checkpoint '{directory}' does not exist: give the folder that experiments.pretrain printed")
    _size(directory)
    try:
        meta = json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise InputError(f"checkpoint '{directory}' has format {meta['format']!r}; this tljax reads {_FORMAT!r}")
        if meta["digest"] != _of_json(meta):
            raise InputError(f"checkpoint '{directory}': what it says of itself is damaged: train it again")
        leaves = {
            name: {path: _leaf(*declared) for path, declared in flat.items()} for name, flat in meta["leaves"].items()
        }
        record = dict(meta["about"])
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"'{directory}' is not a tljax checkpoint: give a folder under checkpoints/ of a run directory"
        ) from error
    for name, flat in leaves.items():
        _require_plain(directory, name, flat)
    return record, leaves


def _leaf(dtype: Any, shape: Any, sha256: Any) -> _Leaf:
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("no dtype and shape")
    return _Leaf(dtype, tuple(shape), sha256)


def _size(directory: Path) -> int:
    """The bytes of all files in a folder; raises InputError for what is neither file nor folder, such as a link."""
    total = 0
    for place, folders, files in os.walk(directory):
        for entry in (os.path.join(place, name) for name in (*folders, *files)):
            status = os.lstat(entry)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise InputError(f"checkpoint '{directory}' holds a link or a device, '{entry}': remove it")
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def load(directory: Path) -> tuple[dict[str, Flat], dict[str, Any]]:
    """({name of the fit: {path: array}}, about): every leaf checked against its dtype, shape and SHA-256.

    Raises InputError for a folder that is missing, not ours, or damaged, with the leaf's path.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    _, leaves = _read(directory)
    try:
        _require_declared(directory, leaves)
        with _checkpointer() as reader:
            numpy = {name: {path: ocp.RestoreArgs(np.ndarray) for path in flat} for name, flat in _full(leaves).items()}
            args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=numpy))
            state = reader.restore(directory, args=args)["state"]
        whole: dict[str, Flat] = {name: {} for name in leaves}
        for name, path, leaf in _each(leaves):
            array = np.zeros(leaf.shape, leaf.dtype) if 0 in leaf.shape else state[name][path]
            if digest(path, array) != leaf.sha256:
                raise _damaged(directory, name, path, "is damaged")
            whole[name][path] = array
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"checkpoint '{directory}' is damaged or incomplete ({_said(error)}): train it again"
        ) from error
    return whole, about(directory)


def _each(leaves: _Leaves) -> Iterator[tuple[str, str, _Leaf]]:
    return ((name, path, leaf) for name, flat in leaves.items() for path, leaf in flat.items())


def _full(leaves: _Leaves) -> dict[str, dict[str, _Leaf]]:
    """Those that hold anything: Orbax takes no empty arrays, and what is said of them is all there is."""
    return {name: {path: leaf for path, leaf in flat.items() if 0 not in leaf.shape} for name, flat in leaves.items()}


def _require_declared(directory: Path, leaves: _Leaves) -> None:
    """Hold what the checkpoint says of its leaves against what Orbax says of them, before an array is read."""
    import orbax.checkpoint as ocp

    notes = json.loads((directory / "state" / "_METADATA").read_text(encoding="utf-8"))
    if notes["use_ocdbt"] is not True:  # outside its one database, Orbax takes names for paths
        raise InputError(f"checkpoint '{directory}' is not stored as tljax stores: train it again")
    stored_paths = {tuple(key["key"] for key in entry["key_metadata"]) for entry in notes["tree_metadata"].values()}
    for name, path in sorted(stored_paths ^ {(name, path) for name, path, _ in _each(_full(leaves))}):
        raise _damaged(
            directory, name, path, "is missing" if (name, path) not in stored_paths else "is none of its own"
        )
    stored = ocp.PyTreeCheckpointHandler().metadata(directory / "state").tree
    total = 0
    for name, path, leaf in _each(_full(leaves)):
        metadata = stored[name][path]
        if _kind(metadata) != _kind(leaf):
            raise _damaged(directory, name, path, f"is {_kind(metadata)}, and said to be {_kind(leaf)}")
        if metadata.storage.chunk_shape != leaf.shape:
            raise _damaged(directory, name, path, "is not stored in one piece")
        total += math.prod(leaf.shape) * np.dtype(metadata.dtype).itemsize
    if total > _size(directory):
        raise InputError(f"checkpoint '{directory}' says it holds {total:,} bytes, more than are there: train it again")


def _damaged(directory: Path, name: str, path: str, what: str) -> InputError:
    return InputError(f"checkpoint '{directory}', fit '{name}': leaf '{path}' {what}: train it again")
