"""Numbers for arrays of a layout, the same wherever they are drawn: by the name and shape of each alone.

So a fixture is the names and shapes that a library writes, and the logits that it gives with these numbers.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def arrays(layout: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """{name: array} of {name: (dtype, shape)}."""
    return {name: values(name, tuple(shape)).astype(dtype) for name, (dtype, shape) in layout.items()}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32: kernels of variance 1 / fan-in, scales about 1, running variances between 0.5 and 1.5, others small."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if not shape:
        return np.full((), 7, np.float32)
    normal = draw.standard_normal(shape, np.float32)
    if name.endswith("running_var"):
        return 0.5 + draw.random(shape, np.float32)
    if len(shape) == 1:
        return np.float32(name.endswith("weight")) + np.float32(0.1) * normal
    if len(shape) == 3:
        return np.float32(0.5) * normal
    return normal / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


def images(size: int) -> np.ndarray:
    """uint8 [2, size, size, 3]."""
    return np.random.default_rng(size).integers(0, 256, (2, size, size, 3), np.uint8)
