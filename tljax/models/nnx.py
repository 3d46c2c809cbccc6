"""Flax NNX modules as stages."""

import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tljax import convolution
from tljax.models.linen import AVERAGES, IN_TRAINING, counted
from tljax.types import InputError, Params, PyTree, Stage


def stage(
    name: str,
    module: nnx.Module | Callable[..., nnx.Module],
    *,
    before: Callable[[jax.Array], jax.Array] | None = None,
    after: Callable[[jax.Array], jax.Array] | None = None,
) -> Stage:
    """An NNX module of one input as a stage; `before` and `after` have no parameters (flatten, activation).

    `module` is what makes one, called with `rngs` if it takes them, so that each key draws its own parameters; a module
    that is made already has its parameters whatever the key. Its structure is taken without drawing anything.

    Every `nnx.Param` is a parameter, under its path without '/value', every `nnx.BatchStat` the state. With a key the
    module trains, without one it is evaluated: `train`, `training`, `is_training`, `is_train` and `deterministic` of
    its call are set, and dropout and attention drop nothing in evaluation; in training those drop that are not
    deterministic by hand. Batch norms normalise by the batch, and update their running averages, with `train` alone,
    whatever anybody says; examples of weight 0 do not count. With `momentum` they take it in place of their own.

    The streams of random numbers follow from the key, each by its place. Raises InputError, when it is first drawn, for
    variables of other kinds; `apply` for a module that draws without a key, or has a batch norm of rows that are not
    the batch's.

    >>> dense = stage("head", lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> jax.tree.map(jax.numpy.shape, dense.init(jax.random.key(0), jax.numpy.zeros((1, 3))))
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    >>> drop = stage("drop", lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    >>> x = jax.numpy.ones((1, 1000))
    >>> (calm, _), (noisy, _) = drop.apply({}, {}, x), drop.apply({}, {}, x, key=jax.random.key(0))
    >>> calm.sum().item(), 900 < noisy.sum().item() < 1100
    (1000.0, True)
    """

    @functools.cache
    def structure() -> tuple[Any, tuple[tuple[tuple[Any, ...], Any], ...]]:
        """(graph of the module, the path and the variable of each leaf, abstract)."""
        graph, variables = nnx.split(nnx.eval_shape(lambda: _instance(module, jax.random.key(0))))
        leaves = tuple(nnx.to_flat_state(variables))
        for path, variable in leaves:
            if not isinstance(variable, nnx.Param | nnx.BatchStat | nnx.RngState):
                raise InputError(
                    f"stage '{name}' has a variable of kind {type(variable).__name__}, '{'/'.join(map(str, path))}': "
                    "stages keep nnx.Param and nnx.BatchStat alone"
                )
        return graph, leaves

    def init(key: jax.Array, x: jax.Array) -> tuple[Params, PyTree]:
        structure()
        drawn = _instance(module, key)
        return _values(nnx.state(drawn, nnx.Param)), _values(nnx.state(drawn, nnx.BatchStat))

    def apply(
        params: Params,
        state: PyTree,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        train: bool = False,
        weight: jax.Array | None = None,
        momentum: float | None = None,
    ) -> tuple[jax.Array, PyTree]:
        graph, leaves = structure()
        values = {**dict(_leaves(params)), **dict(_leaves(state))}
        variables = [(path, variable.replace(_value(path, variable, values, key))) for path, variable in leaves]
        called = nnx.merge(graph, nnx.from_flat_state(variables))
        norms = [
            _set_mode(name, part, key is not None, train, weight, momentum) for _, part in nnx.iter_modules(called)
        ]
        counts = [count for path, count in _leaves(_values(nnx.state(called, nnx.RngCount)))]
        y = called(before(x) if before else x, **_flags(called, key is not None, train))
        after_counts = [count for path, count in _leaves(_values(nnx.state(called, nnx.RngCount)))]
        if key is None and any(old is not new for old, new in zip(counts, after_counts, strict=True)):
            raise InputError(f"stage '{name}' draws in evaluation: let it draw only in training")
        if train:
            if momentum is not None and len(jax.tree.leaves(state)) != 2 * sum(norms):
                raise InputError(
                    f"stage '{name}' cannot be reestimated: it has an nnx.BatchStat that is of no nnx.BatchNorm: give "
                    "`batch_stats=tracked`"
                )
            state = _values(nnx.state(called, nnx.BatchStat))
        return (after(y) if after else y), state

    return Stage(name, init, apply)


