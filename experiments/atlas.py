"""Where parameters matter: random masks over stages and kinds of leaves, and what each cell of them adds.

    python -m experiments.atlas --flagfile=experiments/flags/quickstart.flags --hidden=64,64 --workdir=runs/atlas

A cell is the leaves of a stage that are of one kind (kernel, bias, norm, attention). Masks of cells are drawn, beside
what was drawn anew and the head, which always train; where there are no more than --masks, all are taken. Each is
trained under all --seeds at several --rates, in one program whatever the masks: what is off is computed too, and gated.
All is judged on validation examples; the test set is never read. A sum over cells is fitted to the scores, with pairs
of cells where they lower the error on masks that were held out; its intervals stand beside the noise ceiling. Each of
--strategies (all: every file of the folder) is told as a percentile among the masks of its size, by cells and by
numbers, and the greedy choice of stages and of cells as a strategy to give to --strategies. Run again with more masks,
seeds or strategies it trains what is missing.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import command_line, console, directory, fit, plan, process, trials
from experiments.runs.command_line import flag
from experiments.runs.fit import PreparedFit
from experiments.runs.plan import Experiment, NamedStrategy
from experiments.runs.settings import ExperimentFlags, Settings
from experiments.runs.sources import Trained
from experiments.runs.trials import SearchTask
from tljax import evaluate, masks, models, paths, plugins
from tljax.masks import Cell
from tljax.models import randomness
from tljax.study import atlas, units
from tljax.types import InputError, Params

ALL = "all"
"""What stands in --strategies for every file of the folder."""
VALIDATION = 0.2
"""The fraction of the training examples that is held out, unless --validation says another."""


@dataclass(frozen=True)
class AtlasFlags(ExperimentFlags):
    """The flags of an atlas, and of the fits that it is made of."""

    masks: int = flag(256, "how many masks are drawn; all there are where there are no more", role="free")
    rates: tuple[str, ...] = flag(
        ("1", "3", "10"), "multiples of --learning_rate at which each mask is trained", role="free"
    )
    stages: tuple[str, ...] = flag(
        (), "stages that have cells, or globs such as block_*; the others stay frozen; default all but the head"
    )
    kinds: tuple[str, ...] = flag(
        (), "kinds of leaves, as kernel=**/kernel or attention=**/attention/**+**/qkv/**; default by their names"
    )
    group: int = flag(32, "masks that are trained together", role="free", bounds=(1, 10**6))
    mask_seed: int = flag(0, "of the draw of the masks", bounds=(0, 2**32))
    pairs: int = flag(8, "the most pairs of cells of the sum that is fitted", role="free", bounds=(0, 1000))
    epsilon: float = flag(
        0.1, "the least gain of a step of the greedy choice, in points, or in the metric's unit", role="free"
    )


class Base(NamedTuple):
    """What all masks of one seed start from."""

    fit: PreparedFit
    key: str
    """Of the fit that trains everything: all that decides its bits is in it."""


def run(values: Mapping[str, Any], options: AtlasFlags) -> dict[str, Any]:
    """Train, fit and report; returns the numbers of atlas.json. `values` has the shared flags that are given."""
    factors, kinds = _factors(options.rates), _kinds(options.kinds)
    _check(options)
    named = tuple(values.get("strategies", AtlasFlags().strategies))
    flags = {"validation": VALIDATION, **values}
    settings = Settings.from_flags(**{**flags, "strategies": ("full",)})
    _check_settings(settings)
    execution = process.prepare(settings)
    whole = plan.prepare(settings, execution, only=True)
    if whole.source is None:
        raise InputError("an atlas is of what a source knows: give --source=NAME or --source_checkpoint=DIR")
    strategies = _strategies(whole, named)
    settings = Settings.from_flags(**{**flags, "strategies": tuple(text for text, _ in strategies)})
    start = plan.start_of(whole.strategies[0], plan.initialization_of(whole, settings.seeds[0]))
    _refuse_states(settings, start.model_state)
    cells = _cells(whole, start.params, start.fresh, options.stages, kinds)
    drawn = atlas.draw(len(cells), options.masks, options.mask_seed)
    atlas.fit(drawn, np.zeros((len(drawn), 1)))  # masks that do not tell the cells apart are refused before training
    if settings.dry_run:
        _print_plan(whole, cells, drawn, factors, settings, options)
        return {}
    with directory.opened(settings, "atlas", command_line.flagfile_lines(options)) as folder:
        directory.record_environment(folder, plan.fingerprints(whole))
        trained = fit.obtain_source(settings, whole.source, folder, execution)
        task = trials.search_task(whole, settings.train_examples[0])
        known = _known(folder)
        scores = _trained_masks(task, whole, trained, cells, drawn, factors, options.group, folder, known)
        others = [
            _trained_strategy(task, whole, trained, strategy, cells, factors, folder, known)
            for _, strategy in strategies
        ]
        result = _atlas(task, whole, cells, drawn, scores, others, factors, options)
        from experiments.pages import atlas as page  # draws: matplotlib takes a second to import

        numbers = page.numbers(result)
        directory.replace(folder / "atlas.json", json.dumps(numbers, indent=1) + "\n")
        title, notes = plan.title_and_notes(settings, whole.source, whole.target)
        page.show(result, folder, title, [*notes, *_notes(whole)])
    return numbers


# ---- Flags


def _factors(texts: Sequence[str]) -> tuple[float, ...]:
    """The multiples of --rates, ascending; raises InputError for others than positive numbers."""
    try:
        factors = tuple(sorted(float(text) for text in texts))
    except ValueError:
        factors = ()
    if not factors or not 0 < factors[0] <= factors[-1] < math.inf or len(set(factors)) < len(factors):
        raise InputError(f"--rates={','.join(texts)}: give multiples of --learning_rate, each once, such as 1,3,10")
    return factors


def _kinds(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{kind: its globs} of --kinds; raises InputError for a text that is none, and for a kind given twice."""
    kinds: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, globs = text.partition("=")
        if not name or not equals or not globs or name in kinds:
            raise InputError(f"--kinds={text}: write NAME=GLOB, or NAME=GLOB+GLOB, and each name once")
        kinds[name] = tuple(globs.split("+"))
    return kinds


