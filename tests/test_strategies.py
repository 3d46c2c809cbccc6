"""Strategies: each file of the folder, against expectations written by hand, on a model of three stages."""

import ast
import functools
import inspect
import re
from pathlib import Path

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tljax import masks, models, paths, plugins
from tljax.models import linen
from tljax.strategies import auto_rgn, lora, norm_only
from tljax.types import Context, InputError, MaskSchedule, Phase

NAMES = plugins.names("tljax.strategies", "strategy")
MODEL = models.build("mlp", 3, hidden=(5, 4), activation="relu")
PARAMS = jax.tree.map(np.asarray, models.init(MODEL, jax.random.key(0), (2, 2, 1)))
NORMS = {**PARAMS, "hidden_0": {**PARAMS["hidden_0"], "norm": {"scale": np.ones(5, np.float32), "bias": np.zeros(5)}}}
ATTENTION = {f"hidden_0/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
PROJECTIONS = {path.split("/")[2]: {"kernel": np.ones((5, 1, 5), np.float32)} for path in ATTENTION}
WITH_ATTENTION = {**PARAMS, "hidden_0": {**PARAMS["hidden_0"], "attention": PROJECTIONS}}
FRESH = masks.under(PARAMS, "head")
NOTHING = masks.invert(masks.by_path(PARAMS, lambda path: True))


def gradient(params):
    """A gradient made by hand: its values depend on the parameters and rise from leaf to leaf."""
    return paths.each(lambda path, leaf: 0.5 * leaf + 0.01 * len(path) + 0.001 * np.arange(leaf.shape[-1]), params)


def fisher(params):
    return jax.tree.map(np.square, gradient(params))


CONTEXT = Context(models.names(MODEL), PARAMS, FRESH, jax.random.key(1), gradient, fisher)

HEAD = {"head/bias", "head/kernel"}
ZERO = {"hidden_0/bias", "hidden_0/kernel"}
ONE = {"hidden_1/bias", "hidden_1/kernel"}
ALL = HEAD | ZERO | ONE
NORM = {"hidden_0/norm/scale", "hidden_0/norm/bias"}

TRAINED = {
    "scratch": ALL,
    "full": ALL,
    "wise_ft": ALL,
    "lines": ALL,
    "shrink_perturb": ALL,
    "random_features": HEAD,
    "head_only": HEAD,
    "last_k": HEAD,
    "last_k:k=2": HEAD | ONE,
    "last_k:k=3": ALL,
    "bias_only": HEAD | {"hidden_0/bias", "hidden_1/bias"},
    "stages": HEAD | ZERO,
    "stages:train=hidden_1": HEAD | ONE,
    "stages:train=hidden_0+head": HEAD | ZERO,
    "stages:redraw=above:copy=1": HEAD | ONE,
    "stages:redraw=above:copy=2": HEAD,
    "stages:redraw=above:copy=1:freeze=true": HEAD | ONE,
    "stages:redraw=above:copy=1:freeze=false": ALL,
    "stages:freeze=hidden_0": HEAD | ONE,
    "stages:freeze=hidden_0+hidden_1": HEAD,
    "norm_only": HEAD | NORM,
    "attention_only": HEAD | ATTENTION,
    "pattern": {"hidden_0/kernel", "hidden_1/kernel"} | HEAD,
    "pattern:train=hidden_0/*+**/bias": ZERO | {"hidden_1/bias"} | HEAD,
    "pattern:freeze=**/bias+hidden_1/*": HEAD | {"hidden_0/kernel"},
    "pattern:train=hidden_*/*:freeze=**/bias": HEAD | {"hidden_0/kernel", "hidden_1/kernel"},
    "lora": HEAD | {f"hidden_{i}/lora_{factor}" for i in (0, 1) for factor in "ab"},
    "dora": HEAD | {f"hidden_{i}/{leaf}" for i in (0, 1) for leaf in ("lora_a", "lora_b", "dora_magnitude")},
    "pissa": HEAD | {f"hidden_{i}/pissa_{factor}" for i in (0, 1) for factor in "ab"},
    "ssf": HEAD | {f"hidden_{i}/ssf_{leaf}" for i in (0, 1) for leaf in ("scale", "shift")},
}
"""What trains, by whole leaves."""

RATES = {
    "layerwise_decay": {"head": True, "hidden_1": 1 / 2.6, "hidden_0": 1 / 2.6**2},
    "layerwise_decay:decay=0.1": {"head": True, "hidden_1": 0.1, "hidden_0": 0.01},
    "layerwise_decay:decay=1": {"head": True, "hidden_1": 1.0, "hidden_0": 1.0},
    "layerwise_decay:decay=0.1:lowest=hidden_1": {"head": True, "hidden_1": 0.1, "hidden_0": False},
    "layerwise_decay:decay=0.1:lowest=hidden_0": {"head": True, "hidden_1": 0.1, "hidden_0": 0.01},
}
"""The number of every leaf of a stage."""

PHASES = {
    "lp_ft": [(0, HEAD), (0.5, ALL)],
    "wise_ft:probe=0.25": [(0, HEAD), (0.25, ALL)],
    "lp_ft:start=0.25": [(0, HEAD), (0.25, ALL)],
    "gradual_unfreeze": [(0, HEAD), (1 / 3, HEAD | ONE), (2 / 3, ALL)],
    "gradual_unfreeze:every=0.1": [(0, HEAD), (0.1, HEAD | ONE), (0.2, ALL)],
    "bottom_up": [(0, HEAD), (0.25, HEAD | ZERO), (0.5, HEAD | ONE), (0.75, ALL)],
}
"""Starts, and what trains from there."""

DATA_DRIVEN = {"auto_rgn", "gradient_mask", "fisher"}
ELEMENTS = {"gradient_mask", "fisher", "random_mask"}
"""What selects elements of the leaves that were kept."""


@functools.cache
def start(name):
    """(parameters, context) that the strategy starts from: adapted, and with norms or attention where it does not do
    without."""
    method, _ = plugins.method(name)
    params = {"norm_only": NORMS, "attention_only": WITH_ATTENTION}.get(name, PARAMS)
    if adapt := method.adapt:
        params = adapt(params, jax.random.key(2))
    known = leaves(FRESH)
    fresh = paths.each(
        lambda path, leaf: known.get(path, any(word in path for word in ("lora_", "dora_", "pissa_", "ssf_"))), params
    )
    return params, CONTEXT._replace(fresh=fresh)


def leaves(tree):
    return dict(paths.items(tree))


def trained(mask):
    return {path for path, m in leaves(mask).items() if masks.trains(m)}


def answer(text, **changed):
    """What the strategy returns."""
    method, options = plugins.method(text)
    params, context = start(text.split(":")[0])
    return method.strategy(params, context._replace(**changed), **options)


def evaluated(text, **changed):
    """[(start, mask)] of the strategy, its phases' strategies evaluated, linted."""
    params, context = start(text.split(":")[0])
    result = answer(text, **changed)
    phases = result if isinstance(result, list) else [Phase(0.0, result)]
    context = context._replace(**changed)
    all_phases = [
        Phase(phase.start, phase.mask(params, context) if masks.is_strategy(phase.mask) else phase.mask)
        for phase in phases
    ]
    masks.lint_phases(params, phases, context.fresh)
    masks.lint_phases(params, all_phases, context.fresh)
    # Of a mask that moves, what it may train.
    scopes = [phase.mask.scope if isinstance(phase.mask, MaskSchedule) else phase.mask for phase in all_phases]
    return [(phase.start, scope) for phase, scope in zip(all_phases, scopes, strict=True)]


@pytest.mark.parametrize("text", TRAINED)
def test_a_strategy_trains_just_these_leaves_whole(text):
    mask = answer(text)
    assert set(map(type, jax.tree.leaves(mask))) == {bool}
    assert trained(mask) == TRAINED[text]


@pytest.mark.parametrize("text", RATES)
def test_a_strategy_gives_each_stage_its_rate(text):
    for path, rate in leaves(answer(text)).items():
        assert rate == pytest.approx(RATES[text][path.split("/")[0]], rel=1e-12)


@pytest.mark.parametrize("text", PHASES)
def test_a_strategy_goes_through_these_phases(text):
    phases = evaluated(text)
    assert [begin for begin, _ in phases] == pytest.approx([begin for begin, _ in PHASES[text]])
    assert [trained(mask) for _, mask in phases] == [expected for _, expected in PHASES[text]]


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_runs_by_its_bare_name_and_has_a_source(name):
    assert all(trained(mask) for _, mask in evaluated(name))
    module = inspect.getmodule(plugins.method(name)[0].strategy)
    text = ast.get_docstring(ast.parse(inspect.getsource(module)))
    first, empty, source, *_ = text.split("\n")
    assert first.endswith(".") and not empty and source.startswith("Source: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_trains_what_is_fresh_in_every_phase(name):
    """Fresh here: the first bias and the head; what a reinit drew anew may stay frozen, for it was on purpose."""
    _, context = start(name)
    reinit = plugins.method(name)[0].reinit
    drawn = set(reinit(context)) - {"head"} if reinit and not plugins.takes(reinit, "params") else set()
    new = {"hidden_0/bias"} if "hidden_0" not in drawn else set()
    fresh = paths.each(lambda path, old: bool(old) or path in new, context.fresh)
    for _, mask in evaluated(name, fresh=fresh):
        assert HEAD | new <= trained(mask)
        assert all(m is True for path, m in leaves(mask).items() if leaves(fresh)[path])


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_needs_no_fresh_leaves(name):
    params, _ = start(name)
    nothing = jax.tree.map(lambda leaf: False, params)
    for (_, without), (_, none) in zip(evaluated(name, fresh=None), evaluated(name, fresh=nothing), strict=True):
        assert masks.equal(without, none)


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_is_pure(name):
    params, _ = start(name)
    before = jax.tree.map(np.array, params)
    first, two = evaluated(name), evaluated(name)
    assert [begin for begin, _ in first] == [begin for begin, _ in two]
    assert all(masks.equal(a, b) for (_, a), (_, b) in zip(first, two, strict=True))
    assert jax.tree.structure(before) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_gives_the_same_for_abstract_parameters_unless_it_says_that_it_is_driven_by_data(name):
    method, _ = plugins.method(name)
    if method.data_driven:
        return
    params, context = start(name)
    real = method.strategy(params, context)
    abstract = method.strategy(jax.eval_shape(lambda: params), context._replace(source_params=None))
    if isinstance(real, list | MaskSchedule):
        assert real == abstract
    else:
        assert masks.equal(real, abstract)


def test_these_say_that_they_look_at_data():
    assert {name for name in DATA_DRIVEN if plugins.method(name)[0].data_driven} == DATA_DRIVEN


LAYER = {"kernel": np.ones((4, 4), np.float32)}
ATTENTIONS = {
    "Flax": (
        {"attention": {"query": LAYER, "query_norm": {"scale": np.ones(4)}, "out": LAYER}, "mlp": LAYER},
        {"attention"},
    ),
    "timm": (
        {"attn.qkv.weight": np.ones((12, 4)), "attn.proj.weight": np.ones(4), "mlp.fc1.weight": np.ones(4)},
        {"attn"},
    ),
    "beside each other": ({"q": LAYER, "k": LAYER, "v": LAYER, "o": LAYER, "up": LAYER}, {*"qkvo"}),
    "Hugging Face": ({"self": {"attention": {"output": {"dense": LAYER}}}, "output": {"dense": LAYER}}, {"self"}),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_known_by_its_name_or_by_its_projections(case):
    block, first = ATTENTIONS[case]
    params = {"block_0": block, "head": LAYER}
    within = trained(plugins.method("attention_only")[0].strategy(params, Context()))
    assert {path.split("/")[1].split(".")[0] for path in within} == first
    assert not any("norm" in path for path in within)


def test_a_model_without_attention_is_told_what_it_lacks():
    with pytest.raises(InputError, match="attention_only: the model has no attention, such as 'block_0/attention"):
        plugins.method("attention_only")[0].strategy(PARAMS, CONTEXT)


def test_a_bias_only_fit_with_a_copied_head_leaves_its_kernel():
    assert trained(answer("bias_only", fresh=NOTHING)) == {"hidden_0/bias", "hidden_1/bias", "head/bias"}


@pytest.mark.parametrize("name", ["head_only", "last_k", "lp_ft", "gradual_unfreeze", "bottom_up"])
def test_the_head_trains_first_or_alone_though_it_was_copied(name):
    assert trained(evaluated(name, fresh=NOTHING)[0][1]) == HEAD


def test_chain_thaw_trains_each_stage_alone_where_the_head_was_copied():
    assert [trained(mask) for _, mask in evaluated("bottom_up", fresh=NOTHING)] == [HEAD, ZERO, ONE, ALL]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages", []),
        ("stages:train=head", []),
        ("stages:redraw=above:copy=1", ["hidden_1", "head"]),
        ("stages:redraw=above:copy=2:freeze=false", ["head"]),
        ("scratch", ["hidden_0", "hidden_1", "head"]),
        ("random_features", ["hidden_0", "hidden_1", "head"]),
    ],
)
def test_reinit_names_the_stages_to_draw_anew(text, expected):
    method, options = plugins.method(text)
    parameters = inspect.signature(method.reinit).parameters
    assert (
        list(method.reinit(CONTEXT, **{key: value for key, value in options.items() if key in parameters})) == expected
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("last_k:k=0", "has 3 stages"),
        ("last_k:k=4", "has 3 stages"),
        ("last_k:k=-1", "has 3 stages"),
        ("stages:train=hiden_1", "no stage 'hiden_1'; nearest: 'hidden_1'"),
        ("stages:train=head+", "no stage ''"),
        ("stages:redraw=below", "the one value is 'above'"),
        ("stages:copy=1", "it goes with redraw=above"),
        ("stages:freeze=false", "it goes with redraw=above:copy=n"),
        ("stages:freeze=hiden_1", "no stage 'hiden_1'; nearest: 'hidden_1'"),
        ("stages:freeze=head:train=head", "train= and freeze= are two uses: keep one"),
        ("stages:freeze=head:redraw=above:copy=1", "freeze= and redraw= are two uses: keep one"),
        ("pattern:freeze=**/kernal", "matches no leaf; nearest"),
        ("stages:redraw=above", "of 3 stages copy 1 to 2"),
        ("stages:redraw=above:copy=3", "of 3 stages copy 1 to 2"),
        ("stages:redraw=above:copy=1:train=head", "keep one"),
        ("pattern:train=**/kernal", "matches no leaf; nearest"),
        ("pattern:train=**/bias+", "pattern '' matches no leaf"),
        ("layerwise_decay:decay=0", "above 0 and at most 1"),
        ("layerwise_decay:decay=1.5", "above 0 and at most 1"),
        ("layerwise_decay:lowest=hidden_2", "none of hidden_0, hidden_1, head; nearest"),
        ("lp_ft:start=0", "above 0 and below 1"),
        ("lp_ft:start=1", "above 0 and below 1"),
        ("gradual_unfreeze:every=0.5", "3 phases do not fit"),
        ("gradual_unfreeze:every=-0.1", "3 phases do not fit"),
        ("auto_rgn:phases=0", "at least 1"),
        ("lisa:layers=0", "at least 1"),
        ("lisa:every=0", "a number of steps, at least 1"),
        ("badam:every=0", "a number of steps, at least 1"),
        ("badam:order=upward", "give one of random, ascending, descending"),
        ("mofo:fraction=0", "above 0 and at most 1"),
        ("gmt:fraction=2", "above 0 and at most 1"),
        ("gmt:per=stage", "give leaf or tree"),
        ("spiel:fraction=0", "above 0 and at most 1"),
        ("spiel:rate=0", "above 0 and at most 1"),
        ("spiel:estimate=20", "below every, 20"),
        ("hft:every=0", "a number of steps, at least 1"),
        ("autofreeze:every=0", "a number of steps, at least 1"),
        ("autofreeze:percentile=100", "above 0 and below 100"),
        ("gradient_mask:fraction=0", "above 0 and at most 1"),
        ("fisher:fraction=1.1", "above 0 and at most 1"),
        ("random_mask:fraction=-1", "above 0 and at most 1"),
        ("lora:rank=0", "at least 1"),
        ("lora:scale=0", "above 0 and finite"),
        ("lora:ratio=0", "above 0 and finite"),
        ("dora:rank=0", "dora:rank=0: it is at least 1"),
        ("dora:scale=0", "above 0 and finite"),
        ("pissa:rank=0", "pissa:rank=0: it is at least 1"),
        ("ssf:sigma=-1", "at least 0 and finite"),
        ("wise_ft:alpha=2", "from 0 to 1"),
        ("wise_ft:curve=1", "at least 2"),
        ("wise_ft:probe=1", "from 0 and below 1"),
        ("lines:alpha=-1", "at least 0"),
        ("shrink_perturb:shrink=2", "from 0 to 1"),
        ("shrink_perturb:sigma=-1", "at least 0 and finite"),
    ],
)
def test_options_out_of_range_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        answer(text)


