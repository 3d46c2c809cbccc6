"""Weights from elsewhere: what PyTorch trained gives PyTorch's own logits, and is a source like any other."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_programs import arguments, results
from test_programs import parameters as parameters_of

from experiments import compare, rank, transfer
from tljax import checkpoint, models, weights
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

FOLDER = Path(__file__).parent / "weights"
FILE = FOLDER / "torch.safetensors"
RULES = json.loads((FOLDER / "torch.safetensors.json").read_text())["rename"]
MODEL = models.build("mlp", 10, hidden=(16,), activation="relu")
LIKE = models.abstract(MODEL, (28, 28, 1))


def grafted(arrays, rules=RULES):
    return weights.grafted(arrays, [weights.rule(text) for text in rules], LIKE)


def test_the_weights_of_pytorch_give_its_logits():
    with np.load(FOLDER / "logits.npz") as known:
        images, expected = known["images"], known["logits"]
    actual = models.apply(MODEL, grafted(weights.read(FILE)), images)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_an_npz_of_the_same_arrays_is_the_same(tmp_path):
    np.savez(tmp_path / "w.npz", **weights.read(FILE))
    first, other = grafted(weights.read(FILE)), grafted(weights.read(tmp_path / "w.npz"))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, other))


def test_axes_go_where_a_rule_says_and_whole_prefixes_are_renamed():
    like = {"conv": {"kernel": np.zeros((3, 4, 2, 5)), "bias": np.zeros(5)}}
    kernel = np.arange(120.0).reshape(5, 2, 3, 4)
    arrays = {"body/kernel": kernel, "body/bias": np.ones(5), "steps": np.ones(())}
    rules = ["body/kernel:to=conv/kernel:transpose=2+3+1+0", "body:to=conv", "steps:drop"]
    params = weights.grafted(arrays, [weights.rule(text) for text in rules], like)
    assert params["conv"]["kernel"][2, 1, 0, 4] == kernel[4, 0, 2, 1] and params["conv"]["bias"].sum() == 5


ARRAYS = weights.read(FILE)
BAD = {
    "no rule": ({}, RULES[1:], "'0.weight'"),
    "a rule for nothing": ({}, [*RULES, "3.bias:drop"], "'3.bias' matches no array; nearest: '2.bias', '0.bias'"),
    "not transposed": ({}, ["0.weight:to=hidden_0/kernel", *RULES[1:]], "float32[16, 784]"),
    "other axes": ({}, ["0.weight:to=hidden_0/kernel:transpose=0+2", *RULES[1:]], "has no axes 0+2"),
    "two rules": ({}, [*RULES, RULES[0]], "two rules are of '0.weight'"),
    "an array too many": (
        {"4.bias": np.ones(2, np.float32)},
        RULES,
        "'4.bias' of the file's arrays has no place in the model",
    ),
    "how to leave it out": ({"4.bias": np.ones(2, np.float32)}, RULES, "such as `source_rename=4.bias:drop`"),
    "a leaf too many": ({}, [*RULES, "2:drop"], "'head/bias', 'head/kernel' of the model's leaves have no array"),
    "a rule after one that does its work": (
        {},
        ["0.weight:transpose", "0:to=hidden_0", "0.bias:to=hidden_0/bias", *RULES[2:]],
        "rule '0.bias' renames nothing, as a rule before it does: put it first",
    ),
    "another dtype": ({"0.bias": ARRAYS["0.bias"].astype(np.float16)}, RULES, "float16"),
    "not finite": ({"0.bias": ARRAYS["0.bias"] * np.float32(np.nan)}, RULES, "'0.bias' holds a number"),
    "no rule at all": ({}, ["0.weight"], "write NAME:to=PATH"),
    "two transposes": ({}, ["0.weight:transpose:transpose=1+0"], "write NAME:to=PATH"),
    "axes that are no numbers": ({}, ["0.weight:transpose=a+b"], "write NAME:to=PATH"),
}


def test_a_dot_parts_a_name_as_pytorch_writes_it():
    arrays = {
        **{"tok.pos": np.ones(3), "tok.cls": np.zeros(3), "token.pos": np.ones(1)},
        **{
            "layers_0.attn.query.kernel": np.full((2, 3), 5.0),
            "layers_01.bias": np.ones(4),
            "odd.name/leaf": np.ones(2),
        },
    }
    like = {
        "embed": {"pos": np.zeros(3), "cls": np.zeros(3)},
        "token": {"pos": np.zeros(1)},
        "block_0": {"attn": {"query": {"kernel": np.zeros((3, 2))}}},
        "last": {"bias": np.zeros(4)},
        "odd.name": {"leaf": np.zeros(2)},
    }
    rules = ["tok:to=embed", "token:to=token", "layers_0:to=block_0:transpose", "layers_01:to=last"]
    params = weights.grafted(arrays, [weights.rule(text) for text in rules], like)
    assert params["block_0"]["attn"]["query"]["kernel"].shape == (3, 2) and params["embed"]["pos"].sum() == 3
    with pytest.raises(InputError, match="rule 'odd' matches no array"):  # a name with '/' is parted by it alone
        weights.moves(arrays, [weights.rule("odd:to=even")])


def test_without_rules_a_few_names_and_a_rule_are_shown():
    arrays = {f"layers_{i}.{leaf}": np.ones((5, 4)) for i in range(40) for leaf in ("kernel", "extra")}
    like = {f"block_{i}": {"kernel": np.zeros((4, 5))} for i in range(40)}
    with pytest.raises(InputError) as refused:
        weights.grafted(arrays, [], like)
    text = str(refused.value)
    assert "`source_rename=layers_0.kernel:to=block_0/kernel:transpose`" in text
    assert len(text) < 600 and "and 76 more" in text and "and 36 more" in text
    with pytest.raises(InputError) as refused:
        weights.grafted(arrays, [weights.rule("zzz:drop")], like)
    assert "and 76 more" in str(refused.value)


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_a_line(case):
    change, rules, message = BAD[case]
    with pytest.raises(InputError) as refused:
        grafted({**ARRAYS, **change}, rules)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_pickles_and_damaged_files_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "cut.safetensors").write_bytes(FILE.read_bytes()[:-8])
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4nothing")
    (tmp_path / "torch.pt").write_bytes(b"")
    for name in ("objects.npz", "cut.safetensors", "cut.npz", "torch.pt", "absent.npz"):
        with pytest.raises(InputError, match=name) as refused:
            weights.read(tmp_path / name)
        assert "\n" not in str(refused.value)


def place(tmp_path, **change):
    """A file of weights for the tasks of the tests, in PyTorch's layout, and its card."""
    rng = np.random.default_rng(0)
    shapes = {"0.weight": (8, 36), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)}
    np.savez(tmp_path / "w.npz", **{name: rng.normal(size=value).astype(np.float32) for name, value in shapes.items()})
    card = {"task": "digits", "classes": list("0123"), "shape": [6, 6, 1], "rename": RULES} | change
    (tmp_path / "w.npz.json").write_text(json.dumps({name: value for name, value in card.items() if value is not None}))
    return {"source": None, "source_checkpoint": str(tmp_path / "w.npz")}


