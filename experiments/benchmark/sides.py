"""The sides of the benchmark, each the whole of a process: tljax, plain JAX, PyTorch, Keras and whole programs.

    python -P sides.py prepare FOLDER '{"sizes": [[60000, 8]], ...}'
    python -P sides.py serve FOLDER '{"side": "plain", "fits": 8, ...}'
    python -P sides.py program RECORD experiments.compare --flagfile=...
    python -P sides.py reference DIR EPOCHS

`prepare` writes what all sides share: images, labels, parameters and the orders of the first turn. `serve` trains the
first turn, says so in a line of JSON on standard output, and then trains a turn for each line on standard input and
says how long it took; at the end of its input it says how much memory it took at its peak. `program` runs a program and
notes when its first step began and how long it compiled. `reference` is the reference experiment in PyTorch.

The file imports tljax from wherever PYTHONPATH says and nothing of its own package, so that the same sides measure
another checkout; sides of PyTorch import neither jax nor tljax, so that another Python may run them.
"""

import contextlib
import functools
import gzip
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH, RATE, CLASSES = 100, 0.01, 10
EXAMPLES = 60_000
MODELS = {"mlp": "mlp", "cnn": "cnn:width=16:dense=64", "vit": "vit:width=64:depth=6:heads=4:patch=7"}
"""The models by the names that rows have: 784-512-10, two convolutions of 16 and 32 channels and a dense layer, and a
vision transformer of 6 blocks on 16 patches."""
HEADS = 4
"""Of the vision transformer."""
EPSILON = 1e-6
"""Of its norms."""
CHECKED = 1000
"""The first examples, on which the loss after the first turn is taken."""
SIDE = 4096
PRODUCT = 2 * SIDE**3
"""FLOPs of the large product."""

Flat = dict[str, Any]
"""Parameters as {path of the leaf: array}."""


class Work(NamedTuple):
    """What a side trains."""

    side: str
    """One of `SIDES`."""
    model: str = "mlp"
    """'mlp', 'cnn' or 'vit'."""
    width: int = 512
    """Of the perceptron's hidden layer."""
    examples: int = EXAMPLES
    fits: int = 1
    precision: str = "float32"
    """Of products: 'float32' or 'tf32'; or 'bfloat16' of tljax, in which it then computes."""
    trains: str = "full"
    """'full', 'head' with the body's output computed before the first step, or 'head_in_step' with it in each step."""
    many: str = "auto"
    """tljax's --many."""
    steps: int = 600
    """Of a turn, each of a batch of 100."""
    turns: int = 9
    share: float | None = None
    """Of a stream: which part of a step reading a batch costs a thread; None for data that are resident."""


class Shared(NamedTuple):
    """What the sides of a model share."""

    images: np.ndarray
    """uint8 [n, 28, 28, 1]."""
    labels: np.ndarray
    """int32 [n]."""
    params: Flat
    """Of every fit at its start."""
    orders: np.ndarray
    """int32 [fits, steps, batch]: the rows of the first turn."""


Turn = dict[str, Any]
"""What a side says of a turn: `loss` of the first turn, [of the first fit, of the last] on the first examples; and what
else there is to tell, such as `seconds` in place of those that the turn took."""


# ---- What all share


