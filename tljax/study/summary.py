"""From fits to strategies: means and ranges over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tljax.study import results as of_results
from tljax.study import units
from tljax.study.results import Replicate, Result, replicate
from tljax.study.units import ACCURACY
from tljax.types import InputError, Metric

Curves = Mapping[str, Mapping[str, Any]]
"""Name of a fit -> step, train_loss, and accuracy, or score where the metric is another, each [segments]."""


def along(curve: Mapping[str, Any]) -> np.ndarray:
    """The metric at the points of a curve, float [segments]: its accuracy, or the score where that is another.

    >>> along({"step": [1, 2], "accuracy": [0.5, 1]}).tolist()
    [0.5, 1.0]
    """
    return np.asarray(curve["score"] if "score" in curve else curve["accuracy"], float)


Members = Mapping[str, Sequence[Result]]
"""Fits by strategy."""

Spread = tuple[float, float, float]
"""Mean, lowest and highest over seeds."""


@dataclass(frozen=True)
class Summary:
    """The fits of one source, target, strategy and label budget, over their seeds."""

    name: str
    """What a table calls it: the strategy, until a page gives it another name."""
    members: Sequence[Result]
    """The fits."""
    target: str
    source: str | None
    strategy: str
    """With its options, such as 'last_k:k=2'."""
    train_examples: int
    seeds: int
    """How many fits there are: seeds, or seeds times draws of labels."""
    diverged: int
    """How many of them diverged."""
    counted: int
    """How many entered the mean score."""
    counts_as: float | None
    """The score that one that diverged counts with; None where none did."""
    metric: Metric
    """What the scores are: accuracy, or another."""
    score: Spread | None
    """The metric on the test set; of one in '%' a fraction."""
    gain: Spread | None
    """How much better than scratch, paired by seed: in points, or the metric's unit."""
    gain_seeds: int
    """How many pairs there are."""
    test_loss: Spread | None
    """Of classes in nats; over the fits that did not diverge, as is the next."""
    calibration_error: Spread | None
    """A fraction."""
    trained_parameters: int | None
    total_parameters: int | None
    leaves: Sequence[tuple[str, int, int]] | None
    """(path, numbers, trained numbers) of each leaf."""
    steps: float | None
    """A mean, as are the seconds."""
    seconds: float | None
    retention: Spread | None = None
    """The source's metric on the source's test set, with the source's head put back; None where it is not known."""
    retention_metric: Metric = ACCURACY
    peak_bytes: int | None = None
    """The largest of its fits: the memory of a training program on a device."""


def summary(results: Sequence[Result]) -> list[Summary]:
    """A summary for each budget, target and strategy, in the order of `groups`.

    Fits of sources are left out, and diverged ones count as `counted_score` says.
    """
    scratch = [result for result in results if result.strategy == "scratch"]
    return [_aggregate(members, scratch) for members in groups(results) if members[0].strategy != "pretrain"]


