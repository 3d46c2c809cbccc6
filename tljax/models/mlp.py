"""The multi-layer perceptron: `hidden_0`, `hidden_1`, ... and `head`."""

import flax.linen as nn

from tljax.models import activation as by_name
from tljax.models.linen import flat, stage
from tljax.types import Model


def model(classes: int, *, hidden: tuple[int, ...] = (512,), activation: str = "relu") -> Model:
    """Dense layers of the widths `hidden`, and a linear head; the reference is 784-512-10.

    Kernels are LeCun normal (variance 1/fan_in, truncated at two standard deviations: LeCun et al. 1998,
    "Efficient BackProp", section 4.6), biases zero.
    """
    widths = [
        stage(f"hidden_{i}", nn.Dense(width), before=flat, after=by_name(activation)) for i, width in enumerate(hidden)
    ]
    return (*widths, stage("head", nn.Dense(classes), before=flat))
