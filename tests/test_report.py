"""The report: its numbers are right, it says what is missing, and it is one harmless file."""

import base64
import html
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from experiments.pages import figures, tables
from experiments.pages.report import Provenance
from experiments.pages.transfer import page
from tljax.study.results import Result
from tljax.study.summary import sources, summary

WORDS: dict[str, Any] = {
    "title": "MNIST to Fashion-MNIST",
    "source_note": "One source for each seed.",
    "notes": ["10,000 training images; not the complete data set"],
    "provenance": Provenance(
        {"jax": "0.8", "devices": ["cpu:0", "cpu:1"], "data": {"mnist": "ab12"}},
        "--seeds=0,1,2\n--target=b",
        "python -m experiments.transfer --flagfile=flags.flags",
    ),
    "classes": ("zero", "one", "two"),
}


def fit(strategy: str, seed: int, accuracy: float | None, **changes: Any) -> Result:
    """A fit of three classes."""
    about: dict[str, Any] = {
        "source": "a",
        "target": "b",
        "strategy": strategy,
        "options": {},
        "seed": seed,
        "train_examples": 100,
        "test_accuracy": accuracy,
        "test_loss": 0.5 + 0.1 * seed,
        "train_loss": 0.4,
        "validation_accuracy": None,
        "calibration_error": 0.03,
        "per_class_accuracy": [0.8, 0.9, 1.0],
        "confusion": [[8, 1, 1], [1, 9, 0], [0, 0, 10]],
        "steps": 1000,
        "trained_parameters": 10,
        "total_parameters": 40,
        "seconds": 1.0 + seed,
        "diverged": False,
    }
    return Result(**{**about, "name": f"{strategy}-{seed}-{changes.get('train_examples', 100)}", **changes})


def bare(strategy: str, seed: int, accuracy: float | None, **changes: Any) -> Result:
    """A fit with nothing to draw, so that a test is quick."""
    missing = dict.fromkeys(["per_class_accuracy", "confusion", "trained_parameters", "total_parameters"])
    return fit(strategy, seed, accuracy, **{**missing, **changes})


def curve(*accuracy: float) -> dict[str, np.ndarray]:
    steps = 50 * np.arange(1, len(accuracy) + 1)
    return {"step": steps, "train_loss": 1.0 / steps, "accuracy": np.array(accuracy)}


def alts(text: str) -> list[str]:
    images = re.findall(r"<img [^>]*>", text)
    matches = [re.search(r'alt="([^"]*)"', image) for image in images]
    return [html.unescape(match[1]) if match else "" for match in matches]


