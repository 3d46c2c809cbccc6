"""Command lines and their flagfiles: flags are the fields of dataclasses, and absl reads them."""

import dataclasses
import difflib
import glob
import os.path
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags

from tljax import plugins
from tljax.types import InputError

FLAGS = Path(__file__).parent.parent / "flags"
"""The flagfiles that are shipped."""
Form = TypeVar("Form")
HELP = ("help", "helpfull", "helpshort", "h")
"""All of absl's names for it."""
_DEFINE: Mapping[str, Callable[..., Any]] = {
    "bool": flags.DEFINE_bool,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "repeated": flags.DEFINE_multi_string,
}


def flag(default: Any, help: str, group: str = "", repeated: bool = False) -> Any:
    """A field of a dataclass that is a flag: its default, what it means and in which unit, and its theme."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "repeated": repeated})


def kinds(form: Any) -> dict[str, str]:
    """{flag: its type as written} of a dataclass; 'repeated' of one that may be given several times."""
    return {f.name: _kind(f) for f in dataclasses.fields(form) if f.metadata}


def _kind(f: dataclasses.Field) -> str:
    return "repeated" if f.metadata["repeated"] else str(f.type).removeprefix("<class '").removesuffix("'>")


def asks_help(argv: Sequence[str], names: Collection[str] = HELP) -> bool:
    """Whether a command line asks for help, by one of these names."""
    return any(_name(argument) in names for argument in argv[1:])


def _name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def typed(argv: Sequence[str]) -> set[str]:
    """The names of the flags on a command line itself, without those of its flagfiles.

    >>> sorted(typed(["compare", "--flagfile=a.flags", "--steps=50", "--nodry_run"]))
    ['nodry_run', 'steps']
    """
    return {_name(argument) for argument in argv[1:] if argument.startswith("-")} - {"flagfile"}


def read(argv: Sequence[str], form: type[Form]) -> Form:
    """The dataclass `form` of a command line and its flagfiles; raises InputError as `parse` does."""
    return form(**parse(argv, kinds(form)))


def parse(argv: Sequence[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """{flag: value} of those that a command line and its flagfiles give, of {flag: type}.

    Raises InputError for what is no flag, or no value of one.
    """
    values = flags.FlagValues()
    for name, kind in kinds.items():
        _DEFINE.get(kind.split(" ")[0], flags.DEFINE_string)(name, None, "", flag_values=values)
    try:
        _, *rest = values(_read_in(_found(argv)), known_only=True)  # absl takes long to find what is near
    except (flags.Error, ValueError) as error:
        raise InputError(_said(error)) from error
    if rest and rest[0].startswith("-") and _name(rest[0]):
        raise InputError(unknown(_name(rest[0]), kinds, argv))
    if rest:
        raise InputError(f"'{rest[0]}' is no flag: write --NAME=VALUE; --helpfull lists the names")
    return {name: _convert(name, kind, values[name].value) for name, kind in kinds.items() if values[name].present}


def _said(error: Exception) -> str:
    """What absl says of a value, in one line and without Python's words."""
    text = " ".join(str(error).removeprefix("ERROR:: ").split())
    text = re.sub(r"invalid literal for int\(\) .*", "write a whole number", text)
    return re.sub(r"could not convert string to float: .*", "write a number, such as 0.01 or 1e-2", text)


def _convert(name: str, kind: str, value: Any) -> Any:
    if kind == "repeated":
        return tuple(at_home(name, part) for part in value)
    value = at_home(name, value)
    if "tuple" not in kind:
        if value == "" and not name.endswith("penalty"):
            raise InputError(f"--{name}= is empty: give a value, or leave the flag out")
        return value
    parts = tuple(at_home(name, part.strip()) for part in plugins.split(value, ",") if part.strip())
    if "int" not in kind:
        return parts
    try:
        return tuple(number for part in parts for number in _whole(part))
    except ValueError as error:
        raise InputError(f"--{name}={value}: write whole numbers with commas between them, or as 0-29") from error


_DATA = ("source", "target", "targets", "dataset", "zoo")
"""Flags of data sets, whose names stay as they are written: `tljax.data` knows their home."""


def at_home(name: str, value: Any) -> Any:
    """The value of a flag, with what `~` or `~user` at its beginning stands for: a shell does not read it after `=`.

    Raises InputError where it stands for nothing.

    >>> at_home("workdir", "runs/~x"), at_home("steps", 3)
    ('runs/~x', 3)
    """
    if isinstance(value, tuple):
        return tuple(at_home(name, part) for part in value)
    if not isinstance(value, str) or not value.startswith("~") or name in _DATA:
        return value
    place = os.path.expanduser(value)
    if place.startswith("~"):
        raise InputError(
            f"--{name}={value}: there is no such user, or this one has no home: write an absolute path, or ./~ for a "
            "folder of that name"
        )
    return place


def _whole(part: str) -> Sequence[int]:
    """The whole numbers of '3', or of '0-29'."""
    first, dash, last = part.partition("-")
    if not dash or not first:
        return (int(part),)
    if int(last) - int(first) not in range(100_000):
        raise ValueError(part)
    return range(int(first), int(last) + 1)


