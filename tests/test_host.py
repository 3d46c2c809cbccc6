"""What the host does while fits train, counted: what it draws, reads, brings over and looks at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs import resume
from tljax import evaluate, masks, models, objective, optimizer, optimizers, paths, train
from tljax.data import draw, philox
from tljax.train import features, loop, vectorize
from tljax.types import PhaseRule

MODEL = models.build("mlp", 3, hidden=(4,), activation="relu")
RNG = np.random.default_rng(0)
COUNT, BATCH = 23, 5
DATA = train.load(RNG.integers(0, 256, (COUNT, 2, 2, 1)).astype(np.uint8), RNG.integers(0, 3, COUNT).astype(np.int32))
SGD, NUMBERS = optimizers.spec("sgd", momentum=0.9)
SPEC = train.Spec(MODEL, objective.loss("softmax_cross_entropy"), SGD)


def everything(params):
    return masks.by_path(params, lambda path: True)


def head(params):
    return masks.under(params, "head")


def fits(seeds, steps, phases=((0, everything),), order=None):
    def fit(seed):
        params = models.init(MODEL, jax.random.key(seed), (2, 2, 1))
        of_params = tuple((start, mask(params)) for start, mask in phases)
        rows = order or draw.Order(seed, COUNT, BATCH, True)
        rates = np.full(steps, 0.1, np.float32)
        return train.Fit(params, of_params, rows, rates, (), NUMBERS, jax.random.key(seed))

    return [fit(seed) for seed in seeds]


def trained(group, ends, **execution):
    return [
        (jax.tree.map(np.array, (state.params, state.optimizer)), log)
        for state, log in train.fit(SPEC, group, DATA, ends, execution=train.Execution(many="map", **execution))
    ]


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# ---- What is drawn


def test_the_device_draws_the_integers_of_numpy():
    """Seeds and counters at the edges of 32 and 64 bits; a length that four does not divide."""
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1]
    halves = jnp.asarray(np.array([philox.halves(seed) for seed in seeds]))
    for first in (0, 1, 2**27, 2**32 // 26 + 1, 2**50):
        counter = jnp.asarray(np.array(philox.halves(first * 26)))
        drawn = philox.permutations(halves, counter, n=101, epochs=2)
        keys = [np.array([seed, 0], np.uint64) for seed in seeds]
        words = [np.random.Philox(key=key, counter=first * 26).random_raw(2 * 104) for key in keys]
        expected = np.argsort(np.array(words).reshape(-1, 2, 104)[..., :101], axis=-1, kind="stable")
        np.testing.assert_array_equal(drawn, expected)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 1000, 60_000])
def test_the_device_draws_orders_of_any_length(n):
    for seed, first in ((3, 0), (2**40 + 1, 7)):
        counter = jnp.asarray(np.array(philox.halves(first * -(-n // 4))))
        drawn = philox.permutations(jnp.asarray(np.array([philox.halves(seed)])), counter, n=n, epochs=3)[0]
        words = draw.words(seed, draw.ORDER, first, 3, n)
        np.testing.assert_array_equal(drawn, np.argsort(words, axis=1, kind="stable"))


@pytest.mark.parametrize("epochs", [True, False])
def test_chunks_that_the_device_draws_are_those_of_the_host(epochs, monkeypatch):
    """With a subset, an order that two fits have, ends within epochs, and chunks shorter than the way."""
    monkeypatch.setattr(vectorize, "capacity", lambda batch: 12)
    subset = np.arange(100, 100 + COUNT, dtype=np.int32)[::-1]
    orders = [draw.Order(seed, COUNT, BATCH, epochs, subset) for seed in (1, 2, 1)]
    group = [fit._replace(order=order) for fit, order in zip(fits(range(3), 40), orders, strict=True)]
    group[2] = group[2]._replace(order=group[0].order)
    rows = {}
    for on_device in (False, True):
        monkeypatch.setattr(vectorize, "draws_on_device", lambda orders, platform, answer=on_device: answer)
        chunks = list(vectorize.resident_chunks(DATA, DATA.targets, group, 1, None, [3, 8, 40]))
        assert [chunk.start for chunk in chunks] == [3, *(chunk.stop for chunk in chunks[:-1])]
        assert chunks[-1].stop == 40
        of_steps = [np.asarray(chunk.order)[:, : chunk.stop - chunk.start] for chunk in chunks]
        rows[on_device] = np.concatenate(of_steps, 1)
    np.testing.assert_array_equal(rows[True], rows[False])
    np.testing.assert_array_equal(rows[False], np.stack([order(3, 40) for order in orders]))


def test_a_device_draws_where_it_is_none_of_a_cpu_and_there_is_much_to_draw():
    few, many = ([draw.Order(seed, n, 100, True) for seed in range(80)] for n in (1000, 60_000))
    assert vectorize.draws_on_device(many, "gpu")
    assert not vectorize.draws_on_device(many, "cpu") and not vectorize.draws_on_device(few, "gpu")
    assert not vectorize.draws_on_device([*many, few[0]], "gpu")
    assert not vectorize.draws_on_device([*many, lambda start, stop: many[0](start, stop)], "gpu")


def test_each_epoch_is_drawn_once_for_all_fits_calls_phases_and_groups(monkeypatch):
    drawn = []
    inner = draw.words

    def words(seed, stream, first, rows, n):
        drawn.extend((seed, epoch) for epoch in range(first, first + rows))
        return inner(seed, stream, first, rows, n)

    monkeypatch.setattr(draw, "words", words)
    monkeypatch.setattr(draw, "_DRAWN", draw._Drawn(10**6))
    for capacity in (1024, 7):
        monkeypatch.setattr(vectorize, "capacity", lambda batch, rows=capacity: rows)
        for group in (fits([0, 1, 1, 0], 20, ((0, head), (8, everything))), fits([1], 20)):
            trained(group, [3, 8, 20])
    assert sorted(drawn) == [(seed, epoch) for seed in (0, 1) for epoch in range(4)]


def test_what_is_remembered_of_draws_has_a_bound(monkeypatch):
    memory = draw._Drawn(6 * 440 + 10)
    first = memory.epochs(0, 10, 0, 9)
    assert memory.held <= 6 * 440 + 10 and len(memory.rows) == 6
    np.testing.assert_array_equal(memory.epochs(0, 10, 0, 9), first)


def test_words_are_sorted_as_by_a_stable_argsort_where_they_agree():
    """In all bits, or in all but those that the numbers of 6 words take the place of."""
    high = np.uint64(2**63)
    rows = np.array([[7, 5, 7, 0, 5, 7], [high + 5, high + 3, 9, 8, high, 1], [2**64 - 1, 0, 1, 2, 3, 4]], np.uint64)
    np.testing.assert_array_equal(draw.sorting(rows), np.argsort(rows, axis=1, kind="stable"))


# ---- What is read and brought over


def test_a_call_is_dispatched_before_the_log_of_the_one_before_is_read(monkeypatch):
    """At most two are under way; the first of a phase, whose duration says how long others may be, is alone."""
    events = []
    run, host = vectorize.run, loop.host
    monkeypatch.setattr(vectorize, "run", lambda *a, **b: events.append("call") or run(*a, **b))
    monkeypatch.setattr(loop, "host", lambda tree: events.append("read") or host(tree))
    for module in (vectorize, loop):
        monkeypatch.setattr(module, "capacity", lambda batch: 20)
    monkeypatch.setattr(loop, "_steps_for_longest", lambda steps, seconds: 20)
    [(_, log)] = trained(fits([0], 76), [76])
    assert events == ["call", "read", "call", *["call", "read"] * 3, "read"]
    monkeypatch.setattr(loop, "AHEAD", 1)
    [(_, waited)] = trained(fits([0], 76), [76])
    assert same(log, waited) and log.loss.shape == (1, 76)


def test_other_work_is_done_while_the_devices_train(monkeypatch):
    """Until the log is there; the time of such a call says nothing of how long the next may be."""
    left, sized = [5], []

    class Slow:
        """A log that is ready when it has been asked three times."""

        def __init__(self, curve):
            self.curve, self.asked = curve, 0

        def is_ready(self):
            self.asked += 1
            return self.asked > 3

        def __array__(self, *how):
            return np.asarray(self.curve)

    def work():
        left[0] -= 1
        return left[0] >= 0

    run = vectorize.run

    def slow(*arguments, **further):
        *state, log = run(*arguments, **further)
        return *state, log._replace(loss=Slow(log.loss))

    monkeypatch.setattr(vectorize, "run", slow)
    monkeypatch.setattr(loop, "host", lambda log: jax.tree.map(np.asarray, log))
    monkeypatch.setattr(loop, "_steps_for_longest", lambda steps, seconds: sized.append(steps) or 16)
    trained(fits([0], 48), [16, 32, 48], meanwhile=work)
    assert left[0] == -2 and sized == [16]  # three pieces; two and a question that finds none left; another such
    left[0] = 0
    sized.clear()
    trained(fits([0], 48), [16, 32, 48], meanwhile=work)
    assert sized == [16, 16, 16]


def test_a_call_whose_end_nobody_saw_does_not_size_the_next(monkeypatch):
    """Steps of 10 ms by a clock of the test's: other work outlasts two calls, and the next have 20 steps still."""
    now, free, steps, idle = [0.0], [0.0], [], [True]

    class Timed:
        """A log that is there at a time of its own."""

        def __init__(self, curve, ready):
            self.curve, self.ready = curve, ready

        def is_ready(self):
            return now[0] >= self.ready

        def __array__(self, *how):
            now[0] = max(now[0], self.ready)
            return np.asarray(self.curve)

    run = vectorize.run

    def timed(*arguments, **further):
        *state, log = run(*arguments, **further)
        steps.append(int(arguments[12][2] - arguments[12][1]))
        free[0] = max(free[0], now[0]) + 0.01 * steps[-1]
        return *state, log._replace(loss=Timed(log.loss, free[0]))

    def work():
        if len(steps) < 4 or not idle[0]:
            return False
        idle[0], now[0] = False, max(now[0], free[0]) + 0.01
        return True

    monkeypatch.setattr(vectorize, "run", timed)
    monkeypatch.setattr(loop, "host", lambda log: jax.tree.map(np.asarray, log))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "LONGEST", 0.2)
    trained(fits([0], 400), [400], meanwhile=work)
    assert not idle[0] and max(steps) <= 21


