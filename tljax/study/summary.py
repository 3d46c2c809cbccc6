"""Fits, a row each, to strategies, a row each: means and ranges over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tljax.types import InputError

Row = Mapping[str, Any]

Curves = Mapping[str, Mapping[str, Any]]
"""Name of a fit -> step, train_loss, accuracy, each [segments]."""

Members = Mapping[str, Sequence[Row]]
"""Fits by strategy."""

Spread = tuple[float, float, float]
"""Mean, lowest and highest over seeds."""


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each budget, target and strategy; fits of sources are left out, diverged ones count as `accuracy` says.

    Keys: members (the fits), target, source, strategy (such as 'last_k:k=2'), train_examples; seeds, diverged, counted
    (how many fits there are, diverged, entered the mean accuracy); counts_as (the accuracy of a diverged fit, or None);
    accuracy (fraction), test_loss (nats), calibration_error (fraction), each a `Spread` or None, the latter two over
    the fits that did not diverge; gain (points above scratch, paired by seed) and gain_seeds (how many pairs); steps
    and seconds (means), trained_parameters, total_parameters and leaves (path, numbers, trained numbers; or None). The
    order is that of `groups` without the sources' fits.
    """
    scratch = [row for row in rows if row["strategy"] == "scratch"]
    return [_aggregate(members, scratch) for members in groups(rows) if members[0]["strategy"] != "pretrain"]


