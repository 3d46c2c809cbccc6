"""Train what is planned, group by group, from where each group is, and leave it in the run directory.

`complete` is a whole experiment, `within` one of several in a run directory, `train_sources` the fits of a source.
`drive` trains one group, whoever wants it: an experiment, a source, the trials of a search, a range test.
"""

import contextlib
import functools
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import console, directory, metrics, plan, process, resume
from experiments.runs.plan import Experiment, PlannedFit
from experiments.runs.resume import Progress, Record
from experiments.runs.settings import Recipe, Settings
from experiments.runs.sources import Source, Trained, from_state, shape_to_json
from tljax import batch_stats, checkpoint, evaluate, masks, models, objective, optimizer, paths, penalties, seeds, train
from tljax import metrics as measures
from tljax.data import draw
from tljax.initialization import Look, Start
from tljax.study.results import Result, at_end, score
from tljax.study.units import to_record
from tljax.train import ahead, gradients, vectorize
from tljax.train.cost import largest
from tljax.train.data import is_streamed
from tljax.types import SELECTED_END, Mask, Metric, Model, ModelState, Objective, Params, Task

# ---- An experiment


def complete(
    experiment: Experiment, program: str = "transfer", show: Callable[[list[Result], Path], None] | None = None
) -> list[Result]:
    """Train what of an experiment is missing in its run directory, which is opened for `program`; the results.

    The first process calls `show` with the results and the run directory, before it is closed.
    """
    with directory.opened(experiment.settings, program) as folder:
        results = within(experiment, folder, plan.fingerprints(experiment))
        if process.first():
            keys = _source_keys(experiment)
            directory.supersede(folder, [*results, *(x for x in directory.results(folder) if x.key in keys)])
            if show:
                show(results, folder)
    return results


def within(experiment: Experiment, folder: Path, fingerprints: Mapping[str, str]) -> list[Result]:
    """Train what is missing in a run directory that this process holds; the results of all fits of the experiment.

    `fingerprints` are those of all the data of the run directory. Results are those of the end that the settings name.
    """
    planned = plan.planned(experiment)
    finished = directory.finished(folder)
    many, asked = plan.many_of(experiment), experiment.settings.many
    company = None if many != "vmap" else "strategy" if plan.budgets_together(experiment) else "budget"
    missing = _missing(planned, finished.keys(), company)
    lost = _source_keys(experiment) & {result.key for result in directory.results(folder)} - finished.keys()
    if process.first() and (missing or lost or not directory.recorded_environment(folder)):
        directory.record_environment(folder, fingerprints, many if asked == "auto" else "auto")
    if many != asked:
        ways = {"vmap": "side by side, which is in their keys", "map": "one after another"}
        console.say(f"on {vectorize.platform_of(())} --many=auto trains fits {ways[many]}")
    if missing or lost:
        _train_missing(experiment, missing, folder)
    finished = directory.finished(folder)
    if process.first():
        shutil.rmtree(folder / "progress", ignore_errors=True)  # of a group that ended as it was killed
    return [at_end(finished[key], experiment.settings.verdict_of) for key in planned]


def _missing(planned: Mapping[str, PlannedFit], finished: Set[str], company: str | None) -> dict[str, PlannedFit]:
    """The fits to train: those not finished, and where the company of its "strategy", or of its "budget" too, decides a
    fit's bits, those of their groups."""

    def group(fit: PlannedFit) -> tuple[str, ...]:
        return (fit.strategy.label,) if company == "strategy" else (fit.strategy.label, fit.budget)

    keys = planned.keys() - finished
    groups = {group(planned[key]) for key in keys if company}
    return {key: fit for key, fit in planned.items() if key in keys or group(fit) in groups}


def _source_keys(experiment: Experiment) -> set[str]:
    """Keys of the results that the source's fits have, if they are of this run."""
    return set(experiment.source.identity.values()) if experiment.source else set()


def _train_missing(experiment: Experiment, missing: Mapping[str, PlannedFit], folder: Path) -> None:
    """Train what is missing, a strategy at a time, and where its fits are large a budget at a time."""
    settings, model, target = experiment.settings, experiment.model, experiment.target
    untraced = replace(experiment.execution, profile=None)  # what is traced is a fit of the target
    trained = obtain_source(settings, experiment.source, folder, untraced)
    many = plan.many_of(experiment)
    on_device = load(target, settings.recipe, replace(experiment.execution, many=many))
    for line in plan.augment_notes(settings.recipe, target):
        console.say(line)
    seeds_of_fits = {fit.seed for fit in missing.values()}
    initial = {seed: plan.initialization_of(experiment, seed, trained.get(seed)) for seed in seeds_of_fits}
    groups: dict[Any, list[PreparedFit]] = {}
    keeps_dropout = plan.stages_with_dropout(settings, model, plan.example_shape(target))
    # One after another, each budget of a stream reads its own examples.
    is_alone = isinstance(on_device.train, train.Stream) and many != "vmap"
    together = plan.budgets_together(experiment) and not is_alone
    for planned in missing.values():
        streams = plan.streams(settings, planned.seed)
        look = look_at(on_device, model, streams, planned.budget)
        start = plan.start_of(planned.strategy, initial[planned.seed], look)
        of_source = trained.get(planned.seed)
        score, metric = (of_source.score, of_source.metric) if of_source else (None, None)
        result = replace(planned.result, source_accuracy=score, source_metric=metric)
        fit = build(on_device, model, start, streams, planned.budget, result, keeps_dropout)
        fit = fit._replace(keeps_best=settings.verdict_of == "best", keeps_selected=settings.verdict_of == SELECTED_END)
        begins = fit.result.phase_steps
        if len(begins) > 1 and planned.seed == settings.seeds[0]:
            console.say(f"{planned.strategy.label}: phases begin at the steps {', '.join(map(str, begins))}")
        company = _company(fit, planned.strategy.label, many)
        groups.setdefault((None if together else planned.budget, company), []).append(fit)
    del initial  # with a draw of the whole model for each seed
    with_programs = [ahead.Group(group[0].spec, *_trials_and_stops(on_device, group)) for group in groups.values()]
    if plan.has_code_from_outside(experiment):
        with_programs = []
    with ahead.compiled_ahead(with_programs, on_device.train, on_device.execution) as before:
        for number, group in enumerate(groups.values()):
            names = _names(group)
            if len(groups) > 1:
                console.say(f"{names}: {len(group)} of the {len(missing)} fits, trained by themselves")
            with console.progress(names, sum(len(fit.trial.rates) for fit in group)) as advance:
                before_phase = functools.partial(before, number) if with_programs else lambda fits, phase: None
                execution = replace(on_device.execution, before_phase=before_phase)
                of_group = on_device._replace(execution=execution)
                train_groups(of_group, group, folder, about(settings, target), advance, settings.checkpoint_every)


