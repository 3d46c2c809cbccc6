"""The design that decides most for the compute at hand: which strategies, label budgets and how many seeds.

A pilot says how seeds and test items make the differences vary (`sample_size`). From it follow the variance components
of every strategy at every label budget and over their area (`measured`), and of every study of some of its strategies
at some of its budgets how many verdicts it would reach (`designs`). All strategies of a design are judged together: a
family of its own, the primary one, which is named before the study; what is outside it is exploratory.

Verdicts on some budgets are of the area over these. A design is chosen by the pilot, also by its differences, so that
the study itself takes fresh seeds.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from tljax.study import sample_size
from tljax.study.sample_size import Components
from tljax.study.verdicts import Cell, Conditions, Right, area, entering, weights
from tljax.types import InputError

LEAST_SEEDS = 3
"""Two seeds say little of how fits vary (`statistics.verdicts` warns of them)."""
MOST_BUDGETS = 8
"""Up to so many label budgets all choices among them are looked at; of more, those that follow one another."""
_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of what a pilot leaves open of the variance of fits, and of a difference: equal parts, by their middle."""


class Measured(NamedTuple):
    """What a pilot says of one strategy over some label budgets."""

    source: str | None
    strategy: str
    """Its label."""
    budgets: tuple[int, ...]
    """The numbers of labels that the area is over; one alone is that budget."""
    components: Components
    """In units of the scores' scale, with test items in their groups."""
    of_single_items: Components | None
    """The same with each item drawn by itself, where items are in groups."""


class Cost(NamedTuple):
    """What one more seed costs, in fits on the target: as many steps as these take on average."""

    source: float = 0.0
    """The fit that trains a source anew."""
    longer: float = 0.0
    """Scratch at one budget with the source's steps added to its own."""


class Design(NamedTuple):
    """A study that could be run."""

    members: tuple[tuple[str | None, str], ...]
    """(source, strategy) of each comparison of the primary family."""
    budgets: tuple[int, ...]
    seeds: int
    fits: float
    """What it costs, in fits on the target."""
    decided: tuple[float, ...]
    """For each member the chance that its verdict is another word than undecided."""

    @property
    def verdicts(self) -> float:
        """How many verdicts are decided on average."""
        return sum(self.decided)


def measured(
    right: Right,
    members: Sequence[tuple[str | None, str]],
    budgets: Sequence[int],
    conditions: Conditions,
    base: str = "scratch",
) -> list[Measured]:
    """What a pilot says of each member over these budgets; those without two pairs of fits are left out.

    `right` has the cells of one target alone.
    """
    [target] = {cell.target for cell in right} or {""}
    each = []
    for source, strategy in members:
        cells = [Cell(source, target, strategy, budget) for budget in budgets]
        bases = [Cell(None if base == "scratch" else source, target, base, budget) for budget in budgets]
        if not all(cell in right for cell in (*cells, *bases)) or min(map(len, entering(right, cells, bases))) < 2:
            continue
        scores = area(right, cells, bases) / conditions.scale
        single = None if conditions.groups is None else sample_size.components(scores)
        of_groups = sample_size.components(scores, conditions.groups)
        each.append(Measured(source, strategy, tuple(budgets), of_groups, single))
    return each


class Allotment(NamedTuple):
    """What seeds of their own in each label budget do to the variance of an area that comes from the fits.

    It is over that with the same number of seeds that all budgets share, of as many fits on the target.
    """

    source: str | None
    strategy: str
    equal: float
    """With as many seeds at each budget."""
    allotted: float
    """With seeds in the shares of `shares_of_seeds`."""


def allotments(
    right: Right, members: Sequence[tuple[str | None, str]], conditions: Conditions, base: str = "scratch"
) -> tuple[list[Allotment], np.ndarray]:
    """(what seeds apart do for each member, the share of all seeds that each budget gets, float [budgets]).

    The budgets of a pilot ascend; `right` has the cells of one target alone. Under seeds of their own the variance of
    an area is the sum of those of its budgets times their weights squared, where shared seeds add their covariances.
    No members are left where the pilot has one budget, or no pairs.
    """
    budgets = sorted({cell.budget for cell in right})
    over = measured(right, members, budgets, conditions, base)
    single = [{(each.source, each.strategy): each.components.of_fits for each in at} for at in (
        measured(right, members, (budget,), conditions, base) for budget in budgets
    )]  # fmt: skip
    areas = [each for each in over if all((each.source, each.strategy) in at for at in single)]
    if len(budgets) < 2 or not areas:
        return [], np.ones(len(budgets)) / max(len(budgets), 1)
    squares = np.array([[at[each.source, each.strategy] for at in single] for each in areas])
    whole = np.array([each.components.of_fits for each in areas])
    weighted = weights(budgets) ** 2 * squares / whole[:, None]  # [members, budgets]
    shares = shares_of_seeds(weighted.sum(0))
    equal, allotted = weighted.sum(1), (weighted / shares).sum(1) / len(budgets)
    ratios = zip(areas, equal, allotted, strict=True)
    return [Allotment(each.source, each.strategy, float(a), float(b)) for each, a, b in ratios], shares


