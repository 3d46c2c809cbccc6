"""What strategies are tried on: two small models with made data, and five odd pytrees."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import masks, models, objective, paths, train
from tljax.train import gradients
from tljax.types import Model, Params

LOSS = "softmax_cross_entropy"
EXAMPLES = 24
BATCH = 8
_WIDTH = 8
"""Of inputs, hidden layers, classes and batches alike: without jit, JAX compiles each operation once a shape."""


class Problem(NamedTuple):
    """A pytree twice, as a source and as a draw, and what a strategy may look at."""

    name: str
    stages: tuple[str, ...]
    source: Params
    drawn: Params
    look: Callable[[Any, Any], tuple[Callable[[Params], Params], Callable[[Params], Params]]]
    """(merge, model state) -> (gradient, fisher)."""
    model: Model | None = None
    shape: tuple[int, ...] = ()
    """Of an example of the model's."""


def data(shape: tuple[int, ...]) -> train.Data:
    """Made images uint8 [24, *shape], and labels int32 [24] of eight classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, *shape)).astype(np.uint8)
    return train.load(images, np.arange(EXAMPLES, dtype=np.int32) % _WIDTH)


def from_model(name: str) -> Problem:
    """The problem of a model by its name, for images 8 x 8 (an MLP gets 2 x 2 x 2).

    Its activation is tanh, if it takes one, so that no unit is dead.
    """
    shape = (2, 2, 2) if name == "mlp" else (8, 8, 1)
    model = models.build(name, _WIDTH, hidden=(_WIDTH, _WIDTH), activation="tanh")
    source, drawn = (_draw(models.abstract(model, shape), seed) for seed in (0, 1))
    examples = data(shape)

    def look(merge: Any, state: Any) -> Any:
        split = (model, objective.loss(LOSS), examples, np.arange(EXAMPLES), merge)
        gradient = gradients.mean_gradient(*split, state=state)
        return gradient, gradients.mean_squared_gradient(*split, state=state)

    return Problem(name, models.names(model), source, drawn, look, model, shape)


def _draw(shapes: Params, seed: int) -> Params:
    """Normal numbers of variance 1/fan_in, ones where a leaf cannot train: the model's own draw takes longer."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any, able: bool) -> np.ndarray:
        if not able:
            return np.ones(leaf.shape, leaf.dtype)
        return (rng.normal(size=leaf.shape) / np.sqrt(max(1, math.prod(leaf.shape[:-1])))).astype(leaf.dtype)

    structure = jax.tree.structure(shapes)
    return jax.tree.map(draw, shapes, jax.tree.unflatten(structure, paths.trainable(shapes)))


class _Pair(NamedTuple):
    body: Any
    head: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["body", "head"], meta_fields=[])
@dataclass
class _Record:
    body: Any
    head: Any


def trees() -> list[Problem]:
    """Lists and tuples; a NamedTuple; a dataclass; None, integers and an empty dict; scalars."""
    named = ("body", "head")
    with_holes = {"body": {**_layer(), "none": None, "empty": {}, "count": np.int32(3)}, "head": _layer()}
    scalars = {"body": {"scale": np.float32(2), "shift": np.array(-0.5, np.float32)}, "head": {"bias": 0.25}}
    return [
        _from_tree("list and tuples", ("0", "1"), [tuple(_layer().values()), (_layer(), np.ones(4, np.float32))]),
        _from_tree("NamedTuple", named, _Pair(_layer(), _layer())),
        _from_tree("dataclass", named, _Record(_layer(), [_layer()])),
        _from_tree("None, integers, empty dict", named, with_holes),
        _from_tree("scalars", named, scalars),
    ]


def _layer() -> dict[str, np.ndarray]:
    return {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "bias": np.full(4, 0.5, np.float32)}


def _from_tree(name: str, stages: tuple[str, ...], tree: Params) -> Problem:
    drawn = jax.tree.map(lambda leaf: leaf if jnp.result_type(leaf) == jnp.int32 else leaf / 2, tree)
    return Problem(name, stages, tree, drawn, lambda merge, state: (_gradient, _fisher))


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(params: Params, *, loss: Any = None) -> Params:
    """Of a made L, whatever the loss; None where a leaf cannot train."""
    learnt, _ = masks.split(params, masks.by_path(params, lambda path: True))
    return jax.grad(lambda tree: sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(tree)))(learnt)


def _fisher(params: Params) -> Params:
    return jax.tree.map(jnp.square, _gradient(params))
