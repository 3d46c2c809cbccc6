"""Half-trained groups: saved while they train, and resumed by the next run with the same bits."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import directory, process
from tljax import batch_stats, checkpoint, paths, train
from tljax.train import vectorize
from tljax.types import InputError, Mask, Params

Curve = list[dict[str, float]]
"""The points of a fit's curve, one for each segment."""

MOST_SAVES = 2
"""Saves of a group on disk: the latest, and the one before it, should the latest be damaged."""


class Record(NamedTuple):
    """One fit so far."""

    curve: Curve
    seconds: float
    since: train.Log | None
    """The log since the last point of the curve: float32 [steps] each."""
    diverged: int | None
    """The first step that was not finite."""
    finite: Params | None
    """The variables at the last point of the curve, of a fit that diverged after it, or was stopped between points."""
    best: tuple[int, float, Params] | None
    """Where there is a validation split: the step of the best primary metric on it, that score, and the variables."""
    began: tuple[int, ...] = ()
    """The steps at which its phases began, where they end by validation."""
    stopped: int | None = None
    """The step at which its last phase was over, if that is before the last."""
    peak_bytes: int | None = None
    """The most memory that its training program took on a device so far."""
    phases: tuple[Params, ...] = ()
    """The variables with which its phases after the first began, where its strategy's `finish` asks for them."""


class Progress(NamedTuple):
    """A group so far: the latest states of its parts, as `held` gives them, and a record of each fit."""

    parts: tuple[train.State, ...]
    records: tuple[Record, ...]


def nothing(trials: int) -> Progress:
    """The progress of a group that has not begun."""
    return Progress((), (Record([], 0.0, None, None, None, None),) * trials)


def held(state: train.State, whole: bool = True, moves: Sequence[bool] | None = None) -> train.State:
    """A copy of a state, which later segments leave alone, as `vectorize.copied` makes it.

    Without `whole` it has no optimizer's state: None in its place. `moves` says of each leaf of the parameters whether
    a later segment may take it over; where none does, it is that leaf itself.
    """
    leaves, structure = jax.tree.flatten(state.params)
    goes = [True] * len(leaves) if moves is None else moves
    moving = [leaf for leaf, moves in zip(leaves, goes, strict=True) if moves]
    taken_over = (moving, state.model_state, state.average, state.optimizer if whole else None)
    moving, model_state, average, optimizer = vectorize.copied(taken_over)
    copies = iter(moving)
    leaves = [next(copies) if moves else leaf for leaf, moves in zip(leaves, goes, strict=True)]
    state = state._replace(params=jax.tree.unflatten(structure, leaves), model_state=model_state)
    state = state._replace(average=average, optimizer=optimizer)
    return state if jax.process_count() == 1 else on_host(state)


def on_host(state: train.State) -> train.State:
    """A state that `held` gave, in NumPy. It waits for the devices."""
    arrays = (state.params, state.optimizer, state.average, state.best, state.model_state, state.shared)
    arrays = jax.tree.map(lambda leaf: leaf if checkpoint.is_key(leaf) else np.asarray(vectorize.host(leaf)), arrays)
    params, optimizer, average, best, model_state, shared = arrays
    state = state._replace(params=params, optimizer=optimizer, average=average, best=best, model_state=model_state)
    return state._replace(shared=shared)


Optimizers = Sequence[tuple[tuple[int, ...], Any]]
"""(Fits, their optimizer's state) of the states that were yielded last, as long as they are not trained on."""


def with_optimizer(state: train.State, latest: Optimizers) -> train.State:
    """The state with its optimizer's state, where `held` left that out, from the latest that has all its fits."""
    if state.optimizer is not None:
        return state
    fits, optimizer = next(entry for entry in reversed(latest) if set(state.fits) <= set(entry[0]))
    rows = np.array([fits.index(i) for i in state.fits])
    return state._replace(optimizer=optimizer if state.fits == fits else jax.tree.map(lambda x: x[rows], optimizer))


