"""The code that a plugin is made of: where it comes from, and what an edit changes."""

import ast
import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def origin(function: Any) -> Any:
    """The function behind partial arguments; the class of an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__name__") else type(function)


def digest(named: ModuleType, *functions: Callable[..., Any] | None) -> str:
    """SHA-256 of what an edit of a plugin changes.

    That is the file that names it, those that define its functions, and what each imports from its own folder.
    """
    modules = [named, *(sys.modules.get(origin(f).__module__) for f in functions if f is not None)]
    files = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    whole = hashlib.sha256()
    seen: set[Path] = set()
    while files:
        file = files.pop(0).resolve()
        if file not in seen and file.is_file():
            seen.add(file)
            whole.update(file.read_bytes())
            files += _beside(file)
    return whole.hexdigest()


def _beside(file: Path) -> list[Path]:
    """The files of the same folder that a file imports, by the last of their names."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of what is nested too deep
        return []
    words = [alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    words += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return [file.with_name(f"{word.rpartition('.')[2]}.py") for word in words]