def sources(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Likewise of the fits that pretrained a source; none has a gain."""
    return [_aggregate(members, []) for members in groups(rows) if members[0]["strategy"] == "pretrain"]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Fits that differ in their seed alone, together; budgets ascend, else in the order of the rows.

    Raises InputError as `require_one_recipe` does.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["target"], row.get("source"), label(row), row["train_examples"]), []).append(row)
    for members in groups.values():
        require_one_recipe(members)
    return sorted(groups.values(), key=lambda members: members[0]["train_examples"] or 0)


def require_one_recipe(members: Sequence[Row]) -> None:
    """Raise InputError if of the fits of one cell two have the same seed, or two differ in more than their seed.

    A row's `recipe` is a digest of all but the seed that decides a fit; where it is not known, the steps are compared.

    >>> fits = [{"strategy": "full", "train_examples": 10, "seed": seed, "name": f"fit{seed}"} for seed in (0, 1, 1)]
    >>> require_one_recipe(fits[:2])
    >>> require_one_recipe(fits)
    Traceback (most recent call last):
    tljax.types.InputError: 'fit1' and 'fit1' are both full with 10 labels under seed 1: keep one of them, ...
    """
    seeds: dict[Any, Row] = {}
    for row in members:
        what = f"{label(row)} with {row['train_examples']:,} labels" if row.get("train_examples") else label(row)
        other = seeds.setdefault(row.get("seed"), row)
        if other is not row:
            raise InputError(
                f"'{other.get('name')}' and '{row.get('name')}' are both {what} under seed {row.get('seed')}: keep one "
                "of them, or give them run directories of their own"
            )
        for name in ("recipe", "steps", "phase_steps"):
            here, there = row.get(name), members[0].get(name)
            if here is not None and there is not None and here != there:
                raise InputError(
                    f"'{members[0].get('name')}' and '{row.get('name')}' are both {what}, but of different "
                    "hyper-parameters, code or data: no table may mix them; keep those of one recipe"
                )


def label(row: Row) -> str:
    """The strategy and its options as a flag would have them; the name alone of one that was given a name.

    >>> label({"strategy": "last_k", "options": {"k": 2}})
    'last_k:k=2'
    >>> label({"strategy": "top_two", "options": {"k": 2}, "spec": "last_k:k=2"})
    'top_two'
    """
    options = {} if row.get("spec") else row.get("options") or {}
    return ":".join([str(row["strategy"]), *(f"{name}={options[name]}" for name in sorted(options))])


COUNTS_AS = (
    "a fit that diverged counts as the share of the most frequent test class, as if it always answered that; losses "
    "and curves are of the others"
)
"""What is said wherever a diverged fit entered a mean."""


def majority_share(labels: np.ndarray) -> float:
    """The share of the most frequent class among test labels, int [items]: what is right without having learnt.

    >>> majority_share(np.array([0, 2, 2, 1]))
    0.5
    """
    _, counts_of_classes = np.unique(np.asarray(labels), return_counts=True)
    return float(counts_of_classes.max() / counts_of_classes.sum())


def with_share(rows: Iterable[Row], labels: np.ndarray) -> list[Row]:
    """Rows of one target, the diverged ones with the `majority_share` of its test labels, int [items].

    >>> with_share([{"name": "full", "diverged": True}], np.array([0, 1, 1, 1]))
    [{'name': 'full', 'diverged': True, 'majority_share': 0.75}]
    """
    share = majority_share(labels) if len(labels) else None
    return [{**row, "majority_share": share} if row.get("diverged") else row for row in rows]


def accuracy(row: Row) -> float | None:
    """The test accuracy that a fit counts with: its own, or of a diverged fit the row's `majority_share`.

    A fit that diverged answers nothing, and a strategy that diverges now and then is the worse for it: its failures
    are not missing at random, so they are not left out. None where it is not known.

    >>> accuracy({"test_accuracy": 0.9}), accuracy({"test_accuracy": None, "diverged": True, "majority_share": 0.1})
    (0.9, 0.1)
    """
    value = row.get("majority_share") if row.get("diverged") else row.get("test_accuracy")
    return value if finite(value) else None


def counts(row: Row) -> bool:
    """Whether a fit enters means of accuracy: it has one to count with."""
    return accuracy(row) is not None


def ended(row: Row) -> bool:
    """Whether a fit did not diverge and was measured, so that it has a loss, a confusion and a curve to its end."""
    return not row.get("diverged") and counts(row)


def finite(value: Any) -> bool:
    """Whether there is a number: not None, NaN or infinite."""
    return value is not None and math.isfinite(value)


def spread(values: Iterable[Any]) -> Spread | None:
    """Mean, lowest and highest of what is finite; None where nothing is.

    >>> spread([1.0, None, 3.0])
    (2.0, 1.0, 3.0)
    """
    known = [float(value) for value in values if finite(value)]
    return (math.fsum(known) / len(known), min(known), max(known)) if known else None


def mean(values: Iterable[Any]) -> float | None:
    """Of what is finite; None where nothing is."""
    known = spread(values)
    return known[0] if known else None


def listed(names: Iterable[Any]) -> str:
    """The different names, as 'a, b and c'."""
    unique = list(dict.fromkeys(map(str, names)))
    return " and ".join(part for part in (", ".join(unique[:-1]), *unique[-1:]) if part)


def _aggregate(members: Sequence[Row], scratch: Sequence[Row]) -> dict[str, Any]:
    first = members[0]
    counted = [row for row in members if counts(row)]
    survivors = [row for row in counted if ended(row)]
    gains = [] if first["strategy"] == "scratch" else _gains(counted, scratch)
    return {
        "members": members,
        "target": first["target"],
        "source": first.get("source"),
        "strategy": label(first),
        "train_examples": first["train_examples"],
        "seeds": len(members),
        "diverged": sum(bool(row.get("diverged")) for row in members),
        "counted": len(counted),
        "counts_as": next((accuracy(row) for row in members if row.get("diverged")), None),
        "accuracy": spread(accuracy(row) for row in counted),
        "gain": spread(gains),
        "gain_seeds": len(gains),
        "test_loss": spread(row.get("test_loss") for row in survivors),
        "calibration_error": spread(row.get("calibration_error") for row in survivors),
        "trained_parameters": first.get("trained_parameters"),
        "total_parameters": first.get("total_parameters"),
        "leaves": first.get("leaves"),
        "steps": mean(row.get("steps") for row in counted),
        "seconds": mean(row.get("seconds") for row in counted),
    }


def _gains(counted: Sequence[Row], scratch: Sequence[Row]) -> list[float]:
    """Points above the fit from scratch of the same target, budget and seed, where there is one."""
    baseline = {_pair(row): value for row in scratch if (value := accuracy(row)) is not None}
    values = [(_pair(row), accuracy(row)) for row in counted]
    return [100 * (value - baseline[pair]) for pair, value in values if value is not None and pair in baseline]


def _pair(row: Row) -> tuple[Any, ...]:
    return row["target"], row["train_examples"], row["seed"]
