"""What is trained: the fits that the settings ask for, checked, each with the key of all that decides its bits.

`prepare` reads an `Experiment`, `planned` names its fits; `experiments.runs.fit` trains them.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import budgets, command_line, console, directory, process, sources
from experiments.runs.settings import MOST_STEPS, Recipe, Settings, named_recipes_of
from experiments.runs.sources import Source, Trained
from tljax import (
    augment,
    batch_stats,
    checkpoint,
    data,
    initialization,
    masks,
    models,
    objective,
    optimizer,
    optimizers,
    paths,
    penalties,
    plugins,
    schedules,
    seeds,
    switches,
    train,
)
from tljax.data import draw
from tljax.data.files import NO_PIXELS
from tljax.data.images import OTHER_CHANNELS
from tljax.initialization import Initialization, Look, Start
from tljax.low_rank import LowRank
from tljax.models import randomness
from tljax.study import summary
from tljax.study.results import Result
from tljax.train import flops, vectorize
from tljax.train.step import state_modes
from tljax.types import END_NAMES, SELECTED_END, Batch, Context, InputError, Method, Model, Objective, Params, Task

# ---- A strategy, as the settings name it


class NamedStrategy(NamedTuple):
    """A strategy as the flags name it."""

    label: str
    """Its name, if the flags give it one; else with its options: 'last_k:k=2'."""
    name: str
    options: Mapping[str, Any]
    method: Method
    code: str
    """Digest of its files: what an edit changes."""
    spec: str = ""
    """What stands after NAME= if the flags give it a name, else "": a line of results keeps both."""


def label_in_results(strategy: NamedStrategy) -> str:
    """What tables and verdicts call a strategy, by the line of results that a fit of it will have."""
    options, spec = strategy.options, strategy.spec or None
    return summary.label(Result(name="", target="", strategy=strategy.name, options=options, spec=spec, seed=0))


def read_strategies(texts: Sequence[str]) -> tuple[NamedStrategy, ...]:
    """The strategies of `--strategies`, with scratch among them: a number without it says nothing about transfer."""
    return tuple(map(read_strategy, texts if "scratch" in texts else ("scratch", *texts)))


def read_strategy(text: str) -> NamedStrategy:
    """One strategy of `--strategies`."""
    method, options = plugins.method(text)
    given_name, text = plugins.named(text)
    if given_name:
        return NamedStrategy(given_name, given_name, options, method, method.code, text)
    spec = plugins.parse(text)
    name = ":".join(map(plugins.quoted, (spec.name, *spec.words)))
    label = ":".join([name, *(f"{key}={value}" for key, value in spec.options.items())])
    return NamedStrategy(label, name, options, method, method.code)


def refuse_without_source(strategies: Sequence[NamedStrategy], model: Model) -> None:
    """Raise InputError for a strategy that keeps something of a source, where there is none."""
    stages = models.names(model)
    for strategy in strategies:
        redrawn = _call_of(strategy, "reinit", initialization.redrawn, strategy.method, strategy.options, stages)
        if set(redrawn) != set(stages):
            raise InputError(
                f"strategy '{strategy.label}' needs a source: give --source=NAME or --source_checkpoint=DIR"
            )


def _call_of(strategy: NamedStrategy, part: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of a strategy's file; what it raises becomes one line that says whose it is, and where."""
    what = f"{part} of strategy '{strategy.label}'" if part else f"strategy '{strategy.label}'"
    try:
        with switches.guarded(what):
            result = function(*arguments, **options)
    except (KeyboardInterrupt, process.Stopped):
        raise
    except InputError as error:
        grafted_alone = part == "reinit or adapt" and not (strategy.method.reinit or strategy.method.adapt)
        raise error if grafted_alone else _with_name(strategy, error) from error
    except BaseException as error:  # of whatever class: somebody may have made one
        raise InputError(
            f"{what} fails: {plugins.describe(error, _of_part(strategy, part, function, error))}"
        ) from error
    if result is None:
        raise InputError(f"{what} returned None: return {_RETURNS.get(part, 'a mask')}")
    return result


def _of_part(strategy: NamedStrategy, part: str, function: Any, error: BaseException) -> Any:
    """The function of a strategy's file that a call of `part` was of, where `function` may be tljax's around it."""
    method = strategy.method
    if part == "reinit or adapt":  # the one that the error names, where it was not entered
        both = [each for each in (method.reinit, method.adapt) if each]
        named = [each for each in both if f"{getattr(each, '__name__', '')}()" in plugins.words(error)]
        return [*named, *both, method.strategy][0]
    if part in ("", "reinit", "merge"):
        return {"": method.strategy, "reinit": method.reinit, "merge": method.merge}[part] or method.strategy
    return function


_RETURNS = {
    "until": "whether the phase is over",
    "finish": "a dict {name: parameters}",
    "left_out": "a list of paths, or []",
    "merge": "ordinary parameters",
}
"""What a function of a strategy's file gives, if not a mask."""


def _with_name(strategy: NamedStrategy, error: InputError) -> InputError:
    """An error of a function of a strategy's file, naming the strategy unless it does."""
    text, name = str(error), strategy.name.partition(":")[0]
    if f"'{strategy.label}'" in text or f"'{name}'" in text or text.startswith(f"{name}:"):
        return error
    return InputError(f"strategy '{strategy.label}': {text}")


