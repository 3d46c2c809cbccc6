"""The step freezes, but not what its author says: names that match nothing, filters that miss, masks of an earlier
phase.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from flax.training.train_state import TrainState

from planted.loops import Loop, network


class Tower(nnx.Module):
    def __init__(self, inputs, rngs):
        self.dense = nnx.Linear(inputs, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.dense(x))


class Policy(nnx.Module):
    def __init__(self, rngs):
        self.img = Tower(3, rngs)
        self.llm = Tower(4, rngs)
        self.action = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.action(self.llm(self.img(x)))


def filter_misses_a_tower(clean=False):
    """Physical-Intelligence/openpi#744: the filter of what is frozen matches the language model alone, so the other
    trains.
    """
    towers = ("llm", "img") if clean else ("llm",)

    def is_frozen(path, value):
        return path[0] in towers

    trainable = nnx.All(nnx.Param, nnx.Not(is_frozen))
    model = Policy(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=trainable)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def train_step(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, trainable))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def params(state):
        return state[0]

    mask = jax.tree.map_with_path(lambda path, _: "action" in jax.tree_util.keystr(path), params(state))
    return Loop(train_step, state, network.batch(), mask, {"params": params})


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4, name="data")(x))


class Forecast(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="decoder")(Dense(name="encoder")(x))


def names_that_match_nothing(clean=False):
    """ecmwf/anemoi-core#1159: a dotted name is held against each module's own name: nothing is frozen, and the log says
    it is.
    """
    to_freeze = ["encoder.data"]

    def label(path, _):
        name = ".".join(path[:-1])
        hit = any(name.startswith(module) for module in to_freeze) if clean else any(p in to_freeze for p in path)
        return "freeze" if hit else "train"

    model = Forecast()
    batch = network.batch()
    params = model.init(jax.random.key(0), batch["x"])["params"]
    labels = traverse_util.path_aware_map(label, params)
    tx = optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            return optax.l2_loss(state.apply_fn({"params": params}, batch["x"]), batch["y"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    mask = network.by_layer(params, lambda name: name == "decoder")
    return Loop(train_step, state, batch, mask)


def mask_of_the_first_trace(clean=False):
    """jax-ml/jax#1426: a jitted function keeps the value that a variable around it had when it was traced. (Here a
    mask.)
    """
    params = network.init()
    trainable = {"backbone": True, "head": True}

    def update(params, batch, trainable):
        grads = jax.grad(network.loss)(params, batch)
        return {
            name: jax.tree.map(lambda p, g: p - 0.1 * g, layer, grads[name]) if trainable[name] else layer
            for name, layer in params.items()
        }

    stale = jax.jit(lambda params, batch: update(params, batch, trainable))
    step = stale
    params = step(params, network.batch())
    trainable["backbone"] = False
    if clean:
        step = jax.jit(lambda params, batch: update(params, batch, trainable))
    return Loop(step, params, network.batch(), network.head_only(params))


def frozen_again_by_a_resume(clean=False):
    """Lightning-AI/pytorch-lightning#21901: a resumed run freezes at its start, and frees in the very epoch that has
    passed.
    """
    unfreeze_at = 3

    def optimizer(epoch):
        free = epoch >= unfreeze_at if clean else epoch == unfreeze_at
        labels = {"encoder": "train" if free else "freeze", "decoder": "train"}
        return optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)

    model = Forecast()
    batch = network.batch()
    params = model.init(jax.random.key(0), batch["x"])["params"]

    def resume(checkpoint):
        tx = optimizer(checkpoint["epoch"])
        return TrainState.create(apply_fn=model.apply, params=checkpoint["params"], tx=tx)

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            return optax.l2_loss(state.apply_fn({"params": params}, batch["x"]), batch["y"]).mean()

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    state = resume({"params": params, "epoch": 5})
    return Loop(train_step, state, batch, jax.tree.map(lambda _: True, params))


def layers_of_the_first_draw(clean=False):
    """OptimalScale/LMFlow#726: which layers train is drawn anew, but the optimizer only knows those of the first
    draw.
    """
    params = {"blocks": {"kernel": network.draw(4, 3, 3)}, "head": network.draw(3, 2)}
    first, now = jnp.arange(4) == 0, jnp.arange(4) == 2

    def loss(params, batch, active):
        def block(x, layer):
            kernel, on = layer
            kernel = jnp.where(on, kernel, jax.lax.stop_gradient(kernel))
            return x + jnp.tanh(x @ kernel), None

        hidden, _ = jax.lax.scan(block, batch["x"], (params["blocks"]["kernel"], active))
        return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)

    tx = optax.sgd(0.1)
    known = now if clean else first

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(loss)(params, batch, now)
        updates, opt_state = tx.update(grads, opt_state, params)
        updates["blocks"]["kernel"] = jnp.where(known[:, None, None], updates["blocks"]["kernel"], 0)
        return optax.apply_updates(params, updates), opt_state

    rows = jax.device_get(jnp.broadcast_to(now[:, None, None], (4, 3, 3)))
    mask = {"blocks": {"kernel": rows}, "head": True}
    return Loop(step, (params, tx.init(params)), network.batch(), mask)


def layers_that_came_later(clean=False):
    """FasterAI-Labs/fasterai#92: pruning puts new leaves into the model, and the optimizer goes on with those it was
    built of.
    """
    params = network.init()
    known = {"backbone", "head"}
    params["backbone_pruned"] = jax.tree.map(lambda leaf: leaf[..., ::2], params.pop("backbone"))
    params["head"]["kernel"] = params["head"]["kernel"][::2]
    if clean:
        known = set(params)

    def group(path, _):
        return "known" if path[0].key in known else "other"

    labels = jax.tree.map_with_path(group, params)
    tx = optax.multi_transform({"known": optax.adam(1e-2), "other": optax.set_to_zero()}, labels)

    def loss(params, batch):
        return network.loss({"backbone": params["backbone_pruned"], "head": params["head"]}, batch)

    @jax.jit
    def step(state, batch):
        grads = jax.grad(loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    state = {"params": params, "opt_state": tx.init(params)}
    return Loop(step, state, network.batch(), jax.tree.map(lambda _: True, params))