def sources(results: Sequence[Result]) -> list[Summary]:
    """A summary for each source of the fits that trained it; none has a gain."""
    return [_aggregate(members, []) for members in groups(results) if members[0].strategy == "pretrain"]


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """Fits that differ in their seed alone, together; budgets ascend, else in the order of the results.

    Raises InputError as `require_one_recipe` does.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault((result.target, result.source, label(result), result.train_examples), []).append(result)
    for members in groups.values():
        require_one_recipe(members)
    return sorted(groups.values(), key=lambda members: members[0].train_examples or 0)


def require_one_recipe(members: Sequence[Result]) -> None:
    """Raise InputError if of the fits of one cell two have the same seed, or two differ in more than their seed.

    A fit's `recipe` is a digest of all but the seed that decides it; where it is not known, the steps are compared.

    >>> same = {"target": "b", "strategy": "full", "train_examples": 10}
    >>> fits = [Result(name=f"fit{seed}", seed=seed, **same) for seed in (0, 1, 1)]
    >>> require_one_recipe(fits[:2])
    >>> require_one_recipe(fits)
    Traceback (most recent call last):
    tljax.types.InputError: 'fit1' and 'fit1' are both full with 10 labels under seed 1: keep one of them, ...
    """
    seeds: dict[Any, Result] = {}
    for result in members:
        what = f"{label(result)} with {result.train_examples:,} labels" if result.train_examples else label(result)
        other = seeds.setdefault(replicate(result), result)
        if other is not result:
            under = f"seed {result.seed}" + ("" if result.draw is None else f" and draw {result.draw}")
            raise InputError(
                f"'{other.name}' and '{result.name}' are both {what} under {under}: keep one "
                "of them, or give them run directories of their own"
            )
        for name in ("recipe", "steps", "phase_steps"):
            value, first = getattr(result, name), getattr(members[0], name)
            if value and first and value != first:
                raise InputError(
                    f"'{members[0].name}' and '{result.name}' are both {what}, but of different "
                    "hyper-parameters, code or data: no table may mix them; keep those of one recipe"
                )


def label(result: Result) -> str:
    """The strategy and its options as a flag would have them; the name alone of one that was given a name.

    >>> label(Result(name="a", target="b", strategy="last_k", options={"k": 2}, seed=0))
    'last_k:k=2'
    >>> label(Result(name="a", target="b", strategy="top_two", options={"k": 2}, spec="last_k:k=2", seed=0))
    'top_two'
    """
    options = {} if result.spec else result.options
    return ":".join([result.strategy, *(f"{name}={options[name]}" for name in sorted(options))])


COUNTS_AS = (
    "a fit that diverged counts as the share of the most frequent test class, as if it always answered that; losses "
    "and curves are of the others"
)
COUNTS_AS_CONSTANT = (
    "a fit that diverged counts as the best constant answer, as if it always gave that; losses and curves are of the "
    "others"
)


def counts_as(results: Iterable[Result]) -> list[str]:
    """What is said wherever diverged fits, these, entered a mean: of accuracy, and of other metrics."""
    return list(dict.fromkeys(COUNTS_AS if result.metric is None else COUNTS_AS_CONSTANT for result in results))


def majority_share(labels: np.ndarray) -> float:
    """The share of the most frequent class among test labels, int [items]: what is right without having learnt.

    >>> majority_share(np.array([0, 2, 2, 1]))
    0.5
    """
    _, counts_of_classes = np.unique(np.asarray(labels), return_counts=True)
    return float(counts_of_classes.max() / counts_of_classes.sum())


def with_share(results: Iterable[Result], labels: np.ndarray) -> list[Result]:
    """Fits of one target, the diverged ones with the `majority_share` of its test labels, int [items].

    Where the metric is not accuracy, what they count with stands in their results since they were trained.

    >>> [fit] = with_share([Result(name="a", target="b", strategy="c", seed=0, diverged=True)], np.array([0, 1, 1, 1]))
    >>> fit.majority_share
    0.75
    """
    every = list(results)
    of_classes = len(labels) and any(result.metric is None for result in every)
    share = majority_share(labels) if of_classes else None
    return [
        replace(result, majority_share=share) if result.diverged and result.metric is None else result
        for result in every
    ]


def counted_score(result: Result) -> float | None:
    """The score that a fit counts with: its own on the test set, or of a diverged fit its `majority_share`.

    A fit that diverged answers nothing, and a strategy that diverges now and then is the worse for it: its failures
    are not missing at random, so they are not left out. None where it is not known.

    >>> fit = Result(name="a", target="b", strategy="full", seed=0, test_accuracy=0.9)
    >>> counted_score(fit), counted_score(replace(fit, test_accuracy=None, diverged=True, majority_share=0.1))
    (0.9, 0.1)
    """
    value = result.majority_share if result.diverged else of_results.score(result)
    return value if finite(value) else None


def score_of_curve(result: Result) -> float | None:
    """The score of a fit's end on the examples that its learning curve is of, and otherwise as `counted_score`.

    These are the validation split where there is one, else the test set.

    >>> fit = Result(name="a", target="b", strategy="full", seed=0, test_accuracy=0.9)
    >>> score_of_curve(fit), score_of_curve(replace(fit, validation_accuracy=0.8))
    (0.9, 0.8)
    """
    value = None if result.diverged else of_results.validation_score(result)
    return value if finite(value) else counted_score(result)


def counts(result: Result) -> bool:
    """Whether a fit enters means: it has a score to count with."""
    return counted_score(result) is not None


def ended(result: Result) -> bool:
    """Whether a fit did not diverge and was measured, so that it has a loss, a confusion and a curve to its end."""
    return not result.diverged and counts(result)


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
    """The mean of what is finite; None where nothing is."""
    means = spread(values)
    return means[0] if means else None


def listed(names: Iterable[Any]) -> str:
    """The different names, as 'a, b and c'."""
    unique = list(dict.fromkeys(map(str, names)))
    return " and ".join(part for part in (", ".join(unique[:-1]), *unique[-1:]) if part)


def _aggregate(members: Sequence[Result], scratch: Sequence[Result]) -> Summary:
    """The summary of fits that differ in their seed alone; gains are above the fits from `scratch`."""
    first = members[0]
    counted = [result for result in members if counts(result)]
    survivors = [result for result in counted if ended(result)]
    gains = [] if first.strategy == "scratch" else _gains(counted, scratch)
    return Summary(
        name=label(first),
        members=members,
        target=first.target,
        source=first.source,
        strategy=label(first),
        train_examples=first.train_examples,
        seeds=len(members),
        diverged=sum(result.diverged for result in members),
        counted=len(counted),
        counts_as=next((counted_score(result) for result in members if result.diverged), None),
        metric=of_results.metric(first),
        score=spread(counted_score(result) for result in counted),
        gain=spread(gains),
        gain_seeds=len(gains),
        test_loss=spread(result.test_loss for result in survivors),
        calibration_error=spread(result.calibration_error for result in survivors),
        trained_parameters=first.trained_parameters,
        total_parameters=first.total_parameters,
        leaves=first.leaves,
        steps=mean(result.steps for result in counted),
        seconds=mean(result.seconds for result in counted),
        retention=spread(result.retention for result in counted),
        retention_metric=units.from_record(first.retention_metric),
        peak_bytes=max((result.peak_bytes for result in members if result.peak_bytes is not None), default=None),
    )


def _gains(counted: Sequence[Result], scratch: Sequence[Result]) -> list[float]:
    """How much better than the fit from scratch of the same target, budget and seed, where there is one; in points, or
    the metric's unit."""
    baseline = {_pair(result): value for result in scratch if (value := counted_score(result)) is not None}
    values = [(_pair(result), counted_score(result), of_results.metric(result)) for result in counted]
    return [
        units.factor(metric) * units.better_by(metric, value, baseline[pair])
        for pair, value, metric in values
        if value is not None and pair in baseline
    ]


def _pair(result: Result) -> tuple[str, int, Replicate]:
    """What a fit and the fit from scratch beside it have in common."""
    return result.target, result.train_examples, replicate(result)
