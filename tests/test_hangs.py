"""A user never sees a traceback for what he did, and never waits for nothing."""

import contextlib
import errno
import io
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from test_programs import arguments, command

from experiments import transfer
from experiments.runs import console, directory, metrics, predictions, process, sources
from experiments.runs.settings import Settings, parse_flags
from tljax import checkpoint, data, files, npz, switches, weights
from tljax.data import idx, unlabelled
from tljax.types import InputError

ROOT = Path(__file__).parent.parent
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}


def last_word(main, capsys, argv=("program",)) -> str:
    """The one line that a program says of what its main raises."""
    with pytest.raises(SystemExit) as end:
        process.run_main(main, list(argv))
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.startswith("error: ") and line.count("\n") == 1
    return line


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


class Mine(BaseException):
    """An exception of somebody's own, which says nothing of itself."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12288025604 bytes."), "--batch_size"),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"), "--many=map"),
        (MemoryError(), "--batch_size"),
        (ImportError("libscipy.so: failed to map segment from shared object"), "out of memory"),
        (ImportError("No module named 'optuna'"), "pip install 'tljax[experiments]'"),
        (RuntimeError("can't start new thread"), "ulimit -v"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "w"), "make room"),
        (Mine(), "Mine: of the class Mine"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_what_a_person_can_mend_is_one_line_with_its_remedy(error, remedy, capsys):
    assert remedy in last_word(raising(error), capsys)


def test_a_fault_of_tljax_shows_its_traceback(monkeypatch):
    monkeypatch.delenv("JAX_TRANSFER_GUARD", raising=False)
    for error in (KeyError("kernel"), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            process.run_main(raising(error), ["program"])


def test_a_switch_by_which_jax_refuses_more_is_named(monkeypatch, capsys):
    for name, value in (
        ("JAX_TRANSFER_GUARD", "disallow"),
        ("JAX_DEBUG_NANS", "1"),
        ("JAX_CHECK_TRACER_LEAKS", "true"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert f"tljax does not run with {name}={value}" in last_word(raising(FloatingPointError("nan")), capsys)
            patch.setenv(name, "allow" if value == "disallow" else "0")
            with pytest.raises(FloatingPointError):
                process.run_main(raising(FloatingPointError("nan")), ["program"])


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'rocm'")])
def test_jax_that_finds_no_device_is_said(error, monkeypatch, capsys):
    def devices(*_):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    assert "JAX finds no device" in (line := last_word(raising(error), capsys)) and "JAX_PLATFORMS" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_NUM_CPU_DEVICES", "abc"),
        pytest.param("JAX_PLATFORMS", "cuda", marks=pytest.mark.slow),
        pytest.param("JAX_PLATFORMS", "nonsense", marks=pytest.mark.slow),
        pytest.param("JAX_ENABLE_X64", "perhaps", marks=pytest.mark.slow),
        pytest.param("JAX_TRANSFER_GUARD", "disallow", marks=pytest.mark.slow),
    ],
)
def test_jax_that_does_not_start_is_one_line(name, value):
    line = [sys.executable, "-m", "experiments.check", "--strategy=full"]
    ended = subprocess.run(line, cwd=ROOT, env=PLAIN | {name: value}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and f"{name}={value}" in ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_a_package_that_is_not_installed_has_no_version_and_no_traceback(monkeypatch):
    def version(name):
        raise directory.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(directory.metadata, "version", version)
    versions = directory.environment({})["versions"]
    assert versions["tljax"] == directory.__version__ and versions["scipy"] == "not installed"


def test_a_path_begins_at_home_whichever_flag_it_is_of(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["x", "--workdir=~/w", "--model=~/m.py:model", "--strategies=full,~/s.py:strategy", "--target=~/t.npz"]
    values = parse_flags(argv)
    assert values["workdir"] == f"{tmp_path}/w" and values["model"] == f"{tmp_path}/m.py:model"
    assert values["strategies"] == ("full", f"{tmp_path}/s.py:strategy")
    assert values["target"] == "~/t.npz"  # a data set's name is as it is written: `tljax.data` finds it
    assert Settings.from_flags(workdir="~/w").workdir == f"{tmp_path}/w"
    assert files.place("~/t.npz") == tmp_path / "t.npz"


@pytest.mark.parametrize(
    "flag", ["workdir", "data_dir", "manual_dir", "compilation_cache", "source_checkpoint", "model"]
)
def test_a_user_that_there_is_not_has_no_home(flag):
    with pytest.raises(InputError, match=f"--{flag}=~nosuchuser/x: there is no such user"):
        parse_flags(["x", f"--{flag}=~nosuchuser/x"])


def test_without_a_home_what_needs_one_says_so_and_the_rest_goes_on(monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert data.load("mnist_10k").train.arrays.shape == (10000, 28, 28, 1)
    with pytest.raises(InputError, match=r"data_dir='~/tensorflow_datasets': .* no home"):
        data.load(str(tmp_path / "x.npz"))
    for name in ("~nosuchuser/x.npz", "folder:~nosuchuser/x"):
        with pytest.raises(InputError, match=r"'~nosuchuser/x.*': there is no such user"):
            data.load(name, data_dir=str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", None)
    process._keep_compiled(None)
    assert before == jax.config.jax_compilation_cache_dir


@pytest.mark.parametrize("full", [True, False], ids=["full", "gone"])
def test_a_run_outlives_its_standard_output(full, monkeypatch, tmp_path, capfd):
    """A disk that is full is an error at the end; a reader that has enough is none."""
    reading, writing = os.pipe()
    os.close(reading)
    done = []

    def main(argv):
        for _ in range(3):
            console.say("x" * 5000)
        done.append(True)

    with open("/dev/full" if full else writing, "w") as out, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        try:
            process.run_main(main, ["program"])
            code = 0
        except SystemExit as end:
            code = end.code
    assert done and code == int(full)
    assert capfd.readouterr().err.count("standard output cannot be written") == 1


def test_no_word_is_lost_where_standard_output_is_whole(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as out, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        with process.lasting_streams():
            for number in range(1000):
                print(number)
        assert (tmp_path / "out").read_text().split() == [str(number) for number in range(1000)]


def test_somebody_elses_code_closes_no_stream_and_takes_none_away(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as out, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        with process.lasting_streams():
            with switches.guarded():
                sys.stdout.close()
            console.say("first")
            with switches.guarded():
                sys.stdout = sys.stderr = None
            console.say("second")
        assert (tmp_path / "out").read_text() == "first\nsecond\n"


def test_a_closed_terminal_or_a_spent_limit_stops_a_run_in_good_order(monkeypatch):
    """They come twice, from the system and from the shell, or every second: the second ends nothing."""
    for number in (signal.SIGHUP, signal.SIGXCPU):
        with process.signals_handled() as signal_number:
            for _ in range(2):
                os.kill(os.getpid(), number)
            assert signal_number() == number
        with process.termination_raised(), pytest.raises(process.Stopped) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.code == 128 + number


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.termination_raised(), process.signals_handled() as signal_number:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal_number() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_that_a_strategy_left_does_not_keep_the_process():
    code = (
        "import threading, time; from experiments.runs import console, process; process._PATIENCE = 0.1\n"
        "threading.Thread(target=time.sleep, args=(1000,), name='mine').start()\n"
        "process.run_main(lambda argv: console.say('done'))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0 and ended.stdout == "done\n" and ended.stderr.endswith("still run: mine\n")


CURVE = [
    {"step": i, "accuracy": np.float64(i / 3), "loss": float("nan") if i == 2 else 1 / 3, "a b": 3} for i in range(4)
]


def events(file: Path) -> list[bytes]:
    raw, records = file.read_bytes(), []
    while raw:
        length = int.from_bytes(raw[:8], "little")
        event = Event.FromString(raw[12 : 12 + length])
        event.wall_time = 0
        records.append(raw[:12] + event.SerializeToString())
        raw = raw[16 + length :]
    return records


def test_events_are_those_of_tensorboardx(tmp_path):
    with SummaryWriter(str(tmp_path / "theirs")) as writer:
        for point in CURVE:
            for name in (name for name in point if name != "step" and np.isfinite(point[name])):
                writer.add_scalar(name, point[name], int(point["step"]))
    metrics.write_curves(tmp_path, "ours", CURVE)
    [theirs], [ours] = (list((tmp_path / side).glob("events.out.tfevents.*")) for side in ("theirs", "metrics/ours"))
    assert events(ours) == events(theirs) and len(events(ours)) == 12


def test_a_full_disk_under_the_events_is_an_error_and_no_thread_waits(tmp_path):
    """As many points as filled the writer's queue; files may have 1,000 bytes, as on a disk that is full."""
    before_it = threading.enumerate()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            metrics.write_curves(tmp_path, "w", CURVE * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not set(threading.enumerate()) - set(before_it) and not list((tmp_path / "metrics" / "w").iterdir())


ENDS = """
class Mine(BaseException): pass

class Silent(Exception):
    def __str__(self): raise ValueError

class Odd:
    def __repr__(self): raise ValueError

def base(params, context): raise Mine("x")
def generator(params, context): raise GeneratorExit
def silent(params, context): raise Silent
def odd(params, context): return {name: {leaf: Odd() for leaf in stage} for name, stage in params.items()}
def itself(params, context):
    mask = {}
    mask["head"] = mask
    return mask
def deep(params, context):
    mask = True
    for _ in range(100_000): mask = [mask]
    return mask
"""


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("base", "' fails: Mine: x"),
        ("generator", "' fails: GeneratorExit"),
        ("silent", "' fails: Silent"),
        ("odd", "the mask's leaf at 'head/bias' is 'of the class Odd'"),
        ("itself", "a tree holds itself"),
        ("deep", "a tree holds itself, or is nested too deep"),
    ],
)
def test_a_strategy_ends_in_one_line_whatever_it_raises_or_gives(strategy, words, tasks, tmp_path, capsys):
    (tmp_path / "ends.py").write_text(ENDS)
    argv = command(tasks, tmp_path, strategies=(f"{tmp_path}/ends.py:{strategy}",), dry_run="true")
    assert words in last_word(transfer.main, capsys, ["transfer", *argv])


