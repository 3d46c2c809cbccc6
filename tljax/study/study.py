"""What a study found: a strategy against training from scratch, and all that its report shows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tljax.study.summary import Row


class Comparison(NamedTuple):
    """A strategy against scratch."""

    source: str | None
    target: str
    strategy: str
    """Its label, such as last_k:k=2."""
    budgets: tuple[int, ...]
    """Numbers of labelled examples: one, or all that the area under the budget curve is over."""
    against: str
    """'scratch at equal target steps' or 'scratch at equal source and target steps'."""
    fits: int
    """Pairs."""
    items: int
    """Test examples."""
    mean: float
    low: float
    high: float
    """Differences as fractions; simultaneous 95 % where there is a verdict, else unadjusted."""
    word: str
    """'positive', 'negative', 'equivalent', 'undecided', or '' for a comparison outside the family."""
    margin: float
    """Fraction."""
    power: float | None
    """Of finding a difference of the margin."""
    p: float | None


class Study(NamedTuple):
    """Everything that the report shows."""

    rows: Sequence[Row]
    """Fits; each of evals, step_flops, source_steps, source_accuracy, retention and calibration may be missing."""
    curves: Mapping[str, Mapping[str, Any]]
    family: Sequence[Comparison]
    """With verdicts."""
    others: Sequence[Comparison]
    """Each budget by itself, and those at equal source and target steps: no verdict."""
    milestones: Sequence[Mapping[str, Any]]
    """Taylor and Stone's, one a source, target, strategy and budget."""
    verdict: str
    """The sentence that comes first."""
    notes: Sequence[str]
    """Said under every table."""
    images: Mapping[str, tuple[np.ndarray, list[str]]]
    """Target -> (the images most often wrong, uint8 [k, h, w, c]; a caption each)."""
