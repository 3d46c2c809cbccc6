"""Masks: built by rules that must match, combined, split and joined, linted, shown, written and read."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tljax import masks, optimizer, paths, schedules
from tljax.types import InputError, Phase


class Pair(NamedTuple):
    left: object
    right: object


@flax.struct.dataclass
class Flax:
    kernel: object
    name: str = flax.struct.field(pytree_node=False, default="a word, no leaf")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    kernel: object
    rest: object

    def __call__(self, x):
        """Callable, as the modules of Equinox are."""
        return x


PARAMS = {"hidden_0": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}, "head": {"kernel": np.ones((2, 2))}}
ODD = {
    "list": [np.ones(2), (np.ones(1), None)],
    "pair": Pair(np.float32(2.0), {"empty": {}, "steps": np.array(3)}),
    "norm": {"scale": np.ones(2), "batch_stats": {"mean": np.zeros(2)}},
}
TREES = {
    "dict": PARAMS,
    "odd": ODD,
    "list": [np.ones(2), np.ones((2, 2))],
    "tuple": (np.ones(2), (np.ones(1), np.ones(3))),
    "namedtuple": Pair(np.ones(2), Pair(np.ones(1), np.ones(3))),
    "flax": {"a": Flax(np.ones((2, 3))), "b": Flax(np.ones(2))},
    "dataclass": Plain(np.ones((2, 3)), {"bias": np.ones(3)}),
    "nnx": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "nnx with keys": nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))),
    "empty and None": {"a": {}, "b": None, "c": [None, (), np.ones(2)], "d": np.ones(1)},
    "integers": {"step": np.array(3), "count": 7, "kernel": np.ones(2), "bias": np.ones(1)},
    "scalars": {"a": 1.5, "b": np.float32(2.0), "c": jnp.float32(3.0), "d": 4},
    "int keys": {0: np.ones(2), 1: {2: np.ones(1)}},
    "bare array": np.ones((2, 2)),
    "bare float": 1.5,
}


def leaves(tree):
    return dict(paths.items(tree))


def test_paths_name_every_leaf_with_slashes():
    expected = ["list/0", "list/1/0", "norm/batch_stats/mean", "norm/scale", "pair/left", "pair/right/steps"]
    assert paths.names(ODD) == expected


def test_two_leaves_with_one_path_are_refused():
    with pytest.raises(InputError, match="two leaves are named 'a/b'"):
        paths.names({"a/b": 1.0, "a": {"b": 2.0}})


def test_by_path_keeps_the_tree_and_never_trains_integers_none_or_running_statistics():
    mask = masks.by_path(ODD, lambda path: True)
    assert jax.tree.structure(mask) == jax.tree.structure(ODD)
    frozen = {path for path, m in leaves(mask).items() if not m}
    assert frozen == {"pair/right/steps", "norm/batch_stats/mean"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/kernel", {"hidden_0/kernel", "head/kernel"}),
        ("head/*", {"head/kernel"}),
        ("hidden_?/bias", {"hidden_0/bias"}),
        ("**", {"hidden_0/kernel", "hidden_0/bias", "head/kernel"}),
        ("hidden_0/**", {"hidden_0/kernel", "hidden_0/bias"}),
    ],
)
def test_globs_match_within_and_across_names(pattern, expected):
    assert {path for path, m in leaves(masks.by_glob(PARAMS, pattern)).items() if m} == expected


def test_a_star_does_not_cross_names_and_dots_are_literal():
    assert not paths.glob("*")("a/b")
    assert not paths.glob("a.b")("axb")


def test_rules_that_match_nothing_are_refused_with_the_nearest_names():
    with pytest.raises(InputError, match=r"'heed/\*\*' matches no leaf; nearest: 'head/kernel'"):
        masks.by_glob(PARAMS, "**/bias", "heed/**")
    with pytest.raises(InputError, match="prefix 'heed' holds no leaf; nearest: 'head'"):
        masks.under(PARAMS, ["hidden_0", "heed"])
    with pytest.raises(InputError, match="true for no leaf"):
        masks.by_path(PARAMS, lambda path: path == "nothing")
    with pytest.raises(InputError, match="no prefix"):
        masks.under(PARAMS, [])


def test_prefixes_are_whole_names():
    params = {"head": np.ones(1), "head_2": np.ones(1)}
    assert masks.under(params, "head") == {"head": True, "head_2": False}


def test_masks_combine_as_sets_do():
    a, b = {"x": True, "y": False, "z": False}, {"x": True, "y": True, "z": False}
    assert masks.union(a, b) == b
    assert masks.intersect(a, b) == a
    assert masks.invert(a) == {"x": False, "y": True, "z": True}
    assert masks.union(None, a) == a


def test_only_bools_of_one_tree_combine():
    with pytest.raises(InputError, match=r"leaf at 'x' is 0\.5, not a bool"):
        masks.union({"x": 0.5}, {"x": True})
    with pytest.raises(InputError, match="'y' only in another"):
        masks.union({"x": True}, {"x": True, "y": False})


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
def test_join_gives_back_what_split_took_apart(params):
    first = next(path for path, leaf in leaves(params).items() if paths.can_train(path, leaf))
    mask = masks.by_path(params, lambda path: path == first)
    trained, frozen = masks.split(params, mask)
    assert set(paths.names(trained)) == {path for path, m in leaves(mask).items() if m}
    assert set(paths.names(trained)) | set(paths.names(frozen)) == set(paths.names(params))
    whole = masks.join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("mask", [{"a": True}, {"a": {"w": True}, "c": True}, {"a": [True], "b": True}, True])
def test_a_mask_of_another_tree_does_not_split(mask):
    params = {"a": {"w": np.ones(2)}, "b": None}
    for apart in (masks.split, masks.static):
        with pytest.raises(InputError, match="the mask and the parameters are different trees"):
            apart(params, mask)


def test_numbers_and_arrays_count_as_trained_and_zero_as_frozen():
    mask = {"a": 0.5, "b": 0, "c": np.array([True, False])}
    params = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    assert masks.static(params, mask) == {"a": True, "b": False, "c": True}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True}, "'b' only in the parameters"),
        ({"a": True, "b": True, "c": True}, "'c' only in the mask"),
        ({"a": False, "b": False}, "freezes every leaf"),
        ({"a": True, "b": False}, "freezes 'b', which was drawn anew"),
        ({"a": True, "b": "yes"}, "leaf at 'b' is 'yes'"),
        ({"a": True, "b": -0.5}, "number at 'b' is -0.5"),
        ({"a": float("nan"), "b": True}, "number at 'a' is nan"),
        ({"a": True, "b": np.ones(3, bool)}, r"array at 'b' has shape \(3,\)"),
        ({"a": True, "b": np.ones((1, 2), bool)}, "does not broadcast"),
        ({"a": True, "b": np.zeros(2, bool)}, "all zero: write False"),
        ({"a": True, "b": np.array([0.5, np.nan])}, "array at 'b' has the number nan: it must be finite"),
        ({"a": True, "b": np.array([0.5, -1.0])}, r"array at 'b' has the number -1\.0"),
        ({"a": True, "b": np.array([-1, 1])}, r"array at 'b' has the number -1\.0"),
        ({"a": True, "b": jnp.array([np.inf, 1.0])}, "array at 'b' has the number inf"),
        ({"a": True, "b": np.ones(2, object)}, "leaf at 'b' is .*: give True"),
        ({"a": True, "b": 10**400}, "number at 'b' is inf"),
        ({"a": True, "b": 1j}, "leaf at 'b' is '1j'"),
        ({"a": True, "b": np.complex64(1)}, "leaf at 'b' is"),
        ({"a": True, "b": jax.random.key(0)}, "leaf at 'b' is .*: give True"),
        ({"a": True, "b": jnp.float32(-1)}, r"number at 'b' is -1\.0"),
        ({"a": True, "b": jnp.array(False)}, "freezes 'b', which was drawn anew"),
    ],
)
def test_lint_names_the_leaf_of_a_mask_that_cannot_be_meant(mask, message):
    with pytest.raises(InputError, match=message):
        masks.lint({"a": np.ones(2), "b": np.ones(2)}, mask, fresh={"a": False, "b": True})


def test_lint_refuses_a_leaf_that_leaked_out_of_a_traced_function():
    kept = []
    jax.jit(kept.append)(jnp.ones(2))
    with pytest.raises(InputError, match="leaf at 'a' is traced"):
        masks.lint({"a": np.ones(2)}, {"a": kept[0]})


@pytest.mark.parametrize("array", [np.array, jnp.array], ids=["numpy", "jax"])
def test_an_array_without_axes_is_the_bool_or_number_that_it_holds(array):
    params = {name: np.ones(2, np.float32) for name in "abcd"}
    mask = {"a": array(True), "b": array(False), "c": array(0.0), "d": array(0.5)}
    masks.lint(params, mask)
    assert masks.static(params, mask) == {"a": True, "b": False, "c": False, "d": True}
    assert set(masks.split(params, mask)[0]) == set(params) and masks.split(params, mask)[0]["b"] is None
    assert [row.trained for row in masks.table(params, mask)] == ["trained", "frozen", "frozen", "x 0.5"]
    assert masks.since(mask) == {"a": 0, "b": -1, "c": -1, "d": 0}
    assert masks.from_json(masks.to_json(mask), params) == {"a": True, "b": False, "c": 0.0, "d": 0.5}
    tx = optimizer.masked(optax.sgd(1.0), mask)
    updates, _ = tx.update(params, tx.init(params), params)
    assert [float(updates[name][0]) for name in params] == [-1.0, 0.0, 0.0, -0.5]


def test_lint_accepts_every_kind_of_leaf():
    params = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2), "d": np.ones(2)}
    mask = {"a": True, "b": False, "c": 0.1, "d": jnp.array([True, False])}
    masks.lint(params, mask)
    assert masks.static(params, mask) == {"a": True, "b": False, "c": True, "d": True}


def test_the_table_counts_what_trains():
    params = {"a": np.ones((2, 3)), "b": np.ones(4), "c": np.ones(4), "d": np.float32(1)}
    rows = masks.table(params, {"a": True, "b": np.array([1, 0, 0, 1], bool), "c": 0.1, "d": False})
    assert [(r.trained, r.size, r.trained_size) for r in rows] == [
        ("trained", 6, 6),
        ("part", 4, 2),
        ("x 0.1", 4, 4),
        ("frozen", 1, 0),
    ]


def test_json_gives_the_mask_back_for_the_same_model_only():
    mask = masks.by_glob(PARAMS, "**/bias")
    assert masks.from_json(masks.to_json(mask), PARAMS) == mask
    with pytest.raises(InputError, match="different models"):
        masks.from_json(masks.to_json(mask), {"other": np.ones(1)})
    with pytest.raises(InputError, match=r"array: save it as \.npz"):
        masks.to_json({"a": np.ones(2)})


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
def test_masks_of_any_pytree_are_built_combined_linted_shown_written_and_followed(params, tmp_path):
    able = {path for path, leaf in leaves(params).items() if paths.can_train(path, leaf)}
    everything = masks.by_path(params, lambda path: True)
    assert masks.by_glob(params, "**") == masks.by_size(params) == masks.kept(params, None) == everything
    nothing = masks.intersect(everything, masks.invert(everything))
    assert {path for path, m in leaves(everything).items() if m} == able
    assert masks.union(nothing, everything, None) == everything == masks.also(nothing, everything)
    assert masks.kept(params, everything) == nothing
    assert masks.scale(masks.scale(everything, 0.5), 2.0) == everything  # True == 1.0
    scores = jax.tree.map(lambda leaf: np.full(jnp.shape(leaf), 1.0), params)
    chosen = masks.top(scores, 1.0, among=everything)
    for mask in (everything, masks.scale(everything, 0.1), chosen):
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        masks.lint(params, mask, fresh=everything)
        masks.lint_phases(params, [Phase(0.0, mask)], fresh=everything)
        assert {row.path for row in masks.table(params, mask) if row.trained_size} == able
        masks.save(mask, tmp_path / "mask")
        again = masks.load(tmp_path / "mask", params)
        assert masks.equal(again, mask) and masks.digest(again) == masks.digest(mask)
        ages = leaves(masks.since(nothing, mask, mask))
        assert ages == {path: 1 if path in able else -1 for path in leaves(params)}
    assert masks.from_json(masks.to_json(everything), params) == everything


def test_a_prefix_may_be_a_whole_path_and_nnx_ends_in_value():
    params = TREES["nnx"]
    assert paths.names(params) == ["bias/value", "kernel/value"]
    assert leaves(masks.under(params, "bias")) == {"bias/value": True, "kernel/value": False}
    assert [masks.leaf_name(path) for path in paths.names(params)] == ["bias", "kernel"]


def test_by_size_takes_both_ends_and_says_what_sizes_there_are():
    assert leaves(masks.by_size(PARAMS, at_least=2, at_most=4)) == {
        "head/kernel": True,
        "hidden_0/bias": True,
        "hidden_0/kernel": False,
    }
    with pytest.raises(InputError, match=r"holds 7 to inf numbers; leaves hold \[4, 2, 6\]"):
        masks.by_size(PARAMS, at_least=7)
    with pytest.raises(InputError, match="no leaf that can train"):
        masks.by_size({"steps": np.array(3), "kernel": np.ones(2)}, at_most=1)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.28, 0.5, 0.77, 1.0])
def test_top_selects_the_elements_that_a_sort_puts_first(array, fraction):
    values = np.random.default_rng(0).integers(0, 6, 24).astype(np.float32)  # many ties
    scores = {"a": array(values[:12].reshape(3, 4)), "b": [array(values[12:13]), array(values[13:])]}
    mask = masks.top(scores, fraction)
    count = max(1, round(fraction * 24))
    expected = np.isin(np.arange(24), np.argsort(-values, kind="stable")[:count])
    whole = jax.tree.map(lambda m, score: np.broadcast_to(m, score.shape).ravel(), mask, scores)
    np.testing.assert_array_equal(np.concatenate(jax.tree.leaves(whole)), expected)
    for m in jax.tree.leaves(mask):
        assert m is False or (isinstance(m, np.ndarray) and m.dtype == bool and m.any())


def test_top_chooses_among_the_leaves_it_is_given_and_never_integers_or_holes():
    scores = {"a": np.array([9.0, 8.0]), "b": np.array([1.0, 2.0]), "c": None, "d": np.array([99, 99])}
    among = {"a": False, "b": True, "c": True, "d": True}
    mask = masks.top(scores, 0.5, among=among)
    assert masks.equal(mask, {"a": False, "b": np.array([False, True]), "c": False, "d": False})
    alone = masks.top(scores, 0.5)
    assert masks.equal(alone, {"a": np.array([True, True]), "b": False, "c": None, "d": False})
    assert masks.top({"a": 0.5, "b": np.array(0.7)}, 0.5) == {"a": False, "b": True}
    half = masks.top({"a": jnp.array([1.0, 2.0], jnp.bfloat16)}, 0.5)
    assert masks.equal(half, {"a": np.array([False, True])})


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_top_refuses_a_fraction_that_is_none(fraction):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        masks.top({"a": np.ones(2)}, fraction)


def test_top_refuses_what_has_no_rank():
    with pytest.raises(InputError, match="score at 'b/0' is NaN"):
        masks.top({"a": np.ones(2), "b": [np.array([1.0, np.nan])]}, 0.5)
    with pytest.raises(InputError, match="no elements to choose among; leaves: 'a'"):
        masks.top({"a": np.ones(2)}, 0.5, among={"a": False})
    with pytest.raises(InputError, match="no elements"):
        masks.top({"a": np.array([1, 2])}, 0.5)
    with pytest.raises(InputError, match="the scores have 'b', and `among` has not"):
        masks.top({"a": np.ones(2), "b": np.ones(2)}, 0.5, among={"a": True})
    with pytest.raises(InputError, match=r"leaf at 'a' is 0\.5, not a bool"):
        masks.top({"a": np.ones(2)}, 0.5, among={"a": 0.5})


def test_scale_multiplies_numbers_and_leaves_false():
    mask = {"a": True, "b": False, "c": 0.5, "d": np.bool_(True)}
    assert masks.scale(mask, 0.1) == {"a": 0.1, "b": False, "c": 0.05, "d": 0.1}
    traced = jax.jit(lambda factor: masks.scale({"a": True, "b": 0.5}, factor))(jnp.float32(0.5))
    assert traced == {"a": 0.5, "b": 0.25}
    arrays = masks.scale({"a": np.array([True, False]), "b": np.array([0.5, 2.0])}, 0.5)
    assert arrays["a"].tolist() == [0.5, 0.0] and arrays["b"].tolist() == [0.25, 1.0]
    smaller = masks.scale(mask, jnp.exp(-1.0))
    masks.lint({name: np.ones(2) for name in mask}, smaller)
    assert smaller["a"] == pytest.approx(np.exp(-1)) and smaller["b"] is False
    for factor in (-1.0, float("nan"), float("inf"), jnp.float32(-1)):
        with pytest.raises(InputError, match="finite and at least 0"):
            masks.scale(mask, factor)


def test_also_trains_what_is_fresh_whatever_the_other_leaves_are():
    part = np.array([True, False])
    mask = masks.also({"a": 0.1, "b": part, "c": False}, {"a": False, "b": False, "c": True})
    assert masks.equal(mask, {"a": 0.1, "b": part, "c": True})
    assert masks.also({"a": 0.1}, None) == {"a": 0.1}
    with pytest.raises(InputError, match="different trees"):
        masks.also({"a": 0.1}, {"b": True})


SAME = [
    ({"a": True}, {"a": 1.0}),
    ({"a": False}, {"a": 0}),
    ({"a": -0.0}, {"a": False}),
    ({"a": 0.5}, {"a": np.float64(0.5)}),
    ({"a": 0.5}, {"a": jnp.array(0.5)}),
    ({"a": np.array([1, 0])}, {"a": jnp.array([True, False])}),
    ({"a": None, "b": True}, {"a": None, "b": True}),
]
DIFFERENT = [
    ({"a": True}, {"a": False}),
    ({"a": True}, {"b": True}),
    ({"a": True}, {"a": 0.5}),
    ({"a": True}, {"a": np.array([True])}),
    ({"a": np.array([True, False])}, {"a": np.array([False, True])}),
    ({"a": np.array([[True, True]])}, {"a": np.array([[True], [True]])}),
    ({"a": True, "b": True}, {"a": True}),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_masks_that_train_alike_are_equal_and_have_one_digest(a, b):
    assert masks.equal(a, b) and masks.digest(a) == masks.digest(b)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_masks_that_differ_anywhere_are_not_equal_and_have_two_digests(a, b):
    assert not masks.equal(a, b) and masks.digest(a) != masks.digest(b)


def test_equal_asks_for_the_same_containers_and_digest_for_the_same_paths():
    assert not masks.equal([True], (True,))
    assert masks.digest([True]) == masks.digest((True,))
    assert len(masks.digest({"a": True})) == 64
    with pytest.raises(InputError, match="leaf is 'yes'"):
        masks.digest({"a": "yes"})


def test_a_saved_mask_comes_back_exactly_and_arrays_stand_beside_it(tmp_path):
    params = {"allow_pickle": np.ones((2, 2)), "b": np.ones(3), "c": np.ones(1), "d": np.ones(1), "a/b": np.ones(2)}
    mask = {"allow_pickle": np.eye(2, dtype=bool), "b": 0.1, "c": True, "d": False, "a/b": np.array([True, False])}
    masks.save(mask, tmp_path / "mask")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mask.json", "mask.npz"]
    again = masks.load(tmp_path / "mask", params)
    assert masks.equal(again, mask)
    assert again["c"] is True and again["d"] is False and again["b"] == 0.1
    assert again["allow_pickle"].dtype == bool
    with pytest.raises(InputError, match="they are of different models"):
        masks.load(tmp_path / "mask", {"x": np.ones(1)})
    (tmp_path / "mask.npz").unlink()
    with pytest.raises(InputError, match=r"mask\.npz' does not exist"):
        masks.load(tmp_path / "mask", params)


def test_a_mask_without_arrays_is_one_file_and_a_missing_one_is_named(tmp_path):
    masks.save({"a": True}, str(tmp_path / "phase_0.5"))
    assert [file.name for file in tmp_path.iterdir()] == ["phase_0.5.json"]
    assert masks.load(tmp_path / "phase_0.5", {"a": 1.0}) == {"a": True}
    with pytest.raises(InputError, match=r"other\.json' does not exist"):
        masks.load(tmp_path / "other", {"a": 1.0})


@pytest.mark.parametrize("text", ['{"a": tr', "[1]", "3", '{"a": "yes"}', '{"a": null}', '{"a": NaN}', '{"a": -1}'])
def test_json_that_is_no_mask_is_refused(text, tmp_path):
    with pytest.raises(InputError):
        masks.from_json(text, {"a": np.ones(2)})
    (tmp_path / "mask.json").write_text(text)
    with pytest.raises(InputError):
        masks.load(tmp_path / "mask", {"a": np.ones(2)})


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b"", lambda b: b"text", lambda b: b[:-30] + b[-29:]])
@pytest.mark.parametrize("ending", ["json", "npz"])
def test_a_mask_whose_file_is_damaged_is_refused(damage, ending, tmp_path):
    params = {"a": np.ones(200), "b": np.ones(2)}
    masks.save({"a": np.arange(200) % 3 > 0, "b": True}, tmp_path / "mask")
    file = tmp_path / f"mask.{ending}"
    file.write_bytes(damage(file.read_bytes()) + b"\xff")
    with pytest.raises(InputError, match=r"mask\.\*' are damaged"):
        masks.load(tmp_path / "mask", params)


def test_an_array_that_does_not_fit_its_leaf_is_refused(tmp_path):
    masks.save({"a": np.array([True, False])}, tmp_path / "mask")
    with pytest.raises(
        InputError, match=r"has shape \(2,\), which does not broadcast to \(3,\): give a bool, a number"
    ):
        masks.load(tmp_path / "mask", {"a": np.ones(3)})


FIRST, SECOND, ALL = np.array([True, False]), np.array([False, True]), np.array([True, True])


@pytest.mark.parametrize(
    ("history", "age"),
    [
        ([True], 0),
        ([False], -1),
        ([False, True], 1),
        ([True, True, True], 0),
        ([True, False, True], 2),
        ([True, True, False], -1),
        ([True, 0.0, 0.5], 2),
        ([0.1, 0.5, True], 0),
        ([0, np.float32(0.5), 1], 1),
        ([FIRST, FIRST], 0),
        ([FIRST, SECOND], 1),
        ([FIRST, ALL, FIRST], 0),
        ([FIRST, True], [0, 1]),
        ([FIRST, 0.5], [0, 1]),
        ([np.array([0.1, 0.0]), np.array([0.2, 0.3])], [0, 1]),
        ([ALL, True], 0),
        ([True, FIRST], 0),
        ([True, FIRST, ALL], [0, 2]),
        ([FIRST, False, FIRST], 2),
        ([jnp.array(FIRST), jnp.array(ALL)], [0, 1]),
        ([np.array([[True], [False]]), np.array([[True, False]])], [[0, -1], [1, -1]]),
        ([np.array([[True, False]]), np.array([[True], [False]])], [[0, 1], [-1, -1]]),
    ],
)
def test_since_tells_the_phase_from_which_a_leaf_or_an_element_trains_without_a_gap(history, age):
    [since] = masks.since(*({"leaf": m} for m in history)).values()
    assert np.asarray(since).tolist() == age


def test_since_keeps_the_tree_and_refuses_different_trees_and_no_mask():
    ages = masks.since(Pair(True, [False]), Pair(True, [True]))
    assert ages == Pair(0, [1])
    with pytest.raises(InputError, match="different trees"):
        masks.since({"a": True}, {"b": True})
    with pytest.raises(InputError, match="no mask given"):
        masks.since()


BODY = {"a": True, "b": False}
BOTH = {"a": True, "b": True}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases are a list of one Phase"),
        (BOTH, "phases are a list of one Phase"),
        ([BOTH], "phases are a list of one Phase"),
        ([Phase(0.1, BOTH)], r"phase 0 starts at 0\.1: the first phase starts at 0\.0"),
        (
            [Phase(0.0, BOTH), Phase(0.0, BOTH)],
            r"phase 1 starts at 0\.0, and phase 0 at 0\.0: starts strictly increase",
        ),
        ([Phase(0.0, BOTH), Phase(0.5, BOTH), Phase(0.4, BOTH)], r"phase 2 starts at 0\.4, and phase 1 at 0\.5"),
        ([Phase(0.0, BOTH), Phase(1.0, BOTH)], "phase 1 starts at 1.0: .* below 1"),
        ([Phase(-0.1, BOTH)], "phase 0 starts at -0.1"),
        ([Phase(0.0, BOTH), Phase(float("nan"), BOTH)], "phase 1 starts at nan"),
        ([Phase("0", BOTH)], "phase 0 starts at '0'"),
        ([Phase(0.0, BOTH), Phase(0.5, BODY)], "phase 1: the mask freezes 'b', which was drawn anew"),
        ([Phase(0.0, BODY), Phase(0.5, BOTH)], "phase 0: the mask freezes 'b', which was drawn anew"),
        ([Phase(0.0, lambda params, context: BOTH), Phase(0.5, {"a": -1.0, "b": True})], "phase 1: .* number at 'a'"),
    ],
)
def test_lint_names_the_phase_that_cannot_be_meant(phases, message):
    with pytest.raises(InputError, match=message):
        masks.lint_phases({"a": np.ones(2), "b": np.ones(2)}, phases, fresh={"a": False, "b": True})


def test_lint_accepts_phases_and_leaves_strategies_to_their_boundary():
    params = {"a": np.ones(2), "b": np.ones(2)}
    first, later = Phase(0, BOTH), Phase(0.5, lambda params, context: BODY)
    masks.lint_phases(params, (first, later), fresh=BOTH)
    with pytest.raises(InputError, match="phase 1: the mask freezes 'b'"):
        masks.lint_phases(params, (first, Phase(0.5, later.mask(params, None))), fresh=BOTH)


def test_a_mask_that_can_be_called_is_a_mask_all_the_same():
    assert not masks.is_strategy(Plain(True, {"bias": True}))
    with pytest.raises(InputError, match=r"^the mask freezes every leaf"):
        masks.lint_phases(TREES["dataclass"], [Phase(0.0, Plain(False, {"bias": False}))])


PART = np.array([True, False])


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (True, True),
        (np.bool_(False), False),
        (1, True),
        (1.0, True),
        (0.0, False),
        (-0.0, False),
        (np.array(0.5), 0.5),
        (jnp.float32(0.5), 0.5),
        (np.array(True), True),
        (2, 2.0),
        (PART, PART),
        (jnp.array(PART), PART),
        (np.array([1, 0]), PART),
        (np.array([1.0, 0.0]), PART),
        (jnp.array([1.0, 0.0], jnp.bfloat16), PART),
        (np.array([0.5, 0.0]), np.array([0.5, 0.0])),
        (np.array([0, 3]), np.array([0.0, 3.0])),
        (np.array([0.25]), np.array([0.25])),
    ],
)
def test_canonical_knows_four_kinds_of_leaf(leaf, expected):
    canonical = masks.canonical({"w": np.ones(2)}, {"w": leaf})["w"]
    assert type(canonical) is type(expected)
    assert np.array_equal(canonical, expected) and np.asarray(canonical).dtype == np.asarray(expected).dtype


def test_a_mask_of_rates_is_linted_shown_written_and_told_apart(tmp_path):
    params = {"a": np.ones((2, 3)), "b": np.ones(2)}
    mask = {"a": np.array([[0.1], [0.0]]), "b": jnp.array([0.5, 0.25])}
    masks.lint(params, mask)
    assert masks.static(params, mask) == {"a": True, "b": True}
    rows = {row.path: (row.trained, row.trained_size) for row in masks.table(params, mask)}
    assert rows == {"a": ("x 0.1 to 0.1", 3), "b": ("x 0.25 to 0.5", 2)}
    masks.save(mask, tmp_path / "mask")
    again = masks.load(tmp_path / "mask", params)
    assert masks.equal(again, mask) and masks.digest(again) == masks.digest(mask)
    selecting = {"a": np.array([[True], [False]]), "b": np.array([True, True])}
    assert not masks.equal(selecting, mask) and masks.digest(selecting) != masks.digest(mask)
    with pytest.raises(InputError, match=r"does not broadcast to \(2, 3\)"):
        masks.canonical(params, {"a": np.full(2, 0.5), "b": True})


def test_bools_and_bool_arrays_combine_by_element():
    a, b = {"x": PART, "y": PART, "z": True}, {"x": ~PART, "y": False, "z": PART}
    assert masks.equal(masks.union(a, b), {"x": PART | ~PART, "y": PART, "z": True})
    assert masks.equal(masks.intersect(a, b), {"x": PART & ~PART, "y": False, "z": PART})
    assert masks.equal(masks.invert(a), {"x": ~PART, "y": ~PART, "z": False})
    with pytest.raises(InputError, match=r"arrays at 'x' have the shapes \(2,\) and \(3,\)"):
        masks.union({"x": PART}, {"x": np.ones(3, bool)})
    with pytest.raises(InputError, match="not a bool: combine bools, then scale"):
        masks.union({"x": np.array([0.5, 1.0])}, {"x": PART})


OUTSIDE = r"build masks outside jax\.jit"
BARS = {"body": np.ones(2), "head": np.ones(2)}
READERS = {
    "split": lambda mask: masks.split(BARS, mask)[0],
    "static": lambda mask: masks.static(BARS, mask),
    "trains": lambda mask: masks.trains(mask["body"]),
    "lint": lambda mask: masks.lint(BARS, mask),
    "table": lambda mask: masks.table(BARS, mask),
    "since": lambda mask: masks.since(mask),
    "union": lambda mask: masks.union(mask, mask),
    "invert": lambda mask: masks.invert(mask),
    "equal": lambda mask: masks.equal(mask, mask),
    "digest": lambda mask: masks.digest(mask),
    "canonical": lambda mask: masks.canonical(BARS, mask),
    "masked": lambda mask: optimizer.masked(optax.sgd(1.0), mask).init(BARS),
    "apply": lambda mask: optimizer.apply(BARS, BARS, mask),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("mask", [{"body": False, "head": True}, {"body": 0, "head": 1}], ids=["bools", "integers"])
def test_a_mask_that_is_an_argument_of_jit_is_refused(reader, mask):
    with pytest.raises(InputError, match=OUTSIDE):
        jax.jit(lambda mask: reader(mask) and None)(mask)


@pytest.mark.parametrize(
    "transform",
    [
        lambda step: jax.vmap(step),
        lambda step: lambda mask: jax.lax.scan(lambda carry, mask: (carry, step(mask)), 0, mask),
        lambda step: lambda mask: jax.pmap(step)(mask),
        lambda step: lambda mask: jax.lax.cond(True, step, step, jax.tree.map(lambda leaf: leaf[0], mask)),
        lambda step: lambda mask: jax.lax.map(step, mask),
    ],
    ids=["vmap", "scan", "pmap", "cond", "map"],
)
def test_a_mask_that_is_data_of_another_transformation_is_refused(transform):
    mask = {"body": np.array([False]), "head": np.array([True])}
    with pytest.raises(InputError, match=OUTSIDE):
        transform(lambda mask: masks.split(BARS, mask)[0]["head"])(mask)


def test_a_mask_in_a_field_of_a_state_is_refused_under_jit():
    state = Pair(BARS, {"body": False, "head": True})
    with pytest.raises(InputError, match=OUTSIDE):
        jax.jit(lambda state: optimizer.apply(state.left, state.left, state.right))(state)


def test_a_traced_rate_may_stay_and_a_concrete_mask_may_be_used_under_jit():
    rated = jax.jit(lambda rate: masks.split(BARS, {"body": rate, "head": False})[0])(0.5)
    assert rated["head"] is None and rated["body"].tolist() == [1, 1]
    closed = {"body": jnp.array(False), "head": jnp.array(True)}
    assert jax.jit(lambda params: masks.split(params, closed)[0])(BARS)["body"] is None


AFFINE = {"scale": np.ones(3), "bias": np.ones(3)}
MOMENTS = {"mean": np.ones(3), "var": np.ones(3)}
MIXED = {
    "linen": ({"bn": AFFINE, "batch_stats": {"bn": MOMENTS}}, {"bn/scale", "bn/bias"}),
    "torch": (
        {"bn1": {"weight": np.ones(3), "running_mean": np.ones(3), "running_var": np.ones(3)}, "fc": np.ones(2)},
        {"bn1/weight", "fc"},
    ),
    "a state_dict": (
        {"bn.weight": np.ones(3), "bn.running_var": np.ones(3), "bn.num_batches_tracked": np.float32(3)},
        {"bn.weight"},
    ),
    "keras": (
        {"bn": {"gamma": np.ones(3), "moving_mean": np.ones(3), "moving_variance": np.ones(3)}},
        {"bn/gamma"},
    ),
    "tensorflow": ({"bn/moving_mean:0": np.ones(3), "bn/gamma:0": np.ones(3)}, {"bn/gamma:0"}),
    "haiku": ({"bn/~/mean_ema": {"average": np.ones(3)}, "bn": AFFINE}, {"bn/scale", "bn/bias"}),
    "averages": ({"ema_params": {"head": np.ones(2)}, "head": np.ones(2)}, {"head"}),
    "nnx, pure": ({"first": AFFINE | MOMENTS, "bn": dict(MOMENTS)}, {"first/scale", "first/bias"}),
    "a Gaussian's own mean": ({"prior": dict(MOMENTS), "head": np.ones(2)}, {"prior/mean", "prior/var", "head"}),
    "layers called mean": (
        {"mean": {"kernel": np.ones(3)}, "var": {"kernel": np.ones(3)}},
        {"mean/kernel", "var/kernel"},
    ),
}


@pytest.mark.parametrize(("params", "expected"), MIXED.values(), ids=MIXED)
def test_running_statistics_never_train_by_whatever_name(params, expected):
    everything = masks.by_path(params, lambda path: True)
    whole = jax.tree.map(lambda leaf: True, params)
    builders = {
        "by_path": everything,
        "by_glob": masks.by_glob(params, "**"),
        "by_size": masks.by_size(params),
        "under": masks.under(params, list(dict.fromkeys(path.split("/")[0] for path in expected))),
        "top": masks.static(params, masks.top(jax.tree.map(np.ones_like, params), 1.0)),
        "kept": masks.kept(params, None),
        "static": masks.static(params, whole),
        "rates": masks.static(params, masks.scale(whole, 0.5)),
    }
    for name, mask in builders.items():
        assert {path for path, m in leaves(mask).items() if m} == expected, name
    assert set(paths.names(masks.split(params, whole)[0])) == expected
    state = optimizer.masked(optax.sgd(0.1, momentum=0.9), whole).init(params)
    assert len(jax.tree.leaves(state)) == len(expected)


class Counter(nnx.Variable):
    """A variable of somebody's own, that is no parameter."""


