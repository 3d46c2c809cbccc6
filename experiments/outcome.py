"""What a fit leaves in the run directory: checkpoint, predictions, masks, metrics, a line of results."""

import hashlib
import io
import json
import shutil
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import console, fits
from experiments import workdir as rundir
from experiments.progress import Record
from tljax import checkpoint, masks, npz
from tljax.types import Mask, Params


class Outcome(NamedTuple):
    """What training a fit gives."""

    params: Params
    """The last; of a fit that diverged, the last that were finite."""
    masks: tuple[Mask, ...]
    """Of each phase."""
    record: Record
    logits: np.ndarray
    test: Mapping[str, Any]
    held: Mapping[str, Any] | None
    """Metrics on the validation split, if there is one."""


def _second_half(outcome: Outcome) -> rundir.Line:
    record, test, held = outcome.record, outcome.test, outcome.held
    diverged = record.diverged is not None
    last = {name: value if np.isfinite(value) else None for name, value in record.curve[-1].items()}
    return {
        **_counts(outcome.params, outcome.masks),
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "calibration_error": test["calibration_error"],
        "calibration": test["calibration"],
        "per_class_accuracy": test["per_class_accuracy"],
        "confusion": test["confusion"],
        "validation_accuracy": held["accuracy"] if held else None,
        "validation_loss": held["loss"] if held else None,
        **{name: value for name, value in last.items() if name.startswith(("train_loss", "train_penalty"))},
        "best_step": record.best[0] if record.best else None,
        "best_validation_accuracy": record.best[1] if record.best else None,
        "train_total": None if diverged else record.curve[-1]["train_loss"] + record.curve[-1]["train_penalty"],
        "diverged": diverged,
        "diverged_step": record.diverged,
        "seconds": round(record.seconds, 3),
    }


def _counts(params: Params, phases: Sequence[Mask]) -> dict[str, Any]:
    """How many numbers there are, in all and by leaf, and how many train in the phase that trains most."""
    most = max((masks.table(params, mask) for mask in phases), key=lambda rows: sum(row.trained_size for row in rows))
    return {
        "trained_parameters": sum(row.trained_size for row in most),
        "total_parameters": sum(row.size for row in most),
        "leaves": [[row.path, row.size, row.trained_size] for row in most],
    }


def leave(
    folder: Path,
    group: Sequence[fits.Fit],
    outcomes: Sequence[Outcome],
    labels: np.ndarray,
    about: Mapping[str, Any],
    fishers: Sequence[Params],
    groups: np.ndarray | None = None,
) -> None:
    """Everything of a group to disk, its lines of results last and together: only then it is done.

    `labels` are of the test examples, int [items], and `groups` which of them are alike, if that is known.

    A checkpoint a strategy, with the Fisher information of each fit if there are `fishers`, and the ordinary parameters
    of each if the strategy merges what it added.
    """
    lines = [{**fit.line, **_second_half(of)} for fit, of in zip(group, outcomes, strict=True)]
    for rows in _by_strategy(lines):
        name_of_group = fits.group_name(lines[row]["key"] for row in rows)
        place = folder / "checkpoints" / f"{fits.file_name(lines[rows[0]]['strategy'])}-{name_of_group}"
        shutil.rmtree(place, ignore_errors=True)
        each: dict[str, Params] = {}
        for row in rows:
            name, best = lines[row]["name"], outcomes[row].record.best
            each |= {name: outcomes[row].params}
            each |= {f"{name}.best": best[2]} if best else {}
            each |= {f"{name}.fisher": fishers[row]} if fishers else {}
            merge = group[row].program.merge
            each |= {f"{name}.merged": merge(outcomes[row].params)} if merge else {}
            lines[row]["checkpoint"] = f"checkpoints/{place.name}"
        mine = [lines[row] for row in rows]
        told = {
            line["name"]: {"seed": line["seed"], "accuracy": line["test_accuracy"], "steps": line["steps"]}
            for line in mine
        }
        checkpoint.save(place, each, {**about, "fits": told})
    for line, outcome in zip(lines, outcomes, strict=True):
        line |= _write(folder, line["name"], outcome, labels, groups)
    rundir.add(folder, lines)


