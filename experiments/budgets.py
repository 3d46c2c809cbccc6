"""Label budgets as flags write them: all, 500, 5/class, 5/class:seeds=30."""

import re
from collections.abc import Sequence

from tljax.types import InputError, Task

_FORM = re.compile(r"(?:all|([0-9]+)(/class)?)(?::seeds=([0-9]+))?")


def check(text: str) -> None:
    """Raise InputError for what is no label budget.

    >>> check("5/class:seeds=30")
    """
    found = _FORM.fullmatch(text)
    if not found or any(number is not None and int(number) < 1 for number in (found[1], found[3])):
        raise InputError(
            f"--train_examples={text}: write all, a whole number of examples above 0, or so many a class as in "
            "5/class; 5/class:seeds=30 takes the first 30 of --seeds"
        )


def total(text: str, task: Task) -> int:
    """How many labelled examples of a task."""
    found = _FORM.fullmatch(text)
    assert found
    if found[1] is None:
        return len(task.train.labels)
    return int(found[1]) * (len(task.classes) if found[2] else 1)


def seeds(text: str, given: Sequence[int]) -> tuple[int, ...]:
    """Which of the seeds are drawn at this budget: the first, if it says how many; raises InputError for too few.

    >>> seeds("5/class:seeds=2", (0, 1, 2)), seeds("all", (0, 1, 2))
    ((0, 1), (0, 1, 2))
    """
    found = _FORM.fullmatch(text)
    assert found
    most = int(found[3] or len(given))
    if most > len(given):
        raise InputError(f"--train_examples={text}: there are {len(given)} --seeds, not {most}: give more, as in 0-29")
    return tuple(given[:most])
