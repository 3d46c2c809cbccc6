"""Flax Linen modules as stages."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax import convolution, low_rank
from tljax.low_rank import LowRank
from tljax.types import InputError, Params, PyTree, Stage

IN_TRAINING = {"train": True, "training": True, "is_training": True, "is_train": True, "deterministic": False}
"""{argument or field that tells a module whether it trains: its value in training}; in evaluation the opposite."""
AVERAGES = "use_running_average"
"""The argument or field that is true where running statistics are used as they are."""


def stage(
    name: str,
    module: nn.Module,
    *,
    before: Callable[[jax.Array], jax.Array] | None = None,
    after: Callable[[jax.Array], jax.Array] | None = None,
    rngs: Sequence[str] = (),
) -> Stage:
    """A Linen module of one input as a stage; `before` and `after` have no parameters (flatten, activation).

    With a key the module trains, without one it is evaluated. The arguments of its `__call__` and the fields that say
    so are `train`, `training`, `is_training`, `is_train` and `deterministic`; each that it has is set. A field that is
    set by hand to the value of evaluation, other than its default, stays. What the module hands on to its submodules is
    its author's affair (`experiments.check` says which dropout never fires), but for this: Flax's dropout and
    attention drop nothing in evaluation, and drop in training where nobody says.

    The collection 'batch_stats' is the stage's state. With `train` Flax's batch norms normalise by the statistics of
    the batch and update their running averages, without it they use them, whatever anybody says; `use_running_average`
    is set likewise wherever the module takes it. Examples of weight 0 do not count. With `momentum` batch norms take it
    in place of their own. What a spectral norm keeps there stays as it is.

    Parameters may have `LowRank` in place of a kernel. Flax's `Dense`, `DenseGeneral` (so its attention) and `Conv`
    contract with it as it is, xW + (xA)B, wherever in the module they are; to whatever else it is a merged kernel.

    The key is the module's 'dropout' key. Keys under other names, for `make_rng`, follow from it; name in `rngs` those
    that the module looks for by `has_rng`. `init` raises InputError for any other collection, and `apply` for a module
    that changes its state without `train`, draws without a key, or has a batch norm of rows that are not the batch's.

    >>> dense = stage("head", nn.Dense(2))
    >>> jax.tree.map(jax.numpy.shape, dense.init(jax.random.key(0), jax.numpy.zeros((1, 3))))
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    >>> drop = stage("drop", nn.Dropout(0.5))
    >>> x = jax.numpy.ones((1, 1000))
    >>> (calm, _), (noisy, _) = drop.apply({}, {}, x), drop.apply({}, {}, x, key=jax.random.key(0))
    >>> calm.sum().item(), 900 < noisy.sum().item() < 1100
    (1000.0, True)
    """

    def run(method: str, variables: Any, x: jax.Array, mode: _Mode, set_mode: bool = True) -> Any:
        key = mode.key
        configured, flags = _in_mode(module, mode) if set_mode else (module, {})
        inputs = before(x) if before else x
        # Flax takes the key 'params' for names that have no key.
        key_names = ("dropout", *rngs, "params")
        keys = None if key is None else _keys(key, key_names[:-1])
        with nn.intercept_methods(_interceptor(name, mode)):
            if set_mode and _takes_any(configured):
                all_keys = None if key is None else _keys(key, key_names)
                flags |= _accepted(configured, method, variables, inputs, flags, all_keys, mode)
            args, kwargs = _arguments(configured, inputs, flags)
            mutable: Any = {"mutable": [_STATISTICS]} if mode.train else {}
            try:
                if method == "init":
                    return configured.init(variables, *args, **kwargs)
                return configured.apply(variables, *args, **kwargs, rngs=keys, **mutable)
            except jax.errors.TracerBoolConversionError:
                if not flags:
                    raise
                # Within nn.remat or nn.jit without static_argnums no mode can be set; `randomness.faults` says so.
                return run(method, variables, x, mode, set_mode=False)
            except flax.errors.InvalidRngError as error:
                if key is None:
                    raise InputError(
                        f"stage '{name}' draws in evaluation ({_first(error)}): let it draw only in training, "
                        "as an argument such as `train` says"
                    ) from error
                return configured.apply(variables, *args, **kwargs, rngs=_keys(key, key_names), **mutable)

    def init(key: jax.Array, x: jax.Array) -> tuple[Params, PyTree]:
        variables = dict(run("init", key, x, _Mode()))
        params = dict(variables.pop("params", {}))
        state = dict(variables.pop(_STATISTICS, {}))
        if variables:
            raise InputError(
                f"stage '{name}' has the collections {sorted(variables)}: stages keep none but batch_stats"
            )
        return params, state

    def apply(
        params: Params,
        state: PyTree,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        train: bool = False,
        weight: jax.Array | None = None,
        momentum: float | None = None,
        contracted: dict[str, int] | None = None,
    ) -> tuple[jax.Array, PyTree]:
        plain, changes = low_rank.without(params)
        contracted = {} if changes and contracted is None else contracted
        shapes = dict(_shapes(plain)) if contracted is not None else {}
        mode = _Mode(key, train, weight, momentum, [], contracted, shapes, frozenset(changes))
        variables = {"params": plain, _STATISTICS: state}
        try:
            y = run("apply", {**variables, **_beside(changes)}, x, mode)
            if left := {path: change for path, change in changes.items() if not (contracted or {}).get(path)}:
                variables["params"] = low_rank.placed(plain, {path: node.merged() for path, node in left.items()})
                rest = {path: change for path, change in changes.items() if path not in left}
                y = run("apply", {**variables, **_beside(rest)}, x, mode)
        except flax.errors.ModifyScopeVariableError as error:
            raise InputError(
                f"stage '{name}' changes its state ({_first(error)}) where it is not to: let it do so only where its "
                "argument `use_running_average` is False"
            ) from error
        if train:
            y, variables = y
            if momentum is not None:
                _require_momentum(name, state, mode.norms)
            state = dict(variables.get(_STATISTICS, state))
        return (after(y) if after else y), state

    return Stage(name, init, apply)


class _Mode(NamedTuple):
    """How a module is called."""

    key: jax.Array | None = None
    """Of dropout: with one the module trains."""
    train: bool = False
    """Whether its batch norms normalise by the batch, and their averages follow it."""
    weight: jax.Array | None = None
    """float32 [batch]: examples of weight 0 do not count."""
    momentum: float | None = None
    """What batch norms take in place of their own."""
    norms: list[tuple[str, ...]] | None = None
    """Filled with the paths of the modules whose state is as `momentum` says."""
    contracted: dict[str, int] | None = None
    """Filled with {path of a kernel: how many of its first axes are contracted}: 0 of one that stacks layers'."""
    shapes: Mapping[str, tuple[int, ...]] = {}
    """{path: shape} of the parameters, if `contracted` is to be filled."""
    changed: frozenset[str] = frozenset()
    """The paths of the kernels that have a change."""