def _trials_and_stops(on_device: "DeviceData", group: Sequence["PreparedFit"]) -> tuple[list[train.Fit], list[int]]:
    """The fits of the spec that a group is trained with first, and the steps at which their segments end."""
    alike = [fit for fit in group if (fit.spec, len(fit.trial.rates)) == (group[0].spec, len(group[0].trial.rates))]
    return [fit.trial for fit in alike], _stops(on_device, alike)


def _company(fit: "PreparedFit", label: str, many: str) -> Any:
    """What fits are trained together: those of a strategy, and of others whose one mask compiles to the same."""
    (_, mask), *later = fit.trial.phases
    if later or fit.trial.rules or masks.is_strategy(mask) or many == "vmap":
        return label
    return train.group_key(fit.spec, fit.trial, (mask,))


def about(settings: Settings, task: Task) -> dict[str, Any]:
    """What a checkpoint says of itself, so that it can be a source."""
    is_pixels = getattr(task.train.spec, "dtype", None) == np.uint8
    return {
        "task": task.name,
        "fingerprint": task.fingerprint,
        "classes": list(task.classes),
        "shape": shape_to_json(plan.example_shape(task)),
        **({"resize": settings.resize} if settings.resize != "squash" and is_pixels else {}),
        **({"kind": task.kind, "outputs": task.outputs} if task.kind != "classes" else {}),
        "model": settings.architecture(),
        "note": task.note,
    }


# ---- The fits of a source


def obtain_source(
    settings: Settings, source: Source | None, folder: Path, execution: train.Execution
) -> Mapping[int, Trained]:
    """{seed: trained source}: the parameters that were read, or those trained in the run directory; {} of no source."""
    if source is None:
        return {}
    if source.task is None:
        return _on_device(source.trained)
    results = train_sources(settings, source.task, folder, execution)
    states = {place: checkpoint.load(folder / place)[0] for place in {result.checkpoint for result in results.values()}}
    return _on_device(
        {
            seed: from_state(states[result.checkpoint], result.name, score(result), result.metric)
            for seed, result in results.items()
        }
    )


def _on_device(trained: Mapping[int, Trained]) -> dict[int, Trained]:
    """Sources with arrays of JAX, one for each array however many seeds have it.

    Nobody writes into them, so all fits go on holding the same, which a group then has once.
    """
    arrays: dict[int, jax.Array] = {}

    def placed(leaf: np.ndarray) -> Any:
        if leaf.dtype != jax.dtypes.canonicalize_dtype(leaf.dtype):
            return leaf  # it is refused where it meets the model
        if id(leaf) not in arrays:
            arrays[id(leaf)] = jnp.array(leaf)
        return arrays[id(leaf)]

    return {seed: source._replace(flat=jax.tree.map(placed, source.flat)) for seed, source in trained.items()}


def train_sources(settings: Settings, task: Task, folder: Path, execution: train.Execution) -> dict[int, Result]:
    """Train the sources that the run directory does not hold yet; {seed: its result}."""
    planned = plan.planned_sources(settings, task)
    finished = directory.finished(folder)
    missing = {seed: result for seed, result in planned.items() if result.key not in finished}
    if missing:
        many = plan.many_of_source(settings, task)
        missing = planned if many == "vmap" else missing
        for line in plan.augment_notes(settings.source_recipe, task):
            console.say(line)
        on_device = load(task, settings.source_recipe, replace(execution, many=many))
        fits = [prepare_source(settings, on_device, seed, result) for seed, result in missing.items()]
        with console.progress(f"source {task.name}", sum(len(fit.trial.rates) for fit in fits)) as advance:
            every, fisher = settings.checkpoint_every, settings.save_fisher
            train_groups(on_device, fits, folder, about(settings, task), advance, every, fisher)
    finished = directory.finished(folder)
    return {seed: finished[result.key] for seed, result in planned.items()}


def prepare_source(settings: Settings, on_device: "DeviceData", seed: int, result: Result) -> "PreparedFit":
    """The fit that trains the source of a seed."""
    task = on_device.task
    streams, model = plan.source_streams(settings, seed), settings.build_model(task.outputs, settings.source_recipe)
    drawn = models.init(model, jax.random.key(streams.head), plan.example_shape(task))
    params, model_state = batch_stats.split(drawn)
    mask = masks.by_path(params, lambda path: True)
    start = Start(params, ((0.0, mask),), fresh=mask, model_state=model_state)
    return build(on_device, model, start, streams, "all", result)


# ---- From a plan to what is ready to train


class DeviceData(NamedTuple):
    """A task on the device, and the recipe by which a model learns it."""

    task: Task
    recipe: Recipe
    objective: Objective
    """What the recipe minimises and measures."""
    train: train.Data | train.Stream
    """The training examples."""
    test: train.Data | train.Stream
    """The test inputs, as `evaluate.held` gives them."""
    tests: int
    """How many they are."""
    execution: train.Execution
    draws: dict[Any, tuple[np.ndarray, np.ndarray]]
    """{budget, seed of the draw, fraction held out: what `split` gives}: all strategies draw the same."""


def load(task: Task, recipe: Recipe, execution: train.Execution) -> DeviceData:
    """Put a task on the device, once for all its fits, or make it a stream."""
    examples = train.held(task.train, execution, f"the training examples of {task.name}")
    test = evaluate.held(task.test, execution, what=f"the test examples of {task.name}")
    if isinstance(examples, train.Stream):
        execution.on_message(f"{task.name} is streamed: at most {execution.stream_memory / 1e6:,.0f} MB are read ahead")
    goal, tests = plan.objective_of(task, recipe), len(task.test.targets)
    return DeviceData(task, recipe, goal, examples, test, tests, execution, {})


def with_recipe(on_device: DeviceData, recipe: Recipe) -> DeviceData:
    """The same task under another recipe."""
    return on_device._replace(recipe=recipe, objective=plan.objective_of(on_device.task, recipe))


