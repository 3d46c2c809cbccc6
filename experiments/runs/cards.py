"""Cards: what each of several sources says of itself, so that they can be ranked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.runs import console, directory, elsewhere, origin, sources
from experiments.runs.settings import Recipe
from tljax.study.results import Result
from tljax.types import InputError


class Card(NamedTuple):
    """One source among several."""

    name: str
    place: str
    """For `--source_checkpoint`."""
    accuracy: float | None
    """On its own test set, a fraction, if that is known."""
    parameters: int
    """How many numbers it has."""
    trivial: bool
    """Whether there is nothing in it to transfer: it was not trained, or on labels at random."""


def write(folder: Path, told: Mapping[str, Any], line: Result, recipe: Recipe) -> dict[str, Any]:
    """Leave the card of a source that was trained in a run directory; what it says.

    `told` has its number, name and whether it is trivial, and what it was trained on as its checkpoint says it; beside
    it stand how it was trained, and its accuracy (a fraction; None if it diverged).
    """
    card = {
        **told,
        "checkpoint": line.checkpoint,
        "seed": line.seed,
        "accuracy": line.test_accuracy,
        "loss": line.test_loss,
        "steps": line.steps,
        "seconds": line.seconds,
        "parameters": line.total_parameters,
        "recipe": vars(recipe),
    }
    place = folder / "cards" / f"{line.name}.json"
    directory.make_folder(place.parent)
    directory.write_record(place, card)
    return card


def read(place: str, given: Mapping[str, Any] | None = None) -> list[Card]:
    """The sources of a zoo, in its order, or the one in a file of weights, a checkpoint or a run directory.

    `given` are flags, of which those of the model are for a source that does not say its own. Raises InputError where
    there is none, for a card that cannot be read, and for sources of several seeds.
    """
    path = Path(place)
    if (path / "cards").is_dir():
        found = [_card(file, path) for file in (path / "cards").glob("*.json")]
        if not found:
            raise InputError(f"'{path}/cards' holds no card: run experiments.zoo again")
        return [card for _, card in sorted(found)]
    if not elsewhere.named(place) and len(sources.told(path)["fits"]) > 1:
        raise InputError(f"'{place}' holds sources of several seeds: take one out with experiments.export --fit=NAME")
    one = origin.load(origin.settings({**(given or {}), "seeds": (0,)}, place, several=True))
    size = sum(leaf.size for leaf in jax.tree.leaves(one.params))
    return [Card(f"{one.source.name} ({path.name})", place, one.accuracy, size, trivial=False)]


_UNSIGNED = {
    *("number", "name", "trivial", "task", "fingerprint", "classes", "shape", "model", "note"),
    *("checkpoint", "seed", "accuracy", "loss", "steps", "seconds", "parameters", "recipe"),
}
"""What a card of an older tljax says, all of it and no more."""


def _card(file: Path, folder: Path) -> tuple[int, Card]:
    """(its place in the list, card) of a source of a zoo."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        name, accuracy, parameters, trivial, place, number = (
            told[key] for key in ("name", "accuracy", "parameters", "trivial", "checkpoint", "number")
        )
        known = isinstance(name, str) and isinstance(parameters, int) and isinstance(trivial, bool)
        if not known or not elsewhere.fraction(accuracy) or not isinstance(number, int):
            raise ValueError("not the types of a card")
        inside = Path(place)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError("its checkpoint is outside the run directory")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"card '{file}' cannot be read ({error}): run experiments.zoo again") from error
    if accuracy is None:
        raise InputError(f"card '{file}': the source '{name}' diverged: remove the card, or train it at a lower rate")
    if told.keys() == _UNSIGNED:
        console.say(f"card '{file}' has no SHA-256, since an older tljax wrote it, and is believed as it stands")
    else:
        directory.read_record(file)  # raises InputError for one that is not as it was written
    return number, Card(name, str(folder / inside), accuracy, parameters, trivial)
