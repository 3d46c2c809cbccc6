"""What fits cost: the FLOPs of their steps, their peak memory, and what the training of their source took."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from experiments.runs import directory, fit, plan
from experiments.runs.plan import Experiment
from tljax import batch_stats, masks, models, objective, train
from tljax.initialization import Start
from tljax.study.results import Result
from tljax.train.flops import step_flops
from tljax.types import Mask, Objective


def of_fits(experiment: Experiment, results: Sequence[Result], folder: Path) -> dict[str, dict[str, Any]]:
    """{fit: its step_flops (a mean over its phases), and source_steps, source_flops, source_seconds}."""
    of_source = _of_source(experiment, folder)
    settings, model = experiment.settings, experiment.model
    shape = plan.example_shape(experiment.target)
    keeps_dropout = plan.stages_with_dropout(settings, model, shape)
    goal = plan.objective_of(experiment.target, settings.recipe)
    augmented = bool(plan.augmentations(settings.recipe, experiment.target))
    costs: dict[str, dict[str, Any]] = {}
    flops_of: dict[Any, float] = {}
    starts = {(strategy.name, str(strategy.options)): start for strategy, start in plan.first_starts(experiment)}
    for result in results:
        assert result.steps is not None
        start = starts[result.strategy, str(result.options)]
        total, bounds = 0.0, [*(result.began or result.phase_steps), result.stopped_step or result.steps]
        for number, (first, last) in enumerate(pairwise(bounds)):
            mask = masks.load(folder / "masks" / f"{result.name}-phase{number}", start.params)
            # Features are computed once where at least as many examples are trained on as there are.
            passes = (last - first) * settings.recipe.batch_size
            cached = passes >= result.train_examples * (settings.augment_views or 1)
            cached &= settings.features_budget > 0 and (not augmented or settings.augment_views > 0)
            key = result.strategy, str(result.options), masks.digest(masks.static(start.params, mask)), cached
            if key not in flops_of:
                step = (shape, settings.recipe.batch_size, start.applied, cached, keeps_dropout)
                flops_of[key] = step_flops(model, start.params, mask, *step, goal, start.model_state)
            total += flops_of[key] * (last - first)
        costs[result.name] = {"step_flops": total / result.steps, **of_source.get(result.seed, {})}
    return costs


def of_start(experiment: Experiment, start: Start) -> list[str]:
    """What each phase of a fit costs that starts so, in words: `in_words`."""
    return in_words(*_prepared(experiment, start)) if start.phases else []  # none if the strategy looks at data


def _prepared(experiment: Experiment, start: Start) -> tuple[fit.DeviceData, fit.PreparedFit]:
    """(Outlined data, a fit that starts so)."""
    settings, model = experiment.settings, experiment.model
    keeps_dropout = plan.stages_with_dropout(settings, model, plan.example_shape(experiment.target))
    outlined = fit.outlined(experiment.target, settings.recipe, experiment.execution)
    streams, blank = plan.streams(settings, settings.seeds[0]), Result(name="", target="", strategy="", seed=0)
    budget = settings.train_examples[-1]
    return outlined, fit.build(outlined, model, start, streams, budget, blank, keeps_dropout)


_OFF = {"live": "go on", "gated": "see zeros", "kept": "stand still", "dropped": "begin anew"}


def of_moves(experiment: Experiment, start: Start) -> list[str]:
    """How the mask of each phase moves, a line for each phase; [] where none does."""
    if not any(rule.schedule for rule in start.rules):
        return []
    outlined, prepared = _prepared(experiment, start)
    lines: list[str] = []
    history: tuple[Mask, ...] = ()
    for (_, mask), rule in zip(prepared.trial.phases, start.rules, strict=True):
        history = (*history, mask)
        schedule = rule.schedule
        if schedule is None:
            lines.append("")
            continue
        spec = train.specialize(prepared.spec, prepared.trial, history)
        alone = train.forms_no_others(spec, masks.split(start.params, mask)[0], tuple(start.model_state))
        groups = len({*jax.tree.leaves(schedule.groups)}) or 1
        what = f"of {groups} groups" if groups > 1 else "by element"
        steps = "in each step" if schedule.every == 1 else f"every {schedule.every} steps"
        computed = "not computed, unless fits are side by side" if alone else "computed too"
        prefix = ""
        if schedule.off_since is not None:
            how_many = len(outlined.execution.devices)
            reason = "fits are over several devices" if how_many > 1 else train.obstacle(spec, outlined.execution.cache)
            how = f"computed in every step, since {reason}" if reason else "computed once, from the next point on"
            where = "" if reason else "; where fits are side by side, in every step"
            prefix = f"; features of stages that are off for good, from the input up, are {how}{where}"
        lines.append(
            f"the mask moves: what trains is chosen {what}, {steps}, {schedule.when} the gradient; moments of what is "
            f"off {_OFF[schedule.off]}; gradients of what is off are {computed}{prefix}"
        )
    return lines


def in_words(outlined: fit.DeviceData, prepared: fit.PreparedFit) -> list[str]:
    """What each phase of a fit costs, a line each, up to the first whose mask is not known before it begins.

    It is that of one fit by itself on one device, as `fit.outlined` gives its data; the segment is compiled for it.
    """
    return [
        f"{_in_millions(cost.flops)} million FLOPs a step, peak memory {_in_millions(cost.peak_bytes)} MB (one fit on "
        "one device, with its data)"
        for cost in _of_phases(outlined, prepared)
    ]


def _in_millions(number: float | None) -> str:
    return "-" if number is None else f"{number / 1e6:,.1f}"


def _of_phases(outlined: fit.DeviceData, prepared: fit.PreparedFit) -> Iterator[train.Cost]:
    spec, trial = prepared.spec, prepared.trial
    if trial.fisher is None and any("fisher" in penalty.needs for penalty in spec.penalties):
        trial = trial._replace(fisher=trial.params)  # of the same shapes; its values come with the trained source
    history: tuple[Mask, ...] = ()
    for _, mask in trial.phases:
        if masks.is_strategy(mask):
            return
        history = (*history, mask)
        yield train.cost_of(spec, trial, outlined.train, history, outlined.execution.cache)


def _of_source(experiment: Experiment, folder: Path) -> dict[int, dict[str, Any]]:
    """{seed: what the training of its source took}, as far as that is known."""
    source = experiment.source
    if source is None or experiment.strategies[0].name == "scratch":
        return {}
    results = {result.key: result for result in directory.results(folder)}
    costs: dict[int, dict[str, Any]] = {}
    model = experiment.settings.build_model(source.outputs)
    params, state = batch_stats.split(models.abstract(model, source.shape))
    everything = masks.by_path(params, lambda path: True)
    recipe = experiment.settings.source_recipe
    loss = objective.loss(objective.resolved(recipe.loss, source.kind), source.kind)
    goal = Objective(loss, source.outputs, (), source.kind)
    flops = step_flops(model, params, everything, source.shape, recipe.batch_size, objective=goal, state=state)
    for seed, key in source.identity.items():
        result = results.get(key)
        steps = result.steps if result else source.steps
        costs[seed] = {
            "source_steps": steps,
            "source_flops": None if steps is None or result is None else steps * flops,
            "source_seconds": result.seconds if result else None,
        }
    return costs
