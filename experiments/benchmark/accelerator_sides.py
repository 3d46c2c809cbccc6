"""The sides of the accelerator's rows, each the whole of a process: fits in tljax, in plain JAX and in PyTorch.

    python -m experiments.benchmark.accelerator_sides prepare FOLDER '{"steps": 600, ...}'
    python -m experiments.benchmark.accelerator_sides serve FOLDER '{"side": "plain", "fits": 8, ...}'

`prepare` writes what all sides share: images, labels, parameters and the orders of the first turn. `serve` trains the
first turn, says so in a line of JSON on standard output, and then trains a turn for each line on standard input and
says how long it took; at the end of its input it says how much memory it took at its peak. Sides of PyTorch import
neither jax nor tljax, so that another Python may run them.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH, RATE, CLASSES = 100, 0.01, 10
MODELS = {"mlp": "mlp", "vit": "vit:width=64:depth=6:heads=4:patch=7"}
"""The models by the names that rows have: 784-512-10, and a vision transformer of 6 blocks on 16 patches."""
HEADS = 4
"""Of the vision transformer."""
EPSILON = 1e-6
"""Of its norms."""
CHECKED = 1000
"""The first examples, on which the loss after the first turn is taken."""

Flat = dict[str, Any]
"""Parameters as {path of the leaf: array}."""


class Work(NamedTuple):
    """What a side trains."""

    side: str
    """'tljax', 'plain' or one of PyTorch's: 'eager', 'compiled', 'captured', 'ensemble'."""
    model: str = "mlp"
    fits: int = 1
    precision: str = "float32"
    """Of products: 'float32' or 'tf32'; or 'bfloat16' of tljax, in which it then computes."""
    trains: str = "full"
    """'full', 'head' with the body's output computed before the first step, or 'head_in_step' with it in each step."""
    many: str = "auto"
    """tljax's --many."""
    steps: int = 600
    """Of a turn, each of a batch of 100."""
    turns: int = 6


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


class Turn(NamedTuple):
    """What a side gives after its first turn: the loss on the first examples, of the first and of the last fit."""

    loss: tuple[float, float]


# ---- What all share


def prepare(folder: Path, manual_dir: str | None, fits: int, steps: int, models: list[str]) -> None:
    """Write images, labels, parameters and orders for so many fits; without a folder of the complete MNIST those of
    `mnist_10k`, six times."""
    import jax

    from tljax import data
    from tljax import models as library
    from tljax.data import draw

    train = data.load("mnist", manual_dir=manual_dir).train if manual_dir else data.load("mnist_10k").train
    images, labels = np.asarray(train.arrays), np.asarray(train.targets)
    times = -(-60_000 // len(labels))
    np.save(folder / "images.npy", np.tile(images, (times, 1, 1, 1)))
    np.save(folder / "labels.npy", np.tile(labels, times).astype(np.int32))
    orders = [
        draw.order(seed, times * len(labels), BATCH, 0, steps, epochs=True).astype(np.int32) for seed in range(fits)
    ]
    np.save(folder / "orders.npy", np.stack(orders))
    for name in models:
        model = library.build(MODELS[name], CLASSES, hidden=(512,), activation="relu")
        np.savez(folder / f"{name}.npz", **_flat(library.init(model, jax.random.key(0), images.shape[1:])))


def read(folder: Path, work: Work) -> Shared:
    """What `prepare` wrote, for this side."""
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    params = dict(np.load(folder / f"{work.model}.npz"))
    return Shared(images, labels, params, np.load(folder / "orders.npy", mmap_mode="r")[: work.fits, : work.steps])


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


def tljax(shared: Shared, work: Work) -> Iterator[Any]:
    """Fits in tljax; each turn ends when the parameters are there."""
    import jax

    from experiments.runs import process
    from experiments.runs.settings import Settings
    from tljax import models, objective, optimizers, plugins, train
    from tljax.data import draw
    from tljax.types import Context

    precision = "highest" if work.precision == "float32" else "default"
    dtype = "bfloat16" if work.precision == "bfloat16" else "float32"
    computing = {"compute_dtype": dtype, "matmul_precision": precision}
    model = models.build(MODELS[work.model], CLASSES, hidden=(512,), activation="relu", **computing)
    optimizer_spec, numbers = optimizers.spec("sgd")
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), optimizer_spec)
    params = jax.tree.map(jax.numpy.asarray, _nested(shared.params))
    method = plugins.method("full" if work.trains == "full" else "head_only")[0]
    mask = method.strategy(params, Context(models.names(model)))
    steps = work.steps * work.turns

    def fit(seed: int) -> Any:
        order = functools.partial(draw.order, seed, len(shared.labels), BATCH, epochs=True)
        every = {**numbers, "label_smoothing": 0.0}
        rates = np.full(steps, RATE, np.float32)
        return train.Fit(params, ((0, mask),), order, rates, (), every, jax.random.key(0), shares=seed)

    execution = process.prepare(Settings.from_flags(many=work.many, compilation_cache="off", devices=1))
    data, ends = train.load(shared.images, shared.labels), range(work.steps, steps + 1, work.steps)
    apply = train.forward(model)
    for state, _ in train.fit(spec, [fit(seed) for seed in range(work.fits)], data, ends, execution=execution):
        jax.block_until_ready(state.params)
        if state.step == work.steps:
            trained = [jax.tree.map(lambda leaf, i=i: leaf[i], state.params) for i in (0, -1)]
            yield _turn(lambda params, x, y: float(_cross_entropy(apply(params, x), y)), trained, shared)
        else:
            yield None


