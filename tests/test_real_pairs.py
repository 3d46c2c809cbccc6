"""The script that counts wrong verdicts on real fits: its studies have the truth that it says, and it trains fits."""

import math

import numpy as np
import pytest
import real_pairs
from real_pairs import Fits, study

from tljax.study import sequences


@pytest.fixture(scope="module")
def fits():
    rng = np.random.default_rng(0)
    chance = rng.normal(0.3, 0.2, (2, 5, 1, 1)) + rng.normal(0, 0.5, (2, 1, 1, 60))
    return Fits(rng.normal(size=(2, 5, 9, 60)) < chance, np.repeat(np.arange(12), 5))


@pytest.mark.parametrize("effect", ["none", "planted", "real"])
@pytest.mark.parametrize("grouped", [False, True])
def test_studies_have_on_average_the_difference_that_they_say(fits, effect, grouped):
    rng, chosen = np.random.default_rng(1), fits if grouped else fits._replace(groups=None)
    drawn = [study(rng, chosen, 2, 4, effect) for _ in range(1500)]
    errors = np.array([each.differences.mean((1, 2)) - each.truths for each in drawn]).ravel()
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(1500)
    assert (effect == "none") == all((each.truths == 0).all() for each in drawn)


def test_a_group_that_is_drawn_twice_is_two_groups(fits):
    drawn = study(np.random.default_rng(2), fits, 1, 3)
    assert drawn.differences.shape == (1, 3, 60) and len(np.unique(drawn.groups)) == 12


@pytest.mark.slow
def test_real_fits_against_themselves_are_rarely_called_different(monkeypatch):
    """10 seeds x 9 fits of two kinds on digits of fonts, whose families are drawn anew, looked at up to 40 seeds."""
    monkeypatch.setattr(real_pairs, "SEEDS", 10)
    monkeypatch.setattr(real_pairs, "REPLICATES", 9)
    trained = real_pairs.train(*real_pairs.TASKS["digits"])
    assert trained.right.shape[:3] == (2, 10, 9) and 0.75 < trained.right.mean() < 0.99
    assert len({fit.tobytes() for fit in trained.right.reshape(180, -1)}) == 180
    rng, wrong, studies = np.random.default_rng(3), 0, 200
    for _ in range(studies):
        drawn = study(rng, trained, 1, 40)
        looks = [
            sequences.verdicts([drawn.differences[0][:n]], real_pairs.MARGIN, groups=drawn.groups)[0].word
            for n in real_pairs.LOOKS
        ]
        wrong += bool({"positive", "negative"} & {*looks})
    assert wrong / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
