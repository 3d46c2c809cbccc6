"""What is written into CSV files is text to a spreadsheet, and a number where it is one."""

import csv
import io

import pytest

from experiments.pages.csv_cells import cell


@pytest.mark.parametrize(
    "text",
    ["=1+1", '=HYPERLINK("http://x")', "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "-", "=",
     "+cmd|' /C calc'!A0", "--1", "-1,5", "+0x10", "-1_0", "\uff1d1+1"],
)  # fmt: skip
def test_what_a_spreadsheet_would_run_begins_with_an_apostrophe(text: str) -> None:
    assert cell(text) == "'" + text
    stream = io.StringIO(newline="")
    csv.writer(stream).writerow(["a", cell(text)])
    assert next(csv.reader(io.StringIO(stream.getvalue(), newline=""))) == ["a", "'" + text]


@pytest.mark.parametrize(
    "text", ["", "cat", "a=1", "-0.5", "+1", "-1e-7", "-.5", "-3.", "+inf", "-nan", "1+1", " =1", "é", "'=1"]
)
def test_numbers_and_other_text_stay(text: str) -> None:
    assert cell(text) == text
