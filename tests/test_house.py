"""The house: imports run one way and stay light, files stay small, help is quick."""

import ast
import re
import resource
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "tljax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])

ROWS = re.findall(
    r"^\| (\d) \| `([\w.]+)` \|.*\|(.*)\|$", (ROOT / "tljax" / "README.md").read_text(encoding="utf-8"), re.M
)
FLOORS = {name: int(floor) for floor, name, _ in ROWS}
WITHIN_FLOOR = {(name, other) for _, name, arrow in ROWS for other in re.findall(r"`([\w.]+)`", arrow)}


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
    own = room(module(file))
    for other in {room(name) for name in imported(file)} - {own, "tljax", "tljax.__version__"}:
        assert other in FLOORS, f"{module(file)} imports {other}, which has no floor"
        assert FLOORS[other] < FLOORS[own] or (own, other) in WITHIN_FLOOR, f"{module(file)} imports {other}"


def test_no_files_import_each_other_however_far_around():
    modules = {module(file) for file in FILES}
    graph = {}
    for file in FILES:
        names = (name if name in modules else name.rpartition(".")[0] for name in imported(file))
        # A room's own files come before the room, which offers what they have.
        graph[module(file)] = {name for name in names if not module(file).startswith(f"{name}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert sum(map(len, graph.values())) > 400


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


@pytest.mark.parametrize("file", FILES, ids=module)
def test_every_public_name_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file}:{node.lineno} {node.name}"
