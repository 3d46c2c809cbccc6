"""The one little grammar, `name:option=value`, and what the name stands for.

A name is a file of one of our folders (`last_k`), a `package.module:attribute`, or a `file.py:attribute`. What has a
":", "=" or "," of its own, or a bracket without its other half, stands in double quotes: `folder:"/data/a:b"`.
"""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import symtable
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from tljax import files, switches
from tljax.types import InputError, Method, Metric


class Spec(NamedTuple):
    """A parsed `name:word:option=value`."""

    name: str
    words: tuple[str, ...] = ()
    options: Mapping[str, str] = {}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names nearest to `name`.

    >>> nearest("heed_only", ["scratch", "head_only"])
    "; nearest: 'head_only'"
    """
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if close:
        return "; nearest: " + ", ".join(repr(c) for c in close)
    return "; known: " + ", ".join(sorted(known)) if known else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, if one is near.

    >>> closest("heed_only", ["scratch", "head_only"]), closest("x", ["scratch"])
    ('head_only', None)
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a slip of: another case, order or number of its words, or a letter or two.

    None for a name that is known, and for one that is none's slip. Letters are counted as Damerau and Levenshtein do:
    one that is missing, added, another or exchanged with its neighbour.

    >>> meant("train_group", ["train_groups"]), meant("groups_train", ["train_groups"]), meant("X_train", ["x_train"])
    ('train_groups', 'train_groups', 'x_train')
    >>> meant("train_names", ["train_images"]), meant("train_images", ["train_images"])
    (None, None)
    """
    known = list(known)
    if name in known:
        return None
    for other in known:
        if sorted(_stems(other)) == sorted(_stems(name)):
            return other
    letters = re.sub(r"[\W_]+", "", name.lower())
    counts = {other: _slips(letters, re.sub(r"[\W_]+", "", other.lower())) for other in known}
    near = min(counts, key=lambda other: counts[other], default=None)
    return near if near is not None and counts[near] <= (2 if len(letters) > 8 else 1) else None


def _stems(name: str) -> list[str]:
    """The words of a name in small letters, without the ending of a plural."""
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
    return [re.sub("s$", "", re.sub("ies$", "y", word)) or word for word in words]


def _slips(a: str, b: str) -> int:
    """How many letters part two texts: Damerau 1964, "A technique for computer detection and correction of spelling
    errors"."""
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            least = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                least = min(least, before[j - 2] + 1)
            row.append(least)
        before, last = last, row
    return last[-1]


def split(text: str, separator: str) -> list[str]:
    """`text` cut at `separator` (one character), but not inside brackets or double quotes, which stay.

    A quote opens at the beginning, after a separator of the grammar or a blank, if another follows to close it.

    >>> split("cifar10:train=train[:80%],mnist", ",")
    ['cifar10:train=train[:80%]', 'mnist']
    >>> split('folder:"/data/a:b":invert', ":")
    ['folder', '"/data/a:b"', 'invert']
    """
    parts, depth, quoted = [""], 0, False
    for i, character in enumerate(text):
        if character == '"':
            quoted = not quoted and text[i - 1 : i] in ("", *":=, ") and '"' in text[i + 1 :]
        if not quoted:
            depth += (character in "[({") - (character in "])}")
        if character == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def unquoted(text: str) -> str:
    """What stands between double quotes, or the text itself where it does not stand in them.

    >>> unquoted('"a:b"'), unquoted("a"), unquoted('"')
    ('a:b', 'a', '"')
    """
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def quoted(text: str) -> str:
    """The text, in double quotes where `parse` or a list would cut it.

    >>> quoted("a:b.npz"), quoted("a.npz")
    ('"a:b.npz"', 'a.npz')
    """
    return text if all(split(text + cut, cut) == [text, ""] for cut in ":,") else f'"{text}"'


def in_quotes(parts: Sequence[str]) -> str:
    """The end of an error message, where some of the parts, with ":" between them, are a path that is there.

    >>> in_quotes(["folder", "mnist"])
    ''
    """
    for last in range(2, len(parts) + 1):
        if os.path.lexists(path := ":".join(parts[:last])):
            return f"; a path with a ':' stands in double quotes: \"{path}\""
    return ""


