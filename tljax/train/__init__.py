"""Training: `fit` runs groups of trials through one compiled segment, phase by phase.

A group is trials that share everything that decides compilation, but for what their masks add to it.
"""

from tljax.train.loop import abstract, fit, logits
from tljax.train.phase import State, capacity
from tljax.train.step import Log, Program, forward
from tljax.train.trial import Trial, alike, under
from tljax.train.vectorize import Means

__all__ = [
    "Log",
    "Means",
    "Program",
    "State",
    "Trial",
    "abstract",
    "alike",
    "capacity",
    "fit",
    "forward",
    "logits",
    "under",
]
