"""How often verdicts on real fits are wrong, and how often their intervals hold: fits against themselves and others.

Run by hand: `python tests/real_pairs.py [--fits=FILE.npz] [--studies=1000] [--tasks=clothes,digits]`. It trains
thousands of networks by code of its own (or reads those that an earlier call left in FILE.npz), and prints Markdown
tables, the same for the same flags and fits. Under each of 60 seeds a source is trained on its task; from it, and from
scratch, 21 networks learn the same 100 labels of the target, each with a head and an order of its own. So there are
60 x 21 fits of either kind, which differ by chance alone: 1,200 pairs that share no fit.

A study draws seeds and test items, or families of them, with replacement: the truth is the mean over all there are. In
a study of fits against themselves all are of one kind, dealt out at random, and every difference is 0. A planted effect
turns wrong answers of one arm into right ones: twice as often on half of the items, and in some fits three times as
often as in others. A study is looked at after every round of `tljax.study.sequences.rounds`, up to 40 seeds, and
nothing stops it: what is counted is whether any look was wrong.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax import data
from tljax.study import sequences, statistics

SEEDS, REPLICATES, LABELS, HIDDEN = 60, 21, 100, 32
TASKS = {"clothes": ("mnist_10k", "fashion_mnist_10k"), "digits": ("glyphs_capitals", "glyphs_digits")}
MARGIN = 0.005


class Fits(NamedTuple):
    """Right or wrong of real fits, bool [kinds, seeds, replicates, items], and which items are alike, int [items]."""

    right: np.ndarray
    groups: np.ndarray | None


def _logits(params: Sequence[jax.Array], images: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params[0] + params[1][None])
    return hidden @ params[2] + params[3][None]


def _drawn(key: jax.Array, pixels: int, classes: int) -> tuple[jax.Array, ...]:
    first, last = jax.random.split(key)
    hidden = jax.random.normal(first, (pixels, HIDDEN)) * math.sqrt(2 / pixels)
    head = jax.random.normal(last, (HIDDEN, classes)) * math.sqrt(1 / HIDDEN)
    return hidden, jnp.zeros(HIDDEN), head, jnp.zeros(classes)


def _trained(params, images, labels, order, rate=0.1):
    """Plain SGD over the rows of `order`, int [steps, batch]."""

    def loss(params, rows):
        log_p = jax.nn.log_softmax(_logits(params, images[rows]))
        return -jnp.take_along_axis(log_p, labels[rows][:, None], 1).mean()

    def step(params, rows):
        gradients = jax.grad(loss)(params, rows)
        return tuple(p - rate * g for p, g in zip(params, gradients, strict=True)), None

    return jax.lax.scan(step, params, order)[0]


def train(source: str, target: str) -> Fits:
    """The fits of one pair of tasks, a seed at a time."""
    first, second = data.load(source), data.load(target)
    flat = lambda split: jnp.asarray(split.arrays, jnp.float32).reshape(len(split.targets), -1) / 255  # noqa: E731
    images, labels = flat(first.train), jnp.asarray(first.train.targets)
    train_images, train_labels = flat(second.train), np.asarray(second.train.targets)
    tests, answers = flat(second.test), jnp.asarray(second.test.targets)
    pixels = images.shape[1]

    @jax.jit
    def of_seed(key, subset):
        head, order, rest = jax.random.split(key, 3)
        rows = jax.random.randint(order, (150, 32), 0, len(images))
        start = _trained(_drawn(head, pixels, first.outputs), images, labels, rows)

        def fit(key, transfers):
            draw, order = jax.random.split(key)
            fresh = _drawn(draw, pixels, second.outputs)
            params = (start[0], start[1], fresh[2], fresh[3]) if transfers else fresh
            rows = jax.random.randint(order, (60, 25), 0, LABELS)
            ended = _trained(params, train_images[subset], jnp.asarray(train_labels)[subset], rows)
            return _logits(ended, tests).argmax(1) == answers

        keys = jax.random.split(rest, (2, REPLICATES))
        return jnp.stack([jax.vmap(lambda key, kind=kind: fit(key, kind == 1))(keys[kind]) for kind in (0, 1)])

    right = []
    for seed in range(SEEDS):
        subset = np.random.default_rng(seed).permutation(len(train_labels))[:LABELS]
        right.append(np.asarray(of_seed(jax.random.key(seed), subset)))
    groups = second.test.groups
    return Fits(np.stack(right, 1), None if groups is None else np.unique(groups, return_inverse=True)[1])


# Studies of them


class Drawn(NamedTuple):
    """A study: differences [m, fits, items] of m comparisons with one base, their truths [m], groups of items."""

    differences: np.ndarray
    truths: np.ndarray
    groups: np.ndarray | None


def _items(rng: np.random.Generator, groups: np.ndarray | None, items: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Items drawn with replacement, or the items of groups that are: a group that comes twice is two groups."""
    if groups is None:
        return rng.integers(0, items, items), None
    rows = [np.flatnonzero(groups == group) for group in rng.integers(0, groups.max() + 1, groups.max() + 1)]
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), list(map(len, rows)))


