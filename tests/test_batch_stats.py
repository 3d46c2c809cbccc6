"""The state of batch norms, in each mode, against a training loop of plain Flax; Linen and NNX."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import residual
from flax import nnx

from tljax import batch_stats, evaluate, masks, models, objective, optimizers, paths, train
from tljax.data import draw
from tljax.models import linen
from tljax.models import nnx as nnx_stages
from tljax.train.step import frozen_prefix_of, state_modes
from tljax.types import InputError, Stage

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


def assert_near(got, expected, atol=1e-6):
    assert paths.names(got) == paths.names(expected)
    for (path, a), (_, b) in zip(paths.items(got), paths.items(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol, err_msg=path)


EVERYTHING, HEAD = ("stem", "block_0", "head"), ("head",)


UPPER = ("block_0", "head")
QUICK = [("tracked", EVERYTHING, "eight devices"), ("reestimated", UPPER, "one device")]
SLOW = [
    *((mode, EVERYTHING, "one device") for mode in ("frozen", "tracked", "reestimated")),
    *(("frozen", EVERYTHING, "eight devices"), ("reestimated", EVERYTHING, "eight devices")),
    *(("tracked", UPPER, "pmap over eight"), ("reestimated", UPPER, "pmap over eight")),
    *(("tracked", HEAD, "eight devices"), ("reestimated", HEAD, "one device")),
]
CASES = [
    pytest.param(
        *case,
        marks=[
            *([pytest.mark.slow] if case in SLOW else []),
            *([pytest.mark.devices(8)] if "eight" in case[-1] else []),
        ],
    )
    for case in (*QUICK, *SLOW)
]


@pytest.mark.parametrize(("mode", "trained", "on"), CASES)
def test_a_state_is_that_of_a_plain_loop_of_flax(mode, trained, on):
    """Parameters and state after 30 steps, every fourth with a batch half of padding."""
    params, _ = variables()
    [(_, got)] = fitted(mode, ((0, masks.under(params, trained)),), ON[on])
    assert_near(jax.tree.map(lambda leaf: leaf[0], got), plainly(mode, trained), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tracked", pytest.param("reestimated", marks=pytest.mark.slow)])
def test_nnx_gives_what_linen_gives(mode):
    """The same paths, and from equal variables the same after 30 steps."""
    nnx_model = residual.nnx_model(3)
    drawn = models.init(nnx_model, jax.random.key(0), (8, 8, 1))
    assert paths.names(drawn) == paths.names(models.init(MODEL, jax.random.key(0), (8, 8, 1)))
    params, _ = variables()
    [(_, got)] = fitted(mode, ((0, masks.under(params, EVERYTHING)),), model=nnx_model)
    assert_near(jax.tree.map(lambda leaf: leaf[0], got), plainly(mode, EVERYTHING))


def plainly_in_phases():
    """The head for 12 steps, with the state as it is, then everything, tracked."""
    params, state = variables()
    tx = optax.sgd(RATE, momentum=0.9)
    opt_state = tx.init(params)

    @partial(jax.jit, static_argnames="freed")
    def step(params, opt_state, state, x, y, freed):
        def loss(params):
            logits, after = plain_outputs(params, state, x, tuple(MODULES) if freed else ())
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), after

        gradient, state_after = jax.grad(loss, has_aux=True)(params)
        if not freed:
            gradient = {name: jax.tree.map(lambda g, on=name == "head": g * on, gradient[name]) for name in gradient}
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, state_after

    for number, rows in enumerate(order(0, STEPS)):
        rows = rows[rows >= 0]
        params, opt_state, state = step(params, opt_state, state, IMAGES[rows], LABELS[rows], number >= 12)
    return params, state


@pytest.mark.slow
def test_a_phase_boundary_changes_the_mode_with_the_mask():
    params, _ = variables()
    phases = ((0, masks.under(params, HEAD)), (12, masks.under(params, EVERYTHING)))
    *_, (_, got) = fitted("auto", phases, ends=(12, STEPS))
    assert_near(jax.tree.map(lambda leaf: leaf[0], got), plainly_in_phases())


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


def reestimating():
    modes = tuple((stage, "reestimated") for stage in MODULES)
    return train.Spec(MODEL, objective.loss("softmax_cross_entropy"), OPTIMIZER, batch_stats=modes)


@pytest.mark.slow
def test_a_state_is_estimated_at_every_point_and_where_a_phase_begins():
    """Under the parameters of then; what the head is trained on is the output of an estimated body, cached or not."""
    params, state = variables()
    phases = ((0, masks.under(params, HEAD)), (8, masks.under(params, EVERYTHING)))
    cache, spec = train.FeatureCache(10**8), reestimating()
    fits = [fit_of(*variables(seed), phases) for seed in (0, 1)]
    seen = {}
    for name, execution in (("anew", train.Execution()), ("cached", train.Execution(cache=cache))):
        for now, _ in train.fit(spec, fits, DATA, [4, 8, 20, STEPS], execution=execution):
            for row in range(2):
                params, state = now.params_and_state(row)
                assert_near(state, estimated(params, variables(row)[1], tuple(MODULES)))
            logits = evaluate.logits_of(spec, fits, now, evaluate.padded(IMAGES), EXAMPLES)()
            np.testing.assert_allclose(logits[1], plain_outputs(params, state, IMAGES)[0], rtol=1e-4, atol=1e-5)
            seen.setdefault(name, []).append(jax.tree.map(np.asarray, (now.params, now.model_state)))
    assert len(cache.arrays) == 1
    for anew, cached in zip(seen["anew"], seen["cached"], strict=True):
        assert_near(anew, cached)


@pytest.mark.slow
def test_a_stage_that_is_frozen_whole_has_its_estimate_from_where_its_phase_begins():
    """Also where stages below it train, and move what it gets."""
    params, state = variables()
    spec, phases = reestimating(), ((0, masks.under(params, ["stem", "head"])), (8, masks.under(params, EVERYTHING)))
    ends = {4: None, 8: None, STEPS: None}
    for now, _ in train.fit(spec, [fit_of(params, state, phases)], DATA, list(ends)):
        ends[now.step] = jax.tree.map(lambda leaf: np.array(leaf[0]), (now.params, now.model_state))
    at_start = estimated(params, state, tuple(MODULES))
    assert_near(ends[4][1], {**estimated(ends[4][0], at_start, ("stem",)), "block_0": at_start["block_0"]})
    assert_near(ends[8][1], estimated(ends[8][0], state, tuple(MODULES)))
    assert not np.allclose(ends[8][1]["block_0"]["norm_0"]["mean"], at_start["block_0"]["norm_0"]["mean"], atol=1e-4)


@pytest.mark.slow
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
    prefix = lambda *modes: frozen_prefix_of(  # noqa: E731
        train.specialize(train.Spec(MODEL, None, OPTIMIZER, batch_stats=modes), fit, (mask,))
    )
    assert (
        prefix() == ("stem", "block_0")
        and prefix(("block_0", "tracked")) == ("stem",)
        and prefix(("stem", "tracked")) == ()
    )
    assert prefix(("stem", "reestimated"), ("block_0", "reestimated")) == ("stem", "block_0")


@pytest.mark.slow
def test_the_average_of_a_reestimated_fit_has_a_state_of_its_own():
    params, _ = variables()
    spec = replace(reestimating(), averages=True)
    fit = fit_of(*variables(), ((0, masks.under(params, EVERYTHING)),))
    fit = fit._replace(numbers={**fit.numbers, "average_weight": 0.1})
    [(now, _)] = train.fit(spec, [fit], DATA, [STEPS])
    of_fit = jax.tree.map(lambda leaf: leaf[0], (now.params, now.model_state, now.average))
    params, state = train.with_average(*of_fit)
    assert_near(state, estimated(params, variables()[1], tuple(MODULES)), atol=1e-5)
    assert not np.allclose(state["stem"]["norm"]["mean"], of_fit[1]["stem"]["norm"]["mean"], atol=1e-4)


class Noisy(nnx.Module):
    """Two dropouts, and one that is off by hand."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.off = nnx.Dropout(0.9, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.off(jnp.stack([self.first(x), self.second(x)]))