def unknown(name: str, known: Iterable[str], argv: Sequence[str] = ()) -> str:
    """What is said of a flag that there is not: the flagfile it stands in, and the nearest or whose it is.

    >>> unknown("learning_rat", ["learning_rate", "epochs"]), unknown("zoo", ["seeds"])
    ('unknown flag --learning_rat: did you mean --learning_rate?', 'unknown flag --zoo: it is one of experiments.zoo')
    >>> unknown("lr", ["learning_rate", "lr_low"]), unknown("smoothing", ["label_smoothing"])
    ('unknown flag --lr: did you mean --learning_rate?', 'unknown flag --smoothing: did you mean --label_smoothing?')
    """
    close = _nearest(name, list(known))
    remedy = f"did you mean --{close}?" if close else "--helpfull lists what there is"
    if owner := _owners().get(name):
        remedy = f"it is one of experiments.{owner}"
    return f"unknown flag --{name}{_place(name, argv)}: {remedy}"


def _nearest(name: str, known: Sequence[str]) -> str:
    """The flag that a name is short for, or nearly is: by the first letters of its words, its spelling, its beginning,
    one of its words; "" if there is none."""
    prefix = "source_" if name.startswith("source_") else ""
    short = {flag: "".join(word[:1] for word in flag.removeprefix(prefix).split("_")) for flag in known}
    asked = name.removeprefix(prefix)
    initials = [flag for flag in known if flag.startswith(prefix) and len(asked) > 1 and short[flag] == asked]
    spelt = difflib.get_close_matches(name, [*known, *HELP], n=1)
    begins = [flag for flag in known if len(name) > 1 and flag.startswith(name)]
    words = [flag for flag in known if set(name.split("_")) & set(flag.split("_"))]
    return next(iter([*initials, *spelt, *begins, *sorted(words, key=len)]), "")


def _place(name: str, argv: Sequence[str]) -> str:
    for argument in argv[1:]:
        if argument.startswith(("--flagfile=", "-flagfile=")):
            lines = flags.FlagValues().read_flags_from_files(_found([argument]))
            if name in map(_name, lines):
                return f" in '{argument.partition('=')[2]}'"
    return ""


def _owners() -> dict[str, str]:
    """{flag: the program that has it}, by the text of their files."""
    found = {}
    for file in sorted(FLAGS.parent.rglob("*.py")):
        owner = "transfer" if file.stem == "options" else file.stem.removesuffix("_flags")
        for name in re.findall(r"^    (\w+): [^=\n]+ = flag\(", file.read_text(encoding="utf-8"), re.M):
            found[name] = owner
    return found


def to_flags(form: Any, leave: Collection[str] = ()) -> list[str]:
    """The flagfile lines that give a dataclass again, but for the flags to `leave` and those that are None."""
    lines = []
    for f in dataclasses.fields(form):
        value = getattr(form, f.name)
        if value is not None and f.name not in leave:
            lines += [f"--{f.name}={_written(one)}" for one in (value if f.metadata["repeated"] else (value,))]
    return lines


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


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


PATHS = (
    "source_checkpoint",
    "checkpoint",
    "runs",
    "results",
    "predictions",
    "sources",
    "tuned",
    "data_dir",
    "manual_dir",
)
"""Flags whose values are paths, however they are spelt."""
_NEW = ("workdir", "output", "storage", "compilation_cache", "study")
"""Flags that name what need not be there yet: their paths are from the working directory."""


def _read_in(argv: Sequence[str]) -> list[str]:
    """A command line with the lines of its flagfiles in their places, and their relative paths found.

    A path in a flagfile is sought from the working directory, and where it is not there from the flagfile's folder.
    """
    arguments: list[str] = []
    for argument in argv:
        flag_name, _, file = argument.partition("=")
        if flag_name not in ("--flagfile", "-flagfile") or not file:
            arguments.append(argument)
            continue
        folder = os.path.dirname(file)
        lines = flags.FlagValues().read_flags_from_files([argument])
        arguments += [_from_folder(line, folder) for line in lines] if folder else lines
    return arguments


def _from_folder(line: str, folder: str) -> str:
    """A line of a flagfile, with `folder` before the paths that are there and not in the working directory."""
    name, equals, value = line.partition("=")
    if not equals or _name(name) in _NEW:
        return line
    parts = []
    for part in plugins.split(value, ","):
        pieces = part.split(":")
        for i, piece in enumerate(pieces):
            certain = (_name(name) in PATHS and i == 0) or (i == 1 and pieces[0].strip() == "folder")
            pieces[i] = _joined(piece, folder, certain)
        parts.append(":".join(pieces))
    return f"{name}={','.join(parts)}"


def _joined(piece: str, folder: str, certain: bool) -> str:
    """A piece of a value, whose path is all of it or what is after a '='; only what is `certain` may be a bare word."""
    for before, path in (("", piece.strip()), *([piece.partition("=")[::2]] if "=" in piece else [])):
        if os.path.lexists(path) or os.path.isabs(path) or not (certain or "/" in path or os.path.splitext(path)[1]):
            continue
        there = os.path.join(folder, path)
        if path and (os.path.lexists(there) or glob.glob(there)):
            return f"{before}={there}" if before else there
    return piece