def left_out(strategy: NamedStrategy, start: Start, model: Model) -> list[str]:
    """The paths of leaves that a strategy was to treat and cannot, as its module's `left_out` says."""
    function = strategy.method.left_out
    if function is None:
        return []
    context = initialization.shown(Context(models.names(model), fresh=start.fresh, contracted=start.contracted))
    options = plugins.taken(function, strategy.options)
    return list(_call_of(strategy, "left_out", function, initialization.writable(start.params), context, **options))


def merged(start: Start) -> list[str]:
    """The paths of the adapted kernels that are merged before each step, since their stages contract with no others."""
    if start.factored is None:
        return []
    form = jax.eval_shape(start.factored, start.params)
    leaves = jax.tree_util.tree_leaves_with_path(form, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    adapted = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if isinstance(leaf, LowRank)
    ]
    return [path for path in adapted if not start.contracted.get(path)]


# ---- An experiment


class Experiment(NamedTuple):
    """All that a run needs, read and checked before anything is trained or written."""

    settings: Settings
    source: Source | None
    target: Task
    model: Model
    strategies: tuple[NamedStrategy, ...]
    execution: train.Execution
    draw: int | None = None
    """Where draws of labels are crossed with seeds, the one of its fits, which its settings pin."""


def prepare(
    settings: Settings, execution: train.Execution, only: bool = False, stand_ins: Mapping[int, int] | None = None
) -> Experiment:
    """Read everything that the settings name, and raise InputError for what cannot be trained.

    Scratch is added to the strategies unless `only` those that are named are to be trained. `stand_ins` has {seed: seed
    of the source in --source_checkpoint that it starts from} of seeds without a source of their own.
    """
    if settings.target is None:
        raise InputError("--target is not given: name the data set to transfer to, such as --target=fashion_mnist_10k")
    if settings.source and settings.source_checkpoint:
        raise InputError("--source and --source_checkpoint are both given: keep one")
    sources.refuse_rules(settings)
    strategies = tuple(map(read_strategy, settings.strategies)) if only else read_strategies(settings.strategies)
    source = None
    if settings.source_checkpoint:
        source = sources.from_checkpoint(settings, stand_ins)
    elif settings.source:
        source = source_from_data(settings)
    target = load_task(settings, settings.target, settings.image_shape or (source.shape if source else None))
    shape = example_shape(target)
    if source and shape != source.shape:
        shapes = f"{sources.shown_shape(shape)}, the source {sources.shown_shape(source.shape)}"
        remedy = f"; leave out --image_shape, or {sources.positions_remedy(settings.source_checkpoint, source)}"
        raise InputError(
            f"target '{target.name}' has shape {shapes}: features must agree{remedy if settings.image_shape else ''}"
        )
    model = settings.build_model(target.outputs, settings.recipe)
    require_outputs(settings, model, target)
    if source is None:
        refuse_without_source(strategies, model)
    terms, _ = penalties.read(settings.recipe.penalty)
    if source and not source.fisher and (names := [term.name for term in terms if "fisher" in term.needs]):
        raise InputError(
            f"--penalty={names[0]} needs the source's Fisher information: train the source with --save_fisher"
        )
    for fault in model_faults(settings, model, shape):
        execution.on_message(fault)
    experiment = Experiment(settings, source, target, model, strategies, execution)
    require_shared_microbatches(settings, execution)
    names_of_ends = {}
    for strategy, start in first_starts(experiment):
        for budget in settings.train_examples:
            check_recipe(settings.recipe, budget, target, start)
        if start.finish:
            selected = [SELECTED_END] if settings.recipe.validation else []
            names_of_ends[strategy.label] = [*start.finish(start.params), *selected]
    require_end(settings.verdict_of, names_of_ends)
    _try_augment(settings.recipe, target)
    if settings.augment_views:
        _flagged("", "augment_views", lambda: _check_views(settings.recipe, target))
    if not only and "scratch" not in settings.strategies:
        console.say("scratch is added: what it reaches with the same budget is what transfer must beat")
    return experiment


def require_shared_microbatches(settings: Settings, execution: train.Execution) -> None:
    """Raise InputError for microbatches that the devices which share a batch do not divide."""
    recipes = {"": settings.recipe, "source_": settings.source_recipe} if settings.source else {"": settings.recipe}
    for prefix, recipe in recipes.items():
        if size := recipe.microbatch:
            devices = len(execution.devices) if execution.mode == "pmap" else execution.devices_per_batch
            _flagged(prefix, "microbatch", functools.partial(train.check_microbatch, size, recipe.batch_size, devices))


def load_task(settings: Settings, name: str, shape: Any) -> Task:
    """The data set of a name, from where the settings say that data sets are.

    Its pixels are brought to `shape`, that of --image_shape or of what it goes with; features, which have other shapes
    than [height, width, channels], stay as they are.
    """
    is_image = isinstance(shape, tuple) and (len(shape) == 3 or shape == settings.image_shape)
    image_shape = shape if shape and is_image else None
    try:
        return data.load(
            name,
            data_dir=settings.data_dir,
            manual_dir=settings.manual_dir,
            image_shape=image_shape,
            resize=settings.resize,
            streamed=settings.data == "streamed",
            say=console.say,
        )
    except InputError as error:
        is_first = name == settings.source or not (settings.source or settings.source_checkpoint)
        if settings.image_shape and is_first and str(error).endswith(NO_PIXELS):
            raise InputError(f"{error}, or leave out --image_shape") from error
        if settings.image_shape and OTHER_CHANNELS in str(error):
            fits = settings.image_shape[-1] in (1, 3)
            remedy = "leave out --image_shape" if fits else "1 or 3 channels with --image_shape"
            raise InputError(f"{error}, or {remedy}") from error
        raise


