"""Training: `fit` runs groups of fits through one compiled segment, phase by phase.

A group is fits that share everything that decides compilation, but for what their masks add to it. `step` is one step
of one fit, `vectorize` maps it over fits and devices, `loop` goes from segment to segment, `features` skips what is
frozen below, `settled` finds what a schedule has frozen there for good, `cost` asks what was compiled for FLOPs and
memory.
"""

from tljax.train.cost import Cost
from tljax.train.data import Data, Reader, Rows, Stream, load
from tljax.train.features import FeatureCache
from tljax.train.loop import Execution, State, abstract, cost_of, fit, held, select
from tljax.train.profile import Profile
from tljax.train.settled import obstacle
from tljax.train.step import (
    Fit,
    Log,
    Spec,
    check_microbatch,
    forms_no_others,
    forward,
    group_key,
    refuse_microbatch,
    specialize,
    with_average,
)
from tljax.train.vectorize import capacity

__all__ = [
    "Cost",
    "Data",
    "Execution",
    "FeatureCache",
    "Fit",
    "Log",
    "Profile",
    "Reader",
    "Rows",
    "Spec",
    "State",
    "Stream",
    "abstract",
    "capacity",
    "check_microbatch",
    "cost_of",
    "fit",
    "forms_no_others",
    "forward",
    "group_key",
    "held",
    "load",
    "obstacle",
    "refuse_microbatch",
    "select",
    "specialize",
    "with_average",
]
