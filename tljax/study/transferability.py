"""Which source? Scores that rank sources for a target, from what a source makes of the target's examples.

Every score is a float, more is better, and compares sources on the same examples of one target only. From features
(the last layer before the head): `knn`, `probe`, `logme`, `h_score`, `h_score_shrunk`, `transrate`, `gbc`, `n_leep`.
From what the source's own head predicts: `leep` (probabilities), `nce` (classes). Where nothing else is known take
`knn`: it ranked better than 23 such scores over 42,000 transfers (arXiv:2503.18528).

Of features that are noise `h_score`, `transrate`, `gbc` and `n_leep`, as their papers have them, are the higher the
more features there are: they judge the examples that they were computed from. `h_score_adjusted`,
`transrate_adjusted` and `gbc_adjusted` take off what labels at random give, `n_leep_left_out` leaves the example out.
These compare sources of different width, at few labels too. `leep` and `nce` have the same fault where the source has
many classes: nce of labels at random is above minus their entropy by about (classes - 1)(source classes - 1) / 2n.

scikit-learn gives the mixture of `n_leep` and the shrinkage of `h_score_shrunk`. The neighbours of `knn` and the ridge
of `probe` are written out here: scikit-learn leaves out one example at a time, where copies must be left out together,
and does not say which of two equally far neighbours comes first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.mixture import GaussianMixture

from tljax.types import InputError


class Examples(NamedTuple):
    """Checked features and labels."""

    features: np.ndarray
    """float64 [n, d], finite."""
    labels: np.ndarray
    """int64 [n], every one of 0..classes-1 among them."""
    classes: int
    """Two or more."""
    rounding: float
    """Size of the rounding error of a feature, in its unit: of the dtype in which the features came."""


class Decomposed(NamedTuple):
    """Thin singular value decomposition u @ diag(s) @ v, without what is zero but for rounding."""

    u: np.ndarray
    """float64 [n, rank], orthonormal columns."""
    s: np.ndarray
    """float64 [rank], positive, descending."""
    v: np.ndarray
    """float64 [rank, d], orthonormal rows."""


def knn(
    features: ArrayLike, labels: ArrayLike, k: int = 5, *, cosine: bool = False, groups: ArrayLike | None = None
) -> float:
    """Leave-one-out accuracy (a fraction) of the vote of the `k` nearest other examples.

    Features float [n, d], labels int [n]. Source: arXiv:2503.18528, which holds out a part of the examples where this
    holds out each in turn. Distances are Euclidean, or with `cosine` between features scaled to length 1. A tie of
    votes goes to the nearest neighbour among the tied. Examples of one of `groups` int [n] do not vote for each other
    while there are k others; without groups these are copies (see `grouped`), which would vote for
    themselves. Unchanged by rotations, shifts and one scale for all features (with `cosine` by rotations and a scale
    an example). Where many examples are equally far, as in features that are all alike, which of them count is
    arbitrary. Raises InputError for bad features and labels (see `checked`), for groups that are not
    integers or not as many, and for k outside 1..n-1.

    >>> knn([[0.0], [0.1], [0.2], [5.0], [5.1], [0.3]], [0, 0, 0, 1, 1, 1], k=1)
    0.8333333333333334
    """
    x, y, *_ = _checked(features, labels)
    return float((vote(y[neighbours(x, k, grouped(x, y, groups), cosine=cosine)]) == y).mean())


def neighbours(features: np.ndarray, k: int, groups: np.ndarray, *, cosine: bool = False) -> np.ndarray:
    """Which `k` other examples are nearest to each, the nearest first: int64 [n, k] of features float64 [n, d].

    Examples of one group, int64 [n], are the last of each other's neighbours. Of equally far examples the first comes
    first. Raises InputError for k outside 1..n-1.
    """
    n = len(features) - 1
    several = len(np.unique(groups)) < len(features)
    if not 1 <= k <= n:
        raise InputError(f"k={k} of {n} neighbours: give 1 to {n}")
    # Shifted to their mean, distances do not change, and as differences of squares lose fewer digits.
    x = _unit(features) if cosine else features - features.mean(axis=0)
    squares = (x**2).sum(axis=1)
    result = np.empty((len(x), k), np.int64)
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        distance = squares - 2 * (x[block] @ x.T)
        rows = np.arange(len(distance))[:, None]
        if several:
            distance[groups[block, None] == groups] = np.finfo(float).max
        distance[rows[:, 0], start + rows[:, 0]] = np.inf
        nearest = np.sort(np.argpartition(distance, k - 1, axis=1)[:, :k], axis=1)
        result[block] = nearest[rows, np.argsort(distance[rows, nearest], axis=1, kind="stable")]
    return result


_BLOCK = 1024
"""Examples at a time: their distances to 10,000 others take 80 MB."""


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


def probe(features: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Accuracy (a fraction) of a ridge probe on each example, as it learns from the others (see `left_out`).

    Features float [n, d], labels int [n], groups as `left_out` has them. Unchanged by rotations, shifts and one scale
    for all features. Raises InputError for bad features and labels (see `checked`), and where each class has one
    example.

    >>> probe([[-2.0], [-1.0], [1.0], [2.0]], [0, 0, 1, 1])
    1.0
    """
    y = np.asarray(labels)
    if len(np.unique(y)) == y.size:
        raise InputError(
            f"a probe of {y.size} examples, one a class, holds none out to be judged by: give two of a class"
        )
    return float((left_out(features, y, groups=groups).argmax(axis=1) == y).mean())


