"""Train everything, then go part of the way back to the start: an average of the weights before and after.

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903, equation 2, from a
head that fits already; here leaves that were drawn anew, such as a new head, stay as they were trained.
"""

from typing import Any

import jax

from tljax import masks
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, alpha: float = 0.5) -> Mask:
    """Everything trains; the result `alpha_...` is (1 - alpha) of the start and alpha of what was trained."""
    if not 0 <= alpha <= 1:
        raise InputError(f"wise_ft:alpha={alpha}: it is the share of what was trained, from 0 to 1")
    return masks.by_path(params, lambda path: True)


def finish(params: Params, start: Params, context: Context, *, alpha: float = 0.5) -> dict[str, Params]:
    """The average, leaf by leaf, of the parameters before and after training."""

    def averaged(trained: Any, before: Any, fresh: bool) -> Any:
        return trained if fresh else (1 - alpha) * before + alpha * trained

    return {f"alpha_{alpha:g}": jax.tree.map(averaged, params, start, context.fresh)}
