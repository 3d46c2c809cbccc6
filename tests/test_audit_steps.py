"""`audit.step` and `audit.optimizer`: what they prove, refute and leave open, against numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import audit, optimizer
from tljax.types import InputError

PARAMS = {"body": jnp.full((3, 4), 0.5), "head": jnp.full((4, 1), 0.25)}
SHAPES = jax.eval_shape(lambda: PARAMS)
MASK, FROZEN = {"body": False, "head": True}, {"body": True, "head": False}
BATCH = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)


def loss(params, batch):
    return jnp.square(jnp.tanh(batch @ params["body"]) @ params["head"] - 1).mean()


def step_of(tx):
    @jax.jit
    def step(state, batch):
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    return step


def begun(tx):
    return PARAMS, tx.init(PARAMS)


def verdicts(report):
    return {(finding.path, finding.claim): finding.verdict for finding in report.findings}


def only(report, path, claim):
    (finding,) = [finding for finding in report.select(claim) if finding.path == path]
    return finding


HELD = [("body", "frozen"), ("head", "trains"), ("body", "unseen")]
"""The claims of a loop that freezes the body."""
OUTSIDE = optax.masked(optax.set_to_zero(), FROZEN)
RIGHT = {
    "ours": optimizer.masked(optax.adamw(0.1), MASK),
    "partition": optax.partition({"on": optax.adamw(0.1), "off": optax.set_to_zero()}, {"body": "off", "head": "on"}),
    "freeze at the end": optax.chain(optax.masked(optax.adamw(0.1), MASK), optax.freeze(FROZEN)),
    "micro-batches": optax.MultiSteps(optimizer.masked(optax.adamw(0.1), MASK), 3),
    "no decay": optax.chain(OUTSIDE, optax.adam(0.1)),
    "a schedule": optax.chain(OUTSIDE, optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 50), 0.9)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_freezes_is_proved_for_all_inputs(name):
    for report in (
        audit.step(step_of(RIGHT[name]), begun(RIGHT[name]), BATCH, MASK),
        audit.optimizer(RIGHT[name], SHAPES, MASK),
    ):
        assert {verdicts(report)[claim] for claim in HELD} == {"proved"}
        assert only(report, "body", "frozen").grade == "equal"


WRONG = {
    "decay": (optax.chain(OUTSIDE, optax.adamw(0.1)), "frozen", "itself alone, as decay does"),
    "raw gradient": (optax.masked(optax.adam(0.1), MASK), "frozen", "its gradient"),
    "clip outside": (optax.chain(optax.clip_by_global_norm(1.0), RIGHT["ours"]), "unseen", "'head' depends on its"),
    "norm": (optax.chain(optax.normalize_by_update_norm(), RIGHT["ours"]), "unseen", "'head' depends on its"),
    "momentum": (optax.chain(optax.trace(0.9), RIGHT["ours"]), "state", "48 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_freeze_is_refuted(name):
    tx, claim, words = WRONG[name]
    reports = [audit.optimizer(tx, SHAPES, MASK)]
    if name != "raw gradient":  # compiling takes a second
        reports.append(audit.step(step_of(tx), begun(tx), BATCH, MASK))
    for report in reports:
        finding = only(report, "body", claim)
        assert finding.verdict == "refuted" and words in finding.detail
        assert {verdicts(report)[pair] for pair in HELD if pair != ("body", claim)} == {"proved"}


def test_the_numbers_of_a_refutation_are_those_of_the_step():
    def step(params, batch):
        gradients = jax.grad(loss)(params, batch)
        return {"body": params["body"] * (1 - 0.1 * 0.01), "head": params["head"] - gradients["head"]}

    finding = only(audit.step(step, PARAMS, BATCH, MASK), "body", "frozen")
    assert f"0.5 becomes {np.float32(0.5) * np.float32(0.999):.6g} at [0, 0] in step 1" in finding.detail
    assert finding.source.startswith("test_audit_steps.py:") and "(step)" in finding.source
    assert "eagerly and compiled" in finding.detail


def test_what_shows_in_a_later_step_is_refuted():
    tx = optax.MultiSteps(optax.chain(OUTSIDE, optax.adamw(optax.linear_schedule(0.0, 0.1, 3))), 2)
    finding = only(audit.optimizer(tx, SHAPES, MASK), "body", "frozen")
    assert finding.verdict == "refuted" and "in step 4" in finding.detail


def test_zeros_of_the_optimizer_are_what_shapes_do_not_tell():
    tx = RIGHT["no decay"]
    step, (params, state) = step_of(tx), begun(tx)
    shapes = jax.eval_shape(lambda: (params, state))
    finding = only(audit.step(step, shapes, BATCH, MASK), "body", "frozen")
    assert finding.verdict == "not decided" and "'1/1/0/mu/body'" in finding.detail and "tx.init" in finding.detail
    left_over = jax.tree.map(lambda leaf: leaf + 0.5 if leaf.ndim else leaf, state)
    finding = only(audit.step(step, (params, left_over), BATCH, MASK), "body", "frozen")
    assert finding.verdict == "refuted" and "optimizer state" in finding.detail
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(leaf.dtype.type(0), leaf.shape), shapes[1])
    assert only(audit.step(step, (shapes[0], zeros), BATCH, MASK), "body", "frozen").verdict == "proved"


def test_a_zero_of_the_state_that_is_divided_need_not_stay_zero():
    def step(state, batch):
        params, z = state
        gradients = jax.grad(loss)(params, batch)
        return {"body": params["body"] + z, "head": params["head"] - gradients["head"]}, z / batch.mean()

    state = PARAMS, jnp.zeros(())
    report = audit.step(step, state, BATCH, MASK)
    assert only(report, "body", "frozen").verdict != "proved"
    zero_mean = BATCH - BATCH.mean()
    assert np.isnan(step(step(state, jnp.zeros_like(zero_mean)), BATCH)[0]["body"]).all()


class Trainer:
    """Counts its steps in Python, and lets the body go after the twentieth."""

    def __init__(self):
        self.count = 0
        self.update = jax.jit(
            lambda params, freeze: {**params, "body": params["body"] - (0.0 if freeze else 0.1)}, static_argnums=1
        )

    def step(self, params, batch):
        self.count += 1
        return self.update(params, self.count <= 20)


CALLS, TURNS = [], iter(range(1000))
TOTAL = 0


def counts_in_a_global(params, batch):
    global TOTAL
    TOTAL += 1
    return params if TOTAL < 20 else {**params, "body": params["body"] + 1}


def appends(params, batch):
    CALLS.append(0)
    return params if len(CALLS) < 20 else {**params, "body": params["body"] + 1}


def takes_the_next(params, batch):
    return params if next(TURNS) < 20 else {**params, "body": params["body"] + 1}


def draws(params, batch):
    return params if np.random.rand() < 1 else {**params, "body": params["body"] + 1}


def counts_in_its_closure():
    count = 0

    def step(params, batch):
        nonlocal count
        count += 1
        return params if count < 20 else {**params, "body": params["body"] + 1}

    return step


@pytest.mark.parametrize(
    "step, variable",
    [
        (Trainer().step, "'self.count' at test_audit_steps.py:\\d+ .step."),
        (counts_in_a_global, "'TOTAL' at test_audit_steps.py:\\d+ .counts_in_a_global."),
        (counts_in_its_closure(), "'count' at test_audit_steps.py"),
        (appends, "'CALLS' at test_audit_steps.py"),
        (takes_the_next, "'TURNS' at test_audit_steps.py"),
        (draws, "'np.random'"),
        (functools.partial(lambda step, params, batch: counts_in_a_global(params, batch), None), "'TOTAL'"),
    ],
)
def test_a_step_that_changes_what_it_names_is_not_pure(step, variable):
    with pytest.raises(InputError, match=f"not pure: each call changes {variable}"):
        audit.step(step, PARAMS, BATCH, MASK)


def test_what_is_kept_once_is_no_fault_and_one_trace_is_said_to_be_one():
    kept = {}

    def step(params, batch):
        kept.setdefault("gradient", jax.grad(loss))
        return {**params, "head": params["head"] - kept["gradient"](params, batch)["head"]}

    assert only(report := audit.step(step, PARAMS, BATCH, MASK), "body", "frozen").verdict == "proved"
    assert any("this one trace" in note for note in report.notes)
    assert not audit.step(jax.jit(step), PARAMS, BATCH, MASK).notes


def test_one_element_that_is_not_zero_is_the_one_that_moves():
    tx = RIGHT["no decay"]
    params, state = begun(tx)
    state = jax.tree.map(lambda leaf: leaf.at[2, 1].set(1) if leaf.shape == (3, 4) else leaf, state)
    assert "at [2, 1] in step 1" in only(audit.step(step_of(tx), (params, state), BATCH, MASK), "body", "frozen").detail


def test_a_leaf_in_the_place_of_another_has_moved():
    def swap(params, batch):
        return {"a": params["b"], "b": params["a"], "c": params["c"] - batch.sum()}

    params = dict.fromkeys("abc", jax.ShapeDtypeStruct((4, 4), jnp.float32))
    report = audit.step(swap, params, BATCH, {"a": False, "b": False, "c": True})
    assert [only(report, path, "frozen").verdict for path in "ab"] == ["refuted"] * 2
    assert "it is given the value of 'b'" in only(report, "a", "frozen").detail
    turned = audit.step(
        lambda p, b: {**p, "a": p["a"].T, "c": p["c"] + b.sum()}, params, BATCH, {"a": False, "b": False, "c": True}
    )
    assert "change places" in only(turned, "a", "frozen").detail and only(turned, "b", "frozen").grade == "identical"


def test_elements_of_a_leaf():
    where = np.arange(12).reshape(3, 4) % 3 == 0
    mask = {"body": where, "head": True}
    tx = optimizer.masked(optax.adamw(0.1), mask)
    report = audit.step(step_of(tx), begun(tx), BATCH, mask)
    assert set(verdicts(report).values()) == {"proved"}
    assert "8 of 12 elements" in only(report, "body", "frozen").detail
    clipped = audit.step(
        step_of(optax.chain(optax.clip_by_global_norm(1.0), tx)), (PARAMS, ((), tx.init(PARAMS))), BATCH, mask
    )
    assert verdicts(clipped)["body", "unseen"] == "refuted"
    few = optimizer.masked(optax.adamw(0.1), {"body": np.arange(12).reshape(3, 4) == 0, "head": True})
    report = audit.step(step_of(few), begun(few), BATCH, mask)
    assert only(report, "body", "trains").detail.startswith("3 of its elements")
    assert verdicts(report)["body", "frozen"] == "proved"


def test_of_few_elements_of_a_large_leaf_the_clip_sees_no_others():
    """Where few elements train the optimizer is given these alone, with room beside them: what is there is 0."""
    params = {"body": jnp.ones((96, 96)), "head": jnp.ones((96, 2))}
    where = np.arange(96 * 96).reshape(96, 96) % 100 == 3
    mask = {"body": where, "head": True}
    tx = optimizer.masked(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)), mask)
    state = tx.init(params)
    assert min(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim == 2) < where.size / optimizer.SHARE
    report = audit.step(step_of(tx), (params, state), jnp.ones((5, 96)), mask)
    assert verdicts(report)["body", "unseen"] == verdicts(report)["body", "frozen"] == "proved"
    seen = jax.tree.map(jnp.ones_like, params)
    updates = tx.update(seen, state, params)[0]
    for number in (1e6, np.nan):
        others = tx.update({**seen, "body": jnp.where(where, 1.0, number)}, state, params)[0]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, updates, others)))


def test_dead_leaves_by_structure_and_not_by_numbers():
    params = {"w": jnp.ones((3, 2)), "a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2)), "lost": jnp.ones(2)}

    def adapt(params, batch):
        def value(params):
            lost = jax.lax.stop_gradient(params["lost"])
            return jnp.square(batch @ (params["w"] + params["a"] @ params["b"]) * lost[None]).mean()

        gradients = jax.grad(value)(params)
        return {**jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), "w": params["w"]}

    report = audit.step(adapt, params, BATCH, {"w": False, "a": True, "b": True, "lost": True})
    assert [only(report, path, "trains").verdict for path in ("a", "b", "lost")] == ["proved", "proved", "refuted"]
    assert "its old one, whatever the batch is" in only(report, "lost", "trains").detail
    assert only(report, "w", "frozen").grade == "identical"


@pytest.mark.parametrize("make", [optax.adam, optax.sgd])
@pytest.mark.parametrize("zero", [("a", "b"), ("b",)])
def test_factors_that_are_both_zero_never_train(make, zero):
    mask = {"w": False, "a": True, "b": True}
    tx = optimizer.masked(optax.chain(optax.clip_by_global_norm(1.0), make(0.1)), mask)

    @jax.jit
    def step(state, batch):
        params, opt_state = state
        gradients = jax.grad(lambda p: jnp.square(batch @ p["w"] + batch @ p["a"] @ p["b"] - 1).mean())(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    shapes = {"w": (3, 4), "a": (3, 2), "b": (2, 4)}
    params = {path: jnp.full(shape, 0.0 if path in zero else 0.5) for path, shape in shapes.items()}
    after = state = params, tx.init(params)
    for _ in range(3):
        after = step(after, BATCH)
    stuck = {path for path in ("a", "b") if np.array_equal(after[0][path], params[path])}
    report = audit.step(step, state, BATCH, mask)
    assert (
        {finding.path for finding in report.select("trains", "refuted")}
        == stuck
        == (set(zero) if len(zero) > 1 else set())
    )
    assert not stuck or "stays 0 in every step, as 'b' does" in only(report, "a", "trains").detail
    assert not audit.step(step, jax.eval_shape(lambda: state), BATCH, mask).select("trains", "refuted")


def test_a_gradient_kept_in_the_state_leaks_in_a_later_step():
    def step(state, batch):
        gradients = jax.grad(loss)(state["params"], batch)
        scale = 1 / (1 + state["norm"])
        head = state["params"]["head"] - scale * gradients["head"]
        norm = 0.9 * state["norm"] + jnp.square(gradients["body"]).sum()
        return {"params": {"body": state["params"]["body"], "head": head}, "norm": norm}

    report = audit.step(step, {"params": PARAMS, "norm": jnp.zeros(())}, BATCH, MASK)
    assert verdicts(report)["body", "unseen"] == "refuted" and verdicts(report)["body", "frozen"] == "proved"


def test_the_mask_may_be_in_the_state():
    def step(state, batch):
        params, mask = state
        gradients = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g, m: jnp.where(m, p - g, p), params, gradients, mask), mask

    bools = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), bool), PARAMS)
    finding = only(audit.step(step, (SHAPES, bools), BATCH, MASK), "body", "frozen")
    assert finding.verdict == "proved" and finding.condition == "if '1/body' is False"


def test_modules_of_nnx_that_a_step_changes_in_place():
    from flax import nnx

    def make(tx):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        mask = jax.tree.map_with_path(lambda path, _: "bias" in str(path), nnx.state(model, nnx.Param))
        return model, nnx.Optimizer(model, tx(mask), wrt=nnx.Param), mask

    @nnx.jit
    def step(model, trainer, batch):
        trainer.update(model, nnx.grad(lambda model: jnp.square(model(batch)).mean())(model))

    model, trainer, mask = make(lambda mask: optimizer.masked(optax.adamw(0.1), mask))
    report = audit.step(step, (model, trainer), BATCH, mask)
    assert set(verdicts(report).values()) == {"proved"} and len(report.findings) == 4
    clip = optax.clip_by_global_norm(1.0)
    model, trainer, mask = make(lambda mask: optax.chain(clip, optimizer.masked(optax.adamw(0.1), mask)))
    report = audit.step(step, (model, trainer), jax.eval_shape(lambda: BATCH), mask)
    assert verdicts(report)["kernel/value", "unseen"] == "refuted"


def test_modules_of_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    mask = eqx.tree_at(lambda tree: tree.layers[1].bias, jax.tree.map(lambda _: False, arrays), True)

    @eqx.filter_jit
    def step(model, batch):
        gradients = eqx.filter_grad(lambda model: jnp.square(jax.vmap(model)(batch)).mean())(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g, m: -0.1 * g if m else None, gradients, mask))

    report = audit.step(step, model, BATCH, mask)
    assert (
        set(verdicts(report).values()) == {"proved"} and only(report, "layers/0/weight", "frozen").grade == "identical"
    )


calls = []


def counts(params, batch):
    calls.append(1)
    return jax.tree.map(lambda p: p * len(calls), params)


def keeps(params, batch):
    if calls:
        params = jax.tree.map(jnp.add, params, calls[0])
    calls[:] = [params]
    return params


BAD = {
    "another structure": (lambda params, batch: {"body": params["body"]}, "'head' only in the state"),
    "another dtype": (
        lambda params, batch: jax.tree.map(lambda p: p.astype(jnp.bfloat16), params),
        r"'body' from float32\[3, 4\] to bfloat16\[3, 4\]",
    ),
    "no state": (lambda params, batch: 3.0, "gives no state"),
    "a value": (
        lambda params, batch: params if params["body"][0, 0] > 0 else None,
        r"traced at .*test_audit_steps.py:",
    ),
    "its own error": (lambda params, batch: params["boddy"], "KeyError"),
    "a counter": (counts, "not pure"),
    "a tracer": (keeps, "not pure"),
}


@pytest.mark.parametrize("name", BAD)
def test_steps_that_cannot_be_read(name):
    step, words = BAD[name]
    calls.clear()
    with pytest.raises(InputError, match=words) as error:
        audit.step(step, SHAPES, BATCH, MASK)
    assert "\n" not in str(error.value)


def test_masks_and_parameters_that_do_not_fit():
    step = step_of(RIGHT["ours"])
    with pytest.raises(InputError, match="head"):
        audit.step(step, begun(RIGHT["ours"]), BATCH, {"body": False})
    with pytest.raises(InputError, match="no leaf of the state"):
        audit.step(step, begun(RIGHT["ours"]), BATCH, MASK, params=lambda state: jax.tree.map(jnp.sin, state[0]))


def test_a_callback_is_not_entered():
    def step(params, batch):
        shape = jax.ShapeDtypeStruct((3, 4), jnp.float32)
        return {**params, "body": jax.pure_callback(lambda body: body, shape, params["body"])}

    report = audit.step(step, PARAMS, BATCH, MASK)
    assert only(report, "body", "frozen").verdict == "not decided" and "pure_callback" in report.notes[0]
    assert verdicts(report)["head", "trains"] == "refuted"


@pytest.mark.parametrize("tx", [WRONG["decay"][0], WRONG["raw gradient"][0], optax.MultiSteps(WRONG["decay"][0], 2)])
def test_of_a_step_that_is_too_large_to_run_a_few_elements_refute(tx, monkeypatch):
    monkeypatch.setattr(audit.numbers, "MOST_FLOPS", 0.0)
    finding = only(audit.step(step_of(tx), jax.eval_shape(lambda: begun(tx)), BATCH, MASK), "body", "frozen")
    assert finding.verdict == "refuted" and "by the operations on this leaf alone" in finding.detail


def test_of_leaves_that_are_computed_alike_one_is_run_and_the_others_cite_it(monkeypatch):
    monkeypatch.setattr(audit.numbers, "MOST_FLOPS", 0.0)
    run, change = [], audit.elements.change
    monkeypatch.setattr(audit.elements, "change", lambda *a: run.append(a[1]) or change(*a))
    names, shape = ["a", "b", "c", "d", "e"], jax.ShapeDtypeStruct((3,), jnp.float32)
    params = {**dict.fromkeys(names, shape), "head": shape}
    mask = {path: path == "head" for path in params}
    scale = {"a": 0.9, "b": 0.9, "c": 0.9, "d": 1.0, "e": 0.9}

    @jax.jit
    def step(params, batch):
        gradients = jax.grad(lambda p: (sum(p.values()) * batch).sum())(params)
        moved = {path: params[path] * scale[path] for path in names if path != "e"}
        return {**moved, "e": jnp.sin(params["e"]), "head": params["head"] - gradients["head"]}

    report = audit.step(step, params, shape, mask)
    assert {finding.path for finding in report.select("frozen", "refuted")} == {"a", "b", "c", "e"} and len(run) == 2
    assert "as 'a' does" in only(report, "b", "frozen").detail and "as 'a'" not in only(report, "e", "frozen").detail


ROWS = {
    "no elements": (jnp.zeros((0, 3)), lambda a: a + 1, "identical", "no elements"),
    "complex": (jnp.full(2, 1 + 2j), lambda a: a * 2, "changed", "1+2j becomes 2+4j"),
    "a little": (jnp.full(2, 12345.0), lambda a: a + 0.002, "changed", "12345 becomes 12345.002"),
    "decay": (jnp.ones(2), lambda a: a - 0.1 * a, "changed", "itself alone, as decay does: 1 becomes 0.9"),
    "no decay": (jnp.ones(2), lambda a: jnp.sin(a), "changed", "'sin' gives a value that depends on itself alone: 1 "),
    "plus 0": (jnp.ones(2), lambda a: a + 0.0, "equal", "flush subnormals"),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("error")
def test_the_row_of_a_frozen_leaf_says_what_became_of_it(name):
    leaf, change, grade, words = ROWS[name]

    @jax.jit
    def step(params, batch):
        return {"leaf": change(params["leaf"]), "head": params["head"] - batch}

    report = audit.step(step, {"leaf": leaf, "head": jnp.ones(2)}, jnp.ones(2), {"leaf": False, "head": True})
    finding = only(report, "leaf", "frozen")
    assert finding.grade == grade and words in finding.detail


def test_what_is_idle_stands_before_what_is_well_and_costs_break_nothing():
    tx = optax.chain(optax.adam(0.1), OUTSIDE)
    report = audit.step(step_of(tx), begun(tx), BATCH, MASK)
    rows = [line.split()[:2] for line in report.table().splitlines()[1:]]
    assert (
        ["refuted", "state"] in rows and not report.broken and "costs 96 bytes" in only(report, "body", "state").detail
    )
    idle = audit.Finding("body", "idle", "proved", "0")
    first = audit.Report("step", (*report.select("frozen"), idle)).table().splitlines()[1]
    assert first.split()[:2] == ["proved", "idle"]
