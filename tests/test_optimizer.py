"""Optimizers: frozen leaves keep their bytes and own no state, whatever the optimizer."""

import itertools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tljax import masks, optimizer, optimizers, paths, schedules
from tljax.strategies import bias_only, head_only, lp_ft, random_mask
from tljax.types import Context, InputError

PARAMS = {
    "a": np.array([[1.0, -2.0]], np.float32),
    "b": np.array([-0.0, 3.0, np.nan], np.float32),
    "steps": np.int32(7),
}
MASK = {"a": True, "b": False, "steps": True}
GRADIENTS = {"a": np.array([[0.5, 0.25]], np.float32), "b": np.full(3, 1e6, np.float32), "steps": np.int32(0)}
NAMES = ("sgd", "adam", "adamw", "lion", "rmsprop", "adagrad", "adafactor")


def steps(tx, params, gradients, count=3):
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(("name", "clip"), [*itertools.product(NAMES, (0.0, 1.0))])
def test_frozen_leaves_keep_their_bytes_under_decay_and_clipping(name, clip):
    spec, numbers = optimizers.spec(name, weight_decay=1.0, clip=clip)
    tx = optimizer.masked(optimizers.build(spec, 0.1, numbers), MASK)
    after, state = steps(tx, PARAMS, GRADIENTS)
    for leaf in ("b", "steps"):
        assert np.asarray(after[leaf]).tobytes() == PARAMS[leaf].tobytes()
    assert not np.array_equal(after["a"], PARAMS["a"])
    assert all("b" not in path.split("/") and "steps" not in path.split("/") for path in paths.names(state))


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_part_moves_as_if_the_frozen_one_did_not_exist(name):
    spec, numbers = optimizers.spec(name, weight_decay=0.1, clip=0.01)
    tx = optimizers.build(spec, 0.1, numbers)
    alone, _ = steps(tx, {"a": PARAMS["a"]}, {"a": GRADIENTS["a"]})
    beside, _ = steps(optimizer.masked(tx, MASK), PARAMS, GRADIENTS)
    np.testing.assert_array_equal(alone["a"], beside["a"])


def test_a_number_scales_the_update():
    tx = optimizer.masked(optax.sgd(1.0), {"a": 0.25, "b": True, "steps": False})
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["a"], -0.25 * GRADIENTS["a"])


