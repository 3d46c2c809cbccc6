"""The house: imports run one way and stay light, files stay small, help is quick."""

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import experiments

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "tljax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])

ROWS = re.findall(
    r"^\| (\d) \| `([\w.]+)` \|.*\|(.*)\|$", (ROOT / "tljax" / "README.md").read_text(encoding="utf-8"), re.M
)
FLOORS = {name: int(floor) for floor, name, _ in ROWS}
WITHIN_FLOOR = {(name, other) for _, name, arrow in ROWS for other in re.findall(r"`([\w.]+)`", arrow)}

BARE = {"tljax", "tljax.__version__", "experiments.INSTALL"}
"""Words of a package itself, which a file below it may import."""


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    return next((known for known in FLOORS if name == known or name.startswith(known + ".")), name)


def imported(file: Path) -> set[str]:
    """What a file imports of the house, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("tljax", "experiments")}


@pytest.mark.parametrize("file", [f for f in FILES if module(f) != "tljax"], ids=module)
def test_a_file_imports_lower_floors_or_its_own_room(file):
    own_room = room(module(file))
    for other in {room(name) for name in imported(file) - BARE} - {own_room}:
        assert other in FLOORS, f"{module(file)} imports {other}, which has no floor"
        assert FLOORS[other] < FLOORS[own_room] or (own_room, other) in WITHIN_FLOOR, f"{module(file)} imports {other}"


def test_no_files_import_each_other_however_far_around():
    modules = {module(file) for file in FILES}
    graph = {}
    for file in FILES:
        names = (name if name in modules else name.rpartition(".")[0] for name in imported(file))
        # A room's own files come before the room, which offers what they have.
        graph[module(file)] = {name for name in names if not module(file).startswith(f"{name}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert sum(map(len, graph.values())) > 400


def test_no_program_is_imported():
    """A program is flags and a `run`; what others need of it is in experiments/runs or experiments/pages."""
    programs = {module(file) for file in (ROOT / "experiments").glob("*.py")} - {"experiments", "experiments.__main__"}
    for file in FILES:
        for name in imported(file):
            parts = ".".join(name.split(".")[:2])
            assert parts not in programs, f"{module(file)} imports {parts}, which is a program"


def test_every_room_has_a_floor():
    assert {room(module(file)) for file in FILES} - {"tljax"} == set(FLOORS)


def test_importing_tljax_loads_nothing_heavy():
    code = "import sys, tljax; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in (
        "tensorflow_datasets",
        "orbax",
        "optuna",
        "matplotlib",
        "flax",
        "scipy.stats",
        "sklearn",
        "tensorboardX",
        "rich",
    ):
        assert f"'{heavy}'" not in loaded


IMPORTED_AS = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn", "pillow": "PIL", "absl-py": "absl"}
"""Where a package's name is not that of its module."""
CARRIED = {"absl-py", "orbax-checkpoint", "rich", "scipy"}
"""What jax, optax and flax bring with them."""
ALONE = """
import importlib, pkgutil, runpy, sys

for name in {hidden}:
    sys.modules[name] = None
import tljax

lacking = []
for module in pkgutil.walk_packages(tljax.__path__, "tljax."):
    try:
        importlib.import_module(module.name)
    except ImportError:
        lacking.append(module.name)
print(*lacking)
runpy.run_module("experiments.own_loop", run_name="__main__")
"""


def packages(extra: str) -> set[str]:
    """The names of the packages of an extra."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        needs = tomllib.load(file)["project"]["optional-dependencies"][extra]
    return {re.match(r"[\w-]+", need)[0] for need in needs} - {"tljax"}


@pytest.mark.slow
def test_the_core_needs_no_more_than_its_dependencies():
    """What only data sets by name and programs need is hidden; the study of scores and searches lacks it, and says so
    when it is imported."""
    others = packages("experiments") | packages("data")
    assert others >= CARRIED
    hidden = [IMPORTED_AS.get(name, name.replace("-", "_")) for name in sorted(others - CARRIED)]
    done = subprocess.run([sys.executable, "-c", ALONE.format(hidden=hidden)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[0].split()) == {"tljax.study.journal", "tljax.study.transferability"}


def test_a_program_without_its_parts_says_what_to_install(tmp_path):
    (tmp_path / "absl.py").write_text("raise ModuleNotFoundError(\"No module named 'absl'\")")
    command = [sys.executable, "-m", "experiments.export", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No module named 'absl'") and "pip install 'tljax[experiments]'" in done.stderr


def test_a_program_misses_what_it_needs_in_the_end_before_it_begins():
    code = f"""import sys
sys.modules["matplotlib"] = sys.modules["optuna"] = None
import experiments
experiments.run_program({str(ROOT / "experiments" / "transfer.py")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: there is no matplotlib, optuna: install it with python -m pip install 'tljax")
    assert {IMPORTED_AS.get(name, name.replace("-", "_")) for name in packages("experiments")} == {*experiments._PARTS}


def test_importing_programs_changes_nothing_of_the_process():
    """Hooks, handlers and loggers are those of before: only a program that runs sets its own."""
    code = """
import gc, logging, signal, sys
import jax, optax
from absl import logging as absl_logging

def state():
    loggers = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    streams = sys.stdout, sys.stderr
    return sys.excepthook, sys.unraisablehook, gc.get_threshold(), loggers, handlers, streams, [*sys.path]

before = state()
sys.argv[:] = ["-m"]
import experiments.transfer, experiments.search, experiments.report, experiments.predict
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_tljax_takes_little_more_than_jax_and_optax():
    """At most 0.3 s of the processor, whatever else the machine is doing."""
    code = "import jax, optax, time; start = time.process_time(); import tljax; print(time.process_time() - start)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(3)
    ]
    assert min(seconds) <= 0.3


def test_helpfull_answers_within_3_seconds():
    """Of the processor, whatever else the machine is doing."""
    took = []
    for _ in range(2):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "experiments.transfer", "--helpfull"], cwd=ROOT, capture_output=True, check=True
        )
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert min(took) <= 3


def test_the_library_knows_no_flag():
    """Errors name an argument as their field or in backquotes; programs write it as a flag. Scripts have flags too."""
    strategies = ROOT / "tljax" / "strategies"  # their bytes are in the keys of fits
    for file in FILES:
        if module(file).startswith("tljax.") and file.name not in ("cut.py", "gather.py") and file.parent != strategies:
            texts = [
                node.value
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant)
            ]
            flags = [text for text in texts if isinstance(text, str) and re.search(r"(?<![\w-])--\w", text)]
            assert not flags, f"{module(file)} speaks of flags: {flags}"


@pytest.mark.parametrize("file", FILES, ids=module)
def test_every_public_name_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file}:{node.lineno} {node.name}"
