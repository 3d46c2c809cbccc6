"""What verdicts speak of: which streams differ with the seed, and which are one for all seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments import transfer
from experiments.runs import budgets
from experiments.runs.settings import Settings
from experiments.transfer import Experiment
from tljax.types import InputError

_PINNED = {
    "head": "what is drawn anew (a new head, and all of scratch) is one draw, which --head_seed pins: the verdicts "
    "speak of that draw",
    "order": "the order of the examples is one, which --order_seed pins: the verdicts speak of that order",
    "draw": "the labels are one draw, which --draw_seed pins: the verdicts speak of that training set",
}
"""Stream -> what is said where it is pinned."""


class Varied(NamedTuple):
    """What differs between the fits of one source and target."""

    source: str | None
    sources: int | None
    """How many different trained sources there are; None if that is not known."""
    seeds: int
    pinned: tuple[str, ...]
    """Of head, order and draw."""
    whole: tuple[str, ...]
    """Label budgets that are all the training examples there are."""


def of(todo: Experiment) -> Varied:
    """What differs between the fits of an experiment."""
    made, source = todo.made, todo.source
    count = len(todo.target.train.labels)
    whole = tuple(budget for budget in made.train_examples if budgets.total(budget, todo.target) == count)
    known = None
    if source:
        # A source that is trained here follows from its stream; what it is identified by holds the seed too.
        known = _streams(made) if made.source else len({source.identity[seed] for seed in made.seeds})
    return Varied(source.name if source else None, known, len(made.seeds), _pinned(made), whole)


def of_settings(made: Settings) -> Varied:
    """The same as far as flags alone tell: how many sources a checkpoint holds is not known."""
    whole = tuple(budget for budget in made.train_examples if budget.split(":")[0] == "all")
    known = _streams(made) if made.source else None
    return Varied(made.source or made.source_checkpoint, known, len(made.seeds), _pinned(made), whole)


def _streams(made: Settings) -> int:
    return len({transfer.streams_of(made, seed).source for seed in made.seeds})


def _pinned(made: Settings) -> tuple[str, ...]:
    return tuple(name for name in _PINNED if getattr(made, f"{name}_seed") is not None)


def sentences(varied: Sequence[Varied]) -> list[str]:
    """What the verdicts of these fits speak of, each sentence once; a source is named where others differ from it."""
    of_sources = {one.source: _of_source(one) for one in varied if one.source is not None}
    alike = len(set(of_sources.values())) == 1
    said = dict.fromkeys(text if alike else f"{name}: {text}" for name, text in of_sources.items())
    said |= dict.fromkeys(_PINNED[name] for one in varied for name in one.pinned)
    whole = dict.fromkeys(budget.split(":")[0] for one in varied if "draw" not in one.pinned for budget in one.whole)
    one_set = "which is every training example, no draw varies: what is said there is of this one training set"
    said |= dict.fromkeys(f"at {budget}, {one_set}" for budget in whole)
    return list(said)


def _of_source(one: Varied) -> str:
    if one.sources is None:
        return "how many different sources these fits start from is not known here"
    if one.sources == 1:
        return "the verdicts speak of this one trained source"
    if one.sources == one.seeds:
        return "sources are trained anew with each seed, so the verdicts speak of the way of pretraining"
    return f"{one.sources} trained sources serve {one.seeds} seeds, so the verdicts speak of these sources"


def require_some(todo: Experiment) -> None:
    """Raise InputError where several seeds would give one fit again and again, from which nothing follows."""
    varied = of(todo)
    drawn = "draw" in varied.pinned or (
        len(varied.whole) == len(todo.made.train_examples) and not todo.made.recipe.validation
    )
    if varied.seeds > 1 and drawn and {"head", "order"} <= set(varied.pinned) and varied.sources in (None, 1):
        flags = ", ".join(
            f"--{name}_seed" for name in ("source", *varied.pinned) if name != "source" or todo.made.source
        )
        raise InputError(
            f"{flags} leave nothing that --seeds could vary: every fit would be the same; unpin one of them"
        )