def test_an_array_selects_elements_even_past_nan_gradients():
    params, gradient = {"w": np.array([-0.0, 2.0], np.float32)}, {"w": np.array([np.nan, 1.0], np.float32)}
    tx = optimizer.masked(optax.adamw(0.1, weight_decay=1.0), {"w": np.array([False, True])})
    after, state = steps(tx, params, gradient)
    assert np.asarray(after["w"])[:1].tobytes() == params["w"][:1].tobytes()
    assert np.isfinite(after["w"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones(2, bool), "does not broadcast"),
        (np.ones((2, 1, 3), bool), "does not broadcast"),
        (-0.5, "number at 'w' is -0.5"),
        (float("inf"), "number at 'w' is inf"),
        ("yes", "leaf at 'w' is 'yes'"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(leaf, message):
    with pytest.raises(InputError, match=message):
        optimizer.masked(optax.sgd(1.0), {"w": leaf, "b": True}).init({"w": jnp.ones((1, 3)), "b": jnp.ones(2)})


def test_gradients_with_holes_give_the_same_updates_with_holes():
    tx = optimizer.masked(optax.adam(0.1), MASK)
    state = tx.init(PARAMS)
    whole, _ = tx.update(GRADIENTS, state, PARAMS)
    holed, _ = tx.update(masks.split(GRADIENTS, MASK)[0], state, masks.split(PARAMS, MASK)[0])
    np.testing.assert_array_equal(whole["a"], holed["a"])
    assert holed["b"] is None


def test_adam_under_head_only_holds_two_moments_of_the_head_and_a_counter():
    params = {"hidden_0": {"kernel": np.ones((784, 512))}, "head": {"kernel": np.ones((512, 10)), "bias": np.ones(10)}}
    state = optimizer.masked(optax.adam(0.1), masks.under(params, "head")).init(params)
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(state)]
    assert sum(size for size in sizes if size > 1) == 2 * 5130
    assert sizes.count(1) <= 1


def test_decay_of_sgd_is_the_gradient_of_the_l2_penalty():
    spec, numbers = optimizers.spec("sgd", weight_decay=0.5)
    tx = optimizers.build(spec, 0.1, numbers)
    params = {"w": jnp.array([2.0])}
    updates, _ = tx.update({"w": jnp.array([1.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * (1.0 + 0.5 * 2.0)], rtol=1e-6)


def test_decay_of_adamw_is_off_unless_asked_for():
    params, gradient = {"w": np.array([5.0], np.float32)}, {"w": np.array([0.0], np.float32)}
    spec, numbers = optimizers.spec("adamw")
    after, _ = steps(optimizers.build(spec, 0.1, numbers), params, gradient)
    np.testing.assert_array_equal(after["w"], params["w"])


STACKED = {
    "blocks": {
        "attention": {"query": {"kernel": np.ones((2, 4, 2, 2)), "bias": np.ones((2, 2, 2))}},
        "LayerNorm_0": {"scale": np.ones((2, 4)), "bias": np.ones((2, 4))},
        "mlp": {"kernel": np.ones((2, 4, 4)), "lora_a": np.ones((2, 4, 1)), "lora_b": np.ones((2, 1, 4))},
    },
    "pos_embedding": np.ones((1, 5, 4)),
    "cls_token": np.ones((1, 1, 4)),
    "tokens": {"embedding": np.ones((9, 4))},
    "head": {"kernel": np.ones((4, 3)), "bias": np.ones(3)},
}
"""Blocks that are stacked on one another: their biases and scales have two axes and more."""


def test_kernels_decay_and_biases_norms_and_positions_do_not_stacked_or_not():
    decaying = [path for path, decay in paths.items(optimizers.decays("kernels", STACKED)) if decay]
    mlp = ["blocks/mlp/kernel", "blocks/mlp/lora_a", "blocks/mlp/lora_b"]
    assert decaying == ["blocks/attention/query/kernel", *mlp, "head/kernel", "tokens/embedding"]


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "lars", "sgd", "adafactor:weight_decay_rate=0.5"])
def test_a_leaf_without_decay_moves_as_without_decay_and_one_with_it_as_with_it(name):
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.array([3.0, 1.0]), "still": jnp.ones(2)}
    mask, gradients = {"kernel": True, "bias": True, "still": False}, jax.tree.map(jnp.ones_like, params)
    plain, decaying = name.partition(":")[0], 0.0 if ":" in name else 0.5

    def after(name, decay, rule):
        spec, numbers = optimizers.spec(name, weight_decay=decay, decay=rule)
        return steps(optimizer.masked(optimizers.build(spec, 0.1, numbers), mask), params, gradients)[0]

    by_rule, with_decay, without = (
        after(name, decaying, "kernel"),
        after(name, decaying, "all"),
        after(plain, 0.0, "all"),
    )
    np.testing.assert_array_equal(by_rule["kernel"], with_decay["kernel"])
    np.testing.assert_array_equal(by_rule["bias"], without["bias"])
    assert not np.array_equal(with_decay["bias"], without["bias"])


def test_decay_by_rule_equals_the_recursion_when_a_leaf_is_freed_later():
    """AdamW, algorithm 2 of arXiv:1711.05101, in NumPy; the kernel of b is freed after two steps, as a cohort."""
    rate, decay, b1, b2, eps = 0.1, 0.5, 0.9, 0.999, 1e-8
    params = {n: {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([0.5])} for n in "ab"}
    first = {"a": {"kernel": True, "bias": True}, "b": {"kernel": False, "bias": False}}
    second = {"a": {"kernel": True, "bias": True}, "b": {"kernel": True, "bias": True}}
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), params)
    spec, numbers = optimizers.spec("adamw", weight_decay=decay, decay="auto")
    tx, freed = optimizers.build(spec, rate, numbers), masks.since(first, second)
    state, after = optimizer.masked(tx, first).init(params), params
    for number in range(4):
        if number == 2:
            state = optimizer.carry(tx, (first, None), (second, freed), state, after)
        masked = optimizer.masked(tx, second, freed) if number > 1 else optimizer.masked(tx, first)
        updates, state = masked.update(gradients, state, after)
        after = optimizer.apply(after, updates, second if number > 1 else first)
    for name, count in (("a", 4), ("b", 2)):
        for leaf, factor in (("kernel", decay), ("bias", 0.0)):
            w, m, v = np.asarray(params[name][leaf], np.float64), 0.0, 0.0
            for t in range(1, count + 1):
                m, v = b1 * m + (1 - b1) * 0.3, b2 * v + (1 - b2) * 0.3**2
                w = w - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + factor * w)
            np.testing.assert_allclose(after[name][leaf], w, atol=1e-5)


