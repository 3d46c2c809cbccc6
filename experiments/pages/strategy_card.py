"""The page of a strategy card, on the terminal, as HTML and as JSON, from the item scores of its arms and others."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.pages import figures, report, tables
from experiments.pages.report import Block, Provenance, Section
from experiments.pages.tables import NOTHING
from experiments.runs import console, directory, strategy_cards
from experiments.runs.console import Cell, Table
from experiments.runs.strategy_cards import ANCHOR, BESIDE, Arm, OnTransfer
from tljax.audit.lines import Check
from tljax.study import units
from tljax.study.verdicts import Comparison

NAME = "card.html"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
"""Whose versions can change a bit of a score."""


class Contents(NamedTuple):
    """All that a card is made of."""

    version: str
    strategy: str
    spec: str
    """The strategy as the command line has it."""
    code: str
    """SHA-256 of its files."""
    parts: Sequence[OnTransfer]
    left_out: Mapping[str, str]
    """{transfer without a card: why}."""
    proofs: Sequence[Check]
    anchors: Mapping[str, int]
    """{transfer: on how many test items the shipped arm that was trained again differs; -1 where there is none}."""
    explore: bool
    """Whether the items that confirm are left alone."""
    flags: str
    """The other flags of the command, each after a blank."""
    order: int
    """Which strategy of this user's this is, from 1, whose verdict is looked at."""
    environment: Mapping[str, Any]
    seconds: float
    """What the call took."""


# ---- Numbers


def numbers(contents: Contents) -> dict[str, Any]:
    """What card.json says: all is the same where scores are but `took`, `cost` of transfers and details of proofs."""
    of_half = {half: _judged(contents, half, "scratch") for half in _halves(contents)}
    judging = "explore" if contents.explore else "confirm"
    beside = {base: _judged(contents, judging, base) for base in _bases(contents)}
    return {
        "version": contents.version,
        "strategy": contents.strategy,
        "spec": contents.spec,
        "code": contents.code,
        "scores_sha256": {part.transfer.name: strategy_cards.digest(part.arm) for part in contents.parts},
        "all_scores_sha256": _all_scores(contents),
        "reference_sha256": {part.transfer.name: part.reference.digest for part in contents.parts},
        "level": strategy_cards.LEVEL,
        "explore": contents.explore,
        "strategies_looked_at": contents.order,
        "proofs": [{"check": check.name, "passed": check.passed, "detail": check.detail} for check in contents.proofs],
        "transfers": {part.transfer.name: _of_transfer(contents, part, of_half, beside) for part in contents.parts},
        "left_out": dict(contents.left_out),
        "other_versions": other_versions(contents),
        "environment": {key: contents.environment[key] for key in ("python", "platform", "versions")},
        "took": {"seconds": round(contents.seconds, 1), "cores": contents.environment["cores"]},
        "bibtex": bibtex(contents),
    }


def _halves(contents: Contents) -> tuple[str, ...]:
    return ("explore",) if contents.explore else strategy_cards.HALVES


def _judged(contents: Contents, half: str, base: str) -> dict[str, Comparison]:
    """{transfer: its comparison with a shipped arm}; on the items that explore without a verdict's word."""
    comparisons = strategy_cards.compared(contents.parts, half, base)
    if half == "confirm":
        return comparisons
    return {name: each._replace(word="", size="") for name, each in comparisons.items()}


def _bases(contents: Contents) -> tuple[str, ...]:
    """The shipped strategies beside scratch: those of every card, and the best of each transfer."""
    best = [strategy_cards.rank(part)[2] for part in contents.parts]
    return tuple(dict.fromkeys(name for name in (*BESIDE, *best) if name not in (contents.strategy, "scratch")))


