"""Strategy cards: the transfers of a version, what an arm of one scored, and what a card says of these scores.

A version is a folder whose name it has, such as tljax-cards-1: a flagfile a transfer (`read_transfer`), and beside it,
where reference scores were computed, a JSON file of the same name: which test items every shipped strategy gets right
under every seed, as packed bits. An arm is a strategy on a transfer, at the rate that a validation split chose. A
newcomer's arm is compared with those of the file seed by seed and item by item, so nobody trains them again.

Halves of test sets are those of `confirmation`: gains and ranks are of the one, verdicts of the other.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import command_line, confirmation, directory, fields
from experiments.runs.command_line import flag
from experiments.runs.settings import ExperimentFlags
from tljax.study import atlas, units, verdicts
from tljax.study.atlas import Percentile
from tljax.study.verdicts import Cell, Comparison, of_diverged
from tljax.types import InputError, Task

SHIPPED = Path(__file__).parent.parent / "strategy_cards" / "tljax-cards-1"
"""The folder of the version that is shipped."""
BESIDE = ("full", "head_only")
"""The shipped strategies that every card has beside scratch, and beside the best of them."""
ANCHOR = "head_only"
"""The shipped strategy that a card trains again under one seed, to see whether this machine gives the shipped bits."""
LEVEL = 0.95
HALVES = confirmation.HALVES
_MANUAL_DIR = "MANUAL_DIR"
"""What stands in a flagfile for the folder of --manual_dir."""


# ---- The transfers of a version


@dataclass(frozen=True)
class TransferOfVersion(ExperimentFlags):
    """The flags of a transfer: those of its fits, and how it is tuned and judged.

    `--validation` is of the trials alone; the arm is trained on all labels then.
    """

    title: str = flag("", "what the card calls it")
    shift: str = flag("", "the data set whose test items are the shift; none without")
    rates: tuple[str, ...] = flag(("0.001", "0.004", "0.016"), "the learning rates that are tried")
    tuning_seeds: tuple[int, ...] = flag((1_000_000, 1_001_000), "the seeds that each is tried under")
    margin: float = flag(1.0, "the smallest difference that matters, in points of accuracy")


class Transfer(NamedTuple):
    """A transfer of a version."""

    name: str
    title: str
    flags: Mapping[str, Any]
    """{flag of a fit: value}."""
    shift: str
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    margin: float
    digest: str
    """SHA-256 of its flagfile's lines."""


def read_transfer(file: Path, manual_dir: str | None = None) -> Transfer:
    """The transfer of a flagfile; raises InputError where it needs a --manual_dir that is not given."""
    text = file.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("--")]
    if manual_dir is None and any(_MANUAL_DIR in line for line in lines):
        raise InputError(f"{file.stem} is of data that tljax does not ship: name their folder with --manual_dir")
    places = [line.replace(_MANUAL_DIR, manual_dir or "") for line in lines]
    shared, form = command_line.read(["card", *places], TransferOfVersion)
    rates = tuple(map(float, form.rates))
    digest = hashed("\n".join(lines))
    return Transfer(file.stem, form.title, shared, form.shift, rates, form.tuning_seeds, form.margin, digest)


def flagfiles(folder: Path) -> dict[str, Path]:
    """{name of a transfer: its flagfile} of a version; raises InputError for a folder without any."""
    known = {file.stem: file for file in sorted(folder.glob("*.flags"))}
    if not known:
        raise InputError(f"--reference={folder} has no transfers (NAME.flags): name the folder of a version of cards")
    return known


# ---- What an arm scored


