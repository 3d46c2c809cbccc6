r"""A strategy card: one page on a strategy, against shipped scores of all the others, in ten minutes.

    python -m experiments.card mine.py:strategy --output=runs/card

The strategy, a file of yours or one of tljax/strategies, is tuned and trained on the fixed transfers of a version, at
the rates and under the seeds that every shipped strategy had. Which test items those got right is in the package, so it
is compared with them item by item and no other strategy is tuned again. The page says what it gains and keeps, what it
costs, where it stands among random masks, what is proved of it, and a verdict on test items that chose nothing.
Run again, it goes on.

    python -m experiments.card --make_reference --output=runs/reference

computes such scores, of all shipped strategies on all transfers, or of some.
"""

from experiments import run_program

if __name__ == "__main__":  # before the other imports, so that what fails in them is said in a line
    run_program(__file__)

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments.runs import (
    budgets,
    command_line,
    confirmation,
    console,
    costs,
    directory,
    evaluations,
    fit,
    looks,
    plan,
    predictions,
    process,
    sources,
    strategy_cards,
    trials,
)
from experiments.runs.command_line import flag
from experiments.runs.fit import PreparedFit
from experiments.runs.plan import Experiment, NamedStrategy
from experiments.runs.settings import Settings
from experiments.runs.sources import Trained
from experiments.runs.strategy_cards import (
    ANCHOR,
    SHIPPED,
    Arm,
    JudgedItems,
    OnTransfer,
    Reference,
    Transfer,
    arm_from_record,
    arm_to_record,
)
from experiments.runs.trials import SearchTask
from tljax import evaluate, files, masks, models, paths, plugins, train
from tljax.study import atlas
from tljax.study.results import Result
from tljax.types import InputError

MASKS = 24
"""How many random masks a reference has."""


@dataclass(frozen=True)
class CardFlags:
    """Which strategy has a card, and where that is written."""

    ARGUMENT: ClassVar[str] = "strategy"
    strategy: str | None = flag(
        None, "FILE.py:strategy, or a file of tljax/strategies, with options; may stand without --strategy=; needed"
    )
    output: str | None = flag(None, "the folder of the card, new, or that of the same card; needed", place="new")
    transfers: tuple[str, ...] = flag((), "which transfers of the version; default all that have reference scores")
    explore: bool = flag(False, "look at the test items that explore alone: no verdict, and nothing is counted")
    reference: str | None = flag(
        None,
        "the folder of a version: a flagfile a transfer, and scores; default the one that is shipped",
        place="path",
    )
    manual_dir: str | None = flag(
        None, "where lite0_64.safetensors and trashnet are, for the transfer from ImageNet", place="path", role="free"
    )
    data_dir: str | None = flag(None, "where data sets are kept; default as TFDS has it", place="path", role="free")
    compilation_cache: str | None = flag(
        None, "of compiled programs; default ~/.cache/tljax; off for none", place="new", role="free"
    )
    make_reference: bool = flag(
        False, "compute the scores of all shipped strategies, or of those that --strategy names, with commas"
    )


class Place(NamedTuple):
    """Where a card is made."""

    output: Path
    version: str
    more: Mapping[str, Any]
    """{flag: value} that every fit has beside those of its transfer: where data are, and compiled programs."""
    execution: train.Execution = train.Execution()
    """How the fits of the transfer at hand are trained."""


def _prepared_for(transfer: Transfer, place: Place) -> Place:
    """The place with the execution that the flags of a transfer say."""
    return place._replace(execution=process.prepare(Settings.from_flags(**{**transfer.flags, **place.more})))


