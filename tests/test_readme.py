"""The README is true: every command and every piece of code in it runs."""

import re
import shlex
from pathlib import Path

import pytest

from experiments import check, compare, features, pretrain, rank, report, search, transfer, zoo

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.S)
QUICK = ("--seeds=0", "--steps=3")


def test_the_first_two_commands_make_their_environment_and_ci_runs_them():
    made = [line for line in COMMANDS if line.startswith("python3 -m venv")]
    assert made == COMMANDS[:2] and len(made) == 2
    assert "experiments.transfer" in made[0] and "pytest" in made[1]
    assert "grep '^python3 -m venv' README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_other_commands_run(tmp_path, monkeypatch, capsys):
    """All but the one on the complete data, which test_reference.py runs; three steps of one seed each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "mine.py").write_text(CODE[0])
    programs = {
        f"experiments.{program.__name__.split('.')[-1]}": program.main
        for program in (check, compare, features, pretrain, rank, report, search, transfer, zoo)
    }
    ran = 0
    for line in COMMANDS[2:]:
        python, dash, program, *arguments = shlex.split(line)
        assert (python, dash) == ("python", "-m")
        if "--manual_dir=DIR" in arguments:
            continue
        if "--results=theirs.csv" in arguments:
            exec(CODE[1].replace("range(5)", "range(2)").replace("[:200]", "[:60]"), {})
        quick = () if "--helpfull" in arguments or program.endswith(("check", "features", "report")) else QUICK
        fewer = ("--trials=2", "--strategies=head_only") if program.endswith("search") else ()
        enough = ("--steps=10",) if "--lr_range_test" in arguments else ()
        programs[program]([program, *arguments, *quick, *fewer, *enough])
        ran += 1
    assert ran == 15
    assert "mine.py:strategy" in capsys.readouterr().out


def test_the_strategy_is_one_of_ten_lines():
    assert len([line for line in CODE[0].splitlines() if line.strip()]) <= 10


def test_the_loop_of_ones_own_trains_the_head_alone():
    scope: dict = {}
    exec(CODE[2], scope)
    assert (scope["params"]["body"]["kernel"] == 1).all()
    assert (scope["params"]["head"]["kernel"] != 1).all()


@pytest.mark.parametrize("file", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_links_lead_somewhere(file):
    assert (ROOT / file).exists()


def test_the_table_names_strategies_that_there_are():
    from experiments import helps

    named = {name.split(":")[0] for name in re.findall(r"^\| `([^`]+)` \|", TEXT, re.M)}
    assert len(named) > 15 and named <= set(helps.strategies())