def outlined(task: Task, recipe: Recipe, execution: train.Execution) -> DeviceData:
    """A task as `load` gives it, with shapes and dtypes in place of its training examples, and without test images."""
    count = len(task.train)
    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, count, *leaf.shape), leaf.dtype), task.train.spec)
    targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), task.train.targets)
    goal, nothing = plan.objective_of(task, recipe), train.Data(None, None)
    streamed = is_streamed(task.train, execution.data, execution.devices)
    examples = train.Stream(task.train, execution.stream_memory) if streamed else train.Data(inputs, targets)
    return DeviceData(task, recipe, goal, examples, nothing, 0, execution, {})


class PreparedFit(NamedTuple):
    """One fit, ready to train."""

    result: Result
    """What is known of it before it is trained."""
    spec: train.Spec
    trial: train.Fit
    validation: np.ndarray
    """int32: the training examples that are held out."""
    finish: Callable[..., Mapping[str, Params]] | None = None
    """(the parameters after training, those with which later phases began) -> {name: parameters to evaluate and keep
    beside them}."""
    keeps_phases: bool = False
    """Whether `finish` asks for the parameters with which phases began."""
    keeps_best: bool = False
    """Whether what the best point predicts is kept."""
    keeps_selected: bool = False
    """Whether the best of what `finish` gives, by the validation split, is kept as an end of its own."""
    merge: Callable[[Params], Params] | None = None
    """The parameters -> the model's ordinary ones, which are kept beside them."""


def build(
    on_device: DeviceData,
    model: Model,
    start: Start,
    streams: seeds.Seeds,
    budget: str,
    result: Result,
    keeps_dropout: tuple[str, ...] = (),
) -> PreparedFit:
    """One fit, from where it starts; the stages `keeps_dropout` keep their dropout while they are frozen."""
    recipe = on_device.recipe
    plan.require_validation(recipe, start)
    subset, validation = split(on_device, streams, budget)
    optimizer, numbers = recipe.optimizer_spec()
    terms, weights = penalties.read(recipe.penalty)
    smooth, balanced = recipe.label_smoothing > 0, recipe.class_weights == "balanced"
    loss = on_device.objective.loss
    spec = train.Spec(
        model,
        loss,
        optimizer,
        terms,
        smooth,
        start.applied,
        keeps_dropout=keeps_dropout,
        weighs_classes=balanced,
        augment=plan.augmentations(recipe, on_device.task),
        averages=recipe.ema > 0,
        microbatch=recipe.microbatch,
        batch_stats=start.batch_stats,
    )

    total = plan.count_steps(recipe, len(subset))
    trial = train.Fit(
        start.params,
        plan.phases_at_steps(start.phases, total),
        draw.Order(streams.order, len(subset), recipe.batch_size, epochs=recipe.steps is None, subset=subset),
        plan.learning_rates(recipe, total),
        weights,
        {
            **numbers,
            "label_smoothing": recipe.label_smoothing,
            **({"average_weight": 1 - recipe.ema} if recipe.ema else {}),
        },
        jax.random.key(streams.order),
        start.fresh,
        start.fisher,
        model_state=start.model_state,
        order_name=(streams.order, recipe.batch_size, recipe.steps is None, subset.tobytes()),
        pass_steps=-(-len(subset) // recipe.batch_size),
        class_weights=_class_weights(on_device, subset),
        rules=start.rules,
    )
    begins = [step for step, _ in trial.phases]
    result = replace(result, steps=total, phase_steps=begins)
    return PreparedFit(result, spec, trial, validation, start.finish, start.finish_takes_phases, merge=start.merge)


def _class_weights(on_device: DeviceData, subset: np.ndarray) -> np.ndarray | None:
    """The weights of the classes among the training examples `subset` (int32 [n]), where the recipe balances them."""
    if on_device.recipe.class_weights == "none":
        return None
    classes = np.asarray(on_device.task.train.targets)[subset]
    return objective.class_weights(classes, on_device.objective.num_outputs)


def split(on_device: DeviceData, streams: seeds.Seeds, budget: str) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) examples of one fit, int32 each, the former in ascending order."""
    drawn = budget, streams.draw, on_device.recipe.validation
    if drawn not in on_device.draws:
        subset, validation = plan.draw_examples(on_device.recipe, budget, on_device.task, streams.draw)
        on_device.draws[drawn] = np.sort(subset), validation
    return on_device.draws[drawn]


def look_at(on_device: DeviceData, model: Model, streams: seeds.Seeds, budget: str) -> Look:
    """What a data-driven strategy may look at: gradients on the training split, never on validation or test data."""

    def look(merge: Any, state: Any) -> tuple[Any, Any]:
        subset, _ = split(on_device, streams, budget)
        examples = (model, on_device.objective.loss, on_device.train, subset, merge)
        weights = _class_weights(on_device, subset)
        gradient = gradients.mean_gradient(*examples, weights, state=state)
        return gradient, gradients.mean_squared_gradient(*examples, state=state)

    return look


# ---- One group


class Point(NamedTuple):
    """Some fits of a group at the end of a segment."""

    state: train.State
    log: train.Log
    """What happened in the segment, float32 [fits, steps] each."""
    logits: Callable[[], np.ndarray] | None
    """Waits for the outputs of the head for the test inputs, float32 [fits, examples, ...], where the curves have a
    point."""
    of_average: Callable[[], np.ndarray] | None = None
    """The same of the average of what trains, where there is one and no validation split to measure it by."""
    validated: Mapping[int, Mapping[str, Any] | None] = {}
    """{fit: its metrics on the validation split}, where a phase asked for them."""
    trained: Mapping[str, np.ndarray] = {}
    """{path: in how many steps so far the leaf trained, float32 [fits]}, where one schedule is all phases."""


def drive(
    on_device: DeviceData,
    group: Sequence[PreparedFit],
    parts: Sequence[train.State] = (),
    should_stop: Callable[[], bool] | None = None,
    *,
    evaluated: bool = True,
    on_compiled: Callable[[tuple[int, ...], train.Cost], None] | None = None,
    on_steps: Callable[[int], None] | None = None,
    meanwhile: Callable[[], bool] | None = None,
) -> Iterator[Point]:
    """Train fits of one spec and as many steps each, from `parts` on if they are half trained.

    A segment ends at each point of the curves and where a phase begins. Without `evaluated` there are no logits. The
    outputs of a point are computed before the next segment, and may be waited for in it (`Execution.meanwhile`).
    """
    process.release_programs()
    spec, trials = group[0].spec, [fit.trial for fit in group]
    points, stops = curve_points(on_device.recipe, group), _stops(on_device, group)
    execution = replace(on_device.execution, should_stop=should_stop) if should_stop else on_device.execution
    execution = replace(execution, on_compiled=_both(on_compiled, execution.on_compiled)) if on_compiled else execution
    execution = replace(execution, on_steps=on_steps) if on_steps else execution
    execution = replace(execution, meanwhile=meanwhile) if meanwhile else execution
    validated: dict[int, Mapping[str, Any] | None] = {}

    def validate(state: train.State) -> list[float | None] | None:
        """The scores at a point, whose metrics go with the point that follows."""
        validated.clear()
        if state.step not in points:
            return None
        on_host = state._replace(
            **{name: vectorize.host(getattr(state, name)) for name in ("params", "model_state", "shared")}
        )
        for row, i in enumerate(state.fits):
            variables = jax.tree.map(np.asarray, on_host.variables_of(row))
            validated[i] = _validate(on_device, group[i].spec, variables, group[i].validation)
        sign = 1 if on_device.objective.metrics[0].larger_is_better else -1
        return [None if (score := _score(validated[i])) is None else sign * score for i in state.fits]

    for state, log in train.fit(spec, trials, on_device.train, stops, tuple(parts), execution, validate):
        has_trained = log.loss.shape[1] > 0
        at_point = evaluated and state.step in points and (has_trained or state.step == points[-1])
        logits = _logits_begun(on_device, group, state) if at_point else None
        of_average = None
        if at_point and state.average is not None and not len(group[0].validation):
            params, model_state = train.with_average(state.params, state.model_state, state.average)
            of_average = _logits_begun(on_device, group, state._replace(params=params, model_state=model_state))
        trained = _steps_trained(state) if at_point and len(trials[0].phases) == 1 else {}
        yield Point(state, log, logits, of_average, dict(validated) if has_trained else {}, trained)
        validated.clear()


def _both(*functions: Callable[..., None]) -> Callable[..., None]:
    """A function that calls each of these."""

    def call(*arguments: Any) -> None:
        for function in functions:
            function(*arguments)

    return call


def _steps_trained(state: train.State) -> dict[str, np.ndarray]:
    """{path: in how many steps so far the leaf trained, float32 [fits]}; {} where no mask moves."""
    if not isinstance(state.optimizer, optimizer.Scheduled):
        return {}
    return {path: np.array(leaf) for path, leaf in paths.items(vectorize.host(state.optimizer.trained))}


def _stops(on_device: DeviceData, group: Sequence[PreparedFit]) -> list[int]:
    """The steps at which the segments of a group end: the points of the curves, and where phases begin."""
    begins = (step for step, _ in group[0].trial.phases if step)
    return sorted({*curve_points(on_device.recipe, group), *begins})


def _score(measured: Mapping[str, Any] | None) -> float | None:
    """The primary metric among metrics; None of none, and of outputs that are not finite."""
    return measured["score"] if measured else None


def curve_points(recipe: Recipe, group: Sequence[PreparedFit]) -> list[int]:
    """The steps at which the curves of a group have a point; the last is its last step."""
    return plan.curve_steps(recipe, len(group[0].trial.rates))


def diverged_at(state: train.State, row: int, logits: np.ndarray | None) -> int | None:
    """The step at which the fit in a row of a state diverged, None if it did not.

    It is the first step whose loss or gradient was not finite; where all were, but a logit of the test images is not,
    it is the step of the state.
    """
    step = state.diverged[row]
    if step is None and logits is not None and not np.isfinite(logits[row]).all():
        return state.step
    return step


def _logits_begun(on_device: DeviceData, group: Sequence[PreparedFit], state: train.State) -> Callable[[], np.ndarray]:
    trials = [fit.trial for fit in group]
    return evaluate.logits_of(group[0].spec, trials, state, on_device.test, on_device.tests, on_device.execution)


# ---- All groups of a run


class Outcome(NamedTuple):
    """What training a fit gives."""

    params: Params
    """The last; of a fit that diverged, the last that were finite."""
    model_state: ModelState
    """The model's state that goes with them."""
    masks: tuple[Mask, ...]
    """One a phase."""
    record: Record
    logits: np.ndarray
    test: Mapping[str, Any]
    validation: Mapping[str, Any] | None
    """Metrics on the validation split, if there is one."""
    ends: Mapping[str, "End"] = {}
    """{name: what else it ended with}, where that was asked for; none of a fit that diverged."""


