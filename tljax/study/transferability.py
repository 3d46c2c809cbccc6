"""Which source? Scores that rank sources for a target, from what a source makes of the target's examples.

Every score is a float, more is better, and compares sources on the same examples of one target only. From features
(the last layer before the head): `knn`, `logme`, `h_score`, `h_score_shrunk`, `transrate`, `gbc`, `n_leep`. From what
the source's own head predicts: `leep` (probabilities), `nce` (classes). Where nothing else is known take `knn`: it
ranked better than 23 such scores over 42,000 transfers (arXiv:2503.18528).

Of features that are noise `h_score`, `transrate`, `gbc` and `n_leep`, as their papers have them, are the higher the
more features there are: they judge the examples that they were computed from. `h_score_adjusted`,
`transrate_adjusted` and `gbc_adjusted` take off what labels at random give, `n_leep_left_out` leaves the example out.
These compare sources of different width, at few labels too. `leep` and `nce` have the same fault where the source has
many classes: nce of labels at random is above minus their entropy by about (classes - 1)(source classes - 1) / 2n.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.mixture import GaussianMixture

from tljax.study.examples import (
    Examples,
    centred,
    classified,
    decomposed,
    grouped,
    numbers,
    one_hot,
    rounding,
    whole,
)
from tljax.study.probes import neighbours, vote
from tljax.types import InputError


def knn(
    features: ArrayLike, labels: ArrayLike, k: int = 5, *, cosine: bool = False, groups: ArrayLike | None = None
) -> float:
    """Leave-one-out accuracy (a fraction) of the vote of the `k` nearest other examples.

    Features float [n, d], labels int [n]. Source: arXiv:2503.18528, which holds out a part of the examples where this
    holds out each in turn. Distances are Euclidean, or with `cosine` between features scaled to length 1. A tie of
    votes goes to the nearest neighbour among the tied. Examples of one of `groups` int [n] do not vote for each other
    while there are k others; without groups these are copies (see `examples.grouped`), which would vote for
    themselves. Unchanged by rotations, shifts and one scale for all features (with `cosine` by rotations and a scale
    an example). Where many examples are equally far, as in features that are all alike, which of them count is
    arbitrary. Raises InputError for bad features and labels (see `examples.checked`), for groups that are not
    integers or not as many, and for k outside 1..n-1.

    >>> knn([[0.0], [0.1], [0.2], [5.0], [5.1], [0.3]], [0, 0, 0, 1, 1, 1], k=1)
    0.8333333333333334
    """
    x, y, *_ = _checked(features, labels)
    return float((vote(y[neighbours(x, x, k, cosine=cosine, groups=grouped(x, y, groups))]) == y).mean())


def logme(features: ArrayLike, labels: ArrayLike) -> float:
    """Logarithm of the maximum evidence (nats an example) of Bayesian linear regression on one-hot labels.

    Features float [n, d], labels int [n]. Source: You et al. 2021, arXiv:2102.11005, equation 2, the mean over
    classes. The paper iterates alpha and beta, which may stop at the lesser of two maxima; here the greatest is
    sought over alpha / beta, with beta in closed form. Features are not centred, as in the paper. Unchanged by
    rotations and one scale for all features. Where a class is best explained by no feature, alpha has no bound
    and the limit is what counts.

    Where the rank r of the features is below n and they still give a class exactly, the evidence has no bound: the
    n - r dimensions that features do not reach say "no noise", each without end. Three causes have three answers.
    Copies of an example (see `examples.grouped`) count once. What is left and has n < 2 r, such as two examples on
    one line, or one whose units are all dead, can be chance (Cover 1965, "Geometrical and statistical properties of
    systems of linear inequalities"): the r dimensions count, by examples. More examples are no chance: such features
    separate the classes perfectly, and the variance of the noise, 1 / beta, is taken to be 1e-8 of the labels', so
    that they score high, and below inf. Raises InputError (see `examples.checked`).

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
"""Of the variance of the labels."""


def _evidence(x: np.ndarray, targets: np.ndarray, error: float, total: int, bounded: bool = False) -> np.ndarray:
    """Of each column of targets float64 [n, classes] the greatest log evidence: inf where it has no bound.

    With `bounded` it is finite, as `logme` says. It is scaled from the examples that count to `total`.
    """
    n, svd = len(x), decomposed(x, error)
    along = svd.u.T @ targets
    rest = ((targets - svd.u @ along) ** 2).sum(axis=0)
    share = targets.mean(axis=0)
    least = _LEAST_NOISE * n * share * (1 - share)
    found = []
    for c in range(targets.shape[1]):
        exact, size, off = len(svd.s) < n and rest[c] <= least[c], n, rest[c]
        if exact and not bounded:
            found.append(np.inf)
            continue
        if exact and n < 2 * len(svd.s):
            size, off = len(svd.s), 0.0
        elif exact:
            off = least[c]
        found.append(_log_evidence(svd.s**2, along[:, c] ** 2, off * (len(svd.s) < size), size) * (total / size))
    return np.array(found)


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
        found = minimize_scalar(cost, bounds=(near - 1, near + 1), method="bounded", options={"xatol": 1e-9})
        least = min(least, found.fun)
    return float(constant - least) / 2


def h_score(features: ArrayLike, labels: ArrayLike) -> float:
    """tr(cov(f)^+ cov(E[f | y])): the variance of features that the classes explain, in units of all of it.

    Features float [n, d], labels int [n]; between 0 and classes - 1. Source: Bao et al. 2019, "An
    information-theoretic approach to transferability in task transfer learning"; the pseudo-inverse makes constant
    and collinear features harmless, up to the rounding of the dtype in which they come (see `examples.decomposed`).
    Unchanged by invertible affine maps of the features. Of labels at random it is rank (classes - 1) / (n - 1) in the
    mean, the more the wider the features: `h_score_adjusted` takes that off. Raises InputError (see
    `examples.checked`), and where features tell every example from all others (rank n - 1), as then the score is
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
    InputError (see `examples.checked`).

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
    Unchanged by rotations and shifts. Raises InputError (see `examples.checked`), and for an epsilon that is not
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
    all features. Raises InputError (see `examples.checked`), and for features that do not vary.

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
    `examples.checked`), for fewer examples than Gaussians, and for features that do not vary. scikit-learn warns
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
    without groups these are copies (see `examples.grouped`). Features float [n, d], labels int [n]. Source: n_leep by
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
    """Of each row the sum over its group: float64 [n, k] of rows float64 [n, k] and groups int64 [n]."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((group.max() + 1, rows.shape[1]))
    np.add.at(sums, group, rows)
    return sums[group]


def _posterior(examples: Examples, seed: int, variance: float, components: int) -> np.ndarray:
    """Of each example the probabilities of the mixture's Gaussians: float64 [n, components a class x classes]."""
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
    InputError (see `examples.checked`), and for a row that holds a negative number or does not sum to 1 within 1e-4.

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
    given = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    # What is below is rounding, and would rank sources that tie.
    return float(np.log((p * given[y]).sum(axis=1)).mean().round(12)) + 0.0


def nce(source_labels: ArrayLike, labels: ArrayLike) -> float:
    """Negative conditional entropy (nats) of the labels given the classes that the source predicts; at most 0.

    The mean of ln P(y | z) with z the source's class (int [n], such as the argmax of its logits; any integers),
    y the label (int [n]) and P their frequencies. Source: Tran et al. 2019, arXiv:1908.08142. `leep` of
    the one-hot z. Unchanged by renaming classes, of either. Raises InputError (see `examples.checked`).

    >>> nce([3, 3, 8], [0, 0, 1])
    0.0
    """
    z = whole(source_labels, "source labels", np.size(labels))
    y, classes = _classified(labels, len(z))
    _, z = np.unique(z, return_inverse=True)
    counts = np.bincount(z * classes + y, minlength=classes * (z.max() + 1)).reshape(-1, classes)
    given = counts / counts.sum(axis=1, keepdims=True)
    return float(np.log(given[z, y]).mean())


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
