"""Many fits share one copy of what is frozen: the same bits as alone, and the bytes of one."""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs import fit as runs_fit
from experiments.runs import resume
from experiments.runs.sources import Trained
from tljax import evaluate, initialization, masks, models, objective, optimizers, paths, penalties, plugins, train
from tljax.data import draw
from tljax.train import vectorize
from tljax.types import PhaseRule

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 3, 60).astype(np.int32)
DATA = train.load(IMAGES, LABELS)
MODEL = models.build("mlp", 3, hidden=(6, 5), activation="relu")
SOURCE = models.init(MODEL, jax.random.key(9), (4, 4, 1))
DEVICES = tuple(jax.devices())
STEPS, ENDS = 18, [4, 6, 9, 12, 15, 18]


def named(*stages):
    return lambda params: masks.under(params, list(stages))


def biases(params):
    return masks.by_path(params, lambda path: path.endswith("bias"))


def everything(params):
    return masks.by_path(params, lambda path: True)


MIDDLE_THEN_ALL_THEN_HEAD = ((0, named("hidden_1", "head")), (6, everything), (12, named("head")))
"""The bottom is shared at first and freed at step 6; then the middle is frozen as each fit left it."""


def fits_of(count, phases=((0, biases),), rules=(), weights=(), fisher=None):
    """Fits of one source, each with a head, an order and a rate of its own."""
    fits = []
    for seed in range(count):
        params = {**SOURCE, "head": models.init(MODEL, jax.random.key(seed), (4, 4, 1))["head"]}
        order = partial(draw.order, seed, 60, 10, epochs=False)
        numbers = {**optimizers.spec("adam")[1], "label_smoothing": 0.0, "average_weight": 0.1}
        rates = np.full(STEPS, 0.01 * (seed + 1), np.float32)
        built = tuple((step, mask(params)) for step, mask in phases)
        fit = train.Fit(params, built, order, rates, weights, numbers, jax.random.key(0))
        fits.append(fit._replace(rules=rules, fisher=fisher, fresh=named("head")(params)))
    return fits


def spec_of(penalty="", averages=True):
    loss, terms = objective.loss("softmax_cross_entropy"), penalties.read(penalty)[0] if penalty else ()
    return train.Spec(MODEL, loss, optimizers.spec("adam")[0], terms, averages=averages)


def score(state):
    """A score of each fit that rises and falls, from a leaf that trains."""
    heads = np.asarray(state.params["head"]["bias"], np.float64)
    return [float(np.cos(state.step + 50 * np.abs(head).sum())) for head in heads]


def ends_of(spec, fits, states=(), ends=tuple(ENDS), **execution):
    """{fit: (parameters, average, logits) in NumPy at the end}, and which leaves were shared at each state."""
    result, shared = {}, {}
    run = train.Execution(**execution)
    padded = evaluate.padded(IMAGES)
    for state, _ in train.fit(spec, fits, DATA, ends, states, run, score):
        shared[state.step] = [] if state.shared is None else paths.names(state.shared)
        logits = evaluate.logits_of(spec, fits, state, padded, 60, run)()
        for row, i in enumerate(state.fits):
            average = jax.tree.map(lambda leaf, row=row: np.array(leaf[row]), state.average.params)
            result[i] = jax.tree.map(np.array, state.params_and_state(row)[0]), average, logits[row]
    return result, shared


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype and leaf.tobytes() == other.tobytes()


def test_what_is_shared_is_the_very_array_and_equal_means_to_the_bit():
    same, plus, minus = jnp.ones(2), np.float32([0.0]), np.float32([-0.0])
    nan = np.float32([np.nan])
    trees = [{"a": same, "b": plus, "c": nan, "d": np.float32(1), "e": plus}] * 2
    trees.append({"a": same, "b": minus, "c": nan.copy(), "d": np.float32(1), "e": plus.astype(np.int32)})
    per_fit, shared = vectorize.share(trees)
    assert shared["a"] is same and paths.names(shared) == ["a", "c", "d"] and paths.names(per_fit) == ["b", "e"]
    assert np.signbit(np.asarray(per_fit["b"])).ravel().tolist() == [False, False, True]
    may = {"a": True, "b": True, "c": False, "d": False, "e": True}
    assert paths.names(vectorize.share(trees, may)[1]) == ["a"]
    assert vectorize.share(trees[:1])[1] is None
    nan[0] = 2  # of NumPy it is a copy: whoever writes into his own array does not write into ours
    assert np.isnan(shared["c"][0])


