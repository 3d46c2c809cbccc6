"""Print what a pilot says of a study that is to come: where variance comes from, what a verdict costs, which design.

Of every strategy at every label budget, and of the area over all of them: the variance components, the seeds that the
margin takes alone and in the family, and what the test items forbid whatever the seeds. Then the designs, and the flags
of the one that decides most.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.pages import tables
from experiments.runs import command_line, console, predictions
from experiments.runs.console import Cell as TableCell
from experiments.runs.console import Table
from experiments.runs.judging import (
    Judging,
    from_record,
    judged,
    margins,
    require_valid,
    with_margin,
    with_primary_family,
)
from experiments.runs.predictions import Predictions
from tljax.study import design, sample_size, units
from tljax.study.design import Cost, Design, Measured
from tljax.study.results import Result, SeedAndDraw
from tljax.study.summary import listed
from tljax.study.verdicts import Cell, Conditions, Right, bases_of, conditions_of, entering
from tljax.types import InputError

SHOWN = 12
"""Designs that are printed."""


def show(parts: Sequence[Predictions], judging: Judging, fits: float | None) -> None:
    """Print the components, the seeds and the designs of each target; `fits` is the compute, None that of the pilot."""
    if judging.verdict_on != "target":
        reason = "a design is of verdicts on the target: leave --design out, or judge the target"
        raise InputError(reason, field="verdict_on", value=judging.verdict_on)
    table, metrics = predictions.right(parts), predictions.metrics_of(parts)
    if not table:
        raise InputError("--design: the run has no fit to learn from: name one that has ended, with two seeds or more")
    groups = predictions.all_groups(parts)
    terms = conditions_of(table, metrics, margins(judging, metrics), groups, metrics)
    family, _ = judged(parts, replace(judging, family="area", looks=1, primary_family=(), until=None), table)
    able = [each for each in family if not each.reason and not each.equals]
    if not able:
        reasons = listed(dict.fromkeys(each.reason for each in family)) or "there is no strategy beside its base"
        raise InputError(f"--design: nothing of this run can be judged: {reasons}")
    for each in able:
        cells = [Cell(each.source, each.target, each.strategy, budget) for budget in each.budgets]
        entered = entering(table, cells, bases_of(cells, judging.against))
        if entered[0] != entered[-1]:
            raise InputError(
                "--design: label budgets of this run have seeds of their own (--seeds_apart), which do not tell how "
                "errors at two budgets go together: name a run whose budgets share their seeds"
            )
    level = 1 - (1 - judging.level) / (judging.looks * len(metrics))
    for target, conditions in terms.items():
        members = [(each.source, each.strategy) for each in able if each.target == target]
        primary = [member for member in members if not judging.primary_family or member[1] in judging.primary_family]
        of_target = design.cells_of_target(table, target)
        longer = [row for part in parts if part.longer for row in part.rows if row.target == target]
        cost = cost_of([row for part in parts if not part.longer for row in part.rows if row.target == target], longer)
        cost = cost if judging.against == "scratch" else cost._replace(longer=0.0)
        _of_target(of_target, target, (members, primary), conditions, level, judging)
        _designs(of_target, primary, conditions, level, judging, cost, fits)


def show_of_run(folder: Path, judging: Judging, typed: Collection[str], fits: float | None) -> None:
    """Print the design that a run directory leads to, judged as it was but for what was `typed` as flags."""
    study = predictions.read_study(folder)
    names = [field.name for field in command_line.fields(Judging) if field.name in typed]
    judging = replace(from_record(study.judging or {}), **{name: getattr(judging, name) for name in names})
    require_valid(judging)
    judging = with_margin(judging, predictions.metrics_of(study.parts).values())
    labels = dict.fromkeys(cell.strategy for cell in predictions.right(study.parts))
    show(study.parts, with_primary_family(judging, {name: name for name in labels}), fits)


def cost_of(rows: Sequence[Result], longer: Sequence[Result]) -> Cost:
    """What a seed costs beside its fits on the target, by their steps: its source, and scratch that is `longer`.

    A source costs nothing where all seeds start from the same.
    """
    steps = [row.steps for row in rows if row.steps]
    mean = float(np.mean(steps)) if steps else 0.0
    if not mean:
        return Cost()
    more = [row.steps for row in longer if row.steps]
    of_sources = [row.source_steps for row in rows if row.source_steps]
    anew = len({(row.source, row.source_accuracy) for row in rows if row.source}) > len({row.source for row in rows})
    source = float(np.mean(of_sources)) / mean if of_sources and anew else 0.0
    return Cost(source, float(np.mean(more)) / mean if more else 0.0)


def _of_target(
    right: Right,
    target: str,
    members: tuple[Sequence[tuple[str | None, str]], Sequence[tuple[str | None, str]]],
    conditions: Conditions,
    level: float,
    judging: Judging,
) -> None:
    """Print the components and seeds of one target, for all members and for the primary family among them."""
    every, primary = members
    budgets = sorted({cell.budget for cell in right})
    overs = [*([tuple(budgets)] if len(budgets) > 1 else []), *((budget,) for budget in budgets)]
    pilots = [each for over in overs for each in design.measured(right, every, over, conditions, judging.against)]
    pilots.sort(key=lambda each: list(every).index((each.source, each.strategy)))
    unit = units.of_differences(conditions.metric)
    crossed = any(each.components.of_draws for each in pilots)
    parts = [*(OF_DRAWS if crossed else OF_SEEDS), *_OF_ITEMS[conditions.groups is not None]]
    console.show(
        Table(
            units.headed(f"where the variance of a difference from {judging.against} comes from, {target}", unit),
            ["strategy", "source", "labels", "pairs", "difference", *parts],
            [_components(each, conditions) for each in pilots],
            3,
        ),
        [
            (_CROSSED if crossed else _TOGETHER),
            "the standard error of items is that of the mean over these test examples drawn anew, whatever the seeds; "
            "the rest is of one fit",
        ],
    )
    if crossed:
        _at_equal_fits(pilots, conditions, unit)
    margin = units.factor(conditions.metric) * conditions.margin
    family = max(len(primary), 1)
    title = f"seeds that a margin of {margin:g} {unit} takes with a chance of {100 * sample_size.POWER:.0f} %"
    console.show(
        Table(
            f"{title}, {target}",
            [
                "strategy",
                "source",
                "labels",
                "to find it",
                f"in a family of {family}",
                "to call 0 equivalent",
                f"in a family of {family}",
                "least margin of the items",
                "forbidden",
            ],
            [_seeds(each, conditions, level, family) for each in pilots],
            3,
        ),
        [
            "ranges are of 90 %: a pilot knows the variance of seeds no better",
            "the least margin is what the test items alone need, whatever the seeds: below it nothing is called "
            f"equivalent (in a family of {family})",
        ],
    )


OF_SEEDS, OF_DRAWS = ("sd of seeds",), ("sd of seeds", "sd of draws", "sd of both")
"""The headings of the components of fits, and where draws of labels were crossed with seeds."""
_OF_ITEMS = {
    False: ("se of items", "sd of the rest"),
    True: ("se of groups", "se of items alone", "sd of the rest"),
}
"""Whether items are in groups -> the headings of the components of items."""
_TOGETHER = (
    "a seed draws source, head, order and labels anew, as far as none of these is pinned, and no labels where a budget "
    "is all there are: its standard deviation is of all of them together"
)
_CROSSED = (
    "each seed of source, head and order had each draw of labels: standard deviations are of either, and of what one "
    "seed does with one draw beside its mean; in what follows each seed draws labels of its own, as without --draws"
)


def _at_equal_fits(pilots: Sequence[Measured], conditions: Conditions, unit: str) -> None:
    """Print how well as many fits know a mean, with draws of labels crossed with seeds and without."""
    factor = units.factor(conditions.metric) * conditions.scale
    digits = max(units.digits(conditions.metric), 2)
    rows = []
    for each in (each for each in pilots if each.components.of_draws):
        apart = each.components.of_draws
        assert apart
        seeds, draws = apart.numbers
        errors = (apart.error(seeds, draws), math.hypot(*apart[:3]) / math.sqrt(seeds * draws))
        texts = (f"{factor * error:.{digits}f}" for error in errors)
        about = (each.strategy, each.source or tables.NOTHING, _labels(each.budgets))
        rows.append(list(map(TableCell, (*about, f"{seeds} x {draws}", *texts))))
    console.show(
        Table(
            f"standard error of a mean over as many fits, of seeds and labels alone{f' ({unit})' if unit else ''}",
            ["strategy", "source", "labels", "seeds x draws", "crossed", "a seed and a draw each"],
            rows,
            3,
        ),
        ["crossed, a source serves all draws of its seed; else each fit on the target takes a source of its own"],
    )


def _components(each: Measured, conditions: Conditions) -> list[TableCell]:
    """A row of the table of components: the standard deviations over seeds (and draws), the mean's by the items, the
    rest."""
    factor = units.factor(conditions.metric) * conditions.scale
    digits = units.digits(conditions.metric)
    seeds, items, rest = each.components.spread()
    apart = each.components.of_draws
    single = [] if each.of_single_items is None else [each.of_single_items.spread()[1]]
    parts = [*((seeds,) if apart is None else apart[:3]), items, *single, rest]
    pairs = each.components.fits if apart is None else math.prod(apart.numbers)
    difference = tables.signed(factor * each.components.mean, digits)
    texts = [f"{factor * part:.{max(digits, 2)}f}" for part in parts]
    about = (each.strategy, each.source or tables.NOTHING, _labels(each.budgets), str(pairs))
    return list(map(TableCell, (*about, difference, *texts)))


def _labels(budgets: Sequence[int]) -> str:
    return f"{budgets[0]:,}" if len(budgets) == 1 else "area"


def _seeds(each: Measured, conditions: Conditions, level: float, family: int) -> list[TableCell]:
    """A row of the table of seeds."""
    margin, factor = conditions.margin / conditions.scale, units.factor(conditions.metric) * conditions.scale
    alone = sample_size.seeds_needed(each.components, margin, level)
    together = sample_size.seeds_needed(each.components, margin, level, family)
    (find, equivalent), (find_all, equivalent_all) = map(tables.seeds_needed, (alone, together))
    least = sample_size.least_margin(each.components, level, family)
    digits = max(units.digits(conditions.metric), 2)
    about = map(TableCell, (each.strategy, each.source or tables.NOTHING, _labels(each.budgets)))
    forbids = "by the items" if least >= margin else tables.NOTHING
    return [*about, find, find_all, equivalent, equivalent_all, TableCell(f"{factor * least:.{digits}f}"),
            TableCell(forbids)]  # fmt: skip


def _designs(
    right: Right,
    members: Sequence[tuple[str | None, str]],
    conditions: Conditions,
    level: float,
    judging: Judging,
    cost: Cost,
    fits: float | None,
) -> None:
    """Print the designs of one target, and the flags of the first."""
    budgets = sorted({cell.budget for cell in right})
    every = {replicate for each in right.values() for replicate in each}
    seeds = {each.seed if isinstance(each, SeedAndDraw) else each for each in every}
    draws = {each.draw for each in every if isinstance(each, SeedAndDraw)}
    sources = len({source for source, _ in members})
    spent = sum(map(len, right.values()))
    spent_in_all = spent + sources * (len(seeds) * cost.source + len(every) * cost.longer * len(budgets))
    limit = spent_in_all if fits is None else fits
    ranked = design.designs(right, members, conditions, level, limit, judging.against, cost)
    several = sources > 1
    console.show(
        Table(
            f"designs of at most {limit:g} fits, {base_text(judging, cost)}",
            ["primary family", "labels", "seeds", "fits", "verdicts decided", "each"],
            [_row(each, several) for each in ranked[:SHOWN]],
            2,
        ),
        [
            "decided: the verdict is another word than undecided; a mean over what the pilot leaves open, on these "
            "test items, with fresh seeds; designs ask different questions, of their labels, and what differs by less "
            "than a pilot knows is no order",
            "for each number of strategies and of label budgets the best design, the most verdicts first; a strategy "
            "outside the primary family is exploratory",
        ],
    )
    best, first = ranked[0], max(seeds | draws) + 1
    over_budgets = next((each for each in ranked if len(each.budgets) > 1), None)
    console.say(
        f"  by this pilot the most verdicts are expected of this design, {best.verdicts:.1f} (name its flags before "
        "the run, and leave the others as they are):"
    )
    _flags(best, judging.against, ",".join(map(str, best.budgets)), f"{first}-{first + best.seeds - 1}")
    if over_budgets:
        of_budgets = {cell: fits for cell, fits in right.items() if cell.budget in over_budgets.budgets}
        _allotment(over_budgets, of_budgets, conditions, judging.against, cost, first)


def _flags(each: Design, against: str, train_examples: str, seeds: str) -> None:
    names = listed_flags(each)
    console.say(f"  --strategies={','.join([against, *names])}")
    console.say(f"  --primary_family={','.join(names)}")
    console.say(f"  --train_examples={train_examples}")
    console.say(f"  --seeds={seeds}")


def _allotment(each: Design, right: Right, conditions: Conditions, against: str, cost: Cost, first: int) -> None:
    """Print what seeds of their own at each label budget of a design do to the variance of its areas, and the flags.

    `right` has the cells of its budgets, `first` is the first seed that is fresh.
    """
    allotted, shares = design.allotments(right, each.members, conditions, against)
    sources = len({source for source, _ in each.members})
    pairs = int(each.fits / (len(each.members) + 1 + (cost.longer + cost.source) * sources) + 1e-9)
    less = len(each.budgets) * each.seeds / pairs
    rows = []
    for member in allotted:
        ratios = (f"{ratio:.2f}" for ratio in (member.equal, member.allotted, less * member.allotted))
        rows.append(list(map(TableCell, (member.strategy, member.source or tables.NOTHING, *ratios))))
    at_budgets = zip(each.budgets, shares, strict=True)
    texts_of_shares = ", ".join(f"{100 * share:.0f} % at {budget:,}" for budget, share in at_budgets)
    console.show(
        Table(
            "seeds apart: variance of an area over that with shared seeds",
            ["strategy", "source", "an equal share", "allotted", "allotted, for the same compute"],
            rows,
            2,
        ),
        [
            f"each label budget has seeds of its own; allotted: {texts_of_shares}; by weight and standard deviation, "
            "over all strategies of the family",
            "it is the part of the fits, not of the items; the first two are for as many fits on the target, the last "
            "counts the source that each seed takes",
        ],
    )
    numbers = design.seeds_of_budgets(shares, pairs)
    texts = [f"{budget}:seeds={number}" for budget, number in zip(each.budgets, numbers, strict=True)]
    console.say("  that, as flags:")
    _flags(each, against, ",".join(texts), f"{first}-{first + sum(numbers) - 1}")
    console.say("  --seeds_apart")


def base_text(judging: Judging, cost: Cost) -> str:
    """What the compute of a design counts."""
    parts = [f"those of {judging.against} counted"]
    parts.append(f"a source as {cost.source:.3g}" if cost.source else "sources not")
    if cost.longer:
        parts.append(f"scratch at equal source and target steps as {cost.longer:.3g}")
    return listed(parts)


def listed_flags(best: Design) -> list[str]:
    """The strategies of a design, as flags name them."""
    return list(dict.fromkeys(strategy for _, strategy in best.members))


def _row(each: Design, several: bool) -> list[TableCell]:
    names = [f"{strategy} from {source}" if several else strategy for source, strategy in each.members]
    labels = ", ".join(f"{budget:,}".replace(",", "") for budget in each.budgets)
    chances = ", ".join(f"{chance:.2f}" for chance in each.decided)
    counts = (str(each.seeds), f"{each.fits:g}", f"{each.verdicts:.1f} of {len(each.members)}", chances)
    return list(map(TableCell, (", ".join(names), labels, *counts)))