def test_dropout_of_nnx_follows_its_key_and_stays_off_by_hand():
    noisy, x, key = nnx_stages.stage("noisy", Noisy), jnp.ones((1, 20_000)), jax.random.key(3)
    np.testing.assert_array_equal(noisy.apply({}, {}, x)[0], np.ones((2, 1, 20_000)))
    first, second = np.asarray(noisy.apply({}, {}, x, key=key)[0])
    for kept in (first != 0, second != 0):  # a standard deviation of the mean is 0.0035
        assert abs(kept.mean() - 0.5) < 0.014
    np.testing.assert_array_equal(first[first != 0], 2)
    assert abs(((first != 0) & (second != 0)).mean() - 0.25) < 0.014  # they draw apart
    np.testing.assert_array_equal(noisy.apply({}, {}, x, key=key)[0][0], first)
    assert not np.array_equal(noisy.apply({}, {}, x, key=jax.random.key(4))[0][0], first)


class Ordered(nnx.Module):
    """Its call takes the mode, and says it to a batch norm."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])

    def __call__(self, x, train: bool):
        return self.layers[0](self.norm(x, use_running_average=not train))


def test_batch_norms_of_nnx_are_in_the_mode_of_the_state_whatever_their_call_is_told():
    """Against NumPy, with a weight of 0."""
    stage, rng = nnx_stages.stage("ordered", Ordered), np.random.default_rng(0)
    params, state = stage.init(jax.random.key(0), jnp.zeros((1, 3)))
    assert paths.names(params) == ["layers/0/bias", "layers/0/kernel", "norm/bias", "norm/scale"]
    x, weight = rng.normal(2, 3, (4, 3)).astype(np.float32), np.array([1, 1, 0, 1], np.float32)
    y, same = stage.apply(params, state, x, key=jax.random.key(0), weight=weight)
    assert same is state
    kernel = np.asarray(params["layers"]["0"]["kernel"])
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5) @ kernel, rtol=1e-5, atol=1e-5)
    counted = x[weight > 0]
    mean, var = counted.mean(0), counted.var(0)
    for momentum, kept in ((None, 0.5), (0.0, 0.0)):
        y, after = stage.apply(params, state, x, train=True, weight=weight, momentum=momentum)
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) @ kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after["norm"]["mean"], (1 - kept) * mean, rtol=1e-5)
        np.testing.assert_allclose(after["norm"]["var"], kept + (1 - kept) * var, rtol=1e-4)


def test_what_of_nnx_cannot_be_a_stage_is_refused():
    class Counting(nnx.Module):
        def __init__(self):
            self.count = nnx.Cache(jnp.zeros(()))

    class Drawing(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

        def __call__(self, x):
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    with pytest.raises(InputError, match=r"stage 'counting' has a variable of kind Cache, 'count'"):
        nnx_stages.stage("counting", Counting).init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(InputError, match=r"stage 'drawing' draws in evaluation"):
        nnx_stages.stage("drawing", Drawing).apply({}, {}, jnp.zeros((1, 3)))
    with pytest.raises(InputError, match=r"not of Dense"):
        nnx_stages.stage("linen", lambda: nn.Dense(3)).init(jax.random.key(0), jnp.zeros((1, 3)))
    patches = nnx_stages.stage("patches", lambda rngs: nnx.BatchNorm(3, rngs=rngs), before=lambda x: x.reshape(-1, 3))
    params, state = patches.init(jax.random.key(0), jnp.zeros((1, 2, 3)))
    with pytest.raises(InputError, match=r"stage 'patches': a batch norm sees \[4, 3\] of a batch of 2"):
        patches.apply(params, state, jnp.zeros((2, 2, 3)), train=True, weight=jnp.ones(2))


def test_a_module_of_nnx_that_is_made_has_its_parameters_under_every_key():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(7))
    stage = nnx_stages.stage("head", module)
    for seed in (0, 1):
        params, _ = stage.init(jax.random.key(seed), jnp.zeros((1, 3)))
        np.testing.assert_array_equal(params["kernel"], module.kernel[...])
    drawing = nnx_stages.stage("head", lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    first, second = (drawing.init(jax.random.key(seed), jnp.zeros((1, 3)))[0] for seed in (0, 1))
    assert not np.array_equal(first["kernel"], second["kernel"])


class Averaging(nn.Module):
    """Running statistics of its own, by a flag."""

    @nn.compact
    def __call__(self, x, use_running_average=True):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        if not use_running_average:
            mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
        return x - mean.value[None]


def test_statistics_of_ones_own_are_tracked_and_cannot_be_reestimated():
    stage, x = linen.stage("own", Averaging()), jnp.full((2, 3), 4.0)
    params, state = stage.init(jax.random.key(0), x)
    np.testing.assert_array_equal(stage.apply(params, state, x)[1]["mean"], np.zeros(3))
    np.testing.assert_array_equal(stage.apply(params, state, x, train=True)[1]["mean"], np.full(3, 2.0))
    with pytest.raises(InputError, match=r"stage 'own' cannot be reestimated: 'mean' of its state is of no flax"):
        stage.apply(params, state, x, train=True, momentum=0.0)
    full = Stage("other", stage.init, lambda params, state, x, *, key, train, weight: (x, state))
    with pytest.raises(InputError, match=r"stage 'other' cannot be reestimated: let its `apply` take `momentum`"):
        models.run((full,), {"other": params}, {"other": state}, x, tracked=["other"], momentum=0.0)
