"""Programs: they read flags and write a run directory. All input and output is in this package."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

INSTALL = "install it with python -m pip install 'tljax[experiments]', or '.[experiments]' in a checkout"
"""The remedy for a library that is missing, or cannot be loaded."""
_PARTS = (
    *("absl", "orbax", "scipy", "sklearn", "threadpoolctl"),
    *("rich", "jinja2", "matplotlib", "optuna", "tensorboardX"),
)
"""Modules of the extra `experiments`. Some are loaded only when a run ends, which is late to miss them; those that read
data sets are not listed, since they are missed before anything is trained."""


def run_program(file: str) -> None:
    """Import the program of this file, run it, and end the process; a failure of its imports is reported in one line.

    A program calls this before its other imports, if it is run and not imported: `python -m experiments.NAME`.
    """
    if line := _missing_parts() or _too_little_memory():
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)
    _find_library()
    name = ".".join(Path(file).resolve().relative_to(Path(__file__).resolve().parent.parent).with_suffix("").parts)
    try:
        program = importlib.import_module(name)
        from experiments.runs import process
    except KeyboardInterrupt:
        print("stopped before anything was begun", file=sys.stderr, flush=True)
        os._exit(130)
    except BaseException as error:
        if line := _remedy(error):
            print(f"error: {line}", file=sys.stderr, flush=True)
            os._exit(1)  # threads of a library that is half loaded may never end
        raise
    process.run_main(program.main)
    sys.exit()


def _missing_parts() -> str:
    """The sentence that names the libraries that are not installed, with the remedy; "" if all are."""
    missing = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    return f"there is no {', '.join(missing)}: {INSTALL}" if missing else ""


def _find_library() -> None:
    """Let `import tljax` find the library beside this package where a folder tljax of the working directory hides it.

    This happens in the folder that holds the checkout: its ./tljax has no __init__.py, and Python takes it for a
    namespace package. A regular package wins over a namespace package from anywhere on the path, so its end will do.
    """
    spec = None if "tljax" in sys.modules else importlib.util.find_spec("tljax")
    beside = Path(__file__).resolve().parent.parent
    if spec and spec.origin is None and (beside / "tljax" / "__init__.py").is_file():
        sys.path.append(str(beside))


def _remedy(error: BaseException) -> str:
    """The remedy for an exception of the imports, in one line; "" for a fault in tljax itself."""
    files, trace = [], error.__traceback__
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    text = " ".join(str(error).split())
    variables = ", ".join(f"{n}={v}" for n, v in os.environ.items() if n.startswith(("JAX_", "XLA_")))
    signs = ("failed to map segment", "cannot map zero-fill", "start new thread")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"there is too little memory for the libraries of tljax ({text}): raise its limit (ulimit -v)"
    if isinstance(error, ImportError):
        return f"{text}: {INSTALL}"
    if variables and any(f"{os.sep}jax{os.sep}" in file for file in files):
        return f"JAX does not start ({text}): the environment sets {variables}; unset what it does not take"
    return ""


_LEAST = {"RLIMIT_AS": ("ulimit -v", 2 * 2**30), "RLIMIT_DATA": ("ulimit -d", 650 * 10**6)}
"""{limit of the system: (how a shell sets it, bytes with which JAX starts on two cores)}. With less its libraries end
the process without naming the cause, or wait for a thread that does not exist."""


def _too_little_memory() -> str:
    """The sentence that names the limit of memory that is too low for JAX to start, with the remedy; "" if none is."""
    try:
        import resource
    except ImportError:  # a system without such limits
        return ""
    for name, (command, least) in _LEAST.items():
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and limit < least:
            return (
                f"this process may have {limit / 1e6:,.0f} MB of memory ({name}), and JAX does not start with less "
                f"than {least / 1e6:,.0f} MB: raise the limit ({command})"
            )
    return ""
