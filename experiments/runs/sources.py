"""Sources: trained here once a seed, or found in a checkpoint."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.runs import budgets, console, directory, fields, fits, training
from experiments.runs.settings import Settings
from tljax import checkpoint, data, masks, models, paths, penalties, plugins, seeds
from tljax.data.files import NO_PIXELS
from tljax.study.results import Result
from tljax.train import Execution
from tljax.types import InputError, Model, Task


class Trained(NamedTuple):
    """The parameters of one source, and how well it does its own task."""

    flat: checkpoint.Flat
    accuracy: float | None
    """On its own test set, a fraction; None if it diverged."""
    fisher: checkpoint.Flat | None
    """Its Fisher information, if it was saved."""


class Source(NamedTuple):
    """What transfer knows of a source before it is there, and how to get it."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    identity: Mapping[int, str]
    """{seed: what its parameters follow from, a digest}."""
    obtain: Callable[[Path, Any], Mapping[int, Trained]]
    """(run directory, means) -> {seed: trained source}."""
    fingerprint: str
    fisher: bool
    """Whether its Fisher information is, or will be, saved."""
    note: str = ""
    steps: int | None = None
    """That its fit takes or took, if that is known."""
    recipe: str = ""
    """What its fits of all seeds have in common, a digest or a text."""
    names: Mapping[str, str] = {}
    """{path: name of its array in a file of weights}; a path that is not in it is its own name."""


def load(made: Settings, name: str, shape: Any) -> Task:
    """The data set of a name, from where the flags say that data are.

    Its pixels are brought to `shape`, that of --image_shape or of what it goes with; features, which have other shapes
    than [height, width, channels], stay as they are.
    """
    places = {"data_dir": made.data_dir, "manual_dir": made.manual_dir}
    wanted = shape if shape and (len(shape) == 3 or shape == made.image_shape) else None
    try:
        return data.load(name, **places, image_shape=wanted, say=console.say)
    except InputError as error:
        of_flag = made.image_shape and (name == made.source or not (made.source or made.source_checkpoint))
        if of_flag and str(error).endswith(NO_PIXELS):
            raise InputError(f"{error}, or leave out --image_shape") from error
        raise


def _trained(fits: Mapping[str, checkpoint.Flat], name: str, accuracy: float | None) -> Trained:
    return Trained(fits.get(f"{name}.merged", fits[name]), accuracy, fits.get(f"{name}.fisher"))


def from_data(made: Settings) -> Source:
    """The source that `--source` names: trained in the run directory unless it is there."""
    task = checked(made)
    plan = _planned(made, task)

    def obtain(folder: Path, execution: Execution) -> dict[int, Trained]:
        lines = train(made, task, folder, execution)
        places = {line.checkpoint for line in lines.values()}
        loaded = {place: checkpoint.load(folder / place)[0] for place in places}
        return {seed: _trained(loaded[line.checkpoint], line.name, line.test_accuracy) for seed, line in lines.items()}

    identity = {seed: line.key for seed, line in plan.items()}
    shape = tuple(task.train.images.shape[1:])
    steps = fits.steps(made.source_recipe, len(fits.chosen(made.source_recipe, "all", task, 0)[0]))
    recipe = next(iter(plan.values())).recipe or ""
    return Source(
        task.name, task.classes, shape, identity, obtain, task.fingerprint, made.save_fisher, task.note, steps, recipe
    )


def checked(made: Settings) -> Task:
    """The source's task, once it is sure that the flags can learn it."""
    task = load(made, made.source or "", made.image_shape)
    params = models.abstract(model(made, len(task.classes)), task.train.images.shape[1:])
    start = fits.Start(params, ((0.0, None),), fresh=None)
    # As dicts, since dataclasses that share a nan differ from Python 3.13 on.
    own = vars(made.source_recipe) != vars(made.recipe)
    terms, _ = penalties.read(made.source_recipe.penalty)
    if held := [term.name for term in terms if "fisher" in term.needs]:
        remedy = "another --penalty, or none"
        if made.target:
            remedy = "--source_penalty= for the source's own fit" + ", and --save_fisher" * (not made.save_fisher)
        flag = "--source_penalty" if own else "--penalty"
        raise InputError(
            f"{flag}={made.source_recipe.penalty} is the source's too, and {held[0]} holds a fit to what "
            f"another's Fisher information says, which nobody has before a source is trained: give {remedy}"
        )
    fits.check(made.source_recipe, "all", task, start, "source_" if own else "")
    return task


def model(made: Settings, classes: int) -> Model:
    """The model that the flags describe, for so many classes."""
    return models.build(made.model, classes, hidden=made.hidden, activation=made.activation)


