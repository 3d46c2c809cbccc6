"""audit.frozen, audit.rates and audit.restored in a test suite: what they let pass, and with what table they fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import audit
from tljax.types import InputError

PARAMS = {"body": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "head": {"kernel": jnp.ones((4, 2))}}
MASK = {"body": {"kernel": False, "bias": False}, "head": {"kernel": True}}
BATCH = {"x": jnp.ones((5, 3)), "y": jnp.zeros((5, 2))}


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"] + params["body"]["bias"][None])
    return jnp.mean((hidden @ params["head"]["kernel"] - batch["y"]) ** 2)


def descend(frozen=lambda params, gradients: params):
    """A step of the head; `frozen` makes the new body of the old one and its gradient."""

    def step(params, batch):
        gradients = jax.grad(loss)(params, batch)
        head = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params["head"], gradients["head"])
        return {"body": frozen(params["body"], gradients["body"]), "head": head}

    return step


def with_optax(tx):
    def step(state, batch):
        gradients = jax.grad(loss)(state["params"], batch)
        updates, opt_state = tx.update(gradients, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    return step, {"params": PARAMS, "opt_state": tx.init(PARAMS)}


def table(*arguments, assertion=audit.frozen, **options):
    """The table of the AssertionError that a call raises."""
    with pytest.raises(AssertionError) as caught:
        assertion(*arguments, **options)
    return str(caught.value)


def test_what_is_proved_passes_and_is_reported():
    report = audit.frozen(descend(), PARAMS, BATCH, MASK)
    assert {finding.path for finding in report.select("frozen", "proved")} == {"body/bias", "body/kernel"}
    assert {finding.grade for finding in report.select("frozen")} == {"identical"}


def test_a_frozen_leaf_that_moves_fails_with_its_line():
    decayed = descend(lambda params, gradients: jax.tree.map(lambda leaf: leaf * 0.9, params))
    text = table(decayed, PARAMS, BATCH, MASK)
    head, *rows = text.splitlines()
    assert head == "step does not leave alone what the mask freezes:"
    assert [row.split()[:3] for row in rows[1:3]] == [
        ["refuted", "frozen", path] for path in ("body/bias", "body/kernel")
    ]
    assert "test_audit_assertions.py:" in rows[1] and "head/kernel" not in text


@pytest.mark.parametrize(
    ("grade", "frozen"),
    [
        ("identical", lambda params, gradients: params),
        ("equal", lambda params, gradients: jax.tree.map(lambda leaf: leaf + 0.0, params)),
        ("equal if finite", lambda params, gradients: jax.tree.map(lambda leaf, g: leaf + 0 * g, params, gradients)),
    ],
)
def test_a_proof_in_a_lower_grade_than_asked_fails(grade, frozen):
    grades = ("identical", "equal", "equal if finite")
    for at_least in grades:
        call = (descend(frozen), PARAMS, BATCH, MASK)
        if grades.index(grade) <= grades.index(at_least):
            audit.frozen(*call, at_least=at_least, leaks=True)
        else:
            text = table(*call, at_least=at_least, leaks=True)
            assert f"proved  frozen  body/bias    {grade}:" in text and f"`at_least={at_least}` asks for more" in text


def through_the_host(params, gradients):
    shape = jax.ShapeDtypeStruct(params["bias"].shape, params["bias"].dtype)
    return {**params, "bias": jax.pure_callback(lambda x: np.asarray(x), shape, params["bias"])}


def test_what_is_not_decided_fails_unless_it_is_named():
    call = (descend(through_the_host), PARAMS, BATCH, MASK)
    text = table(*call)
    assert "not decided  frozen  body/bias" in text and "pure_callback" in text and "body/kernel" not in text
    report = audit.frozen(*call, undecided="**/bias")
    assert report.undecided
    assert "body/bias" in table(*call, undecided=["**/kernel"])
    with pytest.raises(InputError, match="`undecided=\\*\\*/kernels` matches no leaf"):
        audit.frozen(*call, undecided=["**/kernels"])


def test_a_refuted_leaf_is_not_accepted_as_undecided():
    moved = descend(lambda params, gradients: jax.tree.map(lambda leaf: leaf * 0.9, params))
    assert "refuted  frozen  body/bias" in table(moved, PARAMS, BATCH, MASK, undecided="**")


def test_a_mask_may_be_globs_of_what_trains():
    whole = audit.frozen(descend(), PARAMS, BATCH, MASK)
    assert audit.frozen(descend(), PARAMS, BATCH, ["head/**"]) == whole
    assert audit.frozen(descend(), PARAMS, BATCH, "head/*") == whole
    both = audit.step(descend(), PARAMS, BATCH, "head/**+**/bias")
    assert both == audit.step(descend(), PARAMS, BATCH, ("head/**", "body/bias"))
    assert {finding.path for finding in both.refuted} == {"body/bias"}
    of_optimizer = audit.optimizer(optax.sgd(0.1), PARAMS, ["head/**"])
    assert of_optimizer == audit.optimizer(optax.sgd(0.1), PARAMS, MASK)
    with pytest.raises(InputError, match=r"pattern 'hed/\*\*' matches no leaf; nearest: 'head/kernel'"):
        audit.frozen(descend(), PARAMS, BATCH, ["hed/**"])
    with pytest.raises(InputError, match="the mask has no rate"):
        audit.rates(descend(), PARAMS, BATCH, ["head/**"])


@pytest.mark.parametrize("how", ["where", "cond"])
def test_what_trains_from_a_step_on_is_not_decided_and_the_row_names_the_step(how):
    def step(state, batch):
        gradients = jax.grad(loss)(state["params"], batch)
        is_late = state["step"] >= 100
        if how == "where":
            body = jax.tree.map(lambda g: jnp.where(is_late, g, 0.0), gradients["body"])
        else:
            body = jax.lax.cond(is_late, lambda g: g, lambda g: jax.tree.map(jnp.zeros_like, g), gradients["body"])
        updates = {"body": body, "head": gradients["head"]}
        params = jax.tree.map(lambda leaf, update: leaf - 0.1 * update, state["params"], updates)
        return {"params": params, "step": state["step"] + 1}

    state = {"params": PARAMS, "step": jnp.zeros((), jnp.int32)}
    rows = audit.step(jax.jit(step), state, BATCH, MASK).undecided
    assert [row.path for row in rows] == ["body/bias", "body/kernel"]
    for row in rows:
        assert "'step' selects its new value, and no numbers show that it moves" in row.detail
        assert "each phase by a step and a mask of its own" in row.detail and "MaskSchedule" in row.detail


def test_a_selection_by_what_is_no_number_of_the_state_is_not_named():
    """A gradient that is selected by the batch, or element by element, as a ReLU's is, follows no step."""

    def step(state, batch):
        gradients = jax.grad(loss)(state["params"], batch)
        quiet = jax.tree.map(lambda g: jnp.where(batch["x"].sum() > 1e6, g, 0.0), gradients["body"])
        noise = jax.random.bernoulli(jax.random.key(state["step"]), 0.0, (4,))
        quiet["bias"] = jnp.where(noise, gradients["body"]["bias"], 0.0)
        body = jax.tree.map(lambda leaf, g: leaf - g, state["params"]["body"], quiet)
        return {"params": {**state["params"], "body": body}, "step": state["step"] + 1}

    state = {"params": PARAMS, "step": jnp.zeros((), jnp.int32)}
    rows = audit.step(jax.jit(step), state, BATCH, MASK).undecided
    assert rows and not any("selects" in row.detail for row in rows)