def test_a_rule_of_decay_that_cannot_be_meant_is_refused():
    with pytest.raises(
        InputError, match=r"decay=\*\*/bias,kernel/\*: pattern 'kernel/\*' matches no leaf; nearest: 'head/kernel'"
    ):
        optimizers.require_decay("**/bias,kernel/*", {"head": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}})
    with pytest.raises(InputError, match="decay=kernels: no leaf is a kernel, among 'w': give globs, or all"):
        optimizers.require_decay("kernels", {"w": np.ones(2)})
    with pytest.raises(InputError, match="decay=kernels: the decay of optimizer 'novograd' touches every leaf"):
        optimizers.spec("novograd", weight_decay=0.1, decay="kernels")
    with pytest.raises(InputError, match=r"pattern '\*\*/\{a': a brace is not closed"):
        optimizers.spec("sgd", decay="**/{a")
    assert optimizers.spec("novograd", weight_decay=0.1, decay="auto")[0].decay == "all"


def test_momentum_equals_the_recursion():
    spec, numbers = optimizers.spec("sgd", momentum=0.9)
    after, _ = steps(optimizers.build(spec, 0.1, numbers), {"w": np.array([0.0])}, {"w": np.array([1.0])}, count=3)
    velocity, w = 0.0, 0.0
    for _ in range(3):
        velocity = 0.9 * velocity + 1.0
        w -= 0.1 * velocity
    np.testing.assert_allclose(after["w"], [w], rtol=1e-6)


def test_every_offered_optimizer_takes_a_step():
    for name in optimizers.names():
        spec, numbers = optimizers.spec(name)
        tx = optimizer.masked(optimizers.build(spec, 0.1, numbers), {"a": True, "b": False})
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
        updates, _ = tx.update(
            {"a": jnp.ones((2, 2)), "b": None}, tx.init(params), masks.split(params, {"a": True, "b": False})[0]
        )
        assert np.isfinite(updates["a"]).all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adm"}, "unknown optimizer 'adm'; nearest: 'adam'"),
        ({"name": "adam:b3=1"}, "has no option 'b3'"),
        ({"name": "adam", "momentum": 0.9}, "takes none"),
        ({"name": "sgd:momentum=0.9", "momentum": 0.9}, "sets the momentum too"),
        ({"name": "sgd", "clip": -1.0}, "clip=-1.0"),
        ({"name": "sgd", "weight_decay": float("inf")}, "weight_decay=inf"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        optimizers.spec(**arguments)


def test_schedules_equal_their_formulas():
    t = np.arange(90)
    cosine = schedules.rates("cosine", 0.5, 0.1, 100)
    np.testing.assert_allclose(cosine[:10], 0.5 * np.arange(10) / 10, atol=1e-6)
    np.testing.assert_allclose(cosine[10:], 0.25 * (1 + np.cos(np.pi * t / 90)), atol=1e-6)
    np.testing.assert_allclose(schedules.rates("linear", 2.0, 0.0, 90), 2 * (1 - t / 90), atol=1e-6)
    assert (schedules.rates("constant", 0.25, 0.0, 5) == 0.25).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosin", 0.1, 0.0, 9), "unknown schedule 'cosin'; nearest: 'cosine'"),
        (("constant", -0.1, 0.0, 9), "learning_rate=-0.1"),
        (("constant", float("nan"), 0.0, 9), "learning_rate=nan"),
        (("constant", 0.1, 1.0, 9), "warmup=1.0"),
    ],
)
def test_schedules_refuse_what_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        schedules.rates(*arguments)


RATES = np.array([[0.1], [0.0], [0.5], [2.0]])
WIDE = {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2) - 3}


