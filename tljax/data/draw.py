"""Draws from a seed: the order of the examples, and which of them a label budget holds.

All of it comes from the words of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
sorted. NumPy promises the words of a bit generator to stay the same in every version, which it does not promise of
`Generator.permutation` and its like (NEP 19); so one seed means one order, on any machine, for good.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tljax.types import InputError, Task

# The second word of the Philox key keeps the streams of one seed apart.
ORDER, _MEMBERS, _TURNS, SHUFFLE, PIXELS, TRAIN_NOISE, TEST_NOISE, SAMPLE = range(8)


def words(seed: int, stream: int, first: int, rows: int, n: int) -> np.ndarray:
    """uint64 [rows, n]: rows first .. first + rows of a stream of Philox; each row has its own counters.

    Raises InputError for a seed outside 0..2**64-1.

    >>> bool((words(0, PIXELS, 1, 2, 5) == words(0, PIXELS, 0, 3, 5)[1:]).all())
    True
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed {seed} is outside 0..2**64-1: give a seed that is not negative")
    counters = -(-n // 4)  # one counter gives four words
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=first * counters)
    return generator.random_raw(rows * counters * 4).reshape(rows, -1)[:, :n]


def order(
    seed: int, n: int, batch: int, start: int, stop: int, *, epochs: bool, subset: np.ndarray | None = None
) -> np.ndarray:
    """Steps start .. stop of the order of `n` examples: int32 [stop - start, batch].

    With `epochs` each epoch is ceil(n / batch) rows, the last one filled up with -1 (an example of weight 0).
    Without, the rows run on through one permutation after the other, so no row is short and batch > n is fine.
    An epoch is the stable argsort of n words of Philox with key (seed, 0), from counter epoch * ceil(n / 4) on.
    Rows depend on (seed, n, batch, step) alone: any stretch can be drawn without those before it. `subset`
    (int32 [n]) puts its own entries for the positions 0 .. n - 1.

    >>> order(0, 5, 2, 0, 3, epochs=True).tolist()
    [[0, 2], [1, 4], [3, -1]]
    """
    if subset is not None and len(subset) != n:
        raise InputError(f"the subset holds {len(subset)} examples, not {n}: n is the length of the subset")
    if n < 1 or batch < 1:
        raise InputError(f"an order of {n} examples in batches of {batch}: both must be at least 1")
    if stop <= start:
        return np.empty((0, batch), np.int32)
    length = -(-n // batch) * batch if epochs else n
    first, last = start * batch // length, -(-stop * batch // length)
    positions = np.full((last - first, length), -1, np.int32)
    positions[:, :n] = permutations(seed, n, first, last)
    rows = positions.reshape(-1)[start * batch - first * length : stop * batch - first * length]
    if subset is not None:
        rows = np.where(rows < 0, np.int32(-1), np.asarray(subset, np.int32)[rows])
    return rows.reshape(stop - start, batch)


@dataclass(frozen=True, eq=False)
class Order:
    """An order to train in, as `order` has it: called with (start, stop), it gives int32 [stop - start, batch].

    >>> Order(0, 5, 2, epochs=True)(0, 3).tolist()
    [[0, 2], [1, 4], [3, -1]]
    """

    seed: int
    n: int
    batch: int
    epochs: bool
    subset: np.ndarray | None = None

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return order(self.seed, self.n, self.batch, start, stop, epochs=self.epochs, subset=self.subset)

    @property
    def length(self) -> int:
        """Places of an epoch in the rows: its examples, and with `epochs` the -1 that fill its last row."""
        return -(-self.n // self.batch) * self.batch if self.epochs else self.n


def permutations(seed: int, n: int, first: int, last: int) -> np.ndarray:
    """The epochs first .. last of the order of `n` examples: int32 [last - first, n].

    Fits, phases and calls that follow one another ask for the same epochs: those drawn lately are remembered.

    >>> permutations(0, 5, 0, 1).tolist()
    [[0, 2, 1, 4, 3]]
    """
    return _DRAWN.epochs(seed, n, first, last)


def sorting(drawn: np.ndarray) -> np.ndarray:
    """The stable argsort of each row of words uint64 [rows, n]: int32 [rows, n].

    The number of a word takes the place of its lowest bits, and numbers are sorted, not places: a tenth of the time of
    NumPy's stable argsort (0.6 for 6.1 ms at 60,000; 2026-11-27, NumPy 2.4, one core with AVX-512). Where two words
    agree in all other bits, and the rest would decide, it is that argsort (one row of 75,000 at 60,000).
    """
    n = drawn.shape[1]
    bits = np.uint64(max(1, (n - 1).bit_length()))
    low = np.uint64((1 << int(bits)) - 1)
    packed = (drawn & ~low) | np.arange(n, dtype=np.uint64)
    packed.sort(axis=1)
    places = (packed & low).astype(np.int32)
    packed >>= bits
    for row in np.flatnonzero((packed[:, 1:] == packed[:, :-1]).any(1)):
        places[row] = np.argsort(drawn[row], kind="stable")
    return places


_OF_AN_ENTRY = 400
"""Bytes that Python takes for an epoch beside its numbers, about."""


class _Drawn:
    """The epochs that were drawn lately, by (seed, examples, epoch): at most so many bytes of them."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.rows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self.lock = threading.Lock()  # threads that read ahead ask too

    def epochs(self, seed: int, n: int, first: int, last: int) -> np.ndarray:
        with self.lock:
            known = {epoch: self.rows.get((seed, n, epoch)) for epoch in range(first, last)}
            missing = [epoch for epoch, row in known.items() if row is None]
            if missing:
                begin, end = missing[0], missing[-1] + 1
                drawn = sorting(words(seed, ORDER, begin, end - begin, n))
                known |= {epoch: drawn[epoch - begin] for epoch in range(begin, end)}
            for epoch, row in known.items():
                self._keep((seed, n, epoch), row)
            return np.stack([row for row in known.values() if row is not None])

    def _keep(self, key: tuple[int, int, int], row: np.ndarray | None) -> None:
        """Remember an epoch as the latest, and forget the earliest beyond what there is room for."""
        assert row is not None
        if key not in self.rows:
            self.held += row.nbytes + _OF_AN_ENTRY
        self.rows[key] = row
        self.rows.move_to_end(key)
        while self.held > self.most:
            self.held -= self.rows.popitem(last=False)[1].nbytes + _OF_AN_ENTRY


_DRAWN = _Drawn(256_000_000)


def strata(task: Task) -> np.ndarray:
    """What a draw of training examples is balanced over, int [n]: the classes; one for all where there are none.

    >>> from tljax.data import load
    >>> strata(load("mnist_10k")).shape
    (10000,)
    """
    targets = np.asarray(task.train.targets)
    return targets if task.kind == "classes" else np.zeros(len(targets), np.int32)


def label_budget(seed: int, labels: np.ndarray, total: int) -> np.ndarray:
    """The `total` examples that are labelled, balanced over the classes: int32 [total] indices.

    One sequence a seed, cut at `total`: a smaller budget is the beginning of a larger one. The sequence goes in
    rounds, and in a round each class gives one example that it has not given, in an order of classes drawn for the
    round; so total = k * classes holds k a class, and a remainder falls to drawn classes. A class that has given
    all it has is passed over and the others go on. Of labels that are all the same it is a plain draw. Raises
    InputError for more than there are, or less than one a class that occurs in `labels` (int [n]).

    >>> label_budget(0, np.array([0, 0, 0, 1, 1, 1]), 4).tolist()
    [5, 2, 3, 1]
    """
    n = len(labels)
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if not len(counts) <= total <= n:
        least = f"{len(counts)} (one a class)" if len(counts) > 1 else "1"
        raise InputError(f"a label budget of {total}: give {least} to {n} (all)")
    shuffled = np.argsort(words(seed, _MEMBERS, 0, 1, n)[0], kind="stable")
    grouped = shuffled[np.argsort(codes[shuffled], kind="stable")]
    codes = codes[grouped]
    rounds = np.arange(n) - (np.cumsum(counts) - counts)[codes]
    turns = words(seed, _TURNS, 0, int(counts.max()), len(counts))[rounds, codes]
    return grouped[np.lexsort((turns, rounds))[:total]].astype(np.int32)


def validation_split(labels: np.ndarray, chosen: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """`chosen` (int32 [m]) in two parts, training and validation, each in the order of `chosen`.

    Within a class, example r = 0, 1, ... of `chosen` validates if floor((r + 1) * fraction) > floor(r * fraction),
    so both parts are balanced, and the parts of a smaller label budget lie within those of a larger. Raises
    InputError for a fraction outside [0, 1), or one above 0 that leaves nothing to validate on.

    >>> train, validation = validation_split(np.zeros(4, int), np.arange(4), 0.5)
    >>> train.tolist(), validation.tolist()
    ([0, 2], [1, 3])
    """
    if not 0 <= fraction < 1:
        raise InputError(f"validation fraction {fraction} is outside [0, 1): give 0 for none, or such as 0.2")
    chosen = np.asarray(chosen, np.int32)
    _, codes, counts = np.unique(np.asarray(labels)[chosen], return_inverse=True, return_counts=True)
    grouped = np.argsort(codes, kind="stable")
    rank = np.empty(len(chosen), np.int64)
    rank[grouped] = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    # As the decimal that was written: in binary 0.29 * 100 is a little under 29.
    exact = Fraction(fraction).limit_denominator(1_000_000)
    up, down = exact.numerator, exact.denominator
    validates = (rank + 1) * up // down > rank * up // down
    if fraction and not validates.any():
        raise InputError(
            f"validation fraction {fraction} of {len(chosen)} examples, at most {max(counts, default=0)} a class, "
            "holds none out: raise the fraction or the label budget"
        )
    return chosen[~validates], chosen[validates]
