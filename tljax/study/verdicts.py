"""Verdicts: strategies compared by the scores of their fits, in families that are judged together, and in one sentence.

A cell (`Cell`) is what fits that differ in their seed have in common, and `Right` holds the scores of all cells.
`compared` pairs each strategy with what it is compared with, seed by seed, and gives the family with its verdicts and
the comparisons without; `statistics` has the intervals and tests. `sentence` says the verdicts in words.

Scores are those of the primary metric, an item each, turned so that more is better: right or wrong where it is
accuracy, else real numbers. `statistics` takes scores of the size of 1. Real ones are so once they are divided by their
`scale`, and what it says of them is multiplied by it again.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import scipy

from tljax.study import sample_size, sequences, statistics, units
from tljax.study.results import Replicate, Result, SeedAndDraw
from tljax.study.sample_size import SeedsNeeded
from tljax.study.statistics import Apart, Scores
from tljax.study.summary import Curves, listed
from tljax.study.units import ACCURACY
from tljax.types import InputError, Metric

STEPS = "{} at equal target steps"
"""What a comparison is against: the base, by its name."""
TOTAL = "scratch at equal source and target steps"


class Comparison(NamedTuple):
    """A strategy beside what it is compared with: scratch, or another strategy."""

    source: str | None
    target: str
    strategy: str
    """Its label, such as last_k:k=2."""
    budgets: tuple[int, ...]
    """Labels: one number of examples, or all that the area under the budget curve is over."""
    against: str
    fits: int
    """Pairs of one seed (of one seed and draw of labels, where these are crossed)."""
    items: int
    """Test examples."""
    mean: float
    """A difference of means of the metric, turned so that positive is better, in what the metric is measured in
    (of one in '%' a fraction); as are the ends of its interval and the margin."""
    low: float
    high: float
    word: str
    """The direction: positive, negative, equivalent or undecided; '' where there is no verdict."""
    margin: float
    power: tuple[float, float] | None
    """Probability of finding a difference of the margin: from and to, as it is itself estimated from these fits."""
    p: float | None
    """In the family adjusted for all comparisons, targets and looks; for a single pair McNemar's exact p, where scores
    are no rights and wrongs that of t over test examples."""
    size: str = ""
    """The difference against the margin, either way: beyond, within or open; '' where there is no verdict."""
    power_equivalent: tuple[float, float] | None = None
    """Probability of calling a difference of 0 equivalent, from and to as in `power`."""
    level: float = 0.95
    """Coverage of the interval; in the family that of all intervals of its target at once, at each planned look."""
    groups: int | None = None
    """How many groups the test examples are in; None if that is not known, and they are taken as independent."""
    diverged: tuple[int, int] = (0, 0)
    """Fits of the strategy, and of what it is compared with, that diverged, over its pairs and budgets."""
    unused: int = 0
    """Fits at these budgets under seeds that not all of the budgets share: they do not enter the area."""
    equals: str = ""
    """Another strategy whose fits have the same scores under every seed and budget: both entered the family once."""
    reason: str = ""
    """Why there is no verdict."""
    warning: str = ""
    """With what reserve the verdict is to be read."""
    metric: Metric = ACCURACY
    """What the difference is of."""
    seeds_needed: SeedsNeeded | None = None
    """The seeds that would find a difference of the margin, and that would call a difference of 0 equivalent."""
    exploratory: bool = False
    """Whether it is outside the primary family: judged with others such, whose errors the level counts apart."""
    sequence: bool = False
    """Whether the interval is one of a sequence (`sequences`), which holds however many fits there come to be."""
    items_part: float | None = None
    """Of a verdict by a sequence: the half-width that the test examples alone leave, however many the fits are."""
    settled: bool = False
    """Whether more fits are not worth while: it is decided, or the test examples forbid that it ever is."""
    narrow: tuple[float, float] | None = None
    """The ends of the narrower interval that equivalence is judged by: two one-sided tests at the level's errors."""


class Study(NamedTuple):
    """All that a report tells."""

    rows: Sequence[Result]
    curves: Curves
    family: Sequence[Comparison]
    """Comparisons with verdicts."""
    others: Sequence[Comparison]
    """Comparisons without: each budget by itself, and those at equal source and target steps."""
    milestones: Sequence[Mapping[str, Any]]
    verdict: str
    """The sentence that comes first."""
    notes: Sequence[str]
    images: Mapping[str, tuple[np.ndarray, Sequence[str]]]
    """{target: (the images most often taken for another class, uint8 [k, height, width, channels]; a caption each)}."""
    verdict_on: str = "target"
    """What the verdicts are on: target, or retention, which is the metric of the source on its own test set."""
    asides: Any = None
    """What `asides.asides` gives, if that is known: what stands beside the verdicts, without a word."""


