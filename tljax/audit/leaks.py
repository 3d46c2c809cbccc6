"""Where a leak comes from: the operation that first mixes a frozen leaf's gradient into what trains."""

from collections.abc import Collection, Sequence
from typing import Any


def mixing(computed_from: Collection[int], meetings: Sequence[tuple[int, Any]], bit: int, others: int) -> Any:
    """The first equation where the label `bit` meets one of `others`, of those from which some outputs are computed.

    `computed_from` are the identities of these equations, as `idle.live` has them, and `meetings` are (labels,
    equation), as `program.Reading` has them. None if labels do not meet in one equation.
    """
    met = [(bits, equation) for bits, equation in meetings if bits & bit and id(equation) in computed_from]
    return next((equation for bits, equation in met if bits & others), met[0][1] if met else None)


def operation(equation: Any) -> str:
    """What an equation is a part of, in words: a transformation of optax by name, else its own primitive."""
    name = _transformation(equation)
    return name if name else f"'{equation.primitive.name}'"


def _transformation(equation: Any) -> str | None:
    """The function of optax that made the innermost transformation which an equation is a part of."""
    traceback = equation.source_info.traceback
    codes = [] if traceback is None else traceback.raw_frames()[0]
    for code in codes:  # from the innermost frame on
        if "/optax/" in code.co_filename.replace("\\", "/") and ".<locals>." in code.co_qualname:
            return f"optax's {code.co_qualname.partition('.')[0].lstrip('_')}"
    return None
