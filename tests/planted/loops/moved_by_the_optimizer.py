"""Frozen leaves that the optimizer moves: raw gradients, weight decay, moments that are left over."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from planted.loops import Loop, network


def masked_passes_gradients_through(clean=False):
    """google-deepmind/optax#159: where the mask of `masked` is False the gradient itself becomes the update."""
    params = network.init()
    trainable = network.head_only(params)
    tx = optax.masked(optax.sgd(0.1, momentum=0.9), trainable)
    if clean:
        frozen = jax.tree.map(lambda train: not train, trainable)
        tx = optax.chain(tx, optax.masked(optax.set_to_zero(), frozen))

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(network.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Loop(step, (params, tx.init(params)), network.batch(), trainable)


class Features(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4, name="dense")(x))


class Classifier(nn.Module):
    """A pretrained extractor, whose features are detached, and a new head."""

    detached: bool = True

    @nn.compact
    def __call__(self, x):
        features = Features(name="extractor")(x)
        if self.detached:
            features = jax.lax.stop_gradient(features)
        return nn.Dense(2, name="head")(features)


def _labels(params):
    return network.by_layer(params, lambda name: "freeze" if name == "extractor" else "train")


def _head(params):
    return jax.tree.map(lambda label: label == "train", _labels(params))


def optimizer_was_given_all_parameters(clean=False):
    """iamwangyabin/S-Prompts#2: the gradient of frozen weights is cut, but the optimizer has them all, and decays
    them.
    """
    model = Classifier()
    batch = network.batch()
    params = model.init(jax.random.key(0), batch["x"])["params"]
    tx = optax.adamw(1e-2, weight_decay=0.1)
    if clean:
        tx = optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, _labels(params))

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, batch["x"])
            return optax.l2_loss(logits, batch["y"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return Loop(train_step, state, batch, _head(params))


class Pair(eqx.Module):
    body: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x):
        return self.head(jax.nn.relu(self.body(x)))


def decay_after_zeroed_gradients(clean=False):
    """pytorch/pytorch#38581: a hook zeroes the gradient, and SGD's weight decay moves the weights all the same."""
    keys = jax.random.split(jax.random.key(0))
    model = Pair(eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1]))
    trainable = eqx.tree_at(
        lambda m: m.body, jax.tree.map(lambda _: True, model), jax.tree.map(lambda _: False, model.body)
    )
    decay = optax.add_decayed_weights(1e-2, mask=trainable if clean else None)
    tx = optax.chain(decay, optax.sgd(0.1))

    @eqx.filter_jit
    def make_step(model, opt_state, batch):
        def loss_fn(model):
            return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

        grads = jax.grad(loss_fn)(model)
        grads = eqx.tree_at(lambda g: (g.body.weight, g.body.bias), grads, replace_fn=jnp.zeros_like)
        updates, opt_state = tx.update(grads, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state

    def step(state, batch):
        model, opt_state = state
        return make_step(model, opt_state, batch)

    return Loop(step, (model, tx.init(model)), network.batch(), trainable)


def decay_moves_masked_elements(clean=False):
    """OPTML-Group/Unlearn-Saliency#32: the gradient is multiplied by a mask of elements, and decay moves the others."""
    params = network.init()
    salient = jax.tree.map(lambda leaf: abs(leaf) > 0.6, params)
    tx = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1))

    @jax.jit
    def unlearn(state, batch):
        params, opt_state = state
        grads = jax.grad(network.loss)(params, batch)
        grads = jax.tree.map(lambda g, m: g * m, grads, salient)
        updates, opt_state = tx.update(grads, opt_state, params)
        after = optax.apply_updates(params, updates)
        if clean:
            after = jax.tree.map(jnp.where, salient, after, params)
        return after, opt_state

    mask = jax.tree.map(lambda m: jax.device_get(m), salient)
    return Loop(unlearn, (params, tx.init(params)), network.batch(), mask)


