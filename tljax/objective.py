"""Losses: L of the objective mean L + lambda R(w), from optax or a file of one's own. R is in `penalties`."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tljax import plugins
from tljax.types import InputError

Loss = Callable[..., jax.Array]
"""(logits float [batch, classes], labels int [batch], smoothing=0) -> loss of each example [batch]."""

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
    """The loss of a name: one of optax, or 'package.module:attribute' with the signature of `Loss`.

    Two calls with one name give the same function, so that equal fits share an executable. Raises InputError for
    an unknown name.

    >>> loss("softmax_cross_entropy")(jax.numpy.zeros((1, 2)), jax.numpy.array([0])).round(4).tolist()
    [0.6930999755859375]
    """
    spec = plugins.parse(name)
    if "." in spec.name and not spec.options:
        return plugins.attribute(spec, plugins.module(spec, "optax", "loss"), "loss")
    known = INTEGER + ONE_HOT + ELEMENTWISE
    if spec.name not in known or spec.words or spec.options:
        raise InputError(f"unknown loss '{name}'{plugins.nearest(spec.name, known)}")
    return getattr(optax.losses, spec.name) if spec.name in INTEGER else _one_hot(spec.name)


@lru_cache
def _one_hot(name: str) -> Loss:
    function, elementwise = getattr(optax.losses, name), name in ELEMENTWISE

    def one_hot(logits: jax.Array, labels: jax.Array, smoothing: Any = None) -> jax.Array:
        mixed = labels.ndim == logits.ndim  # as mixup gives them
        targets = labels.astype(logits.dtype) if mixed else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        if smoothing is not None:
            targets = optax.smooth_labels(targets, smoothing)
        values = function(logits, targets)
        return values.sum(-1) if elementwise else values

    return one_hot


def check_smoothing(name: str, smoothing: float) -> None:
    """Raise InputError for a label smoothing outside [0, 1), or of a loss that takes integer labels."""
    if not 0 <= smoothing < 1:
        raise InputError("it must be at least 0 and below 1", field="label_smoothing", value=smoothing)
    takes = name not in INTEGER and len(inspect.signature(loss(name)).parameters) > 2
    if smoothing and not takes:
        reason = f"loss '{name}' takes whole labels; use one of {list(ONE_HOT)}"
        raise InputError(reason, field="label_smoothing", value=smoothing)


def check_mixed(name: str, function: Loss, classes: int, what: str) -> None:
    """Raise InputError for a loss that takes whole labels, where `what` mixes them to floats [batch, classes]."""
    mixed = jax.ShapeDtypeStruct((2, classes), jnp.float32)
    try:
        takes = name not in INTEGER and jax.eval_shape(function, mixed, mixed).shape == (2,)
    except Exception:  # a loss of a file of one's own may raise anything
        takes = False
    if not takes:
        raise InputError(f"{what} mixes labels, and loss '{name}' takes whole ones: use one of {list(ONE_HOT)}")