def run(options: CardFlags) -> dict[str, Any]:
    """Make a card, or the scores of a reference; returns what card.json says, {} of a reference."""
    if not options.output:
        raise InputError("--output is not given: name a new folder for the card, such as --output=runs/card")
    if not options.strategy and not options.make_reference:
        raise InputError("--strategy is not given: name whose card is made, such as mine.py:strategy")
    folder = files.place(options.reference) if options.reference else SHIPPED
    known = strategy_cards.flagfiles(folder)
    for name in options.transfers:
        if name not in known:
            raise InputError(f"--transfers={name}: {folder.name} has no such transfer{plugins.nearest(name, known)}")
    strategy = None if options.make_reference or not options.strategy else plan.read_strategy(options.strategy)
    if strategy and strategy.name == "scratch":
        raise InputError("scratch is what every card compares with: it has no card of its own")
    output = _opened(files.place(options.output))
    more = {
        name: value
        for name in ("data_dir", "manual_dir", "compilation_cache")
        if (value := getattr(options, name)) is not None
    }
    place = Place(output, folder.name, more)
    with process.locked(output):
        if strategy:
            return _make_card(strategy, options, folder, known, place)
        _make_reference(options, folder, known, place)
    return {}


def _opened(output: Path) -> Path:
    """The folder of a card, made unless it is there; raises InputError for one that holds other things."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output={output} is a file: name a new folder")
    files.sweep(output)
    if output.is_dir() and {file.name for file in output.iterdir()} - _WRITTEN:
        raise InputError(f"--output={output} holds other files and no card: name a new folder")
    output.mkdir(parents=True, exist_ok=True)
    return output


_WRITTEN = {"sources", "fits", "arms", "reference", "card.json", "card.html", "card.bib", "about.json", ".lock"}
"""All that a card's folder holds."""


# ---- A card


def _make_card(
    strategy: NamedStrategy, options: CardFlags, folder: Path, known: Mapping[str, Path], place: Place
) -> dict[str, Any]:
    """Prove, train, compare and write; returns what card.json says."""
    assert options.strategy is not None
    about = {"version": place.version, "strategy": options.strategy, "code": strategy.code}
    if (before := directory.read_record(place.output / "about.json")) not in (None, about):
        differs = "another card" if before and before["strategy"] != about["strategy"] else "a card of other code"
        raise InputError(f"--output={place.output} holds {differs}: name a new folder")
    directory.write_record(place.output / "about.json", about)
    transfers, left_out = _transfers(options, folder, known)
    began = time.monotonic()
    places = [_prepared_for(transfer, place) for transfer, _ in transfers]  # before the checks let JAX find its devices
    from tljax import audit  # after the flags are read, so that help is quick

    console.say(f"{place.version}: the proofs of {strategy.label}")
    proofs = audit.check_strategy(options.strategy)
    parts: list[OnTransfer] = []
    anchors: dict[str, int] = {}
    for (transfer, reference), prepared in zip(transfers, places, strict=True):
        try:
            arm, items, test_sets = _arm(transfer, options.strategy, prepared)
        except InputError as error:
            left_out[transfer.name] = str(error)
            console.say(f"{transfer.title} is left out: {error}")
            continue
        if test_sets != reference.test_sets:
            raise InputError(f"{transfer.name}: its test items are not those of the reference scores: restore the data")
        parts.append(OnTransfer(transfer, items, arm, reference))
        anchors[transfer.name] = _anchor(transfer, reference, prepared)
    if not parts:
        raise InputError(f"no transfer has a card of '{strategy.label}': {'; '.join(dict.fromkeys(left_out.values()))}")
    order = 0 if options.explore else _counted(place.version, parts)
    from experiments.pages import strategy_card as page  # draws: matplotlib takes a second to import

    contents = page.Contents(
        place.version,
        _shown(strategy.label, options.strategy),
        options.strategy,
        strategy.code,
        tuple(parts),
        left_out,
        tuple(proofs),
        anchors,
        options.explore,
        "".join(f" {text}" for text in _flags_beside(options)),
        order,
        directory.environment({}),
        time.monotonic() - began,
    )
    record = page.write(place.output, contents)
    if failed := [check for check in proofs if check.passed is False]:
        raise InputError(f"'{strategy.label}' is refuted by {len(failed)} of {len(proofs)} checks: see {page.NAME}")
    return record


