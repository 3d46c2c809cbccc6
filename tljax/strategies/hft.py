"""Train a half of each block's modules, drawn anew every few steps: the control of what chooses more cleverly.

Source: Hui et al. 2024, "HFT: Half fine-tuning for large language models", arXiv:2404.18466: in each round two of the
four projections of every attention and half of the other layers are frozen; the embedding and the head always train.
"""

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tljax import paths
from tljax.strategies import _moving as moving
from tljax.types import Context, MaskSchedule, Params, Seen


def strategy(params: Params, context: Context, *, every: int = 100) -> MaskSchedule:
    """A half, drawn anew every `every` steps, of the modules of each kind of each block; their moments begin anew.

    A module is the leaves of one container, such as a kernel and its bias; its kind is attention, norm or another. Of
    an odd number one more or one fewer are on, as it is drawn. A block is a stage between the first and the head; a
    norm goes with the stage below it, or with the head that follows it. Whatever was drawn anew is always on. Raises
    InputError for a number of steps below 1, for a model without such a stage, and for a leaf that can train but is in
    no stage.
    """
    moving.require_steps("hft", every=every)
    kinds: dict[tuple[int, str], dict[str, list[str]]] = {}
    inside = [paths.inside(block) for block in moving.middle(params, context, "hft")]
    for path in paths.names(params):
        block = next((i for i, test in enumerate(inside) if test(path)), None)
        if block is not None:
            container = path.removesuffix("/value").rpartition("/")[0]
            kinds.setdefault((block, kind(container)), {}).setdefault(container, []).append(path)
    modules = [leaves for stages_modules in kinds.values() for leaves in stages_modules.values()]
    groups = moving.in_blocks(params, modules, context.fresh)
    choose = functools.partial(half_of_each, counts=tuple(map(len, kinds.values())))
    scope = moving.everything(params)
    return MaskSchedule(moving.no_memory, choose, scope, every=every, off="dropped", groups=groups)


def kind(container: str) -> str:
    """'norm', 'attention' or 'other', by the path of a module.

    >>> [kind(path) for path in ("block_0/attention/query", "block_0/norm_0", "block_0/mlp/dense_0", "hidden_1")]
    ['attention', 'norm', 'other', 'other']
    """
    parts = container.split("/")
    if any(map(paths.is_norm, parts)):
        return "norm"
    return (
        "attention" if any(re.search(r"(attention|attn|mhs?a|msa)_?\d*$", part.lower()) for part in parts) else "other"
    )


def half_of_each(memory: tuple[()], seen: Seen, *, counts: Sequence[int]) -> tuple[Params, tuple[()]]:
    """A half of the first so many groups, of the next so many, and so on."""
    on = [jnp.ones(1, bool)]
    for i, count in enumerate(counts):
        order, odd = jax.random.split(jax.random.fold_in(seen.key, i))
        half = (count + jax.random.bernoulli(odd).astype(jnp.int32)) // 2
        on.append(jax.random.permutation(order, count) < half)
    return moving.groups_mask(seen.groups, jnp.concatenate(on)), memory
