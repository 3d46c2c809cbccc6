"""Flags are the fields of dataclasses: `flag` describes one, `main` reads them for a program or prints its help.

A program's form is a dataclass of its own flags on top of the groups of `settings.py` that it needs; a group is a
dataclass too, and a program has no other flags. What is known of a flag (its default, its meaning, its bounds, what
becomes of it in a run directory) stands with the flag and nowhere else. absl parses the text.
"""

import ast
import dataclasses
import difflib
import functools
import glob
import os.path
import re
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar

from absl import flags as absl_flags

from tljax import files, plugins
from tljax.types import InputError

FLAGFILES = Path(__file__).parent.parent / "flags"
"""The folder of the flagfiles that are shipped."""
ORDER = (
    "pretrain",
    "zoo",
    "features",
    "rank",
    "search",
    "atlas",
    "check",
    "audit",
    "transfer",
    "compare",
    "card",
    "report",
    "merge",
    "export",
    "apply",
    "convert",
    "predict",
)
"""The programs in the order of a project; others come after them."""
HELP = ("help", "helpfull", "helpshort", "h")
"""The names by which help is asked for."""
Form = TypeVar("Form")
Role = Literal["decides", "grows", "free", "local"]
"""What becomes of a flag in a run directory, whose flags.flags has one value of it. Another value of a flag that
`decides` a result is another experiment, and is refused. A list that `grows` may get more entries from run to run. A
`free` one may change: it decides no bit of a result, or only which fits there are. A `local` one is of one process or
one call, and is not written."""
Place = Literal["", "data", "path", "new"]
"""Whether a value is a place: it names `data` sets (tljax.data knows their home), a `path` however it is spelt, or
something `new`, which need not be there yet; "" says nothing, and what looks like a path is taken for one."""


# ---- What a flag is


def flag(
    default: Any,
    help: str,
    *,
    role: Role = "decides",
    place: Place = "",
    repeated: bool = False,
    often: bool = False,
    choices: Sequence[str] = (),
    bounds: tuple[int, int | None] | None = None,
    neutral: Any = None,
) -> Any:
    """A field of a dataclass that is a flag: its default, what it means and in which unit.

    `repeated` flags may be given several times; short help has those that are used `often`. `choices` are all values
    that a text may have, `bounds` the least and the most of a whole number. `neutral` is the value under which results
    are as they were before there was the flag: then it enters no key, and old runs are of it.
    """
    about = {"help": help, "role": role, "place": place, "repeated": repeated, "often": often}
    return dataclasses.field(
        default=default, metadata={**about, "choices": choices, "bounds": bounds, "neutral": neutral}
    )


class Kind(NamedTuple):
    """How the text of a flag becomes a value."""

    type: Any
    """bool, int, float, str or tuple[..., ...]; a flag that may be None has the type that it has otherwise."""
    repeated: bool = False
    place: Place = ""
    empty: bool = False
    """Whether "" is a value."""


def kinds(form: type) -> dict[str, Kind]:
    """{flag: its kind} of a dataclass, those of a group with twins followed by these."""
    hints = typing.get_type_hints(form)
    result: dict[str, Kind] = {}
    for group, fields in _by_group(form).items():
        of_group = {f.name: _kind(hints[f.name], f) for f in fields}
        result |= of_group
        if twin := vars(group).get("TWIN", ""):
            result |= {twin + name: kind for name, kind in of_group.items()}
    return result


def _kind(hint: Any, f: dataclasses.Field) -> Kind:
    parts = [part for part in typing.get_args(hint) if part is not NoneType]
    optional = NoneType in typing.get_args(hint)
    return Kind(parts[0] if optional else hint, f.metadata["repeated"], f.metadata["place"], f.default == "")


