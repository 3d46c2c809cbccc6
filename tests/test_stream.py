"""Data that are streamed: read ahead by row in threads, with the bits of data that are resident."""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import residual
from PIL import Image
from test_programs import arguments
from test_resume import FLAGS, Killed, killed_after, same_run

from experiments import pretrain, transfer
from tljax import batch_stats, evaluate, masks, models, objective, optimizers, train
from tljax.data import draw
from tljax.data import load as load_task
from tljax.train import data, gradients
from tljax.types import ArrayExamples, InputError

RNG = np.random.default_rng(0)
COUNT = 203
IMAGES = RNG.integers(0, 256, (COUNT, 6, 6, 1)).astype(np.uint8)
LABELS = RNG.integers(0, 3, COUNT).astype(np.int32)
OPTIMIZER, NUMBERS = optimizers.spec("adam", clip=0.5)
DEVICES = tuple(jax.devices())
STEPS = 60
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
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
        assert len(rows), "a source need not know how to read nothing"
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
    on_device = train.held(examples, execution)
    test = evaluate.held(examples, execution)
    for state, log in train.fit(spec, group, on_device, [25, STEPS], execution=execution):
        rows = evaluate.logits_of(spec, group, state, test, COUNT, execution)()
        for row, i in enumerate(state.fits):
            results.setdefault(i, []).append(jax.tree.map(lambda leaf, r=row: np.array(leaf[r]), (state[1:3], log)))
            logits.setdefault(i, []).append(rows[row])
    return [results[i] for i in range(len(group))], [logits[i] for i in range(len(group))], messages


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
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


QUICK = ("one after another",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case
        if case in QUICK
        else pytest.param(
            case, marks=[pytest.mark.slow, *([pytest.mark.devices(8)] if "devices" in CASES[case][1] else [])]
        )
        for case in CASES
    ],
)
def test_streamed_data_give_the_bits_of_resident_data(case):
    seeds, settings = CASES[case]
    settings = dict(settings)
    model, batch = settings.get("model", MLP), settings.get("batch", 10)
    group = fits(model, seeds, settings.pop("strategy", "full"), settings.pop("shares", False), batch)
    budget = settings.pop("cache", 0)

    def cache():
        return {"cache": train.FeatureCache(budget)} if budget else {}

    resident, resident_logits, _ = outcome(group, WHOLE, **settings, **cache())
    streamed, streamed_logits, _ = outcome(group, ByRow(), memory=20_000, **settings, **cache())
    assert_same(resident, streamed)
    assert_same(resident_logits, streamed_logits)