def test_of_an_nnx_module_the_parameters_alone_train():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.seen = Counter(jnp.zeros(()))
            self.prior = nnx.Dict(
                mean=nnx.Param(jnp.zeros(3)), var=nnx.Param(jnp.ones(3)), scale=nnx.Param(jnp.ones(3))
            )

    network = Network(nnx.Rngs(0))
    expected = {f"head/{name}/value" for name in ("bias", "kernel")}
    expected |= {f"prior/{name}/value" for name in ("mean", "var", "scale")}
    for tree in (nnx.state(network), network):
        mask = masks.by_path(tree, lambda path: True)
        assert {path for path, m in leaves(mask).items() if m} == expected
        assert set(paths.names(masks.split(tree, jax.tree.map(lambda leaf: True, tree))[0])) == expected
    with pytest.raises(InputError, match="true for no leaf that can train"):
        masks.under(nnx.state(network), "first")


STACK = {"blocks": {"kernel": np.ones((6, 2, 2)), "bias": np.ones((6, 2))}, "head": np.ones(2)}


@pytest.mark.parametrize(
    ("which", "expected"),
    [(slice(4, None), [4, 5]), (slice(None, 1), [0]), (-1, [5]), (2, [2]), ([0, 3], [0, 3]), (range(2), [0, 1])],
)
def test_layers_of_a_stack_are_chosen_along_the_first_axis(which, expected):
    mask = masks.layers(STACK, "blocks", which)
    assert mask["head"] is False
    for name, shape in (("kernel", (6, 1, 1)), ("bias", (6, 1))):
        assert mask["blocks"][name].shape == shape
        assert np.flatnonzero(mask["blocks"][name]).tolist() == expected
    masks.lint(STACK, masks.union(mask, masks.under(STACK, "head")))