def _require_momentum(name: str, state: PyTree, norms: Sequence[tuple[str, ...]] | None) -> None:
    """Raise InputError if a state has a leaf outside the modules at the paths `norms`."""
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        keys = tuple(key.key for key in path)
        if not any(keys[: len(norm)] == norm for norm in norms or ()):
            raise InputError(
                f"stage '{name}' cannot be reestimated: '{'/'.join(keys)}' of its state is of no flax.linen.BatchNorm: "
                "give `batch_stats=tracked`"
            )


def linear_head(classes: int, dtype: Any = None) -> nn.Dense:
    """A linear layer whose products are of `dtype` and are summed in float32, in which its outputs are."""
    if dtype is None:
        return nn.Dense(classes)
    return nn.Dense(
        classes, dtype=dtype, dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    )


PIXELS = {
    "unit": ((0.0,), (1.0,)),
    "signed": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""{pixels: (what is subtracted from channels of 0 to 1, what they are divided by then)}: what a network learnt on."""


def images(model: str, x: jax.Array, pixels: str = "unit") -> jax.Array:
    """Images [batch, height, width, channels] of 0 to 1, as `PIXELS` says that a network learnt them.

    `model` is its name in errors. Raises InputError if the inputs are not images, or have other channels than that.

    >>> images("resnet", jnp.full((1, 2, 2, 1), 0.75), "signed").ravel().tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    if getattr(x, "ndim", None) != 4:
        shape = f"shape {x.shape[1:]}" if hasattr(x, "shape") else "several inputs"
        raise InputError(f"{model}: an example has {shape}: it takes images [height, width, channels]")
    if pixels == "unit":
        return x
    if len(PIXELS[pixels][0]) not in (1, x.shape[-1]):
        raise InputError(
            f"{model}:pixels={pixels}: it is of 3 channels, and images have {x.shape[-1]}: give pixels=signed, say"
        )
    mean, deviation = (jnp.array(numbers, x.dtype).reshape(1, 1, 1, -1) for numbers in PIXELS[pixels])
    return (x - mean) / deviation


def flat(x: jax.Array) -> jax.Array:
    """[batch, ...] -> [batch, features]."""
    return x.reshape(x.shape[0], -1)


def max_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: str | Sequence[tuple[int, int]] = "SAME"
) -> jax.Array:
    """The largest of each window of images [batch, height, width, channels], as `flax.linen.max_pool` takes them.

    On a CPU it is that function. Elsewhere it is a comparison of strided slices: the same numbers, and a gradient that
    goes to the first of equal numbers in a window as there, but adds in an order that is always the same. The gradient
    of `flax.linen.max_pool` is a scatter on a GPU, whose deterministic form goes one number after another.
    """
    if jax.default_backend() == "cpu":
        return nn.max_pool(x, window, strides=strides, padding=padding)
    return _largest_of_slices(x, window, strides, padding)


