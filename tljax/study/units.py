"""The names and units of metrics, as tables, captions and sentences have them.

A metric whose unit is '%' is a fraction that is shown a hundredfold, and its differences are in points. Any other is
shown as it is, and its differences are in its own unit. Differences are turned: positive is always better.
"""

from collections.abc import Mapping
from typing import Any

from tljax.types import Metric

ACCURACY = Metric("accuracy")
"""The share of test examples that are classified right."""

MARGIN_OF_FRACTIONS, MARGIN = 0.5, 0.01
"""The default margins: in points, of a metric in '%', and in its own unit, of any other."""


def to_record(metric: Metric) -> dict[str, Any] | None:
    """What a line of results says of its metric: None for accuracy.

    >>> to_record(ACCURACY), to_record(Metric("mae", "years", larger_is_better=False))
    (None, {'name': 'mae', 'unit': 'years', 'larger_is_better': False})
    """
    if metric.name == ACCURACY.name:
        return None
    return {"name": metric.name, "unit": metric.unit, "larger_is_better": metric.larger_is_better}


def from_record(record: Mapping[str, Any] | None) -> Metric:
    """The metric of such a record.

    >>> from_record(None) == ACCURACY, from_record({"name": "mae", "unit": "years", "larger_is_better": False}).unit
    (True, 'years')
    """
    return ACCURACY if record is None else Metric(record["name"], record["unit"], record["larger_is_better"])


def spoken(metric: Metric) -> str:
    """The name of a metric in a sentence.

    >>> spoken(Metric("balanced_accuracy"))
    'balanced accuracy'
    """
    return metric.name.replace("_", " ")


def factor(metric: Metric) -> float:
    """How many times its value a metric is shown as: 100 for fractions.

    >>> factor(ACCURACY), factor(Metric("mae", "years"))
    (100.0, 1.0)
    """
    return 100.0 if metric.unit == "%" else 1.0


def sign(metric: Metric) -> int:
    """1 where larger is better, else -1: what a difference is multiplied by, so that positive is better.

    >>> sign(ACCURACY), sign(Metric("mae", "years", larger_is_better=False))
    (1, -1)
    """
    return 1 if metric.larger_is_better else -1


def better_by(metric: Metric, value: float, other: float) -> float:
    """By how much a value is better than another; negative where it is worse.

    >>> better_by(ACCURACY, 0.75, 0.5), better_by(Metric("mae", "years", larger_is_better=False), 3.0, 3.0)
    (0.25, 0.0)
    """
    return value - other if metric.larger_is_better else other - value


def digits(metric: Metric) -> int:
    """How many decimals its values are shown with."""
    return 2 if metric.unit == "%" else 4


def shown(metric: Metric, value: float) -> str:
    """A value without its unit.

    >>> shown(ACCURACY, 0.91234), shown(Metric("cross_entropy", "nats", False), 1.23456)
    ('91.23', '1.2346')
    """
    return f"{factor(metric) * value:.{digits(metric)}f}"


def with_unit(metric: Metric, value: float) -> str:
    """A value with its unit.

    >>> with_unit(ACCURACY, 0.5), with_unit(Metric("r_squared", ""), 0.5)
    ('50.00 %', '0.5000')
    """
    return " ".join(filter(None, (shown(metric, value), metric.unit)))


def of_source(metric: Metric, value: float) -> str:
    """A source's score at its own task, in a table headed with accuracy: other metrics have their unit and name.

    >>> of_source(ACCURACY, 0.5), of_source(Metric("mae", "years", False), 1.5)
    ('50.00', '1.5000 years (mae)')
    """
    return shown(metric, value) if metric == ACCURACY else f"{with_unit(metric, value)} ({spoken(metric)})"


def of_differences(metric: Metric) -> str:
    """The unit of differences; "" where there is none.

    >>> of_differences(ACCURACY), of_differences(Metric("cross_entropy", "nats", False))
    ('points', 'nats')
    """
    return "points" if metric.unit == "%" else metric.unit


def amount(value: float, unit: str) -> str:
    """A number with its unit, which may be none.

    >>> amount(1.0, "points"), amount(0.5, "points"), amount(0.01, "")
    ('1 point', '0.5 points', '0.01')
    """
    return f"{value:g} {'point' if (value, unit) == (1, 'points') else unit}".rstrip()


def headed(text: str, unit: str) -> str:
    """A heading with a unit in brackets.

    >>> headed("Test accuracy", "%"), headed("Test r squared", "")
    ('Test accuracy (%)', 'Test r squared')
    """
    return f"{text} ({unit})" if unit else text


def default_margin(metric: Metric) -> float:
    """The margin that is taken where none is given, in the unit of differences.

    >>> default_margin(ACCURACY), default_margin(Metric("cross_entropy", "nats", False))
    (0.5, 0.01)
    """
    return MARGIN_OF_FRACTIONS if metric.unit == "%" else MARGIN


def difference(metric: Metric, value: float) -> str:
    """A difference with its sign and unit.

    >>> difference(ACCURACY, 0.0123), difference(Metric("cross_entropy", "nats", False), -0.05)
    ('+1.23 points', '-0.0500 nats')
    """
    text = f"{factor(metric) * value:+.{digits(metric)}f}"
    return " ".join(filter(None, (text, of_differences(metric))))
