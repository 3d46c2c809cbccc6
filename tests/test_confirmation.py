"""Exploring on one half of a test set and confirming on the other: what is halved, written, refused and decided."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from test_programs import command, results

from experiments import compare, report
from experiments.runs import confirmation
from experiments.runs.confirmation import LedgerFlags
from experiments.runs.judging import Judging
from tljax.study import ledger, statistics, verdicts
from tljax.study.results import Result
from tljax.study.verdicts import Cell
from tljax.types import ArrayExamples, InputError, Task

pytestmark = pytest.mark.usefixtures("no_pictures")


def task(items=400, groups=None):
    train = ArrayExamples(np.zeros((6, 2), np.float32), np.arange(6, dtype=np.int32) % 3)
    values = np.arange(2 * items, dtype=np.float32).reshape(items, 2)
    test = ArrayExamples(values, np.arange(items, dtype=np.int32) % 3, groups)
    return Task("clothes", train, test, ("a", "b", "c"), "f" * 64, note="a part")


def test_halves_share_nothing_and_are_the_same_every_time():
    whole = task(401)
    halves = [confirmation.halved(whole, half) for half in confirmation.HALVES]
    rows = [half.test.arrays[:, 0].astype(int) // 2 for half in halves]
    assert sorted([*rows[0], *rows[1]]) == list(range(401)) and [len(each) for each in rows] == [201, 200]
    for half, chosen in zip(halves, rows, strict=True):
        np.testing.assert_array_equal(half.test.targets, chosen % 3)
        assert half.train is whole.train and half.whole is whole and half.name == "clothes"
    assert len({whole.fingerprint, *(half.fingerprint for half in halves)}) == 3
    assert {confirmation.digest_of_test_set(each) for each in (whole, *halves)} == {
        confirmation.digest_of_test_set(whole)
    }
    assert confirmation.halved(whole, "all") is whole
    assert halves[0].note == "explore: 201 of 401 test examples; a part"


def test_a_half_is_known_to_stay_what_it_was():
    """Another order of the hash would mix the halves of all ledgers that there are."""
    confirms = confirmation.halved(task(12), "confirm").test.arrays[:, 0].astype(int) // 2
    assert sorted(confirms) == [1, 5, 6, 8, 9, 11]


def test_groups_stay_together():
    groups = np.repeat(np.arange(21), np.arange(21) + 3)
    halves = [confirmation.halved(task(len(groups), groups), half).test.groups for half in confirmation.HALVES]
    assert not set(halves[0]) & set(halves[1]) and sorted([*halves[0], *halves[1]]) == groups.tolist()
    assert [len(set(each)) for each in halves] == [11, 10]
    few = task(30, np.arange(30) % 15)
    with pytest.raises(InputError, match="has 15 groups of test examples, and each half needs 8"):
        confirmation.halved(few, "explore")
    with pytest.raises(InputError, match="has 1 group of test examples, and each half needs 8"):
        confirmation.halved(task(30, np.zeros(30, int)), "explore")


def test_flags_that_lack_one_another_are_refused():
    judging = Judging()
    for flags, words in (
        ({"explore": True}, "--explore needs --ledger"),
        ({"confirm": True}, "--confirm needs --ledger"),
        ({"confirm": True, "ledger": "l"}, "--confirm needs --registration"),
        ({"explore": True, "confirm": True, "ledger": "l"}, "both given"),
        ({"registration": "r", "ledger": "l"}, "--registration is of --confirm"),
        ({"false_discoveries": 0.1}, "is of a ledger"),
    ):
        with pytest.raises(InputError, match=words):
            confirmation.require_flags(LedgerFlags(**flags), judging)
    confirming = LedgerFlags(confirm=True, ledger="l", registration="r")
    with pytest.raises(InputError, match="a confirmation is one look"):
        confirmation.require_flags(confirming, Judging(looks=2))
    with pytest.raises(InputError, match="no --verdict_on=retention"):
        confirmation.require_flags(confirming, Judging(verdict_on="retention", against="full"))
    confirmation.require_flags(confirming, judging)
    assert [LedgerFlags().half, confirming.half, LedgerFlags(explore=True).half] == ["all", "confirm", "explore"]


SAYS = {
    "claim": {"strategy": "full", "target": "clothes", "verdict": "positive"},
    "design": {"seeds": "4-9", "train_examples": "all"},
    "smallest_effect": 0.5,
    "refuted_by": ["negative", "equivalent"],
}


def registered(folder, says=SAYS, **claim):
    file = folder / "claim.json"
    file.write_text(json.dumps({**says, "claim": {**says["claim"], **claim}}))
    return confirmation.read_registration(file, compare.KINDS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"claim": {**SAYS["claim"], "verdict": "better"}}, "claim.verdict 'better': give one of positive"),
        ({"claim": {"strategy": "full", "verdict": "positive"}}, "claim.target is not there"),
        ({"claim": {**SAYS["claim"], "sauce": "a"}}, "claim.sauce is unknown"),
        ({"refuted_by": []}, "refuted_by: give one or more"),
        ({"refuted_by": ["positive"]}, "refuted_by: give one or more of negative"),
        ({"refuted_by": ["beyond"]}, "refuted_by: give one or more of negative, equivalent, within"),
        (
            {"claim": {**SAYS["claim"], "verdict": "equivalent"}, "refuted_by": ["within"]},
            "refuted_by: give one or more of positive, negative, beyond",
        ),
        ({"design": {"seeds": "1-2"}}, "design has no train_examples"),
        ({"design": {**SAYS["design"], "flagfile": "a.flags"}}, "design.flagfile: a flagfile may change later"),
        ({"design": {"seeds": "1-2", "train_examples": "all", "steps": "many"}}, "design: .*many"),
        ({"smallest_effect": "0.5"}, "smallest_effect is .*not a number"),
        ({"more": 1}, "more is unknown"),
        ({"known": ["a paper"]}, "known is .*not text"),
        ({"knwon": "a paper"}, "knwon is unknown.*'known'"),
    ],
)
def test_what_is_no_registration_is_refused_in_a_line(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        registered(tmp_path, {**SAYS, **changes}, **changes.get("claim", {}))
    assert "\n" not in str(caught.value)


def test_a_registration_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{'a'")
    (tmp_path / "b.json").write_bytes("{}".encode("utf-16"))
    for name, words in (("none.json", "cannot be read"), ("a.json", "is no JSON"), ("b.json", "UTF-16")):
        with pytest.raises(InputError, match=words):
            confirmation.read_registration(tmp_path / name, compare.KINDS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"level": 0.9}, "--level=0.9: is not registered"),
        ({"family": "all"}, "--family=all: is not registered"),
        ({"verdict_of": "best"}, "--verdict_of=best: is not registered"),
        ({"draws": (0, 1)}, "--draws=0,1: is not registered"),
        ({"seeds_apart": True}, "--seeds_apart=True: is not registered"),
    ],
)
def test_what_decides_on_the_same_fits_is_registered_or_left_alone(tmp_path, flags, words):
    """A run that was killed before its page has shown its fits: their words are not to be chosen then."""
    experiments = [
        SimpleNamespace(
            settings=SimpleNamespace(train_examples=("all",)),
            strategies=[SimpleNamespace(label=name) for name in ("scratch", "full")],
            target=SimpleNamespace(name="clothes"),
            source=None,
        )
    ]
    plain = {"seeds": tuple(range(4, 10)), "train_examples": ("all",), "margin": 0.5}

    def require(says, **more):
        options = compare.CompareFlags(**{**plain, **{name: each for name, each in more.items() if name in KNOWN}})
        confirmation.require_registered(registered(tmp_path, says), more, options, options, experiments)

    require(SAYS)
    with pytest.raises(InputError, match=words):
        require(SAYS, **flags)
    texts = {name: ",".join(map(str, each)) if isinstance(each, tuple) else str(each) for name, each in flags.items()}
    require({**SAYS, "design": {**SAYS["design"], **texts}}, **flags)
    experiments.append(SimpleNamespace(**{**vars(experiments[0]), "settings": SimpleNamespace(train_examples=("9",))}))
    with pytest.raises(InputError, match="a claim is of one difference"):
        require({**SAYS, "design": {**SAYS["design"], "family": "budgets"}}, family="budgets")


KNOWN = vars(compare.CompareFlags())


def test_a_registration_that_went_on_with_another_base_is_refused(tmp_path):
    registration = registered(tmp_path)
    tried = confirmation._Planned(("full (1)",), (4, 5), "fits", ("key",), "half", ("scratch (2)",))
    with ledger.opened(tmp_path / "l") as book:
        assert confirmation._register(book, "set", registration, tried, "clothes") == 1
        assert confirmation._register(book, "set", registration, tried, "clothes") == 1
        with pytest.raises(InputError, match="tested before, of other fits"):
            confirmation._register(book, "set", registration, tried._replace(bases=("scratch (3)",)), "clothes")
        assert len(book.of_kind("registration")) == 1


@pytest.mark.parametrize("verdict", confirmation.CLAIMS)
@pytest.mark.parametrize("truth", [-0.02, 0.0, 0.02])
def test_p_of_a_claim_is_that_of_the_interval_which_ends_at_what_the_claim_denies(verdict, truth):
    """The one-sided p is half of 1 - level at the level at which the interval's end is there."""
    rng = np.random.default_rng(3)
    scores = np.clip(
        truth + 0.02 * rng.standard_normal((7, 1)) + rng.choice([-1, 0, 1], (7, 90), p=[0.1, 0.8, 0.1]), -1, 1
    )
    margin = 0.015
    p = confirmation.p_of_claim(statistics.crossed(scores), verdict, margin)
    assert 0 < p < 1
    ends = statistics.crossed(scores, abs(1 - 2 * p))
    low, high = (ends.low, ends.high) if p < 0.5 else (ends.high, ends.low)
    denied = {"positive": (low, 0), "positive beyond": (low, margin), "negative": (high, 0)}
    denied |= {"negative beyond": (high, -margin)}
    if verdict == "equivalent":
        assert min(margin - high, low + margin) == pytest.approx(0, abs=1e-9)
    else:
        assert denied[verdict][0] == pytest.approx(denied[verdict][1], abs=1e-9)


