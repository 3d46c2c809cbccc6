"""Draws of labels crossed with seeds: the errors of three crossed factors, and what a study of them trains and says."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from test_programs import command, results, snapshot

from experiments import compare, report
from experiments.pages import compare as compare_page
from experiments.pages import design as design_page
from experiments.runs import fit, plan, predictions, replicates
from experiments.runs.judging import Judging
from experiments.runs.settings import Settings, parse_flags
from tljax.study import asides, design, sample_size, sequences, statistics, verdicts
from tljax.study.results import Result, SeedAndDraw, from_json, replicate, to_json
from tljax.study.verdicts import Cell, Conditions
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

# ---- Errors of three crossed factors


def projected(scores):
    """The seven mean squares of [seeds, draws, items] by projections, in the order of `SquaresOfDraws`."""
    means = [np.full((n, n), 1 / n) for n in scores.shape]
    squares = []
    for varied in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        parts = [np.eye(n) - means[i] if i in varied else means[i] for i, n in enumerate(scores.shape)]
        effect = np.einsum("ax,by,cz,xyz->abc", *parts, scores)
        squares.append(float(np.sum(effect**2)) / math.prod(scores.shape[i] - 1 for i in varied))
    return squares


def test_mean_squares_are_those_of_projections():
    scores = np.random.default_rng(0).standard_normal((2, 3, 4, 25)) + 5
    squares = statistics.mean_squares_of_draws(scores)
    for i in range(2):
        assert [part[i, i] for part in squares] == pytest.approx(projected(scores[i]))
    sums = [projected(scores[0] + side * scores[1]) for side in (1, -1)]
    products = [(plus - minus) / 4 for plus, minus in zip(*sums, strict=True)]
    assert [part[0, 1] for part in squares] == pytest.approx(products) and np.array_equal(squares.items, squares[2].T)


def planted(rng, sizes, deviations, mean=0.0, studies=1):
    """Scores [studies, seeds, draws, items] with effects of these standard deviations, in the order of mean squares."""
    scores = np.full((studies, *sizes), mean)
    for varied, sd in zip(((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)), deviations, strict=True):
        shape = [studies, *(n if i in varied else 1 for i, n in enumerate(sizes))]
        scores = scores + sd * rng.standard_normal(shape)
    return scores


def test_the_interval_is_that_of_the_closed_form_where_every_component_is_seen():
    items = 60
    scores = planted(np.random.default_rng(3), (4, 5, items), (2.0, 2.0, 3.0, 0.5, 0.5, 0.5, 0.5))[0]
    a, b, c, ab, ac, bc, e = projected(scores)
    assert a > ab and b > ab and c + e > ac + bc
    interval = statistics.crossed(scores)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.standard_error**2 * scores.size == pytest.approx(a + b - ab + c - ac - bc + e)
    limits = a * 3 / stats.chi2.ppf(0.1, 3), b * 4 / stats.chi2.ppf(0.1, 4)
    assert limits[0] > limits[1]
    rest = c - ac - bc + e
    spread = limits[0] ** 2 / 3 + b**2 / 4 + (c**2 + ac**2 / 3 + bc**2 / 4 + e**2 / 12) / (items - 1)
    assert interval.degrees == pytest.approx((limits[0] + b + rest) ** 2 / spread)
    half = stats.t.ppf(0.975, interval.degrees) * interval.standard_error
    assert interval.high == pytest.approx(scores.mean() + half)


def test_seeds_and_draws_are_on_one_footing_and_draws_that_are_one_add_nothing():
    rng = np.random.default_rng(4)
    scores = rng.integers(-1, 2, (4, 3, 80)).astype(float)
    assert statistics.crossed(scores) == pytest.approx(statistics.crossed(scores.transpose(1, 0, 2)))
    for copies in (2, 5):
        repeated = np.repeat(scores[:, :1], copies, axis=1)
        assert statistics.crossed(repeated) == pytest.approx(statistics.crossed(scores[:, 0]))
    sums = scores + 1e-9 * rng.standard_normal((4, 3, 1))
    pairs = statistics.crossed(np.repeat(sums, 2, axis=2), groups=np.arange(160) // 2)
    assert pairs == pytest.approx(statistics.crossed(sums))


def test_many_comparisons_are_as_many_single_ones_and_wider():
    scores = list(np.random.default_rng(5).integers(-1, 2, (3, 3, 4, 60)).astype(float))
    family = statistics.simultaneous(scores)
    for values, interval in zip(scores, family, strict=True):
        alone = statistics.crossed(values)
        assert (interval.mean, interval.standard_error) == pytest.approx((alone.mean, alone.standard_error))
        assert interval.low < alone.low
    twice = statistics.simultaneous([scores[0]] * 2)
    assert twice[0].high - twice[0].low < family[0].high - family[0].low  # the means are one
    [verdict] = statistics.verdicts([scores[0][:, :2]], 0.5)
    assert verdict.warning.startswith("Two draws of labels say little")


def test_means_correlate_as_seeds_draws_and_items_say_where_all_is_known():
    both = [[1.0, 0.5], [0.5, 1.0]]
    values = [part * np.array(both) for part in (400.0, 300.0, 200.0)] + [part * np.eye(2) for part in (5.0, 4, 3, 2)]
    found = statistics.correlations_of_draws(statistics.SquaresOfDraws(*values), 500, 500, 500)
    total = 900 - 5 - 4 - 3 + 2
    assert found[0, 1] == pytest.approx(450 / total, rel=0.01) and found[0, 0] == pytest.approx(1)
    values[3] = 100 * np.array(both)
    less = statistics.correlations_of_draws(statistics.SquaresOfDraws(*values), 500, 500, 500)
    assert less[0, 1] == pytest.approx((450 - 50) / (total - 95), rel=0.01)


@pytest.mark.parametrize(("shape", "words"), [((1, 3, 9), "two seeds"), ((3, 1, 9), "1 draw of labels")])
def test_one_seed_or_one_draw_says_nothing_of_others(shape, words):
    with pytest.raises(InputError, match=words):
        statistics.crossed(np.zeros(shape))
    with pytest.raises(InputError, match="at any number of seeds have none"):
        sequences.interval(np.zeros((6, 3, 9)))


def test_components_are_those_of_a_study_whose_seeds_draw_their_own_labels():
    rng, deviations = np.random.default_rng(6), (0.04, 0.06, 0.5, 0.03, 0.2, 0.3, 0.6)
    pilots = [sample_size.components(each) for each in planted(rng, (4, 5, 50), deviations, 0.1, studies=600)]
    apart = np.array([each.of_draws[:3] for each in pilots]) ** 2
    # Means of what is cut off at 0 are too large, so mean squares are held against what is expected of them.
    expected = 50 * (0.04**2 + 0.06**2 + 0.03**2) + 0.2**2 + 0.3**2 + 0.6**2
    values = np.array([each.of_fits for each in pilots])
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(600)
    residual = np.array([each.residual for each in pilots])
    assert abs(residual.mean() - (0.2**2 + 0.3**2 + 0.6**2)) < 4 * residual.std() / math.sqrt(600)
    assert np.mean(apart[:, 1]) > np.mean(apart[:, 0]) and {each.of_draws.numbers for each in pilots} == {(4, 5)}
    assert 4 <= np.median([each.fits for each in pilots]) <= 20
    many = sample_size.components(planted(rng, (60, 60, 30), deviations, 0.1)[0])
    assert many.of_draws[:3] == pytest.approx(deviations[:2] + deviations[3:4], rel=0.3)
    assert many.of_draws.error(5, 3) == pytest.approx(math.sqrt(0.04**2 / 5 + 0.06**2 / 3 + 0.03**2 / 15), rel=0.2)


KINDS = {
    "seeds": (1.0, 0.0, 0.0, 0.0, 0.02, 0.02, 0.1),
    "draws": (0.0, 1.0, 0.0, 0.0, 0.02, 0.02, 0.1),
    "both alike": (0.7, 0.7, 0.0, 0.0, 0.3, 0.3, 1.0),
    "a seed with a draw": (0.0, 0.0, 0.0, 1.0, 0.3, 0.3, 1.0),
    "all": (0.5, 0.5, 5.0, 0.5, 2.0, 2.0, 4.0),
    "items": (0.05, 0.05, 8.0, 0.05, 1.0, 1.0, 2.0),
    "rest alone": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
}
"""{what varies: standard deviations of seeds, draws, items, and of their pairs and the rest}."""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 5), (3, 3), (5, 5), (10, 4)])
def test_intervals_hold_what_was_planted(sizes):
    """95 % of studies with planted components, 300 items; a family of three correlated ones holds all of its own."""
    rng, studies, shares = np.random.default_rng([7, *sizes]), 300, []
    for kind, deviations in KINDS.items():
        held = np.zeros(studies, bool)
        for i in range(studies):
            interval = statistics.crossed(planted(rng, (*sizes, 300), deviations, 0.2)[0])
            held[i] = interval.low <= 0.2 <= interval.high
        assert held.mean() > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies), (kind, held.mean())
        shares.append(held.mean())
    assert np.mean(shares) > 0.95 - 2 * math.sqrt(0.95 * 0.05 / studies / len(shares))
    families = []
    for _ in range(150):
        base, *others = planted(rng, (*sizes, 100), KINDS["all"], studies=4)
        intervals = statistics.simultaneous([other - base for other in others])
        families.append(all(each.low <= 0 <= each.high for each in intervals))
    assert np.mean(families) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 150)


# ---- From fits to verdicts


def cell(strategy, budget=10):
    return Cell(None if strategy == "scratch" else "a", "b", strategy, budget)


def crossed_fits(rate, seed, numbers=(3, 4), items=200):
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=items)
    return {SeedAndDraw(*each): hard + 0.1 * rng.normal(size=items) < rate for each in np.ndindex(*numbers)}


TABLE = {
    cell(name, budget): crossed_fits(rate, i)
    for i, (name, budget, rate) in enumerate(
        [("scratch", 10, 0.5), ("scratch", 100, 0.6), ("full", 10, 0.7), ("full", 100, 0.7), ("lp_ft", 10, 0.5)]
    )
}


def test_pairs_are_of_one_seed_and_draw_and_every_seed_has_every_draw():
    cells, bases = [cell("full"), cell("full", 100)], [cell("scratch"), cell("scratch", 100)]
    values = verdicts.area(TABLE, cells, bases)
    assert values.shape == (3, 4, 200)
    at = SeedAndDraw(2, 1)
    expected = [TABLE[one][at].astype(float) - TABLE[other][at] for one, other in zip(cells, bases, strict=True)]
    np.testing.assert_allclose(values[2, 1], np.mean(expected, axis=0))
    [full, lp_ft], others = verdicts.compared(TABLE, 0.05, 0.95)
    assert (full.fits, full.items, full.word) == (12, 200, "positive") and lp_ft.fits == 12 and len(others) == 3
    alone = statistics.simultaneous([values])[0]
    assert full.low < alone.low < alone.high < full.high and full.seeds_needed is not None
    less = {**TABLE, cell("full"): {at: fit for at, fit in TABLE[cell("full")].items() if at != (2, 1)}}
    with pytest.raises(InputError, match="3 seeds and 4 draws of labels, but 11 in number"):
        verdicts.compared(less, 0.05, 0.95)
    mixed = {where: {0: TABLE[where][SeedAndDraw(0, 0)], **TABLE[where]} for where in (cell("full"), cell("scratch"))}
    with pytest.raises(InputError, match="but 13 in number"):
        verdicts.area(mixed, cells[:1], bases[:1])


def test_what_stands_beside_the_verdicts_counts_pairs_that_share_nothing():
    [full, _], _ = verdicts.compared(TABLE, 0.05, 0.95)
    [spread] = asides.spreads([full], TABLE)
    pairs = verdicts.area(TABLE, [cell("full"), cell("full", 100)], [cell("scratch"), cell("scratch", 100)]).mean(-1)
    assert spread.sd == pytest.approx(pairs.std(ddof=1)) and spread.outperforms[0] == 1
    assert spread.outperforms[1] == asides.outperforming(np.ones(3))[1]
    terms = {"b": Conditions(0.05)}
    [_, pair, _] = asides.all_pairs({k: v for k, v in TABLE.items() if k.budget == 10}, _at_ten(), terms, 0.95)
    assert pair.fits == 12
    rows = [Result(name="x", target="b", strategy="full", seed=0, draw=1, train_examples=10)]
    beside = asides.asides(TABLE, rows, {}, [full], {}, terms, 0.95, "scratch")
    assert beside.costs == beside.milestones == () and beside.spreads


def _at_ten():
    return verdicts.compared({where: fits for where, fits in TABLE.items() if where.budget == 10}, 0.05, 0.95)[0]


def test_a_result_has_its_draw_where_there_is_one():
    values = {"name": "a", "target": "b", "strategy": "full", "seed": 3}
    assert "draw" not in to_json(Result(**values)) and replicate(Result(**values)) == 3
    crossed = Result(**values, draw=0)
    assert to_json(crossed)["draw"] == 0 and from_json(to_json(crossed)).draw == 0


def study_of(table):
    """As if the fits had been read from a run directory."""
    rows, predicted = [], {}
    for where, fits in table.items():
        for at, right in fits.items():
            name = f"{where.strategy}-{where.budget}-{at.seed}-{at.draw}"
            about = {"source": where.source, "target": "b", "strategy": where.strategy, "train_examples": where.budget}
            measured = {"test_accuracy": float(right.mean()), "steps": 100, "seconds": 1.0}
            rows.append(Result(name=name, seed=at.seed, draw=at.draw, **about, **measured))
            predicted[name] = right.astype(int)
    return predictions.Predictions(rows, predicted, {"b": np.ones(200, int)})


def test_a_design_tells_seeds_and_draws_apart(capsys):
    design_page.show([study_of(TABLE)], Judging(margin=5.0), 60)
    text = capsys.readouterr().out
    assert "sd of draws" in text and "sd of both" in text and "3 x 4" in text and "a seed and a draw each" in text
    assert "--seeds=4-" in text  # draws 0 to 3 were seen too
    [pilot, *_] = design.measured(TABLE, [("a", "full")], [10, 100], Conditions(0.05))
    factor = pilot.components.of_draws
    assert f"{100 * factor.error(3, 4):.2f}" in text and f"{100 * factor.draws:.2f}" in text
    assert pilot.components.fits != 12


def test_a_page_is_judged_over_seeds_and_draws():
    study = compare_page.judged([study_of(TABLE)], Judging(margin=5.0), [])
    assert [each.fits for each in study.family] == [12, 12] and study.asides.spreads
    assert compare_page.sections(study, {})


# ---- What is trained


def settings(*flags):
    return Settings.from_flags(**parse_flags(["compare", "--source=a", "--target=b", "--seeds=0-4", *flags]))


@pytest.mark.parametrize(
    ("named", "flags", "until", "says"),
    [
        ((5,), [], None, "--draws=5: name two draws of labels or more, as 0-4"),
        ((1, 2, 1), [], None, "names one twice"),
        ((-1, 2), [], None, "at least 0 and below"),
        ((0, 10**9), [], None, "those of searches"),
        ((0, 1), ["--draw_seed=3"], None, "both given"),
        ((0, 1), ["--seeds=0"], None, "all has one: give two --seeds"),
        ((0, 1), ["--train_examples=10,5:seeds=1"], None, "5:seeds=1 has one"),
        ((0, 1), [], "decided", "--until=decided adds seeds"),
    ],
)
def test_draws_that_do_not_go_are_refused_in_a_line(named, flags, until, says):
    with pytest.raises(InputError, match=says) as caught:
        replicates.require_flags(named, None, settings(*flags), until)
    assert "\n" not in str(caught.value)
    replicates.require_flags(None, None, settings(*flags), until)


def line(tasks, folder, *more, **flags):
    given = {"strategies": ("full",), "train_examples": (20, 40), "steps": 6, "seeds": (0, 1)} | flags
    return ["compare", *command(tasks, folder, **given), *more]


def planned(tasks, folder, *more, **flags):
    values, options = compare.command_line.read(line(tasks, folder, *more, **flags), compare.CompareFlags)
    settings = Settings.from_flags(**values)
    return compare.planned(values, options, settings, compare.process.prepare(settings), None)


def test_every_seed_has_every_draw_and_without_the_flag_keys_are_as_before(tasks, tmp_path):
    plain = [job for part in planned(tasks, tmp_path) for job in plan.planned(part.experiment).values()]
    parts = planned(tasks, tmp_path, "--draws=1,7")
    crossed = [job for part in parts for job in plan.planned(part.experiment).values()]
    assert [each.result.draw for each in plain] == [None] * 12 and len(crossed) == 24
    by_name = {each.result.name: each.result for each in crossed}
    assert len(by_name) == 24 and all(f"-draw{each.draw}-" in name for name, each in by_name.items())
    cells = {(each.strategy.label, each.budget, replicate(each.result)) for each in crossed}
    assert {at for *_, at in cells} == set(itertools.product((0, 1), (1, 7)))
    assert {each.result.recipe for each in plain}.isdisjoint(each.result.recipe for each in crossed)
    assert len({each.result.recipe for each in crossed if each.strategy.label == "full"}) == 1
    of_seed_one = next(each for each in plain if each.seed == 1)
    for part in parts:
        streams = plan.streams(part.experiment.settings, 0)
        assert streams.draw == plan.streams(settings(), part.experiment.draw).draw
        assert streams.order == plan.streams(settings(), 0).order
        assert set(plan.source_streams(part.experiment.settings, 0)) == set(plan.source_streams(settings(), 0))
    assert plan.streams(settings(), 1).draw == plan.streams(settings(), 0, of_seed_one.seed).draw
    with pytest.raises(InputError, match="--train_examples=all is every training example"):
        planned(tasks, tmp_path, "--draws=1,7", train_examples=("20", "all"))
    assert planned(tasks, tmp_path, "--draws=1,7", train_examples=("20", "all"), validation=0.2)


@pytest.mark.slow
def test_a_crossed_study_trains_a_source_a_seed_goes_on_and_is_reported_again(tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = line(tasks, tmp_path, "--draws=0-2")
    compare.main(flags)
    assert "3 draws apart from the seeds, each with each of 2 seeds" in capsys.readouterr().out
    rows = results(tmp_path / "w")
    assert sum(row.strategy == "pretrain" for row in rows) == 2
    assert {replicate(row) for row in rows if row.strategy == "full"} == set(itertools.product(range(2), range(3)))
    whole = snapshot(tmp_path / "w")
    monkeypatch.setattr(fit, "train_groups", lambda *arguments, **options: pytest.fail("trained again"))
    compare.main(flags)
    again = snapshot(tmp_path / "w")
    assert again["results.jsonl"] == whole["results.jsonl"] and again["comparisons.csv"] == whole["comparisons.csv"]
    with pytest.raises(InputError, match="holds another experiment"):
        compare.main(line(tasks, tmp_path, "--draws=0-3"))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report.main(["report", f"--runs={tmp_path / 'w'}", f"--output={tmp_path / 'page'}"])
    assert (tmp_path / "page" / "comparisons.csv").read_bytes() == whole["comparisons.csv"]
    compare.main(["compare", f"--design={tmp_path / 'w'}", "--margin=5"])
    assert "sd of draws" in capsys.readouterr().out
    header = (tmp_path / "w" / "fits.csv").read_text().splitlines()[0].split(",")
    assert "draw" in header


def test_streams_of_a_fit_are_those_of_its_seed_and_draw():
    pinned = replace(settings(), draw_seed=4)
    assert plan.streams(settings(), 0, 4) == plan.streams(pinned, 0)
