"""A trial: what is passed to the compiled function, and the program and the numbers that follow from its masks."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, paths
from tljax.train.segment import Numbers, Program
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
    kinds = [_kind(m) if t else False for m, t in zip(jax.tree.leaves(mask), trains, strict=True)]
    ages = [age if t else -1 for age, t in zip(jax.tree.leaves(masks.since(*history)), trains, strict=True)]
    born = sorted({age for age, t in zip(ages, trains, strict=True) if t})
    ranks = tuple(born.index(age) if age in born else -1 for age in ages)
    anchored = trial.fresh is not None and any(term.needs_start for term in program.penalties)
    fresh = paths.items(trial.fresh) if anchored else ()
    return replace(
        program,
        mask=(jax.tree.structure(mask), *kinds),
        cohorts=ranks if len(born) > 1 else None,
        fresh=tuple(name for name, drawn in fresh if drawn),
    )


def alike(program: Program, trial: Trial, history: Sequence[Mask]) -> tuple[Program, Hashable]:
    """What trials that are trained together have in common: an executable, and the shapes that their masks pass."""
    now = under(program, trial, history)
    leaves = zip(jax.tree.leaves(history[-1]), now.mask[1:], strict=True)
    return now, tuple(np.shape(m) for m, kind in leaves if kind is None)


def _kind(m: Any) -> bool | None:
    """True for a leaf that trains in full: 1.0 compiles to the same as True, bit for bit. None for a traced one."""
    return True if isinstance(m, bool | int | float | np.bool_ | np.number) and m == 1 else None


def numbers_of(program: Program, trials: Sequence[Trial], histories: Sequence[Sequence[Mask]]) -> Numbers:
    """The traced numbers of trials whose masks so far are `histories`."""
    scales = []
    for history in histories:
        leaves = zip(jax.tree.leaves(history[-1]), program.mask[1:], strict=True)
        scales.append(tuple(jnp.asarray(m) for m, kind in leaves if kind is None))
    anchored = any(term.needs_start for term in program.penalties)
    fisher = any(term.name == "ewc" for term in program.penalties)
    return Numbers(
        weights=tuple(_columns([t.weights[i] for t in trials]) for i in range(len(program.penalties))),
        given=_columns([trial.numbers for trial in trials]),
        scales=stack(scales),
        key=jnp.stack([trial.key for trial in trials]),
        start=stack([trial.params for trial in trials]) if anchored else None,
        fisher=stack([trial.fisher for trial in trials]) if fisher else None,
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