class Arm(NamedTuple):
    """A strategy on a transfer, trained under all seeds of the card at the rate that its trials chose."""

    strategy: str
    rate: float
    target: np.ndarray
    """Which test items each fit gets right, bool [seeds, items]."""
    source: np.ndarray | None
    """The same of the source's test items, its own head put back; None of scratch."""
    shift: np.ndarray | None
    """The same of the items of the shift; None where the transfer has none."""
    diverged: tuple[int, ...]
    """The places of the seeds whose fits diverged: their items count as the share of the most frequent class."""
    trials: tuple[tuple[float, ...], ...]
    """Accuracy on the validation split, [rates, tuning seeds]."""
    explored: np.ndarray
    """Accuracy of the trials on two halves of the test items that explore, float [rates, tuning seeds, 2]."""
    cost: Mapping[str, Any]
    """trained, total and beside (numbers that train; all; those that train beside the head), steps, step_flops; and of
    the machine seconds (of a fit), cpu_seconds (of the arm) and peak_bytes."""
    end: str
    """Which parameters were judged: last, or the one name that the strategy's `finish` gives."""


def packed(right: np.ndarray) -> dict[str, Any]:
    """Bools [seeds, items] as a record: how many items, and the bits of each seed in base64.

    >>> unpacked(packed(np.array([[True, False, True]]))).tolist()
    [[True, False, True]]
    """
    rows = np.packbits(np.asarray(right, bool), axis=1)
    return {"items": int(right.shape[1]), "bits": [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]}


