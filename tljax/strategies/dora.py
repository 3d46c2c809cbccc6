"""Train the length of what leads to each unit, and its direction by a low-rank change; the head if it was drawn anew.

Source: Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation", arXiv:2402.09353, equation 5, with the norm
detached from the gradient, as its section 4.3 suggests.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tljax import low_rank
from tljax.strategies import _kernels as kernels
from tljax.types import Context, Mask, Params

ALL = kernels.ALL
_ADDED = (*kernels.FACTORS, "dora_magnitude")


def strategy(
    params: Params,
    context: Context,
    *,
    rank: int = 4,
    scale: float = 4.0,
    rank_stabilised: bool = False,
    detach: bool = True,
    on: str = ALL,
) -> Mask:
    """The magnitudes m and the factors A and B that `adapt` added train, and whatever was drawn anew.

    A kernel W means m (W + scale / rank A B) / |W + scale / rank A B|, where the norm is of all that leads to an
    output; `rank_stabilised` and `on` are as in `lora`. The norm is computed in each step, and no gradient goes through
    it; with `detach=false` one does. Beside LoRA's numbers a fit has m, one an output, and two moments of it under
    Adam: 12 bytes an output in float32. W is shared by all fits, as the norm is computed without W + A B.

    Raises InputError for a rank below 1, a scale that is not above 0, parameters without factors, and a
    context.fresh of another tree than the adapted one.
    """
    kernels.gain("dora", rank, scale, rank_stabilised)
    return kernels.trained("dora", params, _ADDED, context.fresh)


def adapt(params: Params, key: jax.Array, context: Context | None = None, *, rank: int = 4, on: str = ALL) -> Params:
    """The parameters with LoRA's factors and `dora_magnitude` [*outputs], the norms of W, beside each kernel below the
    head that `on` matches.

    B is zero, so that the outputs are unchanged. Raises InputError as LoRA's `adapt` does.
    """
    kernels.gain("dora", rank, 1.0, False)

    def beside(key: jax.Array, kernel: Any, count: int) -> dict[str, Any]:
        leaves = kernels.normal_and_zero(key, kernel, count, rank)
        return leaves | {
            "dora_magnitude": low_rank.column_norms(jnp.asarray(kernel), leaves["lora_a"], leaves["lora_b"])
        }

    return kernels.adapted(params, key, context or Context(), on, "dora", _ADDED, beside)


def left_out(params: Params, context: Context, *, on: str = ALL) -> list[str]:
    """The paths of the leaves of two axes and more below the head that get no factors, as LoRA's `left_out` has."""
    return list(kernels.to_adapt(params, context, on, _ADDED)[1])


def merge(
    params: Params, *, rank: int = 4, scale: float = 4.0, rank_stabilised: bool = False, detach: bool = True
) -> Params:
    """Ordinary parameters with the same outputs. Raises InputError as LoRA's `merge` does."""
    return low_rank.merged(factored(params, rank=rank, scale=scale, rank_stabilised=rank_stabilised, detach=detach))


def factored(
    params: Params, *, rank: int = 4, scale: float = 4.0, rank_stabilised: bool = False, detach: bool = True
) -> Params:
    """What `merge` gives, with a `LowRank` in the place of each kernel. Raises InputError as it does."""
    gain = kernels.gain("dora", rank, scale, rank_stabilised)

    def apart(kernel: Any, a: Any, b: Any, magnitude: Any) -> Any:
        b = gain * b
        norms = low_rank.column_norms(kernel, a, b)
        norms = jax.lax.stop_gradient(norms) if detach else norms
        # What leads to an output may be all zero; its direction is then as it is.
        known = norms > 0
        return low_rank.LowRank(kernel, a, b, jnp.where(known, magnitude / jnp.where(known, norms, 1), 1))

    return kernels.folded(params, rank, "dora", _ADDED, apart)