WAYS = {
    "one device": {},
    "three devices": {"devices": DEVICES[:3]},
    "batches over two": {"devices": DEVICES[:2], "devices_per_batch": 2},
    "pmap": {"devices": DEVICES[:2], "devices_per_batch": 2, "mode": "pmap"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["one device", *(pytest.param(w, marks=[pytest.mark.slow, pytest.mark.devices(3)]) for w in [*WAYS][1:])]
)
def test_through_phases_and_averages_each_fit_has_the_bits_of_a_fit_alone(way):
    """A leaf that is freed goes to each fit; one that is frozen again stays the fit's own; the best is restored."""
    rules = (PhaseRule(), PhaseRule(restore=True), PhaseRule())
    fits = fits_of(3, MIDDLE_THEN_ALL_THEN_HEAD, rules=rules)
    together, shared = ends_of(spec_of(), fits, **WAYS[way])
    assert shared[4] == ["hidden_0/bias", "hidden_0/kernel"] and shared[9] == [] == shared[18]
    alone_on = WAYS[way] if "devices_per_batch" in WAYS[way] else {}
    for i, fit in enumerate(fits):
        alone, of_one = ends_of(spec_of(), [fit], **alone_on)
        assert_same(together[i], alone[0])
        assert set(map(len, of_one.values())) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("many", ["auto", "vmap"])
def test_side_by_side_they_agree_with_fits_alone(many):
    fits, shared_too = fits_of(3), []
    if many == "auto":  # which puts fits of one order and one start side by side
        fits = [fit._replace(order=fits[0].order, params=fits[0].params, shares=0) for fit in fits]
        shared_too = ["head/kernel"]
    together, shared = ends_of(spec_of(), fits, many=many)
    assert shared[18] == [*shared_too, "hidden_0/kernel", "hidden_1/kernel"]
    for i, fit in enumerate(fits):
        for got, expected in zip(*map(jax.tree.leaves, (together[i], ends_of(spec_of(), [fit])[0][0])), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "penalty",
    [
        "l2_sp:weight=0.1",
        *(pytest.param(f"{name}:weight=0.1", marks=pytest.mark.slow) for name in ("ewc", "behaviour")),
    ],
)
def test_penalties_refer_to_a_start_that_is_shared(penalty):
    fisher = jax.tree.map(lambda leaf: jnp.square(leaf) + 1, SOURCE)
    weights = penalties.read(penalty)[1]
    fits = fits_of(2, ((0, named("hidden_1", "head")),), weights=weights, fisher=fisher)
    members, history = fits, [(fit.phases[0][1],) for fit in fits]
    specialized = train.specialize(spec_of(penalty), fits[0], history[0])
    hyper, shared = vectorize.share_hyper(specialized, members, history, None)
    assert paths.names(hyper.start) == ["head/kernel"] and "hidden_1/kernel" in paths.names(shared.start)
    together, _ = ends_of(spec_of(penalty), fits)
    for i, fit in enumerate(fits):
        assert_same(together[i], ends_of(spec_of(penalty), [fit])[0][0])


def test_a_group_that_is_saved_goes_on_with_the_same_bits_and_is_saved_in_the_room_of_one(tmp_path):
    """What it is saved as has the leaves that `abstract` says, and shares the same."""
    fits, spec = fits_of(3), spec_of()
    keys = [str(i) for i in range(3)]
    whole, _ = ends_of(spec, fits)
    state, _ = next(train.fit(spec, fits, DATA, ENDS, (), None, score))
    record = resume.Record([], 0.0, None, None, None, None)
    with resume.saving(tmp_path / "group", keys) as save:
        save(resume.Progress((resume.held(state),), (record,) * 3))
    progress = resume.find(tmp_path, keys, spec, fits, print)
    [part] = progress.parts
    assert paths.names(part.shared) == ["hidden_0/kernel", "hidden_1/kernel"]
    history = [(fit.phases[0][1],) for fit in fits]
    like = train.abstract(spec, fits, history, paths.names(part.shared))
    for name in ("params", "optimizer", "average", "shared"):
        got, expected = (jax.tree.map(jnp.shape, getattr(each, name)) for each in (part, like))
        assert got == expected
    assert_same(ends_of(spec, fits, [part])[0], whole)


def test_seeds_of_one_source_hold_its_arrays_once():
    flat = {"a": np.ones(3, np.float32), "b": np.ones(3)}
    trained = {seed: Trained(flat, 0.5, None) for seed in range(3)}
    placed = runs_fit._on_device(trained)
    assert placed[0].flat["a"] is placed[2].flat["a"] and isinstance(placed[0].flat["a"], jax.Array)
    assert placed[0].flat["b"] is flat["b"]  # float64, which is refused where it meets the model


VIT = models.build("vit:width=64:depth=1:patch=7", 4, hidden=(), activation="relu")


def started(name, source, seed, model=VIT, shape=(14, 14, 1)):
    """(A fit of a strategy of the folder from the source, what the model is applied with)."""
    method, options = plugins.method(name)
    drawn = {**source, "head": jax.tree.map(lambda leaf: leaf + seed / 8, source["head"])}
    key, contracted = jax.random.key(seed), partial(models.contracted, model, shape)
    initial = initialization.Initialization(models.names(model), source, drawn, key, contracted=contracted)
    start = initialization.start(method, options, initial)
    order = lambda first, last: np.tile(np.arange(2, dtype=np.int32), (last - first, 1))  # noqa: E731
    numbers = {**optimizers.spec("adam")[1], "label_smoothing": 0.0}
    rates = np.full(2, 0.01, np.float32)
    return train.Fit(start.params, ((0, start.phases[0][1]),), order, rates, (), numbers, key), start.applied


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bias_only", *(pytest.param(n, marks=pytest.mark.slow) for n in ("head_only", "lora", "dora"))]
)
def test_the_bytes_of_sixteen_fits_are_the_base_and_sixteen_times_what_trains(name, monkeypatch):
    """Of all arrays on the device, and of the arguments of the compiled program."""
    source = models.init(VIT, jax.random.key(9), (14, 14, 1))
    data = train.load(RNG.integers(0, 256, (2, 14, 14, 1)).astype(np.uint8), np.arange(2, dtype=np.int32))
    group, merges = zip(*(started(name, source, seed) for seed in range(16)), strict=True)
    loss = objective.loss("softmax_cross_entropy")
    spec = train.Spec(VIT, loss, optimizers.spec("adam")[0], merge=merges[0])
    trained, frozen = masks.split(group[0].params, group[0].phases[0][1])
    arguments, compiled = [], vectorize.executable

    def watched(*positional, **named):
        program = compiled(*positional, **named)
        arguments.append(program.memory_analysis().argument_size_in_bytes)
        return program

    monkeypatch.setattr(vectorize, "executable", watched)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    [(state, _)] = train.fit(spec, group, data, [2], execution=train.Execution(many="vmap"))
    gc.collect()
    new = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    of_trained = 16 * 3 * nbytes(trained)  # Adam has two moments of each
    of_data = 16 * 1024 * (2 + 1) * 4  # an order of batches of two, and rates
    assert nbytes((state.params, state.optimizer, state.shared)) == pytest.approx(nbytes(frozen) + of_trained, rel=0.01)
    assert arguments[0] - of_data == pytest.approx(nbytes(frozen) + of_trained, rel=0.1)
    assert new == pytest.approx(of_trained, rel=0.1)  # the base is the caller's own
    assert paths.names(state.shared) == paths.names(frozen)


