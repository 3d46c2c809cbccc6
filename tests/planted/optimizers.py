"""Planted: three ways to freeze, `wrap(tx, mask)`, each wrong."""

import jax
import optax

from tljax import masks, optimizer


def optax_masked(tx, mask):
    """The raw gradient passes through where the mask is False."""
    return optax.masked(tx, mask)


def freeze_then(tx, mask):
    """Weight decay comes after the freezing, and moments are kept of everything."""
    return optax.chain(optax.freeze(masks.invert(mask)), tx)


def recompiles(tx, mask):
    """A log in the state grows with every step."""
    inner = optimizer.masked(tx, mask)

    def update(updates, state, params=None):
        inner_state, norms = state
        norm = optax.tree.norm(masks.split(updates, mask)[0])
        updates, inner_state = inner.update(updates, inner_state, params)
        return updates, (inner_state, (*norms, jax.numpy.asarray(norm)))

    return optax.GradientTransformation(lambda params: (inner.init(params), ()), update)
