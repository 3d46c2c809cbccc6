"""The last stages of EfficientNet-Lite0, above a bottom that never trains: the network of a card's photographs."""

from pathlib import Path

import jax

from tljax import models, weights
from tljax.models import efficientnet_lite
from tljax.types import InputError, Model, Params, PyTree, Stage

TAIL = ("block_14", "block_15", "top", "head")
"""The stages that a strategy meets."""
_SHAPE, _CLASSES = (64, 64, 3), 1000
"""Of ImageNet's network, whose leaves have the same shapes for images of any size."""
_LAYOUTS = {"_conv_stem.weight": "efficientnet_lite_pytorch", "stem/conv/kernel": "efficientnet_lite"}
"""{an array: the rules of a file that has it}."""


def model(classes: int, *, bottom: str) -> Model:
    """`bottom`, `block_14`, `block_15`, `top` and `head` of Lite0, for images [batch, height, width, 3] of 0 to 1.

    The first stage, stem to block_13, has no parameters: it computes with those of the file `bottom` under every
    strategy and from scratch too, so that its outputs are computed once. Raises InputError for a file of other layouts
    than tljax knows of the network.
    """
    whole = efficientnet_lite.model(classes, momentum=0.9)
    below = tuple(stage for stage in whole if stage.name not in TAIL)
    variables = _variables([stage.name for stage in below], Path(bottom))

    def apply(params: Params, x: PyTree, *, key: jax.Array | None = None) -> PyTree:
        return models.apply(below, variables, x)

    return (Stage("bottom", lambda key, x: {}, apply, fixed=True), *(stage for stage in whole if stage.name in TAIL))


def _variables(stages: list[str], file: Path) -> Params:
    """The parameters and statistics of some stages, of a file of the whole network."""
    arrays = weights.read(file)
    layout = next((rules for array, rules in _LAYOUTS.items() if array in arrays), None)
    if layout is None:
        raise InputError(f"'{file}' is not of EfficientNet-Lite in a layout that tljax knows: convert it anew")
    like = models.abstract(efficientnet_lite.model(_CLASSES), _SHAPE)
    variables = weights.grafted(arrays, weights.read_rules(layout), like)
    return {name: variables[name] for name in stages}
