"""A stage whose parameters are now its own, frozen, and now those of a slot: a gradient is formed of the latter alone.

The choice is traced. Whether the gradient of the weights is computed is decided as the step runs, so that what is off
costs none; where fits are mapped side by side it is computed in any case, and left out.
"""

from collections.abc import Callable, Hashable, Sequence
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


def applied(apply: Callable[..., Any], slots: int) -> Callable[..., PyTree]:
    """The outputs of a stage without state: (which, held, own parameters, x, key, weight) -> y."""

    def run(params: Params, x: PyTree, key: Any, weight: Any) -> PyTree:
        return apply(params, {}, x, key=key, train=False, weight=weight)[0]

    @jax.custom_vjp
    def of_slot(which: Any, held: Sequence[Params], own: Params, x: PyTree, key: Any, weight: Any) -> PyTree:
        return run(_picked(which, held, own), x, key, weight)

    def forward(which: Any, held: Sequence[Params], own: Params, x: PyTree, key: Any, weight: Any) -> Any:
        params = _picked(which, held, own)
        # What a frozen stage keeps; one that is on runs again on the way back, and keeps its input alone.
        y, pull = jax.vjp(lambda x: run(params, x, key, weight), x)
        leaves, structure = jax.tree.flatten(pull)
        # Parameters are picked again on the way back, so that none is kept for it twice.
        place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}
        again = tuple(place.get(id(leaf)) for leaf in leaves)
        kept = [leaf for leaf, i in zip(leaves, again, strict=True) if i is None]
        return y, (kept, _Static((structure, again)), which, held, own, x, key, weight)

    def backward(residuals: Any, of_y: PyTree) -> Any:
        kept, static, which, held, own, x, key, weight = residuals
        structure, again = static.value
        params = _picked(which, held, own)
        picked, rest = jax.tree.leaves(params), iter(kept)
        pull = jax.tree.unflatten(structure, [next(rest) if i is None else picked[i] for i in again])

        def both() -> Any:
            return jax.vjp(lambda params, x: run(params, x, key, weight), params, x)[1](of_y)

        def of_x_alone() -> Any:
            return jax.tree.map(jnp.zeros_like, own), *pull(of_y)

        of_params, of_x = jax.lax.cond(which >= 0, both, of_x_alone)
        of_held = tuple(
            jax.tree.map(lambda g, i=i: jnp.where(which == i, g, jnp.zeros_like(g)), of_params) for i in range(slots)
        )
        return None, of_held, None, of_x, None, None

    of_slot.defvjp(forward, backward)
    return of_slot


@jax.tree_util.register_static
class _Static:
    """What is no array, among residuals."""

    def __init__(self, value: Hashable) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def _picked(which: Any, held: Sequence[Params], own: Params) -> Params:
    """The parameters of a slot, or the stage's own under -1."""
    return jax.tree.map(lambda *leaves: jax.lax.select_n(which + 1, *leaves), own, *held)
