"""A data set of anybody's random-access sources, such as Grain's: `package.module:attribute` or `FILE.py:attribute`.

The attribute is a function of the split ("train" or "test"), with options where its name has some, that gives a source;
or a dict of the two. A source has a length and gives an item by its number: any `grain.sources.RandomAccessDataSource`
or `grain.MapDataset`, a list, or a class with `__len__` and `__getitem__`. An item is (inputs, targets), (inputs,
targets, group), a dict of "inputs", "targets" and, if wanted, "group", or, where they are tokens, inputs alone. Inputs
are an array or a dict of arrays: uint8 pixels, float features, or whole numbers, tokens [length] among them. What
targets mean follows from their dtype and shape (see `targets`). If it has them, a source's attributes `class_names`
(strings), `targets` and `groups` (of all items, in order) are taken, so that no item is read for them.

    class Squares:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, i):
            return np.float32([i, i * i]), i % 2

    def squares(split, *, of=2): return Squares()

is the data set mine.py:squares:of=2.

Small sources are read whole. Larger ones are read by row, in threads, as they are needed; their fingerprint is of
1,000 rows, and tables say that it is sampled.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax import plugins, switches
from tljax.data import checks, images, targets
from tljax.data.images import Shape
from tljax.types import ArrayExamples, InputError, RowExamples, Task

WHOLE = 2**28
"""Bytes of inputs, of both splits, up to which a task is read whole."""
_THREADS = 8
_CHUNK = 256
"""How many items a thread reads at once where all are read."""
_KEYS = ("inputs", "targets", "group")


def is_name(spec: plugins.Spec) -> bool:
    """Whether a data set's name is that of an attribute in a module or a file.

    >>> is_name(plugins.parse("mine.py:letters")), is_name(plugins.parse("cifar10:take=10"))
    (True, False)
    """
    dotted = "." in spec.name and all(part.isidentifier() for part in spec.name.split("."))
    return spec.name.endswith(".py") or (dotted and bool(spec.words))


def load(
    name: str,
    spec: plugins.Spec,
    shape: Shape | None,
    resize: str = "crop",
    say: Callable[[str], None] = lambda line: None,
) -> Task:
    """The task of a name's two sources, checked; pixels are brought to `shape`. `say` gets a line before a long read.

    Raises InputError for an attribute that is missing, fails or gives no source, and for what `checks.checked` refuses.
    """
    sources = {
        split: _Source(f"{name}: {split}", source, shape, resize) for split, source in _sources(name, spec).items()
    }
    names = sources["train"].names()
    size = sum(len(source) * source.item_bytes() for source in sources.values())
    if size > WHOLE:
        say(f"{name}: {size / 1e9:,.1f} GB are read by row, as they are needed")
        train, test = (source.by_row(say) for source in sources.values())
        kind = targets.kind(name, train, test)
        sampled = f"read by row, so its fingerprint is sampled ({checks.SAMPLED:,} rows of a split)"
        note = "; ".join(filter(None, (sampled, _crop_note(sources.values()))))
        return checks.checked(name, train, test, _classes(name, train.targets, names, kind), note, kind=kind)
    whole = [source.whole() for source in sources.values()]
    kind = _kind(name, *whole)
    first, second = (part if part.targets is not None else _predicted(part) for part in whole)
    note = _crop_note(sources.values())
    return checks.checked(name, first, second, _classes(name, first.targets, names, kind), note, kind=kind)


def _crop_note(sources: Iterable["_Source"]) -> str:
    """What tables say where an image that was read so far was cropped."""
    shapes = [source.shape for source in sources if source.cropped and source.shape]
    if not shapes:
        return ""
    return f"images are resized by their short side and cropped at the centre to {shapes[0][0]}x{shapes[0][1]}"


def _kind(name: str, train: ArrayExamples, test: ArrayExamples) -> str:
    lacking = [part.targets is None for part in (train, test)]
    if not any(lacking):
        return targets.kind(name, train, test)
    if all(lacking) and targets.tokens(train.arrays) and targets.tokens(test.arrays):
        return "tokens"
    raise InputError(f"{name}: its items are inputs alone, and no tokens [length]: give (inputs, targets)")


def _predicted(part: ArrayExamples) -> ArrayExamples:
    return ArrayExamples(part.arrays, targets.next_tokens(part.arrays), part.groups)


def _classes(name: str, train_targets: np.ndarray, names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The names that the source has, or for classes the numbers up to the largest."""
    if names or kind != "classes":
        return names
    largest = int(train_targets.max(initial=0))
    if largest >= len(train_targets):
        row = int(train_targets.argmax())
        raise InputError(f"{name}: train: item {row} is of class {largest}: correct it, or give the source class_names")
    return tuple(map(str, range(largest + 1)))