def fields(form: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that are flags."""
    return [f for f in dataclasses.fields(form) if f.metadata]


def _by_group(form: type) -> dict[type, list[dataclasses.Field]]:
    """{class that declares them: flags} of a form, in the order in which its bases are written, its own last."""
    classes = [c for c in form.__mro__[1:] if dataclasses.is_dataclass(c)] + [form]
    of_class: dict[type, list[dataclasses.Field]] = {c: [] for c in classes}
    for f in fields(form):
        declaring = next(c for c in form.__mro__ if f.name in vars(c).get("__annotations__", ()))
        of_class[declaring].append(f)
    return {c: members for c, members in of_class.items() if members}


def own_flags(form: type) -> set[str]:
    """The flags that are a program's own, and of no group that programs share."""
    return {f.name for group, members in _by_group(form).items() if _is_own(group) for f in members}


def _is_own(group: type) -> bool:
    """Whether a class has flags of one program, and is no group that programs share."""
    return "THEME" not in vars(group)


def flagfile_lines(form: Any, leave: Collection[str] = ()) -> list[str]:
    """The flagfile lines that give a program's own flags again, but for those to `leave`, local ones and None."""
    names = own_flags(type(form)) - {*leave}
    lines = []
    for f in fields(form):
        value = getattr(form, f.name)
        if f.name in names and value is not None and f.metadata["role"] != "local":
            lines += [f"--{f.name}={_written(part)}" for part in (value if f.metadata["repeated"] else (value,))]
    return lines


def _written(value: Any) -> str:
    """A value as own flags are written; the files of older runs are compared with it as text, so it stays so."""
    if isinstance(value, tuple):
        texts = map(str, value)
        return ",".join(text if plugins.split(f"{text},", ",") == [text, ""] else f'"{text}"' for text in texts)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


# ---- The main of all programs


def main(
    argv: Sequence[str],
    about: str,
    run: Callable[[dict[str, Any], Any], Any],
    form: type,
    refused: Collection[str] = (),
) -> None:
    """Read a command line and `run`, or print the help that it asks for.

    `about` is the program's docstring. `run` gets what `read` gives. Help is silent of flags that the program reads to
    say in its own words why they are `refused`. Raises InputError.
    """
    if asks_help(argv):
        print(help_text(about, form, refused, full=asks_help(argv, ["helpfull"])))
        return
    try:
        run(*read(argv, form))
    except InputError as error:
        if folders := _sought(str(error), argv, kinds(form)):
            text = ", from ".join(f"'{folder}'" for folder in folders)
            raise InputError(
                f"{error} (a path in a flagfile: sought from the working directory, from {text})"
            ) from error
        raise


def read(argv: Sequence[str], form: type[Form]) -> tuple[dict[str, Any], Form]:
    """({flag: value} of the shared groups' flags that are given, the form) of a command line and its flagfiles.

    In a flagfile, which programs may share, flags of experiments.transfer that the form has not are passed over. A
    form's ARGUMENT is the flag that a first word without dashes is of. Raises InputError as `parse` does.
    """
    known = kinds(form)
    if (name := vars(form).get("ARGUMENT", "")) and len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], f"--{name}={argv[1]}", *argv[2:]]
    alone = own_flags(form) == known.keys()
    values = parse(argv, known, () if alone else of_programs()["transfer"].keys() - known.keys())
    names, own_names = {f.name for f in fields(form)}, own_flags(form)
    filled = form(**{name: value for name, value in values.items() if name in names})
    return {name: value for name, value in values.items() if name not in own_names}, filled


def parse(argv: Sequence[str], kinds: Mapping[str, Kind], pass_over: Collection[str] = ()) -> dict[str, Any]:
    """{flag: value} of those that a command line and its flagfiles give, of {flag: kind}.

    Flags to `pass_over` are skipped in flagfiles. Raises InputError for an unknown flag, and for a text that is no
    value of its flag.
    """
    values = absl_flags.FlagValues()
    for name, kind in kinds.items():
        _define(kind)(name, None, "", flag_values=values)
    try:
        arguments = _expanded(_with_paths(argv), kinds, pass_over)
        _, *rest = values(arguments, known_only=True)  # of an unknown flag absl is slow to find the nearest
    except InputError:
        raise
    except (absl_flags.Error, ValueError) as error:
        raise InputError(_words_of_absl(error)) from error
    if rest and rest[0].startswith("-") and _name(rest[0]):
        raise InputError(unknown(_name(rest[0]), kinds, argv))
    if rest:
        raise InputError(f"'{rest[0]}' is no flag: write --NAME=VALUE; --helpfull lists the names")
    return {name: _convert(name, kind, values[name].value) for name, kind in kinds.items() if values[name].present}