@pytest.mark.parametrize("rates", [RATES, jnp.asarray(RATES, jnp.bfloat16), (RATES * 10).astype(int)])
@pytest.mark.parametrize("jit", [False, True])
def test_an_array_of_floats_scales_each_element_and_its_zero_freezes(rates, jit):
    """Against Adam written out: the update of each element times its rate."""
    mask, gradient = {"w": rates}, {"w": np.array([[1.0, -2], [np.nan, np.inf], [3, 4], [-5, 6]], np.float32)}
    tx = optimizer.masked(optax.adam(0.1), mask)
    after, state, first = WIDE, tx.init(WIDE), np.zeros((4, 2))
    update = jax.jit(tx.update) if jit else tx.update
    mu, nu = np.zeros((4, 2)), np.zeros((4, 2))
    g = np.where(RATES != 0, gradient["w"], 0.0)
    for step in (1, 2):
        updates, state = update(gradient, state, after)
        after = optimizer.apply(after, updates, mask)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        first -= np.asarray(rates, float) * 0.1 * (mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(after["w"], WIDE["w"] + first, rtol=1e-5, atol=5e-5)
    assert np.asarray(after["w"])[1].tobytes() == WIDE["w"][1].tobytes()


def test_zeros_and_ones_of_any_type_mean_what_bools_mean():
    gradient = {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2) + 1}
    bools = RATES > 0.2
    seen = []
    for m in (bools, bools.astype(np.float32), bools.astype(int), jnp.asarray(bools)):
        tx = optimizer.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), {"w": m})
        after, state = steps(tx, WIDE, gradient)
        seen.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((after, state))])
    assert all(bits == seen[0] for bits in seen)
    numbers, plain = (
        optimizer.masked(optax.adam(0.1), {"w": m}).update(
            gradient, optimizer.masked(optax.adam(0.1), {"w": m}).init(WIDE)
        )[0]["w"]
        for m in (np.ones((4, 2)), True)
    )
    assert np.asarray(numbers).tobytes() == np.asarray(plain).tobytes()


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
def test_a_rate_in_an_array_that_cannot_be_is_refused_before_anything_trains(value):
    tx = optimizer.masked(optax.sgd(1.0), {"w": np.full((4, 2), value)})
    for attempt in (lambda: tx.init(WIDE), lambda: tx.update(WIDE, optax.EmptyState(), WIDE)):
        with pytest.raises(InputError, match=r"array at 'w' has the number .*: it must be finite and at least 0"):
            attempt()


def test_a_traced_rate_of_zero_freezes():
    params = {"a": np.array([-0.0, 1.0], np.float32), "b": np.ones(2, np.float32)}
    gradient = {"a": np.array([np.inf, np.nan], np.float32), "b": np.ones(2, np.float32)}

    def step(rate, params):
        mask = {"a": rate, "b": True}
        tx = optimizer.masked(optax.sgd(1.0), mask)
        return optimizer.apply(params, tx.update(gradient, tx.init(params), params)[0], mask)

    after = jax.jit(step)(0.0, params)
    assert np.asarray(after["a"]).tobytes() == params["a"].tobytes()
    assert after["b"].tolist() == [0, 0]


PAYLOAD = np.array([0x7FC00123, 0x80000000, 0x3F800000], np.uint32).view(np.float32)
"""A NaN that carries bits, -0.0 and 1.0."""


def test_apply_leaves_a_frozen_leaf_the_array_that_went_in():
    params = {"a": jnp.ones(3), "b": PAYLOAD.copy(), "c": PAYLOAD.copy(), "steps": np.int32(7), "hole": None}
    mask = {"a": True, "b": False, "c": np.array([False, False, True]), "steps": True, "hole": True}
    float0 = np.zeros((), jax.dtypes.float0)
    updates = {"a": jnp.ones(3), "b": jnp.full(3, jnp.nan), "c": jnp.full(3, jnp.nan), "steps": float0, "hole": None}
    after = optimizer.apply(params, updates, mask)
    assert after["b"] is params["b"] and after["steps"] is params["steps"] and after["hole"] is None
    assert np.asarray(after["c"])[:2].tobytes() == PAYLOAD[:2].tobytes() and np.isnan(after["c"][2])
    assert after["a"].tolist() == [2, 2, 2]
    jitted = jax.jit(lambda params, updates: optimizer.apply(params, updates, mask))
    again = jitted({**params, "steps": jnp.int32(7)}, {**updates, "steps": jnp.int32(0)})
    for name in ("a", "b", "c"):
        assert np.asarray(again[name]).tobytes() == np.asarray(after[name]).tobytes()


