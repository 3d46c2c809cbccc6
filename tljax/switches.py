"""Switches of JAX and XLA that decide results, and a guard that keeps somebody else's code from changing them."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # JAX tells nowhere else whether it has looked for its devices

from tljax.types import InputError

NEUTRAL: dict[str, Any] = {
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_matmul_precision": None,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "unknown",
    "jax_exec_time_optimization_effort": 0.0,
}
"""{switch of JAX that decides random streams or rounding: its value as JAX 0.10.2 comes}."""
DETERMINISTIC = "xla_gpu_exclude_nondeterministic_ops=true"
"""The flag of XLA by which a GPU adds in the same order each time. Programs ask for it, so no key says it: a key says
what differs from that, and so a GPU of which nobody has asked it."""
_AS_XLA_COMES = "--" + DETERMINISTIC.replace("true", "false")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
"""Variables of the environment that are read when JAX looks for its devices."""
_ARITHMETIC = ("fast", "precision", "determinis", "honor", "unsafe", "tf32", "denormal")
"""What is in the names of XLA's flags that say how numbers are computed; other flags say how a program is compiled,
which is the compiler's affair, as its release is."""


def changed() -> dict[str, Any]:
    """{environment variable: value} of the switches that differ from JAX's defaults; {} if none does.

    They decide random streams or how numbers are computed, so they belong in a fit's key. On a GPU the defaults are
    those of programs, which ask for deterministic operations (`DETERMINISTIC`): where no word in XLA_FLAGS says
    anything of such operations, that flag is among the switches as XLA comes. JAX's devices are not looked for: before
    there are any, nothing is known of a GPU.
    """
    from_jax = {name.upper(): value for name, value in _jax_values().items() if value != NEUTRAL[name]}
    return from_jax | {name: text for name in _VARIABLES if (text := _arithmetic(name))}


def variables() -> dict[str, str]:
    """{variable: text} of the environment variables that JAX's compiler reads and that are set."""
    return {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def _jax_values() -> dict[str, Any]:
    values = jax.config.values  # which JAX makes anew each time
    return {name: _plain(values.get(name, neutral)) for name, neutral in NEUTRAL.items()}


def _plain(value: Any) -> Any:
    """A value of JAX's configuration as JSON can hold it: an enumeration by its name, words in small letters."""
    value = getattr(value, "name", value)
    return value.lower() if isinstance(value, str) else value


def _arithmetic(variable: str) -> str:
    """The words of a variable that say how numbers are computed, in order; XLA_FLAGS may name a file of them."""
    text = os.environ.get(variable, "").strip()
    if variable == "NVIDIA_TF32_OVERRIDE":
        return text
    if text and not text.startswith("-"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError):
            text = ""
    words = [word for word in text.split() if any(part in word for part in _ARITHMETIC)]
    if variable == "XLA_FLAGS" and not any("deterministic_ops" in word for word in words) and _is_on_gpu():
        words.append(_AS_XLA_COMES)
    return " ".join(sorted(word for word in words if word.lstrip("-") != DETERMINISTIC))


def _is_on_gpu() -> bool:
    """Whether JAX computes on a GPU; False where it has not looked for its devices yet, which this does not begin."""
    return xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu"


@contextmanager
def guarded(whose: str = "a function that the flags name") -> Iterator[None]:
    """Run somebody else's code, and restore what it must not change for the rest of the process.

    Restored are the working directory, NumPy's handling of errors, Python's standard streams and their descriptors,
    the environment that JAX reads, and the switches of JAX that decide results. Raises InputError, with `whose` as the
    subject, if the code has changed such a switch.

    >>> with guarded("mine.py"):
    ...     jax.config.update("jax_random_seed_offset", 1)
    Traceback (most recent call last):
    tljax.types.InputError: mine.py sets jax_random_seed_offset from 0 to 1, which changes the results of \
every fit: leave that out, and set JAX_RANDOM_SEED_OFFSET=1 in the environment if you mean it
    """
    if getattr(_OF_THREAD, "is_trusted", False):
        yield
        return
    folder, handling = _directory(), np.geterr()
    streams = sys.stdin, sys.stdout, sys.stderr
    texts = {name: os.environ.get(name) for name in _VARIABLES}
    values = {name: jax.config.values[name] for name in NEUTRAL if name in jax.config.values}
    before = _jax_values()
    try:
        with _descriptors():
            yield
    finally:
        if folder is not None and _directory() != folder:
            os.chdir(folder)
        np.seterr(**handling)
        sys.stdin, sys.stdout, sys.stderr = streams
        _restore(texts)
        after = _jax_values()
        for name, value in values.items():
            if after[name] != before[name]:
                jax.config.update(name, value)
    for name in before:
        if after[name] != before[name]:
            raise InputError(
                f"{whose} sets {name} from {before[name]} to {after[name]}, which changes the results of every fit: "
                f"leave that out, and set {name.upper()}={after[name]} in the environment if you mean it"
            )


_OF_THREAD = threading.local()


@contextmanager
def trusted() -> Iterator[None]:
    """Within it `guarded` does nothing in this thread, as is right for code of tljax alone: what it restores is the
    process's, and another thread may be changing it."""
    _OF_THREAD.is_trusted = True
    try:
        yield
    finally:
        _OF_THREAD.is_trusted = False


@contextmanager
def _descriptors() -> Iterator[None]:
    """Put descriptors 0, 1 and 2 back where they were closed: else the next file that is opened gets such a number,
    a lock or a checkpoint, and is what the next call of the same code closes."""
    copies = {}
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):  # closed from the beginning
            copies[number] = os.dup(number)
    try:
        yield
    finally:
        for number, copy in copies.items():
            with contextlib.suppress(OSError):  # where every descriptor was closed
                if not _same_file(number, copy):
                    os.dup2(copy, number)
                os.close(copy)


def _same_file(number: int, other: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.fstat(other))
    except OSError:
        return False


def _directory() -> str | None:
    """The working directory; None where it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _restore(texts: dict[str, str | None]) -> None:
    for name, value in texts.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
