"""How the fits of a run are judged, and what verdicts of them speak of.

The flags of judging (`Judging`) are those of experiments.compare and, where no run was judged before, of
experiments.report. What verdicts speak of follows from which streams differ with the seed and which are one for all
seeds (`Variation`): a verdict of fits whose labels are one draw says nothing of another draw.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from experiments.runs import budgets, command_line, plan, predictions, sources
from experiments.runs.command_line import flag
from experiments.runs.plan import Experiment
from experiments.runs.predictions import Predictions
from experiments.runs.settings import Settings
from tljax import plugins
from tljax.study import units
from tljax.study.results import Result
from tljax.study.verdicts import Comparison, Right, compared, require_family
from tljax.types import InputError, Metric, Task


@dataclass(frozen=True)
class Judging:
    """How fits are judged."""

    margin: float | None = flag(
        None,
        "the difference below which none matters, in points where the metric is in % (as accuracy is), else in the "
        f"metric's unit; default {units.MARGIN_OF_FRACTIONS:g} points, {units.MARGIN:g} of another unit",
    )
    level: float = flag(0.95, "of all intervals and verdicts together, a fraction")
    family: str = flag(
        "area",
        "what is judged: area under the budget curve of each strategy, budgets (each of them, all intervals together), "
        "or one of them alone, as 5/class",
    )
    looks: int = flag(1, "how often the results are to be looked at while seeds are added")
    against: str = flag("scratch", "the strategy that the others are compared with")
    verdict_on: str = flag(
        "target",
        "what verdicts are on: target, or retention (the source's test set, under the source's own head)",
        choices=("target", "retention"),
        neutral="target",
    )
    primary_family: tuple[str, ...] = flag(
        (),
        "the strategies whose verdicts hold together at --level, named before the run; those outside are judged apart, "
        "as exploratory; default all",
        neutral=(),
    )
    until: str | None = flag(
        None,
        "decided: seeds are added, up to --most, until every verdict is decided; intervals hold at any number of seeds",
        neutral="",
    )
    end: str = "last"
    """Which parameters of the fits are judged, as --verdict_of of their run says; no flag, but a part of the record."""


def require_valid(judging: Judging) -> None:
    """Raise InputError for values by which nothing can be judged."""
    if judging.margin is not None and not 0 < judging.margin < math.inf:
        raise InputError(f"--margin={judging.margin:g}: {_MARGIN}")
    if not 0.5 <= judging.level < 1:
        raise InputError(f"--level={judging.level:g}: give 0.5 or more, below 1")
    if judging.looks < 1:
        raise InputError(f"--looks={judging.looks}: give 1 or more")
    if not budgets.is_budget(judging.family):
        require_family(judging.family)
    if judging.until not in (None, "decided"):
        raise InputError(f"--until={judging.until}: give decided, or leave it out")
    if judging.until and judging.looks > 1:
        raise InputError(
            f"--looks={judging.looks} with --until=decided: leave --looks out, since every look is allowed"
        )
    if judging.verdict_on not in ON:
        raise InputError(f"--verdict_on={judging.verdict_on}: give {' or '.join(ON)}")
    if judging.verdict_on == "retention" and judging.against == "scratch":
        raise InputError(
            "--verdict_on=retention: what is kept of the source is not defined for scratch, which had none: name the "
            "strategy that others are compared with, such as --against=full"
        )


_MARGIN = "give points above 0 and below 100, or a number above 0 in the unit of a metric that is not in %"
AnyJudging = TypeVar("AnyJudging", bound=Judging)
ON = ("target", "retention")
"""What verdicts can be on."""


def with_margin(judging: AnyJudging, metrics: Collection[Metric]) -> AnyJudging:
    """Judging with the margin of these metrics, where it is one for all; else it stays None.

    Raises InputError for a margin that is not below 100 points, and for one that is given for several units.

    >>> with_margin(Judging(), [units.ACCURACY]).margin, with_margin(Judging(), [Metric("x", "nats")]).margin
    (0.5, 0.01)
    """
    of_units = {units.of_differences(metric): units.default_margin(metric) for metric in metrics}
    if judging.margin is None:
        return replace(judging, margin=next(iter(of_units.values()))) if len(of_units) == 1 else judging
    if len(of_units) > 1:
        kinds = " and ".join(unit or "no unit" for unit in of_units)
        raise InputError(
            f"--margin={judging.margin:g} is one number, and the metrics of the targets are in {kinds}: leave --margin "
            "out, or compare the targets one by one"
        )
    if "points" in of_units and judging.margin >= 100:
        raise InputError(f"--margin={judging.margin:g}: {_MARGIN}")
    return judging


def with_family(judging: AnyJudging, targets: Collection[Task], train_examples: Collection[str]) -> AnyJudging:
    """Judging with the number of labels of a family that is one label budget, such as 5/class; else as it is.

    Raises InputError where none of `train_examples` is that budget, and where it is of several numbers of labels.
    """
    if not budgets.is_budget(judging.family):
        return judging
    numbers = {budgets.total(judging.family, target): target.name for target in targets}
    if len(numbers) > 1:
        texts = " and ".join(f"{number:,} labels of {name}" for number, name in numbers.items())
        raise InputError(f"--family={judging.family} is {texts}: compare the targets one by one")
    [number] = numbers
    if not any(budgets.total(text, target) == number for text in train_examples for target in targets):
        raise InputError(f"--family={judging.family} is none of --train_examples={','.join(train_examples)}")
    return replace(judging, family=str(number))


def with_primary_family(judging: AnyJudging, strategies: Mapping[str, str]) -> AnyJudging:
    """Judging with the labels of the strategies in --primary_family, of {strategy as --strategies has it: its label}.

    Raises InputError for a name that is none of these, and for what the others are compared with.

    >>> with_primary_family(Judging(primary_family=("full",)), {"full": "full"}).primary_family
    ('full',)
    """
    labels = set(strategies.values())
    for name in judging.primary_family:
        if strategies.get(name, name) not in labels:
            raise InputError(f"--primary_family={name} is none of --strategies{plugins.nearest(name, strategies)}")
        if strategies.get(name, name) == judging.against:
            raise InputError(f"--primary_family={name} is what the others are compared with: name those others")
    return replace(judging, primary_family=tuple(strategies.get(name, name) for name in judging.primary_family))


def margins(judging: Judging, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """{test set: the margin in what its metric is measured in}, of {test set: metric}."""
    return {
        name: (units.default_margin(metric) if judging.margin is None else judging.margin) / units.factor(metric)
        for name, metric in metrics.items()
    }


def of_test_sets(parts: Sequence[Predictions], judging: Judging) -> dict[str, Any]:
    """What `verdicts.compared` and `verdicts.conditions_of` take of the test sets, beside scores and margins."""
    on = judging.verdict_on
    about = {"groups": predictions.all_groups(parts, on), "metrics": predictions.metrics_of(parts, on)}
    return {**about, "on": "source" if on == "retention" else "target", "sequence": bool(judging.until)}


def judged(
    parts: Sequence[Predictions], judging: Judging, table: Right | None = None
) -> tuple[list[Comparison], list[Comparison]]:
    """(the family with its verdicts, the comparisons without) of fits, as `verdicts.compared` gives them.

    `table` has their scores, if they are known already.
    """
    table = predictions.right(parts, judging.verdict_on) if table is None else table
    test_sets = of_test_sets(parts, judging)
    return compared(
        predictions.without_longer(table),
        margins(judging, test_sets["metrics"]),
        judging.level,
        judging.family,
        judging.against,
        looks=judging.looks,
        primary=judging.primary_family,
        **test_sets,
    )


def to_record(judging: Judging) -> dict[str, Any]:
    """{field of `Judging`: value}, without what else a program's flags hold, and without neutral values."""
    flags = command_line.fields(Judging)
    values = {f.name: (getattr(judging, f.name), f.metadata["neutral"]) for f in flags}
    record = {
        name: value for name, (value, neutral) in values.items() if neutral is None or value not in (None, neutral)
    }
    record = {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
    return record if judging.end == "last" else {**record, "verdict_of": judging.end}


def from_record(record: Mapping[str, Any]) -> Judging:
    """The judging of such a record; what it does not say is at its default.

    >>> from_record(to_record(Judging(margin=1.0, end="best"))) == Judging(margin=1.0, end="best")
    True
    """
    values = {name: value for name, value in record.items() if name != "verdict_of"}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Judging(**values, end=record.get("verdict_of", "last"))


def end_notes(end: str) -> list[str]:
    """What every table must say of the parameters that its numbers are of; nothing where these are the last."""
    words = {
        "best": "the best step by validation of each fit",
        "average": "the average of what trained (--ema) of each fit",
    }
    named = f"'{end}', which the strategies' finish gave, and of the last step where there is no finish"
    return [] if end == "last" else [f"test results and verdicts are of {words.get(end, named)}"]


class Variation(NamedTuple):
    """What differs between the fits of one source and target."""

    source: str | None
    sources: int | None
    """How many different trained sources there are; None if that is not known."""
    seeds: int
    pinned: tuple[str, ...]
    """Those of the streams head, order and draw that are one for all seeds."""
    whole: tuple[str, ...]
    """Label budgets that are all the training examples there are."""


_PINNED = {
    "head": "what is drawn anew (a new head, and all of scratch) is one draw, which --head_seed pins: the verdicts "
    "speak of that draw",
    "order": "the order of the examples is one, which --order_seed pins: the verdicts speak of that order",
    "draw": "the labels are one draw, which --draw_seed pins: the verdicts speak of that training set",
}
"""{stream: the note where it is pinned}."""


def variation(experiment: Experiment) -> Variation:
    """What differs between the fits of an experiment."""
    settings, source = experiment.settings, experiment.source
    whole = budgets.whole(settings.train_examples, experiment.target)
    different = None
    if source:
        # A source that is trained here follows from its stream; what it is identified by holds the seed too.
        different = _streams(settings) if settings.source else len({source.identity[seed] for seed in settings.seeds})
    pinned = tuple(stream for stream in _pinned(settings) if stream != "draw" or experiment.draw is None)
    return Variation(source.name if source else None, different, len(settings.seeds), pinned, whole)


def variation_by_flags(settings: Settings, rows: Sequence[Result] = ()) -> Variation:
    """What differs between fits as far as flags and a source's checkpoint tell.

    How many sources it holds is not known where it cannot be read, or has others by now than these results are of.
    """
    whole = tuple(budget for budget in settings.train_examples if budget.split(":")[0] == "all")
    different = _streams(settings) if settings.source else _in_checkpoint(settings, rows)
    source = settings.source or settings.source_checkpoint
    return Variation(source, different, len(settings.seeds), _pinned(settings), whole)


def _in_checkpoint(settings: Settings, rows: Sequence[Result]) -> int | None:
    """How many different sources the seeds have in --source_checkpoint; None if that is not known."""
    transferred = [row for row in rows if row.source is not None and row.strategy not in ("scratch", "pretrain")]
    if not settings.source_checkpoint or not transferred:
        return None
    try:
        source = sources.from_checkpoint(settings, trains=False)
    except (InputError, OSError):
        return None
    alike = all(
        row.seed in source.trained and row.source_accuracy == source.trained[row.seed].score for row in transferred
    )
    return len({source.identity[row.seed] for row in transferred}) if alike else None


def _streams(settings: Settings) -> int:
    """How many different streams of the source the seeds have."""
    return len({plan.streams(settings, seed).source for seed in settings.seeds})


def _pinned(settings: Settings) -> tuple[str, ...]:
    return tuple(stream for stream in _PINNED if getattr(settings, f"{stream}_seed") is not None)


def spoken_of(variations: Sequence[Variation]) -> list[str]:
    """What verdicts of these fits speak of, each sentence once; a source is named where others differ from it."""
    by_source = {each.source: _of_source(each) for each in variations if each.source is not None}
    alike = len(set(by_source.values())) == 1
    sentences = dict.fromkeys(text if alike else f"{source}: {text}" for source, text in by_source.items())
    sentences |= dict.fromkeys(_PINNED[stream] for each in variations for stream in each.pinned)
    drawn = [each for each in variations if "draw" not in each.pinned]
    whole = dict.fromkeys(budget.split(":")[0] for each in drawn for budget in each.whole)
    one_set = (
        "which is every training example, no draw varies: what is said there, and in an area as far as that is of it, "
        "is of this one training set"
    )
    sentences |= dict.fromkeys(f"at {budget}, {one_set}" for budget in whole)
    return list(sentences)


def _of_source(varied: Variation) -> str:
    if varied.sources is None:
        return "how many different sources these fits start from is not known here"
    if varied.sources == 1:
        return "the verdicts speak of this one trained source"
    if varied.sources == varied.seeds:
        return "sources are trained anew with each seed, so the verdicts speak of the way of pretraining"
    return f"{varied.sources} trained sources serve {varied.seeds} seeds, so the verdicts speak of these sources"


def require_variation(experiment: Experiment) -> None:
    """Raise InputError where several seeds would give one fit again and again, from which nothing follows."""
    settings, varied = experiment.settings, variation(experiment)
    one_draw = "draw" in varied.pinned or (
        len(varied.whole) == len(settings.train_examples) and not settings.recipe.validation
    )
    if varied.seeds > 1 and one_draw and {"head", "order"} <= set(varied.pinned) and varied.sources in (None, 1):
        flags = ", ".join(
            f"--{name}_seed" for name in ("source", *varied.pinned) if name != "source" or settings.source
        )
        raise InputError(
            f"{flags} leave nothing that --seeds could vary: every fit would be the same; unpin one of them"
        )
