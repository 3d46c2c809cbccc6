"""Train everything, then go part of the way back to the start: an average of the weights before and after.

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903, equation 2, from a
head that fits already; here leaves that were drawn anew, such as a new head, stay as they were trained, unless a linear
probe comes first: then the average is between the probe and what is fine-tuned from it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tljax import masks
from tljax.strategies import lp_ft
from tljax.types import Context, InputError, Mask, Params, Phase


def strategy(
    params: Params, context: Context, *, alpha: float = 0.5, curve: int = 0, probe: float = 0.0
) -> Mask | Sequence[Phase]:
    """Everything trains; the result `alpha_...` is (1 - alpha) of the start and alpha of what was trained.

    `curve=11` gives as many results instead, evenly from `alpha_0` to `alpha_1`; `--verdict_of=selected` takes the one
    of them with the best validation score. `probe=0.5` trains the head alone until that fraction of training: the
    results are then between what the probe gave, its head too, and what was trained after it, as LP-FT is.

    Raises InputError for an alpha outside [0, 1], a curve of one point or fewer, and a probe outside [0, 1).
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"wise_ft:alpha={alpha}: it is the share of what was trained, from 0 to 1")
    if curve < 0 or curve == 1:
        raise InputError(f"wise_ft:curve={curve}: it is how many results there are from alpha 0 to 1, at least 2")
    if not 0 <= probe < 1:
        raise InputError(f"wise_ft:probe={probe}: it is a fraction of training, from 0 and below 1")
    return lp_ft.strategy(params, context, start=probe) if probe else masks.by_path(params, lambda path: True)


def finish(
    params: Params,
    start: Params,
    context: Context,
    *,
    alpha: float = 0.5,
    curve: int = 0,
    probe: float = 0.0,
    phases: Sequence[Params] = (),
) -> dict[str, Params]:
    """The averages, leaf by leaf, of the parameters before and after training, or after the probe and at the end.

    A leaf that cannot train, such as a count, is as it was.
    """
    before = phases[-1] if probe else start
    moves = masks.kept(params, None if probe else context.fresh)
    alphas = [round(float(share), 12) for share in np.linspace(0, 1, curve)] if curve else [alpha]

    def averaged(share: float, trained: Any, before: Any, moves: bool) -> Any:
        return (1 - share) * before + share * trained if moves else trained

    def between(share: float) -> Params:
        return jax.tree.map(lambda *leaves: averaged(share, *leaves), params, before, moves)

    return {f"alpha_{share:g}": between(share) for share in alphas}
