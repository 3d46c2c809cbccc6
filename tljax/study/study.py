"""Fits compared: which differences there are to judge, and what was found of each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tljax.study import statistics
from tljax.study.summary import Curves, Row, listed
from tljax.types import InputError

STEPS = "{} at equal target steps"
TOTAL = "scratch at equal source and target steps"


class Comparison(NamedTuple):
    """A strategy against scratch."""

    source: str | None
    target: str
    strategy: str
    """Its label, such as last_k:k=2."""
    budgets: tuple[int, ...]
    """Labels: one number of examples, or all that the area under the budget curve is over."""
    against: str
    fits: int
    """Pairs of one seed."""
    items: int
    """Test examples."""
    mean: float
    """A difference of accuracies, a fraction, as are the ends of its interval and the margin."""
    low: float
    high: float
    word: str
    """positive, negative, equivalent or undecided; '' outside the family that is judged."""
    margin: float
    power: float | None
    """Of finding a difference of the margin."""
    p: float | None


class Study(NamedTuple):
    """All that a report tells."""

    rows: Sequence[Row]
    curves: Curves
    family: Sequence[Comparison]
    """With verdicts."""
    others: Sequence[Comparison]
    """Each budget by itself, and those at equal source and target steps: without."""
    milestones: Sequence[Mapping[str, Any]]
    verdict: str
    """The sentence that comes first."""
    notes: Sequence[str]
    images: Mapping[str, tuple[np.ndarray, Sequence[str]]]
    """{target: (the images most often taken for another class, uint8 [k, height, width, channels]; a caption each)}."""


class Cell(NamedTuple):
    """What is alike in fits that differ in their seed."""

    source: str | None
    target: str
    strategy: str
    budget: int


Right = Mapping[Cell, Mapping[int, np.ndarray]]
"""{cell: {seed: which test examples the fit gets right, bool [items]}}."""


def differences(right: Right, cell: Cell, base: Cell) -> np.ndarray:
    """Float64 [pairs, items]: 1 where the cell's fit alone is right, -1 where that of `base` alone, paired by seed."""
    common = sorted(right.get(cell, {}).keys() & right.get(base, {}).keys())
    items = {len(right[where][seed]) for seed in common for where in (cell, base)}
    if len(items) > 1:
        raise InputError(f"fits of {cell.target} were judged on {sorted(items)} test examples: give all the same")
    pairs = [right[cell][seed].astype(float) - right[base][seed] for seed in common]
    return np.array(pairs) if pairs else np.zeros((0, 0))


def area(right: Right, cells: Sequence[Cell], bases: Sequence[Cell]) -> np.ndarray:
    """Differences of the area under the budget curve, over pairs that all budgets share: float64 [pairs, items].

    The mean over the logarithm of the label budget, by trapezoids; cells and bases are in the order of the budgets.
    """
    common = set.intersection(*(set(right.get(cell, {})) for cell in (*cells, *bases)))
    kept = {cell: {seed: right[cell][seed] for seed in common} for cell in (*cells, *bases)}
    parts = [differences(kept, cell, base) for cell, base in zip(cells, bases, strict=True)]
    return np.tensordot(weights([cell.budget for cell in cells]), np.stack(parts), 1)


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


def compared(
    right: Right, margin: float, level: float, kind: str = "area", base: str = "scratch"
) -> tuple[list[Comparison], list[Comparison]]:
    """(the family with its verdicts, each budget without): every strategy against `base` of its source and target.

    `kind` is what the family is of: 'area' (one comparison a strategy and source, over all budgets) or 'budgets'
    (each budget by itself). The level is that of all verdicts together: within a target by max-t over correlated
    differences, over targets (other test examples) by Bonferroni. Raises InputError for another kind.
    """
    check_family(kind)
    single = [[cell] for cell in sorted_cells(right) if cell.strategy not in ("scratch", base)]
    curves: dict[Any, list[Cell]] = {}
    for (cell,) in single:
        curves.setdefault((cell.source, cell.target, cell.strategy), []).append(cell)
    members = single if kind == "budgets" else list(curves.values())
    targets = list(dict.fromkeys(cells[0].target for cells in members))
    own = 1 - (1 - level) / max(len(targets), 1)
    family = []
    for target in targets:
        family += _judged(right, [cells for cells in members if cells[0].target == target], margin, own, base)
    others = [found for cells in single if (found := alone(right, cells, margin, level, base)) is not None]
    return family, others if kind == "area" and len({cells[0].budget for cells in single}) > 1 else []