def left_out(
    features: ArrayLike, labels: ArrayLike, penalties: Sequence[float] | None = None, groups: ArrayLike | None = None
) -> np.ndarray:
    """Logits of ridge regression for each example, as it learns from all others: float64 [n, classes].

    Features float [n, d], labels int [n]. One-vs-all least squares on targets t_i of +1 and -1 minimise
    sum_i |t_i - W.T @ x_i - b|^2 + penalty |W|^2; the bias is not penalised. Of `penalties` (positive) the one of least
    squared error on what is left out is taken for all examples, the largest in a tie; without, of 25 from 1e-8 to 1e4
    times the mean squared singular value of the centred features, so that predictions do not depend on the features'
    unit. What is left out is predicted exactly, without a refit: the residual over 1 - h, with h the example's entry on
    the diagonal of the hat matrix, bias included. Source: Allen 1974, "The relationship between variable selection and
    data augmentation and a method for prediction" (PRESS).

    Examples of a group are left out together; without `groups` int [n] these are copies (see `grouped`). The mean of
    the targets is that of all examples: to leave one out would make its class rarer, and count against it where
    features say little. Logits are no log-probabilities. They are rounded to nine digits: what is below is rounding,
    and would know the label where features say nothing. Raises InputError for bad features and labels (see `checked`),
    for a penalty that is not positive, and for groups that are not integers or not as many.

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


def _ordered(svd: Decomposed, penalties: Sequence[float] | None) -> list[float]:
    """The penalties of `left_out`, the largest first; raises InputError for one that is not positive."""
    if penalties is None:
        penalties = [float(p) for p in np.logspace(4, -8, 25) * ((svd.s**2).mean() if len(svd.s) else 1.0)]
    if not len(penalties) or not all(0 < penalty < np.inf for penalty in penalties):
        raise InputError(f"penalties {list(penalties)}: give one or more, all positive")
    return sorted(penalties, reverse=True)


def _left_out(svd: Decomposed, targets: np.ndarray, penalty: float, groups: np.ndarray) -> np.ndarray:
    """Targets float64 [n, classes] less their predictions by ridge regression without the group of the example.

    `svd` is of the centred features. The residuals of a group are those of all examples times the inverse of the
    group's block of the identity less the hat matrix.
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


def logme(features: ArrayLike, labels: ArrayLike) -> float:
    """Logarithm of the maximum evidence (nats an example) of Bayesian linear regression on one-hot labels.

    Features float [n, d], labels int [n]. Source: You et al. 2021, arXiv:2102.11005, equation 2, the mean over
    classes. The paper iterates alpha and beta, which may stop at the lesser of two maxima; here the greatest is
    sought over alpha / beta, with beta in closed form. Features are not centred, as in the paper. Unchanged by
    rotations and one scale for all features. Where a class is best explained by no feature, alpha has no bound
    and the limit is what counts.

    Where the rank r of the features is below n and they still give a class exactly, the evidence has no bound: the
    n - r dimensions that features do not reach say "no noise", each without end. Three causes have three answers.
    Copies of an example (see `grouped`) count once. What is left and has n < 2 r, such as two examples on
    one line, or one whose units are all dead, can be chance (Cover 1965, "Geometrical and statistical properties of
    systems of linear inequalities"): the r dimensions count, by examples. More examples are no chance: such features
    separate the classes perfectly, and the variance of the noise, 1 / beta, is taken to be 1e-8 of the labels', so
    that they score high, and below inf. Raises InputError (see `checked`).

    >>> round(logme([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, 0.0]], [0, 0, 1, 1]), 3)
    -1.008
    """
    x, y, classes, error = _checked(features, labels)
    targets = one_hot(y, classes)
    evidence = _evidence(x, targets, error, len(y))
    unbounded = np.isinf(evidence)
    if unbounded.any():
        _, first = np.unique(grouped(x, y), return_index=True)
        evidence[unbounded] = _evidence(x[first], targets[first][:, unbounded], error, len(y), bounded=True)
    return float(evidence.mean()) / len(y)


