"""A check: the name of a promise, whether it holds, and the detail that shows it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import paths
from tljax.types import InputError


class Check(NamedTuple):
    """The outcome of one promise: a line."""

    name: str
    passed: bool | None
    """None where the promise does not apply."""
    detail: str


def line(name: str, promise: Callable[..., str], *arguments: Any) -> Check:
    """Make a check of a function that returns the detail, or raises an error that says what is wrong.

    >>> line("small", lambda: "1 of 1"), line("large", lambda: 1 / 0)[1:]
    (Check(name='small', passed=True, detail='1 of 1'), (False, 'ZeroDivisionError: division by zero'))
    """
    try:
        return Check(name, True, promise(*arguments))
    except (Exception, SystemExit) as error:  # whatever a researcher's code raises is what the line is there to say
        kind = "" if isinstance(error, InputError | AssertionError) else f"{type(error).__name__}: "
        return Check(name, False, kind + " ".join(str(error).split()))


def copy(tree: Any) -> Any:
    """A tree of new containers and new NumPy arrays; bools, numbers and tracers stay as they are."""

    def copied(leaf: Any) -> Any:
        array = isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)
        return np.array(leaf) if array else leaf

    return jax.tree.map(copied, tree)


def same_bytes(a: Any, b: Any) -> bool:
    """Whether two leaves have one dtype, one shape and one content, bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def changed(before: Any, after: Any) -> list[str]:
    """The paths of the leaves that differ in a bit; raises InputError if the trees differ in structure."""
    paths.same_structure(before, after, "the tree before", "the tree after")
    return [path for path, old, new in paths.items(before, after) if not same_bytes(old, new)]
