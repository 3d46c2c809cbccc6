"""The life of a process that runs a program: its streams, signals, devices, companions and locks, and its last word.

Read from top to bottom it is the story of one program: `run_main` begins and ends it, signals stop it, `prepare` finds
its devices and the other processes of the run, `locked` makes a run directory its own, and `message` says in one line
what went wrong. Two things here change the whole process and are done by `run_main` alone, when a program runs and
never at an import: loggers and hooks that would print tracebacks (`_quieten_orbax`), and the garbage collector's pace
(`_spare_the_collector`).
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import importlib.util
import io
import logging
import math
import os
import pkgutil
import platform
import resource
import select
import signal
import stat
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import jax
from jaxlib import xla_client

from experiments import INSTALL
from experiments.runs import command_line
from experiments.runs.settings import MOST_DEVICES, Settings, profile_steps
from tljax import files, heartbeat, plugins, switches, train
from tljax.types import InputError

# ---- Beginning and end


_PATIENCE = 3.0
"""Seconds for which threads may go on when a program has ended."""


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a program: bad input ends with one line on standard error and exit code 1.

    As the process's own program (`argv` is None) it ends the process too, whatever threads somebody's code has left.
    """
    arguments = sys.argv if argv is None else argv
    _quieten_orbax()
    _spare_the_collector()
    if argv is None:
        ask_for_determinism()
    code = 0
    with lasting_streams(quiet=command_line.asks_help(arguments)):
        try:
            with termination_raised():
                if not command_line.asks_help(arguments):
                    refuse_unknown_xla_flags()
                main(arguments)
        except KeyboardInterrupt:
            _leave(130, "stopped; the same command goes on with what is not finished")
        except Stopped as stopped:
            _leave(stopped.code, str(stopped))
        except SystemExit:
            raise
        except BaseException as error:
            if (line := message(error)) is None:
                if argv is None:
                    _end_threads(1)
                raise
            _print_error(line)
            code = 1
        _flush()
        code = code or int(output_lost())
    if argv is None:
        _end_threads(code)
    if code:
        sys.exit(code)


def _quieten_orbax() -> None:
    """Silence what Orbax logs beside what it raises: tracebacks from threads, and of arrays under way at the end."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def all_but_closed_loops(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    if getattr(hook, "__name__", "") != all_but_closed_loops.__name__:
        sys.unraisablehook = all_but_closed_loops


def _spare_the_collector() -> None:
    """Let the garbage collector rest: modules and traces are full of cycles that live on, and walking them again and
    again delays the first step."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def _leave(code: int, text: str) -> None:
    """End at once: a computation may be under way, which the interpreter's own end would cut off in the middle."""
    print(visible(text), file=sys.stderr)
    _flush()
    os._exit(code)


