"""The flags of the programs, and the settings they become."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.runs import budgets, commandline
from experiments.runs.commandline import Form, flag
from tljax import plugins
from tljax.types import InputError


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one fit; for the source's, each flag has a twin `--source_NAME`."""

    optimizer: str = flag("sgd", "of optax, with options: sgd, adam:b1=0.95, adamw; or package.module:attribute")
    learning_rate: float = flag(0.01, "the peak of the schedule")
    momentum: float = flag(0.0, "for optimizers that take one, from 0 to below 1")
    weight_decay: float = flag(0.0, "decoupled where the optimizer has its own, else added to the gradient")
    clip: float = flag(0.0, "largest global norm of the trained gradient; 0 clips nothing")
    schedule: str = flag("constant", "constant, linear or cosine, the latter two down to 0")
    warmup: float = flag(0.0, "fraction of the steps over which the rate rises from 0")
    batch_size: int = flag(100, "examples a step")
    epochs: int = flag(10, "passes over the training examples")
    steps: int | None = flag(None, "steps (batches) instead of epochs, one permutation after another")
    points: int = flag(10, "how many points the curves have under --steps")
    loss: str = flag("softmax_cross_entropy", "L (nats): a loss of optax, or package.module:attribute")
    label_smoothing: float = flag(0.0, "fraction of each label spread over all classes; for losses of one-hot labels")
    penalty: str = flag("", "lambda R over the trained leaves: l2:weight=1e-4:on=head/**, several with commas")
    validation: float = flag(0.0, "fraction of the training examples held out; they count as labels used")


@dataclass(frozen=True)
class Settings:
    """All of a run; `pretrain.run` and `transfer.run` take its fields as keyword arguments."""

    source: str | None = flag(None, "data set to learn first: mnist_10k:rotate=30, of TFDS, folder:DIR, FILE.npz", "T")
    source_checkpoint: str | None = flag(None, "trained before: a run, a checkpoint in it, FILE.safetensors, .npz", "T")
    source_rename: tuple[str, ...] = flag((), "of such a file: 0.weight:to=hidden_0/kernel:transpose, bn.t:drop", "T")
    target: str | None = flag(None, "data set to transfer to, named likewise; needed", "T")
    train_examples: tuple[str, ...] = flag(("all",), "label budgets (examples): all, 500, 5/class:seeds=30", "T")
    image_shape: tuple[int, ...] = flag((), "HEIGHT,WIDTH,CHANNELS to bring images to; default the source's", "T")
    data_dir: str | None = flag(None, "where data sets are kept; default as TFDS has it", "T")
    manual_dir: str | None = flag(None, "where files put by hand are: DIR/mnist/train-images-idx3-ubyte.gz ...", "T")
    model: str = flag("mlp", "a file of tljax/models, package.module:attribute, or FILE.py:model", "M")
    hidden: tuple[int, ...] = flag((512,), "widths of the hidden stages (units), with commas; the source's too", "M")
    activation: str = flag("relu", "elementwise function of jax.nn; the source's too", "M")
    head: str = flag("auto", "copy, fresh or zero; auto copies it only when the class names are equal", "S")
    strategies: tuple[str, ...] = flag(
        ("scratch", "full", "head_only"), "or last_k:k=2, mine.py:strategy, or with a name, LN_QV=mine.py:strategy", "S"
    )
    frozen_dropout: str = flag(
        "off", "in stages frozen whole: off, as in evaluation; on, and computed in every step", "S"
    )
    recipe: Recipe = Recipe()
    source_recipe: Recipe = Recipe()
    seeds: tuple[int, ...] = flag((0,), "a fit each, as 0,1,2 or 0-29; it seeds source, head, order and draw", "R")
    source_seed: int | None = flag(None, "pins the source's fit", "R")
    head_seed: int | None = flag(None, "pins what is drawn anew", "R")
    order_seed: int | None = flag(None, "pins the order of the examples", "R")
    draw_seed: int | None = flag(None, "pins the draw of label budgets and of the validation split", "R")
    workdir: str | None = flag(None, "the run directory, needed; a finished fit in it is not trained again", "R")
    save_fisher: bool = flag(False, "leave the source's Fisher information in its checkpoint, for --penalty=ewc", "R")
    checkpoint_every: int = flag(5, "segments (epochs, or between --points) after which fits are saved", "R")
    devices: int | None = flag(None, "that share the fits of a group; default all, on a CPU one a core", "C")
    parallel: str = flag("jit", "jit, or pmap: one fit at a time, its batches over all devices", "C")
    mesh: tuple[str, ...] = flag(
        (), "data:4,trial:2: four to a fit's batch, two fits at once; default all on trial", "C"
    )
    distributed: bool = flag(False, "one of many processes; SLURM, Open MPI and Kubernetes find themselves", "C")
    coordinator: str | None = flag(None, "HOST:PORT of process 0, needed where there is no such cluster", "C")
    num_processes: int | None = flag(None, "how many there are, needed likewise", "C")
    process_id: int | None = flag(None, "which of them this is, from 0, needed likewise", "C")
    heartbeat: int = flag(30, "seconds of silence after which another process counts as lost, and the run ends", "C")
    many: str = flag("auto", "fits on one device: map (one after another), vmap (side by side), or as is quicker", "C")
    features_budget: int = flag(10**9, "bytes for the output of frozen stages; 0 computes it in every step", "C")
    features_dtype: str = flag("float32", "in which that is kept, or bfloat16", "C")
    compilation_cache: str | None = flag(None, "of compiled programs; default ~/.cache/tljax; off for none", "C")
    dry_run: bool = flag(False, "print the graft plan and the mask tables, and stop", "R")