@pytest.mark.devices(4)
def test_the_best_point_follows_the_fits_that_train_on(monkeypatch):
    """As on an accelerator, where copies stay on the devices: one of four fits ends, three stand on three devices."""
    monkeypatch.setattr(vectorize, "copied", vectorize._copied)
    rules = [(PhaseRule(restore=True, until=lambda s, i=i: len(s) >= (1 if i == 0 else 9)),) for i in range(4)]
    group = [fit._replace(rules=rule) for fit, rule in zip(fits(range(4), 12), rules, strict=True)]
    execution, scores = train.Execution(many="map", devices=tuple(jax.devices()[:4])), iter(range(100))
    validate = lambda state: [float(next(scores))] * len(state.fits)  # noqa: E731
    states = [state for state, _ in train.fit(SPEC, group, DATA, [4, 8, 12], execution=execution, validate=validate)]
    assert [state.fits for state in states if state.over] == [(0,), (1, 2, 3)]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_phase_begins_on_the_devices(devices, monkeypatch):
    """Nothing but logs is read, also on a mesh; the optimizer's states of all fits are carried at once."""
    read, carried = [], []
    host, carry = vectorize.host, optimizer.carry
    for module in (vectorize, loop):
        monkeypatch.setattr(module, "host", lambda tree: read.append(type(tree)) or host(tree))
    monkeypatch.setattr(optimizer, "carry", lambda *a: carried.append(a) or carry(*a))
    group = fits(range(4), 12, ((0, head), (4, everything), (8, head)))
    states = trained(group, [4, 8, 12], devices=tuple(jax.devices()[:devices]))
    assert set(read) == {train.Log} and len(carried) == 2
    [*_, (alone, _)] = trained(group[2:3], [4, 8, 12])
    assert same(alone, jax.tree.map(lambda leaf: leaf[2:3], states[-1][0]))


