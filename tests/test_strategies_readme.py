"""tljax/strategies/README.md is true: its files are strategies, and every command runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import check, transfer
from experiments.runs import process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tljax/strategies/README.md").read_text(encoding="utf-8")
GUIDE = TEXT.partition("## The masks in a training loop")[0]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
NAMES = (
    "mine.py",
    "phases.py",
    "until.py",
    "moves.py",
    "averages.py",
    "tenth.py",
    "between.py",
    "data.py",
    "factors.py",
    "thinned.py",
)
FILES = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", GUIDE, re.S), strict=True))
QUICK = ("--steps=3", "--seeds=0")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with the files as the page has them."""
    monkeypatch.chdir(tmp_path)
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, there, capsys):
    python, dash, program, *arguments = shlex.split(command)
    assert (python, dash) == ("python", "-m")
    mains = {"experiments.check": check.main, "experiments.transfer": transfer.main}
    more = () if program == "experiments.check" else QUICK
    process.run_main(mains[program], [program, *arguments, *more])
    text = capsys.readouterr()
    assert not text.err
    if program == "experiments.check":
        assert "FAILED" not in text.out and "jit equals no jit" in text.out
    else:
        assert "mine.py:strategy" in text.out


def test_every_file_is_checked_and_the_first_is_compared():
    for name in FILES:
        assert f"python -m experiments.check --strategy={name}:strategy" in COMMANDS
    assert {line.split()[2] for line in COMMANDS} == {"experiments.check", "experiments.transfer"}


def test_the_strategy_stands_in_the_report_and_its_masks_are_left(there):
    [command] = [line for line in COMMANDS if "--workdir" in line]
    transfer.main([*shlex.split(command)[2:], *QUICK])
    assert "mine.py:strategy" in (there / "runs/mine/report.html").read_text(encoding="utf-8")
    assert any("mine" in file.name for file in (there / "runs/mine/masks").iterdir())


def test_it_names_functions_that_there_are():
    from tljax import masks

    listed = re.search(r"`masks` has (.*?)\. A rule", TEXT, re.S)[1]
    assert all(hasattr(masks, name) for name in re.findall(r"`(\w+)`", listed))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with one more file in the folder of strategies, and no other line changed."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("tljax", "experiments", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    source = "\n\nSource: made up for this test.\n"
    (root / "tljax/strategies/kin.py").write_text(FILES["mine.py"].replace('."""\n', f'.{source}"""\n', 1))
    return root


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("experiments.transfer", ("--helpfull",), r"  kin +Train the biases, and the stage below the head\."),
        ("experiments.check", ("--strategy=kin",), "frozen leaves keep their bytes"),
        ("pytest", ("-m", "slow or not slow", "-k", "kin and not kind", "tests/test_strategies.py"), "7 passed"),
        ("pytest", ("-m", "slow", "-k", "kin", "tests/test_check.py"), "1 passed"),
        ("pytest", ("tests/test_readme.py", "-k", "table"), "1 passed"),
        (
            "experiments.transfer",
            ("--source=mnist_10k", "--target=fashion_mnist_10k", "--strategies=kin", "--workdir=run", *QUICK),
            "\n kin +10,000 ",
        ),
    ],
)
def test_one_file_in_the_folder_is_all_it_takes(module, arguments, expected, copy):
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(expected, done.stdout)
    if "--workdir=run" in arguments:
        assert "kin" in (copy / "run/report.html").read_text(encoding="utf-8")
