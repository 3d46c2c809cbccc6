"""Weights that were to come from a checkpoint and did not, for `audit.restored`: `(clean) -> Load`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from planted.loops import network


class Load(NamedTuple):
    """What a loader was given and gave."""

    weights: Any
    loaded: Any
    plan: dict[str, str] | None
    """Which leaf comes from which; None where all come by their own names."""
    fresh: Any
    """The parameters before the load."""


def restores_the_layers_that_there_are(clean=False):
    """google/orbax#2972: a larger model is restored from the checkpoint of a smaller one, partly and without a word."""
    saved = {f"block_{layer}": {"kernel": network.draw(3, 3, seed=layer)} for layer in range(2)}
    model = {f"block_{layer}": {"kernel": network.draw(3, 3, seed=10 + layer)} for layer in range(2 if clean else 4)}
    return Load(saved, {name: saved.get(name, layer) for name, layer in model.items()}, None, model)


def unmatched_keys_stay_random(clean=False):
    """vllm-project/speculators#1131: keys that match nothing are a warning, and random weights are saved as
    converted.
    """
    saved = {"fc": {"kernel": network.draw(3, 4)}, "lm_head": {"kernel": network.draw(4, 2)}}
    model = {"fc": {"kernel": network.draw(3, 4, seed=9)}, "draft_head": {"kernel": network.draw(4, 2, seed=9)}}
    renamed = {"draft_head" if clean and name == "lm_head" else name: layer for name, layer in saved.items()}
    loaded = {name: renamed.get(name, layer) for name, layer in model.items()}
    return Load(saved, loaded, {"fc/kernel": "fc/kernel", "draft_head/kernel": "lm_head/kernel"}, model)


def missing_weights_are_zeros(clean=False):
    """AI-Hypercomputer/maxtext#4342: a weight that the checkpoint lacks is filled with zeros, and nobody is told."""
    saved = network.init() if clean else {"backbone": network.init()["backbone"]}
    model = jax.tree.map(lambda leaf: leaf + 1, network.init())
    loaded = {name: saved.get(name, jax.tree.map(jnp.zeros_like, layer)) for name, layer in model.items()}
    return Load(saved, loaded, None, model)


LOADS = (
    (restores_the_layers_that_there_are, ("block_2/kernel", "block_3/kernel")),
    (unmatched_keys_stay_random, ("draft_head/kernel",)),
    (missing_weights_are_zeros, ("head/bias", "head/kernel")),
)
