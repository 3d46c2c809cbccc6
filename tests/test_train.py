"""Training: the compiled segment equals NumPy, and bits depend on nothing but what they should."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, models, objective, optimizer, optimizers, penalties, schedules, train
from tljax.data import draw
from tljax.train import gradients, loop, vectorize
from tljax.train.step import Hyper
from tljax.train.step import step as training_step
from tljax.types import InputError

MODEL = models.build("mlp", 4, hidden=(8,), activation="relu")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 3, 4, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 4, 50).astype(np.int32)
DATA = train.load(IMAGES, LABELS)


def fitted(mask_of, *, seeds=(0,), batch=16, steps=12, ends=None, penalty="", recipe=None, model=MODEL, rate=0.1):
    """The last state and the logs of a group."""
    optimizer_spec, numbers = optimizers.spec(**{"name": "sgd", **(recipe or {})})
    terms, weights = penalties.read(penalty)
    fits = []
    for seed in seeds:
        params = models.init(model, jax.random.key(seed), (3, 4, 1))
        mask = mask_of(params)
        order = lambda start, stop, seed=seed: draw.order(seed, 50, batch, start, stop, epochs=True, subset=None)  # noqa: E731
        rates = schedules.rates("linear", rate, 0.0, steps)
        fits.append(train.Fit(params, ((0, mask),), order, rates, weights, numbers, jax.random.key(seed)))
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec, terms)
    logs = []
    for last, log in train.fit(spec, fits, DATA, ends or [steps]):  # noqa: B007
        logs.append(log)
    return fits, last, jax.tree.map(lambda *parts: np.hstack(parts), *logs)


@pytest.mark.slow
def test_a_batch_above_65536_trains():
    """With 50 examples the rest of the batch is padding, of weight 0: what is learnt is what a batch of 50 learns."""
    _, large, _ = fitted(everything, steps=20, batch=70_000)
    _, small, _ = fitted(everything, steps=20, batch=50)
    for here, there in zip(jax.tree.leaves(large.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-5)


def everything(params):
    return masks.by_path(params, lambda path: True)


def head(params):
    return masks.under(params, "head")


def same_bytes(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def numpy_fit(fit, steps, batch, decay, clip, trains_hidden):
    """SGD with clipping, L2 decay and a linear schedule, written out in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fit.params)
    losses = []
    for step in range(steps):
        rows = fit.order(step, step + 1)[0]
        rows = rows[rows >= 0]
        x, y = IMAGES[rows].reshape(len(rows), -1) / 255, np.eye(4)[LABELS[rows]]
        z = x @ p["hidden_0"]["kernel"] + p["hidden_0"]["bias"]
        h = np.maximum(z, 0)
        logits = h @ p["head"]["kernel"] + p["head"]["bias"]
        q = np.exp(logits - logits.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        losses.append(-np.log((q * y).sum(1)).mean())
        d = (q - y) / len(rows)
        dz = (d @ p["head"]["kernel"].T) * (z > 0)
        g = {"head": {"kernel": h.T @ d, "bias": d.sum(0)}}
        if trains_hidden:
            g["hidden_0"] = {"kernel": x.T @ dz, "bias": dz.sum(0)}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
        rate = 0.1 * (1 - step / steps)
        for stage, leaves in g.items():
            for name, leaf in leaves.items():
                p[stage][name] -= rate * (leaf * min(1, clip / norm) + decay * p[stage][name])
    return p, losses


@pytest.mark.slow
@pytest.mark.parametrize("trains_hidden", [True, False])
def test_clipped_sgd_with_decay_equals_numpy(trains_hidden):
    fits, state, log = fitted(
        everything if trains_hidden else head, recipe={"weight_decay": 0.01, "clip": 0.5}, steps=12
    )
    expected, losses = numpy_fit(fits[0], 12, 16, 0.01, 0.5, trains_hidden)
    np.testing.assert_allclose(log.loss[0], losses, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_frozen_leaves_keep_their_bytes_with_decay_clipping_and_a_penalty(name):
    recipe = {"name": name, "weight_decay": 1.0, "clip": 0.1}
    fits, state, _ = fitted(head, recipe=recipe, penalty="l2:weight=0.1", rate=0.01)
    after = jax.tree.map(lambda leaf: leaf[0], state.params)
    assert same_bytes(after["hidden_0"], fits[0].params["hidden_0"])
    assert not same_bytes(after["head"], fits[0].params["head"])
    sizes = {np.size(leaf) for leaf in jax.tree.leaves(state.optimizer)}
    assert 12 * 8 not in sizes


def test_the_parameters_handed_in_are_untouched():
    fits, _, _ = fitted(everything)
    before = models.init(MODEL, jax.random.key(0), (3, 4, 1))
    assert same_bytes(fits[0].params, before)


def test_bits_depend_neither_on_the_group_nor_on_the_segments():
    _, alone, log = fitted(everything, seeds=(1,))
    _, group, logs = fitted(everything, seeds=(0, 1, 2))
    _, pieces, cut = fitted(everything, seeds=(1,), ends=[1, 5, 6, 12])
    assert same_bytes(alone.params, jax.tree.map(lambda leaf: leaf[1:2], group.params))
    assert same_bytes(alone.params, pieces.params)
    np.testing.assert_array_equal(log.loss[0], logs.loss[1])
    np.testing.assert_array_equal(log.loss, cut.loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_stop_and_resume_gives_the_bits_of_no_stop(name):
    recipe = {"name": name, "clip": 1.0}
    _, whole, _ = fitted(everything, recipe=recipe)
    optimizer_spec, numbers = optimizers.spec(**recipe)
    params = models.init(MODEL, jax.random.key(0), (3, 4, 1))
    mask = everything(params)
    spec = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), optimizer_spec)
    order = lambda a, b: draw.order(0, 50, 16, a, b, epochs=True, subset=None)  # noqa: E731
    fit = train.Fit(
        params, ((0, mask),), order, schedules.rates("linear", 0.1, 0.0, 12), (), numbers, jax.random.key(0)
    )
    state, _ = next(train.fit(spec, [fit], DATA, [5, 12]))
    kept = jax.tree.map(np.array, state)
    [(resumed, _)] = train.fit(spec, [fit], DATA, [5, 12], [kept])
    assert same_bytes(resumed.params, whole.params) and same_bytes(resumed.optimizer, whole.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_a_fit_that_is_asked_to_stop_does_so_where_it_is_and_goes_on_with_the_same_bits(calls, monkeypatch):
    """Each call of the compiled function is made one step long, so that it is stopped between any two."""
    monkeypatch.setattr(loop, "FIRST_CALL", 1)
    monkeypatch.setattr(loop, "_steps_for_longest", lambda steps, seconds: 1)
    setting = phased(head_then_all)
    *_, (whole, _) = train.fit(*setting)
    whole_curve = np.hstack([log.loss for _, log in train.fit(*setting)])
    calls_made = iter(range(1000))
    stopped, logs = [], []
    for state, log in train.fit(*setting, execution=train.Execution(should_stop=lambda: next(calls_made) >= calls)):
        stopped.append(jax.tree.map(np.array, state))
        logs.append(log.loss)
    assert 0 < stopped[-1].step < 12
    for state, log in train.fit(*setting, [stopped[-1]]):  # noqa: B007
        logs.append(log.loss)
    assert same_bytes(state, whole) and same_bytes(np.hstack(logs), whole_curve)


def test_a_stop_before_the_first_step_gives_nothing():
    assert not list(train.fit(*phased(head_then_all), execution=train.Execution(should_stop=lambda: True)))


@pytest.mark.slow
def test_parts_that_are_stopped_go_on_each_from_its_own_state():
    def by_seed(seed, params):
        return (
            (0, head(params)),
            (6, everything(params) if seed == 1 else masks.by_glob(params, "**/bias", "head/**")),
        )

    setting = phased(by_seed, seeds=(0, 1, 2))
    whole = {state.fits: state for state, _ in train.fit(*setting) if state.step == 12}
    kept: dict = {}
    for state, _ in train.fit(*setting):
        kept = {fits: part for fits, part in kept.items() if not set(fits) & set(state.fits)}
        kept[state.fits] = jax.tree.map(np.array, state)
        if state.step == 12:
            break
    assert sorted(part.step for part in kept.values()) == [6, 12]
    for state, _ in train.fit(*setting, list(kept.values())):
        kept[state.fits] = state
    assert kept.keys() == whole.keys()
    assert all(same_bytes(kept[fits].params, whole[fits].params) for fits in whole)


@pytest.mark.slow
@pytest.mark.parametrize("many", ["map", "vmap"])
def test_a_fit_whose_loss_is_not_finite_is_marked_at_its_step_and_the_others_go_on(many):
    """One of four has a rate at which it diverges at once, one has it from step 7 on."""
    spec, fits, *data = phased(lambda seed, params: ((0, everything(params)),), optimizer="sgd", seeds=(0, 1, 2, 3))
    spec = replace(spec, loss=objective.loss("l2_loss"), optimizer=optimizers.OptimizerSpec("sgd"))
    wild = np.full(12, 1e30, np.float32)
    fits[1] = fits[1]._replace(rates=wild)
    fits[3] = fits[3]._replace(rates=np.concatenate([fits[3].rates[:7], wild[:5]]))
    since, losses = {}, {}
    for state, log in train.fit(spec, fits, *data, execution=train.Execution(many=many)):
        for row, i in enumerate(state.fits):
            since[i] = state.diverged[row]
            losses[i] = np.concatenate([losses.get(i, []), log.loss[row]])
    assert since[0] is None and since[2] is None and 0 < since[1] < 7 < since[3] < 12
    assert all(np.isfinite(losses[i][:step]).all() for i, step in since.items())
    alone = np.hstack([log.loss[0] for _, log in train.fit(spec, fits[2:3], *data)])
    np.testing.assert_allclose(losses[2], alone, rtol=0 if many == "map" else 1e-5)


def test_where_all_have_diverged_nothing_more_is_computed(monkeypatch):
    spec, [fit], *data = phased(lambda seed, params: ((0, everything(params)),), optimizer="sgd")
    spec = replace(spec, loss=objective.loss("l2_loss"), optimizer=optimizers.OptimizerSpec("sgd"))
    calls = []
    monkeypatch.setattr(
        vectorize,
        "run",
        lambda *arguments, **fetch: calls.append(arguments[-1]) or vectorize.segment(*arguments, **fetch),
    )
    states = list(train.fit(spec, [fit._replace(rates=np.full(12, 1e30, np.float32))], *data))
    assert [state.step for state, _ in states] == [4, 6, 12] and [first for first, _, _ in calls] == [0]
    assert np.isnan(states[-1][1].loss).all() and states[-1][1].loss.shape == (1, 6)


def test_padding_weighs_nothing():
    """50 examples at batch 16: the last batch of an epoch has 2, and its loss is their mean."""
    fits, _, log = fitted(everything, steps=4, rate=0.0)
    rows = fits[0].order(3, 4)[0]
    assert (rows >= 0).sum() == 2
    logits = models.apply(MODEL, fits[0].params, jnp.asarray(IMAGES[rows[rows >= 0]]))
    expected = objective.loss("softmax_cross_entropy")(logits, jnp.asarray(LABELS[rows[rows >= 0]])).mean()
    np.testing.assert_allclose(log.loss[0, 3], expected, rtol=1e-5)


def test_a_scale_slows_its_leaf_and_scales_share_one_executable():
    def scaled(by):
        return lambda params: {**masks.invert(everything(params)), "head": {"kernel": by, "bias": True}}

    slow, state, _ = fitted(scaled(0.5), steps=1)
    before = vectorize.segment._cache_size()
    fast, other, _ = fitted(scaled(0.25), steps=1)
    assert vectorize.segment._cache_size() == before
    moved = [
        np.asarray(s.params["head"]["kernel"][0] - t[0].params["head"]["kernel"])
        for t, s in ((slow, state), (fast, other))
    ]
    np.testing.assert_allclose(moved[0], 2 * moved[1], rtol=1e-4, atol=1e-7)


def test_seeds_rates_weights_and_lengths_compile_nothing_new():
    fitted(everything, penalty="l2:weight=0.1")
    before = vectorize.segment._cache_size()
    fitted(everything, penalty="l2:weight=0.2", steps=30, rate=0.5)
    fitted(everything, seeds=(7,), penalty="l2:weight=0.3", ends=[2, 7, 12])
    assert vectorize.segment._cache_size() == before


def test_the_penalty_is_logged_beside_the_loss():
    fits, _, log = fitted(head, penalty="l2:weight=0.1", steps=1)
    squares = sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(fits[0].params["head"]))
    np.testing.assert_allclose(log.penalty[0, 0], 0.1 * 0.5 * squares, rtol=1e-5)


def test_a_segment_longer_than_the_compiled_capacity_is_cut_and_whole():
    assert train.capacity(2**19) == 2
    _, _, log = fitted(everything, steps=1500, batch=50)
    assert log.loss.shape == (1, 1500) and np.isfinite(log.loss).all()


@pytest.mark.counts
def test_the_head_alone_does_half_of_the_work():
    """XLA counts a loop's body once, so this is one step: the frozen layer needs no weight gradient."""
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    flops = {}
    for name, mask_of in (("full", everything), ("head", head)):
        params = models.init(model, jax.random.key(0), (28, 28, 1))
        mask = mask_of(params)
        plain = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizers.OptimizerSpec("sgd"))
        fit = train.Fit(params, ((0, mask),), None, None, (), {}, None)
        spec = train.specialize(plain, fit, (mask,))
        trained, frozen = masks.split(params, mask)
        batch = (jnp.zeros((100, 28, 28, 1), jnp.uint8), jnp.zeros(100, jnp.int32), jnp.ones(100))
        hyper = Hyper((), {}, (), jax.random.key(0), None, None)
        run = partial(training_step, spec, hyper)
        state = optimizer.masked(optimizers.build(spec.optimizer, 0.1, {}), mask).init(params)
        executable = jax.jit(run).lower(trained, frozen, state, batch, 0.1, 0).compile()
        flops[name] = executable.cost_analysis()["flops"]
    assert 160e6 < flops["full"] <= 168e6
    assert 80e6 < flops["head"] <= 84e6


