"""FLOPs of a training step, counted by XLA and not measured."""

import functools
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax

from tljax import batch_stats, masks, models
from tljax.train.step import frozen_prefix
from tljax.types import Mask, Model, ModelState, Params


def step_flops(
    model: Model,
    params: Params,
    mask: Mask,
    shape: models.Shape,
    batch: int,
    merge: Callable[[Params], Params] | None = None,
    cached: bool = True,
    keeps_dropout: Collection[str] = (),
    state: ModelState | None = None,
) -> float:
    """FLOPs of the gradient of a cross-entropy with respect to what trains, on a batch of inputs of `shape`.

    With `cached` the frozen prefix costs nothing: its outputs are computed once. It ends at the first of
    `keeps_dropout`, the stages that keep their dropout while they are frozen. Nothing is compiled; parameters and the
    model's `state` may be abstract. The update of the parameters is left out: two FLOPs each under SGD.

    >>> model = models.build("mlp", 10, hidden=(512,), activation="relu")
    >>> params = models.abstract(model, (28, 28, 1))
    >>> full, probe = (masks.under(params, names) for names in (["hidden_0", "head"], "head"))
    >>> [round(step_flops(model, params, mask, (28, 28, 1), 100) / 1e6) for mask in (full, probe)]
    [164, 2]
    """
    skipped = len(frozen_prefix(model, mask, keeps_dropout)) if cached and merge is None else 0
    trained, frozen = masks.split(params, jax.tree.map(masks.trains, mask))
    inputs = models.batch_of(shape, batch)
    if skipped:
        of_prefix = functools.partial(models.apply, model[:skipped])
        inputs = jax.eval_shape(of_prefix, batch_stats.join(params, state or {}), inputs)

    def loss(trained: Params, frozen: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        whole = masks.join(trained, frozen)
        logits = models.apply(model[skipped:], merge(whole) if merge else whole, x, state=state or {})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    costs = jax.jit(jax.grad(loss)).lower(trained, frozen, inputs, labels).cost_analysis() or {}
    return float(costs.get("flops", jnp.nan))