def _of_transfer(
    contents: Contents,
    part: OnTransfer,
    of_half: Mapping[str, Mapping[str, Comparison]],
    beside: Mapping[str, Mapping[str, Comparison]],
) -> dict[str, Any]:
    name, arm = part.transfer.name, part.arm
    place, many, best = strategy_cards.rank(part)
    near = strategy_cards.percentile(part)
    shipped = part.reference.arms.get(contents.strategy)
    from_scratch = {half: each[name] for half, each in of_half.items() if name in each}
    return {
        "title": part.transfer.title,
        "margin": part.transfer.margin,
        "rate": arm.rate,
        "rates": list(part.transfer.rates),
        "judged_by": arm.end,
        "diverged": len(arm.diverged),
        "accuracy": {
            half: strategy_cards.accuracy(arm, part.items.halves[half], part.items.labels) for half in _halves(contents)
        },
        "from_scratch": {half: _record(each) for half, each in from_scratch.items()},
        "from_others": {base: _record(each[name]) for base, each in beside.items() if name in each},
        "rank": {"place": place, "of": many, "best": best},
        "masks": None if near is None or math.isnan(near.value) else {**near._asdict(), "size": arm.cost["beside"]},
        "retention": _means(part, arm, "source", contents.explore),
        "source_accuracy": list(part.reference.source_accuracy),
        "shift_to": part.transfer.shift,
        "shift": _means(part, arm, "shift", contents.explore),
        "shift_of_scratch": _means(part, part.reference.arms["scratch"], "shift", contents.explore),
        "anchor_items_differ": contents.anchors.get(name, -1),
        "accuracy_of_scratch": {
            half: strategy_cards.accuracy(part.reference.arms["scratch"], part.items.halves[half], part.items.labels)
            for half in _halves(contents)
        },
        "shipped_bits": None if shipped is None else strategy_cards.digest(shipped) == strategy_cards.digest(arm),
        "cost": dict(arm.cost),
        "step_flops_of_full": part.reference.arms["full"].cost["step_flops"] if "full" in part.reference.arms else None,
    }


def _means(part: OnTransfer, arm: Arm, test_set: str, explore: bool) -> list[float]:
    return [round(value, 6) for value in strategy_cards.by_seed(part, arm, test_set, explore)]


def _record(comparison: Comparison) -> dict[str, Any]:
    """A comparison as card.json has it; differences are fractions."""
    names = ("mean", "low", "high", "word", "size", "p", "fits", "items", "groups", "reason", "warning")
    values = {name: getattr(comparison, name) for name in names}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def other_versions(contents: Contents) -> list[str]:
    """Where this machine's versions are not those that computed the shipped scores, a sentence each."""
    here = {"python": contents.environment["python"], **contents.environment["versions"]}
    lines: dict[str, None] = {}
    for part in contents.parts:
        there = {"python": part.reference.environment["python"], **part.reference.environment["versions"]}
        for name in PACKAGES:
            if here.get(name) != there.get(name):
                lines[f"{name} {here.get(name, 'not installed')} here, {there.get(name)} in the shipped scores"] = None
    return list(lines)


def _all_scores(contents: Contents) -> str:
    """SHA-256 of the digests of the scores of all transfers."""
    return strategy_cards.hashed("".join(strategy_cards.digest(part.arm) for part in contents.parts))


def bibtex(contents: Contents) -> str:
    """A BibTeX entry of the card, with the digest of its scores."""
    scores = _all_scores(contents)
    key = re.sub(r"[^A-Za-z0-9]+", "-", f"{contents.version}-{contents.strategy}").strip("-").lower()
    title = re.sub(r"([&%$#_{}])", r"\\\1", f"Strategy card of {contents.strategy}")
    transfers = ", ".join(part.transfer.name.replace("_", r"\_") for part in contents.parts)
    versions = contents.environment["versions"]
    return (
        f"@misc{{{key},\n"
        f"  title = {{{title}}},\n"
        f"  howpublished = {{{contents.version}, tljax {versions['tljax']}, jax {versions['jax']}}},\n"
        f"  note = {{transfers: {transfers}; code {contents.code[:16]}; scores {scores[:16]}}},\n"
        "}\n"
    )


# ---- Tables


def verdicts(record: Mapping[str, Any]) -> Table:
    """A row a transfer: what the strategy gains on each half, and what the verdict is."""
    of_halves = ["Gain where explored (points)"]
    of_halves += [] if record["explore"] else ["Gain where confirmed (points)", "Verdict"]
    rows = []
    for each in record["transfers"].values():
        from_scratch = each["from_scratch"]
        cells = [Cell(each["title"]), _interval(from_scratch.get("explore"))]
        if not record["explore"]:
            confirmed = from_scratch.get("confirm")
            verdict = Cell(NOTHING) if confirmed is None else _verdict(confirmed)
            reason = "" if confirmed is None else confirmed["reason"]
            cells += [_interval(confirmed), verdict._replace(words=verdict.words or reason)]
        rows.append([*cells, Cell(f"{each['rank']['place']} of {each['rank']['of']}"), _percentile(each["masks"])])
    columns = ["Transfer", *of_halves, "Rank", "Percentile among random masks"]
    return Table("What it gains", columns, rows)


