"""The settings of a run, and the groups of flags that they are made of.

A group is a dataclass of flags that programs share; `THEME` is its heading in help. A program's form is made of the
groups that it needs. `Settings` has all of them, whatever the program: what a form has not stays at its default.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.runs import budgets, command_line
from experiments.runs.command_line import Kind, flag
from tljax import batch_stats, models, optimizers, plugins
from tljax.data.images import RESIZES
from tljax.objective import AUTO
from tljax.types import SELECTED_END, InputError, Model

MOST_DEVICES = 1024
MOST_STEPS = 10**8
_MOST_WIDTH = 10**6
_MOST_NUMBERS = 10**7
"""Beyond these, as beyond the bounds of flags, lies a slip of the keyboard rather than a machine without memory."""
_SEED = (0, 2**32)

# ---- The groups


@dataclass(frozen=True)
class SourceFlags:
    """The data set that a source learns."""

    THEME: ClassVar[str] = "Tasks"
    source: str | None = flag(
        None,
        "data set to learn first: mnist_10k:rotate=30, of TFDS, folder:DIR, FILE.npz, FILE.py:attribute",
        place="data",
        often=True,
    )


@dataclass(frozen=True)
class CheckpointFlags:
    """A source that was trained before."""

    THEME: ClassVar[str] = "Tasks"
    source_checkpoint: str | None = flag(
        None, "trained before: a run, a checkpoint in it, FILE.safetensors, .npz", place="path", often=True
    )


@dataclass(frozen=True)
class RenamingFlags:
    """How the arrays of a file of weights are called in the model."""

    THEME: ClassVar[str] = "Tasks"
    source_rules: str = flag(
        "", "which arrays of such a file are which leaves: vit_hf, vit_timm, resnet_torchvision, FILE.rules", neutral=""
    )
    source_rename: tuple[str, ...] = flag((), "rules of one's own, before those: 0.weight:to=hidden_0/kernel:transpose")


@dataclass(frozen=True)
class TargetFlags:
    """What is learnt then."""

    THEME: ClassVar[str] = "Tasks"
    target: str | None = flag(None, "data set to transfer to, named likewise; needed", place="data", often=True)


@dataclass(frozen=True)
class LabelFlags:
    """From how many labelled examples it is learnt."""

    THEME: ClassVar[str] = "Tasks"
    train_examples: tuple[str, ...] = flag(
        ("all",), "label budgets (examples): all, 500, 5/class:seeds=30", role="grows", often=True
    )


@dataclass(frozen=True)
class DataFlags:
    """Where data sets are, and to which shape their images are brought."""

    THEME: ClassVar[str] = "Tasks"
    image_shape: tuple[int, ...] = flag((), "HEIGHT,WIDTH,CHANNELS to bring images to; default the source's")
    resize: str = flag(
        "crop",
        "images of another aspect: by the short side and cropped at the centre, or squashed",
        choices=RESIZES,
        role="free",  # the fingerprint of the data says it
    )
    data_dir: str | None = flag(None, "where data sets are kept; default as TFDS has it", role="free", place="path")
    manual_dir: str | None = flag(
        None, "where files put by hand are: DIR/mnist/train-images-idx3-ubyte.gz ...", role="free", place="path"
    )


@dataclass(frozen=True)
class ModelFlags:
    """The model, of the source and of the target."""

    THEME: ClassVar[str] = "Model"
    model: str = flag("mlp", "a file of tljax/models, package.module:attribute, or FILE.py:model")
    hidden: tuple[int, ...] = flag(
        (512,), "widths of the hidden stages (units), with commas; the source's too", often=True
    )
    activation: str = flag("relu", "elementwise function of jax.nn; the source's too")


@dataclass(frozen=True)
class StrategyFlags:
    """What is trained of the model, and from where it starts."""

    THEME: ClassVar[str] = "Strategy"
    head: str = flag(
        "auto",
        "copy, fresh or zero; auto copies it only when the class names are equal",
        choices=("auto", "copy", "fresh", "zero"),
    )
    head_seed: int | None = flag(None, "pins what is drawn anew", bounds=_SEED)
    strategies: tuple[str, ...] = flag(
        ("scratch", "full", "head_only"),
        "or last_k:k=2, mine.py:strategy, or with a name, LN_QV=mine.py:strategy",
        role="grows",
        often=True,
    )
    frozen_dropout: str = flag(
        "off",
        "in stages frozen whole: off, as in evaluation; on, and computed in every step",
        choices=("off", "on"),
        neutral="off",
    )
    batch_stats: str = flag(
        "auto",
        "running averages of batch norms: frozen, tracked or reestimated (anew at each point, from the training "
        "examples); auto tracks those of stages that train whole, and freezes others",
        choices=batch_stats.MODES,
        neutral="auto",
    )
    verdict_of: str = flag(
        "last",
        "which parameters results and verdicts are of: last, best (of the points, by --validation), average (of "
        "--ema), a name that the strategies' finish gives, or selected (of all these, by --validation)",
        neutral="last",
    )


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one fit; for the source's, each flag has a twin `--source_NAME`."""

    THEME: ClassVar[str] = "Fit (each with a twin --source_NAME for the source's fit; its default is what --NAME says)"
    TWIN: ClassVar[str] = "source_"
    optimizer: str = flag("sgd", "of optax, with options: sgd, adam:b1=0.95, adamw; or package.module:attribute")
    learning_rate: float = flag(0.01, "the peak of the schedule", often=True)
    momentum: float = flag(0.0, "for optimizers that take one, from 0 to below 1")
    weight_decay: float = flag(0.0, "decoupled where the optimizer has its own, else added to the gradient")
    decay: str = flag(
        "auto",
        "which leaves weight decay touches: all, kernels (no biases, norms, position embeddings, class tokens), or "
        "globs; auto: kernels where the optimizer has its own decay, as adamw has, else all",
        neutral="all",
    )
    clip: float = flag(0.0, "largest global norm of the trained gradient; 0 clips nothing")
    schedule: str = flag("constant", "constant, linear or cosine, the latter two down to 0")
    warmup: float = flag(0.0, "fraction of the steps over which the rate rises from 0")
    batch_size: int = flag(100, "examples a step", bounds=(1, 10**7), often=True)
    microbatch: int = flag(
        0,
        "examples of a batch at a time, which divide it: less memory, the same gradient; 0: all at once",
        bounds=(0, 10**7),
        neutral=0,
    )
    compute_dtype: str = flag(
        "float32",
        "in which the model computes: float32, or bfloat16 with parameters, losses and sums in float32",
        neutral="float32",
    )
    matmul_precision: str = flag(
        "default",
        "of the model's float32 products on devices with faster ones (tf32): default, high, highest",
        choices=models.PRECISIONS,
        neutral="default",
    )
    remat: tuple[str, ...] = flag(
        (),
        "stages whose insides are computed again for the gradient and not kept: less memory, more time; XLA undoes it "
        "on a CPU",
        neutral=(),
    )
    epochs: int = flag(10, "passes over the training examples", bounds=(1, 10**6), often=True)
    steps: int | None = flag(
        None, "steps (batches) instead of epochs, one permutation after another", bounds=(1, MOST_STEPS), often=True
    )
    points: int = flag(10, "how many points the curves have under --steps", bounds=(1, 10**6))
    loss: str = flag("auto", "L: as the targets are, a loss of optax, or package.module:attribute")
    label_smoothing: float = flag(0.0, "fraction of each label spread over all classes; for losses of one-hot labels")
    penalty: str = flag(
        "",
        "lambda R over the trained leaves: l2:weight=1e-4:on=head/**, several with commas, or FILE.py:penalty:weight=1",
    )
    validation: float = flag(0.0, "fraction of the training examples held out; they count as labels used")
    augment: str = flag(
        "",
        "random changes of what is trained on: crop:pad=4,flip, erase, jitter:brightness=0.5, mixup, cutmix, or "
        "FILE.py:augment; auto crops and flips pixels; none changes nothing",
        neutral="",
    )
    class_weights: str = flag(
        "none",
        "balanced: L of each example times n / (k n_c), so that all k classes weigh the same",
        choices=("none", "balanced"),
        neutral="none",
    )
    metric: tuple[str, ...] = flag(
        (), "more to measure, with commas: macro_f1, auc, mae, token_accuracy, FILE.py:metric", neutral=()
    )
    primary: str = flag(
        "", "the metric that verdicts are of, if another than the targets have; with a score an item", neutral=""
    )
    ema: float = flag(
        0.0,
        "decay of an exponential average of what trains, kept and evaluated beside it, such as 0.999; its start weighs "
        "ema^n in it after n steps; 0 for none",
        neutral=0.0,
    )

    def optimizer_spec(self) -> tuple[optimizers.OptimizerSpec, dict[str, float]]:
        """(optimizer as it is compiled, {number that is traced: its value}). Raises InputError as `optimizers.spec`."""
        names = ("momentum", "weight_decay", "clip", "decay")
        return optimizers.spec(self.optimizer, **{name: getattr(self, name) for name in names})

    def in_effect(self) -> "Recipe":
        """The recipe with what its automatic values come to: what enters a fit's key. Raises InputError likewise.

        >>> Recipe(optimizer="adamw").in_effect().decay, Recipe(optimizer="adamw", weight_decay=0.1).in_effect().decay
        ('all', 'kernels')
        """
        return dataclasses.replace(self, decay=self.optimizer_spec()[0].decay)


