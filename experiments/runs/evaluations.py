"""Fits judged on further test sets: shifted ones, and the source's own with its head put back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import console, directory, fit, plan, sources
from experiments.runs.plan import Experiment
from experiments.runs.settings import Settings
from tljax import batch_stats, checkpoint, evaluate, metrics, models, train
from tljax.study.results import Result, tree_of
from tljax.types import InputError, Metric, Model, Params, Task


class Evaluation(NamedTuple):
    """A further test set that fits are judged on."""

    name: str
    """A data set, or 'source'."""
    tasks: Mapping[str, Task]
    """{data set of fits: the data they are judged on}, by the target of the fits, or for 'source' by their source."""


def read(settings: Settings, names: Sequence[str], experiments: Sequence[Experiment]) -> list[Evaluation]:
    """The data sets of `--eval`; raises InputError for one whose images or classes are not those of a target."""
    evaluations = []
    for name in names:
        if name == "source":
            sources_of = {each.source.name: each.source for each in experiments if each.source}
            tasks = {key: plan.load_task(settings, key, source.shape) for key, source in sources_of.items()}
            for key, source in sources_of.items():
                if tasks[key].fingerprint != source.fingerprint:
                    raise InputError(f"--eval=source: '{key}' is not the data that the source was trained on any more")
            evaluations.append(Evaluation(name, tasks))
            continue
        targets = {each.target.name: each.target for each in experiments}
        tasks = {key: plan.load_task(settings, name, plan.example_shape(target)) for key, target in targets.items()}
        for key, task in tasks.items():
            shape, of_target = (plan.example_shape(data) for data in (task, targets[key]))
            if shape != of_target:
                words = f"{sources.shown_shape(shape)}, '{key}' {sources.shown_shape(of_target)}"
                raise InputError(f"--eval={name} has shape {words}: give one of that shape")
            if task.kind != targets[key].kind:
                raise InputError(f"--eval={name} has {task.kind}, '{key}' {targets[key].kind}: give one of that kind")
            classes, wanted = task.outputs, targets[key].outputs
            if classes != wanted:
                raise InputError(f"--eval={name} has {classes} classes, '{key}' {wanted}: give one of as many")
        evaluations.append(Evaluation(name, tasks))
    return evaluations


def metric_of(experiment: Experiment, on: str = "target") -> Metric:
    """The primary metric of an experiment's target, or of what is kept of its source where verdicts are on that."""
    settings = experiment.settings
    return plan.objective_of(experiment.target, settings.recipe).metrics[0]


def fingerprints(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """{data set: its fingerprint}."""
    return {task.name: task.fingerprint for evaluation in evaluations for task in evaluation.tasks.values()}


def accuracies(
    experiment: Experiment, results: Sequence[Result], evaluations: Sequence[Evaluation], folder: Path
) -> dict[str, dict[str, Any]]:
    """{fit: fields of its result}: evals, retention, and start_accuracy where the head is not drawn anew.

    They are of the primary metric. A diverged fit has what answering always the same gives on each test set, such as
    the share of its most frequent class; how it began is measured like that of others. What was judged before is read
    from `folder`/evals.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, task in _wanted(experiment, evaluations):
        file = folder / "evals" / f"{plan.file_name(f'{name}-{task.name}')}-{task.fingerprint[:8]}.json"
        about = {"test_set": name, "of": task.name, "fingerprint": task.fingerprint}
        known = _known(file, about)
        of_start = name == "start"
        missing = [result for result in results if result.name not in known and (of_start or not result.diverged)]
        if missing:
            known |= _judge(experiment, missing, name, task, folder)
            directory.make_folder(file.parent)
            directory.write_record(file, {**about, "accuracy": known})
        targets = np.asarray(task.test.targets)
        share = metrics.value(
            _primary(experiment, name, task), metrics.constant(task.kind, targets, task.outputs), targets
        )
        for result in results:
            value = share if result.diverged and not of_start else known.get(result.name)
            of_fit = fields.setdefault(result.name, {"evals": {}})
            if name in ("source", "start"):
                of_fit |= {"retention" if name == "source" else "start_accuracy": value}
            else:
                of_fit["evals"][name] = value
    return fields


def _primary(experiment: Experiment, name: str, task: Task) -> Metric:
    """What fits are measured by on a test set: the source's own by what the source's fit is measured by."""
    recipe = experiment.settings.source_recipe if name == "source" else experiment.settings.recipe
    return plan.objective_of(task, recipe).metrics[0]


def _known(file: Path, about: Mapping[str, str]) -> dict[str, float | None]:
    """{fit: accuracy, or another primary metric} that `file` holds of this test set; a file that was altered is set
    aside, and said to be."""
    try:
        record = directory.read_record(file, {"accuracy": {str: (float, None)}}) or {**about, "accuracy": {}}
        if {name: record.get(name) for name in about} != about:
            raise InputError(f"'{file}' is of another test set")
    except InputError as error:
        console.say(f"{error}. It is set aside as '{directory.set_aside(file).name}', and its fits are judged again")
        return {}
    return record["accuracy"]


def _wanted(experiment: Experiment, evaluations: Sequence[Evaluation]) -> list[tuple[str, Task]]:
    """(name, test set) of all by which the fits of an experiment are judged."""
    source, from_scratch = experiment.source, experiment.strategies[0].name == "scratch"
    wanted = []
    for name, tasks in evaluations:
        key = source.name if name == "source" and source else experiment.target.name
        if key in tasks and not (name == "source" and from_scratch):
            wanted.append((name, tasks[key]))
    if source and plan.head_of(experiment.settings, source, experiment.target) == "copy" and not from_scratch:
        wanted.append(("start", experiment.target))
    return wanted


def _judge(
    experiment: Experiment, results: Sequence[Result], name: str, task: Task, folder: Path
) -> dict[str, float | None]:
    """{fit: its primary metric} on one test set."""
    trained = fit.obtain_source(experiment.settings, experiment.source, folder, experiment.execution)
    of_source = name == "source"
    model = experiment.settings.build_model(task.outputs, experiment.settings.recipe) if of_source else experiment.model
    targets = np.asarray(task.test.targets)
    inputs = evaluate.held(task.test, experiment.execution, what=f"the test examples of {task.name}")
    primary = _primary(experiment, name, task)
    loaded: dict[str, Any] = {}
    scores = {}
    for strategy, start in plan.first_starts(experiment):
        merge = start.merge or (lambda params: params)
        of_strategy = [r for r in results if r.strategy == strategy.name and r.options == strategy.options]
        for result in of_strategy:
            if name == "start":
                initial = plan.initialization_of(experiment, result.seed, trained[result.seed])
                start = plan.start_of(strategy, initial)
                params = batch_stats.join(merge(start.params), start.model_state)
            else:
                file = result.checkpoint
                loaded = loaded if file in loaded else {file: checkpoint.load(folder / file)[0]}
                variables = checkpoint.unflatten(loaded[file][tree_of(result)], start.variables)
                params, model_state = batch_stats.split(variables)
                params = batch_stats.join(merge(params), model_state)
            if of_source:
                params = _head_back(model, params, trained[result.seed], plan.example_shape(task))
            stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], params)
            logits = evaluate.logits(train.forward(model), stacked, inputs, len(targets))[0]
            scores[result.name] = metrics.value(primary, logits, targets)
    return scores


def _head_back(model: Model, params: Params, source: sources.Trained, shape: models.Shape) -> Params:
    """Parameters with the source's own head."""
    head = models.names(model)[-1]
    return {**params, head: checkpoint.unflatten(source.flat, models.abstract(model, shape))[head]}
