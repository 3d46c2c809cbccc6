"""Stages that a schedule has switched off for good: their features are computed once, and the rest trains on them."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import arguments

from experiments import transfer
from tljax import augment, masks, models, objective, optimizers, penalties, plugins, train
from tljax.data import draw
from tljax.models import randomness
from tljax.models.linen import stage
from tljax.strategies import autofreeze
from tljax.train import cost, settled, vectorize
from tljax.types import NEVER, Context, InputError, MaskSchedule, PhaseRule

STEPS, EXAMPLES, BATCH, WIDTH = 120, 60, 10, 48
ENDS = (20, 60, STEPS)
SHAPE = (WIDTH,)
MLP = models.build("mlp", 3, hidden=(WIDTH, WIDTH), activation="tanh")
DEEP = models.build("mlp", 3, hidden=(16,) * 4, activation="tanh")


def planned(params: Any, key: Any) -> jax.Array:
    """Since when each group is off for good: the first stage early, the second early or late, as the key says."""
    return jnp.array([NEVER, 12, 34 + 40 * jax.random.bernoulli(key).astype(jnp.int32)], jnp.int32)


def by_plan(memory: jax.Array, seen: Any) -> Any:
    return jax.tree.map(lambda group: seen.step < memory[group], seen.groups), memory


def as_it_is(memory: jax.Array) -> jax.Array:
    return memory


def schedule_of(params: Any, choose: Any = by_plan) -> MaskSchedule:
    number = {"hidden_0": 1, "drop": 1, "hidden_1": 2}
    groups = {name: jax.tree.map(lambda _, name=name: number.get(name, 0), leaves) for name, leaves in params.items()}
    return MaskSchedule(planned, choose, masks.by_path(params, lambda path: True), groups=groups, off_since=as_it_is)


@functools.cache
def data() -> train.Data:
    rng = np.random.default_rng(0)
    return train.load(rng.normal(size=(EXAMPLES, *SHAPE)).astype(np.float32), np.arange(EXAMPLES, dtype=np.int32) % 3)


def spec(model: Any = MLP, optimizer: str = "sgd") -> train.Spec:
    return train.Spec(model, objective.loss("softmax_cross_entropy"), optimizers.spec(optimizer)[0])


def fit(seed: int = 0, model: Any = MLP, choose: Any = by_plan) -> train.Fit:
    params = models.init(model, jax.random.key(seed), SHAPE)
    if model == DEEP:
        schedule = autofreeze.strategy(params, Context(stages=models.names(model)), every=6, percentile=50)
    else:
        schedule = schedule_of(params, choose)
    return train.Fit(
        params,
        ((0, schedule.scope),),
        functools.partial(draw.order, seed, EXAMPLES, BATCH, epochs=True),
        np.full(STEPS, 0.01, np.float32),
        (),
        {**optimizers.spec("adam:eps=1e-2")[1], "label_smoothing": 0.0},
        jax.random.key(seed),
        rules=(PhaseRule(schedule=schedule),),
    )


class Run:
    """A group trained to its end, or until it has called so many `programs`."""

    def __init__(
        self,
        fits: Sequence[train.Fit],
        of_spec: train.Spec | None = None,
        cached: bool = True,
        states: Sequence[train.State] = (),
        programs: int = STEPS,
        **execution: Any,
    ) -> None:
        self.messages: list[str] = []
        self.flops: list[float] = []
        self.states: dict[int, train.State] = {}
        self.losses: dict[int, list[np.ndarray]] = {i: [] for i in range(len(fits))}

        def on_compiled(rows: tuple[int, ...], of_program: cost.Cost) -> None:
            self.flops.append(of_program.flops or 0)

        how = train.Execution(
            cache=train.FeatureCache(10**8) if cached else None,
            on_message=self.messages.append,
            on_compiled=on_compiled,
            should_stop=lambda: len(self.flops) >= programs,
            **execution,
        )
        before = vectorize.segment._cache_size()
        for state, log in train.fit(of_spec or spec(), fits, data(), ENDS, states, how):
            for row, i in enumerate(state.fits):
                self.losses[i].append(log.loss[row])
                of_fit = jax.tree.map(np.array, train.select(state, [row]))
                self.states[i] = of_fit._replace(fits=(i,), masks=(state.masks[row],))
        self.programs = vectorize.segment._cache_size() - before

    def since(self, i: int = 0) -> np.ndarray:
        memory = self.states[i].optimizer.memory
        return np.ravel(getattr(memory, "since", memory))

    def bits(self, i: int = 0) -> list[bytes]:
        state = self.states[i]
        return [leaf.tobytes() for leaf in jax.tree.leaves((state.params, state.optimizer))]


def lengths(since: np.ndarray) -> list[int]:
    """How long the prefix is after the ends of segments, in turn."""
    return sorted({int((since < end).sum()) for end in (0, *ENDS[:-1])})


@functools.cache
def early() -> tuple[train.Fit, Run]:
    """A fit whose stages are off for good one after another, both of them early; on features."""
    trial = fit(1)
    return trial, Run([trial])


def equal(whole: Run, short: Run, tolerance: float = 1e-6) -> None:
    """Parameters, memory, moments and losses are those of a fit that computes all in every step."""
    a, b = whole.states[0], short.states[0]
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, (a.params, a.optimizer), (b.params, b.optimizer))
    np.testing.assert_allclose(np.hstack(whole.losses[0]), np.hstack(short.losses[0]), rtol=1e-5)


def test_a_prefix_that_is_off_for_good_is_computed_once_and_the_fit_is_the_same() -> None:
    trial, short = early()
    assert lengths(short.since()) == [0, 1, 2] and [line.split(":")[0] for line in short.messages] == [
        "hidden_0 is frozen",
        "hidden_0, hidden_1 are frozen",
    ]
    assert short.programs == len(short.flops) == 3, "one program for each length of the prefix"
    whole = Run([trial], cached=False)
    assert not whole.messages and len(whole.flops) == 1
    equal(whole, short)
    # A hidden layer has three products of this size in a step, and two where nothing below it trains.
    product, head = 2 * BATCH * WIDTH * WIDTH, 2 * BATCH * WIDTH * 3
    for flops, products in zip(short.flops, (5 * product + 3 * head, 2 * product + 3 * head, 2 * head), strict=True):
        assert products <= flops <= products + 12 * 2 * WIDTH * WIDTH + 60 * BATCH * WIDTH, (short.flops, products)


def test_what_stops_after_the_prefix_has_grown_goes_on_to_the_same_bits() -> None:
    trial, whole = early()
    half = Run([trial], programs=2)
    assert half.states[0].step == ENDS[0] + 16 and len(half.messages) == 1
    resumed = Run([trial], states=[half.states[0]])
    assert resumed.bits() == whole.bits() and resumed.messages == whole.messages


@pytest.mark.slow
def test_a_fit_has_the_same_bits_in_company_and_alone() -> None:
    fits = [fit(seed) for seed in range(3)]
    together = Run(fits)
    assert len({int(together.since(i)[2]) for i in range(3)}) == 2, "they are to part"
    for i, trial in enumerate(fits):
        assert Run([trial]).bits() == together.bits(i)


@pytest.mark.slow
def test_side_by_side_everything_is_gated() -> None:
    run = Run([fit(0), fit(1)], many="vmap")
    assert len(run.flops) == 1 and not [line for line in run.messages if "computed once" in line]


@pytest.mark.slow
def test_the_prefix_of_autofreeze_grows_with_it() -> None:
    trial, adam = fit(1, DEEP), spec(DEEP, "adam:eps=1e-2")
    short = Run([trial], adam)
    of_lengths = lengths(short.since())
    assert len(of_lengths) > 2, short.since()
    assert len(short.flops) == len(of_lengths) and sorted(short.flops, reverse=True) == short.flops
    equal(Run([trial], adam, cached=False), short)
    half = Run([trial], adam, programs=2)
    assert Run([trial], adam, states=[half.states[0]]).bits() == short.bits()


def returns(memory: jax.Array, seen: Any) -> Any:
    """The first stage is on again in steps 50 to 59, though it was off for good since step 12."""
    on, memory = by_plan(memory, seen)
    again = (seen.step >= 50) & (seen.step < 60)
    return {**on, "hidden_0": jax.tree.map(lambda leaf: leaf | again, on["hidden_0"])}, memory


@pytest.mark.slow
def test_what_was_off_for_good_and_is_on_again_is_refused() -> None:
    with pytest.raises(InputError, match=r"said that 'hidden_0/\w+' is off for good, and had it on before step 60"):
        Run([fit(choose=returns)])


def grown(
    *past: int,
    since: Sequence[int] = (12, 24),
    model: Any = MLP,
    budget: int = 10**8,
    began: int = 0,
    latest: int = STEPS,
    **changes: Any,
) -> tuple[str, ...]:
    trial, cache = fit(model=model), train.FeatureCache(budget)
    specialized = replace(train.specialize(spec(model), trial, [trial.phases[0][1]]), **changes)
    return settled.prefix(specialized, trial, data(), past, began, latest, np.array([NEVER, *since]), cache)


def test_a_prefix_ends_where_a_stage_draws_or_follows_batches() -> None:
    assert grown(30) == ("hidden_0", "hidden_1")
    assert grown(30, tracked=("hidden_1",)) == ("hidden_0",)
    assert grown(30, reestimated=("hidden_0",)) == ()
    assert grown(30, keeps_dropout=("hidden_1",)) == ("hidden_0",)
    noisy = (MLP[0], stage("drop", nn.Dropout(0.5, deterministic=False)), *MLP[1:])
    assert randomness.stages(noisy, SHAPE) == ("drop",) and grown(30, model=noisy) == ("hidden_0",)


def test_a_prefix_grows_at_ends_of_segments_and_where_it_is_worth_it() -> None:
    assert [len(grown(*past)) for past in ((), (12,), (13,), (24,), (25,), (13, 110))] == [0, 0, 1, 1, 2, 2]
    assert len(grown(22, began=10)) == 0 and len(grown(23, began=10)) == 1, "counted from where the phase began"
    passes = EXAMPLES // BATCH
    assert len(grown(25, latest=25 + passes)) == 2
    assert len(grown(25, latest=24 + passes)) == 0, "fewer examples pass than there are"
    assert len(grown(13, 25, latest=24 + passes)) == 1, "the prefix that there was stays"
    assert len(grown(25, budget=4 * EXAMPLES * WIDTH - 1)) == 0


def test_why_features_are_computed_in_every_step_is_told() -> None:
    cache, trial = train.FeatureCache(10**8), fit()
    plain = train.specialize(spec(), trial, [trial.phases[0][1]])
    assert plain.schedule is not None
    rows = {
        "inputs are augmented": {"augment": augment.read("flip")},
        "parameters are merged": {"merge": plugins.method("lora")[0].merge},
        "a penalty compares features": {"penalties": penalties.read("behaviour:weight=1")[0]},
        "gradients of what is off go on": {"schedule": replace(plain.schedule, off="live")},
        "groups share slots": {"schedule": replace(plain.schedule, slots=1)},
    }
    assert settled.obstacle(plain, cache) == ""
    assert settled.obstacle(plain, None) == settled.obstacle(plain, train.FeatureCache(0)) == "no features are kept"
    for reason, changes in rows.items():
        assert settled.obstacle(replace(plain, **changes), cache) == reason


@pytest.mark.slow
def test_programs_compute_a_settled_prefix_once_and_dry_runs_say_so(tasks, tmp_path, capsys) -> None:
    flags: dict[str, Any] = {"strategies": ("autofreeze:every=2:percentile=60",), "hidden": (8, 8, 8), "epochs": 4}
    flags["devices"] = 1
    transfer.run(**arguments(tasks, tmp_path / "w", dry_run=True, **flags))
    words = "features of stages that are off for good, from the input up, are computed"
    assert f"{words} once, from the next point on" in capsys.readouterr().out
    runs = {}
    for budget in (0, 10**9):
        how = {"features_budget": budget, **flags}
        lines = transfer.run(**arguments(tasks, tmp_path / str(budget), **how))
        assert ("are computed once" in "".join(capsys.readouterr())) == bool(budget)
        runs[budget] = [(line.seed, line.test_accuracy) for line in lines]
    assert runs[0] == runs[10**9]
    transfer.run(**arguments(tasks, tmp_path / "v", dry_run=True, features_budget=0, **flags))
    assert f"{words} in every step, since no features are kept" in capsys.readouterr().out
    transfer.run(**arguments(tasks, tmp_path / "v", dry_run=True, **{**flags, "devices": 2}))
    assert f"{words} in every step, since fits are over several devices" in capsys.readouterr().out
