"""Training: `fit` runs groups of trials through one compiled segment, phase by phase.

A group is trials that share everything that decides compilation, but for what their masks add to it.
"""

from tljax.train.fit import State, Trial, capacity, fit, under
from tljax.train.segment import Log, Program, forward

__all__ = ["Log", "Program", "State", "Trial", "capacity", "fit", "forward", "under"]
