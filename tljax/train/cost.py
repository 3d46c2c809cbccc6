"""What a compiled segment costs on one device, as its compiler says it: the executable that trains is asked."""

from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Of an executable, on one device; None is what its backend does not say."""

    flops: float | None
    """FLOPs of one step of the fits that stand side by side: the body of the loop is counted once. Compilers for GPUs
    say 0 or less, which is None here."""
    peak_bytes: int | None
    """The most memory at any time: arguments (data or features, parameters, optimizer state) of all its fits, results
    and temporaries, less what results take over from arguments. What else lies on the device is not in it."""


def analyze(executable: Any, counts: bool = True) -> Cost:
    """The cost of an executable of `jax.jit(..).lower(..).compile()`; nothing is known of None.

    `counts` is False of a program with loops within a step, whose FLOPs compilers count once a loop.

    >>> import jax, jax.numpy as jnp
    >>> row = jax.ShapeDtypeStruct((10,), jnp.float32)
    >>> analyze(jax.jit(lambda x: 2 * x).lower(row).compile())
    Cost(flops=10.0, peak_bytes=80)
    """
    if executable is None:
        return Cost(None, None)
    counted = float((executable.cost_analysis() or {}).get("flops", 0.0))
    flops = counted if counted > 0 and counts else None
    memory = executable.memory_analysis()
    parts = ("argument", "output", "temp")
    if memory is None or not all(hasattr(memory, f"{part}_size_in_bytes") for part in (*parts, "alias")):
        return Cost(flops, None)
    used = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
    return Cost(flops, int(used - memory.alias_size_in_bytes) or None)


def largest(first: int | None, second: int | None) -> int | None:
    """The larger of two peaks, of which either may not be known.

    >>> largest(None, 3), largest(4, 3), largest(None, None)
    (3, 4, None)
    """
    return max((peak for peak in (first, second) if peak is not None), default=None)