class Cell(NamedTuple):
    """What fits that differ in their seed have in common."""

    source: str | None
    target: str
    strategy: str
    budget: int
    longer: bool = False
    """Whether it is scratch with the source's steps added to its own."""


Right = Mapping[Cell, Mapping[Any, np.ndarray]]
"""{cell: {seed, or seed and draw, as `results.replicate`: scores on the test examples, [items]}}: bool, which examples
the fit gets right; float of a metric other than accuracy, more is better; of a diverged fit `DivergedScores`."""

Groups = Mapping[str, np.ndarray | None]
"""{test set, by the name of its target (or source, of retention): which test examples are alike, int [items], or
None}."""


class DivergedScores(np.ndarray):
    """Scores of a fit that diverged, float64 [items]: on every example what it counts with, so that none is arbitrary.

    That is `summary.counted_score`."""


def of_diverged(score: float, items: int) -> DivergedScores:
    """The scores of a fit that diverged and counts with a score, turned so that more is better.

    >>> diverged(of_diverged(0.5, items=3)), diverged(np.array([True, False, True])), diverged(np.full(3, 0.5))
    (True, False, False)
    """
    return np.full(items, float(score)).view(DivergedScores)


def diverged(scores: np.ndarray) -> bool:
    """Whether a fit's scores, as `Right` has them, are those of a fit that diverged."""
    return isinstance(scores, DivergedScores)


def binary(right: Right, cells: Iterable[Cell]) -> bool:
    """Whether the scores of these cells are rights and wrongs, but for those of fits that diverged."""
    return all(
        scores.dtype == bool for cell in cells for scores in right.get(cell, {}).values() if not diverged(scores)
    )


def scale(right: Right, cells: Iterable[Cell]) -> float:
    """The size of the scores of a test set: 1 of rights and wrongs, else by how much items differ within a fit.

    That is the root of the mean variance over items, over the fits that did not diverge. `statistics` adds what a
    study may not have seen in units of it (`statistics.unseen_items`). 1 where nothing differs.

    >>> cell = Cell("a", "b", "full", 10)
    >>> scale({cell: {0: np.array([2.0, 6.0])}}, [cell]), scale({cell: {0: np.array([True, False])}}, [cell])
    (2.0, 1.0)
    """
    of_cells = list(cells)
    if binary(right, of_cells):
        return 1.0
    each = [scores for cell in of_cells for scores in right.get(cell, {}).values() if not diverged(scores)]
    return float(np.sqrt(np.mean([np.var(np.asarray(scores, float)) for scores in each]))) or 1.0


def differences(right: Right, cell: Cell, base: Cell) -> np.ndarray:
    """Float64 [pairs, items]: the scores of the cell's fit less those of `base`, paired by seed.

    Of rights and wrongs 1 where the cell's fit alone is right, -1 where that of `base` alone.
    """
    common = sorted(right.get(cell, {}).keys() & right.get(base, {}).keys())
    items = {len(right[where][seed]) for seed in common for where in (cell, base)}
    if len(items) > 1:
        raise InputError(f"fits of {cell.target} were judged on {sorted(items)} test examples: give all the same")
    pairs = [np.asarray(right[cell][seed], float) - np.asarray(right[base][seed], float) for seed in common]
    return np.array(pairs) if pairs else np.zeros((0, 0))


def area(right: Right, cells: Sequence[Cell], bases: Sequence[Cell]) -> Scores:
    """Differences of the area under the budget curve, over pairs that all budgets share: float64 [pairs, items].

    The mean over the logarithm of the label budget, by trapezoids; cells and bases are in the order of the budgets.
    Where no two budgets share a seed the parts are `statistics.Apart`, one a budget. Where draws of labels are crossed
    with seeds the pairs are [seeds, draws, items]. Raises InputError where not every seed has every draw.

    >>> cells = [Cell("a", "b", name, 10) for name in ("full", "scratch")]
    >>> fits = {SeedAndDraw(seed, draw): np.array([True, seed > draw]) for seed in range(2) for draw in range(3)}
    >>> area({cell: fits for cell in cells}, cells[:1], cells[1:]).shape
    (2, 3, 2)
    """
    entered, shares = entering(right, cells, bases), weights([cell.budget for cell in cells])
    if entered[0] != entered[-1]:
        parts = [
            share * differences(_among(right, (cell, base), seeds), cell, base)
            for cell, base, seeds, share in zip(cells, bases, entered, shares, strict=True)
        ]
        return Apart(tuple(parts))
    common = entered[0]
    crossed = [each for each in common if isinstance(each, SeedAndDraw)]
    seeds, draws = ({each[i] for each in crossed} for i in (0, 1))
    if crossed and (len(crossed) < len(common) or len(common) < len(seeds) * len(draws)):
        raise InputError(
            f"fits of {cells[0].strategy} on {cells[0].target} are of {len(seeds)} seeds and {len(draws)} draws of "
            f"labels, but {len(common)} in number: report runs by themselves, in which every seed has every draw"
        )
    paired = _among(right, (*cells, *bases), common)
    parts = [differences(paired, cell, base) for cell, base in zip(cells, bases, strict=True)]
    values = np.tensordot(shares, np.stack(parts), 1)
    return values.reshape(len(seeds), len(draws), -1) if crossed else values


