"""Train the head, then each stage alone from the bottom up, then everything (chain-thaw).

Source: Felbo et al. 2017, "Using millions of emoji occurrences to learn any-domain representations for detecting
sentiment, emotion and sarcasm", arXiv:1708.00524.
"""

from collections.abc import Sequence

from tljax import masks
from tljax.strategies import _layers as layers
from tljax.types import Context, Params, Phase


def strategy(params: Params, context: Context) -> Sequence[Phase]:
    """Evenly spaced phases, one more than there are stages.

    A stage that is nothing but a norm trains with the stage below it.
    What was drawn anew trains in every phase, where the paper freezes the new head while a stage trains alone.
    Raises InputError without context.stages, and for a leaf that can train but is in no stage.
    """
    layers.require_all("bottom_up", params, context.stages)
    *below, head = layers.with_block(params, context.stages)
    alone = [masks.union(masks.under(params, names), context.fresh) for names in (head, *below)]
    parts = [*alone, masks.by_path(params, lambda path: True)]
    return [Phase(i / len(parts), part) for i, part in enumerate(parts)]
