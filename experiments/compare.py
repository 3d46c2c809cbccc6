r"""Did it transfer? Sources x targets x strategies x budgets x seeds, to verdicts.

    python -m experiments.compare --flagfile=experiments/flags/quickstart.flags --train_examples=5/class,100/class,all \
        --seeds=0-4 --steps=600 --batch_size=32 --workdir=runs/compared

Sources x targets x strategies x label budgets x seeds in one run directory, each against training from scratch on the
same draw, with verdicts and their report. --source, --source_checkpoint and --target take several names, with
commas. Run again, it goes on; what is there is not trained again.

    python -m experiments.compare --design=runs/compared --design_fits=200

says of a run that has ended what its seeds and test items contribute to the error, how many seeds a verdict takes, and
which study of so many fits decides most. Where --design is no such run, a pilot of the flags is trained there.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import (
    budgets,
    command_line,
    confirmation,
    console,
    costs,
    directory,
    evaluations,
    fit,
    looks,
    plan,
    predictions,
    process,
    replicates,
    times,
    tuned,
    tunings,
    until,
)
from experiments.runs.command_line import flag
from experiments.runs.judging import (
    Judging,
    require_valid,
    require_variation,
    spoken_of,
    variation,
    with_family,
    with_margin,
    with_primary_family,
)
from experiments.runs.plan import Experiment
from experiments.runs.settings import ExperimentFlags, Settings
from tljax import files, plugins
from tljax.study import summary
from tljax.study.results import Result, extended, replicate
from tljax.study.verdicts import Cell
from tljax.types import InputError

PILOT_SEEDS = 5
"""Seeds of a pilot, the first of --seeds."""


@dataclass(frozen=True)
class CompareFlags(confirmation.LedgerFlags, Judging, ExperimentFlags):
    """What is compared beside the flags of a transfer, and how it is judged."""

    eval: tuple[str, ...] = flag(
        (), "further test sets: data sets, or source (its own, its head put back)", role="free"
    )
    retention: bool = flag(
        False, "measure what is left of the source: its metric on its own test set, its own head put back", role="free"
    )
    longer_scratch: bool = flag(True, "scratch with the source's steps added to its own, for the second comparison")
    design: str | None = flag(
        None,
        "judge nothing: print the design that decides most by this run directory, or by a pilot of the first "
        f"{PILOT_SEEDS} seeds, which is trained there",
        role="local",
        place="path",
    )
    design_fits: int | None = flag(
        None,
        "the compute of a design, in fits on the target with sources by their steps; default the pilot's",
        role="local",
        bounds=(1, None),
    )
    draws: tuple[int, ...] | None = flag(
        None,
        "draws of labels apart from --seeds, as 0-4: every seed of source, head and order has each of them, and "
        "verdicts hold over seeds and draws",
    )
    seeds_apart: bool | None = flag(
        None,
        "deal --seeds out to the label budgets, as many to each as its :seeds=N says or an equal share: an area over "
        "budgets is then known better by as many fits",
    )
    most: int = flag(40, "with --until=decided: the number of seeds at which it ends in any case", role="free")
    tuned: str | None = flag(
        None,
        "run directory of a search: each strategy with what was best for it; further ones, with commas, of the same "
        "search under another tuning seed show how far the choice of the recipe moves the differences",
        place="path",
    )


KINDS = command_line.kinds(CompareFlags)
"""{flag: its kind}: what a registered design may have."""


class Part(NamedTuple):
    """Fits of one source (or none) and one target that share their flags."""

    experiment: Experiment
    longer: bool = False
    """Whether it is scratch with the source's steps added to its own."""


def run(values: Mapping[str, Any], options: CompareFlags, typed: Collection[str] | None = None) -> list[Result]:
    """Train what is missing, judge, and report; returns the results.

    `values` are of the flags that programs share, {flag: value}. `typed` are the flags on the command line itself,
    whose values --tuned must not replace; None: all of `values`.
    """
    with times.noted("compare") as noted:
        return _run(values, options, typed, noted)