def test_apply_takes_the_updates_of_the_trained_part_and_asks_for_each():
    params, mask = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": True, "b": False}
    assert optimizer.apply(params, {"a": jnp.ones(2), "b": None}, mask)["a"].tolist() == [2, 2]
    trained = optimizer.apply({"a": jnp.ones(2), "b": None}, {"a": jnp.ones(2), "b": None}, mask)
    assert trained["a"].tolist() == [2, 2] and trained["b"] is None
    with pytest.raises(InputError, match="'b' trains and has no update"):
        optimizer.apply(params, {"a": jnp.ones(2), "b": None}, {"a": True, "b": True})
    with pytest.raises(InputError, match="'c' only in the updates"):
        optimizer.apply(params, {"a": jnp.ones(2), "c": jnp.ones(2)}, mask)
    half = optimizer.apply({"a": jnp.ones(2, jnp.bfloat16)}, {"a": jnp.ones(2)}, {"a": True})
    assert half["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.1)),
        lambda tx: optax.contrib.schedule_free(tx, 0.1),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.chain(tx, optax.ema(0.9)),
    ],
    ids=["decay", "schedule_free", "MultiSteps", "ema"],
)
def test_apply_keeps_frozen_leaves_under_wrappers_outside_masked(wrap):
    params, mask = {"a": jnp.array([-0.0, 2.0]), "b": jnp.ones(2)}, {"a": False, "b": True}
    tx = wrap(optimizer.masked(optax.adam(0.1), mask))
    after, state = params, tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, after)
        after = optimizer.apply(after, updates, mask)
    assert after["a"] is params["a"] and (after["b"] != params["b"]).all()


TREE = {"body": {"kernel": jnp.ones((2, 2)), "bias": -jnp.zeros(2)}, "head": {"kernel": jnp.ones((2, 2))}}


def test_a_function_of_the_parameters_is_a_mask_and_so_is_a_strategy():
    context = Context(stages=("body", "head"), key=jax.random.key(0))
    rules = {
        "head": lambda params: masks.under(params, "head"),
        "by size": lambda params: masks.by_size(params, at_most=2),
        "a strategy": bias_only.strategy,
        "one of stages": lambda params: head_only.strategy(params, context),
        "elements": lambda params: random_mask.strategy(params, context, fraction=0.5),
    }
    for name, rule in rules.items():
        mask = rule(TREE, Context()) if name == "a strategy" else rule(TREE)
        seen = []
        for m in (mask, rule):
            tx = optimizer.masked(optax.adam(0.1), m)
            updates, state = jax.jit(tx.update)(TREE, tx.init(TREE), TREE)
            seen.append(optimizer.apply(TREE, updates, m if m is mask else mask))
            assert jax.tree.structure(state) == jax.tree.structure(optimizer.masked(optax.adam(0.1), mask).init(TREE))
        assert jax.tree.all(jax.tree.map(np.array_equal, *seen)), name
    assert optimizer.apply(TREE, TREE, rules["head"])["body"]["kernel"] is TREE["body"]["kernel"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda params: masks.top(params, 0.5), "fails on the shapes of the parameters .*: a mask that follows from"),
        (lambda params: jax.tree.map(lambda leaf: bool(leaf.sum() > 0), params), "a mask that follows from values"),
        (lambda params: lp_ft.strategy(params, Context(("body", "head"))), "gives phases"),
        (lambda params: {"head": True}, "only in the parameters"),
        (lambda params: "head", "only in the"),
        (head_only.strategy, "head_only needs stages: give path prefixes"),
    ],
)
def test_a_function_that_gives_no_mask_of_the_tree_is_refused(rule, message):
    with pytest.raises(InputError, match=message):
        optimizer.masked(optax.sgd(1.0), rule).init(TREE)


