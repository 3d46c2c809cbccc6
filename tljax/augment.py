"""Augmentations: random changes of a batch between its fetch and the model, in training alone. They are plug-ins.

An augmentation is a function `(key, batch) -> Batch` with its options as keyword arguments. It gets the whole batch of
a step, whatever devices share it, and keeps shapes and dtypes. Most change each example by itself; `by_example` makes
an augmentation of a function of one example, which draws from the step's key and the example's place in the batch:

    @by_example
    def augment(key, example, *, size=0.1):  # example.inputs [height, width, channels]
        noise = size * jax.random.normal(key, example.inputs.shape)
        return example._replace(inputs=example.inputs + noise)

Saved as mine.py it is 'mine.py:augment:size=0.2'. What mixes the targets of examples is marked by `mixes`, and gets
classes as one-hot floats. Batches of one seed are augmented alike whatever is trained on them, so comparisons of
strategies stay paired.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from tljax import paths, plugins
from tljax.types import Batch, InputError

Function = Callable[..., Batch]
"""(key, batch, **options) -> Batch of the same shapes and dtypes."""


def by_example(function: Function) -> Function:
    """A decorator that makes an augmentation of batches of a function of one example, `(key, example) -> Batch`.

    The example is a `Batch` whose leaves have no axis of the batch. Its key follows from the batch's and from its place
    in it.

    >>> halved = by_example(lambda key, example: example._replace(inputs=example.inputs / 2))
    >>> halved(jax.random.key(0), Batch(jnp.ones((2, 3)), jnp.zeros(2), jnp.ones(2))).inputs.shape
    (2, 3)
    """

    @functools.wraps(function)
    def augment_batch(key: jax.Array, batch: Batch, **options: Any) -> Batch:
        return _each(function, key, batch, jnp.arange(len(batch.weight)), options)

    augment_batch.example = function  # type: ignore[attr-defined]
    return augment_batch


def mixes(function: Function) -> Function:
    """A decorator that says that an augmentation mixes the targets of examples: classes come to it as one-hot floats
    [batch, classes], several labels as floats."""
    function.mixes = True  # type: ignore[attr-defined]
    return function


def _each(function: Function, key: jax.Array, batch: Batch, places: jax.Array, options: Mapping[str, Any]) -> Batch:
    """Each example of a batch changed by a function of one, which draws from the key and the example's place."""
    return jax.vmap(functools.partial(function, **options))(_keys(key, places), batch)