@dataclass(frozen=True)
class NamedRecipeFlags:
    """A recipe of the field by its name, for flags of a fit that are not given. `Settings` hold the flags alone."""

    THEME: ClassVar[str] = Recipe.THEME
    TWIN: ClassVar[str] = "source_"
    recipe: str = flag(
        "",
        "values for flags of a fit that are not given: finetune (AdamW, cosine, label smoothing, crop and flip; see "
        "experiments/flags/recipes); default no recipe",
        role="local",
    )


@dataclass(frozen=True)
class SeedFlags:
    """The fits of a strategy, one a seed."""

    THEME: ClassVar[str] = "Run"
    seeds: tuple[int, ...] = flag(
        (0,), "a fit each, as 0,1,2 or 0-29; it seeds source, head, order and draw", role="grows", often=True
    )


@dataclass(frozen=True)
class PinFlags:
    """Streams of randomness that the fits of all seeds share; --head_seed, of the strategies, pins that of the head."""

    THEME: ClassVar[str] = "Run"
    source_seed: int | None = flag(None, "pins the source's fit", bounds=_SEED)
    order_seed: int | None = flag(None, "pins the order of the examples", bounds=_SEED)
    draw_seed: int | None = flag(None, "pins the draw of label budgets and of the validation split", bounds=_SEED)


