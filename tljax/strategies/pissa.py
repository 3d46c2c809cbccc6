"""Train the principal components of the kernels below the head; what is left of them stays frozen.

Source: Meng et al. 2024, "PiSSA: principal singular values and singular vectors adaptation of large language models",
arXiv:2404.02948, section 3.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import low_rank
from tljax.strategies import _kernels as kernels
from tljax.types import Context, InputError, Mask, Params

ALL = kernels.ALL
_ADDED = ("pissa_a", "pissa_b")


def strategy(params: Params, context: Context, *, rank: int = 4, on: str = ALL) -> Mask:
    """The factors A and B that `adapt` took out of the kernels train, and whatever was drawn anew.

    With W = U S V' of a kernel, A is U S^(1/2) and B S^(1/2) V', of the `rank` largest singular values; W - A B takes
    the kernel's place, and is frozen. `on` are globs of the kernels, as in `lora`. Raises InputError for a rank below
    1, for parameters without factors, and for a context.fresh of another tree than the adapted one.
    """
    kernels.gain("pissa", rank, 1.0, False)
    return kernels.trained("pissa", params, _ADDED, context.fresh)


def adapt(params: Params, key: jax.Array, context: Context | None = None, *, rank: int = 4, on: str = ALL) -> Params:
    """The parameters with factors `pissa_a` [*inputs, rank] and `pissa_b` [rank, *outputs] beside each kernel below the
    head that `on` matches, and in the kernel's place what they leave of it; the key is not used.

    Raises InputError as LoRA's `adapt` does, and for a kernel of fewer singular values than the rank.
    """
    kernels.gain("pissa", rank, 1.0, False)

    def beside(key: jax.Array, kernel: Any, count: int) -> dict[str, Any]:
        shape, dtype = jnp.shape(kernel), jnp.result_type(kernel)
        matrix = np.asarray(kernel, np.float64).reshape(math.prod(shape[:count]), -1)
        if rank > min(matrix.shape):
            raise InputError(
                f"pissa:rank={rank}: a kernel {shape} has {min(matrix.shape)} singular values: give a smaller rank, or "
                "the kernels to adapt by on="
            )
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        sign = np.sign(u[np.abs(u).argmax(0), np.arange(len(s))])  # which of the two is the decomposition's whim
        a, b = (u * sign * np.sqrt(s))[:, :rank], (v * (sign * np.sqrt(s))[:, None])[:rank]
        a, b = jnp.asarray(a.reshape(*shape[:count], rank), dtype), jnp.asarray(b.reshape(rank, *shape[count:]), dtype)
        left = np.asarray(kernel, np.float64) - np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), 1)
        return {"pissa_a": a, "pissa_b": b, "kernel": jnp.asarray(left, dtype)}

    return kernels.adapted(params, key, context or Context(), on, "pissa", _ADDED, beside)


def left_out(params: Params, context: Context, *, on: str = ALL) -> list[str]:
    """The paths of the leaves of two axes and more below the head that get no factors, as LoRA's `left_out` has."""
    return list(kernels.to_adapt(params, context, on, _ADDED)[1])


def merge(params: Params, *, rank: int = 4) -> Params:
    """Ordinary parameters with the same outputs: kernel + pissa_a pissa_b. Raises InputError as LoRA's `merge` does."""
    return low_rank.merged(factored(params, rank=rank))


def factored(params: Params, *, rank: int = 4) -> Params:
    """What `merge` gives, with a `LowRank` in the place of each sum. Raises InputError as it does."""
    return kernels.folded(params, rank, "pissa", _ADDED, low_rank.LowRank)
