"""Models: a tuple of named stages, the last of them the head. One file, one model."""

import contextlib
import inspect
import itertools
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax import batch_stats, low_rank, paths, plugins, switches
from tljax.models.slotted import Slots, applied
from tljax.types import InputError, Model, ModelState, Params, PyTree, Stage

ACTIVATIONS = (
    *("celu", "elu", "gelu", "hard_tanh", "leaky_relu", "mish", "relu"),
    *("relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "tanh"),
)
"""The elementwise functions of `jax.nn` that models take as `activation`."""


def build(
    name: str,
    classes: int,
    *,
    hidden: Sequence[int],
    activation: str,
    compute_dtype: str = "float32",
    matmul_precision: str = "default",
    remat: Sequence[str] = (),
) -> Model:
    """The model that `name` stands for, with so many classes.

    A model is a function `model(classes, *, ...)`; it gets `hidden` and `activation` if it takes them. Two calls
    with the same arguments return the same object, so that equal fits share an executable.

    Under another `compute_dtype` than float32, one of `DTYPES`, stages get their inputs in it and give float32; the
    parameters that are drawn, graded and stored are float32 all the same, and so is any state. A function that takes
    `dtype` gets it and casts the parameters itself, as Flax's modules do; for others they are cast before each stage.
    `matmul_precision` is that of `jax.default_matmul_precision`, in products and convolutions, forwards and backwards.
    What the stages of `remat` compute within is not kept for the gradient, but computed again (`jax.checkpoint`: Chen
    et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174): less memory, more time.

    Raises InputError for an unknown model, option, activation, dtype or stage, for a width below 1, and where the
    function fails or returns no stages. The stages raise InputError, naming the model, the stage and its inputs, where
    their own code fails, and where the head returns anything but an array [batch, classes].

    >>> [stage.name for stage in build("mlp", 10, hidden=(512,), activation="relu")]
    ['hidden_0', 'head']
    """
    require_dtype(compute_dtype)
    digest = plugins.outside_digest(name, "tljax.models", "model")
    return _build(name, digest, classes, tuple(hidden), activation, compute_dtype, matmul_precision, tuple(remat))


DTYPES = ("float32", "bfloat16")
"""In which models compute."""
PRECISIONS = ("default", "high", "highest")
"""Of products of float32 on devices that have faster ones: as many bits as the device likes, more, or all."""


def require_dtype(name: str) -> None:
    """Raise InputError for a dtype in which models do not compute.

    >>> require_dtype("float16")
    Traceback (most recent call last):
    ...
    tljax.types.InputError: compute_dtype=float16: its small gradients are 0 without a scale of the loss: give bfloat16
    """
    if name == "float16":
        reason = "its small gradients are 0 without a scale of the loss: give bfloat16"
        raise InputError(reason, field="compute_dtype", value=name)
    if name not in DTYPES:
        raise InputError(
            f"models compute in {' or '.join(DTYPES)}: give one of them", field="compute_dtype", value=name
        )


def size(name: str, shapes: Mapping[str, tuple[int | None, ...]]) -> str:
    """How a model of one's own weights is built: what `size` of its file says of {path of a leaf: its shape}; '' where
    the file has no such function, or the shapes do not say it.

    >>> size("mlp", {"head/kernel": (512, 10)})
    ''
    """
    spec = plugins.parse(name)
    function = getattr(plugins.module(spec, "tljax.models", "model"), "size", None)
    return function(shapes) if callable(function) and not spec.words else ""


@lru_cache(maxsize=256)
def _build(
    name: str,
    digest: str,
    classes: int,
    hidden: tuple[int, ...],
    activation: str,
    compute_dtype: str,
    matmul_precision: str,
    remat: tuple[str, ...],
) -> Model:
    spec = plugins.parse(name)
    function = plugins.attribute(spec, plugins.module(spec, "tljax.models", "model"), "model")
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation '{activation}'{plugins.nearest(activation, ACTIVATIONS)}")
    if any(width < 1 for width in hidden):
        raise InputError("a width is at least 1", field="hidden", value=",".join(map(str, hidden)))
    shared: dict[str, Any] = {"hidden": hidden, "activation": activation}
    parameters = inspect.signature(function).parameters
    excluded = shared if "." in spec.name else (*shared, "dtype")
    options = plugins.bind(function, spec.options, f"model '{spec.name}'", excluded=excluded)
    keywords = {name: value for name, value in shared.items() if name in parameters}
    takes_dtype = "dtype" in parameters and "dtype" not in options and compute_dtype != "float32"
    keywords |= {"dtype": jnp.dtype(compute_dtype)} if takes_dtype else {}
    try:
        with switches.guarded(f"model '{spec.name}'"):
            stages = function(classes, **keywords, **options)
            stages = tuple(stages) if isinstance(stages, Iterable) else stages
    except _CLEAR_ERRORS:
        raise
    except Exception as error:  # a model's code may raise anything
        raise InputError(f"model '{name}' cannot be built: {_summary(error, function)}") from error
    _require_stages(name, stages)
    guarded = tuple(
        _guarded(stage, name, function, classes if i == len(stages) else None) for i, stage in enumerate(stages, 1)
    )
    for stage_name in remat:
        if stage_name not in names(guarded):
            reason = f"model '{name}' has no such stage{plugins.nearest(stage_name, names(guarded))}"
            raise InputError(reason, field="remat", value=stage_name)
    guarded = tuple(_rematerialised(stage) if stage.name in remat else stage for stage in guarded)
    if (compute_dtype, matmul_precision) == ("float32", "default"):
        return guarded
    dtype = None if compute_dtype == "float32" else jnp.dtype(compute_dtype)
    return tuple(_computed(stage, dtype, matmul_precision, casts=not takes_dtype) for stage in guarded)


def _computed(stage: Stage, dtype: Any, precision: str, casts: bool) -> Stage:
    """The stage, computed in a dtype (None: as it is) and at a precision of products; `casts` its parameters too."""

    def apply(params: Params, state: ModelState, x: PyTree, **keywords: Any) -> tuple[PyTree, ModelState]:
        if dtype is not None:
            params, x = _cast(params, dtype) if casts else params, _cast(x, dtype)
        with contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision):
            y, new_state = stage.apply(params, state, x, **keywords)
        return (y, new_state) if dtype is None else (_cast(y, jnp.float32), _cast(new_state, jnp.float32))

    return stage._replace(apply=wraps(stage.apply)(apply))


