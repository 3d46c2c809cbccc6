r"""Tune every strategy alike, on a validation split.

    python -m experiments.search --flagfile=experiments/flags/quickstart.flags --strategies=head_only \
        --space=learning_rate:log:1e-3:1 --workdir=runs/search

Trials are judged on a validation split cut from the training examples, under seeds of their own; the test set is read
once, for the winner, trained anew on all training examples under --seeds. Run again, or in several processes with one
--storage, it goes on.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)
import functools
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.runs import (
    budgets,
    command_line,
    console,
    directory,
    fit,
    plan,
    process,
    range_test,
    search_flags,
    sources,
    times,
    trials,
    tuned,
)
from experiments.runs.plan import Experiment
from experiments.runs.search_flags import Search
from experiments.runs.settings import FREE, GROWING, NEUTRAL, ExperimentFlags, Settings, as_compared, written
from experiments.runs.tuned import Arm, Winner
from tljax.study import search, space, summary
from tljax.study.results import Result
from tljax.types import InputError, Task


@dataclass(frozen=True)
class SearchFlags(Search, ExperimentFlags):
    """The flags of a search, and those of the fits that it tries."""


def run(flags: Mapping[str, Any], options: Search) -> list[Result]:
    """Search, then train each winner anew; returns the results of the winners' fits."""
    with times.noted("search") as noted:
        return _run(flags, options, noted)


def _run(flags: Mapping[str, Any], options: Search, noted: times.Times) -> list[Result]:
    settings = Settings.from_flags(**flags)
    search_flags.check(flags, settings, options)
    trial_flags = _trial_flags(flags, settings, options)
    execution = noted.watched(process.prepare(settings))
    stand_ins = sources.stand_ins(settings, options.trial_seeds)
    if options.lr_range_test and not settings.dry_run:
        range_test.run(flags, trial_flags, options, execution, stand_ins)
        return []
    arms = _arms(settings, options)
    if settings.dry_run:
        _print_plan(flags, arms, options)
        return []
    from experiments.pages import export
    from experiments.pages import search as page  # draws: matplotlib takes a second to import
    from experiments.pages import transfer as results_page

    own_flags = search_flags.to_flags(options)
    with directory.opened(settings, "search", own_flags, older=Settings.from_flags(**trial_flags)) as folder:
        if stand_ins:
            console.say(_sources_note(stand_ins, settings.seeds))
        experiment = plan.prepare(Settings.from_flags(**trial_flags), execution, only=True, stand_ins=stand_ins)
        _require_distinct_totals(arms, experiment.target)
        primary = plan.objective_of(experiment.target, experiment.settings.recipe).metrics[0]
        studies = {arm: _open_study(arm, options, settings, folder, primary.larger_is_better) for arm in arms}
        trained = {}
        for arm in arms:
            arm_flags = {**trial_flags, "strategies": (arm.strategy,), "train_examples": (arm.budget,)}
            base = experiment._replace(
                settings=Settings.from_flags(**arm_flags), strategies=(plan.read_strategy(arm.strategy),)
            )
            _run_trials(arm, studies[arm], base, arm_flags, options, folder)
            known = {(each.label, each.budget): search.trials(opened.study) for each, opened in studies.items()}
            directory.replace(folder / "trials.csv", export.trials(known, primary))
            best = search.best(studies[arm].study)
            final = Settings.from_flags(**search_flags.with_values(_final_flags(flags, settings, arm), best.params))
            place = _final_workdir(final, arm, folder)
            trained[arm] = Winner(studies[arm].study, best, replace(final, workdir=str(place)))
        tuned.write_winners(folder, trained)
        # Each winner, on all training examples under --seeds: only here the search reads the test set.
        results = [
            result
            for winner in trained.values()
            for result in fit.complete(plan.prepare(winner.settings, execution, only=True))
        ]
        settled = summary.with_share(results, experiment.target.test.targets)
        notes = page.write(folder, Settings.from_flags(**flags), options, trained, settled, experiment)
        noted.leave(folder)
    results_page.print_results("tuned against tuned", settled, notes)
    return results