def parse(text: str) -> Spec:
    """Read `name:word:option=value`; raise InputError where it is not of that form.

    Name and words are without the double quotes in which they may stand; values of options keep theirs.

    >>> parse("mine.py:strategy:k=2")
    Spec(name='mine.py', words=('strategy',), options={'k': '2'})
    >>> parse('folder:"/data/a:b=c"').words
    ('/data/a:b=c',)
    """
    name, *rest = (part.strip() for part in split(text, ":"))
    words: list[str] = []
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = (unquoted(part), "", "") if part.startswith('"') else part.partition("=")
        if not part or not key or (equals and not value):
            raise InputError(f"'{text}' is not of the form name:option=value: see '{part}'")
        if key in options:
            raise InputError(f"'{text}' gives option '{key}' twice: keep one")
        if equals:
            options[key] = value
        else:
            words.append(key)
    if not unquoted(name):
        raise InputError(f"'{text}' has no name before its options: write name:option=value")
    return Spec(unquoted(name), tuple(words), options)


def named(text: str) -> tuple[str, str]:
    """(name, spec) of a strategy, from NAME=SPEC or SPEC; without a name it is "".

    A path may have a "=" too: what has a "/" before it, or is a file with it, is no name. Raises InputError for a name
    that is a strategy's of tljax, or has other characters than letters, digits, '_', '-', '.' and '+'.

    >>> named("LN_QV=mine.py:strategy:k=2"), named("last_k:k=2")
    (('LN_QV', 'mine.py:strategy:k=2'), ('', 'last_k:k=2'))
    """
    first = split(text, ":")[0]
    name, equals = (part.strip() for part in first.partition("=")[:2])
    if not equals or "/" in name or name.startswith('"') or Path(first.strip()).is_file():
        return "", text
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"'{text}': '{name}' is no name: letters, digits, '_', '-', '.' and '+' may be in one")
    if name in ("pretrain", *names("tljax.strategies", "strategy")):
        raise InputError(f"'{text}': '{name}' is a strategy's own name: choose another")
    spec = text.partition("=")[2].strip()
    if not spec:
        raise InputError(f"'{text}' names no strategy: write {name}=mine.py:strategy")
    return name, spec


def called(text: str) -> str:
    """What a strategy in a list of them is called: its name if it has one, else its spec as it stands.

    >>> called("LN_QV=mine.py:strategy:k=2"), called("last_k:k=2")
    ('LN_QV', 'last_k:k=2')
    """
    name, spec = named(text)
    return name or spec


def bind(
    function: Callable[..., Any], options: Mapping[str, str], what: str, excluded: Iterable[str] = ()
) -> dict[str, Any]:
    """The options of a spec as keyword arguments of `function`, converted by its annotations.

    Options are the parameters that are keyword-only or have a default; `given` names those that are none.
    Raises InputError for an option that the function does not take, or a value of the wrong type.

    >>> bind(lambda params, *, k=1: None, {"k": "2"}, "strategy 'last_k'")
    {'k': 2}
    """
    parameters = {
        p.name: p
        for p in _parameters(function, what).values()
        if p.name not in excluded and (p.kind is p.KEYWORD_ONLY or p.default is not p.empty)
    }
    for name in options.keys() - parameters.keys():
        known = nearest(name, parameters) or "; it takes none"
        raise InputError(f"{what} has no option '{name}'{known}")
    for p in parameters.values():
        if p.default is p.empty and p.name not in options:
            raise InputError(f"{what} needs option '{p.name}': write {p.name}=VALUE after its name")
    return {name: _convert(value, parameters[name], what) for name, value in options.items()}


