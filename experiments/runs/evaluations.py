"""Fits judged on further test sets: shifted ones, and the source's own with its head put back.

The last is retention: what is left of the source's own metric. Its scores of each test example are kept beside the
means, since verdicts can be on them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import console, directory, fit, plan, predictions, sources
from experiments.runs.plan import Experiment
from experiments.runs.settings import Settings
from tljax import batch_stats, checkpoint, evaluate, metrics, models, train
from tljax.study import units
from tljax.study.results import Result, tree_of
from tljax.types import InputError, Metric, Model, Params, Task


class Evaluation(NamedTuple):
    """A further test set that fits are judged on."""

    name: str
    """A data set, or 'source'."""
    tasks: Mapping[str, Task]
    """{data set of fits: the data they are judged on}, by the target of the fits, or for 'source' by their source."""
    keep: bool = False
    """Whether the scores of each test example are kept, as verdicts on them need."""


def read(
    settings: Settings, names: Sequence[str], experiments: Sequence[Experiment], keep: bool = False
) -> list[Evaluation]:
    """The data sets of `--eval`, where source is retention, whose scores of test examples one may `keep`.

    Raises InputError for one whose inputs or targets are not those of a target, and for a source whose data are not
    there by their name, or are others by now.
    """
    evaluations = []
    for name in names:
        if name == "source":
            sources_of = {each.source.name: each.source for each in experiments if each.source}
            if not sources_of:
                raise InputError("--retention: there is no source, so nothing that could be kept of it: leave it out")
            tasks = {key: _source_task(settings, source) for key, source in sources_of.items()}
            evaluations.append(Evaluation(name, tasks, keep))
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


def _source_task(settings: Settings, source: sources.Source) -> Task:
    """The data that a source was trained on."""
    if source.task is not None:
        return source.task
    try:
        task = plan.load_task(settings, source.name, source.shape)
    except InputError as error:
        raise InputError(
            f"--retention: the data '{source.name}' that the source was trained on are not there ({error}): name where "
            "they are with --data_dir, or leave --retention out"
        ) from error
    if task.fingerprint != source.fingerprint:
        raise InputError(
            f"--retention: '{source.name}' is not the data that the source was trained on any more: restore them, or "
            "leave --retention out"
        )
    return task


def source_task(evaluations: Sequence[Evaluation], source: str) -> Task:
    """The data of a source, of evaluations with retention among them."""
    return next(tasks[source] for name, tasks, _ in evaluations if name == "source")


def metrics_of(
    experiments: Sequence[Experiment], evaluations: Sequence[Evaluation], on: str = "target"
) -> dict[str, Metric]:
    """{test set: primary metric} of what verdicts are on: the targets, or the sources by the data of `evaluations`."""
    if on == "target":
        return {each.target.name: _primary(each, "", each.target) for each in experiments}
    of_source = {key: task for name, tasks, _ in evaluations if name == "source" for key, task in tasks.items()}
    by_source = {each.source.name: each for each in experiments if each.source}
    return {key: _primary(by_source[key], "source", task) for key, task in of_source.items() if key in by_source}


def fingerprints(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """{data set: its fingerprint}."""
    return {task.name: task.fingerprint for evaluation in evaluations for task in evaluation.tasks.values()}


def measured(
    experiment: Experiment,
    results: Sequence[Result],
    evaluations: Sequence[Evaluation],
    folder: Path,
    start: bool = True,
) -> dict[str, dict[str, Any]]:
    """{fit: fields of its result}: evals, retention, and with `start` start_accuracy where the head is not drawn anew.

    They are of the primary metric. A diverged fit has what answering always the same gives on each test set, such as
    the share of its most frequent class; how it began is measured like that of others. What was judged before is read
    from `folder`/evals.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, task in _test_sets(experiment, evaluations, start):
        file = _file(folder, name, task)
        about = {"test_set": name, "of": task.name, "fingerprint": task.fingerprint}
        known = _known(file, about)
        of_start, of_source = name == "start", name == "source"
        keep = any(each.keep and each.name == name for each in evaluations)
        trees = {result.name: tree_of(result) for result in results}
        places = {fit_name: file.parent / file.stem / f"{tree}.npz" for fit_name, tree in trees.items()}
        missing = [
            result
            for result in results
            if (trees[result.name] not in known.means and (of_start or not result.diverged))
            or (keep and not _is_kept(places[result.name], known.scores.get(trees[result.name])))
        ]
        targets, primary = np.asarray(task.test.targets), _primary(experiment, name, task)
        share = metrics.value_of_constant(primary, task.kind, targets, task.outputs)
        if missing:
            ended = [result for result in missing if of_start or not result.diverged]
            directory.make_folder(file.parent)
            for result, outputs in _judge(experiment, ended, name, task, folder):
                known.means[trees[result.name]] = metrics.value(primary, outputs, targets)
                if keep:
                    scores = _scores(primary, outputs, targets)
                    known.scores[trees[result.name]] = _keep(places[result.name], scores, task)
            for result in missing if keep else ():
                if result.diverged:
                    scores = np.full(len(targets), share, np.float32)
                    known.scores[trees[result.name]] = _keep(places[result.name], scores, task)
            scores_of = {"scores": known.scores} if known.scores else {}
            directory.write_record(file, {**about, "accuracy": known.means, **scores_of})
        for result in results:
            value = share if result.diverged and not of_start else known.means.get(trees[result.name])
            of_fit = fields.setdefault(result.name, {"evals": {}})
            if of_source:
                of_fit |= {"retention": value}
                of_fit |= {} if (metric := units.to_record(primary)) is None else {"retention_metric": metric}
                if keep:
                    place = places[result.name].relative_to(folder).as_posix()
                    of_fit |= {"retention_scores": place, "retention_sha256": known.scores[trees[result.name]]}
            elif of_start:
                of_fit["start_accuracy"] = value
            else:
                of_fit["evals"][name] = value
    return fields