def test_trials_of_different_lengths_are_no_group():
    params = models.init(MODEL, jax.random.key(0), (3, 4, 1))
    mask = everything(params)
    spec = train.Spec(MODEL, objective.loss("l2_loss"), optimizers.OptimizerSpec("sgd"))
    order = lambda a, b: draw.order(0, 50, 16, a, b, epochs=True, subset=None)  # noqa: E731
    fits = [train.Fit(params, ((0, mask),), order, np.ones(n, np.float32), (), {}, jax.random.key(0)) for n in (3, 4)]
    with pytest.raises(InputError, match="need 3 steps and batches of 16"):
        next(train.fit(spec, fits, DATA, [3]))


def test_a_penalty_that_covers_no_leaf_is_refused():
    with pytest.raises(InputError, match=r"'heed/\*\*' matches no leaf"):
        fitted(everything, penalty="l2:weight=1:on=heed/**")


def phased(phases_of, *, optimizer="adam", seeds=(0,), ends=(4, 6, 12)):
    """The data of a fit in phases, ready for `train.fit`."""
    optimizer_spec, numbers = optimizers.spec(optimizer, clip=1.0)
    spec = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), optimizer_spec)
    fits = []
    for seed in seeds:
        params = models.init(MODEL, jax.random.key(seed), (3, 4, 1))
        order = lambda a, b, seed=seed: draw.order(seed, 50, 16, a, b, epochs=True, subset=None)  # noqa: E731
        rates = schedules.rates("constant", 0.1, 0.0, ends[-1])
        fits.append(train.Fit(params, phases_of(seed, params), order, rates, (), numbers, jax.random.key(seed)))
    return spec, fits, DATA, list(ends)


