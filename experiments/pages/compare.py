"""Judge fits, print the tables of a study, and write its report and files.

The page begins with the verdict; tables and figures of every source and target follow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pages import anytime, beside, export, figures, report, tables, transfer
from experiments.pages.report import Block, Provenance, Section, figure
from experiments.runs import confirmation, console, directory, looks, predictions
from experiments.runs import judging as judgings
from experiments.runs.console import Table
from experiments.runs.judging import Judging, end_notes, margins, to_record, with_margin
from experiments.runs.predictions import Predictions
from tljax import files
from tljax.study import milestones, summary, units
from tljax.study import results as of_results
from tljax.study.results import Result
from tljax.study.summary import label, listed
from tljax.study.verdicts import (
    NO_WORD,
    TOTAL,
    Comparison,
    Groups,
    Right,
    Study,
    base_of,
    conditions_of,
    constant_answer,
    sentence,
)
from tljax.types import Metric

Classes = Mapping[str, Sequence[str]]
"""Target -> names of its classes."""
Pair = tuple[Any, str]
"""(source or None, target)."""


def show(
    folder: Path,
    parts: Sequence[Predictions],
    judging: Judging,
    notes: Sequence[str],
    entered: confirmation.Entered | None = None,
) -> Study:
    """Judge the fits of a run directory, print the tables, and write the report.

    `entered` is what a ledger says of the run: what comes of a registered claim is written there and said first.
    """
    judging = with_margin(judging, predictions.metrics_of(parts, judging.verdict_on).values())
    fits, places = looks.judged_fits(parts, judging.against, judging.verdict_on), (looks.place(),)
    table = predictions.right(parts, judging.verdict_on)
    able = looks.judgeable(((cell, seed) for cell, each in table.items() for seed in each), judging.against)
    look = max(predictions.count_look(folder, table, able), looks.count(fits, judging, places))
    study = judged(parts, judging, [*notes, *looks.write(fits, judging, look, places)], look, table)
    if entered:
        decision = confirmation.decide(entered, study.family, table, predictions.all_groups(parts))
        study = study._replace(verdict=" ".join(filter(None, (decision, study.verdict))))
        notes = [*notes, *([decision] if decision else [])]
    predictions.write_study(folder, parts, notes, to_record(judging), look)
    classes = {part.rows[0].target: part.classes for part in parts if part.rows}
    write(folder, study, classes, report.provenance_of(folder))
    print_tables(study)
    console.say(f"  report: {folder / 'report.html'}")
    return study


def judged(
    parts: Sequence[Predictions], judging: Judging, notes: Sequence[str], look: int = 1, table: Right | None = None
) -> Study:
    """The study of these fits, with verdicts; `look` counts the looks at them, this one included.

    A `look` of 0 stands for fits of which no verdict can be given: to report them is no look. `table` has the scores of
    the fits, if they are known already.
    """
    on, metrics = judging.verdict_on, predictions.metrics_of(parts, judging.verdict_on)
    judging = with_margin(judging, metrics.values())
    table = predictions.right(parts, on) if table is None else table
    rows = [row for part in parts if not part.longer for row in part.rows]
    margin, level = margins(judging, metrics), 1 - (1 - judging.level) / judging.looks
    by_set = judgings.of_test_sets(parts, judging)
    family, others = judgings.judged(parts, judging, table)
    if look > judging.looks and not judging.until:
        reason = f"looked at {look} times with {judging.looks} planned"
        family = [comparison._replace(**NO_WORD, reason=reason) for comparison in family]
    curves = {name: curve for part in parts for name, curve in part.curves.items()}
    of_targets = conditions_of(table, metrics, margin, **by_set)
    longer = [] if on == "retention" else predictions.at_equal_total(table, rows, of_targets, level)
    return Study(
        rows,
        curves,
        family,
        [*others, *longer],
        milestones.milestones(rows, curves),
        sentence(family, judging.level, on),
        [
            *end_notes(judging.end),
            *notes,
            *_metric_notes(metrics, family, on),
            *_source_notes(rows),
            *_look_notes(look, judging),
            *_group_notes(table, by_set["groups"]),
            *_divergence_notes(rows),
            *tables.metrics_without_number(rows),
            *_family_notes(family),
            *anytime.notes(family),
            *_uncompared_notes(predictions.without_longer(table), family, judging.against),
        ],
        predictions.most_wrong([part for part in parts if not part.longer]),
        on,
        beside.of_study(
            parts, predictions.without_longer(table), rows, curves, family, of_targets, level, judging, by_set
        ),
    )


def _uncompared_notes(table: Right, family: Sequence[Comparison], against: str) -> list[str]:
    """The note on strategies that are compared with nothing, since no seed has a fit at each budget of both."""
    judged = {(comparison.source, comparison.target, comparison.strategy) for comparison in family}
    every = dict.fromkeys((cell.source, cell.target, cell.strategy) for cell in table)
    uncompared = [
        name for source, target, name in every if (source, target, name) not in judged | {(source, target, against)}
    ]
    names = listed(name for name in uncompared if name != "scratch")
    return [f"{names}: no seed has a fit at every budget, and one of {against} beside it"] if names else []


def _source_notes(rows: Sequence[Result]) -> list[str]:
    """Notes on how well the sources do their own tasks, so that nobody takes a poor source for a poor strategy."""
    scores: dict[str, tuple[Metric, list[float]]] = {}
    for row in rows:
        if row.strategy != "scratch" and row.source and row.source_accuracy is not None:
            metric = units.from_record(row.source_metric)
            scores.setdefault(row.source, (metric, []))[1].append(row.source_accuracy)
    return [
        f"{name}: the source's own test {units.spoken(metric)} is {tables.spanned(values, metric)}"
        for name, (metric, values) in scores.items()
    ]


def _metric_notes(metrics: Mapping[str, Metric], family: Sequence[Comparison], on: str) -> list[str]:
    """Notes on what is judged: the metric where it is not accuracy, which way it is turned, and on what."""
    texts = []
    if on == "retention":
        texts.append(
            "verdicts are on what is kept of the source: its own metric on its own test set, once its own head is put "
            "back; of scratch it is not defined"
        )
    others = {metric: [name for name in metrics if metrics[name] == metric] for metric in metrics.values()}
    for metric, names in others.items():
        if metric != units.ACCURACY or len(others) > 1:
            unit = f" in {metric.unit}" if metric.unit else ""
            turned = (
                "" if metric.larger_is_better else "; less is better, so differences are turned: positive is better"
            )
            texts.append(f"{listed(names)}: the metric is {units.spoken(metric)}{unit}{turned}")
    if len(others) > 1:
        texts.append("targets of different metrics are judged each in its own, and nothing is a mean over them")
    return texts


def _look_notes(look: int, judging: Judging) -> list[str]:
    """Notes on how often the fits were looked at: each planned look spends its share of the allowed errors."""
    if judging.until:
        return []  # every look is allowed
    if look > judging.looks:
        return [
            f"looked at {look} times with {judging.looks} planned: fits like some of these, by what they predict, "
            "were judged before among others, here or in another run, so nothing is judged and the intervals only "
            "describe; for a verdict train fits of fresh seeds, in a new run directory, and "
            "plan more --looks"
        ]
    if not look:
        return ["no look at these fits is counted, since no verdict can be given of them"]
    return [f"look {look} of {judging.looks} planned"] if judging.looks > 1 else []


def _group_notes(table: Right, groups: Groups) -> list[str]:
    """Notes on the test examples: how many groups they form, or that they are taken as independent."""
    items = {cell.target: len(scores) for cell, fits in table.items() for scores in fits.values()}
    counts = {target: len(np.unique(which)) for target, which in groups.items() if which is not None}
    unknown = [target for target in items if target not in counts]
    where = f"of {listed(unknown)} " if counts and unknown else ""
    known = [f"{name}: {items[name]:,} test items in {counts[name]:,} groups" for name in items if name in counts]
    return known + ([f"groups of test items {where}are not known: items are taken as independent"] if unknown else [])


def _divergence_notes(rows: Sequence[Result]) -> list[str]:
    """Notes on how many fits of each strategy and budget diverged, and the score that they count with."""
    texts = []
    several = len({(row.source, row.target) for row in rows if row.strategy != "scratch"}) > 1
    for group in summary.groups(rows):
        diverged = [row for row in group if row.diverged]
        if diverged:
            score, metric = summary.counted_score(diverged[0]), of_results.metric(diverged[0])
            counted = tables.diverged(len(diverged), len(group), score, metric)
            where = f", {tables.place(diverged[0].source, diverged[0].target)}" if several else ""
            texts.append(f"{label(diverged[0])} at {diverged[0].train_examples:,} labels{where}: {counted}")
    return [*texts, *summary.counts_as(row for row in rows if row.diverged)]


def _family_notes(family: Sequence[Comparison]) -> list[str]:
    """Notes on the comparisons: shares of the budgets, fits that enter no area, equal methods, warnings."""
    base, areas = (
        base_of(family),
        dict.fromkeys(comparison.budgets for comparison in family if len(comparison.budgets) > 1),
    )
    texts = [f"shares of the budgets in the area: {tables.shares(budgets)}" for budgets in areas]
    kinds = ([each.strategy for each in family if each.exploratory == exploratory] for exploratory in (False, True))
    primary, exploratory = (listed(dict.fromkeys(names)) for names in kinds)
    if exploratory:
        texts.append(
            f"exploratory, judged apart: {exploratory}; the level is that of the primary family, {primary or 'none'}, "
            "which was named before the run"
        )
    texts += [
        f"the area of {comparison.strategy} is over the {comparison.fits} seeds that all its budgets share: "
        f"{comparison.unused} fits of it and of {base} under other seeds enter only the comparison of their own budget"
        for comparison in family
        if comparison.unused
    ]
    texts += [
        f"{comparison.strategy} equals {comparison.equals} on every test example: judged once"
        for comparison in family
        if comparison.equals
    ]
    warnings: dict[str, list[str]] = {}
    for comparison in family:
        if comparison.warning:
            warnings.setdefault(comparison.warning, []).append(comparison.strategy)
    return [*texts, *(f"{listed(names)}: {warning}" for warning, names in warnings.items())]


def print_tables(study: Study) -> None:
    """Print the verdicts, the comparisons at each budget by itself, and the notes."""
    against = study.family[0].against if study.family else "scratch"
    level = f", intervals at {100 * study.family[0].level:.4g} % together" if study.family else ""
    console.show(tables.verdicts_in_short(f"against {against}{level}", study.family))
    unjudged = {
        "each label budget by itself (not judged)": [
            comparison for comparison in study.others if comparison.against != TOTAL
        ],
        "against scratch at equal source and target steps (not judged)": [
            comparison for comparison in study.others if comparison.against == TOTAL
        ],
    }
    for title, comparisons in unjudged.items():
        if comparisons:
            heading = f"{title}, each interval at {100 * comparisons[0].level:.4g} %"
            console.show(tables.singly(heading, comparisons))
    for table in tables.kept(study.rows):
        console.show(table)
    for line in (study.verdict, *study.notes):
        console.say(f"  {line}")


def write(folder: Path, study: Study, classes: Classes, provenance: Provenance | None = None) -> None:
    """Write the report of a study as a page, Markdown, LaTeX tables, figures and CSV files."""
    targets = dict.fromkeys(result.target for result in study.rows)
    sources = dict.fromkeys(result.source for result in study.rows if result.source)
    title = f"{', '.join(sources) or 'no source'} to {', '.join(targets)}"
    every = sections(study, classes)
    text = report.render(every, title=title, lead=study.verdict, provenance=provenance or Provenance())
    for name, data in {**export.files(study, every, title), "report.html": files.to_bytes(text)}.items():
        file = folder / name
        if file.parent != folder:
            directory.make_folder(file.parent)
        if not file.is_file() or file.read_bytes() != data:
            directory.replace(file, data)


# The page

VERDICTS = (
    "{against}, as differences of the {what} with simultaneous {level} % intervals over {together}. Positive or "
    "negative is the direction: the interval lies on one side of 0. The size is a second question: by more than the "
    "margin where the interval lies outside it, by less where the narrower interval of equivalence (two one-sided "
    "tests at the same errors) lies inside it, else open. Equivalent: the size is within the margin and the direction "
    "open; undecided: both are open. The p is adjusted for all that is judged together. Powers are 90 % ranges, since "
    "they are estimated from these fits too: the chance of finding a difference as large as the margin, and of "
    "calling a difference of 0 equivalent. Seeds are those that would do each with a chance of 80 % in the same "
    "family, with their 90 % range; out of reach is what no number of seeds does on these test examples."
)
EXPLORATORY = (
    " The level, and p, are those of the primary family, which was named before the run; exploratory rows, outside it, "
    "are judged among themselves, and their errors come on top."
)
FOREST = "The same: bars are the intervals, the grey band the margin of equivalence."
BANDS = (
    "The same against the number of labels: bands are the intervals, which hold together over all labels and "
    "strategies; the grey band is the margin."
)
LABELS = "Mean test {metric} over seeds, ranges below{single}. A fit that diverged counts as {constant}."
SINGLE = " (of a single fit Wilson's 95 % interval over test examples, taken as independent)"
LABELS_PICTURE = "The same. Lines are means over seeds, bands their range."
GAINS = "Differences from {base} in {unit} by source (rows) and target (columns), as in the table of verdicts."
EACH = (
    "Differences from {against} in {unit}; the intervals are of {level} % each, unadjusted, and no verdict is drawn "
    "from them."
)
CUT = (
    "Test {metric} against how many stages, from the bottom, are kept from the source below the cut; bands are the "
    "range over seeds."
)
COST = (
    "What a strategy costs, and its test {metric}: means over seeds, bars the range. FLOPs are of the steps of the "
    "target's fit; features of frozen stages, which are computed once for all fits that share them, are left out."
)
SHIFTED = "{Metric} on other test sets against that on the target's own; on the diagonal they are equal."
FURTHER = "Means over seeds, ranges below them, over the fits that did not diverge; no verdict is of these metrics."
KEPT = (
    "The source's metric on its own test set after transfer, with its own head put back: means over seeds, ranges "
    "below them. Of scratch, which had no source, it is not defined."
)
RETENTION = (
    "What is left of the source's {of_source} once its head is put back, against {metric} on the target; of a fit that "
    "diverged, {constant} of each. Of these means none is higher in both than those on the line."
)
CONFUSION = (
    "Predicted class against true class in % of the true class, summed over the fits that did not diverge: scratch, "
    "and the strategy with the {best} mean {metric}, which was chosen by looking."
)
RELIABILITY = "Accuracy against confidence, over all seeds; on the diagonal a fit is as often right as it is sure."
WRONG = "The test images that fits most often take for another class."
JUMP_START = "Jump-start is accuracy on the test set before the first step less chance. "
MILESTONES = (
    "Taylor and Stone's measures of transfer (2009). {jump_start}End, which they call the asymptote, and examples "
    "saved are of the test set; area and threshold are of {curve}. The threshold is what scratch ends with there in "
    "the mean: steps with a > did not reach it while they were trained. Examples saved with a > or < lie outside the "
    "numbers of labels that scratch had. A fit that diverged reaches no threshold, and counts as {constant}. Costs are "
    "of the target's fit up to the threshold, features of frozen stages, computed once, left out; then with all of the "
    "source's steps. These numbers stand without intervals, and no verdict is drawn from them. Steps are the median "
    "over seeds of the first recorded step at the threshold, which may have been reached at any since the one before."
)


@figures.style()
def sections(study: Study, classes: Classes) -> list[Section]:
    """All sections between the verdict and the command that reproduces it, for page and files; also empty ones."""
    fits = [fit for fit in study.rows if fit.strategy != "pretrain"]
    notes = report.sentences(study.notes)
    strokes = figures.strokes(list(map(label, fits)))
    every = [
        Section("Verdicts", "verdicts", _verdicts(study.family, strokes, notes, study.verdict_on)),
        Section(f"{_shared_name(fits)} by label budget", "labels", _scores_by_labels(fits, strokes, notes)),
        Section("Further metrics", "metrics", _further_metrics(fits, notes)),
        Section(
            "Sources and targets",
            "gains",
            _gains(study.family, notes),
        ),
        Section("Each comparison by itself", "each", _single_comparisons(study.others, notes)),
        *beside.sections(study, classes, notes),
        Section("Milestones", "milestones", _milestones(study, notes)),
        *_sections_at_largest_budget(study, fits, classes, strokes, notes),
        Section("Most often wrong", "wrong", _most_wrong(study, notes)),
        _trained_parameters(fits),
        transfer.origins(study.rows, notes),
    ]
    return report.brief(every, study.notes)


def _sections_at_largest_budget(
    study: Study, fits: Sequence[Result], classes: Classes, strokes: figures.Strokes, notes: str
) -> list[Section]:
    """The sections of pictures at the largest label budget of each target."""
    blocks: dict[str, list[Block]] = {key: [] for key in ("cut", "cost", "shifted", "kept", "sure")}
    pictures: dict[tuple[str, str], list[figures.Picture | None]] = {}
    learning: list[Block] = []
    by_class: list[Block] = []
    for pair in _pairs(fits):
        members = _members(fits, pair, _largest_budget(fits, pair[1]))
        where = f"{tables.place(*pair)}, {tables.count(_largest_budget(fits, pair[1]))} labels"
        curves = [
            figures.learning_curves(members, study.curves, f, f", {where}", strokes) for f in ("score", "train_loss")
        ]
        metric = figures.metric_of(members)
        learning += figure(transfer.learning(metric), curves, "grid", where)
        cells = figures.accuracy_by_class(members, classes.get(pair[1], ()), f", {where}")
        by_class += figure(transfer.BY_CLASS + notes, [cells], "box wide", where)
        pictures.setdefault(("cut", _filled(CUT, metric)), []).append(figures.layer_cut(members, where))
        pictures.setdefault(("cost", _filled(COST, metric)), []).extend(
            [
                figures.cost(members, "trained parameters", lambda fit: fit.trained_parameters, where, strokes),
                figures.cost(members, "FLOPs of training", figures.training_flops, where, strokes),
            ]
        )
        names = dict.fromkeys(name for each in members.values() for fit in each for name in fit.evals or {})
        shifted = [figures.shifted(members, name, where, strokes) for name in names]
        pictures.setdefault(("shifted", _filled(SHIFTED, metric)), []).extend(shifted)
        of_source = figures.retention_metric_of(members)
        kept = _filled(RETENTION, metric, of_source=units.spoken(of_source), constant=_of_each(metric))
        pictures.setdefault(("kept", kept), []).append(figures.retention(members, where, strokes))
        pictures.setdefault(("sure", RELIABILITY), []).append(figures.reliability(members, where, strokes))
    for (key, caption), drawn in pictures.items():
        blocks[key] += figure(caption + notes, drawn)
    return [
        Section("Learning curves", "learning", learning),
        Section("Where to cut", "cut", blocks["cut"]),
        Section("What it costs", "cost", blocks["cost"]),
        Section("Other test sets", "shifted", blocks["shifted"]),
        Section("What is kept of the source", "kept", [*_kept(fits, notes), *blocks["kept"]]),
        Section("Accuracy by class", "class", by_class),
        Section("Confusion", "confusion", _confusion(fits, classes, notes)),
        Section("Calibration", "calibration", blocks["sure"]),
    ]


def _filled(caption: str, metric: Metric, **values: str) -> str:
    """A caption with the name of the metric, the unit of differences and what a fit that diverged counts as."""
    name = units.spoken(metric)
    unit = units.of_differences(metric) or "the metric's own unit"
    known = {"metric": name, "Metric": name.capitalize(), "unit": unit, "constant": constant_answer(metric)}
    return caption.format(**{**known, **values})


def _of_each(metric: Metric) -> str:
    return "the share of the most frequent class" if metric == units.ACCURACY else constant_answer(metric)


def _shared_name(fits: Sequence[Result]) -> str:
    """The name of the metric of these fits, as a title begins; "Score" where they have several."""
    metrics = list(dict.fromkeys(map(of_results.metric, fits))) or [units.ACCURACY]
    return units.spoken(metrics[0]).capitalize() if len(metrics) == 1 else "Score"


def _by_metric(family: Sequence[Comparison]) -> dict[Metric, list[Comparison]]:
    members: dict[Metric, list[Comparison]] = {}
    for comparison in family:
        members.setdefault(comparison.metric, []).append(comparison)
    return members


def _gains(family: Sequence[Comparison], notes: str) -> list[Block]:
    """The heat maps of differences, those of each metric by themselves."""
    return [
        block
        for metric, members in _by_metric(family).items()
        for block in figure(_filled(GAINS, metric, base=base_of(family)) + notes, [figures.gains(members)], "box wide")
    ]


def _milestones(study: Study, notes: str) -> list[Block]:
    """The table of milestones, that of each metric by itself."""
    metric_of = {fit.target: of_results.metric(fit) for fit in study.rows if fit.strategy != "pretrain"}
    rows: dict[Metric, list[Mapping[str, Any]]] = {}
    for row in study.milestones:
        rows.setdefault(metric_of.get(row["target"], units.ACCURACY), []).append(row)
    blocks = []
    for metric, members in rows.items():
        defined = any(isinstance(row.get("jump_start"), float) for row in members)
        words = {"curve": beside.curve_of(study.rows), "jump_start": JUMP_START if defined else ""}
        blocks += _table_block(_filled(MILESTONES, metric, **words) + notes, tables.milestones(members, metric))
    return blocks


def _verdicts(family: Sequence[Comparison], strokes: figures.Strokes, notes: str, verdict_on: str) -> list[Block]:
    """The table of verdicts, and its forest plots, one a metric."""
    if not family:
        return []
    area = any(len(comparison.budgets) > 1 for comparison in family)
    names = listed(units.spoken(metric) for metric in _by_metric(family))
    names = f"retention ({names})" if verdict_on == "retention" else names
    what = f"area under {names} against labels" if area else names if verdict_on == "retention" else f"test {names}"
    level = listed(f"{100 * comparison.level:.4g}" for comparison in family)
    against = f"Against {listed(comparison.against for comparison in family)}"
    caption = VERDICTS.format(against=against, what=what, level=level, together=_together(family))
    caption += anytime.caption(family)
    caption += EXPLORATORY if any(comparison.exploratory for comparison in family) else ""
    table, shared = tables.same(tables.verdicts(family), 6)
    return [
        Block(caption + shared + notes, table),
        *figure(FOREST + notes, [figures.forest(members) for members in _by_metric(family).values()], "box wide"),
        *figure(BANDS + notes, _bands(family, strokes)),
    ]


def _together(family: Sequence[Comparison]) -> str:
    """Over which rows the intervals of a family hold together, and at what level those of all its targets do."""
    rows = "the rows of the primary family" if any(comparison.exploratory for comparison in family) else "all rows"
    targets = {comparison.target for comparison in family}
    if len(targets) < 2:
        return f"{rows} of a target"
    level = next((each.level for each in family if not each.exploratory), family[0].level)
    over_all = 1 - len(targets) * (1 - level)
    return f"{rows} of a target ({100 * over_all:.4g} % over the {len(targets)} targets)"


def _bands(family: Sequence[Comparison], strokes: figures.Strokes) -> list[figures.Picture | None]:
    """The picture of each source and target whose strategies are judged at several label budgets, each by itself."""
    by_place: dict[Any, list[Comparison]] = {}
    for comparison in family:
        by_place.setdefault((comparison.source, comparison.target), []).append(comparison)
    alone = [members for members in by_place.values() if all(len(each.budgets) == 1 for each in members)]
    return [figures.bands(members, strokes) for members in alone]


def _scores_by_labels(fits: Sequence[Result], strokes: figures.Strokes, notes: str) -> list[Block]:
    """The metric against labels: a table for each target, and figures."""
    blocks = []
    for target in dict.fromkeys(fit.target for fit in fits):
        of_target = [fit for fit in fits if fit.target == target]
        metric = of_results.metric(of_target[0])
        caption = _filled(LABELS, metric, single=SINGLE if metric == units.ACCURACY else "")
        heading = tables.scores_heading(of_target, target)
        blocks.append(Block(caption + notes, tables.scores(of_target, target), heading=heading))
    drawn = [figures.scores_by_labels(_members(fits, pair), tables.place(*pair), strokes) for pair in _pairs(fits)]
    return [*blocks, *figure(LABELS_PICTURE + notes, drawn)]


def _single_comparisons(others: Sequence[Comparison], notes: str) -> list[Block]:
    """A table for each strategy that others are compared with."""
    levels = {comparison.against: f"{100 * comparison.level:.4g}" for comparison in others}
    return [
        Block(
            _filled(EACH, metric, against=against, level=level) + notes,
            tables.by_budget(members, against),
            heading=f"Against {against}",
        )
        for against, level in levels.items()
        for metric, members in _by_metric([each for each in others if each.against == against]).items()
    ]


def _table_block(caption: str, table: Table) -> list[Block]:
    """The table as a block; no block if it has no rows."""
    return [Block(caption, table)] if table.rows else []


def _further_metrics(fits: Sequence[Result], notes: str) -> list[Block]:
    """The tables of the metrics that were measured beside the one that verdicts are of."""
    return [Block(FURTHER + notes, table, heading=table.label) for table in tables.further_metrics(fits)]


def _kept(fits: Sequence[Result], notes: str) -> list[Block]:
    """The tables of retention."""
    return [Block(KEPT + notes, table, heading=table.label) for table in tables.kept(fits)]


def _confusion(fits: Sequence[Result], classes: Classes, notes: str) -> list[Block]:
    """Confusion matrices of scratch and of the best strategy at the largest budget, for each target."""
    blocks = []
    for target in dict.fromkeys(fit.target for fit in fits):
        at_most = [fit for fit in fits if fit.target == target and fit.train_examples == _largest_budget(fits, target)]
        groups = [group for group in summary.summary(at_most) if group.score]
        groups.sort(key=lambda group: units.sign(group.metric) * group.score[0] if group.score else 0.0)
        metric = of_results.metric(at_most[0])
        caption = _filled(CONFUSION, metric, best="highest" if metric.larger_is_better else "lowest")
        scratch = [group.members for group in groups if group.strategy == "scratch"][-1:]
        best = [group.members for group in groups if group.strategy != "scratch"][-1:]
        named = {_name(members[0]): members for members in (*scratch, *best)}
        drawn = [figures.confusion(name, each, classes.get(target, ()), f", {target}") for name, each in named.items()]
        blocks += figure(
            caption + notes, drawn, "grid small", f"{target}, {tables.count(_largest_budget(fits, target))} labels"
        )
    return blocks


def _name(fit: Result) -> str:
    """The strategy of a fit and its source."""
    source = fit.source if fit.strategy != "scratch" else None
    return label(fit) + (f" from {source}" if source is not None else "")


def _most_wrong(study: Study, notes: str) -> list[Block]:
    """The test images that are most often wrong, a figure for each target."""
    drawn = [figures.most_wrong(images, captions, target) for target, (images, captions) in study.images.items()]
    return [
        block
        for target, picture in zip(study.images, drawn, strict=True)
        for block in figure(WRONG + notes, [picture], "box wide photo", target)
    ]


def _trained_parameters(fits: Sequence[Result]) -> Section:
    """The section on the trained parameters for the first target, since the heads of others have other sizes."""
    groups = summary.summary(fits)
    first = groups[0].target if groups else ""
    several = len({group.target for group in groups}) > 1
    return transfer.trained([group for group in groups if group.target == first], first if several else "")


def _pairs(fits: Sequence[Result]) -> list[Pair]:
    """Every (source, target) of the fits; (None, target) for a target that has no source."""
    pairs = dict.fromkeys((fit.source, fit.target) for fit in fits if fit.strategy != "scratch")
    pairs |= dict.fromkeys((fit.source, fit.target) for fit in fits)
    with_source = {target for source, target in pairs if source is not None}
    return [(source, target) for source, target in pairs if source is not None or target not in with_source]


def _members(fits: Sequence[Result], pair: Pair, budget: Any = None) -> dict[str, list[Result]]:
    """The fits of a pair by strategy, at one budget or at all; fits from scratch belong to every source."""
    source, target = pair
    chosen: dict[tuple[str, int, of_results.Replicate], Result] = {}
    for fit in sorted(fits, key=lambda fit: fit.source == source):  # the pair's own come last, and replace
        of_pair = fit.strategy == "scratch" or fit.source in (None, source)
        if fit.target == target and of_pair and budget in (None, fit.train_examples):
            chosen[label(fit), fit.train_examples, of_results.replicate(fit)] = fit
    members: dict[str, list[Result]] = {name: [] for name in dict.fromkeys(map(label, fits))}
    for fit in chosen.values():
        members[label(fit)].append(fit)
    return {name: each for name, each in members.items() if each}


def _largest_budget(fits: Sequence[Result], target: str) -> Any:
    """The largest budget of a target."""
    return max((fit.train_examples for fit in fits if fit.target == target), key=lambda budget: budget or 0)