@pytest.mark.parametrize(
    ("name", "field"),
    [("auto_rgn", "gradient"), ("gradient_mask", "gradient"), ("fisher", "fisher"), ("random_mask", "key")],
)
def test_a_strategy_says_what_it_needs(name, field):
    with pytest.raises(InputError, match=rf"{name} needs context\.{field}: a"):
        answer(name, **{field: None})


@pytest.mark.parametrize(
    "name",
    [
        *("head_only", "last_k", "stages", "random_features", "lp_ft", "gradual_unfreeze", "bottom_up"),
        *("layerwise_decay", "lines", "lisa", "badam", "hft", "autofreeze"),
    ],
)
def test_a_strategy_by_stages_refuses_to_go_without_them(name):
    with pytest.raises(InputError, match=rf"^{name} needs stages: give path prefixes .*, as Context\(stages="):
        answer(name, stages=())


@pytest.mark.parametrize(
    "text",
    [
        *("last_k:k=2", "stages:freeze=hidden_0", "stages:redraw=above:copy=1", "gradual_unfreeze", "bottom_up"),
        *("layerwise_decay", "lisa", "badam", "hft", "autofreeze"),
    ],
)
def test_a_strategy_that_counts_stages_refuses_a_leaf_in_none_of_them(text):
    with pytest.raises(
        InputError, match=r": no stage holds 'hidden_1/\w+', .*: give Context\(stages=..\) its prefix too"
    ):
        answer(text, stages=("hidden_0", "head"))