def _write(folder: Path, name: str, outcome: Outcome, labels: np.ndarray, groups: np.ndarray | None) -> rundir.Line:
    """Predictions, curves and masks of one fit; what its line says of the predictions."""
    file = folder / "predictions" / f"{name}.npz"
    rundir.folder(file.parent)
    packed = io.BytesIO()
    probabilities = np.asarray(jax.nn.softmax(outcome.logits), np.float32)
    known: dict[str, Any] = {} if groups is None else {"groups": np.asarray(groups)}
    np.savez_compressed(packed, probabilities=probabilities, labels=np.asarray(labels), **known)
    rundir.replace(file, packed.getvalue())
    _write_metrics(rundir.folder(folder / "metrics") / name, outcome.record.curve)
    for number, mask in enumerate(outcome.masks):
        masks.save(mask, rundir.folder(folder / "masks") / f"{name}-phase{number}")
    return {
        "predictions": f"predictions/{file.name}",
        "predictions_sha256": hashlib.sha256(packed.getvalue()).hexdigest(),
        "masks_sha256": rundir.masks_digest(folder, name, len(outcome.masks)),
    }


def _by_strategy(lines: Sequence[rundir.Line]) -> list[list[int]]:
    """Which lines are of one strategy with one set of options, in order."""
    found: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        found.setdefault(json.dumps([line["strategy"], line["options"]], default=str), []).append(row)
    return list(found.values())


def _write_metrics(folder: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """The curves as TensorBoard events, and as arrays for the report."""
    shutil.rmtree(folder, ignore_errors=True)
    rundir.folder(folder)
    now = time.time()
    rundir.replace(folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}", _events(curve, now))
    columns: dict[str, Any] = {name: np.array([point[name] for point in curve]) for name in curve[0]}
    packed = io.BytesIO()
    np.savez(packed, sha256=_sum(folder.name, columns), **columns)
    rundir.replace(folder / "curves.npz", packed.getvalue())


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


def curves(folder: Path, line: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The curves that `run` left of a fit, by name; None, aloud, where they are gone or damaged.

    An older tljax left no SHA-256 in them: those are believed.
    """
    file = folder / "metrics" / line["name"] / "curves.npz"
    try:
        if not file.is_file():
            raise FileNotFoundError("it is gone")
        columns = npz.read(file)
        digest_there = columns.pop("sha256", None)
        if digest_there is not None and digest_there.tobytes() != _sum(line["name"], columns).tobytes():
            raise ValueError("it is not as it was written")
        if not _are_curves(columns):
            raise ValueError("it holds no curves")
        return columns
    except Exception as error:  # what NumPy, zlib and the unpacking raise for a damaged file has no common type
        why = " ".join(str(error).split())[:200] or type(error).__name__
        named = "" if str(file) in why else f"'{file}': "
        predictions = f"predictions/{line['name']}.npz"
        console.say(
            f"the curves of '{line['name']}' are left out: {named}{why}; the same command trains the fit again where "
            f"'{folder / predictions}' is deleted"
        )
        return None


def _are_curves(columns: Mapping[str, np.ndarray]) -> bool:
    """Whether they have a step and are float or int [points], all of one length."""
    shapes = {(column.ndim, len(column) if column.ndim else 0) for column in columns.values()}
    numbers = all(np.issubdtype(column.dtype, np.number) for column in columns.values())
    return "step" in columns and numbers and len(shapes) == 1 and shapes.pop()[0] == 1


def _sum(name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of a fit's curves and its name, uint8 [32]."""
    digests = {path: checkpoint.digest(path, column) for path, column in columns.items()}
    text = json.dumps([name, digests], sort_keys=True)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
