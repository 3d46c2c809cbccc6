"""Train everything, then scale the change of each stage by its depth: little near the inputs, all of it at the head.

Source: Wang et al. 2024, "LiNeS: post-training layer scaling prevents forgetting and enhances model merging",
arXiv:2410.17146, section 4: lambda = alpha + beta (l - 1) / (L - 1) of layer l of L.
"""

from typing import Any

import jax

from tljax import masks, paths
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, alpha: float = 0.5, beta: float = 0.5) -> Mask:
    """Everything trains; in the result `lines` the change of the first stage counts `alpha`, of the last alpha + beta.

    A stage that is nothing but a norm counts with the stage below it. Raises InputError without context.stages, and for
    an alpha or beta that is negative.
    """
    if not (alpha >= 0 and beta >= 0 and alpha + beta < float("inf")):
        raise InputError(f"lines:alpha={alpha}:beta={beta}: both are shares of the change, at least 0")
    layers.require_stages("lines", context.stages)
    return masks.by_path(params, lambda path: True)


def finish(
    params: Params, start: Params, context: Context, *, alpha: float = 0.5, beta: float = 0.5
) -> dict[str, Params]:
    """The start and the scaled change; what was drawn anew stays as it was trained, as does a leaf of no stage.

    A leaf that cannot train, such as a count, is as it was.
    """
    groups = layers.with_block(params, context.stages)
    last = max(1, len(groups) - 1)
    depth = {
        name: alpha + beta * (i if len(groups) > 1 else 1) / last for i, group in enumerate(groups) for name in group
    }
    tests = [(paths.inside((name,)), scale) for name, scale in depth.items()]
    scales = paths.each(lambda path, leaf: next((scale for test, scale in tests if test(path)), 1.0), params)

    def scaled(trained: Any, before: Any, scale: float, moved: bool) -> Any:
        return before + scale * (trained - before) if moved and scale != 1 else trained

    return {"lines": jax.tree.map(scaled, params, start, scales, masks.kept(params, context.fresh))}