def _among(right: Right, cells: Iterable[Cell], seeds: Collection[Replicate]) -> Right:
    """The scores of these cells under these seeds."""
    return {cell: {seed: right[cell][seed] for seed in seeds} for cell in cells}


def entering(right: Right, cells: Sequence[Cell], bases: Sequence[Cell]) -> list[set[Replicate]]:
    """For each cell the seeds (and draws) whose pairs enter an area: those that all budgets share.

    Where no two budgets share any, and each has two pairs or more, those of each.

    >>> cells, bases = ([Cell("a", "b", name, budget) for budget in (10, 100)] for name in ("full", "scratch"))
    >>> fits = lambda *seeds: dict.fromkeys(seeds, np.zeros(2))
    >>> one, other = fits(0, 1), fits(2, 3, 4)
    >>> entering({cells[0]: one, bases[0]: one, cells[1]: other, bases[1]: other}, cells, bases)
    [{0, 1}, {2, 3, 4}]
    """
    each = [set(right.get(cell, {})) & set(right.get(base, {})) for cell, base in zip(cells, bases, strict=True)]
    common = set.intersection(*each)
    every = set.union(*each)
    apart = len(every) == sum(map(len, each)) and all(len(seeds) > 1 for seeds in each) and len(cells) > 1
    crossed = any(isinstance(seed, SeedAndDraw) for seed in every)
    return each if apart and not crossed else [common] * len(each)


def weights(budgets: Sequence[int]) -> np.ndarray:
    """The share of each budget (ascending) in the mean over their logarithm, by trapezoids; they sum to 1.

    >>> weights([10, 100, 1000]).round(6).tolist()
    [0.25, 0.5, 0.25]
    """
    if len(budgets) == 1:
        return np.ones(1)
    gaps = np.diff(np.log(budgets))
    shares = np.zeros(len(budgets))
    shares[:-1] += gaps / 2
    shares[1:] += gaps / 2
    return shares / shares.sum()


class Conditions(NamedTuple):
    """What comparisons on one test set take beside the scores."""

    margin: float
    """In what the metric is measured in."""
    metric: Metric = ACCURACY
    groups: np.ndarray | None = None
    """Which test examples are alike, int [items]."""
    scale: float = 1.0
    """The size of the scores, as `scale` has it."""
    sequence: bool = False
    """Whether they are judged by `sequences`, at any number of fits, and not by `statistics`, at a number planned."""


