"""Where parameters matter: what each cell adds to a score, from fits under random masks of cells.

A cell is a set of parameters that a mask trains or freezes as a whole (`masks.cells`); a mask is bool [cells]. Masks
are drawn, each is trained under several seeds at a few rates, and the scores are fitted by a sum over the cells that
train, as datamodels fit outcomes by a sum over training examples (Ilyas et al. 2022, "Datamodels: predicting
predictions from training data", arXiv:2202.00622). Small masks want larger rates than large ones (Xu and Zhang 2024,
"Random masking finds winning tickets for parameter efficient fine-tuning", arXiv:2405.02596), so a mask has the score
of its best rate, which other seeds and items choose. Scores are fractions where they are accuracies; larger is better.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from tljax.masks import Cell
from tljax.study.ranking import Estimate
from tljax.types import InputError, Metric

Pair = tuple[int, int]
"""Two cells by their numbers, the lower first."""

FOLDS = 10
"""Of the masks, on each of which an atlas is held against what it has not seen."""


def draw(cells: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` distinct masks, bool [count, cells]; all of them, in a random order, where there are no more.

    The number of cells that train is drawn first, from 0 to all alike, so that there are masks of every size; then
    which. More masks of one seed begin with the fewer, unless they are all. Raises InputError for fewer than one cell
    or mask.

    >>> draw(3, 100).sum(0).tolist(), draw(30, 5).shape
    ([4, 4, 4], (5, 30))
    """
    if cells < 1 or count < 1:
        raise InputError(f"{count} masks of {cells} cells: give at least one of both")
    rng = np.random.default_rng(seed)
    if count >= 2**cells:
        every = np.array(list(itertools.product([False, True], repeat=cells)))
        return every[rng.permutation(len(every))]
    masks: dict[bytes, np.ndarray] = {}
    while len(masks) < count:
        mask = np.zeros(cells, bool)
        mask[rng.permutation(cells)[: rng.integers(0, cells + 1)]] = True
        masks.setdefault(mask.tobytes(), mask)
    return np.array(list(masks.values()))


def at_best_rate(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Scores [masks, seeds, halves], which rate each has, int [..]), of scores [masks, rates, seeds, halves].

    Halves are those of the validation items. The rate of a half is the one that is best on the other half, in the mean
    over the other seeds, or of one seed alone for that seed. So no score is the largest of several that were looked at,
    which would favour masks whose fits vary more. Of equal rates the first.

    >>> scores, rates = at_best_rate(np.array([[[[0.5, 0.5], [0.9, 0.9]], [[0.6, 0.6], [0.7, 0.7]]]]))
    >>> scores[0, :, 0].tolist(), rates[0, :, 0].tolist()
    ([0.5, 0.7], [0, 1])
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 4 or not np.isfinite(scores).all():
        raise InputError(f"scores of shape {scores.shape}: give finite numbers, [masks, rates, seeds, halves]")
    others = scores.sum(2, keepdims=True) - scores if scores.shape[2] > 1 else scores
    which = others[..., ::-1].argmax(1)
    return np.take_along_axis(scores, which[:, None], 1)[:, 0], which


class Surrogate(NamedTuple):
    """A score as a constant and a sum over the cells, and pairs of cells, that train."""

    constant: float
    effects: tuple[Estimate, ...]
    """What each cell adds, with its interval."""
    pairs: tuple[tuple[Pair, Estimate], ...]
    """What two cells add together beyond what each adds; in the surrogate only where they lower the error on masks
    that were held out."""
    covariance: np.ndarray
    """Of the effects, float [cells, cells]."""
    degrees: float
    """Degrees of freedom of the intervals of the effects, the least of all cells."""
    level: float

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """The scores of masks bool [n, cells]: float [n]."""
        terms = [effect.value for effect in (*self.effects, *(estimate for _, estimate in self.pairs))]
        return self.constant + _design(masks, [pair for pair, _ in self.pairs])[:, 1:] @ np.array(terms)

    def total(self, cells: Sequence[int]) -> Estimate:
        """What some cells, such as those of a stage, add in sum, pairs left out."""
        which = list(cells)
        value = sum(self.effects[cell].value for cell in which)
        error = math.sqrt(max(0.0, float(self.covariance[np.ix_(which, which)].sum())))
        half = float(stats.t.ppf((1 + self.level) / 2, self.degrees)) * error
        return Estimate(value, value - half, value + half)


