"""Search hyper-parameters, fairly: `python -m experiments.search --flagfile=FILE --space=learning_rate:log:1e-3:1`

Trials are judged on a validation split cut from the training examples, under seeds of their own; the test set is read
once, for the winner, trained anew on all training examples under --seeds. Run again, or in several processes with one
--storage, it goes on. All flags of experiments.transfer are taken too.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments import (
    commandline,
    console,
    fits,
    machine,
    methods,
    options,
    search_flags,
    sources,
    transfer,
    trials,
    workdir,
)
from experiments.options import Settings
from experiments.search_flags import Search
from experiments.transfer import Experiment
from tljax.study import search, space
from tljax.types import InputError


class Arm(NamedTuple):
    """One study: a strategy at a label budget."""

    strategy: str
    budget: str
    ranges: tuple[space.Range, ...]


def run(given: Mapping[str, Any], asked: Search) -> list[workdir.Line]:
    """Search, then train each winner anew; the lines of results of those."""
    made = options.settings(**given)
    search_flags.check(given, made, asked)
    hunting = _hunting(given, made, asked)
    means = machine.prepare(made)
    arms = _arms(made, asked)
    if made.dry_run:
        _show(arms, asked)
        return []
    with workdir.opened(options.settings(**hunting), "search") as folder:
        studies = {arm: _opened(arm, asked, made, folder) for arm in arms}
        winners = {}
        for arm in arms:
            flags_of = {**hunting, "strategies": (arm.strategy,), "train_examples": (arm.budget,)}
            base = _only(transfer.prepare(options.settings(**flags_of), means))
            winners[arm] = _hunt(arm, studies[arm], base, flags_of, asked, folder)
        lines = []
        for arm, winner in winners.items():
            lines += _train_anew(search_flags.chosen(_final(given, made, arm, folder), winner.params), means)
    notes = [note for arm, winner in winners.items() for note in _notes(arm, winner)]
    console.results("tuned against tuned", lines, notes)
    return lines


def _hunting(given: Mapping[str, Any], made: Settings, asked: Search) -> dict[str, Any]:
    """The flags under which trials run: seeds of their own, a validation split, and the source's recipe as it is."""
    validation = made.recipe.validation or 0.2
    return {**_source(made), **given, "seeds": asked.seeds, "validation": validation, "dry_run": False}


def _source(made: Settings) -> dict[str, Any]:
    """The flags that leave the source's recipe as it is, whatever the target's becomes."""
    return {f"source_{name}": value for name, value in vars(made.source_recipe).items()}


def _final(given: Mapping[str, Any], made: Settings, arm: Arm, folder: Path) -> dict[str, Any]:
    """The flags of the last fits: all training examples, and the seeds that the search has not seen."""
    place = folder / "final" / f"{fits.file_name(arm.strategy)}-{arm.budget}"
    own = {"strategies": (arm.strategy,), "train_examples": (arm.budget,), "validation": 0.0, "seeds": made.seeds}
    return {**_source(made), **given, **own, "workdir": str(place)}


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
        name = strategy.split(":")[0]
        own = tuple(r for r in asked.ranges if not r.name.startswith("strategy.") or r.name.split(".")[1] == name)
        if not own:
            raise InputError(f"--space has nothing to search for strategy '{strategy}': add a dimension")
        found += [Arm(strategy, budget, own) for budget in made.train_examples]
    return found


def _opened(arm: Arm, asked: Search, made: Settings, folder: Path) -> search.Searched:
    about = {
        "space": [str(one) for one in arm.ranges],
        "flags": sorted(
            line for line in options.to_flags(made) if not line.startswith(tuple(f"--{n}=" for n in _FREE))
        ),
        "search_seeds": list(asked.seeds),
    }
    storage = str(folder / "study.journal") if asked.storage is None else asked.storage
    name = f"{asked.study}/{arm.strategy}/{arm.budget}"
    where = None if storage == "memory" else storage
    return search.opened(name, where, asked.sampler, asked.pruner, 0, asked.lease, about)


