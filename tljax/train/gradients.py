"""Gradients of L over a training split: what data-driven strategies and the EWC penalty ask for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, models, objective, paths
from tljax.train.vectorize import Data
from tljax.types import Model, Params

MOST = 4096
"""Examples that a mean squared gradient is taken over, at most: it costs a gradient an example."""


def mean_gradient(
    model: Model, loss: objective.Loss, data: Data, chosen: np.ndarray, merge: Any = None
) -> Callable[[Params], Params]:
    """params -> gradient of the mean L over the examples `chosen` (int [n]); None where a leaf cannot train."""
    return functools.partial(_mean, model, loss, merge, False, (data.inputs, data.labels), _rows(chosen, 256))


def mean_squared_gradient(
    model: Model, loss: objective.Loss, data: Data, chosen: np.ndarray, merge: Any = None
) -> Callable[[Params], Params]:
    """params -> mean over examples of the squared gradient of L, the diagonal of the empirical Fisher information.

    Over at most MOST of the examples `chosen` (int [n]), evenly spread; None where a leaf cannot train.
    """
    some = chosen[:: -(-len(chosen) // MOST)]
    return functools.partial(_mean, model, loss, merge, True, (data.inputs, data.labels), _rows(some, 16))


def _rows(chosen: np.ndarray, size: int) -> jax.Array:
    """int32 [chunks, size], -1 for padding."""
    rows = np.full(-(-len(chosen) // size) * size, -1, np.int32)
    rows[: len(chosen)] = chosen
    return jnp.asarray(rows.reshape(-1, size))


@functools.partial(jax.jit, static_argnames=("model", "loss", "merge", "squared"))
def _mean(
    model: Model,
    loss: objective.Loss,
    merge: Any,
    squared: bool,
    arrays: tuple[jax.Array, jax.Array],
    rows: jax.Array,
    params: Params,
) -> Params:
    inputs, labels = arrays
    trained, fixed = masks.split(params, paths.each(lambda path, leaf: True, params))

    def total(trained: Params, chosen: jax.Array) -> jax.Array:
        whole = masks.join(trained, fixed)
        at = jnp.maximum(chosen, 0)
        logits = models.apply(model, merge(whole) if merge else whole, inputs[0][at])
        return jnp.vdot(loss(logits, labels[at]), (chosen >= 0).astype(logits.dtype))

    def squares(trained: Params, chosen: jax.Array) -> Params:
        each = jax.vmap(jax.grad(total), in_axes=(None, 0))(trained, chosen[:, None])
        return jax.tree.map(lambda g: jnp.square(g).sum(0), each)

    one = squares if squared else jax.grad(total)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    sums, _ = jax.lax.scan(lambda sums, chosen: (jax.tree.map(jnp.add, sums, one(trained, chosen)), None), zeros, rows)
    return jax.tree.map(lambda leaf: leaf / (rows >= 0).sum(), sums)
