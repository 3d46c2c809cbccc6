"""Command lines and their flagfiles, as absl reads them."""

import os.path
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tljax.types import InputError

FLAGS = Path(__file__).parent / "flags"
"""The flagfiles that are shipped."""


def asks_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help, under any of absl's names for it."""
    names = {argument.lstrip("-").partition("=")[0] for argument in argv[1:]}
    return bool(names & {"help", "helpfull", "helpshort", "h"})


def read(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Read a command line and its flagfiles into `values`; raises InputError for what is no flag or no value of one."""
    try:
        rest = values(_found(argv))
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(" ".join(str(error).removeprefix("ERROR:: ").split())) from error
    if len(rest) > 1:
        raise InputError(f"'{rest[1]}' is no flag: write --NAME=VALUE; --helpfull lists the names")


def read_known(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Read what `values` knows of a command line; the rest of it. Raises InputError."""
    try:
        return values(_found(argv), known_only=True)
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(" ".join(str(error).removeprefix("ERROR:: ").split())) from error


def flagfile(name: str) -> str:
    """Where a flagfile is: at its path, or in the package under its name or its path in the checkout.

    >>> Path(flagfile("truths/noise.flags")).is_file(), flagfile("mine.flags")
    (True, 'mine.flags')
    """
    ours = FLAGS / name.removeprefix("experiments/flags/")
    return str(ours) if not os.path.exists(name) and os.path.isfile(ours) else name


def _found(argv: Sequence[str]) -> list[str]:
    parts = [argument.partition("=") for argument in argv]
    return [f"{flag}={flagfile(name)}" if flag == "--flagfile" else flag + eq + name for flag, eq, name in parts]
