"""Leaves that are to train and get no gradient, or an average that nobody updates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from planted.loops import Loop, network


def checkpoint_cuts_the_adapters(clean=False):
    """locuslab/open-unlearning#178: checkpointing differentiates only by its input, which is frozen: adapters get
    nothing.
    """
    params = {
        "embed": network.draw(3, 4),
        "block": {"kernel": network.draw(4, 4), "a": network.draw(4, 2), "b": jnp.zeros((2, 4))},
        "head": network.draw(4, 2),
    }

    def block(layer, x):
        return x + jnp.tanh(x @ layer["kernel"] + x @ layer["a"] @ layer["b"])

    @jax.custom_vjp
    def reentrant(layer, x):
        return block(layer, x)

    def forward(layer, x):
        return block(layer, x), (layer, x)

    def backward(saved, cotangent):
        layer, x = saved
        _, pull = jax.vjp(lambda x: block(layer, x), x)
        return jax.tree.map(jnp.zeros_like, layer), *pull(cotangent)

    reentrant.defvjp(forward, backward)
    checkpointed = jax.checkpoint(block) if clean else reentrant
    mask = {"embed": False, "block": {"kernel": False, "a": True, "b": True}, "head": True}
    labels = jax.tree.map(lambda train: "train" if train else "freeze", mask)
    tx = optax.multi_transform({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels)

    def loss(params, batch):
        hidden = checkpointed(params["block"], batch["x"] @ params["embed"])
        return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Loop(step, (params, tx.init(params)), network.batch(), mask)


class Encoder(eqx.Module):
    dense: eqx.nn.Linear

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class Captioner(eqx.Module):
    image: Encoder
    text: eqx.nn.Linear
    detaches: bool = eqx.field(static=True)

    def __call__(self, x):
        features = self.image(x)
        if self.detaches:
            features = jax.lax.stop_gradient(features)
        return self.text(features)


def extractor_detaches(clean=False):
    """lucidrains/CoCa-pytorch#6: the extractor detaches what it returns, so that the image encoder never trains."""
    keys = jax.random.split(jax.random.key(0))
    image, text = Encoder(eqx.nn.Linear(3, 4, key=keys[0])), eqx.nn.Linear(4, 2, key=keys[1])
    model = Captioner(image, text, detaches=not clean)
    tx = optax.adam(1e-2)

    def loss_fn(model, batch):
        return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

    @eqx.filter_jit
    def step(state, batch):
        model, opt_state = state
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, opt_state = tx.update(grads, opt_state, model)
        return (eqx.apply_updates(model, updates), opt_state), loss

    return Loop(step, (model, tx.init(model)), network.batch(), jax.tree.map(lambda _: True, model))


def both_factors_zero(clean=False):
    """Guitaricet/relora#18: both factors of the adapter begin at zero, so that each one's gradient is zero for good."""
    params = {
        "kernel": network.draw(3, 2),
        "lora": {"a": network.draw(3, 2, seed=5) if clean else jnp.zeros((3, 2)), "b": jnp.zeros((2, 2))},
        "bias": network.draw(2),
    }

    def loss(trained, kernel, batch):
        lora = trained["lora"]
        outputs = batch["x"] @ kernel + (batch["x"] @ lora["a"]) @ lora["b"] + trained["bias"]
        return jnp.mean((outputs - batch["y"]) ** 2)

    @jax.jit
    def step(params, batch):
        trained = {"lora": params["lora"], "bias": params["bias"]}
        grads = jax.grad(loss)(trained, params["kernel"], batch)
        return {**params, **jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads)}

    mask = {"kernel": False, "lora": {"a": True, "b": True}, "bias": True}
    return Loop(step, params, network.batch(), mask, gradient_of=lambda p: {"lora": p["lora"], "bias": p["bias"]})


def average_by_other_names(clean=False):
    """wandb/senpai#2899: the average looks leaves up by name, the compiled model's names have a prefix: it never
    moves.
    """
    params = network.init()
    trainable = network.head_only(params)
    labels = jax.tree.map(lambda train: "train" if train else "freeze", trainable)
    tx = optax.multi_transform({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels)

    def named(tree, prefix=""):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {prefix + jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    @jax.jit
    def step(state, batch):
        grads = jax.grad(network.loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = dict(state["ema"])
        for name, leaf in named(params, prefix="_compiled.").items():
            name = name.removeprefix("_compiled.") if clean else name
            if name in ema:
                ema[name] = 0.99 * ema[name] + 0.01 * leaf
        return {"params": params, "opt_state": opt_state, "ema": ema}

    trained = {name: leaf for name, leaf in named(params).items() if name.startswith("head")}
    state = {"params": params, "opt_state": tx.init(params), "ema": trained}
    mask = dict.fromkeys(trained, True)
    return Loop(step, state, network.batch(), mask, {"params": lambda state: state["ema"]})
