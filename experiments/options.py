"""The flags of the programs, and the settings they become."""

import ast
import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags

from experiments import budgets, commandline
from tljax import plugins
from tljax.types import InputError


def _flag(default: Any, help: str, group: str = "") -> Any:
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one fit; for the source's, each flag has a twin `--source_NAME`."""

    optimizer: str = _flag("sgd", "of optax, with options: sgd, adam:b1=0.95, adamw; or package.module:attribute")
    learning_rate: float = _flag(0.01, "the peak of the schedule")
    momentum: float = _flag(0.0, "for optimizers that take one")
    weight_decay: float = _flag(0.0, "decoupled where the optimizer has its own, else added to the gradient")
    clip: float = _flag(0.0, "largest global norm of the trained gradient; 0 clips nothing")
    schedule: str = _flag("constant", "constant, linear or cosine, the latter two down to 0")
    warmup: float = _flag(0.0, "fraction of the steps over which the rate rises from 0")
    batch_size: int = _flag(100, "examples a step")
    epochs: int = _flag(10, "passes over the training examples")
    steps: int | None = _flag(None, "steps instead of epochs; the order runs over one permutation after another")
    points: int = _flag(10, "points of the curves under --steps; phases begin at them")
    loss: str = _flag("softmax_cross_entropy", "L: a loss of optax, or package.module:attribute")
    label_smoothing: float = _flag(0.0, "share of each label spread over all classes; for losses of one-hot labels")
    penalty: str = _flag("", "lambda R over the trained leaves: l2:weight=1e-4:on=head/**, several with commas")
    validation: float = _flag(0.0, "fraction of the training examples held out; they count as labels used")


@dataclass(frozen=True)
class Settings:
    """All of a run; `pretrain.run` and `transfer.run` take its fields as keyword arguments."""

    source: str | None = _flag(
        None, "data set to learn first: mnist_10k, any of TFDS, folder:DIR, FILE.npz; changed: mnist_10k:rotate=30", "T"
    )
    source_checkpoint: str | None = _flag(
        None, "trained before: a run, a checkpoint in it, FILE.safetensors, .npz", "T"
    )
    source_rename: tuple[str, ...] = _flag((), "of such a file: 0.weight:to=hidden_0/kernel:transpose, bn.t:drop", "T")
    target: str | None = _flag(None, "data set to transfer to, named likewise", "T")
    train_examples: tuple[str, ...] = _flag(("all",), "label budgets: all, 500, 5/class, 5/class:seeds=30", "T")
    image_shape: tuple[int, ...] = _flag((), "HEIGHT,WIDTH,CHANNELS to bring images to; default the source's", "T")
    data_dir: str | None = _flag(None, "where data sets are kept; default as TFDS has it", "T")
    manual_dir: str | None = _flag(None, "where files put by hand are: DIR/mnist/train-images-idx3-ubyte.gz ...", "T")
    model: str = _flag("mlp", "a file of tljax/models, package.module:attribute, or FILE.py:model", "M")
    hidden: tuple[int, ...] = _flag((512,), "widths of the hidden stages, with commas; the source's too", "M")
    activation: str = _flag("relu", "elementwise function of jax.nn; the source's too", "M")
    head: str = _flag("auto", "copy, fresh or zero; auto copies it only when the class names are equal", "S")
    strategies: tuple[str, ...] = _flag(
        ("scratch", "full", "head_only"), "with options: last_k:k=2, mine.py:strategy", "S"
    )
    recipe: Recipe = Recipe()
    source_recipe: Recipe = Recipe()
    seeds: tuple[int, ...] = _flag((0,), "a fit for each, as 0,1,2 or 0-29; a seed names the four streams below", "R")
    source_seed: int | None = _flag(None, "pins the source's fit", "R")
    head_seed: int | None = _flag(None, "pins what is drawn anew", "R")
    order_seed: int | None = _flag(None, "pins the order of the examples", "R")
    draw_seed: int | None = _flag(None, "pins the draw of label budgets and of the validation split", "R")
    workdir: str | None = _flag(None, "the run directory; a finished fit in it is not trained again", "R")
    save_fisher: bool = _flag(False, "leave the source's Fisher information in its checkpoint, for --penalty=ewc", "R")
    checkpoint_every: int = _flag(5, "segments after which fits that are under way are saved", "R")
    devices: int | None = _flag(
        None, "over so many the fits of a group are divided; default all, on a CPU one a core", "C"
    )
    parallel: str = _flag("jit", "jit, or pmap: one fit at a time, its batches over all devices", "C")
    mesh: tuple[str, ...] = _flag(
        (), "data:4,trial:2: four devices share the batches of a fit, two fits at once; default all on trial", "C"
    )
    distributed: bool = _flag(False, "one of many processes; SLURM, Open MPI and Kubernetes find themselves", "C")
    coordinator: str | None = _flag(None, "HOST:PORT of process 0, where there is no such cluster", "C")
    num_processes: int | None = _flag(None, "how many there are, likewise", "C")
    process_id: int | None = _flag(None, "which of them this is, from 0", "C")
    heartbeat: int = _flag(30, "seconds of silence after which another process counts as lost, and the run ends", "C")
    many: str = _flag("auto", "fits on one device: map (one after another), vmap (side by side), or as is quicker", "C")
    features_budget: int = _flag(
        10**9, "bytes for the output of frozen stages, computed once; 0 computes it in every step", "C"
    )
    features_dtype: str = _flag("float32", "in which that is kept, or bfloat16", "C")
    compilation_cache: str | None = _flag(
        None, "where compiled programs are kept; default ~/.cache/tljax; off for none", "C"
    )
    dry_run: bool = _flag(False, "print the graft plan and the mask tables, and stop", "R")


