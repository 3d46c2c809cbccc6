"""How often the intervals and words of `tljax.study.statistics` hold, in studies whose truth is known.

Run by hand: `python tests/simulate_verdicts.py [--replications=1000] [--rows=single,few] [--seed=1]`. It prints
Markdown tables, the same for the same flags. Where there are two figures, the first is of the formula that tljax had
first (`before`), the second of `tljax.study.statistics`. One standard error of a share p is
sqrt(p (1 - p) / replications): 0.7 % of 95 % in 1,000.

A study is right or wrong of two arms, `fits` each, on the same items: a threshold on normal effects of the draw that
both arms share, of each fit, of the item, of the arm on the item, and of all together. Items of a group share theirs.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from tljax.study import statistics

BLOCK = 2_000_000
"""Scores that are held at once."""


class Study(NamedTuple):
    """How right answers come about: standard deviations of the effects under a threshold on their sum."""

    mean: float = 1.4
    draw: float = 0.1
    fit: float = 0.1
    item: float = 1.2
    arm: float = 0.4
    """Of an arm on an item: what makes the first arm better on some items and worse on others."""
    rest: float = 0.6
    alike: float = 0.0
    """Correlation of the rests of both arms."""
    skewed: bool = False
    """Fits differ by a long tail of bad ones."""
    fail: float = 0.0
    """Share of fits, of either arm, that fail."""
    by_size: float = 0.0
    """How much better the first arm is on the items of groups of twice the mean size than on those of the mean size."""

    @property
    def sd(self) -> float:
        return math.sqrt(self.draw**2 + self.fit**2 + self.item**2 + self.arm**2 + self.rest**2)

    def accuracy(self, better: float = 0.0) -> float:
        return float(special.ndtr((self.mean + better) / self.sd))

    def difference(self, better: float) -> float:
        return self.accuracy(better) - self.accuracy()

    def better(self, difference: float) -> float:
        """What the first arm has to be better by, that accuracies differ so."""
        return float(special.ndtri(self.accuracy() + difference) * self.sd - self.mean)


def scores(
    rng: np.random.Generator,
    study: Study,
    better: np.ndarray,
    fits: int,
    groups: np.ndarray,
    *,
    together: bool = False,
) -> np.ndarray:
    """Float [m, fits, items] of as many arms as `better` [m] has; `together` they are against the same scratch."""
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    m, items = len(better), len(groups)
    bases, many = 1 if together else m, groups[-1] + 1
    spread = lambda z: z if many == items else z[:, :, groups]  # noqa: E731
    shared = study.draw * normal(bases, fits, 1) + study.item * spread(normal(bases, 1, many))
    alike = normal(bases, fits, items) if study.alike else 0
    sizes = np.bincount(groups)[groups] / (items / many) - 1

    def right(arms: int, better: np.ndarray) -> np.ndarray:
        fit = 1 - rng.exponential(size=(arms, fits, 1)).astype(np.float32) if study.skewed else normal(arms, fits, 1)
        shift = study.fit * fit - 6 * (rng.random((arms, fits, 1)) < study.fail) if study.fail else study.fit * fit
        rest = math.sqrt(study.alike) * alike + math.sqrt(1 - study.alike) * normal(arms, fits, items)
        effects = shared + shift + study.arm * spread(normal(arms, 1, many)) + study.rest * rest
        return effects + (study.mean + better).astype(np.float32) > 0

    first = right(m, better[:, None, None] + study.by_size * sizes)
    return first.astype(float) - right(bases, np.zeros(1))


def before(squares: statistics.Squares, fits: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors and degrees by the formula that tljax had: A >= E / items, nothing added to B, no groups."""
    a, b, e = (np.diag(part) for part in squares)
    a, more = np.maximum(a, e / items), np.maximum(b - e, 0)
    few = a * (fits - 1) / special.chdtri(fits - 1, 0.9)
    spread = few**2 / (fits - 1) + np.where(b > e, b**2 + e**2 / (fits - 1), 0) / (items - 1)
    degrees = np.where(spread > 0, (few + more) ** 2 / np.where(spread > 0, spread, 1), fits - 1)
    return np.sqrt((a + more) / (fits * items)), degrees


