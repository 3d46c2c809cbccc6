"""Low-rank changes of kernels: a stage that contracts with them as they are gives what a merged kernel gives."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.runs import plan
from tljax import initialization, low_rank, masks, models, objective, optimizers, paths, plugins, train
from tljax.data import draw
from tljax.low_rank import LowRank
from tljax.models import linen
from tljax.models import nnx as nnx_stages
from tljax.strategies import lora
from tljax.train import flops
from tljax.types import Context, InputError, Stage

RNG = np.random.default_rng(0)
slow = partial(pytest.param, marks=pytest.mark.slow)
TOKENS, IMAGES = RNG.normal(size=(3, 5, 8)), RNG.normal(size=(3, 8, 7, 4))
VIT = "vit:width=16:depth=2:patch=7:heads=2"


class Wrapped(nn.Module):
    """A block within one of Flax's transformations, and a dense layer after it."""

    lift: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(self.lift(Block)(name="block")(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="dense")(y)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="dense")(x), None


class Stacked(nn.Module):
    """Three layers, of stacked parameters or of one set."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        how = {"variable_broadcast": "params"} if self.shared else {"variable_axes": {"params": 0}}
        layers = nn.scan(Layer, split_rngs={"params": not self.shared}, length=3, **how)
        return nn.Dense(3, name="last")(layers(name="layers")(x, None)[0])


class Tripled(nn.Dense):
    """A subclass may do anything with its kernel."""

    def __call__(self, x):
        return 3 * super().__call__(x)


class Pair(nn.Module):
    first: object
    second: object

    def __call__(self, x):
        return self.second(self.first(x))


def conv(features=8, size=(3, 2), **how):
    return nn.Conv(features, size, **how)


CASES = {
    "dense": (nn.Dense(6), TOKENS, {"kernel": 1}),
    "attention": (nn.MultiHeadDotProductAttention(2), TOKENS, {"query/kernel": 1, "out/kernel": 2}),
    "two axes to two": (nn.DenseGeneral((2, 3), axis=(-2, -1)), IMAGES, {"kernel": 2}),
    "head in bfloat16": (linen.linear_head(3, jnp.bfloat16), TOKENS, {"kernel": 1}),
    "convolution": (conv(), IMAGES, {"kernel": 3}),
    "strided": (conv(strides=2, padding="VALID"), IMAGES, {"kernel": 3}),
    "dilated": (conv(kernel_dilation=2, padding=((1, 2), (0, 1))), IMAGES, {"kernel": 3}),
    "of dilated inputs": (conv(input_dilation=(2, 1), padding=((2, 2), (0, 1))), IMAGES, {"kernel": 3}),
    "circular": (conv(padding="CIRCULAR"), IMAGES, {"kernel": 3}),
    "causal": (nn.Conv(6, (3,), padding="CAUSAL"), TOKENS, {"kernel": 2}),
    "two groups": (conv(32, feature_group_count=2, strides=(1, 2)), IMAGES, {"kernel": 3}),
    "two groups merged": (conv(4, feature_group_count=2), IMAGES, {"kernel": 3}),
    "depthwise": (conv(4, feature_group_count=4), IMAGES, {"kernel": 3}),
    "remat": (Wrapped(nn.remat), TOKENS, {"block/attention/out/kernel": 2, "block/dense/kernel": 1}),
    "jit": (Wrapped(nn.jit), TOKENS, {"block/attention/out/kernel": 2, "block/dense/kernel": 1}),
    "stacked": (Stacked(), TOKENS, {"layers/dense/kernel": 0, "last/kernel": 1}),
    "one for three": (Stacked(shared=True), TOKENS, {"layers/dense/kernel": 1, "last/kernel": 1}),
    "masked": (conv(mask=RNG.integers(0, 2, (3, 2, 4, 8))), IMAGES, {"kernel": None}),
    "subclass": (Pair(Tripled(4), nn.Dense(3)), TOKENS, {"first/kernel": None, "second/kernel": 1}),
    "batched": (nn.DenseGeneral(2, batch_dims=0), TOKENS, {"kernel": None}),
}


QUICK = ("attention", "two groups", "depthwise", "stacked")


WITHOUT_GAIN = [(case, False) if case in QUICK else slow(case, False) for case in CASES]
WITH_GAIN = [slow(case, True) for case in ("dense", "strided", "two groups", "depthwise", "remat")]


@pytest.mark.parametrize(("case", "has_gain"), [*WITHOUT_GAIN, ("attention", True), *WITH_GAIN])
def test_a_contraction_by_factors_equals_a_merged_kernel_and_so_do_its_gradients(case, has_gain):
    """Every kernel gets factors, however the module uses it; the merged one comes from NumPy, to plain Flax."""
    module, inputs, expected = CASES[case]
    with jax.enable_x64(True):
        x, stage = jnp.asarray(inputs), linen.stage("layer", module)
        params, _ = stage.init(jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), params)
        contracted = {}
        stage.apply(params, {}, x, contracted=contracted)
        assert {path: contracted.get(path) for path in expected} == expected
        kernels = {path: leaf for path, leaf in paths.items(params) if path.endswith("kernel")}
        factors = {}
        for path, kernel in kernels.items():
            count = contracted.get(path) or kernel.ndim - 1
            shapes = [(*kernel.shape[:count], 2), (2, *kernel.shape[count:])]
            shapes += [kernel.shape[count:]] if has_gain else []
            factors[path] = tuple(jnp.asarray(0.3 * RNG.normal(size=shape)) for shape in shapes)

        def by_factors(factors):
            changed = {path: LowRank(kernels[path], *factors[path]) for path in factors}
            return jnp.sin(stage.apply(low_rank.placed(params, changed), {}, x)[0]).sum()

        def merged(factors):
            changed = {}
            for path, (a, b, *gain) in factors.items():
                change = jnp.einsum("ir,ro->io", *_flat(a, b)).reshape(kernels[path].shape)
                changed[path] = kernels[path] + change
                if gain:
                    changed[path] *= gain[0][(None,) * (change.ndim - gain[0].ndim)]
            return jnp.sin(module.apply({"params": low_rank.placed(params, changed)}, x)).sum()

        value, gradients = jax.jit(jax.value_and_grad(by_factors))(factors)
        wanted, of_merged = jax.value_and_grad(merged)(factors)
    tolerance = 0.05 if case == "head in bfloat16" else 1e-11
    np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance * 10)
    for path in factors:
        for got, want in zip(gradients[path], of_merged[path], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(), err_msg=path)


def _flat(a, b):
    return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)


def drawn_for(model, shape):
    """Variables in NumPy: a model's own draw takes longer to compile than all that is tried here."""
    rng = np.random.default_rng(3)
    scaled = lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(max(1, math.prod(leaf.shape[:-1])))).astype(np.float32)  # noqa: E731
    return jax.tree.map(scaled, models.abstract(model, shape))