def head_then_all(seed, params):
    return ((0, head(params)), (6, everything(params)))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("cut", [4, 6, 8])
def test_a_stop_before_at_or_after_a_boundary_gives_the_bits_of_no_stop(optimizer, cut):
    setting = phased(head_then_all, optimizer=optimizer, ends=(4, 6, 8, 12))
    *_, (whole, _) = train.fit(*setting)
    for state, _ in train.fit(*setting):
        if state.step == cut:
            kept = jax.tree.map(np.array, state)
            break
    *_, (resumed, _) = train.fit(*setting, [kept])
    assert same_bytes(resumed.params, whole.params) and same_bytes(resumed.optimizer, whole.optimizer)


def test_the_state_at_a_boundary_is_the_next_phases():
    states = [state for state, _ in train.fit(*phased(head_then_all))]
    assert [state.step for state in states] == [4, 6, 12]
    frozen_yet, freed, end = (len(jax.tree.leaves(state.optimizer)) for state in states)
    assert frozen_yet < freed == end
    assert [len(state.masks[0]) for state in states] == [1, 2, 2]


def test_a_mask_left_to_its_boundary_sees_the_parameters_there():
    seen = []

    def later(params):
        seen.append(params)
        return everything(params)

    setting = phased(lambda seed, params: ((0, head(params)), (6, later)))
    states = [jax.tree.map(np.array, state.params) for state, _ in train.fit(*setting)]
    [at_boundary] = seen
    assert same_bytes(at_boundary, jax.tree.map(lambda leaf: leaf[0], states[1]))


