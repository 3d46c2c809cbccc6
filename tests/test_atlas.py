"""The atlas: its statistics against closed forms and simulation, its masks against static ones, its program."""

import functools
import itertools
import json
import math
import shutil

import jax
import numpy as np
import optax
import planted_atlas
import pytest
from scipy import stats
from test_programs import command

from experiments import atlas as program
from tljax import elementwise, masks, models, objective, optimizer, optimizers, paths, plugins, train
from tljax.study import atlas
from tljax.train import vectorize
from tljax.types import Context, InputError


def simulated(rng, masks, effects, seeds, *, pair=0.0, of_seeds=0.0, noise=0.02):
    """Scores [n, seeds]: effects that differ between seeds, an interaction, and noise that grows with the mask."""
    seed_effects = effects + of_seeds * rng.standard_normal((seeds, len(effects)))
    level = noise * (0.5 + masks.mean(1))
    mean = masks @ seed_effects.T + pair * (masks[:, 0] & masks[:, 1])[:, None]
    return 0.3 + mean + level[:, None] * rng.standard_normal((len(masks), seeds))


def test_all_masks_are_drawn_once_and_sizes_are_alike():
    every = atlas.draw(10, 1024)
    assert every.shape == (1024, 10) and len({mask.tobytes() for mask in every}) == 1024
    many = atlas.draw(24, 2000, seed=1)
    assert len({mask.tobytes() for mask in many}) == 2000
    np.testing.assert_array_equal(atlas.draw(24, 300, seed=1), many[:300])
    sizes = np.bincount(many.sum(1), minlength=25)
    assert sizes[0] == sizes[24] == 1 and np.all(sizes[2:23] > 50)


def test_effects_are_those_of_least_squares():
    """Against numpy.linalg.lstsq; intervals of one seed against the HC2 formula, observation by observation."""
    rng = np.random.default_rng(0)
    masks = atlas.draw(5, 24, seed=3)
    scores = simulated(rng, masks, np.linspace(-0.1, 0.1, 5), 1)
    surrogate = atlas.fit(masks, scores, [(0, 3)])
    design = np.column_stack([np.ones(24), masks, (masks[:, 0] - 0.5) * (masks[:, 3] - 0.5)])
    expected, *_ = np.linalg.lstsq(design, scores[:, 0], rcond=None)
    values = [surrogate.constant, *(e.value for e in surrogate.effects), surrogate.pairs[0][1].value]
    np.testing.assert_allclose(values, expected, atol=1e-12)
    np.testing.assert_allclose(surrogate.predict(masks), design @ expected, atol=1e-12)
    bread = np.linalg.inv(design.T @ design)
    hat, left = design @ bread @ design.T, scores[:, 0] - design @ expected
    meat = sum(left[i] ** 2 / (1 - hat[i, i]) * np.outer(design[i], design[i]) for i in range(24))
    errors = np.sqrt(np.diag(bread @ meat @ bread))[1:6]
    half = [(e.high - e.low) / 2 for e in surrogate.effects]
    np.testing.assert_allclose(half, stats.t.ppf(0.975, 24 - 7) * errors, rtol=1e-9)
    of_stage = surrogate.total([1, 2])
    assert math.isclose(of_stage.value, expected[2] + expected[3], abs_tol=1e-12)


def test_seeds_whose_effects_agree_add_nothing_and_those_that_differ_do():
    rng = np.random.default_rng(1)
    masks = atlas.draw(6, 64, seed=2)
    alike = simulated(rng, masks, np.full(6, 0.05), 4)
    apart = simulated(rng, masks, np.full(6, 0.05), 4, of_seeds=0.05)
    widths = [np.mean([e.high - e.low for e in atlas.fit(masks, s).effects]) for s in (alike, apart)]
    assert widths[1] > 3 * widths[0]
    # Student's t of the effects of the seeds, which are known without error but for little, is as wide.
    by_seed = np.array([[e.value for e in atlas.fit(masks, apart[:, [s]]).effects] for s in range(4)])
    pooled = 2 * stats.t.ppf(0.975, 18) * np.sqrt(by_seed.var(0, ddof=1).mean() / 4)
    assert 0.9 < widths[1] / pooled < 1.1


