"""Command lines and their flagfiles, as absl reads them."""

from collections.abc import Sequence

from absl import flags

from tljax.types import InputError


def asks_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help, under any of absl's names for it."""
    names = {argument.lstrip("-").partition("=")[0] for argument in argv[1:]}
    return bool(names & {"help", "helpfull", "helpshort", "h"})


def read(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Read a command line and its flagfiles into `values`; raises InputError for what is no flag or no value of one."""
    try:
        rest = values(list(argv))
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(" ".join(str(error).removeprefix("ERROR:: ").split())) from error
    if len(rest) > 1:
        raise InputError(f"'{rest[1]}' is no flag: write --NAME=VALUE; --helpfull lists the names")


def read_known(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Read what `values` knows of a command line; the rest of it. Raises InputError."""
    try:
        return values(list(argv), known_only=True)
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(" ".join(str(error).removeprefix("ERROR:: ").split())) from error
