"""Gradients of frozen leaves that reach what trains: norms to clip by, detectors of spikes."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from planted.loops import Loop, network


def _tx(trainable):
    labels = jax.tree.map(lambda train: "train" if train else "freeze", trainable)
    return optax.multi_transform({"train": optax.adamw(1e-2), "freeze": optax.set_to_zero()}, labels)


def clip_norm_over_frozen_gradients(clean=False):
    """AI-Hypercomputer/maxtext#5285: the norm to clip by is of all gradients, so that frozen ones over-clip what
    trains.
    """
    params = network.init()
    trainable = network.head_only(params)
    tx = _tx(trainable)
    clip = optax.clip_by_global_norm(0.1)
    tx = optax.chain(optax.masked(clip, trainable), tx) if clean else optax.chain(clip, tx)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return Loop(step, (params, tx.init(params)), network.batch(), trainable)


def spikes_of_frozen_gradients(clean=False):
    """AI-Hypercomputer/maxtext#5290: a step is skipped if the norm of all gradients is a spike, of frozen ones too."""
    params = network.init()
    trainable = network.head_only(params)
    tx = _tx(trainable)
    mesh = jax.make_mesh((len(jax.devices()[:2]),), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def gradients(params, batch):
        def loss(params):
            return jax.lax.pmean(network.loss(params, batch), "data")

        return jax.grad(loss)(params)

    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec()
    )

    @jax.jit
    def step(state, batch):
        grads = sharded(state["params"], batch)
        if clean:
            grads = jax.tree.map(lambda g, train: g if train else jnp.zeros_like(g), grads, trainable)
        norm = optax.tree.norm(grads)
        spike = norm > 2 * state["usual_norm"]

        def skip():
            return state["params"], state["opt_state"]

        def apply():
            updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
            return optax.apply_updates(state["params"], updates), opt_state

        params, opt_state = jax.lax.cond(spike, skip, apply)
        usual = 0.9 * state["usual_norm"] + 0.1 * jnp.minimum(norm, 2 * state["usual_norm"])
        return {"params": params, "opt_state": opt_state, "usual_norm": usual}, {"norm": norm}

    state = {"params": params, "opt_state": tx.init(params), "usual_norm": jnp.float32(1.5)}
    return Loop(step, state, network.batch(), trainable)


def norm_of_accumulated_gradients(clean=False):
    """ahrefs/ocannl#673: what the norm is taken of are all parameters that the loss knows, frozen ones with them."""
    params = network.init()
    trainable = network.head_only(params)
    names = ("head",) if clean else tuple(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, batch):
        def accumulate(total, micro):
            return jax.tree.map(jnp.add, total, jax.grad(network.loss)(params, micro)), None

        micro_batches = jax.tree.map(lambda leaf: leaf.reshape(3, 2, *leaf.shape[1:]), batch)
        grads, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), micro_batches)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for name in names for g in jax.tree.leaves(grads[name])))
        scale = jnp.minimum(1.0, 0.5 / norm)
        head = jax.tree.map(lambda p, g: p - 0.1 * scale * g, params["head"], grads["head"])
        return {**params, "head": head}

    return Loop(step, params, network.batch(), trainable)
