"""Running statistics beside parameters, in Linen and NNX: what the audit says of them, and of whose state a leaf is."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from planted.loops import statistics

from tljax import audit, masks, optimizer

BATCH = {"x": jnp.arange(24.0).reshape(8, 3) / 24, "y": jnp.arange(8) % 2}
TRAINED = ["two", "norm_2", "head"]
"""The layers that train; below them `one` and `norm_1` are frozen."""
OF_NORM_1 = {"batch_stats/norm_1/mean", "batch_stats/norm_1/var"}
OF_NORM_2 = {"batch_stats/norm_2/mean", "batch_stats/norm_2/var"}


@pytest.fixture(autouse=True)
def anyone_s_jax():
    with jax.numpy_rank_promotion("allow"):
        yield


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["y"]).mean()


class Linen(nn.Module):
    tracks: bool
    """Whether the frozen norm follows the batch all the same, which is the bug."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=not self.tracks, name="norm_1")(nn.Dense(4, name="one")(x)))
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm_2")(nn.Dense(4, name="two")(x)))
        return nn.Dense(2, name="head")(x)


class State(TrainState):
    batch_stats: Any = None


class Loop(NamedTuple):
    step: Any
    state: Any
    params: Any
    """Of the state."""
    statistics: Any


@functools.cache
def linen(tracks, tx=None):
    model = Linen(tracks)
    variables = model.init(jax.random.key(0), BATCH["x"])
    params, statistics = variables["params"], variables["batch_stats"]

    @jax.jit
    def train_step(state, batch):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, changed = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
            return cross_entropy(logits), changed["batch_stats"]

        gradients, statistics = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=statistics)

    tx = optimizer.masked(optax.adam(0.1), masks.under(params, TRAINED)) if tx is None else tx
    state = State.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=statistics)
    return Loop(train_step, state, params, statistics)


