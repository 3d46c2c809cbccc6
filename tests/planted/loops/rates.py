"""Layer-wise rates without effect, or with another one than their author says."""

import jax
import jax.numpy as jnp
import optax

from planted.loops import Loop, network


def _loop(tx, mask):
    params = network.init()

    @jax.jit
    def step(state, batch):
        grads = jax.grad(network.loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    return Loop(step, {"params": params, "opt_state": tx.init(params)}, network.batch(), mask)


def _rates(backbone, head=1.0):
    return network.by_layer(network.init(), {"backbone": backbone, "head": head}.get)


def _scale(rates):
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates))


def unread_scales(clean=False, backbone=0.25):
    """huggingface/pytorch-image-models#2532: groups carry a scale of the rate that no optimizer reads."""
    rates = _rates(backbone)
    groups = [
        {"name": name, "params": layer, "lr_scale": rates[name]["kernel"]} for name, layer in network.init().items()
    ]
    labels = {group["name"]: group["name"] for group in groups}
    rate = 1e-2
    optimizers = {
        group["name"]: optax.adam(rate * group["lr_scale"] if clean else group.get("lr", rate)) for group in groups
    }
    return _loop(optax.multi_transform(optimizers, labels), rates)


def scale_before_adam(clean=False, backbone=0.25):
    """tensorflow/addons#969: rates as multiples of the gradient work with SGD; Adam divides them out again."""
    rates = _rates(backbone)
    adam = optax.adam(1e-2)
    return _loop(optax.chain(adam, _scale(rates)) if clean else optax.chain(_scale(rates), adam), rates)


def one_layer_too_deep(clean=False, backbone=0.5):
    """google-research/electra#51: layers are counted past one that is gone, so that each has the rate of the one
    below.
    """
    above = 1 if clean else 2
    depth = {"backbone": backbone**above, "head": 1.0}
    scales = network.by_layer(network.init(), depth.get)
    return _loop(optax.chain(optax.adam(1e-2), _scale(scales)), _rates(backbone))