WHOLE = [np.int64, np.int32, np.int8, np.uint8, jnp.int32, jnp.asarray, np.asarray]
REAL = [np.float64, np.float32, np.float16, jnp.float32, jnp.bfloat16, jnp.asarray, np.asarray]
TRUTH = [np.bool_, jnp.bool_, jnp.asarray, np.asarray]


@pytest.mark.parametrize("number", WHOLE)
def test_whole_numbers_of_numpy_and_jax_are_whole_numbers(number):
    whole = {
        "layers": lambda n: masks.layers(STACK, "blocks", n(2)),
        "layers of a list": lambda n: masks.layers(STACK, "blocks", [n(0), n(3)]),
        "layers of a slice": lambda n: masks.layers(STACK, "blocks", slice(n(1), n(5), n(2))),
        "by_size": lambda n: masks.by_size(STACK, at_least=n(2), at_most=n(12)),
        "top": lambda n: masks.top(STACK, n(1)),
        "canonical": lambda n: masks.canonical({"a": np.ones(2)}, {"a": n(3)}),
        "trains": lambda n: (masks.trains(n(0)), masks.trains(n(2)), masks.selects(n(2))),
        "scale": lambda n: masks.scale({"a": True, "b": 100, "c": np.array([1.0, 0.0])}, n(3)),
    }
    for what, call in whole.items():
        assert masks.equal(call(number), call(int)), what
    if number not in (np.uint8,):
        assert masks.equal(masks.layers(STACK, "blocks", number(-1)), masks.layers(STACK, "blocks", 5))
    masks.lint_phases(STACK, [Phase(number(0), masks.under(STACK, "head"))])


