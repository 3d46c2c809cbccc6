"""A fit as it is known once it has been trained: what it was, what it measured, and where its files lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from tljax.study import units
from tljax.study.units import ACCURACY
from tljax.types import END_NAMES, InputError, Metric


@dataclass(frozen=True, kw_only=True)
class Result:
    """One fit. A line of results.jsonl is one as JSON, with the names of the fields in their order.

    Accuracies, shares and calibration errors are fractions, losses are in nats. What is None is not known: of a fit
    that is still to be trained all that training gives, of one that diverged its accuracies and losses, of one that was
    made elsewhere whatever its table does not say.
    """

    name: str
    """Strategy, label budget and seed, with the first eight digits of the key: unlike any other in a run directory."""
    key: str = ""
    """SHA-256 of all that decides the fit's bits."""
    recipe: str | None = None
    """A digest of all but the seed that decides them: fits of two recipes do not belong in one mean."""
    source: str | None = None
    """The data set that its source was trained on; None from scratch."""
    target: str
    """The data set that it was trained on."""
    strategy: str
    """The name of the strategy; scratch and pretrain are not transferred."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the strategy."""
    seed: int
    draw: int | None = None
    """The draw of labels, where draws are crossed with seeds; None where the seed draws them."""
    train_examples: int = 0
    """The label budget, as a number of examples; 0 where it is not known."""
    spec: str | None = None
    """The strategy as a flag has it, where it was given a name of its own."""
    source_accuracy: float | None = None
    """The source's own test accuracy; where `source_metric` says another metric, that."""
    steps: int | None = None
    phase_steps: Sequence[int] = ()
    """The steps before which its phases begin."""
    trained_parameters: int | None = None
    """How many numbers train in the phase that trains most."""
    total_parameters: int | None = None
    leaves: Sequence[tuple[str, int, int]] | None = None
    """(path, how many numbers, how many of them train) of each leaf, in that phase."""
    test_accuracy: float | None = None
    test_loss: float | None = None
    calibration_error: float | None = None
    """The expected calibration error on the test set."""
    calibration: Mapping[str, Sequence[Any]] | None = None
    """Of each bin of `evaluate.calibration`, on the test set: confidence, accuracy and count."""
    per_class_accuracy: Sequence[float | None] | None = None
    confusion: Sequence[Sequence[int]] | None = None
    """[true class, predicted class]: how many test examples."""
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    train_loss: float | None = None
    """The mean over the last segment, as is the penalty."""
    train_penalty: float | None = None
    penalties: Mapping[str, float | None] = field(default_factory=dict)
    """{number and name of a penalty's term: its part of the penalty}; in JSON train_penalty_0_l2 and so on."""
    best_step: int | None = None
    """The point of the curve with the best validation accuracy."""
    best_validation_accuracy: float | None = None
    train_total: float | None = None
    """Loss and penalty together."""
    diverged: bool = False
    diverged_step: int | None = None
    """The first step that was not finite."""
    seconds: float | None = None
    """What its training took, without compilation of what others share; no part of the line's digest."""
    checkpoint: str = ""
    """Its place in the run directory, as are the next."""
    predictions: str = ""
    predictions_sha256: str | None = None
    masks_sha256: str | None = None
    """One digest of the masks of all phases."""
    metric: Mapping[str, Any] | None = None
    """What it was measured by, where that is not accuracy: {"name", "unit", "larger_is_better"}, as `Metric` has them.
    The four that follow are known then alone, and accuracies are None; `score` gives the one or the other."""
    test_score: float | None = None
    """The metric on the test set, as it is: of a metric in % a fraction."""
    validation_score: float | None = None
    best_validation_score: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """{name of a further metric: its value on the test set}."""
    source_metric: Mapping[str, Any] | None = None
    """What the source was measured by, where that is not accuracy, as `metric` has it."""
    began: Sequence[int] | None = None
    """The steps at which its phases began, where validation decided that: `phase_steps` are the latest then."""
    stopped_step: int | None = None
    """The step after which nothing trained any more, as the last phase was over."""
    ends: Mapping[str, Mapping[str, Any]] | None = None
    """{name: fields of this record} of what else it ended with, and was asked for: 'best', the 'average', what its
    strategy's `finish` gave; each has "step", its measures, and the place and SHA-256 of its predictions."""

    majority_share: float | None = None
    """Of a fit that diverged, what it counts with: the share of the most frequent test class; where the metric is not
    accuracy, the metric of the best constant answer. This and what follows is added for a report, and stands in
    study.json and fits.csv alone."""
    end: str | None = None
    """What of `ends` its measures and predictions are of; None for the last step."""
    evals: Mapping[str, float | None] | None = None
    """{further test set: accuracy on it}."""
    retention: float | None = None
    """The source's metric on the source's test set, with the source's head put back."""
    retention_metric: Mapping[str, Any] | None = None
    """That metric, as `metric` has it; None is accuracy."""
    retention_scores: str | None = None
    """Where the scores of the source's test examples lie in the run directory, and their SHA-256."""
    retention_sha256: str | None = None
    start_accuracy: float | None = None
    """Test accuracy before the first step, where the head is not drawn anew."""
    step_flops: float | None = None
    """FLOPs of a step, a mean over all."""
    peak_bytes: int | None = None
    """The most memory that its training program took on a device, with all fits of its group: see `train.Cost`. It goes
    with the devices, and is no part of the line's digest."""
    source_steps: int | None = None
    """What the training of its source took, as far as that is known."""
    source_flops: float | None = None
    source_seconds: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else a record says, such as a column of a table of fits made elsewhere."""
    record: tuple[str, ...] = ()
    """The names of the record that it was read from, in their order, so that it is written as it was."""


_ADDED = (
    *("majority_share", "end", "evals", "retention", "retention_metric", "retention_scores", "retention_sha256"),
    "start_accuracy",
    *("step_flops", "peak_bytes", "source_steps", "source_flops", "source_seconds"),
)
_OF_METRIC = ("metric", "test_score", "validation_score", "best_validation_score")
_PENALTY = "train_penalty_"
_NAMES = frozenset(f.name for f in fields(Result)) - {"penalties", "more", "record"}
_BARE = Result(name="", target="", strategy="", seed=0)


def from_json(record: Mapping[str, Any]) -> Result:
    """The fit of a record, such as a line of results.jsonl; also of an older tljax's, which said less.

    >>> fit = from_json({"name": "a", "target": "b", "strategy": "full", "seed": 0, "train_penalty_0_l2": 0.5})
    >>> fit.strategy, fit.penalties
    ('full', {'0_l2': 0.5})
    """
    penalties = {name.removeprefix(_PENALTY): value for name, value in record.items() if name.startswith(_PENALTY)}
    known = {name: value for name, value in record.items() if name in _NAMES}
    more = {name: record[name] for name in record if name not in _NAMES and not name.startswith(_PENALTY)}
    return Result(**known, penalties=penalties, more=more, record=tuple(record))


def to_json(result: Result) -> dict[str, Any]:
    """The record of a fit: that of `from_json` again, with what was added since; or that of a fit just trained.

    >>> record = {"strategy": "full", "name": "a", "seed": 0, "target": "b", "test_accuracy": None}
    >>> to_json(from_json(record)) == record, list(to_json(from_json(record))) == list(record)
    (True, True)
    """
    values: dict[str, Any] = {}
    for f in fields(result):
        if f.name == "penalties":
            values |= {_PENALTY + name: value for name, value in result.penalties.items()}
        elif f.name == "more":
            values |= result.more
        elif f.name != "record" and not (
            f.name in _OF_METRIC and result.metric is None and f.name not in result.record
        ):
            values[f.name] = getattr(result, f.name)
    if result.record:
        new = (name for name in values if name not in result.record and values[name] != getattr(_BARE, name, None))
        return {name: values[name] for name in (*result.record, *new)}
    optional = {
        *_ADDED,
        *_OF_METRIC,
        "source_metric",
        "spec",
        "draw",
        "began",
        "stopped_step",
        "ends",
        *(["source_accuracy"] if result.strategy == "pretrain" else []),
    }
    if not result.metrics:
        del values["metrics"]
    return {name: value for name, value in values.items() if value is not None or name not in optional}


class SeedAndDraw(NamedTuple):
    """A seed of source, head and order, and a draw of labels that is crossed with it."""

    seed: int
    draw: int


Replicate = int | SeedAndDraw
"""What tells the fits of one cell apart: the seed, or where draws of labels are crossed with seeds both."""


def replicate(result: Result) -> Replicate:
    """What tells a fit from the others of its cell, and pairs it with fits of other cells.

    >>> values = {"name": "a", "target": "b", "strategy": "full", "seed": 3}
    >>> replicate(Result(**values)), replicate(Result(**values, draw=1))
    (3, SeedAndDraw(seed=3, draw=1))
    """
    return result.seed if result.draw is None else SeedAndDraw(result.seed, result.draw)


def metric(result: Result) -> Metric:
    """The primary metric of a fit: what verdicts of it are of.

    >>> metric(Result(name="a", target="b", strategy="full", seed=0)) == ACCURACY
    True
    """
    return ACCURACY if result.metric is None else units.from_record(result.metric)


def score(result: Result) -> float | None:
    """The primary metric of a fit on the test set; None where it is not known, as of a fit that diverged.

    >>> values = {"name": "a", "target": "b", "strategy": "full", "seed": 0}
    >>> score(Result(**values, test_accuracy=0.9))
    0.9
    >>> nats = {"name": "cross_entropy", "unit": "nats", "larger_is_better": False}
    >>> score(Result(**values, metric=nats, test_score=1.5))
    1.5
    """
    return result.test_accuracy if result.metric is None else result.test_score


def validation_score(result: Result) -> float | None:
    """The same on the validation split."""
    return result.validation_accuracy if result.metric is None else result.validation_score


def at_end(result: Result, name: str) -> Result:
    """A fit with the measures and predictions of one of its ends.

    A fit that diverged stays as it is, and so does one without any end that a `finish` gave, where `name` is such a
    one. Raises InputError for an end that the fit does not have.

    >>> best = {"step": 3, "test_accuracy": 0.9, "predictions": "predictions/a.best.npz"}
    >>> fit = Result(name="a", target="b", strategy="full", seed=0, test_accuracy=0.8, ends={"best": best})
    >>> at_end(fit, "best").test_accuracy, at_end(fit, "best").end, at_end(fit, "alpha_0.5").test_accuracy
    (0.9, 'best', 0.8)
    """
    ends = result.ends or {}
    if name == "last" or result.diverged or result.end == name:
        return result
    if name not in ends:
        if name not in END_NAMES and not {*ends} - {*END_NAMES}:
            return result
        raise InputError(f"'{result.name}' has no end '{name}' to be judged by: it has {', '.join(['last', *ends])}")
    values = {field: value for field, value in ends[name].items() if field != "step"}
    return replace(result, **values, end=name)


def tree_of(result: Result) -> str:
    """The name, in its checkpoint, of the parameters that a fit's measures are of."""
    return f"{result.name}.{result.end}" if result.end else result.name


def extended(result: Result, values: Mapping[str, Any]) -> Result:
    """A fit with more fields, each of which its record has from now on, even where it is None.

    >>> fit = from_json({"name": "a", "target": "b", "strategy": "full", "seed": 0})
    >>> to_json(extended(fit, {"source_flops": None}))
    {'name': 'a', 'target': 'b', 'strategy': 'full', 'seed': 0, 'source_flops': None}
    """
    return replace(result, **values, record=tuple(dict.fromkeys([*to_json(result), *values])))
