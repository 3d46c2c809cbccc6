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
LOOP, *RECIPES, NNX_OPTIMIZER, ORBAX, NNX_ORBAX, STACKED = CODE
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


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_there_are_the_three():
    assert len(RECIPES) == 3
    for word, text in (("nnx.Optimizer(", NNX_OPTIMIZER), ("orbax", ORBAX), ("nn.scan", STACKED)):
        assert word in text
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


def test_nnx_optimizer_trains_the_leaves_meant_and_no_running_statistic():
    from flax import nnx

    scope: dict = {}
    exec(NNX_OPTIMIZER, scope)
    start, network = scope["Network"](nnx.Rngs(1)), scope["network"]
    assert bits(nnx.state(network.hidden)) == bits(nnx.state(start.hidden))
    for part in ("norm", "head"):
        before, after = (nnx.state(getattr(net, part), nnx.Param) for net in (start, network))
        assert all(a != b for a, b in zip(bits(before), bits(after), strict=True))
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(scope["trainer"].opt_state)) if leaf.ndim)
    assert held == 2 * (8 + 8 + 8 + 1)  # Adam's two moments of scale, bias and the head


def test_a_train_state_goes_on_from_orbax_with_the_same_bits(tmp_path):
    scope: dict = {}
    exec(ORBAX, scope)
    state = scope["create"]()
    for done in range(6):
        if done == 3:
            scope["save"](tmp_path / "state", state)
        state = scope["step"](state)
    again = scope["restore"](tmp_path / "state")
    assert int(again.step) == 3
    for _ in range(3):
        again = scope["step"](again)
    assert bits(again) == bits(state)
    assert bits(again.params["layers_0"]) == bits(scope["params"]["layers_0"])
    assert bits(again.params["layers_2"]) != bits(scope["params"]["layers_2"])


def test_an_nnx_module_goes_on_from_orbax_with_the_same_bits_and_the_same_dropout(tmp_path):
    scope: dict = {}
    exec(NNX_ORBAX, scope)
    network, trainer = scope["create"]()
    start = scope["arrays"](scope["nnx"].state((network, trainer)))
    for done in range(6):
        if done == 3:
            scope["save"](tmp_path / "state", network, trainer)
        scope["step"](network, trainer)
    again = scope["restore"](tmp_path / "state")
    assert int(again[1].step[...]) == 3
    for _ in range(3):
        scope["step"](*again)
    end, other = (scope["arrays"](scope["nnx"].state(pair)) for pair in ((network, trainer), again))
    assert bits(end) == bits(other) and len(end) == len(start) > 15
    moved = {path for path in start if bits(start[path]) != bits(end[path])}
    assert not any(path.startswith("0/hidden") for path in moved)  # frozen
    assert {"0/norm/mean/value", "0/drop/rngs/count/value", "0/head/kernel/value"} <= moved
    # With other random numbers, or running statistics that are not taken up, it would not be the same.
    third = scope["restore"](tmp_path / "state")
    third[0].drop.rngs.count[...] = 0
    scope["step"](*third)
    fourth = scope["restore"](tmp_path / "state")
    scope["step"](*fourth)
    assert bits(scope["nnx"].state(third[0].head)) != bits(scope["nnx"].state(fourth[0].head))


def test_stacked_layers_are_freed_one_after_another_and_the_others_keep_their_bytes():
    scope: dict = {}
    exec(LOOP, scope)
    exec(STACKED, scope)
    for path, leaf in named(scope["params"]).items():
        before = named(scope["start"])[path]
        if path.startswith("blocks"):
            moved = [a.tobytes() != b.tobytes() for a, b in zip(before, leaf, strict=True)]
            assert moved == [False] * 4 + [True] * 2, path
    assert scope["loss"](scope["params"]) < scope["loss"](scope["start"])
    masks.lint(scope["params"], scope["rates"])
