"""Fits judged on further test sets: shifted ones, and the source's own with its head put back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import console, directory, fit, methods, plan, sources
from experiments.runs.plan import Experiment
from experiments.runs.settings import Settings
from tljax import checkpoint, evaluate, models, train
from tljax.study.results import Result
from tljax.study.summary import majority_share
from tljax.types import InputError, Model, Params, Task


class Eval(NamedTuple):
    """A further test set."""

    name: str
    """A data set, or 'source'."""
    tasks: Mapping[str, Task]
    """{the data set that fits are of: what they are judged on}; by their target, or for 'source' by their source."""


def read(made: Settings, names: Sequence[str], todos: Sequence[Experiment]) -> list[Eval]:
    """The data sets of `--eval`; raises InputError for one whose images or classes are not those of a target."""
    found = []
    for name in names:
        if name == "source":
            own = {todo.source.name: todo.source for todo in todos if todo.source}
            tasks = {key: plan.load_task(made, key, source.shape) for key, source in own.items()}
            for key, source in own.items():
                if tasks[key].fingerprint != source.fingerprint:
                    raise InputError(f"--eval=source: '{key}' is not the data that the source was trained on any more")
            found.append(Eval(name, tasks))
            continue
        targets = {todo.target.name: todo.target for todo in todos}
        tasks = {key: plan.load_task(made, name, target.train.images.shape[1:]) for key, target in targets.items()}
        for key, task in tasks.items():
            shapes = [tuple(of.train.images.shape[1:]) for of in (task, targets[key])]
            if shapes[0] != shapes[1]:
                raise InputError(f"--eval={name} has shape {shapes[0]}, '{key}' {shapes[1]}: give one of that shape")
            there, here = len(task.classes), len(targets[key].classes)
            if there != here:
                raise InputError(f"--eval={name} has {there} classes, '{key}' {here}: give one of as many")
        found.append(Eval(name, tasks))
    return found


def fingerprints(more: Sequence[Eval]) -> dict[str, str]:
    """{data set: its fingerprint}."""
    return {task.name: task.fingerprint for one in more for task in one.tasks.values()}


def accuracies(
    todo: Experiment, lines: Sequence[Result], more: Sequence[Eval], folder: Path
) -> dict[str, dict[str, Any]]:
    """{fit: what its row has beside its line}: evals, retention, and start_accuracy where the head is not drawn anew.

    A diverged fit has the share of the most frequent class of each test set; how it began is measured like that of
    others. What was judged before is read from `folder`/evals.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, task in _wanted(todo, more):
        file = folder / "evals" / f"{plan.file_name(f'{name}-{task.name}')}-{task.fingerprint[:8]}.json"
        about = {"test_set": name, "of": task.name, "fingerprint": task.fingerprint}
        known = _known(file, about)
        of_start = name == "start"
        missing = [line for line in lines if line.name not in known and (of_start or not line.diverged)]
        if missing:
            known |= _judged(todo, missing, name, task, folder)
            directory.make_folder(file.parent)
            directory.write_record(file, {**about, "accuracy": known})
        share = majority_share(task.test.labels)
        for line in lines:
            value = share if line.diverged and not of_start else known.get(line.name)
            row = found.setdefault(line.name, {"evals": {}})
            if name in ("source", "start"):
                row |= {"retention" if name == "source" else "start_accuracy": value}
            else:
                row["evals"][name] = value
    return found


def _known(file: Path, about: Mapping[str, str]) -> dict[str, float]:
    """{fit: accuracy} that `file` holds of this test set; a file that is not as it was written is set aside, aloud."""
    try:
        record = directory.read_record(file, {"accuracy": {str: float}}) or {**about, "accuracy": {}}
        if {name: record.get(name) for name in about} != about:
            raise InputError(f"'{file}' is of another test set")
    except InputError as error:
        console.say(f"{error}. It is set aside as '{directory.set_aside(file).name}', and its fits are judged again")
        return {}
    return record["accuracy"]


def _wanted(todo: Experiment, more: Sequence[Eval]) -> list[tuple[str, Task]]:
    """(name, test set) of all by which the fits of one part are judged."""
    found = []
    for one in more:
        key = todo.source.name if one.name == "source" and todo.source else todo.target.name
        if key in one.tasks and not (one.name == "source" and todo.strategies[0].name == "scratch"):
            found.append((one.name, one.tasks[key]))
    if (
        todo.source
        and methods.head_of(todo.settings, todo.source, todo.target) == "copy"
        and todo.strategies[0].name != "scratch"
    ):
        found.append(("start", todo.target))
    return found


def _judged(todo: Experiment, lines: Sequence[Result], name: str, task: Task, folder: Path) -> dict[str, float]:
    """{fit: its accuracy} on one test set."""
    trained = fit.obtain_source(todo.settings, todo.source, folder, todo.execution)
    of_source = name == "source"
    model = todo.settings.build_model(len(task.classes)) if of_source else todo.model
    images, labels = evaluate.padded(task.test.images), np.asarray(task.test.labels)
    loaded: dict[str, Any] = {}
    found = {}
    for method, start in plan.first_starts(todo):
        merge = start.merge or (lambda params: params)
        for line in (line for line in lines if line.options == method.options and line.strategy == method.name):
            if name == "start":
                ground = methods.with_source(plan.ground(todo, line.seed), trained[line.seed])
                params = merge(methods.start(method, ground).params)
            else:
                place = line.checkpoint
                loaded = loaded if place in loaded else {place: checkpoint.load(folder / place)[0]}
                params = merge(checkpoint.unflatten(loaded[place][line.name], start.params))
            if of_source:
                params = _head_back(model, params, trained[line.seed], task.train.images.shape[1:])
            stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], params)
            logits = evaluate.logits(train.forward(model), stacked, images, len(labels))[0]
            found[line.name] = float((logits.argmax(-1) == labels).mean())
    return found


def _head_back(model: Model, params: Params, source: sources.Trained, shape: tuple[int, ...]) -> Params:
    """Parameters with the source's own head."""
    head = models.names(model)[-1]
    return {**params, head: checkpoint.unflatten(source.flat, models.abstract(model, shape))[head]}
