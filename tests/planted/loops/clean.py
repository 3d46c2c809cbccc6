"""Six loops without a bug, one a way of writing them."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import jax_utils, nnx
from flax.training.train_state import TrainState

from planted.loops import Loop, network


def linen_train_state():
    """Linen and a TrainState; clip, warmup and decay on the part that trains, by `optax.partition`."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.LayerNorm(name="norm")(nn.Dense(4, name="backbone")(x)))
            return nn.Dense(2, name="head")(x)

    model, batch = Model(), network.batch()
    params = model.init(jax.random.key(0), batch["x"])["params"]
    labels = {"backbone": "frozen", "norm": "trained", "head": "trained"}
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)
    trained = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    tx = optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            return optax.l2_loss(state.apply_fn({"params": params}, batch["x"]), batch["y"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss, "norm": optax.tree.norm(grads)}

    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    mask = network.by_layer(params, lambda name: name != "backbone")
    return Loop(train_step, state, batch, mask)


def nnx_optimizer():
    """NNX: batch norm and dropout, an optimizer of the head alone."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.backbone = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(nnx.relu(self.norm(self.backbone(x)))))

    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    model = Model(nnx.Rngs(params=0, dropout=1))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=head)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def train_step(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, head))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def params(state):
        return nnx.filter_state(state[0], nnx.Param) if hasattr(nnx, "filter_state") else state[0]

    def trained(path, _):
        return "head" in jax.tree_util.keystr(path)

    return Loop(train_step, state, network.batch(), jax.tree.map_with_path(trained, params(state)), {"params": params})


def equinox_partition():
    """Equinox: what trains and what does not are two trees; the loss sees them combined."""
    model = eqx.nn.MLP(3, 2, width_size=4, depth=1, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    mask = jax.tree.map(lambda _: False, arrays)
    mask = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), mask, (True, True))
    tx = optax.adamw(1e-2)

    @eqx.filter_jit
    def step(state, batch):
        arrays, opt_state = state
        trained, frozen = eqx.partition(arrays, mask)

        def loss_fn(trained):
            outputs = jax.vmap(eqx.combine(trained, frozen, static))(batch["x"])
            return jnp.mean((outputs - batch["y"]) ** 2)

        loss, grads = eqx.filter_value_and_grad(loss_fn)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return (eqx.combine(eqx.apply_updates(trained, updates), frozen), opt_state), loss

    return Loop(step, (arrays, tx.init(eqx.filter(arrays, mask))), network.batch(), mask)


def pmap_replicas():
    """Replicas under `pmap`, gradients averaged, the state donated."""
    devices = jax.local_devices()[:2]
    params = network.init()
    mask = network.head_only(params)
    tx = optax.adam(1e-2)

    def step(state, batch):
        def loss(head):
            return network.loss({**state["params"], "head": head}, batch)

        value, grads = jax.value_and_grad(loss)(state["params"]["head"])
        grads = jax.lax.pmean(grads, "devices")
        updates, opt_state = tx.update(grads, state["opt_state"])
        head = optax.apply_updates(state["params"]["head"], updates)
        return {"params": {**state["params"], "head": head}, "opt_state": opt_state}, jax.lax.pmean(value, "devices")

    state = jax_utils.replicate({"params": params, "opt_state": tx.init(params["head"])}, devices)
    shards = jax.tree.map(lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), network.batch())
    return Loop(jax.pmap(step, "devices", devices=devices, donate_argnums=0), state, shards, mask)


def micro_batches():
    """Gradients of three micro-batches are summed in a scan, in mixed precision, and applied once."""
    params = network.init()
    mask = network.head_only(params)
    labels = jax.tree.map(lambda train: "trained" if train else "frozen", mask)
    trained = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    tx = optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)

    def loss(params, batch):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, batch["x"]))
        return jnp.mean((network.forward(*half).astype(jnp.float32) - batch["y"]) ** 2)

    @jax.jit
    def step(state, batch):
        def accumulate(total, micro):
            value, grads = jax.value_and_grad(loss)(state["params"], micro)
            return jax.tree.map(jnp.add, total, (value, grads)), None

        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        micro = jax.tree.map(lambda leaf: leaf.reshape(3, 2, *leaf.shape[1:]), batch)
        (value, grads), _ = jax.lax.scan(accumulate, (jnp.zeros(()), zeros), micro)
        grads = jax.tree.map(lambda g: g / 3, grads)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, value / 3

    return Loop(step, {"params": params, "opt_state": tx.init(params)}, network.batch(), mask)


def scan_over_layers():
    """Equal layers in one leaf, scanned with remat; the upper half trains, and an average of it is kept."""
    layers, width = 4, 3
    params = {
        "blocks": {"kernel": network.draw(layers, width, width), "bias": network.draw(layers, width)},
        "head": network.draw(width, 2),
    }
    upper = jnp.arange(layers) >= layers // 2
    rows = {"kernel": upper[:, None, None], "bias": upper[:, None]}
    tx = optax.adam(1e-2)

    def loss(params, batch):
        @jax.checkpoint
        def block(x, layer):
            return x + jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

        hidden, _ = jax.lax.scan(block, batch["x"], params["blocks"])
        return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)

    @jax.jit
    def step(state, batch):
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"])
        after = optax.apply_updates(state["params"], updates)
        blocks = {
            name: jnp.where(rows[name], leaf, state["params"]["blocks"][name]) for name, leaf in after["blocks"].items()
        }
        params = {"blocks": blocks, "head": after["head"]}
        ema = optax.incremental_update(params, state["ema"], 0.01)
        return {"params": params, "opt_state": opt_state, "ema": ema}, {"loss": value}

    mask = {
        "blocks": {
            name: jax.device_get(jnp.broadcast_to(row, params["blocks"][name].shape)) for name, row in rows.items()
        },
        "head": True,
    }
    state = {"params": params, "opt_state": tx.init(params), "ema": params}
    return Loop(step, state, network.batch(), mask)


LOOPS = (linen_train_state, nnx_optimizer, equinox_partition, pmap_replicas, micro_batches, scan_over_layers)
