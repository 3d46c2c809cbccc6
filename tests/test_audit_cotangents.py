"""Which value of a traced step is the gradient of which leaf: held against gradients whose order is known."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec

from tljax.audit.cotangents import cotangents

BIAS, KERNEL = jax.ShapeDtypeStruct((4,), "float32"), jax.ShapeDtypeStruct((4, 4), "float32")
LAYERS = [{"b": BIAS, "w": KERNEL}] * 3
"""Leaves of one shape, which one line reads in turn; the batch has their shape as well."""


def dense(h, layer):
    return jnp.tanh(h @ layer["w"] + layer["b"][None])


def loss(layers, x, dense=dense):
    return functools.reduce(dense, layers, x).sum()


def of_one_example(layers, x):
    return functools.reduce(lambda h, layer: h + jnp.tanh(layer["w"] @ h + layer["b"]), layers, x[0]).sum()


def tied(layers, x):
    return loss([layers[0], layers[1], layers[0], layers[2]], x, jax.jit(dense)) + 0.1 * sum(
        jnp.square(leaf).sum() for leaf in jax.tree.leaves(layers)
    )


def scanned(layers, x):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return jax.lax.scan(lambda h, layer: (dense(h, layer), None), x, stacked)[0].sum()


def carried(layers, x):
    return jax.lax.scan(lambda h, _: (functools.reduce(dense, layers, h), None), x, length=2)[0].sum()


def chosen(layers, x):
    return jax.lax.cond(x.sum() > 0, loss, lambda layers, x: loss(layers[::-1], x), layers, x)


def half(layers, x):
    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layers)
    return 128.0 * loss(layers, x.astype(jnp.bfloat16)).astype(jnp.float32)


def sharpness_aware(layers, x):
    gradients = jax.grad(loss)(layers, x)
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
    return jax.grad(loss)(jax.tree.map(lambda p, g: p + 0.1 * g / norm, layers, gradients), x)


def on_devices(layers, x):
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("devices")), "out_specs": PartitionSpec()}
    return jax.shard_map(lambda layers, x: jax.lax.psum(loss(layers, x), "devices"), mesh=mesh, **specs)(layers, x)


GRADIENTS = {
    "grad": jax.grad(loss),
    "jit of grad": jax.jit(jax.grad(loss)),
    "grad of jit": jax.grad(jax.jit(loss)),
    "with an auxiliary output": lambda layers, x: jax.value_and_grad(lambda p: (loss(p, x), x), has_aux=True)(layers)[
        1
    ],
    "remat": jax.grad(jax.checkpoint(loss)),
    "jit of layers": jax.grad(functools.partial(loss, dense=jax.jit(dense))),
    "remat of layers": jax.grad(functools.partial(loss, dense=jax.checkpoint(dense))),
    "vjp": lambda layers, x: jax.vjp(loss, layers, x)[1](1.0)[0],
    "vmap": lambda layers, x: jax.vmap(jax.grad(loss), (None, 0))(layers, jnp.stack([x, x])),
    "one example": jax.grad(of_one_example),
    "tied, decayed": jax.grad(tied),
    "scan": jax.grad(scanned),
    "scan whose constants they are": jax.grad(carried),
    "remat of scan": jax.grad(jax.checkpoint(carried)),
    "cond": jax.grad(chosen),
    "SAM": sharpness_aware,
    "shard_map": jax.grad(on_devices),
    "of the batch as well": lambda layers, x: jax.grad(loss)(layers, x + jnp.sign(jax.grad(loss, 1)(layers, x))),
}


def paths_of(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_named_in_the_order_of_their_tree(name):
    program = jax.make_jaxpr(GRADIENTS[name])(LAYERS, KERNEL)
    paths = paths_of(LAYERS)
    labels = cotangents(program, dict(enumerate(paths)))
    assert [labels[-1, number] for number in range(len(paths))] == [((path,), True) for path in paths]


def micro_batches(gradient, layers, x):
    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(layers, part)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, layers), jnp.stack([x, x]))[0]


@pytest.mark.parametrize(
    "gradient",
    [
        functools.partial(micro_batches, jax.grad(loss)),
        lambda layers, x: jax.tree.map(lambda g: g / 128, jax.grad(half)(layers, x)),
        lambda layers, x: jax.pmap(
            lambda p, x: jax.lax.pmean(jax.grad(loss)(p, x), "i"), axis_name="i", in_axes=(None, 0)
        )(layers, x[None]),
    ],
    ids=["micro-batches", "bfloat16, scaled", "pmap"],
)
def test_what_is_done_with_a_gradient_reads_that_of_the_leaf_in_its_place(gradient):
    """Sums, casts and means over devices read the gradients outside the backward pass, in the order of the tree."""
    program = jax.make_jaxpr(gradient)(LAYERS, KERNEL)
    labels = cotangents(program, dict(enumerate(paths_of(LAYERS))))
    assert [labels[place] for place in sorted(labels)] == [((path,), True) for path in paths_of(LAYERS)]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.remat(nn.Dense)(4)(x)
        x = nn.MultiHeadDotProductAttention(2)(x[None])[0]
        for _ in range(2):
            x = nn.LayerNorm()(x)
        return x.sum()


def test_modules_of_linen_are_told_apart():
    model = Network()
    variables = jax.eval_shape(model.init, jax.random.key(0), KERNEL)
    program = jax.make_jaxpr(jax.grad(model.apply))(variables, KERNEL)
    labels = cotangents(program, dict(enumerate(paths_of(variables))))
    assert [labels[-1, n] for n in range(len(labels))] == [((path,), True) for path in paths_of(variables)]


def test_modules_of_nnx_are_told_apart():
    graph, state = nnx.split(nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(3))))

    def gradient(state, x):
        return nnx.grad(lambda model: jnp.tanh(model(x)).sum())(nnx.merge(graph, state))

    program = jax.make_jaxpr(gradient)(state, KERNEL)
    labels = cotangents(program, dict(enumerate(paths_of(state))))
    assert [labels[-1, n] for n in range(len(labels))] == [((path,), True) for path in paths_of(state)]


def test_terms_of_a_sum_share_a_gradient():
    """The gradients of W and of its change D are one value under x (W + D)."""
    program = jax.make_jaxpr(jax.grad(lambda p, x: jnp.tanh(x @ (p["W"] + p["D"])).sum()))(
        {"W": KERNEL, "D": KERNEL}, KERNEL
    )
    labels = cotangents(program, {0: "D", 1: "W"})
    assert labels == {(-1, 0): (("D", "W"), True), (-1, 1): (("D", "W"), True)}


@jax.custom_vjp
def affine(x, scale, shift):
    return x * scale[None] + shift[None]


affine.defvjp(
    lambda x, scale, shift: (affine(x, scale, shift), (x, scale)),
    lambda kept, g: (g * kept[1][None], (g * kept[0]).sum(0), g.sum(0)),
)


def in_turn(layers, x):
    """Forward passes first, then their backward passes in the same order: a reversal would mistake them."""
    passes = [jax.vjp(lambda p: dense(x, p).sum(), layer)[1] for layer in layers]
    return [backward(1.0)[0] for backward in passes]


def raveled(layers, x):
    flat, unravel = ravel_pytree(layers)
    return unravel(jax.grad(lambda flat: loss(unravel(flat), x))(flat))


@pytest.mark.parametrize(
    ("gradient", "params", "candidates"),
    [
        (jax.grad(lambda p, x: affine(x, **p).sum()), {"scale": BIAS, "shift": BIAS}, {("['scale']", "['shift']")}),
        (in_turn, LAYERS, {("[0]['b']", "[1]['b']", "[2]['b']"), ("[0]['w']", "[1]['w']", "[2]['w']")}),
        (raveled, LAYERS, {tuple(paths_of(LAYERS))}),
    ],
    ids=["custom_vjp", "passes in turn", "raveled"],
)
def test_what_is_not_certain_is_not_assigned(gradient, params, candidates):
    labels = cotangents(jax.make_jaxpr(gradient)(params, KERNEL), dict(enumerate(paths_of(params))))
    assert {label.leaves for label in labels.values()} == candidates
    assert not any(label.assigned for label in labels.values())


def test_a_gradient_of_the_batch_is_that_of_no_leaf():
    assert cotangents(jax.make_jaxpr(jax.grad(loss, 1))(LAYERS, KERNEL), dict(enumerate(paths_of(LAYERS)))) == {}


def test_a_scope_that_is_called_transpose_is_no_backward_pass():
    def step(x):
        with jax.named_scope("transpose(jvp())"):
            return 2 * x

    assert cotangents(jax.make_jaxpr(step)(KERNEL), {0: "w"}) == {}
