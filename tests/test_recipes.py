"""The recipes of tljax/strategies/README.md: masks, optimizers and phases mean the same in a loop of one's own."""

import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tljax import masks, paths

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parent.parent / "tljax/strategies/README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT.partition("## The masks in a training loop")[2], re.S)
LOOP, *RECIPES = CODE
WORDS = ("flax.linen", "nnx", "equinox")
# A large eps, since the gradient of a key's bias in attention is nothing but rounding, which Adam would blow up.
TX = optax.adamw(1e-2, weight_decay=0.1, eps=1e-3)


@pytest.fixture(scope="module", params=RECIPES, ids=WORDS)
def recipe(request):
    """The names that a recipe leaves, and as `seen` the parameters after each phase under TX."""
    scope: dict = {}
    exec(LOOP, scope)
    exec(request.param, scope)
    loss, start, phases = scope["loss"], scope["start"], scope["phases"]
    scope["seen"] = [named(scope["train"](loss, start, phases[: i + 1], TX)) for i in range(len(phases))]
    return scope


def named(tree):
    return {path: np.asarray(leaf) for path, leaf in paths.items(tree)}


def by_hand(loss, params, phases):
    """Each leaf with an AdamW of its own, made when it is freed: no masks in it."""
    structure, leaves = jax.tree.structure(params), named(params)
    states = {}
    gradient, updated = jax.jit(jax.grad(loss)), jax.jit(TX.update)
    for steps, mask in phases:
        trained = {path for path, trains in named(mask).items() if trains}
        states = {path: states.get(path, TX.init(leaves[path])) for path in trained}
        for _ in range(steps):
            gradients = named(gradient(jax.tree.unflatten(structure, [leaves[path] for path in leaves])))
            for path in trained:
                update, states[path] = updated(gradients[path], states[path], leaves[path])
                leaves[path] = leaves[path] + update
    return leaves


def test_there_are_the_three():
    assert len(RECIPES) == 3
    assert all(word in text for word, text in zip(WORDS, RECIPES, strict=True))


def test_phases_give_what_an_optimizer_for_each_leaf_gives(recipe):
    expected = by_hand(recipe["loss"], recipe["start"], recipe["phases"])
    for path, leaf in recipe["seen"][-1].items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_frozen_leaves_keep_their_bytes_and_trained_ones_move_in_every_phase(recipe):
    assert len(recipe["phases"]) > 1
    seen = [named(recipe["start"]), *recipe["seen"]]
    for (_, mask), before, after in zip(recipe["phases"], seen, seen[1:], strict=False):
        for path, trains in named(mask).items():
            assert (before[path].tobytes() != after[path].tobytes()) == bool(trains), path


def test_masks_are_trees_like_the_parameters_of_the_leaves_meant(recipe):
    for _, mask in recipe["phases"]:
        masks.lint(recipe["params"], mask)
    head = {path for path, trains in named(recipe["phases"][0][1]).items() if trains}
    assert head in (
        {"head/kernel", "head/bias"},
        {"head/kernel/value", "head/bias/value"},
        {"layers/2/weight", "layers/2/bias"},
    )


def test_the_loss_falls_and_the_module_works_after(recipe):
    loss, start, params = (recipe[name] for name in ("loss", "start", "params"))
    assert loss(params) < loss(start)
    if "network" in recipe:
        each = recipe["network"] if "nnx" in recipe else jax.vmap(recipe["network"])
        np.testing.assert_allclose(np.square(each(recipe["x"]) - recipe["x"][:, :1]).mean(), loss(params), rtol=1e-5)
