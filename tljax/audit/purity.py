"""Whether a step of Python leaves alone what it could read at its next call: its globals, its closure, its object.

A jitted step runs its Python once, and is one program from then on. Any other step is run anew at each call, and one
that counts in Python (`self.step += 1`) may be another program later on. So what its function names is noted before a
trace and after it, by identity and by the numbers, texts and lengths that it has.
"""

import dis
import functools
import itertools
import operator
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tljax.audit import program

MOST = 200
"""The functions that are looked into: a step and those that it names."""
Snapshot = Mapping[tuple[Any, str], Any]
"""Of each variable (of a code object, by its name): what it is, as far as it can be compared."""


def is_jitted(step: Callable[..., Any]) -> bool:
    """Whether a step is one compiled program, by `jax.jit`, `jax.pmap` or their like of flax and equinox.

    >>> import jax
    >>> is_jitted(jax.jit(abs)), is_jitted(functools.partial(jax.jit(abs))), is_jitted(abs)
    (True, True, False)
    """
    while isinstance(step, functools.partial):
        step = step.func
    return hasattr(step, "lower")


def snapshot(step: Callable[..., Any]) -> Snapshot:
    """What the functions of a step can read besides their arguments."""
    rows: dict[tuple[Any, str], Any] = {(None, "np.random"): str(np.random.get_state(legacy=False))}
    rows[None, "random"] = hash(random.getstate())
    held = step
    while isinstance(held, functools.partial):
        held = held.func
    if isinstance(held, types.MethodType):
        rows[held.__func__.__code__, "self"] = _mark(held.__self__)
    elif _called(held) is not None:
        rows[_called(held).__code__, "self"] = _mark(held)
    for function in _functions(step):
        code = function.__code__
        for name, value in _named(function):
            rows[code, name] = _mark(value)
        for name, value in vars(function).items():
            rows[code, name] = _mark(value)
    return rows


def changed(before: Snapshot, after: Snapshot) -> str | None:
    """The first variable that differs, and the line that names it: "'step_no' at loop.py:12 (train)"; None if none.

    >>> count = 0
    >>> def step(state, batch):
    ...     global count
    ...     count += 1
    >>> before = snapshot(step)
    >>> step(None, None)
    >>> changed(before, snapshot(step)).partition(" at ")[0]
    "'count'"
    """
    for key, mark in after.items():
        if key in before and before[key] == mark:
            continue
        code, name = key
        was, attribute = before.get(key), ""
        if isinstance(mark, dict) and isinstance(was, dict):
            attribute = next((part for part in mark if was.get(part) != mark[part]), "")
        line = _line(code, attribute or name) or _line(code, name)
        return f"'{name}{f'.{attribute}' if attribute else ''}'{f' at {line}' if line else ''}"
    return None


def _called(value: Any) -> Any:
    """The function that an object of a user's class is called by; None if there is none."""
    method = type(value).__dict__.get("__call__")
    return method if isinstance(method, types.FunctionType) and not isinstance(value, types.FunctionType) else None


def _functions(step: Any) -> Iterator[types.FunctionType]:
    """The functions of Python that a step calls by name, itself first: those that are no library's."""
    waiting, seen = [step], set[int]()
    while waiting and len(seen) < MOST:
        function = waiting.pop(0)
        while isinstance(function, functools.partial | types.MethodType) or hasattr(function, "__wrapped__"):
            if isinstance(function, functools.partial):
                function = function.func
            else:
                function = getattr(function, "__func__", None) or function.__wrapped__
        if not isinstance(function, types.FunctionType):
            function = _called(function)
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        if program.is_library(function.__code__.co_filename.replace("\\", "/")) and len(seen) > 1:
            continue
        yield function
        waiting += [value for _, value in _named(function) if isinstance(value, types.FunctionType | types.MethodType)]


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of a function's closure and its globals, with their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    """The names in a function, and in those that are defined within."""
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, types.CodeType)))


def _mark(value: Any) -> Any:
    """What can be compared of a value: of one of the user's objects a row for each of its attributes."""
    if type(value).__module__.partition(".")[0] not in _LIBRARIES and not isinstance(value, type | types.ModuleType):
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, types.FunctionType | types.MethodType):
            return {"": id(value)} | {str(name): _shallow(attribute) for name, attribute in attributes.items()}
    return _shallow(value)


_LIBRARIES = ("builtins", "jax", "jaxlib", "flax", "optax", "equinox", "numpy", "functools", "tljax")


def _shallow(value: Any) -> Any:
    """What can be compared of a value, with that of what it contains."""
    if isinstance(value, dict):
        return "dict", id(value), len(value), str([(str(key), _plain(item)) for key, item in value.items()][:MOST])
    if isinstance(value, list | set | tuple):
        return type(value).__name__, len(value), str([_plain(item) for item in value][:MOST])
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return type(value).__name__, repr(value)
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, itertools.count | itertools.repeat):
        return repr(value)
    if isinstance(value, list | dict | set):
        return id(value), len(value)
    if isinstance(value, Iterator):
        return id(value), operator.length_hint(value, -1)
    return id(value)


def _line(code: types.CodeType | None, name: str) -> str | None:
    """The line of a function that writes a variable; if none does, the first that names it."""
    if code is None:
        return None
    written, named = None, None
    for instruction in dis.get_instructions(code):
        if instruction.argval != name or instruction.positions is None:
            continue
        named = named or instruction.positions.lineno
        if instruction.opname.startswith("STORE"):
            written = written or instruction.positions.lineno
    line = written or named
    file = code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{file}:{line} ({code.co_name})" if line else None
