"""Checkpoints by Orbax: a folder holds the parameters of one group of fits, flat by path, and what they are.

Orbax restores flipped bytes, wrong dtypes and holed trees without a word, so each leaf's SHA-256 (path, dtype, shape,
bytes) is stored beside it and checked at each load, and shapes and dtypes are never left to it to convert.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import paths
from tljax.types import InputError, Params

Flat = dict[str, np.ndarray]
"""{path of the leaf: array}."""

_FORMAT = "tljax-parameters-1"


def flatten(params: Params) -> Flat:
    """{path: array} of a tree.

    >>> flatten({"head": {"bias": np.zeros(2)}})
    {'head/bias': array([0., 0.])}
    """
    return {path: np.asarray(leaf) for path, leaf in paths.items(params)}


def unflatten(flat: Mapping[str, Any], like: Params) -> Params:
    """The tree of `like` with the arrays of `flat`; raises InputError where paths, shapes or dtypes differ.

    >>> unflatten({"a": np.ones(1)}, {"a": np.zeros(1)})
    {'a': array([1.])}
    """
    known = dict(paths.items(like))
    for path in sorted(known.keys() | flat.keys()):
        there = f"{flat[path].dtype}{list(flat[path].shape)}" if path in flat else "absent"
        here = f"{known[path].dtype}{list(known[path].shape)}" if path in known else "absent"
        if there != here:
            raise InputError(f"leaf '{path}' is {there} in the checkpoint, {here} in the model: they do not match")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in known])


def digest(path: str, leaf: np.ndarray) -> str:
    """SHA-256 of a leaf's path, dtype, shape and bytes."""
    head = json.dumps([path, str(leaf.dtype), list(leaf.shape)]).encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def save(directory: Path, fits: Mapping[str, Params], about: Mapping[str, Any]) -> None:
    """Write {name of the fit: parameters} and `about` (JSON) to a new folder, whole or not at all.

    Raises InputError if the folder exists, since nothing is written over, and where it cannot be written.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if directory.exists():
        raise InputError(f"checkpoint '{directory}' exists already: nothing is written over; choose another folder")
    state = {name: flatten(params) for name, params in fits.items()}
    sums = {name: {path: digest(path, leaf) for path, leaf in flat.items()} for name, flat in state.items()}
    meta = {"format": _FORMAT, "sha256": sums, "about": dict(about)}
    meta["digest"] = _of_json(meta)
    try:
        with _checkpointer() as writer:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
            writer.save(directory, args=args)
    except Exception as error:  # of Orbax and what it stands on, which have no type in common
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"checkpoint '{directory}' cannot be written ({first}): make room or give another folder, and run again"
        ) from error


def _checkpointer() -> Any:
    """Of this process alone, however many there are: what it saves and loads it has whole, and waits for nobody."""
    import orbax.checkpoint as ocp

    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    state, meta = (
        kind(multiprocessing_options=alone) for kind in (ocp.PyTreeCheckpointHandler, ocp.JsonCheckpointHandler)
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(state=state, meta=meta, composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _of_json(value: Mapping[str, Any]) -> str:
    """SHA-256 of what a checkpoint says of itself, less the digest."""
    text = json.dumps({name: part for name, part in value.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def about(directory: Path) -> dict[str, Any]:
    """What `save` was told of a checkpoint, with its "sha256"; raises InputError for no checkpoint of ours."""
    directory = Path(directory)
    if not directory.exists():
        raise InputError(f"checkpoint '{directory}' does not exist: give the folder that experiments.pretrain printed")
    file = directory / "meta" / "metadata"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise InputError(f"checkpoint '{directory}' has format {meta['format']!r}; this tljax reads {_FORMAT!r}")
        if meta["digest"] != _of_json(meta):
            raise InputError(f"checkpoint '{directory}': what it says of itself is damaged: train it again")
        return {**meta["about"], "sha256": meta["sha256"]}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"'{directory}' is not a tljax checkpoint: give a folder under checkpoints/ of a run directory"
        ) from error


def load(directory: Path) -> tuple[dict[str, Flat], dict[str, Any]]:
    """({name of the fit: {path: array}}, about): every leaf checked against its SHA-256.

    Raises InputError for a folder that is missing, not ours, or damaged, with the leaf's path.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    told = about(directory)
    as_numpy = {name: {path: ocp.RestoreArgs(np.ndarray) for path in flat} for name, flat in told["sha256"].items()}
    try:
        with _checkpointer() as reader:
            restore = ocp.args.PyTreeRestore(restore_args=as_numpy)
            state = reader.restore(directory, args=ocp.args.Composite(state=restore))["state"]
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        raise InputError(f"checkpoint '{directory}' is damaged or incomplete ({first}): train it again") from error
    sums = told["sha256"]
    for name in sorted(sums.keys() | state.keys()):
        for path in sorted(sums.get(name, {}).keys() | state.get(name, {}).keys()):
            leaf = state.get(name, {}).get(path)
            if leaf is None or sums.get(name, {}).get(path) != digest(path, leaf):
                raise InputError(f"checkpoint '{directory}', fit '{name}': leaf '{path}' is damaged: train it again")
    return state, told