LISTS = ("strategies", "seeds", "train_examples")
"""What may grow from one run to the next in one run directory."""

PLACES = ("data_dir", "manual_dir", "devices", "parallel", "mesh", "compilation_cache", "checkpoint_every")
"""What may change, since it decides no bit of a result, or by a mesh with an axis of data nothing but its rounding."""

PROCESSES = ("distributed", "coordinator", "num_processes", "process_id", "heartbeat")
"""What is of one process, and not of the run."""

_GROUPS = {
    "T": "Tasks",
    "M": "Model",
    "S": "Strategy",
    "F": "Fit (each with a twin --source_NAME for the source's fit)",
    "R": "Run",
    "C": "Speed",
}
MOST = {
    **{"batch_size": 10**7, "epochs": 10**6, "steps": 10**8, "points": 10**6, "hidden": 10**6, "seed": 2**32},
    **{"devices": 1024, "image_shape": 10**5},
}
"""What is a slip of the keyboard beyond, rather than a machine without memory."""
_CHOICES = {
    "head": ("auto", "copy", "fresh", "zero"),
    "many": ("auto", "map", "vmap"),
    "parallel": ("jit", "pmap"),
    "features_dtype": ("float32", "bfloat16"),
}


def parse(argv: Sequence[str], about: str) -> dict[str, Any] | None:
    """The flags given on a command line and in its flagfiles; None after printing help. Raises InputError."""
    if commandline.asks_help(argv):
        print(_help(about))
        return None
    values = _define()
    commandline.read(values, argv)
    return {name: _convert(name, kind, values[name].value) for name, kind in _kinds().items() if values[name].present}


def settings(**given: Any) -> Settings:
    """Settings from keyword arguments named like the flags; raises InputError for an unknown one or a bad value.

    >>> settings(epochs=3, source_epochs=5).source_recipe.epochs
    5
    """
    for name in given.keys() - _kinds().keys():
        raise InputError(f"unknown flag '{name}'{plugins.nearest(name, _kinds())}")
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
        twice = [value for value in values if values.count(value) > 1]
        if twice or not values:
            raise InputError(f"--{name} names {f'{twice[0]} twice: give each once' if twice else 'nothing: name one'}")
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


def _check_seed(name: str, seed: int) -> None:
    if not 0 <= seed <= MOST["seed"]:
        raise InputError(f"--{name}={seed}: a seed is at least 0 and at most {MOST['seed']:,}")