def test_what_a_sum_leaves_over_is_no_chance_where_all_masks_were_trained():
    every = atlas.draw(4, 16)
    scores = 0.3 * (every[:, [0]] & every[:, [1]]) + 1e-3 * np.random.default_rng(0).normal(size=(16, 3))
    widths = [np.mean([e.high - e.low for e in atlas.fit(every[first:], scores[first:]).effects]) for first in (0, 1)]
    assert widths[0] < 0.02 * widths[1]


COVERAGE = {
    "one seed": (32, 1, {}),
    "noise": (48, 3, {}),
    "interaction": (64, 2, {"pair": 0.1}),
    "seeds differ": (64, 3, {"of_seeds": 0.02}),
    "all masks, interaction, seeds differ": (256, 2, {"pair": 0.1, "of_seeds": 0.02, "noise": 0.05}),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_hold_at_their_rate(name):
    """The truth of a cell is its effect in the best sum over masks as they are drawn, over new masks and seeds."""
    count, seeds, more = COVERAGE[name]
    cells, studies = 8 if count == 256 else 12, 120
    rng = np.random.default_rng(0)
    effects = np.resize([0.1, 0.03, 0.0, 0.0, -0.02, 0.05, 0.01, 0.0], cells)
    every = np.array(list(itertools.product([False, True], repeat=cells)))
    weights = np.ones(len(every)) if count == 256 else np.array([1 / math.comb(cells, k) for k in every.sum(1)])
    whole = np.column_stack([np.ones(len(every)), every]) * np.sqrt(weights)[:, None]
    pair = more.get("pair", 0.0) * (every[:, 0] & every[:, 1])
    truth = np.linalg.lstsq(whole, (every @ effects + pair) * np.sqrt(weights), rcond=None)[0][1:]
    holds = np.zeros((studies, cells))
    for study in range(studies):
        masks = atlas.draw(cells, count, seed=study)
        surrogate = atlas.fit(masks, simulated(rng, masks, effects, seeds, **more))
        holds[study] = [e.low <= t <= e.high for e, t in zip(surrogate.effects, truth, strict=True)]
    rate, error = holds.mean(), holds.mean(1).std(ddof=1) / math.sqrt(studies)
    assert abs(rate - 0.95) < 3 * error, (rate, error)


def test_pairs_come_in_where_they_lower_the_error_on_masks_that_were_held_out():
    rng = np.random.default_rng(5)
    masks = atlas.draw(8, 200, seed=1)
    with_pair = atlas.fitted(masks, simulated(rng, masks, np.full(8, 0.05), 2, pair=0.2))
    assert with_pair.surrogate.pairs[0][0] == (0, 1) and abs(with_pair.surrogate.pairs[0][1].value - 0.2) < 0.02
    assert with_pair.errors[1] < 0.5 * with_pair.errors[0]
    without = [atlas.fitted(masks, simulated(rng, masks, np.full(8, 0.05), 2), seed=s) for s in range(10)]
    assert sum(bool(each.surrogate.pairs) for each in without) <= 2


def test_what_the_surrogate_explains_of_held_out_masks_stays_below_the_ceiling():
    rng = np.random.default_rng(7)
    masks = atlas.draw(8, 256)
    scores = simulated(rng, masks, np.full(8, 0.04), 4, noise=0.1)
    result, known = atlas.fitted(masks, scores), atlas.ceiling(scores)
    variance = (masks @ np.full(8, 0.04)).var()
    reliability = variance / (variance + np.mean((0.1 * (0.5 + masks.mean(1))) ** 2) / 4)
    assert abs(known.reliability - reliability) < 0.08
    assert result.explained < known.reliability + 0.05 and result.explained > 0.5 * reliability


def test_the_ceiling_of_two_seeds_is_their_correlation_stepped_up():
    scores = np.random.default_rng(0).normal(size=(30, 2)) + np.arange(30)[:, None] / 10
    r = np.corrcoef(scores.T)[0, 1]
    np.testing.assert_allclose(atlas.ceiling(scores), (r, 2 * r / (1 + r)))
    assert math.isnan(atlas.ceiling(scores[:, :1]).reliability)


def test_the_rate_is_chosen_by_others():
    """Noise alone gains nothing by more rates, where the largest of them would gain a standard deviation."""
    noise = np.random.default_rng(0).normal(size=(4000, 3, 2, 2))
    for scores in (noise, noise[:, :, :1]):
        chosen, _ = atlas.at_best_rate(scores)
        assert chosen.shape == (4000, scores.shape[2], 2) and abs(chosen.mean()) < 0.05
        assert abs(scores.max(1).mean() - 0.846) < 0.03
    better = noise * 0.01 + np.array([0.0, 1.0, 0.5])[:, None, None]
    assert np.all(atlas.at_best_rate(better)[1] == 1)


def test_percentiles_are_among_masks_of_a_size():
    scores, sizes = np.arange(100) / 100, np.repeat([1, 10, 100, 1000], 25)
    assert atlas.percentile(0.6, scores, sizes, 100) == (42.0, 25, 100, 100)
    assert atlas.percentile(0.6, scores, sizes, 90, near=25) == (42.0, 25, 100, 100)
    assert math.isnan(atlas.percentile(0.5, scores, sizes, 11).value)
    draws = np.random.default_rng(0).integers(0, 5, 200).astype(float)
    expected = stats.percentileofscore(draws, 2.0, kind="mean")
    assert math.isclose(atlas.percentile(2.0, draws, np.ones(200), 1).value, expected)


def test_the_greedy_choice_ends_where_a_step_gains_too_little():
    gains = np.array([0.2, 0.1, 0.01, -0.1])
    units = {name: [i] for i, name in enumerate("abcd")}
    mask, steps = atlas.greedy(units, 4, lambda m: m @ gains, lambda m: 0.5 * (m @ gains), epsilon=0.05)
    assert mask.tolist() == [True, True, False, False]
    assert [step.added for step in steps] == ["", "a", "b"]
    assert math.isclose(steps[-1].judged, 0.15)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: atlas.draw(0, 5), "at least one of both"),
        (lambda: atlas.fit(np.eye(3, dtype=bool), np.zeros((3, 1))), "draw more masks"),
        (lambda: atlas.fit(atlas.draw(2, 4), np.full((4, 1), np.nan)), "finite numbers"),
        (lambda: atlas.at_best_rate(np.zeros((2, 2))), "finite numbers"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(attempt, message):
    with pytest.raises(InputError, match=message):
        attempt()


# ---- Masks of cells


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 255, (64, 4, 4, 1)).astype(np.uint8)
    model = models.build("mlp", 3, hidden=(6, 5), activation="relu")
    params = models.init(model, jax.random.key(seed), (4, 4, 1))
    return model, params, train.load(x, (x.reshape(64, -1).mean(1) > 127).astype(np.int32))


