"""How often a ledger's confirmations are false, and how many true effects it finds: 200 null strategies and 20 effects.

Run by hand: `python tests/simulate_ledger.py [--replications=100] [--seed=1]`. It prints a Markdown table, the same for
the same flags. A study is one test set in two halves and 220 strategies, one after another. Each is explored at will: a
look after 3, 4 and so on to 6 seeds on the half that explores, at three variants, of which the best is claimed, better
or worse as it looked. Each claim is then confirmed once, on the other half with fresh seeds. All confirmations share
the test items, the seeds and the fits from scratch, so that their e-values depend on each other as they do in truth.
Items, and all else, are drawn anew in each study. A true effect is two margins of half a point.

Fits differ as `full` does from scratch in a pilot of 40 seeds: by 0.6 points a seed, and over 1,000 items by 0.1.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import stats
from simulate_verdicts import Study, scores

from tljax.study import ledger, statistics

STUDY = Study(arm=0.06, fit=0.015, draw=0.1, rest=0.25, alike=0.8)
NULL, TRUE = 200, 20
MARGIN = 0.005
VARIANTS, LOOKS = 3, (3, 4, 5, 6)


class Design(NamedTuple):
    """One row of the table."""

    name: str
    seeds: int = 40
    """Of a confirmation."""
    items: int = 1000
    """Of each half."""
    mean_size: int = 1
    """Of groups, which are of one to so many items twice."""
    study: Study = STUDY
    interesting: bool = False
    """Whether only what looked positive at the last look is confirmed, and the others are dropped."""


DESIGNS = (
    Design("every strategy is confirmed, under 40 seeds"),
    Design("under 24 seeds", seeds=24),
    Design("only what looked better is confirmed, under 24 seeds", seeds=24, interesting=True),
    Design("3,000 items in groups of 1 to 9, under 24 seeds", 24, 3000, mean_size=5, study=STUDY._replace(arm=0.02)),
    Design("fits with a long tail of bad ones, under 40 seeds", study=STUDY._replace(skewed=True)),
)


class Outcome(NamedTuple):
    """What came of one study."""

    confirmed: int
    false: int
    found: int
    tested: int


def groups_of(rng: np.random.Generator, design: Design) -> np.ndarray:
    """Which of the items of a half are alike, int [items], ascending from 0."""
    if design.mean_size == 1:
        return np.arange(design.items)
    sizes = rng.integers(1, 2 * design.mean_size, design.items)
    return np.repeat(np.arange(design.items), sizes)[: design.items]


def simulated(rng: np.random.Generator, design: Design) -> Outcome:
    """One study."""
    many = NULL + TRUE
    is_true = np.zeros(many, bool)
    is_true[rng.choice(many, TRUE, replace=False)] = True
    better = np.where(is_true, design.study.better(2 * MARGIN), 0.0)
    groups = [groups_of(rng, design) for _ in range(2)]
    explored = scores(rng, design.study, np.repeat(better, VARIANTS), LOOKS[-1], groups[0], together=True)
    # The variant and the look at which the difference is the furthest from 0 make the claim.
    means = explored.mean(2).reshape(many, VARIANTS, -1)
    looks = np.stack([means[:, :, :fits].mean(2) / np.sqrt(1 / fits) for fits in LOOKS], 2).reshape(many, -1)
    seen = looks[np.arange(many), np.abs(looks).argmax(1)]
    del explored
    tested = np.flatnonzero(seen > 0) if design.interesting else np.arange(many)
    confirming = scores(rng, design.study, better[tested], design.seeds, groups[1], together=True)
    confirmed, false = 0, 0
    for number, (strategy, values) in enumerate(zip(tested, confirming, strict=True), 1):
        interval = statistics.crossed(values, groups=None if design.mean_size == 1 else groups[1])
        t = np.sign(seen[strategy]) * interval.mean / interval.standard_error
        e = ledger.e_value(float(stats.t.sf(t, interval.degrees)))
        if e >= ledger.threshold(number, confirmed):
            confirmed += 1
            false += not is_true[strategy] or seen[strategy] < 0
    return Outcome(confirmed, false, confirmed - false, len(tested))


def table(designs: tuple[Design, ...], replications: int, seed: int, done: Callable[[str], None]) -> Iterator[str]:
    """The lines of the table."""
    yield "| | studies | false discoveries of all, mean ± SE | found of 20, mean (least) | at least 16 found |"
    yield "|---|---|---|---|---|"
    for i, design in enumerate(designs):
        outcomes = []
        for replication in range(replications):
            outcomes.append(simulated(np.random.default_rng([seed, i, replication]), design))
            done(f"{design.name}: {replication + 1}")
        shares = np.array([each.false / max(1, each.confirmed) for each in outcomes])
        discoveries = np.array([each.found for each in outcomes])
        error = shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan
        yield (
            f"| {design.name} | {replications} | {100 * shares.mean():.2f} ± {100 * error:.2f} % | "
            f"{discoveries.mean():.1f} ({discoveries.min()}) | {100 * np.mean(discoveries >= 16):.0f} % |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--replications", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    for line in table(DESIGNS, flags.replications, flags.seed, lambda text: print(text, end="\r", file=sys.stderr)):
        print(line, flush=True)