def visible(text: str) -> str:
    """The page's words, without pictures, tags and style."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


@pytest.fixture(scope="module")
def full_rows() -> list[Result]:
    accuracies = {"scratch": (0.70, 0.72), "last_k": (0.75, 0.71)}
    rows = [fit("pretrain", 0, 0.97, source=None, target="a", train_examples=5000)]
    for name, values in accuracies.items():
        options = {"k": 2} if name == "last_k" else {}
        rows += [fit(name, seed, value, options=options) for seed, value in enumerate(values)]
    return rows


@pytest.fixture(scope="module")
def full_page(full_rows: list[Result]) -> str:
    return page(full_rows, {row.name: curve(0.3, 0.6, 0.7) for row in full_rows}, **WORDS)


def test_summary_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    scratch, other = rng.uniform(0.5, 0.9, (2, 4))
    rows = [fit("scratch", seed, float(value)) for seed, value in enumerate(scratch)]
    rows += [fit("last_k", seed, float(value), options={"k": 2}) for seed, value in reversed(list(enumerate(other)))]
    base, row = summary(rows)
    assert (base.strategy, row.strategy) == ("scratch", "last_k:k=2")
    assert base.gain is None
    np.testing.assert_allclose(row.score, (other.mean(), other.min(), other.max()))
    gain = 100 * (other - scratch)
    np.testing.assert_allclose(row.gain, (gain.mean(), gain.min(), gain.max()))
    np.testing.assert_allclose(row.test_loss, (0.65, 0.5, 0.8))
    assert (row.seeds, row.diverged, row.counted, row.gain_seeds) == (4, 0, 4, 4)
    assert (row.steps, row.seconds, row.trained_parameters, row.total_parameters) == (1000, 2.5, 10, 40)


def test_budgets_and_targets_are_not_mixed() -> None:
    rows = [
        fit(strategy, 0, accuracy, target=target, train_examples=budget)
        for target, budget, scratch, full in (("b", 1000, 0.8, 0.9), ("b", 100, 0.5, 0.7), ("c", 100, 0.2, 0.1))
        for strategy, accuracy in (("scratch", scratch), ("full", full))
    ]
    gains = {(row.target, row.train_examples): row.gain[0] for row in summary(rows) if row.gain}
    assert gains == {("b", 1000): pytest.approx(10), ("b", 100): pytest.approx(20), ("c", 100): pytest.approx(-10)}
    assert [row.train_examples for row in summary(rows)] == [100, 100, 100, 100, 1000, 1000]


@pytest.mark.parametrize("lost", [{"diverged": True}, {"test_accuracy": None}, {"test_accuracy": float("nan")}])
def test_a_lost_fit_enters_no_mean(lost: dict[str, Any]) -> None:
    rows = [fit("scratch", seed, 0.5) for seed in (0, 1, 2)] + [fit("full", seed, 0.6) for seed in (0, 1)]
    row = summary([*rows, fit("full", 2, 0.1, **{"test_loss": float("inf"), **lost})])[1]
    assert row.score == pytest.approx((0.6, 0.6, 0.6))
    assert row.test_loss == pytest.approx((0.55, 0.5, 0.6))
    assert (row.seeds, row.counted, row.gain_seeds) == (3, 2, 2)
    assert row.diverged == int("diverged" in lost)


def test_no_gain_without_scratch_of_the_same_seed() -> None:
    rows = [fit("scratch", 0, 0.5), fit("scratch", 1, 0.6, diverged=True), fit("full", 1, 0.6), fit("full", 2, 0.7)]
    assert summary(rows)[1].gain is None
    partly = summary([*rows, fit("full", 0, 0.8)])[1]
    assert (partly.gain[0], partly.gain_seeds) == (pytest.approx(30), 1)


def test_sources_stand_apart(full_rows: list[Result]) -> None:
    assert [row.strategy for row in summary(full_rows)] == ["scratch", "last_k:k=2"]
    assert [(row.target, row.score[0]) for row in sources(full_rows)] == [("a", 0.97)]


def test_the_page_states_its_numbers(full_page: str) -> None:
    words = visible(full_page)
    assert "Training from scratch was compared with 1 strategy of transfer from a to b" in words
    assert "range over 2 seeds; no test of significance was made" in words
    assert "last_k:k=2: 73.00 % (71.00 to 75.00), +2.00 points from scratch (\N{MINUS SIGN}1.00 to +5.00)" in words
    assert "97.0" in words and "25.0 %" in words
    for text in ("cpu:0, cpu:1", "mnist ab12", "--seeds=0,1,2", WORDS["provenance"].command, WORDS["source_note"]):
        assert text in words
    tables = full_page.count("<table>")
    assert tables == 2
    assert words.count(WORDS["notes"][0]) >= tables


def test_every_picture_has_its_numbers_as_text(full_page: str) -> None:
    texts = alts(full_page)
    assert len(texts) == 6
    assert all(len(alt) > 40 for alt in texts)
    accuracy, loss, classes, scratch, _, shares = texts
    assert "scratch 70.0 %, last_k:k=2 70.0 %" in accuracy
    assert "training loss" in loss
    assert "80 % (zero) to 100 % (two)" in classes
    assert "54 of 60 predictions over 2 seeds were right; most often zero was taken for one (2 times)" in scratch
    assert "scratch 25.0 % (10 of 40)" in shares


def test_the_page_needs_no_network_and_runs_nothing(full_page: str) -> None:
    assert "http" not in full_page and "url(" not in full_page and "<script" not in full_page
    assert set(re.findall(r'(?:src|href)="([a-z]+:[^;]*)', full_page)) == {"data:image/svg+xml"}


def test_equal_input_gives_equal_bytes() -> None:
    row = fit("full", 0, 0.7, confusion=None)
    first, other = (page([row], {row.name: curve(0.3, 0.6)}, **WORDS) for _ in range(2))
    assert first == other and len(alts(first)) == 4


def test_hostile_names_are_only_text() -> None:
    hostile = '<script>alert("$x_$")</script>&--\x00\N{CJK UNIFIED IDEOGRAPH-6570}'
    row = fit(hostile, 0, 0.7, source=hostile, target=hostile, options={hostile: hostile})
    words: dict[str, Any] = dict.fromkeys(("title", "source_note"), hostile)
    words |= {"notes": [hostile], "classes": [hostile] * 3}
    words |= {"provenance": Provenance({hostile: [hostile], "data": {hostile: hostile}}, hostile, hostile)}
    text = page([row], {row.name: curve(0.1, 0.2)}, **words)
    assert "<script" not in text and "&lt;script&gt;" in text
    pictures = [base64.b64decode(code) for code in re.findall(r"base64,([^\"]*)", text)]
    assert pictures
    for picture in pictures:
        assert not [element for element in ET.fromstring(picture).iter() if "script" in str(element.tag)]
    assert b"$x_$" in pictures[0]


def test_missing_values_are_said() -> None:
    rows = [bare("scratch", seed, 0.5) for seed in (0, 1, 2)]
    rows += [bare("full", seed, 0.6, diverged=seed == 2) for seed in (0, 1, 2)]
    rows += [bare("head_only", seed, None, diverged=True, test_loss=None) for seed in (0, 1, 2)]
    rows += [bare("last_k", 0, float("nan"), test_loss=None, calibration_error=None, steps=None, seconds=None)]
    curves = {row.name: curve(0.1, float("nan")) for row in rows if row.seed != 1}
    words = visible(page(rows, curves, **WORDS))
    gain = "+10.00 points from scratch (+10.00 to +10.00)"
    assert f"full: 60.00 % (60.00 to 60.00), {gain}; 2 of 3 seeds, 1 diverged" in words
    assert "head_only: 0 of 3 seeds, 3 diverged" in words
    assert "head_only 0 of 3 seeds, 3 diverged diverged" in words
    assert "last_k: 0 of 1 seeds, 1 not measured" in words
    assert "range over 2 to 3 seeds" in words
    assert "nan" not in words and "None" not in words


def test_one_seed_has_no_range_and_a_study_may_have_no_source() -> None:
    words = visible(page([bare("full", 0, 0.6, source=None)], {}, **WORDS))
    assert "1 seed, so no range; no test of significance was made" in words
    assert "full: 60.00 % " in words and "Without training from scratch" in words
    assert "Sources" not in words


def test_budgets_have_tables_and_curves_of_their_own() -> None:
    rows = [bare(name, 0, 0.6, train_examples=n) for n in (1000, 100) for name in ("scratch", "full")]
    text = page(rows, {row.name: curve(0.5) for row in rows}, **WORDS)
    assert text.count("<table>") == 2
    assert [alt.split(".")[0][-21:] for alt in alts(text)[::2]] == ["100 training examples", "000 training examples"]
    assert "at 100 and 1,000 training examples" in visible(text)


def test_a_study_without_fits_has_a_page() -> None:
    assert "No fit of a target" in page([], {}, **WORDS)


def test_many_classes_are_drawn_without_numbers() -> None:
    row = fit("full", 0, 0.9, per_class_accuracy=[0.9] * 50, confusion=np.eye(50, dtype=int).tolist())
    assert "50 of 50 predictions over 1 seed were right." in alts(page([row], {}, **WORDS))[1]


@pytest.mark.slow
def test_the_summary_loads_neither_matplotlib_nor_jinja2() -> None:
    file = summary.__code__.co_filename  # alone, because tljax itself takes a second
    code = f"import runpy, sys; runpy.run_path({file!r}); assert not {{'matplotlib', 'jinja2'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_picture_of_a_mask_names_the_leaves_that_train() -> None:
    leaves = [("hidden_0/kernel", 30, 0), ("head/kernel", 10, 10)]
    _, alt = figures.trained_shares({"head_only": leaves}) or ("", "")
    assert "head_only 25.0 % (10 of 40: head/kernel)" in alt
    text = page([fit("scratch", 0, 0.7), fit("full", 0, 0.8, leaves=leaves)], {}, **WORDS)
    assert "full 25.0 % (10 of 40: head/kernel)" in text


def test_the_console_and_the_page_have_the_same_digits(full_rows: list[Result], full_page: str) -> None:
    groups = summary(full_rows)
    short = tables.results_in_short("", groups)
    shown = {row[0].text: dict(zip(short.columns, row, strict=True)) for row in short.rows}
    for row in tables.results(groups, "").rows:
        (name, accuracy, gain, loss, *_), seen = row, shown[row[0].text]
        assert (accuracy, gain, loss) == (seen["test accuracy %"], seen["against scratch"], seen["loss (nats)"])
        assert all(f"{cell.text}<small>{cell.below}" in full_page for cell in (accuracy, gain) if cell.below), name