@pytest.mark.slow
def test_chunks_of_one_step_give_the_bits_of_resident_data_as_xla_compiles_for_users(tmp_path):
    """Tests compile less than users do (see conftest), and in such programs chunks of one step round alike anyway."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)).astype(np.float32)
    y = (x @ rng.normal(size=(12, 3))).argmax(1)
    np.savez(tmp_path / "c.npz", train_features=x, train_labels=y, test_features=x[:100] + 0.1, test_labels=y[:100])
    flags = "--strategies=scratch --hidden=16 --steps=200 --batch_size=20 --learning_rate=0.05 --seeds=0,1 --devices=1"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "XLA_FLAGS"}
    predicted = []
    for streaming in ("--data=resident", "--data=streamed --stream_memory=2500"):
        command = [sys.executable, "-m", "experiments.transfer", *flags.split(), *streaming.split(), "--target=c.npz"]
        workdir = tmp_path / streaming.partition(" ")[0].removeprefix("--data=")
        subprocess.run([*command, f"--workdir={workdir}"], cwd=tmp_path, env=environment, check=True)
        predicted.append([np.load(file)["probabilities"] for file in sorted((workdir / "predictions").iterdir())])
    assert_same(*predicted)


@pytest.mark.slow
def test_features_beyond_the_budget_go_to_disk_with_the_same_bits(tmp_path):
    group = fits(MLP, [(0, 0.01), (0, 0.02)], "head_only", shares=True)
    resident = outcome(group, WHOLE, cache=train.FeatureCache(10**7))
    cache = train.FeatureCache(10_000, folder=tmp_path / "streams")
    streamed = outcome(group, ByRow(), memory=20_000, cache=cache)
    assert_same(resident[:2], streamed[:2])
    assert any(f"computed once, 0 MB in '{tmp_path / 'streams'}'" in message for message in streamed[2])
    assert len(list((tmp_path / "streams").iterdir())) == 2  # of the training and of the test examples
    del cache
    gc.collect()
    assert not (tmp_path / "streams").exists()


@pytest.mark.slow
def test_features_of_bfloat16_are_kept_on_disk_as_they_are_in_memory(tmp_path):
    group = fits(MLP, [(0, 0.01)], "head_only")
    resident = outcome(group, WHOLE, cache=train.FeatureCache(10**7, "bfloat16"))
    cache = train.FeatureCache(5_000, "bfloat16", tmp_path)
    assert_same(resident[:2], outcome(group, ByRow(), memory=20_000, cache=cache)[:2])


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then raises, as on a full disk
    cache = train.FeatureCache(5_000, folder=tmp_path / "streams")
    # JAX warns where its own cache of compilations has no room either; so all is compiled before.
    outcome(fits(MLP, [(0, 0.01)], "head_only"), ByRow(), memory=20_000, cache=cache)
    shutil.rmtree(tmp_path / "streams")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limit[1]))
        with pytest.raises(InputError, match=r"^features cannot be kept in '.*streams' \(File too large\): make room"):
            outcome(fits(MLP, [(0, 0.01)], "head_only"), ByRow(), memory=20_000, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "streams").exists()


@pytest.mark.slow
@pytest.mark.parametrize("function", [gradients.mean_gradient, gradients.mean_squared_gradient])
def test_gradients_over_a_stream_are_those_over_resident_data(function):
    params, loss = models.init(MLP, jax.random.key(0), (6, 6, 1)), objective.loss("softmax_cross_entropy")
    rows = np.arange(0, 1200, 2) % COUNT
    resident = function(MLP, loss, train.load(IMAGES, LABELS), rows)(params)
    for memory in (10**7, 25_000):
        assert_same(resident, function(MLP, loss, train.Stream(ByRow(), memory), rows)(params))


def test_each_chunk_is_read_once_for_fits_of_one_order():
    examples = ByRow()
    execution = train.Execution(data="streamed", stream_memory=20_000)
    group = fits(MLP, [(0, rate) for rate in (0.01, 0.02, 0.03)])
    for _ in train.fit(
        train.Spec(MLP, objective.loss("softmax_cross_entropy"), OPTIMIZER),
        group,
        train.held(examples, execution),
        [STEPS],
        execution=execution,
    ):
        pass
    steps = group[0].order(0, STEPS)
    assert examples.read == (steps >= 0).sum() + 1  # and row 0, in the places of padding


def test_examples_are_read_ahead_within_the_bound_and_in_order():
    chunk = 10 * data.inputs_bytes(ByRow().spec)
    examples, alive, most = ByRow(), 0, 0

    def finish(number, rows, inputs, targets):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        np.testing.assert_array_equal(inputs, IMAGES[rows])
        np.testing.assert_array_equal(targets, LABELS[rows])
        return number, inputs.nbytes

    requests = [(i, RNG.integers(0, COUNT, 10)) for i in range(30)]
    seen = []
    with data.Reader(train.Stream(examples), requests, finish, ahead=2) as reader:
        for number, size in reader:
            assert size == chunk
            seen.append(number)
            time.sleep(0.005)
            alive -= 1
    assert seen == list(range(30)) and most == 3  # the one in use and two ahead


def test_chunks_of_a_slow_source_stay_short():
    took = [1.0, 4.0, 4.0, 0.5, 9.0]
    times = iter(np.cumsum([0.0, *(seconds for each in took for seconds in (each, 0.0))]).tolist())
    stretches = list(data.growing(0, 88, 16, 64, lambda: next(times)))
    assert stretches == [(0, 16), (16, 48), (48, 64), (64, 72), (72, 88)]


def test_memory_that_holds_no_two_batches_is_refused():
    with pytest.raises(InputError, match=r"^stream_memory=700: two batches of the examples are 800 bytes: give as"):
        outcome(fits(MLP, [(0, 0.01)]), ByRow(), memory=700)
    assert data.chunk_steps(train.Stream(ByRow(), 800), 10, 100) == (1, 1)


def fail(examples, rows):
    if 7 in rows:
        raise OSError("the disk\nis gone")
    return examples.images[rows]


def shrink(examples, rows):
    examples.length = COUNT - 1 if examples.read > 100 else COUNT
    return examples.images[rows]


def at_once(examples, rows):
    if len(rows) > 1:
        raise OSError("too many")
    return examples.images[rows]


def retype(examples, rows):
    return examples.images[rows].astype(np.float32) if 7 in rows else examples.images[rows]


def reshape(examples, rows):
    return examples.images[rows][:, :5] if 7 in rows else examples.images[rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            fail,
            r"^the examples: row 7 cannot be read \(OSError: the disk is gone\): correct the source$",
        ),
        (shrink, r"^the examples: they were 203 and are 202 now: give a source whose length stays$"),
        (retype, r"^the examples: row 7 is float32\[1, 6, 6, 1\], and was declared uint8\[1, 6, 6, 1\]: give"),
        (reshape, r"^the examples: row 7 is uint8\[1, 5, 6, 1\], and was declared uint8\[1, 6, 6, 1\]: give"),
        (
            at_once,
            r"^the examples: rows [\d, ]+ and \d+ more cannot be read \(OSError: too many\): correct the source$",
        ),
    ],
)
def test_what_a_source_does_wrong_is_one_line_and_ends_the_threads(change, message):
    before = threading.active_count()
    with pytest.raises(InputError, match=message):
        outcome(fits(MLP, [(0, 0.01)]), ByRow(change=change), memory=20_000)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_fit_that_is_stopped_ends_its_threads():
    before, execution = threading.active_count(), train.Execution(data="streamed", should_stop=lambda: True)
    spec = train.Spec(MLP, objective.loss("softmax_cross_entropy"), OPTIMIZER)
    fitting = train.fit(spec, fits(MLP, [(0, 0.01)]), train.held(ByRow(), execution), [25, STEPS])
    next(fitting)
    assert threading.active_count() > before
    fitting.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_what_is_streamed_follows_from_the_flag_and_the_memory():
    large = ArrayExamples(np.lib.stride_tricks.as_strided(np.zeros(1), (10**9, 10**6), (0, 0)), LABELS)
    assert [data.is_streamed(examples, "auto") for examples in (WHOLE, ByRow(), large)] == [False, True, True]
    assert data.is_streamed(WHOLE, "streamed") and not data.is_streamed(large, "resident")
    with pytest.raises(InputError, match=r"^data=resident: the examples are read by row: give streamed or auto$"):
        data.is_streamed(ByRow(), "resident")


def write_pictures(folder, count=6):
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                size = (9 + i, 8 + 2 * number, 3)
                picture = Image.fromarray(
                    np.random.default_rng([number, i, len(split)]).integers(0, 256, size).astype(np.uint8)
                )
                picture.save(folder / split / name / f"{i}.png")


def test_pictures_of_a_folder_are_decoded_when_they_are_read(tmp_path):
    write_pictures(tmp_path / "pets")
    name, places = f"folder:{tmp_path / 'pets'}", {"data_dir": tmp_path / "data", "image_shape": (8, 8, 3)}
    streamed = load_task(name, **places, streamed=True)
    assert streamed.train.arrays is None and not (tmp_path / "data").exists()
    assert "decoded as they are read, so their fingerprint is sampled (1,000 rows of a split)" in streamed.note
    assert "cropped at the centre to 8x8" in streamed.note
    whole = load_task(name, **places)
    for split, other in ((streamed.train, whole.train), (streamed.test, whole.test)):
        rows = np.array([5, 0, 11])
        np.testing.assert_array_equal(split.inputs(rows), other.inputs(rows))
        np.testing.assert_array_equal(split.targets, other.targets)
        assert split.spec == other.spec
    assert streamed.classes == whole.classes == ("cat", "dog")
    damaged = tmp_path / "pets" / "train" / "dog" / "2.png"
    damaged.write_bytes(b"no picture")
    damage = pytest.raises(InputError, match=r"^the examples: row 8 cannot be read \('.*2.png' is no readable picture")
    reader = data.Reader(train.Stream(streamed.train), [(None, np.arange(12))], lambda *result: result)
    with reader, damage:
        next(reader)
    with pytest.raises(InputError, match=r"the images differ in size: '.*' is \d+x"):
        load_task(f"folder:{tmp_path / 'pets'}", data_dir=tmp_path / "data", streamed=True)


@pytest.mark.slow
def test_a_streamed_run_that_is_killed_ends_with_the_bits_of_a_resident_one(tasks, tmp_path, monkeypatch, no_pictures):
    flags = {**FLAGS, "strategies": ("lp_ft", "head_only"), "epochs": 3}
    transfer.run(**arguments(tasks, tmp_path / "resident", **flags, data="resident"))
    streamed = arguments(tasks, tmp_path / "streamed", **flags, data="streamed", stream_memory=10**6)
    with monkeypatch.context() as patch:
        killed_after(5, patch)
        with pytest.raises(Killed):
            transfer.run(**streamed)
    transfer.run(**streamed)
    same_run(tmp_path / "streamed", tmp_path / "resident")


BIG = """
import atexit