def _instance(module: nnx.Module | Callable[..., nnx.Module], key: jax.Array) -> nnx.Module:
    """A copy of the module, or what its constructor makes with streams of random numbers from the key."""
    if isinstance(module, nnx.Module):
        return nnx.clone(module)
    # The signature of a class is that of its metaclass, (*args, **kwargs).
    function = vars(module).get("__init__", module) if isinstance(module, type) else module
    takes_rngs = "rngs" in inspect.signature(function).parameters
    instance = module(rngs=nnx.Rngs(key)) if takes_rngs else module()
    if not isinstance(instance, nnx.Module):
        raise InputError(f"a stage is of an nnx.Module, not of {type(instance).__name__}: give one, or what makes one")
    return instance


def _values(state: Any) -> Params:
    """The values of variables as a tree of dicts, whose keys are words."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        *above, last = map(str, path)
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = variable.get_value()
    return tree


def _leaves(tree: Params, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of each leaf of a tree of dicts."""
    for name, part in tree.items():
        if isinstance(part, Mapping):
            yield from _leaves(part, (*above, name))
        else:
            yield (*above, name), part


def _value(path: tuple[Any, ...], variable: Any, values: Mapping[tuple[str, ...], Any], key: jax.Array | None) -> Any:
    """The value of a variable: that of a parameter or of the state, or a stream's, which follows from the key."""
    if isinstance(variable, nnx.RngKey):
        stream_key = jax.random.key(0) if key is None else key
        return jax.random.fold_in(stream_key, zlib.crc32("/".join(map(str, path)).encode()) >> 1)
    if isinstance(variable, nnx.RngState):
        return jnp.zeros(variable.shape, variable.dtype)
    return values[tuple(map(str, path))]


def _set_mode(
    name: str, part: Any, trains: bool, tracks: bool, weight: jax.Array | None, momentum: float | None
) -> bool:
    """Set the mode of one of Flax's own modules, that of stage `name`; whether it is a batch norm.

    A convolution is given ours, whose gradients are quick on a CPU, unless it has one by hand.

    The module is given a class of its own: what is handed to its call would take precedence over its attributes.
    """
    kind = type(part)
    if kind is nnx.Conv and part.conv_general_dilated is jax.lax.conv_general_dilated:
        part.conv_general_dilated = convolution.conv_general_dilated
    if isinstance(part, nnx.BatchNorm):
        part.momentum = part.momentum if momentum is None else momentum

        def normalise(self: Any, x: jax.Array, use_running_average: Any = None, *, mask: Any = None) -> jax.Array:
            mask = counted(name, weight, x, mask) if tracks else mask
            return kind.__call__(self, x, use_running_average=not tracks, mask=mask)

        part.__class__ = type(kind.__name__, (kind,), {"__call__": normalise})
        return True
    if isinstance(part, nnx.Dropout | nnx.MultiHeadAttention):

        def drop(self: Any, *args: Any, deterministic: bool | None = None, **kwargs: Any) -> jax.Array:
            by_hand = self.deterministic if deterministic is None else deterministic
            return kind.__call__(self, *args, deterministic=not trains or bool(by_hand), **kwargs)

        part.__class__ = type(kind.__name__, (kind,), {"__call__": drop})
    return False


def _flags(module: nnx.Module, trains: bool, tracks: bool) -> dict[str, bool]:
    """The keywords of the module's call that say whether it trains."""
    taken = inspect.signature(type(module).__call__).parameters
    modes = {**{name: value is trains for name, value in IN_TRAINING.items()}, AVERAGES: not tracks}
    return {name: value for name, value in modes.items() if name in taken and not isinstance(module, _SET)}


_SET = (nnx.BatchNorm, nnx.Dropout, nnx.MultiHeadAttention)
"""The modules whose mode is set by their class."""
