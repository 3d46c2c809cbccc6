"""Exploring on one half of a test set, confirming on the other, and what a ledger counts of both.

Halves are of groups of test examples, or of examples where no groups are known, by the order of a hash of their number
under one fixed text: they are the same in every run, and nobody chooses them. A target is halved before anything is
trained (`halved`), so that no number on the other half is ever computed in the run.

A registration is a JSON file: the claim, the design that is to decide it, the smallest effect that counts, what would
refute it, and perhaps what was known when it was written. `enter` writes to the ledger, before anything is trained,
what is tried (explored, or judged on the whole test set) or which registration is to be tested; `decide` tests it,
once, and writes what came of it. `tljax.study.ledger` has the file and the level over all confirmations.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.runs import command_line, console, fields, looks, plan
from experiments.runs.command_line import flag
from experiments.runs.judging import Judging
from experiments.runs.plan import Experiment
from experiments.runs.predictions import Predictions, all_groups
from experiments.runs.settings import ExperimentFlags
from tljax import files, plugins
from tljax.data.derive import select
from tljax.study import ledger, statistics, summary, units
from tljax.study.ledger import LEVEL, Ledger
from tljax.study.results import Result
from tljax.study.summary import listed
from tljax.study.verdicts import Comparison, Right, area, base_of, scale
from tljax.types import InputError, Task

SPLIT = "tljax: halves of a test set, 1"
"""The text under which groups of test examples are hashed: no flag, as nobody is to choose the halves."""
HALVES = ("explore", "confirm")


@dataclass(frozen=True)
class LedgerFlags:
    """What a ledger counts, and which half of the test set is judged."""

    explore: bool | None = flag(None, "judge on one half of the test set's groups; needs --ledger")
    confirm: bool | None = flag(
        None, "test what --registration claims on the other half, with fresh --seeds, once; needs --ledger"
    )
    registration: str | None = flag(
        None, "a JSON file: claim, design, smallest_effect, refuted_by", role="free", place="path"
    )
    ledger: str | None = flag(
        None, "a file that counts all looks at a test set, and its confirmations", role="free", place="path"
    )
    false_discoveries: float | None = flag(
        None,
        f"the share of false ones among all confirmed claims of a new ledger, on average; default {LEVEL:g}",
        role="free",
    )

    @property
    def half(self) -> str:
        """explore, confirm, or all."""
        return "explore" if self.explore else "confirm" if self.confirm else "all"


def require_flags(options: LedgerFlags, judging: Judging) -> None:
    """Raise InputError for flags that contradict each other, or lack one another."""
    if options.explore and options.confirm:
        raise InputError("--explore and --confirm are both given: a run judges on one half")
    if options.half != "all" and not options.ledger:
        raise InputError(f"--{options.half} needs --ledger=FILE: what is not counted can be done until it succeeds")
    if options.confirm and not options.registration:
        raise InputError("--confirm needs --registration=FILE.json: what is claimed is written down before")
    if options.registration and not options.confirm:
        raise InputError("--registration is of --confirm: give both, or leave it out")
    if options.false_discoveries is not None and not options.ledger:
        raise InputError("--false_discoveries is of a ledger: give --ledger=FILE")
    if options.half != "all" and judging.verdict_on == "retention":
        raise InputError(f"--{options.half} halves the target's test set: it has no --verdict_on=retention")
    if options.confirm and judging.until:
        raise InputError("--until: a confirmation is of the seeds that were registered: leave it out")
    if options.confirm and judging.looks != 1:
        raise InputError(f"--looks={judging.looks}: a confirmation is one look, at --looks=1")


# ---- Halves of a test set


@dataclass(frozen=True)
class HalfTask(Task):
    """A task that has half of its test examples."""

    whole: Task | None = None


def halved(task: Task, half: str) -> Task:
    """The task with one half of its test examples, explore or confirm; as it is for all.

    Half of the groups (the greater half explores where they are odd in number), or of the examples where none are
    known. Raises InputError where a half would be of fewer groups than a verdict takes, or of fewer than
    two examples.
    """
    if half == "all":
        return task
    groups, items = task.test.groups, len(task.test)
    rows = rows_of_half(task, half)
    many, what = (items, "test examples") if groups is None else (len(np.unique(groups)), "groups of test examples")
    chosen = many // 2 if half == "confirm" else -(-many // 2)
    note = f"{half}: {chosen:,} of {many:,} {what}"
    note += "" if groups is None else f", {len(rows):,} of {items:,} examples"
    about = {f.name: getattr(task, f.name) for f in dataclasses.fields(Task)}
    about["test"] = select(task.test, rows)
    about["fingerprint"] = hashlib.sha256(f"{task.fingerprint} {half} {SPLIT}".encode()).hexdigest()
    about["note"] = "; ".join(filter(None, (note, task.note)))
    return HalfTask(**about, whole=task)


def rows_of_half(task: Task, half: str) -> np.ndarray:
    """Which test examples of a task are in a half, explore or confirm: int [items], ascending. Raises as `halved`."""
    groups = task.test.groups
    numbers = np.arange(len(task.test)) if groups is None else np.asarray(groups)
    units_of, what = np.unique(numbers), "test examples" if groups is None else "groups of test examples"
    least = 2 if groups is None else statistics.MIN_GROUPS
    if len(units_of) < 2 * least:
        there = _count(len(units_of), "test example" if groups is None else "group of test examples", what)
        raise InputError(f"--{half}: {task.name} has {there}, and each half needs {least}")
    return np.flatnonzero(np.isin(numbers, _half(units_of, half)))


def _half(numbers: np.ndarray, half: str) -> np.ndarray:
    """Those of the groups, or examples, that are in a half.

    >>> halves = [_half(np.arange(5), half).tolist() for half in ("explore", "confirm")]
    >>> sorted(sum(halves, [])), len(halves[0])
    ([0, 1, 2, 3, 4], 3)
    """
    hashes = [hashlib.sha256(f"{SPLIT} {int(number)}".encode()).digest() for number in numbers]
    order = np.array(sorted(range(len(numbers)), key=hashes.__getitem__))
    middle = -(-len(numbers) // 2)
    return numbers[order[:middle] if half == "explore" else order[middle:]]


def with_halves(experiments: Sequence[Experiment], half: str) -> list[Experiment]:
    """Experiments on one half of their target's test set, or on all of it."""
    return [experiment._replace(target=halved(experiment.target, half)) for experiment in experiments]