def trained(model, params, data, trees, many="map", steps=20):
    """The parameters of fits under these masks after some steps of Adam, one order for all."""
    spec = train.Spec(model, objective.loss("softmax_cross_entropy"), *_adam()[:1])
    order = np.random.default_rng(1).integers(0, 64, (steps, 16)).astype(np.int32)
    fits = [
        train.Fit(
            params,
            ((0, tree),),
            lambda start, stop: order[start:stop],
            np.full(steps, 0.05, np.float32),
            (),
            {**_adam()[1], "label_smoothing": 0.0},
            key=_KEY,
            shares="one",
        )
        for tree in trees
    ]
    [(state, _)] = train.fit(spec, fits, data, [steps], execution=train.Execution(many=many))
    return [jax.tree.map(np.asarray, state.params_and_state(state.fits.index(i))[0]) for i in range(len(fits))]


def _adam():
    return optimizers.spec("adam", momentum=0.0, weight_decay=0.1, clip=1.0, decay="auto")


_KEY = jax.random.key(0)


def test_fits_under_all_masks_are_those_of_static_masks_and_one_program():
    """Against masks of bools, each a program of its own; one compilation for all, and frozen bytes exact."""
    model, params, data = problem()
    cells = masks.cells(params, ["hidden_0", "hidden_1"])
    assert [cell.name for cell in cells] == ["hidden_0 bias", "hidden_0 kernel", "hidden_1 bias", "hidden_1 kernel"]
    always = ("head/bias", "head/kernel")
    chosen = [(False, False, True, False), (True, False, False, True), (False,) * 4]
    before = vectorize.segment._cache_size()
    together = trained(model, params, data, [masks.switched(params, cells, on, always) for on in chosen])
    assert vectorize.segment._cache_size() == before + 1
    for on, tree in list(zip(chosen, together, strict=True))[:2]:
        names = {path for cell, is_on in zip(cells, on, strict=True) if is_on for path in cell.paths} | {*always}
        static = masks.by_path(params, lambda path, names=names: path in names)
        assert masks.cells_of(cells, static, always) == on
        [alone] = trained(model, params, data, [static])
        for (path, leaf), (_, expected), (_, start) in zip(*map(paths.items, (tree, alone, params)), strict=True):
            np.testing.assert_allclose(leaf, expected, atol=2e-6, err_msg=path)
            assert np.array_equal(leaf, start) == (path not in names)


