"""Tasks made from tasks, so that the truth about their transfer is known: `mnist_10k:labels=0-4:rotate=30`.

labels=0-4                these classes alone (0+2+cat too), numbered in the order written; their names stay
group=0+1/2+3             classes made one: each group is a class, named 0+1 and 2+3; every class is in one
take=2000                 so many training examples, a balanced draw (`draw.label_budget`); the test split stays
shuffle_labels=0.5        that share of the training examples exchange their labels at random; the test split stays
rotate=30                 degrees counter-clockwise about the centre, bilinear by PIL, 0 where nothing was
blur=2                    Gaussian of that standard deviation in pixels, as PIL approximates it; edges go on as they are
invert                    255 - x
noise=0.3                 Gaussian of that standard deviation, 1 being the range 0..255; rounded and clipped
permute=7                 pixels in an order drawn from the seed 7, the same for both splits; channels stay together

They apply in the order written, each option once, after the images have their shape. A class is called by its name;
by its number, from 0, where no name is a number. Of float features [n, ...], permute exchanges all numbers of an
example, and invert, rotate, blur and noise are refused: features are no picture, and have no range. Tokens and several
inputs are neither. labels and group are of classes alone; where there are none, take is a plain draw, and
shuffle_labels exchanges whole targets. What is drawn comes from Philox as in `draw`, so it is the same on any machine.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from tljax.data import draw
from tljax.data.checks import checked
from tljax.plugins import bind, nearest, parse, split, unquoted
from tljax.types import ArrayExamples, Examples, InputError, RowExamples, Task

Split = ArrayExamples | RowExamples
_SEED = 0
_CHUNK = 2**22
"""How many pixels are changed at once."""


def divide(name: str) -> tuple[str, list[str]]:
    """The name of the data set to change, with its own options, and the changes in the order written.

    Raises InputError for a name that is not of the form name:option=value.

    >>> divide("cifar10:train=train[:80%]:labels=cat+dog:invert")
    ('cifar10:train=train[:80%]', ['labels=cat+dog', 'invert'])
    """
    parse(name)
    parts = [part.strip() for part in split(name, ":")]
    # The second part of folder:DIR is DIR, and of FILE.py:ATTRIBUTE an attribute, even if it is named like a change.
    first = 2 if parts[0] == "folder" or unquoted(parts[0]).endswith(".py") else 1
    changes = [part for part in parts[first:] if part.partition("=")[0] in _CHANGES]
    source = [part for i, part in enumerate(parts) if i < first or part not in changes]
    return (":".join(source), changes) if changes else (name, [])


def slow(changes: Sequence[str]) -> bool:
    """Whether any change goes through the pictures one by one, which takes seconds where others take tenths."""
    return any(change.partition("=")[0] in ("rotate", "blur") for change in changes)


def derived(task: Task, name: str, changes: Sequence[str]) -> Task:
    """A new task: `task` after the changes, one after another. Its name is `name`, the text that asks for them.

    Raises InputError for a change that cannot be made, and for a result that is not a task (see `checks.checked`).

    >>> from tljax.data import load
    >>> task = derived(load("mnist_10k"), "odd", ["labels=1+3+5", "group=1/3+5"])
    >>> task.classes, task.train.arrays.shape, np.bincount(task.test.targets).tolist()
    (('1', '3+5'), (3000, 28, 28, 1), [200, 400])
    """
    if not changes:
        return task
    result = task
    for change in changes:
        result = _changed(result, change)
    train, test = len(result.train.targets), len(result.test.targets)
    note = f"{train:,} training and {test:,} test examples after {':'.join(changes)}"
    # `checked` finds again those findings that still hold.
    before = task.note.removesuffix("; ".join(task.findings)).removesuffix("; ")
    return checked(
        name,
        _either(result.train),
        _either(result.test),
        result.classes,
        f"{note}; before: {before}" if before else note,
        kind=result.kind,
        outputs=result.outputs,
    )


def select(split: Examples, rows: np.ndarray | slice) -> Split:
    """The items of a split that `rows` (bool [n], indices or a slice) selects, with their groups.

    >>> select(ArrayExamples(np.zeros((3, 2)), np.arange(3), np.array([5, 6, 7])), np.array([2, 0])).groups.tolist()
    [7, 5]
    """
    split = _either(split)
    if isinstance(rows, np.ndarray) and rows.dtype == bool and rows.all():
        return split
    if isinstance(split, RowExamples):
        chosen, read = np.arange(len(split))[rows], split.read
        groups = None if split.groups is None else split.groups[chosen]
        return RowExamples(lambda rows: read(chosen[rows]), split.targets[chosen], split.spec, groups)
    groups = None if split.groups is None else split.groups[rows]
    return ArrayExamples(jax.tree.map(lambda leaf: leaf[rows], split.arrays), split.targets[rows], groups)


def _either(split: Examples) -> Split:
    """The split, of the two kinds that tasks are made of."""
    assert isinstance(split, Split)
    return split


def whole(split: Examples) -> ArrayExamples:
    """A split as arrays. Raises InputError for one that is read by row: its inputs cannot be changed."""
    if not isinstance(split, ArrayExamples):
        raise InputError("inputs that are read by row cannot be changed: change them in the source")
    return split


def _changed(task: Task, change: str) -> Task:
    """The task after one change. Raises InputError for a change in another form, and one of pixels on features."""
    key, _, value = change.partition("=")
    function, form = _CHANGES[key]
    if bool(value) != ("=" in form):
        raise InputError(f"data set '{task.name}' has no option '{change}': write it as {form}")
    if key in _CLASSES and task.kind != "classes":
        raise InputError(f"option '{key}' of data set '{task.name}' is of classes, and these are {task.kind}: drop it")
    if key in _PIXELS or key == "permute":
        whole(task.train)
    dtype = getattr(task.train.spec, "dtype", None)
    if (key in _PIXELS and dtype != np.uint8) or (key == "permute" and dtype not in (np.uint8, np.float32)):
        what = {None: "several inputs", np.dtype(np.int32): "tokens"}.get(dtype, "features")
        raise InputError(f"option '{key}' of data set '{task.name}' changes pixels, and these are {what}: drop it")
    options = {key: value} if value else {}
    return function(task, **bind(function, options, f"data set '{task.name}'"))


def _refusal(task: Task, option: str, value: Any, remedy: str) -> InputError:
    return InputError(f"option '{option}={value}' of data set '{task.name}' {remedy}")


def _labels(task: Task, *, labels: str) -> Task:
    (chosen,) = _groups(task, "labels", labels, "+")
    return _regrouped(task, "labels", labels, [[label] for label in chosen])


def _group(task: Task, *, group: str) -> Task:
    groups = _groups(task, "group", group, "+/")
    for label, name in enumerate(task.classes):
        if not any(label in members for members in groups):
            raise _refusal(
                task, "group", group, f"leaves out class '{name}': put it into a group, or drop it by labels="
            )
    return _regrouped(task, "group", group, groups)


def _groups(task: Task, option: str, text: str, separators: str) -> list[list[int]]:
    """The labels of the classes that `text` names, in its groups. Raises InputError for a text that names none."""
    labels = {name: label for label, name in enumerate(task.classes) if name}
    if not any(name.isdecimal() for name in labels):
        labels |= {str(label): label for label in range(len(task.classes))}
    # Names may hold separators (T-shirt/top), so the longest name that fits is taken.
    name = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    item = re.compile(rf"({name})(?:-({name}))?([{separators}]|\Z)")
    groups: list[list[int]] = [[]]
    position, end = 0, "+"
    while end:
        match = item.match(text, position)
        if not match:
            unknown = re.split(f"[{separators}]", text[position:])[0]
            raise _refusal(task, option, text, f"names no class by '{unknown}'{nearest(unknown, task.classes)}")
        first, last, end = match.groups()
        members = range(labels[first], labels[last or first] + 1)
        if not members:
            raise _refusal(task, option, text, f"holds an empty range: write {last}-{first}")
        for label in members:
            if any(label in group for group in groups):
                raise _refusal(task, option, text, f"names class '{task.classes[label]}' twice: name it once")
            groups[-1].append(label)
        if end == "/":
            groups.append([])
        position = match.end()
    return groups


def _regrouped(task: Task, option: str, value: str, groups: Sequence[Sequence[int]]) -> Task:
    """The task whose classes are the groups, in this order, without examples of no group."""
    if len(groups) < 2:
        raise _refusal(task, option, value, "leaves one class: there is nothing to tell apart, leave two or more")
    table = np.full(len(task.classes), -1, np.int32)
    for number, members in enumerate(groups):
        table[list(members)] = number

    def regrouped(part: Examples) -> Split:
        labels = table[part.targets]
        in_group = labels >= 0
        return replace(select(part, in_group), targets=labels[in_group])

    names = tuple("+".join(task.classes[label] for label in members) for members in groups)
    return replace(task, train=regrouped(task.train), test=regrouped(task.test), classes=names)


def _take(task: Task, *, take: int) -> Task:
    strata = draw.strata(task)
    least = len(np.unique(strata))
    if not least <= take <= len(strata):
        words = f"{least}{' (one a class)' if least > 1 else ''} to {len(strata)} (all)"
        raise _refusal(task, "take", take, f"is not {words}: give a number of these")
    chosen = draw.label_budget(_SEED, strata, take)
    return replace(task, train=select(task.train, chosen))


def _shuffle_labels(task: Task, *, shuffle_labels: float) -> Task:
    """Permute the labels of drawn examples: class counts stay, and some examples get the label that they had."""
    if not 0 <= shuffle_labels <= 1:
        raise _refusal(task, "shuffle_labels", shuffle_labels, "is no share: give 0 to 1")
    before = task.train.targets
    n = len(before)
    drawn = np.argsort(draw.words(_SEED, draw.SHUFFLE, 0, 1, n)[0], kind="stable")[: round(shuffle_labels * n)]
    after = np.array(before)
    after[np.sort(drawn)] = before[drawn]
    return replace(task, train=replace(_either(task.train), targets=after))


def _images(task: Task, change: Callable[[np.ndarray], np.ndarray]) -> Task:
    train, test = (replace(whole(part), arrays=change(part.arrays)) for part in (task.train, task.test))
    return replace(task, train=train, test=test)


def _invert(task: Task) -> Task:
    return _images(task, lambda images: 255 - images)


def _rotate(task: Task, *, rotate: float) -> Task:
    from PIL import Image

    if not math.isfinite(rotate):
        raise _refusal(task, "rotate", rotate, "is no angle: give degrees")
    return _images(task, lambda images: _by_picture(images, lambda p: p.rotate(rotate, Image.Resampling.BILINEAR)))


def _blur(task: Task, *, blur: float) -> Task:
    from PIL import ImageFilter

    most = max(task.train.arrays.shape[1:3])
    if not 0 <= blur <= most:
        raise _refusal(task, "blur", blur, f"is outside 0..{most}: give a standard deviation in pixels")
    gaussian = ImageFilter.GaussianBlur(blur)
    return _images(task, lambda images: _by_picture(images, lambda p: p.filter(gaussian)))


def _by_picture(images: np.ndarray, change: Callable[[Any], Any]) -> np.ndarray:
    """Change each channel of each image by itself: PIL would take a second or a fourth channel for alpha."""
    from PIL import Image

    changed = np.empty(images.shape, np.uint8)
    for before, after in zip(images, changed, strict=True):
        for channel in range(images.shape[-1]):
            after[..., channel] = change(Image.fromarray(np.ascontiguousarray(before[..., channel])))
    return changed


def _noise(task: Task, *, noise: float) -> Task:
    """Add normal noise in whole greys: an integer draws one of the quantiles at 65,536 equal steps."""
    from scipy.special import ndtri

    if not 0 <= noise < math.inf:
        raise _refusal(task, "noise", noise, "is no standard deviation: give 0 or more, such as 0.3")
    quantiles = ndtri((np.arange(2**16) + 0.5) / 2**16)
    greys = np.clip(np.rint(255 * noise * quantiles), -255, 255).astype(np.int16)
    train = replace(whole(task.train), arrays=_noisy(task.train.arrays, greys, draw.TRAIN_NOISE))
    return replace(
        task, train=train, test=replace(whole(task.test), arrays=_noisy(task.test.arrays, greys, draw.TEST_NOISE))
    )


def _noisy(images: np.ndarray, greys: np.ndarray, stream: int) -> np.ndarray:
    noisy = np.empty(images.shape, np.uint8)
    size = math.prod(images.shape[1:])
    rows = max(1, _CHUNK // size)
    for first in range(0, len(images), rows):
        chunk = images[first : first + rows]
        words = draw.words(_SEED, stream, first, len(chunk), -(-size // 4))  # four pixels a word
        drawn = words.astype("<u8").view("<u2")[:, :size].reshape(chunk.shape)
        noisy[first : first + rows] = np.clip(chunk + greys[drawn], 0, 255)
    return noisy


def _permute(task: Task, *, permute: int) -> Task:
    if not 0 <= permute < 2**64:
        raise _refusal(task, "permute", permute, "is no seed: give a whole number that is not negative")
    images = task.train.arrays
    n = math.prod(images.shape[1:3] if images.dtype == np.uint8 else images.shape[1:])
    order = np.argsort(draw.words(permute, draw.PIXELS, 0, 1, n)[0], kind="stable")
    return _images(task, lambda images: images.reshape(len(images), n, -1)[:, order].reshape(images.shape))


_CHANGES: Mapping[str, tuple[Callable[..., Task], str]] = {
    "labels": (_labels, "labels=0-4"),
    "group": (_group, "group=0+1/2"),
    "take": (_take, "take=2000"),
    "shuffle_labels": (_shuffle_labels, "shuffle_labels=1"),
    "rotate": (_rotate, "rotate=30"),
    "blur": (_blur, "blur=2"),
    "invert": (_invert, "invert"),
    "noise": (_noise, "noise=0.3"),
    "permute": (_permute, "permute=7"),
}
_CLASSES = ("labels", "group")
_PIXELS = ("rotate", "blur", "invert", "noise")

FORMS = tuple(form for _, form in _CHANGES.values())
"""How each change is written, by an example."""
