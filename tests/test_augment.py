"""Augmentations against NumPy written from their definitions; draws that do not depend on devices and padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tljax import augment
from tljax.types import Batch, InputError

RNG = np.random.default_rng(0)
COUNT, SIDE = 600, 8
PIXELS = RNG.integers(1, 256, (COUNT, SIDE, SIDE, 3)).astype(np.uint8)
FLOATS = RNG.normal(size=(COUNT, SIDE, SIDE, 3)).astype(np.float32)
LABELS = RNG.integers(0, 4, COUNT).astype(np.int32)
SPEC, LABEL = jax.ShapeDtypeStruct((SIDE, SIDE, 3), np.uint8), jax.ShapeDtypeStruct((), np.int32)
BOTH = pytest.mark.parametrize("images", [PIXELS, FLOATS], ids=["uint8", "float32"])


def augmented(text, inputs, targets=LABELS, weight=None, seed=0, classes=4):
    weight = np.ones(len(targets), np.float32) if weight is None else weight
    batch = Batch(*map(jnp.asarray, (inputs, targets, weight)))
    # Not compiled as one: then nothing is joined, and float32 values can be held against NumPy's to the bit.
    return jax.tree.map(np.asarray, augment.apply(augment.read(text, classes), jax.random.key(seed), batch))


@BOTH
@pytest.mark.parametrize(("mode", "in_numpy"), [("zero", "constant"), ("reflect", "reflect")])
def test_a_crop_is_any_window_of_the_padded_image_as_likely(images, mode, in_numpy):
    got = augmented(f"crop:pad=2:mode={mode}", images).inputs
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode=in_numpy)
    places = list(itertools.product(range(5), repeat=2))
    windows = np.stack([padded[:, top : top + SIDE, left : left + SIDE] for top, left in places])
    is_window = (windows == got).all((2, 3, 4))
    assert got.dtype == images.dtype and (is_window.sum(0) == 1).all()
    assert scipy.stats.chisquare(is_window.sum(1)).pvalue > 0.001


@BOTH
def test_a_flip_mirrors_left_to_right_half_of_the_images(images):
    got = augmented("flip", images).inputs
    flipped = (got == images[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (got == images).all((1, 2, 3))).all() and got.dtype == images.dtype
    assert scipy.stats.binomtest(int(flipped.sum()), COUNT, 0.5).pvalue > 0.001
    assert augmented("flip:rate=1", images).inputs.tolist() == images[:, :, ::-1].tolist()
    assert augmented("flip:rate=0", images).inputs.tolist() == images.tolist()


@BOTH
def test_erasing_makes_a_rectangle_black_of_an_area_and_a_form_within_bounds(images):
    got = augmented("erase:rate=0.7:least=0.1:most=0.3:aspect=0.5", images).inputs
    black = (got != images).any(-1)
    assert (got[black] == 0).all() and (got[~black] == images[~black]).all() and got.dtype == images.dtype
    rows, columns = black.any(2), black.any(1)
    assert (black == rows[:, :, None] & columns[:, None, :]).all()  # an outer product
    for lines in (rows, columns):  # without a gap
        assert (np.abs(np.diff(lines.astype(int), axis=1, prepend=0, append=0)).sum(1) <= 2).all()
    tall, wide = rows.sum(1), columns.sum(1)
    assert scipy.stats.binomtest(int((tall > 0).sum()), COUNT, 0.7).pvalue > 0.001
    # sqrt(area ratio) and sqrt(area / ratio), to the nearest pixel
    for side in (tall[tall > 0], wide[wide > 0]):
        assert side.min() >= np.floor(np.sqrt(0.1 * 64 * 0.5)) and side.max() <= np.ceil(np.sqrt(0.3 * 64 / 0.5))
        assert len(set(side)) > 2
    # E[area] = (0.1 + 0.3) / 2, but for rounding of sides
    assert abs((tall * wide)[tall > 0].mean() / 64 - 0.2) < 0.02


def test_jitter_changes_brightness_and_contrast_by_uniform_factors():
    got = augmented("jitter:brightness=0.4:contrast=0.2", FLOATS).inputs.astype(np.float64)
    x = FLOATS.astype(np.float64)
    axes = (1, 2, 3)
    centred, mean = x - x.mean(axes, keepdims=True), x.mean(axes)
    # y = b m + c b (x - m): the least squares slope is c b, the mean b m
    slope = (got * centred).sum(axes) / (centred**2).sum(axes)
    brightness = got.mean(axes) / mean
    np.testing.assert_allclose(
        got, (brightness * mean)[:, None, None, None] + slope[:, None, None, None] * centred, atol=1e-5
    )
    assert scipy.stats.kstest(brightness, scipy.stats.uniform(0.6, 0.8).cdf).pvalue > 0.001
    assert scipy.stats.kstest(slope / brightness, scipy.stats.uniform(0.8, 0.4).cdf).pvalue > 0.001


def test_jitter_of_pixels_is_that_of_floats_rounded_and_cut():
    text = "jitter:brightness=0.9:contrast=0.9"
    of_floats = augmented(text, PIXELS.astype(np.float32)).inputs
    got = augmented(text, PIXELS).inputs
    assert got.dtype == np.uint8 and (of_floats > 256).any() and (of_floats < 0).any()
    assert got.tolist() == np.clip(np.round(of_floats), 0, 255).astype(np.uint8).tolist()


def mixture(text, images, weight=None, targets=LABELS):
    """(share of its own, partner) of each row, read from what mixing gives of one-hot rows."""
    count = len(targets)
    identity = np.eye(count, dtype=np.float32)
    batch = augmented(text, images, identity, weight)
    shares = batch.targets[np.arange(count), np.arange(count)]
    partners = np.where(shares > 1 - 1e-6, np.arange(count), (batch.targets - np.diag(shares)).argmax(1))
    return shares, partners


@pytest.mark.parametrize(
    "targets", [LABELS, LABELS[:, None] > np.arange(3), FLOATS[:, 0, 0]], ids=["classes", "labels", "values"]
)
def test_mixup_is_the_convex_combination_of_inputs_and_targets(targets):
    shares, partners = mixture("mixup:alpha=1", FLOATS)
    share = np.median(shares)
    assert sorted(partners) == list(range(COUNT)) and 0.01 < share < 0.99 and (partners != np.arange(COUNT)).sum() > 590
    got = augmented("mixup:alpha=1", FLOATS, targets)
    floats = np.eye(4)[LABELS] if targets is LABELS else targets.astype(np.float64)
    for mixed, whole in ((got.inputs, FLOATS.astype(np.float64)), (got.targets, floats)):
        np.testing.assert_allclose(mixed, share * whole + (1 - share) * whole[partners], atol=1e-6)
    pixels = augmented("mixup:alpha=1", PIXELS, targets).inputs
    closed = share * PIXELS.astype(np.float64) + (1 - share) * PIXELS[partners]
    assert pixels.dtype == np.uint8 and np.abs(pixels - closed).max() < 0.5 + 1e-4


def test_the_loss_under_mixup_is_the_mixture_of_losses():
    """l CE(y_i) + (1 - l) CE(y_j), the form of the paper's figure 1, with smoothing too."""
    from tljax import objective

    shares, partners = mixture("mixup:alpha=1", FLOATS)
    share = np.median(shares)
    logits = RNG.normal(size=(COUNT, 4))
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    soft = augmented("mixup:alpha=1", FLOATS).targets
    loss = objective.loss("softmax_cross_entropy")
    for smoothing in (0.0, 0.1):
        one_hot = np.eye(4) * (1 - smoothing) + smoothing / 4
        closed = -(share * one_hot[LABELS] + (1 - share) * one_hot[LABELS[partners]]) * log_probabilities
        got = loss(jnp.asarray(logits), jnp.asarray(soft), smoothing)
        np.testing.assert_allclose(got, closed.sum(1), rtol=1e-5)