def _rematerialised(stage: Stage) -> Stage:
    """The stage, of which the gradient keeps its inputs alone and computes the rest again."""

    def apply(
        params: Params,
        state: ModelState,
        x: PyTree,
        *,
        key: jax.Array | None,
        weight: jax.Array | None,
        **keywords: Any,
    ) -> tuple[PyTree, ModelState]:
        def computed(params: Params, state: ModelState, x: PyTree, key: Any, weight: Any) -> Any:
            return stage.apply(params, state, x, key=key, weight=weight, **keywords)

        return jax.checkpoint(computed)(params, state, x, key, weight)

    alike = None if stage.alike is None else ("remat", stage.alike)
    return stage._replace(apply=wraps(stage.apply)(apply), alike=alike)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its float leaves in a dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


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
    """The stage of model `name` in its full form, whose errors become one line with the place in `function`'s file.

    `classes` is the number of classes that the head has to return; None for other stages.
    """
    stage = full_form(stage)
    if stage.fixed and classes is not None:
        raise InputError(f"model '{name}': its head, stage '{stage.name}', is `fixed`: only stages below it may be")

    def call(part: Callable[..., Any], x: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return part(*arguments, x, **keywords)
        except _CLEAR_ERRORS:
            raise
        except Exception as error:  # a model's code may raise anything
            inputs = f" on inputs {_shown(x)}"
            raise InputError(
                f"model '{name}' fails in stage '{stage.name}'{inputs}: {_summary(error, function)}"
            ) from error

    def init(key: jax.Array, x: PyTree) -> tuple[Params, ModelState]:
        variables = call(stage.init, x, key)
        if not isinstance(variables, tuple) or len(variables) != 2:
            shown = plugins.shown(variables)
            raise InputError(f"model '{name}': stage '{stage.name}' draws {shown}: let `init` give (params, state)")
        if stage.fixed and jax.tree.leaves(variables):
            reason = "is `fixed` and has parameters or a state: leave that out, and freeze them by a mask"
            raise InputError(f"model '{name}': stage '{stage.name}' {reason}")
        if stage.fixed and _uses_key(stage, x):
            reason = "is `fixed` and uses its key: a draw would never be made; leave `fixed` out"
            raise InputError(f"model '{name}': stage '{stage.name}' {reason}")
        return variables

    def apply(params: Params, state: ModelState, x: PyTree, **keywords: Any) -> tuple[PyTree, ModelState]:
        outputs = call(stage.apply, x, params, state, **keywords)
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            shown = plugins.shown(outputs)
            raise InputError(f"model '{name}': stage '{stage.name}' gives {shown}: let `apply` give (y, state)")
        y, new_state = outputs
        leaves = jax.tree.leaves(y)
        if type(y) is tuple or not leaves or not all(hasattr(leaf, "dtype") for leaf in leaves):
            kind = type(y).__name__
            raise InputError(
                f"model '{name}': stage '{stage.name}' gives a {kind}: let it give one array, or a dict of arrays"
            )
        batch, shape = len(jax.tree.leaves(x)[0]), getattr(y, "shape", ())
        # Outputs of a model of tokens are [batch, length, tokens].
        if classes is not None and (len(shape) not in (2, 3) or shape != (batch, *shape[1:-1], classes)):
            raise InputError(
                f"model '{name}': its head, stage '{stage.name}', gives {list(shape)} of inputs "
                f"{list(x.shape) if hasattr(x, 'shape') else _shown(x)}: let "
                f"it give [batch, classes], here {[batch, classes]}"
            )
        return y, new_state

    return stage._replace(init=init, apply=wraps(stage.apply)(apply))


def _uses_key(stage: Stage, x: PyTree) -> bool:
    """Whether the output of a stage without parameters may depend on its key: whether any operation reads that."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.make_jaxpr(lambda key, x: stage.apply({}, {}, x, key=key, train=False, weight=None))(key, shapes)
    [variable, *_] = traced.jaxpr.invars
    return any(variable is operand for equation in traced.jaxpr.eqns for operand in equation.invars)


@lru_cache(maxsize=4096)
def full_form(stage: Stage) -> Stage:
    """The stage with `init: (key, x) -> (params, state)` and `apply: (params, state, x, *, key, train, weight)`.

    One whose `apply` takes two positional arguments, (params, x), is of the short form and has no state; running
    statistics that it keeps among its parameters, under 'batch_stats', become a state that never changes. Raises
    InputError for an `apply` of any other signature.

    >>> double = full_form(Stage("double", lambda key, x: {}, lambda params, x, *, key=None: 2 * x))
    >>> double.init(jax.random.key(0), 1.0), double.apply({}, {}, 1.0, key=None, train=False, weight=None)
    (({}, {}), (2.0, {}))
    """
    try:
        parameters = inspect.signature(stage.apply).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"stage '{stage.name}': its `apply` is no function with a signature: write one") from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty and p.name not in ("key", "train", "weight")]
    if len(needed) == 3:
        return stage
    if len(needed) != 2:
        raise InputError(
            f"stage '{stage.name}': its `apply` takes {len(needed)} positional arguments: let it take (params, x, *, "
            "key=None), or (params, state, x, *, key, train, weight)"
        )

    def init(key: jax.Array, x: PyTree) -> tuple[Params, ModelState]:
        params, state = batch_stats.split({stage.name: stage.init(key, x)})
        return params[stage.name], state.get(stage.name, {})

    def apply(
        params: Params, state: ModelState, x: PyTree, *, key: jax.Array | None, train: bool, weight: jax.Array | None
    ) -> tuple[PyTree, ModelState]:
        variables = batch_stats.join({stage.name: params}, {stage.name: state} if state else {})[stage.name]
        return stage.apply(variables, x, key=key), state

    return stage._replace(init=init, apply=apply)


def takes_momentum(stage: Stage) -> bool:
    """Whether the `apply` of a stage takes the keyword `momentum`."""
    return "momentum" in inspect.signature(stage.apply).parameters


def takes_low_rank(stage: Stage) -> bool:
    """Whether a stage's parameters may have `LowRank` in them: its `apply` takes the keyword `contracted`."""
    return "contracted" in inspect.signature(stage.apply).parameters


def _shown(x: Any) -> str:
    """The dtypes and shapes of inputs in words."""
    if hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    leaves = ((path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(x) if hasattr(leaf, "dtype"))
    return ", ".join(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves)


_LIBRARIES = str(Path(jax.__file__).parent.parent)


def _summary(error: Exception, function: Callable[..., Any]) -> str:
    """An exception of a model's code in one line, with the last line of code outside of libraries that it passed.

    Where it passed none, as a part of a stage was not even entered, it is the line that defines the model's `function`.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    model_file = getattr(code, "co_filename", "")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == model_file
        or not (frame.filename.startswith(_LIBRARIES) or Path(frame.filename).parent == Path(__file__).parent)
    ]
    defined = f" ({model_file}:{code.co_firstlineno})" if code else ""
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else defined
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
    """The variables for inputs of one example's `shape`: {stage.name: parameters of the stage}, and its state, if it
    has one, under 'batch_stats' beside them (`batch_stats.split` parts them).

    Each stage draws from its own key, so that two models that differ in one stage share the draws of the others.
    """
    leaves, structure = jax.tree.flatten(batch_of(shape, 1))
    # JAX refuses compiler options within another function that is compiled.
    return (_draw if isinstance(key, jax.core.Tracer) else _drawn)(model, key, (structure, tuple(leaves)))


@switches.guarded("the model")
def _draw(model: Model, key: jax.Array, inputs: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]) -> Params:
    """The variables that `init` returns, for a flattened batch, which is hashable."""
    params: dict[str, Params] = {}
    states: dict[str, Any] = {}
    x = jax.tree.unflatten(*inputs)
    i = 0
    for _, group in itertools.groupby(map(full_form, model), _kind):
        stages = list(group)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
        keys = [jax.random.fold_in(key, i + k) for k in range(len(stages))]
        i += len(stages)
        if len(stages) > 1:
            drawn = unstacked(jax.vmap(stages[0].init, in_axes=(0, None))(jnp.stack(keys), zeros), len(stages))
        else:
            drawn = [stages[0].init(keys[0], zeros)]
        for stage, (params[stage.name], state) in zip(stages, drawn, strict=True):
            states |= {stage.name: state} if jax.tree.leaves(state) else {}
        x, _ = jax.eval_shape(_evaluated(stages[-1]), params[stages[-1].name], state, x)
    variables = batch_stats.join(params, states)
    paths.names(variables)
    return variables


def _kind(stage: Stage) -> Hashable:
    """Equal for neighbours that are alike."""
    return stage.name if stage.alike is None else (stage.alike,)


# It runs once a seed: at this level it compiles in a third of the time, and gives the same bits.
_drawn = partial(jax.jit, static_argnames=("model", "inputs"), compiler_options={"xla_backend_optimization_level": 1})(
    _draw
)


def _evaluated(stage: Stage) -> Callable[..., Any]:
    """(params, state, x) -> (y, state) of a stage in its full form, as in evaluation."""
    return partial(stage.apply, key=None, train=False, weight=None)


def abstract(model: Model, shape: Shape) -> Params:
    """The shapes and dtypes of the variables that `init` draws, without drawing them."""
    return jax.eval_shape(lambda key: init(model, key, shape), jax.random.key(0))


def stateful(model: Model, shape: Shape) -> tuple[str, ...]:
    """The stages that have a state, for inputs of one example's `shape`."""
    leaves, structure = jax.tree.flatten(batch_of(shape, 1))
    return _stateful(model, structure, tuple(leaves))


@lru_cache(maxsize=256)
def _stateful(model: Model, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[str, ...]:
    """The stages that have a state, for a flattened batch of inputs, which is hashable."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key: _draw(model, key, (structure, leaves)), key)
    return tuple(batch_stats.split(variables)[1])


def contracted(model: Model, shape: Shape) -> Mapping[str, int]:
    """{path of a kernel: how many of its first axes the model contracts with its inputs}, for inputs of one example's
    `shape`.

    It names the kernels of the stages that take `LowRank` in their place, and whose contraction does: 0 stands for one
    that stacks several layers' (`flax.linen.scan`), which none of them contracts as it is.

    >>> dict(contracted(build("mlp", 10, hidden=(8,), activation="relu"), (4,)))
    {'hidden_0/kernel': 1, 'head/kernel': 1}
    """
    leaves, structure = jax.tree.flatten(batch_of(shape, 1))
    return _contracted(model, structure, tuple(leaves))


@lru_cache(maxsize=256)
def _contracted(model: Model, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Mapping[str, int]:
    """What `contracted` gives, for a flattened batch of inputs, which is hashable."""
    axes: dict[str, int] = {}

    def draw(key: jax.Array) -> None:
        x = jax.tree.unflatten(structure, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves])
        for _, group in itertools.groupby(map(full_form, model), _kind):
            stage, *others = group
            params, state = stage.init(key, x)
            stage_axes: dict[str, int] = {}
            noted = {"contracted": stage_axes} if takes_low_rank(stage) else {}
            x, _ = stage.apply(params, state, x, key=None, train=False, weight=None, **noted)
            for each in (stage, *others):
                axes.update({f"{each.name}/{path}": count for path, count in stage_axes.items()})

    jax.eval_shape(draw, jax.random.key(0))
    return axes


def apply(
    model: Model,
    params: Params,
    x: PyTree,
    *,
    key: jax.Array | None = None,
    frozen: Sequence[str] = (),
    state: ModelState | None = None,
) -> Any:
    """Outputs of the head, float32 [batch, classes], of inputs with leaves [batch, ...]: the last of `features`."""
    return features(model, params, x, key=key, frozen=frozen, state=state)[-1]


def features(
    model: Model,
    params: Params,
    x: PyTree,
    *,
    key: jax.Array | None = None,
    frozen: Sequence[str] = (),
    state: ModelState | None = None,
) -> list[Any]:
    """The output of each stage, [batch, ...], for inputs with leaves [batch, ...]; a state is used as it is.

    uint8 pixels are divided by 255, before the first stage. A key stands for training; the stages named in `frozen` run
    without it, as in evaluation. The draws of a stage do not depend on whether stages precede it. Without a `state` it
    is among the `params`, if the model has one.
    """
    return run(model, params, {} if state is None else state, x, key=key, frozen=frozen)[0]


@switches.guarded("the model")
def run(
    model: Model,
    params: Params,
    state: ModelState,
    x: PyTree,
    *,
    key: jax.Array | None = None,
    frozen: Sequence[str] = (),
    tracked: Sequence[str] = (),
    weight: jax.Array | None = None,
    axis: str | None = None,
    momentum: float | None = None,
    trained: Params | None = None,
    slots: Slots | None = None,
) -> tuple[list[Any], ModelState]:
    """(the output of each stage as `features` has them, the state after it).

    The stages named in `tracked` normalise by the statistics of the batch, in which an example counts as `weight`
    [batch] says, and their state follows it; with a `momentum` in place of their own. Under an `axis` of devices, each
    of which has a part of the batch, each computes these stages for the whole batch: no statistic is of a part.

    `trained` is a tree of the stages with None for what is frozen: neighbours that are alike are one loop only where
    the same leaves of them train, so that a frozen leaf has no gradient. The stages that `slots` names, which have no
    state, run with what is in their slot, if they have one.
    """
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / 255 if leaf.dtype == jnp.uint8 else leaf, x)
    params, mixed = batch_stats.split(params)
    stages = [*map(full_form, model)]
    merged = {stage.name: low_rank.merged(params[stage.name]) for stage in stages if not takes_low_rank(stage)}
    params = {**params, **merged}
    new_state, outputs = {**state}, []
    part_key = key if key is None or axis is None else jax.random.fold_in(key, jax.lax.axis_index(axis))
    keys: dict[str, jax.Array | None] = {}
    for i, stage in enumerate(model):
        key_of_batch = key if stage.name in tracked and stage.name in state else part_key
        keys[stage.name] = None
        if key_of_batch is not None and stage.name not in frozen:
            keys[stage.name] = jax.random.fold_in(key_of_batch, len(model) - i)

    shared, held = ((), ()) if slots is None else (slots.names, slots.held)

    def kind(stage: Stage) -> Hashable:
        """Equal for neighbours that are one loop."""
        if stage.alike is None or stage.name in state or stage.name in mixed:
            return stage.name
        leaves, structure = jax.tree.flatten(params[stage.name])
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        trains = None if trained is None else jax.tree.structure(trained[stage.name])
        return _kind(stage), keys[stage.name] is None, structure, shapes, trains, stage.name in shared

    for _, group in itertools.groupby(stages, kind):
        stage, *others = group
        if others:
            stage_slots = slots if stage.name in shared else None
            loop_outputs, held = _looped([stage, *others], params, keys, x, weight, stage_slots, held)
            outputs += loop_outputs
            x = outputs[-1]
            continue
        if slots is not None and stage.name in shared:
            which = slots.which[shared.index(stage.name)]
            x, held = applied(stage.apply)(which, params[stage.name], x, keys[stage.name], weight, held)
            outputs.append(x)
            continue
        stage_state = state.get(stage.name, mixed.get(stage.name, {}))
        arguments = {"key": keys[stage.name], "train": False, "weight": weight}
        if stage.name in tracked and stage.name in state:
            apply = stage.apply
            if momentum is not None:
                if not takes_momentum(stage):
                    raise InputError(
                        f"stage '{stage.name}' cannot be reestimated: let its `apply` take `momentum`, under which its "
                        "running averages are those of the batch, or give `batch_stats=tracked`"
                    )
                apply = partial(apply, momentum=momentum)
            apply = apply if axis is None else _on_whole_batch(apply, axis)
            x, new_state[stage.name] = apply(params[stage.name], stage_state, x, **{**arguments, "train": True})
        else:
            x, _ = stage.apply(params[stage.name], stage_state, x, **arguments)
        outputs.append(x)
    return outputs, new_state


def _looped(
    stages: Sequence[Stage],
    params: Params,
    keys: Mapping[str, Any],
    x: PyTree,
    weight: jax.Array | None,
    slots: Slots | None,
    held: tuple[Params, ...],
) -> tuple[list[PyTree], tuple[Params, ...]]:
    """(The output of each of some stages that are alike and have no state, one after another in one loop; `held`, as
    `slotted.applied` has it)."""

    def apply_stage(carry: tuple[PyTree, Any], item: tuple[Params, Any, Any]) -> tuple[tuple[PyTree, Any], PyTree]:
        x, held = carry
        if slots is None:
            y, _ = stages[0].apply(item[0], {}, x, key=item[1], train=False, weight=weight)
        else:
            y, held = applied(stages[0].apply)(item[2], item[0], x, item[1], weight, held)
        if _shown(x) != _shown(y):
            names = f"'{stages[0].name}' to '{stages[-1].name}'"
            raise InputError(
                f"stages {names} are alike, and give {_shown(y)} of {_shown(x)}: let them give what they take, or "
                "leave their `alike` at None"
            )
        return (y, held), y

    which = [None if slots is None else slots.which[slots.names.index(stage.name)] for stage in stages]
    each = [(params[stage.name], keys[stage.name], slot) for stage, slot in zip(stages, which, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    # Without slots `held` is no part of the loop.
    (last, after), outputs = jax.lax.scan(apply_stage, (x, None if slots is None else held), stacked)
    return [*unstacked(outputs, len(stages))[:-1], last], held if after is None else after


def unstacked(tree: PyTree, count: int) -> list[PyTree]:
    """The trees whose leaves are stacked along the first axis."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def unrolled(model: Model) -> Model:
    """The model without loops over stages that are alike: compilers count the FLOPs of a loop's body once.

    >>> unrolled((Stage("block_0", None, None, alike="block"),))[0].alike is None
    True
    """
    return tuple(stage._replace(alike=None) for stage in model)


def _on_whole_batch(apply: Callable[..., Any], axis: str) -> Callable[..., Any]:
    """`apply` for the whole batch, of which each device along the axis has a part and gets its part of the output."""

    def applied(params: Params, state: ModelState, x: PyTree, *, weight: jax.Array, **keywords: Any) -> Any:
        gather = partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        y, new_state = apply(params, state, jax.tree.map(gather, x), weight=gather(weight), **keywords)
        size, start = len(weight), jax.lax.axis_index(axis) * len(weight)
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), y), new_state

    return applied
