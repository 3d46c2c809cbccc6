"""Merge fits of one architecture and one target into one: a model soup.

    python -m experiments.merge runs/full --by=soup --kind=greedy --workdir=runs/soup

The mean of the parameters of all fits of a run directory (or of several, with commas), or of those that --fits names: a
fit in a run directory of its own, which experiments.predict, export and report read. What a strategy added to the model
is merged into its ordinary parameters first, and running averages are averaged too. With --kind=greedy the fits are
taken in the order of their validation scores, and each stays in the mean if that is not worse with it on the validation
split; it has to be the same split for all: fits of one seed, or of one --draw_seed. The test set decides nothing.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", arXiv:2203.05482, and its algorithm 1 for the greedy one.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that a failure in them is reported in one line
    run_program(__file__)
import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from experiments.runs import budgets, command_line, console, directory, fit, metrics, plan, process
from experiments.runs.command_line import flag
from experiments.runs.settings import ComputeFlags, Settings
from tljax import batch_stats, checkpoint, evaluate, models, paths, plugins, train
from tljax.study import results
from tljax.study.results import Result
from tljax.types import InputError, Model, Params


@dataclass(frozen=True)
class MergeFlags(ComputeFlags):
    """Which fits are merged, how, and where to."""

    ARGUMENT: ClassVar[str] = "runs"
    runs: tuple[str, ...] = flag((), "run directories; may stand without --runs=; needed", place="path")
    fits: tuple[str, ...] = flag((), "which of their fits, names or patterns such as 'full-*'; default all")
    by: str = flag("soup", "how they are merged", choices=("soup",))
    kind: str = flag(
        "uniform",
        "the mean of all, or greedy: of those that help on the validation split",
        choices=("uniform", "greedy"),
    )
    workdir: str | None = flag(
        None, "the run directory of what they are merged into; needed", place="new", role="local"
    )
    data_dir: str | None = flag(None, "where data sets are kept; default as the run has it", role="free", place="path")
    manual_dir: str | None = flag(
        None, "where files put by hand are; default as the run has it", role="free", place="path"
    )


class Member(NamedTuple):
    """A fit to merge."""

    result: Result
    """As its run judges it."""
    folder: Path
    settings: Settings
    """Of its run."""
    about: Mapping[str, Any]
    """What its checkpoint says of itself."""
    flat: checkpoint.Flat


def run(flags: Mapping[str, Any], options: MergeFlags) -> Path:
    """Merge, measure and write; returns the run directory."""
    if not options.runs or not options.workdir:
        raise InputError("--runs and --workdir are needed: name run directories, and a new one for what they give")
    if Path(options.workdir).resolve() in [Path(name).resolve() for name in options.runs]:
        raise InputError(f"--workdir={options.workdir} is one of the runs: name a new folder")
    members = _members(options)
    first = members[0]
    _require_alike(members)
    settings = _settings_of_result(first, options)
    execution = process.prepare(settings)
    shape = tuple(first.about["shape"]) if isinstance(first.about["shape"], list) else None
    task = plan.load_task(settings, first.result.target, shape)
    if task.fingerprint != first.about["fingerprint"]:
        raise InputError(f"the data '{task.name}' are not those that the fits were trained on any more: restore them")
    settings = replace(settings, train_examples=(_budget(first, task),))
    model = settings.build_model(task.outputs, settings.recipe)
    like = models.abstract(model, plan.example_shape(task))
    trees = [_tree(member, like) for member in members]
    on_device = fit.load(task, settings.recipe, execution)
    if options.kind == "greedy":
        rows = _held_out(members, task)
        chosen = greedy(members, trees, lambda tree: _validation(on_device, model, tree, rows)["score"], on_device)
    else:
        rows, chosen = np.zeros(0, np.int32), list(range(len(members)))
    merged = mean([trees[i] for i in chosen])
    ingredients = [members[i] for i in chosen]
    with directory.opened(settings, "merge") as folder:
        directory.record_environment(folder, {task.name: task.fingerprint})
        result = _write(folder, options, members, ingredients, settings, on_device, model, merged, rows)
    measure = results.score(result)
    unit = "" if measure is None else f", test {on_device.objective.metrics[0].name} {measure:.4f}"
    console.say(f"{result.name}: the mean of {len(ingredients)} of {len(members)} fits{unit}: {folder}")
    return folder


# ---- Which fits


def _members(options: MergeFlags) -> list[Member]:
    """The fits that the flags name; raises InputError for none, fewer than two, and names that there are not."""
    known: list[tuple[Path, Settings, Result]] = []
    for name in options.runs:
        folder = Path(name)
        if not (folder / "results.jsonl").is_file() or not (folder / "flags.flags").is_file():
            raise InputError(f"--runs={name} is no run directory: name one of experiments.transfer or compare")
        settings = directory.recorded_settings(folder)
        superseded = directory.superseded(folder)
        for key, result in directory.finished(folder).items():
            if result.strategy != "pretrain" and key not in superseded:
                known.append((folder, settings, result))
    names = [result.name for *_, result in known]
    patterns = options.fits or ("*",)
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise InputError(f"--fits={pattern}: there is no such fit{plugins.nearest(pattern, names)}")
    chosen = [each for each in known if any(_matches(pattern, each[2].name) for pattern in patterns)]
    if len(chosen) < 2:
        raise InputError(f"{len(chosen)} fit is chosen: a soup is of two or more, so name more in --fits or --runs")
    if diverged := [result.name for *_, result in chosen if result.diverged]:
        raise InputError(f"fit '{diverged[0]}' diverged, and has no part in a mean: leave it out by --fits")
    return [_read(*each) for each in chosen]


def _matches(pattern: str, name: str) -> bool:
    """Whether a name, with its digest or without, is that of a pattern."""
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, name.rpartition("-")[0]))


def _read(folder: Path, settings: Settings, result: Result) -> Member:
    """A fit with its parameters as its run judges it, merged where its strategy added some."""
    state, about = checkpoint.load(folder / result.checkpoint)
    ended = results.at_end(result, settings.verdict_of)
    merged = f"{result.name}.merged"
    if merged in state and ended.end:
        raise InputError(
            f"fit '{result.name}' is judged by its end '{ended.end}', and its strategy added parameters: they are kept "
            "merged at the last step alone, so leave it out by --fits"
        )
    return Member(ended, folder, settings, about, state[merged] if merged in state else state[results.tree_of(ended)])


def _require_alike(members: Sequence[Member]) -> None:
    """Raise InputError unless all are of one target and one architecture; says where their sources differ."""
    first, *others = members
    for other in others:
        names = f"'{first.result.name}' and '{other.result.name}'"
        if (first.result.target, first.about["fingerprint"]) != (other.result.target, other.about["fingerprint"]):
            raise InputError(f"fits {names} are of other targets: a mean is of fits of one, so choose by --fits")
        if first.about["model"] != other.about["model"]:
            raise InputError(f"fits {names} are of other models: a mean is of one architecture, so choose by --fits")
        shapes = [{path: leaf.shape for path, leaf in member.flat.items()} for member in (first, other)]
        if shapes[0] != shapes[1]:
            odd = paths.some(sorted({path for path, _ in set(shapes[0].items()) ^ set(shapes[1].items())}))
            raise InputError(f"fits {names} differ at {odd}: a mean is of one architecture, so choose by --fits")
    starts = {(member.result.source, member.result.seed, member.folder) for member in members if member.result.source}
    if len({member.result.seed for member in members}) > 1 and len(starts) > 1:
        console.say(
            "the fits are of several seeds: where each has a source of its own, they need not lie in one valley, as "
            "fits of one source do"
        )


def _settings_of_result(first: Member, options: MergeFlags) -> Settings:
    """The settings of the run directory of what is merged: those of the first fit's run, of one fit."""
    settings = replace(
        first.settings,
        target=first.result.target,
        source=first.result.source if first.settings.source else None,
        strategies=first.settings.strategies[-1:],
        seeds=(first.result.seed,),
        verdict_of="last",
        workdir=options.workdir,
    )
    folders = {name: getattr(options, name) for name in ("data_dir", "manual_dir") if getattr(options, name)}
    compute = {name: value for name, value in vars(options).items() if name in vars(ComputeFlags())}
    return replace(settings, **folders, **compute)


