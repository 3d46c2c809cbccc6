"""How what people have is spelt: paths with the signs of the grammar, marks of editors, headings of tables."""

import csv
import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save
from test_programs import arguments, command, results, write_task

from experiments import report, transfer
from experiments.runs import plan, process, sources
from experiments.runs.settings import Settings, parse_flags
from tljax import data, plugins, weights
from tljax.study import space
from tljax.types import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")

NAMES = ("a:b", "a=b", "a,b", "a[1", "a[1:2]", "a b", "k=a:b,c")


@pytest.mark.parametrize("name", NAMES)
def test_any_path_can_be_written_in_quotes(name, tasks, tmp_path):
    """As data, a folder, a file of a strategy, with a name and without, in a list, and with changes after it."""
    from PIL import Image

    folder = tmp_path / name
    folder.mkdir()
    write_task(folder / "data.npz", 1, 3)
    for split in ("train", "test"):
        for kind in range(2):
            (folder / split / str(kind)).mkdir(parents=True)
            Image.fromarray(np.full((6, 6), 100 * kind, np.uint8)).save(folder / split / str(kind) / "0.png")
    task = data.load(f'"{folder}/data.npz":labels=0-1')
    assert task.classes == ("0", "1")
    assert data.load(f'folder:"{folder}":invert').classes == ("0", "1")
    file = folder / "mine.py"
    file.write_text(
        "from tljax import masks\n\ndef strategy(params, context, *, k: int = 1):\n"
        "    return masks.by_path(params, bool)\n"
    )
    spec = f'"{file}":strategy:k=2'
    assert plugins.split(f"full,LN={spec},{spec},scratch", ",") == ["full", f"LN={spec}", spec, "scratch"]
    assert plugins.method(spec)[1] == {"k": 2} and plugins.named(spec) == ("", spec)
    assert plugins.named(f"LN={spec}") == ("LN", spec)
    label = plan.read_strategy(spec).label
    assert plugins.method(label)[1] == {"k": 2}, "a label is a spec too"
    of_space = space.applied({"strategies": (f"LN={spec}",)}, {"strategy.LN.k": 3})["strategies"]
    assert plugins.method(of_space[0])[1] == {"k": 3}


@pytest.mark.slow
def test_a_run_of_quoted_paths_is_given_again_by_its_flags(tasks, tmp_path):
    folder = tmp_path / "a:b,c"
    folder.mkdir()
    write_task(folder / "data.npz", 1, 3)
    (folder / "mine.py").write_text("from tljax.strategies.full import strategy  # noqa\n")
    spec = f'"{folder}/mine.py":strategy'
    flags = command(tasks, tmp_path, target=f'"{folder}/data.npz"', strategies=("full", spec), steps=4, points=1)
    transfer.main(["transfer", *flags, "--seeds=0"])
    transfer.main(["transfer", f"--flagfile={tmp_path / 'w' / 'flags.flags'}", f"--workdir={tmp_path / 'again'}"])
    assert results(tmp_path / "w") == results(tmp_path / "again")
    assert {line.strategy for line in results(tmp_path / "w")} == {"pretrain", "scratch", "full", spec}


@pytest.mark.parametrize("text", ['"a', 'a"b', 'k="a', '""', 'x:"'])
def test_a_quote_that_nothing_closes_is_a_character(text):
    assert plugins.split(f"{text},b", ",") == [text, "b"]


def test_a_path_that_is_cut_is_told_how_to_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    Path("a:b/mine.py").touch()
    for load in (lambda: data.load("folder:a:b"), lambda: plugins.method("a:b/mine.py:strategy")):
        with pytest.raises(InputError, match="a path with a ':' stands in double quotes: \"a:b"):
            load()
    with pytest.raises(InputError, match="a path with a '=' stands in double quotes"):
        data.load("folder:a=b")


def test_paths_of_a_flagfile_may_stand_in_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f/a:b").mkdir(parents=True)
    Path("f/a:b/x,y.npz").touch()
    Path("f/my.flags").write_text('--target="a:b/x,y.npz"\n--source=folder:"a:b":invert\n')
    read = parse_flags(["x", "--flagfile=f/my.flags"])
    assert read["target"] == '"f/a:b/x,y.npz"'


def test_names_of_arrays_may_hold_a_colon():
    """As Keras writes them."""
    rules = [weights.rule('"dense/kernel:0":to="head/kernel":transpose')]
    like = {"head": {"kernel": np.zeros((3, 2), np.float32)}}
    assert weights.grafted({"dense/kernel:0": np.ones((2, 3), np.float32)}, rules, like)["head"]["kernel"].shape == (
        3,
        2,
    )


