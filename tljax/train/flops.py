"""FLOPs of a training step, counted by XLA and not measured."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tljax import batch_stats, masks, models
from tljax import objective as objectives
from tljax.train.step import frozen_prefix
from tljax.types import Mask, Model, ModelState, Objective, Params


def step_flops(
    model: Model,
    params: Params,
    mask: Mask,
    shape: models.Shape,
    batch: int,
    merge: Callable[[Params], Params] | None = None,
    cached: bool = True,
    keeps_dropout: Collection[str] = (),
    objective: Objective | None = None,
    state: ModelState | None = None,
) -> float:
    """FLOPs of the gradient of a loss with respect to what trains, on a batch of inputs of `shape`.

    The loss is that of the `objective` where its targets are no classes, else a cross-entropy.
    With `cached` the frozen prefix costs nothing: its outputs are computed once. It ends at the first of
    `keeps_dropout`, the stages that keep their dropout while they are frozen. Nothing is compiled; parameters and the
    model's `state` may be abstract. The update of the parameters is left out: two FLOPs each under SGD.

    >>> model = models.build("mlp", 10, hidden=(512,), activation="relu")
    >>> params = models.abstract(model, (28, 28, 1))
    >>> full, probe = (masks.under(params, names) for names in (["hidden_0", "head"], "head"))
    >>> [round(step_flops(model, params, mask, (28, 28, 1), 100) / 1e6) for mask in (full, probe)]
    [164, 2]
    """
    model = models.unrolled(model)
    skipped = len(frozen_prefix(model, mask, keeps_dropout)) if cached and merge is None else 0
    trained, frozen = masks.split(params, jax.tree.map(masks.trains, mask))
    inputs = models.batch_of(shape, batch)
    if skipped:
        of_prefix = functools.partial(models.apply, model[:skipped])
        inputs = jax.eval_shape(of_prefix, batch_stats.join(params, state or {}), inputs)

    def outputs(trained: Params, frozen: Params, state: ModelState, x: jax.Array) -> jax.Array:
        whole = masks.join(trained, frozen)
        return models.apply(model[skipped:], merge(whole) if merge else whole, x, state=state)

    of_batch, targets = _loss(objective, batch, lambda: jax.eval_shape(outputs, trained, frozen, state or {}, inputs))

    def loss(trained: Params, frozen: Params, state: ModelState, x: jax.Array, y: jax.Array) -> jax.Array:
        return of_batch(outputs(trained, frozen, state, x), y).mean()

    costs = jax.jit(jax.grad(loss)).lower(trained, frozen, state or {}, inputs, targets).cost_analysis() or {}
    return float(costs.get("flops", jnp.nan))


def _loss(goal: Objective | None, batch: int, outputs: Callable[[], Any]) -> tuple[Callable[..., jax.Array], Any]:
    """(loss, shapes and dtypes of the targets of a batch); `outputs` are those of the head."""
    if goal is None or goal.kind == "classes":
        return optax.softmax_cross_entropy_with_integer_labels, jax.ShapeDtypeStruct((batch,), jnp.int32)
    length = outputs().shape[1]
    return goal.loss, objectives.example(goal.kind, goal.num_outputs, batch, length)[1]
