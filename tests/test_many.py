"""Many fits at once: over devices, side by side or one after another, each is what it is alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import evaluate, masks, models, objective, optimizers, penalties, train
from tljax.data import draw
from tljax.train import vectorize

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8))
LABELS = jnp.asarray(RNG.integers(0, 3, 60).astype(np.int32))
DATA = train.load(IMAGES, LABELS)
MODEL = models.build("mlp", 3, hidden=(6,), activation="relu")
OPTIMIZER, NUMBERS = optimizers.spec("sgd", momentum=0.5, clip=0.5)
SPEC = train.Spec(
    MODEL, objective.loss("softmax_cross_entropy"), OPTIMIZER, penalties.read("l2:weight=1")[0], smooth_labels=True
)
DEVICES = tuple(jax.devices())
TWO = pytest.param(2, marks=pytest.mark.devices(2))
STEPS = 50


def start(seed=0):
    return models.init(MODEL, jax.random.key(seed), (4, 4, 1))


def order_of(seed, subset=None):
    n = 60 if subset is None else len(subset)
    return partial(draw.order, seed, n, 10, epochs=False, subset=subset)


def fit(params, order, rate=0.05, weight=1e-2, smoothing=0.1, mask=None, phases=None, shares=None):
    mask = masks.by_path(params, lambda path: True) if mask is None else mask
    return train.Fit(
        params,
        phases or ((0, mask),),
        order,
        np.full(STEPS, rate, np.float32),
        ({"weight": weight},),
        {**NUMBERS, "label_smoothing": smoothing},
        jax.random.key(0),
        shares=shares,
    )


def fitted(fits, **execution):
    """{trial: (parameters, losses)} and what was said."""
    messages, results = [], {}
    for state, log in train.fit(
        SPEC, fits, DATA, [20, STEPS], execution=train.Execution(on_message=messages.append, **execution)
    ):
        for row, i in enumerate(state.fits):
            params = jax.tree.map(np.array, state.params_and_state(row)[0])
            results[i] = (params, np.concatenate([results[i][1] if i in results else [], log.loss[row]]))
    return [results[i] for i in range(len(fits))], messages


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_near(got, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def seeds(count):
    return [fit(start(i), order_of(i)) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 9))])
def test_over_devices_a_fit_has_the_bits_of_a_fit_alone(count):
    together, _ = fitted(seeds(count), devices=DEVICES)
    for i, fit_alone in enumerate(seeds(count)):
        assert_same(together[i], fitted([fit_alone])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("many", ["map", "vmap"])
def test_as_a_gpu_loops_over_steps_and_lays_fits_out_a_fit_is_the_same(many, monkeypatch):
    def fits():
        return [fit(start(0), order_of(0), rate=rate, shares="one") for rate in (0.05, 0.1, 0.2)]

    here, _ = fitted(fits(), many=many)
    monkeypatch.setattr(vectorize, "BLOCK", 8)
    monkeypatch.setattr(vectorize, "_on_platform", lambda mesh: {"platform": "gpu"})
    there, _ = fitted(fits(), many=many)
    (assert_same if many == "map" else assert_near)(there, here)


def test_what_differs_in_numbers_orders_or_examples_is_one_group_and_one_executable():
    """Seeds, rates, lambdas, label smoothing, and training subsets by index."""
    few = np.arange(0, 60, 7, dtype=np.int32)
    fits = [
        fit(start(0), order_of(0)),
        fit(start(1), order_of(1), rate=0.2),
        fit(start(0), order_of(0), weight=0.3),
        fit(start(0), order_of(0), smoothing=0.4),
        fit(start(0), order_of(0, few)),
    ]
    before = vectorize.segment._cache_size()
    together, _ = fitted(fits)
    assert vectorize.segment._cache_size() == before + 1
    for i, fit_alone in enumerate(fits):
        assert_same(together[i], fitted([fit_alone])[0][0])
    assert len({float(losses[-1]) for _, losses in together}) == 5


@pytest.mark.slow
def test_numbers_and_arrays_in_masks_part_a_group_though_they_compile_to_one_program():
    params = start()
    half = masks.scale(masks.by_path(params, lambda path: True), 0.5)
    some = jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 2 == 0, params)
    fits = [fit(params, order_of(0), mask=mask) for mask in (half, some)]
    together, _ = fitted(fits)
    for i, fit_alone in enumerate(fits):
        assert_same(together[i], fitted([fit_alone])[0][0])


def with_one_order(seeds=2, rates=3):
    fits = []
    for seed in range(seeds):
        params, order = start(seed), order_of(seed)
        fits += [fit(params, order, rate=0.02 * (i + 1), shares=seed) for i in range(rates)]
    return fits


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, TWO, pytest.param(8, marks=[pytest.mark.slow, pytest.mark.devices(8)])])
def test_trials_of_one_order_one_after_another_have_the_bits_of_fits_alone(devices):
    together, messages = fitted(with_one_order(), devices=DEVICES[:devices], many="map")
    where = "on one device" if devices == 1 else "on each of 2 devices"
    assert messages == [f"6 fits, one after another {where}: those of one order of examples share a device"]
    for i, fit_alone in enumerate(with_one_order()):
        assert_same(together[i], fitted([fit_alone])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, TWO])
@pytest.mark.parametrize("many", ["auto", "vmap"])
def test_side_by_side_they_agree_with_fits_alone(many, devices):
    together, messages = fitted(with_one_order(), devices=DEVICES[:devices], many=many)
    assert len(messages) == 1 and "side by side" in messages[0]
    for i, fit_alone in enumerate(with_one_order()):
        assert_near(together[i], fitted([fit_alone])[0][0])


def test_side_by_side_in_groups_of_seeds_only_when_asked():
    assert fitted(seeds(5))[1] == ["5 fits, one after another on one device"]
    together, messages = fitted(seeds(5), many="vmap")
    assert messages == ["5 fits, side by side on one device"]
    for i, fit_alone in enumerate(seeds(5)):
        assert_near(together[i], fitted([fit_alone])[0][0])


def test_wide_steps_go_one_after_another_unless_a_flag_says_otherwise():
    wide = models.build("mlp", 3, hidden=(4096,), activation="relu")
    params = jax.tree.map(jnp.zeros_like, models.init(wide, jax.random.key(0), (28, 28, 1)))
    order = lambda begin, end: np.zeros((end - begin, 100), np.int32)  # noqa: E731
    for mask, expected in ((masks.by_path(params, lambda path: True), False), (masks.under(params, "head"), True)):
        fits = [fit(params, order, mask=mask, shares=0) for _ in range(2)]
        spec = train.specialize(train.Spec(wide, SPEC.loss, OPTIMIZER, SPEC.penalties), fits[0], (mask,))
        data = train.load(np.zeros((1, 28, 28, 1), np.uint8))
        width = vectorize.shared_width(spec, fits, [(mask,)] * 2)
        assert width == 2
        modes = [vectorize.choose_mode(spec, fits, width, data, many) for many in ("auto", "vmap", "map")]
        assert modes == ["vmap_shared" if expected else "map", "vmap", "map"]


def test_work_is_about_what_xla_counts_for_a_step():
    params = models.init(models.build("mlp", 10, hidden=(512,), activation="relu"), jax.random.key(0), (28, 28, 1))
    spec = train.Spec(models.build("mlp", 10, hidden=(512,), activation="relu"), SPEC.loss, OPTIMIZER)
    order = lambda begin, end: np.zeros((end - begin, 100), np.int32)  # noqa: E731
    for mask, expected in (
        (masks.by_path(params, lambda path: True), 3 * 81.4e6),
        (masks.under(params, "head"), 3 * 1.03e6),
    ):
        member = fit(params, order, mask=mask)
        got = vectorize.step_work(
            train.specialize(spec, member, (mask,)), member, train.load(np.zeros((1, 28, 28, 1), np.uint8))
        )
        assert got == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_probes_on_the_features_of_several_sources_side_by_side_over_devices():
    def heads():
        return [fit._replace(phases=((0, masks.under(fit.params, "head")),)) for fit in with_one_order(4, 2)]

    cache = train.FeatureCache(10**8)
    together, _ = fitted(heads(), devices=DEVICES[:2], cache=cache)
    assert [array.shape for array in cache.arrays.values()] == [(4, 60, 6)]
    for i, fit_alone in enumerate(heads()):
        assert_near(together[i], fitted([fit_alone])[0][0])


@pytest.mark.slow
def test_lanes_part_where_the_frozen_stages_were_trained_before():
    """Two rates, one order: all trains, then the head on features that are now two."""
    params, order = start(), order_of(0)
    phases = ((0, masks.by_path(params, lambda path: True)), (20, masks.under(params, "head")))
    fits = [fit(params, order, rate=rate, phases=phases, shares=0) for rate in (0.02, 0.2)]
    cache = train.FeatureCache(10**8)
    together, _ = fitted(fits, cache=cache)
    assert [array.shape for array in cache.arrays.values()] == [(2, 60, 6)]
    for i, fit_alone in enumerate(fits):
        assert_near(together[i], fitted([fit_alone])[0][0])


@pytest.mark.slow
@pytest.mark.devices(2)
def test_a_stop_and_resume_over_devices_gives_the_bits_of_no_stop():
    whole, _ = fitted(seeds(4), devices=DEVICES[:2])
    execution = train.Execution(DEVICES[:2])
    ends = [20, STEPS]
    state, _ = next(train.fit(SPEC, seeds(4), DATA, ends, execution=execution))
    saved = jax.device_get(state)
    [(state, _)] = train.fit(SPEC, seeds(4), DATA, ends, [saved], execution)
    for row in range(4):
        assert_same(jax.tree.map(np.array, state.params_and_state(row)[0]), whole[row][0])


@pytest.mark.devices(4)
def test_what_goes_in_several_parts_says_of_how_many_fits_each_is():
    """Five fits on two devices are four and one; the one by itself is told by nobody."""
    assert fitted(seeds(5), devices=DEVICES[:2])[1] == ["4 of 5 fits, one after another on each of 2 devices"]
    assert fitted(seeds(5), devices=DEVICES[:4])[1] == ["4 of 5 fits at once, one on each of 4 devices"]
    assert fitted(seeds(7), devices=DEVICES[:4])[1] == [
        "4 of 7 fits at once, one on each of 4 devices",
        "3 of 7 fits at once, one on each of 3 devices",
    ]


def test_devices_take_whole_rounds_and_the_rest_goes_on_as_many_as_it_needs():
    assert [vectorize.group_sizes(n, 8, n) for n in (1, 8, 9, 23)] == [[1], [8], [8, 1], [16, 7]]
    assert [vectorize.most_that_divide(n, 8) for n in (1, 7, 12, 16)] == [1, 7, 6, 8]


@pytest.mark.devices(2)
def test_logits_over_devices_are_those_of_each_fit():
    states = list(train.fit(SPEC, seeds(4), DATA, [STEPS], execution=train.Execution(DEVICES[:2])))
    padded = evaluate.padded(np.asarray(IMAGES))
    got = evaluate.logits_of(SPEC, seeds(4), states[0][0], padded, 60, train.Execution(DEVICES[:2]))()
    for row in range(4):
        params = jax.tree.map(np.asarray, states[0][0].params_and_state(row)[0])
        np.testing.assert_allclose(got[row], models.apply(MODEL, params, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_the_norm_of_the_gradient_too_has_the_bits_of_a_fit_alone():
    """At a width where a product with ones adds in an order that goes with the devices; and it is the norm.

    So have loss, penalty and parameters, under a clip by the norm.
    """
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    images = jnp.asarray(RNG.integers(0, 256, (100, 28, 28, 1)).astype(np.uint8))
    labels = jnp.asarray(RNG.integers(0, 10, 100).astype(np.int32))
    data = train.load(images, labels)
    spec = train.Spec(model, SPEC.loss, OPTIMIZER, SPEC.penalties)

    def norms(seeds, devices):
        params = [models.init(model, jax.random.key(seed), (28, 28, 1)) for seed in seeds]
        mask = masks.by_path(params[0], lambda path: True)
        order = lambda first, last: np.tile(np.arange(100, dtype=np.int32), (last - first, 1))  # noqa: E731
        rates, numbers = np.full(12, 0.05, np.float32), {**NUMBERS, "label_smoothing": 0.0}
        group = [
            train.Fit(start, ((0, mask),), order, rates, ({"weight": 1e-3},), numbers, jax.random.key(0))
            for start in params
        ]
        [(state, log)] = train.fit(spec, group, data, [12], execution=train.Execution(DEVICES[:devices]))
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (log, state.params))
        return first, params[0]

    alone, params = norms((0,), 1)
    assert_same(alone, norms((0, 1), 2)[0])

    def mean_loss(params):
        loss = optax.softmax_cross_entropy_with_integer_labels(models.apply(model, params, images), labels).mean()
        return loss + 1e-3 / 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(jax.grad(mean_loss)(params))]
    np.testing.assert_allclose(alone[0].gradient_norm[0], np.sqrt(sum(leaf @ leaf for leaf in leaves)), rtol=1e-5)
