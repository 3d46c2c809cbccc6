"""DoRA and PiSSA: what they mean by their papers' formulas in NumPy, at the start, after training, and merged."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_low_rank import LABELS, VIT, built, drawn_for, fitted

from experiments.runs import plan
from tljax import audit, initialization, low_rank, masks, models, paths, plugins
from tljax.data import draw
from tljax.models import linen
from tljax.strategies import dora, pissa
from tljax.train import flops
from tljax.types import Context, InputError

slow = partial(pytest.param, marks=pytest.mark.slow)
RNG = np.random.default_rng(0)


def started(model, shape=(28, 28, 1), strategy="dora:rank=2", moved=True):
    """Where a fit of the strategy starts, with all that it added moved if asked for."""
    drawn, contracted = drawn_for(model, shape), partial(models.contracted, model, shape)
    initial = initialization.Initialization(models.names(model), drawn, drawn, jax.random.key(1), contracted=contracted)
    start = initialization.start(*plugins.method(strategy), initial)
    rng = np.random.default_rng(4)

    def move(path, leaf):
        added = path.split("/")[-1].startswith(("lora_", "dora_", "pissa_", "ssf_"))
        change = 0.3 * rng.normal(size=leaf.shape) if added and moved else 0
        return (np.asarray(leaf) + change).astype(np.float32)

    return start._replace(params=paths.each(move, start.params)), drawn


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("mlp", "dora:rank=2"),
        slow("mlp", "pissa:rank=2"),
        *(slow(name, f"{strategy}:rank=2") for name in (VIT, "cnn") for strategy in ("dora", "pissa")),
    ],
)
def test_at_the_start_the_outputs_are_the_sources_and_merged_is_unmerged_wherever_it_goes(name, strategy):
    model = built(name)
    apply = jax.jit(partial(models.apply, model))
    x = np.random.default_rng(5).uniform(size=(4, 28, 28, 1)).astype(np.float32)
    (start, source), (moved, _) = started(model, strategy=strategy, moved=False), started(model, strategy=strategy)
    outputs = apply(source, x)
    for form in (start.factored, start.merge):
        np.testing.assert_allclose(apply(form(start.params), x), outputs, rtol=0, atol=1e-5)
    applied = {form: apply(getattr(moved, form)(moved.params), x) for form in ("factored", "merge")}
    np.testing.assert_allclose(applied["factored"], applied["merge"], rtol=0, atol=1e-5)
    assert np.abs(applied["merge"] - outputs).max() > 0.01 and not plan.merged(moved)


SPECS = {
    "dora": "dora:rank=2:scale=3",
    "dora, not detached": "dora:rank=2:scale=3:detach=false",
    "pissa": "pissa:rank=2",
}


@pytest.mark.parametrize("name", SPECS)
def test_steps_equal_numpy(name):
    """Softmax over (x W' + b) V + c by hand, with the gradients of the papers' formulas; the kernel keeps its bytes.

    DoRA: W' = m (W + s A B) / n with n the norms of columns, which section 4.3 holds constant. PiSSA: W' = R + A B.
    """
    with jax.enable_x64(True):
        model = (linen.stage("hidden_0", nn.Dense(8)), linen.stage("head", nn.Dense(3)))
        start, _ = started(model, (6,), SPECS[name])
        start = start._replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float64), start.params))
        state = fitted(model, start, start.factored)
    before = {path: np.array(leaf, np.float64) for path, leaf in paths.items(start.params)}
    p, factor = dict(before), "pissa" if name == "pissa" else "lora"
    images = np.random.default_rng(1).normal(size=(24, 6)).astype(np.float32).astype(np.float64)
    rate = float(np.float32(0.1))
    for rows in draw.order(0, 24, 8, 0, 3, epochs=True):
        x, y = images[rows], np.eye(3)[np.asarray(LABELS)[rows]]
        a, b, v = p[f"hidden_0/{factor}_a"], p[f"hidden_0/{factor}_b"], p["head/kernel"]
        gain = 1.5 if factor == "lora" else 1.0
        direction = p["hidden_0/kernel"] + gain * a @ b
        norms = np.sqrt((direction**2).sum(0)) if factor == "lora" else np.ones(8)
        m = p.get("hidden_0/dora_magnitude", np.ones(8))
        hidden = x @ (m * direction / norms) + p["hidden_0/bias"]
        logits = hidden @ v + p["head/bias"]
        softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slope = (softmax - y) / 8
        back = x.T @ (slope @ v.T)
        of_direction = m / norms * back
        if "not" in name:
            unit = direction / norms
            of_direction = m / norms * (back - unit * (unit * back).sum(0))
        p["head/kernel"] = v - rate * hidden.T @ slope
        p["head/bias"] = p["head/bias"] - rate * slope.sum(0)
        p[f"hidden_0/{factor}_a"] = a - rate * gain * of_direction @ b.T
        p[f"hidden_0/{factor}_b"] = b - rate * gain * a.T @ of_direction
        if factor == "lora":
            p["hidden_0/dora_magnitude"] = m - rate * (back * direction / norms).sum(0)
    for path, leaf in paths.items(state.params):
        np.testing.assert_allclose(leaf[0], p[path], rtol=0, atol=1e-12, err_msg=path)
    assert state.params["hidden_0"]["kernel"][0].tobytes() == before["hidden_0/kernel"].tobytes()
    assert np.abs(p[f"hidden_0/{factor}_b"] - before[f"hidden_0/{factor}_b"]).max() > 1e-3


def test_pissa_takes_the_principal_components_and_leaves_the_rest():
    """The best approximation of the rank (Eckart and Young), with equal parts of the singular values in both."""
    shapes = {"dense": (7, 5), "conv": (3, 2, 4, 6)}
    params = {name: {"kernel": RNG.normal(size=shape)} for name, shape in shapes.items()}
    with jax.enable_x64(True):
        adapted = pissa.adapt(params | {"head": {"kernel": np.ones((5, 2))}}, jax.random.key(0), rank=3)
        again = pissa.merge(adapted, rank=3)
    for name, shape in shapes.items():
        matrix = params[name]["kernel"].reshape(-1, shape[-1])
        a, b = (np.asarray(adapted[name][f"pissa_{factor}"]) for factor in "ab")
        assert a.shape == (*shape[:-1], 3) and b.shape == (3, shape[-1])
        a = a.reshape(-1, 3)
        of_all = np.sqrt(np.linalg.eigvalsh(matrix.T @ matrix)[::-1])
        rest = np.linalg.norm(matrix - a @ b)
        assert rest == pytest.approx(np.sqrt((of_all[3:] ** 2).sum()), rel=1e-9)
        np.testing.assert_allclose(a.T @ a, np.diag(of_all[:3]), atol=1e-9)
        np.testing.assert_allclose(b @ b.T, np.diag(of_all[:3]), atol=1e-9)
        np.testing.assert_allclose(again[name]["kernel"], params[name]["kernel"], rtol=0, atol=1e-14)
    assert set(adapted["head"]) == {"kernel"}
    with pytest.raises(InputError, match=r"rank=6: a kernel \(7, 5\) has 5 singular values"):
        pissa.adapt(params, jax.random.key(0), rank=6, on="dense/kernel")


def test_norms_of_columns_need_no_sum_of_the_kernel_and_its_change():
    """Of attention's out, [heads, channels, width], against NumPy; no array of the kernel's size but the kernel."""
    w, a, b = RNG.normal(size=(2, 5, 7)), RNG.normal(size=(2, 5, 3)), RNG.normal(size=(3, 7))
    expected = np.linalg.norm((w + np.tensordot(a, b, 1)).reshape(10, 7), axis=0)
    np.testing.assert_allclose(low_rank.column_norms(*map(jnp.asarray, (w, a, b))), expected, rtol=1e-5)
    whole = {math.prod(var.aval.shape) for var in _outputs(jax.make_jaxpr(low_rank.column_norms)(w, a, b).jaxpr)}
    squared_alone = [size for size in whole if size >= w.size]
    assert squared_alone == [w.size]  # |w|^2, and W as a matrix


def _outputs(jaxpr):
    return [var for equation in jaxpr.eqns for var in equation.outvars]


def test_a_unit_to_which_nothing_leads_stays_finite():
    """Where the gradient goes through the norms too."""
    kernel = np.array([[0.0, 1.0], [0.0, 2.0]], np.float32)
    adapted = dora.adapt({"dense": {"kernel": kernel}, "head": {"kernel": kernel}}, jax.random.key(0), rank=1)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def slopes_and_kernel(params):
        merged = dora.merge(params, rank=1, detach=False)["dense"]["kernel"]
        return jnp.sum(merged**2), merged

    slopes, merged = slopes_and_kernel(adapted)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    np.testing.assert_allclose(merged, kernel, atol=1e-6)


@pytest.mark.slow
@pytest.mark.counts
@pytest.mark.parametrize("strategy", ["dora", "pissa"])
def test_they_cost_little_more_than_lora(strategy):
    """784-512-10 at batch 100; DoRA's norms take a product of the kernel with A, 2 x 784 x 512 x 4 FLOPs."""
    model = models.build("mlp", 10, hidden=(512,), activation="relu")
    start, _ = started(model, strategy=f"{strategy}:rank=4")
    [(_, mask)] = start.phases
    flops_by_form = {
        form: flops.step_flops(model, start.params, mask, (28, 28, 1), 100, getattr(start, form)) / 1e6
        for form in ("factored", "merge")
    }
    assert flops_by_form["factored"] < 95 and flops_by_form["merge"] > 160, flops_by_form


def test_dora_trains_as_many_numbers_as_lora_and_one_an_output():
    model = built("mlp")
    rows = {}
    for name in ("lora", "dora"):
        start, _ = started(model, strategy=f"{name}:rank=2")
        rows[name] = sum(row.trained_size for row in masks.table(start.params, start.phases[0][1]))
    assert rows["dora"] - rows["lora"] == 8 + 6


def test_what_adapters_leave_out_and_refuse_is_said_in_their_own_name():
    stacked = {"body": {"layers": {"kernel": np.ones((3, 4, 4))}, "dense": {"kernel": np.ones((4, 4))}}, "head": {}}
    for module in (dora, pissa):
        assert module.left_out(stacked, Context()) == ["body/layers/kernel"]
        name = module.__name__.split(".")[-1]
        with pytest.raises(InputError, match=f"{name}: the parameters have no factors"):
            module.merge({"a": {"kernel": np.ones((2, 2))}})
        with pytest.raises(InputError, match=f"{name}: no dict below the head"):
            module.adapt({"head": {"kernel": np.ones((2, 2))}}, jax.random.key(0))
        adapted = module.adapt(stacked, jax.random.key(0))
        with pytest.raises(InputError, match=f"{name}: the parameters have factors already"):
            module.adapt(adapted, jax.random.key(0))
        with pytest.raises(InputError, match=f"{name}: the factors at 'body/dense/.*_a' have rank 4, not 2"):
            module.merge(adapted, rank=2)


@pytest.mark.slow
def test_check_names_the_residuals_that_keep_their_bytes():
    [line] = [check for check in audit.check_strategy("pissa") if check.name == "frozen leaves keep their bytes"]
    assert line.passed and line.detail.endswith("that adapt left: 'hidden_0/kernel', 'hidden_1/kernel'")
    [line] = [check for check in audit.check_strategy("lora") if check.name == "frozen leaves keep their bytes"]
    assert line.passed and "residuals" not in line.detail