def to_flags(made: Settings) -> list[str]:
    """The flagfile lines that give these settings again, but for the run directory."""
    lines = []
    for name, kind in _kinds().items():
        recipe = made.source_recipe if name not in _plain() and name.startswith("source_") else made.recipe
        value = getattr(made, name) if name in _plain() else getattr(recipe, name.removeprefix("source_"))
        if name in ("workdir", "dry_run", *PROCESSES) or value is None:
            continue
        if "tuple" in kind:
            value = ",".join(map(str, value))
        lines.append(f"--{name}={value!r}" if kind == "float" else f"--{name}={value}")
    return lines


def _plain() -> set[str]:
    return {f.name for f in dataclasses.fields(Settings)} - {"recipe", "source_recipe"}


def _kinds() -> dict[str, str]:
    """{flag: its type as written}, those of the source's fit after their twins."""
    kinds: dict[str, str] = {}
    for f in dataclasses.fields(Settings):
        if f.name == "recipe":
            kinds |= {r.name: _kind(r) for r in dataclasses.fields(Recipe)}
            kinds |= {f"source_{r.name}": _kind(r) for r in dataclasses.fields(Recipe)}
        elif f.name != "source_recipe":
            kinds[f.name] = _kind(f)
    return kinds


def _kind(f: dataclasses.Field) -> str:
    name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    return str(f.type) if "tuple" in str(f.type) or "|" in str(f.type) else name


def _define() -> flags.FlagValues:
    values = flags.FlagValues()
    for name, kind in _kinds().items():
        if kind == "bool":
            flags.DEFINE_bool(name, False, "", flag_values=values)
        elif kind.startswith("int"):
            flags.DEFINE_integer(name, None, "", flag_values=values)
        elif kind == "float":
            flags.DEFINE_float(name, None, "", flag_values=values)
        else:
            flags.DEFINE_string(name, None, "", flag_values=values)
    return values


def _convert(name: str, kind: str, value: Any) -> Any:
    if "tuple" not in kind:
        if value == "" and not name.endswith("penalty"):
            raise InputError(f"--{name}= is empty: give a value, or leave the flag out")
        return value
    parts = tuple(part.strip() for part in plugins.split(value, ",") if part.strip())
    if "int" not in kind:
        return parts
    try:
        return tuple(number for part in parts for number in _whole(part))
    except ValueError as error:
        raise InputError(f"--{name}={value}: write whole numbers with commas between them, or as 0-29") from error


def _whole(part: str) -> Sequence[int]:
    """The whole numbers of '3', or of '0-29'."""
    first, dash, last = part.partition("-")
    if not dash or not first:
        return (int(part),)
    if int(last) - int(first) not in range(100_000):
        raise ValueError(part)
    return range(int(first), int(last) + 1)


def _help(about: str) -> str:
    text = [about.strip(), ""]
    fields = [(f, f.metadata["group"]) for f in dataclasses.fields(Settings) if f.metadata]
    fields += [(f, "F") for f in dataclasses.fields(Recipe)]
    for key, title in _GROUPS.items():
        text += [f"{title}:"]
        for f in (f for f, group in fields if group == key):
            default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            tail = "" if default in (None, "", False) else f" (default {default})"
            lines = textwrap.wrap(f.metadata["help"] + tail, 86)
            text += [f"  --{f.name:<18} {lines[0]}", *(" " * 23 + line for line in lines[1:])]
        if key == "S":
            text += [f"      {name:<14} {line}" for name, line in strategies().items()]
        text += [""]
    return "\n".join([*text, "--flagfile=FILE reads flags from a file, one a line; what comes later counts."])


def strategies() -> dict[str, str]:
    """{name: first line of its docstring} of the folder, without importing them."""
    import tljax.strategies as folder

    place = Path(folder.__path__[0])
    return {name: _about(place / f"{name}.py") for name in plugins.names("tljax.strategies", "strategy")}


def _about(file: Path) -> str:
    try:
        text = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        return f"cannot be read: {error.msg} ({file.name}:{error.lineno})"
    return (text or "").split("\n")[0]
