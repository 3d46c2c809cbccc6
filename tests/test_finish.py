"""What strategies make of a fit's start and end: WiSE-FT, LiNeS, shrink and perturb, by their formulas in NumPy."""

import jax
import numpy as np
import pytest
from test_programs import arguments, results
from test_resume import Killed, killed_after, same_run
from test_strategies import CONTEXT, FRESH, PARAMS, leaves

from experiments import transfer
from tljax import checkpoint, initialization, masks, plugins
from tljax.strategies import lines, shrink_perturb, wise_ft
from tljax.types import Context, InputError, Method

pytestmark = pytest.mark.usefixtures("no_pictures")

RNG = np.random.default_rng(0)
AFTER = jax.tree.map(lambda leaf: leaf + RNG.normal(size=leaf.shape).astype(np.float32), PARAMS)
PROBED = jax.tree.map(lambda leaf: leaf + RNG.normal(size=leaf.shape).astype(np.float32), PARAMS)
COPIED = CONTEXT._replace(fresh=jax.tree.map(lambda leaf: False, PARAMS))


def assert_close(got, expected):
    assert leaves(got).keys() == leaves(expected).keys()
    for path, leaf in leaves(expected).items():
        np.testing.assert_allclose(leaves(got)[path], leaf, rtol=0, atol=1e-6, err_msg=path)


def test_wise_ft_is_between_the_start_and_the_end_and_a_new_head_stays():
    results = wise_ft.finish(AFTER, PARAMS, CONTEXT, curve=5)
    assert list(results) == ["alpha_0", "alpha_0.25", "alpha_0.5", "alpha_0.75", "alpha_1"]
    for i, tree in enumerate(results.values()):
        between = jax.tree.map(lambda after, before, i=i: before + i / 4 * (after - before), AFTER, PARAMS)
        assert_close(tree, {**between, "head": AFTER["head"]})
    [(name, tree)] = wise_ft.finish(AFTER, PARAMS, COPIED, alpha=0.3).items()
    assert name == "alpha_0.3"
    assert_close(tree, jax.tree.map(lambda after, before: 0.7 * before + 0.3 * after, AFTER, PARAMS))


def test_after_a_probe_it_is_between_the_probe_and_the_end_with_the_head():
    results = wise_ft.finish(AFTER, PARAMS, CONTEXT, curve=3, probe=0.5, phases=(PARAMS, PROBED))
    assert_close(results["alpha_0"], PROBED)
    assert_close(results["alpha_0.5"], jax.tree.map(lambda a, b: (a + b) / 2, AFTER, PROBED))
    assert_close(results["alpha_1"], AFTER)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.2, 0.6)])
def test_lines_scales_the_change_of_each_stage_by_its_depth(alpha, beta):
    [tree] = lines.finish(AFTER, PARAMS, COPIED, alpha=alpha, beta=beta).values()
    for i, stage in enumerate(("hidden_0", "hidden_1", "head")):
        share = alpha + beta * i / 2
        assert_close(tree[stage], jax.tree.map(lambda a, b, s=share: b + s * (a - b), AFTER[stage], PARAMS[stage]))
    with_new_head = lines.finish(AFTER, PARAMS, CONTEXT, alpha=alpha, beta=beta)["lines"]
    assert_close(with_new_head, {**tree, "head": AFTER["head"]})


def test_lines_counts_a_norm_with_the_stage_below_and_one_stage_as_the_last():
    scale = {"scale": np.zeros(2, np.float32)}
    start = {
        "block": {"kernel": np.zeros((2, 2), np.float32)},
        "norm": scale,
        "head": {"bias": np.zeros(2, np.float32)},
    }
    end = jax.tree.map(lambda leaf: leaf + 1, start)
    context = Context(("block", "norm", "head"), fresh=jax.tree.map(lambda leaf: False, start))
    [tree] = lines.finish(end, start, context, alpha=0.25, beta=0.5).values()
    assert [float(leaf.ravel()[0]) for leaf in jax.tree.leaves(tree)] == [0.25, 0.75, 0.25]  # block, head, norm
    alone = {"head": start["head"]}
    [tree] = lines.finish({"head": end["head"]}, alone, Context(("head",), fresh={"head": {"bias": False}})).values()
    assert tree["head"]["bias"].tolist() == [1, 1]


