"""A mask of few elements: the optimizer keeps moments of these alone, and the results are those of the whole leaf."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tljax import elementwise, masks, models, objective, optimizer, optimizers, train
from tljax.data import draw
from tljax.train import vectorize
from tljax.types import InputError

RNG = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": RNG.normal(size=(300, 200)).astype(np.float32), "bias": np.full(200, 0.5, np.float32)},
    "head": {"kernel": RNG.normal(size=(200, 3)).astype(np.float32)},
}
SHAPES = jax.eval_shape(lambda: PARAMS)
GATHERED = {**SHAPES, "body": {**SHAPES["body"], "kernel": jax.ShapeDtypeStruct((1, 90), jnp.float32)}}


def drawn(seed, share=0.001, rate=None):
    """A mask of elements of the kernel of the body alone."""
    chosen = np.random.default_rng(seed).random((300, 200)) < share
    kernel = chosen if rate is None else chosen * rate
    return {"body": {"kernel": kernel, "bias": False}, "head": {"kernel": False}}


def gradient(step, params):
    """A gradient that turns on the parameters and the step."""
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step) * 0.1, params)


def moments(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)


def whole(tx, chosen, count):
    """The kernel after steps of optax on all of it, with gradients and updates of the others set to 0 by hand."""

    @jax.jit
    def step(number, kernel, state):
        g = jnp.where(chosen, gradient(number, kernel), 0.0)
        updates, state = tx.update({"kernel": g}, state, {"kernel": kernel})
        return jnp.where(chosen, kernel + updates["kernel"], kernel), state

    kernel = PARAMS["body"]["kernel"]
    state = tx.init({"kernel": kernel})
    for number in range(count):
        kernel, state = step(number, kernel, state)
    return np.asarray(kernel), state


def of_elements(tx, mask, count, compiled=True):
    """The kernel after steps of `masked`, and the optimizer's state."""
    masked = optimizer.masked(tx, mask)

    def step(number, params, state):
        updates, state = masked.update(gradient(number, params), state, params)
        return optimizer.apply(params, updates, mask), state

    step, params, state = jax.jit(step) if compiled else step, PARAMS, masked.init(PARAMS)
    for number in range(count):
        params, state = step(number, params, state)
    return np.asarray(params["body"]["kernel"]), state


def tx_of(name, **numbers):
    return optimizers.build(*(lambda spec, values: (spec, 0.01, values))(*optimizers.spec(name, **numbers)))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adam", {}),
        *(
            pytest.param(name, numbers, marks=pytest.mark.slow)
            for name, numbers in [
                ("sgd", {"momentum": 0.9}),
                ("adamw", {"weight_decay": 0.1}),
                ("adam", {"clip": 0.05}),
                ("adamw", {"weight_decay": 0.1, "clip": 0.05, "decay": "auto"}),
                *((name, {}) for name in ("rmsprop", "lion", "adan", "novograd")),
            ]
        ),
    ],
)
def test_of_one_element_in_1000_the_moments_are_under_a_fiftieth_and_fifty_steps_give_the_same(name, numbers):
    tx, mask = tx_of(name, **numbers), drawn(1)
    chosen = mask["body"]["kernel"]
    expected, full = whole(tx, chosen, 50)
    kernel, state = of_elements(tx, mask, 50)
    assert 0 < moments(state) < moments(full) / 50
    np.testing.assert_allclose(kernel, expected, atol=1e-6)
    assert np.median(np.abs(expected - PARAMS["body"]["kernel"])[chosen]) > 1e-3
    assert kernel[~chosen].tobytes() == PARAMS["body"]["kernel"][~chosen].tobytes()


@pytest.mark.slow
def test_operation_by_operation_adam_of_elements_has_the_bits_of_adam_on_the_whole():
    mask = drawn(2, rate=0.5)
    tx, chosen = tx_of("adamw", weight_decay=0.1), mask["body"]["kernel"] > 0
    kernel = PARAMS["body"]["kernel"]
    state = tx.init({"kernel": kernel})
    for number in range(3):
        g = jnp.where(chosen, gradient(number, kernel), 0.0)
        updates, state = tx.update({"kernel": g}, state, {"kernel": kernel})
        kernel = jnp.where(chosen, kernel + updates["kernel"] * 0.5, kernel)
    assert of_elements(tx, mask, 3, compiled=False)[0].tobytes() == np.asarray(kernel).tobytes()


