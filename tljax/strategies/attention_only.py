"""Train the attention alone.

Source: Touvron et al. 2022, "Three things everyone should know about vision transformers", arXiv:2203.09795, section 4:
the weights of the attention layers, without the layers between them.
"""

import re

from tljax import masks, paths
from tljax.types import Context, InputError, Mask, Params

_TRIPLES = (("query", "key", "value"), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"))
_FUSED = ("qkv", "in_proj", "in_proj_weight", "in_proj_bias", "c_attn")
_OUT = ("out", "o", "proj", "out_proj", "o_proj", "c_proj")


def strategy(params: Params, context: Context) -> Mask:
    """Queries, keys, values and what projects their outputs train, and whatever was drawn anew; norms stay frozen.

    Attention is what lies in a container whose name ends in attention, attn, mha, mhsa or msa (and a number); in any
    other container, the projections beside each other: `query, key, value`, `q, k, v` or `q_proj, k_proj, v_proj`, or
    fused as `qkv`, `in_proj` or `c_attn`, and with them `out`, `o`, `proj`, `out_proj`, `o_proj` or `c_proj`. Raises
    InputError for a model without any.
    """
    short = dict(zip(paths.names(params), map(_parts, paths.unboxed_names(params)), strict=True))
    children: dict[tuple[str, ...], set[str]] = {}
    for parts in short.values():
        for i, name in enumerate(parts):
            children.setdefault(parts[:i], set()).add(name)

    def is_attention(path: str) -> bool:
        parts = short[path]
        containers = parts[:-1]
        if any(map(paths.is_norm, containers)):
            return False
        return any(map(_named, containers)) or any(
            name in _projections(children[parts[:i]]) for i, name in enumerate(parts)
        )

    try:
        mask = masks.by_path(params, is_attention)
    except InputError as error:
        raise InputError(
            "attention_only: the model has no attention, such as 'block_0/attention/query/kernel': it is for "
            "transformers; give norm_only, bias_only or last_k, say"
        ) from error
    return masks.union(mask, context.fresh)


def _parts(path: str) -> tuple[str, ...]:
    """The names in a path; a flat state_dict has dots in its own."""
    return tuple(re.split("[/.]", path.removesuffix("/value")))


def _named(name: str) -> bool:
    """Whether a container's name is that of attention.

    >>> [_named(name) for name in ("attention", "SelfAttention_0", "attn1", "cross_attn", "attention_norm", "attend")]
    [True, True, True, True, False, False]
    """
    return re.search(r"(attention|attn|mhs?a|msa)_?\d*$", name.lower()) is not None


def _projections(names: set[str]) -> set[str]:
    """Which of the names in a container are attention's projections; none of a container without attention.

    >>> sorted(_projections({"q", "k", "v", "o", "mlp"})), _projections({"out", "proj"})
    (['k', 'o', 'q', 'v'], set())
    """
    inward = {name for triple in _TRIPLES if names.issuperset(triple) for name in triple} | names.intersection(_FUSED)
    return inward | names.intersection(_OUT) if inward else set()
