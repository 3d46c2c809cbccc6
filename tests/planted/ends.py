"""Planted: a `finish` with a fault each, and the strategies that it stands beside."""

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks
from tljax.types import Phase


def everything(params, context):
    return masks.by_path(params, lambda path: True)


def head(params, context):
    return masks.union(masks.under(params, context.stages[-1:]), context.fresh)


def some_elements(params, context):
    def draw(leaf, able):
        return np.arange(np.size(leaf)).reshape(np.shape(leaf)) % 2 == 0 if able and np.ndim(leaf) else able

    return masks.also(jax.tree.map(draw, params, everything(params, context)), context.fresh)


def until_it_is_flat(params, context):
    return [Phase(0.0, everything(params, context)), Phase(0.5, head(params, context), until=lambda scores: False)]


def of_floats(function, *trees):
    """A function of the leaves that are floats; others are as in the first tree."""
    return jax.tree.map(lambda *leaves: function(*leaves) if leaves[0].dtype.kind == "f" else leaves[0], *trees)


def forgets_to_name(params, start, context):
    return params


def drops_a_leaf(params, start, context):
    return {"end": {name: leaf for name, leaf in params.items() if name != context.stages[0]}}


def adds_an_axis(params, start, context):
    return {"end": of_floats(lambda leaf: leaf[None], params)}


def rounds(params, start, context):
    return {"end": of_floats(lambda leaf: leaf.astype(jnp.float16), params)}


def averages_counts(params, start, context):
    return {"end": jax.tree.map(lambda after, before: (after + before) / 2, params, start)}


def takes_a_name_that_is_taken(params, start, context):
    return {"best": params}


def names_by_values(params, start, context):
    length = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(params))
    return {f"length_{length:.3f}": params}


def fails(params, start, context):
    return {"end": params[context.stages[0]]["no_such_leaf"]}


def asks_for_phases(params, start, context, *, phases):
    return {"end": phases[-1]}


def shrinks_all(params, start, context):
    return {"all": of_floats(lambda leaf: 0.9 * leaf, params)}


def counts_on(params, start, context):
    return {"end": jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype.kind == "i" else leaf, params)}


def draws_anew(params, start, context):
    return {"noise": of_floats(lambda leaf: leaf + np.float32(np.random.normal()), params)}


def averages_by_logarithms(params, start, context):
    def mean(after, before):
        return jnp.exp((jnp.log(after) + jnp.log(before)) / 2)

    return {"end": of_floats(mean, params, start)}


def overflows(params, start, context):
    return {"large": of_floats(lambda leaf: jnp.sign(leaf) * jnp.float32(3e38), params)}
