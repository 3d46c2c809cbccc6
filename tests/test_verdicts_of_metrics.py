"""Metrics other than accuracy, from a run to its verdicts: names, units, directions, margins, and retention.

The fits are real: values of `src.npz` and `tgt.npz`, learnt by a network of one hidden layer, in one run directory.
"""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import r2_score

from experiments import compare, predict, report, transfer
from experiments.pages import compare as compare_page
from experiments.pages import tables
from experiments.runs import directory, looks, predictions
from experiments.runs.judging import Judging, margins, with_margin
from tljax import checkpoint
from tljax.study import units
from tljax.study import verdicts as comparisons
from tljax.study.results import Result
from tljax.study.units import ACCURACY
from tljax.study.verdicts import Cell, Conditions
from tljax.types import InputError, Metric

NATS = Metric("token_cross_entropy", "nats", larger_is_better=False)
MAE = Metric("mae", "", larger_is_better=False)
R_SQUARED = {"name": "r_squared", "unit": "", "larger_is_better": True}


def save(file: Path, seed: int, weights: np.ndarray, count: int) -> None:
    """A task of one value: a sum of bent directions of eight features, and noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count + 120, 8)).astype(np.float32)
    y = (np.tanh(x @ weights).sum(1, keepdims=True) + 0.3 * rng.normal(size=(len(x), 1))).astype(np.float32)
    train, test = slice(None, count), slice(count, None)
    groups = np.arange(120) // 2
    np.savez(
        file, train_features=x[train], train_targets=y[train], test_features=x[test], test_targets=y[test],
        train_groups=1000 + np.arange(count), test_groups=groups,
    )  # fmt: skip


FLAGS = (
    *("--train_examples=20", "--seeds=0-2", "--steps=8", "--source_steps=150", "--batch_size=10", "--hidden=8"),
    *("--learning_rate=0.05", "--source_learning_rate=0.02", "--optimizer=adam", "--metric=mae"),
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder of the data, run directory of a study of values with retention, judged on what is kept of the source)."""
    folder = tmp_path_factory.mktemp("values")
    weights = np.random.default_rng(0).normal(size=(8, 3))
    save(folder / "src.npz", 1, weights, 1000)
    save(folder / "tgt.npz", 2, weights + 0.1, 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.pdf", lambda figure: b"")
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        compare.main(["compare", *argv_of(folder, "w"), "--retention"])
    return folder, folder / "w"


def argv_of(folder: Path, name: str) -> list[str]:
    tasks = (f"--source={folder / 'src.npz'}", f"--target={folder / 'tgt.npz'}")
    return [*tasks, "--strategies=head_only,full", "--longer_scratch=false", *FLAGS, f"--workdir={folder / name}"]


@pytest.fixture
def part(study) -> predictions.Predictions:
    return next(part for part in parts(study[1]) if any(row.strategy == "full" for row in part.rows))


def parts(folder: Path) -> list[predictions.Predictions]:
    return predictions.read_study(folder).parts


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))


def by_name(every_part, strategy: str) -> dict[int, Result]:
    return {row.seed: row for each in every_part for row in each.rows if row.strategy == strategy}


# Names


@pytest.mark.slow
def test_no_page_of_values_speaks_of_accuracy(study):
    folder = study[1]
    for name in ("report.html", "report.md", "tables.tex", "comparisons.csv", "fits.csv", "milestones.csv"):
        text = re.sub(r"data:image/svg[^\"]*", "", (folder / name).read_text(encoding="utf-8"))
        assert "accuracy" not in text.lower(), name
        assert not re.search(r"\bpoints\b", text.split("<pre>")[0]), name
    text = (folder / "report.md").read_text(encoding="utf-8")
    for words in ("Test r squared on", "Test mae", "Retention (r squared)", "margin of 0.01 of r squared"):
        assert words in text
    assert "Confusion" not in text and "Calibration" not in text and "Most often wrong" not in text
    row = rows_of(folder / "comparisons.csv")[0]
    assert (row["metric"], row["margin"], row["larger_is_better"]) == ("r_squared", "0.01", "True")