def _check(options: AtlasFlags) -> None:
    if options.masks < 4:
        raise InputError(f"--masks={options.masks}: give 4 or more")
    if not 0 <= options.epsilon < math.inf:
        raise InputError(f"--epsilon={options.epsilon:g}: give a number of at least 0")


def _check_settings(settings: Settings) -> None:
    """Raise InputError for settings that an atlas cannot be of."""
    if len(settings.train_examples) > 1:
        raise InputError(f"--train_examples={','.join(settings.train_examples)}: an atlas is of one budget: name one")
    if not settings.recipe.validation:
        raise InputError("--validation=0: an atlas is judged on examples that are held out: give --validation=0.2, say")
    if settings.verdict_of != "last":
        raise InputError(f"--verdict_of={settings.verdict_of}: an atlas is of what fits end with: leave it out")
    if settings.distributed:
        raise InputError("--distributed: an atlas is of one process: leave it out")


def _refuse_states(settings: Settings, model_state: Mapping[str, Any]) -> None:
    if model_state and settings.batch_stats == "auto":
        raise InputError(
            f"--batch_stats=auto goes by which stages train whole, and stage '{next(iter(model_state))}' has a state: "
            "masks of one program have it alike, so give frozen, tracked or reestimated"
        )


def _strategies(whole: Experiment, texts: Sequence[str]) -> list[tuple[str, NamedStrategy]]:
    """(Text, strategy) of --strategies; of `all` those that this model takes, and a line on each that it does not.

    Raises InputError for one that is named and cannot be trained.
    """
    if ALL in texts and tuple(texts) != (ALL,):
        raise InputError(f"--strategies={','.join(texts)}: {ALL} stands for every file of the folder: give it alone")
    taken = []
    initial = plan.initialization_of(whole, whole.settings.seeds[0])
    for text in plugins.names("tljax.strategies", "strategy") if ALL in texts else texts:
        try:
            strategy = plan.read_strategy(text)
            start = plan.start_of(strategy, initial)
            plan.check_recipe(whole.settings.recipe, whole.settings.train_examples[0], whole.target, start)
        except InputError as error:
            if ALL not in texts:
                raise
            console.say(f"{text} is left out: {error}")
            continue
        taken.append((text, strategy))
    return taken