_LEAST_NOISE = 1e-8
"""The least variance of the noise, as a share of the labels' variance."""


def _evidence(x: np.ndarray, targets: np.ndarray, error: float, total: int, bounded: bool = False) -> np.ndarray:
    """The greatest log evidence of each column of targets float64 [n, classes]: inf where it has no bound.

    With `bounded` it is finite, as `logme` says. It is scaled from the examples that count to `total`.
    """
    n, svd = len(x), decomposed(x, error)
    along = svd.u.T @ targets
    rest = ((targets - svd.u @ along) ** 2).sum(axis=0)
    share = targets.mean(axis=0)
    least = _LEAST_NOISE * n * share * (1 - share)
    evidence = []
    for c in range(targets.shape[1]):
        exact, size, off = len(svd.s) < n and rest[c] <= least[c], n, rest[c]
        if exact and not bounded:
            evidence.append(np.inf)
            continue
        if exact and n < 2 * len(svd.s):
            size, off = len(svd.s), 0.0
        elif exact:
            off = least[c]
        evidence.append(_log_evidence(svd.s**2, along[:, c] ** 2, off * (len(svd.s) < size), size) * (total / size))
    return np.array(evidence)


def _log_evidence(spectrum: np.ndarray, along: np.ndarray, rest: float, n: int) -> float:
    """Maximum over the ratio t = alpha / beta: `spectrum` holds s**2, `along` (u.T @ y)**2, `rest` what is off u.

    It has a bound where rest > 0, or the rank is n.
    """

    def cost(log_t: np.ndarray) -> np.ndarray:
        t = np.exp(log_t)[..., None]
        return n * np.log(rest + (along * t / (t + spectrum)).sum(-1)) + np.log1p(spectrum / t).sum(-1)

    constant = n * (np.log(n) - 1 - np.log(2 * np.pi))
    least = n * np.log(rest + along.sum())  # the limit of t without bound: no feature is used
    if len(spectrum):
        # The ends are where the limits are reached to rounding, that of t = 0 too where it is finite.
        grid = np.arange(np.log(spectrum[-1]) - 80, np.log(spectrum[0]) + 25, 0.5)
        near = grid[cost(grid).argmin()]
        optimum = minimize_scalar(cost, bounds=(near - 1, near + 1), method="bounded", options={"xatol": 1e-9})
        least = min(least, optimum.fun)
    return float(constant - least) / 2


def h_score(features: ArrayLike, labels: ArrayLike) -> float:
    """tr(cov(f)^+ cov(E[f | y])): the variance of features that the classes explain, in units of all of it.

    Features float [n, d], labels int [n]; between 0 and classes - 1. Source: Bao et al. 2019, "An
    information-theoretic approach to transferability in task transfer learning"; the pseudo-inverse makes constant
    and collinear features harmless, up to the rounding of the dtype in which they come (see `decomposed`).
    Unchanged by invertible affine maps of the features. Of labels at random it is rank (classes - 1) / (n - 1) in the
    mean, the more the wider the features: `h_score_adjusted` takes that off. Raises InputError (see
    `checked`), and where features tell every example from all others (rank n - 1), as then the score is
    classes - 1 whatever the labels.

    >>> round(h_score([[1.0, 7.0], [3.0, 7.0], [-1.0, 7.0], [-3.0, 7.0]], [0, 0, 1, 1]), 3)
    0.8
    """
    return _h_score(_checked(features, labels))[0]


def _h_score(examples: Examples) -> tuple[float, int]:
    """(the H-score, the rank of the features)."""
    x, y, classes, error = examples
    svd = decomposed(centred(x), error)
    rank = len(svd.s)
    if rank >= len(y) - 1:
        raise InputError(
            f"h_score of {len(y)} examples whose features have rank {rank} is {classes - 1} whatever the labels: "
            "give more examples, or take h_score_shrunk"
        )
    sums = one_hot(y, classes).T @ svd.u
    return float((sums**2 / np.bincount(y)[:, None]).sum()), rank


