"""Flax Linen modules as stages."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from tljax.types import InputError, Params, Stage


def stage(
    name: str,
    module: nn.Module,
    *,
    before: Callable[[jax.Array], jax.Array] | None = None,
    after: Callable[[jax.Array], jax.Array] | None = None,
) -> Stage:
    """A Linen module of one input as a stage; `before` and `after` have no parameters (flatten, activation).

    Running statistics become the leaves 'batch_stats/...', which never train: give the module
    `use_running_average=True`. A key given to the stage is the module's 'dropout' key. `init` raises InputError for
    any other collection, since stages are stateless.

    >>> dense = stage("head", nn.Dense(2))
    >>> jax.tree.map(jax.numpy.shape, dense.init(jax.random.key(0), jax.numpy.zeros((1, 3))))
    {'bias': (2,), 'kernel': (3, 2)}
    """

    def init(key: jax.Array, x: jax.Array) -> Params:
        variables = dict(module.init(key, before(x) if before else x))
        params = dict(variables.pop("params", {}))
        statistics = dict(variables.pop(_STATISTICS, {}))
        if variables:
            raise InputError(f"stage '{name}' has the collections {sorted(variables)}: stages keep no state")
        return params | ({_STATISTICS: statistics} if statistics else {})

    def apply(params: Params, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        weights = {leaf: value for leaf, value in params.items() if leaf != _STATISTICS}
        variables = {"params": weights, _STATISTICS: params.get(_STATISTICS, {})}
        y: Any = module.apply(variables, before(x) if before else x, rngs=None if key is None else {"dropout": key})
        return after(y) if after else y

    return Stage(name, init, apply)


def flat(x: jax.Array) -> jax.Array:
    """[batch, ...] -> [batch, features]."""
    return x.reshape(x.shape[0], -1)


_STATISTICS = "batch_stats"