def compared(
    right: Right,
    margin: float | Mapping[str, float],
    level: float,
    kind: str = "area",
    base: str = "scratch",
    *,
    looks: int = 1,
    groups: Groups = MappingProxyType({}),
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    on: str = "target",
    primary: Collection[str] = (),
    sequence: bool = False,
) -> tuple[list[Comparison], list[Comparison]]:
    """(the family with its verdicts, each budget without): every strategy against `base` of its source and target.

    `on` says whose test set the scores are on, target or source; `metrics` (accuracy where they say nothing), `groups`
    and, where it is not one for all, the margin are by its name.

    `kind` is what the family is of: 'area' (one comparison a strategy and source, over all budgets), 'budgets'
    (each budget by itself: the intervals of a strategy are a simultaneous band over the budgets), or a number of
    labels, such as '50' (that budget alone; the others get no verdict). The level is that of all verdicts together:
    within a target by max-t over correlated differences, over targets (other test examples) and planned `looks` by
    Bonferroni. By a `sequence` they hold at every number of fits, and within a target by Bonferroni too. Comparisons
    whose scores are the same enter the family once. Diverged fits count as `Right` says; where fits of `base` diverged,
    positive and equivalent must stand with its best fit in their place, or the word is withheld. Strategies that are
    not among `primary`, where it names some, are judged together apart from these, at the same level, and are
    exploratory. Raises InputError for another kind, and for a number of labels that no fit has.
    """
    require_family(kind)
    single = [[cell] for cell in sorted_cells(right) if cell.strategy not in ("scratch", base)]
    curves: dict[Any, list[Cell]] = {}
    for (cell,) in single:
        curves.setdefault((cell.source, cell.target, cell.strategy), []).append(cell)
    members = single if kind == "budgets" else list(curves.values())
    if kind.isdecimal():
        members = [[cell] for (cell,) in single if cell.budget == int(kind)]
        if single and not members:
            present = listed(f"{budget:,}" for budget in sorted({cell.budget for (cell,) in single}))
            raise InputError(f"no fit has {int(kind):,} labels: there are {present}", field="family", value=kind)
    names = list(dict.fromkeys(_name_of_set(cells[0], on) for cells in members))
    terms = conditions_of(right, names, margin, groups, metrics, on, sequence=sequence)
    each_look = 1 - (1 - level) / looks
    share = looks * max(len(names), 1)
    family = []
    for name in names:
        of_set = [cells for cells in members if _name_of_set(cells[0], on) == name]
        for exploratory in (False, True):
            chosen = [cells for cells in of_set if (bool(primary) and cells[0].strategy not in primary) == exploratory]
            for comparison in _judged(right, chosen, terms[name], 1 - (1 - level) / share, base):
                unadjusted = comparison.p is None or not comparison.word
                adjusted = comparison.p if unadjusted else min(1.0, share * (comparison.p or 0.0))
                family.append(comparison._replace(p=adjusted, exploratory=exploratory))
    if kind == "budgets" or len({cells[0].budget for cells in single}) < 2:
        return family, []
    unjudged = [cells for cells in single if kind == "area" or cells not in members]
    names = [_name_of_set(cells[0], on) for cells in unjudged]
    terms |= conditions_of(right, names, margin, groups, metrics, on, sequence=sequence)
    each = (alone(right, cells, terms[_name_of_set(cells[0], on)], each_look, base) for cells in unjudged)
    return family, [comparison for comparison in each if comparison is not None]


def conditions_of(
    right: Right,
    names: Collection[str],
    margin: float | Mapping[str, float],
    groups: Groups = MappingProxyType({}),
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    on: str = "target",
    sequence: bool = False,
) -> dict[str, Conditions]:
    """{test set: what comparisons on it take}, of the test sets of these `names`, as `compared` has them."""
    cells = {name: [cell for cell in right if _name_of_set(cell, on) == name] for name in names}
    return {
        name: Conditions(
            margin[name] if isinstance(margin, Mapping) else margin,
            metrics.get(name, ACCURACY),
            groups.get(name),
            scale(right, cells[name]),
            sequence,
        )
        for name in names
    }


def _name_of_set(cell: Cell, on: str) -> str:
    """The name of the test set that a cell's scores are on."""
    return cell.target if on == "target" else str(cell.source)


def require_family(kind: str) -> None:
    """Raise InputError unless `kind` is area, budgets or a number of labels: what a family can be of."""
    if kind in ("tasks", "targets", "sources"):
        reason = f"a claim over {kind} needs them drawn at random; these speak of themselves alone"
        raise InputError(reason, field="family", value=kind)
    if kind not in ("area", "budgets") and not (kind.isdecimal() and int(kind)):
        raise InputError("it is area, budgets or a number of labels", field="family", value=kind)


def sorted_cells(right: Right) -> list[Cell]:
    """The cells by ascending budget, else in their order."""
    return sorted(right, key=lambda cell: cell.budget)


def bases_of(cells: Sequence[Cell], base: str, longer: bool = False) -> list[Cell]:
    """The cells that `cells` are compared with; scratch, however long, has no source."""
    from_scratch = longer or base == "scratch"
    return [cell._replace(source=None if from_scratch else cell.source, strategy=base, longer=longer) for cell in cells]


def _scores(right: Right, cells: Sequence[Cell], bases: Sequence[Cell]) -> Scores:
    """Paired differences of cells and their bases, as `area` has them; no pair where the base has no fits."""
    return area(right, cells, bases) if all(cell in right for cell in bases) else np.zeros((0, 0))