def check_family(kind: str) -> None:
    """Raise InputError for what no family can be of."""
    if kind in ("tasks", "targets", "sources"):
        raise InputError(
            f"--family={kind}: a claim over {kind} needs them drawn at random; these speak of themselves alone"
        )
    if kind not in ("area", "budgets"):
        raise InputError(f"--family={kind}: it is area or budgets")


def sorted_cells(right: Right) -> list[Cell]:
    """Cells in their order, budgets ascending."""
    return sorted(right, key=lambda cell: cell.budget)


def _bases(cells: Sequence[Cell], base: str) -> list[Cell]:
    """What cells are compared with; scratch, however long, has no source."""
    return [cell._replace(source=None if base.startswith("scratch") else cell.source, strategy=base) for cell in cells]


def _scores(right: Right, cells: Sequence[Cell], base: str) -> np.ndarray:
    """Float64 [pairs, items]; no pair where the base has no fits."""
    bases = _bases(cells, base)
    return area(right, cells, bases) if all(cell in right for cell in bases) else np.zeros((0, 0))


def _judged(
    right: Right, members: Sequence[Sequence[Cell]], margin: float, level: float, base: str
) -> list[Comparison]:
    """The comparisons of one target, judged together; those of fewer than two pairs cannot be."""
    scores = [_scores(right, cells, base) for cells in members]
    able = [i for i, values in enumerate(scores) if len(values) > 1]
    verdicts = dict(zip(able, statistics.verdicts([scores[i] for i in able], margin, level), strict=True))
    found = []
    for i, cells in enumerate(members):
        one = alone(right, cells, margin, level, base)
        if one and i in verdicts:
            word, wide, _, power, p, _ = verdicts[i]
            one = one._replace(mean=wide.mean, low=wide.low, high=wide.high, word=word, power=power, p=p)
        found += [one] if one else []
    return found


def alone(
    right: Right, cells: Sequence[Cell], margin: float, level: float, base: str = "scratch", against: str = STEPS
) -> Comparison | None:
    """One comparison by itself, without a verdict; of a single pair over its test examples, with McNemar's exact p.

    None without pairs.
    """
    scores = _scores(right, cells, base)
    if not len(scores):
        return None
    interval = statistics.crossed(scores, level) if len(scores) > 1 else statistics.over_items(scores[0], level)
    p = statistics.mcnemar(scores[0] > 0, scores[0] < 0) if len(scores) == len(cells) == 1 else None
    first, budgets, (fits, items) = cells[0], tuple(cell.budget for cell in cells), scores.shape
    about = (first.source, first.target, first.strategy, budgets, against.format(base), fits, items)
    return Comparison(*about, *interval[:3], "", margin, None, p)


def sentence(family: Iterable[Comparison], level: float) -> str:
    """The verdicts as one sentence."""
    judged = sorted((one for one in family if one.word), key=lambda one: -one.mean)
    if not judged:
        return "Nothing was judged: a verdict takes two seeds or more of a strategy and of scratch."
    said = []
    for word, meaning in _MEANING.items():
        if names := [_named(one, judged) for one in judged if one.word == word]:
            said.append(f"{meaning} {listed(names)}")
    points = f"a margin of {100 * judged[0].margin:g} points, {100 * level:g} % for all verdicts together"
    text = f"{'; '.join(said)} ({points})."
    return text[:1].upper() + text[1:]


_MEANING = {
    "positive": "transfer helped under",
    "negative": "it hurt under",
    "equivalent": "it made no difference that matters under",
    "undecided": "nothing can be said of",
}


def _named(one: Comparison, among: Sequence[Comparison]) -> str:
    text = f"{one.strategy} ({100 * one.mean:+.2f} points)"
    if len({(other.source, other.target) for other in among}) > 1:
        text += f" from {one.source} to {one.target}"
    return text