def beside(record: Mapping[str, Any]) -> Table:
    """A row a transfer and shipped strategy that it is compared with."""
    rows = []
    for each in record["transfers"].values():
        for base, comparison in each["from_others"].items():
            if base in BESIDE or base == each["rank"]["best"]:
                best = "the best shipped on the items that explore" if base == each["rank"]["best"] else ""
                rows.append([Cell(each["title"]), Cell(base, best), _interval(comparison), _verdict(comparison)])
    return Table("Beside shipped strategies", ["Transfer", "Compared with", "Difference (points)", "Verdict"], rows, 2)


def kept(record: Mapping[str, Any]) -> Table:
    """A row a transfer: how well the target is learnt, what is left of the source, and what holds under the shift."""
    half = "explore" if record["explore"] else "confirm"
    rows = [
        [
            Cell(each["title"]),
            Cell(tables.percent(each["accuracy"][half])),
            Cell(tables.percent(each["accuracy_of_scratch"][half])),
            _mean(each["retention"]),
            _mean(each["source_accuracy"]),
            _mean(each["shift"]),
            _mean(each["shift_of_scratch"]) if each["shift"] else Cell(NOTHING),
        ]
        for each in record["transfers"].values()
    ]
    of_shift = ["Under shift (%)", "Scratch under shift (%)"]
    columns = ["Transfer", "Accuracy (%)", "Scratch (%)", "Source after (%)", "Source before (%)", *of_shift]
    return Table("How well it reads target and source", columns, rows)


def costs(record: Mapping[str, Any]) -> Table:
    """A row a transfer: what a fit of it costs."""
    rows = [
        [
            Cell(each["title"]),
            Cell(f"{each['cost']['trained']:,} of {each['cost']['total']:,}"),
            Cell(f"{each['cost']['step_flops'] / 1e6:,.1f}", _flops_of_full(each)),
            Cell(f"{each['cost']['steps']:,}"),
            Cell(NOTHING if each["cost"]["seconds"] is None else f"{each['cost']['seconds']:.2f}"),
            Cell(NOTHING if each["cost"]["peak_bytes"] is None else f"{each['cost']['peak_bytes'] / 1e6:,.1f}"),
            Cell(f"{each['rate']:g}", _at_end(each)),
        ]
        for each in record["transfers"].values()
    ]
    columns = ["Transfer", "Numbers that train", "MFLOP a step", "Steps", "Seconds a fit", "Memory (MB)", "Rate"]
    return Table("What it costs", columns, rows)


def _flops_of_full(each: Mapping[str, Any]) -> str:
    """What a step of full fine-tuning takes beside it."""
    flops = each["step_flops_of_full"]
    return "" if flops is None else f"full {flops / 1e6:,.1f}"


def _at_end(each: Mapping[str, Any]) -> str:
    """Whether the rate that was chosen is an end of those that were tried."""
    ends = {min(each["rates"]): "the lowest tried", max(each["rates"]): "the highest tried"}
    return ends.get(each["rate"], "")


def proofs(record: Mapping[str, Any]) -> Table:
    """A row a check, those that failed first."""
    words = {True: "holds", False: "REFUTED", None: "does not apply"}
    order = sorted(record["proofs"], key=lambda check: check["passed"] is not False)
    rows = [[Cell(check["check"]), Cell(words[check["passed"]]), Cell(check["detail"])] for check in order]
    return Table("What is proved", ["Check", "Outcome", "Detail"], rows, 3)


def _interval(comparison: Mapping[str, Any] | None) -> Cell:
    if comparison is None:
        return Cell(NOTHING)
    values = [math.nan if comparison[name] is None else 100 * comparison[name] for name in ("mean", "low", "high")]
    return tables.ranged((values[0], values[1], values[2]), tables.signed)