def test_switches_are_passed_whole_however_few_numbers_they_train():
    """Where an array of bools of the same elements would be given by its places, of which there are so many."""
    params = {"w": np.zeros((200, 200), np.float32), "b": np.zeros(20, np.float32)}
    adam = functools.partial(elementwise.holds_of_shapes, optax.adam(0.1))
    switched = masks.switched(params, masks.cells(params, ["w", "b"]), [False, True])
    assert optimizer.gathered(adam, params, switched) == switched
    whole = {"w": np.zeros((200, 200), bool), "b": np.ones(20, bool)}
    assert isinstance(optimizer.gathered(adam, params, whole)["w"], masks.Elements)


def test_cells_of_a_transformer_of_six_blocks_are_24():
    model = models.build("vit:depth=6:width=8:heads=2:patch=4", 3, hidden=(), activation="gelu")
    params = models.abstract(model, (8, 8, 1))
    blocks = [name for name in models.names(model) if name.startswith("block_")]
    cells = masks.cells(params, blocks)
    assert len(cells) == 24 and {cell.kind for cell in cells} == {"attention", "kernel", "bias", "norm"}
    inside = [path for path in paths.names(params) if path.startswith("block_")]
    assert sorted(path for cell in cells for path in cell.paths) == inside
    by_globs = masks.cells(params, blocks, kinds={"attention": ["**/attention/**"], "rest": ["**"]})
    assert [cell.kind for cell in by_globs[:2]] == ["attention", "rest"] and len(by_globs) == 12
    partly = masks.by_path(params, lambda path: path == "block_0/norm_1/scale")
    assert masks.cells_of(cells, partly) is None
    assert masks.cells_of(cells, masks.by_path(params, lambda path: path.startswith("embedding"))) is None
    with pytest.raises(InputError, match="matches no leaf"):
        masks.cells(params, blocks, kinds={"a": ["**/kernle"]})


# ---- The program


def flags_of(tasks, folder, **more):
    flags = {"source_epochs": 1, "hidden": (8, 8), "strategies": ("full", "bias_only", "random_mask"), **more}
    return command(tasks, folder, **{"steps": 8, **flags})


def ran(tasks, folder, *words, **more):
    program.main(["atlas", *flags_of(tasks, folder, **more), "--masks=10", "--group=6", "--rates=1,3", *words])
    return json.loads((folder / "w" / "atlas.json").read_text())