def test_they_are_a_source_like_any_other(tasks, tmp_path):
    changes = place(tmp_path, rename=None, accuracy=0.5) | {"source_rename": tuple(RULES), "strategies": ("head_only",)}
    lines = transfer.run(**arguments(tasks, tmp_path / "w", **changes, seeds=(0,), steps=5, epochs=None))
    theirs = np.load(tmp_path / "w.npz")["0.weight"].T
    probes = [line for line in lines if line.strategy == "head_only"]
    assert len(probes) == 1 and all(line.source_accuracy == 0.5 for line in probes)
    for line in probes:
        np.testing.assert_array_equal(parameters_of(tmp_path / "w", line)["hidden_0/kernel"], theirs)
    assert "--source_rename=0.weight:to=hidden_0/kernel:transpose," in (tmp_path / "w" / "flags.flags").read_text()
    assert len(results(tmp_path / "w")) == 2


CARDS = {
    "no shape": ({"shape": None}, "must say task, classes, shape"),
    "a shape of words": ({"shape": ["six"]}, "'shape' is"),
    "a shape of nothing": ({"shape": [0, 6, 1]}, "numbers above 0"),
    "another shape": ({"shape": [7, 6, 1]}, "float32[36, 8], target leaf 'hidden_0/kernel' is float32[42, 8]"),
    "more classes": ({"classes": list("01234")}, "head/"),
    "another model": (
        {"model": {"model": "mlp", "hidden": [8], "activation": "tanh"}},
        "--activation=tanh there, relu",
    ),
    "a rule for nothing": ({"rename": [*RULES, "9.bias:drop"]}, "matches no array"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_that_does_not_fit_is_refused_in_a_line(case, tasks, tmp_path):
    change, message = CARDS[case]
    with pytest.raises(InputError) as refused:
        transfer.run(**arguments(tasks, tmp_path / "w", **place(tmp_path, **change)))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "w").exists()


def test_a_file_without_a_card_says_what_to_write(tasks, tmp_path):
    shutil.copy(FILE, tmp_path / "bare.safetensors")
    flags = arguments(tasks, tmp_path / "w", source=None, source_checkpoint=str(tmp_path / "bare.safetensors"))
    with pytest.raises(InputError, match="write there what the weights are of"):
        transfer.run(**flags)
    with pytest.raises(InputError, match="does not exist"):
        transfer.run(**flags | {"source_checkpoint": str(tmp_path / "none.safetensors")})
    with pytest.raises(InputError, match="is for weights from elsewhere"):
        transfer.run(**arguments(tasks, tmp_path / "w", source_rename=tuple(RULES)))


@pytest.mark.slow
def test_what_pytorch_trained_gets_a_verdict_and_is_ranked(tmp_path, capsys):
    shared = [f"--source_checkpoint={FILE}", "--target=fashion_mnist_10k", "--hidden=16", "--steps=20", "--seeds=0,1"]
    shared += ["--learning_rate=0.1", "--train_examples=10/class"]
    compare.main(["compare", *shared, "--strategies=head_only", f"--workdir={tmp_path / 'w'}"])
    output = capsys.readouterr().out
    assert "head_only" in output and "mnist_10k" in output and "this one trained source" in output
    line = next(line for line in results(tmp_path / "w") if line.strategy == "head_only")
    theirs = weights.read(FILE)["0.weight"].T
    np.testing.assert_array_equal(parameters_of(tmp_path / "w", line)["hidden_0/kernel"], theirs)
    argv = [f"--sources={FILE}", "--target=fashion_mnist_10k", "--train_examples=10/class", "--scores=knn,leep,logme"]
    rank.main(["rank", *argv, f"--workdir={tmp_path / 'r'}"])
    assert "mnist_10k (torch.safetensors)" in capsys.readouterr().out


def there_and_back(arrays, rules, like):
    """The leaves that rules make of arrays, and the arrays that they make of the leaves again."""
    parsed = [weights.rule(text) for text in rules]
    leaves = checkpoint.flatten(weights.grafted(arrays, parsed, like))
    return leaves, weights.exported(leaves, parsed)


RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=(6, 2, 3)) for _ in range(3))
"""Kernels [D, heads, d]."""


