"""What an optimizer does to one element, read from its traced program: does it turn on any other?

A transformation is *elementwise* on a tree if each element's update and state follow from that element's gradient,
parameter and state, from numbers that belong to no element (counters, rates), and from sums over all elements of what
is 0 wherever the gradient has always been 0 (a global norm of gradients). Elements whose gradient is always 0 then
change nothing for the others: they may be left out. SGD, Adam, AdamW, RMSprop, Lion and their like are elementwise,
clipping by the global norm of gradients included; what looks at a leaf's shape (Adafactor, Muon, SM3), at a mean or
at a norm of parameters (LAMB, LARS) is not. It is decided by the program and the numbers written in it (a decay of 0.0
is one), never by the values of gradients, parameters or states: a number of the state (an injected hyper-parameter) may
take any. In doubt the answer is no.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend import core

from tljax.types import Params


def holds(tx: optax.GradientTransformation, whole: Params, part: Params) -> bool:
    """Whether `tx` is elementwise on a tree, and does the same on a tree with fewer elements in some leaves.

    Both trees are of arrays, or of their shapes and dtypes, and have one structure. The two programs have to be equal
    but for their shapes: a mean, which divides by a size, is none.

    >>> leaves, fewer = ({"w": jax.ShapeDtypeStruct((1, size), np.float32)} for size in (9, 2))
    >>> holds(optax.adam(0.1), leaves, fewer), holds(optax.clip_by_global_norm(1.0), leaves, fewer)
    (True, True)
    >>> holds(optax.lamb(0.1), leaves, fewer), holds(optax.clip_by_block_rms(1.0), leaves, fewer)
    (False, False)
    """
    try:
        programs, others = _programs(tx, whole), _programs(tx, part)
    except Exception:  # of any transformation: its own call raises what is wrong
        return False
    same = all(_same(_lines(*program), _lines(*other)) for program, other in zip(programs, others, strict=True))
    return same and _holds(*programs, len(jax.tree.leaves(whole)))


def holds_of_shapes(
    tx: optax.GradientTransformation,
    structure: Any,
    whole: tuple[jax.ShapeDtypeStruct, ...],
    part: tuple[jax.ShapeDtypeStruct, ...],
) -> bool:
    """`holds`, of a tree of this structure with leaves of these shapes: arguments that can be looked up in a cache."""
    return holds(tx, jax.tree.unflatten(structure, whole), jax.tree.unflatten(structure, part))


def _programs(tx: optax.GradientTransformation, leaves: Params) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The programs of `init` and `update`, each with the shapes of what it gives."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves)
    init: Any = jax.make_jaxpr(tx.init)(shapes)
    state = jax.eval_shape(tx.init, shapes)
    update: Any = jax.make_jaxpr(lambda gradients, state, params: tx.update(gradients, state, params))(
        shapes, state, shapes
    )
    return (init.jaxpr, init.consts), (update.jaxpr, update.consts)


class _Value(NamedTuple):
    """What is known of a value."""

    leaf: int | None
    """The number of the leaf whose elements its own stand for; None of a number, or of one number everywhere."""
    zero: bool
    """Whether it is 0 at each element whose gradient has always been 0."""


class _TurnsOnOthers(Exception):
    """An element's value turns on other elements, or may do so."""


def _holds(init: tuple[Any, Any], update: tuple[Any, Any], count: int) -> bool:
    """Whether a transformation is elementwise whose programs are of `count` leaves."""
    params = [_Value(leaf, False) for leaf in range(count)]
    gradients = [_Value(leaf, True) for leaf in range(count)]
    try:
        state = _interpreted(*init, params)
        while True:
            outputs = _interpreted(*update, [*gradients, *state, *params])
            if any(value.leaf not in (leaf, None) for leaf, value in enumerate(outputs[:count])):
                return False
            after = [_either(old, new) for old, new in zip(state, outputs[count:], strict=True)]
            if after == state:  # a number that begins as 0 may be set: only moments stay 0 without gradients
                after = [_Value(None, False) if value.leaf is None else value for value in after]
                if after == state:
                    return True
            state = after
    except _TurnsOnOthers:
        return False


def _either(a: _Value, b: _Value) -> _Value:
    """What is known of a value that is one of two."""
    return _Value(_one_leaf((a, b)), a.zero and b.zero)


def _one_leaf(values: Sequence[_Value]) -> int | None:
    """The leaf that the values are of. Raises _TurnsOnOthers if they are of several."""
    leaves = {value.leaf for value in values} - {None}
    if len(leaves) > 1:
        raise _TurnsOnOthers
    return leaves.pop() if leaves else None