def prepare(
    folder: Path, manual_dir: str | None, sizes: Sequence[Sequence[int]], steps: int, models: Sequence[Sequence[Any]]
) -> None:
    """Write images and labels, parameters of each (model, width), and orders for each (examples, fits) of `sizes`.

    Without a folder of the complete MNIST the images are those of `mnist_10k`, six times.
    """
    import jax

    from tljax import data
    from tljax import models as library
    from tljax.data import draw

    train = data.load("mnist", manual_dir=manual_dir).train if manual_dir else data.load("mnist_10k").train
    images, labels = np.asarray(train.arrays), np.asarray(train.targets)
    times = -(-EXAMPLES // len(labels))
    np.save(folder / "images.npy", np.tile(images, (times, 1, 1, 1)))
    np.save(folder / "labels.npy", np.tile(labels, times).astype(np.int32))
    for examples, fits in sizes:
        orders = [draw.order(seed, examples, BATCH, 0, steps, epochs=True).astype(np.int32) for seed in range(fits)]
        np.save(folder / f"orders_{examples}.npy", np.stack(orders))
    for name, width in models:
        model = library.build(MODELS[name], CLASSES, hidden=(width,), activation="relu")
        np.savez(folder / f"{name}_{width}.npz", **_flat(library.init(model, jax.random.key(0), images.shape[1:])))


def read(folder: Path, work: Work) -> Shared:
    """What `prepare` wrote, for this side."""
    times = -(-work.examples // EXAMPLES)
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    images, labels = (np.concatenate([part] * times) if times > 1 else part for part in (images, labels))
    params = dict(np.load(folder / f"{work.model}_{work.width}.npz"))
    orders = np.load(folder / f"orders_{work.examples}.npy", mmap_mode="r")[: work.fits, : work.steps]
    return Shared(images[: work.examples], labels[: work.examples], params, orders)


def _flat(tree: Any) -> Flat:
    """{path: array} of nested dicts."""
    if not isinstance(tree, Mapping):
        return {"": np.asarray(tree)}
    return {f"{key}/{path}".removesuffix("/"): leaf for key, part in tree.items() for path, leaf in _flat(part).items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of {path: array}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)[name] = leaf
    return tree


# ---- tljax and plain JAX


def tljax(shared: Shared, work: Work) -> Iterator[Turn]:
    """Fits in tljax; each turn ends when the parameters are there."""
    import jax

    from tljax import train

    costs: list[Any] = []
    spec, fits, execution = _tljax_fits(shared, work, work.fits)
    execution = replace(execution, on_compiled=lambda _, cost: costs.append(cost))
    data = train.load(shared.images, shared.labels)
    ends = range(work.steps, work.steps * work.turns + 1, work.steps)
    for state, _ in train.fit(spec, fits, data, ends, execution=execution):
        jax.block_until_ready(state.params)
        if state.step > work.steps:
            yield {}
            continue
        trained = [state.params_and_state(row)[0] for row in (0, len(state.fits) - 1)]
        loss = _losses(train.forward(spec.model), trained, shared)
        yield {"loss": loss, "flops": costs[0].flops, "program_bytes": costs[0].peak_bytes}


def _tljax_fits(shared: Shared, work: Work, count: int, **settings: Any) -> tuple[Any, list[Any], Any]:
    """(spec, fits with an order each, execution) of tljax, for all turns."""
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import models, objective, optimizers, plugins, train
    from tljax.data import draw
    from tljax.types import Context

    precision = "highest" if work.precision == "float32" else "default"
    dtype = "bfloat16" if work.precision == "bfloat16" else "float32"
    computing = {"compute_dtype": dtype, "matmul_precision": precision}
    model = models.build(MODELS[work.model], CLASSES, hidden=(work.width,), activation="relu", **computing)
    optimizer_spec, numbers = optimizers.spec("sgd")
    params = jax.tree.map(jax.numpy.asarray, _nested(shared.params))
    method = plugins.method("full" if work.trains == "full" else "head_only")[0]
    mask = method.strategy(params, Context(models.names(model)))
    every = {**numbers, "label_smoothing": 0.0}
    rates = np.full(work.steps * work.turns, RATE, np.float32)
    fits = []
    for seed in range(count):
        order = functools.partial(draw.order, seed, len(shared.labels), BATCH, epochs=True)
        fits.append(train.Fit(params, ((0, mask),), order, rates, (), every, jax.random.key(0), shares=seed))
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    getattr(process, "ask_for_determinism", lambda: None)()  # as programs do, of a checkout that has it
    settings = {"many": work.many, "compilation_cache": "off", **settings}
    return spec, fits, process.prepare(Settings.from_flags(**settings))


def stream(shared: Shared, work: Work) -> Iterator[Turn]:
    """One fit of everything for a turn, anew each time, on resident data or a stream; `waited` are the seconds in
    which data were waited for.

    Reading a batch of a stream takes a thread at least `work.share` of a step of resident data, in which it sorts.
    """
    import jax

    from tljax import train
    from tljax.types import ArrayExamples, RowExamples

    whole = ArrayExamples(shared.images, shared.labels)
    once = work._replace(turns=1)

    def turns(examples: Any, kind: str) -> Iterator[Turn]:
        waited: list[float] = []
        spec, fits, execution = _tljax_fits(shared, once, 1, data=kind)
        execution = replace(execution, on_wait=waited.append)
        held = train.held(examples, execution)
        while True:
            start = time.perf_counter()
            for state, _ in train.fit(spec, fits, held, [work.steps], execution=execution):
                jax.block_until_ready(state.params)
            yield {"seconds": time.perf_counter() - start, "waited": sum(waited)}
            waited.clear()

    if work.share is None:
        yield from turns(whole, "resident")
        return
    step = 0.0
    if work.share:
        resident = turns(whole, "resident")
        next(resident)  # compiles
        step = next(resident)["seconds"] / work.steps
    numbers = np.random.default_rng(0).random(4096)

    def slowly(rows: np.ndarray) -> Any:
        until = time.perf_counter() + (work.share or 0.0) * step * len(rows) / BATCH
        inputs = whole.inputs(rows)
        while time.perf_counter() < until:
            np.sort(numbers)
        return inputs

    yield from turns(RowExamples(slowly, whole.targets, whole.spec), "streamed")


def probes(shared: Shared, work: Work) -> Iterator[Turn]:
    """Linear probes of 8 rates for each 4 of `work.fits` orders in tljax, with compilation and the features."""
    import jax

    from tljax import models, train

    while True:
        jax.clear_caches()
        start = time.perf_counter()
        spec, firsts, execution = _tljax_fits(shared, work._replace(turns=1), max(1, work.fits // 8))
        fits = []
        for seed, first in enumerate(firsts):
            params = models.init(spec.model, jax.random.key(seed), shared.images.shape[1:])
            fits += [first._replace(params=params, rates=first.rates * 2.0**i) for i in range(8)]
        data = train.load(shared.images, shared.labels)
        for state, _ in train.fit(spec, fits, data, [work.steps], execution=execution):
            jax.block_until_ready(state.params)
        yield {"seconds": time.perf_counter() - start}


def trials(shared: Shared, work: Work) -> Iterator[Turn]:
    """Linear probes over 4 rates x 4 penalties x 4 seeds on the shipped data, in one group or one after another.

    Each turn says the test accuracies too. Compilation and the features are done in the first.
    """
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import data, evaluate, masks, models, objective, optimizers, penalties, train
    from tljax.data import draw

    source, target = data.load("mnist_10k"), data.load("fashion_mnist_10k")
    images, labels = source.train.arrays, source.train.targets
    once = Work("tljax", steps=len(labels) // BATCH, turns=1)
    spec, fits, execution = _tljax_fits(shared._replace(images=images, labels=labels), once, 1)
    [(state, _)] = train.fit(spec, fits, train.load(images, labels), [once.steps], execution=execution)
    body = state.params_and_state(0)[0]["hidden_0"]
    optimizer_spec, numbers = optimizers.spec("sgd")
    terms, _ = penalties.read("l2:weight=1")
    spec = train.Spec(spec.model, objective.loss("softmax_cross_entropy"), optimizer_spec, terms)
    examples, steps = len(target.train.targets), 10 * len(target.train.targets) // BATCH
    every, group = {**numbers, "label_smoothing": 0.0}, []
    for seed in range(4):
        params = {**models.init(spec.model, jax.random.key(seed), (28, 28, 1)), "hidden_0": body}
        order = functools.partial(draw.order, seed, examples, BATCH, epochs=True)
        tree, key = masks.under(params, "head"), jax.random.key(0)
        for rate in (0.003, 0.01, 0.03, 0.1):
            rates = np.full(steps, rate, np.float32)
            for weight in (1e-5, 1e-4, 1e-3, 1e-2):
                fit = train.Fit(params, ((0, tree),), order, rates, (), every, key, shares=seed)
                group.append(fit._replace(weights=({"weight": weight},)))
    held = train.load(target.train.arrays, target.train.targets)
    test, execution = evaluate.padded(target.test.arrays), process.prepare(Settings.from_flags())

    def accuracies(fits: list[Any]) -> list[float]:
        for state, _ in train.fit(spec, fits, held, [steps], execution=execution):
            logits = evaluate.logits_of(spec, fits, state, test, len(target.test.targets), execution)()
        return [float(accuracy) for accuracy in (logits.argmax(-1) == target.test.targets).mean(-1)]

    groups = [group] if work.many != "alone" else [[fit] for fit in group]
    while True:
        start = time.perf_counter()
        results = [accuracy for fits in groups for accuracy in accuracies(fits)]
        yield {"seconds": time.perf_counter() - start, "accuracies": results}


def plain(shared: Shared, work: Work) -> Iterator[Turn]:
    """The same in plain JAX, as somebody would write it for speed: one `fori_loop` over the steps of a turn, `vmap`
    over fits, the order drawn on the device, the loss and the norm of the gradient of each step kept."""
    import jax
    import jax.numpy as jnp

    with contextlib.ExitStack() as stack:
        if work.precision == "float32":
            stack.enter_context(jax.default_matmul_precision("highest"))
        forward = _jax_forward(work.model)
        params = jax.tree.map(jnp.asarray, _nested(shared.params))
        images, labels = jnp.asarray(shared.images), jnp.asarray(shared.labels)
        if work.trains == "head":
            body = jax.jit(
                lambda x: jax.nn.relu(_pixels(x) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"])
            )
            images = jnp.concatenate([body(part) for part in jnp.split(images, 60)])
            params = {"head": params["head"]}

            def forward(params: Any, x: Any) -> Any:
                return x @ params["head"]["kernel"] + params["head"]["bias"]

        def loss(params: Any, x: Any, y: Any) -> Any:
            return _cross_entropy(forward(params, x), y)

        def train(params: Any, images: Any, labels: Any, order: Any) -> Any:
            def step(i: Any, carry: Any) -> Any:
                params, losses, norms = carry
                value, gradients = jax.value_and_grad(loss)(params, images[order[i]], labels[order[i]])
                norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
                params = jax.tree.map(lambda leaf, gradient: leaf - RATE * gradient, params, gradients)
                return params, losses.at[i].set(value), norms.at[i].set(norm)

            return jax.lax.fori_loop(0, work.steps, step, (params, jnp.zeros(work.steps), jnp.zeros(work.steps)))

        turn = jax.jit(jax.vmap(train, in_axes=(0, None, None, 0)), donate_argnums=0)

        @jax.jit
        def draw(key: Any) -> Any:
            keys = jax.random.split(key, work.fits)
            orders = jax.vmap(lambda key: jax.random.permutation(key, len(shared.labels)))(keys)
            return orders[:, : work.steps * BATCH].reshape(work.fits, work.steps, BATCH)

        stacked = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], work.fits, 0), params)
        stacked, *log = turn(stacked, images, labels, jnp.asarray(np.asarray(shared.orders)))
        trained = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in (0, -1)]
        first = shared._replace(images=np.asarray(images[:CHECKED]))
        yield {"loss": _losses(forward, trained, first)}
        key = jax.random.key(0)
        jax.block_until_ready(draw(key))
        while True:
            key, now = jax.random.split(key)
            stacked, *log = turn(stacked, images, labels, draw(now))
            jax.block_until_ready((stacked, log))
            yield {}


def _jax_forward(model: str) -> Callable[[Any, Any], Any]:
    """(params, uint8 images) -> logits; the vision transformer's stages are those of tljax, the loop is not."""
    from tljax import models, train

    if model == "mlp":

        def forward(params: Any, x: Any) -> Any:
            import jax

            hidden = jax.nn.relu(_pixels(x) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"])
            return hidden @ params["head"]["kernel"] + params["head"]["bias"]

        return forward
    if model == "cnn":
        return _jax_cnn
    apply = train.forward(models.build(MODELS[model], CLASSES, hidden=(512,), activation="relu"))
    return lambda params, x: apply(params, _floats(x))


def _jax_cnn(params: Any, x: Any) -> Any:
    """The convolutional network as JAX and Flax have its operations."""
    import flax.linen as nn
    import jax

    x = _floats(x)
    for name in ("conv_0", "conv_1"):
        layer = params[name]["conv"]
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = nn.max_pool(jax.nn.relu(x + layer["bias"][None, None, None]), (2, 2), (2, 2))
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def _floats(x: Any) -> Any:
    """Pixels of 0 to 1 [batch, height, width, channels]."""
    import jax.numpy as jnp

    return jnp.asarray(x).astype(jnp.float32) / 255


def _pixels(x: Any) -> Any:
    """The same in a row [batch, values]."""
    return _floats(x).reshape(len(x), -1)


def _cross_entropy(logits: Any, y: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return -jnp.mean(jnp.sum(jax.nn.one_hot(y, CLASSES) * jax.nn.log_softmax(logits), -1))


def _losses(forward: Callable[[Any, Any], Any], trained: Sequence[Any], shared: Shared) -> list[float]:
    """The losses of the first and of the last fit on the first examples."""
    x, y = shared.images[:CHECKED], shared.labels[:CHECKED]
    return [float(_cross_entropy(forward(params, x), y)) for params in trained]


def jitted_step(shared: Shared, work: Work) -> Iterator[Turn]:
    """The same, one fit, by a jitted step of optax that Python calls, on an array in memory."""
    import jax
    import jax.numpy as jnp
    import optax

    forward, tx = _jax_forward(work.model), optax.sgd(RATE)
    params = jax.tree.map(jnp.asarray, _nested(shared.params))
    state, rng = tx.init(params), np.random.default_rng(0)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    order, first = np.asarray(shared.orders[0]), True
    while True:
        for rows in order:
            params, state = step(params, state, shared.images[rows], shared.labels[rows])
        jax.block_until_ready(params)
        yield {"loss": _losses(forward, [params, params], shared)} if first else {}
        first, order = False, rng.permutation(len(shared.labels))[: order.size].reshape(order.shape)


def product(shared: Shared, work: Work) -> Iterator[Turn]:
    """The most that the machine can do: products of 4096 x 4096 float32 matrices; `rate` is in FLOP/s."""
    import jax
    import jax.numpy as jnp

    a = jnp.full((SIDE, SIDE), 1 / SIDE)
    precision = "highest" if work.precision == "float32" else "default"
    multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
    count = 1
    jax.block_until_ready(multiply(a, a))
    while True:
        start, result = time.perf_counter(), a
        for _ in range(count):
            result = multiply(result, a)
        jax.block_until_ready(result)
        took = time.perf_counter() - start
        yield {"rate": count * PRODUCT / took}
        count = max(1, int(0.3 * count / took))


def keras(shared: Shared, work: Work) -> Iterator[Turn]:
    """The same, one fit, in Keras 3 on JAX; its own order."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    layers = [keras.layers.Dense(work.width, activation="relu"), keras.layers.Dense(CLASSES)]
    net = keras.Sequential([keras.layers.Input((784,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(optimizer=keras.optimizers.SGD(RATE), loss=loss)
    net.set_weights([shared.params[f"{layer}/{kind}"] for layer in ("hidden_0", "head") for kind in ("kernel", "bias")])
    images = shared.images.reshape(-1, 784).astype(np.float32) / 255
    while True:
        net.fit(images, shared.labels, batch_size=BATCH, epochs=1, steps_per_epoch=work.steps, verbose=0)
        yield {}


def embedding(shared: Shared, work: Work) -> Iterator[Turn]:
    """Gradients of an embedding of 1,000 tokens, 128 wide, at 6,400 places: a scatter-add in each step of plain JAX."""
    import jax
    import jax.numpy as jnp

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (64, 6400)))
    target = jnp.asarray(np.random.default_rng(1).normal(size=(6400, 128)).astype(np.float32))

    def loss(table: Any, rows: Any) -> Any:
        return jnp.mean(jnp.square(table[rows] - target))

    @jax.jit
    def turn(table: Any, tokens: Any) -> Any:
        def step(i: Any, table: Any) -> Any:
            return table - jax.grad(loss)(table, tokens[i % len(tokens)])

        return jax.lax.fori_loop(0, work.steps, step, table)

    table = jnp.zeros((1000, 128))
    while True:
        table = jax.block_until_ready(turn(table, tokens))
        yield {}


# ---- PyTorch


def pytorch(shared: Shared, work: Work) -> Iterator[Turn]:
    """The same in PyTorch on data on the device: eager, compiled, the step captured in a CUDA graph, or an ensemble of
    `torch.func.vmap` over fits, captured where there is CUDA. Neither losses nor norms are kept."""
    import torch

    torch.set_float32_matmul_precision("highest" if work.precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = work.precision != "float32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.as_tensor(shared.images.reshape(len(shared.images), -1), device=device)
    images = images if device.type == "cuda" else images.float().div_(255)  # which is the quicker way on each
    labels = torch.as_tensor(shared.labels, device=device).long()
    params = {path: torch.tensor(leaf, device=device) for path, leaf in shared.params.items()}
    forward = {"mlp": _torch_mlp, "cnn": _torch_cnn, "vit": _torch_vit}[work.model]
    frozen = {path: leaf for path, leaf in params.items() if work.trains != "full" and not path.startswith("head/")}
    params = {path: leaf for path, leaf in params.items() if path not in frozen}
    if work.trains == "head":
        images = torch.cat(
            [
                _torch_hidden(frozen, part if part.is_floating_point() else part.float() / 255)
                for part in images.split(1000)
            ]
        )
        forward, frozen = _torch_head, {}

    def loss(params: Flat, rows: Any) -> Any:
        x = images[rows]
        x = x if x.dtype == torch.float32 else x.float() / 255
        return torch.nn.functional.cross_entropy(forward({**frozen, **params}, x), labels[rows])

    if work.side == "ensemble":
        params = {path: leaf[None].repeat(work.fits, *[1] * leaf.ndim) for path, leaf in params.items()}
        gradient = torch.func.vmap(torch.func.grad(loss))
    else:
        for leaf in params.values():
            leaf.requires_grad_(True)
        measured = torch.compile(loss) if work.side == "compiled" else loss

        def gradient(params: Flat, rows: Any) -> Flat:
            return dict(zip(params, torch.autograd.grad(measured(params, rows), list(params.values())), strict=True))

    order = torch.as_tensor(np.array(shared.orders), device=device).long()
    counter = torch.zeros(1, dtype=torch.long, device=device)

    def step() -> None:
        """The step number `counter` of the turn; nothing in it waits for the host."""
        rows = order.index_select(1, counter)[:, 0]
        gradients = gradient(params, rows if work.side == "ensemble" else rows[0])
        with torch.no_grad():
            torch._foreach_add_(list(params.values()), [gradients[path] for path in params], alpha=-RATE)
        counter.add_(1)

    run = _captured(step, params, counter) if work.side in ("captured", "ensemble") else step
    for turn in range(work.turns):
        if turn:
            passes = -(-order[0].numel() // len(labels))
            drawn = torch.rand(work.fits, passes, len(labels), device=device).argsort(2).flatten(1)
            order.copy_(drawn[:, : order[0].numel()].reshape(order.shape))
        counter.zero_()
        for _ in range(work.steps):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            yield {}
            continue
        several = work.side == "ensemble"
        trained = [{path: leaf[i] if several else leaf for path, leaf in params.items()} for i in (0, -1)]
        with torch.no_grad():
            losses = [float(loss(leaves, torch.arange(CHECKED, device=device))) for leaves in trained]
        yield {"loss": losses}


def _captured(step: Callable[[], None], params: Flat, counter: Any) -> Callable[[], None]:
    """The step as a CUDA graph; params and counter are as they were. Without CUDA the step as it is."""
    import torch

    if not torch.cuda.is_available():
        return step
    before = {path: leaf.detach().clone() for path, leaf in params.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    counter.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for path, leaf in params.items():
            leaf.copy_(before[path])
    return graph.replay


def _torch_hidden(params: Flat, x: Any) -> Any:
    import torch

    return torch.relu(x @ params["hidden_0/kernel"] + params["hidden_0/bias"])


def _torch_head(params: Flat, x: Any) -> Any:
    return x @ params["head/kernel"] + params["head/bias"]


def _torch_mlp(params: Flat, x: Any) -> Any:
    return _torch_head(params, _torch_hidden(params, x))


def _torch_cnn(params: Flat, x: Any) -> Any:
    """The convolutional network on pixels of 0 to 1 [batch, 784], with the leaves of tljax's."""
    import torch

    functional = torch.nn.functional
    x = x.reshape(-1, 1, 28, 28)
    for name in ("conv_0", "conv_1"):
        kernel = params[f"{name}/conv/kernel"].permute(3, 2, 0, 1)
        x = functional.max_pool2d(torch.relu(functional.conv2d(x, kernel, params[f"{name}/conv/bias"], padding=1)), 2)
    x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
    return _torch_head(params, torch.relu(x @ params["dense/kernel"] + params["dense/bias"]))


def _torch_vit(params: Flat, x: Any) -> Any:
    """The vision transformer on pixels of 0 to 1 [batch, 784], with the leaves of tljax's."""
    import torch

    functional = torch.nn.functional
    patch, channels, width = params["embedding/patch/kernel"].shape[1:]
    side = 28 // patch
    x = x.reshape(-1, side, patch, side, patch, channels).permute(0, 1, 3, 2, 4, 5).reshape(len(x), side**2, -1)
    x = x @ params["embedding/patch/kernel"].reshape(-1, width) + params["embedding/patch/bias"]
    token = params["embedding/class_token"].expand(len(x), 1, width)
    x = torch.cat([token, x], 1) + params["embedding/position"]

    def norm(name: str, x: Any) -> Any:
        return functional.layer_norm(x, (width,), params[f"{name}/scale"], params[f"{name}/bias"], EPSILON)

    for i in range(sum(path.endswith("/norm_1/scale") for path in params)):
        block, y = f"block_{i}", norm(f"block_{i}/norm_1", x)
        query, key, value = (
            (
                y @ params[f"{block}/attention/{name}/kernel"].reshape(width, width)
                + params[f"{block}/attention/{name}/bias"].reshape(width)
            )
            .reshape(*y.shape[:2], HEADS, -1)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(y.shape)
        kernel = params[f"{block}/attention/out/kernel"].reshape(width, width)
        x = x + y @ kernel + params[f"{block}/attention/out/bias"]
        y = norm(f"{block}/norm_2", x) @ params[f"{block}/mlp/expand/kernel"] + params[f"{block}/mlp/expand/bias"]
        x = x + functional.gelu(y) @ params[f"{block}/mlp/project/kernel"] + params[f"{block}/mlp/project/bias"]
    return _torch_head(params, norm("norm", x)[:, 0])


# ---- Whole programs


def program(record: Path, module: str, arguments: Sequence[str], begun: float) -> None:
    """Run a program as `python -m` would; what it compiles is noted in the JSON file `record`.

    `first_step` are the seconds from `begun` (of `time.time`) until the first training program is compiled, after which
    its first step starts at once; `compiling` are those of all compilations, added up over threads.
    """
    import jax.monitoring

    noted: dict[str, Any] = {"first_step": None, "compiling": 0.0, "programs": 0}

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        noted["compiling"] += duration_secs
        if event.endswith("backend_compile_duration"):
            noted["programs"] += 1
            if noted["first_step"] is None and "segment" in str(about.get("fun_name")):
                noted["first_step"] = time.time() - begun
                noted["device"] = str(jax.devices()[0].device_kind)
        record.write_text(json.dumps(noted))

    jax.monitoring.register_event_duration_secs_listener(note)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def reference(folder: Path, epochs: int) -> None:
    """The reference experiment in PyTorch with a DataLoader: a source, then scratch, full and head_only."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    def task(name: str) -> tuple[Any, Any]:
        sets = []
        for part in ("train", "t10k"):
            images, labels = _idx(folder / name, part)
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
        pairs = list(pairwise((784, 512)))
        body = torch.nn.Sequential(*(layer for a, b in pairs for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())))
        return torch.nn.Sequential(body, torch.nn.Linear(512, 10))

    source, target = new(), task("fashion_mnist")
    fit(source, task("mnist"), "source")
    fit(new(), target, "scratch")
    for label in ("full", "head_only"):
        net = new()
        net[0].load_state_dict(source[0].state_dict())
        net[0].requires_grad_(label == "full")
        fit(net, target, label)


def _idx(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 784] and labels of 'train' or 't10k', from two of the four files of a data set."""
    files = ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8))
    raw = [
        np.frombuffer(gzip.decompress((folder / file).read_bytes()), np.uint8, offset=start) for file, start in files
    ]
    return raw[0].reshape(-1, 784), raw[1]


# ---- The process

SIDES: dict[str, Callable[[Shared, Work], Iterator[Turn]]] = {
    **{"tljax": tljax, "stream": stream, "probes": probes, "trials": trials},
    **{"plain": plain, "jitted_step": jitted_step, "product": product, "embedding": embedding, "keras": keras},
    **dict.fromkeys(("eager", "compiled", "captured", "ensemble"), pytorch),
}
OF_PYTORCH = {name for name, side in SIDES.items() if side is pytorch}


def serve(folder: Path, work: Work) -> None:
    """Train turns as standard input asks for them; what is said goes to standard output, a line of JSON each."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def say(**values: Any) -> None:
        print(json.dumps(values), file=output, flush=True)

    start = time.perf_counter()
    compiled = _seconds_of_compilation() if work.side not in OF_PYTORCH else []
    turns = SIDES[work.side](read(folder, work), work)
    first = next(turns)
    seconds = time.perf_counter() - start
    say(start=seconds, compiling=sum(compiled), device=_device(work), versions=_versions(), **first)
    for _ in sys.stdin:
        start = time.perf_counter()
        turn = next(turns)
        say(**{"seconds": time.perf_counter() - start, **turn})
    say(peak_bytes=_peak_bytes(work))
    os._exit(0)


def _seconds_of_compilation() -> list[float]:
    """The seconds of everything that JAX traces, lowers and compiles from now on."""
    import jax.monitoring

    seconds: list[float] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return seconds


def _versions() -> dict[str, str]:
    """Of what this process has loaded."""
    loaded = ("jax", "jaxlib", "torch", "keras")
    return {name: metadata.version(name) for name in loaded if name in sys.modules}


def _device(work: Work) -> str:
    """The kind of the device that a side computes on."""
    if work.side not in OF_PYTORCH:
        import jax

        return str(jax.devices()[0].device_kind)
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _peak_bytes(work: Work) -> int:
    """The most bytes that this process's arrays took on the device; on a CPU the most memory of the process."""
    if work.side not in OF_PYTORCH:
        import jax

        if statistics := jax.devices()[0].memory_stats():
            return int(statistics["peak_bytes_in_use"])
    else:
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    what, place, *others = sys.argv[1:]
    if what == "prepare":
        prepare(Path(place), **json.loads(others[0]))
    elif what == "serve":
        serve(Path(place), Work(**json.loads(others[0])))
    elif what == "program":
        program(Path(place), others[1], others[2:], float(others[0]))
    else:
        reference(Path(place), int(others[0]))