class Study(NamedTuple):
    """A comparison that is read and checked, of which nothing is trained yet."""

    values: Mapping[str, Any]
    """{flag: value} of the shared flags, with the seeds of the first round."""
    options: CompareFlags
    settings: Settings
    judging: Judging
    execution: Any
    typed: Collection[str] | None
    seeds: Sequence[tuple[int, ...]]
    """Those that each round adds; one round without --until."""
    searches: Sequence[str]
    """The run directories in --tuned."""
    parts: Sequence[Part]
    """The fits of the first round, under the first search."""
    of_other_searches: Sequence[Sequence[Part]]
    evals: Sequence[evaluations.Evaluation]
    registration: confirmation.Registration | None


def _run(
    values: Mapping[str, Any], options: CompareFlags, typed: Collection[str] | None, noted: times.Times
) -> list[Result]:
    if options.design and (Path(options.design) / "report.html").is_file():
        from experiments.pages import design as of_design  # draws nothing, but imports the tables

        of_design.show_of_run(Path(options.design), options, typed or (), options.design_fits)
        return []
    study = _read(values, options, typed, noted)
    if study.settings.dry_run:
        _show(study.parts)
        return []
    data = {name: mark for part in study.parts for name, mark in plan.fingerprints(part.experiment).items()}
    if not study.options.design:
        _say_looks(study.parts, study.judging, study.evals)
    data |= evaluations.fingerprints(study.evals)
    entered = _entered(study) if process.first() else None
    leave = tuned.searched_flags() if study.options.tuned else ()
    own_lines = command_line.flagfile_lines(replace(study.options, tuned=options.tuned))
    with directory.opened(study.settings, "compare", own_lines, leave=leave) as folder:
        results, judged = _trained(study.parts, folder, data, study.evals)
        if study.judging.until:
            results, judged = _further_rounds(study, folder, data, results, judged)
        # Under the seeds of the first round, and with the first search's bits untouched.
        others = [_trained(parts, folder, data, study.evals)[1] for parts in study.of_other_searches]
        if process.first():
            _report(study, folder, results, judged, others, entered)
            noted.leave(folder)
    return results


def _read(values: Mapping[str, Any], options: CompareFlags, typed: Collection[str] | None, noted: times.Times) -> Study:
    """Read and check all that a comparison takes; raises InputError for what cannot be trained, judged or confirmed."""
    settings = Settings.from_flags(**values)
    if options.design and options.confirm:
        raise InputError("--design and --confirm are both given: what is confirmed was designed before")
    if options.design:
        options = replace(options, until=None)
        values = {**values, "seeds": settings.seeds[:PILOT_SEEDS], "workdir": options.design}
        settings = Settings.from_flags(**values)
    require_valid(options)
    confirmation.require_flags(options, options)
    replicates.require_flags(options.draws, options.seeds_apart, settings, options.until)
    asked = options
    seeds_of_rounds = until.rounds(options, settings, options.most)
    options = until.of_a_plan(options, options.most)
    values = {**values, "seeds": seeds_of_rounds[0]}
    searches = tunings.searches(options.tuned)
    if options.confirm and len(searches) > 1:
        raise InputError(f"--tuned={options.tuned}: a claim is of one recipe: name the search that it is of")
    options = replace(options, tuned=searches[0] if searches else None)
    names = {plugins.called(text): text for text in ("scratch", *settings.strategies)}
    base = names.get(options.against, options.against)
    if base not in names.values():
        raise InputError(f"--against={base} is none of --strategies{plugins.nearest(base, names)}")
    execution = noted.watched(process.prepare(settings))
    first_settings = replace(settings, seeds=seeds_of_rounds[0])
    parts = planned(values, options, first_settings, execution, typed)
    of_others = [replace(options, tuned=search, longer_scratch=False) for search in searches[1:]]
    other_parts = [planned(values, each, first_settings, execution, typed) for each in of_others]
    for part in parts:
        require_variation(part.experiment)
    labels = {name: plan.label_in_results(plan.read_strategy(name)) for name in names.values()}
    options = with_primary_family(options, {**labels, **{short: labels[names[short]] for short in names}})
    experiments = [part.experiment for part in parts]
    retention = options.retention or options.verdict_on == "retention"
    further = [*options.eval, *(["source"] if retention and "source" not in options.eval else [])]
    evals = evaluations.read(settings, further, experiments, retention)
    metrics = evaluations.metrics_of(experiments, evals, options.verdict_on)
    options = with_margin(options, metrics.values())
    options = with_family(options, [part.experiment.target for part in parts], settings.train_examples)
    judging = replace(options, against=labels[base], end=settings.verdict_of)
    if origin := tuned.origin_note(values, options.tuned, ("scratch", *settings.strategies)):
        console.say(origin)
    confirmation.refuse_evals(options.half, experiments, [task for each in evals for task in each.tasks.values()])
    registration = None
    if options.registration:
        registration = confirmation.read_registration(files.place(options.registration), KINDS)
        confirmation.require_registered(registration, values, asked, judging, experiments)
    of_flags = values, options, settings, judging, execution, typed
    return Study(*of_flags, seeds_of_rounds, searches, parts, other_parts, evals, registration)