def _verdict(comparison: Mapping[str, Any]) -> Cell:
    """The word of a comparison, and where it has a direction its size."""
    word = comparison["word"] or NOTHING
    return Cell(word, tables.SIZES.get(comparison["size"], "") if word in ("positive", "negative") else "")


def _mean(values: Sequence[float]) -> Cell:
    return (
        tables.ranged((float(np.mean(values)), min(values), max(values)), tables.percent) if values else Cell(NOTHING)
    )


def _percentile(near: Mapping[str, Any] | None) -> Cell:
    if near is None:
        return Cell(NOTHING)
    sizes = dict.fromkeys(f"{near[name]:,.0f}" for name in ("smallest", "largest"))
    return Cell(f"{near['value']:.0f}", f"of {near['peers']} masks of {' to '.join(sizes)}, it of {near['size']:,}")


# ---- The page


CAPTIONS = {
    "verdicts": "Differences of accuracy from scratch in points, paired by seed and by item, with {level:g} % "
    "intervals that hold together over all transfers. Half of the groups of test items explores, half confirms; the "
    "verdict is of the latter, with a margin of {margin} below which a difference does not matter. An interval allows "
    "for a group of test items that differs from all that were seen, which with few groups can make it several times "
    "as wide. The rank is by mean accuracy on the items that explore. Random masks over stages and kinds of leaves "
    "were tried at the same rates and tuning seeds; the percentile is among the {near} or more whose numbers that "
    "train below the head are nearest to the strategy's, which may be far from it. Scratch, the shipped strategies and "
    "the masks have the scores of the package, under its versions: nobody trained them here.",
    "beside": "On the items that {half}. Each strategy that is compared with is a family by itself, at {level:g} %, "
    "and exploratory. Which is best was chosen on the items that explore.",
    "kept": "Means over seeds, with their range. The accuracy is of the items that {half}. The source task is measured "
    "with the source's own head put back. The shift is other test items: {shifts}.",
    "costs": "Of one fit. FLOPs of a step are counted from the traced program, a mean over the steps of all phases; "
    "seconds, with what was compiled meanwhile, and memory are this machine's.",
    "proofs": "What experiments.check says of the strategy.",
}


def notes(record: Mapping[str, Any], contents: Contents) -> list[str]:
    """What must be said with the numbers."""
    lines = []
    failed = [check["check"] for check in record["proofs"] if check["passed"] is False]
    if failed:
        lines.append(
            f"REFUTED by {len(failed)} of {len(record['proofs'])} checks ({'; '.join(failed)}): the numbers are of "
            "what was trained, which is not what a strategy promises"
        )
    seeds = {len(part.transfer.flags["seeds"]) for part in contents.parts}
    lines.append(
        f"{'/'.join(map(str, sorted(seeds)))} seeds, which every card has: verdicts speak of these transfers alone"
    )
    lines += [f"{name} is left out: {why}" for name, why in record["left_out"].items()]
    lines += [
        f"{part.transfer.name} has no scores of {', '.join(part.reference.left_out)}, which its model is not for"
        for part in contents.parts
        if part.reference.left_out
    ]
    if record["explore"]:
        lines.append("of the items that explore alone: nothing here is a verdict")
    elif contents.order > 1:
        lines.append(
            f"this is strategy {contents.order} whose verdict on the same items this user has looked at, in whatever "
            "folder: of so many, the best is not as good as it looks"
        )
    differ = {name: each["anchor_items_differ"] for name, each in record["transfers"].items()}
    if any(count > 0 for count in differ.values()):
        tests = {part.transfer.name: len(part.items.labels) for part in contents.parts}
        items = ", ".join(f"{count:,} of {tests[name]:,} of {name}" for name, count in differ.items() if count > 0)
        equal = ", ".join(name for name, count in differ.items() if count == 0)
        why = "versions differ" if record["other_versions"] else "this machine rounds otherwise"
        lines.append(
            f"{ANCHOR}, trained again here under the first seed, has other scores than the shipped on some test items, "
            f"as {why}: {items}{f'; none of {equal}' if equal else ''}"
        )
    elif any(count == 0 for count in differ.values()):
        lines.append(f"{ANCHOR}, trained again here under the first seed, has its shipped scores to the bit")
    lines += [f"other versions: {line}" for line in record["other_versions"]]
    same, other = (
        ", ".join(name for name, each in record["transfers"].items() if each["shipped_bits"] is value)
        for value in (True, False)
    )
    if same or other:
        of_same = f"the same to the bit{f' on {same}' if other else ''}" if same else ""
        lines.append(
            f"its own shipped scores are {' and '.join(filter(None, [of_same, other and f'others on {other}']))}"
        )
    lost = {name: each["diverged"] for name, each in record["transfers"].items() if each["diverged"]}
    lines += [f"{count} fits of {name} diverged, and count as the commonest class" for name, count in lost.items()]
    digests = ", ".join(f"{name} {value[:16]}" for name, value in record["scores_sha256"].items())
    lines.append(f"scores: {digests}; all together {record['all_scores_sha256'][:16]}")
    return lines


