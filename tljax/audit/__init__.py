"""The proofs that every strategy and every optimizer gets, a line each.

A room of four files: `lines` (a check and how it is made), `optimizers`, `problems` (what strategies are tried on),
`strategies`, which fits by `fits`.
"""

from tljax.audit.lines import Check
from tljax.audit.optimizers import check_optimizer
from tljax.audit.strategies import check_strategy

__all__ = ["Check", "check_optimizer", "check_strategy"]