def _entered(study: Study) -> confirmation.Entered | None:
    """Write to the ledger what is to be tried, before anything is trained; None without a ledger."""
    tried = [part.experiment for parts in (study.parts, *study.of_other_searches) for part in parts]
    possible = [seed for seeds in study.seeds for seed in seeds]
    return confirmation.enter(study.options, tried, study.judging, study.registration, possible)


def _further_rounds(
    study: Study,
    folder: Path,
    data: Mapping[str, str],
    results: list[Result],
    judged: list[predictions.Predictions],
) -> tuple[list[Result], list[predictions.Predictions]]:
    """Train the seeds of each further round for the strategies that are open; what `_trained` gives, of all rounds."""
    for i in range(1, len(study.seeds) + 1):
        family = until.family(judged, study.judging)
        after = study.seeds[i] if i < len(study.seeds) else ()
        console.say(until.line(family, sum(map(len, study.seeds[:i])), len(after)))
        wanted = until.open_of(family, study.judging.against)
        if not wanted or not after:
            break
        of_round = {**study.values, "seeds": after}, study.options, replace(study.settings, seeds=after)
        open_parts = _open(planned(*of_round, study.execution, study.typed), wanted)
        more_results, more = _trained(open_parts, folder, data, study.evals)
        results, judged = [*results, *more_results], [*judged, *more]
    return results, judged


def _report(
    study: Study,
    folder: Path,
    results: Sequence[Result],
    judged: Sequence[predictions.Predictions],
    of_other_searches: Sequence[Sequence[predictions.Predictions]],
    entered: confirmation.Entered | None,
) -> None:
    """Judge and write the report; of a pilot, print the design that it leads to."""
    tuning_notes = tunings.notes(study.searches, judged, of_other_searches, study.judging)
    several = directory.mixed_environments(folder, [result.name for result in results])
    if study.options.design:
        from experiments.pages import design as of_design

        of_design.show(judged, study.judging, study.options.design_fits)
        return
    from experiments.pages import compare as page  # draws: matplotlib takes a second to import

    of_ledger = entered.notes if entered else ()
    repeated = replicates.notes(study.options.draws, study.options.seeds_apart, study.settings)
    every_note = [*notes(study.parts, study.options), *repeated, *tuning_notes, *several, *of_ledger]
    page.show(folder, judged, study.judging, every_note, entered)


def _trained(
    parts: Sequence[Part], folder: Path, data: Mapping[str, str], evals: Sequence[evaluations.Evaluation]
) -> tuple[list[Result], list[predictions.Predictions]]:
    """Train what is missing of these parts; (the results, in the first process what they are judged by)."""
    results_of = [(part, fit.within(part.experiment, folder, data)) for part in parts]
    judged = [_predictions(part, of_part, evals, folder) for part, of_part in results_of] if process.first() else []
    return [result for _, of_part in results_of for result in of_part], judged