class End(NamedTuple):
    """What a fit ended with beside its last parameters, and was asked for."""

    step: int
    variables: Params
    logits: np.ndarray
    test: Mapping[str, Any]
    validation: Mapping[str, Any] | None


SAVE_SECONDS = 600.0
"""After so long what is half trained is saved, wherever it is: a segment of many fits may take hours."""


def train_groups(
    on_device: DeviceData,
    fits: Sequence[PreparedFit],
    folder: Path,
    about: Mapping[str, Any],
    advance: Callable[[int], None],
    every: int,
    fisher: bool = False,
) -> None:
    """Train fits in groups of one spec, and leave of each group checkpoints, predictions, metrics and results.

    What is half trained is saved after `every` segments, and when it has been trained for SAVE_SECONDS since, and taken
    up from there. `fisher` leaves the Fisher information of each in the checkpoint too. Raises process.Stopped when a
    signal asks for it.
    """
    groups: dict[Any, list[PreparedFit]] = {}
    for fit in fits:
        groups.setdefault((fit.spec, len(fit.trial.rates)), []).append(fit)
    with process.signals_handled() as signal_number:
        for group in groups.values():
            place = folder / "progress" / plan.group_name(fit.result.key for fit in group)
            outcomes = _train_group(on_device, group, place, every, signal_number, advance)
            _end_trace(on_device.execution)
            pairs = zip(group, outcomes, strict=True)
            fishers = [_fisher(on_device, fit, outcome) for fit, outcome in pairs] if fisher else []
            if process.first():
                _leave(folder, group, outcomes, on_device, {**about, "fisher": fisher}, fishers)
                shutil.rmtree(place, ignore_errors=True)
                with contextlib.suppress(OSError):  # others are half trained still
                    place.parent.rmdir()
            process.wait("left")
            if number := vectorize.agreed(signal_number()):
                raise process.Stopped(number, "stopped between two groups of fits; the same command goes on")


