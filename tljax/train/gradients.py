"""Gradients of L over a training split, for data-driven strategies and the EWC penalty."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, models, objective, paths
from tljax.train.data import Data, Reader, Stream, chunk_steps
from tljax.types import InputError, Model, ModelState, Params

MOST_SQUARED = 4096
"""Examples that a mean squared gradient is taken over, at most: it costs one gradient for each example."""


@dataclass(frozen=True)
class OfFeatures:
    """In the place of a loss of the head's outputs: a loss of what the stage below it gives, of a whole batch."""

    function: Callable[[Any, Any, jax.Array], jax.Array]
    """(features [batch, ...], targets [batch, ...], weight float32 [batch]) -> the sum over the examples that count."""


def mean_gradient(
    model: Model,
    loss: objective.Loss,
    data: Data | Stream,
    chosen: np.ndarray,
    merge: Any = None,
    class_weights: np.ndarray | None = None,
    *,
    state: ModelState | None = None,
) -> Callable[..., Params]:
    """The function params -> gradient of the mean L over the examples `chosen` (int [n]).

    `merge` is as in `Spec`, `state` the model's, which stays as it is; L of an example is times the weight of its
    class, if there are weights float32 [classes]. The gradient is None where a leaf cannot train.

    With `loss=`, a function as that of `OfFeatures`, it is the gradient of that loss, in batches of 256 examples in
    their order, without weights of classes; the function raises InputError for a model of one stage.
    """
    rows = _rows(chosen, 256)
    objective_loss = loss

    def gradient(params: Params, *, loss: Callable[[Any, Any, jax.Array], jax.Array] | None = None) -> Params:
        if loss is None:
            return _function(model, objective_loss, merge, False, data, class_weights, rows, state)(params)
        return _function(model, OfFeatures(loss), merge, False, data, None, rows, state)(params)

    return gradient


def mean_squared_gradient(
    model: Model,
    loss: objective.Loss,
    data: Data | Stream,
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
    return _function(model, loss, merge, True, data, None, _rows(some, 16), state)


def _function(
    model: Model,
    loss: objective.Loss | OfFeatures,
    merge: Any,
    squared: bool,
    data: Data | Stream,
    class_weights: np.ndarray | None,
    rows: np.ndarray,
    state: ModelState | None,
) -> Callable[[Params], Params]:
    """params -> mean over the examples of the rows, of resident data or of a stream."""
    if isinstance(data, Stream):
        return functools.partial(_mean_of_stream, model, loss, merge, squared, data, class_weights, rows, state or {})
    arrays = (data.inputs, data.targets, class_weights)
    return functools.partial(_mean, model, loss, merge, squared, arrays, jnp.asarray(rows), state or {})


def _rows(chosen: np.ndarray, size: int) -> np.ndarray:
    """The examples as int32 [chunks, size], -1 for padding."""
    rows = np.full(-(-len(chosen) // size) * size, -1, np.int32)
    rows[: len(chosen)] = chosen
    return rows.reshape(-1, size)


def _mean_of_stream(
    model: Model,
    loss: objective.Loss | OfFeatures,
    merge: Any,
    squared: bool,
    stream: Stream,
    class_weights: np.ndarray | None,
    rows: np.ndarray,
    state: ModelState,
    params: Params,
) -> Params:
    """As `_mean`, chunk by chunk of what is read ahead."""
    length, ahead = chunk_steps(stream, rows.shape[1], min(16, len(rows)))
    trained, _ = masks.split(params, paths.each(lambda path, leaf: True, params))
    sums = jax.tree.map(jnp.zeros_like, trained)

    def requests() -> Iterator[tuple[None, np.ndarray]]:
        for start in range(0, len(rows), length):
            chunk = np.full((length, rows.shape[1]), -1, np.int32)
            chunk[: len(rows) - start] = rows[start : start + length]
            yield None, chunk

    def finish(_: None, chosen: np.ndarray, inputs: Any, targets: Any) -> Any:
        return jax.device_put((inputs, targets, (chosen >= 0)))

    with Reader(stream, requests(), finish, ahead) as reader:
        for chunk in reader:
            sums = _add_chunk(model, loss, merge, squared, class_weights, sums, chunk, state, params)
    return jax.tree.map(lambda leaf: leaf / (rows >= 0).sum(), sums)


@functools.partial(jax.jit, static_argnames=("model", "loss", "merge", "squared"))
def _add_chunk(
    model: Model,
    loss: objective.Loss | OfFeatures,
    merge: Any,
    squared: bool,
    class_weights: np.ndarray | None,
    sums: Params,
    chunk: Any,
    state: ModelState,
    params: Params,
) -> Params:
    """The sums with those of a chunk: leaves [batches, batch, ...] of inputs, targets, and whether a row counts."""
    return _added(model, loss, merge, squared, class_weights, lambda item: item, sums, chunk, state, params)


@functools.partial(jax.jit, static_argnames=("model", "loss", "merge", "squared"))
def _mean(
    model: Model,
    loss: objective.Loss | OfFeatures,
    merge: Any,
    squared: bool,
    arrays: tuple[Any, Any, Any],
    rows: jax.Array,
    state: ModelState,
    params: Params,
) -> Params:
    inputs, targets, class_weights = arrays

    def gathered(chosen: jax.Array) -> Any:
        at = jnp.maximum(chosen, 0)
        x, targets_rows = jax.tree.map(lambda leaf: leaf[0][at], inputs), jax.tree.map(lambda leaf: leaf[at], targets)
        return x, targets_rows, chosen >= 0

    trained, _ = masks.split(params, paths.each(lambda path, leaf: True, params))
    zeros = jax.tree.map(jnp.zeros_like, trained)
    sums = _added(model, loss, merge, squared, class_weights, gathered, zeros, rows, state, params)
    return jax.tree.map(lambda leaf: leaf / (rows >= 0).sum(), sums)


def _added(
    model: Model,
    loss: objective.Loss | OfFeatures,
    merge: Any,
    squared: bool,
    class_weights: Any,
    fetch: Callable[[Any], Any],
    sums: Params,
    items: Any,
    state: ModelState,
    params: Params,
) -> Params:
    """The sums with those of each item: `fetch(item)` is (inputs [batch, ...], targets [batch, ...], whether a row
    counts [batch]), and the leaves of an item have an axis of the batch."""
    trained, fixed = masks.split(params, paths.each(lambda path, leaf: True, params))

    def total(trained: Params, item: Any) -> jax.Array:
        whole = masks.join(trained, fixed)
        x, row_targets, counts = fetch(item)
        if isinstance(loss, OfFeatures):
            if len(model) < 2:
                raise InputError(f"the model has no stage below its head '{model[-1].name}', of whose output a loss is")
            below = models.features(model, merge(whole) if merge else whole, x, state=state)[-2]
            return loss.function(below, row_targets, counts.astype(jnp.float32))
        values = loss(models.apply(model, merge(whole) if merge else whole, x, state=state), row_targets)
        values = values if class_weights is None else values * class_weights[row_targets]
        return jnp.vdot(values, counts.astype(values.dtype))

    def squares(trained: Params, item: Any) -> Params:
        each = jax.vmap(jax.grad(total), in_axes=(None, 0))(trained, jax.tree.map(lambda leaf: leaf[:, None], item))
        return jax.tree.map(lambda g: jnp.square(g).sum(0), each)

    item_sum = squares if squared else jax.grad(total)

    def add(sums: Params, item: Any) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, sums, item_sum(trained, item)), None

    sums, _ = jax.lax.scan(add, sums, items)
    return sums