@pytest.mark.parametrize("number", REAL)
def test_real_numbers_of_numpy_and_jax_are_real_numbers(number):
    params, half = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, {"a": 0.5, "b": True}
    mask = {"a": number(0.5), "b": True}
    assert masks.equal(mask, half) and masks.digest(mask) == masks.digest(half)
    assert masks.to_json(mask) == masks.to_json(half)
    assert masks.equal(masks.top(params, number(0.5)), masks.top(params, 0.5))
    assert masks.equal(masks.scale(half, number(0.5)), masks.scale(half, 0.5))
    assert masks.equal(masks.by_size(params, at_least=number(3.5)), masks.by_size(params, at_least=3.5))
    assert masks.equal(masks.canonical(params, mask), half) and masks.value(number(0.5)) == 0.5
    body = masks.under(params, "b")
    masks.lint_phases(params, [Phase(number(0), body), Phase(number(0.5), half)])
    with pytest.raises(InputError, match="phase 0 starts at"):
        masks.lint_phases(params, [Phase(number(2), body)])
    tx = optimizer.masked(optax.sgd(1.0), mask)
    step, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(step["a"], np.full(4, -0.5))
    moved = optimizer.apply(params, step, mask)
    np.testing.assert_array_equal(moved["a"], np.full(4, 0.5))
    with np.errstate(all="raise"):
        rates = schedules.rates("linear", number(0.5), number(0.25), np.int64(8))
    np.testing.assert_array_equal(rates, schedules.rates("linear", 0.5, 0.25, 8))