def _whole(experiment: Experiment) -> Experiment:
    """The experiment on the whole test set."""
    whole = experiment.target.whole if isinstance(experiment.target, HalfTask) else None
    return experiment if whole is None else experiment._replace(target=whole)


def digest_of_test_set(task: Task) -> str:
    """The digest that a ledger knows a test set by: of its whole targets, and groups."""
    task = task.whole if isinstance(task, HalfTask) and task.whole else task
    groups = task.test.groups
    return _digest_of_set(np.asarray(task.test.targets), None if groups is None else np.asarray(groups))


def _digest_of_set(targets: np.ndarray, groups: np.ndarray | None) -> str:
    about = looks.name_of_test_set(targets)
    if groups is None:
        return about
    return f"{about}-{looks.name_of_test_set(np.unique(groups, return_inverse=True)[1])}"


def refuse_evals(half: str, experiments: Sequence[Experiment], tasks: Collection[Task]) -> None:
    """Raise InputError if a further test set is a halved one, whole: it would show the other half."""
    halves = {digest_of_test_set(each.target): each.target.name for each in experiments if half != "all"}
    for task in tasks:
        if (name := halves.get(digest_of_test_set(task))) is not None:
            raise InputError(f"--eval: {task.name} is the test set of '{name}', of which --{half} is to see one half")


# ---- Registrations


class Registration(NamedTuple):
    """What is claimed, and what is to decide it."""

    claim: Mapping[str, str]
    """strategy, source and target by their names, verdict, and against."""
    design: Mapping[str, Any]
    """{flag of experiments.compare: value}."""
    smallest_effect: float
    """The margin."""
    refuted_by: tuple[str, ...]
    digest: str
    """SHA-256 of the file."""


