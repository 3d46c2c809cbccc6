"""Planted bugs, each after a public report: what each does to the numbers, and what the audit says of it."""

import functools
import re
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from planted import harm
from planted.loops import clean, loads, network, optax_misused, optax_public, reports

from tljax import audit, optimizer, paths
from tljax.audit.restores import restore as audit_restore
from tljax.types import InputError

BUGS = {bug.build.__name__: bug for bug in reports.BUGS}
LOADS = {load.__name__: (load, lacking) for load, lacking in loads.LOADS}


@pytest.fixture(autouse=True)
def anyone_s_jax():
    """The loops add biases as most people do: (items, width) + (width,)."""
    with jax.numpy_rank_promotion("allow"):
        yield


def reported(report):
    """{(claim, path)} of what a report refutes, and of what it proves to be idle."""
    return {(finding.claim, finding.path) for finding in (*report.refuted, *report.select("idle", "proved"))}


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
    claim = BUGS[name].claims[0][0]
    proved = {finding.path for finding in audited(name, False).select(claim, "proved")}
    assert claim == "idle" or not proved & harmed_paths


@pytest.mark.slow
@pytest.mark.parametrize("build", clean.LOOPS, ids=lambda build: build.__name__)
def test_a_clean_loop_leaves_what_is_frozen_and_moves_the_rest(build):
    loop = build()
    assert not harm.moved(loop)
    assert not harm.unmoved(loop)


@pytest.mark.parametrize("name", LOADS)
def test_a_planted_load_leaves_leaves_out_and_the_clean_one_none(name):
    build, lacking = LOADS[name]
    for is_clean in (False, True):
        load = build(is_clean)
        weights, loaded = harm.leaves(load.weights), harm.leaves(load.loaded)
        plan = load.plan or {path: path for path in loaded}
        absent = {
            path
            for path, weight in plan.items()
            if weight not in weights or not np.array_equal(weights[weight], loaded[path])
        }
        assert absent == (set() if is_clean else set(lacking))


def test_thirty_reports_at_least_and_no_report_twice():
    numbers = [bug.report for bug in reports.BUGS] + [load.__doc__.partition(": ")[0] for load, _ in loads.LOADS]
    assert len(set(numbers)) == len(numbers) >= 30


# ---- What the audit says of the loops


@functools.cache
def audited(name, is_clean):
    """The audit of a planted bug, or of its clean form."""
    loop = BUGS[name].build(is_clean)
    return audit.step(loop.step, loop.state, loop.batch, loop.mask, **loop.options)


MISSED: dict[str, str] = {}
"""Bugs that the audit does not find, and why."""

