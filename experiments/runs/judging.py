"""How the fits of a run are judged, and what verdicts of them speak of.

The flags of judging (`Judging`) are those of experiments.compare and, where no run was judged before, of
experiments.report. What verdicts speak of follows from which streams differ with the seed and which are one for all
seeds (`Variation`): a verdict of fits whose labels are one draw says nothing of another draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from experiments.runs import budgets, plan
from experiments.runs.command_line import flag
from experiments.runs.plan import Experiment
from experiments.runs.settings import Settings
from tljax.study.verdicts import require_family
from tljax.types import InputError


@dataclass(frozen=True)
class Judging:
    """How fits are judged."""

    margin: float = flag(0.5, "points of accuracy (hundredths) below which a difference does not matter")
    level: float = flag(0.95, "of all intervals and verdicts together, a fraction")
    family: str = flag("area", "what is judged: area under the budget curve of each strategy, or all budgets")
    looks: int = flag(1, "how often the results are to be looked at while seeds are added")
    against: str = flag("scratch", "the strategy that the others are compared with")


def require_valid(judging: Judging) -> None:
    """Raise InputError for values by which nothing can be judged."""
    if not 0 < judging.margin < 100:
        raise InputError(f"--margin={judging.margin:g}: give points above 0 and below 100")
    if not 0.5 <= judging.level < 1:
        raise InputError(f"--level={judging.level:g}: give 0.5 or more, below 1")
    if judging.looks < 1:
        raise InputError(f"--looks={judging.looks}: give 1 or more")
    require_family(judging.family)


def to_record(judging: Judging) -> dict[str, Any]:
    """{field of `Judging`: value}, without what else a program's flags hold."""
    return {field.name: getattr(judging, field.name) for field in fields(Judging)}


class Variation(NamedTuple):
    """What differs between the fits of one source and target."""

    source: str | None
    sources: int | None
    """How many different trained sources there are; None if that is not known."""
    seeds: int
    pinned: tuple[str, ...]
    """Those of the streams head, order and draw that are one for all seeds."""
    whole: tuple[str, ...]
    """Label budgets that are all the training examples there are."""


_PINNED = {
    "head": "what is drawn anew (a new head, and all of scratch) is one draw, which --head_seed pins: the verdicts "
    "speak of that draw",
    "order": "the order of the examples is one, which --order_seed pins: the verdicts speak of that order",
    "draw": "the labels are one draw, which --draw_seed pins: the verdicts speak of that training set",
}
"""{stream: the note where it is pinned}."""


def variation(experiment: Experiment) -> Variation:
    """What differs between the fits of an experiment."""
    settings, source = experiment.settings, experiment.source
    count = len(experiment.target.train.targets)
    whole = tuple(budget for budget in settings.train_examples if budgets.total(budget, experiment.target) == count)
    different = None
    if source:
        # A source that is trained here follows from its stream; what it is identified by holds the seed too.
        different = _streams(settings) if settings.source else len({source.identity[seed] for seed in settings.seeds})
    return Variation(source.name if source else None, different, len(settings.seeds), _pinned(settings), whole)


def variation_by_flags(settings: Settings) -> Variation:
    """What differs between fits as far as flags alone tell: how many sources a checkpoint holds is not known."""
    whole = tuple(budget for budget in settings.train_examples if budget.split(":")[0] == "all")
    different = _streams(settings) if settings.source else None
    source = settings.source or settings.source_checkpoint
    return Variation(source, different, len(settings.seeds), _pinned(settings), whole)


def _streams(settings: Settings) -> int:
    """How many different streams of the source the seeds have."""
    return len({plan.streams(settings, seed).source for seed in settings.seeds})


def _pinned(settings: Settings) -> tuple[str, ...]:
    return tuple(stream for stream in _PINNED if getattr(settings, f"{stream}_seed") is not None)


def spoken_of(variations: Sequence[Variation]) -> list[str]:
    """What verdicts of these fits speak of, each sentence once; a source is named where others differ from it."""
    by_source = {each.source: _of_source(each) for each in variations if each.source is not None}
    alike = len(set(by_source.values())) == 1
    sentences = dict.fromkeys(text if alike else f"{source}: {text}" for source, text in by_source.items())
    sentences |= dict.fromkeys(_PINNED[stream] for each in variations for stream in each.pinned)
    drawn = [each for each in variations if "draw" not in each.pinned]
    whole = dict.fromkeys(budget.split(":")[0] for each in drawn for budget in each.whole)
    one_set = "which is every training example, no draw varies: what is said there is of this one training set"
    sentences |= dict.fromkeys(f"at {budget}, {one_set}" for budget in whole)
    return list(sentences)


def _of_source(varied: Variation) -> str:
    if varied.sources is None:
        return "how many different sources these fits start from is not known here"
    if varied.sources == 1:
        return "the verdicts speak of this one trained source"
    if varied.sources == varied.seeds:
        return "sources are trained anew with each seed, so the verdicts speak of the way of pretraining"
    return f"{varied.sources} trained sources serve {varied.seeds} seeds, so the verdicts speak of these sources"


def require_variation(experiment: Experiment) -> None:
    """Raise InputError where several seeds would give one fit again and again, from which nothing follows."""
    settings, varied = experiment.settings, variation(experiment)
    one_draw = "draw" in varied.pinned or (
        len(varied.whole) == len(settings.train_examples) and not settings.recipe.validation
    )
    if varied.seeds > 1 and one_draw and {"head", "order"} <= set(varied.pinned) and varied.sources in (None, 1):
        flags = ", ".join(
            f"--{name}_seed" for name in ("source", *varied.pinned) if name != "source" or settings.source
        )
        raise InputError(
            f"{flags} leave nothing that --seeds could vary: every fit would be the same; unpin one of them"
        )