def _flags_beside(options: CardFlags) -> list[str]:
    """The flags of a card that decide what is on it, beside the strategy; a folder of data as DIR."""
    named = [f"--transfers={','.join(options.transfers)}"] if options.transfers else []
    named += ["--explore"] if options.explore else []
    return [*named, *(f"--{name}=DIR" for name in ("reference", "manual_dir") if getattr(options, name))]


def _shown(label: str, text: str) -> str:
    """What the page calls a strategy: its label, with the name of its file in place of the path."""
    place = plugins.parse(plugins.named(text)[1]).name
    return label.replace(place, Path(place).name, 1)


def _transfers(
    options: CardFlags, folder: Path, known: Mapping[str, Path]
) -> tuple[list[tuple[Transfer, Reference]], dict[str, str]]:
    """(The transfers that a card is of, with their scores; {another of the version: why it is left out}).

    Raises InputError for one that --transfers names and that has none, and where no transfer has any.
    """
    chosen, left_out = [], {}
    for name, file in known.items():
        if options.transfers and name not in options.transfers:
            left_out[name] = "not among --transfers"
            continue
        try:
            transfer = strategy_cards.read_transfer(file, options.manual_dir)
        except InputError as error:
            if options.transfers:
                raise
            left_out[name] = str(error)
            continue
        reference = strategy_cards.read_reference(folder, transfer)
        if reference is not None:
            chosen.append((transfer, reference))
        elif options.transfers:
            raise InputError(f"--transfers={name}: {folder.name} has no reference scores of it")
        else:
            left_out[name] = f"{folder.name} has no reference scores of it"
    if not chosen:
        raise InputError(f"--reference={folder} has no reference scores: compute some with --make_reference")
    return chosen, left_out


def _anchor(transfer: Transfer, reference: Reference, place: Place) -> int:
    """On how many test items a shipped arm, trained here again under the first seed, differs from its shipped scores.

    -1 where the reference has no such arm.
    """
    arm = reference.arms.get(ANCHOR)
    if arm is None:
        return -1
    first = transfer.flags["seeds"][:1]
    values = {**_values(transfer, place), "seeds": first, "strategies": (ANCHOR,), "learning_rate": arm.rate}
    where = place.output / "fits" / transfer.name / "anchor"
    experiment = _of_fits(values, where, arm.end, place)
    where.parent.mkdir(parents=True, exist_ok=True)
    [result] = fit.complete(experiment)
    predicted, labels = predictions.read(where / result.predictions, result.predictions_sha256)
    return int(((predicted == labels) != arm.target[0]).sum())


def _counted(version: str, parts: Sequence[OnTransfer]) -> int:
    """Which strategy this is, from 1, whose verdict on the items that confirm is looked at by this user here.

    It is counted in the cache of looks, by what the fits predict: a strategy under another name is the same. 1 where
    there is no cache.
    """
    seen = hashlib.sha256("".join(strategy_cards.digest(part.arm) for part in parts).encode()).hexdigest()
    cache = looks.place()
    if cache is None:
        return 1
    file = cache.parent / "cards" / f"{plan.file_name(version)}.json"
    try:
        digests = (directory.read_record(file, {"seen": [str]}) or {"seen": []})["seen"]
        digests = digests if seen in digests else [*digests, seen]
        file.parent.mkdir(parents=True, exist_ok=True)
        directory.write_record(file, {"seen": digests})
    except OSError:
        return 1
    return digests.index(seen) + 1


# ---- An arm


