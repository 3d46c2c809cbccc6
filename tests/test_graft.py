"""Graft: every leaf is copied, renamed, drawn anew, zeroed or dropped, or the plan is refused."""

import jax
import numpy as np
import pytest

from tljax import graft
from tljax.types import InputError

SOURCE = {
    "hidden_0": {"kernel": np.full((3, 2), 5.0), "bias": np.full(2, 6.0)},
    "head": {"kernel": np.full((2, 10), 7.0)},
}
TARGET = {"hidden_0": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}, "head": {"kernel": np.ones((2, 4))}}


def actions(plan):
    return {row.target or row.source: row.action for row in plan}


def test_copied_leaves_equal_the_source_and_fresh_ones_the_draw():
    plan = graft.plan(SOURCE, TARGET, fresh=["head"])
    params, fresh = graft.apply(plan, SOURCE, TARGET)
    np.testing.assert_array_equal(params["hidden_0"]["kernel"], SOURCE["hidden_0"]["kernel"])
    np.testing.assert_array_equal(params["head"]["kernel"], TARGET["head"]["kernel"])
    assert fresh == {"hidden_0": {"kernel": False, "bias": False}, "head": {"kernel": True}}
    assert [row.action for row in plan].count("dropped") == 1


def test_the_head_can_start_at_zero():
    plan = graft.plan(SOURCE, TARGET, zero=["head"])
    params, fresh = graft.apply(plan, SOURCE, TARGET)
    assert not np.any(params["head"]["kernel"]) and fresh["head"]["kernel"]


def test_without_a_source_everything_is_drawn_anew():
    params, fresh = graft.apply(graft.plan(None, TARGET), None, TARGET)
    assert all(jax.tree.leaves(fresh))
    np.testing.assert_array_equal(params["head"]["kernel"], TARGET["head"]["kernel"])


def test_renamed_leaves_say_so():
    source = {"backbone": SOURCE["hidden_0"], "head": SOURCE["head"]}
    plan = graft.plan(source, TARGET, fresh=["head"], rename={"backbone": "hidden_0"})
    assert actions(plan)["hidden_0/kernel"] == "renamed"
    params, _ = graft.apply(plan, source, TARGET)
    np.testing.assert_array_equal(params["hidden_0"]["bias"], SOURCE["hidden_0"]["bias"])


def test_every_leaf_of_both_sides_is_in_exactly_one_row():
    plan = graft.plan(SOURCE, TARGET, fresh=["head"])
    targets = [row.target for row in plan if row.target]
    sources = [row.source for row in plan if row.source]
    assert sorted(targets) == ["head/kernel", "hidden_0/bias", "hidden_0/kernel"]
    assert sorted(sources) == ["head/kernel", "hidden_0/bias", "hidden_0/kernel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fresh": []}, r"'head/kernel' is float64\[2, 10\], target leaf 'head/kernel' is float64\[2, 4\]"),
        ({"fresh": ["heed"]}, "prefix 'heed' holds no leaf; nearest: 'head'"),
        ({"fresh": ["head"], "rename": {"nothing": "hidden_0"}}, "rename rule 'nothing' matches no source leaf"),
        ({"fresh": ["head"], "rename": {"head": "hidden_0"}}, "would both become"),
        ({"fresh": ["head"], "rename": {"hidden_0": "hidden_9"}}, "target leaf 'hidden_0/bias'"),
    ],
)
def test_what_has_no_counterpart_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        graft.plan(SOURCE, TARGET, **change)


def test_a_source_leaf_is_never_dropped_in_silence():
    source = {**SOURCE, "hidden_1": {"bias": np.zeros(3)}}
    with pytest.raises(InputError, match=r"source leaf 'hidden_1/bias' \(3,\) has no place"):
        graft.plan(source, TARGET, fresh=["head"])


def test_a_dtype_is_never_cast_in_silence():
    source = {**SOURCE, "hidden_0": {"kernel": SOURCE["hidden_0"]["kernel"].astype(np.float16), "bias": np.zeros(2)}}
    with pytest.raises(InputError, match="float16"):
        graft.plan(source, TARGET, fresh=["head"])
