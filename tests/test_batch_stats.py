"""The state of batch norms, in each mode, against a training loop of plain Flax; Linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import residual

from tljax import batch_stats, evaluate, masks, models, objective, optimizers, paths, train
from tljax.data import draw
from tljax.train.step import frozen_prefix_of, state_modes

RNG = np.random.default_rng(0)
EXAMPLES, BATCH, STEPS, RATE = 70, 20, 30, 0.05
IMAGES = RNG.integers(0, 256, (EXAMPLES, 8, 8, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 3, EXAMPLES).astype(np.int32)
DATA = train.load(IMAGES, LABELS)
PASS = -(-EXAMPLES // BATCH)
"""Steps of a pass: the last batch has 10 examples and as many rows of padding."""
MODEL = residual.model(3)
OPTIMIZER, NUMBERS = optimizers.spec("sgd", momentum=0.9)
MODULES = {"stem": residual.Stem, "block_0": residual.Block}
DEVICES = tuple(jax.devices())
ON = {
    "one device": train.Execution(),
    "eight devices": train.Execution(DEVICES, 8),
    "pmap over eight": train.Execution(DEVICES, 8, "pmap"),
}


def variables(seed=0, model=MODEL):
    """Parameters and a state that is not the initial one."""
    params, state = batch_stats.split(models.init(model, jax.random.key(seed), (8, 8, 1)))
    rng = np.random.default_rng(seed)
    return params, jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.uniform(0, 0.5, leaf.shape), jnp.float32), state)


def order(start, stop):
    return draw.order(7, EXAMPLES, BATCH, start, stop, epochs=True)


def fit_of(params, state, phases):
    rates = np.full(STEPS, RATE, np.float32)
    numbers = {**NUMBERS, "label_smoothing": 0.0}
    fit = train.Fit(params, phases, order, rates, (), numbers, jax.random.key(0), model_state=state)
    return fit._replace(pass_steps=PASS)


def fitted(mode, phases, execution=None, model=MODEL, ends=(STEPS,), seeds=(0,)):
    """The states of the last end, as variables a fit."""
    requested = tuple((stage, mode) for stage in MODULES)
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), OPTIMIZER, batch_stats=requested)
    fits = [fit_of(*variables(seed), phases) for seed in seeds]
    for state, _ in train.fit(spec, fits, DATA, list(ends), execution=execution):
        yield state.step, jax.tree.map(np.asarray, (state.params, state.model_state))


def plain_outputs(params, state, x, train_stages=(), momentum=0.9):
    """(logits, state) by Flax alone, without the stages' adapter."""
    x, new_state = jnp.asarray(x, jnp.float32) / 255, {}
    for name, module in MODULES.items():
        tree = {"params": params[name], "batch_stats": state[name]}
        if name in train_stages:
            x, changed = module(momentum=momentum).apply(tree, x, train=True, mutable=["batch_stats"])
            new_state[name] = changed["batch_stats"]
        else:
            x, new_state[name] = module().apply(tree, x), state[name]
    return nn.Dense(3).apply({"params": params["head"]}, x.mean((1, 2))), new_state


def plainly(mode, trained, steps=STEPS, seed=0):
    """(parameters, state) after steps of SGD with momentum on batches without padding; `trained` are whole stages."""
    params, state = variables(seed)
    by_batch = tuple(MODULES) if mode == "tracked" else tuple(set(trained) & set(MODULES))
    by_batch = () if mode == "frozen" else by_batch
    tx = optax.sgd(RATE, momentum=0.9)
    learnt = {name: params[name] for name in trained}
    opt_state = tx.init(learnt)
    if mode == "reestimated":
        state = estimated(params, state, tuple(MODULES))

    @jax.jit
    def step(learnt, opt_state, state, x, y):
        def loss(learnt):
            logits, after = plain_outputs({**params, **learnt}, state, x, by_batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), after

        gradient, after = jax.grad(loss, has_aux=True)(learnt)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(learnt, updates), opt_state, after

    for rows in order(0, steps):
        rows = rows[rows >= 0]
        learnt, opt_state, state = step(learnt, opt_state, state, IMAGES[rows], LABELS[rows])
    params = {**params, **learnt}
    return params, estimated(params, state, by_batch) if mode == "reestimated" else state


