"""Label budgets as flags write them: all, 500, 5/class, 5/class:seeds=30."""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tljax.types import InputError, Task

_FORM = re.compile(r"(?:all|([0-9]+)(/class)?)(?::seeds=([0-9]+))?")


def check(text: str) -> None:
    """Raise InputError unless the text is a label budget.

    >>> check("5/class:seeds=30")
    """
    match = _FORM.fullmatch(text)
    if not match or any(number is not None and int(number) < 1 for number in (match[1], match[3])):
        raise InputError(
            f"--train_examples={text}: write all, a whole number of examples above 0, or so many a class as in "
            "5/class; 5/class:seeds=30 takes the first 30 of --seeds"
        )


def total(text: str, task: Task) -> int:
    """How many labelled examples of a task a label budget has."""
    match = _FORM.fullmatch(text)
    assert match
    if match[1] is None:
        return len(task.train.labels)
    return int(match[1]) * (len(task.classes) if match[2] else 1)


def notes(texts: Sequence[str], task: Task, validation: float = 0.0) -> list[str]:
    """What every table must say of label budgets and the validation split: classes that cannot give their share.

    `draw.label_budget` takes an example of each class in turn, so a class with fewer gives all that it has and the
    others give more; `draw.validation_split` holds out floor(k * validation) of the k examples of a class. Classes
    without any example are left to the findings of the data.
    """
    sentences = []
    counts = np.bincount(np.asarray(task.train.labels), minlength=len(task.classes))
    present = counts[counts > 0]
    for text in texts:
        amount = total(text, task)
        if not len(present) <= amount <= present.sum():
            continue  # refused when it is drawn
        share = _share(present, amount)
        match = _FORM.fullmatch(text)
        assert match
        wanted = int(match[1]) if match[2] else amount // len(present)
        short = np.flatnonzero((counts > 0) & (counts < wanted)) if match[1] else np.empty(0, int)
        if len(short):
            shares = _named(task, short, counts[short])
            sentences.append(
                f"{text.partition(':')[0]} training examples: {shares}, all that there are, so the other classes give "
                f"more; {amount:,} in all"
            )
        # As the decimal that was written, as the split itself has it.
        least = np.minimum(counts, share)
        exact = Fraction(validation).limit_denominator(1_000_000)
        held = least * exact.numerator // exact.denominator
        unheld = np.flatnonzero((counts > 0) & (held == 0)) if validation else np.empty(0, int)
        if len(unheld):
            sentences.append(
                f"{text.partition(':')[0]} training examples, validation {validation:g}: "
                f"{_named(task, unheld, least[unheld])}, so none need be held out to validate on"
            )
    return sentences


def _share(counts: np.ndarray, amount: int) -> int:
    """How many rounds, an example of each class in turn, `amount` examples fill."""
    rounds, left = 0, amount
    for size in np.unique(counts):
        classes = int((counts > rounds).sum())
        step = min(int(size) - rounds, left // classes)
        rounds, left = rounds + step, left - step * classes
        if rounds < size:
            break
    return rounds


def _named(task: Task, labels: np.ndarray, counts: np.ndarray) -> str:
    named = [f"class '{task.classes[label]}' gives {count}" for label, count in zip(labels, counts, strict=True)]
    return ", ".join(named[:6]) + (f" and {len(named) - 6} more such" if len(named) > 6 else "")


def seeds(text: str, seeds_of_run: Sequence[int]) -> tuple[int, ...]:
    """Which of the seeds are drawn at this budget: the first, if it says how many; raises InputError for too few.

    >>> seeds("5/class:seeds=2", (0, 1, 2)), seeds("all", (0, 1, 2))
    ((0, 1), (0, 1, 2))
    """
    match = _FORM.fullmatch(text)
    assert match
    most = int(match[3] or len(seeds_of_run))
    if most > len(seeds_of_run):
        count = len(seeds_of_run)
        raise InputError(f"--train_examples={text}: there are {count} --seeds, not {most}: give more, as in 0-29")
    return tuple(seeds_of_run[:most])