def _budget(member: Member, task: Any) -> str:
    """The label budget of a fit, as its run's flags have it."""
    known = member.settings.train_examples
    return next((text for text in known if budgets.total(text, task) == member.result.train_examples), known[-1])


def _tree(member: Member, like: Params) -> Params:
    """The variables of a fit as the model has them; raises InputError for those of another model."""
    try:
        return checkpoint.unflatten(member.flat, like)
    except InputError as error:
        raise InputError(f"fit '{member.result.name}': {error}") from error


# ---- The mean


def mean(trees: Sequence[Params]) -> Params:
    """The mean of trees, leaf by leaf, in float64 and then in the leaf's dtype; what is no float is the first's.

    >>> mean([{"a": np.float32([1, 2])}, {"a": np.float32([3, 2])}])["a"].tolist()
    [2.0, 2.0]
    """

    def of_leaves(*leaves: Any) -> np.ndarray:
        first = np.asarray(leaves[0])
        if not np.issubdtype(first.dtype, np.floating) and first.dtype.name != "bfloat16":
            return first
        return np.mean([np.asarray(leaf, np.float64) for leaf in leaves], axis=0).astype(first.dtype)

    return jax.tree.map(of_leaves, *trees)


def greedy(
    members: Sequence[Member], trees: Sequence[Params], score: Callable[[Params], float | None], on_device: Any
) -> list[int]:
    """Which fits the greedy soup has: the best first, then each that makes the mean no worse (algorithm 1)."""
    primary = on_device.objective.metrics[0]
    sign = 1 if primary.larger_is_better else -1

    def of(tree: Params) -> float:
        value = score(tree)
        return -np.inf if value is None else sign * value

    alone = [of(tree) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        with_it = of(mean([trees[j] for j in [*chosen, i]]))
        taken = with_it >= best
        console.say(
            f"  {members[i].result.name}: {primary.name} on the validation split {alone[i] * sign:.4f} alone, the mean "
            f"with it {with_it * sign:.4f}: {'taken' if taken else 'left out'}"
        )
        if taken:
            chosen, best = [*chosen, i], with_it
    return chosen


def _held_out(members: Sequence[Member], task: Any) -> np.ndarray:
    """The validation split of the fits, int32; raises InputError unless they have one, and the same."""
    splits = []
    for member in members:
        recipe, name = member.settings.recipe, member.result.name
        if not recipe.validation:
            raise InputError(f"--kind=greedy: fit '{name}' was trained without a validation split: take --kind=uniform")
        streams = plan.streams(member.settings, member.result.seed, member.result.draw)
        splits.append(plan.draw_examples(recipe, _budget(member, task), task, streams.draw)[1])
    for member, split in zip(members, splits, strict=True):
        if not np.array_equal(np.sort(split), np.sort(splits[0])):
            raise InputError(
                f"--kind=greedy: '{members[0].result.name}' and '{member.result.name}' hold out other examples: choose "
                "fits of one seed and budget, or train them by experiments.transfer with one --draw_seed"
            )
    return splits[0]


def _validation(on_device: fit.DeviceData, model: Model, variables: Params, rows: np.ndarray) -> Mapping[str, Any]:
    """The metrics of variables on examples held out of training."""
    task, execution = on_device.task, on_device.execution
    inputs = evaluate.held(task.train, execution, rows, f"the validation examples of {task.name}")
    outputs = _outputs(model, variables, inputs, len(rows), execution)
    return evaluate.measure(on_device.objective, outputs, np.asarray(task.train.targets)[rows])


def _outputs(model: Model, variables: Params, inputs: Any, count: int, execution: train.Execution) -> np.ndarray:
    """Outputs of the head, [count, ...]."""
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], variables)
    return evaluate.logits(train.forward(model), stacked, inputs, count, batch=execution.evaluation_batch)()[0]


