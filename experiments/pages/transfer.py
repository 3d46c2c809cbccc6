"""The page and the table at the end of a run of experiments.transfer; pages of studies use its parts too."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.pages import figures, tables
from experiments.pages.report import Block, Provenance, Section, brief, figure, provenance_of, render, sentences
from experiments.pages.tables import count, ranged, signed
from experiments.runs import console, directory, metrics, plan
from experiments.runs.judging import end_notes
from experiments.runs.settings import Settings
from experiments.runs.sources import Source
from tljax import files
from tljax.study import summary, units
from tljax.study.results import Result
from tljax.study.summary import Curves, Summary, listed
from tljax.study.units import ACCURACY
from tljax.study.verdicts import constant_answer
from tljax.types import Metric, Task

NO_TEST = "no test of significance was made"


def show(settings: Settings, target: Task, source: Source | None, results: Sequence[Result], folder: Path) -> None:
    """Write report.html and print the table; `results` are those of the target, `folder` is the run directory."""
    title, notes = plan.title_and_notes(settings, source, target)
    notes[:0] = end_notes(settings.verdict_of)
    identities = set(source.identity.values()) if source else set()
    pretrained = [result for result in directory.results(folder) if result.key in identities]
    settled = summary.with_share(results, np.asarray(target.test.targets))
    source_accuracies = [result.source_accuracy for result in results if result.source_accuracy is not None]
    notes += directory.mixed_environments(folder, [result.name for result in (*pretrained, *results)])
    notes += tables.metrics_without_number(results)
    seeds_diverged = [str(result.seed) for result in pretrained if result.diverged]
    if seeds_diverged:
        notes.insert(
            0, f"the source of seed {', '.join(seeds_diverged)} diverged: what was transferred is what it had before"
        )
    of_source = next(
        (units.from_record(each.source_metric) for each in results if each.source_accuracy is not None), ACCURACY
    )
    score = f"{units.spoken(of_source)} {tables.spanned(source_accuracies, of_source)}"
    source_note = f"source's own test {score}" if source_accuracies else ""
    with_sources = [*pretrained, *settled]
    curves = {each.name: curve for each in with_sources if (curve := metrics.curves(folder, each.name)) is not None}
    text = page(
        with_sources,
        curves,
        title=title,
        source_note=source_note,
        notes=notes,
        provenance=provenance_of(folder),
        classes=target.classes,
    )
    file = folder / "report.html"
    if not file.is_file() or file.read_bytes() != files.to_bytes(text):
        directory.replace(file, text)
    last_notes = ["means and [ranges] over seeds; no test of significance was made", f"report: {file}"]
    print_results(title, settled, [*([source_note] if source_note else []), *notes, *last_notes])


def print_results(title: str, results: Sequence[Result], notes: Sequence[str]) -> None:
    """Print the one table at the end, a row for each strategy and label budget: means and ranges over seeds."""
    groups = summary.summary(results)
    diverged = [
        f"{group.name} at {group.train_examples:,} labels: "
        + tables.diverged(group.diverged, group.seeds, group.counts_as, group.metric)
        for group in groups
        if group.diverged
    ]
    narrow = console.is_narrow()
    table = tables.results_in_short(title, groups, narrow)
    counts_as = summary.counts_as(result for result in results if result.diverged) if diverged else []
    console.show(table, [*diverged, *counts_as, *_directions(groups), *notes], narrow)


def _directions(groups: Sequence[Summary]) -> list[str]:
    """The notes on metrics of which less is better."""
    lesser = dict.fromkeys(units.spoken(group.metric) for group in groups if not group.metric.larger_is_better)
    return [f"of {name} less is better; differences are turned, so that positive is better" for name in lesser]


@figures.style()
def page(
    results: Sequence[Result],
    curves: Curves,
    *,
    title: str,
    source_note: str,
    notes: Sequence[str],
    provenance: Provenance,
    classes: Sequence[str] = (),
) -> str:
    """The HTML of a run: `curves` are [points] arrays by a fit's name; the `notes` follow every table."""
    by_heading = panels(results)
    return render(
        brief(_sections(by_heading, results, curves, classes, sentences(notes)), notes),
        title=title,
        lead=_lead([group for panel in by_heading.values() for group in panel]),
        lists=[(heading, [(group.name, _in_words(group)) for group in panel]) for heading, panel in by_heading.items()],
        source_note=source_note,
        provenance=provenance,
    )