def _largest_of_slices(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: str | Sequence[tuple[int, int]]
) -> jax.Array:
    """`max_pool` of slices: one for each place in a window, where a later one wins only if it is larger, or is NaN."""
    pads = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding) if isinstance(padding, str) else padding
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    counts = [(size - length) // step + 1 for size, length, step in zip(x.shape[1:3], window, strides, strict=True)]
    largest = None
    for place in itertools.product(*map(range, window)):
        ends = [first + (count - 1) * step + 1 for first, count, step in zip(place, counts, strides, strict=True)]
        part = jax.lax.slice(x, (0, *place, 0), (len(x), *ends, x.shape[3]), (1, *strides, 1))
        largest = part if largest is None else jnp.where((largest >= part) | jnp.isnan(largest), largest, part)
    assert largest is not None
    return largest


_STATISTICS = "batch_stats"
_CHANGES = "low_rank"
"""The collection in which what belongs to a `LowRank` beside its kernel goes to a module, through remat and other
transformations of Flax."""


def _beside(changes: Mapping[str, LowRank]) -> dict[str, Any]:
    """The collection of changes of kernels, {} without any."""
    collection: dict[str, Any] = {}
    for path, change in changes.items():
        place = collection
        for name in path.split("/")[:-1]:
            place = place.setdefault(name, {})
        place.update(a=change.a, b=change.b, **({} if change.gain is None else {"gain": change.gain}))
    return {_CHANGES: collection} if changes else {}


def _shapes(params: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(path, shape) of each leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), jnp.shape(leaf)


def _keys(key: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """A key for each name: 'dropout' has the key itself, others have one that follows from it and their name."""
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1) for name in names if name != "dropout"}
    return keys | ({"dropout": key} if "dropout" in names else {})


def _first(error: Exception) -> str:
    """The message of one of Flax's errors, without its link to a page."""
    return str(error).split("(https://")[0].strip()


