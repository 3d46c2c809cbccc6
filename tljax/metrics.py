"""Metrics: how good outputs are against targets, of each item or of a whole split, in NumPy.

Where a metric needs an order, a tie is broken as scikit-learn breaks it. Of an item it is float64 [n], and its mean is
the metric; only such a metric can be what verdicts are of. A metric of a whole split is no mean over items.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tljax import plugins
from tljax.types import InputError, Metric

_AT_ONCE = 10**7
"""Numbers that a comparison of labels with labels makes at once, at most."""

# ---- A score of each item


def accuracy(outputs: np.ndarray, classes: np.ndarray, reference: Any = None) -> np.ndarray:
    """1 where the largest of the outputs [n, classes] is that of the class (int [n]), else 0.

    >>> accuracy(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1])).tolist()
    [1.0, 0.0]
    """
    return (outputs.argmax(-1) == classes).astype(np.float64)


def label_ranking_average_precision(outputs: np.ndarray, labels: np.ndarray, reference: Any = None) -> np.ndarray:
    """Of each label that an item has, which share of the labels ranked as high or higher it has too; their mean.

    Outputs [n, labels], labels bool [n, labels]. An item with no label, or with every one, scores 1. Tsoumakas et al.
    2010, "Mining multi-label data", section 4; `label_ranking_average_precision_score` of scikit-learn is the mean.

    >>> label_ranking_average_precision(np.array([[0.75, 0.5, 1.0]]), np.array([[True, False, False]])).tolist()
    [0.5]
    """
    labels = np.asarray(labels, bool)
    scores = []
    rows = max(1, _AT_ONCE // max(1, labels.shape[1] ** 2))
    for first in range(0, len(labels), rows):
        values, has = outputs[first : first + rows], labels[first : first + rows]
        as_high = values[:, None, :] >= values[:, :, None]
        precision = (as_high & has[:, None, :]).sum(-1) / as_high.sum(-1)
        counts = has.sum(-1)
        means = np.where(has, precision, 0).sum(-1) / np.maximum(counts, 1)
        scores.append(np.where((counts == 0) | (counts == has.shape[1]), 1.0, means))
    return np.concatenate(scores) if scores else np.zeros(0)


def r_squared(outputs: np.ndarray, values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """1 - (y - f)^2 / var(y), a mean over the values of an item; the mean over items is R squared.

    Outputs f and values y are [n, values]; var(y) is over the items of `reference` [m, values], the whole test split.
    A value that never varies counts as 1 where all are predicted exactly, else as 0, as in scikit-learn.

    >>> r_squared(np.array([[1.0], [1.0]]), np.array([[0.0], [2.0]]), np.array([[0.0], [2.0]])).tolist()
    [0.0, 0.0]
    """
    errors = np.square(np.asarray(values, np.float64) - outputs)
    variance = np.asarray(reference, np.float64).var(0)
    constant = np.broadcast_to((errors == 0).all(0).astype(np.float64), errors.shape)
    return np.where(variance > 0, 1 - errors / np.where(variance > 0, variance, 1), constant).mean(-1)


def absolute_error(outputs: np.ndarray, values: np.ndarray, reference: Any = None) -> np.ndarray:
    """|y - f|, a mean over the values of an item; outputs f and values y are [n, values].

    >>> absolute_error(np.array([[1.0, 2.0]]), np.array([[0.0, 4.0]])).tolist()
    [1.5]
    """
    return np.abs(np.asarray(values, np.float64) - outputs).mean(-1)


def token_cross_entropy(outputs: np.ndarray, tokens: np.ndarray, reference: Any = None) -> np.ndarray:
    """Minus the log-likelihood of a sequence in nats, a mean over its tokens.

    Outputs [n, length, vocabulary], tokens int [n, length]; -1 has no weight. Each sequence counts the same, however
    long it is; one without a token scores 0. Its mean's exponential is a perplexity.

    >>> token_cross_entropy(np.zeros((1, 3, 4)), np.array([[0, 2, -1]])).round(4).tolist()
    [1.3863]
    """
    from scipy.special import logsumexp

    outputs = np.asarray(outputs, np.float64)
    at = np.maximum(tokens, 0)[..., None]
    values = logsumexp(outputs, axis=-1) - np.take_along_axis(outputs, at, -1)[..., 0]
    return _mean_over_tokens(values, tokens)


def token_accuracy(outputs: np.ndarray, tokens: np.ndarray, reference: Any = None) -> np.ndarray:
    """The share of a sequence's tokens that the largest output is of; shapes as in `token_cross_entropy`.

    A sequence without a token scores 0.

    >>> token_accuracy(np.array([[[0.0, 1.0], [0.0, 1.0]]]), np.array([[1, 0]])).tolist()
    [0.5]
    """
    return _mean_over_tokens((outputs.argmax(-1) == tokens).astype(np.float64), tokens)


def _mean_over_tokens(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The mean [n] of values [n, length] where there is a token."""
    weights = np.asarray(tokens) >= 0
    return np.where(weights, values, 0).sum(-1) / np.maximum(weights.sum(-1), 1)


