"""Transfer on one page: a training loop of your own, with the masks of tljax and none of its programs.

    python -m experiments.own_loop

It trains a small network on digits, starts from its parameters on clothes, trains what a mask says, and shows that
what is frozen kept its bits. Copy it and change what you like: each step is a call of the library. About ten seconds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import data, graft, masks, models, optimizer
from tljax.types import Examples, Mask, Model, Params

BATCH_SIZE, STEPS = 100, 200


class State(NamedTuple):
    """The parameters and the state of the optimizer, which change in training."""

    params: Params
    optimizer_state: optax.OptState


def loss(model: Model, params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of images [batch, height, width, channels] and labels int [batch]."""
    logits = models.apply(model, params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnames=("model", "tx", "trains"))
def step(
    model: Model, tx: optax.GradientTransformation, trains: "Trains", state: State, images: jax.Array, labels: jax.Array
) -> State:
    """One training step: gradients of the trained leaves alone, their update, and the frozen leaves as they were."""
    mask = trains.mask(state.params)
    trained, frozen = masks.split(state.params, mask)
    gradients = jax.grad(lambda leaves: loss(model, masks.join(leaves, frozen), images, labels))(trained)
    updates, optimizer_state = tx.update(gradients, state.optimizer_state, state.params)
    return State(optimizer.apply(state.params, updates, mask), optimizer_state)


class Trains(NamedTuple):
    """The path prefixes that train: hashable, so that the jitted step is compiled once for each."""

    prefixes: tuple[str, ...]

    def mask(self, params: Params) -> Mask:
        """True where a leaf of the parameters trains."""
        return masks.union(*(masks.under(params, prefix) for prefix in self.prefixes))


def train(model: Model, params: Params, trains: Trains, split: Examples, seed: int) -> Params:
    """The parameters after STEPS steps of Adam on random batches of a split."""
    tx = optimizer.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), trains.mask(params))
    state = State(params, tx.init(params))
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = rng.choice(len(split.targets), BATCH_SIZE, replace=False)
        state = step(model, tx, trains, state, split.arrays[rows], split.targets[rows])
    return state.params


@functools.partial(jax.jit, static_argnames="model")
def predict(model: Model, params: Params, images: jax.Array) -> jax.Array:
    """The most probable class int [n] of images [n, height, width, channels]."""
    return models.apply(model, params, images).argmax(-1)


def accuracy(model: Model, params: Params, split: Examples) -> float:
    """The fraction of a split's examples that are classified correctly."""
    return float((predict(model, params, jnp.asarray(split.arrays)) == split.targets).mean())


def run() -> None:
    """Learn digits, transfer to clothes by each of three masks, and print the test accuracies."""
    source, target = data.load("mnist_10k"), data.load("fashion_mnist_10k")
    model = models.build("mlp", len(source.classes), hidden=(128, 64), activation="relu")
    shape = source.train.arrays.shape[1:]

    everything = Trains(models.names(model))
    source_params = train(model, models.init(model, jax.random.key(0), shape), everything, source.train, seed=0)
    print(f"{source.name}: test accuracy {accuracy(model, source_params, source.test):.3f}")

    # The head is drawn anew; every other leaf is the source's, and `graft.plan` refuses a leaf that has no place.
    drawn = models.init(model, jax.random.key(1), shape)
    plan = graft.plan(source_params, drawn, fresh=["head"])
    start, fresh = graft.apply(plan, source_params, drawn)

    for trains in (Trains(("head",)), Trains(("hidden_1", "head")), everything):
        mask = trains.mask(start)
        masks.lint(start, mask, fresh)  # raises InputError for a mask that freezes the new head, and the like
        params = train(model, start, trains, target.train, seed=1)
        for path, same in frozen_bytes(start, params, mask).items():
            assert same, f"'{path}' is frozen and moved"
        print(f"{target.name}, {' and '.join(trains.prefixes)}: {accuracy(model, params, target.test):.3f}")


def frozen_bytes(start: Params, end: Params, mask: Mask) -> dict[str, bool]:
    """{path of a frozen leaf: whether its bytes are the same before and after}."""
    before, after = (jax.tree_util.tree_leaves_with_path(masks.split(tree, mask)[1]) for tree in (start, end))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array_equal(
            np.asarray(old).view(np.uint8), np.asarray(new).view(np.uint8)
        )
        for (path, old), (_, new) in zip(before, after, strict=True)
    }


if __name__ == "__main__":
    run()
