"""Training equals NumPy, written out from the formulas, to 1e-12 over 50 steps in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, models, objective, optimizers, paths, penalties, plugins, train
from tljax.data import draw
from tljax.types import Context, Phase

STEPS, BATCH, RATE, DECAY, CLIP, ALPHA, BETA = 50, 16, 0.0625, 0.03125, 0.5, 0.125, 0.25
"""Numbers that float32 holds exactly, since that is what the rates and weights are passed as."""
RNG = np.random.default_rng(0)
FEATURES = RNG.uniform(size=(40, 3, 4, 1))
LABELS = RNG.integers(0, 3, 40).astype(np.int32)
STRATEGIES = ("full", "head_only", "layerwise_decay", "bias_only", "lp_ft", "l2_sp")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
QUICK = (
    ("full", "sgd"),
    ("head_only", "momentum"),
    ("layerwise_decay", "adam"),
    ("lp_ft", "adamw"),
    ("l2_sp", "adamw"),
)
PAIRS = [
    pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product(STRATEGIES, OPTIMIZERS)
]


def order(start, stop):
    return draw.order(0, 40, BATCH, start, stop, epochs=True, subset=None)


def trained_by_tljax(strategy, optimizer):
    """The parameters at the start and at the end, {path: float64 array}, the phases, and what is fresh."""
    model = models.build("mlp", 3, hidden=(6, 5), activation="relu")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), models.init(model, jax.random.key(0), (3, 4, 1)))
    fresh = masks.under(params, "head")
    method, options = plugins.method("full" if strategy == "l2_sp" else strategy)
    strategy_phases = method.strategy(params, Context(stages=models.names(model), fresh=fresh), **options)
    strategy_phases = strategy_phases if isinstance(strategy_phases, tuple | list) else [Phase(0.0, strategy_phases)]
    phases = tuple((round(phase.start * STEPS), phase.mask) for phase in strategy_phases)
    decay = DECAY if optimizer == "adamw" else 0.0
    momentum = 0.5 if optimizer == "momentum" else 0.0
    name = "sgd" if optimizer == "momentum" else optimizer
    optimizer_spec, numbers = optimizers.spec(name, momentum=momentum, weight_decay=decay, clip=CLIP)
    text = f"l2_sp:weight={ALPHA}:beta={BETA}" if strategy == "l2_sp" else ""
    terms, weights = penalties.read(text)
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec, terms)
    rates = np.full(STEPS, RATE, np.float32)
    fit = train.Fit(params, phases, order, rates, weights, numbers, jax.random.key(0), fresh)
    ends = sorted({STEPS, *(start for start, _ in phases[1:])})
    *_, (state, _) = train.fit(spec, [fit], train.load(FEATURES, LABELS), ends)
    flat = [
        {name: np.asarray(leaf) for name, leaf in paths.items(tree)}
        for tree in (params, jax.tree.map(lambda leaf: leaf[0], state.params))
    ]
    return *flat, phases, dict(paths.items(fresh))


def gradients(p, rows):
    """Of the mean cross-entropy of an MLP of two hidden layers."""
    inputs = [FEATURES[rows].reshape(len(rows), -1)]
    for stage in ("hidden_0", "hidden_1"):
        inputs.append(np.maximum(inputs[-1] @ p[f"{stage}/kernel"] + p[f"{stage}/bias"], 0))
    logits = inputs[-1] @ p["head/kernel"] + p["head/bias"]
    q = np.exp(logits - logits.max(1, keepdims=True))
    d = (q / q.sum(1, keepdims=True) - np.eye(3)[LABELS[rows]]) / len(rows)
    g = {}
    for stage, h in zip(("head", "hidden_1", "hidden_0"), reversed(inputs), strict=True):
        g[f"{stage}/kernel"], g[f"{stage}/bias"] = h.T @ d, d.sum(0)
        d = (d @ p[f"{stage}/kernel"].T) * (h > 0)
    return g


def direction(optimizer, g, memory):
    """What the optimizer makes of a clipped gradient, before the rate; `memory` is the leaf's own."""
    memory["t"] = memory.get("t", 0) + 1
    if optimizer == "sgd":
        return g
    if optimizer == "momentum":
        memory["m"] = 0.5 * memory.get("m", 0) + g
        return memory["m"]
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + (1 - 0.999) * g**2
    return memory["m"] / (1 - 0.9 ** memory["t"]) / (np.sqrt(memory["v"] / (1 - 0.999 ** memory["t"])) + 1e-8)


def trained_by_numpy(strategy, optimizer, start, phases, fresh):
    p, memories = {name: leaf.copy() for name, leaf in start.items()}, {name: {} for name in start}
    for step in range(STEPS):
        mask = [m for first, m in phases if first <= step][-1]
        scale = {name: float(m) for name, m in paths.items(mask)}
        rows = order(step, step + 1)[0]
        g = gradients(p, rows[rows >= 0])
        if strategy == "l2_sp":
            g = {n: g[n] + (BETA * p[n] if fresh[n] else ALPHA * (p[n] - start[n])) for n in g}
        g = {name: leaf for name, leaf in g.items() if scale[name]}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
        for name, leaf in g.items():
            move = direction(optimizer, leaf * min(1, CLIP / norm), memories[name])
            move = move + (DECAY * p[name] if optimizer == "adamw" else 0)
            p[name] = p[name] - RATE * scale[name] * move
    return p


@pytest.mark.parametrize(("strategy", "optimizer"), PAIRS)
def test_50_steps_equal_numpy(strategy, optimizer):
    with jax.enable_x64(True):
        start, end, phases, fresh = trained_by_tljax(strategy, optimizer)
    expected = trained_by_numpy(strategy, optimizer, start, phases, fresh)
    assert any(not np.array_equal(start[name], end[name]) for name in start)
    for name in start:
        assert end[name].dtype == np.float64
        np.testing.assert_allclose(end[name], expected[name], rtol=0, atol=1e-12, err_msg=name)
