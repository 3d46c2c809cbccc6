"""Fits: from a task, a model, a recipe and seeds to what is ready to train."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import budgets, flags
from experiments.runs.settings import MOST_STEPS, Recipe, Settings
from tljax import (
    __version__,
    evaluate,
    graft,
    objective,
    optimizers,
    paths,
    penalties,
    plugins,
    seeds,
    switches,
    train,
)
from tljax.data import draw
from tljax.models import randomness
from tljax.study.results import Result
from tljax.types import InputError, Mask, Model, Params, Task


class Arena(NamedTuple):
    """A task on the device, and the recipe by which a model learns it."""

    task: Task
    recipe: Recipe
    data: train.Data
    """The training examples."""
    test: train.Data
    """The test images, as `evaluate.padded` gives them."""
    execution: train.Execution


def arena(task: Task, recipe: Recipe, execution: train.Execution) -> Arena:
    """Put a task on the device, once for all its fits."""
    return Arena(
        task, recipe, train.load(task.train.images, task.train.labels), evaluate.padded(task.test.images), execution
    )


class Start(NamedTuple):
    """Where a fit begins."""

    params: Params
    phases: tuple[tuple[float, Mask | Callable[[Params], Mask]], ...]
    """(fraction of training, mask); a function is called with the parameters at that point. Empty where the strategy
    looks at data and there were none."""
    fresh: Mask
    """Which leaves were drawn anew."""
    plan: graft.Plan = ()
    merge: Callable[[Params], Params] | None = None
    fisher: Params | None = None
    """The source's Fisher information, for a penalty: a tree like the parameters."""


class Fit(NamedTuple):
    """One fit, ready to train."""

    result: Result
    """What is known of it before it is trained."""
    program: train.Spec
    trial: train.Fit
    validation: np.ndarray
    """int32: the training examples that are held out."""