@pytest.mark.parametrize("text", ["head_only", "lp_ft", "random_features", "stages:train=head"])
def test_a_strategy_that_trains_named_stages_asks_for_no_others(text):
    assert answer(text, stages=("head",))


def test_a_leaf_that_cannot_train_needs_no_stage():
    params = {"conv": {"kernel": np.ones((2, 2))}, "steps": np.array(3), "head": {"kernel": np.ones((2, 2))}}
    mask = plugins.method("last_k")[0].strategy(params, Context(stages=("conv", "head")), k=2)
    assert trained(mask) == {"conv/kernel", "head/kernel"}


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "ssf"])
def test_a_fresh_of_the_tree_before_adapt_is_told_to_be_of_the_adapted_one(name):
    method, _ = plugins.method(name)
    adapted = method.adapt(PARAMS, jax.random.key(0), **({"rank": 1} if name == "pissa" else {}))
    fresh = masks.under(adapted, "head")
    mask = method.strategy(adapted, Context(fresh=fresh))
    assert trained(mask) >= HEAD
    with pytest.raises(
        InputError, match=f"^{name}: context.fresh .* only in the adapted parameters.* of the tree that adapt gave"
    ):
        method.strategy(adapted, Context(fresh=masks.under(PARAMS, "head")))


def test_models_that_lack_what_a_strategy_trains_are_refused():
    method = {name: plugins.method(name)[0] for name in ("norm_only", "bias_only", "lora", "layerwise_decay")}
    with pytest.raises(InputError, match="norm_only: the model has no normalisation layer"):
        method["norm_only"].strategy(PARAMS, CONTEXT)
    kernels = {"hidden_0": {"weight": np.ones((2, 2))}, "head": {"kernel": np.ones((2, 2))}}
    with pytest.raises(InputError, match="bias_only: the model has no leaf named 'bias'"):
        method["bias_only"].strategy(kernels, Context(("hidden_0", "head")))
    with pytest.raises(InputError, match="there is nothing to adapt"):
        method["lora"].adapt(kernels, jax.random.key(0))
    with pytest.raises(InputError, match="call adapt"):
        method["lora"].strategy(PARAMS, CONTEXT)
    with pytest.raises(InputError, match="layerwise_decay: no stage holds 'hidden_0/weight'"):
        method["layerwise_decay"].strategy(kernels, Context(("head",)))


