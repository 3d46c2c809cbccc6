"""Fits, a row each, to strategies, a row each: means and ranges over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tljax.types import InputError

Row = Mapping[str, Any]

Curves = Mapping[str, Mapping[str, Any]]
"""Name of a fit -> step, train_loss, accuracy, each [segments]."""

Members = Mapping[str, Sequence[Row]]
"""Fits by strategy."""

Spread = tuple[float, float, float]
"""Mean, lowest and highest over seeds."""


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each budget, target and strategy; fits of sources are left out, diverged fits enter no mean.

    Keys: members (the fits), target, source, strategy (such as 'last_k:k=2'), train_examples; seeds, diverged, counted
    (how many fits there are, diverged, entered the means); accuracy (fraction), test_loss (nats), calibration_error
    (fraction), each a `Spread` or None; gain (points above scratch, paired by seed) and gain_seeds (how many pairs);
    steps and seconds (means), trained_parameters, total_parameters and leaves (path, numbers, trained numbers; or
    None). The order is that of `groups` without the sources' fits.
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
    """The strategy and its options as a flag would have them.

    >>> label({"strategy": "last_k", "options": {"k": 2}})
    'last_k:k=2'
    """
    options = row.get("options") or {}
    return ":".join([str(row["strategy"]), *(f"{name}={options[name]}" for name in sorted(options))])


def counts(row: Row) -> bool:
    """Whether a fit enters the means: it did not diverge, and its test accuracy is a number."""
    return not row.get("diverged") and finite(row.get("test_accuracy"))


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
        "accuracy": spread(row["test_accuracy"] for row in counted),
        "gain": spread(gains),
        "gain_seeds": len(gains),
        "test_loss": spread(row.get("test_loss") for row in counted),
        "calibration_error": spread(row.get("calibration_error") for row in counted),
        "trained_parameters": first.get("trained_parameters"),
        "total_parameters": first.get("total_parameters"),
        "leaves": first.get("leaves"),
        "steps": mean(row.get("steps") for row in counted),
        "seconds": mean(row.get("seconds") for row in counted),
    }


def _gains(counted: Sequence[Row], scratch: Sequence[Row]) -> list[float]:
    """Points above the fit from scratch of the same target, budget and seed, where there is one."""
    baseline = {_pair(row): row["test_accuracy"] for row in scratch if counts(row)}
    return [100 * (row["test_accuracy"] - baseline[_pair(row)]) for row in counted if _pair(row) in baseline]


def _pair(row: Row) -> tuple[Any, ...]:
    return row["target"], row["train_examples"], row["seed"]
