"""Metrics of one fit, from the logits of its test examples."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import parallel
from tljax.types import Params, Views

BATCH = 1000
"""Examples a compiled batch: the last is padded, so that one executable serves every data set of a shape."""


def padded(images: np.ndarray) -> jax.Array:
    """Images [n, ...] on the device, with zeros up to a multiple of BATCH."""
    whole = np.zeros((-(-len(images) // BATCH) * BATCH, *images.shape[1:]), images.dtype)
    whole[: len(images)] = images
    return jax.device_put(whole)


def logits(forward: Callable[[Params, jax.Array], jax.Array], params: Params, views: Views, count: int) -> np.ndarray:
    """Logits float32 [trials, count, classes]: `params` with a leading axis of trials, on the devices of a mesh or not.

    A view has a multiple of BATCH examples, as `padded` gives them. `forward` is (params, images [batch, ...]) ->
    logits [batch, classes], and compiled once an object.
    """
    return parallel.host(_all(forward, parallel.of(params), params, views))[:, :count]


@functools.partial(jax.jit, static_argnames=("forward", "mesh"))
def _all(forward: Callable[[Params, jax.Array], jax.Array], mesh: Any, params: Params, views: Views) -> jax.Array:
    many = not isinstance(views, tuple)
    all_views = views[0][None] if isinstance(views, tuple) else views
    batched = all_views.reshape(len(all_views), -1, BATCH, *all_views.shape[2:])

    def every(params: Params, *rest: jax.Array) -> jax.Array:
        def trial(item: Any) -> jax.Array:
            own, which = item
            part = lambda i: parallel.divide(mesh, rest[0][which, i])  # noqa: E731
            return jax.lax.map(lambda i: forward(own, part(i)), jnp.arange(batched.shape[1]))

        trials = len(jax.tree.leaves(params)[0])
        which = jnp.arange(trials) // (trials // len(rest[0]))
        out = jax.lax.map(trial, (params, which))
        return out.reshape(len(out), -1, out.shape[-1])

    split, common = ((params, batched), ()) if many else ((params,), (batched,))
    return parallel.over(mesh, every, split, common)


def metrics(logits: np.ndarray, labels: np.ndarray) -> Mapping[str, Any]:
    """Accuracy (a fraction), loss (nats), calibration (its error, its bins), per-class accuracy, confusion matrix.

    Logits float [n, classes], labels int [n]. Loss is the mean cross-entropy, whatever the fit minimised. Confusion
    counts have true classes in rows. A class without examples has accuracy None; logits that are not finite, as of
    a fit that diverged, have no metric at all.

    >>> round(metrics(np.log([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))["loss"], 4)
    0.8574
    """
    from scipy.special import log_softmax  # takes as long to import as a first segment

    if not np.isfinite(logits).all():
        names = ("accuracy", "loss", "calibration_error", "calibration", "per_class_accuracy", "confusion")
        return dict.fromkeys(names)
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
            float(right / n) if n else None for right, n in zip(np.diag(confusion), counts, strict=True)
        ],
        "confusion": confusion.tolist(),
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of equal width.

    Probabilities float [n, classes], labels int [n]. Guo et al. 2017, arXiv:1706.04599, eq. 3, with their 15 bins.

    >>> calibration_error(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1]))
    0.0
    """
    confidence, right, where = _binned(probabilities, labels, bins)
    gap = np.bincount(where, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, list[Any]]:
    """The bins of a reliability diagram, of equal width in confidence, the lowest first.

    Probabilities float [n, classes], labels int [n]. Returns "confidence" and "accuracy", the means over the examples
    of each bin (fractions; None in an empty one), and "count", how many they are. The bins of `calibration_error`:
    Guo et al. 2017, arXiv:1706.04599, eqs. 1 and 2.

    >>> calibration(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1]), bins=2)
    {'confidence': [None, 0.75], 'accuracy': [None, 0.75], 'count': [0, 4]}
    """
    confidence, right, where = _binned(probabilities, labels, bins)
    counts = np.bincount(where, minlength=bins).tolist()

    def means(values: np.ndarray) -> list[float | None]:
        sums = np.bincount(where, weights=values, minlength=bins).tolist()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    return {"confidence": means(confidence), "accuracy": means(right), "count": counts}


def _binned(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence float [n], whether right bool [n], bin int [n]) of each example."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    return confidence, right, np.minimum((confidence * bins).astype(int), bins - 1)