class Moments(NamedTuple):
    """Of m comparisons, float [m] each."""

    mean: np.ndarray
    error: np.ndarray
    degrees: np.ndarray

    def ends(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        half = stats.t.isf((1 - level) / 2, self.degrees) * self.error
        return self.mean - half, self.mean + half


def both(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[Moments, Moments]:
    """Before and after."""
    _, fits, items = values.shape
    mean, old = values.mean((1, 2)), statistics.mean_squares(values)
    linear, named = statistics.by_group(values, groups)
    squares = old if linear is values else statistics.mean_squares(linear)
    new = statistics.standard_errors(squares, fits, linear.shape[2], statistics.unseen_items(linear, named))
    return Moments(mean, *before(old, fits, items)), Moments(mean, *new)


def blocks(replications: int, fits: int, items: int) -> Iterator[int]:
    most = max(1, min(200, BLOCK // (fits * items)))
    while replications > 0:
        yield min(most, replications)
        replications -= most


def joined(parts: Iterable[tuple[Moments, Moments]]) -> tuple[Moments, Moments]:
    return tuple(  # type: ignore[return-value]
        Moments(*(np.concatenate(field) for field in zip(*moments, strict=True)))
        for moments in zip(*parts, strict=True)
    )


def simulated(
    rng: np.random.Generator, study: Study, better: float, fits: int, groups: np.ndarray, replications: int
) -> tuple[Moments, Moments]:
    """Comparisons one by one; each has its own scratch."""
    named = None if groups[-1] + 1 == len(groups) else groups
    return joined(
        both(scores(rng, study, np.full(block, better), fits, groups), named)
        for block in blocks(replications, fits, len(groups))
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def covered(moments: Moments, truth: float) -> str:
    """Coverage of the 95 % interval, and how often it is wholly below / above the truth."""
    low, high = moments.ends()
    below, above = np.mean(high < truth), np.mean(low > truth)
    return f"{percent(1 - below - above)} ({percent(below)}/{percent(above)})"


def wider(old: Moments, new: Moments) -> str:
    """Mean half-width after over before."""
    halves = [np.mean(np.minimum(high - low, 2)) for low, high in (old.ends(), new.ends())]
    return f"x {halves[1] / halves[0]:.2f}"


def compared(old: Moments, new: Moments, truth: float) -> str:
    return f"{covered(old, truth)} -> {covered(new, truth)} {wider(old, new)}"


def table(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    heads = list(heads)
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


FITS = (2, 3, 5, 10)
SINGLE = {
    "typical, accuracy .80": (Study(), 0.0),
    "the same, better": (Study(), 0.35),
    "A/A, no arm x item effect": (Study(arm=0.0), 0.0),
    "near chance, fits vary much": (Study(-1.2, 0.3, 0.3, 1.0), 0.0),
    "near chance, better": (Study(-1.2, 0.3, 0.3, 1.0), 0.35),
    "errors of the arms correlate .8": (Study(arm=0.1, alike=0.8), 0.0),
    "items are all the variance": (Study(draw=0, fit=0, arm=0.8, rest=0.1), 0.35),
    "fits are all the variance": (Study(draw=0.5, fit=0.5, arm=0.0), 0.0),
    "skewed fits (exponential)": (Study(draw=0, fit=0.5, arm=0.1, skewed=True), 0.0),
    "10 % of fits fail, both arms alike": (Study(arm=0.2, fail=0.1), 0.0),
    "accuracy .99": (Study(4.0, item=1.5, arm=0.3, rest=0.5), 0.35),
    "accuracy .99, no difference": (Study(4.0, item=1.5, arm=0.3, rest=0.5), 0.0),
    "accuracy .997": (Study(4.8, item=1.5, arm=0.3, rest=0.5), 0.35),
    "accuracy .997, no difference": (Study(4.8, item=1.5, arm=0.3, rest=0.5), 0.0),
}


def single(rng: np.random.Generator, replications: int) -> None:
    def row(name: str) -> Iterator[str]:
        study, better = SINGLE[name]
        truth = study.difference(better)
        yield from (name, f"{100 * truth:+.2f}")
        for fits in FITS:
            yield compared(*simulated(rng, study, better, fits, np.arange(1000), replications), truth)

    title = (
        "Coverage (%) of the 95 % interval of one comparison, 1,000 items; in brackets wholly below / above the truth"
    )
    table(f"{title}; mean width.", ("generator", "truth", *(f"{fits} fits" for fits in FITS)), map(row, SINGLE))


def sizes(kind: str, items: int) -> np.ndarray:
    """Int [items]: the groups of items."""
    if kind.startswith("of "):
        return np.arange(items) // int(kind[3:])
    if kind == "1 to 39":
        each = np.resize(np.arange(1, 40, 2), items)
    elif kind == "half of one, half of 20":
        each = np.resize([20] + [1] * 20, items)
    else:  # a long tail
        each = np.round(stats.lognorm.ppf((np.arange(50) + 0.5) / 50, 1.0) * 12).astype(int) + 1
    return np.repeat(np.arange(len(each)), each)[:items]


STRONG, WEAK = Study(draw=0.05, fit=0.05, arm=0.6, rest=0.4), Study(draw=0.05, fit=0.05, arm=0.2, rest=0.4)
EVEN = Study(0.0, 0.05, 0.05, 0.5, 1.0, 1.0)
"""Half are right, and scores differ on most items."""
GROUPS = [
    ("of 2", 1000, STRONG),
    ("of 5", 1000, STRONG),
    ("of 20", 1000, STRONG),
    ("of 20", 1000, WEAK),
    ("1 to 39", 1000, STRONG),
    ("half of one, half of 20", 1000, STRONG),
    ("a long tail", 1000, STRONG),
    ("1 to 39", 1000, EVEN),
    ("half of one, half of 20", 1000, EVEN),
    ("a long tail", 1000, EVEN),
    *(("of 50", 50 * many, study) for study in (STRONG, EVEN) for many in (20, 10, 8, 5, 3)),
    *(("1 to 39", items, EVEN) for items in (400, 144, 100, 64)),
]


def grouped(rng: np.random.Generator, replications: int) -> None:
    def row(case: tuple[str, int, Study]) -> Iterator[str]:
        kind, items, study = case
        groups = sizes(kind, items)
        yield f"{kind}: {groups[-1] + 1} groups of {len(groups)} items"
        yield f"{study.accuracy():.2f}, {study.arm:g}"
        for fits in FITS:
            yield compared(*simulated(rng, study, 0.0, fits, groups, replications), 0.0)

    title = "Items in groups that are all equally hard and equally affected; after: the groups are named. Truth 0"
    table(f"{title}.", ("groups", "accuracy, arm x item", *(f"{fits} fits" for fits in FITS)), map(row, GROUPS))

    study = STRONG._replace(by_size=0.3)
    chances = np.array([1, 3, 10, 30])  # sizes, equally likely
    shifts = [study.by_size * (size / chances.mean() - 1) for size in chances]
    truth = float(np.average([study.difference(shift) for shift in shifts], weights=chances))
    groups_truth = float(np.mean([study.difference(shift) for shift in shifts]))

    def by_size(fits: int) -> str:
        parts = []
        for _ in range(replications):
            each = rng.choice(chances, 60)
            groups = np.repeat(np.arange(60), each)
            # The mean size is that of all groups there are, not of those drawn.
            shift = study._replace(by_size=study.by_size * len(groups) / 60 / chances.mean())
            late = study.by_size * (len(groups) / 60 / chances.mean() - 1)
            parts.append(both(scores(rng, shift, np.array([late]), fits, groups), groups))
        return compared(*joined(parts), truth)

    title = f"Sizes 1, 3, 10 or 30 drawn anew, larger groups won: over items {100 * truth:+.2f}, over groups"
    table(f"{title} {100 * groups_truth:+.2f}.", [f"{fits} fits" for fits in FITS], [map(by_size, FITS)])


RARE = Study(4.3, 0.05, 0.05, 1.5, 0.2, 0.7)
AGREE = Study(4.3, 0.0, 0.0, 1.5, 0.2, 0.05)
"""All fits of an arm err on the same items."""


def wrong_within(moments: Moments, margin: float) -> float:
    low, high = moments.ends(0.9)
    return float(np.mean((low > -margin) & (high < margin)))


def equivalent(rng: np.random.Generator, replications: int) -> None:
    cases = [
        *((RARE, "rare", fits, items, 0.005) for fits, items in ((2, 100), (3, 100), (5, 100), (3, 500), (10, 500))),
        *(
            (AGREE, "fits agree", fits, 100, margin)
            for fits, margin in itertools.product(FITS, (0.01, 0.02, 0.04, 0.08))
        ),
        *((RARE, "rare", fits, 1000, margin) for fits, margin in itertools.product(FITS, (0.002, 0.005, 0.01))),
    ]

    def row(case: tuple[Study, str, int, int, float]) -> Iterator[str]:
        study, name, fits, items, margin = case
        # The truth is the margin, below and above in turn.
        study = study._replace(mean=special.ndtri(0.995 if margin < 0.02 else 0.9) * study.sd)
        versions = simulated(rng, study, study.better(-margin), fits, np.arange(items), replications)
        yield from (name, str(fits), str(items), f"{100 * margin:g}")
        low, high = zip(*(moments.ends() for moments in versions), strict=True)
        yield " -> ".join(percent(wrong_within(moments, margin)) for moments in versions)
        yield " -> ".join(percent(float(np.mean(end > 0))) for end in low)
        yield " -> ".join(percent(float(np.mean(end < -margin))) for end in high)

    heads = ("generator", "fits", "items", "margin (points)", "wrong within", "wrong positive", "wrong beyond")
    table("Wrong words (%) where the truth is minus the margin (nominal 5, 2.5, 2.5).", heads, map(row, cases))


def few(rng: np.random.Generator, replications: int) -> None:
    cases = [(study, fits, items) for study in (RARE, AGREE) for fits in FITS for items in (100, 500, 2000)]

    def row(case: tuple[Study, int, int]) -> Iterator[str]:
        study, fits, items = case
        study = study._replace(mean=special.ndtri(0.996) * study.sd)
        old, new = simulated(rng, study, 0.0, fits, np.arange(items), replications)
        yield from ("fits agree" if study.rest < 0.1 else "rare", str(fits), str(items))
        wrong = (np.mean((low > 0) | (high < 0)) for low, high in (old.ends(), new.ends()))
        yield " -> ".join(percent(float(share)) for share in wrong)
        yield " -> ".join(percent(float(np.mean(moments.error == 0))) for moments in (old, new))
        yield wider(old, new)

    heads = ("generator", "fits", "items", "false direction", "no width", "mean width")
    table(
        "Accuracy .996, no difference: false directions (%, nominal 5), intervals of no width.", heads, map(row, cases)
    )


def ties() -> dict[str, np.ndarray]:
    """Float [fits, items] each: what is no certainty."""

    def each(fits: int, wins: int) -> np.ndarray:
        """Every fit wins so many items that no other fit wins."""
        values = np.zeros((fits, 1000))
        values[np.repeat(np.arange(fits), wins), np.arange(fits * wins)] = 1
        return values

    def same(fits: int, items: int, wins: int) -> np.ndarray:
        return np.tile(np.arange(items) < wins, (fits, 1)).astype(float)

    return {
        "2 fits x 2 items, all tie": np.zeros((2, 2)),
        "2 fits x 20 items, all tie": np.zeros((2, 20)),
        "3 fits x 100 items, all tie": np.zeros((3, 100)),
        "10 fits x 1,000 items, all tie": np.zeros((10, 1000)),
        "2 fits x 2 items, all won": np.ones((2, 2)),
        "3 fits x 5 items, all won": np.ones((3, 5)),
        "3 fits x 6 items, all won": np.ones((3, 6)),
        "5 fits x 100 items, all 0.3": np.full((5, 100), 0.3),
        "2 fits x 1,000 items, each wins 8 others": each(2, 8),
        "2 fits x 1,000 items, each wins 50 others": each(2, 50),
        "3 fits x 1,000 items, each wins 8 others": each(3, 8),
        "5 fits x 1,000 items, each wins 8 others": each(5, 8),
        "5 fits x 100 items, one item always won": same(5, 100, 1),
        "2 fits x 1,000 items, 4 items always won": same(2, 1000, 4),
        "2 fits x 1,000 items, 8 items always won": same(2, 1000, 8),
    }


def degenerate(rng: np.random.Generator, replications: int) -> None:
    def row(name: str) -> Iterator[str]:
        values = ties()[name]
        yield name
        for moments in both(values[None]):
            low, high = moments.ends()
            yield f"{100 * moments.mean.item():+.2f} [{100 * low.item():+.2f}, {100 * high.item():+.2f}]"
        verdict = statistics.verdicts([values], 0.005)[0]
        yield from (verdict.word, verdict.size, f"{verdict.p:.3f}")

    heads = ("scores", "before", "after", "word", "size, margin 0.5", "p")
    table("Ties, 95 % intervals in points.", heads, map(row, ties()))


def judged(
    moments: Moments, beyond: Callable[[float], float], truths: np.ndarray, margin: float
) -> tuple[bool, bool, bool, bool]:
    """Of a family: any direction wrong, all intervals hold, any wrong beyond, any wrong within the margin.

    Each by the adjusted p of the comparison that errs most.
    """

    def p(distance: np.ndarray) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(distance > 0, distance / moments.error, 0)
        return beyond(float(-special.ndtri(np.min(stats.t.sf(t, moments.degrees)))))

    mean, edge = moments.mean, np.abs(truths) > margin - 1e-12
    opposite = np.where((truths == 0) | (np.sign(truths) != np.sign(mean)), np.abs(mean), 0)
    return (
        p(opposite) < 0.05,
        p(np.abs(mean - truths)) >= 0.05,
        p(np.where(np.sign(truths) != np.sign(mean), np.abs(mean) - margin, np.maximum(np.abs(mean) - margin, 0)))
        < 0.05,
        bool(edge.any()) and p(np.where(edge, margin - np.abs(mean), 0)) < 0.1,
    )


FAMILIES = {
    "typical, accuracy .80": Study(),
    "fits are all the variance": Study(draw=0.5, fit=0.5, arm=0.0),
    "accuracy .99": Study(4.0, item=1.5, arm=0.3, rest=0.5),
}


def families(rng: np.random.Generator, replications: int) -> None:
    def row(case: tuple[str, int]) -> Iterator[str]:
        name, m = case
        study = FAMILIES[name]
        yield from (name, str(m))
        for fits in FITS:
            _, typical = simulated(rng, study, 0.0, fits, np.arange(500), 50)
            room = 0.6 * (1 - study.accuracy())
            margin = min((8 if fits < 5 else 5) * float(np.median(typical.error)), room)
            # None differs; then half by the margin.
            results: list[list[tuple[bool, ...]]] = [[], []]
            for mixed, _ in itertools.product((False, True), range(replications)):
                truths = np.where(mixed & (np.arange(m) % 2 == 0), -margin, 0.0)
                better = np.array([study.better(truth) if truth else 0.0 for truth in truths])
                values = scores(rng, study, better, fits, np.arange(500), together=True)
                squares, mean = statistics.mean_squares(values), values.mean((1, 2))
                unseen = statistics.unseen_items(values)
                now = statistics.standard_errors(squares, fits, 500, unseen)
                for k, errors in enumerate((before(squares, fits, 500), now)):
                    matrix = statistics.correlations(squares, fits, 500, unseen if k else 0.0)
                    results[k].append(judged(Moments(mean, *errors), statistics.largest_beyond(matrix), truths, margin))
            shares = []
            for result in results:
                null, mixed_families = np.array(result[:replications]), np.array(result[replications:])
                share = (null[:, 0], null[:, 1], mixed_families[:, 2], mixed_families[:, 3])
                shares.append(", ".join(percent(float(np.mean(part))) for part in share))
            yield " -> ".join(shares)

    title = "Families against one scratch, 500 items: % with a false direction and with all intervals holding (no"
    title += " difference); % with a wrong beyond and a wrong within (half of the truths are minus the margin)."
    cases = itertools.product(FAMILIES, (1, 8, 20))
    table(title, ("generator", "m", *(f"{fits} fits" for fits in FITS)), map(row, cases))


def powers(rng: np.random.Generator, replications: int) -> None:
    """How often the stated range holds the true power, which is the share of positive words in the same studies."""
    studies = {"all effects": Study(0.0), "fits are all the variance": Study(0.0, 0.3, 0.3, 1.0, 0.0)}
    cases = itertools.product(studies, FITS[1:])

    def row(case: tuple[str, int]) -> Iterator[str]:
        name, fits = case
        study = studies[name]
        _, typical = simulated(rng, study, 0.0, fits, np.arange(500), 200)
        margin = 3 * float(np.sqrt(np.mean(typical.error**2)))
        better = study.better(margin)
        values = scores(rng, study, np.full(replications, better), fits, np.arange(500))
        different = [statistics.verdicts([study_scores], margin)[0] for study_scores in values]
        true = np.mean([verdict.interval.low > 0 or verdict.interval.high < 0 for verdict in different])
        values = scores(rng, study, np.zeros(replications), fits, np.arange(500))
        same = [statistics.verdicts([study_scores], margin)[0] for study_scores in values]
        equal = np.mean([verdict.word == "equivalent" for verdict in same])
        yield from (name, str(fits))
        for share, ranges in (
            (true, [verdict.power for verdict in different]),
            (equal, [verdict.power_equivalent for verdict in same]),
        ):
            low, high = np.array(ranges).T
            yield f"{share:.2f}"
            yield percent(float(np.mean((low <= share) & (share <= high))))
            yield f"{np.median(low):.2f} to {np.median(high):.2f}"

    heads = ("generator", "fits", "power", "in the range (%)", "median range")
    title = "The power to find the margin, and to be called equivalent at no difference, and its 90 % range."
    table(title, (*heads, "power, equivalent", *heads[3:]), map(row, cases))


class Crossed(NamedTuple):
    """How right answers come about where draws of labels are crossed with seeds: standard deviations of the effects.

    Both arms have the effects of the seed, draw and item, and each its own besides, half as large of the first two.
    """

    mean: float = 1.4
    seed: float = 0.0
    draw: float = 0.0
    pair: float = 0.0
    """Of one seed with one draw, an arm's own."""
    item: float = 1.2
    arm: float = 0.4
    """Of an arm on an item."""
    rest: float = 0.6

    @property
    def sd(self) -> float:
        own = 1.25 * (self.seed**2 + self.draw**2) + self.pair**2
        return math.sqrt(own + self.item**2 + self.arm**2 + self.rest**2)

    def difference(self, better: float) -> float:
        return float(special.ndtr((self.mean + better) / self.sd) - special.ndtr(self.mean / self.sd))

    def scores(self, rng: np.random.Generator, better: float, seeds: int, draws: int, items: int) -> np.ndarray:
        """Float [seeds, draws, items]."""
        normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        shared = self.seed * normal(seeds, 1, 1) + self.draw * normal(1, draws, 1) + self.item * normal(1, 1, items)

        def right(better: float) -> np.ndarray:
            own = (self.seed * normal(seeds, 1, 1) + self.draw * normal(1, draws, 1)) / 2
            own = own + self.pair * normal(seeds, draws, 1) + self.arm * normal(1, 1, items)
            return shared + own + self.rest * normal(seeds, draws, items) + (self.mean + better) > 0

        return right(better).astype(float) - right(0.0)


CROSSED = {
    "seeds vary": Crossed(seed=0.3),
    "draws vary": Crossed(draw=0.3),
    "both alike": Crossed(seed=0.2, draw=0.2),
    "a seed with a draw": Crossed(pair=0.3),
    "all": Crossed(seed=0.15, draw=0.15, pair=0.15),
    "neither": Crossed(),
}


def crossed(rng: np.random.Generator, replications: int) -> None:
    """Intervals over seeds and draws, and beside them those that take all fits for independent."""
    cases = [(name, better) for name in CROSSED for better in (0.0, 0.35)]

    def row(case: tuple[str, float]) -> Iterator[str]:
        name, better = case
        truth = CROSSED[name].difference(better)
        yield from (name, f"{100 * truth:+.2f}")
        for seeds, draws in ((2, 5), (3, 3), (5, 5), (10, 4)):
            held = np.zeros((replications, 2), bool)
            for i in range(replications):
                values = CROSSED[name].scores(rng, better, seeds, draws, 500)
                for k, each in enumerate((values, values.reshape(-1, 500))):
                    interval = statistics.crossed(each)
                    held[i, k] = interval.low <= truth <= interval.high
            ours, pooled = held.mean(0)
            yield f"{percent(ours)} ± {percent(math.sqrt(ours * (1 - ours) / replications))} ({percent(pooled)})"

    title = (
        "Coverage (%) of the 95 % interval where draws of labels are crossed with seeds, 500 items; in brackets that"
    )
    heads = (
        "what varies",
        "truth",
        *(f"{seeds} seeds x {draws} draws" for seeds, draws in ((2, 5), (3, 3), (5, 5), (10, 4))),
    )
    table(f"{title} of an interval that takes all fits for independent.", heads, map(row, cases))


ROWS = {
    "degenerate": degenerate,
    "single": single,
    "groups": grouped,
    "equivalent": equivalent,
    "few": few,
    "families": families,
    "power": powers,
    "crossed": crossed,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which tables: {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(arguments)
    for name in flags.rows.split(","):
        # A table is the same whichever others are printed; families cost a hundred times as much.
        seed = [flags.seed, list(ROWS).index(name)]
        many = max(flags.replications // 4, 1) if name in ("families", "power") else flags.replications
        ROWS[name](np.random.default_rng(seed), many)


if __name__ == "__main__":
    main(sys.argv[1:])
