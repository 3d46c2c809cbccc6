"""Frozen leaves that the step itself moves: ties, casts, quantisation, averages, gradients that were not cut
everywhere.
"""

import jax
import jax.numpy as jnp
import optax

from planted.loops import Loop, network


def tokens():
    return {"tokens": jnp.array([[0, 1, 2], [3, 1, 0]]), "next": jnp.array([[1, 2, 4], [1, 0, 4]])}


def new_rows_in_one_of_two_tables(clean=False):
    """kohjingyu/fromage#18: a new token's rows are to train; the input table's other rows are held, the output's are
    not.
    """
    params = {"embed": network.draw(5, 4), "head": network.draw(4, 5)}

    def loss(params, batch):
        logits = jnp.tanh(params["embed"][batch["tokens"]]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["next"]).mean()

    @jax.jit
    def step(params, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads["embed"] = grads["embed"].at[:-1].set(0)
        if clean:
            grads["head"] = grads["head"].at[:, :-1].set(0)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    new = jnp.arange(5) == 4
    mask = {"embed": jnp.broadcast_to(new[:, None], (5, 4)), "head": jnp.broadcast_to(new[None], (4, 5))}
    return Loop(step, params, tokens(), jax.device_get(mask))


def tied_tables(clean=False):
    """CarperAI/trlx#543: the input embedding is frozen, and the output embedding, which is the same leaf, is not."""
    params = {"embed": network.draw(5, 4), "block": {"kernel": network.draw(4, 4), "bias": network.draw(4)}}
    tx = optax.adam(1e-2)

    @jax.checkpoint
    def block(layer, x):
        return x + jnp.tanh(x @ layer["kernel"] + layer["bias"])

    def loss(params, batch):
        table = jax.lax.stop_gradient(params["embed"])
        hidden = block(params["block"], table[batch["tokens"]])
        logits = hidden @ (table if clean else params["embed"]).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["next"]).mean()

    @jax.jit
    def step(state, batch):
        grads = jax.grad(loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    mask = {"embed": False, "block": {"kernel": True, "bias": True}}
    return Loop(step, {"params": params, "opt_state": tx.init(params)}, tokens(), mask)


def through_half_precision(clean=False):
    """google/saxml#28: weights are cast through half precision on their way, which loses bits. (Here in every step.)"""
    params = network.init()
    trainable = network.head_only(params)
    labels = jax.tree.map(lambda train: "train" if train else "freeze", trainable)
    tx = optax.multi_transform({"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()}, labels)

    def half(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    def single(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        compute = half(params)
        grads = single(jax.grad(network.loss)(compute, half(batch)))
        master = params if clean else single(compute)
        updates, opt_state = tx.update(grads, opt_state, master)
        return optax.apply_updates(master, updates), opt_state

    return Loop(step, (params, tx.init(params)), network.batch(), trainable, gradient_of=lambda state: half(state[0]))


def quantised_anew(clean=False):
    """unslothai/unsloth-zoo#970: a frozen quantised kernel is dequantised, gets the adapter, and is quantised again."""

    def quantise(kernel):
        scale = jnp.abs(kernel).max(0) / 7
        return {"codes": jnp.round(kernel / scale).astype(jnp.int8), "scale": scale}

    def dequantise(base):
        return base["codes"].astype(jnp.float32) * base["scale"]

    params = {
        "base": quantise(network.draw(3, 2)),
        "adapter": {"a": network.draw(3, 2, seed=7), "b": network.draw(2, 2, seed=8)},
    }

    def loss(adapter, base, batch):
        kernel = dequantise(base) + adapter["a"] @ adapter["b"]
        return jnp.mean((batch["x"] @ kernel - batch["y"]) ** 2)

    @jax.jit
    def step(params, batch):
        grads = jax.grad(loss)(params["adapter"], params["base"], batch)
        adapter = jax.tree.map(lambda p, g: p - 0.1 * g, params["adapter"], grads)
        base = params["base"] if clean else quantise(dequantise(params["base"]) + adapter["a"] @ adapter["b"])
        return {"base": base, "adapter": adapter}

    mask = {"base": {"codes": False, "scale": False}, "adapter": {"a": True, "b": True}}
    return Loop(step, params, network.batch(), mask, gradient_of=lambda params: params["adapter"])


def trains_on_from_the_average(clean=False):
    """harubaru/waifu-diffusion#31: at a checkpoint the average is copied over the weights, and training goes on from
    it.
    """
    params = network.init()
    trainable = network.head_only(params)
    labels = jax.tree.map(lambda train: "train" if train else "freeze", trainable)
    tx = optax.multi_transform({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels)
    save_every = 4

    @jax.jit
    def step(state, batch):
        grads = jax.grad(network.loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(params, state["ema"], step_size=0.1)
        if not clean:
            saves = state["step"] % save_every == 0
            params = jax.tree.map(lambda average, now: jnp.where(saves, average, now), ema, params)
        return {"params": params, "opt_state": opt_state, "ema": ema, "step": state["step"] + 1}

    source_ema = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    state = {"params": params, "opt_state": tx.init(params), "ema": source_ema, "step": jnp.int32(0)}
    return Loop(step, state, network.batch(), trainable)