def _keys(key: jax.Array, places: jax.Array) -> jax.Array:
    """A key for each place (int [n])."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(places)


# ---- Those of tljax


@by_example
def crop(key: jax.Array, example: Batch, *, pad: int = 4, mode: str = "zero") -> Batch:
    """A random part, as large as the image, of the image with `pad` pixels more on each side.

    They are black, or with `mode` 'reflect' mirror the image. All places are as likely. Source: He et al. 2016, "Deep
    residual learning for image recognition", arXiv:1512.03385, section 4.2.
    """
    image = _image(example, "crop")
    modes = {"zero": "constant", "reflect": "reflect"}
    if mode not in modes:
        raise InputError(f"crop:mode={mode}{plugins.nearest(mode, modes)}")
    if pad < 1 or (mode == "reflect" and pad >= min(image.shape[:2])):
        most = f" and below {min(image.shape[:2])}, the image's side" if mode == "reflect" else ""
        raise InputError(f"crop:pad={pad}: give at least 1{most}")
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=modes[mode])
    top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return example._replace(inputs=jax.lax.dynamic_slice(padded, (top, left, 0), image.shape))


@by_example
def flip(key: jax.Array, example: Batch, *, rate: float = 0.5) -> Batch:
    """The image mirrored left to right, with probability `rate`."""
    image = _image(example, "flip")
    _fraction("flip", "rate", rate)
    return example._replace(inputs=jnp.where(jax.random.bernoulli(key, rate), image[:, ::-1], image))


@by_example
def erase(
    key: jax.Array, example: Batch, *, rate: float = 0.5, least: float = 0.02, most: float = 0.4, aspect: float = 0.3
) -> Batch:
    """A random rectangle made black, with probability `rate`.

    Its area is uniform from `least` to `most` of the image, height by width uniform from `aspect` to 1 / `aspect`; a
    side longer than the image's is cut to that. Source: Zhong et al. 2017, "Random erasing data augmentation",
    arXiv:1708.04896, algorithm 1, which draws again where we cut.
    """
    image = _image(example, "erase")
    for name, value in (("rate", rate), ("least", least), ("most", most)):
        _fraction("erase", name, value)
    if least > most:
        raise InputError(f"erase:least={least} is above most={most}: give a smaller one")
    if not 0 < aspect <= 1:
        raise InputError(f"erase:aspect={aspect}: give one above 0 and at most 1")
    height, width, _ = image.shape
    on, areas, aspects, places = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(areas, minval=least, maxval=most)
    ratio = jax.random.uniform(aspects, minval=aspect, maxval=1 / aspect)
    tall = jnp.clip(jnp.round(jnp.sqrt(area * ratio)).astype(int), 0, height)
    wide = jnp.clip(jnp.round(jnp.sqrt(area / ratio)).astype(int), 0, width)
    top, left = jax.random.randint(places, (2,), 0, jnp.stack([height - tall, width - wide]) + 1)
    inside = _box(image.shape, top, left, tall, wide) & jax.random.bernoulli(on, rate)
    return example._replace(inputs=jnp.where(inside, jnp.zeros((), image.dtype), image))


@by_example
def jitter(key: jax.Array, example: Batch, *, brightness: float = 0.0, contrast: float = 0.0) -> Batch:
    """The image with another brightness and contrast.

    All its values are multiplied by a number uniform from 1 - `brightness` to 1 + `brightness`; then their distances
    from their mean by one from 1 - `contrast` to 1 + `contrast`. Whole numbers are rounded and stay from 0 to 255.
    Source: Howard 2013, "Some improvements on deep convolutional neural network based image classification",
    arXiv:1312.5402, section 2, where both are 0.5.
    """
    image = _image(example, "jitter")
    for name, value in (("brightness", brightness), ("contrast", contrast)):
        _fraction("jitter", name, value)
    if not brightness and not contrast:
        raise InputError("jitter changes nothing: write jitter:brightness=0.5:contrast=0.5, or one of them")
    by = jax.random.uniform(key, (2,), minval=-1, maxval=1) * jnp.array([brightness, contrast]) + 1
    bright = image.astype(jnp.float32) * by[0]
    return example._replace(inputs=_as(image.dtype, bright.mean() + by[1] * (bright - bright.mean())))


@mixes
def mixup(key: jax.Array, batch: Batch, *, alpha: float = 0.2) -> Batch:
    """l times each example and 1 - l times another of the batch, targets too; l of the step is from Beta(alpha, alpha).

    Pixels are rounded. Source: Zhang et al. 2018, "mixup: beyond empirical risk minimization", arXiv:1710.09412,
    eq. 1 and figure 1.
    """
    share, partners = _share_and_partners(key, batch, "mixup", alpha)
    return batch._replace(
        inputs=jax.tree.map(lambda leaf: _mixed(leaf, partners, share, "mixup"), batch.inputs),
        targets=jax.tree.map(lambda leaf: _mixed(leaf, partners, share, "mixup"), batch.targets),
    )


@mixes
def cutmix(key: jax.Array, batch: Batch, *, alpha: float = 1.0) -> Batch:
    """A rectangle of each image replaced by that of another of the batch; targets are mixed by the areas.

    The rectangle of the step has the image's proportions, 1 - l of its area with l from Beta(alpha, alpha), and its
    centre anywhere; what falls outside of the image is cut off and does not count. Source: Yun et al. 2019, "CutMix",
    arXiv:1905.04899, eq. 1 and 2.
    """
    images = batch.inputs
    if not hasattr(images, "shape") or images.ndim != 4:
        raise InputError(_no_images("cutmix", batch.inputs, 1))
    draw, centre = jax.random.split(key)
    share, partners = _share_and_partners(draw, batch, "cutmix", alpha)
    _, height, width, _ = images.shape
    sides = jnp.array([height, width])
    middle = jax.random.uniform(centre, (2,)) * sides
    half = sides * jnp.sqrt(1 - share) / 2
    start = jnp.clip(jnp.round(middle - half), 0, sides).astype(int)
    end = jnp.clip(jnp.round(middle + half), 0, sides).astype(int)
    inside = _box(images.shape[1:], *start, *(end - start))
    kept = 1 - inside.mean()
    return batch._replace(
        inputs=jnp.where(inside, images[partners], images),
        targets=jax.tree.map(lambda leaf: _mixed(leaf, partners, kept, "cutmix"), batch.targets),
    )


SHIPPED: dict[str, Function] = {f.__name__: f for f in (crop, flip, erase, jitter, mixup, cutmix)}
"""The augmentations of tljax by name."""


def _image(example: Batch, name: str) -> jax.Array:
    """The image [height, width, channels] of an example."""
    if not hasattr(example.inputs, "shape") or example.inputs.ndim != 3:
        raise InputError(_no_images(name, example.inputs, 0))
    return example.inputs


def _no_images(name: str, inputs: Any, axes: int) -> str:
    """Why an augmentation does not fit inputs whose first so many axes are not the example's."""
    leaves = [f"{leaf.dtype}{list(leaf.shape[axes:])}" for leaf in jax.tree.leaves(inputs)]
    return f"{name} is for images [height, width, channels], and the inputs are {', '.join(leaves)}: leave it out"