def test_a_path_that_no_checkpoint_takes_is_refused_before_anything_is_trained(tasks, tmp_path):
    for flag in ("workdir", "compilation_cache"):
        with pytest.raises(InputError, match=rf"--{flag}=.* is no UTF-8"):
            transfer.run(**{**arguments(tasks, tmp_path / "w"), flag: f"{tmp_path}/caf\udce9/x"})
    assert not list(tmp_path.iterdir())


def packed(method: int = zipfile.ZIP_STORED) -> bytes:
    """An .npz of three arrays."""
    out = io.BytesIO()
    arrays = {
        "x": np.arange(80, dtype=np.uint8).reshape(5, 4, 4),
        "labels": np.arange(5),
        "names": np.array(["a", "b"]),
    }
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    return out.getvalue()


def with_head(head: str) -> bytes:
    """An .npz of one array with this head, of 80 bytes."""
    out, raw = io.BytesIO(), head.encode("latin-1") + b"\n"
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + len(raw).to_bytes(4, "little") + raw + b"\0" * 80)
    return out.getvalue()


def altered(local: int, central: int, value: int) -> bytes:
    """An .npz with a byte set in the heads of all its members, and in its directory."""
    raw = bytearray(packed())
    for mark, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        for match in re.finditer(mark, bytes(raw)):
            raw[match.start() + place] = value
    return bytes(raw)


