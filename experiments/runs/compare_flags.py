"""The flags of a study: what is compared, and how it is judged."""

from dataclasses import dataclass

from experiments.runs.flags import flag
from tljax.study import study
from tljax.types import InputError


@dataclass(frozen=True)
class Judging:
    """How fits are judged."""

    margin: float = flag(0.5, "points of accuracy (hundredths) below which a difference does not matter")
    level: float = flag(0.95, "of all intervals and verdicts together, a fraction")
    family: str = flag("area", "what is judged: area under the budget curve of each strategy, or all budgets")
    looks: int = flag(1, "how often the results are to be looked at while seeds are added")
    against: str = flag("scratch", "the strategy that the others are compared with")


def check(judging: Judging) -> None:
    """Raise InputError for what cannot be judged by."""
    if not 0 < judging.margin < 100:
        raise InputError(f"--margin={judging.margin:g}: give points above 0 and below 100")
    if not 0.5 <= judging.level < 1:
        raise InputError(f"--level={judging.level:g}: give 0.5 or more, below 1")
    if judging.looks < 1:
        raise InputError(f"--looks={judging.looks}: give 1 or more")
    study.check_family(judging.family)