def decayed_and_clipped(weight_decay):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.clip_by_global_norm(1.0))


@pytest.mark.parametrize(
    ("tx", "holds"),
    [
        (optax.adam(0.1), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), True),
        (optax.adafactor(0.1), False),
        (optax.lamb(0.1), False),  # which looks at the norm of the parameters
        (optax.clip_by_block_rms(1.0), False),  # which divides by a size
        (optax.add_noise(0.1, 0.1, jax.random.key(0)), False),
        (optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1.0)), True),
        (decayed_and_clipped(0.0), True),
        (decayed_and_clipped(0.1), False),  # which looks at a norm of the parameters
        (optax.inject_hyperparams(decayed_and_clipped)(0.0), False),  # whose decay may be set to 0.1
    ],
    ids=["adam", "clip", "adafactor", "lamb", "mean", "noise", "momentum", "no decay", "decay", "injected"],
)
def test_what_an_optimizer_does_to_one_element_is_read_from_its_program(tx, holds):
    assert elementwise.holds(tx, SHAPES, GATHERED) == holds


@pytest.mark.slow
def test_which_optimizers_look_at_the_whole_leaf():
    whole = {name for name in optimizers.names() if not elementwise.holds(tx_of(name), SHAPES, GATHERED)}
    assert whole == {"adafactor", "fromage", "lamb", "lars", "sm3"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_an_optimizer_that_looks_at_the_whole_leaf_is_given_it(name):
    mask, chosen = drawn(3), drawn(3)["body"]["kernel"]
    kernel, _ = of_elements(tx_of(name), mask, 2)
    np.testing.assert_allclose(kernel, whole(tx_of(name), chosen, 2)[0], atol=1e-6)


def test_a_leaf_of_which_much_trains_is_kept_whole():
    tx = optax.adam(0.1)
    shapes = [
        optimizer.masked(tx, drawn(4, share)).init(PARAMS)[0].mu["body"]["kernel"].shape for share in (0.05, 0.01)
    ]
    assert shapes[0] == (300, 200) and shapes[1][0] == 1


@pytest.mark.slow
def test_random_masks_of_one_share_have_one_room():
    """Whatever part of the elements falls on each leaf."""
    params = {"a": PARAMS["body"]["kernel"], "b": PARAMS["body"]["kernel"][:200]}
    rooms, counts = set(), set()
    for seed in range(8):
        flat = np.random.default_rng(seed).permutation(100_000) < 300 + seed
        mask = {"a": flat[:60_000].reshape(300, 200), "b": flat[60_000:].reshape(200, 200)}
        state = optimizer.masked(optax.adam(0.1), mask).init(params)[0]
        rooms.add((state.mu["a"].shape, state.mu["b"].shape))
        counts.add(np.count_nonzero(mask["a"]))
    assert len(counts) > 4 and len(rooms) == 1


def adam_by_hand(start, freed, count):
    """Adam on each element from the step of `freed` on, while it is at least 0; algorithm 1 of arXiv:1412.6980."""
    w, m, v = np.asarray(start, np.float64), np.zeros(start.shape), np.zeros(start.shape)
    for number, since in enumerate(freed[:count]):
        on, t = since >= 0, number - since + 1
        m, v = np.where(on & (t > 1), m, 0), np.where(on & (t > 1), v, 0)
        g = np.sin(3 * w + number) * 0.1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = 0.01 * (m / (1 - 0.9 ** np.maximum(t, 1))) / (np.sqrt(v / (1 - 0.999 ** np.maximum(t, 1))) + 1e-8)
        w = np.where(on, w - step, w)
    return w


@pytest.mark.slow
def test_through_phases_each_element_has_moments_of_its_own():
    """Few elements; more of them, as a cohort; a third of the leaf; and few again, of which some went on."""
    first, second, third = drawn(1, 0.002), masks.union(drawn(1, 0.002), drawn(2, 0.001)), drawn(3, 0.3)
    third = masks.union(first, third)
    fourth = masks.intersect(third, masks.union(first, drawn(5, 0.003)))
    history, tx = (first, second, third, fourth), tx_of("adam")
    params, state = PARAMS, optimizer.masked(tx, first).init(PARAMS)
    began, ages, shapes = np.full((300, 200), -1), [], []
    for phase, mask in enumerate(history):
        freed = masks.since(*history[: phase + 1])
        if phase:
            before = history[phase - 1], masks.since(*history[:phase])
            state = optimizer.carry(tx, before, (mask, freed), state, params)
        masked = optimizer.masked(tx, mask, freed)
        shapes.append(masked.init(params))
        on = mask["body"]["kernel"]
        began = np.where(on, np.where(began < 0, 2 * phase, began), -1)
        for number in (2 * phase, 2 * phase + 1):
            updates, state = masked.update(gradient(number, params), state, params)
            params = optimizer.apply(params, updates, mask)
            ages.append(began)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes[-1])
    assert moments(shapes[0]) < moments(shapes[2]) / 50 > moments(shapes[3])
    np.testing.assert_allclose(params["body"]["kernel"], adam_by_hand(PARAMS["body"]["kernel"], ages, 8), atol=1e-5)


