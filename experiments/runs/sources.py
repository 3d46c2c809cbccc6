"""Where a source comes from, and its parameters, whoever trained it.

A source is a run directory or a checkpoint that experiments.pretrain, zoo or transfer left, or a .safetensors or .npz
file of weights that were trained elsewhere, with a card that says what they are of. (One that `--source` names is
still to be trained: `plan.source_from_data`, `fit.train_sources`.)

The card of net.safetensors is net.safetensors.json beside it: {"task": "mnist", "classes": ["0", "1", ...], "shape":
[28, 28, 1]}, whose pixels it takes as 0 to 1; and, as far as they are known, "model" ({"model": "mlp", "hidden": [512],
"activation": "relu"}), "rules" (a name or file of rules as `tljax.weights.rules` has them; --source_rules in its
place), "rename" (rules that come before those; --source_rename in their place), "head" (false, with "classes": [], of
weights that have none), "accuracy", "steps", the data's "fingerprint" and the "note" that every table must have of
them, and of converted ones the "source" (file, SHA-256, package, version, licence). A card of experiments.export has
the SHA-256 of the weights and of itself, and both are held against them; one that is written by hand has none.
"""

import hashlib
import json
import math
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs import command_line, console, directory, fields, process
from experiments.runs.command_line import flag, path_from_folders, written_from
from experiments.runs.settings import Recipe, Settings
from tljax import batch_stats, checkpoint, files, models, paths, plugins, weights
from tljax.data.images import RESIZES
from tljax.study import results, units
from tljax.study.results import Result
from tljax.study.units import ACCURACY
from tljax.types import InputError, Metric, Model, Params, Task
from tljax.weights import delta, pytorch


class Trained(NamedTuple):
    """The parameters of one source, and how well it does its own task."""

    flat: checkpoint.Flat
    score: float | None
    """Accuracy (a fraction) or its metric on its own test set; None if it diverged, or if that is not known."""
    fisher: checkpoint.Flat | None
    """Its Fisher information, if it was saved."""
    metric: Mapping[str, Any] | None = None
    """What the score is, where it is not accuracy, as `Result.metric` has it."""


class Source(NamedTuple):
    """What is known of a source, before it is trained or after."""

    name: str
    classes: tuple[str, ...]
    shape: models.Shape
    identity: Mapping[int, str]
    """{seed: a digest of what its parameters follow from}."""
    fingerprint: str
    fisher: bool
    """Whether its Fisher information is, or will be, saved."""
    note: str = ""
    steps: int | None = None
    """The steps that its fit takes or took, if they are known."""
    recipe: str = ""
    """What its fits of all seeds have in common, a digest or a text."""
    trained: Mapping[int, Trained] = {}
    """{seed: its parameters}, if it was read."""
    task: Task | None = None
    """What it learns, if it is to be trained in the run directory: `fit.obtain_source` has its parameters."""
    names: Mapping[str, str] = {}
    """{path: name of its array in a file of weights}; a path that is not in it is its own name."""
    kind: str = "classes"
    """What its targets are, as `Task.kind`."""
    outputs: int = 0
    """How many numbers its head gives, as `Task.outputs`."""
    resize: str = "squash"
    """How images of another aspect were brought to its shape."""
    headless: bool = False
    """Whether it has no head of its own, but zeros in its place."""
    resizes: bool = False
    """Whether a rule brings its positions to the grid of its shape."""


def from_checkpoint(settings: Settings, stand_ins: Mapping[int, int] | None = None, *, trains: bool = True) -> Source:
    """The source that `--source_checkpoint` names: one for all seeds, or one for each.

    `stand_ins` has {seed: seed of the source that it takes} of seeds that have none of their own. `trains` says whether
    the program trains, and so has flags of a fit that a message can name. Raises InputError for a place that holds
    none, a source of another model, or no source for a seed.
    """
    if is_weights_file(settings.source_checkpoint):
        return _from_weights_file(settings, trains)
    return _from_run(settings, stand_ins=stand_ins, trains=trains)


def is_weights_file(place: str | None) -> bool:
    """Whether `--source_checkpoint` names weights from elsewhere: a file, shards, or a model of the hub's cache."""
    return place is not None and weights.is_place(place)


def refuse_rules(settings: Settings) -> None:
    """Raise InputError for rules where there is no file of weights."""
    for name in rule_flags(settings):
        if not is_weights_file(settings.source_checkpoint):
            raise InputError(
                f"--{name} is for weights from elsewhere: leave it out, or give --source_checkpoint=FILE.safetensors"
            )


def rule_flags(settings: Settings) -> list[str]:
    """The flags of rules that are given."""
    return [name for name in ("source_rename", "source_rules") if getattr(settings, name)]


def read_rules(settings: Settings, card: Mapping[str, Any], file: Path) -> tuple[weights.Rule, ...]:
    """The rules of the flags, or else of the card: those by themselves, then those of a name or file.

    A file that a card names is found from the working directory, or from beside the card. Raises InputError for what
    is no rule.
    """
    single = [weights.rule(text) for text in settings.source_rename or card.get("rename", ())]
    name = settings.source_rules or card.get("rules", "")
    if not settings.source_rules and name and (file.parent / name).is_file() and not Path(name).is_file():
        name = str(file.parent / name)
    return (*single, *(weights.read_rules(name) if name else ()))


def stand_ins(settings: Settings, trial_seeds: Sequence[int]) -> dict[int, int]:
    """{seed of a trial: seed of the source that it starts from}, where `--source_checkpoint` has a source a seed.

    Sources of seeds that are not among --seeds come first, so that trials and final fits share none as long as there
    are others; each is taken again when all are, and one that diverged never. Empty without --source_checkpoint, and
    for a checkpoint of one source or a file of weights, which serve every seed. Raises InputError for no source of a
    seed of --seeds.
    """
    if not settings.source_checkpoint or is_weights_file(settings.source_checkpoint):
        return {}
    places = _places(Path(settings.source_checkpoint))
    if len(places) < 2:
        return {}
    _require_seeds(settings, list(places), settings.seeds)
    fits = {place: _read_about(place)["fits"] for place in {place for place, _ in places.values()}}
    sound = [seed for seed, (place, name) in sorted(places.items()) if not _is_diverged(fits[place].get(name, {}))]
    ranked = [seed for seed in sound if seed not in settings.seeds] or sound or sorted(places)
    return {seed: ranked[i % len(ranked)] for i, seed in enumerate(trial_seeds)}


# ---- A run directory, or a checkpoint in it


