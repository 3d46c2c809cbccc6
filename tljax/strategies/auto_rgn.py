"""Train each leaf at a rate that is its gradient's norm relative to its own, measured again in each phase.

Source: Lee et al. 2023, "Surgical fine-tuning improves adaptation to distribution shifts", arXiv:2210.11466,
section 4.
"""

from collections.abc import Sequence

import numpy as np

from tljax import masks, paths
from tljax.types import Context, InputError, Mask, Params, Phase

DATA_DRIVEN = True


def strategy(params: Params, context: Context, *, phases: int = 4) -> Sequence[Phase]:
    """`phases` evenly spaced phases, in each the `rates` at the parameters of its start."""
    if phases < 1:
        raise InputError(f"auto_rgn:phases={phases}: it is at least 1")
    if context.gradient is None:
        raise InputError("auto_rgn needs context.gradient: a function from parameters to the mean gradient of L")
    return [Phase(i / phases, rates) for i in range(phases)]


def rates(params: Params, context: Context) -> Mask:
    """For each leaf |g|/|w| over the largest of them, g being the mean gradient of L; a rate of 0 is False.

    What was drawn anew has rate 1 and stays outside the maximum. So has a leaf of zeros, such as a bias that was
    never learnt: its ratio has no bound; with a gradient of zeros too it is frozen. Raises InputError for a gradient
    that is not finite.
    """
    if context.gradient is None:
        raise InputError("auto_rgn needs context.gradient: a function from parameters to the mean gradient of L")
    gradient = _norms(context.gradient(params))
    kept, _ = masks.split(params, masks.kept(params, context.fresh))
    sizes = {path: size for path, size in _norms(kept).items() if gradient.get(path)}
    ratios = {path: gradient[path] / size for path, size in sizes.items() if size}
    largest = max(ratios.values(), default=1.0)
    rate_by_path = {path: ratios[path] / largest if size else 1.0 for path, size in sizes.items()}
    return masks.also(paths.each(lambda path, leaf: rate_by_path.get(path, False), params), context.fresh)


def _norms(tree: Params) -> dict[str, float]:
    """{path: Euclidean norm} of the leaves of floats."""
    leaves = zip(paths.items(tree), paths.trainable(tree), strict=True)
    norms = {path: float(np.linalg.norm(np.asarray(leaf, np.float64))) for (path, leaf), able in leaves if able}
    for path, norm in norms.items():
        if not np.isfinite(norm):
            raise InputError(f"auto_rgn: the norm at '{path}' is {norm}: give finite parameters and gradients")
    return norms
