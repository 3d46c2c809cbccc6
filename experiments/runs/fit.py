"""Train what is ready, group by group, and leave it in the run directory."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import console, directory, fits, metrics, process, progress
from experiments.runs.progress import Progress, Record
from tljax import checkpoint, evaluate, masks, train
from tljax.study.results import Result
from tljax.train import gradients, vectorize
from tljax.types import Mask, Params, Task


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


def run(
    field: fits.Arena,
    ready: Sequence[fits.Fit],
    folder: Path,
    about: Mapping[str, Any],
    advance: Callable[[int], None],
    every: int,
    fisher: bool = False,
) -> None:
    """Train fits in groups of one program, and leave of each group checkpoints, predictions, metrics and lines.

    What is half trained is saved after `every` segments, and taken up from there. `fisher` leaves the Fisher
    information of each in the checkpoint too. Raises process.Stopped when a signal asks for it.
    """
    groups: dict[Any, list[fits.Fit]] = {}
    for fit in ready:
        groups.setdefault((fit.program, len(fit.trial.rates)), []).append(fit)
    with process.signals_handled() as asked:
        for group in groups.values():
            place = folder / "progress" / fits.group_name(fit.result.key for fit in group)
            outcomes = _train(field, group, place, every, asked, advance)
            extra = [_fisher(field, fit, of) for fit, of in zip(group, outcomes, strict=True)] if fisher else []
            if process.first():
                _leave(folder, group, outcomes, field.task, {**about, "fisher": fisher}, extra)
                shutil.rmtree(place, ignore_errors=True)
                with contextlib.suppress(OSError):  # others are half trained still
                    place.parent.rmdir()
            process.wait("left")
            if number := vectorize.agreed(asked()):
                raise process.Stopped(number, "stopped between two groups of fits; the same command goes on")


def _train(
    field: fits.Arena,
    group: Sequence[fits.Fit],
    place: Path,
    every: int,
    asked: Callable[[], int],
    advance: Callable[[int], None],
) -> list[Outcome]:
    """Train one group from where it is to its end, and save it on the way."""
    program, trials, keys = group[0].program, [fit.trial for fit in group], [fit.result.key for fit in group]
    last = len(trials[0].rates)
    ends = fits.ends(field.recipe, last)
    points = [end for end in ends if end not in {step for step, _ in trials[0].phases}]
    named = ", ".join(dict.fromkeys(fit.result.strategy for fit in group))
    now = process.in_turn(lambda: progress.found(place.parent, keys, program, trials, console.say))
    if now:
        console.say(f"{named}: goes on from step {min(part.step for part in now.parts)} of {last}")
    now = now or progress.none(len(group))
    advance(sum(part.step * len(part.fits) for part in now.parts))
    means = replace(field.means, should_stop=lambda: bool(vectorize.agreed(asked())))
    final: dict[int, np.ndarray] = {}
    with progress.saving(place, keys) as save:
        start = time.perf_counter()
        stops = fits.stops(ends, trials[0])
        for state, log in train.fit(program, trials, field.data, stops, now.parts, means):
            advance(len(state.fits) * log.loss.shape[1])
            logits = _logits(field, program, trials, state) if state.step in ends else None
            now = _further(field, group, now, state, log, logits, (time.perf_counter() - start) / len(state.fits))
            if logits is not None and state.step == last:
                final |= dict(zip(state.fits, logits, strict=True))
            if state.step in points and (ends.index(state.step) + 1) % every == 0:
                save(now)
            start = time.perf_counter()
        ended = sum(len(part.fits) for part in now.parts if part.step == last) == len(group)
        if now.parts and not ended:
            save(now)
    if not ended:
        where = f"at step {min(part.step for part in now.parts)} of {last}" if now.parts else "before its first step"
        raise process.Stopped(
            vectorize.agreed(asked()), f"stopped {where} of {named}; the same command goes on, from '{place}'"
        )
    for part in now.parts:
        if part.fits[0] not in final:  # it had ended before this process began
            final |= dict(zip(part.fits, _logits(field, program, trials, part), strict=True))
    return [_outcome(field, group[i], now, i, final[i]) for i in range(len(group))]


def _logits(field: fits.Arena, program: train.Spec, trials: Sequence[train.Fit], state: train.State) -> np.ndarray:
    return evaluate.logits_of(program, trials, state, field.test, len(field.task.test.labels), field.means)


def _further(
    field: fits.Arena,
    group: Sequence[fits.Fit],
    now: Progress,
    state: train.State,
    log: train.Log,
    logits: np.ndarray | None,
    seconds: float,
) -> Progress:
    """Progress with a later state; where there are logits (of the test images) the curves get a point."""
    records, held = list(now.records), progress.held(state)
    for row, i in enumerate(state.fits):
        since = jax.tree.map(lambda curve, row=row: curve[row], log)
        if records[i].since is not None:
            since = jax.tree.map(lambda *curves: np.concatenate(curves), records[i].since, since)
        record = records[i]._replace(seconds=records[i].seconds + seconds, since=since)
        odd = state.diverged[row]
        if odd is None and logits is not None and not np.isfinite(logits[row]).all():
            odd = state.step
        if record.diverged is None:
            # From point to point, wherever a fit was stopped between them: what is kept of it must not depend on that.
            last = _before(now, i, group[i].trial) if record.finite is None else record.finite
            keep = odd is not None or logits is None
            record = record._replace(diverged=odd, finite=last if keep else None)
        if logits is not None:
            params = jax.tree.map(lambda leaf, row=row: leaf[row], held.params)
            record = _at_point(field, group[i], record, state.step, since, logits[row], params)
        records[i] = record
    return Progress(progress.joined(now.parts, held), tuple(records))


def _before(now: Progress, trial: int, start: train.Fit) -> Params:
    """The parameters of a trial when it was last seen, or where it starts."""
    for part in now.parts:
        if trial in part.fits:
            row = part.fits.index(trial)
            return jax.tree.map(lambda leaf, row=row: leaf[row], part.params)
    return jax.tree.map(np.asarray, start.params)


def _at_point(
    field: fits.Arena, fit: fits.Fit, record: Record, step: int, since: train.Log, logits: np.ndarray, params: Params
) -> Record:
    """A record with one more point of its curve, and perhaps a new best."""
    held = _validate(field, fit.program, params, fit.validation)
    point = _point(step, since, fit.program, held or evaluate.metrics(logits, field.task.test.labels))
    better = held and held["accuracy"] is not None and (record.best is None or held["accuracy"] > record.best[1])
    best = (step, held["accuracy"], params) if held and better else record.best
    return record._replace(curve=[*record.curve, point], since=None, best=best)


def _outcome(field: fits.Arena, fit: fits.Fit, now: Progress, i: int, logits: np.ndarray) -> Outcome:
    """Of the fit `i` of a group that has ended, and its logits of the test images."""
    [part] = [part for part in now.parts if i in part.fits]
    row, record = part.fits.index(i), now.records[i]
    params = jax.tree.map(lambda leaf: leaf[row], part.params)
    if record.diverged is not None:
        params, logits = record.finite, np.full_like(logits, np.nan)
    return Outcome(
        params,
        part.masks[row],
        record,
        logits,
        evaluate.metrics(logits, field.task.test.labels),
        _validate(field, fit.program, params, fit.validation) if record.diverged is None else None,
    )


def _point(step: int, log: train.Log, program: train.Spec, measured: Mapping[str, Any]) -> dict[str, float]:
    """A point of the curves: means over the segment, and the accuracy at its end."""
    accuracy = measured["accuracy"]
    return {
        "step": step,
        "train_loss": float(log.loss.mean()),
        "train_penalty": float(log.penalty.mean()),
        "gradient_norm": float(log.gradient_norm.mean()),
        "accuracy": float("nan") if accuracy is None else accuracy,
        **{f"train_penalty_{i}_{term.name}": float(log.terms[i].mean()) for i, term in enumerate(program.penalties)},
    }


def _validate(field: fits.Arena, program: train.Spec, params: Params, chosen: np.ndarray) -> Mapping[str, Any] | None:
    """Metrics of one fit on the examples held out of its training; None where there are none."""
    if not len(chosen):
        return None
    images = evaluate.padded(np.asarray(field.task.train.images)[chosen])
    one = jax.tree.map(lambda leaf: leaf[None], params)
    logits = evaluate.logits(train.forward(program.model, program.merge), one, images, len(chosen))[0]
    return evaluate.metrics(logits, np.asarray(field.task.train.labels)[chosen])


def _fisher(field: fits.Arena, fit: fits.Fit, outcome: Outcome) -> Params:
    """The Fisher information of a fit on its training examples."""
    chosen = np.unique(fit.trial.order(0, len(fit.trial.rates)))
    of = gradients.mean_squared_gradient(
        fit.program.model, fit.program.loss, field.data, chosen[chosen >= 0], fit.program.merge
    )
    return of(outcome.params)


def _leave(
    folder: Path,
    group: Sequence[fits.Fit],
    outcomes: Sequence[Outcome],
    task: Task,
    about: Mapping[str, Any],
    fishers: Sequence[Params],
) -> None:
    """Write everything of a group, its lines of results last and together: only then it is done.

    A checkpoint a strategy, with the Fisher information of each fit if there are `fishers`, and the ordinary parameters
    of each if the strategy merges what it added; `about` is what the checkpoints say of themselves.
    """
    results = [_measured(fit, outcome) for fit, outcome in zip(group, outcomes, strict=True)]
    for rows in _by_strategy(results):
        name_of_group = fits.group_name(results[row].key for row in rows)
        place = folder / "checkpoints" / f"{fits.file_name(results[rows[0]].strategy)}-{name_of_group}"
        shutil.rmtree(place, ignore_errors=True)
        trees: dict[str, Params] = {}
        for row in rows:
            name, best, merge = results[row].name, outcomes[row].record.best, group[row].program.merge
            trees |= {name: outcomes[row].params}
            trees |= {f"{name}.best": best[2]} if best else {}
            trees |= {f"{name}.fisher": fishers[row]} if fishers else {}
            trees |= {f"{name}.merged": merge(outcomes[row].params)} if merge else {}
            results[row] = replace(results[row], checkpoint=f"checkpoints/{place.name}")
        in_checkpoint = {
            result.name: {"seed": result.seed, "accuracy": result.test_accuracy, "steps": result.steps}
            for result in (results[row] for row in rows)
        }
        checkpoint.save(place, trees, {**about, "fits": in_checkpoint})
    for row, outcome in enumerate(outcomes):
        name = results[row].name
        test = (np.asarray(task.test.labels), task.test.groups)
        predictions, sha256 = metrics.write_predictions(folder, name, outcome.logits, *test)
        metrics.write_curves(folder, name, outcome.record.curve)
        for number, mask in enumerate(outcome.masks):
            masks.save(mask, directory.make_folder(folder / "masks") / f"{name}-phase{number}")
        masks_sha256 = directory.masks_digest(folder, name, len(outcome.masks))
        results[row] = replace(
            results[row], predictions=predictions, predictions_sha256=sha256, masks_sha256=masks_sha256
        )
    directory.add(folder, results)


def _measured(fit: fits.Fit, outcome: Outcome) -> Result:
    """A fit with what training it gave, but for the places of its files."""
    record, test, held = outcome.record, outcome.test, outcome.held
    diverged = record.diverged is not None
    last = {name: value if np.isfinite(value) else None for name, value in record.curve[-1].items()}
    terms = {name: value for name, value in last.items() if name.startswith("train_penalty_")}
    return replace(
        fit.result,
        **_counts(outcome.params, outcome.masks),
        test_accuracy=test["accuracy"],
        test_loss=test["loss"],
        calibration_error=test["calibration_error"],
        calibration=test["calibration"],
        per_class_accuracy=test["per_class_accuracy"],
        confusion=test["confusion"],
        validation_accuracy=held["accuracy"] if held else None,
        validation_loss=held["loss"] if held else None,
        train_loss=last["train_loss"],
        train_penalty=last["train_penalty"],
        penalties={name.removeprefix("train_penalty_"): value for name, value in terms.items()},
        best_step=record.best[0] if record.best else None,
        best_validation_accuracy=record.best[1] if record.best else None,
        train_total=None if diverged else record.curve[-1]["train_loss"] + record.curve[-1]["train_penalty"],
        diverged=diverged,
        diverged_step=record.diverged,
        seconds=round(record.seconds, 3),
    )


def _counts(params: Params, phases: Sequence[Mask]) -> dict[str, Any]:
    """How many numbers there are, in all and by leaf, and how many train in the phase that trains most."""
    most = max((masks.table(params, mask) for mask in phases), key=lambda rows: sum(row.trained_size for row in rows))
    return {
        "trained_parameters": sum(row.trained_size for row in most),
        "total_parameters": sum(row.size for row in most),
        "leaves": [[row.path, row.size, row.trained_size] for row in most],
    }


def _by_strategy(results: Sequence[Result]) -> list[list[int]]:
    """Which results are of one strategy with one set of options, in order."""
    rows: dict[str, list[int]] = {}
    for row, result in enumerate(results):
        rows.setdefault(json.dumps([result.strategy, result.options], default=str), []).append(row)
    return list(rows.values())
