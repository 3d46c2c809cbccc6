"""A study as files: its report in Markdown, tables for LaTeX, pictures as PDF, numbers as CSV.

CSV is written with the standard library: pandas would do no part of it for us (cells that no spreadsheet runs, lists as
JSON), and nothing else here needs pandas.
"""

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.pages import figures
from experiments.pages.csv_cells import cell
from experiments.pages.report import Section
from experiments.runs.console import Cell, Table
from tljax.files import to_bytes
from tljax.study.results import Result, to_json
from tljax.study.results import metric as metric_of
from tljax.study.search import TrialRecord
from tljax.study.units import ACCURACY
from tljax.study.verdicts import Study
from tljax.types import Metric

LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
}
"""The characters that LaTeX writes otherwise: {character: LaTeX}."""


@figures.style()
def files(study: Study, sections: Sequence[Section], title: str) -> dict[str, bytes]:
    """{path in a folder: bytes}: report.md, tables.tex, figures/*.pdf, comparisons.csv, fits.csv, milestones.csv.

    The sections are those of the page; the numbers in the CSV files are not rounded. Equal studies give equal bytes.
    """
    filled = [section for section in sections if section.blocks]
    pictures = dict(_pictures(filled))
    names = {id(figure): f"figures/{name}.pdf" for name, (figure, _) in pictures.items()}
    drawn = {names[id(figure)]: figures.pdf(figure) for figure, _ in pictures.values()}
    tables = [latex(block.table, block.caption) for section in filled for block in section.blocks if block.table]
    texts = {
        "report.md": _markdown(study, title, filled, names),
        "tables.tex": "\n".join(["% \\usepackage{booktabs}", "% \\usepackage[T1]{fontenc}", *tables]),
        "comparisons.csv": table(_comparisons(study)),
        "fits.csv": table(map(_fit, study.rows)),
        "milestones.csv": table(_milestones(study)),
    }
    return {**{name: to_bytes(text) for name, text in texts.items()}, **drawn}


def _comparisons(study: Study) -> list[dict[str, Any]]:
    """The comparisons as rows; where a metric is not accuracy, with its name and unit."""
    comparisons = [*study.family, *study.others]
    all_of_accuracy = all(comparison.metric == ACCURACY for comparison in comparisons)
    rows = []
    for comparison in comparisons:
        row = {name: value for name, value in comparison._asdict().items() if name != "metric"}
        metric = comparison.metric
        about = {"metric": metric.name, "unit": metric.unit, "larger_is_better": metric.larger_is_better}
        rows.append(row if all_of_accuracy else row | about)
    return rows


_OF_CLASSES = ("calibration_error", "calibration", "per_class_accuracy", "confusion")
_OF_ACCURACY = ("test_accuracy", "validation_accuracy", "best_validation_accuracy")


def _fit(fit: Result) -> dict[str, Any]:
    """A fit as a row: what it was measured by where that is not accuracy, and nothing that is of accuracy alone."""
    row = to_json(fit)
    if fit.metric is not None:
        row = {
            key: value for key, value in row.items() if key not in (*_OF_CLASSES, *_OF_ACCURACY) or value is not None
        }
        row = {"start_score" if key == "start_accuracy" else key: value for key, value in row.items()}
    if fit.source_metric is not None or (fit.metric is not None and fit.source_accuracy is None):
        row = {"source_score" if key == "source_accuracy" else key: value for key, value in row.items()}
    return row