def _judged(
    right: Right, members: Sequence[Sequence[Cell]], conditions: Conditions, level: float, base: str
) -> list[Comparison]:
    """The comparisons on one test set, judged together; those of fewer than two pairs cannot be judged."""
    if not members:
        return []
    comparisons = {}
    for i, cells in enumerate(members):
        if (comparison := alone(right, cells, conditions, level, base)) is not None:
            reason = (
                f"of one pair of fits; {TWO}" if comparison.fits < 2 else ONE_GROUP if comparison.groups == 1 else ""
            )
            reason = reason or (COPIES if _copies(right, cells, bases_of(cells, base)) else "")
            comparisons[i] = comparison._replace(reason=reason, settled=reason in (ONE_GROUP, COPIES))
    able = [i for i, comparison in comparisons.items() if not comparison.reason]
    first = _first_equal(right, [members[i] for i in able], base)
    judged = [i for i, equal in zip(able, first, strict=True) if equal is None]
    if conditions.sequence:  # the share of each is that of the family as it was named, whoever can be judged by now
        level = 1 - (1 - level) * max(len(judged), 1) / len(members)
    verdicts = _verdicts(right, [members[i] for i in judged], conditions, level, base)
    withheld = _withheld(right, members, judged, verdicts, conditions, level, base)
    bounded = binary(right, [cell for cells in members for cell in cells])
    needed = _seeds_needed(right, [members[i] for i in judged], conditions, level, base)
    for i, seeds, (verdict, changes) in zip(judged, needed, withheld, strict=True):
        comparison = _with_verdict(comparisons[i], verdict, bounded)
        comparisons[i] = comparison._replace(seeds_needed=seeds if comparison.word else None)._replace(**changes)
    for i, equal in zip(able, first, strict=True):
        if equal is not None:
            other, source, strategy = comparisons[able[equal]], comparisons[i].source, comparisons[i].strategy
            equals = other.strategy + (f" from {other.source}" if other.source != source else "")
            comparisons[i] = other._replace(source=source, strategy=strategy, equals=equals)
    return list(comparisons.values())


NO_WORD: Mapping[str, Any] = {
    **{"word": "", "size": "", "p": None, "power": None, "power_equivalent": None, "warning": "", "seeds_needed": None},
    "settled": False,
    "narrow": None,
}
"""The fields of a comparison that is not judged."""
ONE_GROUP = "all test examples are of one group, so nothing is known of another"
COPIES = "its fits and those beside them are the same under every seed, so they are one pair"
TWO = "a verdict takes two seeds or more of a strategy and of what it is compared with"


def _with_verdict(comparison: Comparison, verdict: statistics.Verdict, bounded: bool) -> Comparison:
    """A comparison with its verdict; `bounded` says that its scores are rights and wrongs."""
    mean, *ends = verdict.interval[:3]
    low, high = map(_possible, ends) if bounded else ends
    comparison = comparison._replace(mean=mean, low=low, high=high, word=verdict.word, p=verdict.p)
    comparison = comparison._replace(items_part=verdict.items_part)
    if not verdict.word:
        no_word = {**NO_WORD, "settled": verdict.settled}
        return comparison._replace(**no_word, reason=verdict.warning.rstrip("."))
    return comparison._replace(
        size=verdict.size,
        narrow=(verdict.narrow.low, verdict.narrow.high),
        power=verdict.power,
        power_equivalent=verdict.power_equivalent,
        warning=verdict.warning.rstrip("."),
        settled=verdict.settled,
    )


def _copies(right: Right, cells: Sequence[Cell], bases: Sequence[Cell]) -> bool:
    """Whether in no cell a fit differs by its seed: a fit that was copied, or a learner that draws nothing."""
    entered = entering(right, cells, bases)
    by_cell = [
        [right[c][seed] for seed in sorted(seeds)]
        for side in (cells, bases)
        for c, seeds in zip(side, entered, strict=True)
    ]
    return all(np.array_equal(scores, fits[0]) for fits in by_cell for scores in fits)


def _verdicts(
    right: Right, members: Sequence[Sequence[Cell]], conditions: Conditions, level: float, base: str
) -> list[statistics.Verdict]:
    """The verdicts of members on one test set, each of two pairs or more, all at once."""
    if not members:
        return []
    scores = [_scores(right, cells, bases_of(cells, base)) / conditions.scale for cells in members]
    judge = sequences.verdicts if conditions.sequence else statistics.verdicts
    verdicts = judge(scores, conditions.margin / conditions.scale, level, groups=conditions.groups)
    return [
        verdict._replace(
            items_part=None if verdict.items_part is None else conditions.scale * verdict.items_part,
            interval=_scaled(verdict.interval, conditions.scale),
            narrow=_scaled(verdict.narrow, conditions.scale),
            margin=conditions.margin,
        )
        for verdict in verdicts
    ]


def _seeds_needed(
    right: Right, members: Sequence[Sequence[Cell]], conditions: Conditions, level: float, base: str
) -> list[SeedsNeeded | None]:
    """The seeds that each member would need in a family of these; None of a sequence, which goes on by itself."""
    if conditions.sequence:
        return [None] * len(members)
    margin = conditions.margin / conditions.scale
    scores = (_scores(right, cells, bases_of(cells, base)) / conditions.scale for cells in members)
    pilots = [sample_size.components(each, conditions.groups) for each in scores]
    return [sample_size.seeds_needed(pilot, margin, level, len(members)) for pilot in pilots]