LISTS = ("strategies", "seeds", "train_examples")
"""What may grow from one run to the next in one run directory."""

NEUTRAL = {"frozen_dropout": "off"}
"""{flag: the value under which all is as before there was the flag}: it enters no key, and old runs are of it."""

PLACES = ("data_dir", "manual_dir", "devices", "parallel", "mesh", "compilation_cache", "checkpoint_every")
"""What may change, since it decides no bit of a result, or by a mesh with an axis of data nothing but its rounding."""

PROCESSES = ("distributed", "coordinator", "num_processes", "process_id", "heartbeat")
"""What is of one process, and not of the run."""

MOST = {
    **{"batch_size": 10**7, "epochs": 10**6, "steps": 10**8, "points": 10**6, "hidden": 10**6, "seed": 2**32},
    **{"devices": 1024, "image_shape": 10**5},
}
"""What is a slip of the keyboard beyond, rather than a machine without memory."""
_CHOICES = {
    "head": ("auto", "copy", "fresh", "zero"),
    "many": ("auto", "map", "vmap"),
    "parallel": ("jit", "pmap"),
    "frozen_dropout": ("off", "on"),
    "features_dtype": ("float32", "bfloat16"),
}


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """The flags given on a command line and in its flagfiles, by name. Raises InputError."""
    return commandline.parse(argv, kinds())


def read(argv: Sequence[str], form: type[Form]) -> tuple[dict[str, Any], Form]:
    """(as `parse`, a program's own flags) of a command line that gives both. Raises InputError."""
    own = commandline.kinds(form)
    given = commandline.parse(argv, kinds() | own)
    return given, form(**{name: given.pop(name) for name in own.keys() & given.keys()})


def settings(**given: Any) -> Settings:
    """Settings from keyword arguments named like the flags; raises InputError for an unknown one or a bad value.

    >>> settings(epochs=3, source_epochs=5).source_recipe.epochs
    5
    """
    for name in given.keys() - kinds().keys():
        raise InputError(commandline.unknown(name, kinds()))
    given = {name: commandline.at_home(name, value) for name, value in given.items()}
    own = {f.name for f in dataclasses.fields(Recipe)}
    recipe = {name: given[name] for name in own & given.keys()}
    twin = {name: given[f"source_{name}"] for name in own if f"source_{name}" in given}
    if "epochs" in twin:
        twin.setdefault("steps", None)
    rest = {name: value for name, value in given.items() if name not in own and name.removeprefix("source_") not in own}
    made = Settings(**rest, recipe=Recipe(**recipe), source_recipe=Recipe(**{**recipe, **twin}))
    _check(made)
    return made


