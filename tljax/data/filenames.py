"""Names of files as text that is the same in every locale.

Python decodes a name's bytes by the locale, so one file has two names in two processes; here a name is its bytes as
UTF-8, and a byte that is none is a lone surrogate (PEP 383).
"""

import os


def text(name: str | os.PathLike[str]) -> str:
    """The name of a file, as Python has it, to text that no locale changes.

    >>> text("café.png")
    'café.png'
    """
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def place(text: str) -> str:
    """The inverse of `text`: what `open` takes in this process's locale.

    >>> place("café.png")
    'café.png'
    """
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))
