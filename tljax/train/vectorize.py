"""How a group of trials is trained: on which devices, how many side by side, and on which features."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from tljax import masks, models, parallel
from tljax.train import features
from tljax.train.step import Layout, Program, lead
from tljax.train.trial import Trial, batch_size
from tljax.types import Mask, Params, Views


@dataclass(frozen=True)
class Means:
    """What a group is trained with; none of it changes a result by more than rounding."""

    devices: tuple[Any, ...] = ()
    """Over which trials are divided; by default the first alone."""
    batch: int = 1
    """So many of the devices, each with the next, share the batches of a trial: another order of the same sums."""
    mode: str = "jit"
    """'jit', where the compiler divides a batch, or 'pmap', for one trial at a time: all devices share its batches.
    Under pmap dropout draws otherwise than on one device."""
    many: str = "auto"
    """How trials share a device: 'map' (one after another), 'vmap' (side by side), or 'auto': those with one order as
    is quicker, others one after another, so that a fit has the same bits whatever it is trained with."""
    store: features.Store | None = None
    """Where the output of frozen stages is kept; None computes it anew in every step."""
    say: Callable[[str], None] = lambda line: None
    """Called with a line for each decision."""
    stop: Callable[[], bool] = lambda: False
    """Asked every few seconds whether to end before the last step."""


def sizes(
    program: Program, trials: Sequence[Trial], side: int, images: jax.Array, passed: int, means: Means
) -> list[int]:
    """Into parts of which sizes trials of one program go, the lanes together: what the devices divide, then the rest,
    and no more at once than there is room for their features."""
    count = _rows(means)
    wanted = _wanted(program, trials[0], images, passed, means)
    most = max(1, means.store.budget // wanted) if means.store and wanted else len(trials)
    found, left = [], len(trials) // side
    while left:
        now = min(left, most)
        found += parallel.parts(now, count)
        left -= now
    return [side * size for size in found]


def _rows(means: Means) -> int:
    """How many trials are trained at once."""
    return max(1, len(means.devices) // means.batch)


def mesh(trials: Sequence[Trial], side: int, means: Means) -> Any:
    """The devices over which a part's trials and their batches are divided."""
    count = len(trials) // side
    if jax.process_count() > 1:  # a process takes part in everything: what trials leave idle shares their batches
        rows = math.gcd(count, _rows(means))
        return parallel.mesh(means.devices, len(means.devices) // rows)
    rows = parallel.share(count, _rows(means))
    return parallel.mesh(means.devices[: rows * means.batch], means.batch)


def laid_out(program: Program, trials: Sequence[Trial], side: int, images: jax.Array, means: Means) -> Layout:
    """How a part's trials stand on the devices."""
    over = mesh(trials, side, means)
    if means.mode == "pmap" and over is not None:
        return Layout(over, side, axis="data")
    wide = side > 1 and (means.many == "vmap" or (means.many == "auto" and work(program, trials[0], images) < WIDE))
    return Layout(over, side, wide, means.many == "vmap")


def lanes(program: Program, trials: Sequence[Trial], histories: Sequence[Sequence[Mask]]) -> int:
    """How many trials, each with the next, have one order and one frozen prefix, if it is so for all; else 1."""
    same = [one.order is other.order and _same_start(one, other) for one, other in itertools.pairwise(trials)]
    run = (same.index(False) if False in same else len(same)) + 1
    regular = len(trials) % run == 0 and all(joined == ((i + 1) % run != 0) for i, joined in enumerate(same))
    still = lead(program)
    ever = [mask[name] for history in histories for mask in history for name in still]
    return run if regular and not any(map(masks.trains, jax.tree.leaves(ever))) else 1


def _same_start(one: Trial, other: Trial) -> bool:
    return all(a is b for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True))


# Seconds a trial-epoch of 8 trials on one device of two cores, 784-W-10 trained in full (2026-11-23, jax 0.10.2):
#   million FLOPs a step      4.3    16    31    61   123   245
#   one after another        0.19  0.33  0.24  0.38  0.74  1.25
#   side by side             0.11  0.17  0.29  0.58  1.18  2.57
WIDE = 2e7
"""FLOPs of a step up to which trials side by side are quicker than one after another."""


def work(program: Program, trial: Trial, images: jax.Array) -> float:
    """FLOPs of a step, about: the forward pass of the stages that train, three times."""
    count = len(lead(program))
    whole = jax.eval_shape(program.merge or (lambda params: params), trial.params)
    x: Any = jax.ShapeDtypeStruct((batch_size(trial), *images.shape[1:]), images.dtype)
    if count:
        x = jax.eval_shape(functools.partial(models.apply, program.model[:count]), whole, x)
    cost: Any = jax.jit(functools.partial(models.apply, program.model[count:])).lower(whole, x).cost_analysis()
    return 3.0 * float((cost or {}).get("flops", 0.0))


def shortened(
    program: Program, trials: Sequence[Trial], params: Params, side: int, images: jax.Array, passed: int, means: Means
) -> tuple[Program, Views]:
    """The program of the stages that train, and the frozen ones' output as views; or the program itself and images."""
    wanted, whole = _wanted(program, trials[0], images, passed, means), parallel.of(params)
    if means.store is None or not wanted:
        return program, (parallel.place(whole, images, split=False),)
    still = lead(program)
    told = f"{', '.join(still)} {'is' if len(still) == 1 else 'are'} frozen: features of {len(images):,} examples"
    if wanted > means.store.budget:
        means.say(f"{told} are {_mb(wanted)} and the budget {_mb(means.store.budget)}, so computed in every step")
        return program, (parallel.place(whole, images, split=False),)
    firsts = jax.tree.map(lambda leaf: leaf[::side], params)
    views = features.views(means.store, program.model[: len(still)], program.merge, firsts, images)
    means.say(f"{told} are computed once, {_mb(sum(leaf.nbytes for leaf in jax.tree.leaves(views)))}")
    return replace(program, model=program.model[len(still) :]), views


def _wanted(program: Program, trial: Trial, images: jax.Array, passed: int, means: Means) -> int:
    """Bytes of one view of the frozen stages' output, or 0 where there is none that is worth it: fewer examples
    pass through than there are. It depends on one trial alone, and so then do its bits."""
    count = len(lead(program))
    if means.store is None or not count or passed < len(images):
        return 0
    whole = jax.eval_shape(program.merge or (lambda params: params), trial.params)
    return features.size(means.store, program.model[:count], whole, images)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
