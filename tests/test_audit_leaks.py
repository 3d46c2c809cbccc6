"""Leaks: what the audit says of a step is what its numbers do when the gradient of a frozen leaf is another one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import audit, optimizer

MASK = {"head": True, "stem": False, "trunk": False}
ADAM = optax.adam(0.1)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), ADAM)


@jax.custom_vjp
def disturbed(leaf, noise):
    """The leaf; its gradient is greater by the noise."""
    return leaf


disturbed.defvjp(lambda leaf, noise: (leaf, noise), lambda noise, g: (g + noise, jnp.zeros_like(noise)))


def loss(params, x, noise=None):
    trunk = params["trunk"] if noise is None else disturbed(params["trunk"], noise)
    return jnp.square(jnp.tanh(jnp.tanh(x @ params["stem"]) @ trunk) @ params["head"]).mean()


def split(tx):
    return optax.partition({True: tx, False: optax.set_to_zero()}, MASK)


def by_norm(gradients):
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda leaf: leaf / norm, gradients)


def by_finite(gradients):
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)]).all()
    return jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), gradients)


def by_trained_norm(gradients):
    return by_norm({name: leaf if MASK[name] else jnp.zeros_like(leaf) for name, leaf in gradients.items()})


def norm_before():
    """Divides by the norm of the step before: what leaks does so through the state."""

    def update(gradients, norm, params=None):
        return jax.tree.map(lambda leaf: leaf / norm, gradients), optax.tree.norm(gradients)

    return optax.GradientTransformation(lambda params: jnp.ones(()), update)


LOOPS = {
    "clip outside": (optax.chain(optax.clip_by_global_norm(0.1), split(ADAM)), None, "optax's clip_by_global_norm"),
    "clip inside": (split(CLIPPED), None, ""),
    "norm by hand": (split(optax.sgd(0.1)), by_norm, "'add'"),
    "norm of what trains": (split(optax.sgd(0.1)), by_trained_norm, ""),
    "norm of the step before": (optax.chain(norm_before(), split(optax.sgd(0.1))), None, "depends on its gradient"),
    "clip of each leaf": (optax.chain(optax.adaptive_grad_clip(0.01), split(ADAM)), None, ""),
    "finite by hand": (split(ADAM), by_finite, "whether its gradient is finite"),
    "apply_if_finite": (
        optax.apply_if_finite(split(ADAM), 3),
        None,
        "whether its gradient is finite, by optax's apply",
    ),
    "apply_if_finite inside": (split(optax.apply_if_finite(ADAM, 3)), None, ""),
    "MultiSteps": (optax.MultiSteps(split(CLIPPED), 2).gradient_transformation(), None, ""),
    "masked": (optimizer.masked(CLIPPED, MASK), None, ""),
}
"""(optimizer, what is done with gradients before it, what the audit has to name: nothing where nothing leaks)."""


def descend(tx, change):
    def step(state, batch, noise=None):
        params, state = state
        gradients = jax.grad(loss)(params, batch, noise)
        updates, state = tx.update(change(gradients) if change else gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((3, 3)), jnp.float32) for name in (*MASK, "batch")}


QUICK = ("clip outside", "clip inside", "norm by hand", "norm of the step before")
"""Loops that compile in no time."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOOPS]
)
def test_a_leak_is_named_where_numbers_show_one_and_only_there(name, numbers):
    """An infinite gradient of the trunk in two steps: does the head's value become another?"""
    tx, change, named = LOOPS[name]
    step, params = descend(tx, change), {name: numbers[name] for name in MASK}
    (finding,) = [
        f
        for f in audit.step(step, (params, tx.init(params)), numbers["batch"], MASK).select("unseen")
        if f.path == "trunk"
    ]
    heads, step = [], jax.jit(step)
    for noise in (0.0, np.inf):
        state = params, tx.init(params)
        for _ in range(2):
            state = step(state, numbers["batch"], jnp.full((3, 3), noise))
        heads.append(np.asarray(state[0]["head"]))
    assert np.array_equal(*heads) != bool(named)
    assert finding.verdict == ("refuted" if named else "proved")
    assert named in finding.detail


def test_of_an_optimizer_the_same_is_said(numbers):
    params = {name: jax.ShapeDtypeStruct((3, 3), "float32") for name in MASK}
    for tx, change, named in LOOPS.values():
        if change is None:
            verdicts = {finding.verdict for finding in audit.optimizer(tx, params, MASK).select("unseen")}
            assert verdicts == ({"refuted"} if named else {"proved"})


def test_a_line_that_is_only_logged_is_not_blamed(numbers):
    params = {name: numbers[name] for name in MASK}

    def step(state, batch):
        gradients = jax.grad(loss)(state, batch)
        logged = optax.tree.norm(gradients)
        used = by_norm(gradients)
        return {name: leaf - used[name] * MASK[name] for name, leaf in state.items()}, logged

    (first, _) = audit.step(step, params, numbers["batch"], MASK).select("unseen")
    assert (
        first.source == f"test_audit_leaks.py:{by_norm.__code__.co_firstlineno + 1} (by_norm)"
        and first.verdict == "refuted"
    )