def test_a_function_that_gives_a_mask_cannot_change_the_parameters_it_is_shown():
    def writes(params):
        params["hidden_0"]["bias"] = params["hidden_0"]["bias"] + 7
        return head(params)

    assert same_bytes(fitted(lambda params: writes)[1].params, fitted(head)[1].params)


def test_a_group_parts_where_its_masks_differ_and_keeps_the_bits_of_single_fits():
    def by_seed(seed, params):
        return (
            (0, head(params)),
            (6, everything(params) if seed == 1 else masks.by_glob(params, "**/bias", "head/**")),
        )

    together = {}
    for state, log in train.fit(*phased(by_seed, seeds=(0, 1, 2))):
        assert log.loss.shape[0] == len(state.fits)
        for row, i in enumerate(state.fits):
            together[i] = jax.tree.map(np.array, state.params_and_state(row)[0])
    assert sorted(together) == [0, 1, 2]
    for seed, params in together.items():
        *_, (alone, _) = train.fit(*phased(by_seed, seeds=(seed,)))
        assert same_bytes(params, jax.tree.map(lambda leaf: leaf[0], alone.params))


def test_gradients_equal_those_of_each_example_example_by_example():
    model, loss = MODEL, objective.loss("softmax_cross_entropy")
    params = models.init(model, jax.random.key(0), (3, 4, 1))
    chosen = np.arange(0, 50, 3)

    @jax.jit
    def example_gradient(image, label):
        return jax.grad(lambda p: loss(models.apply(model, p, image[None]), label[None])[0])(params)

    each = jax.tree.map(lambda *leaves: np.stack(leaves), *[example_gradient(IMAGES[i], LABELS[i]) for i in chosen])
    setting = (model, loss, DATA, chosen)
    for got, wanted in (
        (gradients.mean_gradient(*setting)(params), jax.tree.map(lambda g: g.mean(0), each)),
        (gradients.mean_squared_gradient(*setting)(params), jax.tree.map(lambda g: (g**2).mean(0), each)),
    ):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["l2_sp:weight=10", "ewc:weight=1000", "behaviour:weight=1"])