def needed(latest: Optimizers) -> list[tuple[tuple[int, ...], Any]]:
    """Those of the optimizers' states, in their order, that have a fit which no later one has.

    >>> [fits for fits, _ in needed([((0, 1, 2), None), ((0,), None), ((1, 2), None)])]
    [(0,), (1, 2)]
    """
    kept: list[tuple[tuple[int, ...], Any]] = []
    covered = set[int]()
    for fits, optimizer in reversed(latest):
        if not set(fits) <= covered:
            kept.append((fits, optimizer))
        covered |= set(fits)
    return kept[::-1]


def joined(parts: Sequence[train.State], new: train.State) -> tuple[train.State, ...]:
    """The parts with a newer state, which replaces those it came from once it has all their trials."""
    rest = []
    for part in parts:
        rows = [row for row, i in enumerate(part.fits) if i not in new.fits]
        if rows:
            rest.append(part if len(rows) == len(part.fits) else train.select(part, rows))
    return (*rest, new)


@contextmanager
def saving(place: Path, keys: Sequence[str]) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that saves progress in the background; at the end all its saves are on disk.

    There is one save at a time: the next waits for the last, and raises the InputError that it ended with.
    """
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as worker:

        def save(progress: Progress) -> None:
            if not process.first():
                return
            if pending:
                pending.pop().result()
            pending.append(worker.submit(_save, place, keys, progress))

        yield save
        if pending:
            pending.pop().result()


def _save(place: Path, keys: Sequence[str], progress: Progress) -> None:
    """Write the next numbered save of a group, and delete those that it makes superfluous."""
    arrays: dict[str, Params] = {}
    for number, state in enumerate(progress.parts):
        arrays[f"part{number}.params"] = state.params
        arrays[f"part{number}.shared"] = state.shared
        arrays[f"part{number}.optimizer"] = state.optimizer
        arrays[f"part{number}.model_state"] = state.model_state
        arrays[f"part{number}.average"] = state.average
        arrays[f"part{number}.best"] = state.best
        arrays[f"part{number}.masks"] = {name: m for name, m in _leaves(state.masks).items() if np.ndim(m)}
    for number, record in enumerate(progress.records):
        arrays[f"fit{number}.since"] = record.since
        arrays[f"fit{number}.finite"] = record.finite
        arrays[f"fit{number}.best"] = record.best and record.best[2]
        arrays |= {f"fit{number}.phase{phase}": tree for phase, tree in enumerate(record.phases)}
    filled = {name: tree for name, tree in arrays.items() if jax.tree.leaves(tree)}  # Orbax takes no empty tree
    about = {
        "keys": list(keys),
        "parts": [_numbers(state) for state in progress.parts],
        "records": [
            (r.curve, r.seconds, r.diverged, r.best and r.best[:2], r.began, r.stopped, r.peak_bytes)
            for r in progress.records
        ],
    }
    place.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(folder.name[:8]) for folder in place.iterdir() if folder.name[:8].isdecimal()), default=0)
    checkpoint.save(place / f"{number:08d}", filled, about)
    for old in _saves(place)[MOST_SAVES:]:
        shutil.rmtree(old, ignore_errors=True)


def _leaves(histories: Sequence[Sequence[Mask]]) -> dict[str, Any]:
    """{trial/phase/path: leaf of the mask}."""
    return {
        f"{row}/{phase}/{path}": leaf
        for row, history in enumerate(histories)
        for phase, mask in enumerate(history)
        for path, leaf in paths.items(mask)
    }


def _numbers(state: train.State) -> dict[str, Any]:
    """The parts of a state that are not arrays: what JSON holds."""
    numbers = {name: np.asarray(m).item() for name, m in _leaves(state.masks).items() if not np.ndim(m)}
    return {
        "step": state.step,
        "trials": state.fits,
        "diverged": state.diverged,
        "phases": len(state.masks[0]),
        "masks": numbers,
        "began": state.began,
        "scores": state.scores,
        "over": state.over,
    }


def _saves(place: Path) -> list[Path]:
    """The folders of a group's saves, the newest first."""
    folders = place.iterdir() if place.is_dir() else ()
    return sorted((folder for folder in folders if folder.name.isdecimal()), reverse=True)


