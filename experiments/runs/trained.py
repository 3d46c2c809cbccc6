"""One trained fit, by where it lies and its name: of a run directory, a checkpoint or a file of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs import directory, elsewhere, origin, process, sources
from experiments.runs.flags import flag
from experiments.runs.origin import Origin
from experiments.runs.settings import Settings
from experiments.runs.sources import Source
from tljax import checkpoint, paths, plugins
from tljax.types import InputError


@dataclass(frozen=True)
class TrainedFlags:
    """Which fit."""

    checkpoint: str | None = flag(
        None, "a run, a checkpoint in it, or a file of weights with its card; needed", place="path"
    )
    fit: str | None = flag(None, "which of several fits: its name in results.jsonl")


def load(given: Mapping[str, Any], place: str | None, fit: str | None) -> tuple[Settings, Origin]:
    """(settings of its model, fit): its parameters are merged, and the machine is made ready.

    `given` are flags of the machine, and of the model where the fit does not say its own. Raises InputError where no
    fit is found or it is not clear which, and for one that diverged, is damaged, or is of another model.
    """
    if not place:
        raise InputError("--checkpoint is not given: name a run directory, a checkpoint in it, or a file of weights")
    given, name = dict(given), place
    if not elsewhere.named(place):
        folder, seed = _found(Path(place), fit)
        given, name = given | {"seeds": (seed,)}, str(folder)
    elif fit:
        raise InputError(f"--fit={fit}: '{place}' holds one fit: leave it out")
    try:
        made = origin.settings(given, name)
        process.prepare(made)
        return made, origin.load(made)
    except InputError as error:
        raise InputError(str(error).replace("--source_checkpoint", "--checkpoint")) from error


def weights(
    given: Mapping[str, Any], place: str | None, fit: str | None
) -> tuple[checkpoint.Flat, Source, Mapping[str, Any], float | None]:
    """(parameters by their paths, source, what it says of its model, accuracy) of a fit, to be written elsewhere.

    Where no flag of the model is given, the parameters are taken as they are: they can be had even when the file of
    the model is changed or gone. Raises InputError as `load` does.
    """
    if not place or elsewhere.named(place) or any(name in given for name in origin.MODEL):
        made, one = load(given, place, fit)
        return checkpoint.flatten(one.params), one.source, sources.architecture(made), one.accuracy
    folder, seed = _found(Path(place), fit)
    made = Settings.from_flags(**{**given, "seeds": (seed,), "source_checkpoint": str(folder)})
    try:
        source = sources.from_checkpoint(made, model_too=False)
    except InputError as error:
        raise InputError(str(error).replace("--source_checkpoint", "--checkpoint")) from error
    trained = source.obtain(Path(), None)[seed]
    return trained.flat, source, sources.told(folder)["model"], trained.accuracy


def _found(place: Path, fit: str | None) -> tuple[Path, int]:
    """(checkpoint, seed) of a fit, by its name with or without the digest: under one seed a checkpoint holds one."""
    lines = {line.name: line for line in directory.results(place)}
    names = sorted(lines or sources.told(place)["fits"])
    if fit is None and len(names) > 1:
        raise InputError(f"'{place}' holds {len(names)} fits, {paths.some(names, 12)}: choose one with --fit=NAME")
    begun = [name for name in names if name == fit or name.rpartition("-")[0] == fit]
    name = names[0] if fit is None else begun[0] if len(begun) == 1 else fit
    if len(begun) > 1:
        raise InputError(f"--fit={fit}: '{place}' holds {paths.some(begun)}: name one of them whole")
    if name not in names:
        raise InputError(f"--fit={name}: '{place}' holds no such fit{plugins.nearest(name, names)}")
    folder = place / lines[name].checkpoint if lines else place
    told = sources.told(folder)["fits"]
    if name not in told:
        raise InputError(f"checkpoint '{folder}' holds no fit '{name}': train it again")
    if told[name]["accuracy"] is None:
        raise InputError(f"fit '{name}' of '{folder}' diverged: train it again, at a lower rate, or choose another")
    return folder, told[name]["seed"]
