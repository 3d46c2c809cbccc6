"""The audit of a step whose mask moves: what is off stays, where the program or a run shows it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from tljax import audit, models, optimizer
from tljax.strategies import autofreeze, badam, gmt, hft, lisa, mofo, spiel
from tljax.types import Context, InputError, MaskSchedule

STRATEGIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lisa": (lisa, {"layers": 1, "every": 2}),
    "mofo": (mofo, {"fraction": 0.3}),
    "badam": (badam, {"every": 2}),
    "gmt": (gmt, {"fraction": 0.3}),
    "spiel": (spiel, {"fraction": 0.2, "every": 4, "estimate": 2}),
    "hft": (hft, {"every": 2}),
    "autofreeze": (autofreeze, {"every": 2}),
}
FAST = ("lisa", "mofo")
MODEL = models.build("mlp", 3, hidden=(4, 4, 4), activation="tanh")
PARAMS = models.init(MODEL, jax.random.key(0), (6,))
BATCH = {"x": jnp.ones((8, 6)), "y": jnp.zeros(8, int)}


def loss(params: Any, batch: Any) -> jax.Array:
    outputs = models.apply(MODEL, params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()


def schedule_of(name: str) -> MaskSchedule:
    file, options = STRATEGIES[name]
    schedule: MaskSchedule = file.strategy(PARAMS, Context(stages=models.names(MODEL)), **options)
    return schedule


def loop(tx: Any, applied: Callable[[Any, Any, Any, Any], Any]) -> tuple[Any, Any]:
    """(A training step that applies updates so, the state with which it begins)."""

    @jax.jit
    def train_step(state: Any, batch: Any) -> Any:
        params, before = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, after = tx.update(gradients, before, params, loss=value)
        return (applied(params, updates, before, after), after), value

    return train_step, (PARAMS, tx.init(PARAMS))


def by_mask(params: Any, updates: Any, before: Any, after: Any) -> Any:
    return optimizer.apply(params, updates, after.mask)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in STRATEGIES])
def test_what_is_off_is_proved_to_stay(name: str) -> None:
    schedule = schedule_of(name)
    step, state = loop(optimizer.scheduled(optax.adamw(1e-2), schedule), by_mask)
    report = audit.frozen(step, state, BATCH, schedule, at_least="identical")
    assert {finding.claim for finding in report.select(verdict="proved")} >= {"trains", "off"}
    assert len(report.select("off", "proved")) == len(report.select("trains", "proved")) == 8
    assert not report.broken


def test_a_decay_outside_the_gate_is_refuted_and_what_is_always_on_is_not() -> None:
    schedule = schedule_of("lisa")
    tx = optax.chain(optimizer.scheduled(optax.sgd(1e-2), schedule), optax.add_decayed_weights(-1e-2))
    step, state = loop(tx, lambda params, updates, before, after: optax.apply_updates(params, updates))
    report = audit.step(step, state, BATCH, schedule)
    kernels = {finding.path for finding in report.select("off", "refuted") if finding.path.endswith("kernel")}
    assert kernels == {"hidden_1/kernel", "hidden_2/kernel"}
    assert not report.select("off", "proved")
    with pytest.raises(AssertionError, match=r"no selection by its mask: -?0"):
        audit.frozen(step, state, BATCH, schedule)


@pytest.mark.parametrize(
    "applied",
    [
        lambda params, updates, before, after: optimizer.apply(params, updates, before.mask),  # that of the last step
        lambda params, updates, before, after: optimizer.apply(
            jax.tree.map(lambda leaf: 0.9 * leaf, params), updates, after.mask
        ),
    ],
    ids=["stale", "shrunk"],
)
def test_a_mask_or_a_value_of_another_step_is_no_proof(applied: Any) -> None:
    schedule = schedule_of("lisa")
    step, state = loop(optimizer.scheduled(optax.sgd(1e-2), schedule), applied)
    assert not audit.step(step, state, BATCH, schedule).select("off", "proved")


def test_a_schedule_is_for_a_state_that_has_one() -> None:
    step, state = loop(optax.with_extra_args_support(optax.sgd(1e-2)), lambda p, u, before, after: p)
    with pytest.raises(InputError, match="the state has no states of optimizer"):
        audit.step(step, state, BATCH, schedule_of("lisa"))