def _planned(made: Settings, task: Task) -> dict[int, Result]:
    """{seed: the fit that is to give its source}."""
    lines = {}
    draws = fits.draws(made, model(made, len(task.classes)), tuple(task.train.images.shape[1:]))
    for seed in made.seeds:
        about: dict[str, Any] = {
            "source": None,
            "target": task.name,
            "strategy": "pretrain",
            "options": {},
            "seed": seed,
            "train_examples": len(task.train.labels),
        }
        decisive = {
            "fingerprint": task.fingerprint,
            "model": architecture(made),
            "recipe": made.source_recipe,
            "streams": _streams(made, seed),
            "fisher": made.save_fisher,
            "code": fits.code(made.source_recipe, made.model),
            "many": fits.company(made),
            **draws,
        }
        recipe = {name: value for name, value in decisive.items() if name not in ("streams", "many")}
        lines[seed] = fits.identify(f"pretrain-{task.name}-seed{seed}", about, decisive, recipe)
    return lines


def architecture(made: Settings) -> dict[str, Any]:
    """What a checkpoint says of the model that the flags describe."""
    code = plugins.outside_digest(made.model, "tljax.models", "model")
    own = {"model": made.model, "hidden": list(made.hidden), "activation": made.activation}
    return own | ({"code": code} if code else {})


def _streams(made: Settings, seed: int) -> seeds.Seeds:
    return seeds.streams(seeds.streams(seed, source=made.source_seed).source)


def train(made: Settings, task: Task, folder: Path, execution: Execution) -> dict[int, Result]:
    """Train the sources that the run directory does not hold yet; {seed: its line}."""
    plan = _planned(made, task)
    there = directory.finished(folder)
    missing = {seed: line for seed, line in plan.items() if line.key not in there}
    if missing:
        missing = plan if made.many == "vmap" else missing
        field = fits.arena(task, made.source_recipe, execution)
        ready = [_ready(made, field, seed, line) for seed, line in missing.items()]
        with console.progress(f"source {task.name}", sum(len(fit.trial.rates) for fit in ready)) as advance:
            training.run(field, ready, folder, about(made, task), advance, made.checkpoint_every, made.save_fisher)
    done = directory.finished(folder)
    return {seed: done[line.key] for seed, line in plan.items()}


def about(made: Settings, task: Task) -> dict[str, Any]:
    """What a checkpoint says of itself, so that it can be a source."""
    return {
        "task": task.name,
        "fingerprint": task.fingerprint,
        "classes": list(task.classes),
        "shape": list(task.train.images.shape[1:]),
        "model": architecture(made),
        "note": task.note,
    }


def title_and_notes(made: Settings, source: Source | None, target: Task) -> tuple[str, list[str]]:
    """What fits of one source, or none, and one target are called, and what every table must say of their data."""
    notes = [f"{what}: {of.note}" for what, of in (("source", source), ("target", target)) if of and of.note]
    name = f"{source.name if source else 'no source'} -> {target.name}"
    return name, [*notes, *budgets.notes(made.train_examples, target, made.recipe.validation)]


def _ready(made: Settings, field: fits.Arena, seed: int, result: Result) -> fits.Fit:
    streams, built = _streams(made, seed), model(made, len(field.task.classes))
    params = models.init(built, jax.random.key(streams.head), field.data.inputs.shape[2:])
    mask = masks.by_path(params, lambda path: True)
    start = fits.Start(params, ((0.0, mask),), fresh=mask)
    return fits.build(field, built, start, streams, "all", result)


def stand_ins(made: Settings, trial_seeds: Sequence[int]) -> dict[int, int]:
    """{seed of a trial: seed of the source that it starts from}, where `--source_checkpoint` has a source a seed.

    Sources of seeds that are not among --seeds come first, so that trials and final fits share none as long as there
    are others; each is taken again when all are, and one that diverged never. Empty for a checkpoint of one source,
    which serves every seed. Raises InputError for no source of a seed of --seeds.
    """
    places = _places(Path(made.source_checkpoint or ""))
    if len(places) < 2:
        return {}
    _require_seeds(made, list(places), made.seeds)
    told = {place: _about(place)["fits"] for place in {place for place, _ in places.values()}}
    sound = [seed for seed, (place, name) in sorted(places.items()) if told[place].get(name, {}).get("accuracy")]
    ranked = [seed for seed in sound if seed not in made.seeds] or sound or sorted(places)
    return {seed: ranked[i % len(ranked)] for i, seed in enumerate(trial_seeds)}


def _require_seeds(made: Settings, seeds_there: Sequence[int], needed: Sequence[int]) -> None:
    if missing := sorted(set(needed) - set(seeds_there)):
        raise InputError(
            f"--source_checkpoint={made.source_checkpoint} has sources for the seeds {sorted(seeds_there)}, not for "
            f"{missing}: change --seeds"
        )


