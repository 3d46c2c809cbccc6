"""How transfer shows while a model learns: the measures of Taylor and Stone, and what they cost.

Source: Taylor and Stone 2009, "Transfer learning for reinforcement learning domains: a survey", JMLR 10, section 2.3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tljax.study import results as of_results
from tljax.study import units
from tljax.study.results import Result
from tljax.study.summary import Curves, along, counted_score, counts, groups, label, mean, score_of_curve


def milestones(results: Sequence[Result], curves: Curves) -> list[dict[str, Any]]:
    """A row for each source, target, strategy and budget, scratch among them; accuracies are fractions.

    Where a metric is not accuracy, that metric stands in its place, as it is measured; less is then reached from above
    where less is better. jump_start: accuracy before the first step less that of scratch drawn anew (chance,
    1/classes), 'not defined' where the head is drawn anew, or there are no classes; asymptote: mean accuracy at the
    end; time_to_threshold: steps until what scratch ends with in the mean at this budget is reached, a median over
    fits, '>600' where half of them or more never do; area: mean accuracy over the steps; examples_saved: labels that
    scratch needs for the strategy's asymptote, less those it had; flops and seconds: of training until the threshold,
    and with the source's training added. Asymptote and examples saved are of the test set; area and threshold of what
    learning curves are of, which is the validation split where there is one. A diverged fit has the accuracy that
    `summary.counted_score` says from where it diverged, and reaches no threshold.
    """
    rows = []
    fits = [fit for fit in results if fit.strategy != "pretrain"]
    reached, base = thresholds(fits), _of_scratch(fits, counted_score)
    for group in groups(fits):
        members = [fit for fit in group if counts(fit)]
        if members:
            where = members[0].target, members[0].train_examples
            rows.append(_milestone(members, curves, reached.get(where), _at_budgets(base, where[0])))
    return rows


def thresholds(results: Sequence[Result]) -> dict[tuple[str, int], float | None]:
    """{(target, labels): scratch's mean end, turned so that more is better}: what the curves of others are to reach.

    It is of the examples that curves are of: a threshold of the test set means nothing to a curve of another set.
    """
    return _of_scratch([fit for fit in results if fit.strategy != "pretrain"], score_of_curve)


def _of_scratch(fits: Sequence[Result], score: Callable[[Result], float | None]) -> dict[tuple[str, int], float | None]:
    """{(target, labels): the mean score of scratch there, turned so that more is better}."""
    return {
        (group[0].target, group[0].train_examples): mean(_turned(fit, score) for fit in group)
        for group in groups(fits)
        if label(group[0]) == "scratch"
    }


def _turned(fit: Result, score: Callable[[Result], float | None]) -> float | None:
    """A score of a fit, turned so that more is better."""
    value = score(fit)
    return None if value is None else units.sign(of_results.metric(fit)) * value


def _at_budgets(base: Mapping[tuple[str, int], float | None], target: str) -> list[tuple[int, float]]:
    """(labels, score, turned) of scratch on one target, labels ascending."""
    return sorted((budget, value) for (name, budget), value in base.items() if name == target and value is not None)


def _milestone(
    members: Sequence[Result], curves: Curves, threshold: float | None, scratch: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """The row of one strategy and budget; `threshold` is of scratch's curves, `scratch` is (labels, score) of its ends.

    Both are turned so that more is better.
    """
    first = members[0]
    sign, asymptote = units.sign(of_results.metric(first)), mean(_turned(fit, counted_score) for fit in members)
    with_curves = [fit for fit in members if fit.name in curves]
    times = [] if threshold is None else [time_of(fit, curves, threshold) for fit in with_curves]
    steps = float(np.median(times)) if times else None
    per_step = mean(fit.step_flops for fit in members)
    seconds = None if steps is None else _per_step(members) * steps
    flops = None if steps is None or per_step is None else per_step * steps
    start = mean(fit.start_accuracy for fit in members)
    classes = len(first.per_class_accuracy) if first.per_class_accuracy else None
    return {
        "source": first.source,
        "target": first.target,
        "strategy": label(first),
        "train_examples": first.train_examples,
        "jump_start": "not defined" if start is None or classes is None else start - 1 / classes,
        "asymptote": None if asymptote is None else sign * asymptote,
        "time_to_threshold": f">{first.steps}" if steps == np.inf else steps,
        "area": mean(area for fit in members if (area := area_of(fit, curves)) is not None),
        "examples_saved": None if label(first) == "scratch" else saved(scratch, first.train_examples, asymptote),
        "flops": flops,
        "flops_with_source": _plus(flops, mean(fit.source_flops for fit in members)),
        "seconds": seconds,
        "seconds_with_source": _plus(seconds, mean(fit.source_seconds for fit in members)),
    }


def time_to(curve: Mapping[str, Any], threshold: float, sign: int = 1) -> float:
    """The first recorded step whose accuracy (or other metric) is `threshold` or more; infinite where none is.

    >>> time_to({"step": [10, 20, 30], "accuracy": [0.5, 0.7, 0.8]}, 0.6)
    20.0

    With a `sign` of -1 less is better, and the threshold is turned.
    """
    reached = sign * along(curve) >= threshold
    return float(np.asarray(curve["step"])[reached.argmax()]) if reached.any() else np.inf


def time_of(fit: Result, curves: Curves, threshold: float) -> float:
    """The step at which a fit reaches the threshold; infinite where it never does, or diverged."""
    return np.inf if fit.diverged else time_to(curves[fit.name], threshold, units.sign(of_results.metric(fit)))


def saved(scratch: Sequence[tuple[int, float]], budget: int, accuracy: float | None) -> float | str | None:
    """Labels that scratch needs for `accuracy`, less `budget`: between its budgets linear in the logarithm.

    `scratch` is (labels, accuracy), labels ascending. Text such as '>900' where scratch stays below it with all the
    labels there are, '<-9' where it is above it with the fewest; None where there are not two budgets.

    >>> round(saved([(10, 0.2), (100, 0.4), (1000, 0.6)], 10, 0.4), 6)
    90.0
    """
    if accuracy is None or len(scratch) < 2:
        return None
    budgets = np.log([budget for budget, _ in scratch])
    reached = np.maximum.accumulate([value for _, value in scratch])  # more labels never count as worse
    if accuracy > reached[-1]:
        return f">{scratch[-1][0] - budget}"
    if accuracy < reached[0]:
        return f"<{scratch[0][0] - budget}"
    at = int(np.searchsorted(reached, accuracy))
    if at == 0:
        return float(scratch[0][0] - budget)
    share = (accuracy - reached[at - 1]) / (reached[at] - reached[at - 1])
    return float(np.exp(budgets[at - 1] + share * (budgets[at] - budgets[at - 1])) - budget)


def area_of(fit: Result, curves: Curves) -> float | None:
    """Mean accuracy (or other metric) of one fit over the steps; None where it has no curve."""
    if fit.name not in curves:
        return None
    steps, values = np.asarray(curves[fit.name]["step"], float), along(curves[fit.name])
    share = counted_score(fit)
    if fit.diverged and share is not None:
        values = np.where(np.isfinite(values), values, share)
    width = steps[-1] - steps[0]
    return float(np.trapezoid(values, steps) / width if width > 0 else values[-1])


def _per_step(members: Sequence[Result]) -> float:
    """Seconds of training for a step, a mean over fits."""
    return float(np.mean([fit.seconds / max(fit.steps or 1, 1) for fit in members if fit.seconds is not None]))


def _plus(target: float | None, source: float | None) -> float | None:
    """A cost with the source's; None where one of both is not known."""
    return None if target is None or source is None else target + source