def _milestones(study: Study) -> list[dict[str, Any]]:
    """The milestones as rows; where the metric of a target is not accuracy, with its name."""
    metrics = {fit.target: metric_of(fit) for fit in study.rows}
    others = {target: each for target, each in metrics.items() if each != ACCURACY}
    return [
        {**row, **({"metric": metrics[row["target"]].name} if others and row["target"] in metrics else {})}
        for row in study.milestones
    ]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV of rows, a column for each key in the order of their first use; None is empty, lists and the like are JSON.

    >>> table([{"strategy": "full", "k": None}, {"strategy": "last_k", "gain": 0.1}])
    'strategy,k,gain\\r\\nfull,,\\r\\nlast_k,,0.1\\r\\n'
    """
    known = list(rows)
    columns = list(dict.fromkeys(key for row in known for key in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(map(cell, columns))
    writer.writerows([[_value(row.get(column)) for column in columns] for row in known])
    return file.getvalue()


def _value(value: Any) -> Any:
    """A value as it is written in a cell of a CSV file."""
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str)
    return cell(value) if isinstance(value, str) else value


def latex(table: Table, caption: str) -> str:
    """A table for booktabs; the text below a number stands beside it in brackets."""
    heads = len(table.columns)
    body = []
    for row in table.rows:
        if len(row) < heads:
            body.append(f"\\addlinespace\\multicolumn{{{heads}}}{{l}}{{\\emph{{{escaped(row[0].text)}}}}} \\\\")
        else:
            body.append(" & ".join(escaped(_inline(cell)) for cell in row) + r" \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{escaped(table.label)}. {escaped(caption)}}}",
            rf"\begin{{tabular}}{{{'l' * table.words + 'r' * (heads - table.words)}}}",
            r"\toprule",
            " & ".join(map(escaped, table.columns)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escaped(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> print(escaped("last_k & 5 %"))
    last\_k \& 5 \%
    """
    return "".join(LATEX.get(c, c) for c in figures.printable(text))


def marked(text: str) -> str:
    r"""Text that Markdown, and the HTML made of it, prints as it is.

    >>> print(marked("last_k|<b>"))
    last\_k\|&lt;b&gt;
    """
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(figures.printable(text), quote=False))


def _inline(cell: Cell) -> str:
    """The text of a cell, and in brackets the text below it."""
    return f"{cell.text} ({cell.below})" if cell.below else cell.text


def _markdown(study: Study, title: str, sections: Sequence[Section], names: Mapping[int, str]) -> str:
    """The report as Markdown; `names` are those of the figures' files, by their identity."""
    lines = [f"# {marked(title)}", marked(study.verdict)]
    for section in sections:
        lines.append(f"## {section.title}")
        for block in section.blocks:
            lines += [f"### {marked(block.heading)}"] if block.heading else []
            lines += [_pipes(block.table)] if block.table else []
            lines += [f"[{marked(alt)}]({names[id(figure)]})" for figure, alt in block.pictures]
            lines.append(f"*{marked(block.caption)}*")
    return "\n\n".join(lines) + "\n"


def _pipes(table: Table) -> str:
    """The table in Markdown."""
    heads = len(table.columns)
    lines = [list(map(marked, table.columns)), ["---"] * table.words + ["---:"] * (heads - table.words)]
    for row in table.rows:
        heading = [f"**{marked(row[0].text)}**"] + [""] * (heads - 1)
        lines.append(heading if len(row) < heads else [marked(_inline(cell)) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pictures(sections: Sequence[Section]) -> Iterator[tuple[str, figures.Picture]]:
    """(the key of its section and a number, picture) of each picture."""
    for section in sections:
        drawn = [picture for block in section.blocks for picture in block.pictures]
        for number, picture in enumerate(drawn, 1):
            yield (f"{section.key}-{number}" if len(drawn) > 1 else section.key), picture


def trials(studies: Mapping[tuple[str, str], Sequence[TrialRecord]], metric: Metric = ACCURACY) -> str:
    """All trials of a search as CSV, a row each; studies are known by (strategy, budget).

    A field that is not known, or was not searched, is empty.

    >>> print(trials({("full", "all"): []}).strip())
    strategy,budget,number,state,value,validation_accuracy,validation_loss,diverged,owner,begin,end
    """
    names = dict.fromkeys(name for each in studies.values() for trial in each for name in trial.values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    validation = "validation_accuracy" if metric == ACCURACY else f"validation_{metric.name}"
    fields = ["number", "state", "value", validation, "validation_loss", "diverged", "owner", "begin", "end"]
    writer.writerow(["strategy", "budget", *fields, *map(cell, names)])
    for arm, each in studies.items():
        for trial in each:
            values = (*arm, *trial[: len(fields)], *(trial.values.get(name) for name in names))
            writer.writerow([cell(value) if isinstance(value, str) else value for value in values])
    return text.getvalue()
