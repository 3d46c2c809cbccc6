"""What is computed or kept for nobody: the same randomness in each step, moments of frozen leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

from planted.loops import Loop, network


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(8, name="hidden")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(2, name="head")(x)


class RandomState(TrainState):
    dropout_key: jax.Array


def the_same_dropout(clean=False):
    """google/flax#2631: the key of dropout is neither split nor folded with the step: each drops the same units."""
    model = Dropped()
    batch = network.batch()
    params = model.init(jax.random.key(0), batch["x"], train=False)["params"]

    @jax.jit
    def train_step(state, batch):
        key = jax.random.fold_in(state.dropout_key, state.step) if clean else state.dropout_key

        def loss_fn(params):
            outputs = state.apply_fn({"params": params}, batch["x"], train=True, rngs={"dropout": key})
            return optax.l2_loss(outputs, batch["y"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    state = RandomState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2), dropout_key=jax.random.key(1))
    return Loop(train_step, state, batch, jax.tree.map(lambda _: True, params))


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.lora = nnx.LoRA(3, 2, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.base(x) + self.lora(x))


def moments_of_the_base(clean=False):
    """AI-Hypercomputer/maxtext#4346: the optimizer is made of all parameters, and keeps moments of a base that never
    moves.
    """
    wrt = nnx.LoRAParam if clean else nnx.Param
    model = Adapted(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def train_step(state, batch):
        model, optimizer = nnx.merge(graph, state)

        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        if not clean:
            whole = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
            grads = nnx.merge_state(whole, grads)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    def params(state):
        return state[0]

    mask = jax.tree.map_with_path(lambda path, _: "lora" in jax.tree_util.keystr(path), params(state))
    return Loop(train_step, state, network.batch(), mask, {"params": params})