def test_a_gradient_that_a_frozen_leaf_shares_with_a_trained_one_is_no_leak():
    """Of x (W + D) with W frozen, the gradient of D is that of W."""
    params = {"D": jnp.ones((3, 3)), "W": jnp.ones((3, 3))}

    def step(params, x):
        gradients = jax.grad(lambda p: jnp.square(x @ (p["W"] + p["D"])).sum())(params)
        return params | {"D": params["D"] - 0.1 * gradients["D"], "W": params["W"] - 0.0 * gradients["W"]}

    assert not audit.step(step, params, jnp.ones((2, 3)), {"D": True, "W": False}).refuted


def test_gradients_by_hand_are_not_told_from_other_numbers():
    params = {"frozen": jnp.ones((3, 3)), "trained": jnp.ones((3, 3))}

    def step(params, x):
        hidden = x @ params["frozen"]
        error = hidden @ params["trained"]
        gradients = {"trained": hidden.T @ error, "frozen": x.T @ error @ params["trained"].T}
        scale = 1 / (1 + optax.tree.norm(gradients))
        return params | {"trained": params["trained"] - scale * gradients["trained"]}

    (finding,) = audit.step(step, params, jnp.ones((2, 3)), {"frozen": False, "trained": True}).select("unseen")
    assert finding.verdict == "not decided" and "no backward pass" in finding.detail


@jax.custom_vjp
def affine(x, scale, shift):
    return x * scale + shift


affine.defvjp(
    lambda x, scale, shift: (affine(x, scale, shift), (x, scale)),
    lambda kept, g: (g * kept[1], g * kept[0], g),
)


def affine_loss(params, x):
    return jnp.square(affine(x, params["scale"], params["shift"])).sum()


@pytest.mark.parametrize("leaks", [True, False])
def test_a_gradient_that_may_be_that_of_a_frozen_leaf_is_decided_by_the_loss_alone(leaks):
    """A custom derivative gives the gradients of two leaves of one shape in whatever order it likes."""

    @jax.jit
    def step(params, x):
        gradients = jax.grad(lambda params: 8.0 * affine_loss(params, x))(params)
        scale = gradients["scale"] / (1 + jnp.square(gradients["shift"]).sum() if leaks else 8.0)
        return params | {"scale": params["scale"] - scale}

    params, mask = {name: jnp.ones((3,)) for name in ("scale", "shift")}, {"scale": True, "shift": False}
    (finding,) = audit.step(step, params, jnp.arange(3.0), mask).select("unseen")
    assert finding.verdict == "not decided"
    (finding,) = audit.step(step, params, jnp.arange(3.0), mask, loss=affine_loss).select("unseen")
    assert finding.verdict == ("refuted" if leaks else "proved")


@pytest.mark.parametrize("leaks", [True, False])
def test_of_leaves_in_one_vector_a_leak_is_refuted_where_a_run_shows_it_alone(leaks):
    """What `optax.flatten` keeps of all leaves in one array of its state does not tell whose it is."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)) if leaks else optax.adam(0.1)
    zero = optax.masked(optax.set_to_zero(), {"a": False, "b": True, "c": True})
    params = {name: jnp.ones(3) for name in "abc"}
    report = audit.optimizer(optax.chain(optax.flatten(inner), zero), params, {"a": True, "b": False, "c": False})
    assert [f.verdict for f in report.select("unseen")] == ["refuted" if leaks else "not decided"] * 2
    assert leaks or "through the state: no run shows that it does" in report.select("unseen")[0].detail


ROWS = np.array([[True], [False], [True]]) & np.ones((3, 3), bool)
"""The rows of a leaf that train."""


def unit_norms(leaf, axis):
    return leaf / jnp.sqrt(jnp.square(leaf).sum(axis, keepdims=True))


PARTLY = {
    "the norm of a row": (lambda g: unit_norms(g, 1), False, "'reduce_sum'"),
    "the norm of a column": (lambda g: unit_norms(g, 0), True, "added to it makes"),
    "a row that is finite": (lambda g: jnp.where(jnp.isfinite(g).all(1, keepdims=True), g, 0.0), False, "'reduce_and'"),
    "a column that is finite": (lambda g: jnp.where(jnp.isfinite(g).all(0), g, 0.0), True, "whether its gradient is f"),
    "sorted and put back": (lambda g: jnp.sort(g, 1), False, "'sort'"),
    "sorted columns": (lambda g: jnp.sort(g, 0), True, "by 'sort'"),
}


@pytest.mark.parametrize("name", PARTLY)
def test_elements_of_a_leaf_that_cannot_be_told_apart_are_not_decided_but_where_numbers_show_a_leak(name, numbers):
    change, leaks, named = PARTLY[name]
    params, batch = {name: numbers[name] for name in MASK}, numbers["batch"]

    def step(params, batch):
        gradient = change(jax.grad(loss)(params, batch)["trunk"])
        return {**params, "trunk": params["trunk"] - 0.1 * jnp.where(ROWS, gradient, 0.0)}

    findings = audit.step(step, params, batch, {**MASK, "head": False, "trunk": ROWS}).select("unseen")
    (finding,) = [finding for finding in findings if finding.path == "trunk"]
    gradient = jax.grad(loss)(params, batch)["trunk"]
    others = [change(jnp.where(ROWS, gradient, number)) for number in (0.0, 1e6, np.inf)]
    assert leaks != all(np.array_equal(change(gradient)[ROWS], other[ROWS]) for other in others)
    assert finding.verdict == ("refuted" if leaks else "not decided") and named in finding.detail