def of_attention(array):
    return {"attention": {name: {"kernel": array} for name in ("query", "key", "value")}}


LAYOUTS = {
    "fused, rows in turn": (
        "split:transpose:reshape=D+(heads+d)",
        lambda: np.concatenate([rows(k) for k in (Q, K, V)]),
    ),
    "fused, [in, out]": ("split=1:reshape=D+(heads+d)", lambda: np.concatenate([rows(k).T for k in (Q, K, V)], 1)),
    "heads outside q, k, v": (
        "reshape=D+(heads+3+d):split=2:reshape=D+heads+()+d",
        lambda: np.stack([Q, K, V], 2).reshape(6, 18),
    ),
}


def rows(kernel):
    """As PyTorch keeps it: [heads x d, D]."""
    return kernel.reshape(6, 6).T


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_fused_layer_becomes_three_leaves_and_is_had_again(case):
    steps, fused = LAYOUTS[case]
    array = fused()
    text = f"*.qkv:{steps}:to=*/attention/{{query,key,value}}/kernel"
    leaves, back = there_and_back({"block.qkv": array}, [text], {"block": of_attention(np.zeros((6, 2, 3)))})
    for name, kernel in zip(("query", "key", "value"), (Q, K, V), strict=True):
        np.testing.assert_array_equal(leaves[f"block/attention/{name}/kernel"], kernel)
    np.testing.assert_array_equal(back["block.qkv"], array)