RESULTS = (
    "Means over seeds, ranges below them; differences are paired by seed. The calibration error is the expected one, "
    "a fraction. A diverged fit counts as the share of the most frequent test class; it has no loss and no "
    "calibration. Peak memory is the most that a training program took on a device, with the data and all fits there."
)
OTHER_RESULTS = (
    "Means over seeds, ranges below them; differences are paired by seed{turned}. A diverged fit counts as {constant}; "
    "it has no loss."
)
KEPT = (
    " Retention is the source's {metric} on its own test set, with its own head put back; of scratch it is not defined."
)
LEARNING = (
    "{Metric} at the end of each segment, on the test set (on the validation split where one was held out), and "
    "training loss averaged over it. Lines are means over seeds, bands their range; diverged fits are left out."
)
MOVING = (
    "Where the mask moves: the share of the steps up to each point in which a leaf trained, in %, a step in which some "
    "of its elements did counting for their share; mean over seeds."
)
BY_CLASS = "Test accuracy of each class in %, mean over the fits that did not diverge."
CONFUSION = "Predicted class against true class in % of the true class, summed over the fits that did not diverge."


def results_caption(panel: Sequence[Summary]) -> str:
    """The caption of a table of results."""
    metric = tables.metric_of(panel)
    turned = "" if metric.larger_is_better else ", and turned, so that positive is better"
    text = RESULTS if metric == ACCURACY else OTHER_RESULTS.format(turned=turned, constant=constant_answer(metric))
    kept = dict.fromkeys(units.spoken(group.retention_metric) for group in panel if group.retention is not None)
    return text + (KEPT.format(metric=" or ".join(kept)) if kept else "")


def learning(metric: Metric) -> str:
    """The caption of learning curves."""
    return LEARNING.format(Metric=units.spoken(metric).capitalize())


SHARES = (
    "Trained and frozen parameters of each strategy, leaf by leaf in the order of their paths; of phases, the one "
    "that trains most."
)
SOURCES = (
    "The fits that the transferred parameters come from: means over seeds on the source's own test set, ranges below "
    "them; one that diverged enters none."
)


def _sections(
    panels: Mapping[str, list[Summary]], results: Sequence[Result], curves: Curves, classes: Sequence[str], notes: str
) -> list[Section]:
    strokes = figures.strokes([group.name for panel in panels.values() for group in panel])
    blocks: dict[str, list[Block]] = {"results": [], "learning": [], "class": [], "confusion": []}
    for heading, panel in panels.items():
        members = {group.name: group.members for group in panel}
        where = f", {heading}" if heading else ""
        caption = results_caption(panel) + notes
        blocks["results"].append(Block(caption, tables.results(panel, heading), heading=heading))
        lines = [figures.learning_curves(members, curves, field, where, strokes) for field in ("score", "train_loss")]
        blocks["learning"] += figure(learning(tables.metric_of(panel)), lines, "grid", heading)
        cells = figures.accuracy_by_class(members, classes, where)
        moving = [figures.trained_over_time(name, fits, curves, where) for name, fits in members.items()]
        blocks["learning"] += figure(MOVING, moving, "grid", heading)
        blocks["class"] += figure(BY_CLASS + notes, [cells], "box wide", heading)
        each = [figures.confusion(name, fits, classes, where) for name, fits in members.items()]
        blocks["confusion"] += figure(CONFUSION + notes, each, "grid small", heading)
    return [
        Section("Results", "results", blocks["results"]),
        Section("Learning curves", "learning", blocks["learning"]),
        Section("Accuracy by class", "class", blocks["class"]),
        Section("Confusion", "confusion", blocks["confusion"]),
        trained([group for panel in panels.values() for group in panel]),
        origins(results, notes),
    ]


def trained(panel: Sequence[Summary], heading: str = "") -> Section:
    """The section on the parameters that each strategy trains."""
    drawn = figure(SHARES, [figures.trained_shares(_parameters(panel))], "box wide", heading)
    return Section("What was trained", "trained", drawn)


