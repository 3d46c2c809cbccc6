"""Tests run on 8 virtual CPU devices, with implicit rank promotion an error."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# LLVM's quick passes, and with the jaxlib at hand one module a program in place of one a kernel: half the time to
# compile (2026-11-23). What XLA makes of a program, and so what is counted, stays the same. A flag that a jaxlib does
# not know ends the process, so other releases get the first alone.
QUICK = "--xla_backend_optimization_level=1"
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

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory) -> Path:
    """Decoded data and what programs keep go to a folder of the tests' own, not to the user's."""
    folder = tmp_path_factory.mktemp("data")
    os.environ["TFDS_DATA_DIR"] = str(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return folder


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Reports without drawing their pictures, which takes longer than the runs of these tests; test_report.py draws."""
    monkeypatch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
    monkeypatch.setattr("experiments.pages.figures.pdf", lambda figure: b"")


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
def finished(tasks, tmp_path_factory) -> tuple[Path, list[dict]]:
    """(run directory, lines of results) of a run on them; tests leave it as it is."""
    from test_programs import arguments

    from experiments import transfer

    workdir = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pages.figures.svg", lambda figure: "data:image/svg+xml;base64,")
        return workdir, transfer.run(**arguments(tasks, workdir, weight_decay=0.01, clip=1.0))


@pytest.fixture(scope="session")
def complete_data() -> Path:
    """The folder of the complete data sets, as `--manual_dir` takes it."""
    folder = os.environ.get("TLJAX_COMPLETE_DATA")
    if not folder:
        pytest.skip("TLJAX_COMPLETE_DATA names no folder with the complete mnist/ and fashion_mnist/")
    return Path(folder)