@pytest.fixture(scope="module")
def atlas_run(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    return folder, ran(tasks, folder)


@pytest.mark.slow
def test_an_atlas_tells_cells_strategies_and_a_choice(atlas_run):
    folder, numbers = atlas_run
    assert [(cell["stage"], cell["kind"]) for cell in numbers["cells"]] == [
        *(("hidden_0", "bias"), ("hidden_0", "kernel"), ("hidden_1", "bias"), ("hidden_1", "kernel"))
    ]
    records = [json.loads(line) for line in (folder / "w" / "atlas.jsonl").read_text().splitlines()]
    of_masks = [record for record in records if "masks" in record]
    drawn = atlas.draw(4, 10)
    assert [len(record["masks"]) for record in of_masks] == [6, 6, 4, 4]
    by_seed = {
        seed: np.array([row for record in of_masks if record["seed"] == seed for row in record["scores"]])
        for seed in (0, 1)
    }
    best, _ = atlas.at_best_rate(np.stack([by_seed[0], by_seed[1]], 2))
    expected = atlas.fit(drawn, best.mean(2), [tuple(pair) for pair in _pairs(numbers)])
    np.testing.assert_allclose([c["value"] for c in numbers["cells"]], [e.value for e in expected.effects])
    by_label = {row["label"]: row for row in numbers["strategies"]}
    assert (by_label["full"]["cells"], by_label["bias_only"]["cells"], by_label["random_mask"]["cells"]) == (4, 2, None)
    assert by_label["bias_only"]["numbers"] == 16 and by_label["full"]["numbers"] == 36 * 8 + 8 * 8 + 16
    page = (folder / "w" / "report.html").read_text()
    assert "Where parameters matter" in page and "hidden_1 kernel" in page


def _pairs(numbers):
    names = [f"{cell['stage']} {cell['kind']}" for cell in numbers["cells"]]
    return [[names.index(name) for name in pair["cells"]] for pair in numbers["pairs"]]


@pytest.mark.slow
def test_what_is_known_is_not_trained_again_and_what_is_damaged_is(atlas_run, tasks, tmp_path, monkeypatch, capsys):
    """The same numbers after a line was lost in mid-air, from that line's fits alone; more masks add groups."""
    folder, numbers = atlas_run
    shutil.copytree(folder / "w", tmp_path / "w")
    file = tmp_path / "w" / "atlas.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:1], lines[1][: len(lines[1]) // 2], *lines[2:]]))
    counted, scores = [], program._scores
    monkeypatch.setattr(program, "_scores", lambda *a, **k: counted.append(len(a[2])) or scores(*a, **k))
    again = ran(tasks, tmp_path)
    assert counted == [6 * 2] and again == numbers
    assert "line 2, is not as it was written" in capsys.readouterr().out
    ran(tasks, tmp_path, "--masks=14")
    assert counted[1:] == [6 * 2 * 2, 6 * 2 * 2]  # masks 6 to 13: the last group was of four


def test_the_choice_is_a_strategy_of_the_same_mask(tasks):
    model = models.build("mlp", 4, hidden=(8, 8), activation="relu")
    params = models.abstract(model, (6, 6, 1))
    cells = masks.cells(params, ["hidden_0", "hidden_1"])
    always = ("head/bias", "head/kernel")
    for on in itertools.product([False, True], repeat=4):
        method, options = plugins.method(program.spec(cells, on, "head"))
        mask = method.strategy(params, Context(stages=models.names(model)), **options)
        assert masks.cells_of(cells, mask, always) == on and mask["head"] == {"bias": True, "kernel": True}


@pytest.mark.slow
def test_a_stage_of_noise_adds_most(tmp_path, no_pictures):
    """Two draws of the twenty of planted_atlas.py, whose figure stands in experiments/README.md."""
    place = planted_atlas.source(tmp_path)
    for draw in (2, 4):
        stage, adds = planted_atlas.ranked(place, tmp_path, draw)
        assert max(adds, key=lambda name: adds[name]) == stage == f"hidden_{draw}"


BAD = {
    "--rates=1,1": "each once",
    "--rates=fast": "give multiples of --learning_rate",
    "--masks=2": "give 4 or more",
    "--validation=0": "judged on examples that are held out",
    "--stages=hiden_*": "no stage below the head; nearest",
    "--kinds=kernel": "write NAME=GLOB",
    "--kinds=a=**/kernle": "matches no leaf",
    "--train_examples=20,40": "an atlas is of one budget",
    "--epsilon=-1": "at least 0",
    "--strategies=all,full": "give it alone",
    "--source=": "--source= is empty",
}


@pytest.mark.parametrize("flag", BAD)
def test_what_is_no_atlas_is_refused_in_one_line(flag, tasks, tmp_path):
    with pytest.raises(InputError, match=BAD[flag]) as error:
        program.main(["atlas", *flags_of(tasks, tmp_path), flag])
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_a_dry_run_says_what_would_be_trained(tasks, tmp_path, capsys):
    program.main(["atlas", *flags_of(tasks, tmp_path), "--masks=100", "--dry_run"])
    text = capsys.readouterr().out
    assert "16 masks (all there are) at 3 rates under 2 seeds: 96 fits" in text and "gated" in text
    assert not (tmp_path / "w").exists()
