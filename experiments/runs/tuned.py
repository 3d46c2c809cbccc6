"""What a search found best: its winners, their flags in its run directory, and studies of strategies at their best."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs import directory, plan
from experiments.runs.flags import PATHS_FROM
from experiments.runs.search_flags import FIRST_SEED
from experiments.runs.settings import FLAGS, Recipe, Settings, parse_flags
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
        """What tables call the strategy."""
        return plugins.called(self.strategy)

    @property
    def file_name(self) -> str:
        """What files and folders of the study are called."""
        return plan.file_name(f"{self.label}-{self.budget}")


class Winner(NamedTuple):
    """What one study found."""

    study: Any
    """Of Optuna."""
    trial: Any
    """The best of them."""
    made: Settings
    """The settings of the last fits."""


def write_winners(folder: Path, winners: Mapping[Arm, Winner]) -> None:
    """Write the flags of each winner: best.flags, of several studies best/STRATEGY-BUDGET.flags."""
    for arm, winner in winners.items():
        file = folder / "best.flags" if len(winners) == 1 else folder / "best" / f"{arm.file_name}.flags"
        if len(winners) > 1:
            directory.make_folder(file.parent)
        head = f"# python -m experiments.transfer --flagfile={file} --workdir=NEW"
        where = [f"{PATHS_FROM}{place}" for place in directory.working_directory()]
        directory.replace(file, directory.signed("\n".join([head, *where, *winner.made.flagfile_lines(), ""])))


def arms(
    study_flags: Mapping[str, Any], settings: Settings, search: str | None, typed: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Flags of runs that together are the study: one, or one a strategy and label budget with what was best for it.

    Flags of the fit are the winner's. `typed` are the flags that stand on the command line itself (None: all that are
    given): one of the fit with another value than the winner's is refused, while a flagfile may be shared. Raises
    InputError for that, for a run directory without winners, one of another task, a strategy or label budget that it
    has not searched, winners that are not as they were written, and for seeds that a search may have seen.
    """
    strategies = settings.strategies if "scratch" in settings.strategies else ("scratch", *settings.strategies)
    if search is None:
        return [{**study_flags, "strategies": strategies}]
    if max(settings.seeds) >= FIRST_SEED:
        most = max(settings.seeds)
        raise InputError(f"--seeds={most}: seeds from {FIRST_SEED:,} on are those of searches: give others")
    flags_of_winners = winners(Path(search))
    for winner in flags_of_winners.values():
        _require_alike(search, winner, study_flags)
    study = []
    for strategy in strategies:
        for budget in settings.train_examples:
            flags = _winner(flags_of_winners, strategy, budget)
            if flags is None:
                raise InputError(
                    f"--tuned={search} has nothing for '{strategy}' at {budget}: search with --per_strategy"
                )
            differ = unused(study_flags, flags)
            if refused := [text for name, text in differ.items() if typed is None or name in typed]:
                raise InputError(
                    f"{'; '.join(refused)} in the search {search}, for {plugins.called(strategy)} at {budget}: leave "
                    f"{'it' if len(refused) == 1 else 'them'} out, since --tuned gives all flags of a fit"
                )
            recipe = {name: value for name, value in flags.items() if name in of_the_search()}
            others = {name: value for name, value in study_flags.items() if name not in _UNSET}
            study.append({**others, **recipe, "strategies": flags["strategies"], "train_examples": (budget,)})
    return study


def winners(search: Path) -> dict[str, dict[str, Any]]:
    """{name of the file: flags} of each winner."""
    files = sorted(search.glob("best/*.flags")) or sorted(search.glob("best.flags"))
    if not files:
        raise InputError(f"--tuned={search} holds no best.flags: give the run directory of a search that has ended")
    for file in files:
        directory.flags_text(file)  # raises InputError for one that is not as it was written
    return {file.stem: parse_flags(["tuned", f"--flagfile={file}"]) for file in files}


def _winner(winners: Mapping[str, Mapping[str, Any]], strategy: str, budget: str) -> Mapping[str, Any] | None:
    """The flags that were best for a strategy at a label budget, or at the one budget that was searched; None if none.

    The search may have chosen the strategy's options, so another spelling of them will do where it is the only one.
    """
    named = {name: flags for name, flags in winners.items() if _name(flags["strategies"][0]) == _name(strategy)}
    at_budget = {name: flags for name, flags in named.items() if _same(flags["train_examples"][0], budget)}
    for candidates in (at_budget, named):
        exact = [flags for flags in candidates.values() if flags["strategies"][0] == strategy]
        exact += [flags for name, flags in candidates.items() if name.startswith(_stem(strategy))]
        if exact and len({id(flags) for flags in exact}) == 1:
            return exact[0]
        if len(candidates) == 1:
            return next(iter(candidates.values()))
    return None


