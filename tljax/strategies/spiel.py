"""Train a few elements of each leaf; every few steps drop those that moved least, and grow those of large gradients.

Source: Ansell et al. 2024, "Scaling sparse fine-tuning to large language models" (SpIEL-AG), arXiv:2401.16405: the sum
of the gradients of some steps says what grows, and the first selection replaces everything. Here the sums are of all
elements and not of candidates, the moments of what is grown begin at 0, and what is dropped has its old bytes again.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax.strategies import _moving as moving
from tljax.types import Context, InputError, MaskSchedule, Params, Seen


class Memory(NamedTuple):
    """What is on, and the gradients that say what grows."""

    on: Params
    sums: Params


def strategy(
    params: Params,
    context: Context,
    *,
    fraction: float = 0.05,
    every: int = 20,
    estimate: int = 5,
    rate: float = 0.2,
    steps: int = 0,
) -> MaskSchedule:
    """`fraction` of each leaf's elements, and all that was drawn anew.

    The gradients of the first `estimate` of every `every` steps are summed; then a share of what is on is dropped: all
    at the first time, later `rate`, which falls to 0 over `steps` steps if that is given. Raises InputError for a
    fraction or a rate outside (0, 1], numbers of steps below 1, and an estimate that is not below `every`.
    """
    moving.require_fraction("spiel", fraction)
    moving.require_steps("spiel", every=every, estimate=estimate)
    if not 0 < rate <= 1:
        raise InputError(f"spiel:rate={rate}: it is above 0 and at most 1")
    if estimate >= every:
        raise InputError(f"spiel:estimate={estimate}: it is below every, {every}")
    of_steps = {"every": every, "estimate": estimate, "steps": steps}
    return MaskSchedule(
        functools.partial(at_random, fraction=fraction),
        functools.partial(drop_and_grow, fraction=fraction, rate=rate, **of_steps),
        moving.everything(params),
        when="after",
        sees=frozenset({"gradients"}),
        off="dropped",
        groups=moving.kept_or_fresh(params, context.fresh),
        returns=True,
    )


def at_random(params: Params, key: Any, *, fraction: float) -> Memory:
    """So many elements of each leaf, drawn at random, and no gradients."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    scores = [jax.random.uniform(key, jnp.shape(leaf)) for key, leaf in zip(keys, leaves, strict=True)]
    on = jax.tree.unflatten(structure, [moving.largest(score, fraction) for score in scores])
    return Memory(on, jax.tree.map(jnp.zeros_like, params))


def drop_and_grow(
    memory: Memory, seen: Seen, *, fraction: float, every: int, estimate: int, rate: float, steps: int
) -> tuple[Params, Memory]:
    """The elements of this step, and the sums with its gradients."""
    at = seen.step % every
    share = jnp.asarray(rate if not steps else rate * jnp.maximum(0.0, 1 - seen.step / steps))
    share = jnp.where(seen.step == estimate, 1.0, share)

    def anew() -> Params:
        return jax.tree.map(
            functools.partial(_selected, share, fraction), memory.on, memory.sums, seen.params, seen.start
        )

    chosen = jax.lax.cond(at == estimate, anew, lambda: memory.on)
    sums = jax.tree.map(
        lambda total, g: jnp.where(at == 0, g, jnp.where(at < estimate, total + g, total)), memory.sums, seen.gradients
    )
    on = jax.tree.map(lambda group, o: o | (group == moving.ALWAYS), seen.groups, chosen)
    return on, Memory(chosen, sums)


def _selected(share: jax.Array, fraction: float, on: Any, sums: Any, leaf: Any, start: Any) -> jax.Array:
    """What of a leaf is on after dropping a share of what was: the smallest changes, and growing as many."""
    changes, sizes, was = (jnp.reshape(each, -1) for each in (jnp.abs(leaf - start), jnp.abs(sums), on))
    number = jnp.floor(share * math.ceil(fraction * was.size)).astype(jnp.int32)
    dropped = was & (_ranks(jnp.where(was, changes, jnp.inf)) < number)
    kept = was & ~dropped
    grown = ~kept & (_ranks(jnp.where(kept, jnp.inf, -sizes)) < number)
    return jnp.reshape(kept | grown, jnp.shape(on))


def _ranks(scores: jax.Array) -> jax.Array:
    """The place of each score among all in ascending order, the first of equal ones first."""
    return (
        jnp.zeros(scores.size, jnp.int32)
        .at[jnp.argsort(scores, stable=True)]
        .set(jnp.arange(scores.size, dtype=jnp.int32))
    )