def _fraction(name: str, option: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name}:{option}={value}: it must be from 0 to 1")


def _box(shape: tuple[int, ...], top: Any, left: Any, tall: Any, wide: Any) -> jax.Array:
    """Where a rectangle is in images of a shape [height, width, channels]: bool [height, width, 1]."""
    rows, columns = jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[None, :, None]
    return (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)


def _as(dtype: Any, values: jax.Array) -> jax.Array:
    """Floats as pixels of a dtype: rounded and from 0 to 255, or as they are."""
    return jnp.clip(jnp.round(values), 0, 255).astype(dtype) if dtype == jnp.uint8 else values.astype(dtype)


def _mixed(leaf: jax.Array, partners: jax.Array, share: jax.Array, name: str) -> jax.Array:
    """`share` of each row of a leaf and the rest of its partner's."""
    if leaf.dtype == jnp.uint8:  # in whole numbers, which round alike on any device
        parts = jnp.round(share * _PARTS).astype(jnp.int32)
        whole = leaf.astype(jnp.int32)
        return ((parts * whole + (_PARTS - parts) * whole[partners] + _PARTS // 2) // _PARTS).astype(jnp.uint8)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise InputError(f"{name} mixes pixels and floats, not {leaf.dtype}{list(leaf.shape[1:])}: leave it out")
    return (share * leaf + (1 - share) * leaf[partners]).astype(leaf.dtype)


_PARTS = 2**16
"""Of so many equal parts the share of `mixup` is a whole number."""


def _share_and_partners(key: jax.Array, batch: Batch, name: str, alpha: float) -> tuple[jax.Array, jax.Array]:
    """(The share that each example keeps, the row of each one's partner): a random permutation of what is no padding.

    The draw of a row follows from its place, so it does not depend on how much padding there is.
    """
    if not 0 < alpha < float("inf"):
        raise InputError(f"{name}:alpha={alpha}: it must be above 0")
    share_key, rows_key = jax.random.split(key)
    rows, real = jnp.arange(len(batch.weight)), batch.weight > 0
    draws = jax.vmap(jax.random.uniform)(_keys(rows_key, rows))
    shuffled = jnp.argsort(jnp.where(real, draws, jnp.inf))
    partners = jnp.where(real, shuffled[jnp.cumsum(real) - 1], rows)
    return jnp.round(_PARTS * jax.random.beta(share_key, alpha, alpha)) / _PARTS, partners


# ---- As flags name them


class Augmentation(NamedTuple):
    """An augmentation with its options. Hashable: it is static in the compiled step."""

    text: str
    """As it was named: 'crop:pad=4'."""
    function: Function
    options: tuple[tuple[str, Hashable], ...] = ()
    classes: int = 0
    """How long one-hot targets are, for one that mixes classes."""

    @property
    def example(self) -> Function | None:
        """The function of one example, where it is `by_example`."""
        return getattr(self.function, "example", None)

    @property
    def mixes(self) -> bool:
        """Whether it mixes targets."""
        return getattr(self.function, "mixes", False)


def resolved(text: str, inputs: Any) -> str:
    """The text with what 'auto' stands for: crop and flip of pixels, nothing of other inputs; "" for 'none'.

    `inputs` has the shapes and dtypes of one example. The crop's border is an eighth of the shorter side, as the 4 of
    32 in `crop`.

    >>> resolved("auto", jax.ShapeDtypeStruct((32, 48, 3), "uint8")), resolved("auto", jnp.zeros(20))
    ('crop:pad=4,flip', '')
    """
    if text.strip() != "auto":
        return "" if text.strip() == "none" else text
    pixels = getattr(inputs, "dtype", None) == jnp.uint8 and len(inputs.shape) == 3 and min(inputs.shape[:2]) > 1
    return f"crop:pad={max(1, round(min(inputs.shape[:2]) / 8))},flip" if pixels else ""


def read(text: str, classes: int = 0) -> tuple[Augmentation, ...]:
    """The augmentations that a text names, with commas between them, in the order in which they are applied.

    `classes` are those of the task, for what mixes targets.

    A name is one of `SHIPPED`, 'package.module:attribute' or 'FILE.py:attribute'. Two calls with one text give equal
    ones, unless the file was edited, so that equal fits share an executable. Raises InputError for an unknown one, and
    for an option that it does not take.

    >>> [(augmentation.text, augmentation.options) for augmentation in read("crop:pad=2,flip")]
    [('crop:pad=2', (('pad', 2),)), ('flip', ())]
    """
    every = [_read(part, plugins.outside_digest(part, "tljax", "augment")) for part in _parts(text)]
    return tuple(
        augmentation._replace(classes=classes) if augmentation.mixes else augmentation for augmentation in every
    )


def _parts(text: str) -> list[str]:
    """The texts of single augmentations; raises InputError for 'auto' or 'none' beside others."""
    parts = [part.strip() for part in plugins.split(text, ",")] if text.strip() not in ("", "none") else []
    for part in parts:
        if part in ("auto", "none") and len(parts) > 1:
            raise InputError(f"'{part}' stands alone: leave out it or {paths.some([p for p in parts if p != part])}")
    return parts


@functools.lru_cache(maxsize=256)
def _read(text: str, digest: str) -> Augmentation:
    """One augmentation; `digest` is that of its file."""
    spec = plugins.parse(text)
    if "." not in spec.name:
        if spec.name not in SHIPPED or spec.words:
            raise InputError(f"unknown augmentation '{text}'{plugins.nearest(spec.name, SHIPPED)}")
        function: Function = SHIPPED[spec.name]
    else:
        function = plugins.attribute(spec, plugins.module(spec, "tljax", "augment"), "augment")
    options = plugins.bind(function, spec.options, f"augmentation '{spec.name}'")
    try:
        hash(tuple(options.values()))
    except TypeError as error:
        raise InputError(f"augmentation '{text}': give its options numbers or words") from error
    return Augmentation(text, function, tuple(sorted(options.items())))


def digests(text: str) -> list[str]:
    """Digests of the files of those that are none of tljax: an edit of one makes another fit."""
    return [digest for part in _parts(text) if (digest := plugins.outside_digest(part, "tljax", "augment"))]


# ---- In the step


def apply(
    augmentations: tuple[Augmentation, ...],
    key: jax.Array,
    batch: Batch,
    axis: str | None = None,
    places: jax.Array | None = None,
) -> Batch:
    """The batch after augmentations, one after another, each with a key of its own.

    Where one mixes targets, those that are classes become one-hot floats [batch, classes], and bools floats. With an
    `axis` of devices the batch is one device's part of the whole, and so is what is returned; the changes are those of
    the whole batch on one device. `places` (int [batch]) are those from which examples draw, where they are other than
    the batch's, and all augmentations `by_example`. Padding stays padding. Raises InputError for one that fails, that
    gives no Batch, or that changes shapes or dtypes.
    """
    batch = _mixable(augmentations, batch)
    weight = batch.weight
    for number, augmentation in enumerate(augmentations):
        batch = _augment_once(augmentation, jax.random.fold_in(key, number), batch, axis, places)
    return batch._replace(weight=jnp.where(weight > 0, batch.weight, weight))


def _mixable(augmentations: tuple[Augmentation, ...], batch: Batch) -> Batch:
    """The batch with targets that can be mixed, where an augmentation does so."""
    if mixing := [augmentation for augmentation in augmentations if augmentation.mixes]:
        as_floats = functools.partial(_as_floats, mixing[0].classes)
        return batch._replace(targets=jax.tree.map(as_floats, batch.targets))
    return batch


def _as_floats(classes: int, targets: jax.Array) -> jax.Array:
    """Targets that can be mixed."""
    if targets.ndim == 1 and jnp.issubdtype(targets.dtype, jnp.integer):
        return jax.nn.one_hot(targets, classes, dtype=jnp.float32)
    return targets.astype(jnp.float32) if targets.dtype == bool else targets


def view(views: int, key: jax.Array, batch: Batch, axis: str | None = None) -> Batch:
    """The batch with one of so many views of each example, whose inputs are [batch, views, ...], as likely as another.

    `axis` is as in `apply`.
    """
    places = _places(batch, axis)
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, views))(_keys(key, places))
    return batch._replace(inputs=jax.tree.map(lambda leaf: leaf[jnp.arange(len(places)), drawn], batch.inputs))


