"""Proofs: of every strategy, of every optimizer, and of anyone's training step.

`lines` (a check and how it is made), `optimizers`, `problems` (what strategies are tried on) and `strategies`, which
fits by `fits`, are the checks of what is written for tljax. `steps` reads a training step or an optimizer of anyone's:
it is traced by `tracing`, which asks `purity` whether Python changes it, read by `program`, run by `numbers`, and its
findings are a `report`; `cotangents` tells whose gradient a value is, `leaks` what mixes it, `idle` what is computed
for nobody, `multipliers` how far leaves move. `checkpoints` says what became of each leaf between two of them,
`restores` what came of a load, and `assertions` are for test suites.
"""

from tljax.audit.assertions import frozen, rates, restored
from tljax.audit.checkpoints import checkpoints
from tljax.audit.lines import Check
from tljax.audit.optimizers import check_optimizer
from tljax.audit.report import Finding, Report
from tljax.audit.steps import optimizer, step
from tljax.audit.strategies import check_strategy

__all__ = [
    "Check",
    "Finding",
    "Report",
    "check_optimizer",
    "check_strategy",
    "checkpoints",
    "frozen",
    "optimizer",
    "rates",
    "restored",
    "step",
]
