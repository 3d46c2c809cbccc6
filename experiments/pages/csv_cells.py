"""Cells of a CSV file that a spreadsheet shows and does not run."""

import re

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
            "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def cell(text: str) -> str:
    """The text for a cell of a CSV file, after an apostrophe if a spreadsheet would take it for a formula.

    That is text that begins with = + - @, a tab or a line break (OWASP, "CSV Injection"); numbers stay as they are.

    >>> cell("=1+1"), cell("-0.5"), cell("-cat"), cell("cat")
    ("'=1+1", '-0.5', "'-cat", 'cat')
    """
    return "'" + text if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text
