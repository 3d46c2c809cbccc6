"""Print what a pilot says of a study that is to come: where variance comes from, what a verdict costs, which design.

Of every strategy at every label budget, and of the area over all of them: the variance components, the seeds that the
margin takes alone and in the family, and what the test items forbid whatever the seeds. Then the designs, and the flags
of the one that decides most.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.pages import tables
from experiments.runs import command_line, console, predictions
from experiments.runs.console import Cell as TableCell
from experiments.runs.console import Table
from experiments.runs.judging import Judging, from_record, margins, require_valid, with_margin, with_primary_family
from experiments.runs.predictions import Predictions
from tljax.study import design, sample_size, units
from tljax.study.design import Cost, Design, Measured
from tljax.study.results import Result
from tljax.study.summary import listed
from tljax.study.verdicts import Conditions, Right, compared, conditions_of
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
    family, _ = compared(
        predictions.without_longer(table),
        margins(judging, metrics),
        judging.level,
        base=judging.against,
        groups=groups,
        metrics=metrics,
    )
    able = [each for each in family if not each.reason and not each.equals]
    if not able:
        reasons = listed(dict.fromkeys(each.reason for each in family)) or "there is no strategy beside its base"
        raise InputError(f"--design: nothing of this run can be judged: {reasons}")
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
    """What a seed costs beside its fits on the target, by their steps and those of scratch that is `longer`.

    Where there is none, sources are taken to cost nothing.
    """
    steps = [row.steps for row in rows if row.steps]
    mean = float(np.mean(steps)) if steps else 0.0
    more = [row.steps for row in longer if row.steps]
    if not mean or not more:
        return Cost()
    beyond = float(np.mean(more)) / mean
    return Cost(source=max(beyond - 1, 0.0), longer=beyond)


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
    console.show(
        Table(
            units.headed(f"where the variance of a difference from {judging.against} comes from, {target}", unit),
            ["strategy", "source", "labels", "pairs", "difference", *_COMPONENTS[conditions.groups is not None]],
            [_components(each, conditions) for each in pilots],
            3,
        ),
        [
            "a seed draws source, head, order and labels anew, as far as none of these is pinned: its standard "
            "deviation is of all of them together",
            "the standard error of items is that of the mean over these test examples drawn anew, whatever the seeds; "
            "the rest is of one fit",
        ],
    )
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


_COMPONENTS = {
    False: ("sd of seeds", "se of items", "sd of the rest"),
    True: ("sd of seeds", "se of groups", "se of items alone", "sd of the rest"),
}
"""Whether items are in groups -> the headings of the components."""


def _components(each: Measured, conditions: Conditions) -> list[TableCell]:
    """A row of the table of components: the standard deviation over seeds, that of the mean by the items, the rest."""
    factor = units.factor(conditions.metric) * conditions.scale
    digits = units.digits(conditions.metric)
    seeds, items, rest = each.components.spread()
    parts = [seeds, items, rest]
    if each.of_single_items is not None:
        parts.insert(2, each.of_single_items.spread()[1])
    difference = tables.signed(factor * each.components.mean, digits)
    texts = [f"{factor * part:.{max(digits, 2)}f}" for part in parts]
    about = (each.strategy, each.source or tables.NOTHING, _labels(each.budgets), str(each.components.fits))
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
    seeds = sorted({seed for each in right.values() for seed in each})
    sources = len({source for source, _ in members})
    spent = len([seed for each in right.values() for seed in each])
    spent_in_all = spent + len(seeds) * sources * (cost.source + cost.longer * len(budgets))
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
            "test items, with fresh seeds",
            "for each number of strategies and of label budgets the best design, the most verdicts first; a strategy "
            "outside the primary family is exploratory",
        ],
    )
    best, first = ranked[0], max(seeds) + 1
    names = listed_flags(best)
    console.say(
        "  the design that decides most, as flags (name them before the run, and leave the others as they are):"
    )
    console.say(f"  --strategies={','.join([judging.against, *names])}")
    console.say(f"  --primary_family={','.join(names)}")
    console.say(f"  --train_examples={','.join(map(str, best.budgets))}")
    console.say(f"  --seeds={first}-{first + best.seeds - 1}")


def base_text(judging: Judging, cost: Cost) -> str:
    """What the compute of a design counts."""
    parts = [f"those of {judging.against} counted"]
    if cost.source:
        parts.append(f"a source as {cost.source:.3g}")
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