def test_the_share_of_mixup_is_of_the_beta_distribution():
    augmentation = augment.read("mixup:alpha=0.4")
    batch = Batch(jnp.zeros((2, 1)), jnp.eye(2), jnp.ones(2))
    mixed = jax.vmap(lambda key: augment.apply(augmentation, key, batch).targets)(
        jax.random.split(jax.random.key(1), 500)
    )
    alone = np.asarray(mixed[:, 0, 0] == 1) & np.asarray(mixed[:, 1, 1] == 1)  # each is its own partner in half of them
    assert scipy.stats.binomtest(int(alone.sum()), 500, 0.5).pvalue > 0.001
    shares = np.asarray(mixed[~alone, 0, 0])
    assert scipy.stats.kstest(shares, scipy.stats.beta(0.4, 0.4).cdf).pvalue > 0.001


@BOTH
def test_cutmix_replaces_a_rectangle_and_mixes_targets_by_its_area(images):
    areas = []
    for seed in range(12):
        got = augmented("cutmix", images[:50], np.eye(50, dtype=np.float32), seed=seed)
        shares = np.diag(got.targets)
        others = got.targets - np.diag(shares)
        moved = others.max(1) > 0
        partners = np.where(moved, others.argmax(1), np.arange(50))
        assert sorted(partners) == list(range(50))
        from_partner = (got.inputs == images[partners]).all(-1) & ~(got.inputs == images[:50]).all(-1)
        inside = from_partner[moved].any(0)
        assert (inside == inside.any(1)[:, None] & inside.any(0)[None, :]).all()
        assert (got.inputs == np.where(inside[None, :, :, None], images[partners], images[:50])).all()
        np.testing.assert_allclose(shares[moved], 1 - inside.mean(), atol=1e-6)
        np.testing.assert_allclose(got.targets.sum(1), 1, atol=1e-6)
        areas.append(inside.mean())
    assert max(areas) > 0.4 and min(areas) < 0.2