# ---- What is left of it


def _write(
    folder: Path,
    options: MergeFlags,
    members: Sequence[Member],
    ingredients: Sequence[Member],
    settings: Settings,
    on_device: fit.DeviceData,
    model: Model,
    merged: Params,
    rows: np.ndarray,
) -> Result:
    """Write the checkpoint, the predictions, soup.json and the line of results of what was merged; the result."""
    goal, task, first = on_device.objective, on_device.task, ingredients[0].result
    outputs = _outputs(model, merged, on_device.test, on_device.tests, on_device.execution)
    if not np.isfinite(outputs).all():
        raise InputError(
            "the mean of the fits gives outputs that are not finite: merge fits that are nearer each other"
        )
    test = evaluate.measure(goal, outputs, np.asarray(task.test.targets))
    validation = _validation(on_device, model, merged, rows) if len(rows) else None
    keys = [options.by, options.kind, *(member.result.key for member in ingredients)]
    key = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    recipe = hashlib.sha256(json.dumps(sorted({str(m.result.recipe) for m in ingredients})).encode()).hexdigest()
    name = f"{plan.file_name(f'{options.by}-{first.train_examples}-seed{first.seed}')}-{key[:8]}"
    place = f"checkpoints/{options.by}-{plan.group_name([key])}"
    seconds = sum(member.result.seconds or 0.0 for member in members)
    leaves = [(path, np.size(leaf), np.size(leaf)) for path, leaf in paths.items(batch_stats.split(merged)[0])]
    result = Result(
        name=name,
        key=key,
        recipe=recipe,
        source=first.source,
        target=first.target,
        strategy=options.by,
        options={"kind": options.kind, "fits": len(ingredients)},
        seed=first.seed,
        train_examples=first.train_examples,
        source_accuracy=first.source_accuracy,
        source_metric=first.source_metric,
        steps=sum(member.result.steps or 0 for member in members),
        trained_parameters=sum(size for _, size, _ in leaves),
        total_parameters=sum(size for _, size, _ in leaves),
        leaves=leaves,
        seconds=round(seconds, 3),
        metric=first.metric,
        checkpoint=place,
        **fit.fields_of(goal, test, validation),
    )
    about: dict[str, Any] = {"seed": first.seed, "accuracy": result.test_accuracy, "steps": result.steps}
    if result.metric is not None:
        about |= {"score": result.test_score, "metric": dict(result.metric)}
    of_all = {**fit.about(settings, task), "fisher": False, "fits": {name: about}}
    if (folder / place).is_dir():
        raise InputError(f"--workdir={folder} holds this soup already: name a new folder")
    checkpoint.save(folder / place, {name: merged}, of_all)
    groups = task.test.groups
    predictions, sha256 = metrics.write_predictions(folder, name, goal, outputs, np.asarray(task.test.targets), groups)
    directory.write_record(
        folder / "soup.json",
        {
            "kind": options.kind,
            "fits": [{"run": str(member.folder), "fit": member.result.name} for member in ingredients],
            "left_out": [member.result.name for member in members if member not in ingredients],
        },
    )
    # One point, as nothing was trained: where its curve would end.
    measured = results.score(result) if validation is None else results.validation_score(result)
    point = {"step": float(result.steps or 0), fit.score_column(goal.metrics[0]): float("nan")}
    point |= dict.fromkeys(("train_loss", "train_penalty", "gradient_norm"), float("nan"))
    point |= {} if measured is None else {fit.score_column(goal.metrics[0]): measured}
    metrics.write_curves(folder, name, [point])
    result = replace(result, predictions=predictions, predictions_sha256=sha256)
    directory.add(folder, [result])
    return result


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, MergeFlags)
