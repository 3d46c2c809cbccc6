"""Tests run on 8 virtual CPU devices, or on what JAX finds where JAX_PLATFORMS or JAX_NUM_CPU_DEVICES says so, with
implicit rank promotion an error."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# LLVM's quickest passes: what tests compile is small and runs once, and compiling it is most of their time. A
# transformer and a residual network of two blocks compile in 0.7 and 0.8 s of a core so, in 3.0 and 3.1 at level 1
# (2026-11-27). With the jaxlib at hand also one module a program in place of one a kernel. What XLA makes of a program,
# and so what is counted, stays the same. A flag that a jaxlib does not know ends the process, so other releases get the
# first alone.
QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)

# What one test compiled, the others, their processes and the other workers load: xdist's workers inherit the folder's
# name. A folder that is named already is used and kept, so that a second run compiles next to nothing.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tljax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The fonts that matplotlib finds, once for all workers and their programs: it would look for them anew wherever a test
# has a folder of its own for caches, which takes seconds.
os.environ.setdefault("MPLCONFIGDIR", os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "matplotlib"))

# Several workers and their programs share one GPU, of which a process otherwise takes three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

from experiments.runs import process  # noqa: E402

process.ask_for_determinism()  # as programs do: where there is a GPU, fits in a test have the keys of theirs
if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.default_backend() != "cpu":
    # Accelerators multiply float32 with fewer bits unless they are asked, and results are held against NumPy's.
    # Programs that tests start inherit it.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config) -> None:
    """Declare the markers of what a machine must have."""
    config.addinivalue_line("markers", "devices(count): needs so many devices, and is skipped where there are fewer")
    config.addinivalue_line("markers", "counts: holds what compilers count of a program, which those for GPUs do not")
    config.addinivalue_line("markers", "cpu: is about virtual devices of a CPU, or about a CPU's bits")


def pytest_runtest_setup(item) -> None:
    """Skip a test, with the reason, where the machine has not what its markers ask for."""
    there = len(jax.devices())
    for marker in item.iter_markers("devices"):
        if there < marker.args[0]:
            pytest.skip(f"it needs {marker.args[0]} devices, and JAX finds {there} ({jax.default_backend()})")
    if jax.default_backend() != "cpu":
        if item.get_closest_marker("counts"):
            pytest.skip(f"compilers for {jax.default_backend()} do not count FLOPs as those for CPUs")
        if item.get_closest_marker("cpu"):
            pytest.skip("it is about a CPU")


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory) -> Path:
    """Decoded data and what programs keep go to a folder of the tests' own, not to the user's."""
    folder = tmp_path_factory.mktemp("data")
    os.environ["TFDS_DATA_DIR"] = str(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return folder


def leave_out_pictures(patch: pytest.MonkeyPatch) -> None:
    """Let reports have empty pictures, until the patch is undone."""
    patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
    patch.setattr("experiments.pages.figures.pdf", lambda figure: b"")


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Reports without drawing their pictures, which takes longer than the runs of these tests; test_report.py draws."""
    leave_out_pictures(monkeypatch)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder of small tasks: digits.npz, clothes.npz, and same.npz with the classes of the digits."""
    from test_programs import write_task

    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "digits.npz", 0, 4)
    write_task(folder / "clothes.npz", 1, 3, ["shirt", "coat", "bag"])
    write_task(folder / "same.npz", 2, 4)
    return folder


@pytest.fixture(scope="session")
def even_tasks(tmp_path_factory) -> Path:
    """A folder of two small tasks of four classes each, whose models have the same shapes: digits.npz, clothes.npz."""
    from test_programs import write_task

    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "digits.npz", 0, 4)
    write_task(folder / "clothes.npz", 1, 4, ["shirt", "coat", "bag", "shoe"])
    return folder


@pytest.fixture(scope="session")
def finished(tasks, tmp_path_factory) -> tuple[Path, list[dict]]:
    """(run directory, lines of results) of a run on them; tests leave it as it is."""
    from test_programs import arguments

    from experiments import transfer

    workdir = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        return workdir, transfer.run(**arguments(tasks, workdir, weight_decay=0.01, clip=1.0))


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of that run directory, for tests that change it."""
    shutil.copytree(finished[0], tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture(scope="session")
def complete_data() -> Path:
    """The folder of the complete data sets, as `--manual_dir` takes it."""
    folder = os.environ.get("TLJAX_COMPLETE_DATA")
    if not folder:
        pytest.skip("TLJAX_COMPLETE_DATA names no folder with the complete mnist/ and fashion_mnist/")
    return Path(folder)