def test_the_state_of_another_share_is_refused():
    masked = optimizer.masked(optax.adam(0.1), drawn(1))
    with pytest.raises(InputError, match=r"state is of another mask .* optimizer\.carry"):
        masked.update(PARAMS, optimizer.masked(optax.adam(0.1), drawn(1, 0.01)).init(PARAMS), PARAMS)


TWO = {"a": PARAMS["body"]["kernel"], "b": RNG.normal(size=(200, 100)).astype(np.float32)}


def of_two_shares():
    """Of `a` 1 element in 400, of `b` 1 in 61: beside `a`, whose share counts too, `b` is whole; alone it is not."""
    a, b = (np.random.default_rng(8).permutation(leaf.size).reshape(leaf.shape) for leaf in TWO.values())
    return {"a": a < 150, "b": b < 330}


def as_elements(mask):
    return optimizer.gathered(partial(elementwise.holds_of_shapes, optax.adam(0.01)), TWO, mask)


def test_a_mask_is_gathered_once():
    mask = as_elements(of_two_shares())
    alone = as_elements({"a": False, "b": of_two_shares()["b"]})
    assert [isinstance(m, masks.Elements) for m in (mask["a"], mask["b"], alone["b"])] == [True, False, True]
    again = as_elements(mask)
    assert again["a"] is mask["a"] and again["b"] is mask["b"]
    tx, before = optax.adam(0.01), {**of_two_shares(), "b": False}
    after = mask, masks.since(before, of_two_shares())
    state = optimizer.masked(tx, as_elements(before)).init(TWO)
    carried, _ = optimizer.carry(tx, (as_elements(before), None), after, state, TWO)
    assert carried[0].mu["a"].shape[0] == 1 and carried[0].mu["b"].shape == TWO["b"].shape


def test_arrays_of_two_shares_go_through_phases_as_whole_leaves_do():
    """As in the trainer: `carry` is given what `gathered` makes, and the step has the other arrays traced."""
    every = of_two_shares()
    half = {**every, "b": every["b"] & (np.arange(100) % 2 == 0)}
    history, tx = (every, half, every), optax.adam(0.01)
    params, state = TWO, None
    began, ages = {name: np.full(leaf.shape, -1) for name, leaf in TWO.items()}, {"a": [], "b": []}
    for phase, mask in enumerate(history):
        freed, few = masks.since(*history[: phase + 1]), as_elements(mask)
        if phase:
            before = as_elements(history[phase - 1]), masks.since(*history[:phase])
            state = optimizer.carry(tx, before, (few, freed), state, params)
        else:
            state = optimizer.masked(tx, few, freed).init(params)

        @jax.jit
        def step(params, state, b, few=few, freed=freed, phase=phase):
            traced = {**few, "b": b if masks.selects(few["b"]) else few["b"]}
            updates, state = optimizer.masked(tx, traced, freed).update(gradient(phase, params), state, params)
            return optimizer.apply(params, updates, traced), state

        params, state = step(params, state, mask["b"])
        for name, at in began.items():
            at[:] = np.where(mask[name], np.where(at < 0, phase, at), -1)
            ages[name].append(at.copy())
    for name, leaf in TWO.items():
        np.testing.assert_allclose(params[name], adam_by_hand(leaf, ages[name], 3), atol=1e-5)