def _from_run(
    settings: Settings, model_too: bool = True, stand_ins: Mapping[int, int] | None = None, trains: bool = True
) -> Source:
    """The source in a run directory or checkpoint; as `from_checkpoint`.

    Without `model_too` its parameters are taken as they are, whatever model the settings describe, and even where the
    file of the model is gone.
    """
    places = _places(Path(settings.source_checkpoint or ""))
    _say_superseded(Path(settings.source_checkpoint or ""), places)
    abouts = {place: _read_about(place) for place in {place for place, _ in places.values()}}
    for place, name in places.values():
        if name not in abouts[place]["fits"]:
            raise InputError(f"checkpoint '{place}' holds no fit '{name}': train it again")
    about = next(iter(abouts.values()))
    difference = _difference(settings, about["model"]) if model_too else ""
    source_seeds = {seed: (stand_ins or {}).get(seed, seed) for seed in settings.seeds}
    if len(places) > 1:
        _require_seeds(settings, list(places), list(source_seeds.values()))
    only_place = next(iter(places.values()))
    chosen = {seed: places[of_source] if len(places) > 1 else only_place for seed, of_source in source_seeds.items()}
    leaves = {seed: abouts[place]["sha256"] for seed, (place, _) in chosen.items()}
    sums = {
        seed: json.dumps(leaves[seed].get(f"{name}.merged", leaves[seed][name]), sort_keys=True)
        for seed, (_, name) in chosen.items()
    }
    loaded = {place: checkpoint.load(place) for place in {place for place, _ in chosen.values()}}
    if model_too:
        loaded = _require_leaves(settings, about, loaded, trains)
    if difference:
        console.say(f"{difference}; {_USED}")
    trained = {
        seed: from_state(loaded[place][0], name, *_measured(loaded[place][1]["fits"][name]))
        for seed, (place, name) in chosen.items()
    }
    for seed, (place, name) in chosen.items():
        if _is_diverged(abouts[place]["fits"][name]):
            raise InputError(
                f"--source_checkpoint={settings.source_checkpoint}: the source of seed {seed} diverged: train it again"
            )
    identity = {seed: hashlib.sha256(text.encode()).hexdigest() for seed, text in sums.items()}
    steps = _most_steps([abouts[place]["fits"][name] for place, name in chosen.values()])
    kind, shape, outputs = _described(about)
    return Source(
        about["task"],
        tuple(about["classes"]),
        shape,
        identity,
        about["fingerprint"],
        all(each["fisher"] for each in abouts.values()),
        about.get("note", ""),
        steps,
        f"{about['fingerprint']} {about['model']} {steps}" if len(places) > 1 else min(identity.values()),
        trained,
        kind=kind,
        outputs=outputs,
        resize=about.get("resize", "squash"),
    )


def positions_remedy(place: str | None, source: Source) -> str:
    """How a source is brought to images of another size: its card's shape, and a rule for its positions if it has any.

    >>> mine = Source("mnist", ("0", "1"), (28, 28, 1), {}, "", False, names={"embedding/position": "pos: reshape"})
    >>> positions_remedy("mine.npz", mine)
    "write this shape into the file's card, and end the rule of 'pos' with `resize`"
    """
    if not is_weights_file(place):
        return (
            "export the source, write this shape into the file's card, and bring a ViT's positions to it by "
            "--source_rename=embedding/position:resize"
        )
    write = "write this shape into the file's card"
    path = next((path for path in source.names if path.endswith("/position")), "")
    array, _, steps = source.names.get(path, "").partition(": ")
    if not path or source.resizes:
        return write
    if array == path and not steps:
        return f"{write}, and bring its positions to it by --source_rename={path}:resize"
    return f"{write}, and end the rule of '{array}' with `resize`"


def shown_shape(shape: models.Shape) -> str:
    """The inputs of one example in words.

    >>> import jax.numpy as jnp
    >>> shown_shape((28, 28, 1)), shown_shape({"text": jax.ShapeDtypeStruct((16,), jnp.int32)})
    ('(28, 28, 1)', 'text int32[16]')
    """
    if isinstance(shape, tuple):
        return str(shape)
    if not isinstance(shape, dict):
        return f"{shape.dtype}{list(shape.shape)}"
    return ", ".join(f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in sorted(shape.items()))


def shape_to_json(shape: models.Shape) -> Any:
    """The inputs of one example as checkpoints and cards say them: [28, 28, 1], or {"dtype": "int32", "shape": [16]},
    or {name: such} of several.

    >>> shape_from_json(shape_to_json((28, 28, 1)))
    (28, 28, 1)
    """
    if isinstance(shape, tuple):
        return list(shape)
    if isinstance(shape, dict):
        return {name: shape_to_json(leaf) for name, leaf in shape.items()}
    return {"dtype": str(shape.dtype), "shape": list(shape.shape)}


def shape_from_json(record: Any) -> models.Shape:
    """The inverse of `shape_to_json`. Raises ValueError for another record, and for too many numbers."""
    if isinstance(record, list) and record and all(type(length) is int and length > 0 for length in record):
        _require_size(record)
        return tuple(record)
    if isinstance(record, dict) and record.keys() == {"dtype", "shape"} and isinstance(record["shape"], list):
        if record["dtype"] in ("uint8", "int32", "float32") and all(type(n) is int and n > 0 for n in record["shape"]):
            _require_size(record["shape"])
            return jax.ShapeDtypeStruct(tuple(record["shape"]), record["dtype"])
    elif isinstance(record, dict) and record and all(isinstance(leaf, dict) for leaf in record.values()):
        return {name: shape_from_json(leaf) for name, leaf in record.items()}
    raise ValueError(f"'shape' is {json.dumps(record)[:60]}, no inputs of an example")


_MOST_NUMBERS = 2**31 - 1
"""Of one example: more are not to be counted in an int32, and no memory takes a batch of them."""


def _require_size(lengths: Sequence[int]) -> None:
    if math.prod(lengths) > _MOST_NUMBERS:
        raise ValueError(f"'shape' is {json.dumps(list(lengths))[:60]}, more than {_MOST_NUMBERS:,} numbers an example")


def _described(record: Mapping[str, Any]) -> tuple[str, models.Shape, int]:
    """(kind, inputs, outputs) of what a checkpoint or card says. Raises ValueError where they cannot be."""
    kind, outputs, classes = record.get("kind", "classes"), record.get("outputs"), record["classes"]
    if record.get("head") is False:
        return "values", shape_from_json(record["shape"]), 1  # which no target has the names of: its head is drawn anew
    if record.get("resize", "crop") not in RESIZES:
        raise ValueError(f"resize is {json.dumps(record['resize'])[:60]}: it is crop or squash")
    if kind not in ("classes", "labels", "values", "tokens"):
        raise ValueError(f"kind is {json.dumps(kind)[:60]}: it is classes, labels, values or tokens")
    outputs = len(classes) if outputs is None else outputs
    if type(outputs) is not int or outputs < 1 or (classes and len(classes) != outputs):
        raise ValueError(
            f"outputs is {json.dumps(outputs)[:60]}: it is the number of classes, or of what the head gives"
        )
    return kind, shape_from_json(record["shape"]), outputs


def from_state(
    state: Mapping[str, checkpoint.Flat], name: str, score: float | None, metric: Mapping[str, Any] | None = None
) -> Trained:
    """A fit of a checkpoint as a source: its merged parameters, if its strategy added some to the model."""
    return Trained(state.get(f"{name}.merged", state[name]), score, state.get(f"{name}.fisher"), metric)


def first_about(place: Path) -> dict[str, Any]:
    """What the first source of a run directory or checkpoint says of itself."""
    return _read_about(next(iter(_places(place).values()))[0])


MODEL: fields.Form = {"model?": str, "hidden?": [int], "activation?": str, "code?": str}
"""What a source says of its model; a file of weights may say less than `Settings.architecture`."""
_ABOUT: fields.Form = {
    **{"task": str, "fingerprint": str, "classes": [str], "model": MODEL, "fisher": bool},
    **{"shape": (list, dict), "fits": dict, "note?": str, "kind?": str, "outputs?": int, "resize?": str},
}
"""What a checkpoint says of itself if it can be a source."""
_FIT: fields.Form = {
    **{"seed": int, "accuracy": (float, None), "steps?": (int, None)},
    **{"score?": (float, None), "metric?": {"name": str, "unit": str, "larger_is_better": bool}},
}
"""What it says of each fit."""


