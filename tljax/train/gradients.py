"""Gradients of L over a training split, for data-driven strategies and the EWC penalty."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, models, objective, paths
from tljax.train.vectorize import Data
from tljax.types import Model, ModelState, Params

MOST_SQUARED = 4096
"""Examples that a mean squared gradient is taken over, at most: it costs one gradient for each example."""


def mean_gradient(
    model: Model,
    loss: objective.Loss,
    data: Data,
    chosen: np.ndarray,
    merge: Any = None,
    class_weights: np.ndarray | None = None,
    *,
    state: ModelState | None = None,
) -> Callable[[Params], Params]:
    """The function params -> gradient of the mean L over the examples `chosen` (int [n]).

    `merge` is as in `Spec`, `state` the model's, which stays as it is; L of an example is times the weight of its
    class, if there are weights float32 [classes]. The gradient is None where a leaf cannot train.
    """
    arrays = (data.inputs, data.targets, class_weights)
    return functools.partial(_mean, model, loss, merge, False, arrays, _rows(chosen, 256), state or {})


def mean_squared_gradient(
    model: Model,
    loss: objective.Loss,
    data: Data,
    chosen: np.ndarray,
    merge: Any = None,
    *,
    state: ModelState | None = None,
) -> Callable[[Params], Params]:
    """The function params -> mean over examples of the squared gradient of L.

    It is the diagonal of the empirical Fisher information, over at most MOST_SQUARED of the examples `chosen` (int
    [n]), evenly spread, whose L has no weights of classes; None where a leaf cannot train.
    """
    some = chosen[:: -(-len(chosen) // MOST_SQUARED)]
    arrays = (data.inputs, data.targets, None)
    return functools.partial(_mean, model, loss, merge, True, arrays, _rows(some, 16), state or {})


def _rows(chosen: np.ndarray, size: int) -> jax.Array:
    """The examples as int32 [chunks, size], -1 for padding."""
    rows = np.full(-(-len(chosen) // size) * size, -1, np.int32)
    rows[: len(chosen)] = chosen
    return jnp.asarray(rows.reshape(-1, size))


@functools.partial(jax.jit, static_argnames=("model", "loss", "merge", "squared"))
def _mean(
    model: Model,
    loss: objective.Loss,
    merge: Any,
    squared: bool,
    arrays: tuple[Any, Any, Any],
    rows: jax.Array,
    state: ModelState,
    params: Params,
) -> Params:
    inputs, targets, class_weights = arrays
    trained, fixed = masks.split(params, paths.each(lambda path, leaf: True, params))

    def total(trained: Params, chosen: jax.Array) -> jax.Array:
        whole = masks.join(trained, fixed)
        at = jnp.maximum(chosen, 0)
        x, of_rows = jax.tree.map(lambda leaf: leaf[0][at], inputs), jax.tree.map(lambda leaf: leaf[at], targets)
        values = loss(models.apply(model, merge(whole) if merge else whole, x, state=state), of_rows)
        values = values if class_weights is None else values * class_weights[of_rows]
        return jnp.vdot(values, (chosen >= 0).astype(values.dtype))

    def squares(trained: Params, chosen: jax.Array) -> Params:
        each = jax.vmap(jax.grad(total), in_axes=(None, 0))(trained, chosen[:, None])
        return jax.tree.map(lambda g: jnp.square(g).sum(0), each)

    of_chunk = squares if squared else jax.grad(total)

    def add(sums: Params, chosen: jax.Array) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(trained, chosen)), None

    sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), rows)
    return jax.tree.map(lambda leaf: leaf / (rows >= 0).sum(), sums)