def _values(transfer: Transfer, place: Place) -> dict[str, Any]:
    """{flag: value} of the fits of a transfer, from a source that is trained once for all that start from it."""
    flags = {**transfer.flags, **place.more}
    if not flags.get("source"):
        return flags
    # Transfers of one source share its folder whatever else is theirs: how long a fit trains, say, is said of both.
    of_target = {"target", "train_examples", "strategies", *(name for name in flags if f"source_{name}" in flags)}
    of_source = {name: value for name, value in flags.items() if name not in of_target}
    seeds = (*flags["seeds"], *transfer.tuning_seeds)
    settings = Settings.from_flags(**{**of_source, "seeds": seeds, "validation": 0.0})
    task = plan.source_task(settings)
    planned = plan.planned_sources(settings, task)
    digest = plan.group_name(result.key for result in planned.values())
    workdir = place.output / "sources" / f"{plan.file_name(task.name)}-{digest}"
    workdir.parent.mkdir(exist_ok=True)
    settings = replace(settings, workdir=str(workdir))
    with directory.opened(settings, "pretrain") as folder:
        directory.record_environment(folder, {task.name: task.fingerprint})
        fit.train_sources(settings, task, folder, place.execution)
    rest = {name: value for name, value in flags.items() if name != "source" and not name.startswith("source_")}
    return {**rest, "source_checkpoint": str(workdir)}


def _arm(transfer: Transfer, text: str, place: Place) -> tuple[Arm, JudgedItems, tuple[str, str | None, str | None]]:
    """(A strategy's arm, the test items, digests of the test sets); an arm that is there is not trained again."""
    label = plugins.called(text)
    values = {**_values(transfer, place), "strategies": (text,)}
    tried, items = _trials_of(values, transfer, place)
    end = _end_of(tried)
    key = _key(tried, transfer, end)
    file = place.output / "arms" / transfer.name / f"{plan.file_name(label)}.json"
    evals = _evaluations(tried, transfer)
    test_sets = _test_sets(tried, evals, transfer.shift)
    known = directory.read_record(file)
    if known is not None and known["key"] == key:
        return arm_from_record(known), items, test_sets
    console.say(f"{transfer.title}: {label}")
    began = time.process_time()
    task, trained = _search_task(tried, items, place)
    measured = [_prepared(task, _at_rate(tried, rate), trained) for rate in transfer.rates]
    scores, explored = _tried(task, tried, [each for of_rate in measured for each in of_rate], items)
    shape = (len(transfer.rates), len(transfer.tuning_seeds))
    chosen = int(scores.reshape(shape).mean(1).argmax())
    rate = transfer.rates[chosen]
    where = place.output / "fits" / transfer.name / plan.file_name(label)
    where.parent.mkdir(parents=True, exist_ok=True)
    final = {**values, "learning_rate": rate}
    experiment = _of_fits(final, where, end, place)
    with directory.opened(experiment.settings, "transfer") as folder:
        results = fit.within(experiment, folder, plan.fingerprints(experiment))
        arm = _scored(experiment, results, evals, transfer.shift, folder)
    arm = arm._replace(
        rate=rate,
        trials=tuple(map(tuple, scores.reshape(shape).round(6).tolist())),
        explored=explored.reshape(*shape, 2).round(6),
        end=end,
    )
    arm = arm._replace(cost={**arm.cost, "cpu_seconds": round(time.process_time() - began, 1)})
    file.parent.mkdir(parents=True, exist_ok=True)
    directory.write_record(file, {**arm_to_record(arm), "key": key})
    return arm, items, test_sets


def _trials_of(values: Mapping[str, Any], transfer: Transfer, place: Place) -> tuple[Experiment, JudgedItems]:
    """(The experiment of a strategy's trials, at whatever rate; the test items of its target)."""
    settings = Settings.from_flags(**{**values, "seeds": transfer.tuning_seeds})
    tried = plan.prepare(settings, place.execution, only=True)
    assert tried.source is not None
    [budget] = settings.train_examples
    return tried, strategy_cards.items_of(tried.source.name, tried.target, budgets.total(budget, tried.target))


