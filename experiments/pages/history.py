"""What a study leaves: its trials one after another, and as a table of text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.pages.csv_cells import cell


class Told(NamedTuple):
    """A trial, whatever became of it."""

    number: int
    state: str
    """COMPLETE, PRUNED, FAIL, RUNNING or WAITING, as Optuna names them."""
    value: float | None
    """What the sampler learnt from: 0 of one that diverged, of a pruned one the last it reported."""
    accuracy: float | None
    """On validation examples, a fraction; None where the trial diverged or did not end."""
    loss: float | None
    """Likewise, mean cross-entropy in nats."""
    diverged: bool
    owner: str
    """The process that had it last: 'process 12 on x'."""
    begin: str
    end: str
    """Local times, as 2026-11-23T08:00:00; '' where there is none."""
    chosen: Mapping[str, Any]
    """{name in the space: value}."""


def told(study: Any) -> list[Told]:
    """The trials of a study of Optuna, in their order."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        state, known = trial.state.name, trial.user_attrs
        diverged = bool(known.get("diverged"))
        accuracy = trial.value if state == "COMPLETE" and not diverged else None
        owner, _ = known.get("lease", ("", 0.0))
        times = (trial.datetime_start, trial.datetime_complete)
        begin, end = (time.isoformat(timespec="seconds") if time else "" for time in times)
        measured = (trial.value, accuracy, known.get("loss"), diverged)
        found.append(Told(trial.number, state, *measured, owner, begin, end, trial.params))
    return found


def table(studies: Mapping[tuple[str, str], Sequence[Told]]) -> str:
    """All trials as comma-separated values, a row each; studies are known by (strategy, budget).

    A field that is not known, or was not searched, is empty.

    >>> print(table({("full", "all"): []}).strip())
    strategy,budget,number,state,value,validation_accuracy,validation_loss,diverged,owner,begin,end
    """
    names = dict.fromkeys(name for trials in studies.values() for one in trials for name in one.chosen)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    own = ["number", "state", "value", "validation_accuracy", "validation_loss", "diverged", "owner", "begin", "end"]
    writer.writerow(["strategy", "budget", *own, *map(cell, names)])
    for arm, trials in studies.items():
        for one in trials:
            values = (*arm, *one[: len(own)], *(one.chosen.get(name) for name in names))
            writer.writerow([cell(value) if isinstance(value, str) else value for value in values])
    return text.getvalue()
