"""Augmentations against NumPy written from their definitions; draws that do not depend on devices and padding."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tljax import augment, evaluate, masks, models, objective, optimizers, train
from tljax.data import draw
from tljax.train import features
from tljax.train import step as step_room
from tljax.types import ArrayExamples, Batch, InputError

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
def plugin_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


def test_those_of_a_file_are_as_good_as_those_of_tljax(plugin_file):
    assert augmented(f"{plugin_file}:augment:by=2", FLOATS).inputs.tolist() == np.roll(FLOATS, 2, 1).tolist()
    noise = augmented(f"{plugin_file}:noise:size=0.5", FLOATS).inputs - FLOATS
    assert abs(noise.std() - 0.5) < 0.01 and np.unique(noise.round(5)).size > 1000
    assert augment.read(f"{plugin_file}:shift:by=2")[0] is augment.read(f"{plugin_file}:shift:by=2")[0]
    [digest] = augment.digests(f"flip,{plugin_file}:shift:by=2")
    with open(plugin_file, "a") as file:
        file.write("\n# edited\n")
    assert augment.digests(f"{plugin_file}:shift:by=2") != [digest]


def test_padding_stays_padding(plugin_file):
    weight = np.array([1, 1, 0], np.float32)
    assert augmented(f"{plugin_file}:weighs_padding", FLOATS[:3], LABELS[:3], weight).weight.tolist() == [1, 1, 0]


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
        ("OWN:zzz", "has no function 'zzz'; known: augment, fails, inputs_alone, "),
        ("nowhere.py:augment", "augment file 'nowhere.py' does not exist"),
    ],
)
def test_those_that_cannot_be_are_refused_in_a_line(text, message, plugin_file):
    with pytest.raises(InputError, match=message) as error:
        augment.check(augment.read(text.replace("OWN", plugin_file)), SPEC, LABEL)
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


# ---- In training

EIGHT = PIXELS[:, :, :, :1]
MODEL = models.build("mlp", 4, hidden=(16,), activation="relu")
DATA = train.load(EIGHT, LABELS)
STEPS, BATCH = 30, 13
OPTIMIZER, NUMBERS = optimizers.spec("sgd", momentum=0.9)
DEVICES = tuple(jax.devices())


def spec_of(text, model=MODEL):
    return train.Spec(
        model, objective.loss("softmax_cross_entropy"), OPTIMIZER, augment=augment.read(text, 4), smooth_labels=True
    )


def fit_of(seed=0, head_only=False, model=MODEL, rate=0.05, batch=BATCH, shares=None):
    params = models.init(model, jax.random.key(seed), (SIDE, SIDE, 1))
    mask = masks.under(params, "head") if head_only else masks.by_path(params, lambda path: True)
    order = functools.partial(draw.order, seed, COUNT, batch, epochs=True)
    numbers = {**NUMBERS, "label_smoothing": 0.1}
    rates = np.full(STEPS, rate, np.float32)
    return train.Fit(params, ((0, mask),), order, rates, (), numbers, jax.random.key(seed), shares=shares)


def trained(spec, fits, execution=None, ends=(STEPS,), states=(), examples=DATA):
    """{number of the fit: its parameters and its losses} at the end."""
    of_fits = {}
    for state, log in train.fit(spec, fits, examples, ends, states, execution):
        for row, i in enumerate(state.fits):
            params = jax.device_get(state.params_and_state(row)[0])
            of_fits[i] = (params, np.asarray(log.loss)[row])
    return of_fits


def plain_loop(text, steps):
    """The same fit by a loop over jax.grad, with augmentations called as their definition says: one example after
    another, with its key, and no padding."""
    fit, augmentations = fit_of(), augment.read(text, 4)
    params, velocity = fit.params, jax.tree.map(jnp.zeros_like, fit.params)

    def loss(params, x, targets):
        x = x.reshape(len(x), -1) / 255
        hidden = jax.nn.relu(x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"][None])
        logits = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    losses = []
    for step, rows in enumerate(fit.order(0, steps)):
        rows = rows[rows >= 0]
        key = jax.random.fold_in(jax.random.fold_in(fit.key, step), step_room._AUGMENT)
        batch = Batch(jnp.asarray(EIGHT[rows]), jnp.asarray(LABELS[rows]), jnp.ones(len(rows)))
        for number, augmentation in enumerate(augmentations):
            key_of_one, options = jax.random.fold_in(key, number), dict(augmentation.options)
            if augmentation.example:
                changed = [
                    augmentation.example(
                        jax.random.fold_in(key_of_one, i), jax.tree.map(lambda leaf, i=i: leaf[i], batch), **options
                    )
                    for i in range(len(rows))
                ]
                batch = batch._replace(inputs=jnp.stack([example.inputs for example in changed]))
            else:
                one_hot = jnp.eye(4)[batch.targets] if batch.targets.ndim == 1 else batch.targets
                batch = augmentation.function(key_of_one, batch._replace(targets=one_hot), **options)
        targets = jnp.eye(4)[batch.targets] if batch.targets.ndim == 1 else batch.targets
        targets = 0.9 * targets + 0.1 / 4
        value, gradients = jax.value_and_grad(loss)(params, batch.inputs.astype(jnp.float32), targets)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradients)
        params = jax.tree.map(lambda w, v: w - 0.05 * v, params, velocity)
        losses.append(float(value))
    return params, np.array(losses)


def assert_near(got, expected, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), got, expected)


@pytest.mark.parametrize("text", ["crop:pad=2,flip", pytest.param("flip,mixup:alpha=1", marks=pytest.mark.slow)])
def test_an_augmented_fit_is_that_of_a_plain_loop(text):
    params, losses = plain_loop(text, 5)
    fit = fit_of()
    fit = fit._replace(rates=fit.rates[:5])
    got, got_losses = trained(spec_of(text), [fit], ends=(5,))[0]
    assert_near(got_losses, losses)
    assert_near(got, params)
    without, _ = trained(spec_of(""), [fit], ends=(5,))[0]
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(got), strict=True)) > 0.01


HOW = {
    "jit data:8": train.Execution(DEVICES, 8),
    "jit data:4, trial:2": train.Execution(DEVICES, 4),
    "pmap": train.Execution(DEVICES, 8, "pmap"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("pmap", "crop:pad=2,flip"),
        pytest.param("jit data:8", "crop:pad=2,cutmix", marks=pytest.mark.slow),
        *(
            pytest.param(how, text, marks=pytest.mark.slow)
            for how, text in (
                ("jit data:4, trial:2", "jitter:contrast=0.5,mixup"),
                ("pmap", "flip,mixup:alpha=1"),
            )
        ),
    ],
)
@pytest.mark.devices(8)
def test_devices_that_share_padded_batches_see_what_one_device_sees(how, text):
    """Thirteen examples, and two in the last batch of an epoch, on eight devices."""
    single = trained(spec_of(text), [fit_of(0), fit_of(1)])
    many = trained(spec_of(text), [fit_of(0), fit_of(1)], HOW[how])
    for i in (0, 1):
        assert_near(many[i], single[i], 2e-5)


@pytest.mark.slow
def test_a_fit_has_the_same_bits_alone_beside_others_and_taken_up_from_the_middle():
    spec = spec_of("crop:pad=2,flip")
    group = [fit_of(0), fit_of(0, rate=0.01), fit_of(1)]
    together, [alone] = trained(spec, group), trained(spec, group[:1]).values()
    assert jax.tree.map(np.ndarray.tolist, together[0]) == jax.tree.map(np.ndarray.tolist, alone)
    for state, _ in train.fit(spec, group[:1], DATA, [17, STEPS]):
        halfway = jax.device_get(state)
        break
    (params, losses), whole = trained(spec, group[:1], ends=(17, STEPS), states=[halfway])[0], alone
    assert jax.tree.map(np.ndarray.tolist, params) == jax.tree.map(np.ndarray.tolist, whole[0])
    assert losses.tolist() == whole[1][17:].tolist()


@pytest.mark.slow
def test_fits_of_one_seed_are_augmented_alike_and_those_side_by_side_as_well():
    """Under a rate of 0 the losses of steps are those of one network on what it sees."""
    spec, seen = spec_of("crop:pad=2,flip,erase"), {}
    fits = [fit_of(0, rate=0.0, shares=0), fit_of(0, rate=0.0, shares=0)]
    for many in ("map", "auto", "vmap"):
        seen[many] = [losses for _, losses in trained(spec, fits, train.Execution(many=many)).values()]
    for losses in itertools.chain(*seen.values()):
        np.testing.assert_allclose(losses, seen["map"][0], rtol=1e-6)
    [(_, other)] = trained(spec, [fit_of(0, rate=0.0)._replace(key=jax.random.key(9))]).values()
    assert np.abs(other - seen["map"][0]).max() > 0.01


@pytest.mark.slow
def test_microbatches_and_streams_see_what_the_whole_batch_on_the_device_sees():
    text, fit = "crop:pad=2,flip", fit_of(batch=12)
    whole = trained(spec_of(text), [fit])[0]
    assert_near(trained(replace(spec_of(text), microbatch=4), [fit])[0], whole)
    stream = train.Stream(ArrayExamples(EIGHT, LABELS))
    streamed = trained(spec_of(text), [fit], examples=stream)[0]
    assert jax.tree.map(np.ndarray.tolist, streamed) == jax.tree.map(np.ndarray.tolist, whole)
    messages, cache = [], train.FeatureCache(10**8, views=2)
    execution = train.Execution(cache=cache, on_message=messages.append)
    trained(spec_of(text), [fit_of(head_only=True, batch=40)], execution, examples=stream)
    assert (
        messages == ["hidden_0 is frozen, and computed in every step, since inputs are augmented"] and not cache.arrays
    )


@pytest.mark.slow
def test_evaluation_sees_images_as_they_are():
    spec, fits = spec_of("flip:rate=1,crop:pad=3"), [fit_of(head_only=True, batch=40)]
    for cache in (None, train.FeatureCache(10**8), train.FeatureCache(10**8, views=1)):
        execution = train.Execution(cache=cache)
        for state, _ in train.fit(spec, fits, DATA, [STEPS], execution=execution):
            got = evaluate.logits_of(spec, fits, state, evaluate.padded(EIGHT), COUNT, execution)()
        expected = models.apply(MODEL, jax.tree.map(lambda leaf: leaf[0], state.params), jnp.asarray(EIGHT))
        np.testing.assert_allclose(got[0], expected, atol=1e-5)
        assert cache is None or len(cache.arrays) == 1 + cache.views  # of the test images, and of the views


# ---- On features of a frozen prefix


def test_by_default_a_frozen_prefix_is_computed_in_every_step():
    messages, spec = [], spec_of("crop:pad=2,flip")
    cache = train.FeatureCache(10**8)
    execution = train.Execution(cache=cache, on_message=messages.append)
    assert_near(trained(spec, [fit_of(head_only=True)], execution), trained(spec, [fit_of(head_only=True)]))
    assert (
        messages == ["hidden_0 is frozen, and computed in every step, since inputs are augmented"] and not cache.arrays
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [None, *(pytest.param(how, marks=[pytest.mark.slow, pytest.mark.devices(8)]) for how in ("jit data:8", "pmap"))],
)
def test_features_of_views_give_what_the_prefix_gives_of_the_same_views(how):
    """30 steps of 40 are two passes and so enough for two views; a loop without a cache augments each example with the
    key of its view, and draws the view that the step draws."""
    messages, views, fit = [], 2, fit_of(head_only=True, batch=40)
    cache = train.FeatureCache(10**8, views=views)
    execution = replace(HOW[how] if how else train.Execution(), cache=cache, on_message=messages.append)
    got, losses = trained(spec_of("crop:pad=2,flip"), [fit], execution)[0]
    assert messages == ["hidden_0 is frozen: features of 2 augmented views of 600 examples are computed once, 0 MB"]
    [kept] = cache.arrays.values()
    assert kept.shape == (1, COUNT, views, 16)

    augmentations, images = augment.read("crop:pad=2,flip"), []
    for view in range(views):
        batch = Batch(jnp.asarray(EIGHT), jnp.asarray(LABELS), jnp.ones(COUNT))
        images.append(augment.apply(augmentations, features.view_key(fit.key, view), batch).inputs)
    images = np.stack(images, 1)
    params, velocity = fit.params, jax.tree.map(jnp.zeros_like, fit.params["head"])
    assert len({image.tobytes() for image in images.reshape(-1, SIDE, SIDE)}) > 1.9 * COUNT

    def loss(head, x, targets):
        logits = models.apply(MODEL, {**params, "head": head}, x)
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    head, expected, drawn = params["head"], [], []
    for step, rows in enumerate(fit.order(0, STEPS)):
        key = jax.random.fold_in(jax.random.fold_in(fit.key, step), step_room._AUGMENT)
        chosen = [int(jax.random.randint(jax.random.fold_in(key, i), (), 0, views)) for i in range(len(rows))]
        drawn += chosen
        targets = 0.9 * jnp.eye(4)[LABELS[rows]] + 0.1 / 4
        value, gradient = jax.value_and_grad(loss)(head, jnp.asarray(images[rows, chosen]), targets)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        head = jax.tree.map(lambda w, v: w - 0.05 * v, head, velocity)
        expected.append(float(value))
    assert_near(losses, np.array(expected))
    assert_near(got["head"], head)
    assert scipy.stats.binomtest(sum(drawn), len(drawn), 0.5).pvalue > 0.001


@pytest.mark.slow
def test_each_seed_has_views_of_its_own_and_strategies_of_one_seed_share_them():
    cache = train.FeatureCache(10**8, views=2)
    execution = train.Execution(cache=cache)
    params = fit_of(0).params
    fits = [fit_of(seed, head_only=True, batch=40)._replace(params=params) for seed in (0, 1)]
    trained(spec_of("flip"), fits, execution)
    [both] = cache.arrays.values()
    assert both.shape[0] == 2 and (both[0] != both[1]).any()
    trained(spec_of("flip"), [fits[0], fits[0]._replace(rates=fits[0].rates * 2)], execution)
    assert len(cache.arrays) == 2 and [*cache.arrays.values()][1].shape[0] == 1
    np.testing.assert_allclose([*cache.arrays.values()][1][0], both[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "budget", "message"),
    [
        (25, 10**8, "hidden_0 is frozen, and computed in every step, since fewer examples pass than views do"),
        (40, 100, "hidden_0 is frozen: features of 2 augmented views of 600 examples are 0 MB and the budget 0 MB, so"),
    ],
)
def test_views_that_are_not_worth_it_or_too_large_are_not_computed(batch, budget, message):
    messages, fit = [], fit_of(head_only=True, batch=batch)
    cache = train.FeatureCache(budget, views=2)
    got = trained(spec_of("flip"), [fit], train.Execution(cache=cache, on_message=messages.append))
    assert messages[0].startswith(message) and not cache.arrays
    assert_near(got, trained(spec_of("flip"), [fit]))


def test_views_are_kept_of_augmentations_of_inputs_of_one_example(plugin_file, tmp_path):
    augment.require_views(
        augment.read(f"crop,flip,erase,{plugin_file}:noise"), jax.ShapeDtypeStruct((8, 8, 3), np.float32), LABEL
    )
    with pytest.raises(InputError, match="views are of examples, and 'mixup' changes whole batches"):
        augment.require_views(augment.read("flip,mixup"), SPEC, LABEL)
    (tmp_path / "labels.py").write_text(
        "from tljax.augment import by_example\n\n"
        "@by_example\ndef augment(key, example):\n    return example._replace(targets=example.targets * 0)\n"
    )
    with pytest.raises(InputError, match=r"views are of inputs, and .* changes targets"):
        augment.require_views(augment.read(f"{tmp_path}/labels.py:augment"), SPEC, LABEL)


@pytest.mark.slow
def test_numbers_that_cannot_be_trained_on_are_refused_on_a_batch(tmp_path):
    (tmp_path / "odd.py").write_text(
        "import jax.numpy as jnp\n\nfrom tljax.augment import mixes\n\n\n"
        "def same(key, batch):\n    return batch\n\n\n"
        "def nans(key, batch):\n    return batch._replace(inputs=batch.inputs / 0)\n\n\n"
        "@mixes\ndef doubled(key, batch):\n    return batch._replace(targets=2 * batch.targets)\n"
    )
    batch = Batch(jnp.asarray(FLOATS[:4]), jnp.arange(4), jnp.ones(4))
    for name, message in (
        ("nans", "makes an input (nan|-?inf): keep"),
        ("doubled", "makes a target 2: keep .* 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            augment.try_on(augment.read(f"{tmp_path}/odd.py:{name}", 4), batch, 4)
    augment.try_on(augment.read(f"flip,mixup,{tmp_path}/odd.py:same", 4), batch, 4)
    assert augment.read("none") == () and augment.resolved("none", SPEC) == ""
