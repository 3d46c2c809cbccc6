"""The flags of a search: what is asked for, and whether it can be and would be fair."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import commandline, options
from experiments.options import Settings
from tljax import named_optimizer, objective
from tljax.study import space
from tljax.types import InputError

HELP = """
Search (flags of experiments.transfer beside it):
  --space         what is searched, repeated: FLAG:log:LOW:HIGH, FLAG:between:LOW:HIGH, FLAG:int:LOW:HIGH, FLAG:in:A,B;
                  penalty.NAME.OPTION and strategy.NAME.OPTION reach into their options
  --trials        of each study (default 32)
  --group         trials asked for and trained together (default 16)
  --timeout       seconds after which no further trials are asked for
  --sampler       of Optuna, with options: TPE (default), Random, CmaEs, QMC, TPE:multivariate=true
  --pruner        of Optuna: Nop (default), Median, SuccessiveHalving, Hyperband
  --search_seeds  seeds a trial is judged under, none of them of --seeds (default 1)
  --storage       where the study is kept: a journal file, a database URL, or memory (default WORKDIR/study.journal)
  --lease         seconds without news after which another process of the study is taken for dead (default 120)
  --study         its name there (default search)
  --per_strategy  a study for each of --strategies, scratch among them, with the same number of trials
  --per_budget    a study for each of --train_examples
  --lr_range_test one fit of the first strategy whose learning rate rises exponentially from --lr_low (default 1e-5) to
                  --lr_high (default 10): print and draw its loss, suggest a rate, and stop; needs no --space"""

FIRST_SEED = 1_000_000
"""The search's seeds begin here."""
_SEARCHED = ("hidden", "activation", "head")
"""Flags beside those of a recipe that a search may vary."""


class Search(NamedTuple):
    """What is searched, and how."""

    ranges: tuple[space.Range, ...]
    trials: int
    group: int
    timeout: float | None
    sampler: str
    pruner: str
    storage: str | None
    study: str
    seeds: tuple[int, ...]
    per_strategy: bool
    per_budget: bool
    lease: float
    lr_range_test: bool
    lr_low: float
    lr_high: float


def chosen(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a run with the values of a trial; raises InputError for what is no value of a flag."""
    plain = {name: value for name, value in chosen.items() if "." not in name}
    typed = options.parse(["search", *(f"--{name}={value}" for name, value in plain.items())], "") or {}
    inner = {name: value for name, value in chosen.items() if "." in name}
    return space.applied({**given, **typed}, inner)


def check(given: Mapping[str, Any], made: Settings, asked: Search) -> None:
    """Raise InputError for a search that cannot be, or would not be fair."""
    for name in ("trials", "group"):
        if getattr(asked, name) < 1:
            raise InputError(f"--{name}={getattr(asked, name)}: give 1 or more")
    if not 0 < asked.lr_low < asked.lr_high < math.inf:
        raise InputError(f"--lr_low={asked.lr_low:g} and --lr_high={asked.lr_high:g}: give 0 < LOW < HIGH")
    if set(asked.seeds) & set(made.seeds):
        raise InputError(f"--seeds={made.seeds[0]}: seeds from {FIRST_SEED:,} on are the search's own: give others")
    for name in ("source_seed", "head_seed", "order_seed", "draw_seed"):
        if getattr(made, name) is not None:
            raise InputError(f"--{name} is pinned: the search and the final fits would share it; leave it out")
    for one in asked.ranges:
        own = one.name.removeprefix("source_")
        recipe = own in {*vars(made.recipe)} - {"validation", "penalty"}
        if "." not in one.name and not recipe and one.name not in _SEARCHED:
            raise InputError(f"--space={one}: '{one.name}' is no flag that can be searched; see --helpfull")
        if made.source_checkpoint and (one.name in ("hidden", "activation") or one.name.startswith("source_")):
            raise InputError(f"--space={one}: '{one.name}' is the source's too, and --source_checkpoint is trained")
        ends = one.choices if one.kind == "in" else (_typed(one, one.low), _typed(one, one.high))
        for value in ends:
            options.settings(**chosen(given, {one.name: value}))


def _typed(one: space.Range, value: float) -> float:
    return int(value) if one.kind == "int" else value


def shapes(given: Mapping[str, Any], one: space.Range) -> int:
    """How many shapes, at most, the values of a dimension give a fit: those of one shape are trained together.

    A real number is passed to what is compiled, and gives one.
    """
    if one.kind in ("log", "between"):
        return 1
    values = one.choices if one.kind == "in" else (int(one.low), int(one.high))
    found = len({_shape(options.settings(**chosen(given, {one.name: value}))) for value in values})
    return int(one.high - one.low) + 1 if one.kind == "int" and found > 1 else found


def _shape(made: Settings) -> tuple[Any, ...]:
    """What of the settings is compiled."""
    recipe = made.recipe
    numbers = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "clip": recipe.clip}
    fit = (recipe.batch_size, recipe.epochs, recipe.steps, recipe.loss, recipe.label_smoothing > 0)
    optimizer, _ = named_optimizer.spec(recipe.optimizer, **numbers)
    return made.hidden, made.activation, made.strategies, *fit, optimizer, objective.penalties(recipe.penalty)[0]


def to_flags(asked: Search) -> list[str]:
    """The flagfile lines that give this search again, but for where it is kept and how long it waits."""
    lines = [f"--space={one}" for one in asked.ranges]
    for name in ("trials", "group", "timeout", "sampler", "pruner", "study", "per_strategy", "per_budget"):
        if getattr(asked, name) is not None:
            lines.append(f"--{name}={getattr(asked, name)}")
    return [*lines, f"--search_seeds={len(asked.seeds)}"]


def read(argv: Sequence[str], about: str) -> tuple[dict[str, Any], Search]:
    """(the flags of a run, what is searched and how) of a command line; raises InputError."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("space", [], "", flag_values=values)
    for name, default in (("sampler", "TPE"), ("pruner", "Nop"), ("storage", None), ("study", "search")):
        flags.DEFINE_string(name, default, "", flag_values=values)
    for name, number in (("trials", 32), ("group", 16), ("search_seeds", 1)):
        flags.DEFINE_integer(name, number, "", flag_values=values)
    for name, seconds in (("timeout", None), ("lease", 120.0), ("lr_low", 1e-5), ("lr_high", 10.0)):
        flags.DEFINE_float(name, seconds, "", flag_values=values)
    for name in ("per_strategy", "per_budget", "lr_range_test"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    given = options.parse(commandline.read_known(values, argv), about) or {}
    asked = Search(
        () if values.lr_range_test and not values.space else space.read(values.space),
        values.trials,
        values.group,
        values.timeout,
        values.sampler,
        values.pruner,
        values.storage,
        values.study,
        tuple(range(FIRST_SEED, FIRST_SEED + values.search_seeds)),
        values.per_strategy,
        values.per_budget,
        values.lease,
        values.lr_range_test,
        values.lr_low,
        values.lr_high,
    )
    return given, asked
