"""Which source? Scores that rank sources for a target, from what a source makes of the target's examples.

Every score is a float, more is better, and compares sources on the same examples of one target only. From features
(the last layer before the head): `knn`, `logme`, `h_score`, `h_score_shrunk`, `transrate`, `gbc`, `n_leep`. From what
the source's own head predicts: `leep` (probabilities), `nce` (classes). Where nothing else is known take `knn`: it
ranked better than 23 such scores over 42,000 transfers (arXiv:2503.18528).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.mixture import GaussianMixture

from tljax.study.examples import Examples, centred, classified, decomposed, numbers, one_hot, whole
from tljax.study.probes import neighbours, vote
from tljax.types import InputError


def knn(features: ArrayLike, labels: ArrayLike, k: int = 5, *, cosine: bool = False) -> float:
    """Leave-one-out accuracy (a fraction) of the vote of the `k` nearest other examples.

    Features float [n, d], labels int [n]. Source: arXiv:2503.18528, which holds out a part of the examples where this
    holds out each in turn. Distances are Euclidean, or with `cosine` between features scaled to length 1. A tie of
    votes goes to the nearest neighbour among the tied. Unchanged by rotations, shifts and one scale for all features
    (with `cosine` by rotations and a scale an example). Where many examples are equally far, as in features that are
    all alike, which of them count is arbitrary. Raises InputError for bad features and labels (see
    `examples.checked`) and for k outside 1..n-1.

    >>> knn([[0.0], [0.1], [0.2], [5.0], [5.1], [0.3]], [0, 0, 0, 1, 1, 1], k=1)
    0.8333333333333334
    """
    x, y, _ = _checked(features, labels)
    return float((vote(y[neighbours(x, x, k, cosine=cosine, others=True)]) == y).mean())


def logme(features: ArrayLike, labels: ArrayLike) -> float:
    """Logarithm of the maximum evidence (nats an example) of Bayesian linear regression on one-hot labels.

    Features float [n, d], labels int [n]. Source: You et al. 2021, arXiv:2102.11005, equation 2, the mean over
    classes. The paper iterates alpha and beta, which may stop at the lesser of two maxima; here the greatest is
    sought over alpha / beta, with beta in closed form. Features are not centred, as in the paper. Unchanged by
    rotations and one scale for all features. Where a class is best explained by no feature, alpha has no bound
    and the limit is what counts; where a class is an exact linear function of the features, fewer in rank than
    the examples, the evidence has no bound and the score is inf. Raises InputError (see `examples.checked`).

    >>> round(logme([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, 0.0]], [0, 0, 1, 1]), 3)
    -1.008
    """
    x, y, classes = _checked(features, labels)
    svd, targets = decomposed(x), one_hot(y, classes)
    along = svd.u.T @ targets
    rest = ((targets - svd.u @ along) ** 2).sum(axis=0)
    rest[rest <= (len(y) * np.finfo(float).eps) ** 2 * targets.sum(axis=0)] = 0.0
    evidence = [_log_evidence(svd.s**2, along[:, c] ** 2, rest[c], len(y)) for c in range(classes)]
    return float(np.mean(evidence)) / len(y)


def _log_evidence(spectrum: np.ndarray, along: np.ndarray, rest: float, n: int) -> float:
    """Maximum over the ratio t = alpha / beta: `spectrum` holds s**2, `along` (u.T @ y)**2, `rest` what is off u."""

    def cost(log_t: np.ndarray) -> np.ndarray:
        t = np.exp(log_t)[..., None]
        return n * np.log(rest + (along * t / (t + spectrum)).sum(-1)) + np.log1p(spectrum / t).sum(-1)

    constant = n * (np.log(n) - 1 - np.log(2 * np.pi))
    least = n * np.log(rest + along.sum())  # the limit of t without bound: no feature is used
    if len(spectrum):
        if rest == 0 and len(spectrum) < n:
            return np.inf
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
    and collinear features harmless. Unchanged by invertible affine maps of the features. Raises InputError (see
    `examples.checked`), and where features tell every example from all others (rank n - 1), as then the score is
    classes - 1 whatever the labels.

    >>> round(h_score([[1.0, 7.0], [3.0, 7.0], [-1.0, 7.0], [-3.0, 7.0]], [0, 0, 1, 1]), 3)
    0.8
    """
    x, y, classes = _checked(features, labels)
    svd = decomposed(centred(x))
    if len(svd.s) >= len(y) - 1:
        raise InputError(
            f"h_score of {len(y)} examples whose features have rank {len(svd.s)} is {classes - 1} whatever the labels: "
            "give more examples, or take h_score_shrunk"
        )
    sums = one_hot(y, classes).T @ svd.u
    return float((sums**2 / np.bincount(y)[:, None]).sum())


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
    x, y, classes = _checked(features, labels)
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
    of sources whose features differ in scale differ for that. Unchanged by rotations and shifts. Raises InputError
    (see `examples.checked`), and for an epsilon that is not positive.

    >>> round(transrate([[1.0], [1.0], [-1.0], [-1.0]], [0, 0, 1, 1], epsilon=1.0), 3)
    0.0
    >>> round(transrate([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0, 0, 1, 1], epsilon=1.0), 3)
    0.059
    """
    x, y, classes = _checked(features, labels)
    if not 0 < epsilon < np.inf:
        raise InputError(f"epsilon {epsilon} is no distortion: give a positive number, such as 1e-4")
    x = centred(x)
    within = sum((y == c).mean() * _coding_rate(x[y == c], epsilon) for c in range(classes))
    return float(_coding_rate(x, epsilon) - within)


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
    which would depend on the features' unit. Unchanged by rotations, shifts and one scale for all features. Raises
    InputError (see `examples.checked`), for a class of one example, and for features that do not vary.

    >>> round(gbc([[0.0], [2.0], [2.0], [4.0]], [0, 0, 1, 1]), 3)
    -1.213
    """
    x, y, classes = _checked(features, labels, each=2)
    if dimensions < 1:
        raise InputError(f"gbc of {dimensions} dimensions: give 1 or more, such as 64")
    x = _principal(x, "gbc")[:, :dimensions]
    floor = 1e-4 * x.var(axis=0).mean()
    means = np.stack([x[y == c].mean(axis=0) for c in range(classes)])
    variances = np.stack([x[y == c].var(axis=0) for c in range(classes)])
    if not diagonal:
        variances = np.broadcast_to(variances.mean(axis=1, keepdims=True), variances.shape)
    variances = np.maximum(variances, floor)
    between = (variances[:, None] + variances[None]) / 2
    logs = np.log(variances).sum(axis=1) / 2
    distance = ((means[:, None] - means[None]) ** 2 / between).sum(axis=-1) / 8
    distance += (np.log(between).sum(axis=-1) - logs[:, None] - logs[None]) / 2
    return float(-np.exp(-distance)[~np.eye(classes, dtype=bool)].sum())