@dataclass(frozen=True)
class RunFlags:
    """The run directory, and what is kept in it."""

    THEME: ClassVar[str] = "Run"
    workdir: str | None = flag(
        None,
        "the run directory, needed; a finished fit in it is not trained again",
        role="local",
        place="new",
        often=True,
    )
    save_fisher: bool = flag(
        False, "leave the source's Fisher information in its checkpoint, for --penalty=ewc and its like"
    )
    checkpoint_every: int = flag(
        5, "segments (epochs, or between --points) after which fits are saved", role="free", bounds=(1, None)
    )
    dry_run: bool = flag(False, "print the graft plan and the mask tables, and stop", role="local", often=True)


@dataclass(frozen=True)
class ComputeFlags:
    """The devices and the processes that compute.

    Devices that share the batches of a fit change the rounding of results: an axis of data, pmap, many processes. So
    does the number of devices that fits side by side are divided over, which is in their keys; and under pmap a model
    draws otherwise on another number of them, which is too. Nothing else here changes anything of results.
    """

    THEME: ClassVar[str] = "Speed"
    devices: int | None = flag(
        None,
        "that share the fits of a group; default all, on a CPU one a core",
        role="free",
        bounds=(1, MOST_DEVICES),
    )
    parallel: str = flag(
        "jit", "jit, or pmap: one fit at a time, its batches over all devices", role="free", choices=("jit", "pmap")
    )
    mesh: tuple[str, ...] = flag(
        (), "data:4,trial:2: four to a fit's batch, two fits at once; default all on trial", role="free"
    )
    distributed: bool = flag(
        False, "one of many processes; SLURM, Open MPI and Kubernetes find themselves", role="local"
    )
    coordinator: str | None = flag(None, "HOST:PORT of process 0, needed where there is no such cluster", role="local")
    num_processes: int | None = flag(None, "how many there are, needed likewise", role="local")
    process_id: int | None = flag(None, "which of them this is, from 0, needed likewise", role="local")
    heartbeat: int = flag(
        30, "seconds of silence after which another process counts as lost, and the run ends", role="local"
    )
    profile: str | None = flag(
        None, "steps to trace, as 10:20, of the first fits that take them, into WORKDIR/profile", role="local"
    )
    compilation_cache: str | None = flag(
        None, "of compiled programs; default ~/.cache/tljax; off for none", role="free", place="new"
    )