def _scaled(interval: statistics.Interval, scale: float) -> statistics.Interval:
    """An interval of scores that are so many times as large."""
    mean, low, high, error = (scale * part for part in interval[:4])
    return interval._replace(mean=mean, low=low, high=high, standard_error=error)


def _withheld(
    right: Right,
    members: Sequence[Sequence[Cell]],
    judged: Sequence[int],
    verdicts: Sequence[statistics.Verdict],
    conditions: Conditions,
    level: float,
    base: str,
) -> list[tuple[statistics.Verdict, dict[str, Any]]]:
    """Each verdict, and the fields of its comparison that change where it holds only because fits diverged.

    A base that fails makes everything look good beside it, and where one test class is most of the test set the share
    that a diverged fit counts as may be more than other fits reach; likewise the best constant answer of another
    metric than accuracy. So positive must be said too with each diverged fit
    of the base replaced, test example by test example, by the best fit of its cell that did not diverge, and each of
    the strategy by its worst, if that is below the share; negative with those of the base at its worst; equivalent with
    both. Without such a fit there is no word, but that a strategy of which none is left may be negative. A difference
    is beyond the margin only if it is so then too.
    """
    cells, bases = (
        {cell for i in judged for cell in members[i]},
        {c for i in judged for c in bases_of(members[i], base)},
    )
    lost = {cell: sum(map(diverged, right.get(cell, {}).values())) for cell in cells | bases}
    if not any(lost.values()):
        return [(verdict, {}) for verdict in verdicts]
    chosen = [members[i] for i in judged]
    hard = _verdicts(_replaced(_replaced(right, bases, _best), cells, _worst), chosen, conditions, level, base)
    soft = _verdicts(_replaced(right, bases, _worst), chosen, conditions, level, base)
    withheld: list[tuple[statistics.Verdict, dict[str, Any]]] = []
    for i, verdict, strict, lenient in zip(judged, verdicts, hard, soft, strict=True):
        gone = [each for each in (members[i], bases_of(members[i], base)) if any(map(lost.get, each))]
        if not gone or verdict.word not in ("positive", "negative", "equivalent"):
            withheld.append((verdict, {}))
            continue
        others = {"positive": (strict,), "negative": (lenient,), "equivalent": (strict, lenient)}[verdict.word]
        needed = (
            bases_of(members[i], base) if verdict.word == "negative" else [*members[i], *bases_of(members[i], base)]
        )
        none_left = any(cell in lost and lost[cell] == len(right[cell]) for cell in needed)
        if not none_left and all(other.word == verdict.word for other in others):
            sure = all(other.size == verdict.size for other in others)
            withheld.append((verdict if sure else verdict._replace(size="open"), {}))
            continue
        instead = next((other.word for other in others if other.word != verdict.word), verdict.word)
        which = listed(f"{sum(lost[cell] for cell in each)} fits of {each[0].strategy}" for each in gone)
        without = "no other fit is left" if none_left else f"with other fits in their place it is {instead}"
        counts_as = constant_answer(conditions.metric)
        reason = f"{verdict.word} only because {which} diverged, which count as {counts_as}: {without}"
        withheld.append((verdict, {**NO_WORD, "reason": reason}))
    return withheld


def _replaced(
    right: Right, cells: Iterable[Cell], choose: Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
) -> Right:
    """`right` with each diverged fit of these cells replaced by one that `choose` takes of the others of its cell."""
    table = dict(right)
    for cell in cells:
        left = [scores for scores in right.get(cell, {}).values() if not diverged(scores)]
        if left:
            table[cell] = {s: choose(left, scores) if diverged(scores) else scores for s, scores in right[cell].items()}
    return table


def _best(left: Sequence[np.ndarray], _: np.ndarray) -> np.ndarray:
    return max(left, key=lambda scores: float(np.mean(scores)))


def _worst(left: Sequence[np.ndarray], share: np.ndarray) -> np.ndarray:
    return min([*left, share], key=lambda scores: float(np.mean(scores)))


def _first_equal(right: Right, members: Sequence[Sequence[Cell]], base: str) -> list[int | None]:
    """For each member the first before it with the same budgets, seeds and scores; None where there is none.

    What they are compared with is the same too: a strategy that looks at no source is one under all of them, but not
    beside another that does.
    """
    first: list[int | None] = []
    for i, cells in enumerate(members):
        bases = bases_of(cells, base)
        before = (
            k
            for k, others in enumerate(members[:i])
            if first[k] is None and _same(right, cells, others) and _same(right, bases, bases_of(others, base))
        )
        first.append(next(before, None))
    return first


