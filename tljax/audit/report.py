"""What an audit says: a claim about each leaf, a verdict, and the line of the user's program that decides it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tljax import paths
from tljax.types import InputError

Verdict = Literal["proved", "refuted", "not decided"]
Grade = Literal["identical", "equal", "equal if finite", "changed"]
Claim = Literal["frozen", "off", "trains", "unseen", "state", "rate", "idle", "restored"]

GRADES: tuple[Grade, ...] = ("identical", "equal", "equal if finite", "changed")
"""From the strongest on: the same variable; equal up to the sign of a zero and a NaN's payload (a compiler may
flush subnormal numbers to 0 there); equal if what is
multiplied by 0 is finite; another value."""

CLAIMS: dict[Claim, str] = {
    "frozen": "keeps its value",
    "off": "keeps its value in steps in which its mask, which moves, is off",
    "trains": "has a new value that depends on the batch",
    "unseen": "has a gradient that no trained leaf's update depends on",
    "state": "owns no optimizer state",
    "rate": "moves by its rate",
    "idle": "is computed for nobody",
    "restored": "has the numbers of the leaf that it was to come from",
}
"""What a claim says of the leaf that it names."""


@dataclass(frozen=True)
class Finding:
    """A claim about a leaf, and what was decided of it."""

    path: str
    """Of the leaf of the parameters, or of the state where the claim is about that."""
    claim: Claim
    verdict: Verdict
    detail: str
    """One line: the operation, what it does, and the numbers that show it."""
    source: str | None = None
    """The line of the user's program that decides it, as `loop.py:12 (update)`."""
    grade: Grade | None = None
    """Of a frozen leaf: how its new value is its old one."""
    condition: str | None = None
    """What a proof assumes: 'if the mask is False'."""


@dataclass(frozen=True)
class Report:
    """The findings of an audit."""

    subject: str
    """What was audited, as its author would name it: 'train_step' or 'adamw'."""
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    """What a reader has to know: where reading stopped, what was assumed of all leaves."""
    drifting: tuple[str, ...] = ()
    """The paths in the state of what moves, or may, beside parameters that are frozen, and of which the mask claims
    nothing: running statistics, mostly. A note says so."""

    def select(self, claim: Claim | None = None, verdict: Verdict | None = None) -> tuple[Finding, ...]:
        """The findings of a claim, of a verdict, or of both."""
        return tuple(
            finding
            for finding in self.findings
            if claim in (None, finding.claim) and verdict in (None, finding.verdict)
        )

    @property
    def refuted(self) -> tuple[Finding, ...]:
        """The findings whose claim does not hold."""
        return self.select(verdict="refuted")

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The refuted findings that break what a mask promises: all but those of `state`, which say what is paid.

        >>> held = Finding("body", "state", "refuted", "costs 8 bytes"), Finding("body", "frozen", "refuted", "moves")
        >>> [finding.claim for finding in Report("step", held).broken]
        ['frozen']
        """
        return tuple(finding for finding in self.refuted if finding.claim != "state")

    @property
    def undecided(self) -> tuple[Finding, ...]:
        """The findings that were not decided."""
        return self.select(verdict="not decided")

    def table(self) -> str:
        """The findings as text, a row each: the refuted ones first, and before what is well what is idle.

        >>> print(Report("step", (Finding("head/bias", "trains", "proved", "depends on the batch"),)).table())
        step: 1 proved, 0 refuted, 0 not decided
        proved  trains  head/bias  depends on the batch
        """
        order: tuple[Verdict, ...] = ("refuted", "not decided", "proved")
        ranked = sorted(self.findings, key=lambda finding: (order.index(finding.verdict), finding.claim != "idle"))
        counts = [f"{len(self.select(verdict=verdict))} {verdict}" for verdict in ("proved", "refuted", "not decided")]
        head = f"{self.subject}: {', '.join(counts)}"
        rows = [(finding.verdict, finding.claim, finding.path, _text(finding)) for finding in ranked]
        return "\n".join((head, *_aligned(rows), *(f"note: {note}" for note in self.notes)))


def broken(report: Report, claims: Iterable[Claim], at_least: Grade = "changed") -> tuple[Finding, ...]:
    """The findings of some claims that are refuted, not decided, or proved of a frozen leaf in too low a grade.

    >>> low = Finding("body", "frozen", "proved", "is multiplied by 0", grade="equal if finite")
    >>> [len(broken(Report("step", (low,)), ("frozen",), grade)) for grade in ("equal", "equal if finite")]
    [1, 0]
    """
    claims = tuple(claims)
    rows = []
    for finding in report.findings:
        low = finding.grade is not None and GRADES.index(finding.grade) > GRADES.index(at_least)
        if finding.claim in claims and finding.verdict != "proved":
            rows.append(finding)
        elif finding.claim in claims and low:
            rows.append(replace(finding, detail=f"{finding.detail}; `at_least={at_least}` asks for more"))
    return tuple(rows)


def unaccepted(report: Report, findings: Iterable[Finding], patterns: Sequence[str], shown: str) -> list[Finding]:
    """The findings but those not decided whose paths match a glob; `shown` is a glob in a message, as "undecided={}".

    Raises InputError for a glob that matches no leaf of the report.

    >>> row = Finding("body", "frozen", "not decided", "a loop")
    >>> unaccepted(Report("step", (row,)), [row], ["bo*"], "undecided={}")
    []
    """
    named = list(dict.fromkeys(finding.path for finding in report.findings))
    for pattern in patterns:
        if not any(map(paths.glob(pattern), named)):
            raise InputError(f"{shown.format(pattern)} matches no leaf: the leaves are {paths.some(named)}")
    accepted = [paths.glob(pattern) for pattern in patterns]
    return [
        finding
        for finding in findings
        if finding.verdict != "not decided" or not any(accepts(finding.path) for accepts in accepted)
    ]


def _text(finding: Finding) -> str:
    """The grade, the detail, the condition and the source of a finding, as far as it has them."""
    grade = f"{finding.grade}: " if finding.grade else ""
    condition = f", {finding.condition}" if finding.condition else ""
    source = f" [{finding.source}]" if finding.source else ""
    return f"{grade}{finding.detail}{condition}{source}"


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of text with their columns below one another; the last one is as long as it is."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return [
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1])) for row in rows
    ]