@dataclass(frozen=True)
class SharingFlags:
    """How fits share a device, and what is computed once for all of them."""

    THEME: ClassVar[str] = "Speed"
    many: str = flag(
        "auto",
        "fits on one device: map (one after another), vmap (side by side), or as is quicker on its platform",
        choices=("auto", "map", "vmap"),
    )
    features_budget: int = flag(
        10**9, "bytes for the output of frozen stages; 0 computes it in every step", bounds=(0, None)
    )
    features_dtype: str = flag("float32", "in which that is kept, or bfloat16", choices=("float32", "bfloat16"))
    augment_views: int = flag(
        0,
        "augmented copies of each example whose output of frozen stages is kept; 0 augments anew in every step, which "
        "then computes those stages",
        bounds=(0, 10**6),
        neutral=0,
    )
    evaluation_batch: int = flag(
        0,
        "examples that go through the model at once in evaluation, and at most for the output of frozen stages; it "
        "rounds; 0: as many as memory holds, up to 1000",
        bounds=(0, 10**7),
        neutral=0,
    )


@dataclass(frozen=True)
class StreamFlags:
    """Where the examples are that are computed on."""

    THEME: ClassVar[str] = "Speed"
    data: str = flag(
        "auto",
        "examples: resident on the devices, streamed to them, or as there is room; a source in Python of at most "
        "268 MB is read whole at the start in any case",
        role="free",
        choices=("auto", "resident", "streamed"),
    )
    stream_memory: int = flag(
        5 * 10**8, "bytes of host memory for streamed examples that are read ahead", role="free", bounds=(1, None)
    )


@dataclass(frozen=True)
class TrainFlags(NamedRecipeFlags, Recipe, SeedFlags, PinFlags, RunFlags, ComputeFlags, SharingFlags, StreamFlags):
    """The flags of every program that trains."""


@dataclass(frozen=True)
class ExperimentFlags(
    SourceFlags,
    CheckpointFlags,
    RenamingFlags,
    TargetFlags,
    LabelFlags,
    DataFlags,
    ModelFlags,
    StrategyFlags,
    TrainFlags,
):
    """All flags that programs share: those of experiments.transfer."""


FLAGS: Mapping[str, Kind] = command_line.kinds(ExperimentFlags)
"""{flag: its kind} of all that programs share, the twins of a fit's flags among them."""

# ---- The settings


