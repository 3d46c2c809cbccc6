"""Train what is ready, and leave it in the run directory."""

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import fits, processes
from experiments import workdir as rundir
from tljax import checkpoint, evaluate, masks, parallel, train
from tljax.train import scores
from tljax.types import Mask, Params


def run(
    field: fits.Arena,
    ready: Sequence[fits.Fit],
    folder: Path,
    about: Mapping[str, Any],
    advance: Callable[[int], None],
    fisher: bool = False,
) -> None:
    """Train fits in groups of one program, and leave of each group a checkpoint, predictions, metrics and lines.

    `fisher` leaves the Fisher information of each in the checkpoint too.
    """
    groups: dict[Any, list[fits.Fit]] = {}
    for fit in ready:
        groups.setdefault((fit.program, len(fit.trial.rates)), []).append(fit)
    for group in groups.values():
        outcomes = _train(field, group, advance)
        lines = [{**fit.line, **_second_half(outcome)} for fit, outcome in zip(group, outcomes, strict=True)]
        extra = [_fisher(field, fit, outcome) for fit, outcome in zip(group, outcomes, strict=True)] if fisher else []
        for rows in _by_strategy(lines):
            own, theirs = [lines[row] for row in rows], [outcomes[row] for row in rows]
            fishers = [extra[row] for row in rows] if fisher else []
            if processes.first():
                _leave(folder, own, theirs, field.task.test.labels, {**about, "fisher": fisher}, fishers)
        processes.wait("left")


def _by_strategy(lines: Sequence[rundir.Line]) -> list[list[int]]:
    """Which lines are of one strategy with one set of options, in order."""
    found: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        found.setdefault(json.dumps([line["strategy"], line["options"]], default=str), []).append(row)
    return list(found.values())


class Outcome(NamedTuple):
    """What training a fit gives."""

    params: Params
    masks: tuple[Mask, ...]
    """Of each phase."""
    curve: list[dict[str, float]]
    """A point a segment."""
    logits: np.ndarray
    test: Mapping[str, Any]
    held: Mapping[str, Any] | None
    """Metrics on the validation split, if there is one."""
    seconds: float


def _train(field: fits.Arena, group: Sequence[fits.Fit], advance: Callable[[int], None]) -> list[Outcome]:
    program, task = group[0].program, field.task
    curves: list[list[dict[str, float]]] = [[] for _ in group]
    seconds = [0.0] * len(group)
    outcomes: dict[int, Outcome] = {}
    last = len(group[0].trial.rates)
    start = time.perf_counter()
    trials = [fit.trial for fit in group]
    ends = fits.ends(field.recipe, last)
    for state, log in train.fit(program, trials, field.images, field.labels, ends, means=field.means):
        took = (time.perf_counter() - start) / len(state.trials)
        logits = train.logits(program, trials, state, field.test, len(task.test.labels), field.means)
        everyone = parallel.host(state.params)
        for row, i in enumerate(state.trials):
            test = evaluate.metrics(logits[row], task.test.labels)
            params = jax.tree.map(lambda leaf, row=row: leaf[row], everyone)
            held = _validate(field, program, params, group[i].validation)
            seconds[i] += took
            curves[i].append(_point(state.step, log, row, program, held or test))
            if state.step == last:
                outcomes[i] = Outcome(params, state.masks[row], curves[i], logits[row], test, held, seconds[i])
        advance(len(state.trials) * log.loss.shape[1])
        start = time.perf_counter()
    return [outcomes[i] for i in range(len(group))]


def _point(step: int, log: train.Log, row: int, program: train.Program, metrics: Mapping[str, Any]) -> dict[str, float]:
    """A point of the curves: means over the segment, and the accuracy at its end."""
    accuracy = metrics["accuracy"]
    return {
        "step": step,
        "train_loss": float(log.loss[row].mean()),
        "train_penalty": float(log.penalty[row].mean()),
        "gradient_norm": float(log.gradient_norm[row].mean()),
        "accuracy": float("nan") if accuracy is None else accuracy,
        **{
            f"train_penalty_{i}_{term.name}": float(log.terms[i][row].mean())
            for i, term in enumerate(program.penalties)
        },
    }


def _validate(
    field: fits.Arena, program: train.Program, params: Params, chosen: np.ndarray
) -> Mapping[str, Any] | None:
    """Metrics of one fit on the examples held out of its training; None where there are none."""
    if not len(chosen):
        return None
    images = evaluate.padded(np.asarray(field.task.train.images)[chosen])
    one = jax.tree.map(lambda leaf: leaf[None], params)
    logits = evaluate.logits(train.forward(program), one, (images,), len(chosen))[0]
    return evaluate.metrics(logits, np.asarray(field.task.train.labels)[chosen])