def momentum_moves_pruned_elements(clean=False):
    """ruihangdu/PyTorch-Deep-Compression#2: pruned weights leave zero, by the momentum from before pruning."""
    tx = optax.sgd(0.05, momentum=0.9)

    def train_step(state, batch, keep=None):
        grads = jax.grad(network.loss)(state["params"], batch)
        if keep is not None:
            grads = jax.tree.map(jnp.multiply, grads, keep)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def prune(state, keep):
        def pruned(tree):
            return jax.tree.map(jnp.multiply, tree, keep)

        opt_state = (state["opt_state"][0]._replace(trace=pruned(state["opt_state"][0].trace)), *state["opt_state"][1:])
        return {"params": pruned(state["params"]), "opt_state": opt_state if clean else state["opt_state"]}

    params = network.init()
    keep = jax.tree.map(lambda leaf: (abs(leaf) > 0.5).astype(leaf.dtype), params)
    state = {"params": params, "opt_state": tx.init(params)}
    for _ in range(2):
        state = train_step(state, network.batch())
    mask = jax.tree.map(lambda m: jax.device_get(m).astype(bool), keep)
    return Loop(jax.jit(lambda state, batch: train_step(state, batch, keep)), prune(state, keep), network.batch(), mask)


def moments_left_over(clean=False):
    """facebookresearch/fairseq#4702: weights frozen in the middle of training go on moving. (By Adam's moments, as
    planted.)
    """
    model = Classifier(detached=False)
    batch = network.batch()
    params = model.init(jax.random.key(0), batch["x"])["params"]

    def train_step(state, batch, frozen=()):
        def loss_fn(params):
            return optax.l2_loss(state.apply_fn({"params": params}, batch["x"]), batch["y"]).mean()

        grads = jax.grad(loss_fn)(state.params)
        grads = {name: jax.tree.map(jnp.zeros_like, g) if name in frozen else g for name, g in grads.items()}
        return state.apply_gradients(grads=grads)

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))
    state = train_step(state, batch)
    if clean:
        state = TrainState.create(apply_fn=model.apply, params=state.params, tx=state.tx)
    return Loop(jax.jit(lambda state, batch: train_step(state, batch, ("extractor",))), state, batch, _head(params))


def decay_outside_of_multi_steps(clean=False):
    """keras-team/keras#19990: decay belongs to the real update, and is applied in every micro-step. (Here to all
    leaves.)
    """
    params = network.init()
    trainable = network.head_only(params)
    labels = jax.tree.map(lambda train: "train" if train else "freeze", trainable)
    adam = optax.adamw(1e-2, weight_decay=0.1) if clean else optax.adam(1e-2)
    accumulated = optax.MultiSteps(
        optax.multi_transform({"train": adam, "freeze": optax.set_to_zero()}, labels), every_k_schedule=4
    )
    tx = accumulated.gradient_transformation()
    if not clean:
        tx = optax.chain(tx, optax.add_decayed_weights(-1e-3))

    @jax.jit
    def micro_step(state, batch):
        grads = jax.grad(network.loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    return Loop(micro_step, {"params": params, "opt_state": tx.init(params)}, network.batch(), trainable)


def in_two_groups(clean=False):
    """speediedan/finetuning-scheduler#4: a parameter in two groups. (As planted: among the frozen, and among those that
    decay.)
    """
    params = network.init()
    trainable = network.head_only(params)
    labels = jax.tree.map(lambda train: "train" if train else "freeze", trainable)

    def decays(params):
        kernels = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        return jax.tree.map(lambda kernel, train: kernel and train, kernels, trainable) if clean else kernels

    tx = optax.chain(
        optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels),
        optax.add_decayed_weights(-1e-3, mask=decays),
    )

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return Loop(step, (params, tx.init(params)), network.batch(), trainable)


def optimizer_created_anew_each_epoch(clean=False):
    """FluxML/FluxTraining.jl#150: freezing is written into the optimizer's state, which each epoch begins anew."""
    params = network.init()
    groups = jax.tree.map(lambda train: "head" if train else "backbone", network.head_only(params))
    tx = optax.multi_transform(
        {name: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1) for name in ("backbone", "head")}, groups
    )
    steps_per_epoch = 5

    def freeze(opt_state, name):
        opt_state.inner_states[name].inner_state.hyperparams["learning_rate"] = jnp.float32(0)
        return opt_state

    @jax.jit
    def step(state, batch):
        opt_state = state["opt_state"]
        if not clean:
            begins = state["step"] % steps_per_epoch == 0
            opt_state = jax.lax.cond(begins, lambda: tx.init(state["params"]), lambda: opt_state)
        grads = jax.grad(network.loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, opt_state, state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}

    state = {"params": params, "opt_state": freeze(tx.init(params), "backbone"), "step": jnp.int32(0)}
    return Loop(step, state, network.batch(), network.head_only(params))