def test_norm_only_knows_the_names_of_linen_and_leaves_running_statistics():
    params = {
        "LayerNorm_0": {"scale": np.ones(2), "bias": np.ones(2)},
        "block": {"BatchNorm_1": {"scale": np.ones(2), "batch_stats": {"bias": np.ones(2)}}, "norm": np.ones(2)},
        "encoder": {"group_norm": {"bias": {"value": np.ones(2)}}, "bias": np.ones(2)},
    }
    mask = plugins.method("norm_only")[0].strategy(params, Context())
    assert trained(mask) == {
        "LayerNorm_0/bias",
        "LayerNorm_0/scale",
        "block/BatchNorm_1/scale",
        "encoder/group_norm/bias/value",
    }


def affine(scale="scale", bias="bias", shape=(3,)):
    return {scale: np.ones(shape), bias: np.ones(shape)}


DENSE = {"kernel": np.ones((3, 3)), "bias": np.ones(3)}
NORM_NAMES = {
    "norm, bn and ln side by side": ({"stem": {"norm": affine()}, "block": {"bn1": affine(), "ln_2": affine()}}, 6),
    "gn, digits and camels": (
        {"gn": affine(), "LayerNorm_0": affine(), "preBN": affine(), "BatchNorm2d_3": affine()},
        8,
    ),
    "a block called norm": ({"PreNormBlock_0": {"LayerNorm_0": affine(), "Dense_0": DENSE, "gamma": np.ones(3)}}, 2),
    "an attention in such a block": ({"PreNormBlock_0": {"attention": {"query": DENSE}, "norm": affine()}}, 2),
    "torch": ({"norm1": affine("weight"), "fc": {"weight": np.ones((2, 3)), "bias": np.ones(2)}}, 2),
    "torch, a batch norm in a sequence": (
        {"layers": {"0": affine("weight") | {"running_mean": np.ones(3), "running_var": np.ones(3)}, "1": DENSE}},
        2,
    ),
    "keras": ({"layer_norm": affine("gamma", "beta"), "dense": DENSE}, 2),
    "haiku": ({"net/~/layer_norm": affine("scale", "offset"), "linear": {"w": np.ones((3, 3)), "b": np.ones(3)}}, 2),
    "a root mean square": ({"rms_norm": {"scale": np.ones(3)}, "final_norm": {"weight": np.ones(3)}}, 2),
    "a dense layer called norm": ({"norm_proj": DENSE, "norm": affine()}, 2),
    "one without a bias": ({"norm_proj": {"weight": np.ones((3, 3))}, "norm": affine()}, 2),
    "a stage that is a norm": ({"final": affine(), "last": affine("weight"), "embed": affine("table"), "fc": DENSE}, 4),
    "such a layer deep in a block": ({"block_0": {"ada": {"post": affine("gamma", "beta")}, "fc": DENSE}}, 2),
    "such a layer of two axes is no norm": ({"final": affine(shape=(3, 3)), "norm": affine()}, 2),
    "nor one with another leaf": ({"final": affine() | {"shift": np.ones(3)}, "norm": affine()}, 2),
    "nor what has layers of its own": ({"final": affine() | {"fc": DENSE}, "norm": affine(), "fc": DENSE}, 2),
    "a stack of layers": ({"blocks": {"norm": affine(shape=(6, 3)), "dense": {"kernel": np.ones((6, 3, 3))}}}, 2),
}


