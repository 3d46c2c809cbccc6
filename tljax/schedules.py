"""Learning rate schedules: a name, a peak and a warmup to the rate of every step."""

import numpy as np
import optax

from tljax import plugins
from tljax.types import InputError


def rates(schedule: str, learning_rate: float, warmup: float, steps: int) -> np.ndarray:
    """The learning rate of every step, float32 [steps]: linear from 0 over `warmup`, then the schedule.

    `warmup` is a fraction of the steps in [0, 1). The schedule runs over the rest: 'constant', 'linear' or 'cosine'
    (both to 0; cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5 without restarts). Raises InputError for
    an unknown schedule, or a number outside its range.

    >>> rates("linear", 0.1, 0.0, 4).round(3).tolist()
    [0.10000000149011612, 0.07500000298023224, 0.05000000074505806, 0.02500000037252903]
    """
    learning_rate, warmup = float(learning_rate), float(warmup)
    if not 0 <= learning_rate <= float(np.finfo(np.float32).max):
        reason = "it must be finite, in float32, and at least 0"
        raise InputError(reason, field="learning_rate", value=learning_rate)
    if not 0 <= warmup < 1:
        raise InputError("it is a fraction of the steps, at least 0 and below 1", field="warmup", value=warmup)
    rise = round(warmup * steps)
    rest = max(steps - rise, 1)
    shapes = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
    }
    if schedule not in shapes:
        raise InputError(f"unknown schedule '{schedule}'{plugins.nearest(schedule, shapes)}")
    ramp = optax.linear_schedule(0.0, 1.0, max(rise, 1))
    whole = optax.join_schedules([ramp, shapes[schedule]], [rise]) if rise else shapes[schedule]
    shape = np.broadcast_to(np.asarray(whole(np.arange(steps)), np.float32), (steps,))
    return np.float32(learning_rate) * shape