CLAIMS = ("positive", "positive beyond", "negative", "negative beyond", "equivalent")
"""What can be claimed: a direction, one that is beyond the margin, or a difference within it."""
_OF_DIFFERENCE = ("equivalent", "within")
_REFUTING = {
    "positive": ("negative", *_OF_DIFFERENCE),
    "negative": ("positive", *_OF_DIFFERENCE),
    "equivalent": ("positive", "negative", "beyond"),
}
"""{what is claimed: what can refute it}: beyond has no direction, and what is equivalent is within the margin."""
_REGISTRATION: fields.Form = {
    "claim": {"strategy": str, "target": str, "verdict": str, "source?": str, "against?": str},
    "design": {str: (str, int, float)},
    "smallest_effect": float,
    "refuted_by": [str],
    "known?": str,
}
_OF_CLAIM = ("strategy", "target", "verdict", "source", "against")


def read_registration(file: Path, kinds: Mapping[str, command_line.Kind]) -> Registration:
    """Read a registration; raises InputError, in a line, for what is none.

    `kinds` are of the flags that a design may have.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"--registration={file} cannot be read: {error.strerror or error}") from error
    try:
        record = json.loads(files.decoded(data, f"'{file}'"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--registration={file} is no JSON ({error})") from error
    if odd := fields.fault(record, _REGISTRATION):
        raise InputError(f"--registration={file}: {odd}")
    fields_of_file = [name.removesuffix("?") for name in _REGISTRATION]
    for what, names, allowed in (("", record, fields_of_file), ("claim.", record["claim"], _OF_CLAIM)):
        for name in names:
            if name not in allowed:
                raise InputError(f"--registration={file}: {what}{name} is unknown{plugins.nearest(name, allowed)}")
    claim = {"against": "scratch", **record["claim"]}
    if claim["verdict"] not in CLAIMS:
        raise InputError(f"--registration={file}: claim.verdict '{claim['verdict']}': give one of {', '.join(CLAIMS)}")
    refuted_by, refuting = record["refuted_by"], _REFUTING[claim["verdict"].split()[0]]
    if not refuted_by or not {*refuted_by} <= {*refuting}:
        raise InputError(f"--registration={file}: refuted_by: give one or more of {', '.join(refuting)}")
    missing = [name for name in ("seeds", "train_examples") if name not in record["design"]]
    if missing:
        raise InputError(f"--registration={file}: design has no {missing[0]}: it says which fits decide")
    if any(name.lstrip("-").startswith("flagfile") for name in record["design"]):
        raise InputError(f"--registration={file}: design.flagfile: a flagfile may change later: write its flags here")
    lines = [f"--{name}={value}" for name, value in record["design"].items()]
    try:
        design = command_line.parse(["compare", *lines], kinds)
    except InputError as error:
        raise InputError(f"--registration={file}: design: {error}") from error
    return Registration(
        claim, design, float(record["smallest_effect"]), tuple(refuted_by), hashlib.sha256(data).hexdigest()
    )


def require_registered(
    registration: Registration,
    values: Mapping[str, Any],
    options: LedgerFlags,
    judging: Judging,
    experiments: Sequence[Experiment],
) -> None:
    """Raise InputError where the flags of a run are not those that were registered, or are of more than the claim.

    `values` are the flags that programs share, {flag: value}, and `options` those of the program, as they were given;
    `judging` has the margin and the base by their names.
    """
    labels = {budget for each in experiments for budget in each.settings.train_examples}
    if judging.family == "budgets" and len(labels) > 1:
        raise InputError("--family=budgets: a claim is of one difference: register family as area, or as one budget")
    unregistered = {name: default for name, default in _OF_WORDS.items() if name not in registration.design}
    for name, wanted in {**unregistered, **registration.design}.items():
        shared = {**DEFAULTS, **values}
        actual = (
            getattr(options, name) if hasattr(options, name) else shared.get(name, shared.get(name[len("source_") :]))
        )
        if actual != wanted:
            there, here = (",".join(map(str, each)) if isinstance(each, tuple) else each for each in (wanted, actual))
            is_registered = "is not registered" if name in unregistered else f"{there} is registered"
            raise InputError(f"--{name}={here}: {is_registered}: run what was registered, or register another")
    if judging.margin is None or judging.margin != registration.smallest_effect:
        smallest = registration.smallest_effect
        raise InputError(f"--margin={judging.margin}: the smallest effect that was registered is {smallest:g}")
    claim = registration.claim
    if judging.against != claim["against"]:
        raise InputError(f"--against={judging.against}: the claim is against {claim['against']}")
    strategies = {strategy.label for each in experiments for strategy in each.strategies}
    targets = {each.target.name for each in experiments}
    sources = {each.source.name for each in experiments if each.source}
    for what, there, claimed in (
        ("strategies", strategies - {"scratch", claim["against"]}, {claim["strategy"]}),
        ("target", targets, {claim["target"]}),
        ("source", sources, {claim["source"]} if "source" in claim else sources),
    ):
        if there != claimed:
            raise InputError(f"--{what}: {listed(sorted(there))}, but the claim is of {listed(sorted(claimed))} alone")
    if len(sources) > 1:
        raise InputError(f"--source: {listed(sorted(sources))}: a claim is of one; name it in the registration")


DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in command_line.fields(ExperimentFlags)}
"""{flag: its default} of the flags that programs share."""
_OF_WORDS: Mapping[str, Any] = {
    **{name: getattr(Judging(), name) for name in ("family", "level")},
    "verdict_of": DEFAULTS["verdict_of"],
    **{"draws": None, "seeds_apart": None},
}
"""{flag: its default} of what decides on the same fits, or how many there are: who has seen some may not choose it."""


# ---- Before anything is trained


class Entered(NamedTuple):
    """What a ledger says of a run that is to come."""

    file: Path
    half: str
    test_sets: Mapping[str, str]
    """{target: digest of its whole test set}."""
    notes: tuple[str, ...]
    registration: Registration | None = None
    number: int = 0
    """Of the registration in the ledger: the first is 1."""
    fits: str = ""
    """A digest of the keys of the planned fits."""


class _Planned(NamedTuple):
    """What a run is to judge on one test set."""

    methods: tuple[str, ...]
    """Each strategy with a digest of its recipe and source: what is tried."""
    seeds: tuple[int, ...]
    """With the draws of labels that are crossed with them: draw 3 has the labels of seed 3."""
    fits: str
    """A digest of the keys of the fits on the whole test set."""
    keys: tuple[str, ...]
    """The beginnings of the keys of the fits."""
    half_set: str
    """The digest of the test examples that are judged."""
    bases: tuple[str, ...] = ()
    """What the strategies are compared with, with a digest of its recipe and source."""

    def record(self) -> dict[str, Any]:
        """The fields of an entry that tell of it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}


