"""The proofs that every strategy and every optimizer gets, a line each.

A room of files: `lines` (a check and how it is made), `optimizers`, `problems` (what strategies are tried on),
`strategies`, which fits by `fits`. What is anyone's has `report` (what an audit says) and `checkpoints` (what became of
each leaf between two of them).
"""

from tljax.audit.checkpoints import checkpoints
from tljax.audit.lines import Check
from tljax.audit.optimizers import check_optimizer
from tljax.audit.report import Finding, Report
from tljax.audit.strategies import check_strategy

__all__ = ["Check", "Finding", "Report", "check_optimizer", "check_strategy", "checkpoints"]
