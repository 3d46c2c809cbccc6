"""Train strategies from a source on a target, beside scratch.

    python -m experiments.transfer --flagfile=experiments/flags/quickstart.flags

Each strategy starts from the source's parameters, and beside them all the same model is trained from scratch. The
run directory holds everything; a finished fit in it is not trained again.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs import (
    budgets,
    console,
    directory,
    elsewhere,
    fits,
    flags,
    methods,
    origin,
    process,
    sources,
    training,
)
from experiments.runs.settings import ExperimentFlags, Settings
from experiments.runs.sources import Source
from tljax import graft, masks, objective, penalties, plugins, seeds, train
from tljax.study.results import Result
from tljax.train import gradients
from tljax.types import InputError, Model, Task


@dataclass(frozen=True)
class TransferFlags(ExperimentFlags):
    """A transfer has all flags that programs share."""


class Experiment(NamedTuple):
    """All that a run needs, read and checked before anything is trained or written."""

    made: Settings
    source: Source | None
    target: Task
    model: Model
    methods: tuple[methods.Named, ...]
    execution: train.Execution


def run(**flags: Any) -> list[Result]:
    """Run what the flags say; the results. Keyword arguments are named like the flags."""
    made = Settings.from_flags(**flags)
    todo = prepare(made, process.prepare(made))
    if made.dry_run:
        _show(todo)
        return []
    return complete(todo)


def complete(todo: Experiment, show: bool = True) -> list[Result]:
    """Train what of an experiment is missing in its run directory; the results."""
    with directory.opened(todo.made, "transfer") as folder:
        lines = within(todo, folder, fingerprints(todo))
        if process.first():
            sources_of = _sources(todo)
            directory.supersede(folder, [*lines, *(x for x in directory.results(folder) if x.key in sources_of)])
        if show and process.first():
            from experiments.pages import transfer as page  # draws: matplotlib takes a second to import

            page.show(todo.made, todo.target, todo.source, lines, folder)
    return lines


def within(todo: Experiment, folder: Path, data: Mapping[str, str]) -> list[Result]:
    """Train what is missing in a run directory that this process holds; `data` has the fingerprints of all its data."""
    plan = planned(todo)
    done = directory.finished(folder)
    missing = _missing(plan, done.keys(), todo.made.many == "vmap")
    lost = _sources(todo) & {line.key for line in directory.results(folder)} - done.keys()
    if process.first() and (missing or lost or not directory.recorded_environment(folder)):
        directory.record_environment(folder, data)
    if missing or lost:
        _train(todo, missing, folder)
    done = directory.finished(folder)
    if process.first():
        shutil.rmtree(folder / "progress", ignore_errors=True)  # of a group that ended as it was killed
    return [done[key] for key in plan]


def fingerprints(todo: Experiment) -> dict[str, str]:
    """{data set: its fingerprint}."""
    return {task.name: task.fingerprint for task in (todo.source, todo.target) if task and task.fingerprint}


def prepare(
    made: Settings, execution: train.Execution, only: bool = False, stand_ins: Mapping[int, int] | None = None
) -> Experiment:
    """Read everything that the flags name, and raise InputError for what cannot be.

    Scratch is added, unless it is to be `only` the strategies that are named. `stand_ins` has {seed: seed of the source
    in --source_checkpoint that it starts from} of seeds without a source of their own.
    """
    if made.target is None:
        raise InputError("--target is not given: name the data set to transfer to, such as --target=fashion_mnist_10k")
    if made.source and made.source_checkpoint:
        raise InputError("--source and --source_checkpoint are both given: keep one")
    elsewhere.refuse_rules(made)
    named = tuple(map(methods.one, made.strategies)) if only else methods.read(made.strategies)
    source = None
    if made.source_checkpoint:
        source = origin.source(made, stand_ins)
    elif made.source:
        source = sources.from_data(made)
    target = sources.load(made, made.target, made.image_shape or (source.shape if source else None))
    shape = tuple(target.train.images.shape[1:])
    if source and shape != source.shape:
        raise InputError(f"target '{target.name}' has shape {shape}, the source {source.shape}: features must agree")
    model = sources.model(made, len(target.classes))
    if source is None:
        methods.refuse_without_source(named, model)
    terms, _ = penalties.read(made.recipe.penalty)
    if source and not source.fisher and (names := [term.name for term in terms if "fisher" in term.needs]):
        raise InputError(
            f"--penalty={names[0]} needs the source's Fisher information: train the source with --save_fisher"
        )
    for fault in fits.faults(made, model, shape):
        execution.on_message(fault)
    todo = Experiment(made, source, target, model, named, execution)
    for _, start in first_starts(todo):
        for budget in made.train_examples:
            fits.check(made.recipe, budget, target, start)
    return todo


class Job(NamedTuple):
    """A fit that the flags ask for."""

    method: methods.Named
    budget: str
    seed: int
    result: Result
    """What is known of it before it is trained."""


def planned(todo: Experiment) -> dict[str, Job]:
    """{key: fit} of all fits, in the order of the flags: strategies, budgets, seeds."""
    jobs = {}
    for method in todo.methods:
        for budget in todo.made.train_examples:
            for seed in budgets.seeds(budget, todo.made.seeds):
                result = _identified(todo, method, budget, seed)
                jobs[result.key] = Job(method, budget, seed, result)
    return jobs


def _missing(plan: Mapping[str, Job], done: Set[str], together: bool) -> dict[str, Job]:
    """The fits to train: those not done, and with `together` those of their groups."""
    keys = plan.keys() - done
    groups = {(plan[key].method.label, plan[key].budget) for key in keys if together}
    return {key: job for key, job in plan.items() if key in keys or (job.method.label, job.budget) in groups}


def _sources(todo: Experiment) -> set[str]:
    """Keys of the lines that the source's fits have, if they are of this run."""
    return set(todo.source.identity.values()) if todo.source else set()


