"""The winners of a search, their flags in its run directory, and the flags of studies that use them."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs import directory, plan
from experiments.runs.command_line import PATHS_FROM
from experiments.runs.search_flags import FIRST_SEED, MEASURED
from experiments.runs.settings import FLAGS, Recipe, Settings, parse_flags, written
from tljax import plugins
from tljax.study import space
from tljax.types import InputError


class Arm(NamedTuple):
    """What one study searches: a strategy at a label budget."""

    strategy: str
    budget: str
    ranges: tuple[space.Range, ...]

    @property
    def label(self) -> str:
        """The strategy's name in tables."""
        return plugins.called(self.strategy)

    @property
    def file_name(self) -> str:
        """The name of the study's files and folders."""
        return plan.file_name(f"{self.label}-{self.budget}")


class Winner(NamedTuple):
    """The best trial of one study."""

    study: Any
    """The study, an optuna.Study."""
    trial: Any
    """Its best trial, an optuna.trial.FrozenTrial."""
    settings: Settings
    """The settings of the last fits."""


def write_winners(folder: Path, winners: Mapping[Arm, Winner]) -> None:
    """Write the flags of each winner: best.flags, or with several studies best/STRATEGY-BUDGET.flags."""
    for arm, winner in winners.items():
        file = folder / "best.flags" if len(winners) == 1 else folder / "best" / f"{arm.file_name}.flags"
        if len(winners) > 1:
            directory.make_folder(file.parent)
        head = f"# python -m experiments.transfer --flagfile={file} --workdir=NEW"
        where = [f"{PATHS_FROM}{place}" for place in directory.working_directory()]
        directory.replace(file, directory.signed("\n".join([head, *where, *winner.settings.flagfile_lines(), ""])))


