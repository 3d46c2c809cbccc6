"""Train, in each step, the elements of each leaf whose momentum is largest.

Source: Chen et al. 2024, "MoFO: Momentum-filtered optimizer for mitigating forgetting in LLM fine-tuning",
arXiv:2407.20999, algorithm 1: the moments of all elements go on, and are this step's.
"""

import functools

import jax
import jax.numpy as jnp

from tljax.strategies import _moving as moving
from tljax.types import Context, MaskSchedule, Params, Seen


def strategy(params: Params, context: Context, *, fraction: float = 0.15, moment: str = "mu") -> MaskSchedule:
    """`fraction` of each leaf's elements, and all that was drawn anew.

    `moment` is the field of the optimizer's state that has the momentum: 'mu' of Adam, AdamW and Lion, 'trace' of SGD
    with a momentum. Raises InputError for a fraction outside (0, 1].
    """
    moving.require_fraction("mofo", fraction)
    groups = moving.kept_or_fresh(params, context.fresh)
    choose = functools.partial(largest_momentum, fraction=fraction, moment=moment)
    return MaskSchedule(
        moving.no_memory,
        choose,
        moving.everything(params),
        when="after",
        sees=frozenset({moment}),
        off="live",
        groups=groups,
    )


def largest_momentum(memory: tuple[()], seen: Seen, *, fraction: float, moment: str) -> tuple[Params, tuple[()]]:
    """The elements of each leaf by the size of their momentum."""

    def on(group: int, momentum: jax.Array) -> jax.Array:
        return jnp.array(True) if group == moving.ALWAYS else moving.largest(jnp.abs(momentum), fraction)

    return jax.tree.map(on, seen.groups, seen.moments[moment]), memory