@pytest.mark.slow
def test_the_table_of_a_transfer_names_metric_retention_and_unit(study, capsys, monkeypatch):
    folder = study[0]
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal is shown fewer columns
    line = [flag for flag in argv_of(folder, "t") if not flag.startswith("--longer_scratch")]
    transfer.main(["transfer", *line, "--retention"])
    output = capsys.readouterr().out
    heading = next(text for text in output.splitlines() if text.startswith(" strategy"))
    assert all(name in heading for name in ("test r squared", "retention (r squared)", "mae", " loss "))
    assert "accuracy" not in output.lower() and "source's own test r squared" in output
    again = {row.name: row for row in directory.results(folder / "t")}
    for row in (row for each in parts(study[1]) for row in each.rows):
        assert again[row.name].test_score == row.test_score and again[row.name].metric == R_SQUARED


# Numbers


def test_item_scores_are_one_less_squared_errors_and_their_mean_is_the_score(study):
    for row in (row for each in parts(study[1]) for row in each.rows):
        with np.load(study[1] / row.predictions) as file:
            outputs, targets, scores = file["outputs"], file["targets"], file["scores"]
        np.testing.assert_allclose(scores, 1 - ((targets - outputs) ** 2 / targets.var())[:, 0], rtol=1e-5, atol=1e-6)
        assert row.test_score == pytest.approx(r2_score(targets, outputs), abs=1e-6)


def test_a_single_pair_has_the_interval_and_p_of_the_t_test_on_its_items(part, study):
    """Held against scipy: equal where tails are no longer than normal ones, else wider, by what may not be seen."""
    table = predictions.right(parts(study[1]))
    cells = {cell.strategy: cell for cell in table}
    squares = [table[cells[name]][0].astype(float) for name in ("full", "scratch")]
    for tails, (full, scratch) in {"long": squares, "short": [np.maximum(scores, 0.2) for scores in squares]}.items():
        single = {cells["full"]: {0: full}, cells["scratch"]: {0: scratch}}
        size = comparisons.scale(single, single)
        assert size == pytest.approx(np.sqrt((np.var(full) + np.var(scratch)) / 2), rel=1e-6)
        comparison = comparisons.alone(single, [cells["full"]], Conditions(0.01, NATS, scale=size), 0.95)
        expected = stats.ttest_rel(full, scratch)
        low, high = expected.confidence_interval(0.95)
        assert (
            comparison.mean == pytest.approx(np.mean(full - scratch))
            and comparison.metric == NATS
            and not comparison.word
        )
        assert (stats.kurtosis(full - scratch, fisher=False) > 3) == (tails == "long")
        if tails == "short":
            assert (comparison.p, comparison.low, comparison.high) == pytest.approx(
                (expected.pvalue, low, high), rel=1e-9
            )
        else:
            assert (
                expected.pvalue < comparison.p < 0.05
                and low - 0.02 < comparison.low < low < high < comparison.high < high + 0.02
            )


def test_verdicts_do_not_depend_on_the_unit_of_a_metric(study):
    table = predictions.right(parts(study[1]))
    plain, _ = comparisons.compared(table, 0.05, 0.95)

    def changed(times: float, less: float):
        return {c: {s: times * x.astype(float) - less for s, x in fits.items()} for c, fits in table.items()}

    large, _ = comparisons.compared(changed(1000, 0), 50, 0.95)
    shifted, _ = comparisons.compared(changed(1, 7), 0.05, 0.95)
    assert len(plain) == 2
    for comparison, thousandfold, moved in zip(plain, large, shifted, strict=True):
        assert (comparison.word, comparison.size) == (thousandfold.word, thousandfold.size) == (moved.word, moved.size)
        ends = np.array([comparison.mean, comparison.low, comparison.high])
        np.testing.assert_allclose([thousandfold.mean, thousandfold.low, thousandfold.high], 1000 * ends, rtol=1e-6)
        np.testing.assert_allclose([moved.mean, moved.low, moved.high], ends, rtol=1e-6, atol=1e-9)
        assert (comparison.p, *comparison.power) == pytest.approx((thousandfold.p, *thousandfold.power), rel=1e-6)


def test_an_interval_of_real_scores_may_end_beyond_one():
    rng = np.random.default_rng(0)
    cells = Cell("a", "b", "full", 10), Cell(None, "b", "scratch", 10)
    table = {cell: {seed: 5 * rng.normal(size=30) + 9 * (cell == cells[0]) for seed in range(3)} for cell in cells}
    [comparison], _ = comparisons.compared(table, 0.05, 0.95)
    assert comparison.low > 1 and comparison.word == "positive" and comparison.size == "beyond"
    assert (comparisons.alone(table, [cells[0]], Conditions(0.05), 0.95) or pytest.fail()).low > 1