def test_a_penalty_towards_the_source_keeps_a_fit_nearer_to_it(penalty):
    def distance(text):
        optimizer_spec, numbers = optimizers.spec("sgd")
        terms, weights = penalties.read(text)
        spec = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), optimizer_spec, terms)
        params = models.init(MODEL, jax.random.key(0), (3, 4, 1))
        order = lambda a, b: draw.order(0, 50, 16, a, b, epochs=True, subset=None)  # noqa: E731
        fresh = masks.under(params, "head")
        fisher = dict.fromkeys(("hidden_0/kernel", "hidden_0/bias"), jnp.float32(1e-2))
        fit = train.Fit(
            *(params, ((0, everything(params)),), order, np.full(40, 0.1, np.float32), weights, numbers),
            *(jax.random.key(0), fresh, fisher),
        )
        *_, (state, log) = train.fit(spec, [fit], DATA, [40])
        assert len(log.terms) == len(terms)
        source = np.asarray(params["hidden_0"]["kernel"])
        return np.square(np.asarray(state.params["hidden_0"]["kernel"][0]) - source).sum()

    assert distance(penalty) < 0.8 * distance("")


def test_ewc_without_fisher_information_says_what_to_do():
    with pytest.raises(InputError, match="penalty 'ewc' needs the source's Fisher information"):
        fitted(everything, penalty="ewc:weight=1")


