"""Programs: flags in, a run directory out. All input and output is here."""

import os
import sys
from types import TracebackType


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything was begun", file=sys.stderr, flush=True)
        os._exit(130)
    if line := _said(error, trace):
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of a library that is half loaded may never end
    sys.__excepthook__(kind, error, trace)


def _said(error: BaseException, trace: TracebackType | None) -> str:
    """What can be done about an exception of the imports, in one line; "" for a fault of tljax's own."""
    files = []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    text = " ".join(str(error).split())
    variables = ", ".join(f"{n}={v}" for n, v in os.environ.items() if n.startswith(("JAX_", "XLA_")))
    signs = ("failed to map segment", "cannot map zero-fill", "start new thread")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"there is too little memory for the libraries of tljax ({text}): raise its limit (ulimit -v)"
    if isinstance(error, ImportError):
        return f"{text}: install tljax with all that it needs (python -m pip install .)"
    if variables and any(f"{os.sep}jax{os.sep}" in file for file in files):
        return f"JAX does not start ({text}): the environment sets {variables}; unset what it does not take"
    return ""


_LEAST = {"RLIMIT_AS": ("ulimit -v", 2 * 2**30), "RLIMIT_DATA": ("ulimit -d", 650 * 10**6)}
"""{limit of the system: (how a shell sets it, bytes with which JAX starts on two cores)}. With less its libraries end
the process without a word of what is wrong, or wait for a thread that there is not."""


def _limited() -> str:
    """Which limit of memory is too low for JAX to start, in one line; "" where none is."""
    try:
        import resource
    except ImportError:  # of a system without such limits
        return ""
    for name, (command, least) in _LEAST.items():
        there, _ = resource.getrlimit(getattr(resource, name))
        if there != resource.RLIM_INFINITY and there < least:
            return (
                f"this process may have {there / 1e6:,.0f} MB of memory ({name}), and JAX does not start with less "
                f"than {least / 1e6:,.0f} MB: raise the limit ({command})"
            )
    return ""


if sys.argv[:1] == ["-m"]:  # so it is while `python -m experiments.NAME` imports: console.run_main takes over after
    sys.excepthook = _end
    if _few := _limited():
        print(f"error: {_few}", file=sys.stderr, flush=True)
        os._exit(1)