def table(effect, seeds=range(12), items=500):
    """Right and wrong of scratch and of full, which is right more often by the effect."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.3, 0.9, items)
    return {
        Cell(source, "clothes", name, 60): {seed: rng.random(items) < chance + more for seed in seeds}
        for source, name, more in ((None, "scratch", 0.0), ("digits", "full", effect))
    }


def entered(folder, registration, number=1):
    return confirmation.Entered(folder / "l", "confirm", {"clothes": "set"}, (), registration, number, "fits")


@pytest.mark.parametrize(
    ("effect", "verdict", "decision"),
    [
        (0.09, "positive", "Confirmed"),
        (0.09, "positive beyond", "Confirmed"),
        (0.0, "positive", "Not confirmed"),
        (-0.09, "positive", "Refuted"),
        (-0.09, "negative", "Confirmed"),
        (0.012, "positive beyond", "Not confirmed"),
    ],
)
def test_a_claim_is_decided_once_and_said_again(tmp_path, effect, verdict, decision):
    others = ["negative" if verdict.startswith("positive") else "positive"]
    registration = registered(tmp_path, {**SAYS, "refuted_by": others}, verdict=verdict)
    right = table(effect)
    family, _ = verdicts.compared(right, 0.005, 0.95)
    text = confirmation.decide(entered(tmp_path, registration), family, right, {})
    assert text.startswith(f"{decision}: that full is ") and registration.digest in text
    before = (tmp_path / "l").read_bytes()
    assert confirmation.decide(entered(tmp_path, registration), family, table(0.5), {}) == text
    assert (tmp_path / "l").read_bytes() == before
    with ledger.opened(tmp_path / "l") as book:
        (entry,) = book.of_kind("confirmation")
    interval = statistics.crossed(verdicts.differences(right, *[cell for cell in reversed(right)]))
    assert entry["e"] == pytest.approx(ledger.e_value(confirmation.p_of_claim(interval, verdict, 0.005)))
    assert entry["needed"] == pytest.approx(ledger.threshold(1, 0))


def test_what_was_confirmed_before_lowers_the_threshold(tmp_path):
    registration = registered(tmp_path)
    with ledger.opened(tmp_path / "l", 0.1) as book:
        for number, decision in enumerate(("confirmed", "refuted", "confirmed"), 1):
            about = {"kind": "confirmation", "test_set": "another", "number": number, "e": 1.0, "decision": decision}
            book.add({**about, "digest": str(number)})
    right = table(0.09)
    family, _ = verdicts.compared(right, 0.005, 0.95)
    text = confirmation.decide(entered(tmp_path, registration, 4), family, right, {})
    assert f"{ledger.threshold(4, 2, 0.1):,.0f} is needed" in text and "at most 10 % on average" in text


def test_what_was_explored_says_so_and_enters_no_confirmation(tmp_path):
    of_run = entered(tmp_path, None)._replace(half="explore")
    assert confirmation.decide(of_run, [], {}, {}) == confirmation.EXPLORED
    assert confirmation.decide(of_run._replace(half="all"), [], {}, {}) == "" and not (tmp_path / "l").exists()


def test_a_word_that_is_withheld_confirms_nothing(tmp_path):
    registration = registered(tmp_path)
    right = table(0.09)
    family = [each._replace(word="", size="") for each in verdicts.compared(right, 0.005, 0.95)[0]]
    assert confirmation.decide(entered(tmp_path, registration), family, right, {}).startswith("Not confirmed")


def line(tasks, folder, name, *more, **flags):
    given = {"strategies": ("full",), "train_examples": ("all",), "steps": 20, "longer_scratch": "false"} | flags
    given |= {"workdir": folder / name, "epochs": None}
    return ["compare", *command(tasks, folder, **given), f"--ledger={folder / 'ledger.jsonl'}", *more]


@pytest.mark.slow
def test_a_claim_is_explored_registered_and_confirmed_once(tasks, tmp_path, capsys):
    compare.main(line(tasks, tmp_path, "explored", "--explore", strategies=("full", "head_only")))
    said = " ".join(capsys.readouterr().out.split())
    assert "by this ledger 0 other strategies had been tried on the test set" in said
    explored = results(tmp_path / "explored")
    page = (tmp_path / "explored" / "report.md").read_text()
    assert "explore: 20 of 40 test examples" in page and page.split("\n\n")[1].startswith(confirmation.EXPLORED)
    with np.load(tmp_path / "explored" / explored[-1].predictions) as kept:
        assert len(kept["labels"]) == 20
    target = explored[-1].target
    says = {**SAYS, "claim": {**SAYS["claim"], "target": target}, "design": {"seeds": "1-4", "train_examples": "all"}}
    file = tmp_path / "claim.json"
    file.write_text(json.dumps(says))
    confirming = ("--confirm", f"--registration={file}")

    def refused(words, *more, **flags):
        before = (tmp_path / "ledger.jsonl").read_bytes()
        with pytest.raises(InputError, match=words) as caught:
            compare.main(line(tasks, tmp_path, "confirmed", *confirming, *more, **flags))
        assert "\n" not in str(caught.value) and not (tmp_path / "confirmed").exists()
        assert (tmp_path / "ledger.jsonl").read_bytes() == before

    refused("--seeds: 1 were looked at before", seeds=(1, 2, 3, 4))
    file.write_text(json.dumps({**says, "design": {"seeds": "4-7", "train_examples": "all"}}))
    refused("--seeds=4,5: 4,5,6,7 is registered", seeds=(4, 5))
    refused(
        "--strategies: full and head_only, but the claim is of full",
        seeds=(4, 5, 6, 7),
        strategies=("full", "head_only"),
    )
    refused("smallest effect that was registered is 0.5", "--margin=1", seeds=(4, 5, 6, 7))
    refused("a claim is of one difference", "--family=budgets", seeds=(4, 5, 6, 7), train_examples=("all", "4/class"))
    refused("is the test set of", f"--eval={tasks / 'clothes.npz'}", seeds=(4, 5, 6, 7))
    compare.main(line(tasks, tmp_path, "confirmed", *confirming, seeds=(4, 5, 6, 7)))
    page = (tmp_path / "confirmed" / "report.md").read_text()
    digest = re.search(r"registration ([0-9a-f]{64})", page)[1]
    assert "1 other strategy had been tried on the test set" in page
    with ledger.opened(tmp_path / "ledger.jsonl") as book:
        kinds = [entry["kind"] for entry in book.entries]
        assert kinds == ["ledger", "look", "registration", "confirmation"]
        assert book.entries[2]["digest"] == book.entries[3]["digest"] == digest
    labels = []
    for name in ("explored", "confirmed"):
        with np.load(tmp_path / name / results(tmp_path / name)[-1].predictions) as kept:
            labels.append(kept["labels"])
    whole = np.arange(40) % 3
    assert sorted(np.concatenate(labels)) == sorted(whole)
    # The same again says the same; another registration of the claim, and another of its seeds, are refused.
    compare.main(line(tasks, tmp_path, "confirmed", *confirming, seeds=(4, 5, 6, 7)))
    assert (tmp_path / "confirmed" / "report.md").read_text() == page
    file.write_text(json.dumps({**says, "design": {"seeds": "8-11", "train_examples": "all"}}))
    with pytest.raises(InputError, match="registered before with another design"):
        compare.main(line(tasks, tmp_path, "again", *confirming, seeds=(8, 9, 10, 11)))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    told = f"--ledger={tmp_path / 'ledger.jsonl'}"
    report.main(["report", f"--runs={tmp_path / 'confirmed'}", f"--output={tmp_path / 'pages'}", told])
    assert digest in (tmp_path / "pages" / "report.md").read_text()
    assert (tmp_path / "ledger.jsonl").read_bytes() == before  # the same fits are no new look
    report.main(["report", f"--runs={tmp_path / 'confirmed'}", f"--output={tmp_path / 'pages'}", f"{told}2"])
    with ledger.opened(tmp_path / "ledger.jsonl2") as book:
        (look,) = book.of_kind("look")
        assert look["half"] == "all" and look["seeds"] == [4, 5, 6, 7] and len(look["methods"]) == 1
    with pytest.raises(InputError, match="two sets of test examples"):
        both = f"{tmp_path / 'confirmed'},{tmp_path / 'explored'}"
        report.main(["report", f"--runs={both}", f"--output={tmp_path / 'both'}"])
    # What was judged on the whole test set cannot be confirmed on a half of it.
    compare.main(line(tasks, tmp_path, "whole", seeds=(20, 21), strategies=("bias_only",)))
    claim = {**says["claim"], "strategy": "bias_only"}
    file.write_text(json.dumps({**says, "claim": claim, "design": {"seeds": "30-33", "train_examples": "all"}}))
    with pytest.raises(InputError, match=r"'bias_only.*' was judged on the half that confirms before"):
        compare.main(line(tasks, tmp_path, "w2", *confirming, seeds=(30, 31, 32, 33), strategies=("bias_only",)))


def test_fits_of_seeds_that_until_added_are_of_the_look_that_named_them():
    def fit(key, seed, recipe="r"):
        fields = {"name": key, "target": "clothes", "strategy": "full", "options": {}, "train_examples": 60}
        return Result(**fields, seed=seed, key=key * 12, recipe=recipe)

    look = {"keys": ["a" * 12, "b" * 12], "seeds": [0, 1, 2]}
    assert confirmation._is_of_look([fit("a", 0), fit("b", 1)], look)
    assert confirmation._is_of_look([fit("a", 0), fit("c", 2)], look)
    assert not confirmation._is_of_look([fit("a", 0), fit("c", 3)], look)  # a seed that was not named
    assert not confirmation._is_of_look([fit("a", 0), fit("c", 2, "other")], look)
    assert not confirmation._is_of_look([fit("a", 0, None), fit("c", 2, None)], look)  # made elsewhere


def test_seeds_of_a_raised_most_are_looked_at_too(tmp_path):
    """The first round is the same then, and seeds that were explored later must not confirm."""
    tried = confirmation._Planned(("full (1)",), tuple(range(8)), "fits", ("key",), "half")
    claimed = tried._replace(seeds=(30, 31), bases=("scratch (2)",))
    with ledger.opened(tmp_path / "l") as book:
        for most in (8, 8, 40, 20):
            confirmation._add_look(book, "set", "explore", tried._replace(seeds=tuple(range(most))), "clothes")
        assert [len(entry["seeds"]) for entry in book.of_kind("look")] == [8, 40]
        with pytest.raises(InputError, match="--seeds: 30 and 31 were looked at before"):
            confirmation._register(book, "set", registered(tmp_path), claimed, "clothes")


def test_an_older_run_directory_has_no_half():
    assert not {"explore", "confirm", "ledger"} & {
        text[2:].partition("=")[0] for text in compare.command_line.flagfile_lines(compare.CompareFlags())
    }
