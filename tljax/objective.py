"""The objective: mean L + lambda R(w). L comes from optax, R is over the leaves that train."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax import paths, plugins
from tljax.types import InputError, Params

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits float [batch, classes], labels int [batch]) -> loss of each example [batch]."""

INTEGER = (
    "softmax_cross_entropy_with_integer_labels",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
)
"""Losses of optax that take integer labels."""

ONE_HOT = ("softmax_cross_entropy", "poly_loss_cross_entropy", "safe_softmax_cross_entropy")
"""Losses of optax that take one-hot labels and give a number an example."""

ELEMENTWISE = ("sigmoid_binary_cross_entropy", "sigmoid_focal_loss", "squared_error", "l2_loss", "huber_loss")
"""Losses of optax that take one-hot labels and give a number a class: summed over the classes."""


def loss(name: str) -> Loss:
    """The loss that `--loss` names: one of optax, or 'package.module:attribute' with the signature of `Loss`.

    Two calls with one name give the same function, so that equal fits share an executable. Raises InputError for
    an unknown name.

    >>> loss("softmax_cross_entropy")(jnp.zeros((1, 2)), jnp.array([0])).round(4).tolist()
    [0.6930999755859375]
    """
    spec = plugins.parse(name)
    if "." in spec.name:
        return plugins.attribute(spec, plugins.module(spec, "optax", "loss"), "loss")
    known = INTEGER + ONE_HOT + ELEMENTWISE
    if spec.name not in known or spec.words or spec.options:
        raise InputError(f"unknown loss '{name}'{plugins.nearest(spec.name, known)}")
    return getattr(optax.losses, spec.name) if spec.name in INTEGER else _one_hot(spec.name)


@lru_cache
def _one_hot(name: str) -> Loss:
    function, elementwise = getattr(optax.losses, name), name in ELEMENTWISE

    def one_hot(logits: jax.Array, labels: jax.Array) -> jax.Array:
        values = function(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
        return values.sum(-1) if elementwise else values

    return one_hot


class Penalty(NamedTuple):
    """A term of R, less its weight, which is passed when it is computed and may be traced."""

    name: str
    function: Callable[[Params], jax.Array]
    """Trained part of the parameters (None elsewhere) -> scalar."""
    on: str = "**"
    """The glob of the leaves it covers."""


def penalties(text: str) -> tuple[tuple[Penalty, ...], tuple[float, ...]]:
    """The terms that `--penalty` names and their weights; a weight of 0 builds no term.

    Raises InputError for an unknown penalty or option, and for a weight that is negative, not finite or missing.

    >>> penalties("l2:weight=1e-4:on=head/**")[1]
    (0.0001,)
    """
    terms, weights = [], []
    for part in plugins.split(text, ",") if text else []:
        spec = plugins.parse(part)
        if spec.name not in _PENALTIES or spec.words:
            raise InputError(f"unknown penalty '{part}'{plugins.nearest(spec.name, _PENALTIES)}")
        options = plugins.bind(_options, spec.options, f"penalty '{spec.name}'")
        weight = options["weight"]
        if not math.isfinite(weight) or weight < 0:
            raise InputError(f"--penalty={part}: the weight must be finite and at least 0")
        if weight:
            terms.append(Penalty(spec.name, _PENALTIES[spec.name], options.get("on", "**")))
            weights.append(weight)
    return tuple(terms), tuple(weights)


def _options(*, weight: float, on: str = "**") -> None:
    """What every penalty takes."""


def l2(trained: Params) -> jax.Array:
    """R = 1/2 sum w^2, so that its gradient is w and, under SGD, its weight is a weight decay.

    >>> float(l2({"a": jnp.array([3.0, 4.0]), "b": None}))
    12.5
    """
    return sum((0.5 * jnp.vdot(leaf, leaf).real for leaf in jax.tree.leaves(trained)), start=jnp.float32(0))


_PENALTIES: dict[str, Callable[[Params], jax.Array]] = {"l2": l2}


def regularizer(terms: Sequence[Penalty], weights: Sequence[Any], trained: Params) -> jax.Array:
    """lambda R: the weighted sum of the terms, each over the trained leaves that its glob covers."""
    total = jnp.float32(0)
    for term, weight in zip(terms, weights, strict=True):
        test, leaves = paths.glob(term.on), zip(paths.names(trained), jax.tree.leaves(trained), strict=True)
        covered = [leaf for path, leaf in leaves if test(path)]
        total += weight * term.function(covered)
    return total