def h_score_adjusted(features: ArrayLike, labels: ArrayLike) -> float:
    """`h_score` above that of labels at random, as a fraction of the most that is possible.

    (h - m) / (classes - 1 - m) with m = rank (classes - 1) / (n - 1), exactly the mean over all permutations of the
    labels: 0 in the mean of features that are noise, of any width, and 1 at the most. Features float [n, d], labels
    int [n]. Source: h_score is the trace of Pillai 1955, "Some new test criteria in multivariate analysis", and this
    is to it what the adjusted R squared of Wherry 1931, "A new formula for predicting the shrinkage of the coefficient
    of multiple correlation", is to R squared. Unchanged by invertible affine maps. Of noise its standard deviation is
    about sqrt(2 rank / ((classes - 1) n (n - rank))): with few more examples than features it says little. Raises
    InputError as `h_score` does.

    >>> round(h_score_adjusted([[1.0, 7.0], [3.0, 7.0], [-1.0, 7.0], [-3.0, 7.0]], [0, 0, 1, 1]), 3)
    0.7
    """
    examples = _checked(features, labels)
    value, rank = _h_score(examples)
    most = examples.classes - 1
    chance = rank * most / (len(examples.labels) - 1)
    return (value - chance) / (most - chance)


def h_score_shrunk(features: ArrayLike, labels: ArrayLike) -> float:
    """The H-score with a covariance shrunk by Ledoit and Wolf, for few examples in many dimensions.

    (1 - a) tr(cov_a(f)^-1 cov(E[f | y])) with cov_a(f) = (1 - a) cov(f) + a tr(cov(f))/d I; covariances divide by n.
    Features float [n, d], labels int [n]. Source: Ibrahim et al. 2021, arXiv:2110.06893; `a` is Ledoit
    and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", from scikit-learn.
    Unchanged by rotations, shifts and one scale for all features. Features that do not vary score 0. Raises
    InputError (see `checked`).

    >>> round(h_score_shrunk([[1.0, 7.0], [3.0, 7.5], [-1.0, 7.5], [-3.0, 7.0]], [0, 0, 1, 1]), 3)
    0.642
    """
    x, y, classes, _ = _checked(features, labels)
    x = centred(x)
    if not x.any():
        return 0.0
    x /= np.abs(x).max()
    shrinkage = ledoit_wolf_shrinkage(x, assume_centered=True)
    # Class means lie where the examples vary, so that no other direction counts.
    svd = decomposed(x)
    variances = svd.s**2 / len(y)
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.sum() / x.shape[1]
    sums = one_hot(y, classes).T @ svd.u
    between = (sums**2 / np.bincount(y)[:, None]).sum(axis=0) * variances
    return float((1 - shrinkage) * (between / shrunk).sum())


def transrate(features: ArrayLike, labels: ArrayLike, epsilon: float = 1e-4) -> float:
    """Coding rate (nats) of the features less that within classes: an estimate of their mutual information.

    R(Z) - sum_c n_c/n R(Z_c) with R(Z) = 1/2 ln det(I + Z.T @ Z / (n epsilon)), Z float [n, d] centred once over all
    examples, Z_c its n_c rows of class c; labels int [n]. Source: Huang et al. 2022, arXiv:2106.09362; its listing
    weighs classes equally, which is the same where they are equally large. `epsilon`, the distortion, is that
    listing's and in the square of the features' unit: features are not scaled here, as they are not there, so scores
    of sources whose features differ in scale differ for that. Of noise it is the higher the more features there are
    (1.7, 40 and 1,538 nats of 32, 128 and 512 at 1,500 examples of 10 classes): `transrate_adjusted` takes that off.
    Unchanged by rotations and shifts. Raises InputError (see `checked`), and for an epsilon that is not
    positive.

    >>> round(transrate([[1.0], [1.0], [-1.0], [-1.0]], [0, 0, 1, 1], epsilon=1.0), 3)
    0.0
    >>> round(transrate([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0, 0, 1, 1], epsilon=1.0), 3)
    0.059
    """
    x, y, classes = _components(features, labels, epsilon)
    return float(_coding_rate(x, epsilon) - _within(x, y, classes, epsilon))


def transrate_adjusted(
    features: ArrayLike, labels: ArrayLike, epsilon: float = 1e-4, *, permutations: int = 20, seed: int = 0
) -> float:
    """`transrate` less its mean over labels at random: `permutations` of them, of `seed`; nats.

    0 in the mean of features that are noise, of any width. Features float [n, d], labels int [n]. Source: the
    permutation null of Pitman 1937, "Significance tests which may be applied to samples from any populations".
    Depends on the features' unit and is unchanged by rotations and shifts, as `transrate` is. Raises InputError as
    `transrate` does, and for less than one permutation.

    >>> x = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    >>> round(transrate_adjusted(x, [0, 0, 1, 1], epsilon=1.0), 2)
    0.04
    """
    x, y, classes = _components(features, labels, epsilon)
    chance = _by_chance(lambda other: _within(x, other, classes, epsilon), y, permutations, seed)
    return chance - _within(x, y, classes, epsilon)


