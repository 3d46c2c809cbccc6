"""Fits: from a task, a model, a recipe and seeds to trained parameters and lines of results."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import workdir as rundir
from experiments.options import Recipe
from tljax import __version__, checkpoint, evaluate, masks, objective, optimizer, paths, seeds, train
from tljax.data import draw
from tljax.types import InputError, Mask, Model, Params, Task


class Arena(NamedTuple):
    """A task on the device, and the recipe by which a model learns it."""

    task: Task
    recipe: Recipe
    images: jax.Array
    labels: jax.Array
    test: jax.Array


def arena(task: Task, recipe: Recipe) -> Arena:
    """Put a task on the device, once for all its fits."""
    return Arena(
        task, recipe, jnp.asarray(task.train.images), jnp.asarray(task.train.labels), evaluate.batches(task.test.images)
    )


class Fit(NamedTuple):
    """One fit, ready to train."""

    line: rundir.Line
    """What is known of it before: the first half of its line of results."""
    program: train.Program
    trial: train.Trial
    validation: np.ndarray
    """int32: the training examples that are held out."""


def check(recipe: Recipe, budget: str, task: Task, params: Params, prefix: str = "") -> None:
    """Raise InputError for what of a recipe cannot be, before anything is trained or written.

    `prefix` is 'source_' where the flags are those of the source's fit.
    """
    try:
        subset, _ = _chosen(recipe, budget, task, 0)
        optimizer.rates(recipe.schedule, recipe.learning_rate, recipe.warmup, steps(recipe, len(subset)))
        optimizer.spec(recipe.optimizer, momentum=recipe.momentum, weight_decay=recipe.weight_decay, clip=recipe.clip)
        objective.loss(recipe.loss)
        for term in objective.penalties(recipe.penalty)[0]:
            paths.require_globs(params, (term.on,))
    except InputError as error:
        raise InputError(str(error).replace("--", f"--{prefix}", 1)) from error


def steps(recipe: Recipe, examples: int) -> int:
    """The steps of a fit; raises InputError for a batch larger than the data under --epochs."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.batch_size > examples:
        raise InputError(
            f"--batch_size={recipe.batch_size} is larger than the {examples} training examples: lower it, or give "
            "--steps, under which the order runs over one permutation after another"
        )
    return recipe.epochs * -(-examples // recipe.batch_size)


def _ends(recipe: Recipe, total: int) -> list[int]:
    """The steps at which the curves have a point: each epoch, or ten under --steps."""
    points = min(recipe.epochs if recipe.steps is None else 10, total)
    return [total * (i + 1) // points for i in range(points)]


def _chosen(recipe: Recipe, budget: str, task: Task, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) examples of a label budget, int32 each."""
    labels = np.asarray(task.train.labels)
    total = len(labels) if budget == "all" else int(budget)
    chosen = draw.label_budget(seed, labels, total)
    return draw.validation_split(labels, chosen, recipe.validation)


def build(
    field: Arena, model: Model, params: Params, mask: Mask, streams: seeds.Seeds, budget: str, merge: Any = None
) -> tuple[train.Program, train.Trial, np.ndarray]:
    """(program, trial, validation examples) of one fit from its parameters and mask."""
    recipe = field.recipe
    subset, validation = _chosen(recipe, budget, field.task, streams.draw)
    spec, numbers = optimizer.spec(
        recipe.optimizer, momentum=recipe.momentum, weight_decay=recipe.weight_decay, clip=recipe.clip
    )
    terms, weights = objective.penalties(recipe.penalty)
    program = train.program(
        model, params, mask, loss=objective.loss(recipe.loss), penalties=terms, optimizer=spec, merge=merge
    )
    subset = np.sort(subset)

    def order(start: int, stop: int) -> np.ndarray:
        by_epochs = recipe.steps is None
        return draw.order(streams.order, len(subset), recipe.batch_size, start, stop, epochs=by_epochs, subset=subset)

    rates = optimizer.rates(recipe.schedule, recipe.learning_rate, recipe.warmup, steps(recipe, len(subset)))
    trial = train.Trial(params, mask, order, rates, weights, numbers, jax.random.key(streams.order))
    return program, trial, validation


def identify(name: str, line: Mapping[str, Any], decisive: Mapping[str, Any]) -> rundir.Line:
    """The first half of a line, with the key of everything that decides the bits, and a name from both."""
    text = json.dumps({**line, **decisive, "tljax": __version__}, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    return {"name": f"{_file_name(name)}-{key[:8]}", "key": key, **line}


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)[-80:].strip("_.")


def run(
    field: Arena, fits: Sequence[Fit], folder: Path, about: Mapping[str, Any], advance: Callable[[int], None]
) -> None:
    """Train fits in groups of one program, and leave of each group a checkpoint, predictions, metrics and lines."""
    programs: dict[train.Program, list[Fit]] = {}
    for fit in fits:
        programs.setdefault(fit.program, []).append(fit)
    for group in programs.values():
        _run_group(field, group, folder, about, advance)


def _run_group(
    field: Arena, group: Sequence[Fit], folder: Path, about: Mapping[str, Any], advance: Callable[[int], None]
) -> None:
    program, task = group[0].program, field.task
    points: list[list[dict[str, float]]] = [[] for _ in group]
    seconds = 0.0
    ends = _ends(field.recipe, len(group[0].trial.rates))
    start = time.perf_counter()
    for state, log in train.fit(program, [fit.trial for fit in group], field.images, field.labels, ends):
        seconds += time.perf_counter() - start
        logits = evaluate.logits(train.forward(program), state.params, field.test, len(task.test.labels))
        tested = [evaluate.metrics(scores, task.test.labels) for scores in logits]
        held = [_validate(field, program, state.params, i, fit.validation) for i, fit in enumerate(group)]
        for i, curve in enumerate(points):
            curve.append(
                {
                    "step": state.step,
                    "train_loss": float(log.loss[i].mean()),
                    "train_penalty": float(log.penalty[i].mean()),
                    "gradient_norm": float(log.gradient_norm[i].mean()),
                    "accuracy": _number((held[i] or tested[i])["accuracy"]),
                }
            )
        params = state.params
        advance(len(group) * log.loss.shape[1])
        start = time.perf_counter()
    lines = [
        {**fit.line, **_second_half(curve, test, held_out), "seconds": round(seconds / len(group), 3)}
        for fit, curve, test, held_out in zip(group, points, tested, held, strict=True)
    ]
    _leave(folder, lines, points, logits, task.test.labels, params, about)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _validate(
    field: Arena, program: train.Program, params: Params, i: int, chosen: np.ndarray
) -> Mapping[str, Any] | None:
    if not len(chosen):
        return None
    one = jax.tree.map(lambda leaf: leaf[i : i + 1], params)
    images = evaluate.batches(np.asarray(field.task.train.images)[chosen])
    logits = evaluate.logits(train.forward(program), one, images, len(chosen))[0]
    return evaluate.metrics(logits, np.asarray(field.task.train.labels)[chosen])


def _second_half(curve: list[dict[str, float]], test: Mapping[str, Any], held: Mapping[str, Any] | None) -> rundir.Line:
    totals = [point["train_loss"] + point["train_penalty"] for point in curve]
    diverged = test["loss"] is None or not np.isfinite(totals).all()
    last = {name: value if np.isfinite(value) else None for name, value in curve[-1].items()}
    return {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "calibration_error": test["calibration_error"],
        "per_class_accuracy": test["per_class_accuracy"],
        "confusion": test["confusion"],
        "validation_accuracy": held["accuracy"] if held else None,
        "validation_loss": held["loss"] if held else None,
        "train_loss": last["train_loss"],
        "train_penalty": last["train_penalty"],
        "train_total": None if diverged else totals[-1],
        "diverged": diverged,
    }


def _leave(
    folder: Path,
    lines: Sequence[rundir.Line],
    points: Sequence[Sequence[Mapping[str, float]]],
    logits: np.ndarray,
    labels: np.ndarray,
    params: Params,
    about: Mapping[str, Any],
) -> None:
    """Everything of a group to disk, its lines of results last: only then it is done."""
    digest = hashlib.sha256("".join(line["key"] for line in lines).encode()).hexdigest()
    place = folder / "checkpoints" / f"{_file_name(lines[0]['strategy'])}-{digest[:8]}"
    shutil.rmtree(place, ignore_errors=True)
    each = {line["name"]: jax.tree.map(lambda leaf, i=i: leaf[i], params) for i, line in enumerate(lines)}
    fits = {line["name"]: {"seed": line["seed"], "accuracy": line["test_accuracy"]} for line in lines}
    checkpoint.save(place, each, {**about, "fits": fits})
    done = []
    for i, line in enumerate(lines):
        file = folder / "predictions" / f"{line['name']}.npz"
        file.parent.mkdir(exist_ok=True)
        probabilities = np.asarray(jax.nn.softmax(logits[i]), np.float32)
        np.savez_compressed(file, probabilities=probabilities, labels=np.asarray(labels))
        _write_metrics(folder / "metrics" / line["name"], points[i])
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
    """The curves that `run` left of a fit, by name; None where they are gone."""
    file = folder / "metrics" / line["name"] / "curves.npz"
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def counts(params: Params, mask: Mask) -> dict[str, int]:
    """How many numbers train, and how many there are."""
    rows = masks.table(params, mask)
    return {"trained_parameters": sum(r.trained_size for r in rows), "total_parameters": sum(r.size for r in rows)}