def _define(kind: Kind) -> Callable[..., Any]:
    """absl's definition of a flag. Its enums and bounds are not used: the same refusals must meet values that a caller
    in Python, a search or a run directory gives, so `settings.py` checks them wherever they are from."""
    if kind.repeated:
        return absl_flags.DEFINE_multi_string
    by_type: dict[Any, Callable[..., Any]] = {
        bool: absl_flags.DEFINE_bool,
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
    }
    return by_type.get(kind.type, absl_flags.DEFINE_string)


def typed(argv: Sequence[str]) -> set[str]:
    """The names of the flags on a command line itself, without those of its flagfiles.

    >>> sorted(typed(["compare", "--flagfile=a.flags", "--steps=50", "--nodry_run"]))
    ['nodry_run', 'steps']
    """
    return {_name(argument) for argument in argv[1:] if argument.startswith("-")} - {"flagfile"}


def asks_help(argv: Sequence[str], names: Collection[str] = HELP) -> bool:
    """Whether a command line asks for help, by one of these names."""
    return any(_name(argument) in names for argument in argv[1:])


def in_flags(error: InputError, prefix: str = "") -> str:
    """What an error says, its field and the arguments that it names in backquotes written as flags.

    `prefix` goes before their names: 'source_' where they are those of the source's fit.

    >>> in_flags(InputError("it is above 1", field="momentum", value=2.0), "source_")
    '--source_momentum=2.0: it is above 1'
    >>> in_flags(InputError("give another `data_dir=`, or `image_shape=8,8,1`"))
    'give another --data_dir, or --image_shape=8,8,1'
    """
    text = re.sub(r"`(\w+)(=[^`]*)`", lambda name: f"--{prefix}{name[1]}{name[2].removesuffix('=')}", error.message)
    return f"--{prefix}{error.field}={error.value}: {text}" if error.field else text


def flag_renamed(error: InputError, flag: str, name: str) -> InputError:
    """An error that names a flag by the name that another program has for it.

    >>> str(flag_renamed(InputError("--source_checkpoint=x is a file"), "source_checkpoint", "checkpoint"))
    '--checkpoint=x is a file'
    """
    return InputError(re.sub(rf"--{flag}\b", f"--{name}", in_flags(error)))


def _name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def _words_of_absl(error: Exception) -> str:
    """What absl says of a value, in one line and without Python's words."""
    text = " ".join(str(error).removeprefix("ERROR:: ").split())
    text = re.sub(r"invalid literal for int\(\) .*", "write a whole number", text)
    return re.sub(r"could not convert string to float: .*", "write a number, such as 0.01 or 1e-2", text)


def _convert(name: str, kind: Kind, value: Any) -> Any:
    """The value of a flag from what absl reads; raises InputError for a text that is none."""
    if kind.repeated:
        return tuple(at_home(name, kind, part) for part in value)
    value = at_home(name, kind, value)
    if typing.get_origin(kind.type) is not tuple:
        if value == "" and not kind.empty:
            raise InputError(f"--{name}= is empty: give a value, or leave the flag out")
        return value
    parts = tuple(at_home(name, kind, part.strip()) for part in plugins.split(value, ",") if part.strip())
    if int not in typing.get_args(kind.type):
        return tuple(map(plugins.unquoted, parts)) if kind.place == "path" else parts
    try:
        return tuple(number for part in parts for number in _whole_numbers(part))
    except ValueError as error:
        form = "write whole numbers with commas between them, or as 0-29"
        raise InputError(f"--{name}={value}: {form}, at most {_MOST_OF_A_RANGE:,} of them") from error


