"""The flags of a search, and the checks that the search is possible and fair."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.runs import command_line
from experiments.runs.command_line import flag
from experiments.runs.settings import Settings, parse_flags
from tljax import penalties
from tljax.study import space
from tljax.study.space import Range
from tljax.types import InputError

FIRST_SEED = 1_000_000
"""The search's seeds begin here."""
SEEDS_OF_A_SEARCH = 1_000
"""From one tuning seed to the next the trials' seeds are so far apart, so that no two have one in common."""
_SEARCHED = ("hidden", "activation", "head")
"""Flags beside those of a recipe that a search may vary."""
MEASURED = ("metric", "primary")
"""Flags of a recipe that it may not: they say what is measured."""
PINS = ("source_seed", "head_seed", "order_seed", "draw_seed")
"""Flags that a search and its final fits would share."""


@dataclass(frozen=True)
class Search:
    """The flags of a search.

    All may change between runs, since each study records its space and seeds, and refuses others.
    """

    space: tuple[str, ...] = flag(
        (),
        "a dimension of the space, repeated: FLAG:log:LOW:HIGH, FLAG:between:LOW:HIGH, FLAG:int:LOW:HIGH, FLAG:in:A,B; "
        "penalty.NAME.OPTION and strategy.NAME.OPTION are options of a penalty or strategy; needed",
        repeated=True,
        role="free",
    )
    trials: int = flag(32, "the number of trials of each study", role="free")
    group: int = flag(16, "the number of trials that are drawn and trained together", role="free")
    timeout: float | None = flag(None, "seconds after which no further trials are drawn", role="free")
    sampler: str = flag(
        "TPE", "Optuna's sampler, with options: TPE, Random, CmaEs, QMC, TPE:multivariate=true", role="free"
    )
    pruner: str = flag("Nop", "Optuna's pruner: Nop, Median, SuccessiveHalving, Hyperband", role="free")
    search_seeds: int = flag(1, "the number of seeds that a trial is judged under; none is one of --seeds", role="free")
    tuning_seed: int | None = flag(
        None,
        "a number by which a search is repeated: other seeds of its trials, other draws of its sampler; default 0",
        role="free",
    )
    storage: str | None = flag(
        None,
        "where studies are stored: a journal file, a database URL, or memory; default WORKDIR/study.journal",
        role="local",
        place="new",
    )
    lease: float = flag(
        120.0, "seconds without a sign of life after which another process of the study counts as dead", role="local"
    )
    study: str = flag("search", "the name of the study in --storage", role="free", place="new")
    per_strategy: bool = flag(False, "a study for each of --strategies, with the same number of trials", role="free")
    per_budget: bool = flag(False, "a study for each of --train_examples", role="free")
    lr_range_test: bool = flag(
        False,
        "instead of a search train the first strategy once while its rate rises exponentially; draw its "
        "loss and suggest a rate",
        role="free",
    )
    lr_low: float = flag(1e-5, "the first learning rate of the range test", role="free")
    lr_high: float = flag(10.0, "the last learning rate of the range test", role="free")

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The dimensions of the space; raises InputError if a text of --space is not a dimension."""
        return () if self.lr_range_test and not self.space else space.read(self.space)

    @property
    def trial_seeds(self) -> tuple[int, ...]:
        """The seeds that each trial is judged under."""
        first = FIRST_SEED + SEEDS_OF_A_SEARCH * (self.tuning_seed or 0)
        return tuple(range(first, first + self.search_seeds))

    @property
    def sampler_seed(self) -> int:
        """The seed from which those of the sampler's draws count on."""
        return FIRST_SEED * (self.tuning_seed or 0)