def _places(batch: Batch, axis: str | None) -> jax.Array:
    """The places in the whole batch, int [batch]."""
    places = jnp.arange(len(batch.weight))
    return places if axis is None else places + jax.lax.axis_index(axis) * len(places)


def _augment_once(
    augmentation: Augmentation, key: jax.Array, batch: Batch, axis: str | None, places: jax.Array | None
) -> Batch:
    """The batch, or a device's part of it, after one augmentation."""
    options, function = dict(augmentation.options), augmentation.example
    if function is not None:
        at = _places(batch, axis) if places is None else places
        return _checked(augmentation, lambda: _each(function, key, batch, at, options), batch)
    if axis is None:
        return _checked(augmentation, lambda: augmentation.function(key, batch, **options), batch)
    whole = jax.lax.all_gather(batch, axis, tiled=True)
    changed = _checked(augmentation, lambda: augmentation.function(key, whole, **options), whole)
    return jax.tree.map(lambda leaf: leaf[_places(batch, axis)], changed)


def _checked(augmentation: Augmentation, call: Callable[[], Any], batch: Batch) -> Batch:
    """What a call of an augmentation gives; raises InputError if it fails, or gives anything but a batch as it was."""
    what = f"augmentation '{augmentation.text}'"
    try:
        changed = call()
    except (InputError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # an augmentation's code may raise anything
        place = plugins.describe(error, augmentation.example or augmentation.function)
        raise InputError(f"{what} fails: {place}") from error
    if not isinstance(changed, Batch):
        raise InputError(f"{what} gives {plugins.shown(changed)}: return batch._replace(inputs=...)")
    for name, before, after in zip(Batch._fields, batch, changed, strict=True):
        if (was := _described(before)) != (becomes := _described(after)):
            raise InputError(f"{what} makes of the {name} {was} {becomes}: keep shapes and dtypes")
    return cast(Batch, jax.tree.map(jnp.asarray, changed))


def _described(tree: Any) -> str:
    """Shapes and dtypes of the examples of a tree, in words."""
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        parts = [f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip() for path, leaf in leaves]
    except AttributeError:
        return plugins.shown(tree)
    return ", ".join(parts)


def check(augmentations: tuple[Augmentation, ...], inputs: Any, targets: Any) -> None:
    """Raise InputError for augmentations that cannot be of such examples: nothing is computed.

    `inputs` and `targets` have the shapes and dtypes of one example.
    """
    example: Any = Batch(inputs, targets, cast(Any, jax.ShapeDtypeStruct((), jnp.float32)))
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), example)
    jax.eval_shape(lambda batch: apply(augmentations, jax.random.key(0), batch), batch)


