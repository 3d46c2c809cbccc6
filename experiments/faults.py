"""What a program says, in one line, of an exception that a person can do something about."""

import errno
import os

import jax

from tljax import plugins
from tljax.types import InputError

LOST = "another process of this run is lost: run the same command on all of them again, and it goes on"
"""What processes say that are left, and end."""
_MEMORY = "out of memory: lower --batch_size or --hidden, train one fit at a time (--many=map), or take less data"
_OF_MEMORY = (
    "RESOURCE_EXHAUSTED",
    "out of memory",
    "OUT_OF_MEMORY",
    "bad_alloc",
    "failed to map segment",
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


_LONGEST = 1400
"""Characters of a line; what is in an error's middle, such as a value of a flag, may have any length."""


def line(error: BaseException) -> str | None:
    """What a program says of an exception; None for a fault of tljax's own, of which the traceback is to be seen.

    >>> line(InputError("--seeds names nothing: name one")), line(KeyError("kernel"))
    ('--seeds names nothing: name one', None)
    """
    text = _line(error)
    if text is None or len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 400]} ... {text[-390:]}"


def _line(error: BaseException) -> str | None:
    text = plugins.words(error)
    if isinstance(error, InputError):
        return text
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
        return f"a library cannot be loaded ({text}): install tljax with all that it needs"
    if isinstance(error, RuntimeError | AssertionError) and (fault := _no_device()):
        return fault
    if strict := _strict():
        return f"{plugins.said(error)}; tljax does not run with {strict} in the environment: unset it"
    return None if isinstance(error, Exception) else plugins.said(error)


def _no_device() -> str:
    """Why JAX finds no device; "" where it has one."""
    if jax.distributed.is_initialized():
        return ""
    try:
        jax.devices()
        return ""
    except Exception as error:  # of the makers of devices, which have no type in common
        reason = plugins.words(error)[:300] or type(error).__name__
    why = f" ({reason})"
    kinds = jax.config.values["jax_platforms"]
    if kinds:
        return f"JAX finds no device of JAX_PLATFORMS={kinds}: unset it, or name one there is, such as cpu{why}"
    return f"JAX finds no device{why}: with JAX_PLATFORMS=cpu in the environment it runs on the processor"


def _strict() -> str:
    """The variables of the environment by which JAX refuses what it allows otherwise, such as NAME=VALUE."""
    off = ("", "0", "false", "off", "no", "allow", "standard")
    return ", ".join(f"{n}={v}" for n, v in os.environ.items() if n.startswith(_STRICT) and v.lower() not in off)