def _identified(todo: Experiment, method: methods.Named, budget: str, seed: int) -> Result:
    """A fit that the flags ask for, by all that decides its bits."""
    made, source, target = todo.made, todo.source, todo.target
    about = {
        "source": source.name if source else None,
        "target": target.name,
        "strategy": method.name,
        "options": method.options,
        "seed": seed,
        "train_examples": budgets.total(budget, target),
    }
    about |= {"spec": method.spec} if method.spec else {}
    decisive = {
        "identity": source.identity[seed] if source else None,
        "fingerprint": target.fingerprint,
        "model": [made.model, made.hidden, made.activation],
        "head": made.head,
        "recipe": made.recipe,
        "streams": streams_of(made, seed)._replace(source=0),
        "code": [method.code, *fits.code(made.recipe, made.model)],
        "many": fits.company(made),
        **fits.draws(made, todo.model, tuple(target.train.images.shape[1:])),
        **made.beyond_neutral(),
    }
    recipe = {name: value for name, value in decisive.items() if name not in ("identity", "streams", "many")}
    # What a source was does not matter to a fit from scratch: those beside several sources are alike.
    recipe |= {"source": source.recipe if source and method.name != "scratch" else None}
    if method.spec:  # a name hides them: fits of other options are not to stand in one row
        recipe |= {"strategy": [*plugins.parse(method.spec).words, method.options]}
    recipe |= {"pinned": [made.source_seed, made.head_seed, made.order_seed, made.draw_seed]}
    return fits.identify(f"{method.label}-{about['train_examples']}-seed{seed}", about, decisive, recipe)


def streams_of(made: Settings, seed: int) -> seeds.Seeds:
    """The four streams of a seed, those that the flags pin aside."""
    return seeds.streams(seed, source=made.source_seed, head=made.head_seed, order=made.order_seed, draw=made.draw_seed)