def _fisher(field: fits.Arena, fit: fits.Fit, outcome: Outcome) -> Params:
    """The Fisher information of a fit on its training examples."""
    chosen = np.unique(fit.trial.order(0, len(fit.trial.rates)))
    of = scores.mean_squared_gradient(
        fit.program.model, fit.program.loss, field.images, field.labels, chosen[chosen >= 0], fit.program.merge
    )
    return of(outcome.params)


def _second_half(outcome: Outcome) -> rundir.Line:
    curve, test, held = outcome.curve, outcome.test, outcome.held
    totals = [point["train_loss"] + point["train_penalty"] for point in curve]
    diverged = test["loss"] is None or not np.isfinite(totals).all()
    last = {name: value if np.isfinite(value) else None for name, value in curve[-1].items()}
    return {
        **_counts(outcome.params, outcome.masks),
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "calibration_error": test["calibration_error"],
        "per_class_accuracy": test["per_class_accuracy"],
        "confusion": test["confusion"],
        "validation_accuracy": held["accuracy"] if held else None,
        "validation_loss": held["loss"] if held else None,
        **{name: value for name, value in last.items() if name.startswith(("train_loss", "train_penalty"))},
        "train_total": None if diverged else totals[-1],
        "diverged": diverged,
        "seconds": round(outcome.seconds, 3),
    }


def _counts(params: Params, phases: Sequence[Mask]) -> dict[str, Any]:
    """How many numbers there are, in all and by leaf, and how many train in the phase that trains most."""
    most = max((masks.table(params, mask) for mask in phases), key=lambda rows: sum(row.trained_size for row in rows))
    return {
        "trained_parameters": sum(row.trained_size for row in most),
        "total_parameters": sum(row.size for row in most),
        "leaves": [[row.path, row.size, row.trained_size] for row in most],
    }


def _leave(
    folder: Path,
    lines: Sequence[rundir.Line],
    outcomes: Sequence[Outcome],
    labels: np.ndarray,
    about: Mapping[str, Any],
    fishers: Sequence[Params],
) -> None:
    """Everything of a group to disk, its lines of results last: only then it is done."""
    digest = hashlib.sha256("".join(line["key"] for line in lines).encode()).hexdigest()
    place = folder / "checkpoints" / f"{fits.file_name(lines[0]['strategy'])}-{digest[:8]}"
    shutil.rmtree(place, ignore_errors=True)
    each = {line["name"]: outcome.params for line, outcome in zip(lines, outcomes, strict=True)}
    each |= {f"{line['name']}.fisher": of for line, of in zip(lines, fishers, strict=False)}
    told = {line["name"]: {"seed": line["seed"], "accuracy": line["test_accuracy"]} for line in lines}
    checkpoint.save(place, each, {**about, "fits": told})
    done = []
    for line, outcome in zip(lines, outcomes, strict=True):
        file = folder / "predictions" / f"{line['name']}.npz"
        file.parent.mkdir(exist_ok=True)
        (folder / "masks").mkdir(exist_ok=True)
        probabilities = np.asarray(jax.nn.softmax(outcome.logits), np.float32)
        np.savez_compressed(file, probabilities=probabilities, labels=np.asarray(labels))
        _write_metrics(folder / "metrics" / line["name"], outcome.curve)
        for number, mask in enumerate(outcome.masks):
            masks.save(mask, folder / "masks" / f"{line['name']}-phase{number}")
        done.append({**line, "predictions": f"predictions/{file.name}", "checkpoint": f"checkpoints/{place.name}"})
    rundir.add(folder, done)


def _write_metrics(folder: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """The curves as TensorBoard events, and as arrays for the report."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for point in curve:
            for name in (name for name in point if name != "step" and np.isfinite(point[name])):
                writer.add_scalar(name, point[name], int(point["step"]))
    columns: dict[str, Any] = {name: np.array([point[name] for point in curve]) for name in curve[0]}
    np.savez(folder / "curves.npz", **columns)


def curves(folder: Path, line: rundir.Line) -> dict[str, np.ndarray] | None:
    """The curves that `run` left of a fit, by name; None where they are gone or damaged."""
    file = folder / "metrics" / line["name"] / "curves.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