def _open(parts: Sequence[Part], wanted: Collection[tuple[str | None, str, str]]) -> list[Part]:
    """The parts with those of their strategies of which fits are wanted still, as `until.open_of` says."""
    opened = [part._replace(experiment=until.open_strategies(part.experiment, wanted)) for part in parts]
    return [part for part in opened if part.experiment.strategies]


def planned(
    values: Mapping[str, Any],
    options: CompareFlags,
    settings: Settings,
    execution: Any,
    typed: Collection[str] | None = None,
) -> list[Part]:
    """All parts, read and checked: scratch of each target first, then each source."""
    sources, targets = _several(settings.source) or _several(settings.source_checkpoint), _several(settings.target)
    if not sources or not targets:
        raise InputError("--source (or --source_checkpoint) and --target are needed: name one data set or more of each")
    if settings.source and settings.source_checkpoint:
        raise InputError("--source and --source_checkpoint are both given: keep one")
    kind = "source" if settings.source else "source_checkpoint"
    own_seeds = replicates.dealt(settings) if options.seeds_apart else None
    parts: list[Part] = []
    scratch: dict[Any, Part] = {}
    for target in targets:
        for source in sources:
            pair = {**values, kind: source, "target": target}
            experiments = [
                plan.prepare(Settings.from_flags(**arm), execution, only=True)
                for arm in tuned.study_flags(pair, settings, options.tuned, typed)
            ]
            experiments = confirmation.with_halves(experiments, options.half)
            experiments = [each for whole in experiments for each in replicates.parted(whole, options.draws, own_seeds)]
            # From scratch there is one fit a target, budget and seed, whatever the source, each with its own recipe.
            from_scratch = [_only(each, lambda name: name == "scratch") for each in experiments]
            from_source = [_only(each, lambda name: name != "scratch") for each in experiments]
            with_source = [each for each in from_source if each.strategies]
            beside = [(each, other) for each in from_scratch for other in with_source if each.draw == other.draw]
            added = [part for each, other in beside for part in longer(each, other)]
            bare = [Part(each) for each in from_scratch if each.strategies]
            for part in [*bare, *(added if options.longer_scratch else ())]:
                scratch.setdefault(_key(part.experiment), part)
            parts += map(Part, with_source)
    parts = [*scratch.values(), *parts]
    _require_one_fit(parts)
    return parts


def _only(experiment: Experiment, keep: Callable[[str], bool]) -> Experiment:
    """An experiment with those of its strategies whose names are to be kept."""
    return experiment._replace(strategies=tuple(each for each in experiment.strategies if keep(each.name)))


def _key(experiment: Experiment) -> Any:
    """What tells the fits from scratch of one target apart."""
    settings = experiment.settings
    model = settings.model, settings.hidden, settings.activation
    return settings.recipe, *model, experiment.target.fingerprint, settings.train_examples, experiment.draw


def _require_one_fit(parts: Sequence[Part]) -> None:
    """Raise InputError, before anything is trained, if two planned fits would be of one cell and seed."""
    cells: dict[Cell, list[Result]] = {}
    for part in parts:
        for job in plan.planned(part.experiment).values():
            result = replace(job.result, steps=part.experiment.settings.recipe.steps)
            cells.setdefault(predictions.cell(result, part.longer), []).append(job.result)
    for results in cells.values():
        summary.require_one_recipe(results)


def longer(scratch: Experiment, other: Experiment) -> list[Part]:
    """Scratch once more, a part a budget, with as many steps as the source and the target of `other` had together."""
    if not scratch.strategies or other.source is None or other.source.steps is None:
        return []
    parts = []
    for budget in scratch.settings.train_examples:
        if budget in other.settings.train_examples:
            subset, _ = plan.draw_examples(other.settings.recipe, budget, other.target, 0)
            steps = plan.count_steps(other.settings.recipe, len(subset)) + other.source.steps
            recipe = replace(scratch.settings.recipe, steps=steps)
            settings = replace(scratch.settings, train_examples=(budget,), recipe=recipe)
            parts.append(Part(scratch._replace(settings=settings), longer=True))
    return parts


