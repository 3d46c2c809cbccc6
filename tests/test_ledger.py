"""The ledger: what it counts, what it refuses, and that e-LOND holds its level."""

import errno
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import simulate_ledger

from tljax.study import ledger
from tljax.types import InputError


def look(**changes):
    of_fits = {"methods": ["full"], "seeds": [0], "fits": "x", "keys": ["y"]}
    return {"kind": "look", "test_set": "a", "half": "explore", **of_fits} | changes


def test_the_shares_of_the_level_sum_to_one_and_fall():
    shares = [ledger.share(number) for number in range(1, 2000)]
    assert sum(shares) == pytest.approx(1 - 1 / math.log10(2009)) and min(shares) > 0
    assert shares == sorted(shares, reverse=True)
    with pytest.raises(InputError, match="the first is 1"):
        ledger.share(0)


def test_an_e_value_has_a_mean_of_one_under_a_uniform_p_and_falls_with_it():
    edges = np.concatenate([[0], np.geomspace(1e-12, 1, 20_001)])
    middle = np.sqrt(edges[1:] * np.maximum(edges[:-1], 1e-13))
    mean = float(np.sum(np.diff(edges) * [ledger.e_value(p) for p in middle]))
    assert mean == pytest.approx(1, abs=1e-3)
    values = [ledger.e_value(p) for p in (0.0, 1e-9, 1e-8, 1e-5, 0.01, 0.011, 1.0)]
    assert values == sorted(values, reverse=True) and values[0] == values[2] and values[-2] == 0
    with pytest.raises(InputError, match="probability"):
        ledger.e_value(float("nan"))


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_e_lond_keeps_false_discoveries_within_its_level(shared):
    """Exact p of normal variables, also where they are alike; 0.3 in place of 0.05, so that the level would be seen."""
    rng, level, false_shares, discoveries = np.random.default_rng(1), 0.3, [], []
    for _ in range(400):
        effects = np.where(np.arange(60) % 3 == 0, 5.0, 0.0)
        noise = math.sqrt(shared) * rng.standard_normal() + math.sqrt(1 - shared) * rng.standard_normal(60)
        p = np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in effects + noise])
        confirmed: list[bool] = []
        for i in range(60):
            confirmed.append(ledger.e_value(float(p[i])) >= ledger.threshold(i + 1, sum(confirmed), level))
        false = np.array(confirmed)[effects == 0].sum()
        false_shares.append(false / max(1, sum(confirmed)))
        discoveries.append(np.array(confirmed)[effects > 0].sum())
    error = np.std(false_shares) / 20
    assert np.mean(false_shares) <= level + 2 * error and np.mean(discoveries) > 12


def test_e_lond_spends_its_level_and_no_more_on_bets_that_win_at_the_threshold_alone():
    """Null claims whose e-values are what is needed or 0, with the mean 1: the worst that e-LOND has to bear."""
    rng, level, false = np.random.default_rng(2), 0.3, []
    for _ in range(2000):
        needed = np.array([ledger.threshold(number, 0, level) for number in range(1, 41)])
        won = rng.random(40) < 1 / needed
        false.append(won.any())  # all are null: the false share is 1 as soon as any is confirmed
    spent = level * sum(ledger.share(number) for number in range(1, 41))
    assert spent / 2 < np.mean(false) <= spent + 2 * np.sqrt(spent / 2000)


def test_what_is_written_is_read_again_and_the_level_stays(tmp_path):
    file = tmp_path / "ledger.jsonl"
    with ledger.opened(file, 0.1) as book:
        book.add(look())
        book.add(look(test_set="b"))
        assert book.level == 0.1
    with ledger.opened(file) as book:
        assert [entry["kind"] for entry in book.entries] == ["ledger", "look", "look"]
        assert len(book.of_kind("look")) == 2 and book.of_kind("look", "b") == [look(test_set="b")]
    with pytest.raises(InputError, match=r"allows 0\.1 of false discoveries, not 0\.05"), ledger.opened(file, 0.05):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1]],
        lambda lines: [lines[0], lines[1].replace(b"full", b"fill"), lines[2]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], b"{}\n", *lines[1:]],
        lambda lines: [lines[0], b"nothing\r" + lines[1], lines[2]],
        lambda lines: [b"[" * 100_000 + b"\n", *lines],
    ],
)
def test_lines_that_were_altered_are_refused_by_their_number(tmp_path, damage):
    file = tmp_path / "ledger.jsonl"
    with ledger.opened(file) as book:
        for _ in range(2):
            book.add(look())
    file.write_bytes(b"".join(damage(file.read_bytes().splitlines(keepends=True))))
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"line [1-3] is (no line|not as)"), ledger.opened(file):
        pass
    assert file.read_bytes() == before