COSTS = {"state", "idle"}
"""Claims that are of waste: what they say of a loop is no alarm, and is true of some that have no bug."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_the_audit_refutes_what_a_planted_bug_breaks(name, request):
    if name in MISSED:
        request.applymarker(pytest.mark.xfail(reason=MISSED[name], strict=False))
    report = audited(name, False)
    for claim, path in BUGS[name].claims:
        assert any(claim == other and path in leaf for other, leaf in reported(report)), report.table()
    assert all(finding.grade == "changed" for finding in report.select("frozen", "refuted"))
    assert {claim for claim, _ in reported(report)} - COSTS <= {claim for claim, _ in BUGS[name].claims}, report.table()
    assert not report.undecided, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_the_audit_raises_no_alarm_at_the_loop_without_the_bug(name):
    report = audited(name, True)
    loop = BUGS[name].build(True)
    alarms = {(claim, path) for claim, path in reported(report) if claim not in COSTS}
    assert not alarms, report.table()
    planted = BUGS[name].claims
    assert not any(claim == other and path in leaf for claim, path in planted for other, leaf in reported(report))
    assert {path for claim, path in reported(report) if claim == "state"} <= harm.moments(loop), report.table()
    assert not report.undecided, report.table()


@pytest.mark.parametrize("build", clean.LOOPS, ids=lambda build: build.__name__)
def test_the_audit_proves_a_clean_loop(build):
    loop = build()
    report = audit.step(loop.step, loop.state, loop.batch, loop.mask, **loop.options)
    assert not report.refuted, report.table()
    assert not report.undecided, report.table()
    assert report.select("frozen", "proved")
    assert report.select("trains", "proved")


@pytest.mark.slow
def test_how_many_planted_bugs_are_found(capsys):
    refuted = [
        name
        for name, bug in BUGS.items()
        if {claim for claim, _ in bug.claims} & {c for c, _ in reported(audited(name, False))}
    ]
    undecided = [name for name in BUGS if audited(name, False).undecided or audited(name, True).undecided]
    with capsys.disabled():
        print(f"\n{len(refuted)} of {len(BUGS)} planted bugs refuted; not: {sorted(set(BUGS) - set(refuted))}")
        print(f"not decided in part: {undecided}")
    assert len(refuted) >= len(BUGS) - len(MISSED)


# ---- Optax's own ways to freeze, and every public transformation under tljax's


def shapes():
    return jax.eval_shape(network.init), network.head_only(network.init())


@pytest.mark.parametrize(("misuse", "claims"), optax_misused.MISUSES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_misuse_of_optax_is_named_for_what_it_is(misuse, claims):
    params, mask = shapes()
    report = audit.optimizer(misuse(mask), params, mask)
    assert {(claim, path.split("/")[0]) for claim, path in reported(report)} - {("state", "backbone")} == set(claims)
    assert not report.undecided
    for finding in report.select("frozen", "refuted"):
        assert ("as decay does" in finding.detail) == (misuse.__name__ in BY_DECAY)
        assert ("its gradient" in finding.detail) == (misuse.__name__ not in BY_DECAY)


BY_DECAY = {"decay_after_partition", "freeze_comes_first"}
"""Misuses in which a leaf moves though its gradient is cut."""


@pytest.mark.parametrize("misuse", [misuse for misuse, _ in optax_misused.MISUSES], ids=lambda misuse: misuse.__name__)
def test_optax_used_rightly_raises_no_alarm(misuse):
    params, mask = shapes()
    tx = misuse(mask, clean=True)
    report = audit.optimizer(tx, params, mask)
    kept = {path for path in paths.names(jax.eval_shape(tx.init, params)) if "backbone" in path}
    assert reported(report) == ({("state", "backbone/bias"), ("state", "backbone/kernel")} if kept else set())
    assert bool(kept) == (misuse is optax_misused.freeze_comes_first)
    assert not report.undecided
    assert len(report.select("frozen", "proved")) == 2


WHY_NOT = {
    "optax.contrib.differentially_private_aggregate": "gradient of each example",
    "optax.contrib.dpsgd": "gradient of each example",
    "optax.contrib.galore": "works on a tree of all parameters",
    "optax.contrib.scale_by_galore": "works on a tree of all parameters",
    "optax.contrib.scale_by_muon": "dimension numbers of each leaf",
    "optax.lookahead": "two sets of parameters",
    "optax.measure_with_ema": "gives a measure and no updates",
}
"""Public names that are no optimizer of a tree of parameters by its gradient, and so cannot be asked about."""

TRAINS_NOTHING = {"optax.freeze", "optax.set_to_zero"}


def test_every_public_transformation_of_optax_is_proved_under_masked_or_named(capsys):
    params, mask = shapes()
    proved, named = [], []
    for name, function in optax_public.public().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tx = optimizer.masked(optax_public.make(name, function), mask)
        if name in optax_public.EXTRA:
            tx = optax_public.with_loss(tx, optax_public.EXTRA[name])
        if name in WHY_NOT:
            with pytest.raises(InputError):
                audit.optimizer(tx, params, mask)
            named.append(name)
            continue
        report = audit.optimizer(tx, params, mask)
        assert not report.undecided, name
        assert {claim for claim, _ in reported(report)} == ({"trains"} if name in TRAINS_NOTHING else set()), name
        assert len(report.select("frozen", "proved")) == len(report.select("state", "proved")) == 2, name
        proved.append(name)
    assert set(named) == set(WHY_NOT)
    assert len(proved) > 100
    with capsys.disabled():
        print(f"\n{len(proved)} public transformations of optax proved under masked, {len(named)} named: {named}")


# ---- Loads, and the page


@pytest.mark.parametrize("name", LOADS)
def test_the_audit_names_what_a_planted_load_left_out(name):
    build, lacking = LOADS[name]
    for is_clean in (False, True):
        load = build(is_clean)
        report = audit_restore(load.weights, load.loaded, load.plan, fresh=load.fresh)
        assert reported(report) == ({("restored", path) for path in lacking} if not is_clean else set())
        assert not report.undecided
    load = build(False)
    with pytest.raises(AssertionError, match=lacking[0]):
        audit.restored(load.weights, load.loaded, load.plan, fresh=load.fresh)


def test_the_page_has_a_line_for_each_planted_bug_and_says_what_is_refuted_of_it():
    page = (Path(audit.__file__).parent / "BUGS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+#\d+) \| (.+) \| `(\w+)\.(\w+)` \| ([a-z, :]+) \| (.+) \|$", page, re.M)
    on_page = {(report, file, name, claims) for report, _, file, name, claims, _ in rows}
    builders = [(bug.build, ", ".join(dict.fromkeys(claim for claim, _ in bug.claims))) for bug in reports.BUGS]
    builders += [(load, "restored") for load, _ in loads.LOADS]
    planted = {
        (
            build.__doc__.partition(": ")[0],
            build.__module__.rpartition(".")[2],
            build.__name__,
            f"not found: {claims}" if build.__name__ in MISSED else claims,
        )
        for build, claims in builders
    }
    assert on_page == planted
    assert len(rows) == len(on_page) == page.count("#") - 1