_FREE = (*options.LISTS, *options.PLACES)


def _only(todo: Experiment) -> Experiment:
    """The experiment with the strategies that are named: `prepare` adds scratch."""
    return todo._replace(methods=tuple(map(methods.one, todo.made.strategies)))


def _hunt(
    arm: Arm,
    searched: search.Searched,
    base: Experiment,
    flags_of: Mapping[str, Any],
    asked: Search,
    folder: Path,
) -> Any:
    """Ask, train, judge and tell until the study has its trials; its best."""
    study = searched.study
    place = trials.yard(base, arm.budget)
    began = time.monotonic()

    @functools.cache
    def source(hidden: Any, activation: str, recipe: Any) -> tuple[Any, Any]:
        if base.source is None:
            return None, {}
        made = replace(base.made, hidden=hidden, activation=activation, source_recipe=recipe)
        found = sources.from_data(made) if made.source else base.source
        return found, found.obtain(folder, base.means)

    def experiment(chosen: Mapping[str, Any]) -> tuple[Experiment, Any]:
        made = options.settings(**search_flags.chosen(flags_of, chosen))
        own, trained = source(made.hidden, made.activation, made.source_recipe)
        model = sources.model(made, len(base.target.classes))
        [strategy] = made.strategies
        named = base.methods if made.strategies == base.made.strategies else (methods.one(strategy),)
        return base._replace(made=made, source=own, model=model, methods=named), trained

    with console.progress(f"search {arm.strategy}", asked.trials) as advance:
        while asked.timeout is None or time.monotonic() - began < asked.timeout:
            now = search.ask(searched, arm.ranges, asked.group, asked.trials)
            if not now:
                if not search.under_way(study):
                    break
                time.sleep(1.0)
                continue
            _judge(searched, now, [experiment(one.chosen) for one in now], place)
            advance(len(now))
    return search.best(study)


def _judge(
    searched: search.Searched,
    now: Sequence[search.Asked],
    todo: Sequence[tuple[Experiment, Any]],
    place: trials.Yard,
) -> None:
    """Train a group of trials and tell what came of them; whatever ends it leaves them to be tried again."""

    def report(which: int, step: int, accuracy: float) -> bool:
        now[which].trial.report(accuracy, step)
        return now[which].trial.should_prune()

    try:
        with search.held(now, searched.lease):
            judged = trials.judge(place, [one for one, _ in todo], [trained for _, trained in todo], report)
    except BaseException:
        for one in now:
            search.give_back(searched.study, one)
        raise
    for one, result in zip(now, judged, strict=True):
        search.tell(searched.study, one, result.accuracy, result.pruned)


def _train_anew(flags_of: Mapping[str, Any], means: Any) -> list[workdir.Line]:
    """The winner on all training examples, under the seeds of --seeds: the only time the test set is read."""
    made = options.settings(**flags_of)
    todo = transfer.prepare(made, means)
    return transfer.complete(_only(todo), show=False)


def _notes(arm: Arm, winner: Any) -> list[str]:
    values = ", ".join(f"{name}={value}" for name, value in winner.params.items())
    notes = [f"{arm.strategy}, {arm.budget}: {values}; validation accuracy {100 * winner.value:.2f} %"]
    for one in arm.ranges:
        if edge := space.at_edge(one, winner.params[one.name]):
            notes.append(f"{arm.strategy}, {arm.budget}: {one.name} is the {edge} of its range: widen it")
    return notes


def _show(arms: Sequence[Arm], asked: Search) -> None:
    rows = [(one.name, one.kind, *space.ends(one), "")[:4] for one in asked.ranges]
    console.table("space", ["name", "kind", "from", "to"], rows)
    for arm in arms:
        console.say(f"{arm.strategy} at {arm.budget}: {asked.trials} trials in groups of {asked.group}")


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    if commandline.asks_help(argv):
        options.parse(argv, str(__doc__) + search_flags.HELP)
        return
    run(*search_flags.read(argv, str(__doc__)))


if __name__ == "__main__":
    console.run_main(main)
