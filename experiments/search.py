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
    console,
    directory,
    fit,
    flags,
    plan,
    process,
    range_test,
    search_flags,
    sources,
    trials,
    tuned,
)
from experiments.runs.plan import Experiment
from experiments.runs.search_flags import Search
from experiments.runs.settings import FREE, GROWING, NEUTRAL, ExperimentFlags, Settings
from experiments.runs.tuned import Arm, Winner
from tljax.study import search, space, summary
from tljax.study.results import Result
from tljax.types import InputError, Task


@dataclass(frozen=True)
class SearchFlags(Search, ExperimentFlags):
    """A search has its own flags, and those of the fits that it tries."""


def run(given: Mapping[str, Any], asked: Search) -> list[Result]:
    """Search, then train each winner anew; the results of those."""
    made = Settings.from_flags(**given)
    search_flags.check(given, made, asked)
    hunting = _hunting(given, made, asked)
    execution = process.prepare(made)
    stand_ins = sources.stand_ins(made, asked.trial_seeds)
    if asked.lr_range_test and not made.dry_run:
        range_test.run(given, hunting, asked, execution, stand_ins)
        return []
    arms = _arms(made, asked)
    if made.dry_run:
        _show(given, arms, asked)
        return []
    from experiments.pages import export
    from experiments.pages import search as page  # draws: matplotlib takes a second to import
    from experiments.pages import transfer as results_page

    own_flags = search_flags.to_flags(asked)
    with directory.opened(made, "search", own_flags, older=Settings.from_flags(**hunting)) as folder:
        if stand_ins:
            console.say(_said_of_sources(stand_ins, made.seeds))
        whole = plan.prepare(Settings.from_flags(**hunting), execution, only=True, stand_ins=stand_ins)
        _require_own_totals(arms, whole.target)
        studies = {arm: _opened(arm, asked, made, folder) for arm in arms}
        trained = {}
        for arm in arms:
            flags_of = {**hunting, "strategies": (arm.strategy,), "train_examples": (arm.budget,)}
            base = whole._replace(
                settings=Settings.from_flags(**flags_of), strategies=(plan.read_strategy(arm.strategy),)
            )
            _hunt(arm, studies[arm], base, flags_of, asked, folder)
            known = {(arm.label, arm.budget): search.trials(one.study) for arm, one in studies.items()}
            directory.replace(folder / "trials.csv", export.trials(known))
            best = search.best(studies[arm].study)
            final = Settings.from_flags(**search_flags.with_values(_final(given, made, arm), best.params))
            place = _place_of_final(final, arm, folder)
            trained[arm] = Winner(studies[arm].study, best, replace(final, workdir=str(place)))
        tuned.write_winners(folder, trained)
        lines = [line for winner in trained.values() for line in _train_anew(winner.settings, execution)]
        settled = summary.with_share(lines, whole.target.test.labels)
        notes = page.write(folder, Settings.from_flags(**given), asked, trained, settled, whole)
    results_page.print_results("tuned against tuned", settled, notes)
    return lines


def _show(given: Mapping[str, Any], arms: Sequence[Arm], asked: Search) -> None:
    """Print what would be searched, and what of it parts the trials into groups."""
    rows = [(one.name, one.kind, *space.ends(one), "")[:4] for one in asked.ranges]
    console.table("space", ["name", "kind", "from", "to"], rows)
    for arm in arms:
        own = {**given, "strategies": (arm.strategy,)}
        shapes = {one.name: search_flags.shapes(own, one) for one in arm.ranges}
        several = [f"{name} ({count})" for name, count in shapes.items() if count > 1]
        parted = "one shape, trained together"
        if several:
            parted = f"at most {math.prod(shapes.values()):,} shapes, by {', '.join(several)}; each trained together"
        console.say(f"{arm.label} at {arm.budget}: {asked.trials} trials in groups of {asked.group}; {parted}")


def _said_of_sources(stand_ins: Mapping[int, int], final_seeds: Sequence[int]) -> str:
    """Which sources trials start from, since none was trained under the seeds of a search."""
    source_seeds = sorted(set(stand_ins.values()))
    shared = set(source_seeds) & set(final_seeds)
    why = "the final fits start from them too, as there are no others" if shared else "no final fit starts from them"
    return f"trials start from the sources of the seeds {', '.join(map(str, source_seeds))} of the checkpoint; {why}"


def _hunting(given: Mapping[str, Any], made: Settings, asked: Search) -> dict[str, Any]:
    """The flags under which trials run: seeds of their own, a validation split, and the source's recipe as it is."""
    validation = made.recipe.validation or 0.2
    return {**_source(made), **given, "seeds": asked.trial_seeds, "validation": validation, "dry_run": False}


def _source(made: Settings) -> dict[str, Any]:
    """The flags that leave the source's recipe as it is, whatever the target's becomes."""
    return {f"source_{name}": value for name, value in vars(made.source_recipe).items()}


def _place_of_final(final: Settings, arm: Arm, folder: Path) -> Path:
    """Where the last fits are kept: beside those of the former winner, if the search has grown and found another."""
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


def _final(given: Mapping[str, Any], made: Settings, arm: Arm) -> dict[str, Any]:
    """The flags of the last fits: all training examples, and the seeds that the search has not seen."""
    own = {"strategies": (arm.strategy,), "train_examples": (arm.budget,), "validation": 0.0, "seeds": made.seeds}
    return {**_source(made), **given, **own}


