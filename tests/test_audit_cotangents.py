"""Which value of a traced step is the gradient of which leaf: held against gradients whose order is known."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tljax.audit.cotangents import cotangents

LAYERS = [{"b": jax.ShapeDtypeStruct((4,), "float32"), "w": jax.ShapeDtypeStruct((4, 4), "float32")}] * 3
X = jax.ShapeDtypeStruct((4, 4), "float32")


def dense(h, layer):
    return jnp.tanh(h @ layer["w"] + layer["b"][None])


def loss(layers, x, dense=dense):
    return functools.reduce(dense, layers, x).sum()


PROGRAMS = {
    "grad": jax.grad(loss),
    "jit of grad": jax.jit(jax.grad(loss)),
    "grad of jit": jax.grad(jax.jit(loss)),
    "remat": jax.grad(jax.checkpoint(loss)),
    "jit of layers": jax.grad(functools.partial(loss, dense=jax.jit(dense))),
    "remat of layers": jax.grad(functools.partial(loss, dense=jax.checkpoint(dense))),
    "vjp": lambda layers, x: jax.vjp(loss, layers, x)[1](1.0)[0],
    "vmap": lambda layers, x: jax.vmap(jax.grad(loss), (None, 0))(layers, jnp.stack([x, x])),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_named_in_the_order_of_the_tree(name):
    """Layers of one shape that one line reads in turn: the gradient's own tree says which is whose."""
    program = jax.make_jaxpr(PROGRAMS[name])(LAYERS, X)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(LAYERS)]
    labels = cotangents(program, dict(enumerate(paths)))
    assert [labels[-1, number] for number in range(len(paths))] == [((path,), True) for path in paths]