def _in_mode(module: nn.Module, called: _Mode) -> tuple[nn.Module, dict[str, bool]]:
    """(the module with its fields set, the keywords of its call) for training or for evaluation."""
    train = called.key is not None
    parameters = _keywords(module)
    fields = {field.name: field for field in dataclasses.fields(module)}
    new_fields: dict[str, Any] = {}
    flags: dict[str, bool] = {}
    for name, mode in _modes(called).items():
        value = getattr(module, name) if name in fields else None
        if name in parameters and value is None:
            flags[name] = mode
        elif name in fields and isinstance(value, bool | None):
            by_hand = value is not None and value is not fields[name].default
            if not (train and by_hand and value is _modes(_Mode())[name]):
                new_fields[name] = mode
    return (module.clone(**new_fields) if new_fields else module), flags


def _modes(mode: _Mode) -> dict[str, bool]:
    """{argument or field: its value} in training or in evaluation."""
    train = mode.key is not None
    return {**{name: value is train for name, value in IN_TRAINING.items()}, AVERAGES: not mode.train}


def _keywords(module: nn.Module) -> tuple[str, ...]:
    """The parameters of the module's call after its input."""
    _, *rest = inspect.signature(module.__call__).parameters.values()
    return tuple(p.name for p in rest if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _arguments(module: nn.Module, x: jax.Array, flags: Mapping[str, bool]) -> tuple[list[Any], dict[str, Any]]:
    """(positional arguments, keywords) of a call: positional where that is possible, as `static_argnums` needs it."""
    args, kwargs = [x], dict(flags)
    waiting: list[Any] = []
    _, *rest = inspect.signature(module.__call__).parameters.values()
    for p in rest:
        if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) or (
            p.name not in kwargs and p.default is p.empty
        ):
            break
        waiting.append(kwargs.get(p.name, p.default))
        if p.name in kwargs:
            args, waiting = [*args, *waiting], []
            del kwargs[p.name]
    return args, kwargs


def _takes_any(module: nn.Module) -> bool:
    """Whether a module's call takes any keyword."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.__call__).parameters.values())


def _accepted(
    module: nn.Module, method: str, variables: Any, x: jax.Array, flags: Mapping[str, bool], keys: Any, mode: _Mode
) -> dict[str, bool]:
    """The keywords of `_modes` that a module of any keyword takes: each is tried, since its signature does not say."""
    accepted = {}
    for name, value in _modes(mode).items():
        if name in flags or hasattr(module, name):
            continue

        def attempt(variables: Any, x: jax.Array, keys: Any, keywords: Mapping[str, Any]) -> Any:
            if method == "init":
                return module.init(variables, x, **keywords)
            return module.apply(variables, x, **keywords, rngs=keys, mutable=[_STATISTICS])

        with contextlib.suppress(Exception):  # a module that raises anything does not take the name
            jax.eval_shape(functools.partial(attempt, keywords={**flags, name: value}), variables, x, keys)
            accepted[name] = value
    return accepted


def _interceptor(name: str, mode: _Mode) -> Callable[..., Any]:
    """An interceptor that sets the mode of Flax's own norms, dropout and attention wherever they are in stage `name`'s
    module."""
    train = mode.key is not None

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, nn.BatchNorm):
            args, kwargs, _ = _without(AVERAGES, call, args, kwargs)
            momentum = module.momentum if mode.momentum is None else mode.momentum
            with _field(module, AVERAGES, not mode.train), _field(module, "momentum", momentum):
                if not mode.train:
                    return call(*args, **kwargs)
                if mode.norms is not None:
                    mode.norms.append(tuple(module.path))
                return call(*args, **{**kwargs, "mask": counted(name, mode.weight, args[0], kwargs.get("mask"))})
        if field := _contraction(module):
            with _field(module, field, _contract(module, field, mode)):
                return call(*args, **kwargs)
        if isinstance(module, nn.SpectralNorm):
            if mode.norms is not None:
                mode.norms.append(tuple(module.path))
            return call(*args, **{**kwargs, "update_stats": False})
        if isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention):
            args, kwargs, argument = _without("deterministic", call, args, kwargs)
            deterministic = module.deterministic if argument is None else argument
            with _field(module, "deterministic", not train or bool(deterministic)):
                return call(*args, **kwargs)
        return call(*args, **kwargs)

    return interceptor


def _contraction(module: nn.Module) -> str | None:
    """The field with the function that contracts a module's inputs with its kernel, if it is one of Flax's that have
    such a field, and contract with the kernel as it is."""
    if type(module) in (nn.Dense, nn.DenseGeneral) and module.dot_general_cls is None:
        return "dot_general"
    if type(module) is nn.Conv and module.conv_general_dilated_cls is None and module.mask is None:
        return "conv_general_dilated"
    return None


def _contract(module: nn.Module, field: str, mode: _Mode) -> Any:
    """What contracts a module's inputs with its kernel: what its `field` holds, or of convolutions ours."""
    function = getattr(module, field) or (convolution.conv_general_dilated if isinstance(module, nn.Conv) else None)
    return function if mode.contracted is None else _with_change(module, function or jax.lax.dot_general, mode)