@pytest.mark.parametrize(("params", "count"), NORM_NAMES.values(), ids=NORM_NAMES)
def test_norm_only_trains_scale_and_bias_of_every_norm_whatever_it_is_called(params, count):
    paths_trained = trained(plugins.method("norm_only")[0].strategy(params, Context()))
    assert len(paths_trained) == count
    assert not any(
        word in path.lower() for path in paths_trained for word in ("dense", "query", "proj", "fc", "linear")
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"normalised_mlp": {"dense": DENSE}}, "no normalisation layer"),
        (
            {"norm": {"scale": np.ones(3), "bias": np.ones(4)}},
            r"'norm' looks like a norm.*'bias' \(4,\), 'scale' \(3,\)",
        ),
        ({"norm": {"a": np.ones(3), "b": np.ones(3)}}, r"'norm' looks like a norm, and has the leaves 'a' \(3,\)"),
        (
            {"ok": {"norm": affine()}, "bn": {"weight": np.ones(3), "shift": np.ones(3)}},
            "'bn' looks like a norm.*'shift'",
        ),
    ],
)
def test_norm_only_names_what_it_cannot_tell(params, message):
    with pytest.raises(InputError, match=message):
        plugins.method("norm_only")[0].strategy(params, Context())


def test_norm_only_knows_norms_with_layers_of_their_own_and_the_norms_of_other_families():
    adaptive = {"norm": {**affine(), "linear": DENSE}, "other": {"norm2": affine()}}
    response = {"grn": {"gamma": np.ones((1, 1, 1, 12)), "beta": np.ones((1, 1, 1, 12))}, "fc": DENSE}
    flat = {"stem.bn1.weight": np.ones(3), "stem.bn1.bias": np.ones(3), "stem.conv1.weight": np.ones((3, 3))}
    block = {"PreNormBlock_0": {"gamma": np.ones(3), "Dense_0": DENSE, "in1": affine(), "rms": {"scale": np.ones(3)}}}
    expected = [
        (adaptive, {"norm/scale", "norm/bias", "other/norm2/scale", "other/norm2/bias"}),
        (response, {"grn/gamma", "grn/beta"}),
        (flat, {"stem.bn1.weight", "stem.bn1.bias"}),
        (block, {"PreNormBlock_0/in1/scale", "PreNormBlock_0/in1/bias", "PreNormBlock_0/rms/scale"}),
    ]
    for params, norms in expected:
        assert trained(plugins.method("norm_only")[0].strategy(params, Context())) == norms


def test_norm_only_takes_a_layer_norm_that_is_a_stage_and_names_a_scale_that_it_cannot_tell():
    model = (
        linen.stage("body", nn.Dense(4)),
        linen.stage("final", nn.LayerNorm(name="ln")),
        linen.stage("root", nn.RMSNorm(name="rms")),
        linen.stage("head", nn.Dense(3)),
    )
    params = models.init(model, jax.random.key(0), (5,))
    context = Context(models.names(model))
    assert trained(norm_only.strategy(params, context)) == {"final/scale", "final/bias"}
    assert norm_only.left_out(params, context) == ["root/scale"]
    fresh = masks.under(params, "root")
    assert norm_only.left_out(params, context._replace(fresh=fresh)) == []
    assert norm_only.left_out({"block": {"gamma": np.ones(3), "fc": DENSE}, "norm": affine()}, Context()) == [
        "block/gamma"
    ]
    assert norm_only.left_out({"fc": DENSE | {"scale": np.ones(3)}, "norm": affine()}, Context()) == []


