"""What is drawn from a seed: golden, random access, nested, balanced."""

import numpy as np
import pytest

from tljax.data import draw
from tljax.types import InputError


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of one epoch."""
    return draw.order(seed, n, n, epoch, epoch + 1, epochs=True)[0]


def test_a_permutation_is_the_sorted_words_of_philox() -> None:
    stream = np.random.Philox(key=np.array([7, 0], np.uint64)).random_raw(40)
    for epoch in range(4):  # 10 examples take three counters of four words
        expected = np.argsort(stream[12 * epoch :][:10], kind="stable") if epoch < 3 else None
        got = permutation(7, epoch, 10)
        assert got.dtype == np.int32 and sorted(got.tolist()) == list(range(10))
        if expected is not None:
            np.testing.assert_array_equal(got, expected)


def test_golden_permutations() -> None:
    # From NumPy 2.4.6 (Philox4x64-10). They change only if the definition does: then every order of every run does.
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(2**64 - 1, 1000, 8).tolist() == [7, 2, 6, 0, 5, 4, 3, 1]


@pytest.mark.parametrize("epochs", [True, False])
@pytest.mark.parametrize(("n", "batch"), [(10, 3), (12, 4), (5, 8), (1, 1), (103, 10)])
def test_any_stretch_can_be_drawn_by_itself(n: int, batch: int, epochs: bool) -> None:
    whole = draw.order(3, n, batch, 0, 40, epochs=epochs)
    assert whole.shape == (40, batch) and whole.dtype == np.int32
    for a, b, c in ((0, 1, 40), (0, 17, 40), (5, 23, 24), (11, 11, 13)):
        parts = [draw.order(3, n, batch, *span, epochs=epochs) for span in ((a, b), (b, c))]
        np.testing.assert_array_equal(np.concatenate(parts), whole[a:c])


def test_an_epoch_holds_every_example_once_and_its_last_row_is_filled_with_minus_one() -> None:
    rows = draw.order(1, 10, 4, 0, 6, epochs=True)
    for epoch in range(2):
        flat = rows[3 * epoch : 3 * epoch + 3].ravel()
        np.testing.assert_array_equal(flat[:10], permutation(1, epoch, 10))
        assert flat[10:].tolist() == [-1, -1]


def test_without_epochs_no_row_is_short_and_every_example_comes_equally_often() -> None:
    rows = draw.order(1, 10, 32, 0, 5, epochs=False)
    np.testing.assert_array_equal(rows.ravel(), np.concatenate([permutation(1, e, 10) for e in range(16)]))


def test_a_subset_stands_for_its_positions() -> None:
    subset = np.array([50, 7, 33], np.int32)
    rows, positions = (draw.order(2, 3, 2, 0, 4, epochs=True, subset=s) for s in (subset, None))
    np.testing.assert_array_equal(rows, np.where(positions < 0, -1, subset[positions]))
    assert rows.dtype == np.int32 and -1 in rows
    with pytest.raises(InputError, match="subset"):
        draw.order(2, 4, 2, 0, 4, epochs=True, subset=subset)


def test_seeds_and_epochs_differ_and_a_negative_seed_is_refused() -> None:
    drawn = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(drawn) == 9
    with pytest.raises(InputError, match="seed -1"):
        permutation(-1, 0, 5)


def test_permutations_look_uniform() -> None:
    # Each of 6 permutations of 3 in 6000 draws: 1000 +- 29 (one standard deviation).
    rows = draw.order(0, 3, 3, 0, 6000, epochs=True)
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and abs(counts - 1000).max() < 150


LABELS = np.random.Philox(key=[5, 5]).random_raw(500) % np.uint64(7)


def test_label_budgets_are_balanced_and_nested() -> None:
    before = draw.label_budget(9, LABELS, 7)
    for total in (7, 14, 20, 70, 200, 500):
        chosen = draw.label_budget(9, LABELS, total)
        assert chosen.dtype == np.int32 and len(set(chosen.tolist())) == total
        np.testing.assert_array_equal(chosen[: len(before)], before)
        counts = np.bincount(LABELS[chosen].astype(int), minlength=7)
        if total <= 200:
            assert counts.max() - counts.min() == (total % 7 != 0)
        before = chosen
    assert draw.label_budget(10, LABELS, 70).tolist() != draw.label_budget(9, LABELS, 70).tolist()


def test_the_remainder_falls_to_drawn_classes() -> None:
    labels = np.arange(40) % 4
    extra = {int(labels[draw.label_budget(seed, labels, 5)[4]]) for seed in range(40)}
    assert extra == {0, 1, 2, 3}


def test_a_class_that_runs_out_leaves_the_rest_to_the_others() -> None:
    labels = np.array([0, 0, 1, 1, 1, 1, 1, 1])
    assert np.bincount(labels[draw.label_budget(0, labels, 6)]).tolist() == [2, 4]


@pytest.mark.parametrize("total", [6, 0, -1, 501])
def test_a_budget_that_cannot_be_is_refused(total: int) -> None:
    with pytest.raises(InputError, match=f"budget of {total}: give 7 .* to 500"):
        draw.label_budget(0, LABELS, total)


def test_a_validation_split_is_balanced_and_nested_across_budgets() -> None:
    small, large = (draw.label_budget(4, LABELS, total) for total in (70, 210))
    train, validation = draw.validation_split(LABELS, small, 0.2)
    assert np.bincount(LABELS[validation].astype(int)).tolist() == [2] * 7
    assert np.bincount(LABELS[train].astype(int)).tolist() == [8] * 7
    assert sorted([*train, *validation]) == sorted(small)
    more_train, more_validation = draw.validation_split(LABELS, large, 0.2)
    assert set(train) <= set(more_train) and set(validation) <= set(more_validation)
    assert train.dtype == validation.dtype == np.int32


def test_the_fraction_is_the_decimal_that_was_written() -> None:
    for percent in range(1, 100):
        labels = np.zeros(100, int)
        assert len(draw.validation_split(labels, np.arange(100), percent / 100)[1]) == percent


def test_a_fraction_that_cannot_be_is_refused() -> None:
    train, validation = draw.validation_split(LABELS, np.arange(9), 0.0)
    assert train.tolist() == list(range(9)) and len(validation) == 0
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"outside \[0, 1\)"):
            draw.validation_split(LABELS, np.arange(9), fraction)
    with pytest.raises(InputError, match="at most 1 a class, holds none out"):
        draw.validation_split(LABELS, draw.label_budget(0, LABELS, 7), 0.2)