def example_shape(task: Task) -> models.Shape:
    """The inputs of one example: the shape of pixels or float features, else a tree of `jax.ShapeDtypeStruct`."""
    spec = task.train.spec
    is_shape = isinstance(spec, jax.ShapeDtypeStruct) and spec.dtype in (np.uint8, np.float32)
    return tuple(spec.shape) if is_shape else spec


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """{data set: its fingerprint}."""
    tasks = (experiment.source, experiment.target)
    return {task.name: task.fingerprint for task in tasks if task and task.fingerprint}


def title_and_notes(settings: Settings, source: Source | None, target: Task) -> tuple[str, list[str]]:
    """What fits of one source, or none, and one target are called, and what every table must say of their data."""
    notes = [f"{what}: {task.note}" for what, task in (("source", source), ("target", target)) if task and task.note]
    name = f"{source.name if source else 'no source'} -> {target.name}"
    return name, [*notes, *budgets.notes(settings.train_examples, target, settings.recipe.validation)]


def source_from_data(settings: Settings) -> Source:
    """The source that `--source` names, which is to be trained in the run directory unless it is there."""
    task = source_task(settings)
    planned = planned_sources(settings, task)
    recipe = settings.source_recipe
    return Source(
        task.name,
        task.classes,
        example_shape(task),
        {seed: result.key for seed, result in planned.items()},
        task.fingerprint,
        settings.save_fisher,
        task.note,
        count_steps(recipe, len(draw_examples(recipe, "all", task, 0)[0])),
        next(iter(planned.values())).recipe or "",
        task=task,
        kind=task.kind,
        outputs=task.outputs,
    )


def source_task(settings: Settings) -> Task:
    """The task of `--source`; raises InputError for settings under which it cannot be learnt."""
    task = load_task(settings, settings.source or "", settings.image_shape)
    model = settings.build_model(task.outputs, settings.source_recipe)
    require_outputs(settings, model, task)
    params, model_state = batch_stats.split(models.abstract(model, example_shape(task)))
    start = Start(params, ((0.0, None),), fresh=None)
    if settings.source_recipe.microbatch and model_state:
        stage = next(iter(model_state))
        raise InputError(
            f"stage '{stage}' normalises by the whole batch while the source is trained: leave it at 0",
            field="source_microbatch" if settings.target else "microbatch",
            value=settings.source_recipe.microbatch,
        )
    # As dicts, since dataclasses that share a nan differ from Python 3.13 on.
    is_own = vars(settings.source_recipe) != vars(settings.recipe)
    terms, _ = penalties.read(settings.source_recipe.penalty)
    if names := [term.name for term in terms if "fisher" in term.needs]:
        flag = "--source_penalty" if is_own else "--penalty"
        remedy = "another --penalty, or none"
        if settings.target:
            remedy = "--source_penalty= for the source's own fit" + ", and --save_fisher" * (not settings.save_fisher)
        raise InputError(
            f"{flag}={settings.source_recipe.penalty} is the source's too, and {names[0]} holds a fit "
            f"to what another's Fisher information says, which nobody has before a source is trained: give {remedy}"
        )
    prefix = "source_" if is_own else ""
    try:
        _check_objective(settings.source_recipe, task, prefix)
    except InputError as error:
        text = str(error)
        if settings.target and not is_own:
            text += f"; it is the source's too ('{task.name}'): --source_NAME=VALUE gives its fit its own"
        raise InputError(text) from error
    check_recipe(settings.source_recipe, "all", task, start, prefix)
    _try_augment(settings.source_recipe, task, prefix)
    return task


# ---- How the fits start


def streams(settings: Settings, seed: int, draw: int | None = None) -> seeds.Seeds:
    """The four streams of randomness of a seed; those that the settings pin are the same for all seeds.

    `draw` is that of the labels, where draws are crossed with seeds and the settings do not pin it.
    """
    return seeds.streams(
        seed,
        source=settings.source_seed,
        head=settings.head_seed,
        order=settings.order_seed,
        draw=settings.draw_seed if draw is None else draw,
    )


def source_streams(settings: Settings, seed: int) -> seeds.Seeds:
    """The four streams of the fit that trains the source of a seed."""
    return seeds.streams(seeds.streams(seed, source=settings.source_seed).source)


def initialization_of(experiment: Experiment, seed: int, trained: Trained | None = None) -> Initialization:
    """What every strategy starts from under one seed, with a draw in place of a source that is still to be trained.

    Raises InputError where the `trained` parameters are of another model.
    """
    settings, model, source, target = experiment.settings, experiment.model, experiment.source, experiment.target
    shape = example_shape(target)
    key = jax.random.key(streams(settings, seed).head)
    params = models.init(settings.build_model(source.outputs), key, shape) if source else None
    if trained:
        params = checkpoint.unflatten(trained.flat, params)
    drawn, own_key = models.init(model, key, shape), jax.random.fold_in(key, len(model))
    head, fisher = head_of(settings, source, target), trained.fisher if trained else None
    contracted = functools.partial(models.contracted, model, shape)
    return Initialization(models.names(model), params, drawn, own_key, head, fisher, settings.batch_stats, contracted)


def state_lines(start: Start, model: Model) -> list[str]:
    """What becomes of the state of each stage that has one, a line for each phase; [] of a model without."""
    lines = []
    for _, mask in start.phases:
        modes = {}
        if start.model_state and not masks.is_strategy(mask):
            modes = state_modes(start.batch_stats, start.params, start.model_state, mask)
        stages: dict[str, list[str]] = {}
        for stage in filter(modes.__contains__, models.names(model)):
            stages.setdefault(modes[stage], []).append(stage)
        parts = [f"{mode} in {', '.join(of_mode)}" for mode, of_mode in stages.items()]
        lines.append(f"running averages: {'; '.join(parts)}" if parts else "")
    return lines if any(lines) else []