def test_norm_only_of_nnx_and_equinox_modules():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.bn, self.norm = nnx.BatchNorm(3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    expected = {f"{name}/{leaf}/value" for name in ("bn", "norm") for leaf in ("scale", "bias")}
    state = nnx.state(Network(nnx.Rngs(0)))
    assert trained(plugins.method("norm_only")[0].strategy(state, Context())) == expected
    layer = {"norm": eqx.nn.LayerNorm((2, 3)), "head": eqx.nn.Linear(3, 2, key=jax.random.key(0))}
    mask = plugins.method("norm_only")[0].strategy(eqx.filter(layer, eqx.is_array), Context())
    assert trained(mask) == {"norm/weight", "norm/bias"}


KERNEL = {"kernel": np.ones((4, 4), np.float32)}
WIDE = {
    "stem": {"kernel": np.ones((3, 3, 1, 4))},
    "series": {"kernel": np.ones((3, 2, 2))},
    "mlp": KERNEL,
    "embed": {"embedding": np.ones((5, 4))},
    "classifier": {"kernel": np.ones((4, 3))},
}
STAGES = Context(stages=("stem", "series", "mlp", "embed", "classifier"))


def test_lora_takes_the_head_from_the_stages_and_says_what_it_leaves_out():
    adapted = lora.adapt(WIDE, jax.random.key(0), STAGES)
    names = {f"{layer}/lora_{factor}" for layer in ("stem", "mlp") for factor in "ab"}
    assert set(leaves(adapted)) - set(leaves(WIDE)) == names
    expected = {"series/kernel", "embed/embedding"}  # a convolution of one axis, or a stack of dense layers
    assert set(lora.left_out(WIDE, STAGES)) == set(lora.left_out(adapted, STAGES)) == expected
    head_within = {"body": {"head": dict(KERNEL)}, "classifier": dict(KERNEL)}  # a head of attention, not the head
    adapted = lora.adapt(head_within, jax.random.key(0), Context(stages=("body", "classifier")))
    assert "body/head/lora_a" in leaves(adapted) and "classifier/lora_a" not in leaves(adapted)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stem": WIDE["series"], "head": KERNEL}, r"nothing to adapt; left out: 'stem/kernel' \(3, 2, 2\)"),
        ({"l1": {"w": np.ones((3, 3))}, "head": KERNEL}, r"nothing to adapt; left out: 'l1/w' \(3, 3\)"),
        ([KERNEL, KERNEL], "no factors can stand beside '0/kernel', '1/kernel': a list"),
        (flax.core.freeze({"a": KERNEL, "head": KERNEL}), "no factors can stand beside 'a/kernel'"),
        (nnx.State({"a": {"kernel": nnx.Param(np.ones((2, 2)))}}), "no factors can stand beside 'a/kernel'"),
        ({"a": KERNEL, "b": [KERNEL], "head": KERNEL}, "no factors can stand beside 'b/0/kernel'"),
    ],
    ids=["three axes", "another name", "list", "FrozenDict", "nnx.State", "a list in a dict"],
)
def test_lora_names_what_it_cannot_adapt(params, message):
    with pytest.raises(InputError, match=message):
        lora.adapt(params, jax.random.key(0))


FACTORS = {"lora_a": np.ones((3, 4), np.float32), "lora_b": np.ones((4, 2), np.float32)}
NOT_ADAPTED = {
    "no factors": ({"a": {"kernel": np.ones((3, 2))}}, "no factors lora_a and lora_b: merge those that adapt gave"),
    "nothing": ({}, "no factors lora_a and lora_b"),
    "an array": (np.ones(3), "no factors lora_a and lora_b"),
    "one factor": (
        {"a": {"kernel": np.ones((3, 2)), "lora_a": np.ones((3, 4))}},
        "'a/kernel' and 'a/lora_a' without lora_b: merge the whole tree that adapt gave",
    ),
    "the other": ({"kernel": np.ones((3, 2)), "lora_b": np.ones((4, 2))}, "'kernel' and 'lora_b' without lora_a"),
    "no kernel": ({"a": {"b": FACTORS}}, "'a/b/lora_a' and 'a/b/lora_b' without kernel"),
    "another kernel": ({"a": {**FACTORS, "kernel": np.ones((5, 2))}}, "do not fit their kernel: 'a/kernel' (5, 2)"),
    "two ranks": (
        {"a": {**FACTORS, "kernel": np.ones((3, 2)), "lora_b": np.ones((5, 2))}},
        "do not fit their kernel: 'a/kernel' (3, 2), 'a/lora_a' (3, 4), 'a/lora_b' (5, 2)",
    ),
    "numbers": ({"a": {**FACTORS, "kernel": np.ones((3, 2)), "lora_a": 1.0}}, "do not fit their kernel"),
    "a tree within": ({"a": {**FACTORS, "kernel": {"x": np.ones((3, 2))}}}, "do not fit their kernel"),
    "frozen": (flax.core.freeze({"a": {**FACTORS, "kernel": np.ones((3, 2))}}), "give nested dicts, as flax.core.unfr"),
    "a list": ([{**FACTORS, "kernel": np.ones((3, 2))}], "give nested dicts, as flax.core.unfr"),
}


@pytest.mark.parametrize("case", NOT_ADAPTED)
def test_lora_says_what_a_tree_lacks_that_it_is_to_merge(case):
    params, message = NOT_ADAPTED[case]
    with pytest.raises(InputError) as error:
        lora.merge(params)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_lora_adapts_no_tree_that_has_factors():
    """They would be drawn anew, and what they learnt be lost."""
    adapted = lora.adapt({"a": KERNEL, "head": KERNEL}, jax.random.key(0))
    with pytest.raises(InputError, match="have factors already, 'a/lora_a', 'a/lora_b': merge"):
        lora.adapt(adapted, jax.random.key(1))
    assert leaves(lora.adapt(lora.merge(adapted), jax.random.key(0))).keys() == leaves(adapted).keys()


