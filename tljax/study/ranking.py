"""How well a score ranks sources: its rank correlations with the truth, and what trusting it costs.

A score is a number a source for one target, more is better; the truth is the accuracy (a fraction) that each source
leads to. Sources are a sample of those that might have been, so intervals are of a bootstrap over sources, the same
draws for all scores and targets: two scores are compared on the same draws. With few sources most scores cannot be
told apart (`error_of_none`).

Correlations are computed here, over any leading axes at once: scipy.stats.kendalltau and weightedtau, which
`tests/test_ranking.py` holds these to, take one pair of rankings a call of a millisecond, and ten scores of three
targets in 1,000 samples are 30,000 pairs. So is the bootstrap: scipy.stats.bootstrap draws anew for each statistic,
where all scores are compared on the same draws.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tljax.study.units import ACCURACY
from tljax.types import InputError, Metric

LEAST = 5
"""The least number of sources for intervals: of four even a perfect ranking has a chance of 2 / 4!, more than 5 %."""


class Estimate(NamedTuple):
    """A value and its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


class Judged(NamedTuple):
    """What a score is worth, as means over targets."""

    tau: Estimate
    weighted: Estimate
    pearson: Estimate
    regret: Estimate
    """Accuracy lost, a fraction, by trusting its first choice."""
    regret_3: Estimate
    """Accuracy lost where its first three choices are tried, and the best of them kept."""
    over_scratch: Estimate
    """Accuracy of its first choice less that of training from scratch."""
    behind: Estimate
    """Tau of the score with the highest less its own; its intervals hold for all pairs of scores together."""


class Board(NamedTuple):
    """Scores and the truth of one strategy at one label budget, and what each score is worth."""

    strategy: str
    budget: str
    which: str
    """Of the sources: all, or without the trivial ones."""
    judged: Mapping[str, Judged]
    half: float
    """Tau between halves of the truth's seeds, a mean over targets."""
    scores: Mapping[str, np.ndarray]
    """{score: float [targets, sources]}."""
    truths: np.ndarray
    """Float [targets, sources]: means over seeds of accuracy, or of another metric turned so that more is better."""
    targets: tuple[str, ...]
    trivial: np.ndarray
    """Bool [sources]."""
    metric: Metric = ACCURACY
    """What the truths are of."""

    @property
    def title(self) -> str:
        """What it is of."""
        return f"{self.strategy}, {self.budget}, {self.truths.shape[1]} sources ({self.which})"

    def ordered(self) -> list[str]:
        """The scores, the highest tau first, those without one last."""
        return sorted(self.judged, key=lambda name: -np.nan_to_num(self.judged[name].tau.value, nan=-2.0))

    def apart(self) -> str:
        """Which scores cannot be told from the one with the highest tau, in words."""
        first, *others = [name for name in self.ordered() if not np.isnan(self.judged[name].tau.value)] or [""]
        near = [name for name in others if not self.judged[name].behind.low > 0]
        return f"not told apart from {first}: {', '.join(near) or 'none'}" if first else "no score ranks anything"


def kendall(scores: ArrayLike, truths: ArrayLike) -> np.ndarray:
    """Kendall's tau-b: [...] of float [..., n] and [..., n]; NaN where either does not vary.

    Source: Kendall 1945, "The treatment of ties in ranking problems". An infinite score is larger than all others.

    >>> float(kendall([1.0, 2.0, 3.0, 3.0], [0.1, 0.2, 0.4, 0.3]).round(4))
    0.9129
    """
    return _tau(scores, truths, lambda truth: np.ones_like(truth))


def weighted_tau(scores: ArrayLike, truths: ArrayLike) -> np.ndarray:
    """Kendall's tau with pairs that matter more the better their sources: [...] of float [..., n] and [..., n].

    A pair of true ranks r and s, from 1 for the best, weighs 1/r + 1/s. Source: Vigna 2015, "A weighted correlation
    index for rankings with ties", additive and hyperbolic. NaN where either does not vary.

    >>> float(weighted_tau([3.0, 1.0, 2.0], [0.3, 0.2, 0.1]).round(4))
    0.5455
    """

    def weights(truth: np.ndarray) -> np.ndarray:
        order = np.argsort(-truth, axis=-1, kind="stable")
        return 1 / (np.argsort(order, axis=-1, kind="stable") + 1)

    return _tau(scores, truths, weights)