def started(model, shape=(28, 28, 1), strategy="lora:rank=2"):
    """Where a fit of the strategy starts, with B other than zero."""
    drawn, contracted = drawn_for(model, shape), partial(models.contracted, model, shape)
    initial = initialization.Initialization(models.names(model), drawn, drawn, jax.random.key(1), contracted=contracted)
    start = initialization.start(*plugins.method(strategy), initial)
    rng = np.random.default_rng(4)

    def moved(path, leaf):
        return 0.3 * rng.normal(size=leaf.shape).astype(np.float32) if "lora_b" in path else np.asarray(leaf)

    return start._replace(params=paths.each(moved, start.params))


def built(name, **options):
    return models.build(name, 3, hidden=(8, 6), activation="relu", **options)


ATTENTION = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
IN_BLOCK = ATTENTION | {"mlp/expand/kernel", "mlp/project/kernel"}
ADAPTED = {
    VIT: {"embedding/patch/kernel"} | {f"block_{i}/{kernel}" for i in (0, 1) for kernel in IN_BLOCK},
    "cnn": {"conv_0/conv/kernel", "conv_1/conv/kernel", "dense/kernel"},
    "mlp": {"hidden_0/kernel", "hidden_1/kernel"},
}


@pytest.mark.parametrize("name", [VIT, slow("cnn"), "mlp"])
def test_lora_adapts_all_kernels_below_the_head_by_as_many_numbers_as_the_formula_says(name):
    """rank x (inputs + outputs) of each kernel: the product of its axes is that of both."""
    model = built(name)
    start = started(model)
    plain = dict(paths.items(models.abstract(model, (28, 28, 1))))
    factors = {path: leaf.shape for path, leaf in paths.items(start.params) if "lora" in path}
    assert {path.removesuffix("lora_a") + "kernel" for path in factors if path.endswith("a")} == ADAPTED[name]
    for path in ADAPTED[name]:
        out = math.prod(plain[path].shape[{True: 2, False: 1}["/out/" in path] if "attention" in path else -1 :])
        inputs = math.prod(plain[path].shape) // out
        a, b = (factors[path.removesuffix("kernel") + f"lora_{factor}"] for factor in "ab")
        assert math.prod(a) + math.prod(b) == 2 * (inputs + out) and a[-1] == b[0] == 2
    [(_, mask)] = start.phases
    rows = masks.table(start.params, mask)
    assert {row.path for row in rows if row.trained_size} == factors.keys() | {"head/bias", "head/kernel"}


