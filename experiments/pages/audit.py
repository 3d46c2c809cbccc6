"""The table, the page and the record of an audit."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.pages import report as pages
from experiments.pages.report import Block, Provenance, Section
from experiments.runs import console, directory
from experiments.runs.console import Cell, Table
from tljax import paths
from tljax.audit.report import CLAIMS, Finding, Report, Verdict

CAPTIONS = {
    "Refuted": "What was claimed of these leaves does not hold; where a line is named, it is the one that decides it.",
    "Not decided": "Neither is known of these leaves: the row says what stopped the proof. It is no proof of anything.",
    "Computed for nobody": "This costs, and serves nothing that the step gives back; no claim of a leaf is broken.",
    "Proved": "This holds of these leaves, for all inputs where the detail names no numbers.",
}
"""What stands below the table of each section of a page, in their order."""
GRADES = (
    "identical is the same variable, under every compiler; equal is the same but for the sign of a zero and the bits "
    "of a NaN; equal if finite is so unless what is multiplied by 0 is infinite or NaN."
)
"""What a reader has to know of grades."""


def outcome(finding: Finding) -> str:
    """What was decided of a finding, in words: its verdict, or the grade in which it is proved, with the detail.

    >>> outcome(Finding("body", "frozen", "proved", "is multiplied by 0", grade="equal if finite"))
    'equal if finite: is multiplied by 0'
    """
    source = f" [{finding.source}]" if finding.source else ""
    word = finding.grade if finding.verdict == "proved" and finding.grade else finding.verdict
    return f"{word}: {finding.detail}{source}"


def folded(report: Report) -> Report:
    """The report with leaves that differ in a number alone in one row, where all else of them is the same.

    >>> rows = [Finding(f"block_{i}/bias", "frozen", "proved", "the same variable") for i in range(3)]
    >>> folded(Report("step", tuple(rows))).findings[0].path
    'block_{0..2}/bias'
    """
    rows = [(finding.path, replace(finding, path="")) for finding in report.findings]
    findings = tuple(replace(report.findings[places[0]], path=path) for path, places in paths.folded(rows))
    return replace(report, findings=findings)


def show(report: Report) -> None:
    """Print the findings, the refuted first, with what is alike in one row."""
    verdicts: tuple[Verdict, ...] = ("proved", "refuted", "not decided")
    counts = ", ".join(f"{len(report.select(verdict=verdict)):,} {verdict}" for verdict in verdicts)
    _, *lines = folded(report).table().splitlines()
    for line in (f"{report.subject}: {counts}", *lines):
        console.say(line)


def write(folder: Path, report: Report, failures: Sequence[Finding], command: str) -> None:
    """Write audit.json, a record with its SHA-256, and audit.html into the folder."""
    record: dict[str, Any] = {
        "subject": report.subject,
        "findings": [asdict(finding) for finding in report.findings],
        "failures": [[finding.path, finding.claim] for finding in failures],
        "notes": list(report.notes),
        "environment": directory.environment({}),
    }
    directory.write_record(folder / "audit.json", json.loads(json.dumps(record)))
    environment = {key: value for key, value in record["environment"].items() if value}
    directory.replace(folder / "audit.html", page(report, failures, Provenance(environment, command=command)))


def page(report: Report, failures: Sequence[Finding], provenance: Provenance) -> str:
    """The HTML of an audit: a table for each verdict, and what each claim says."""
    lead = (
        f"Of {len(report.findings):,} claims {len(report.select(verdict='proved')):,} are proved, "
        f"{len(report.refuted):,} refuted and {len(report.undecided):,} not decided"
    )
    lead += (
        f"; {len(failures):,} against what was to hold." if failures else ", and nothing that was to hold is broken."
    )
    claims = dict.fromkeys(finding.claim for finding in report.findings)
    lists = [("What is claimed of a leaf", [(str(claim), CLAIMS[claim]) for claim in claims])]
    lists += [("Notes", [(str(number), note) for number, note in enumerate(report.notes, 1)])] if report.notes else []
    sections = [
        Section(title, title.lower().replace(" ", "_"), [_block(title, findings)] if findings else [])
        for title, findings in _parts(folded(report)).items()
    ]
    return pages.render(sections, title=f"Audit of {report.subject}", lead=lead, provenance=provenance, lists=lists)


def _parts(report: Report) -> dict[str, Sequence[Finding]]:
    """{title of a section: its findings}: what is proved to be idle is apart from what is proved to hold."""
    proved = report.select(verdict="proved")
    idle = [finding for finding in proved if finding.claim == "idle"]
    rest = [finding for finding in proved if finding.claim != "idle"]
    return dict(zip(CAPTIONS, (report.refuted, report.undecided, idle, rest), strict=True))


def _block(title: str, findings: Sequence[Finding]) -> Block:
    """The table of the findings of a section."""
    has_grades, has_sources = (any(getattr(f, name) for f in findings) for name in ("grade", "source"))
    columns = [
        "Leaf",
        "Claim",
        *(["Grade"] if has_grades else []),
        "What decides it",
        *(["Where"] if has_sources else []),
    ]
    rows = [
        [
            Cell(finding.path),
            Cell(finding.claim),
            *([Cell(finding.grade or "")] if has_grades else []),
            Cell(finding.detail + (f", {finding.condition}" if finding.condition else "")),
            *([Cell(finding.source or "")] if has_sources else []),
        ]
        for finding in findings
    ]
    caption = CAPTIONS[title] + (f" Of grades {GRADES}" if has_grades else "")
    return Block(caption, Table(title, columns, rows, words=len(columns)))