def origins(results: Sequence[Result], notes: str) -> Section:
    """The section on the fits that trained the sources."""
    table = tables.sources(summary.sources(results))
    return Section("Sources", "sources", [Block(SOURCES + notes, table)] if table.rows else [])


def panels(results: Sequence[Result]) -> dict[str, list[Summary]]:
    """{heading: strategies} of each target and budget; none are averaged or compared; one panel has no heading."""
    groups = summary.summary(results)
    several = len({group.source for group in groups} - {None}) > 1
    panels: dict[tuple[str, int], list[Summary]] = {}
    for group in groups:
        origin = f" from {group.source}" if several and group.source is not None else ""
        renamed = replace(group, name=group.strategy + origin)
        panels.setdefault((group.target, group.train_examples), []).append(renamed)
    return {_heading(key, list(panels)) if len(panels) > 1 else "": panel for key, panel in panels.items()}


def _heading(key: tuple[str, int], keys: Sequence[tuple[str, int]]) -> str:
    """The heading of a target and budget; the target is named only where there are several."""
    target, budget = key
    examples = f"{count(budget)} training examples"
    return examples if len({name for name, _ in keys}) == 1 else f"{target}, {examples}"


def _lead(panel: Sequence[Summary]) -> str:
    """The lead: which strategies were compared, over how many seeds, and that no test of significance was made."""
    if not panel:
        return "No fit of a target has been made yet."
    scratch = [group for group in panel if _is_scratch(group)]
    names = {group.name for group in panel if not _is_scratch(group)}
    origins = listed([group.source for group in panel if group.source is not None])
    targets = listed([group.target for group in panel])
    ways = "1 strategy" if len(names) == 1 else f"{len(names)} strategies"
    task = f"of transfer from {origins} to {targets}" if origins else f"on {targets}"
    if not names:
        compared = f"Training from scratch on {targets} was measured"
    elif scratch:
        compared = f"Training from scratch was compared with {ways} {task}"
    else:
        compared = f"Without training from scratch, there {'was' if len(names) == 1 else 'were'} measured {ways} {task}"
    budgets = listed([count(group.train_examples) for group in panel])
    difference = " and mean difference from scratch, paired by seed" if scratch and names else ""
    names_of_metrics = listed(units.spoken(group.metric) for group in panel)
    measured = f"mean test {names_of_metrics}{difference}"
    return f"{compared}, at {budgets} training examples; {measured} ({_seeds(panel)}; {NO_TEST}):"


def _is_scratch(group: Summary) -> bool:
    return group.members[0].strategy == "scratch"


def _seeds(panel: Sequence[Summary]) -> str:
    """The words on how many seeds the ranges are over."""
    counted = [group.counted for group in panel if group.counted]
    if not counted:
        return "no fit reached the end"
    low, high = min(counted), max(counted)
    if high == 1:
        return "1 seed, so no range"
    return f"range over {high} seeds" if low == high else f"range over {low} to {high} seeds"


def _in_words(group: Summary) -> str:
    """The words on the results of a strategy that follow its name in the lead."""
    if group.score is None:
        return tables.state(group)
    metric = group.metric
    cell = ranged(group.score, lambda value: units.shown(metric, value), group.counted > 1)
    text = " ".join(filter(None, (cell.text, metric.unit))) + (f" ({cell.below})" if cell.below else "")
    if group.gain:
        cell = ranged(group.gain, lambda value: signed(value, units.digits(metric)), group.gain_seeds > 1)
        gain = " ".join(filter(None, (cell.text, units.of_differences(metric))))
        text += f", {gain} from scratch" + (f" ({cell.below})" if cell.below else "")
    return text + (f"; {tables.state(group)}" if tables.state(group) else "")


def _parameters(panel: Sequence[Summary]) -> dict[str, list[tuple[str, int, int]]]:
    """{strategy: (leaf, numbers, trained numbers) of each leaf}; unknown leaves count together as one."""
    leaves: dict[str, list[tuple[str, int, int]]] = {}
    for group in panel:
        trained, total = group.trained_parameters, group.total_parameters
        if group.leaves:
            leaves.setdefault(group.name, [(name, size, part) for name, size, part in group.leaves])
        elif trained is not None and total is not None:
            leaves.setdefault(group.name, [("", total, trained)])
    return leaves
