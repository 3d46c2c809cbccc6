"""The examples that a fit learns from: resident on the device, or streamed to it, read ahead by threads.

Both give a step the same batch. `Data` holds all examples on the device, and a step gathers its rows. `Stream` reads
the rows of the steps to come from an `Examples` on the host, never more than `memory` bytes of them, and a step takes
a slice of the chunk that is on the device.
"""

import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from tljax.types import Examples, InputError

MEMORY = 500_000_000
"""Bytes of host memory for examples that are read ahead, where nothing else is said."""
_PIECE = 4 * 2**20
"""Bytes that a thread reads at once, about."""


@dataclass(frozen=True, eq=False)
class Data:
    """Examples on the device. `load` makes it of arrays."""

    inputs: Any
    """Leaves [views, n, ...]: one view for all fits, or of features of frozen prefixes one for each that differs."""
    targets: Any
    """Leaves [n, ...], common to all views. None where nothing is trained."""
    name: Hashable = field(default_factory=object)
    """What the features computed of the inputs are kept under: equal names mean equal inputs."""

    def __len__(self) -> int:
        return examples_of(self.inputs)


@dataclass(frozen=True, eq=False)
class Stream:
    """Examples that are read from the host as they are needed."""

    examples: Examples
    """Whose `inputs(rows)` threads call, and whose `targets` are read with them."""
    memory: int = MEMORY
    """Bytes of host memory for what is read ahead, the chunk that is trained on included."""
    what: str = "the examples"
    """What they are called in messages."""
    name: Hashable = field(default_factory=object)
    """As in `Data`."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def item_bytes(self) -> int:
        """Bytes of the inputs and of the targets of one example."""
        targets = sum(
            leaf.dtype.itemsize * math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(self.examples.targets)
        )
        return inputs_bytes(self.examples.spec) + targets


def inputs_bytes(spec: Any) -> int:
    """Bytes of the inputs of one example of a spec.

    >>> inputs_bytes({"image": jax.ShapeDtypeStruct((2, 2, 3), np.uint8), "age": jax.ShapeDtypeStruct((), np.float32)})
    16
    """
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(spec))


def load(arrays: Any, targets: Any = None, name: Hashable = None) -> Data:
    """Inputs and targets, leaves [n, ...] (arrays, memory maps), on this process's first device, each whole.

    Without a `name` the data have one of their own. Of many processes each reads its share of the rows from the file,
    and they exchange them once. They all need the whole: the next batch is any rows, and gathered from other machines
    it would be waited for in every step.
    """
    inputs = jax.tree.map(lambda leaf: jax.device_put(_whole(leaf)[None]), arrays)
    on_device = jax.tree.map(lambda leaf: jax.device_put(_whole(leaf)), targets)
    return Data(inputs, on_device) if name is None else Data(inputs, on_device, name)


def _whole(array: np.ndarray | jax.Array) -> np.ndarray:
    count = jax.process_count()
    if count == 1:
        return np.asarray(array)
    rows = -(-len(array) // count)
    start = rows * jax.process_index()
    share = np.zeros((rows, *array.shape[1:]), array.dtype)
    share[: max(0, min(rows, len(array) - start))] = array[start : start + rows]
    return multihost_utils.process_allgather(share, tiled=True)[: len(array)]


def views_of(inputs: Any) -> int:
    """How many views there are of inputs [views, n, ...]."""
    return len(jax.tree.leaves(inputs)[0])


def examples_of(inputs: Any) -> int:
    """How many examples a view of inputs [views, n, ...] has."""
    return int(jax.tree.leaves(inputs)[0].shape[1])


def batch_spec(data: Data | Stream, batch: int) -> Any:
    """Shapes and dtypes of the inputs of a batch of so many examples."""
    if isinstance(data, Stream):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype), data.examples.spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[2:]), leaf.dtype), data.inputs)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of examples, and zeros after them up to a length: examples themselves.

    >>> from tljax.types import ArrayExamples
    >>> part = Rows(ArrayExamples(np.array([[1], [2], [3]]), np.arange(3)), np.array([2, 0]), 4)
    >>> part.inputs(np.arange(4)).ravel().tolist(), len(part)
    ([3, 1, 0, 0], 4)
    """

    examples: Examples
    rows: np.ndarray
    """int [k]"""
    length: int
    """At least k."""
    arrays: Any = None
    groups: np.ndarray | None = None

    @property
    def targets(self) -> Any:
        """None: what is evaluated has its targets elsewhere."""
        return None

    @property
    def spec(self) -> Any:
        """Shapes and dtypes of the inputs of one example."""
        return self.examples.spec

    def __len__(self) -> int:
        return self.length

    def inputs(self, rows: np.ndarray) -> Any:
        """The inputs of some rows (int [k]) of these; zeros beyond the last."""
        filled = rows < len(self.rows)
        if filled.all():
            return self.examples.inputs(self.rows[rows])
        whole = jax.tree.map(lambda leaf: np.zeros((len(rows), *leaf.shape), leaf.dtype), self.spec)
        if filled.any():
            inputs = self.examples.inputs(self.rows[rows[filled]])
            for leaf, part in zip(jax.tree.leaves(whole), jax.tree.leaves(inputs), strict=True):
                leaf[filled] = part
        return whole