def _arms(made: Settings, asked: Search) -> list[Arm]:
    """A study for each strategy and label budget that are to be told apart."""
    strategies = made.strategies
    if asked.per_strategy and "scratch" not in strategies:
        strategies = ("scratch", *strategies)
    if len(strategies) > 1 and not asked.per_strategy:
        raise InputError(f"--strategies={','.join(strategies)}: name one to search for, or give --per_strategy")
    if len(made.train_examples) > 1 and not asked.per_budget:
        raise InputError(f"--train_examples={','.join(made.train_examples)}: name one, or give --per_budget")
    found = []
    for strategy in strategies:
        name = space.own_name(strategy)
        own = tuple(r for r in asked.ranges if space.of_strategy(r.name) in ("", name))
        if not own:
            raise InputError(f"--space has nothing to search for strategy '{strategy}': add a dimension")
        chooses = any(space.of_strategy(r.name) == name for r in own)
        if chooses and sum(space.own_name(other) == name for other in strategies) > 1:
            raise InputError(
                f"--strategies={','.join(strategies)}: --space chooses the options of {name}, which stands there more "
                "than once, so two winners may be the same strategy: name it once"
            )
        found += [Arm(strategy, budget, own) for budget in made.train_examples]
    return found


def _require_own_totals(arms: Sequence[Arm], target: Task) -> None:
    """Raise InputError for two ways to write one label budget: their winners would be of one row."""
    totals: dict[int, str] = {}
    for arm in arms:
        written = totals.setdefault(budgets.total(arm.budget, target), arm.budget)
        if written != arm.budget:
            raise InputError(f"--train_examples: {written} and {arm.budget} are the same labels: keep one of them")


def _opened(arm: Arm, asked: Search, made: Settings, folder: Path) -> search.Search:
    neutral = {f"--{name}={value}" for name, value in NEUTRAL.items()}  # studies of before know none of them
    about = {
        "space": [str(one) for one in arm.ranges],
        "flags": sorted(
            line
            for line in made.flagfile_lines()
            if not line.startswith(tuple(f"--{n}=" for n in _FREE)) and line not in neutral
        ),
        "search_seeds": list(asked.trial_seeds),
    }
    storage = str(folder / "study.journal") if asked.storage is None else asked.storage
    name = f"{asked.study}/{arm.strategy}/{arm.budget}"
    where = None if storage == "memory" else storage
    return search.opened(name, where, asked.sampler, asked.pruner, 0, asked.lease, about, console.say)


_FREE = (*GROWING, *FREE)


def _hunt(
    arm: Arm,
    searched: search.Search,
    base: Experiment,
    flags_of: Mapping[str, Any],
    asked: Search,
    folder: Path,
) -> None:
    """Ask, train, judge and tell until the study has its trials."""
    study = searched.study
    place = trials.search_task(base, arm.budget)
    began = time.monotonic()

    @functools.cache
    def source(hidden: Any, activation: str, recipe: Any) -> tuple[Any, Any]:
        if base.source is None:
            return None, {}
        made = replace(base.settings, hidden=hidden, activation=activation, source_recipe=recipe)
        found = plan.source_from_data(made) if made.source else base.source
        return found, fit.obtain_source(made, found, folder, base.execution)

    def experiment(chosen: Mapping[str, Any]) -> tuple[Experiment, Any]:
        made = Settings.from_flags(**search_flags.with_values(flags_of, chosen))
        own, trained = source(made.hidden, made.activation, made.source_recipe)
        model = made.build_model(len(base.target.classes))
        [strategy] = made.strategies
        named = base.strategies if made.strategies == base.settings.strategies else (plan.read_strategy(strategy),)
        return base._replace(settings=made, source=own, model=model, strategies=named), trained

    with console.progress(f"search {arm.label}", asked.trials, "trials") as advance:
        while asked.timeout is None or time.monotonic() - began < asked.timeout:
            now = search.ask(searched, arm.ranges, asked.group, asked.trials)
            if not now:
                if not search.under_way(study):
                    break
                time.sleep(1.0)
                continue
            _judge(searched, now, [experiment(one.chosen) for one in now], place)
            advance(len(now))


def _judge(
    searched: search.Search,
    now: Sequence[search.Running],
    todo: Sequence[tuple[Experiment, Any]],
    place: trials.SearchTask,
) -> None:
    """Train a group of trials and tell what came of them; whatever ends it leaves them to be tried again."""

    def report(which: int, step: int, accuracy: float) -> bool:
        return search.report(now[which], accuracy, step)

    try:
        with search.held(now, searched.lease):
            judged = trials.judge(place, [one for one, _ in todo], [trained for _, trained in todo], report)
    except BaseException:
        for one in now:
            search.give_back(searched.study, one)
        raise
    for one, result in zip(now, judged, strict=True):
        search.tell(searched.study, one, result.accuracy, result.pruned, result.loss)


def _train_anew(made: Settings, execution: Any) -> list[Result]:
    """The winner on all training examples, under the seeds of --seeds: the only time the test set is read."""
    return fit.complete(plan.prepare(made, execution, only=True))


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), run, SearchFlags, refused=search_flags.PINS)