@pytest.mark.parametrize("truth", TRUTH)
def test_bools_of_numpy_and_jax_are_bools(truth):
    params = {"a": np.ones(2), "b": np.ones(2)}
    plain, other = {"a": True, "b": False}, {"a": False, "b": True}
    mask = {name: truth(value) for name, value in plain.items()}
    masks.require_bools("here", mask)
    for call in (
        lambda m: masks.union(m, {"a": False, "b": False}),
        lambda m: masks.intersect(m, {"a": True, "b": True}),
        masks.invert,
        lambda m: masks.kept(params, m),
        lambda m: masks.also({"a": 0.5, "b": 0.5}, m),
        lambda m: masks.top(params, 0.5, among=m),
        lambda m: masks.scale(m, 0.5),
        lambda m: masks.canonical(params, m),
        lambda m: masks.static(params, m),
        lambda m: masks.by_path(params, lambda path: truth(path == "a")),
    ):
        assert masks.equal(call(mask), call(plain))
    masks.lint(params, mask, {name: truth(False) for name in params})
    assert masks.since(mask, other) == masks.since(plain, other)
    rows = [truth(value) for value in (True, False, False, True, False, False)]
    for which in (rows, np.array([0, 3]), jnp.array([0, 3]), np.isin(np.arange(6), (0, 3))):
        assert masks.equal(masks.layers(STACK, "blocks", which), masks.layers(STACK, "blocks", [0, 3]))