def head_of(settings: Settings, source: Source | None, target: Task) -> str:
    """What becomes of the head: 'copy', 'fresh' or 'zero', as --head says; under 'auto' by the names of the classes.

    Of tokens without names the size of the vocabulary decides; a head of values without names is always fresh.
    """
    if settings.head != "auto":
        return settings.head
    if source is None or source.kind != target.kind:
        return "fresh"
    # Tokens without names are numbers of one vocabulary where there are as many; values without names are any.
    named = source.classes or (source.outputs if source.kind == "tokens" else None)
    return "copy" if named and named == (target.classes or target.outputs) else "fresh"


def start_of(strategy: NamedStrategy, initial: Initialization, look: Look | None = None) -> Start:
    """Graft, adapt, ask the strategy, and lint; raises InputError for a mask that cannot be trained."""
    call, name = functools.partial(_call_of, strategy), f"strategy '{strategy.label}'"
    return initialization.start(strategy.method, strategy.options, initial, look, name, call)


def first_starts(experiment: Experiment) -> Iterator[tuple[NamedStrategy, Start]]:
    """How every strategy starts under the first seed, from a source that is drawn and not trained."""
    first = initialization_of(experiment, experiment.settings.seeds[0])
    for strategy in experiment.strategies:
        yield strategy, start_of(strategy, first)


def require_end(name: str, of_finish: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where verdicts cannot be of an end; `of_finish` has {strategy: names that its `finish` gives}.

    A strategy without `finish` has the ends of every fit alone: where verdicts are of what others' `finish` gives, it
    is judged by its last step.
    """
    if name in END_NAMES:
        return
    if not of_finish:
        remedy = f"none of the strategies has a `finish`: give one of {', '.join(END_NAMES)}"
        raise InputError(f"--verdict_of={name}: {remedy}")
    for label, names in of_finish.items():
        if name not in names:
            raise InputError(f"--verdict_of={name}: strategy '{label}' has no such end{plugins.nearest(name, names)}")


# ---- What a recipe comes to


def objective_of(task: Task, recipe: Recipe) -> Objective:
    """What a recipe minimises and measures of a task; raises InputError for what does not fit its targets."""
    return objective.for_task(task, recipe.loss, recipe.metric, recipe.primary)


def require_outputs(settings: Settings, model: Model, task: Task) -> None:
    """Raise InputError for a head that gives something else than the targets of a task need."""
    shape = example_shape(task)
    inputs = models.batch_of(shape, 2)
    length = task.train.targets.shape[1] if task.kind == "tokens" else 1
    wanted, _ = objective.example(task.kind, task.outputs, 2, length)
    outputs = jax.eval_shape(functools.partial(models.apply, model), models.abstract(model, shape), inputs)
    if outputs.shape != wanted.shape:
        axes = {"tokens": "[batch, length, vocabulary]"}.get(task.kind, f"[batch, {task.kind}]")
        raise InputError(
            f"model '{settings.model}': its head, stage '{models.names(model)[-1]}', gives {list(outputs.shape)} of 2 "
            f"inputs {sources.shown_shape(shape)}: let it give {axes}, here {list(wanted.shape)}"
        )


def recipe_values(recipe: Recipe, task: Task) -> dict[str, Any]:
    """{flag: value} of a recipe as keys have it: without what is neutral, and with what 'auto' stands for on a task."""
    text = augment.resolved(recipe.augment, task.train.spec)
    in_effect = dataclasses.replace(recipe.in_effect(), augment=text)
    return {**_beyond_neutral(in_effect), "loss": objective.resolved(recipe.loss, task.kind)}


def check_recipe(recipe: Recipe, budget: str, task: Task, start: Start, prefix: str = "") -> None:
    """Raise InputError for what of a recipe cannot be trained, before anything is trained or written.

    `prefix` is 'source_' where the flags are those of the source's fit.
    """
    spec, numbers = _flagged(prefix, "optimizer", recipe.optimizer_spec)
    # Globs are held against the leaves where nothing decays too: a slip in them is one there as well.
    rule_of_decay = spec.decay if recipe.decay in optimizers.DECAY_RULES else recipe.decay
    _flagged(prefix, "decay", lambda: optimizers.require_decay(rule_of_decay, start.params))
    loss = _check_objective(recipe, task, prefix)
    terms, weights = _flagged(prefix, "penalty", lambda: penalties.read(recipe.penalty))
    fresh = dict(paths.items(start.fresh)) if start.fresh is not None else {}
    for term, numbers_of_term in zip(terms, weights, strict=True):
        _flagged(prefix, "penalty", functools.partial(paths.require_globs, start.params, (term.on,)))
        tried = functools.partial(penalties.require_scalar, term, numbers_of_term, start.params, fresh)
        _flagged(prefix, "penalty", tried, term.function)
    subset, _ = _flagged(
        prefix,
        "train_examples" if not budget.startswith("all") else "validation",
        lambda: draw_examples(recipe, budget, task, 0),
    )
    total = _flagged(prefix, "batch_size", lambda: count_steps(recipe, len(subset)))
    _flagged(prefix, "microbatch", lambda: train.check_microbatch(recipe.microbatch, recipe.batch_size))
    _flagged(prefix, "microbatch", lambda: _refuse_whole_batches(recipe, start))
    phases_at_steps(start.phases, total)
    require_validation(recipe, start)
    _flagged(prefix, "schedule", lambda: learning_rates(recipe, total))
    outputs, targets = objective.example(task.kind, task.outputs, 2)
    values = _flagged(prefix, "loss", lambda: jax.eval_shape(loss, outputs, targets), loss)
    if getattr(values, "shape", None) != (2,):
        raise InputError(f"--{prefix}loss={recipe.loss} does not give a number an example: see --helpfull")
    _flagged(prefix, "optimizer", lambda: _try_optimizer(spec, numbers), optimizers.function_of(spec.name))
    for schedule in (of_phase.schedule for of_phase in start.rules if of_phase.schedule is not None):
        step = spec, numbers, schedule, start.params
        _flagged(prefix, "optimizer", functools.partial(_try_moments, *step))
        _flagged("", "strategies", functools.partial(_try_schedule, *step), schedule.choose)
    _flagged(prefix, "augment", lambda: _check_augment(recipe, task, loss))


def _try_moments(spec: optimizers.OptimizerSpec, numbers: Mapping[str, float], schedule: Any, params: Any) -> None:
    """Raise InputError where a schedule of masks sees moments that the optimizer's state lacks."""

    def require(params: Any) -> None:
        optimizer.require_moments(schedule, params, optimizers.build(spec, 0.1, numbers).init(params))

    jax.eval_shape(require, jax.tree.map(jnp.asarray, masks.split(params, schedule.scope)[0]))


def _try_schedule(spec: optimizers.OptimizerSpec, numbers: Mapping[str, float], schedule: Any, params: Any) -> None:
    """Raise InputError for a schedule of masks that gives what it must not, by the shapes of two steps."""

    def step(params: Any) -> Any:
        tx = optimizer.scheduled(optimizers.build(spec, 0.1, numbers), schedule)
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params, loss=jnp.zeros(()))
        return state

    jax.eval_shape(step, jax.tree.map(jnp.asarray, params))