def _file(folder: Path, name: str, task: Task) -> Path:
    """The file with the means of fits on a test set; the folder of its name beside it has scores of examples."""
    return folder / "evals" / f"{plan.file_name(f'{name}-{task.name}')}-{task.fingerprint[:8]}.json"


def kept(folder: Path, name: str, task: Task, result: Result) -> np.ndarray:
    """The scores of a fit on each example of a test set that `measured` kept: [items], bool where it is accuracy.

    `name` is that of the `Evaluation`. Raises InputError where they are not as they were written.
    """
    file, tree = _file(folder, name, task), tree_of(result)
    place = file.parent / file.stem / f"{tree}.npz"
    known = _known(file, {"test_set": name, "of": task.name, "fingerprint": task.fingerprint})
    return predictions.read_kept(place, known.scores.get(tree)).scores


def _scores(primary: Metric, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The scores of test examples, [items]: bool, right or wrong, where the metric is accuracy, else float32."""
    assert primary.item is not None
    scores = primary.item(outputs, targets, targets)
    return scores > 0 if primary.name == units.ACCURACY.name else np.asarray(scores, np.float32)


def _keep(file: Path, scores: np.ndarray, task: Task) -> str:
    """Write the scores of a fit on the test set of a source's task; returns their SHA-256."""
    groups = None if task.test.groups is None else np.asarray(task.test.groups)
    return predictions.write_kept(file, predictions.KeptScores(scores, task.fingerprint[:16], groups))


def _is_kept(file: Path, sha256: str | None) -> bool:
    """Whether the scores of a fit lie there as they were written."""
    return sha256 is not None and file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


class Known(NamedTuple):
    """What was judged before on one test set."""

    means: dict[str, float | None]
    """{fit, as its checkpoint names what is measured: accuracy, or another primary metric}."""
    scores: dict[str, str]
    """{the same: SHA-256 of its scores of the test examples}, of the source's test set."""


def _primary(experiment: Experiment, name: str, task: Task) -> Metric:
    """What fits are measured by on a test set: the source's own by what the source's fit is measured by."""
    recipe = experiment.settings.source_recipe if name == "source" else experiment.settings.recipe
    return plan.objective_of(task, recipe).metrics[0]


def _known(file: Path, about: Mapping[str, str]) -> Known:
    """What `file` holds of this test set; a file that was altered is set aside, and said to be."""
    form = {"accuracy": {str: (float, None)}, "scores?": {str: str}}
    try:
        record = directory.read_record(file, form) or {**about, "accuracy": {}}
        if {name: record.get(name) for name in about} != about:
            raise InputError(f"'{file}' is of another test set")
    except InputError as error:
        console.say(f"{error}. It is set aside as '{directory.set_aside(file).name}', and its fits are judged again")
        return Known({}, {})
    return Known(record["accuracy"], record.get("scores", {}))


def _test_sets(experiment: Experiment, evaluations: Sequence[Evaluation], start: bool) -> list[tuple[str, Task]]:
    """(name, test set) of all by which the fits of an experiment are judged."""
    source, from_scratch = experiment.source, experiment.strategies[0].name == "scratch"
    wanted = []
    for name, tasks, _ in evaluations:
        key = source.name if name == "source" and source else experiment.target.name
        if key in tasks and not (name == "source" and from_scratch):
            wanted.append((name, tasks[key]))
    if start and source and plan.head_of(experiment.settings, source, experiment.target) == "copy" and not from_scratch:
        wanted.append(("start", experiment.target))
    return wanted


def _judge(
    experiment: Experiment, results: Sequence[Result], name: str, task: Task, folder: Path
) -> Iterator[tuple[Result, np.ndarray]]:
    """(fit, its outputs [items, ...]) on one test set."""
    trained = fit.obtain_source(experiment.settings, experiment.source, folder, experiment.execution)
    of_source = name == "source"
    model = experiment.settings.build_model(task.outputs, experiment.settings.recipe) if of_source else experiment.model
    inputs = evaluate.held(task.test, experiment.execution, what=f"the test examples of {task.name}")
    batch = experiment.execution.evaluation_batch
    loaded: dict[str, Any] = {}
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
            logits = evaluate.logits(train.forward(model), stacked, inputs, len(task.test), batch=batch)
            yield result, logits()[0]


def _head_back(model: Model, params: Params, source: sources.Trained, shape: models.Shape) -> Params:
    """Parameters with the source's own head."""
    head = models.names(model)[-1]
    return {**params, head: checkpoint.unflatten(source.flat, models.abstract(model, shape))[head]}
