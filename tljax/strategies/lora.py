"""Train a low-rank change of the kernels below the head, and the head if it was drawn anew.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv:2106.09685, section 4.1;
Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA", arXiv:2312.03732 (rank_stabilised);
Hayou et al. 2024, "LoRA+: efficient low rank adaptation of large models", arXiv:2402.12354 (ratio).
"""

from typing import Any

import jax

from tljax import low_rank, masks, paths
from tljax.strategies import _kernels as kernels
from tljax.types import Context, InputError, Mask, Params

ALL = kernels.ALL
_FACTORS = kernels.FACTORS


def strategy(
    params: Params,
    context: Context,
    *,
    rank: int = 4,
    scale: float = 4.0,
    rank_stabilised: bool = False,
    ratio: float = 1.0,
    on: str = ALL,
) -> Mask:
    """The factors A and B that `adapt` added train, and whatever was drawn anew.

    A kernel W with its factors means W + scale / rank A B; `rank_stabilised` divides by the root of the rank instead.
    `on=block_*/attention/{query,value}/kernel` adapts the kernels that any of the globs matches, parted by '+'; the
    head is never among them. B learns at `ratio` times the rate of A and of the head: LoRA+ has
    1 for LoRA, and 16 as a start. Raises InputError for a rank below 1, a scale or ratio that is not above 0,
    parameters without factors, and a context.fresh of another tree than the adapted one.
    """
    kernels.gain("lora", rank, scale, rank_stabilised)
    if not 0 < ratio < float("inf"):
        raise InputError(f"lora:ratio={ratio}: it must be above 0 and finite")
    mask = kernels.trained("lora", params, _FACTORS, context.fresh)
    if ratio == 1:
        return mask
    return paths.each(lambda path, trains: ratio if trains and masks.leaf_name(path) == "lora_b" else trains, mask)


def adapt(params: Params, key: jax.Array, context: Context | None = None, *, rank: int = 4, on: str = ALL) -> Params:
    """The parameters with factors `lora_a` [*inputs, rank] and `lora_b` [rank, *outputs] beside each `kernel`
    [*inputs, *outputs] below the head that `on` matches.

    The head is the last of context.stages; without stages it is whatever is called 'head'. Which axes of a kernel are
    its inputs, context.contracted says; where it does not, they are all but the last of a kernel of two axes or four
    (a convolution), and follow from the names of three (attention's query, key and value, which have one, and out,
    which has two). lora_a is normal of variance 1 / inputs (LeCun), lora_b zero, so that the outputs are unchanged.

    Raises InputError for a rank below 1, a glob that matches nothing, where there is no such kernel, for a kernel that
    is in no dict, where no leaf can be added, and for parameters that have factors already, which would be lost.
    `left_out` names the kernels whose inputs are not known, which stay frozen.
    """
    kernels.gain("lora", rank, 1.0, False)

    def beside(key: jax.Array, kernel: Any, count: int) -> dict[str, Any]:
        return kernels.normal_and_zero(key, kernel, count, rank)

    return kernels.adapted(params, key, context or Context(), on, "lora", _FACTORS, beside)


def left_out(params: Params, context: Context, *, on: str = ALL) -> list[str]:
    """The paths of the leaves of two axes and more below the head that get no factors, of those that `on` matches if it
    is given: stacked layers, embeddings, kernels whose inputs are not known. Biases are none, whatever their axes."""
    return list(kernels.to_adapt(params, context, on, _FACTORS)[1])


def merge(params: Params, *, rank: int = 4, scale: float = 4.0, rank_stabilised: bool = False) -> Params:
    """Ordinary parameters with the same outputs: kernel + scale/rank lora_a lora_b, without the factors.

    Raises InputError for parameters without factors, factors of another rank or shape, one without the other or without
    their kernel, and factors in no dict, such as those in a FrozenDict.
    """
    gain = kernels.gain("lora", rank, scale, rank_stabilised)

    def summed(kernel: Any, a: Any, b: Any) -> Any:
        return kernel + gain * low_rank.product(a, b)

    return kernels.folded(params, rank, "lora", _FACTORS, summed)


def factored(params: Params, *, rank: int = 4, scale: float = 4.0, rank_stabilised: bool = False) -> Params:
    """What `merge` gives, with a `LowRank` in the place of each sum. Raises InputError as it does."""
    gain = kernels.gain("lora", rank, scale, rank_stabilised)

    def apart(kernel: Any, a: Any, b: Any) -> Any:
        return low_rank.LowRank(kernel, a, gain * b)

    return kernels.folded(params, rank, "lora", _FACTORS, apart)
