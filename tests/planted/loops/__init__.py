"""Training loops with one planted bug each, after a public report, and the same loops without it.

A file is a kind of harm. Its functions are builders, `(clean) -> Loop`: the loop as its author would write it, or the
same loop with the bug mended. No line is anyone's: only what went wrong is theirs.

Out of scope: a `pmap` without a `pmean` of the gradients, after which replicas drift apart. Each replica's step is
right by itself, so no reading of one leaf's new value shows it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Loop(NamedTuple):
    """What `audit.step` is asked about."""

    step: Callable[[Any, Any], Any]
    """`(state, batch) -> state`, or with metrics after the state."""
    state: Any
    batch: Any
    mask: Any
    """A tree of the parameters: True where a leaf is to train, a number for its rate, an array for its elements."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Further arguments of `audit.step`."""
    gradient_of: Callable[[Any], Any] | None = None
    """Of a state, the tree with respect to which the loop differentiates, where that is not the parameters."""


class Bug(NamedTuple):
    """A planted bug."""

    report: str
    """Repository and number of the issue or pull request."""
    build: Callable[[bool], Loop]
    claims: tuple[tuple[str, str], ...]
    """What is to be refuted: the claim, and a part of the path of a leaf."""