def test_a_type_that_numpy_has_not_is_named(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(save({"a": np.ones(2, ml_dtypes.float8_e4m3fn), "b": np.ones(2, ml_dtypes.float8_e8m0fnu)}))
    arrays = weights.read(file)
    assert arrays["a"].astype(np.float32).tolist() == [1, 1]
    with pytest.raises(InputError, match="holds 'b' as F8_E8M0, a type that NumPy has not: save it as float32"):
        arrays["b"]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "text", [b"--seeds=3\n", b"# of an editor\n--seeds=3\n", b"\n--seeds=3\n", b"// x\r\n--seeds=3\r\n"]
)
def test_a_flagfile_may_begin_with_a_byte_order_mark(text, tmp_path):
    (tmp_path / "inner.flags").write_bytes(MARK + text)
    (tmp_path / "outer.flags").write_bytes(MARK + f"--flagfile={tmp_path / 'inner.flags'}\n".encode())
    for name in ("inner", "outer"):
        assert parse_flags(["transfer", f"--flagfile={tmp_path / name}.flags"])["seeds"] == (3,)


def test_a_flagfile_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "wide.flags").write_bytes("--seeds=3\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"wide.flags' is in UTF-16: save it as UTF-8"):
        parse_flags(["transfer", f"--flagfile={tmp_path / 'wide.flags'}"])


def test_a_card_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "w.npz").touch()
    about = {"task": "mnist", "classes": ["0", "1"], "shape": [6, 6, 1]}
    (tmp_path / "w.npz.json").write_bytes(MARK + json.dumps(about).encode())
    assert sources.weights_card(tmp_path / "w.npz")["task"] == "mnist"


def fits_made_elsewhere(folder, headings=("name", "target", "strategy", "seed", "train_examples"), delimiter=","):
    """A table of six fits and a file of predictions each, in a folder."""
    folder.mkdir()
    draw, labels = np.random.default_rng(0), np.arange(60) % 3
    with open(folder / "t.csv", "w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(headings)
        for strategy in ("scratch", "full"):
            for seed in range(3):
                table.writerow([f"{strategy}{seed}", "t", strategy, seed, 100])
                predicted = np.where(draw.random(60) < 0.7, labels, 0)
                np.savez(folder / f"{strategy}{seed}.npz", predicted=predicted, labels=labels)
    return ["report", f"--results={folder}/t.csv", f"--predictions={folder}/*.npz", f"--output={folder}/page"]


@pytest.mark.parametrize("name", ["run[1]", "a[b", "x*y", "?"])
def test_predictions_lie_in_folders_of_any_name(name, tmp_path):
    report.main(fits_made_elsewhere(tmp_path / name))
    assert (tmp_path / name / "page" / "report.html").is_file()


@pytest.mark.parametrize(
    ("how", "there"),
    [
        ({"delimiter": ";"}, "'name;target;strategy;seed;train_examples'"),
        ({"delimiter": "\t"}, r"'name\ttarget\tstrategy\tseed\ttrain_examples'"),
        ({"headings": ("run", "set", "strategy", "seed", "n")}, "'run', 'set', 'strategy', 'seed', 'n'"),
    ],
)
def test_a_table_without_the_columns_needed_is_told_those_it_has(how, there, tmp_path):
    with pytest.raises(InputError) as refused:
        report.main(fits_made_elsewhere(tmp_path / "of", **how))
    assert "t.csv' has no column name: " in str(refused.value) and f"the table has: {there}" in str(refused.value)


def test_what_becomes_of_the_head_is_known_without_a_draw(tasks, tmp_path, monkeypatch):
    """So that an evaluation needs none to know whether the start has a head to judge."""
    monkeypatch.setattr("tljax.models.init", lambda *_, **__: pytest.fail("it draws"))
    for target, head, expected in (("same", "auto", True), ("clothes", "auto", False), ("same", "fresh", False)):
        settings = Settings.from_flags(
            **arguments(tasks, tmp_path / "w", target=str(tasks / f"{target}.npz"), head=head)
        )
        head_is_copied = plan.head_of(settings, data.load(settings.source), data.load(settings.target)) == "copy"
        assert head_is_copied == expected


def test_many_seeds_are_read_at_once_and_more_are_told_how_many_may_be():
    """Looking for seeds given twice took as the square of their number: minutes for 100,000."""
    began = time.monotonic()
    assert len(Settings.from_flags(seeds=tuple(range(100_000))).seeds) == 100_000
    assert time.monotonic() - began < 10
    with pytest.raises(InputError, match="or as 0-29, at most 100,000 of them"):
        parse_flags(["transfer", "--seeds=0-100000"])


def test_a_run_directory_is_opened_by_the_first_of_several_processes_alone():
    """Every program opens it through `directory.opened`, a search and its range test too; a card's folder is none."""
    files = Path(process.__file__).parent.parent.rglob("*.py")
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    openers = {file.name for file, text in texts.items() if "process.locked(" in text}
    assert openers == {"directory.py", "card.py"}
    assert len([file for file, text in texts.items() if "directory.opened(" in text]) > 5