def _end_trace(execution: train.Execution) -> None:
    """End a trace that is under way, as the fits are; say where one is, once."""
    if profile := execution.profile:
        profile.close()
        if profile.is_done and not profile.is_said:
            profile.is_said = True
            console.say(
                f"steps {profile.first} to {profile.last} are traced in '{profile.folder}', for TensorBoard or xprof"
            )


def _train_group(
    on_device: DeviceData,
    group: Sequence[PreparedFit],
    place: Path,
    every: int,
    signal_number: Callable[[], int],
    advance: Callable[[int], None],
) -> list[Outcome]:
    """Train one group from where it is to its end, and save it on the way."""
    keys = [fit.result.key for fit in group]
    points = curve_points(on_device.recipe, group)
    last, names = points[-1], _names(group)
    saved = [point for point in points if point not in {step for step, _ in group[0].trial.phases}]
    progress = process.in_turn(
        lambda: resume.find(place.parent, keys, group[0].spec, [fit.trial for fit in group], console.say)
    )
    if progress:
        console.say(f"{names}: goes on from step {min(part.step for part in progress.parts)} of {last}")
    progress = progress or resume.nothing(len(group))
    advance(sum(part.step * len(part.fits) for part in progress.parts))
    final: dict[int, np.ndarray] = {}
    peaks = {i: record.peak_bytes for i, record in enumerate(progress.records)}

    def on_compiled(fits: tuple[int, ...], cost: train.Cost) -> None:
        peaks.update({i: largest(peaks[i], cost.peak_bytes) for i in fits})

    stepped = 0
    """The steps, added up over fits, that were trained since the last point."""

    began = 0.0
    """When training began, or went on after it was saved for its time."""

    def on_steps(steps: int) -> None:
        nonlocal stepped
        stepped += steps
        advance(steps)

    def should_stop() -> bool:
        is_long = stepped > 0 and time.perf_counter() - began >= SAVE_SECONDS
        return bool(vectorize.agreed(signal_number() or int(is_long)))

    pending: deque[Iterator[None]] = deque()
    """What is still to be done for the points before: fit after fit, while the devices train on."""
    latest: list[tuple[tuple[int, ...], Any]] = []
    """(Fits, optimizer's state) of the states that were yielded last."""

    def meanwhile() -> bool:
        if not pending:
            return False
        if next(pending[0], pending) is pending:
            pending.popleft()
        return True

    def after(point: Point, held: train.State, seconds: float, is_due: bool) -> Iterator[None]:
        nonlocal progress
        state, logits = point.state, None if point.logits is None else point.logits()
        later = yield from advanced(on_device, group, progress, held, point, logits, seconds)
        records = (record._replace(peak_bytes=peaks[i]) for i, record in enumerate(later.records))
        progress = later._replace(records=tuple(records))
        if logits is not None and state.step == last:
            final.update(zip(state.fits, logits, strict=True))
        if is_due:
            save(progress)

    with resume.saving(place, keys) as save:
        ended = stopped = False
        while not ended and not stopped:
            began = start = time.perf_counter()
            driven = drive(
                on_device,
                group,
                progress.parts,
                should_stop,
                on_compiled=on_compiled,
                on_steps=on_steps,
                meanwhile=meanwhile,
            )
            for point in driven:
                seconds, state = (time.perf_counter() - start) / len(point.state.fits), point.state
                while meanwhile():
                    pass
                advance(_steps_gone(progress, state) - stepped)
                stepped = 0
                is_due = state.step in saved and (points.index(state.step) + 1) % every == 0
                if is_due:  # the other parts may train on before this is saved
                    progress = progress._replace(
                        parts=tuple(
                            part
                            if set(part.fits) <= set(state.fits)  # else what is left of it is saved too
                            else resume.on_host(resume.with_optimizer(part, latest))
                            for part in progress.parts
                        )
                    )
                latest = resume.needed([*latest, (state.fits, state.optimizer)])
                pending.append(after(point, resume.held(state, is_due, _moves(group, state)), seconds, is_due))
                while jax.process_count() > 1 and meanwhile():  # who all do the same at the same time
                    pass
                start = time.perf_counter()
            while meanwhile():
                pass
            ended = sum(len(part.fits) for part in progress.parts if part.step == last) == len(group)
            if progress.parts and not ended:
                parts = (resume.on_host(resume.with_optimizer(part, latest)) for part in progress.parts)
                progress = progress._replace(parts=tuple(parts))
                save(progress)
            stopped = bool(vectorize.agreed(signal_number()))
    if not ended:
        step = min(part.step for part in progress.parts) if progress.parts else None
        where = "before its first step" if step is None else f"at step {step} of {last}"
        raise process.Stopped(
            vectorize.agreed(signal_number()), f"stopped {where} of {names}; the same command goes on, from '{place}'"
        )
    for part in progress.parts:
        if part.fits[0] not in final:  # it had ended before this process began
            final |= dict(zip(part.fits, _logits_begun(on_device, group, part)(), strict=True))
    return [_outcome(on_device, group[i], progress, i, final[i]) for i in range(len(group))]


def _moves(group: Sequence[PreparedFit], state: train.State) -> list[bool] | None:
    """Of each leaf of a state's parameters whether a later segment may take it over; None if any may."""
    if len(group[0].trial.phases) > 1:
        return None
    here = jax.tree.leaves(state.params, is_leaf=lambda leaf: leaf is None)
    each = zip(here, *(jax.tree.leaves(history[0]) for history in state.masks), strict=True)
    return [any(map(masks.trains, of_fits)) for leaf, *of_fits in each if leaf is not None]


def _steps_gone(progress: Progress, state: train.State) -> int:
    """The steps of a state's fits since they were last seen; of those that a fit is not trained for, all at once."""
    seen = {i: part.step for part in progress.parts for i in part.fits}
    return sum(state.step - seen.get(i, 0) for i in state.fits)


def _names(group: Sequence[PreparedFit]) -> str:
    return ", ".join(dict.fromkeys(fit.result.strategy for fit in group))