def _print_plan(flags: Mapping[str, Any], arms: Sequence[Arm], options: Search) -> None:
    """Print the space of each study, and which of its dimensions part the trials into groups."""
    rows = [(dimension.name, dimension.kind, *space.ends(dimension), "")[:4] for dimension in options.ranges]
    console.table("space", ["name", "kind", "from", "to"], rows)
    for arm in arms:
        arm_flags = {**flags, "strategies": (arm.strategy,)}
        shapes = {dimension.name: search_flags.shapes(arm_flags, dimension) for dimension in arm.ranges}
        several = [f"{name} ({count})" for name, count in shapes.items() if count > 1]
        parted = "one shape, trained together"
        if several:
            parted = f"at most {math.prod(shapes.values()):,} shapes, by {', '.join(several)}; each trained together"
        console.say(f"{arm.label} at {arm.budget}: {options.trials} trials in groups of {options.group}; {parted}")


def _sources_note(stand_ins: Mapping[int, int], final_seeds: Sequence[int]) -> str:
    """The note on the sources that trials start from, since none was trained under the seeds of a search."""
    source_seeds = sorted(set(stand_ins.values()))
    shared = set(source_seeds) & set(final_seeds)
    why = "the final fits start from them too, as there are no others" if shared else "no final fit starts from them"
    return f"trials start from the sources of the seeds {', '.join(map(str, source_seeds))} of the checkpoint; {why}"


def _trial_flags(flags: Mapping[str, Any], settings: Settings, options: Search) -> dict[str, Any]:
    """The flags under which trials run: seeds of their own, a validation split, and the source's recipe as it is."""
    validation = settings.recipe.validation or 0.2
    return {
        **_source_flags(settings),
        **flags,
        "seeds": options.trial_seeds,
        "validation": validation,
        "dry_run": False,
    }


def _source_flags(settings: Settings) -> dict[str, Any]:
    """The flags that leave the source's recipe as it is, whatever the target's becomes."""
    return {f"source_{name}": value for name, value in vars(settings.source_recipe).items()}