def _key(tried: Experiment, transfer: Transfer, end: str) -> str:
    """SHA-256 of all that decides the scores of an arm."""
    parts = [*plan.planned(tried), tried.strategies[0].label, transfer.digest, end]
    versions = directory.environment({})["versions"]
    return hashlib.sha256(json.dumps([parts, versions]).encode()).hexdigest()


def _of_fits(values: Mapping[str, Any], where: Path, end: str, place: Place) -> Experiment:
    """The experiment of an arm's fits, on all labels."""
    flags = {**values, "validation": 0.0, "workdir": str(where), "verdict_of": end}
    return plan.prepare(Settings.from_flags(**flags), place.execution, only=True)


def _end_of(experiment: Experiment) -> str:
    """Which parameters an arm is judged by: what the strategy's `finish` gives, if that is one; else the last."""
    [(_, start)] = plan.first_starts(experiment)
    names = list(start.finish(start.params)) if start.finish else []
    return names[0] if len(names) == 1 else "last"


def _at_rate(experiment: Experiment, rate: float) -> Experiment:
    recipe = replace(experiment.settings.recipe, learning_rate=rate)
    return experiment._replace(settings=replace(experiment.settings, recipe=recipe))


# ---- Trials


def _search_task(tried: Experiment, items: JudgedItems, place: Place) -> tuple[SearchTask, Mapping[int, Trained]]:
    """(The task of trials, evaluated on their validation examples and on the items that explore; {seed: source})."""
    trained = fit.obtain_source(tried.settings, tried.source, place.output, place.execution)
    task = trials.search_task(tried, tried.settings.train_examples[0])
    target = tried.target
    parts = target.train.inputs(task.rows), target.test.inputs(items.halves["explore"])
    inputs = np.concatenate([np.asarray(part) for part in parts])
    multiple = place.execution.evaluation_batch or evaluate.BATCH
    on_device = task.on_device._replace(test=evaluate.padded(inputs, multiple), tests=len(inputs))
    return task._replace(on_device=on_device), trained


def _prepared(task: SearchTask, tried: Experiment, trained: Mapping[int, Trained]) -> list[PreparedFit]:
    """The trials of a strategy at one rate, one a tuning seed."""
    return [trials.prepare(task, tried, seed, trained) for seed in tried.settings.seeds]


def _tried(
    task: SearchTask, tried: Experiment, fits: Sequence[PreparedFit], items: JudgedItems
) -> tuple[np.ndarray, np.ndarray]:
    """(Accuracy of trials on their validation examples, float [fits]; on halves of the items that explore, [fits, 2]).

    A trial that diverged scores 0. Raises process.Stopped where a signal came before the end.
    """
    goal, targets = task.on_device.objective, np.asarray(task.on_device.task.train.targets)
    rows, halves = items.halves["explore"], strategy_cards.trial_halves(items)
    scores, explored = np.full(len(fits), np.nan), np.full((len(fits), 2), np.nan)
    with process.signals_handled() as signal_number:
        for i, logits in trials.ends(task, tried, fits, lambda: bool(signal_number())):
            if logits is None:
                scores[i], explored[i] = 0.0, 0.0
                continue
            held_out = fits[i].validation
            scores[i] = evaluate.score(goal, logits[np.searchsorted(task.rows, held_out)], targets[held_out])
            right = logits[len(task.rows) :].argmax(-1) == items.labels[rows]
            explored[i] = [right[halves == half].mean() for half in range(2)]
        if np.isnan(scores).any():
            raise process.Stopped(signal_number(), "stopped among trials, which are not kept; the same command goes on")
    return scores, explored


# ---- Scores of the fits


def _evaluations(experiment: Experiment, transfer: Transfer) -> list[evaluations.Evaluation]:
    """The test sets of a source that is trained here and of the shift, whose scores of items are kept."""
    names = [*(["source"] if transfer.flags.get("source") else []), *([transfer.shift] if transfer.shift else [])]
    return [each._replace(keep=True) for each in evaluations.read(experiment.settings, names, [experiment], keep=True)]


