"""The sides of the benchmark: fits in tljax, and the same in PyTorch, Keras and a plain jitted step.

Each side is an iterator that trains one epoch each time it is advanced; importing this module loads no peer.
"""

import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

BATCH, RATE = 100, 0.01

Arrays = tuple[np.ndarray, np.ndarray]
"""Images uint8 [n, ...] and labels."""


def epochs(
    count: int,
    mask: str = "full",
    *,
    data: Arrays,
    widths: Sequence[int] = (512,),
    most: int = 50,
    costs: list[Any] | None = None,
) -> Iterator[Any]:
    """The side of tljax, for at most `most` epochs: `count` fits, of everything or of the head alone.

    What their training program costs is added to `costs`.
    """
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import models, objective, optimizers, plugins, train
    from tljax.types import Context

    model = models.build("mlp", 10, hidden=tuple(widths), activation="relu")
    params = models.init(model, jax.random.key(0), data[0].shape[1:])
    optimizer_spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    tree = plugins.method(mask)[0].strategy(params, Context(models.names(model)))
    most = most * len(data[1]) // BATCH
    fits = [_fit(params, tree, seed, len(data[1]), most, numbers) for seed in range(count)]
    ends = range(len(data[1]) // BATCH, most + 1, len(data[1]) // BATCH)
    execution = process.prepare(Settings.from_flags())
    if costs is not None:
        execution = replace(execution, on_compiled=lambda _, cost: costs.append(cost))
    yield from train.fit(spec, fits, train.load(*data), ends, execution=execution)


def _fit(params: Any, tree: Any, seed: int, examples: int, steps: int, numbers: Any, rate: float = RATE) -> Any:
    """A fit with a mask `tree`, a constant learning rate and the order of examples that `seed` draws."""
    import jax

    from tljax import train
    from tljax.data import draw

    def order(start: int, stop: int) -> np.ndarray:
        return draw.order(seed, examples, BATCH, start, stop, epochs=True)

    every = {**numbers, "label_smoothing": 0.0}
    rates, key = np.full(steps, rate, np.float32), jax.random.key(0)
    return train.Fit(params, ((0, tree),), order, rates, (), every, key, shares=seed)


def stream(data: Arrays, share: float | None = None, step: float = 0.0) -> Iterator[tuple[float, float]]:
    """One fit of everything for an epoch, anew in each turn: (seconds, seconds of them in which data were waited for).

    Without a `share` the data are resident. With one they are streamed, and reading a batch takes a thread at least
    that share of `step` seconds, in which it sorts numbers.
    """
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import models, objective, optimizers, train
    from tljax.types import ArrayExamples, RowExamples

    whole = ArrayExamples(*data)

    def slowly(rows: np.ndarray) -> Any:
        until = time.perf_counter() + (share or 0.0) * step * len(rows) / BATCH
        inputs = whole.inputs(rows)
        while time.perf_counter() < until:
            np.sort(_NUMBERS)
        return inputs

    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    params = models.init(model, jax.random.key(0), data[0].shape[1:])
    optimizer_spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    steps = len(data[1]) // BATCH
    fit = _fit(params, jax.tree.map(lambda leaf: True, params), 0, len(data[1]), steps, numbers)
    waited: list[float] = []
    settings = Settings.from_flags(data="resident" if share is None else "streamed")
    execution = replace(process.prepare(settings), on_wait=waited.append)
    examples = whole if share is None else RowExamples(slowly, whole.targets, whole.spec)
    held = train.held(examples, execution)
    while True:
        start = time.perf_counter()
        for state, _ in train.fit(spec, [fit], held, [steps], execution=execution):
            jax.block_until_ready(state.params)
        yield time.perf_counter() - start, sum(waited)
        waited.clear()


_NUMBERS = np.random.default_rng(0).random(4096)


def probes(data: Arrays, rates: int = 8, seeds: int = 4, passes: int = 10) -> float:
    """Seconds for rates x seeds linear probes in tljax, with compilation and the features."""
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import masks, models, objective, optimizers, train

    jax.clear_caches()
    start = time.perf_counter()
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    optimizer_spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    steps = passes * len(data[1]) // BATCH
    fits = []
    for seed in range(seeds):
        params = models.init(model, jax.random.key(seed), data[0].shape[1:])
        first = _fit(params, masks.under(params, "head"), seed, len(data[1]), steps, numbers)
        fits += [first._replace(rates=first.rates * 2.0**i) for i in range(rates)]
    execution = process.prepare(Settings.from_flags(compilation_cache="off"))
    for state, _ in train.fit(spec, fits, train.load(*data), [steps], execution=execution):
        jax.block_until_ready(state.params)
    return time.perf_counter() - start


def search_trials(passes: int = 10) -> Iterator[tuple[float, float, np.ndarray]]:
    """Linear probes over 4 rates x 4 penalties x 4 seeds on the shipped data, together and then one by one.

    Each turn gives (seconds together, seconds alone, test accuracies [2, 64] of both). Compilation and the features
    are done before the first.
    """
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import data, evaluate, masks, models, objective, optimizers, penalties, train

    source, target = data.load("mnist_10k"), data.load("fashion_mnist_10k")
    [state] = epochs(1, data=(source.train.arrays, source.train.targets), most=1)
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    optimizer_spec, numbers = optimizers.spec("sgd")
    terms, _ = penalties.read("l2:weight=1")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec, terms)
    steps = passes * len(target.train.targets) // BATCH
    body = jax.tree.map(lambda leaf: leaf[0], state[0].params)["hidden_0"]
    fits = []
    for seed in range(4):
        params = {**models.init(model, jax.random.key(seed), (28, 28, 1)), "hidden_0": body}
        first = _fit(params, masks.under(params, "head"), seed, len(target.train.targets), steps, numbers, 1.0)
        fits += [
            first._replace(rates=first.rates * rate, weights=({"weight": weight},))
            for rate in (0.003, 0.01, 0.03, 0.1)
            for weight in (1e-5, 1e-4, 1e-3, 1e-2)
        ]
    examples = train.load(target.train.arrays, target.train.targets)
    test, execution = evaluate.padded(target.test.arrays), process.prepare(Settings.from_flags())

    def accuracies(group: list[Any]) -> np.ndarray:
        for state, _ in train.fit(spec, group, examples, [steps], execution=execution):
            logits = evaluate.logits_of(spec, group, state, test, len(target.test.targets), execution)
        return np.array((logits.argmax(-1) == target.test.targets).mean(-1))

    accuracies(fits), accuracies(fits[:1])
    while True:
        start = time.perf_counter()
        together = accuracies(fits)
        between = time.perf_counter()
        alone = np.concatenate([accuracies([fit]) for fit in fits])
        yield between - start, time.perf_counter() - between, np.stack([together, alone])