def _same(right: Right, cells: Sequence[Cell], others: Sequence[Cell]) -> bool:
    """Whether two strategies, budget by budget and seed by seed, have the same scores on every test example."""
    if [cell.budget for cell in cells] != [cell.budget for cell in others]:
        return False
    pairs = [(right[cell], right[other]) for cell, other in zip(cells, others, strict=True)]
    return all(a.keys() == b.keys() and all(np.array_equal(a[seed], b[seed]) for seed in a) for a, b in pairs)


def alone(
    right: Right,
    cells: Sequence[Cell],
    conditions: Conditions,
    level: float,
    base: str = "scratch",
    against: str = STEPS,
    *,
    longer: bool = False,
) -> Comparison | None:
    """One comparison by itself, without a verdict; of a single pair over its test examples, with McNemar's exact p.

    `longer` says that `base` is scratch with the source's steps added. McNemar's is of right and wrong: where scores
    are real numbers its place has that of t, of the interval (`statistics.over_items`). There is none where a fit
    diverged. Where all test examples are of one group there is no interval. None without pairs.
    """
    bases = bases_of(cells, base, longer)
    scores = _scores(right, cells, bases)
    if not len(scores):
        return None
    entered = entering(right, cells, bases)
    sides = [list(zip(side, entered, strict=True)) for side in (cells, bases)]
    lost = [sum(diverged(right[cell][seed]) for cell, seeds in side for seed in seeds) for side in sides]
    unused = sum(len(right[cell].keys() - seeds) for side in sides for cell, seeds in side) if len(cells) > 1 else 0
    of_items, rights = conditions.groups, binary(right, (*cells, *bases))
    many = None if of_items is None else len(np.unique(of_items))
    of_pair = scores[0] if isinstance(scores, np.ndarray) and len(scores) == 1 else None
    single = of_pair is not None and len(cells) == 1 and not any(lost) and many != 1
    p = statistics.mcnemar(of_pair > 0, of_pair < 0, of_items) if of_pair is not None and single and rights else None
    mean, low, high = float(scores.mean()), np.nan, np.nan
    if many != 1:  # of one group nothing is known of others
        if of_pair is not None:
            interval = statistics.over_items(of_pair / conditions.scale, level, of_items)
        else:
            judge = sequences.interval if conditions.sequence else statistics.crossed
            interval = judge(scores / conditions.scale, level, of_items)
        mean, low, high, error, degrees, _ = _scaled(interval, conditions.scale)
        if single and not rights:
            p = 2 * float(scipy.stats.t.sf(abs(mean) / error, degrees))
    return Comparison(
        source=cells[0].source,
        target=cells[0].target,
        strategy=cells[0].strategy,
        budgets=tuple(cell.budget for cell in cells),
        against=against.format(base),
        fits=math.prod(scores.shape[:-1]),
        items=scores.shape[-1],
        mean=mean,
        low=_possible(low) if rights else low,
        high=_possible(high) if rights else high,
        word="",
        margin=conditions.margin,
        power=None,
        p=p,
        level=level,
        groups=many,
        diverged=(lost[0], lost[1]),
        unused=unused,
        metric=conditions.metric,
        sequence=conditions.sequence and len(scores) > 1,
    )


def _possible(end: float) -> float:
    """The end of an interval, within what a difference of two accuracies can be."""
    return float(np.clip(end, -1, 1))


def constant_answer(metric: Metric) -> str:
    """What a fit that diverged counts as, in words."""
    return "the share of the most frequent test class" if metric == ACCURACY else "the best constant answer"


def base_of(family: Sequence[Comparison]) -> str:
    """The name of what a family is compared with: scratch, or another strategy."""
    return family[0].against.removesuffix(STEPS.format("")) if family else "scratch"


def sentence(family: Iterable[Comparison], level: float, verdict_on: str = "target") -> str:
    """The verdicts as one sentence: direction and size, what was not judged and why, and the level of them all.

    Of verdicts on targets of several metrics, a sentence a metric. Exploratory ones come last, in a sentence that says
    so.
    """
    every = list(family)
    primary = [comparison for comparison in every if not comparison.exploratory]
    exploratory = [comparison for comparison in every if comparison.exploratory]
    if not any(comparison.word for comparison in exploratory):
        return _sentence(primary, level, verdict_on, "all verdicts together")
    text = _sentence(primary, level, verdict_on, "the verdicts of the primary family together")
    return f"{text} Exploratory: {_sentence(exploratory, level, verdict_on, 'the exploratory ones among themselves')}"


