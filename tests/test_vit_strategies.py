"""Strategies on a vision transformer of depth 12 do what their papers do: expectations written by hand."""

import jax
import pytest

from tljax import masks, models, paths, plugins
from tljax.strategies import _layers as layers
from tljax.types import Context, InputError

MODEL = models.build("vit:width=8:heads=2:patch=4", 3, hidden=(), activation="relu")
PARAMS = models.abstract(MODEL, (8, 8, 1))
CONTEXT = Context(models.names(MODEL), PARAMS, masks.under(PARAMS, "head"))
BLOCKS = [f"block_{i}" for i in range(12)]


def answer(text):
    method, options = plugins.method(text)
    return method.strategy(PARAMS, CONTEXT, **options)


def whole(mask):
    """The stages that train whole, in the order of the model; no other stage trains."""
    trains = {path: masks.trains(m) for path, m in paths.items(mask)}
    stages = {name: {on for path, on in trains.items() if path.startswith(f"{name}/")} for name in CONTEXT.stages}
    assert all(len(values) == 1 for values in stages.values())
    return [name for name, values in stages.items() if values == {True}]


def test_norm_only_trains_25_norms_and_the_new_head():
    trained = {path for path, on in paths.items(answer("norm_only")) if on}
    norms = {f"{block}/norm_{i}" for block in BLOCKS for i in (1, 2)} | {"norm"}
    assert len(norms) == 25
    assert trained == {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")} | {"head/kernel", "head/bias"}


def test_bias_only_trains_the_biases_of_attention_mlp_and_norms():
    trained = {path for path, on in paths.items(answer("bias_only")) if on}
    layers = [f"attention/{name}" for name in ("query", "key", "value", "out")]
    layers += ["mlp/expand", "mlp/project", "norm_1", "norm_2"]
    biases = {f"{block}/{layer}/bias" for block in BLOCKS for layer in layers}
    assert trained == biases | {"embedding/patch/bias", "norm/bias", "head/bias", "head/kernel"}


def test_layerwise_decay_is_that_of_beit_and_mae():
    """Their rate is decay^(depth + 1 - layer): of embedding, class token and positions the layer is 0, of block i it is
    i + 1, of the last norm and the head depth + 1."""
    rates = {}
    for path, rate in paths.items(answer("layerwise_decay:decay=0.65")):
        rates.setdefault(path.partition("/")[0], set()).add(float(rate))
    expected = {"embedding": 0.65**13, "norm": 1.0, "head": 1.0, **{f"block_{i}": 0.65 ** (12 - i) for i in range(12)}}
    assert rates.keys() == expected.keys()
    for name, [rate] in rates.items():
        assert rate == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize(
    ("k", "trained"),
    [
        (1, ["head"]),
        (2, ["block_11", "norm", "head"]),
        (3, ["block_10", "block_11", "norm", "head"]),
        (13, [*BLOCKS, "norm", "head"]),
        (14, ["embedding", *BLOCKS, "norm", "head"]),
    ],
)
def test_last_k_counts_the_head_and_blocks_and_the_norm_with_the_last_block(k, trained):
    assert whole(answer(f"last_k:k={k}")) == trained


def test_last_k_says_how_many_stages_count():
    with pytest.raises(InputError, match="14 stages, as a norm counts with the stage below it, so k is 1 to"):
        answer("last_k:k=15")


def test_gradual_unfreeze_frees_the_norm_with_the_last_block():
    phases = answer("gradual_unfreeze")
    assert [len(whole(phase.mask)) for phase in phases] == [1, *range(3, 16)]
    assert whole(phases[0].mask) == ["head"] and whole(phases[1].mask) == ["block_11", "norm", "head"]


def test_bottom_up_trains_the_norm_with_the_last_block():
    phases = answer("bottom_up")
    expected = [["head"], ["embedding", "head"], *([block, "head"] for block in BLOCKS[:-1])]
    expected += [["block_11", "norm", "head"], list(CONTEXT.stages)]
    assert [whole(phase.mask) for phase in phases] == expected


def test_a_stage_of_more_than_a_norm_counts_by_itself():
    """Of a norm with a kernel beside it, and of a norm that is the first stage."""
    shape = jax.ShapeDtypeStruct((4,), "float32")
    norm, dense = {"scale": shape, "bias": shape}, {"kernel": jax.ShapeDtypeStruct((4, 4), "float32"), "bias": shape}
    params = {"first": norm, "a": {"dense": dense, "norm": norm}, "b": {"norm_1": norm, "dense": dense}, "c": dense}
    assert layers.with_block(params, tuple(params)) == [("first",), ("a",), ("b",), ("c",)]
    assert layers.with_head(params, tuple(params)) == [("first", "a"), ("b",), ("c",)]