_MOST_OF_A_RANGE = 100_000
"""Whole numbers, which a range such as 0-29 stands for at most."""


def _whole_numbers(part: str) -> Sequence[int]:
    """The whole numbers of '3', or of '0-29'."""
    first, dash, last = part.partition("-")
    if not dash or not first:
        return (int(part),)
    if int(last) - int(first) not in range(_MOST_OF_A_RANGE):
        raise ValueError(part)
    return range(int(first), int(last) + 1)


def at_home(name: str, kind: Kind, value: Any) -> Any:
    """The value of a flag, with what `~` or `~user` at its beginning stands for: a shell does not read it after `=`.

    Raises InputError where it stands for nothing.

    >>> at_home("workdir", Kind(str, place="new"), "runs/~x"), at_home("source", Kind(str, place="data"), "~/x.npz")
    ('runs/~x', '~/x.npz')
    """
    if isinstance(value, tuple):
        return tuple(at_home(name, kind, part) for part in value)
    if not isinstance(value, str) or not value.startswith("~") or kind.place == "data":
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise InputError(
            f"--{name}={value}: there is no such user, or this one has no home: write an absolute path, or ./~ for a "
            "folder of that name"
        )
    return path


# ---- Flags that there are not


def unknown(name: str, known: Iterable[str], argv: Sequence[str] = ()) -> str:
    """What is said of an unknown flag: the flagfile that it stands in, and the nearest flag or whose it is.

    >>> unknown("learning_rat", ["learning_rate", "epochs"]), unknown("zoo", ["seeds"])
    ('unknown flag --learning_rat: did you mean --learning_rate?', 'unknown flag --zoo: it is one of experiments.zoo')
    >>> unknown("lr", ["learning_rate", "lr_low"]), unknown("smoothing", ["label_smoothing"])
    ('unknown flag --lr: did you mean --learning_rate?', 'unknown flag --smoothing: did you mean --label_smoothing?')
    """
    close = _nearest(name, list(known))
    remedy = f"did you mean --{close}?" if close else "--helpfull lists what there is"
    if owner := next((program for program, flags in of_programs().items() if name in flags), ""):
        remedy = f"it is one of experiments.{owner}"
    return f"unknown flag --{name}{_flagfile_of(name, argv)}: {remedy}"


def _nearest(name: str, known: Sequence[str]) -> str:
    """The flag that a name is short for, or nearly is: by the first letters of its words, as one of its words, by its
    spelling, its beginning, words that both have; "" if there is none. Of several the shortest."""
    prefix = "source_" if name.startswith("source_") else ""
    short = {flag: "".join(word[:1] for word in flag.removeprefix(prefix).split("_")) for flag in known}
    rest = name.removeprefix(prefix)
    initials = [flag for flag in known if flag.startswith(prefix) and len(rest) > 1 and short[flag] == rest]
    spelt = difflib.get_close_matches(name, [*known, *HELP], n=1)
    begins = [flag for flag in known if len(name) > 1 and flag.startswith(name)]
    whole = [flag for flag in known if name in flag.split("_")]
    words = [flag for flag in known if set(name.split("_")) & set(flag.split("_"))]
    ranked = [*sorted(initials, key=len), *sorted(whole, key=len), *spelt, *begins, *sorted(words, key=len)]
    return next(iter(ranked), "")


def _flagfile_of(name: str, argv: Sequence[str]) -> str:
    for argument in argv[1:]:
        if argument.startswith(("--flagfile=", "-flagfile=")):
            lines = _lines(_with_paths([argument])[0].partition("=")[2])
            if name in map(_name, lines):
                return f" in '{argument.partition('=')[2]}'"
    return ""


