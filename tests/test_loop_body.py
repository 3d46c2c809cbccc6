"""The loop over steps, lowered for a CPU and for CUDA: hardly more operations than the same in plain JAX has."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

from tljax import models, objective, optimizers, train
from tljax.train import step, vectorize
from tljax.train.step import Hyper

STEPS, BATCH, EXAMPLES, RATE = 64, 20, 200, 0.01
MODEL = models.build("mlp", 10, hidden=(16,), activation="relu")
MODES = {"map": (1, 1), "vmap": (4, 1), "vmap_shared": (4, 4)}
"""{mode: (fits, how many share an order)}."""
FREE = ("constant", "reshape", "broadcast_in_dim", "iota", "case")
"""Operations that a compiler makes part of others; a `case` has one branch, that of the platform."""
SAME = {"subtract": "add", "negate": "add", "dynamic_slice": "gather"}
"""{operation: another that stands for it}: p + (-r g) is p - r g, and a slice of many fits is a gather."""
PADDING = Counter(convert=1, dot_general=2)
"""A mean over what is no padding, and its gradient."""
LOG = Counter(concatenate=1)
"""One write a step of all that is kept, where plain JAX has one for each."""
BY_FIT = Counter(divide=1, multiply=1, transpose=1)
"""Of both, and a rate of its own, in several fits."""
NORM_ON_CPU = Counter(dot_general=4, optimization_barrier=4)
"""The norm of the gradient as a product for each leaf, so that devices do not change its bits."""
LAST_ON_CPU = Counter(transpose=10)
"""Fits that share an order lie along the last axis."""


def shape(*lengths, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(lengths, dtype)


@functools.cache
def params():
    return jax.eval_shape(lambda: models.init(MODEL, jax.random.key(0), (28, 28, 1)))


IMAGES, LABELS = shape(EXAMPLES, 28, 28, 1, dtype=jnp.uint8), shape(EXAMPLES, dtype=jnp.int32)


@functools.cache
def plain(fits):
    """What somebody would write for speed, traced: the loss and the gradient's norm of each step are kept."""

    def loss(params, x, y):
        x = x.astype(jnp.float32).reshape(len(x), -1) / 255
        hidden = jax.nn.relu(x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"][None])
        logits = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
        return -jnp.mean(jnp.sum(jax.nn.one_hot(y, 10) * jax.nn.log_softmax(logits), -1))

    def run(params, images, labels, order):
        def step(i, carry):
            params, losses, norms = carry
            value, gradients = jax.value_and_grad(loss)(params, images[order[i]], labels[order[i]])
            norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
            params = jax.tree.map(lambda leaf, gradient: leaf - RATE * gradient, params, gradients)
            return params, losses.at[i].set(value), norms.at[i].set(norm)

        return jax.lax.fori_loop(0, STEPS, step, (params, jnp.zeros(STEPS), jnp.zeros(STEPS)))

    if fits == 1:
        return jax.jit(run).trace(params(), IMAGES, LABELS, shape(STEPS, BATCH, dtype=jnp.int32))
    stacked = jax.tree.map(lambda leaf: shape(fits, *leaf.shape), params())
    order = shape(fits, STEPS, BATCH, dtype=jnp.int32)
    return jax.jit(jax.vmap(run, in_axes=(0, None, None, 0))).trace(stacked, IMAGES, LABELS, order)


def ours(mode, platform, **options):
    """The segment of the same fits, traced."""
    fits, width = MODES[mode]
    optimizer, numbers = optimizers.spec("sgd")
    spec = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), optimizer, **options)
    mask = jax.tree.map(lambda leaf: True, params())
    fit = train.Fit(params(), ((0, mask),), len, np.ones(STEPS), (), {**numbers, "label_smoothing": 0.0}, None)
    spec = train.specialize(spec, fit, (mask,))
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), fits))
    hyper = Hyper((), {"label_smoothing": shape(fits)}, (), key, None, None)
    stacked = jax.tree.map(lambda leaf: shape(fits, *leaf.shape), params())
    state = jax.eval_shape(functools.partial(vectorize.begin, spec), stacked, hyper, shape(fits))
    frozen = jax.tree.map(lambda leaf: None, params())
    order, rates = shape(fits // width, STEPS, BATCH, dtype=jnp.int32), shape(fits, STEPS)
    examples = (shape(1, *IMAGES.shape, dtype=jnp.uint8), LABELS, order, rates)
    arrays = (stacked, state, frozen, hyper, *examples, (0, 0, STEPS))
    return vectorize.segment.trace(spec, None, width, mode, *arrays, platform=platform)


def loops(traced, platform):
    """[(how many steps, the Counter of operations of a step)] of the innermost loops of a program over steps."""
    module = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    with module.context:
        functions = {op.name.value: op.regions[0].blocks[0] for op in module.body.operations if hasattr(op, "body")}
        whiles = [op for block in functions.values() for op in every(block) if op.name == "stablehlo.while"]
        steps = [(length(op), needed(op.regions[1].blocks[0], functions)) for op in whiles]
    return [(count, ops) for count, ops in steps if ops["gather"] and not ops["while"]]


def every(block):
    """All operations of a block and of those within."""
    for op in block.operations:
        yield op.operation
        for region in op.operation.regions:
            for inner in region.blocks:
                yield from every(inner)


def length(loop):
    """The constant that the counter of a loop is compared with; None where the loop does not know it beforehand."""
    compare = next(op for op in every(loop.regions[0].blocks[0]) if op.name == "stablehlo.compare")
    bound = compare.operands[1].owner
    if isinstance(bound, ir.Block) or bound.name != "stablehlo.constant":
        return None
    return int(ir.DenseIntElementsAttr(bound.attributes["value"])[0])


def needed(block, functions):
    """The Counter of the operations on arrays that the results of a block need, calls and branches within it."""
    counts, values = Counter(), set()
    for op in map(lambda op: op.operation, reversed(list(block.operations))):
        ends = op.name.endswith(".return")
        if not ends and not any(result in values for result in op.results):
            continue
        values.update(op.operands)
        name = op.name.removeprefix("stablehlo.")
        if name == "func.call":
            counts += needed(functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value], functions)
        for region in op.regions if name in ("case", "while") else ():
            inner = region.blocks[0]
            values.update(operand for each in every(inner) for operand in each.operands)
            counts += needed(inner, functions)
        on_arrays = any(ir.RankedTensorType(value.type).rank for value in (*op.operands, *op.results))
        if name == "while" or not (ends or name in (*FREE, "func.call") or not on_arrays):
            counts[SAME.get(name, name)] += 1
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_a_step_has_hardly_more_operations_than_in_plain_jax(mode):
    """And the host launches as many as a block has without looking at the device."""
    fits, _ = MODES[mode]
    [(count, base)] = loops(plain(fits), "cuda")
    assert count == STEPS and base["reduce"] > 9 and base["dot_general"] == 5
    [block, rest] = sorted(loops(ours(mode, "gpu"), "cuda"), key=lambda loop: loop[0] is None)
    assert (block[0], rest[0]) == (vectorize.BLOCK, None)
    assert block[1] == rest[1]
    assert block[1] - base <= PADDING + LOG + (BY_FIT if fits > 1 else Counter())