def test_arrays_are_joined_and_a_class_token_stands_before_its_positions():
    token, grid = RNG.normal(size=(1, 1, 4)), RNG.normal(size=(1, 9, 4))
    rules = [weights.rule("{token,grid}:join=1:reshape=()+n+D:to=position")]
    position = weights.grafted({"token": token, "grid": grid}, rules, {"position": np.zeros((10, 4))})["position"]
    np.testing.assert_array_equal(position, np.concatenate([token[0], grid[0]]))
    halves = {"a.w": RNG.normal(size=(2, 3)), "b.w": RNG.normal(size=(2, 3))}
    leaves, back = there_and_back(halves, ["{a,b}.w:join=1:to=both"], {"both": np.zeros((2, 6))})
    assert leaves["both"].shape == (2, 6) and all((back[name] == halves[name]).all() for name in halves)
    with pytest.raises(InputError, match=r"joins 'a.w' and 'b.w', and the file has no 'b.w'"):
        there_and_back({"a.w": halves["a.w"]}, ["{a,b}.w:join=1:to=both"], {"both": np.zeros((2, 6))})


def test_stars_go_to_their_places_and_numbers_move():
    arrays = {
        f"stages.{i}.layers.{k}.bn{n}.bias": np.full(2, 100 * i + 10 * k + n)
        for i in (0, 1)
        for k in (0, 11)
        for n in (0, 1)
    }
    like = {
        f"block_{i}_{k}": {f"norm_{n}": {"bias": np.zeros(2, int)} for n in (1, 2)} for i in (1, 2) for k in (0, 11)
    }
    leaves, back = there_and_back(arrays, ["stages.*.layers.*.bn*.bias:to=block_*+1_*/norm_*+1/bias"], like)
    assert leaves["block_2_11/norm_2/bias"].tolist() == [211, 211]
    assert back.keys() == arrays.keys() and all((back[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(InputError, match="let the star be a number there"):
        there_and_back({"stages.a.w": np.ones(2)}, ["stages.*.w:to=block_*+1/w"], {"block_1": {"w": np.ones(2)}})


def test_either_name_is_taken_and_the_first_is_written():
    like = {"norm": {"scale": np.zeros(2), "bias": np.zeros(2)}}
    rule = "{net.,}{norm,ln}.{weight,bias}:to=norm/{scale,bias}"
    for prefix in ("net.norm", "ln"):
        leaves, back = there_and_back({f"{prefix}.weight": np.ones(2), f"{prefix}.bias": np.zeros(2)}, [rule], like)
        assert leaves["norm/scale"].sum() == 2 and back.keys() == {"net.norm.weight", "net.norm.bias"}
    with pytest.raises(InputError, match="would both become 'norm/scale'"):
        there_and_back({"norm.weight": np.ones(2), "ln.weight": np.ones(2), "ln.bias": np.ones(2)}, [rule], like)


def test_a_kernel_of_colour_becomes_one_of_grey_and_of_more_channels():
    kernel = RNG.normal(size=(5, 3, 2, 2)).astype(np.float32)
    for channels in (1, 3, 4, 6):
        like = {"kernel": np.zeros((2, 2, channels, 5), np.float32)}
        leaves, _ = there_and_back({"w": kernel}, ["w:to=kernel:transpose=2+3+1+0:channels"], like)
        grey = leaves["kernel"].sum(2)  # of an image whose channels are equal, at any number of them
        if channels in (1, 3, 6):
            np.testing.assert_allclose(grey, kernel.sum(1).transpose(1, 2, 0), rtol=1e-5, atol=1e-6)
        if channels == 4:  # timm repeats the first and scales by 3 / 4
            np.testing.assert_allclose(leaves["kernel"][:, :, 3], 0.75 * kernel[:, 0].transpose(1, 2, 0), rtol=1e-6)


def test_rules_of_ones_own_come_before_those_of_a_file():
    named = weights.rules_of("a.w:to=body/w\n**.w:to=rest/**/w:optional\nb:drop:optional\n", "theirs.rules")
    moves, _ = weights.moves(["a.w"], [weights.rule("a.w:to=mine/w"), *named])
    assert [move.leaves for move in moves] == [("mine/w",)]
    with pytest.raises(InputError, match=r"theirs.rules:1: rule 'a.w' matches no array; nearest: 'a.v'"):
        weights.moves(["a.v"], named)


def test_a_refusal_has_both_paths_both_shapes_and_the_nearest_rule():
    rules = weights.rules_of("layer.*.query:to=block_*/query:reshape=D+(heads+d)\n", "mine.rules")
    with pytest.raises(InputError) as refused:
        weights.grafted({"layer.0.query": np.zeros((8, 8))}, rules, {"block_0": {"query": np.zeros((6, 2, 3))}})
    text = str(refused.value)
    assert "'layer.0.query' is float64[8, 8]" in text and "'block_0/query' is float64[6, 2, 3]" in text
    assert "mine.rules:1 'layer.*.query:to=block_*/query:reshape=D+(heads+d)'" in text
    with pytest.raises(InputError) as refused:
        weights.grafted(
            {"layer.0.query": np.zeros((6, 6)), "layer.0.key": np.zeros((6, 6))},
            rules,
            {"block_0": {"query": np.zeros((6, 2, 3)), "key": np.zeros((6, 2, 3))}},
        )
    text = str(refused.value)
    assert "'layer.0.key'" in text and "'block_0/key'" in text and "([6, 6] to [6, 2, 3])" in text
    assert "the nearest rule is mine.rules:1" in text and "\n" not in text


def test_a_rule_without_a_way_back_says_so():
    rules = [weights.rule("w:to=kernel:reshape=2+3")]
    assert weights.grafted({"w": np.zeros(6)}, rules, {"kernel": np.zeros((2, 3))})["kernel"].shape == (2, 3)
    with pytest.raises(InputError, match=r"rule 'w:to=kernel:reshape=2\+3' has no way back: .*reshape=D\+\(heads\+d\)"):
        weights.exported({"kernel": np.zeros((2, 3))}, rules)
    with pytest.raises(InputError, match="none of the rules is of the model's leaves"):
        weights.exported({"other": np.zeros(2)}, [weights.rule("w:to=kernel")])


def refusal(arrays, rules, like, *more):
    """The line that refuses arrays."""
    with pytest.raises(InputError) as refused:
        weights.grafted(arrays, [weights.rule(text) for text in rules], like, *more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_drop_with_a_star_leaves_what_an_earlier_rule_names_and_one_without_drops_it():
    like = {"head": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
    arrays = {"w": np.ones((2, 3)), "head.bias": np.ones(2), "rest": np.ones(7), "more.rest": np.ones(1)}
    rules = ["**:cast", "w:to=head/kernel:transpose", "head.bias:to=head/bias", "**:drop"]
    params = weights.grafted(arrays, [weights.rule(text) for text in rules], like)
    assert params["head"]["kernel"].shape == (3, 2) and params["head"]["bias"].sum() == 2
    moves, dropped = weights.moves(arrays, [weights.rule(text) for text in rules])
    assert dropped == ("rest", "more.rest") and len(moves) == 2
    text = refusal(arrays, ["**:drop", *rules[1:3]], like)
    assert "rule '**:drop' leaves out 'w', which would become 'head/kernel'" in text
    text = refusal(arrays, [*rules, "head:drop"], like)
    assert "rule 'head:drop' leaves out 'head.bias', which would become 'head/bias'" in text


def test_positions_go_to_the_grid_of_the_model_and_to_no_other():
    like = {"embedding": {"patch": {"kernel": np.zeros((7, 7, 1, 3))}, "position": np.zeros((17, 3))}}
    arrays = {"embedding/patch/kernel": np.zeros((7, 7, 1, 3)), "position": RNG.normal(size=(1 + 36, 3))}
    text = refusal(arrays, ["position:to=embedding/position:resize=6x6+2x8"], like, (28, 28, 1))
    assert "the model's grid is 2x8, and it is 4x4: write resize=6x6+4x4" in text
    rule = weights.rule("position:to=embedding/position:resize")
    wide = weights.grafted(arrays, [rule], like, (14, 56, 1))["embedding"]["position"]
    by_hand = weights.rule("position:to=embedding/position:resize=6x6+2x8")
    np.testing.assert_array_equal(wide, weights.grafted(arrays, [by_hand], like)["embedding"]["position"])
    square = weights.grafted(arrays, [rule], like, (28, 28, 1))["embedding"]["position"]
    np.testing.assert_array_equal(square, weights.grafted(arrays, [rule], like)["embedding"]["position"])
    assert not np.allclose(square, wide)


REMEDIES = {
    "an integer": ("w:cast", np.ones(2, np.int64), "only floats are cast; save it as float32"),
    "a number beyond float32": ("w:cast", np.full(2, 1e300), "beyond float32, which ends at 3.4e+38: mend the file"),
    "a number beyond float16": (
        "w:cast=float16",
        np.full(2, 1e5, np.float32),
        "beyond float16, which ends at 6.55e+04",
    ),
    "another cast": ("w:cast=float16", np.ones(2, np.float32), "a rule casts it to float16; write `cast` alone"),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_the_remedy_of_a_cast_is_one(case):
    rule, array, message = REMEDIES[case]
    assert message in refusal({"w": array}, [rule], {"w": np.zeros(2, np.float32)})


def test_what_a_rule_can_not_do_is_not_advised(tmp_path):
    text = refusal({"block.1.w": np.ones(2)}, ["block.*.w:to=block_*-2/w"], {"block_0": {"w": np.ones(2)}})
    assert "moves '1' of 'block.1.w' by -2, to -1: no number is below 0" in text
    text = refusal({"": np.ones(2), "b": np.ones(2)}, ["b:to=b"], {"a": np.zeros(2), "b": np.zeros(2)})
    assert "has no name" in text and "source_rename" not in text
    text = refusal({"a" * 200_000: np.ones(2)}, [], {"b": np.zeros(2)})
    assert len(text) < 1000 and "aaa...aaa" in text
    text = refusal({"qkv": np.ones((4, 9))}, ["qkv:transpose:split:to={a,b}"], {"a": np.ones((4, 4)), "b": np.ones(4)})
    assert "'qkv' is float64[4, 9], and becomes float64[9, 4]" in text
    with pytest.raises(InputError, match="are a folder: give a file of rules in it"):
        weights.read_rules(str(tmp_path))


def test_query_key_and_value_that_lie_together_head_by_head_are_parted_as_the_page_says():
    rules = re.findall(r"^blocks.*reshape=3\+3.*$", (Path(weights.__file__).parent / "README.md").read_text(), re.M)
    rng = np.random.default_rng(3)
    kernels = [rng.normal(size=(48, 3, 16)) for _ in range(3)]
    rows = [kernel[:, head].T for head in range(3) for kernel in kernels]
    attention = {name: {"kernel": np.zeros((48, 3, 16))} for name in ("query", "key", "value")}
    like = {"block_0": {"attention": attention}}
    params = weights.grafted({"blocks.0.qkv.weight": np.concatenate(rows)}, list(map(weights.rule, rules)), like)
    for name, kernel in zip(attention, kernels, strict=True):
        np.testing.assert_array_equal(params["block_0"]["attention"][name]["kernel"], kernel)
