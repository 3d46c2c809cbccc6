"""Evaluation: outputs of fits, and metrics of one fit from the outputs of its test examples.

Logits stand for the outputs of any head: [examples, classes] of classes, [examples, labels], [examples, values], or
[examples, length, vocabulary] of tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import metrics as measures
from tljax import train
from tljax.train import memory
from tljax.train.data import batch_spec, batch_within, batches, is_streamed
from tljax.train.features import skip_frozen_prefix
from tljax.train.step import specialize
from tljax.train.vectorize import divide, host, joined, mesh_of_group, mesh_under, over, place, shared_width
from tljax.types import Examples, Objective, Params

BATCH = memory.EXAMPLES
"""Examples in a compiled batch: the last is padded, so that one executable serves every data set of a shape. Of a model
that needs much memory for them a divisor of it is (`memory.examples_at_once`), unless `Execution.evaluation_batch` says
how many."""


def padded(arrays: Any, multiple: int = 0) -> train.Data:
    """Inputs, leaves [n, ...], on the device, with zeros after them up to a multiple of BATCH, or of another number."""
    multiple = multiple or BATCH

    def whole(leaf: np.ndarray) -> jax.Array:
        rows = np.zeros((-(-len(leaf) // multiple) * multiple, *leaf.shape[1:]), leaf.dtype)
        rows[: len(leaf)] = leaf
        return jax.device_put(rows[None])

    return train.Data(jax.tree.map(whole, arrays), None)


def held(
    examples: Examples, execution: train.Execution, rows: np.ndarray | None = None, what: str = "the test examples"
) -> train.Data | train.Stream:
    """Examples, or some rows of them (int [k]), to be evaluated under this execution: as `padded` gives them, up to a
    multiple of its batch, or streamed."""
    rows = np.arange(len(examples)) if rows is None else rows
    multiple = execution.evaluation_batch or BATCH
    if is_streamed(examples, execution.data, execution.devices, what):
        length = -(-len(rows) // multiple) * multiple
        return train.Stream(train.Rows(examples, rows, length), execution.stream_memory, what)
    whole = len(rows) == len(examples)
    arrays = examples.arrays if whole else jax.tree.map(lambda leaf: np.asarray(leaf)[rows], examples.arrays)
    return padded(arrays, multiple)


def logits_of(
    spec: train.Spec,
    fits: Sequence[train.Fit],
    state: train.State,
    data: train.Data | train.Stream,
    count: int,
    execution: train.Execution | None = None,
) -> Callable[[], np.ndarray]:
    """A function that waits for the logits float32 [fits of the state, count, classes] of the first `count` examples of
    data made by `held`.

    The devices compute them from now on, so the state may be given up to a segment before the function is called. The
    features of the stages that the state's masks freeze are computed once, and cached for later states.
    """
    execution = execution or train.Execution()
    members = [fits[i] for i in state.fits]
    specialized = replace(specialize(spec, members[0], state.masks[0]), augment=())
    width = shared_width(specialized, members, state.masks)
    mesh = mesh_of_group(len(members) // width, execution.devices, execution.devices_per_batch)
    params, passes = place(mesh, state.variables), len(data)
    shared = place(mesh, state.shared_variables, by_fit=False)
    short, features = skip_frozen_prefix(
        specialized, members[0], params, width, data, passes, execution.cache, lambda line: None, shared=shared
    )
    forward = train.forward(short.model, short.merge)
    if execution.evaluation_batch:
        execution.on_message(f"evaluated {execution.evaluation_batch:,} examples at a time, as asked")
    elif (batch := _batch(forward, params, features, shared)) < BATCH:
        execution.on_message(f"evaluated {batch} examples at a time: {BATCH:,} would need too much memory")
    return logits(forward, params, features, count, shared, execution.evaluation_batch)


def logits(
    forward: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    data: train.Data | train.Stream,
    count: int,
    shared: Params | None = None,
    batch: int = 0,
) -> Callable[[], np.ndarray]:
    """A function that waits for logits float32 [fits, count, classes], which the devices are computing from now on. Of
    a stream nothing is waited for: it is read before.

    `params` are variables with a leading axis of fits, on the devices of a mesh or not, with None for those in
    `shared`, which are the same for all fits and have no such axis. `batch` examples go through at once, by default as
    many as memory holds; a view of the data has a multiple of that many, as `padded` gives them. `forward` is (params,
    inputs [batch, ...]) -> logits [batch, classes], and compiled once for each object.
    """
    mesh, batch = mesh_under(params), batch or _batch(forward, params, data, shared)
    if isinstance(data, train.Data):
        outputs = _all_logits(forward, mesh, batch, params, data.inputs, shared)
        return lambda: host(outputs)[:, :count]
    size = batch_within(data, batch)

    def one_view(inputs: Any) -> Any:
        view = jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), inputs)
        return jax.device_put(view) if mesh is None else place(mesh, view, by_fit=False)

    with batches(data, size, one_view) as reader:
        parts = [host(_all_logits(forward, mesh, size, params, inputs, shared))[:, :rows] for rows, inputs in reader]
    whole = np.concatenate(parts, 1)[:, :count]
    return lambda: whole


def _batch(forward: Callable[..., Any], params: Params, data: train.Data | train.Stream, shared: Params | None) -> int:
    """Examples that go through `forward` at once: BATCH, or a divisor of it."""
    per_fit = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    return memory.examples_at_once(forward, joined(per_fit, shared), batch_spec(data, 1), BATCH)


@functools.partial(jax.jit, static_argnames=("forward", "mesh", "batch"))
def _all_logits(
    forward: Callable[[Params, jax.Array], jax.Array],
    mesh: Any,
    batch: int,
    params: Params,
    inputs: Any,
    shared: Params | None,
) -> jax.Array:
    batched = jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1, batch, *leaf.shape[2:]), inputs)
    views, batches = jax.tree.leaves(batched)[0].shape[:2]

    def fits_logits(params: Params, *common: Any) -> jax.Array:
        batched, shared = common

        def fit_logits(item: Any) -> jax.Array:
            per_fit, view = item
            params = joined(per_fit, shared)
            fetch = lambda i: jax.tree.map(lambda leaf: divide(mesh, leaf[view, i]), batched)  # noqa: E731
            return jax.lax.map(lambda i: forward(params, fetch(i)), jnp.arange(batches))

        fits, device_fits = len(jax.tree.leaves(params)[0]), len(jax.tree.leaves(batched)[0])
        outputs = jax.lax.map(fit_logits, (params, jnp.arange(fits) // (fits // device_fits)))
        return outputs.reshape(len(outputs), -1, *outputs.shape[3:])

    by_fit, common = ((params, batched), (shared,)) if views > 1 else ((params,), (batched, shared))
    return over(mesh, fits_logits, by_fit, common)


def measure(objective: Objective, outputs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """What an objective measures of a split: outputs and targets [n, ...].

    "score" is its primary metric, "metrics" has the others by name, and the rest is as `metrics` has it. For targets
    other than classes that is None, but for the loss: the mean over the items of the natural loss of their kind,
    whatever the fit minimised. Where outputs are not finite, all is None.
    """
    _, *others = objective.metrics
    finite = bool(np.isfinite(outputs).all())
    measured = dict(metrics(outputs, targets)) if objective.kind == "classes" else dict.fromkeys(_NAMES)
    if objective.kind != "classes" and finite:
        measured["loss"] = float(measures.NATURAL[objective.kind](outputs, targets).mean())
    values = {each.name: measures.value(each, outputs, targets) if finite else None for each in others}
    return {**measured, "score": score(objective, outputs, targets), "metrics": values}


def score(objective: Objective, outputs: np.ndarray, targets: np.ndarray) -> float | None:
    """The primary metric of a split, alone: "score" of `measure`, and None where outputs are not finite."""
    return measures.value(objective.metrics[0], outputs, targets) if np.isfinite(outputs).all() else None


_NAMES = ("accuracy", "loss", "calibration_error", "calibration", "per_class_accuracy", "confusion")


def metrics(logits: np.ndarray, labels: np.ndarray) -> Mapping[str, Any]:
    """Accuracy (a fraction), loss (nats), calibration (its error and its bins), per-class accuracy, confusion matrix.

    Logits float [n, classes], labels int [n]. The loss is the mean cross-entropy, whatever the fit minimised. The
    confusion matrix has counts, true classes in rows. The accuracy of a class without examples is None; where logits
    are not finite, as those of a fit that diverged, every metric is None.

    >>> round(metrics(np.log([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))["loss"], 4)
    0.8574
    """
    from scipy.special import log_softmax  # its import takes as long as a first segment

    if not np.isfinite(logits).all():
        return dict.fromkeys(_NAMES)
    classes = logits.shape[-1]
    log_p = log_softmax(logits.astype(np.float64), axis=-1)
    predicted = logits.argmax(-1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    counts = confusion.sum(1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "loss": float(-log_p[np.arange(len(labels)), labels].mean()),
        "calibration_error": calibration_error(np.exp(log_p), labels),
        "calibration": calibration(np.exp(log_p), labels),
        "per_class_accuracy": [
            float(correct / n) if n else None for correct, n in zip(np.diag(confusion), counts, strict=True)
        ],
        "confusion": confusion.tolist(),
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of equal width.

    Probabilities float [n, classes], labels int [n]. Guo et al. 2017, arXiv:1706.04599, eq. 3, with their 15 bins.

    >>> calibration_error(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1]))
    0.0
    """
    confidence, correct, bin_numbers = _binned(probabilities, labels, bins)
    gap = np.bincount(bin_numbers, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, list[Any]]:
    """The bins of a reliability diagram, of equal width in confidence, the lowest first.

    Probabilities float [n, classes], labels int [n]. Returns "confidence" and "accuracy", the means over the examples
    of each bin (fractions; None in an empty one), and "count", how many they are. The bins of `calibration_error`:
    Guo et al. 2017, arXiv:1706.04599, eqs. 1 and 2.

    >>> calibration(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1]), bins=2)
    {'confidence': [None, 0.75], 'accuracy': [None, 0.75], 'count': [0, 4]}
    """
    confidence, correct, bin_numbers = _binned(probabilities, labels, bins)
    counts = np.bincount(bin_numbers, minlength=bins).tolist()

    def bin_means(values: np.ndarray) -> list[float | None]:
        sums = np.bincount(bin_numbers, weights=values, minlength=bins).tolist()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    return {"confidence": bin_means(confidence), "accuracy": bin_means(correct), "count": counts}


def _binned(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence float [n], whether it is correct bool [n], its bin int [n]) of each example."""
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    return confidence, correct, np.minimum((confidence * bins).astype(int), bins - 1)