def study(rng: np.random.Generator, fits: Fits, m: int, seeds: int, effect: str = "none") -> Drawn:
    """A study of m comparisons: of one kind with itself, with a planted effect, or of the two kinds ("real")."""
    kinds, many, replicates, items = fits.right.shape
    base_kind = 0 if effect == "real" else rng.integers(kinds)
    arm_kind = 1 if effect == "real" else base_kind
    chosen, (rows, groups) = rng.integers(0, many, seeds), _items(rng, fits.groups, items)
    dealt = np.array([rng.permutation(replicates)[: m + 1] for _ in range(seeds)])
    base = fits.right[base_kind, chosen, dealt[:, 0]][:, rows]
    arms = np.stack([fits.right[arm_kind, chosen, dealt[:, 1 + arm]][:, rows] for arm in range(m)])
    truth = fits.right[arm_kind].mean((0, 1)) - fits.right[base_kind].mean((0, 1))
    if effect == "planted":
        share = np.where(np.arange(items) % 4 < 2, 0.04, 0.08)
        more = rng.choice([0.5, 1.5], (m, seeds, 1))
        arms = arms | (rng.random(arms.shape) < share[rows] * more)
        truth = (1 - fits.right[arm_kind].mean((0, 1))) * share
    return Drawn(arms.astype(float) - base, np.full(m, truth.mean()), groups)


def share(count: float, studies: int) -> str:
    """A share in % with its standard error."""
    p = count / studies
    return f"{100 * p:.1f} ± {100 * math.sqrt(max(p * (1 - p), 1 / studies) / studies):.1f}"


def wrong_at_once(rng: np.random.Generator, fits: Fits, m: int, seeds: int, studies: int) -> str:
    """Studies of fits against themselves with a word that says otherwise, of a number of seeds that was planned."""
    wrong = 0
    for _ in range(studies):
        drawn = study(rng, fits, m, seeds)
        words = [each.word for each in statistics.verdicts(list(drawn.differences), MARGIN, groups=drawn.groups)]
        wrong += any(word in ("positive", "negative") for word in words)
    return share(wrong, studies)


LOOKS = np.cumsum([len(seeds) for seeds in sequences.rounds([0], 40)])


def wrong_at_any_time(rng: np.random.Generator, fits: Fits, m: int, studies: int) -> str:
    """The same, where any look at a sequence was wrong."""
    wrong = 0
    for _ in range(studies):
        drawn = study(rng, fits, m, 40)
        for seeds in LOOKS:
            arms = [arm[:seeds] for arm in drawn.differences]
            words = [each.word for each in sequences.verdicts(arms, MARGIN, groups=drawn.groups)]
            if any(word in ("positive", "negative") for word in words):
                wrong += 1
                break
    return share(wrong, studies)