BOXES = {
    "nnx.State": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "nn.Partitioned": lambda tree: jax.tree.map(lambda leaf: nn.Partitioned(leaf, ("x",)), tree),
    "FrozenDict": flax.core.freeze,
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("boxed_mask", [False, True])
def test_the_mask_fits_whether_or_not_leaves_are_wrapped(box, boxed_mask):
    """As callers do it that wrap leaves for `init` and not for `update`, or the other way round."""
    mask = masks.under(box(TREE) if boxed_mask else TREE, "head")
    tx = optimizer.masked(optax.sgd(1.0), mask)
    tx.init(box(TREE))
    state = tx.init(TREE)
    updates, _ = tx.update(TREE, state, TREE)
    assert updates["head"]["kernel"].tolist() == [[-1, -1], [-1, -1]]
    assert np.signbit(updates["body"]["bias"]).all()
    assert optimizer.apply(TREE, updates, mask)["body"]["bias"] is TREE["body"]["bias"]


def test_nnx_optimizer_goes_on_over_two_cohorts():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
            self.frozen = nnx.Param(jnp.array([-0.0]))

    network = Network(nnx.Rngs(0))
    first, second = (masks.under(nnx.state(network, nnx.Param), names) for names in (["head"], ["head", "hidden"]))
    trainer = nnx.Optimizer(
        network, optimizer.masked(optax.adamw(0.1, weight_decay=0.1), second, masks.since(first, second)), wrt=nnx.Param
    )
    before = np.asarray(network.hidden.kernel[...])

    @nnx.jit
    def step(network, trainer):
        trainer.update(network, nnx.grad(lambda net: jnp.square(net.head(net.hidden(jnp.ones((2, 3))))).sum())(network))

    step(network, trainer)
    assert (np.asarray(network.hidden.kernel[...]) != before).all()
    assert np.asarray(network.frozen[...]).tobytes() == np.array([-0.0], np.float32).tobytes()


HEAD = masks.under(TREE, "head")
KERNELS = {"body": {"kernel": True, "bias": False}, "head": {"kernel": True}}
SCALES = jax.tree.map(lambda leaf: 0.5, TREE)


def scaled(by):
    """Per-parameter rates, of a tree or of a function of the tree."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, s: u * s, updates, by(updates)))


@pytest.mark.parametrize(
    "tx",
    [
        scaled(lambda tree: SCALES),
        optax.chain(optax.adam(0.1), scaled(lambda tree: SCALES)),
        optax.GradientTransformation(lambda tree: jax.tree.map(lambda p, s: p * s, tree, SCALES), None),
    ],
    ids=["rates", "chained", "in init"],
)
def test_a_tree_of_all_parameters_inside_the_optimizer_is_refused_with_the_remedy(tx):
    def step(mask):
        masked = optimizer.masked(tx, mask)
        return jax.jit(masked.update)(TREE, masked.init(TREE), TREE)

    with pytest.raises(InputError, match="give a function of the tree"):
        step(HEAD)


def summed(noise):
    return jax.tree.map(lambda u, n: u + n, *noise)


ADDED = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), lambda u, state, params=None, *, noise: (summed((u, noise[0])), state)
)


@pytest.mark.parametrize("ages", [None, masks.since(HEAD, KERNELS)], ids=["one cohort", "two"])
@pytest.mark.parametrize(
    "tx",
    [optax.adamw(0.1), optax.stateless(lambda u, params: summed((u, params)))],
    ids=["adamw", "somebody's"],
)
@pytest.mark.parametrize("mask", [HEAD, KERNELS, jax.tree.map(lambda leaf: True, TREE)])
def test_an_update_without_the_parameters_that_it_needs_is_told_so(tx, mask, ages):
    masked = optimizer.masked(tx, mask, ages and jax.tree.map(lambda a: max(a, 0), ages))
    whole, part = TREE, masks.split(TREE, mask)[0]
    for gradients in (whole, part):
        for update in (masked.update, jax.jit(masked.update)):
            with pytest.raises(
                InputError, match=r"update is called without params.*tx.update\(gradients, state, params"
            ):
                update(gradients, masked.init(TREE))


@pytest.mark.parametrize(
    ("tx", "extra", "kind", "text"),
    [
        (ADDED, {"noise": [TREE]}, InputError, "extra argument 'noise' is not a tree like the parameters"),
        (ADDED, {}, TypeError, "missing 1 required keyword-only argument: 'noise'"),
        (optax.lbfgs(), {}, TypeError, "'value_fn'"),
    ],
)
def test_a_failing_update_is_told_its_own_cause(tx, extra, kind, text):
    masked = optimizer.masked(tx, HEAD)
    with pytest.raises(kind, match=text):
        masked.update(TREE, masked.init(TREE), TREE, **extra)


def test_what_fails_for_its_values_or_its_state_keeps_its_exception():
    full = MemoryError("no room")

    def init(params):
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
            raise full
        return optax.EmptyState()

    with pytest.raises(MemoryError, match="no room"):
        optimizer.masked(optax.GradientTransformation(init, optax.sgd(0.1).update), HEAD).init(TREE)
    masked = optimizer.masked(optax.trace(0.9), HEAD)
    other = masked.init(jax.tree.map(lambda leaf: jnp.ones((5, *leaf.shape, 7)), TREE))
    with pytest.raises(Exception) as failed:
        masked.update(TREE, other, TREE)
    assert "inside `masked`" not in str(failed.value)


@pytest.mark.parametrize(
    ("tree", "function"),
    [
        (
            optax.adamw(0.1, weight_decay=0.5, mask=KERNELS),
            optax.adamw(0.1, weight_decay=0.5, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
        ),
        (
            optax.multi_transform({True: optax.adam(0.1), False: optax.sgd(0.1)}, KERNELS),
            optax.multi_transform(
                {True: optax.adam(0.1), False: optax.sgd(0.1)},
                lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
            ),
        ),
        (scaled(lambda tree: SCALES), scaled(lambda tree: jax.tree.map(lambda leaf: 0.5, tree))),
    ],
    ids=["decay mask", "labels", "rates"],
)
def test_a_function_of_the_tree_does_what_a_tree_was_meant_to_do(tree, function):
    mask = masks.under(TREE, ["head", "body/bias"])
    masked = optimizer.masked(function, mask)
    updates, _ = masked.update(TREE, masked.init(TREE), TREE)
    whole, _ = tree.update(TREE, tree.init(TREE), TREE)
    for trained, expected in zip(*(jax.tree.leaves(masks.split(u, mask)[0]) for u in (updates, whole)), strict=True):
        np.testing.assert_allclose(trained, expected, rtol=1e-6)


def kernels_of(tree):
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, tree)


OF_TREES = {
    "decay mask": lambda form: optax.adamw(0.1, weight_decay=0.5, mask=form),
    "labels": lambda form: optax.multi_transform({True: optax.adam(0.1), False: optax.adam(0.2)}, form),
    "masked clip": lambda form: optax.chain(optax.masked(optax.clip_by_global_norm(0.1), form), optax.sgd(0.1)),
}


def trained_in_phases(tx, *phases):
    params, before, state = TREE, None, None
    for mask in phases:
        after = (mask, masks.since(*phases[: phases.index(mask) + 1]))
        masked = optimizer.masked(tx, *after)
        state = optimizer.carry(tx, before, after, state, params) if before else masked.init(params)
        for _ in range(2):
            updates, state = masked.update(jax.tree.map(lambda leaf: leaf + 0.5, params), state, params)
            params = optimizer.apply(params, updates, mask)
        before = after
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("transformation", OF_TREES.values(), ids=OF_TREES)
@pytest.mark.parametrize("mask", [HEAD, masks.under(TREE, ["head", "body/bias"])], ids=["head", "and a bias"])
def test_labels_and_masks_of_optax_that_are_trees_of_all_parameters_give_what_functions_do(transformation, mask):
    by_tree, by_function = (trained_in_phases(transformation(form), mask) for form in (kernels_of(TREE), kernels_of))
    assert by_tree == by_function


def test_a_decay_mask_may_be_a_tree_in_phases_too_and_labels_of_a_state_may_not():
    phases = (HEAD, masks.by_path(TREE, lambda path: True))
    decay, labels, _ = OF_TREES.values()
    assert trained_in_phases(decay(kernels_of(TREE)), *phases) == trained_in_phases(decay(kernels_of), *phases)
    assert trained_in_phases(labels(kernels_of), *phases)
    with pytest.raises(InputError, match=r"has labels, or a mask, that are a tree of all .* phases: give a function"):
        trained_in_phases(labels(kernels_of(TREE)), *phases)


@pytest.mark.parametrize(
    ("wrap", "moves"),
    [
        (lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.1)), {1: True, 2: True}),
        (lambda tx: optax.contrib.schedule_free(tx, 0.01), {1: True}),
        (lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), {0: True, 1: False, 2: False}),
    ],
    ids=["decay", "schedule_free", "MultiSteps"],
)
def test_what_stands_outside_may_move_frozen_elements_under_apply_updates(wrap, moves):
    """As the page has it: all by decay, some by rounding, and of a sum of micro-steps -0.0 alone."""
    params = {"a": jnp.array([-0.0, 0.7853982, 2.0]), "b": jnp.ones(2)}
    tx = wrap(optimizer.masked(optax.adam(0.1), {"a": False, "b": True}))
    after, state = params, tx.init(params)
    for _ in range(8):
        updates, state = tx.update(params, state, after)
        after = optax.apply_updates(after, updates)
    for i, moved in moves.items():
        assert (np.asarray(after["a"][i]).tobytes() != np.asarray(params["a"][i]).tobytes()) == moved, i


def test_what_an_optimizer_raises_of_its_own_is_raised():
    def fails(params):
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        optimizer.masked(optax.GradientTransformation(fails, None), HEAD).init(TREE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tx", "holes"),
    [(optax.lbfgs(), False), (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)), True)],
)
def test_line_searches_are_given_the_whole_tree_and_search_the_trained_part(tx, holes):
    """The same as on the head alone, with the body a constant."""

    def loss(params):
        return jnp.square(
            jnp.tanh(params["body"]["kernel"] + params["body"]["bias"][None]) @ params["head"]["kernel"] - 1
        ).sum()

    params, masked = TREE, optimizer.masked(tx, HEAD)
    alone, state, alone_state = {"kernel": TREE["head"]["kernel"]}, masked.init(TREE), tx.init(TREE["head"])
    for _ in range(4):
        value, gradient = jax.value_and_grad(loss)(params)
        part = masks.split(gradient, HEAD)[0] if holes else gradient
        updates, state = masked.update(part, state, params, value=value, grad=part, value_fn=loss)
        params = optimizer.apply(params, updates, HEAD)
        of_head = lambda head: loss({**TREE, "head": head})  # noqa: E731
        value, gradient = jax.value_and_grad(of_head)(alone)
        updates, alone_state = tx.update(gradient, alone_state, alone, value=value, grad=gradient, value_fn=of_head)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_allclose(params["head"]["kernel"], alone["kernel"], rtol=1e-6)
    assert loss(params) < loss(TREE)


@pytest.mark.parametrize("cohorts", [1, 2])
def test_tree_map_params_passes_through(cohorts):
    freed = masks.since(HEAD, masks.by_path(TREE, lambda path: True)) if cohorts == 2 else None
    mask = HEAD if cohorts == 1 else masks.by_path(TREE, lambda path: True)
    tx = optimizer.masked(optax.adam(0.1), mask, freed)
    state = tx.init(TREE)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 2, state, transform_non_params=lambda count: count - 1)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves(doubled)} == {2.0, -1.0}
    shapes = jax.eval_shape(lambda: TREE)
    beside = optax.tree.map_params(
        tx,
        lambda leaf, like: None if leaf is None else leaf.shape == like.shape,
        state,
        shapes,
        is_leaf=lambda leaf: leaf is None,
        transform_non_params=lambda count: True,
    )
    assert all(jax.tree.leaves(beside)) and len(jax.tree.leaves(beside)) == len(jax.tree.leaves(state))


def test_evaluation_parameters_are_made_of_the_part_that_trains():
    tx = optimizer.masked(optax.contrib.schedule_free_adamw(0.1), HEAD)
    params, state = TREE, tx.init(TREE)
    for _ in range(3):
        updates, state = tx.update(TREE, state, params)
        params = optimizer.apply(params, updates, HEAD)
    trained, frozen = masks.split(params, HEAD)
    evaluated = masks.join(optax.contrib.schedule_free_eval_params(state, trained), frozen)
    assert evaluated["body"]["kernel"] is TREE["body"]["kernel"]
    expected = (params["head"]["kernel"] - (1 - state.b1) * state.z["head"]["kernel"]) / state.b1
    np.testing.assert_allclose(evaluated["head"]["kernel"], expected, rtol=1e-6)


DONATED = {
    "adam": optax.adam(0.1),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "prodigy": optax.contrib.prodigy(),
    "multisteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("tx", DONATED.values(), ids=DONATED)
def test_parameters_and_state_of_several_cohorts_can_be_donated(tx):
    """No buffer is in two places: three cohorts at once, and two that begin at one boundary."""
    third = masks.by_path(TREE, lambda path: True)
    second = masks.under(TREE, ["head", "body/kernel"])
    history = [(HEAD, None), (second, masks.since(HEAD, second)), (third, masks.since(HEAD, second, third))]
    params = jax.tree.map(jnp.array, TREE)
    masked = optimizer.masked(tx, *history[-1])
    skipped = optimizer.carry(tx, history[0], history[-1], optimizer.masked(tx, HEAD).init(params), params)
    for state in (masked.init(params), skipped):
        arrays = [leaf for leaf in jax.tree.leaves((params, state)) if isinstance(leaf, jax.Array)]
        assert len({leaf.unsafe_buffer_pointer() for leaf in arrays}) == len(arrays)


def test_what_masks_since_gives_is_no_argument_of_jit_and_is_of_the_same_tree():
    second = masks.by_path(TREE, lambda path: True)
    freed = masks.since(HEAD, second)
    with pytest.raises(InputError, match=r"`freed` are traced.*outside jax\.jit"):
        jax.jit(lambda freed: optimizer.masked(optax.adam(0.1), second, freed).init(TREE))(freed)
    with pytest.raises(InputError, match="`freed` and the parameters are different trees: 'body/bias'"):
        optimizer.masked(optax.adam(0.1), second, {"head": {"kernel": 1}}).init(TREE)