def advanced(
    on_device: DeviceData,
    group: Sequence[PreparedFit],
    progress: Progress,
    held: train.State,
    point: Point,
    logits: np.ndarray | None,
    seconds: float,
) -> Generator[None, None, Progress]:
    """The progress of a group with a later state, which took so many seconds a fit; at a point, where there are the
    `logits` of the test inputs, the curves grow. `held` is the state as `resume.held` gives it.

    A generator that yields after each fit, so that its work can be done in pieces, and returns the progress.
    """
    state, log = point.state, point.log
    records = list(progress.records)
    if not log.loss.shape[1]:  # a phase has ended by validation: nothing was trained since these fits were last seen
        for row, i in enumerate(state.fits):
            records[i] = _with_phases(records[i], group[i], state, row)
            if state.over and records[i].curve[-1]["step"] < state.step:
                records[i] = _stopped(on_device, group, records[i], group[i], held, row, logits)
        return Progress(resume.joined(progress.parts, held), tuple(records))
    of_average = None if point.of_average is None else point.of_average()
    for row, i in enumerate(state.fits):
        since = jax.tree.map(lambda curve, row=row: curve[row], log)
        if records[i].since is not None:
            since = jax.tree.map(lambda *curves: np.concatenate(curves), records[i].since, since)
        record = records[i]._replace(seconds=records[i].seconds + seconds, since=since)
        record = _with_phases(record, group[i], state, row)
        if group[i].keeps_phases and state.step in [step for step, _ in group[i].trial.phases[1:]]:
            record = record._replace(phases=(*record.phases, _variables(held, row)))
        if record.diverged is None:
            step = diverged_at(state, row, logits)
            # From point to point, wherever a fit was stopped between them: what is kept of it must not depend on that.
            before = _before(progress, i, group[i].trial) if record.finite is None else record.finite
            record = record._replace(diverged=step, finite=before if step is not None or logits is None else None)
        if logits is not None:
            variables = _variables(held, row) if len(group[i].validation) else None
            validated = (
                point.validated[i]
                if i in point.validated
                else _validate(on_device, group[i].spec, variables, group[i].validation)
            )
            average = _score_of_average(on_device, group[i], held, row, of_average)
            more = (variables, validated, average)
            record = _at_point(on_device, group[i], record, state.step, since, logits[row], *more)
            record.curve[-1].update({f"trained/{path}": float(of_fits[row]) for path, of_fits in point.trained.items()})
        records[i] = record
        yield
    return Progress(resume.joined(progress.parts, held), tuple(records))


def _variables(state: train.State, row: int) -> Params:
    """The variables of the fit in a row of a state, in NumPy: rows are taken on the host, where it costs nothing."""
    names = ("params", "model_state", "shared")
    on_host = {name: jax.tree.map(np.asarray, getattr(state, name)) for name in names}
    return state._replace(**on_host).variables_of(row)


def _with_phases(record: Record, fit: PreparedFit, state: train.State, row: int) -> Record:
    """A record in which stands when the phase of a state began, of a fit whose phases end by validation."""
    if not fit.trial.rules:
        return record
    began = record.began or (0,)
    return record._replace(began=began if len(began) == len(state.masks[row]) else (*began, state.began))


def _stopped(
    on_device: DeviceData,
    group: Sequence[PreparedFit],
    record: Record,
    fit: PreparedFit,
    state: train.State,
    row: int,
    logits: np.ndarray | None,
) -> Record:
    """The record of a fit whose last phase was over before the last step: its curve goes on as it stands then."""
    assert logits is not None
    stopped = int(record.curve[-1]["step"])
    variables = _variables(state, row)
    validated = _validate(on_device, fit.spec, variables, fit.validation)
    rest = [step for step in curve_points(on_device.recipe, group) if step > stopped]
    column = score_column(on_device.objective.metrics[0])
    scores = {column: validated["score"] if validated else _test_score(on_device, logits[row])}
    if fit.spec.averages:
        scores["average"] = _score_of_average(on_device, fit, state, row, None)
    known = {name: float("nan") if score is None else score for name, score in scores.items()}
    points = ({**record.curve[-1], **known, "step": step} for step in rest)
    return record._replace(curve=[*record.curve, *points], stopped=stopped)


def _averaged(state: train.State, row: int) -> Params:
    """The variables of a fit in a row of a state, with its average in place of what ever trained."""
    average = jax.tree.map(lambda leaf: np.asarray(leaf)[row], state.average)
    of_row = (*batch_stats.split(_variables(state, row)), average)
    return batch_stats.join(*jax.tree.map(np.asarray, train.with_average(*of_row)))


def _score_of_average(
    on_device: DeviceData, fit: PreparedFit, state: train.State, row: int, logits: np.ndarray | None
) -> float | None:
    """The score of a fit's average on its validation split, or without one by its `logits` of the test images."""
    if state.average is None:
        return None
    if len(fit.validation):
        return _score(_validate(on_device, fit.spec, _averaged(state, row), fit.validation))
    of_row = _logits_of(on_device, fit, _averaged(state, row)) if logits is None else logits[row]
    return _test_score(on_device, of_row)


def _logits_of(on_device: DeviceData, fit: PreparedFit, variables: Params) -> np.ndarray:
    """Outputs of the head for the test inputs under these variables of one fit, float32 [examples, ...]."""
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], variables)
    forward, batch = train.forward(fit.spec.model, fit.spec.merge), on_device.execution.evaluation_batch
    return evaluate.logits(forward, stacked, on_device.test, on_device.tests, batch=batch)()[0]


def _before(progress: Progress, i: int, trial: train.Fit) -> Params:
    """The variables of fit `i` of a group when it was last seen, or where it starts."""
    for part in progress.parts:
        if i in part.fits:
            return _variables(part, part.fits.index(i))
    return jax.tree.map(np.asarray, batch_stats.join(trial.params, trial.model_state))