def try_on(augmentations: tuple[Augmentation, ...], batch: Batch, outputs: int) -> None:
    """Raise InputError for augmentations that, on this batch, give numbers that cannot be trained on.

    These are inputs and targets that are not finite where they were, targets that are whole numbers outside of 0 to
    `outputs` - 1 or parts of classes and labels outside of 0 to 1, and other weights: they say what is padding. Those
    of tljax alone are not tried.
    """
    are_parts = jax.tree.map(lambda leaf: not jnp.issubdtype(leaf.dtype, jnp.floating), batch.targets)
    if all(augmentation.function in SHIPPED.values() for augmentation in augmentations):
        return  # their numbers are held by tests: a run need not wait for their compilation
    before, *others = _after_each(augmentations, batch)
    for augmentation, after in zip(augmentations, others, strict=True):
        if fault := _fault(before, after, are_parts, outputs):
            raise InputError(f"augmentation '{augmentation.text}' {fault}")
        before = after


@functools.partial(jax.jit, static_argnums=0)
def _after_each(augmentations: tuple[Augmentation, ...], batch: Batch) -> list[Batch]:
    """The batch before the first augmentation, and after each."""
    batches = [_mixable(augmentations, batch)]
    for number, augmentation in enumerate(augmentations):
        batches.append(
            _augment_once(augmentation, jax.random.fold_in(jax.random.key(0), number), batches[-1], None, None)
        )
    return batches