def test_layers_refuse_what_is_no_stack_and_what_chooses_nothing():
    assert masks.layers(STACK, "blocks", slice(None)) == masks.under(STACK, "blocks")
    for which in (6, slice(6, None), [], "all", [0.5]):
        with pytest.raises(InputError, match=r"layers: .*'blocks'"):
            masks.layers(STACK, "blocks", which)
    with pytest.raises(InputError, match=r"no first axis of one length: 'a/x' \(2,\), 'a/y' \(3,\)"):
        masks.layers({"a": {"x": np.ones(2), "y": np.ones(3)}}, "a", 0)
    with pytest.raises(InputError, match="prefix 'block' holds no leaf; nearest: 'blocks'"):
        masks.layers(STACK, "block", 0)


def test_masks_are_matched_by_path_through_boxes_and_other_containers():
    plain = {"head": {"kernel": np.ones((2, 2))}, "body": {"kernel": np.ones((2, 2))}}
    variables = jax.tree.map(nnx.Param, plain)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, ("x", "y")), plain)
    trees = [plain, flax.core.freeze(plain), variables, boxed, nnx.State(variables)]
    for tree in trees:
        mask = masks.under(tree, "head")
        for other in trees:
            trained, frozen = masks.split(other, mask)
            assert masks.canonical(other, mask) == masks.under(other, "head")
            assert jax.tree.structure(masks.join(trained, frozen)) == jax.tree.structure(other)
            assert [path.removesuffix("/value") for path in paths.names(trained)] == ["head/kernel"]
    with pytest.raises(InputError, match="'tail/kernel' only in the mask"):
        masks.split(plain, {"head": {"kernel": True}, "tail": {"kernel": True}})


