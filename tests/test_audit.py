"""The proofs: every optimizer keeps the promises of a mask, and every check can fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planted import optimizers as planted

from tljax import masks, optimizer
from tljax.audit import check_optimizer, check_strategy, fits, lines
from tljax.types import InputError, Method, Phase

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=1.0),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}
STILL, STATE, COMPILED = "frozen leaves keep their bytes", "frozen leaves own no state", "nothing compiles twice"


def failed(checks):
    return {check.name for check in checks if check.passed is False}


@pytest.mark.parametrize(
    ("name", "clip", "penalty"), [*itertools.product(OPTIMIZERS, (0.0, 0.1), ("", "l2:weight=0.1"))]
)
def test_every_optimizer_keeps_every_promise(name, clip, penalty):
    tx = optax.chain(optax.clip_by_global_norm(clip), OPTIMIZERS[name]) if clip else OPTIMIZERS[name]
    checks = check_optimizer(tx, penalty=penalty)
    assert len(checks) == 5 and all(check.passed for check in checks), checks


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (planted.optax_masked, {STILL}),
        # Its moments of the integer leaf become floats, which compiles a second time.
        (planted.freeze_then, {STILL, STATE, COMPILED}),
        (planted.recompiles, {COMPILED}),
    ],
)
def test_a_planted_optimizer_fails_the_check_that_is_for_it(wrap, expected):
    assert failed(check_optimizer(OPTIMIZERS["adamw"], wrap=wrap)) == expected


def test_a_clip_that_sees_frozen_gradients_is_found():
    def clip_outside(tx, mask):
        inner = optimizer.masked(tx, mask)

        def update(updates, state, params=None):
            norm = optax.tree.norm(updates)
            return inner.update(jax.tree.map(lambda g: (g / norm).astype(g.dtype), updates), state, params)

        return optax.GradientTransformation(inner.init, update)

    assert failed(check_optimizer(OPTIMIZERS["sgd"], wrap=clip_outside)) == {"gradients of frozen leaves are unseen"}


def test_updates_of_positive_zero_are_found():
    """0.0 added to -0.0 changes its sign bit."""

    def positive(tx, mask):
        inner = optimizer.masked(tx, mask)

        def update(updates, state, params=None):
            updates, state = inner.update(updates, state, params)
            return jax.tree.map(lambda u, m: u if m else abs(u), updates, mask), state

        return optax.GradientTransformation(inner.init, update)

    assert failed(check_optimizer(OPTIMIZERS["adam"], wrap=positive)) == {STILL}


def test_an_optimizer_that_moves_nothing_is_found():
    assert failed(check_optimizer(optax.set_to_zero())) == {"trained leaves move"}


def everything(params, context):
    return masks.by_path(params, lambda path: True)


def writes(params, context):
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, np.ndarray) and leaf.ndim:
            leaf[...] = 0
    return everything(params, context)


def writes_into_context(params, context):
    for leaf in jax.tree.leaves(context.source_params):
        if isinstance(leaf, np.ndarray) and leaf.ndim:
            leaf[...] = 7
    return everything(params, context)


def writes_later(params, context):
    """Into the parameters of the second phase."""
    return [Phase(0.0, everything(params, context)), Phase(0.5, writes)]


def by_value(params, context):
    """The larger half of the numbers: it needs their values, and does not say so."""
    chosen = masks.top(jax.tree.map(abs, params), 0.5, among=masks.kept(params, context.fresh))
    return masks.also(chosen, context.fresh)


def late(params, context):
    """The new head trains only in the second phase."""
    return [Phase(0.0, masks.under(params, context.stages[0])), Phase(0.5, everything(params, context))]


def begins_late(params, context):
    return [Phase(0.5, everything(params, context))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "name", "reason"),
    [
        (writes, "leaves what it is given untouched", "it wrote into params"),
        (writes_into_context, "leaves what it is given untouched", "it wrote into context.source_params"),
        (writes_later, "leaves what it is given untouched", "it wrote into params"),
        (by_value, "the same mask from shapes alone", "DATA_DRIVEN = True"),
        (late, "new leaves train in every phase", "phase 0: the mask freezes 'head/bias'"),
    ],
)
def test_a_fault_fails_its_check_alone(strategy, name, reason):
    checks = check_strategy(strategy)
    assert failed(checks) == {name}
    assert reason in next(check.detail for check in checks if check.name == name)


@pytest.mark.slow
def test_a_strategy_that_says_it_looks_at_data_is_excused_from_shapes():
    checks = check_strategy(Method(by_value, data_driven=True))
    assert not failed(checks)
    assert [check.name for check in checks if check.passed is None] == ["the same mask from shapes alone"]
    (still,) = [check for check in checks if check.name == STILL]
    assert still.detail.endswith("; proved for all inputs")


@pytest.mark.slow
def test_a_training_step_that_moves_frozen_elements_fails_its_check_alone(monkeypatch):
    """The fit has a rate at which it moves none: reading the step finds the other rates."""
    step = fits.one_step

    def moves(*arguments):
        trained, *rest = step(*arguments)
        rate = arguments[6]
        return jax.tree.map(lambda leaf: jnp.where(rate > 0.06, leaf * 0.5, leaf), trained), *rest

    monkeypatch.setattr(fits, "one_step", moves)
    checks = check_strategy(Method(by_value, data_driven=True))
    (still,) = [check for check in checks if check.name == STILL]
    assert not failed(checks) - {STILL} and "not proved for all inputs" in still.detail


def test_phases_and_exceptions_are_told_by_the_lint():
    [first, *_] = check_strategy(begins_late)
    assert first == lines.Check(
        "lint on mlp", False, "phase 0 starts at 0.5: the first phase starts at 0.0, so put Phase(0.0, mask) before it"
    )
    [first, *_] = check_strategy(lambda params, context: params["nowhere"])
    assert first == lines.Check("lint on mlp", False, "raises KeyError: 'nowhere'")


@pytest.mark.slow
def test_a_merge_that_loses_something_is_found():
    from tljax.strategies import lora

    def forgets(params, *, rank=4, scale=4.0):
        merged = lora.merge(params, rank=rank, scale=scale)
        return {**merged, "head": {**merged["head"], "bias": merged["head"]["bias"] + 1}}

    method = Method(lora.strategy, lora.adapt, forgets)
    assert failed(check_strategy(method)) == {"adapt and merge keep the outputs"}


@pytest.mark.slow
def test_an_adapt_that_moves_the_start_is_found():
    from tljax.strategies import lora

    def moves(params, key, *, rank=4):
        return jax.tree.map(lambda leaf: leaf + 0.1, lora.adapt(params, key, rank=rank))

    assert failed(check_strategy(Method(lora.strategy, moves, lora.merge))) == {"adapt and merge keep the outputs"}


def test_an_added_leaf_that_stays_frozen_is_found():
    from tljax.strategies import lora

    def head_alone(params, context):
        return masks.under(params, context.stages[-1:])

    method = Method(head_alone, lora.adapt, lora.merge)
    assert failed(check_strategy(method)) == {"new leaves train in every phase"}


@pytest.mark.slow
def test_a_model_of_ones_own_goes_first(tmp_path):
    (tmp_path / "mine.py").write_text("from tljax.models.mlp import model\n")
    checks = check_strategy("head_only", model=f"{tmp_path}/mine.py:model")
    assert checks[0].name == f"lint on {tmp_path}/mine.py:model" and not failed(checks)


def test_unknown_strategies_and_models_are_refused():
    with pytest.raises(InputError, match="unknown strategy 'ful'; nearest: 'full'"):
        check_strategy("ful")
    with pytest.raises(InputError, match="unknown model 'mpl'; nearest: 'mlp'"):
        check_strategy("full", model="mpl")


def test_bytes_tell_negative_zero_and_nan_apart():
    assert not lines.same_bytes(np.float32(-0.0), np.float32(0.0))
    assert lines.same_bytes(np.float32("nan"), np.float32("nan"))
    assert not lines.same_bytes(np.float32(1), np.float64(1))
