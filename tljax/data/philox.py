"""Orders drawn on a device: the words of Philox, their stable sort, and the rows of batches, the integers of `draw`.

A device has no words of 64 bits unless JAX is told so: a word is two of 32, sorted by two keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.data.draw import ORDER

# Multipliers and what is added to the key after each round: Salmon et al. 2011, "Parallel random numbers: as easy as
# 1, 2, 3", of Philox4x64.
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_BUMPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_ROUNDS = 10

Word = tuple[Any, Any]
"""64 bits as (high, low), uint32 both: arrays or numbers."""


def halves(number: int) -> tuple[np.uint32, np.uint32]:
    """(High, low) of a number of 64 bits.

    >>> [int(half) for half in halves(2**32 + 5)]
    [1, 5]
    """
    return np.uint32(number >> 32), np.uint32(number & 0xFFFFFFFF)


def words(key: tuple[Word, Word], counter: Word) -> tuple[Word, Word, Word, Word]:
    """The four words of each counter, whose upper three words are 0, under a key of two words; ten rounds.

    >>> key, counter = (halves(0), halves(0)), halves(1)
    >>> hex(int(words(key, counter)[0][0]) << 32 | int(words(key, counter)[0][1]))
    '0x2f4ba6408e4d89b'
    >>> hex(int(np.random.Philox(key=np.zeros(2, np.uint64)).random_raw()))
    '0x2f4ba6408e4d89b'
    """
    zero = jnp.zeros_like(counter[1])
    state = (counter, (zero, zero), (zero, zero), (zero, zero))
    state, key = (jax.tree.map(lambda half: jnp.broadcast_to(half, zero.shape), part) for part in (state, key))

    def body(_: jax.Array, carry: tuple[tuple[Word, ...], tuple[Word, Word]]) -> tuple[tuple[Word, ...], Any]:
        (a, b, c, d), (k, m) = carry
        (high0, low0), (high1, low1) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        state = (_xor(high1, b, k), low1, _xor(high0, d, m), low0)
        return state, (_sum(k, halves(_BUMPS[0])), _sum(m, halves(_BUMPS[1])))

    return jax.lax.fori_loop(0, _ROUNDS, body, (state, key))[0]


def _xor(*words: Word) -> Word:
    highs, lows = zip(*words, strict=True)
    return functools.reduce(jnp.bitwise_xor, highs), functools.reduce(jnp.bitwise_xor, lows)


def _sum(a: Word, b: Word) -> Word:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def _product(word: Word, by: int) -> tuple[Word, Word]:
    """(High, low) 64 bits of a word times a number of 64 bits."""
    high, low = halves(by)
    (top, top_low), (left, left_low) = _wide(word[0], high), _wide(word[0], low)
    (right, right_low), (bottom, bottom_low) = _wide(word[1], high), _wide(word[1], low)
    zero = jnp.zeros_like(word[0])
    middle = _sum(_sum((zero, left_low), (zero, right_low)), (zero, bottom))
    upper = _sum(_sum((zero, left), (zero, right)), _sum((top, top_low), (zero, middle[0])))
    return upper, (middle[1], bottom_low)


def _wide(a: jax.Array, b: np.uint32) -> Word:
    """The product of two numbers of 32 bits, of which a device keeps the lower half alone: by halves of 16."""
    low16 = np.uint32(0xFFFF)
    a1, a0, b1, b0 = a >> 16, a & low16, b >> np.uint32(16), b & low16
    bottom, left, right = a0 * b0, a1 * b0, a0 * b1
    middle = (bottom >> 16) + (left & low16) + (right & low16)
    return a1 * b1 + (left >> 16) + (right >> 16) + (middle >> 16), bottom & low16 | middle << 16


@functools.partial(jax.jit, static_argnames=("n", "epochs"))
def permutations(seeds: jax.Array, first: jax.Array, *, n: int, epochs: int) -> jax.Array:
    """Epochs of the orders of `n` examples, int32 [orders, epochs, n], as `draw.permutations` has them.

    `seeds` are uint32 [orders, 2] (high, low), and `first` is uint32 [2]: the counter of the first epoch, its number
    times ceil(n / 4).

    >>> permutations(jnp.zeros((1, 2), jnp.uint32), jnp.zeros(2, jnp.uint32), n=5, epochs=1).tolist()
    [[[0, 2, 1, 4, 3]]]
    """
    counters = -(-n // 4)
    number = jnp.arange(1, epochs * counters + 1, dtype=jnp.uint32)[None]  # NumPy counts on before it draws
    counter = _sum((first[0][None, None], first[1][None, None]), (jnp.zeros_like(number), number))
    seed = seeds[:, 0, None], seeds[:, 1, None]
    counter = jax.tree.map(lambda half: jnp.broadcast_to(half, (len(seeds), epochs * counters)), counter)
    high, low = (
        jnp.stack(halves_of_four, -1).reshape(len(seeds), epochs, 4 * counters)[..., :n]
        for halves_of_four in zip(*words((seed, halves(ORDER)), counter), strict=True)
    )
    places = jax.lax.broadcasted_iota(jnp.int32, high.shape, 2)
    return jax.lax.sort((high, low, places), num_keys=2, is_stable=True)[2]


@functools.partial(jax.jit, static_argnames=("rows", "batch", "by_epochs", "width"))
def rows_of(
    drawn: jax.Array,
    subset: jax.Array | None,
    which: jax.Array,
    start: jax.Array,
    *,
    rows: int,
    batch: int,
    by_epochs: bool,
    width: int,
) -> jax.Array:
    """So many rows of batches from place `start` of drawn epochs on: int32 [len(which), rows, width].

    `drawn` is int32 [orders, epochs, n] as `permutations` gives it; with `by_epochs` the last batch of each epoch is
    filled up with -1. `subset` int32 [orders, n], or [1, n] for all, puts its entries for the positions. `which` says
    of each order that is wanted which of those drawn it is. Rows beyond those drawn, and places from `batch` to
    `width`, are -1.
    """
    orders, _, n = drawn.shape
    if subset is not None:
        drawn = jnp.take_along_axis(jnp.broadcast_to(subset, (orders, n))[:, None], drawn, -1)
    further = -(-n // batch) * batch - n if by_epochs else 0
    places = jnp.pad(drawn, ((0, 0), (0, 0), (0, further)), constant_values=-1).reshape(orders, -1)
    places = jnp.pad(places, ((0, 0), (0, rows * batch)), constant_values=-1)
    cut = jax.lax.dynamic_slice_in_dim(places, start, rows * batch, 1).reshape(orders, rows, batch)
    return jnp.pad(cut, ((0, 0), (0, 0), (0, width - batch)), constant_values=-1)[which]