def enter(
    options: LedgerFlags,
    experiments: Sequence[Experiment],
    judging: Judging,
    registration: Registration | None,
    seeds: Collection[int] = (),
) -> Entered | None:
    """Write to the ledger what is to be judged; None without a ledger.

    `seeds` are those that may be trained too, beside those that are planned. Raises InputError where a confirmation
    cannot be one: its seeds were explored, its half was seen, the registration was changed, or the claim was tested
    before.
    """
    if not options.ledger:
        return None
    file = files.place(options.ledger, "ledger")
    by_set: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        by_set.setdefault(digest_of_test_set(experiment.target), []).append(experiment)
    notes: list[str] = []
    number, fits = 0, ""
    with ledger.opened(file, options.false_discoveries, console.say) as book:
        for test_set, of_set in by_set.items():
            tried, name = _planned(of_set, judging.against), of_set[0].target.name
            tried = tried._replace(seeds=tuple(sorted({*tried.seeds, *seeds})))
            before = _notes_before(book, test_set, options.half, name, tried)
            if registration is None:
                _add_look(book, test_set, options.half, tried, name)
            else:
                number, fits = _register(book, test_set, registration, tried, name), tried.fits
            notes += before
    sets = {each.target.name: digest_of_test_set(each.target) for each in experiments}
    return Entered(file, options.half, sets, tuple(notes), registration, number, fits)


