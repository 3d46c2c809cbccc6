"""Tests run on 8 virtual CPU devices, with implicit rank promotion an error."""

import os
from pathlib import Path

# LLVM's quick passes: half the time to compile. What XLA makes of a program, and so what is counted, stays the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory) -> Path:
    """Decoded data and compiled programs go to a folder of the tests' own, not to the user's."""
    folder = tmp_path_factory.mktemp("data")
    os.environ["TFDS_DATA_DIR"] = str(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return folder


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Reports without drawing their pictures, which takes longer than the runs of these tests; test_report.py draws."""
    monkeypatch.setattr("tljax.study.drawing.svg", lambda figure: "data:image/svg+xml;base64,")
    monkeypatch.setattr("tljax.study.drawing.pdf", lambda figure: b"")


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
        patch.setattr("tljax.study.drawing.svg", lambda figure: "data:image/svg+xml;base64,")
        return workdir, transfer.run(**arguments(tasks, workdir, weight_decay=0.01, clip=1.0))


@pytest.fixture(scope="session")
def complete_data() -> Path:
    """The folder of the complete data sets, as `--manual_dir` takes it."""
    folder = os.environ.get("TLJAX_COMPLETE_DATA")
    if not folder:
        pytest.skip("TLJAX_COMPLETE_DATA names no folder with the complete mnist/ and fashion_mnist/")
    return Path(folder)
