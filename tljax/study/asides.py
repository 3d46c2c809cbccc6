"""What stands beside the verdicts of a study: what a reviewer asks, each with its interval and none with a word.

How far pairs of fits spread and how often one beats the other; every budget at once where the family is another; all
pairs of strategies; each class; what scratch had reached for the same FLOPs or seconds; and intervals of milestones.
Nothing of it was named before the run, so it is exploratory: a word is only of the family that was (`verdicts`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from tljax.study import results as of_results
from tljax.study import sequences, statistics, units
from tljax.study.milestones import area_of, thresholds, time_of
from tljax.study.results import Result
from tljax.study.statistics import Interval, Scores
from tljax.study.summary import Curves, along, counted_score, groups, label, score_of_curve
from tljax.study.verdicts import (
    NO_WORD,
    Cell,
    Comparison,
    Conditions,
    Right,
    area,
    bases_of,
    binary,
    compared,
    entering,
)


class Spread(NamedTuple):
    """How the pairs of fits of one comparison spread, on the test examples there were."""

    comparison: Comparison
    sd: float
    """Standard deviation over pairs, in what the metric is measured in."""
    effect: float
    """The mean in standard deviations; infinite where pairs do not differ."""
    outperforms: tuple[float, float, float]
    """The share of pairs in which the strategy is better, ties counting half; low and high of 95 %."""


class ClassDifferences(NamedTuple):
    """A strategy's differences on the test examples of each class, at one budget."""

    source: str | None
    target: str
    strategy: str
    budget: int
    intervals: tuple[Interval | None, ...]
    """One a class, all of a target simultaneous; None of a class that has too few test examples."""


class EqualCost(NamedTuple):
    """A strategy's end against scratch when that had cost as much, over seeds on the test examples there were."""

    source: str | None
    target: str
    strategy: str
    budget: int
    flops: tuple[float, float, float] | None
    """Mean, low and high of the difference at equal FLOPs of the target's fits; None where it is not known."""
    seconds: tuple[float, float, float] | None
    """The same at equal seconds of training."""
    longer: tuple[bool, bool]
    """Whether scratch ended, in some pair, before it had cost as many (FLOPs, seconds): its end stands there then."""


class Milestones(NamedTuple):
    """Intervals of the milestones of a strategy at a budget, over seeds on the test examples there were."""

    source: str | None
    target: str
    strategy: str
    budget: int
    asymptote: tuple[float, float, float] | None
    area: tuple[float, float, float] | None
    time_to_threshold: tuple[float, float, float, float] | None
    """The median number of steps, low and high of it (infinite where never), and with what probability they hold it."""


class Asides(NamedTuple):
    """All of it."""

    spreads: Sequence[Spread] = ()
    budgets: Sequence[Comparison] = ()
    """Each budget by itself with simultaneous intervals, where the family is not that already."""
    pairs: Sequence[Comparison] = ()
    """All pairs of strategies of a source and target with simultaneous intervals, over the family's budgets."""
    classes: Sequence[ClassDifferences] = ()
    costs: Sequence[EqualCost] = ()
    milestones: Sequence[Milestones] = ()
    level: float = 0.95
    """Of `pairs`, `classes` and `costs`."""


def spreads(family: Sequence[Comparison], right: Right) -> list[Spread]:
    """The spread of each comparison of the family with two pairs or more: Bouthillier et al. 2021, arXiv:2103.03098.

    There the probability of outperforming is the share of pairs in which one is better; a difference is called
    significant where its interval lies above 0.5, and meaningful too where the interval's upper end exceeds 0.75. Its
    interval here is the exact one of Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in
    the case of the binomial", ties counting against either end: a bootstrap of a few pairs that all agree has no width.
    Where budgets have seeds of their own no pair is of all of them, and there is nothing.
    """
    rows = []
    for comparison in family:
        cells = [
            Cell(comparison.source, comparison.target, comparison.strategy, budget) for budget in comparison.budgets
        ]
        values = _paired(right, cells, bases_of(cells, _base_name(comparison)))
        if isinstance(values, np.ndarray) and len(values) > 1:
            means = values.mean(-1)
            sd = float(means.std(ddof=1))
            effect = float(means.mean()) / sd if sd > 0 else math.copysign(math.inf, float(means.mean()))
            rows.append(Spread(comparison, sd, effect, outperforming(means)))
    return rows