@functools.cache
def of_programs() -> dict[str, dict[str, Role]]:
    """{program: {flag: its role}}, experiments.transfer first and then in the order of a project.

    A form is known by its name: that of experiments.transfer is TransferFlags. The files are read and not imported,
    since a program loads what only it needs, and since no program imports another.
    """
    classes: dict[str, ast.ClassDef] = {}
    for file in [*FLAGFILES.parent.glob("*.py"), *Path(__file__).parent.glob("*.py")]:
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    names = sorted(programs(), key=lambda name: name != "transfer")
    forms = {name: f"{name.title().replace('_', '')}Flags" for name in names}
    return {name: _roles(form, classes) for name, form in forms.items() if form in classes}


@functools.cache
def may_differ() -> frozenset[str]:
    """The flags that may have other values in runs of one run directory, whichever program they are of."""
    roles = {name: role for flags in of_programs().values() for name, role in flags.items()}
    return frozenset(name for name, role in roles.items() if role in ("grows", "free"))


def _roles(form: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, Role]:
    """{flag: its role} of a class and its bases, by the text of their declarations."""
    node = classes[form]
    names = [base.attr if isinstance(base, ast.Attribute) else ast.unparse(base) for base in node.bases]
    bases = [name for name in names if name in classes]
    roles = {name: role for base in bases for name, role in _roles(base, classes).items()}
    declared: dict[str, Role] = {}
    twin = ""
    for part in node.body:
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
            continue
        if part.target.id == "TWIN" and isinstance(part.value, ast.Constant):
            twin = str(part.value.value)
        elif isinstance(part.value, ast.Call) and ast.unparse(part.value.func) == "flag":
            keywords = {keyword.arg: keyword.value for keyword in part.value.keywords}
            declared[part.target.id] = ast.literal_eval(keywords["role"]) if "role" in keywords else "decides"
    return {**roles, **declared, **({twin + name: role for name, role in declared.items()} if twin else {})}


# ---- Flagfiles


def flagfile(name: str) -> str:
    """Where a flagfile is: at its path, or in the package under its name or its path in the checkout.

    >>> Path(flagfile("truths/noise.flags")).is_file(), flagfile("mine.flags")
    (True, 'mine.flags')
    """
    shipped = FLAGFILES / name.removeprefix("experiments/flags/")
    return str(shipped) if not os.path.exists(name) and os.path.isfile(shipped) else name


def _with_paths(argv: Sequence[str]) -> list[str]:
    """A command line with the paths of its flagfiles."""
    parts = [argument.partition("=") for argument in argv]
    return [f"{flag}={flagfile(name)}" if flag == "--flagfile" else flag + eq + name for flag, eq, name in parts]


def _expanded(argv: Sequence[str], kinds: Mapping[str, Kind], pass_over: Collection[str]) -> list[str]:
    """A command line with the lines of its flagfiles in their places, and their relative paths found.

    A path in a flagfile is sought from the working directory, where it is not there from the flagfile's folder, and
    then from where the run began that wrote the flagfile.
    """
    arguments: list[str] = []
    skipped = {*pass_over, *(f"no{name}" for name in pass_over)}
    for argument in argv:
        flag_name, _, file = argument.partition("=")
        if flag_name not in ("--flagfile", "-flagfile") or not file:
            arguments.append(argument)
            continue
        folders = _folders(file)
        lines = [line for line in _lines(file) if _name(line) not in skipped]
        arguments += [_from_folders(line, folders, kinds) for line in lines]
    return arguments


def _unescaped(line: str) -> str:
    r"""A line of a flagfile with the bytes that `files.to_bytes` wrote as \\udcff, since they are no UTF-8.

    >>> _unescaped("--target=caf\\udce9.npz") == "--target=caf\udce9.npz"
    True
    """
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), line)


