"""Masks that move: a schedule inside the compiled step."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import masks, models, optimizer, optimizers, paths, train
from tljax.audit import fits, problems
from tljax.strategies import gradual_unfreeze, lisa, lp_ft
from tljax.train import cost, vectorize
from tljax.train.memory import inner_programs
from tljax.train.step import Hyper, forms_no_others, step, traced_leaves, trained_leaves, transformation
from tljax.types import Batch, Context, MaskSchedule, Params, Phase, PhaseRule

STEPS = 100
STAGES = ("hidden_0", "hidden_1", "head")


def no_memory(params: Params, key: Any) -> tuple[()]:
    return ()


def since(memory: Any, seen: Any, *, starts: tuple[int, ...]) -> Any:
    """A group is on from its start on."""
    return jax.tree.map(lambda group: seen.step >= starts[group], seen.groups), memory


def as_schedule(params: Params, phases: Sequence[Phase], off: str = "dropped") -> tuple[MaskSchedule, list[int]]:
    """(Phases that free more and more, as one schedule; the steps at which they begin)."""
    starts = [round(phase.start * STEPS) for phase in phases]
    trains = [masks.static(params, phase.mask) for phase in phases]
    groups = jax.tree.map(lambda *each: each.index(True), *trains)
    choose = functools.partial(since, starts=tuple(starts))
    return MaskSchedule(no_memory, choose, trains[-1], groups=groups, off=off), starts


def network(dtype: Any) -> tuple[Params, Callable[[Params], jax.Array]]:
    model = models.build("mlp", 3, hidden=(5, 4), activation="relu")
    images = jax.random.normal(jax.random.key(1), (12, 6), dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), models.init(model, jax.random.key(0), (6,)))
    targets = jax.nn.one_hot(jnp.arange(12) % 3, 3, dtype=dtype)
    return params, lambda params: optax.softmax_cross_entropy(models.apply(model, params, images), targets).mean()


def by_phases(
    tx: Any, params: Params, loss: Callable[[Params], jax.Array], phases: Sequence[Phase], starts: Sequence[int]
) -> Params:
    history: list[Any] = []
    state: Any = None
    for phase, start, end in zip(phases, starts, [*starts[1:], STEPS], strict=True):
        before, history = (
            (history[-1] if history else None, masks.since(*history) if history else None),
            [
                *history,
                phase.mask,
            ],
        )
        after = phase.mask, masks.since(*history)
        under = optimizer.masked(tx, *after)
        state = under.init(params) if state is None else optimizer.carry(tx, before, after, state, params)

        def step(_: Any, carry: Any, mask: Any = phase.mask, under: Any = under) -> Any:
            params, state = carry
            trained, frozen = masks.split(params, mask)
            gradients = jax.grad(lambda trained: loss(masks.join(trained, frozen)))(trained)
            updates, state = under.update(gradients, state, params)
            return optimizer.apply(params, updates, mask), state

        params, state = jax.jit(lambda carry, n=end - start, step=step: jax.lax.fori_loop(0, n, step, carry))(
            (params, state)
        )
    return params


class Loop:
    """A loop of one's own under a schedule, which counts how often its step is traced."""

    def __init__(self, tx: Any, schedule: MaskSchedule, loss: Callable[[Params], jax.Array]) -> None:
        self.tx, self.loss, self.traced = optimizer.scheduled(tx, schedule), loss, 0
        self.step: Any = jax.jit(self._step)

    def _step(self, params: Params, state: Any) -> Any:
        self.traced += 1
        loss, gradients = jax.value_and_grad(self.loss)(params)
        updates, state = self.tx.update(gradients, state, params, loss=loss)
        return optimizer.apply(params, updates, state.mask), state

    def run(self, params: Params, steps: int = STEPS, state: Any = None) -> list[Any]:
        """The parameters and the state before the first step and after each."""
        seen = [(params, self.tx.init(params) if state is None else state)]
        for _ in range(steps):
            seen.append(self.step(*seen[-1]))
        return seen


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, 0.9),
    "adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1)),
    "steps": optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)), 4
    ).gradient_transformation(),
}
ALL = [
    pytest.param(*each, marks=() if each == ("adam", lp_ft) else pytest.mark.slow)
    for each in ((name, strategy) for name in OPTIMIZERS for strategy in (lp_ft, gradual_unfreeze))
]