def _fault(before: Batch, after: Batch, are_parts: Any, outputs: int) -> str:
    """What is wrong with the numbers of a batch after an augmentation; "" where nothing is.

    `are_parts` says of each leaf of the targets whether floats in it are parts of classes or labels.
    """
    weights = np.asarray(after.weight)
    if not np.array_equal(weights, before.weight):
        odd = weights[weights != np.asarray(before.weight)][0]
        return f"makes a weight {odd:g}: weights say what is padding, so leave them as they are"
    for what, was, becomes in (("an input", before.inputs, after.inputs), ("a target", before.targets, after.targets)):
        for leaf, new in zip(jax.tree.leaves(was), jax.tree.leaves(becomes), strict=True):
            if jnp.issubdtype(new.dtype, jnp.floating):
                bad = np.isfinite(np.asarray(leaf)) & ~np.isfinite(np.asarray(new))
                if bad.any():
                    return f"makes {what} {np.asarray(new)[bad][0]}: keep it finite"
    leaves = (jax.tree.leaves(tree) for tree in (before.targets, after.targets, are_parts))
    for leaf, new, is_part in zip(*leaves, strict=True):
        numbers = np.asarray(new)
        if jnp.issubdtype(new.dtype, jnp.integer):
            least, most, slack = min(0, int(leaf.min())), outputs - 1, 0.0
        elif is_part and jnp.issubdtype(new.dtype, jnp.floating):
            least, most, slack = 0, 1, _ROUNDING
        else:
            continue
        outside = numbers[(numbers < least - slack) | (numbers > most + slack)]
        if outside.size:
            return f"makes a target {outside[0]:g}: keep targets from {least} to {most}"
    return ""


_ROUNDING = 1e-3
"""How far rounding may take a part of a class out of 0 to 1."""


def require_views(augmentations: tuple[Augmentation, ...], inputs: Any, targets: Any) -> None:
    """Raise InputError for augmentations that views of examples cannot be kept of: those that do not change the inputs
    of each example by itself.

    `inputs` and `targets` have the shapes and dtypes of one example.
    """
    for augmentation in augmentations:
        if augmentation.example is None:
            raise InputError(
                f"views are of examples, and '{augmentation.text}' changes whole batches: leave it or the views out"
            )
        example: Any = Batch(inputs, targets, cast(Any, jax.ShapeDtypeStruct((), jnp.float32)))
        function = functools.partial(augmentation.example, **dict(augmentation.options))
        traced: Any = jax.make_jaxpr(lambda batch, call=function: call(jax.random.key(0), batch).targets)(example)
        if any(out not in traced.jaxpr.invars for out in traced.jaxpr.outvars):
            raise InputError(
                f"views are of inputs, and '{augmentation.text}' changes targets: leave it or the views out"
            )