def _sources(name: str, spec: plugins.Spec) -> dict[str, Any]:
    """{split: its source} of the attribute that a name stands for."""
    what = f"data set '{name}'"
    if len(spec.words) != 1:
        raise InputError(f"{what} names no attribute of '{spec.name}': write {plugins.quoted(spec.name)}:ATTRIBUTE")
    module = plugins.module(spec, "tljax.data", "data set")
    if not hasattr(module, spec.words[0]):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise InputError(f"'{spec.name}' has no attribute '{spec.words[0]}'{plugins.nearest(spec.words[0], known)}")
    source = getattr(module, spec.words[0])
    if isinstance(source, Mapping):
        if spec.options or not {"train", "test"} <= source.keys():
            raise InputError(
                f"{what}: '{spec.words[0]}' is a dict: let it have 'train' and 'test', and give no options"
            )
        return {split: source[split] for split in ("train", "test")}
    if not callable(source):
        raise InputError(
            f"{what}: '{spec.words[0]}' is {plugins.shown(source)}: give a function of the split, or a dict of 'train' "
            "and 'test'"
        )
    if not any(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in inspect.signature(source).parameters.values()
    ):
        raise InputError(f"{what}: '{spec.words[0]}' takes no split: write def {spec.words[0]}(split, *, ...)")
    options = plugins.bind(source, spec.options, what)
    with switches.guarded(what):
        return {split: _call(f"{what} fails", source, source, split, **options) for split in ("train", "test")}