@pytest.mark.parametrize("mode", MODES)
def test_on_a_cpu_a_step_has_hardly_more_operations_than_in_plain_jax(mode):
    fits, width = MODES[mode]
    [(_, base)] = loops(plain(fits), "cpu")
    [(_, body)] = loops(ours(mode, "cpu"), "cpu")
    further = (BY_FIT if fits > 1 else Counter()) + (LAST_ON_CPU if width > 1 else Counter())
    assert body - base <= PADDING + LOG + NORM_ON_CPU + further


@pytest.mark.parametrize("squares", [step._sum_of_products, step._sum_of_squares])
def test_either_form_of_the_norm_sums_all_squares(squares):
    leaves = [np.random.default_rng(i).normal(size=size) for i, size in enumerate([(30, 20), (20,), (1,)])]
    exact = sum((leaf**2).sum() for leaf in leaves)
    assert float(squares([jnp.asarray(leaf, jnp.float32) for leaf in leaves])) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("first, last", [(0, 0), (3, 8), (3, 35), (0, 64), (5, 106)])
def test_blocks_of_steps_are_the_same_steps_in_the_same_order(first, last):
    def body(row, state):
        rows, count = state
        return rows.at[count].set(row), count + 1

    rows, count = _by_blocks(body)(first, last, jnp.full(128, -1))
    assert count == last - first
    assert rows.tolist() == [*range(first, last), *[-1] * (128 - last + first)]


@functools.cache
def _by_blocks(body):
    return jax.jit(lambda first, last, rows: vectorize._loop(first, last, body, (rows, 0), "gpu"))