def test_what_is_the_same_for_all_fits_is_looked_at_once(monkeypatch):
    """The spec and the numbers of masks; one array of all fits; one key."""
    calls = []
    for name in ("group_key", "specialize"):
        inner = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *a, inner=inner, name=name: calls.append(name) or inner(*a))
    ranks = vectorize.cohort_ranks
    monkeypatch.setattr(vectorize, "cohort_ranks", lambda *a: calls.append("ranks") or ranks(*a))
    counts = []
    for count in (2, 12):
        calls.clear()
        next(train.fit(SPEC, fits(range(count), 4), DATA, [4]))
        counts.append(sorted(calls))
    assert counts[0] == counts[1] and counts[0].count("group_key") == 1
    looked = []
    on_host = vectorize._on_host
    monkeypatch.setattr(vectorize, "_on_host", lambda leaf: looked.append(leaf) or on_host(leaf))
    leaf = np.arange(3.0, dtype=np.float32)
    stacked = vectorize.stack([{"a": leaf, "b": np.float32(i)} for i in range(6)])
    assert len(looked) == 7 and stacked["a"].shape == (6, 3) and stacked["b"].tolist() == list(range(6))


def test_a_large_array_of_all_fits_is_repeated_on_the_device(monkeypatch):
    monkeypatch.setattr(vectorize, "LARGE", 1)
    trees = [{"a": leaf, "b": jnp.full(2, i)} for leaf in [jnp.arange(3.0)] for i in range(3)]
    repeated = vectorize.stack(trees)
    monkeypatch.setattr(vectorize, "LARGE", 10**9)
    assert same(repeated, vectorize.stack(trees))
    assert repeated["a"].shape == (3, 3)