def outperforming(differences: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(share, low, high) of differences [pairs] above 0, as `spreads` says.

    Of differences [seeds, draws] the interval is that of as many pairs as have neither seed nor draw in common, with as
    large a share.

    >>> [round(part, 3) for part in outperforming(np.array([1.0, 2.0, 3.0, -1.0, 0.0]))]
    [0.7, 0.147, 0.995]
    """
    pairs, every = min(differences.shape), differences.size
    better, ties, tail = int(np.sum(differences > 0)), int(np.sum(differences == 0)), (1 - level) / 2
    wins, either = better * pairs // every, -(-(better + ties) * pairs // every)
    low = float(special.betaincinv(wins, pairs - wins + 1, tail)) if wins else 0.0
    high = float(special.betaincinv(either + 1, pairs - either, 1 - tail)) if either < pairs else 1.0
    return (better + ties / 2) / every, low, high


def _base_name(comparison: Comparison) -> str:
    return comparison.against.removesuffix(" at equal target steps")


def _paired(right: Right, cells: Sequence[Cell], bases: Sequence[Cell]) -> Scores:
    """Paired differences over these budgets, as `verdicts.area` has them; [0, 0] where there are none."""
    if not all(cell in right for cell in (*cells, *bases)) or not all(entering(right, cells, bases)):
        return np.zeros((0, 0))
    return area(right, cells, bases)


def at_each_budget(right: Right, margin: Any, level: float, base: str, **by_set: Any) -> list[Comparison]:
    """Every strategy at every budget, all intervals of a target together, without a word; [] of a single budget."""
    if len({cell.budget for cell in right}) < 2:
        return []
    family, _ = compared(right, margin, level, "budgets", base, **by_set)
    return [comparison._replace(**NO_WORD) for comparison in family]


def all_pairs(
    right: Right, family: Sequence[Comparison], terms: Mapping[str, Conditions], level: float
) -> list[Comparison]:
    """The differences of every two strategies, base among them, over the budgets of the family; three or more of them.

    All intervals of a target hold together. The first of a pair stands in `strategy`, the second in `against`.
    """
    rows: list[Comparison] = []
    for target in dict.fromkeys(comparison.target for comparison in family):
        members = [comparison for comparison in family if comparison.target == target]
        differing: list[tuple[Comparison, Scores]] = []
        rights = True
        for source, budgets in dict.fromkeys((each.source, each.budgets) for each in members):
            alike = [each for each in members if (each.source, each.budgets) == (source, budgets)]
            base = _base_name(members[0])
            names = [*dict.fromkeys(each.strategy for each in alike), base]
            for first, second in combinations(names, 2):
                cells = [
                    bases_of([Cell(source, target, name, budget) for budget in budgets], name)
                    for name in (first, second)
                ]
                if len(names) > 2 and len(values := _paired(right, *cells)) > 1:
                    rights &= binary(right, [*cells[0], *cells[1]])
                    pair = alike[0]._replace(**{**NO_WORD, "strategy": first, "against": second, "equals": ""})
                    differing.append((pair._replace(fits=math.prod(values.shape[:-1]), reason="", unused=0), values))
        intervals = _together([values for _, values in differing], terms[target], level)
        for (pair, values), unclipped in zip(differing, intervals, strict=True):
            interval = _possible(unclipped) if rights else unclipped
            rows.append(pair._replace(mean=float(values.mean()), low=interval.low, high=interval.high, level=level))
    return rows


def by_class(
    right: Right, labels: Mapping[str, np.ndarray], terms: Mapping[str, Conditions], base: str, level: float
) -> list[ClassDifferences]:
    """The differences of every strategy on the test examples of each class, at the largest budget of a target.

    All intervals of a target hold together (they are of different examples, so no correlation is assumed). Rights and
    wrongs only: where scores are real numbers there is nothing.
    """
    rows: list[ClassDifferences] = []
    for target, classes in labels.items():
        budget = max((cell.budget for cell in right if cell.target == target), default=0)
        cells = [cell for cell in right if (cell.target, cell.budget, cell.longer) == (target, budget, False)]
        cells = [cell for cell in cells if cell.strategy not in ("scratch", base)]
        numbers = range(int(classes.max()) + 1) if classes.ndim == 1 and classes.dtype.kind in "iu" else range(0)
        if not numbers or not binary(right, [*cells, *bases_of(cells, base)]):
            continue
        values: dict[tuple[int, int], np.ndarray] = {}
        which: dict[int, np.ndarray] = {}
        for k in numbers:
            of_class = np.flatnonzero(classes == k)
            named = terms[target].groups
            if len(of_class) > 1 and (named is None or len(np.unique(named[of_class])) > 1):
                which[k] = of_class
        for i, cell in enumerate(cells):
            paired = _paired(right, [cell], bases_of([cell], base))
            assert isinstance(paired, np.ndarray)  # of one budget
            values |= {(i, k): paired[..., rows_of] for k, rows_of in which.items() if len(paired) > 1}
        intervals = {
            key: _possible(_alone(scores, terms[target], level, len(values), which[key[1]]))
            for key, scores in values.items()
        }
        for i, cell in enumerate(cells):
            each = tuple(intervals.get((i, k)) for k in numbers)
            if any(each):
                rows.append(ClassDifferences(cell.source, target, cell.strategy, budget, each))
    return rows


def _possible(interval: Interval) -> Interval:
    """The interval within what a difference of two shares can be."""
    return interval._replace(low=max(interval.low, -1.0), high=min(interval.high, 1.0))


def _together(values: Sequence[Scores], conditions: Conditions, level: float) -> list[Interval]:
    """Simultaneous intervals of differences, each [pairs, items], by the method of these conditions."""
    if conditions.sequence:
        return [_alone(scores, conditions, level, len(values)) for scores in values]
    scale = conditions.scale
    intervals = statistics.simultaneous([scores / scale for scores in values], level, conditions.groups)
    return [each._replace(mean=scale * each.mean, low=scale * each.low, high=scale * each.high) for each in intervals]


def _alone(scores: Scores, conditions: Conditions, level: float, m: int, rows: np.ndarray | None = None) -> Interval:
    """The interval of one of m comparisons by Bonferroni, [pairs, items]; `rows` are its test examples, None of all."""
    judge = sequences.interval if conditions.sequence else statistics.crossed
    named = conditions.groups if rows is None or conditions.groups is None else conditions.groups[rows]
    interval = judge(scores / conditions.scale, 1 - (1 - level) / m, named)
    mean, low, high = (conditions.scale * end for end in interval[:3])
    return interval._replace(mean=mean, low=low, high=high)


# From learning curves: over seeds alone, since a curve keeps no test example apart


def equal_costs(rows: Sequence[Result], curves: Curves, level: float = 0.95) -> list[EqualCost]:
    """Each strategy's end less what scratch had reached, under the same seed, when it had cost as much.

    The cost is that of the target's fit: steps times FLOPs a step, or seconds. Between the points of scratch's curve it
    is linear; before the first of them nothing is known, and where scratch ended before it had cost as much, its end is
    taken, and `longer` says so. Both are of the examples that curves are of: the validation split where there is one.
    Differences are turned so that positive is better. Pairs with a fit that diverged, or has no curve, are left out.
    """
    scratch = {
        (fit.target, fit.train_examples, fit.seed): fit
        for fit in rows
        if label(fit) == "scratch" and not fit.diverged and fit.name in curves
    }
    equal = []
    for group in groups([fit for fit in rows if fit.strategy not in ("pretrain", "scratch")]):
        beside = [(fit, scratch.get((fit.target, fit.train_examples, fit.seed))) for fit in group if not fit.diverged]
        pairs = [(fit, base) for fit, base in beside if base is not None]
        flops, seconds = (_at_equal(pairs, curves, per_step, level) for per_step in (_flops, _seconds))
        if flops or seconds:
            first, longer = group[0], (bool(flops and flops[1]), bool(seconds and seconds[1]))
            about = (first.source, first.target, label(first), first.train_examples)
            equal.append(EqualCost(*about, flops and flops[0], seconds and seconds[0], longer))
    return equal


def _flops(fit: Result) -> float | None:
    return fit.step_flops


def _seconds(fit: Result) -> float | None:
    return None if fit.seconds is None or not fit.steps else fit.seconds / fit.steps


def _at_equal(
    pairs: Sequence[tuple[Result, Result]], curves: Curves, per_step: Callable[[Result], float | None], level: float
) -> tuple[tuple[float, float, float], bool] | None:
    """(mean, low, high of the differences, whether a scratch had ended before); None where the cost is not known."""
    differences, longer = [], False
    for fit, base in pairs:
        costs, end = (per_step(fit), per_step(base)), score_of_curve(fit)
        if (of_results.validation_score(fit) is None) != (of_results.validation_score(base) is None):
            continue
        if None in costs or not costs[1] or fit.steps is None or end is None:
            continue
        step = fit.steps * (costs[0] or 0.0) / costs[1]
        curve = curves[base.name]
        steps, values = np.asarray(curve["step"], float), along(curve)
        if step < steps[0]:
            return None
        longer |= bool(step > steps[-1] * (1 + 1e-9))
        sign = units.sign(of_results.metric(fit))
        differences.append(sign * (end - float(np.interp(step, steps, values))))
    return (over_seeds(differences, level), longer) if differences else None


def over_seeds(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, low and high by Student's t over seeds; no ends of a single value.

    >>> [round(part, 3) for part in over_seeds([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = -float(special.stdtrit(n - 1, (1 - level) / 2) * np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def milestones(rows: Sequence[Result], curves: Curves, level: float = 0.95) -> list[Milestones]:
    """Intervals over seeds of what `tljax.study.milestones` tables: t of the means, order statistics of the median.

    A diverged fit counts as it does there: its end as `summary.counted_score`, its time as never.
    """
    intervals, reached = [], thresholds(rows)
    for group in groups([fit for fit in rows if fit.strategy != "pretrain"]):
        ends = [end for fit in group if (end := counted_score(fit)) is not None]
        areas = [value for fit in group if (value := area_of(fit, curves)) is not None]
        threshold = reached.get((group[0].target, group[0].train_examples))
        times = [] if threshold is None else [time_of(fit, curves, threshold) for fit in group if fit.name in curves]
        about = (group[0].source, group[0].target, label(group[0]), group[0].train_examples)
        asymptote, area_under = (over_seeds(values, level) if len(values) > 1 else None for values in (ends, areas))
        of_median = median_interval(times, level) if len(times) > 1 else None
        intervals.append(Milestones(*about, asymptote, area_under, of_median))
    return intervals


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """(median, low, high, coverage): order statistics between which the median lies with `level` at least.

    Thompson 1936, "On confidence ranges for the median and other expectation distributions": between the k-th from
    either end with probability 1 - 2 P(B < k), B binomial of n and 1/2. Where so few values reach no such level, they
    are the least and the greatest, and the coverage says it.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (3.5, 1.0, 6.0, 0.96875)
    """
    ordered, n = np.sort(np.asarray(values, float)), len(values)
    outside = 2 * special.bdtr(np.arange(max(n // 2, 1)), n, 0.5)  # of k - 1 for k from 1 on
    k = int(max(np.sum(1 - outside >= level), 1))
    middle = float(ordered[(n - 1) // 2]), float(ordered[n // 2])
    median = middle[0] if middle[0] == middle[1] else (middle[0] + middle[1]) / 2
    return median, float(ordered[k - 1]), float(ordered[n - k]), float(1 - outside[k - 1])


def asides(
    right: Right,
    rows: Sequence[Result],
    curves: Curves,
    family: Sequence[Comparison],
    labels: Mapping[str, np.ndarray],
    terms: Mapping[str, Conditions],
    level: float,
    base: str,
    **by_set: Any,
) -> Asides:
    """All that stands beside the verdicts of a family on the targets' test sets; `terms` and `labels` are by target.

    What is over seeds alone, of learning curves, is not there where draws of labels are crossed with seeds.
    """
    margin = {name: conditions.margin for name, conditions in terms.items()}
    crossed = any(fit.draw is not None for fit in rows)
    over_budgets = any(len(comparison.budgets) > 1 for comparison in family) or len({c.budgets for c in family}) == 1
    return Asides(
        spreads(family, right),
        at_each_budget(right, margin, level, base, **by_set) if over_budgets else (),
        all_pairs(right, family, terms, level),
        by_class(right, labels, terms, base, level),
        () if crossed else equal_costs(rows, curves, level),
        () if crossed else milestones(rows, curves, level),
        level,
    )