def _several(text: str | None) -> list[str]:
    """The names in a flag that takes several, with commas."""
    return [name for name in plugins.split(text or "", ",") if name]


def _predictions(
    part: Part, results: Sequence[Result], evals: Sequence[evaluations.Evaluation], folder: Path
) -> predictions.Predictions:
    """What a part is judged by: its results, with evaluations and costs, and what each fit predicts."""
    predicted = predictions.of_run(folder, results, part.experiment.target)
    if part.longer:
        return predicted._replace(longer=True)
    further = evaluations.measured(part.experiment, results, evals, folder)
    cost = costs.of_fits(part.experiment, results, folder)
    rows = [extended(row, {**further.get(row.name, {}), **cost[row.name]}) for row in predicted.rows]
    return predictions.with_kept(folder, predicted._replace(rows=rows))


def notes(parts: Sequence[Part], options: CompareFlags) -> list[str]:
    """What every table must say: data in part, whether it was tuned, and what the verdicts speak of."""
    data = set()
    for (settings, source, target, *_), _ in parts:
        of_budgets = budgets.notes(settings.train_examples, target, settings.recipe.validation)
        data |= {f"{target.name}: {note}" for note in (target.note, *of_budgets) if note}
        data |= {f"{source.name}: {source.note}"} if source and source.note else set()
    train_examples = [budget for part in parts for budget in part.experiment.settings.train_examples]
    tuning = tuned.tuning_note(options.tuned, train_examples, options.longer_scratch)
    spoken = spoken_of([variation(part.experiment) for part in parts])
    return [tuning, *spoken, "the verdicts speak of these tasks alone", *sorted(data)]


def _say_looks(parts: Sequence[Part], judging: Judging, evals: Sequence[evaluations.Evaluation]) -> None:
    """Say before anything is trained that there are no looks left; raises InputError as `looks.count` does."""
    experiments = [part.experiment for part in parts if not part.longer and not part.experiment.settings.distributed]
    results = [job.result for each in experiments for job in plan.planned(each).values()]
    able = looks.judgeable(((predictions.cell(result), replicate(result)) for result in results), judging.against)
    keys: dict[str, tuple[set[str], set[str]]] = {}
    for experiment in (each for each in experiments if each.target.name in able):
        test_set = looks.name_of_test_set(np.asarray(experiment.target.test.targets))
        if judging.verdict_on == "retention":
            if experiment.source is None:
                continue
            test_set = evaluations.source_task(evals, experiment.source.name).fingerprint[:16]
        fits, bases = keys.setdefault(test_set, (set(), set()))
        for job in plan.planned(experiment).values():
            if (name := summary.label(job.result)) != "scratch" or judging.against == "scratch":
                (bases if name == judging.against else fits).add(job.result.key)
    judged = [looks.JudgedFits(name, *map(frozenset, sets)) for name, sets in keys.items() if sets[0]]
    look = looks.count(judged, judging, [looks.place()])
    if look > judging.looks and not judging.until:
        console.say(
            f"this is look {look} at such fits with {judging.looks} planned: they will be described and not judged; "
            "take fresh --seeds for a verdict"
        )


def _show(parts: Sequence[Part]) -> None:
    """Print what would be trained."""
    rows, total = [], 0
    for part in parts:
        settings, source, target, *_ = part.experiment
        count = len(plan.planned(part.experiment))
        total += count
        strategies = ", ".join(strategy.label for strategy in part.experiment.strategies)
        strategies += " (longer)" if part.longer else ""
        labels = ", ".join(settings.train_examples)
        labels += "" if part.experiment.draw is None else f" (draw {part.experiment.draw})"
        rows.append((source.name if source else "-", target.name, strategies, labels, str(count)))
    console.table("study", ["source", "target", "strategies", "labels", "fits"], rows, [f"{total} fits in all"])


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), functools.partial(run, typed=command_line.typed(argv)), CompareFlags)
