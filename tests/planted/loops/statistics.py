"""Running statistics of layers that are frozen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import jax_utils, nnx
from flax.training.train_state import TrainState

from planted.loops import Loop, network


class Extractor(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="dense")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))


class Classifier(nn.Module):
    frozen_norm: bool

    @nn.compact
    def __call__(self, x, train):
        features = Extractor(name="extractor")(x, train and not self.frozen_norm)
        return nn.Dense(2, name="head")(features)


class BatchNormState(TrainState):
    batch_stats: Any = None


def statistics_drift(clean=False):
    """keras-team/keras#7085: a frozen batch norm keeps scale and bias, and goes on updating its running statistics."""
    devices = jax.local_devices()[:2]
    model = Classifier(frozen_norm=clean)
    batch = network.batch()
    variables = model.init(jax.random.key(0), batch["x"], train=False)
    params = variables["params"]
    labels = {"extractor": "freeze", "head": "train"}
    tx = optax.multi_transform({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels)

    def train_step(state, batch):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, changed = state.apply_fn(variables, batch["x"], train=True, mutable=["batch_stats"])
            return optax.l2_loss(logits, batch["y"]).mean(), changed

        (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads = jax.lax.pmean(grads, "devices")
        stats = jax.lax.pmean(changed["batch_stats"], "devices") if not clean else changed["batch_stats"]
        return state.apply_gradients(grads=grads, batch_stats=stats), jax.lax.pmean(loss, "devices")

    state = BatchNormState.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=variables["batch_stats"])
    state = jax_utils.replicate(state, devices)
    shards = jax.tree.map(lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), batch)

    def read(state):
        return {"params": state.params, "batch_stats": state.batch_stats}

    mask = jax.tree.map_with_path(lambda path, _: "head" in jax.tree_util.keystr(path), read(state))
    return Loop(jax.pmap(train_step, "devices", devices=devices), state, shards, mask, {"params": read})


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.encoder = Encoder(rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.encoder(x))


def frozen_norm_in_train_mode(clean=False):
    """pgniewko/gt-pyg#112: the frozen encoder is put into eval mode once, and the epoch's `train()` takes it back."""
    model = Network(nnx.Rngs(0))
    model.encoder.eval()
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=head)

    def train_mode(model):
        model.train()
        if clean:
            model.encoder.eval()

    train_mode(model)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def train_step(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, head))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    def params(state):
        return state[0]

    mask = jax.tree.map_with_path(lambda path, _: "head" in jax.tree_util.keystr(path), params(state))
    return Loop(train_step, state, network.batch(), mask, {"params": params})
