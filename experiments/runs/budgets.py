"""Label budgets as flags write them: all, 500, 5/class, 5/class:seeds=30."""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tljax.types import InputError, Task

_BUDGET = re.compile(r"(?:all|([0-9]+)(/class)?)(?::seeds=([0-9]+))?")


def _match(text: str) -> re.Match[str]:
    """The match of a label budget that was checked: its number, whether it is for each class, its number of seeds."""
    match = _BUDGET.fullmatch(text)
    assert match
    return match


def check(text: str) -> None:
    """Raise InputError if the text is not a label budget.

    >>> check("5/class:seeds=30")
    """
    match = _BUDGET.fullmatch(text)
    if not match or any(number is not None and int(number) < 1 for number in (match[1], match[3])):
        raise InputError(
            f"--train_examples={text}: write all, a whole number of examples above 0, or so many a class as in "
            "5/class; 5/class:seeds=30 takes the first 30 of --seeds"
        )


def is_budget(text: str) -> bool:
    """Whether a text is a label budget, without seeds of its own.

    >>> is_budget("5/class"), is_budget("area"), is_budget("5/class:seeds=2")
    (True, False, False)
    """
    match = _BUDGET.fullmatch(text)
    return match is not None and match[3] is None and (match[1] is None or int(match[1]) > 0)


def total(text: str, task: Task) -> int:
    """The number of labelled examples that a label budget takes of a task.

    Raises InputError for so many a class of a task without classes.
    """
    match = _match(text)
    if match[1] is None:
        return len(task.train.targets)
    if match[2] and task.kind != "classes":
        raise InputError(
            f"--train_examples={text}: the targets of '{task.name}' are {task.kind}, no classes: give a number of all "
            f"examples, such as {match[1]}"
        )
    return int(match[1]) * (len(task.classes) if match[2] else 1)


def whole(texts: Sequence[str], task: Task) -> tuple[str, ...]:
    """Those of label budgets that are every training example of a task, of which there is one draw."""
    return tuple(text for text in texts if total(text, task) == len(task.train.targets))


def notes(texts: Sequence[str], task: Task, validation: float = 0.0) -> list[str]:
    """The lines of every table on classes that have too few examples for a label budget or the validation split.

    `draw.label_budget` takes an example of each class in turn, so a class with fewer gives all that it has and the
    others give more; `draw.validation_split` holds out floor(k * validation) of the k examples of a class. Classes
    without any example are left to the findings of the data, and of targets that are no classes there are no lines.
    """
    if task.kind != "classes":
        return []
    lines = []
    counts = np.bincount(np.asarray(task.train.targets), minlength=len(task.classes))
    present = counts[counts > 0]
    for text in texts:
        amount = total(text, task)
        if not len(present) <= amount <= present.sum():
            continue  # refused when it is drawn
        share = _share(present, amount)
        match = _match(text)
        wanted = int(match[1]) if match[2] else amount // len(present)
        short = np.flatnonzero((counts > 0) & (counts < wanted)) if match[1] else np.empty(0, int)
        if len(short):
            classes = _class_counts(task, short, counts[short])
            lines.append(
                f"{text.partition(':')[0]} training examples: {classes}, all that there are, so the other classes give "
                f"more; {amount:,} in all"
            )
        # As the decimal that was written, as the split itself has it.
        least = np.minimum(counts, share)
        exact = Fraction(validation).limit_denominator(1_000_000)
        held = least * exact.numerator // exact.denominator
        unheld = np.flatnonzero((counts > 0) & (held == 0)) if validation else np.empty(0, int)
        if len(unheld):
            lines.append(
                f"{text.partition(':')[0]} training examples, validation {validation:g}: "
                f"{_class_counts(task, unheld, least[unheld])}, so none need be held out to validate on"
            )
    return lines


def _share(counts: np.ndarray, amount: int) -> int:
    """The number of rounds that `amount` examples fill when each class in turn gives one."""
    rounds, left = 0, amount
    for size in np.unique(counts):
        classes = int((counts > rounds).sum())
        step = min(int(size) - rounds, left // classes)
        rounds, left = rounds + step, left - step * classes
        if rounds < size:
            break
    return rounds


def _class_counts(task: Task, labels: np.ndarray, counts: np.ndarray) -> str:
    """The words on how many examples each of these classes gives."""
    texts = [f"class '{task.classes[label]}' gives {count}" for label, count in zip(labels, counts, strict=True)]
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} more such" if len(texts) > 6 else "")


def seeds(text: str, all_seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds that are drawn at a label budget: the first N of --seeds if it ends in :seeds=N, or else all.

    Raises InputError if there are fewer than N.

    >>> seeds("5/class:seeds=2", (0, 1, 2)), seeds("all", (0, 1, 2))
    ((0, 1), (0, 1, 2))
    """
    most = int(_match(text)[3] or len(all_seeds))
    if most > len(all_seeds):
        raise InputError(
            f"--train_examples={text}: there are {len(all_seeds)} --seeds, not {most}: give more, as in 0-29"
        )
    return tuple(all_seeds[:most])