@dataclass(frozen=True)
class Settings(
    StreamFlags,
    SharingFlags,
    ComputeFlags,
    RunFlags,
    PinFlags,
    SeedFlags,
    StrategyFlags,
    ModelFlags,
    DataFlags,
    LabelFlags,
    TargetFlags,
    RenamingFlags,
    CheckpointFlags,
    SourceFlags,
):
    """All of a run; `pretrain.run` and `transfer.run` take the flags as keyword arguments."""

    recipe: Recipe = Recipe()
    source_recipe: Recipe = Recipe()

    @classmethod
    def from_flags(cls, **values: Any) -> "Settings":
        """Settings from keyword arguments named like the flags.

        Raises InputError for an unknown one, a value that is out of bounds, and values that contradict each other.

        >>> Settings.from_flags(epochs=3, source_epochs=5).source_recipe.epochs
        5
        """
        for name in values.keys() - FLAGS.keys():
            raise InputError(command_line.unknown(name, FLAGS))
        values = {name: command_line.at_home(name, FLAGS[name], value) for name, value in values.items()}
        named = named_recipe(values.pop("recipe", ""))
        source_named = named_recipe(values.pop("source_recipe"), "source_") if "source_recipe" in values else named
        names = {f.name for f in dataclasses.fields(Recipe)}
        recipe = {name: values[name] for name in names & values.keys()}
        twin = {name: values[f"source_{name}"] for name in names if f"source_{name}" in values}
        if "epochs" in twin:
            twin.setdefault("steps", None)
        rest = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        source_recipe = Recipe(**{**source_named, **recipe, **twin})
        settings = cls(**rest, recipe=Recipe(**{**named, **recipe}), source_recipe=source_recipe)
        _check(settings)
        return settings

    def flagfile_lines(self) -> list[str]:
        """The flagfile lines that give these settings again, but for what is local to a call, such as --workdir."""
        source = {f"source_{name}": value for name, value in vars(self.source_recipe).items()}
        values = {**vars(self), **vars(self.recipe), **source}
        return [f"--{name}={written(values[name])}" for name in WRITTEN if values[name] is not None]

    def build_model(self, num_outputs: int, recipe: Recipe | None = None) -> Model:
        """The model that the settings describe, whose head gives so many outputs."""
        computed = (
            {name: getattr(recipe, name) for name in ("compute_dtype", "matmul_precision", "remat")} if recipe else {}
        )
        return models.build(self.model, num_outputs, hidden=self.hidden, activation=self.activation, **computed)

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says of the model that the settings describe."""
        code = plugins.outside_digest(self.model, "tljax.models", "model")
        described = {"model": self.model, "hidden": list(self.hidden), "activation": self.activation}
        return described | ({"code": code} if code else {})

    def of_older_runs(self) -> dict[str, Any]:
        """{flag: the value that runs from before the flag are of}: its neutral value, or this one's where it comes to
        that."""
        values = dict(NEUTRAL)
        for prefix, recipe in (("", self.recipe), (Recipe.TWIN, self.source_recipe)):
            try:
                effect = vars(recipe.in_effect())
            except InputError:  # it is refused where the recipe is checked
                continue
            values |= {
                prefix + name: getattr(recipe, name)
                for name, value in effect.items()
                if prefix + name in NEUTRAL and NEUTRAL[prefix + name] == value
            }
        return values

    def beyond_neutral(self) -> dict[str, Any]:
        """{flag: value} of those with a neutral value that have another one: what enters a fit's key of them."""
        known = {name: value for name, value in NEUTRAL.items() if name in vars(self)}
        return {name: getattr(self, name) for name, value in known.items() if getattr(self, name) != value}


def named_recipe(name: str, prefix: str = "") -> dict[str, Any]:
    """{flag: value} of a recipe of the field, from its flagfile; {} for no name. Raises InputError for an unknown one.

    >>> named_recipe("finetune")["optimizer"]
    'adamw'
    """
    if not name:
        return {}
    folder = command_line.FLAGFILES / "recipes"
    known = sorted(file.stem for file in folder.glob("*.flags"))
    if name not in known:
        raise InputError(f"--{prefix}recipe={name}{plugins.nearest(name, known)}")
    return command_line.parse(["", f"--flagfile={folder / name}.flags"], command_line.kinds(Recipe))


def named_recipes_of(recipe: Recipe, flag: str) -> list[str]:
    """The names of the recipes of the field that give this value of a flag, and the optimizer and schedule of the fit.

    >>> named_recipes_of(Recipe(**named_recipe("finetune")), "label_smoothing"), named_recipes_of(Recipe(), "epochs")
    (['finetune'], [])
    """
    names = sorted(file.stem for file in (command_line.FLAGFILES / "recipes").glob("*.flags"))
    alike = {flag, "optimizer", "schedule"}
    return [
        name
        for name in names
        if alike <= {key for key, value in named_recipe(name).items() if value == getattr(recipe, key)}
    ]


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """{flag: value} of the shared flags that a command line and its flagfiles give. Raises InputError."""
    return command_line.parse(argv, FLAGS)


_FIELDS = command_line.fields(ExperimentFlags)
_LOCAL = {f.name for f in _FIELDS if f.metadata["role"] == "local"} | {Recipe.TWIN + "recipe"}
WRITTEN = tuple(name for name in FLAGS if name not in _LOCAL)
"""The flags that stand in the flagfile of a run directory."""
GROWING = tuple(f.name for f in _FIELDS if f.metadata["role"] == "grows")
"""The lists that may grow from one run to the next in one run directory."""
FREE = tuple(f.name for f in _FIELDS if f.metadata["role"] == "free")
"""What may change, since it decides no bit of a result."""
NEUTRAL = {
    prefix + f.name: f.metadata["neutral"]
    for prefix, group in (("", _FIELDS), (Recipe.TWIN, command_line.fields(Recipe)))
    for f in group
    if f.metadata["neutral"] is not None
}
"""{flag: the value under which all is as before there was the flag}: it enters no key, and old runs are of it."""


