"""Where a source comes from: what it says of itself, and its parameters, whoever trained it."""

import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs import elsewhere, flags, sources
from experiments.runs.settings import Settings
from experiments.runs.sources import Source
from tljax import checkpoint, models, plugins
from tljax.types import InputError, Model, Params

MODEL = ("model", "hidden", "activation")
"""The flags of a model."""


class Origin(NamedTuple):
    """One trained source."""

    source: Source
    identity: str
    """Digest of its parameters."""
    model: Model
    params: Params
    accuracy: float | None
    """On its own test set, a fraction, if that is known."""


def settings(given: Mapping[str, Any], place: str, *, several: bool = False) -> Settings:
    """The settings under which `place` (a checkpoint, run or file of weights) is the source.

    The flags of the model are those that the source says of itself, unless they are given; of one among `several`
    they are given only for what does not say them.
    """
    told = elsewhere.card(Path(place)) if elsewhere.named(place) else sources.told(Path(place))
    model = told.get("model", {})
    own = {name: model[name] for name in MODEL if name in model}
    own |= {"hidden": tuple(own["hidden"])} if "hidden" in own else {}
    if "model" in own and (several or "model" not in given):
        own["model"] = _model_file(own["model"], Path(place))
    both = {**given, **own} if several else {**own, **given}
    return Settings.from_flags(**{**both, "source_checkpoint": place})


def _model_file(model: str, place: Path) -> str:
    """The model that a source says of itself, its file found from where the run began, or from beside the weights.

    Raises InputError, with the folders, where it is in none of them.
    """
    file = plugins.parse(model).name
    if not file.endswith(".py") or os.path.lexists(file):
        return model
    run = place if (place / "flags.flags").is_file() else place.parent.parent
    folders = [str(place.parent)] if elsewhere.named(str(place)) else flags.written_from(run / "flags.flags")
    if not os.path.isabs(file) and (found := flags.found_from(file, folders)):
        return plugins.quoted(found) + model.removeprefix(plugins.quoted(file))
    sought = "".join(f", nor from '{folder}'" for folder in folders)
    raise InputError(
        f"the model of '{place}' is '{file}', which is not there from the working directory{sought}: give its file as "
        "--model=FILE.py:model"
    )


def source(made: Settings, stand_ins: Mapping[int, int] | None = None) -> Source:
    """The source that `--source_checkpoint` names; raises InputError where there is none, or of another model.

    `stand_ins` as `sources.from_checkpoint` takes them.
    """
    if elsewhere.named(made.source_checkpoint):
        return elsewhere.source(made)
    return sources.from_checkpoint(made, stand_ins=stand_ins)


def stand_ins(made: Settings, trial_seeds: Sequence[int]) -> dict[int, int]:
    """`sources.stand_ins`; empty without --source_checkpoint and for a file of weights, which serves every seed."""
    if not made.source_checkpoint or elsewhere.named(made.source_checkpoint):
        return {}
    return sources.stand_ins(made, trial_seeds)


def load(made: Settings, execution: Any = None) -> Origin:
    """The one source of the one seed; raises InputError for several seeds, and as `source` does."""
    if len(made.seeds) > 1:
        raise InputError(f"--seeds={','.join(map(str, made.seeds))}: these are of one source, so give one seed")
    found, [seed] = source(made), made.seeds
    trained = found.obtain(Path(), execution)[seed]
    model = sources.model(made, len(found.classes))
    params = checkpoint.unflatten(trained.flat, models.abstract(model, found.shape))
    return Origin(found, found.identity[seed], model, params, trained.accuracy)


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