def test_a_literal_weight_of_zero_is_bit_equal_to_no_penalty():
    _, none, _ = fitted(everything)
    _, zero, _ = fitted(everything, penalty="l2:weight=0")
    assert same_bytes(none.params, zero.params)


def test_phases_of_elements_and_rates_in_the_trainer_equal_a_loop_of_ones_own():
    """Two seeds with masks of their own, whose elements are of two cohorts in the second phase."""

    def phases_of(seed, params):
        rng = np.random.default_rng(seed)
        part = rng.random((12, 8)) < 0.4
        more = part | (rng.random((12, 8)) < 0.4)
        head = {"kernel": np.full((8, 1), 0.5), "bias": True}
        masks_of = [{"hidden_0": {"kernel": kernel, "bias": False}, "head": head} for kernel in (part, more)]
        return ((0, masks_of[0]), (6, masks_of[1]))

    spec, fits, data, ends = phased(phases_of, seeds=(0, 1))
    *_, (state, log) = train.fit(spec, fits, data, ends)
    loss = objective.loss("softmax_cross_entropy")
    tx = optimizers.build(spec.optimizer, 0.1, fits[0].numbers)
    for row, fit in enumerate(fits):
        params, history, before, opt_state = fit.params, [], None, None
        for start, mask in fit.phases:
            history.append(mask)
            after = (mask, masks.since(*history))
            masked = optimizer.masked(tx, *after)
            opt_state = optimizer.carry(tx, before, after, opt_state, params) if start else masked.init(params)

            def step(params, opt_state, rows, mask=mask, masked=masked):
                def value(params):
                    losses = loss(models.apply(MODEL, params, jnp.asarray(IMAGES)[rows]), jnp.asarray(LABELS)[rows])
                    return jnp.vdot(losses, rows >= 0) / (rows >= 0).sum()

                updates, opt_state = masked.update(jax.grad(value)(params), opt_state, params)
                return optimizer.apply(params, updates, mask), opt_state

            jitted = jax.jit(step)
            for number in range(start, start + 6):
                params, opt_state = jitted(params, opt_state, fit.order(number, number + 1)[0])
            before = after
        assert len(opt_state.younger) == 1
        for name in ("hidden_0", "head"):
            for leaf in ("kernel", "bias"):
                np.testing.assert_allclose(
                    state.params_and_state(row)[0][name][leaf], params[name][leaf], rtol=1e-4, atol=1e-5
                )
        still = ~fit.phases[1][1]["hidden_0"]["kernel"]
        kernel = np.asarray(state.params["hidden_0"]["kernel"][row])
        assert kernel[still].tobytes() == np.asarray(fit.params["hidden_0"]["kernel"])[still].tobytes()
    assert np.isfinite(log.loss).all()