def check(recipe: Recipe, budget: str, task: Task, start: Start, prefix: str = "") -> None:
    """Raise InputError for what of a recipe cannot be, before anything is trained or written.

    `prefix` is 'source_' where the flags are those of the source's fit.
    """
    spec, numbers = _flagged(prefix, "optimizer", lambda: _optimizer(recipe))
    loss = _flagged(prefix, "loss", lambda: objective.loss(recipe.loss))
    _flagged(prefix, "label_smoothing", lambda: objective.check_smoothing(recipe.loss, recipe.label_smoothing))
    terms, weights = _flagged(prefix, "penalty", lambda: penalties.read(recipe.penalty))
    fresh = dict(paths.items(start.fresh)) if start.fresh is not None else {}
    for term, numbers_of_term in zip(terms, weights, strict=True):
        _flagged(prefix, "penalty", functools.partial(paths.require_globs, start.params, (term.on,)))
        tried = functools.partial(penalties.require_scalar, term, numbers_of_term, start.params, fresh)
        _flagged(prefix, "penalty", tried)
    drawn = _flagged(
        prefix,
        "train_examples" if not budget.startswith("all") else "validation",
        lambda: chosen(recipe, budget, task, 0),
    )
    total = _flagged(prefix, "batch_size", lambda: steps(recipe, len(drawn[0])))
    _at_steps(start.phases, total)
    _flagged(prefix, "schedule", lambda: _rates(recipe, total))
    logits = jax.ShapeDtypeStruct((2, len(task.classes)), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    values = _flagged(prefix, "loss", lambda: jax.eval_shape(loss, logits, labels))
    if getattr(values, "shape", None) != (2,):
        raise InputError(f"--{prefix}loss={recipe.loss} does not give a number an example: see --helpfull")
    _flagged(prefix, "optimizer", lambda: _try_optimizer(spec, numbers))


def _flagged(prefix: str, flag: str, attempt: Callable[[], Any]) -> Any:
    """What `attempt` gives; whatever it raises becomes an InputError that names the flag."""
    try:
        with switches.guarded(f"what --{prefix}{flag} names"):
            return attempt()
    except InputError as error:
        text = flags.in_flags(error, prefix)
        raise InputError(text if text.startswith("--") else f"--{prefix}{flag}: {text}") from error
    except Exception as error:
        raise InputError(f"--{prefix}{flag} cannot be used as it is given: {plugins.said(error)}") from error


def _optimizer(recipe: Recipe) -> tuple[optimizers.OptimizerSpec, dict[str, float]]:
    return optimizers.spec(
        recipe.optimizer, momentum=recipe.momentum, weight_decay=recipe.weight_decay, clip=recipe.clip
    )


def _try_optimizer(spec: optimizers.OptimizerSpec, numbers: Mapping[str, float]) -> None:
    """Trace one step on a small tree."""
    params = {name: jax.ShapeDtypeStruct((2,) * n, jnp.float32) for name, n in (("kernel", 2), ("bias", 1))}

    def step(params: Params) -> Params:
        tx = optimizers.build(spec, 0.1, numbers)
        return tx.update(params, tx.init(params), params)[0]

    jax.eval_shape(step, params)


def _rates(recipe: Recipe, total: int) -> np.ndarray:
    return optimizers.rates(recipe.schedule, recipe.learning_rate, recipe.warmup, total)


def steps(recipe: Recipe, examples: int) -> int:
    """The steps of a fit; raises InputError for a batch larger than the data under --epochs."""
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


def ends(recipe: Recipe, total: int) -> list[int]:
    """The steps at which the curves have a point: each epoch, or as many as --points under --steps."""
    points = min(recipe.epochs if recipe.steps is None else recipe.points, total)
    return [total * (i + 1) // points for i in range(points)]


def chosen(recipe: Recipe, budget: str, task: Task, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) examples of a label budget under a seed of the draw, int32 each."""
    labels = np.asarray(task.train.labels)
    labelled = draw.label_budget(seed, labels, budgets.total(budget, task))
    subset, validation = draw.validation_split(labels, labelled, recipe.validation)
    if not len(subset):
        raise InputError("it leaves no example to train on: lower it", field="validation", value=recipe.validation)
    return subset, validation


def keeps_dropout(made: Settings, model: Model, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The stages that keep their dropout while they are frozen, for inputs of one example's `shape`."""
    return randomness.stages(model, shape) if made.frozen_dropout == "on" else ()


def faults(made: Settings, model: Model, shape: tuple[int, ...]) -> list[str]:
    """What a model draws otherwise than its key says, a sentence each."""
    # The models of tljax draw nothing.
    sentences = randomness.faults(model, shape) if "." in plugins.parse(made.model).name else []
    return [f"--model={made.model}: {sentence}" for sentence in sentences]


def draws(made: Settings, model: Model, shape: tuple[int, ...]) -> dict[str, Any]:
    """What decides the bits of a fit whose model draws (dropout, noise), and of no other; {} for one that does not.

    Its number goes up when a key comes to reach more of a model, or other draws follow from it. Under pmap each device
    draws by itself, so their number counts too.
    """
    if "." not in plugins.parse(made.model).name or not randomness.stages(model, shape):
        return {}  # the models of tljax draw nothing
    axes = [int(axis.partition(":")[2]) for axis in made.mesh]
    devices = made.devices or math.prod(axes) if made.devices or axes else len(jax.local_devices())
    return {"draws": [2, *([devices] if made.parallel == "pmap" else [])]}


def split(field: Arena, streams: seeds.Seeds, budget: str) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) examples of one fit, int32 each, the former in ascending order."""
    subset, validation = chosen(field.recipe, budget, field.task, streams.draw)
    return np.sort(subset), validation


def build(
    field: Arena,
    model: Model,
    start: Start,
    streams: seeds.Seeds,
    budget: str,
    result: Result,
    keeps_dropout: tuple[str, ...] = (),
) -> Fit:
    """One fit, from where it starts; the stages `keeps_dropout` keep their dropout while they are frozen."""
    recipe = field.recipe
    subset, validation = split(field, streams, budget)
    spec, numbers = _optimizer(recipe)
    terms, weights = penalties.read(recipe.penalty)
    smooth = recipe.label_smoothing > 0
    loss = objective.loss(recipe.loss)
    program = train.Spec(model, loss, spec, terms, smooth, start.merge, keeps_dropout=keeps_dropout)

    def order(first: int, last: int) -> np.ndarray:
        by_epochs = recipe.steps is None
        return draw.order(streams.order, len(subset), recipe.batch_size, first, last, epochs=by_epochs, subset=subset)

    total = steps(recipe, len(subset))
    trial = train.Fit(
        start.params,
        _at_steps(start.phases, total),
        order,
        _rates(recipe, total),
        weights,
        {**numbers, "label_smoothing": recipe.label_smoothing},
        jax.random.key(streams.order),
        start.fresh,
        start.fisher,
    )
    begins = [step for step, _ in trial.phases]
    return Fit(replace(result, steps=total, phase_steps=begins), program, trial, validation)


def _at_steps(phases: Sequence[tuple[float, Any]], total: int) -> tuple[tuple[int, Any], ...]:
    """Phases by the step before which they begin: their fraction of all steps, to the nearest whole one."""
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


def stops(ends: Sequence[int], trial: train.Fit) -> list[int]:
    """Where the segments of a fit end: at the points of its curves, and where its phases begin."""
    return sorted({*ends, *(step for step, _ in trial.phases if step)})


def identify(name: str, about: Mapping[str, Any], decisive: Mapping[str, Any], recipe: Mapping[str, Any]) -> Result:
    """A fit that is to be trained, with the key of everything that decides its bits, and a name from both.

    `about` are fields of the `Result`. `recipe` is what fits that differ in their seed alone have in common: its digest
    lets whoever reads the results refuse fits of two recipes in one cell of a table.
    """
    changed = {"switches": switches.changed()} if switches.changed() else {}
    key = _digest({**about, **decisive, **changed, "tljax": __version__})
    digest = _digest({**recipe, **changed})[:16]
    return Result(name=f"{file_name(name)}-{key[:8]}", key=key, recipe=digest, **about)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def group_name(keys: Iterable[str]) -> str:
    """Of fits that are trained or kept together, by their keys: eight hexadecimal digits."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:8]


def company(made: Settings) -> list[Any]:
    """What of `train.Execution` and of the fits beside it decides a fit's bits: side by side, each rounds as its
    company does."""
    return [made.features_budget, made.features_dtype, *(made.seeds if made.many == "vmap" else ())]


def code(recipe: Recipe, model: str) -> list[str]:
    """Digests of what the flags name outside tljax: an edit of such a file makes another fit."""
    named = ((model, "tljax.models", "model"), (recipe.loss, "optax", "loss"), (recipe.optimizer, "optax", "optimizer"))
    return [*(plugins.outside_digest(*plugin) for plugin in named), *penalties.digests(recipe.penalty)]


def file_name(text: str) -> str:
    """`text` as it can stand in a path."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)[-80:].strip("_.")