def pytorch(
    data: Arrays, widths: Sequence[int] = (512,), frozen: bool = False, features: bool = False, compiled: bool = False
) -> Iterator[None]:
    """The side of PyTorch on tensors in memory: everything trains, or the head alone, on stored features or not."""
    import torch

    images = torch.tensor(data[0].reshape(len(data[0]), -1)).float().div_(255)
    labels = torch.tensor(data[1]).long()
    body, head = _layers(images.shape[1], widths)
    body.requires_grad_(not (frozen or features))
    if features:
        with torch.no_grad():
            images = torch.cat([body(part) for part in images.split(1000)])
        body = torch.nn.Identity()
    net = torch.nn.Sequential(body, head)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=RATE)
    run = torch.compile(net) if compiled else net
    while True:
        for chosen in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        yield


def _layers(inputs: int, widths: Sequence[int]) -> tuple[Any, Any]:
    """(body, head) of the perceptron in PyTorch."""
    import torch

    pairs = list(pairwise((inputs, *widths)))
    body = torch.nn.Sequential(*(layer for a, b in pairs for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())))
    return body, torch.nn.Linear(widths[-1], 10)


def keras(data: Arrays, width: int = 512) -> Iterator[None]:
    """The side of Keras 3 on JAX: everything trains."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    net = keras.Sequential(
        [keras.layers.Input((784,)), keras.layers.Dense(width, activation="relu"), keras.layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(optimizer=keras.optimizers.SGD(RATE), loss=loss)
    images = np.asarray(data[0]).reshape(-1, 784).astype(np.float32) / 255
    while True:
        net.fit(images, np.asarray(data[1]), batch_size=BATCH, epochs=1, verbose=0)
        yield


def plain(data: Arrays, width: int = 512) -> Iterator[None]:
    """The side of a jitted step without tljax, called from Python, on an array in memory."""
    import jax
    import jax.numpy as jnp
    import optax

    rng = np.random.default_rng(0)
    sizes = list(pairwise((784, width, 10)))
    params = [(jnp.asarray(rng.normal(0, a**-0.5, (a, b)).astype(np.float32)), jnp.zeros((1, b))) for a, b in sizes]
    tx = optax.sgd(RATE)
    state = tx.init(params)

    def loss(params: Any, x: Any, y: Any) -> Any:
        (k0, b0), (k1, b1) = params
        logits = jax.nn.relu(x @ k0 + b0) @ k1 + b1
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    images = np.asarray(data[0]).reshape(-1, 784).astype(np.float32) / 255
    while True:
        for chosen in rng.permutation(len(images)).reshape(-1, BATCH):
            params, state = step(params, state, images[chosen], np.asarray(data[1])[chosen])
        jax.block_until_ready(params)
        yield


def reference(folder: Path, epochs: int = 10) -> None:
    """The reference experiment in PyTorch with a DataLoader: a source, then scratch, full and head_only."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    def task(name: str) -> tuple[Any, Any]:
        sets = []
        for part in ("train", "t10k"):
            images, labels = read(folder / name, part)
            sets.append(TensorDataset(torch.tensor(images).float() / 255, torch.tensor(labels).long()))
        return DataLoader(sets[0], BATCH, shuffle=True), DataLoader(sets[1], 1000)

    def fit(net: Any, data: tuple[Any, Any], label: str) -> None:
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=RATE)
        right = 0
        for _ in range(epochs):
            for x, y in data[0]:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data[1])
        print(f"{label} {right / len(data[1].dataset):.4f}")

    def new() -> Any:
        return torch.nn.Sequential(*_layers(784, (512,)))

    source, target = new(), task("fashion_mnist")
    fit(source, task("mnist"), "source")
    fit(new(), target, "scratch")
    for label in ("full", "head_only"):
        net = new()
        net[0].load_state_dict(source[0].state_dict())
        net[0].requires_grad_(label == "full")
        fit(net, target, label)


def read(folder: Path, part: str) -> Arrays:
    """Images uint8 [n, 784] and labels of 'train' or 't10k', from two of the four files of a data set."""
    files = ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8))
    raw = [
        np.frombuffer(gzip.decompress((folder / file).read_bytes()), np.uint8, offset=start) for file, start in files
    ]
    return raw[0].reshape(-1, 784), raw[1]


def growth(side: str, examples: int, width: int, folder: Path) -> None:
    """Print the seconds per epoch of one side as JSON, on this number of examples (repeated as needed) at a width."""
    data = read(folder, "train")
    times = -(-examples // len(data[1]))
    images, labels = (np.tile(part, (times, *[1] * (part.ndim - 1)))[:examples] for part in data)
    arrays = (images, labels.astype(np.int32))
    training = epochs(1, data=arrays, widths=(width,)) if side == "tljax" else pytorch(arrays, (width,))
    del data, images, labels, arrays
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        next(training)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": float(np.median(seconds[1:]))}))


if __name__ == "__main__":
    if sys.argv[1] == "reference":
        reference(Path(sys.argv[2]))
    else:
        growth(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