def _cells(
    whole: Experiment, params: Params, fresh: Any, globs: Sequence[str], kinds: Mapping[str, Sequence[str]]
) -> tuple[Cell, ...]:
    """The cells of the stages that --stages names; raises InputError for a glob of none, and where there is no cell."""
    below = models.names(whole.model)[:-1]
    holds = [name for name in below if any(map(paths.inside((name,)), paths.names(params)))]
    chosen = holds
    if globs:
        for text in globs:
            if not any(map(paths.glob(text), holds)):
                raise InputError(f"--stages={text}: no stage below the head{plugins.nearest(text, holds)}")
        chosen = [name for name in holds if any(paths.glob(text)(name) for text in globs)]
    if not chosen:
        raise InputError("the model has no stage with parameters below its head: an atlas needs some")
    try:
        return masks.cells(params, chosen, without=fresh, kinds=kinds or None)
    except InputError as error:
        raise InputError(f"--kinds={','.join(kinds)}: {error}" if kinds else str(error)) from error


def _notes(whole: Experiment) -> list[str]:
    """What tables of an atlas must say of how its fits were trained."""
    notes = []
    if randomness.stages(whole.model, plan.example_shape(whole.target)):
        notes.append("dropout is on in every stage under every mask, as masks of one program have it alike")
    if len(whole.settings.seeds) == 1:
        notes.append("of one seed: intervals speak of that seed alone, and there is no noise ceiling")
    return notes


def _print_plan(
    whole: Experiment,
    cells: Sequence[Cell],
    drawn: np.ndarray,
    factors: Sequence[float],
    settings: Settings,
    options: AtlasFlags,
) -> None:
    """Print the cells, and how many fits there are to train."""
    rows = [(cell.stage, cell.kind, str(len(cell.paths)), f"{cell.size:,}") for cell in cells]
    fits = len(drawn) * len(factors) * len(settings.seeds)
    every = " (all there are)" if len(drawn) == 2 ** len(cells) else ""
    strategies = len(settings.strategies) * len(factors) * len(settings.seeds)
    notes = [
        f"{len(drawn):,} masks{every} at {len(factors)} rates under {len(settings.seeds)} seeds: {fits:,} fits in "
        f"groups of {options.group} masks, and {strategies} fits of strategies",
        "one program for all masks: what is off is computed too, and gated",
        *_notes(whole),
    ]
    console.table("cells", ["stage", "kind", "leaves", "numbers"], rows, notes)


# ---- Training


