"""How many examples go through a model at once, by the bytes that its program needs for them.

It follows from the traced program alone, and not from what a device has free: a batch of another size may round
otherwise, and so it is the same on every machine of a platform. Between a CPU and others it may differ for a model with
`linen.max_pool`, which is another program there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

EXAMPLES = 1000
"""Examples that go through a model at once, where they are small enough."""
ACTIVATIONS = 2**32
"""Bytes that what a model computes of them may take at any time."""


def examples_at_once(
    forward: Callable[[Any, Any], Any], variables: Any, inputs: Any, most: int = EXAMPLES, limit: int | None = None
) -> int:
    """The largest divisor of `most` of which `forward(variables, inputs)` takes `limit` bytes or less, and at least 1.

    Without a limit it is ACTIVATIONS.
    `variables` and `inputs` are arrays or shapes and dtypes; the leaves of the latter are [batch, ...] of any batch.
    `forward` is hashable; nothing is computed, and a program of known shapes is not traced again.

    >>> forward = lambda scale, x: (scale * x).sum(1)
    >>> row = jax.ShapeDtypeStruct((1, 100), "float32")
    >>> examples_at_once(forward, 2.0, row), examples_at_once(forward, 2.0, row, limit=100_000)
    (1000, 200)
    """
    leaves, structure = jax.tree.flatten((variables, inputs))
    shapes = tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in map(_shape, leaves))
    return _examples_at_once(forward, structure, shapes, most, ACTIVATIONS if limit is None else limit)


def _shape(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "shape") else jax.typeof(leaf)


@functools.lru_cache
def _examples_at_once(forward: Callable[..., Any], structure: Any, shapes: Any, most: int, limit: int) -> int:
    variables, inputs = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((most, *leaf.shape[1:]), leaf.dtype), inputs)
    needed = peak_bytes(forward, variables, batch)
    return next(
        size for size in range(most, 0, -1) if most % size == 0 and (size == 1 or needed * size <= limit * most)
    )


def peak_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """The most bytes that what a function computes takes at any time; what it is given is not in it.

    Each result of the traced program is held from where it is computed to where it is read last. A compiler that joins
    operations needs less.

    >>> row = jax.ShapeDtypeStruct((10,), "float32")
    >>> peak_bytes(lambda x: ((x + 1) * 2).sum(), row), peak_bytes(lambda x: x.sum(), row)
    (80, 4)
    """
    return _peak(jax.make_jaxpr(function)(*arguments).jaxpr)


def _peak(jaxpr: Any) -> int:
    last_read = {variable: len(jaxpr.eqns) for variable in jaxpr.outvars if not hasattr(variable, "val")}
    for number, equation in reversed(list(enumerate(jaxpr.eqns))):
        for variable in equation.invars:
            if not hasattr(variable, "val"):
                last_read.setdefault(variable, number)
    ends: dict[int, list[Any]] = {}
    held = peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        results = sum(_nbytes(variable) for variable in equation.outvars)
        within = max((_peak(part) for part in inner_programs(equation)), default=0)
        peak = max(peak, held + max(results, within))
        held += results
        for variable in equation.outvars:
            ends.setdefault(last_read.get(variable, number), []).append(variable)
        held -= sum(map(_nbytes, ends.pop(number, ())))
    return peak


def inner_programs(equation: Any) -> list[Any]:
    """The programs within an equation of a traced program: the bodies of loops, the branches of a choice, calls."""
    values = equation.params.values()
    parts = (part for value in values for part in (value if isinstance(value, tuple | list) else (value,)))
    return [part for part in (getattr(part, "jaxpr", part) for part in parts) if hasattr(part, "eqns")]


def carried_operands(equation: Any) -> tuple[int, int]:
    """(The number of the first operand that a loop carries from turn to turn, how many it carries; 0 of a choice).

    What comes before them is the same in every turn, and what comes after them are a scan's rows.
    """
    name, parameters = equation.primitive.name, equation.params
    if name != "scan":
        carried = len(equation.outvars) if name == "while" else 0
        return len(equation.invars) - carried, carried
    if "ft_in" not in parameters:  # JAX 0.12 has the operands of the three kinds, 0.10 how many there are
        return parameters["num_consts"], parameters["num_carry"]
    same, carried, _ = (len(list(part)) for part in parameters["ft_in"].unpack())
    return same, carried


def _nbytes(variable: Any) -> int:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 4)
