"""What `check` holds of the ends of a strategy: planted ones are red at their line, those of the folder green."""

import jax
import numpy as np
import pytest
from planted import ends as planted

from tljax import audit, masks, plugins
from tljax.audit import ends, problems
from tljax.audit.strategies import _lint, _on_all
from tljax.types import InputError, Method


@pytest.fixture(scope="module")
def tried():
    """An MLP, a tree with an integer, and one with a number of Python."""
    return [problems.from_model("mlp"), *problems.trees()[-2:]]


def red(method, options, tried):
    """{line: its detail} of those that fail, and the cases; the lines on a fit are of what its masks let move."""
    cases = [_lint(method, options, problem)[1] for problem in tried]
    checks = ends.untrained(cases, _on_all)
    if checks[0].passed:
        params, began = ends._moved(cases[0])
        reached, inputs = [cases[0].params, *began, params], problems.data(tried[0].shape).inputs[0]
        checks.append(ends.trained(cases[0], tried[0].model, reached, inputs))
    return {check.name: check.detail for check in checks if check.passed is False}, checks


@pytest.mark.parametrize(
    ("strategy", "finish", "row", "reason"),
    [
        (
            "everything",
            "forgets_to_name",
            ends.FORM,
            "'bias', 'kernel' only in what finish of the strategy gives as 'head'",
        ),
        ("everything", "drops_a_leaf", ends.FORM, "'hidden_0/bias'"),
        ("everything", "adds_an_axis", ends.FORM, "of float32[1, 8]"),
        ("everything", "rounds", ends.FORM, "of float16[8], not float32[8]"),
        ("everything", "averages_counts", ends.FORM, "'body/count' of float32[], not int32[]"),
        ("everything", "takes_a_name_that_is_taken", ends.FORM, "a result 'best', which has a meaning"),
        ("everything", "names_by_values", ends.FORM, "before training and length_"),
        ("everything", "fails", ends.FORM, "KeyError: 'no_such_leaf'"),
        ("until_it_is_flat", "asks_for_phases", ends.FORM, "its finish takes `phases`, which end by validation"),
        ("head", "shrinks_all", ends.KEPT, "'hidden_0/bias' does not train in any phase, but 'all' has it otherwise"),
        ("some_elements", "shrinks_all", ends.KEPT, "does not train in any phase"),
        ("everything", "counts_on", ends.KEPT, "on None, integers, empty dict: 'body/count' does not train"),
        ("everything", "draws_anew", ends.FOLLOWS, "two calls give 'noise' with other values at 'head/bias'"),
        ("everything", "averages_by_logarithms", ends.FINITE, "'end' is not finite at 'head/bias'"),
        ("everything", "overflows", ends.FINITE, "the outputs of 'large' are not finite"),
    ],
)
def test_a_planted_end_is_red_at_its_line(strategy, finish, row, reason, tried):
    faults, _ = red(Method(getattr(planted, strategy), finish=getattr(planted, finish)), {}, tried)
    assert row in faults and reason in faults[row], faults
    assert next(iter(faults)) == row


@pytest.mark.parametrize("name", ["wise_ft:curve=3", "wise_ft:probe=0.5", "lines"])
def test_the_ends_of_the_folder_are_green_also_beside_integers(name, tried):
    faults, checks = red(*plugins.method(name), tried)
    assert not faults
    assert [check.name for check in checks] == [ends.FORM, ends.KEPT, ends.FOLLOWS, ends.FINITE]
    assert checks[0].detail == "on mlp, None, integers, empty dict, scalars" and checks[3].detail.endswith(", on mlp")


def test_what_has_moved_is_what_trains_and_the_beginnings_of_phases_are_between(tried):
    _, case = _lint(*plugins.method("lp_ft"), tried[0])
    params, [began] = ends._moved(case)
    in_head = masks.under(case.params, "head")
    for of_head, first, middle, last in zip(*map(jax.tree.leaves, (in_head, case.params, began, params)), strict=True):
        assert np.array_equal(first, middle) is not of_head and not np.array_equal(middle, last)


def test_a_strategy_without_ends_has_no_line_on_them(tried):
    def of_trees_alone(params, context):
        if "head" in context.stages and "body" not in context.stages:
            raise InputError("it is for trees with a body")
        return planted.everything(params, context)

    method = Method(of_trees_alone)
    rows = {check.name for check in audit.check_strategy(method)}
    assert not rows & {ends.FORM, ends.KEPT, ends.FOLLOWS, ends.FINITE}
    checks = audit.check_strategy(method._replace(finish=planted.counts_on))
    assert {check.name for check in checks} - rows == {ends.FORM, ends.KEPT, ends.FOLLOWS}
    assert "'body/count' does not train" in next(check.detail for check in checks if check.name == ends.KEPT)
