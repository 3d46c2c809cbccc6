"""Train everything, each stage at a lower rate than the one above it.

Source: Howard and Ruder 2018, "Universal language model fine-tuning", arXiv:1801.06146, section 3.2; of a vision
transformer Bao et al. 2022, "BEiT: BERT pre-training of image transformers", arXiv:2106.08254, and He et al. 2022,
"Masked autoencoders are scalable vision learners", arXiv:2111.06377, with a decay of 0.65 to 0.75.
"""

from tljax import masks, paths
from tljax.plugins import nearest
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, decay: float = 1 / 2.6, lowest: str = "") -> Mask:
    """The last stage at rate 1, each stage below at `decay` times the rate above, what was drawn anew at 1.

    A stage that is nothing but a norm has the rate of the stage above it: in a vision transformer the last norm and the
    head have rate 1, its last block `decay`, its embedding with positions and class token the lowest. Stages below
    `lowest` stay frozen; without it all train. Raises InputError for a `decay` outside (0, 1], a `lowest` that is no
    stage, without context.stages, and for a leaf that can train but is in no stage.
    """
    layers.require_all("layerwise_decay", params, context.stages)
    if not 0 < decay <= 1:
        raise InputError(f"layerwise_decay:decay={decay}: it must be above 0 and at most 1")
    if lowest and lowest not in context.stages:
        stages = ", ".join(context.stages)
        raise InputError(f"layerwise_decay:lowest={lowest}: it is none of {stages}{nearest(lowest, context.stages)}")
    rates: dict[str, float | bool] = {}
    for depth, group in enumerate(reversed(layers.with_head(params, context.stages))):
        rates |= dict.fromkeys(group, decay**depth)
    rates |= dict.fromkeys(context.stages[: context.stages.index(lowest)] if lowest else (), False)
    inside = {name: paths.inside((name,)) for name in rates}

    def rate(path: str, trains: bool) -> float | bool:
        if not trains:
            return False
        return next(rates[name] for name, holds in inside.items() if holds(path))

    return masks.also(paths.each(rate, masks.by_path(params, lambda path: True)), context.fresh)
