"""Models: a tuple of named stages, the last of them the head. One file, one model."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax import paths, plugins, switches
from tljax.types import InputError, Model, Params, Stage

ACTIVATIONS = (
    *("celu", "elu", "gelu", "hard_tanh", "leaky_relu", "mish", "relu"),
    *("relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "tanh"),
)
"""The elementwise functions of `jax.nn` that models take as `activation`."""


def build(name: str, classes: int, *, hidden: Sequence[int], activation: str) -> Model:
    """The model that `name` stands for, with so many classes.

    A model is a function `model(classes, *, ...)`; it gets `hidden` and `activation` if it takes them. Two calls
    with the same arguments return the same object, so that equal fits share an executable. Raises InputError for an
    unknown model, option or activation, for a width below 1, and where the function fails or returns no stages. The
    stages raise InputError, naming the model, the stage and its inputs, where their own code fails, and where the head
    returns anything but an array [batch, classes].

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
        raise InputError("a width is at least 1", field="hidden", value=",".join(map(str, hidden)))
    shared: dict[str, Any] = {"hidden": hidden, "activation": activation}
    parameters = inspect.signature(function).parameters
    options = plugins.bind(function, spec.options, f"model '{spec.name}'", excluded=shared)
    keywords = {name: value for name, value in shared.items() if name in parameters}
    try:
        with switches.guarded(f"model '{spec.name}'"):
            stages = function(classes, **keywords, **options)
            stages = tuple(stages) if isinstance(stages, Iterable) else stages
    except _CLEAR_ERRORS:
        raise
    except Exception as error:  # a model's code may raise anything
        raise InputError(f"model '{name}' cannot be built: {_summary(error, function)}") from error
    _require_stages(name, stages)
    return tuple(
        _guarded(stage, name, function, classes if i == len(stages) else None) for i, stage in enumerate(stages, 1)
    )


_CLEAR_ERRORS = (InputError, jax.errors.JaxRuntimeError, MemoryError)
"""Errors whose message is clear as it is: bad input, and a device or a machine without memory."""


def _require_stages(name: str, stages: Any) -> None:
    """Raises InputError unless `stages` is a tuple of stages with different names."""
    example = "return Stage(name, init, apply), as tljax.models.linen.stage makes one of a module, the head last"
    if not isinstance(stages, tuple) or not stages:
        raise InputError(f"model '{name}' gives {plugins.shown(stages)} for its stages: {example}")
    for stage in stages:
        if not isinstance(stage, Stage) or not isinstance(stage.name, str):
            raise InputError(f"model '{name}' gives {plugins.shown(stage)} for a stage: {example}")
    names = [stage.name for stage in stages]
    if twice := [stage_name for stage_name in names if names.count(stage_name) > 1]:
        raise InputError(f"model '{name}' has two stages named '{twice[0]}': give each a name of its own")


def _guarded(stage: Stage, name: str, function: Callable[..., Any], classes: int | None) -> Stage:
    """The stage of model `name`, whose errors become one line with the place in `function`'s file.

    `classes` is the number of classes that the head has to return; None for other stages.
    """

    def call(part: Callable[..., Any], first: Any, x: Any, **keywords: Any) -> Any:
        try:
            return part(first, x, **keywords)
        except _CLEAR_ERRORS:
            raise
        except Exception as error:  # a model's code may raise anything
            inputs = f" on inputs {_shown(x)}"
            raise InputError(
                f"model '{name}' fails in stage '{stage.name}'{inputs}: {_summary(error, function)}"
            ) from error

    def init(key: jax.Array, x: jax.Array) -> Params:
        return call(stage.init, key, x)

    def apply(params: Params, x: jax.Array, **keywords: Any) -> jax.Array:
        y = call(stage.apply, params, x, **keywords)
        if not hasattr(y, "shape") or not hasattr(y, "dtype"):
            raise InputError(f"model '{name}': stage '{stage.name}' gives a {type(y).__name__}: let it give one array")
        batch = jax.tree.leaves(x)[0].shape[0]
        # Outputs of a model of tokens are [batch, length, tokens].
        if classes is not None and (y.ndim not in (2, 3) or y.shape != (batch, *y.shape[1:-1], classes)):
            raise InputError(
                f"model '{name}': its head, stage '{stage.name}', gives {list(y.shape)} of inputs "
                f"{list(x.shape) if hasattr(x, 'shape') else _shown(x)}: let "
                f"it give [batch, classes], here {[batch, classes]}"
            )
        return y

    return Stage(stage.name, init, apply)


