"""The learning-rate range test: one fit whose rate rises from step to step, and what its loss says of rates.

Source: Smith 2017, "Cyclical learning rates for training neural networks", WACV, section 3.3, where the rate rises
linearly. Here it rises exponentially, since the rates that are worth a look span decades.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d

SHARE = 0.1
"""The suggestion, of the rate at which the loss is lowest: there it is about to rise, and a tenth is the usual step
back (Gugger 2018, "How do you find a good learning rate")."""
WIDTH = 0.02
"""Of the smoothing, a standard deviation as a fraction of the steps."""


class Suggestion(NamedTuple):
    """What a range test says."""

    rate: float
    """The suggestion: SHARE of `lowest`."""
    lowest: float
    """The rate at which the smoothed loss is lowest."""
    smooth: np.ndarray
    """float64 [steps]: the loss that was judged, in its own unit."""
    diverged: float | None
    """The first rate at which the loss was not finite."""
    edge: str
    """'lowest' or 'highest' where an end of the rates was in the way; else ''."""


def rates(low: float, high: float, steps: int) -> np.ndarray:
    """float32 [steps]: from `low` to `high`, by the same factor a step.

    >>> rates(0.5, 8.0, 5).tolist()
    [0.5, 1.0, 2.0, 4.0, 8.0]
    """
    return np.geomspace(low, high, steps).astype(np.float32)


def suggested(rates: np.ndarray, losses: np.ndarray) -> Suggestion:
    """A rate, from the rates and the loss of each step, [steps] both.

    The loss is smoothed by a Gaussian of WIDTH. What is above the first loss by more than its size, or not finite,
    counts as so much: a loss that runs away must not reach, by the smoothing, into the steps before.

    >>> swept = rates(1e-4, 1e2, 61)
    >>> round(suggested(swept, 0.5 + np.abs(np.log10(swept))).rate, 3)
    0.1
    """
    most = losses[0] + abs(losses[0])
    bounded = np.minimum(np.where(np.isfinite(losses), losses, most), most).astype(np.float64)
    smooth = gaussian_filter1d(bounded, max(1.0, WIDTH * len(losses)), mode="nearest")
    lowest = int(smooth.argmin())
    odd = np.flatnonzero(~np.isfinite(losses))
    rate = SHARE * float(rates[lowest])
    near = WIDTH * (len(rates) - 1)
    edge = "highest" if lowest >= len(rates) - 1 - near else "lowest" if rate < rates[0] else ""
    return Suggestion(rate, float(rates[lowest]), smooth, float(rates[odd[0]]) if len(odd) else None, edge)
