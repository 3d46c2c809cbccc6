"""Many processes, one run: two on this machine give what one gives, and when one is lost the other says so and ends."""

import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import leave_out_pictures
from test_programs import arguments, command, parameters
from test_resume import Killed, killed_after

from experiments import pretrain, search, transfer
from experiments.runs import directory, process, settings
from experiments.runs.settings import Settings, parse_flags
from tljax import train
from tljax.types import InputError

ROOT = Path(__file__).parent.parent
STRATEGIES = ("scratch", "full", "head_only", "lp_ft")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def source(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "w"
    pretrain.run(**arguments(tasks, folder, target=None, strategies=None))
    return folder


def started(flags, count=2, program="transfer"):
    """The processes of one run, on this machine, with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster_flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", "--distributed", "--heartbeat=10"]
    call = [sys.executable, "-u", "-m", f"experiments.{program}", *flags, *cluster_flags, "--devices=4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [subprocess.Popen([*call, f"--process_id={i}"], **pipes) for i in range(count)]


def ended(running, seconds=300):
    """(exit code, what it printed, what it complained of) of each."""
    try:
        streams = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, streams, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "mesh", "seeds", "strategies"),
    [
        (100, "data:8", (0,), STRATEGIES),
        (101, "data:8", (0,), ("scratch", "head_only")),
        (101, "data:2,trial:4", (0, 1), ("scratch", "head_only")),
    ],
)
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_two_processes_give_what_one_gives(batch, mesh, seeds, strategies, tasks, source, tmp_path):
    """50 steps of clipped Adam; eight devices, four in each process; the seeds do not fill the axis of trials."""
    flags = {"source": None, "source_checkpoint": str(source), "strategies": strategies, "optimizer": "adam"}
    flags |= {"clip": 0.5, "steps": 50, "batch_size": batch, "learning_rate": 0.01, "seeds": seeds}
    there = ended(started(command(tasks, tmp_path, **flags, workdir=tmp_path / "two", mesh=mesh)))
    assert [code for code, _, _ in there] == [0, 0], there
    assert "head_only" in there[0][1] and there[1][1].count("\n") == there[1][1].count("[Gloo]")
    here = transfer.run(**arguments(tasks, tmp_path / "one", **flags, devices=1))
    lines = directory.finished(tmp_path / "two")
    assert len(here) == len(lines) == len(strategies) * len(seeds)
    for line in here:
        other = parameters(tmp_path / "two", lines[line.key])
        for path, leaf in parameters(tmp_path / "one", line).items():
            np.testing.assert_allclose(other[path], leaf, rtol=1e-5, atol=1e-5)
        assert lines[line.key].test_loss == pytest.approx(line.test_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_when_one_process_is_lost_the_other_says_so_and_the_same_command_goes_on(lost, tasks, tmp_path):
    flags = command(tasks, tmp_path, strategies=("full",), steps=300, seeds=(0,))
    running = started(flags)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "w" / "checkpoints").glob("pretrain-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    running[lost].kill()
    left = running[1 - lost]
    began = time.monotonic()
    _, complaint = left.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert left.returncode == 1 and complaint.strip().splitlines()[-1].startswith(f"error: {process.LOST}")
    running[lost].communicate()
    there = ended(started(flags))
    assert [code for code, _, _ in there] == [0, 0], there
    assert [line.strategy for line in directory.results(tmp_path / "w")] == ["pretrain", "scratch", "full"]


HALF_TRAINED = {"source": None, "strategies": ("scratch",), "seeds": (0,), "optimizer": "adam", "clip": 0.5}
HALF_TRAINED |= {"epochs": None, "steps": 1200, "learning_rate": 1e-4, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def undisturbed(tasks, tmp_path_factory):
    """The parameters of a run on one device that ends without being disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "w"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        [line] = transfer.run(**arguments(tasks, folder, **HALF_TRAINED, devices=1))
    return parameters(folder, line)


ON = {"one device": {"devices": 1}, "eight devices": {"mesh": ("data:8",)}, "two processes": {}}


def begin(on, flags, tasks, tmp_path, monkeypatch):
    """Leave a run half trained."""
    if on == "two processes":
        running = started(command(tasks, tmp_path, **flags))
        while not list((tmp_path / "w" / "progress").glob("*/00000001")):
            time.sleep(0.05)
        for process in running:
            process.terminate()
        assert [code for code, _, _ in ended(running)] == [143, 143]
        return
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(4, patch)
        transfer.run(**arguments(tasks, tmp_path / "w", **flags, **ON[on]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [("two processes", "one device"), ("two processes", "eight devices"), ("one device", "two processes")],
)
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_what_some_devices_saved_others_finish(first, then, undisturbed, tasks, tmp_path, monkeypatch, capsys):
    flags = HALF_TRAINED
    begin(first, flags, tasks, tmp_path, monkeypatch)
    assert list((tmp_path / "w" / "progress").glob("*/0000000*"))
    capsys.readouterr()
    if then == "two processes":
        [(code, output, _), (other, _, _)] = ended(started(command(tasks, tmp_path, **flags)))
        assert code == other == 0
    else:
        transfer.run(**arguments(tasks, tmp_path / "w", **flags, **ON[then]))
        output = capsys.readouterr().out
    assert "goes on from step" in output
    [line] = directory.results(tmp_path / "w")
    for path, leaf in undisturbed.items():
        np.testing.assert_allclose(parameters(tmp_path / "w", line)[path], leaf, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_what_the_first_process_refuses_ends_the_others(tasks, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "other").touch()
    first, second = ended(started(command(tasks, tmp_path, seeds=(0,))))
    assert first[0] == second[0] == 1
    assert "holds other files and no run" in first[2] and process.LOST in second[2]


def range_flags(tasks, folder, *more, **flags):
    values = {"strategies": ("head_only",), "seeds": (0,), "steps": 20, "epochs": None} | flags
    return [*command(tasks, folder, **values), "--lr_range_test", *more]


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_a_range_test_on_two_processes_says_what_one_says(tasks, tmp_path, capsys):
    """The first holds the run directory for both, and writes; neither trains a trial."""
    there = ended(started(range_flags(tasks, tmp_path / "two"), program="search"))
    assert [code for code, _, _ in there] == [0, 0], there
    assert there[1][1].count("\n") == there[1][1].count("[Gloo]")
    search.main(["search", *range_flags(tasks, tmp_path / "one", devices=1)])
    here = capsys.readouterr().out
    [two, alone] = (re.search(r"suggested: --learning_rate=(\S+),", output)[1] for output in (there[0][1], here))
    assert float(two) == pytest.approx(float(alone), rel=1e-2)
    for folder in (tmp_path / "two" / "w", tmp_path / "one" / "w"):
        assert (folder / "lr_range_test.html").is_file() and not (folder / ".lock").read_text(encoding="utf-8")
        assert not (folder / "study.journal").exists()


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_a_range_test_on_two_processes_is_refused_a_run_directory_that_is_in_use(tasks, tmp_path):
    """By the rule of every program: the first process says who has it, the other that it lost the first."""
    flags = range_flags(tasks, tmp_path)
    (tmp_path / "w").mkdir()
    with process.locked(tmp_path / "w"):
        first, second = ended(started(flags, program="search"), seconds=120)
    assert first[0] == second[0] == 1
    assert "is in use by process" in first[2] and "Traceback" not in first[2] + second[2]
    assert second[2].strip().splitlines()[-1].startswith(f"error: {process.LOST}")


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.cpu
def test_a_search_on_two_processes_is_refused_by_both_at_once_and_its_advice_works(tasks, tmp_path):
    """Processes of a search share a storage, each in a run directory of its own: no one waits for another."""
    space = ["--space=learning_rate:log:1e-3:1", "--trials=4", "--group=1"]
    values = {"strategies": ("head_only",), "seeds": (0,), "epochs": None, "steps": 20}
    began = time.monotonic()
    refused = ended(started([*command(tasks, tmp_path, **values), *space], program="search"), seconds=120)
    assert time.monotonic() - began < 60
    for code, output, complaint in refused:
        assert code == 1 and "Traceback" not in complaint and output == ""
        assert complaint.startswith("error: --distributed: processes of a search") and complaint.count("\n") == 1
    assert not (tmp_path / "w").exists()
    call = [
        sys.executable,
        "-m",
        "experiments.search",
        *space,
        f"--storage={tmp_path / 'study.journal'}",
        "--devices=1",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    flags = [command(tasks, tmp_path, **values, workdir=tmp_path / name) for name in ("a", "b")]
    done = ended([subprocess.Popen([*call, *process_flags], **pipes) for process_flags in flags])
    assert [code for code, _, _ in done] == [0, 0], done
    assert all("tuned against tuned" in output for _, output, _ in done)
    best = [(tmp_path / name / "best.flags").read_text(encoding="utf-8") for name in ("a", "b")]
    rates = [re.search(r"(?m)^--learning_rate=(.*)$", text)[1] for text in best]
    assert rates[0] == rates[1]


def test_one_process_loads_all_rows():
    rows = np.arange(10, dtype=np.uint8).reshape(5, 2)
    np.testing.assert_array_equal(train.load(rows).inputs, rows[None])


BAD = [
    ({"parallel": "pmpa"}, "--parallel=pmpa"),
    ({"mesh": ("data:x",)}, "--mesh=data:x: write its axes once each with their sizes, such as data:4,trial:2"),
    ({"mesh": ("data:0",)}, "--mesh=data:0: write its axes"),
    ({"mesh": ("batch:4",)}, "--mesh=batch:4: write its axes"),
    ({"mesh": ("data:20000",)}, "--mesh=data:20000: it has 20,000 devices, at most 1,024"),
    ({"mesh": ("data:1000000", "trial:1000000")}, "--mesh=data:1000000,trial:1000000: it has 1,000,000,000,000 dev"),
    ({"mesh": ("data:2", "data:4")}, "--mesh=data:2,data:4: write its axes once each"),
    ({"mesh": ("data:4", "trial:2"), "devices": 4}, "--mesh=data:4,trial:2 has 8 devices and --devices=4"),
    ({"mesh": ("data:4", "trial:4")}, f"--mesh=data:4,trial:4: there are {len(jax.devices())}"),
    ({"mesh": ("data:4", "trial:2"), "parallel": "pmap"}, "--parallel=pmap trains one fit at a time"),
    ({"distributed": True, "parallel": "pmap"}, "--parallel=pmap is for one process"),
    ({"coordinator": "here:1"}, "--coordinator is given without --distributed: add it"),
    ({"distributed": True, "process_id": 0}, "--process_id is given and --coordinator is not"),
    ({"heartbeat": 0}, "--heartbeat=0: give 1 second or more"),
    *(
        ({"distributed": True, "coordinator": at, "num_processes": count, "process_id": own}, message)
        for at, count, own, message in (
            ("here", 2, 0, "--coordinator=here: write HOST:PORT"),
            ("here:99999", 2, 0, "--coordinator=here:99999: write HOST:PORT"),
            ("here:1234", 0, 0, "--num_processes=0: give 1 or more"),
            ("here:1234", 2, 2, "--process_id=2: of 2 processes the ids are 0 to 1"),
        )
    ),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_flags_that_cannot_be_are_one_line(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        process.prepare(Settings.from_flags(**flags))


def test_processes_are_not_of_the_run():
    """Nothing of them in the flags that reproduce it."""
    cluster_settings = Settings.from_flags(
        distributed=True, coordinator="here:1", num_processes=2, process_id=1, mesh=("data:8",)
    )
    text = "\n".join(cluster_settings.flagfile_lines())
    assert not any(name in text for name in settings._LOCAL) and "--mesh=data:8" in text


@pytest.mark.slow
def test_another_mesh_is_the_same_run(tasks, tmp_path):
    """A finished fit is not trained again for it, and is what it would be but for rounding."""
    flags = {"source": None, "strategies": ("scratch",), "seeds": (0,)}
    [line] = transfer.run(**arguments(tasks, tmp_path / "w", **flags, devices=1))
    [same] = transfer.run(**arguments(tasks, tmp_path / "w", **flags, parallel="pmap"))
    assert same == line
    [other] = transfer.run(**arguments(tasks, tmp_path / "v", **flags, parallel="pmap"))
    assert other.test_loss == pytest.approx(line.test_loss, rel=1e-5)


@pytest.mark.parametrize("file", sorted((ROOT / "experiments" / "cluster").iterdir()), ids=lambda file: file.name)
def test_the_commands_for_clusters_have_flags_that_there_are(file):
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    [call] = re.findall(r"python -m experiments\.transfer ([^\n]*)", text)
    flags = [re.sub(r"\$\{?\w+\}?", "x", flag) for flag in shlex.split(call)]
    flags = [flag.replace("--flagfile=", f"--flagfile={ROOT}/") for flag in flags]
    values = parse_flags(["transfer", *flags])
    assert values["distributed"] and Settings.from_flags(**values).workdir


@pytest.mark.parametrize(("taken", "most", "kept"), [(60, 100, 0), (40, 100, 1), (60, float("inf"), 1)])
def test_compiled_programs_are_dropped_before_they_take_all_mappings_of_memory(taken, most, kept, monkeypatch):
    """Some thousand programs in one process would end it with a segmentation fault."""
    program = jax.jit(lambda x: x + 1)
    program(1.0)
    monkeypatch.setattr(process, "_mappings", lambda: (taken, most))
    process.release_programs()
    assert program._cache_size() == kept


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no Linux")
def test_a_program_that_is_compiled_takes_mappings_and_a_dropped_one_gives_them_back():
    programs = [jax.jit(lambda x, k=k: jax.numpy.tanh(x @ x) * k) for k in range(20)]
    before = process._mappings()
    for program in programs:
        program(np.ones((64, 64), np.float32))
    after = process._mappings()
    jax.clear_caches()
    dropped = process._mappings()
    assert before[1] == after[1] > 1000 and before[0] + 20 <= after[0] and dropped[0] <= after[0] - 20
