"""Optax's own ways to freeze, used wrongly and rightly: `(mask, clean) -> optimizer`, for `audit.optimizer`."""

import jax
import optax

FROZEN, TRAINED = "frozen", "trained"


def _inverted(mask):
    return jax.tree.map(lambda train: not train, mask)


def _labels(mask):
    return jax.tree.map(lambda train: TRAINED if train else FROZEN, mask)


def masked_alone(mask, clean=False):
    """`masked` hands on what its mask leaves out; `set_to_zero` has to cover that."""
    tx = optax.masked(optax.adam(1e-2), mask)
    return optax.chain(tx, optax.masked(optax.set_to_zero(), _inverted(mask))) if clean else tx


def decay_after_partition(mask, clean=False):
    """Decay that stands outside of `partition` reaches the frozen label too."""
    if clean:
        adamw = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-1e-2))
        return optax.partition({TRAINED: adamw, FROZEN: optax.set_to_zero()}, _labels(mask))
    frozen_out = optax.partition({TRAINED: optax.scale_by_adam(), FROZEN: optax.set_to_zero()}, _labels(mask))
    return optax.chain(frozen_out, optax.add_decayed_weights(0.1), optax.scale(-1e-2))


def freeze_comes_first(mask, clean=False):
    """`freeze` zeroes gradients where it stands first, and updates where it stands last. (Moments it keeps in both.)"""
    freeze = optax.freeze(_inverted(mask))
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    return optax.chain(adamw, freeze) if clean else optax.chain(freeze, adamw)


def freeze_of_what_trains(mask, clean=False):
    """True in the mask of `freeze` is what stands still; in that of `masked` it is what moves."""
    return optax.chain(optax.sgd(1e-2), optax.freeze(_inverted(mask) if clean else mask))


def clip_around_multi_transform(mask, clean=False):
    """A clip that stands outside of `multi_transform` has its norm of all gradients."""
    clip, adam = optax.clip_by_global_norm(1.0), optax.adam(1e-2)
    labels = _labels(mask)
    if clean:
        return optax.multi_transform({TRAINED: optax.chain(clip, adam), FROZEN: optax.set_to_zero()}, labels)
    return optax.chain(clip, optax.multi_transform({TRAINED: adam, FROZEN: optax.set_to_zero()}, labels))


MISUSES = (
    (masked_alone, (("frozen", "backbone"),)),
    (decay_after_partition, (("frozen", "backbone"),)),
    (freeze_comes_first, (("frozen", "backbone"),)),
    (freeze_of_what_trains, (("frozen", "backbone"), ("trains", "head"))),
    (clip_around_multi_transform, (("unseen", "backbone"),)),
)
