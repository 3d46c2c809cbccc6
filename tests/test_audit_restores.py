"""A plan of what is restored, held against what came."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from tljax import graft, weights
from tljax.audit.restores import restore
from tljax.types import InputError

DRAW = np.random.default_rng(0)


def draw(width=3):
    return {
        "body": {"kernel": DRAW.normal(size=(4, 4)).astype(np.float32), "bias": DRAW.normal(size=4).astype(np.float32)},
        "head": {"kernel": DRAW.normal(size=(4, width)).astype(np.float32)},
    }


WEIGHTS, FRESH = draw(), draw()
LOADED = FRESH | {"body": WEIGHTS["body"]}


def verdicts(report):
    return {finding.path: (finding.claim, finding.verdict) for finding in report.findings}


def test_what_came_is_proved_and_what_was_kept_is_named():
    report = restore(WEIGHTS, LOADED, ["body/**"], fresh=FRESH)
    assert verdicts(report) == {
        "body/kernel": ("restored", "proved"),
        "body/bias": ("restored", "proved"),
        "head/kernel": ("frozen", "proved"),
    }
    assert report.notes == ("kept, as the plan has it: 'head/kernel'", "of the weights 'head/kernel' was not used")


def test_a_load_that_loaded_nothing_is_refuted():
    """As a loader's that looks under other names, and takes what it does not find from the target."""
    report = restore(WEIGHTS, FRESH, ["body/**"], fresh=FRESH)
    assert {finding.path for finding in report.refuted} == {"body/kernel", "body/bias"}
    assert all("has its fresh value" in finding.detail for finding in report.refuted)
    unknown = restore(WEIGHTS, FRESH, ["body/**"])
    assert len(unknown.refuted) == 2 and "16 of 16 numbers are not those of 'body/kernel'" in unknown.refuted[1].detail


def test_without_a_plan_every_leaf_is_to_come():
    larger = LOADED | {"block": {"kernel": np.ones(2, np.float32)}}
    refuted = {finding.path: finding.detail for finding in restore(WEIGHTS, larger, fresh=larger).refuted}
    assert refuted["block/kernel"] == "the weights have no 'block/kernel': it was not loaded, and has its fresh value"
    assert refuted["head/kernel"].startswith("has its fresh value")
    assert not restore(WEIGHTS, WEIGHTS).refuted


def test_a_leaf_that_is_no_array_was_not_loaded():
    described = LOADED | {"head": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}}
    [finding] = restore(WEIGHTS, described).refuted
    assert finding.path == "head/kernel" and "is a ShapeDtypeStruct" in finding.detail


def test_names_and_casts_are_those_of_the_plan():
    low = {"trunk": {"w": WEIGHTS["body"]["kernel"].astype(jnp.bfloat16)}, "head": FRESH["head"]["kernel"]}
    assert not restore(WEIGHTS, low, {"trunk/w": ("body/kernel", "bfloat16"), "head": None}).refuted
    assert not restore(WEIGHTS, low, {"trunk/w": "body/kernel"}, dtype=jnp.bfloat16).refuted
    [finding] = restore(WEIGHTS, low, {"trunk/w": "body/kernel"}).refuted
    assert finding.detail == (
        "is bfloat16, and 'body/kernel' is float32: the plan names no such cast, with its numbers rounded"
    )
    [finding] = restore(WEIGHTS, low, {"trunk/w": ("head/kernel", "bfloat16")}).refuted
    assert finding.detail == "has shape (4, 4), and 'head/kernel' has (4, 3)"
    nudged = low | {"trunk": {"w": (low["trunk"]["w"] * jnp.bfloat16(1.01)).astype(jnp.bfloat16)}}
    assert restore(WEIGHTS, nudged, {"trunk/w": ("body/kernel", "bfloat16")}).refuted


def test_a_plan_of_graft_is_one():
    plan = graft.plan(WEIGHTS, FRESH, fresh=["head"])
    grafted, _ = graft.apply(plan, WEIGHTS, FRESH)
    assert not restore(WEIGHTS, grafted, plan, fresh=FRESH).refuted
    assert len(restore(WEIGHTS, FRESH, plan, fresh=FRESH).refuted) == 2


def test_what_the_plan_keeps_must_be_as_before():
    [finding] = restore(WEIGHTS, WEIGHTS, ["body/**"], fresh=FRESH).refuted
    assert (finding.path, finding.claim) == ("head/kernel", "frozen")


def test_a_train_state_and_a_file_of_weights(tmp_path):
    file = tmp_path / "w.safetensors"
    flat = {f"{stage}/{name}": leaf for stage, leaves in WEIGHTS.items() for name, leaf in leaves.items()}
    weights.write(file, flat)
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, LOADED), tx=optax.adam(0.1))
    report = restore(file, state, ["body/**"], fresh=FRESH)
    assert not report.refuted and len(report.select("restored")) == 2
    assert len(restore(file, state).refuted) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((WEIGHTS, LOADED, ["bdy/**"]), "pattern 'bdy/**' matches no leaf"),
        (
            (WEIGHTS, LOADED, {"boby/kernel": "body/kernel"}),
            "the plan names 'boby/kernel', which the loaded tree has not",
        ),
        ((WEIGHTS, LOADED, {"body/kernel": "boby/kernel"}), "from 'boby/kernel', which the weights have not; nearest"),
        ((WEIGHTS, LOADED, {"body/kernel": 3}), "the plan's 'body/kernel' is 3"),
        ((WEIGHTS, LOADED, {"body/kernel": ("body/kernel", "bf16")}), "the plan casts to 'bf16', which is no dtype"),
        ((WEIGHTS, LOADED, [3]), "the plan has 3: give globs"),
        ((WEIGHTS, {}, None), "what the loader gave has no leaf"),
        (("nowhere.npz", LOADED, None), "'nowhere.npz' does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    with pytest.raises(InputError) as caught:
        restore(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
