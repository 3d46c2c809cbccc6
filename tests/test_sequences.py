"""Confidence sequences against quadrature, their own inversion, and simulation."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from tljax.study import sequences, statistics, verdicts
from tljax.study.verdicts import Cell, compared
from tljax.types import InputError


def by_quadrature(values, precision, one_side=False):
    """The mixture of theorem 4.9 by definition: the density of all values over their scale, with and without a mean.

    Both are integrated over the scale with its right Haar measure, the first over standardised means too.
    """
    n, total, squares = len(values), values.sum(), np.sum(values**2)

    def over_scale(theta):
        density = lambda t: t ** (n - 1) * math.exp(-t * t * squares / 2 + theta * t * total - n * theta**2 / 2)  # noqa: E731
        return integrate.quad(density, 0, 60 / math.sqrt(squares), limit=200)[0]

    prior = stats.norm(scale=1 / math.sqrt(precision))
    mixed = integrate.quad(lambda theta: prior.pdf(theta) * over_scale(theta), 0 if one_side else -12, 12, limit=200)[0]
    return (2 if one_side else 1) * mixed / over_scale(0.0)


VALUES = np.array([0.9, 1.7, 0.2, 1.1, 0.6, 1.4])


@pytest.mark.parametrize("precision", [0.2, 1.0])
def test_the_e_value_is_the_mixed_likelihood_ratio_free_of_scale(precision):
    expected = by_quadrature(VALUES, precision)
    assert sequences.e_value(VALUES, precision=precision) == pytest.approx(expected, rel=1e-6)
    assert sequences.e_value(7 * VALUES + 3, 3, precision) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [3, 6, 17, 40])
@pytest.mark.parametrize("alpha", [0.04, 0.002])
def test_the_half_width_is_where_the_e_value_is_one_over_alpha(n, alpha):
    values = np.random.default_rng(n).normal(0.3, 2, n)
    half = sequences.half_width(n, alpha) * values.std(ddof=1)
    if math.isinf(half):
        assert sequences.e_value(values, 1e9) < 1 / alpha
        return
    for end in (-half, half):
        assert sequences.e_value(values, values.mean() + end) == pytest.approx(1 / alpha, rel=1e-9)
    inner = np.linspace(-half, half, 21)[1:-1]
    assert all(sequences.e_value(values, values.mean() + step) < 1 / alpha for step in inner)


def test_one_side_of_a_sequence_of_two_sided_errors_is_wrong_no_more_often_than_named():
    """By the mixture over positive differences alone, at the end of the interval."""
    alpha = 0.05
    half = sequences.half_width(len(VALUES), sequences.two_sided(alpha)) * VALUES.std(ddof=1)
    below = VALUES - (VALUES.mean() - half)
    assert by_quadrature(below, sequences.PRECISION, one_side=True) > 1 / alpha
    assert by_quadrature(-below, sequences.PRECISION, one_side=True) < 1


def exceeded(rng, studies, most=40, draw=np.random.Generator.standard_normal):
    """The share of studies in which the truth is outside the sequence at any number of values; t, likewise."""
    values = draw(rng, (studies, most))
    counts = np.arange(1, most + 1)
    means = values.cumsum(1) / counts
    deviations = np.sqrt(np.maximum((values**2).cumsum(1) - counts * means**2, 0) / np.maximum(counts - 1, 1))
    shares = []
    for half in (lambda n: sequences.half_width(n, 0.05), lambda n: stats.t.isf(0.025, n - 1) / math.sqrt(n)):
        halves = np.array([math.inf, *(half(int(n)) for n in counts[1:])])
        outside = np.abs(means[:, 1:]) > halves[1:] * deviations[:, 1:]
        shares.append(outside[:, 4:].any(1).mean())
    return shares


def test_a_sequence_holds_at_all_numbers_at_once_where_t_does_not():
    by_sequence, by_t = exceeded(np.random.default_rng(0), 4000)
    assert by_sequence <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 4000)
    assert by_t > 0.15


def scores(rng, fits, items, effect=0.0, fit=0.02, item=0.05, groups=None):
    """Differences of -1, 0 and 1 with effects of fits and of items, or groups of them."""
    of_items = rng.normal(0, item, items if groups is None else groups.max() + 1)
    of_items = of_items if groups is None else of_items[groups]
    chance = np.clip(effect + rng.normal(0, fit, (fits, 1)) + of_items, -0.5, 0.5)
    return (rng.random((fits, items)) < 0.25 + chance / 2).astype(float) - (
        rng.random((fits, items)) < 0.25 - chance / 2
    )


def test_the_parts_are_those_of_the_two_factors():
    """Between fits the deviation of their means; from the items what the variance components say, and no less."""
    values = scores(np.random.default_rng(1), 200, 400, fit=0.1, item=0.2)
    known = sequences.parts(values)
    assert known.between == pytest.approx(values.mean(1).std(ddof=1), rel=1e-9)
    assert known.limit == pytest.approx(0.2 / math.sqrt(400), rel=0.15)
    assert known.limit < known.items < 1.2 * known.limit
    assert known.mean == values.mean()
    alone = sequences.parts(np.tile(values[:, :1], (1, 400)))  # items that are all alike leave nothing
    assert alone.limit < 0.01 * alone.between


def test_items_that_are_alike_count_as_their_groups():
    groups = np.repeat(np.arange(40), 25)
    values = scores(np.random.default_rng(2), 30, 1000, item=0.2, groups=groups)
    named, unnamed = (sequences.parts(values, which).limit for which in (groups, None))
    assert named == pytest.approx(0.2 / math.sqrt(40), rel=0.25) and unnamed < named / 3


def test_words_sizes_and_what_is_settled():
    rng = np.random.default_rng(3)
    large, none = scores(rng, 12, 4000, effect=0.3), scores(rng, 40, 4000, item=0.01)
    open_, wide = scores(rng, 6, 4000, item=0.01), scores(rng, 40, 300, item=0.4)
    few = scores(rng, 5, 4000, effect=0.3)
    positive, equivalent, undecided, forbidden, withheld = sequences.verdicts([large, none, open_, wide, few], 0.03)
    assert (positive.word, positive.size, positive.settled) == ("positive", "beyond", True)
    assert (equivalent.word, equivalent.size, equivalent.settled) == ("equivalent", "within", True)
    assert (undecided.word, undecided.settled) == ("undecided", False)
    assert (forbidden.word, forbidden.settled) == ("undecided", True) and forbidden.items_part > 0.03
    assert withheld.word == "" and "6 or more" in withheld.warning and not withheld.settled
    assert positive.p < 0.05 and undecided.p > 0.05 and positive.power is None
    (alone,) = sequences.verdicts([large], 0.03)
    assert alone.interval.high - alone.interval.low < positive.interval.high - positive.interval.low
    assert sequences.verdicts([], 0.03) == []
    with pytest.raises(InputError, match="margin"):
        sequences.verdicts([large], 0)


def test_p_is_the_share_of_errors_at_which_the_interval_ends_at_nothing():
    values = scores(np.random.default_rng(4), 9, 3000, effect=0.04)
    (verdict,) = sequences.verdicts([values], 0.03)
    ends = sequences.interval(values, 1 - verdict.p)
    assert min(abs(ends.low), abs(ends.high)) < 1e-5 and 1e-4 < verdict.p < 0.5


def test_few_groups_get_no_word_and_no_more_seeds():
    groups = np.repeat(np.arange(5), 100)
    (verdict,) = sequences.verdicts([scores(np.random.default_rng(5), 8, 500, groups=groups)], 0.03, groups=groups)
    assert verdict.word == "" and verdict.settled and "fewer than 8" in verdict.warning


def table(rng, seeds_of):
    """Rights and wrongs of scratch and strategies, each under its own number of seeds."""
    right = {Cell(None, "b", "scratch", 10): {seed: rng.random(500) < 0.6 for seed in range(max(seeds_of.values()))}}
    for name, count in seeds_of.items():
        better = 0.9 if name == "good" else 0.6
        right[Cell("a", "b", name, 10)] = {seed: rng.random(500) < better for seed in range(count)}
    return right


def test_a_family_keeps_its_share_of_errors_while_some_of_it_has_stopped():
    right = table(np.random.default_rng(6), {"good": 6, "same": 20})
    family, others = compared(right, 0.02, 0.95, sequence=True)
    good, same = family
    assert (good.fits, good.word, good.settled) == (6, "positive", True)
    assert (same.fits, same.word) == (20, "undecided") and good.sequence and same.sequence and not others
    base = right[Cell(None, "b", "scratch", 10)]
    values = np.array([right[Cell("a", "b", "good", 10)][seed].astype(float) - base[seed] for seed in range(6)])
    by_hand = sequences.interval(values, 1 - 0.05 / 2)
    assert (good.low, good.high) == pytest.approx((by_hand.low, by_hand.high))
    assert "whenever they are looked at" in verdicts.sentence(family, 0.95)
    fixed, _ = compared(right, 0.02, 0.95)
    assert fixed[0].high - fixed[0].low < good.high - good.low and not fixed[0].settled


def test_a_comparison_that_cannot_be_judged_yet_has_its_share_too():
    right = table(np.random.default_rng(7), {"good": 6, "same": 4})
    (good, same), _ = compared(right, 0.02, 0.95, sequence=True)
    (alone,), _ = compared(
        {cell: fits for cell, fits in right.items() if cell.strategy != "same"}, 0.02, 0.95, sequence=True
    )
    assert same.word == "" and "6 or more" in same.reason and not same.settled
    assert good.high - good.low > alone.high - alone.low


def test_rounds_hold_every_seed_once_and_grow():
    for first, most in ((range(5), 40), (range(8), 8), ([3, 1], 17)):
        added = sequences.rounds(list(first), most)
        every = [seed for seeds in added for seed in seeds]
        assert len(set(every)) == len(every) == most and every[: len(list(first))] == list(first)
    with pytest.raises(InputError, match="most 7 seeds are fewer than the 8"):
        sequences.rounds(list(range(8)), 7)


@pytest.mark.slow
def test_words_are_rarely_wrong_with_items_drawn_anew_and_a_look_after_every_round():
    """400 families of three, of them two with no difference and one of the margin: at most 5 % + 2 standard errors."""
    rng, wrong, equal, margin, studies = np.random.default_rng(8), 0, 0, 0.03, 400
    looks = np.cumsum([len(seeds) for seeds in sequences.rounds([0], 30)])
    for _ in range(studies):
        arms = [scores(rng, 30, 300, effect, item=0.1) for effect in (0.0, 0.0, margin)]
        words = [[verdict.word for verdict in sequences.verdicts([arm[:n] for arm in arms], margin)] for n in looks]
        wrong += any(word in ("positive", "negative") for look in words for word in look[:2])
        equal += any(look[2] == "equivalent" for look in words)
    assert max(wrong, equal) / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


def test_intervals_of_a_planned_number_are_as_they_were():
    """The bits of `statistics` do not turn on the functions that `sequences` shares with it."""
    values = scores(np.random.default_rng(9), 5, 200)
    interval = statistics.crossed(values)
    squares = statistics.mean_squares(values[None])
    error, degrees = statistics.standard_errors(squares, 5, 200, statistics.unseen_items(values[None]))
    assert interval.high == interval.mean + float(stats.t.isf((1 - 0.95) / 2, degrees.item())) * error.item()