def test_a_traced_mask_is_refused_by_scale_too():
    """A traced bool times a number would be a traced rate, and train everything."""
    with pytest.raises(InputError, match="traced"):
        jax.jit(lambda mask: masks.scale(mask, 1.0))({"body": False, "head": True})


def test_globs_match_boxed_leaves_with_and_without_their_value():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.body, self.head = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

    state = nnx.state(Network(nnx.Rngs(0)))
    expected = {"body/kernel/value", "head/kernel/value"}
    for pattern in ("**/kernel", "**/kernel/value"):
        assert {path for path, m in leaves(masks.by_glob(state, pattern)).items() if m} == expected
        pure = masks.by_glob(nnx.to_pure_dict(state), pattern)
        assert {path for path, m in leaves(pure).items() if m} == {"body/kernel", "head/kernel"}


def test_none_for_a_leaf_and_a_rate_beyond_float32_are_named():
    params = {"body": np.ones(2), "head": np.ones(2)}
    with pytest.raises(InputError, match="the mask's leaf at 'body' is None"):
        masks.canonical(params, {"body": None, "head": True})
    for rate in (1e300, np.array([1e300, 1.0])):
        with pytest.raises(InputError, match=r"at 'body'.* it must be finite"):
            masks.canonical(params, {"body": rate, "head": True})