def _test_sets(
    experiment: Experiment, evals: Sequence[evaluations.Evaluation], shift: str
) -> tuple[str, str | None, str | None]:
    """Digests of the test sets of target, source and shift."""
    of_evals = {each.name: confirmation.digest_of_test_set(next(iter(each.tasks.values()))) for each in evals}
    return confirmation.digest_of_test_set(experiment.target), of_evals.get("source"), of_evals.get(shift)


def _scored(
    experiment: Experiment,
    results: Sequence[Result],
    evals: Sequence[evaluations.Evaluation],
    shift: str,
    folder: Path,
) -> Arm:
    """The item scores of an arm's fits, and what they cost."""
    name = experiment.strategies[0].label
    evaluations.measured(experiment, results, evals, folder, start=False)
    right: dict[str, np.ndarray | None] = {"source": None, "shift": None}
    for each in evals:
        if each.name == "source" and name == "scratch":
            continue
        task = next(iter(each.tasks.values()))
        kept = [evaluations.kept(folder, each.name, task, result) > 0 for result in results]
        right["source" if each.name == "source" else "shift"] = np.stack(kept)
    items = len(experiment.target.test)
    target = np.zeros((len(results), items), bool)
    for row, result in enumerate(results):
        if not result.diverged:
            predicted, labels = predictions.read(folder / result.predictions, result.predictions_sha256)
            target[row] = predicted == labels
    lost = tuple(row for row, result in enumerate(results) if result.diverged)
    cost = _cost(experiment, results, folder)
    return Arm(name, 0.0, target, right["source"], right["shift"], lost, (), np.zeros(0), cost, "last")


def _cost(experiment: Experiment, results: Sequence[Result], folder: Path) -> dict[str, Any]:
    """What a fit of an arm costs; see `Arm.cost`."""
    first, of_fits = results[0], costs.of_fits(experiment, results, folder)
    head = paths.inside(models.names(experiment.model)[-1:])
    known = [result.seconds for result in results if result.seconds is not None]
    return {
        "trained": first.trained_parameters,
        "total": first.total_parameters,
        "beside": sum(trains for path, _, trains in first.leaves or () if not head(path)),
        "steps": first.steps,
        "step_flops": float(np.mean([of_fits[result.name]["step_flops"] for result in results])),
        "seconds": round(float(np.mean(known)), 3) if known else None,
        "peak_bytes": max((result.peak_bytes or 0 for result in results), default=0) or None,
    }


# ---- A reference


def _make_reference(options: CardFlags, folder: Path, known: Mapping[str, Path], place: Place) -> None:
    """Compute the scores of all shipped strategies on one transfer after another, and write each file whole."""
    names = plugins.split(options.strategy, ",") if options.strategy else plugins.names("tljax.strategies", "strategy")
    names = ["scratch", *(name for name in names if name != "scratch")]
    target = place.output / "reference"
    target.mkdir(exist_ok=True)
    for name in options.transfers or known:
        try:
            transfer = strategy_cards.read_transfer(known[name], options.manual_dir)
        except InputError as error:
            console.say(f"{name} is left out: {error}")
            continue
        began, arms, left_out = time.process_time(), [], {}
        prepared = _prepared_for(transfer, place)
        test_sets: tuple[str, str | None, str | None] | None = None
        for strategy in names:
            try:
                arm, _, test_sets = _arm(transfer, strategy, prepared)
            except InputError as error:
                left_out[strategy] = str(error)
                console.say(f"{transfer.name}: {strategy} is left out: {error}")
                continue
            arms.append(arm)
        if not test_sets:
            raise InputError(f"{transfer.name}: no strategy can be trained: {next(iter(left_out.values()))}")
        masks_of = _random_masks(transfer, prepared)
        environment = directory.environment({})
        record = {
            "transfer": transfer.name,
            "flags_sha256": transfer.digest,
            **dict(zip(("target", "source", "shift"), test_sets, strict=True)),
            "source_accuracy": _source_accuracy(transfer, prepared),
            "arms": [arm_to_record(arm) for arm in arms],
            "left_out": left_out,
            "masks": masks_of,
            "environment": {key: environment[key] for key in ("python", "platform", "versions")},
        }
        directory.replace(
            target / f"{name}.json", json.dumps(directory.with_sum(json.loads(json.dumps(record)))) + "\n"
        )
        console.say(
            f"{transfer.name}: {len(arms)} arms, {len(left_out)} left out, "
            f"{time.process_time() - began:,.0f} s of CPU in this call: {target / name}.json"
        )


