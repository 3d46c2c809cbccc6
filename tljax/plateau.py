"""When a phase ends: a plateau of its validation scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tljax.types import InputError


@dataclass(frozen=True)
class Plateau:
    """Whether the last `patience` scores were no better, by more than `min_delta`, than the best before them."""

    patience: int
    min_delta: float = 0.0

    def __call__(self, scores: Sequence[float]) -> bool:
        """Whether scores, of which larger is better and the latest is last, are at their plateau."""
        best, since = -math.inf, 0
        for score in scores:
            best, since = (score, 0) if score > best + self.min_delta else (best, since + 1)
        return since >= self.patience


def plateau(patience: int, min_delta: float = 0.0) -> Plateau:
    """For `Phase(until=...)`: the phase ends when `patience` points in a row have not raised the validation score.

    A score has to rise by more than `min_delta`, in the metric's own unit: 0.001 of an accuracy is 0.1 points. After
    Prechelt 1998, "Early Stopping - But When?", with a count in place of his strips (his criterion UP). Raises
    InputError for a patience below 1 and a min_delta that is negative or not finite.

    >>> over = plateau(patience=2)
    >>> over([0.5, 0.6, 0.6]), over([0.5, 0.6, 0.6, 0.59]), over([0.5, 0.6, 0.6, 0.61])
    (False, True, False)
    """
    if type(patience) is not int or patience < 1:
        raise InputError(
            "it counts points of the curve: give a whole number of at least 1", field="patience", value=patience
        )
    if not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
        raise InputError("give a number of at least 0", field="min_delta", value=min_delta)
    return Plateau(patience, float(min_delta))
