"""Sources trained elsewhere: a .safetensors or .npz file of weights, with a card that says what they are of.

The card of net.safetensors is net.safetensors.json beside it: {"task": "mnist", "classes": ["0", "1", ...], "shape":
[28, 28, 1]}, whose pixels it takes as 0 to 1; and, as far as they are known, "model" ({"model": "mlp", "hidden": [512],
"activation": "relu"}), "rename" (rules as in `tljax.weights`, those of --source_rename before them), "accuracy",
"steps", the data's "fingerprint" and the "note" that every table must have of them. A card of experiments.export has
the SHA-256 of the weights and of itself, and both are held against them; one that is written by hand has none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runs import console, directory, fields, sources
from experiments.runs.settings import Settings
from experiments.runs.sources import Source, Trained
from tljax import checkpoint, files, models, paths, plugins, weights
from tljax.types import InputError

_CARD: Mapping[str, tuple[type, type | None]] = {
    **{"task": (str, None), "classes": (list, str), "shape": (list, int)},
    **{"model": (dict, None), "rename": (list, str), "accuracy": (float, None), "steps": (int, None)},
    **{"fingerprint": (str, None), "note": (str, None), "weights_sha256": (str, None), "sha256": (str, None)},
}
"""What a card may say: its type, and that of what is in it."""
_NEEDED = ("task", "classes", "shape")


def named(place: str | None) -> bool:
    """Whether `--source_checkpoint` names a file of weights."""
    return Path(place or "").suffix in weights.SUFFIXES


def fraction(value: Any) -> bool:
    """Whether an accuracy is one, or not known."""
    return value is None or (isinstance(value, float | int) and 0 <= value <= 1)


def refuse_rules(made: Settings) -> None:
    """Raise InputError for rules where there is no file of weights."""
    if made.source_rename and not named(made.source_checkpoint):
        raise InputError(
            "--source_rename is for weights from elsewhere: leave it out, or give --source_checkpoint=FILE.safetensors"
        )


def source(made: Settings) -> Source:
    """The source in a file of weights, the same for all seeds.

    Raises InputError for a file or card that cannot be read, a source of another model, and for whatever
    `weights.grafted` refuses.
    """
    file = Path(made.source_checkpoint or "")
    told = card(file)
    other = sources.differs(made, told["model"]) if "model" in told else ""
    if "weights_sha256" in told and told["weights_sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
        raise InputError(f"'{file}' is not as it was written, or has another's card: restore it, or export it again")
    rules = [weights.rule(text) for text in made.source_rename or told.get("rename", ())]
    classes, shape = tuple(told["classes"]), tuple(told["shape"])
    like = models.abstract(sources.model(made, len(classes)), shape)
    try:
        arrays = weights.read(file)
        flat = checkpoint.flatten(weights.grafted(arrays, rules, like))
    except InputError as error:
        text = str(error) if str(file) in str(error) else f"--source_checkpoint={file}: {error}"
        raise sources.refuse_model(made, told.get("model", sources.architecture(made)), InputError(text)) from error
    if other:
        console.say(f"{other}, by its card; the paths and shapes of its parameters are the same, so it is used")
    trained = Trained(flat, told.get("accuracy"), None)
    sums = {path: checkpoint.digest(path, leaf) for path, leaf in paths.items(flat)}
    identity = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return Source(
        told["task"],
        classes,
        shape,
        dict.fromkeys(made.seeds, identity),
        lambda folder, execution: dict.fromkeys(made.seeds, trained),
        told.get("fingerprint", ""),
        fisher=False,
        note="; ".join([f"weights from elsewhere, '{file.name}'", *filter(None, [told.get("note")])]),
        steps=told.get("steps"),
        recipe=identity,
        names={path: name for name, path in weights.placed(arrays, rules).items() if path is not None},
    )


def card(file: Path) -> dict[str, Any]:
    """What the card beside a file of weights says; raises InputError for none, or one that does not say enough."""
    place = file.with_name(file.name + ".json")
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise InputError(f"--source_checkpoint={file} is no file: give the path of a file of weights")
    if file.is_file() and not place.is_file():
        example = '{"task": "mnist", "classes": ["0", "1"], "shape": [28, 28, 1]}'
        raise InputError(f"'{place}' does not exist: write there what the weights are of, such as {example}")
    try:
        if place.exists() and not place.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        told = json.loads(files.text(place))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if not file.is_file():
            raise InputError(
                f"--source_checkpoint={file} does not exist: give the path of a file of weights"
            ) from error
        raise InputError(f"'{place}' is no JSON ({error}): write it again") from error
    if not isinstance(told, dict) or not all(name in told for name in _NEEDED):
        raise InputError(f"'{place}' must say {', '.join(_NEEDED)}: add what is missing")
    if "sha256" in told and not directory.intact(told):
        raise InputError(
            f"'{place}' is not as it was written: restore it, or export it again; if the change is meant, take out its "
            "sha256"
        )
    for name, value in told.items():
        if name not in _CARD:
            raise InputError(f"'{place}' says '{name}', which no card does{plugins.nearest(name, _CARD)}")
        kind, within = _CARD[name]
        good = isinstance(value, kind) or (kind is float and type(value) is int)
        if not good or (within and (not value or not all(type(part) is within for part in value))):
            raise InputError(f"'{place}': '{name}' is {json.dumps(value)[:60]}: see experiments/runs/elsewhere.py")
    for name in told.get("model", {}):
        if name not in ("model", "hidden", "activation", "code"):
            known = plugins.nearest(name, ("model", "hidden", "activation"))
            raise InputError(f"'{place}': 'model' says '{name}', which no card's does{known}")
    if odd := fields.fault(told.get("model", {}), sources.MODEL, "model"):
        raise InputError(f"'{place}': {odd}: see experiments/runs/elsewhere.py")
    if min(told["shape"]) < 1 or len(set(told["classes"])) < max(2, len(told["classes"])):
        raise InputError(f"'{place}': give a shape of numbers above 0, and two classes or more, each once")
    if not fraction(told.get("accuracy")):
        raise InputError(f"'{place}': 'accuracy' is {told['accuracy']}: give a fraction, from 0 to 1")
    return told