def _at_point(
    on_device: DeviceData,
    fit: PreparedFit,
    record: Record,
    step: int,
    since: train.Log,
    logits: np.ndarray,
    variables: Params | None,
    validated: Mapping[str, Any] | None,
    average: float | None,
) -> Record:
    """A record with one more point of its curve, and perhaps a new best.

    `validated` are the metrics on the validation split, if there is one, and `variables` are then the fit's; `average`
    is the score of the average.
    """
    primary, best = on_device.objective.metrics[0], record.best
    score = validated["score"] if validated else _test_score(on_device, logits)
    point = _curve_point(step, since, fit.spec, primary, score)
    point |= {"average": float("nan") if average is None else average} if fit.spec.averages else {}
    if (
        validated
        and validated["score"] is not None
        and (best is None or is_better(primary, validated["score"], best[1]))
    ):
        best = (step, validated["score"], variables)
    return record._replace(curve=[*record.curve, point], since=None, best=best)


def is_better(metric: Metric, score: float, other: float) -> bool:
    """Whether one score of a metric is better than another."""
    return score > other if metric.larger_is_better else score < other


def _outcome(on_device: DeviceData, fit: PreparedFit, progress: Progress, i: int, logits: np.ndarray) -> Outcome:
    """What fit `i` of a group that has ended gives, with its logits of the test images."""
    [part] = [part for part in progress.parts if i in part.fits]
    row, record = part.fits.index(i), progress.records[i]
    variables = jax.tree.map(np.array, _variables(part, row))
    ends: dict[str, tuple[int, Params]] = {}
    evaluated: dict[str, End] = {}
    test = _measure(on_device, logits)
    if record.diverged is None and test["score"] is None:
        primary, targets = on_device.objective.metrics[0], np.asarray(on_device.task.test.targets)
        console.say(
            f"{fit.result.strategy}, seed {fit.result.seed}: {primary.name} on the test set is "
            f"{measures.without_number(primary, logits, targets)}: the fit counts as diverged"
        )
        record = record._replace(diverged=record.stopped or part.step, finite=variables)
    if record.diverged is not None:
        variables, logits = record.finite, np.full_like(logits, np.nan)
        test = _measure(on_device, logits)
    else:
        last = record.stopped or part.step
        ends |= {"best": (record.best[0], record.best[2])} if record.best and fit.keeps_best else {}
        ends |= {"average": (last, _averaged(part, row))} if part.average is not None else {}
        params, model_state = batch_stats.split(variables)
        began = [batch_stats.split(tree)[0] for tree in record.phases]
        finished = fit.finish(params, began) if fit.finish else {}
        ends |= {name: (last, batch_stats.join(tree, model_state)) for name, tree in finished.items()}
        evaluated = {name: _end(on_device, fit, *end) for name, end in ends.items()}
        if fit.keeps_selected:
            evaluated |= _selected(on_device, {name: evaluated[name] for name in finished})
    return Outcome(
        *batch_stats.split(variables),
        part.masks[row],
        record,
        logits,
        test,
        _validate(on_device, fit.spec, variables, fit.validation) if record.diverged is None else None,
        evaluated,
    )


def _selected(on_device: DeviceData, ends: Mapping[str, End]) -> dict[str, End]:
    """{"selected": the end with the best validation score, the first of equal ones}; {} where there is no score."""
    primary = on_device.objective.metrics[0]
    selected: End | None = None
    for end in ends.values():
        if (score := _score(end.validation)) is None:
            continue
        best = None if selected is None else _score(selected.validation)
        if best is None or is_better(primary, score, best):
            selected = end
    return {} if selected is None else {SELECTED_END: selected}


def _end(on_device: DeviceData, fit: PreparedFit, step: int, variables: Params) -> End:
    """One of a fit's ends, evaluated."""
    logits = _logits_of(on_device, fit, variables)
    validated = _validate(on_device, fit.spec, variables, fit.validation)
    return End(step, variables, logits, _measure(on_device, logits), validated)


def _measure(on_device: DeviceData, logits: np.ndarray) -> Mapping[str, Any]:
    """The metrics of a fit on the test set, from its outputs for it."""
    return evaluate.measure(on_device.objective, logits, np.asarray(on_device.task.test.targets))


def _test_score(on_device: DeviceData, logits: np.ndarray) -> float | None:
    """The primary metric of a fit on the test set, from its outputs for it; None where they are not finite."""
    return evaluate.score(on_device.objective, logits, np.asarray(on_device.task.test.targets))


def score_column(primary: Metric) -> str:
    """What the primary metric is called in the curves."""
    return "accuracy" if primary.name == "accuracy" else "score"


def _curve_point(step: int, log: train.Log, spec: train.Spec, primary: Metric, score: float | None) -> dict[str, float]:
    """A point of the curves: means over the segment, and the primary metric at its end, "accuracy" or else "score"."""
    return {
        "step": step,
        "train_loss": float(log.loss.mean()),
        "train_penalty": float(log.penalty.mean()),
        "gradient_norm": float(log.gradient_norm.mean()),
        score_column(primary): float("nan") if score is None else score,
        **{f"train_penalty_{i}_{term.name}": float(log.terms[i].mean()) for i, term in enumerate(spec.penalties)},
    }


def _validate(
    on_device: DeviceData, spec: train.Spec, variables: Params | None, validation: np.ndarray
) -> Mapping[str, Any] | None:
    """Metrics of one fit on the examples held out of its training; None where there are none."""
    if not len(validation):
        return None
    what = f"the validation examples of {on_device.task.name}"
    inputs = evaluate.held(on_device.task.train, on_device.execution, validation, what)
    stacked = jax.tree.map(lambda leaf: leaf[None], variables)
    forward, batch = train.forward(spec.model, spec.merge), on_device.execution.evaluation_batch
    logits = evaluate.logits(forward, stacked, inputs, len(validation), batch=batch)()[0]
    return evaluate.measure(on_device.objective, logits, np.asarray(on_device.task.train.targets)[validation])


def _fisher(on_device: DeviceData, fit: PreparedFit, outcome: Outcome) -> Params:
    """The Fisher information of a fit on its training examples."""
    rows = np.unique(fit.trial.order(0, len(fit.trial.rates)))
    spec = fit.spec
    examples = (on_device.train, rows[rows >= 0], spec.merge)
    information = gradients.mean_squared_gradient(spec.model, spec.loss, *examples, state=outcome.model_state)
    return information(outcome.params)


# ---- What is left of a group