def from_checkpoint(made: Settings, model_too: bool = True, stand_ins: Mapping[int, int] | None = None) -> Source:
    """The source that `--source_checkpoint` names: one for all seeds, or one for each.

    `stand_ins` has {seed: seed of the source that it takes} of seeds that have none of their own. Without `model_too`
    its parameters are taken as they are, whatever model the flags describe, and even where the file of the model is
    gone. Raises InputError for a folder that holds none, a source of another model, or no source for a seed.
    """
    places = _places(Path(made.source_checkpoint or ""))
    _say_former(Path(made.source_checkpoint or ""), places)
    told = {place: _about(place) for place in {place for place, _ in places.values()}}
    for place, name in places.values():
        if name not in told[place]["fits"]:
            raise InputError(f"checkpoint '{place}' holds no fit '{name}': train it again")
    one = next(iter(told.values()))
    other = differs(made, one["model"]) if model_too else ""
    source_seeds = {seed: (stand_ins or {}).get(seed, seed) for seed in made.seeds}
    if len(places) > 1:
        _require_seeds(made, list(places), list(source_seeds.values()))
    only_place = next(iter(places.values()))
    chosen = {seed: places[own] if len(places) > 1 else only_place for seed, own in source_seeds.items()}
    leaves = {seed: told[place]["sha256"] for seed, (place, _) in chosen.items()}
    sums = {
        seed: json.dumps(leaves[seed].get(f"{name}.merged", leaves[seed][name]), sort_keys=True)
        for seed, (_, name) in chosen.items()
    }
    loaded = {place: checkpoint.load(place) for place in {place for place, _ in chosen.values()}}
    if model_too:
        _require_leaves(made, one, loaded)
    if other:
        console.say(f"{other}; the paths and shapes of its parameters are the same, so it is used")
    trained = {
        seed: _trained(loaded[place][0], name, loaded[place][1]["fits"][name]["accuracy"])
        for seed, (place, name) in chosen.items()
    }
    for seed, one_of in trained.items():
        if one_of.accuracy is None:
            raise InputError(
                f"--source_checkpoint={made.source_checkpoint}: the source of seed {seed} diverged: train it again"
            )
    identity = {seed: hashlib.sha256(text.encode()).hexdigest() for seed, text in sums.items()}
    shape = tuple(one["shape"])
    fisher = all(of["fisher"] for of in told.values())
    classes, note = tuple(one["classes"]), one.get("note", "")
    return Source(
        one["task"],
        classes,
        shape,
        identity,
        lambda folder, execution: trained,
        one["fingerprint"],
        fisher,
        note,
        (steps := _steps([told[place]["fits"][name] for place, name in chosen.values()])),
        f"{one['fingerprint']} {one['model']} {steps}" if len(places) > 1 else min(identity.values()),
    )


def differs(made: Settings, there: Mapping[str, Any]) -> str:
    """How the model that the flags describe differs in writing from a source's: '' where it does not.

    Whether it is another model is for the paths and shapes of its parameters to say (`refuse_model`); but an activation
    has none, so another is refused here. A file of the same code under another path is the same. Raises InputError.
    """
    here = architecture(made)
    names = [name for name in sorted(here.keys() | there.keys()) if there.get(name) != here.get(name)]
    if "activation" in names:
        raise _other_model(made, there, [name for name in names if name != "code"])
    if "code" in here and here["code"] == there.get("code") and _function(here["model"]) == _function(there["model"]):
        names = [name for name in names if name != "model"]
    whom = made.source_checkpoint
    texts = [
        f"--{name} is {_plain(here[name])} here and " + (f"was {_plain(there[name])}" if name in there else "not known")
        for name in names
        if name != "code"
    ]
    texts = [f"{', '.join(texts)} when {whom} was trained"] if texts else []
    if "code" in names and {"code"} <= here.keys() & there.keys() and "model" not in names:
        texts.insert(0, f"{Path(plugins.parse(here['model']).name).name} changed since {whom} was trained")
    return "; ".join(texts)


def _function(model_text: str) -> list[str]:
    """What stands after the file or module in the name of a model."""
    return list(plugins.parse(model_text).words)


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_model(made: Settings, there: Mapping[str, Any], error: InputError) -> InputError:
    """What is said of a source whose parameters are not those of the model that the flags describe."""
    here = architecture(made)
    names = [name for name in here if name in there and there[name] != here[name] and name != "code"]
    if here.get("code") != there.get("code") and "model" not in names:
        return InputError(f"{error}; the file of --model={made.model} has changed since: give it as it was")
    return _other_model(made, there, names) if names else error


