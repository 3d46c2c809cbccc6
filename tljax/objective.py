"""The objective: losses, L of mean L + lambda R(w), and the metrics beside them. R is in `penalties`.

A loss is of optax or of a file of one's own. What it is by default, and what it is measured by, follows from the kind
of the targets:

| kind | loss of an item | primary metric |
|---|---|---|
| classes | cross-entropy | accuracy |
| labels, several an item | sigmoid cross-entropy, summed over the labels | label-ranking average precision |
| values | squared error, summed over the values | 1 - (y - f)^2 / var(y), whose mean is R squared |
| tokens | cross-entropy of the next token, a mean over the tokens | the same, in nats: less is better |

So a loss is minus the log-likelihood of an item's targets, but of a sequence it is that of a token: in a batch each
sequence weighs the same, however long it is.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import metrics, plugins
from tljax.types import InputError, Objective, Task

Loss = Callable[..., jax.Array]
"""(outputs float [batch, ...], targets [batch, ...], smoothing=0) -> loss of each example [batch]."""

INTEGER = (
    "softmax_cross_entropy_with_integer_labels",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
)
"""Losses of optax that take integer labels."""

ONE_HOT = ("softmax_cross_entropy", "poly_loss_cross_entropy", "safe_softmax_cross_entropy")
"""Losses of optax that take one-hot labels and give a number an example."""

_OF_VALUES = ("squared_error", "l2_loss", "huber_loss")
ELEMENTWISE = ("sigmoid_binary_cross_entropy", "sigmoid_focal_loss", *_OF_VALUES)
"""Losses of optax that take one-hot labels, several labels or values, and give a number each: summed over them."""

AUTO = {
    "classes": "softmax_cross_entropy",
    "labels": "sigmoid_binary_cross_entropy",
    "values": "squared_error",
    "tokens": "softmax_cross_entropy",
}
"""{kind of targets: the loss that 'auto' stands for}."""

_LOSSES = {
    **dict.fromkeys(("classes", "tokens"), INTEGER + ONE_HOT + ELEMENTWISE),
    **{"labels": ELEMENTWISE, "values": _OF_VALUES},
}


def for_task(task: Task, loss_name: str = "auto", metric_names: Sequence[str] = (), primary: str = "") -> Objective:
    """What is minimised of a task, and what is measured: the primary metric first, then those of `metric_names`.

    `primary` names the primary metric, in place of that of the task's kind. Raises InputError for a loss or a metric
    that is unknown or of other targets, for two of one name, and for a primary metric without a score an item, or
    whose score is not finite where the answer is always the same: that is what a fit that diverged counts with.

    >>> from tljax import data
    >>> objective = for_task(data.load("mnist_10k"), metric_names=["macro_f1"])
    >>> objective.num_outputs, [metric.name for metric in objective.metrics]
    (10, ['accuracy', 'macro_f1'])
    """
    targets = np.asarray(task.train.targets)
    some = targets[:: -(-len(targets) // 512)]
    outputs = metrics.constant(task.kind, some, task.outputs)

    read = partial(metrics.read, kind=task.kind, outputs=outputs, targets=some)
    first = read(primary, field="primary") if primary else metrics.PRIMARY[task.kind]
    if first.item is None:
        reason = "it is of a whole split, and verdicts need a metric with a score an item: leave it to `metric=`"
        raise InputError(reason, field="primary", value=primary)
    if primary and (lacking := metrics.without_number(first, outputs, some)):
        reason = f"where the answer is always the same it is {lacking}: let it give a finite number an item"
        raise InputError(reason, field="primary", value=primary)
    others = [read(text) for text in metric_names if text != primary]
    others = [metric for metric in others if metric != first]
    names = [metric.name for metric in (first, *others)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two metrics are named '{twice[0]}': keep one", field="metric", value=",".join(metric_names))
    loss_function = loss(resolved(loss_name, task.kind), task.kind)
    return Objective(loss_function, task.outputs, (first, *others), task.kind)


def resolved(name: str, kind: str) -> str:
    """The name of a loss, with that of the kind of targets in place of 'auto'.

    >>> resolved("auto", "values"), resolved("huber_loss", "values")
    ('squared_error', 'huber_loss')
    """
    return AUTO[kind] if name == "auto" else name


def loss(name: str, kind: str = "classes") -> Loss:
    """The loss of a name: one of optax, or 'package.module:attribute' with the signature of `Loss`.

    Of tokens [batch, length] it is the mean over those that are not -1 of a loss of classes; a sequence without any has
    a loss of 0. Two calls with the same arguments give the same function, so that equal fits share an executable.
    Raises InputError for an unknown name, and for a loss of other targets.

    >>> loss("softmax_cross_entropy")(jax.numpy.zeros((1, 2)), jax.numpy.array([0])).round(4).tolist()
    [0.6930999755859375]
    """
    spec = plugins.parse(name)
    if "." in spec.name and not spec.options:
        return plugins.attribute(spec, plugins.module(spec, "optax", "loss"), "loss")
    known = _LOSSES[kind]
    if spec.name not in known or spec.words or spec.options:
        every = INTEGER + ONE_HOT + ELEMENTWISE
        if spec.name in every and not (spec.words or spec.options):
            raise InputError(f"loss '{name}' is none of {kind}, which the targets are: use one of {list(known)}")
        raise InputError(f"unknown loss '{name}'{plugins.nearest(spec.name, known)}")
    if kind == "tokens":
        return _per_token(spec.name)
    if kind == "classes":
        return getattr(optax.losses, spec.name) if spec.name in INTEGER else _one_hot(spec.name)
    return _summed(spec.name, kind)


def supervised_contrastive(
    features: jax.Array, classes: jax.Array, weight: jax.Array, *, temperature: float = 0.07
) -> jax.Array:
    """The loss by which features of one class are near, and of others far: its sum over a batch, a scalar.

    Khosla et al. 2020, "Supervised contrastive learning", arXiv:2004.11362, equation 2, of one view an example:
    features float [batch, ...] of length 1, classes int [batch], weight float32 [batch], 0 for padding. An example
    that is the only one of its class in the batch counts nothing. Raises InputError for targets that are no classes.

    >>> x, y = jax.numpy.eye(2)[jax.numpy.array([0, 0, 1])], jax.numpy.array([0, 0, 1])
    >>> bool(supervised_contrastive(x, y, jax.numpy.ones(3)) < 1e-5)
    True
    """
    if classes.ndim != 1 or not jnp.issubdtype(classes.dtype, jnp.integer):
        raise InputError(f"supervised_contrastive: the targets are {classes.dtype}{list(classes.shape)}, no classes")
    z = features.reshape(len(features), -1)
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(1, keepdims=True), 1e-24))
    others = (weight > 0)[None] & ~jnp.eye(len(z), dtype=bool)
    same = others & (classes[:, None] == classes[None])
    near = z @ z.T / temperature
    # Finite, as a row without any other example has a gradient too.
    log_share = near - jax.nn.logsumexp(jnp.where(others, near, -1e30), axis=1, keepdims=True)
    each = -jnp.where(same, log_share, 0).sum(1) / jnp.maximum(same.sum(1), 1)
    return jnp.where((weight > 0) & same.any(1), each, 0).sum()


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


@lru_cache
def _summed(name: str, kind: str) -> Loss:
    """The sum of an elementwise loss over labels or values; a smoothed label is so much nearer to 1/2."""
    function = getattr(optax.losses, name)

    def values_loss(outputs: jax.Array, values: jax.Array) -> jax.Array:
        return function(outputs, values.astype(outputs.dtype)).sum(-1)

    def labels_loss(outputs: jax.Array, labels: jax.Array, smoothing: Any = None) -> jax.Array:
        targets = labels.astype(outputs.dtype)
        if smoothing is not None:
            targets = (1 - smoothing) * targets + smoothing / 2
        return function(outputs, targets).sum(-1)

    return labels_loss if kind == "labels" else values_loss


@lru_cache
def _per_token(name: str) -> Loss:
    function = loss(name)

    def mean(outputs: jax.Array, tokens: jax.Array, *smoothing: Any) -> jax.Array:
        weights = (tokens >= 0).astype(outputs.dtype)
        flat = outputs.reshape(-1, outputs.shape[-1]), jnp.maximum(tokens, 0).reshape(-1)
        values = function(*flat, *smoothing).reshape(tokens.shape)
        return (values * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1)

    if name in INTEGER:
        return lambda outputs, tokens: mean(outputs, tokens)
    return lambda outputs, tokens, smoothing=None: mean(outputs, tokens, *(() if smoothing is None else (smoothing,)))


def example(kind: str, num_outputs: int, batch: int, length: int = 1) -> tuple[Any, Any]:
    """Shapes and dtypes of the outputs and targets of a batch; sequences of tokens have this `length`.

    >>> outputs, targets = example("classes", 10, 2)
    >>> outputs.shape, targets.dtype.name
    ((2, 10), 'int32')
    """
    leading = (batch, length) if kind == "tokens" else (batch,)
    outputs = jax.ShapeDtypeStruct((*leading, num_outputs), jnp.float32)
    if kind in ("labels", "values"):
        return outputs, jax.ShapeDtypeStruct(outputs.shape, jnp.bool if kind == "labels" else jnp.float32)
    return outputs, jax.ShapeDtypeStruct(leading, jnp.int32)


def check_smoothing(name: str, smoothing: float, kind: str = "classes") -> None:
    """Raise InputError for a label smoothing outside [0, 1), or of a loss that takes integer labels or values."""
    if not 0 <= smoothing < 1:
        raise InputError("it must be at least 0 and below 1", field="label_smoothing", value=smoothing)
    if not smoothing:
        return
    if kind == "values":
        reason = "it is for classes, labels and tokens: give `label_smoothing=0`"
        raise InputError(reason, field="label_smoothing", value=smoothing)
    takes = name not in INTEGER and len(inspect.signature(loss(name, kind)).parameters) > 2
    if not takes:
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


def class_weights(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """The weight of each class that makes all weigh the same: n / (k n_c), float32 [classes].

    n_c of the n examples, classes int [n], are of a class c, and k classes occur. One that does not has the weight 0.
    King and Zeng 2001, "Logistic regression in rare events data"; `class_weight="balanced"` of scikit-learn.

    >>> class_weights(np.array([0, 0, 0, 1]), 2).round(4).tolist()
    [0.666700005531311, 2.0]
    """
    counts = np.bincount(classes, minlength=num_classes)
    weights = np.divide(len(classes), (counts > 0).sum() * counts, where=counts > 0, out=np.zeros(num_classes))
    return weights.astype(np.float32)
