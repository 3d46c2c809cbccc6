"""What a user would run instead, for the benchmark: the same fits in PyTorch, Keras and a plain jitted step.

Each side is an iterator that trains one epoch when it is asked for the next; importing this loads none of them.
"""

import gzip
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

BATCH, RATE = 100, 0.01

Arrays = tuple[np.ndarray, np.ndarray]
"""Images uint8 [n, ...] and labels."""


def pytorch(
    data: Arrays, widths: Sequence[int] = (512,), frozen: bool = False, features: bool = False, compiled: bool = False
) -> Iterator[None]:
    """Eager PyTorch on tensors in memory: everything trains, or the head alone, on features computed once or not."""
    import torch

    images = torch.from_numpy(np.asarray(data[0]).reshape(len(data[0]), -1)).float().div_(255)
    labels = torch.from_numpy(np.asarray(data[1])).long()
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
    import torch

    pairs = list(pairwise((inputs, *widths)))
    body = torch.nn.Sequential(*(layer for a, b in pairs for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())))
    return body, torch.nn.Linear(widths[-1], 10)


def keras(data: Arrays, width: int = 512) -> Iterator[None]:
    """Keras 3 on JAX."""
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
    """A jitted step of one's own, called from Python, on an array in memory."""
    import jax
    import jax.numpy as jnp
    import optax

    rng = np.random.default_rng(0)
    sizes = list(pairwise((784, width, 10)))
    params = [(jnp.asarray(rng.normal(0, a**-0.5, (a, b)).astype(np.float32)), jnp.zeros(b)) for a, b in sizes]
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
        def read(kind: str, start: int) -> Any:
            raw = gzip.decompress((folder / name / kind).read_bytes())
            return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).copy())

        sets = []
        for part in ("train", "t10k"):
            images = read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 784).float() / 255
            sets.append(TensorDataset(images, read(f"{part}-labels-idx1-ubyte.gz", 8).long()))
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


if __name__ == "__main__":
    reference(Path(sys.argv[1]))
