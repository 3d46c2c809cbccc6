"""What became of each leaf between two checkpoints, held against a claimed mask: files, Orbax, a run's own."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tljax import audit, checkpoint, masks, weights
from tljax.audit.checkpoints import change, opened
from tljax.types import InputError

DRAW = np.random.default_rng(0)
BEFORE = {
    "body/kernel": DRAW.normal(size=(4, 8)).astype(np.float32),
    "body/bias": np.zeros(8, np.float32),
    "head/kernel": DRAW.normal(size=(8, 2)).astype(np.float32),
}
AFTER = BEFORE | {"head/kernel": BEFORE["head/kernel"] + DRAW.normal(size=(8, 2)).astype(np.float32)}


def verdicts(report):
    return {(finding.path, finding.claim): finding.verdict for finding in report.findings}


def only(report, path):
    [finding] = [finding for finding in report.findings if finding.path == path]
    return finding


def moved(path="body/kernel", **change):
    """The checkpoint after, with the leaf changed by a function."""
    [function] = change.values()
    return AFTER | {path: function(AFTER[path])}


def test_what_is_claimed_holds():
    report = audit.checkpoints(BEFORE, AFTER, ["head/**"])
    assert verdicts(report) == {
        ("body/kernel", "frozen"): "proved",
        ("body/bias", "frozen"): "proved",
        ("head/kernel", "trains"): "proved",
    }
    assert {finding.grade for finding in report.select("frozen")} == {"identical"} and not report.notes


def test_a_frozen_leaf_that_moved_is_refuted_with_how_much():
    def step(leaf):
        leaf = leaf.copy()
        leaf[1, 2] += 0.5
        leaf[3, 3] -= 0.25
        return leaf

    after = moved(by=step)
    finding = only(audit.checkpoints(BEFORE, after, "head/**"), "body/kernel")
    assert (finding.verdict, finding.grade) == ("refuted", "changed")
    share = 100 * np.linalg.norm(after["body/kernel"] - BEFORE["body/kernel"]) / np.linalg.norm(BEFORE["body/kernel"])
    assert 10 < share < 100
    assert f"2 of 32 numbers moved, by at most 0.5 ({share:.0f} % of their length), float32" in finding.detail


def test_a_trained_leaf_that_did_not_move_is_refuted():
    finding = only(audit.checkpoints(BEFORE, BEFORE, ["head/**"]), "head/kernel")
    assert (finding.claim, finding.verdict) == ("trains", "refuted") and "same bytes" in finding.detail


def test_the_sign_of_a_zero_and_the_bits_of_a_nan_are_no_move():
    before = BEFORE | {"body/bias": np.array([0, 0, np.nan, 1], np.float32)}
    bias = np.array([-0.0, 0, np.nan, 1], np.float32)
    bias.view(np.uint32)[2] ^= 1
    after = AFTER | {"body/bias": bias}
    finding = only(audit.checkpoints(before, after, ["head/**"]), "body/bias")
    assert (finding.verdict, finding.grade) == ("proved", "equal")
    assert "1 zeros of another sign and 1 NaN of other bits" in finding.detail
    finding = only(audit.checkpoints(before, after, ["**/bias"]), "body/bias")
    assert (finding.claim, finding.verdict) == ("trains", "refuted")


def test_nan_is_named_and_is_no_training():
    after = moved("head/kernel", by=lambda leaf: np.full_like(leaf, np.nan))
    finding = only(audit.checkpoints(BEFORE, after, ["head/**"]), "head/kernel")
    assert finding.verdict == "not decided" and "16 became NaN: nothing else moved" in finding.detail
    finding = only(audit.checkpoints(BEFORE, after, ["body/**"]), "head/kernel")
    assert finding.verdict == "refuted" and "16 became NaN" in finding.detail


@pytest.mark.parametrize("there, back", [(ml_dtypes.bfloat16, np.float32), (np.float32, np.float64)])
def test_a_leaf_that_is_only_cast(there, back):
    """To more bits its numbers are the same; to fewer a small move would not show; another number is a move."""
    narrow = BEFORE["body/kernel"].astype(there)
    before = BEFORE | {"body/kernel": narrow}
    finding = only(audit.checkpoints(before, AFTER | {"body/kernel": narrow.astype(back)}, ["head/**"]), "body/kernel")
    assert (finding.verdict, finding.grade) == ("proved", "equal") and "only cast" in finding.detail
    wide = narrow.astype(back) * back(1 + 1e-9 if back is np.float64 else 1 + 1e-4)
    rounded = only(
        audit.checkpoints(BEFORE | {"body/kernel": wide}, before | AFTER | {"body/kernel": narrow}, "head/**"),
        "body/kernel",
    )
    assert rounded.verdict == "not decided" and "below its rounding" in rounded.detail
    after = AFTER | {"body/kernel": narrow.astype(back) * back(2)}
    assert only(audit.checkpoints(before, after, ["head/**"]), "body/kernel").verdict == "refuted"


def test_whole_numbers_beyond_what_a_float_holds_are_compared_by_their_bits():
    assert change(np.array([2**60]), np.array([2**60 + 1])).moved == 1
    before = {"a": np.array([2**60 + 1, 1.5], np.float64), "b": np.array([2**60 + 1, 3])}
    assert change(before["b"], before["b"]).identical


def test_an_element_mask_claims_both_of_a_leaf():
    chosen = np.zeros((4, 8), bool)
    chosen[0] = True
    mask = {"body/kernel": chosen, "body/bias": False, "head/kernel": True}
    after = AFTER | {"body/kernel": BEFORE["body/kernel"] + chosen * DRAW.normal(size=(4, 8)).astype(np.float32)}
    report = audit.checkpoints(BEFORE, after, mask)
    assert verdicts(report)["body/kernel", "frozen"] == verdicts(report)["body/kernel", "trains"] == "proved"
    assert {f.claim: f.detail.split(" ")[0] for f in report.findings if f.path == "body/kernel"}["frozen"] == "24"
    wider = AFTER | {"body/kernel": BEFORE["body/kernel"] + 1}
    assert verdicts(audit.checkpoints(BEFORE, wider, mask))["body/kernel", "frozen"] == "refuted"


def test_weight_decay_alone_is_not_taken_for_training():
    """Twenty steps as AdamW takes them with a gradient of 0, at a rate of 0.001 and a decay of 0.1, in float32."""
    leaf = BEFORE["head/kernel"]
    for _ in range(20):
        leaf = leaf + np.float32(-1e-3) * (np.float32(0.1) * leaf)
    after = AFTER | {"head/kernel": leaf}
    finding = only(audit.checkpoints(BEFORE, after, ["head/**"]), "head/kernel")
    assert finding.verdict == "not decided" and "by the factor 0.998002, as weight decay does" in finding.detail
    finding = only(audit.checkpoints(BEFORE, after, ["body/**"]), "head/kernel")
    assert finding.verdict == "refuted" and "as weight decay does" in finding.detail


def test_missing_new_and_renamed():
    after = {name.replace("body/kernel", "trunk/w"): leaf for name, leaf in AFTER.items()}
    del after["head/kernel"]
    after["adapter/a"] = np.ones(3, np.float32)
    report = audit.checkpoints(BEFORE, after, ["head/**", "adapter/**"])
    assert only(report, "body/kernel").verdict == "proved" and "is 'trunk/w'" in only(report, "body/kernel").detail
    assert "missing after" in only(report, "head/kernel").detail and "is new" in only(report, "adapter/a").detail
    assert not [finding for finding in report.findings if finding.path == "trunk/w"]
    assert report.notes == (
        "renamed: 'body/kernel is trunk/w'",
        "missing after: 'head/kernel'",
        "new: 'adapter/a'",
    )


def test_of_two_tied_leaves_only_one_moved():
    before = BEFORE | {"out/kernel": BEFORE["head/kernel"]}
    report = audit.checkpoints(before, before | AFTER, ["head/**"])
    assert verdicts(report)["out/kernel", "frozen"] == "proved"
    assert report.notes == (
        "'head/kernel', 'out/kernel' had the same bytes before, as tied leaves have, and only 'head/kernel' moved",
    )
    same_zeros = BEFORE | {"head/bias": np.zeros(8, np.float32)}
    assert not audit.checkpoints(same_zeros, AFTER | {"head/bias": np.ones(8, np.float32)}, ["head/**"]).notes
    both = before | AFTER | {"out/kernel": AFTER["head/kernel"]}
    assert not audit.checkpoints(before, both, ["head/**", "out/**"]).notes


def test_running_statistics_are_frozen_where_nothing_beside_them_trains():
    leaf = np.arange(1, 5, dtype=np.float32)
    before = {
        "params/bn/scale": leaf,
        "params/head/kernel": leaf,
        "batch_stats/bn/mean": leaf,
        "params/bn/steps": np.array(3),
    }
    after = {name: value + (value * value if value.ndim else 1) for name, value in before.items()}
    drifted = audit.checkpoints(before, after | {"params/bn/scale": leaf}, ["**/head/**"])
    assert verdicts(drifted)["batch_stats/bn/mean", "frozen"] == "refuted"
    assert not [finding for finding in drifted.findings if finding.path == "params/bn/steps"]
    tracked = audit.checkpoints(before, after, ["**/{head,bn}/**"])
    assert verdicts(tracked) == {("params/bn/scale", "trains"): "proved", ("params/head/kernel", "trains"): "proved"}


def test_of_a_train_state_the_optimizer_is_no_leaf_and_a_mask_may_be_of_the_params():
    state = {
        "params": {"body": BEFORE["body/kernel"], "head": BEFORE["head/kernel"]},
        "step": 1,
        "opt_state": [np.ones(2)],
    }
    after = state | {"step": 2, "opt_state": [np.zeros(2)], "params": state["params"] | {"head": AFTER["head/kernel"]}}
    report = audit.checkpoints(state, after, {"body": False, "head": True})
    expected = {("params/body", "frozen"): "proved", ("params/head", "trains"): "proved"}
    assert verdicts(report) == verdicts(audit.checkpoints(state, after, ["params/head"])) == expected


# ---- Files and folders


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{kind: (before, after)}, the same leaves in each."""
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("checkpoints")
    pairs = {}
    for name, leaves in (("before", BEFORE), ("after", AFTER)):
        weights.write(folder / f"{name}.safetensors", leaves)
        np.savez(folder / f"{name}.npz", **leaves)
        np.savez_compressed(folder / f"{name}_packed.npz", **leaves)
        checkpoint.save(folder / f"{name}_tljax", {"fit-1": leaves, "other": BEFORE}, {})
        tree = {
            "body": {"kernel": leaves["body/kernel"], "bias": leaves["body/bias"]},
            "head": {"kernel": leaves["head/kernel"]},
        }
        ocp.PyTreeCheckpointer().save(folder / f"{name}_orbax", tree)
        with ocp.CheckpointManager(folder / f"{name}_managed") as manager:
            for step in (1, 2):
                manager.save(step, args=ocp.args.StandardSave(jax.tree.map(jnp.asarray, tree)))
            manager.wait_until_finished()
        for kind in (".safetensors", ".npz", "_packed.npz", "_orbax"):
            pairs.setdefault(kind, []).append(folder / f"{name}{kind}")
        pairs.setdefault("_managed", []).append(folder / f"{name}_managed" / "2")
    return folder, pairs


