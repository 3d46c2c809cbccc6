"""Train the head, then one stage more in each phase, from the top down.

Source: Howard and Ruder 2018, "Universal language model fine-tuning", arXiv:1801.06146, section 3.3.
"""

from collections.abc import Sequence

from tljax import masks
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Params, Phase


def strategy(params: Params, context: Context, *, every: float = 0.0) -> Sequence[Phase]:
    """A phase for each stage, each `every` of training (a fraction; 0: evenly spaced); the last trains everything.

    A stage that is nothing but a norm is freed with the stage below it. Raises InputError where the last phase
    would not begin before the end, without context.stages, and for a leaf that can train but is in no stage.
    """
    layers.require_all("gradual_unfreeze", params, context.stages)
    stages = layers.with_block(params, context.stages)
    count = len(stages)
    if not every >= 0 or not every * (count - 1) < 1:
        raise InputError(f"gradual_unfreeze:every={every}: {count} phases do not fit into training: give a fraction")
    tops = [masks.under(params, sum(stages[-i:], ())) for i in range(1, count)]
    parts = [*(masks.union(top, context.fresh) for top in tops), masks.by_path(params, lambda path: True)]
    return [Phase(i * every if every else i / count, part) for i, part in enumerate(parts)]