def shares_of_seeds(variances: np.ndarray) -> np.ndarray:
    """The share of all seeds at each budget that makes the sum of variance / seeds least: float [budgets] to [budgets].

    In proportion to the standard deviations (Neyman 1934, "On the two different aspects of the representative method";
    Cochran 1977, "Sampling techniques", section 5.5, where all units cost the same).

    >>> shares_of_seeds(np.array([4.0, 1.0])).round(3).tolist()
    [0.667, 0.333]
    """
    deviations = np.sqrt(variances)
    return np.asarray(deviations / deviations.sum())


def seeds_of_budgets(shares: np.ndarray, seeds: int) -> list[int]:
    """So many seeds dealt out by shares, float [budgets]: whole numbers of two or more, whose sum is `seeds` if it can.

    >>> seeds_of_budgets(np.array([0.6, 0.38, 0.02]), 20)
    [11, 7, 2]
    """
    wanted = np.maximum(shares * seeds, 2.0)
    numbers = np.floor(wanted).astype(int)
    while numbers.sum() < seeds:
        numbers[np.argmax(wanted - numbers)] += 1
    while numbers.sum() > seeds and numbers.max() > 2:
        numbers[np.argmax(np.where(numbers > 2, numbers - wanted, -np.inf))] -= 1
    return [int(number) for number in numbers]


def chance_of_decision(pilot: Components, seeds: int, margin: float, level: float, family: int) -> float:
    """The chance that a study of so many fresh seeds on the pilot's test items reaches a verdict.

    It is the mean over what the pilot leaves open: the variance of fits, whose estimate is chi-square over its degrees,
    and the difference on these items, which is normal about the pilot's (the assurance of O'Hagan, Stevens and
    Campbell 2005, "Assurance in clinical trial design", with flat priors).

    >>> pilot = Components(0.02, 20, 10_000, of_fits=1.0, of_items=0.01, residual=0.1)
    >>> round(chance_of_decision(pilot, 20, 0.005, 0.95, 1), 2)
    1.0
    """
    total = 0.0
    for share in _SHARES:
        of_fits = pilot.of_fits * (pilot.fits - 1) / float(special.chdtri(pilot.fits - 1, share))
        true = pilot._replace(of_fits=max(of_fits, sample_size.least_square(pilot)))
        error = math.sqrt(true.of_fits / (pilot.fits * pilot.items))
        differences = pilot.mean + error * special.ndtri(np.array(_SHARES))
        words = sample_size.chances(true, seeds, margin, level, family, differences, same_items=True)
        total += float(words.decided.mean())
    return total / len(_SHARES)


def designs(
    right: Right,
    members: Sequence[tuple[str | None, str]],
    conditions: Conditions,
    level: float,
    fits: float,
    base: str = "scratch",
    cost: Cost = Cost(),  # noqa: B008
) -> list[Design]:
    """For each number of strategies and of budgets the design with most verdicts decided, most first.

    `fits` is the compute, in fits on the target, those of `base` and of sources counted. Of so many strategies those
    are taken that are decided most likely. Raises InputError where no design has `LEAST_SEEDS` seeds.
    """
    budgets = sorted({cell.budget for cell in right})
    margin = conditions.margin / conditions.scale
    best: dict[tuple[int, int], Design] = {}
    for chosen in _choices(budgets):
        pilots = measured(right, members, chosen, conditions, base)
        for k in range(1, len(pilots) + 1):
            seeds = _seeds(fits, k, chosen, cost, {pilot.source for pilot in pilots})
            if seeds < LEAST_SEEDS:
                continue
            chances = [chance_of_decision(each.components, seeds, margin, level, k) for each in pilots]
            first = sorted(range(len(pilots)), key=lambda i: -chances[i])[:k]
            first = sorted(first)
            design = Design(
                tuple((pilots[i].source, pilots[i].strategy) for i in first),
                chosen,
                seeds,
                seeds * _fits_of_a_seed(k, chosen, cost, len({pilots[i].source for i in first})),
                tuple(chances[i] for i in first),
            )
            key = k, len(chosen)
            if key not in best or design.verdicts > best[key].verdicts:
                best[key] = design
    if not best:
        raise InputError(
            f"{fits:g} is not enough for {LEAST_SEEDS} seeds of one strategy and {base} at one label budget",
            field="design_fits",
            value=f"{fits:g}",
        )
    return sorted(best.values(), key=lambda design: -design.verdicts)


def _choices(budgets: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every choice of budgets, ascending; of many those that follow one another."""
    if len(budgets) > MOST_BUDGETS:
        for start, end in itertools.combinations(range(len(budgets) + 1), 2):
            yield tuple(budgets[start:end])
        return
    for many in range(1, len(budgets) + 1):
        yield from itertools.combinations(budgets, many)


def _fits_of_a_seed(strategies: int, budgets: Sequence[int], cost: Cost, sources: int) -> float:
    """What one seed costs: the strategies and their base at each budget, sources, and scratch that is longer."""
    return len(budgets) * (strategies + 1 + cost.longer * sources) + cost.source * sources


def _seeds(fits: float, strategies: int, budgets: Sequence[int], cost: Cost, sources: set[str | None]) -> int:
    """The seeds that a design affords."""
    return int(fits / _fits_of_a_seed(strategies, budgets, cost, min(len(sources), strategies)))


def cells_of_target(right: Right, target: str) -> dict[Cell, Mapping[Any, np.ndarray]]:
    """The cells of one target, without scratch that is longer."""
    return {cell: fits for cell, fits in right.items() if cell.target == target and not cell.longer}