def written(value: Any) -> str:
    """A value as settings are written; the files of older runs are compared with it as text, so it stays so."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def as_compared(name: str, text: str) -> str:
    """The text of a flag's value by which two runs are compared: old ones of classes have a loss where now is 'auto'.

    >>> as_compared("source_loss", "auto"), as_compared("loss", "l2_loss")
    ('softmax_cross_entropy', 'l2_loss')
    """
    return AUTO["classes"] if name.removeprefix(Recipe.TWIN) == "loss" and text == "auto" else text


# ---- What cannot be


def _check(settings: Settings) -> None:
    """Raise InputError for settings out of bounds, and for those that contradict each other."""
    for prefix, group in (("", settings), ("", settings.recipe), ("source_", settings.source_recipe)):
        for f in command_line.fields(group):
            _check_value(prefix + f.name, getattr(group, f.name), f.metadata["choices"], f.metadata["bounds"])
        if isinstance(group, Recipe):
            try:
                models.require_dtype(group.compute_dtype)
            except InputError as error:
                raise InputError(command_line.in_flags(error, prefix)) from error
    for name in GROWING:
        values = getattr(settings, name)
        twice = next((value for value, count in Counter(values).items() if count > 1), None)
        if twice is not None or not values:
            raise InputError(
                f"--{name} names {f'{twice} twice: give each once' if twice is not None else 'nothing: name one'}"
            )
    for prefix, recipe in (("", settings.recipe), ("source_", settings.source_recipe)):
        if not 0 <= recipe.ema < 1:
            raise InputError(f"--{prefix}ema={recipe.ema}: give a decay of at least 0 and below 1, such as 0.999")
    profile_steps(settings)
    if settings.verdict_of == "best" and not settings.recipe.validation:
        raise InputError("--verdict_of=best is by a validation split: give --validation=0.1, say")
    if settings.verdict_of == SELECTED_END and not settings.recipe.validation:
        raise InputError("--verdict_of=selected is by a validation split: give --validation=0.1, say")
    if settings.verdict_of == "average" and not settings.recipe.ema:
        raise InputError("--verdict_of=average is of --ema: give --ema=0.999, say")
    refuse_shared_names(settings.strategies)
    for seed in settings.seeds:
        _check_value("seeds", seed, (), _SEED)
    if max(settings.hidden, default=1) > _MOST_WIDTH:
        raise InputError(f"--hidden={max(settings.hidden)}: a width is at most {_MOST_WIDTH:,}")
    for budget in settings.train_examples:
        budgets.check(budget)
        budgets.seeds(budget, settings.seeds)
    shape = settings.image_shape
    if shape and (len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] * shape[2] > _MOST_NUMBERS):
        raise InputError(f"--image_shape={','.join(map(str, shape))}: write HEIGHT,WIDTH,CHANNELS, below 10^7 in all")


def profile_steps(settings: Settings) -> tuple[int, int] | None:
    """(The first step of --profile, the step at which it ends), None without. Raises InputError for others."""
    if settings.profile is None:
        return None
    first, _, last = settings.profile.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last) <= MOST_STEPS):
        raise InputError(f"--profile={settings.profile}: give the first step and the one at which it ends, as 10:20")
    return int(first), int(last)


def _check_value(name: str, value: Any, choices: Sequence[str], bounds: tuple[int, int | None] | None) -> None:
    """Raise InputError for a value that is none of its flag's choices, or out of its bounds."""
    if choices and value not in choices:
        raise InputError(f"--{name}={value}{plugins.nearest(value, choices)}")
    if bounds is None or value is None:
        return
    least, most = bounds
    if most is None and value < least:
        raise InputError(f"--{name}={value}: give {least} or more")
    if most is not None and not least <= value <= most:
        raise InputError(f"--{name}={value}: it must be at least {least} and at most {most:,}")


def refuse_shared_names(strategies: Sequence[str]) -> None:
    """Raise InputError for two strategies of one name: their fits would be of one row."""
    texts: dict[str, str] = {}
    for text in strategies:
        other = texts.setdefault(plugins.called(text), text)
        if other != text:
            raise InputError(
                f"--strategies: '{other}' and '{text}' are both named {plugins.called(text)}: give each its own name"
            )