def _read_about(place: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; raises InputError where that is not what a source says."""
    if place.is_file():
        remedy = "give a run directory, a checkpoint in it, or a .safetensors or .npz file"
        if place.suffix in pytorch.SUFFIXES:
            output = place.with_suffix(".safetensors")
            remedy = f"convert it first: python -m experiments.convert {place} --output={output}"
        raise InputError(f"'{place}' is a file, and no tljax checkpoint: {remedy}")
    about = checkpoint.about(place)
    if fault := fields.fault(about, _ABOUT):
        raise InputError(f"checkpoint '{place}' does not say enough ({fault}): give one that experiments.pretrain left")
    try:
        _described(about)
    except ValueError as error:
        fault = f"has no classes or no shape ({error})"
        raise InputError(f"checkpoint '{place}' {fault}: give one that experiments.pretrain left") from error
    for name, fit in about["fits"].items():
        if fields.fault(fit, _FIT) or name not in about["sha256"]:
            raise InputError(f"checkpoint '{place}' holds no fit '{name}': train it again")
    return about


def _is_diverged(fit: Mapping[str, Any]) -> bool:
    """Whether a fit diverged, by what its checkpoint says of it."""
    return _measured(fit)[0] is None


def _measured(about: Mapping[str, Any]) -> tuple[float | None, Mapping[str, Any] | None]:
    """(score, metric; None for accuracy) of what a checkpoint or a card says of a fit."""
    metric = about.get("metric")
    return (about.get("accuracy") if metric is None else about.get("score")), metric


def _say_superseded(folder: Path, places: Mapping[int, tuple[Path, str]]) -> None:
    """Say which sources a run directory's sources replaced, after an edit of the file of their model."""
    if not (folder / "results.jsonl").is_file():
        return
    keys = directory.superseded(folder)
    superseded: dict[int, list[str]] = {}
    for result in directory.results(folder):
        if result.strategy == "pretrain" and result.key in keys and result.seed in places:
            superseded.setdefault(result.seed, []).append(result.name)
    for seed, names in superseded.items():
        console.say(
            f"of the sources of seed {seed} in {folder}, '{places[seed][1]}' is taken; {paths.some(names)} "
            f"{'is' if len(names) == 1 else 'are'} of code that was changed later"
        )


def _places(folder: Path) -> dict[int, tuple[Path, str]]:
    """{seed: (checkpoint, name of the fit)} of a run directory's sources, or of one checkpoint."""
    if (folder / "results.jsonl").is_file():
        superseded = directory.superseded(folder)
        sources = [result for result in directory.results(folder) if result.strategy == "pretrain"]
        sources = [result for result in sources if result.key not in superseded]
        if len({result.seed for result in sources}) < len(sources):
            names = paths.some(list(dict.fromkeys(result.checkpoint for result in sources)))
            raise InputError(f"--source_checkpoint={folder} holds several sources: name one of {names}")
        if sources:
            return {result.seed: (folder / result.checkpoint, result.name) for result in sources}
        raise InputError(f"--source_checkpoint={folder} is a run without a source: name one of its checkpoints/")
    places: dict[int, tuple[Path, str]] = {}
    for name, fit in _read_about(folder)["fits"].items():
        if fit["seed"] in places:
            raise InputError(
                f"checkpoint '{folder}' holds two fits of seed {fit['seed']}, '{places[fit['seed']][1]}' and "
                f"'{name}': train each in a run directory of its own"
            )
        places[fit["seed"]] = folder, name
    return places


def _require_seeds(settings: Settings, source_seeds: Sequence[int], needed: Sequence[int]) -> None:
    if missing := sorted(set(needed) - set(source_seeds)):
        raise InputError(
            f"--source_checkpoint={settings.source_checkpoint} has sources for the seeds {sorted(source_seeds)}, not "
            f"for {missing}: change --seeds"
        )


def _most_steps(fits: Sequence[Mapping[str, Any]]) -> int | None:
    """The most steps that any fit took, if all say how many."""
    steps = [fit.get("steps") for fit in fits]
    return max(steps) if all(type(number) is int for number in steps) else None  # type: ignore[type-var]


def _require_leaves(
    settings: Settings, about: Mapping[str, Any], loaded: Mapping[Path, Any], trains: bool
) -> dict[Path, Any]:
    """The checkpoints, with the state of their model: as they are, or for `_with_state`.

    Raises InputError unless all fits have the leaves of the model that the checkpoint names, if need be merged.
    """
    _, shape, outputs = _described(about)
    model = settings.build_model(outputs)
    like = models.abstract(model, shape)
    whole: dict[Path, Any] = {}
    for place, (trees, about_place) in loaded.items():
        fishers = [name for name in trees if name.endswith(".fisher")]
        state = {
            name: flat
            if name in fishers
            else _with_state(settings, flat, like, model, shape, f"checkpoint '{place}', fit '{name}',", trains)
            for name, flat in trees.items()
        }
        whole[place] = state, about_place
        for name, flat in state.items():
            if any(f"{fit}.merged" in state for fit in about["fits"] if name == fit or name.startswith(f"{fit}.")):
                continue  # it has the leaves of its strategy too
            try:
                checkpoint.unflatten(flat, batch_stats.split(like)[0] if name in fishers else like)
            except InputError as error:
                fault = InputError(f"checkpoint '{place}', fit '{name}': {error}")
                raise _refusal_of_model(settings, about["model"], fault) from error
    return whole


def _with_state(
    settings: Settings,
    flat: Mapping[str, Any],
    like: Params,
    model: Model,
    shape: models.Shape,
    what: str,
    trains: bool,
) -> dict[str, Any]:
    """The leaves with those of the model's state that are not among them, as they are drawn: to be reestimated.

    Raises InputError where they are missing and are not to be, and for a variance below 0.
    """
    for path, leaf in flat.items():
        name = path.removesuffix("/value").rpartition("/")[2]
        if batch_stats.NAME in path.split("/") and name in _VARIANCES and np.any(np.asarray(leaf) < 0):
            raise InputError(
                f"{what} has a variance of {np.asarray(leaf).min():.3g} in '{path}': none is below 0; give weights as "
                "they were trained, with rules that do not mix up their arrays"
            )
    missing = [path for path in paths.names(like) if batch_stats.NAME in path.split("/") and path not in flat]
    if not missing:
        return dict(flat)
    if not trains or settings.batch_stats != "reestimated":
        anew = "--batch_stats=reestimated, which computes them anew from the target's training examples, or "
        remedy = f"give {anew if trains else ''}weights that have them"
        raise InputError(f"{what} lacks running averages of the model, {paths.some(missing)}: {remedy}")
    drawn = dict(paths.items(models.init(model, jax.random.key(0), shape)))
    return {**flat, **{path: np.asarray(drawn[path]) for path in missing}}


_VARIANCES = ("var", "running_var", "variance")
"""What models call a running variance."""


# ---- The model that a source is of


def _difference(settings: Settings, described: Mapping[str, Any]) -> str:
    """How the model of the settings differs in writing from the one that a source describes: '' where it does not.

    Whether it is another model is for the paths and shapes of its parameters to say (`_refusal_of_model`); but an
    activation has none, so another is refused here. A file of the same code under another path is the same. What the
    source does not say of its model, such as the `hidden` of one that has none, is not compared. Raises InputError.
    """
    here = settings.architecture()
    names = [name for name in sorted(described) if described[name] != here.get(name)]
    if "activation" in names:
        raise _other_model(settings, described, [name for name in names if name != "code"])
    same_code = "code" in here and here["code"] == described.get("code")
    if same_code and _options(here["model"]) == _options(described["model"]):
        names = [name for name in names if name != "model"]
    place = settings.source_checkpoint
    texts = [
        f"--{name} is {_plain(here[name])} here and was {_plain(described[name])}" for name in names if name != "code"
    ]
    texts = [f"{', '.join(texts)} when {place} was trained"] if texts else []
    if "code" in names and {"code"} <= here.keys() & described.keys() and "model" not in names:
        texts.insert(0, f"{Path(plugins.parse(here['model']).name).name} changed since {place} was trained")
    return "; ".join(texts)


_USED = "the paths and shapes of its parameters are the same, so it is used, and computes as --model here says"


def _require_shapes_of_card(
    settings: Settings, described: Mapping[str, Any], outputs: int, like: Params, shape: Any
) -> None:
    """Raise InputError where a leaf has another shape in the model that a card names, as with other heads.

    Rules cut a file's arrays as the model here has its leaves, so that those of another model may fit as well.
    """
    try:
        spec = plugins.parse(described["model"])
        if spec.name not in plugins.names("tljax.models", "model"):
            return  # a file of somebody's own may have moved since
        built = models.build(
            described["model"],
            outputs,
            hidden=described.get("hidden", settings.hidden),
            activation=described.get("activation", settings.activation),
        )
        of_card = dict(paths.items(models.abstract(built, shape)))
    except (InputError, KeyError):
        return
    for path, leaf in paths.items(like):
        if path in of_card and of_card[path].shape != leaf.shape:
            shapes = f"'{path}' is {list(of_card[path].shape)} there, {list(leaf.shape)} here"
            raise _other_model(settings, described, ["model"], shapes)


def _options(model_text: str) -> tuple[list[str], dict[str, str]]:
    """What stands after the file or module in the name of a model: (words, options)."""
    spec = plugins.parse(model_text)
    return list(spec.words), dict(spec.options)


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _refusal_of_model(settings: Settings, described: Mapping[str, Any], error: InputError) -> InputError:
    """What is said of a source whose parameters are not those of the model of the settings."""
    here = settings.architecture()
    names = [name for name in here if name in described and described[name] != here[name] and name != "code"]
    if here.get("code") != described.get("code") and "model" not in names:
        return InputError(f"{error}; the file of --model={settings.model} has changed since: give it as it was")
    return _other_model(settings, described, names) if names else error


def _other_model(
    settings: Settings, described: Mapping[str, Any], names: Sequence[str], shapes: str = ""
) -> InputError:
    here = settings.architecture()
    texts = (f"--{name}={described.get(name)} there, {here.get(name)} here" for name in names)
    differ = "; ".join([*texts, *filter(None, [shapes])])
    give = " ".join(f"--{name}={_plain(described.get(name))}" for name in names)
    return InputError(f"--source_checkpoint={settings.source_checkpoint} is of another model ({differ}): give {give}")


# ---- A file of weights, and its card

_CARD: Mapping[str, tuple[type, type | None]] = {
    **{"task": (str, None), "classes": (list, str), "shape": (object, None)},
    **{"kind": (str, None), "outputs": (int, None), "resize": (str, None)},
    **{"model": (dict, None), "rename": (list, str), "rules": (str, None)},
    **{"head": (bool, None)},
    **{"accuracy": (float, None), "steps": (int, None)},
    **{"score": (float, None), "metric": (dict, None)},
    **{"fingerprint": (str, None), "note": (str, None), "weights_sha256": (str, None), "sha256": (str, None)},
    **{"source": (dict, None)},
}
"""What a card may say: its type, and that of what is in it."""
NEEDED = ("task", "classes", "shape")
"""What a card must say."""
_EXAMPLE = (
    '{"task": "imagenet", "classes": ["cat", "dog"], "shape": [224, 224, 3], "model": {"model": "vit:size=S"}, '
    '"rules": "vit_timm"}'
)
"""A card, as messages write it; "model" and "rules" may be flags."""


def _from_weights_file(settings: Settings, trains: bool = True) -> Source:
    """The source in a file of weights, the same for all seeds; `trains` is as in `from_checkpoint`.

    Raises InputError for a file or card that cannot be read, a source of another model, and for whatever
    `weights.grafted` refuses.
    """
    file = Path(settings.source_checkpoint or "")
    card = weights_card(file, aloud=True)
    difference = _difference(settings, card["model"]) if "model" in card else ""
    if "weights_sha256" in card and card["weights_sha256"] != file_digest(weights.located(file)):
        raise InputError(f"'{file}' is not as it was written, or has another's card: restore it, or export it again")
    rules = read_rules(settings, card, file)
    kind, shape, outputs = _described(card)
    model = settings.build_model(outputs)
    try:
        like = models.abstract(model, shape)
    except InputError as error:
        raise (_channels_first(file, shape, error) or error) from error
    if difference:
        _require_shapes_of_card(settings, card["model"], outputs, like, shape)
    try:
        arrays = weights.read(file)
        moves, _ = weights.moves(arrays, rules)
        named = {path for move in moves for path in move.leaves}
        head = models.names(model)[-1] if card.get("head") is False else ""
        # Of the state whatever the file has: `_with_state` says what it lacks, or fills it in.
        held = {
            path: leaf
            for path, leaf in paths.items(like)
            if path in named or (batch_stats.NAME not in path.split("/") and not (head and path.startswith(f"{head}/")))
        }
        if inside := [path for path in named if head and path.startswith(f"{head}/")]:
            raise InputError(
                f"its card says head: false, and its rules lead to '{inside[0]}': drop that array by a rule"
            )
        flat = checkpoint.flatten(weights.grafted(arrays, rules, held, shape if isinstance(shape, tuple) else ()))
        missing = {path: leaf for path, leaf in paths.items(like) if head and path.startswith(f"{head}/")}
        flat |= {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in missing.items()}
        flat = _with_state(settings, flat, like, model, shape, f"--source_checkpoint={file}", trains)
    except InputError as error:
        if refusal := _channels_first(file, shape, error):
            raise refusal from error
        if ("model" not in card or not rules) and (advice := _unnamed_model(settings, rules, file)):
            raise InputError(f"--source_checkpoint={file}: {advice}") from error
        text = str(error) if str(file) in str(error) else f"--source_checkpoint={file}: {error}"
        text += _size_of_file(settings, rules, file, like, shape)
        raise _refusal_of_model(settings, card.get("model", settings.architecture()), InputError(text)) from error
    resizes = any(step.kind == "resize" for move in moves for step in move.steps)
    moves, changes = weights.changes(arrays, moves, held, shape if isinstance(shape, tuple) else ())
    for line in changes:
        console.say(f"{file.name}: {line}")
    _say_other_heads(settings, file, like)
    name = settings.source_rules or card.get("rules", "")
    if name and "pixels=" not in settings.model and (comment := weights.pixels(name)):
        console.say(f"pixels reach --model={settings.model} as 0 to 1, and the rules {name} say: {comment}")
    if difference:
        console.say(f"{difference}, by its card; {_USED}")
    identity = delta.identity(flat)
    return Source(
        card["task"],
        tuple(card["classes"]),
        shape,
        dict.fromkeys(settings.seeds, identity),
        card.get("fingerprint", ""),
        fisher=False,
        note="; ".join([f"weights from elsewhere, '{file.name}'", *filter(None, [card.get("note")])]),
        steps=card.get("steps"),
        recipe=identity,
        trained=dict.fromkeys(settings.seeds, Trained(flat, *_by_card(card))),
        names={path: move.shown for move in moves for path in move.leaves},
        kind=kind,
        outputs=outputs,
        resize=card.get("resize", "squash"),
        headless=card.get("head") is False,
        resizes=resizes,
    )


def file_digest(file: Path) -> str:
    """SHA-256 of the bytes of a file. Raises InputError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror})") from error


def _channels_first(file: Path, shape: models.Shape, error: InputError) -> InputError | None:
    """What is said of a card whose shape is [channels, height, width]; None of one whose is not."""
    if not isinstance(shape, tuple) or len(shape) != 3 or shape[0] not in (1, 3) or shape[2] in (1, 3):
        return None
    wanted = [*shape[1:], shape[0]]
    return InputError(f"the card of '{file}': the shape {list(shape)} is channels first: write {wanted} ({error})")


def _size_of_file(
    settings: Settings, rules: Sequence[weights.Rule], file: Path, like: Params, shape: models.Shape
) -> str:
    """The end of a refusal: how the model is built that a file is of, where its leaves have other shapes or names.

    It is the model as it is given, with what differs alone.
    """
    try:
        shapes = weights.outline(weights.read(file), rules)
    except InputError:
        return ""
    here = {path: tuple(np.shape(leaf)) for path, leaf in paths.items(like)}
    differ = here.keys() != shapes.keys() or any(
        len(shape) != len(here[path]) or any(a not in (None, b) for a, b in zip(shape, here[path], strict=True))
        for path, shape in shapes.items()
    )
    size = models.size(settings.model, shapes) if differ else ""
    # The same leaves, known as far as those of the file: where they are of this size, the rules are at fault alone.
    alike = {
        path: tuple(None if a is None else b for a, b in zip(shapes[path], shape, strict=True))
        if len(shapes.get(path, ())) == len(shape)
        else shape
        for path, shape in here.items()
    }
    size_here = models.size(settings.model, alike)
    if not size or size == size_here:
        return ""
    (built, images), (built_here, images_here) = _parted(size), _parted(size_here)
    if heads := _heads_of_config(file):
        built = built.replace("heads=?", f"heads={heads}")
    model = _with_what_differs(settings, built, built_here, shapes, shape)
    if not model:
        return f"; the file is of --model={size}"
    of_images = images if images != images_here else ""
    if model == settings.model:
        return f"; the file is of {of_images}: `resize` in a rule brings its positions to others" if of_images else ""
    unknown = [f":{name}=?" for name, value in plugins.parse(built).options.items() if value == "?"]
    unknown = [text for text in unknown if text[:-1] not in model]
    why = f" ({size.partition(' (')[2]}" if unknown and " (" in size else ""
    return f"; the file is of --model={model}{''.join(unknown)}" + (f", {of_images}" if of_images else "") + why


def _parted(size: str) -> tuple[str, str]:
    """(model, images of that size) of what the `size` of a model's file says; '' where it says no images.

    >>> _parted("vit:size=B:patch=16:heads=?, images of 32 x 32 (how many heads is not in the file)")
    ('vit:size=B:patch=16:heads=?', 'images of 32 x 32')
    """
    model, _, images = size.partition(" (")[0].partition(", ")
    return model, images


def _with_what_differs(
    settings: Settings, built: str, built_here: str, shapes: Mapping[str, tuple[int | None, ...]], shape: models.Shape
) -> str:
    """The model of the settings, with those options changed in which that of a file, `built`, is not as `built_here`;
    '' where it has not the file's shapes even so, as where its heads do not divide the file's width."""
    here, theirs, ours = plugins.parse(settings.model), plugins.parse(built).options, plugins.parse(built_here).options
    differ = {name for name in {*theirs, *ours} if theirs.get(name) not in (ours.get(name), "?")}
    unsaid = here.options.keys() - theirs.keys() - ours.keys()  # an mlp of 4 widths, say, which another width has not
    for left_out in ((), *((name,) for name in sorted(unsaid))):
        changed = {name: theirs.get(name, "") if name in differ else value for name, value in here.options.items()}
        changed |= {name: theirs[name] for name in theirs if name in differ}
        options = [f"{name}={value}" for name, value in changed.items() if value and name not in left_out]
        text = ":".join([plugins.quoted(here.name), *here.words, *options])
        if _is_of_shapes(settings, text, shapes, shape):
            return text
    return ""


def _is_of_shapes(
    settings: Settings, model: str, shapes: Mapping[str, tuple[int | None, ...]], shape: models.Shape
) -> bool:
    """Whether the leaves of a model but its head and its positions have these shapes, as far as both are known."""
    try:
        built = replace(settings, model=model).build_model(2)
        leaves = {path: np.shape(leaf) for path, leaf in paths.items(models.abstract(built, shape))}
    except InputError:
        return False
    head = models.names(built)[-1]
    for path in leaves.keys() & shapes.keys():
        pairs = list(zip(leaves[path], shapes[path], strict=False))
        if path.startswith(f"{head}/") or path.endswith("/position"):
            continue
        if len(leaves[path]) != len(shapes[path]) or any(b not in (None, a) for a, b in pairs):
            return False
    return True


def _heads_of_config(file: Path) -> int | None:
    """How many heads the config.json beside shards, or a model of the hub, says; None where it says none."""
    try:
        is_folder = str(file).startswith(weights.HUB) or file.is_dir()
        record = json.loads(files.text(weights.located(file).with_name("config.json"))) if is_folder else {}
        heads = record.get("num_attention_heads")
    except (OSError, InputError, ValueError, AttributeError, RecursionError):
        return None
    return heads if type(heads) is int else None


def _say_other_heads(settings: Settings, file: Path, like: Params) -> None:
    """Say so where a config.json says another number of heads than the model has: no shape of an array does."""
    kernels = [np.shape(leaf) for path, leaf in paths.items(like) if path.endswith("attention/query/kernel")]
    heads = _heads_of_config(file)
    if other := {shape[1] for shape in kernels if heads and len(shape) == 3 and shape[1] != heads}:
        console.say(
            f"config.json of '{file}' says {heads} heads, and --model={settings.model} has {min(other)}, which its "
            f"arrays fit too: give heads={heads} for what the network learnt"
        )


def _unnamed_model(settings: Settings, rules: Sequence[weights.Rule], file: Path) -> str:
    """Which rules and model to give for a file that has none; '' where that does not follow from its names and shapes.

    Without rules those are tried that are shipped.
    """
    if rules and settings.model != Settings.model:
        return ""
    heads = _heads_of_config(file)
    tried = {"": rules} if rules else {name: weights.read_rules(name) for name in weights.names()}
    for name, each in tried.items():
        try:
            shapes = weights.outline(weights.read(file), each)
        except InputError:
            continue
        for model in plugins.names("tljax.models", "model"):
            if size := models.size(model, shapes):
                flag_text = f"--source_rules={name} " if name else ""
                build = weights.comments(name or settings.source_rules or "", "Build ")
                build = f"; the rules say: {build}" if build else ""
                if heads and "heads=?" in size:
                    size = size.replace("heads=?", f"heads={heads}").partition(" (")[0]
                why = f"the rules {name} fit its names, and none are given" if name else "its card says no model"
                return f"it does not fit --model={settings.model}, and {why}: give {flag_text}--model={size}{build}"
    return ""


def weights_card(file: Path, *, aloud: bool = False) -> dict[str, Any]:
    """What the card beside a file of weights says; raises InputError for none, or one that does not say enough.

    The card of hf:OWNER/NAME is OWNER--NAME.json in the working directory, that of a folder FOLDER.json beside it, and
    so is that of an index of shards which has none of its own. Where there is none, the config.json that Hugging Face
    puts beside the arrays says the classes and the shape, and `aloud` says that it does.
    """
    if str(file).startswith(weights.HUB):
        repository = re.split("[@:]", str(file).removeprefix(weights.HUB))[0]
        return _card_of_folder(file, Path(repository.replace("/", "--") + ".json"), aloud)
    place = file.with_name(file.name + ".json")
    if is_weights_file(str(file)) and file.is_dir():
        return _card_of_folder(file, place, aloud)
    if file.name.endswith(weights.INDEX) and file.is_file():
        folder = file.absolute().parent
        of_folder = folder.parent / f"{folder.name}.json"
        return _card_of_folder(file, of_folder if of_folder.is_file() and not place.is_file() else place, aloud)
    return _read_card_of_weights(file, place)


def _card_of_folder(file: Path, place: Path, aloud: bool) -> dict[str, Any]:
    """The card of a model in the hub's cache or in a folder: `place`, or what its config.json says."""
    within = weights.located(file)
    if place.is_file():
        return _read_card_of_weights(within, place)
    if (beside := within.with_name(within.name + ".json")).is_file():
        return _read_card_of_weights(within, beside)
    config = within.with_name("config.json")
    record = _card_of_config(config, str(file), aloud)
    if missing := [name for name in NEEDED if name not in record]:
        lacks = f"does not say {', '.join(missing)} of '{file}'" if config.is_file() else "is not there"
        raise InputError(f"'{config}' {lacks}: write '{place}', such as {_EXAMPLE}")
    _check_card(place, record)
    if not aloud:
        return record
    console.say(
        f"'{place}' is not there, so config.json of '{file}' says its classes, {len(record['classes']):,}, and its "
        f"shape, {shown_shape(shape_from_json(record['shape']))}"
    )
    return record


def _card_of_config(file: Path, name: str, aloud: bool) -> dict[str, Any]:
    """What a config.json of transformers or timm says of a model, as a card says it; nothing where there is none.

    Raises InputError for one that is no JSON.
    """
    record: dict[str, Any] = {"task": name}
    if not file.is_file():
        return record
    try:
        config = json.loads(files.text(file))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is no JSON ({error}): download it again, or write a card of '{name}'") from error
    try:
        labels = config.get("id2label") or dict(enumerate(config.get("label_names") or ()))
        if not labels and config.get("num_classes"):
            labels = {number: str(number) for number in range(min(int(config["num_classes"]), 1_000_000))}
        pretrained = config.get("pretrained_cfg") or {}
        side = config.get("image_size") or (pretrained.get("input_size") or [None])[-1]
        sides = [side, side] if isinstance(side, int) else list(side or ())
        channels = config.get("num_channels") or (pretrained.get("input_size") or [3])[0]
        if len(labels) > 1:
            names = [str(labels[key]) for key in sorted(labels, key=int)]
            record["classes"] = numbered(names, aloud=aloud)
        if len(sides) == 2 and all(isinstance(length, int) and length > 0 for length in (*sides, channels)):
            record["shape"] = [*sides, channels]
        return record
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return record


def numbered(names: Sequence[str], *, aloud: bool = True) -> list[str]:
    """Names of classes, each once: ImageNet has two cranes, of which the second becomes 'crane (2)'; `aloud` says so.

    >>> numbered(["crane", "cat"])
    ['crane', 'cat']
    """
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        distinct.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    if aloud and (twice := [name for name, count in counts.items() if count > 1]):
        console.say(f"several classes are called {paths.some(twice, 4)}: each further one has its number after it")
    return distinct


def _read_card_of_weights(file: Path, place: Path) -> dict[str, Any]:
    """The card at a place, of a file of weights."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise InputError(f"--source_checkpoint={file} is no file: give the path of a file of weights")
    if file.is_file() and not place.is_file():
        raise InputError(f"'{place}' does not exist: write there what the weights are of, such as {_EXAMPLE}")
    try:
        if place.exists() and not place.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        card = json.loads(files.text(place))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if not file.is_file():
            raise InputError(
                f"--source_checkpoint={file} does not exist: give the path of a file of weights"
            ) from error
        raise InputError(f"'{place}' is no JSON ({error}): write it again") from error
    if not isinstance(card, dict) or not all(name in card for name in NEEDED):
        raise InputError(f"'{place}' must say {', '.join(NEEDED)}: add what is missing")
    if "delta" in card:
        raise InputError(
            f"'{file}' is a delta, what differs from its base alone: put them together with experiments.apply"
        )
    if "sha256" in card and not directory.intact(card):
        raise InputError(
            f"'{place}' is not as it was written: restore it, or export it again; if the change is meant, take out its "
            "sha256"
        )
    _check_card(place, card)
    return card


def _check_card(place: Path, card: Mapping[str, Any]) -> None:
    """Raise InputError for a field that no card has, and for one of another type or out of bounds."""
    for name, value in card.items():
        if name not in _CARD:
            raise InputError(f"'{place}' says '{name}', which no card does{plugins.nearest(name, _CARD)}")
        kind, within = _CARD[name]
        good = isinstance(value, kind) or (kind is float and type(value) is int)
        may_be_empty = name == "classes" and (card.get("kind", "classes") != "classes" or card.get("head") is False)
        if not good or (within and (not (value or may_be_empty) or not all(type(part) is within for part in value))):
            raise InputError(f"'{place}': '{name}' is {json.dumps(value)[:60]}: see tljax/weights/README.md, The card")
    for name in card.get("model", {}):
        if name not in ("model", "hidden", "activation", "code"):
            known = plugins.nearest(name, ("model", "hidden", "activation"))
            raise InputError(f"'{place}': 'model' says '{name}', which no card's does{known}")
    if fault := fields.fault(card.get("model", {}), MODEL, "model"):
        raise InputError(f"'{place}': {fault}: see tljax/weights/README.md, The card")
    least = 2 if card.get("kind", "classes") == "classes" and card.get("head") is not False else 0
    if card.get("head") is False and card["classes"]:
        raise InputError(f"'{place}' says head: false, and has classes: they are the head's, so leave one of them out")
    if len(set(card["classes"])) < max(least, len(card["classes"])):
        raise InputError(f"'{place}': give a shape of numbers above 0, and two classes or more, each once")
    try:
        _described(card)
    except ValueError as error:
        raise InputError(f"'{place}': give a shape of numbers above 0, as in [28, 28, 1] ({error})") from error
    form = {"name": str, "unit": str, "larger_is_better": bool}
    if card.get("metric") is not None and (odd := fields.fault(card["metric"], form, "metric")):
        raise InputError(f"'{place}': {odd}: give its name, its unit and whether larger is better")
    if not _is_accuracy(card.get("accuracy")):
        raise InputError(f"'{place}': 'accuracy' is {card['accuracy']}: give a fraction, from 0 to 1")


def _by_card(card: Mapping[str, Any]) -> tuple[float | None, None, Mapping[str, Any] | None]:
    """(score, no Fisher information, metric) of a card."""
    score, metric = _measured(card)
    return score, None, metric


def _is_accuracy(value: Any) -> bool:
    """Whether a value is a fraction, or None for an accuracy that is not known."""
    return value is None or (isinstance(value, float | int) and 0 <= value <= 1)


# ---- One source, loaded

MODEL_FLAGS = ("model", "hidden", "activation")


class LoadedSource(NamedTuple):
    """One trained source."""

    source: Source
    identity: str
    """Digest of its parameters."""
    model: Model
    params: Params
    score: float | None
    """Accuracy (a fraction), or its metric on its own test set, if that is known."""
    metric: Mapping[str, Any] | None = None
    """What the score is, where it is not accuracy, as `Result.metric` has it."""


def settings_of(flags: Mapping[str, Any], place: str, *, several: bool = False) -> Settings:
    """The settings under which `place` (a checkpoint, run or file of weights) is the source.

    The flags of the model are those that the source says of itself, unless they are given; of one among `several`
    they are given only for what does not say them.
    """
    about = weights_card(Path(place)) if is_weights_file(place) else first_about(Path(place))
    described = about.get("model", {})
    of_model = {name: described[name] for name in MODEL_FLAGS if name in described}
    of_model |= {"hidden": tuple(of_model["hidden"])} if "hidden" in of_model else {}
    if "model" in of_model and (several or "model" not in flags):
        of_model["model"] = _model_file(of_model["model"], Path(place))
    both = {**flags, **of_model} if several else {**of_model, **flags}
    return Settings.from_flags(**{**both, "source_checkpoint": place})


def _model_file(model: str, place: Path) -> str:
    """The model that a source says of itself, its file found from where the run began, or from beside the weights.

    Raises InputError, with the folders, where it is in none of them.
    """
    file = plugins.parse(model).name
    if not file.endswith(".py") or os.path.lexists(file):
        return model
    run = place if (place / "flags.flags").is_file() else place.parent.parent
    folders = [str(place.parent)] if is_weights_file(str(place)) else written_from(run / "flags.flags")
    if not os.path.isabs(file) and (path := path_from_folders(file, folders)):
        return plugins.quoted(path) + model.removeprefix(plugins.quoted(file))
    sought = "".join(f", nor from '{folder}'" for folder in folders)
    raise InputError(
        f"the model of '{place}' is '{file}', which is not there from the working directory{sought}: give its file as "
        "--model=FILE.py:model"
    )


def load(settings: Settings) -> LoadedSource:
    """The one source of the one seed; raises InputError for several seeds, and as `from_checkpoint` does."""
    if len(settings.seeds) > 1:
        raise InputError(f"--seeds={','.join(map(str, settings.seeds))}: these are of one source, so give one seed")
    source, [seed] = from_checkpoint(settings, trains=False), settings.seeds
    trained = source.trained[seed]
    model = settings.build_model(source.outputs)
    params = checkpoint.unflatten(trained.flat, models.abstract(model, source.shape))
    return LoadedSource(source, source.identity[seed], model, params, trained.score, trained.metric)


# ---- One trained fit, by where it lies and its name


@dataclass(frozen=True)
class FitFlags:
    """Which fit, of a run directory, a checkpoint or a file of weights."""

    checkpoint: str | None = flag(
        None, "a run, a checkpoint in it, or a file of weights with its card; needed", place="path"
    )
    fit: str | None = flag(None, "which of several fits: its name in results.jsonl")


def load_fit(flags: Mapping[str, Any], place: str | None, fit: str | None) -> tuple[Settings, LoadedSource]:
    """(settings of its model, fit with its parameters merged), once the machine is made ready.

    `flags` are those of the machine, and of the model where the fit does not say its own. Raises InputError where no
    fit is found or it is not clear which, and for one that diverged, is damaged, or is of another model.
    """
    if not place:
        raise InputError("--checkpoint is not given: name a run directory, a checkpoint in it, or a file of weights")
    flags, name = dict(flags), place
    if not is_weights_file(place):
        folder, seed = find_fit(Path(place), fit)
        flags, name = flags | {"seeds": (seed,)}, str(folder)
    elif fit:
        raise InputError(f"--fit={fit}: '{place}' holds one fit: leave it out")
    try:
        settings = settings_of(flags, name)
        process.prepare(settings)
        return settings, load(settings)
    except InputError as error:
        raise command_line.flag_renamed(error, "source_checkpoint", "checkpoint") from error


def load_weights(
    flags: Mapping[str, Any], place: str | None, fit: str | None
) -> tuple[checkpoint.Flat, Source, Mapping[str, Any], dict[str, Any]]:
    """(parameters by their paths, source, description of its model, its metric) of a fit, to be written elsewhere.

    Of the metric {"accuracy"}, or where it is another {"score", "metric"}.

    Where no flag of the model is given, the parameters are taken as they are: they can be had even when the file of
    the model is changed or gone. Raises InputError as `load_fit` does.
    """
    if not place or is_weights_file(place) or any(name in flags for name in MODEL_FLAGS):
        settings, loaded = load_fit(flags, place, fit)
        return (
            checkpoint.flatten(loaded.params),
            loaded.source,
            settings.architecture(),
            score_record(loaded.score, loaded.metric),
        )
    folder, seed = find_fit(Path(place), fit)
    settings = Settings.from_flags(**{**flags, "seeds": (seed,), "source_checkpoint": str(folder)})
    try:
        source = _from_run(settings, model_too=False)
    except InputError as error:
        raise command_line.flag_renamed(error, "source_checkpoint", "checkpoint") from error
    trained = source.trained[seed]
    return trained.flat, source, first_about(folder)["model"], score_record(trained.score, trained.metric)


def load_base(flags: Mapping[str, Any], place: str | None, fit: str | None) -> checkpoint.Flat:
    """The parameters of the base of a delta. Raises InputError as `load_weights` does, of --base and --base_fit."""
    try:
        return load_weights(flags, place, fit)[0]
    except InputError as error:
        renamed = command_line.flag_renamed(error, "checkpoint", "base")
        raise command_line.flag_renamed(renamed, "fit", "base_fit") from error


def score_record(score: float | None, metric: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a card says of how good a fit is on its own test set.

    >>> score_record(0.5, None), list(score_record(1.5, {"name": "mae", "unit": "", "larger_is_better": False}))
    ({'accuracy': 0.5}, ['score', 'metric'])
    """
    return {"accuracy": score} if metric is None else {"score": score, "metric": dict(metric)}


def find_fit(place: Path, fit: str | None) -> tuple[Path, int]:
    """(checkpoint, seed) of a fit, by its name with or without the digest: under one seed a checkpoint holds one.

    Raises InputError, of --fit, where there is none, or it is not clear which, and for a fit that diverged.
    """
    results = {result.name: result for result in directory.results(place)}
    names = sorted(results or first_about(place)["fits"])
    if fit is None and len(names) > 1:
        raise InputError(f"'{place}' holds {len(names)} fits, {paths.some(names, 12)}: choose one with --fit=NAME")
    begun = [name for name in names if name == fit or name.rpartition("-")[0] == fit]
    name = names[0] if fit is None else begun[0] if len(begun) == 1 else fit
    if len(begun) > 1:
        raise InputError(f"--fit={fit}: '{place}' holds {paths.some(begun)}: name one of them whole")
    if name not in names:
        raise InputError(f"--fit={name}: '{place}' holds no such fit{plugins.nearest(name, names)}")
    folder = place / results[name].checkpoint if results else place
    fits = first_about(folder)["fits"]
    if name not in fits:
        raise InputError(f"checkpoint '{folder}' holds no fit '{name}': train it again")
    if _is_diverged(fits[name]):
        raise InputError(f"fit '{name}' of '{folder}' diverged: train it again, at a lower rate, or choose another")
    return folder, fits[name]["seed"]


def started_from(place: str, fit: str | None) -> tuple[str, str | None]:
    """(place, name; None of one that holds one fit) of the source that a fit of a run started from.

    It was trained in the same run directory, or is the run's --source_checkpoint. Raises InputError where it is not
    known.
    """
    folder, seed = find_fit(Path(place), fit)
    run = next((each for each in (Path(place), *folder.absolute().parents) if (each / "results.jsonl").is_file()), None)
    unknown = InputError(f"the source that a fit of '{place}' started from is not known: name its base with --base")
    if run is None:
        raise unknown
    names = first_about(folder)["fits"]
    of_fit = [result for result in directory.results(run) if result.name in names and result.seed == seed]
    if not of_fit or of_fit[0].source is None or of_fit[0].strategy in ("scratch", "pretrain"):
        raise unknown
    trained = [result for result in directory.results(run) if result.strategy == "pretrain"]
    trained = [result for result in trained if result.key not in directory.superseded(run)]
    trained = [result for result in trained if result.target == of_fit[0].source]
    same_seed = [result for result in trained if result.seed == seed] or trained
    if len(same_seed) == 1:
        return str(run / same_seed[0].checkpoint), same_seed[0].name
    checkpoints = directory.recorded_flags(run).get("source_checkpoint", [])
    if trained or not checkpoints:
        raise unknown
    source = plugins.unquoted(checkpoints[-1])
    if not source.startswith(weights.HUB) and not os.path.lexists(source):
        source = path_from_folders(source, written_from(run / "flags.flags")) or source
    if is_weights_file(source):
        return source, None
    places = _places(Path(source))
    at, name = places[seed] if seed in places else next(iter(places.values()))
    return str(at), name


def write_weights(
    file: Path,
    arrays: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    signed: bool = True,
) -> None:
    """Write arrays as safetensors, and beside them their card: the record without None, and the file's digest.

    A card that is to be completed by hand is not `signed`. Raises InputError and OSError as `weights.write` does.
    """
    card = directory.new_file(f"{file}.json", ".json")
    weights.write(file, arrays, metadata)
    try:
        complete = {name: value for name, value in record.items() if value is not None}
        complete |= {"weights_sha256": file_digest(file)}
        if signed:
            directory.write_record(card, complete)
        else:
            directory.replace(card, json.dumps(complete, indent=1) + "\n")
    except BaseException:
        file.unlink()  # it is useless without its card
        raise


# ---- Several sources, each with a card of its own, so that they can be ranked


class Card(NamedTuple):
    """What one source among several says of itself."""

    name: str
    place: str
    """For `--source_checkpoint`."""
    accuracy: float | None
    """On its own test set, a fraction (or another metric), if that is known."""
    parameters: int
    """How many numbers it has."""
    trivial: bool
    """Whether there is nothing in it to transfer: it was not trained, or on labels at random."""
    metric: Metric = ACCURACY
    """What is in place of accuracy, where it is another."""


def write_card(folder: Path, about: Mapping[str, Any], result: Result, recipe: Recipe) -> dict[str, Any]:
    """Leave the card of a source that was trained in a run directory; what it says.

    `about` has its number, name and whether it is trivial, and what it was trained on as its checkpoint says it; beside
    it stand how it was trained, and its accuracy (a fraction; None if it diverged).
    """
    card = {
        **about,
        "checkpoint": result.checkpoint,
        "seed": result.seed,
        **score_record(results.score(result), result.metric),
        "loss": result.test_loss,
        "steps": result.steps,
        "seconds": result.seconds,
        "parameters": result.total_parameters,
        "recipe": vars(recipe),
    }
    place = folder / "cards" / f"{result.name}.json"
    directory.make_folder(place.parent)
    directory.write_record(place, card)
    return card


def read_cards(place: str, flags: Mapping[str, Any] | None = None) -> list[Card]:
    """The sources of a zoo, in its order, or the one in a file of weights, a checkpoint or a run directory.

    Of `flags` those of the model are for a source that does not say its own. Raises InputError where there is no
    source, for a card that cannot be read, and for sources of several seeds.
    """
    path = Path(place)
    if (path / "cards").is_dir():
        cards = [_read_card(file, path) for file in (path / "cards").glob("*.json")]
        if not cards:
            raise InputError(f"'{path}/cards' holds no card: run experiments.zoo again")
        return [card for _, card in sorted(cards)]
    if not is_weights_file(place) and len(first_about(path)["fits"]) > 1:
        raise InputError(f"'{place}' holds sources of several seeds: take one out with experiments.export --fit=NAME")
    loaded = load(settings_of({**(flags or {}), "seeds": (0,)}, place, several=True))
    size = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    metric = units.from_record(loaded.metric)
    return [Card(f"{loaded.source.name} ({path.name})", place, loaded.score, size, trivial=False, metric=metric)]


_UNSIGNED = {
    *("number", "name", "trivial", "task", "fingerprint", "classes", "shape", "model", "note"),
    *("checkpoint", "seed", "accuracy", "loss", "steps", "seconds", "parameters", "recipe"),
}
"""What a card of an older tljax says, all of it and no more."""


def _read_card(file: Path, folder: Path) -> tuple[int, Card]:
    """(its place in the list, card) of a source of a zoo."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        name, parameters, trivial, place, number = (
            record[key] for key in ("name", "parameters", "trivial", "checkpoint", "number")
        )
        score, metric = _measured(record)
        is_score = isinstance(score, float | int | None) and (metric is not None or _is_accuracy(record["accuracy"]))
        odd = metric is not None and fields.fault(metric, {"name": str, "unit": str, "larger_is_better": bool})
        known = isinstance(name, str) and isinstance(parameters, int) and isinstance(trivial, bool)
        if not known or odd or not is_score or not isinstance(number, int):
            raise ValueError("not the types of a card")
        inside = Path(place)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError("its checkpoint is outside the run directory")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"card '{file}' cannot be read ({error}): run experiments.zoo again") from error
    if score is None:
        raise InputError(f"card '{file}': the source '{name}' diverged: remove the card, or train it at a lower rate")
    if record.keys() == _UNSIGNED:
        console.say(f"card '{file}' has no SHA-256, since an older tljax wrote it, and is believed as it stands")
    else:
        directory.read_record(file)  # raises InputError for one that is not as it was written
    return number, Card(name, str(folder / inside), score, parameters, trivial, units.from_record(metric))


# ---- The stage whose features are taken


def before_head(model: Model) -> str:
    """The last stage before the head; raises InputError for a model that is nothing but a head."""
    names = models.names(model)
    if len(names) < 2:
        raise InputError(
            "the source's model has no stage before its head, whose features are taken: train the source with --hidden "
            "(experiments.features --stage=head has the head's)"
        )
    return names[-2]


def require_stage(model: Model, stage: str) -> None:
    """Raise InputError for a stage that the model has not."""
    if stage not in models.names(model):
        raise InputError(f"--stage={stage} is none of the model's{plugins.nearest(stage, models.names(model))}")