def _trained_masks(
    task: SearchTask,
    whole: Experiment,
    trained: Mapping[int, Trained],
    cells: Sequence[Cell],
    drawn: np.ndarray,
    factors: Sequence[float],
    size: int,
    folder: Path,
    known: dict[str, dict[str, Any]],
) -> np.ndarray:
    """Scores of all masks, float [masks, rates, seeds, halves], a group at a time: what is `known` is not trained."""
    settings = whole.settings
    keys = plan.planned(whole)
    of_seed = {planned.seed: key for key, planned in keys.items()}
    scores = np.empty((len(drawn), len(factors), len(settings.seeds), 2))
    rates: list[np.ndarray] = []
    bases: dict[int, PreparedFit] = {}
    with (
        process.signals_handled() as signal_number,
        console.progress("masks", drawn.shape[0] * len(settings.seeds), "masks x seeds") as advance,
    ):
        for first in range(0, len(drawn), size):
            group = drawn[first : first + size]
            digests = {
                seed: _digest(
                    {"fit": of_seed[seed], "rates": factors, "masks": group.astype(int).tolist(), "size": size}
                )
                for seed in settings.seeds
            }
            missing = [seed for seed in settings.seeds if digests[seed] not in known]
            if missing and plan.many_of(whole) == "vmap":  # a fit rounds as its company makes it
                missing = list(settings.seeds)
            for seed in [seed for seed in missing if seed not in bases]:
                bases[seed] = trials.prepare(task, whole, seed, trained)
            if missing and not rates:
                total = len(bases[missing[0]].trial.rates)
                rates = [_rates(settings, factor, total) for factor in factors]
            if missing:
                began = time.perf_counter()
                padded = np.concatenate([group, np.repeat(group[-1:], size - len(group), axis=0)])
                always = _always(whole, bases[missing[0]])
                trees = [masks.switched(bases[missing[0]].trial.params, cells, mask, always) for mask in padded]
                fits = [
                    base._replace(trial=base.trial._replace(phases=((0, tree),), rates=rate, rules=()))
                    for base in (bases[seed] for seed in missing)
                    for tree in trees
                    for rate in rates
                ]
                measured = _scores(task, whole, fits, signal_number, last_alone=True)
                seconds = time.perf_counter() - began
                shaped = measured.reshape(len(missing), size, len(factors), 2)[:, : len(group)]
                for seed, of_one in zip(missing, shaped, strict=True):
                    record = {
                        "key": digests[seed],
                        "seed": seed,
                        "masks": ["".join(map(str, m.astype(int))) for m in group],
                    }
                    known[digests[seed]] = {**record, "scores": of_one.tolist(), "seconds": round(seconds, 3)}
                _keep(folder, known)
            for i, seed in enumerate(settings.seeds):
                scores[first : first + len(group), :, i] = known[digests[seed]]["scores"]
            advance(len(group) * len(settings.seeds))
            if number := signal_number():
                raise process.Stopped(number, "stopped between two groups of masks; the same command goes on")
    return scores


def _always(whole: Experiment, base: PreparedFit) -> tuple[str, ...]:
    """The paths of what always trains: what was drawn anew, and the head."""
    fresh = {path for path, drawn in paths.items(base.trial.fresh) if drawn} if base.trial.fresh is not None else set()
    in_head = paths.inside(models.names(whole.model)[-1:])
    params = base.trial.params
    able = zip(paths.names(params), paths.trainable(params), strict=True)
    return tuple(path for path, can in able if can and (path in fresh or in_head(path)))


def _rates(settings: Settings, factor: float, total: int) -> np.ndarray:
    """The learning rate of each step at a multiple of --learning_rate, float32 [steps]."""
    return plan.learning_rates(replace(settings.recipe, learning_rate=settings.recipe.learning_rate * factor), total)


class OfStrategy(NamedTuple):
    """What training a strategy gave."""

    label: str
    scores: np.ndarray
    """float [rates, seeds, halves]."""
    cells: tuple[bool, ...] | None
    numbers: int