def _leave(
    folder: Path,
    group: Sequence[PreparedFit],
    outcomes: Sequence[Outcome],
    on_device: DeviceData,
    about: Mapping[str, Any],
    fishers: Sequence[Params],
) -> None:
    """Write everything of a group, its results last and together: only then it is done.

    A checkpoint a strategy and label budget, with the Fisher information of each fit if there are `fishers`, and the
    ordinary parameters of each if the strategy merges what it added; `about` is what the checkpoints say of themselves.
    """
    goal, task = on_device.objective, on_device.task
    results = [_measured(on_device, fit, outcome) for fit, outcome in zip(group, outcomes, strict=True)]
    for rows in _by_cell(results):
        name_of_group = plan.group_name(results[row].key for row in rows)
        place = folder / "checkpoints" / f"{plan.file_name(results[rows[0]].strategy)}-{name_of_group}"
        shutil.rmtree(place, ignore_errors=True)
        trees: dict[str, Params] = {}
        for row in rows:
            name, best, merge = results[row].name, outcomes[row].record.best, group[row].merge
            params, model_state = outcomes[row].params, outcomes[row].model_state
            trees |= {name: batch_stats.join(params, model_state)}
            trees |= {f"{name}.best": best[2]} if best else {}
            trees |= {f"{name}.fisher": fishers[row]} if fishers else {}
            trees |= {f"{name}.{end}": of_end.variables for end, of_end in outcomes[row].ends.items()}
            trees |= {f"{name}.merged": batch_stats.join(_merged(merge, params), model_state)} if merge else {}
            results[row] = replace(results[row], checkpoint=f"checkpoints/{place.name}")
        in_checkpoint = {
            result.name: {
                **{"seed": result.seed, "accuracy": result.test_accuracy, "steps": result.steps},
                **({} if result.metric is None else {"score": result.test_score, "metric": result.metric}),
            }
            for result in (results[row] for row in rows)
        }
        checkpoint.save(place, trees, {**about, "fits": in_checkpoint})
    for row, outcome in enumerate(outcomes):
        name = results[row].name
        test = (np.asarray(task.test.targets), task.test.groups)
        predictions, sha256 = metrics.write_predictions(folder, name, goal, outcome.logits, *test)
        metrics.write_curves(folder, name, outcome.record.curve)
        for number, mask in enumerate(outcome.masks):
            masks.save(mask, directory.make_folder(folder / "masks") / f"{name}-phase{number}")
        ends = {
            end: {"step": of_end.step, **fields_of(goal, of_end.test, of_end.validation)}
            | dict(
                zip(
                    ("predictions", "predictions_sha256"),
                    metrics.write_predictions(folder, f"{name}.{end}", goal, of_end.logits, *test),
                    strict=True,
                )
            )
            for end, of_end in outcome.ends.items()
        }
        masks_sha256 = directory.masks_digest(folder, name, len(outcome.masks))
        results[row] = replace(
            results[row],
            predictions=predictions,
            predictions_sha256=sha256,
            masks_sha256=masks_sha256,
            ends=ends or None,
        )
    directory.add(folder, results)


def _merged(merge: Callable[[Params], Params], params: Params) -> Params:
    """The ordinary parameters in NumPy; a leaf that the merge left alone is the very array of `params`."""
    known = dict(paths.items(params))

    def kept(path: str, leaf: np.ndarray) -> np.ndarray:
        return known[path] if path in known and np.array_equal(known[path], leaf) else leaf

    return paths.each(kept, jax.tree.map(np.asarray, merge(params)))


def _measured(on_device: DeviceData, fit: PreparedFit, outcome: Outcome) -> Result:
    """A fit with what training it gave, but for the places of its files."""
    record, test, validation = outcome.record, outcome.test, outcome.validation
    goal, targets = on_device.objective, np.asarray(on_device.task.test.targets)
    metric, best = to_record(goal.metrics[0]), record.best
    of_primary: dict[str, Any] = {
        f"best_validation_{'accuracy' if metric is None else 'score'}": best[1] if best else None
    }
    diverged = record.diverged is not None
    if diverged and metric is not None:
        constant = measures.constant(goal.kind, targets, goal.num_outputs)
        of_primary["majority_share"] = measures.value(goal.metrics[0], constant, targets)
    last = {name: value if np.isfinite(value) else None for name, value in record.curve[-1].items()}
    terms = {name: value for name, value in last.items() if name.startswith("train_penalty_")}
    return replace(
        fit.result,
        **_counts(outcome.params, outcome.masks),
        **fields_of(goal, test, validation),
        train_loss=last["train_loss"],
        train_penalty=last["train_penalty"],
        penalties={name.removeprefix("train_penalty_"): value for name, value in terms.items()},
        best_step=best[0] if best else None,
        **of_primary,
        train_total=None if diverged else record.curve[-1]["train_loss"] + record.curve[-1]["train_penalty"],
        diverged=diverged,
        diverged_step=record.diverged,
        began=list(record.began) or None,
        stopped_step=record.stopped,
        seconds=round(record.seconds, 3),
        peak_bytes=record.peak_bytes,
        metric=metric,
    )


def fields_of(goal: Objective, test: Mapping[str, Any], validation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a result that say how good parameters are, from their metrics."""
    is_accuracy = to_record(goal.metrics[0]) is None
    scores = {"test_score": test["score"], "validation_score": validation["score"] if validation else None}
    return {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "calibration_error": test["calibration_error"],
        "calibration": test["calibration"],
        "per_class_accuracy": test["per_class_accuracy"],
        "confusion": test["confusion"],
        "validation_accuracy": validation["accuracy"] if validation else None,
        "validation_loss": validation["loss"] if validation else None,
        "metrics": test["metrics"],
        **({} if is_accuracy else scores),
    }


def _counts(params: Params, phases: Sequence[Mask]) -> dict[str, Any]:
    """How many numbers there are, in all and by leaf, and how many train in the phase that trains most."""
    most = max((masks.table(params, mask) for mask in phases), key=lambda rows: sum(row.trained_size for row in rows))
    return {
        "trained_parameters": sum(row.trained_size for row in most),
        "total_parameters": sum(row.size for row in most),
        "leaves": [[row.path, row.size, row.trained_size] for row in most],
    }


def _by_cell(results: Sequence[Result]) -> list[list[int]]:
    """Which results are of one strategy with one set of options at one label budget, in order."""
    rows: dict[str, list[int]] = {}
    for row, result in enumerate(results):
        cell = [result.strategy, result.options, result.train_examples]
        rows.setdefault(json.dumps(cell, default=str), []).append(row)
    return list(rows.values())