def test_scores_that_are_all_the_same_are_not_taken_for_a_fit_that_diverged():
    """Every item of a perfect fit scores 1."""
    perfect, half = np.ones(40, np.float32), np.linspace(0.2, 0.8, 40, dtype=np.float32)
    assert not comparisons.diverged(perfect) and comparisons.diverged(comparisons.of_diverged(1.0, 40))
    cells = Cell("a", "b", "full", 10), Cell(None, "b", "scratch", 10)
    table = {cells[0]: {s: perfect for s in range(3)}, cells[1]: {s: half + 0.01 * s for s in range(3)}}
    [comparison], _ = comparisons.compared(table, 0.05, 0.95)
    assert comparison.diverged == (0, 0) and comparison.word == "positive"


@pytest.mark.slow
def test_intervals_of_squared_errors_cover_the_truth():
    """Two ways that are equally good on average, whose errors share the noise of the items and have own parts."""
    rng, cells = np.random.default_rng(3), (Cell("a", "b", "full", 10), Cell(None, "b", "scratch", 10))
    covered, studies = 0, 400
    for _ in range(studies):
        noise, table = rng.standard_t(5, size=(1, 150)), {}
        for cell in cells:
            strategy_noise = 0.3 * rng.normal(size=(1, 150)) + 0.3 * rng.normal(size=(5, 150))
            table[cell] = dict(enumerate(1 - (noise + strategy_noise) ** 2))
        comparison = comparisons.alone(table, [cells[0]], Conditions(0.01, scale=comparisons.scale(table, cells)), 0.95)
        covered += comparison.low <= 0 <= comparison.high
    assert 0.93 < covered / studies < 0.995


# Directions, margins, several metrics


def as_errors(every_part, target: str | None = None):
    """The same fits, measured by their absolute errors."""
    parts = []
    for each in every_part:
        rows, scores = [], {}
        for row in each.rows:
            mae = row.metrics["mae"]
            name = target or row.target
            rows.append(replace(row, target=name, metric=units.to_record(MAE), test_score=mae, key=f"mae {row.key}"))
            scores[row.name] = np.full(120, mae, np.float32) + np.linspace(-0.1, 0.1, 120, dtype=np.float32)
        labels = {target or name: values for name, values in each.labels.items()}
        parts.append(each._replace(rows=rows, scores=scores, labels=labels, groups={}, curves={}))
    return parts


def test_where_less_is_better_differences_are_turned_and_that_is_said(study):
    error_parts = as_errors(parts(study[1]))
    judged = compare_page.judged(error_parts, Judging(), [])
    means = {
        name: np.mean([row.test_score for row in by_name(error_parts, name).values()]) for name in ("scratch", "full")
    }
    comparison = next(each for each in judged.family if each.strategy == "full")
    assert comparison.mean == pytest.approx(means["scratch"] - means["full"], abs=1e-6)
    assert "less is better" in judged.verdict and any("positive is better" in note for note in judged.notes)
    [row] = [
        row
        for row in tables.scores([row for each in error_parts for row in each.rows], "x").rows
        if row[0].text == "full"
    ]
    assert row[1].text == f"{means['full']:.4f}"
    heading = tables.verdicts(judged.family).columns[2]
    assert heading == "Difference from scratch" and comparison.margin == 0.01


def test_a_study_of_two_metrics_names_each_and_takes_no_mean_over_them(study):
    both = [*parts(study[1]), *as_errors(parts(study[1]), "of errors")]
    judged = compare_page.judged(both, Judging(), [])
    assert {each.metric.name for each in judged.family} == {"r_squared", "mae"}
    assert "of r squared" in judged.verdict and "of mae" in judged.verdict
    table = tables.verdicts(judged.family)
    assert table.columns[:4] == ["Strategy", "Verdict", "Metric", "Difference from scratch"]
    assert {row[2].text for row in table.rows if len(row) > 1} == {"r squared", "mae"}
    sections = compare_page.sections(judged, {})
    assert len([block for section in sections if section.key == "gains" for block in section.blocks]) == 0
    assert any("different metrics" in note for note in judged.notes)


def test_fits_of_one_target_and_two_metrics_are_refused(study):
    accuracies = parts(study[1])
    with pytest.raises(InputError, match="were measured by r_squared and mae: report those of one metric"):
        predictions.right([*accuracies, *as_errors(accuracies)])