def _trained_strategy(
    task: SearchTask,
    whole: Experiment,
    trained: Mapping[int, Trained],
    strategy: NamedStrategy,
    cells: Sequence[Cell],
    factors: Sequence[float],
    folder: Path,
    known: dict[str, dict[str, Any]],
) -> OfStrategy:
    """The scores of a strategy under the seeds and at the rates of the masks, and its size."""
    settings = whole.settings
    of_strategy = whole._replace(strategies=(strategy,))
    keys = {planned.seed: key for key, planned in plan.planned(of_strategy).items()}
    digests = {
        seed: _digest({"fit": keys[seed], "rates": factors, "strategy": strategy.label}) for seed in settings.seeds
    }
    missing = [seed for seed in settings.seeds if digests[seed] not in known]
    if missing:
        console.say(f"{strategy.label}: {len(missing) * len(factors)} fits")
        prepared = {seed: trials.prepare(task, of_strategy, seed, trained) for seed in missing}
        rates = [_rates(settings, factor, len(prepared[missing[0]].trial.rates)) for factor in factors]
        fits = [
            prepared[seed]._replace(trial=prepared[seed].trial._replace(rates=rate))
            for seed in missing
            for rate in rates
        ]
        began = time.perf_counter()
        with process.signals_handled() as signal_number:
            measured = _scores(task, whole, fits, signal_number)
        seconds = time.perf_counter() - began
        for seed, of_one in zip(missing, measured.reshape(len(missing), len(factors), 2), strict=True):
            on, numbers = _size(whole, prepared[seed], cells)
            record = {"key": digests[seed], "seed": seed, "strategy": strategy.label, "cells": on, "numbers": numbers}
            known[digests[seed]] = {**record, "scores": of_one.tolist(), "seconds": round(seconds, 3)}
        _keep(folder, known)
    records = [known[digests[seed]] for seed in settings.seeds]
    scores = np.stack([np.array(record["scores"]) for record in records], 1)
    which = {tuple(record["cells"]) if record["cells"] is not None else None for record in records}
    of_cells = tuple(map(bool, records[0]["cells"])) if len(which) == 1 and None not in which else None
    return OfStrategy(
        strategy.label, scores, of_cells, round(float(np.mean([record["numbers"] for record in records])))
    )


def _size(whole: Experiment, prepared: PreparedFit, cells: Sequence[Cell]) -> tuple[list[int] | None, int]:
    """(Which cells a fit trains, 0 or 1 each, None where it trains others; the numbers beside what always trains)."""
    trial, always = prepared.trial, _always(whole, prepared)
    known = [mask for _, mask in trial.phases if not masks.is_strategy(mask)]
    inside = paths.inside(always)
    sizes = [sum(row.trained_size for row in masks.table(trial.params, mask) if not inside(row.path)) for mask in known]
    moves = len(trial.phases) > 1 or any(rule.schedule is not None for rule in trial.rules)
    on = None if moves else masks.cells_of(cells, trial.phases[0][1], always)
    return (None if on is None else list(map(int, on))), max(sizes, default=0)


