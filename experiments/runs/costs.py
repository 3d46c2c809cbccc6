"""What fits cost: the FLOPs of their steps, and what the training of their source took."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.runs import directory, plan
from experiments.runs.plan import Experiment
from tljax import masks, models
from tljax.study.results import Result
from tljax.train.flops import step_flops


def of_fits(experiment: Experiment, results: Sequence[Result], folder: Path) -> dict[str, dict[str, Any]]:
    """{fit: its step_flops (a mean over its phases), and source_steps, source_flops, source_seconds}."""
    of_source = _of_source(experiment, folder)
    settings, model = experiment.settings, experiment.model
    shape = plan.example_shape(experiment.target)
    keeps_dropout = plan.stages_with_dropout(settings, model, shape)
    costs: dict[str, dict[str, Any]] = {}
    flops_of: dict[Any, float] = {}
    starts = {(strategy.name, str(strategy.options)): start for strategy, start in plan.first_starts(experiment)}
    for result in results:
        assert result.steps is not None
        start = starts[result.strategy, str(result.options)]
        total = 0.0
        for number, (first, last) in enumerate(pairwise([*result.phase_steps, result.steps])):
            mask = masks.load(folder / "masks" / f"{result.name}-phase{number}", start.params)
            # Features are computed once where at least as many examples are trained on as there are.
            cached = (last - first) * settings.recipe.batch_size >= result.train_examples
            key = result.strategy, str(result.options), masks.digest(masks.static(start.params, mask)), cached
            if key not in flops_of:
                step = (shape, settings.recipe.batch_size, start.merge, cached, keeps_dropout)
                flops_of[key] = step_flops(model, start.params, mask, *step)
            total += flops_of[key] * (last - first)
        costs[result.name] = {"step_flops": total / result.steps, **of_source.get(result.seed, {})}
    return costs


def _of_source(experiment: Experiment, folder: Path) -> dict[int, dict[str, Any]]:
    """{seed: what the training of its source took}, as far as that is known."""
    source = experiment.source
    if source is None or experiment.strategies[0].name == "scratch":
        return {}
    results = {result.key: result for result in directory.results(folder)}
    costs: dict[int, dict[str, Any]] = {}
    model = experiment.settings.build_model(source.outputs)
    params = models.abstract(model, source.shape)
    everything = masks.by_path(params, lambda path: True)
    flops = step_flops(model, params, everything, source.shape, experiment.settings.source_recipe.batch_size)
    for seed, key in source.identity.items():
        result = results.get(key)
        steps = result.steps if result else source.steps
        costs[seed] = {
            "source_steps": steps,
            "source_flops": None if steps is None or result is None else steps * flops,
            "source_seconds": result.seconds if result else None,
        }
    return costs
