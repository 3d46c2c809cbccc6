"""What a model draws in training (dropout, noise), read off what JAX traces: nothing is computed."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tljax import models, switches
from tljax.types import Model, Params, Stage


def stages(model: Model, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The stages whose output depends on their key, for inputs of one example's `shape`.

    >>> from tljax.models.linen import stage
    >>> stages((stage("one", nn.Dense(3)), stage("drop", nn.Dropout(0.5)), stage("head", nn.Dense(2))), (4,))
    ('drop',)
    """
    return tuple(name for name, seen in _seen(model, shape) if seen.depends)


def faults(model: Model, shape: tuple[int, ...]) -> list[str]:
    """What draws in training, or would, and does not as its key says; a sentence each.

    A Flax dropout (or attention that drops) of a rate above 0 that is off in training; a stage that draws by its key
    and whose output does not depend on it; draws in training alone that do not follow from the key, so that they are
    the same at every step.

    >>> from tljax.models.linen import stage
    >>> faults((stage("drop", nn.Dropout(0.5, deterministic=True)), stage("head", nn.Dense(2))), (4,))
    ["'drop' is a dropout of rate 0.5 that never drops"]
    """
    sentences = []
    for name, seen in _seen(model, shape):
        sentences += [
            f"'{'/'.join((name, *path))}' is a dropout of rate {rate:g} that never drops" for path, rate in seen.off
        ]
        if seen.drawn and not seen.depends:
            sentences.append(f"stage '{name}' draws by its key, and its output does not depend on it")
        if seen.fixed:
            sentences.append(f"stage '{name}' draws what does not follow from its key, so the same at every step")
    return sentences


class _Seen(NamedTuple):
    """Of one stage in training."""

    depends: bool
    """Whether its output depends on its key."""
    drawn: bool
    """Whether it draws by its key at all."""
    fixed: bool
    """Whether it draws in training alone, and not by the key."""
    off: tuple[tuple[tuple[str, ...], float], ...]
    """(path of the module, rate) of each dropout that is off."""


@functools.lru_cache(maxsize=64)
@switches.guarded("the model")
def _seen(model: Model, shape: tuple[int, ...]) -> tuple[tuple[str, _Seen], ...]:
    params = models.abstract(model, shape)
    x: Any = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    results = []
    for stage in model:
        results.append((stage.name, _stage(stage, params[stage.name], x)))
        x = jax.eval_shape(stage.apply, params[stage.name], x)
    return tuple(results)


def _stage(stage: Stage, params: Params, x: Any) -> _Seen:
    off: dict[tuple[str, ...], float] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention) and context.method_name == "__call__":
            rate = module.rate if isinstance(module, nn.Dropout) else module.dropout_rate
            deterministic = kwargs.get(
                "deterministic", args[1] if isinstance(module, nn.Dropout) and args[1:] else None
            )
            if rate > 0 and (module.deterministic if deterministic is None else deterministic):
                off[tuple(module.path)] = rate
        return call(*args, **kwargs)

    key = jax.eval_shape(lambda: jax.random.key(0))
    with nn.intercept_methods(watch):
        trains = jax.make_jaxpr(lambda key, params, x: stage.apply(params, x, key=key))(key, params, x).jaxpr
    evaluated = jax.make_jaxpr(lambda params, x: stage.apply(params, x))(params, x).jaxpr
    flow = _flow(trains, [True] + [False] * (len(trains.invars) - 1))
    calm = _flow(evaluated, [False] * len(evaluated.invars))
    return _Seen(any(flow.outputs), flow.drawn > 0, flow.fixed > calm.fixed, tuple(off.items()))


class _Flow(NamedTuple):
    """Of values that follow from a key, through a traced function."""

    outputs: tuple[bool, ...]
    drawn: int
    """How many draws follow from it,"""
    fixed: int
    """and how many do not."""


_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator")
_LOOPS = ("scan", "while", "cond")


def _flow(jaxpr: Any, marked: list[bool]) -> _Flow:
    """A function within it is followed too; a loop that is given the key counts as if all it gives followed from it."""
    follows = {var for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}
    drawn = fixed = 0
    for eqn in jaxpr.eqns:
        marks = [not _literal(var) and var in follows for var in eqn.invars]
        outputs: Any = [any(marks)] * len(eqn.outvars)
        if eqn.primitive.name in _DRAWS:
            drawn, fixed = drawn + any(marks), fixed + (not any(marks))
        for part in _within(eqn):
            alike = eqn.primitive.name not in _LOOPS and len(part.invars) == len(marks)
            flow = _flow(part, marks if alike else [any(marks)] * len(part.invars))
            drawn, fixed = drawn + flow.drawn, fixed + flow.fixed
            outputs = flow.outputs if alike and len(flow.outputs) == len(outputs) else outputs
        follows |= {var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark}
    return _Flow(tuple(not _literal(var) and var in follows for var in jaxpr.outvars), drawn, fixed)


def _literal(var: Any) -> bool:
    return hasattr(var, "val")


def _within(eqn: Any) -> Iterator[Any]:
    """The functions that an operation calls."""
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)
