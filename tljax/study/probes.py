"""Probes: classifiers of frozen features that need no training loop.

`ridge` is exact and picks its own penalty, `logistic` is the convex problem that a linear probe descends on,
`nearest_neighbours` and `nearest_mean` have no weights. All in float64 on the host.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import log_softmax

from tljax.study.examples import Decomposed, centred, checked, decomposed, grouped, numbers, one_hot
from tljax.types import InputError

_BLOCK = 1024
"""Queries at a time: their distances to 10,000 examples take 80 MB."""


class Linear(NamedTuple):
    """A fitted linear classifier."""

    weights: np.ndarray
    """float64 [d, classes]."""
    bias: np.ndarray
    """float64 [classes]."""
    penalty: float
    """What multiplied the squared weights."""

    def logits(self, features: ArrayLike) -> np.ndarray:
        """float64 [m, classes] of features float [m, d]; the class is the argmax. Raises InputError for another d."""
        return _queries(features, len(self.weights)) @ self.weights + self.bias


def ridge(features: ArrayLike, labels: ArrayLike, penalties: Sequence[float] | None = None) -> Linear:
    """One-vs-all least squares on targets of +1 and -1: the penalty of least leave-one-out error, in closed form.

    Minimises sum_i |t_i - W.T @ x_i - b|^2 + penalty |W|^2, features float [n, d], labels int [n]; the bias is not
    penalised. Of `penalties` (positive) the one of least `leave_one_out` is taken, the largest in a tie; without, of
    25 from 1e-8 to 1e4 times the mean squared singular value of the centred features, so that predictions do not
    depend on the features' unit. Logits are no log-probabilities. Raises InputError (see `examples.checked`), and
    for a penalty that is not positive.

    >>> ridge([[-2.0], [-1.0], [1.0], [2.0]], [0, 0, 1, 1]).logits([[3.0]]).argmax(axis=1).tolist()
    [1]
    """
    examples = checked(features, labels)
    targets = 2 * one_hot(examples.labels, examples.classes) - 1
    mean = targets.mean(axis=0)
    svd = decomposed(centred(examples.features), examples.rounding)
    ordered = _ordered(svd, penalties)
    errors = leave_one_out(features, labels, ordered)
    penalty = ordered[int(errors.argmin())]
    weights = svd.v.T @ ((svd.s / (svd.s**2 + penalty))[:, None] * (svd.u.T @ (targets - mean)))
    return Linear(weights, mean - examples.features.mean(axis=0) @ weights, float(penalty))


def _ordered(svd: Decomposed, penalties: Sequence[float] | None) -> list[float]:
    """Penalties of `ridge`, the largest first; raises InputError for one that is not positive."""
    if penalties is None:
        penalties = [float(p) for p in np.logspace(4, -8, 25) * ((svd.s**2).mean() if len(svd.s) else 1.0)]
    _require_positive(penalties)
    return sorted(penalties, reverse=True)


def _require_positive(penalties: Sequence[float]) -> None:
    if not len(penalties) or not all(0 < penalty < np.inf for penalty in penalties):
        raise InputError(f"penalties {list(penalties)}: give one or more, all positive")


def leave_one_out(
    features: ArrayLike, labels: ArrayLike, penalties: Sequence[float], groups: ArrayLike | None = None
) -> np.ndarray:
    """Mean squared error of `ridge` on the example left out, exactly, without a refit: float64 [penalties].

    An example's residual over 1 - h, with h its entry on the diagonal of the hat matrix, bias included; the mean is
    over examples and classes. Source: Allen 1974, "The relationship between variable selection and data
    augmentation and a method for prediction" (PRESS). With `groups` int [n] all examples of a group are left out
    together. Raises InputError as `ridge` does.

    >>> leave_one_out([[0.0], [1.0], [3.0]], [0, 0, 1], [1e-9]).round(3).tolist()
    [1.815]
    """
    examples = checked(features, labels)
    _require_positive(penalties)
    targets = 2 * one_hot(examples.labels, examples.classes) - 1
    svd = decomposed(centred(examples.features), examples.rounding)
    alone = np.arange(len(targets)) if groups is None else grouped(examples.features, examples.labels, groups)
    return np.array([(_left_out(svd, targets, penalty, alone) ** 2).mean() for penalty in penalties])


def _left_out(svd: Decomposed, targets: np.ndarray, penalty: float, groups: np.ndarray) -> np.ndarray:
    """Targets float64 [n, classes] less what ridge predicts of them that learnt without the group of the example.

    `svd` is of the centred features. Of a group the residuals are those of all examples times the inverse of the
    group's block of one less the hat matrix.
    """
    n = len(targets)
    targets = targets - targets.mean(axis=0)
    along = svd.u.T @ targets
    # What no feature reaches: nothing at all where n - 1 directions reach everything but the mean.
    free = len(svd.s) < n - 1
    off = (targets - svd.u @ along) * free
    open_ = np.maximum(1 - 1 / n - (svd.u**2).sum(axis=1), 0) * free
    # As 1 - h and not h: the difference would lose all digits where h is almost 1.
    left = penalty / (svd.s**2 + penalty)
    residual = off + svd.u @ (left[:, None] * along)
    result = residual / (open_ + svd.u**2 @ left)[:, None]
    sizes = np.bincount(groups)
    for group in np.flatnonzero(sizes > 1):
        members = np.flatnonzero(groups == group)
        u = svd.u[members]
        block = free * (np.eye(len(members)) - 1 / n - u @ u.T) + (u * left) @ u.T
        result[members] = np.linalg.lstsq(block, residual[members], rcond=None)[0]
    return result


def left_out(
    features: ArrayLike, labels: ArrayLike, penalties: Sequence[float] | None = None, groups: ArrayLike | None = None
) -> np.ndarray:
    """Logits of `ridge` for each example, as it learns from all others: float64 [n, classes], without a refit.

    Features float [n, d], labels int [n], `penalties` those of `ridge`: the one of least squared error on what is
    left out is taken for all. Examples of a group are left out together; without `groups` int [n] these are copies
    (see `examples.grouped`). The mean of the targets is that of all examples: to leave one out would make its class
    rarer, and count against it where features say little. Rounded to nine digits: what is below is rounding, and would
    know the label where features say nothing. Source: as `leave_one_out`. Raises InputError as `ridge` does, and for
    groups that are not integers or not as many.

    >>> left_out([[-2.0], [-1.0], [1.0], [2.0]], [0, 0, 1, 1]).argmax(axis=1).tolist()
    [0, 0, 1, 1]
    """
    examples = checked(features, labels)
    targets = 2 * one_hot(examples.labels, examples.classes) - 1
    svd = decomposed(centred(examples.features), examples.rounding)
    together = grouped(examples.features, examples.labels, groups)
    residuals = [_left_out(svd, targets, penalty, together) for penalty in _ordered(svd, penalties)]
    result = targets - min(residuals, key=lambda residual: float((residual**2).mean()))
    # The mean of the targets without the group of each example, which the residuals are from.
    sizes, sums = np.bincount(together), np.zeros((together.max() + 1, examples.classes))
    np.add.at(sums, together, targets)
    rest = np.maximum(len(targets) - sizes, 1)[:, None]
    without = (targets.sum(axis=0) - sums) / rest
    return np.asarray((result + targets.mean(axis=0) - without[together]).round(9))


def logistic(features: ArrayLike, labels: ArrayLike, l2: float = 1e-3) -> Linear:
    """Multinomial logistic regression: the least of mean cross-entropy (nats) + l2/2 |W|^2, by L-BFGS.

    Features float [n, d], labels int [n]; the bias is not penalised. scikit-learn's C is 1 / (n l2), for two classes
    2 / (n l2). The penalty makes the optimum unique in W; weights and biases sum to 0 over classes. Raises InputError
    (see `examples.checked`), for an l2 that is not positive (separable classes would then have no optimum), and where
    L-BFGS stops at a gradient above 1e-6, in units of the features.

    >>> probe = logistic([[-2.0], [-1.0], [1.0], [2.0]], [0, 0, 1, 1], l2=0.1)
    >>> probe.logits([[3.0]]).argmax(axis=1).tolist(), bool(abs(probe.bias.sum()) < 1e-9)
    ([1], True)
    """
    x, y, classes, _ = checked(features, labels)
    if not 0 < l2 < np.inf:
        raise InputError(f"l2 {l2} of logistic: give a positive number, such as 1e-3")
    mean, targets = x.mean(axis=0), one_hot(y, classes)
    x = centred(x)
    # Features and penalty of at most about 1: curvatures are alike, and a small gradient is small in any unit.
    unit = max(np.sqrt((x**2).mean()), np.sqrt(l2))
    x, within = x / unit, l2 / unit**2

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[classes:].reshape(-1, classes), flat[:classes]
        logs = log_softmax(x @ weights + bias, axis=1)
        value = -(logs * targets).sum() / len(y) + within / 2 * (weights**2).sum()
        error = (np.exp(logs) - targets) / len(y)
        return value, np.concatenate([error.sum(axis=0), (x.T @ error + within * weights).ravel()])

    options = {"maxiter": 10_000, "maxfun": 20_000, "maxcor": 20, "ftol": 0.0, "gtol": 1e-8}
    found = minimize(cost, np.zeros(classes * (x.shape[1] + 1)), jac=True, method="L-BFGS-B", options=options)
    steepest = np.abs(cost(found.x)[1]).max()
    if not steepest < 1e-6:
        raise InputError(f"logistic stopped at a gradient of {steepest:.1e}: raise l2 {l2:g}, or scale the features")
    weights, bias = found.x[classes:].reshape(-1, classes) / unit, found.x[:classes]
    return Linear(weights, bias - mean @ weights, l2)


def nearest_neighbours(
    features: ArrayLike, labels: ArrayLike, queries: ArrayLike, k: int = 5, *, cosine: bool = False
) -> np.ndarray:
    """The vote of the `k` nearest examples: int64 [m] for queries float [m, d].

    Features float [n, d], labels int [n]. Distances and ties are those of `transferability.knn`. Raises InputError
    (see `examples.checked`), for queries of another d and for k outside 1..n.

    >>> nearest_neighbours([[0.0], [1.0], [5.0]], [0, 0, 1], [[0.4], [4.0]], k=1).tolist()
    [0, 1]
    """
    x, y, *_ = checked(features, labels)
    return vote(y[neighbours(x, _queries(queries, x.shape[1]), k, cosine=cosine)])


def nearest_mean(features: ArrayLike, labels: ArrayLike, queries: ArrayLike) -> np.ndarray:
    """The class whose mean is nearest in Euclidean distance: int64 [m] for queries float [m, d].

    Features float [n, d], labels int [n]. Source: Mensink et al. 2013, "Distance-based image classification:
    generalizing to new classes at near-zero cost", with the identity for its metric. Raises InputError (see
    `examples.checked`), and for queries of another d.

    >>> nearest_mean([[0.0], [1.0], [5.0]], [0, 0, 1], [[2.0], [3.0]]).tolist()
    [0, 1]
    """
    x, y, classes, _ = checked(features, labels)
    means = one_hot(y, classes).T @ x / np.bincount(y)[:, None]
    return neighbours(means, _queries(queries, x.shape[1]), 1)[:, 0]


def neighbours(
    features: np.ndarray, queries: np.ndarray, k: int, *, cosine: bool = False, groups: np.ndarray | None = None
) -> np.ndarray:
    """Which `k` of the features float64 [n, d] are nearest to each query, the nearest first: int64 [m, k].

    With `groups` int64 [n] queries are the features themselves: none is its own neighbour, and those of its group
    come after all others. Raises InputError for a k that there are not.
    """
    n = len(features) - (groups is not None)
    several = groups is not None and len(np.unique(groups)) < len(features)
    if not 1 <= k <= n:
        raise InputError(f"k={k} of {n} neighbours: give 1 to {n}")
    # Distances do not change, and as differences of squares lose fewer digits.
    middle = 0 if cosine else features.mean(axis=0)
    x, q = (_unit(rows) if cosine else rows - middle for rows in (features, queries))
    squares = (x**2).sum(axis=1)
    found = np.empty((len(q), k), np.int64)
    for start in range(0, len(q), _BLOCK):
        block = slice(start, start + _BLOCK)
        distance = squares - 2 * (q[block] @ x.T)
        rows = np.arange(len(distance))[:, None]
        if groups is not None:
            if several:
                distance[groups[block, None] == groups] = np.finfo(float).max
            distance[rows[:, 0], start + rows[:, 0]] = np.inf
        nearest = np.sort(np.argpartition(distance, k - 1, axis=1)[:, :k], axis=1)
        found[block] = nearest[rows, np.argsort(distance[rows, nearest], axis=1, kind="stable")]
    return found


def vote(labels: np.ndarray) -> np.ndarray:
    """The most frequent label of each row, in a tie the first of the tied: int64 [m] from int64 [m, k].

    >>> vote(np.array([[2, 1, 1], [2, 1, 0]])).tolist()
    [1, 2]
    """
    votes = np.zeros(labels.shape, np.int64)
    for column in labels.T:
        votes += labels == column[:, None]
    return labels[np.arange(len(labels)), votes.argmax(axis=1)]


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def _queries(features: ArrayLike, d: int) -> np.ndarray:
    queries = numbers(features, "queries")
    if queries.shape[1] != d:
        raise InputError(f"queries have {queries.shape[1]} columns, the probe was fitted on {d}: give the same layer")
    return queries