def _check(made: Settings) -> None:
    for prefix, recipe in (("", made.recipe), ("source_", made.source_recipe)):
        for name in ("batch_size", "epochs", "steps", "points"):
            value = getattr(recipe, name)
            if value is not None and not 1 <= value <= MOST[name]:
                raise InputError(f"--{prefix}{name}={value}: it must be at least 1 and at most {MOST[name]:,}")
    for name, choices in _CHOICES.items():
        if getattr(made, name) not in choices:
            raise InputError(f"--{name}={getattr(made, name)}{plugins.nearest(getattr(made, name), choices)}")
    for name in LISTS:
        values = getattr(made, name)
        twice = next((value for value, count in Counter(values).items() if count > 1), None)
        if twice is not None or not values:
            raise InputError(
                f"--{name} names {f'{twice} twice: give each once' if twice is not None else 'nothing: name one'}"
            )
    refuse_shared_names(made.strategies)
    for name in ("source_seed", "head_seed", "order_seed", "draw_seed"):
        _check_seed(name, getattr(made, name) or 0)
    for seed in made.seeds:
        _check_seed("seeds", seed)
    if made.devices is not None and not 1 <= made.devices <= MOST["devices"]:
        raise InputError(f"--devices={made.devices}: it must be at least 1 and at most {MOST['devices']:,}")
    if made.checkpoint_every < 1:
        raise InputError(f"--checkpoint_every={made.checkpoint_every}: give 1 or more")
    if made.features_budget < 0:
        raise InputError(f"--features_budget={made.features_budget}: give 0 bytes or more")
    if max(made.hidden, default=1) > MOST["hidden"]:
        raise InputError(f"--hidden={max(made.hidden)}: a width is at most {MOST['hidden']:,}")
    for value in made.train_examples:
        budgets.check(value)
        budgets.seeds(value, made.seeds)
    shape = made.image_shape
    if shape and (len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] * shape[2] > MOST["image_shape"] * 100):
        raise InputError(f"--image_shape={','.join(map(str, shape))}: write HEIGHT,WIDTH,CHANNELS, below 10^7 in all")


def refuse_shared_names(strategies: Sequence[str]) -> None:
    """Raise InputError for two strategies of one name: their fits would be of one row."""
    texts: dict[str, str] = {}
    for text in strategies:
        other = texts.setdefault(plugins.called(text), text)
        if other != text:
            raise InputError(
                f"--strategies: '{other}' and '{text}' are both named {plugins.called(text)}: give each its own name"
            )


def _check_seed(name: str, seed: int) -> None:
    if not 0 <= seed <= MOST["seed"]:
        raise InputError(f"--{name}={seed}: a seed is at least 0 and at most {MOST['seed']:,}")


def beyond_neutral(made: Settings) -> dict[str, Any]:
    """{flag: value} of those of NEUTRAL that have another value: what enters a fit's key."""
    return {name: getattr(made, name) for name, value in NEUTRAL.items() if getattr(made, name) != value}


def to_flags(made: Settings) -> list[str]:
    """The flagfile lines that give these settings again, but for the run directory."""
    source = {f"source_{name}": value for name, value in vars(made.source_recipe).items()}
    every = {**vars(made), **vars(made.recipe), **source}
    kept = [name for name in kinds() if name not in ("workdir", "dry_run", *PROCESSES) and every[name] is not None]
    return [f"--{name}={_written(every[name])}" for name in kept]


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def kinds() -> dict[str, str]:
    """{flag: its type as written}, those of the source's fit after their twins."""
    own, recipe = commandline.kinds(Settings), commandline.kinds(Recipe)
    found: dict[str, str] = {}
    for f in dataclasses.fields(Settings):
        if f.name == "recipe":
            found |= recipe | {f"source_{name}": kind for name, kind in recipe.items()}
        elif f.name != "source_recipe":
            found[f.name] = own[f.name]
    return found