def _convert(text: str, parameter: inspect.Parameter, what: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    wanted = parameter.annotation
    if wanted not in (int, float, bool, str) and type(parameter.default) in (int, float, bool, str):
        wanted = type(parameter.default)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is str:
        value = text
    if wanted in (int, float, bool, str) and type(value) is not wanted:
        raise InputError(f"option '{parameter.name}' of {what} is {wanted.__name__}, not '{text}'")
    return value


def _parameters(function: Callable[..., Any], what: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function; annotations that are strings are read, but for names that are not imported."""
    names = getattr(sys.modules.get(_origin(function).__module__), "__dict__", {})

    def read(p: inspect.Parameter) -> inspect.Parameter:
        try:
            return p.replace(annotation=eval(p.annotation, dict(names))) if isinstance(p.annotation, str) else p
        except NameError:
            return p
        except Exception as error:
            raise InputError(
                f"{what}: '{p.name}: {p.annotation!r}' is no annotation of a type: {describe(error)}"
            ) from error

    return {p.name: read(p) for p in _signature(function, what).values()}


def _signature(function: Callable[..., Any], what: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} has no signature to read: write a function in Python around it") from error


def taken(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a function takes: all of them if it ends in `**options`.

    >>> taken(lambda params, *, k: None, {"k": 2, "n": 3}), taken(lambda params, **options: None, {"n": 3})
    ({'k': 2}, {'n': 3})
    """
    parameters = _signature(function, f"function '{getattr(function, '__name__', function)}'")
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in options.items() if every or name in parameters}


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name.

    >>> takes(lambda params, key, context: params, "context")
    True
    """
    return name in _signature(function, f"function '{getattr(function, '__name__', function)}'")


def describe(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """An exception of somebody else's code in one line: its type, its words, and the last line of code it passed.

    With the `function` that was called it is the last line of that function's file, or, where it was not even entered,
    as its parameters are others, the line that defines it. Options that are bound to it and decorators are looked
    through, and an object stands for its `__call__`. Of a text that does not parse it is the line of the text, and no
    line of this file is one of theirs.

    >>> describe(KeyError("kernel"))
    "KeyError: 'kernel'"
    """
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        line = f":{error.lineno}" if error.lineno else ""
        return f"{type(error).__name__}: {words(error.msg)[:300]} ({error.filename}{line})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(code := getattr(_plain(function), "__code__", None), CodeType):
        inside = [frame for frame in frames if frame.filename == code.co_filename]
        where = f" ({code.co_filename}:{inside[-1].lineno if inside else code.co_firstlineno})"
    return f"{type(error).__name__}: {words(error)[:300]}{where}"


def _plain(function: Any) -> Any:
    """The function behind partial arguments, decorators that say what they wrap, and an object that can be called."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif function is not None and not hasattr(function, "__name__") and callable(function):
            return inspect.unwrap(type(function).__call__)
        else:
            return function


def words(value: Any, write: Callable[[Any], str] = str) -> str:
    """What an exception or another value of somebody else's says, in one line; its class where it fails to say it.

    >>> words(ValueError("two\\n lines"))
    'two lines'
    """
    try:
        return " ".join(write(value).split())
    except Exception:
        return f"of the class {type(value).__name__}"


def shown(value: Any) -> str:
    """The same of its `repr`, at most 80 characters.

    >>> shown("two lines")
    "'two lines'"
    """
    return words(value, repr)[:80]


def names(package: str, kind: str) -> list[str]:
    """The files of a folder of plugins that define or import the function `kind`, without importing them.

    >>> "head_only" in names("tljax.strategies", "strategy")
    True
    """
    spec = importlib.util.find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or ()
    files = [file for place in places for file in Path(place).glob("*.py")]
    return sorted(file.stem for file in files if _binds(file.read_bytes(), kind))


def _binds(text: bytes, name: str) -> bool:
    """Whether a module gives a value to a name; one that cannot be read might."""
    try:
        symbols = symtable.symtable(text, "", "exec").get_symbols()  # type: ignore[arg-type]  # takes bytes
    except SyntaxError:
        return name.encode() in text
    return any(s.get_name() == name and (s.is_assigned() or s.is_imported()) for s in symbols)


def module(spec: Spec, package: str, kind: str) -> ModuleType:
    """The module that a spec's name stands for: one of `package`, a dotted path, or a file.

    Raises InputError where there is none; `kind` is the word for it in the message.
    """
    if spec.name.endswith(".py"):
        return _from_file(Path(spec.name), kind)
    if "." in spec.name:
        return _import(spec.name, f"{kind} '{spec.name}'")
    known = names(package, kind)
    if spec.name not in known:
        remedy = in_quotes([spec.name, *spec.words]) or nearest(spec.name, known)
        raise InputError(f"unknown {kind} '{spec.name}'{remedy}")
    return _import(f"{package}.{spec.name}", f"{kind} '{spec.name}'")


def _import(name: str, what: str) -> ModuleType:
    try:
        with switches.guarded(what):
            return importlib.import_module(name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} cannot be imported: {describe(error)}{_remedy(error)}") from error


def _remedy(error: BaseException) -> str:
    """The end of an error message about a module that cannot be read, where a remedy is known."""
    if not isinstance(error, SyntaxError):
        return ""
    return ": save it as UTF-8" if "(unicode error)" in str(error) else ": correct this line"


def _from_file(file: Path, kind: str) -> ModuleType:
    if not file.is_file():
        raise InputError(f"{kind} file '{file}' does not exist: give its path from the working directory")
    name = "tljax_plugin_" + hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:12]
    loaded = ModuleType(name)
    loaded.__file__ = str(file)
    sys.modules[name] = loaded
    try:
        text = file.read_bytes()
        files.require_bytes_of_text(text, f"{kind} file '{file}'")
        with switches.guarded(f"{kind} file '{file}'"):
            # Not by way of the import system, whose bytecode is stale for an edit of the same size in the same second.
            exec(compile(text, str(file), "exec"), loaded.__dict__)
    except InputError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{kind} file '{file}' fails when read: {describe(error)}{_remedy(error)}") from error
    return loaded


