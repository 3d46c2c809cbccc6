"""Planted bugs, each after a public report: what each does to the numbers, and what the audit says of it."""

import jax
import numpy as np
import pytest
from planted import harm
from planted.loops import clean, loads, reports

BUGS = {bug.build.__name__: bug for bug in reports.BUGS}
LOADS = {load.__name__: (load, paths) for load, paths in loads.LOADS}


@pytest.fixture(autouse=True)
def anyone_s_jax():
    """The loops add biases as most people do: (items, width) + (width,)."""
    with jax.numpy_rank_promotion("allow"):
        yield


def harmed(bug, clean):
    """The paths that a bug's claims do not hold of, by running the loop."""
    claim = bug.claims[0][0]
    if claim == "unseen":
        return harm.leaking(bug.build, clean)
    if claim == "rate":
        return harm.wrong_rate(bug.build, clean)
    loop = bug.build(clean)
    if claim == "idle":
        return {"dropout_key"} if harm.repeats_itself(loop) else set()
    return {"frozen": harm.moved, "trains": harm.unmoved, "state": harm.moments}[claim](loop)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_does_harm_and_the_clean_loop_none(name):
    harmed_paths = harmed(BUGS[name], clean=False)
    for _, path in BUGS[name].claims:
        assert any(path in other for other in harmed_paths), (path, harmed_paths)
    assert not harmed(BUGS[name], clean=True)


@pytest.mark.slow
@pytest.mark.parametrize("build", clean.LOOPS, ids=lambda build: build.__name__)
def test_a_clean_loop_leaves_what_is_frozen_and_moves_the_rest(build):
    loop = build()
    assert not harm.moved(loop)
    assert not harm.unmoved(loop)


@pytest.mark.parametrize("name", LOADS)
def test_a_planted_load_leaves_leaves_out_and_the_clean_one_none(name):
    build, paths = LOADS[name]
    for is_clean in (False, True):
        load = build(is_clean)
        weights, loaded = harm.leaves(load.weights), harm.leaves(load.loaded)
        plan = load.plan or {path: path for path in loaded}
        absent = {
            path for path, of in plan.items() if of not in weights or not np.array_equal(weights[of], loaded[path])
        }
        assert absent == (set() if is_clean else set(paths))


def test_thirty_reports_at_least_and_no_report_twice():
    numbers = [bug.report for bug in reports.BUGS] + [load.__doc__.partition(": ")[0] for load, _ in loads.LOADS]
    assert len(set(numbers)) == len(numbers) >= 30
