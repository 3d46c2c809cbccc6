"""A study with each strategy at what a search found best for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import fits, options, workdir
from experiments.options import Settings
from experiments.search_flags import FIRST_SEED
from tljax.types import InputError


def arms(given: Mapping[str, Any], made: Settings, search: str | None) -> list[dict[str, Any]]:
    """Flags of runs that together are the study: one, or one a strategy and label budget with what was best for it.

    Raises InputError for a run directory without winners, one of another task, a strategy or label budget that it
    has not searched, winners that are not as they were written, and for seeds that a search may have seen.
    """
    strategies = made.strategies if "scratch" in made.strategies else ("scratch", *made.strategies)
    if search is None:
        return [{**given, "strategies": strategies}]
    if max(made.seeds) >= FIRST_SEED:
        raise InputError(f"--seeds={max(made.seeds)}: seeds from {FIRST_SEED:,} on are those of searches: give others")
    winners = _winners(Path(search))
    for flags in winners:
        for name in ("source", "target"):
            if flags.get(name) != given.get(name) and not given.get("source_checkpoint"):
                raise InputError(f"--tuned={search} is of --{name}={flags.get(name)}, not of {given.get(name)}")
    found = []
    for strategy in strategies:
        own = [flags for flags in winners if _name(flags["strategies"][0]) == _name(strategy)]
        for budget in made.train_examples:
            alike = [flags for flags in own if _same(flags["train_examples"][0], budget)] or own
            if len(alike) != 1:
                raise InputError(
                    f"--tuned={search} has nothing for '{strategy}' at {budget}: search with --per_strategy"
                )
            recipe = {name: value for name, value in alike[0].items() if name in _recipe()}
            found.append({**given, **recipe, "strategies": alike[0]["strategies"], "train_examples": (budget,)})
    return found


def _winners(search: Path) -> list[dict[str, Any]]:
    files = sorted(search.glob("best/*.flags")) or sorted(search.glob("best.flags"))
    if not files:
        raise InputError(f"--tuned={search} holds no best.flags: give the run directory of a search that has ended")
    for file in files:
        workdir.flags_text(file)  # raises InputError for one that is not as it was written
    return [options.parse(["tuned", f"--flagfile={file}"]) for file in files]


def _recipe() -> set[str]:
    """What a search varies: all of a recipe, the source's too, and what is tied to both."""
    own = set(vars(options.Recipe())) - {"validation"}
    return own | {f"source_{name}" for name in own} | {"hidden", "activation", "head"}


def _name(strategy: str) -> str:
    return strategy.split(":")[0]


def _same(one: str, other: str) -> bool:
    return fits.file_name(one.split(":seeds")[0]) == fits.file_name(other.split(":seeds")[0])


def said(search: str | None) -> str:
    """What every table says of the tuning."""
    if search is None:
        return "untuned: every strategy has the same hyper-parameters"
    return f"tuned: every strategy has what {Path(search).name} found best for it"