def _interpreted(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
    """What is known of the outputs of a program."""
    if any(np.size(const) != 1 for const in consts):
        raise _TurnsOnOthers
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, _Value(None, False))

    def read(atom: Any) -> _Value:
        return _Value(None, not np.any(atom.val)) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        known |= zip(equation.outvars, _outputs(equation, values), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, values: list[_Value]) -> list[_Value]:
    """What is known of the outputs of one equation."""
    name, outputs = equation.primitive.name, equation.outvars
    if name == "cond":
        which, *inputs = values
        if which.leaf is not None:
            raise _TurnsOnOthers
        branches = [_interpreted(b.jaxpr, b.consts, inputs) for b in equation.params["branches"]]
        return [_joined(results) for results in zip(*branches, strict=True)]
    if name in _CALLS and (called := next((equation.params[key] for key in _BODIES if key in equation.params), None)):
        body, consts = (called.jaxpr, called.consts) if hasattr(called, "jaxpr") else (called, ())
        return _interpreted(body, consts, values)
    if name in ("reduce_sum", "dot_general") and any(value.leaf is not None for value in values):
        _one_leaf(values)
        (left, right), _ = equation.params.get("dimension_numbers", (((), ()), ()))
        if outputs[0].aval.size != 1 or left != right or not any(value.zero for value in values):
            raise _TurnsOnOthers
        return [_Value(None, False)]
    if name in _SAME_ORDER:
        if values[0].leaf is not None and equation.invars[0].aval.size != outputs[0].aval.size:
            raise _TurnsOnOthers
        return [values[0]]
    if name in _ELEMENTWISE:
        return [_Value(_one_leaf(values), _is_zero(name, values))]
    if all(atom.aval.size == 1 for atom in (*equation.invars, *outputs)) and _one_leaf(values) is None:
        return [_Value(None, False)] * len(outputs)
    raise _TurnsOnOthers


def _joined(values: Sequence[_Value]) -> _Value:
    return _Value(_one_leaf(values), all(value.zero for value in values))


def _is_zero(name: str, values: Sequence[_Value]) -> bool:
    """Whether the result is 0 where those of the arguments are that are known to be."""
    if name == "mul":
        return any(value.zero for value in values)
    if name == "div":
        return values[0].zero and not values[1].zero
    if name == "select_n":
        return all(value.zero for value in values[1:])
    return name in _KEEP_ZERO and all(value.zero for value in values)


_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_SAME_ORDER = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p")
"""What keeps the order of elements, where it keeps their number. One number may become many."""
_KEEP_ZERO = (
    *("add", "sub", "add_any", "neg", "abs", "sign", "square", "sqrt", "cbrt", "max", "min", "real", "imag", "conj"),
    *("tanh", "sin", "asin", "atan", "sinh", "asinh", "expm1", "log1p", "erf", "floor", "ceil", "round"),
)
"""Functions that are 0 where all arguments are."""
_ELEMENTWISE = {
    *_KEEP_ZERO,
    *("mul", "div", "rem", "pow", "integer_pow", "rsqrt", "exp", "exp2", "log", "logistic", "cos", "tan", "acos"),
    *("cosh", "acosh", "atanh", "atan2", "erfc", "clamp", "nextafter", "select_n", "is_finite", "and", "or", "not"),
    *("xor", "eq", "ne", "lt", "le", "gt", "ge", "reduce_precision"),
}
# Programs that are equal but for their shapes.


def _lines(jaxpr: Any, consts: Sequence[Any]) -> list[Any]:
    """The equations of a program without the shapes, with the numbers in them."""
    lines: list[Any] = [const for const in consts if np.size(const) == 1]
    for equation in jaxpr.eqns:
        literals = [repr(atom.val) for atom in equation.invars if isinstance(atom, core.Literal)]
        numbers = [(key, value) for key, value in equation.params.items() if isinstance(value, _PLAIN)]
        lines.append(repr((equation.primitive.name, literals, numbers)))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns"):
                    lines += _lines(inner if not hasattr(inner, "jaxpr") else inner.jaxpr, getattr(inner, "consts", ()))
    return lines


_PLAIN = (bool, int, float, str, np.dtype)


def _same(lines: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two programs have the same lines; numbers that are traced are one object in both."""
    return len(lines) == len(others) and all(map(_equal, lines, others))


def _equal(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, str) or isinstance(b, str):
        return a is b or (isinstance(a, str) and isinstance(b, str) and a == b)
    traced = isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer)
    return not traced and bool(np.array_equal(np.asarray(a), np.asarray(b)))