@pytest.mark.parametrize("text", ["mixup", "cutmix"])
def test_padding_is_no_partner_and_changes_nothing_of_what_is_mixed(text):
    images, labels = FLOATS[:13], LABELS[:13]
    whole = augmented(text, images, labels)
    fill = np.full((3, SIDE, SIDE, 3), 1e6, np.float32)
    weight = np.array([1.0] * 13 + [0.0] * 3, np.float32)
    padded = augmented(
        text, np.concatenate([images, fill]), np.concatenate([labels, [3, 3, 3]]).astype(np.int32), weight
    )
    np.testing.assert_array_equal(padded.inputs[:13], whole.inputs)
    np.testing.assert_array_equal(padded.targets[:13], whole.targets)
    assert padded.weight.tolist() == weight.tolist()


@pytest.mark.parametrize("text", ["crop:pad=2", "flip", "erase", "jitter:brightness=0.5:contrast=0.5"])
def test_an_example_is_changed_by_the_key_and_its_place_alone(text):
    whole = augmented(text, PIXELS).inputs
    np.testing.assert_array_equal(augmented(text, PIXELS[:13], LABELS[:13]).inputs, whole[:13])
    assert (augmented(text, PIXELS, seed=1).inputs != whole).any()
    same = augmented(text, np.repeat(PIXELS[:1], 50, 0), LABELS[:50]).inputs
    assert len({row.tobytes() for row in same}) > 1  # places differ


def test_several_are_applied_in_their_order_and_draw_from_keys_of_their_own():
    both = augmented("flip,flip", FLOATS).inputs
    flipped = (both == FLOATS[:, :, ::-1]).all((1, 2, 3))
    assert scipy.stats.binomtest(int(flipped.sum()), COUNT, 0.5).pvalue > 0.001  # with one key for both it is 0
    first, second = (
        augmented("flip:rate=1,crop:pad=3", PIXELS).inputs,
        augmented("crop:pad=3,flip:rate=1", PIXELS).inputs,
    )
    assert (first != second).any()