def _refuse_whole_batches(recipe: Recipe, start: Start) -> None:
    """Raise InputError for microbatches in a phase in which a stage normalises by the whole batch."""
    for _, mask in start.phases:
        if recipe.microbatch and start.model_state and not masks.is_strategy(mask):
            modes = state_modes(start.batch_stats, start.params, start.model_state, mask)
            train.refuse_microbatch(recipe.microbatch, [stage for stage, mode in modes.items() if mode == "tracked"])


def augmentations(recipe: Recipe, task: Task) -> tuple[augment.Augmentation, ...]:
    """What changes the batches of a task at random while it is learnt."""
    return augment.read(augment.resolved(recipe.augment, task.train.spec), task.outputs)


def augment_notes(recipe: Recipe, task: Task) -> list[str]:
    """How the training examples of a task are augmented, in a line; none where they are not."""
    text = augment.resolved(recipe.augment, task.train.spec)
    if text:
        return [f"augmented in training: {text}; validation and test examples of '{task.name}' stay as they are"]
    return [f"not augmented: the inputs of '{task.name}' are no pixels"] if recipe.augment.strip() == "auto" else []


def _example(task: Task) -> tuple[Any, Any]:
    """(inputs, targets): shapes and dtypes of one training example of a task."""
    targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), task.train.targets)
    return task.train.spec, targets


def _check_views(recipe: Recipe, task: Task) -> None:
    """Raise InputError where there is nothing that views of a task's examples could be of."""
    if not (every := augmentations(recipe, task)):
        raise InputError("there is nothing to augment: give `augment=crop,flip`, or leave the views out")
    augment.require_views(every, *_example(task))


def _check_augment(recipe: Recipe, task: Task, loss: objective.Loss) -> None:
    """Raise InputError for augmentations that do not fit a task, or that mix targets for a loss of whole labels."""
    every = augmentations(recipe, task)
    augment.check(every, *_example(task))
    if mixing := [augmentation.text for augmentation in every if augmentation.mixes]:
        objective.check_mixed(objective.resolved(recipe.loss, task.kind), loss, task.outputs, mixing[0])
        if recipe.class_weights != "none":
            raise InputError(f"{mixing[0]} mixes labels, and class weights are of whole ones: leave one of them out")


def _try_augment(recipe: Recipe, task: Task, prefix: str = "") -> None:
    """Raise InputError for augmentations that make something of the first training examples that cannot be learnt."""
    if every := augmentations(recipe, task):
        rows = np.arange(min(8, len(task.train)))
        targets = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), task.train.targets)
        inputs = jax.tree.map(jnp.asarray, task.train.inputs(rows))
        batch = Batch(inputs, targets, jnp.ones(len(rows), jnp.float32))
        _flagged(prefix, "augment", lambda: augment.try_on(every, batch, task.outputs))


def require_validation(recipe: Recipe, start: Start) -> None:
    """Raise InputError for phases that look at a validation split, where there is none."""
    if any(rule.until or rule.restore for rule in start.rules) and not recipe.validation:
        raise InputError(
            "a phase has `until` or `restore`, which look at a validation split: give --validation=0.1, say"
        )