def _call(what: str, function: Callable[..., Any], called: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What somebody else's code returns; whatever it raises becomes one line."""
    try:
        return called(*arguments, **options)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {plugins.describe(error, function)}") from error


class _Item(NamedTuple):
    """An item of a source, in whatever form it came."""

    inputs: Any
    targets: Any = None
    group: Any = None


class _Source:
    """A random-access source and what errors call it."""

    def __init__(self, where: str, source: Any, shape: Shape | None, resize: str) -> None:
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise InputError(f"{where} is {plugins.shown(source)}: give a source with a length and items by number")
        self.where, self.source, self.shape, self.resize = where, source, shape, resize
        self.cropped = False
        self.like: Any = None  # the inputs of item 0, as `stacked` compares those of others with them
        self.count = len(self)
        if not self.count:
            raise InputError(f"{where}: is empty: give at least one item")
        self.first = self.normal(np.arange(1), [self.item(0)])

    def __len__(self) -> int:
        return int(_call(f"{self.where}: its length fails", type(self.source).__len__, len, self.source))

    def item(self, row: int) -> _Item:
        """An item, in its parts."""
        get = type(self.source).__getitem__
        item = _call(f"{self.where}: item {row} fails", get, self.source.__getitem__, int(row))
        if isinstance(item, tuple) and 2 <= len(item) <= 3:
            return _Item(*item)
        if isinstance(item, Mapping):
            if "inputs" not in item or not item.keys() <= set(_KEYS):
                raise InputError(
                    f"{self.where}: item {row} is a dict of {', '.join(map(repr, item))}: give 'inputs', 'targets' "
                    "and, if wanted, 'group', or the tuple (inputs, targets)"
                )
            return _Item(*(item.get(key) for key in _KEYS))
        if item is None or isinstance(item, str | bytes | tuple):
            raise InputError(f"{self.where}: item {row} is {plugins.shown(item)}: give (inputs, targets)")
        return _Item(item)

    def item_bytes(self) -> int:
        """Bytes of the inputs of an item."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.first))

    def spec(self) -> Any:
        """Shapes and dtypes of the inputs of an item."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.first)

    def normal(self, rows: np.ndarray, items: list[_Item]) -> Any:
        """The inputs of items, leaves [k, ...], as tljax has them. Raises InputError, with the row."""
        try:
            return checks.inputs(self.where, self.stacked(rows, items))
        except InputError:
            for row, item in zip(rows, items, strict=True):  # which of them is it?
                checks.inputs(f"{self.where}: item {row}", self.stacked(np.array([row]), [item]))
            raise

    def stacked(self, rows: np.ndarray, items: list[_Item]) -> Any:
        """The inputs of items in arrays [k, ...]; pixels are brought to the shape.

        Raises InputError for inputs of another shape or dtype than item 0's, which is the first that is asked for.
        """

        def stacked_leaf(leaf: Any) -> np.ndarray:
            array = np.asarray(leaf)
            if self.shape and array.dtype == np.uint8 and array.ndim in (2, 3):
                self.cropped |= images.crops(array.shape, self.shape, self.resize)
                picture = (array[..., None] if array.ndim == 2 else array)[None]
                array = images.to_shape(picture, self.shape, self.resize)[0]
            return array

        trees = [
            {key: stacked_leaf(leaf) for key, leaf in sorted(item.inputs.items())}
            if isinstance(item.inputs, Mapping)
            else stacked_leaf(item.inputs)
            for item in items
        ]
        first = self.like = trees[0] if self.like is None else self.like
        for row, tree in zip(rows, trees, strict=True):
            alike = _names(tree) == _names(first)
            for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(first), strict=True) if alike else ():
                alike = alike and leaf.shape == other.shape and leaf.dtype == other.dtype
            if not alike:
                raise InputError(
                    f"{self.where}: item {row} has inputs {_shown(tree)}, item 0 {_shown(first)}: give all one "
                    "shape and dtype" + ("" if self.shape else "; pixels are brought to one by `image_shape=`")
                )
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    def read(self, rows: np.ndarray) -> Any:
        """The inputs of some rows. Raises InputError for inputs of another shape than the first item's, and where the
        source has another length than it had."""
        if len(self) != self.count:
            now = f"it had {self.count:,} items, and has {len(self):,} now"
            raise InputError(f"{self.where}: {now}: give a source whose length stays")
        if not len(rows):
            return jax.tree.map(lambda leaf: leaf[:0], self.first)
        return self.normal(rows, [self.item(row) for row in rows])

    def chunks(self) -> Iterator[tuple[np.ndarray, list[_Item]]]:
        """(rows, items) of all items, in order, read by threads a few chunks ahead."""
        count = len(self)
        parts = [np.arange(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(parts), _THREADS):
                group = parts[start : start + _THREADS]
                yield from zip(group, threads.map(lambda rows: [self.item(row) for row in rows], group), strict=True)

    def whole(self) -> ArrayExamples:
        """All items in arrays; targets None where no item has any."""
        inputs, items = [], []
        for rows, chunk in self.chunks():
            inputs.append(self.normal(rows, chunk))
            items += [item._replace(inputs=None) for item in chunk]
        arrays = jax.tree.map(lambda *leaves: np.concatenate(leaves), *inputs)
        return ArrayExamples(arrays, self.column("targets", items), self.column("group", items))

    def by_row(self, say: Callable[[str], None]) -> RowExamples:
        """The items to be read by row; targets and groups are read whole."""
        known = {key: getattr(self.source, attribute, None) for key, attribute in _ATTRIBUTES.items()}
        first = self.item(0)
        items: list[_Item] = []
        if known["targets"] is None or (known["group"] is None and first.group is not None):
            say(f"{self.where}: all {len(self):,} items are read for their targets: a source with `targets` saves it")
            for _, chunk in self.chunks():
                items += [item._replace(inputs=None) for item in chunk]
        whole = {key: np.asarray(part) if part is not None else self.column(key, items) for key, part in known.items()}
        if whole["targets"] is None:
            raise InputError(f"{self.where}: its items are inputs alone: give (inputs, targets), also of tokens")
        for key, part in whole.items():
            if part is not None and len(part) != len(self):
                raise InputError(
                    f"{self.where}: {_ATTRIBUTES[key]} are {len(part)}, items {len(self)}: give one an item"
                )
        return RowExamples(self.read, whole["targets"], self.spec(), whole["group"])

    def column(self, key: str, items: list[_Item]) -> np.ndarray | None:
        """The targets or groups of all items in one array; None where none has any."""
        values = [getattr(item, key) for item in items]
        lacking = [row for row, value in enumerate(values) if value is None]
        if len(lacking) == len(values):
            return None
        if lacking:
            raise InputError(f"{self.where}: item {lacking[0]} has no {key}, others have: give it to all")
        shapes = [np.shape(value) for value in values]
        if len(set(shapes)) > 1:
            row = next(row for row, shape in enumerate(shapes) if shape != shapes[0])
            raise InputError(f"{self.where}: {key} of item {row} is {list(shapes[row])}, of item 0 {list(shapes[0])}")
        array = np.asarray(values)
        kinds = {np.asarray(value).dtype.kind for value in values}
        if len(kinds) > 1 and not kinds <= {"i", "u"}:
            raise InputError(f"{self.where}: {key} are of several kinds, {plugins.shown(values[:3])}: give all alike")
        return array

    def names(self) -> tuple[str, ...]:
        """Its `class_names`. Raises InputError for what are no strings."""
        names = getattr(self.source, "class_names", None)
        if names is None:
            return ()
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{self.where}: class_names are {plugins.shown(names)}: give strings")
        return tuple(names)


_ATTRIBUTES = {"targets": "targets", "group": "groups"}
"""{part of an item: the attribute that has it of all items}."""


def _names(tree: Any) -> list[str] | None:
    """The names of several inputs; None of one array."""
    return sorted(tree) if isinstance(tree, dict) else None


def _shown(tree: Any) -> str:
    """The dtypes and shapes of inputs in words."""
    if isinstance(tree, dict):
        return ", ".join(f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in tree.items())
    return f"{tree.dtype}{list(tree.shape)}"
