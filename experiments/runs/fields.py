"""The fields of what JSON holds, and their types: looked at before anything is made of them.

A SHA-256 says that a file is as it was written; it does not say that this tljax wrote it.
"""

import json
from collections.abc import Mapping
from typing import Any

Form = Any
"""What a value of JSON may be: a type (a float may be whole, an int is no bool), None, several of these in a tuple;
[form] of a list, {str: form} of an object with any names; {"name": form, "other?": form} of an object with these fields
and perhaps others, where "?" is behind the name of one that may be lacking."""

_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
}
_WORDS |= {list: "a list", None: "null"}
_LARGEST = 2**63
"""Whole numbers are below it, as NumPy's are."""
_QUICK: Mapping[Any, set[type]] = {str: {str}, float: {float}, (float, None): {float, type(None)}}
"""{form: types that a part may have for sure}: a list of no others needs no look at each."""


def fault(value: Any, form: Form, place: str = "") -> str:
    """What of a value is not of a form, in words that begin with its place; "" where all is.

    >>> fault({"look": 1, "rows": [{"seed": 0}]}, {"look": int, "rows": [{"seed": int, "name?": str}]})
    ''
    >>> fault({"rows": [{"seed": 0}, {"seed": "x"}]}, {"rows": [{"seed": int}]})
    'rows[1].seed is "x", not a whole number'
    >>> fault({}, {"rows": [dict]}), fault({"a": 1.5}, {str: (str, None)})
    ('rows is not there', 'a is 1.5, not text or null')
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            return _other(value, list, place)
        if isinstance(form[0], type | tuple) and set(map(type, value)) <= _QUICK.get(form[0], set()):
            return ""
        faults = (fault(part, form[0], f"{place}[{i}]") for i, part in enumerate(value))
        return next(filter(None, faults), "")
    if isinstance(form, Mapping):
        return _of_object(value, form, place)
    kinds = form if isinstance(form, tuple) else (form,)
    nested = [kind for kind in kinds if isinstance(kind, list | Mapping)]
    if any(_is(value, kind) for kind in kinds if kind not in nested):
        return ""
    return fault(value, nested[0], place) if nested else _other(value, form, place)


def _of_object(value: Any, form: Mapping[Any, Form], place: str) -> str:
    if not isinstance(value, dict):
        return _other(value, dict, place)
    before = f"{place}." if place else ""
    for name, part in value.items() if str in form else ():
        if words := fault(part, form[str], before + name):
            return words
    for name in (name for name in form if name is not str):
        own = name.removesuffix("?")
        if own not in value and own == name:
            return f"{before}{own} is not there"
        if own in value and (words := fault(value[own], form[name], before + own)):
            return words
    return ""


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is int:
        return type(value) is int and abs(value) < _LARGEST
    if kind is float:
        return type(value) is float or _is(value, int)
    return isinstance(value, kind)


def _other(value: Any, form: Form, place: str) -> str:
    kinds = form if isinstance(form, tuple) else (form,)
    kinds = tuple(type(kind) if isinstance(kind, list | Mapping) else kind for kind in kinds)
    there = _WORDS[type(value)] if isinstance(value, list | dict) else json.dumps(value)[:60]
    return f"{place or 'it'} is {there}, not {' or '.join(_WORDS[kind] for kind in kinds)}"