def study_flags(
    flags: Mapping[str, Any], settings: Settings, search: str | None, typed: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Flags of the runs that together are a study of strategies.

    Without a search that is one run; with one, a run for each strategy and label budget, with the winner's flags of a
    fit. `typed` are the flags that stand on the command line itself (None: all of `flags`): a flag of a fit among them
    with another value than the winner's is refused, while a flagfile may be shared. Raises InputError for that, for a
    run directory without winners, for winners of another task, for a strategy or label budget that was not searched,
    for a file of a winner that is not as it was written, and for seeds that a search may have seen.
    """
    strategies = settings.strategies if "scratch" in settings.strategies else ("scratch", *settings.strategies)
    if search is None:
        return [{**flags, "strategies": strategies}]
    if max(settings.seeds) >= FIRST_SEED:
        raise InputError(
            f"--seeds={max(settings.seeds)}: seeds from {FIRST_SEED:,} on are those of searches: give others"
        )
    best = winners(Path(search))
    for winner in best.values():
        _require_same_task(search, winner, flags)
    study = []
    for strategy in strategies:
        for budget in settings.train_examples:
            winner_flags = _winner(best, strategy, budget)
            if winner_flags is None:
                raise InputError(
                    f"--tuned={search} has nothing for '{strategy}' at {budget}: search with --per_strategy"
                )
            differ = unused(flags, winner_flags)
            if refused := [text for name, text in differ.items() if typed is None or name in typed]:
                raise InputError(
                    f"{'; '.join(refused)} in the search {search}, for {plugins.called(strategy)} at {budget}: leave "
                    f"{'it' if len(refused) == 1 else 'them'} out, since --tuned gives all flags of a fit"
                )
            recipe = {name: value for name, value in winner_flags.items() if name in searched_flags()}
            others = {name: value for name, value in flags.items() if name not in _UNSET}
            study.append({**others, **recipe, "strategies": winner_flags["strategies"], "train_examples": (budget,)})
    return study


def winners(search: Path) -> dict[str, dict[str, Any]]:
    """{name of the file: flags} of each winner in the run directory of a search; raises InputError if it has none."""
    files = sorted(search.glob("best/*.flags")) or sorted(search.glob("best.flags"))
    if not files:
        raise InputError(f"--tuned={search} holds no best.flags: give the run directory of a search that has ended")
    for file in files:
        directory.flags_text(file)  # raises InputError if it is not as it was written
    return {file.stem: parse_flags(["tuned", f"--flagfile={file}"]) for file in files}


def _winner(winners: Mapping[str, Mapping[str, Any]], strategy: str, budget: str) -> Mapping[str, Any] | None:
    """The best flags for a strategy at a label budget, or at the only budget that was searched; None if there are none.

    The search may have chosen the strategy's options, so another spelling of them will do where it is the only one.
    """
    name = space.strategy_name(strategy)
    of_strategy = {
        file: flags for file, flags in winners.items() if space.strategy_name(flags["strategies"][0]) == name
    }
    at_budget = {file: flags for file, flags in of_strategy.items() if _same_budget(flags["train_examples"][0], budget)}
    stem = f"{plan.file_name(plugins.called(strategy))}-"
    for candidates in (at_budget, of_strategy):
        exact = [flags for flags in candidates.values() if flags["strategies"][0] == strategy]
        exact += [flags for file, flags in candidates.items() if file.startswith(stem)]
        if exact and len({id(flags) for flags in exact}) == 1:
            return exact[0]
        if len(candidates) == 1:
            return next(iter(candidates.values()))
    return None


def _require_same_task(search: str, winner: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Raise InputError unless a winner was searched on the tasks and with the model of these flags."""
    settings, winner_settings = Settings.from_flags(**flags), Settings.from_flags(**winner)
    for name in _TASK:
        value, searched = getattr(settings, name), getattr(winner_settings, name)
        if name == "source_checkpoint" and value and searched:
            value, searched = Path(value).resolve(), Path(searched).resolve()
        if value != searched:
            raise InputError(f"--tuned={search} is of --{name}={written(searched)}, not of {written(value)}")


_TASK = ("source", "source_checkpoint", "target", "image_shape", "model")
"""Flags that a search does not vary: a recipe is the best for their values alone."""


def unused(flags: Mapping[str, Any], winner: Mapping[str, Any]) -> dict[str, str]:
    """{flag: '--steps=50 here, 40'} of the flags of a fit whose values differ from a winner's.

    Those of the source's fit are not compared if the source is a checkpoint.
    """
    settings, winner_settings = Settings.from_flags(**flags), Settings.from_flags(**winner)
    texts = {}
    for name in (name for name in FLAGS if name in flags and name in searched_flags()):
        if (name.startswith("source_") and settings.source_checkpoint) or name not in {*winner, *_UNSET}:
            continue
        value, winner_value = _value(settings, name), _value(winner_settings, name)
        if value != winner_value:
            other = "not given" if winner_value is None else written(winner_value)
            texts[name] = f"--{name}={written(value)} here, {other}"
    return texts


def _value(settings: Settings, name: str) -> Any:
    """The value of a flag in settings, in which the flags of a fit are fields of one of two recipes."""
    if name in vars(settings):
        return getattr(settings, name)
    field = name.removeprefix("source_")
    return getattr(settings.recipe if field == name else settings.source_recipe, field)


def origin_note(flags: Mapping[str, Any], search: str | None, strategies: Sequence[str]) -> str:
    """The line on where the flags of the fits come from, and which of a flagfile are not used; "" without a search."""
    if search is None:
        return ""
    names = {space.strategy_name(strategy) for strategy in strategies}
    texts: dict[str, str] = {}
    for winner in winners(Path(search)).values():
        if space.strategy_name(winner["strategies"][0]) in names:
            texts = {**unused(flags, winner), **texts}
    not_used = [text.partition(" ")[0] for text in texts.values()]
    which = "all flags of a fit, --hidden, --activation and --head"
    text = f"{which} come from the search {search}, for each strategy its own"
    return text + (f"; of the flagfile not used: {', '.join(not_used)}" if not_used else "")


_UNSET = ("steps", "source_steps")
"""Flags of a fit that a winner's flagfile lacks where they are not set: its fits have epochs."""


def searched_flags() -> set[str]:
    """Names of the flags that a search varies: both recipes', and those that are tied to them."""
    names = set(vars(Recipe())) - {"validation", *MEASURED}
    return names | {f"source_{name}" for name in names} | {"hidden", "activation", "head"}


def _same_budget(budget: str, other: str) -> bool:
    """Whether two label budgets take the same number of examples, whatever their seeds."""
    return plan.file_name(budget.split(":seeds")[0]) == plan.file_name(other.split(":seeds")[0])


def tuning_note(search: str | None, train_examples: Sequence[str] = (), longer: bool = False) -> str:
    """The line of every table on how its fits were tuned, and at which label budgets they were not."""
    if search is None:
        return "untuned: every strategy has the same hyper-parameters"
    searched = list(dict.fromkeys(flags["train_examples"][0] for flags in winners(Path(search)).values()))
    others = [budget for budget in train_examples if not any(_same_budget(budget, other) for other in searched)]
    text = f"tuned: every strategy has what {Path(search).name} found best for it"
    text += ", and scratch with more steps what was best for fewer" if longer else ""
    return text + (f"; what it found at {', '.join(searched)} is used at {', '.join(others)}" if others else "")