def _planned(experiments: Sequence[Experiment], against: str) -> _Planned:
    methods: dict[str, None] = {}
    bases: set[str] = set()
    seeds: set[int] = set()
    keys: set[str] = set()
    own_keys = sorted({key[:KEY] for each in experiments for key in plan.planned(each)})
    for experiment in map(_whole, experiments):
        for key, job in plan.planned(experiment).items():
            keys.add(key)
            seeds |= {job.seed} | ({job.result.draw} if job.result.draw is not None else set())
            name = summary.label(job.result)
            method = _method(job.result, experiment.source.name if experiment.source else None)
            if name == against:
                bases.add(method)
            elif name != "scratch":
                methods[method] = None
    digest = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
    test = experiments[0].target.test
    half_set = _digest_of_set(np.asarray(test.targets), None if test.groups is None else np.asarray(test.groups))
    return _Planned(tuple(methods), tuple(sorted(seeds)), digest, tuple(own_keys), half_set, tuple(sorted(bases)))


KEY = 12
"""How many characters of a fit's key a ledger has."""


def _method(result: Result, source: str | None) -> str:
    return f"{summary.label(result)}{f' from {source}' if source else ''} ({str(result.recipe)[:8]})"


def _tried(book: Ledger, test_set: str | None = None) -> list[Mapping[str, Any]]:
    """The entries that tell of strategies that were tried on a test set, or on any."""
    kinds = ("look", "registration")
    return [each for each in book.entries if each["kind"] in kinds and test_set in (None, each["test_set"])]


def _notes_before(book: Ledger, test_set: str, half: str, name: str, tried: _Planned) -> list[str]:
    """How many strategies were tried on a test set before these fits first were, as the ledger has it."""
    before = list(
        itertools.takewhile(
            lambda entry: (entry.get("half"), entry.get("fits")) != (half, tried.fits), _tried(book, test_set)
        )
    )
    others = {method for entry in before for method in entry["methods"]} - {*tried.methods}
    tested = sum(entry["kind"] == "registration" for entry in before)
    return [
        f"by this ledger {_count(len(others), 'other strategy', 'other strategies')} had been tried on the test set of "
        f"{name} before, in {_count(len(before) - tested, 'look', 'looks')} and "
        f"{_count(tested, 'confirmation', 'confirmations')}"
    ]


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _add_look(book: Ledger, test_set: str, half: str, tried: _Planned, name: str) -> None:
    """Write a look, unless the same fits, under as many seeds that may follow, were looked at on this half before."""
    same, seeds = {"test_set": test_set, "half": half, "fits": tried.fits}, {*tried.seeds}
    before = [entry for entry in book.of_kind("look", test_set) if same.items() <= entry.items()]
    if not any(seeds <= {*entry["seeds"]} for entry in before):
        book.add({"kind": "look", **same, "target": name, **tried.record()})


def _register(book: Ledger, test_set: str, registration: Registration, tried: _Planned, name: str) -> int:
    """The number of a registration, which is written if it is new; raises InputError as `enter` does."""
    claim = hashlib.sha256(
        json.dumps([*tried.methods, *tried.bases, registration.claim["verdict"]]).encode()
    ).hexdigest()[:16]
    for number, entry in enumerate(book.entries, 1):
        if entry["kind"] == "registration" and entry["test_set"] == test_set and entry["claim"] == claim:
            if entry["digest"] != registration.digest:
                raise InputError(
                    f"the claim was registered before with another design ({book.file.name}, line {number}, "
                    f"{entry['digest'][:12]}; now {registration.digest[:12]}): a claim is tested once on a test "
                    "set: restore the registration, or take other test examples"
                )
            return int(entry["number"])
    if any(entry["digest"] == registration.digest for entry in book.of_kind("registration")):
        raise InputError("this registration was tested before, of other fits or on another test set: register anew")
    for number, entry in enumerate(book.entries, 1):
        if entry["kind"] not in ("look", "registration") or entry["test_set"] != test_set:
            continue
        where = f"{book.file.name}, line {number}"
        if entry["kind"] == "look" and (again := sorted({*entry["seeds"]} & {*tried.seeds})):
            texts = listed(map(str, again[:5])) + (f" and {len(again) - 5} more" if again[5:] else "")
            raise InputError(f"--seeds: {texts} were looked at before ({where}): a confirmation takes fresh ones")
        if entry["half"] != "explore" and (seen := {*entry["methods"]} & {*tried.methods}):
            raise InputError(
                f"'{min(seen)}' was judged on the half that confirms before ({where}): that is a look and no "
                "confirmation; take other test examples"
            )
    number = 1 + len(book.of_kind("registration"))
    about = {"test_set": test_set, "half": "confirm", "target": name, "digest": registration.digest, "claim": claim}
    book.add({"kind": "registration", **about, **tried.record(), "number": number, "says": dict(registration.claim)})
    return number


