"""Patterns of paths: the same as a regular expression's, however many stars, and braces for either of several."""

import itertools
import re

import pytest

from tljax import paths
from tljax.types import InputError


def matches(pattern: str, path: str) -> bool:
    """What Python's regular expressions say, which take exponential time where stars stand in a row."""
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.fullmatch("".join(forms.get(piece, re.escape(piece)) for piece in pieces), path) is not None


def test_a_pattern_matches_what_its_regular_expression_does():
    """All patterns of up to four pieces on all paths of up to five characters."""
    pieces = ("a", "/", "*", "**", "?")
    all_paths = ["".join(p) for n in range(6) for p in itertools.product("ab/", repeat=n)]
    for count in range(5):
        for parts in itertools.product(pieces, repeat=count):
            pattern = "".join(parts)
            if "***" in pattern:
                continue
            accepts = paths.glob(pattern)
            assert [path for path in all_paths if accepts(path)] == [p for p in all_paths if matches(pattern, p)]


@pytest.mark.parametrize("pattern", ["*" * 40 + "x", "*a" * 30 + "x", "**/" * 30 + "x", "?*" * 30 + "x", "**a" * 30])
def test_no_pattern_takes_long(pattern):
    """A path of length n is read once: n characters times the states of the pattern, which are counted here."""
    reads = 0

    class Counted(str):
        def __iter__(self):
            nonlocal reads
            for character in super().__iter__():
                reads += 1
                yield character

    assert not paths.glob(pattern)(Counted("a" * 200 + "b"))
    assert reads <= 201


def test_braces_stand_for_either_and_may_be_nested():
    accepts = paths.glob("block_{0,1{0,1}}/{q,k}*")
    names = [f"block_{i}/{name}" for i in ("0", "1", "10", "11", "12") for name in ("q", "key", "v")]
    assert [name for name in names if accepts(name)] == [
        f"block_{i}/{name}" for i in ("0", "10", "11") for name in ("q", "key")
    ]


@pytest.mark.parametrize("pattern", ["{a,b", "a}", "{{a}", "{a,b}}"])
def test_a_brace_that_is_not_closed_is_refused(pattern):
    with pytest.raises(InputError, match="a brace is not closed"):
        paths.glob(pattern)


def test_too_many_alternatives_are_refused():
    with pytest.raises(InputError, match="more than 1,000"):
        paths.glob("{a,b}" * 10)