def _by_chance(score: Callable[[np.ndarray], float], labels: np.ndarray, permutations: int, seed: int) -> float:
    """The mean of a score over labels in another order."""
    if permutations < 1:
        raise InputError(f"permutations={permutations}: give 1 or more, such as 20")
    rng = np.random.default_rng(seed)
    return float(np.mean([score(rng.permutation(labels)) for _ in range(permutations)]))


def _components(features: ArrayLike, labels: ArrayLike, epsilon: float) -> tuple[np.ndarray, np.ndarray, int]:
    """(centred features float64 [n, d], or their principal components where these are fewer; labels, classes)."""
    x, y, classes, error = _checked(features, labels)
    if not 0 < epsilon < np.inf:
        raise InputError(f"epsilon {epsilon} is no distortion: give a positive number, such as 1e-4")
    x = centred(x)
    svd = decomposed(x, error)
    return x if len(svd.s) == min(len(x) - 1, x.shape[1]) else svd.u * svd.s, y, classes


def _within(x: np.ndarray, labels: np.ndarray, classes: int, epsilon: float) -> float:
    """The mean coding rate of the classes, by their sizes."""
    return float(sum((labels == c).mean() * _coding_rate(x[labels == c], epsilon) for c in range(classes)))


def _coding_rate(rows: np.ndarray, epsilon: float) -> float:
    n, d = rows.shape
    gram = rows.T @ rows if d <= n else rows @ rows.T  # the same determinant, by Sylvester
    return float(np.linalg.slogdet(np.eye(len(gram)) + gram / (n * epsilon))[1]) / 2


def gbc(features: ArrayLike, labels: ArrayLike, *, diagonal: bool = False, dimensions: int = 64) -> float:
    """Minus the overlap of the classes as Gaussians: the sum of Bhattacharyya coefficients over ordered pairs.

    Features float [n, d], labels int [n]; between -classes (classes - 1) and 0. Source: Pandy et al. 2022,
    arXiv:2111.12780: on the first `dimensions` principal components (64 in its experiments), a class
    has one variance, or with `diagonal` one a dimension. Variances divide by the size of the class. None is taken to
    be less than 1e-4 of the mean variance of the components over all examples: the authors' code has 1e-4 itself,
    which would depend on the features' unit. A class of one example, which has no variance of its own, gets that of
    the others: the mean square of their examples about the means of their classes. Of noise at few examples it is the
    higher the more features there are: `gbc_adjusted` takes that off. Unchanged by rotations, shifts and one scale for
    all features. Raises InputError (see `checked`), and for features that do not vary.

    >>> round(gbc([[0.0], [2.0], [2.0], [4.0]], [0, 0, 1, 1]), 3)
    -1.213
    """
    x, y, classes = _gaussians(features, labels, dimensions)
    return _overlap(x, y, classes, diagonal)


def gbc_adjusted(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    diagonal: bool = False,
    dimensions: int = 64,
    permutations: int = 20,
    seed: int = 0,
) -> float:
    """What `gbc` lacks of the overlap of classes at random, as a fraction of it.

    1 - gbc / m with m the mean of gbc over `permutations` of the labels of `seed`: 0 in the mean of features that are
    noise, of any width, and 1 where classes do not overlap. Features float [n, d], labels int [n]. Source: as
    `transrate_adjusted`; the form, (value - m) / (most - m), is that of Hubert and Arabie 1985, "Comparing partitions".
    Unchanged by what leaves gbc as it is. Raises InputError as `gbc` does, for less than one permutation, and where
    labels at random do not overlap.

    >>> round(gbc_adjusted([[0.0], [2.0], [7.0], [9.0]], [0, 0, 1, 1]), 2)
    1.0
    """
    x, y, classes = _gaussians(features, labels, dimensions)
    chance = _by_chance(lambda other: _overlap(x, other, classes, diagonal), y, permutations, seed)
    if chance == 0:
        raise InputError(f"gbc_adjusted of {len(y)} examples: labels at random do not overlap either; give more")
    return 1 - _overlap(x, y, classes, diagonal) / chance