def enter_report(place: str, parts: Sequence[Predictions], against: str) -> list[str]:
    """Write to a ledger what is judged of fits that were made before; returns notes as `enter` does.

    Fits of one run that the ledger has are no new look; which half they are of is known from there too.
    """
    rows: dict[str, list[Result]] = {}
    for part in parts:
        for row in part.rows if not part.longer else ():
            if row.target in part.labels:
                rows.setdefault(row.target, []).append(row)
    notes: list[str] = []
    groups = all_groups(parts)
    labels = {target: each for part in parts for target, each in part.labels.items()}
    with ledger.opened(files.place(place, "ledger"), None, console.say) as book:
        for target, members in rows.items():
            half_set = _digest_of_set(np.asarray(labels[target]), groups.get(target))
            known = [entry for entry in _tried(book) if entry.get("half_set") == half_set]
            test_set, half = (known[0]["test_set"], known[0]["half"]) if known else (half_set, "all")
            keys = {row.key[:KEY] for row in members}
            methods = dict.fromkeys(name for entry in known if keys & {*entry["keys"]} for name in entry["methods"])
            new = [row for row in members if not any(row.key[:KEY] in entry["keys"] for entry in known)]
            methods |= dict.fromkeys(
                _method(row, row.source) for row in new if summary.label(row) not in ("scratch", against)
            )
            fits = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
            draws = {row.draw for row in members if row.draw is not None}
            seeds = tuple(sorted({row.seed for row in members} | draws))
            tried = _Planned(tuple(methods), seeds, fits, tuple(sorted(keys)), half_set)
            same = next((entry for entry in known if _is_of_look(members, entry)), None)
            if same is not None:
                tried = tried._replace(fits=same["fits"])
            notes += _notes_before(book, test_set, half, target, tried)
            if same is None:
                _add_look(book, test_set, half, tried, target)
    return notes


def _is_of_look(rows: Sequence[Result], look: Mapping[str, Any]) -> bool:
    """Whether all fits are of a look: those of its first round, and of each recipe those that further seeds added."""
    known, seeds = {*look["keys"]}, {*look["seeds"]}
    of_look = {(row.recipe, row.train_examples) for row in rows if row.key[:KEY] in known}
    return all(
        row.key[:KEY] in known
        or (
            row.recipe is not None
            and {row.seed, row.draw} - {None} <= seeds
            and (row.recipe, row.train_examples) in of_look
        )
        for row in rows
    )


# ---- After training


def p_of_claim(interval: statistics.Interval, verdict: str, margin: float) -> float:
    """One-sided p of what a claim denies: no difference in its direction, one within the margin, or one beyond it.

    >>> interval = statistics.Interval(0.03, 0.01, 0.05, 0.01, 20.0, 0.95)
    >>> [round(p_of_claim(interval, claim, 0.01), 4) for claim in ("positive", "positive beyond", "equivalent")]
    [0.0035, 0.0296, 0.9704]
    """
    mean, error, degrees = interval.mean, interval.standard_error, interval.degrees
    if verdict == "equivalent":
        return max(float(stats.t.sf((margin - side * mean) / error, degrees)) for side in (1, -1))
    direction = 1 if verdict.startswith("positive") else -1
    return float(stats.t.sf((direction * mean - (margin if verdict.endswith("beyond") else 0)) / error, degrees))