def test_margins_are_in_the_unit_of_the_metric():
    nats = {"b": NATS}
    assert margins(Judging(), {"a": ACCURACY, **nats}) == {"a": 0.005, "b": 0.01}
    assert margins(Judging(margin=0.2), nats) == {"b": 0.2} and margins(Judging(margin=2), {"a": ACCURACY}) == {
        "a": 0.02
    }
    assert with_margin(Judging(), [ACCURACY]).margin == 0.5 and with_margin(Judging(), [ACCURACY, NATS]).margin is None
    with pytest.raises(
        InputError, match=r"--margin=1 is one number, and the metrics of the targets are in points and n"
    ):
        with_margin(Judging(margin=1.0), [ACCURACY, NATS])
    with pytest.raises(InputError, match="--margin=100: give points above 0 and below 100"):
        with_margin(Judging(margin=100.0), [ACCURACY])
    assert with_margin(Judging(margin=100.0), [NATS]).margin == 100


def test_a_test_set_of_values_is_known_by_its_bytes():
    values = np.array([[0.25], [0.5]], np.float32)
    assert looks.name_of_test_set(values) != looks.name_of_test_set(values + 0.125)
    labels = np.array([0, 1])
    assert looks.name_of_test_set(labels) == looks.name_of_test_set(labels.astype(np.int32))


# Retention


def forward(flat, x: np.ndarray) -> np.ndarray:
    """One hidden layer, by hand."""
    hidden = np.maximum(x @ flat["hidden_0/kernel"] + flat["hidden_0/bias"], 0)
    return hidden @ flat["head/kernel"] + flat["head/bias"]


def test_retention_is_the_trained_body_under_the_sources_head_on_the_sources_test_set(study):
    folder, run = study
    trained = {row.seed: row for row in directory.results(run) if row.strategy == "pretrain"}
    with np.load(folder / "src.npz") as file:
        x, y = file["test_features"], file["test_targets"]
    table = predictions.right(parts(run), "retention")
    assert {cell.strategy for cell in table} == {"head_only", "full"}
    for strategy in ("head_only", "full"):
        for seed, row in by_name(parts(run), strategy).items():
            body = checkpoint.load(run / row.checkpoint)[0][row.name]
            source = checkpoint.load(run / trained[seed].checkpoint)[0][trained[seed].name]
            head = {path: leaf for path, leaf in source.items() if path.startswith("head")}
            value = r2_score(y, forward({**body, **head}, x))
            assert row.retention == pytest.approx(value, abs=1e-5) and row.retention_metric == R_SQUARED
            [cell] = [cell for cell in table if cell.strategy == strategy]
            assert np.mean(table[cell][seed], dtype=float) == pytest.approx(value, abs=1e-5)
            if strategy == "head_only":  # its body is the source's
                assert row.retention == pytest.approx(trained[seed].test_score, abs=1e-6)
    assert all(row.retention is None for row in by_name(parts(run), "scratch").values())


@pytest.mark.slow
def test_retention_of_what_is_merged_of_phases_and_of_masks_of_elements(study, tmp_path):
    folder, run = study
    line = [
        flag for flag in argv_of(folder, "t") if not flag.startswith(("--longer_scratch", "--strategies", "--workdir"))
    ]
    strategies = "--strategies=lora:rank=2,lp_ft,random_mask:fraction=0.3"
    transfer.main(["transfer", *line, strategies, "--retention", f"--workdir={tmp_path / 'w'}"])
    trained = {row.seed: row for row in directory.results(run) if row.strategy == "pretrain"}
    with np.load(folder / "src.npz") as file:
        x, y = file["test_features"], file["test_targets"]
    [record] = [directory.read_record(file) for file in (tmp_path / "w" / "evals").glob("source-*.json")]
    rows = [row for row in directory.results(tmp_path / "w") if row.strategy not in ("scratch", "pretrain")]
    assert len(rows) == 9 and record["accuracy"].keys() == {row.name for row in rows}
    for row in rows:
        trees = checkpoint.load(tmp_path / "w" / row.checkpoint)[0]
        body = trees.get(f"{row.name}.merged", trees[row.name])
        assert (f"{row.name}.merged" in trees) == (row.strategy == "lora")
        source = checkpoint.load(run / trained[row.seed].checkpoint)[0][trained[row.seed].name]
        head = {path: leaf for path, leaf in source.items() if path.startswith("head")}
        assert record["accuracy"][row.name] == pytest.approx(r2_score(y, forward({**body, **head}, x)), abs=1e-5)