def test_a_line_that_was_never_finished_is_cut_off_and_said(tmp_path):
    file, messages = tmp_path / "ledger.jsonl", []
    with ledger.opened(file) as book:
        book.add(look())
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"kind": "look", "test')
    with ledger.opened(file, say=messages.append) as book:
        assert len(book.entries) == 2
        book.add(look())
    assert "last 22 bytes are cut off" in messages[0] and file.read_bytes().startswith(whole)
    with ledger.opened(file) as book:
        assert len(book.entries) == 3


@pytest.mark.parametrize("data", [b'{"claim": {"strategy": "full"}}', b"hello", b"\0\1\2"])
@pytest.mark.parametrize("entries", [0, 2])
def test_another_file_without_an_end_of_line_is_no_unfinished_ledger(tmp_path, data, entries):
    """A registration has no end of its line: --ledger that names it by mistake must not cut it off."""
    file = tmp_path / "claim.json"
    if entries:
        with ledger.opened(file) as book:
            book.add(look())
    file.write_bytes(before := (file.read_bytes() if entries else b"") + data)
    with pytest.raises(InputError, match=f"line {entries + 1} is no line of a ledger"), ledger.opened(file):
        pass
    assert file.read_bytes() == before


@pytest.mark.parametrize("rest", [b"{", b'{"ki', b'{"kind": "led', b"\0\0\0", b'{"kind": "lo\0\0'])
def test_a_first_line_that_was_never_finished_begins_a_ledger(tmp_path, rest):
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(rest)
    with ledger.opened(file) as book:
        assert len(book.entries) == 1


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    file, write = tmp_path / "ledger.jsonl", os.pwrite
    with ledger.opened(file) as book:
        book.add(look())
    whole = file.read_bytes()

    def full(descriptor, data, position):
        if position > len(whole):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:10], position)

    monkeypatch.setattr(os, "pwrite", full)
    with ledger.opened(file) as book, pytest.raises(OSError, match="No space left") as caught:
        book.add(look())
    assert caught.value.filename == str(file) and file.read_bytes() == whole


def test_what_is_no_file_to_write_is_refused_in_a_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, words in (("folder", "a link or no file"), ("link", "a link or no file"), ("no/where", "cannot be writ")):
        with pytest.raises(InputError, match=words) as caught, ledger.opened(tmp_path / name):
            pass
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "elsewhere").exists()


def test_a_ledger_of_another_user_is_refused(tmp_path, monkeypatch):
    def denied(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match="cannot be written \\(Permission denied\\)"), ledger.opened(tmp_path / "l"):
        pass


WRITER = """
import sys
from pathlib import Path
from tljax.study import ledger
for number in range(40):
    with ledger.opened(Path(sys.argv[1])) as book:
        about = {"kind": "look", "test_set": sys.argv[2], "half": "all", "methods": [], "keys": [], "fits": ""}
        book.add({**about, "seeds": [number]})
        print(number, flush=True)
"""


@pytest.mark.slow
def test_two_processes_lose_no_line_and_a_killed_one_no_more_than_its_last(tmp_path):
    file = tmp_path / "ledger.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file), name], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    written = [writers[0].stdout.readline()]
    writers[0].kill()  # as kill -9
    written += writers[0].communicate()[0].split()
    assert writers[1].communicate()[0].split()[-1] == "39" and writers[1].returncode == 0
    with ledger.opened(file) as book:
        of_a, of_b = ([entry["seeds"][0] for entry in book.of_kind("look", name)] for name in ("a", "b"))
    assert of_b == list(range(40)) and of_a == list(range(len(of_a))) and len(written) <= len(of_a) <= len(written) + 1


def test_a_process_waits_for_the_ledger_and_says_so_if_that_takes_long(tmp_path, monkeypatch):
    file = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(ledger, "WAIT", 0.1)
    begun = time.monotonic()
    with ledger.opened(file), pytest.raises(InputError, match="in use by another process"), ledger.opened(file):
        pass
    assert 0.1 <= time.monotonic() - begun < 5


def test_a_line_is_one_object_in_json(tmp_path):
    file = tmp_path / "ledger.jsonl"
    with ledger.opened(file) as book:
        book.add(look(methods=["a\nb", "é"]))
    assert [json.loads(line)["kind"] for line in file.read_text(encoding="utf-8").splitlines()] == ["ledger", "look"]


@pytest.mark.slow
def test_200_null_strategies_and_20_effects_in_one_ledger():
    """Explored at will and confirmed once each, as `simulate_ledger` says; the page has more of it."""
    outcomes = [
        simulate_ledger.simulated(np.random.default_rng([1, 0, i]), simulate_ledger.DESIGNS[0]) for i in (0, 1, 2)
    ]
    assert all(each.tested == 220 for each in outcomes)
    assert np.mean([each.false / max(1, each.confirmed) for each in outcomes]) <= ledger.LEVEL
    assert np.mean([each.found for each in outcomes]) >= 16
