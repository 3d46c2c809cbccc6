"""Phases: a leaf freed late starts as on step 0, one that stays keeps its moments, whatever the optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import masks, optimizer, paths
from tljax.types import InputError

PARAMS = {
    "a": np.arange(6.0).reshape(3, 2) / 3,
    "b": {"w": np.array([0.5, -1.0]), "s": np.array([1.0])},
    "c": np.ones(4),
}
FREED = [("c",), ("c", "b"), ("a", "b"), ("a", "b", "c")]
MASKS = [masks.by_path(PARAMS, lambda path, on=on: path.split("/")[0] in on) for on in FREED]
STEPS = 3

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "sm3": optax.sm3(0.1),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "scheduled": optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda t: -0.1 / (1 + t))),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "multisteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "masked inside": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), lambda t: jax.tree.map(lambda x: x.ndim > 1, t)), optax.adam(0.1)
    ),
}


def gradients(params, step):
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), params)


def train(tx, phases=MASKS, stop=None):
    """Parameters and states at the end of every phase."""
    params, state, before, seen = jax.tree.map(jnp.asarray, PARAMS), None, None, []
    for i, mask in enumerate(phases):
        after = (mask, masks.since(*phases[: i + 1]))
        state = (
            optimizer.masked(tx, *after).init(params) if i == 0 else optimizer.carry(tx, before, after, state, params)
        )
        update = jax.jit(optimizer.masked(tx, *after).update)
        for step in range(STEPS):
            updates, state = update(gradients(params, STEPS * i + step), state, params)
            params = optax.apply_updates(params, updates)
        before = after
        seen.append((params, state))
    return seen


@functools.cache
def trained(name):
    """The same of an optimizer over all four phases, once for the tests that only look."""
    return train(OPTIMIZERS[name])


def numpy_adam(clip):
    """Adam with a count a leaf, clipped over all leaves that train: what phases promise, in float64."""
    p = {name: np.array(leaf) for name, leaf in paths.items(PARAMS)}
    m, v, t, seen = {}, {}, {}, []
    for i, on in enumerate(FREED):
        trained = [name for name in p if name.split("/")[0] in on]
        for name in set(t) - set(trained):
            del m[name], v[name], t[name]
        for step in range(STEPS):
            g = {name: np.sin(3 * p[name] + STEPS * i + step) for name in trained}
            norm = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
            for name in trained:
                leaf = g[name] * min(1, clip / norm)
                t[name] = t.get(name, 0) + 1
                m[name] = 0.9 * m.get(name, 0) + 0.1 * leaf
                v[name] = 0.999 * v.get(name, 0) + 0.001 * leaf**2
                hat = m[name] / (1 - 0.9 ** t[name]), v[name] / (1 - 0.999 ** t[name])
                p[name] = p[name] - 0.1 * hat[0] / (np.sqrt(hat[1]) + 1e-8)
        seen.append({name: leaf.copy() for name, leaf in p.items()})
    return seen


def test_clipped_adam_over_four_phases_equals_numpy_in_float64():
    with jax.enable_x64(True):
        for (params, _), expected in zip(train(OPTIMIZERS["clipped adam"]), numpy_adam(0.5), strict=True):
            for name, leaf in paths.items(params):
                np.testing.assert_allclose(leaf, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_newly_freed_leaf_moves_as_on_step_0(name):
    """For optimizers that see leaves one by one: as if it had been alone, with the same gradients."""
    if name in ("clipped adam", "scheduled"):
        pytest.skip("its update depends on the other leaves or on the time")
    tx = OPTIMIZERS[name]
    (before, _), (after, _) = trained(name)[:2]
    alone = {"b": before["b"]}
    state = tx.init(alone)
    for step in range(STEPS):
        updates, state = tx.update(gradients(alone, STEPS + step), state, alone)
        alone = optax.apply_updates(alone, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), alone["b"], after["b"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_leaf_that_stays_trained_never_notices_the_boundary(name):
    if name == "clipped adam":
        pytest.skip("its update depends on the other leaves")
    tx = OPTIMIZERS[name]
    after, _ = trained(name)[1]
    alone = {"c": jnp.asarray(PARAMS["c"])}
    state = tx.init(alone)
    for step in range(2 * STEPS):
        updates, state = tx.update(gradients(alone, step), state, alone)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_allclose(alone["c"], after["c"], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_keep_their_bytes_and_give_up_their_state(name):
    seen = trained(name)
    assert np.asarray(seen[2][0]["c"]).tobytes() == np.asarray(seen[1][0]["c"]).tobytes()
    for (_, state), on in zip(seen, FREED, strict=True):
        held = {part for path in paths.names(state) for part in path.split("/")} & {"a", "b", "c"}
        assert held <= set(on)


def test_a_leaf_freed_again_starts_anew():
    """'c' trains in the first two phases, rests in the third, and comes back in the fourth."""
    assert masks.since(*MASKS) == {"a": 2, "b": {"w": 1, "s": 1}, "c": 3}
    _, state = trained("adam")[-1]
    assert [int(counters[0]) for counters in ((state.state[0].count,), *state.younger)] == [9, 6, 3]


def test_a_live_hyper_parameter_is_kept_and_serves_all_cohorts():
    tx, (first, second) = OPTIMIZERS["inject"], MASKS[:2]
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.masked(tx, first).init(params)
    state = optax.tree.set(state, learning_rate=0.5)
    after = (second, masks.since(first, second))
    state = optimizer.carry(tx, (first, None), after, state, params)
    assert float(optax.tree.get(state, "learning_rate")) == 0.5
    updates, _ = optimizer.masked(tx, *after).update(gradients(params, 0), state, params)
    np.testing.assert_allclose(np.abs(updates["b"]["w"]), 0.5, rtol=1e-4)


def test_schedules_go_on_at_a_boundary():
    tx, (first, second) = OPTIMIZERS["scheduled"], MASKS[:2]
    [(params, state)] = train(tx, [first])
    after = (second, masks.since(first, second))
    state = optimizer.carry(tx, (first, masks.since(first)), after, state, params)
    updates, _ = optimizer.masked(tx, *after).update(gradients(params, 0), state, params)
    np.testing.assert_allclose(np.abs(updates["b"]["w"]), 0.1 / 4, rtol=1e-4)


def test_the_state_of_another_mask_is_refused_with_the_remedy():
    tx, params = optax.adam(0.1), jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.masked(tx, MASKS[0]).init(params)
    with pytest.raises(InputError, match=r"optimizer\.carry"):
        jax.jit(optimizer.masked(tx, MASKS[1]).update)(gradients(params, 0), state, params)


STACK = {"w": np.arange(12.0).reshape(4, 3) / 7 - 0.6, "head": np.array([0.5, -1.0])}
LAYERS = [(3,), (2, 3), (0, 3), (0, 1, 2, 3)]
"""Which rows of 'w' train in each phase; the head always."""


def layers(rows):
    return {"w": np.isin(np.arange(4), rows)[:, None], "head": True}


def numpy_adam_by_element(clip):
    """Adam with a count for each row of a stack, clipped over all that trains: in float64."""
    p, seen = {name: np.array(leaf) for name, leaf in STACK.items()}, []
    m, v = ({name: np.zeros(leaf.shape) for name, leaf in STACK.items()} for _ in range(2))
    t = {"w": np.zeros((4, 1)), "head": np.zeros(1)}
    for i, rows in enumerate(LAYERS):
        on = {"w": np.isin(np.arange(4), rows)[:, None], "head": np.ones(1, bool)}
        for name in p:
            m[name], v[name], t[name] = (np.where(on[name], leaf[name], 0) for leaf in (m, v, t))
        for step in range(STEPS):
            g = {name: np.where(on[name], np.sin(3 * p[name] + STEPS * i + step), 0) for name in p}
            norm = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
            for name in p:
                leaf = g[name] * min(1, clip / norm)
                t[name] = t[name] + on[name]
                m[name], v[name] = 0.9 * m[name] + 0.1 * leaf, 0.999 * v[name] + 0.001 * leaf**2
                count = np.maximum(t[name], 1)
                update = m[name] / (1 - 0.9**count) / (np.sqrt(v[name] / (1 - 0.999**count)) + 1e-8)
                p[name] = p[name] - np.where(on[name], 0.1 * update, 0)
        seen.append({name: leaf.copy() for name, leaf in p.items()})
    return seen


@pytest.mark.parametrize("rates", [False, True], ids=["bools", "rates"])
def test_elements_that_go_on_keep_their_moments_and_freed_ones_start_as_on_step_0(rates):
    """Layers of one leaf, freed, kept, frozen and freed again, equal NumPy with a count a layer."""
    history = [layers(rows) for rows in LAYERS]
    if rates:
        history = [{**mask, "w": np.where(mask["w"], 1.0, 0.0)} for mask in history]
    with jax.enable_x64(True):
        params, state, before = jax.tree.map(jnp.asarray, STACK), None, None
        for i, (mask, expected) in enumerate(zip(history, numpy_adam_by_element(0.5), strict=True)):
            tx, after = OPTIMIZERS["clipped adam"], (mask, masks.since(*history[: i + 1]))
            masked = optimizer.masked(tx, *after)
            state = optimizer.carry(tx, before, after, state, params) if i else masked.init(params)
            for step in range(STEPS):
                updates, state = masked.update(gradients(params, STEPS * i + step), state, params)
                params = optimizer.apply(params, updates, mask)
            before = after
            for name, leaf in expected.items():
                np.testing.assert_allclose(params[name], leaf, rtol=1e-12, atol=1e-12)
    assert masks.since(*history)["w"].ravel().tolist() == [2, 3, 3, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "adamw", "lion", "adafactor", "sm3", "inject", "multisteps"])
def test_the_layers_of_a_stack_move_as_leaves_of_their_own_would(name):
    """For optimizers that see elements one by one; factored ones are shared by a leaf, and stay finite."""
    tx, history = OPTIMIZERS[name], [layers(rows) for rows in LAYERS]
    apart = [{"head": True, **{str(row): row in rows for row in range(4)}} for rows in LAYERS]
    whole, pieces = jax.tree.map(jnp.asarray, STACK), {"head": jnp.asarray(STACK["head"])}
    pieces |= {str(row): jnp.asarray(STACK["w"][row]) for row in range(4)}
    for params, phases in ((whole, history), (pieces, apart)):
        state, before = None, None
        for i, mask in enumerate(phases):
            after = (mask, masks.since(*phases[: i + 1]))
            masked = optimizer.masked(tx, *after)
            state = optimizer.carry(tx, before, after, state, params) if i else masked.init(params)
            update = jax.jit(masked.update)
            for step in range(2):
                updates, state = update(gradients(params, 2 * i + step), state, params)
                params.update(optimizer.apply(params, updates, mask))
            before = after
    rows = np.stack([pieces[str(row)] for row in range(4)])
    if name in ("adafactor", "sm3"):
        assert np.isfinite(whole["w"]).all()
    else:
        np.testing.assert_allclose(whole["w"], rows, rtol=2e-6)


def test_a_layer_that_is_frozen_gives_its_moments_up():
    tx, params = optax.adam(0.1), jax.tree.map(jnp.asarray, STACK)
    first, second = layers((2, 3)), layers((3,))
    masked = optimizer.masked(tx, first)
    _, state = masked.update(gradients(params, 0), masked.init(params), params)
    after = optimizer.carry(tx, (first, None), (second, masks.since(first, second)), state, params)
    held = np.asarray(optax.tree.get(after, "mu")["w"])
    assert np.array_equal(held[3], np.asarray(optax.tree.get(state, "mu")["w"])[3]) and held[3].any()
    assert not held[:3].any()


def test_a_phase_that_freezes_everything_changes_nothing():
    frozen = masks.invert(masks.by_path(PARAMS, lambda path: True))
    tx = optimizer.masked(optax.adam(0.1), frozen)
    updates, _ = tx.update(gradients(PARAMS, 0), tx.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    assert all(
        np.asarray(x).astype(np.float32).tobytes() == np.asarray(y, np.float32).tobytes()
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(PARAMS), strict=True)
    )