def estimated(params, state, stages):
    """The mean over the batches of a pass of their own statistics, in NumPy: a momentum of 0 keeps those alone."""
    of_batches = []
    for rows in order(0, PASS):
        _, after = plain_outputs(params, state, IMAGES[rows[rows >= 0]], stages, momentum=0.0)
        of_batches.append({stage: after[stage] for stage in stages})
    means = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), 0).astype(np.float32), *of_batches)
    return {**state, **means}


def near(got, expected, atol=1e-6):
    assert paths.names(got) == paths.names(expected)
    for (path, a), (_, b) in zip(paths.items(got), paths.items(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol, err_msg=path)


EVERYTHING, HEAD = ("stem", "block_0", "head"), ("head",)


QUICK = [("tracked", EVERYTHING, "eight devices"), ("reestimated", ("block_0", "head"), "one device")]
CASES = [
    pytest.param(mode, trained, on, marks=() if (mode, trained, on) in QUICK else pytest.mark.slow)
    for mode in ("frozen", "tracked", "reestimated")
    for trained in (EVERYTHING, ("block_0", "head"), HEAD)
    for on in ON
]


@pytest.mark.parametrize(("mode", "trained", "on"), CASES)
def test_a_state_is_that_of_a_plain_loop_of_flax(mode, trained, on):
    """Parameters and state after 30 steps, every fourth with a batch half of padding."""
    params, _ = variables()
    [(_, got)] = fitted(mode, ((0, masks.under(params, trained)),), ON[on])
    near(jax.tree.map(lambda leaf: leaf[0], got), plainly(mode, trained))


@pytest.mark.parametrize("mode", ["tracked", pytest.param("reestimated", marks=pytest.mark.slow)])
def test_nnx_gives_what_linen_gives(mode):
    """The same paths, and from equal variables the same after 30 steps."""
    nnx_model = residual.nnx_model(3)
    drawn = models.init(nnx_model, jax.random.key(0), (8, 8, 1))
    assert paths.names(drawn) == paths.names(models.init(MODEL, jax.random.key(0), (8, 8, 1)))
    params, _ = variables()
    [(_, got)] = fitted(mode, ((0, masks.under(params, EVERYTHING)),), model=nnx_model)
    near(jax.tree.map(lambda leaf: leaf[0], got), plainly(mode, EVERYTHING))


def plainly_in_phases():
    """The head for 12 steps, with the state as it is, then everything, tracked."""
    params, state = variables()
    tx = optax.sgd(RATE, momentum=0.9)
    opt_state = tx.init(params)
    for number, rows in enumerate(order(0, STEPS)):
        rows, freed = rows[rows >= 0], number >= 12

        def loss(params, rows=rows, freed=freed, state=state):
            logits, after = plain_outputs(params, state, IMAGES[rows], tuple(MODULES) if freed else ())
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean(), after

        gradient, state = jax.grad(loss, has_aux=True)(params)
        if not freed:
            gradient = {name: jax.tree.map(lambda g, on=name == "head": g * on, gradient[name]) for name in gradient}
        updates, opt_state = tx.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
    return params, state


def test_a_phase_boundary_changes_the_mode_with_the_mask():
    params, _ = variables()
    phases = ((0, masks.under(params, HEAD)), (12, masks.under(params, EVERYTHING)))
    *_, (_, got) = fitted("auto", phases, ends=(12, STEPS))
    near(jax.tree.map(lambda leaf: leaf[0], got), plainly_in_phases())


def test_auto_tracks_stages_that_train_whole():
    params, state = variables()
    mask = masks.under(params, EVERYTHING)
    mask["stem"]["conv"]["kernel"] = False
    expected = {"stem": "frozen", "block_0": "tracked"}
    assert state_modes((), params, state, mask) == expected
    assert state_modes((("block_0", "auto"), ("stem", "tracked")), params, state, mask) == dict.fromkeys(
        expected, "tracked"
    )
    numbers = jax.tree.map(lambda leaf: 0.5 if leaf else False, mask)
    assert state_modes((), params, state, numbers) == expected


def test_a_state_is_estimated_at_every_point_and_where_a_phase_begins():
    """Under the parameters of then; what the head is trained on is the output of an estimated body, cached or not."""
    params, state = variables()
    phases = ((0, masks.under(params, HEAD)), (8, masks.under(params, EVERYTHING)))
    cache = train.FeatureCache(10**8)
    spec = train.Spec(
        MODEL,
        objective.loss("softmax_cross_entropy"),
        OPTIMIZER,
        batch_stats=tuple((stage, "reestimated") for stage in MODULES),
    )
    fits = [fit_of(*variables(seed), phases) for seed in (0, 1)]
    seen = {}
    for name, execution in (("anew", train.Execution()), ("cached", train.Execution(cache=cache))):
        for now, _ in train.fit(spec, fits, DATA, [4, 8, 20, STEPS], execution=execution):
            for row in range(2):
                params, state = jax.tree.map(lambda leaf, row=row: leaf[row], (now.params, now.model_state))
                near(state, estimated(params, variables(row)[1], tuple(MODULES)))
            logits = evaluate.logits_of(spec, fits, now, evaluate.padded(IMAGES), EXAMPLES)
            np.testing.assert_allclose(logits[1], plain_outputs(params, state, IMAGES)[0], rtol=1e-4, atol=1e-5)
            seen.setdefault(name, []).append(jax.tree.map(np.asarray, (now.params, now.model_state)))
    assert len(cache.arrays) == 1
    for anew, cached in zip(seen["anew"], seen["cached"], strict=True):
        near(anew, cached)


def test_a_fit_that_is_taken_up_again_and_one_in_company_have_the_same_bits():
    params, _ = variables()
    phases = ((0, masks.under(params, EVERYTHING)),)
    spec = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), OPTIMIZER)
    fits = [fit_of(*variables(seed), phases) for seed in (0, 1)]
    ends = [12, STEPS]
    together = {}
    for now, _ in train.fit(spec, fits, DATA, ends):
        together[now.step] = jax.tree.map(np.array, now)
    [(again, _)] = train.fit(spec, fits, DATA, ends, [together[12]])
    jax.tree.map(np.testing.assert_array_equal, again.variables, together[STEPS].variables)
    *_, (alone, _) = train.fit(spec, fits[1:], DATA, ends)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), alone.variables, together[STEPS].variables)