@pytest.mark.slow
def test_verdicts_on_retention_are_planned_and_judged_on_the_sources_items(study, capsys):
    folder, _ = study
    line = [*argv_of(folder, "kept"), "--verdict_on=retention", "--against=full"]
    compare.main(["compare", *line])
    output = capsys.readouterr().out
    assert "Of what is kept of the source: " in output and "of scratch it is not defined" in output
    record = json.loads((folder / "kept" / "study.json").read_text(encoding="utf-8"))
    assert record["judging"]["verdict_on"] == "retention"
    [row] = rows_of(folder / "kept" / "comparisons.csv")
    kept = [by_name(parts(folder / "kept"), name) for name in ("head_only", "full")]
    differences = [kept[0][seed].retention - kept[1][seed].retention for seed in kept[0]]
    assert float(row["mean"]) == pytest.approx(np.mean(differences), abs=1e-6)
    assert (row["strategy"], row["items"], row["groups"], row["fits"]) == ("head_only", "120", "60", "3")
    report.main(["report", f"--runs={folder / 'kept'}", f"--output={folder / 'pages'}"])
    again = rows_of(folder / "pages" / "comparisons.csv")
    assert (again[0]["mean"], again[0]["p"]) == (row["mean"], row["p"])
    with pytest.raises(InputError, match="judged with --verdict_on=retention, not target"):
        report.main(["report", f"--runs={folder / 'kept'}", "--verdict_on=target", f"--output={folder / 'p'}"])
    with pytest.raises(InputError, match=r"--verdict_on=retention there,"):
        compare.main(["compare", *argv_of(folder, "kept"), "--against=full"])
    file = next((folder / "kept" / "evals").glob("*/*.npz"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"there is no fit to judge: .* are not as they were written"):
        report.main(["report", f"--runs={folder / 'kept'}", f"--output={folder / 'p'}"])
    compare.main(["compare", *line])  # the scores are taken anew
    report.main(["report", f"--runs={folder / 'kept'}", f"--output={folder / 'p'}"])


def test_what_cannot_be_kept_or_judged_is_one_line(study, tmp_path):
    folder, run = study
    with pytest.raises(InputError, match="not defined for scratch, which had none: name the strategy"):
        compare.main(["compare", *argv_of(folder, "no"), "--verdict_on=retention"])
    with pytest.raises(InputError, match=r"--verdict_on=both|verdict_on"):
        compare.main(["compare", *argv_of(folder, "no"), "--verdict_on=both"])
    with pytest.raises(InputError, match="--retention: there is no source"):
        transfer.main(["transfer", f"--target={folder / 'tgt.npz'}", "--strategies=scratch", *FLAGS, "--retention",
                       f"--workdir={tmp_path / 'w'}"])  # fmt: skip
    lost = tmp_path / "tgt.npz"
    lost.write_bytes((folder / "tgt.npz").read_bytes())
    moved = folder / "elsewhere.npz"
    (folder / "src.npz").rename(moved)
    try:
        with pytest.raises(
            InputError, match=r"--retention: the data '.*src\.npz' that the source was trained on are n"
        ):
            transfer.main(["transfer", f"--source_checkpoint={run}", f"--target={lost}", "--strategies=full", *FLAGS,
                           "--retention", f"--workdir={tmp_path / 'w'}"])  # fmt: skip
    finally:
        moved.rename(folder / "src.npz")


def test_values_are_predicted_as_they_were_in_training(study, tmp_path):
    folder, run = study
    fit = by_name(parts(run), "full")[0]
    with np.load(folder / "tgt.npz") as file:
        np.savez(tmp_path / "inputs.npz", test_features=file["test_features"])
    predict.main(["predict", f"--checkpoint={run}", f"--fit={fit.name}", f"--images={tmp_path / 'inputs.npz'}",
                  f"--output={tmp_path / 'values.csv'}"])  # fmt: skip
    rows = list(csv.reader(io.StringIO((tmp_path / "values.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["item", "value 0"] and [row[0] for row in rows[1:3]] == ["0", "1"]
    with np.load(run / fit.predictions) as file:
        np.testing.assert_allclose([[float(row[1])] for row in rows[1:]], file["outputs"], rtol=1e-5, atol=1e-6)
