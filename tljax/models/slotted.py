"""A stage whose parameters are now frozen, and now in a slot: a gradient is formed of what is in slots alone.

The choice is traced. Whether the gradient of the weights is computed is decided as the step runs, so that what is off
costs none; where fits are mapped side by side it is computed in any case, and left out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax.types import Params, PyTree


class Slots(NamedTuple):
    """What is in the slots of stages that are alike in the shapes of their parameters."""

    names: tuple[str, ...]
    """The stages that share them."""
    which: jax.Array
    """int32 [stages]: the slot of each, -1 of one that is frozen now."""
    held: tuple[Params, ...]
    """The parameters in each slot, of one stage."""


def applied(apply: Callable[..., Any]) -> Callable[..., tuple[PyTree, tuple[Params, ...]]]:
    """(slot, parameters, x, key, weight, held) -> (y, held) of a stage without state.

    What is in the stage's slot are its own parameters, with which it is computed, so that no copy of them is chosen.
    `held` goes through all stages that share slots as it is; on the way back each adds the gradient of its parameters
    to that of its slot, and one that is in none hands on what it gets: no zeros are formed for it.
    """

    def run(params: Params, x: PyTree, key: Any, weight: Any) -> PyTree:
        return apply(params, {}, x, key=key, train=False, weight=weight)[0]

    @jax.custom_vjp
    def slotted(slot: Any, params: Params, x: PyTree, key: Any, weight: Any, held: Any) -> tuple[PyTree, Any]:
        return run(params, x, key, weight), held

    def forward(slot: Any, params: Params, x: PyTree, key: Any, weight: Any, held: Any) -> Any:
        # What a frozen stage keeps: its products; what lies between them is computed again on the way back, as a
        # compiler would where there is no choice. One that is on runs again, and keeps its input alone.
        kept = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
        y, pull = jax.vjp(lambda x: kept(params, x, key, weight), x)
        return (y, held), (pull, slot, params, x, key, weight)

    def backward(residuals: Any, cotangents: Any) -> Any:
        pull, slot, params, x, key, weight = residuals
        y_cotangent, held_cotangents = cotangents

        def both() -> Any:
            params_cotangent, x_cotangent = jax.vjp(lambda params, x: run(params, x, key, weight), params, x)[1](
                y_cotangent
            )
            sums = tuple(
                jax.tree.map(lambda total, g, i=i: jnp.where(slot == i, total + g, total), totals, params_cotangent)
                for i, totals in enumerate(held_cotangents)
            )
            return sums, x_cotangent

        def x_alone() -> Any:
            return held_cotangents, *pull(y_cotangent)

        held_cotangents, x_cotangent = jax.lax.cond(slot >= 0, both, x_alone)
        return None, None, x_cotangent, None, None, held_cotangents

    slotted.defvjp(forward, backward)
    return slotted