def _check_objective(recipe: Recipe, task: Task, prefix: str = "") -> objective.Loss:
    """The loss of a recipe; raises InputError for a loss, metrics and weights that do not fit a task's targets."""
    name = objective.resolved(recipe.loss, task.kind)
    loss = _flagged(prefix, "loss", lambda: objective.loss(name, task.kind))
    _flagged(prefix, "metric", lambda: objective_of(task, recipe))
    smoothing = (name, recipe.label_smoothing, task.kind)
    try:
        _flagged(prefix, "label_smoothing", lambda: objective.check_smoothing(*smoothing))
    except InputError as error:
        if names := named_recipes_of(recipe, "label_smoothing"):
            raise InputError(f"{error} beside --{prefix}recipe={names[0]}, which gives it") from error
        raise
    if recipe.class_weights != "none" and task.kind != "classes":
        raise InputError(
            f"--{prefix}class_weights={recipe.class_weights}: it is of classes, the targets are {task.kind}"
        )
    return loss


def _flagged(prefix: str, flag: str, attempt: Callable[[], Any], function: Callable[..., Any] | None = None) -> Any:
    """What `attempt` returns; whatever it raises becomes an InputError that names the flag.

    The error's place is in the file of the `function` that the flag names, if that is given.
    """
    try:
        with switches.guarded(f"what --{prefix}{flag} names"):
            return attempt()
    except InputError as error:
        text = command_line.in_flags(error, prefix)
        raise InputError(text if text.startswith("--") else f"--{prefix}{flag}: {text}") from error
    except Exception as error:
        place = plugins.describe(error, function)
        raise InputError(f"--{prefix}{flag} cannot be used as it is given: {place}") from error


def _try_optimizer(spec: optimizers.OptimizerSpec, numbers: Mapping[str, float]) -> None:
    """Trace one step on a small tree."""
    params = {name: jax.ShapeDtypeStruct((2,) * n, jnp.float32) for name, n in (("kernel", 2), ("bias", 1))}

    def step(params: Params) -> Params:
        tx = optimizers.build(spec, 0.1, numbers)
        return tx.update(params, tx.init(params), params)[0]

    jax.eval_shape(step, params)


def decays(recipe: Recipe, params: Params) -> Any:
    """The tree of bools that says which leaves weight decay touches; None of a recipe without weight decay."""
    spec, _ = recipe.optimizer_spec()
    return optimizers.decays(spec.decay, params) if optimizers.has_decay(spec) else None


def learning_rates(recipe: Recipe, total: int) -> np.ndarray:
    """The learning rate of each of `total` steps, float32 [total]."""
    return schedules.rates(recipe.schedule, recipe.learning_rate, recipe.warmup, total)


def count_steps(recipe: Recipe, examples: int) -> int:
    """How many steps a fit has; raises InputError for a batch larger than the data under --epochs."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.batch_size > examples:
        raise InputError(
            f"it is larger than the {examples} training examples: lower it, or give "
            "`steps=`, under which the order runs over one permutation after another",
            field="batch_size",
            value=recipe.batch_size,
        )
    total = recipe.epochs * -(-examples // recipe.batch_size)
    if total > MOST_STEPS:
        reason = f"that makes {total:,} steps: at most {MOST_STEPS:,} are trained"
        raise InputError(reason, field="epochs", value=recipe.epochs)
    return total


def curve_steps(recipe: Recipe, total: int) -> list[int]:
    """The steps at which the curves have a point: each epoch, or as many as --points under --steps."""
    points = min(recipe.epochs if recipe.steps is None else recipe.points, total)
    return [total * (i + 1) // points for i in range(points)]


def phases_at_steps(phases: Sequence[tuple[float, Any]], total: int) -> tuple[tuple[int, Any], ...]:
    """Phases by the step before which they begin: their fraction of all steps, to the nearest whole one.

    Raises InputError for two that begin at one step, and for one that begins at the end.
    """
    at = [round(fraction * total) for fraction, _ in phases]
    for (fraction, _), step, following in zip(phases, at, [*at, total][1:], strict=True):
        if step >= following:
            others = [start for start, _ in phases if start > fraction]
            what = f"and {others[0]:g} of training both begin" if others else "of training begins"
            raise InputError(
                f"the phase{'s' * bool(others)} at {fraction:g} {what} at step {step} of {total}: give more steps, or "
                f"set {'them further apart' if others else 'it earlier'}"
            )
    return tuple((step, mask) for step, (_, mask) in zip(at, phases, strict=True))


def draw_examples(recipe: Recipe, budget: str, task: Task, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) examples of a label budget under a seed of the draw, int32 each."""
    strata = draw.strata(task)
    labelled = draw.label_budget(seed, strata, budgets.total(budget, task))
    subset, validation = draw.validation_split(strata, labelled, recipe.validation)
    if not len(subset):
        raise InputError("it leaves no example to train on: lower it", field="validation", value=recipe.validation)
    return subset, validation


def model_faults(settings: Settings, model: Model, shape: models.Shape) -> list[str]:
    """What a model draws otherwise than its key says, a sentence each."""
    # The models of tljax draw nothing.
    sentences = randomness.faults(model, shape) if "." in plugins.parse(settings.model).name else []
    return [f"--model={settings.model}: {sentence}" for sentence in sentences]


def stages_with_dropout(settings: Settings, model: Model, shape: models.Shape) -> tuple[str, ...]:
    """The stages that keep their dropout while they are frozen, for inputs of one example's `shape`."""
    return randomness.stages(model, shape) if settings.frozen_dropout == "on" else ()


# ---- Which fits there are, and their identity


class PlannedFit(NamedTuple):
    """A fit that the settings ask for."""

    strategy: NamedStrategy
    budget: str
    seed: int
    result: Result
    """What is known of it before it is trained."""


