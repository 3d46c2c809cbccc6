"""Models: a tuple of named stages, the last of them the head. One file, one model."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from tljax import paths, plugins, switches
from tljax.types import InputError, Model, Params

ACTIVATIONS = (
    *("celu", "elu", "gelu", "hard_tanh", "leaky_relu", "mish", "relu"),
    *("relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "tanh"),
)
"""The elementwise functions of `jax.nn` that `--activation` takes."""


def build(name: str, classes: int, *, hidden: Sequence[int], activation: str) -> Model:
    """The model that `--model` names, for so many classes.

    A model is a function `model(classes, *, ...)`; it gets `hidden` and `activation` if it takes them. Two calls
    with the same arguments give the same object, so that equal fits share an executable. Raises InputError for an
    unknown model, option or activation, and for a width below 1.

    >>> [stage.name for stage in build("mlp", 10, hidden=(512,), activation="relu")]
    ['hidden_0', 'head']
    """
    return _build(name, plugins.outside_digest(name, "tljax.models", "model"), classes, tuple(hidden), activation)


@lru_cache(maxsize=256)
def _build(name: str, digest: str, classes: int, hidden: tuple[int, ...], activation: str) -> Model:
    spec = plugins.parse(name)
    function = plugins.attribute(spec, plugins.module(spec, "tljax.models", "model"), "model")
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation '{activation}'{plugins.nearest(activation, ACTIVATIONS)}")
    if any(width < 1 for width in hidden):
        raise InputError(f"--hidden={','.join(map(str, hidden))}: a width is at least 1")
    shared: dict[str, Any] = {"hidden": hidden, "activation": activation}
    own = inspect.signature(function).parameters
    options = plugins.bind(function, spec.options, f"model '{spec.name}'", given=shared)
    with switches.guarded(f"model '{spec.name}'"):
        return tuple(function(classes, **{key: value for key, value in shared.items() if key in own}, **options))


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of `jax.nn` by its name."""
    return getattr(jax.nn, name)


def names(model: Model) -> tuple[str, ...]:
    """The stages' names in order: the path prefixes that `Context.stages` carries."""
    return tuple(stage.name for stage in model)


def init(model: Model, key: jax.Array, shape: tuple[int, ...]) -> Params:
    """Parameters for inputs of one example's `shape`: {stage.name: parameters of the stage}.

    Each stage draws from its own key, so that two models that differ in one stage share the draws of the others.
    """
    # Compiled by itself it may be compiled in a hurry, which JAX refuses within another function that is compiled.
    return (_draw if isinstance(key, jax.core.Tracer) else _drawn)(model, key, shape)


@switches.guarded("the model")
def _draw(model: Model, key: jax.Array, shape: tuple[int, ...]) -> Params:
    params = {}
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    for i, stage in enumerate(model):
        stage_key = jax.random.fold_in(key, i)
        params[stage.name] = stage.init(stage_key, jnp.zeros(x.shape, x.dtype))
        x = jax.eval_shape(stage.apply, params[stage.name], x)
    paths.names(params)
    return params


# It runs once a seed: a third of the time to compile, and the same bits.
_drawn = partial(jax.jit, static_argnames=("model", "shape"), compiler_options={"xla_backend_optimization_level": 1})(
    _draw
)


def abstract(model: Model, shape: tuple[int, ...]) -> Params:
    """The shapes and dtypes that `init` gives, without drawing anything."""
    return jax.eval_shape(lambda key: init(model, key, shape), jax.random.key(0))


def apply(
    model: Model, params: Params, x: jax.Array, *, key: jax.Array | None = None, frozen: Sequence[str] = ()
) -> jax.Array:
    """Logits float32 [batch, classes] of inputs [batch, ...]: the last of `features`."""
    return features(model, params, x, key=key, frozen=frozen)[-1]


@switches.guarded("the model")
def features(
    model: Model, params: Params, x: jax.Array, *, key: jax.Array | None = None, frozen: Sequence[str] = ()
) -> list[jax.Array]:
    """What each stage gives, [batch, ...] each, for inputs [batch, ...].

    uint8 pixels are divided by 255, which belongs to no stage. A key means training; the stages named in `frozen` run
    without it, as in evaluation. A stage draws the same whether or not the stages before it are there.
    """
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.float32) / 255
    given = []
    for i, stage in enumerate(model):
        stage_key = None if key is None or stage.name in frozen else jax.random.fold_in(key, len(model) - i)
        x = stage.apply(params[stage.name], x, key=stage_key)
        given.append(x)
    return given