def _gaussians(features: ArrayLike, labels: ArrayLike, dimensions: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(the first principal components float64 [n, dimensions], labels, classes)."""
    if dimensions < 1:
        raise InputError(f"gbc of {dimensions} dimensions: give 1 or more, such as 64")
    examples = _checked(features, labels)
    return _principal(examples, "gbc")[:, :dimensions], examples.labels, examples.classes


def _overlap(x: np.ndarray, y: np.ndarray, classes: int, diagonal: bool) -> float:
    floor = 1e-4 * x.var(axis=0).mean()
    means = np.stack([x[y == c].mean(axis=0) for c in range(classes)])
    variances = np.stack([x[y == c].var(axis=0) for c in range(classes)])
    sizes = np.bincount(y)
    several = sizes > 1
    variances[~several] = np.average(variances[several], axis=0, weights=sizes[several])
    if not diagonal:
        variances = np.broadcast_to(variances.mean(axis=1, keepdims=True), variances.shape)
    variances = np.maximum(variances, floor)
    between = (variances[:, None] + variances[None]) / 2
    logs = np.log(variances).sum(axis=1) / 2
    distance = ((means[:, None] - means[None]) ** 2 / between).sum(axis=-1) / 8
    distance += (np.log(between).sum(axis=-1) - logs[:, None] - logs[None]) / 2
    return float(-np.exp(-distance)[~np.eye(classes, dtype=bool)].sum())


def _principal(examples: Examples, score: str) -> np.ndarray:
    """All principal components float64 [n, rank] of the examples, by descending variance."""
    svd = decomposed(centred(examples.features), examples.rounding)
    if not len(svd.s):
        raise InputError(f"{score}: features are the same for every example: take another layer")
    return svd.u * svd.s


def n_leep(
    features: ArrayLike, labels: ArrayLike, *, seed: int = 0, variance: float = 0.8, components: int = 5
) -> float:
    """LEEP (nats) of the components of a Gaussian mixture in place of the classes of the source.

    Features float [n, d], labels int [n]; at most 0. Source: Li et al. 2021, arXiv:2011.11200: principal components
    that hold `variance` of the whole, a mixture of `components` Gaussians a class with full covariances
    (scikit-learn's EM from k-means of `seed`), and the posterior of its components. One seed gives one score on one
    version of scikit-learn, another seed another local optimum. By far the slowest score: some 20 s for 10,000
    examples of 512 features. A mixture has as many Gaussians as to hold few examples each where there are few: labels
    at random then score far above minus their entropy (-0.8 in place of -2.3 at 10 a class), which
    `n_leep_left_out` does not. Unchanged by rotations, shifts and one scale for all features. Raises InputError (see
    `checked`), for fewer examples than Gaussians, and for features that do not vary. scikit-learn warns
    where EM has not converged in 500 steps, and of more Gaussians than different examples.
    """
    examples = _checked(features, labels)
    return leep(_posterior(examples, seed, variance, components), examples.labels)


def n_leep_left_out(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int = 0,
    variance: float = 0.8,
    components: int = 5,
    groups: ArrayLike | None = None,
) -> float:
    """`n_leep` (nats) where each example is predicted from the labels of the others.

    The mixture is `n_leep`'s, which sees no label. P(y | z) is that of the other examples and of one more whose label
    is of the classes' frequencies, so that it is never 0. About minus the entropy of the labels where features are
    noise, of any width; below it where they mislead. Examples of one of `groups` int [n] are left out together;
    without groups these are copies (see `grouped`). Features float [n, d], labels int [n]. Source: n_leep by
    the leave-one-out of Stone 1974, "Cross-validatory choice and assessment of statistical predictions". Unchanged by
    what leaves n_leep as it is. Raises InputError as `n_leep` does, and for groups that are not integers or not as
    many.
    """
    examples = _checked(features, labels)
    y = examples.labels
    together = grouped(examples.features, y, groups)
    p = _posterior(examples, seed, variance, components)
    frequency = np.bincount(y) / len(y)
    same_label = _sums(p, together * examples.classes + y)
    joint = (one_hot(y, examples.classes).T @ p)[y] - same_label + frequency[y, None]
    known = joint / (p.sum(axis=0) - _sums(p, together) + 1)
    return float(np.log((p * known).sum(axis=1)).mean())


def _sums(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The sum over the group of each row: float64 [n, k] of rows float64 [n, k] and groups int64 [n]."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((group.max() + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    return sums[group]


def _posterior(examples: Examples, seed: int, variance: float, components: int) -> np.ndarray:
    """The probabilities of the mixture's Gaussians for each example: float64 [n, components a class x classes]."""
    n, gaussians = len(examples.labels), components * examples.classes
    if not 0 < variance <= 1 or components < 1:
        raise InputError(f"n_leep of variance {variance} and {components} components: give such as 0.8 and 5")
    if n < gaussians:
        raise InputError(f"n_leep of {n} examples and {gaussians} Gaussians: give more, or fewer")
    x = _principal(examples, "n_leep")
    share = np.cumsum((x**2).sum(axis=0))
    x = x[:, : int(np.searchsorted(share, variance * share[-1])) + 1]
    # EM adds 1e-6 to variances, which is to mean the same in any unit.
    x /= x[:, 0].std()
    return np.asarray(GaussianMixture(gaussians, random_state=seed, max_iter=500).fit(x).predict_proba(x))


def leep(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Log expected empirical prediction (nats an example), at most 0.

    The mean of ln sum_z P(y | z) p(z | x), with P(y, z) the mean of p(z | x) over the examples of class y.
    Probabilities float [n, source classes] are the source's softmax on the target's examples, labels int [n].
    Source: Nguyen et al. 2020, arXiv:2002.12462. Unchanged by the order of source classes. Raises
    InputError (see `checked`), and for a row that holds a negative number or does not sum to 1 within 1e-4.

    >>> leep([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 1])
    0.0
    """
    p = numbers(probabilities, "probabilities")
    y, classes = _classified(labels, len(p))
    off = np.abs(p.sum(axis=1) - 1)
    if p.min() < 0 or off.max() > 1e-4:
        row = int(np.argmin(p.min(axis=1)) if p.min() < 0 else off.argmax())
        raise InputError(f"probabilities[{row}] sum to {p[row].sum():.6g}, least {p[row].min():.3g}: give a softmax")
    joint = one_hot(y, classes).T @ p
    marginal = joint.sum(axis=0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    # What is below is rounding, and would rank sources that tie.
    return float(np.log((p * conditional[y]).sum(axis=1)).mean().round(12)) + 0.0


def nce(source_labels: ArrayLike, labels: ArrayLike) -> float:
    """Negative conditional entropy (nats) of the labels given the classes that the source predicts; at most 0.

    The mean of ln P(y | z) with z the source's class (int [n], such as the argmax of its logits; any integers),
    y the label (int [n]) and P their frequencies. Source: Tran et al. 2019, arXiv:1908.08142. `leep` of
    the one-hot z. Unchanged by renaming classes, of either. Raises InputError (see `checked`).

    >>> nce([3, 3, 8], [0, 0, 1])
    0.0
    """
    z = whole(source_labels, "source labels", np.size(labels))
    y, classes = _classified(labels, len(z))
    _, z = np.unique(z, return_inverse=True)
    counts = np.bincount(z * classes + y, minlength=classes * (z.max() + 1)).reshape(-1, classes)
    conditional = counts / counts.sum(axis=1, keepdims=True)
    return float(np.log(conditional[z, y]).mean())


def _checked(features: ArrayLike, labels: ArrayLike) -> Examples:
    x = numbers(features, "features")
    return Examples(x, *_classified(labels, len(x)), rounding(features))


def _classified(labels: ArrayLike, n: int) -> tuple[np.ndarray, int]:
    y, classes = classified(labels, n)
    if n == classes:
        raise InputError(
            f"labels hold each of {classes} classes once, which tells nothing of them: a score needs two examples of "
            "some class"
        )
    return y, classes


def checked(features: ArrayLike, labels: ArrayLike) -> Examples:
    """Features float [n, d] and labels int [n] in 0..classes-1.

    Raises InputError for what is empty or not finite, and for labels that are not integers, are not as many as the
    features, skip a number or are all alike.

    >>> checked([[0.0], [1.0]], [1, 0]).classes
    2
    """
    x = numbers(features, "features")
    return Examples(x, *classified(labels, len(x)), rounding(features))


def rounding(features: ArrayLike) -> float:
    """Size of the rounding error of a feature: the epsilon of the dtype times the root of their mean square.

    Integers and lists count as float64.

    >>> rounding(np.ones((3, 2), np.float32)) == 2**-23, rounding([[1.0], [1.0]]) == 2**-52
    (True, True)
    """
    array = np.asarray(features)
    # Not np.finfo: bfloat16 and its like are no floats of NumPy's.
    epsilon = float(jnp.finfo(array.dtype).eps) if jnp.issubdtype(array.dtype, np.floating) else np.finfo(float).eps
    return epsilon * float(np.sqrt((array.astype(np.float64) ** 2).mean()))


def grouped(features: np.ndarray, labels: np.ndarray, groups: ArrayLike | None = None) -> np.ndarray:
    """Which examples must not vouch for each other, as int64 [n] in 0..groups-1: features float64 [n, d], labels [n].

    `groups` int [n] are any integers. Without them examples of equal features are taken for copies of one example,
    unless their class has no other features: then it is the features that bring the class to one point. Raises
    InputError for groups of another shape or type, and for a single one.

    >>> grouped(np.array([[1.0], [2.0], [1.0], [5.0], [5.0]]), np.array([0, 0, 0, 1, 1])).tolist()
    [0, 1, 0, 2, 3]
    """
    if groups is None:
        numbered: dict[bytes, int] = {}
        # + 0.0 as -0.0 is 0.0 in other bytes.
        same = np.array([numbered.setdefault(row.tobytes(), len(numbered)) for row in features + 0.0])
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if len(np.unique(same[members])) == 1:
                same[members] = len(features) + members
    else:
        same = whole(groups, "groups", len(labels))
        if (same == same[0]).all():
            raise InputError(f"groups are all {same[0]}: an example of no other group is left to learn from")
    _, first, group = np.unique(same, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


def classified(labels: ArrayLike, n: int) -> tuple[np.ndarray, int]:
    """Labels as int64 [n], and how many classes there are.

    Raises InputError as `checked` does.
    """
    y = whole(labels, "labels", n)
    if y.min() < 0:
        raise InputError(f"labels[{y.argmin()}] is {y.min()}: number the classes from 0")
    # Not np.bincount: one label of 10**12 would fill the memory.
    present = np.unique(y)
    if len(present) < 2:
        raise InputError(f"labels are all {present[0]}: give two classes or more")
    skipped = np.flatnonzero(present != np.arange(len(present)))
    if len(skipped):
        raise InputError(f"labels hold no {skipped[0]} but {present[-1]}: give examples of every class, from 0")
    return y, len(present)


def numbers(values: ArrayLike, name: str) -> np.ndarray:
    """`values` as float64 [n, d]; raises InputError where that holds no number, or one that is not finite.

    Magnitudes outside 1e-100..1e100 are refused too: their squares would be lost.
    """
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind in "cOSUmM":
        raise InputError(f"{name} are {array.dtype} {list(array.shape)}: give real numbers [examples, columns]")
    array = array.astype(np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0]
        raise InputError(f"{name}[{row}, {column}] is {array[row, column]}: give finite numbers (a fit that diverged?)")
    largest = np.abs(array).max()
    if largest > 1e100 or 0 < largest < 1e-100:
        raise InputError(f"{name} are of magnitude {largest:.0e}: scale them to within 1e-100..1e100")
    return array


def whole(values: ArrayLike, name: str, n: int) -> np.ndarray:
    """`values` as int64 [n]; raises InputError for another shape or type."""
    array = np.asarray(values)
    if array.shape != (n,):
        raise InputError(f"{name} have shape {list(array.shape)}, examples say [{n}]: give one an example")
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} are {array.dtype}: give integers")
    return array.astype(np.int64)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """float64 [n, classes], 1 at the label.

    >>> one_hot(np.array([1, 0]), 2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    return np.eye(classes)[labels]


def decomposed(features: np.ndarray, rounding: float = 0.0) -> Decomposed:
    """The thin singular value decomposition of float64 [n, d], cut where singular values are but rounding errors.

    Left out is what NumPy's `matrix_rank` leaves out, and what errors of the size `rounding` in each feature can
    make: these move a singular value by at most their Frobenius norm (Weyl's inequality); errors that sums have
    grown by ten, but are independent, by ten times their norm, sqrt(n) + sqrt(d) times their size (Davidson and
    Szarek 2001, "Local operator theory, random matrices and Banach spaces", theorem 2.13).
    """
    u, s, v = np.linalg.svd(features, full_matrices=False)
    n, d = features.shape
    errors = rounding * max(np.sqrt(n * d), 10 * (np.sqrt(n) + np.sqrt(d)))
    rank = int((s > max(s[0] * max(n, d) * np.finfo(float).eps, errors)).sum())
    return Decomposed(u[:, :rank], s[:rank], v[:rank])


def centred(features: np.ndarray) -> np.ndarray:
    """`features` float64 [n, d] less their mean; a column that does not vary is exactly 0."""
    return np.where(np.ptp(features, axis=0) > 0, features - features.mean(axis=0), 0.0)
