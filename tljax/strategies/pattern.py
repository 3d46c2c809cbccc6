"""Train the leaves whose paths match globs, or all others.

Source: rules by path as in Beyer et al. 2022, "Big Vision", github.com/google-research/big_vision.
"""

import jax

from tljax import masks
from tljax.types import Context, InputError, Mask, Params


def strategy(params: Params, context: Context, *, train: str = "", freeze: str = "") -> Mask:
    """`train=**/kernel+head/**` trains what any of the globs matches (default **/kernel), and whatever was drawn anew.

    `freeze=**/bias` freezes what any of its globs matches, and trains the others: those that `train` matches, if it is
    given, and else all. Raises InputError for a glob that matches nothing, and where nothing is left to train.
    """
    if freeze and not train:
        mask = masks.by_path(params, lambda path: True)
    else:
        mask = masks.by_glob(params, *(train or "**/kernel").split("+"))
    if freeze:
        mask = masks.intersect(mask, masks.invert(masks.by_glob(params, *freeze.split("+"))))
        if context.fresh is None and not any(masks.trains(leaf) for leaf in jax.tree.leaves(mask)):
            raise InputError(f"pattern:freeze={freeze}: nothing is left to train")
    return masks.union(mask, context.fresh)
