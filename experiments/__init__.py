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
    if isinstance(error, MemoryError) or "failed to map segment" in text or "start new thread" in text:
        return f"there is too little memory for the libraries of tljax ({text}): raise its limit (ulimit -v)"
    if isinstance(error, ImportError):
        return f"{text}: install tljax with all that it needs (python -m pip install .)"
    if variables and any(f"{os.sep}jax{os.sep}" in file for file in files):
        return f"JAX does not start ({text}): the environment sets {variables}; unset what it does not take"
    return ""


if sys.argv[:1] == ["-m"]:  # so it is while `python -m experiments.NAME` imports: console.run_main takes over after
    sys.excepthook = _end