def find(
    root: Path, keys: Sequence[str], program: train.Spec, trials: Sequence[train.Fit], say: Callable[[str], None]
) -> Progress | None:
    """The progress of these fits in the folders under `root`, from the newest whole save of each; None without any.

    A group that has grown takes the saves of the smaller one. A damaged save is set aside, and `say` gets a line on it.
    """
    progress, restored = nothing(len(keys)), set[int]()
    for place in sorted(root.iterdir()) if root.is_dir() else ():
        for folder in _saves(place):
            try:
                arrays, about = checkpoint.load(folder)
                if not set(about["keys"]) <= set(keys):
                    break  # a save of another group
                which = [keys.index(key) for key in about["keys"]]
                if not restored & set(which):
                    progress = _with(progress, which, _restored(program, [trials[i] for i in which], arrays, about))
                    restored |= set(which)
                break
            except InputError as error:
                aside = directory.set_aside(folder).name
                say(f"{error}; it is set aside as '{aside}', and what was saved before it is used")
    return progress if progress.parts else None


def _with(progress: Progress, which: Sequence[int], part: Progress) -> Progress:
    """Progress with that of some of the group's fits: fit j of `part` is fit `which[j]` of the group."""
    states = [state._replace(fits=tuple(which[j] for j in state.fits)) for state in part.parts]
    records = list(progress.records)
    for i, record in zip(which, part.records, strict=True):
        records[i] = record
    return Progress((*progress.parts, *states), tuple(records))


def _restored(
    program: train.Spec,
    trials: Sequence[train.Fit],
    arrays: Mapping[str, checkpoint.Flat],
    about: Mapping[str, Any],
) -> Progress:
    """The progress in a save: its arrays, and the record beside them."""
    parts = []
    for number, part in enumerate(about["parts"]):
        members = [trials[i] for i in part["trials"]]
        leaves = {**part["masks"], **arrays.get(f"part{number}.masks", {})}
        masks = tuple(_masks(trial, row, part["phases"], leaves) for row, trial in enumerate(members))
        shared = arrays.get(f"part{number}.shared", {})
        like = train.abstract(program, members, masks, shared)
        names = ("params", "optimizer", "model_state", "average", *(["best"] if f"part{number}.best" in arrays else []))
        trees = {
            name: checkpoint.unflatten(arrays.get(f"part{number}.{name}", {}), getattr(like, name)) for name in names
        }
        if shared:
            trees["shared"] = checkpoint.unflatten(shared, like.shared)
        state = like._replace(
            step=part["step"],
            fits=tuple(part["trials"]),
            diverged=tuple(part["diverged"]),
            began=part.get("began", 0),
            scores=tuple(map(tuple, part.get("scores", ()))),
            over=part.get("over", False),
        )
        parts.append(state._replace(**{"best": None, **trees}))
    records = []
    for number, (curve, seconds, diverged, best, *more) in enumerate(about["records"]):
        since, finite, best_params = (arrays.get(f"fit{number}.{name}") for name in ("since", "finite", "best"))
        variables = batch_stats.join(trials[number].params, trials[number].model_state)
        like = jax.tree.map(np.asarray, variables)
        best = (*best, checkpoint.unflatten(best_params or {}, like)) if best else None
        last = checkpoint.unflatten(finite, like) if finite else None
        log = _log(since, len(program.penalties)) if since else None
        unsaid: list[Any] = [(), None, None]  # an older tljax did not save them
        began, stopped, peak_bytes = list(more) + unsaid[len(more) :]
        count = sum(name.startswith(f"fit{number}.phase") for name in arrays)
        phases = tuple(checkpoint.unflatten(arrays[f"fit{number}.phase{phase}"], like) for phase in range(count))
        records.append(Record(curve, seconds, log, diverged, last, best, tuple(began), stopped, peak_bytes, phases))
    return Progress(tuple(parts), tuple(records))


def _log(flat: checkpoint.Flat, terms: int) -> train.Log:
    """The log in the arrays of a save, with this number of penalties."""
    each = tuple(flat[f"terms/{number}"] for number in range(terms))
    return train.Log(flat["loss"], flat["penalty"], each, flat["gradient_norm"])


def _masks(trial: train.Fit, row: int, phases: int, leaves: Mapping[str, Any]) -> tuple[Mask, ...]:
    """The masks of one trial's phases, trees like its parameters."""
    return tuple(
        paths.each(lambda path, leaf, phase=phase: leaves[f"{row}/{phase}/{path}"], trial.params)
        for phase in range(phases)
    )