@pytest.mark.parametrize(("name", "strategy"), ALL)
def test_a_static_schedule_equals_phases(name: str, strategy: Any) -> None:
    with jax.enable_x64(True):
        holds_against_phases(jnp.float64, 1e-12, name, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [lp_ft, gradual_unfreeze])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_static_schedule_equals_phases_in_single_precision(name: str, strategy: Any) -> None:
    holds_against_phases(jnp.float32, 1e-6, name, strategy)


def holds_against_phases(dtype: Any, tolerance: float, name: str, strategy: Any) -> None:
    params, loss = network(dtype)
    phases = strategy.strategy(params, Context(stages=STAGES))
    schedule, starts = as_schedule(params, phases)
    loop = Loop(OPTIMIZERS[name], schedule, loss)
    seen = loop.run(params)
    expected = by_phases(OPTIMIZERS[name], params, loss, phases, starts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), seen[-1][0], expected)
    for (path, group), *leaves in zip(
        paths.items(schedule.groups), *(jax.tree.leaves(params) for params, _ in seen), strict=True
    ):
        frozen = [np.asarray(leaf).tobytes() for leaf in leaves[: starts[group] + 1]]
        assert {*frozen} == {frozen[0]}, path
        assert not group or np.asarray(leaves[-1]).tobytes() != frozen[0], path
    counts = dict(paths.items(seen[-1][1].trained))
    assert counts == {path: STEPS - starts[group] for path, group in paths.items(schedule.groups)}
    middle = STEPS // 2 + 3
    resumed = loop.run(*on_host(seen[middle][0]), STEPS - middle, *on_host(seen[middle][1]))[-1]
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(seen[-1]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert loop.traced == loop.step._cache_size() == 1


def on_host(*trees: Any) -> Any:
    """What a file would give back of some trees: new arrays of the same bytes."""
    return jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), trees)


def trial(params: Params, phases: Sequence[Any], rules: Sequence[PhaseRule] = (), seed: int = 0) -> train.Fit:
    order = np.arange(STEPS * problems.BATCH, dtype=np.int32).reshape(STEPS, problems.BATCH) % problems.EXAMPLES
    numbers = {**fits.NUMBERS, "label_smoothing": 0.0}
    rates, key = np.full(STEPS, 0.01, np.float32), jax.random.key(seed)
    return train.Fit(
        params,
        tuple(phases),
        lambda start, stop: order[start:stop],
        rates,
        fits._WEIGHTS,
        numbers,
        key,
        rules=tuple(rules),
    )


def final(spec: train.Spec, of_fits: Sequence[train.Fit], ends: Sequence[int] = (40, STEPS), **further: Any) -> Any:
    data = problems.data((2, 2, 1))
    *_, (state, _) = train.fit(spec, of_fits, data, list(ends), **further)
    return state


