"""Train any stages, or copy the first of them and draw the rest anew.

Source: Lee et al. 2023, "Surgical fine-tuning improves adaptation to distribution shifts", arXiv:2210.11466 (train=);
Yosinski et al. 2014, "How transferable are features in deep neural networks?", arXiv:1411.1792 (redraw=).
"""

from collections.abc import Sequence

from tljax import masks
from tljax.plugins import nearest
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError, Mask, Params


def strategy(
    params: Params, context: Context, *, train: str = "", freeze: str = "", redraw: str = "", copy: int = 0
) -> Mask:
    """`train=hidden_0+head` trains these stages, by default the first, and what was drawn anew; `freeze=hidden_0` all
    others.

    `redraw=above:copy=n` copies the first n stages and draws the others anew, which train: with the copied ones
    frozen (Yosinski's AnB), or with `freeze=false` trained too (AnB+). Raises InputError for a stage that the model
    has not, an n that leaves no stage to copy or to draw, options of one use given with the other, where no stage is
    left to train, without context.stages, and, where stages train for not being named, for a leaf that can train but is
    in none of them.
    """
    layers.require_stages("stages", context.stages)
    drawn, word = reinit(context, redraw=redraw, copy=copy), str(freeze).lower()
    frozen = freeze.split("+") if word not in ("", "true", "false") else []
    uses = [f"{name}=" for name, value in (("train", train), ("freeze", frozen), ("redraw", drawn)) if value]
    if len(uses) > 1:
        raise InputError(f"stages: {' and '.join(uses)} are {('two', 'three')[len(uses) - 2]} uses: keep one")
    if not drawn and word == "false":
        raise InputError("stages:freeze=false: it goes with redraw=above:copy=n")
    if frozen or drawn:
        layers.require_all("stages", params, context.stages)
    names = tuple(train.split("+")) if train else context.stages[:1]
    if drawn:
        names = context.stages if word == "false" else tuple(drawn)
    for name in (*names, *frozen):
        if name not in context.stages:
            raise InputError(f"stages: the model has no stage '{name}'{nearest(name, context.stages)}")
    if frozen:
        names = tuple(name for name in context.stages if name not in frozen)
        if not names and context.fresh is None:
            raise InputError(f"stages:freeze={freeze}: no stage is left to train")
    return masks.union(masks.under(params, names) if names or not frozen else None, context.fresh)


def reinit(context: Context, *, redraw: str = "", copy: int = 0) -> Sequence[str]:
    """With `redraw=above`, the stages after the first `copy`; else none."""
    if redraw not in ("", "above"):
        raise InputError(f"stages:redraw={redraw}: the one value is 'above'")
    if not redraw and copy:
        raise InputError(f"stages:copy={copy}: it goes with redraw=above")
    if redraw:
        layers.require_stages("stages", context.stages)
    most = len(context.stages) - 1
    if redraw and not 1 <= copy <= most:
        raise InputError(f"stages:redraw=above:copy={copy}: of {most + 1} stages copy 1 to {most}")
    return context.stages[copy:] if redraw else ()