def _principal(features: np.ndarray, score: str) -> np.ndarray:
    """All principal components float64 [n, rank] of the examples, by descending variance."""
    svd = decomposed(centred(features))
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
    examples of 512 features. Unchanged by rotations, shifts and one scale for all features. Raises InputError (see
    `examples.checked`), for fewer examples than Gaussians, and for features that do not vary. scikit-learn warns
    where EM has not converged in 500 steps, and of more Gaussians than different examples.
    """
    x, y, classes = _checked(features, labels)
    if not 0 < variance <= 1 or components < 1:
        raise InputError(f"n_leep of variance {variance} and {components} components: give such as 0.8 and 5")
    if len(y) < components * classes:
        raise InputError(f"n_leep of {len(y)} examples and {components * classes} Gaussians: give more, or fewer")
    x = _principal(x, "n_leep")
    share = np.cumsum((x**2).sum(axis=0))
    x = x[:, : int(np.searchsorted(share, variance * share[-1])) + 1]
    # EM adds 1e-6 to variances, which is to mean the same in any unit.
    x /= x[:, 0].std()
    mixture = GaussianMixture(components * classes, random_state=seed, max_iter=500).fit(x)
    return leep(mixture.predict_proba(x), y)


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


def _checked(features: ArrayLike, labels: ArrayLike, each: int = 1) -> Examples:
    x = numbers(features, "features")
    return Examples(x, *_classified(labels, len(x), each))


def _classified(labels: ArrayLike, n: int, each: int = 1) -> tuple[np.ndarray, int]:
    y, classes = classified(labels, n, each=each)
    if n == classes:
        raise InputError(f"labels hold each of {classes} classes once: a score needs two examples of some class")
    return y, classes