@pytest.mark.parametrize("nothing", [np.zeros((100, 100), bool), np.zeros((100, 100)), np.zeros((100, 1), bool)])
def test_an_array_that_selects_nothing_leaves_all_as_it_is(nothing):
    params = {"w": np.ones((100, 100), np.float32)}
    masked = optimizer.masked(optax.adam(0.1), {"w": nothing})
    updates, state = masked.update(params, masked.init(params), params)
    assert state[0].mu["w"].shape == (100, 100)
    np.testing.assert_array_equal(optimizer.apply(params, updates, {"w": nothing})["w"], params["w"])


def test_an_array_for_a_leaf_without_elements_changes_nothing_for_the_others():
    params = {"w": PARAMS["body"]["kernel"], "empty": np.ones((0, 5), np.float32)}
    chosen = drawn(1)["body"]["kernel"]
    for mask in ({"w": chosen, "empty": np.ones((0, 5), bool)}, {"w": False, "empty": np.ones((0, 5), bool)}):
        masked = optimizer.masked(optax.sgd(1.0, 0.9), mask)
        updates, state = masked.update(params, masked.init(params), params)
        assert state[0].trace["empty"].shape == (0, 5)
        expected = np.where(chosen & (mask["w"] is not False), -params["w"], 0)
        np.testing.assert_array_equal(updates["w"], expected)


@pytest.mark.parametrize("shape", [(100, 15), (100, 100)])
def test_an_array_that_is_traced_in_update_alone_is_refused(shape):
    """Of 100 x 15 elements the one has room for 15: moments [1, 15], which would broadcast to the leaf."""
    params = {"w": np.ones(shape, np.float32)}
    chosen = np.arange(params["w"].size).reshape(shape) == 7
    tx = optax.adam(0.1)
    state = optimizer.masked(tx, {"w": chosen}).init(params)
    assert state[0].mu["w"].shape[0] == 1

    def update(m, state):
        return optimizer.masked(tx, {"w": m}).update(params, state, params)

    with pytest.raises(InputError, match=r"same kind of it: .* close over it .* optimizer\.gathered") as error:
        jax.eval_shape(update, chosen, state)
    assert "\n" not in str(error.value)
    whole = jax.eval_shape(lambda m: optimizer.masked(tx, {"w": m}).init(params), chosen)
    with pytest.raises(InputError, match="same kind of it"):
        optimizer.masked(tx, {"w": chosen}).update(params, jax.tree.map(jnp.zeros_like, whole), params)
    assert jax.eval_shape(update, chosen, whole)[1][0].mu["w"].shape == shape


def test_elements_of_a_leaf_of_another_shape_are_refused():
    few = optimizer.gathered(lambda *shapes: True, TWO, {"a": of_two_shares()["a"], "b": False})
    smaller = {"a": TWO["a"][:100], "b": TWO["b"]}
    for function in (partial(masks.canonical, smaller), lambda mask: optimizer.apply(smaller, smaller, mask)):
        with pytest.raises(InputError, match=r"'a' are of a leaf of shape \(300, 200\), and this one has \(100, 200\)"):
            function(few)
    assert masks.canonical(TWO, few)["a"] is few["a"]


def test_decay_by_axes_sees_a_kernel_and_extra_trees_are_gathered_too():
    def update(updates, state, params=None, *, noise):
        return jax.tree.map(lambda u, n: u + n, updates, noise), state

    noisy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    kernels = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)  # noqa: E731
    tx, mask = optax.chain(optax.trace(0.9), optax.add_decayed_weights(-0.5, kernels)), drawn(1)
    masked = optimizer.masked(tx, mask)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    updates, state = masked.update(zeros, masked.init(PARAMS), PARAMS)
    assert state[0].trace["body"]["kernel"].shape[0] == 1
    expected = np.where(mask["body"]["kernel"], -0.5 * PARAMS["body"]["kernel"], 0)
    np.testing.assert_array_equal(updates["body"]["kernel"], expected)
    few = optimizer.gathered(lambda *shapes: True, PARAMS, mask)
    added, _ = optimizer.masked(noisy, few).update(zeros, optax.EmptyState(), PARAMS, noise=PARAMS)
    after = optimizer.apply(PARAMS, added, few)["body"]["kernel"]
    np.testing.assert_array_equal(after, PARAMS["body"]["kernel"] * np.where(mask["body"]["kernel"], 2, 1))