def unpacked(record: Mapping[str, Any]) -> np.ndarray:
    """The bools of such a record; raises ValueError for bits that are too few or too many."""
    rows = [np.frombuffer(base64.b64decode(text, validate=True), np.uint8) for text in record["bits"]]
    if {len(row) for row in rows} != {-(-record["items"] // 8)}:
        raise ValueError("its bits are not of its items")
    return np.unpackbits(np.stack(rows), axis=1, count=record["items"]).astype(bool)


def digest(arm: Arm) -> str:
    """SHA-256 of an arm's item scores: of the target, the source and the shift."""
    parts = [None if right is None else packed(right) for right in (arm.target, arm.source, arm.shift)]
    return hashed(repr((parts, arm.diverged)))


def hashed(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def arm_to_record(arm: Arm) -> dict[str, Any]:
    """An arm as JSON has it."""
    right = {name: getattr(arm, name) for name in ("target", "source", "shift")}
    return {
        "strategy": arm.strategy,
        "rate": arm.rate,
        **{name: None if value is None else packed(value) for name, value in right.items()},
        "diverged": list(arm.diverged),
        "trials": [list(row) for row in arm.trials],
        "explored": np.round(arm.explored, 6).tolist(),
        "cost": dict(arm.cost),
        "end": arm.end,
    }


def arm_from_record(record: Mapping[str, Any]) -> Arm:
    """The arm of such a record."""
    right = {name: None if record[name] is None else unpacked(record[name]) for name in ("target", "source", "shift")}
    target = right["target"]
    assert target is not None
    return Arm(
        record["strategy"],
        record["rate"],
        target,
        right["source"],
        right["shift"],
        tuple(record["diverged"]),
        tuple(map(tuple, record["trials"])),
        np.array(record["explored"], float),
        record["cost"],
        record["end"],
    )


_BITS: fields.Form = {"items": int, "bits": [str]}
ARM: fields.Form = {
    **{"strategy": str, "rate": float, "end": str, "cost": dict, "diverged": [int]},
    **{"target": _BITS, "source": (_BITS, None), "shift": (_BITS, None), "trials": [[float]], "explored": [[[float]]]},
}
MASKS: fields.Form = {"cells": [str], "masks": [str], "numbers": [int], "explored": [[[[float]]]]}
REFERENCE: fields.Form = {
    **{"transfer": str, "flags_sha256": str, "target": str, "source": (str, None), "shift": (str, None)},
    **{"source_accuracy": [float], "arms": [ARM], "left_out": {str: str}, "masks": (MASKS, None)},
    "environment": {"python": str, "platform": str, "versions": {str: str}},
}


class Masks(NamedTuple):
    """Random masks over the cells of a transfer's model (its stages and kinds of leaves), tried as every arm is."""

    numbers: np.ndarray
    """How many numbers each trains beside the head, int [masks]."""
    explored: np.ndarray
    """Float [masks, rates, tuning seeds, 2], as of an arm."""


class Reference(NamedTuple):
    """The shipped scores of a transfer."""

    arms: Mapping[str, Arm]
    left_out: Mapping[str, str]
    """{strategy that has no scores: why}."""
    masks: Masks | None
    test_sets: tuple[str, str | None, str | None]
    """Digests of the test sets of target, source and shift."""
    source_accuracy: tuple[float, ...]
    """The source's on its own test set, before the transfer, a seed each; empty where it is not known."""
    environment: Mapping[str, Any]
    """The machine and versions that computed them."""
    digest: str
    """SHA-256 of the file."""


def read_reference(folder: Path, transfer: Transfer) -> Reference | None:
    """The reference scores of a transfer; None where the version has none.

    Raises InputError for a file that is not as it was written, and for one of other flags.
    """
    file = folder / f"{transfer.name}.json"
    record = directory.read_record(file, REFERENCE)
    if record is None:
        return None
    if record["flags_sha256"] != transfer.digest:
        raise InputError(f"'{file}' has scores of other flags than '{transfer.name}.flags': restore both")
    try:
        arms = {each["strategy"]: arm_from_record(each) for each in record["arms"]}
    except (ValueError, KeyError) as error:
        raise InputError(f"'{file}' has scores that cannot be read ({error}): restore it") from error
    if "scratch" not in arms:
        raise InputError(f"'{file}' has no scores of scratch, which every strategy is compared with: restore it")
    masks = record["masks"] and Masks(np.array(record["masks"]["numbers"]), np.array(record["masks"]["explored"]))
    return Reference(
        arms,
        record["left_out"],
        masks,
        (record["target"], record["source"], record["shift"]),
        tuple(record["source_accuracy"]),
        record["environment"],
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )


# ---- What a card says


class JudgedItems(NamedTuple):
    """The test items of a transfer's target."""

    source: str
    target: str
    labels: np.ndarray
    """Their classes, int [items]."""
    groups: np.ndarray | None
    """Which of them are alike, int [items], where that is known."""
    halves: Mapping[str, np.ndarray]
    """{explore, confirm: which items are in it, int}."""
    budget: int
    """How many labels a fit has."""


def items_of(source: str, target: Task, budget: int) -> JudgedItems:
    """The test items of a target with a number of labels; raises InputError as `confirmation.halved` does."""
    groups = target.test.groups
    return JudgedItems(
        source,
        target.name,
        np.asarray(target.test.targets),
        None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1],
        {half: confirmation.rows_of_half(target, half) for half in HALVES},
        budget,
    )


class OnTransfer(NamedTuple):
    """An arm of the card's strategy, and what it is compared with."""

    transfer: Transfer
    items: JudgedItems
    arm: Arm
    reference: Reference


def _scores(arm: Arm, items: JudgedItems, seeds: Sequence[int], rows: np.ndarray) -> dict[int, np.ndarray]:
    """{seed: scores of an arm on some test items}, as `verdicts.Right` has them."""
    labels = items.labels[rows]
    share = float(np.bincount(labels).max() / len(labels))
    return {
        seed: of_diverged(share, len(rows)) if place in arm.diverged else arm.target[place, rows]
        for place, seed in enumerate(seeds)
    }


def compared(parts: Sequence[OnTransfer], half: str, base: str) -> dict[str, Comparison]:
    """{transfer: its comparison with the shipped arm of `base`} on one half of the test items, judged together.

    A transfer where `base` has no scores has none, nor has one where the strategy is `base` itself. Transfers of two
    targets share the level; those of one target are judged by one max-t.
    """
    margins = {part.transfer.margin for part in parts}
    if len(margins) > 1:
        raise InputError(f"the transfers of a version have one --margin, and these have {sorted(margins)}")
    right: dict[Cell, dict[int, np.ndarray]] = {}
    groups: dict[str, np.ndarray | None] = {}
    names: dict[tuple[str, str, int], str] = {}
    for part in parts:
        seeds, rows = part.transfer.flags["seeds"], part.items.halves[half]
        if base not in part.reference.arms or part.arm.strategy == base:
            continue
        source = part.items.source
        of_strategy = Cell(source, part.items.target, part.arm.strategy, part.items.budget)
        of_base = of_strategy._replace(strategy=base, source=None if base == "scratch" else source)
        right[of_strategy] = _scores(part.arm, part.items, seeds, rows)
        right[of_base] = _scores(part.reference.arms[base], part.items, seeds, rows)
        groups[part.items.target] = None if part.items.groups is None else part.items.groups[rows]
        names[source, part.items.target, part.items.budget] = part.transfer.name
    if not right:
        return {}
    margin = margins.pop() / units.factor(units.ACCURACY)
    family, _ = verdicts.compared(right, margin, LEVEL, "budgets", base, groups=groups)
    return {names[str(each.source), each.target, each.budgets[0]]: each for each in family}


def accuracy(arm: Arm, rows: np.ndarray, labels: np.ndarray) -> float:
    """Mean accuracy of an arm's fits on some test items; a fit that diverged has the share of the commonest class."""
    share = float(np.bincount(labels[rows]).max() / len(rows))
    means = [share if i in arm.diverged else float(arm.target[i, rows].mean()) for i in range(len(arm.target))]
    return float(np.mean(means))


def rank(part: OnTransfer) -> tuple[int, int, str]:
    """(Place of the arm, of how many, the best shipped strategy), by mean accuracy on the items that explore.

    The strategy's own shipped arm is left out. What is best is chosen where no verdict looks.
    """
    rows, labels = part.items.halves["explore"], part.items.labels
    others = {
        name: accuracy(arm, rows, labels) for name, arm in part.reference.arms.items() if name != part.arm.strategy
    }
    mean = accuracy(part.arm, rows, labels)
    return 1 + sum(other > mean for other in others.values()), 1 + len(others), max(others, key=others.__getitem__)


NEAR = 8
"""The random masks whose sizes are nearest to a strategy's, among which its percentile is."""


def percentile(part: OnTransfer) -> Percentile | None:
    """Where an arm stands among random masks of its size, by trials on the items that explore; None without masks.

    The rate of each trial is chosen by other items and another seed (`atlas.at_best_rate`), of masks and arm alike.
    """
    masks = part.reference.masks
    if masks is None:
        return None
    score = float(atlas.at_best_rate(part.arm.explored[None])[0].mean())
    others = atlas.at_best_rate(masks.explored)[0].mean((1, 2))
    return atlas.percentile(score, others, masks.numbers, part.arm.cost["beside"], NEAR)


def by_seed(part: OnTransfer, arm: Arm, test_set: str, explore: bool) -> list[float]:
    """The accuracy of each of an arm's fits that did not diverge, on the test set of the source or of the shift.

    Where one who explores looks and the items are those of the target, as under a rotation, those that confirm stay
    unseen.
    """
    right = {"source": arm.source, "shift": arm.shift}[test_set]
    if right is None:
        return []
    target, *others = part.reference.test_sets
    same = dict(zip(("source", "shift"), others, strict=True))[test_set] == target
    rows = part.items.halves["explore"] if explore and same else slice(None)
    return [float(row[rows].mean()) for place, row in enumerate(right) if place not in arm.diverged]


def trial_halves(items: JudgedItems) -> np.ndarray:
    """In which of two halves, 0 or 1, each of the items that explore is for `Arm.explored`: int [items].

    Groups alternate, or items where none are known.
    """
    rows = items.halves["explore"]
    numbers = rows if items.groups is None else items.groups[rows]
    return np.unique(numbers, return_inverse=True)[1] % 2