def write(folder: Path, contents: Contents) -> dict[str, Any]:
    """Print the card, write card.json, card.html and card.bib into the folder; returns what card.json says."""
    record = json.loads(json.dumps(numbers(contents)))
    directory.write_record(folder / "card.json", record)
    directory.replace(folder / "card.bib", record["bibtex"])
    lines = notes(record, contents)
    half = "explore" if contents.explore else "confirm"
    transfers = record["transfers"].values()
    margins = dict.fromkeys(units.amount(each["margin"], "points") for each in transfers)
    shifts = dict.fromkeys(f"of {each['title']} {each['shift_to']}" for each in transfers if each["shift_to"])
    words = {
        "level": 100 * record["level"],
        "near": strategy_cards.NEAR,
        "half": half,
        "margin": " or ".join(margins),
        "shifts": "; ".join(shifts) or "none",
    }
    parts = {"verdicts": verdicts(record), "beside": beside(record), "kept": kept(record), "costs": costs(record)}
    parts["proofs"] = proofs(record)
    with figures.style():
        confirmed = {} if contents.explore else _judged(contents, "confirm", "scratch")
        family = [each._replace(strategy=contents.strategy) for each in confirmed.values()]
        picture = report.figure(
            "Verdicts on the items that confirm; grey is the margin.", [figures.forest(family)], "box wide"
        )
    sections = [
        Section(
            table.label, key, [Block(CAPTIONS[key].format(**words), table), *(picture if key == "verdicts" else [])]
        )
        for key, table in parts.items()
        if table.rows
    ]
    command = f"python -m experiments.card {contents.spec} --output=NEW{contents.flags}"
    environment = {key: value for key, value in contents.environment.items() if value}
    lists = [
        ("What goes with the numbers", [(str(i), line) for i, line in enumerate(lines, 1)]),
        ("", [("BibTeX", record["bibtex"])]),
    ]
    title = f"{contents.version}: {contents.strategy}"
    html = report.render(
        sections, title=title, lead=lead(record), provenance=Provenance(environment, command=command), lists=lists
    )
    directory.replace(folder / NAME, html)
    console.say(f"{title}\n{lead(record)}")
    for table in (parts["verdicts"], parts["beside"], parts["kept"], parts["costs"]):
        console.show(table)
    outcomes = [check["passed"] for check in record["proofs"]]
    counts = {"hold": outcomes.count(True), "do not apply": outcomes.count(None), "fail": outcomes.count(False)}
    lines = [f"checks: {', '.join(f'{count} {words}' for words, count in counts.items() if count)}", *lines]
    lines += [f"REFUTED: {check['check']}: {check['detail']}" for check in record["proofs"] if check["passed"] is False]
    console.notes([*lines, f"{folder / NAME}, card.json and card.bib; {contents.seconds:,.0f} s"])
    console.say(record["bibtex"].rstrip())
    return record


def lead(record: Mapping[str, Any]) -> str:
    """The card in a sentence."""
    words: dict[str, list[str]] = {}
    for each in record["transfers"].values():
        comparison = each["from_scratch"].get("confirm")
        if comparison:
            words.setdefault(comparison["word"] or "without a verdict", []).append(each["title"])
    if any(check["passed"] is False for check in record["proofs"]):
        return "The strategy is refuted by its own checks: see what is proved."
    if not words:
        return "Of the items that explore alone: nothing is judged."
    return (
        "Against training from scratch: " + "; ".join(f"{word} on {', '.join(on)}" for word, on in words.items()) + "."
    )