def _sentence(comparisons: Sequence[Comparison], level: float, verdict_on: str, together: str) -> str:
    """The sentence on one family; `together` says what the level is for."""
    if not any(comparison.word for comparison in comparisons):
        lacking = _lacking(comparisons)
        whys = [reason if len(lacking) == 1 else f"{listed(names)} {reason}" for reason, names in lacking.items()]
        return f"Nothing was judged: {'; '.join(whys) or TWO}."
    metrics = list(dict.fromkeys(comparison.metric for comparison in comparisons))
    by_metric = [[each for each in comparisons if each.metric == metric] for metric in metrics]
    texts = [_of_one_metric(members, comparisons, level, len(metrics) > 1, together) for members in by_metric]
    subject = "Of what is kept of the source: " if verdict_on == "retention" else ""
    return subject + " ".join(text if subject else text[:1].upper() + text[1:] for text in texts)


def _lacking(comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """{why there is no verdict: of what}."""
    lacking: dict[str, list[str]] = {}
    for each in comparisons:
        if not each.word and each.reason:
            lacking.setdefault(each.reason, []).append(named_among(each, comparisons))
    return lacking


def _of_one_metric(
    members: Sequence[Comparison], among: Sequence[Comparison], level: float, several: bool, together: str
) -> str:
    """The sentence on verdicts of one metric; `several` says that there are others."""
    judged = sorted((each for each in members if each.word), key=lambda each: -each.mean)
    metric, base, with_words = members[0].metric, base_of(among), [each for each in among if each.word]
    clauses = []
    for (word, size), meaning in _MEANING.items():
        chosen = [each for each in judged if each.word == word and (each.size == size or not size)]
        if chosen:
            clauses.append(f"{meaning.format(base)} {listed(_named(each, with_words) for each in chosen)}")
    clauses += [f"not judged: {listed(names)} ({reason})" for reason, names in _lacking(members).items()]
    unit, margin = units.of_differences(metric), units.factor(metric) * members[0].margin
    points = f"a margin of {units.amount(margin, unit)}"
    if metric != ACCURACY or several:
        points += f" of {units.spoken(metric)}"
    if not metric.larger_is_better:
        points += ", of which less is better: differences are turned, so that positive is better"
    looked_at = ", whenever they are looked at" if members[0].sequence else ""
    return f"{'; '.join(clauses)} ({points}, {100 * level:g} % for {together}{looked_at}{_narrower(judged)})."


def _narrower(judged: Sequence[Comparison]) -> str:
    """Which narrower intervals, of equivalence, lie within the margin where those of the sentence reach beyond it."""
    texts = []
    for each in judged:
        if each.size == "within" and each.narrow and max(-each.low, each.high) >= each.margin:
            level = 100 * (2 * each.level - 1)
            low, high = (units.difference(each.metric, end).split(" ")[0] for end in each.narrow)
            texts.append(f"{named_among(each, judged)} by its simultaneous {level:.4g} % interval, {low} to {high}")
    return f"; within the margin is {listed(texts)}" if texts else ""


_MEANING = {
    ("positive", "beyond"): "better than {} by more than the margin:",
    ("positive", "open"): "better than {}, perhaps by less than the margin:",
    ("positive", "within"): "better than {}, by less than the margin:",
    ("negative", "beyond"): "worse than {} by more than the margin:",
    ("negative", "open"): "worse than {}, perhaps by less than the margin:",
    ("negative", "within"): "worse than {}, by less than the margin:",
    ("equivalent", ""): "no difference from {} that matters:",
    ("undecided", ""): "neither better nor worse than {} is shown:",
}
"""(direction, size) -> what it says. Nothing of transfer: a strategy may take nothing from the source, or be worse for
what it freezes."""


def _named(comparison: Comparison, among: Sequence[Comparison]) -> str:
    """A strategy with its difference and the ends of its interval, since a mean alone says more than is known."""
    low, high = (units.difference(comparison.metric, end).split(" ")[0] for end in (comparison.low, comparison.high))
    return f"{named_among(comparison, among)} ({units.difference(comparison.metric, comparison.mean)}, {low} to {high})"


def named_among(comparison: Comparison, among: Sequence[Comparison]) -> str:
    """A strategy, with its source and target, or its budget, where there are several of them."""
    text = comparison.strategy
    if len({other.budgets for other in among if other[:3] == comparison[:3]}) > 1:
        text += f" at {comparison.budgets[0]:,} labels"
    if len({(other.source, other.target) for other in among}) > 1:
        tasks = f"from {comparison.source} to {comparison.target}" if comparison.source else f"on {comparison.target}"
        text += f" {tasks}"
    return text
