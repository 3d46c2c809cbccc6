"""Train, in each step, the elements whose gradient is largest.

Source: Li et al. 2024, "Enhancing large language model performance with gradient-based parameter selection" (GMT, for
gradient-mask tuning), arXiv:2406.15330. Its gradient is the mean over N batches at the same parameters: of a step of N
microbatches (--microbatch), or in a loop of one's own of `optax.MultiSteps(optimizer.scheduled(tx, schedule), N)`. The
moments of what is masked see zeros.
"""

import functools

import jax
import jax.numpy as jnp

from tljax.strategies import _moving as moving
from tljax.types import Context, InputError, MaskSchedule, Params, Seen


def strategy(params: Params, context: Context, *, fraction: float = 0.2, per: str = "leaf") -> MaskSchedule:
    """`fraction` of the elements that were kept, of each leaf or of the whole tree, and all that was drawn anew.

    Raises InputError for a fraction outside (0, 1], and another `per` than 'leaf' and 'tree'.
    """
    moving.require_fraction("gmt", fraction)
    if per not in ("leaf", "tree"):
        raise InputError(f"gmt:per={per}: give leaf or tree")
    groups = moving.kept_or_fresh(params, context.fresh)
    choose = functools.partial(largest_gradient, fraction=fraction, per=per)
    scope, sees = moving.everything(params), frozenset({"gradients"})
    return MaskSchedule(moving.no_memory, choose, scope, when="after", sees=sees, off="gated", groups=groups)


def largest_gradient(memory: tuple[()], seen: Seen, *, fraction: float, per: str) -> tuple[Params, tuple[()]]:
    """The elements by the size of their gradient."""
    sizes = jax.tree.map(jnp.abs, seen.gradients)
    pairs = zip(jax.tree.leaves(seen.groups), jax.tree.leaves(sizes), strict=True)
    kept = [size.reshape(-1) for group, size in pairs if group != moving.ALWAYS]
    least = None
    if per == "tree" and kept:
        flat = jnp.concatenate(kept)
        least = jnp.min(flat, where=moving.largest(flat, fraction), initial=jnp.inf)

    def on(group: int, size: jax.Array) -> jax.Array:
        if group == moving.ALWAYS:
            return jnp.array(True)
        return moving.largest(size, fraction) if least is None else size >= least

    return jax.tree.map(on, seen.groups, sizes), memory
