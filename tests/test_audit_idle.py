"""What a step computes for nobody, held against the FLOPs of what XLA compiles, and against what steps give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import audit
from tljax.audit import idle

MASK = {"head": True, "trunk": False}
SIZE = 32
PARAMS = {name: jnp.ones((SIZE, SIZE)) for name in MASK}
BATCH = jnp.ones((SIZE, SIZE))


def loss(params, x):
    return jnp.tanh(jnp.tanh(x @ params["trunk"]) @ params["head"]).sum()


def logged(params, x):
    gradients = jax.grad(loss)(params, x)
    return params | {"head": params["head"] - gradients["head"]}, optax.tree.norm(gradients)


def times_zero(params, x):
    gradients = jax.grad(loss)(params, x)
    return {name: leaf - float(MASK[name]) * gradients[name] for name, leaf in params.items()}


def chosen(params, x):
    gradients = jax.grad(loss)(params, x)
    return {name: jnp.where(MASK[name], leaf - gradients[name], leaf) for name, leaf in params.items()}


def called_back(params, x):
    gradients = jax.grad(loss)(params, x)
    jax.debug.callback(lambda norm: None, optax.tree.norm(gradients))
    return params | {"head": params["head"] - gradients["head"]}


def accumulated(params, x):
    zeros = jax.tree.map(jnp.zeros_like, params)
    sums = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, jax.grad(loss)(params, x)), None), zeros, x[None])
    return params | {"head": params["head"] - sums[0]["head"]}


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (logged, "results beside the state"),
        (chosen, ""),
        pytest.param(called_back, "callbacks", marks=pytest.mark.slow),
        pytest.param(times_zero, "multiplied by 0", marks=pytest.mark.slow),
        pytest.param(accumulated, "", marks=pytest.mark.slow),
    ],
)
def test_gradients_cost_for_nobody_what_xla_does_not_drop(step, why):
    """The FLOPs that are named are those by which the compiled step exceeds one that differentiates the head alone."""

    def lean(params, x):
        gradient = jax.grad(lambda head: loss(params | {"head": head}, x))(params["head"])
        return params | {"head": params["head"] - gradient}

    findings = [finding for finding in audit.step(step, PARAMS, BATCH, MASK).select("idle") if finding.path == "trunk"]
    compiled = [jax.jit(f).lower(PARAMS, BATCH).compile().cost_analysis()["flops"] for f in (step, lean)]
    share = 1 - compiled[1] / compiled[0]
    assert bool(findings) == (share > 0.05) == bool(why)
    for finding in findings:
        assert why in finding.detail
        assert float(finding.detail.partition("(")[2].partition("%")[0]) / 100 == pytest.approx(share, abs=0.02)


def loops(carry_is_read):
    def body(carry, _):
        x, total = carry
        return (2.0 * x, total + x @ x), x @ x

    def scan(x):
        (kept, dropped), _ = jax.lax.scan(body, (x, x), None, length=3)
        return (kept, dropped) if carry_is_read else kept

    def turns(x):
        kept, dropped = jax.lax.fori_loop(0, 3, lambda _, carry: body(carry, None)[0], (x, x))
        return (kept, dropped) if carry_is_read else kept

    def nested(x):
        outer = jax.lax.scan(lambda carry, _: jax.lax.scan(body, carry, None, length=2), (x, x), None, length=3)[0]
        return outer if carry_is_read else outer[0]

    def choice(x):
        both = jax.lax.cond(x.sum() > 0, lambda: (2.0 * x, x @ x), lambda: (x, x))
        return both if carry_is_read else both[0]

    return scan, turns, nested, choice


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_xla_drops_what_is_not_live_in_loops_and_choices(number):
    """Its count has a loop's body once: products are either there or not."""
    for carry_is_read in (True, False):
        function = loops(carry_is_read)[number]
        compiled = jax.jit(function).lower(BATCH).compile().cost_analysis()["flops"]
        program = jax.make_jaxpr(function)(BATCH)
        counted = idle.live(program, [True] * len(program.jaxpr.outvars)).flops
        product = 2 * SIZE**3
        assert (compiled > product / 2) == (counted > product / 2) == carry_is_read


def test_what_is_wanted_decides_what_is_live():
    """A carry of a carry is live, and nothing of what a place does not read."""

    def step(x, y):
        def body(carry, _):
            a, b, c = carry
            return (a + b, b * 2.0, c @ c), None

        return jax.lax.scan(body, (x, y, x), None, length=2)[0]

    program = jax.make_jaxpr(step)(BATCH, BATCH)
    assert idle.live(program, [True, False, False]) == idle.live(program, [True, True, False])
    assert idle.live(program, [True, False, False]).flops == 2 * (SIZE**2 + SIZE**2)
    assert idle.live(program, [False, True, False]).inputs == (False, True)
    assert idle.live(program, [True, True, True]).flops == 2 * (2 * SIZE**2 + 2 * SIZE**3)
    assert idle.live(program, [True, False, False], {(0, 0, 0, 1)}).inputs == (True, False)


def test_state_that_a_step_forgets_is_named():
    tx = optax.sgd(0.1, momentum=0.9)

    def step(state, x):
        params, _ = state
        updates, kept = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
        return optax.apply_updates(params, updates), kept

    findings = audit.step(step, (PARAMS, tx.init(PARAMS)), BATCH, dict.fromkeys(MASK, True)).select("idle")
    assert {finding.path for finding in findings} == {"1/0/trace/head", "1/0/trace/trunk"}


def moved(key):
    return jax.random.split(key)[0]


@pytest.mark.parametrize(
    ("used", "after", "named"),
    [
        (lambda key, count: key, lambda key: key, "key"),
        (lambda key, count: jax.random.fold_in(key, count), lambda key: key, None),
        (lambda key, count: jax.random.split(key)[1], moved, None),
        (lambda key, count: jax.random.key(7), moved, "a constant key"),
    ],
    ids=["kept", "folded with a counter", "split", "constant"],
)
def test_the_same_draws_in_each_step_are_named(used, after, named):
    """Two steps from one place, but for the counter and the key: are the draws the same?"""

    def step(state, x):
        noise = jax.random.normal(used(state["key"], state["count"]), x.shape)
        return {"params": state["params"] + noise * x, "key": after(state["key"]), "count": state["count"] + 1}

    state, x = {"params": jnp.zeros(3), "key": jax.random.key(0), "count": jnp.int32(0)}, jnp.ones(3)
    idle_paths = [finding.path for finding in audit.step(step, state, x, True).select("idle")]
    first = step(state, x)
    second = step(first | {"params": state["params"]}, x)
    same = np.array_equal(first["params"], second["params"])
    assert idle_paths == ([named] if named else []) and same == bool(named)