def _source_accuracy(transfer: Transfer, place: Place) -> list[float]:
    """The source's own accuracy under each seed of the card; nothing where it is not known, as of weights of others."""
    settings = Settings.from_flags(**_values(transfer, place))
    trained = sources.from_checkpoint(settings).trained
    return [score for seed in settings.seeds if (score := trained[seed].score) is not None]


def _random_masks(transfer: Transfer, place: Place) -> dict[str, Any]:
    """Random masks over the cells of the model, tried as an arm is: every one a value of one program."""
    values = {**_values(transfer, place), "strategies": ("full",)}
    tried, items = _trials_of(values, transfer, place)
    file = place.output / "arms" / transfer.name / "random_masks.json"
    key = _key(tried, transfer, f"{MASKS} masks")
    known = directory.read_record(file)
    if known is not None and known["key"] == key:
        return {name: value for name, value in known.items() if name != "key"}
    console.say(f"{transfer.title}: {MASKS} random masks")
    task, trained = _search_task(tried, items, place)
    of_rates = [_prepared(task, _at_rate(tried, rate), trained) for rate in transfer.rates]
    params, fresh = of_rates[0][0].trial.params, of_rates[0][0].trial.fresh
    names = models.names(tried.model)
    below = [name for name in names[:-1] if any(map(paths.inside((name,)), paths.names(params)))]
    cells = masks.cells(params, below, without=fresh)
    drawn = atlas.draw(len(cells), MASKS)
    in_head = paths.inside(names[-1:])
    drawn_anew = {path for path, is_fresh in paths.items(fresh) if is_fresh} if fresh is not None else set()
    able = zip(paths.names(params), paths.trainable(params), strict=True)
    always = tuple(path for path, can in able if can and (path in drawn_anew or in_head(path)))
    fits = [
        prepared._replace(
            trial=prepared.trial._replace(phases=((0, masks.switched(params, cells, on, always)),), rules=())
        )
        for on in drawn
        for of_rate in of_rates
        for prepared in of_rate
    ]
    _, explored = _tried(task, tried, fits, items)
    shape = (len(drawn), len(transfer.rates), len(transfer.tuning_seeds), 2)
    record = {
        "cells": [cell.name for cell in cells],
        "masks": ["".join(map(str, on.astype(int))) for on in drawn],
        "numbers": (drawn @ np.array([cell.size for cell in cells])).astype(int).tolist(),
        "explored": explored.reshape(shape).round(6).tolist(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    directory.write_record(file, {**record, "key": key})
    return record


QUICK = "xla_backend_optimization_level"
"""XLA's flag of how much LLVM does. Programs of a card are small and run for seconds: at 1 they compile sooner than by
default and run as quickly; at 0 a step of some takes two and a half times as long."""


def _compile_quickly() -> None:
    """Ask for few of LLVM's passes, before JAX reads XLA_FLAGS; what says something of them itself stays as it is."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if QUICK not in text and (not text or text.startswith("-")):
        os.environ["XLA_FLAGS"] = f"{text} --{QUICK}=1".strip()


def main(argv: Sequence[str]) -> None:
    """Read the flags and run."""
    _compile_quickly()
    command_line.main(argv, str(__doc__), lambda _, options: run(options), CardFlags)