def _final_workdir(final: Settings, arm: Arm, folder: Path) -> Path:
    """The run directory of a winner's fits: a new one if a grown search has found another winner."""
    place = folder / "final" / arm.file_name
    if not directory.of_another_experiment(place, final):
        return place
    free = tuple(f"--{name}=" for name in _FREE)
    lines = [line for line in final.flagfile_lines() if not line.startswith(free)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    other = place.with_name(f"{place.name}-{digest}")
    console.say(
        f"{arm.label} at {arm.budget} had another winner: the fits of the new one are in final/{other.name}, "
        f"those of the former stay in final/{place.name}"
    )
    return other


def _final_flags(flags: Mapping[str, Any], settings: Settings, arm: Arm) -> dict[str, Any]:
    """The flags of a winner's fits: all training examples, and the seeds that the search has not seen."""
    of_arm = {"strategies": (arm.strategy,), "train_examples": (arm.budget,)}
    return {**_source_flags(settings), **flags, **of_arm, "validation": 0.0, "seeds": settings.seeds}


def _arms(settings: Settings, options: Search) -> list[Arm]:
    """A study for each strategy and label budget.

    Raises InputError for several strategies or budgets without --per_strategy or --per_budget, for a strategy without
    a dimension to search, and for a strategy given twice whose options are searched.
    """
    strategies = settings.strategies
    if options.per_strategy and "scratch" not in strategies:
        strategies = ("scratch", *strategies)
    if len(strategies) > 1 and not options.per_strategy:
        raise InputError(f"--strategies={','.join(strategies)}: name one to search for, or give --per_strategy")
    if len(settings.train_examples) > 1 and not options.per_budget:
        raise InputError(f"--train_examples={','.join(settings.train_examples)}: name one, or give --per_budget")
    arms = []
    for strategy in strategies:
        name = space.strategy_name(strategy)
        ranges = tuple(r for r in options.ranges if space.of_strategy(r.name) in ("", name))
        if not ranges:
            raise InputError(f"--space has nothing to search for strategy '{strategy}': add a dimension")
        chooses = any(space.of_strategy(r.name) == name for r in ranges)
        if chooses and sum(space.strategy_name(other) == name for other in strategies) > 1:
            raise InputError(
                f"--strategies={','.join(strategies)}: --space chooses the options of {name}, which is given more "
                "than once, so two winners may be the same strategy: name it once"
            )
        arms += [Arm(strategy, budget, ranges) for budget in settings.train_examples]
    return arms


def _require_distinct_totals(arms: Sequence[Arm], target: Task) -> None:
    """Raise InputError if two label budgets are the same number of examples: their winners would share one row."""
    totals: dict[int, str] = {}
    for arm in arms:
        written = totals.setdefault(budgets.total(arm.budget, target), arm.budget)
        if written != arm.budget:
            raise InputError(f"--train_examples: {written} and {arm.budget} are the same labels: keep one of them")


def _open_study(arm: Arm, options: Search, settings: Settings, folder: Path, maximize: bool) -> search.Search:
    """Open the study of an arm, which refuses another space, other search seeds and other flags of its fits."""
    searched = {dimension.name for dimension in arm.ranges}  # under their values an automatic one may be another
    neutral_values = NEUTRAL if searched & {"optimizer", "weight_decay"} else settings.of_older_runs()
    neutral = {
        f"--{name}={written(value)}" for name, value in neutral_values.items()
    }  # older studies do not name these flags
    about = {
        "space": [str(dimension) for dimension in arm.ranges],
        "flags": sorted(
            _as_compared(line)
            for line in settings.flagfile_lines()
            if not line.startswith(tuple(f"--{n}=" for n in _FREE)) and line not in neutral
        ),
        "search_seeds": list(options.trial_seeds),
    }
    storage = str(folder / "study.journal") if options.storage is None else options.storage
    name = f"{options.study}/{arm.strategy}/{arm.budget}"
    address = None if storage == "memory" else storage
    return search.opened(
        name,
        address,
        options.sampler,
        options.pruner,
        options.sampler_seed,
        options.lease,
        about,
        console.say,
        maximize,
    )


def _as_compared(line: str) -> str:
    """A line of a flagfile by which two studies are compared."""
    name, _, text = line.removeprefix("--").partition("=")
    return f"--{name}={as_compared(name, text)}"


_FREE = (*GROWING, *FREE)
"""Flags that may change when a search goes on."""


def _run_trials(
    arm: Arm,
    searched: search.Search,
    base: Experiment,
    arm_flags: Mapping[str, Any],
    options: Search,
    folder: Path,
) -> None:
    """Ask the study for trials, train and judge them, and tell it the results, until it has all its trials."""
    study = searched.study
    task = trials.search_task(base, arm.budget)
    began = time.monotonic()

    @functools.cache
    def obtained(hidden: Any, activation: str, recipe: Any) -> tuple[Any, Any]:
        if base.source is None:
            return None, {}
        settings = replace(base.settings, hidden=hidden, activation=activation, source_recipe=recipe)
        source = plan.source_from_data(settings) if settings.source else base.source
        return source, fit.obtain_source(settings, source, folder, base.execution)

    def experiment_of(chosen: Mapping[str, Any]) -> tuple[Experiment, Any]:
        settings = Settings.from_flags(**search_flags.with_values(arm_flags, chosen))
        source, trained = obtained(settings.hidden, settings.activation, settings.source_recipe)
        model = settings.build_model(base.target.outputs, settings.recipe)
        strategies = base.strategies
        if settings.strategies != base.settings.strategies:
            strategies = tuple(map(plan.read_strategy, settings.strategies))
        return base._replace(settings=settings, source=source, model=model, strategies=strategies), trained

    with console.progress(f"search {arm.label}", options.trials, "trials") as advance:
        while options.timeout is None or time.monotonic() - began < options.timeout:
            running = search.ask(searched, arm.ranges, options.group, options.trials)
            if not running:
                if not search.under_way(study):
                    break
                time.sleep(1.0)
                continue
            _judge(searched, running, [experiment_of(trial.chosen) for trial in running], task)
            advance(len(running))


def _judge(
    searched: search.Search,
    running: Sequence[search.Running],
    experiments: Sequence[tuple[Experiment, Any]],
    task: trials.SearchTask,
) -> None:
    """Train a group of trials and tell the study their results; after any error the trials are given back to it."""

    def report(index: int, step: int, score: float) -> bool:
        return search.report(running[index], score, step)

    try:
        with search.held(running, searched.lease):
            every, trained = zip(*experiments, strict=True)
            judgements = trials.judge(task, every, trained, report)
    except BaseException:
        for trial in running:
            search.give_back(searched.study, trial)
        raise
    for trial, judgement in zip(running, judgements, strict=True):
        search.tell(searched.study, trial, judgement.score, judgement.pruned, judgement.loss, task.worst)


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, SearchFlags, refused=search_flags.PINS)