def attribute(spec: Spec, loaded: ModuleType, kind: str) -> Any:
    """The function of a plugin's module that a spec names; without a name, the one called as its `kind`.

    A metric may be a `Metric` too. Raises InputError where it is missing.
    """
    if len(spec.words) > 1:
        raise InputError(f"{kind} '{spec.name}' is followed by {spec.words}: one attribute, then option=value")
    name = spec.words[0] if spec.words else kind
    function = getattr(loaded, name, None)
    if not (callable(function) or (kind == "metric" and isinstance(function, Metric))):
        functions = [
            n
            for n, value in vars(loaded).items()
            if inspect.isfunction(value) and value.__module__ == loaded.__name__ and not n.startswith("_")
        ]
        raise InputError(f"{kind} '{spec.name}' has no function '{name}'{nearest(name, functions)}")
    return function


_PARTS = ("adapt", "merge", "reinit", "left_out", "finish", "batch_stats", "factored")
"""The functions that a strategy's file may offer beside the strategy."""


def method(text: str) -> tuple[Method, dict[str, Any]]:
    """The Method that a strategy's spec stands for, with a name before it or without, and its options.

    >>> method("last_k:k=2")[1]
    {'k': 2}
    """
    spec = parse(named(text)[1])
    loaded = module(spec, "tljax.strategies", "strategy")
    strategy = attribute(spec, loaded, "strategy")
    parts = {name: getattr(loaded, name, None) for name in _PARTS}
    for name, part in parts.items():
        if part is not None and not callable(part):
            raise InputError(
                f"strategy '{spec.name}': its `{name}` is {shown(part)}, not a function: write def {name}(...)"
            )
    driven = bool(getattr(loaded, "DATA_DRIVEN", False))
    edited = _digest(loaded, strategy, *parts.values())
    options = bind(strategy, spec.options, f"strategy '{spec.name}'")
    return Method(strategy, **parts, data_driven=driven, code=edited), options


def outside_digest(text: str, package: str, kind: str) -> str:
    """SHA-256 of the files of what a spec names outside tljax, by its file or dotted path; "" for what is inside."""
    spec = parse(text)
    if "." not in spec.name:
        return ""
    loaded = module(spec, package, kind)
    offered: Any = attribute(spec, loaded, kind)
    return _digest(loaded, *((offered.item, offered.whole) if isinstance(offered, Metric) else (offered,)))


def _origin(function: Any) -> Any:
    """The function behind partial arguments; the class of an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__name__") else type(function)


def _digest(named: ModuleType, *functions: Callable[..., Any] | None) -> str:
    """SHA-256 of the files that a plugin is made of, so that an edit of any of them changes it.

    These are the file that names it, those that define its functions, and what each imports from its own folder.
    """
    modules = [named, *(sys.modules.get(_origin(f).__module__) for f in functions if f is not None)]
    waiting = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    sha = hashlib.sha256()
    seen: set[Path] = set()
    while waiting:
        file = waiting.pop(0).resolve()
        if file not in seen and file.is_file():
            seen.add(file)
            sha.update(file.read_bytes())
            waiting += _beside(file)
    return sha.hexdigest()


def _beside(file: Path) -> list[Path]:
    """The files of the same folder that a file imports, by the last of their names."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of what is nested too deep
        return []
    words = [alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    words += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return [file.with_name(f"{word.rpartition('.')[2]}.py") for word in words]