def test_keys_are_stacked_as_jax_does_it():
    keys = [jax.random.key(seed, impl="rbg") for seed in (1, 2)]
    stacked = vectorize.stack_keys([*keys, keys[0]])
    expected = jnp.stack([*keys, keys[0]])
    assert stacked.dtype == expected.dtype
    assert same(jax.random.key_data(stacked), jax.random.key_data(expected))


def test_a_frozen_prefix_is_read_once_however_often_fits_are_evaluated(monkeypatch):
    """The digests under which its features are kept are those of arrays that stay the same."""
    read = []
    host = features.host
    monkeypatch.setattr(features, "host", lambda tree: read.append(tree) or host(tree))
    group, execution = fits([0, 1], 6, ((0, head),)), train.Execution(cache=train.FeatureCache(10**9))
    group = [fit._replace(params={**fit.params, "hidden_0": group[0].params["hidden_0"]}) for fit in group]
    test = evaluate.padded(np.zeros((5, 2, 2, 1), np.uint8))
    for state, _ in train.fit(SPEC, group, DATA, [3, 6], execution=execution):
        evaluate.logits_of(SPEC, group, state, test, 5, execution)()
    assert len(read) == 2 and len(execution.cache.arrays) == 2  # what fits have, and what they share; two splits


# ---- What is saved


@pytest.mark.parametrize("on_devices", [False, True])
def test_what_is_held_of_a_state_outlives_the_next_segment(on_devices, monkeypatch):
    """Copies of what trains, by the devices too; what no segment takes over is the state's own. The optimizer's state
    is there where it is to be saved, and else comes from the state of the fits that was yielded last."""
    if on_devices:
        monkeypatch.setattr(vectorize, "copied", vectorize._copied)
    group = fits(range(3), 8, ((0, head),))
    expected = trained(group, [4, 8])
    steps = train.fit(SPEC, group, DATA, [4, 8], execution=train.Execution(many="map"))
    state, _ = next(steps)
    moves = [path.startswith("head") for path, _ in paths.items(state.params)]
    whole, light = (resume.held(state, whole, moves) for whole in (True, False))
    assert light.optimizer is None and light.params["hidden_0"]["kernel"] is state.params["hidden_0"]["kernel"]
    part = train.select(light, [2, 0])
    with_its_own = resume.on_host(resume.with_optimizer(part, [((5,), None), (state.fits, state.optimizer)]))
    next(steps)
    assert same((whole.params, whole.optimizer), expected[0][0]) and same(light.params, whole.params)
    assert same(with_its_own.optimizer, jax.tree.map(lambda leaf: np.asarray(leaf)[[2, 0]], expected[0][0][1]))
