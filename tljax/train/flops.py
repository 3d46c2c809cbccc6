"""FLOPs, counted and not measured.

`count` reads them off the traced program: compilers say 0 on a GPU, and count the body of a loop once. The count is the
same on every device but for a model with `linen.max_pool`, which is another program on a CPU than elsewhere. What is
told of a step is XLA's count where it has one, which is within 1 % of it for an MLP.
"""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import optax
from jax.interpreters import partial_eval

from tljax import batch_stats, masks, models
from tljax import objective as objectives
from tljax.train.memory import inner_programs
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
        prefix = functools.partial(models.apply, model[:skipped])
        inputs = jax.eval_shape(prefix, batch_stats.join(params, state or {}), inputs)

    def outputs(trained: Params, frozen: Params, state: ModelState, x: jax.Array) -> jax.Array:
        whole = masks.join(trained, frozen)
        return models.apply(model[skipped:], merge(whole) if merge else whole, x, state=state)

    batch_loss, targets = _loss(objective, batch, lambda: jax.eval_shape(outputs, trained, frozen, state or {}, inputs))

    def loss(trained: Params, frozen: Params, state: ModelState, x: jax.Array, y: jax.Array) -> jax.Array:
        return batch_loss(outputs(trained, frozen, state, x), y).mean()

    gradient, arguments = jax.grad(loss), (trained, frozen, state or {}, inputs, targets)
    counted = float((jax.jit(gradient).lower(*arguments).cost_analysis() or {}).get("flops", 0.0))
    return counted if counted > 0 else count(gradient, *arguments)


def _loss(goal: Objective | None, batch: int, outputs: Callable[[], Any]) -> tuple[Callable[..., jax.Array], Any]:
    """(loss, shapes and dtypes of the targets of a batch); `outputs` are those of the head."""
    if goal is None or goal.kind == "classes":
        return optax.softmax_cross_entropy_with_integer_labels, jax.ShapeDtypeStruct((batch,), np.int32)
    length = outputs().shape[1]
    return goal.loss, objectives.example(goal.kind, goal.num_outputs, batch, length)[1]


def count(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of one call of a function of arrays, or of shapes and dtypes; nothing is compiled.

    A product counts two for each pair of numbers that it multiplies, and of a convolution those that fall on padding
    count nothing; a sum counts one for each number, of each of its windows where it has several, and everything else
    that computes one for each number that it gives. Where the program has a choice, the dearest counts; a loop whose
    length is not known when it is traced counts once. What no result needs counts nothing, as compilers leave it out:
    the gradients of what `optimizer.masked` freezes, say.

    >>> row = jax.ShapeDtypeStruct((10,), np.float32)
    >>> count(lambda x: 2 * x, row), count(lambda x: jax.lax.map(lambda e: e * e, x), row)
    (10.0, 10.0)
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return _jaxpr_flops(partial_eval.dce_jaxpr(program, [True] * len(program.outvars))[0])


# fmt: off
_MOVES = frozenset((
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice",
    "dynamic_update_slice", "concatenate", "pad", "gather", "rev", "iota", "copy", "copy_p", "split",
    "stop_gradient", "optimization_barrier", "sharding_constraint", "device_put", "bitcast_convert_type",
    "random_wrap", "random_unwrap", "random_seed",
))
# fmt: on
"""Primitives that move numbers and compute none."""


def _jaxpr_flops(jaxpr: Any) -> float:
    """FLOPs of a program, with those of the programs within it."""
    return sum((equation_flops(equation) for equation in jaxpr.eqns), start=0.0)


def equation_flops(equation: Any) -> float:
    """FLOPs of an equation of a traced program, as `count` counts them."""
    name, parameters = equation.primitive.name, equation.params
    inner = inner_programs(equation)
    inputs = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    outputs = [getattr(variable.aval, "shape", ()) for variable in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(parameters, inputs[0], inputs[1], outputs[0])
    if name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"):
        return float(math.prod(inputs[0]))
    if name == "reduce_window_sum":
        return float(math.prod(outputs[0]) * math.prod(parameters["window_dimensions"]))
    if name in ("scatter-add", "scatter_add"):
        return float(math.prod(inputs[2]))
    if name == "scan":
        return float(parameters["length"]) * sum(map(_jaxpr_flops, inner))
    if name == "cond":
        return max(map(_jaxpr_flops, inner), default=0.0)
    if name in ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"):
        return _jaxpr_flops(inner[0])
    if inner:
        return sum(map(_jaxpr_flops, inner))
    return 0.0 if name in _MOVES else float(sum(map(math.prod, outputs)))


def _convolution_flops(parameters: Any, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]) -> float:
    """FLOPs of a convolution: along each axis, the places of the kernel that meet a number, and no padding or hole."""
    dimensions = parameters["dimension_numbers"]
    lhs_spec, rhs_spec, out_spec = dimensions.lhs_spec, dimensions.rhs_spec, dimensions.out_spec
    meet = 1.0
    for axis, stride in enumerate(parameters["window_strides"]):
        size, kernel, places = lhs[lhs_spec[2 + axis]], rhs[rhs_spec[2 + axis]], out[out_spec[2 + axis]]
        hole, spread = parameters["lhs_dilation"][axis], parameters["rhs_dilation"][axis]
        at = np.arange(places)[:, None] * stride + np.arange(kernel) * spread - parameters["padding"][axis][0]
        meet *= np.count_nonzero((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0))
    pairs = lhs[lhs_spec[0]] / parameters["batch_group_count"] * rhs[rhs_spec[1]] * out[out_spec[1]]
    return 2.0 * pairs * meet