@pytest.mark.slow
def test_nnx_trains_elements_and_orbax_keeps_their_state(tmp_path):
    import orbax.checkpoint as ocp

    class Network(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.asarray(PARAMS["body"]["kernel"]))

    network, chosen = Network(), drawn(1)["body"]["kernel"]
    tx = optimizer.masked(optax.adam(0.1), {"kernel": chosen})
    trainer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    step = nnx.jit(lambda net, opt: opt.update(net, nnx.grad(lambda n: jnp.square(n.kernel[...]).sum())(net)))
    step(network, trainer)
    assert ((np.asarray(network.kernel[...]) != PARAMS["body"]["kernel"]) == chosen).all()
    state = tx.init({"kernel": jnp.asarray(PARAMS["body"]["kernel"])})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    for got, expected in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        np.testing.assert_array_equal(got, expected)


# In the trainer.

IMAGES = RNG.integers(0, 256, (60, 12, 12, 1)).astype(np.uint8)
DATA = train.load(IMAGES, RNG.integers(0, 3, 60).astype(np.int32))
MODEL = models.build("mlp", 3, hidden=(64,), activation="relu")
SOURCE = models.init(MODEL, jax.random.key(9), (12, 12, 1))


def trained_mask(seed, share=0.005):
    chosen = np.random.default_rng(seed).permutation(144 * 64).reshape(144, 64) < share * 144 * 64
    return {"hidden_0": {"kernel": chosen, "bias": True}, "head": {"kernel": True, "bias": True}}


def fits_of(count, phases, **numbers):
    spec, values = optimizers.spec("adamw", weight_decay=0.1, **numbers)
    fits = [
        train.Fit(
            SOURCE,
            tuple((step, mask(seed)) for step, mask in phases),
            partial(draw.order, seed, 60, 10, epochs=False),
            np.full(12, 0.01, np.float32),
            (),
            {**values, "label_smoothing": 0.0, "average_weight": 0.1},
            jax.random.key(0),
        )
        for seed in range(count)
    ]
    return train.Spec(MODEL, objective.loss("softmax_cross_entropy"), spec, averages=True), fits


def averages_of(state, row):
    """The parameters of a fit, with the average in place of what trains."""
    average = jax.tree.map(lambda leaf: leaf[row], state.average)
    return jax.tree.map(np.array, train.with_average(*state.params_and_state(row), average)[0])


def ends_of(spec, fits, states=(), ends=(6, 12), **execution):
    """{fit: arrays at the end}, and the last state."""
    result, state = {}, None
    for state, _ in train.fit(spec, fits, DATA, ends, states, train.Execution(**execution)):
        for row, i in enumerate(state.fits):
            result[i] = jax.tree.leaves(
                (jax.tree.map(np.array, state.params_and_state(row)[0]), averages_of(state, row))
            )
    return result, state