def _other_model(made: Settings, there: Mapping[str, Any], names: Sequence[str]) -> InputError:
    here = architecture(made)
    differ = "; ".join(f"--{name}={there.get(name)} there, {here.get(name)} here" for name in names)
    plain = ((name, there.get(name)) for name in names)
    give = " ".join(f"--{name}={_plain(value)}" for name, value in plain)
    return InputError(f"--source_checkpoint={made.source_checkpoint} is of another model ({differ}): give {give}")


def told(place: Path) -> dict[str, Any]:
    """What the first source of a run directory or checkpoint says of itself."""
    return _about(next(iter(_places(place).values()))[0])


def _steps(fits: Sequence[Mapping[str, Any]]) -> int | None:
    """The most that any took, if all say so."""
    taken = [fit.get("steps") for fit in fits]
    return max(taken) if all(type(steps) is int for steps in taken) else None  # type: ignore[type-var]


MODEL: fields.Form = {"model?": str, "hidden?": [int], "activation?": str, "code?": str}
"""What a source says of its model; a file of weights may say less than `architecture`."""
_ABOUT: fields.Form = {
    **{"task": str, "fingerprint": str, "classes": [str], "shape": [int], "model": MODEL, "fisher": bool},
    **{"fits": dict, "note?": str},
}
"""What a checkpoint says of itself if it can be a source."""
_FIT: fields.Form = {"seed": int, "accuracy": (float, None), "steps?": (int, None)}
"""What it says of each fit."""


def _about(place: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; raises InputError where that is not what a source says."""
    told = checkpoint.about(place)
    if odd := fields.fault(told, _ABOUT):
        raise InputError(f"checkpoint '{place}' does not say enough ({odd}): give one that experiments.pretrain left")
    if not told["classes"] or not told["shape"] or min(told["shape"]) < 1:
        raise InputError(f"checkpoint '{place}' has no classes or no shape: give one that experiments.pretrain left")
    for name, fit in told["fits"].items():
        if fields.fault(fit, _FIT) or name not in told["sha256"]:
            raise InputError(f"checkpoint '{place}' holds no fit '{name}': train it again")
    return told


def _require_leaves(made: Settings, told: Mapping[str, Any], loaded: Mapping[Path, Any]) -> None:
    """Raise InputError unless all fits have the leaves of the model that the checkpoint names, if need be merged."""
    like = models.abstract(model(made, len(told["classes"])), tuple(told["shape"]))
    for place, (state, _) in loaded.items():
        for name, flat in state.items():
            if f"{name.removesuffix('.best')}.merged" in state:
                continue  # it has the leaves of its strategy too
            try:
                checkpoint.unflatten(flat, like)
            except InputError as error:
                found = InputError(f"checkpoint '{place}', fit '{name}': {error}")
                raise refuse_model(made, told["model"], found) from error


def _say_former(folder: Path, places: Mapping[int, tuple[Path, str]]) -> None:
    """Say which sources a run directory's sources replaced, after an edit of the file of their model."""
    if not (folder / "results.jsonl").is_file():
        return
    gone = directory.superseded(folder)
    former: dict[int, list[str]] = {}
    for line in directory.results(folder):
        if line.strategy == "pretrain" and line.key in gone and line.seed in places:
            former.setdefault(line.seed, []).append(line.name)
    for seed, names in former.items():
        console.say(
            f"of the sources of seed {seed} in {folder}, '{places[seed][1]}' is taken; {paths.some(names)} "
            f"{'is' if len(names) == 1 else 'are'} of code that was changed later"
        )


def _places(folder: Path) -> dict[int, tuple[Path, str]]:
    """{seed: (checkpoint, name of the fit)} of a run directory's sources, or of one checkpoint."""
    if (folder / "results.jsonl").is_file():
        gone = directory.superseded(folder)
        every = [line for line in directory.results(folder) if line.strategy == "pretrain"]
        lines = [line for line in every if line.key not in gone]
        if len({line.seed for line in lines}) < len(lines):
            names = paths.some(list(dict.fromkeys(line.checkpoint for line in lines)))
            raise InputError(f"--source_checkpoint={folder} holds several sources: name one of {names}")
        if lines:
            return {line.seed: (folder / line.checkpoint, line.name) for line in lines}
        raise InputError(f"--source_checkpoint={folder} is a run without a source: name one of its checkpoints/")
    places: dict[int, tuple[Path, str]] = {}
    for name, fit in _about(folder)["fits"].items():
        if fit["seed"] in places:
            raise InputError(
                f"checkpoint '{folder}' holds two fits of seed {fit['seed']}, '{places[fit['seed']][1]}' and "
                f"'{name}': train each in a run directory of its own"
            )
        places[fit["seed"]] = folder, name
    return places
