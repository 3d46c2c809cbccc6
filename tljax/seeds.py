"""One integer seed names four streams; all strategies under one seed share them, so comparisons are paired."""

import hashlib
from typing import NamedTuple


class Seeds(NamedTuple):
    """Seeds of the four streams, each an integer in 0 .. 2**31 - 1."""

    source: int
    """Everything that is random in the source's fit."""
    head: int
    """The draw of new leaves: the head, or the whole of a model from scratch."""
    order: int
    """The order of the examples, and dropout."""
    draw: int
    """The draw of a label budget and of the validation split."""


def streams(seed: int, **pinned: int | None) -> Seeds:
    """The four streams of `seed`; one that is pinned comes from its own integer instead.

    Each is the head of the SHA-256 of its name and integer, so that no two streams meet.

    >>> streams(0) == streams(1, source=0, head=0, order=0, draw=0)
    True
    """
    integers = {name: pinned.get(name) for name in Seeds._fields}
    return Seeds(**{name: _derive(name, seed if pin is None else pin) for name, pin in integers.items()})


def _derive(stream: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{stream}:{seed}".encode()).digest()[:4], "big") >> 1