def _with_change(module: nn.Module, function: Any, mode: _Mode) -> Any:
    """`function` on a module's kernel, and on the change of it if there is one; it notes what it contracts."""
    path, convolves = "/".join((*module.path, "kernel")), isinstance(module, nn.Conv)

    def contraction(lhs: jax.Array, kernel: jax.Array, how: Any, *args: Any, **keywords: Any) -> jax.Array:
        """`how` is the strides of a convolution, and the dimension numbers of a product."""
        assert mode.contracted is not None
        axes = tuple(range(kernel.ndim - 1)) if convolves else tuple(how[0][1])
        known = path in mode.shapes and axes == tuple(range(len(axes))) and (convolves or not how[1][1])
        present = known and module.has_variable(_CHANGES, "a")
        if known:
            # No change comes to a module whose transformation hands on no other collections than it names.
            whole = mode.shapes[path] == kernel.shape and present == (path in mode.changed)
            mode.contracted[path] = min(mode.contracted.get(path, len(axes)), len(axes) if whole else 0)
        if not present:
            return function(lhs, kernel, how, *args, **keywords)
        a: jax.Array = module.get_variable(_CHANGES, "a")
        b: jax.Array = module.get_variable(_CHANGES, "b")
        gain: jax.Array | None = module.get_variable(_CHANGES, "gain")
        changed = low_rank.conv_general_dilated if convolves else low_rank.dot_general
        return changed(function, a, b, gain)(lhs, kernel, how, *args, **keywords)

    return contraction


def counted(name: str, weight: jax.Array | None, x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Which elements of a batch norm's input count in its statistics: those of a mask that are of examples with weight.

    Raises InputError for an input whose rows are not those of the batch.
    """
    if weight is None:
        return mask
    if x.shape[:1] != weight.shape:
        raise InputError(
            f"stage '{name}': a batch norm sees {list(x.shape)} of a batch of {len(weight)}, so which of it is padding "
            "is not known: let its first axis be that of the batch, or give `batch_stats=frozen`"
        )
    counts = (weight > 0).reshape(-1, *(1,) * (x.ndim - 1))
    return counts if mask is None else counts & mask


def _without(name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """(positional arguments, keywords, value) of a call in which the argument `name`, of this value, becomes None."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    value = bound.arguments.get(name)
    if name in bound.arguments:
        bound.arguments[name] = None
    return bound.args, bound.kwargs, value


@contextlib.contextmanager
def _field(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set a field of a module for one call. Modules are frozen, but Flax calls copies of them."""
    old = getattr(module, name)
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__setattr__(module, name, old)
