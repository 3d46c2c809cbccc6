"""Train the head on a random frozen backbone: the control that feature extraction must beat.

Source: Rahimi and Recht 2008, "Weighted sums of random kitchen sinks", NIPS 21.
"""

from collections.abc import Sequence

from tljax import masks
from tljax.strategies import _layers as layers
from tljax.types import Context, Mask, Params


def strategy(params: Params, context: Context) -> Mask:
    """The last stage trains; the others, drawn anew, stay frozen on purpose.

    Raises InputError without context.stages.
    """
    layers.require_stages("random_features", context.stages)
    return masks.under(params, context.stages[-1:])


def reinit(context: Context) -> Sequence[str]:
    """Nothing of a source is kept."""
    return context.stages
