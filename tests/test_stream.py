"""Data that are streamed: read ahead by row in threads, with the bits of data that are resident."""

import threading
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tljax import evaluate, masks, models, objective, optimizers, train
from tljax.data import draw
from tljax.train import data, gradients
from tljax.types import ArrayExamples, InputError

RNG = np.random.default_rng(0)
COUNT = 203
IMAGES = RNG.integers(0, 256, (COUNT, 6, 6, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 3, COUNT).astype(np.int32)
OPTIMIZER, NUMBERS = optimizers.spec("adam", clip=0.5)
DEVICES = tuple(jax.devices())
STEPS = 60
MLP = models.build("mlp", 3, hidden=(16,), activation="relu")
CNN = models.build("cnn", 3, hidden=(4, 8), activation="relu")


class ByRow:
    """Examples without arrays that count what is read of them."""

    arrays = None
    groups = None

    def __init__(self, images=IMAGES, labels=LABELS, change=None):
        self.images, self.targets, self.change = images, labels, change
        self.spec = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
        self.lock, self.read, self.under_way, self.most, self.length = threading.Lock(), 0, 0, 0, len(images)

    def __len__(self):
        return self.length

    def inputs(self, rows):
        with self.lock:
            self.read += len(rows)
        return self.images[rows] if self.change is None else self.change(self, rows)


def fits(model, seeds, strategy="full", shares=False, batch=10):
    group = []
    for seed, rate in seeds:
        params = models.init(model, jax.random.key(seed), (6, 6, 1))
        everything, head = masks.by_path(params, lambda path: True), masks.under(params, "head")
        phases = {"full": ((0, everything),), "head_only": ((0, head),), "lp_ft": ((0, head), (25, everything))}
        order, name = partial(draw.order, seed, COUNT, batch, epochs=True), (seed, batch)
        rates = np.full(STEPS, rate, np.float32)
        numbers, key = {**NUMBERS, "label_smoothing": 0.0}, jax.random.key(seed)
        shared = seed if shares else None
        group.append(
            train.Fit(params, phases[strategy], order, rates, (), numbers, key, shares=shared, order_name=name)
        )
    return group


def outcome(group, examples, model=MLP, memory=10**7, batch=10, **settings):
    """(of each fit its parameters, state and losses; logits of the test examples; messages)."""
    messages = []
    execution = train.Execution(
        on_message=messages.append,
        data="resident" if isinstance(examples, ArrayExamples) else "streamed",
        stream_memory=memory,
        **settings,
    )
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), OPTIMIZER)
    results, logits = {}, {}
    on_device = data.held(examples, execution.data, memory)
    test = evaluate.held(examples, execution)
    for state, log in train.fit(spec, group, on_device, [25, STEPS], execution=execution):
        rows = evaluate.logits_of(spec, group, state, test, COUNT, execution)
        for row, i in enumerate(state.fits):
            results.setdefault(i, []).append(jax.tree.map(lambda leaf, r=row: np.array(leaf[r]), (state[1:3], log)))
            logits.setdefault(i, []).append(rows[row])
    return [results[i] for i in range(len(group))], [logits[i] for i in range(len(group))], messages


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


WHOLE = ArrayExamples(IMAGES, LABELS)
SEEDS = [(0, 0.01), (1, 0.01), (0, 0.02), (1, 0.02)]
GROUPED = [(0, 0.01), (0, 0.02), (1, 0.01), (1, 0.02)]
CASES = {
    "one after another": (SEEDS, {}),
    "a convolution": (SEEDS[:1], {"model": CNN}),
    "phases": (SEEDS, {"strategy": "lp_ft"}),
    "features": (SEEDS, {"strategy": "lp_ft", "cache": 10**7}),
    "shared, side by side": (GROUPED, {"shares": True}),
    "side by side": (SEEDS, {"many": "vmap"}),
    "three devices": (SEEDS, {"devices": DEVICES[:3]}),
    "eight devices": (SEEDS, {"devices": DEVICES, "cache": 10**7, "strategy": "head_only"}),
    "batches over devices": (SEEDS[:2], {"devices": DEVICES[:8], "devices_per_batch": 4}),
    "pmap": (SEEDS[:2], {"devices": DEVICES[:4], "devices_per_batch": 4, "mode": "pmap"}),
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_data_give_the_bits_of_resident_data(case):
    seeds, settings = CASES[case]
    settings = dict(settings)
    group = fits(settings.get("model", MLP), seeds, settings.pop("strategy", "full"), settings.pop("shares", False))
    budget = settings.pop("cache", 0)

    def cache():
        return {"cache": train.FeatureCache(budget)} if budget else {}

    resident, resident_logits, _ = outcome(group, WHOLE, **settings, **cache())
    streamed, streamed_logits, _ = outcome(group, ByRow(), memory=20_000, **settings, **cache())
    assert_same(resident, streamed)
    assert_same(resident_logits, streamed_logits)
