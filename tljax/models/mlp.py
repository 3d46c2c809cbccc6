"""The multi-layer perceptron: `hidden_0`, `hidden_1`, ... and `head`."""

from typing import Any

import flax.linen as nn

from tljax.models import activation as by_name
from tljax.models.linen import flat, linear_head, stage
from tljax.types import Model


def model(classes: int, *, hidden: tuple[int, ...] = (512,), activation: str = "relu", dtype: Any = None) -> Model:
    """Dense layers of the widths `hidden`, and a linear head; the reference is 784-512-10.

    Kernels are LeCun normal (variance 1/fan_in, truncated at two standard deviations: LeCun et al. 1998,
    "Efficient BackProp", section 4.6), biases zero. Products are computed in `dtype`, the logits summed in float32.
    """
    widths = [
        stage(f"hidden_{i}", nn.Dense(width, dtype=dtype), before=flat, after=by_name(activation))
        for i, width in enumerate(hidden)
    ]
    return (*widths, stage("head", linear_head(classes, dtype), before=flat))
