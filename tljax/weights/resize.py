"""Learned positions of one grid of patches, for another grid: four conventions, each a library's.

Rows are tokens. Those before the grid (a class token) are kept. The grid is resized by one matrix along its height and
one along its width, in float64: out = H grid W^T.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tljax.types import InputError


class Convention(NamedTuple):
    """How an axis of `inputs` points becomes one of `outputs` points."""

    corners: bool
    """Whether the outermost points fall on each other; else the outermost edges do, half a step further out."""
    antialias: bool
    """Whether the kernel is widened where points become fewer."""
    kernel: Callable[[np.ndarray], np.ndarray]


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """The cubic convolution kernel of Keys 1981 (doi:10.1109/TASSP.1981.1163711, equation 4), with its free slope a."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    return kernel


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


CONVENTIONS = {
    "antialias": Convention(corners=False, antialias=True, kernel=_cubic(-0.5)),
    "plain": Convention(corners=False, antialias=False, kernel=_cubic(-0.75)),
    "corners": Convention(corners=True, antialias=False, kernel=_cubic(-0.75)),
    "linear": Convention(corners=True, antialias=False, kernel=_linear),
}
"""timm's, as Pillow and TensorFlow have it; transformers', PyTorch's default; torchvision's; the original ViT's."""


def matrix(inputs: int, outputs: int, convention: str = "antialias") -> np.ndarray:
    """float64 [outputs, inputs]: what each point of the new axis takes of each point of the old. Its rows sum to 1.

    Without antialias points beyond the border are those of the border; with it they do not count.

    >>> matrix(2, 3, "linear")
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    corners, antialias, kernel = CONVENTIONS[convention]
    steps = np.arange(outputs)
    if corners:
        centres = steps * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0)
    else:
        centres = (steps + 0.5) * inputs / outputs - 0.5
    if antialias:
        width = max(inputs / outputs, 1)
        weights = kernel((np.arange(inputs) - centres[:, None]) / width)
        return weights / weights.sum(1, keepdims=True)
    weights = np.zeros((outputs, inputs))
    first = np.floor(centres).astype(int) - 1
    for taps in (first, first + 1, first + 2, first + 3):
        np.add.at(weights, (steps, np.clip(taps, 0, inputs - 1)), kernel(taps - centres))
    return weights


def positions(
    array: np.ndarray,
    tokens: int,
    convention: str = "antialias",
    grids: tuple[tuple[int, int], ...] = (),
    model_grid: tuple[int, int] | None = None,
) -> np.ndarray:
    """[tokens of a grid and those before it, D] for so many `tokens`, in the array's dtype; itself if it has as many.

    `grids` is the (height, width) of the array's grid, or that and the new one's. Without it both are square, or the
    new one is `model_grid` where that is known, and as many tokens stand before each. Raises InputError where they are
    not, and for a new grid that is not `model_grid`.

    >>> positions(np.eye(5, 2, dtype=np.float32), 10).shape
    (10, 2)
    """
    if not grids and len(array) == tokens:
        return array
    if model_grid and len(grids) > 1 and grids[1] != model_grid:
        raise InputError(
            f"the rule says that the model's grid is {shown(grids[1])}, and it is {shown(model_grid)}: write "
            f"resize={shown(grids[0])}+{shown(model_grid)}"
        )
    old, new = grid(len(array), grids[0] if grids else None), grid(tokens, grids[1] if len(grids) > 1 else model_grid)
    before, after = len(array) - old[0] * old[1], tokens - new[0] * new[1]
    if before != after:
        raise InputError(
            f"{len(array)} positions are {before} and a grid of {shown(old)}, {tokens} are {after} and a grid of "
            f"{shown(new)}: give the model as many tokens before its grid (pool=), or both grids, resize=14x14+8x10"
        )
    if old == new:
        return array
    cells = np.asarray(array[before:], np.float64).reshape(*old, -1)
    height, width = (matrix(old[axis], new[axis], convention) for axis in (0, 1))
    resized = np.einsum("yh,xw,hwd->yxd", height, width, cells).reshape(new[0] * new[1], -1)
    return np.concatenate([array[:before], resized.astype(array.dtype)])


def grid(tokens: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of the grid among so many tokens: of this size, or square, with at most one token before it.

    Raises InputError for a number that is no square, nor one more.

    >>> grid(197), grid(50, (7, 7))
    ((14, 14), (7, 7))
    """
    if size is not None:
        if size[0] * size[1] > tokens:
            raise InputError(
                f"{tokens} positions are fewer than a grid of {shown(size)} has: give its height and width"
            )
        return size
    for before in (0, 1):
        side = math.isqrt(tokens - before)
        if side and side * side == tokens - before:
            return side, side
    raise InputError(
        f"{tokens} positions are no square grid, with or without a class token: say the grid's height and width, "
        "resize=14x28, and after a '+' those of the model's, resize=14x28+8x16"
    )


def shown(size: tuple[int, int]) -> str:
    """A grid as rules write it.

    >>> shown((14, 28))
    '14x28'
    """
    return f"{size[0]}x{size[1]}"


def parsed(text: str) -> tuple[str, tuple[tuple[int, int], ...]] | None:
    """(convention, grids) of what stands after `resize=`: names and grids in any order; None if it cannot be read.

    >>> parsed("plain+14x28"), parsed(""), parsed("cubic")
    (('plain', ((14, 28),)), ('antialias', ()), None)
    """
    words = text.split("+") if text else []
    names = [word for word in words if word in CONVENTIONS]
    sizes = [match for word in words if (match := re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", word))]
    if len(names) > 1 or len(sizes) > 2 or len(names) + len(sizes) < len(words):
        return None
    return (names or ["antialias"])[0], tuple((int(match[1]), int(match[2])) for match in sizes)