def _lines(flagfile: str, above: tuple[str, ...] = ()) -> list[str]:
    """The flags of a flagfile and of those that it names, without comments.

    Byte order marks that editors put before text are left out; `above` are the flagfiles that named this one after such
    a mark. Raises InputError for a file that is not in UTF-8, and for one that cannot be opened.
    """
    _require_utf8(Path(flagfile), set())
    try:
        texts = absl_flags.FlagValues().read_flags_from_files([f"--flagfile={flagfile}"])
    except absl_flags.Error as error:
        raise InputError(_words_of_absl(error)) from error
    lines = []
    for line in texts:
        text = line.removeprefix("\ufeff").strip()
        if text == line:
            lines.append(_unescaped(line))
        elif text.startswith(("--flagfile=", "-flagfile=")) and text not in above:
            lines += _lines(text.partition("=")[2], (*above, text))
        elif text and not text.startswith(("#", "//")):
            lines.append(_unescaped(text))
    return lines


def _require_utf8(flagfile: Path, seen: set[Path]) -> None:
    if flagfile in seen or not flagfile.is_file():  # what is missing absl says, and names
        return
    seen.add(flagfile)
    for line in files.text(flagfile).splitlines():
        if line.startswith(("--flagfile=", "-flagfile=")):
            _require_utf8(Path(line.partition("=")[2].strip()).expanduser(), seen)


PATHS_FROM = "# paths are from "
"""How the comment of a flagfile begins that says in which working directory its paths were written."""


def written_from(file: str | os.PathLike[str]) -> list[str]:
    """The working directories in which the paths of a run's flagfile were written; none where it does not say."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            folders = [line.strip().removeprefix(PATHS_FROM) for line in lines if line.startswith(PATHS_FROM)]
    except OSError:
        return []
    return folders[::-1]


def _folders(file: str) -> list[str]:
    """The folders beside the working directory from which the paths in a flagfile are sought."""
    folder = os.path.dirname(file)
    return [*([folder] if folder else []), *written_from(file)]


def _from_folders(line: str, folders: Sequence[str], kinds: Mapping[str, Kind]) -> str:
    """A line of a flagfile, its paths after the first folder in which they are, if not in the working directory."""
    return _path_pieces(line, kinds, lambda piece, certain: _joined(piece, folders, certain))


def _sought(text: str, argv: Sequence[str], kinds: Mapping[str, Kind]) -> list[str]:
    """From where a path was sought that a flagfile gives, that is nowhere, and that the text of an error names."""
    missing: list[str] = []

    def note(piece: str, certain: bool) -> str:
        for path in map(plugins.unquoted, (piece.strip(), piece.partition("=")[2])):
            named = path and any(mark + path in text for mark in ("'", "="))
            if named and _is_path(path, certain) and not os.path.lexists(path):
                missing.append(path)
        return piece

    for argument in _with_paths(argv):
        flag_name, _, file = argument.partition("=")
        if flag_name in ("--flagfile", "-flagfile") and os.path.isfile(file):
            folders = _folders(file)
            for line in _lines(file):
                _path_pieces(_from_folders(line, folders, kinds), kinds, note)
            if missing:
                return folders
    return []


def _path_pieces(line: str, kinds: Mapping[str, Kind], change: Callable[[str, bool], str]) -> str:
    """A line of a flagfile after a `change` of each piece of its value that may be a path; True of one that is one."""
    name, equals, value = line.partition("=")
    place = kinds[_name(name)].place if _name(name) in kinds else ""
    if not equals or place == "new":
        return line
    parts = []
    for part in plugins.split(value, ","):
        pieces = plugins.split(part, ":")
        for i, piece in enumerate(pieces):
            certain = (place == "path" and i == 0) or (i == 1 and pieces[0].strip() == "folder")
            pieces[i] = change(piece, certain)
        parts.append(":".join(pieces))
    return f"{name}={','.join(parts)}"


def _joined(piece: str, folders: Sequence[str], certain: bool) -> str:
    """A piece of a value, whose path is all of it or what is after a '='; only what is `certain` may be a bare word."""
    halves = [piece.partition("=")[::2]] if "=" in piece and not piece.startswith('"') else []
    for before, written in (("", piece.strip()), *halves):
        path = plugins.unquoted(written)
        if os.path.lexists(path) or not _is_path(path, certain):
            continue
        if path and (joined := path_from_folders(path, folders)):
            joined = plugins.quoted(joined) if path == written else f'"{joined}"'
            return f"{before}={joined}" if before else joined
    return piece


def _is_path(text: str, certain: bool) -> bool:
    """Whether a text is taken for a relative path."""
    return not os.path.isabs(text) and (certain or "/" in text or bool(os.path.splitext(text)[1]))


def path_from_folders(path: str, folders: Sequence[str]) -> str:
    """A relative path after the first of the folders in which it is; "" where it is in none."""
    for folder in folders:
        joined = os.path.join(folder, path)
        if os.path.lexists(joined) or glob.glob(joined):
            plain = os.path.normpath(joined)
            return plain if os.path.isabs(folder) and os.path.lexists(plain) else joined
    return ""


# ---- Help


def help_text(about: str, form: type, refused: Collection[str] = (), full: bool = True) -> str:
    """A program's help: what it is, an example, its own flags, and those of the shared groups by theme."""
    groups = _by_group(form)
    shared = any(not _is_own(group) for group in groups)
    full = full or not shared
    lines = [about.strip(), ""]
    for title, members in _themes(groups, refused, full).items():
        lines += [f"{title}:", *(line for f in members for line in _described(f))]
        if full and {"strategy", "strategies"} & {f.name for f in members}:
            lines += [f"      {name:<18} {line}" for name, line in strategies().items()]
        lines += [""]
    if not full:
        lines += ["--helpfull has all flags, by theme."]
    if "flagfile" not in kinds(form):
        lines += [
            "--flagfile=FILE reads flags from a file, one a line; what comes later counts. Paths in it are sought",
            "from the working directory, where they are not there from the folder of the file, and then from where the",
            "run began that wrote it.",
        ]
    if shared and full and of_programs()["transfer"].keys() - kinds(form).keys():
        lines += ["Flagfiles can be shared: in one, flags of experiments.transfer that are not listed are passed over."]
    return "\n".join(lines)


