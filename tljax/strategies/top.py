"""Train the elements that a score ranks first: at random, by magnitude, gradient, SNIP or Fisher information.

Source: Song et al. 2023, "Sparse is enough in fine-tuning pre-trained large language models" (SIFT), arXiv:2312.11875,
for `score=gradient:per=leaf`; Bhardwaj et al. 2024, "Sparse high rank adapters" (SHiRA), arXiv:2406.13175, for
`random`, `magnitude`, `gradient` and `snip`, each `per=leaf`; Zhang et al. 2023, "Gradient-based parameter selection
for efficient fine-tuning" (GPS), arXiv:2312.10136, for `per=unit:loss=supervised_contrastive`; Liao et al. 2023,
"Parameter-efficient fine-tuning without introducing new latency" (PaFi), arXiv:2305.16742, for
`score=magnitude:smallest=true`; Lee et al. 2019, "SNIP: single-shot network pruning", arXiv:1810.02340; Sung et al.
2021, "Training neural networks with fixed sparse masks", arXiv:2111.09839, for `fisher`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, objective
from tljax.strategies import _kernels as kernels
from tljax.types import Context, InputError, Mask, Params

DATA_DRIVEN = True

SCORES = ("random", "magnitude", "gradient", "snip", "fisher")
LOSSES = {"": None, "supervised_contrastive": objective.supervised_contrastive}


def strategy(
    params: Params,
    context: Context,
    *,
    score: str = "gradient",
    per: str = "tree",
    share: float = 0.05,
    count: int = 0,
    smallest: bool = False,
    on: str = "",
    also: str = "",
    loss: str = "",
) -> Mask:
    """`share` of the elements of what was kept train, or `count` of them, and whatever was drawn anew as a whole.

    - `score`: `random`, by context.key; `magnitude` |w|; `gradient` |g|, g being the mean gradient of L; `snip` |w g|;
      `fisher`, the mean squared gradient. `smallest=true` ranks the smallest first.
    - `per`: of which elements the share is: of all together (`tree`), of each `stage`, of each `leaf`, or of the inputs
      of each output `unit` of a kernel, whose other leaves stay frozen. Ties go to the first, so the number is exact.
    - `on=block_*/**/kernel+head/**` are the leaves to choose from, all by default; `also=**/bias` train whole.
    - `loss=supervised_contrastive`: of what the stage below the head gives, so that a new head has no say (GPS has two
      views of an image, and this has one).

    Raises InputError for an option of another value, globs that match nothing, and what `masks.top` refuses.
    """
    if score not in SCORES:
        raise InputError(f"top:score={score}: it is one of {', '.join(SCORES)}")
    if loss not in LOSSES:
        raise InputError(f"top:loss={loss}: leave it out for L, or give supervised_contrastive")
    if loss and score not in ("gradient", "snip"):
        raise InputError(f"top:loss={loss}: score={score} has no use for it: leave it out")
    if count < 0:
        raise InputError(f"top:count={count}: it is at least 1, or 0 for a share")
    among = masks.kept(params, context.fresh)
    units = kernels.input_axes(params, context.contracted) if per == "unit" else {}
    if per == "unit":
        if not units:
            raise InputError("top:per=unit: the model has no leaf 'kernel' whose output units are known")
        among = masks.intersect(among, masks.by_path(params, lambda path: path in units))
    if on:
        among = masks.intersect(among, masks.by_glob(params, *on.split("+")))
    whole = masks.by_glob(params, *also.split("+")) if also else None
    if whole is not None:
        among = masks.intersect(among, masks.invert(whole))
    chosen = masks.top(
        scores(params, context, score, loss),
        0.0 if count else share,
        among=among,
        per=per,
        count=count,
        smallest=smallest,
        stages=context.stages,
        inputs=units,
    )
    chosen = chosen if whole is None else masks.also(chosen, whole)
    return masks.also(chosen, context.fresh)


def scores(params: Params, context: Context, score: str, loss: str = "") -> Params:
    """The score of each element, a tree like the parameters, with None where there is none.

    Raises InputError where the context lacks what the score needs.
    """
    if score == "random":
        if context.key is None:
            raise InputError("top:score=random needs context.key: a key, such as jax.random.key(0)")
        return drawn(params, context.key)
    if score == "magnitude":
        return jax.tree.map(abs, params)
    if score == "fisher":
        if context.fisher is None:
            raise InputError("top:score=fisher needs context.fisher: a function from parameters to squared gradients")
        return context.fisher(params)
    if context.gradient is None:
        raise InputError(
            f"top:score={score} needs context.gradient: a function from parameters to the mean gradient of L"
        )
    function = LOSSES[loss]
    gradient = context.gradient(params, loss=function) if function else context.gradient(params)
    if score == "gradient":
        return jax.tree.map(abs, gradient)

    def snip(g: Any, w: Any) -> Any:
        return None if g is None else abs(g * w)

    return jax.tree.map(snip, gradient, params, is_leaf=lambda leaf: leaf is None)


def drawn(params: Params, key: jax.Array) -> Params:
    """A number between 0 and 1 for each element, in NumPy."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    flat = np.asarray(jax.random.uniform(key, (int(ends[-1]),)))  # one draw compiles once, whatever the tree
    pieces = [piece.reshape(shape) for piece, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), pieces)
