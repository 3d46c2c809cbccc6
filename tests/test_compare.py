"""Comparing: a study in one run directory, resumed, tuned, judged further, and the same for fits made elsewhere."""

import csv
import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_programs import arguments, command, results, snapshot

from experiments import compare, pretrain, report, search, transfer
from experiments.pages import transfer as transfer_page
from experiments.runs import directory, plan, predictions
from experiments.runs.judging import Judging, with_family
from experiments.runs.settings import Settings, parse_flags
from tljax.data import load
from tljax.study.results import Result, to_json
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")


def line(tasks, folder, *more, **flags):
    values = {"strategies": ("full",), "train_examples": ("4/class:seeds=2", "all:seeds=2"), "steps": 20} | flags
    return ["compare", *command(tasks, folder, **values), *more]


@pytest.fixture(scope="module")
def done(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        patch.setattr("experiments.pages.figures.pdf", lambda figure: b"")
        compare.main(line(tasks, folder, f"--eval=source,{tasks / 'clothes.npz'}:noise=0.2"))
    return folder / "w"


def test_a_study_holds_all_fits_once_and_scratch_for_each_budget(done):
    lines = results(done)
    cells = [(line.strategy, line.train_examples, line.steps, line.seed) for line in lines]
    source = [cell for cell in cells if cell[0] == "pretrain"]
    assert len(cells) == len(set(cells)) == 2 + 4 + 4 + 4  # sources, scratch, scratch with the source's steps, full
    longer = {cell[2] for cell in cells if cell[0] == "scratch"} - {20}
    assert longer == {20 + source[0][2]}
    (look,) = directory.read_record(done / "looks.json")["looks"]
    assert len(look) == 12 and directory.read_record(done / "study.json")["looks"] == 1


PAGE = (Path(__file__).parent.parent / "experiments" / "README.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## What is in a run directory")[2]
FILES, FIELDS = (re.findall(r"(?ms)^\| [^|]*\|[^|]*\|\n\|---\|---\|\n(.*?)\n\n", SECTION))[:2]


def first_cells(table):
    """The names in backquotes of the first column."""
    return {name for row in table.splitlines() for name in re.findall("`([^`]+)`", row.split("|")[1])}


def test_the_page_names_every_file_and_field_that_runs_leave(done, tasks, tmp_path):
    named = {name.rstrip("/") for name in first_cells(FILES)}
    flags = {"hidden": (8,), "steps": 4, "strategies": ("head_only",), "seeds": (0,)}
    search.main(["search", *command(tasks, tmp_path, **flags), "--space=learning_rate:in:0.1,0.2", "--trials=1"])
    left = {file.name for folder in (done, tmp_path / "w") for file in folder.iterdir()}
    assert {"comparisons.csv", "looks.json", "final", "predictions"} < left <= named
    assert set(directory.FOLDERS) - {"tables"} <= named
    fields = {field for folder in (done, tmp_path / "w") for line in results(folder) for field in to_json(line)}
    lines = [json.loads(line) for line in (done / "results.jsonl").read_text().splitlines()]
    fields |= {field for line in lines for field in line}
    assert fields - first_cells(FIELDS) == set()
    known = {field.name for field in dataclasses.fields(Result)} | {"sha256", "train_penalty_0_l2"}
    assert first_cells(FIELDS) <= known


def test_predictions_hold_what_the_page_says(done):
    for line in results(done):
        with np.load(done / line.predictions) as arrays:
            assert set(arrays) == {"probabilities", "labels"}
            right = arrays["probabilities"].argmax(1) == arrays["labels"]
            assert arrays["probabilities"].dtype == np.float32 and right.mean() == line.test_accuracy


@pytest.mark.slow
def test_an_interval_can_be_computed_by_hand_from_what_a_run_leaves(tasks, tmp_path):
    """As section 8 of the page says it."""
    compare.main(line(tasks, tmp_path, train_examples=("all",), seeds=(0, 1, 2), steps=10))
    folder = tmp_path / "w"

    def right(strategy, steps):
        fits = [fit for fit in results(folder) if fit.strategy == strategy and fit.steps == steps]
        files = [np.load(folder / fit.predictions) for fit in sorted(fits, key=lambda fit: fit.seed)]
        return np.array([file["probabilities"].argmax(1) == file["labels"] for file in files], float)

    d = right("full", 10) - right("scratch", 10)
    n, m = d.shape
    rows, columns = d.mean(1), d.mean(0)
    rest = d - rows[:, None] - columns[None] + d.mean()
    a = m * rows.var(ddof=1)
    b = n * columns.var(ddof=1)
    e = (rest**2).sum() / ((n - 1) * (m - 1))
    with open(folder / "comparisons.csv") as table:
        judged = next(csv.DictReader(table))
    assert float(judged["mean"]) == pytest.approx(d.mean())
    limit = (n - 1) * a / stats.chi2.ppf(0.1, n - 1)
    spread = limit**2 / (n - 1) + (b**2 + e**2 / (n - 1) if b > e else 0) / (m - 1)
    degrees = (limit + max(b - e, 0)) ** 2 / spread
    half = stats.t.ppf(0.975, degrees) * np.sqrt((a + max(b - e, 0)) / (n * m))
    assert a > e, "the floor of A would enter"
    bounds = np.clip([d.mean() - half, d.mean() + half], -1, 1)
    np.testing.assert_allclose([float(judged["low"]), float(judged["high"])], bounds, rtol=1e-6)


def test_fits_are_judged_on_further_test_sets_and_on_the_source_with_its_head(done):
    records = (done / "evals").glob("*.json")
    files = {file.name.split("-")[0]: directory.read_record(file)["accuracy"] for file in records}
    fulls = {line.name for line in results(done) if line.strategy == "full"}
    assert set(files["source"]) == fulls
    assert all(0 <= value <= 1 for known in files.values() for value in known.values())


@pytest.mark.slow
def test_a_study_run_again_trains_nothing_and_writes_the_same(done, tasks, monkeypatch, capsys):
    before = snapshot(done)
    monkeypatch.setattr("experiments.runs.fit.train_groups", lambda *positional: pytest.fail("it trained again"))
    compare.main(line(tasks, done.parent, f"--eval=source,{tasks / 'clothes.npz'}:noise=0.2"))
    after = snapshot(done)
    assert {name for name in before if before[name] != after.get(name)} <= {"report.html"}
    output = capsys.readouterr().out
    assert "against scratch at equal target steps" in output and "equal source and target steps" in output
    assert "untuned" in output and "these tasks alone" in output


def test_a_dry_run_counts_the_fits(tasks, tmp_path, capsys):
    compare.main(line(tasks, tmp_path, "--dry_run"))
    assert "12 fits in all" in capsys.readouterr().out and not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def tuned(tasks, tmp_path_factory):
    """(run directory of a search, run directory of the comparison of what it found) on the same tasks and seeds."""
    folder = tmp_path_factory.mktemp("tuned")
    few = {"strategies": ("full", "head_only"), "train_examples": ("5/class",), "seeds": (0, 1), "steps": 20}
    flags = [flag for flag in command(tasks, folder, **few) if not flag.startswith("--workdir")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        patch.setattr("experiments.pages.figures.pdf", lambda figure: b"")
        space = ["--per_strategy", "--space=learning_rate:log:1e-3:3", "--trials=8"]
        search.main(["search", *flags, *space, f"--workdir={folder / 'search'}"])
        flags = [flag for flag in flags if not flag.startswith("--learning_rate")]  # was searched
        compare.main(["compare", *flags, f"--tuned={folder / 'search'}", f"--workdir={folder / 'compare'}"])
    return folder / "search", folder / "compare"


@pytest.mark.slow
def test_a_tuned_comparison_has_the_fits_of_the_search_and_their_differences_to_the_digit(tuned):
    searched = [line for run in sorted((tuned[0] / "final").iterdir()) for line in results(run)]
    compared = [line for line in results(tuned[1]) if line.steps == 20]
    accuracy = {(line.strategy, line.seed): line.test_accuracy for line in searched}
    accuracy = {key: value for key, value in accuracy.items() if key[0] != "pretrain"}
    assert len(accuracy) == 3 * 2
    ours = [line for line in compared if line.strategy != "pretrain"]
    assert {(line.strategy, line.seed): line.test_accuracy for line in ours} == accuracy
    assert len(ours) == len(accuracy)  # one scratch a target, budget and seed
    rates = {name: flags_of(tuned[0] / "best" / f"{name}-5_class.flags") for name in ("scratch", "full", "head_only")}
    assert len(set(rates.values())) == 3
    with open(tuned[1] / "comparisons.csv", newline="") as table:
        rows = [row for row in csv.DictReader(table) if "at equal target steps" in row["against"]]
    for row in rows:
        pairs = [accuracy[row["strategy"], seed] - accuracy["scratch", seed] for seed in (0, 1)]
        assert float(row["mean"]) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert len(rows) == 2


def flags_of(file):
    return next(line for line in file.read_text().splitlines() if line.startswith("--learning_rate"))


def test_scratch_is_given_the_total_steps_of_each_tuned_strategy(tuned):
    """Scratch with the source's steps is scratch's own recipe, not another strategy's."""
    lines = results(tuned[1])
    source = next(line.steps for line in lines if line.strategy == "pretrain")
    longer = [line for line in lines if line.strategy == "scratch" and line.steps > 20]
    assert {line.steps for line in longer} == {20 + source} and len(longer) == 2


def test_what_was_tuned_on_another_task_or_model_is_refused(tuned, tasks, tmp_path):
    few = {"strategies": ("full",), "train_examples": ("5/class",), "seeds": (0, 1)}
    for flags in ({"target": str(tasks / "same.npz")}, {"source": str(tasks / "same.npz")}, {"model": "cnn"}):
        with pytest.raises(InputError, match=f"--tuned=.* is of --{next(iter(flags))}="):
            compare.main(line(tasks, tmp_path, f"--tuned={tuned[0]}", **few, **flags))
    assert not (tmp_path / "w").exists()


def plant(run, **changes):
    """Add a copy of a finished fit from scratch under another key, as a changed file of code would leave it."""
    scratch = next(line for line in directory.results(run) if line.strategy == "scratch")
    planted = replace(scratch, key="f" * 64, name="planted", **changes)
    directory.add(run, [planted])
    for mask in (run / "masks").glob(f"{scratch.name}-*"):
        shutil.copy(mask, mask.with_name(mask.name.replace(scratch.name, planted.name)))
    return planted


@pytest.mark.parametrize("changes", [{}, {"seed": 7, "recipe": "0" * 16}, {"seed": 7, "steps": 21, "recipe": None}])
def test_two_fits_of_one_cell_and_seed_or_two_recipes_in_a_cell_are_refused(changes, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    planted = plant(run, **changes)
    message = "under seed" if not changes else "different hyper-parameters, code or data"
    with pytest.raises(InputError, match=f"'planted' are both scratch .*{message}"):
        report.main(["report", f"--runs={run}", f"--output={tmp_path / 'pages'}"])
    lines = [line for line in directory.results(run) if line.strategy != "pretrain"]
    assert planted.key in {line.key for line in lines}
    with pytest.raises(InputError, match=f"'planted' are both scratch .*{message}"):
        transfer_page.print_results("planted", lines, [])


@pytest.mark.slow
def test_flags_that_decide_the_bits_are_in_the_recipe_that_one_cell_must_share(tasks):
    """So that a report of two runs does not put fits with dropout in frozen stages beside fits without."""

    def recipes(**flags):
        settings = Settings.from_flags(**arguments(tasks, None, strategies=("full",), **flags))
        return {job.result.recipe for job in plan.planned(plan.prepare(settings, None)).values() if job.seed == 0}

    assert len(recipes() | recipes(frozen_dropout="on")) == 2 * len(recipes())
    assert recipes(features_budget=0) == recipes() == recipes(seeds=(0,))  # rounding, and the seeds beside a fit


def test_sources_that_bring_a_target_to_several_shapes_are_refused_before_training(tasks, tmp_path):
    """Fits from scratch on 28 x 28 and on 14 x 14 images are not one cell."""
    images, labels = np.zeros((8, 14, 14, 1), np.uint8), np.arange(8) % 4
    images[:, 0, 0, 0] = np.arange(8)
    np.savez(
        tmp_path / "small.npz", train_images=images, train_labels=labels, test_images=images + 9, test_labels=labels
    )
    both = f"{tasks / 'digits.npz'},{tmp_path / 'small.npz'}"
    with pytest.raises(InputError, match=r"are both scratch.*(under seed|data)"):
        compare.main(line(tasks, tmp_path, source=both, train_examples=("all",), seeds=(0, 1)))
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_each_strategy_is_tuned_by_a_search(tasks, tmp_path, capsys):
    best = tmp_path / "search" / "best"
    best.mkdir(parents=True)
    for strategy, rate in (("scratch", 0.3), ("full", 0.05)):
        argv = command(tasks, tmp_path, strategies=(strategy,), train_examples=("all",), learning_rate=rate, steps=20)
        (best / f"{strategy}-all.flags").write_text("\n".join(part for part in argv if "workdir" not in part))

    def tuned(**flags):
        """A command line without the rate, which is the search's."""
        arguments = line(tasks, tmp_path, f"--tuned={best.parent}", **flags)
        return [argument for argument in arguments if not argument.startswith("--learning_rate")]

    compare.main(tuned(train_examples=("all",), seeds=(0, 1)))
    assert "tuned: every strategy has what search found best for it" in capsys.readouterr().out
    with pytest.raises(InputError, match="nothing for 'head_only'"):
        compare.main(tuned(strategies=("head_only",)))
    with pytest.raises(InputError, match="are those of searches"):
        compare.main(tuned(seeds=(0, 1_000_000)))


BAD = [
    (["--margin=0"], "--margin=0: give points"),
    (["--level=1"], "--level=1: give"),
    (["--looks=0"], "--looks=0: give 1"),
    (["--against=nobody"], "is none of --strategies"),
    (["--family=targets"], "speak of themselves alone"),
    (["--family=7/class"], "--family=7/class is none of --train_examples"),
    (["--eval=nothing_such"], "nothing_such"),
    (["--tuned=/nowhere"], "holds no best.flags"),
    (["--train_examples=4/clas"], "5/class"),
    (["--train_examples=all:seeds=9"], "not 9"),
    (["--seeds=5-1"], "as 0-29"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_line(more, message, tasks, tmp_path):
    with pytest.raises(InputError) as refused:
        compare.main(line(tasks, tmp_path, *more))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "w").exists()


def test_another_margin_is_another_study(done, tasks):
    with pytest.raises(InputError, match="margin"):
        compare.main(line(tasks, done.parent, "--margin=1", f"--eval=source,{tasks / 'clothes.npz'}:noise=0.2"))


def theirs(folder, seeds=3, **columns):
    """A table and predictions as somebody else's program would write them."""
    rng, labels, rows = np.random.default_rng(0), np.arange(200) % 4, []
    for strategy, rate in (("scratch", 0.5), ("mine", 0.9)):
        for seed in range(seeds):
            right = rng.uniform(size=200) < rate
            np.savez(
                folder / f"{strategy}{seed}.npz", labels=labels, predicted=np.where(right, labels, (labels + 1) % 4)
            )
            rows.append(
                {
                    "name": f"{strategy}{seed}",
                    "source": "big",
                    "target": "small",
                    "strategy": strategy,
                    "seed": seed,
                    "train_examples": 40,
                    **columns,
                }
            )
    with open(folder / "theirs.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [f"--predictions={folder}/*.npz", f"--results={folder / 'theirs.csv'}", f"--output={folder / 'out'}"]


def test_fits_made_elsewhere_get_the_same_verdicts(tmp_path, capsys):
    report.main(["report", *theirs(tmp_path)])
    output = capsys.readouterr().out
    assert "positive" in output and (tmp_path / "out" / "report.html").is_file()
    arrays = predictions.read(tmp_path / "mine0.npz")
    assert arrays[0].shape == arrays[1].shape == (200,)


def test_epochs_chosen_on_the_test_set_are_refused(tmp_path):
    with pytest.raises(InputError, match="chosen on the test set"):
        report.main(["report", *theirs(tmp_path, selected_on="test")])


@pytest.mark.parametrize("word", ["no", "False", "0", ""])
def test_a_fit_made_elsewhere_that_did_not_diverge_counts_however_that_is_written(tmp_path, word, capsys):
    report.main(["report", *theirs(tmp_path, diverged=word)])
    output = capsys.readouterr().out
    assert "positive" in output and "diverged" not in output


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"train_examples": 0}, "line 2: train_examples is 0: it must be 1 or more"),
        ({"train_examples": -10}, "line 2: train_examples is -10: it must be 1 or more"),
        ({"seed": 3}, "line 3 tells of the fit of .*line 2 again"),
        ({"name": "mine0"}, "line 3 tells of the fit of .*line 2 again"),
        ({"diverged": "perhaps"}, "line 2: diverged 'perhaps' is neither"),
        ({"seconds": "nan"}, "line 2: seconds is nan"),
        ({"steps": "1e3"}, "line 2: steps '1e3' is no number"),
        ({"steps": 10**400}, "line 2: steps is 1000"),
        ({"source_accuracy": 93.5}, "line 2: source_accuracy is 93.5: it must be between 0 and 1"),
        ({"source_accuracy": "inf"}, "line 2: source_accuracy is inf"),
        ({"strategy": "  "}, "line 2 has no strategy"),
    ],
    ids=str,
)
def test_a_table_of_fits_that_cannot_be_is_refused(tmp_path, columns, message):
    with pytest.raises(InputError, match=message) as refusal:
        report.main(["report", *theirs(tmp_path, **columns)])
    assert "\n" not in str(refusal.value)


def test_columns_that_are_not_asked_for_are_left_out_aloud(tmp_path, capsys):
    report.main(["report", *theirs(tmp_path, options="text", confusion="[[1]]", evals="=1+1")])
    output = capsys.readouterr().out
    assert "columns that are not read: options, confusion, evals" in output and "positive" in output
    assert "=1+1" not in (tmp_path / "out" / "fits.csv").read_text()


def test_several_run_directories_make_one_report_and_a_broken_one_is_left_out(done, finished, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.jsonl").write_text("{")
    shutil.copytree(done, tmp_path / "old")
    (tmp_path / "old" / "study.json").write_text("[]")
    runs = ",".join(str(tmp_path / name) for name in ("broken", "absent", "old"))
    report.main(["report", f"--runs={done},{runs}", f"--output={tmp_path / 'out'}"])
    output = capsys.readouterr().out
    assert "broken" in output and output.count("left out") == 3 and "against scratch" in output
    report.main(["report", f"--runs={finished[0]}", f"--output={tmp_path / 'other'}"])
    assert "bias_only" in capsys.readouterr().out  # of experiments.transfer


def test_flags_of_seeds_are_ranges_too():
    assert parse_flags(["x", "--seeds=0-3,7"])["seeds"] == (0, 1, 2, 3, 7)


@pytest.mark.slow
def test_after_an_edit_of_a_strategy_the_fits_of_its_present_code_are_reported(tasks, tmp_path, capsys):
    """And after the edit is undone those of the first, which are not trained again."""
    file, code = tmp_path / "mine.py", "def strategy(params, context):\n    return context.fresh\n"
    flags = arguments(tasks, tmp_path / "w", strategies=("scratch", f"{file}:strategy"), seeds=(0,), steps=5)
    file.write_text(code)
    first = transfer.run(**flags)
    file.write_text(f"# A comment.\n{code}")
    second = transfer.run(**{**flags, "seeds": (0, 1)})
    assert "1 earlier fit is of other code than now" in capsys.readouterr().out
    assert (
        len(results(tmp_path / "w")) == 2 + len(first) + len(second) - 1
    )  # two sources; scratch of seed 0 is the same

    def reported():
        kept = predictions.read_study(tmp_path / "w").parts
        return sorted(row.key for part in kept for row in part.rows)

    assert reported() == sorted(line.key for line in second)
    predictions.right(predictions.read_study(tmp_path / "w").parts)
    file.write_text(code)
    third = transfer.run(**{**flags, "seeds": (0, 1)})
    assert {line.key for line in first} <= {line.key for line in third}
    assert reported() == sorted(line.key for line in third)


def test_a_family_of_one_budget_is_recorded_as_its_number_of_labels():
    digits, letters = (load(name) for name in ("omniglot_latin:labels=0-9", "omniglot_latin"))
    budgets = ("1/class", "5/class", "all")
    for text, number in (("5/class", "50"), ("all", "150"), ("10", "10"), ("area", "area"), ("budgets", "budgets")):
        assert with_family(Judging(family=text), [digits], budgets).family == number
    with pytest.raises(
        InputError, match=r"5/class is 50 labels of .* and 130 labels of .*: compare the targets one by"
    ):
        with_family(Judging(family="5/class"), [digits, letters], budgets)
    for text in ("7/class", "51"):
        with pytest.raises(InputError, match=f"--family={text} is none of --train_examples=1/class,5/class,all"):
            with_family(Judging(family=text), [digits], budgets)


@pytest.mark.slow
def test_a_report_of_fits_from_one_checkpoint_speaks_of_one_source(tasks, tmp_path):
    data = {
        "source": tasks / "digits.npz",
        "target": None,
        "strategies": None,
        "seeds": (3,),
        "workdir": tmp_path / "s",
    }
    pretrain.main(["pretrain", *command(tasks, tmp_path, **data)])
    (source,) = results(tmp_path / "s")
    flags = {"source": None, "source_checkpoint": tmp_path / "s" / source.checkpoint, "strategies": ("full",)}
    transfer.main(["transfer", *command(tasks, tmp_path, **flags)])

    def output_of(name):
        report.main(["report", f"--runs={tmp_path / 'w'}", f"--output={tmp_path / name}"])
        return (tmp_path / name / "report.md").read_text()

    assert "the verdicts speak of this one trained source" in output_of("a")
    shutil.rmtree(tmp_path / "s")  # nothing is guessed of a source that is gone
    assert "how many different sources these fits start from is not known" in output_of("b")