ODD = {
    "empty": {},
    "nothing": None,
    "an array": np.ones((2, 2), np.float32),
    "a number": 1.0,
    "a text": {"a": "b"},
    "a list": [np.ones((2, 2), np.float32), np.ones(2, np.float32)],
    "whole numbers": {"a": {"kernel": np.ones((2, 2), int)}},
    "numbered": {0: {"kernel": np.ones((2, 2), np.float32)}},
    "frozen": flax.core.freeze({"a": KERNEL, "head": KERNEL}),
    "factors alone": {"a": FACTORS},
    "one factor": {"a": {"kernel": np.ones((3, 2), np.float32), "lora_a": np.ones((3, 4), np.float32)}},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("staged", [False, True])
def test_a_strategy_is_used_on_any_tree_without_a_traceback(name, staged):
    """What it offers gives a result or raises an InputError of one line, whatever it is given."""
    method, _ = plugins.method("pattern:train=**/kernel" if name == "pattern" else name)
    context = Context(stages=("body", "head")) if staged else Context()
    for what, params in ODD.items():
        attempts = {
            "strategy": lambda params: method.strategy(params, context),
            "adapt": lambda params: method.adapt(params, jax.random.key(0)),
            "merge": lambda params: method.merge(params),
            "reinit": lambda params: (
                method.reinit(params, jax.random.key(0), context)
                if plugins.takes(method.reinit, "params")
                else method.reinit(context)
            ),
            "left_out": lambda params: method.left_out(params, context),
        }
        for part, attempt in attempts.items():
            if getattr(method, part) is not None:
                try:
                    attempt(params)
                except InputError as error:
                    assert "\n" not in str(error), (part, what)


def test_lora_merges_no_factors_of_another_rank():
    adapted = lora.adapt({"a": KERNEL, "head": KERNEL}, jax.random.key(0), rank=2)
    with pytest.raises(InputError, match="factors at 'a/lora_a' have rank 2, not 4: merge with rank=2"):
        lora.merge(adapted)


def test_auto_rgn_gives_the_ratio_of_norms_over_the_largest():
    rows = evaluated("auto_rgn")
    assert [begin for begin, _ in rows] == [0.0, 0.25, 0.5, 0.75]
    slopes = leaves(gradient(PARAMS))
    kernels = {p: np.linalg.norm(slopes[p]) / np.linalg.norm(leaves(PARAMS)[p]) for p in ZERO | ONE if "kernel" in p}
    expected = {p: ratio / max(kernels.values()) for p, ratio in kernels.items()}
    # The biases start at zero, where the ratio has no bound; the head is fresh.
    expected |= {"hidden_0/bias": 1.0, "hidden_1/bias": 1.0, "head/kernel": 1.0, "head/bias": 1.0}
    for _, mask in rows:
        assert leaves(mask) == pytest.approx(expected, rel=1e-6)


def test_auto_rgn_asks_again_at_the_parameters_of_each_phase():
    moved = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    phase = answer("auto_rgn:phases=2")[1]
    now = leaves(phase.mask(moved, CONTEXT))
    ratios = {p: np.linalg.norm(leaves(gradient(moved))[p]) / np.linalg.norm(leaves(moved)[p]) for p in ZERO | ONE}
    assert {p: now[p] for p in ratios} == pytest.approx({p: r / max(ratios.values()) for p, r in ratios.items()})


def test_auto_rgn_freezes_what_has_no_gradient_and_divides_by_no_zero():
    params = {
        "a": np.zeros(2),
        "b": np.zeros(2),
        "c": np.ones(2),
        "d": np.ones(2),
        "step": np.array(1),
        "e": np.ones(1),
    }
    slopes = {"a": np.ones(2), "b": np.zeros(2), "c": np.zeros(2), "d": np.full(2, 7.0), "step": None, "e": None}
    with np.errstate(all="raise"):
        mask = auto_rgn.rates(params, Context(gradient=lambda params: slopes))
    assert mask == {"a": 1.0, "b": False, "c": False, "d": 1.0, "step": False, "e": False}
    still = auto_rgn.rates({"c": np.ones(2)}, Context(gradient=lambda params: {"c": np.zeros(2)}))
    assert still == {"c": False}
    with pytest.raises(InputError, match="norm at 'c' is nan"):
        auto_rgn.rates({"c": np.ones(2)}, Context(gradient=lambda params: {"c": np.array([1.0, np.nan])}))


def selected(mask):
    """{path: bool array} of the leaves that were kept."""
    return {
        path: np.broadcast_to(m, leaves(PARAMS)[path].shape) for path, m in leaves(mask).items() if path in ZERO | ONE
    }


@pytest.mark.parametrize("name", sorted(ELEMENTS))
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_a_fraction_of_the_kept_elements_trains_and_the_fresh_leaves_whole(name, fraction):
    mask = answer(f"{name}:fraction={fraction}")
    chosen = selected(mask)
    assert sum(m.sum() for m in chosen.values()) == round(fraction * sum(m.size for m in chosen.values()))
    assert mask["head"] == {"bias": True, "kernel": True}
    assert {type(m) for m in jax.tree.leaves(mask)} <= {bool, np.ndarray}


@pytest.mark.parametrize(
    ("name", "score"),
    [("gradient_mask", np.abs), ("fisher", np.square)],
    ids=["gradient_mask", "fisher"],
)
def test_the_elements_are_those_with_the_largest_scores(name, score):
    chosen = selected(answer(f"{name}:fraction=0.3"))
    scores = {path: score(leaves(gradient(PARAMS))[path]) for path in chosen}
    least = min(scores[path][m].min() for path, m in chosen.items() if m.any())
    most = max(scores[path][~m].max() for path, m in chosen.items() if not m.all())
    assert least >= most
    assert any(leaves(gradient(PARAMS))[path][m].min() < 0 for path, m in chosen.items() if m.any())


def test_a_random_mask_depends_on_the_key_alone():
    first, two = answer("random_mask:fraction=0.3"), answer("random_mask:fraction=0.3", key=jax.random.key(7))
    assert not masks.equal(first, two)
    other = plugins.method("random_mask")[0].strategy(jax.tree.map(np.ones_like, PARAMS), CONTEXT, fraction=0.3)
    assert masks.equal(first, other)


def test_integers_are_never_selected_and_may_have_no_gradient():
    params = {"body": {"kernel": np.ones((2, 2)), "step": np.array([1, 2])}, "head": {"bias": np.ones(1)}}
    fresh = {"body": {"kernel": False, "step": False}, "head": {"bias": True}}
    slopes = {"body": {"kernel": np.array([[0.1, -9.0], [2.0, 0.0]]), "step": None}, "head": {"bias": np.ones(1)}}
    context = Context(("body", "head"), None, fresh, jax.random.key(0), lambda params: slopes, lambda params: slopes)
    for name in ELEMENTS:
        mask = plugins.method(name)[0].strategy(params, context, fraction=0.5)
        assert mask["body"]["step"] is False and mask["body"]["kernel"].sum() == 2
    mask = plugins.method("gradient_mask")[0].strategy(params, context, fraction=0.5)
    assert mask["body"]["kernel"].tolist() == [[False, True], [True, False]]


def test_lora_starts_from_the_same_outputs_and_merges_into_ordinary_parameters():
    x = jax.random.normal(jax.random.key(3), (7, 2, 2, 1))
    adapted = lora.adapt(PARAMS, jax.random.key(2), rank=2)
    assert {path for path in leaves(adapted)} - ALL == TRAINED["lora"] - HEAD
    assert adapted["hidden_1"]["lora_a"].shape == (5, 2) and adapted["hidden_1"]["lora_b"].shape == (2, 4)
    merged = lora.merge(adapted, rank=2, scale=3.0)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(models.apply(MODEL, merged, x), models.apply(MODEL, PARAMS, x))
    moved = paths.each(lambda path, leaf: leaf + 0.1 if "lora_b" in path else leaf, adapted)
    merged = lora.merge(moved, rank=2, scale=3.0)
    for name in ("hidden_0", "hidden_1"):
        a, b = (np.asarray(moved[name][factor], np.float64) for factor in ("lora_a", "lora_b"))
        np.testing.assert_allclose(merged[name]["kernel"], PARAMS[name]["kernel"] + 1.5 * a @ b, rtol=1e-5, atol=1e-6)
    jitted = jax.jit(lambda params: lora.merge(params, rank=2, scale=3.0))(moved)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), jitted, merged))


