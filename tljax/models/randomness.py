"""The random draws of a model in training (dropout, noise), read from the traced program: nothing is computed."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from tljax import batch_stats, models, switches
from tljax.types import Model, ModelState, Params, Stage


def stages(model: Model, shape: models.Shape) -> tuple[str, ...]:
    """The stages whose output depends on their key, for inputs of one example's `shape`.

    >>> from tljax.models.linen import stage
    >>> stages((stage("dense", nn.Dense(3)), stage("drop", nn.Dropout(0.5)), stage("head", nn.Dense(2))), (4,))
    ('drop',)
    """
    return tuple(name for name, draws in _shape_draws(model, shape) if draws.depends)


def faults(model: Model, shape: models.Shape) -> list[str]:
    """A sentence for each layer or stage that does not draw in training as its key says, or does not draw at all.

    Such are: a Flax dropout (or attention that drops) of a rate above 0 that is off in training; a stage that draws by
    its key and whose output does not depend on it; draws in training alone that do not follow from the key, so that
    they are the same at every step.

    >>> from tljax.models.linen import stage
    >>> faults((stage("drop", nn.Dropout(0.5, deterministic=True)), stage("head", nn.Dense(2))), (4,))
    ["'drop' is a dropout of rate 0.5 that never drops"]
    """
    sentences = []
    for name, draws in _shape_draws(model, shape):
        sentences += [
            f"'{'/'.join((name, *path))}' is a dropout of rate {rate:g} that never drops" for path, rate in draws.off
        ]
        if draws.by_key and not draws.depends:
            sentences.append(f"stage '{name}' draws by its key, and its output does not depend on it")
        if draws.fixed:
            sentences.append(f"stage '{name}' draws what does not follow from its key, so the same at every step")
    return sentences


class _Draws(NamedTuple):
    """The draws of one stage in training."""

    depends: bool
    """Whether the stage's output depends on its key."""
    by_key: bool
    """Whether the stage draws by its key at all."""
    fixed: bool
    """Whether the stage draws in training alone, and not by its key."""
    off: tuple[tuple[tuple[str, ...], float], ...]
    """(path of the module, rate) of each dropout that is off."""


def _shape_draws(model: Model, shape: models.Shape) -> tuple[tuple[str, _Draws], ...]:
    """(name, draws) of each stage, for inputs of one example's `shape`."""
    leaves, structure = jax.tree.flatten(models.batch_of(shape, 2))
    return _draws_by_stage(model, structure, tuple(leaves))


@functools.lru_cache(maxsize=64)
@switches.guarded("the model")
def _draws_by_stage(
    model: Model, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[tuple[str, _Draws], ...]:
    """(name, draws) of each stage, for a flattened batch of inputs, which is hashable."""
    x: Any = jax.tree.unflatten(structure, leaves)
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), x)
    params, state = batch_stats.split(models.abstract(model, example))
    draws = []
    for stage in map(models.full_form, model):
        variables = params[stage.name], state.get(stage.name, {})
        draws.append((stage.name, _stage_draws(stage, variables, x)))
        x, _ = jax.eval_shape(lambda variables, x, stage=stage: _run(stage, None, variables, x), variables, x)
    return tuple(draws)


def _run(stage: Stage, key: jax.Array | None, variables: tuple[Params, ModelState], x: Any) -> Any:
    """(y, state) of a stage in its full form, whose state stays as it is."""
    return stage.apply(*variables, x, key=key, train=False, weight=None)


def _stage_draws(stage: Stage, variables: tuple[Params, ModelState], x: Any) -> _Draws:
    """The draws of one stage in its full form, for its inputs `x`."""
    off: dict[tuple[str, ...], float] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention) and context.method_name == "__call__":
            rate = module.rate if isinstance(module, nn.Dropout) else module.dropout_rate
            argument = kwargs.get("deterministic", args[1] if isinstance(module, nn.Dropout) and args[1:] else None)
            if rate > 0 and (module.deterministic if argument is None else argument):
                off[tuple(module.path)] = rate
        return call(*args, **kwargs)

    key = jax.eval_shape(lambda: jax.random.key(0))
    with nn.intercept_methods(watch):
        training = jax.make_jaxpr(lambda key, variables, x: _run(stage, key, variables, x)[0])(key, variables, x).jaxpr
    evaluation = jax.make_jaxpr(lambda variables, x: _run(stage, None, variables, x)[0])(variables, x).jaxpr
    flow = _flow(training, [True] + [False] * (len(training.invars) - 1))
    evaluation_flow = _flow(evaluation, [False] * len(evaluation.invars))
    return _Draws(any(flow.outputs), flow.by_key > 0, flow.fixed > evaluation_flow.fixed, tuple(off.items()))


class _Flow(NamedTuple):
    """How values that follow from a key go through a traced function."""

    outputs: tuple[bool, ...]
    """Whether each output follows from the key."""
    by_key: int
    """How many draws follow from the key."""
    fixed: int
    """How many draws do not follow from the key."""


_DRAW_PRIMITIVES = ("random_bits", "threefry2x32", "rng_bit_generator")
_LOOP_PRIMITIVES = ("scan", "while", "cond")


def _flow(jaxpr: Any, marked: list[bool]) -> _Flow:
    """The flow through a traced function whose inputs follow from the key where they are marked.

    Functions within it are followed too. All outputs of a loop count as following from the key if one of its inputs
    does.
    """
    follows = {var for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}
    by_key = fixed = 0
    for eqn in jaxpr.eqns:
        inputs = [not _literal(var) and var in follows for var in eqn.invars]
        outputs: Any = [any(inputs)] * len(eqn.outvars)
        if eqn.primitive.name in _DRAW_PRIMITIVES:
            by_key, fixed = by_key + any(inputs), fixed + (not any(inputs))
        for function in _functions(eqn):
            alike = eqn.primitive.name not in _LOOP_PRIMITIVES and len(function.invars) == len(inputs)
            flow = _flow(function, inputs if alike else [any(inputs)] * len(function.invars))
            by_key, fixed = by_key + flow.by_key, fixed + flow.fixed
            outputs = flow.outputs if alike and len(flow.outputs) == len(outputs) else outputs
        follows |= {var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark}
    return _Flow(tuple(not _literal(var) and var in follows for var in jaxpr.outvars), by_key, fixed)


def _literal(var: Any) -> bool:
    """Whether an input or output of a traced operation is a constant."""
    return hasattr(var, "val")


def _functions(eqn: Any) -> Iterator[Any]:
    """The traced functions that an operation calls."""
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)