def _require_alike(search: str, flags: Mapping[str, Any], study_flags: Mapping[str, Any]) -> None:
    """Raise InputError unless a winner was found on the tasks and for the model that the study is of."""
    here, there = Settings.from_flags(**study_flags), Settings.from_flags(**flags)
    for name in _TASK:
        value, searched = getattr(here, name), getattr(there, name)
        if name == "source_checkpoint" and value and searched:
            value, searched = Path(value).resolve(), Path(searched).resolve()
        if value != searched:
            raise InputError(f"--tuned={search} is of --{name}={_written(searched)}, not of {_written(value)}")


_TASK = ("source", "source_checkpoint", "target", "image_shape", "model")
"""What a search does not vary, and a recipe is best for."""


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def unused(study_flags: Mapping[str, Any], winner: Mapping[str, Any]) -> dict[str, str]:
    """{flag: '--steps=50 here, 40'} of the flags of a fit that are given with another value than a winner's.

    Those of the source's fit are not looked at where the source is a checkpoint's.
    """
    here, there = Settings.from_flags(**study_flags), Settings.from_flags(**winner)
    texts = {}
    for name in (name for name in FLAGS if name in study_flags and name in of_the_search()):
        if (name.startswith("source_") and here.source_checkpoint) or name not in {*winner, *_UNSET}:
            continue
        values = [_value(settings, name) for settings in (here, there)]
        if values[0] != values[1]:
            other = "not given" if values[1] is None else _written(values[1])
            texts[name] = f"--{name}={_written(values[0])} here, {other}"
    return texts


def _value(settings: Settings, name: str) -> Any:
    """The value of a flag in settings, where those of the two recipes lie in theirs."""
    if name in vars(settings):
        return getattr(settings, name)
    of_recipe = name.removeprefix("source_")
    return getattr(settings.recipe if of_recipe == name else settings.source_recipe, of_recipe)


def from_search(study_flags: Mapping[str, Any], search: str | None, strategies: Sequence[str]) -> str:
    """The line on where the flags of the fits come from, and which of a flagfile are not used; "" without a search."""
    if search is None:
        return ""
    texts: dict[str, str] = {}
    for winner in winners(Path(search)).values():
        if _name(winner["strategies"][0]) in map(_name, strategies):
            texts = {**unused(study_flags, winner), **texts}
    not_used = [text.partition(" ")[0] for text in texts.values()]
    which = "all flags of a fit, --hidden, --activation and --head"
    text = f"{which} come from the search {search}, for each strategy its own"
    return text + (f"; of the flagfile not used: {', '.join(not_used)}" if not_used else "")


_UNSET = ("steps", "source_steps")
"""Flags of a fit that a winner's flagfile lacks where they are not set: its fits have epochs."""


def of_the_search() -> set[str]:
    """What a search varies: all of a recipe, the source's too, and what is tied to both."""
    of_recipe = set(vars(Recipe())) - {"validation"}
    return of_recipe | {f"source_{name}" for name in of_recipe} | {"hidden", "activation", "head"}


def _name(strategy: str) -> str:
    return space.own_name(strategy)


def _stem(strategy: str) -> str:
    """How the names of the files of a strategy's winners begin."""
    return f"{plan.file_name(plugins.called(strategy))}-"


def _same(budget: str, other: str) -> bool:
    return plan.file_name(budget.split(":seeds")[0]) == plan.file_name(other.split(":seeds")[0])


def sentence(search: str | None, train_examples: Sequence[str] = (), longer: bool = False) -> str:
    """What every table says of the tuning, and of label budgets at which there was none."""
    if search is None:
        return "untuned: every strategy has the same hyper-parameters"
    tuned_at = list(dict.fromkeys(flags["train_examples"][0] for flags in winners(Path(search)).values()))
    not_searched = [budget for budget in train_examples if not any(_same(budget, searched) for searched in tuned_at)]
    text = f"tuned: every strategy has what {Path(search).name} found best for it"
    text += ", and scratch with more steps what was best for fewer" if longer else ""
    return text + (
        f"; what it found at {', '.join(tuned_at)} is used at {', '.join(not_searched)}" if not_searched else ""
    )