import jax.numpy as jnp
import numpy as np

from tljax.types import Stage

READ = []
atexit.register(lambda: print("READ", sum(READ)))


class Pictures:
    def __init__(self, count):
        self.count, self.targets = count, np.arange(count, dtype=np.int32) % 2

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        READ.append(4 * 2**20)
        return np.full((1024, 1024, 4), 100 * (i % 2) + i % 100, np.uint8), self.targets[i]


def pictures(split, *, count=20):
    return Pictures(count if split == "train" else 20)


def means(params, x, *, key=None):
    return x[:, ::64, ::64].astype(jnp.float32).mean((2, 3)) / 255


def model(classes):
    def init(key, x):
        return {"kernel": jnp.zeros((16, classes)), "bias": jnp.zeros(classes)}

    return Stage("means", lambda key, x: {}, means), Stage("head", init, lambda p, x, *, key=None: x @ p["kernel"])
"""
"""Pictures of 4 MiB that are made when they are asked for."""
PEAK = """
import resource
import shutil
import sys

from experiments import pretrain

pretrain.main(sys.argv)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_source_of_20_gb_trains_in_the_memory_of_a_small_one(tmp_path):
    (tmp_path / "big.py").write_text(BIG)
    peaks = []
    for count in (70, 5_000):
        flags = (
            f"--source=big.py:pictures:count={count} --model=big.py:model --epochs=1 --batch_size=10 --workdir=w{count}"
        )
        done = subprocess.run([sys.executable, "-c", PEAK, *flags.split()], cwd=tmp_path, env=ENVIRONMENT, check=False,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        words = done.stdout.split()
        peak, read = (
            sum(int(words[i + 1]) for i, word in enumerate(words) if word == name) for name in ("PEAK", "READ")
        )
        assert read >= count * 4 * 2**20  # each picture of the pass, beside the sample of the fingerprint
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 1.5e9


@pytest.mark.complete
@pytest.mark.slow
def test_the_complete_mnist_streamed_gives_the_bits_of_resident_data(complete_data, tmp_path, monkeypatch, no_pictures):
    flags = {"source": "mnist", "manual_dir": str(complete_data), "data_dir": str(tmp_path / "data"), "hidden": (32,),
             "epochs": 2, "checkpoint_every": 1, "optimizer": "adam", "validation": 0.1}  # fmt: skip
    pretrain.run(**flags, data="resident", workdir=str(tmp_path / "resident"))
    streamed = {**flags, "data": "streamed", "stream_memory": 10**7, "workdir": str(tmp_path / "streamed")}
    with monkeypatch.context() as patch:
        killed_after(1, patch)
        with pytest.raises(Killed):
            pretrain.run(**streamed)
    pretrain.run(**streamed)
    same_run(tmp_path / "streamed", tmp_path / "resident")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tracked", "reestimated"])
def test_the_state_of_batch_norms_is_that_of_resident_data(mode):
    """Reestimated, it is read over a pass of the stream: where the phase begins, and at each end."""
    model = residual.model(3)
    requested = tuple((stage, mode) for stage in ("stem", "block_0"))
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), OPTIMIZER, batch_stats=requested)
    params, state = batch_stats.split(models.init(model, jax.random.key(0), (6, 6, 1)))
    [fit] = fits(MLP, [(0, 0.01)])
    mask = masks.by_path(params, lambda path: True)
    fit = fit._replace(params=params, phases=((0, mask),), model_state=state, pass_steps=-(-COUNT // 10))
    results = []
    for examples, where in ((WHOLE, "resident"), (ByRow(), "streamed")):
        execution = train.Execution(data=where, stream_memory=20_000)
        on_device = train.held(examples, execution)
        segments = train.fit(spec, [fit], on_device, [25, STEPS], execution=execution)
        results.append([jax.tree.map(np.array, (s.params, s.model_state, log)) for s, log in segments])
    assert_same(*results)
    assert not np.array_equal(results[0][0][1]["stem"]["norm"]["mean"][0], state["stem"]["norm"]["mean"])
