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
LOOP, LINEN, NNX, LORA, EQUINOX, NNX_OPTIMIZER, ORBAX, NNX_ORBAX, STACKED = CODE
RECIPES = (LINEN, NNX, EQUINOX)
WORDS = ("flax.linen", "nnx", "equinox")
# A large eps, since the gradient of a key's bias in attention is nothing but rounding, which Adam would blow up.
TX = optax.adamw(1e-2, weight_decay=0.1, eps=1e-3)


@pytest.fixture(scope="module", params=RECIPES, ids=WORDS)
def recipe(request):
    """The names that a recipe leaves, and as `seen` the parameters after each phase under TX."""
    scope: dict = {}
    exec(LOOP, scope)
    before, _, after = request.param.partition("\nphases = ")
    exec(before, scope)
    scope["first_rest"] = scope.get("rest")
    exec(f"phases = {after}", scope)
    loss, start, first_rest, phases = (scope[name] for name in ("loss", "start", "first_rest", "phases"))
    ends = [scope["train"](loss, start, first_rest, phases[: i + 1], TX) for i in range(len(phases))]
    scope["seen"] = [named(params) for params, _ in ends]
    return scope


def named(tree):
    return {path: np.asarray(leaf) for path, leaf in paths.items(tree)}


def by_hand(loss, params, rest, phases):
    """Each leaf with an AdamW of its own, made when it is freed: no masks in it."""
    structure, leaves = jax.tree.structure(params), named(params)
    states = {}
    gradient, updated = jax.jit(jax.grad(loss, has_aux=True)), jax.jit(TX.update)
    for steps, mask in phases:
        trained = {path for path, trains in named(mask).items() if trains}
        states = {path: states.get(path, TX.init(leaves[path])) for path in trained}
        for _ in range(steps):
            whole, rest = gradient(jax.tree.unflatten(structure, [leaves[path] for path in leaves]), rest)
            gradients = named(whole)
            for path in trained:
                update, states[path] = updated(gradients[path], states[path], leaves[path])
                leaves[path] = leaves[path] + update
    return leaves


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_there_are_the_three():
    for word, text in (("nnx.Optimizer(", NNX_OPTIMIZER), ("orbax", ORBAX), ("nn.scan", STACKED), ("adapt", LORA)):
        assert word in text
    assert all(word in text for word, text in zip(WORDS, RECIPES, strict=True))


def test_phases_give_what_an_optimizer_for_each_leaf_gives(recipe):
    expected = by_hand(*(recipe[name] for name in ("loss", "start", "first_rest", "phases")))
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
    loss, start, params, rest = (recipe[name] for name in ("loss", "start", "params", "rest"))
    after, _ = loss(params, rest)
    assert after < loss(start, rest)[0]
    if "network" in recipe:
        each = recipe["network"] if "nnx" in recipe else jax.vmap(recipe["network"])
        np.testing.assert_allclose(np.square(each(recipe["x"]) - recipe["x"][:, :1]).mean(), after, rtol=1e-5)


def state_of_nnx(rest):
    return {path: np.asarray(jax.random.key_data(leaf) if "key" in path else leaf) for path, leaf in paths.items(rest)}


def test_dropout_and_statistics_of_an_nnx_module_move_in_each_step_and_no_parameter_is_among_them():
    assert "Dropout(0.5" in NNX and "BatchNorm" in NNX
    scope: dict = {}
    exec(LOOP, scope)
    before_training, _, training = NNX.partition("\nphases = ")
    exec(before_training, scope)
    loss, params, before = (scope[name] for name in ("loss", "params", "rest"))
    (first, once), (again, _) = loss(params, before), loss(params, before)
    assert first == again != loss(params, once)[0]  # a pure function: dropout turns on the rest alone
    exec(f"phases = {training}", scope)
    (start, end), steps = map(state_of_nnx, (before, scope["rest"])), sum(steps for steps, _ in scope["phases"])
    assert (
        set(start) == set(end) == {f"{n}/value" for n in ("drop/rngs/count", "drop/rngs/key", "norm/mean", "norm/var")}
    )
    assert (start["drop/rngs/count/value"], end["drop/rngs/count/value"]) == (0, steps)
    assert all((start[f"norm/{name}/value"] != end[f"norm/{name}/value"]).all() for name in ("mean", "var"))
    network = scope["network"]
    network.eval()
    assert bits(network(scope["x"])) == bits(network(scope["x"]))


def test_a_frozen_norm_of_nnx_keeps_its_statistics_in_evaluation_mode_alone():
    """The norm is frozen in the first of the recipe's phases."""
    ends = []
    for mode in ("", "network.norm.eval()\n"):
        scope: dict = {}
        exec(LOOP, scope)
        exec(NNX.replace("graph, params, rest = nnx.split(", f"{mode}graph, params, rest = nnx.split("), scope)
        _, rest = scope["train"](scope["loss"], scope["start"], scope["rest"], scope["phases"][:1], TX)
        ends.append(rest["norm"]["mean"][...])
    assert (ends[0] != 0).all() and (ends[1] == 0).all()


def test_lora_trains_factors_and_a_new_head_and_merges_into_an_ordinary_module():
    from flax import nnx

    from tljax.strategies import lora

    scope: dict = {}
    exec(LOOP, scope)
    exec(NNX, scope)
    before = scope["rest"]
    exec(LORA, scope)
    start, end = named(scope["adapted"]), named(scope["tuned"])
    moved = {path for path in start if start[path].tobytes() != end[path].tobytes()}
    assert moved == {"head/bias", "head/kernel", "hidden/lora_a", "hidden/lora_b"}
    assert moved == {path for path, trains in named(scope["mask"]).items() if trains}
    merged = named(nnx.to_pure_dict(nnx.state(scope["network"], nnx.Param)))
    assert set(merged) == set(named(nnx.to_pure_dict(scope["params"])))
    difference = (4.0 / 2) * end["hidden/lora_a"] @ end["hidden/lora_b"]
    np.testing.assert_allclose(merged["hidden/kernel"], start["hidden/kernel"] + difference, rtol=1e-5, atol=1e-6)
    count = "drop/rngs/count/value"
    assert state_of_nnx(scope["rest"])[count] == state_of_nnx(before)[count] + 5
    with pytest.raises(ValueError, match=r"context.fresh .* is of the tree that adapt gave"):
        unadapted = masks.under(nnx.to_pure_dict(scope["params"]), "head")
        lora.strategy(scope["adapted"], scope["context"]._replace(fresh=unadapted), rank=2)


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
    scope["tx"] = scope["optimizer"].masked(optax.adamw(1e-2), lambda params: masks.by_path(params, lambda path: True))
    with pytest.raises(ValueError, match=r"[Ss]tructure"):  # a template of another phase
        scope["restore"](tmp_path / "state")


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
    assert scope["loss"](scope["params"], None)[0] < scope["loss"](scope["start"], None)[0]
    masks.lint(scope["params"], scope["rates"])
