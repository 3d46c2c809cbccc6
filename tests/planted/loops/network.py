"""The network of the plain loops: two dense layers, as a tree of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def init(classes=2):
    return {
        "backbone": {"kernel": draw(3, 4), "bias": draw(4)},
        "head": {"kernel": draw(4, classes), "bias": draw(classes)},
    }


def by_layer(params, value):
    """A tree of the parameters with the value of each layer's name at its leaves."""
    return {name: jax.tree.map(functools.partial(_other, value(name)), layer) for name, layer in params.items()}


def _other(value, _):
    return value


def head_only(params):
    return by_layer(params, lambda name: name == "head")


def batch(seed=1):
    return {"x": draw(6, 3, seed=seed), "y": draw(6, 2, seed=seed + 1)}


def forward(params, x):
    hidden = jnp.tanh(x @ params["backbone"]["kernel"] + params["backbone"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, batch):
    return jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2)