@pytest.mark.parametrize("name", [*map(slow, (VIT, f"{VIT}:scan=true", "cnn")), "mlp"])
def test_a_model_of_low_rank_leaves_gives_what_its_merged_parameters_give(name):
    model = built(name)
    start, apply = started(model), jax.jit(partial(models.apply, model))
    x = np.random.default_rng(5).uniform(size=(4, 28, 28, 1)).astype(np.float32)
    outputs = {form: apply(getattr(start, form)(start.params), x) for form in ("factored", "merge")}
    np.testing.assert_allclose(outputs["factored"], outputs["merge"], rtol=0, atol=1e-5)
    assert np.abs(outputs["merge"] - apply(start.params, x)).max() > 0.01  # the change is no trifle
    assert start.applied is start.factored and not plan.merged(start)


def test_globs_choose_the_kernels_and_what_cannot_be_adapted_is_said():
    on = "block_*/attention/{query,value}/kernel+embedding/*/kernel"
    model = built(VIT)
    start = started(model, strategy=f"lora:rank=2:on={on}")
    adapted = {path.removesuffix("/lora_a") for path in paths.names(start.params) if path.endswith("lora_a")}
    attention = {f"block_{i}/attention/{name}" for i in (0, 1) for name in ("query", "value")}
    assert adapted == {"embedding/patch"} | attention
    context = Context(models.names(model), contracted=start.contracted)
    assert lora.left_out(start.params, context) == ["embedding/class_token", "embedding/position"]
    assert lora.left_out(start.params, context, on="embedding/*") == ["embedding/class_token", "embedding/position"]
    with pytest.raises(InputError, match=r"pattern 'hed/kernel' matches no leaf; nearest: 'head/kernel'"):
        lora.adapt(drawn_for(model, (28, 28, 1)), jax.random.key(0), context, on="hed/kernel")
    with pytest.raises(InputError, match=r"that on=head/kernel matches: there is nothing to adapt"):
        lora.adapt(drawn_for(model, (28, 28, 1)), jax.random.key(0), context, on="head/kernel")


def stacked_model(classes):
    return linen.stage("body", Stacked()), linen.stage("head", nn.Dense(classes), before=lambda x: x.mean(1))


def test_kernels_that_stack_layers_stay_frozen_since_no_layer_contracts_them_as_they_are():
    model = stacked_model(3)
    params = drawn_for(model, (5, 8))
    context = Context(models.names(model), contracted=models.contracted(model, (5, 8)))
    adapted = lora.adapt(params, jax.random.key(1), context)
    assert set(paths.names(adapted)) - set(paths.names(params)) == {"body/last/lora_a", "body/last/lora_b"}
    assert lora.left_out(params, context) == ["body/layers/dense/kernel"]


@pytest.mark.slow
def test_stages_that_know_no_factors_get_merged_kernels():
    """A function, and an NNX module: each is given what `merge` gives."""

    def apply(params, x, *, key=None):
        assert not low_rank.present(params)
        return x @ params["kernel"]

    model = (
        Stage("function", lambda key, x: {"kernel": jax.random.normal(key, (x.shape[-1], 5))}, apply),
        nnx_stages.stage("module", lambda rngs: nnx.Linear(5, 4, rngs=rngs)),
        linen.stage("flax", nn.Dense(6)),
        linen.stage("head", nn.Dense(3)),
    )
    start, x = started(model, (4,)), np.random.default_rng(6).normal(size=(2, 4)).astype(np.float32)
    params = start.params
    outputs = [models.apply(model, form(params), x) for form in (start.factored, start.merge)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5)
    assert plan.merged(start) == ["function/kernel", "module/kernel"]


@pytest.mark.counts
def test_factors_cost_half_of_what_a_merged_kernel_costs():
    """784-512-10 at batch 100: 80 MFLOP forwards, and as many again where the kernel has a gradient."""
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    start = started(model, strategy="lora:rank=4")
    [(_, mask)] = start.phases
    flops_by_form = {
        form: flops.step_flops(model, start.params, mask, (28, 28, 1), 100, getattr(start, form)) / 1e6
        for form in ("factored", "merge")
    }
    assert flops_by_form["factored"] < 90 and flops_by_form["merge"] > 160, flops_by_form


LABELS = jnp.asarray(RNG.integers(0, 3, 24).astype(np.int32))