# ---- The natural loss of an item, whatever a fit minimised


def cross_entropy(outputs: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Minus the log-probability of the class, in nats; outputs [n, classes], classes int [n]."""
    from scipy.special import log_softmax

    return -log_softmax(np.asarray(outputs, np.float64), axis=-1)[np.arange(len(classes)), classes]


def sigmoid_cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the log-likelihood of an item's labels in nats, a sum over the labels; both are [n, labels].

    >>> sigmoid_cross_entropy(np.zeros((1, 2)), np.array([[True, False]])).round(4).tolist()
    [1.3863]
    """
    outputs = np.asarray(outputs, np.float64)
    return np.logaddexp(0, np.where(labels, -outputs, outputs)).sum(-1)


def squared_error(outputs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(y - f)^2, a sum over the values of an item; both are [n, values]."""
    return np.square(np.asarray(values, np.float64) - outputs).sum(-1)


NATURAL: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "classes": cross_entropy,
    "labels": sigmoid_cross_entropy,
    "values": squared_error,
    "tokens": token_cross_entropy,
}
"""{kind of targets: the loss that a result's test_loss and validation_loss are means of}."""

# ---- Of a whole split


def macro_f1(outputs: np.ndarray, targets: np.ndarray) -> float:
    """F1, a mean over classes or labels; a label is predicted where its output is above 0. `f1_score` of scikit-learn.

    >>> macro_f1(np.eye(2)[[0, 1, 1]], np.array([0, 1, 0])).__round__(4)
    0.6667
    """
    from sklearn.metrics import f1_score

    predicted = outputs.argmax(-1) if targets.ndim == 1 else outputs > 0
    return float(f1_score(targets, predicted, average="macro", zero_division=0))


def balanced_accuracy(outputs: np.ndarray, classes: np.ndarray) -> float:
    """The mean over the classes that occur of the share of their items that are classified right.

    >>> balanced_accuracy(np.eye(2)[[0, 0, 0]], np.array([0, 0, 1]))
    0.5
    """
    return float(np.mean([(outputs.argmax(-1) == classes)[classes == label].mean() for label in np.unique(classes)]))


def mean_average_precision(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Average precision, a mean over the classes or labels that occur; `average_precision_score` of scikit-learn.

    Items are ranked by the probability of a class, or by the output of a label.
    """
    from sklearn.metrics import average_precision_score

    return _mean_over_columns(average_precision_score, outputs, targets, lambda column: bool(column.any()))


def auc(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve of each class against the rest, or of each label; a mean over those that some items have
    and others not. `roc_auc_score` of scikit-learn, with multi_class="ovr".
    """
    from sklearn.metrics import roc_auc_score

    return _mean_over_columns(roc_auc_score, outputs, targets, lambda column: 0 < column.sum() < len(column))


def _mean_over_columns(
    measure: Callable[[np.ndarray, np.ndarray], float],
    outputs: np.ndarray,
    targets: np.ndarray,
    counts: Callable[[np.ndarray], bool],
) -> float:
    """The mean of a measure (of whether an item has a label, and its score) over the columns that count; nan of none.

    Classes int [n] become columns, and the outputs their probabilities, which are in another order than the logits.
    """
    from scipy.special import softmax

    if targets.ndim == 1:
        outputs = softmax(np.asarray(outputs, np.float64), axis=-1)
        targets = np.asarray(targets)[:, None] == np.arange(outputs.shape[-1])
    columns = [(has, score) for has, score in zip(np.asarray(targets, bool).T, outputs.T, strict=True) if counts(has)]
    return float(np.mean([measure(has, score) for has, score in columns])) if columns else float("nan")


# ---- By name

PRIMARY: Mapping[str, Metric] = {
    "classes": Metric("accuracy", item=accuracy),
    "labels": Metric("label_ranking_average_precision", item=label_ranking_average_precision),
    "values": Metric("r_squared", "", item=r_squared),
    "tokens": Metric("token_cross_entropy", "nats", larger_is_better=False, item=token_cross_entropy),
}
"""{kind of targets: the metric that verdicts are of, unless another is chosen}. Of tokens it is the log-likelihood,
which language models are compared by: it sees what an accuracy does not, how likely the other tokens were."""

_NAMED: Mapping[str, Mapping[str, Metric]] = {
    "classes": {
        **{name: Metric(name, whole=function) for name, function in (("macro_f1", macro_f1), ("auc", auc))},
        "balanced_accuracy": Metric("balanced_accuracy", whole=balanced_accuracy),
        "mean_average_precision": Metric("mean_average_precision", whole=mean_average_precision),
    },
    "labels": {
        **{name: Metric(name, whole=function) for name, function in (("macro_f1", macro_f1), ("auc", auc))},
        "mean_average_precision": Metric("mean_average_precision", whole=mean_average_precision),
    },
    "values": {"mae": Metric("mae", "", larger_is_better=False, item=absolute_error)},
    "tokens": {"token_accuracy": Metric("token_accuracy", item=token_accuracy)},
}
KINDS = tuple(PRIMARY)
"""The kinds of targets, as `Task.kind` has them."""


def named(kind: str) -> dict[str, Metric]:
    """{name: metric} of all that come with tljax for a kind of targets, the primary one first.

    >>> list(named("values"))
    ['r_squared', 'mae']
    """
    primary = PRIMARY[kind]
    return {primary.name: primary, **_NAMED[kind]}


def read(text: str, kind: str, outputs: np.ndarray, targets: np.ndarray, field: str = "metric") -> Metric:
    """The metric of a name, or of 'FILE.py:metric' or 'package.module:attribute', for a kind of targets.

    A file offers a `Metric`, or a function of outputs [n, ...] and targets [n, ...], and of `reference` if it takes
    that, with options after its name, of which larger is better: it gives a number an item [n], or one of a whole
    split. It is tried on some `outputs` and `targets`. Raises InputError, of this `field`, for an unknown name, for a
    metric of other targets, and for a function that fails or gives anything else.

    >>> read("mae", "values", np.zeros((1, 1)), np.zeros((1, 1))).larger_is_better
    False
    """
    spec = plugins.parse(text)
    if "." in spec.name:
        return _from_file(text, spec, outputs, targets)
    known = named(kind)
    if spec.name in known and not (spec.words or spec.options):
        return known[spec.name]
    others = [other for other in KINDS if spec.name in named(other)]
    if others:
        reason = f"it is of {' and '.join(others)}, and the targets are {kind}: {kind} have {', '.join(known)}"
        raise InputError(reason, field=field, value=spec.name)
    raise InputError(f"there is no such metric{plugins.nearest(spec.name, known)}", field=field, value=text)


def _from_file(text: str, spec: plugins.Spec, outputs: np.ndarray, targets: np.ndarray) -> Metric:
    """The metric that somebody's code offers, tried on some outputs and targets."""
    offered: Any = plugins.attribute(spec, plugins.module(spec, "tljax.metrics", "metric"), "metric")
    if isinstance(offered, Metric):
        if spec.options or (offered.item is None) == (offered.whole is None):
            raise InputError(f"metric '{text}' takes no options, and has an `item` or a `whole`: give it one of them")
        measure: Callable[..., Any] = offered.item or functools.partial(_without_reference, offered.whole)
    else:
        options = plugins.bind(offered, spec.options, f"metric '{text}'", ("outputs", "targets", "reference"))
        measure = functools.partial(offered, **options)
        if not plugins.takes(offered, "reference"):
            measure = functools.partial(_without_reference, measure)
    try:
        result = np.asarray(measure(outputs, targets, targets))
    except InputError:
        raise
    except Exception as error:  # somebody's code may raise anything
        function = offered.item or offered.whole if isinstance(offered, Metric) else offered
        raise InputError(f"metric '{text}' fails: {plugins.describe(error, function)}") from error
    shapes = {"item": (len(targets),), "whole": ()}
    part = next((part for part, shape in shapes.items() if result.shape == shape and result.dtype.kind in "biuf"), "")
    if isinstance(offered, Metric) and part and getattr(offered, part) is not None:
        return offered
    if isinstance(offered, Metric) or not part:
        raise InputError(
            f"metric '{text}' gives {result.dtype}{list(result.shape)} of {len(targets)} items: let it give a number "
            "an item, or of a `whole` one number"
        )
    options_text = [f"{name}={value}" for name, value in spec.options.items()]
    name = ":".join([*(spec.words or [spec.name.rpartition("/")[2].removesuffix(".py")]), *options_text])
    return Metric(name, "", item=measure) if part == "item" else Metric(name, "", whole=_own_reference(measure))


def _without_reference(measure: Any, outputs: np.ndarray, targets: np.ndarray, reference: Any) -> Any:
    return measure(outputs, targets)


def _own_reference(measure: Callable[..., Any]) -> Callable[..., float]:
    """A measure of outputs, targets and a reference as one of a split, which is its own reference."""
    return lambda outputs, targets: float(measure(outputs, targets, targets))


# ---- What is measured


def value(metric: Metric, outputs: np.ndarray, targets: np.ndarray) -> float | None:
    """A metric of a whole split, outputs and targets [n, ...]; None where it is not finite.

    >>> value(PRIMARY["classes"], np.eye(2), np.array([0, 0]))
    0.5
    """
    if metric.item is not None:
        result = float(np.mean(metric.item(outputs, targets, targets)))
    else:
        assert metric.whole is not None
        result = float(metric.whole(outputs, targets))
    return result if np.isfinite(result) else None


def without_number(metric: Metric, outputs: np.ndarray, targets: np.ndarray) -> str:
    """What a metric of a split is where it is not finite, in words; "" where it is. Outputs and targets are [n, ...].

    >>> first = Metric("first", item=lambda outputs, targets, reference: outputs[:, 0])
    >>> without_number(first, np.array([[np.nan], [1]]), np.zeros(2))
    'nan or infinite for 1 of 2 items, of which item 0 is the first'
    """
    if value(metric, outputs, targets) is not None:
        return ""
    if metric.item is None:
        return "nan or infinite"
    lacking = np.flatnonzero(~np.isfinite(np.asarray(metric.item(outputs, targets, targets), np.float64)))
    if not len(lacking):
        return "infinite in its mean"
    return f"nan or infinite for {len(lacking):,} of {len(outputs):,} items, of which item {lacking[0]} is the first"


def value_of_constant(metric: Metric, kind: str, targets: np.ndarray, num_outputs: int) -> float | None:
    """A metric of answering always the same, as `constant` has it: what is reached without having learnt.

    >>> value_of_constant(PRIMARY["classes"], "classes", np.array([0, 0, 1]), 2)
    0.6666666666666666
    """
    return value(metric, constant(kind, targets, num_outputs), targets)


def constant(kind: str, targets: np.ndarray, num_outputs: int) -> np.ndarray:
    """The outputs [n, ...] that answer always the same: how often each class, label or token occurs, or the mean.

    They are logits of the shares among the `targets` [n, ...] that are answered, and of values their means. What a
    metric makes of them is reached without having learnt: accuracy the share of the most frequent class, R squared 0.

    >>> constant("values", np.array([[1.0], [3.0]]), 1).tolist()
    [[2.0], [2.0]]
    """
    targets = np.asarray(targets)
    if kind == "values":
        answer = targets.astype(np.float64).mean(0)
    elif kind == "labels":
        share = np.clip(targets.mean(0), 1e-6, 1 - 1e-6)
        answer = np.log(share) - np.log1p(-share)
    else:
        counts = np.bincount(targets[targets >= 0].ravel(), minlength=num_outputs)
        answer = np.log(np.maximum(counts, 1e-6) / max(1, counts.sum()))
    shape = targets.shape if kind in ("values", "labels") else (*targets.shape, num_outputs)
    return np.broadcast_to(answer, shape)