@pytest.mark.parametrize("kind", [".safetensors", ".npz", "_packed.npz", "_orbax", "_managed"])
def test_every_kind_of_checkpoint_gives_the_same_findings(places, kind):
    _, pairs = places
    before, after = pairs[kind]
    report = audit.checkpoints(before, after, ["head/**"])
    expected = audit.checkpoints(BEFORE, AFTER, ["head/**"])
    assert {finding.path: finding for finding in report.findings} == {
        finding.path: finding for finding in expected.findings
    }
    assert report.subject == f"{before} to {after}"


def test_a_checkpoint_of_tljax_is_read_by_the_name_of_its_fit(places):
    folder, _ = places
    before, after = (opened(folder / f"{name}_tljax", "fit-1") for name in ("before", "after"))
    assert not audit.checkpoints(before, after, ["head/**"]).refuted
    assert len(audit.checkpoints(before, opened(folder / "after_tljax", "other"), ["head/**"]).refuted) == 1
    with pytest.raises(InputError, match=r"holds 2 fits, 'fit-1', 'other': name one"):
        opened(folder / "after_tljax")
    with pytest.raises(InputError, match=r"no fit 'fit_1'; nearest: 'fit-1'"):
        opened(folder / "after_tljax", "fit_1")


def test_a_mask_may_be_a_file_of_a_run(places, tmp_path):
    masks.save({"body": {"kernel": False, "bias": False}, "head": {"kernel": True}}, tmp_path / "fit-phase0")
    before, after = places[1][".safetensors"]
    assert not audit.checkpoints(before, after, str(tmp_path / "fit-phase0.json")).refuted
    assert len(audit.checkpoints(before, before, tmp_path / "fit-phase0.json").refuted) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((BEFORE, AFTER, ["hat/**"]), "pattern 'hat/**' matches no leaf; known: body/bias"),
        ((BEFORE, AFTER, {"head/kernels": True}), "the mask names 'head/kernels', which no checkpoint has; nearest"),
        ((BEFORE, AFTER, {"head/kernel": np.ones(3, bool)}), "has shape (3,), which does not broadcast to (8, 2)"),
        ((BEFORE, AFTER, {"head/kernel": "no"}), "the mask's leaf at 'head/kernel' is 'no'"),
        ((BEFORE, AFTER, {}), "the mask is empty"),
        ((BEFORE, {"x": np.arange(3.0)}, ["x"]), "the checkpoints have no leaf in common"),
        (("nowhere", AFTER, ["head/**"]), "checkpoint 'nowhere' does not exist"),
        (("nowhere.npz", AFTER, ["head/**"]), "'nowhere.npz' does not exist"),
        (({"a": np.array(["x"])}, AFTER, ["head/**"]), "a leaf that is no number"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    with pytest.raises(InputError) as caught:
        audit.checkpoints(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_none_are_refused(places, tmp_path):
    folder, _ = places
    with pytest.raises(InputError, match=r"holds the steps '1', '2': name one, as '.*2'"):
        opened(folder / "after_managed")
    with pytest.raises(InputError, match="holds no checkpoint"):
        opened(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"convert it with experiments\.convert"):
        opened(tmp_path / "x.pth")
    (tmp_path / "_METADATA").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        opened(tmp_path)
    with pytest.raises(InputError, match="leave the name out"):
        opened(folder / "after.npz", "fit-1")
