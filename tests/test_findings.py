"""The findings: flagfiles run what was registered, seeds are fresh, and the page says what came of the runs."""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from experiments import compare
from experiments.runs import command_line, confirmation
from tljax.study import ledger

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "findings"
NAMES = sorted(file.stem for file in FOLDER.glob("*.flags"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
with open(FOLDER / "verdicts.csv", encoding="utf-8", newline="") as csv_file:
    VERDICTS = {row["finding"]: row for row in csv.DictReader(csv_file)}
"""{finding: what came of it}; a finding that was registered and not run has no row."""
UNREGISTERED = {"margin", "ledger", "workdir"}
"""Flags of a flagfile that are in no design: the margin is the smallest effect, the others are places."""


def registration(name):
    return confirmation.read_registration(FOLDER / f"{name}.json", compare.KINDS)


def flags(name):
    return command_line.parse(["compare", f"--flagfile={FOLDER / name}.flags"], compare.KINDS)


def entries(tmp_path):
    """What the ledger of the findings holds, if no line of it was altered."""
    file = shutil.copy(FOLDER / "ledger.jsonl", tmp_path)
    with ledger.opened(Path(file)) as book:
        return list(book.entries)


@pytest.mark.parametrize("name", NAMES)
def test_a_flagfile_runs_what_was_registered_and_nothing_else(name):
    registered, values = registration(name), flags(name)
    assert {key: value for key, value in values.items() if key not in UNREGISTERED} == registered.design
    assert values["margin"] == registered.smallest_effect
    assert values["ledger"] == "experiments/findings/ledger.jsonl"
    assert json.loads((FOLDER / f"{name}.json").read_text())["known"]


def test_every_registration_is_tested_under_seeds_that_no_look_before_had(tmp_path):
    lines = entries(tmp_path)
    digests = {registration(name).digest: name for name in NAMES}
    registered = [entry for entry in lines if entry["kind"] == "registration"]
    assert len(digests) == len(NAMES) and {entry["digest"] for entry in registered} <= set(digests)
    for entry in registered:
        before = [each for each in lines[: lines.index(entry)] if each["kind"] == "look"]
        explored = [each for each in before if each["test_set"] == entry["test_set"]]
        assert all(each["half"] == "explore" for each in explored)
        assert not {*entry["seeds"]} & {seed for each in explored for seed in each["seeds"]}
        assert {*entry["seeds"]} == {*flags(digests[entry["digest"]])["seeds"]}


def test_the_verdicts_are_those_of_the_ledger_and_of_the_registrations_that_stand_here(tmp_path):
    decided = [entry for entry in entries(tmp_path) if entry["kind"] == "confirmation"]
    assert sorted(VERDICTS) == sorted(name for name in NAMES if registration(name).digest in str(decided))
    assert len(decided) == len(VERDICTS)
    for name, row in VERDICTS.items():
        registered = registration(name)
        assert row["registration"] == hashlib.sha256((FOLDER / f"{name}.json").read_bytes()).hexdigest()
        [entry] = [entry for entry in decided if entry["digest"] == registered.digest]
        assert (row["e"], row["needed"]) == (str(entry["e"]), str(entry["needed"]))
        assert row["decision"] == entry["decision"]
        claim = registered.claim
        said = (row["strategy"], row["against"], row["target"], row["claimed"])
        assert said == (claim["strategy"], claim["against"], claim["target"], claim["verdict"])
        assert float(row["margin"]) == registered.smallest_effect
        refuted = {row["word"], row["size"]} & {*registered.refuted_by}
        assert (row["decision"] == "refuted") == bool(refuted)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_numbers_of_the_verdicts_or_says_that_there_are_none(name):
    if name not in VERDICTS:
        assert re.search(rf"^Registered and not run: .*`{name}`", PAGE, re.M)
        return
    row = VERDICTS[name]
    mean, low, high = (100 * float(row[key]) for key in ("mean", "low", "high"))
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {row['pairs']} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] {row['word']}, {row['size']} |" in line
    assert f"| {float(row['e']):,.0f} of {float(row['needed']):,.0f}: {row['decision']} |" in line
    assert line.endswith(f"| {float(row['cpu_minutes']):.1f} |")
    place = f"experiments/findings/{name}"
    command = f"python -m experiments.compare --flagfile={place}.flags --confirm --registration={place}.json"
    assert command in PAGE.splitlines()
    picture = f"../pictures/finding_{name}.png"
    assert f"]({picture})" in PAGE and (FOLDER / picture).is_file()