def with_values(flag_values: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a run with the values of a trial; raises InputError if a value is not one of its flag."""
    plain = {name: value for name, value in values.items() if "." not in name}
    typed = parse_flags(["search", *(f"--{name}={value}" for name, value in plain.items())])
    inner = {name: value for name, value in values.items() if "." in name}
    return space.applied({**flag_values, **typed}, inner)


def check(flag_values: Mapping[str, Any], settings: Settings, search: Search) -> None:
    """Raise InputError if the search is impossible, or would not be fair."""
    for name in ("trials", "group"):
        if getattr(search, name) < 1:
            raise InputError(f"--{name}={getattr(search, name)}: give 1 or more")
    if not 0 <= (search.tuning_seed or 0) < 1_000 or search.search_seeds > SEEDS_OF_A_SEARCH:
        raise InputError(
            f"--tuning_seed={search.tuning_seed or 0}, --search_seeds={search.search_seeds}: give 0 to 999, and at "
            f"most {SEEDS_OF_A_SEARCH:,} seeds"
        )
    if not 0 < search.lr_low < search.lr_high < math.inf:
        raise InputError(f"--lr_low={search.lr_low:g} and --lr_high={search.lr_high:g}: give 0 < LOW < HIGH")
    if settings.distributed and not search.lr_range_test:
        raise InputError(
            "--distributed: processes of a search do not train one fit together, each asks for its own trials: leave "
            "it out, and give all of them one --storage and each its --workdir"
        )
    if set(search.trial_seeds) & set(settings.seeds):
        raise InputError(f"--seeds={settings.seeds[0]}: seeds from {FIRST_SEED:,} on are the search's own: give others")
    for name in PINS:
        if getattr(settings, name) is not None:
            raise InputError(f"--{name} is pinned: the search and the final fits would share it; leave it out")
    for dimension in search.ranges:
        name = dimension.name
        of_recipe = name.removeprefix("source_") in {*vars(settings.recipe)} - {"validation", "penalty", *MEASURED}
        if "." not in name and not of_recipe and name not in _SEARCHED:
            raise InputError(f"--space={dimension}: '{name}' is no flag that can be searched; see --helpfull")
        if settings.source_checkpoint and (name in ("hidden", "activation") or name.startswith("source_")):
            raise InputError(f"--space={dimension}: '{name}' is the source's too, and --source_checkpoint is trained")
        numbers = (_typed(dimension, dimension.low), _typed(dimension, dimension.high))
        for value in dimension.choices if dimension.kind == "in" else numbers:
            Settings.from_flags(**with_values(flag_values, {name: value}))


def _typed(dimension: Range, value: float) -> float:
    return int(value) if dimension.kind == "int" else value


def shapes(flag_values: Mapping[str, Any], dimension: Range) -> int:
    """The largest number of shapes that the values of a dimension give a fit; fits of one shape are trained together.

    A real number is an argument of the compiled function, so its values are of one shape.
    """
    low, high, kind = dimension.low, dimension.high, dimension.kind
    if kind in ("log", "between"):
        return 1
    values = dimension.choices if kind == "in" else (int(low), int(high))
    settings = [Settings.from_flags(**with_values(flag_values, {dimension.name: value})) for value in values]
    count = len(set(map(_shape, settings)))
    return int(high - low) + 1 if kind == "int" and count > 1 else count


def _shape(settings: Settings) -> tuple[Any, ...]:
    """The part of the settings that the compiled function depends on."""
    recipe = settings.recipe
    fit = (
        recipe.batch_size,
        recipe.microbatch,
        recipe.compute_dtype,
        recipe.matmul_precision,
        recipe.remat,
        recipe.epochs,
        recipe.steps,
        recipe.loss,
        recipe.label_smoothing > 0,
        recipe.class_weights,
        recipe.augment,
    )
    optimizer, _ = recipe.optimizer_spec()
    terms, _ = penalties.read(recipe.penalty)
    return settings.hidden, settings.activation, settings.strategies, *fit, optimizer, terms


def to_flags(search: Search) -> list[str]:
    """The flagfile lines that repeat this search, except where its study is stored and how long it waits."""
    return command_line.flagfile_lines(search, ("lr_range_test", "lr_low", "lr_high"))