@pytest.mark.parametrize("module", [wise_ft, lines])
def test_what_cannot_train_is_in_an_end_as_it_was_trained(module):
    start = {"body": {"kernel": np.ones(2, np.float32), "count": np.array(3), "moving_mean": np.zeros(3, np.float32)}}
    end = {"body": {name: leaf + 2 for name, leaf in start["body"].items()}}
    context = Context(("body", "head"), fresh=jax.tree.map(lambda leaf: False, start))
    [tree] = module.finish(end, start, context).values()
    assert tree["body"]["count"].dtype == end["body"]["count"].dtype and tree["body"]["count"] == 5
    assert tree["body"]["moving_mean"].tolist() == [2, 2, 2] and tree["body"]["kernel"].tolist() == [2, 2]


def test_shrink_and_perturb_moves_what_was_copied_and_nothing_else():
    wide = {"body": {"kernel": np.full((200, 300), 2.0, np.float32), "step": np.array(7)}, "head": {"bias": np.ones(3)}}
    fresh = {"body": {"kernel": False, "step": False}, "head": {"bias": True}}
    context = Context(("body", "head"), fresh=fresh)
    tree = shrink_perturb.reinit(wide, jax.random.key(0), context, shrink=0.25, sigma=0.1)
    kernel = np.asarray(tree["body"]["kernel"])
    assert kernel.mean() == pytest.approx(0.5, abs=0.002) and kernel.std() == pytest.approx(0.1, rel=0.02)
    assert tree["body"]["step"] == 7 and tree["head"]["bias"].tolist() == [1, 1, 1] and kernel.dtype == np.float32
    again = shrink_perturb.reinit(wide, jax.random.key(0), context, shrink=0.25, sigma=0.1)
    other = shrink_perturb.reinit(wide, jax.random.key(1), context, shrink=0.25, sigma=0.1)
    assert np.array_equal(again["body"]["kernel"], kernel) and not np.array_equal(other["body"]["kernel"], kernel)
    still = shrink_perturb.reinit(wide, jax.random.key(0), context, shrink=0.5, sigma=0)
    assert (still["body"]["kernel"] == 1).all()


def begin(method, **options):
    drawn = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    initial = initialization.Initialization(CONTEXT.stages, PARAMS, drawn, jax.random.key(1))
    return initialization.start(method, options, initial), drawn


def test_a_fit_starts_from_what_reinit_gives_with_its_new_head_as_drawn():
    method, _ = plugins.method("shrink_perturb")
    start, drawn = begin(method, shrink=0.5, sigma=0.0)
    assert_close(start.params, {**jax.tree.map(lambda leaf: leaf / 2, PARAMS), "head": drawn["head"]})
    assert leaves(start.fresh) == leaves(FRESH)


@pytest.mark.parametrize(
    ("reinit", "message"),
    [
        (lambda params, key, context: {"head": params["head"]}, "what reinit gives"),
        (lambda params, key, context: jax.tree.map(lambda leaf: leaf[..., None], params), r"reinit gives float32.* at"),
        (lambda params, key, context: jax.tree.map(lambda leaf: leaf > 0, params), "reinit gives bool"),
    ],
)
def test_what_reinit_may_not_give_is_refused(reinit, message):
    everything = lambda params, context: masks.by_path(params, lambda path: True)  # noqa: E731
    with pytest.raises(InputError, match=message):
        begin(Method(everything, reinit=reinit))


def test_a_finish_that_asks_for_phases_gets_as_many_as_there_are_and_none_that_validation_ends():
    phase_counts = []

    def finish(params, start, context, *, phases):
        phase_counts.append(len(phases))
        return {"first": phases[-1]}

    start, _ = begin(plugins.method("lp_ft")[0]._replace(finish=finish))
    start.finish(start.params)
    assert_close(start.finish(AFTER, [PROBED])["first"], PROBED)
    assert phase_counts == [2, 2] and start.finish_takes_phases

    def until(params, context):
        phases = plugins.method("lp_ft")[0].strategy(params, context)
        return [phases[0], type(phases[0])(0.5, phases[1].mask, until=lambda scores: False)]

    with pytest.raises(InputError, match="its finish takes `phases`, which end by validation"):
        begin(Method(until, finish=finish))