def _tau(scores: ArrayLike, truths: ArrayLike, weights: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    score, truth = _pair(scores, truths)
    each = weights(truth)
    pairs = each[..., :, None] + each[..., None, :]
    by_score, by_truth = _signs(score), _signs(truth)
    both = np.sqrt((pairs * by_score**2).sum((-2, -1)) * (pairs * by_truth**2).sum((-2, -1)))
    return _over((pairs * by_score * by_truth).sum((-2, -1)), both)


def _signs(values: np.ndarray) -> np.ndarray:
    """The signs of all differences, [..., n, n] of [..., n], by comparison: two infinite numbers are equal."""
    left, right = values[..., :, None], values[..., None, :]
    return (left > right).astype(float) - (left < right)


def pearson(scores: ArrayLike, truths: ArrayLike) -> np.ndarray:
    """Pearson's correlation: [...] of float [..., n] and [..., n]; NaN where either does not vary or is infinite.

    >>> float(pearson([1.0, 2.0, 3.0], [0.2, 0.4, 0.6]).round(6))
    1.0
    """
    score, truth = _pair(scores, truths)
    known = np.isfinite(score).all(-1)
    score = np.where(known[..., None], score, 0.0)
    x, y = (_centred(values) for values in (score, truth))
    return _over((x * y).sum(-1), np.sqrt((x**2).sum(-1) * (y**2).sum(-1)))


def _centred(values: np.ndarray) -> np.ndarray:
    """Values less their mean, over the largest of these; exactly 0 where they do not vary."""
    varies = np.ptp(values, axis=-1, keepdims=True) > 0
    away = np.where(varies, values - values.mean(-1, keepdims=True), 0.0)
    return away / np.where(varies, np.abs(away).max(-1, keepdims=True), 1.0)


def _over(value: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`value` / `size`, NaN where the size is 0."""
    return np.where(size > 0, value / np.where(size > 0, size, 1.0), np.nan)


def _pair(scores: ArrayLike, truths: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truths as float64; raises InputError for shapes that differ, fewer than two sources, and NaN."""
    score, truth = np.asarray(scores, float), np.asarray(truths, float)
    if score.shape != truth.shape or score.ndim < 1 or score.shape[-1] < 2:
        raise InputError(f"scores {score.shape} and truths {truth.shape}: give two sources or more, a number each")
    if np.isnan(score).any() or not np.isfinite(truth).all():
        raise InputError("a score or truth is not a number: leave that score or source out")
    return score, truth


def regret(scores: ArrayLike, truths: ArrayLike, first: int = 1) -> float:
    """The best truth less the best among the `first` sources by the score: float [n] and [n]; at least 0.

    Where sources tie for the last of these places, the mean over which of them get it.

    >>> round(regret([3.0, 2.0, 1.0], [0.5, 0.9, 0.7]), 3), round(regret([1.0, 1.0, 0.0], [0.5, 0.9, 0.7]), 3)
    (0.4, 0.2)
    """
    score, truth = _pair(scores, truths)
    return float(truth.max()) - _chosen(score, truth, first)


def _chosen(score: np.ndarray, truth: np.ndarray, first: int) -> float:
    """The best truth among the `first` sources by the score, in the mean over ties."""
    if first >= len(score):
        return float(truth.max())
    last = np.partition(score, -first)[-first]
    sure = truth[score > last]
    base, left = float(sure.max(initial=-np.inf)), first - len(sure)
    tied = np.sort(truth[score == last])[::-1]
    ways = math.comb(len(tied), left)
    return sum(
        math.comb(len(tied) - 1 - place, left - 1) / ways * max(base, float(value)) for place, value in enumerate(tied)
    )


def split_half(truths: ArrayLike) -> float:
    """Tau between the means of two halves of the seeds, averaged over all halvings: truths float [seeds, sources].

    How well the truth is known; its mean over all seeds is less noisy than either half, so a score may exceed this. An
    odd seed is in the second half. NaN for one seed.

    >>> split_half([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    1.0
    """
    values = np.asarray(truths, float)
    seeds = range(len(values))
    halves = [list(half) for half in combinations(seeds, len(values) // 2)] if len(values) > 1 else []
    taus = [kendall(mean(values[half]), mean(values[[seed for seed in seeds if seed not in half]])) for half in halves]
    return float(np.mean(taus)) if taus else math.nan


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of float [n, ...], the same in whatever order, so that what ties goes on to tie.

    >>> values = np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]])
    >>> bool(np.ptp(mean(values)) == 0), 0.1 + 0.2 + 0.3 == 0.3 + 0.2 + 0.1
    (True, False)
    """
    return np.apply_along_axis(lambda column: math.fsum(column) / len(column), 0, values)


def error_of_none(sources: int) -> float:
    """Standard error of the tau of a score that ranks at random, by the number of sources: Kendall 1938.

    >>> round(error_of_none(16), 2)
    0.19
    """
    return math.sqrt(2 * (2 * sources + 5) / (9 * sources * (sources - 1)))


def draws(sources: int, count: int = 1000, seed: int = 0) -> np.ndarray:
    """Which sources each bootstrap sample holds: int64 [count, sources], drawn with replacement.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    return np.random.default_rng(seed).integers(0, sources, (count, sources))


def judged(
    scores: Mapping[str, np.ndarray],
    truths: np.ndarray,
    scratch: Sequence[float],
    *,
    level: float = 0.95,
    count: int = 1000,
    seed: int = 0,
) -> dict[str, Judged]:
    """Each score by its name: `scores` float [targets, sources], `truths` likewise, `scratch` [targets] accuracies.

    Intervals are percentiles of `count` bootstrap samples. In a sample a source that is drawn twice ties with itself,
    and can be chosen once; so a sample holds some 63 % of the sources, fewer good ones to miss, and intervals of regret
    lean to the low side. Those of `behind` are simultaneous: the best is chosen by looking, so they are as wide as the
    largest studentised difference of any two scores over the samples (`spread`). Of fewer than `LEAST` sources there
    are none. Raises InputError for fewer than three sources, and for a score or truth that is NaN.
    """
    truth = np.asarray(truths, float)
    if truth.ndim != 2 or truth.shape[1] < 3:
        raise InputError(f"a ranking of {truth.shape[-1]} sources says nothing: give three or more")
    count = count if truth.shape[1] >= LEAST else 0
    which = np.concatenate([np.arange(truth.shape[1])[None], draws(truth.shape[1], count, seed)])
    sampled = np.moveaxis(truth[:, which], 0, 1)  # [1 + count, targets, sources]
    taus: dict[str, np.ndarray] = {}
    rest: dict[str, tuple[Estimate, ...]] = {}
    for name, values in scores.items():
        score = np.moveaxis(np.asarray(values, float)[:, which], 0, 1)
        taus[name] = kendall(score, sampled).mean(-1)  # over targets; NaN where one of them has none
        others = [weighted_tau(score, sampled).mean(-1), pearson(score, sampled).mean(-1)]
        others += [*_trusted(np.asarray(values, float), truth, np.asarray(scratch, float), which)]
        rest[name] = tuple(_estimate(samples, level) for samples in others)
    behind = dict.fromkeys(taus, Estimate(math.nan, math.nan, math.nan))
    known = {name: samples for name, samples in taus.items() if np.isfinite(samples[0])}
    if known:
        values = np.array([samples[0] for samples in known.values()])
        best = int(values.argmax())
        half_widths = spread(np.array([samples[1:] for samples in known.values()]), level)[best]
        away = values[best] - values
        behind |= {
            name: Estimate(float(gap), float(gap - half), float(gap + half))
            for name, gap, half in zip(known, away, half_widths, strict=True)
        }
    return {
        name: Judged._make([_estimate(samples, level), *rest[name], behind[name]]) for name, samples in taus.items()
    }


def spread(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Half-widths float64 [k, k] of intervals of the difference of each two of k values, which hold all together.

    `samples` float [k, count] are the values' bootstrap samples, NaN where there is none. A half-width is the
    difference's standard deviation over the samples times the `level` quantile of the largest difference of any two,
    in such units, in a sample. So among k equal values none is told from the highest in about `level` of studies,
    however the highest was found: simulated with ten equal scores, 16 sources and three targets one or more was in 4 %
    (tau 0.4), and in 9 % of scores that know nothing, where the bootstrap is a little narrow.
    Source: Hsu 1996, "Multiple comparisons: theory and methods", sections 4.1 (with the best)
    and 5.1 (all pairs, by which alone ties for the best are all kept); the bootstrap of the maximum is that of Romano
    and Wolf 2005, "Exact and approximate stepwise methods for multiple hypothesis testing". NaN without samples.

    >>> spread(np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])).round(2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if not samples.shape[1]:
        return np.full((len(samples), len(samples)), math.nan)
    differences = samples[:, None] - samples[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of pairs that no sample has
        away = differences - np.nanmean(differences, axis=-1, keepdims=True)
        size = np.sqrt(np.nanmean(away**2, axis=-1))
    units = np.divide(np.abs(away), size[..., None], out=np.zeros_like(away), where=(size > 0)[..., None])
    return size * np.quantile(np.nan_to_num(units).max((0, 1)), level)


def _trusted(score: np.ndarray, truth: np.ndarray, scratch: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Regret of the first, of the first three, and the first over scratch: [3, samples], means over targets."""
    values = np.empty((len(which), len(truth), 3))
    for sample, drawn in enumerate(which):
        sources = np.unique(drawn)
        for target in range(len(truth)):
            by_score, true = score[target, sources], truth[target, sources]
            first, three = _chosen(by_score, true, 1), _chosen(by_score, true, 3)
            values[sample, target] = true.max() - first, true.max() - three, first - scratch[target]
    return values.mean(1).T


def _estimate(samples: np.ndarray, level: float) -> Estimate:
    """The estimate of samples whose first is of the sources as they are, the others of bootstrap samples.

    Samples that are NaN are left out.
    """
    rest = samples[1:][np.isfinite(samples[1:])]
    if not np.isfinite(samples[0]) or not len(rest):
        return Estimate(float(samples[0]), math.nan, math.nan)
    low, high = np.quantile(rest, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(samples[0]), float(low), float(high))