def planned(experiment: Experiment) -> dict[str, PlannedFit]:
    """{key: fit} of all fits, in the order of the flags: strategies, budgets, seeds."""
    fits, many = {}, many_of(experiment)
    together = many == "vmap" and budgets_together(experiment)
    for strategy in experiment.strategies:
        for budget in experiment.settings.train_examples:
            for seed in budgets.seeds(budget, experiment.settings.seeds):
                result = _identified(experiment, strategy, budget, seed, many, together)
                fits[result.key] = PlannedFit(strategy, budget, seed, result)
    return fits


def _identified(
    experiment: Experiment, strategy: NamedStrategy, budget: str, seed: int, many: str, together: bool
) -> Result:
    """A fit that the settings ask for, by all that decides its bits; `many` is `many_of` the experiment, and `together`
    its `budgets_together`."""
    settings, source, target = experiment.settings, experiment.source, experiment.target
    fields: dict[str, Any] = {
        "source": source.name if source else None,
        "target": target.name,
        "strategy": strategy.name,
        "options": strategy.options,
        "seed": seed,
        "train_examples": budgets.total(budget, target),
    }
    fields |= {"spec": strategy.spec} if strategy.spec else {}
    fields |= {"draw": experiment.draw} if experiment.draw is not None else {}
    decisive = {
        "identity": source.identity[seed] if source else None,
        "fingerprint": target.fingerprint,
        "model": {"model": settings.model, "hidden": settings.hidden, "activation": settings.activation},
        "head": settings.head,
        "recipe": recipe_values(settings.recipe, target),
        "streams": {name: value for name, value in streams(settings, seed)._asdict().items() if name != "source"},
        "code": [strategy.code, *code_digests(settings.recipe, settings.model)],
        "many": _company(settings, many, together),
        **draws(settings, experiment.model, example_shape(target)),
        **{name: value for name, value in settings.beyond_neutral().items() if name != "batch_stats"},
        **states(experiment.model, example_shape(target), settings.batch_stats),
    }
    recipe = {name: value for name, value in decisive.items() if name not in ("identity", "streams", "many")}
    # What a source was does not matter to a fit from scratch: those beside several sources are alike.
    recipe |= {"source": source.recipe if source and strategy.name != "scratch" else None}
    if strategy.spec:  # a name hides them: fits of other options are not to stand in one row
        recipe |= {"strategy": [*plugins.parse(strategy.spec).words, strategy.options]}
    labels = settings.draw_seed if experiment.draw is None else "crossed"
    recipe |= {"pinned": [settings.source_seed, settings.head_seed, settings.order_seed, labels]}
    name = f"{strategy.label}-{fields['train_examples']}-seed{seed}"
    name += f"-draw{experiment.draw}" if experiment.draw is not None else ""
    return identify(name, fields, decisive, recipe)


def planned_sources(settings: Settings, task: Task) -> dict[int, Result]:
    """{seed: the fit that is to train its source}."""
    results = {}
    model, shape = settings.build_model(task.outputs), example_shape(task)
    many = many_of_source(settings, task)
    model_draws = {**draws(settings, model, shape), **states(model, shape, "auto")}
    for seed in settings.seeds:
        fields: dict[str, Any] = {
            "source": None,
            "target": task.name,
            "strategy": "pretrain",
            "options": {},
            "seed": seed,
            "train_examples": len(task.train.targets),
        }
        decisive = {
            "fingerprint": task.fingerprint,
            "model": settings.architecture(),
            "recipe": recipe_values(settings.source_recipe, task),
            "streams": source_streams(settings, seed)._asdict(),
            "fisher": settings.save_fisher,
            "code": code_digests(settings.source_recipe, settings.model),
            "many": _company(settings, many, False),
            **({"evaluation_batch": settings.evaluation_batch} if settings.evaluation_batch else {}),
            **model_draws,
        }
        recipe = {name: value for name, value in decisive.items() if name not in ("streams", "many")}
        results[seed] = identify(f"pretrain-{task.name}-seed{seed}", fields, decisive, recipe)
    return results


def identify(name: str, fields: Mapping[str, Any], decisive: Mapping[str, Any], recipe: Mapping[str, Any]) -> Result:
    """A fit that is to be trained, with the key of everything that decides its bits, and a name from both.

    The key is a digest of plain values under the names of settings, with the number of its format: no name of a class,
    no version and no setting at its neutral value is in it. `fields` are fields of the `Result`. `recipe` is what fits
    that differ in their seed alone have in common: its digest lets whoever reads the results refuse fits of two recipes
    in one cell of a table. Raises TypeError for a value that is not plain.
    """
    changed = {"switches": values} if (values := switches.changed()) else {}
    key = _digest({**fields, **decisive, **changed, "format": directory.FORMAT})
    digest = _digest({**recipe, **changed})[:16]
    return Result(name=f"{file_name(name)}-{key[:8]}", key=key, recipe=digest, **fields)


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of canonical JSON; raises TypeError for a value that is not plain, whose text its class may change."""
    return hashlib.sha256(json.dumps(_plain(record), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """None, a bool, a number or a text as it is, and lists and dicts of such with texts as keys; a tuple is a list."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping) and all(type(name) is str for name in value):
        return {name: _plain(part) for name, part in value.items()}
    raise TypeError(f"a fit's key takes plain values, and {value!r} is of {type(value).__name__}")


def _beyond_neutral(group: Any) -> dict[str, Any]:
    """{flag: value} of a group of flags, without those that have a neutral value and stand at it."""
    values = {f.name: (getattr(group, f.name), f.metadata.get("neutral")) for f in dataclasses.fields(group)}
    return {name: value for name, (value, neutral) in values.items() if neutral is None or value != neutral}


