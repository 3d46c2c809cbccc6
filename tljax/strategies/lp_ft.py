"""Train the head alone, then everything.

Source: Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution",
arXiv:2202.10054.
"""

from collections.abc import Sequence

from tljax import masks
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Params, Phase


def strategy(params: Params, context: Context, *, start: float = 0.5) -> Sequence[Phase]:
    """A linear probe until the fraction `start` of training, then full fine-tuning.

    Raises InputError for a `start` outside (0, 1), and without context.stages.
    """
    if not 0 < start < 1:
        raise InputError(f"lp_ft:start={start}: it is a fraction of training, above 0 and below 1")
    layers.require_stages("lp_ft", context.stages)
    head = masks.union(masks.under(params, context.stages[-1:]), context.fresh)
    return [Phase(0.0, head), Phase(start, masks.by_path(params, lambda path: True))]