FLAGS = {
    "strategies": ("wise_ft:curve=3:probe=0.5", "lp_ft"),
    **{"epochs": None, "steps": 40, "points": 8, "checkpoint_every": 1, "validation": 0.3, "seeds": (0, 1)},
    **{"optimizer": "adam", "learning_rate": 0.02, "verdict_of": "selected"},
}


@pytest.fixture(scope="module")
def with_curve(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve") / "w"
    return transfer.run(**arguments(tasks, folder, **FLAGS)), folder


@pytest.mark.slow
def test_a_curve_from_the_probe_to_the_end_and_the_best_of_it_by_validation(with_curve):
    """alpha_1 is LP-FT to the bit; alpha_0 has the source's layers below a head that the probe trained."""
    judged, folder = with_curve
    rows = {(line.strategy, line.seed): line for line in results(folder)}
    for seed in (0, 1):
        line = rows["wise_ft", seed]
        trees = checkpoint.load(folder / line.checkpoint)[0]
        lp_ft = checkpoint.load(folder / rows["lp_ft", seed].checkpoint)[0][rows["lp_ft", seed].name]
        source = checkpoint.load(folder / rows["pretrain", seed].checkpoint)[0][rows["pretrain", seed].name]
        ends = {name: trees[f"{line.name}.alpha_{name}"] for name in ("0", "0.5", "1")}
        for path, leaf in lp_ft.items():
            assert ends["1"][path].tobytes() == leaf.tobytes()
            np.testing.assert_allclose(ends["0.5"][path], (ends["0"][path] + ends["1"][path]) / 2, atol=1e-6)
            if not path.startswith("head"):
                assert ends["0"][path].tobytes() == source[path].tobytes()
        assert np.abs(ends["0"]["head/kernel"] - ends["1"]["head/kernel"]).max() > 1e-3
        assert set(line.ends) == {"alpha_0", "alpha_0.5", "alpha_1", "selected"}
        scores = {name: line.ends[name]["validation_accuracy"] for name in line.ends if name != "selected"}
        best = max(scores, key=scores.get)
        assert line.ends["selected"]["validation_accuracy"] == scores[best]
        assert line.ends["selected"]["test_accuracy"] == line.ends[best]["test_accuracy"]
    of_wise = [result for result in judged if result.strategy == "wise_ft"]
    assert {result.end for result in of_wise} == {"selected"}
    assert {result.end for result in judged if result.strategy == "lp_ft"} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("count", [18, 22])
def test_a_curve_that_is_killed_goes_on_with_the_same_bits(with_curve, tasks, tmp_path, monkeypatch, capsys, count):
    """Before and after the phase that trains everything began."""
    _, undisturbed = with_curve
    with monkeypatch.context() as patch:
        killed_after(count, patch)
        with pytest.raises(Killed):
            transfer.run(**arguments(tasks, tmp_path / "w", **FLAGS))
    capsys.readouterr()
    transfer.run(**arguments(tasks, tmp_path / "w", **FLAGS))
    assert f"wise_ft: goes on from step {10 if count == 18 else 30} of 40" in capsys.readouterr().out
    same_run(tmp_path / "w", undisturbed)
    for line in results(undisturbed):
        again = checkpoint.load(tmp_path / "w" / line.checkpoint)[0]
        for name, tree in checkpoint.load(undisturbed / line.checkpoint)[0].items():
            assert {path: leaf.tobytes() for path, leaf in tree.items()} == {
                path: leaf.tobytes() for path, leaf in again[name].items()
            }


def test_the_selected_end_needs_a_validation_split(tasks, tmp_path):
    with pytest.raises(InputError, match="--verdict_of=selected is by a validation split"):
        transfer.run(**arguments(tasks, tmp_path / "w", **{**FLAGS, "validation": 0.0}))