def _train(todo: Experiment, missing: Mapping[str, Job], folder: Path) -> None:
    """Train what is missing, a strategy and budget at a time."""
    made = todo.made
    trained = todo.source.obtain(folder, todo.execution) if todo.source else {}
    field = fits.arena(todo.target, made.recipe, todo.execution)
    grounds = {seed: ground(todo, seed) for seed in {job.seed for job in missing.values()}}
    for seed in grounds.keys() & trained.keys():
        grounds[seed] = methods.with_source(grounds[seed], trained[seed])
    groups: dict[Any, list[fits.Fit]] = {}
    keeps_dropout = fits.keeps_dropout(made, todo.model, tuple(todo.target.train.images.shape[1:]))
    for job in missing.values():
        streams = streams_of(made, job.seed)
        start = methods.start(job.method, grounds[job.seed], look(todo, field, streams, job.budget))
        accuracy = trained[job.seed].accuracy if job.seed in trained else None
        result = replace(job.result, source_accuracy=accuracy)
        fit = fits.build(field, todo.model, start, streams, job.budget, result, keeps_dropout)
        begins = fit.result.phase_steps
        if len(begins) > 1 and job.seed == made.seeds[0]:
            console.say(f"{job.method.label}: phases begin at the steps {', '.join(map(str, begins))}")
        groups.setdefault((job.budget, _company(fit, job.method.label, made.many)), []).append(fit)
    for ready in groups.values():
        named = ", ".join(dict.fromkeys(fit.result.strategy for fit in ready))
        if len(groups) > 1:
            console.say(f"{named}: {len(ready)} of the {len(missing)} fits, trained by themselves")
        with console.progress(named, sum(len(fit.trial.rates) for fit in ready)) as advance:
            training.run(field, ready, folder, sources.about(made, todo.target), advance, made.checkpoint_every)


def _company(fit: fits.Fit, label: str, many: str) -> Any:
    """What fits are trained together: those of a strategy, and of others whose one mask compiles to the same."""
    (_, mask), *later = fit.trial.phases
    if later or masks.is_strategy(mask) or many == "vmap":
        return label
    return train.group_key(fit.program, fit.trial, (mask,))


def look(todo: Experiment, field: fits.Arena, streams: seeds.Seeds, budget: str) -> methods.Look:
    """What a data-driven strategy may look at: gradients on the training split, never on validation or test data."""
    subset, _ = fits.split(field, streams, budget)

    def look(merge: Any) -> tuple[Any, Any]:
        split = (todo.model, objective.loss(field.recipe.loss), field.data, subset, merge)
        return gradients.mean_gradient(*split), gradients.mean_squared_gradient(*split)

    return look


def ground(todo: Experiment, seed: int) -> methods.Ground:
    """What every strategy starts from under one seed, with a draw for a source that is still to come."""
    return methods.ground(todo.made, todo.model, todo.source, todo.target, streams_of(todo.made, seed))


def first_starts(todo: Experiment) -> Iterator[tuple[methods.Named, methods.Start]]:
    """How every strategy starts under the first seed, from a source that is drawn and not trained."""
    first = ground(todo, todo.made.seeds[0])
    for method in todo.methods:
        yield method, methods.start(method, first)


def noted(todo: Experiment) -> list[str]:
    """What every table must say of the data."""
    return sources.title_and_notes(todo.made, todo.source, todo.target)[1]


def _show(todo: Experiment) -> None:
    shown: dict[str, graft.Plan] = {}
    names = todo.source.names if todo.source else None
    for method, start in first_starts(todo):
        same = next((label for label, plan in shown.items() if plan == start.plan), None)
        shown.setdefault(method.label, start.plan)
        console.plan(method.label, start.plan, start.params, start.phases, same, names)
        if paths := methods.left_out(method, start, todo.model):
            console.say(f"  {method.label}: left out, and so frozen: {', '.join(paths)}\n")
    console.notes(noted(todo))


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    flags.main(argv, str(__doc__), lambda given, _: run(**given), TransferFlags)