class Compiled(Exception):
    """Raised in place of training, with the memory that the compiled program takes."""


def memory_of(name, source, model, shape, count, monkeypatch):
    """(Trained leaves of a fit, frozen leaves, memory of the program that trains `count` fits one after another)."""
    fits, merges = zip(*(started(name, source, seed, model, shape) for seed in range(count)), strict=True)
    data = train.load(RNG.integers(0, 256, (2, *shape)).astype(np.uint8), np.arange(2, dtype=np.int32))
    loss, compiled = objective.loss("softmax_cross_entropy"), vectorize.executable
    spec = train.Spec(model, loss, optimizers.spec("adam")[0], merge=merges[0])

    def watched(*positional, **named):
        raise Compiled(compiled(*positional, **named).memory_analysis())

    with monkeypatch.context() as patch, pytest.raises(Compiled) as stopped:
        patch.setattr(vectorize, "executable", watched)
        list(train.fit(spec, fits, data, [2], execution=train.Execution(many="map")))
    return *masks.split(fits[0].params, fits[0].phases[0][1]), stopped.value.args[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head_only", "lora"])
def test_64_fits_of_a_vit_s_take_the_base_and_64_times_what_trains_and_the_room_of_one_step(name, monkeypatch):
    """On 32 pixels, of one block of twelve; Adam has two moments of each number. Nothing is held a second time."""
    shape, model = (32, 32, 3), models.build("vit:size=S:depth=1:patch=4", 10, hidden=(), activation="relu")
    source = models.init(model, jax.random.key(9), shape)
    trained, frozen, memory = memory_of(name, source, model, shape, 64, monkeypatch)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    expected = nbytes(frozen) + 64 * 3 * nbytes(trained)
    assert held - 64 * 1024 * 3 * 4 == pytest.approx(expected, rel=0.1)  # less orders of two, and rates
    if name == "lora":
        of_two = memory_of(name, source, model, shape, 2, monkeypatch)[2]
        assert memory.temp_size_in_bytes - of_two.temp_size_in_bytes < 0.1 * expected


@pytest.mark.slow
def test_low_rank_fits_of_a_transformer_equal_themselves_alone():
    """To the bit one after another, and to 1e-5 side by side."""
    source = models.init(VIT, jax.random.key(9), (14, 14, 1))
    data = train.load(RNG.integers(0, 256, (2, 14, 14, 1)).astype(np.uint8), np.arange(2, dtype=np.int32))
    fits, merges = zip(*(started("lora", source, seed) for seed in range(2)), strict=True)
    loss = objective.loss("softmax_cross_entropy")
    spec = train.Spec(VIT, loss, optimizers.spec("adam")[0], merge=merges[0])

    def after(fits, many):
        [(state, _)] = train.fit(spec, fits, data, [2], execution=train.Execution(many=many))
        return [jax.tree.leaves(jax.tree.map(np.array, state.params_and_state(row)[0])) for row in range(len(fits))]

    together, beside = after(fits, "map"), after(fits, "vmap")
    for i, fit in enumerate(fits):
        [alone] = after([fit], "map")
        for got, near, expected in zip(together[i], beside[i], alone, strict=True):
            assert got.tobytes() == expected.tobytes()
            np.testing.assert_allclose(near, expected, atol=1e-5)
