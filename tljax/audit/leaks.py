"""Where a leak comes from: the operation that first mixes a frozen leaf's gradient into what trains."""

from collections.abc import Sequence
from typing import Any

from tljax.audit import idle
from tljax.audit.program import line_of


def mixing(
    closed: Any,
    outputs: Sequence[int],
    meetings: Sequence[tuple[int, Any]],
    bit: int,
    others: int,
    live: dict[tuple[int, ...], Any],
) -> Any:
    """The first equation from which any of the outputs is computed, and where the label `bit` meets one of `others`.

    `meetings` are (labels, equation), as `program.Reading` has them. None if labels do not meet in one equation. `live`
    keeps from what such outputs are computed for the next call, {} at first.
    """
    key = tuple(sorted(set(outputs)))
    if key not in live:
        live[key] = idle.live(closed, [number in key for number in range(len(closed.jaxpr.outvars))]).equations
    computed_from = live[key]
    met = [(bits, equation) for bits, equation in meetings if bits & bit and id(equation) in computed_from]
    return next((equation for bits, equation in met if bits & others), met[0][1] if met else None)


def operation(equation: Any) -> str:
    """What an equation is a part of, in words: a transformation of optax by name, else its own primitive."""
    name = _transformation(equation)
    return name if name else f"'{equation.primitive.name}'"


def source(equation: Any) -> str | None:
    """The line of the user's source, None without an equation."""
    return None if equation is None else line_of(equation)


def _transformation(equation: Any) -> str | None:
    """The function of optax that made the innermost transformation which an equation is a part of."""
    traceback = equation.source_info.traceback
    codes = [] if traceback is None else traceback.raw_frames()[0]
    for code in codes:  # from the innermost frame on
        if "/optax/" in code.co_filename.replace("\\", "/") and ".<locals>." in code.co_qualname:
            return f"optax's {code.co_qualname.partition('.')[0].lstrip('_')}"
    return None