HEAD = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s)}"
DAMAGED = {
    "encrypted": altered(6, 8, 1),
    "of an unknown method": altered(8, 10, 99),
    "of a later zip": altered(4, 6, 200),
    "parentheses": with_head("(" * 3000),
    "brackets": with_head("[" * 9000 + "]" * 9000),
    "minuses": with_head(HEAD % ("-" * 5000 + "1,")),
    "a shape of a bool": with_head(HEAD % "True,"),
    "a shape below 0": with_head(HEAD % "-1,"),
    "65 dimensions": with_head(HEAD % ("1," * 65)),
    "larger than the memory": with_head(HEAD % f"{10**15},"),
    "larger than any memory": with_head(HEAD % f"{2**62},{2**62}"),
    "of nothing, and larger than any memory": with_head(HEAD % f"0,{2**62},{2**62}"),
    "an escape": with_head("{'descr': '\\d', 'fortran_order': False, 'shape': (80,)}"),
    "objects": with_head("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
    "zero bytes": with_head("\0\0"),
    "no archive": b"PK\x03\x04",
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_npz_that_is_damaged_is_refused_by_every_reader_of_one(damage, tmp_path, capsys):
    file = tmp_path / "metrics" / "fit" / "curves.npz"
    file.parent.mkdir(parents=True)
    file.write_bytes(DAMAGED[damage])
    readers = {
        "arrays": lambda: npz.read(file),
        "data": lambda: data.load(str(file), data_dir=str(tmp_path)),
        "images": lambda: unlabelled.load(file, (4, 4, 1)),
        "weights": lambda: weights.read(file),
        "predictions": lambda: predictions.read(file),
    }
    for read in readers.values():
        with pytest.raises(InputError, match=re.escape(str(file))):
            read()
    assert metrics.curves(tmp_path, "fit") is None and "left out" in capsys.readouterr().out


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_with_a_flipped_bit_or_cut_is_read_or_refused(method):
    raw, draw = packed(method), np.random.default_rng(0)
    flips = ((place, 1 << int(draw.integers(8))) for place in draw.permutation(len(raw))[:250])
    for place, bit in flips:
        other = bytearray(raw)
        other[place] ^= bit
        for text in (bytes(other), raw[:place]):
            with contextlib.suppress(InputError):
                npz.unpack(io.BytesIO(text), "'x.npz'")
    assert npz.unpack(io.BytesIO(raw), "'x.npz'").keys() == {"x", "labels", "names"}


def test_a_path_too_long_for_the_system_is_one_line(tasks, tmp_path, capsys):
    for flag in ("target", "source_checkpoint", "workdir"):
        flags = {flag: f"{tmp_path}/{'x' * 5000}.npz", **({"source": None} if flag == "source_checkpoint" else {})}
        argv = command(tasks, tmp_path, **flags)
        assert "too long" in last_word(transfer.main, capsys, ["transfer", *argv])


@pytest.mark.parametrize("kind", ["pipe", "folder", "zero byte"])
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    file = tmp_path / ("a\0.npz" if kind == "zero byte" else "x.npz")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    for read in (npz.read, npz.mapped, weights.read, predictions.read, lambda place: data.load(str(place))):
        with pytest.raises(InputError):
            read(file)


def test_a_pipe_for_weights_or_their_card_is_not_waited_for(tmp_path):
    file = tmp_path / "w.npz"
    os.mkfifo(file)
    with pytest.raises(InputError, match="is no file"):
        sources.weights_card(file)
    file.unlink()
    file.write_bytes(packed())
    os.mkfifo(tmp_path / "w.npz.json")
    with pytest.raises(InputError):
        sources.weights_card(file)


@pytest.mark.parametrize(
    "shape", [[1] * 65, [1] * 255, [0, 2**32 - 1, 2**32 - 1], [2**31, 2**31, 0, 2**31], [2**32 - 1] * 9], ids=str
)
def test_idx_of_a_shape_that_no_array_has_is_refused(shape, tmp_path):
    head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    (tmp_path / "x").write_bytes(head + b"\7" * (max(shape) == 1))
    with pytest.raises(InputError, match="header"):
        idx.read(tmp_path / "x")


def test_labels_of_two_axes_are_no_probabilities(tmp_path):
    labels = np.arange(4) % 2
    shapes = {
        "column": {"predicted": labels[:, None], "labels": labels[:, None]},
        "one-hot": {"labels": np.eye(2)[labels]},
        "flat probabilities": {"probabilities": labels, "labels": labels},
        "no class": {"probabilities": np.zeros((4, 0)), "labels": labels},
        "words": {"probabilities": np.array([["a", "b"]] * 4), "labels": labels},
        "no labels": {"predicted": labels, "groups": labels},
    }
    for what, arrays in shapes.items():
        np.savez(tmp_path / f"{what}.npz", **arrays)
        with pytest.raises(InputError, match=r"give labels \[items\]"):
            predictions.read(tmp_path / f"{what}.npz")
    np.savez(tmp_path / "good.npz", probabilities=np.eye(2)[labels], labels=labels)
    assert (predictions.read(tmp_path / "good.npz")[0] == labels).all()


NOT_TEXT = "caf\udce9"


@pytest.mark.slow
def test_a_name_that_is_no_utf8_stands_in_every_file_and_the_run_goes_on(tasks, tmp_path, no_pictures):
    """A class, a folder of data and a strategy's file, in a run and in the same command again."""
    place = tmp_path / NOT_TEXT
    for split, name in itertools.product(("train", "test"), (NOT_TEXT, "dog")):
        (place / split / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (6, 6), 40 * number).save(place / split / name / f"{number}.png")
    (place / "s.py").write_text(
        "from tljax import masks\n\n\ndef strategy(params, context):\n    return context.fresh\n"
    )
    flags = {"target": f"folder:{place}", "strategies": (f"{place}/s.py:strategy",), "seeds": (0,), "batch_size": 4}
    for _ in range(2):
        transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    assert NOT_TEXT.encode("utf-8", "backslashreplace") in (tmp_path / "w" / "report.html").read_bytes()


def test_a_checkpoint_under_a_name_that_is_no_utf8_is_refused_with_the_remedy(tmp_path):
    (tmp_path / NOT_TEXT).mkdir()
    for read in (checkpoint.load, checkpoint.about):
        with pytest.raises(InputError, match=r"no UTF-8.* rename it"):
            read(tmp_path / NOT_TEXT)
