"""What fits cost: FLOPs of their steps, and what the training of their source took."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.runs import directory, plan
from experiments.runs.plan import Experiment
from tljax import masks, models
from tljax.study.results import Result
from tljax.train.flops import step_flops


def of_run(todo: Experiment, lines: Sequence[Result], folder: Path) -> dict[str, dict[str, Any]]:
    """{fit: step_flops (a mean over its phases), and source_steps, source_flops, source_seconds}."""
    source = _source(todo, folder)
    found: dict[str, dict[str, Any]] = {}
    known: dict[Any, float] = {}
    starts = {(method.name, str(method.options)): start for method, start in plan.first_starts(todo)}
    for line in lines:
        assert line.steps is not None
        start = starts[line.strategy, str(line.options)]
        begins = [*line.phase_steps, line.steps]
        total = 0.0
        for number, (first, last) in enumerate(pairwise(begins)):
            mask = masks.load(folder / "masks" / f"{line.name}-phase{number}", start.params)
            # Features are computed once where at least as many examples are trained on as there are.
            cached = (last - first) * todo.settings.recipe.batch_size >= line.train_examples
            key = line.strategy, str(line.options), masks.digest(masks.static(start.params, mask)), cached
            if key not in known:
                shape = tuple(todo.target.train.images.shape[1:])
                keeps_dropout = plan.stages_with_dropout(todo.settings, todo.model, shape)
                of_step = (shape, todo.settings.recipe.batch_size, start.merge, cached, keeps_dropout)
                known[key] = step_flops(todo.model, start.params, mask, *of_step)
            total += known[key] * (last - first)
        found[line.name] = {"step_flops": total / line.steps, **source.get(line.seed, {})}
    return found


def _source(todo: Experiment, folder: Path) -> dict[int, dict[str, Any]]:
    """{seed: what the training of its source took}, as far as that is known."""
    if todo.source is None or todo.strategies[0].name == "scratch":
        return {}
    lines = {line.key: line for line in directory.results(folder)}
    found: dict[int, dict[str, Any]] = {}
    model = todo.settings.build_model(len(todo.source.classes))
    params = models.abstract(model, todo.source.shape)
    everything = masks.by_path(params, lambda path: True)
    flops = step_flops(model, params, everything, todo.source.shape, todo.settings.source_recipe.batch_size)
    for seed, key in todo.source.identity.items():
        line = lines.get(key)
        steps = line.steps if line else todo.source.steps
        found[seed] = {
            "source_steps": steps,
            "source_flops": None if steps is None or line is None else steps * flops,
            "source_seconds": line.seconds if line else None,
        }
    return found
