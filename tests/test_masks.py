"""Masks: built by rules that must match, combined, split and joined, linted, shown."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import masks, paths
from tljax.types import InputError


class Pair(NamedTuple):
    left: object
    right: object


PARAMS = {"hidden_0": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}, "head": {"kernel": np.ones((2, 2))}}
ODD = {
    "list": [np.ones(2), (np.ones(1), None)],
    "pair": Pair(np.float32(2.0), {"empty": {}, "steps": np.array(3)}),
    "norm": {"scale": np.ones(2), "batch_stats": {"mean": np.zeros(2)}},
}


def leaves(tree):
    return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


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
    with pytest.raises(InputError, match="only another has 'y'"):
        masks.union({"x": True}, {"x": True, "y": False})


@pytest.mark.parametrize("params", [PARAMS, ODD], ids=["dicts", "odd"])
def test_join_gives_back_what_split_took_apart(params):
    mask = masks.by_glob(params, "**/kernel") if params is PARAMS else masks.by_glob(params, "list/**")
    trained, frozen = masks.split(params, mask)
    assert set(paths.names(trained)) == {path for path, m in leaves(mask).items() if m}
    assert set(paths.names(trained)) | set(paths.names(frozen)) == set(paths.names(params))
    whole = masks.join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True))


def test_numbers_and_arrays_count_as_trained_and_zero_as_frozen():
    mask = {"a": 0.5, "b": 0, "c": np.array([True, False])}
    params = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    assert masks.static(params, mask) == {"a": True, "b": False, "c": True}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True}, "only the parameters has 'b'"),
        ({"a": True, "b": True, "c": True}, "only the mask has 'c'"),
        ({"a": False, "b": False}, "freezes every leaf"),
        ({"a": True, "b": False}, "freezes 'b', which was drawn anew"),
        ({"a": True, "b": "yes"}, "leaf at 'b' is 'yes'"),
        ({"a": True, "b": -0.5}, "number at 'b' is -0.5"),
        ({"a": float("nan"), "b": True}, "number at 'a' is nan"),
        ({"a": True, "b": np.ones(3, bool)}, r"array at 'b' has shape \(3,\)"),
        ({"a": True, "b": np.ones((1, 2), bool)}, "does not broadcast"),
        ({"a": True, "b": np.zeros(2, bool)}, "all zero: write False"),
        ({"a": True, "b": np.array([0.5, 1.0])}, "values beside 0 and 1"),
    ],
)
def test_lint_names_the_leaf_of_a_mask_that_cannot_be_meant(mask, message):
    with pytest.raises(InputError, match=message):
        masks.lint({"a": np.ones(2), "b": np.ones(2)}, mask, fresh={"a": False, "b": True})


def test_lint_accepts_every_kind_of_leaf():
    params = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2), "d": np.ones(2)}
    masks.lint(params, {"a": True, "b": False, "c": 0.1, "d": jnp.array([True, False])})


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