def test_a_leak_fails_unless_it_is_allowed():
    labels = {"body": {"kernel": "frozen", "bias": "frozen"}, "head": {"kernel": "trained"}}
    inner = optax.partition({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labels)
    tx = optax.chain(optax.clip_by_global_norm(1.0), inner)
    text = table(*with_optax(tx), BATCH, MASK)
    assert "refuted  unseen  body/kernel" in text and "'head/kernel' depends on its gradient" in text
    audit.frozen(*with_optax(tx), BATCH, MASK, leaks=True)
    audit.frozen(*with_optax(inner), BATCH, MASK)


@pytest.mark.slow
def test_rates_are_those_of_the_mask():
    rates = {"body": {"kernel": 0.25, "bias": 0.25}, "head": {"kernel": 1.0}}
    scale = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates))
    audit.rates(*with_optax(optax.chain(optax.adam(0.1), scale)), BATCH, rates)
    text = table(*with_optax(optax.chain(scale, optax.adam(0.1))), BATCH, rates, assertion=audit.rates)
    assert text.startswith("step does not move its leaves by their rates:") and "body/kernel" in text


def test_a_load_that_loaded_nothing_fails():
    fresh = jax.tree.map(lambda leaf: leaf * 0.5, PARAMS)
    loaded = {**fresh, "body": PARAMS["body"]}
    audit.restored(PARAMS, loaded, ["body/**"], fresh=fresh)
    text = table(PARAMS, fresh, ["body/**"], fresh=fresh, assertion=audit.restored)
    assert "refuted  restored  body/kernel  has its fresh value" in text and "head" not in text.split("note")[0]


def test_a_grade_that_is_none_is_refused():
    with pytest.raises(InputError, match="at_least=same: it is one of 'identical', 'equal', 'equal if finite'"):
        audit.frozen(descend(), PARAMS, BATCH, MASK, at_least="same")


def test_a_table_of_many_rows_is_cut():
    params = {f"w_{i}": jnp.ones(()) for i in range(70)} | {"head": jnp.ones(())}

    def step(params, batch):
        return {name: leaf * 0.5 + batch for name, leaf in params.items()}

    text = table(step, params, jnp.ones(()), {name: name == "head" for name in params})
    assert text.endswith("\nand 80 more") and text.count("\n") < 66


def test_rates_need_a_rate():
    with pytest.raises(InputError, match="the mask has no rate"):
        audit.rates(descend(), PARAMS, BATCH, MASK)