def _themes(
    groups: Mapping[type, Sequence[dataclasses.Field]], refused: Collection[str], full: bool
) -> dict[str, list[dataclasses.Field]]:
    """{title: flags}: the program's own, then those of the groups; of these all by theme, or those used often."""
    themes: dict[str, list[dataclasses.Field]] = {"Its own flags": []}
    for group, members in groups.items():
        if _is_own(group):
            themes["Its own flags"] += members
            continue
        title = vars(group)["THEME"] if full else "Most used of experiments.transfer's"
        listed = [f for f in members if f.name not in refused and (full or f.metadata["often"])]
        themes.setdefault(title, []).extend(listed)
    return {title: members for title, members in themes.items() if members}


def _described(f: dataclasses.Field) -> Iterator[str]:
    """The lines of one flag: its name, what it means, its default."""
    default, text = f.default, f.metadata["help"]
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if isinstance(default, bool):
        default = str(default).lower()
    if "default" not in text and "needed" not in text:
        text += f" (default {'none' if default in (None, '') else default})"
    first, *rest = textwrap.wrap(text, 86)
    yield f"  --{f.name:<18} {first}"
    for line in rest:
        yield " " * 23 + line


def strategies() -> dict[str, str]:
    """{name: first line of its docstring} of the strategies' folder, without importing them."""
    import tljax.strategies as folder

    place = Path(folder.__path__[0])
    return {name: _first_line(place / f"{name}.py") for name in plugins.names("tljax.strategies", "strategy")}


def programs() -> dict[str, str]:
    """{name: first line of its docstring} of all programs, in the order of a project, without importing them."""
    place = FLAGFILES.parent
    names = plugins.names("experiments", "main")
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: _first_line(place / f"{name}.py") for name in names}


def _first_line(file: Path) -> str:
    try:
        text = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        return f"cannot be read: {error.msg} ({file.name}:{error.lineno})"
    return (text or "").split("\n")[0]