def _scores(
    task: SearchTask,
    whole: Experiment,
    fits: Sequence[PreparedFit],
    signal_number: Callable[[], int],
    last_alone: bool = False,
) -> np.ndarray:
    """Scores of fits on the two halves of their validation examples, float [fits, 2], as they are measured.

    With `last_alone` they are evaluated at their last step only. Raises process.Stopped where a signal came before
    that, and InputError for fewer than two validation examples.
    """
    if any(len(each.validation) < 2 for each in fits):
        raise InputError(f"--validation={whole.settings.recipe.validation:g} holds out one example: give more")
    targets, goal = np.asarray(task.on_device.task.train.targets), task.on_device.objective
    scores = np.full((len(fits), 2), np.nan)
    for i, logits in trials.ends(task, whole, fits, lambda: bool(signal_number()), last_alone):
        for half in range(2):
            rows = fits[i].validation[half::2]
            at = np.searchsorted(task.rows, rows)
            score = None if logits is None else evaluate.score(goal, logits[at], targets[rows])
            scores[i, half] = task.worst if score is None else score
    if np.isnan(scores).any():
        number = signal_number()
        raise process.Stopped(number, "stopped in a group of fits, which is not kept; the same command goes on with it")
    return scores


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """{key: record} of atlas.jsonl; a line that is not as it was written counts as not trained, aloud."""
    file = folder / "atlas.jsonl"
    records = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and directory.intact(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            console.say(f"'{file}', line {number}, is not as it was written: what it says counts as not trained")
            continue
        records[record["key"]] = {name: value for name, value in record.items() if name != "sha256"}
    return records


def _keep(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write atlas.jsonl whole: a crash leaves the old one or the new one."""
    lines = (json.dumps(directory.with_sum(record)) for record in records.values())
    directory.replace(folder / "atlas.jsonl", "".join(f"{line}\n" for line in lines))


# ---- What the scores say


def _atlas(
    task: SearchTask,
    whole: Experiment,
    cells: tuple[Cell, ...],
    drawn: np.ndarray,
    measured: np.ndarray,
    others: Sequence[OfStrategy],
    factors: Sequence[float],
    options: AtlasFlags,
) -> atlas.Atlas:
    """The surrogate, the ceiling, the strategies and the greedy choices of scores as they were measured."""
    metric = task.on_device.objective.metrics[0]
    sign = units.sign(metric)
    best, which = atlas.at_best_rate(sign * measured)
    scores = best.mean(2)
    fitted = atlas.fitted(drawn, scores, options.pairs)
    by_stage = {name: [i for i, cell in enumerate(cells) if cell.stage == name] for name in _stages(cells)}
    sizes = drawn @ np.array([cell.size for cell in cells])
    near = max(20, len(drawn) // 10)
    placed = []
    for other in others:
        score = float(atlas.at_best_rate(sign * other.scores[None])[0].mean())
        count = None if other.cells is None else sum(other.cells)
        by_cells = atlas.Percentile(math.nan, 0, math.nan, math.nan)
        if count is not None:
            by_cells = atlas.percentile(score, scores.mean(1), drawn.sum(1), count)
        by_numbers = atlas.percentile(score, scores.mean(1), sizes, other.numbers, near)
        placed.append(atlas.Placed(other.label, score, count, other.numbers, by_cells, by_numbers))
    stages = {name: fitted.surrogate.total(members) for name, members in by_stage.items()}
    multiples = np.log(np.array(factors))[which].mean((1, 2))
    every = {"stages": by_stage, "cells": {cell.name: [i] for i, cell in enumerate(cells)}}
    head = models.names(whole.model)[-1]
    choices = []
    for name, of_units in every.items():
        chosen_by, judged_by = (_lookup(drawn, best[:, :, half], fitted.surrogate) for half in range(2))
        epsilon = options.epsilon / units.factor(metric)
        mask, steps = atlas.greedy(of_units, len(cells), chosen_by, judged_by, epsilon)
        choices.append(atlas.Choice(name, spec(cells, mask.tolist(), head), tuple(steps)))
    seeds = whole.settings.seeds
    ceiling = atlas.ceiling(scores)
    return atlas.Atlas(
        cells, drawn, scores, multiples, fitted, stages, ceiling, tuple(placed), tuple(choices), metric, tuple(seeds)
    )


def _stages(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.stage for cell in cells))


def _lookup(drawn: np.ndarray, scores: np.ndarray, surrogate: atlas.Surrogate) -> Callable[[np.ndarray], float]:
    """The score of a mask: as it was measured where it was trained, else by a sum fitted to `scores` [n, seeds]."""
    measured = {mask.tobytes(): float(score) for mask, score in zip(drawn, scores.mean(1), strict=True)}
    fitted = atlas.fit(drawn, scores, [pair for pair, _ in surrogate.pairs])

    def score(mask: np.ndarray) -> float:
        known = measured.get(mask.tobytes())
        return float(fitted.predict(mask[None])[0]) if known is None else known

    return score


def spec(cells: Sequence[Cell], mask: Sequence[bool], head: str) -> str:
    """The strategy, as --strategies takes it, that trains the cells of a mask and the head.

    >>> cells = [Cell("a", "kernel", ("a/kernel",), 4), Cell("a", "bias", ("a/bias",), 2)]
    >>> spec(cells, [True, True], "head"), spec(cells, [False, True], "head")
    ('stages:train=a+head', 'pattern:train=a/bias+head/**')
    """
    on = {cell.name for cell, is_on in zip(cells, mask, strict=True) if is_on}
    whole = [name for name in _stages(cells) if all(cell.name in on for cell in cells if cell.stage == name)]
    if all(cell.stage in whole for cell in cells if cell.name in on):
        return f"stages:train={'+'.join([*whole, head])}"
    leaves = [path for cell in cells if cell.name in on for path in cell.paths]
    return f"pattern:train={'+'.join([*leaves, f'{head}/**'])}"


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    command_line.main(argv, str(__doc__), run, AtlasFlags)