class Reader:
    """Reads rows of a stream ahead of who iterates over it, in the order of the requests.

    A request is (anything, rows int [...]). A row of -1 is padding, filled with row 0 as a gather of resident data
    fills it; places of UNSEEN stay as they are. Iterating gives `finish(anything, rows, inputs, targets)` of each, with
    leaves [..., *item] in NumPy; `finish` is called in a thread. At most `ahead` requests are finished or under way
    beside the one that was given last. To be closed, or used in a `with`.

    Raises InputError of one line, with the row, where a source fails, where what it gives is not as its `spec` says,
    or where its length has changed. Rows that are read together are read one by one to find that row; where each is
    right by itself, all are named.
    """

    def __init__(
        self,
        stream: Stream,
        requests: Iterable[tuple[Any, np.ndarray]],
        finish: Callable[[Any, np.ndarray, Any, Any], Any],
        ahead: int = 2,
    ) -> None:
        self.stream, self.finish = stream, finish
        self.waited = 0.0
        """Seconds for which results were waited for."""
        self._requests = iter(requests)
        self._length = len(stream)
        self._closing = threading.Event()
        threads = min(16, (os.cpu_count() or 1) + 4)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="examples")
        self._in_turn = ThreadPoolExecutor(1, thread_name_prefix="chunks")
        self._results: deque[Future[Any]] = deque()
        for _ in range(ahead):
            self._results.append(self._in_turn.submit(self._next))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what one is reading it ends reading."""
        self._closing.set()
        self._in_turn.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._results.clear()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._results:
            raise StopIteration
        since = time.perf_counter()
        result = self._results.popleft().result()
        self.waited += time.perf_counter() - since
        if result is _END:
            self.close()
            raise StopIteration
        self._results.append(self._in_turn.submit(self._next))
        return result

    def _next(self) -> Any:
        """The next request, read and finished; _END after the last."""
        request = next(self._requests, None)
        if request is None or self._closing.is_set():
            return _END
        anything, rows = request
        inputs = self._read(rows)
        targets = jax.tree.map(lambda leaf: np.asarray(leaf[np.maximum(rows, 0)]), self.stream.examples.targets)
        return self.finish(anything, rows, inputs, targets)

    def _read(self, rows: np.ndarray) -> Any:
        """The inputs of some rows, leaves [*rows.shape, *item]; threads read a piece each."""
        spec, flat = self.stream.examples.spec, rows.reshape(-1)
        outputs = jax.tree.map(lambda leaf: aligned((len(flat), *leaf.shape), np.dtype(leaf.dtype)), spec)
        filled = np.flatnonzero(flat >= 0)
        size = max(1, min(_PIECE // max(1, inputs_bytes(spec)), -(-len(filled) // self._threads)))
        pieces = [filled[start : start + size] for start in range(0, len(filled), size)]
        futures = [self._pool.submit(self._read_piece, outputs, flat, piece) for piece in pieces]
        for future in futures:
            future.result()
        if (flat == -1).any():
            for output, leaf in zip(jax.tree.leaves(outputs), jax.tree.leaves(self._first_row), strict=True):
                output[flat == -1] = leaf
        return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape, *leaf.shape[1:]), outputs)

    @functools.cached_property
    def _first_row(self) -> Any:
        """The inputs of row 0, leaves [1, *item]."""
        return self._checked(np.zeros(1, np.int64))

    def _read_piece(self, outputs: Any, rows: np.ndarray, places: np.ndarray) -> None:
        """Fill some places of the outputs with the rows that stand there."""
        if self._closing.is_set():
            return
        inputs = self._checked(rows[places])
        for output, leaf in zip(jax.tree.leaves(outputs), jax.tree.leaves(inputs), strict=True):
            output[places] = leaf

    def _checked(self, rows: np.ndarray) -> Any:
        """The inputs of some rows. Raises InputError if they cannot be read, or are not as they were declared."""
        try:
            return self._checked_at_once(rows)
        except InputError:
            for row in rows if len(rows) > 1 else ():  # which of them is it?
                if self._closing.is_set():
                    break
                self._checked_at_once(row[None])
            raise

    def _checked_at_once(self, rows: np.ndarray) -> Any:
        """As `_checked`; an error names all rows."""
        examples, what = self.stream.examples, self.stream.what
        try:
            inputs = examples.inputs(rows)
            length = len(examples)
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{what}: {_listed(rows)} cannot be read ({' '.join(reason.split())}): correct the source"
            ) from error
        if length != self._length:
            raise InputError(
                f"{what}: they were {self._length:,} and are {length:,} now: give a source whose length stays"
            )
        expected = jax.tree.map(lambda leaf: ((len(rows), *leaf.shape), np.dtype(leaf.dtype)), examples.spec)
        actual = jax.tree.map(lambda leaf: (np.shape(leaf), np.asarray(leaf).dtype), inputs)
        if actual != expected:
            verb, past = ("is", "was") if len(rows) == 1 else ("are", "were")
            raise InputError(
                f"{what}: {_listed(rows)} {verb} {_described(actual)}, and {past} declared {_described(expected)}: "
                "give every item one shape and dtype"
            )
        return inputs


_END = object()
UNSEEN = -2
"""In place of a row: nobody looks at what stands there."""


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that is not filled, and begins where a CPU device takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _listed(rows: np.ndarray) -> str:
    """Rows in a message: the first few of them."""
    numbers = [int(row) for row in rows[:5]]
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, numbers))}{more}"


def _described(tree: Any) -> str:
    """Shapes and dtypes of a tree of (shape, dtype)."""
    pairs = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, tuple) and isinstance(node[-1], np.dtype))
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in pairs)


def chunk_steps(stream: Stream, examples: int, most: int) -> tuple[int, int]:
    """(steps of a chunk, chunks read ahead) for steps of so many `examples`: at most `most` steps.

    The chunk that is trained on, those ahead and what the threads hold are together no more than `stream.memory`.
    Raises InputError if not even two batches are.

    >>> from tljax.types import ArrayExamples
    >>> stream = Stream(ArrayExamples(np.zeros((9, 250), np.float32), np.zeros(9, np.int32)), memory=10**6)
    >>> chunk_steps(stream, 10, 1000)
    (24, 2)
    """
    size = stream.item_bytes * examples
    if stream.memory < 2 * size:
        raise InputError(
            f"two batches of {stream.what} are {2 * size:,} bytes: give as much, or a smaller `batch_size=`",
            field="stream_memory",
            value=f"{stream.memory}",
        )
    steps = min(most, stream.memory // (4 * size))
    return (steps, 2) if steps else (1, 1)


LONGEST_READ = 3.0
"""Seconds that reading a chunk is meant to take at most: until it is there a fit cannot be stopped."""


def growing(
    start: int, stop: int, first: int, most: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[int, int]]:
    """Stretches (begin, end) of steps that grow from `first` twofold to `most`: the first is soon there.

    They shrink again where it takes longer than LONGEST_READ until the next is asked for.

    >>> list(growing(0, 50, 8, 20))
    [(0, 8), (8, 24), (24, 44), (44, 50)]
    """
    length = min(first, most)
    while start < stop:
        since = clock()
        yield start, min(stop, start + length)
        start, quick = start + length, clock() - since < LONGEST_READ
        length = min(most, 2 * length) if quick else max(1, length // 2)


def batch_within(stream: Stream, batch: int) -> int:
    """So many examples as `batch`, or as many as memory holds two batches of."""
    return max(1, min(batch, stream.memory // (2 * max(1, inputs_bytes(stream.examples.spec)))))


def batches(stream: Stream, batch: int, finish: Callable[[Any], Any], most: int = 16) -> Reader:
    """All examples in their order, read ahead: (how many, `finish(inputs)`) of each chunk.

    Inputs are leaves [batches, batch, ...], at most `most` of them and as many in every chunk; the last is filled up
    with row 0. The targets are not read.
    """
    size = max(1, inputs_bytes(stream.examples.spec)) * batch
    total = -(-len(stream) // batch)
    chunks = -(-total // max(1, min(most, stream.memory // (4 * size))))
    length = -(-total // chunks) * batch
    alone = replace(stream, examples=Rows(stream.examples, np.arange(len(stream)), len(stream)))

    def requests() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(stream), length):
            rows = np.arange(start, start + length)
            yield min(length, len(stream) - start), np.where(rows < len(stream), rows, -1).reshape(-1, batch)

    ahead = 2 if stream.memory >= 4 * size else 1
    return Reader(alone, requests(), lambda count, rows, inputs, targets: (count, finish(inputs)), ahead)


def total_bytes(examples: Examples) -> int:
    """Bytes of all inputs."""
    return inputs_bytes(examples.spec) * len(examples)


PART_OF_MEMORY = 0.25
"""The part of a device's memory up to which the inputs of a split are held on it."""


def is_streamed(examples: Examples, data: str, devices: Sequence[Any] = (), what: str = "the examples") -> bool:
    """Whether examples are streamed, where `data` is 'resident', 'streamed' or 'auto': as each device has room.

    Raises InputError if they are to be resident and can only be read by row.
    """
    if data == "resident" and examples.arrays is None:
        raise InputError(f"{what} are read by row: give streamed or auto", field="data", value=data)
    if data != "auto":
        return data == "streamed"
    return examples.arrays is None or total_bytes(examples) > PART_OF_MEMORY * _memory_of(devices)


def _memory_of(devices: Sequence[Any]) -> float:
    """Bytes of memory of each of the devices; of those of a CPU, which share it, each has its part. Infinite if it is
    not known."""
    device = devices[0] if devices else jax.local_devices()[0]
    if device.platform != "cpu":
        return float((device.memory_stats() or {}).get("bytes_limit", math.inf))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return math.inf
    return memory / max(1, len(devices))