def decide(
    entered: Entered, family: Sequence[Comparison], table: Right, groups: Mapping[str, np.ndarray | None]
) -> str:
    """What came of a registered claim, a sentence, once it is in the ledger; of exploring that it is that; else "".

    A claim is confirmed if its e-value reaches e-LOND's threshold and no registered refutation came out; refuted if one
    did; else not decided. A word that is withheld has the e-value 0. What is in the ledger already is said again.
    """
    registration = entered.registration
    if registration is None:
        return EXPLORED if entered.half == "explore" else ""
    verdict, target = registration.claim["verdict"], registration.claim["target"]
    strategy = registration.claim["strategy"]
    of_claim = [each for each in family if each.strategy == strategy and each.target == target]
    comparison = of_claim[0] if len(of_claim) == 1 else None
    e = 0.0
    if comparison is not None and comparison.word:
        e = ledger.e_value(p_of_claim(_interval(comparison, table, groups), verdict, comparison.margin))
    refuted = comparison is not None and {comparison.word, comparison.size} & {*registration.refuted_by}
    with ledger.opened(entered.file, None, console.say) as book:
        before = [each for each in book.of_kind("confirmation") if each["digest"] == registration.digest]
        if before:
            entry = before[0]
        else:
            discoveries = sum(each["decision"] == "confirmed" for each in book.of_kind("confirmation"))
            needed = ledger.threshold(entered.number, discoveries, book.level)
            decision = "refuted" if refuted else "confirmed" if e >= needed else "not decided"
            entry = {"kind": "confirmation", "test_set": entered.test_sets[target], "digest": registration.digest}
            entry |= {"number": entered.number, "e": e, "needed": needed, "decision": decision}
            book.add(entry)
        level = book.level
    return _sentence(registration, entry, comparison, level)


def _interval(comparison: Comparison, table: Right, groups: Mapping[str, np.ndarray | None]) -> statistics.Interval:
    """The interval of one comparison by itself, in what the metric is measured in."""
    of_set = [cell for cell in table if cell.target == comparison.target and not cell.longer]
    base = base_of([comparison])
    cells = sorted(
        (
            cell
            for cell in of_set
            if cell.strategy == comparison.strategy
            and cell.source == comparison.source
            and cell.budget in comparison.budgets
        ),
        key=lambda cell: cell.budget,
    )
    bases = [cell._replace(source=None if base == "scratch" else cell.source, strategy=base) for cell in cells]
    size = scale(table, of_set)
    interval = statistics.crossed(area(table, cells, bases) / size, comparison.level, groups.get(comparison.target))
    mean, low, high, error = (size * part for part in interval[:4])
    return interval._replace(mean=mean, low=low, high=high, standard_error=error)


EXPLORED = "Explored on one half of the test set, as often as somebody liked, and confirmed by nothing yet."
_CLAIMED = {
    "positive": "is better than {}",
    "positive beyond": "is better than {} by more than the margin",
    "negative": "is worse than {}",
    "negative beyond": "is worse than {} by more than the margin",
    "equivalent": "differs from {} by less than the margin",
}


def _sentence(registration: Registration, entry: Mapping[str, Any], comparison: Comparison | None, level: float) -> str:
    claim = registration.claim
    what = f"{claim['strategy']} {_CLAIMED[claim['verdict']].format(claim['against'])} on {claim['target']}"
    mean = "" if comparison is None else f" ({units.difference(comparison.metric, comparison.mean)})"
    decision = {"confirmed": "Confirmed", "refuted": "Refuted", "not decided": "Not confirmed"}[entry["decision"]]
    reason = f"its e-value is {entry['e']:,.0f}, and {entry['needed']:,.0f} is needed"
    if entry["decision"] == "refuted" and comparison is not None:
        came = listed(word for word in (comparison.word, comparison.size) if word in registration.refuted_by)
        reason = f"{came} came out, which was registered to refute it; {reason}"
    return (
        f"{decision}: that {what}{mean}; {reason} (confirmation {entry['number']} of the ledger, whose confirmed "
        f"claims are false in at most {100 * level:g} % on average; registration {registration.digest})."
    )
