"""The audit for a test suite: each function raises AssertionError with the table of what does not hold.

What is not proved is not proved: a leaf that was not decided fails a test too, and its row says which operation stopped
the proof. A test that knows of one accepts it by its path, `undecided="scan_body/**"`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import paths
from tljax.audit import restores, steps
from tljax.audit.report import GRADES, Claim, Finding, Grade, Report, broken, unaccepted
from tljax.masks.leaf import canonical_leaf
from tljax.types import InputError, Mask, MaskSchedule, Params


def frozen(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    mask: Mask | MaskSchedule | str | Sequence[str],
    at_least: Grade = "equal",
    leaks: bool = False,
    *,
    undecided: str | Iterable[str] = (),
    **arguments: Any,
) -> Report:
    """The report of `audit.step`, once every leaf that the mask freezes is proved to stay.

    Under a schedule that is so of every leaf of its scope too, in steps in which it is off. The mask is a tree, or
    globs of what trains. Warns where something moves, or may, that is no parameter and stands in a layer whose
    parameters are all frozen, such as the running statistics of a batch norm (`Report.drifting`).

    Raises AssertionError where one changes, is proved in a lower grade than `at_least`, or is not decided and matches
    no glob of `undecided`; and, unless `leaks`, where the update of a trained leaf depends on the gradient of a frozen
    one, or may. `arguments` are `params` and `loss`, as `audit.step` has them. Raises InputError for a grade that is
    none, a glob that matches nothing, and as `audit.step` does.
    """
    if at_least not in GRADES[:-1]:
        raise InputError(f"it is one of {', '.join(map(repr, GRADES[:-1]))}", field="at_least", value=at_least)
    report = steps.step(step, state, batch, mask, **arguments)
    claims: tuple[Claim, ...] = ("frozen", "off") if leaks else ("frozen", "off", "unseen")
    _require(report, broken(report, claims, at_least), undecided, "does not leave alone what the mask freezes")
    if report.drifting:
        warnings.warn(
            f"{report.subject} leaves alone what the mask freezes, and of what stands beside it nothing is claimed: "
            f"{paths.some(list(report.drifting))} may move; the report's table says more",
            stacklevel=2,
        )
    return report


def rates(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    mask: Mask,
    *,
    undecided: str | Iterable[str] = (),
    **arguments: Any,
) -> Report:
    """The report of `audit.step`, once every trained leaf is proved to move by the rate that the mask gives it.

    Raises AssertionError where a rate has no effect, or another one, or was not decided; InputError for a mask that has
    no rate but 0 and 1. Else as `frozen`.
    """
    is_globs = any(isinstance(m, str) for m in jax.tree.leaves(mask))
    if is_globs or not any(_is_rate(canonical_leaf(path, m)) for path, m in paths.items(mask)):
        raise InputError(
            "the mask has no rate: write numbers, such as 0.1, where leaves are to move by a part of the step"
        )
    report = steps.step(step, state, batch, mask, **arguments)
    if not report.select("rate"):
        raise AssertionError(f"{report.subject}: of no rate it was decided whether it has an effect")
    return _require(report, broken(report, ("rate",)), undecided, "does not move its leaves by their rates")


def restored(
    before: Params | str | Path,
    after: Params,
    plan: restores.Plan = None,
    *,
    dtype: Any = None,
    fresh: Params | None = None,
) -> Report:
    """The report of `restores.restore`, once every leaf that the plan restores has come.

    Raises AssertionError where one did not come, or a kept one has another value than in `fresh`. The arguments, and
    the InputErrors, are those of `restores.restore`.

    >>> weights = {"body": [0.5, 1.5], "head": [1.0]}
    >>> len(restored(weights, {"body": [0.5, 1.5], "head": [3.0]}, ["body/**"]).select("restored", "proved"))
    2
    """
    report = restores.restore(before, after, plan, dtype=dtype, fresh=fresh)
    return _require(report, broken(report, ("restored", "frozen")), (), "did not restore what its plan says")


def _is_rate(m: Any) -> bool:
    """Whether a canonical leaf of a mask has a rate that is neither 0 nor 1."""
    return isinstance(m, float) or getattr(m, "dtype", np.dtype(bool)).kind == "f"


MOST_ROWS = 60
"""The rows of a table that an AssertionError has: a model may have thousands of leaves."""


def _require(report: Report, findings: Sequence[Finding], undecided: str | Iterable[str], what: str) -> Report:
    """The report. Raises AssertionError with the findings, but for those not decided whose paths are accepted."""
    patterns = [undecided] if isinstance(undecided, str) else list(undecided)
    findings = unaccepted(report, findings, patterns, "`undecided={}`")
    if not findings:
        return report
    shown = replace(report, findings=tuple(findings[:MOST_ROWS]))
    more = f"\nand {len(findings) - MOST_ROWS} more" if len(findings) > MOST_ROWS else ""
    raise AssertionError(f"{report.subject} {what}:\n{shown.table()}{more}")