def more(seed):
    return masks.union(trained_mask(seed), trained_mask(50 + seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "execution",
    [{}, {"many": "vmap", "devices": tuple(jax.devices()[:2])}],
    ids=["one after another", "side by side over devices"],
)
def test_fits_of_elements_agree_with_fits_on_whole_leaves_and_share_a_program(execution, monkeypatch):
    spec, fits = fits_of(2, ((0, trained_mask), (6, more)))
    sizes = [vectorize.segment._cache_size()]
    few, state = ends_of(spec, fits, **execution)
    sizes.append(vectorize.segment._cache_size())
    monkeypatch.setattr(optimizer, "SHARE", 10**9)
    every, other = ends_of(spec, fits, **execution)
    compiled, of_whole_leaves = np.diff([*sizes, vectorize.segment._cache_size()])
    assert compiled == of_whole_leaves > 0
    assert moments(state.optimizer) < moments(other.optimizer) / 10
    assert moments(state.average) < moments(other.average) / 10
    for i in every:
        for got, expected in zip(few[i], every[i], strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def bias_alone(seed):
    return {"hidden_0": {"kernel": False, "bias": True}, "head": {"kernel": False, "bias": False}}


def others(seed):
    return trained_mask(50 + seed)


def test_the_average_of_few_elements_is_kept_of_these_alone_and_is_that_of_the_values_after_each_step():
    spec, [fit] = fits_of(1, ((0, trained_mask),))
    chosen = trained_mask(0)["hidden_0"]["kernel"]
    expected, last = np.asarray(SOURCE["hidden_0"]["kernel"], np.float64), None
    for last, _ in train.fit(spec, [fit], DATA, range(1, 13)):
        expected = expected + 0.1 * (
            np.asarray(last.params_and_state(0)[0]["hidden_0"]["kernel"], np.float64) - expected
        )
    kernel, start = averages_of(last, 0)["hidden_0"]["kernel"], np.asarray(SOURCE["hidden_0"]["kernel"])
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-6)
    assert (kernel[chosen] != start[chosen]).all() and kernel[~chosen].tobytes() == start[~chosen].tobytes()
    held, places = last.average.params["hidden_0"]["kernel"], last.average.places["hidden_0"]["kernel"]
    assert held.shape == (1, 1, places.shape[1]) and places.shape[1] < chosen.size / 50
    assert last.average.places["head"] == {"kernel": None, "bias": None}


def test_of_one_element_in_a_thousand_moments_and_averages_take_under_two_percent_of_those_of_all():
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    params = models.init(model, jax.random.key(0), (28, 28, 1))
    spec, [fit] = fits_of(1, ((0, bias_alone),))
    spec, draws, taken = replace(spec, model=model), np.random.default_rng(0), {}
    few = jax.tree.map(lambda leaf: draws.permutation(leaf.size).reshape(leaf.shape) < leaf.size / 1000, params)
    for name, mask in (("few", few), ("all", jax.tree.map(lambda leaf: True, params))):
        state = train.abstract(spec, [fit._replace(params=params, phases=((0, mask),))], [(mask,)])
        taken[name] = [
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
            for tree in (state.optimizer, state.average, state.best[1])
        ]
    assert all(part < 0.02 * whole for part, whole in zip(taken["few"], taken["all"], strict=True)), taken


@pytest.mark.slow
def test_an_average_of_few_elements_becomes_whole_where_others_train_and_rests_where_none_does(monkeypatch):
    spec, fits = fits_of(2, ((0, trained_mask), (4, bias_alone), (8, others)))
    masks_of_phases = [tuple(mask for _, mask in fits[0].phases[: phase + 1]) for phase in range(3)]
    shapes = [
        train.abstract(spec, fits[:1], [history]).average.params["hidden_0"]["kernel"].shape
        for history in masks_of_phases
    ]
    assert shapes[0] == shapes[1] and shapes[0][:2] == (1, 1) and shapes[2] == (1, 144, 64)
    few, state = ends_of(spec, fits, ends=(4, 8, 12))
    assert state.average.places is None
    monkeypatch.setattr(optimizer, "SHARE", 10**9)
    every, _ = ends_of(spec, fits, ends=(4, 8, 12))
    for i in every:
        for got, expected in zip(few[i], every[i], strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.slow
def test_a_saved_state_of_elements_goes_on_with_the_same_bits():
    spec, fits = fits_of(2, ((0, trained_mask), (6, more)), clip=0.1)
    few, _ = ends_of(spec, fits)
    first, _ = next(train.fit(spec, fits, DATA, [6, 12]))
    kept = jax.tree.map(np.array, first)
    like = train.abstract(spec, fits, first.masks)
    for name in ("optimizer", "average"):
        got, expected = getattr(kept, name), getattr(like, name)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    again, _ = ends_of(spec, fits, [kept])
    for i in few:
        assert all(got.tobytes() == other.tobytes() for got, other in zip(few[i], again[i], strict=True))
