"""A study's report: verdicts first, the numbers of its input in every format, and nothing that can do harm."""

import csv
import html
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import studies
from studies import FAMILY, NAMES, comparison, nothing, page, rows, study
from test_report import alts, visible

from experiments.pages import export, figures, tables
from tljax import evaluate
from tljax.study.summary import label

CLASSES = {"clothes": NAMES}
MINUS = "\N{MINUS SIGN}"
HOSTILE = '<script>alert("x")</script>|*_$%&#~^\\{}'


@pytest.fixture(scope="module", autouse=True)
def quick_fonts():
    """PDF's other kind of font, which takes a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "pdf.fonttype", 3)
        yield


@pytest.fixture(scope="module")
def whole() -> str:
    return page(study(), CLASSES)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return studies.files(study(curves={}, images={}), CLASSES)


@pytest.fixture
def styled():
    with figures.style():
        yield


def cells(text: str, label: str) -> list[list[str]]:
    """The rows of the table of a page that has this label, as text."""
    (table,) = re.findall(rf'aria-label="{re.escape(label)}">(.*?)</table>', text, re.DOTALL)
    table_rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    return [[visible(cell).strip() for cell in re.split(r"</t[hd]>", row)[:-1]] for row in table_rows]


def points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}".replace("-", MINUS)


def by_strategy(fits: list[dict[str, Any]], budget: int | None = None) -> dict[str, list[dict[str, Any]]]:
    chosen = [row for row in fits if budget in (None, row.train_examples)]
    return {name: [row for row in chosen if label(row) == name] for name in dict.fromkeys(map(label, chosen))}


def drawn(figure: Any, name: str) -> np.ndarray:
    """[2, n]: the line of this name in the legend."""
    (line,) = [line for line in figure.axes[0].lines if "".join(line.get_label().split()) == "".join(name.split())]
    return np.array(line.get_data())


def spots(figure: Any) -> list[tuple[float, float]]:
    """The points of a scatter plot."""
    return [tuple(float(v[0]) for v in bar.lines[0].get_data()) for bar in figure.axes[0].containers]


def strokes(members: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return figures.strokes(list(members))


def test_the_verdict_comes_first_and_each_comparison_with_its_numbers(whole):
    words = visible(whole)
    first = words.index("Digits help clothes where labels are few.")
    assert first < words.index("Verdicts") < words.index("Strategy")
    head, group, *body = cells(whole, "Verdicts")
    assert group == ["digits to clothes"]
    assert head[:2] == ["Strategy", "Verdict"]
    assert head[3:] == ["p, adjusted", "Power (%)", "Power to call equivalent (%)"]
    for judged, row in zip(FAMILY, body, strict=True):
        assert row[0].replace(" ", "") == judged.strategy
        assert row[1].split()[0] == judged.word
        assert row[2] == f"{points(judged.mean)} {points(judged.low)} to {points(judged.high)}"
    sizes = ["by more than the margin", "by less than the margin", "", ""]  # a direction has a size beside it
    assert [row[1].partition(" ")[2] for row in body] == sizes
    assert [row[3] for row in body] == ["< 0.001", "0.021", "0.021", "0.021"]
    assert [row[4:] for row in body] == [["83 to 91", "10 to 25"]] * 3 + [["\N{EN DASH}", "10 to 25"]]
    assert "Margin (points): 1.00; Labels: 10 to 1,000; Pairs of fits: 5; Test examples: 2,000." in words


def test_what_differs_between_comparisons_has_a_column(no_pictures):
    some = [FAMILY[0], comparison("full", 0.1, "positive", target="letters", margin=0.02, items=10_000)]
    text = page(study(rows=[], family=some, images={}))
    head, _, first, _, other = cells(text, "Verdicts")
    assert head[6:] == ["Margin (points)", "Test examples"]
    assert (first[6:], other[6:]) == (["1.00", "2,000"], ["2.00", "10,000"])
    assert "Pairs of fits: 5." in visible(text)


def test_an_interval_beside_zero_keeps_its_side(no_pictures):
    text = page(study(rows=[], images={}, family=[comparison("full", 2e-5, "positive", low=1e-5, high=3e-5)]))
    assert "+0.00 +0.00 to +0.00" in visible(text)


def test_budgets_stand_side_by_side_without_a_verdict(whole):
    head, _, row = cells(whole, "Differences from scratch at equal target steps")
    assert head == ["Strategy", "10 labels", "1,000 labels"]
    assert row == ["full", "+3.10 +2.60 to +3.60", f"{MINUS}0.40 {MINUS}0.90 to +0.10"]
    head, _, row = cells(whole, "Differences from scratch at equal source and target steps")
    assert (head[1], row[1][:5]) == ("10 to 1,000 labels", f"{MINUS}5.00")


def test_accuracies_are_means_over_seeds(whole):
    head, scratch, group, *others = cells(whole, "Test accuracy on clothes (%)")
    assert head == ["Strategy", "10 labels", "1,000 labels"]
    assert scratch == ["scratch", "51.00 50.00 to 52.00", "71.00 70.00 to 72.00"]
    assert group == ["from digits"] and len(others) == 4


def test_milestones_keep_their_words(whole):
    head, _, row = cells(whole, "Milestones")
    assert head[1:5] == ["Labels", "Jump-start (points)", "End (%)", "Steps to threshold"]
    assert row[:7] == ["full", "10", "not defined", "81.25", ">600", "75.00", "\N{EN DASH}"]
    assert row[7:] == ["1.5e+12 4.5e+13", "12.3 80.0"]


def test_every_table_says_the_notes_and_every_picture_has_words(whole):
    tables = whole.count("<table>")
    assert tables == 7
    assert visible(whole).count("untuned. looked once of 1 planned.") >= tables
    texts = alts(whole)
    assert len(texts) == whole.count("<img") == 15
    assert all(len(alt) > 40 for alt in texts)
    assert "coat taken for shirt; bag taken for coat" in " ".join(texts)


def test_the_page_needs_no_network_and_runs_nothing(whole):
    assert "http" not in whole and "url(" not in whole and "<script" not in whole
    assert set(re.findall(r'(?:src|href)="([a-z]+:[^;]*)', whole)) == {"data:image/svg+xml"}


def test_what_was_not_measured_is_left_out(no_pictures):
    bare = [replace(row, per_class_accuracy=None, confusion=None) for row in rows(extra=False)]
    text = visible(page(study(rows=bare, curves={}, milestones=[], others=[], images={})))
    for title in ("Milestones", "Learning curves", "Other test sets", "What is kept", "Accuracy by class", "Confusion"):
        assert title not in text
    for title in ("Calibration", "Most often wrong", "Each comparison by itself", "Sources"):
        assert title not in text
    assert "Verdicts" in text and "What it costs" in text
    empty = visible(page(nothing()))
    assert "Nothing has been measured." in empty and "Verdicts" not in empty


@pytest.mark.slow
def test_equal_studies_give_equal_bytes():
    bare = [replace(row, per_class_accuracy=None, confusion=None) for row in rows(extra=False)[:2]]
    small = study(rows=bare, family=FAMILY[:1], images={}, curves={}, milestones=[])
    assert page(small) == page(small)
    assert studies.files(small) == studies.files(small)


def test_the_forest_draws_the_intervals_and_their_verdicts(styled):
    figure, alt = figures.forest(FAMILY) or pytest.fail()
    (axes,) = figure.axes
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.5]
    np.testing.assert_allclose(bars, [[100 * judged.low, 100 * judged.high] for judged in FAMILY])
    assert [text.get_text() for text in axes.texts] == [judged.word for judged in FAMILY]
    bands = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
    np.testing.assert_allclose(bands, [(-1, 2)] * 4)
    assert "full positive, by more than the margin, +1.23 (+0.73 to +1.73)" in alt
    assert "last_k:k=2 negative, by less than the margin, -2.13 (-2.63 to -1.63)" in alt
    assert figures.forest([]) is None


def test_gains_stand_at_their_source_and_target(styled):
    assert figures.gains(FAMILY) is None
    means = {("a", "x"): 0.01, ("a", "y"): -0.02, ("b", "y"): 0.03}
    family = [comparison("full", mean, "", source=s, target=t) for (s, t), mean in means.items()]
    figure, _ = figures.gains(family) or pytest.fail()
    table = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(table, np.nan), [[1, -2], [np.nan, 3]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["+1.0", f"{MINUS}2.0", "\N{EN DASH}", "+3.0"]


def test_the_file_of_a_picture_is_laid_out_as_the_page_is(styled):
    figure, _ = figures.confusion("full", rows()[:2], NAMES, "") or pytest.fail()
    figures.svg(figure)
    before = figure.axes[0].get_position().bounds
    figures.pdf(figure)
    assert figure.axes[0].get_position().bounds == before


def test_accuracy_against_labels_is_the_mean_of_the_fits_that_count(styled):
    fits = rows()
    fits[0] = replace(fits[0], diverged=True)
    members = by_strategy(fits)
    figure, alt = figures.scores_by_labels(members, "a to b", strokes(members)) or pytest.fail()
    np.testing.assert_allclose(drawn(figure, "scratch"), [[10, 1000], [52, 71]])
    assert figure.axes[0].get_xscale() == "log" and "scratch 52.0 % at 10 to 71.0 % at 1,000" in alt
    assert figures.scores_by_labels(by_strategy(fits, 10), "", strokes(members)) is None


def test_every_source_is_held_against_scratch(no_pictures):
    fits = [row for row in rows() if row.train_examples == 10 or row.strategy == "scratch"][:6]
    other = [replace(row, source="letters", name=row.name + "l") for row in fits if row.strategy != "scratch"]
    text = page(study(rows=fits + other, family=[], others=[], images={}, curves={}))
    assert sum("letters to clothes: scratch 51.0 % at 10" in alt for alt in alts(text)) == 1


def test_the_cut_counts_the_stages_that_are_kept(styled):
    members = by_strategy(rows(), 1000)
    members["last_k:k=1"] = [replace(row, strategy="last_k", options={"k": 1}) for row in members["scratch"]]
    figure, _ = figures.layer_cut(members, "a to b") or pytest.fail()
    np.testing.assert_allclose(drawn(figure, "copied, frozen; the rest anew"), [[1, 2], [74, 80]])
    np.testing.assert_allclose(drawn(figure, "copied, trained; the rest anew"), [[1, 2], [77, 83]])
    np.testing.assert_allclose(drawn(figure, "copied, frozen; the rest copied"), [[2], [71]])
    np.testing.assert_allclose(drawn(figure, "scratch")[1], [71, 71])
    assert figures.layer_cut({"scratch": members["scratch"]}, "") is None


def test_costs_are_steps_times_their_flops(styled):
    members = by_strategy(rows(), 1000)
    figure, alt = figures.cost(members, "FLOPs", figures.training_flops, "here", strokes(members)) or pytest.fail()
    np.testing.assert_allclose(spots(figure), [(1e6 * (i + 1), 71 + 3 * i) for i in range(5)])
    assert "scratch 71.0 at 1,000,000" in alt
    unknown = {"scratch": [replace(members["scratch"][0], step_flops=None)]}
    assert figures.cost(unknown, "FLOPs", figures.training_flops, "", strokes(members)) is None


def test_equal_accuracies_have_no_bar(styled):
    """Their mean is an ulp beside them."""
    fits = [replace(row, seed=seed, test_accuracy=0.001) for row in rows()[:1] for seed in range(3)]
    assert math.fsum([0.1] * 3) / 3 > 0.1
    figure, _ = figures.cost({"scratch": fits}, "FLOPs", figures.training_flops, "", strokes({})) or pytest.fail()
    assert spots(figure)[0][1] == pytest.approx(0.1)


def test_another_test_set_is_held_against_the_own(styled):
    members = by_strategy(rows(), 1000)
    figure, _ = figures.shifted(members, "turned", "", strokes(members)) or pytest.fail()
    np.testing.assert_allclose(spots(figure), [(71 + 3 * i, 51 + 3 * i) for i in range(5)])
    assert figures.shifted(members, "noisy", "", strokes(members)) is None


def test_the_front_is_what_a_sweep_from_the_right_finds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = {str(i): tuple(map(float, point)) for i, point in enumerate(rng.integers(0, 8, (12, 2)))}
        best: list[tuple[float, float]] = []
        for x, y in sorted(set(points.values()), reverse=True):
            if not best or y > max(up for _, up in best):
                best.append((x, y))
        assert {points[name] for name in figures.front(points)} == set(best)


def test_the_front_of_retention_is_drawn(styled):
    members = by_strategy(rows(), 1000)
    forgetful = [replace(row, retention=0.1, test_accuracy=0.1) for row in members["scratch"]]
    figure, alt = figures.retention({**members, "bad": forgetful}, "", strokes({**members, "bad": 0})) or pytest.fail()
    line = figure.axes[0].lines[-1].get_data()
    np.testing.assert_allclose(line, [[50, 60, 70, 80, 90], [83, 80, 77, 74, 71]])
    assert alt.endswith("on the Pareto front: " + ", ".join(members) + ".")


def test_reliability_pools_the_fits_by_their_counts(styled):
    """The bins of two fits together are those of all their examples."""
    rng = np.random.default_rng(3)
    parts = [(rng.dirichlet([1.0] * 3, n), rng.integers(0, 3, n)) for n in (30, 200)]
    fits = [replace(row, calibration=evaluate.calibration(*part)) for row, part in zip(rows(), parts, strict=False)]
    figure, _ = figures.reliability({"scratch": fits}, "", strokes({})) or pytest.fail()
    probabilities, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    groups = [np.floor(confidence * 15) == k for k in range(15)]
    expected = [[100 * values[g].mean() for g in groups if g.any()] for values in (confidence, right)]
    np.testing.assert_allclose(drawn(figure, "scratch"), expected)


@pytest.mark.slow
def test_the_files_are_those_that_the_report_names(files):
    assert {name for name in files if "/" not in name} == {
        *("report.md", "tables.tex", "comparisons.csv", "fits.csv", "milestones.csv")
    }
    figures = {name for name in files if name.startswith("figures/")}
    assert len(figures) == 12
    assert set(re.findall(r"\]\((figures/[^)]*)\)", files["report.md"].decode())) == figures
    assert all(files[name].startswith(b"%PDF") and files[name].count(b"/Type /Page ") == 1 for name in figures)


def test_markdown_has_the_verdicts_of_the_page(files, whole):
    text = files["report.md"].decode()
    assert text.startswith("# Digits\n\nDigits help clothes where labels are few.\n")
    for judged in FAMILY:
        name = judged.strategy.replace("_", r"\_")
        size = tables.SIZES[judged.size] if judged.word in ("positive", "negative") else ""
        word = f"{judged.word} ({size})" if size else judged.word
        assert f"| {name} | {word} | {points(judged.mean)} ({points(judged.low)} to {points(judged.high)}) |" in text
    assert text.count("untuned. looked once") >= len(re.findall(r"(?m)^\| ---", text)) == whole.count("<table>")


def test_latex_is_balanced_and_has_the_verdicts(files):
    text = files["tables.tex"].decode()
    check_latex(text)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 7
    for judged in FAMILY:
        interval = f"{points(judged.mean)} ({points(judged.low)} to {points(judged.high)})".replace(MINUS, "$-$")
        assert re.search(
            rf"{judged.strategy.replace('_', '..')} & {judged.word}[ a-z()]* & {re.escape(interval)} & ", text
        )


def check_latex(text: str) -> None:
    """Environments close in order, rows have as many cells as columns, and nothing special stands unescaped."""
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    body = re.sub(r"(?m)^% .*$", "", text)
    plain = re.sub(r"\\[&%$#_{}]|\$-\$", "", body)
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"[%#_~^$<>|\"]", plain)
    for columns, rows_of in re.findall(r"\\begin\{tabular\}\{([lr]*)\}(.*?)\\end\{tabular\}", plain, re.DOTALL):
        for row in re.findall(r"^(?!\\)(.*) \\\\$", rows_of, re.MULTILINE):
            assert row.count("&") == len(columns) - 1


def test_numbers_in_csv_read_back_exactly(files):
    read = list(csv.DictReader(io.StringIO(files["comparisons.csv"].decode(), newline="")))
    for verdict, row in zip([*FAMILY, *study().others], read, strict=True):
        assert (float(row["mean"]), float(row["low"]), float(row["high"])) == (verdict.mean, verdict.low, verdict.high)
        assert (row["word"], row["strategy"], tuple(json.loads(row["budgets"]))) == (
            verdict.word,
            verdict.strategy,
            verdict.budgets,
        )
        assert (row["p"] and float(row["p"])) == ("" if verdict.p is None else verdict.p)
    fits = list(csv.DictReader(io.StringIO(files["fits.csv"].decode(), newline="")))
    for fit, row in zip(study().rows, fits, strict=True):
        assert float(row["test_accuracy"]) == fit.test_accuracy
        assert json.loads(row["options"]) == fit.options
    (milestone,) = csv.DictReader(io.StringIO(files["milestones.csv"].decode(), newline=""))
    assert (milestone["time_to_threshold"], milestone["examples_saved"]) == (">600", "")


def test_text_in_csv_reads_back_whatever_it_is():
    values = [HOSTILE, 'a,"b"\r\nc', "=1+1", ""]
    read = list(
        csv.DictReader(io.StringIO(export.table({"x": value, "y": np.float64(0.1)} for value in values), newline=""))
    )
    # A spreadsheet would run what begins with "=".
    assert read == [{"x": "'" + value if value.startswith("=") else value, "y": "0.1"} for value in values]


def test_hostile_names_are_only_text_everywhere(monkeypatch):
    names = {"target": HOSTILE, "source": HOSTILE, "evals": {HOSTILE: 0.5}, "strategy": HOSTILE, "leaves": None}
    fits = [replace(row, **names) for row in rows()[1:3]]
    family = [comparison(HOSTILE, 0.1, "positive", source=HOSTILE, target=HOSTILE)]
    images = {HOSTILE: (np.zeros((1, 2, 2, 3), np.uint8), [HOSTILE])}
    hostile = study(rows=fits, family=family, others=family, images=images, verdict=HOSTILE, notes=[HOSTILE])
    text = page(hostile, {HOSTILE: [HOSTILE] * 3}, HOSTILE)
    assert "<script" not in text and html.escape(HOSTILE, quote=False).split("(")[0] in text
    monkeypatch.setattr(figures, "pdf", lambda figure: b"")
    written = studies.files(hostile, title=HOSTILE)
    assert b"<script" not in written["report.md"] and rb"\_$%&amp;\#\~^\\\{\}" in written["report.md"]
    tex = written["tables.tex"].decode()
    check_latex(tex)
    assert r"\textless{}script\textgreater{}" in tex
    assert all(re.fullmatch(r"[a-z]+(-\d+)?\.pdf", name[8:]) for name in written if name.startswith("figures/"))