def test_lora_draws_factors_of_the_right_size_one_key_a_kernel():
    params = {"a": {"kernel": np.ones((400, 9))}, "b": {"c": {"kernel": np.ones((400, 9)), "bias": np.ones(9)}}}
    adapted = lora.adapt(params, jax.random.key(0), rank=50)
    first, two = adapted["a"]["lora_a"], adapted["b"]["c"]["lora_a"]
    assert first.std() == pytest.approx(400**-0.5, rel=0.02) and not np.array_equal(first, two)
    assert np.array_equal(first, lora.adapt(params, jax.random.key(0), rank=50)["a"]["lora_a"])
    assert not adapted["a"]["lora_b"].any() and first.dtype == jnp.result_type(params["a"]["kernel"])


def test_lora_leaves_heads_and_integers():
    params = {
        "codes": {"kernel": np.ones((2, 2), np.int32)},
        "dense": {"kernel": np.ones((2, 2))},
        "params": {"head": {"kernel": np.ones((2, 2))}},
    }
    adapted = lora.adapt(params, jax.random.key(0))
    assert set(leaves(adapted)) - set(leaves(params)) == {"dense/lora_a", "dense/lora_b"}
    with pytest.raises(InputError, match="at least 1"):
        lora.adapt(params, jax.random.key(0), rank=0)


def test_the_page_says_of_every_strategy_which_rates_to_try_and_where_they_are_from():
    """The ends of a range are in the flag files that its row names; else it names code or a paper, or has no number."""
    root, number = Path(__file__).parent.parent, r"(?<![\w=.])\d+(?:\.\d+)?(?:e-\d+)?(?![\w.]*\.\d)"
    page = (root / "tljax/strategies/README.md").read_text(encoding="utf-8")
    section = page.partition("## Which rates to try")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|$", section, re.M)
    named = [name for names, _, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(named) == len(set(named)) and set(named) == set(NAMES)
    for names, rates, source in rows:
        files = re.findall(r"`(experiments/flags/\w+\.flags)`", source)
        elsewhere = re.search(r"github\.com/|arXiv:\d", source)
        assert "none found" in rates or files or elsewhere, names
        ends = set(map(float, re.findall(number, re.sub("best [^,;]*", "", rates))))
        assert ends or "none found" in rates or "without a number" in source, names
        if not elsewhere:
            texts = [(root / file).read_text(encoding="utf-8") for file in files]
            assert ends <= {float(text) for text in re.findall(number, " ".join(texts))}, names
