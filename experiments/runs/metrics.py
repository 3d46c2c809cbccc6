"""What a fit leaves of its training beside its checkpoint: curves, TensorBoard events and predictions.

A tracker of your own (Weights & Biases, MLflow) has its place in `write_curves`: it is called once a fit, when the fit
has ended, with every point of its curve.
"""

import hashlib
import io
import json
import shutil
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.runs import console, directory
from tljax import checkpoint, npz
from tljax.types import Objective


def write_curves(folder: Path, name: str, curve: Sequence[Mapping[str, float]]) -> None:
    """Write the curve of the fit `name`, a point a segment, to folder/metrics/name.

    A point has step, train_loss, train_penalty, gradient_norm, accuracy (or the score of another primary metric), and
    each term of the penalty. They are
    written as TensorBoard events, and as arrays (curves.npz) for the report.
    """
    place = directory.make_folder(folder / "metrics") / name
    shutil.rmtree(place, ignore_errors=True)
    directory.make_folder(place)
    now = time.time()
    directory.replace(place / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}", _events(curve, now))
    columns: dict[str, Any] = {field: np.array([point[field] for point in curve]) for field in curve[0]}
    packed = io.BytesIO()
    np.savez(packed, sha256=_digest(name, columns), **columns)
    directory.replace(place / "curves.npz", packed.getvalue())


def _events(curve: Sequence[Mapping[str, float]], seconds: float) -> bytes:
    """The bytes of an event file that says the scalars of a curve, all at this time (seconds since 1970).

    Each event is a record of TensorFlow's TFRecord format: its length, uint64, and its bytes, both with their masked
    CRC-32C. tensorboardX's own writer hands events to a thread, which a full disk ends while the caller waits for it.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c
    from tensorboardX.summary import scalar

    events = [Event(wall_time=seconds, file_version="brain.Event:2")]
    for point in curve:
        for name in (name for name in point if name != "step" and np.isfinite(point[name])):
            events.append(Event(wall_time=seconds, step=int(point["step"]), summary=scalar(name, point[name])))
    records = []
    for data in (event.SerializeToString() for event in events):
        length = struct.pack("<Q", len(data))
        records += [length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))]
    return b"".join(records)


def curves(folder: Path, name: str) -> dict[str, np.ndarray] | None:
    """The curves that `write_curves` left of a fit, [points] each; None, aloud, where they are gone or damaged.

    An older tljax left no SHA-256 in them: those are believed.
    """
    file = folder / "metrics" / name / "curves.npz"
    try:
        if not file.is_file():
            raise FileNotFoundError("it is gone")
        columns = npz.read(file)
        written = columns.pop("sha256", None)
        if written is not None and written.tobytes() != _digest(name, columns).tobytes():
            raise ValueError("it is not as it was written")
        if not _are_curves(columns):
            raise ValueError("it holds no curves")
        return columns
    except Exception as error:  # what NumPy, zlib and the unpacking raise for a damaged file has no common type
        why = " ".join(str(error).split())[:200] or type(error).__name__
        where = "" if str(file) in why else f"'{file}': "
        console.say(
            f"the curves of '{name}' are left out: {where}{why}; the same command trains the fit again where "
            f"'{folder / 'predictions' / name}.npz' is deleted"
        )
        return None


def _are_curves(columns: Mapping[str, np.ndarray]) -> bool:
    """Whether they have a step and are float or int [points], all of one length."""
    shapes = {(column.ndim, len(column) if column.ndim else 0) for column in columns.values()}
    numbers = all(np.issubdtype(column.dtype, np.number) for column in columns.values())
    return "step" in columns and numbers and len(shapes) == 1 and shapes.pop()[0] == 1


def _digest(name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of a fit's curves and its name, uint8 [32]."""
    digests = {field: checkpoint.digest(field, column) for field, column in columns.items()}
    text = json.dumps([name, digests], sort_keys=True)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def write_predictions(
    folder: Path,
    name: str,
    objective: Objective,
    outputs: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray | None = None,
) -> tuple[str, str]:
    """Write what the fit `name` predicts for the test examples; (its place in the run directory, its SHA-256).

    `outputs` and `targets` are [items, ...] as the objective's kind has them; `groups` say which examples are alike,
    [items], if that is known. Of classes the file has `probabilities`, float32 [items, classes], `labels` and `groups`;
    of other kinds `outputs` float32 [items, ...], `targets` and `groups`. Where the primary metric is not accuracy it
    has `targets` and `scores` in any case, float32 [items]: the metric of each item, nan of a fit that diverged.
    """
    file = directory.make_folder(folder / "predictions") / f"{name}.npz"
    packed = io.BytesIO()
    known: dict[str, Any] = {} if groups is None else {"groups": np.asarray(groups)}
    primary = objective.metrics[0]
    if primary.name != "accuracy":
        assert primary.item is not None
        finite = np.isfinite(outputs).all()
        scores = primary.item(outputs, targets, targets) if finite else np.full(len(targets), np.nan)
        known |= {"scores": np.asarray(scores, np.float32), "targets": np.asarray(targets)}
    if objective.kind == "classes":
        probabilities = np.asarray(jax.nn.softmax(outputs), np.float32)
        np.savez_compressed(packed, probabilities=probabilities, labels=np.asarray(targets), **known)
    else:
        np.savez_compressed(
            packed, outputs=np.asarray(outputs, np.float32), **{"targets": np.asarray(targets), **known}
        )
    directory.replace(file, packed.getvalue())
    return f"predictions/{file.name}", hashlib.sha256(packed.getvalue()).hexdigest()