def draws(settings: Settings, model: Model, shape: models.Shape) -> dict[str, Any]:
    """What decides the bits of a fit whose model draws (dropout, noise), and of no other; {} for one that does not.

    Its number goes up when a key comes to reach more of a model, or other draws follow from it. Under pmap each device
    draws by itself, so their number counts too.
    """
    if "." not in plugins.parse(settings.model).name or not randomness.stages(model, shape):
        return {}  # the models of tljax draw nothing
    axes = [int(axis.partition(":")[2]) for axis in settings.mesh]
    devices = settings.devices or math.prod(axes) if settings.devices or axes else len(jax.local_devices())
    return {"draws": [2, *([devices] if settings.parallel == "pmap" else [])]}


def states(model: Model, shape: models.Shape, mode: str) -> dict[str, Any]:
    """What decides the bits of a fit whose model has a state, and of no other; {} for one that has none.

    Its number goes up when a mode comes to mean something else. Before there were modes all states were frozen.
    """
    return {"batch_stats": [1, mode]} if models.stateful(model, shape) else {}


def _company(settings: Settings, many: str, together: bool) -> list[Any]:
    """What of `train.Execution` and of the fits beside it decides a fit's bits.

    Side by side, each rounds as its company on one device does: that is of the seeds, of all label budgets where they
    are trained `together`, and of how many devices they are divided over. One device is not written.
    """
    beside: list[Any] = [*settings.seeds, *(settings.train_examples if together else ())] if many == "vmap" else []
    fits = len(settings.seeds) * (len(settings.train_examples) if together else 1)
    # Steps and masks may part a group, and the parts are divided over other devices than the whole. No more than one
    # device a fit is ever used, so the lesser number decides how each part of it is divided.
    devices = min(fits, _devices_of_fits(settings)) if many == "vmap" else 1
    beside += [{"devices": devices}] if devices > 1 else []
    return [settings.features_budget, settings.features_dtype, *beside]


def _devices_of_fits(settings: Settings) -> int:
    """How many devices, or groups of them that share batches, the fits of a group are divided over at most."""
    if settings.mesh:
        axes = dict(axis.split(":") for axis in settings.mesh)
        return int(axes.get("trial", 1))
    if settings.parallel == "pmap" or settings.distributed:
        return 1
    return settings.devices or len(jax.local_devices())


TOGETHER_BYTES = 2**28
"""Of the parameters and the logits of all fits of a strategy, up to which its label budgets are trained together."""


def budgets_together(experiment: Experiment) -> bool:
    """Whether the fits of a strategy are one group, whatever their label budgets.

    One executable then serves all of them, and the devices are idle once at its end and not at that of each budget. It
    is so as long as a group's states are small on the host and on the device. Under `--many=vmap` each budget is a
    group: there a fit's bits are its company's.
    """
    settings, target = experiment.settings, experiment.target
    if settings.many == "vmap" or len(settings.train_examples) == 1:
        return False
    shapes = jax.tree.leaves(models.abstract(experiment.model, example_shape(target)))
    of_fit = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes) + 4 * len(target.test.targets) * target.outputs
    return of_fit * len(settings.seeds) * len(settings.train_examples) <= TOGETHER_BYTES


def many_of(experiment: Experiment) -> str:
    """`--many` of the fits of an experiment: 'map', 'vmap', or 'auto' of a CPU, where a fit's bits are not its
    company's."""
    return _many(experiment.settings, experiment.model, experiment.target, experiment.settings.recipe)


def many_of_source(settings: Settings, task: Task) -> str:
    """`many_of` the fits that train a source on a task."""
    return _many(settings, settings.build_model(task.outputs), task, settings.source_recipe)


def _many(settings: Settings, model: Model, task: Task, recipe: Recipe) -> str:
    """What `auto` means on the device at hand, by its platform and the FLOPs of a step of the whole model.

    It is one for all strategies of a table, which has no two ways of rounding then. Under pmap there is one fit at a
    time.
    """
    platform = vectorize.platform_of(())
    if settings.many != "auto" or platform == "cpu":
        return settings.many
    if settings.parallel == "pmap":
        return "map"
    shape = example_shape(task)
    inputs = models.batch_of(shape, recipe.batch_size)
    forward = functools.partial(models.apply, models.unrolled(model))
    work = 3 * flops.count(forward, models.abstract(model, shape), inputs)
    return "vmap" if vectorize.is_quicker_side_by_side(work, platform) else "map"


def code_digests(recipe: Recipe, model: str) -> list[str]:
    """Digests of what the flags name outside tljax: an edit of such a file makes another fit."""
    plugs = ((model, "tljax.models", "model"), (recipe.loss, "optax", "loss"), (recipe.optimizer, "optax", "optimizer"))
    measures = [text for text in (*recipe.metric, recipe.primary) if text]
    return [
        *(plugins.outside_digest(*plug) for plug in plugs),
        *penalties.digests(recipe.penalty),
        *augment.digests(recipe.augment),
        *(plugins.outside_digest(text, "tljax.metrics", "metric") for text in measures),
    ]


def has_code_from_outside(experiment: Experiment) -> bool:
    """Whether the flags name functions outside tljax that training calls."""
    names = [plugins.parse(strategy.spec or strategy.name).name for strategy in experiment.strategies]
    return any("." in name for name in names) or any(
        code_digests(experiment.settings.recipe, experiment.settings.model)
    )


def group_name(keys: Iterable[str]) -> str:
    """A name of fits that are trained or kept together, from their keys: eight hexadecimal digits."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:8]


def file_name(text: str) -> str:
    """`text` as it can stand in a path."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)[-80:].strip("_.")