def test_the_trainer_compiles_a_schedule_once_and_equals_phases() -> None:
    model = models.build("mlp", 8, hidden=(6,), activation="relu")
    params = models.init(model, jax.random.key(0), (2, 2, 1))
    spec = fits.program(model, None)
    phases = lp_ft.strategy(params, Context(stages=("hidden_0", "head")), start=0.4)
    schedule, starts = as_schedule(params, phases)
    by_mask = final(spec, [trial(params, zip(starts, (phase.mask for phase in phases), strict=True))])
    moving, before = (
        trial(params, [(0, schedule.scope)], [PhaseRule(schedule=schedule)]),
        vectorize.segment._cache_size(),
    )
    states = [state for state, _ in train.fit(spec, [moving], problems.data((2, 2, 1)), [20, STEPS])]
    assert vectorize.segment._cache_size() == before + 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), states[-1].params, by_mask.params)
    whole = jax.tree.map(np.asarray, states[-1])
    half = next(train.fit(spec, [moving], problems.data((2, 2, 1)), [20, STEPS]))[0]
    for leaf, start in zip(jax.tree.leaves(half.params["hidden_0"]), jax.tree.leaves(params["hidden_0"]), strict=True):
        assert np.asarray(leaf[0]).tobytes() == np.asarray(start).tobytes()
    on_host = jax.tree.map(np.asarray, half._replace(fits=half.fits, masks=half.masks))
    resumed = final(spec, [moving], (20, STEPS), states=[on_host])
    for a, b in zip(jax.tree.leaves(resumed[:3]), jax.tree.leaves(whole[:3]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def turns(memory: Any, seen: Any, *, blocks: int, on: int) -> Any:
    """So many neighbours of the blocks, the next ones every other step; 0 is always on."""
    first = seen.step // 2 % blocks
    number = jax.tree.map(lambda group: (group - 1 - first) % blocks < on, seen.groups)
    return jax.tree.map(lambda group, is_on: is_on | (group == 0), seen.groups, number), memory


def blocks_of(params: Params, slots: int, on: int = 2) -> MaskSchedule:
    groups = paths.each(lambda path, leaf: int(path[7]) if path[7] in "1234" else 0, params)
    choose = functools.partial(turns, blocks=4, on=on)
    scope = masks.by_path(params, lambda path: True)
    return MaskSchedule(no_memory, choose, scope, off="dropped", groups=groups, slots=slots)


def deep(dtype: Any = jnp.float32) -> tuple[Any, Params]:
    model = models.build("mlp", 8, hidden=(4, 4, 4, 4, 4), activation="tanh")
    params = models.init(model, jax.random.key(0), (2, 2, 1))
    return model, jax.tree.map(lambda leaf: np.asarray(leaf, dtype), {**params})


def test_groups_that_share_slots_train_as_without_them() -> None:
    with jax.enable_x64(True):
        model, params = deep(jnp.float64)
        images = jax.random.normal(jax.random.key(1), (8, 2, 2, 1))
        targets = jax.nn.one_hot(jnp.arange(8), 8)

        def loss(params: Params) -> jax.Array:
            return optax.softmax_cross_entropy(models.apply(model, params, images), targets).mean()

        runs = [Loop(OPTIMIZERS["adam"], blocks_of(params, slots), loss).run(params, 20) for slots in (2, 0, 1)]
        for (with_slots, _), (without, _) in zip(runs[0], runs[1], strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), with_slots, without)
        states = [run[-1][1] for run in runs]
        assert jax.tree.all(jax.tree.map(np.array_equal, states[0].trained, states[1].trained))
        block = sum(leaf.size for leaf in jax.tree.leaves(params["hidden_1"]))
        numbers = [sum(leaf.size for leaf in jax.tree.leaves(state.state) if leaf.ndim) for state in states]
        assert numbers[1] - numbers[0] == 2 * 2 * block  # two moments of two of four blocks
        assert (int(states[0].over), int(states[2].over)) == (0, 20)


def test_the_trainer_forms_no_gradient_of_what_is_off() -> None:
    model, params = deep()
    spec = train.Spec(model, fits.program(model, None).loss, fits.program(model, None).optimizer)
    results = []
    for slots in (2, 0):
        schedule = blocks_of(params, slots)
        of_fit = trial(params, [(0, schedule.scope)], [PhaseRule(schedule=schedule)])._replace(weights=())
        assert forms_no_others(train.specialize(spec, of_fit, (schedule.scope,)), params) == bool(slots)
        results.append(final(spec, [of_fit], (20, STEPS)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), results[0].params, results[1].params)


def test_lisa_holds_the_moments_of_two_of_twelve_blocks() -> None:
    model = models.build("vit:width=32:depth=12:heads=2:patch=4", 8, hidden=(8,), activation="gelu")
    params = models.abstract(model, (8, 8, 1))
    schedule = lisa.strategy(params, Context(stages=models.names(model)), layers=2)
    state = jax.eval_shape(optimizer.scheduled(optax.adamw(1e-3), schedule).init, params)

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    block = size(params["block_0"])
    moments = 2 * (size(params) - 12 * block + 2 * block)
    assert moments <= size(state) <= 1.02 * moments
    assert size(jax.eval_shape(optax.adamw(1e-3).init, params)) > 4 * moments


def step_of(model: Any, params: Params, mask: Any, schedule: MaskSchedule | None, batch: int) -> tuple[Any, Any]:
    """(The trainer's step of one fit under AdamW, the shapes and dtypes of its arguments)."""
    shape = (8, 8, 1)
    program = fits.program(model, None)
    spec = train.Spec(model, program.loss, optimizers.spec("adamw", weight_decay=0.1)[0])
    rules = () if schedule is None else (PhaseRule(schedule=schedule),)
    of_fit = trial(params, [(0, mask)], rules)._replace(weights=())
    spec = train.specialize(spec, of_fit, (mask,))
    trained, frozen = masks.split(params, trained_leaves(spec))
    hyper = Hyper((), of_fit.numbers, traced_leaves(spec, of_fit, (mask,)), of_fit.key, None, None)

    def one_step(trained: Params, state: Any, frozen: Params, batch: Batch, rate: Any, number: Any) -> Any:
        return step(spec, hyper, trained, frozen, state, batch, rate, number)

    rate, number = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(lambda tree, rate: transformation(spec, hyper, rate).init(tree), trained, rate)
    leaves: Any = (((batch, *shape), jnp.uint8), ((batch,), jnp.int32), ((batch,), jnp.float32))
    examples: Any = [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]
    return one_step, (trained, state, frozen, Batch(*examples), rate, number)


def products(jaxpr: Any, shape: tuple[int, ...]) -> Counter[str]:
    """{where: how many products there are of this shape}: in a branch of a choice, or elsewhere."""
    counts: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            counts["always"] += equation.outvars[0].aval.shape == shape
        for number, part in enumerate(inner_programs(equation)):
            of_part = products(part, shape)
            if equation.primitive.name == "cond":
                of_part = Counter({f"branch {number}": sum(of_part.values())})
            counts += of_part
    return +counts


@pytest.mark.parametrize("slots", [2, 0])
def test_only_what_is_on_has_products_that_give_its_gradient(slots: int) -> None:
    model = models.build("mlp", 8, hidden=(6,) * 13, activation="tanh")
    params = models.abstract(model, (8, 8, 1))
    schedule = lisa.strategy(params, Context(stages=models.names(model)), layers=2)
    schedule = replace(schedule, slots=slots)
    function, arguments = step_of(model, params, schedule.scope, schedule, batch=5)
    of_program = products(jax.make_jaxpr(function)(*arguments).jaxpr, params["hidden_1"]["kernel"].shape)
    assert of_program == ({"branch 1": 12} if slots else {"always": 12})


@pytest.mark.slow
def test_the_peak_of_lisa_is_at_most_a_tenth_above_that_of_a_mask_that_stands_still() -> None:
    model = models.build("vit:width=32:depth=12:heads=2:patch=4", 8, hidden=(8,), activation="gelu")
    params, stages = models.abstract(model, (8, 8, 1)), models.names(model)
    schedule = lisa.strategy(params, Context(stages=stages), layers=2)
    on = [name for name in stages if not name.startswith("block_")] + ["block_3", "block_8"]
    peaks = []
    for mask, moves in ((schedule.scope, schedule), (masks.under(params, on), None)):
        function, arguments = step_of(model, params, mask, moves, batch=16)
        compiled = jax.jit(function, donate_argnums=(0, 1)).lower(*arguments).compile()
        peak = cost.analyze(compiled).peak_bytes
        assert peak is not None
        peaks.append(peak)
    assert peaks[0] <= 1.1 * peaks[1], peaks
