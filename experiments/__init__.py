"""Programs: flags in, a run directory out. All input and output is here."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

INSTALL = "install it with python -m pip install 'tljax[experiments]', or '.[experiments]' in a checkout"
"""The remedy for a library that is not there, or cannot be loaded."""
_PARTS = (
    *("absl", "orbax", "scipy", "sklearn", "threadpoolctl"),
    *("rich", "jinja2", "matplotlib", "optuna", "tensorboardX"),
)
"""Modules of the extra `experiments`. Some are loaded when a run ends, and it would be late to miss them then; what
reads data sets is missed before anything is trained."""


def run_program(file: str) -> None:
    """Import the program of this file, run it, and end the process; what fails in its imports is said in a line.

    A program calls this before its other imports, where it is run and not imported: `python -m experiments.NAME`.
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
    """A sentence that names what is not installed, with the remedy; "" where nothing is missing."""
    missing = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    return f"there is no {', '.join(missing)}: {INSTALL}" if missing else ""


def _find_library() -> None:
    """Let `import tljax` find the library beside this package where a folder tljax of the working directory hides it.

    So it is in the folder that holds the checkout: its ./tljax has no __init__.py, and Python takes it for a package
    in parts. A whole package wins over such a one from anywhere on the path, so the end of the path will do.
    """
    spec = None if "tljax" in sys.modules else importlib.util.find_spec("tljax")
    beside = Path(__file__).resolve().parent.parent
    if spec and spec.origin is None and (beside / "tljax" / "__init__.py").is_file():
        sys.path.append(str(beside))


def _remedy(error: BaseException) -> str:
    """What can be done about an exception of the imports, in one line; "" for a fault of tljax's own."""
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
the process without a word of what is wrong, or wait for a thread that there is not."""


def _too_little_memory() -> str:
    """A sentence that says which limit of memory is too low for JAX to start, with the remedy; "" where none is."""
    try:
        import resource
    except ImportError:  # of a system without such limits
        return ""
    for name, (command, least) in _LEAST.items():
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and limit < least:
            return (
                f"this process may have {limit / 1e6:,.0f} MB of memory ({name}), and JAX does not start with less "
                f"than {least / 1e6:,.0f} MB: raise the limit ({command})"
            )
    return ""
