"""What a training step does to leaves whose mask moves: whether they stay in the steps in which they are off.

The new value of such a leaf has to be a selection by the very mask that the next state of `optimizer.scheduled` holds,
and where that is False the old value. This is read from the traced program; a run shows where it does not hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from tljax.audit import numbers, origins, program
from tljax.audit.report import Finding
from tljax.audit.tracing import Traced
from tljax.optimizer import Scheduled
from tljax.types import InputError, MaskSchedule

STEPS = 8
"""The steps that are run to see what is off move."""


class Leaf(NamedTuple):
    """A leaf of the scope, by places among the leaves of the state."""

    path: str
    place: int
    on: int
    """Of what is on in it."""
    off: int
    """Of what it is where it is off: itself, or its value at the start."""


def leaves(traced: Traced, state: Any, schedule: MaskSchedule, scope: Mapping[int, str]) -> list[Leaf]:
    """The leaves of the scope {place: path} with their masks in the state.

    Raises InputError unless the state has that of one `optimizer.scheduled`.
    """
    rows = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, Scheduled))[0]
    states = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, node in rows if isinstance(node, Scheduled)
    ]
    if len(states) != 1:
        raise InputError(
            f"the state has {len(states) or 'no'} states of optimizer.scheduled: give a schedule for a step that holds "
            "one, and else the mask of what never trains"
        )
    prefix = f"{states[0]}/" if states[0] else ""
    place_of = {path: place for place, path in enumerate(traced.paths)}
    start = "start" if schedule.returns else None
    try:
        return [
            Leaf(path, place, place_of[f"{prefix}on/{path}"], place_of[f"{prefix}{start}/{path}"] if start else place)
            for place, path in scope.items()
        ]
    except KeyError as error:
        raise InputError(f"the state has no leaf {error}: give the schedule under which it began") from error


def findings(traced: Traced, rows: Sequence[Leaf]) -> list[Finding]:
    """The findings on whether each leaf stays where its mask is off."""
    top = origins.Frame(traced.closed.jaxpr, {})
    outputs = traced.closed.jaxpr.outvars
    causes = {row.path: cause for row in rows if (cause := _cause(top, outputs, row)) is not None}
    shown = _shown(traced, [row for row in rows if row.path in causes]) if causes else {}
    result = []
    for row in rows:
        kept = "its new value is its old one" if row.off == row.place else "its new value is that of the start"
        if row.path not in causes:
            condition = "in steps in which its mask is off"
            result.append(Finding(row.path, "off", "proved", kept, grade="identical", condition=condition))
            continue
        text, equation = causes[row.path]
        source, moved = program.line_of(equation), shown.get(row.path)
        if moved is not None:
            detail = f"{text}: {moved}"
            result.append(Finding(row.path, "off", "refuted", detail, source=source, grade="changed"))
        else:
            detail = f"{text}; no numbers show that it moves"
            result.append(Finding(row.path, "off", "not decided", detail, source=source))
    return result


def _cause(top: origins.Frame, outputs: Sequence[Any], row: Leaf) -> tuple[str, Any] | None:
    """(What the new value is, its equation) where it is no selection by the mask; None where it is."""
    frame, atom = origins.origin(top, outputs[row.place])
    if frame is top and atom is top.inputs[row.place]:
        return None if row.off == row.place else ("it keeps its value, and does not return to the start", None)
    equation = None if isinstance(atom, core.Literal) else frame.producers.get(atom, (None, 0))[0]
    if equation is None:
        return "it is given another value", None
    if equation.primitive.name != "select_n" or len(equation.invars) != 3:
        return f"'{equation.primitive.name}' gives its new value, and no selection by its mask", equation
    which, off, _ = equation.invars
    chooser, mask = origins.chooser(frame, which), origins.chooser(top, outputs[row.on])
    if chooser[0] is not mask[0] or chooser[1] is not mask[1]:
        return "its new value is a selection, and not by the mask that the state holds", equation
    if origins.origin(frame, off) != (top, top.inputs[row.off]):
        return "its new value is a selection by its mask, and where that is off another value than its own", equation
    if row.off != row.place and origins.origin(top, outputs[row.off]) != (top, top.inputs[row.off]):
        return "what it returns to does not stay", equation
    return None


def _shown(traced: Traced, rows: Sequence[Leaf]) -> dict[str, str]:
    """{path: where a run shows that a leaf moved while it was off}, from the state that was given."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in traced.leaves) or not numbers.fits(traced.closed):
        return {}
    size = len(traced.paths)
    current = numbers.sample(traced.leaves, traced.positions, size, everything=False)
    batch, shown = current[size:], dict[str, str]()
    function = core.jaxpr_as_fun(traced.closed)
    compiled = jax.jit(lambda *inputs: function(*inputs))
    for step in range(1, STEPS + 1):
        after = [*compiled(*current)]
        for row in rows:
            where = np.broadcast_to(~np.asarray(after[row.on]), np.shape(after[row.place]))
            change = numbers.first_difference(current[row.off], after[row.place], where)
            if change is not None and row.path not in shown:
                shown[row.path] = str(numbers.Shown(step, *change, "compiled", "from the state that was given"))
        current = [*after, *batch]
    return shown