def test_a_stage_whose_state_is_tracked_is_in_no_frozen_prefix():
    params, state = variables()
    mask = masks.under(params, HEAD)
    fit = fit_of(params, state, ((0, mask),))
    of = lambda *modes: frozen_prefix_of(  # noqa: E731
        train.specialize(train.Spec(MODEL, None, OPTIMIZER, batch_stats=modes), fit, (mask,))
    )
    assert of() == ("stem", "block_0") and of(("block_0", "tracked")) == ("stem",) and of(("stem", "tracked")) == ()
    assert of(("stem", "reestimated"), ("block_0", "reestimated")) == ("stem", "block_0")


def test_the_average_of_a_reestimated_fit_has_a_state_of_its_own():
    params, _ = variables()
    spec = train.Spec(
        MODEL,
        objective.loss("softmax_cross_entropy"),
        OPTIMIZER,
        averages=True,
        batch_stats=tuple((stage, "reestimated") for stage in MODULES),
    )
    fit = fit_of(*variables(), ((0, masks.under(params, EVERYTHING)),))
    fit = fit._replace(numbers={**fit.numbers, "average_weight": 0.1})
    [(now, _)] = train.fit(spec, [fit], DATA, [STEPS])
    of_fit = jax.tree.map(lambda leaf: leaf[0], (now.params, now.model_state, now.average))
    params, state = train.with_average(*of_fit)
    near(state, estimated(params, variables()[1], tuple(MODULES)), atol=1e-5)
    assert not np.allclose(state["stem"]["norm"]["mean"], of_fit[1]["stem"]["norm"]["mean"], atol=1e-4)