def _print_error(text: str) -> None:
    print("error: " + visible(" ".join(text.split())), file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        _flush()
        os._exit(1)  # the interpreter's own end would wait for the other processes, and they for this one


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # somebody's code has taken it away
            stream.flush()


def ask_for_determinism() -> None:
    """Ask XLA for deterministic operations where JAX may find a GPU, before it reads its flags.

    XLA_FLAGS gets the word `switches.DETERMINISTIC` and keeps its others; environment.json holds it then. It stays as
    it is where it says something of deterministic operations itself, where it names a file, and where XLA has no such
    flag; whatever does not ask a GPU for them has other keys (`switches.changed`).
    """
    text = os.environ.get("XLA_FLAGS", "").strip()
    if "deterministic_ops" in text or (text and not text.startswith("-")):
        return
    if not _gpu_possible(jax.config.values["jax_platforms"]):
        return
    longer = f"{text} --{switches.DETERMINISTIC}".strip()
    if not _xla_fault(longer):
        os.environ["XLA_FLAGS"] = longer


def _gpu_possible(kinds: str | None) -> bool:
    """Whether JAX may find a GPU: a plugin for one is installed, and JAX_PLATFORMS, `kinds`, names no others alone."""
    makers = ("cuda", "rocm")
    if kinds and not any(kind in kinds for kind in (*makers, "gpu")):
        return False
    names = [entry.name for entry in metadata.entry_points(group="jax_plugins")]
    if (spec := importlib.util.find_spec("jax_plugins")) and spec.submodule_search_locations:
        names += [module.name for module in pkgutil.iter_modules(list(spec.submodule_search_locations))]
    return any(maker in name for name in names for maker in makers)


_XLA_PATIENCE = 20.0
"""Seconds for which XLA is waited for; whoever takes longer has read its flags."""


def refuse_unknown_xla_flags() -> None:
    """Raise InputError for what XLA does not take in XLA_FLAGS, with its own words.

    XLA ends the process at a flag that it does not know, without an exception.
    """
    text = os.environ.get("XLA_FLAGS", "")
    if text and (words := _xla_fault(text)):
        raise InputError(f"XLA_FLAGS={text[:200]} in the environment: {words}: unset it, or mend it")


@functools.cache
def _xla_fault(text: str) -> str:
    """What XLA says of its flags before it ends a process, in a copy of this one; "" where it takes them."""
    if not hasattr(os, "fork"):
        return ""
    reading, writing = os.pipe()
    try:
        with warnings.catch_warnings(action="ignore"):  # of threads, which are not in the copy: it needs none of them
            child = os.fork()
    except OSError:  # the system lets this user start no more processes
        os.close(reading)
        os.close(writing)
        return ""
    if child == 0:
        _read_xla_flags(writing)
    os.close(writing)
    output = _output_of_child(reading, child)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended in (0, -signal.SIGKILL):
        return ""
    lines = [line.partition("] ")[2] or line for line in output.decode(errors="replace").splitlines()]
    return next((line for line in lines if "XLA_FLAGS" in line or "flag" in line.lower()), "XLA ends at it")[:200]


def _read_xla_flags(writing: int) -> NoReturn:
    """Make XLA read its flags, with what it says in a pipe, and end."""
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    xla_client.CompileOptions()
    os._exit(0)


def _output_of_child(reading: int, child: int) -> bytes:
    """What comes out of a pipe until its end; the process at its other end is ended where that takes too long."""
    output, end = b"", time.monotonic() + _XLA_PATIENCE
    with open(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            part = pipe.read(65536)
            if not part:
                return output
            output = output[:65536] + part
    os.kill(child, signal.SIGKILL)
    return output


def _end_threads(code: int) -> None:
    """Let the interpreter wait a while for every thread that is no daemon, and end the process then.

    What is registered to run at its end runs; where the machine has no room for another thread it does not.
    """
    joined = threading.Event()
    atexit.register(joined.set)

    def leave() -> None:
        if not joined.wait(_PATIENCE):
            names = [thread.name for thread in threading.enumerate() if not thread.daemon]
            _leave(code, f"ended although threads still run: {', '.join(names[1:])[:200]}")

    try:
        threading.Thread(target=leave, daemon=True).start()
    except RuntimeError:
        _flush()
        os._exit(code)


# ---- Standard output and error: a run survives whoever reads them, and the disk behind them


@contextmanager
def lasting_streams(quiet: bool = False) -> Iterator[None]:
    """Standard output and error lose what cannot be written, show as \\udcff what their encoding cannot, and stay open.

    That standard output is lost is said once on standard error; with `quiet` not if its reader has gone. A stream that
    is no file descriptor, such as a test's, stays as it is. Both are put back afterwards.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(before[0], quiet), _lasting(before[1], quiet=True)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Text):
                stream.flush()
        sys.stdout, sys.stderr = before


_SHOWN = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\t\n"
}
"""{character that steers a terminal: how it is shown}: the controls of ISO 6429, Unicode's of lines and direction."""


def visible(text: str) -> str:
    """A text whose control characters are shown and steer no terminal: names of files and errors are anybody's.

    >>> visible("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    return text.translate(_SHOWN)


def output_lost() -> bool:
    """Whether something of standard output was lost that somebody wanted: not where its reader has gone."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    fault = raw.fault if isinstance(raw, _Descriptor) else None
    return fault is not None and fault.errno not in _GONE


def _lasting(stream: Any, quiet: bool) -> Any:
    """A stream that lasts in place of one that is a file descriptor; any other as it is."""
    binary = getattr(stream, "buffer", None)  # without a `raw` where Python does not buffer (-u)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(binary, "raw", binary), io.FileIO):
        return stream
    stream.flush()
    # A copy: where somebody's code closes descriptor 1, the next file that is opened would get the table. It stays
    # open, since what logs may hold the stream.
    descriptor = _Descriptor(os.dup(stream.fileno()), "wb", closefd=False)
    descriptor.quiet = quiet
    return _Text(
        io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Descriptor(io.FileIO):
    """A file descriptor that takes all that is written, and loses it once it cannot be written any more."""

    fault: OSError | None = None
    quiet = False
    """Whether it says nothing of a reader that has gone."""

    def write(self, data: Any) -> int:
        """Write, or lose, `data`; the number of its bytes."""
        while self.fault is None:
            try:
                count = super().write(data)
                if count is not None:
                    return count
                select.select((), (self,), ())  # its other end does not let it wait, and is full
            except OSError as error:
                self.fault = error
                if not (self.quiet and error.errno in _GONE):
                    _warn_of_loss(error)
        return memoryview(data).nbytes


class _Text(io.TextIOWrapper):
    """Text that somebody else's code cannot close."""

    def close(self) -> None:
        """Flush alone."""
        if not self.closed:
            self.flush()


_GONE = (errno.EPIPE, errno.EIO)
"""A reader, or a terminal, that is there no more: nobody misses what it would have read."""


def _warn_of_loss(error: OSError) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"standard output cannot be written ({error.strerror}): what follows is not shown", file=sys.stderr)


def _say(line: str) -> None:
    print(visible(line), flush=True)


def _say_once() -> Callable[[str], None]:
    """A function that prints a line, and the same line never again."""
    printed: set[str] = set()

    def say(line: str) -> None:
        if line not in printed:
            printed.add(line)
            _say(line)

    return say


# ---- Signals: the first asks a run to save and stop, the second SIGINT or SIGTERM ends it at once


_FROM_A_PERSON = (signal.SIGINT, signal.SIGTERM)
_ONCE = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGXCPU") if hasattr(signal, name))
"""Of a terminal that is closed, which comes once from the system and once from the shell; of a limit of the
processor's time, which comes every second: a second one says nothing new."""


class Stopped(BaseException):
    """A run that a signal ended, in good order."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.code = 128 + number


@contextmanager
def signals_handled() -> Iterator[Callable[[], int]]:
    """Gives the function that tells which signal has come since, or 0; a second SIGINT or SIGTERM ends the process.

    The signals are SIGINT, SIGTERM, SIGHUP and SIGXCPU. Only the main thread hears them; in others it is always 0.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came and number in _FROM_A_PERSON:
            os._exit(128 + number)
        if not came:
            came.append(number)
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, b"stopping: what is under way is finished and saved; a second signal leaves at once\n")

    with _handlers(note, (*_FROM_A_PERSON, *_ONCE)):
        yield lambda: came[0] if came else 0


@contextmanager
def termination_raised() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGXCPU raise Stopped, wherever `signals_handled` does not take them."""
    came: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        if came and number in _ONCE:
            return
        came.append(number)
        raise Stopped(number, "stopped; the same command goes on with what is not finished")

    with _handlers(leave, (signal.SIGTERM, *_ONCE)):
        yield


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """`handler` hears these signals; one of `_ONCE` that is ignored, as nohup asks, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [n for n in numbers if n not in _ONCE or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ---- Devices, and where compiled programs are kept

STREAMS = "streams"
"""The folder of a run directory that holds, while a process trains, the features that are streamed from disk."""


def prepare(settings: Settings) -> train.Execution:
    """How a run computes; the first call in a process decides how many devices a CPU makes.

    Raises InputError for a mesh that cannot be, more devices than there are, processes that do not find each other,
    and for a folder that cannot hold compiled programs.
    """
    trial, data = _mesh(settings)
    _check_processes(settings)
    count = settings.num_processes or 1  # of a cluster it is known later, and there a CPU is one device a core
    _one_device_a_core(settings.devices or -(-trial * data // count) or None)
    _keep_compiled(settings.compilation_cache)
    _replace_damaged()
    _find_processes(settings)
    devices = _devices(settings, trial * data)
    say = _say_once()
    if changed := switches.changed():
        values = ", ".join(f"{name}={value}" for name, value in changed.items())
        say(f"results are those of {values}: it enters the keys of all fits, and environment.json")
    if switches.DETERMINISTIC in os.environ.get("XLA_FLAGS", "") and devices[0].platform == "gpu":
        say(f"operations are deterministic (--{switches.DETERMINISTIC}): an embedding's gradient is slow so")
    all_share_a_batch = settings.parallel == "pmap" or settings.distributed
    folder = Path(settings.workdir) / STREAMS if settings.workdir else None
    budget, dtype = settings.features_budget, settings.features_dtype
    at_once = settings.evaluation_batch
    store = train.FeatureCache(budget, dtype, folder, settings.augment_views, at_once) if budget else None
    batch = data or (len(devices) if all_share_a_batch else 1)
    return train.Execution(
        devices,
        batch,
        settings.parallel,
        settings.many,
        store,
        say,
        data=settings.data,
        stream_memory=settings.stream_memory,
        profile=_profile(settings),
        evaluation_batch=at_once,
    )


def _profile(settings: Settings) -> train.Profile | None:
    """What --profile asks for, in the run directory."""
    steps = profile_steps(settings)
    return train.Profile(Path(settings.workdir) / "profile", *steps) if steps and settings.workdir else None


def _mesh(settings: Settings) -> tuple[int, int]:
    """The axes (trial, data) of `--mesh`, an axis that is not named being 1; zeros where the flag is not given."""
    text = ",".join(settings.mesh)
    sizes = {"trial": 1, "data": 1} if text else {"trial": 0, "data": 0}
    for part in settings.mesh:
        name, _, size = part.partition(":")
        if name not in sizes or not size.isdecimal() or not int(size) > 0 or text.count(f"{name}:") > 1:
            raise InputError(f"--mesh={text}: write its axes once each with their sizes, such as data:4,trial:2")
        sizes[name] = int(size)
    if sizes["trial"] * sizes["data"] > MOST_DEVICES:
        raise InputError(f"--mesh={text}: it has {sizes['trial'] * sizes['data']:,} devices, at most {MOST_DEVICES:,}")
    if settings.parallel == "pmap" and sizes["trial"] > 1:
        raise InputError(f"--mesh={text}: --parallel=pmap trains one fit at a time, so leave out the axis trial")
    return sizes["trial"], sizes["data"]


def _devices(settings: Settings, size: int) -> tuple[Any, ...]:
    """As many devices as the mesh has, as many of each process; without a mesh all, or `--devices` of each process."""
    local, count = jax.local_devices(), jax.process_count()
    if size and (size % count or settings.devices not in (None, size // count)):
        devices = f" and --devices={settings.devices}" if settings.devices else ""
        processes = "1 process" if count == 1 else f"{count} processes"
        raise InputError(f"--mesh={','.join(settings.mesh)} has {size} devices{devices} in {processes}: they differ")
    wanted = settings.devices or size // count or len(local)
    if wanted > len(local):
        flag = f"--devices={wanted}" if settings.devices else f"--mesh={','.join(settings.mesh)}"
        raise InputError(f"{flag}: there are {len(local)} of the kind {local[0].device_kind}")
    if count == 1:
        return tuple(local[:wanted])
    of_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    return tuple(device for index in sorted(of_process) for device in of_process[index][:wanted])


def _one_device_a_core(wanted: int | None) -> None:
    """Make virtual devices of a CPU, unless JAX runs already or somebody else has said how many."""
    if jax.config.values["jax_num_cpu_devices"] != -1 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has devices already
        jax.config.update("jax_num_cpu_devices", wanted or cores)


def _keep_compiled(folder: str | None) -> None:
    """Keep compiled programs beyond the process, in a folder of this kind of machine: others cannot run them."""
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        home = folder or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = files.place(home, "compilation_cache")
        place = place if folder else place / "tljax" / f"compiled-{_kind_of_machine()}"
    except InputError:
        if folder:
            raise
        return  # there is no home
    if files.not_text(place) is not None:
        if folder:
            raise InputError(f"--compilation_cache={folder}: its path is no UTF-8, and XLA needs one: name another")
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise InputError(
                f"--compilation_cache={folder} cannot be made ({error.strerror}): name another folder"
            ) from error
        return
    options: dict[str, Any] = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(place),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)


_DAMAGED = "Error reading persistent compilation cache entry for "
"""How JAX's warning begins of an entry that a full disk or a killed process left cut, or that was changed."""


def release_programs() -> None:
    """Let JAX drop its compiled programs once they take half of the mappings of memory that Linux allows a process.

    A program takes some tens, which stay as long as JAX has it: that of a ViT's thirtieth strategy would get none, and
    LLVM ends the process then with a segmentation fault. What is needed again is compiled again, or loaded.
    """
    taken, most = _mappings()
    if taken > most / 2:
        jax.clear_caches()


def _mappings() -> tuple[int, float]:
    """(The mappings of memory of this process, how many it may have); no limit where that is not known."""
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        return Path("/proc/self/maps").read_bytes().count(b"\n"), most
    except (OSError, ValueError):
        return 0, math.inf


def _replace_damaged() -> None:
    """Where JAX cannot read what it had compiled, delete that, aloud: JAX compiles anew, but writes over no entry."""
    before = warnings.showwarning
    if before.__name__ == "show_all_but_damaged":
        return
    say = _say_once()

    def show_all_but_damaged(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if not text.startswith(_DAMAGED):
            before(message, category, filename, lineno, file, line)
            return
        place = Path(str(jax.config.values["jax_compilation_cache_dir"]))
        name = text.removeprefix(_DAMAGED).split("'")[1]
        entries = [entry for entry in place.glob(f"{glob.escape(name)}-*") if entry.is_file()]
        for entry in [entry for entry in entries if _is_cut(entry)] or entries:  # which of them, JAX does not say
            with contextlib.suppress(OSError):
                entry.unlink()
        say(f"of what is kept compiled in '{place}', '{name}' cannot be read: it is compiled again")

    warnings.filterwarnings("always", message=_DAMAGED)
    warnings.showwarning = show_all_but_damaged


def _is_cut(file: Path) -> bool:
    """Whether an entry does not unpack, as far as Python's zlib knows how it is packed."""
    try:
        data = file.read_bytes()
        return not data.startswith(_ZSTD) and not zlib.decompress(data)
    except (OSError, zlib.error):
        return True


_ZSTD = b"\x28\xb5\x2f\xfd"


def _kind_of_machine() -> str:
    """A digest of the processor and its instructions."""
    try:
        lines = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features", "model name"))
        ]
    except OSError:
        lines = []
    return hashlib.sha256("\n".join([platform.machine(), *sorted(set(lines))]).encode()).hexdigest()[:12]


# ---- Many processes, one run: they find each other, the first of them writes, and none outlives another


_BY_HAND = ("coordinator", "num_processes", "process_id")


def _check_processes(settings: Settings) -> None:
    """Raise InputError for flags of processes that cannot be."""
    by_hand = {name: getattr(settings, name) for name in _BY_HAND if getattr(settings, name) is not None}
    if settings.distributed and settings.parallel == "pmap":
        raise InputError("--parallel=pmap is for one process: leave it out with --distributed")
    if settings.heartbeat < 1:
        raise InputError(f"--heartbeat={settings.heartbeat}: give 1 second or more")
    if not by_hand:
        return
    first_flag = next(iter(by_hand))
    if not settings.distributed:
        raise InputError(f"--{first_flag} is given without --distributed: add it")
    if len(by_hand) < len(_BY_HAND):
        missing = next(name for name in _BY_HAND if name not in by_hand)
        raise InputError(f"--{first_flag} is given and --{missing} is not: give all three, or none on a cluster")
    count, index, (host, _, port) = (
        by_hand["num_processes"],
        by_hand["process_id"],
        by_hand["coordinator"].rpartition(":"),
    )
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={by_hand['coordinator']}: write HOST:PORT, of the machine of process 0")
    if count < 1:
        raise InputError(f"--num_processes={count}: give 1 or more")
    if not 0 <= index < count:
        raise InputError(f"--process_id={index}: of {count} processes the ids are 0 to {count - 1}")


def _find_processes(settings: Settings) -> None:
    """Find the other processes of `--distributed`: before JAX looks at its devices, once in a process.

    Raises InputError where there is no cluster to be found, or the others do not come.
    """
    if not settings.distributed or jax.distributed.is_initialized():
        return
    _end_plainly()
    by_hand: dict[str, Any] = {"cluster_detection_method": "deactivate"} if settings.coordinator else {}
    try:
        jax.distributed.initialize(
            settings.coordinator,
            settings.num_processes,
            settings.process_id,
            heartbeat_timeout_seconds=settings.heartbeat,
            **by_hand,
        )
    except (ValueError, RuntimeError) as error:
        if "should be defined" in str(error) or "must be defined" in str(error):
            remedy = "no SLURM, Open MPI or Kubernetes is found: give --coordinator, --num_processes and --process_id"
        else:
            remedy = f"the processes do not find each other ({str(error)[:200]})"
        raise InputError(f"--distributed: {remedy}") from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the terminal is the first's


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _last_word(_: int) -> None:
    os.write(2, f"error: {LOST}\n".encode())
    os._exit(1)


def _end_plainly() -> None:
    """End in one line where JAX aborts the process, as it does after the heartbeat when another process is lost.

    It calls abort() in a thread of its own, so no exception tells of it. The handler is one of C: those of
    signal.signal and signal.set_wakeup_fd only leave a note for Python's main thread, and abort() ends the process
    before that reads it; faulthandler prints stacks of all threads and ends it by the signal.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _last_word)


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Wait until all processes of the run have come to the point called `what`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def in_turn(read: Callable[[], Any]) -> Any:
    """What `read` gives: the first process reads, and may set things aside, before the others do."""
    if not first():
        wait("read")
    result = read()
    if first():
        wait("read")
    return result


# ---- Who may write to a run directory: one process at a time, whatever machine it is on


BEAT = 10.0
"""Seconds after which an owner touches its lock again."""
SILENCE = 60.0
"""Seconds after which an owner on another host that has not touched its lock counts as gone."""


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Own a run directory; its file .lock names the owner until a clean end.

    Raises InputError where another process has it, and where .lock is no file of its own: a link's target would be
    emptied. What an owner left that ended without leaving is taken over, aloud. (The package filelock has the system
    call alone, and opens the file so that the owner's name in it is lost.)
    """
    with _lock_file(workdir / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(lock) or "another process"
            raise InputError(f"'{workdir}' is in use by {owner}: wait for it, or choose another --workdir") from error
        _take_over(workdir, lock)
        lock.truncate(0)
        print(f"process {os.getpid()} on host {platform.node()}", file=lock, flush=True)
        try:
            with heartbeat.every(BEAT, functools.partial(_touch, lock)):
                yield
        finally:
            lock.truncate(0)


def _lock_file(file: Path) -> TextIO:
    """The file .lock, open to read and to append; it is made if it is not there."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)

    try:
        status = os.lstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise InputError(f"'{file}' is a link or no file: delete it")
    except FileNotFoundError:
        pass
    try:
        return open(file, "a+", encoding="utf-8", errors="backslashreplace", opener=opener)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"'{file}' is a link or no file: delete it") from error
        raise


def _owner(lock: TextIO) -> str:
    """The owner that the file names, such as `process 12 on host x`; "" where it names none."""
    lock.seek(0)
    return " ".join(lock.read(300).split())


def _take_over(workdir: Path, lock: TextIO) -> None:
    owner = _owner(lock)
    if not owner:
        return
    # A file system of several hosts may hand a lock to each of them; the owner's heartbeat is seen by all.
    on_another_host = not owner.endswith(f" on host {platform.node()}")
    silent = time.time() - os.fstat(lock.fileno()).st_mtime
    if on_another_host and silent < SILENCE:
        raise InputError(
            f"'{workdir}' is in use by {owner}, heard of {max(silent, 0):.0f} s ago: wait for it, or choose another "
            f"--workdir; if it is gone, run the same command again in {SILENCE:.0f} s"
        )
    _say(f"'{workdir}' is taken over from {owner}, which ended without leaving")


def _touch(lock: TextIO) -> None:
    with contextlib.suppress(OSError):
        os.utime(lock.fileno())


# ---- The last word: what is said, in one line, of an exception that a person can do something about


LOST = "another process of this run is lost: run the same command on all of them again, and it goes on"
"""What processes say that are left, and end."""
_MEMORY = "out of memory: lower --batch_size or --hidden, train one fit at a time (--many=map), or take less data"
_OF_MEMORY = (
    *("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY", "bad_alloc", "failed to map segment"),
    "cannot map zero-fill",
)
_REMEDY = {
    errno.ENOSPC: "; make room and run the same command again",
    errno.EDQUOT: "; make room and run the same command again",
    errno.EISDIR: "; move it away, and run the same command again",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR), "; name another place"),
}
"""What helps where a place cannot be written, by the system's number."""
_STRICT = (
    *("JAX_TRANSFER_GUARD", "JAX_DEBUG_", "JAX_CHECK_", "JAX_ENABLE_CHECKS", "JAX_NUMPY_", "JAX_LEGACY_", "JAX_NO_"),
    *("JAX_DISALLOW_", "JAX_DEFAULT_DEVICE"),
)
"""How the names of environment variables begin by which JAX refuses what it allows otherwise."""


_LONGEST = 3000
"""Characters of a line; what is in an error's middle, such as a value of a flag, may have any length."""


def message(error: BaseException) -> str | None:
    """What a program says of an exception; None for a fault of tljax's own, of which the traceback is to be seen.

    >>> message(InputError("it names nothing", field="seeds", value="")), message(KeyError("kernel"))
    ('--seeds=: it names nothing', None)
    """
    text = _message(error)
    if text is None or len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 400]} ... {text[-390:]}"


def _message(error: BaseException) -> str | None:
    if isinstance(error, InputError):
        return plugins.words(command_line.in_flags(error))
    text = plugins.words(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized():
        return f"{LOST} ({text[:120]})"
    if isinstance(error, MemoryError) or any(word in text for word in _OF_MEMORY):
        return _MEMORY
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "the system lets this process start no more threads: raise its limits (ulimit -v, ulimit -u)"
    if isinstance(error, OSError):
        place = "" if error.filename is None else f": '{error.filename}'"
        return f"{error.strerror or text}{place}{_REMEDY.get(error.errno or 0, '')}"
    if isinstance(error, ImportError):
        return f"a library cannot be loaded ({text}): {INSTALL}"
    if isinstance(error, RuntimeError | AssertionError) and (fault := _no_device()):
        return fault
    if strict := _strict():
        return f"{plugins.describe(error)}; tljax does not run with {strict} in the environment: unset it"
    return None if isinstance(error, Exception) else plugins.describe(error)


def _no_device() -> str:
    """Why JAX finds no device; "" where it has one."""
    if jax.distributed.is_initialized():
        return ""
    try:
        jax.devices()
        return ""
    except Exception as error:  # of the makers of devices, which have no type in common
        reason = plugins.words(error)[:300] or type(error).__name__
    kinds = jax.config.values["jax_platforms"]
    if kinds:
        return f"JAX finds no device of JAX_PLATFORMS={kinds}: unset it, or name one there is, such as cpu ({reason})"
    return f"JAX finds no device ({reason}): with JAX_PLATFORMS=cpu in the environment it runs on the processor"


def _strict() -> str:
    """The variables of the environment by which JAX refuses what it allows otherwise, such as NAME=VALUE."""
    off = ("", "0", "false", "off", "no", "allow", "standard")
    return ", ".join(f"{n}={v}" for n, v in os.environ.items() if n.startswith(_STRICT) and v.lower() not in off)
