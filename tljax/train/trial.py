"""A trial: what is passed to the compiled function, and the program and the numbers that follow from its masks."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, paths
from tljax.train.step import Numbers, Program
from tljax.types import InputError, Mask, Params


class Trial(NamedTuple):
    """One fit of a group: what is passed to the compiled function, not compiled into it."""

    params: Params
    phases: tuple[tuple[int, Mask | Callable[[Params], Mask]], ...]
    """(first step, mask); the first step of the first is 0. A function is called with the parameters of its step."""
    order: Callable[[int, int], np.ndarray]
    """(start, stop) -> int32 [stop - start, batch]: the examples of those steps, -1 for padding. Neighbours that have
    one object for it may share the gathering of examples."""
    rates: np.ndarray
    """float32 [steps]: the learning rate of each step."""
    weights: tuple[Mapping[str, float], ...]
    """The weights of each penalty."""
    numbers: Mapping[str, float]
    """The optimizer's numbers by name, and 'label_smoothing'."""
    key: jax.Array
    """The key of dropout."""
    fresh: Mask | None = None
    """Which leaves were drawn anew, for penalties."""
    fisher: Params | None = None
    """The source's Fisher information, for penalties: {path: array} or a tree."""


def batch_size(trial: Trial) -> int:
    """Examples a step."""
    return trial.order(0, 1).shape[1]


def under(program: Program, trial: Trial, history: Sequence[Mask]) -> Program:
    """The program with the last mask of `history`, the masks of all phases that have begun.

    Raises InputError for a penalty that covers no leaf, or lacks the Fisher information that it needs.
    """
    mask, params = history[-1], trial.params
    for term in program.penalties:
        paths.require_globs(params, (term.on,))
        if term.name == "ewc" and trial.fisher is None:
            raise InputError("penalty 'ewc' needs the source's Fisher information: train the source with --save_fisher")
    trains = jax.tree.leaves(masks.static(params, mask))
    kinds = [_kind(m) if t else False for m, t in zip(_leaves(trial, mask), trains, strict=True)]
    count, ranks = _cohorts(trial, history)
    anchored = trial.fresh is not None and any(term.needs_start for term in program.penalties)
    fresh = paths.items(trial.fresh) if anchored else ()
    return replace(
        program,
        mask=(jax.tree.structure(mask), *kinds),
        cohorts=tuple(rank if isinstance(rank, int) else None for rank in ranks) if count > 1 else None,
        count=count,
        fresh=tuple(name for name, drawn in fresh if drawn),
    )


def _leaves(trial: Trial, mask: Mask) -> list[Any]:
    """The leaves of a mask, canonical."""
    return jax.tree.leaves(masks.canonical(trial.params, mask))


def _cohorts(trial: Trial, history: Sequence[Mask]) -> tuple[int, list[Any]]:
    """(how many cohorts; for each leaf which of them: an int, or an array of its elements; -1 where frozen)."""
    trains = jax.tree.leaves(masks.static(trial.params, history[-1]))
    ages = jax.tree.leaves(masks.since(*history))
    kept = [np.asarray(age) if t else np.asarray(-1) for age, t in zip(ages, trains, strict=True)]
    born = np.unique(np.concatenate([[], *(age[age >= 0] for age in kept)])).astype(int)
    ranks = [np.where(age < 0, -1, np.searchsorted(born, age)).astype(np.int32) for age in kept]
    return len(born), [int(rank) if rank.ndim == 0 else rank for rank in ranks]


def alike(program: Program, trial: Trial, history: Sequence[Mask]) -> tuple[Program, Hashable]:
    """What trials that are trained together have in common: an executable, and the arrays that their masks pass."""
    now = under(program, trial, history)
    leaves = zip(_leaves(trial, history[-1]), now.mask[1:], strict=True)
    ranks = [rank for rank in _cohorts(trial, history)[1] if not isinstance(rank, int)]
    passed = [np.asarray(m) for m, kind in leaves if kind is None]
    return now, tuple((leaf.shape, leaf.dtype.kind) for leaf in (*passed, *ranks))


def _kind(m: Any) -> bool | None:
    """True for a leaf that trains in full: 1.0 compiles to the same as True, bit for bit. None for a traced one."""
    return True if m is True else None


def numbers_of(program: Program, trials: Sequence[Trial], histories: Sequence[Sequence[Mask]]) -> Numbers:
    """The traced numbers of trials whose masks so far are `histories`."""
    scales, ranks = [], []
    for trial, history in zip(trials, histories, strict=True):
        leaves = zip(_leaves(trial, history[-1]), program.mask[1:], strict=True)
        scales.append(tuple(jnp.asarray(m) for m, kind in leaves if kind is None))
        ranks.append(tuple(rank for rank in _cohorts(trial, history)[1] if not isinstance(rank, int)))
    anchored = any(term.needs_start for term in program.penalties)
    fisher = any(term.name == "ewc" for term in program.penalties)
    return Numbers(
        weights=tuple(_columns([t.weights[i] for t in trials]) for i in range(len(program.penalties))),
        given=_columns([trial.numbers for trial in trials]),
        scales=stack(scales),
        key=jnp.stack([trial.key for trial in trials]),
        start=stack([trial.params for trial in trials]) if anchored else None,
        fisher=stack([trial.fisher for trial in trials]) if fisher else None,
        ranks=stack(ranks),
    )


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, jax.Array]:
    return {name: jnp.asarray([row[name] for row in rows], jnp.float32) for name in rows[0]}


def stack(trees: Sequence[Params]) -> Params:
    """A leading axis of trials; always copies, since the compiled function takes its arguments over.

    By way of the host, where nothing need be compiled for it.
    """
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack([_plain(leaf) for leaf in leaves])), *trees)


def _plain(leaf: Any) -> np.ndarray:
    """On the host, in the type that JAX gives it."""
    return np.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))