def _design(masks: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
    """[n, 1 + cells + pairs]: a column of ones, the cells, the products of pairs of cells less a half.

    So a cell's effect is the mean of that with its partner on and off.
    """
    masks = np.asarray(masks, float)
    products = [(masks[:, i] - 0.5) * (masks[:, j] - 0.5) for i, j in pairs]
    return np.column_stack([np.ones(len(masks)), masks, *products])


def fit(masks: np.ndarray, scores: np.ndarray, pairs: Sequence[Pair] = (), level: float = 0.95) -> Surrogate:
    """The surrogate by least squares: masks bool [n, cells], scores float [n, seeds].

    The effects are those of the mean over seeds. Intervals are Student's t of two variances added. One is of what the
    surrogate leaves over, which differs from mask to mask: the sandwich of White 1980, "A heteroskedasticity-consistent
    covariance matrix estimator", with each squared residual over 1 - leverage (HC2 of MacKinnon and White 1985, "Some
    heteroskedasticity-consistent covariance matrix estimators with improved finite sample properties"). The other is of
    the seeds, which are a sample too: the variance of each cell's effect between seeds less what the residuals of each
    seed explain of it, a mean over all cells, since of few seeds that of one cell is not known. Degrees of freedom are
    those of Satterthwaite 1946, "An approximate distribution of estimates of variance components". Where all masks
    there are were trained, under several seeds, what the sum leaves over in the mean is no chance of the draw: the
    first variance is then of what differs between seeds alone. Of one seed the intervals speak of that seed. Raises
    InputError for masks that do not tell the cells apart, and for too few.

    >>> every = draw(2, 4)
    >>> surrogate = fit(every, np.array([[0.1 + 0.3 * a + 0.2 * b] for a, b in every]))
    >>> round(surrogate.constant, 6), [round(effect.value, 6) for effect in surrogate.effects]
    (0.1, [0.3, 0.2])
    """
    scores = np.asarray(scores, float)
    design = _design(masks, pairs)
    count, columns = design.shape
    if scores.ndim != 2 or len(scores) != count or not np.isfinite(scores).all():
        raise InputError(f"scores of shape {scores.shape}: give finite numbers, [{count} masks, seeds]")
    if count <= columns or np.linalg.matrix_rank(design) < columns:
        raise InputError(f"{count} masks do not tell {columns - 1} cells and pairs apart: draw more masks")
    inverse = np.linalg.pinv(design)
    leverage = np.minimum(np.einsum("ij,ji->i", design, inverse), 1 - 1e-9)
    by_seed = inverse @ scores  # [columns, seeds]
    mean = by_seed.mean(1)
    left = scores - design @ by_seed

    def sandwich(residuals: np.ndarray) -> np.ndarray:
        return (inverse * (residuals**2 / (1 - leverage))) @ inverse.T

    covariance, seeds = sandwich(left.mean(1)), scores.shape[1]
    cells = np.arange(1, 1 + np.shape(masks)[1])
    between = spread = 0.0
    of_masks = float(count - columns)
    if seeds > 1:
        each = [sandwich(left[:, seed] - left.mean(1)) for seed in range(seeds)]
        noise = np.sum(each, axis=0) / ((seeds - 1) * seeds)
        spread = float(by_seed[cells].var(1, ddof=1).mean()) / seeds
        between = max(0.0, spread - float(np.diag(noise)[cells].mean()))
        if count == 2 ** len(cells):
            covariance, of_masks = noise, of_masks * (seeds - 1)
    variances = np.diag(covariance) + between
    degrees = np.full(columns, of_masks)
    if between:
        both = np.diag(covariance) ** 2 / of_masks + spread**2 / (len(cells) * (seeds - 1))
        degrees = variances**2 / np.maximum(both, np.finfo(float).tiny)
    halves = stats.t.ppf((1 + level) / 2, degrees) * np.sqrt(variances)
    ends = np.stack([mean, mean - halves, mean + halves], 1)
    estimates = [Estimate(*row) for row in ends.tolist()]
    of_cells = covariance[np.ix_(cells, cells)] + between * np.eye(len(cells))
    return Surrogate(
        float(mean[0]),
        tuple(estimates[1 : 1 + len(cells)]),
        tuple(zip(pairs, estimates[1 + len(cells) :], strict=True)),
        of_cells,
        float(degrees[cells].min()),
        level,
    )


def held_out_errors(
    masks: np.ndarray, scores: np.ndarray, most: int = 8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors on held-out masks with 0, 1, .. `most` pairs: float [most + 1, n], and of the mean, float [n].

    Masks bool [n, cells], scores float [n]. In each fold `ordered_pairs` chooses anew without it, so that
    an error is that of the choice too; the mean is that of the other folds. Of few masks there are fewer pairs.
    """
    masks, scores = np.asarray(masks, bool), np.asarray(scores, float)
    count = len(scores)
    folds = min(FOLDS, count)
    fold_of = np.random.default_rng(seed).permutation(count) % folds
    rounds = []
    for fold in range(folds):
        train, held = fold_of != fold, fold_of == fold
        pairs = ordered_pairs(masks[train], scores[train], most)
        errors = []
        for number in range(len(pairs) + 1):
            weights = np.linalg.lstsq(_design(masks[train], pairs[:number]), scores[train], rcond=None)[0]
            errors.append((scores[held] - _design(masks[held], pairs[:number]) @ weights) ** 2)
        rounds.append((held, errors, (scores[held] - scores[train].mean()) ** 2))
    common = min(len(errors) for _, errors, _ in rounds)
    squared, of_mean = np.empty((common, count)), np.empty(count)
    for held, errors, against in rounds:
        squared[:, held], of_mean[held] = errors[:common], against
    return squared, of_mean


def ordered_pairs(masks: np.ndarray, scores: np.ndarray, most: int) -> list[Pair]:
    """Up to `most` pairs of cells in the order in which each lowers the squared error most, forward: [n, cells], [n].

    At least two masks are left for each number that is fitted.

    >>> every = draw(4, 16)
    >>> ordered_pairs(every, every @ np.array([1.0, 2.0, 3.0, 4.0]) + (every[:, 0] & every[:, 2]), 1)
    [(0, 2)]
    """
    masks = np.asarray(masks, bool)
    cells = masks.shape[1]
    candidates = list(itertools.combinations(range(cells), 2))
    most = min(most, len(masks) // 2 - cells - 1, len(candidates))
    basis, _ = np.linalg.qr(_design(masks, ()))
    left = scores - basis @ (basis.T @ scores)
    columns = _design(masks, candidates)[:, 1 + cells :]
    columns = columns - basis @ (basis.T @ columns)
    chosen: list[Pair] = []
    for _ in range(max(0, most)):
        sizes = (columns**2).sum(0)
        known = sizes > 1e-9 * len(masks)
        gains = np.where(known, (columns.T @ left) ** 2 / np.where(known, sizes, 1.0), -1.0)
        best = int(gains.argmax())
        if gains[best] < 0:
            break
        direction = columns[:, best] / math.sqrt(sizes[best])
        left = left - direction * (direction @ left)
        columns = columns - np.outer(direction, direction @ columns)
        chosen.append(candidates[best])
    return chosen


class Fitted(NamedTuple):
    """The surrogate of an atlas, and how good it is."""

    surrogate: Surrogate
    errors: tuple[float, ...]
    """Mean squared error on masks that were held out, with 0, 1, .. pairs."""
    explained: float
    """Share of the variance of held-out masks that the surrogate explains: 1 less its error over that of the mean."""


def fitted(masks: np.ndarray, scores: np.ndarray, most: int = 8, level: float = 0.95, seed: int = 0) -> Fitted:
    """The surrogate of masks bool [n, cells] and scores float [n, seeds], with pairs only where the error on held-out
    masks falls.

    There are as few pairs as give an error within one standard error (of the paired difference, over masks) of the
    least (Breiman et al. 1984, "Classification and regression trees", section 3.4.3). The intervals are those of the
    surrogate as chosen.
    """
    means = np.asarray(scores, float).mean(1)
    squared, of_mean = held_out_errors(masks, means, most, seed=seed)
    errors = squared.mean(1)
    away = squared - squared[errors.argmin()]
    near = away.mean(1) <= away.std(1, ddof=1) / math.sqrt(len(means))
    number = int(near.argmax())
    pairs = ordered_pairs(masks, means, number)
    explained = 1 - errors[number] / of_mean.mean() if of_mean.mean() else math.nan
    return Fitted(fit(masks, scores, pairs, level), tuple(errors.tolist()), float(explained))


class Ceiling(NamedTuple):
    """How well the scores of masks are known: no surrogate can explain more."""

    halves: float
    """Correlation over masks between the means of two halves of the seeds, a mean over halvings."""
    reliability: float
    """Of the mean over all seeds, by Spearman and Brown: the largest share of variance that can be explained."""


def ceiling(scores: np.ndarray) -> Ceiling:
    """The noise ceiling of scores float [masks, seeds]; NaN of one seed, and where scores do not vary.

    With r the correlation of halves of h seeds, n seeds have the reliability k r / (1 + (k - 1) r), k = n / h: Spearman
    1910, "Correlation calculated from faulty data", and Brown 1910, "Some experimental results in the correlation of
    mental abilities". Of an odd number of seeds a half leaves one out.

    >>> bool(ceiling(np.array([[0.1, 0.2], [0.3, 0.3], [0.5, 0.6]])).reliability > 0.95)
    True
    """
    scores = np.asarray(scores, float)
    seeds = scores.shape[1]
    half = seeds // 2
    values = []
    for first, second in _halvings(seeds, half) if half else ():
        means = [scores[:, list(which)].mean(1) for which in (first, second)]
        varies = all(np.ptp(each) > 0 for each in means)
        values.append(float(np.corrcoef(*means)[0, 1]) if varies else math.nan)
    r = float(np.mean(values)) if values else math.nan
    k = seeds / half if half else math.nan
    return Ceiling(r, k * r / (1 + (k - 1) * r) if 1 + (k - 1) * r else math.nan)


MOST_HALVINGS = 200


def _halvings(seeds: int, half: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """All pairs of disjoint halves of the seeds, or so many drawn at random where there are more."""
    every = math.comb(seeds, half) * math.comb(seeds - half, half) // 2
    if every > MOST_HALVINGS:
        orders = [np.random.default_rng(i).permutation(seeds).tolist() for i in range(MOST_HALVINGS)]
        return [(order[:half], order[half : 2 * half]) for order in orders]
    pairs = itertools.product(itertools.combinations(range(seeds), half), repeat=2)
    return [(first, second) for first, second in pairs if first < second and not set(first) & set(second)]


class Percentile(NamedTuple):
    """Where a score stands among masks of its size."""

    value: float
    """Percent of them that are below it, ties counted by half; NaN of fewer than five masks."""
    peers: int
    """How many masks it is held against."""
    smallest: float
    """The size of the smallest of them, and of the largest."""
    largest: float


LEAST_PEERS = 5


def percentile(score: float, scores: np.ndarray, sizes: np.ndarray, size: float, near: int = 0) -> Percentile:
    """The place of a score among those of masks of its size: scores float [n], sizes [n].

    They are the masks of just this size; with `near` so many whose sizes have the nearest logarithms to it, and all
    that are as near as the last of them.

    >>> percentile(0.5, np.arange(10) / 10, np.full(10, 3), 3)
    Percentile(value=55.0, peers=10, smallest=3.0, largest=3.0)
    """
    sizes = np.asarray(sizes, float)
    if near:
        away = np.abs(np.log1p(sizes) - math.log1p(size))
        peers = away <= np.sort(away)[min(near, len(away)) - 1] + 1e-12
    else:
        peers = sizes == size
    others = np.asarray(scores, float)[peers]
    count = int(peers.sum())
    smallest, largest = (float(sizes[peers].min()), float(sizes[peers].max())) if count else (math.nan, math.nan)
    below = float((others < score).sum() + 0.5 * (others == score).sum())
    return Percentile(100 * below / count if count >= LEAST_PEERS else math.nan, count, smallest, largest)


class Step(NamedTuple):
    """A step of the greedy choice."""

    added: str
    score: float
    """As it was chosen by: of the first half of the validation items."""
    judged: float
    """The same mask's score on the other half, which did not choose it."""


def greedy(
    units: Mapping[str, Sequence[int]],
    cells: int,
    chosen_by: Callable[[np.ndarray], float],
    judged_by: Callable[[np.ndarray], float],
    epsilon: float = 0.0,
) -> tuple[np.ndarray, list[Step]]:
    """(The mask that is chosen, bool [cells]; its steps): greedy SubTuning out of scores that are known already.

    From the mask of no cell on, each step adds the unit ({name: its cells}, such as a stage) with which `chosen_by` is
    largest, as long as that gains more than `epsilon`; both functions take a mask. The paper trains each candidate
    anew: Kaplun et al. 2023, "Less is more: selective layer finetuning with SubTuning", arXiv:2302.06354. The first
    step is the mask of no cell.

    >>> gains = np.array([0.1, -0.1, 0.3])
    >>> mask, steps = greedy({"a": [0], "b": [1], "c": [2]}, 3, lambda m: m @ gains, lambda m: m @ gains)
    >>> mask.tolist(), [step.added for step in steps]
    ([True, False, True], ['', 'c', 'a'])
    """
    mask = np.zeros(cells, bool)
    left = dict(units)
    steps = [Step("", chosen_by(mask), judged_by(mask))]
    while left:
        candidates = {}
        for name, members in left.items():
            candidates[name] = mask.copy()
            candidates[name][list(members)] = True
        scores = {name: chosen_by(candidate) for name, candidate in candidates.items()}
        best = max(scores, key=lambda name: scores[name])
        if not scores[best] - steps[-1].score > epsilon:
            break
        mask = candidates[best]
        del left[best]
        steps.append(Step(best, scores[best], judged_by(mask)))
    return mask, steps


class Placed(NamedTuple):
    """A strategy, and what it reaches."""

    label: str
    score: float
    cells: int | None
    """How many cells it trains; None of one that trains parts of cells, or moves."""
    numbers: int
    """How many numbers it trains beside what always trains."""
    by_cells: Percentile
    by_numbers: Percentile


class Choice(NamedTuple):
    """What the greedy choice comes to."""

    units: str
    spec: str
    """What names it in a list of strategies."""
    steps: tuple[Step, ...]


class Atlas(NamedTuple):
    """All that an atlas says. Scores are turned so that larger is better."""

    cells: tuple[Cell, ...]
    masks: np.ndarray
    """bool [n, cells]."""
    scores: np.ndarray
    """float [n, seeds], each at its best rate."""
    rates: np.ndarray
    """float [n]: the mean logarithm of the multiples at which masks were best."""
    fitted: Fitted
    stages: Mapping[str, Estimate]
    """{stage: what its cells add in sum, with its interval}."""
    ceiling: Ceiling
    placed: tuple[Placed, ...]
    choices: tuple[Choice, ...]
    metric: Metric
    seeds: tuple[int, ...]
