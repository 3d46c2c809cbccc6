"""Averages, plateaus and what is restored equal loops in NumPy, alone, beside others and after a stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import BATCH, FEATURES, LABELS, gradients

from experiments.runs import resume
from tljax import batch_stats, masks, models, objective, optimizers, paths, train
from tljax.data import draw
from tljax.plateau import plateau
from tljax.types import InputError, PhaseRule, Stage

STEPS, EVERY, RATE, WEIGHT = 24, 2, 0.0625, 0.0625
POINTS = [*range(EVERY, STEPS + 1, EVERY)]
MODEL = models.build("mlp", 3, hidden=(6, 5), activation="relu")
TRUE = lambda path: True  # noqa: E731


def order_of(seed):
    return lambda start, stop: draw.order(seed, 40, BATCH, start, stop, epochs=True, subset=None)


def start_of(seed):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.result_type(float)), models.init(MODEL, jax.random.key(seed), (3, 4, 1))
    )


def fit_of(seed, phases, rules=(), average=False):
    params = start_of(seed)
    _, numbers = optimizers.spec("adam", clip=0.5)
    numbers |= {"average_weight": WEIGHT} if average else {}
    rates = np.full(STEPS, RATE, np.float32)
    built = tuple((first, mask(params)) for first, mask in phases)
    return train.Fit(params, built, order_of(seed), rates, (), numbers, jax.random.key(0), rules=rules)


def spec_of(average=False):
    built, _ = optimizers.spec("adam", clip=0.5)
    return train.Spec(MODEL, objective.loss("softmax_cross_entropy"), built, averages=average)


def head(params):
    return masks.under(params, "head")


def head_and_part(params):
    """The head, and every second column of the kernel below it."""
    mask = masks.under(params, "head")
    return {**mask, "hidden_1": {**mask["hidden_1"], "kernel": np.arange(5) % 2 == 0}}


def everything(params):
    return masks.by_path(params, TRUE)


def loss_of(flat):
    """The mean cross-entropy over all examples: what the tests take for a validation loss."""
    h = FEATURES.reshape(40, -1)
    for stage in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ flat[f"{stage}/kernel"] + flat[f"{stage}/bias"], 0)
    logits = h @ flat["head/kernel"] + flat["head/bias"]
    log_q = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    return -log_q[np.arange(40), LABELS].mean()


def flat_rows(tree):
    """{path: array} of each fit of a stacked tree."""
    leaves = {path: np.asarray(leaf) for path, leaf in paths.items(tree)}
    return [{path: leaf[row] for path, leaf in leaves.items()} for row in range(len(next(iter(leaves.values()))))]


def params_of(state):
    """{path: array} of each fit of a state."""
    return [
        dict(paths.items(jax.tree.map(np.asarray, state.params_and_state(row)[0]))) for row in range(len(state.fits))
    ]


def score_of(flat, step):
    """A score that rises and falls in the middle of a phase, and follows from the parameters to the last bit."""
    return float(np.cos(step / 3.0 + 20 * loss_of(flat)))


def validate(state):
    return [score_of(flat, state.step) for flat in params_of(state)] if state.step in POINTS else None


def last_states(spec, fits, ends, **more):
    """{number of the fit: (parameters, average, steps at which its phases began) at the end}."""
    last, began = {}, {}
    for state, _ in train.fit(spec, fits, train.load(FEATURES, LABELS), ends, validate=validate, **more):
        averages = flat_rows(state.average.params) if state.average is not None else [None] * len(state.fits)
        for row, i in enumerate(state.fits):
            began.setdefault(i, {})[len(state.masks[0]) - 1] = state.began
            last[i] = params_of(state)[row], averages[row], began[i], state.over
    return last


def by_numpy(seed, phases, rules, average=False):
    """The same in float64, from the formulas: parameters, average, and the steps at which phases began."""
    p = {name: np.array(leaf) for name, leaf in paths.items(start_of(seed))}
    chosen = [dict(paths.items(mask(start_of(seed)))) for _, mask in phases]
    mean, memory, phase, began, scores, best = {}, {}, 0, {0: 0}, [], None

    def enter():
        for name in p:
            selected = np.broadcast_to(np.asarray(chosen[phase][name]), p[name].shape)
            if selected.any():
                mean.setdefault(name, p[name].copy())
            m, v, t = memory.get(name, (np.zeros(p[name].shape),) * 2 + (np.zeros(p[name].shape),))
            memory[name] = tuple(np.where(selected, part, 0) for part in (m, v, t))

    enter()
    for step in range(STEPS):
        rule = rules[phase] if rules else PhaseRule()
        rows = order_of(seed)(step, step + 1)[0]
        g = gradients(p, rows[rows >= 0])
        g = {name: np.where(chosen[phase][name], leaf, 0) for name, leaf in g.items()}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
        for name, leaf in g.items():
            on = np.broadcast_to(np.asarray(chosen[phase][name]), leaf.shape)
            leaf = leaf * min(1, 0.5 / norm)
            m, v, t = memory[name]
            m, v, t = 0.9 * m + 0.1 * leaf, 0.999 * v + 0.001 * leaf**2, t + on
            memory[name] = m, v, t
            safe = np.maximum(t, 1)
            move = m / (1 - 0.9**safe) / (np.sqrt(v / (1 - 0.999**safe)) + 1e-8)
            p[name] = np.where(on, p[name] - np.float64(np.float32(RATE) * np.float32(rule.rate)) * move, p[name])
            if name in mean and on.any():
                mean[name] = np.where(on, mean[name] + WEIGHT * (p[name] - mean[name]), mean[name])
        done = step + 1
        ends = done == ([*(first for first, _ in phases), STEPS][phase + 1])
        if (rule.until or rule.restore) and done in POINTS:
            scores.append(score_of(p, done))
            if scores[-1] > max(scores[:-1], default=-np.inf):
                best = (
                    {name: leaf.copy() for name, leaf in p.items()},
                    {name: leaf.copy() for name, leaf in mean.items()},
                )
            ends |= bool(rule.until) and rule.until(scores)
        if ends:
            if rule.restore and scores:
                p, mean = best
            scores, best, phase = [], None, phase + 1
            if phase == len(phases):
                break
            began[phase] = done
            enter()
    return p, mean if average else None, began


PLANS = {
    "average of one phase": (((0, everything),), (), True),
    "average of phases that free and freeze": (((0, head), (8, head_and_part), (16, everything)), (), True),
    "average of what is frozen again": (((0, everything), (10, head)), (), True),
    "plateau": (((0, head), (20, everything)), (PhaseRule(plateau(2)), PhaseRule()), False),
    "plateau, restored and slower": (
        ((0, everything), (20, head_and_part)),
        (PhaseRule(plateau(1), restore=True), PhaseRule(rate=0.25)),
        True,
    ),
    "restored at the latest end": (((0, everything), (18, head)), (PhaseRule(restore=True), PhaseRule()), True),
    "one phase that stops": (((0, everything),), (PhaseRule(plateau(2), restore=True, rate=0.5),), True),
    "restored at the last step": (((0, head), (6, everything)), (PhaseRule(), PhaseRule(restore=True)), False),
}


QUICK = ("average of phases that free and freeze", "plateau, restored and slower", "restored at the last step")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PLANS])
def test_what_ends_a_fit_equals_numpy_in_float64(name):
    phases, rules, average = PLANS[name]
    ends = sorted({*POINTS, *(first for first, _ in phases[1:])})
    with jax.enable_x64(True):
        fits = [fit_of(seed, phases, rules, average) for seed in (0, 1)]
        ends_by_fit = last_states(spec_of(average), fits, ends)
        expected = [by_numpy(seed, phases, rules, average) for seed in (0, 1)]
    assert ends_by_fit.keys() == {0, 1}
    for i, (params, mean, began) in enumerate(expected):
        of_fit = ends_by_fit[i]
        assert of_fit[2] == began
        for path, leaf in params.items():
            np.testing.assert_allclose(of_fit[0][path], leaf, rtol=0, atol=1e-11, err_msg=path)
        assert (of_fit[1] is None) == (mean is None)
        for path, leaf in (mean or {}).items():
            np.testing.assert_allclose(of_fit[1][path], leaf, rtol=0, atol=1e-11, err_msg=path)
        assert mean is None or of_fit[1].keys() == mean.keys()


def centred(key, x):
    return {"scale": jnp.ones(12)}, {"mean": jnp.zeros(12)}


def centre(params, state, x, *, key, train, weight):
    mean = state["mean"]
    flat = x.reshape(len(x), -1)
    if train:
        mean = 0.75 * mean + 0.25 * (weight[:, None] * flat).sum(0) / weight.sum()
    return params["scale"][None] * (flat - mean[None]), {"mean": mean}


@pytest.mark.slow
def test_the_average_of_a_models_state_is_that_of_the_states_after_each_step():
    """Two phases: the state is tracked in the first, and stands still in the second."""
    with jax.enable_x64(True):
        model = (Stage("centre", centred, centre), *models.build("mlp", 3, hidden=(), activation="relu"))
        variables = models.init(model, jax.random.key(0), (3, 4, 1))
        params, state = batch_stats.split(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables))
        built, numbers = optimizers.spec("sgd")
        numbers |= {"average_weight": WEIGHT}
        rates = np.full(STEPS, RATE, np.float32)
        phases = ((0, everything(params)), (16, head(params)))
        fit = train.Fit(params, phases, order_of(0), rates, (), numbers, jax.random.key(0), model_state=state)
        spec = train.Spec(model, objective.loss("softmax_cross_entropy"), built, averages=True)
        mean, seen = np.zeros(12), []
        for now, _ in train.fit(spec, [fit], train.load(FEATURES, LABELS), [*range(1, STEPS + 1)]):
            seen.append(np.asarray(now.model_state["centre"]["mean"][0]))
            mean = mean + WEIGHT * (seen[-1] - mean)
            np.testing.assert_allclose(now.average.model_state["centre"]["mean"][0], mean, rtol=0, atol=1e-12)
    assert len(seen) == STEPS and not np.array_equal(seen[0], seen[15]) and np.array_equal(seen[15], seen[-1])


def test_a_plateau_is_that_nothing_of_late_is_better_than_what_was_before():
    rng = np.random.default_rng(0)
    for patience in (1, 2, 3):
        for count in range(8):
            scores = rng.integers(0, 4, count).tolist()
            before, late = scores[: max(count - patience, 0)], scores[max(count - patience, 0) :]
            expected = bool(before) and max(late) <= max(before)
            assert plateau(patience)(scores) == expected
    assert plateau(1, min_delta=0.1)([0.5, 0.6]) and not plateau(1, min_delta=0.05)([0.5, 0.6])
    for wrong in ({"patience": 0}, {"patience": 1.5}, {"patience": 1, "min_delta": -1}):
        with pytest.raises(InputError):
            plateau(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("many", ["vmap", *(pytest.param(m, marks=pytest.mark.devices(2)) for m in ("data:2", "pmap"))])
def test_an_average_is_the_same_however_fits_stand_on_devices(many):
    """But for rounding: side by side, with batches over two devices, and under pmap."""
    phases, rules, average = PLANS["average of phases that free and freeze"]
    fits, spec = [fit_of(seed, phases, rules, average) for seed in (0, 1)], spec_of(average)
    ends, two = sorted({*POINTS, 8, 16}), tuple(jax.devices()[:2])
    how = {
        "vmap": train.Execution(many="vmap"),
        "data:2": train.Execution(two, devices_per_batch=2),
        "pmap": train.Execution(two, devices_per_batch=2, mode="pmap"),
    }
    expected, actual = (last_states(spec, fits, ends, execution=each) for each in (train.Execution(), how[many]))
    for i, of_fit in expected.items():
        for path, leaf in of_fit[1].items():
            np.testing.assert_allclose(actual[i][1][path], leaf, rtol=0, atol=1e-5, err_msg=path)


PARTS = (((0, head), (12, head_and_part), (20, everything)), (PhaseRule(plateau(2), restore=True),) * 3, True)
"""Fits of other seeds end their phases at other steps."""


def arrays_of(spec, fits, ends, **more):
    """{number: the bytes of a fit's parameters and average at the end, and when its phases began}."""
    ends_by_fit = last_states(spec, fits, ends, **more)
    return {
        i: ([leaf.tobytes() for tree in of_fit[:2] for leaf in tree.values()], of_fit[2:])
        for i, of_fit in ends_by_fit.items()
    }


@pytest.mark.slow
@pytest.mark.devices(2)
def test_a_fit_ends_its_phases_alike_whatever_it_is_trained_with_and_wherever_it_is_taken_up():
    phases, rules, average = PARTS
    fits, spec = [fit_of(seed, phases, rules, average) for seed in range(3)], spec_of(average)
    ends = sorted({*POINTS, 12, 20})
    together = arrays_of(spec, fits, ends)
    assert len({str(began) for _, (began, _) in together.values()}) > 1
    assert all(over for _, (_, over) in together.values())
    alone = [arrays_of(spec, [fit], ends)[0] for fit in fits]
    assert alone == [together[i] for i in range(3)]
    over_devices = arrays_of(spec, fits, ends, execution=train.Execution(tuple(jax.devices()[:2])))
    assert over_devices == together
    # Taken up from everything that was ever yielded, in NumPy as it is saved.
    parts, history = (), []
    for state, _ in train.fit(spec, fits, train.load(FEATURES, LABELS), ends, validate=validate):
        parts = resume.joined(parts, resume.held(state))
        history.append(parts)
    for parts in history[:-1:5]:
        ended = {i: None for part in parts for i in part.fits if part.step == STEPS}
        resumed = arrays_of(spec, fits, ends, states=parts)
        assert resumed.keys() | ended.keys() == together.keys()
        for i, of_fit in resumed.items():
            assert of_fit[0] == together[i][0]