def fitted(model, start, merge, execution=None, optimizer="sgd", seeds=(0,), shape=(6,), **changes):
    """The parameters of each fit after three steps at rate 0.1 of batches of eight, and the last state."""
    data = train.load(jnp.asarray(np.random.default_rng(1).normal(size=(24, *shape)).astype(np.float32)), LABELS)
    spec, numbers = optimizers.spec(optimizer)
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), spec, merge=merge, **changes)
    trials = [
        train.Fit(
            start.params,
            tuple((int(begin * 3), mask) for begin, mask in start.phases),
            partial(draw.order, seed, 24, 8, epochs=True),
            np.full(3, 0.1, np.float32),
            (),
            {**numbers, "label_smoothing": 0.0, **({"average_weight": 0.5} if changes.get("averages") else {})},
            jax.random.key(seed),
        )
        for seed in seeds
    ]
    *_, (state, _) = train.fit(spec, trials, data, [3], execution=execution or train.Execution())
    return state


@pytest.mark.parametrize(
    ("strategy", "gain", "ratio"),
    [("lora:rank=2:scale=3", 3 / 2, 1), ("lora:rank=2:scale=3:rank_stabilised=true:ratio=16", 3 / math.sqrt(2), 16)],
)
def test_steps_of_lora_equal_numpy(strategy, gain, ratio):
    """Softmax over (x (W + gain A B) + b) V + c, by hand: A at the rate 0.1, B at `ratio` times it, the head as A."""
    with jax.enable_x64(True):
        model = (linen.stage("hidden_0", nn.Dense(8)), linen.stage("head", nn.Dense(3)))
        start = started(model, (6,), strategy)
        start = start._replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float64), start.params))
        state, params = fitted(model, start, start.factored), start.params
    p = {path: np.array(leaf, np.float64) for path, leaf in paths.items(params)}
    images = np.random.default_rng(1).normal(size=(24, 6)).astype(np.float32).astype(np.float64)
    order = draw.order(0, 24, 8, 0, 3, epochs=True)
    rate = float(np.float32(0.1))
    for rows in order:
        x, y = images[rows], np.eye(3)[np.asarray(LABELS)[rows]]
        a, b, v = p["hidden_0/lora_a"], p["hidden_0/lora_b"], p["head/kernel"]
        hidden = x @ (p["hidden_0/kernel"] + gain * a @ b) + p["hidden_0/bias"]
        logits = hidden @ v + p["head/bias"]
        softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slope = (softmax - y) / 8
        back = slope @ v.T
        p["head/kernel"] = v - rate * hidden.T @ slope
        p["head/bias"] = p["head/bias"] - rate * slope.sum(0)
        p["hidden_0/lora_a"] = a - rate * gain * x.T @ back @ b.T
        p["hidden_0/lora_b"] = b - rate * ratio * gain * a.T @ x.T @ back
    for path, leaf in paths.items(state.params):
        np.testing.assert_allclose(leaf[0], p[path], rtol=0, atol=1e-12, err_msg=path)
    assert np.abs(p["hidden_0/lora_b"] - params["hidden_0"]["lora_b"]).max() > 1e-3


WAYS = {
    "vmap": {"execution": train.Execution(many="vmap"), "seeds": (0, 1, 2)},
    "microbatches": {"microbatch": 4},
    "average": {"averages": True, "optimizer": "adamw"},
    "remat": {"remat": ("hidden_1",)},
    "bfloat16": {"compute_dtype": "bfloat16"},
}


@pytest.mark.parametrize("way", [*map(slow, WAYS)])
def test_however_it_is_trained_factors_give_what_merged_kernels_give(way):
    changes = dict(WAYS[way])
    building = {key: changes.pop(key) for key in ("remat", "compute_dtype") if key in changes}
    model = built("mlp", **building)
    start = started(model, (6,), "lora:rank=2:ratio=2")
    by_factors, merged = (fitted(model, start, form, **changes) for form in (start.factored, start.merge))
    atol = 0.01 if way == "bfloat16" else 1e-5
    close = partial(np.testing.assert_allclose, rtol=0, atol=atol)
    for row in range(len(merged.fits)):
        jax.tree.map(close, by_factors.params_and_state(row), merged.params_and_state(row))
    if way == "average":
        jax.tree.map(close, by_factors.average.params, merged.average.params)
    moved = jax.tree.map(
        lambda after, before: np.abs(after - before).max(), merged.params_and_state(0)[0], start.params
    )
    assert moved["hidden_0"]["lora_a"] > 5e-4 and not moved["hidden_0"]["kernel"]