def _shown(x: Any) -> str:
    """The dtypes and shapes of inputs in words."""
    if hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    leaves = ((path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(x) if hasattr(leaf, "dtype"))
    return ", ".join(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves)


_LIBRARIES = str(Path(jax.__file__).parent.parent)


def _summary(error: Exception, function: Callable[..., Any]) -> str:
    """An exception of a model's code in one line, with the last line of code outside of libraries that it passed."""
    model_file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == model_file
        or not (frame.filename.startswith(_LIBRARIES) or Path(frame.filename).parent == Path(__file__).parent)
    ]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {plugins.words(error)[:300]}{where}"


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of `jax.nn` that has this name."""
    return getattr(jax.nn, name)


def names(model: Model) -> tuple[str, ...]:
    """The stages' names in order: the path prefixes that `Context.stages` carries."""
    return tuple(stage.name for stage in model)


Shape = Any
"""The inputs of one example: the shape of pixels or float features (a tuple of whole numbers), or a tree of
`jax.ShapeDtypeStruct`, as `Examples.spec` is, for inputs of other dtypes and for several of them."""


def batch_of(shape: Shape, size: int) -> Any:
    """Shapes and dtypes of a batch of `size` examples as the first stage sees it: pixels are float32 there.

    >>> batch_of((28, 28, 1), 2).dtype.name, batch_of(jax.ShapeDtypeStruct((16,), jnp.int32), 2).shape
    ('float32', (2, 16))
    """

    def batched(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *leaf.shape), jnp.float32 if leaf.dtype == jnp.uint8 else leaf.dtype)

    is_shape = isinstance(shape, tuple) and all(isinstance(length, int) for length in shape)
    return jax.tree.map(batched, jax.ShapeDtypeStruct(shape, jnp.float32) if is_shape else shape)


def init(model: Model, key: jax.Array, shape: Shape) -> Params:
    """Parameters for inputs of one example's `shape`: {stage.name: parameters of the stage}.

    Each stage draws from its own key, so that two models that differ in one stage share the draws of the others.
    """
    leaves, structure = jax.tree.flatten(batch_of(shape, 1))
    # JAX refuses compiler options within another function that is compiled.
    return (_draw if isinstance(key, jax.core.Tracer) else _drawn)(model, key, (structure, tuple(leaves)))


@switches.guarded("the model")
def _draw(model: Model, key: jax.Array, inputs: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]) -> Params:
    """The parameters that `init` returns, for a flattened batch, which is hashable."""
    params = {}
    x = jax.tree.unflatten(*inputs)
    for i, stage in enumerate(model):
        stage_key = jax.random.fold_in(key, i)
        params[stage.name] = stage.init(stage_key, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x))
        x = jax.eval_shape(stage.apply, params[stage.name], x)
    paths.names(params)
    return params


# It runs once a seed: at this level it compiles in a third of the time, and gives the same bits.
_drawn = partial(jax.jit, static_argnames=("model", "inputs"), compiler_options={"xla_backend_optimization_level": 1})(
    _draw
)


def abstract(model: Model, shape: Shape) -> Params:
    """The shapes and dtypes of the parameters that `init` draws, without drawing them."""
    return jax.eval_shape(lambda key: init(model, key, shape), jax.random.key(0))


def apply(
    model: Model, params: Params, x: jax.Array, *, key: jax.Array | None = None, frozen: Sequence[str] = ()
) -> jax.Array:
    """Outputs of the head, float32 [batch, classes], of inputs with leaves [batch, ...]: the last of `features`."""
    return features(model, params, x, key=key, frozen=frozen)[-1]


@switches.guarded("the model")
def features(
    model: Model, params: Params, x: jax.Array, *, key: jax.Array | None = None, frozen: Sequence[str] = ()
) -> list[jax.Array]:
    """The output of each stage, [batch, ...], for inputs with leaves [batch, ...].

    uint8 pixels are divided by 255, before the first stage. A key stands for training; the stages named in `frozen` run
    without it, as in evaluation. The draws of a stage do not depend on whether stages precede it.
    """
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / 255 if leaf.dtype == jnp.uint8 else leaf, x)
    outputs = []
    for i, stage in enumerate(model):
        stage_key = None if key is None or stage.name in frozen else jax.random.fold_in(key, len(model) - i)
        x = stage.apply(params[stage.name], x, key=stage_key)
        outputs.append(x)
    return outputs