def covered(rng: np.random.Generator, fits: Fits, effect: str, seeds: int, studies: int) -> str:
    """Studies of a number of seeds that was planned whose interval holds the truth."""
    count = 0
    for _ in range(studies):
        drawn = study(rng, fits, 1, seeds, effect)
        interval = statistics.crossed(drawn.differences[0], 0.95, drawn.groups)
        count += interval.low <= drawn.truths[0] <= interval.high
    return share(count, studies)


def covered_at_any_time(rng: np.random.Generator, fits: Fits, effect: str, studies: int) -> tuple[str, str, str]:
    """(always, where it stops, seeds it takes): studies whose intervals hold the truth; looks stop at a word."""
    always, stopped, taken = 0, 0, 0
    for _ in range(studies):
        drawn = study(rng, fits, 1, 40, effect)
        holds, end = [], 0
        for seeds in LOOKS:
            (verdict,) = sequences.verdicts([drawn.differences[0][:seeds]], MARGIN, groups=drawn.groups)
            holds.append(verdict.interval.low <= drawn.truths[0] <= verdict.interval.high)
            if not end and (verdict.settled or seeds == 40):
                end = len(holds)
                taken += seeds
        always += all(holds)
        stopped += holds[end - 1]
    return share(always, studies), share(stopped, studies), f"{taken / studies:.1f}"


def read(file: Path | None) -> dict[str, Fits]:
    """The fits in a file, trained where there is none."""
    if file is None or not file.is_file():
        trained = {name: train(*tasks) for name, tasks in TASKS.items()}
        if file is not None:
            arrays = {f"{name}_right": np.packbits(fits.right, axis=-1) for name, fits in trained.items()}
            arrays |= {f"{name}_items": np.array(fits.right.shape[-1]) for name, fits in trained.items()}
            arrays |= {f"{name}_groups": fits.groups for name, fits in trained.items() if fits.groups is not None}
            np.savez(file, **arrays)
        return trained
    with np.load(file) as arrays:
        return {
            name: Fits(
                np.unpackbits(arrays[f"{name}_right"], axis=-1, count=int(arrays[f"{name}_items"])).astype(bool),
                arrays.get(f"{name}_groups"),
            )
            for name in TASKS
        }


def main(argv: Sequence[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--fits", type=Path)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", default=",".join(TASKS))
    flags = parser.parse_args(argv[1:])
    every = read(flags.fits)
    for name, fits in every.items():
        kinds = ", ".join(f"{100 * part.mean():.1f} %" for part in fits.right)
        groups = "" if fits.groups is None else f", in {fits.groups.max() + 1} groups"
        print(f"{name}: {fits.right[..., 0].size:,} fits of {fits.right.shape[-1]:,} items{groups}; accuracies {kinds}")
    chosen, studies = {name: every[name] for name in flags.tasks.split(",")}, flags.studies
    seeds_of = {name: [flags.seed, list(TASKS).index(name)] for name in chosen}
    print("\n| fits against themselves, % of studies wrong | 2 seeds | 3 | 5 | 10 | any look at 6 to 40 |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, fits in chosen.items():
        rng = np.random.default_rng([0, *seeds_of[name]])
        for m, fewer in ((1, 1), (8, 3), (20, 6)):
            number = max(studies // fewer, 1)
            cells = [wrong_at_once(rng, fits, m, seeds, number) for seeds in (2, 3, 5, 10)]
            cells.append(wrong_at_any_time(rng, fits, m, number))
            print(f"| {name}, a family of {m} ({number} studies) | {' | '.join(cells)} |", flush=True)
    print(
        "\n| % of studies whose 95 % hold the truth | 2 seeds | 3 | 5 | 10 | all looks | where it stops | seeds then |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, fits in chosen.items():
        rng = np.random.default_rng([1, *seeds_of[name]])
        for effect in ("none", "planted", "real"):
            cells = [covered(rng, fits, effect, seeds, studies) for seeds in (2, 3, 5, 10)]
            cells += covered_at_any_time(rng, fits, effect, studies)
            print(f"| {name}, {effect} effect | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv)
