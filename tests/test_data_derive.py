"""Tasks made from tasks: each change against a closed form or another library, their order, and what is refused."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage, stats
from test_programs import command, results

from experiments import transfer
from tljax.data import checks, derive, draw, load
from tljax.types import ArrayExamples, InputError, Task

pytestmark = pytest.mark.usefixtures("no_pictures")

WORDS = np.random.Philox(key=[11, 0]).random_raw(90 * 12 * 12 * 3 // 8).astype("<u8").view(np.uint8)
COLOUR = WORDS.reshape(90, 12, 12, 3)
NAMES = ("T-shirt/top", "Trouser", "Pull-over", "Coat", "cat+dog", "Bag")


def small(images: np.ndarray = COLOUR, classes: tuple[str, ...] = NAMES) -> Task:
    """60 training and 30 test examples of six classes."""
    labels = np.arange(90, dtype=np.int32) % 6
    return checks.checked(
        "small", ArrayExamples(images[:60], labels[:60]), ArrayExamples(images[60:], labels[60:]), classes
    )


def derived(*changes: str, task: Task | None = None) -> Task:
    return derive.derived(small() if task is None else task, "made", changes)


def write(file: Path, images: np.ndarray) -> str:
    """The name of a data set of six classes, made of them."""
    labels = np.arange(90) % 6
    np.savez(file, x_train=images[:60], y_train=labels[:60], x_test=images[60:], y_test=labels[60:])
    return str(file)


def mnist(changes: str) -> Task:
    return load(f"mnist_10k:{changes}")


PLAIN = load("mnist_10k")


@pytest.fixture(autouse=True)
def unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tljax.data.idx.shipped", lambda name, shape, resize: PLAIN)


def test_a_task_is_called_by_the_whole_text_and_says_what_it_is_made_of() -> None:
    task = mnist("labels=0-4:rotate=30")
    assert task.name == "mnist_10k:labels=0-4:rotate=30"
    assert task.note == (f"5,000 training and 1,000 test examples after labels=0-4:rotate=30; before: {PLAIN.note}")
    assert task.fingerprint == checks.fingerprint(task.train, task.test, task.classes)
    assert task.train.arrays.dtype == np.uint8 and task.train.targets.dtype == np.int32


# Classes.


@pytest.mark.parametrize(
    ("text", "kept"),
    [("0-4", [0, 1, 2, 3, 4]), ("0+2+4+6+8", [0, 2, 4, 6, 8]), ("9+0-1", [9, 0, 1]), ("7+3", [7, 3])],
)
def test_labels_keeps_these_classes_and_numbers_them_from_zero(text: str, kept: list[int]) -> None:
    task = mnist(f"labels={text}")
    assert task.classes == tuple(map(str, kept))
    for part, plain in ((task.train, PLAIN.train), (task.test, PLAIN.test)):
        rows = [row for row, label in enumerate(plain.targets) if label in kept]
        np.testing.assert_array_equal(part.arrays, plain.arrays[rows])
        assert part.targets.tolist() == [kept.index(plain.targets[row]) for row in rows]


def test_group_makes_a_class_of_each_group() -> None:
    task = mnist("group=0+2+4+6+8/1+3+5+7+9")
    assert task.classes == ("0+2+4+6+8", "1+3+5+7+9")
    for part, plain in ((task.train, PLAIN.train), (task.test, PLAIN.test)):
        np.testing.assert_array_equal(part.targets, plain.targets % 2)
        assert part.arrays is plain.arrays or (part.arrays == plain.arrays).all()


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("labels=T-shirt/top+Bag", ("T-shirt/top", "Bag")),
        ("labels=T-shirt/top-Pull-over", ("T-shirt/top", "Trouser", "Pull-over")),
        ("labels=cat+dog+Coat", ("cat+dog", "Coat")),
        ("labels=0+4-5", ("T-shirt/top", "cat+dog", "Bag")),
        ("group=T-shirt/top/Trouser-Bag", ("T-shirt/top", "Trouser+Pull-over+Coat+cat+dog+Bag")),
        ("group=0-2/3+Bag+4", ("T-shirt/top+Trouser+Pull-over", "Coat+Bag+cat+dog")),
    ],
)
def test_a_class_is_called_by_its_name_or_its_number(text: str, classes: tuple[str, ...]) -> None:
    assert derived(text).classes == classes


def test_of_names_that_hold_separators_the_longest_is_meant() -> None:
    task = small(classes=("a", "b", "a+b", "a-b", "c", "d"))
    assert derived("labels=a+b+c", task=task).classes == ("a+b", "c")
    assert derived("labels=a-b+b", task=task).classes == ("a-b", "b")
    assert derived("labels=b+a", task=task).classes == ("b", "a")


def test_a_number_that_is_a_name_is_the_name() -> None:
    task = mnist("labels=5-9:group=5+6/7-9")
    assert task.classes == ("5+6", "7+8+9") and np.bincount(task.test.targets).tolist() == [400, 600]
    with pytest.raises(InputError, match=r"'labels=0-4' .* names no class by '0-4'; known: 5, 6, 7, 8, 9"):
        derived("labels=5-9", "labels=0-4", task=PLAIN)


def test_take_is_balanced_nested_and_leaves_the_test_split() -> None:
    few, more = mnist("take=50"), mnist("take=203")
    assert np.bincount(few.train.targets).tolist() == [5] * 10
    np.testing.assert_array_equal(few.train.arrays, more.train.arrays[:50])
    chosen = draw.label_budget(0, PLAIN.train.targets, 203)
    np.testing.assert_array_equal(more.train.arrays, PLAIN.train.arrays[chosen])
    assert more.test.arrays is PLAIN.test.arrays or (more.test.arrays == PLAIN.test.arrays).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_shuffled_labels_keep_the_counts_and_change_the_stated_share(share: float) -> None:
    task = mnist(f"shuffle_labels={share}")
    assert np.bincount(task.train.targets).tolist() == [1000] * 10
    # Each of the drawn gets a label of the ten at random, so nine in ten change: 9000 +- 30 of all.
    changed = (task.train.targets != PLAIN.train.targets).sum()
    assert abs(changed - 9000 * share) <= 120 * math.sqrt(share)
    np.testing.assert_array_equal(task.test.targets, PLAIN.test.targets)
    np.testing.assert_array_equal(task.train.arrays, PLAIN.train.arrays)


def test_a_smaller_share_shuffles_among_the_examples_of_a_larger() -> None:
    before = small().train.targets
    some, more = (derived(f"shuffle_labels={share}").train.targets != before for share in (0.5, 1))
    order = np.argsort(np.random.Philox(key=np.array([0, 3], np.uint64)).random_raw(60), kind="stable")
    assert 0 < some.sum() < more.sum() and set(np.flatnonzero(some)) <= set(order[:30].tolist())


# Pixels.


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_right_angle_is_exact_and_counter_clockwise(turns: int) -> None:
    task = derived(f"rotate={90 * turns}")
    for part, plain in ((task.train, small().train), (task.test, small().test)):
        np.testing.assert_array_equal(part.arrays, np.rot90(plain.arrays, turns, axes=(1, 2)))
    np.testing.assert_array_equal(derived(f"rotate={90 * turns - 360}").train.arrays, task.train.arrays)


@pytest.mark.parametrize("degrees", [30, -17.5, 123])
def test_a_rotation_is_bilinear_about_the_centre(degrees: float) -> None:
    """As scipy's, its fractions dropped, where all four neighbours are within the picture; 0 where none is."""
    got = derived(f"rotate={degrees}").train.arrays.astype(int)
    plain = small().train.arrays.astype(float)
    expected = ndimage.rotate(plain, degrees, axes=(2, 1), reshape=False, order=1, cval=np.nan)
    inside = ~np.isnan(expected)
    assert inside.mean() > 0.6
    dropped = (expected - got)[inside]
    assert dropped.min() >= -1e-9 and dropped.max() <= 1 + 1e-9
    y, x = np.mgrid[:12, :12] - 5.5
    angle = math.radians(degrees)
    away = np.maximum(*(np.abs(a * math.cos(angle) + b * math.sin(angle)) for a, b in ((x, -y), (y, x))))
    assert (away > 6.01).any() and (got[:, away > 6.01] == 0).all()


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_a_blur_is_gaussian_within_and_goes_on_as_the_edge_is(radius: float) -> None:
    """As scipy's to a few of the 255 greys, for PIL takes three boxes for the Gaussian."""
    large = small(np.tile(COLOUR, (1, 4, 4, 1)) // 2 + np.arange(90, dtype=np.uint8)[:, None, None, None])
    got = derived(f"blur={radius}", task=large).train.arrays.astype(float)
    expected = ndimage.gaussian_filter(large.train.arrays.astype(float), radius, axes=(1, 2))
    within = np.abs(got - expected)[:, 12:-12, 12:-12]
    assert within.mean() < 1 and within.max() < 4 and expected.std() < 0.6 * large.train.arrays.std()
    even = small(np.full((90, 12, 12, 3), (10, 200, 255), np.uint8))
    assert derived(f"blur={radius}", task=even).fingerprint == even.fingerprint


def test_no_blur_is_nothing() -> None:
    assert derived("blur=0").fingerprint == small().fingerprint


def test_invert_is_255_minus_x_and_twice_is_nothing() -> None:
    np.testing.assert_array_equal(mnist("invert").train.arrays, ~PLAIN.train.arrays)
    assert derived("invert", "invert").fingerprint == small().fingerprint != derived("invert").fingerprint


def test_noise_is_normal_with_the_stated_deviation() -> None:
    grey = np.full((90, 12, 12, 3), 128, np.uint8)
    for noise in (0.02, 0.1):
        got = (derived(f"noise={noise}", task=small(grey)).train.arrays.astype(float).ravel() - 128) / 255
        # 25,920 draws: the mean is 0 +- 0.006 deviations and the deviation right to 0.45 %, once each; the
        # rounding to greys adds their twelfth to the variance.
        assert abs(got.mean()) < 0.025 * noise
        assert got.std() == pytest.approx(math.sqrt(noise**2 + 1 / 12 / 255**2), rel=0.02)
    assert stats.kstest(got + (np.arange(len(got)) / len(got) - 0.5) / 255, stats.norm(scale=0.1).cdf).pvalue > 0.01


def test_noise_is_clipped_and_zero_noise_is_nothing() -> None:
    bright = np.full((90, 12, 12, 3), 250, np.uint8)
    got = derived("noise=0.1", task=small(bright)).train.arrays
    assert got.max() == 255 and (got == 255).mean() == pytest.approx(stats.norm.sf(4.5 / 25.5), abs=0.015)
    assert set(np.unique(derived("noise=1e300", task=small(bright)).train.arrays)) == {0, 255}
    assert derived("noise=0").fingerprint == small().fingerprint


def test_noise_differs_between_splits_rows_and_pixels_and_is_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grey = small(np.full((90, 12, 12, 3), 128, np.uint8))
    task = derived("noise=0.1", task=grey)
    words = np.random.Philox(key=np.array([0, 5], np.uint64)).random_raw(108)
    sixteenths = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    drawn = stats.norm.ppf((np.array(sixteenths) + 0.5) / 2**16)
    np.testing.assert_array_equal(task.train.arrays[0].ravel(), np.clip(128 + np.rint(25.5 * drawn), 0, 255))
    for first, other in (
        (task.train.arrays[:30], task.test.arrays),
        (task.train.arrays[:-1], task.train.arrays[1:]),
        (task.train.arrays[:, :-1], task.train.arrays[:, 1:]),
        (task.train.arrays[..., 0], task.train.arrays[..., 1]),
    ):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.04
    monkeypatch.setattr(derive, "_CHUNK", 1000)
    assert derived("noise=0.1", task=grey).fingerprint == task.fingerprint


def test_permute_exchanges_pixels_alike_in_both_splits() -> None:
    task, plain = mnist("permute=7"), PLAIN
    order = np.argsort(np.random.Philox(key=np.array([7, 4], np.uint64)).random_raw(784), kind="stable")
    assert sorted(order.tolist()) == list(range(784))
    for part, before in ((task.train, plain.train), (task.test, plain.test)):
        np.testing.assert_array_equal(part.arrays.reshape(-1, 784), before.arrays.reshape(-1, 784)[:, order])
    # NumPy 2.4.6 (Philox4x64-10): they change only if the definition does.
    assert order[:8].tolist() == [587, 330, 776, 538, 781, 578, 487, 67]
    assert mnist("permute=8").fingerprint != task.fingerprint


def test_permute_keeps_the_channels_of_a_pixel_together() -> None:
    got = derived("permute=1").train.arrays.reshape(60, 144, 3)
    plain = small().train.arrays.reshape(60, 144, 3)
    assert sorted(map(tuple, got[5].tolist())) == sorted(map(tuple, plain[5].tolist()))
    assert (got != plain).any()


# Together.


def test_changes_are_made_in_the_order_written() -> None:
    first, second = derived("invert", "rotate=30"), derived("rotate=30", "invert")
    assert first.train.arrays[0, 0, 0, 0] == 0 and second.train.arrays[0, 0, 0, 0] == 255  # a corner
    assert first.fingerprint != second.fingerprint
    mixed = mnist("permute=3:invert:labels=0+1:noise=0.1")
    assert mixed.fingerprint == derived("permute=3", "invert", "labels=0+1", "noise=0.1", task=PLAIN).fingerprint


EVERY = ("labels=0-2", "group=0-2/3-5", "take=12", "shuffle_labels=1", "rotate=30", "blur=1", "invert", "noise=0.1",
         "permute=1")  # fmt: skip


def test_a_fingerprint_is_of_the_change_and_equal_for_equal_text() -> None:
    assert {change.partition("=")[0] for change in EVERY} == {form.partition("=")[0] for form in derive.FORMS}
    prints = {derived(change).fingerprint for change in EVERY} | {small().fingerprint}
    assert len(prints) == len(EVERY) + 1
    assert prints == {derived(change).fingerprint for change in EVERY} | {small().fingerprint}


@pytest.mark.parametrize("change", EVERY)
def test_what_is_changed_may_be_memory_mapped_and_stays_as_it_is(change: str, tmp_path: Path) -> None:
    name = write(tmp_path / "own.npz", COLOUR)
    plain = load(name, data_dir=tmp_path)
    assert not plain.train.arrays.flags.writeable
    task = load(f"{name}:{change}", data_dir=tmp_path)
    assert task.name == f"{name}:{change}" and task.fingerprint == derived(change, task=plain).fingerprint
    assert checks.fingerprint(plain.train, plain.test, plain.classes) == plain.fingerprint


def test_what_takes_seconds_is_kept_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.npz"
    first = load(f"{write(file, COLOUR)}:rotate=30:invert", data_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(derive, "_by_picture", None)
        again = load(f"{file}:rotate=30:invert", data_dir=tmp_path)
    assert isinstance(again.train.arrays, np.memmap) and not again.train.arrays.flags.writeable
    assert (again.name, again.note, again.fingerprint) == (first.name, first.note, first.fingerprint)
    assert load(f"{file}:invert:rotate=30", data_dir=tmp_path).fingerprint != first.fingerprint
    other = load(f"{write(file, 255 - COLOUR)}:rotate=30:invert", data_dir=tmp_path)
    assert other.fingerprint == load(f"{file}:rotate=30:invert", data_dir=tmp_path / "new").fingerprint
    assert other.fingerprint != first.fingerprint


def test_changes_come_after_the_options_of_the_data_set_and_after_the_shape(tmp_path: Path) -> None:
    assert derive.divide("cifar10:rotate=30:train=train[:80%]:invert:test=test") == (
        "cifar10:train=train[:80%]:test=test",
        ["rotate=30", "invert"],
    )
    assert derive.divide("folder:invert:invert") == ("folder:invert", ["invert"])
    assert derive.divide(" mnist_10k") == (" mnist_10k", [])
    name = write(tmp_path / "own.npz", COLOUR)
    grey = load(name, data_dir=tmp_path, image_shape=(9, 9, 1))
    shaped = load(f"{name}:rotate=30", data_dir=tmp_path, image_shape=(9, 9, 1))
    assert shaped.fingerprint == derived("rotate=30", task=grey).fingerprint


def test_features_may_be_permuted_and_their_labels_changed() -> None:
    task = small(COLOUR.astype(np.float32))
    got = derived("permute=5", "labels=0+1", "shuffle_labels=1", "take=10", task=task)
    assert got.train.arrays.dtype == np.float32 and got.train.arrays.shape == (10, 12, 12, 3)
    whole = derived("permute=5", task=task).test.arrays
    flat = small(COLOUR.reshape(90, -1).astype(np.float32))
    order = np.argsort(np.random.Philox(key=np.array([5, 4], np.uint64)).random_raw(432), kind="stable")
    np.testing.assert_array_equal(derived("permute=5", task=flat).test.arrays, flat.test.arrays[:, order])
    np.testing.assert_array_equal(whole.reshape(30, 432), flat.test.arrays[:, order])
    for change in ("rotate=30", "blur=1", "invert", "noise=0.1"):
        with pytest.raises(InputError, match=rf"option '{change.partition('=')[0]}' .*'small'.* features: drop it"):
            derived(change, task=flat)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("rotat=30", "has no option 'rotat'; nearest: 'rotate=30'"),
        ("invret", "has no option 'invret'; nearest: 'invert'"),
        ("rotate", "has no option 'rotate': write it as rotate=30"),
        ("invert=1", "has no option 'invert=1': write it as invert"),
        ("labels=", "not of the form name:option=value"),
        ("labels=0-4:labels=0+1", "gives option 'labels' twice"),
        ("labels=0+12", r"option 'labels=0\+12' of data set 'mnist_10k' names no class by '12'"),
        ("labels=0/1", "names no class by '0/1'"),
        ("labels=+", "names no class by ''"),
        ("labels=0+", "names no class by ''"),
        ("labels=4-0", "holds an empty range: write 0-4"),
        ("labels=0+1+0", "names class '0' twice"),
        ("labels=0-4+3", "names class '3' twice"),
        ("labels=3", "leaves one class"),
        ("group=0-9", "leaves one class"),
        ("group=0-4/5-8", "leaves out class '9'"),
        ("group=0-4/4-9", "names class '4' twice"),
        ("group=0-9/", "names no class by ''"),
        ("noise=-0.1", "option 'noise=-0.1' .* is no standard deviation"),
        ("noise=nan", "option 'noise' of data set 'mnist_10k' is float, not 'nan'"),
        ("noise=1e999", "is no standard deviation"),
        ("blur=-1", r"option 'blur=-1.0' .* is outside 0..28"),
        ("blur=29", r"is outside 0..28"),
        ("rotate=nan", "is float, not 'nan'"),
        ("rotate=1e999", "is no angle"),
        ("shuffle_labels=1.01", "option 'shuffle_labels=1.01' .* give 0 to 1"),
        ("shuffle_labels=-0.5", "give 0 to 1"),
        ("permute=1.5", "option 'permute' .* is int, not '1.5'"),
        ("permute=-1", "option 'permute=-1' .* not negative"),
        (f"permute={2**64}", "is no seed"),
        ("take=9", r"option 'take=9' .* is not 10 \(one a class\) to 10000"),
        ("take=10001", r"option 'take=10001'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_line(changes: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        mnist(changes)
    assert "\n" not in str(error.value) and "mnist_10k" in str(error.value)


def test_a_class_without_examples_is_refused() -> None:
    task = small()
    lacking = checks.checked("lacking", task.train, ArrayExamples(task.test.arrays[:2], task.test.targets[:2]), NAMES)
    with pytest.raises(InputError, match="made: test: is empty"):
        derived("labels=Coat+Bag", task=lacking)


# Through the program.


@pytest.mark.slow
def test_a_changed_data_set_may_be_source_and_target(tasks: Path, tmp_path: Path) -> None:
    source, target = f"{tasks / 'digits.npz'}:labels=0-2:permute=1", f"{tasks / 'digits.npz'}:labels=1+3:invert"
    flags = {"source": source, "target": target, "epochs": 1, "seeds": (0,), "strategies": ("full",)}
    transfer.main(["transfer", *command(tasks, tmp_path, **flags)])
    lines = results(tmp_path / "w")
    assert {(line.source, line.target) for line in lines} == {(None, source), (source, target)}


@pytest.mark.slow
def test_the_program_goes_by_the_changed_classes(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the dry run says of the head: copied for the classes of the source alone."""
    flags = {"source": f"{tasks / 'digits.npz'}:labels=0-2:permute=1", "strategies": ("full",)}
    for labels, copied in (("2+0", False), ("0-2", True)):
        target = f"{tasks / 'digits.npz'}:labels={labels}:invert"
        transfer.main(["transfer", "--dry_run", *command(tasks, tmp_path, **flags, target=target)])
        output = capsys.readouterr().out
        assert bool(re.search(r"head/kernel +head/kernel +copied", output)) == copied
        assert f"of {323 if copied else 314} numbers train" in output  # 36x8 + 8, and 9 a class
    with pytest.raises(InputError, match="names no class by '4'"):
        transfer.main(["transfer", *command(tasks, tmp_path, **flags, target=f"{tasks / 'same.npz'}:labels=4")])


def test_the_help_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    transfer.main(["transfer", "--help"])
    assert "mnist_10k:rotate=30" in capsys.readouterr().out