def plain(shared: Shared, work: Work) -> Iterator[Any]:
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
        yield _turn(lambda params, x, y: float(loss(params, x, y)), trained, first)
        key = jax.random.key(0)
        jax.block_until_ready(draw(key))
        while True:
            key, now = jax.random.split(key)
            stacked, *log = turn(stacked, images, labels, draw(now))
            jax.block_until_ready((stacked, log))
            yield None


def _jax_forward(model: str) -> Callable[[Any, Any], Any]:
    """(params, uint8 images) -> logits; the vision transformer's stages are those of tljax, the loop is not."""
    from tljax import models, train

    if model == "mlp":

        def forward(params: Any, x: Any) -> Any:
            import jax

            hidden = jax.nn.relu(_pixels(x) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"])
            return hidden @ params["head"]["kernel"] + params["head"]["bias"]

        return forward
    apply = train.forward(models.build(MODELS[model], CLASSES, hidden=(512,), activation="relu"))
    return lambda params, x: apply(params, _floats(x))


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


def _turn(loss: Callable[[Any, Any, Any], float], trained: list[Any], shared: Shared) -> Turn:
    """The losses of the first and of the last fit on the first examples."""
    first, last = (loss(params, shared.images[:CHECKED], shared.labels[:CHECKED]) for params in trained)
    return Turn((first, last))


# ---- PyTorch


def pytorch(shared: Shared, work: Work) -> Iterator[Any]:
    """The same in PyTorch on data on the device: eager, compiled, the step captured in a CUDA graph, or an ensemble of
    `torch.func.vmap` over fits, captured where there is CUDA. Neither losses nor norms are kept."""
    import torch

    torch.set_float32_matmul_precision("highest" if work.precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = work.precision != "float32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.as_tensor(shared.images.reshape(len(shared.images), -1), device=device)
    labels = torch.as_tensor(shared.labels, device=device).long()
    params = {path: torch.tensor(leaf, device=device) for path, leaf in shared.params.items()}
    forward = _torch_mlp if work.model == "mlp" else _torch_vit
    frozen = {path: leaf for path, leaf in params.items() if work.trains != "full" and not path.startswith("head/")}
    params = {path: leaf for path, leaf in params.items() if path not in frozen}
    if work.trains == "head":
        images = torch.cat([_torch_hidden(frozen, part.float() / 255) for part in images.split(1000)])
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
            drawn = torch.rand(work.fits, len(labels), device=device).argsort(1)
            order.copy_(drawn[:, : order[0].numel()].reshape(order.shape))
        counter.zero_()
        for _ in range(work.steps):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            yield None
            continue
        several = work.side == "ensemble"
        trained = [{path: leaf[i] if several else leaf for path, leaf in params.items()} for i in (0, -1)]
        with torch.no_grad():
            losses = [float(loss(leaves, torch.arange(CHECKED, device=device))) for leaves in trained]
        yield Turn((losses[0], losses[1]))


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


# ---- The process


def serve(folder: Path, work: Work) -> None:
    """Train turns as standard input asks for them; what is said goes to standard output, a line of JSON each."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def say(**values: Any) -> None:
        print(json.dumps(values), file=output, flush=True)

    start = time.perf_counter()
    shared = read(folder, work)
    sides = {"tljax": tljax, "plain": plain}
    turns = sides.get(work.side, pytorch)(shared, work)
    begun = time.perf_counter()
    first = next(turns)
    say(
        first_turn=time.perf_counter() - begun,
        reading=begun - start,
        loss=first.loss,
        device=_device(work),
    )
    for _ in sys.stdin:
        start = time.perf_counter()
        next(turns)
        say(seconds=time.perf_counter() - start)
    say(peak_bytes=_peak_bytes(work))
    os._exit(0)


def _device(work: Work) -> str:
    """The kind of the device that a side computes on."""
    if work.side in ("tljax", "plain"):
        import jax

        return str(jax.devices()[0].device_kind)
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _peak_bytes(work: Work) -> int:
    """The most bytes that this process's arrays took on the device; on a CPU the most memory of the process."""
    if work.side in ("tljax", "plain"):
        import jax

        if statistics := jax.devices()[0].memory_stats():
            return int(statistics["peak_bytes_in_use"])
    else:
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    words = json.loads(sys.argv[3])
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), **words)
    else:
        serve(Path(sys.argv[2]), Work(**words))