class Nnx(nnx.Module):
    def __init__(self, tracks):
        rngs = nnx.Rngs(0)
        self.one, self.two, self.head = (
            nnx.Linear(3, 4, rngs=rngs),
            nnx.Linear(4, 4, rngs=rngs),
            nnx.Linear(4, 2, rngs=rngs),
        )
        self.norm_1, self.norm_2 = (
            nnx.BatchNorm(4, use_running_average=not tracks, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
        )

    def __call__(self, x):
        x = nnx.relu(self.norm_1(self.one(x)))
        return self.head(nnx.relu(self.norm_2(self.two(x))))


def modules(tracks, tx=None):
    model = Nnx(tracks)
    params = nnx.state(model, nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(lambda model: cross_entropy(model(batch["x"])))(model))

    tx = optimizer.masked(optax.adam(0.1), lambda params: masks.under(params, TRAINED)) if tx is None else tx
    state = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    return Loop(train_step, state, params, nnx.state(model, nnx.BatchStat))


LOOPS = {"linen": linen, "nnx": modules}


def collections(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


def variables(state):
    return nnx.state(state[0], (nnx.Param, nnx.BatchStat))


PICKS = {"linen": collections, "nnx": variables}


def paths_of(findings):
    """The paths of findings, as Linen has them, whatever has made the loop."""
    return {finding.path.removesuffix("/value") for finding in findings}


@pytest.mark.parametrize("kind", LOOPS)
def test_statistics_that_move_beside_frozen_parameters_are_told_of(kind):
    loop = LOOPS[kind](tracks=True)
    mask = masks.under(loop.params, TRAINED)
    report = audit.step(loop.step, loop.state, BATCH, mask)
    assert not report.refuted and not report.undecided
    places = {"linen": "batch_stats/norm_1/{}", "nnx": "0/norm_1/{}/value"}[kind]
    assert report.drifting == tuple(places.format(name) for name in ("mean", "var"))
    [note] = [row for row in report.table().splitlines() if row.startswith("note: ")]
    assert all(f"'{path}'" in note for path in report.drifting) and "norm_2" not in note
    assert " move (0 becomes " in note and "all parameters of 'norm_1' are frozen" in note and "`params=`" in note
    with pytest.warns(UserWarning, match="leaves alone what the mask freezes.*norm_1/mean"):
        audit.frozen(loop.step, loop.state, BATCH, mask)
    shapes = audit.step(loop.step, jax.eval_shape(lambda: loop.state), BATCH, mask) if kind == "linen" else report
    assert shapes.drifting == report.drifting


@pytest.mark.parametrize("kind", LOOPS)
def test_statistics_that_stay_or_whose_layer_trains_are_not(kind):
    kept, tracked = LOOPS[kind](tracks=False), LOOPS[kind](tracks=True, tx=optax.adam(0.1))
    report = audit.frozen(kept.step, kept.state, BATCH, masks.under(kept.params, TRAINED))
    assert not report.drifting and not report.notes
    report = audit.frozen(tracked.step, tracked.state, BATCH, jax.tree.map(lambda _: True, tracked.params))
    assert not report.drifting and not report.notes


def planted_drift(is_clean):
    loop = statistics.statistics_drift(is_clean)
    return loop, loop.mask["params"], None


def planted_train_mode(is_clean):
    loop = statistics.frozen_norm_in_train_mode(is_clean)

    def params(state):
        return nnx.filter_state(state[0], nnx.Param)

    return loop, masks.under(params(loop.state), "head"), params


@pytest.mark.slow
@pytest.mark.parametrize("planted", [planted_drift, planted_train_mode])
def test_of_the_planted_loops_the_statistics_are_told_of_where_parameters_alone_are_asked_about(planted):
    for is_clean in (False, True):
        loop, mask, params = planted(is_clean)
        report = audit.step(loop.step, loop.state, loop.batch, mask, params=params)
        assert not report.broken and len(report.drifting) == (0 if is_clean else 2), report.table()


def test_what_moves_with_a_frozen_stage_is_told_of_though_it_has_no_parameters_of_its_own():
    params = {"body": {"conv": jnp.ones((3, 3))}, "head": jnp.ones((3, 2))}
    state = {"params": params, "stats": {"body": {"norm": {"mean": jnp.zeros(3)}}}, "losses": jnp.zeros(4)}

    @jax.jit
    def step(state, batch):
        hidden = batch["x"] @ state["params"]["body"]["conv"]
        head = state["params"]["head"] - jax.grad(lambda head: cross_entropy(hidden @ head))(state["params"]["head"])
        mean = state["stats"]["body"]["norm"]["mean"] * 0.9 + hidden.mean(0)
        new = {**state["params"], "head": head}
        return {"params": new, "stats": {"body": {"norm": {"mean": mean}}}, "losses": state["losses"] + hidden.mean()}

    assert audit.step(step, state, BATCH, "head").drifting == ("stats/body/norm/mean",)
    assert not audit.step(step, state, BATCH, "body/**").drifting


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("written", ["under", "all False", "True by hand"])
def test_a_claim_on_statistics_is_of_frozen_layers_alone(written, tracks, kind):
    """A norm that trains tracks its statistics, which breaks no claim, however the mask has them."""
    loop, pick = LOOPS[kind](tracks), PICKS[kind]
    tree = pick(loop.state)
    prefixes = [f"params/{name}" for name in TRAINED] if kind == "linen" else TRAINED
    mask = masks.under(tree, prefixes)
    if written == "True by hand":
        layers = [f"batch_stats/{name}" for name in TRAINED] if kind == "linen" else TRAINED
        names = dict.fromkeys((*layers, *prefixes))
        mask = jax.tree.map_with_path(
            lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/").startswith(tuple(names)), tree
        )
    elif written == "all False" and kind == "linen":
        mask = {
            "params": masks.under(loop.params, TRAINED),
            "batch_stats": jax.tree.map(lambda _: False, loop.statistics),
        }
    report = audit.step(loop.step, loop.state, BATCH, mask, params=pick)
    claimed = paths_of(report.select("frozen"))
    of_norm_1, of_norm_2 = (
        names if kind == "linen" else {name.removeprefix("batch_stats/") for name in names}
        for names in (OF_NORM_1, OF_NORM_2)
    )
    assert paths_of(report.refuted) == (of_norm_1 if tracks else set())
    assert not report.undecided and of_norm_1 <= claimed and not of_norm_2 & claimed
    assert (of_norm_2 <= paths_of(report.select("trains", "proved"))) == (written == "True by hand")
    assert any("nothing is claimed of running statistics" in note for note in report.notes) == (
        written != "True by hand"
    )
    if tracks:
        with pytest.raises(AssertionError, match=r"refuted +frozen +.*norm_1/mean"):
            audit.frozen(loop.step, loop.state, BATCH, mask, params=pick)
    else:
        audit.frozen(loop.step, loop.state, BATCH, mask, params=pick)


def test_statistics_alone_are_claimed_as_the_mask_has_them():
    """Where they are asked about by themselves, no layer beside them trains."""
    loop = linen(tracks=False)
    frozen = jax.tree.map(lambda _: False, loop.statistics)
    report = audit.step(loop.step, loop.state, BATCH, frozen, params=lambda state: state.batch_stats)
    assert paths_of(report.refuted) == {"norm_2/mean", "norm_2/var"}


def test_rates_are_of_what_an_optimizer_moves():
    loop = linen(tracks=False)
    mask = {
        "params": jax.tree.map(lambda m: 0.5 if m else False, masks.under(loop.params, TRAINED)),
        "batch_stats": {"norm_1": {"mean": False, "var": False}, "norm_2": {"mean": True, "var": True}},
    }
    tx = optax.chain(optimizer.masked(optax.adam(0.1), masks.under(loop.params, TRAINED)), optax.scale(0.5))
    halved = linen(tracks=False, tx=tx)
    report = audit.rates(halved.step, halved.state, BATCH, mask, params=collections)
    assert not paths_of(report.select("rate")) & (OF_NORM_1 | OF_NORM_2)


# ---- Whose optimizer state a leaf is


def test_the_statistics_and_the_moments_of_another_layer_are_no_state_of_one():
    """norm_1 and norm_2 are of one shape, and their leaves of one name."""
    loop = linen(tracks=False, tx=optax.chain(optax.adam(0.1), freeze_below()))
    report = audit.step(
        loop.step,
        loop.state,
        BATCH,
        {"mean": False, "var": False},
        params=lambda state: state.batch_stats["norm_1"],
    )
    assert {finding.detail for finding in report.select("state")} == {"0 bytes"}
    report = audit.step(
        loop.step, loop.state, BATCH, {"scale": False, "bias": False}, params=lambda state: state.params["norm_1"]
    )
    assert len(report.select("state", "refuted")) == 2
    assert all("norm_2" not in finding.detail and "norm_1" in finding.detail for finding in report.select("state"))


def test_of_modules_neither():
    loop = modules(tracks=False, tx=optax.chain(optax.adam(0.1), freeze_below()))
    for kind, refuted in ((nnx.BatchStat, 0), (nnx.Param, 2)):
        mask = jax.tree.map(lambda _: False, nnx.state(loop.state[0].norm_1, kind))
        report = audit.step(
            loop.step, loop.state, BATCH, mask, params=lambda state, kind=kind: nnx.state(state[0].norm_1, kind)
        )
        rows = report.select("state")
        assert len(rows) == 2 and len(report.select("state", "refuted")) == refuted
        assert not any("norm_2" in finding.detail for finding in rows)


def test_what_frozen_leaves_own_is_found_where_collections_are_picked():
    """The optimizer has the parameters alone, whose paths lack the collection's name."""
    loop = linen(tracks=False, tx=optax.chain(optax.adam(0.1), freeze_below()))
    mask = masks.under(collections(loop.state), [f"params/{name}" for name in TRAINED])
    report = audit.step(loop.step, loop.state, BATCH, mask, params=collections)
    owners = {f"params/{layer}" for layer in ("one/kernel", "one/bias", "norm_1/scale", "norm_1/bias")}
    assert paths_of(report.select("state", "refuted")) == owners
    assert paths_of(report.select("state", "proved")) >= OF_NORM_1


def freeze_below():
    """A transformation of optax that cuts the updates of what is frozen, though moments are kept of it."""
    return optax.masked(optax.set_to_zero(), lambda params: masks.invert(masks.under(params, TRAINED)))