OWN = """
import jax
import jax.numpy as jnp
from tljax.augment import by_example, mixes


@by_example
def noise(key, example, *, size=0.1):
    return example._replace(inputs=example.inputs + size * jax.random.normal(key, example.inputs.shape))


def shift(key, batch, *, by: int):
    return batch._replace(inputs=jnp.roll(batch.inputs, by, axis=1))


def to_float(key, batch):
    return batch._replace(inputs=batch.inputs / 255)


def smaller(key, batch):
    return batch._replace(inputs=batch.inputs[:, 1:])


def inputs_alone(key, batch):
    return batch.inputs


def nothing(key, batch):
    pass


@by_example
def fails(key, example):
    return example.inputs.pixels


def weighs_padding(key, batch):
    return batch._replace(weight=jnp.ones_like(batch.weight))


augment = shift
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


def test_those_of_a_file_are_as_good_as_those_of_tljax(own):
    assert augmented(f"{own}:augment:by=2", FLOATS).inputs.tolist() == np.roll(FLOATS, 2, 1).tolist()
    noise = augmented(f"{own}:noise:size=0.5", FLOATS).inputs - FLOATS
    assert abs(noise.std() - 0.5) < 0.01 and np.unique(noise.round(5)).size > 1000
    assert augment.read(f"{own}:shift:by=2")[0] is augment.read(f"{own}:shift:by=2")[0]
    [digest] = augment.digests(f"flip,{own}:shift:by=2")
    with open(own, "a") as file:
        file.write("\n# edited\n")
    assert augment.digests(f"{own}:shift:by=2") != [digest]


def test_padding_stays_padding(own):
    weight = np.array([1, 1, 0], np.float32)
    assert augmented(f"{own}:weighs_padding", FLOATS[:3], LABELS[:3], weight).weight.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crpo", "unknown augmentation 'crpo'; nearest: 'crop'"),
        ("crop:pda=3", "has no option 'pda'; nearest: 'pad'"),
        ("crop:pad=0", "crop:pad=0: give at least 1"),
        ("crop:pad=8:mode=reflect", "give at least 1 and below 8, the image's side"),
        ("crop:mode=wrap", "crop:mode=wrap"),
        ("flip:rate=2", "flip:rate=2.0: it must be from 0 to 1"),
        ("erase:least=0.5", "erase:least=0.5 is above most=0.4"),
        ("erase:aspect=0", "erase:aspect=0.0: give one above 0"),
        ("jitter", "jitter changes nothing"),
        ("mixup:alpha=0", "mixup:alpha=0.0: it must be above 0"),
        ("OWN:shift", "needs option 'by'"),
        ("OWN:to_float", r"makes of the inputs uint8\[2, 8, 8, 3\] float32\[2, 8, 8, 3\]: keep shapes and dtypes"),
        ("OWN:smaller", r"makes of the inputs uint8\[2, 8, 8, 3\] uint8\[2, 7, 8, 3\]: keep shapes and dtypes"),
        ("OWN:inputs_alone", "gives .*: return batch._replace"),
        ("OWN:nothing", "gives None: return batch._replace"),
        ("OWN:fails", r"fails: AttributeError: .*pixels.* \(.*own.py:34\)"),
        ("OWN:absent", "has no function 'absent'"),
        ("nowhere.py:augment", "augment file 'nowhere.py' does not exist"),
    ],
)
def test_those_that_cannot_be_are_refused_in_a_line(text, message, own):
    with pytest.raises(InputError, match=message) as error:
        augment.check(augment.read(text.replace("OWN", own)), SPEC, LABEL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [text for text in augment.SHIPPED if text not in ("mixup", "jitter")] + ["jitter:contrast=0.1"]
)
def test_those_of_images_refuse_features(text):
    with pytest.raises(
        InputError, match=r"is for images \[height, width, channels\], and the inputs are float32\[20\]"
    ):
        augment.check(augment.read(text), jax.ShapeDtypeStruct((20,), np.float32), LABEL)


def test_mixup_refuses_tokens():
    tokens = jax.ShapeDtypeStruct((20,), np.int32)
    with pytest.raises(InputError, match=r"mixup mixes pixels and floats, not int32\[20\]: leave it out"):
        augment.check(augment.read("mixup"), tokens, tokens)
